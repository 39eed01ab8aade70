"""Reproducible augmentations: sample parameters once, store them, and apply them again exactly.

    compose = compose_from_config(config["reinforce"]["image_augmentation"])
    tensor, params = compose(img)  # sample and apply
    stored = json.dumps(compose.compress(params))
    params = compose.decompress(json.loads(stored))
    tensor, params = compose.reapply(img, params)  # the same tensor, bit for bit

Every operation is torchvision's, on PIL images up to ``to_tensor``. Random numbers come from
torch's global generator in the order in which torchvision uses them, so one seed gives the same
pixels here and there. Not supported: batches, tensors as input, and augmentations whose parameters
do not fit a short list, such as random fill values.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomCrop, RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as F


def _translate(img: Any, x: float, y: float, interpolation: Any, fill: Any) -> Any:
    return F.affine(
        img, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0], interpolation=interpolation, fill=fill
    )


def _shear(img: Any, x: float, y: float, interpolation: Any, fill: Any) -> Any:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(
        img, 0.0, [0, 0], 1.0, degrees, interpolation=interpolation, fill=fill, center=[0, 0]
    )


# RandAugment's operations (Cubuk et al., arXiv 1909.13719) as torchvision defines them; a stored
# ``op`` is an index into this list. Each entry: the name, whether the magnitude has a sign, its
# largest value, and the operation on (img, magnitude, mode, fill). The largest value is None for an
# operation without a magnitude; for translations it is a fraction of the image's side.
_TRANSLATE = 150.0 / 331.0
RAND_AUGMENT_OPS: list[tuple[str, bool, Any, Callable]] = [
    ("Identity", False, None, lambda img, m, mode, fill: img),
    ("ShearX", True, 0.3, lambda img, m, mode, fill: _shear(img, m, 0.0, mode, fill)),
    ("ShearY", True, 0.3, lambda img, m, mode, fill: _shear(img, 0.0, m, mode, fill)),
    ("TranslateX", True, _TRANSLATE, lambda img, m, mode, fill: _translate(img, m, 0, mode, fill)),
    ("TranslateY", True, _TRANSLATE, lambda img, m, mode, fill: _translate(img, 0, m, mode, fill)),
    (
        "Rotate",
        True,
        30.0,
        lambda img, m, mode, fill: F.rotate(img, m, interpolation=mode, fill=fill),
    ),
    ("Brightness", True, 0.9, lambda img, m, mode, fill: F.adjust_brightness(img, 1.0 + m)),
    ("Color", True, 0.9, lambda img, m, mode, fill: F.adjust_saturation(img, 1.0 + m)),
    ("Contrast", True, 0.9, lambda img, m, mode, fill: F.adjust_contrast(img, 1.0 + m)),
    ("Sharpness", True, 0.9, lambda img, m, mode, fill: F.adjust_sharpness(img, 1.0 + m)),
    ("Posterize", False, "bits", lambda img, m, mode, fill: F.posterize(img, int(m))),
    ("Solarize", False, "threshold", lambda img, m, mode, fill: F.solarize(img, m)),
    ("AutoContrast", False, None, lambda img, m, mode, fill: F.autocontrast(img)),
    ("Equalize", False, None, lambda img, m, mode, fill: F.equalize(img)),
]


def _integers(name: str, value: Any, length: int) -> tuple[int, ...]:
    """Check that a stored parameter is a list of ``length`` integers, and return them."""
    if (
        not isinstance(value, Sequence)
        or len(value) != length
        or not all(isinstance(v, (int, float)) and abs(v) < 2**31 and v == int(v) for v in value)
    ):
        raise ValueError(f"{name}: expected {length} integers, found {str(value)[:200]}")
    return tuple(int(v) for v in value)


def _check_box(name: str, img: Image.Image, box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    if (
        min(top, left) < 0
        or min(height, width) < 1
        or top + height > img.height
        or left + width > img.width
    ):
        raise ValueError(
            f"{name}: box {list(box)} (top, left, height, width) is not inside the image of "
            f"{img.height}x{img.width} pixels: these parameters belong to another image, or to one "
            "of another size"
        )


# One class for each transform. Its fields are torchvision's arguments, with torchvision's defaults.
# ``apply`` does the work. A random transform also has ``sample_params(img)``, which returns random
# parameters ready for JSON, and ``parse(stored)``, which checks stored parameters and returns them.
@dataclasses.dataclass
class ToRGB:
    def apply(self, img: Any, param: Any = None) -> Any:
        return img if img.mode == "RGB" else img.convert("RGB")


@dataclasses.dataclass
class Resize:
    size: Any
    interpolation: str = "bilinear"
    max_size: int | None = None
    antialias: bool = True  # PIL always does

    def apply(self, img: Any, param: Any = None) -> Any:
        return F.resize(img, self.size, InterpolationMode(self.interpolation), self.max_size)


@dataclasses.dataclass
class CenterCrop:
    size: Any

    def apply(self, img: Any, param: Any = None) -> Any:
        return F.center_crop(img, self.size)


@dataclasses.dataclass
class RandomCropBox:
    size: Any
    padding: Any = None
    pad_if_needed: bool = False
    fill: Any = 0
    padding_mode: str = "constant"

    def __post_init__(self) -> None:
        self.size = _pair(self.size)

    def _pad(self, img: Any) -> Any:
        if self.padding is not None:
            img = F.pad(img, self.padding, self.fill, self.padding_mode)
        height, width = self.size
        if self.pad_if_needed and img.width < width:
            img = F.pad(img, [width - img.width, 0], self.fill, self.padding_mode)
        if self.pad_if_needed and img.height < height:
            img = F.pad(img, [0, height - img.height], self.fill, self.padding_mode)
        return img

    def sample_params(self, img: Any) -> Any:
        return tuple(RandomCrop.get_params(self._pad(img), self.size)[:2])

    def parse(self, stored: Any) -> Any:
        return _integers("random_crop", stored, 2)

    def apply(self, img: Any, param: Any) -> Any:
        img = self._pad(img)
        _check_box("random_crop", img, (*param, *self.size))
        return F.crop(img, *param, *self.size)


@dataclasses.dataclass
class RandomResizedCropBox:
    size: Any
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3.0 / 4.0, 4.0 / 3.0)
    interpolation: str = "bilinear"
    antialias: bool = True  # PIL always does

    def __post_init__(self) -> None:
        self.size = _pair(self.size)

    def sample_params(self, img: Any) -> Any:
        return tuple(RandomResizedCrop.get_params(img, list(self.scale), list(self.ratio)))

    def parse(self, stored: Any) -> Any:
        return _integers("random_resized_crop", stored, 4)

    def apply(self, img: Any, param: Any, size: Any = None) -> Any:
        _check_box("random_resized_crop", img, param)
        size = self.size if size is None else _pair(size)
        return F.resized_crop(img, *param, list(size), InterpolationMode(self.interpolation))


@dataclasses.dataclass
class RandomHorizontalFlip:
    p: float = 0.5

    def sample_params(self, img: Any) -> Any:
        return bool(torch.rand(1) < self.p)

    def parse(self, stored: Any) -> Any:
        if not isinstance(stored, bool):
            raise ValueError(f"random_horizontal_flip: expected true or false, found {stored!r}")
        return stored

    def apply(self, img: Any, param: Any) -> Any:
        return F.hflip(img) if param else img


@dataclasses.dataclass
class RandAugment:
    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    interpolation: str = "nearest"
    fill: Any = None
    p: float = 1.0

    def _magnitude(self, op: int, img: Any) -> float:
        """The unsigned magnitude of an operation, in the float32 steps of torchvision's tables."""
        name, _, largest, _ = RAND_AUGMENT_OPS[op]
        bins = self.num_magnitude_bins
        if largest is None:
            return 0.0
        if name == "Posterize":
            return float(
                (8 - (torch.arange(bins) / ((bins - 1) / 4)).round().int())[self.magnitude]
            )
        if name == "Solarize":
            return float(torch.linspace(255.0, 0.0, bins)[self.magnitude])
        if name in ("TranslateX", "TranslateY"):
            largest = largest * (img.width if name == "TranslateX" else img.height)
        return float(torch.linspace(0.0, largest, bins)[self.magnitude])

    def sample_params(self, img: Any) -> Any:
        if self.p < 1.0 and torch.rand(1) >= self.p:
            return None
        params = []
        for _ in range(self.num_ops):
            op = int(torch.randint(len(RAND_AUGMENT_OPS), (1,)))
            magnitude = self._magnitude(op, img)
            if RAND_AUGMENT_OPS[op][1] and torch.randint(2, (1,)):
                magnitude *= -1.0
            params.append((op, magnitude))
        return tuple(params)

    def parse(self, stored: Any) -> Any:
        if stored is None:
            return None
        last = len(RAND_AUGMENT_OPS) - 1
        if (
            not isinstance(stored, Sequence)
            or len(stored) != self.num_ops
            or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in stored)
            or not all(isinstance(op, int) and 0 <= op <= last for op, _ in stored)
            or not all(
                isinstance(m, (int, float)) and abs(m) < 2**31 for _, m in stored
            )  # nor infinite, nor NaN
        ):
            found = str(stored)[:200]
            raise ValueError(
                f"rand_augment: expected {self.num_ops} pairs [op 0…{last}, magnitude] or null, "
                f"found {found}"
            )
        return tuple((op, float(magnitude)) for op, magnitude in stored)

    def apply(self, img: Any, param: Any) -> Any:
        mode = InterpolationMode(self.interpolation)
        for op, magnitude in param or ():
            img = RAND_AUGMENT_OPS[op][3](img, magnitude, mode, self.fill)
        return img


@dataclasses.dataclass
class ToTensor:
    def apply(self, img: Any, param: Any = None) -> Any:
        return F.to_tensor(img)


@dataclasses.dataclass
class RandomEraseBox:
    p: float = 0.5
    scale: Sequence[float] = (0.02, 0.33)
    ratio: Sequence[float] = (0.3, 3.3)
    value: Any = 0
    inplace: bool = False  # of no use here: the tensor is ours

    def __post_init__(self) -> None:
        if isinstance(self.value, str):
            raise ValueError(
                f"random_erase: value {self.value!r} can't be applied again; expected a number, "
                "or one for each channel"
            )
        values = self.value if isinstance(self.value, Sequence) else [self.value]
        self.value = [float(v) for v in values]

    def sample_params(self, img: Any) -> Any:
        if torch.rand(1) >= self.p:
            return None
        top, left, height, width, fill = RandomErasing.get_params(
            img, self.scale, self.ratio, self.value
        )
        return (
            None if fill is img else (top, left, height, width)
        )  # torchvision found no box that fits

    def parse(self, stored: Any) -> Any:
        return None if stored is None else _integers("random_erase", stored, 4)

    def apply(self, img: Any, param: Any) -> Any:
        return (
            img if param is None else F.erase(img, *param, torch.tensor(self.value)[:, None, None])
        )


@dataclasses.dataclass
class Normalize:
    mean: Sequence[float]
    std: Sequence[float]
    inplace: bool = False

    def apply(self, img: Any, param: Any = None) -> Any:
        return F.normalize(img, list(self.mean), list(self.std))


def _pair(size: Any) -> tuple[int, int]:
    """``size`` as (height, width)."""
    if isinstance(size, int):
        return (size, size)
    if len(size) == 1:
        return (size[0], size[0])
    return tuple(size)


# The order in which they run, whatever the order in the config.
TRANSFORMS = {
    "to_rgb": ToRGB,
    "resize": Resize,
    "center_crop": CenterCrop,
    "random_crop": RandomCropBox,
    "random_resized_crop": RandomResizedCropBox,
    "random_horizontal_flip": RandomHorizontalFlip,
    "rand_augment": RandAugment,
    "to_tensor": ToTensor,
    "random_erase": RandomEraseBox,
    "normalize": Normalize,
}
_ON_TENSORS = ("random_erase", "normalize")


class Compose:
    """A fixed sequence of transforms, some of them random, whose parameters can be stored and
    applied again.

    ``params`` is a dict from the name of each random transform to its parameters.
    """

    def __init__(self, transforms: dict[str, Any]):
        self.transforms = transforms
        self.random = [name for name in transforms if hasattr(transforms[name], "sample_params")]

    def __call__(self, img: Image.Image) -> tuple[Any, dict]:
        """Sample new parameters and apply them.

        Args:
            img: PIL image.

        Returns:
            float32 ``[3, H, W]`` (a PIL image where the config has no ``to_tensor``), and the
            parameters.
        """
        params = {}
        for name, transform in self.transforms.items():
            if name in self.random:
                params[name] = transform.sample_params(img)
            img = transform.apply(img, params.get(name))
        return img, params

    def reapply(self, img: Image.Image, params: dict, size: Any = None) -> tuple[Any, dict]:
        """Apply given parameters.

        Args:
            img: PIL image.
            params: as returned by ``__call__`` or ``decompress``.
            size: output size of the random resized crop, in place of the config's: pixels, or
                (height, width).

        Returns:
            As ``__call__``.

        Raises:
            ValueError: a crop box that is not inside the image.
        """
        if size is not None and "random_resized_crop" not in self.transforms:
            raise ValueError(
                "size was given, but the config has no random_resized_crop whose size it could be"
            )
        for name, transform in self.transforms.items():
            if name == "random_resized_crop":
                img = transform.apply(img, params[name], size)
            else:
                img = transform.apply(img, params.get(name))
        return img, params

    def compress(self, params: dict) -> list:
        """Parameters as a JSON-ready list: one entry for each random transform, in the order of
        ``TRANSFORMS``."""
        return [_as_lists(params[name]) for name in self.random]

    def decompress(self, compressed: list) -> dict:
        """The inverse of ``compress``, also on what ``json.loads`` returns.

        Raises:
            ValueError: an entry that is not what its transform stores, or too few or too many of
                them.
        """
        if not isinstance(compressed, Sequence) or len(compressed) != len(self.random):
            raise ValueError(
                f"expected one entry for each of {self.random}, found {str(compressed)[:200]}"
            )
        return {
            name: self.transforms[name].parse(entry)
            for name, entry in zip(self.random, compressed, strict=True)
        }


def split_for_device(compose: Compose) -> tuple[Compose, torch.Tensor]:
    """Split off the last steps, which :func:`to_normalized` does for a whole batch on the device.

    Returns:
        A Compose that ends with a PIL image (with a tensor if it erases), and the normalisation
        statistics: mean and standard deviation, float32 ``[2, 3]``. Both together give what
        ``compose`` gives, bit for bit on a CPU.
    """
    normalize = compose.transforms["normalize"]
    late = ("normalize",) if "random_erase" in compose.transforms else ("to_tensor", "normalize")
    early = {name: transform for name, transform in compose.transforms.items() if name not in late}
    return Compose(early), torch.tensor([normalize.mean, normalize.std])


def to_normalized(images: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """Normalise a batch of images.

    Args:
        images: uint8 ``[B, H, W, 3]``, or float32 ``[B, 3, H, W]`` in 0 … 1.
        statistics: as returned by :func:`split_for_device`, on any device.

    Returns:
        float32 ``[B, 3, H, W]``, normalised.
    """
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images.div_(255)
    else:
        images = images.clone()
    mean, std = statistics.to(images.device)[:, None, :, None, None]
    return images.sub_(mean).div_(std)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are(values: Any, test: Callable[[Any], bool], *lengths: int) -> bool:
    """Whether this is a list of such values, of one of these lengths; none: of any."""
    is_list = isinstance(values, (list, tuple))
    return is_list and (not lengths or len(values) in lengths) and all(map(test, values))


# What an argument in a config may be: a test, and words for it.
_MODES = [mode.value for mode in InterpolationMode]
_SWITCH: tuple[Callable[[Any], bool], str] = (lambda v: isinstance(v, bool), "true or false")
_COUNT: tuple[Callable[[Any], bool], str] = (lambda v: _is_whole(v, 0), "a whole number")
_PAIR: tuple[Callable[[Any], bool], str] = (lambda v: _are(v, _is_number, 2), "two numbers")
_CHANNELS: tuple[Callable[[Any], bool], str] = (lambda v: _are(v, _is_number), "a list of numbers")
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("enable", "antialias", "inplace", "pad_if_needed"), _SWITCH),
    **dict.fromkeys(("num_ops", "magnitude", "num_magnitude_bins"), _COUNT),
    **dict.fromkeys(("scale", "ratio"), _PAIR),
    **dict.fromkeys(("mean", "std"), _CHANNELS),
    "size": (
        lambda v: _is_whole(v, 1) or _are(v, lambda side: _is_whole(side, 1), 1, 2),
        "pixels, or [height, width]",
    ),
    "max_size": (lambda v: v is None or _is_whole(v, 1), "pixels, or null"),
    "interpolation": (lambda v: v in _MODES, f"one of {', '.join(_MODES)}"),
    "p": (lambda v: _is_number(v) and 0 <= v <= 1, "a probability, 0 to 1"),
    "padding": (
        lambda v: v is None or _is_whole(v, 0) or _are(v, lambda side: _is_whole(side, 0), 1, 2, 4),
        "pixels, a list of them, or null",
    ),
}


def _check_argument(name: str, argument: str, value: Any) -> None:
    """Raise ValueError if an argument of a transform in a config has the wrong type."""
    test, expected = _ARGUMENTS.get(argument, (lambda value: True, ""))
    if not test(value):
        raise ValueError(f"{name}: {argument}: expected {expected}, found {str(value)[:200]!r}")


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, tuple) else value


def compose_from_config(config: dict) -> Compose:
    """Build the augmentation of an ``image_augmentation`` config.

    Args:
        config: ``{transform name: {"enable": bool, argument: value, …}}``; names are those of
            ``TRANSFORMS``, arguments and their defaults torchvision's. ``"enable": false`` removes
            a transform.

    Raises:
        ValueError: a name or an argument that does not exist, or a combination that can't run.
    """
    if "image_augmentation" in config:
        raise ValueError('pass the object under "image_augmentation", not the one around it')
    unknown = [name for name in config if name not in TRANSFORMS]
    if unknown:
        raise ValueError(
            f"unknown transform {', '.join(unknown)}; known are {', '.join(TRANSFORMS)}"
        )
    transforms = {}
    for name, transform in TRANSFORMS.items():
        arguments = config.get(name, {"enable": False})
        if not isinstance(arguments, dict):
            raise ValueError(f"{name}: expected an object, found {arguments!r}")
        for argument, value in arguments.items():
            _check_argument(name, argument, value)
        arguments = dict(arguments)
        if not arguments.pop("enable", True):
            continue
        fields = [field.name for field in dataclasses.fields(transform)]
        wrong = [argument for argument in arguments if argument not in fields]
        if wrong:
            raise ValueError(
                f"{name}: unknown argument {', '.join(wrong)}; "
                f"known are {', '.join(fields) or 'none'}"
            )
        try:
            transforms[name] = transform(**arguments)
        except TypeError as error:  # a required argument is missing
            raise ValueError(f"{name}: {error}") from error
    for name in _ON_TENSORS:
        if name in transforms and "to_tensor" not in transforms:
            raise ValueError(f"{name} works on tensors: enable to_tensor as well")
    return Compose(transforms)
