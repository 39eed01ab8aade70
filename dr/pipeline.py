"""The two functions and the class that the patch calls in OpenCLIP's ``data.py``.

``make_pass_loader``   makes the whole loader, for sampling without replacement
``adapt_stages``       changes the WebDataset stages of OpenCLIP's pipeline
``StreamLoader``       wraps OpenCLIP's loader of that pipeline

In reinforced training with replacement OpenCLIP chooses the shards, and the module ``chain`` makes
batches of their samples. The baseline keeps OpenCLIP's stages, with stages between them that count
samples.
"""

import contextlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import webdataset as wds
from torchvision.transforms import InterpolationMode

from .batch import Batch
from .chain import Counts, Processor, SkipLimit, Streak, Tally, Tokenizer, batches, shuffled
from .loader import PassLoader, StreamLoader, ignore_sigterm
from .sample import (
    IMAGE_MEMBERS,
    MAX_CAPTION,
    PLAIN_MEMBERS,
    BadSample,
    BaselineProcessor,
    ReinforcedProcessor,
    caption,
    missing,
)
from .sampling import EpochChoice, RandomChoice
from .sources import MAX_UNREADABLE_SHARDS, Skipped, stream
from .tar import KNOWN_MEMBERS, Unknown
from .transforms import compose_from_config, split_for_device

__all__ = ["StreamLoader", "adapt_stages", "make_pass_loader"]

SHUFFLE_BUFFER, SHUFFLE_INITIAL = 5000, 1000  # as OpenCLIP's _SAMPLE_SHUFFLE_SIZE and …_INITIAL

Stage = Callable[[Iterable], Iterator]


def make_pass_loader(
    args: Any, preprocess: Callable, tokenizer: Tokenizer, shards: Sequence[str]
) -> PassLoader:
    """Make the loader of ``--dataset-without-replacement``.

    Args:
        args: the trainer's options.
        preprocess: OpenCLIP's training transform of the student.
        tokenizer: list of str to int64 ``[captions, L]``.
        shards: paths of tars.
    """
    return PassLoader(args, make_processor(args, preprocess), tokenizer, shards)


def adapt_stages(
    stages: Sequence,
    args: Any,
    preprocess: Callable,
    tokenizer: Tokenizer,
    is_train: bool,
    num_samples: int,
) -> list:
    """Change the stages of OpenCLIP's pipeline.

    Args:
        stages: OpenCLIP's stages, from the list of shards to batches.
        args, preprocess, tokenizer: see :func:`make_pass_loader`.
        is_train: whether these are training data; validation data are never reinforced.
        num_samples: number of samples in an epoch, over all ranks.

    Returns:
        For training, stages whose last one yields ``(Batch, Counts)``. For validation, OpenCLIP's
        stages, which decode only images and captions.
    """
    if not is_train:
        *read, select, decode, rename, convert, to_tuple, batch = stages
        return [*read, keep_image_and_caption, select, decode, rename, convert, to_tuple, batch]
    *shards, read_tars, shuffle, select, decode, rename, convert, _to_tuple, _batch = stages
    limit = SkipLimit(-(-num_samples // args.world_size), args.max_skipped_fraction)
    processor = make_processor(args, preprocess)
    tally = Tally(processor.members, limit)
    if args.dataset_reinforcement:
        shared_epoch = None
        if args.dataset_reinforcement_sample_sequential:
            shared_epoch = next(stage.epoch for stage in shards if hasattr(stage, "epoch"))
        chain = partial(
            _reinforced_batches,
            processor=processor,
            tokenizer=tokenizer,
            batch_size=args.batch_size,
            tally=tally,
            outlive_sigterm=bool(args.save_every_n_steps),
            shared_epoch=shared_epoch,
        )
        return [*shards, chain]
    baseline = BaselineStages(tally, outlive_sigterm=bool(args.save_every_n_steps))
    return [
        *shards,
        baseline.open_shards,
        read_tars,
        baseline.check_members,
        keep_image_and_caption,
        shuffle,
        select,
        baseline.start_sample,
        decode,
        rename,
        convert,
        baseline.finish_sample,
        wds.to_tuple("image", "text", "__key__"),
        wds.batched(args.batch_size, partial=False),
        baseline.finish_batch,
    ]


def _reinforced_batches(
    shards: Iterable[dict],
    processor: Processor,
    tokenizer: Tokenizer,
    batch_size: int,
    tally: Tally,
    outlive_sigterm: bool,
    shared_epoch: Any,
) -> Iterator[tuple[Batch, Counts]]:
    """A stage: make batches of the samples in shards.

    Args:
        shared_epoch: OpenCLIP's counter of epochs, if augmentations and captions are chosen by it;
            None: they are chosen at random.
    """
    if outlive_sigterm:
        ignore_sigterm()
    choice = EpochChoice(shared_epoch.get_value()) if shared_epoch is not None else RandomChoice()
    samples = stream(shards, processor.wanted.__contains__, choice)
    rng = random.Random()
    shuffle = partial(shuffled, size=SHUFFLE_BUFFER, initial=SHUFFLE_INITIAL, rng=rng)
    for batch, _ in batches(samples, processor, tokenizer, batch_size, tally, shuffle):
        yield batch, tally.take_counts()


# --- the baseline ---------------------------------------------------------------------------------
def keep_image_and_caption(samples: Iterable[dict]) -> Iterator[dict]:
    """A stage: drop all other members. OpenCLIP would decode them, and WebDataset unpickles."""
    kept = {*IMAGE_MEMBERS, "txt"}
    for sample in samples:
        sample = {n: data for n, data in sample.items() if n in kept or n.startswith("__")}
        if len(sample.get("txt", b"")) > MAX_CAPTION:
            with contextlib.suppress(BadSample):  # OpenCLIP's decoding drops the sample
                sample["txt"] = caption(sample).encode()
        yield sample


class BaselineStages:
    """Stages between OpenCLIP's stages.

    They count samples that OpenCLIP's stages skip silently, and stop the run when there are too
    many. One object serves one worker: its stages share a tally.
    """

    def __init__(self, tally: Tally, outlive_sigterm: bool):
        self.tally, self.outlive_sigterm = tally, outlive_sigterm
        self.complete, self.decodable = Streak(tally), Streak(tally)
        self.empty_shards = 0  # in a row
        self.started: dict | None = None  # the sample that is being decoded
        self.used = False

    def open_shards(self, shards: Iterable[dict]) -> Iterator[dict]:
        """A stage over shards: count those in a row that have no readable sample."""
        if self.outlive_sigterm:
            ignore_sigterm()
        self.used = False
        for shard in shards:
            if self.empty_shards >= MAX_UNREADABLE_SHARDS:
                raise RuntimeError(
                    f"{self.empty_shards} shards in a row have no readable sample; the next one is "
                    f"{shard['url']}. Check --train-data and the storage."
                )
            self.empty_shards += 1
            yield shard

    def check_members(self, samples: Iterable[dict]) -> Iterator[dict]:
        """A stage over samples: count those that OpenCLIP's ``select`` will drop."""
        for sample in samples:
            self.empty_shards = 0
            self.tally.read += 1
            if lacks := missing(sample, PLAIN_MEMBERS):
                self._skip(sample, BadSample(lacks[0], _find_unknown(sample) or ""), self.complete)
            else:
                self.complete.end()
            yield sample

    def start_sample(self, samples: Iterable[dict]) -> Iterator[dict]:
        """A stage before decoding: if the previous sample was not yielded, it is undecodable."""
        for sample in samples:
            if self.started is not None:
                undecodable = BadSample("undecodable image or caption")
                self._skip(self.started, undecodable, self.decodable)
            self.started = sample
            yield sample

    def finish_sample(self, samples: Iterable[dict]) -> Iterator[dict]:
        """A stage after decoding: count the sample as used."""
        for sample in samples:
            self.started = None
            self.decodable.end()
            self.used = self.tally.has_used = True
            yield sample
        if not self.used:
            self.tally.give_up(self.tally.skipped)

    def finish_batch(self, samples: Iterable[tuple]) -> Iterator[tuple[Batch, Counts]]:
        """A stage over batches: yield them with their counts."""
        for images, texts, uids in samples:
            yield Batch(images, texts, list(uids)), self.tally.take_counts()

    def _skip(self, sample: dict, error: BadSample, streak: Streak) -> None:
        key, url = sample["__key__"], sample["__url__"]
        self.tally.skip(Skipped(error.reason, str(error), key, url, error.unknown))
        streak.add(error.reason)


def _find_unknown(sample: dict) -> Unknown | None:
    """The unknown members of a sample that OpenCLIP's reader has grouped."""
    names = [name for name in sample if name not in KNOWN_MEMBERS and not name.startswith("__")]
    return Unknown(len(names), f"{sample['__key__']}.{names[0]}") if names else None


# --- options --------------------------------------------------------------------------------------
def make_processor(args: Any, preprocess: Callable) -> Processor:
    """Make the processor that the trainer's options ask for."""
    if not args.dataset_reinforcement:
        return BaselineProcessor(preprocess)
    with open(args.dataset_reinforcement_config, encoding="utf-8-sig") as file:
        config = json.load(file)["reinforce"]["image_augmentation"]
    config = adapt_augmentation(config, preprocess, args.image_interpolation)
    compose, statistics = split_for_device(compose_from_config(config))
    mix_ratio = None
    if args.dataset_reinforcement_mix_synthetic:
        mix_ratio = args.dataset_reinforcement_mix_synthetic_ratio
    dimensions = args.distill_teacher_dimension
    width = None if dimensions == [-1] else sum(dimensions)
    return ReinforcedProcessor(
        compose,
        statistics,
        mix_ratio,
        width,
        re.compile(args.dataset_reinforcement_syn_text_key_regex),
        args.dataset_reinforcement_filter_image_size,
    )


def adapt_augmentation(config: dict, preprocess: Any, interpolation: str | None = None) -> dict:
    """The stored augmentation as the student sees it.

    Output size, interpolation and normalisation are those of the student's preprocessing.

    Args:
        config: an ``image_augmentation`` object.
        preprocess: OpenCLIP's training transform of the student.
        interpolation: ``--image-interpolation``, which the training transform does not follow.
    """

    def find(*fields: str) -> Any:
        return next((t for t in preprocess.transforms if all(hasattr(t, f) for f in fields)), None)

    crop, normalize = find("size", "interpolation"), find("mean", "std")
    if crop is None or normalize is None:
        raise ValueError(
            f"the student's preprocessing has no crop or no normalisation: {preprocess}"
        )
    if interpolation in (None, "random"):
        interpolation = "bicubic"
        if isinstance(crop.interpolation, InterpolationMode):
            interpolation = crop.interpolation.value
    size = crop.size if isinstance(crop.size, int) else list(crop.size)
    mean, std = ([float(v) for v in values] for values in (normalize.mean, normalize.std))
    resized_crop = {**config["random_resized_crop"], "size": size, "interpolation": interpolation}
    return {
        **config,
        "random_resized_crop": resized_crop,
        "to_tensor": {"enable": True},
        "normalize": {"mean": mean, "std": std},
    }
