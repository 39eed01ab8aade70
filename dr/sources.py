"""Where samples come from: shards in the order in which the trainer samples them, or passes.

``stream``   reads shards one after the other, for sampling with replacement
``passes``   reads the samples of one stream of positions, for sampling without replacement

Both yield ``Item``s that contain a sample's members. ``passes`` reads tars by random access, so it
does not support ``pipe:`` and ``http:`` URLs or compressed tars.
"""

import contextlib
import logging
import multiprocessing
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, count, islice
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import webdataset as wds

from .files import LocalFile, RemoteFile, StoreDown, is_url, open_file, read_file
from .index import SUFFIX, Array, Entry, IndexFault, ShardIndex, is_header_of, max_index_bytes
from .sample import BadSample, Row
from .sampling import (
    Choice,
    Cursor,
    RandomChoice,
    ScheduledChoice,
    ShardOrder,
    iterate_windows,
)
from .tar import BLOCK as TAR_BLOCK
from .tar import Members, Unknown, read_samples, sample_spans

UNREADABLE = "shard that can't be read"
# Shards in a row without one readable sample, after which a stream gives up.
MAX_UNREADABLE_SHARDS = 10
# Samples that are read, and selected, at once: the storage fetches them side by side, and between
# two images each step takes twice as long, because the caches are cold.
BLOCK = 64
MAX_GAP = 4096  # bytes between two spans that take one read
ARRAY_MEMBERS = ("npz", "safetensors")
RANGE = 8 << 20  # bytes of a request to a store: 28 samples of DataComp
MAX_REMOTE_GAP = 256 << 10  # as MAX_GAP
REQUESTS = 4  # to a store at a time
MAX_SECONDS = 600  # for a request with all its repetitions
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
        turn: its number in the order of the stream, where samples are read in another order.
    """

    sample: dict
    choice: Choice
    cursor: Cursor | None = None
    skipped: Skipped | None = None
    turn: int = 0

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
def merge_spans(spans: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Spans ``(start, stop)`` in order, those with at most ``gap`` bytes between them as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


class _OpenShard:
    """An open shard and its samples, by its index, or as far as its headers can be read.

    Args:
        path: of the tar.
        wanted: which members are kept where headers are read, by extension.
        trusted: whether to use the index.

    Attributes:
        fault: what is wrong with the shard, if anything.
        index_fault: why its index is not used.
    """

    def __init__(self, path: str, wanted: Callable[[str], bool], trusted: bool = True):
        self.file: LocalFile | RemoteFile | None = None
        self.fault = self.index_fault = ""
        self.samples: ShardIndex | list[Entry] = []
        try:
            self.file = open_file(path)
            if trusted and self._read_index(path, self.file.size, self.file.modified):
                return
            for key, members in sample_spans(self.file.as_stream()):
                spans = Members(
                    (name, (m.offset, m.size)) for name, m in members.items() if wanted(name)
                )
                if members.unknown:
                    spans.unknown = members.unknown
                self.samples.append(Entry(key, spans))
        except StoreDown:
            raise
        except Exception as error:  # of file systems and of damaged tars
            self.fault = f"{type(error).__name__}: {error}"

    def _read_index(self, path: str, size: int, modified: int | None) -> bool:
        try:
            data = read_file(path + SUFFIX, max_index_bytes(size) + 1)
            self.samples = ShardIndex(data, size, modified)
        except FileNotFoundError:
            self.index_fault = "is missing"
        except OSError as error:  # a store may answer so for what is missing
            self.index_fault = f"can't be read: {type(error).__name__}: {error}"
        except IndexFault as error:
            self.index_fault = str(error)
        return not self.index_fault

    def advise(self, spans: Iterable[tuple[int, int]]) -> None:
        """Have the storage prepare to read these bytes."""
        if self.file is not None:
            self.file.advise(merge_spans(spans, MAX_GAP))

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of spans; fewer where the file is cut off. Neighbours take one read.

        Raises:
            BadSample: the storage fails.
            StoreDown: nothing can be read from a store.
        """
        if self.file is None:
            raise BadSample(UNREADABLE, self.fault)
        try:
            read = [
                (start, self.file.fetch(start, stop)) for start, stop in merge_spans(spans, MAX_GAP)
            ]
        except OSError as error:
            raise BadSample(UNREADABLE, error) from error
        found = []
        for start, stop in spans:
            first, data = next(item for item in reversed(read) if item[0] <= start)
            found.append(data[start - first : stop - first])
        return found

    def close(self) -> None:
        if self.file:
            self.file.close()


class ShardReader:
    """Reads any sample of any shard by its place.

    Where a shard has an index (see ``index``), that is read when its first sample is asked for,
    otherwise its headers are read then. After that the members of a sample that are neighbours take
    one read. If the index knows the arrays of its embeddings, these are ``StoredRows``.

    What is read is compared with the index. If it differs, the index is no longer used, and the
    shard's headers are read.

    The shards used last stay open: at most ``MAX_OPEN_SHARDS``, and if they are more than two, with
    at most ``MAX_OPEN_SAMPLES`` samples together.

    Args:
        shards: paths of tars.
        wanted: which members to read, by extension.
    """

    def __init__(self, shards: Sequence[str], wanted: Callable[[str], bool]):
        self.shards, self.wanted = shards, wanted
        self.open: OrderedDict[int, _OpenShard] = OrderedDict()  # least recently used first
        self.distrusted: set[int] = set()  # shards whose index is wrong
        self._explained = False

    def advise(self, shard: int, place: int) -> None:
        """Have the storage prepare to read a sample."""
        opened = self.open_shard(shard)
        if place < len(opened.samples):
            opened.advise(self._spans(opened.samples[place]).values())

    def locate(self, shard: int, place: int) -> tuple[_OpenShard, list[tuple[int, int]]]:
        """The open shard, and the spans of a sample's members; none if it is not there."""
        opened = self.open_shard(shard)
        if place >= len(opened.samples):
            return opened, []
        return opened, sorted(self._spans(opened.samples[place]._replace(arrays=None)).values())

    def read_from(self, data: bytes, start: int, shard: int, place: int) -> dict:
        """As :func:`read` of the whole sample, which ``data``, the bytes from ``start``, has."""

        def fetch(spans: list[tuple[int, int]]) -> list[bytes]:
            if any(a < start or b > start + len(data) for a, b in spans):
                raise IndexFault("is wrong at another sample")  # since the range was requested
            return [data[a - start : b - start] for a, b in spans]

        with contextlib.suppress(IndexFault):
            return self._read(shard, place, True, fetch)
        return self.read(shard, place, whole=True)

    def read(self, shard: int, place: int, whole: bool = False) -> dict:
        """Members of a sample by extension, as bytes, with ``__key__`` and ``__url__``.

        Args:
            shard, place: of the sample.
            whole: read embeddings as bytes, even if their arrays are known.

        Raises:
            BadSample: the shard cannot be read up to that place, or has fewer samples.
        """
        try:
            return self._read(shard, place, whole)
        except IndexFault as error:
            self.explain(shard, error)
            self.distrusted.add(shard)
            self.open.pop(shard).close()
            return self._read(shard, place, whole)

    def _read(
        self,
        shard: int,
        place: int,
        whole: bool,
        fetch: Callable[[list[tuple[int, int]]], list[bytes]] | None = None,
    ) -> dict:
        opened = self.open_shard(shard)
        if opened.file is None or place >= len(opened.samples):
            if opened.fault:
                raise BadSample(UNREADABLE, opened.fault)
            raise BadSample("not in its shard", f"sample {place} of {len(opened.samples)}")
        entry = opened.samples[place]
        if whole:
            entry = entry._replace(arrays=None)
        sample = Members[Any](__key__=entry.key, __url__=self.shards[shard])
        sample.unknown = entry.members.unknown
        spans = self._spans(entry)
        found = (fetch or opened.read)(list(spans.values()))
        for (extension, (start, stop)), data in zip(spans.items(), found, strict=True):
            offset, size = entry.members[extension]
            header = data[: offset - start]
            indexed = isinstance(opened.samples, ShardIndex)
            if indexed and not is_header_of(header, entry.key, extension, size):
                raise IndexFault(f"is wrong at sample {place}: not the {extension} of {entry.key}")
            if len(data) != stop - start:
                raise BadSample(UNREADABLE, f"the {extension} of {entry.key} is cut off")
            data = data[offset - start :]
            if stop < offset + size and entry.arrays is not None:
                sample[extension] = _Rows(self, shard, place, extension, entry.arrays, data)
            else:
                sample[extension] = data
        return sample

    def _spans(self, entry: Entry) -> dict[str, tuple[int, int]]:
        """What to read of a sample, by extension: members and the header before each; of
        embeddings with known arrays only the beginning."""
        spans = {}
        for extension, (offset, size) in entry.members.items():
            if self.wanted(extension):
                end = size
                if entry.arrays is not None and extension in ARRAY_MEMBERS:
                    first = (a.stop for a in entry.arrays.values() if a.start == 0)
                    end = min(size, max(first, default=0))
                spans[extension] = offset - TAR_BLOCK, offset + end
        return spans

    def open_shard(self, shard: int) -> _OpenShard:
        """The shard, opened if it is not open."""
        if shard not in self.open:
            opened = _OpenShard(self.shards[shard], self.wanted, shard not in self.distrusted)
            self.open[shard] = opened
            if opened.index_fault and not opened.fault:
                self.explain(shard, opened.index_fault)
        self.open.move_to_end(shard)
        while len(self.open) > MAX_OPEN_SHARDS or (
            len(self.open) > 2
            and sum(len(opened.samples) for opened in self.open.values()) > MAX_OPEN_SAMPLES
        ):
            self.open.popitem(last=False)[1].close()
        return self.open[shard]

    def explain(self, shard: int, fault: object) -> None:
        """Log why the index of a shard is not used; once."""
        if not self._explained:
            self._explained = True
            logging.warning(
                f"{self.shards[shard]}{SUFFIX} {fault}. The shard is read without it, which takes "
                "longer; scripts/index_shards.py writes indices. (Logged for the first shard in "
                "this worker.)"
            )


class _Rows:
    """See ``sample.StoredRows``.

    Args:
        reader: of the sample.
        shard, place: of the sample.
        extension: of the member.
        arrays: where they are in the member.
        head: the first bytes of the member.
    """

    def __init__(
        self,
        reader: ShardReader,
        shard: int,
        place: int,
        extension: str,
        arrays: dict[str, Array],
        head: bytes,
    ):
        self.reader, self.shard, self.place = reader, shard, place
        self.extension, self.arrays, self.head = extension, arrays, head

    def _spans(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """Of the rows in the member, then of the descriptions that are not in its head."""
        spans = []
        for name, row in rows:
            array = self.arrays[name]
            start = array.offset + row * array.row_bytes
            spans.append((start, start + array.row_bytes))
        arrays = {name: self.arrays[name] for name, _ in rows}
        spans += [(a.start, a.stop) for a in arrays.values() if a.stop > len(self.head)]
        return spans

    def _locate(self, spans: Iterable[tuple[int, int]]) -> tuple[_OpenShard, list]:
        """The open shard, and the spans in it."""
        opened = self.reader.open_shard(self.shard)
        if not isinstance(opened.samples, ShardIndex):
            raise IndexFault("is wrong at another sample")
        offset, size = opened.samples[self.place].members[self.extension]
        if any(stop > size for _, stop in spans):
            raise IndexFault(f"is wrong at sample {self.place}: an array is beyond its member")
        return opened, [(offset + start, offset + stop) for start, stop in spans]

    def advise(self, rows: Sequence[Row]) -> None:
        with contextlib.suppress(IndexFault):
            opened, spans = self._locate(self._spans(rows))
            opened.advise(spans)

    def read(self, rows: Sequence[Row]) -> list[bytes]:
        try:
            return self._read(rows)
        except IndexFault as error:
            self.reader.explain(self.shard, error)
            raise

    def _read(self, rows: Sequence[Row]) -> list[bytes]:
        inside = self._spans(rows)
        opened, spans = self._locate(inside)
        found = dict(zip(inside, opened.read(spans), strict=True))
        for name in dict.fromkeys(name for name, _ in rows):
            array = self.arrays[name]
            data = found.get((array.start, array.stop), self.head[array.start : array.stop])
            if not array.is_described_by(data, name, self.extension):
                raise IndexFault(f"is wrong at sample {self.place}: {name} is another")
        if any(len(data) != stop - start for (start, stop), data in found.items()):
            raise IndexFault(f"is wrong at sample {self.place}: the shard is cut off")
        return [found[span] for span in inside[: len(rows)]]

    def read_sample(self) -> dict:
        return self.reader.read(self.shard, self.place, whole=True)


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

    def windows(self) -> Iterator[list[tuple[int, int, Item]]]:
        """Shard, place and empty item of what the stream takes next, window by window; endless."""
        order = lru_cache(2)(lambda pass_: ShardOrder(self.seed, pass_, self.sizes))
        for window in iterate_windows(
            self.seed, sum(self.sizes), self.previous, self.streams, self.stream, self.cursor
        ):
            yield [
                (
                    *order(pass_).locate(position),
                    Item({}, ScheduledChoice(self.seed, pass_), cursor),
                )
                for pass_, position, cursor in window
            ]


def passes(reader: ShardReader, state: StreamState) -> Iterator[Item]:
    """Read the samples at the positions that a stream takes, in this order; endless."""
    places = chain.from_iterable(state.windows())
    while True:
        block = list(islice(places, BLOCK))
        for shard, place, _ in block:
            reader.advise(shard, place)
        for shard, place, item in block:
            try:
                yield item._replace(sample=reader.read(shard, place))
            except BadSample as error:
                yield item.skip(error, f"number {place}", reader.shards[shard])


# --- object stores --------------------------------------------------------------------------------
class _Range:
    """Samples that are neighbours in a shard, and take one request.

    Attributes:
        opened: their shard.
        start, stop: the bytes to request.
        places: of the samples, with their items.
    """

    def __init__(self, opened: _OpenShard, start: int, stop: int):
        self.opened, self.start, self.stop = opened, start, stop
        self.places: list[tuple[int, int, Item]] = []

    def fetch(self) -> bytes | BadSample | StoreDown:
        try:
            file = self.opened.file
            return file.fetch(self.start, self.stop) if isinstance(file, RemoteFile) else b""
        except StoreDown as error:
            return error
        except Exception as error:  # backends raise any type
            return BadSample(UNREADABLE, error)


def _make_ranges(reader: ShardReader, places: Iterable[tuple[int, int, Item]]) -> Iterator[_Range]:
    """Group samples into ranges of about ``RANGE`` bytes; endless if ``places`` are."""
    made: _Range | None = None
    for shard, place, item in places:
        opened, spans = reader.locate(shard, place)
        start, stop = spans[0][0] if spans else 0, spans[-1][1] if spans else 0
        if made is not None and (
            opened is not made.opened
            or not made.stop <= start <= made.stop + MAX_REMOTE_GAP
            or stop > made.start + RANGE
        ):
            yield made
            made = None
        made = made or _Range(opened, start, stop)
        made.stop = stop
        made.places.append((shard, place, item))
    if made is not None:
        yield made


def passes_by_window(reader: ShardReader, state: StreamState) -> Iterator[Item]:
    """Read the samples of :func:`passes`, but within each window in the order in which they are
    stored. ``Item.turn`` counts in the order of the stream; see ``chain.in_order``.

    So neighbours take one request, and ``REQUESTS`` requests are on their way at any time.

    Raises:
        StoreDown: nothing can be read from the store.
    """
    turns = count()
    windows = (
        [(shard, place, item._replace(turn=next(turns))) for shard, place, item in window]
        for window in state.windows()
    )
    # The places of a shard's samples increase with their positions, and its samples are neighbours.
    by_shard = (sorted(window, key=lambda found: found[:2]) for window in windows)
    ranges = _make_ranges(reader, chain.from_iterable(by_shard))
    with ThreadPool(REQUESTS) as pool:
        waiting = deque[tuple[_Range, Any]]()
        while True:
            while len(waiting) < REQUESTS and (made := next(ranges, None)) is not None:
                waiting.append((made, pool.apply_async(made.fetch)))
            if not waiting:
                return
            made, result = waiting.popleft()
            try:
                data = result.get(MAX_SECONDS)
            except multiprocessing.TimeoutError:
                url = reader.shards[made.places[0][0]]
                raise StoreDown(f"no answer from the store of {url} in {MAX_SECONDS} s") from None
            if isinstance(data, StoreDown):
                raise data
            for shard, place, item in made.places:
                try:
                    if not is_url(reader.shards[shard]):
                        sample = reader.read(shard, place, whole=True)
                    elif isinstance(data, BadSample):
                        raise data
                    else:
                        sample = reader.read_from(data, made.start, shard, place)
                    yield item._replace(sample=sample)
                except BadSample as error:
                    yield item.skip(error, f"number {place}", reader.shards[shard])
