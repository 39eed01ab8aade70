"""The WebDataset stages that make training batches of joined shards.

OpenCLIP's pipeline is shards → tar reader → shuffle → decode → batch. The patch puts six stages of ours into it:

    shards → ``shards`` → ``open`` → ``read`` → shuffle → ``prepare`` → ``used`` → batch → ``report``

``open`` reads tars (plain training: OpenCLIP's own reader does). ``read`` keeps what training needs of a sample, before
the shuffle buffer: with ``--dataset-reinforcement`` one drawn augmentation, its captions and their embeddings, else the
image and caption. ``prepare`` (reinforced training only, in the place of OpenCLIP's own decoding) makes tensors; pixels
stay uint8 until they are on the device. ``shards`` and ``used`` count, so that a worker that finds nothing it can use
stops the run instead of looping for ever. A bad sample is skipped with a counted warning and costs nothing else;
``report`` sends the counts along with the batches. Sampling without replacement has no such pipeline: see ``loader``.
"""

import json
import logging
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import default_collate, get_worker_info
from torchvision.transforms import InterpolationMode

from .sample import (
    IMAGE_MEMBERS,
    PLAIN_MEMBERS,
    REINFORCED_MEMBERS,
    USED_MEMBERS,
    BadSample,
    decode_image,
    draw,
    missing,
)
from .tar import read_samples
from .transforms import compose_from_config, split_for_device

# A worker gives up after all of its shards, or this many, and a shuffle buffer's worth of samples beyond, when not one
# sample of them could be used. DataComp-12M has 12,500 samples in a shard.
SHARDS_WITHOUT_A_USABLE_SAMPLE = 10
SHUFFLE_BUFFER = 5000  # OpenCLIP's _SAMPLE_SHUFFLE_SIZE
# Samples that are drawn from at once: between images it takes up to twice as long, as caches have forgotten it.
BLOCK = 64
BLOCK_BYTES = 2**25  # at which a block of larger samples ends; usual ones make 19 MB
WARNINGS_OF_A_KIND = 5  # then the 10th, the 100th, …


class UsableSamples:
    """What one worker has opened, read, skipped and used.

    A worker that has used one sample may go on for ever where shards are drawn with replacement; where it goes over its
    shards in passes, each pass has to hold one.
    """

    def __init__(self, num_shards: int, members: dict[str, tuple[str, ...]]):
        self.limit = min(num_shards, SHARDS_WITHOUT_A_USABLE_SAMPLE)
        self.members = members
        self.skipped: Counter[str] = Counter()  # by reason, since the worker started
        self.unreported: Counter[str] = Counter()  # of these, since the last batch
        self.used_ever = self.drawn_ever = False
        self.read = self.read_earlier = self.reported = 0
        self.start()

    def start(self) -> None:
        self.read_earlier += self.read
        self.opened: set[str] = set()
        self.read = self.used = 0  # samples in this pass
        self.enough: int | None = None  # samples read after which the worker gives up
        self.reasons: Counter[str] = Counter()

    def shards(self, src: Iterable) -> Iterator:
        """A stage over the shards that the tar reader is about to open."""
        self.start()
        for shard in src:
            if len(self.opened) >= self.limit and not self.used_ever:
                self.enough = self.enough or self.read + SHUFFLE_BUFFER
                if not self.read or self.read >= self.enough:
                    self.give_up()
            self.opened.add(shard["url"])
            yield shard

    def count_read(self, src: Iterable) -> Iterator:
        """A stage over the samples that come out of the shards."""
        for sample in src:
            self.read += 1
            yield sample

    def count_used(self, src: Iterable) -> Iterator:
        """A stage over the samples that are about to be batched."""
        for sample in src:
            self.used += 1
            self.used_ever = True
            yield sample
        if not self.used:  # the end of a pass, where shards are not drawn for ever
            self.give_up()

    def skip(self, sample: dict, error: BadSample) -> None:
        """Count a sample that is left out, and say so."""
        for counts in (self.reasons, self.skipped, self.unreported):
            counts[error.reason] += 1
        count = self.skipped[error.reason]
        if count <= WARNINGS_OF_A_KIND or str(count).rstrip("0") == "1":
            logging.warning(
                f"Skipped sample {sample.get('__key__')} of {sample.get('__url__')}: {error} "
                f"(number {count} for this reason in this worker)"
            )

    def decoding_failed(self, error: Exception) -> bool:
        """A handler of WebDataset's, for OpenCLIP's own decoding: as its log_and_continue, but it counts."""
        self.unreported["undecodable image or caption"] += 1
        logging.warning(f"Handling webdataset error ({error!r}). Ignoring.")
        return True

    def news(self) -> tuple[int, dict[str, int]]:
        """Since the last call: samples read, and samples skipped by reason."""
        read, skipped = self.read_earlier + self.read - self.reported, dict(self.unreported)
        self.reported, self.unreported = self.reported + read, Counter()
        return read, skipped

    def report(self, src: Iterable) -> Iterator[tuple]:
        """A stage over batches: each with what was read and skipped for it, for ``loader.CountingLoader``."""
        for batch in src:
            yield batch, self.news()

    def give_up(self) -> None:
        worker = get_worker_info()
        needs = "; ".join(
            f"{name} ({' or '.join(extensions)})" for name, extensions in self.members.items()
        )
        found = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(8))
        raise RuntimeError(
            f"worker {worker.id if worker else 0} went through {len(self.opened)} shards and {self.read} samples, and "
            f"not one sample can be used. Found: {found or 'no readable sample in the shards, see warnings above'}. "
            f"Training needs in each sample: {needs}. Joined shards come from scripts/join_datacompdr12m.sh."
        )


def keep_image_and_caption(samples: UsableSamples, src: Iterable[dict]) -> Iterator[dict]:
    """Drop the members that plain training doesn't use.

    Not only for speed: OpenCLIP decodes every member that is left, and WebDataset unpickles ``pth`` and ``pickle``.
    """
    for sample in src:
        samples.read += 1
        lacks = missing(sample, PLAIN_MEMBERS)
        samples.reasons.update(lacks)
        samples.unreported.update(lacks[:1])
        yield {
            name: data
            for name, data in sample.items()
            if name in (*IMAGE_MEMBERS, "txt") or name.startswith("__")
        }


def student_augmentation(
    config: dict, preprocess: Callable, interpolation: str | None = None
) -> dict:
    """The stored augmentation as the student sees it.

    Output size, interpolation and normalisation are those of the student's own preprocessing, whatever the config says.

    Args:
        config: an ``image_augmentation`` object.
        preprocess: OpenCLIP's training transform of the student.
        interpolation: ``--image-interpolation``, where it was given (the training transform doesn't follow it).
    """
    crop = next(
        (t for t in preprocess.transforms if hasattr(t, "size") and hasattr(t, "interpolation")),
        None,
    )
    normalize = next(
        (t for t in preprocess.transforms if hasattr(t, "mean") and hasattr(t, "std")), None
    )
    if crop is None or normalize is None:
        raise ValueError(
            f"the student's preprocessing has no crop or no normalisation to follow: {preprocess}"
        )
    if interpolation in (None, "random"):
        interpolation = crop.interpolation
        interpolation = (
            interpolation.value if isinstance(interpolation, InterpolationMode) else "bicubic"
        )
    size = crop.size if isinstance(crop.size, int) else list(crop.size)
    as_list = [[float(v) for v in values] for values in (normalize.mean, normalize.std)]
    return {
        **config,
        "random_resized_crop": {
            **config["random_resized_crop"],
            "size": size,
            "interpolation": interpolation,
        },
        "to_tensor": {"enable": True},
        "normalize": dict(zip(("mean", "std"), as_list, strict=True)),
    }


def tar_to_samples(src: Iterable[dict]) -> Iterator[dict]:
    """Read the members that reinforced training uses out of tars; a damaged one is told, and given up where it breaks.

    Yields:
        Members by extension, with ``__key__`` and ``__url__``, grouped as WebDataset does: members of one sample stand
        side by side, and their key is what comes before the first dot of the file's name.
    """
    for shard in src:
        url = shard["url"]
        try:
            with wds.gopen(url) as stream:
                for key, members in read_samples(stream, USED_MEMBERS.__contains__):
                    yield {"__key__": key, "__url__": url, **members}
        except Exception as error:  # streams of all kinds: files, pipes, HTTP
            logging.warning(f"Gave up shard {url}: {type(error).__name__}: {error}")


def draw_reinforcements(samples, compose, width, mix_ratio, src: Iterable[dict]) -> Iterator[dict]:
    """Choose an augmentation, captions and their embeddings for each sample; see ``reinforcement.draw``."""
    for block in _blocks(samples.count_read(src)):
        drawn = []
        for sample in block:
            try:
                # torch seeds `random` for each rank and worker
                drawn.append(draw_from(samples, sample, compose, random, mix_ratio, width))
            except BadSample as error:
                samples.skip(sample, error)
        block.clear()  # not to be kept while images are decoded
        yield from drawn


def _blocks(src: Iterable[dict]) -> Iterator[list[dict]]:
    block, size = [], 0
    for sample in src:
        block.append(sample)
        size += sum(map(len, sample.values()))
        if len(block) == BLOCK or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    yield block


def draw_from(samples, sample: dict, compose, rng, mix_ratio, width) -> dict:
    """``reinforcement.draw``; the first sample's embeddings must be as wide as the options say."""
    try:
        drawn = draw(sample, compose, rng, mix_ratio, width)
    except BadSample as error:
        if error.reason == "embedding width" and not samples.drawn_ever:
            raise ValueError(
                f"{sample.get('__key__')} of {sample.get('__url__')}: {error} by --distill-teacher-dimension"
            ) from error
        raise
    samples.drawn_ever = True
    return drawn


def apply_reinforcements(samples, compose, src: Iterable[dict]) -> Iterator[dict]:
    """Decode and augment drawn samples; see :func:`augment`."""
    for sample in src:
        try:
            augmented = augment(sample, compose)
        except BadSample as error:
            samples.skip(sample, error)
            continue
        yield augmented


def augment(sample: dict, compose) -> dict:
    """A drawn sample with its ``image`` decoded and augmented: uint8 ``[H, W, 3]``."""
    img = decode_image(sample)
    try:
        image, _ = compose.reapply(img, sample["params"])
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    return {
        **sample,
        "image": image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)),
    }


def batch_reinforced(
    samples, tokenizer, statistics, batch_size, src: Iterable[dict]
) -> Iterator[tuple]:
    """Tokenise and stack; what is left over at the end is dropped, as OpenCLIP does in training.

    Yields:
        The batches of :func:`training_stages`.
    """
    for rows, texts in tokenised_batches(samples, tokenizer, batch_size, src):
        # default_collate: a worker writes the batch where the trainer finds it, without another copy
        images = default_collate([row["image"] for row in rows])
        image_emb, text_emb = (
            default_collate([row[n].float() for row in rows]) for n in ("image_emb", "text_emb")
        )
        yield images, texts, image_emb, text_emb, statistics


def tokenised_batches(
    samples, tokenizer, batch_size, src: Iterable[dict]
) -> Iterator[tuple[list[dict], torch.Tensor]]:
    """Samples in batches, and their captions as int64 ``[B, captions, L]``.

    A batch's captions are tokenised at once: one by one between images it takes three times as long, as neither finds
    the processor's caches as it left them.
    """

    def tokenised(rows):
        captions = [caption for row in rows for caption in row["captions"]]
        return tokenizer(captions).unflatten(0, (len(rows), -1))

    rows = []
    for sample in src:
        rows.append(sample)
        if len(rows) < batch_size:
            continue
        try:
            texts = tokenised(rows)
        except Exception:  # tokenizers raise what they like; only whose captions it was is left out
            rows = [row for row in rows if _can_be_tokenised(samples, tokenised, row)]
            continue
        yield rows, texts
        rows = []


def _can_be_tokenised(samples, tokenised, row: dict) -> bool:
    try:
        tokenised([row])
    except Exception as error:
        samples.skip(row, BadSample("captions that can't be tokenised", repr(error)))
        return False
    return True


def reinforcement_settings(args, preprocess: Callable) -> tuple:
    """From the options: the augmentation up to uint8, mean and standard deviation ``[2, 3]``, ΣD_k and the mix ratio;
    None for the last two where they are not given."""
    with open(args.dataset_reinforcement_config) as file:
        config = json.load(file)["reinforce"]["image_augmentation"]
    config = student_augmentation(config, preprocess, args.image_interpolation)
    compose, statistics = split_for_device(compose_from_config(config))
    dimensions = args.distill_teacher_dimension
    width = None if dimensions == [-1] else sum(dimensions)
    mixed = args.dataset_reinforcement_mix_synthetic
    return (
        compose,
        statistics,
        width,
        args.dataset_reinforcement_mix_synthetic_ratio if mixed else None,
    )


def outlive_sigterm(*_) -> None:
    """In a loader's worker: let nobody but the trainer end it.

    SIGTERM goes to all processes of a job, and the trainer needs batches for the step that it has to take before it can
    save. Its own ``terminate`` is the same signal, so that the sender has to be looked at.
    """
    if get_worker_info():
        _obey_parent_only(os.getpid())


@lru_cache(1)  # once in a process
def _obey_parent_only(own_id: int) -> None:
    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads inherit it
    threading.Thread(target=wait, daemon=True).start()


def _outliving_sigterm(samples, src: Iterable) -> Iterator:
    outlive_sigterm()
    yield from samples.shards(src)


def training_stages(
    args, preprocess: Callable, tokenizer: Callable, is_train: bool, num_shards: int
) -> SimpleNamespace:
    """The stages that the patch puts into OpenCLIP's pipeline.

    Args:
        args: the trainer's options.
        preprocess: OpenCLIP's transform of the student.
        tokenizer: list of str to int64 ``[captions, L]``.
        is_train: whether these are training data; validation data are never reinforced.
        num_shards: how many there are.

    Returns:
        ``shards``, ``open``, ``read``, ``used``, ``report`` as in the module's docstring, ``prepare``: a list of stages
        up to the batches ``(images uint8 [B, H, W, 3], texts [B, captions, L], image_emb [B, ΣD_k], text_emb [B,
        captions, ΣD_k], statistics [2, 3])``, which ``step.unpack_batch`` takes, and ``decoding_failed``, which handles
        what OpenCLIP's own decoding raises. ``open`` and ``prepare`` are None where OpenCLIP's own stages serve.
    """
    reinforced = is_train and args.dataset_reinforcement
    samples = UsableSamples(num_shards, REINFORCED_MEMBERS if reinforced else PLAIN_MEMBERS)
    stages = SimpleNamespace(
        shards=samples.shards,
        open=None,
        read=partial(keep_image_and_caption, samples),
        prepare=None,
        used=samples.count_used
        if is_train
        else iter,  # with few validation shards some workers have none
        decoding_failed=samples.decoding_failed,
        report=samples.report if is_train else iter,
    )
    if is_train and getattr(args, "save_every_n_steps", 0):
        stages.shards = partial(_outliving_sigterm, samples)
    if reinforced:
        compose, statistics, width, mix_ratio = reinforcement_settings(args, preprocess)
        stages.open = tar_to_samples
        stages.read = partial(draw_reinforcements, samples, compose, width, mix_ratio)
        stages.prepare = [
            partial(apply_reinforcements, samples, compose),
            samples.count_used,
            partial(batch_reinforced, samples, tokenizer, statistics, args.batch_size),
        ]
    return stages
