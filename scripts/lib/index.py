"""Find samples in shards that are not aligned with the others: which shard holds a uid, and where.

The index is one SQLite file for a folder of shards. To build it, several processes read every
header and every ``<key>.json``. A sample takes 30 bytes on disk (measured: 380 MB for the 12.8 M
samples of DataComp-12M, so 38 GB for DataComp-1B), and up to three times as much while the index is
built.
Memory does not grow with it. It is built again when a shard was added, removed or changed in size
or time. Several runs may share the file: each writes its own, and the last complete one remains.
"""

import hashlib
import itertools
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from tqdm import tqdm

from dr.tar import merge_unknown

from .pool import run_all
from .publish import publish, remove_leftovers
from .shards import (
    HEADER_BUFFER,
    Contents,
    Samples,
    ShardError,
    Source,
    open_files,
    read_contents,
)

VERSION = 1  # of the tables
TABLES = """
    CREATE TABLE about (version INTEGER);
    CREATE TABLE shards (number INTEGER PRIMARY KEY, name TEXT, size INTEGER, modified INTEGER,
        fault TEXT);
    CREATE TABLE samples (uid INTEGER, shard INTEGER, first INTEGER, size INTEGER,
        PRIMARY KEY (uid, shard, first)) WITHOUT ROWID;
    CREATE TEMP TABLE scanned (uid INTEGER, shard INTEGER, first INTEGER, size INTEGER);
"""
Listed = tuple[int, str, int, int]  # number, name, size, time of change
Scanned = tuple[int, list[tuple[int, int, int, int]], str | None]  # number, rows, fault


def hash_uid(uid: str) -> int:
    """64 bits of a uid's hash. Two uids may share them: what is found is compared by its uid."""
    digest = hashlib.blake2b(os.fsencode(uid), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def scan_shard(shard: tuple[int, str]) -> Scanned:
    """The samples of a shard ``(number, path)`` as rows of the index, and what is wrong with it."""
    (number, path), extents = shard, dict[str, tuple[int, int]]()
    try:
        with open(path, "rb", buffering=HEADER_BUFFER) as file:
            read_contents(file, extents=extents)
    except (ShardError, OSError) as error:
        return number, [], str(error)
    finally:
        open_files.close()
    rows = [(hash_uid(uid), number, first, end - first) for uid, (first, end) in extents.items()]
    return number, rows, None


def _build(path: Path, shards: list[Listed], scanned: Iterable[Scanned]) -> None:
    def write(file: BinaryIO) -> None:
        with closing(sqlite3.connect(file.name)) as database:
            database.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE;" + TABLES
            )
            database.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, NULL)", shards)
            for number, rows, fault in scanned:
                database.executemany("INSERT INTO scanned VALUES (?, ?, ?, ?)", rows)
                database.execute("UPDATE shards SET fault = ? WHERE number = ?", (fault, number))
            # SQLite sorts on disk.
            database.execute("INSERT INTO samples SELECT * FROM scanned ORDER BY uid, shard, first")
            database.execute("INSERT INTO about VALUES (?)", (VERSION,))
            database.commit()

    os.environ.setdefault("SQLITE_TMPDIR", str(path.parent))  # /tmp is often small
    publish(path, write)
    remove_leftovers(path)  # of runs that were killed, or are too late


@dataclass(frozen=True)
class UnalignedSource:
    """Shards with other names or other samples in each, in which the uids of a shard are looked up.

    Attributes:
        folder: of the shards.
        index: the SQLite file.
        state: hash of the shards' names, sizes and faults.
    """

    folder: Path
    index: Path
    state: str

    @classmethod
    def open(cls, source: Source, output: Path, workers: int) -> "UnalignedSource":
        """A source whose index, in the ``.joined`` of the output folder, is up to date."""
        folder, shards = source.folder, list[Listed]()
        for number, name in enumerate(source.shards()):
            stat = (folder / name).stat()
            shards.append((number, name, stat.st_size, stat.st_mtime_ns))
        if not shards:
            raise SystemExit(f"no shards (*.tar) in {folder}, an --unaligned-source")
        which = [str(folder.resolve()), sorted(source.names or ())]
        place = hashlib.sha256(repr(which).encode()).hexdigest()[:16]
        opened = cls(folder, output / ".joined" / f"unaligned-{place}.sqlite", "")
        if not opened._is_fresh(shards):
            paths = [(number, str(folder / name)) for number, name, *_ in shards]
            scanned = run_all(scan_shard, paths, workers)
            bar = tqdm(scanned, "index of unaligned shards", total=len(paths), unit=" shards")
            try:
                _build(opened.index, shards, bar)
            except (sqlite3.Error, FileNotFoundError) as error:
                # A run that was faster removes our file; then its index is there.
                if not opened._is_fresh(shards):
                    raise SystemExit(f"{opened.index} can't be written: {error}") from error
        state = [[name, size] for _, name, size, _ in shards], opened.faults()
        return replace(opened, state=hashlib.sha256(repr(state).encode()).hexdigest()[:32])

    def _connect(self) -> closing[sqlite3.Connection]:
        # immutable: without locks, which network file systems are bad at. The file never changes,
        # it is only replaced as a whole.
        address = f"file:{quote(str(self.index))}?mode=ro&immutable=1"
        return closing(sqlite3.connect(address, uri=True))

    def _is_fresh(self, shards: list[Listed]) -> bool:
        query = "SELECT number, name, size, modified FROM shards ORDER BY number"
        try:
            with self._connect() as database:
                versions = database.execute("SELECT version FROM about").fetchall()
                return versions == [(VERSION,)] and database.execute(query).fetchall() == shards
        except sqlite3.Error:
            return False

    def faults(self) -> dict[str, str]:
        """What is wrong with shards that cannot be read, by name."""
        query = "SELECT name, fault FROM shards WHERE fault IS NOT NULL ORDER BY number"
        with self._connect() as database:
            return dict(database.execute(query))

    def stamp(self, name: str) -> str | None:
        """The state, for records; None if the folder does not exist any more."""
        return self.state if self.folder.is_dir() else None

    def path(self, name: str) -> Path:
        """A shard that shows what the source holds, whatever the name."""
        query = "SELECT name FROM shards ORDER BY fault IS NOT NULL, number"
        with self._connect() as database:
            (first,) = database.execute(query).fetchone()
        return self.folder / first

    def find(self, uids: Iterable[str]) -> Contents:
        """What the shards hold of these uids."""
        contents, unknown = Contents(Samples(), {}), None
        rows: list[tuple[int, int, int, str]] = []  # number of the shard, first byte, size, uid
        with self._connect() as database:
            query = "SELECT shard, first, size FROM samples WHERE uid = ?"
            for uid in uids:
                found = database.execute(query, (hash_uid(uid),))
                rows += [(*row, uid) for row in found]
            names = {
                number: database.execute(
                    "SELECT name FROM shards WHERE number = ?", (number,)
                ).fetchone()[0]
                for number in {row[0] for row in rows}
            }
        for number, group in itertools.groupby(sorted(rows), key=lambda row: row[0]):
            with open(self.folder / names[number], "rb", buffering=HEADER_BUFFER) as file:
                for _, first, size, uid in group:
                    part = read_contents(file, first, first + size)
                    unknown = merge_unknown(unknown, part.unknown)
                    if uid not in part.samples:
                        continue  # another uid with the same hash
                    if uid in contents.samples:
                        contents.refused[uid] = "a uid twice in one source"
                    contents.samples.setdefault(uid, part.samples[uid])
                    if uid in part.refused:
                        contents.refused.setdefault(uid, part.refused[uid])
        return contents._replace(unknown=unknown)
