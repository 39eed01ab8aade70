"""Any sample of any shard, by its place: random access to tars on a local or parallel file system.

A shard's headers are read once, when its first sample is asked for; after that a sample is one ``pread`` for each of
its members. The shards that are open are kept while they hold few samples together. A shard that is missing, cut off,
or gone while training runs costs the samples that can't be read, each of which is told as ``BadSample``.

Leaves out: streams (``pipe:``, ``http:``) and compressed tars, which have no random access.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor

from .sample import USED_MEMBERS, BadSample
from .tar import sample_spans

KEPT_SAMPLES = 30_000  # of open shards, for each worker: two shards of DataComp, and 1 KB each
KEPT_SHARDS = 100  # and as many open files
UNREADABLE = "shard that can't be read"


class _OpenShard:
    """A shard's file and where its samples' members are; as many of them as can be read."""

    def __init__(self, path: str):
        self.file, self.error = None, None
        self.samples: list[
            tuple[str, dict[str, tuple[int, int]]]
        ] = []  # key, {extension: (offset, size)}
        try:
            self.file = open(path, "rb")  # noqa: SIM115  (closed when it is evicted)
            for key, members in sample_spans(self.file):
                spans = {
                    name: (m.offset, m.size) for name, m in members.items() if name in USED_MEMBERS
                }
                self.samples.append((key, spans))
        except Exception as error:  # of file systems and of damaged headers
            self.error = error

    def close(self) -> None:
        if self.file:
            self.file.close()


class ShardReader:
    """Reads the ``wanted`` members, by extension, of samples in ``shards``, paths of tars."""

    def __init__(self, shards: Sequence[str], wanted: Container[str]):
        self.shards, self.wanted = shards, wanted
        self.open: OrderedDict[int, _OpenShard] = OrderedDict()  # least recently used first

    def read(self, shard: int, place: int) -> dict:
        """Members of a sample by extension, as bytes, with ``__key__`` and ``__url__``.

        Raises:
            BadSample: the shard can't be read so far, or holds fewer samples.
        """
        opened = self._opened(shard)
        if place >= len(opened.samples):
            if opened.error:
                raise BadSample(UNREADABLE, f"{type(opened.error).__name__}: {opened.error}")
            raise BadSample("not in its shard", f"sample {place} of {len(opened.samples)}")
        key, members = opened.samples[place]
        sample = {"__key__": key, "__url__": self.shards[shard]}
        for extension, (offset, size) in members.items():
            if extension in self.wanted:
                try:
                    sample[extension] = os.pread(opened.file.fileno(), size, offset)
                except OSError as error:
                    raise BadSample(UNREADABLE, error) from error
                if len(sample[extension]) != size:
                    raise BadSample(UNREADABLE, f"the {extension} of {key} is cut off")
        return sample

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self.open:
            self.open[shard] = _OpenShard(self.shards[shard])
        self.open.move_to_end(shard)
        while len(self.open) > KEPT_SHARDS or (
            len(self.open) > 2
            and sum(len(opened.samples) for opened in self.open.values()) > KEPT_SAMPLES
        ):
            self.open.popitem(last=False)[1].close()
        return self.open[shard]


def sizes_beside(shards: Sequence[str]) -> list[int | None]:
    """Samples in each shard by the ``sizes.json`` in its folder; None where there is no such file, or no entry.

    Raises:
        ValueError: a ``sizes.json`` that isn't ``{shard's name: samples}``.
    """
    found: dict[str, dict] = {}
    for folder in {os.path.dirname(shard) for shard in shards}:
        path = os.path.join(folder, "sizes.json")
        try:
            with open(path) as file:
                found[folder] = {name: int(size) for name, size in json.load(file).items()}
        except FileNotFoundError:
            found[folder] = {}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path}: expected an object of numbers of samples by shard: {error}"
            ) from error
    return [found[os.path.dirname(shard)].get(os.path.basename(shard)) for shard in shards]


def count_samples(shards: Sequence[str]) -> list[tuple[int, str | None]]:
    """Samples in each shard as its headers have them, and what is wrong with it, if anything."""

    def count(shard: str) -> tuple[int, str | None]:
        opened = _OpenShard(shard)
        opened.close()
        return len(
            opened.samples
        ), opened.error and f"{type(opened.error).__name__}: {opened.error}"

    with ThreadPoolExecutor(16) as pool:  # it waits for storage
        return list(pool.map(count, shards))
