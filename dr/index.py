"""The index of a shard: where its members and the arrays of its embeddings are.

``<shard>.index`` is a JSON file next to a shard, of about 90 bytes for each sample. With it a shard
is opened with one read, in place of one read for each header, and single rows of embeddings can be
read::

    {"version": 1, "bytes": 2967040, "modified": 1764360000, "header": 512,
     "layouts": [{"extensions": ["jpg", "txt", "npz"],
                  "arrays": {"image_emb": [0, 192, 192, "F32", 30, 1536], …}}],
     "samples": [["4f0c…", 0, 68011, 61, 221704], …]}

``bytes`` and ``modified`` are the shard's size and its time of change in whole seconds. ``header``
is the number of bytes before each member: 512, or more if each header has an extension. A sample is
its key, the number of its layout, and the sizes of its members in the order of the layout's
extensions. Members follow each other without gaps, so the sizes give their places. An array is
three places in its member, its type (as safetensors names it), rows and columns; see ``Array``.
``arrays`` is null where only the whole member can be read.

An index that does not fit its shard can cost time, but not give wrong data: readers compare what
they read with the index, by :func:`is_header_of` and :meth:`Array.is_described_by`.

The module imports neither torch nor NumPy.
"""

import ast
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from .files import Positioned
from .tar import (
    BLOCK,
    KNOWN_MEMBERS,
    MAX_INFLATED,
    MAX_MEMBER,
    MAX_PADDING,
    REINFORCED_MEMBERS,
    Members,
    Unknown,
    padded,
    parse_plain_header,
    sample_spans,
    split_name,
)

SUFFIX = ".index"
VERSION = 1
MAX_SHARE = 50  # an index of more than 1/50 of its shard, and of more than MIN_BOUND, is not read
MIN_BOUND = 1 << 20  # bytes
MAX_DESCRIPTION = 1 << 16  # bytes that describe an array, or all arrays of a safetensors member
REQUIRED_ARRAYS = {"image_emb", "text_emb"}
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_NPY_TYPES = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}


class IndexFault(ValueError):
    """Why an index cannot be used, or why a shard cannot have one."""


@dataclass(frozen=True)
class Array:
    """Where an array ``[rows, columns]`` is in its member.

    Attributes:
        start, stop: between these offsets the member describes it.
        offset: of its first row.
        dtype: a key of ``ITEM_BYTES``.
        rows, columns: its shape.
    """

    start: int
    stop: int
    offset: int
    dtype: str
    rows: int
    columns: int

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def row_bytes(self) -> int:
        return self.columns * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.row_bytes

    def is_described_by(self, data: bytes, name: str, extension: str) -> bool:
        """Whether ``data``, the bytes from ``start`` to ``stop``, describe this array."""
        try:
            if extension == "npz":
                return _describe_npz_array(data, self.start) == (name, self)
            return _safetensors_arrays(data)[name] == self
        except (ValueError, LookupError, TypeError, AttributeError, struct.error):
            return False


class Entry(NamedTuple):
    """A sample in its shard.

    Attributes:
        key: of the sample.
        members: offset and size by extension.
        arrays: of the embeddings, by name; None: only the whole member can be read.
    """

    key: str
    members: Members[tuple[int, int]]
    arrays: dict[str, Array] | None = None


def is_header_of(header: bytes, key: str, extension: str, size: int) -> bool:
    """Whether the last block before a member says that it is this member."""
    found = parse_plain_header(header)
    return found is not None and found[1] == size and split_name(found[0]) == (key, extension)


# --- arrays in embedding members ------------------------------------------------------------------
@lru_cache(64)
def _parse_npy_header(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Type and shape in the npy header (version 1.0) that ``data`` is."""
    (length,) = struct.unpack_from("<H", data, 8)
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) != 10 + length:
        raise ValueError("not a header in npy format 1.0")
    header = ast.literal_eval(data[10:].decode("latin1").strip())
    if header["fortran_order"]:
        raise ValueError("columns first")
    return _NPY_TYPES[header["descr"]], header["shape"]


def _describe_npz_array(data: bytes, start: int) -> tuple[str, Array]:
    """Name and place of an uncompressed array, by its zip and npy headers, which ``data`` is."""
    signature, flags, method = struct.unpack_from("<4s2xHH", data)
    name_bytes, extra = struct.unpack_from("<HH", data, 26)
    if signature != b"PK\3\4" or flags & 1 or method != zipfile.ZIP_STORED:
        raise ValueError("no header of an uncompressed member")
    dtype, (rows, columns) = _parse_npy_header(data[30 + name_bytes + extra :])
    name = data[30 : 30 + name_bytes].decode().removesuffix(".npy")
    stop = start + len(data)
    return name, Array(start, stop, stop, dtype, rows, columns)


@lru_cache(64)
def _safetensors_arrays(data: bytes) -> dict[str, Array]:
    """All arrays of two dimensions and a known type, by the header that ``data`` begins with."""
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_DESCRIPTION - 8:
        raise ValueError("a header that is too long")
    arrays = {}
    for name, about in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        (first, end), dtype = about["data_offsets"], about["dtype"]
        if dtype in ITEM_BYTES and len(about["shape"]) == 2:
            stop = 8 + length
            arrays[name] = Array(0, stop, stop + first, dtype, *about["shape"])
            if arrays[name].end != stop + end:
                raise ValueError("a shape that does not fit its bytes")
    return arrays


class _Section(Positioned):
    """A member of a tar, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size = file, offset, size

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        data = self.file.read(min(len(buffer), max(0, self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def are_described(file: BinaryIO, offset: int, arrays: dict[str, Array], extension: str) -> bool:
    """Whether the member at ``offset`` of a shard has these arrays."""
    for name, array in arrays.items():
        file.seek(offset + array.start)
        data = file.read(array.stop - array.start)
        if not array.is_described_by(data, name, extension):
            return False
    return True


def find_arrays(file: BinaryIO, offset: int, size: int, extension: str) -> dict[str, Array] | None:
    """The arrays of an embedding member of which single rows can be read.

    Args:
        file: the shard.
        offset, size: of the member.
        extension: of the member.

    Returns:
        Arrays by name, ``image_emb`` and ``text_emb`` among them; None: there are none, because the
        member is compressed, too large, unusual or damaged.
    """
    section = _Section(file, offset, size)
    arrays: dict[str, Array] = {}
    try:
        if extension == "safetensors":
            arrays = _safetensors_arrays(section.read(min(size, MAX_DESCRIPTION)))
        elif extension == "npz":
            with zipfile.ZipFile(section) as archive:
                entries = archive.infolist()
            for entry in entries:
                section.seek(entry.header_offset)
                data = section.read(BLOCK)
                name_bytes, extra = struct.unpack_from("<HH", data, 26)
                npy = 30 + name_bytes + extra
                (length,) = struct.unpack_from("<H", data, npy + 8)
                name, array = _describe_npz_array(data[: npy + 10 + length], entry.header_offset)
                if entry.filename != f"{name}.npy":
                    return None
                arrays[name] = array
    except Exception:  # whatever a broken or hostile file raises: training reads it as a whole
        return None
    if size > MAX_INFLATED or not arrays.keys() >= REQUIRED_ARRAYS:
        return None
    return arrays if all(array.end <= size for array in arrays.values()) else None


# --- the index of a shard -------------------------------------------------------------------------
def max_index_bytes(shard_bytes: int) -> int:
    """A larger index is damaged."""
    return max(MIN_BOUND, shard_bytes // MAX_SHARE)


class ShardIndex:
    """The samples of a shard, by what its index says.

    Args:
        data: the content of the index.
        size, modified: of the shard; ``modified`` may be None: not known.

    Raises:
        IndexFault: the index is damaged, or of another version or shard.
    """

    def __init__(self, data: bytes, size: int, modified: int | None):
        if len(data) > max_index_bytes(size):
            raise IndexFault("is damaged: it is too large")
        try:
            content = json.loads(data)
            if content["version"] != VERSION:
                raise IndexFault(f"is of version {content['version']}, expected {VERSION}")
            if content["bytes"] != size or modified not in (None, content["modified"]):
                raise IndexFault("is stale: the size or time of the shard is another")
            self.header: int = content["header"]
            if type(self.header) is not int or (content["samples"] and self.header < BLOCK):
                raise ValueError(f"header {self.header}")
            self.layouts = [_read_layout(layout) for layout in content["layouts"]]
            self.rows: list[list] = content["samples"]
            self.starts = list(self._find_starts())
        except IndexFault:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise IndexFault(f"is damaged: {type(error).__name__}: {error}") from error
        if not 2 * BLOCK <= size - self.starts[-1] <= 2 * BLOCK + MAX_PADDING:
            raise IndexFault("is damaged: its samples do not fill the shard")

    def _find_starts(self) -> Iterator[int]:
        """Where each sample begins, and where the last one ends."""
        start = 0
        for key, layout, *sizes in self.rows:
            yield start
            if type(key) is not str or len(sizes) != len(self.layouts[layout][0]):
                raise ValueError(f"sample {key}")
            for size in sizes:
                if type(size) is not int or not 0 <= size <= MAX_MEMBER:
                    raise ValueError(f"size {size}")
                start += self.header + padded(size)
        yield start

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Entry:
        (key, layout, *sizes), offset = self.rows[place], self.starts[place]
        extensions, arrays = self.layouts[layout]
        members, unknown = Members[tuple[int, int]](), []
        for extension, size in zip(extensions, sizes, strict=True):
            members[extension] = offset + self.header, size
            offset += self.header + padded(size)
            if extension not in KNOWN_MEMBERS:
                unknown.append(extension)
        if unknown:
            members.unknown = Unknown(len(unknown), f"{key}.{unknown[0]}")
        return Entry(key, members, arrays)


def _read_layout(layout: dict) -> tuple[tuple[str, ...], dict[str, Array] | None]:
    """Extensions and arrays of a layout in an index."""
    extensions, arrays = layout["extensions"], layout["arrays"]
    if not all(type(extension) is str for extension in extensions):
        raise ValueError(f"extensions {extensions}")
    if arrays is None:
        return tuple(extensions), None
    found = {name: Array(*fields) for name, fields in arrays.items()}
    if not found.keys() >= REQUIRED_ARRAYS:
        raise ValueError(f"arrays {list(found)}")
    for a in found.values():
        numbers = a.start, a.stop - a.start, a.offset, a.rows, a.columns
        if not all(type(n) is int and n >= 0 for n in numbers) or a.dtype not in ITEM_BYTES:
            raise ValueError(f"array {a}")
        if a.stop - a.start > MAX_DESCRIPTION:
            raise ValueError(f"array {a}")
    return tuple(extensions), found


def make_index(file: BinaryIO) -> bytes:
    """The content of a shard's index.

    Args:
        file: the shard. Only its headers are read, and those of its embeddings.

    Raises:
        tarfile.ReadError: the tar is damaged or cut off.
        IndexFault: it has something else than plain files with names of up to 100 bytes.
    """
    status, header, at = os.fstat(file.fileno()), 0, 0
    layouts, samples = dict[str, int](), []  # numbers of layouts by their JSON
    known = dict[tuple[str, int], dict[str, Array] | None]()  # the last arrays of such a member
    for key, members in sample_spans(file, whole=True):
        arrays = None
        for extension, member in members.items():
            header = header or member.offset - member.header
            file.seek(member.offset - BLOCK)
            plain = is_header_of(file.read(BLOCK), key, extension, member.size)
            if not plain or member.header != at or member.offset - at != header:
                raise IndexFault(f"{member.name!r} at byte {at} is not stored as a plain file")
            at = member.offset + padded(member.size)
        for extension in REINFORCED_MEMBERS["embeddings"]:
            if extension in members:
                _, _, offset, size, _ = members[extension]
                arrays = known.get((extension, size))
                if arrays is None or not are_described(file, offset, arrays, extension):
                    arrays = find_arrays(file, offset, size, extension)
                known[extension, size] = arrays
                break  # training reads the first
        fields = {name: list(vars(array).values()) for name, array in (arrays or {}).items()}
        layout = json.dumps({"extensions": list(members), "arrays": fields or None})
        sizes = [member.size for member in members.values()]
        samples.append([key, layouts.setdefault(layout, len(layouts)), *sizes])
    content = {
        "version": VERSION,
        "bytes": status.st_size,
        "modified": int(status.st_mtime),
        "header": header,
        "layouts": list(map(json.loads, layouts)),
        "samples": samples,
    }
    return json.dumps(content, separators=(",", ":")).encode()
