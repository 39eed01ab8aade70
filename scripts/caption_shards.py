"""Make caption shards from parquet metadata, aligned with DataCompDR-1B's reinforcement shards.

    python scripts/caption_shards.py --metadata datasets/DataComp-1B-metadata \\
        --shards-of datasets/DataCompDR-1B-noimage --output datasets/DataComp-1B --memory 64GB

DataCompDR-1B has no original captions. They are in the metadata of DataComp-1B (columns `uid` and
`text`), in another order. For each reinforcement shard the script writes a shard of the same name
with `<uid>.txt`, in the same order. join_datacompdr1b.sh reads this output as DATACOMP1B_PATH, and
join_shards.py as a --source. The script needs DuckDB 2 (pip install 'duckdb>=2').

There are three stages. Each keeps files, so an interrupted run continues when it is run again:
    1. uids: read the headers of each reinforcement shard; keep its uids in a parquet file.
    2. lookup: for a group of shards at a time, DuckDB reads all metadata, looks up the uids, sorts
       the captions by shard and position, and writes a parquet file. Data that exceed --memory are
       written to --temp meanwhile ("spilled"). A group has about --part samples: by default one for
       each 32 bytes of --memory, at most 250 million. The report lists its time as `join`.
    3. shards: write tars from that file, which is removed when all of its shards are done.
Finished shards are skipped while the reinforcement shard and the metadata files (names, sizes,
times) are the same. The same sources give the same bytes for any --memory, --part and --threads.

uids are compared as 128-bit numbers: 32 hex digits in upper or lower case, with or without dashes,
are one uid, spelled in the output as in the reinforcement shard. Other uids are compared by MD5.

These samples are skipped and counted in the report: those whose uid is not in the metadata, and
those whose captions are all null or blank. Of several rows with one uid, the first caption in byte
order is used and the others are counted (only for uids in a shard). A caption of over 16 KB is
stored cut to 4,096 characters, many times what a tokenizer reads. Bytes that are not UTF-8 become
`?`. A shard without any caption fails like a damaged one, with an error message of one line, and
the others are written.

Outputs
    <shard>.tar             `<uid>.txt` of each sample that has a caption
    caption_report.json     counts, seconds of each stage, peak of memory and of spilled bytes
    .captions/              uids of each shard (0.4 MB), records, work in progress
Several machines can share the work: give each its own --shards and --temp.

The script is meant for one machine and one or two billion rows. --memory must be at least 200MB,
and more if captions are longer than 256 bytes on average or there are many threads; the process
takes up to 0.25 GB more. For the whole of DataCompDR-1B, the estimates are 15 hours of one core to
read the uids, an hour on 2 cores for the lookup, and 1.3 TB of output.

The script does not detect captions whose text has changed since they were embedded.
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
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO

from lib.pool import run_all
from lib.publish import publish, publish_json, remove_leftovers
from lib.report import describe_error, format_table, run_command
from lib.shards import MAX_NAME, ShardError, Source, choose_shards, find_files, open_files
from lib.tar_writer import write_tar
from tqdm import tqdm

try:
    import duckdb
except ImportError:
    duckdb = None  # type: ignore[assignment]

VERSION = 1  # of the bytes written; a higher one has finished shards made again
MEMORY_A_SAMPLE = 32  # bytes of --memory for each sample of a group; 20 also worked for 10 M
MAX_PART = 250_000_000  # samples by default; each shard is read by the group's footer, which grows
MAX_CAPTION = 16 << 10  # bytes; a longer caption is cut
CUT_CAPTION = 4096  # characters, thus at most MAX_CAPTION bytes
ROW_GROUP = 20480  # rows, about those of a shard, so that reading a shard decodes little else
WORKER_MEMORY = 10**9  # bytes allowed to DuckDB for one shard; it takes 0.1 GB
WILDCARDS = set("*?[")  # in a path, for DuckDB
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
REPORT = "caption_report.json"

LOOKUP = """
COPY (
    WITH wanted AS (
        SELECT (file_index::BIGINT << 32) + file_row_number AS place, {key} AS key
        FROM read_parquet($lists, explicit_cardinality={samples})
    ), captions AS (
        SELECT {key} AS key, strlen(text) > {max_bytes} AS cut,
            CASE WHEN strlen(text) > {max_bytes} THEN left(text, {characters}) ELSE text END AS text
        FROM read_parquet($metadata, explicit_cardinality={rows}, binary_as_string=true,
            utf8_validation='replace')
    )
    SELECT place, text, cut FROM wanted JOIN captions USING (key) ORDER BY place
) TO '{to}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {row_group}, USE_TMP_FILE false)
"""
KEY = "coalesce(try_cast(uid AS UUID), md5(uid::VARCHAR)::UUID)"  # text took over twice the memory

Result = dict[str, Any]  # what a process returns about a shard


# --- DuckDB ---------------------------------------------------------------------------------------
def connect(memory: int, threads: int, temp: Path | None) -> Any:
    """A connection with ``memory`` bytes; without ``temp`` nothing is spilled."""
    settings: dict[str, Any] = {
        "memory_limit": f"{memory // 10**6}MB",
        "threads": threads,
        "temp_directory": str(temp or ""),
        "autoinstall_known_extensions": False,
    }
    connection = duckdb.connect(config=settings)
    # Prefetching takes memory for a whole row group of each thread's file instead of a page.
    connection.execute("LOAD parquet; SET disable_parquet_prefetching = true")
    return connection


@functools.cache
def connect_worker() -> Any:
    """DuckDB for one shard after another in this process."""
    return connect(WORKER_MEMORY, 1, None)


def quote(path: object) -> str:
    return str(path).replace("'", "''")


def is_interrupt(error: BaseException) -> bool:
    """Whether DuckDB raised this because of Ctrl-C."""
    return isinstance(error, RuntimeError) and "Query interrupted" in str(error)


@contextlib.contextmanager
def duckdb_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, duckdb.Error) as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from None
        if not isinstance(error, duckdb.Error):
            raise
        out_of_memory = isinstance(error, duckdb.OutOfMemoryException)
        hint = "; give it more --memory or fewer --threads" if out_of_memory else ""
        line = str(error).partition("\n")[0]
        raise SystemExit(f"DuckDB: {line}{hint}; run it again to go on") from None


# --- stage 1: uids --------------------------------------------------------------------------------
def work_path(output: Path, name: str, extension: str) -> Path:
    """A file about a shard in .captions."""
    return output / ".captions" / f"{name}.{extension}"


def failure(name: str, error: Exception) -> Result:
    if is_interrupt(error):
        raise KeyboardInterrupt
    return {"shard": name, "state": "failed", "error": describe_error(error)}


def list_uids(name: str, source: Source, output: Path) -> Result:
    """Write the uids of a shard to a parquet file, unless that is done already."""
    path, database = work_path(output, name, "uids.parquet"), connect_worker()
    try:
        source.path(name)
        stamp = source.stamp(name)
        with contextlib.suppress(duckdb.Error):  # it does not exist, or is damaged
            query = "SELECT value FROM parquet_kv_metadata($1)"
            (made_from,) = database.execute(query, [str(path)]).fetchone()
            if json.loads(made_from) == stamp:
                query = "SELECT count(*) FROM read_parquet($1)"
                (samples,) = database.execute(query, [str(path)]).fetchone()
                return {"shard": name, "stamp": stamp, "samples": samples}
        contents = source.contents(name)
        # Refused samples are skipped, and counted, by the join of shards.
        usable = (uid for uid in contents.samples if uid not in contents.refused)
        uids = [uid for uid in usable if len(os.fsencode(f"{uid}.txt")) <= MAX_NAME]
        if not uids:
            raise ShardError("has no sample that the join could use")

        def write(file: BinaryIO) -> None:
            metadata = f"KV_METADATA {{made_from: '{json.dumps(stamp)}'}}"
            database.execute(
                f"COPY (SELECT unnest($1::VARCHAR[]) AS uid) TO '{quote(file.name)}' "
                f"(FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false, {metadata})",
                [uids],
            )

        remove_leftovers(path)
        publish(path, write)
        return {"shard": name, "stamp": stamp, "samples": len(uids)}
    except Exception as error:  # whatever a damaged file causes: the other shards go on
        return failure(name, error)
    finally:
        open_files.close()


# --- stage 2: lookup ------------------------------------------------------------------------------
def find_metadata(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = [str(path / name) for name in find_files(path, ".parquet")]
    else:
        found = sorted(glob.glob(pattern, recursive=True))
    # once each, even if links lead to it in several ways
    once = {os.path.realpath(file): Path(file) for file in reversed(found) if os.path.isfile(file)}
    files = sorted(once.values())
    if not files:
        raise SystemExit(
            f"--metadata {pattern}: no parquet files there; give a folder, or a pattern in quotes"
        )
    for file in files:
        if WILDCARDS & set(str(file)):
            raise SystemExit(f"{file}: DuckDB takes a path with * ? [ for a pattern; rename it")
    return files


def count_rows(files: Sequence[Path]) -> int:
    """Rows of the metadata, by the footers; exits with a line if a file cannot be used."""
    rows, database = 0, connect_worker()
    for file in tqdm(files, desc="metadata", unit=" files", leave=False):
        try:
            query = f"DESCRIBE FROM read_parquet('{quote(file)}', binary_as_string=true)"
            columns = {name.lower(): kind for name, kind, *_ in database.execute(query).fetchall()}
            query = "SELECT num_rows FROM parquet_file_metadata($1)"
            rows += database.execute(query, [str(file)]).fetchone()[0]
        except duckdb.Error as error:
            line = str(error).partition("\n")[0]
            raise SystemExit(f"{file} can't be read, download it again: {line}") from None
        for column, kinds in (("uid", ("VARCHAR", "UUID")), ("text", ("VARCHAR",))):
            if column not in columns:
                names = ", ".join(columns)
                raise SystemExit(f"{file} has no column {column}; its columns are {names}")
            if columns[column] not in kinds:
                raise SystemExit(
                    f"{file}: its column {column} is {columns[column]}, expected "
                    + " or ".join(kinds)
                )
    return rows


def hash_of(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def split_groups(listed: Sequence[Result], size: int) -> list[list[Result]]:
    """Split the listed shards into groups of about ``size`` samples."""
    before = accumulate((result["samples"] for result in listed), initial=0)
    numbered = groupby(zip(before, listed, strict=False), key=lambda pair: pair[0] // size)
    return [[result for _, result in group] for _, group in numbered]


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # removed meanwhile
        return 0


@contextlib.contextmanager
def watch_query(connection: Any, spill: Path, bar: tqdm, report: dict[str, Any]) -> Iterator[None]:
    """Show the progress of a query, and note in the report how much it spills."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            spilled = sum(size_of(file) for file in spill.glob("*"))
            report["spilled_bytes"] = max(report["spilled_bytes"], spilled)
            bar.update(max(0, round(connection.query_progress()) - bar.n))

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        yield
    finally:
        ended.set()
        with contextlib.suppress(RuntimeError):  # it was not started
            watcher.join()


def look_up_group(
    path: Path,
    group: Sequence[Result],
    files: Sequence[Path],
    rows: int,
    args: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """Write the captions of a group of shards to ``path``: (place, text, cut), sorted by place.

    A place is the shard's number in the group, in the upper half of 64 bits, and the sample's
    position in the shard. ``files`` have ``rows`` rows.
    """
    samples, spill = sum(result["samples"] for result in group), args.work / "spill"
    lists = [str(work_path(args.output, result["shard"], "uids.parquet")) for result in group]
    values = {"lists": lists, "metadata": [str(file) for file in files]}

    def write(file: BinaryIO) -> None:
        query = LOOKUP.format(
            key=KEY,
            samples=samples,
            rows=rows,
            max_bytes=MAX_CAPTION,
            characters=CUT_CAPTION,
            row_group=ROW_GROUP,
            to=quote(file.name),
        )
        with (
            contextlib.closing(connect(args.memory, args.threads, spill)) as connection,
            tqdm(total=100, desc=f"lookup of {samples:,} samples", unit="%") as bar,
        ):
            # The order of the files takes memory, and ORDER BY sets another one.
            connection.execute("SET preserve_insertion_order = false")
            connection.execute("SET enable_progress_bar = true")
            connection.execute("SET enable_progress_bar_print = false")
            with watch_query(connection, spill, bar, report):
                connection.execute(query, values)

    publish(path, write)


# --- stage 3: shards ------------------------------------------------------------------------------
def read_record(name: str, made: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """The record of a shard that is finished and was made in this way; else None."""
    try:
        record = json.loads(work_path(output, name, "json").read_text())
        up_to_date = record["made"] == made and record["bytes"] == (output / name).stat().st_size
        return record if up_to_date else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_captions(
    found: Path, number: int, counts: Counter[str]
) -> dict[int, tuple[str | None, bool]]:
    """The caption (None: all are blank) and whether it was cut, by position in the shard."""
    captions: dict[int, tuple[str | None, bool]] = {}
    query = "SELECT place - $2, text, cut FROM read_parquet($1) WHERE place >= $2 AND place < $3"
    rows = connect_worker().execute(query, [str(found), number << 32, (number + 1) << 32])
    while batch := rows.fetchmany(10_000):
        for position, text, cut in batch:
            counts["duplicates in the metadata"] += position in captions
            before, _ = captions.setdefault(position, (None, False))
            if text is not None and text.strip() and (before is None or text < before):
                captions[position] = text, cut
    return captions


def write_captions(item: tuple[int, str, dict[str, Any]], found: Path, output: Path) -> Result:
    """Write the captions of a shard ``(number, name, made)`` from the file of its group."""
    number, name, made = item
    try:
        query = "SELECT uid FROM read_parquet($1)"
        lists = str(work_path(output, name, "uids.parquet"))
        uids = [uid for (uid,) in connect_worker().execute(query, [lists]).fetchall()]
        counts: Counter[str] = Counter()
        captions = read_captions(found, number, counts)
        counts["without: not in the metadata"] = len(uids) - len(captions)
        counts["without: an empty caption"] = sum(text is None for text, _ in captions.values())
        counts["long captions cut"] = sum(cut for _, cut in captions.values())
        texts = ((uid, captions.get(position, (None,))[0]) for position, uid in enumerate(uids))
        samples = [(uid, {"txt": text.encode()}) for uid, text in texts if text is not None]
        if not samples:
            raise ShardError(f"the metadata has a caption for none of its {len(uids)} uids")
        record = work_path(output, name, "json")
        record.unlink(missing_ok=True)
        remove_leftovers(record)
        remove_leftovers(output / name)
        publish(output / name, lambda file: write_tar(file, samples))
        kept = {
            "made": made,
            "bytes": (output / name).stat().st_size,
            "samples": len(samples),
            "counts": +counts,
        }
        publish_json(record, kept)
        return {**kept, "shard": name, "state": "written"}
    except Exception as error:
        return failure(name, error)


# --- all stages -----------------------------------------------------------------------------------
@contextlib.contextmanager
def open_work_folder(path: Path) -> Iterator[None]:
    """A folder for one run at a time, emptied of all but the files of groups."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"another run is at work in {path}; give this one a --temp of its own"
            ) from None
        for partial in path.glob(".part-*.partial"):
            partial.unlink()
        shutil.rmtree(path / "spill", ignore_errors=True)
        yield
        shutil.rmtree(path / "spill", ignore_errors=True)


@contextlib.contextmanager
def measure_stage(name: str, report: dict[str, Any]) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds = round(time.monotonic() - start, 2)
    report["seconds"][name] = report["seconds"].get(name, 0) + seconds


def add_result(result: Result, report: dict[str, Any], bar: tqdm) -> None:
    report["shards"][result["state"]] += 1
    if result["state"] == "failed":
        report["failed"][result["shard"]] = result["error"]
        bar.write(f"{result['shard']}: failed: {result['error']}", file=sys.stderr)
    else:
        report["samples"] += result["samples"]
        report["counts"].update(result["counts"])


def list_all_uids(
    names: Sequence[str], source: Source, args: argparse.Namespace, report: dict[str, Any]
) -> list[Result]:
    """The shards whose uids are listed, in the order of the names."""
    listed, list_shard = {}, functools.partial(list_uids, source=source, output=args.output)
    with tqdm(total=len(names), desc="uids", unit=" shards") as bar:
        for result in run_all(list_shard, names, args.threads):
            if "error" in result:
                add_result(result, report, bar)
            else:
                listed[result["shard"]] = result
            bar.update()
    return [listed[name] for name in names if name in listed]


def make_captions(
    listed: Sequence[Result],
    files: Sequence[Path],
    rows: int,
    args: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """Stages 2 and 3, group by group; adds to the report."""
    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    metadata = hash_of(stamps)
    groups = {
        args.work / f"part-{hash_of(VERSION, metadata, group)}.parquet": group
        for group in split_groups(listed, args.part)
    }
    for old in set(args.work.glob("part-*.parquet")) - groups.keys():
        old.unlink()
    with tqdm(total=len(listed), desc="shards", unit=" shards") as bar:
        for found, group in groups.items():
            todo = []
            for number, result in enumerate(group):
                name = result["shard"]
                made = {"version": VERSION, "metadata": metadata, "shard": result["stamp"]}
                if record := read_record(name, made, args.output):
                    add_result({**record, "shard": name, "state": "already there"}, report, bar)
                    bar.update()
                else:
                    todo.append((number, name, made))
            if todo and not found.exists():
                with measure_stage("join", report):
                    look_up_group(found, group, files, rows, args, report)
            states = set()
            write = functools.partial(write_captions, found=found, output=args.output)
            with measure_stage("shards", report):
                for result in run_all(write, todo, args.threads):
                    add_result(result, report, bar)
                    states.add(result["state"])
                    bar.update()
            if "failed" not in states:
                found.unlink(missing_ok=True)


def format_report(report: Mapping[str, Any]) -> str:
    rows = [("captions", report["samples"]), *sorted(report["counts"].items(), reverse=True)]
    for state, number in sorted(report["shards"].items(), reverse=True):
        rows.append((f"shards {state}", number))
    stages = {"lookup" if name == "join" else name: n for name, n in report["seconds"].items()}
    seconds = ", ".join(f"{stage} {number:.0f}" for stage, number in stages.items())
    memory = f"{report['peak_bytes'] / 1e9:.2f} GB of memory"
    spilled = f"{report['spilled_bytes'] / 1e9:.2f} GB spilled"
    return f"{format_table(rows)}\nseconds: {seconds}; {memory}, {spilled}"


def measure_peak_memory() -> int:
    """Bytes of the largest process, in Linux. ru_maxrss alone includes that of the parent."""
    own = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * max(int(own[1]) if own else 0, children)


def parse_memory(text: str) -> int:
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|TB)", text, re.IGNORECASE)):
        raise argparse.ArgumentTypeError(
            f"{text} is no size: expected a number and MB, GB or TB, as in 8GB"
        )
    if (size := int(float(found[1]) * UNITS[found[2].upper()])) < 200 * 10**6:
        raise argparse.ArgumentTypeError(f"{text} is too little: expected at least 200MB")
    return size


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, cores = parser.add_argument, os.cpu_count() or 1
    text = "parquet files with the columns uid and text: a folder, or a pattern"
    add("--metadata", required=True, metavar="DIR|GLOB", help=text)
    text = "reinforcement shards: a folder, or a brace pattern of their paths"
    add("--shards-of", required=True, metavar="DIR|PATTERN", help=text)
    text = "brace pattern of the names of the shards to write; default: all"
    add("--shards", metavar="PATTERN", help=text)
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the caption shards")
    text = "memory of the lookup, such as 64GB; default %(default)s"
    add("--memory", type=parse_memory, default="8GB", help=text)
    text = "folder for data that exceed --memory; default: in the output folder"
    add("--temp", type=Path, metavar="DIR", help=text)
    text = "threads of the lookup, and processes of the other stages; default: one for each core"
    add("--threads", type=int, default=cores, help=text)
    text = "samples to look up at a time; default: --memory / 32 bytes, at most 250 million"
    add("--part", type=int, metavar="N", help=text)
    args = parser.parse_args(arguments)
    if args.part is None:
        args.part = min(args.memory // MEMORY_A_SAMPLE, MAX_PART)
    if args.threads < 1 or args.part < 1:
        parser.error("--threads and --part: expected at least 1")
    if "{" not in args.shards_of and not Path(args.shards_of).is_dir():
        parser.error(f"--shards-of {args.shards_of}: no such folder")
    args.work = (args.temp or args.output / ".captions") / "work"
    for path in (args.output, args.work):
        if WILDCARDS & set(str(path)):
            parser.error(f"{path}: DuckDB takes a path with * ? [ for a pattern; choose another")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if duckdb is None or int(duckdb.__version__.partition(".")[0]) < 2:
        raise SystemExit(
            "DuckDB 2 is needed: pip install 'duckdb>=2', or pip install '.[captions]'"
        )
    source = Source.parse(args.shards_of, "--shards-of")
    source.check_output(args.output, "--shards-of")
    names = choose_shards(source, args.shards, "--shards-of", args.output)
    with duckdb_errors_in_one_line():
        files = find_metadata(args.metadata)
        rows = count_rows(files)
        report: dict[str, Any] = {
            "metadata_rows": rows,
            "shards": Counter(),
            "samples": 0,
            "counts": Counter(),
            "failed": {},
            "seconds": {},
            "spilled_bytes": 0,
            "peak_bytes": 0,
        }
        with open_work_folder(args.work):
            with measure_stage("uids", report):
                listed = list_all_uids(names, source, args, report)
            make_captions(listed, files, rows, args, report)
    report["peak_bytes"] = measure_peak_memory()
    print(format_report(report))
    publish_json(args.output / REPORT, {"arguments": vars(args), **report})
    if failed := len(report["failed"]):
        raise SystemExit(f"{failed} of {len(names)} shards failed; {REPORT} lists the reasons")


if __name__ == "__main__":
    run_command(main, processes="--threads")
