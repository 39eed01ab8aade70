"""Where samples come from: shards in the order in which the trainer samples them, or passes.

``stream``   reads shards one after the other, for sampling with replacement
``passes``   reads the samples of one stream of positions, for sampling without replacement

Both yield ``Item``s that contain a sample's members. ``passes`` reads tars by random access, so it
does not support ``pipe:`` and ``http:`` URLs or compressed tars.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds

from .sample import BadSample
from .sampling import (
    Choice,
    Cursor,
    RandomChoice,
    ScheduledChoice,
    ShardOrder,
    iterate_positions,
)
from .tar import Members, Unknown, read_samples, sample_spans

UNREADABLE = "shard that can't be read"
# Shards in a row without one readable sample, after which a stream gives up.
MAX_UNREADABLE_SHARDS = 10
MAX_OPEN_SAMPLES = 30_000  # of a worker's open shards: two shards of DataComp, about 1 KB a sample
MAX_OPEN_SHARDS = 100  # each is an open file


class Skipped(NamedTuple):
    """A sample that was skipped.

    Attributes:
        reason: see ``BadSample``.
        message: the reason and its details.
        key, url: the sample and its shard.
        unknown: see ``BadSample``.
    """

    reason: str
    message: str
    key: str
    url: str
    unknown: Unknown | None = None


class Item(NamedTuple):
    """A sample on its way from the shards to a batch.

    Attributes:
        sample: its members by extension, with ``__key__`` and ``__url__``; after a processor, the
            selected parts. Empty if the sample is skipped.
        choice: how its augmentation and captions are chosen.
        cursor: without replacement, the stream's cursor after this sample.
        skipped: why it is skipped; None: it is not.
    """

    sample: dict
    choice: Choice
    cursor: Cursor | None = None
    skipped: Skipped | None = None

    def skip(self, error: BadSample, key: str = "", url: str = "") -> "Item":
        """This item, skipped for the reason of ``error``."""
        key, url = self.sample.get("__key__", key), self.sample.get("__url__", url)
        skipped = Skipped(error.reason, str(error), key, url, error.unknown)
        return self._replace(sample={}, skipped=skipped)


def stream(
    shards: Iterable[dict], wanted: Callable[[str], bool], choice: Choice | None = None
) -> Iterator[Item]:
    """Read shards one after the other.

    Args:
        shards: ``{"url": …}``, as WebDataset's shard lists yield them.
        wanted: which members to read, by extension.
        choice: how augmentations and captions are chosen; None: at random.

    Raises:
        RuntimeError: ``MAX_UNREADABLE_SHARDS`` shards in a row have no readable sample.
    """
    empty, choice = 0, choice or RandomChoice()
    for shard in shards:
        url, empty, fault = shard["url"], empty + 1, "it holds no sample"
        try:
            with wds.gopen(url) as file:
                for key, members in read_samples(file, wanted):
                    empty = 0
                    sample: dict = members
                    sample |= {"__key__": key, "__url__": url}
                    yield Item(sample, choice)
        except Exception as error:  # of files, pipes and HTTP, and of damaged tars
            fault = f"{type(error).__name__}: {error}"
            yield Item({}, choice).skip(BadSample(UNREADABLE, fault), url=url)
        if empty >= MAX_UNREADABLE_SHARDS:
            raise RuntimeError(
                f"{empty} shards in a row have no readable sample. The last one, {url}: {fault}. "
                "Check --train-data and the storage."
            )


# --- random access --------------------------------------------------------------------------------
class _OpenShard:
    """An open shard and the spans of its samples' members, as far as its headers can be read."""

    def __init__(self, path: str, wanted: Callable[[str], bool]):
        self.file: BinaryIO | None = None
        self.fault = ""
        self.samples: list[tuple[str, Members[tuple[int, int]]]] = []  # offset and size
        try:
            self.file = open(path, "rb")  # noqa: SIM115  (closed when it is evicted)
            for key, members in sample_spans(self.file):
                spans = Members(
                    (name, (m.offset, m.size)) for name, m in members.items() if wanted(name)
                )
                if members.unknown:
                    spans.unknown = members.unknown
                self.samples.append((key, spans))
        except Exception as error:  # of file systems and of damaged tars
            self.fault = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        if self.file:
            self.file.close()


class ShardReader:
    """Reads any sample of any shard by its place.

    The headers of a shard are read when its first sample is asked for. After that a sample takes
    one ``pread`` for each member. The shards used last stay open: at most ``MAX_OPEN_SHARDS``, and
    if they are more than two, with at most ``MAX_OPEN_SAMPLES`` samples together.

    Args:
        shards: paths of tars.
        wanted: which members to read, by extension.
    """

    def __init__(self, shards: Sequence[str], wanted: Callable[[str], bool]):
        self.shards, self.wanted = shards, wanted
        self.open: OrderedDict[int, _OpenShard] = OrderedDict()  # least recently used first

    def read(self, shard: int, place: int) -> dict:
        """Members of a sample by extension, as bytes, with ``__key__`` and ``__url__``.

        Raises:
            BadSample: the shard cannot be read up to that place, or has fewer samples.
        """
        opened = self._open(shard)
        if opened.file is None or place >= len(opened.samples):
            if opened.fault:
                raise BadSample(UNREADABLE, opened.fault)
            raise BadSample("not in its shard", f"sample {place} of {len(opened.samples)}")
        key, members = opened.samples[place]
        sample = Members[Any](__key__=key, __url__=self.shards[shard])
        sample.unknown = members.unknown
        for extension, (offset, size) in members.items():
            try:
                data = os.pread(opened.file.fileno(), size, offset)
            except OSError as error:
                raise BadSample(UNREADABLE, error) from error
            if len(data) != size:
                raise BadSample(UNREADABLE, f"the {extension} of {key} is cut off")
            sample[extension] = data
        return sample

    def _open(self, shard: int) -> _OpenShard:
        if shard not in self.open:
            self.open[shard] = _OpenShard(self.shards[shard], self.wanted)
        self.open.move_to_end(shard)
        while len(self.open) > MAX_OPEN_SHARDS or (
            len(self.open) > 2
            and sum(len(opened.samples) for opened in self.open.values()) > MAX_OPEN_SAMPLES
        ):
            self.open.popitem(last=False)[1].close()
        return self.open[shard]


def count_samples(shards: Sequence[str]) -> list[tuple[int, str]]:
    """Samples in each shard by its headers, and what is wrong with the shard, if anything."""

    def count(shard: str) -> tuple[int, str]:
        opened = _OpenShard(shard, lambda extension: False)
        opened.close()
        return len(opened.samples), opened.fault

    with ThreadPoolExecutor(16) as pool:  # the threads wait for storage
        return list(pool.map(count, shards))


class StreamState(NamedTuple):
    """The position of one stream of samples; see ``sampling``.

    Attributes:
        seed: seed of the run.
        sizes: number of samples in each shard.
        previous: cursors of all streams of the previous layouts.
        streams, stream: number of streams, and the number of this one.
        cursor: cursor of this stream.
    """

    seed: int
    sizes: Sequence[int]
    previous: Sequence[Sequence[Cursor]]
    streams: int
    stream: int
    cursor: Cursor


def passes(reader: ShardReader, state: StreamState) -> Iterator[Item]:
    """Read the samples at the positions that a stream takes; endless."""
    seed, sizes, total = state.seed, state.sizes, sum(state.sizes)
    order = lru_cache(2)(lambda pass_: ShardOrder(seed, pass_, sizes))
    positions = iterate_positions(
        seed, total, state.previous, state.streams, state.stream, state.cursor
    )
    for pass_, position, cursor in positions:
        shard, place = order(pass_).locate(position)
        item = Item({}, ScheduledChoice(seed, pass_), cursor)
        try:
            yield item._replace(sample=reader.read(shard, place))
        except BadSample as error:
            yield item.skip(error, f"number {place}", reader.shards[shard])
