"""Checkpoints load without unpickling, also those that hold NumPy's numbers."""

import io
import zipfile

import numpy as np
import pytest
import torch

from dr import checkpoint


def saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    return stream


def test_training_state_with_numpy_scalars_loads():
    state = {"epoch": 3, "lr": np.float64(1e-3), "step": np.int64(7), "half": np.float32(0.5), "weight": torch.ones(2)}
    assert checkpoint.load(saved(state))["lr"] == 1e-3
    assert checkpoint.load(saved(state))["step"] == 7
    with pytest.raises(Exception, match="weights_only"):  # the trap: this is what OpenCLIP calls
        torch.load(saved(state), weights_only=True)


def test_scalars_written_under_the_other_numpy_load_too():
    """NumPy 1 calls the module numpy.core, NumPy 2 numpy._core."""
    ours = np.float64(0).__reduce__()[0].__module__.encode()
    other = {b"numpy._core.multiarray": b"numpy.core.multiarray", b"numpy.core.multiarray": b"numpy._core.multiarray"}[
        ours
    ]
    stream = io.BytesIO()
    with zipfile.ZipFile(saved({"lr": np.float64(0.25)})) as source, zipfile.ZipFile(stream, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(ours + b"\n", other + b"\n"))
    stream.seek(0)
    assert other + b"\n" in stream.getvalue()
    assert checkpoint.load(stream)["lr"] == 0.25


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_else_is_unpickled(tmp_path):
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.load(saved({"lr": Planted(str(tmp_path / "ran"))}))
    assert not (tmp_path / "ran").exists()
