"""Two steps of each MobileCLIP and MobileCLIP2 model, through the run script.

The nine models take about five minutes: ``bash scripts/test.sh -m models`` runs them. The images of
the FastViT models are small, for the CPU's sake; everything else is the model's own.
"""

import json
import math
import re

import open_clip
import pytest
import torch
from conftest import environment, run
from safetensors.torch import save_file
from shards import AUGMENTATION, write_reinforced_shards

SMALL = ("--force-image-size", 64)
MODELS = {
    "MobileCLIP-S1": SMALL,
    "MobileCLIP-S2": SMALL,
    "MobileCLIP-B": (),
    "MobileCLIP2-S0": SMALL,
    "MobileCLIP2-S2": SMALL,
    "MobileCLIP2-B": (),
    "MobileCLIP2-S3": SMALL,
    "MobileCLIP2-S4": SMALL,
    "MobileCLIP2-L-14": (),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four samples with one augmentation and two captions: each batch of four is the same."""
    folder = tmp_path_factory.mktemp("models")
    pattern = write_reinforced_shards(folder, shards=1, samples=4, augmentations=1, captions=1)
    config = {"reinforce": {"image_augmentation": AUGMENTATION}}
    (folder / "config.json").write_text(json.dumps(config))
    return {
        "DATA": pattern,
        "REINFORCEMENT_CONFIG": str(folder / "config.json"),
        "DISTILL_TEACHER_DIMENSION": "8 4",
    }


def train(pinned_tree, folder, data, model, **settings):
    """The log of a run of two steps, and the losses of the steps."""
    done = run(
        ["bash", pinned_tree / "configs" / "run_datacompdr12m.sh", *MODELS[model]],
        timeout=900,
        cwd=folder,
        env=environment(
            **data,
            **{
                "MODEL": model,
                "NAME": model,
                "NUM_NODES": "1",
                "NUM_GPUS": "0",
                "GLOBAL_BATCH": "4",
                "ITERATIONS": "2",
                "CHECKPOINTS": "1",
                "SAVE_FREQUENCY": "0",
                "SAMPLING": "without-replacement",
                "WORKERS": "1",
                "WARMUP": "1",
                "LR": "1e-5",
                "LOG_EVERY": "1",
                "IMAGENET_VAL": "",
                "REPORT_TO": "",
                **settings,
            },
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = (folder / "logs" / model / "out.log").read_text()
    losses = [float(value) for value in re.findall(r" Loss: ([\d.einfa]+)", log)]
    print(f"{model:18} {' '.join(map(str, losses))}")  # the table, with pytest -s
    return log, losses


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("model", MODELS)
def test_two_steps_of_a_model(pinned_tree, data, tmp_path, model):
    log, losses = train(pinned_tree, tmp_path, data, model, GRAD_CHECKPOINTING="0")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert losses[1] <= losses[0]
    assert f"  model: {model}" in log


@pytest.mark.slow
@pytest.mark.extended
def test_two_processes_with_accumulation_and_checkpointing(pinned_tree, data, tmp_path):
    settings = {"NUM_PROCESSES": "2", "ACCUM_FREQ": "2", "GLOBAL_BATCH": "8"}
    _, losses = train(pinned_tree, tmp_path, data, "MobileCLIP-S1", **settings)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert losses[1] <= losses[0]


@pytest.mark.slow
@pytest.mark.extended
def test_a_tag_trains_as_its_file_does_without_network(release_tree, data, tmp_path):
    """The Hub's local cache has the weights of the tag."""
    torch.manual_seed(0)
    state = open_clip.create_model("MobileCLIP2-S0").state_dict()
    cached = tmp_path / "hf" / "hub" / "models--timm--MobileCLIP2-S0-OpenCLIP"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "open_clip_model.safetensors")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    file = tmp_path / "mobileclip2_s0.safetensors"
    file.symlink_to(snapshot / "open_clip_model.safetensors")
    hub = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "GRAD_CHECKPOINTING": "0"}
    runs = []
    for name, pretrained in (("tag", "dfndr2b"), ("file", str(file))):
        folder = tmp_path / name
        folder.mkdir()
        settings = {**hub, "PRETRAINED": pretrained}
        runs.append(train(release_tree, folder, data, "MobileCLIP2-S0", **settings)[1])
    assert runs[0] == runs[1] and len(runs[0]) == 2
