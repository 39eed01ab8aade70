"""Checkpoint files: written whole or not at all, found by how advanced they are, and loaded safely.

Checkpoints are loaded with ``weights_only=True``. OpenCLIP's hold the learning rate as a NumPy
scalar (ours as a float), so NumPy's scalars are allowed by name, and nothing else.
"""

import contextlib
import glob
import logging
import os
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

LATEST = "epoch_latest.pt"
TEMPORARY = "checkpoint.tmp"  # one name, so that killed runs leave at most one such file
PREFIX = "module."  # of all names in the state of a DistributedDataParallel


def load(file: str | os.PathLike | BinaryIO, map_location: Any = None, mmap: Any = None) -> Any:
    """``torch.load(…, weights_only=True)`` that also takes NumPy scalars, of NumPy 1 and 2.

    Args:
        file: path or binary file.
        map_location, mmap: as in ``torch.load``.
    """
    scalar = np.float64(0).__reduce__()[0]  # the function that a pickled NumPy scalar is made by
    allowed: list = [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


def save(content: dict, path: str) -> None:
    """Write a checkpoint. A file of that name stays until the new one is complete and on disk."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, TEMPORARY)
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        os.fsync(descriptor)  # the new name, too
    os.close(descriptor)


def match_names(state: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """A model's state with the names that ``model`` has, whether or not one of them is in DDP."""
    wants_prefix = next(iter(model.state_dict()), "").startswith(PREFIX)
    return {
        (PREFIX if wants_prefix else "") + name.removeprefix(PREFIX): value
        for name, value in state.items()
    }


def step_checkpoints(folder: str) -> list[str]:
    """The checkpoints within epochs, the least advanced first."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "epoch_*_step_*.pt")):
        if numbers := re.fullmatch(r"epoch_(\d+)_step_(\d+)\.pt", os.path.basename(path)):
            found.append((int(numbers[1]), int(numbers[2]), path))
    return [path for _, _, path in sorted(found)]


def latest(folder: str) -> str | None:
    """The most advanced checkpoint in a folder: of whole epochs, within one, or ``LATEST``.

    Unreadable ones are skipped with a warning; the unpatched trainer leaves such a file if it is
    killed while it writes.
    """
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "epoch_*.pt")):
        name = os.path.basename(path)
        numbers = re.fullmatch(r"epoch_(\d+)(?:_step_(\d+))?\.pt", name)
        if numbers:
            found.append((int(numbers[1]), int(numbers[2] or 0), False, path))
        elif name == LATEST:
            epoch = _read(path).get("epoch")
            if epoch is not None:
                found.append((epoch, 0, True, path))
    for *_, is_latest, path in sorted(found, reverse=True):
        if is_latest or _read(path):
            return path
    return None


def _read(path: str) -> dict:
    """A checkpoint's content, tensors unread; empty if it cannot be read."""
    try:
        return load(path, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises anything on a broken file
        logging.warning(f"Skipped {path}, which can't be read: {type(error).__name__}: {error}")
        return {}
