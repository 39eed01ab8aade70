"""Locking towers, and gradient checkpointing that works with it."""

import logging
import re
from functools import partial
from typing import Any

import open_clip
import timm
import torch.utils.checkpoint

from .checkpoint import PREFIX


def lock_text_tower(model: Any, unlocked_layers: int, freeze_layer_norm: bool) -> None:
    """Freeze the text tower, OpenCLIP's own or a Hugging Face one.

    Args:
        model: OpenCLIP's model. Its own method covers Hugging Face towers only.
        unlocked_layers: this many of the last layers stay trainable, and what comes after them.
            0: the whole tower is frozen.
        freeze_layer_norm: also freeze the layer norms of frozen layers.
    """
    text = getattr(model, "text", model)
    if hasattr(text, "lock"):
        model.lock_text_tower(unlocked_layers, freeze_layer_norm)
        return
    names = ("token_embedding", "positional_embedding", "cls_emb")
    embeddings = [getattr(text, name, None) for name in names]
    layers = [*text.transformer.resblocks]
    after = [text.ln_final, text.text_projection]
    frozen = (
        [embeddings, *layers][:-unlocked_layers]
        if unlocked_layers
        else [embeddings, *layers, after]
    )
    for part in frozen:
        for module in part if isinstance(part, list) else [part]:
            if isinstance(module, torch.nn.Parameter):
                module.requires_grad = False
            elif isinstance(module, torch.nn.Module):
                _freeze(module, freeze_layer_norm)


def _freeze(module: torch.nn.Module, freeze_layer_norm: bool) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm) and not freeze_layer_norm:
            continue
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad = False


def set_grad_checkpointing(args: Any, model: Any) -> None:
    """Enable gradient checkpointing, so that the unlocked part of a locked tower trains, too.

    Reentrant checkpointing, which OpenCLIP uses, yields no gradients where the input of a segment
    needs none, as behind the locked layers of a tower.
    """
    if args.lock_image or args.lock_text:
        checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        for module in (open_clip.transformer, timm.models._manipulate):
            setattr(module, "checkpoint", checkpoint)  # noqa: B010
        logging.info("A tower is locked, so gradient checkpointing is not reentrant")
    model.set_grad_checkpointing()


def parameters_without_gradient(model: torch.nn.Module) -> list[str]:
    """Parameters, or whole blocks of a tower, that ask for a gradient and have none.

    ``visual.transformer.resblocks.3`` stands for all parameters of that block.
    """
    has_gradient: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = re.match(r".*?\.\d+(?=\.)", name)
            group = (block[0] if block else name).removeprefix(PREFIX)
            has_gradient[group] = has_gradient.get(group, False) or parameter.grad is not None
    return [group for group, found in has_gradient.items() if not found]
