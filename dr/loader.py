"""The loaders that the trainer iterates over, with and without replacement.

They run in the trainer's process. Their workers make batches with ``chain.batches`` and send each
batch with the counts of the samples that were read and skipped for it.
"""

import logging
import math
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batch import Batch
from .chain import Counts, Processor, SkipLimit, Tally, Tokenizer, batches, in_order
from .files import StoreDown, is_url
from .sampling import WINDOW, Cursor, layouts_to_keep
from .sources import ShardReader, StreamState, count_samples, passes, passes_by_window
from .tar import read_sizes


# --- processes ------------------------------------------------------------------------------------
def gather_objects(found: Any, group: dist.ProcessGroup | None = None) -> list:
    """Gather ``found`` from all ranks; every rank must call this."""
    if not dist.is_initialized():
        return [found]
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found, group)
    return everywhere


def ignore_sigterm(worker: int = 0) -> None:
    """In a loader's worker: obey SIGTERM only if the trainer sends it.

    A job that is pre-empted gets SIGTERM in all its processes, and the trainer needs batches for
    the step that it takes before it saves. It ends its workers by the same signal, so the sender
    counts.
    """
    if get_worker_info():
        _obey_parent_only(os.getpid())


@lru_cache(1)  # once in a process
def _obey_parent_only(process: int) -> None:
    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads inherit it
    threading.Thread(target=wait, daemon=True).start()


# --- loaders --------------------------------------------------------------------------------------
class Loader:
    """Batches of an epoch, with counts of the samples that were read and skipped for them.

    Args:
        args: the trainer's options.

    Attributes:
        epoch: epochs that are complete.
        first: batches of the present epoch that were taken before the run was resumed.
        position: batches of the present epoch that were taken so far.
        read, skipped: samples that this rank has read and skipped in the present epoch.
        fault: why a worker cannot read more samples soon; empty: all can.
        wait_fraction: share of the time of the last epoch in which steps waited for batches.
        recent_uids: uids of the batches of the last optimizer step.
    """

    def __init__(self, args: Any):
        self.args = args
        self.epoch = self.first = self.position = self.read = 0
        self.skipped = Counter[str]()
        self.wait_fraction, self.fault = 0.0, ""
        self.recent_uids = deque[list[str]](maxlen=args.accum_freq)

    @property
    def num_batches(self) -> int:
        """Batches of each rank in an epoch."""
        raise NotImplementedError

    @property
    def num_samples(self) -> int:
        """Samples of all ranks in an epoch."""
        return self.num_batches * self.args.batch_size * self.args.world_size

    def _rest_of_epoch(self, batches: int) -> Iterable[tuple[Batch, Counts]]:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        limit = SkipLimit(self.num_batches * self.args.batch_size, self.args.max_skipped_fraction)
        self.position, waited = self.first, 0.0
        begin = asked = time.perf_counter()
        for batch, counts in self._rest_of_epoch(self.batches_of_epoch() - self.first):
            waited += time.perf_counter() - asked
            self.read += counts.read
            self.skipped.update(counts.skipped)
            self.fault = self.fault or counts.fault
            limit.check(self.read, self.skipped)
            self.position += 1
            self.recent_uids.append(batch.uids)
            yield batch
            asked = time.perf_counter()
        self.wait_fraction = waited / max(time.perf_counter() - begin, 1e-9)
        self.first = self.position = 0
        self.epoch += 1

    def batches_of_epoch(self) -> int:
        """As ``num_batches``, but fewer in the last epoch of a run with ``--total-steps``."""
        if self.args.total_steps is None:
            return self.num_batches
        left = self.args.total_steps * self.args.accum_freq - self.epoch * self.num_batches
        return max(self.first, min(self.num_batches, left))

    def reset_counts(self) -> Counts:
        """Return this rank's counts of the epoch, and start counting anew."""
        counts = Counts(self.read, dict(self.skipped))
        self.read, self.skipped = 0, Counter()
        return counts

    def state_dict(self, group: dist.ProcessGroup | None = None) -> dict:
        """The loaders' part of a checkpoint, over all ranks; every rank must call this."""
        accum_freq = self.args.accum_freq
        return {
            "step": self.position // accum_freq,
            "steps_in_epoch": self.num_batches // accum_freq,
            "ranks": gather_objects({"read": self.read, "skipped": dict(self.skipped)}, group),
            "sampling": {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the position at which ``state`` was written, on any number of ranks."""
        args, steps = self.args, self.num_batches // self.args.accum_freq
        if state["step"] and state["steps_in_epoch"] != steps:
            raise SystemExit(
                f"error: {args.resume} is {state['step']} steps into an epoch of "
                f"{state['steps_in_epoch']}, but an epoch has {steps} now: keep "
                "--train-num-samples and the global batch"
            )
        self.first = self.position = state["step"] * args.accum_freq
        ranks = state["ranks"]
        if len(ranks) == args.world_size:
            own = ranks[args.rank : args.rank + 1]
        else:
            own = ranks if args.rank == 0 else []
        self.read = sum(rank["read"] for rank in own)
        self.skipped = sum((Counter(rank["skipped"]) for rank in own), Counter())


def count_batches(args: Any, count_samples: Callable[[], int] = int) -> int:
    """Batches of each rank in the optimizer steps that an epoch's samples make, rounded up.

    Args:
        args: the trainer's options.
        count_samples: samples in the data set, where ``--train-num-samples`` is not given.
    """
    samples = args.train_num_samples or count_samples()
    steps = math.ceil(samples / (args.batch_size * args.world_size * args.accum_freq))
    return steps * args.accum_freq


class StreamLoader(Loader):
    """Batches of OpenCLIP's own loader, for sampling with replacement.

    Args:
        args: the trainer's options.
        source: OpenCLIP's loader, whose pipeline yields batches with their counts.
        num_batches: of each rank in an epoch.
    """

    def __init__(self, args: Any, source: Iterable[tuple[Batch, Counts]], num_batches: int):
        super().__init__(args)
        self.source, self._num_batches = source, num_batches

    @property
    def num_batches(self) -> int:
        """Batches of each rank in an epoch, as OpenCLIP rounds them up for its workers."""
        return self._num_batches if self.args.total_steps is None else count_batches(self.args)

    def _rest_of_epoch(self, batches: int) -> Iterable[tuple[Batch, Counts]]:
        return islice(self.source, batches)


class PassLoader(Loader):
    """Batches of a run in passes over all samples.

    Args:
        args: the trainer's options.
        processor: selects from a sample, and augments its image.
        tokenizer: list of str to int64 ``[captions, L]``.
        shards: paths of tars.
    """

    def __init__(
        self, args: Any, processor: Processor, tokenizer: Tokenizer, shards: Sequence[str]
    ):
        super().__init__(args)
        self.processor, self.tokenizer, self.shards = processor, tokenizer, list(shards)
        self.layout = [args.world_size, max(1, args.workers)]  # ranks, and streams of each rank
        self.names = _relative_names(self.shards)
        self.taken = 0  # batches that this rank has taken on this layout
        self.previous: list[Sequence[Cursor]] = []  # see sampling.pieces_of_stream
        self.cursors: list[Cursor] = [(0, 0)] * self.layout[1]  # of this rank's streams
        self.saved_sizes: list[int] | None = None

    # The sizes are looked up when they are first needed, so that a resumed run takes them from its
    # checkpoint: a shard that has disappeared since does not change the order.
    @cached_property
    def sizes(self) -> list[int]:
        """Number of samples in each shard; every rank must call this."""
        sizes = self.saved_sizes or _find_sizes(self.args, self.shards)
        if not sum(sizes):
            raise SystemExit(
                f"error: no sample in {len(self.shards)} shards of --train-data "
                f"{self.args.train_data}"
            )
        logging.info(
            f"{sum(sizes)} samples in {len(self.shards)} shards, without replacement, "
            f"seed {self.args.seed}"
        )
        return sizes

    @property
    def num_batches(self) -> int:
        """Batches of each rank in an epoch: whole optimizer steps."""
        return count_batches(self.args, lambda: sum(self.sizes))

    def _rest_of_epoch(self, batches: int) -> Iterator[tuple[Batch, Counts]]:
        limit = SkipLimit(self.num_batches * self.args.batch_size, self.args.max_skipped_fraction)
        dataset = _PassDataset(self, limit, batches)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.args.workers,
            worker_init_fn=ignore_sigterm,
            generator=torch.Generator(),  # without one it would use the trainer's
        )
        try:
            for batch, stream, cursor, counts in loader:
                self.cursors[stream], self.taken = tuple(cursor), self.taken + 1
                yield batch, counts
        except StoreDown as error:  # its text may be a traceback in a worker
            line = self.fault or str(error).strip().splitlines()[-1]
            raise SystemExit(f"error: {line}") from error

    def state_dict(self, group: dist.ProcessGroup | None = None) -> dict:
        """As in ``Loader``, with the cursors of all streams."""
        cursors = [cursor for rank in gather_objects(self.cursors, group) for cursor in rank]
        sampling = {
            "seed": self.args.seed,
            "names": self.names,
            "sizes": self.sizes,
            "layout": self.layout,
            "former": layouts_to_keep(self.previous, cursors),
            "cursors": cursors,
            "taken": self.taken,
        }
        return {**super().state_dict(group), "sampling": sampling}

    def load_state_dict(self, state: dict) -> None:
        """Restore the position: the next batch, or on another layout the rest of the passes.

        Raises:
            SystemExit: the state is of another seed, of other shards or of shards of other sizes.
        """
        if saved := state["sampling"]:
            self._check_same_data(saved)
            self.saved_sizes = saved["sizes"]
            self.__dict__.pop("sizes", None)
            cursors = [tuple(cursor) for cursor in saved["cursors"]]
            if saved["layout"] == self.layout:
                first = self.args.rank * self.layout[1]
                self.cursors = cursors[first : first + self.layout[1]]
                self.taken, self.previous = saved["taken"], saved["former"]
            else:
                self.previous = [*layouts_to_keep(saved["former"], cursors), cursors]
                self.cursors = [(min(cursors)[0], 0)] * self.layout[1]
                logging.info(
                    "The rest of the passes is redistributed: to {} ranks x {} workers, after "
                    "{} x {}".format(*self.layout, *saved["layout"])
                )
        super().load_state_dict(state)

    def _check_same_data(self, saved: dict) -> None:
        args = self.args
        if saved["seed"] != args.seed:
            raise SystemExit(
                f"error: --seed {args.seed}, but {args.resume} was written with --seed "
                f"{saved['seed']}"
            )
        if saved["names"] != self.names:
            differ = sorted(set(saved["names"]) ^ set(self.names)) or ["their order"]
            more = " …" if len(differ) > 5 else ""
            raise SystemExit(
                f"error: {args.resume} was written with {len(saved['names'])} shards, --train-data "
                f"has {len(self.names)}. What differs: {', '.join(differ[:5])}{more}"
            )
        known = _sizes_from_json(self.shards)
        for name, now, before in zip(self.names, known, saved["sizes"], strict=True):
            if now not in (None, before):
                raise SystemExit(
                    f"error: {name} had {before} samples when {args.resume} was written, "
                    f"sizes.json has {now} now"
                )


class _PassDataset(IterableDataset):
    """In a worker: batches of one stream, each with the stream's number on its rank, its cursor
    after the batch, and the counts. Each epoch makes a new one, of where the loader's streams
    are."""

    def __init__(self, loader: PassLoader, limit: SkipLimit, batches: int):
        args, (ranks, streams) = loader.args, loader.layout
        self.shards, self.tokenizer = loader.shards, loader.tokenizer
        self.processor = loader.processor
        self.batch_size, self.batches, self.taken = args.batch_size, batches, loader.taken
        self.limit, self.cursors = limit, list(loader.cursors)
        self.state = partial(StreamState, args.seed, loader.sizes, loader.previous, ranks * streams)
        self.first_stream = args.rank * streams

    def __iter__(self) -> Iterator[tuple[Batch, int, Cursor | None, Counts]]:
        worker = get_worker_info()
        process, processes = (worker.id, worker.num_workers) if worker else (0, 1)
        # The trainer takes the workers' batches in turn, and a resumed run continues the turn.
        stream = (process + self.taken) % processes
        reader = ShardReader(self.shards, self.processor.wanted.__contains__)
        state = self.state(self.first_stream + stream, self.cursors[stream])
        tally = Tally(self.processor.members, self.limit)
        samples, order = passes(reader, state), None
        if any(map(is_url, self.shards)):
            size = min(WINDOW, sum(state.sizes) // state.streams + 1)
            samples = passes_by_window(reader, state)
            order = partial(in_order, size=size, tally=tally)
        made = batches(samples, self.processor, self.tokenizer, self.batch_size, tally, order=order)
        for _ in range(process, self.batches, processes):
            batch, cursor = next(made)
            yield batch, stream, cursor, tally.take_counts()


def _relative_names(shards: Sequence[str]) -> list[str]:
    """Names that stay the same when the data set is moved."""
    if len(shards) == 1:
        return [os.path.basename(shards[0])]
    common = os.path.commonpath(shards)  # once: it looks at all shards
    return [os.path.relpath(shard, common) for shard in shards]


def _sizes_from_json(shards: Sequence[str]) -> list[int | None]:
    """Samples in each shard by the sizes.json in its folder; None where it is not listed."""
    try:
        found = {folder: read_sizes(folder) for folder in {os.path.dirname(s) for s in shards}}
    except (ValueError, OSError, ImportError, StoreDown) as error:
        raise SystemExit(f"error: {error}") from error
    return [found[os.path.dirname(shard)].get(os.path.basename(shard)) for shard in shards]


def _find_sizes(args: Any, shards: Sequence[str]) -> list[int]:
    """Samples in each shard by sizes.json, otherwise by its headers; the ranks share the work."""
    known = _sizes_from_json(shards)
    unknown = [place for place, size in enumerate(known) if size is None]
    if unknown and args.rank == 0:
        logging.info(f"Counting the samples of {len(unknown)} shards that no sizes.json lists")
    own = unknown[args.rank :: args.world_size]
    try:
        counted = dict(zip(own, count_samples([shards[place] for place in own]), strict=True))
    except StoreDown as error:
        raise SystemExit(f"error: {error}") from error
    for place, (size, fault) in counted.items():
        if fault:
            logging.warning(
                f"Shard {shards[place]} counts as {size} samples; the rest can't be read: {fault}"
            )
    sizes = [size or 0 for size in known]
    for counts in gather_objects(counted):
        for place, (size, _) in counts.items():
            sizes[place] = size
    return sizes
