"""Teachers: OpenCLIP models that embed augmented images and captions, named by a config."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import open_clip
import safetensors.torch
import torch
from torchvision.transforms import functional as F

from dr import checkpoint
from dr.weights import register_model

from .config import ReinforcementConfig
from .report import printable


class Teacher:
    """An OpenCLIP model that embeds images and captions, each to unit length.

    Raises SystemExit if there is no such model, or its weights cannot be loaded.

    Args:
        name: OpenCLIP model name, or a model config file.
        pretrained: OpenCLIP tag, or a checkpoint file.
        device: where it runs.
        precision: ``fp32``, or ``bf16`` for autocast.

    Attributes:
        size: of the images that it takes, in pixels: a number, or height and width.
    """

    def __init__(self, name: str, pretrained: str, device: torch.device, precision: str) -> None:
        self.name, self.pretrained = name, pretrained
        self.device, self.autocast = device, precision == "bf16"
        try:
            model_name, model = _create_model(name, pretrained, device)
            self.tokenizer = open_clip.get_tokenizer(model_name)
        except Exception as error:  # of any kind: OpenCLIP's, the Hub's, or torch's
            line = printable(str(error).strip().partition("\n")[0], 600)
            kind = "" if isinstance(error, _LoadError) else f"{type(error).__name__}: "
            raise SystemExit(
                f"error: the teacher {name} {pretrained} can't be loaded: {kind}{line}"
            ) from None
        self.model: Any = model.eval()
        preprocess = model.visual.preprocess_cfg
        self.mean, self.std = list(preprocess["mean"]), list(preprocess["std"])
        self.size: int | tuple[int, int] = preprocess["size"]

    @torch.inference_mode()
    def embed(self, images: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed images and captions.

        Args:
            images: ``[N, 3, H, W]``, values 0 to 1.
            captions: C of them.

        Returns:
            float32 ``[N, D]`` and ``[C, D]``, on the CPU.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            normalized = F.normalize(images.to(self.device), self.mean, self.std)
            image_emb = self.model.encode_image(normalized, normalize=True)
            tokens = self.tokenizer(captions).to(self.device)
            text_emb = self.model.encode_text(tokens, normalize=True)
        return image_emb.float().cpu(), text_emb.float().cpu()

    def measure_dimension(self) -> int:
        """The width D of its embeddings."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.embed(torch.zeros(1, 3, height, width), [""])[0].shape[1]

    def check_crop(self, config: ReinforcementConfig) -> None:
        """Exit with a line if the augmentation gives something else than this teacher takes."""
        for step in ("random_resized_crop", "to_tensor"):
            if step not in config.compose.transforms:
                raise SystemExit(
                    f"error: --config {config.path}: the teachers need a {step} in the augmentation"
                )
        crop = config.compose.transforms["random_resized_crop"].size
        if set(crop) != {self.size if isinstance(self.size, int) else self.size[0]}:
            raise SystemExit(
                f"error: {config.path}: the crop is {crop} pixels, but teacher {self.name} takes "
                f"{self.size}"
            )


class _LoadError(Exception):
    """Why a teacher cannot be loaded, in a line for people."""


def _create_model(name: str, pretrained: str, device: torch.device) -> tuple[str, Any]:
    """A model and its name in OpenCLIP's registry."""
    try:
        model_name = register_model(name)
    except ValueError as error:  # of JSON
        raise _LoadError(f"{name} is no model config: {error}") from error
    if name.endswith(".json") and open_clip.get_model_config(model_name) is None:
        raise _LoadError(
            f"{name} is no model config: expected an object with embed_dim, vision_cfg and text_cfg"
        )
    if not os.path.isfile(pretrained):
        return model_name, open_clip.create_model(model_name, pretrained=pretrained, device=device)
    logging.disable(logging.WARNING)  # "no pretrained weights": they are loaded below
    try:
        model = open_clip.create_model(model_name, device=device)
    finally:
        logging.disable(logging.NOTSET)
    load_weights(model, pretrained, name)
    return model_name, model


def load_weights(model: torch.nn.Module, path: str, name: str) -> None:
    """Load weights from a file: a checkpoint of the trainer, a bare state, or safetensors.

    Args:
        model: whose weights they are.
        path: of the file.
        name: of the model, for messages.

    Raises:
        _LoadError: the file holds no weights, or those of another model.
    """
    try:
        if path.endswith(".safetensors"):
            state: Any = safetensors.torch.load_file(path, device="cpu")
        else:
            state = checkpoint.load(path, map_location="cpu")
    except Exception as error:  # torch raises anything on a broken file
        line = str(error).strip().partition("\n")[0]
        raise _LoadError(f"{path} is no checkpoint: {type(error).__name__}: {line}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not (
        isinstance(state, Mapping)
        and state
        and all(isinstance(key, str) for key in state)
        and all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise _LoadError(
            f"{path} is no checkpoint: expected weights by name, or such an object as state_dict"
        )
    state, expected = checkpoint.match_names(state, model), model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    faults = [
        f"{kind} {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        for kind, found in (("lacks", missing), ("has an unexpected", unexpected), ("its", shapes))
        if found
    ]
    if faults:
        found = "; ".join(faults)
        raise _LoadError(f"{path} is a checkpoint of another model than {name}: {found}")
    model.load_state_dict(state)


def teacher_dimensions(config: ReinforcementConfig) -> list[int]:
    """Widths D_k of a reinforcement config's teachers, as OpenCLIP's model configs have them."""
    widths = []
    try:
        for name, _ in config.teachers:
            # one after the other: two files may have one name
            widths.append(open_clip.get_model_config(register_model(name))["embed_dim"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        widths = []
    if not widths:
        raise SystemExit(
            f"--config {config.path}: its model_name names no models that OpenCLIP knows; "
            "give --teacher-dimension"
        ) from None
    return widths
