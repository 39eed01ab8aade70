"""Join captions, images and reinforcements, shard by shard, into the shards that training reads.

    python scripts/join_shards.py --source datasets/DataComp-12M --source datasets/DataComp-12M-images \\
        --source datasets/DataCompDR-12M-noimage --output datasets/DataCompDR-12M/shards --workers 8

A sample is the union of its members over the shards of one name, in whatever folders those are: 65 folders become 65
folders. Samples are matched by uid, see shard_members.py; members are named `<uid>.<extension>` in the output. Order:
as in the source that holds reinforcements, else as in the first one; samples unknown there follow at the end. Images
whose shards have other names or boundaries are an --unaligned-source: an index over them (shard_index.py, made by the
first run) finds each uid of the others; what else they hold is not looked at.

Order of the sources: captions, images, reinforcements. A member that two sources hold is written once. If the two
differ, the earlier source's is taken and the other counted by extension: so the captions are those of the caption
shards, and `json` is img2dataset's rather than the reinforcements' (which has uid and sha256 only): a count of
differing `json` is as it should be. --shards defaults to the names in the last source (that is not unaligned).

Left out and counted by reason: samples that lack image, caption or reinforcement (--require says which are needed),
that one source holds twice and differently, that have an unreadable json, a name with a folder, or a member that is not
a plain file (link, sparse). With --verify-hash also those whose image changed since its embeddings were computed.

A shard fails, with one line, when a source lacks it, when one of its tars is cut off or damaged, when nothing would be
left of it, or when it can't be written. The others go on; the exit status is then 1. A damaged unaligned shard is told
and does without: its samples count as having no image until it is mended, and the exit status is 1 likewise.

--embeddings bf16 rewrites float32 `npz` as `pth.gz`, as DataCompDR-12M-bf16 has them and training reads them: 89 KB in
the place of 222 for a sample of 36 x 1536 numbers, rounded to nearest even, by at most 0.4 % of each (benchmark_join.py
measures it, on random ones of unit norm). It decodes every npz: slow, and the only option that needs torch.

Several machines: --task-index and --task-count split the shards; the tasks may share one output folder and need no
contact. scripts/join_slurm.sh is an array of such tasks; --report puts their reports together.

Leaves in the output folder
    <shard>.tar         plain ustar; the same sources give the same bytes, whatever the number of workers and tasks
    sizes.json          {shard: samples}, in each folder of shards, as OpenCLIP's loader reads it
    join_report.json    counts by reason, bytes, time; of several tasks only with --report
    .joined/            from what each shard was made: a second run redoes only shards whose sources (size, time) or
                        settings have changed. Sources deleted since then don't matter. Also the tasks' reports, and the
                        index of unaligned sources.
A shard gets its name when it is complete and on disk; a run that was killed is run again, with the same result.
--recheck reads finished shards through: every byte is compared with what the sources give, or, where a source is gone,
the tar must be whole and hold as many samples as it should. What is damaged is joined again.

A process takes 30 MB, and 0.8 KB for each sample of a shard, however long its members are: 200 MB at 220,000 samples.

Leaves undone: decoding. That an image or an npz can be read is not looked at (but for --embeddings bf16).
"""

import argparse
import contextlib
import functools
import glob
import gzip
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand
from shard_index import UnalignedSource
from shard_members import (
    CHUNK,
    HEADER_BUFFER,
    IMAGES,
    ShardError,
    open_files,
    read_contents,
    read_json,
    same,
    scan,
)
from tqdm import tqdm

VERSION = 2  # of the bytes this script writes; raise it to have old shards joined again
GZIP_LEVEL = 1  # of bf16 embeddings; 9 saves 1 % more (benchmark_join.py)
BUFFER = (
    128 << 10
)  # bytes, as `cat` has; with 256 KB and more the kernel took twice the time or longer (ext4, Linux 6.18)
WRITE_BACK = 16 << 20  # bytes after which the disk is to begin with them

WHERE_FROM = {
    "image": "scripts/download_images.sh gets the images; give its output folder as a --source",
    "caption": "scripts/download_datacompdr12m.sh gets those of DataComp-12M",
    "reinforcement": "scripts/download_datacompdr12m.sh gets those of DataCompDR-12M, scripts/reinforce.py makes your "
    "own, and --require image,caption joins without",
}


def expand(pattern):
    try:
        return list(dict.fromkeys(braceexpand(pattern)))
    except ValueError as error:
        raise SystemExit(f"{pattern} is no brace pattern: {error}") from None


class Source(NamedTuple):
    folder: Path
    names: frozenset | None  # the shards that a pattern allows; None: all in the folder

    @classmethod
    def parse(cls, text):
        """A folder, a tar, or a brace pattern of tars; names are relative to the folder before the first brace."""
        if Path(text).is_dir():
            return cls(Path(text), None)
        folder = Path(
            text.partition("{")[0].rpartition("/")[0] or ("/" if text.startswith("/") else ".")
        )
        if not folder.is_dir() or ("{" not in text and not Path(text).is_file()):
            raise SystemExit(f"--source {text}: no such folder")
        return cls(
            folder, frozenset(Path(path).relative_to(folder).as_posix() for path in expand(text))
        )

    def shards(self):
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*.tar"))
        visible = (
            path.as_posix()
            for path in found
            if not any(part.startswith(".") for part in path.parts)
        )
        return sorted(self.names) if self.names is not None else sorted(visible)

    def path(self, name):
        path = self.folder / name
        if (self.names is not None and name not in self.names) or not path.is_file():
            raise ShardError(f"not in the source {self.folder}")
        return path

    example = path  # a shard by which to tell what the source holds

    def stamp(self, name):
        """What a joined shard's record says of this source: size and time; None: it isn't there (any more)."""
        path = self.folder / name
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None

    def contents(self, name):
        with open(str(self.path(name)), "rb", buffering=HEADER_BUFFER) as file:
            return read_contents(file)


def parts_of(extensions):
    """Which of the things that training needs are there."""
    there = {
        "image": not extensions.isdisjoint(IMAGES),
        "caption": "txt" in extensions,
        "reinforcement": {"syn.json", "paug.json"} <= extensions
        and not extensions.isdisjoint({"npz", "pth.gz"}),
    }
    return {part for part in there if there[part]}


# joining


def gather(name, sources):
    """The Contents of all sources for a shard; unaligned ones are asked for the uids of the others."""
    held = [source.contents(name) if isinstance(source, Source) else None for source in sources]
    uids = list(
        dict.fromkeys(chain.from_iterable(contents.samples for contents in held if contents))
    )
    return [contents or source.find(uids) for source, contents in zip(sources, held, strict=True)]


def changed(uid, sources):
    """Whether the downloaded image is not the one that was embedded; None: one of the two hashes isn't there."""

    def sha256_beside(extensions):
        held = (source.samples.get(uid, {}) for source in sources)
        members = next((sample for sample in held if not sample.keys().isdisjoint(extensions)), {})
        return read_json(members["json"]).get("sha256") if "json" in members else None

    downloaded, embedded = sha256_beside(IMAGES), sha256_beside(["syn.json"])
    if not isinstance(downloaded, str) or not isinstance(embedded, str):
        return None
    return downloaded.lower() != embedded.lower()


def new_counts():
    return {"left_out": Counter(), "first": {}, "differing": Counter(), "unverified": 0}


def leave_out(uid, reason, counts):
    counts["left_out"][reason] += 1
    counts["first"].setdefault(reason, uid)


def union(sources, settings, counts):
    """Yield ``(uid, {extension: Span})`` of the samples to write, from the sources' Contents.

    ``counts`` takes up what was left out, and why, and which duplicates differed.
    """
    leader = next(
        (s for s in sources if any("paug.json" in members for members in s.samples.values())),
        sources[0],
    )
    for uid in dict.fromkeys(chain(leader.samples, *(source.samples for source in sources))):
        held = [source.samples[uid] for source in sources if uid in source.samples]
        members = {
            extension: span for sample in reversed(held) for extension, span in sample.items()
        }
        refused = next((source.refused[uid] for source in sources if uid in source.refused), None)
        missing = [part for part in settings["require"] if part not in parts_of(members.keys())]
        unlike = changed(uid, sources) if settings["verify_hash"] and not missing else False
        if refused or missing or unlike:
            lack = "no " + ", no ".join(missing) if missing else None
            leave_out(uid, refused or lack or "a changed image (sha256)", counts)
            continue
        counts["unverified"] += unlike is None
        for sample in held:
            counts["differing"].update(
                e for e, span in sample.items() if not same(span, members[e])
            )
        yield uid, {extension: members[extension] for extension in chain.from_iterable(held)}


def as_bf16(samples, counts):
    """Put a ``pth.gz`` of bfloat16 into the place of each ``npz``; one that can't be read costs its sample."""
    import torch  # takes 200 MB and seconds

    from dr.sample import MAX_INFLATED, BadSample, embeddings

    for uid, members in samples:
        if "npz" in members:
            try:
                if members["npz"].size > MAX_INFLATED:
                    raise BadSample("oversized npz")
                stored = embeddings({"npz": members["npz"].read()})
            except BadSample as error:
                leave_out(uid, error.reason, counts)
                continue
            stream = io.BytesIO()
            torch.save({name: tensor.bfloat16() for name, tensor in stored.items()}, stream)
            narrow = gzip.compress(stream.getvalue(), GZIP_LEVEL, mtime=0)
            # the npz is what training would have read of the two
            members = {
                extension: span for extension, span in members.items() if extension != "pth.gz"
            }
            members = {
                ("pth.gz" if e == "npz" else e): (narrow if e == "npz" else span)
                for e, span in members.items()
            }
        yield uid, members


def samples_of(sources, settings, counts):
    samples = union(sources, settings, counts)
    return as_bf16(samples, counts) if settings["embeddings"] == "bf16" else samples


class Comparison:
    """Takes what would be written to a file, and compares it with what is there."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        at = self.file.tell()
        if self.file.read(len(data)) != data:
            raise ShardError(f"differs from what its sources give, near byte {at}")


class TarWriter:
    """Puts a tar together in one buffer, from headers and the sources' bytes, and writes it out when it is full."""

    def __init__(self, out):
        self.out, self.buffer, self.filled, self.length, self.begun = (
            out,
            memoryview(bytearray(BUFFER)),
            0,
            0,
            0,
        )

    def flush(self):
        self.out.write(self.buffer[: self.filled])
        self.length += self.filled
        self.filled = 0
        if (
            self.length - self.begun >= WRITE_BACK
            and hasattr(os, "posix_fadvise")
            and hasattr(self.out, "fileno")
        ):
            with contextlib.suppress(
                OSError
            ):  # advice only: the disk is to begin now, not at the end
                os.posix_fadvise(
                    self.out.fileno(), self.begun, self.length - self.begun, os.POSIX_FADV_DONTNEED
                )
            self.begun = self.length

    def room(self, wanted):
        """A part of the buffer, ``wanted`` bytes long or less, to be filled with what comes next."""
        if self.filled == len(self.buffer):
            self.flush()
        part = self.buffer[self.filled : self.filled + wanted]
        self.filled += len(part)
        return part

    def add(self, data):
        while data:
            part = self.room(len(data))
            part[:], data = data[: len(part)], data[len(part) :]

    def copy(self, span):
        at, end = span.offset, span.offset + span.size
        while at < end:
            part = self.room(end - at)
            if os.preadv(open_files.descriptor(span.path), [part], at) != len(part):
                raise ShardError(f"{span.path} was cut off while it was read")
            at += len(part)


EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # a header: time and owner 0, mode 0644
EMPTY_SUM = int(EMPTY[148:154], 8) - sum(EMPTY[124:135])


def header(name, size):
    """As tarfile makes it, in a fifth of the time."""
    name, digits = name.encode("utf-8", "surrogateescape"), b"%011o" % size
    checksum = b"%06o" % (EMPTY_SUM + sum(name) + sum(digits))
    return b"".join(
        (name.ljust(100, b"\0"), EMPTY[100:124], digits, EMPTY[135:148], checksum, EMPTY[154:])
    )


def write_tar(out, samples):
    """Write samples, every member of one after the other, and return how many; nothing in it depends on the clock."""
    tar, written = TarWriter(out), 0
    for uid, members in samples:
        for extension, content in members.items():
            size = len(content) if isinstance(content, bytes) else content.size
            tar.add(header(f"{uid}.{extension}", size))
            tar.add(content) if isinstance(content, bytes) else tar.copy(content)
            tar.add(bytes(-size % tarfile.BLOCKSIZE))
        written += 1
    end = 2 * tarfile.BLOCKSIZE
    tar.add(bytes(end + -(tar.length + tar.filled + end) % tarfile.RECORDSIZE))
    tar.flush()
    return written


def publish(path, write):
    """Make ``path`` by ``write(file)`` under another name, and give it its name when it is complete and on disk."""
    partial = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        with open(partial, "xb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return result


def publish_json(path, content):
    publish(path, lambda file: file.write(json.dumps(content, indent=1, default=str).encode()))


def record_path(shard):
    return shard.parent / ".joined" / f"{shard.name}.json"


def finished(shard):
    """The record of a finished shard, or None."""
    try:
        record = json.loads(record_path(shard).read_text())
        return record if record["bytes"] == shard.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(name, shard, record, sources, settings):
    """What is wrong with a finished shard, or None; it is read through."""
    try:
        with open(str(shard), "rb", buffering=CHUNK) as file:
            if None not in [source.stamp(name) for source in sources]:
                write_tar(
                    Comparison(file), samples_of(gather(name, sources), settings, new_counts())
                )
            elif (found := len(read_contents(file).samples)) != record["samples"]:
                raise ShardError(f"holds {found} samples, not {record['samples']}")
    except (ShardError, OSError) as error:
        return f"damaged: {error}"
    return None


def join_shard(name, sources, output, settings, recheck):
    """Join the shards of one name, unless that is done already; return what came of it."""
    shard = output / name
    record = finished(shard)
    damaged = None
    try:
        stamps = [source.stamp(name) for source in sources]
        before = record["sources"] if record and record.get("settings") == settings else []
        if len(stamps) == len(before) and all(
            stamp in (None, old) for stamp, old in zip(stamps, before, strict=True)
        ):
            damaged = damage(name, shard, record, sources, settings) if recheck else None
            if not damaged:
                return {**record, "shard": name, "state": "already there"}

        contents, counts = gather(name, sources), new_counts()

        def write(file):
            written = write_tar(file, samples_of(contents, settings, counts))
            if not written:
                reasons = ", ".join(
                    f"{number} with {reason}" for reason, number in counts["left_out"].items()
                )
                raise ShardError(f"no sample would be left: {reasons or 'the sources are empty'}")
            record_path(shard).unlink(missing_ok=True)
            return written

        record_path(shard).parent.mkdir(parents=True, exist_ok=True)
        for path in (shard, record_path(shard)):
            for leftover in path.parent.glob(
                f".{glob.escape(path.name)}.*.partial"
            ):  # of a run that was killed
                leftover.unlink(missing_ok=True)
        samples = publish(shard, write)
        made = {
            "settings": settings,
            "sources": stamps,
            "bytes": shard.stat().st_size,
            "samples": samples,
            **counts,
        }
        publish_json(record_path(shard), made)
        return {**made, "shard": name, "state": "joined", "damaged": damaged}
    except Exception as error:  # whatever a damaged file makes tarfile say: the other shards go on
        known = isinstance(error, ShardError | OSError)
        line = f"{error if known else f'{type(error).__name__}: {error}'}"
        if damaged:
            line += f" (the shard joined earlier is still there, but {damaged})"
        elif finished(shard):
            line += " (the shard joined earlier, from other sources or settings, is still there)"
        return {"shard": name, "state": "failed", "error": line}
    finally:
        open_files.close()


def start_worker(function):
    """Keep the function, which is sent once, and end with the main process; a worker would wait for work forever."""
    global work
    work = function

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def do_work(item):
    return work(item)


def run_all(function, items, workers):
    """Yield the function's results as they come."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=(function,)
    ) as pool:
        interrupt = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # workers inherit it: Ctrl-C is for this process
        pending = as_completed(
            {pool.submit(do_work, item) for item in items}
        )  # nobody else keeps what has been told
        signal.signal(signal.SIGINT, interrupt)
        try:
            for future in pending:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def share(names, index, count):
    """A task's part: neighbours, so that it has few folders to do with."""
    return names[len(names) * index // count : len(names) * (index + 1) // count]


# telling


def absent(names, sources, require):
    """Which required parts none of the sources hold, judged by the first few shards. Stops as soon as it has seen all.

    So that a forgotten source is an error at once, not after all shards have been read in vain.
    """
    seen = set()
    for name in names[:8]:
        for source in sources:
            try:
                with open(source.example(name), "rb", buffering=HEADER_BUFFER) as file:
                    for member, *_ in scan(file):
                        seen.add(member.partition(".")[2].lower())
                        if parts_of(seen) >= set(require):
                            return []
            except (OSError, ShardError):
                return []  # it can't be told; joining says what is wrong with the shard
    return [part for part in require if part not in parts_of(seen)]


def write_sizes(folders):
    """Write sizes.json next to the shards: all finished ones that are there, also those of other runs and tasks."""

    def sizes_in(folder):
        shards = sorted(
            folder / path.name.removesuffix(".json") for path in folder.glob(".joined/*.tar.json")
        )
        return {shard.name: record["samples"] for shard in shards if (record := finished(shard))}

    for folder in sorted(folders):
        written = None
        # looked at again when it is written: of several tasks, the last one to write has seen every shard
        while (sizes := sizes_in(folder)) != written and (
            sizes or (folder / "sizes.json").exists()
        ):
            publish_json(folder / "sizes.json", sizes)
            written = sizes


def new_report():
    return {
        "shards": Counter(),
        "samples": 0,
        "bytes": 0,
        "bytes_joined_now": 0,
        **{name: count for name, count in new_counts().items() if name != "first"},
        "seconds": 0,
        "failed": {},
        "unusable": {},
    }


def add(report, other):
    """Add a report to another, or a shard's record, which has some of its fields."""
    for name, total in report.items():
        if name == "seconds":
            report[name] = max(total, other.get(name, 0))  # tasks run side by side
        elif isinstance(total, dict):
            total.update(other.get(name, {}))  # a Counter adds
        else:
            report[name] += other.get(name, 0)


def task_report(output, index, count):
    """Where a task leaves its report."""
    return output / (f".joined/report-{index}-of-{count}.json" if count > 1 else "join_report.json")


def merged_report(output):
    """The reports of the tasks together; also makes sizes.json complete."""
    paths = sorted(output.glob(".joined/report-*-of-*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise SystemExit(f"no task has left a report in {output / '.joined'}")
    count = int(paths[-1].stem.rpartition("-")[2])  # the number of tasks of the last run
    report, lacking = new_report(), []
    for path in (task_report(output, index, count) for index in range(count)):
        add(report, json.loads(path.read_text())) if path.exists() else lacking.append(path.stem)
    write_sizes({path.parent.parent for path in output.rglob(".joined/*.tar.json")})
    return {"tasks": count, "without_report": lacking, **report}


def table(report):
    """The report for people."""
    rows = [("samples joined", report["samples"])]
    rows += [(f"left out: {reason}", number) for reason, number in report["left_out"].most_common()]
    rows += [
        (f"in two sources, differing: {name}", number)
        for name, number in report["differing"].most_common()
    ]
    rows += (
        [("kept without a sha256 to compare", report["unverified"])] if report["unverified"] else []
    )
    rows += [
        (f"shards {state}", number)
        for state, number in sorted(report["shards"].items(), reverse=True)
    ]
    rows += (
        [("unaligned shards that can't be read", len(report["unusable"]))]
        if report["unusable"]
        else []
    )
    width = max(len(label) for label, _ in rows)
    speed = report["bytes_joined_now"] / 1e9 / max(report["seconds"], 1e-9)
    lines = [f"{label:<{width}}  {number:>13,}" for label, number in rows]
    return "\n".join(
        [*lines, f"{report['bytes'] / 1e9:.2f} GB, {report['seconds']:.0f} s, {speed:.2f} GB/s"]
    )


def conclude(report):
    """End with what is to be said of a run that didn't bring all shards through."""
    if report.get("without_report"):
        raise SystemExit(
            f"no report of {', '.join(report['without_report'])}: not finished, or killed; run it again"
        )
    if number := len(report["failed"]):
        raise SystemExit(
            f"{number} of {sum(report['shards'].values())} shards failed; join_report.json says why"
        )
    if number := len(report["unusable"]):
        raise SystemExit(f"{number} unaligned shards can't be read; their samples are missing")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option, slurm = parser.add_argument, os.environ.get
    for option, kind, told in (
        ("--source", "aligned", "'images/{00000000..00001023}.tar'; once for each source"),
        (
            "--unaligned-source",
            "unaligned",
            "this, its shards having other names or boundaries than the others'",
        ),
    ):
        add_option(
            option,
            dest="sources",
            action="append",
            type=lambda text, kind=kind: (text, kind),
            metavar="DIR|PATTERN",
            help=f"a folder of shards, or a brace pattern as {told}",
        )
    add_option("--output", type=Path, required=True, metavar="DIR")
    add_option(
        "--shards",
        metavar="PATTERN",
        help="brace pattern of names; default: those in the last source",
    )
    add_option(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes; default %(default)s",
    )
    needed = parser.add_mutually_exclusive_group()
    needed.add_argument(
        "--require",
        default="image,caption,reinforcement",
        metavar="LIST",
        help="what a sample must have, by commas; default %(default)s",
    )
    needed.add_argument("--keep-incomplete", action="store_true", help="require nothing")
    add_option(
        "--verify-hash",
        action="store_true",
        help="leave out samples whose sha256 in img2dataset's json is not the one in the reinforcement's json",
    )
    add_option(
        "--embeddings",
        choices=["bf16"],
        help="rewrite npz as pth.gz in bfloat16; default: as they came",
    )
    add_option(
        "--recheck",
        action="store_true",
        help="read finished shards through, and join damaged ones again",
    )
    add_option(
        "--index-only",
        action="store_true",
        help="only bring the index of unaligned sources up to date",
    )
    first, task = int(slurm("SLURM_ARRAY_TASK_MIN", 0)), int(slurm("SLURM_ARRAY_TASK_ID", 0))
    add_option(
        "--task-index",
        type=int,
        default=task - first,
        metavar="I",
        help="0 … N-1; default: Slurm's, or 0",
    )
    count = int(slurm("SLURM_ARRAY_TASK_COUNT", 1))
    add_option("--task-count", type=int, default=count, metavar="N", help="default: Slurm's, or 1")
    add_option(
        "--report", action="store_true", help="join nothing; put the tasks' reports together"
    )
    args = parser.parse_args(arguments)
    args.require = (
        [] if args.keep_incomplete else [part.strip() for part in args.require.split(",")]
    )
    if unknown := set(args.require) - WHERE_FROM.keys():
        parser.error(f"--require {','.join(sorted(unknown))}: give some of {','.join(WHERE_FROM)}")
    if args.workers < 1:
        parser.error("--workers: at least 1")
    if not 0 <= args.task_index < args.task_count:
        parser.error(
            f"--task-index {args.task_index} --task-count {args.task_count}: the index is one of 0 … count - 1"
        )
    if not args.report and "aligned" not in [kind for _, kind in args.sources or ()]:
        parser.error("--source: at least one, whose shards have the names that the output gets")
    return args


def open_sources(args):
    """The sources, with an index for those that are not aligned."""
    sources = [Source.parse(text) for text, _ in args.sources]
    for source in sources:
        inside = [
            args.output.resolve(),
            *(args.output.resolve().parents if source.names is None else ()),
        ]
        if source.folder.resolve() in inside:
            raise SystemExit(
                f"--output {args.output} is a source or inside one; it needs a folder of its own"
            )

    def scan_all(function, paths):
        results = run_all(function, paths, args.workers)
        return tqdm(results, desc="index of unaligned shards", total=len(paths), unit=" shards")

    for position, (_, kind) in enumerate(args.sources):
        if kind == "unaligned":
            sources[position] = UnalignedSource.open(sources[position], args.output, scan_all)
    return sources


def join_all(names, sources, args, report):
    """Join the shards, telling about it; adds to the report."""
    start = time.monotonic()
    settings = {
        "version": VERSION,
        "require": args.require,
        "verify_hash": args.verify_hash,
        "embeddings": args.embeddings,
    }
    join = functools.partial(
        join_shard, sources=sources, output=args.output, settings=settings, recheck=args.recheck
    )
    aligned = [source for source in sources if isinstance(source, Source)]
    size = {name: sum((source.stamp(name) or [0])[0] for source in aligned) for name in names}
    task = f"task {args.task_index} of {args.task_count}" if args.task_count > 1 else None
    with tqdm(total=sum(size.values()), desc=task, unit="B", unit_scale=True, smoothing=0) as bar:
        for done, result in enumerate(run_all(join, names, args.workers), 1):
            name, state = result["shard"], result["state"]
            add(report, {**result, "shards": {state: 1}})
            if state == "failed":
                report["failed"][name] = result["error"]
                bar.write(f"{name}: failed: {result['error']}", file=sys.stderr)
            if state == "joined":
                report["bytes_joined_now"] += result["bytes"]
                if result["damaged"]:
                    bar.write(f"{name}: joined again, it was {result['damaged']}", file=sys.stderr)
                for reason, uid in result["first"].items():
                    if not reason.startswith("no "):
                        number = result["left_out"][reason]
                        bar.write(
                            f"{name}: {number} left out for {reason}, first {uid}", file=sys.stderr
                        )
                bar.update(size[name])
            else:
                bar.total -= size[
                    name
                ]  # so that the time left is that of the shards that take time
            bar.set_postfix_str(f"{done} of {len(names)} shards")
    report["seconds"] = round(time.monotonic() - start, 2)
    report["failed"] = dict(sorted(report["failed"].items()))


def main(arguments=None):
    args = parse_arguments(arguments)
    if args.report:
        report = merged_report(args.output)
        publish_json(args.output / "join_report.json", report)
        print(table(report))
        conclude(report)
        return

    sources = open_sources(args)
    report = new_report()
    for source in sources:
        for shard, fault in source.faults().items() if isinstance(source, UnalignedSource) else ():
            report["unusable"][str(source.folder / shard)] = fault
            print(f"goes without the unaligned {shard}: {fault}", file=sys.stderr)
    if args.index_only:
        conclude(report)
        return
    aligned = [source for source in sources if isinstance(source, Source)]
    names = expand(args.shards) if args.shards else aligned[-1].shards()
    if not names:
        raise SystemExit(
            f"no shards (*.tar) in {aligned[-1].folder}, the last --source; name them with --shards"
        )
    if bad := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise SystemExit(
            f"--shards: names relative to the sources' folders, without '..', not {bad[0]}"
        )
    if missing := absent(names, sources, args.require):
        raise SystemExit(
            "\n".join(f"no source holds a sample's {part}: {WHERE_FROM[part]}" for part in missing)
        )

    args.output.mkdir(parents=True, exist_ok=True)
    reported = task_report(args.output, args.task_index, args.task_count)
    reported.parent.mkdir(exist_ok=True)
    reported.unlink(missing_ok=True)  # that of an earlier run
    names = share(names, args.task_index, args.task_count)
    join_all(names, sources, args, report)
    print(table(report))
    write_sizes({(args.output / name).parent for name in names})
    publish_json(reported, {"arguments": vars(args), **report})
    conclude(report)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run it again to go on") from None
    except BrokenProcessPool:
        raise SystemExit(
            "a worker was killed, short of memory perhaps; run it again, with fewer --workers"
        ) from None
    except OSError as error:
        raise SystemExit(str(error)) from None
