"""OpenCLIP models by name and weights, with the preprocessing of the weights."""

import ast
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import safetensors.torch
import torch
from open_clip.pretrained import get_pretrained_cfg
from PIL.Image import Image
from torch import Tensor

from dr import checkpoint
from dr.sample import MAX_PIXELS, BadSample
from dr.weights import find_preprocessing, read_hub_preprocessing, register_model

from .config import HUB
from .report import describe_error, printable

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class ModelError(Exception):
    """Why a model cannot be made or loaded, in a line for people."""


class LoadedModel(NamedTuple):
    """An OpenCLIP model with its weights, ready for inference.

    Attributes:
        name: in OpenCLIP's registry.
        model: in evaluation mode. ``model.visual.preprocess_cfg`` is its preprocessing.
        tokenizer: of its captions.
        changes: fields of the model's config that the run which wrote the weights had changed.
    """

    name: str
    model: Any
    tokenizer: Any
    changes: dict[str, Any]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """``size``, ``mean``, ``std``, ``interpolation`` and further fields."""
        return self.model.visual.preprocess_cfg

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        size = self.preprocessing["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def make_transform(self) -> Callable[[Image], Tensor]:
        """OpenCLIP's transform for inference: from a PIL image to ``[3, H, W]``.

        It raises BadSample for an image so narrow that resizing it would take too much memory.
        """
        given = {name: self.preprocessing[name] for name in PREPROCESSING}
        transform = open_clip.image_transform(self.size, is_train=False, **given)
        if given["resize_mode"] != "shortest":
            return transform
        return functools.partial(_transform_bounded, transform, max(self.size))

    def make_config(self) -> dict[str, Any]:
        """The content of ``open_clip_config.json`` in the Hub's OpenCLIP layout."""
        config = {**deepcopy(open_clip.get_model_config(self.name)), **self.changes}
        vision = config["vision_cfg"]
        vision["image_size"] = self.size[0] if len(set(self.size)) == 1 else list(self.size)
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False  # else OpenCLIP would download timm's weights
        given = {name: self.preprocessing[name] for name in PREPROCESSING}
        return {"model_cfg": config, "preprocess_cfg": given}

    def hash_config(self) -> str:
        """A hash of :meth:`make_config`."""
        return hashlib.sha256(json.dumps(self.make_config(), sort_keys=True).encode()).hexdigest()


def _transform_bounded(transform: Callable[[Image], Tensor], size: int, img: Image) -> Tensor:
    shorter, longer = sorted(img.size)
    if size * size * longer > MAX_PIXELS * shorter:
        found = f"{img.width}x{img.height}: with a shorter side of {size} it is too large"
        raise BadSample("oversized image", found)
    return transform(img)


def load_model(name: str, pretrained: str, device: torch.device) -> LoadedModel:
    """Make a model, and load its weights.

    A weight file's preprocessing is the one that :func:`dr.weights.find_preprocessing` knows, or
    that of the run that wrote the checkpoint, or else the model's default.

    Args:
        name: OpenCLIP model name, a model config file, or ``hf-hub:ORGANISATION/REPOSITORY``.
        pretrained: OpenCLIP tag, or a checkpoint file; empty for a name on the Hub.
        device: where the model runs.

    Raises:
        ModelError: there is no such model, or its weights cannot be loaded.
    """
    part = ""
    try:
        model_name, model, changes = _create_model(name, pretrained, device)
        part = "its tokenizer: "
        length = changes.get("text_cfg", {}).get("context_length")
        tokenizer = open_clip.get_tokenizer(model_name, context_length=length)
        return LoadedModel(model_name, model.eval(), tokenizer, changes)
    except ModelError:
        raise
    except Exception as error:  # of any kind: OpenCLIP's, the Hub's, or torch's
        raise ModelError(f"{part}{printable(describe_error(error), 600)}") from error


def load_model_or_exit(role: str, name: str, pretrained: str, device: torch.device) -> LoadedModel:
    """As :func:`load_model`, but with SystemExit, whose message calls the model by its role."""
    try:
        return load_model(name, pretrained, device)
    except ModelError as error:
        named = f"{name} {pretrained}".strip()
        raise SystemExit(f"error: the {role} {named} can't be loaded: {error}") from None


def _create_model(
    name: str, pretrained: str, device: torch.device
) -> tuple[str, Any, dict[str, Any]]:
    """A model's name in OpenCLIP's registry, the model, and ``LoadedModel.changes``."""
    if name.startswith(HUB):  # config and weights are one
        if pretrained:
            raise ModelError(f"{name} has its own weights: give OpenCLIP's model name instead")
        return name, open_clip.create_model(name, device=device, require_pretrained=True), {}
    if not pretrained:
        raise ModelError("no weights: give an OpenCLIP tag or a checkpoint file")
    try:
        model_name = register_model(name)
    except ValueError as error:  # of JSON
        raise ModelError(f"{name} is no model config: {error}") from error
    if open_clip.get_model_config(model_name) is None:
        if name.endswith(".json"):
            raise ModelError(
                f"{name} is no model config: expected an object with embed_dim, vision_cfg and "
                "text_cfg"
            )
        if os.path.isfile(pretrained):
            raise ModelError(f"OpenCLIP has no model {name}: give its name, or a config FILE.json")
    if not os.path.isfile(pretrained):
        # OpenCLIP 3 only warns where a tag's weights need another activation than the config has.
        quick = bool((get_pretrained_cfg(model_name, pretrained) or {}).get("quick_gelu"))
        changes = {"quick_gelu": True} if quick else {}
        model = open_clip.create_model(
            model_name, pretrained=pretrained, device=device, force_quick_gelu=quick
        )
        return model_name, model, changes
    params = read_params(find_run(pretrained) / "params.txt")
    changes = _find_changes(params, open_clip.get_model_config(model_name))
    fields = dict(changes)
    logging.disable(logging.WARNING)  # "no pretrained weights": they are loaded below
    try:
        model = open_clip.create_model(
            model_name,
            device=device,
            force_custom_text=fields.pop("custom_text", False),
            force_image_size=params.get("force_image_size"),
            force_preprocess_cfg=_find_preprocessing(pretrained, params),
            **fields,
        )
    finally:
        logging.disable(logging.NOTSET)
    load_weights(model, pretrained, name)
    return model_name, model, changes


def _find_changes(params: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's config that a run's options change, but for the image size."""
    changes: dict[str, Any] = {}
    length = params.get("force_context_length")
    # Before that option, in 3.0, OpenCLIP gave OpenAI's weights the activation that they need.
    was_openai = params.get("pretrained") == "openai" and "force_context_length" not in params
    if params.get("force_quick_gelu") or was_openai:
        changes["quick_gelu"] = True
    if params.get("force_custom_text"):
        changes["custom_text"] = True
    if params.get("siglip"):
        changes["init_logit_bias"] = -10
    if length:
        changes["text_cfg"] = {**config["text_cfg"], "context_length": length}
    return changes


def _find_preprocessing(weights: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of a weight file, as far as it differs from the model's default."""
    known = find_preprocessing(weights)
    if known is not None:
        mode = read_hub_preprocessing(weights).get("resize_mode")
        return known._asdict() | ({"resize_mode": mode} if mode else {})
    model, start = params.get("model"), params.get("pretrained")
    of_start = get_pretrained_cfg(model, start) if model and start else {}
    of_run = {name: params.get(f"image_{name}") for name in PREPROCESSING}
    found = {name: of_run[name] or of_start.get(name) for name in PREPROCESSING}
    return {name: value for name, value in found.items() if value}


# --- the run that wrote a checkpoint --------------------------------------------------------------
def find_run(path: str | os.PathLike) -> Path:
    """The folder of the run that wrote a checkpoint to ``<run>/checkpoints/``; else the file's."""
    folder = Path(path).resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def read_params(path: Path) -> dict[str, Any]:
    """The trainer's settings, from its params.txt; empty if there is no such file."""
    params: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(": ")
        try:
            params[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            params[name] = value
    return params


# --- weights --------------------------------------------------------------------------------------
def load_weights(model: torch.nn.Module, path: str, name: str) -> None:
    """Load weights from a file: a checkpoint of the trainer, a bare state, or safetensors.

    Args:
        model: whose weights they are.
        path: of the file.
        name: of the model, for messages.

    Raises:
        ModelError: the file holds no weights, or those of another model.
    """
    try:
        if path.endswith(".safetensors"):
            state: Any = safetensors.torch.load_file(path, device="cpu")
        else:
            state = checkpoint.load(path, map_location="cpu")
    except Exception as error:  # torch raises anything on a broken file
        line = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path} is no checkpoint: {type(error).__name__}: {line}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not (
        isinstance(state, Mapping)
        and state
        and all(isinstance(key, str) for key in state)
        and all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise ModelError(
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
        trained = read_params(find_run(path) / "params.txt").get("model")
        other = f" ({trained}, by its run's params.txt)" if trained else ""
        raise ModelError(
            f"{path} is a checkpoint of another model{other} than {name}: {'; '.join(faults)}"
        )
    model.load_state_dict(state)
