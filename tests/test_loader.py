"""The loader of passes: the same batches for the same seed and layout, and what makes it stop."""

import hashlib
import itertools
import json
import logging
import os
import random
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, run
from lib.tar_writer import write_index
from shards import (
    encode,
    picture,
    reinforced_sample,
    reinforcement_options,
    tokenizer,
    uid,
    write_reinforced_shards,
    write_shard,
)
from torchvision import transforms as T

from dr import checkpoint
from dr.batch import Batch
from dr.chain import Counts
from dr.loader import StreamLoader
from dr.pipeline import make_pass_loader
from dr.run import Run
from dr.sampling import ShardOrder

PREPROCESS = T.Compose(
    [
        T.RandomResizedCrop(24, interpolation=T.InterpolationMode.BICUBIC),
        T.ToTensor(),
        T.Normalize((0.5,), (0.2,)),
    ]
)


def options(tmp_path, **changes):
    others = {
        "accum_freq": 1,
        "batch_size": 5,
        "dataset_without_replacement": True,
        "distributed": False,
        "max_skipped_fraction": 1.0,
        "rank": 0,
        "resume": None,
        "save_every_n_steps": 0,
        "seed": 0,
        "total_steps": None,
        "train_data": "data",
        "train_num_samples": None,
        "workers": 0,
        "world_size": 1,
    }
    return reinforcement_options(tmp_path, **{**others, **changes})


def shards(pattern_or_folder):
    return sorted(str(path) for path in pattern_or_folder.glob("*.tar"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_reinforced_shards(folder, shards=3, samples=21, width=12)
    (folder / "sizes.json").write_text(json.dumps({f"{shard:08d}.tar": 21 for shard in range(3)}))
    return folder


def loader(data, tmp_path, **changes):
    made = make_pass_loader(options(tmp_path, **changes), PREPROCESS, tokenizer, shards(data))
    if changes.get("resume"):
        made.load_state_dict(checkpoint.load(changes["resume"])["dr"])
    return made


def digest(tensors):
    data = (t.contiguous().numpy().tobytes() for t in tensors if isinstance(t, torch.Tensor))
    return hashlib.sha256(b"".join(data)).hexdigest()


def digests(batches):
    """Of whatever a batch holds, the order of the batches included."""
    return [digest(batch) for batch in batches]


FIRST_HUNDRED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/scripts", {root!r} + "/tests"]
from pathlib import Path
from test_loader import digests, loader
print(*digests(loader(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, train_num_samples=500)))
"""


@pytest.mark.slow
def test_the_same_seed_ranks_and_workers_give_the_same_first_hundred_batches(data, tmp_path):
    script = [sys.executable, "-c", FIRST_HUNDRED.format(root=str(ROOT)), data, tmp_path]
    done = run(
        script, env={**environment(), "PYTHONHASHSEED": "7"}
    )  # in another process, where sets are in other orders
    assert done.returncode == 0, done.stderr[-2000:]
    found = digests(loader(data, tmp_path, workers=2, train_num_samples=500))
    assert len(set(found)) == 100 and found == done.stdout.split()
    alone = digests(loader(data, tmp_path, train_num_samples=500))
    assert alone == digests(loader(data, tmp_path, workers=1, train_num_samples=500))
    assert not set(alone) & set(digests(loader(data, tmp_path, seed=1, train_num_samples=500)))


def test_what_a_sample_is_in_a_pass_depends_on_no_rank_or_worker(data, tmp_path):
    """Its augmentation, its caption, its pixels."""

    def by_sample(world_size, workers, batch_size):
        found = {}
        for rank in range(world_size):
            given = {
                "world_size": world_size,
                "rank": rank,
                "workers": workers,
                "batch_size": batch_size,
            }
            for images, texts, uids, image_emb, *_ in loader(
                data, tmp_path, train_num_samples=126, **given
            ):
                assert uids == [uid(sample) for sample in texts[:, 0, 1].tolist()]
                for image, text, row in zip(images, texts, image_emb[:, 0].tolist(), strict=True):
                    sample = text[0, 1].item()
                    found.setdefault(sample, {})[round((row - sample) * 64)] = (
                        text[1, 0].item(),
                        digest([image]),
                    )
        return found

    alone = by_sample(1, 0, 9)
    assert len(alone) == 63 and all(
        len(passes) == 2 for passes in alone.values()
    )  # another augmentation in each pass
    several = by_sample(2, 3, 3)
    assert all(alone[sample].items() & passes.items() for sample, passes in several.items())
    same = sum(len(alone[sample].items() & passes.items()) for sample, passes in several.items())
    assert same >= 126 - 6 * 3  # all but what one of the six streams has of a third pass


def plain_shards(folder, number=40):
    for shard in range(2):
        seeds = range(shard * number // 2, (shard + 1) * number // 2)
        samples = [
            (
                uid(seed),
                {
                    "jpg": encode(picture(seed)),
                    "txt": f"caption 0 of {seed}".encode(),
                    "json": b"{}",
                },
            )
            for seed in seeds
        ]
        write_shard(folder / f"{shard}.tar", samples)
    return folder


def test_plain_training_sees_each_sample_once_a_pass_and_leaves_the_trainers_generators_alone(
    tmp_path,
):
    folder = plain_shards(tmp_path / "plain")
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batches = loader(
        folder, tmp_path, dataset_reinforcement=False, batch_size=8, train_num_samples=80
    )
    assert len(batches) == 10 and batches.num_samples == 80
    found = list(batches)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()
    assert all(
        batch.images.shape == (8, 3, 24, 24) and batch.texts.shape == (8, 1, 2) for batch in found
    )
    samples = torch.cat([batch.texts[:, 0, 1] for batch in found]).tolist()
    assert sorted(samples[:40]) == sorted(samples[40:]) == list(range(40))
    images = torch.cat([batch.images for batch in found])
    first, second = (images[torch.tensor(samples[at : at + 40]).argsort() + at] for at in (0, 40))
    assert (first != second).flatten(1).any(1).all()  # other crops in the second pass
    again = loader(
        folder, tmp_path, dataset_reinforcement=False, batch_size=8, train_num_samples=80, workers=1
    )
    assert digests(again) == digests(found)


def test_the_default_is_an_epoch_of_all_samples_in_whole_optimiser_steps(data, tmp_path):
    assert loader(data, tmp_path).num_batches == 13  # 63 samples by 5
    assert loader(data, tmp_path, accum_freq=4).num_batches == 16
    assert loader(data, tmp_path, world_size=4, rank=3).num_batches == 4
    assert loader(data, tmp_path, train_num_samples=11).num_samples == 15


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_run_takes_exactly_its_total_steps(data, tmp_path, accum_freq):
    given = {"accum_freq": accum_freq, "train_num_samples": 15, "batch_size": 5, "total_steps": 8}
    batches = loader(data, tmp_path, **given)
    per_epoch = -(-15 // (5 * accum_freq))
    steps = [len(list(batches)) / accum_freq for _ in range(-(-8 // per_epoch))]
    assert steps == [per_epoch] * (8 // per_epoch) + [8 % per_epoch] * bool(8 % per_epoch)
    assert sum(steps) == 8
    # OpenCLIP's own loader may have more batches, as many for each worker.
    args = options(tmp_path, **given)
    source = [(Batch(torch.zeros(5), torch.zeros(5), [str(n)]), Counts(5, {})) for n in range(16)]
    assert StreamLoader(args, source, 16).num_batches == per_epoch * accum_freq
    assert len(list(StreamLoader(args, source, 16))) == per_epoch * accum_freq
    assert StreamLoader(options(tmp_path), source, 16).num_batches == 16


class Scalars(dict):
    def add_scalar(self, name, value, step):
        self[name] = value


@pytest.mark.parametrize("slow", ["data", "step"])
def test_the_share_of_time_that_steps_wait_for_data_is_logged_with_advice(tmp_path, caplog, slow):
    def batches():
        for number in range(4):
            time.sleep(0.2 if slow == "data" else 0)
            yield Batch(torch.zeros(5), torch.zeros(5), [str(number)]), Counts(5, {})

    given = {"torchcompile": True, "grad_checkpointing": False, "wandb": False, "epochs": 1}
    args = options(tmp_path, dataset_without_replacement=False, workers=3, **given)
    source = StreamLoader(args, batches(), 4)
    for _ in source:
        time.sleep(0.2 if slow == "step" else 0)
    made = Run(args, {"train": Namespace(dataloader=source)}, None, None, None)
    caplog.set_level(logging.INFO)
    scalars = Scalars()
    made.after_epoch(0, scalars)
    assert (scalars["data/wait_fraction"] > 0.5) == (slow == "data")
    assert "Steps waited for data in " in caplog.text
    assert ("Use more --workers (now 3 for each rank" in caplog.text) == (slow == "data")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_batches_are_the_same_with_an_index_and_resume_with_or_without(tmp_path, kind):
    write_reinforced_shards(tmp_path / "data", shards=3, samples=21, width=12, kind=kind)
    given = {"workers": 2, "train_num_samples": 126}
    expected = digests(loader(tmp_path / "data", tmp_path, **given))
    for shard in (tmp_path / "data").glob("*.tar"):
        write_index(shard)
    part = loader(tmp_path / "data", tmp_path, **given)
    assert digests(itertools.islice(part, 5)) == expected[:5]
    checkpoint_path = saved(tmp_path, part, 5)
    (tmp_path / "data" / "00000001.tar.index").unlink()
    resumed = loader(tmp_path / "data", tmp_path, **given, resume=checkpoint_path)
    assert digests(resumed) == expected[5:] and len(expected) == 26


def test_epochs_go_on_where_the_last_one_stopped(data, tmp_path):
    parts = loader(data, tmp_path, workers=2, train_num_samples=35)
    found = [digests(parts) for _ in range(4)]
    assert [len(epoch) for epoch in found] == [7] * 4  # which the two workers can't share evenly
    whole = digests(loader(data, tmp_path, workers=2, train_num_samples=140))
    assert list(itertools.chain(*found)) == whole


def test_a_worker_that_finds_nothing_usable_stops_the_run(tmp_path):
    members = {**reinforced_sample(0), "jpg": b"gone"}
    write_shard(tmp_path / "data" / "0.tar", [(uid(seed), members) for seed in range(30)])
    with pytest.raises(
        RuntimeError, match=r"not one sample can be used. Found: \d+ x undecodable image"
    ):
        next(iter(loader(tmp_path / "data", tmp_path)))


def test_another_width_than_the_options_say_stops_the_run(data, tmp_path):
    with pytest.raises(ValueError, match="12 wide, expected 16 by --distill-teacher-dimension"):
        next(iter(loader(data, tmp_path, distill_teacher_dimension=[8, 8])))


def test_shards_without_a_sample_are_refused(tmp_path):
    write_shard(tmp_path / "data" / "0.tar", [])
    with pytest.raises(SystemExit, match="error: no sample in 1 shards of --train-data data"):
        _ = loader(tmp_path / "data", tmp_path).num_batches


def test_sizes_json_is_believed_and_what_is_not_there_is_skipped(tmp_path):
    write_reinforced_shards(tmp_path / "data", shards=2, samples=10, width=12)
    (tmp_path / "data" / "sizes.json").write_text('{"00000000.tar": 14, "00000001.tar": 10}')
    batches = loader(tmp_path / "data", tmp_path, batch_size=4, train_num_samples=20)
    assert batches.sizes == [14, 10]
    assert len(list(batches)) == 5
    places = [ShardOrder(0, 0, [14, 10]).locate(position) for position in range(24)]
    assert sum(shard == 0 and place >= 10 for shard, place in places) == 4
    assert set(batches.skipped) <= {"not in its shard"} and batches.skipped.total() <= 4
    assert batches.read == 20 + batches.skipped.total()


# --- resumed --------------------------------------------------------------------------------------
def saved(tmp_path, batches, step, **changes):
    """A checkpoint with the loader's state, as ``run.Run`` writes it."""
    state = batches.state_dict()
    assert state["step"] == batches.position
    content = {**state, "step": step, "sampling": {**state["sampling"], **changes}}
    path = tmp_path / f"epoch_0_step_{step}.pt"
    checkpoint.save({"epoch": 0, "dr": content}, str(path))
    return str(path)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("step", [0, 4, 13])
def test_a_resumed_loader_goes_on_at_the_next_batch(data, tmp_path, workers, step):
    whole = loader(data, tmp_path, workers=workers)
    expected = digests(whole) + digests(whole)
    part = loader(data, tmp_path, workers=workers)
    list(itertools.islice(part, step))
    resumed = loader(data, tmp_path, workers=workers, resume=saved(tmp_path, part, step))
    assert resumed.first == step and resumed.read == step * 5
    assert digests(resumed) + digests(resumed) == expected[step:]


def test_another_seed_other_shards_or_other_sizes_are_refused_and_told(data, tmp_path):
    part = loader(data, tmp_path)
    with pytest.raises(
        SystemExit, match=r"error: --seed 1, but .*epoch_0_step_2.pt was written with --seed 0"
    ):
        loader(data, tmp_path, seed=1, resume=saved(tmp_path, part, 2))
    for names, message in (
        (
            [*part.names[:2], "other.tar"],
            r"3 shards, --train-data has 3. What differs: 00000002.tar, other.tar",
        ),
        (part.names[::-1], "What differs: their order"),
    ):
        with pytest.raises(SystemExit, match=message):
            loader(data, tmp_path, resume=saved(tmp_path, part, 2, names=names))
    with pytest.raises(SystemExit, match="2 steps into an epoch of 13, but an epoch has 7 now"):
        loader(data, tmp_path, train_num_samples=35, resume=saved(tmp_path, part, 2))
    sizes = (data / "sizes.json").read_text()
    (data / "sizes.json").write_text('{"00000001.tar": 22}')
    try:
        with pytest.raises(
            SystemExit, match=r"00000001.tar had 21 samples when .* sizes.json has 22 now"
        ):
            loader(data, tmp_path, resume=saved(tmp_path, part, 2))
    finally:
        (data / "sizes.json").write_text(sizes)


def test_a_shard_that_has_vanished_does_not_keep_a_run_from_being_resumed(tmp_path):
    write_reinforced_shards(tmp_path / "data", shards=2, samples=10, width=12)
    part = loader(tmp_path / "data", tmp_path)
    path, names = saved(tmp_path, part, 0), shards(tmp_path / "data")
    os.remove(names[0])
    args = options(tmp_path, resume=path, train_num_samples=10)
    resumed = make_pass_loader(args, PREPROCESS, tokenizer, names)
    resumed.load_state_dict(checkpoint.load(path)["dr"])
    assert resumed.sizes == [10, 10] and len(list(resumed)) == 2


def test_too_many_skipped_samples_stop_the_run_and_are_listed(tmp_path):
    for shard in range(2):
        seeds = range(100 * shard, 100 * shard + 100)
        samples = [
            (uid(seed), reinforced_sample(seed) | ({"txt": b" "} if seed % 4 == 0 else {}))
            for seed in seeds
        ]
        write_shard(tmp_path / "data" / f"{shard}.tar", samples)
    batches = loader(tmp_path / "data", tmp_path, max_skipped_fraction=0.2)
    with pytest.raises(
        RuntimeError, match=r"more than --max-skipped-fraction 0.2\): \d+ x empty caption"
    ):
        list(batches)
    assert len(list(loader(tmp_path / "data", tmp_path, max_skipped_fraction=0.3))) == 40
