"""The chain that makes batches of samples; it runs in a loader's worker.

    samples → select → read rows → shuffle → augment → tokenise and batch

The stages pass on ``sources.Item``s. An item is a sample on its way to a batch, with its cursor:
how far the worker's stream of samples is after it, which a checkpoint stores. A sample that cannot
be used is skipped: it passes along the chain as an item with ``skipped`` set, so that counts and
cursors stay in the order of the samples.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from .batch import Batch
from .files import StoreDown
from .sample import BadSample, BaselineProcessor, ReinforcedProcessor
from .sampling import Cursor
from .sources import BLOCK, Item, Skipped
from .tar import Unknown

Processor = ReinforcedProcessor | BaselineProcessor
Tokenizer = Callable[[list[str]], Tensor]

# Samples in a row that a stage of the chain may skip: before its first usable one, and later.
MAX_SKIPPED_AT_START = 1_000
MAX_SKIPPED_IN_A_ROW = 100_000  # eight shards of DataComp-12M
MIN_TOO_MANY = 20  # fewer skipped samples are never too many
WARNINGS_PER_REASON = 5  # then the 10th, the 100th, …


# --- counting -------------------------------------------------------------------------------------
class Counts(NamedTuple):
    """How many samples were read, and how many of these were skipped.

    Attributes:
        read: number of samples read.
        skipped: number of samples skipped, by reason.
        fault: why no more samples can be read soon; empty: they can.
    """

    read: int
    skipped: dict[str, int]
    fault: str = ""


class SkipLimit(NamedTuple):
    """How many samples of an epoch may be skipped on one rank.

    Attributes:
        epoch_samples: number of samples of this rank in an epoch.
        fraction: ``--max-skipped-fraction``.
    """

    epoch_samples: int
    fraction: float

    def check(self, read: int, skipped: Counter[str]) -> None:
        """Raise RuntimeError as soon as it is certain that more than the fraction is skipped."""
        total = skipped.total()
        fraction = total / max(read, total + self.epoch_samples)
        if fraction > self.fraction and total >= MIN_TOO_MANY:
            raise RuntimeError(
                f"{total} samples were skipped in an epoch of {self.epoch_samples} on this rank "
                f"({fraction:.1%}, more than --max-skipped-fraction {self.fraction}): "
                f"{list_counts(skipped)}. The warnings above name samples and shards. Fix the "
                "data, or set a larger --max-skipped-fraction."
            )


def list_counts(counts: Counter[str]) -> str:
    """``3 x empty caption, 1 x undecodable image``."""
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())


class Tally:
    """Counts of the samples that one worker has read and skipped, and the rules for giving up."""

    def __init__(self, members: dict[str, tuple[str, ...]], limit: SkipLimit):
        self.members, self.limit = members, limit
        self.read, self.skipped = 0, Counter[str]()
        self.warned = Counter[str]()  # since the worker started
        self.has_used = False  # a sample; until then ``Streak`` has a better message
        self.fault = ""  # see ``Counts``
        self.unknown: Unknown | None = None  # of the first skipped sample with unknown extensions

    def count_read(self, items: Iterable[Item]) -> Iterator[Item]:
        """A stage: count the samples that pass."""
        for item in items:
            self.read += 1
            yield item

    def skip(self, sample: Skipped) -> None:
        """Count and log a skipped sample.

        Raises:
            RuntimeError: this worker alone has skipped more than the rank may.
        """
        self.skipped[sample.reason] += 1
        self.warned[sample.reason] += 1
        count = self.warned[sample.reason]
        explains = sample.unknown is not None and self.unknown is None
        self.unknown = self.unknown or sample.unknown
        if explains or count <= WARNINGS_PER_REASON or str(count).rstrip("0") == "1":
            logging.warning(
                f"Skipped sample {sample.key} of {sample.url}: {sample.message} "
                f"(number {count} for this reason in this worker)"
            )
        if self.has_used:
            self.limit.check(self.read, self.skipped)

    def take_counts(self) -> Counts:
        """The counts since the last call."""
        counts = Counts(self.read, dict(self.skipped), self.fault)
        self.read, self.skipped = 0, Counter()
        return counts

    def give_up(self, found: Counter[str]) -> None:
        """Raise RuntimeError: no sample can be used, for the reasons ``found``."""
        worker = get_worker_info()
        needed = "; ".join(
            f"{name} ({' or '.join(extensions)})" for name, extensions in self.members.items()
        )
        raise RuntimeError(
            f"worker {worker.id if worker else 0} has skipped {found.total()} samples in a row: "
            "not one sample can be used. Found: "
            f"{list_counts(found) or 'no sample in the shards'}. "
            f"Training needs in each sample: {needed}. scripts/join_datacompdr12m.sh makes such "
            f"shards.{f' The shards have {self.unknown}.' if self.unknown else ''}"
        )


class Streak:
    """Samples that one stage of the chain has skipped in a row."""

    def __init__(self, tally: Tally):
        self.tally, self.found, self.limit = tally, Counter[str](), MAX_SKIPPED_AT_START

    def end(self) -> None:
        """Count a sample that the stage could use."""
        self.limit = MAX_SKIPPED_IN_A_ROW
        if self.found:
            self.found = Counter()

    def add(self, reason: str) -> None:
        """Count a sample that the stage has skipped; give up at the limit."""
        self.found[reason] += 1
        if self.found.total() >= self.limit:
            self.tally.give_up(self.found)


# --- the chain ------------------------------------------------------------------------------------
def batches(
    samples: Iterable[Item],
    processor: Processor,
    tokenizer: Tokenizer,
    batch_size: int,
    tally: Tally,
    shuffle: Callable[[Iterator[Item]], Iterator[Item]] | None = None,
    order: Callable[[Iterator[Item]], Iterator[Item]] | None = None,
) -> Iterator[tuple[Batch, Cursor | None]]:
    """Make batches of samples.

    Args:
        samples: items from ``sources.stream`` or ``sources.passes``.
        processor: selects from a sample, and augments its image.
        tokenizer: list of str to int64 ``[captions, L]``.
        batch_size: samples in a batch; an incomplete last batch is dropped, as in OpenCLIP.
        tally: counts samples read and skipped.
        shuffle: a stage that changes the order of the selected items; None: the order stays.
        order: a stage that puts the selected items into the order of their stream before they are
            counted; None: they are in this order.

    Yields:
        batches, each with the cursor of its last sample.

    Raises:
        RuntimeError: a stage skipped too many samples in a row, or ``samples`` ended before one
            could be used.
    """
    items = in_blocks(use(processor.select, samples, tally), BLOCK)
    items = in_blocks(use(processor.read_rows, items, tally), BLOCK)
    items = tally.count_read(order(items) if order else items)
    items = shuffle(items) if shuffle else items
    items = use(processor.augment, items, tally)
    used = False
    for batch in tokenise(items, tokenizer, batch_size, tally):
        images = default_collate([item.sample["image"] for item in batch.items])
        emb: dict[str, Tensor] = {}
        for name in ("image_emb", "text_emb") if processor.statistics is not None else ():
            # Embeddings keep the precision in which they are stored; a batch is float32.
            emb[name] = default_collate([item.sample[name].float() for item in batch.items])
        uids = [item.sample["__key__"] for item in batch.items]
        used = True
        yield (
            Batch(images, batch.texts, uids, **emb, statistics=processor.statistics),
            batch.items[-1].cursor,
        )
    if not used:
        tally.give_up(tally.skipped)


def use(
    function: Callable[[dict, Any], dict], items: Iterable[Item], tally: Tally
) -> Iterator[Item]:
    """A stage: apply ``function`` to each sample; skip those for which it raises BadSample."""
    streak = Streak(tally)
    for item in items:
        if item.skipped is None:
            try:
                item = item._replace(sample=function(item.sample, item.choice))
                streak.end()
            except BadSample as error:
                item = item.skip(error)
                streak.add(error.reason)
        yield item


def in_blocks(items: Iterable[Item], size: int) -> Iterator[Item]:
    """A stage: the same items, of which ``size`` are computed at once."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield from block


def in_order(items: Iterable[Item], size: int, tally: Tally) -> Iterator[Item]:
    """A stage: items in the order of their turns.

    If nothing can be read from a store, ``tally.fault`` is set, and the items that are there follow
    before StoreDown is raised.

    Args:
        items: items of turns 0, 1, 2, …, in another order within each window.
        size: of a window, at most. So many items are in memory.
        tally: of the worker.
    """
    waiting: dict[int, Item] = {}
    turn, down = 0, None
    try:
        for item in items:
            waiting[item.turn] = item
            if len(waiting) > size:
                yield waiting.pop(turn)
                turn += 1
    except StoreDown as error:
        tally.fault, down = str(error), error
    while turn in waiting:
        yield waiting.pop(turn)
        turn += 1
    if down is not None:
        raise down


def shuffled(items: Iterable[Item], size: int, initial: int, rng: random.Random) -> Iterator[Item]:
    """A stage: items in random order out of a buffer; skipped samples pass at once.

    Args:
        items: selected items.
        size: largest number of items in the buffer. It grows by one for each item that leaves it.
        initial: number of items in the buffer before the first one leaves it.
        rng: chooses which item leaves the buffer.
    """
    buffer: list[Item] = []
    grow = False
    for item in items:
        if item.skipped is not None:
            yield item
            continue
        buffer.append(item)
        grow = not grow
        if len(buffer) < initial or (len(buffer) < size and grow):
            continue
        yield _pop_random(buffer, rng)
    while buffer:
        yield _pop_random(buffer, rng)


def _pop_random(buffer: list[Item], rng: random.Random) -> Item:
    at = rng.randrange(len(buffer))
    buffer[at], buffer[-1] = buffer[-1], buffer[at]
    return buffer.pop()


class TokenisedItems(NamedTuple):
    """Items of one batch, and their captions as int64 ``[B, C, L]``."""

    items: list[Item]
    texts: Tensor


def tokenise(
    items: Iterable[Item], tokenizer: Tokenizer, batch_size: int, tally: Tally
) -> Iterator[TokenisedItems]:
    """A stage: put items into batches and tokenise their captions; count skipped samples.

    The captions of a batch are tokenised at once. One by one between images it takes three times as
    long, as the processor's caches are cold.
    """

    def encode(batch: list[Item]) -> Tensor:
        captions = [caption for item in batch for caption in item.sample["captions"]]
        return tokenizer(captions).unflatten(0, (len(batch), -1))

    streak, batch = Streak(tally), list[Item]()
    for item in items:
        if item.skipped is not None:
            tally.skip(item.skipped)
            continue
        batch.append(item)
        tally.has_used = True
        if len(batch) < batch_size:
            continue
        try:
            texts = encode(batch)
        except Exception:  # tokenizers raise any type; find out which captions are bad
            batch = [item for item in batch if _can_encode(encode, item, tally, streak)]
            continue
        streak.end()
        yield TokenisedItems(batch, texts)
        batch = []


def _can_encode(encode: Callable, item: Item, tally: Tally, streak: Streak) -> bool:
    try:
        encode([item])
    except Exception as error:
        reason, key, url = (
            "captions that can't be tokenised",
            item.sample["__key__"],
            item.sample["__url__"],
        )
        tally.skip(Skipped(reason, f"{reason}: {error!r}", key, url))
        streak.add(reason)
        return False
    streak.end()
    return True
