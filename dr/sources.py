"""Where samples come from: shards in the order in which the trainer samples them, or passes.

``stream``   reads shards one after the other, for sampling with replacement
``passes``   reads the samples of one stream of positions, for sampling without replacement

Both yield ``Item``s that contain a sample's members. ``passes`` reads tars by random access, so it
does not support ``pipe:`` and ``http:`` URLs or compressed tars.
"""

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds

from .index import SUFFIX, Array, Entry, IndexFault, ShardIndex, is_header_of, max_index_bytes
from .sample import BadSample, Row
from .sampling import (
    Choice,
    Cursor,
    RandomChoice,
    ScheduledChoice,
    ShardOrder,
    iterate_positions,
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
        self.file: BinaryIO | None = None
        self.fault = self.index_fault = ""
        self.samples: ShardIndex | list[Entry] = []
        try:
            self.file = open(path, "rb")  # noqa: SIM115  (closed when it is evicted)
            if trusted and self._read_index(path, os.fstat(self.file.fileno())):
                return
            for key, members in sample_spans(self.file):
                spans = Members(
                    (name, (m.offset, m.size)) for name, m in members.items() if wanted(name)
                )
                if members.unknown:
                    spans.unknown = members.unknown
                self.samples.append(Entry(key, spans))
        except Exception as error:  # of file systems and of damaged tars
            self.fault = f"{type(error).__name__}: {error}"

    def _read_index(self, path: str, status: os.stat_result) -> bool:
        try:
            with open(path + SUFFIX, "rb", buffering=0) as file:  # one read, of any size
                data = file.read(max_index_bytes(status.st_size) + 1)
            self.samples = ShardIndex(data, status.st_size, int(status.st_mtime))
        except FileNotFoundError:
            self.index_fault = "is missing"
        except IndexFault as error:
            self.index_fault = str(error)
        return not self.index_fault

    def advise(self, spans: Iterable[tuple[int, int]]) -> None:
        """Have the file system fetch these bytes, which are read soon."""
        if self.file is not None and hasattr(os, "posix_fadvise"):
            for start, stop in spans:
                os.posix_fadvise(self.file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of spans; fewer where the file is cut off. Neighbours take one read.

        Raises:
            BadSample: the file system fails.
        """
        if self.file is None:
            raise BadSample(UNREADABLE, self.fault)
        try:
            read = [
                (start, os.pread(self.file.fileno(), stop - start, start))
                for start, stop in merge_spans(spans, MAX_GAP)
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
            entry = opened.samples[place]
            opened.advise(merge_spans(self._spans(entry).values(), MAX_GAP))

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

    def _read(self, shard: int, place: int, whole: bool) -> dict:
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
        found = opened.read(list(spans.values()))
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
                    end = min(size, max(a.stop for a in entry.arrays.values() if a.start == 0))
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
            opened.advise(merge_spans(spans, MAX_GAP))

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


def passes(reader: ShardReader, state: StreamState) -> Iterator[Item]:
    """Read the samples at the positions that a stream takes; endless."""
    seed, sizes, total = state.seed, state.sizes, sum(state.sizes)
    order = lru_cache(2)(lambda pass_: ShardOrder(seed, pass_, sizes))
    positions = iterate_positions(
        seed, total, state.previous, state.streams, state.stream, state.cursor
    )
    while True:
        block = []
        for pass_, position, cursor in islice(positions, BLOCK):
            shard, place = order(pass_).locate(position)
            reader.advise(shard, place)
            block.append((shard, place, Item({}, ScheduledChoice(seed, pass_), cursor)))
        for shard, place, item in block:
            try:
                yield item._replace(sample=reader.read(shard, place))
            except BadSample as error:
                yield item.skip(error, f"number {place}", reader.shards[shard])
