"""Model names and released weights: configs of newer OpenCLIP releases, safetensors, preprocessing.

Images must be preprocessed as those that the weights were trained with: with the same normalisation
statistics (mean and standard deviation), and the same interpolation when they are resized. OpenCLIP
knows these of its tags; this module finds those of weight files.
"""

import contextlib
import json
import os
import re
from argparse import Namespace
from importlib import metadata
from typing import Any, NamedTuple

import open_clip
import open_clip.factory
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import load_file

MIN_VERSION = "3.2"  # of open_clip_torch, whose wheel has the configs of the MobileCLIP2 models
PACKAGE = "open_clip_torch"


def register_model(name: str) -> str:
    """Register a model config with OpenCLIP.

    Args:
        name: the name of a model of the patched tree, the name of a MobileCLIP model of the
            installed open_clip_torch, which may be newer than the tree, or the path of a model
            config ``FILE.json``.

    Returns:
        The model's name: ``FILE`` for ``FILE.json``; other names as they are.

    Raises:
        FileNotFoundError: there is no such file, or no such MobileCLIP model.
    """
    if name.endswith(".json"):
        if not os.path.isfile(name):
            raise FileNotFoundError(f"there is no model config file {name}")
        open_clip.add_model_config(name)
        return os.path.splitext(os.path.basename(name))[0]
    if open_clip.get_model_config(name) is None and name.startswith("MobileCLIP"):
        path, version = f"open_clip/model_configs/{name}.json", "not installed"
        try:
            package = metadata.distribution(PACKAGE)
            path, version = str(package.locate_file(path)), package.version
        except metadata.PackageNotFoundError:
            pass
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"OpenCLIP has no model {name}; {PACKAGE} {MIN_VERSION} and newer have the "
                f"MobileCLIP2 models, found {version}: pip install -U {PACKAGE}, or give a model "
                "config FILE.json"
            )
        open_clip.add_model_config(path)
    return name


# --- weights --------------------------------------------------------------------------------------
_load_state_dict = open_clip.factory.load_state_dict


def load_weights(checkpoint_path: str, *args: Any, **kwargs: Any) -> dict:
    """OpenCLIP's ``load_state_dict``, which at the pinned commit takes no safetensors."""
    if str(checkpoint_path).endswith(".safetensors"):
        return load_file(checkpoint_path)
    return _load_state_dict(checkpoint_path, *args, **kwargs)


open_clip.factory.load_state_dict = load_weights  # wherever OpenCLIP loads a checkpoint file


class Preprocessing(NamedTuple):
    """How images are preprocessed.

    Attributes:
        mean, std: mean and standard deviation of the three channels, for the normalisation.
        interpolation: interpolation of the resize.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __str__(self) -> str:
        return f"mean {list(self.mean)}, std {list(self.std)}, {self.interpolation}"


ZERO_ONE = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
OPENAI = Preprocessing(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic")
# Names of released files, such as mobileclip_s1.pt and mobileclip2_b.pt.
RELEASED = (
    (re.compile(r"mobileclip2[-_](s3|s4|l[-_]?14)\b"), OPENAI),
    (re.compile(r"mobileclip2?[-_](s0|s1|s2|b|blt|b[-_]lt)\b"), ZERO_ONE),
)


def read_hub_preprocessing(weights: str) -> dict[str, Any]:
    """``preprocess_cfg`` of the ``open_clip_config.json`` in the same folder; empty without it."""
    try:
        path = os.path.join(os.path.dirname(os.path.abspath(weights)), "open_clip_config.json")
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file)["preprocess_cfg"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def find_preprocessing(weights: str) -> Preprocessing | None:
    """Find the preprocessing of a weight file; None if it is not known.

    It is read from an ``open_clip_config.json`` in the same folder, as in the Hub's OpenCLIP
    format, or from the name of a released MobileCLIP file or folder.
    """
    folder, name = os.path.split(os.path.abspath(weights))
    found = read_hub_preprocessing(weights)
    with contextlib.suppress(KeyError, TypeError):
        interpolation = found.get("interpolation", OPENAI.interpolation)
        return Preprocessing(tuple(found["mean"]), tuple(found["std"]), interpolation)
    for text in (name, os.path.basename(folder)):
        stem = text.lower().removesuffix(".pt").removesuffix(".safetensors")
        for pattern, preprocessing in RELEASED:
            if pattern.match(stem.removesuffix("-openclip")):
                return preprocessing
    return None


def follow_weights(args: Namespace) -> str | None:
    """Set the preprocessing options that the weights of ``--pretrained`` need.

    Returns:
        An error message if the options ask for another preprocessing; None: there is no error.
    """
    if args.ignore_pretrained_statistics or not args.pretrained:
        return None
    if not os.path.isfile(args.pretrained):
        # OpenCLIP follows its tags, except that its training transform is always bicubic.
        tag = get_pretrained_cfg(args.model, args.pretrained) or {}
        args.image_interpolation = args.image_interpolation or tag.get("interpolation")
        return None
    preprocessing = find_preprocessing(args.pretrained)
    if preprocessing is None:
        return None
    wrong = []
    for option in Preprocessing._fields:
        name = f"image_{option}"
        value, needed = getattr(args, name), getattr(preprocessing, option)
        given = tuple(value) if isinstance(value, list) else value
        if given is None:
            setattr(args, name, list(needed) if isinstance(needed, tuple) else needed)
        elif given != needed:
            wrong.append(f"--image-{option} {value}")
    if wrong:
        return (
            f"--pretrained {args.pretrained} needs {preprocessing}, but {', '.join(wrong)} "
            "was given: remove it, or add --ignore-pretrained-statistics"
        )
    return None
