"""Write tars of samples: plain ustar, from bytes and from spans of other shards; and their indices.

The same samples give the same bytes: times and owners are 0.
"""

import contextlib
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from dr.index import SUFFIX, IndexFault, ShardIndex, make_index
from dr.tar import BLOCK

from .publish import publish, remove_leftovers
from .shards import HEADER_BUFFER, MAX_NAME, MAX_SIZE, ShardError, Span, open_files

BUFFER = 128 << 10  # bytes, as `cat` has; 256 KB took twice the time or longer (ext4, Linux 6.18)
WRITE_BACK = 16 << 20  # bytes after which the disk is asked to begin writing

_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # time and owner 0, mode 0644
_EMPTY_SUM = int(_EMPTY[148:154], 8) - sum(_EMPTY[124:135])


class Output(Protocol):
    """A file, or whatever takes a tar's bytes in order."""

    def write(self, data: memoryview, /) -> object: ...


def make_header(name: str, size: int) -> bytes:
    """A member's header as tarfile makes it, in a fifth of the time."""
    encoded, digits = name.encode("utf-8", "surrogateescape"), b"%011o" % size
    if len(encoded) > MAX_NAME or size >= MAX_SIZE:
        raise ShardError(
            f"{name!r} of {size} bytes: expected a name of up to {MAX_NAME} bytes, and under 8 GiB"
        )
    checksum = b"%06o" % (_EMPTY_SUM + sum(encoded) + sum(digits))
    padded = encoded.ljust(100, b"\0")
    return b"".join((padded, _EMPTY[100:124], digits, _EMPTY[135:148], checksum, _EMPTY[154:]))


class TarWriter:
    """Puts a tar together in one buffer, which is written to ``out`` whenever it is full."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.buffer = memoryview(bytearray(BUFFER))
        self.filled = 0  # bytes in the buffer
        self.written = 0  # bytes given to out
        self.write_back = 0  # bytes that the disk was asked to write

    def flush(self) -> None:
        self.out.write(self.buffer[: self.filled])
        self.written += self.filled
        self.filled = 0
        due = self.written - self.write_back
        if due >= WRITE_BACK and hasattr(os, "posix_fadvise") and hasattr(self.out, "fileno"):
            with contextlib.suppress(OSError):  # advice only: begin now, not all at the end
                advice = os.POSIX_FADV_DONTNEED
                os.posix_fadvise(self.out.fileno(), self.write_back, due, advice)
            self.write_back = self.written

    def _room(self, wanted: int) -> memoryview:
        """The next part of the buffer to fill, of ``wanted`` bytes or fewer."""
        if self.filled == len(self.buffer):
            self.flush()
        part = self.buffer[self.filled : self.filled + wanted]
        self.filled += len(part)
        return part

    def add(self, data: bytes) -> None:
        while data:
            part = self._room(len(data))
            part[:], data = data[: len(part)], data[len(part) :]

    def copy(self, span: Span) -> None:
        offset, end = span.offset, span.offset + span.size
        while offset < end:
            part = self._room(end - offset)
            if os.preadv(open_files.descriptor(span.path), [part], offset) != len(part):
                raise ShardError(f"{span.path} was cut off while it was read")
            offset += len(part)


def write_tar(out: Output, samples: Iterable[tuple[str, Mapping[str, bytes | Span]]]) -> int:
    """Write ``(uid, {extension: content})`` as members ``<uid>.<extension>``.

    Returns:
        the number of samples.
    """
    tar, count = TarWriter(out), 0
    for uid, members in samples:
        for extension, content in members.items():
            size = len(content) if isinstance(content, bytes) else content.size
            tar.add(make_header(f"{uid}.{extension}", size))
            if isinstance(content, bytes):
                tar.add(content)
            else:
                tar.copy(content)
            tar.add(bytes(-size % BLOCK))
        count += 1
    end = 2 * BLOCK
    tar.add(bytes(end + -(tar.written + tar.filled + end) % tarfile.RECORDSIZE))
    tar.flush()
    return count


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + SUFFIX)


def has_index(shard: Path) -> bool:
    """Whether a shard has an index that is up to date."""
    status = shard.stat()
    try:
        ShardIndex(index_path(shard).read_bytes(), status.st_size, int(status.st_mtime))
    except (FileNotFoundError, IndexFault):
        return False
    return True


def write_index(shard: Path) -> None:
    """Write the index of a shard; see ``dr.index``.

    Raises:
        ShardError: the shard is damaged, or cannot have an index.
    """
    path = index_path(shard)
    remove_leftovers(path)
    path.unlink(missing_ok=True)  # of an earlier shard
    try:
        with open(str(shard), "rb", buffering=HEADER_BUFFER) as file:
            content = make_index(file)
    except (tarfile.TarError, IndexFault) as error:
        raise ShardError(f"{shard}: {error}") from error
    publish(path, lambda file: file.write(content))
