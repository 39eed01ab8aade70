"""One sample of a joined DataCompDR shard: decode what is stored, choose, and keep the rows that belong together.

A sample holds A augmentations of its image, 1 original and S synthetic captions, and the teachers' embeddings of all of
them. ``draw`` picks one augmentation and the captions of this visit, and returns them with exactly their embeddings: a
few KB in the place of 221. The image stays compressed until ``decode_image``.

Shards come from strangers: nothing is unpickled, and nothing inflates beyond a bound. Whatever is wrong with a sample
is raised as ``BadSample``; what that costs is for the caller to decide.
"""

import functools
import io
import json
import math
import random
import struct
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .sampling import coin, turn_of
from .transforms import Compose

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
# What training needs in a sample: a name for people, and the members of which there must be one.
PLAIN_MEMBERS = {"an image": IMAGE_MEMBERS, "a caption": ("txt",)}
REINFORCED_MEMBERS = {
    **PLAIN_MEMBERS,
    "synthetic captions": ("syn.json",),
    "augmentation parameters": ("paug.json",),
    "embeddings": ("npz", "pth.gz"),
}
USED_MEMBERS = {extension for extensions in REINFORCED_MEMBERS.values() for extension in extensions}
EMBEDDINGS = ("image_emb", "text_emb")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # and no others: some of Pillow's formats start a program
MAX_PIXELS = 2**26  # 67 megapixels, 200 MB decoded; DataComp's have at most 512 x 512
MAX_INFLATED = 2**26  # bytes in one embedding member; a sample of DataCompDR-12M holds 221,184


class BadSample(ValueError):
    """A sample that can't be used.

    Attributes:
        reason: what is wrong in a few words, the same for all samples that fail in this way, for counting.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason = reason


def missing(sample: dict, members: dict[str, tuple[str, ...]]) -> list[str]:
    """Names of those ``members`` of which a sample has none, each with the extensions that would do."""
    return [
        f"lacks {name} ({' or '.join(extensions)})"
        for name, extensions in members.items()
        if not any(extension in sample for extension in extensions)
    ]


def first_member(sample: dict, extensions: tuple[str, ...]) -> tuple[str, bytes]:
    """Extension and bytes of the first of ``extensions`` that a sample has."""
    return next((extension, sample[extension]) for extension in extensions if extension in sample)


def _json(member: str, text: bytes | str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"unreadable {member}", error) from error


def _field(sample: dict, member: str, field: str):
    content = _json(member, sample[member])
    if not isinstance(content, dict) or field not in content:
        raise BadSample(f"unreadable {member}", f"expected an object with {field}")
    return content[field]


def synthetic_captions(sample: dict) -> list[str]:
    """The S synthetic captions of ``syn.json``."""
    captions = _field(sample, "syn.json", "syn_text")
    if (
        not isinstance(captions, list)
        or not captions
        or not all(isinstance(c, str) and c.strip() for c in captions)
    ):
        raise BadSample("unreadable syn.json", "expected a list of captions under syn_text")
    return captions


def augmentation_parameters(sample: dict) -> list:
    """The A compressed parameter lists of ``paug.json``; a list, or a string that holds it as JSON."""
    parameters = _field(sample, "paug.json", "param_aug")
    if isinstance(parameters, str):
        parameters = _json("paug.json", parameters)
    if not isinstance(parameters, list) or not parameters:
        raise BadSample("unreadable paug.json", "expected a list of parameters under param_aug")
    return parameters


def caption(sample: dict) -> str:
    """The original caption."""
    try:
        text = sample["txt"].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("unreadable txt", error) from error
    if not text:
        raise BadSample("empty caption")
    return text


def embeddings(sample: dict) -> dict[str, Tensor]:
    """The stored embeddings of ``npz`` (NumPy) or ``pth.gz`` (gzip around ``torch.save``).

    Returns:
        ``image_emb`` float ``[A, ΣD_k]`` and ``text_emb`` float ``[1 + S, ΣD_k]``, in the precision stored.
    """
    return {name: _rows(stored, slice(None)) for name, stored in _stored_embeddings(sample).items()}


def _rows(stored: np.ndarray | Tensor, rows: slice | list[int]) -> Tensor:
    """Some rows, as a tensor that keeps nothing else alive."""
    return (
        torch.from_numpy(np.array(stored[rows]))
        if isinstance(stored, np.ndarray)
        else stored[rows].clone()
    )


def _stored_embeddings(sample: dict) -> dict[str, np.ndarray | Tensor]:
    """As :func:`embeddings`, but with views where that saves work."""
    member, data = first_member(sample, REINFORCED_MEMBERS["embeddings"])
    try:
        stored = (_load_npz if member == "npz" else _load_pth_gz)(data)
    except BadSample:
        raise
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        raise BadSample(f"unreadable {member}", f"{type(error).__name__}: {error}") from error
    for name, array in stored.items():
        if isinstance(array, Tensor):
            floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            usable = array.dtype in floats and array.layout == torch.strided and not array.is_meta
        else:
            usable = array.dtype in (np.float16, np.float32, np.float64)
        if not usable or array.ndim != 2:
            raise BadSample(
                f"unreadable {member}", f"{name} is {_described(array)}, not float [rows, width]"
            )
        if array.nbytes > MAX_INFLATED:  # few bytes can stand for many by a stride of 0
            raise BadSample(f"oversized {member}", f"{name} is {_described(array)}")
    return stored


def _described(array) -> str:
    return f"{getattr(array, 'dtype', type(array))} {list(getattr(array, 'shape', ()))}"


def _check_inflated(archive: zipfile.ZipFile, member: str) -> None:
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_INFLATED:
        raise BadSample(
            f"oversized {member}", f"{size} bytes inflated, at most {MAX_INFLATED} are taken"
        )


def _load_npz(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an npz; those that are not compressed are views of ``data``, so that what isn't used costs nothing.

    (A view does without the archive's checksums, which take as long as reading it.)
    """
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _check_inflated(archive, "npz")
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        for name in EMBEDDINGS:
            entry = entries[name]
            if entry.compress_type == zipfile.ZIP_STORED:
                # a local header: 30 bytes, of which the last four are the lengths of the name and of an extra field
                start = entry.header_offset
                name_length, extra_length = struct.unpack_from("<HH", data, start + 26)
                arrays[name] = _view_npy(data, start + 30 + name_length + extra_length)
            else:
                arrays[name] = _view_npy(archive.read(entry), 0)
    return arrays


def _view_npy(data: bytes, start: int) -> np.ndarray:
    """The array whose npy format (version 1.0) begins at ``start``, as a view."""
    if data[start : start + 8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not an array in npy format 1.0, as np.savez writes it")
    (length,) = struct.unpack_from("<H", data, start + 8)
    shape, fortran_order, dtype = _npy_header(data[start + 8 : start + 10 + length])
    array = np.frombuffer(data, dtype, math.prod(shape), start + 10 + length)
    return array.reshape(shape, order="F" if fortran_order else "C")


@functools.lru_cache(64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Remembered, as all samples of a set have the same: NumPy takes as long for it as for reading the array."""
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.hasobject:
        raise ValueError("Python objects, which would have to be unpickled")
    return shape, fortran_order, dtype


def _load_pth_gz(data: bytes) -> dict:
    stream = zlib.decompressobj(
        wbits=31
    )  # a gzip file; a quarter faster than gzip.open (0.38 ms for 0.50)
    inflated = stream.decompress(data, MAX_INFLATED + 1)
    if len(inflated) > MAX_INFLATED:
        raise BadSample("oversized pth.gz", f"over {MAX_INFLATED} bytes inflated")
    if not stream.eof or stream.unused_data:
        raise BadSample("unreadable pth.gz", "cut off, or more than one gzip stream")
    with zipfile.ZipFile(io.BytesIO(inflated)) as archive:
        _check_inflated(archive, "pth.gz")
    loaded = torch.load(io.BytesIO(inflated), map_location="cpu", weights_only=True)
    return {
        name: torch.as_tensor(loaded[name]).detach() for name in EMBEDDINGS
    }  # what is stored may ask for gradients


def decode_image(sample: dict) -> Image.Image:
    """The image of a sample, as RGB."""
    member, data = first_member(sample, IMAGE_MEMBERS)
    try:
        img = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if img.width * img.height > MAX_PIXELS:
            raise BadSample(
                "oversized image",
                f"{img.width}x{img.height}, at most {MAX_PIXELS} pixels are taken",
            )
        img.load()
        return img if img.mode == "RGB" else img.convert("RGB")
    except BadSample:
        raise
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise BadSample(
            "undecodable image", f"{member}: {type(error).__name__}: {error}"
        ) from error


def draw(
    sample: dict,
    compose: Compose,
    rng: random.Random | tuple[int, int],
    mix_ratio: float | None = None,
    width: int | None = None,
) -> dict:
    """Choose an augmentation and captions of a sample, and the embeddings that belong to exactly those.

    Args:
        sample: members of a joined sample by extension, as bytes.
        compose: what the stored parameters are for.
        rng: makes the choices; or (seed, pass) of sampling without replacement: then they are a function of these and
            the sample's key, and over the passes each augmentation comes once before one comes twice, and each caption.
        mix_ratio: None for two captions, the original and a synthetic one; else one caption, which is synthetic with
            this probability (``--dataset-reinforcement-mix-synthetic``).
        width: ΣD_k that the embeddings must have, if known.

    Returns:
        ``__key__``, ``__url__``, the image's member as it was, ``params`` (for ``compose.reapply``), ``captions`` (list
        of 2 or 1 str, the original first), ``image_emb`` ``[ΣD_k]`` and ``text_emb`` ``[captions, ΣD_k]``, float in the
        precision stored.

    Raises:
        BadSample: something is missing, unreadable, not finite, or row counts disagree.
    """
    for lack in missing(sample, REINFORCED_MEMBERS):
        raise BadSample(lack)
    synthetic, parameters, original, stored = (
        synthetic_captions(sample),
        augmentation_parameters(sample),
        caption(sample),
        _stored_embeddings(sample),
    )
    for name, rows, of in (
        ("image_emb", len(parameters), "augmentations"),
        ("text_emb", 1 + len(synthetic), "captions"),
    ):
        if len(stored[name]) != rows:
            raise BadSample(
                "row counts disagree", f"{name} has {len(stored[name])} rows for {rows} {of}"
            )
        if width is not None and stored[name].shape[1] != width:
            raise BadSample(
                "embedding width", f"{name} is {stored[name].shape[1]} wide, expected {width}"
            )
    if isinstance(rng, tuple):
        now = (*rng, sample.get("__key__"))
        augmentation = turn_of(*now, "augmentation", len(parameters))
        which = turn_of(*now, "caption", len(synthetic))
    else:
        augmentation, which = rng.randrange(len(parameters)), rng.randrange(len(synthetic))
    chosen = [0, 1 + which]
    if mix_ratio is not None:
        mixed_in = coin(*now, "mix") if isinstance(rng, tuple) else rng.random()
        chosen = chosen[1:] if mixed_in < mix_ratio else chosen[:1]
    try:
        params = compose.decompress(parameters[augmentation])
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    image_emb, text_emb = (
        _rows(stored["image_emb"], [augmentation]),
        _rows(stored["text_emb"], chosen),
    )
    # one infinite or NaN term makes the sum so, in a third of the time of looking at each; float64 can't overflow
    if not all(
        math.isfinite(rows.float().sum(dtype=torch.float64)) for rows in (image_emb, text_emb)
    ):
        raise BadSample("embeddings are not finite")
    member, image = first_member(sample, IMAGE_MEMBERS)
    return {
        "__key__": sample.get("__key__"),
        "__url__": sample.get("__url__"),
        member: image,
        "params": params,
        "captions": [[original, *synthetic][row] for row in chosen],
        "image_emb": image_emb[0],
        "text_emb": text_emb,
    }
