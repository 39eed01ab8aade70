"""Teachers: OpenCLIP models that embed augmented images and captions, named by a config."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from torch.nn.functional import normalize

from dr.transforms import Compose, to_normalized
from dr.weights import register_model

from .config import ReinforcementConfig
from .models import load_model_or_exit

MAX_COSINE_DISTANCE = 1e-3  # of an embedding in two batches of different size


class Teacher:
    """An OpenCLIP model that embeds images and captions, each to unit length.

    Raises SystemExit if there is no such model, or its weights or its tokenizer cannot be loaded.

    Args:
        name: OpenCLIP model name, a model config file, or ``hf-hub:ORGANISATION/REPOSITORY``.
        pretrained: OpenCLIP tag, or a checkpoint file; of no use for a name on the Hub.
        device: where it runs.
        precision: ``fp32``, ``bf16`` for autocast, or ``pure_bf16`` for weights in bfloat16.

    Attributes:
        size: height and width of the images that it takes, in pixels.
        preprocessing: of its images: ``mean``, ``std``, ``interpolation`` and further fields.
        logit_scale: that it has learned.
        logit_bias: likewise, of a teacher with a sigmoid loss (SigLIP); None: it has none.
    """

    def __init__(self, name: str, pretrained: str, device: torch.device, precision: str) -> None:
        self.name, self.pretrained = name, pretrained
        self.device, self.autocast = device, precision == "bf16"
        loaded = load_model_or_exit("teacher", name, pretrained, device)
        self.tokenizer, self.size = loaded.tokenizer, loaded.size
        self.preprocessing = loaded.preprocessing
        self.statistics = torch.tensor([list(self.preprocessing[n]) for n in ("mean", "std")])
        self.logit_scale = float(loaded.model.logit_scale.detach().exp())
        bias = getattr(loaded.model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach())
        self.dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
        self.model = loaded.model.to(self.dtype)

    @torch.inference_mode()
    def embed(
        self, images: torch.Tensor, captions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed images and captions.

        Args:
            images: uint8 ``[N, H, W, 3]``, or float32 ``[N, 3, H, W]``, values 0 to 1.
            captions: C of them.

        Returns:
            float32 ``[N, D]`` and ``[C, D]``, on the CPU.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            normalized = to_normalized(self._to_floats(images), self.statistics).to(self.dtype)
            tokens = self.tokenizer(list(captions)).to(self.device)
            image_emb = self.model.encode_image(normalized, normalize=False)
            text_emb = self.model.encode_text(tokens, normalize=False)
        # In float32: bfloat16 would give lengths of 0.995 to 1.005.
        return normalize(image_emb.float()).cpu(), normalize(text_emb.float()).cpu()

    def _to_floats(self, images: torch.Tensor) -> torch.Tensor:
        """Images as float32 ``[N, 3, H, W]`` on the device, with torchvision's bits."""
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2).contiguous().float()
            # By a tensor: GPUs multiply by the reciprocal of a number, which rounds differently.
            images = images / torch.tensor(255.0, device=self.device)
        return images

    def measure_dimension(self) -> int:
        """The width D of its embeddings."""
        return self.embed(torch.zeros(1, 3, *self.size), [""])[0].shape[1]

    def check_batch(
        self, images: torch.Tensor, captions: Sequence[str], *embedded: torch.Tensor
    ) -> None:
        """Exit with a line if the first image or caption of a batch has another embedding alone.

        Args:
            images, captions: as in :meth:`embed`.
            embedded: what it returned for them.
        """
        alone = self.embed(images[:1], captions[:1])
        for kind, one, batch in zip(("image", "caption"), alone, embedded, strict=True):
            cosine = float(one[0] @ batch[0])
            if not cosine >= 1 - MAX_COSINE_DISTANCE:
                raise SystemExit(
                    f"error: the teacher {self.name} {self.pretrained} embeds one {kind} to two "
                    f"embeddings, alone and in a batch of {len(batch)}: their cosine is "
                    f"{cosine:.4f}, expected {1 - MAX_COSINE_DISTANCE} or more; does the model "
                    "mix the samples of a batch, or does --precision not suit it?"
                )

    def describe(self) -> dict[str, Any]:
        """What a reader of the embeddings may need to know, for JSON."""
        return {
            "model_name": self.name,
            "pretrained": self.pretrained,
            "input_size": list(self.size),
            **{name: self.preprocessing[name] for name in ("mean", "std", "interpolation")},
            "context_length": getattr(self.tokenizer, "context_length", None),
            "dimension": self.measure_dimension(),
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
        }


def adapt_crops(
    config: ReinforcementConfig, teachers: Sequence[Teacher]
) -> tuple[Compose, list[Compose]]:
    """The augmentation as each teacher sees it, up to what :func:`to_bytes` takes.

    The augmentation is sampled at the config's crop size. Teachers with another input size or
    interpolation get it applied again at theirs, as students do in training. If all teachers take
    the config's crop size, with one interpolation, the config's own interpolation applies.

    Returns:
        the config's own, and one for each teacher; the same object for the same images.

    Raises:
        SystemExit: the augmentation has no crop, or no teacher takes images of its size.
    """
    for step in ("random_resized_crop", "to_tensor"):
        if step not in config.compose.transforms:
            raise SystemExit(
                f"error: --config {config.path}: the teachers need a {step} in the augmentation"
            )
    own = _end_with_bytes(config.without_normalization())
    crop = own.transforms["random_resized_crop"]
    wanted = [(teacher.size, teacher.preprocessing["interpolation"]) for teacher in teachers]
    sizes = sorted({size for size, _ in wanted})
    if teachers and crop.size not in sizes:
        takes = [f"{teacher.name} takes {list(teacher.size)}" for teacher in teachers]
        raise SystemExit(
            f"error: {config.path}: the crop is {list(crop.size)} pixels, but teacher "
            f"{', teacher '.join(takes)}: expected the input size of one of them"
        )
    if len(set(wanted)) == 1:
        return own, [own] * len(teachers)
    composes = {(crop.size, crop.interpolation): own}
    for size, interpolation in wanted:
        if (size, interpolation) not in composes:
            compose = config.without_normalization(size=list(size), interpolation=interpolation)
            composes[size, interpolation] = _end_with_bytes(compose)
    return own, [composes[key] for key in wanted]


def _end_with_bytes(compose: Compose) -> Compose:
    """The steps up to a PIL image, which takes a quarter of a tensor's memory; up to the tensor if
    a part is erased."""
    if "random_erase" in compose.transforms:
        return compose
    return Compose({n: step for n, step in compose.transforms.items() if n != "to_tensor"})


def to_bytes(image: Any) -> torch.Tensor:
    """A PIL image as uint8 ``[H, W, 3]``; a tensor as it is."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))


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
