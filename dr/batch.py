"""What the training step does with a reinforced batch.

OpenCLIP's step stays as it is: it encodes ``images`` and ``texts`` and hands what the model returned to the loss. Here
the texts of a reinforced batch become one batch of 2B, originals first, and what the model made of them is split again
and joined with the teachers' features. On a plain batch each function returns what it was given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .transforms import to_normalized


def unpack_batch(
    batch: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Split a batch into what the model encodes and what only the loss sees.

    Args:
        batch: ``(images [B, 3, H, W], texts [B, L])``, or the reinforced batch of ``data.training_stages`` with
            C = 1 or 2 captions for each image.
        device: where a reinforced batch's images and teacher features are moved.

    Returns:
        images, texts (reinforced: ``[C·B, L]``, all first captions, then all second ones), and the teacher features by
        argument of ``DRClipLoss.forward``, each ``[B, ΣD_k]``; empty for a plain batch.
    """
    if len(batch) == 2:
        images, texts = batch
        return images, texts, {}
    images, texts, image_emb, text_emb, statistics = batch
    images = to_normalized(images.to(device=device, non_blocking=True), statistics)
    names = ("dist_text_features", "dist_syn_text_features")
    teacher = {
        "dist_image_features": image_emb,
        **dict(zip(names, text_emb.unbind(1), strict=False)),
    }
    teacher = {
        name: features.to(device=device, non_blocking=True) for name, features in teacher.items()
    }
    return images, texts.transpose(0, 1).flatten(0, 1), teacher


def add_teacher(model_out: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss's arguments from the model's output and the teacher features of the same batch."""
    if "dist_syn_text_features" in teacher:
        text, synthetic = model_out["text_features"].chunk(2)
        model_out = {**model_out, "text_features": text, "syn_text_features": synthetic}
    return {**model_out, **teacher}


def share_of_gradient(logit_scale: Tensor, teacher: dict[str, Tensor], parts: int) -> Tensor:
    """The same logit scale with 1/parts of its gradient, for reinforced training.

    With gradient accumulation OpenCLIP goes back through the loss of the whole accumulated batch once for each of its
    parts. Features get their gradient from their own part only; the logit scale would get all of it each time.
    """
    return (
        logit_scale.detach() + (logit_scale - logit_scale.detach()) / parts
        if teacher
        else logit_scale
    )
