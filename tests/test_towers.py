"""BatchNorm statistics of an image tower move once for each micro-batch."""

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch.nn import BatchNorm2d

from dr.towers import update_statistics_once

STEPS = 2


def make_model():
    """A small FastViT as the image tower of a model."""
    torch.manual_seed(0)
    small = {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_classes": 8}
    tower = timm.create_model("fastvit_t8", **small)
    return torch.nn.ModuleDict({"visual": tower}).train()


def statistics(model):
    """Running means and variances of all BatchNorm layers, and the numbers of their updates."""
    layers = [part for part in model.modules() if isinstance(part, BatchNorm2d)]
    assert len(layers) > 20
    values = torch.cat([torch.cat([one.running_mean, one.running_var]) for one in layers])
    return values, {int(layer.num_batches_tracked) for layer in layers}


def train(model, accumulated=False):
    """Run micro-batches as the trainer does: with accumulation, first without gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        if accumulated:
            with torch.no_grad():
                model["visual"](images)
        model["visual"](images).sum().backward()


@pytest.fixture(scope="module")
def expected():
    """After one pass for each micro-batch."""
    model = make_model()
    train(model)
    values, counts = statistics(model)
    assert counts == {STEPS}
    return values


@pytest.fixture(params=[None, False, True], ids=["whole", "checkpointed", "reentrant"])
def checkpointing(request):
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(bool(request.param))
    yield request.param is not None
    set_reentrant_ckpt(before)


@pytest.mark.parametrize("accumulated", [False, True], ids=["one batch", "accumulated"])
def test_statistics_move_once(expected, checkpointing, accumulated):
    plain, fixed = make_model(), make_model()
    for model in (plain, fixed):
        model["visual"].set_grad_checkpointing(checkpointing)
    update_statistics_once(fixed)
    train(plain, accumulated)
    train(fixed, accumulated)

    values, counts = statistics(plain)  # as in OpenCLIP
    times = 1 + accumulated + checkpointing
    assert max(counts) == times * STEPS
    # With momentum 0.1 a layer keeps 0.9^2 of its start after 2 moves, 0.9^4 after 4.
    assert torch.allclose(values, expected, atol=1e-3) == (times == 1)
    values, _ = statistics(fixed)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_uses_the_statistics():
    plain, fixed = make_model(), make_model()
    update_statistics_once(fixed)
    train(plain)
    train(fixed)
    images = torch.randn(2, 3, 32, 32)
    before, _ = statistics(fixed)
    with torch.no_grad():
        features = [model.eval()["visual"](images) for model in (plain, fixed)]
    assert torch.equal(*features)
    assert torch.equal(statistics(fixed)[0], before)
