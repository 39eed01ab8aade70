"""Write files whole or not at all: under another name, synced to disk, then renamed; hash them."""

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

PIECE = 1 << 20  # bytes
Result = TypeVar("Result")


def publish(path: Path, write: Callable[[BinaryIO], Result]) -> Result:
    """Make a file with ``write(file)``; it gets its name when it is complete and on disk.

    Args:
        path: the file; its folder is made.
        write: writes the content. ``file.name`` is the temporary name, for libraries that open
            files themselves.

    Returns:
        the result of ``write``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(str(partial), "xb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return result


def publish_json(path: Path, content: object) -> None:
    data = json.dumps(content, indent=1, default=str).encode()
    publish(path, lambda file: file.write(data))


def hash_file(path: str | Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left of :func:`publish`. Only for files that one run writes."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        leftover.unlink(missing_ok=True)
