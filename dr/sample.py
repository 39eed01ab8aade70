"""One sample of a joined shard: decode it, choose from it, and augment its image.

A sample has A stored augmentations of its image, 1 original and S synthetic captions, and the
teachers' embeddings of all of them. :func:`select` chooses one augmentation and the captions for
this visit, and returns them with exactly their embeddings: a few KB in place of 222. The image
stays compressed until :func:`decode_image`.

Shards are untrusted input: nothing is unpickled, and nothing inflates beyond a bound. Whatever is
wrong with a sample is raised as ``BadSample``; the caller decides what happens then.
"""

import functools
import io
import json
import math
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from .index import Array, IndexFault
from .sampling import Choice
from .tar import IMAGE_MEMBERS, MAX_INFLATED, PLAIN_MEMBERS, REINFORCED_MEMBERS, Unknown
from .tar import USED_MEMBERS as USED_MEMBERS
from .transforms import Compose

try:  # inflates in about half the time
    from isal.isal_zlib import decompressobj
except ImportError:
    from zlib import decompressobj  # type: ignore[assignment]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # only these: some of Pillow's formats start a program
MAX_PIXELS = 2**26  # 67 megapixels, 200 MB decoded; DataComp's images have at most 512 x 512
# Characters of a caption. 77 tokens of CLIP's vocabulary cover at most 2,464 bytes, so the cut
# changes no token; OpenCLIP's tokenizer takes minutes for 100,000 letters without a space.
MAX_CAPTION = 8192


Row = tuple[str, int]  # name of an array, and number of a row


class StoredRows(Protocol):
    """The embeddings of a sample while they are not read yet; it takes the place of the bytes.

    Attributes:
        arrays: where they are, by name.
    """

    arrays: dict[str, Array]

    def advise(self, rows: Sequence[Row]) -> None:
        """Have the storage prepare to read these rows."""

    def read(self, rows: Sequence[Row]) -> list[bytes]:
        """The bytes of these rows.

        Raises:
            IndexFault: ``arrays`` are not those of the sample.
            BadSample: they cannot be read.
        """

    def read_sample(self) -> dict:
        """The sample with the whole member, as bytes."""


class BadSample(ValueError):
    """A sample that cannot be used.

    Attributes:
        reason: the fault in a few words, the same for all samples with this fault; used as the key
            when counting.
        unknown: members with unknown extensions of a sample that lacks something.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason = reason
        self.unknown = detail if isinstance(detail, Unknown) else None


def missing(sample: dict, members: dict[str, tuple[str, ...]]) -> list[str]:
    """The required members that a sample lacks, each as ``lacks NAME (EXTENSION or …)``."""
    return [
        f"lacks {name} ({' or '.join(extensions)})"
        for name, extensions in members.items()
        if not any(extension in sample for extension in extensions)
    ]


def check_members(sample: dict, members: dict[str, tuple[str, ...]]) -> None:
    """Raise BadSample if a sample lacks a required member."""
    for lack in missing(sample, members):
        raise BadSample(lack, getattr(sample, "unknown", None) or "")


def first_member(sample: dict, extensions: tuple[str, ...]) -> tuple[str, Any]:
    """Extension and bytes of the first of ``extensions`` that a sample has."""
    return next((extension, sample[extension]) for extension in extensions if extension in sample)


def _json(member: str, text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"unreadable {member}", error) from error


def _field(sample: dict, member: str, field: str) -> Any:
    content = _json(member, sample[member])
    if not isinstance(content, dict) or field not in content:
        raise BadSample(f"unreadable {member}", f"expected an object with {field}")
    return content[field]


def read_caption_lists(sample: dict) -> dict[str, list[str]]:
    """The synthetic captions of ``syn.json``, a list for each captioning model.

    Returns:
        Lists by key; keys start with ``syn_text``. DataCompDR has one list, ``syn_text``.
    """
    content = _json("syn.json", sample["syn.json"])
    if not isinstance(content, dict):
        raise BadSample("unreadable syn.json", "expected an object with lists of captions")
    lists = {key: captions for key, captions in content.items() if key.startswith("syn_text")}
    if not lists:
        found = ", ".join(map(str, content)) or "none"
        detail = f"expected a key syn_text, or keys that start with it; found {found}"
        raise BadSample("unreadable syn.json", detail)
    for key, captions in lists.items():
        if not isinstance(captions, list) or not captions or not all(map(_is_caption, captions)):
            raise BadSample("unreadable syn.json", f"expected a list of captions under {key}")
        lists[key] = [bound_caption(text) for text in captions]
    return lists


def _is_caption(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def synthetic_captions(sample: dict) -> list[str]:
    """All S synthetic captions of ``syn.json``, list after list."""
    return [text for captions in read_caption_lists(sample).values() for text in captions]


def bound_caption(text: str) -> str:
    """The caption, cut if it is very long; see ``MAX_CAPTION``."""
    if len(text) <= MAX_CAPTION:
        return text
    return " ".join(text.split())[:MAX_CAPTION]


def augmentation_parameters(sample: dict) -> list:
    """The A compressed parameter lists of ``paug.json``: a list, or a string with that list as
    JSON."""
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
    return bound_caption(text)


def original_captions(sample: dict) -> list[str]:
    """The C original captions: the list ``texts`` of ``json`` if there is one, else the caption."""
    if b'"texts"' in sample.get("json", b""):
        texts = _field(sample, "json", "texts")
        if not isinstance(texts, list) or not texts or not all(map(_is_caption, texts)):
            raise BadSample("unreadable json", "expected a list of captions under texts")
        return [bound_caption(text) for text in texts]
    return [caption(sample)]


def has_originals(sample: dict) -> bool:
    """Whether a sample has original captions."""
    return "txt" in sample or b'"texts"' in sample.get("json", b"")


def count_originals(sample: dict) -> int:
    """C, the number of original captions. A reinforcement shard of the Hub may have none; its
    teachers embedded one."""
    return len(original_captions(sample)) if has_originals(sample) else 1


def embeddings(sample: dict) -> dict[str, Tensor]:
    """The stored embeddings of ``npz`` (NumPy), ``safetensors`` or ``pth.gz`` (gzip around
    ``torch.save``).

    Returns:
        ``image_emb`` ``[A, ΣD_k]`` and ``text_emb`` ``[C + S, ΣD_k]``, float in the precision
        stored. The rows of ``text_emb`` are those of the original captions, then those of the
        synthetic captions in the order of :func:`synthetic_captions`, however they are stored.
    """
    stored = stored_embeddings(sample)
    text_emb = _rows(stored["text_emb"], slice(None))
    if "syn.json" in sample:
        originals, lists = count_originals(sample), read_caption_lists(sample)
        places = locate_synthetic_rows(originals, lists, stored)
        parts = [text_emb[:originals]]
        for key, captions in lists.items():
            name, first = places[key]
            parts.append(_rows(stored[name], slice(first, first + len(captions))))
        text_emb = torch.cat(parts)
    return {"image_emb": _rows(stored["image_emb"], slice(None)), "text_emb": text_emb}


def locate_synthetic_rows(
    originals: int, lists: dict[str, list[str]], stored: Mapping[str, np.ndarray | Tensor | Array]
) -> dict[str, tuple[str, int]]:
    """Find the embeddings of each list of synthetic captions.

    Each list has an array of its own, ``<key>_emb`` (DFNDR), except that the embeddings of one list
    may follow those of the original captions in ``text_emb`` (DataCompDR).

    Args:
        originals: number of original captions.
        lists: synthetic captions by key.
        stored: arrays by name.

    Returns:
        Name of the array and its first row, by key.

    Raises:
        BadSample: an array is missing, or the numbers of rows disagree.
    """
    rows = len(stored["text_emb"])
    places = {key: (f"{key}_emb", 0) for key in lists if f"{key}_emb" in stored}
    others = [key for key in lists if key not in places]
    counts = ", ".join(f"{len(captions)} under {key}" for key, captions in lists.items())
    if others and rows == originals:
        detail = f"no {others[0]}_emb for {counts}; found {', '.join(stored)}"
        raise BadSample("lacks embeddings of synthetic captions", detail)
    also = others or list(lists)  # text_emb may repeat the embeddings of the only list
    if rows != originals and (len(also) > 1 or rows != originals + len(lists[also[0]])):
        detail = f"text_emb has {rows} rows for {originals} original captions and {counts}"
        raise BadSample("row counts disagree", detail)
    for key, (name, _) in places.items():
        if len(stored[name]) != len(lists[key]):
            detail = f"{name} has {len(stored[name])} rows for {len(lists[key])} captions"
            raise BadSample("row counts disagree", detail)
    return places | {key: ("text_emb", originals) for key in others}


def _rows(stored: np.ndarray | Tensor, rows: slice | list[int]) -> Tensor:
    """Some rows, as a tensor that keeps nothing else alive."""
    if isinstance(stored, np.ndarray):
        return torch.from_numpy(np.array(stored[rows]))
    return stored[rows].clone()


def stored_embeddings(sample: dict) -> dict[str, Any]:
    """The stored arrays by name, as views of the stored bytes where possible.

    These are ``image_emb`` and ``text_emb``, and ``<key>_emb`` of lists of synthetic captions, as
    NumPy arrays or tensors, or as the places of ``StoredRows``.
    """
    member, data = first_member(sample, REINFORCED_MEMBERS["embeddings"])
    if not isinstance(data, bytes):
        return data.arrays
    try:
        stored: dict = LOADERS[member](data)
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
                f"unreadable {member}", f"{name} is {_describe(array)}, not float [rows, width]"
            )
        if array.nbytes > MAX_INFLATED:  # with a stride of 0 few bytes can stand for many
            raise BadSample(f"oversized {member}", f"{name} is {_describe(array)}")
    return stored


def _describe(array: Any) -> str:
    return f"{getattr(array, 'dtype', type(array))} {list(getattr(array, 'shape', ()))}"


def check_inflated(archive: zipfile.ZipFile, member: str) -> None:
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_INFLATED:
        raise BadSample(
            f"oversized {member}", f"{size} bytes inflated, at most {MAX_INFLATED} are taken"
        )


def _load_npz(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an npz; uncompressed ones are views of ``data``, so unused rows cost nothing.

    Views skip the archive's checksums, which take as long as reading all of it.
    """
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_inflated(archive, "npz")
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        for name in _embedding_names(entries):
            entry = entries[name]
            if entry.compress_type == zipfile.ZIP_STORED:
                # A local header has 30 bytes; its last four: lengths of the name and an extra
                # field.
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
    """Shape, order and type. Cached: a set's samples share headers, and NumPy's parser is slow."""
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.hasobject:
        raise ValueError("Python objects, which would have to be unpickled")
    return shape, fortran_order, dtype


def _load_pth_gz(data: bytes) -> dict:
    loaded = load_pth_gz(data)
    # A stored tensor may ask for gradients.
    return {name: torch.as_tensor(loaded[name]).detach() for name in _embedding_names(loaded)}


def load_pth_gz(data: bytes) -> Any:
    """What ``torch.save`` stored in a ``pth.gz``: tensors only, and bounded."""
    stream = decompressobj(wbits=31)  # reads gzip in three quarters of gzip.open's time
    inflated = stream.decompress(data, MAX_INFLATED + 1)
    if len(inflated) > MAX_INFLATED:
        raise BadSample("oversized pth.gz", f"over {MAX_INFLATED} bytes inflated")
    if not stream.eof or stream.unused_data:
        raise BadSample("unreadable pth.gz", "cut off, or more than one gzip stream")
    with zipfile.ZipFile(io.BytesIO(inflated)) as archive:
        check_inflated(archive, "pth.gz")
    return torch.load(io.BytesIO(inflated), map_location="cpu", weights_only=True)


def _load_safetensors(data: bytes) -> dict[str, Tensor]:
    loaded = safetensors.torch.load(data)
    return {name: loaded[name] for name in _embedding_names(loaded)}


TORCH_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
LOADERS: dict[str, Callable[[bytes], dict]] = {
    "npz": _load_npz,
    "safetensors": _load_safetensors,
    "pth.gz": _load_pth_gz,
}


def _embedding_names(found: Iterable[str]) -> list[str]:
    """Names of the arrays to read: the two of every sample, and those of lists of captions."""
    names = [name for name in found if name.startswith("syn_text") and name.endswith("_emb")]
    return ["image_emb", "text_emb", *names]


def decode_image(sample: dict) -> Image.Image:
    """The image of a sample, as RGB: 16 bits scaled to 8, transparency composited on white."""
    member, data = first_member(sample, IMAGE_MEMBERS)
    try:
        img = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if img.width * img.height > MAX_PIXELS:
            found = f"{img.width}x{img.height}, at most {MAX_PIXELS} pixels are taken"
            raise BadSample("oversized image", found)
        img.load()
        return _to_rgb(img)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises nearly anything on a broken file
        detail = f"{member}: {type(error).__name__}: {error}"
        raise BadSample("undecodable image", detail) from error


def _to_rgb(img: Image.Image) -> Image.Image:
    """Pillow's own conversion clips 16 bits to white, and shows what lies under transparency."""
    transparent = img.info.get("transparency")
    if img.mode.startswith("I"):  # PNG: 16 bits of grey, perhaps with one transparent value
        grey = np.asarray(img).astype(np.uint32)
        scaled = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        if isinstance(transparent, int):
            scaled[grey == transparent] = 255
        return Image.fromarray(scaled).convert("RGB")
    if transparent is not None or img.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        img = img.convert("RGBA")
        white = Image.new("RGBA", img.size, "white")
        return Image.alpha_composite(white, img).convert("RGB")
    return img if img.mode == "RGB" else img.convert("RGB")


def select(
    sample: dict,
    compose: Compose,
    choice: Choice,
    mix_ratio: float | None = None,
    width: int | None = None,
    list_keys: re.Pattern | None = None,
) -> dict:
    """Choose an augmentation and captions of a sample, and take the embeddings of exactly those.

    Args:
        sample: members of a joined sample by extension, as bytes, and ``__key__``.
        compose: the augmentation that the stored parameters belong to.
        choice: how to choose; see ``sampling``.
        mix_ratio: None: two captions, the original and a synthetic one. Otherwise one caption,
            which is synthetic with this probability.
        width: ΣD_k that the embeddings must have; None: not checked.
        list_keys: the lists of synthetic captions to use are those whose key matches; None: all.

    Returns:
        ``params`` (for ``compose.reapply``), ``captions`` (the original, a synthetic one, or both
        in this order), ``image_emb`` ``[ΣD_k]`` and ``text_emb`` ``[captions, ΣD_k]`` in the
        precision stored, the image's member as it was, ``__key__`` and ``__url__``. Of a sample
        with ``StoredRows``, ``stored`` and ``rows`` in place of the embeddings, for
        :func:`read_rows`.

    Raises:
        BadSample: something is missing, unreadable or not finite, or row counts disagree.
    """
    check_members(sample, REINFORCED_MEMBERS)
    lists, parameters = read_caption_lists(sample), augmentation_parameters(sample)
    originals, stored = original_captions(sample), stored_embeddings(sample)
    if len(stored["image_emb"]) != len(parameters):
        found = f"{len(stored['image_emb'])} rows for {len(parameters)} augmentations"
        raise BadSample("row counts disagree", f"image_emb has {found}")
    places = locate_synthetic_rows(len(originals), lists, stored)
    for name in ("image_emb", "text_emb", *(name for name, _ in places.values())):
        if width not in (None, stored[name].shape[1]):
            found = f"{name} is {stored[name].shape[1]} wide, expected {width}"
            raise BadSample("embedding width", found)
    if list_keys is not None:
        used = {key: captions for key, captions in lists.items() if list_keys.search(key)}
        if not used:
            detail = f"{list_keys.pattern} matches no key of syn.json; found {', '.join(lists)}"
            raise BadSample("no list of synthetic captions", detail)
        lists = used

    uid = str(sample.get("__key__"))
    augmentation = choice.choose(uid, "augmentation", len(parameters))
    key, which = _choose_synthetic(uid, lists, choice)
    name, first = places[key]
    original = choice.choose(uid, "original", len(originals)) if len(originals) > 1 else 0
    captions = [originals[original], lists[key][which]]
    text_rows = [("text_emb", original), (name, first + which)]
    if mix_ratio is not None:
        is_synthetic = choice.generator(uid, "mix").random() < mix_ratio
        keep = slice(1, 2) if is_synthetic else slice(0, 1)
        captions, text_rows = captions[keep], text_rows[keep]
    try:
        params = compose.decompress(parameters[augmentation])
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    rows = [("image_emb", augmentation), *text_rows]
    member, image = first_member(sample, IMAGE_MEMBERS)
    selected = {
        "__key__": sample.get("__key__"),
        "__url__": sample.get("__url__"),
        member: image,
        "params": params,
        "captions": captions,
    }
    _, data = first_member(sample, REINFORCED_MEMBERS["embeddings"])
    if not isinstance(data, bytes):
        data.advise(rows)
        return {**selected, "stored": data, "rows": rows}
    return _add_rows(selected, [_rows(stored[name], [row]) for name, row in rows])


def _add_rows(selected: dict, rows: list[Tensor]) -> dict:
    """Add the embeddings of one augmentation and of the captions, each ``[1, ΣD_k]``."""
    for row in rows:
        # An infinite or NaN term makes the sum so, in a third of the time of testing each term.
        if not math.isfinite(row.float().sum(dtype=torch.float64)):
            raise BadSample("embeddings are not finite")
    return {**selected, "image_emb": rows[0][0], "text_emb": torch.cat(rows[1:])}


def read_rows(selected: dict) -> dict:
    """Read the embeddings that :func:`select` has chosen of a sample with ``StoredRows``.

    Raises:
        IndexFault: as in ``StoredRows.read``.
        BadSample: they cannot be read, or are not finite.
    """
    stored, rows = selected.pop("stored"), selected.pop("rows")
    tensors = []
    for (name, _), data in zip(rows, stored.read(rows), strict=True):
        dtype = TORCH_TYPES[stored.arrays[name].dtype]
        tensors.append(torch.frombuffer(bytearray(data), dtype=dtype)[None])
    return _add_rows(selected, tensors)


def _choose_synthetic(uid: str, lists: dict[str, list[str]], choice: Choice) -> tuple[str, int]:
    """A list, then one of its captions. Lists of one length are chosen from as one list, so that
    without replacement each caption comes once before one comes twice."""
    keys, counts = list(lists), [len(captions) for captions in lists.values()]
    if len(set(counts)) == 1:
        number, which = divmod(choice.choose(uid, "caption", sum(counts)), counts[0])
        return keys[number], which
    number = choice.choose(uid, "captioner", len(keys))
    return keys[number], choice.choose(uid, "caption", counts[number])


# --- processors: what training does with a sample -------------------------------------------------
class ReinforcedProcessor:
    """Selects one stored augmentation, captions and their embeddings, and augments the image.

    Args:
        compose: the augmentation as the student sees it, up to ``to_tensor``.
        statistics: normalisation statistics: mean and standard deviation ``[2, 3]``.
        mix_ratio, width, list_keys: see :func:`select`.
        min_side: pixels; images with a shorter side are skipped.
    """

    members, wanted = REINFORCED_MEMBERS, USED_MEMBERS

    def __init__(
        self,
        compose: Compose,
        statistics: Tensor,
        mix_ratio: float | None = None,
        width: int | None = None,
        list_keys: re.Pattern | None = None,
        min_side: int = 0,
    ):
        self.compose, self.statistics = compose, statistics
        self.mix_ratio, self.width, self.list_keys = mix_ratio, width, list_keys
        self.min_side = min_side
        self._has_selected = False

    def select(self, sample: dict, choice: Choice) -> dict:
        """Select from a sample: a few KB in place of 222; see :func:`select`.

        Raises:
            BadSample: the sample cannot be used.
            ValueError: the embeddings of the first sample have another width than the options say.
        """
        try:
            selected = select(
                sample, self.compose, choice, self.mix_ratio, self.width, self.list_keys
            )
        except BadSample as error:
            data = [sample[name] for name in REINFORCED_MEMBERS["embeddings"] if name in sample]
            if data and not isinstance(data[0], bytes):  # the fault may be that of an index
                return self.select(data[0].read_sample(), choice)
            if error.reason == "embedding width" and not self._has_selected:
                where = f"{sample.get('__key__')} of {sample.get('__url__')}"
                raise ValueError(f"{where}: {error} by --distill-teacher-dimension") from error
            raise
        self._has_selected = True
        return selected

    def read_rows(self, selected: dict, choice: Choice) -> dict:
        """Read the selected embeddings, unless they are there; see :func:`read_rows`."""
        if "stored" not in selected:
            return selected
        stored = selected["stored"]
        try:
            return read_rows(selected)
        except IndexFault:
            return self.select(stored.read_sample(), choice)

    def augment(self, selected: dict, choice: Choice) -> dict:
        """Add the ``image``: uint8 ``[H, W, 3]``, or float32 ``[3, H, W]`` if a part is erased."""
        img = decode_image(selected)
        if min(img.size) < self.min_side:
            raise BadSample(
                "small image", f"{img.width}x{img.height}, under {self.min_side} pixels"
            )
        try:
            image, _ = self.compose.reapply(img, selected["params"])
        except ValueError as error:
            raise BadSample("augmentation parameters", error) from error
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image))
        return {**selected, "image": image}


class BaselineProcessor:
    """Takes image and original caption, and preprocesses the image as OpenCLIP does.

    Args:
        preprocess: OpenCLIP's training transform of the student.
    """

    members, wanted = PLAIN_MEMBERS, {*IMAGE_MEMBERS, "txt"}
    statistics = None

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]):
        self.preprocess = preprocess

    def select(self, sample: dict, choice: Choice) -> dict:
        """Add the caption; the image stays as it is."""
        check_members(sample, PLAIN_MEMBERS)
        return {**sample, "captions": [caption(sample)]}

    def read_rows(self, selected: dict, choice: Choice) -> dict:
        """Nothing is left to read."""
        return selected

    def augment(self, selected: dict, choice: Choice) -> dict:
        """Add the ``image``, float32 ``[3, H, W]``, augmented as ``choice`` decides."""
        img = decode_image(selected)
        with _seed_generators(choice.generator(selected["__key__"], "image")):
            return {**selected, "image": self.preprocess(img)}


@contextmanager
def _seed_generators(own: random.Random) -> Iterator[None]:
    """Seed the global random generators, which transforms use, and restore them at the end."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(own.getrandbits(64))
    np.random.seed(own.getrandbits(32))
    torch.default_generator.manual_seed(own.getrandbits(63))  # torch.manual_seed: on GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
