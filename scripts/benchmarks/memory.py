"""Estimate which batch of a model fits on a GPU, on any machine.

    python scripts/benchmarks/memory.py [--models ViT-B-16 MobileCLIP-S1 …]

For each model the script counts the parameters, and the bytes that autograd keeps for the backward
pass of a step with two captions per image and bfloat16 autocast. The step runs on fake tensors,
which have a size and no content. The memory of a GPU is then 18 bytes per parameter (the weight,
its gradient, two moments of AdamW, all in float32, and a bfloat16 copy for autocast), plus the
kept bytes per image times the batch size. One tenth of the GPU is left for buffers, fragmentation
and the loss. The result is an estimate, not a measurement on a GPU.
"""

import argparse
import sys
import weakref
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
from dr.weights import register_model

BYTES_PER_PARAMETER = 18
USABLE = 0.9  # of the GPU's memory
IMAGES = 4  # a multiple of what any layer needs, few enough for a laptop
GPUS = (24, 80)  # GB
MODELS = [
    "ViT-B-16",
    *(f"MobileCLIP-{size}" for size in ("S1", "S2", "B")),
    *(f"MobileCLIP2-{size}" for size in ("S0", "S2", "B", "S3", "S4", "L-14")),
]


class Saved:
    """Counts the bytes that autograd keeps for the backward pass, now and at most."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters  # kept, so that no other storage takes their addresses
        self.uses = {p.untyped_storage()._cdata: 1 for p in parameters}
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Packed":
        storage = tensor.untyped_storage()
        pointer, size = storage._cdata, storage.nbytes()
        if pointer not in self.uses:
            self.uses[pointer] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.uses[pointer] += 1
        packed = Packed(tensor)
        weakref.finalize(packed, self._release, pointer, size)
        return packed

    def _release(self, pointer: int, size: int) -> None:
        self.uses[pointer] -= 1
        if self.uses[pointer] == 0:
            del self.uses[pointer]
            self.now -= size


class Packed:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def measure(name: str, checkpointing: bool) -> tuple[int, float]:
    """Parameters of a model, and bytes per image that a step keeps at its peak."""
    model = open_clip.create_model(register_model(name), output_dict=True).train()
    if checkpointing:
        model.set_grad_checkpointing()
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = torch.randn(IMAGES, 3, height, width)
        texts = torch.randint(1, 49000, (2 * IMAGES, model.context_length))
        saved = Saved([mode.from_tensor(parameter) for parameter in model.parameters()])
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed.tensor):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(images, texts)
                loss = out["image_features"].sum() + out["text_features"].sum()
            loss.backward()
    return sum(p.numel() for p in model.parameters()), saved.most / IMAGES


def largest_batch(gigabytes: float, parameters: int, per_image: float) -> int:
    """The largest power of two that fits; 0 if the model alone does not."""
    free = USABLE * gigabytes * 1e9 - BYTES_PER_PARAMETER * parameters
    return 0 if free < per_image else 2 ** int(free // per_image).bit_length() // 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="default: %(default)s")
    args = parser.parse_args()
    print("Estimates. MB per image: without and with gradient checkpointing. Batch: the largest")
    print("power of two on one GPU, without and with checkpointing.\n")
    titles = [f"batch on {gigabytes} GB" for gigabytes in GPUS]
    print(
        f"{'model':16} {'parameters':>12} {'MB per image':>14} "
        + " ".join(f"{t:>16}" for t in titles)
    )
    for name in args.models:
        found = [measure(name, checkpointing) for checkpointing in (False, True)]
        parameters = found[0][0]
        each = [per_image for _, per_image in found]
        batches = [
            " / ".join(f"{largest_batch(gigabytes, parameters, size):,}" for size in each)
            for gigabytes in GPUS
        ]
        megabytes = " / ".join(f"{size / 1e6:.0f}" for size in each)
        print(
            f"{name:16} {parameters / 1e6:10.1f} M {megabytes:>14} "
            + " ".join(f"{text:>16}" for text in batches)
        )


if __name__ == "__main__":
    main()
