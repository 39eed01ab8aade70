"""Download the images whose addresses shards hold, by img2dataset, into image shards of the same names.

    bash scripts/download_images.sh --shards 0-7         # makes an environment with img2dataset, and starts this in it
    python scripts/download_images.py --input datasets/DataComp-12M --reinforcements datasets/DataCompDR-12M-noimage \\
        --output datasets/DataComp-12M-images

--input has the shards with `url.txt`. What the image should be, `sha256`, stands in the `json` of --reinforcements, or
of the input where that has it: images that have changed since are left out, as their stored embeddings would be wrong.

Every shard becomes one url list and one image shard of the same name, so that image shards stay aligned with the others
whichever are asked for. Images have DataComp's settings: at most 512 pixels on the longer side, jpg. Of DataComp's own
download they lack the blurred faces, as the shards don't say where these are.

Leaves in the output folder
    <shard>.tar            <uid>.jpg, and <uid>.json with uid, url, sha256 (of the bytes as downloaded), width, …
    <shard>.parquet        every sample of the shard: uid, url, outcome, error_message, sha256, expected_sha256, …
    <shard>_stats.json     counts, seconds
    download_report.json   the table that is printed, over all shards of the folder
    img2dataset.log        what img2dataset said
    .img2dataset/          work in progress; empty at the end

The outcome of a sample is one of
    downloaded    it is in the tar
    dead          no such host or page, a server's error, no answer in time, an answer cut off
    changed       an image, but another one: its sha256 is not the one expected
    refused       by its server (HTTP 401, 403, 429, 451; X-Robots-Tag: noai, noindex, …), or by this script: an address
                  that is, or leads to, something else than http and https; an answer longer than MAX_BYTES
    undecodable   what came is no image that OpenCV reads, such as a web page

A shard gets its name when it is complete. A run that was killed is run again: shards that img2dataset had finished are
kept, the others begun anew. Several runs may share an output folder; give each --shards of its own. To fetch a shard
again, remove its tar.

Safe: addresses come from strangers. Only http and https are spoken, also after a redirect, and what is answered is
bounded in bytes, seconds and pixels. Leaves out: keeping requests from your own network. Who answers for an
address may point it at a machine beside yours (what comes is kept only if it is an image); run it where that does no
harm. How long looking up a host's name may take is the system's setting.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import glob
import http.client
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

from join_shards import Source, expand, publish, publish_json, run_all, write_tar
from shard_members import ShardError, open_files, read_contents, read_json
from tqdm import tqdm

IMAGE_SETTINGS = {  # DataComp's
    "image_size": 512,
    "resize_mode": "keep_ratio_largest",
    "resize_only_if_bigger": True,
    "encode_format": "jpg",
    "compute_hash": "sha256",
    "extract_exif": False,  # nothing here reads it, and it tells where people were
}
OUTCOMES = ("downloaded", "dead", "changed", "refused", "undecodable")
REFUSED = re.compile(
    r"disallowed by X-Robots-Tag|HTTP Error (401|403|429|451)\b|unknown url type|Redirection to url .* is not allowed"
    r"|more than \d+ bytes",
    re.DOTALL,
).search

# bytes of an answer. img2dataset holds as many as twice its threads in memory, 256 by default: 5 GB a process at the
# worst, and 8 while the half that is just coming is copied
MAX_BYTES = 20 << 20
MAX_SECONDS = (
    120  # for an address, redirects included: a server that drips would hold up its shard for ever
)
MAX_PIXELS = 1 << 28  # of an image, 0.8 GB once decoded
MAX_URL = 1 << 16  # bytes; longer ones are no addresses

WORK = ".img2dataset"
LOG = "img2dataset.log"
SECONDS_BETWEEN_LOOKS = 0.5  # at what img2dataset has finished
OLD = 3600  # seconds after which a work folder that was never claimed is a killed run's
SHARDS_PER_PROCESS = 8  # in one run of img2dataset; its lists lie in the work folder meanwhile
QUIET = {  # img2dataset's libraries would ask their servers for news
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


# in img2dataset's processes


class Until(io.RawIOBase):
    """What comes from a socket, up to a point in time: a socket's own timeout begins anew with every byte."""

    def __init__(self, raw, sock, end):
        self.raw, self.sock, self.timeout, self.end = raw, sock, sock.gettimeout(), end

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not at its end after {MAX_SECONDS} s")
        self.sock.settimeout(min(left, self.timeout or left))
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """Bounded in seconds, headers and body, and in bytes: img2dataset reads whatever comes, for as long as it comes."""

    def __init__(self, sock, *arguments, end, **keywords):
        super().__init__(sock, *arguments, **keywords)
        self.fp = io.BufferedReader(Until(self.fp.detach(), sock, end))

    def read(self):
        body = bytearray()
        while piece := self.read1(1 << 16):
            body += piece
            if len(body) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes")
        if self.length:  # read1 doesn't mind
            raise http.client.IncompleteRead(b"", self.length)
        return bytes(body)


class Bounded(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Has every request answered by an :class:`Answer`."""

    def http_request(self, request):
        request.full_url = urllib.parse.quote(
            request.full_url, safe=string.punctuation
        )  # spaces, letters beyond ASCII
        if not hasattr(request, "end"):  # else it is where a redirect leads
            request.end = time.monotonic() + MAX_SECONDS
        return self.do_request_(request)

    https_request = http_request

    def do_open(self, http_class, request, **options):
        def connection(*arguments, **keywords):
            made = http_class(*arguments, **keywords)
            made.response_class = functools.partial(Answer, end=request.end)
            return made

        return super().do_open(connection, request, **options)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Leaves where they lead no more time than is left."""

    def redirect_request(self, request, *arguments):
        new = super().redirect_request(request, *arguments)
        new.end = request.end
        return new


def http_opener():
    """Like urllib's own, but for file, ftp and data: an address or a redirect could ask for those."""
    proxies = {
        scheme: proxy
        for scheme, proxy in urllib.request.getproxies().items()
        if scheme in ("http", "https")
    }
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.UnknownHandler(),
        Bounded(),
        urllib.request.HTTPDefaultErrorHandler(),
        Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def fetch_shard(settings, row):
    """What img2dataset's distributor calls, in a process that may be on another machine."""
    from img2dataset.downloader import Downloader

    urllib.request.install_opener(http_opener())
    return Downloader(**settings)(row)


def fetch(arguments):
    """Run img2dataset in this process, its downloader behind our opener."""
    img2dataset = importlib.import_module("img2dataset.main")
    img2dataset.Downloader = lambda **settings: functools.partial(fetch_shard, settings)
    img2dataset.download(**arguments)


def end_with_parent():
    """Keep no process whose parent was killed; img2dataset's would go on, or wait for ever."""

    def follow(parent):
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()


# one shard


def paths_of(output, name):
    """A shard's ``(tar, parquet, stats)``; the stats are as img2dataset names them."""
    tar = output / name
    return tar, tar.with_suffix(".parquet"), tar.with_name(f"{tar.stem}_stats.json")


def is_finished(output, name):
    tar, _, stats = paths_of(output, name)
    return tar.is_file() and stats.is_file()


def sha256_in(contents, uid):
    members = contents.samples.get(uid, {}) if contents else {}
    if "json" not in members or uid in contents.refused:
        return None
    sha256 = read_json(members["json"]).get("sha256")
    return (
        sha256.lower()
        if isinstance(sha256, str) and re.fullmatch(r"[0-9A-Fa-f]{64}", sha256)
        else None
    )


def write_list(item, source, reinforcements, verify):
    """Write a shard's url list for img2dataset; returns the shard's name, and the list's length or an error."""
    import pyarrow
    from pyarrow import parquet

    path, name = item
    try:
        contents = source.contents(name)
        embedded = reinforcements.contents(name) if reinforcements else None
        rows, without = [], 0
        for uid, members in contents.samples.items():
            if uid in contents.refused:
                continue
            url = b""
            if "url.txt" in members and members["url.txt"].size <= MAX_URL:
                url = members["url.txt"].read().strip()
            without += not url
            if url:
                expected = (
                    (sha256_in(embedded, uid) or sha256_in(contents, uid)) if verify else None
                )
                rows.append(
                    {"uid": uid, "url": url.decode("utf-8", "replace"), "expected_sha256": expected}
                )
        if not rows:
            raise ShardError("holds no address (url.txt)")
        schema = pyarrow.schema(
            [(column, pyarrow.string()) for column in ("uid", "url", "expected_sha256")]
        )
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
        return {
            "name": name,
            "listed": len(rows),
            "without_url": without,
            "unusable": len(contents.refused),
        }
    except (ShardError, OSError) as error:
        return {"name": name, "error": str(error)}
    except Exception as error:  # whatever a stranger's shard may hold, the others go on
        return {"name": name, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    finally:
        open_files.close()


def outcome(row):
    if row["status"] == "success":
        return "changed" if row["expected_sha256"] not in (None, row["sha256"]) else "downloaded"
    if row["status"] == "failed_to_resize":
        return "undecodable"
    return "refused" if REFUSED(row["error_message"] or "") else "dead"


def finish(output, shard, batch, number):
    """Give a shard that img2dataset has finished its name: its tar without the changed images, keyed by uid.

    Args:
        output: the output folder.
        shard: what :func:`write_list` returned for it.
        batch: the work folder.
        number: the shard's number there.

    Returns:
        What ``<shard>_stats.json`` holds.

    Raises:
        ShardError: img2dataset's files are damaged.
        SystemExit: the shard can't be written, as on a full disk; the work folder stays, with all that was downloaded.
    """
    import pyarrow
    from pyarrow import parquet

    tar, table, stats = paths_of(output, shard["name"])
    its_tar, its_table, its_stats = result_paths(batch, number)
    try:
        tar.parent.mkdir(parents=True, exist_ok=True)
        for path in (tar, table, stats):
            for leftover in path.parent.glob(
                f".{glob.escape(path.name)}.*.partial"
            ):  # of a run that was killed
                leftover.unlink(missing_ok=True)
        seconds = json.loads(its_stats.read_text())["duration"]
        held = parquet.read_table(its_table)
        by_uid = {row["uid"]: row for row in held.to_pylist()}
        images = {}
        if any(
            row["status"] == "success" for row in by_uid.values()
        ):  # Python 3.10's tarfile fails on an empty tar
            with open(str(its_tar), "rb") as file:
                images = read_contents(file).samples
        rows = []
        for uid in parquet.read_table(batch / "lists" / shard["list"])[
            "uid"
        ].to_pylist():  # in the shard's order
            row = by_uid.get(uid)
            if row is None or (row["status"] == "success" and "jpg" not in images.get(uid, {})):
                # img2dataset goes on after a failed write: with a full disk, this would be a shard without images
                raise ShardError(
                    f"img2dataset lost samples on the way, {uid} for one; {LOG} says why"
                )
            row |= {
                "key": uid,
                "outcome": outcome(row),
            }  # for img2dataset, keys are running numbers
            if row["outcome"] == "changed":
                row |= {
                    "status": "failed_to_download",
                    "error_message": "hash mismatch",
                }  # img2dataset's words
            rows.append(row)

        def samples():
            for row in rows:
                if row["outcome"] == "downloaded":
                    record = {column: value for column, value in row.items() if column != "outcome"}
                    yield (
                        row["uid"],
                        {"jpg": images[row["uid"]]["jpg"], "json": json.dumps(record).encode()},
                    )

        schema = held.schema.append(pyarrow.field("outcome", pyarrow.string()))
        publish(
            table, lambda file: parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
        )
        counts = Counter(row["outcome"] for row in rows)
        about = {
            "count": len(rows),
            "seconds": round(seconds, 1),
            "outcomes": {name: counts[name] for name in OUTCOMES},
            "without_url": shard["without_url"],
            "unusable": shard.get("unusable", 0),  # a list of an earlier version has none
            "unverified": sum(
                row["outcome"] == "downloaded" and not row["expected_sha256"] for row in rows
            ),
        }
        publish_json(stats, about)
        publish(
            tar, lambda file: write_tar(file, samples())
        )  # last: with it, the shard is finished
        return about
    except OSError as error:
        if error.errno in (
            None,
            errno.ENOENT,
        ):  # pyarrow's, of a damaged file; or img2dataset wasn't done with it
            raise ShardError(f"what img2dataset left of it can't be read: {error}") from error
        raise SystemExit(
            f"{tar}: {error.strerror}: make room there, and run it again; what was downloaded is kept in {batch}"
        ) from None
    finally:
        open_files.close()


# batches of shards, each one run of img2dataset


def result_paths(batch, number):
    return tuple(
        batch / "shards" / f"{number:08d}{ending}" for ending in (".tar", ".parquet", "_stats.json")
    )


def finish_ready(batch, output, shards, bar):
    """Finish what img2dataset has; returns the shards that are left, by number, and adds what is wrong to the bar."""
    left = {}
    for number, shard in shards.items():
        results = result_paths(batch, number)
        try:
            json.loads(results[-1].read_text())  # written last
        except (OSError, ValueError):
            left[number] = shard
            continue
        try:
            bar.tell(finish(output, shard, batch, number))
        except ShardError as error:
            bar.fail(shard["name"], str(error))
        for path in results[:2]:
            path.unlink(missing_ok=True)  # the disk need not hold it twice
    return left


class Progress(tqdm):
    """A bar over shards, that keeps count of what came and what failed."""

    def __init__(self, total):
        super().__init__(total=total, unit="shard", smoothing=0, disable=not total)
        self.failed, self.samples, self.images = {}, 0, 0

    def tell(self, stats):
        self.samples += stats["count"]
        self.images += stats["outcomes"]["downloaded"]
        self.set_postfix_str(f"{self.images:,} images of {self.samples:,} addresses", refresh=False)
        self.update()

    def fail(self, name, why):
        self.failed[name] = why
        self.write(f"{name}: failed: {why}", file=sys.stderr)


def claim_batch(output):
    """A new work folder, locked for as long as the returned file is open."""
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=work))
    lock = open(new / "lock", "w")  # noqa: SIM115, the caller closes it
    fcntl.flock(lock, fcntl.LOCK_EX)
    batch = new.rename(
        work / new.name.replace("new-", "batch-")
    )  # locked before another run can see it
    for folder in ("lists", "shards"):
        (batch / folder).mkdir()
    return batch, lock


def rescue(output):
    """Keep what runs that were killed had finished, and remove their work folders."""
    for new in (output / WORK).glob(
        "new-*"
    ):  # one of a run that is alive is so called for a moment only
        with contextlib.suppress(FileNotFoundError):
            if time.time() - new.stat().st_mtime > OLD:
                shutil.rmtree(new)
    for batch in (output / WORK).glob("batch-*"):
        with contextlib.suppress(FileNotFoundError), open(batch / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # a run that is alive
            shards = {}
            with contextlib.suppress(OSError, ValueError):
                shards = json.loads((batch / "batch.json").read_text())
            for number, shard in shards.items():
                if not is_finished(output, shard["name"]):
                    with contextlib.suppress(
                        Exception
                    ):  # unfinished, or damaged: it is fetched again
                        finish(output, shard, batch, int(number))
            shutil.rmtree(batch)


def run_batch(names, sources, args, bar):
    """List the addresses of some shards, let img2dataset fetch them, and give each its name as it is finished."""
    batch, lock = claim_batch(args.output)
    with lock:
        items = [(batch / "lists" / f"{i:08d}.parquet", name) for i, name in enumerate(names)]
        lister = functools.partial(write_list, verify=not args.no_verify_hash, **sources)
        lists = {listed["name"]: listed for listed in run_all(lister, items, args.processes)}
        shards = {}
        for (
            path,
            name,
        ) in items:  # img2dataset numbers its shards by the lists that are there, in their order
            if "error" in lists[name]:
                bar.fail(name, lists[name]["error"])
            else:
                shards[len(shards)] = {**lists[name], "list": path.name}
        if shards:
            publish_json(batch / "batch.json", shards)
            longest = max(shard["listed"] for shard in shards.values())
            shards = run_img2dataset(batch, shards, longest, args, bar)
        for shard in shards.values():
            bar.fail(shard["name"], f"img2dataset did not finish it; {LOG} says why")
        shutil.rmtree(batch)


def run_img2dataset(batch, shards, longest, args, bar):
    """Returns the shards that it did not finish, by number."""
    arguments = {
        **IMAGE_SETTINGS,
        "url_list": str(batch / "lists"),
        "input_format": "parquet",
        "save_additional_columns": ["uid", "expected_sha256"],
        "output_folder": str(batch / "shards"),
        "output_format": "webdataset",
        "number_sample_per_shard": longest,  # so that each list becomes one shard
        "oom_shard_count": 8,  # digits
        "processes_count": args.processes,
        "thread_count": args.threads,
        "timeout": args.timeout,
        "retries": args.retries,
        "distributor": args.distributor,
    }
    defaults = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS), "PYSPARK_PYTHON": sys.executable}
    environment = {**defaults, **os.environ, **QUIET}
    command = [sys.executable, __file__, "--fetch", json.dumps(arguments)]
    with open(args.output / LOG, "ab") as log:
        begin = log.tell()
        # in a session of its own, as Ctrl-C is for this process
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        while True:
            ended = process.poll() is not None  # before the look at what is finished
            shards = finish_ready(batch, args.output, shards, bar)
            if ended:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:  # it ends with 0 where shards failed
        with open(args.output / LOG, "rb") as log:
            log.seek(begin)
            said = (log.read().decode("utf-8", "replace").strip() or "nothing").splitlines()[-1]
        bar.close()
        raise SystemExit(
            f"img2dataset ended with status {process.returncode}; in {args.output / LOG}: {said[:300]}"
        )
    return shards


# telling


def report_on(output):
    """The counts of all finished shards in the output folder, those of other runs too."""
    report = {
        "shards": 0,
        "samples": 0,
        "outcomes": Counter(),
        "without_url": 0,
        "unusable": 0,
        "unverified": 0,
    }
    for path in sorted(output.rglob("*_stats.json")):
        name = path.with_name(f"{path.name.removesuffix('_stats.json')}.tar").relative_to(output)
        if any(part.startswith(".") for part in name.parts) or not is_finished(output, name):
            continue
        try:
            stats = json.loads(path.read_text())
        except ValueError:
            stats = None
        if not isinstance(stats, dict) or "outcomes" not in stats:
            raise SystemExit(
                f"{output / name} is not of this script, by its {path.name}; img2dataset itself may have made it: name "
                "another --output. scripts/join_datacompdr12m.sh takes such shards as they are"
            )
        report["shards"] += 1
        report["samples"] += stats["count"]
        report["outcomes"].update(stats["outcomes"])
        for count in ("without_url", "unusable", "unverified"):
            report[count] += stats.get(count, 0)
    return report


def table(report, output):
    told = {"changed": "changed (sha256 differs)"}
    rows = [(told.get(name, name), report["outcomes"][name]) for name in OUTCOMES]
    if report["without_url"]:
        rows.append(("without an address in the shard", report["without_url"]))
    if report["unusable"]:
        rows.append(("unusable in the shard (uid, json or name)", report["unusable"]))
    if report["unverified"]:
        rows.append(("downloaded, no sha256 to compare", report["unverified"]))
    width = max(len(label) for label, _ in rows)
    whole = max(report["samples"], 1)
    lines = [f"{label:<{width}}  {number:>13,}  {number / whole:>6.1%}" for label, number in rows]
    lines.append(
        f"{report['shards']:,} shards in {output}; each sample's outcome and error_message: <shard>.parquet"
    )
    return "\n".join(lines)


# what is asked for


def running_number(name):
    """A shard's number in its data set: 3 for 00000003.tar, 1003 for 01/00000003.tar; None: it has none."""
    *folders, stem = Path(name).with_suffix("").parts
    if len(folders) > 1 or not all(re.fullmatch(r"[0-9]+", part) for part in (*folders, stem)):
        return None
    return 1000 * int(folders[0] if folders else 0) + int(stem)


def choose(wanted, source):
    """The names of the shards that --shards asks for: A-B by their numbers, a brace pattern, or None for all."""
    held = source.shards()
    if not held:
        raise SystemExit(f"--input: no shards (*.tar) in {source.folder}")
    if wanted is None:
        names = held
    elif numbers := re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", wanted):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last:
            raise SystemExit(f"--shards {wanted}: the first is greater than the last")
        names = [
            name
            for name in held
            if (number := running_number(name)) is not None and first <= number <= last
        ]
        if len(names) < last - first + 1:
            raise SystemExit(
                f"--shards {wanted}: {len(names)} of these {last - first + 1} are in {source.folder}; get the others "
                "first, or ask for fewer"
            )
    else:
        names = expand(wanted)
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).suffix != ".tar":
            raise SystemExit(
                f"--shards: numbers A-B, or names of tars relative to the input's folder, not {name}"
            )
        if source.stamp(name) is None:
            raise SystemExit(f"{name} is not in {source.folder}")
    return names


def open_source(option, text, output):
    try:
        source = Source.parse(text)
    except SystemExit:
        raise SystemExit(
            f"{option} {text}: no such folder; scripts/download_datacompdr12m.sh gets it"
        ) from None
    if (
        output.resolve() == source.folder.resolve()
        or source.folder.resolve() in output.resolve().parents
    ):
        raise SystemExit(
            f"--output {output} is {option}'s folder or inside it; it needs a folder of its own"
        )
    return source


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option = parser.add_argument
    add_option("--input", required=True, metavar="DIR|PATTERN", help="shards with url.txt")
    add_option(
        "--reinforcements",
        metavar="DIR|PATTERN",
        help="shards whose json has the sha256; default: the input",
    )
    add_option("--output", type=Path, required=True, metavar="DIR")
    add_option(
        "--shards",
        metavar="A-B|PATTERN",
        help="by number (of DataCompDR-1B, 1003 is 01/00000003.tar) or brace pattern of names; default: all",
    )
    add_option("--no-verify-hash", action="store_true", help="keep changed images")
    add_option(
        "--processes", type=int, default=min(16, os.cpu_count() or 1), help="default %(default)s"
    )
    add_option(
        "--threads",
        type=int,
        default=128,
        help="downloads at a time in each process; default %(default)s",
    )
    add_option(
        "--timeout", type=int, default=10, help="seconds to wait for a server; default %(default)s"
    )
    add_option(
        "--retries",
        type=int,
        default=1,
        help="further tries for an address that failed; default %(default)s",
    )
    add_option(
        "--distributor",
        choices=["multiprocessing", "pyspark", "ray"],
        default="multiprocessing",
        help="img2dataset's; for pyspark and ray, every machine needs img2dataset and the output folder",
    )
    add_option(
        "--batch",
        type=int,
        help=f"shards in one run of img2dataset; default {SHARDS_PER_PROCESS} for each process",
    )
    args = parser.parse_args(arguments)
    args.batch = args.batch if args.batch is not None else SHARDS_PER_PROCESS * args.processes
    for option, least in (
        ("processes", 1),
        ("threads", 1),
        ("timeout", 1),
        ("retries", 0),
        ("batch", 1),
    ):
        if getattr(args, option) < least:
            parser.error(f"--{option} {getattr(args, option)}: at least {least}")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    needed = ["img2dataset", "pyarrow", *({"pyspark", "ray"} & {args.distributor})]
    if lacking := [module for module in needed if importlib.util.find_spec(module) is None]:
        raise SystemExit(
            f"no {lacking[0]} for {sys.executable}: '{sys.executable} -m pip install {lacking[0]}', or start "
            "scripts/download_images.sh, which makes an environment with img2dataset"
        )
    source = open_source("--input", args.input, args.output)
    reinforcements = None
    if args.reinforcements and not args.no_verify_hash:
        reinforcements = open_source("--reinforcements", args.reinforcements, args.output)
    names = choose(args.shards, source)
    if reinforcements and (
        absent := [name for name in names if reinforcements.stamp(name) is None]
    ):
        raise SystemExit(
            f"{len(absent)} of {len(names)} shards are not in {reinforcements.folder}, {absent[0]} for one: get them "
            "first, or keep changed images with --no-verify-hash"
        )

    args.output.mkdir(parents=True, exist_ok=True)
    report_on(args.output)  # ends here if the folder holds shards of others
    rescue(args.output)
    todo = [name for name in names if not is_finished(args.output, name)]
    with Progress(len(todo)) as bar:
        sources = {"source": source, "reinforcements": reinforcements}
        for start in range(0, len(todo), args.batch):
            run_batch(todo[start : start + args.batch], sources, args, bar)
    report = report_on(args.output)
    publish_json(
        args.output / "download_report.json",
        {"arguments": vars(args), **report, "failed": bar.failed},
    )
    print(table(report, args.output))
    if bar.failed:
        raise SystemExit(
            f"{len(bar.failed)} of {len(names)} shards failed, see above; run it again to try them again"
        )


if (
    __name__ == "__mp_main__"
):  # a process that multiprocessing started, for img2dataset or for the lists
    end_with_parent()
if __name__ == "__main__":
    if sys.argv[1:2] == ["--fetch"]:
        end_with_parent()
        fetch(json.loads(sys.argv[2]))
        sys.exit()
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run it again to go on") from None
    except OSError as error:
        raise SystemExit(str(error)) from None
