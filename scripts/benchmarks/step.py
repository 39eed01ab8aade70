"""Measure a reinforced training step against a CLIP step that encodes the same two captions.

    python scripts/benchmarks/step.py [--model ViT-B-16 --batch 256]

Both steps run forward, backward and the optimizer on one device, a GPU if there is one. Batches are
in memory: the loader is not measured, and neither are several GPUs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from measure import median_seconds, print_header
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
from dr.batch import Batch, add_teacher, unpack_batch
from dr.loss import DRClipLoss
from dr.weights import register_model

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEACHERS = 768, 768  # widths
BASELINE = "baseline, 2 captions"


def make_steps(args: argparse.Namespace, device: str) -> dict[str, Callable[[], None]]:
    """Functions that run one step of ``args.model`` each."""
    generator = torch.Generator().manual_seed(args.seed)
    model = open_clip.create_model(register_model(args.model), device=device, output_dict=True)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler(device, enabled=args.precision == "amp" and device == "cuda")

    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randint(256, (args.batch, size, size, 3), generator=generator, dtype=torch.uint8)
    texts = torch.randint(1, 49000, (args.batch, 2, model.context_length), generator=generator)
    stored = F.normalize(torch.randn(args.batch, 3, sum(TEACHERS), generator=generator), dim=2)
    normalized = (pixels.permute(0, 3, 1, 2).contiguous().float() / 255 - 0.45) / 0.27
    statistics = torch.tensor([MEAN, STD])
    if device == "cuda":
        pixels, texts, stored = pixels.pin_memory(), texts.pin_memory(), stored.pin_memory()
        normalized = normalized.pin_memory()
    batch = Batch(pixels, texts, [], stored[:, 0], stored[:, 1:], statistics)
    distill = DRClipLoss(
        teacher_dimension=TEACHERS,
        distill_loss_weights=args.weights,
        average_after_softmax=True,
        dist_logit_scale=100.0,
    )
    contrastive = open_clip.ClipLoss()

    def reinforced() -> Tensor:
        images, captions, teacher = unpack_batch(batch, torch.device(device))
        return sum(distill(**add_teacher(model(images, captions), teacher)))

    def plain() -> Tensor:
        images = normalized.to(device, non_blocking=True)
        captions = texts.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        out = model(images, captions)
        original, synthetic = out["text_features"].chunk(2)
        return sum(
            contrastive(out["image_features"], text, out["logit_scale"])
            for text in (original, synthetic)
        )

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            kind = torch.bfloat16 if args.precision == "amp_bf16" else torch.float16
            with torch.autocast(device, kind, enabled=args.precision != "fp32"):
                value = loss()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return {BASELINE: step(plain), "reinforced": step(reinforced)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="ViT-B-16",
        help="OpenCLIP model name or model config file; default %(default)s",
    )
    parser.add_argument("--batch", type=int, default=256, help="batch size; default %(default)s")
    parser.add_argument(
        "--precision",
        choices=["amp_bf16", "amp", "fp32"],
        default="amp_bf16",
        help="precision; default %(default)s",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs=2,
        metavar=("W0", "W1"),
        default=[0.25, 0.75],
        help="weights of the contrastive and the distillation loss; default 0.25 0.75",
    )
    parser.add_argument(
        "--grad-checkpointing", action="store_true", help="use gradient checkpointing"
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="runs of each step; default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default %(default)s")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # as OpenCLIP's trainer
    print_header(args, torch)
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    print(f"{args.model}, batch {args.batch}, {args.precision} on {name}\n")
    print("| step | ms | samples/s | ratio |\n|---|---|---|---|")
    seconds = median_seconds(make_steps(args, device), args.runs)
    for step, took in seconds.items():
        ratio = took / seconds[BASELINE]
        print(f"| {step} | {1000 * took:,.1f} | {args.batch / took:,.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
