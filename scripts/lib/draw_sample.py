"""Draw everything that is stored with a joined sample.

hf_dataset_example.py --output and the quickstart use it. Characters that Pillow's own font lacks
come out as boxes.
"""

import functools
import unicodedata
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dr.sample import (
    BadSample,
    augmentation_parameters,
    decode_image,
    read_caption_lists,
)
from dr.transforms import RAND_AUGMENT_OPS

from .reinforcement import Reinforcement, describe_originals
from .report import printable

MAX_AUGMENTATIONS, MAX_CAPTIONS = 30, 20  # more are not drawn
WIDTH, MARGIN = 1600, 40  # pixels, as everything below
COLUMNS, SIDE = 10, 144  # of the augmented images
ORIGINAL = 300  # longer side of the original
LABELS, ROW = 420, 32  # of a similarity map
INK, GREY, LINE, CHOSEN = "#1f2328", "#6a737d", "#d0d7de", "#d1601f"
COLD, HOT = (244, 248, 252), (8, 64, 129)  # the lowest and the highest similarity
UNITS = {
    **dict.fromkeys(("Identity", "AutoContrast", "Equalize"), ""),
    **dict.fromkeys(("TranslateX", "TranslateY"), "{:+.0f} px"),
    "Posterize": "{:.0f} bits",
    "Solarize": "from {:.0f}",
    "Rotate": "{:+.0f}°",
}

load_font = functools.cache(ImageFont.load_default)  # by size


def describe_parameters(params: dict[str, Any]) -> list[str]:
    """An augmentation's parameters in words, a line for each step."""
    lines = []
    for name, value in params.items():
        if name == "random_resized_crop":
            top, left, height, width = value
            lines.append(f"{width}x{height} at {left}, {top}")
        elif name == "rand_augment":
            for op, magnitude in value or ():
                op_name = RAND_AUGMENT_OPS[op][0]
                lines.append(f"{op_name} {UNITS.get(op_name, '{:+.2f}').format(magnitude)}".strip())
        elif value is True:
            lines.append(name)
        elif value not in (None, False):
            lines.append(f"{name} {value}")
    return lines


def draw_sample(
    title: str,
    members: dict[str, bytes],
    reinforcement: Reinforcement,
    augmentation: int,
    synthetic: int,
    caption_note: str = "",
) -> Image.Image:
    """Draw the original, its augmentations, and each teacher's similarity of them and the captions.

    Args:
        title: names the sample.
        members: of the sample, by extension, with an image.
        reinforcement: how the set was reinforced.
        augmentation, synthetic: numbers of the augmentation and the synthetic caption to mark; the
            latter counts through all lists.
        caption_note: a remark on the caption, written after it.

    Raises:
        BadSample: something is unreadable, or the parameters do not fit the image.
    """
    original, similarity = decode_image(members), reinforcement.cosines(members)
    originals, lists = describe_originals(members), read_caption_lists(members)
    captions = dict(
        zip(label_captions(len(originals), lists), chain(originals, *lists.values()), strict=True)
    )
    stored = augmentation_parameters(members)[:MAX_AUGMENTATIONS]
    try:
        parameters = [reinforcement.compose.decompress(params) for params in stored]
        views = [to_pil_image(reinforcement.views.reapply(original, p)[0]) for p in parameters]
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    captions = dict(islice(captions.items(), MAX_CAPTIONS))
    marked = (0, len(originals) + synthetic)  # rows: an original caption, and a synthetic one
    total = similarity.shape[2]
    sections = [
        _draw_original(title, original, captions, marked, caption_note),
        _draw_augmentations(views, parameters, total, augmentation),
    ]
    for teacher, table in zip(reinforcement.teachers, similarity, strict=True):
        table = table[: len(captions), : len(views)]
        texts = list(captions.values())
        sections.append(_draw_similarity(teacher, texts, table, marked, augmentation))
    return stack(sections)


def label_captions(originals: int, lists: dict[str, list[str]]) -> list[str]:
    """A label for each caption: ``caption``, ``synthetic 0``, … or ``list 1, 0`` if there are
    several lists."""
    labels = ["caption"] if originals == 1 else [f"caption {c}" for c in range(originals)]
    for number, texts in enumerate(lists.values(), 1):
        name = "synthetic " if len(lists) == 1 else f"list {number}, "
        labels += [f"{name}{s}" for s in range(len(texts))]
    return labels


def fold_accents(text: str) -> str:
    """Letters without their accents, which Pillow's font lacks."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def stack(sections: Sequence[Image.Image]) -> Image.Image:
    """Put images of one width one below the other."""
    sheet = Image.new("RGB", (WIDTH, sum(section.height for section in sections)), "white")
    top = 0
    for section in sections:
        sheet.paste(section, (0, top))
        top += section.height
    return sheet


def _new_section(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    section = Image.new("RGB", (WIDTH, height), "white")
    return section, ImageDraw.Draw(section)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: str = INK,
    anchor: str = "la",
    width: float = WIDTH,
) -> float:
    """Write one line, cut to ``width`` pixels; return its length. The font has only one dash."""
    text = fold_accents(printable(text, 300).translate(str.maketrans("–—−×", "---x")))
    font = load_font(size)
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    draw.text(at, text, fill, font, anchor)
    return font.getlength(text)


def _draw_original(
    title: str,
    original: Image.Image,
    captions: dict[str, str],
    marked: tuple[int, int],
    caption_note: str,
) -> Image.Image:
    section, draw = _new_section(MARGIN + max(ORIGINAL + 30, 118 + 34 * len(captions)) + 36)
    shown = ImageOps.contain(original, (ORIGINAL, ORIGINAL), Image.Resampling.BICUBIC)
    right, bottom = MARGIN + shown.width, MARGIN + shown.height
    section.paste(shown, (MARGIN, MARGIN))
    draw.rectangle([MARGIN - 1, MARGIN - 1, right, bottom], outline=LINE)
    size = f"the original, {original.width}x{original.height}"
    _write(draw, (MARGIN, bottom + 8), size, 17, GREY)
    left = MARGIN + ORIGINAL + 44
    _write(draw, (left, MARGIN), "One reinforced sample", 38)
    _write(draw, (left, MARGIN + 52), title, 18, GREY, width=WIDTH - MARGIN - left)
    for row, (label, text) in enumerate(captions.items()):
        top = MARGIN + 104 + 34 * row + (14 if row else 0)
        _write(draw, (left, top), label, 19, CHOSEN if row in marked else GREY)
        start, text_size = left + 130, 19 if row else 22
        end = start + _write(draw, (start, top), text, text_size, width=WIDTH - MARGIN - start)
        if caption_note and row == 0 and end + 24 < WIDTH - MARGIN:
            _write(
                draw, (end + 24, top + 3), caption_note, 18, GREY, width=WIDTH - MARGIN - end - 24
            )
    return section


def _draw_augmentations(
    views: list[Image.Image], parameters: list[dict], total: int, marked: int
) -> Image.Image:
    lines = max(len(describe_parameters(params)) for params in parameters)
    row_height = SIDE + 20 * lines + 26
    section, draw = _new_section(40 + row_height * -(-len(views) // COLUMNS) + 20)
    title = f"{total} augmentations; only their parameters are stored"
    _write(draw, (MARGIN, 0), title, 22)
    legend = "crop (width x height at left, top), then RandAugment's operations"
    _write(draw, (WIDTH - MARGIN, 4), legend, 17, GREY, "ra")
    for number, (view, params) in enumerate(zip(views, parameters, strict=True)):
        x = MARGIN + number % COLUMNS * (WIDTH - 2 * MARGIN - SIDE) // (COLUMNS - 1)
        y = 40 + number // COLUMNS * row_height
        section.paste(view.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y))
        if number == marked:
            draw.rectangle([x - 3, y - 3, x + SIDE + 2, y + SIDE + 2], outline=CHOSEN, width=4)
        else:
            draw.rectangle([x, y, x + SIDE - 1, y + SIDE - 1], outline=LINE)
        draw.rectangle([x, y, x + 28, y + 22], fill=CHOSEN if number == marked else INK)
        _write(draw, (x + 14, y + 11), str(number), 15, "white", "mm")
        for line, text in enumerate(describe_parameters(params)):
            _write(draw, (x, y + SIDE + 7 + 20 * line), text, 15, GREY, width=SIDE)
    return section


def _draw_similarity(
    teacher: str, captions: list[str], table: Tensor, marked: tuple[int, int], marked_column: int
) -> Image.Image:
    low, high = table.min().item(), table.max().item()
    section, draw = _new_section(76 + ROW * len(captions) + 26)
    _write(draw, (MARGIN, 0), teacher, 22, width=WIDTH - 2 * MARGIN - 700)
    legend = (
        f"cosine similarity of captions and augmentations, {low:.2f} (light) to {high:.2f} (dark)"
    )
    _write(draw, (WIDTH - MARGIN, 4), legend, 17, GREY, "ra")
    columns = table.shape[1]
    cell = min((WIDTH - 2 * MARGIN - LABELS) / columns, 64)
    left, top = MARGIN + LABELS, 64
    for column in range(columns):
        color = CHOSEN if column == marked_column else GREY
        _write(draw, (left + cell * (column + 0.5), top - 8), str(column), 14, color, "ms")
    for row, text in enumerate(captions):
        color = CHOSEN if row in marked else INK
        at = (left - 12, top + ROW * (row + 0.5))
        _write(draw, at, text, 16, color, "rm", width=LABELS - 12)
        for column, value in enumerate(table[row].tolist()):
            heat = (value - low) / (high - low) if high > low else 0.5
            x, y = left + cell * column, top + ROW * row
            box = [x, y, x + cell - 2, y + ROW - 2]
            fill = [round(c + heat * (h - c)) for c, h in zip(COLD, HOT, strict=True)]
            draw.rectangle(box, fill=tuple(fill))
            digits = f"{value:.2f}".replace("0.", ".", 1)
            middle = (x + cell / 2 - 1, y + ROW / 2 - 1)
            _write(draw, middle, digits, 14, "white" if heat > 0.5 else INK, "mm")
            if column == marked_column and row in marked:
                draw.rectangle(box, outline=CHOSEN, width=3)
    return section
