"""The run scripts start the published recipes, and report what is missing before that."""

import os
import re
import shlex
import sys

import open_clip
import pytest
from conftest import ROOT, environment, run
from lib.config import DEFAULT_CONFIG, read_config
from lib.teachers import teacher_dimensions
from shards import write_shard

RECIPES = [
    "run_datacomp12m.sh",
    "run_datacompdr12m.sh",
    "run_datacompdr1B.sh",
    "run_dfndr12m.sh",
    "run_dfndr2b.sh",
]
CONFIGS = {
    "run_datacompdr12m.sh": "datacompdr12m.json",
    "run_datacompdr1B.sh": "datacompdr1b.json",
    "run_dfndr12m.sh": "dfndr12m.json",
    "run_dfndr2b.sh": "dfndr2b.json",
}
COMMON = (
    "--save-frequency 1 --ddp-static-graph --local-loss --gather-with-grad --grad-checkpointing "
    "--warmup 1000 --dataset-type webdataset --precision amp --workers 4 "
    "--lr 1.e-3 --seed 0 --accum-freq 1 "
    "--log-every-n-steps 20 --beta2 0.95 --wd 0.2 --dataset-resampled --grad-clip-norm 1.0 "
    "--imagenet-val ./imagenet_validation --zeroshot-frequency 1 --report-to wandb "
    "--wandb-project-name mobileclip"
)
DISTILLED = (
    "--dataset-reinforcement --distill-teacher-dimension 768 768 --distill-average-after-softmax"
)
DATACOMPDR, DFNDR = (
    f"{DISTILLED} --distill-logit-scale 100",
    f"{DISTILLED} --distill-logit-scale 70 60",
)
PUBLISHED = {
    "run_datacomp12m.sh": (1, 8192 * 30_000 // 20, 20, 1024, "--model ViT-B-16 --save-most-recent"),
    "run_datacompdr12m.sh": (
        4, 8192 * 30_000 // 20, 20, 256,
        f"--model ViT-B-16 --save-most-recent {DATACOMPDR} --distill-loss-weights 0.0 1.0",
    ),
    "run_datacompdr1B.sh": (
        16, 65536 * 200_000 // 100, 100, 512,
        f"--model ViT-B-16 --resume latest {DATACOMPDR} --distill-loss-weights 0.25 0.75",
    ),
    "run_dfndr12m.sh": (
        4, 8192 * 30_000 // 20, 20, 256,
        f"--model MobileCLIP-B --save-most-recent {DFNDR} --distill-loss-weights 0.0 1.0",
    ),
    "run_dfndr2b.sh": (
        16, 65536 * 200_000 // 100, 100, 512,
        f"--model MobileCLIP-B --resume latest {DFNDR} --distill-loss-weights 0.0 1.0 "
        "--dataset-reinforcement-syn-text-key-regex ^syn_text_dfn_mscoco38k$",
    ),
}  # fmt: skip
# The names of DFNDR-2B's shards are not published, so DATA must be set.
DATA = {"run_dfndr2b.sh": {"DATA": "dfndr2b/{0000..0001}.tar"}}
# A machine of 8 GPUs: answers what the scripts ask of Python, and prints torchrun's command line.
SHIM = """#!/usr/bin/env bash
case "$*" in
    *torch.distributed.run*) printf '%q ' "$@"; echo ;;
    *device_count*) echo 8 ;;
    *"import wandb"*) ;;
    *) exec {python} "$@" ;;
esac
"""


def arguments(line):
    """{option: its values} of a printed command line."""
    found, words = {}, shlex.split(line)
    for position, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            rest = words[position + 1 :]
            found[word] = rest[
                : next((i for i, w in enumerate(rest) if w.startswith("--")), len(rest))
            ]
    return found


@pytest.fixture(scope="module")
def tree(pinned_tree):
    """The scripts are the same on both versions of OpenCLIP, but for the name of the trainer."""
    return pinned_tree


@pytest.fixture
def machine(tree, tmp_path):
    """The environment and folder in which a published recipe finds all that it needs."""
    shim = tmp_path / "python"
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    for name in ("DataComp-12M", "DataCompDR-12M", "DFNDR-12M"):
        for shard in ("00000000.tar", "00001023.tar"):
            write_shard(tree.parent / "datasets" / name / "shards" / shard, [])
    for shard in ("0000.tar", "0001.tar"):
        write_shard(tmp_path / "dfndr2b" / shard, [])
    for shard in ("00/00000000.tar", "65/00000535.tar"):
        write_shard(tree.parent / "datasets" / "DataCompDR-1B" / shard, [])
    (tmp_path / "imagenet_validation").mkdir()
    nodes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ROLE_RANK": "3"}
    return environment(None, PYTHON=str(shim), **nodes), tmp_path


@pytest.mark.parametrize("script", RECIPES)
def test_as_it_stands_a_script_starts_the_published_recipe(tree, machine, script):
    environ, folder = machine
    environ.update(DATA.get(script, {}))
    done = run(["bash", tree / "configs" / script], env=environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    nodes, samples, epochs, local_batch, more = PUBLISHED[script]
    given = arguments(done.stdout)
    for option, values in arguments(f"{COMMON} {more}").items():
        assert given[option] == values, option
    assert given["--train-num-samples"] == [str(samples)] and given["--epochs"] == [str(epochs)]
    assert given["--batch-size"] == [str(local_batch)]
    assert (
        given["--nnodes"] == [str(nodes)]
        and given["--nproc-per-node"] == ["8"]
        and given["--max-restarts"] == ["0"]
    )
    datasets = tree.parent / "datasets"
    assert given["--train-data"] == [
        {
            "run_datacomp12m.sh": f"{datasets}/DataComp-12M/shards/{{00000000..00001023}}.tar",
            "run_datacompdr12m.sh": f"{datasets}/DataCompDR-12M/shards/{{00000000..00001023}}.tar",
            "run_datacompdr1B.sh": f"{datasets}/DataCompDR-1B/"
            "{{00..64}/{00000000..00000999},65/{00000000..00000535}}.tar",
            "run_dfndr12m.sh": f"{datasets}/DFNDR-12M/shards/{{00000000..00001023}}.tar",
            "run_dfndr2b.sh": "dfndr2b/{0000..0001}.tar",
        }[script]
    ]
    if nodes == 1:
        assert "--standalone" in given
    else:
        assert given["--node-rank"] == ["3"] and given["--rdzv-backend"] == ["c10d"]
        assert given["--rdzv-endpoint"] == ["127.0.0.1:29500"]
        timeouts = dict(pair.split("=") for pair in given["--rdzv-conf"][0].split(","))
        assert timeouts and all(int(seconds) >= 3000 for seconds in timeouts.values())
        config = given["--dataset-reinforcement-config"][0]
        assert os.path.samefile(config, tree / "configs" / CONFIGS[script])


def test_one_gpu_needs_no_rendezvous_and_arguments_are_passed_on(tree, machine):
    environ, folder = machine
    for variable in ("MASTER_ADDR", "MASTER_PORT", "ROLE_RANK"):
        del environ[variable]
    environ.update(
        NUM_NODES="1",
        NUM_GPUS="1",
        GLOBAL_BATCH="1024",
        ACCUM_FREQ="4",
        NAME="mine",
        IMAGENET_VAL="",
        REPORT_TO="",
    )
    done = run(
        ["bash", tree / "configs" / "run_datacompdr12m.sh", "--lr", "1.e-4", "--debug"],
        env=environ,
        cwd=folder,
    )
    given = arguments(done.stdout)
    assert "--standalone" in given and "--rdzv-endpoint" not in given
    assert (
        given["--batch-size"] == ["256"]
        and given["--accum-freq"] == ["4"]
        and given["--name"] == ["mine"]
    )
    assert given["--lr"] == ["1.e-4"] and "--debug" in given  # the last one counts
    assert "--imagenet-val" not in given and "--report-to" not in given


@pytest.mark.parametrize("script", RECIPES)
def test_a_dry_run_prints_the_command_that_would_run(tree, machine, script):
    environ, folder = machine
    environ.update(NAME="a name", MODEL="it's", **DATA.get(script, {}))
    command = ["bash", tree / "configs" / script, "--debug"]
    printed = run(command, env={**environ, "DRY_RUN": "1"}, cwd=folder)
    assert printed.returncode == 0 and printed.stderr == ""
    real = run(command, env=environ, cwd=folder)
    lines = [shlex.split(line.removesuffix(" \\")) for line in printed.stdout.splitlines()]
    assert {len(line) for line in lines} == {1}
    assert lines[-len(shlex.split(real.stdout)) :] == [[arg] for arg in shlex.split(real.stdout)]
    pasted = run(["bash", "-c", printed.stdout], cwd=folder, env={"PATH": os.environ["PATH"]})
    assert pasted.stdout == real.stdout != ""


@pytest.mark.parametrize("script", RECIPES)
def test_a_dry_run_needs_neither_tree_nor_shards_nor_gpus(tmp_path, script):
    run(["cp", "-r", ROOT / "configs", tmp_path])
    settings = {"DRY_RUN": "1", "PYTHON": "/bin/false", "NUM_NODES": "2"}
    done = run(["bash", tmp_path / "configs" / script], env={**os.environ, **settings})
    assert done.returncode == 0 and "--train-data" in done.stdout
    for obstacle in ("setup_open_clip.sh", "0", "IMAGENET_VAL", "MASTER_ADDR", "wandb"):
        assert re.search(f"^warning: .*{obstacle}", done.stderr, re.MULTILINE), obstacle
    environ = {**os.environ, **settings, "GLOBAL_BATCH": "100"}
    refused = run(["bash", tmp_path / "configs" / script], env=environ)
    assert refused.returncode == 1 and "error: GLOBAL_BATCH=100" in refused.stderr


@pytest.mark.parametrize("script", RECIPES)
def test_sampling_without_replacement_and_step_checkpoints_are_a_setting_away(
    tree, machine, script
):
    environ, folder = machine
    changes = {
        "SAMPLING": "without-replacement",
        "SAVE_EVERY_N_STEPS": "500",
        "MAX_SKIPPED_FRACTION": "0.02",
        **DATA.get(script, {}),
    }
    done = run(["bash", tree / "configs" / script], env={**environ, **changes}, cwd=folder)
    given = arguments(done.stdout)
    assert "--dataset-without-replacement" in given and "--dataset-resampled" not in given
    assert given["--save-every-n-steps"] == ["500"] and given["--max-skipped-fraction"] == ["0.02"]


@pytest.mark.parametrize(
    "model", ["MobileCLIP-S2", "MobileCLIP2-B", "MobileCLIP2-S4", "MobileCLIP-B"]
)
def test_loss_weights_of_the_1b_recipe_are_those_published_for_the_model(tree, machine, model):
    environ, folder = machine
    script = ["bash", tree / "configs" / "run_datacompdr1B.sh"]
    expected = ["0.25", "0.75"] if model == "MobileCLIP-B" else ["0.0", "1.0"]
    done = run(script, env={**environ, "MODEL": model}, cwd=folder)
    assert arguments(done.stdout)["--distill-loss-weights"] == expected
    own = {**environ, "MODEL": model, "DISTILL_LOSS_WEIGHTS": "0.5 0.5"}
    done = run(script, env=own, cwd=folder)
    assert arguments(done.stdout)["--distill-loss-weights"] == ["0.5", "0.5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "NUM_NODES=4, but MASTER_ADDR is not set"),
        ({"ROLE_RANK": None}, "ROLE_RANK is not set"),
        ({"NUM_GPUS": "16"}, "needs 16 GPUs a node, and this machine has 8"),
        ({"GLOBAL_BATCH": "100"}, "GLOBAL_BATCH=100 is not a multiple of 32"),
        ({"IMAGENET_VAL": "nowhere"}, "no folder IMAGENET_VAL=nowhere"),
        ({"EVAL_DATA": "held_out/{0..1}.tar"}, "no shard held_out/0.tar of EVAL_DATA=held_out/"),
        ({"DATASETS": "nowhere"}, "no training shard nowhere/DataCompDR-12M/shards/00000000.tar"),
        ({"DATASETS": "nowhere"}, "scripts/join_datacompdr12m.sh"),
        ({"DATA": "other/{0..3}.tar"}, "no training shard other/0.tar"),
        ({"PYTHON": "/bin/false"}, "has no torch"),
        ({"SAMPLING": "none"}, "SAMPLING=none: expected with-replacement or without-replacement"),
    ],
)
def test_what_is_missing_is_reported_before_torchrun_starts(tree, machine, changes, message):
    environ, folder = machine
    environ = {name: value for name, value in {**environ, **changes}.items() if value is not None}
    done = run(["bash", tree / "configs" / "run_datacompdr12m.sh"], env=environ, cwd=folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_dfndr_2b_needs_data_and_a_dry_run_does_not(tree, machine):
    environ, folder = machine
    script = ["bash", tree / "configs" / "run_dfndr2b.sh"]
    done = run(script, env=environ, cwd=folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: DATA is not set") and "not published" in done.stderr
    printed = run(script, env={**environ, "DRY_RUN": "1"}, cwd=folder)
    assert printed.returncode == 0 and "warning: DATA is not set" in printed.stderr
    assert "--train-data" in printed.stdout and "no training shard" not in printed.stderr


@pytest.mark.parametrize(("name", "augmentations"), [("dfndr12m", 30), ("dfndr2b", 2)])
def test_configs_of_dfndr_name_the_published_teachers(name, augmentations):
    config = read_config(ROOT / "configs" / f"{name}.json")
    repositories = [open_clip.get_pretrained_cfg(*teacher)["hf_hub"] for teacher in config.teachers]
    assert [repository.strip("/") for repository in repositories] == [
        "apple/DFN2B-CLIP-ViT-L-14",
        "apple/DFN2B-CLIP-ViT-L-14-39B",
    ]
    assert teacher_dimensions(config) == [768, 768] and config.augmentations == augmentations
    assert list(config.augmentation) == list(read_config(DEFAULT_CONFIG).augmentation)


def test_an_experiment_that_exists_is_not_started_again(tree, machine):
    environ, folder = machine
    (folder / "logs" / "run_datacompdr12m").mkdir(parents=True)
    (folder / "logs" / "run_datacompdr12m" / "out.log").touch()
    script = ["bash", tree / "configs" / "run_datacompdr12m.sh"]
    done = run(script, env=environ, cwd=folder)
    assert done.returncode == 1 and "--resume latest" in done.stderr and "NAME" in done.stderr
    for more in ({"NAME": "other"}, {}):
        again = run(
            [*script, *([] if more else ["--resume", "latest"])],
            env={**environ, **more},
            cwd=folder,
        )
        assert again.returncode == 0, again.stderr


def test_without_a_patched_tree_the_script_says_how_to_get_one(tmp_path):
    done = run(["cp", "-r", ROOT / "configs", tmp_path])
    done = run(["bash", tmp_path / "configs" / "run_datacompdr12m.sh"])
    assert done.returncode == 1 and "bash scripts/setup_open_clip.sh" in done.stderr


def test_plain_training_takes_the_joined_shards_where_there_are_no_others(tree, machine):
    environ, folder = machine
    for shard in ("00000000.tar", "00001023.tar"):
        write_shard(folder / "datasets" / "DataCompDR-12M" / "shards" / shard, [])
    environ["DATASETS"] = "datasets"
    done = run(["bash", tree / "configs" / "run_datacomp12m.sh"], env=environ, cwd=folder)
    assert arguments(done.stdout)["--train-data"] == [
        "datasets/DataCompDR-12M/shards/{00000000..00001023}.tar"
    ]


@pytest.mark.parametrize("script", RECIPES)
def test_help_says_what_it_does_and_needs_and_lists_all_settings(script):
    done = run(["bash", ROOT / "configs" / script, "--help"])
    assert done.returncode == 0 and "Needs:" in done.stdout and "Writes:" in done.stdout
    listed = set(re.findall(r"^  ([A-Z0-9_]+)=", done.stdout, re.MULTILINE))
    texts = [(ROOT / "configs" / name).read_text() for name in (script, "launch.sh")]
    settings = {
        name for text in texts for name in re.findall(r"^([A-Z0-9_]+)=\$\{\1:?-", text, re.M)
    }
    assert len(re.findall(r"^  MODEL=", done.stdout, re.MULTILINE)) == 1
    assert listed == settings and {"NUM_NODES", "DATA", "LR", "IMAGENET_VAL"} < listed


def test_the_trainer_is_that_of_the_tree(pinned_tree, release_tree):
    for tree, trainer in ((pinned_tree, "training.main"), (release_tree, "open_clip_train.main")):
        command = ["bash", tree / "configs" / "run_datacompdr12m.sh"]
        done = run(command, env=environment(None, DRY_RUN="1"), cwd=tree)
        assert done.returncode == 0 and f"{trainer} \\\n" in done.stdout, done.stderr
