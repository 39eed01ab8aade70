"""Teachers: OpenCLIP models that embed augmented images and captions, named by a config."""

import open_clip
import torch
from torchvision.transforms import functional as F

from dr.weights import register_model

from .config import ReinforcementConfig
from .models import ModelError, load_model


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
            loaded = load_model(name, pretrained, device)
        except ModelError as error:
            raise SystemExit(
                f"error: the teacher {name} {pretrained} can't be loaded: {error}"
            ) from None
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        preprocess = loaded.preprocessing
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
