"""Teachers: OpenCLIP models that embed augmented images and captions, named by a config."""

import logging
import os
from pathlib import Path
from typing import Any

import open_clip
import torch
from torchvision.transforms import functional as F

from dr import checkpoint
from dr.params import register_model
from dr.transforms import Compose, compose_from_config


class Teacher:
    """An OpenCLIP model that embeds images and captions, each to unit length.

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
        model_name = register_model(name)
        if os.path.isfile(pretrained):
            logging.disable(logging.WARNING)  # "no pretrained weights": they are loaded below
            model = open_clip.create_model(model_name, device=device)
            logging.disable(logging.NOTSET)
            state = checkpoint.load(pretrained, map_location="cpu")
            state = state.get("state_dict", state)
            model.load_state_dict({key.removeprefix("module."): state[key] for key in state})
        else:
            model = open_clip.create_model(model_name, pretrained=pretrained, device=device)
        self.model, self.tokenizer = model.eval(), open_clip.get_tokenizer(model_name)
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

    def check_crop(self, compose: Compose, where: Path) -> None:
        """Exit with a line if the augmentation of config ``where`` gives images of another size."""
        crop = compose.transforms["random_resized_crop"].size
        if set(crop) != {self.size if isinstance(self.size, int) else self.size[0]}:
            raise SystemExit(
                f"error: {where}: the crop is {crop} pixels, but teacher {self.name} takes "
                f"{self.size}"
            )


def named_teachers(config: dict[str, Any], where: Path) -> list[tuple[str, str]]:
    """Model name (or model config file) and weights of each teacher of a reinforcement config."""
    names, weights = config["model_name"].split(","), config["pretrained"].split(",")
    if len(names) != len(weights):
        raise SystemExit(
            f"error: {where}: model_name has {len(names)} entries and pretrained {len(weights)}; "
            "expected as many of each"
        )
    return list(zip(names, weights, strict=True))


def teacher_dimensions(config: dict[str, Any], where: Path) -> list[int]:
    """Widths D_k of a reinforcement config's teachers, as OpenCLIP's model configs have them."""
    try:
        models = [register_model(name) for name, _ in named_teachers(config, where)]
        return [open_clip.get_model_config(model)["embed_dim"] for model in models]
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        raise SystemExit(
            f"--config {where}: its model_name names no models that OpenCLIP knows; "
            "give --teacher-dimension"
        ) from None


def compose_without_normalization(config: dict[str, Any]) -> Compose:
    """The augmentation of a reinforcement config without normalize: each teacher has its own."""
    steps = config["reinforce"]["image_augmentation"]
    return compose_from_config({name: steps[name] for name in steps if name != "normalize"})
