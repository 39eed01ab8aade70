"""Read a reinforcement config: how a data set was augmented, and which teachers embedded it.

``lib.teachers`` checks whether the teachers exist.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from dr.transforms import Compose, compose_from_config

from .datasets import DATASETS
from .shards import describe_type

HUB = "hf-hub:"  # OpenCLIP's prefix of models on the Hub, whose repositories hold the weights
DEFAULT_CONFIG = DATASETS["datacompdr12m"].config_path


class ReinforcementConfig(NamedTuple):
    """A config whose fields have the right types.

    Attributes:
        path: of the file, for messages.
        fields: all of it.
        augmentation: its ``image_augmentation``.
        compose: the same, to apply.
        teachers: model name (or model config file) and weights of each, which are empty for a
            model on the Hub; no teachers if it names none.
        augmentations: number for each sample, ``num_samples``.
    """

    path: Path
    fields: dict[str, Any]
    augmentation: dict[str, Any]
    compose: Compose
    teachers: list[tuple[str, str]]
    augmentations: int

    def without_normalization(self, **crop: Any) -> Compose:
        """The augmentation without normalize: each teacher has its own.

        Args:
            crop: arguments of the random resized crop that replace the config's.
        """
        steps = {name: step for name, step in self.augmentation.items() if name != "normalize"}
        if crop:
            steps["random_resized_crop"] = {**steps["random_resized_crop"], **crop}
        return compose_from_config(steps)

    def need(self, *fields: str) -> None:
        """Exit with a line if one of these fields is missing."""
        for name in fields:
            if name not in self.fields:
                raise SystemExit(f"error: --config {self.path}: there is no field {name}")


def read_config(path: Path) -> ReinforcementConfig:
    """Read a reinforcement config, ``configs/datacompdr12m.json`` for example.

    Raises:
        OSError: it cannot be read.
        SystemExit: a field has another type than expected, or augmentation is missing.
    """
    try:
        fields = _expect_object(json.loads(path.read_text(encoding="utf-8-sig")), "the file")
        reinforce = _expect_object(fields.get("reinforce", {}), "reinforce")
        if "image_augmentation" not in reinforce:
            raise ValueError("there is no field reinforce.image_augmentation")
        augmentation = reinforce["image_augmentation"]
        _expect_object(augmentation, "reinforce.image_augmentation")
        compose = compose_from_config(augmentation)
        models, weights = (_split_names(fields, name) for name in ("model_name", "pretrained"))
        if not all(models):
            raise ValueError(f"model_name: {fields['model_name']!r} has an empty name")
        if len(models) != len(weights):
            raise ValueError(
                f"model_name has {len(models)} entries and pretrained {len(weights)}; expected as "
                "many of each"
            )
        for model, weight in zip(models, weights, strict=True):
            if not weight and not model.startswith(HUB):
                raise ValueError(f"pretrained: {fields['pretrained']!r} has an empty name")
        augmentations = fields.get("num_samples", 1)
        if type(augmentations) is not int or augmentations < 1:
            found = repr(augmentations)[:40]
            raise ValueError(f"num_samples: expected a whole number of 1 or more, found {found}")
    except (ValueError, RecursionError) as error:
        raise SystemExit(
            f"error: --config {path} is no reinforcement config: {error}; see "
            f"configs/{DEFAULT_CONFIG.name}"
        ) from None
    teachers = list(zip(models, weights, strict=True))
    return ReinforcementConfig(path, fields, augmentation, compose, teachers, augmentations)


def _expect_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, found {describe_type(value)}")
    return value


def _split_names(fields: dict[str, Any], name: str) -> list[str]:
    """The names of a field, which separates them by commas; empty if there is no such field."""
    if name not in fields:
        return []
    value = fields[name]
    if not isinstance(value, str):
        found = describe_type(value)
        raise ValueError(f"{name}: expected names separated by commas, as text, found {found}")
    return [part.strip() for part in value.split(",")]
