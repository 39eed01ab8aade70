"""Download the images of shards with img2dataset, into image shards of the same names.

    bash scripts/download_images.sh --shards 0-7    # makes an environment with img2dataset for it
    python scripts/download_images.py --dataset dfndr12m
    python scripts/download_images.py --input datasets/DataComp-12M \\
        --reinforcements datasets/DataCompDR-12M-noimage --output datasets/DataComp-12M-images

--dataset takes the folders of a data set by its name below. --input are the shards with `url.txt`;
a sample without one has that of the --reinforcements. The sha256 of the image that was embedded is
in the `json` of --reinforcements, or else of the input. Images that have changed since are skipped,
because their stored embeddings would be wrong.

For each input shard the script writes one image shard of the same name, so image shards stay
aligned with the others. Images have DataComp's settings: jpg, at most 512 pixels on the longer
side. Unlike DataComp's own download, the script does not blur faces, because the shards do not
contain their positions.

Outputs
    <shard>.tar            <uid>.jpg, and <uid>.json: uid, url, sha256 (as downloaded), width, …
    <shard>.parquet        all samples: uid, url, outcome, error_message, expected_sha256, …
    <shard>_stats.json     counts, seconds
    download_report.json   the table that is printed, over all shards of the folder
    img2dataset.log        output of img2dataset
    .img2dataset/          work in progress; empty at the end

The outcome of a sample is one of
    downloaded    it is in the tar
    dead          no such host or page, a server's error, no answer in time, an answer cut off
    changed       an image, but its sha256 is not the expected one
    refused       by the server (HTTP 401, 403, 429, 451; X-Robots-Tag: noai, noindex, …), or by
                  the script: a URL or redirect that is not http or https, an answer over 20 MiB
    undecodable   not an image that OpenCV reads, such as a web page

Run the script again at any time. A shard gets its name when it is complete; after a killed run, the
shards that img2dataset had finished are kept and the others start again. Several runs may share an
output folder; give each its own --shards. To download a shard again, remove its tar.

The URLs are untrusted input: only http and https are used, and answers are limited in bytes,
seconds and pixels, and only images are kept. The script does not block requests to your own
network: a URL may lead to a machine next to yours, so run it where such requests can do no harm.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lib import http
from lib.datasets import DATASETS, add_dataset_option, describe_datasets
from lib.pool import end_with_parent, run_all
from lib.publish import publish, publish_json, remove_leftovers
from lib.report import check_least, describe_error, format_table, printable, run_command
from lib.shards import (
    Contents,
    Samples,
    ShardError,
    Source,
    check_names,
    expand_braces,
    find_files,
    open_files,
    read_contents,
    read_json_object,
)
from lib.tar_writer import write_tar
from tqdm import tqdm

IMAGE_SETTINGS = {  # DataComp's
    "image_size": 512,
    "resize_mode": "keep_ratio_largest",
    "resize_only_if_bigger": True,
    "encode_format": "jpg",
    "compute_hash": "sha256",
    "extract_exif": False,  # nothing here reads it, and it shows where people were
}
OUTCOMES = ("downloaded", "dead", "changed", "refused", "undecodable")
REFUSED = re.compile(
    r"disallowed by X-Robots-Tag|HTTP Error (401|403|429|451)\b|unknown url type"
    r"|Redirection to url .* is not allowed|more than \d+ bytes",
    re.DOTALL,
).search

# Bytes of an answer. img2dataset holds twice as many answers in memory as it has threads, 256 by
# default: at worst 5 GB a process, and 8 GB while the last half is copied.
MAX_BYTES = 20 << 20
MAX_SECONDS = 120  # of a URL with its redirects; a slow server would hold up its shard
MAX_PIXELS = 1 << 28  # of an image; 0.8 GB once decoded
MAX_URL = 1 << 16  # bytes

WORK = ".img2dataset"
LOG = "img2dataset.log"
POLL_SECONDS = 0.5  # between two looks for shards that img2dataset has finished
ABANDONED_SECONDS = 3600  # age at which a work folder that no run has claimed is removed
SHARDS_PER_PROCESS = 8  # in one run of img2dataset
QUIET = {  # img2dataset's libraries would contact their servers
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PICKLERS = {"pyspark": "pyspark.cloudpickle", "ray": "ray.cloudpickle"}

Listed = dict[str, Any]  # what write_list returns about a shard; part of batch.json


# --- in img2dataset's processes -------------------------------------------------------------------
def fetch_shard(settings: dict[str, Any], row: Any) -> Any:
    """Called by img2dataset's distributor, in a process that may be on another machine."""
    from img2dataset.downloader import Downloader

    urllib.request.install_opener(http.bounded_opener(MAX_BYTES, MAX_SECONDS))
    return Downloader(**settings)(row)


def run_fetch(arguments: dict[str, Any]) -> None:
    """Run img2dataset in this process, with bounded HTTP in its downloader."""
    img2dataset: Any = importlib.import_module("img2dataset.main")
    img2dataset.Downloader = lambda **settings: functools.partial(fetch_shard, settings)
    if pickler := PICKLERS.get(arguments["distributor"]):  # other machines lack our modules
        importlib.import_module(pickler).register_pickle_by_value(http)
    img2dataset.download(**arguments)


# --- before img2dataset: a list of URLs for each shard --------------------------------------------
class ShardFiles(NamedTuple):
    """The files of a shard. The names of the stats and in the work folder are img2dataset's."""

    tar: Path
    parquet: Path
    stats: Path

    @classmethod
    def of(cls, tar: Path) -> "ShardFiles":
        return cls(tar, tar.with_suffix(".parquet"), tar.with_name(f"{tar.stem}_stats.json"))

    def exist(self) -> bool:
        return self.tar.is_file() and self.stats.is_file()


def read_sha256(contents: Contents | None, uid: str) -> str | None:
    members = contents.samples.get(uid, {}) if contents else {}
    if contents is None or "json" not in members or uid in contents.refused:
        return None
    sha256 = read_json_object(members["json"]).get("sha256")
    if isinstance(sha256, str) and re.fullmatch(r"[0-9A-Fa-f]{64}", sha256):
        return sha256.lower()
    return None


def write_list(
    item: tuple[Path, str], source: Source, reinforcements: Source | None, verify: bool
) -> Listed:
    """Write the url list of a shard ``(path, name)``; returns its counts, or an error."""
    import pyarrow
    from pyarrow import parquet

    path, name = item
    try:
        contents = source.contents(name)
        embedded = reinforcements.contents(name) if reinforcements else None
        rows, without_url, unusable = [], 0, len(contents.refused)
        for uid, members in contents.samples.items():
            if uid in contents.refused:
                continue
            reinforced = embedded.samples.get(uid, {}) if embedded else {}
            stored = members.get("url.txt") or reinforced.get("url.txt")
            url = stored.read().strip() if stored and stored.size <= MAX_URL else b""
            if not url:
                without_url += 1
                continue
            try:
                text = url.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                unusable += 1
                continue
            sha256 = (read_sha256(embedded, uid) or read_sha256(contents, uid)) if verify else None
            rows.append((uid, text, sha256))
        if not rows:
            raise ShardError(
                f"has no URLs (url.txt): {without_url} samples without, {unusable} unusable"
            )
        columns = dict(zip(("uid", "url", "expected_sha256"), zip(*rows, strict=True), strict=True))
        schema = pyarrow.schema([(column, pyarrow.string()) for column in columns])
        parquet.write_table(pyarrow.table(columns, schema), path)
        counts = {"listed": len(rows), "without_url": without_url}
        return {"name": name, **counts, "unusable": unusable}
    except Exception as error:  # whatever a damaged shard causes: the others go on
        return {"name": name, "error": printable(describe_error(error), 300)}
    finally:
        open_files.close()


# --- after img2dataset: one shard gets its name ---------------------------------------------------
def find_outcome(row: dict[str, Any]) -> str:
    if row["status"] == "success":
        return "changed" if row["expected_sha256"] not in (None, row["sha256"]) else "downloaded"
    if row["status"] == "failed_to_resize":
        return "undecodable"
    return "refused" if REFUSED(row["error_message"] or "") else "dead"


def read_results(results: ShardFiles, urls: Path) -> tuple[list[dict[str, Any]], Samples, Any]:
    """img2dataset's rows with their outcomes, in the order of the url list; images; the schema.

    Raises:
        ShardError: img2dataset has lost samples: it goes on after a failed write.
    """
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(results.parquet)
    found = {row["uid"]: row for row in table.to_pylist()}
    with open(str(results.tar), "rb") as file:
        images = read_contents(file).samples
    rows = []
    for uid in parquet.read_table(urls)["uid"].to_pylist():
        row = found.get(uid)
        if row is None or (row["status"] == "success" and "jpg" not in images.get(uid, {})):
            raise ShardError(f"img2dataset has lost samples, the first is {uid}; see {LOG}")
        row |= {"key": uid, "outcome": find_outcome(row)}  # img2dataset's keys are running numbers
        if row["outcome"] == "changed":  # in img2dataset's words
            row |= {"status": "failed_to_download", "error_message": "hash mismatch"}
        rows.append(row)
    return rows, images, table.schema.append(pyarrow.field("outcome", pyarrow.string()))


def finish_shard(output: Path, shard: Listed, batch: Path, number: int) -> dict[str, Any]:
    """Write the shard that img2dataset has finished: its tar without changed images, keyed by uid.

    Args:
        output: the output folder.
        shard: as :func:`write_list` returned it.
        batch: the work folder.
        number: the shard's number there.

    Returns:
        the content of ``<shard>_stats.json``.

    Raises:
        ShardError: img2dataset's files are damaged.
        SystemExit: the shard cannot be written, for example because the disk is full; the work
            folder remains, with all that was downloaded.
    """
    import pyarrow
    from pyarrow import parquet

    files, results = ShardFiles.of(output / shard["name"]), result_files(batch, number)
    try:
        for path in files:
            remove_leftovers(path)
        seconds = json.loads(results.stats.read_text())["duration"]
        rows, images, schema = read_results(results, batch / "lists" / shard["list"])
        downloaded = [row for row in rows if row["outcome"] == "downloaded"]

        def write_parquet(file: BinaryIO) -> None:
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)

        def samples() -> Iterator[tuple[str, dict[str, Any]]]:
            for row in downloaded:
                about = {column: value for column, value in row.items() if column != "outcome"}
                image = images[row["uid"]]["jpg"]
                yield row["uid"], {"jpg": image, "json": json.dumps(about).encode()}

        counts = Counter(row["outcome"] for row in rows)
        stats = {
            "count": len(rows),
            "seconds": round(seconds, 1),
            "outcomes": {name: counts[name] for name in OUTCOMES},
            "without_url": shard["without_url"],
            "unusable": shard.get("unusable", 0),  # earlier versions did not count them
            "unverified": sum(not row["expected_sha256"] for row in downloaded),
        }
        publish(files.parquet, write_parquet)
        publish_json(files.stats, stats)
        publish(files.tar, lambda file: write_tar(file, samples()))  # last: the shard is finished
        return stats
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # pyarrow's; or img2dataset has not finished it
            raise ShardError(f"img2dataset's files of it can't be read: {error}") from error
        raise SystemExit(
            f"{files.tar}: {error.strerror}: make room there, and run it again; what was "
            f"downloaded is kept in {batch}"
        ) from None
    finally:
        open_files.close()


# --- batches of shards, each one run of img2dataset -----------------------------------------------
class Progress(tqdm):
    """A bar over shards, which counts the images and the shards that failed."""

    def __init__(self, total: int) -> None:
        super().__init__(total=total, unit="shard", smoothing=0, disable=not total)
        self.failed: dict[str, str] = {}
        self.samples = self.images = 0

    def add(self, stats: dict[str, Any]) -> None:
        self.samples += stats["count"]
        self.images += stats["outcomes"]["downloaded"]
        self.set_postfix_str(f"{self.images:,} images of {self.samples:,} URLs", refresh=False)
        self.update()

    def fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.write(f"{name}: failed: {reason}", file=sys.stderr)


def result_files(batch: Path, number: int) -> ShardFiles:
    return ShardFiles.of(batch / "shards" / f"{number:08d}.tar")


def finish_ready(
    batch: Path, output: Path, shards: dict[int, Listed], bar: Progress
) -> dict[int, Listed]:
    """Finish the shards that img2dataset has finished; returns the others, by number."""
    left = {}
    for number, shard in shards.items():
        results = result_files(batch, number)
        try:
            json.loads(results.stats.read_text())  # written last
        except (OSError, ValueError):
            left[number] = shard
            continue
        try:
            bar.add(finish_shard(output, shard, batch, number))
        except ShardError as error:
            bar.fail(shard["name"], str(error))
        results.tar.unlink(missing_ok=True)  # so that the disk need not hold it twice
        results.parquet.unlink(missing_ok=True)
    return left


@contextlib.contextmanager
def claim_batch(output: Path) -> Iterator[Path]:
    """A new work folder, locked meanwhile; removed at the end, but not after an error."""
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=work))
    with open(new / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Other runs look for batches only, so this one is locked before they see it.
        batch = new.rename(work / new.name.replace("new-", "batch-"))
        for folder in ("lists", "shards"):
            (batch / folder).mkdir()
        yield batch
        shutil.rmtree(batch)


def recover_batches(output: Path) -> None:
    """Finish the shards that killed runs have left finished, and remove their work folders."""
    for new in (output / WORK).glob("new-*"):  # a live run uses this name only for a moment
        with contextlib.suppress(FileNotFoundError):
            if time.time() - new.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(new)
    for batch in (output / WORK).glob("batch-*"):
        with contextlib.suppress(FileNotFoundError), open(batch / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # of a live run
            shards: dict[str, Listed] = {}
            with contextlib.suppress(OSError, ValueError):
                shards = json.loads((batch / "batch.json").read_text())
            for number, shard in shards.items():
                if not ShardFiles.of(output / shard["name"]).exist():
                    # Unfinished or damaged ones are downloaded again.
                    with contextlib.suppress(Exception):
                        finish_shard(output, shard, batch, int(number))
            shutil.rmtree(batch)


def run_batch(
    names: Sequence[str],
    source: Source,
    reinforcements: Source | None,
    args: argparse.Namespace,
    bar: Progress,
) -> None:
    """List the URLs of some shards, have img2dataset download them, and finish the shards."""
    with claim_batch(args.output) as batch:
        items = [(batch / "lists" / f"{i:08d}.parquet", name) for i, name in enumerate(names)]
        verify = not args.no_verify_hash
        lister = functools.partial(
            write_list, source=source, reinforcements=reinforcements, verify=verify
        )
        listed = {found["name"]: found for found in run_all(lister, items, args.processes)}
        shards: dict[int, Listed] = {}
        for path, name in items:  # img2dataset numbers its shards by the existing lists, in order
            if "error" in listed[name]:
                bar.fail(name, listed[name]["error"])
            else:
                shards[len(shards)] = {**listed[name], "list": path.name}
        if shards:
            publish_json(batch / "batch.json", shards)
            shards = run_img2dataset(batch, shards, args, bar)
        for shard in shards.values():
            bar.fail(shard["name"], f"img2dataset did not finish it; see {LOG}")


def run_img2dataset(
    batch: Path, shards: dict[int, Listed], args: argparse.Namespace, bar: Progress
) -> dict[int, Listed]:
    """Download and finish shards; returns those that img2dataset did not finish, by number."""
    arguments = {
        **IMAGE_SETTINGS,
        "url_list": str(batch / "lists"),
        "input_format": "parquet",
        "save_additional_columns": ["uid", "expected_sha256"],
        "output_folder": str(batch / "shards"),
        "output_format": "webdataset",
        # as many as the longest list has, so that each list becomes one shard
        "number_sample_per_shard": max(shard["listed"] for shard in shards.values()),
        "oom_shard_count": 8,  # digits
        "processes_count": args.processes,
        "thread_count": args.threads,
        "timeout": args.timeout,
        "retries": args.retries,
        "distributor": args.distributor,
    }
    defaults = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS), "PYSPARK_PYTHON": sys.executable}
    with open(args.output / LOG, "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, __file__, "--fetch", json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**defaults, **os.environ, **QUIET},
            start_new_session=True,  # Ctrl-C is for this process
        )
    try:
        ended = False
        while not ended:
            ended = process.poll() is not None  # asked before looking for finished shards
            shards = finish_ready(batch, args.output, shards, bar)
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:  # it is 0 if only shards failed
        with open(args.output / LOG, "rb") as log:
            log.seek(begin)
            lines = log.read().decode("utf-8", "replace").strip().splitlines() or ["nothing"]
        bar.close()
        raise SystemExit(
            f"img2dataset ended with status {process.returncode}; the last line in "
            f"{args.output / LOG} is: {printable(lines[-1], 300)}"
        )
    return shards


# --- the report -----------------------------------------------------------------------------------
def make_report(output: Path) -> dict[str, Any]:
    """The counts of all finished shards in the output folder, also those of other runs."""
    report: dict[str, Any] = {"shards": 0, "samples": 0, "outcomes": Counter()}
    report |= {"without_url": 0, "unusable": 0, "unverified": 0}
    for name in find_files(output, "_stats.json"):
        path = output / name
        files = ShardFiles.of(path.with_name(f"{path.name.removesuffix('_stats.json')}.tar"))
        if not files.exist():
            continue
        try:
            stats = json.loads(path.read_text())
        except ValueError:
            stats = None
        if not isinstance(stats, dict) or "outcomes" not in stats:
            raise SystemExit(
                f"{files.tar} is not of this script, judging by {path.name}; img2dataset itself "
                "may have made it: choose another --output. scripts/join_datacompdr12m.sh takes "
                "such shards as they are"
            )
        report["shards"] += 1
        report["samples"] += stats["count"]
        report["outcomes"].update(stats["outcomes"])
        for count in ("without_url", "unusable", "unverified"):
            report[count] += stats.get(count, 0)
    return report


def format_report(report: dict[str, Any], output: Path) -> str:
    labels = {"changed": "changed (sha256 differs)"}
    rows = [(labels.get(name, name), report["outcomes"][name]) for name in OUTCOMES]
    for label, count in (
        ("without a URL in the shard", report["without_url"]),
        ("unusable in the shard (uid, json, name or URL)", report["unusable"]),
        ("downloaded, no sha256 to compare", report["unverified"]),
    ):
        if count:
            rows.append((label, count))
    where = "outcome and error_message of each sample are in <shard>.parquet"
    return (
        f"{format_table(rows, report['samples'])}\n{report['shards']:,} shards in {output}; {where}"
    )


# --- the command ----------------------------------------------------------------------------------
def find_number(name: str) -> int | None:
    """A shard's number: 3 for 00000003.tar, 1003 for 01/00000003.tar; None for other names."""
    *folders, stem = Path(name).with_suffix("").parts
    if len(folders) > 1 or not all(re.fullmatch(r"[0-9]+", part) for part in (*folders, stem)):
        return None
    per_folder = DATASETS["datacompdr1b"].per_folder
    return per_folder * int(folders[0] if folders else 0) + int(stem)


def choose_names(wanted: str | None, source: Source) -> list[str]:
    """The shards that --shards names: A-B by their numbers, or a brace pattern; None: all."""
    names = source.shards()
    if not names:
        raise SystemExit(f"--input: no shards (*.tar) in {source.folder}")
    if wanted and (numbers := re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", wanted)):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last:
            raise SystemExit(f"--shards {wanted}: the first is greater than the last")
        count = last - first + 1
        names = [name for name in names if find_number(name) in range(first, last + 1)]
        if len(names) < count:
            raise SystemExit(
                f"--shards {wanted}: {len(names)} of these {count} are in {source.folder}; "
                "download the others first, or choose fewer, or give a pattern of names"
            )
    elif wanted:
        names = expand_braces(wanted)
    check_names(names)
    for name in names:
        if source.stamp(name) is None:
            raise SystemExit(f"{name} is not in {source.folder}")
    return names


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=describe_datasets("captions", "reinforcements", "images", reinforced=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, source = parser.add_argument, "DIR|PATTERN"
    text = "data set whose folders are the defaults of --input, --reinforcements and --output"
    add_dataset_option(parser, text, reinforced=False)
    text = "shards with url.txt: a folder, or a pattern"
    add("--input", metavar=source, help=text)
    text = "shards with the sha256 in their json; default: the input"
    add("--reinforcements", metavar=source, help=text)
    add("--output", type=Path, metavar="DIR", help="folder for the image shards")
    text = (
        "shards to download: numbers (1003 is 01/00000003.tar of DataCompDR-1B), or a pattern of "
        "names; default: all"
    )
    add("--shards", metavar="A-B|PATTERN", help=text)
    text = "keep images that have changed since they were embedded"
    add("--no-verify-hash", action="store_true", help=text)
    cores = min(16, os.cpu_count() or 1)
    text = "number of processes; default: one for each core, up to 16"
    add("--processes", type=int, default=cores, help=text)
    text = "downloads at a time in each process; default %(default)s"
    add("--threads", type=int, default=128, help=text)
    text = "seconds that a server may be silent; default %(default)s"
    add("--timeout", type=int, default=10, help=text)
    text = "further tries for a URL that failed; default %(default)s"
    add("--retries", type=int, default=1, help=text)
    names = ["multiprocessing", "pyspark", "ray"]
    text = (
        "how img2dataset runs; default %(default)s. For pyspark and ray, all machines need "
        "img2dataset and the output folder"
    )
    add("--distributor", choices=names, default=names[0], help=text)
    text = f"shards in one run of img2dataset; default {SHARDS_PER_PROCESS} for each process"
    add("--batch", type=int, help=text)
    args = parser.parse_args(arguments)
    if not args.dataset and not (args.input and args.output):
        parser.error("expected --dataset, or --input and --output")
    args.batch = args.batch if args.batch is not None else SHARDS_PER_PROCESS * args.processes
    check_least(parser, args, 1, "processes", "threads", "timeout", "batch")
    check_least(parser, args, 0, "retries")
    return args


def set_folders(args: argparse.Namespace) -> None:
    """Set the folders that --dataset stands for, where the options do not give others."""
    dataset = DATASETS[args.dataset]
    args.output = args.output or dataset.images.path()
    if args.input:
        return
    urls, reinforcements = dataset.find_urls()
    args.input = str(urls)
    folder = dataset.reinforcements
    if reinforcements:
        args.reinforcements = args.reinforcements or str(reinforcements)
    elif folder and folder.path() != urls and not args.reinforcements:
        print(
            f"no folder {folder.path()} ({folder.setting}): without its sha256, changed images are "
            "kept; join with --verify-hash to skip them",
            file=sys.stderr,
        )


def open_sources(args: argparse.Namespace) -> tuple[list[str], Source, Source | None]:
    """The names of the shards, the input, and the reinforcements if their sha256 is needed."""
    hint = "; scripts/download_datacompdr12m.sh downloads it"
    source = Source.parse(args.input, "--input", hint)
    source.check_output(args.output, "--input")
    reinforcements = None
    if args.reinforcements and not args.no_verify_hash:
        reinforcements = Source.parse(args.reinforcements, "--reinforcements", hint)
        reinforcements.check_output(args.output, "--reinforcements")
    names = choose_names(args.shards, source)
    if reinforcements:
        absent = [name for name in names if reinforcements.stamp(name) is None]
        if absent:
            raise SystemExit(
                f"{len(absent)} of {len(names)} shards are not in {reinforcements.folder}, the "
                f"first is {absent[0]}: download them first, or keep changed images with "
                "--no-verify-hash"
            )
    return names, source, reinforcements


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    needed = ["img2dataset", "pyarrow", *({"pyspark", "ray"} & {args.distributor})]
    for module in needed:
        if importlib.util.find_spec(module) is None:
            raise SystemExit(
                f"no {module} for {sys.executable}: run '{sys.executable} -m pip install {module}',"
                " or scripts/download_images.sh, which makes an environment with img2dataset"
            )
    if args.dataset:
        set_folders(args)
    names, source, reinforcements = open_sources(args)

    args.output.mkdir(parents=True, exist_ok=True)
    make_report(args.output)  # exits here if the folder holds shards of others
    recover_batches(args.output)
    todo = [name for name in names if not ShardFiles.of(args.output / name).exist()]
    with Progress(len(todo)) as bar:
        for start in range(0, len(todo), args.batch):
            run_batch(todo[start : start + args.batch], source, reinforcements, args, bar)
    report = make_report(args.output)
    publish_json(
        args.output / "download_report.json",
        {"arguments": vars(args), **report, "failed": bar.failed},
    )
    print(format_report(report, args.output))
    if bar.failed:
        raise SystemExit(
            f"{len(bar.failed)} of {len(names)} shards failed, see above; run it again to retry"
        )


if __name__ == "__mp_main__":  # a process of img2dataset, or one that writes lists
    end_with_parent()
if __name__ == "__main__":
    if sys.argv[1:2] == ["--fetch"]:
        end_with_parent()
        run_fetch(json.loads(sys.argv[2]))
        sys.exit()
    run_command(main, processes="--processes")
