"""The loss equals the known answers, and is the same on one process and on several."""

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dr.loss import DRClipLoss

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "data" / "loss.json").read_text())
FEATURES = {name: torch.tensor(rows) for name, rows in GOLDEN["features"].items()}


def close(actual, expected, rtol=1e-5):
    """Relative to the largest entry: a gradient's smallest entries are sums that cancel."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("chunk_rows", [4, 10**6])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(list(case.values())[:3]))
def test_known_answers_are_met(monkeypatch, case, chunk_rows):
    monkeypatch.setattr("dr.loss.CHUNK_ROWS", {"cpu": chunk_rows})
    student = {name: FEATURES[name].clone().requires_grad_() for name in ("image", "text", "syn")}
    logit_scale = torch.tensor(GOLDEN["logit_scale"], requires_grad=True)
    loss = DRClipLoss(
        teacher_dimension=GOLDEN["teacher_dimension"],
        distill_loss_weights=case["distill_loss_weights"],
        average_after_softmax=case["average_after_softmax"],
        dist_logit_scale=GOLDEN["dist_logit_scale"],
    )
    synthetic = (student["syn"], FEATURES["dist_syn"]) if case["synthetic"] else (None, None)
    losses = loss(
        student["image"],
        student["text"],
        logit_scale,
        FEATURES["dist_image"],
        FEATURES["dist_text"],
        *synthetic,
        output_dict=True,
    )
    for name in ("contrastive_loss", "distill_loss"):
        close(losses[name], case[name])
    sum(losses.values()).backward()
    for name, tensor in {**student, "logit_scale": logit_scale}.items():
        if case[f"grad_{name}"] is None:
            assert tensor.grad is None
        else:
            close(
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad,
                case[f"grad_{name}"],
            )


def batch(size=6):
    return [
        FEATURES[name][:size]
        for name in ("image", "text", "dist_image", "dist_text", "syn", "dist_syn")
    ]


def call(loss, image, text, dist_image, dist_text, syn, dist_syn, scale=14.0):
    return loss(image, text, torch.tensor(scale), dist_image, dist_text, syn, dist_syn)


def test_a_scale_for_each_teacher_is_used_for_its_own_block():
    dims = GOLDEN["teacher_dimension"]
    image, text, dist_image, dist_text, _, _ = batch()
    for after in (True, False):
        loss = DRClipLoss(
            teacher_dimension=dims, dist_logit_scale=[50.0, 20.0], average_after_softmax=after,
            distill_loss_weights=[0.0, 1.0],
        )  # fmt: skip
        _, actual = call(loss, image, text, dist_image, dist_text, None, None)
        a, b = ([f.split(dims, dim=1) for f in (dist_image, dist_text)][i] for i in (0, 1))
        logits = [scale * x @ y.T for scale, x, y in zip([50.0, 20.0], a, b, strict=True)]
        expected = 0
        for student, teachers in (
            (image @ text.T, logits),
            (text @ image.T, [side.T for side in logits]),
        ):
            p = sum(t.softmax(1) for t in teachers) / 2 if after else sum(teachers).softmax(1)
            expected += -(p * (14.0 * student).log_softmax(1)).sum(1).mean() / 2
        close(actual, expected)


def test_one_teacher_needs_no_dimension():
    args = batch()
    one = DRClipLoss(dist_logit_scale=100.0)
    same = DRClipLoss(dist_logit_scale=100.0, teacher_dimension=[args[2].shape[1]])
    assert call(one, *args) == call(same, *args)


def test_a_term_without_weight_is_zero_and_teachers_get_no_gradient():
    args = [features.clone().requires_grad_() for features in batch()]
    contrastive, distill = call(
        DRClipLoss(distill_loss_weights=[0.0, 1.0], dist_logit_scale=9.0), *args
    )
    assert contrastive == 0
    distill.backward()
    assert args[2].grad is None and args[3].grad is None and args[5].grad is None
    assert (
        call(DRClipLoss(distill_loss_weights=[1.0, 0.0]), *args)[1] == 0
    )  # and needs no teacher scale


def test_contrastive_half_is_that_of_openclip():
    image, text, dist_image, dist_text, _, _ = batch()
    ours = DRClipLoss(distill_loss_weights=[1.0, 0.0])(
        image, text, torch.tensor(14.0), dist_image, dist_text
    )[0]
    close(ours, open_clip.ClipLoss()(image, text, torch.tensor(14.0)))


def test_the_loss_is_computed_in_float32_under_autocast():
    loss = DRClipLoss(teacher_dimension=GOLDEN["teacher_dimension"], dist_logit_scale=100.0)
    expected = call(loss, *batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = call(loss, *batch())
    assert actual == expected and actual[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"teacher_dimension": [8, 16], "dist_logit_scale": 100.0},
            "8 \\+ 16 = 24.*--distill-teacher-dimension.* 18 wide",
        ),
        ({}, "no teacher scale"),
    ],
)
def test_contradicting_settings_are_refused_at_the_first_batch(kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(DRClipLoss(**kwargs), *batch())


def test_settings_that_can_never_run_are_refused_at_once():
    with pytest.raises(ValueError, match="3 values, teacher_dimension 2"):
        DRClipLoss(teacher_dimension=[8, 8], dist_logit_scale=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="horovod"):
        DRClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="go together"):
        DRClipLoss(dist_logit_scale=1.0)(
            *batch()[:2], torch.tensor(1.0), *batch()[2:4], syn_text_features=batch()[4]
        )


# --- several processes ---
@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_loss_and_its_gradients_are_the_same_on_several_processes(processes, tmp_path):
    """Runs torchrun over gloo; tests/distributed_loss.py holds the checks of each rank."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(ROOT / "tests" / "distributed_loss.py")],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all settings agree") == processes


def test_labels_may_be_cached_while_the_batch_size_changes():
    loss = DRClipLoss(distill_loss_weights=[1.0, 0.0], cache_labels=True)
    for size in (6, 4, 6):
        image, text = batch(size)[:2]
        expected = F.cross_entropy(14.0 * image @ text.T, torch.arange(size)) / 2
        expected += F.cross_entropy(14.0 * text @ image.T, torch.arange(size)) / 2
        close(loss(image, text, torch.tensor(14.0), image, text)[0], expected)


# --- gradients without a matrix of local × global batch ---
def formula(
    image,
    text,
    dist_image,
    dist_text,
    syn,
    dist_syn,
    weights,
    scale,
    dims=GOLDEN["teacher_dimension"],
):
    """(contrastive, distill) as in the paper, with average after softmax, for autograd."""
    labels = torch.arange(len(image))
    contrastive = distill = 0.0
    for student, teacher in ((text, dist_text), (syn, dist_syn)):
        for a, b, ta, tb in (
            (image, student, dist_image, teacher),
            (student, image, teacher, dist_image),
        ):
            logits = scale * a @ b.T
            teachers = zip(ta.split(dims, 1), tb.split(dims, 1), strict=True)
            target = sum((30.0 * x @ y.T).softmax(1) for x, y in teachers) / len(dims)
            contrastive = contrastive + F.cross_entropy(logits, labels) / 2
            distill = distill - (target * logits.log_softmax(1)).sum(1).mean() / 2
    return weights[0] * contrastive, weights[1] * distill


def students_and_scale():
    image, text, dist_image, dist_text, syn, dist_syn = (
        features.double().float() for features in batch()
    )
    leaves = [
        image.requires_grad_(),
        text.requires_grad_(),
        syn.requires_grad_(),
        torch.tensor(14.0, requires_grad=True),
    ]
    return leaves, (image, text, dist_image, dist_text, syn, dist_syn)


@pytest.mark.parametrize("chunk_rows", [1, 4, 10**6])
@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(
    "outer", [(1.0, 1.0), (65536.0, 65536.0), (2.0, 3.0), (1.0, 0.0), (0.0, 1.0)]
)
def test_gradients_are_the_formulas_whatever_the_chunk_and_the_gradient_of_each_loss(
    monkeypatch, chunk_rows, weights, outer
):
    monkeypatch.setattr("dr.loss.CHUNK_ROWS", {"cpu": chunk_rows})
    leaves, args = students_and_scale()
    expected = formula(*args, weights, leaves[-1])
    gradients = torch.autograd.grad(outer[0] * expected[0] + outer[1] * expected[1], leaves)
    loss = DRClipLoss(
        teacher_dimension=GOLDEN["teacher_dimension"],
        distill_loss_weights=weights,
        average_after_softmax=True,
        dist_logit_scale=30.0,
    )
    actual = call_with(loss, args, leaves[-1])
    total = outer[0] * actual[0] + outer[1] * actual[1]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for again in (first, torch.autograd.grad(total, leaves)):
        for ours, theirs in zip((*actual, *again), (*expected, *gradients), strict=True):
            close(ours, theirs.detach() if theirs.requires_grad else theirs)


@pytest.mark.parametrize("teachers", [1, 3])
def test_one_and_three_teachers_in_chunks_of_two_rows_and_one(monkeypatch, teachers):
    leaves, args = students_and_scale()
    total = args[2].shape[1]
    dims = [total] if teachers == 1 else [2, 3, total - 5]
    args = tuple(features[:5] for features in args)
    expected = sum(formula(*args, (0.25, 0.75), leaves[-1], dims))
    monkeypatch.setattr("dr.loss.CHUNK_ROWS", {"cpu": 2})
    loss = DRClipLoss(
        teacher_dimension=dims,
        distill_loss_weights=(0.25, 0.75),
        average_after_softmax=True,
        dist_logit_scale=30.0,
    )
    actual = sum(call_with(loss, args, leaves[-1]))
    close(actual, expected.detach())
    for ours, theirs in zip(
        *(torch.autograd.grad(value, leaves) for value in (actual, expected)), strict=True
    ):
        close(ours, theirs)


def test_gradients_computed_again_under_autocast_are_float32_ones():
    gradients = []
    for autocast in (False, True):
        leaves, args = students_and_scale()
        loss = DRClipLoss(teacher_dimension=GOLDEN["teacher_dimension"], dist_logit_scale=30.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            contrastive, distill = call_with(loss, args, leaves[-1])
            gradients.append(torch.autograd.grad(2 * contrastive + 3 * distill, leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_the_same_when_saved_tensors_are_packed_by_hooks():
    gradients = []
    for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        leaves, args = students_and_scale()
        loss = DRClipLoss(teacher_dimension=GOLDEN["teacher_dimension"], dist_logit_scale=30.0)
        with context:
            total = sum(call_with(loss, args, leaves[-1]))
        gradients.append(torch.autograd.grad(total, leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0


def test_a_locked_tower_gets_no_gradient_and_changes_no_other():
    loss = DRClipLoss(teacher_dimension=GOLDEN["teacher_dimension"], dist_logit_scale=30.0)
    leaves, args = students_and_scale()
    expected = torch.autograd.grad(sum(call_with(loss, args, leaves[-1])), leaves)
    leaves, args = students_and_scale()
    leaves[0].requires_grad_(False)
    sum(call_with(loss, args, leaves[-1])).backward()
    assert leaves[0].grad is None
    for leaf, gradient in zip(leaves[1:], expected[1:], strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_a_second_derivative_is_refused():
    leaves, args = students_and_scale()
    loss = DRClipLoss(teacher_dimension=GOLDEN["teacher_dimension"], dist_logit_scale=30.0)
    total = sum(call_with(loss, args, leaves[-1]))
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph=True"):
        torch.autograd.grad(total, leaves, create_graph=True)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made under it and are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.held, self.bytes, self.peak = Counter(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            address, self.bytes[storage.data_ptr()] = storage.data_ptr(), storage.nbytes()
            self.held[address] += 1
            weakref.finalize(tensor, self.release, address)
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        return sum(self.bytes[address] for address, count in self.held.items() if count > 0)

    def release(self, address):
        self.held[address] -= 1


def live_bytes(weights, rows, size, monkeypatch, evaluate=False):
    """Run the loss on ``size`` samples in chunks of ``rows``; return the peak and what is kept."""
    monkeypatch.setattr("dr.loss.CHUNK_ROWS", {"cpu": rows})
    features = [F.normalize(torch.randn(size, 4), dim=1) for _ in range(6)]
    image, text, syn = (f.requires_grad_() for f in features[:3])
    loss = DRClipLoss(
        teacher_dimension=[2, 2],
        distill_loss_weights=weights,
        dist_logit_scale=30.0,
        average_after_softmax=True,
    )
    with LiveBytes() as live, torch.set_grad_enabled(not evaluate):
        losses = loss(image, text, torch.tensor(9.0), *features[3:5], syn, features[5])
        kept = live.now()
        if not evaluate:
            sum(losses).backward()
    return live.peak, kept


@pytest.mark.parametrize(
    ("weights", "matrices"),
    [((0.25, 0.75), 3), ((0.0, 1.0), 3), ((1.0, 0.0), 3)],
)
def test_of_local_times_global_batch_only_chunks_are_in_memory_and_few_of_them(
    monkeypatch, weights, matrices
):
    size, rows = 512, 64
    matrix = 4 * rows * size
    peak, _ = live_bytes(weights, rows, size, monkeypatch)
    assert matrices * matrix < peak < (matrices + 1) * matrix  # features are less than one


def test_an_evaluation_computes_no_gradients(monkeypatch):
    size, rows = 512, 64
    peak, kept = live_bytes((1.0, 0.0), rows, size, monkeypatch, evaluate=True)
    assert peak < 3 * 4 * rows * size  # a backward pass has 3 matrices
    assert kept < 4 * size * 4  # bytes of one gradient


def test_nothing_as_large_as_a_chunk_is_kept_for_the_backward_pass(monkeypatch):
    size, rows = 512, 64
    _, kept = live_bytes((0.25, 0.75), rows, size, monkeypatch)
    gradients = 6 * 4 * size * 4  # of rows and columns of three features, 4 wide
    assert gradients < kept < 4 * rows * size


def call_with(loss, args, scale):
    image, text, dist_image, dist_text, syn, dist_syn = args
    return loss(image, text, scale, dist_image, dist_text, syn, dist_syn)
