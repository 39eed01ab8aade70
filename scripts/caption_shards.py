"""Make caption shards from parquet metadata (`uid`, `text`), aligned with the reinforcement shards of DataCompDR-1B.

    python scripts/caption_shards.py --metadata datasets/DataComp-1B-metadata \\
        --shards-of datasets/DataCompDR-1B-noimage --output datasets/DataComp-1B --memory 64GB

DataCompDR-1B has no original captions; they are in the metadata of DataComp-1B, in another order. This looks each uid
of a reinforcement shard up there and writes a shard of the same name that holds `<uid>.txt`, in the same order. The
join takes the output as its captions: DATACOMP1B_PATH of join_datacompdr1b.sh, or any --source. Needs DuckDB 2, the
extra `captions`.

Three stages, each of which leaves files, so that a run that was interrupted is run again and goes on:
    1. uids: the headers of each reinforcement shard are read, its uids kept in a parquet file
    2. join: for a part of the shards at a time (--part samples; by default one for each 32 bytes of --memory, at most
       250 million), DuckDB reads all metadata, joins it with their uids, sorts by shard and position, and leaves a
       parquet file; what doesn't fit into --memory it spills into --temp
    3. shards: tars are written from that file, which is removed when all of its shards are done
Finished shards are skipped as long as the reinforcement shard and the metadata files (names, sizes, times) are as they
were. The same sources give the same bytes, whatever --memory, --part and --threads are.

uids are compared as 128-bit numbers: 32 hex digits in upper or lower case, with or without dashes, are one uid, and the
output spells it as the reinforcement shard does. Any other uid is compared by its MD5, so exactly.

Left out and counted: uids that the metadata lacks, and those whose captions are all null or blank. Of several rows with
one uid, the caption that comes first in byte order is taken, and the others are counted (only for uids that some shard
holds). A caption of over 16 KB is cut to 4,096 characters, many times what a tokenizer looks at; bytes that are not
UTF-8 become `?`. A shard of which not one caption is found fails, as one that is damaged: one line, the others go on.

Leaves in the output folder
    <shard>.tar             `<uid>.txt` of each sample that has a caption
    caption_report.json     counts, seconds of each stage, peak of memory and of spilled bytes
    .captions/              the uids of each shard (0.4 MB), from what it was made, and work in progress
Several machines share out the shards with --shards, each with a --temp of its own.

Scale: meant for one machine and one or two billion rows. Measured (2 cores that others used too, local disk, metadata
in the page cache, captions of about 75 bytes, DuckDB 2.0.1; first row: benchmark_captions.py --memory 1GB, the others:
the join alone, from files of uids; memory: the largest process's peak):

    metadata rows   samples   --memory   uids, s   join, s   shards, s   memory   spilled
    12 M            10 M      1 GB       73         9        46          1.1 GB   0.9 GB
    32 M            30 M      600 MB               53                    0.8 GB   4.8 GB
    32 M            30 M      1 GB                 31                    1.2 GB   4.5 GB
    32 M            30 M      8 GB                 23                    5.7 GB   none

From these, not measured, the 1.28 billion samples of DataCompDR-1B. uids: 15 hours of one core, shared by the
processes, as real shards have five members a sample (0.84 s a shard measured; a disk that seeks takes longer). join:
about an hour on 2 cores with the default 8 GB, that is 6 parts, each of which reads all metadata again, 0.22 s for a
million rows, and adds 0.8 s for a million samples. shards: 1.6 hours with 2 processes. Disk: 40 GB spilled (150 bytes
for each sample of a part), 10 GB for the joined part, 25 GB for the uids, and 1.3 TB of output, 1 KB a sample, as tars
are. The join's time grows with rows times parts: for ten times the rows, as all of CommonPool has, take ten times the
memory and a larger --part, or Spark; Spark also where a cluster holds the metadata already.

The join takes 0.1 to 0.25 GB beside --memory. A page of the metadata must fit into it for each thread, and several
times 20,480 captions: 200MB, the least, do for captions of 256 bytes on average, not for a kilobyte.

Leaves out: captions whose text changed since they were embedded; nothing tells them apart.
"""

import argparse
import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, groupby
from pathlib import Path

from join_shards import Source, expand, publish, publish_json, run_all, write_tar
from shard_members import NAME_LIMIT, ShardError, open_files
from tqdm import tqdm

try:
    import duckdb
except ImportError:
    duckdb = None

VERSION = 1  # of the bytes this script writes; raise it to have old shards made again
MEMORY_A_SAMPLE = (
    32  # bytes of --memory for each sample of a part; at 20 the join of 10 M samples went well too
)
PART = 250_000_000  # samples at most by default: every shard is read by way of the part's footer, which grows
LONG, CUT = (
    16 << 10,
    4096,
)  # bytes that a caption may have; characters to which a longer one is cut: as many at most
ROW_GROUP = 20480  # rows, about a shard's: who reads a shard's captions then decodes little else
WORKER_MEMORY = (
    10**9
)  # bytes that DuckDB may take in a process that does one shard; 0.1 GB is what it takes
PATTERN = set("*?[")  # in a path, for DuckDB
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}

JOIN = """
COPY (
    WITH wanted AS (
        SELECT (file_index::BIGINT << 32) + file_row_number AS place, {key} AS key
        FROM read_parquet($lists, explicit_cardinality={samples})
    ), captions AS (
        SELECT {key} AS key, strlen(text) > {long} AS cut,
            CASE WHEN strlen(text) > {long} THEN left(text, {characters}) ELSE text END AS text
        FROM read_parquet($metadata, explicit_cardinality={rows}, binary_as_string=true, utf8_validation='replace')
    )
    SELECT place, text, cut FROM wanted JOIN captions USING (key) ORDER BY place
) TO '{to}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {row_group}, USE_TMP_FILE false)
"""
KEY = "coalesce(try_cast(uid AS UUID), md5(uid::VARCHAR)::UUID)"  # text took more than twice the memory


def first_line(error):
    return str(error).partition("\n")[0]


def connect(memory, threads, temp):
    """``memory`` in bytes; without ``temp`` nothing is spilled."""
    settings = {
        "memory_limit": f"{memory // 10**6}MB",
        "threads": threads,
        "temp_directory": str(temp or ""),
    }
    connection = duckdb.connect(config={**settings, "autoinstall_known_extensions": False})
    # it takes memory for a whole row group of each thread's file, in the place of a page
    connection.execute("LOAD parquet; SET disable_parquet_prefetching = true")
    return connection


@functools.cache
def worker():
    """DuckDB for one shard, kept from shard to shard."""
    return connect(WORKER_MEMORY, 1, None)


def publish_anew(path, write):
    """:func:`publish`, in a folder that may not be there, after taking away what killed runs left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        leftover.unlink(missing_ok=True)
    return publish(path, write)


def beside(output, name, extension):
    return output / ".captions" / f"{name}.{extension}"


# stage 1: uids


def list_uids(name, source, output):
    """Leave the uids of a shard in a parquet file, unless that is done already; return what came of it."""
    path = beside(output, name, "uids.parquet")
    try:
        source.path(name)
        stamp = source.stamp(name)
        with contextlib.suppress(duckdb.Error):  # it isn't there, or is damaged
            (made_from,) = (
                worker()
                .execute("SELECT value FROM parquet_kv_metadata($1)", [str(path)])
                .fetchone()
            )
            if json.loads(made_from) == stamp:
                (samples,) = (
                    worker()
                    .execute("SELECT count(*) FROM read_parquet($1)", [str(path)])
                    .fetchone()
                )
                return {"shard": name, "stamp": stamp, "samples": samples}
        contents = source.contents(name)
        # those that are refused the join leaves out, and counts
        usable = (uid for uid in contents.samples if uid not in contents.refused)
        uids = [uid for uid in usable if len(os.fsencode(f"{uid}.txt")) <= NAME_LIMIT]
        if not uids:
            raise ShardError("holds no sample that the join could use")

        def write(file):  # by its name: DuckDB writes into the file that publish has opened
            copy = f"COPY (SELECT unnest($1::VARCHAR[]) AS uid) TO '{quoted(file.name)}' (FORMAT parquet, "
            copy += f"COMPRESSION zstd, USE_TMP_FILE false, KV_METADATA {{made_from: '{json.dumps(stamp)}'}})"
            worker().execute(copy, [uids])

        publish_anew(path, write)
        return {"shard": name, "stamp": stamp, "samples": len(uids)}
    except Exception as error:  # whatever a damaged file makes tarfile say: the other shards go on
        return failure(name, error)
    finally:
        open_files.close()


def interrupted(error):
    """Whether it is what DuckDB makes of Ctrl-C."""
    return isinstance(error, RuntimeError) and "Query interrupted" in str(error)


def failure(name, error):
    if interrupted(error):
        raise KeyboardInterrupt
    known = isinstance(error, ShardError | OSError)
    line = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
    return {"shard": name, "state": "failed", "error": line}


def quoted(path):
    return str(path).replace("'", "''")


# stage 2: join


def metadata_files(pattern):
    path = Path(pattern)
    files = (
        path.rglob("*.parquet") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    )
    if not (files := sorted(file for file in files if file.is_file())):
        raise SystemExit(
            f"--metadata {pattern}: no parquet files there; give their folder, or a pattern in quotes"
        )
    if bad := next((file for file in files if PATTERN & set(str(file))), None):
        raise SystemExit(f"{bad}: DuckDB takes a path with * ? [ for a pattern; rename it")
    return files


def open_metadata(files):
    """How many rows they have, by their footers; each must be whole and have the two columns."""
    rows = 0
    for file in tqdm(files, desc="metadata", unit=" files", leave=False):
        try:
            described = worker().execute(f"DESCRIBE SELECT * FROM {parquet(file)}").fetchall()
            rows += (
                worker()
                .execute("SELECT num_rows FROM parquet_file_metadata($1)", [str(file)])
                .fetchone()[0]
            )
        except duckdb.Error as error:
            raise SystemExit(f"{file} can't be read, get it anew: {first_line(error)}") from None
        columns = {column.lower(): kind for column, kind, *_ in described}
        for column, kinds in (("uid", ("VARCHAR", "UUID")), ("text", ("VARCHAR",))):
            if column not in columns:
                raise SystemExit(
                    f"{file} has no column {column}; its columns are {', '.join(columns)}"
                )
            if columns[column] not in kinds:
                raise SystemExit(
                    f"{file}: its column {column} is {columns[column]}, expected {' or '.join(kinds)}"
                )
    return rows


def parquet(file):
    return f"read_parquet('{quoted(file)}', binary_as_string=true)"


def fingerprint(*what):
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def parts_of(listed, size):
    """Split the listed shards into runs of about ``size`` samples."""
    before = accumulate((result["samples"] for result in listed), initial=0)
    numbered = groupby(zip(before, listed, strict=False), key=lambda pair: pair[0] // size)
    return [[result for _, result in part] for _, part in numbered]


@contextlib.contextmanager
def watched(connection, spill, bar, told):
    """Meanwhile show how far the query is, and note in ``told`` how much it spills."""
    ended = threading.Event()

    def watch():
        while not ended.wait(0.2):
            told["spilled_bytes"] = max(
                told["spilled_bytes"], sum(size_of(file) for file in spill.glob("*"))
            )
            bar.update(max(0, round(connection.query_progress()) - bar.n))

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        yield
    finally:
        ended.set()
        with contextlib.suppress(RuntimeError):  # it didn't come to start
            watcher.join()


def size_of(file):
    try:
        return file.stat().st_size
    except OSError:  # gone meanwhile
        return 0


def join_part(path, part, files, rows, args, work, told):
    """Leave the captions of a part's shards at ``path``: (place, text, cut), sorted by place.

    A place is the shard's number in the part, in the upper half of 64 bits, and the sample's position in the shard.
    """
    spill, partial = work / "spill", work / "part.partial"
    partial.unlink(missing_ok=True)
    samples = sum(result["samples"] for result in part)
    settings = {
        "samples": samples,
        "rows": rows,
        "long": LONG,
        "characters": CUT,
        "row_group": ROW_GROUP,
    }
    query = JOIN.format(key=KEY, to=quoted(partial), **settings)
    lists = [str(beside(args.output, result["shard"], "uids.parquet")) for result in part]
    values = {"lists": lists, "metadata": [str(file) for file in files]}
    with (
        contextlib.closing(connect(args.memory, args.threads, spill)) as connection,
        tqdm(total=100, desc=f"join of {samples:,} samples", unit="%") as bar,
    ):
        connection.execute(
            "SET preserve_insertion_order = false"
        )  # but for ORDER BY's; it takes memory
        connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
        with watched(connection, spill, bar, told):
            connection.execute(query, values)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


# stage 3: shards


def finished(name, made, output):
    """The record of a finished shard, or None."""
    try:
        record = json.loads(beside(output, name, "json").read_text())
        up_to_date = record["made"] == made and record["bytes"] == (output / name).stat().st_size
        return record if up_to_date else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def usable(text):
    return text is not None and bool(text.strip())


def caption_shard(item, joined, output):
    """Write one shard's captions from the file that the join left; return what came of it."""
    number, name, made = item
    try:
        lists = str(beside(output, name, "uids.parquet"))
        uids = [
            uid
            for (uid,) in worker().execute("SELECT uid FROM read_parquet($1)", [lists]).fetchall()
        ]
        query = (
            "SELECT place - $2, text, cut FROM read_parquet($1) WHERE place >= $2 AND place < $3"
        )
        rows = worker().execute(query, [str(joined), number << 32, (number + 1) << 32])
        captions, counts = {}, Counter()  # captions: {position: (text, cut)}
        while batch := rows.fetchmany(10_000):
            for position, text, cut in batch:
                counts["duplicates in the metadata"] += position in captions
                before = captions.setdefault(position, (None, False))
                if usable(text) and (before[0] is None or text < before[0]):
                    captions[position] = text, cut
        counts["without: not in the metadata"] = len(uids) - len(captions)
        counts["without: an empty caption"] = sum(text is None for text, _ in captions.values())
        counts["long captions cut"] = sum(cut for _, cut in captions.values())
        samples = ((uid, captions.get(position, (None,))[0]) for position, uid in enumerate(uids))
        members = [(uid, {"txt": text.encode()}) for uid, text in samples if text is not None]
        if not members:
            raise ShardError(f"the metadata has a caption for none of its {len(uids)} uids")
        record = beside(output, name, "json")
        record.unlink(missing_ok=True)
        publish_anew(output / name, lambda file: write_tar(file, members))
        kept = {
            "made": made,
            "bytes": (output / name).stat().st_size,
            "samples": len(members),
            "counts": +counts,
        }
        publish_anew(record, lambda file: file.write(json.dumps(kept).encode()))
        return {**kept, "shard": name, "state": "written"}
    except Exception as error:
        return failure(name, error)


# telling


def table(report):
    rows = [("captions", report["samples"]), *sorted(report["counts"].items(), reverse=True)]
    rows += [
        (f"shards {state}", number)
        for state, number in sorted(report["shards"].items(), reverse=True)
    ]
    width = max(len(label) for label, _ in rows)
    seconds = ", ".join(f"{stage} {number:.0f}" for stage, number in report["seconds"].items())
    memory = f"{report['peak_bytes'] / 1e9:.2f} GB of memory, {report['spilled_bytes'] / 1e9:.2f} GB spilled"
    return "\n".join(
        [
            *(f"{label:<{width}}  {number:>13,}" for label, number in rows),
            f"seconds: {seconds}; {memory}",
        ]
    )


def peak_memory():
    """Bytes that the largest process took, in Linux; its ru_maxrss alone would begin with that of who started it."""
    own = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * max(int(own[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def memory_size(text):
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|TB)", text, re.IGNORECASE)):
        raise argparse.ArgumentTypeError(
            f"{text} is no size: expected a number and MB, GB or TB, as in 8GB"
        )
    if (size := int(float(found[1]) * UNITS[found[2].upper()])) < 200 * 10**6:
        raise argparse.ArgumentTypeError(f"{text} is too little: at least 200MB")
    return size


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option, cores = parser.add_argument, os.cpu_count() or 1
    add_option(
        "--metadata",
        required=True,
        metavar="DIR|GLOB",
        help="parquet files with the columns uid and text",
    )
    add_option(
        "--shards-of",
        required=True,
        metavar="DIR|PATTERN",
        help="reinforcement shards: a folder, or as braces",
    )
    add_option(
        "--shards", metavar="PATTERN", help="brace pattern of names; default: all that are there"
    )
    add_option("--output", type=Path, required=True, metavar="DIR")
    add_option(
        "--memory",
        type=memory_size,
        default="8GB",
        help="what the join may take; default %(default)s",
    )
    add_option(
        "--temp",
        type=Path,
        metavar="DIR",
        help="for what the join spills; default: in the output folder",
    )
    add_option(
        "--threads",
        type=int,
        default=cores,
        help="of the join, and processes beside it; default %(default)s",
    )
    add_option(
        "--part",
        type=int,
        metavar="N",
        help="samples to join at a time; default: --memory / 32 bytes, at most 250 M",
    )
    args = parser.parse_args(arguments)
    args.part = args.part if args.part is not None else min(args.memory // MEMORY_A_SAMPLE, PART)
    if args.threads < 1 or args.part < 1:
        parser.error("--threads and --part: at least 1")
    if "{" not in args.shards_of and not Path(args.shards_of).is_dir():
        parser.error(f"--shards-of {args.shards_of}: no such folder")
    args.work = (args.temp or args.output / ".captions") / "work"
    for path in (args.output, args.work):
        if PATTERN & set(str(path)):
            parser.error(
                f"{path}: DuckDB takes a path with * ? [ for a pattern; choose another folder"
            )
    return args


@contextlib.contextmanager
def work_folder(path):
    """A folder for one run at a time, emptied of all but joined parts."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"another run is at work in {path}; give this one a --temp of its own"
            ) from None
        shutil.rmtree(path / "spill", ignore_errors=True)
        yield
        shutil.rmtree(path / "spill", ignore_errors=True)


def make_captions(names, source, files, rows, args, report):
    """The three stages; adds to the report."""

    def tell(bar, result):
        report["shards"][result["state"]] += 1
        if result["state"] == "failed":
            report["failed"][result["shard"]] = result["error"]
            bar.write(f"{result['shard']}: failed: {result['error']}", file=sys.stderr)
        else:
            report["samples"] += result["samples"]
            report["counts"].update(result["counts"])

    @contextlib.contextmanager
    def stage(name):
        start = time.monotonic()
        yield
        report["seconds"][name] = report["seconds"].get(name, 0) + round(
            time.monotonic() - start, 2
        )

    listed = {}
    with stage("uids"), tqdm(total=len(names), desc="uids", unit=" shards") as bar:
        for result in run_all(
            functools.partial(list_uids, source=source, output=args.output), names, args.threads
        ):
            if "error" in result:
                tell(bar, result)
            else:
                listed[result["shard"]] = result
            bar.update()

    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    metadata = fingerprint(stamps)
    parts = parts_of([listed[name] for name in names if name in listed], args.part)
    path_of = {fingerprint(VERSION, metadata, part): part for part in parts}
    for leftover in args.work.glob("part*.*"):
        if leftover.stem.removeprefix("part-") not in path_of:
            leftover.unlink()

    with tqdm(total=len(listed), desc="shards", unit=" shards") as bar:
        for which, part in path_of.items():
            todo, joined = [], args.work / f"part-{which}.parquet"
            for number, result in enumerate(part):
                made = {"version": VERSION, "metadata": metadata, "shard": result["stamp"]}
                if record := finished(result["shard"], made, args.output):
                    tell(bar, {**record, "shard": result["shard"], "state": "already there"})
                    bar.update()
                else:
                    todo.append((number, result["shard"], made))
            if todo and not joined.exists():
                with stage("join"):
                    join_part(joined, part, files, rows, args, args.work, report)
            with stage("shards"):
                write, failed = (
                    functools.partial(caption_shard, joined=joined, output=args.output),
                    False,
                )
                for result in run_all(write, todo, args.threads):
                    tell(bar, result)
                    failed = failed or result["state"] == "failed"
                    bar.update()
            if not failed:
                joined.unlink(missing_ok=True)


def main(arguments=None):
    args = parse_arguments(arguments)
    if duckdb is None or int(duckdb.__version__.partition(".")[0]) < 2:
        raise SystemExit(
            "DuckDB 2 is needed: pip install 'duckdb>=2', or this repository's extra: -e '.[captions]'"
        )
    source = Source.parse(args.shards_of)
    if source.folder.resolve() in (args.output.resolve(), *args.output.resolve().parents):
        raise SystemExit(
            f"--output {args.output} is the folder of the reinforcements or inside; it needs its own"
        )
    if not (names := expand(args.shards) if args.shards else source.shards()):
        raise SystemExit(f"no shards (*.tar) in {source.folder}")
    if bad := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise SystemExit(
            f"--shards: names relative to the folder of --shards-of, without '..', not {bad[0]}"
        )
    files = metadata_files(args.metadata)
    rows = open_metadata(files)

    report = {
        "metadata_rows": rows,
        "shards": Counter(),
        "samples": 0,
        "counts": Counter(),
        "failed": {},
    }
    report |= {"seconds": {}, "spilled_bytes": 0, "peak_bytes": 0}
    with work_folder(args.work):
        make_captions(names, source, files, rows, args, report)
    report["peak_bytes"] = peak_memory()
    print(table(report))
    publish_json(args.output / "caption_report.json", {"arguments": vars(args), **report})
    if failed := len(report["failed"]):
        raise SystemExit(f"{failed} of {len(names)} shards failed; caption_report.json says why")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run it again to go on") from None
    except BrokenProcessPool:
        raise SystemExit(
            "a worker was killed, short of memory perhaps; run it again, with fewer --threads"
        ) from None
    except OSError as error:
        raise SystemExit(str(error)) from None
    except Exception as error:
        if interrupted(error):
            raise SystemExit("interrupted; run it again to go on") from None
        if duckdb is None or not isinstance(error, duckdb.Error):
            raise
        hint = (
            "; give it more --memory or fewer --threads"
            if isinstance(error, duckdb.OutOfMemoryException)
            else ""
        )
        raise SystemExit(f"DuckDB: {first_line(error)}{hint}; run it again to go on") from None
