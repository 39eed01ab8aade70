"""Read the samples of a tar as a stream, in the time that its bytes take.

Nearly every header in a shard is a plain file's. `tarfile` takes seven times as long for a sample of seven members as
the reader here (0.35 ms in the place of 0.05, measured), which is 15 % of what a reinforced sample costs; whatever is
not plain it still reads.

Leaves out: compressed tars (their readers know no bound), and writing. Imports nothing of torch: `scripts/` reads
headers with it too.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

CHUNK = 1 << 20
MAX_MEMBER = 2**28  # bytes; a larger member is passed over, and its sample lacks it


def plain_member(header: bytes) -> tuple[str, int] | None:
    """``(name, size)`` of a plain file's ustar header, as nearly all are; None: tarfile is to look at it."""
    size, checksum = header[124:136].rstrip(b"\0 "), header[148:156].rstrip(b"\0 ")
    if header[156:157] != b"0" or header[257:262] != b"ustar" or header[345:346] != b"\0":
        return None  # not a plain file, or a name in two parts
    if not (size.isdigit() and checksum.isdigit()) or size.strip(b"01234567") or checksum.strip(b"01234567"):
        return None
    # the lower half of Adler-32 is the sum of all bytes; a header's checksum counts its own field as eight spaces
    if (zlib.adler32(header) & 0xFFFF) != (1 + int(checksum, 8) - 8 * 32 + sum(header[148:156])) % 65521:
        return None
    return header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), int(size, 8)


class _Again(io.RawIOBase):
    """A stream whose first bytes, read already, come once more."""

    def __init__(self, first: bytes, stream: BinaryIO):
        self.first, self.stream = first, stream

    def read(self, size: int = -1) -> bytes:
        first, self.first = self.first[:size], self.first[size:]
        return first + self.stream.read(size - len(first))


def read_members(stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the plain files in an uncompressed tar that are ``wanted`` by their names.

    Raises:
        tarfile.TarError: the tar is damaged, or cut off.
    """
    while True:
        header = stream.read(tarfile.BLOCKSIZE)
        if plain := plain_member(header):
            name, size = plain
            data = _read(stream, size) if wanted(name) and size <= MAX_MEMBER else _pass_over(stream, size)
            _pass_over(stream, -size % tarfile.BLOCKSIZE)
            if data is not None:
                yield name, data
        elif not header.strip(b"\0"):
            if not header:
                raise tarfile.ReadError("cut off: no end mark")
            return
        else:
            with tarfile.open(fileobj=_Again(header, stream), mode="r|") as rest:
                for info in rest:
                    rest.members.clear()  # it keeps every header otherwise
                    if info.isreg() and not info.issparse() and wanted(info.name) and info.size <= MAX_MEMBER:
                        yield info.name, _read(rest.extractfile(info), info.size)
            return


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise tarfile.ReadError("cut off inside a member")
    return data


def _pass_over(stream: BinaryIO, size: int) -> None:
    while size:
        size -= len(_read(stream, min(size, CHUNK)))
