"""Measure the time, the peak memory and the FLOPs of the distillation loss.

    python scripts/benchmarks/loss.py [--size 256x8192] [--threads 1]
    python scripts/benchmarks/loss.py --flops

The first command runs forward and backward of dr/loss.py and of the paper's formula without chunks,
alternately in one process, and prints medians. Rows are the local batch, columns the global batch.
`matrix products` runs only the products that both need. Memory is the peak of a step in a fresh
process, gradients included, features not. Time is the process's CPU time with one thread, and wall
time with several threads or on a GPU.

The second command prints the loss's share of a training step's FLOPs, for the 12M and the 1B
recipe. It loads no weights.

The gathering of features over processes is not measured.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import in_fresh_process, median_seconds, print_header, process_memory
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
import dr.loss
from dr.loss import ChunkedLosses, DRClipLoss

WIDTH = 512  # of the student's features
TEACHERS = [768, 768]  # widths
TEACHER_SCALE = 100.0
RECIPES = {"12M": (256, 8192), "1B": (512, 65536)}  # local and global batch

Size = tuple[int, int]
Step = Callable[[], tuple[Tensor, list[Tensor]]]


def formula(
    students: list[tuple[Tensor, Tensor]],
    teachers: list[tuple[Tensor, Tensor]],
    scale: Tensor,
    weights: tuple[float, float],
) -> Tensor:
    """Compute the sum of both losses as the paper writes them, without chunks."""
    contrastive = distill = torch.zeros_like(scale)
    labels = torch.arange(len(students[0][0]), device=scale.device)
    for one, other in ((0, 1), (1, 0), (0, 2), (2, 0)):
        logits = scale * students[one][0] @ students[other][1].T
        contrastive = contrastive + F.cross_entropy(logits, labels) / 2
        blocks = zip(
            teachers[one][0].split(TEACHERS, 1), teachers[other][1].split(TEACHERS, 1), strict=True
        )
        target = sum((TEACHER_SCALE * a @ b.T).softmax(dim=1) for a, b in blocks) / len(TEACHERS)
        distill = distill - (target * logits.log_softmax(dim=1)).sum(dim=1).mean() / 2
    return weights[0] * contrastive + weights[1] * distill


def make_steps(size: Size, weights: tuple[float, float], device: str, seed: int) -> dict[str, Step]:
    """Return functions that run forward and backward; each returns the loss and the gradients."""
    local_batch, global_batch = size
    generator = torch.Generator(device).manual_seed(seed)

    def features(widths: list[int]) -> Tensor:
        shape = (global_batch, sum(widths))
        blocks = torch.randn(shape, generator=generator, device=device).split(widths, dim=1)
        return torch.cat([F.normalize(block, dim=1) for block in blocks], dim=1)

    students = []
    teachers = []
    for _ in ("image", "original caption", "synthetic caption"):
        columns = features([WIDTH])
        rows = columns[:local_batch].clone()
        students.append((rows.requires_grad_(), columns.requires_grad_()))
        columns = features(TEACHERS)
        teachers.append((columns[:local_batch].clone(), columns))
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    inputs = [scale, *(tensor for pair in students for tensor in pair)]
    loss = DRClipLoss(
        local_loss=True,
        teacher_dimension=TEACHERS,
        distill_loss_weights=weights,
        average_after_softmax=True,
        dist_logit_scale=TEACHER_SCALE,
    )
    compute = partial(loss.losses_and_gradients, teachers)  # without the gathering

    def step(loss_function: Callable[[], Tensor]) -> Step:
        def run() -> tuple[Tensor, list[Tensor]]:
            loss = loss_function()
            gradients = torch.autograd.grad(loss, inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            return loss.detach(), list(gradients)

        return run

    @torch.no_grad()
    def products() -> tuple[Tensor, list[Tensor]]:
        for one, other in ((0, 1), (1, 0), (0, 2), (2, 0)):
            for a, b in zip(
                teachers[one][0].split(TEACHERS, 1),
                teachers[other][1].split(TEACHERS, 1),
                strict=True,
            ):
                a @ b.T
            rows, columns = students[one][0], students[other][1]
            logits = rows @ columns.T
            logits @ columns, logits.T @ rows
        if device == "cuda":
            torch.cuda.synchronize()
        return torch.zeros(()), []

    return {
        "formula": step(lambda: formula(students, teachers, scale, weights)),
        "dr/loss.py": step(lambda: ChunkedLosses.apply(compute, weights, *inputs).sum()),
        "matrix products": products,
    }


def peak_memory(
    name: str, size: Size, weights: tuple[float, float], device: str, args: argparse.Namespace
) -> float:
    """Return the peak MB of a step beyond what the features take. Run it in a fresh process."""
    configure(args)
    make_steps((64, 128), weights, device, args.seed)[name]()  # loads the libraries
    run = make_steps(size, weights, device, args.seed)[name]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not be used again unnoticed
    before_mb = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return process_memory("VmHWM") - before_mb


def configure(args: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # as OpenCLIP's trainer
    torch.set_num_threads(args.threads)
    if args.chunk_rows:
        dr.loss.CHUNK_ROWS = {"cpu": args.chunk_rows, "cuda": args.chunk_rows}


def measure(args: argparse.Namespace) -> None:
    configure(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cpu_time = device == "cpu" and args.threads == 1
    print("| local × global | w₀ w₁ | variant | ms | ratio | MB | ratio | loss | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.size or [(256, 8192), (512, 16384)]:
        for weights in ((0.0, 1.0), (0.25, 0.75)):
            steps = make_steps(size, weights, device, args.seed)
            expected, expected_gradients = steps["formula"]()
            loss, gradients = steps["dr/loss.py"]()
            error = 0.0
            for a, b in zip(expected_gradients, gradients, strict=True):
                error = max(error, float((a - b).abs().max() / a.abs().max()))
            del expected_gradients, gradients
            clock = time.process_time if cpu_time else time.perf_counter
            seconds = median_seconds(steps, args.runs, clock)
            memory = {
                name: in_fresh_process(peak_memory, name, size, weights, device, args)
                for name in ("formula", "dr/loss.py")
            }
            results = {
                "formula": f"{float(expected):.5f} | ",
                "dr/loss.py": f"{float(loss):.5f} | {error:.0e}",
            }
            for name, took in seconds.items():
                cells = [f"{size[0]} × {size[1]}", f"{weights[0]} {weights[1]}", name]
                cells += [f"{1000 * took:,.1f}", f"{took / seconds['formula']:.2f}"]
                if name in memory:
                    ratio = memory[name] / max(memory["formula"], 0.1)
                    cells += [f"{memory[name]:,.0f}", f"{ratio:.2f}", results[name]]
                print(f"| {' | '.join(cells)} |", flush=True)


def print_flops(args: argparse.Namespace) -> None:
    """Print the share of the loss's matrix products in the FLOPs of a step per process."""
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    from dr.weights import register_model

    model = open_clip.create_model(register_model(args.model), output_dict=True).to("meta")
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.empty(1, 3, height, width, device="meta")
    texts = torch.zeros(2, model.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        output = model(images, texts)
        (output["image_features"].sum() + output["text_features"].sum()).backward()
    sample = counter.get_total_flops()
    print(f"{args.model}: {sample / 1e9:.1f} GFLOP a sample (1 image, 2 captions), both passes\n")
    print("| recipe | local × global | model, TFLOP | loss, TFLOP | share |\n|---|---|---|---|---|")
    for recipe, (local_batch, global_batch) in RECIPES.items():
        # 4 directions; each has the teachers' products, the student's, and its 2 gradients
        loss = 4 * 2 * local_batch * global_batch * (sum(TEACHERS) + 3 * WIDTH)
        step = local_batch * sample
        cells = [recipe, f"{local_batch} × {global_batch}", f"{step / 1e12:.1f}"]
        cells += [f"{loss / 1e12:.3f}", f"{100 * loss / (loss + step):.2f} %"]
        print(f"| {' | '.join(cells)} |")


def local_and_global(text: str) -> Size:
    local_batch, global_batch = text.split("x")
    return int(local_batch), int(global_batch)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        type=local_and_global,
        action="append",
        metavar="LOCALxGLOBAL",
        help="local and global batch size; can be repeated; default 256x8192 and 512x16384",
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="runs of each variant; default %(default)s"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="random seed; default %(default)s")
    parser.add_argument("--chunk-rows", type=int, help="rows of a chunk; default: dr/loss.py's")
    parser.add_argument("--flops", action="store_true", help="print the share of a step's FLOPs")
    parser.add_argument(
        "--model",
        default="ViT-B-16",
        help="for --flops: name or config file of an OpenCLIP model; default %(default)s",
    )
    args = parser.parse_args(arguments)
    print_header(args, torch)
    if args.flops:
        print_flops(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
