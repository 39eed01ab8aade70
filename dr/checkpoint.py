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

import fsspec
import numpy as np
import torch

LATEST = "epoch_latest.pt"
TEMPORARY = "checkpoint.tmp"  # one name, so that killed runs leave at most one such file
PREFIX = "module."  # of all names in the state of a DistributedDataParallel


# Registered once, so that OpenCLIP's own torch.load of a --pretrained file takes them, too.
_SCALAR = np.float64(0).__reduce__()[0]  # the function that makes a pickled NumPy scalar
torch.serialization.add_safe_globals(
    [
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
        *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]
)


def load(file: str | os.PathLike | BinaryIO, map_location: Any = None, mmap: Any = None) -> Any:
    """``torch.load(…, weights_only=True)``, which also takes NumPy scalars of NumPy 1 and 2.

    Args:
        file: path or binary file.
        map_location, mmap: as in ``torch.load``.
    """
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
    paths = glob.glob(os.path.join(glob.escape(folder), "epoch_*_step_*.pt"))
    return sorted(filter(_progress, paths), key=_progress)


def _progress(path: str) -> tuple[int, ...]:
    """Epochs and steps of a checkpoint by its name; an empty tuple for any other file."""
    numbers = re.fullmatch(r"epoch_(\d+)(?:_step_(\d+))?\.pt", os.path.basename(path))
    return (int(numbers[1]), int(numbers[2] or 0)) if numbers else ()


def latest(folder: str) -> str | None:
    """The most advanced checkpoint in a folder: of whole epochs, within one, or ``LATEST``.

    Unreadable ones are skipped with a warning; the unpatched trainer leaves such a file if it is
    killed while it writes.
    """
    found: list[tuple] = []
    for path in glob.glob(os.path.join(glob.escape(folder), "epoch_*.pt")):
        if progress := _progress(path):
            found.append((*progress, False, path))
        elif os.path.basename(path) == LATEST and (epoch := _read(path).get("epoch")) is not None:
            found.append((epoch, 0, True, path))
    for *_, is_latest, path in sorted(found, reverse=True):
        if is_latest or _read(path):
            return path
    return None


def fetch_latest(remote: str, folder: str) -> None:
    """Download the most advanced readable checkpoint of a remote folder.

    Args:
        remote: URL that fsspec understands, such as ``s3://bucket/runs/NAME/checkpoints``.
        folder: where to put the checkpoint. Nothing is downloaded if it is there already.

    Raises:
        SystemExit: the remote folder cannot be read.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(remote)
        filesystem.invalidate_cache()
        try:
            names = filesystem.ls(path, detail=False)
        except FileNotFoundError:  # exists() may return False also when nobody answers
            names = []
        for name in sorted(filter(_progress, names), key=_progress, reverse=True):
            target = os.path.join(folder, os.path.basename(name))
            if os.path.exists(target):
                return
            temporary = os.path.join(folder, TEMPORARY)
            filesystem.get_file(name, temporary)
            if _read(temporary):
                os.replace(temporary, target)
                logging.info(f"Downloaded {name} from {remote}")
                return
    except Exception as error:  # of any storage and its client
        raise SystemExit(
            f"error: --remote-sync {remote} can't be read to resume from: "
            f"{type(error).__name__}: {error}. Check the URL and the credentials, or install "
            "the client that fsspec needs for it (s3fs for s3://)."
        ) from error


def _read(path: str) -> dict:
    """A checkpoint's content, tensors unread; empty if it cannot be read."""
    try:
        return load(path, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises anything on a broken file
        logging.warning(f"Skipped {path}, which can't be read: {type(error).__name__}: {error}")
        return {}
