"""The patched trainer, end to end: real shards, real torchrun over gloo, killed and resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import sampling_coverage
import torch
from conftest import ROOT, environment, run
from safetensors.torch import save_file
from shards import AUGMENTATION, encode, picture, uid, write_reinforced_shards, write_shard

from dr.tar import group_members

pytestmark = pytest.mark.slow

MODEL = ROOT / "tests" / "data" / "tiny_vit.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(
        json.dumps({"num_samples": 4, "reinforce": {"image_augmentation": AUGMENTATION}})
    )
    return path


@pytest.fixture(scope="module", params=["npz"])
def shards(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return write_reinforced_shards(
        folder, shards=4, samples=24, bf16=request.param == "pth.gz", width=12
    )


def settings(tree, config, shards, logs, *paths, **changes):
    """The environment in which a run script trains the tiny model on the CPU in two processes."""
    small = {
        "DATA": shards,
        "MODEL": MODEL,
        "LOGS": logs,
        "NAME": "run",
        "NUM_NODES": 1,
        "NUM_GPUS": 0,
        "NUM_PROCESSES": 2,
        "GLOBAL_BATCH": 16,
        "ITERATIONS": 8,
        "CHECKPOINTS": 2,
        "WORKERS": 1,
        "WARMUP": 2,
        "LOG_EVERY": 1,
        "IMAGENET_VAL": "",
        "REPORT_TO": "",
        "REINFORCEMENT_CONFIG": config,
        "DISTILL_TEACHER_DIMENSION": "8 4",
        **changes,
    }
    return environment(tree, *paths, **{name: str(value) for name, value in small.items()})


def train(tree, environ, *arguments, script="run_datacompdr12m.sh"):
    return run(["bash", tree / "configs" / script, *arguments], env=environ, cwd=tree)


def log(logs, name="run"):
    return (logs / name / "out.log").read_text()


def state(path):
    """A checkpoint, as torch loads it by default: with weights_only=True."""
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize(("shards", "accum_freq"), [("npz", 1), ("pth.gz", 2)], indirect=["shards"])
def test_two_processes_train_with_reinforcements_and_validate_without(
    tree, config, shards, accum_freq, tmp_path
):
    first = shards.replace("{00000000..00000003}", "00000000")
    given = {"DISTILL_LOSS_WEIGHTS": "0.25 0.75", "ACCUM_FREQ": accum_freq, "EVAL_DATA": first}
    done = train(tree, settings(tree, config, shards, tmp_path, **given))
    assert done.returncode == 0, done.stderr[-3000:]
    text = log(tmp_path)
    assert (
        text.count("Contrastive_loss") == text.count("Distill_loss") == 8
    )  # every step of both epochs
    assert "total 2." in text  # two processes
    for name in ("epoch_1.pt", "epoch_2.pt", "epoch_latest.pt"):
        assert state(tmp_path / "run" / "checkpoints" / name)["optimizer"]
    lines = (tmp_path / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()
    evaluated = [json.loads(line) for line in lines]
    assert [found["num_samples"] for found in evaluated] == [24, 24]
    for direction in ("image_to_text", "text_to_image"):
        for found in evaluated:
            assert 0 <= found[f"{direction}_R@1"] <= found[f"{direction}_R@5"] <= 1


def test_a_killed_run_goes_on_from_its_latest_checkpoint(tree_extended, config, shards, tmp_path):
    environ = settings(tree_extended, config, shards, tmp_path, CHECKPOINTS=40, ITERATIONS=160)
    process = subprocess.Popen(
        ["bash", str(tree_extended / "configs" / "run_datacompdr12m.sh")],
        env=environ,
        cwd=tree_extended,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.time() + 120
    while (
        not (checkpoints / "epoch_2.pt").exists()
        and time.time() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    workers = run(
        ["pgrep", "-P", process.pid]
    ).stdout.split()  # the script became torchrun, its children are the ranks
    assert len(workers) == 2
    for pid in (*workers, process.pid):
        os.kill(int(pid), signal.SIGKILL)
    process.wait()
    latest = checkpoints / "epoch_latest.pt"
    reached = state(latest)["epoch"]
    if (checkpoints / f"epoch_{reached + 1}.pt").exists():  # which is written first
        latest = checkpoints / f"epoch_{reached + 1}.pt"
        reached += 1
    assert 1 <= reached < 40, "the run was to be killed midway"

    environ.update(CHECKPOINTS=str(reached + 1), ITERATIONS=str(4 * (reached + 1)))
    done = train(tree_extended, environ, "--resume", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    text = log(tmp_path)
    assert f"resuming checkpoint '{latest}' (epoch {reached})" in text
    assert text.count(f"Start epoch {reached}\n") in (1, 2)  # 2: it had begun when it was killed
    assert state(checkpoints / "epoch_latest.pt")["epoch"] == reached + 1
    steps = {
        int(entry["step"])
        for entry in state(checkpoints / "epoch_latest.pt")["optimizer"]["state"].values()
    }
    assert steps == {4 * (reached + 1)}


@pytest.mark.extended
def test_the_recipe_runs_on_webdataset_0_2_86_too(
    pinned_tree, config, shards, tmp_path, old_webdataset
):
    environ = settings(pinned_tree, config, shards, tmp_path, old_webdataset, ITERATIONS=4)
    version = [sys.executable, "-c", "import webdataset; print(webdataset.__version__)"]
    assert run(version, env=environ).stdout.strip() == "0.2.86"
    done = train(pinned_tree, environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert log(tmp_path).count("Distill_loss") == 4


def test_zero_shot_evaluation_runs_on_one_of_several_processes(tree_extended, shards, tmp_path):
    for name in ("n01440764", "n01443537"):
        (tmp_path / "imagenet" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "imagenet" / name / "0.jpg")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--",
    ]
    options = {
        "--train-data": shards, "--train-num-samples": 32, "--epochs": 2, "--batch-size": 8, "--workers": 1,
        "--warmup": 1, "--model": MODEL, "--precision": "fp32", "--dist-backend": "gloo",
        "--imagenet-val": tmp_path / "imagenet",
        "--zeroshot-frequency": 1, "--logs": tmp_path, "--name": "run",
    }  # fmt: skip
    arguments = [word for option in options.items() for word in option]
    done = run(
        [*torchrun, ROOT / "tests" / "zero_shot.py", *arguments, "--dataset-resampled"],
        env=environment(tree_extended),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()
    assert ["imagenet-zeroshot-val-top1" in json.loads(line) for line in lines] == [True, True]


def test_accumulating_micro_batches_equals_one_batch_of_their_sum(tree, config):
    done = run(
        [sys.executable, ROOT / "tests" / "accumulated_step.py", MODEL, config],
        env=environment(tree),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    difference = json.loads(done.stdout.splitlines()[-1])
    assert difference["worst"] < 1e-4 and difference["logit_scale"] < 1e-4


@pytest.mark.extended
def test_a_checkpoint_with_numpy_scalars_resumes(pinned_tree, config, shards, tmp_path):
    """As the unpatched trainer leaves them: the learning rate is a NumPy number."""
    import numpy as np

    environ = settings(pinned_tree, config, shards, tmp_path, CHECKPOINTS=1, ITERATIONS=2)
    assert train(pinned_tree, environ).returncode == 0
    latest = tmp_path / "run" / "checkpoints" / "epoch_latest.pt"
    checkpoint = state(latest)
    for group in checkpoint["optimizer"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
    torch.save(checkpoint, latest)
    done = train(
        pinned_tree, {**environ, "CHECKPOINTS": "2", "ITERATIONS": "4"}, "--resume", "latest"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert state(latest)["epoch"] == 2


def test_wrong_teacher_dimensions_stop_the_run_naming_both_sides(
    pinned_tree, config, shards, tmp_path
):
    done = train(
        pinned_tree,
        settings(
            pinned_tree, config, shards, tmp_path, DISTILL_TEACHER_DIMENSION="8 8", NUM_PROCESSES=1
        ),
    )
    assert done.returncode != 0
    assert "12 wide, expected 16 by --distill-teacher-dimension" in done.stderr


@pytest.mark.parametrize("script", ["run_datacomp12m.sh", "run_datacompdr12m.sh"])
def test_shards_without_images_stop_the_run(pinned_tree, config, tmp_path, script):
    members = {"txt": b"a caption", "json": b"{}"}
    shard = write_shard(tmp_path / "00000000.tar", [(uid(seed), members) for seed in range(30)])
    done = train(
        pinned_tree,
        settings(pinned_tree, config, shard, tmp_path / "logs", NUM_PROCESSES=1),
        script=script,
    )
    assert done.returncode != 0
    assert (
        "not one sample can be used" in done.stderr
        and "lacks an image (jpg or jpeg or png or webp)" in done.stderr
    )


@pytest.mark.parametrize("resampled", ["resampled", "in passes"])
def test_without_the_new_options_openclip_trains_as_before(
    tree_extended, unpatched_tree, old_webdataset, tmp_path, resampled
):
    """The same batches, bit for bit, and the same losses: unpatched and patched on the last
    webdataset on which the unpatched trainer works, and patched on the newest."""
    for shard in range(3):
        samples = []
        for seed in range(20 * shard, 20 * shard + 20):
            members = {
                "jpg": encode(picture(seed)),
                "txt": f"caption {seed}".encode(),
                "json": b'{"a": 1}',
            }
            samples.append((uid(seed), {"txt": b"no image"} if seed % 7 == 3 else members))
        write_shard(tmp_path / f"{shard:08d}.tar", samples)
    results = []
    for name, where, paths in (
        ("unpatched", unpatched_tree, [old_webdataset]),
        ("patched", tree_extended, [old_webdataset]),
        ("newest", tree_extended, []),
    ):
        script = [
            sys.executable,
            ROOT / "tests" / "plain_training.py",
            MODEL,
            f"{tmp_path}/{{00000000..00000002}}.tar",
        ]
        done = run([*script, tmp_path / name, resampled], env=environment(where, *paths))
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert len(results[0]["batches"]) == 6 and len(results[0]["losses"]) == 12
    assert results[0] == results[1] == results[2]


@pytest.mark.skipif(
    not os.environ.get("OPEN_CLIP_REPO"),
    reason="OpenCLIP's own tests need its repository: OPEN_CLIP_REPO",
)
def test_openclips_own_tests_pass_on_the_patched_commit(tree):
    own = [
        "tests/test_wds.py",
        "tests/test_num_shards.py",
        "tests/test_training_simple.py::test_training",
    ]
    done = run(
        [sys.executable, "-m", "pytest", "-q", *own],
        timeout=900,  # OpenCLIP 3.3 trains RN50 in bfloat16 here
        env=environment(tree, tree / "tests"),
        cwd=tree,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_is_unlocked_trains_with_checkpointing_too(tree):
    """In another process, as the tests import the installed OpenCLIP."""
    command = [sys.executable, "-m", "pytest", "-q", ROOT / "tests" / "in_tree_towers.py"]
    done = run(command, env=environment(tree), cwd=ROOT)
    assert done.returncode == 0 and "14 passed" in done.stdout, done.stdout[-3000:]


REENTRANT = """
import importlib, os, sys
main = importlib.import_module(os.environ["TRAINER"] + ".main")
main.set_grad_checkpointing = lambda args, model: model.set_grad_checkpointing()
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_unlocked_block_without_a_gradient_stops_the_run_and_is_named(
    pinned_tree, config, shards, tmp_path, tower
):
    """With reentrant checkpointing, as the trainer would use without us."""
    lock = {f"lock_{tower}": True, "grad_checkpointing": True, "lock_text_freeze_layer_norm": True}
    lock |= {"lock_image_unlocked_groups": 2, "lock_text_unlocked_layers": 1}
    given = sampling_coverage.options(shards, config, tmp_path, **lock)
    done = run([sys.executable, "-c", REENTRANT, *given], env=environment(pinned_tree))
    assert done.returncode == 1
    block = ("visual." if tower == "image" else "") + "transformer.resblocks.0"
    assert f"error: {block}: unlocked, but without a gradient in the first step" in done.stderr


@pytest.mark.extended
def test_a_run_is_resumed_from_the_remote_copy(pinned_tree, config, shards, tmp_path):
    remote = f"file://{tmp_path / 'remote'}"
    options = ["--remote-sync", remote, "--remote-sync-protocol", "fsspec", "--resume", "latest"]
    environ = settings(pinned_tree, config, shards, tmp_path / "logs", NUM_PROCESSES=1)
    done = train(pinned_tree, environ, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(tmp_path / "logs")  # as on another machine
    environ |= {"CHECKPOINTS": "3", "ITERATIONS": "12"}
    done = train(pinned_tree, environ, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    text = log(tmp_path / "logs")
    assert "epoch_2.pt' (epoch 2)" in text and "Start epoch 2" in text
    assert "Start epoch 1" not in text and text.count("Train Epoch: 2 ") == 4


GROUP = """
import importlib, json, os, sys
group_by_keys_nothrow = importlib.import_module(
    os.environ["TRAINER"] + ".data"
).group_by_keys_nothrow
for names in json.load(sys.stdin):
    files = ({"fname": name, "data": 0, "__url__": "u"} for name in names)
    samples = list(group_by_keys_nothrow(files))
    print(json.dumps([[s.pop("__key__"), sorted(n for n in s if n != "__url__")] for s in samples]))
"""


def test_samples_are_grouped_as_openclip_groups_them(pinned_tree):
    """Also where an extension comes twice, on which webdataset's own grouping raises."""
    rng = random.Random(0)
    words = ["a.jpg", "a.JPG", "a.json", "b.json", "b.syn.json", "d.e/a.txt", "d/.a", "a", "c.txt"]
    shards = [[rng.choice(words) for _ in range(rng.randrange(1, 30))] for _ in range(200)]
    shards += [["k.jpg", "k.json", "k.json", "k.txt"], ["a.jpg", "b.json", "a.txt"]]
    done = run(
        [sys.executable, "-c", GROUP], input=json.dumps(shards), env=environment(pinned_tree)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for names, line in zip(shards, done.stdout.splitlines(), strict=True):
        found = group_members((name, 0) for name in names)
        assert [[key, sorted(sample)] for key, sample in found] == json.loads(line)


@pytest.mark.parametrize("sampling", ["with-replacement", "without-replacement"])
def test_a_run_takes_exactly_the_iterations_that_it_was_given(
    tree_extended, config, shards, tmp_path, sampling
):
    """Whatever divides what; the learning rate's schedule ends with the last one."""
    given = {"ITERATIONS": 10, "CHECKPOINTS": 4, "WORKERS": 3, "NUM_PROCESSES": 1, "ACCUM_FREQ": 2}
    environ = settings(tree_extended, config, shards, tmp_path, SAMPLING=sampling, **given)
    done = train(tree_extended, environ)
    assert done.returncode == 0, done.stderr[-3000:]
    text = log(tmp_path)
    assert "The run takes 10 optimizer steps, in epochs of 3" in text
    steps = [text.count(f"Train Epoch: {epoch} ") for epoch in range(5)]
    assert steps == [3, 3, 3, 1, 0]
    rates = [float(rate) for rate in re.findall(r" LR: ([\d.e-]+) ", text)]
    assert len(rates) == 10 and rates[1] == max(rates) and rates[-1] < 0.1 * rates[1]


@pytest.mark.extended
def test_released_weights_bring_their_preprocessing(tree_extended, config, shards, tmp_path):
    """A model trained with mean 0, std 1 and bilinear resizing, as MobileCLIP-S1 was, has the same
    figures after its training and loaded as weights; also from a run script, from safetensors."""
    for number, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / "imagenet" / name).mkdir(parents=True)
        for seed in range(4):
            picture(8 * number + seed).save(tmp_path / "imagenet" / name / f"{seed}.jpg")
    first = shards.replace("{00000000..00000003}", "00000000")
    model = [
        *("--model", MODEL, "--precision", "fp32", "--dist-backend", "gloo", "--logs", tmp_path),
        *("--val-data", first, "--val-num-samples", 24, "--dataset-type", "webdataset"),
        *("--imagenet-val", tmp_path / "imagenet", "--workers", 1, "--batch-size", 8),
    ]
    own = [*("--image-mean", *"000", "--image-std", *"111"), *("--image-interpolation", "bilinear")]

    def figures(name, *options):
        done = run(
            [sys.executable, ROOT / "tests" / "zero_shot.py", *model, "--name", name, *options],
            env=environment(tree_extended),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "checkpoints" / "results.jsonl").read_text().splitlines()
        found = json.loads(lines[-1])
        found.pop("epoch")
        assert {"imagenet-zeroshot-val-top1", "clip_val_loss", "image_to_text_R@1"} <= found.keys()
        return found

    options = [*("--train-num-samples", 96, "--epochs", 1), *("--warmup", 1, "--lr", 1e-2)]
    trained = figures("trained", "--train-data", shards, *options, "--dataset-resampled", *own)
    weights = state(tmp_path / "trained" / "checkpoints" / "epoch_1.pt")["state_dict"]
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    released = tmp_path / "mobileclip_s1.pt"
    torch.save(weights, released)
    safe = released.with_suffix(".safetensors")
    save_file(weights, safe)
    assert figures("loaded", "--pretrained", released) == trained
    assert figures("safe", "--pretrained", safe) == trained
    other = figures(
        "other", "--pretrained", safe, "--ignore-pretrained-statistics", *("--image-mean", *"001")
    )
    assert other["clip_val_loss"] != trained["clip_val_loss"]

    environ = settings(
        tree_extended, config, shards, tmp_path, NAME="tuned", PRETRAINED=safe, ITERATIONS=2, LR=0
    )
    done = train(tree_extended, environ, "--val-data", first, "--val-num-samples", "24")
    assert done.returncode == 0, done.stderr[-3000:]
    text = log(tmp_path, "tuned")
    assert "image_mean: [0.0, 0.0, 0.0]" in text and "image_interpolation: bilinear" in text
    lines = (tmp_path / "tuned" / "checkpoints" / "results.jsonl").read_text().splitlines()
    tuned = json.loads(lines[-1])
    assert tuned["clip_val_loss"] == pytest.approx(trained["clip_val_loss"], rel=1e-5)
    assert tuned["image_to_text_R@1"] == trained["image_to_text_R@1"]


# --- release 3.3 ----------------------------------------------------------------------------------
def find_losses(logs, name, epoch):
    lines = [line for line in log(logs, name).splitlines() if f"Train Epoch: {epoch} " in line]
    return [float(re.search(r" Loss: ([\d.]+)", line)[1]) for line in lines]


@pytest.mark.extended
def test_release_3_3_trains_compiled_and_with_timm_optimizers(
    release_tree, config, shards, tmp_path
):
    """Two processes, with gradient checkpointing, which is the run scripts' default."""
    for name, options in {
        "as it is": [],
        "compiled": ["--torchcompile"],
        "timm": ["--opt", "timm/adamw", "--precision", "amp_bfloat16"],
    }.items():
        environ = settings(
            release_tree, config, shards, tmp_path, NAME=name, ITERATIONS=2, CHECKPOINTS=1
        )
        environ |= {"SAMPLING": "without-replacement", "WORKERS": "2"}
        done = train(release_tree, environ, *options)
        assert done.returncode == 0, done.stderr[-3000:]
    expected = find_losses(tmp_path, "as it is", 0)
    assert len(expected) == 2
    assert find_losses(tmp_path, "compiled", 0) == pytest.approx(expected, rel=1e-4)
    assert find_losses(tmp_path, "timm", 0) == pytest.approx(expected, rel=2e-2)  # bfloat16
    assert "AdamW (timm/adamw) optimizer" in log(tmp_path, "timm")
    states = [
        state(tmp_path / name / "checkpoints" / "epoch_1.pt") for name in ("as it is", "compiled")
    ]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()


@pytest.mark.parametrize("first", ["pinned", "3.3"])
def test_a_checkpoint_of_one_version_resumes_in_the_other(
    pinned_tree, release_tree, config, shards, tmp_path, first
):
    trees = [pinned_tree, release_tree] if first == "pinned" else [release_tree, pinned_tree]
    given = {"NUM_PROCESSES": 1, "ITERATIONS": 4, "SAMPLING": "without-replacement"}
    environ = settings(trees[0], config, shards, tmp_path, NAME="first", **given)
    done = train(trees[0], environ)
    assert done.returncode == 0, done.stderr[-3000:]
    environ = settings(trees[1], config, shards, tmp_path, NAME="second", **given)
    done = train(trees[1], environ, "--resume", tmp_path / "first" / "checkpoints" / "epoch_1.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = find_losses(tmp_path, "first", 1)
    assert len(expected) == 2 and find_losses(tmp_path, "second", 0) == []
    assert find_losses(tmp_path, "second", 1) == pytest.approx(expected, rel=1e-4)
