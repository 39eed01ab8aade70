"""Join captions, images and reinforcements, shard by shard, into the shards that training reads.

    python scripts/join_shards.py --dataset dfndr12m
    python scripts/join_shards.py --source datasets/DataComp-12M \\
        --source datasets/DataComp-12M-images --source datasets/DataCompDR-12M-noimage \\
        --output datasets/DataCompDR-12M/shards --workers 8

--dataset takes the folders of a data set by its name below, as sources and output.

A joined shard contains, for each uid, the members from the shards of that name in all sources, as
`<uid>.<extension>`. Shards in subfolders keep their subfolder. The samples keep the order of the
source that contains reinforcements, otherwise of the first source; further samples follow at the
end. If image shards have other file names than the other shards, or are split at other samples,
give them as --unaligned-source: an index, built by the first run, finds each uid in them. Samples
that are only in an unaligned source are ignored.

Give captions, images, reinforcements, in this order. A member that two sources contain is written
once. If the two differ, the first source's member is written, and the report counts the other by
extension. The `json` members always differ: that of the reinforcements has only uid and sha256, and
img2dataset's has more fields. Several original captions of a sample (the list `texts` in a `json`)
are added to the `json` that is written. A caption (`txt`) or URL may be in any source.

These samples are skipped and counted by reason: samples without image, caption or reinforcements
(--require changes this), samples that one source contains twice with different contents, and
samples with an unreadable json, a name with a folder, or a member that is not a plain file. With
--verify-hash also samples whose image has changed since its embeddings were computed.

A shard fails, with an error message of one line, if a source does not have it, a tar is damaged or
cut off, all samples are skipped, or it cannot be written. The other shards are joined, and the exit
status is 1. A damaged unaligned shard is reported, its samples count as samples without image, and
the exit status is 1.

--embeddings bf16 rewrites float32 `npz`, and bfloat16 `pth.gz`, as `safetensors` in bfloat16: 111
KB instead of 222 KB for a sample of 36 x 1536 numbers, each rounded to nearest even, by at most
0.4 % (see the join benchmark). Of safetensors training can read single rows, of pth.gz it cannot.
The script then has to decode every npz or pth.gz, so this is slow, and it needs torch.

To use several machines, give each a --task-index and the same --task-count. They may write to one
output folder and do not communicate. scripts/join_slurm.sh runs such tasks as an array; --report
merges their reports.

Outputs
    <shard>.tar         plain ustar; the same bytes for any number of workers and tasks
    <shard>.tar.index   where its members are, for training; see dr/index.py
    sizes.json          {shard: samples}, in each folder of shards, as OpenCLIP's loader reads it
    join_report.json    counts by reason, bytes, time; with several tasks only after --report
    .joined/            records of the sources of each shard, reports of tasks, indexes

Run the script again at any time: only shards whose sources (size, time) or settings have changed
are joined again. The sources of finished shards can be deleted. A shard gets its name when it is
complete and on disk, so a killed run loses only unfinished shards. With --recheck the script reads
finished shards: it compares every byte with the sources; if a source was deleted, the tar must be
whole and contain the recorded number of samples. Damaged shards are joined again.

A process takes 30 MB, and 0.8 KB for each sample of a shard, whatever the sizes of the members.

The script does not check that images and embeddings can be decoded: scripts/verify_shards.py does.
"""

import argparse
import contextlib
import json
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from lib.datasets import DATASETS, add_dataset_option, describe_datasets
from lib.index import UnalignedSource
from lib.pool import run_all
from lib.publish import publish, publish_json, remove_leftovers
from lib.report import check_least, describe_error, format_table, printable, run_command
from lib.shards import (
    CHUNK,
    HEADER_BUFFER,
    Contents,
    ShardError,
    Source,
    Span,
    choose_shards,
    find_files,
    open_files,
    read_contents,
    read_json_object,
    strip_name,
)
from lib.tar_writer import has_index, write_index, write_tar
from lib.tasks import add_task_options, check_task, select_share
from tqdm import tqdm

from dr.tar import (
    IMAGE_MEMBERS,
    KNOWN_MEMBERS,
    REINFORCED_MEMBERS,
    SIZES,
    Unknown,
    merge_unknown,
    read_headers,
    split_name,
)

VERSION = 2  # of the bytes written; a higher one has finished shards joined again
REPORT = "join_report.json"
PARTS = {
    "image": "images (jpg, jpeg, png or webp)",
    "caption": "captions (txt)",
    "reinforcement": "reinforcements (syn.json, paug.json, and npz, safetensors or pth.gz)",
}
HOW_TO_GET = {
    "image": "scripts/download_images.sh downloads them; give its output folder as a --source",
    "caption": "scripts/download_datacompdr12m.sh downloads those of DataComp-12M",
    "reinforcement": "scripts/download_datacompdr12m.sh downloads those of DataCompDR-12M, "
    "scripts/reinforce.py makes your own, and --require image,caption joins without",
}

AnySource = Source | UnalignedSource
Members = dict[str, Span | bytes]
Record = dict[str, Any]  # of a joined shard, as it is stored in .joined


@dataclass
class Counts:
    """What happened to the samples of a shard. The names are those of the shard's record."""

    left_out: Counter[str] = field(default_factory=Counter)  # skipped samples by reason
    first: dict[str, str] = field(default_factory=dict)  # the first skipped uid by reason
    differing: Counter[str] = field(default_factory=Counter)  # members in two sources by extension
    unverified: int = 0  # samples without a sha256 to compare
    unknown: int = 0  # members with unknown extensions
    first_unknown: str = ""  # about the first of them

    def skip(self, uid: str, reason: str) -> None:
        self.left_out[reason] += 1
        self.first.setdefault(reason, uid)


def find_parts(extensions: Iterable[str]) -> set[str]:
    """Which of image, caption and reinforcement these members make up."""
    extensions = set(extensions)
    parts = {
        "image": not extensions.isdisjoint(IMAGE_MEMBERS),
        "caption": "txt" in extensions,
        "reinforcement": {"syn.json", "paug.json"} <= extensions
        and not extensions.isdisjoint(REINFORCED_MEMBERS["embeddings"]),
    }
    return {part for part, complete in parts.items() if complete}


# --- joining one shard ----------------------------------------------------------------------------
def has_changed(uid: str, contents: Sequence[Contents]) -> bool | None:
    """Whether the downloaded image is not the embedded one; None if a hash is missing."""

    def read_sha256(extensions: Iterable[str]) -> object:
        """The sha256 next to the first of these members."""
        samples = (source.samples.get(uid, {}) for source in contents)
        members = next((s for s in samples if not s.keys().isdisjoint(extensions)), {})
        return read_json_object(members["json"]).get("sha256") if "json" in members else None

    downloaded, embedded = read_sha256(IMAGE_MEMBERS), read_sha256(["syn.json"])
    if not isinstance(downloaded, str) or not isinstance(embedded, str):
        return None
    return downloaded.lower() != embedded.lower()


def add_texts(members: Members, found: Sequence[dict[str, Span]]) -> None:
    """Add the original captions in the ``json`` of a later source to that of the first.

    Row c of the embeddings belongs to entry c of ``texts``, so the join must not lose the list.
    """
    spans = [sample["json"] for sample in found if "json" in sample]
    if len(spans) < 2 or all(b'"texts"' not in span.read() for span in spans[1:]):
        return
    about, *others = (read_json_object(span) for span in spans)
    texts = [other["texts"] for other in others if "texts" in other]
    if texts and "texts" not in about:
        members["json"] = json.dumps({**about, "texts": texts[0]}).encode()


def unite_samples(
    contents: Sequence[Contents], settings: dict[str, Any], counts: Counts
) -> Iterator[tuple[str, Members]]:
    """Yield ``(uid, {extension: Span})`` of the samples to write, and count the others."""
    for source in contents:
        if source.unknown:
            counts.unknown += source.unknown.number
            counts.first_unknown = counts.first_unknown or str(source.unknown)
    leader = next(
        (c for c in contents if any("paug.json" in members for members in c.samples.values())),
        contents[0],
    )
    for uid in dict.fromkeys(chain(leader.samples, *(source.samples for source in contents))):
        found = [source.samples[uid] for source in contents if uid in source.samples]
        members: dict[str, Span] = {}
        for extension, span in chain.from_iterable(sample.items() for sample in found):
            members.setdefault(extension, span)
        refused = next((source.refused[uid] for source in contents if uid in source.refused), None)
        parts = find_parts(members)
        missing = [f"no {part}" for part in settings["require"] if part not in parts]
        if refused or missing:
            counts.skip(uid, refused or ", ".join(missing))
            continue
        changed = has_changed(uid, contents) if settings["verify_hash"] else False
        if changed:
            counts.skip(uid, "a changed image (sha256)")
            continue
        counts.unverified += changed is None
        for extension, span in chain.from_iterable(sample.items() for sample in found):
            if not span.has_same_bytes(members[extension]):
                counts.differing[extension] += 1
        united: Members = dict(members)
        add_texts(united, found)
        yield uid, united


def convert_to_bf16(
    samples: Iterable[tuple[str, Members]], counts: Counts
) -> Iterator[tuple[str, Members]]:
    """Replace embeddings by ``safetensors`` in bfloat16; skip samples whose embeddings cannot be
    read."""
    import safetensors.torch
    import torch  # takes 200 MB and seconds

    from dr.sample import MAX_INFLATED, BadSample, stored_embeddings

    for uid, members in samples:
        kinds = [name for name in REINFORCED_MEMBERS["embeddings"] if name in members]
        span = members[kinds[0]] if kinds else None
        if isinstance(span, Span) and kinds[0] != "safetensors":
            try:
                if span.size > MAX_INFLATED:
                    raise BadSample(f"oversized {kinds[0]}")
                stored = stored_embeddings({kinds[0]: span.read()})
            except BadSample as error:
                counts.skip(uid, error.reason)
                continue
            tensors = {
                name: array.clone() if torch.is_tensor(array) else torch.tensor(array)
                for name, array in stored.items()
            }
            arrays = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
            made = safetensors.torch.save(arrays)
            members = {
                "safetensors" if name == kinds[0] else name: made if name == kinds[0] else content
                for name, content in members.items()
                if name not in kinds[1:]  # training would not read these
            }
        yield uid, members


class Comparison:
    """An output that compares what would be written with what a file holds."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: memoryview) -> None:
        offset = self.file.tell()
        if self.file.read(len(data)) != data:
            raise ShardError(f"differs from what its sources give, near byte {offset}")


def index_shard(shard: Path) -> None:
    """Write a shard's index, if it can have one: not with members of over 256 MB, for example."""
    with contextlib.suppress(ShardError):
        write_index(shard)


def record_path(shard: Path) -> Path:
    return shard.parent / ".joined" / f"{shard.name}.json"


def read_record(shard: Path) -> Record | None:
    """The record of a finished shard; None if it is not finished."""
    try:
        record = json.loads(record_path(shard).read_text())
        return record if record["bytes"] == shard.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Join:
    """Joins the shards of a name.

    Attributes:
        sources: in the order of their precedence.
        output: folder of the joined shards.
        settings: what the bytes depend on besides the sources; part of each record.
        recheck: whether to read finished shards.
    """

    sources: Sequence[AnySource]
    output: Path
    settings: dict[str, Any]
    recheck: bool

    def __call__(self, name: str) -> dict[str, Any]:
        """Join a shard, unless that is done already.

        Returns:
            its record, ``shard``, ``state`` (joined, already there, failed), and ``error``.
        """
        shard, damage = self.output / name, None
        try:
            for source in self.sources:
                if isinstance(source, Source) and source.holds(name, shard):
                    raise ShardError(f"is itself the shard in the source {source.folder}")
            record = read_record(shard)
            if record and self._is_up_to_date(name, record):
                damage = self._find_damage(name, record) if self.recheck else None
                if not damage:
                    if not has_index(shard):
                        index_shard(shard)
                    return {**record, "shard": name, "state": "already there"}
            return {**self._write(name), "shard": name, "state": "joined", "damaged": damage}
        except Exception as error:  # whatever a damaged file causes: the other shards are joined
            line = describe_error(error)
            if damage:
                line += f" (the shard joined earlier is still there, but {damage})"
            elif read_record(shard):
                line += (
                    " (the shard joined earlier, from other sources or settings, is still there)"
                )
            return {"shard": name, "state": "failed", "error": line}
        finally:
            open_files.close()

    def _stamps(self, name: str) -> list[object]:
        return [source.stamp(name) for source in self.sources]

    def _is_up_to_date(self, name: str, record: Record) -> bool:
        """Whether settings and sources are those of the record; deleted sources do not matter."""
        if record.get("settings") != self.settings or len(record["sources"]) != len(self.sources):
            return False
        stamps = zip(self._stamps(name), record["sources"], strict=True)
        return all(stamp in (None, old) for stamp, old in stamps)

    def _samples(self, name: str, counts: Counts) -> Iterator[tuple[str, Members]]:
        """The samples to write. Unaligned sources are asked for the uids of the others."""
        found = {s: s.contents(name) for s in self.sources if isinstance(s, Source)}
        uids = dict.fromkeys(chain.from_iterable(contents.samples for contents in found.values()))
        contents = [
            source.find(uids) if isinstance(source, UnalignedSource) else found[source]
            for source in self.sources
        ]
        samples = unite_samples(contents, self.settings, counts)
        return convert_to_bf16(samples, counts) if self.settings["embeddings"] else samples

    def _find_damage(self, name: str, record: Record) -> str | None:
        """What is wrong with a finished shard, or None; reads it all."""
        try:
            with open(str(self.output / name), "rb", buffering=CHUNK) as file:
                if None not in self._stamps(name):
                    write_tar(Comparison(file), self._samples(name, Counts()))
                elif (found := len(read_contents(file).samples)) != record["samples"]:
                    raise ShardError(f"holds {found} samples, not {record['samples']}")
        except (ShardError, OSError) as error:
            return f"damaged: {error}"
        return None

    def _write(self, name: str) -> Record:
        """Write a joined shard and its record."""
        shard, counts = self.output / name, Counts()
        record, stamps = record_path(shard), self._stamps(name)

        def write(file: BinaryIO) -> int:
            written = write_tar(file, samples)
            if not written:
                reasons = (f"{number} with {why}" for why, number in counts.left_out.items())
                lost = ", ".join(reasons) or "the sources are empty"
                hint = f"; {counts.first_unknown}" if counts.first_unknown else ""
                raise ShardError(f"no sample would be left: {lost}{hint}")
            record.unlink(missing_ok=True)
            return written

        samples = self._samples(name, counts)
        remove_leftovers(shard)
        remove_leftovers(record)
        written = publish(shard, write)
        made = {
            "settings": self.settings,
            "sources": stamps,
            "bytes": shard.stat().st_size,
            "samples": written,
            **vars(counts),
        }
        publish_json(record, made)
        index_shard(shard)
        return made


# --- reports --------------------------------------------------------------------------------------
def write_sizes(folders: Iterable[Path]) -> None:
    """Write sizes.json of all finished shards in each folder, whatever run or task made them."""

    def read_sizes(folder: Path) -> dict[str, int]:
        names = sorted(path.name[: -len(".json")] for path in folder.glob(".joined/*.tar.json"))
        records = {name: read_record(folder / name) for name in names}
        return {name: record["samples"] for name, record in records.items() if record}

    for folder in sorted(folders):
        written = None
        # Read again after writing: of several tasks, the last to write has then seen every shard.
        while (sizes := read_sizes(folder)) != written and (sizes or (folder / SIZES).exists()):
            publish_json(folder / SIZES, sizes)
            written = sizes


def new_report() -> dict[str, Any]:
    return {
        "shards": Counter(),
        "samples": 0,
        "bytes": 0,
        "bytes_joined_now": 0,
        "left_out": Counter(),
        "differing": Counter(),
        "unverified": 0,
        "unknown": 0,
        "first_unknown": "",
        "seconds": 0,
        "failed": {},
        "unusable": {},
        "source_shards": {},
        "lacking_shards": {},
    }


def add_to_report(report: dict[str, Any], other: dict[str, Any]) -> None:
    """Add another report, or a shard's record, which has some of its fields."""
    for name, total in report.items():
        if name == "seconds":
            report[name] = max(total, other.get(name, 0))  # tasks run at the same time
        elif isinstance(total, dict):
            total.update(other.get(name, {}))  # a Counter adds
        elif isinstance(total, str):
            report[name] = total or other.get(name, "")
        else:
            report[name] += other.get(name, 0)


def report_path(output: Path, index: int, count: int) -> Path:
    """The report of a task."""
    return output / (f".joined/report-{index}-of-{count}.json" if count > 1 else REPORT)


def merge_reports(output: Path) -> dict[str, Any]:
    """The reports of all tasks as one; also completes sizes.json."""
    paths = sorted(output.glob(".joined/report-*-of-*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise SystemExit(f"no task has written a report in {output / '.joined'}")
    count = int(paths[-1].stem.rpartition("-")[2])  # the number of tasks of the last run
    report, missing = new_report(), []
    for path in (report_path(output, index, count) for index in range(count)):
        if path.exists():
            add_to_report(report, json.loads(path.read_text()))
        else:
            missing.append(path.stem)
    write_sizes({(output / name).parent for name in find_files(output, "")})
    return {"tasks": count, "without_report": missing, **report}


def format_report(report: dict[str, Any]) -> str:
    rows = [("samples joined", report["samples"])]
    rows += [(f"skipped: {why}", number) for why, number in report["left_out"].most_common()]
    for extension, number in report["differing"].most_common():
        rows.append((f"in two sources, differing: {printable(extension)}", number))
    if report["unverified"]:
        rows.append(("kept without a sha256 to compare", report["unverified"]))
    if report["unknown"]:
        rows.append(("members with unknown extensions", report["unknown"]))
    for state, number in sorted(report["shards"].items(), reverse=True):
        rows.append((f"shards {state}", number))
    for source, number in report["lacking_shards"].items():
        rows.append((f"shards that others have, not in {printable(source)}", number))
    if report["unusable"]:
        rows.append(("unaligned shards that can't be read", len(report["unusable"])))
    speed = report["bytes_joined_now"] / 1e9 / max(report["seconds"], 1e-9)
    size = f"{report['bytes'] / 1e9:.2f} GB, {report['seconds']:.0f} s, {speed:.2f} GB/s"
    return f"{format_table(rows)}\n{size}"


def exit_if_incomplete(report: dict[str, Any]) -> None:
    """Exit with status 1 and a line if a task, a shard or an unaligned shard is missing."""
    if missing := report.get("without_report"):
        raise SystemExit(
            f"no report of {', '.join(missing)}: not finished, or killed; run it again"
        )
    if failed := len(report["failed"]):
        total = sum(report["shards"].values())
        raise SystemExit(f"{failed} of {total} shards failed; {REPORT} lists the reasons")
    if unusable := len(report["unusable"]):
        raise SystemExit(f"{unusable} unaligned shards can't be read; their samples are missing")


# --- the command ----------------------------------------------------------------------------------
def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=describe_datasets("captions", "images", "reinforcements", "joined"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source: dict[str, Any] = {"dest": "sources", "action": "append", "metavar": "DIR|PATTERN"}
    text = "join the folders of this data set; any --source and --unaligned-source come after them"
    add_dataset_option(parser, text)
    text = "with --dataset: its image shards have other file names, or are split at other samples"
    add("--images-unaligned", action="store_true", help=text)
    text = (
        "folder of shards, or a pattern such as 'images/{0000..1023}.tar'; once for each source. "
        "The joined shards have the names of the last one"
    )
    add("--source", type=lambda text: (text, False), help=text, **source)
    text = "the same, if its shards have other file names, or are split at other samples"
    add("--unaligned-source", type=lambda text: (text, True), help=text, **source)
    text = "folder for the joined shards; default: that of --dataset"
    add("--output", type=Path, metavar="DIR", help=text)
    text = (
        "names of the shards to join, a pattern; default: all shards of the last --source, or with "
        "--dataset alone of its reinforcements"
    )
    add("--shards", metavar="PATTERN", help=text)
    cores, text = min(8, os.cpu_count() or 1), "processes; default: one for each core, up to 8"
    add("--workers", type=int, default=cores, help=text)
    needed = parser.add_mutually_exclusive_group()
    text, all_parts = "parts that a sample must have; default %(default)s", ",".join(HOW_TO_GET)
    needed.add_argument("--require", default=all_parts, metavar="LIST", help=text)
    text = "also join samples that lack required parts"
    needed.add_argument("--keep-incomplete", action="store_true", help=text)
    text = "skip samples whose image has another sha256 than the one that was embedded"
    add("--verify-hash", action="store_true", help=text)
    text = "rewrite npz and pth.gz as safetensors in bfloat16; default: copy"
    add("--embeddings", choices=["bf16"], help=text)
    add("--recheck", action="store_true", help="read finished shards, join damaged ones again")
    add("--index-only", action="store_true", help="only update the index of unaligned sources")
    add_task_options(parser)
    add("--report", action="store_true", help="only merge the reports of the tasks")
    args = parser.parse_args(arguments)
    args.require = [] if args.keep_incomplete else [p.strip() for p in args.require.split(",")]
    if unknown := set(args.require) - HOW_TO_GET.keys():
        parser.error(
            f"--require {','.join(sorted(unknown))}: expected some of {','.join(HOW_TO_GET)}"
        )
    check_least(parser, args, 1, "workers")
    check_task(parser, args)
    if args.dataset:
        args.output = args.output or DATASETS[args.dataset].joined.path()
    elif not args.output:
        parser.error("expected --dataset, or --source and --output")
    elif args.images_unaligned:
        parser.error("--images-unaligned: expected --dataset; or give an --unaligned-source")
    needs_source = not args.report and not args.dataset
    if needs_source and all(unaligned for _, unaligned in args.sources or ()):
        parser.error("--source: expected at least one, whose names of shards the output gets")
    return args


def list_sources(name: str, images_unaligned: bool) -> list[tuple[str, bool]]:
    """The folders of a data set, and whether each is unaligned, in the order of precedence.

    Raises:
        SystemExit: a folder does not exist.
    """
    dataset = DATASETS[name]
    # The first source's member is used: the captions must be those that were embedded.
    folders = [(dataset.captions, False), (dataset.images, images_unaligned)]
    folders += [(dataset.reinforcements, False)]
    found = [(folder.find(), unaligned) for folder, unaligned in reversed(folders)]
    return [(str(path), unaligned) for path, unaligned in reversed(found) if path]


def open_sources(args: argparse.Namespace) -> list[AnySource]:
    """The sources, with an index for those that are not aligned."""
    parsed = [Source.parse(text) for text, _ in args.sources]
    for source in parsed:
        source.check_output(args.output, "a source")
    return [
        UnalignedSource.open(source, args.output, args.workers) if unaligned else source
        for source, (_, unaligned) in zip(parsed, args.sources, strict=True)
    ]


def choose_names(args: argparse.Namespace, sources: Sequence[AnySource]) -> list[str]:
    """The names of the shards to join; exits with a line if there are none."""
    last = [source for source in sources if isinstance(source, Source)][-1]
    names = choose_shards(last, args.shards, "the last --source", args.output)
    advice = DATASETS[args.dataset].how_to_get() if args.dataset else {}
    check_parts(names, sources, args.require, HOW_TO_GET | advice)
    return names


def count_shards(
    args: argparse.Namespace, sources: Sequence[AnySource], names: Sequence[str]
) -> dict[str, Any]:
    """Print how many shards each source has, and which lack some that others have.

    Returns:
        ``source_shards`` and ``lacking_shards`` of the report: numbers by source.
    """
    found = [
        {name for name in source.shards() if source.stamp(name)}
        for source in (Source.parse(text) for text, _ in args.sources)
    ]
    texts = [text for text, _ in args.sources]
    counts, lacking = dict[str, int](), dict[str, int]()
    for text, shards in zip(texts, found, strict=True):
        counts[text] = len(shards)
        print(f"{len(shards):,} shards in {text}")
    aligned = [place for place, source in enumerate(sources) if isinstance(source, Source)]
    everywhere = set(names).union(*(found[place] for place in aligned if not args.shards))
    for place in aligned:
        if lacks := sorted(everywhere - found[place]):
            lacking[texts[place]] = len(lacks)
            print(
                f"{len(lacks):,} shards that others have are not in {texts[place]}, the first is "
                f"{printable(lacks[0])}"
            )
    if skipped := sorted(everywhere.difference(names)):
        print(
            f"{len(skipped):,} shards are not joined, because {texts[aligned[-1]]} lacks them, the "
            f"first is {printable(skipped[0])}"
        )
    sys.stdout.flush()
    return {"source_shards": counts, "lacking_shards": lacking}


def check_parts(
    names: Sequence[str],
    sources: Sequence[AnySource],
    require: Sequence[str],
    how_to_get: Mapping[str, str],
) -> None:
    """Exit with a line if no source contains a required part, judged by the first shards, so that a
    forgotten source is an error before all shards are read. Stops as soon as all parts were
    found."""
    extensions: set[str] = set()
    unknown: Unknown | None = None
    for name in names[:8]:
        for source in sources:
            try:
                with open(source.path(name), "rb", buffering=HEADER_BUFFER) as file:
                    for member in read_headers(file):
                        if found := split_name(strip_name(member.name)):
                            extensions.add(found[1])
                            if found[1] not in KNOWN_MEMBERS:
                                unknown = merge_unknown(unknown, Unknown(1, member.name))
                        if find_parts(extensions) >= set(require):
                            return
            except (OSError, ShardError, tarfile.TarError):
                return  # joining reports what is wrong with the shard
    if not extensions:
        return  # joining reports that the shards are empty
    missing = [part for part in require if part not in find_parts(extensions)]
    lines = [f"no source contains {PARTS[part]}: {how_to_get[part]}" for part in missing]
    if missing and unknown:
        lines.append(f"there are {printable(unknown, 1000)}")
    if lines:
        raise SystemExit("\n".join(lines))


def join_all(
    names: Sequence[str], join: Join, args: argparse.Namespace, report: dict[str, Any]
) -> None:
    """Join shards, show the progress, and add the results to the report."""
    aligned = [source for source in join.sources if isinstance(source, Source)]
    sizes = {name: sum((source.stamp(name) or [0])[0] for source in aligned) for name in names}
    start, explained = time.monotonic(), False
    task = f"task {args.task_index} of {args.task_count}" if args.task_count > 1 else None
    with tqdm(total=sum(sizes.values()), desc=task, unit="B", unit_scale=True, smoothing=0) as bar:
        for done, result in enumerate(run_all(join, names, args.workers), 1):
            name, state = result["shard"], result["state"]
            add_to_report(report, {**result, "shards": {state: 1}})
            if state == "joined":
                report["bytes_joined_now"] += result["bytes"]
                bar.update(sizes[name])
            else:  # the time left is then that of the shards that take time
                bar.total -= sizes[name]
            if state == "failed":
                report["failed"][name] = result["error"]
            for line in describe_result(result):
                bar.write(f"{name}: {line}", file=sys.stderr)
            if state == "joined" and result["first_unknown"] and not explained:
                explained = True  # the first of the run; the report has their number
                bar.write(f"{name}: {printable(result['first_unknown'], 1000)}", file=sys.stderr)
            bar.set_postfix_str(f"{done} of {len(names)} shards")
    report["seconds"] = round(time.monotonic() - start, 2)
    report["failed"] = dict(sorted(report["failed"].items()))


def describe_result(result: dict[str, Any]) -> Iterator[str]:
    """Lines about what a user should know of a shard, at most one for each reason."""
    if result["state"] == "failed":
        yield f"failed: {result['error']}"
    if result["state"] == "joined":
        if result["damaged"]:
            yield f"joined again, it was {result['damaged']}"
        for reason, uid in result["first"].items():
            if not reason.startswith("no "):
                number = result["left_out"][reason]
                yield f"{number} skipped for {reason}, first {printable(uid)}"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.report:
        report = merge_reports(args.output)
        publish_json(args.output / REPORT, report)
        print(format_report(report))
        exit_if_incomplete(report)
        return

    if args.dataset:
        own = list_sources(args.dataset, args.images_unaligned)
        args.sources = [*own, *(args.sources or ())]
    sources, report = open_sources(args), new_report()
    for source in sources:
        faults = source.faults() if isinstance(source, UnalignedSource) else {}
        for shard, fault in faults.items():
            report["unusable"][str(source.folder / shard)] = fault
            print(f"joining without the unaligned {shard}: {fault}", file=sys.stderr)
    if args.index_only:
        exit_if_incomplete(report)
        return
    names = choose_names(args, sources)
    report |= count_shards(args, sources, names)

    task_report = report_path(args.output, args.task_index, args.task_count)
    task_report.unlink(missing_ok=True)  # of an earlier run
    names = list(select_share(names, args.task_index, args.task_count))
    settings = {
        "version": VERSION,
        "require": args.require,
        "verify_hash": args.verify_hash,
        "embeddings": args.embeddings,
    }
    join = Join(sources, args.output, settings, args.recheck)
    join_all(names, join, args, report)
    print(format_report(report))
    write_sizes({(args.output / name).parent for name in names})
    publish_json(task_report, {"arguments": vars(args), **report})
    exit_if_incomplete(report)


if __name__ == "__main__":
    run_command(main)
