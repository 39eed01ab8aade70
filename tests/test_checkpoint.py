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
    state = {
        "epoch": 3,
        "lr": np.float64(1e-3),
        "step": np.int64(7),
        "half": np.float32(0.5),
        "weight": torch.ones(2),
    }
    assert checkpoint.load(saved(state))["lr"] == 1e-3
    assert checkpoint.load(saved(state))["step"] == 7
    # OpenCLIP's own loading of --pretrained files takes them, too.
    assert torch.load(saved(state), weights_only=True)["half"] == 0.5


def test_scalars_written_under_the_other_numpy_load_too():
    """NumPy 1 calls the module numpy.core, NumPy 2 numpy._core."""
    ours = np.float64(0).__reduce__()[0].__module__.encode()
    other = {
        b"numpy._core.multiarray": b"numpy.core.multiarray",
        b"numpy.core.multiarray": b"numpy._core.multiarray",
    }[ours]
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(saved({"lr": np.float64(0.25)})) as source,
        zipfile.ZipFile(stream, "w") as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(ours + b"\n", other + b"\n"))
    stream.seek(0)
    assert other + b"\n" in stream.getvalue()
    assert checkpoint.load(stream)["lr"] == 0.25


def written(folder, name, **content):
    checkpoint.save({"state_dict": {"weight": torch.ones(1000)}, **content}, str(folder / name))


def test_the_latest_checkpoint_is_the_most_advanced_of_all_kinds(tmp_path):
    assert checkpoint.latest(str(tmp_path)) is None
    order = [
        ("epoch_1.pt", 1),
        ("epoch_1_step_9.pt", 1),
        ("epoch_1_step_10.pt", 1),
        ("epoch_2.pt", 2),
    ]
    for name, epoch in (*order, ("epoch_10.pt", 10), ("epoch_10_step_2.pt", 10)):
        written(tmp_path, name, epoch=epoch)
        assert checkpoint.latest(str(tmp_path)) == str(tmp_path / name)
    for epoch, expected in (
        (9, "epoch_10_step_2.pt"),
        (10, "epoch_10_step_2.pt"),
        (11, "epoch_latest.pt"),
    ):
        written(tmp_path, "epoch_latest.pt", epoch=epoch)
        assert checkpoint.latest(str(tmp_path)) == str(tmp_path / expected)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pt") == []


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, caplog):
    written(tmp_path, "epoch_1.pt", epoch=1)
    for name, damage in (
        ("epoch_2.pt", b"gone"),
        ("epoch_latest.pt", b""),
        ("epoch_1_step_3.pt", None),
    ):
        written(tmp_path, name, epoch=2)
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    (tmp_path / "epoch_3_step_x.pt").write_bytes(b"")  # none of ours
    assert checkpoint.latest(str(tmp_path)) == str(tmp_path / "epoch_1.pt")
    for name in ("epoch_2.pt", "epoch_latest.pt", "epoch_1_step_3.pt"):
        assert f"{tmp_path / name}, which can't be read" in caplog.text


def test_the_most_advanced_remote_checkpoint_is_fetched(tmp_path):
    remote, local = tmp_path / "remote", tmp_path / "local"
    local.mkdir()
    address = f"file://{remote}"
    checkpoint.fetch_latest(address, str(local))  # there is none yet
    assert list(local.iterdir()) == []
    remote.mkdir()
    for name, epoch in (("epoch_1.pt", 1), ("epoch_1_step_4.pt", 1), ("epoch_2_step_2.pt", 2)):
        written(remote, name, epoch=epoch)
    for name in ("epoch_2_step_10.pt", "epoch_latest.pt", "epoch_3.pt.partial"):
        (remote / name).write_bytes(b"torn")  # of an upload that was interrupted
    checkpoint.fetch_latest(address, str(local))
    assert checkpoint.latest(str(local)) == str(local / "epoch_2_step_2.pt")
    written(remote, "epoch_2_step_2.pt", epoch=9)  # what is there already is not fetched again
    checkpoint.fetch_latest(address, str(local))
    assert checkpoint.load(local / "epoch_2_step_2.pt")["epoch"] == 2


def test_a_remote_that_cannot_be_read_is_an_error(tmp_path):
    for address in ("nowhere://bucket/runs", "http://127.0.0.1:9/runs/checkpoints"):
        with pytest.raises(SystemExit, match=f"error: --remote-sync {address} can't be read"):
            checkpoint.fetch_latest(address, str(tmp_path))


def test_a_state_is_matched_to_a_model_in_ddp_or_not():
    plain = torch.nn.Linear(1, 1)
    wrapped = torch.nn.Module()
    wrapped.module = plain
    for state in (plain.state_dict(), wrapped.state_dict()):
        for model in (plain, wrapped):
            model.load_state_dict(checkpoint.match_names(state, model))


def test_until_a_checkpoint_is_whole_its_name_keeps_what_it_had(tmp_path):
    written(tmp_path, "epoch_latest.pt", epoch=1)

    class Unsavable:
        def __reduce__(self):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.save({"epoch": 2, "rest": Unsavable()}, str(tmp_path / "epoch_latest.pt"))
    assert checkpoint.load(tmp_path / "epoch_latest.pt")["epoch"] == 1


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_else_is_unpickled(tmp_path):
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.load(saved({"lr": Planted(str(tmp_path / "ran"))}))
    assert not (tmp_path / "ran").exists()
