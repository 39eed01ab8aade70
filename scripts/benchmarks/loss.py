"""Measure the distillation loss: forward and backward, time and peak memory.

    python scripts/benchmarks/loss.py [--size 1024x8192]

Compares dr/loss.py with the formula as it stands in the paper, terms of weight 0 included, on a
local and a global batch. On the CPU the larger sizes are a quarter, and time is that of one thread.
`matrix products` are those that both need, and nothing else. Memory is the peak over what the
features take, gradients included.
"""

import argparse
import ctypes
import sys
import time
from pathlib import Path

import torch
from measure import in_fresh_process, median_seconds, print_header, process_memory
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
from dr.loss import DRClipLoss

TEACHERS = 768, 768  # widths


class GivenColumns(DRClipLoss):
    """The loss of one of several processes; the gathered features are given."""

    def _rows_and_columns(self, features):
        return features, self.columns[features.data_ptr()]


def formula(students, teachers, scale, weights):
    """The paper's formula, with ``{name: (rows, columns)}`` of image, text and syn."""
    contrastive = distill = 0.0
    labels = torch.arange(len(students["image"][0]), device=scale.device)
    for text in ("text", "syn"):
        for one, other in (("image", text), (text, "image")):
            logits = scale * students[one][0] @ students[other][1].T
            target = sum(
                (100 * a @ b.T).softmax(dim=1)
                for a, b in zip(
                    teachers[one][0].split(TEACHERS, 1),
                    teachers[other][1].split(TEACHERS, 1),
                    strict=True,
                )
            ) / len(TEACHERS)
            contrastive = contrastive + F.cross_entropy(logits, labels) / 2
            distill = distill - (target * logits.log_softmax(dim=1)).sum(dim=1).mean() / 2
    return weights[0] * contrastive + weights[1] * distill


def loss_variants(size, weights, device, seed):
    """``{name: function that goes forward and backward and returns (loss, gradients)}``."""
    generator, (local, whole) = torch.Generator(device).manual_seed(seed), size

    def features(widths):
        parts = [torch.randn(whole, width, generator=generator, device=device) for width in widths]
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    columns = {name: features([512]).requires_grad_() for name in ("image", "text", "syn")}
    students = {
        name: (c[:local].detach().clone().requires_grad_(), c) for name, c in columns.items()
    }
    teachers = {name: (c[:local].clone(), c) for name in columns for c in [features(TEACHERS)]}
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    wanted = [scale, *(tensor for pair in students.values() for tensor in pair)]
    recipe = GivenColumns(
        True, True, False, 0, whole // local, False, TEACHERS, weights, True, 100.0
    )
    recipe.columns = {
        rows.data_ptr(): c for pairs in (students, teachers) for rows, c in pairs.values()
    }

    def ours():
        names = ("image", "text", "syn")
        student, teacher = ([pairs[name][0] for name in names] for pairs in (students, teachers))
        return sum(recipe(*student[:2], scale, *teacher[:2], student[2], teacher[2]))

    def step(loss):
        def run():
            value = loss()
            gradients = torch.autograd.grad(value, wanted)
            value = value.detach()
            if device == "cuda":
                torch.cuda.synchronize()
            return value, gradients

        return run

    @torch.no_grad()
    def products():
        for text in ("text", "syn"):
            for one, other in (("image", text), (text, "image")):
                for rows, whole in [
                    (students[one][0], students[other][1]),
                    *zip(
                        teachers[one][0].split(TEACHERS, 1),
                        teachers[other][1].split(TEACHERS, 1),
                        strict=True,
                    ),
                ]:
                    logits = rows @ whole.T
                logits @ students[other][1], logits.T @ students[one][0]
        return torch.zeros(()), []

    return {
        "formula": step(lambda: formula(students, teachers, scale, weights)),
        "recipe": step(ours),
        "matrix products": products,
    }


def loss_memory(name, size, weights, device, seed):
    """MB, the peak of a step over what the features take."""
    loss_variants((64, 128), weights, device, seed)[
        name
    ]()  # libraries come into memory at their first use
    run = loss_variants(size, weights, device, seed)[name]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to count
    before = process_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    run()
    return process_memory("VmHWM") - before


def loss(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # as OpenCLIP's trainer
    torch.set_num_threads(1)
    part = 1 if device == "cuda" else 4
    sizes = args.size or [(256, 8192), (1024, 8192 // part), (512, 65536 // part)]
    print("| local × global | w₀ w₁ | variant | ms | ratio | MB | ratio | loss | off by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in sizes:
        for weights in ((0.0, 1.0), (0.25, 0.75)):
            variants = loss_variants(size, weights, device, args.seed)
            (loss, expected), (ours, gradients) = variants["formula"](), variants["recipe"]()
            pairs = zip(expected, gradients, strict=True)
            off = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
            del pairs, expected, gradients
            told = {"formula": f"{float(loss):.5f} | ", "recipe": f"{float(ours):.5f} | {off:.0e}"}
            seconds = median_seconds(
                variants, args.runs, time.perf_counter if device == "cuda" else time.process_time
            )
            memory = {
                name: in_fresh_process(loss_memory, name, size, weights, device, args.seed)
                for name in told
            }
            for name, took in seconds.items():
                cells = [f"{1000 * took:,.1f}", f"{took / seconds['formula']:.2f}"]
                if name in told:
                    cells += [
                        f"{memory[name]:,.0f}",
                        f"{memory[name] / max(memory['formula'], 0.1):.2f}",
                        told[name],
                    ]
                first = [f"{size[0]} × {size[1]}", f"{weights[0]} {weights[1]}", name]
                print(f"| {' | '.join(first + cells)} |", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pair = lambda text: tuple(int(number) for number in text.split("x"))  # noqa: E731
    parser.add_argument(
        "--size",
        type=pair,
        action="append",
        metavar="LOCALxGLOBAL",
        help="may be given several times",
    )
    parser.add_argument("--runs", type=int, default=5, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args(arguments)
    print_header(args, torch)
    loss(args)


if __name__ == "__main__":
    main()
