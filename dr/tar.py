"""Read tars of samples: their members, the spans of the members' bytes, and which members form one
sample.

Nearly every header in a shard belongs to a plain file. ``tarfile`` takes seven times as long as the
reader here for a sample of seven members (0.35 ms against 0.05, scripts/benchmarks/loader.py), so
plain headers are parsed here and all other headers are left to ``tarfile``.

Not supported: compressed tars, because their readers do not limit what they inflate, and writing.
The module imports neither torch nor webdataset.
"""

import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

from .files import read_file

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
MAX_MEMBER = 2**28  # bytes; the readers skip a larger member, so its sample lacks it
MAX_INFLATED = 2**26  # bytes of one embedding member; a sample of DataCompDR-12M holds 221,184
MAX_EXTENDED_HEADER = 1 << 20  # bytes; tarfile reads such a header into memory as a whole
MAX_PADDING = 1 << 20  # bytes of zeros after the last member; some tools pad this far
SIZES = "sizes.json"
MAX_SIZES = 1 << 28  # bytes of it

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
# Required members of a sample: a name for messages, and the extensions of which one must be there.
PLAIN_MEMBERS = {"an image": IMAGE_MEMBERS, "a caption": ("txt",)}
REINFORCED_MEMBERS = {
    **PLAIN_MEMBERS,
    "synthetic captions": ("syn.json",),
    "augmentation parameters": ("paug.json",),
    "embeddings": ("npz", "safetensors", "pth.gz"),
}
# What reinforced training reads: the required members, and json, which may hold more captions.
USED_MEMBERS = {*(name for names in REINFORCED_MEMBERS.values() for name in names), "json"}
KNOWN_MEMBERS = USED_MEMBERS | {"url.txt", "cls"}  # the latter are in shards, but not used

Value = TypeVar("Value")
# As webdataset's base_plus_ext: the folder and everything up to the first dot of the file's name,
# then the rest.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)").fullmatch
_METADATA = re.compile(r"__[^/]*__(?:$|/)").match


class Member(NamedTuple):
    """A member of a tar, and where it is.

    Attributes:
        name: as stored in the tar.
        header: offset of its first header.
        offset: offset of its bytes.
        size: number of its bytes.
        is_file: False for links, devices and sparse files, which have no bytes of their own to
            read.
    """

    name: str
    header: int
    offset: int
    size: int
    is_file: bool


class Unknown(NamedTuple):
    """Members with unknown extensions: their number, and the name of the first."""

    number: int
    first: str

    def __str__(self) -> str:
        key, extension = (part[:200] for part in split_name(self.first) or ("", ""))
        return (
            f"members with unknown extensions: {self.number}, the first is {self.first[:200]!r}, "
            f"read as key {key!r} and extension {extension!r} (the key ends at the first dot of "
            "the file name)"
        )


class Members(dict[str, Value]):
    """The members of a sample by extension, each with a value such as its bytes.

    Attributes:
        unknown: those whose extension is not one of ``KNOWN_MEMBERS``; None: there are none.
    """

    unknown: Unknown | None = None


# --- headers --------------------------------------------------------------------------------------
def parse_plain_header(header: bytes) -> tuple[str, int] | None:
    """``(name, size)`` of a plain file's ustar header; None for any header that tarfile has to
    parse."""
    size, checksum = header[124:136].rstrip(b"\0 "), header[148:156].rstrip(b"\0 ")
    if header[156:157] != b"0" or header[257:262] != b"ustar" or header[345:346] != b"\0":
        return None  # not a plain file, or a name in two parts
    if (
        not (size.isdigit() and checksum.isdigit())
        or size.strip(b"01234567")
        or checksum.strip(b"01234567")
    ):
        return None
    # The lower half of Adler-32 is the sum of all bytes. A header's checksum counts its own field
    # as eight spaces.
    if (zlib.adler32(header) & 0xFFFF) != (
        1 + int(checksum, 8) - 8 * 32 + sum(header[148:156])
    ) % 65521:
        return None
    return header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), int(size, 8)


class _ForwardStream(io.RawIOBase):
    """Gives a stream that can only be read a position, which can be set forward, or back to the
    last block read."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.position, self.last, self.again = stream, 0, b"", b""

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        data, self.again = self.again[:size], self.again[size:]
        if len(data) < size:
            data += self.stream.read(size - len(data))
        self.position += len(data)
        self.last = data if size <= BLOCK else b""
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and position == self.position - len(self.last):
            self.again, self.position, self.last = self.last + self.again, position, b""
        while self.position < position:
            if not self.read(min(CHUNK, position - self.position)):
                raise tarfile.ReadError("cut off inside a member")
        return self.position


def read_headers(
    file: BinaryIO, start: int = 0, end: int | None = None, whole: bool = False
) -> Iterator[Member]:
    """Yield the members of an uncompressed tar, except folders. Only headers are read.

    Args:
        file: a binary file. Between two members the caller may read the first one's bytes.
        start: offset of the first header.
        end: where to stop; None: at the tar's end mark.
        whole: also require that only zeros follow the end mark.

    Raises:
        tarfile.ReadError: the tar is damaged or cut off. The members before the damage were
            yielded.
    """
    length, offset, tar = None, start, None
    if not isinstance(file, _ForwardStream):
        length = file.seek(0, os.SEEK_END)
    while end is None or offset < end:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise tarfile.ReadError(f"cut off at byte {offset}: no end mark")
        if plain := parse_plain_header(header):
            member = Member(plain[0], offset, offset + BLOCK, plain[1], True)
            offset += BLOCK + padded(member.size)
        elif not header.strip(b"\0"):
            if whole:
                _check_padding(file, offset)
            return
        else:
            file.seek(offset)
            try:
                if header[156:157] in b"LKxgX" and _parse_size(header) > MAX_EXTENDED_HEADER:
                    raise ValueError(f"its extension has over {MAX_EXTENDED_HEADER} bytes")
                if tar is None:
                    tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (the caller closes the file)
                else:
                    tar.offset = offset
                info = tar.next()
            except (
                ValueError,
                LookupError,
                OverflowError,
                RecursionError,
                tarfile.HeaderError,
            ) as error:
                raise tarfile.ReadError(f"no valid header at byte {offset}: {error}") from error
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            if info is None or info.size < 0:
                raise tarfile.ReadError(f"no valid header at byte {offset}")
            is_file = info.isreg() and not info.issparse()
            member, offset = (
                Member(info.name, offset, info.offset_data, info.size, is_file),
                tar.offset,
            )
            if info.isdir():
                continue
        if length is not None and offset > length:
            raise tarfile.ReadError(
                f"cut off inside a member, {member.name!r} at byte {member.header}"
            )
        yield member


def _parse_size(header: bytes) -> int:
    return tarfile.nti(header[124:136])  # type: ignore[attr-defined]


def padded(size: int) -> int:
    """Bytes that ``size`` bytes of a member take in a tar."""
    return size + -size % BLOCK


def _check_padding(file: Any, offset: int) -> None:
    tail = file.read(MAX_PADDING + 1)
    if len(tail) > MAX_PADDING or tail.strip(b"\0"):
        raise tarfile.ReadError(
            f"damaged, or several tars in one file: data after the end mark at byte {offset}"
        )


# --- samples --------------------------------------------------------------------------------------
def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and extension (lower case); None for names without both, which belong to no
    sample.

    The key ends at the first dot of the file's name: ``a/b.c.JPG`` is the key ``a/b`` and the
    extension ``c.jpg``.
    """
    found = _KEY_AND_EXTENSION(name)
    if found is None or _METADATA(name):
        return None
    return found[1], found[2].lower()


def merge_unknown(one: Unknown | None, other: Unknown | None) -> Unknown | None:
    """The unknown members of both."""
    if one is None or other is None:
        return one or other
    return Unknown(one.number + other.number, one.first)


def group_members(
    members: Iterable[tuple[str, Value | None]],
) -> Iterator[tuple[str, Members[Value]]]:
    """Group members into samples as WebDataset does: neighbours that share a key, each extension
    once.

    Args:
        members: names, and a value to keep for each member; None: none. A member without a value
            separates samples like any other.

    Yields:
        key and ``{extension: value}``. Where ``members`` raises, the sample before it comes
        first.
    """
    current: str | None = None
    sample = Members[Value]()
    seen: set[str] = set()
    error: Exception | None = None
    members = iter(members)
    while True:
        try:
            name, value = next(members)
        except StopIteration:
            break
        except Exception as raised:  # of the file or the tar
            error = raised
            break
        if (found := split_name(name)) is None:
            continue
        key, extension = found
        if key != current or extension in seen:
            if current is not None:
                yield current, sample
            current, sample, seen = key, Members(), set()
        seen.add(extension)
        if value is not None:
            sample[extension] = value
        if extension not in KNOWN_MEMBERS:
            sample.unknown = merge_unknown(sample.unknown, Unknown(1, name))
    if current is not None:
        yield current, sample
    if error is not None:
        raise error


def read_samples(
    stream: BinaryIO, wanted: Callable[[str], bool], whole: bool = False
) -> Iterator[tuple[str, Members[bytes]]]:
    """Read the samples of an uncompressed tar one after the other.

    Args:
        stream: a file, or anything with ``read``.
        wanted: which members to read, by extension. Others are skipped, as are those over
            ``MAX_MEMBER`` bytes.
        whole: as in :func:`read_headers`.

    Yields:
        key and ``{extension: bytes}``.

    Raises:
        tarfile.ReadError: the tar is damaged or cut off. What could be read was yielded.
    """
    file: Any = stream if getattr(stream, "seekable", bool)() else _ForwardStream(stream)

    def members() -> Iterator[tuple[str, bytes | None]]:
        for member in read_headers(file, whole=whole):
            found = split_name(member.name)
            if not member.is_file or found is None:
                continue
            if member.size > MAX_MEMBER or not wanted(found[1]):
                yield member.name, None
                continue
            data = file.read(member.size)
            if len(data) != member.size:
                raise tarfile.ReadError(
                    f"cut off inside a member, {member.name!r} at byte {member.header}"
                )
            yield member.name, data

    return group_members(members())


def sample_spans(file: BinaryIO, whole: bool = False) -> Iterator[tuple[str, Members[Member]]]:
    """The samples of an uncompressed tar, as in :func:`read_samples`, without reading their bytes.

    Args:
        file, whole: as in :func:`read_headers`.
    """
    members = (member for member in read_headers(file, whole=whole) if member.is_file)
    return group_members(
        (member.name, member if member.size <= MAX_MEMBER else None) for member in members
    )


def read_sizes(folder: str) -> dict[str, int]:
    """Samples in each shard of a folder, as its ``sizes.json`` has them; empty where there is no
    such file.

    Raises:
        ValueError: the file does not hold ``{shard's file name: number of samples}``.
        OSError: it cannot be read. A store without permission to list answers so also where there
            is no such file.
    """
    path = os.path.join(folder, SIZES)
    try:
        sizes = json.loads(read_file(path, MAX_SIZES).decode("utf-8-sig"))
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise PermissionError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(sizes, dict) or not all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0
        for size in sizes.values()
    ):
        raise ValueError(f"{path}: expected an object with the number of samples of each shard")
    return sizes
