"""Compare the loss on N processes with the loss on one process with the whole batch.

test_loss.py runs this script under torchrun. Each rank holds a part of the batch and a small linear
encoder, whose gradient is averaged over ranks, as DistributedDataParallel does. Each rank prints
"all settings agree", or fails.
"""

import itertools
import os

import torch
import torch.distributed as dist

from dr.loss import DRClipLoss

LOCAL, WIDTH, DIMS = 4, 10, [6, 5]


def unit(*shape, seed):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def losses(weight, scale, rows, loss, inputs, teachers, synthetic):
    """The summed loss of the encoder ``weight`` on some rows of the batch."""
    image, text, syn = (torch.nn.functional.normalize(x[rows] @ weight, dim=-1) for x in inputs)
    dist_image, dist_text, dist_syn = (x[rows] for x in teachers)
    pair = (syn, dist_syn) if synthetic else (None, None)
    return loss(image, text, scale, dist_image, dist_text, *pair)


def run(rank, world_size):
    size = LOCAL * world_size
    inputs = [unit(size, 12, seed=i) for i in range(3)]
    teachers = [
        torch.cat([unit(size, d, seed=10 + 5 * i + d) for d in DIMS], dim=1) for i in range(3)
    ]
    start = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(99))
    options = itertools.product(
        (False, True), (False, True), (False, True), ([0.0, 1.0], [0.25, 0.75], [1.0, 0.0])
    )
    for local_loss, with_grad, synthetic, weights in options:
        settings = {
            "teacher_dimension": DIMS,
            "distill_loss_weights": weights,
            "average_after_softmax": synthetic,
            "dist_logit_scale": 30.0,
        }
        results = []
        whole = DRClipLoss(**settings)
        parts = DRClipLoss(local_loss, with_grad, True, rank, world_size, **settings)
        for loss, rows in ((whole, slice(None)), (parts, slice(rank * LOCAL, (rank + 1) * LOCAL))):
            weight, scale = start.clone().requires_grad_(), torch.tensor(14.0, requires_grad=True)
            both = losses(weight, scale, rows, loss, inputs, teachers, synthetic)
            sum(both).backward()
            results.append([torch.stack(both).detach(), weight.grad, scale.grad])
        for tensor in results[1]:  # mean over ranks
            dist.all_reduce(tensor)
            tensor /= world_size
        names = ("losses", "gradient", "scale gradient")
        for name, expected, actual in zip(names, *results, strict=True):
            if world_size > 1 and not with_grad and name == "gradient":
                expected = own_features_gradient(
                    start, world_size, local_loss, inputs, teachers, settings, synthetic
                )
                if weights == [1.0, 0.0] and not synthetic:
                    theirs = open_clip_gradient(start, rank, world_size, local_loss, inputs)
                    torch.testing.assert_close(theirs, expected, rtol=2e-5, atol=1e-7)
            torch.testing.assert_close(
                actual, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()) + 1e-12
            )
    print("all settings agree")


def own_features_gradient(start, world_size, local_loss, inputs, teachers, settings, synthetic):
    """Compute, on one process, the mean of the ranks' gradients of their own features only."""
    weight = start.clone().requires_grad_()
    (contrastive, distill), total = settings["distill_loss_weights"], 0.0
    for rank in range(world_size):
        own = slice(rank * LOCAL, (rank + 1) * LOCAL)
        features = [torch.nn.functional.normalize(x @ weight, dim=-1) for x in inputs]
        columns = [
            torch.cat([f.detach()[: own.start], f[own], f.detach()[own.stop :]]) for f in features
        ]
        rows, at = columns, slice(None)
        if local_loss:
            rows, columns, at = [f[own] for f in features], [f.detach() for f in features], own
        labels = torch.arange(len(inputs[0]))[at]
        for text in (1, 2) if synthetic else (1,):
            for a, b in ((0, text), (text, 0)):
                log_p = (14.0 * rows[a] @ columns[b].T).log_softmax(dim=1)
                blocks = zip(
                    teachers[a][at].split(DIMS, dim=1), teachers[b].split(DIMS, dim=1), strict=True
                )
                logits = [settings["dist_logit_scale"] * x @ y.T for x, y in blocks]
                after = settings["average_after_softmax"]
                target = (
                    sum(x.softmax(1) for x in logits) / len(DIMS)
                    if after
                    else sum(logits).softmax(1)
                )
                total = total - contrastive * log_p[range(len(labels)), labels].mean() / 2
                total = total - distill * (target * log_p).sum(1).mean() / 2
    (total / world_size).backward()
    return weight.grad


def open_clip_gradient(start, rank, world_size, local_loss, inputs):
    from open_clip.loss import ClipLoss

    weight, rows = start.clone().requires_grad_(), slice(rank * LOCAL, (rank + 1) * LOCAL)
    image, text = (torch.nn.functional.normalize(x[rows] @ weight, dim=-1) for x in inputs[:2])
    ClipLoss(local_loss, False, True, rank, world_size)(image, text, torch.tensor(14.0)).backward()
    dist.all_reduce(weight.grad)
    return weight.grad / world_size


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.destroy_process_group()
