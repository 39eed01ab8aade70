"""The order of samples without replacement: pure functions of the seed and the samples taken.

A run is a sequence of passes. In pass p the shards are permuted by (seed, p), and the positions
0 … N - 1 count through their samples in that order. Each stream (one worker of one rank) gets a
contiguous part of the positions, cut into windows of ``WINDOW`` positions, which are shuffled. So
each position of a pass belongs to one stream. A stream that has reached the end of its part goes on
with its part of the next pass.

A stream's state is its cursor: (pass, positions taken in it). A checkpoint stores the cursors of
all streams. The layout of a run is its number of ranks and of workers of each rank, and so its
number of streams. If a run is resumed on another layout, the positions that are left of each pass
are redistributed; the cursors of the previous layouts tell which positions were taken. Only the
list of shards is kept in memory, nothing of the size of the data set.
"""

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

WINDOW = 5000  # positions; the size of OpenCLIP's shuffle buffer

Cursor = tuple[int, int]  # pass, positions taken in it
# start, stop, low, high: the entries low … high - 1 of the shuffled positions start … stop - 1
Piece = tuple[int, int, int, int]


def split_evenly(total: int, parts: int, index: int, offset: int = 0) -> tuple[int, int]:
    """Start and stop of one of ``parts`` contiguous parts of ``range(total)``.

    Sizes differ by at most 1. ``offset`` rotates which parts are the larger ones, so that over
    offsets 0, 1, 2, … no part gets more than one position more than another::

        split_evenly(10, 4, 0) == (0, 3)  # sizes 3, 3, 2, 2
        split_evenly(10, 4, 0, offset=1) == (0, 2)  # sizes 2, 2, 3, 3
    """
    size, larger = divmod(total, parts)
    first = offset * larger % parts  # parts first … first + larger - 1 (modulo parts) are larger

    def start(part: int) -> int:
        before = max(0, min(part, first + larger) - first)
        wrapped = max(0, min(part, first + larger - parts))
        return part * size + before + wrapped

    return start(index), start(index + 1)


def slice_pieces(pieces: Sequence[Piece], start: int, stop: int | None = None) -> list[Piece]:
    """Entries ``start`` … ``stop - 1`` of the concatenated pieces, as pieces."""
    found, at = [], 0
    for first, last, low, high in pieces:
        size = high - low
        begin = max(start - at, 0)
        end = size if stop is None else min(stop - at, size)
        if begin < end:
            found.append((first, last, low + begin, low + end))
        at += size
    return found


def count_positions(pieces: Sequence[Piece]) -> int:
    """Number of positions that the pieces hold together."""
    return sum(high - low for _, _, low, high in pieces)


def pieces_of_stream(
    total: int, previous: Sequence[Sequence[Cursor]], pass_: int, streams: int, stream: int
) -> list[Piece]:
    """The positions of one stream in one pass, in order.

    Args:
        total: samples in the data set.
        previous: cursors of all streams at the end of each previous layout, oldest first.
        pass_: number of the pass.
        streams: number of streams.
        stream: number of this stream.
    """
    if pass_ <= last_pass(previous):
        left = _pieces_left(total, previous, pass_)
        return slice_pieces(left, *split_evenly(count_positions(left), streams, stream, pass_))
    start, stop = split_evenly(total, streams, stream, pass_)
    return [
        (at, min(at + WINDOW, stop), 0, min(WINDOW, stop - at)) for at in range(start, stop, WINDOW)
    ]


def last_pass(previous: Sequence[Sequence[Cursor]]) -> int:
    """The last pass that a previous layout had begun; -1 without previous layouts."""
    return max((pass_ for cursors in previous for pass_, _ in cursors), default=-1)


def _pieces_left(total: int, previous: Sequence[Sequence[Cursor]], pass_: int) -> list[Piece]:
    """The positions of a pass that no stream of the previous layouts has taken."""
    *older, cursors = previous
    streams = len(cursors)
    if pass_ <= last_pass(older):
        left = _pieces_left(total, older, pass_)  # once for all streams
        size = count_positions(left)
        parts = [
            slice_pieces(left, *split_evenly(size, streams, stream, pass_))
            for stream in range(streams)
        ]
    else:
        parts = [pieces_of_stream(total, (), pass_, streams, stream) for stream in range(streams)]
    return [
        piece
        for pieces, (reached, taken) in zip(parts, cursors, strict=True)
        if reached <= pass_
        for piece in slice_pieces(pieces, taken if reached == pass_ else 0)
    ]


def iterate_windows(
    seed: int,
    total: int,
    previous: Sequence[Sequence[Cursor]],
    streams: int,
    stream: int,
    cursor: Cursor,
) -> Iterator[list[tuple[int, int, Cursor]]]:
    """Yield what a stream takes next, window by window: pass, position, and the stream's cursor
    after that; endless."""
    pass_, taken = cursor
    while True:
        pieces = pieces_of_stream(total, previous, pass_, streams, stream)
        for start, stop, low, high in slice_pieces(pieces, taken):
            window = list(range(start, stop))
            random.Random(f"window {seed} {pass_} {start} {stop}").shuffle(window)
            yield [
                (pass_, position, (pass_, taken + place))
                for place, position in enumerate(window[low:high], 1)
            ]
            taken += high - low
        pass_, taken = pass_ + 1, 0


class ShardOrder:
    """The order of the shards in one pass."""

    def __init__(self, seed: int, pass_: int, sizes: Sequence[int]):
        self.shards = list(range(len(sizes)))
        random.Random(f"shards {seed} {pass_}").shuffle(self.shards)
        in_order = (sizes[shard] for shard in self.shards)
        self.starts = list(itertools.accumulate(in_order, initial=0))

    def locate(self, position: int) -> tuple[int, int]:
        """The shard of a position, and the sample's place in that shard."""
        at = bisect_right(self.starts, position) - 1
        return self.shards[at], position - self.starts[at]


def layouts_to_keep(
    previous: Sequence[Sequence[Cursor]], cursors: Sequence[Cursor]
) -> list[Sequence[Cursor]]:
    """The previous layouts that still matter: none once all streams are past their passes."""
    return list(previous) if min(pass_ for pass_, _ in cursors) <= last_pass(previous) else []


# --- choosing within a sample ---------------------------------------------------------------------
class Choice(Protocol):
    """How an augmentation and a caption of a sample are chosen."""

    def choose(self, key: str, what: str, count: int) -> int:
        """One of ``range(count)``."""

    def generator(self, key: str, what: str) -> random.Random:
        """A random generator for one sample and purpose."""


class RandomChoice:
    """Chooses by Python's global random generator, which torch seeds for each rank and worker."""

    def choose(self, key: str, what: str, count: int) -> int:
        return random.randrange(count)

    def generator(self, key: str, what: str) -> random.Random:
        return random.Random(random.getrandbits(64))


class EpochChoice(NamedTuple):
    """Chooses the number of the epoch, modulo the count (``…-sample-sequential``).

    The list that a synthetic caption comes from is chosen at random: chosen by the epoch as well,
    of two lists one would be used in even epochs only, with the even captions only.
    """

    epoch: int

    def choose(self, key: str, what: str, count: int) -> int:
        return random.randrange(count) if what == "captioner" else self.epoch % count

    def generator(self, key: str, what: str) -> random.Random:
        return random.Random(random.getrandbits(64))


class ScheduledChoice(NamedTuple):
    """Chooses by seed, pass and the sample's key alone, whatever the rank and worker."""

    seed: int
    pass_: int

    def choose(self, key: str, what: str, count: int) -> int:
        """Each of ``range(count)`` once in every ``count`` passes, in a random order."""
        round_, place = divmod(self.pass_, count)
        order = random.Random(f"{what} {self.seed} {round_} {key}").sample(range(count), count)
        return order[place]

    def generator(self, key: str, what: str) -> random.Random:
        return random.Random(f"{what} {self.seed} {self.pass_} {key}")
