"""Small real shards for the tests: tars of real JPEGs, captions and reinforcements."""

import io
import tarfile
from pathlib import Path


def write_shard(path, samples):
    """Write a WebDataset tar.

    Args:
        path: the tar to write; its folder is made.
        samples: iterable of ``(key, {extension: bytes})``, written in that order as ``<key>.<extension>``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def read_shard(path):
    """Return ``[(member name, bytes), …]`` of a tar, in order."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]
