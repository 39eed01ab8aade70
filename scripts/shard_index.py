"""An index over image shards that are not aligned with the others: which shard holds a uid, and from where to where.

One SQLite file for a folder of shards, built once: every header and every `<key>.json` is read, by several processes.
A sample takes 30 bytes on disk (measured; 380 MB for the 12.8 M of DataComp-12M, 38 GB for DataComp-1B, and up to three
times that while it is built). Memory does not grow with it, neither when it is built nor when it is asked. It is built
anew when a shard has come, gone, or changed in size or time.

Several runs may share the file: each writes its own, and the last complete one stays.
"""

import hashlib
import itertools
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from shard_members import HEADER_BUFFER, Contents, Samples, ShardError, open_files, read_contents

VERSION = 1  # of the tables
TABLES = """
    CREATE TABLE about (version INTEGER);
    CREATE TABLE shards (number INTEGER PRIMARY KEY, name TEXT, size INTEGER, modified INTEGER, fault TEXT);
    CREATE TABLE samples (uid INTEGER, shard INTEGER, first INTEGER, size INTEGER, PRIMARY KEY (uid, shard, first))
        WITHOUT ROWID;
    CREATE TEMP TABLE scanned (uid INTEGER, shard INTEGER, first INTEGER, size INTEGER);
"""


def number_of(uid):
    """64 bits of a uid's hash. That two share them does no harm: what is found is compared by the whole uid."""
    return int.from_bytes(
        hashlib.blake2b(os.fsencode(uid), digest_size=8).digest(), "big", signed=True
    )


def listing(folder, names):
    """``[(number, name, size, time of change)]`` of the shards there."""
    stats = [(number, name, (folder / name).stat()) for number, name in enumerate(sorted(names))]
    return [(number, name, stat.st_size, stat.st_mtime_ns) for number, name, stat in stats]


def scan_shard(shard):
    """The samples of one shard as rows for the index, and what is wrong with the shard, if anything."""
    (number, path), extents = shard, {}
    try:
        with open(path, "rb", buffering=HEADER_BUFFER) as file:
            read_contents(file, extents=extents)
    except (ShardError, OSError) as error:
        return number, [], str(error)
    finally:
        open_files.close()
    return (
        number,
        [(number_of(uid), number, first, last - first) for uid, (first, last) in extents.items()],
        None,
    )


def build(path, shards, scanned):
    """Write the index at ``path``; ``scanned`` yields what :func:`scan_shard` makes of each of the ``shards``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial"
    partial.unlink(missing_ok=True)  # of a killed run with our process number
    os.environ.setdefault("SQLITE_TMPDIR", str(path.parent))  # /tmp is often small
    database = sqlite3.connect(partial)
    try:
        database.executescript(
            f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE; {TABLES}"
        )
        database.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, NULL)", shards)
        for number, rows, fault in scanned:
            database.executemany("INSERT INTO scanned VALUES (?, ?, ?, ?)", rows)
            database.execute("UPDATE shards SET fault = ? WHERE number = ?", (fault, number))
        database.execute(
            "INSERT INTO samples SELECT * FROM scanned ORDER BY uid, shard, first"
        )  # sorts on disk
        database.execute("INSERT INTO about VALUES (?)", (VERSION,))
        database.commit()
        database.close()
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        for leftover in path.parent.glob(
            f".{path.name}.*.partial"
        ):  # of runs that were killed, or are too late
            leftover.unlink(missing_ok=True)
    finally:
        database.close()
        partial.unlink(missing_ok=True)


class UnalignedSource(NamedTuple):
    """Shards of any names and boundaries, in which the uids of a shard are looked up."""

    folder: Path
    index: Path
    state: str  # hash of the shards' names, sizes and faults

    @classmethod
    def open(cls, source, output, scan_all):
        """A ``Source`` with an up-to-date index; ``scan_all(function, items)`` yields the function's results."""
        folder, shards = source.folder, listing(source.folder, source.shards())
        if not shards:
            raise SystemExit(f"no shards (*.tar) in {folder}, an --unaligned-source")
        which = [str(folder.resolve()), sorted(source.names or ())]
        place = hashlib.sha256(repr(which).encode()).hexdigest()[:16]
        source = cls(folder, output / ".joined" / f"unaligned-{place}.sqlite", "")
        if not source.is_fresh(shards):
            paths = [(number, str(folder / name)) for number, name, *_ in shards]
            try:
                build(source.index, shards, scan_all(scan_shard, paths))
            except (sqlite3.Error, FileNotFoundError) as error:
                if not source.is_fresh(
                    shards
                ):  # it is when another run was faster, which then takes ours away
                    raise SystemExit(f"{source.index} can't be written: {error}") from error
        state = [[name, size] for _, name, size, _ in shards], source.faults()
        return source._replace(state=hashlib.sha256(repr(state).encode()).hexdigest()[:32])

    def ask(self):
        # immutable: no locks, which network file systems are bad at; the file is only ever replaced as a whole
        return closing(
            sqlite3.connect(f"file:{quote(str(self.index))}?mode=ro&immutable=1", uri=True)
        )

    def is_fresh(self, shards):
        try:
            with self.ask() as database:
                versions = database.execute("SELECT version FROM about").fetchall()
                held = database.execute(
                    "SELECT number, name, size, modified FROM shards ORDER BY number"
                ).fetchall()
                return versions == [(VERSION,)] and held == shards
        except sqlite3.Error:
            return False

    def faults(self):
        """``{shard: what is wrong with it}``, of those whose samples can't be had."""
        with self.ask() as database:
            return dict(
                database.execute(
                    "SELECT name, fault FROM shards WHERE fault IS NOT NULL ORDER BY number"
                )
            )

    def stamp(self, name):
        """What a joined shard's record says of this source; None: it isn't there any more."""
        return self.state if self.folder.is_dir() else None

    def example(self, name):
        """A shard by which to tell what the source holds."""
        with self.ask() as database:
            (first,) = database.execute(
                "SELECT name FROM shards ORDER BY fault IS NOT NULL, number"
            ).fetchone()
            return self.folder / first

    def find(self, uids):
        """The :class:`Contents` of those of the ``uids`` that are there."""
        contents, rows, names = Contents(Samples(), {}), [], {}
        with self.ask() as database:
            for uid in uids:
                for row in database.execute(
                    "SELECT * FROM samples WHERE uid = ?", (number_of(uid),)
                ):
                    rows.append((*row[1:], uid))
            for number in {row[0] for row in rows}:
                (names[number],) = database.execute(
                    "SELECT name FROM shards WHERE number = ?", (number,)
                ).fetchone()
        for number, group in itertools.groupby(sorted(rows), key=lambda row: row[0]):
            with open(self.folder / names[number], "rb", buffering=HEADER_BUFFER) as file:
                for _, first, size, uid in group:
                    part = read_contents(file, first, first + size)
                    if uid not in part.samples:
                        continue  # another uid of the same hash
                    if uid in contents.samples:
                        contents.refused[uid] = "a uid twice in one source"
                    for ours, theirs in zip(contents, part, strict=True):
                        if uid in theirs:
                            ours.setdefault(uid, theirs[uid])
        return contents
