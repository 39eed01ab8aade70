"""Find out whether stored crop boxes belong to images of another size.

Crop boxes are stored in pixels and are valid for one image size only. Together, the boxes of a
sample cover nearly all of that image. If the image at hand is larger, the boxes leave a part of it
uncovered; if it is smaller, they exceed it. The expected coverage depends on the number of boxes,
on the augmentation and on the shape of the images. The module therefore samples as many boxes again
for images of the same sizes, and compares.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from dr.transforms import Compose

DRAWN = 200  # sets of boxes that are sampled again in each shard
MIN_SAMPLES = 2  # one alone may be off by chance
LOW, HIGH = 0.9, 105  # a share to report; percent of an image that only boxes of another exceed
RARE = 0.01  # of the right size, this share of the samples is taken for wrong
ROUNDING = 2  # percent; the size of a small image is a rounded number
COMMON_SIZES = (224, 256, 336, 384, 448, 512, 640, 768, 1024, 2048)  # pixels
SETTINGS = "img2dataset's resize_mode=keep_ratio_largest and image_size={}"
WORDS = {1 / 4: "a quarter of", 1 / 3: "a third of", 1 / 2: "half", 2: "twice"}
WORDS |= {3: "three times", 4: "four times"}

Box = tuple[int, int, int, int]  # top, left, height, width
Counts = dict[str, Counter[int]]  # histograms in percent of the image, or in pixels
DIRECTIONS = ("height", "width")


class CropBoxes:
    """Measures the boxes of the samples of a shard.

    Args:
        crops: the steps of the augmentation that move pixels.
        samples: how many will be added.

    Attributes:
        counts: histograms: percent that the boxes cover in each direction, and the same of boxes
            that were sampled again; pixels of the images' longer side; and of boxes that exceed
            their image the percent of the original that they cover, and its longer side.
    """

    def __init__(self, crops: Compose, samples: int) -> None:
        steps = dict(crops.transforms)
        self.box = steps.pop("random_resized_crop", None)
        self.before = Compose(steps)
        self.repeat = -(-DRAWN // max(samples, 1))
        self.left = DRAWN
        names = ("longer side", "of original", "longer side of original", "beyond")
        self.counts: Counts = {name: Counter() for name in names}
        for direction in DIRECTIONS:
            self.counts |= {direction: Counter(), f"drawn {direction}": Counter()}

    def add(
        self, img: Image.Image, params: list[dict], read_about: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Measure the boxes of a sample.

        Args:
            img: its image, of any mode.
            params: of its augmentations.
            read_about: returns its json, which may have the size of the original.
        """
        if self.box is None:
            return
        try:
            img = self.before.reapply(img, params[0])[0]
        except ValueError:  # an earlier step, which is reported elsewhere
            return
        boxes = [entry["random_resized_crop"] for entry in params]
        size = img.height, img.width
        self._count("", boxes, size)
        self.counts["longer side"][max(size)] += 1
        if any(top + h > size[0] or left + w > size[1] for top, left, h, w in boxes):
            self.counts["beyond"][1] += 1
            if not self.before.transforms:
                self._compare_with_original(boxes, size, read_about())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.left)
            for _ in range(min(self.repeat, self.left)):
                self._count("drawn ", [self.box.sample_params(img) for _ in boxes], size)
                self.left -= 1

    def _count(self, prefix: str, boxes: list[Box], size: tuple[int, int]) -> None:
        for direction, share in zip(DIRECTIONS, cover(boxes, size), strict=True):
            self.counts[prefix + direction][min(round(100 * share), 1000)] += 1

    def _compare_with_original(
        self, boxes: list[Box], size: tuple[int, int], about: Mapping[str, Any]
    ) -> None:
        height, width = about.get("original_height"), about.get("original_width")
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            return
        fits = all(top + h <= height and left + w <= width for top, left, h, w in boxes)
        if fits and max(height, width) > max(size):
            self.counts["of original"][round(100 * max(cover(boxes, (height, width))))] += 1
            self.counts["longer side of original"][max(height, width)] += 1


def cover(boxes: list[Box], size: tuple[int, int]) -> tuple[float, float]:
    """The share of an image's height and width that boxes cover together; over 1 beyond it."""
    tops, lefts = [box[0] for box in boxes], [box[1] for box in boxes]
    bottom = max(top + height for top, _, height, _ in boxes)
    right = max(left + width for _, left, _, width in boxes)
    return (bottom - min(tops)) / size[0], (right - min(lefts)) / size[1]


def merge_counts(all_counts: list[Counts]) -> Counts:
    merged: Counts = {}
    for counts in all_counts:
        for name, counter in counts.items():
            merged.setdefault(name, Counter()).update(counter)
    return merged


def quantile(counter: Counter[int], share: float) -> int:
    """The least value that this share of the counted ones does not exceed; 0.5: the median."""
    below, values = 0, sorted(counter)
    for value in values:
        below += counter[value]
        if below >= share * counter.total():
            return value
    return 0


def judge(counts: Counts) -> dict[str, Any] | None:
    """The report on the boxes of all samples; None if there are none.

    Returns:
        ``samples``; for each direction the ``median`` share covered, the ``expected`` one, the
        shares of samples ``below_0.9`` and ``below_expected``, and the share ``off``, which
        hardly any sample of the right size is; ``verdict``, a sentence if most are of another
        size, else None.
    """
    samples = counts.get("height", Counter[int]()).total()
    if not samples:
        return None
    report: dict[str, Any] = {"samples": samples}
    for direction in DIRECTIONS:
        found, drawn = counts[direction], counts[f"drawn {direction}"]
        least, expected = quantile(drawn, RARE) - ROUNDING, quantile(drawn, 0.5)
        report[direction] = {
            "median": quantile(found, 0.5) / 100,
            "expected": expected / 100,
            "below_0.9": _share(found, 0, round(100 * LOW) - 1),
            "off": _share(found, 0, least - 1) + _share(found, HIGH + 1),
            "below_expected": _share(found, 0, expected - ROUNDING - 1),
        }
    report["verdict"] = None
    if any(_is_off(report[direction], samples) for direction in DIRECTIONS):
        report["verdict"] = _describe(counts, report)
    return report


def _share(counter: Counter[int], first: int, last: float = float("inf")) -> float:
    """The share of the counted values that are in this range."""
    return sum(n for value, n in counter.items() if first <= value <= last) / counter.total()


def _is_off(numbers: dict[str, float], samples: int) -> bool:
    """Whether most boxes belong to another image size.

    A few boxes vary so much that even half the size is not rare. Then many samples together tell:
    of the right size, half of them cover less than expected, within three standard deviations.
    """
    if samples >= MIN_SAMPLES and numbers["off"] > 0.5:
        return True
    is_less = numbers["median"] < LOW * numbers["expected"]
    return is_less and numbers["below_expected"] > 0.5 + 1.5 / samples**0.5


def _describe(counts: Counts, report: dict[str, Any]) -> str:
    """The image size that the boxes belong to, and what to do."""
    height, width = (
        report[direction]["median"] / max(report[direction]["expected"], 0.01)
        for direction in DIRECTIONS
    )
    if not 0.85 < height / max(width, 0.01) < 1.18:
        return (
            f"boxes belong to images of another shape, {height:.2f} times this height and "
            f"{width:.2f} times this width: download them without a change of shape"
        )
    factor = (height * width) ** 0.5
    nearest = min(WORDS, key=lambda known: abs(factor / known - 1))
    times = WORDS[nearest] if abs(factor / nearest - 1) < 0.06 else f"{factor:.2f} times"
    pixels = factor * quantile(counts["longer side"], 0.5)
    advice = f"download them at that size, {_pixels(pixels)} on the longer side ("
    advice += SETTINGS.format(_pixels(pixels)) + ")"
    originals = counts["of original"]
    if originals.total() > counts["beyond"].total() / 2 > 0:
        share = quantile(originals, 0.5) / 100 / max(report["height"]["expected"], 0.01)
        setting = "img2dataset's resize_mode=no"
        if share <= 0.9:
            longer = share * quantile(counts["longer side of original"], 0.5)
            setting = SETTINGS.format(_pixels(longer))
        advice = f"they fit the originals by their json: download them with {setting}"
    return f"boxes belong to images of about {times} this size: {advice}"


def _pixels(number: float) -> int:
    """About as many pixels: a common size that is near, else two digits of the number."""
    nearest = min(COMMON_SIZES, key=lambda size: abs(size - number))
    return nearest if abs(nearest - number) < 0.04 * number else int(float(f"{number:.2g}"))
