"""Files of shards: on a file system, or in an object store by fsspec (``s3://``, ``gs://``, ``hf://``
and others).

In a store each read is a request for a range. One that fails, gives too few bytes or takes too long
is repeated after a while. If that does not help, but the store answers, OSError is raised; if it
does not answer, ``StoreDown``. Credentials and other settings are found by fsspec, from its
configuration and the environment.
"""

import contextlib
import io
import os
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, cast

RETRY_SECONDS = (0.25, 0.5, 1, 2, 4, 8, 16, 30)  # between two attempts
ATTEMPT_SECONDS = 60  # after which an attempt has failed
BLOCK = 1 << 20  # bytes of a request where a file is read in order
# What no repetition changes.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)


class StoreDown(RuntimeError):
    """Nothing can be read from a store."""


def is_url(path: str) -> bool:
    """Whether a path is that of a file in a store."""
    return "://" in path


def open_file(path: str) -> "LocalFile | RemoteFile":
    """Open a file for reading.

    Raises:
        OSError: there is no such file, or it cannot be read.
        StoreDown: nothing can be read from its store.
    """
    return RemoteFile(path) if is_url(path) else LocalFile(path)


def read_file(path: str, limit: int) -> bytes:
    """The content of a file, up to ``limit`` bytes. Raises as :func:`open_file`."""
    with open_file(path) as file:
        return file.fetch(0, limit)


class LocalFile(io.FileIO):
    """An open file of a file system.

    Attributes:
        size: bytes of the file.
        modified: its time of change in whole seconds.
    """

    def __init__(self, path: str):
        super().__init__(path)
        status = os.fstat(self.fileno())
        self.size, self.modified = status.st_size, int(status.st_mtime)

    def as_stream(self) -> BinaryIO:
        """For readers that read in order."""
        return open(self.fileno(), "rb", closefd=False)

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes of a range; fewer at the end of the file."""
        return os.pread(self.fileno(), stop - start, start)

    def advise(self, spans: Iterable[tuple[int, int]]) -> None:
        """Have the file system fetch these bytes, which are read soon."""
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):  # advice only: some file systems take none
            for start, stop in spans:
                os.posix_fadvise(self.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)


class Positioned(io.RawIOBase):
    """A file of known size that is read in order from a position; ``readinto`` is its subclass's.

    Attributes:
        size: bytes of the file.
        at: the position.
    """

    size: int
    at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, position + (0, self.at, self.size)[whence])
        return self.at


class RemoteFile(Positioned):
    """An open file of a store.

    Attributes:
        size: bytes of the file.
        modified: None. A store has times of upload, which differ from those of the files.
    """

    modified = None

    def __init__(self, url: str):
        import fsspec  # half a second, only where there is a store

        self.url = url
        self.fs, self.path = fsspec.core.url_to_fs(url)
        self.size = self._repeat(lambda: self._call("info", self.path)["size"])
        self.block, self.block_start = b"", 0

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes of a range; fewer at the end of the file."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""

        def attempt() -> bytes:
            data = self._call("cat_file", self.path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} of {stop - start} bytes")
            return data

        return self._repeat(attempt)

    def advise(self, spans: Iterable[tuple[int, int]]) -> None:
        """A store cannot prepare to read."""

    def as_stream(self) -> BinaryIO:
        """For readers that read in order."""
        return cast(BinaryIO, self)

    def readinto(self, buffer: Any) -> int:
        if not self.block_start <= self.at < self.block_start + len(self.block):
            self.block, self.block_start = self.fetch(self.at, self.at + BLOCK), self.at
        data = self.block[self.at - self.block_start :][: len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def read(self, size: int = -1) -> bytes:
        data = b""
        while size < 0 or len(data) < size:
            more = super().read(size - len(data) if size >= 0 else BLOCK)
            if not more:
                break
            data += more
        return data

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of the file system, within ``ATTEMPT_SECONDS`` if that is asynchronous."""
        if not self.fs.async_impl:
            return getattr(self.fs, method)(*arguments, **options)
        from fsspec.asyn import sync

        function = getattr(self.fs, f"_{method}")
        return sync(self.fs.loop, function, *arguments, timeout=ATTEMPT_SECONDS, **options)

    def _repeat(self, attempt: Callable[[], Any]) -> Any:
        for seconds in (*RETRY_SECONDS, None):
            try:
                return attempt()
            except FINAL:
                raise
            except Exception as error:  # backends raise any type
                if seconds is None:
                    self._check_store(error)
                    raise OSError(f"{type(error).__name__}: {error}") from error
                time.sleep(seconds * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _check_store(self, error: Exception) -> None:
        """Raise StoreDown unless the store answers when it is asked about the file."""
        try:
            self.fs.invalidate_cache()
            self._call("info", self.path)
        except FINAL:
            pass
        except Exception:
            raise StoreDown(
                f"no answer from the store of {self.url}: {type(error).__name__}: {error} "
                f"(the last of {len(RETRY_SECONDS) + 1} attempts in {sum(RETRY_SECONDS):.0f} s)"
            ) from error
