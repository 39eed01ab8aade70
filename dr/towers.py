"""Locking towers, gradient checkpointing that works with it, and BatchNorm statistics."""

import logging
import re
from functools import partial
from typing import Any

import open_clip
import timm
import torch.utils.checkpoint
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint import PREFIX


def lock_text_tower(model: Any, unlocked_layers: int, freeze_layer_norm: bool) -> None:
    """Freeze the text tower, OpenCLIP's own or a Hugging Face one.

    Args:
        model: OpenCLIP's model. At the pinned commit its own method covers Hugging Face towers
            only; that of release 3.3 counts layers differently.
        unlocked_layers: this many of the last layers stay trainable, and what comes after them.
            0: the whole tower is frozen.
        freeze_layer_norm: also freeze the layer norms of frozen layers.
    """
    text = getattr(model, "text", model)
    if not hasattr(text.transformer, "resblocks"):  # of Hugging Face
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


def update_statistics_once(model: Any) -> None:
    """Let the running statistics of BatchNorm layers move once for each micro-batch.

    Gradient checkpointing computes a layer's outputs a second time in the backward pass, and
    OpenCLIP's ``--accum-freq`` computes them once without and once with gradients. Each time, a
    layer in training mode moves its statistics. Here only the pass with gradients moves them: when
    checkpointing computes again, the tower as a whole is not called. In the other passes the
    momentum is 0, which leaves the statistics where they are and the graph as it is.

    Args:
        model: OpenCLIP's model, whose direct children are the towers; or DDP around it.
    """
    for tower in getattr(model, "module", model).children():
        layers = [part for part in tower.modules() if isinstance(part, _BatchNorm)]
        momenta = [(layer, layer.momentum) for layer in layers if layer.momentum]
        if not momenta:
            continue
        _set_momenta(momenta, False)
        tower.register_forward_pre_hook(
            lambda *_, momenta=momenta: _set_momenta(momenta, torch.is_grad_enabled())
        )
        tower.register_forward_hook(lambda *_, momenta=momenta: _set_momenta(momenta, False))


def _set_momenta(momenta: list[tuple[_BatchNorm, float]], enable: bool) -> None:
    for layer, momentum in momenta:
        layer.momentum = momentum if enable else 0.0


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
