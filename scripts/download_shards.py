"""Bring shards of data sets from the Hugging Face Hub: a range of them or all, into one folder for each data set.

    python scripts/download_shards.py --shards 0-3 --repo mlfoundations/DataComp-12M datasets/DataComp-12M \\
        --repo apple/DataCompDR-12M datasets/DataCompDR-12M-noimage

Says first under which licences the data sets are, and how many files and bytes it will bring; ends there if a data set
lacks a shard of the range, if the disk can't hold it, or if a shard of another size is there already (another data
set's, or damaged: it is never overwritten). Beside the shards come the small files that describe them (DESCRIPTION).

HF_TOKEN (or the token of `hf auth login`), HF_ENDPOINT and HF_HOME hold as everywhere in huggingface_hub.

Run again, it brings what is missing, to the byte: a shard that was cut off goes on where it stopped. huggingface_hub's
own downloads begin such a shard anew (2.x: into a file that no other process takes up), so the bytes are streamed here,
by HTTP, which the Hub speaks for its Xet storage too. A shard gets its name when its SHA-256 is the Hub's and it is on
disk. Two runs may bring the same folder, from two machines too: each waits for the shards that the other is bringing.

Leaves in each folder
    <shard>.tar, README.md …    as in the repository
    .download/                  which data set this is, locks, and <shard>.<hash>.partial of what isn't complete

Leaves out: reading again what is there. A shard that has the Hub's size counts as complete.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
)  # HTTPError: httpx's, or that of its successor
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, logging
from tqdm import tqdm

RECORDS = ".download"
DESCRIPTION = re.compile(r"(README|LICEN[CS]E|NOTICE)[\w.-]*|manifest\.jsonl", re.IGNORECASE)
LONGEST_PAUSE = 60  # seconds between two tries; the Hub counts its requests over five minutes
CHUNK = 1 << 20
TRANSIENT = (408, 429, 500, 502, 503, 504)


class DownloadError(Exception):
    """Why a file can't be brought, for people."""


class File(NamedTuple):
    """A file of a data set at a commit, and the folder that it goes into."""

    repo: str
    commit: str
    path: str
    size: int
    hash: str  # SHA-256 of what is in LFS, as shards are; git's of a small file
    is_shard: bool
    folder: Path

    @property
    def target(self):
        return self.folder / self.path

    @property
    def partial(self):
        return self.folder / RECORDS / f"{self.path}.{self.hash[:16]}.partial"

    def is_there(self):
        return size_of(self.target) == self.size

    def missing(self):
        """How many bytes are to be brought."""
        return 0 if self.is_there() else self.size - min(size_of(self.partial) or 0, self.size)


def size_of(path):
    return path.stat().st_size if path.is_file() else None


def in_bytes(number):
    return tqdm.format_sizeof(number, "B") if number >= 1000 else f"{number} B"


def plain(text):
    """A string from the network, without what a terminal might obey."""
    return re.sub(r"[^\x20-\x7e]", "?", str(text))[:200]


# what goes wrong


def page_of(repo):
    return f"{re.sub('//.*@', '//', constants.ENDPOINT)}/datasets/{repo}"


def status_of(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error, repo):
    """One line for people on what failed; nothing of it is the server's text, or the token."""
    host, status = urlsplit(constants.ENDPOINT).hostname, status_of(error)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms on {page_of(repo)}, and set HF_TOKEN to a token of that account"
    if status == 401 and not get_token():
        return (
            f"{host} gives {repo} to nobody without a token (401): set HF_TOKEN, or check the name"
        )
    if status in (401, 403):
        return f"the token (HF_TOKEN, or that of hf auth login) may not read {repo} ({status}): set another one"
    if status == 404:
        return f"{host} has no data set {repo}, or this file no more (404): check the name and HF_ENDPOINT"
    if status:
        return f"{host} answers {status}"
    if isinstance(error, DownloadError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or 'writing'}: {os.strerror(error.errno)}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so huggingface_hub asks nobody: unset it"
    return f"no answer from {host}, or not all of it ({type(error).__name__}): check the network and HF_ENDPOINT"


@contextlib.contextmanager
def asking(repo):
    """End the script with one line where the Hub doesn't answer, or something else does."""
    try:
        yield
    except (HTTPError, ConnectionError) as error:
        raise SystemExit(explain(error, repo)) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        strange = f"{page_of(repo)} is not answered as by a Hub ({type(error).__name__}): check HF_ENDPOINT"
        raise SystemExit(strange) from None


# what to bring


def shard_range(text):
    match = re.fullmatch(r"0*(\d{1,5})(?:-0*(\d{1,5}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"expected a range such as 0-3, or a number, not {text!r}")
    return range(first, last + 1)


def shard_path(number, per_folder):
    """Shard 1003 is 00001003.tar, or 01/00000003.tar where folders hold 1,000 each."""
    if not per_folder:
        return f"{number:08d}.tar"
    return f"{number // per_folder:02d}/{number % per_folder:08d}.tar"


def contents_of(api, repo, commit, shards, per_folder):
    """What the repository holds: its root, and the folders where the shards are (all of them if ``shards`` is None)."""

    def entries(folder):
        return list(api.list_repo_tree(repo, folder, repo_type="dataset", revision=commit))

    found = entries(None)
    if per_folder:
        folders = [entry.path for entry in found if not isinstance(entry, RepoFile)]
        wanted = {shard_path(number, per_folder).partition("/")[0] for number in shards or ()}
        for folder in folders:
            if re.fullmatch(r"\d\d", folder) and (not shards or folder in wanted):
                found += entries(folder)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def plan(repo, folder, shards, per_folder):
    """The :class:`File` s that belong into a folder, in the order of the shards; prints the data set's licence."""
    with asking(repo):
        api = HfApi()
        info = api.dataset_info(repo, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        held = contents_of(api, repo, info.sha, shards, per_folder)
        card = info.card_data.to_dict() if info.card_data else {}
    tell_licence(repo, card)

    pattern = r"\d\d/\d{8}\.tar" if per_folder else r"\d{8}\.tar"
    paths = (
        [shard_path(number, per_folder) for number in shards]
        if shards
        else sorted(path for path in held if re.fullmatch(pattern, path))
    )
    if lacking := [path for path in paths if path not in held]:
        raise SystemExit(
            f"{repo} has no {', '.join(lacking[:5])}{', …' if len(lacking) > 5 else ''} ({len(lacking)} of "
            f"{len(paths)} that --shards names); nothing was brought"
        )
    if not paths:
        raise SystemExit(
            f"{repo} holds no shards such as {shard_path(0, per_folder)}; nothing was brought"
        )
    paths = [*(path for path in held if DESCRIPTION.fullmatch(path)), *paths]
    files = []
    for path in paths:
        entry = held[path]
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files.append(File(repo, info.sha, path, entry.size, digest, path.endswith(".tar"), folder))
    return files


def tell_licence(repo, card):
    names = card.get("license_name") or card.get("license")
    names = ", ".join(names) if isinstance(names, list) else names
    print(
        f"{repo}: {f'licence {plain(names)}' if names else 'its card names no licence'}; read {page_of(repo)}"
    )


def check_folder(files):
    """End the script where the folder is another data set's; a shard is never overwritten."""
    folder, repo = files[0].folder, files[0].repo
    record = folder / RECORDS / "repository"
    if record.is_file() and (other := record.read_text().strip()) not in ("", repo):
        raise SystemExit(
            f"{folder} holds {plain(other)}, not {repo}: name another folder, or remove that one"
        )
    sizes = {file: size_of(file.target) for file in files if file.is_shard}
    if unlike := [file for file, size in sizes.items() if size not in (None, file.size)]:
        first = unlike[0]
        raise SystemExit(
            f"{first.target} has {sizes[first]} bytes, expected {first.size} as in {repo} ({len(unlike)} such): it is "
            "another data set's or damaged; remove it, or name another folder. Nothing was brought"
        )


def check_disk(files):
    """End the script where a file system can't hold what is missing."""
    needed, folders = Counter(), {}
    for file in files:
        existing = next(parent for parent in file.target.absolute().parents if parent.is_dir())
        device = existing.stat().st_dev
        needed[device] += file.missing()
        folders.setdefault(device, existing)
    for device, folder in folders.items():
        if needed[device] > (free := shutil.disk_usage(folder).free):
            raise SystemExit(
                f"{in_bytes(needed[device])} are to be brought, and {folder} has {in_bytes(free)} free: make room, "
                "or take fewer with --shards. Nothing was brought"
            )


# bringing


@functools.cache
def lock_file(folder):
    """Opened once: closing one of several descriptors would drop all locks that this process has on the file."""
    return os.open(folder / RECORDS / "lock", os.O_RDWR | os.O_CREAT, 0o666)


@contextlib.contextmanager
def locked(file, stop):
    """Hold a byte of .download/lock, which all runs in this folder share, for this file.

    On a file system that knows no locks two runs at once may spoil a .partial; its hash will show it.
    """
    lock, byte = lock_file(file.folder), zlib.crc32(file.path.encode())
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


def stream(file, progress, stop):
    """Bring the bytes that the partial file lacks; what has come stays, whatever happens."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)
    with open(file.partial, "ab") as partial:
        start = partial.tell()
        if start > file.size:  # not a beginning of this file
            partial.truncate(0)
            start = 0
        if start < file.size:
            if start:
                headers["Range"] = f"bytes={start}-"
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                if start and response.status_code != 206:  # all of it
                    partial.truncate(0)
                    progress(-start)
                for chunk in response.iter_bytes():
                    if stop.is_set():
                        return
                    partial.write(chunk)
                    progress(len(chunk))
                    if partial.tell() > file.size:  # not the file, whatever else comes
                        break
        partial.flush()
        os.fsync(partial.fileno())


def check(file, progress):
    """Raise a DownloadError, and remove what has come, if that isn't the file."""
    digest = hashlib.sha256()
    with open(file.partial, "rb") as partial:
        while chunk := partial.read(CHUNK):
            digest.update(chunk)
    size = size_of(file.partial)
    if size != file.size or (len(file.hash) == 64 and digest.hexdigest() != file.hash):
        progress(-size)
        file.partial.unlink()
        raise DownloadError(
            f"what came ({in_bytes(size)}) is not what the Hub lists, by its size or SHA-256"
        )


def bring(file, planned, tries, bar, stop):
    """Bring a file, going on after interruptions, until ``tries`` in a row have brought nothing of it.

    ``planned``: the bytes of it that the bar expects. Returns whether it was brought here, not by another run.
    """

    def progress(brought):
        with bar.get_lock():
            bar.update(brought)

    with locked(file, stop):
        bar.total += file.missing() - planned  # another run may have brought it, or some of it
        fruitless, brought = 0, False
        while not file.is_there() and not stop.is_set():
            before = size_of(file.partial) or 0
            try:
                stream(file, progress, stop)
                if stop.is_set():
                    break
                check(file, progress)
                os.replace(file.partial, file.target)
                brought = True
                for older in file.partial.parent.glob(
                    f"{file.target.name}.*.partial"
                ):  # of an earlier commit
                    older.unlink()
            except (HTTPError, DownloadError) as error:
                if status_of(error) not in (None, *TRANSIENT):
                    raise
                fruitless = 0 if (size_of(file.partial) or 0) > before else fruitless + 1
                if fruitless >= tries:
                    raise
                bar.write(
                    f"{file.path}: {explain(error, file.repo)}; trying again", file=sys.stderr
                )
                stop.wait(min(LONGEST_PAUSE, 2**fruitless))
    return brought


def prepare(files):
    """Make the folders, each with the name of its data set."""
    for folder in {file.folder for file in files}:
        repo = next(file.repo for file in files if file.folder == folder)
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        (folder / RECORDS / "repository").write_text(f"{repo}\n")
        lock_file(folder)
    for path in {path for file in files for path in (file.target.parent, file.partial.parent)}:
        path.mkdir(parents=True, exist_ok=True)


def bring_all(files, workers, tries):
    """Bring files, as many at once as there are workers; gives up when as many have failed.

    Returns ``{File: why}`` of those, and how many files and bytes this run has brought: another may bring some of them.
    """
    stop, failed, planned, brought = (
        threading.Event(),
        {},
        {file: file.missing() for file in files},
        0,
    )
    pause = (
        0.5 if sys.stderr.isatty() else 30
    )  # seconds between two states of the bar; less fills a log
    with (
        tqdm(
            total=sum(planned.values()), unit="B", unit_scale=True, smoothing=0, mininterval=pause
        ) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        started = {
            pool.submit(bring, file, planned[file], tries, bar, stop): file for file in files
        }
        try:
            for done, future in enumerate(as_completed(started), 1):
                try:
                    brought += future.result()
                except (HTTPError, DownloadError, OSError) as error:
                    failed[started[future]] = explain(error, started[future].repo)
                if len(failed) >= workers:
                    break
                bar.set_postfix_str(f"{done} of {len(files)} files", refresh=False)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return failed, brought, bar.n


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repo",
        nargs=2,
        action="append",
        required=True,
        metavar=("REPO", "FOLDER"),
        help="a data set on the Hub, and where its files go; may be repeated",
    )
    parser.add_argument(
        "--shards", type=shard_range, metavar="A-B", help="by number, 0-3 for four (default: all)"
    )
    parser.add_argument(
        "--per-folder",
        type=int,
        default=0,
        help="shards in each folder of the data set; 0 (default): they have none",
    )
    parser.add_argument(
        "--workers", type=int, default=8, help="files that are brought at once (default: 8)"
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=10,
        help="times in a row that a file may bring nothing before it is given up (default: 10)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be brought, and end")
    args = parser.parse_args(arguments)
    for name, least in (("workers", 1), ("tries", 1), ("per_folder", 0)):
        if getattr(args, name) < least:
            parser.error(
                f"--{name.replace('_', '-')}: expected {least} or more, not {getattr(args, name)}"
            )
    folders = [Path(folder).resolve() for _, folder in args.repo]
    if len(set(folders)) < len(folders):
        parser.error(
            "--repo: each data set needs a folder of its own, the names of their shards are the same"
        )
    if bad := next(
        (repo for repo, _ in args.repo if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo)), None
    ):
        parser.error(f"--repo: expected a name such as apple/DataCompDR-12M, not {bad!r}")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    logging.set_verbosity_error()  # what goes wrong is told here
    if (
        urlsplit(constants.ENDPOINT).scheme not in ("http", "https")
        or not urlsplit(constants.ENDPOINT).hostname
    ):
        raise SystemExit("HF_ENDPOINT is no address such as https://huggingface.co")
    if not re.fullmatch(r"[\x21-\x7e]*", get_token() or ""):
        raise SystemExit("HF_TOKEN holds a space or a character that no token has: set it again")

    files = []
    for repo, folder in args.repo:
        of_repo = plan(repo, Path(folder), args.shards, args.per_folder)
        check_folder(of_repo)
        missing = [file for file in of_repo if not file.is_there()]
        size, there = in_bytes(sum(file.missing() for file in missing)), len(of_repo) - len(missing)
        print(f"    {len(missing)} files, {size} to bring into {folder}; {there} are there")
        files += missing
    print("The images have licences of their own, which are up to whoever published them.")
    check_disk(files)
    if args.dry_run or not files:
        print(
            "nothing was brought: "
            + ("this was a dry run" if args.dry_run else "all of it is there")
        )
        return

    files.sort(
        key=lambda file: (file.is_shard, file.path)
    )  # the same shards of all data sets, one after another
    start = time.monotonic()
    sys.stdout.flush()
    prepare(files)
    failed, brought, size = bring_all(files, args.workers, args.tries)
    left = [file for file in files if not file.is_there()]
    if failed:
        file, why = next(iter(failed.items()))
        raise SystemExit(
            f"{len(left)} of {len(files)} files are missing. {file.path}: {why}. Run it again to go on"
        )
    others = f"; another run brought {len(files) - brought}" if brought < len(files) else ""
    print(f"brought {brought} files, {in_bytes(size)}, in {time.monotonic() - start:.0f} s{others}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run it again to go on") from None
    except OSError as error:
        raise SystemExit(str(error)) from None
