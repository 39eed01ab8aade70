"""What OpenCLIP's trainer iterates over: batches, with count kept of the samples that were skipped on the way.

``CountingLoader`` goes around the loader of the default pipeline. ``PassLoader`` is the loader of
``--dataset-without-replacement``: its workers take the positions that ``sampling`` gives their streams, read them by
random access, and send with each batch the cursor that the stream has after it. The trainer's process keeps the cursors
of the batches that it has taken: with them an epoch starts and a run resumes, at the very next batch.
"""

import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from . import checkpoint
from .data import (
    SHARDS_WITHOUT_A_USABLE_SAMPLE,
    SHUFFLE_BUFFER,
    UsableSamples,
    augment,
    batch_reinforced,
    draw_from,
    outlive_sigterm,
    reinforcement_settings,
    tokenised_batches,
)
from .sample import PLAIN_MEMBERS, REINFORCED_MEMBERS, BadSample, caption, decode_image, missing
from .sampling import Cursor, Order, former_layouts, positions
from .shard_reader import ShardReader, count_samples, sizes_beside

FEW_SKIPPED = 20  # fewer than these are never too many


class CountingLoader:
    """Batches of an epoch, and what was skipped in it.

    Attributes:
        num_batches, num_samples: in an epoch, as OpenCLIP's trainer reads them.
        first: how many batches of the present epoch were taken before the run was resumed.
        read: samples that this rank has read in the present epoch; with a shuffle buffer, more than it has used.
        skipped: those of them that it has skipped, by reason.
        cursors: of this rank's streams, if it has any.
    """

    cursors: Sequence[Cursor] = ()

    def __init__(self, batches: Iterable, num_batches: int, num_samples: int, args):
        self.batches, self.num_batches, self.num_samples = batches, num_batches, num_samples
        self.local_samples = num_batches * args.batch_size  # of this rank, in an epoch
        self.max_skipped_fraction = args.max_skipped_fraction
        self.read, self.skipped = 0, Counter()
        resumed = checkpoint.resumed(args)
        self.first = resumed.get("step", 0) * args.accum_freq
        if resumed and self.first and resumed["steps_in_epoch"] != num_batches // args.accum_freq:
            raise SystemExit(
                f"error: {args.resume} is {resumed['step']} steps into an epoch of {resumed['steps_in_epoch']}, but an "
                f"epoch has {num_batches // args.accum_freq} now: keep --train-num-samples and the global batch"
            )
        if resumed:
            same = len(resumed["ranks"]) == args.world_size
            ranks = (
                resumed["ranks"][args.rank : args.rank + 1]
                if same
                else resumed["ranks"]
                if args.rank == 0
                else []
            )
            for rank in ranks:
                self.read += rank["read"]
                self.skipped.update(rank["skipped"])

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator:
        for batch, (read, skipped) in self._epoch(self.num_batches - self.first):
            self.read += read
            self.skipped.update(skipped)
            self._check_skipped()
            yield batch
        self.first = 0

    def _epoch(self, batches: int) -> Iterable[tuple]:
        """What is left of an epoch: batches, each with how many samples were read and skipped for it."""
        return islice(self.batches, batches)

    def sampling(self, cursors: list[Cursor]) -> dict:
        """What a checkpoint holds of the sampling, given the cursors of all ranks' streams."""
        return {}

    def _check_skipped(self) -> None:
        """Stop as soon as it is certain that too much of the epoch will have been skipped."""
        skipped = self.skipped.total()
        fraction = skipped / max(self.read, skipped + self.local_samples)
        if fraction > self.max_skipped_fraction and skipped >= FEW_SKIPPED:
            raise RuntimeError(
                f"{skipped} samples were skipped in an epoch of {self.local_samples} on this rank ({fraction:.1%}, "
                f"more than --max-skipped-fraction {self.max_skipped_fraction}): {listed(self.skipped)}. "
                "Warnings above name samples and shards: mend the data, or allow more."
            )

    def report_skipped(self, args, epoch: int, writer=None) -> None:
        """At the end of an epoch: say what was skipped on all ranks, log it as ``data/skipped_…``, and start anew."""
        ranks = checkpoint.gathered(args, (self.read, dict(self.skipped)))
        self.read, self.skipped = 0, Counter()
        if args.rank != 0:
            return
        read, counts = (
            sum(read for read, _ in ranks),
            sum((Counter(skipped) for _, skipped in ranks), Counter()),
        )
        fraction = counts.total() / max(read, 1)
        logging.info(
            f"Skipped in epoch {epoch}: {counts.total()} of {read} samples ({fraction:.2%})"
            f"{': ' * bool(counts)}{listed(counts)}"
        )
        step = self.num_batches // args.accum_freq * (epoch + 1) - 1
        scalars = {"data/skipped_fraction": fraction}
        for reason, count in counts.items():
            scalars["data/skipped_" + re.sub(r"\W+", "_", reason).strip("_")] = count
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if args.wandb:
            import wandb

            wandb.log({**scalars, "step": step}, step=step)


def listed(counts: Counter) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())


class PassLoader(CountingLoader):
    """Batches of a run in passes over all samples.

    Args:
        args: the trainer's options.
        preprocess: OpenCLIP's transform of the student.
        tokenizer: list of str to int64 ``[captions, L]``.
        shards: paths of tars.
    """

    def __init__(self, args, preprocess: Callable, tokenizer: Callable, shards: Sequence[str]):
        self.shards, self.workers = list(shards), args.workers
        self.layout = [args.world_size, max(1, args.workers)]
        self.seed, self.names = args.seed, _relative(self.shards)
        self.own = slice(args.rank * self.layout[1], (args.rank + 1) * self.layout[1])
        self.taken, self.former = 0, []  # batches taken on this layout; see sampling.pieces_of
        saved = checkpoint.resumed(args).get("sampling")
        self.sizes = self._same_data(args, saved) if saved else _sizes(args, self.shards)
        if not sum(self.sizes):
            raise SystemExit(
                f"error: no sample in {len(self.shards)} shards of --train-data {args.train_data}"
            )
        self.cursors: list[Cursor] = [(0, 0)] * self.layout[1]  # of this rank's streams
        if saved:
            cursors = [tuple(cursor) for cursor in saved["cursors"]]
            if saved["layout"] == self.layout:
                self.cursors, self.taken, self.former = (
                    cursors[self.own],
                    saved["taken"],
                    saved["former"],
                )
            else:
                self.former = [*former_layouts(saved["former"], cursors), cursors]
                self.cursors = [(min(cursors)[0], 0)] * self.layout[1]
                logging.info(
                    f"What is left of the passes is dealt anew: to {self.layout[0]} ranks x {self.layout[1]} workers, "
                    f"after {saved['layout'][0]} x {saved['layout'][1]}"
                )
        global_batch = args.batch_size * args.world_size
        num_batches = math.ceil(
            (args.train_num_samples or sum(self.sizes)) / (global_batch * args.accum_freq)
        )
        num_batches *= args.accum_freq
        self.streams = _Streams(args, preprocess, tokenizer, self.shards, self.sizes)
        super().__init__((), num_batches, num_batches * global_batch, args)
        logging.info(
            f"{sum(self.sizes)} samples in {len(self.shards)} shards, without replacement, seed {self.seed}"
        )

    def _same_data(self, args, saved: dict) -> list[int]:
        """The sizes in a checkpoint; it must be of the same seed and shards."""
        if saved["seed"] != self.seed:
            raise SystemExit(
                f"error: --seed {self.seed}, but {args.resume} was written with --seed {saved['seed']}"
            )
        if saved["names"] != self.names:
            differ = sorted(set(saved["names"]) ^ set(self.names)) or ["their order"]
            raise SystemExit(
                f"error: {args.resume} was written with {len(saved['names'])} shards, --train-data has "
                f"{len(self.names)}. What differs: {', '.join(differ[:5])}{' …' * (len(differ) > 5)}"
            )
        for name, known, size in zip(
            self.names, _known_sizes(self.shards), saved["sizes"], strict=True
        ):
            if known not in (None, size):
                raise SystemExit(
                    f"error: {name} had {size} samples when {args.resume} was written, sizes.json says {known} now"
                )
        return saved["sizes"]

    def _epoch(self, batches: int) -> Iterator[tuple]:
        first = self.own.start
        self.streams.start(self.former, self.layout, first, self.cursors, self.taken, batches)
        loader = DataLoader(
            self.streams,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=outlive_sigterm,
            generator=torch.Generator(),  # it would draw from the trainer's
        )
        for batch, stream, cursor, news in loader:
            self.cursors[stream - first], self.taken = tuple(cursor), self.taken + 1
            yield batch, news

    def sampling(self, cursors: list[Cursor]) -> dict:
        return {
            "seed": self.seed,
            "names": self.names,
            "sizes": self.sizes,
            "layout": self.layout,
            "former": former_layouts(self.former, cursors),
            "cursors": cursors,
            "taken": self.taken,
        }


class _Streams(IterableDataset):
    """In a worker: the batches of one stream, each with the stream, its cursor after it, and what was read and skipped.

    Workers are made anew for each epoch, after ``start`` has said where the streams stand.
    """

    def __init__(
        self,
        args,
        preprocess: Callable,
        tokenizer: Callable,
        shards: Sequence[str],
        sizes: Sequence[int],
    ):
        self.seed, self.shards, self.sizes = args.seed, shards, sizes
        self.members = REINFORCED_MEMBERS if args.dataset_reinforcement else PLAIN_MEMBERS
        if args.dataset_reinforcement:
            compose, statistics, width, mix_ratio = reinforcement_settings(args, preprocess)
            self._row = partial(_reinforced_row, compose, mix_ratio, width)
            self._batched = partial(batch_reinforced, tokenizer=tokenizer, statistics=statistics)
        else:
            self._row = partial(_plain_row, preprocess)
            self._batched = partial(_plain_batches, tokenizer=tokenizer)
        self._batched = partial(self._batched, batch_size=args.batch_size)

    def start(
        self, former, layout: list[int], first: int, cursors: list[Cursor], taken: int, batches: int
    ) -> None:
        """Say where an epoch, or what is left of it, begins.

        Args:
            former: see ``sampling.pieces_of``.
            layout: ranks, and streams of each.
            first: the first of this rank's streams.
            cursors: of this rank's streams.
            taken: batches that this rank has taken on this layout: streams give their batches in turn.
            batches: how many are wanted.
        """
        self.former, self.layout, self.first, self.cursors = former, layout, first, list(cursors)
        self.taken, self.batches = taken, batches

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        process, processes = (worker.id, worker.num_workers) if worker else (0, 1)
        own = (process + self.taken) % processes
        self.samples = UsableSamples(len(self.shards), self.members)
        batches = self._batched(self.samples, src=self._rows(own))
        for _ in range(process, self.batches, processes):
            batch = next(batches)
            yield batch, self.first + own, self.cursors[own], self.samples.news()

    def _rows(self, own: int) -> Iterator[dict]:
        """Endlessly, the usable samples of a stream; ``self.cursors`` follows."""
        total, streams = sum(self.sizes), math.prod(self.layout)
        wanted = {extension for extensions in self.members.values() for extension in extensions}
        reader, order = (
            ShardReader(self.shards, wanted),
            lru_cache(2)(partial(Order, self.seed, sizes=self.sizes)),
        )
        # a worker gives up when not one of so many samples can be used: twice its part of a pass, or ten shards
        patience = min(
            2 * total // streams,
            SHARDS_WITHOUT_A_USABLE_SAMPLE * total // len(self.shards) + SHUFFLE_BUFFER,
        )
        patience = max(patience, 1000)
        for pass_, position, cursor in positions(
            self.seed, total, self.former, streams, self.first + own, self.cursors[own]
        ):
            self.cursors[own] = cursor
            shard, place = order(pass_).locate(position)
            sample = {"__key__": f"number {place}", "__url__": self.shards[shard]}
            self.samples.opened.add(self.shards[shard])
            self.samples.read += 1
            try:
                sample = reader.read(shard, place)
                row = self._row(self.samples, sample, self.seed, pass_)
            except BadSample as error:
                self.samples.skip(sample, error)
                if self.samples.read >= patience:
                    self.samples.give_up()
                continue
            self.samples.start()
            yield row


def _reinforced_row(
    compose, mix_ratio, width, samples: UsableSamples, sample: dict, seed: int, pass_: int
) -> dict:
    return augment(draw_from(samples, sample, compose, (seed, pass_), mix_ratio, width), compose)


def _plain_row(preprocess, samples: UsableSamples, sample: dict, seed: int, pass_: int) -> dict:
    for lack in missing(sample, PLAIN_MEMBERS):
        raise BadSample(lack)
    text, img = caption(sample), decode_image(sample)
    with _seeded(f"image {seed} {pass_} {sample['__key__']}"):
        return {**sample, "captions": [text], "image": preprocess(img)}


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Random numbers that only ``key`` decides, for transforms that draw from the global generators."""
    own = random.Random(key)
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(own.getrandbits(64))
    np.random.seed(own.getrandbits(32))
    torch.default_generator.manual_seed(
        own.getrandbits(63)
    )  # torch.manual_seed would go on to the GPUs
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _plain_batches(samples, tokenizer, batch_size, src: Iterable[dict]) -> Iterator[tuple]:
    """Batches as OpenCLIP's own: images ``[B, 3, H, W]`` and texts ``[B, L]``."""
    for rows, texts in tokenised_batches(samples, tokenizer, batch_size, src):
        yield default_collate([row["image"] for row in rows]), texts[:, 0]


def _relative(shards: Sequence[str]) -> list[str]:
    """Names that stay when the data set is moved."""
    if len(shards) == 1:
        return [os.path.basename(shards[0])]
    return [os.path.relpath(shard, os.path.commonpath(shards)) for shard in shards]


def _known_sizes(shards: Sequence[str]) -> list[int | None]:
    try:
        return sizes_beside(shards)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def _sizes(args, shards: Sequence[str]) -> list[int]:
    """Samples in each shard: by sizes.json, else as the headers say; the ranks share out the counting."""
    sizes = _known_sizes(shards)
    unknown = [place for place, size in enumerate(sizes) if size is None]
    if unknown and args.rank == 0:
        logging.info(
            f"Counting the samples of {len(unknown)} shards, which no sizes.json beside them tells"
        )
    own = unknown[args.rank :: args.world_size]
    counted = dict(zip(own, count_samples([shards[place] for place in own]), strict=True))
    for place, (size, fault) in counted.items():
        if fault:
            logging.warning(
                f"Shard {shards[place]} counts as one of {size} samples, the rest can't be read: {fault}"
            )
    for counts in checkpoint.gathered(args, counted):
        for place, (size, _) in counts.items():
            sizes[place] = size
    return sizes
