"""What is stored with a reinforced sample, read by means of its config."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dr.sample import (
    PLAIN_MEMBERS,
    REINFORCED_MEMBERS,
    BadSample,
    augmentation_parameters,
    check_members,
    count_originals,
    embeddings,
    has_originals,
    original_captions,
    synthetic_captions,
)
from dr.transforms import Compose

from .config import read_config
from .teachers import teacher_dimensions

STORED = {
    name: REINFORCED_MEMBERS[name] for name in REINFORCED_MEMBERS if name not in PLAIN_MEMBERS
}
NO_CAPTION = "(not in this shard: the join adds the original caption)"
UNIT_TOLERANCE = 0.02  # of an embedding's length; bfloat16 is off by up to 0.004


class Reinforcement(NamedTuple):
    """How a data set was reinforced.

    Attributes:
        compose: the augmentation that the stored parameters are for.
        views: the same without normalisation, to look at.
        teachers: what to call the K teachers.
        widths: of the teachers' blocks in an embedding, D_k.
    """

    compose: Compose
    views: Compose
    teachers: list[str]
    widths: list[int]

    def cosines(self, members: dict[str, bytes]) -> Tensor:
        """Each teacher's similarity of a sample's captions and augmented images.

        Args:
            members: of the sample, by extension.

        Returns:
            ``[K, C + S, A]``, the C original captions first.

        Raises:
            BadSample: reinforcements are missing, or their embeddings are not those of the sample.
            SystemExit: the embeddings have another width: they are of other teachers.
        """
        check_members(members, STORED)
        stored = embeddings(members)
        rows = {
            "image_emb": len(augmentation_parameters(members)),
            "text_emb": count_originals(members) + len(synthetic_captions(members)),
        }
        blocks = []
        for name, expected in rows.items():
            found, width = stored[name].shape
            if found != expected:
                raise BadSample("row counts disagree", f"{name} has {found}, expected {expected}")
            if width != sum(self.widths):
                raise SystemExit(
                    f"error: found {width} numbers in an embedding, but the teachers' widths are "
                    f"{' and '.join(map(str, self.widths))}: give the --config that the set was "
                    "made with, or --teacher-dimension"
                )
            blocks.append(stored[name].float().split(self.widths, dim=1))
        lengths = torch.cat([block.norm(dim=1) for emb in blocks for block in emb])
        if not ((lengths - 1).abs() < UNIT_TOLERANCE).all():
            raise BadSample(
                "embeddings are not of unit length",
                f"blocks of {' and '.join(map(str, self.widths))} numbers have lengths "
                f"{lengths.min():.3f} to {lengths.max():.3f}; --teacher-dimension sets the widths",
            )
        return torch.stack([texts @ images.T for images, texts in zip(*blocks, strict=True)])


def describe_originals(members: dict[str, bytes]) -> list[str]:
    """The original captions, or a remark in the place of a caption that the shard does not have."""
    return original_captions(members) if has_originals(members) else [NO_CAPTION]


def read_reinforcement(path: Path, widths: list[int] | None = None) -> Reinforcement:
    """Read a reinforcement config, ``configs/datacompdr12m.json`` for example.

    Args:
        path: the config.
        widths: of the teachers' blocks; None: those of the models that the config names.

    Raises:
        SystemExit: it is not such a config, or does not fit ``widths``.
    """
    try:
        config = read_config(path)
    except OSError as error:
        raise SystemExit(f"error: --config {path} cannot be used: {error}") from None
    config.need("model_name", "pretrained")
    widths = widths or teacher_dimensions(config)
    if len(widths) != len(config.teachers):
        raise SystemExit(
            f"error: --teacher-dimension has {len(widths)} widths, but {path} names "
            f"{len(config.teachers)} teachers"
        )
    teachers = [
        f"teacher {k}: {Path(name).name.removesuffix('.json')}, {Path(weights).name}"
        for k, (name, weights) in enumerate(config.teachers)
    ]
    return Reinforcement(config.compose, config.without_normalization(), teachers, widths)
