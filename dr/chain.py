"""The chain that makes batches of samples; it runs in a loader's worker.

    samples → draw → shuffle → augment → tokenise and batch

A sample that cannot be used is skipped: it passes along the chain as an ``Item`` with ``skipped``
set, so that counts and cursors stay in the order of the samples.
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
from .sample import BadSample, BaselineRecipe, ReinforcedRecipe
from .sampling import Cursor
from .sources import Item, Skipped
from .tar import Unknown

Recipe = ReinforcedRecipe | BaselineRecipe
Tokenizer = Callable[[list[str]], Tensor]

# Rows that are drawn at once: between two images it takes twice as long, as the caches are cold.
BLOCK = 64
# Samples in a row that a stage of the chain may skip: before its first usable one, and later.
MAX_SKIPPED_AT_START = 1_000
MAX_SKIPPED_IN_A_ROW = 100_000  # eight shards of DataComp-12M
MIN_TOO_MANY = 20  # fewer skipped samples are never too many
WARNINGS_PER_REASON = 5  # then the 10th, the 100th, …


# --- counting -------------------------------------------------------------------------------------
class Counts(NamedTuple):
    """Samples read, and those of them that were skipped, by reason."""

    read: int
    skipped: dict[str, int]


class SkipLimit(NamedTuple):
    """How many samples of an epoch may be skipped on one rank.

    Attributes:
        epoch_samples: of this rank.
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
    """What one worker has read and skipped since its last batch, and the rules for giving up."""

    def __init__(self, members: dict[str, tuple[str, ...]], limit: SkipLimit):
        self.members, self.limit = members, limit
        self.read, self.skipped = 0, Counter[str]()
        self.warned = Counter[str]()  # since the worker started
        self.has_used = False  # a sample; until then ``Streak`` has a better message
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
        counts = Counts(self.read, dict(self.skipped))
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
    recipe: Recipe,
    tokenizer: Tokenizer,
    batch_size: int,
    tally: Tally,
    shuffle: Callable[[Iterator[Item]], Iterator[Item]] | None = None,
) -> Iterator[tuple[Batch, Cursor | None]]:
    """Make batches of samples.

    Args:
        samples: of one of the ``sources``.
        recipe: what to make of a sample.
        tokenizer: list of str to int64 ``[captions, L]``.
        batch_size: samples in a batch; what is left at the end is dropped, as OpenCLIP does.
        tally: counts what is skipped.
        shuffle: a stage over drawn rows.

    Yields:
        batches, each with the cursor of its last sample.

    Raises:
        RuntimeError: a stage skipped too many samples in a row, or ``samples`` ended and none
            was used.
    """
    rows = tally.count_read(in_blocks(use(recipe.draw, samples, tally), BLOCK))
    rows = shuffle(rows) if shuffle else rows
    rows = use(recipe.augment, rows, tally)
    used = False
    for batch in tokenise(rows, tokenizer, batch_size, tally):
        images = default_collate([item.row["image"] for item in batch.items])
        emb: dict[str, Tensor] = {}
        for name in ("image_emb", "text_emb") if recipe.statistics is not None else ():
            # Rows keep the precision in which they are stored; a batch is float32.
            emb[name] = default_collate([item.row[name].float() for item in batch.items])
        uids = [item.row["__key__"] for item in batch.items]
        used = True
        yield (
            Batch(images, batch.texts, uids, **emb, statistics=recipe.statistics),
            batch.items[-1].cursor,
        )
    if not used:
        tally.give_up(tally.skipped)


def use(
    function: Callable[[dict, Any], dict], items: Iterable[Item], tally: Tally
) -> Iterator[Item]:
    """A stage: ``function`` of each sample; a sample for which it raises BadSample is skipped."""
    streak = Streak(tally)
    for item in items:
        if item.skipped is None:
            try:
                item = item._replace(row=function(item.row, item.choice))
                streak.end()
            except BadSample as error:
                item = item.skip(error)
                streak.add(error.reason)
        yield item


def in_blocks(items: Iterable[Item], size: int) -> Iterator[Item]:
    """The same items, but ``size`` of them are made at once."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield from block


def shuffled(items: Iterable[Item], size: int, initial: int, rng: random.Random) -> Iterator[Item]:
    """Rows in random order out of a buffer; skipped samples pass at once.

    Args:
        items: drawn rows.
        size: of the buffer. It grows by one row for each row that leaves it.
        initial: rows in the buffer before the first one leaves it.
        rng: makes the choices.
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


class TokenisedRows(NamedTuple):
    """Rows of one batch, and their captions as int64 ``[B, C, L]``."""

    items: list[Item]
    texts: Tensor


def tokenise(
    items: Iterable[Item], tokenizer: Tokenizer, batch_size: int, tally: Tally
) -> Iterator[TokenisedRows]:
    """Put rows into batches and tokenise their captions; count what was skipped.

    The captions of a batch are tokenised at once. One by one between images it takes three times as
    long, as the processor's caches are cold.
    """

    def encode(rows: list[Item]) -> Tensor:
        captions = [caption for item in rows for caption in item.row["captions"]]
        return tokenizer(captions).unflatten(0, (len(rows), -1))

    streak, rows = Streak(tally), list[Item]()
    for item in items:
        if item.skipped is not None:
            tally.skip(item.skipped)
            continue
        rows.append(item)
        tally.has_used = True
        if len(rows) < batch_size:
            continue
        try:
            texts = encode(rows)
        except Exception:  # tokenizers raise what they like; find out on whose captions
            rows = [row for row in rows if _can_encode(encode, row, tally, streak)]
            continue
        streak.end()
        yield TokenisedRows(rows, texts)
        rows = []


def _can_encode(encode: Callable, row: Item, tally: Tally, streak: Streak) -> bool:
    try:
        encode([row])
    except Exception as error:
        reason, key, url = (
            "captions that can't be tokenised",
            row.row["__key__"],
            row.row["__url__"],
        )
        tally.skip(Skipped(reason, f"{reason}: {error!r}", key, url))
        streak.add(reason)
        return False
    streak.end()
    return True
