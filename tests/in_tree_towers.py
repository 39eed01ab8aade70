"""What is unlocked trains, also with gradient checkpointing."""

import os
from argparse import Namespace

import open_clip
import pytest
import torch

from dr.towers import lock_text_tower, parameters_without_gradient, set_grad_checkpointing

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture(params=["CLIP", "CustomTextCLIP"])
def model(request):
    return getattr(open_clip, request.param)(**CLIP, output_dict=True)


@pytest.fixture
def step():
    def run(model):
        torch.manual_seed(0)
        out = model(torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 16)))
        (out["image_features"] @ out["text_features"].T * out["logit_scale"]).sum().backward()

    return run


def trained(model, tower):
    """Names of the tower's parameters that ask for a gradient."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    image = {name for name in names if name.startswith("visual")}
    return image if tower == "image" else names - image - {"logit_scale"}


@pytest.mark.parametrize(("layers", "freeze_norm"), [(0, True), (0, False), (1, True), (2, False)])
def test_a_text_tower_keeps_its_last_layers_trainable(model, layers, freeze_norm):
    everything = trained(model, "text")
    lock_text_tower(model, layers, freeze_norm)
    left = trained(model, "text")
    assert left < everything and trained(model, "image") == trained(model, "image") != set()
    blocks = {int(name.split("resblocks.")[1][0]) for name in left if "attn.in_proj" in name}
    assert blocks == set(range(3 - layers, 3))
    assert any(name.endswith("text_projection") for name in left) == (layers > 0)
    assert not any("token_embedding" in name for name in left)
    norms = {name for name in everything if "ln_" in name and "resblocks.0" in name}
    assert len(norms) == 4 and norms & left == (set() if freeze_norm else norms)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_unlocked_gets_gradients_with_checkpointing(model, step, tower, monkeypatch):
    if tower == "image":
        model.lock_image_tower(unlocked_groups=2)
    else:
        lock_text_tower(model, 1, True)
    if os.environ["TRAINER"] == "training":  # OpenCLIP 3.3 checkpoints as we do
        model.set_grad_checkpointing()
        step(model)
        found = parameters_without_gradient(model)  # as in the unpatched trainer
        assert len(found) == 1 and found[0].endswith("transformer.resblocks.2")
        model.zero_grad()
    monkeypatch.setattr(open_clip.transformer, "checkpoint", None)  # restored at the end
    set_grad_checkpointing(Namespace(lock_image=tower == "image", lock_text=tower == "text"), model)
    step(model)
    assert parameters_without_gradient(model) == []


def test_without_locked_towers_checkpointing_stays_as_it_is(model):
    before = open_clip.transformer.checkpoint
    set_grad_checkpointing(Namespace(lock_image=False, lock_text=False), model)
    assert open_clip.transformer.checkpoint is before
