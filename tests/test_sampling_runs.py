"""Real runs of the patched trainer without replacement: what is seen, killed and resumed, on data
that is imperfect."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, environment, run
from PIL import Image
from sampling_coverage import (
    AUGMENTATIONS,
    LAYOUTS,
    command,
    coverage,
    one_run,
    options,
    recorded,
    seen,
    taken,
    train,
    write_config,
    write_shards,
)
from shards import (
    AUGMENTATION,
    encode,
    picture,
    reinforced_sample,
    stored_embeddings,
    uid,
    write_shard,
)

from dr.transforms import compose_from_config

pytestmark = pytest.mark.slow

SOME = [
    layout for layout in LAYOUTS if layout.ranks > 1 and layout.sizes[0] not in (24, 60, 7)
]  # nothing divides
SHARDS, SAMPLES = 4, 24
STEPS, EPOCHS = 4, 3  # of the runs that are killed
KEPT = {"save_every_n_steps": 2, "accum_freq": 2, "epochs": EPOCHS, "train_num_samples": 128}
KEPT["force_patch_dropout"] = 0.5  # draws from the trainer's generators
DATA = ROOT / "tests" / "data"
# Of the run that wrote epoch_1_step_2_of_c52868e.pt, with that version of the recipe.
EARLIER = {"model": DATA / "micro_vit.json", "save_every_n_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def planted(tmp_path_factory):
    """A folder in which a planted pickle leaves a file, if it is run; here or in the trainer."""
    folder = tmp_path_factory.mktemp("planted")
    os.environ["PLANTED"] = str(folder)
    pickle.loads(pickle.dumps(Planted())).close()
    (folder / "ran").unlink()
    yield
    del os.environ["PLANTED"]


@pytest.fixture(scope="module")
def tree(tree_extended):
    return tree_extended


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [SAMPLES] * SHARDS)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return write_damaged_shards(tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def on_two_ranks(tree, config, shards, damaged, tmp_path_factory):
    """Several runs, one after the other in one torchrun, to save its start."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        one_run(
            layout, write_shards(folder / f"shards{n}", layout.sizes), config, folder / f"layout{n}"
        )
        for n, layout in enumerate(SOME)
        if layout.ranks == 2
    ]
    undisturbed = options(shards, config, folder / "undisturbed", **KEPT)
    runs.append({"record": folder / "undisturbed" / "record", "options": undisturbed})
    # A run of an earlier version, and what it would have become.
    for name in ("earlier", "earlier_undisturbed"):
        given = options(shards, config, folder / name, resume="latest", **EARLIER)
        runs.append({"record": folder / name / "record", "options": given})
    checkpoints = folder / "earlier" / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(DATA / "epoch_1_step_2_of_c52868e.pt", checkpoints / "epoch_1_step_2.pt")
    imperfect = {
        "train_num_samples": 160,
        "epochs": 4,
        "max_skipped_fraction": 0.3,
        "report_to": "tensorboard",
    }
    runs.append(
        {
            "record": folder / "imperfect" / "record",
            "options": options(damaged.pattern, config, folder / "imperfect", **imperfect),
            "event": ["remove", 1, 3, damaged.vanishing],
        }
    )
    done = train(tree, 2, runs, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def on_three_ranks(tree, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    runs = [
        one_run(
            layout, write_shards(folder / f"shards{n}", layout.sizes), config, folder / f"layout{n}"
        )
        for n, layout in enumerate(SOME)
        if layout.ranks == 3
    ]
    done = train(tree, 3, runs, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=[pytest.mark.extended] if layout.ranks == 3 else [])
        for number, layout in enumerate(SOME)
    ],
)
def test_every_sample_is_seen_once_in_a_complete_pass_and_never_twice_in_one(number, request, tree):
    layout = SOME[number]
    folder = request.getfixturevalue("on_two_ranks" if layout.ranks == 2 else "on_three_ranks")
    once, twice, never, _, rest_twice = coverage(layout, folder / f"layout{number}")
    assert once >= sum(layout.sizes) and (twice, never, rest_twice) == (0, 0, 0)


# --- killed and resumed ---------------------------------------------------------------------------
def curve(batches):
    return {
        at: (
            entry["samples"],
            entry["captions"],
            entry["augmentations"],
            entry["images"],
            entry.get("losses", []),
        )
        for at, entry in batches.items()
    }


def step_checkpoints(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("*step*"))


def resumed_from(folder):
    return re.findall(
        r"resuming checkpoint '.*/(epoch_\w+)\.pt'", (folder / "run" / "out.log").read_text()
    )


def test_a_run_killed_anywhere_goes_on_as_if_nothing_had_been(
    tree, config, shards, on_two_ranks, tmp_path
):
    """SIGKILL, SIGKILL while a checkpoint is written, SIGTERM to one rank: each time --resume
    latest."""
    folders = []
    for number, event in enumerate([["kill", 1, 7], ["kill saving", 0, 2], ["term", 1, 3], None]):
        folders.append(tmp_path / f"record{number}")
        given = options(shards, config, tmp_path, resume="latest", **KEPT)
        done = train(tree, 2, [{"record": folders[-1], "options": given, "event": event}], tmp_path)
        assert (done.returncode == 0) == (event is None), done.stderr[-3000:]
        if event and event[0] == "term":
            assert re.search(r"exitcode\s*: 143", done.stderr), done.stderr[-3000:]
        if event and event[0] == "kill saving":  # what was being written has no name yet
            assert (tmp_path / "run" / "checkpoints" / "checkpoint.tmp").stat().st_size == 1000
    # killed in step 4; while epoch_1.pt was written; ended a step after the signal came
    assert resumed_from(tmp_path) == ["epoch_0_step_2", "epoch_0_step_4", "epoch_1_step_3"]
    assert step_checkpoints(tmp_path) == ["epoch_2_step_2.pt", "epoch_2_step_4.pt"]
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint.tmp").exists()
    undisturbed, resumed = (
        curve(recorded(on_two_ranks / "undisturbed" / "record")),
        curve(recorded(*folders)),
    )
    assert undisturbed.keys() == resumed.keys() and len(resumed) == 2 * 2 * STEPS * EPOCHS
    for at, (*data, losses) in undisturbed.items():
        assert resumed[at][:-1] == tuple(data)
        assert resumed[at][-1] == pytest.approx(losses, rel=1e-6)


def test_a_run_that_an_earlier_version_started_goes_on_at_the_next_batch(on_two_ranks):
    assert resumed_from(on_two_ranks / "earlier") == ["epoch_1_step_2"]
    whole = curve(recorded(on_two_ranks / "earlier_undisturbed" / "record"))
    resumed = curve(recorded(on_two_ranks / "earlier" / "record"))
    assert resumed.keys() == {at for at in whole if at[1] >= 6} and len(resumed) == 2 * 2
    for at, (*data, losses) in resumed.items():
        assert whole[at][:-1] == tuple(data)
        assert losses == pytest.approx(whole[at][-1], rel=1e-5)


@pytest.mark.extended
def test_on_another_number_of_ranks_no_sample_of_a_pass_is_repeated_or_lost(
    tree, config, shards, tmp_path
):
    """Two ranks are killed, three that go on get SIGTERM by way of torchrun, and two go on to the
    end."""
    folders = [tmp_path / f"record{number}" for number in range(3)]
    for folder, ranks, event in zip(
        folders, (2, 3, 2), (["kill", 0, 5], ["slow", 0, 0.3], None), strict=True
    ):
        changes = {
            "batch_size": 24 // ranks,
            "train_num_samples": 120,
            "epochs": 3,
            "workers": ranks - 1,
        }
        given = options(
            shards,
            config,
            tmp_path,
            resume="latest",
            save_every_n_steps=1,
            keep_last_k=3,
            **changes,
        )
        words = command(ranks, [{"record": folder, "options": given, "event": event}], tmp_path)
        process = subprocess.Popen(
            list(map(str, words)),
            env=environment(tree),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 120
        while ranks == 3 and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
            if len(recorded(folder)) >= 6:
                process.send_signal(signal.SIGTERM)
                break
        assert (process.wait(timeout=150) == 0) == (event is None)
    assert (
        resumed_from(tmp_path)[0] in ("epoch_0_step_3", "epoch_0_step_4")
        and len(resumed_from(tmp_path)) == 2
    )
    assert len(step_checkpoints(tmp_path)) == 3
    last = torch.load(tmp_path / "run" / "checkpoints" / "epoch_3.pt", weights_only=True)["dr"][
        "sampling"
    ]
    assert last["layout"] == [2, 1]
    log = (tmp_path / "run" / "out.log").read_text()
    assert (
        "redistributed: to 3 ranks x 2 workers, after 2 x 1" in log
        and "to 2 ranks x 1 workers, after 3 x 2" in log
    )
    count = seen(recorded(*folders))
    assert sum(count.values()) == 360 and set(count.values()) == {1}
    total, done = SHARDS * SAMPLES, min(last["cursors"])[0]
    assert done >= 2
    assert all(count[pass_, sample] for pass_ in range(done) for sample in range(total))


def test_resampled_a_step_checkpoint_resumes_the_step(tree, config, damaged, tmp_path):
    """And what is skipped is counted there too."""
    changes = {
        "dataset_without_replacement": None,
        "dataset_resampled": True,
        "max_skipped_fraction": 0.5,
    }
    given = options(
        damaged.pattern,
        config,
        tmp_path,
        resume="latest",
        save_every_n_steps=3,
        epochs=3,
        **changes,
    )
    folders = [tmp_path / f"record{number}" for number in range(2)]
    for folder, event in zip(folders, (["term", 0, 12], None), strict=True):
        runs = tmp_path / "runs.json"
        runs.write_text(json.dumps([{"record": str(folder), "options": given, "event": event}]))
        done = run(
            [sys.executable, ROOT / "tests" / "recorded_training.py", runs], env=environment(tree)
        )
        assert done.returncode == (143 if event else 0), done.stderr[-3000:]
    assert resumed_from(tmp_path) == ["epoch_1_step_4"]
    assert len(recorded(*folders)) == 24  # 3 epochs of 64 / 8
    skipped = reported((tmp_path / "run" / "out.log").read_text())
    assert len(skipped) > 2
    known = {"shard that can't be read", *filter(None, KINDS.values())}
    assert {reason for reason in skipped if not reason.startswith("lacks ")} <= known


# --- a loss that is not finite --------------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_samples(
    tree, config, shards, tmp_path
):
    changes = {"lr": "1e30", "warmup": 0, "save_every_n_steps": 1, "keep_last_k": 9}
    given = options(shards, config, tmp_path, **changes)
    done = train(tree, 2, [{"record": tmp_path / "record", "options": given}], tmp_path)
    assert done.returncode != 0
    batches = recorded(tmp_path / "record")
    for rank in (0, 1):
        steps = json.loads((tmp_path / "run" / f"not_finite_rank_{rank}.json").read_text())
        bad = next(step for step in steps if "nan" in step["losses"].values())
        samples = batches[str(rank), bad["step"] - 1]["samples"]
        assert bad["uids"] == [uid(sample) for sample in samples] and len(samples) == 8
        message = f"error: the loss is not finite in step {bad['step']} of epoch 0 (rank {rank}: "
        assert message + "contrastive_loss nan, distill_loss nan, loss nan)" in done.stderr
    # No checkpoint was written after that step.
    written = [f"epoch_0_step_{step}.pt" for step in range(1, bad["step"])]
    assert step_checkpoints(tmp_path) == written


# --- imperfect data -------------------------------------------------------------------------------
class Planted:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return (open, (os.path.join(os.environ["PLANTED"], "ran"), "w"))


def in_npz():
    import numpy as np

    stream = io.BytesIO()
    np.savez(stream, image_emb=np.array([Planted()], dtype=object), text_emb=np.zeros((4, 12)))
    return {"npz": stream.getvalue()}


def in_pth_gz():
    stream = io.BytesIO()
    torch.save({"image_emb": Planted(), "text_emb": torch.zeros(4, 12)}, stream)
    return {"npz": None, "pth.gz": gzip.compress(stream.getvalue())}


def grey16():
    import numpy as np

    return encode(
        Image.fromarray(np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)), "PNG"
    )


def one_pixel():
    """With boxes of its own, which fit."""
    img, compose = picture(0, 1, 1), compose_from_config(AUGMENTATION)
    params = [compose.compress(compose(img)[1]) for _ in range(AUGMENTATIONS)]
    return {"jpg": encode(img), "paug.json": json.dumps({"param_aug": params}).encode()}


# What is wrong -> the reason for which it is left out; None: nothing is, once it is converted.
KINDS = {
    "truncated JPEG": "undecodable image",
    "decompression bomb": "oversized image",
    "larger bomb": "undecodable image",
    "bad JSON": "unreadable syn.json",
    "short npz": "unreadable npz",
    "pickle": "unreadable pth.gz",
    "pickle in npz": "unreadable npz",
    "pickle in pth.gz": "unreadable pth.gz",
    "empty caption": "empty caption",
    "another image of 1 x 1": "augmentation parameters",
    "CMYK": None,
    "palette": None,
    "16 bit": None,
    "1 x 1": None,
}


def damage(kind, members):
    """Other members for a sample; None leaves one out."""
    return {
        "truncated JPEG": lambda: {"jpg": members["jpg"][: len(members["jpg"]) // 2]},
        "decompression bomb": lambda: {
            "jpg": None,
            "png": encode(Image.new("1", (10_000, 10_000)), "PNG"),
        },
        "larger bomb": lambda: {
            "jpg": None,
            "png": encode(Image.new("1", (16_000, 16_000)), "PNG"),
        },
        "bad JSON": lambda: {"syn.json": members["syn.json"][:-5]},
        "short npz": lambda: {"npz": members["npz"][:-100]},
        "pickle": lambda: {"npz": None, "pth.gz": gzip.compress(pickle.dumps(Planted()))},
        "pickle in npz": in_npz,
        "pickle in pth.gz": in_pth_gz,
        "empty caption": lambda: {"txt": b" "},
        "another image of 1 x 1": lambda: {"jpg": encode(picture(0, 1, 1))},
        "CMYK": lambda: {"jpg": encode(Image.open(io.BytesIO(members["jpg"])).convert("CMYK"))},
        "palette": lambda: {"jpg": None, "png": encode(picture(0).convert("P"), "PNG")},
        "16 bit": lambda: {"jpg": None, "png": grey16()},
        "1 x 1": one_pixel,
    }[kind]()


class Damaged:
    """20 shards of 20 samples: 1 % of each kind, one shard cut in its middle, one to vanish."""

    sizes, cut, gone = [20] * 20, 7, 13

    def __init__(self, folder):
        self.folder, self.pattern = folder, f"{folder}/{{00000000..00000019}}.tar"
        self.vanishing = str(folder / f"{self.gone:08d}.tar")
        self.kinds = {}  # by number of the sample

    def reason(self, shard, place):
        return KINDS[self.kinds[sample]] if (sample := 20 * shard + place) in self.kinds else None


def write_damaged_shards(folder):
    damaged = Damaged(folder)
    spread = [number for number in range(400) if number // 20 not in (damaged.cut, damaged.gone)][
        ::6
    ]
    damaged.kinds = {number: kind for number, kind in zip(spread, 4 * list(KINDS), strict=False)}
    bombs = {kind: None for kind in KINDS}
    for shard in range(20):
        samples = []
        for number in range(20 * shard, 20 * shard + 20):
            members = reinforced_sample(number, AUGMENTATIONS, 3)
            if kind := damaged.kinds.get(number):
                if "bomb" in kind:
                    bombs[kind] = bombs[kind] or damage(kind, members)
                members |= bombs[kind] or damage(kind, members)
            samples.append(
                (uid(number), {name: data for name, data in members.items() if data is not None})
            )
        path = write_shard(folder / f"{shard:08d}.tar", samples)
        if shard == damaged.cut:
            (folder / "sizes.json").write_text(
                json.dumps({path.name: 20})
            )  # so that what is lost is known
            os.truncate(path, path.stat().st_size // 2)
    return damaged


def reported(log):
    """Skipped samples by reason, over all epochs of a log."""
    counts = Counter()
    for line in re.findall(r"Skipped in epoch \d+: \d+ of \d+ samples \([\d.]+%\): (.*)", log):
        for found in line.split(", "):
            number, _, reason = found.partition(" x ")
            counts[reason] += int(number)
    return counts


def test_on_imperfect_data_the_run_goes_on_and_every_loss_is_counted(on_two_ranks, damaged):
    folder = on_two_ranks / "imperfect"
    assert not os.path.exists(damaged.vanishing)
    log = (folder / "run" / "out.log").read_text()
    sampling = torch.load(folder / "run" / "checkpoints" / "epoch_4.pt", weights_only=True)["dr"][
        "sampling"
    ]
    count, expected, usable, unsure = seen(recorded(folder / "record")), Counter(), set(), Counter()
    for pass_, shard, place in taken(sampling):
        reason = damaged.reason(shard, place)
        sample = (pass_, 20 * shard + place)
        if shard == damaged.gone and not count[sample]:
            expected["shard that can't be read"] += 1
        elif shard == damaged.cut and not count[sample]:
            unsure[pass_] += 1  # the sample in which it is cut lacks what comes after
        elif reason:
            expected[reason] += 1
        else:
            usable.add(sample)
    assert set(count) == usable and set(count.values()) == {1} and len(count) == 640
    found = reported(log)
    cut = found - expected
    assert not expected - found
    assert all(
        reason == "shard that can't be read" or reason.startswith("lacks ") for reason in cut
    )
    assert cut.total() == unsure.total() >= 9
    assert (
        set(found) >= set(filter(None, KINDS.values()))
        and expected["shard that can't be read"] >= 20
    )
    assert {damaged.kinds.get(sample) for _, sample in count} >= {
        None,
        "CMYK",
        "palette",
        "16 bit",
        "1 x 1",
    }


def test_what_was_skipped_goes_to_tensorboard(on_two_ranks):
    logs = b"".join(
        path.read_bytes() for path in (on_two_ranks / "imperfect" / "run" / "tensorboard").iterdir()
    )
    for tag in (
        b"data/skipped_undecodable_image",
        b"data/skipped_shard_that_can_t_be_read",
        b"data/skipped_fraction",
        b"data/wait_fraction",
    ):
        assert tag in logs


def test_no_pickle_in_a_shard_has_run(on_two_ranks):
    assert not os.path.exists(os.path.join(os.environ["PLANTED"], "ran"))


def test_more_than_the_allowed_fraction_stops_all_ranks(tree, config, tmp_path):
    for shard in range(2):
        samples = []
        for number in range(40 * shard, 40 * shard + 40):
            members = reinforced_sample(number, AUGMENTATIONS, 3)
            if number % 3 == 0:
                members["npz"] = stored_embeddings(torch.zeros(3, 12), torch.zeros(4, 12))
            samples.append((uid(number), members))
        write_shard(tmp_path / f"{shard}.tar", samples)
    given = options(f"{tmp_path}/{{0..1}}.tar", config, tmp_path, epochs=9, train_num_samples=400)
    done = train(tree, 2, [{"record": tmp_path / "record", "options": given}], tmp_path)
    assert done.returncode != 0
    assert (
        "more than --max-skipped-fraction 0.1): " in done.stderr
        and " x row counts disagree" in done.stderr
    )
