"""Download shards of data sets from the Hugging Face Hub, all or a range, each set to its folder.

    python scripts/download_shards.py --dataset dfndr12m --shards 0-3
    python scripts/download_shards.py --shards 0-3 \\
        --repo mlfoundations/DataComp-12M datasets/DataComp-12M \\
        --repo apple/DataCompDR-12M datasets/DataCompDR-12M-noimage

--dataset downloads a data set by its name below, to its folder; DataCompDR-12M together with the
captions in DataComp-12M. --repo downloads any data set to any folder. The layout of DFNDR on the
Hub is not published: all tars whose names are numbers count as shards, in the order of their paths,
and --shards counts them from 0.

The script first prints the licence of each data set, and the number of files and bytes to download.
Nothing is downloaded if a data set lacks a shard of the range, if the disk is too small, or if the
folder has a shard of another size: it belongs to another data set or is damaged, and is never
overwritten. The small files that describe a data set (README, licence, manifest) are downloaded as
well.

HF_TOKEN (or the token of `hf auth login`), HF_ENDPOINT and HF_HOME work as in huggingface_hub.

Run it again to download the missing files: a shard that was cut off continues where it stopped.
huggingface_hub's own downloads would start such a shard again, so the script streams the bytes by
HTTP, which the Hub also serves for its Xet storage. A shard gets its name when its SHA-256 equals
the one that the Hub lists, and it is on disk. Several runs, also on several machines, may download
to one folder: each waits for the shards that another is downloading.

Outputs in each folder
    <shard>.tar, README.md …    as in the repository
    .download/                  name of the data set, locks, unfinished files (*.partial)

Finished files are not read again: a shard of the size that the Hub lists counts as complete.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from lib.datasets import DATASETS, add_dataset_option, describe_datasets
from lib.hub import (
    REPOSITORY,
    HubError,
    explain,
    hub_errors_in_one_line,
    is_shard,
    page_of,
    prepare_client,
    shard_path,
    status_of,
)
from lib.report import printable, run_command
from tqdm import tqdm

RECORDS = ".download"
DESCRIPTION = re.compile(r"(README|LICEN[CS]E|NOTICE)[\w.-]*|manifest\.jsonl", re.IGNORECASE)
MAX_PAUSE = 60  # seconds between two tries; the Hub counts requests over five minutes
CHUNK = 1 << 20
TRANSIENT = (408, 429, 500, 502, 503, 504)


class File(NamedTuple):
    """A file of a data set at a commit, and the folder that it is downloaded to."""

    repo: str
    commit: str | None
    path: str
    size: int
    hash: str  # SHA-256 of files in LFS, as shards are; git's hash of small files
    is_shard: bool
    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / self.path

    @property
    def partial(self) -> Path:
        return self.folder / RECORDS / f"{self.path}.{self.hash[:16]}.partial"

    def exists(self) -> bool:
        return size_of(self.target) == self.size

    def missing_bytes(self) -> int:
        return 0 if self.exists() else self.size - min(size_of(self.partial) or 0, self.size)


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def format_bytes(number: int) -> str:
    return tqdm.format_sizeof(number, "B") if number >= 1000 else f"{number} B"


# --- which files to download ----------------------------------------------------------------------
def parse_range(text: str) -> range:
    match = re.fullmatch(r"0*(\d{1,6})(?:-0*(\d{1,6}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"expected a range such as 0-3, or a number, not {text!r}")
    return range(first, last + 1)


def list_repository(
    api: HfApi, repo: str, commit: str | None, shards: range | None, per_folder: int | None
) -> dict[str, RepoFile]:
    """Files of the root and of the folders that hold the shards (None: all shards), by path; all
    files if the layout is not known."""

    def list_folder(folder: str | None, recursive: bool = False) -> list[Any]:
        listing = {"recursive": recursive, "repo_type": "dataset", "revision": commit}
        return list(api.list_repo_tree(repo, folder, **listing))

    found = list_folder(None, recursive=per_folder is None)
    if per_folder:
        folders = [entry.path for entry in found if not isinstance(entry, RepoFile)]
        wanted = {shard_path(number, per_folder).partition("/")[0] for number in shards or ()}
        for folder in folders:
            if re.fullmatch(r"\d\d", folder) and (not shards or folder in wanted):
                found += list_folder(folder)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def choose_paths(
    repo: str, listed: Collection[str], shards: range | None, per_folder: int | None
) -> list[str]:
    """The paths of the wanted shards (None: all), in order.

    Args:
        repo: for messages.
        listed: all paths.
        shards: numbers of the wanted shards.
        per_folder: as in :func:`shard_path`; None: the layout is not known, and the numbers are
            positions in the order of the paths.

    Raises:
        SystemExit: a wanted shard is not listed, or there are none.
    """
    if per_folder is None:
        paths = sorted(filter(is_shard, listed))
        if shards and shards[-1] >= len(paths) > 0:
            raise SystemExit(
                f"{repo} has {len(paths)} shards, and --shards names number {shards[-1]}, counted "
                "from 0; nothing was downloaded"
            )
        paths = paths[shards[0] : shards[-1] + 1] if shards else paths
    elif shards:
        paths = [shard_path(number, per_folder) for number in shards]
    else:
        pattern = r"\d\d/\d{8}\.tar" if per_folder else r"\d{8}\.tar"
        paths = sorted(path for path in listed if re.fullmatch(pattern, path))
    if lacking := [path for path in paths if path not in listed]:
        first = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
        raise SystemExit(
            f"{repo} has no {first} ({len(lacking)} of {len(paths)} that --shards names); "
            "nothing was downloaded"
        )
    if not paths:
        example = shard_path(0, per_folder or 0)
        raise SystemExit(f"{repo} has no shards such as {example}; nothing was downloaded")
    return paths


class Wanted(NamedTuple):
    """A data set to download.

    Attributes:
        repo: on the Hub.
        folder: for its files.
        per_folder: shards in each of its folders; see :func:`choose_paths`.
        licence: what its card should name; None: not known.
    """

    repo: str
    folder: Path
    per_folder: int | None
    licence: str | None = None


def plan_files(wanted: Wanted, shards: range | None) -> list[File]:
    """The files that belong in a folder, shards in order; prints the data set's licence."""
    repo, folder, per_folder, licence = wanted
    with hub_errors_in_one_line(repo):
        api = HfApi()
        info = api.dataset_info(repo, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        listed = list_repository(api, repo, info.sha, shards, per_folder)
        card = info.card_data.to_dict() if info.card_data else {}
    print_licence(repo, card, licence)
    paths = choose_paths(repo, listed, shards, per_folder)
    files = []
    for path in [*(path for path in listed if DESCRIPTION.fullmatch(path)), *paths]:
        entry = listed[path]
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files.append(File(repo, info.sha, path, entry.size, digest, path.endswith(".tar"), folder))
    return files


def print_licence(repo: str, card: dict[str, Any], known: str | None) -> None:
    names = card.get("license_name") or card.get("license")
    names = ", ".join(names) if isinstance(names, list) else names
    no_name = "its card names no licence" + (f", it was published under {known}" if known else "")
    licence = f"licence {printable(names)}" if names else no_name
    print(f"{repo}: {licence}; read {page_of(repo)}")


def check_folder(files: Sequence[File]) -> None:
    """Exit with a line if the folder is another data set's; a shard is never overwritten."""
    folder, repo = files[0].folder, files[0].repo
    record = folder / RECORDS / "repository"
    if record.is_file() and (other := record.read_text().strip()) not in ("", repo):
        raise SystemExit(
            f"{folder} contains {printable(other)}, not {repo}: choose another folder, or remove it"
        )
    sizes = {file: size_of(file.target) for file in files if file.is_shard}
    if unlike := [file for file, size in sizes.items() if size not in (None, file.size)]:
        first = unlike[0]
        raise SystemExit(
            f"{first.target} has {sizes[first]} bytes, expected {first.size} as in {repo} "
            f"({len(unlike)} such): it is another data set's, or damaged; remove it, or choose "
            "another folder. Nothing was downloaded"
        )


def check_disk(files: Sequence[File]) -> None:
    """Exit with a line if a file system is too small for what is missing."""
    needed: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for file in files:
        existing = next(parent for parent in file.target.absolute().parents if parent.is_dir())
        device = existing.stat().st_dev
        needed[device] += file.missing_bytes()
        folders.setdefault(device, existing)
    for device, folder in folders.items():
        if needed[device] > (free := shutil.disk_usage(folder).free):
            raise SystemExit(
                f"{format_bytes(needed[device])} are to be downloaded, and {folder} has "
                f"{format_bytes(free)} free: make room, or choose fewer with --shards. "
                "Nothing was downloaded"
            )


# --- downloading ----------------------------------------------------------------------------------
@functools.cache
def open_lock(folder: Path) -> int:
    """Opened once: closing one of several descriptors would drop all of this process's locks."""
    return os.open(folder / RECORDS / "lock", os.O_RDWR | os.O_CREAT, 0o666)


@contextlib.contextmanager
def lock_file(file: File, stop: threading.Event) -> Iterator[None]:
    """Hold this file's byte of .download/lock, which all runs in this folder share.

    On a file system without locks two runs may damage a .partial; its hash will show it.
    """
    lock, byte = open_lock(file.folder), zlib.crc32(file.path.encode())
    while not stop.is_set():
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                break
            stop.wait(0.5)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)


def stream(file: File, progress: Callable[[int], None], stop: threading.Event) -> None:
    """Append the bytes that the partial file lacks; whatever was received is kept."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)
    with open(file.partial, "ab") as partial:
        start = partial.tell()
        if start > file.size:  # not the beginning of this file
            partial.truncate(0)
            start = 0
        if start < file.size:
            if start:
                headers["Range"] = f"bytes={start}-"
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                if start and response.status_code != 206:  # the server sends all of it
                    partial.truncate(0)
                    progress(-start)
                for chunk in response.iter_bytes():
                    if stop.is_set():
                        return
                    partial.write(chunk)
                    progress(len(chunk))
                    if partial.tell() > file.size:  # not this file; the answer may be endless
                        break
        partial.flush()
        os.fsync(partial.fileno())


def check(file: File, progress: Callable[[int], None]) -> None:
    """Raise HubError, and remove the partial file, if it is not the Hub's file."""
    digest, size = hashlib.sha256(), 0
    with open(file.partial, "rb") as partial:
        while chunk := partial.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if size != file.size or (len(file.hash) == 64 and digest.hexdigest() != file.hash):
        progress(-size)
        file.partial.unlink()
        raise HubError(
            f"the {format_bytes(size)} received are not what the Hub lists, by size or SHA-256"
        )


def download(file: File, planned: int, tries: int, bar: tqdm, stop: threading.Event) -> bool:
    """Download a file, continuing after interruptions.

    Args:
        file: to download.
        planned: its bytes in the total of the bar.
        tries: give up after so many tries in a row that received nothing.
        bar: shows the bytes received.
        stop: set when the run ends.

    Returns:
        whether it was downloaded here, not by another run.
    """

    def progress(received: int) -> None:
        with bar.get_lock():
            bar.update(received)

    with lock_file(file, stop):
        bar.total += file.missing_bytes() - planned  # another run may have downloaded some of it
        fruitless, downloaded = 0, False
        while not file.exists() and not stop.is_set():
            before = size_of(file.partial) or 0
            try:
                stream(file, progress, stop)
                if stop.is_set():
                    break
                check(file, progress)
                os.replace(file.partial, file.target)
                downloaded = True
                for older in file.partial.parent.glob(f"{file.target.name}.*.partial"):
                    older.unlink()  # of another commit
            except (HTTPError, HubError) as error:
                if status_of(error) not in (None, *TRANSIENT):
                    raise
                fruitless = 0 if (size_of(file.partial) or 0) > before else fruitless + 1
                if fruitless >= tries:
                    raise
                line = f"{file.path}: {explain(error, file.repo)}; trying again"
                bar.write(line, file=sys.stderr)
                stop.wait(min(MAX_PAUSE, 2**fruitless))
    return downloaded


def prepare_folders(files: Collection[File]) -> None:
    """Make the folders, and record the data set of each."""
    for folder, repo in {(file.folder, file.repo) for file in files}:
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        (folder / RECORDS / "repository").write_text(f"{repo}\n")
        open_lock(folder)
    for path in {path for file in files for path in (file.target.parent, file.partial.parent)}:
        path.mkdir(parents=True, exist_ok=True)


def download_all(
    files: Sequence[File], workers: int, tries: int
) -> tuple[dict[File, str], int, int]:
    """Download files, ``workers`` at once; gives up when as many have failed.

    Returns:
        why files failed, and how many files and bytes this run (not another) has downloaded.
    """
    stop, failed, downloaded = threading.Event(), dict[File, str](), 0
    planned = {file: file.missing_bytes() for file in files}
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log needs few lines
    total = sum(planned.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, smoothing=0, mininterval=interval) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        started = {
            pool.submit(download, file, planned[file], tries, bar, stop): file for file in files
        }
        try:
            for done, future in enumerate(as_completed(started), 1):
                try:
                    downloaded += future.result()
                except (HTTPError, HubError, OSError) as error:
                    failed[started[future]] = explain(error, started[future].repo)
                if len(failed) >= workers:
                    break
                bar.set_postfix_str(f"{done} of {len(files)} files", refresh=False)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return failed, downloaded, bar.n


# --- the command ----------------------------------------------------------------------------------
def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=describe_datasets("captions", "reinforcements", reinforced=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, ("REPO", "FOLDER")
    add_dataset_option(parser, "download this data set to its folder", reinforced=False)
    text = "a data set on the Hub, and the folder for its files; may be repeated"
    add("--repo", nargs=2, action="append", default=[], metavar=names, help=text)
    text = "download these shards, by number: 0-3 for four (default: all)"
    add("--shards", type=parse_range, metavar="A-B", help=text)
    text = "with --repo: shards in each folder of the data set; 0 (default): there are no folders"
    add("--per-folder", type=int, default=0, help=text)
    add("--workers", type=int, default=8, help="files to download at once (default: 8)")
    text = "give up a file after this many tries in a row that received nothing (default: 10)"
    add("--tries", type=int, default=10, help=text)
    add("--dry-run", action="store_true", help="print what would be downloaded, and end")
    args = parser.parse_args(arguments)
    for name, least in (("workers", 1), ("tries", 1), ("per_folder", 0)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected {least} or more, not {value}")
    if not args.dataset and not args.repo:
        parser.error("expected --dataset or --repo")
    for repo, _ in args.repo:
        if not REPOSITORY.fullmatch(repo):
            parser.error(f"--repo: expected a name such as apple/DataCompDR-12M, not {repo!r}")
    args.wanted = list_wanted(args)
    if len({wanted.folder.resolve() for wanted in args.wanted}) < len(args.wanted):
        parser.error(
            "--repo: each data set needs a folder of its own, as their shards have the same names"
        )
    return args


def list_wanted(args: argparse.Namespace) -> list[Wanted]:
    """The data sets that --dataset and --repo name, captions first."""
    names = [DATASETS[args.dataset].with_captions, args.dataset] if args.dataset else []
    datasets = [DATASETS[name] for name in names if name]
    return [
        *(Wanted(d.repository, d.shard_folder.path(), d.per_folder, d.licence) for d in datasets),
        *(Wanted(repo, Path(folder), args.per_folder) for repo, folder in args.repo),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prepare_client()

    files: list[File] = []
    for wanted in args.wanted:
        planned = plan_files(wanted, args.shards)
        check_folder(planned)
        missing = [file for file in planned if not file.exists()]
        needed = format_bytes(sum(file.missing_bytes() for file in missing))
        print(
            f"    {len(missing)} files, {needed} to download into {wanted.folder}; "
            f"{len(planned) - len(missing)} exist already"
        )
        files += missing
    print("The images have licences of their own, set by whoever published them.")
    check_disk(files)
    if args.dry_run or not files:
        reason = "this was a dry run" if args.dry_run else "all files exist already"
        print(f"nothing was downloaded: {reason}")
        return

    files.sort(key=lambda file: (file.is_shard, file.path))  # a shard of all sets, then the next
    start = time.monotonic()
    sys.stdout.flush()
    prepare_folders(files)
    failed, downloaded, size = download_all(files, args.workers, args.tries)
    left = [file for file in files if not file.exists()]
    if failed:
        file, why = next(iter(failed.items()))
        raise SystemExit(
            f"{len(left)} of {len(files)} files are missing. {file.path}: {why}. "
            "Run it again to go on"
        )
    others = len(files) - downloaded
    by_others = f"; another run downloaded {others}" if others else ""
    seconds = time.monotonic() - start
    print(f"downloaded {downloaded} files, {format_bytes(size)}, in {seconds:.0f} s{by_others}")


if __name__ == "__main__":
    run_command(main)
