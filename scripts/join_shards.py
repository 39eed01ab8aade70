"""Join captions, images and reinforcements, shard by shard, into the shards that training reads.

    python scripts/join_shards.py --source datasets/DataComp-12M --source datasets/DataComp-12M-images \\
        --source datasets/DataCompDR-12M-noimage --output datasets/DataCompDR-12M/shards --workers 8

A sample is the union of its members over the shards of one name. Samples are matched by uid: the `uid` in `<key>.json`
where there is one (img2dataset's keys are running numbers), else the key, the file name up to its first dot; members
are named `<uid>.<extension>` in the output. Order: as in the source that holds reinforcements, else as in the first
one; samples unknown there follow at the end.

Order of the sources: captions, images, reinforcements. A member that two sources hold is written once. If the two
differ, the earlier source's is taken and the other counted by extension: so the captions are those of the caption
shards, and `json` is img2dataset's rather than the reinforcements' (which has uid and sha256 only): a count of
differing `json` is as it should be. --shards defaults to the names in the last source.

Left out and counted by reason: samples that lack image, caption or reinforcement (--require says which are needed),
that one source holds twice and differently, that have an unreadable json, a name with a folder, or a member that is not
a plain file (link, sparse). With --verify-hash also those whose image changed since its embeddings were computed.

A shard fails, with one line, when a source lacks it, when one of its tars is cut off or damaged, when nothing would be
left of it, or when it can't be written. The others go on; the exit status is then 1.

Leaves in the output folder
    <shard>.tar         plain ustar; the same sources give the same bytes, whatever the number of workers
    sizes.json          {shard: samples}, in each folder of shards, as OpenCLIP's loader reads it
    join_report.json    counts by reason, bytes, time
    .joined/            from what each shard was made: a second run redoes only shards whose sources (by size) or
                        settings have changed. Sources deleted since then don't matter.
A shard gets its name when it is complete and on disk; a run that was killed is run again, with the same result.

Leaves undone: decoding. That an image or an npz can be read is not looked at. Image shards under other names or with
other boundaries than the reinforcements' cannot be joined.
"""

import argparse
import errno
import glob
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand
from tqdm import tqdm

VERSION = 1  # of the bytes this script writes; raise it to have old shards joined again
JSON_LIMIT = 10_000_000  # bytes; a larger <key>.json is refused, not read
TAIL_LIMIT = 1 << 20  # bytes of zeros that may follow a tar's last member: some tools pad this far
COPY_FROM = 64 << 10  # bytes; from this size on a system call without a copy through Python pays
CHUNK = 1 << 20
NAME_LIMIT = 100  # bytes in a plain ustar header
SIZE_LIMIT = 8**11  # likewise
# what copy_file_range says of files or systems that it doesn't serve
NOT_COPYABLE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ETXTBSY}

IMAGES = ("jpg", "jpeg", "png", "webp")
WHERE_FROM = {
    "image": "scripts/download_images.sh gets the images; give its output folder as a --source",
    "caption": "scripts/download_datacompdr12m.sh gets those of DataComp-12M",
    "reinforcement": "scripts/download_datacompdr12m.sh gets those of DataCompDR-12M, scripts/reinforce.py makes your "
    "own, and --require image,caption joins without",
}


class ShardError(Exception):
    """Why a shard can't be joined, for people."""


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
        folder = Path(text.partition("{")[0].rpartition("/")[0] or ("/" if text.startswith("/") else "."))
        if not folder.is_dir() or ("{" not in text and not Path(text).is_file()):
            raise SystemExit(f"--source {text}: no such folder")
        return cls(folder, frozenset(Path(path).relative_to(folder).as_posix() for path in expand(text)))

    def shards(self):
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*.tar"))
        visible = (path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
        return sorted(self.names) if self.names is not None else sorted(visible)

    def path(self, name):
        path = self.folder / name
        if (self.names is not None and name not in self.names) or not path.is_file():
            raise ShardError(f"not in the source {self.folder}")
        return path


class Span(NamedTuple):
    """A member's bytes in its shard."""

    file: int  # descriptor
    offset: int
    size: int

    def chunks(self):
        for at in range(0, self.size, CHUNK):
            length = min(CHUNK, self.size - at)
            data = os.pread(self.file, length, self.offset + at)
            if len(data) != length:
                raise ShardError("a source was cut off while it was read")
            yield data


class Contents(NamedTuple):
    """What one source's shard holds, by uid."""

    samples: dict  # uid -> {extension: Span}
    refused: dict  # uid -> why this sample can't be used
    sha256: dict  # uid -> what its json says


def parts_of(extensions):
    """Which of the things that training needs are there."""
    there = {
        "image": not extensions.isdisjoint(IMAGES),
        "caption": "txt" in extensions,
        "reinforcement": {"syn.json", "paug.json"} <= extensions and not extensions.isdisjoint({"npz", "pth.gz"}),
    }
    return {part for part in there if there[part]}


# reading


def scan(file):
    """Yield ``(name, Span, fault)`` of a tar's members, reading headers only; ``fault``: why it must not be used."""
    where = Path(file.name)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, the caller closes the file
        while info := tar.next():
            tar.members.clear()  # tarfile keeps every header otherwise
            name, fault = info.name.removeprefix("./"), None
            if info.size < 0:  # tarfile would go backwards, for ever
                raise ShardError(f"{where} is not a whole tar: a member of negative size, at byte {info.offset}")
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                fault = "a member that is not a plain file"
            elif re.search(r"[/\\\x00-\x1f]", name):
                fault = "a member name with a folder or control character"
            elif info.size >= SIZE_LIMIT:
                fault = "a member of 8 GiB or more"
            yield name, Span(file.fileno(), info.offset_data, info.size), fault
    except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:
        raise ShardError(f"{where} is not a whole tar: {error}") from error
    # tarfile takes a cut between two members, or rubbish for a header, for the end
    file.seek(tar.offset)
    tail = file.read(TAIL_LIMIT + 1)
    if len(tail) < tarfile.BLOCKSIZE:
        raise ShardError(f"{where} is not a whole tar: cut off at byte {tar.offset}, no end mark")
    if len(tail) > TAIL_LIMIT or tail.strip(b"\0"):
        raise ShardError(f"{where} is not a whole tar: damaged, or several in one file, at byte {tar.offset}")


def read_json(span):
    if span.size > JSON_LIMIT:
        raise ValueError
    about = json.loads(b"".join(span.chunks()))
    return about if isinstance(about, dict) else {}


def index(file):
    """The :class:`Contents` of a shard."""
    by_key, faults = {}, {}
    for name, span, fault in scan(file):
        key, _, extension = re.split(r"[/\\]", name)[-1].partition(".")
        if not key or not extension:
            continue  # not part of a sample for WebDataset either
        members = by_key.setdefault(key, {})
        extension = sys.intern(extension.lower())  # as WebDataset reads it
        if extension in members and not fault and not same(members[extension], span):
            fault = "two different members of one name in one source"
        if fault:
            faults.setdefault(key, fault)
        else:
            members.setdefault(extension, span)

    contents = Contents({}, {}, {})
    for key, members in by_key.items():
        uid, fault, about = key, faults.get(key), {}
        if "json" in members:
            try:
                about = read_json(members["json"])
                uid = about.get("uid", key)
            except (ValueError, RecursionError):
                fault = fault or "an unreadable json"
        if not isinstance(uid, str) or not re.fullmatch(r"[^./\\\x00-\x1f\ud800-\udfff]+", uid):
            uid, fault = key, "a uid that can't be a file name"
        if uid in contents.samples:
            fault = "a uid twice in one source"
        if any(len(os.fsencode(f"{uid}.{extension}")) > NAME_LIMIT for extension in members):
            fault = f"a name of over {NAME_LIMIT} bytes"
        if str(about.get("status")).startswith("failed"):  # img2dataset's failed_to_download, failed_to_resize
            members = {extension: span for extension, span in members.items() if extension not in IMAGES}
        contents.samples[uid] = members
        contents.sha256[uid] = about.get("sha256")
        if fault:
            contents.refused.setdefault(uid, fault)
    return contents


def same(a, b):
    return a == b or (a.size == b.size and all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True)))


# joining


def changed(uid, sources):
    """Whether the downloaded image is not the one that was embedded; None: one of the two hashes isn't there."""

    def sha256_beside(extensions):
        beside = (s.sha256[uid] for s in sources if not s.samples.get(uid, {}).keys().isdisjoint(extensions))
        return next(beside, None)

    downloaded, embedded = sha256_beside(IMAGES), sha256_beside(["syn.json"])
    if not isinstance(downloaded, str) or not isinstance(embedded, str):
        return None
    return downloaded.lower() != embedded.lower()


def union(sources, require, verify_hash, counts):
    """Yield ``(uid, {extension: Span})`` of the samples to write, from the sources' :class:`Contents`.

    ``counts`` takes up what was left out, and why, and which duplicates differed.
    """
    leader = next((s for s in sources if any("paug.json" in members for members in s.samples.values())), sources[0])
    for uid in dict.fromkeys(chain(leader.samples, *(source.samples for source in sources))):
        held = [source.samples[uid] for source in sources if uid in source.samples]
        members = {extension: span for sample in reversed(held) for extension, span in sample.items()}
        refused = next((source.refused[uid] for source in sources if uid in source.refused), None)
        missing = [part for part in require if part not in parts_of(members.keys())]
        unlike = changed(uid, sources) if verify_hash and not missing else False
        if refused or missing or unlike:
            reason = refused or ("no " + ", no ".join(missing) if missing else "a changed image (sha256)")
            counts["left_out"][reason] += 1
            counts["first"].setdefault(reason, uid)
            continue
        counts["unverified"] += unlike is None
        for sample in held:
            counts["differing"].update(e for e, span in sample.items() if not same(span, members[e]))
        yield uid, {extension: members[extension] for extension in chain.from_iterable(held)}


def copy(span, out):
    """Append a span's bytes to the buffered file ``out``, inside the kernel if that can be."""
    offset, end = span.offset, span.offset + span.size
    if span.size >= COPY_FROM and hasattr(os, "copy_file_range"):
        out.flush()
        try:
            while offset < end and (copied := os.copy_file_range(span.file, out.fileno(), end - offset, offset)):
                offset += copied
        except OSError as error:
            if error.errno not in NOT_COPYABLE:
                raise
    for data in Span(span.file, offset, end - offset).chunks():
        out.write(data)


def write_tar(out, samples):
    """Write samples, every member of one after the other, and return how many; nothing in it depends on the clock."""
    written = length = 0
    for uid, members in samples:
        for extension, span in members.items():
            info = tarfile.TarInfo(f"{uid}.{extension}")  # time and owner 0, mode 0644
            info.size = span.size
            out.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
            copy(span, out)
            out.write(bytes(-span.size % tarfile.BLOCKSIZE))
            length += tarfile.BLOCKSIZE + span.size + -span.size % tarfile.BLOCKSIZE
        written += 1
    end = 2 * tarfile.BLOCKSIZE
    out.write(bytes(end + -(length + end) % tarfile.RECORDSIZE))
    return written


def publish(path, write):
    """Make ``path`` by ``write(file)`` under another name, and give it its name when it is complete and on disk."""
    partial = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        with open(partial, "xb", buffering=CHUNK) as file:
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
    publish(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def record_path(shard):
    return shard.parent / ".joined" / f"{shard.name}.json"


def finished(shard):
    """The record of a finished shard, or None."""
    try:
        record = json.loads(record_path(shard).read_text())
        return record if record["bytes"] == shard.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def join_shard(name, sources, output, require, verify_hash):
    """Join the shards of one name, unless that is done already; return what came of it."""
    shard = output / name
    settings = {"version": VERSION, "require": list(require), "verify_hash": verify_hash}
    record = finished(shard)
    try:
        paths = [source.folder / name for source in sources]
        sizes = [path.stat().st_size if path.is_file() else None for path in paths]
        before = record["sources"] if record and record.get("settings") == settings else []
        if len(sizes) == len(before) and all(size in (None, old) for size, old in zip(sizes, before, strict=True)):
            return {**record, "shard": name, "state": "already there"}

        counts = {"left_out": Counter(), "first": {}, "differing": Counter(), "unverified": 0}
        with ExitStack() as stack:
            # a small buffer: every header is a read of its own, which by default is as long as the file system likes
            files = [stack.enter_context(open(source.path(name), "rb", buffering=8192)) for source in sources]
            contents = [index(file) for file in files]

            def write(file):
                written = write_tar(file, union(contents, require, verify_hash, counts))
                if not written:
                    reasons = ", ".join(f"{number} with {reason}" for reason, number in counts["left_out"].items())
                    raise ShardError(f"no sample would be left: {reasons or 'the sources are empty'}")
                record_path(shard).unlink(missing_ok=True)
                return written

            record_path(shard).parent.mkdir(parents=True, exist_ok=True)
            for path in (shard, record_path(shard)):
                for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # of a run that was killed
                    leftover.unlink(missing_ok=True)
            samples = publish(shard, write)
        made = {"settings": settings, "sources": sizes, "bytes": shard.stat().st_size, "samples": samples, **counts}
        publish_json(record_path(shard), made)
        return {**made, "shard": name, "state": "joined"}
    except Exception as error:  # whatever a damaged file makes tarfile say: the other shards go on
        known = isinstance(error, ShardError | OSError)
        line = f"{error if known else f'{type(error).__name__}: {error}'}"
        if finished(shard):
            line += " (the shard joined earlier, from other sources or settings, is still there)"
        return {"shard": name, "state": "failed", "error": line}


def follow_parent():
    """End this worker when the main process is killed; it would wait for work forever."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_all(names, workers, arguments):
    """Yield :func:`join_shard`'s results as they come."""
    if workers == 1:
        yield from (join_shard(name, *arguments) for name in names)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent) as pool:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is for this process
        futures = [pool.submit(join_shard, name, *arguments) for name in names]
        signal.signal(signal.SIGINT, interrupt)
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# telling


def absent(names, sources, require):
    """Which required parts none of the sources hold, judged by the first few shards. Stops as soon as it has seen all.

    So that a forgotten source is an error at once, not after all shards have been read in vain.
    """
    seen = set()
    for name in names[:8]:
        for source in sources:
            try:
                with open(source.path(name), "rb", buffering=8192) as file:
                    for member, _, _ in scan(file):
                        seen.add(member.partition(".")[2].lower())
                        if parts_of(seen) >= set(require):
                            return []
            except (OSError, ShardError):
                return []  # it can't be told; joining says what is wrong with the shard
    return [part for part in require if part not in parts_of(seen)]


def write_sizes(output, names):
    """Write sizes.json next to the shards: all finished ones that are there, also those of other runs."""
    for folder in sorted({(output / name).parent for name in names}):
        shards = sorted(folder / path.name.removesuffix(".json") for path in folder.glob(".joined/*.json"))
        sizes = {shard.name: record["samples"] for shard in shards if (record := finished(shard))}
        if sizes or (folder / "sizes.json").exists():
            publish_json(folder / "sizes.json", sizes)


def summary(results, seconds):
    """Counts over all shards, those joined earlier included."""
    total = {"samples": 0, "bytes": 0, "left_out": Counter(), "differing": Counter(), "unverified": 0}
    for result in results:
        for name in total if result["state"] != "failed" else ():
            total[name] += Counter(result[name]) if isinstance(total[name], Counter) else result[name]
    return {
        "shards": dict(Counter(result["state"] for result in results)),
        **total,
        "bytes_joined_now": sum(result["bytes"] for result in results if result["state"] == "joined"),
        "seconds": round(seconds, 2),
        "failed": {result["shard"]: result["error"] for result in results if result["state"] == "failed"},
    }


def table(report):
    """The report for people."""
    rows = [("samples joined", report["samples"])]
    rows += [(f"left out: {reason}", number) for reason, number in report["left_out"].most_common()]
    rows += [(f"in two sources, differing: {name}", number) for name, number in report["differing"].most_common()]
    rows += [("kept without a sha256 to compare", report["unverified"])] if report["unverified"] else []
    rows += [(f"shards {state}", number) for state, number in report["shards"].items()]
    width = max(len(label) for label, _ in rows)
    speed = report["bytes_joined_now"] / 1e9 / max(report["seconds"], 1e-9)
    lines = [f"{label:<{width}}  {number:>13,}" for label, number in rows]
    return "\n".join([*lines, f"{report['bytes'] / 1e9:.2f} GB, {report['seconds']:.0f} s, {speed:.2f} GB/s"])


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="DIR|PATTERN",
        help="a folder of shards, or a brace pattern as 'images/{00000000..00001023}.tar'; once for each source",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shards", metavar="PATTERN", help="brace pattern of names; default: those in the last source")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; default %(default)s"
    )
    needed = parser.add_mutually_exclusive_group()
    needed.add_argument(
        "--require",
        default="image,caption,reinforcement",
        metavar="LIST",
        help="what a sample must have, by commas; default %(default)s",
    )
    needed.add_argument("--keep-incomplete", action="store_true", help="require nothing")
    parser.add_argument(
        "--verify-hash",
        action="store_true",
        help="leave out samples whose sha256 in img2dataset's json is not the one in the reinforcement's json",
    )
    args = parser.parse_args(arguments)
    args.require = [] if args.keep_incomplete else [part.strip() for part in args.require.split(",")]
    if unknown := set(args.require) - WHERE_FROM.keys():
        parser.error(f"--require {','.join(sorted(unknown))}: give some of {','.join(WHERE_FROM)}")
    if args.workers < 1:
        parser.error("--workers: at least 1")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    sources = [Source.parse(text) for text in args.source]
    names = expand(args.shards) if args.shards else sources[-1].shards()
    if not names:
        raise SystemExit(f"no shards (*.tar) in {args.source[-1]}, the last --source; name them with --shards")
    if bad := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise SystemExit(f"--shards: names relative to the sources' folders, without '..', not {bad[0]}")
    for source in sources:
        inside = [args.output.resolve(), *(args.output.resolve().parents if source.names is None else ())]
        if source.folder.resolve() in inside:
            raise SystemExit(f"--output {args.output} is a source or inside one; it needs a folder of its own")
    if missing := absent(names, sources, args.require):
        raise SystemExit("\n".join(f"no source holds a sample's {part}: {WHERE_FROM[part]}" for part in missing))

    args.output.mkdir(parents=True, exist_ok=True)
    start, results, done = time.monotonic(), {}, 0
    joining = (sources, args.output, args.require, args.verify_hash)
    with tqdm(total=len(names), unit=" shards", smoothing=0) as bar:
        for result in run_all(names, min(args.workers, len(names)), joining):
            results[result["shard"]] = result
            if result["state"] == "failed":
                bar.write(f"{result['shard']}: failed: {result['error']}", file=sys.stderr)
            for reason, uid in result["first"].items() if result["state"] == "joined" else ():
                if not reason.startswith("no "):
                    number = result["left_out"][reason]
                    bar.write(f"{result['shard']}: {number} left out for {reason}, first {uid}", file=sys.stderr)
            done += result["bytes"] / 1e9 if result["state"] == "joined" else 0
            bar.set_postfix_str(f"{done:.2f} GB, {done / (time.monotonic() - start):.2f} GB/s", refresh=False)
            bar.update()
    results = [results[name] for name in names]
    write_sizes(args.output, names)
    report = summary(results, time.monotonic() - start)
    publish_json(args.output / "join_report.json", {"arguments": vars(args) | {"output": str(args.output)}, **report})
    print(table(report))
    if report["failed"]:
        raise SystemExit(f"{len(report['failed'])} of {len(names)} shards failed; the lines above say why")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run it again to go on") from None
    except BrokenProcessPool:
        raise SystemExit("a worker was killed, short of memory perhaps; run it again, with fewer --workers") from None
    except OSError as error:
        raise SystemExit(str(error)) from None
