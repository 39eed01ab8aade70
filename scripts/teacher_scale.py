"""Suggest the teachers' logit scales for distillation from a reinforced data set.

    python scripts/teacher_scale.py datasets/mine/joined --config datasets/mine/config.json

The script reads stored embeddings of joined shards or reinforcement shards; the teachers do not
run. In batches of --batch-size samples, each teacher's softmax over the images predicts a caption's
image, and its softmax over the captions predicts an image's caption. For each
teacher and for the ensemble, whose distributions are averaged, the table gives, with original and
with synthetic captions:

    scale     the logit scale at which the pairs of the data are most probable, in steps of 5 %
    log p     the mean log-probability of a pair at this scale
    i2t, t2i  recall within a batch, image to text and text to image

The suggested DISTILL_LOGIT_SCALE is that of the captions with the higher recall: captions that do
not describe their images lower the scale. reinforce.json, which scripts/reinforce.py writes, has
the scales that the teachers learned, to compare.

Of each sample the script uses the first stored augmentation, the original caption and the last
synthetic one. Bad samples are skipped and counted.
"""

import argparse
import functools
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from lib.config import DEFAULT_CONFIG
from lib.reinforcement import STORED, Reinforcement, read_reinforcement
from lib.report import check_least, run_command
from lib.shards import ShardError, Source
from torch import Tensor
from tqdm import tqdm

from dr.sample import BadSample, check_members, embeddings
from dr.tar import read_samples

SCALES = [1.05**step for step in range(109)]  # 1 to 194
CAPTIONS = {"original": 0, "synthetic": -1}  # and the row of text_emb
READ = {"txt", "json", *(extension for extensions in STORED.values() for extension in extensions)}


class Batch(NamedTuple):
    """Pairs of a teacher's embeddings, ``[B, D_k]`` each."""

    images: Tensor
    texts: Tensor

    def log_probabilities(self, scale: float) -> tuple[Tensor, Tensor]:
        """Of the texts of each image, and of the images of each text, ``[B, B]`` each."""
        logits = scale * (self.images @ self.texts.T)
        return logits.log_softmax(1), logits.T.log_softmax(1)


class Score(NamedTuple):
    """How well pairs are found, and at which logit scale (of the ensemble: none)."""

    scale: float
    log_probability: float
    image_to_text: float
    text_to_image: float


def read_stored(file: BinaryIO) -> Iterator[dict[str, Tensor] | None]:
    """The embeddings of a shard's samples; None: the sample cannot be used.

    Raises:
        ShardError: the shard is not a whole tar.
    """
    try:
        for _, members in read_samples(file, READ.__contains__):
            try:
                check_members(members, STORED)
                stored = embeddings(members)
                finite = all(bool(array.isfinite().all()) for array in stored.values())
                yield stored if finite else None
            except BadSample:
                yield None
    except tarfile.TarError as error:
        raise ShardError(f"{file.name} is not a whole tar: {error}") from None


def read_embeddings(
    shards: Sequence[Path], reinforcement: Reinforcement, samples: int
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Read the embeddings of up to ``samples`` samples.

    Returns:
        those of the images ``[N, ΣD_k]``, those of the captions by kind, and how many samples were
        skipped.

    Raises:
        ShardError: the embeddings are not those of the config's teachers, or there are none.
    """
    rows: list[tuple[Tensor, ...]] = []
    skipped, expected = 0, sum(reinforcement.widths)
    for shard in tqdm(shards, desc="read", unit=" shards", leave=False):
        if len(rows) == samples:
            break
        with open(shard, "rb") as file:
            for stored in read_stored(file):
                if stored is None:
                    skipped += 1
                    continue
                found = stored["image_emb"].shape[1]
                if found != expected:
                    raise ShardError(
                        f"error: {shard}: found embeddings of {found} numbers, expected {expected} "
                        "of the config's teachers: give the --config that the set was made with, "
                        "or --teacher-dimension"
                    )
                texts = [stored["text_emb"][row].float() for row in CAPTIONS.values()]
                rows.append((stored["image_emb"][0].float(), *texts))
                if len(rows) == samples:
                    break
    if not rows:
        raise ShardError(f"error: no reinforced samples in {len(shards)} shards")
    images, *texts = (torch.stack(column) for column in zip(*rows, strict=True))
    return images, dict(zip(CAPTIONS, texts, strict=True)), skipped


def find_peak(values: Sequence[float], function: Callable[[float], float]) -> float:
    """The value, of ascending ones, at which a concave function is highest.

    Log-probabilities of a softmax are concave in its scale.
    """
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if function(values[middle]) < function(values[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return values[low]


def mean_of_pairs(log_probabilities: tuple[Tensor, Tensor]) -> float:
    """The mean of pairs' log-probabilities over a batch and both directions."""
    return float(sum(part.diagonal().mean() for part in log_probabilities)) / 2


def mean_log_probability(batches: Sequence[Batch], scale: float) -> float:
    """A teacher's mean log-probability of a pair."""
    return sum(mean_of_pairs(batch.log_probabilities(scale)) for batch in batches) / len(batches)


def measure(batches: Sequence[tuple[Tensor, Tensor]], scale: float) -> Score:
    """The score of log-probabilities ``[B, B]`` in both directions, of several batches."""
    recalls = [
        [(part.argmax(1) == torch.arange(len(part))).float().mean() for part in batch]
        for batch in batches
    ]
    image_to_text, text_to_image = torch.tensor(recalls).mean(0).tolist()
    mean = sum(map(mean_of_pairs, batches)) / len(batches)
    return Score(scale, mean, image_to_text, text_to_image)


def compare_teachers(
    images: Tensor, texts: Tensor, widths: list[int], size: int
) -> tuple[list[Score], Score]:
    """The scores of K teachers, each at its best scale, and of their ensemble.

    Args:
        images, texts: embeddings of pairs, ``[N, ΣD_k]``.
        widths: D_k.
        size: of a batch; the last batch, if it is smaller, is not used.
    """
    ends = range(size, len(images) + 1, size)
    blocks = zip(images.split(widths, dim=1), texts.split(widths, dim=1), strict=True)
    teachers = [[Batch(i[e - size : e], t[e - size : e]) for e in ends] for i, t in blocks]

    scores = []
    for batches in teachers:
        scale = find_peak(SCALES, functools.partial(mean_log_probability, batches))
        scores.append(measure([batch.log_probabilities(scale) for batch in batches], scale))
    scales = [score.scale for score in scores]
    averaged = []
    for parts in zip(*teachers, strict=True):  # a batch of all teachers
        each = [b.log_probabilities(scale) for b, scale in zip(parts, scales, strict=True)]
        to_texts, to_images = (
            torch.stack(direction).exp().mean(0).log() for direction in zip(*each, strict=True)
        )
        averaged.append((to_texts, to_images))
    return scores, measure(averaged, float("nan"))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", help="joined or reinforcement shards: a folder or a brace pattern")
    text = f"reinforcement config; default configs/{DEFAULT_CONFIG.name}"
    add("--config", type=Path, default=DEFAULT_CONFIG, help=text)
    text = "widths of the teachers' embeddings; default: those of the config's models"
    add("--teacher-dimension", type=int, nargs="+", metavar="D", help=text)
    text = "batch size of the softmax; default %(default)s"
    add("--batch-size", type=int, default=1024, help=text)
    add("--samples", type=int, default=8192, help="samples to read; default %(default)s")
    text = "random seed of the order of the shards; default %(default)s"
    add("--seed", type=int, default=0, help=text)
    args = parser.parse_args(arguments)
    check_least(parser, args, 2, "batch_size", "samples")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    reinforcement = read_reinforcement(args.config, args.teacher_dimension)
    source = Source.parse(args.shards, "shards")
    shards = [source.folder / name for name in source.shards()]
    if not shards:
        raise SystemExit(f"error: no shards (*.tar) in {args.shards}")
    random.Random(args.seed).shuffle(shards)
    images, texts, skipped = read_embeddings(shards, reinforcement, args.samples)
    size = min(args.batch_size, len(images))
    print(f"{len(images):,} samples in batches of {size:,}; {skipped:,} bad ones skipped\n")
    print("captions   scale   log p     i2t     t2i  teacher")
    found: dict[float, list[Score]] = {}  # by recall
    for kind in CAPTIONS:
        scores, ensemble = compare_teachers(images, texts[kind], reinforcement.widths, size)
        names = [*reinforcement.teachers, *(["ensemble"] if len(scores) > 1 else [])]
        for name, score in zip(names, [*scores, ensemble], strict=False):
            scale = f"{score.scale:6.1f}" if name != "ensemble" else " " * 6
            recalls = f"{score.image_to_text:7.1%} {score.text_to_image:7.1%}"
            print(f"{kind:9} {scale} {score.log_probability:7.3f} {recalls}  {name}")
        found[ensemble.image_to_text + ensemble.text_to_image] = scores
    scales = [score.scale for score in found[max(found)]]
    print(f'\nDISTILL_LOGIT_SCALE="{" ".join(f"{scale:.0f}" for scale in scales)}"')
    if {SCALES[0], SCALES[-1]} & set(scales):
        print("A scale at an end of the range is no suggestion: see log p and the recall.")


if __name__ == "__main__":
    run_command(main, ShardError)
