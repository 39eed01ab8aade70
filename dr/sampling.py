"""Which sample comes when, without replacement: pure functions of the seed and of what was taken so far.

A run is a sequence of passes. In pass p the shards are permuted by (seed, p), and positions 0 … N - 1 count through
their samples in that order. The positions are dealt to streams, one for each worker of each rank: a contiguous part
each, cut into windows of WINDOW positions that are shuffled. So every position of a pass belongs to one stream, and a
stream that has reached the end of its part goes on with its part of the next pass.

Where a stream stands is its cursor: (pass, positions taken in it). Cursors are all that a checkpoint has to hold. On
another number of streams the parts of a pass that were not taken are dealt anew; what was taken is known from the
cursors of the former streams. Nothing here is as long as the data set, but the list of its shards.
"""

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence

WINDOW = 5000  # OpenCLIP's shuffle buffer

Cursor = tuple[int, int]  # pass, positions taken in it
# start, stop, low, high: the entries low … high - 1 of the shuffled positions start … stop - 1
Piece = tuple[int, int, int, int]


def part(total: int, parts: int, index: int, turn: int = 0) -> tuple[int, int]:
    """Start and stop of one of ``parts`` contiguous parts of ``range(total)``, whose sizes differ by 1 at most.

    Which parts are the larger ones goes on from ``turn`` to turn, so that over all of them nobody gets more than one
    more than the others.
    """
    size, more = divmod(total, parts)
    first = (
        turn * more % parts
    )  # the parts first … first + more - 1 (modulo parts) are larger by one

    def start(part: int) -> int:
        larger = max(0, min(part, first + more) - first) + max(0, min(part, first + more - parts))
        return part * size + larger

    return start(index), start(index + 1)


def cut(pieces: Sequence[Piece], start: int, stop: int | None = None) -> list[Piece]:
    """What of ``pieces``, one after the other, stands at ``start`` … ``stop - 1``."""
    found, at = [], 0
    for first, last, low, high in pieces:
        size = high - low
        begin, end = max(start - at, 0), size if stop is None else min(stop - at, size)
        if begin < end:
            found.append((first, last, low + begin, low + end))
        at += size
    return found


def length(pieces: Sequence[Piece]) -> int:
    return sum(high - low for _, _, low, high in pieces)


def pieces_of(
    total: int, former: Sequence[Sequence[Cursor]], pass_: int, streams: int, stream: int
) -> list[Piece]:
    """The positions of one stream in one pass, in order.

    Args:
        total: samples in the data set.
        former: the cursors of all streams at the end of each former layout, oldest first; empty: there was none.
        pass_: which pass.
        streams: how many there are now.
        stream: which one.
    """
    if pass_ <= last_pass(former):
        left = _left_over(total, former, pass_)
        return cut(left, *part(length(left), streams, stream, pass_))
    start, stop = part(total, streams, stream, pass_)
    return [
        (at, min(at + WINDOW, stop), 0, min(WINDOW, stop - at)) for at in range(start, stop, WINDOW)
    ]


def last_pass(former: Sequence[Sequence[Cursor]]) -> int:
    """The last pass that a former layout had begun; -1: there was none."""
    return max((taken_in for cursors in former for taken_in, _ in cursors), default=-1)


def _left_over(total: int, former: Sequence[Sequence[Cursor]], pass_: int) -> list[Piece]:
    """What nobody has taken of a pass in former layouts."""
    *older, cursors = former
    if pass_ <= last_pass(older):
        left = _left_over(total, older, pass_)  # once, not for each stream
        parts = [
            cut(left, *part(length(left), len(cursors), stream, pass_))
            for stream in range(len(cursors))
        ]
    else:
        parts = [
            pieces_of(total, (), pass_, len(cursors), stream) for stream in range(len(cursors))
        ]
    return [
        piece
        for pieces, (taken_in, taken) in zip(parts, cursors, strict=True)
        if taken_in <= pass_
        for piece in cut(pieces, taken if taken_in == pass_ else 0)
    ]


def positions(
    seed: int,
    total: int,
    former: Sequence[Sequence[Cursor]],
    streams: int,
    stream: int,
    cursor: Cursor,
) -> Iterator[tuple[int, int, Cursor]]:
    """For ever: the pass and position that a stream takes next, and its cursor after that."""
    pass_, taken = cursor
    while True:
        for start, stop, low, high in cut(pieces_of(total, former, pass_, streams, stream), taken):
            window = list(range(start, stop))
            random.Random(f"window {seed} {pass_} {start} {stop}").shuffle(window)
            for position in window[low:high]:
                taken += 1
                yield pass_, position, (pass_, taken)
        pass_, taken = pass_ + 1, 0


class Order:
    """The order of the shards in one pass."""

    def __init__(self, seed: int, pass_: int, sizes: Sequence[int]):
        self.shards = list(range(len(sizes)))
        random.Random(f"shards {seed} {pass_}").shuffle(self.shards)
        self.starts = list(itertools.accumulate((sizes[shard] for shard in self.shards), initial=0))

    def locate(self, position: int) -> tuple[int, int]:
        """Shard and place in it of a position."""
        at = bisect_right(self.starts, position) - 1
        return self.shards[at], position - self.starts[at]


def former_layouts(
    former: Sequence[Sequence[Cursor]], cursors: Sequence[Cursor]
) -> list[Sequence[Cursor]]:
    """The former layouts that still matter: none, once all streams are past the passes that those had begun."""
    return list(former) if min(taken_in for taken_in, _ in cursors) <= last_pass(former) else []


def turn_of(seed: int, pass_: int, key: str, what: str, count: int) -> int:
    """Which of ``count`` things a sample gets in a pass: each once in every ``count`` passes, in a random order."""
    round_, place = divmod(pass_, count)
    return random.Random(f"{what} {seed} {round_} {key}").sample(range(count), count)[place]


def coin(seed: int, pass_: int, key: str, what: str) -> float:
    """A number in [0, 1) that only these decide."""
    return random.Random(f"{what} {seed} {pass_} {key}").random()
