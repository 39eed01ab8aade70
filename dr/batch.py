"""A batch, and how the training step splits it between the model and the loss.

OpenCLIP's step encodes ``images`` and ``texts`` and hands the model's output to the loss. The texts
of a reinforced batch become one batch of 2B, originals first; the model's text features are split
again and joined with the teachers' features. A batch without reinforcement passes through
unchanged.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .transforms import to_normalized


class Batch(NamedTuple):
    """B samples; C is the number of captions for each image, 1 or 2.

    Attributes:
        images: uint8 ``[B, H, W, 3]``, or float32 ``[B, 3, H, W]``.
        texts: int64 ``[B, C, L]``; ``[B, L]`` from OpenCLIP's own stages.
        uids: keys of the samples.
        image_emb: teachers' image embeddings, float32 ``[B, ΣD_k]``; None: not reinforced.
        text_emb: teachers' text embeddings, float32 ``[B, C, ΣD_k]``.
        statistics: normalisation statistics of ``images``: mean and standard deviation ``[2, 3]``.
    """

    images: Tensor
    texts: Tensor
    uids: list[str]
    image_emb: Tensor | None = None
    text_emb: Tensor | None = None
    statistics: Tensor | None = None


def unpack_batch(
    batch: Batch | Sequence[Tensor], device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Split a batch into the model's inputs and the teacher features for the loss.

    Args:
        batch: a :class:`Batch`, or ``(images, texts [B, L])`` of OpenCLIP's other loaders.
        device: where images to normalise and teacher features are moved.

    Returns:
        images, texts (``[C·B, L]``: all first captions, then all second ones), and the teacher
        features by argument of ``DRClipLoss.forward``, each ``[B, ΣD_k]``; empty without
        reinforcement.
    """
    if not isinstance(batch, Batch):
        images, texts = batch
        return images, texts, {}
    images, texts = batch.images, batch.texts
    if texts.dim() == 3:
        texts = texts.transpose(0, 1).flatten(0, 1)
    if batch.image_emb is None or batch.text_emb is None or batch.statistics is None:
        return images, texts, {}
    images = to_normalized(images.to(device=device, non_blocking=True), batch.statistics)
    teacher = {"dist_image_features": batch.image_emb}
    names = ("dist_text_features", "dist_syn_text_features")
    teacher |= dict(zip(names, batch.text_emb.unbind(1), strict=False))
    teacher = {name: rows.to(device=device, non_blocking=True) for name, rows in teacher.items()}
    return images, texts, teacher


def add_teacher(model_out: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of the loss: the model's output and the batch's teacher features."""
    if "dist_syn_text_features" in teacher:
        text, synthetic = model_out["text_features"].chunk(2)
        model_out = {**model_out, "text_features": text, "syn_text_features": synthetic}
    return {**model_out, **teacher}


def share_of_gradient(logit_scale: Tensor, teacher: dict[str, Tensor], parts: int) -> Tensor:
    """The same logit scale with 1/parts of its gradient, for reinforced training.

    With gradient accumulation OpenCLIP differentiates the loss of the whole accumulated batch once
    for each of its parts. Features get gradients from their own part only, but the logit scale
    would get its whole gradient each time.
    """
    if not teacher:
        return logit_scale
    return logit_scale.detach() + (logit_scale - logit_scale.detach()) / parts
