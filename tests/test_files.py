"""Shards in an object store: a real S3 server on loopback with latency, errors and outages."""

import itertools
import json
import logging
import os
import signal
from argparse import Namespace

import pytest
import s3fs
import torch
from lib.tar_writer import index_path, write_index
from s3_server import S3Server
from shards import (
    reinforced_sample,
    tokenizer,
    uid,
    write_reinforced_shards,
    write_shard,
)
from test_loader import PREPROCESS, digests, loader, options, saved

from dr import checkpoint, files, sources
from dr.files import RemoteFile, StoreDown
from dr.pipeline import make_pass_loader
from dr.run import Run
from dr.sources import ShardReader, StreamState, passes_by_window

pytestmark = pytest.mark.slow

FEW = {"RETRY_SECONDS": (0.01,) * 5, "ATTEMPT_SECONDS": 5}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and ranges of a few samples, in the workers too, which are forks."""
    for name, value in FEW.items():
        monkeypatch.setattr(files, name, value)
    monkeypatch.setattr(sources, "RANGE", 40_000)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # the repetitions are those of dr/


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("npz", "safetensors"):
        write_reinforced_shards(folder / kind, shards=3, samples=21, width=12, kind=kind)
        for shard in (folder / kind).glob("*.tar"):
            write_index(shard)
        sizes = {f"{shard:08d}.tar": 21 for shard in range(3)}
        (folder / kind / "sizes.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def server(data):
    with S3Server() as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment().items():
            patch.setenv(name, value)
        for kind in ("npz", "safetensors"):
            made.upload(data / kind, f"bucket/{kind}")
        yield made


@pytest.fixture(autouse=True)
def in_order(server):
    server.latency, server.errors, server.cut, server.down, server.fails = 0, 0, 0, False, None


def from_store(tmp_path, kind="npz", **changes):
    urls = [f"s3://bucket/{kind}/{shard:08d}.tar" for shard in range(3)]
    made = make_pass_loader(options(tmp_path, **changes), PREPROCESS, tokenizer, urls)
    if changes.get("resume"):
        made.load_state_dict(checkpoint.load(changes["resume"])["dr"])
    return made


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_batches_are_those_from_a_disk_whatever_fails_and_resume_in_either(
    data, server, tmp_path, caplog, kind
):
    given = {"workers": 2, "train_num_samples": 63}
    expected = digests(loader(data / kind, tmp_path, **given))
    server.latency, server.errors, server.cut = 0.02, 0.1, 0.1
    part = from_store(tmp_path, kind, **given)
    assert part.sizes == [21] * 3
    assert digests(itertools.islice(part, 7)) == expected[:7]
    path = saved(tmp_path, part, 7)
    assert digests(from_store(tmp_path, kind, **given, resume=path)) == expected[7:]
    assert digests(loader(data / kind, tmp_path, **given, resume=path)) == expected[7:]
    assert "a-secret" not in caplog.text and not part.skipped


def test_on_other_ranks_none_is_repeated_or_lost(data, server, tmp_path):
    part = from_store(tmp_path, train_num_samples=60)
    seen = [uid for batch in itertools.islice(part, 5) for uid in batch.uids]
    path = saved(tmp_path, part, 5)
    for rank in range(2):
        rest = from_store(
            tmp_path,
            resume=path,
            rank=rank,
            world_size=2,
            batch_size=1,
            accum_freq=5,
            train_num_samples=120,
        )
        seen += [uid for batch in itertools.islice(iter(rest), 19) for uid in batch.uids]
    assert len(seen) == len(set(seen)) == 63


def test_neighbours_take_one_request(data, server, tmp_path):
    before, sent = server.requests, server.range_bytes
    list(from_store(tmp_path, train_num_samples=63, batch_size=63))
    total = sum(path.stat().st_size for path in (data / "npz").glob("*.tar"))
    assert server.requests - before < 63  # indices and sizes.json included
    # One pass, and what the next one reads ahead.
    assert total * 0.8 < server.range_bytes - sent < 3 * total


@pytest.mark.parametrize("damage", ["no index", "stale", "wrong"])
def test_an_index_that_cannot_be_used_costs_time_not_data(damage, server, tmp_path):
    folder = tmp_path / damage
    write_reinforced_shards(folder, shards=3, samples=10, width=12)
    expected = digests(loader(folder, tmp_path, train_num_samples=60))
    for shard in folder.glob("*.tar"):
        write_index(shard)
        if damage != "no index":
            content = json.loads(index_path(shard).read_text())
            if damage == "stale":
                content["bytes"] += 512
            rows = content["samples"]
            rows[2], rows[3] = rows[3], rows[2]
            index_path(shard).write_text(json.dumps(content))
        else:
            index_path(shard).unlink()
    server.upload(folder, f"bucket/{damage.replace(' ', '-')}")
    found = from_store(tmp_path, damage.replace(" ", "-"), train_num_samples=60)
    assert digests(found) == expected


def test_what_cannot_be_read_is_skipped_and_counted_while_the_store_answers(server, tmp_path):
    server.fails = "00000001.tar"
    batches = from_store(tmp_path, train_num_samples=42, batch_size=1)
    found = {uid for batch in batches for uid in batch.uids}
    assert found == {uid(seed) for seed in [*range(21), *range(42, 63)]}
    assert set(batches.skipped) == {sources.UNREADABLE} and batches.skipped.total() >= 15


def test_a_bad_sample_is_counted_as_from_a_disk(server, tmp_path):
    members = [reinforced_sample(seed) | ({"txt": b" "} if seed == 3 else {}) for seed in range(9)]
    for shard in range(3):
        write_shard(
            tmp_path / "bad" / f"{shard:08d}.tar", ((uid(n), m) for n, m in enumerate(members))
        )
    server.upload(tmp_path / "bad", "bucket/bad")
    given = {"batch_size": 3, "train_num_samples": 54}
    disk, store = loader(tmp_path / "bad", tmp_path, **given), from_store(tmp_path, "bad", **given)
    assert digests(disk) == digests(store)
    assert (disk.read, disk.skipped) == (store.read, store.skipped)


def test_an_outage_is_reported_before_the_samples_that_are_there_are_used_up(server, tmp_path):
    """So that the trainer can save a checkpoint; then the run stops with a line."""
    given = {"batch_size": 1, "train_num_samples": 500}
    expected = digests(itertools.islice(from_store(tmp_path, **given), 200))
    server.down = False
    batches, found, reported = from_store(tmp_path, **given), [], None
    with pytest.raises(SystemExit, match=r"error: no answer from the store of s3://bucket/npz/"):
        for batch in batches:
            found += digests([batch])
            server.down = len(found) > 5
            if batches.fault and reported is None:
                reported = len(found)
                path = saved(tmp_path, batches, reported)
    assert reported is not None and len(found) > reported + 20
    server.down = False
    resumed = from_store(tmp_path, **given, resume=path)
    rest = digests(itertools.islice(resumed, 200 - reported))
    assert found[:reported] + rest == expected


def test_the_trainer_saves_a_checkpoint_in_an_outage_and_stops_with_a_line(server, tmp_path):
    others = {"epochs": 1, "grad_checkpointing": False, "keep_last_k": 2, "name": "run"}
    others |= {"checkpoint_path": str(tmp_path), "save_logs": True, "torchcompile": True}
    others |= {"lock_image": False, "lock_text": False}
    given = {"batch_size": 1, "train_num_samples": 500, "workers": 1, **others}
    batches, model = from_store(tmp_path, **given), torch.nn.Linear(1, 1)
    trained = Namespace(dataloader=batches)
    made = Run(batches.args, {"train": trained}, model, torch.optim.SGD(model.parameters()), None)
    terminated = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"error: no answer from .*continue with --resume latest"):
        for step, _ in enumerate(batches, 1):
            server.down = step > 5
            made.after_step(0, step, {"loss": torch.ones(())})
    signal.signal(signal.SIGTERM, terminated)
    server.down = False
    (path,) = tmp_path.glob("epoch_0_step_*.pt")
    resumed = from_store(tmp_path, **given, resume=str(path))
    assert resumed.position == int(path.stem.rpartition("_")[2]) == batches.position > 5
    expected = digests(itertools.islice(from_store(tmp_path, **given), batches.position + 5))
    assert digests(itertools.islice(resumed, 5)) == expected[batches.position :]


def test_a_store_that_is_not_there_is_one_line(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server.down = True
    with pytest.raises(SystemExit, match=r"error: no answer from the store of s3://bucket/npz/s"):
        _ = from_store(tmp_path).num_batches
    assert "a-secret" not in caplog.text


def test_a_missing_file_is_not_tried_again(server):
    before = server.requests
    with pytest.raises(FileNotFoundError):
        RemoteFile("s3://bucket/npz/none.tar")
    assert server.requests - before <= 1


def test_a_request_without_an_answer_is_given_up(server, monkeypatch):
    monkeypatch.setattr(files, "ATTEMPT_SECONDS", 0.3)
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.01,))
    file = RemoteFile("s3://bucket/npz/00000000.tar")
    server.latency = 3
    with pytest.raises(StoreDown, match="2 attempts"):
        file.fetch(0, 10)


def test_requests_that_never_end_stop_the_run(server, monkeypatch):
    urls = [f"s3://bucket/npz/{shard:08d}.tar" for shard in range(3)]
    monkeypatch.setattr(sources, "MAX_SECONDS", 0.5)
    state = StreamState(0, [21] * 3, previous=[], streams=1, stream=0, cursor=(0, 0))
    items = passes_by_window(ShardReader(urls, "txt".__eq__), state)
    assert next(items).sample["__key__"] == uid(0)
    server.latency = 3
    with pytest.raises(StoreDown, match=r"no answer from the store of s3://.* in 0.5 s"):
        list(itertools.islice(items, 500))


def test_any_store_of_fsspec_will_do(data, tmp_path):
    """Here of files, whose interface is not asynchronous."""
    given = {"workers": 2, "train_num_samples": 63}
    expected = digests(loader(data / "npz", tmp_path, **given))
    urls = [
        f"file://{data}/npz/{name}" for name in sorted(os.listdir(data / "npz")) if name[-1] == "r"
    ]
    made = make_pass_loader(options(tmp_path, **given), PREPROCESS, tokenizer, urls)
    assert digests(made) == expected
