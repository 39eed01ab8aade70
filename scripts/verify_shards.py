"""Check whether training can use joined shards, before days of GPU time: all samples, or some.

    python scripts/verify_shards.py datasets/DataCompDR-12M/shards --workers 8
    python scripts/verify_shards.py --dataset dfndr12m --part 0.01
    python scripts/verify_shards.py 'DIR/{00000000..00001023}.tar' --part 0.01 --teachers

The script checks each sample with training's own code: required members, captions, augmentation
parameters, row counts and widths of embeddings. Each time training reads the sample, it uses one
augmentation and one caption of one list; the script checks all of them: that the image can be
decoded, that all crop boxes are inside it, that all embeddings are finite, and that each teacher's
block has unit length (to 1e-3; bfloat16: 1e-2). A list of single letters is bad, too. A bad sample
counts once, under the first problem found. Each shard must be a whole tar, and contain as many
samples as the sizes.json in its folder lists. With --part or --samples, all headers are read, but
only the contents of the chosen samples. The choice depends on --seed and the uid alone. Members
with unknown extensions are counted.

A table shows how much of the image the boxes of a sample cover together. Boxes for images of
another size cover too little, or exceed the image; if most do, the shards are not usable.

--teachers proves that images, parameters and embeddings belong together. It embeds some of the good
samples again, with all their stored augmentations and captions, with the teachers in float32, and
compares the results with the stored embeddings. The teachers are those of the config, or those
given with the option: `--teachers MODEL PRETRAINED MODEL PRETRAINED`, for example checkpoint files
if there is no network. The published teachers need a GPU.

The script prints a table. The last line says whether training can use the shards, and what to do.
The exit status is 0 if training can use them. It is 1 if the share of bad samples is above
--max-bad, a shard is damaged or lacks samples, crop boxes belong to images of another size, a
cosine is under --min-cosine, or nothing was read. The only file that is written is --report, all
results as JSON.

The script does not detect a uid in several shards, or captions that do not describe their image.
"""

import argparse
import hashlib
import heapq
import multiprocessing
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from lib.config import DEFAULT_CONFIG, ReinforcementConfig, read_config
from lib.crop_boxes import DIRECTIONS, CropBoxes, judge, merge_counts
from lib.datasets import DATASETS, add_dataset_option, describe_datasets
from lib.pool import run_all
from lib.publish import publish_json
from lib.report import check_least, printable, run_command
from lib.shards import (
    HEADER_BUFFER,
    ShardError,
    Span,
    expand_braces,
    find_files,
    open_files,
    read_json_object,
)
from PIL import Image
from tqdm import tqdm

from dr.sample import (
    IMAGE_MEMBERS,
    MAX_INFLATED,
    USED_MEMBERS,
    BadSample,
    augmentation_parameters,
    count_originals,
    decode_image,
    embeddings,
    first_member,
    original_captions,
    read_caption_lists,
    select,
    synthetic_captions,
)
from dr.sampling import RandomChoice
from dr.tar import SIZES, Members, Unknown, merge_unknown, read_sizes, sample_spans
from dr.transforms import Compose, compose_from_config

if TYPE_CHECKING:
    from lib.teachers import Teacher

UNIT_TOLERANCE = {torch.bfloat16: 1e-2}  # bfloat16 has 8 bits
DEFAULT_UNIT_TOLERANCE = 1e-3
CROPS = ("resize", "center_crop", "random_crop", "random_resized_crop")  # they move pixels
EMBED_AT_ONCE = 64  # augmented images
OTHER_CONFIG = "give the config that the set was made with (--config)"

# What to do about a reason, by its beginning.
ADVICE = {
    "lacks": "join again without --keep-incomplete: scripts/join_shards.py skips these samples",
    "crop box": "these images are not the ones that were embedded: join with --verify-hash, and "
    "download at the size that was used then",
    "undecodable": "download these images again, and join again",
    "one-letter": "syn_text was one string where a list of captions belongs: fix the captions, and "
    "reinforce again",
    "embedding width": f"{OTHER_CONFIG}, or --teacher-dimension",
    "a teacher's block": f"{OTHER_CONFIG}, or --teacher-dimension; if they are right, the "
    "reinforcements are damaged",
    "augmentation parameters": OTHER_CONFIG,
}
DEFAULT_ADVICE = "download the source shards of these samples again, and join again with --recheck"


class Sample(NamedTuple):
    """A sample of which only headers were read.

    Attributes:
        rank: 0 to 1, a function of seed and uid; samples are chosen in this order.
        position: in its shard.
        uid: its key.
        members: those that training uses, by extension.
        about: its json, in which a download may have recorded the size of the image.
    """

    rank: float
    position: int
    uid: str
    members: Members[Span]
    about: Span | None

    def read_about(self) -> dict[str, Any]:
        """The object in its json; empty if there is none."""
        try:
            return read_json_object(self.about) if self.about else {}
        except (ValueError, RecursionError):
            return {}


class Layout(NamedTuple):
    """What is stored with a sample.

    Attributes:
        augmentations: their number, A.
        originals: number of original captions, C.
        lists: number of synthetic captions of each list, by key.
        width: of an embedding, all teachers together.
        precision: of the embeddings.
    """

    augmentations: int
    originals: int
    lists: tuple[tuple[str, int], ...]
    width: int
    precision: str

    @property
    def synthetic(self) -> int:
        return sum(count for _, count in self.lists)

    def __str__(self) -> str:
        original = f"{self.originals} original and " if self.originals > 1 else ""
        lists = ", ".join(f"{count} under {key}" for key, count in self.lists)
        lists = f" ({lists})" if [key for key, _ in self.lists] != ["syn_text"] else ""
        return (
            f"{self.augmentations} augmentations, {original}{self.synthetic} synthetic "
            f"captions{lists}, embeddings {self.width} wide, {self.precision}"
        )

    def to_json(self, samples: int) -> dict[str, Any]:
        return {
            "augmentations": self.augmentations,
            "original_captions": self.originals,
            "synthetic_captions": self.synthetic,
            "lists": dict(self.lists),
            "width": self.width,
            "precision": self.precision,
            "samples": samples,
        }


# --- reading --------------------------------------------------------------------------------------
def list_samples(file: BinaryIO, seed: int) -> Iterator[Sample]:
    """The samples of a shard, grouped as training's reader groups them.

    Raises:
        tarfile.ReadError: the tar is damaged; the samples before the damage were yielded.
    """
    for position, (uid, members) in enumerate(sample_spans(file, whole=True)):
        digest = hashlib.sha256(f"{seed} {uid}".encode("utf-8", "surrogateescape")).digest()
        spans = Members(
            (extension, Span(file.name, member.offset, member.size))
            for extension, member in members.items()
            if extension in USED_MEMBERS
        )
        spans.unknown = members.unknown
        json = members.get("json")
        about = Span(file.name, json.offset, json.size) if json else None
        yield Sample(int.from_bytes(digest[:8], "big") / 2**64, position, uid, spans, about)


def read_sample(sample: Sample, shard: str) -> Members[Any]:
    """The members that training uses, with key and shard, as its reader gives them."""
    members = Members[Any](__key__=sample.uid, __url__=shard)
    members.unknown = sample.members.unknown
    for extension, span in sample.members.items():
        members[extension] = span.read()
    return members


def make_cheap_crops(config: dict[str, Any]) -> Compose:
    """The crops of an augmentation, to one pixel: they refuse the same boxes, at little cost."""
    crops = {name: {**config[name]} for name in CROPS if name in config}
    crops.get("random_crop", {}).pop("fill", None)  # may be a colour, and the image is grey
    if "random_resized_crop" in crops:
        crops["random_resized_crop"] |= {"size": 1, "interpolation": "nearest"}
    return compose_from_config(crops)


def check_sample(
    sample: dict[str, Any],
    compose: Compose,
    crops: Compose,
    dimensions: list[int],
    measure: Callable[[Image.Image, list[dict]], None],
) -> Layout:
    """Check all of a sample that can be checked without its teachers.

    Args:
        sample: its members by extension.
        compose: the augmentation of the stored parameters.
        crops: the same, by ``make_cheap_crops``.
        dimensions: D_k, the width of each teacher's block.
        measure: called with an image of the sample's size, and the parameters.

    Returns:
        its layout.

    Raises:
        BadSample: training could not use it, or something that it could sample from it.
    """
    select(sample, compose, RandomChoice(), width=sum(dimensions))  # training's own checks
    lists = read_caption_lists(sample)
    for key, synthetic in lists.items():
        if all(len(text.strip()) == 1 for text in synthetic):
            raise BadSample("one-letter captions", f"{key} is {synthetic}"[:200])
    parameters, stored = augmentation_parameters(sample), embeddings(sample)
    try:
        params = [compose.decompress(entry) for entry in parameters]
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    for name, rows in stored.items():
        if not rows.float().isfinite().all():
            raise BadSample("embeddings are not finite", name)
        tolerance = UNIT_TOLERANCE.get(rows.dtype, DEFAULT_UNIT_TOLERANCE)
        for teacher, block in enumerate(rows.float().split(dimensions, dim=1)):
            norms = block.norm(dim=1)
            worst = int((norms - 1).abs().argmax())
            if not abs(float(norms[worst]) - 1) <= tolerance:
                raise BadSample(
                    "a teacher's block is not of unit length",
                    f"row {worst} of {name}, teacher {teacher}: {float(norms[worst]):.4g}",
                )
    blank = Image.new("L", decode_image(sample).size)
    measure(blank, params)
    for entry in params:
        try:
            crops.reapply(blank, entry)
        except ValueError as error:
            raise BadSample("crop box outside the image", error) from error
    image_emb = stored["image_emb"]
    precision = str(image_emb.dtype).removeprefix("torch.")
    counts = tuple((printable(key, 80), len(captions)) for key, captions in lists.items())
    return Layout(len(image_emb), count_originals(sample), counts, image_emb.shape[1], precision)


@dataclass(frozen=True)
class ShardVerifier:
    """Checks a shard, or some of its samples.

    Attributes:
        config: an ``image_augmentation`` object.
        dimensions: D_k, the width of each teacher's block.
        seed: of the choice of samples.
        part: the share of the samples to read; None: all.
        number: how many samples to read; None: all.
        keep: how many good samples to return, for the teachers.
    """

    config: dict[str, Any]
    dimensions: list[int]
    seed: int
    part: float | None
    number: int | None
    keep: int

    def __call__(self, item: tuple[str, int | None]) -> dict[str, Any]:
        """What was found in a shard, by its path and the number of samples expected."""
        path, expected = item
        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)  # there is a process for each core
        samples: list[Sample] = []
        fault = None
        try:
            with open(path, "rb", buffering=HEADER_BUFFER) as file:
                samples.extend(list_samples(file, self.seed))  # also those before a damage
            if not samples:
                fault = "holds no sample"
            elif expected not in (None, len(samples)):
                fault = f"contains {len(samples)} samples, {SIZES} in its folder lists {expected}"
        except tarfile.TarError as error:
            fault = f"not a whole tar: {error}"
        except OSError as error:
            fault = error.strerror or str(error)
        found: dict[str, Any] = {"shard": path, "samples": len(samples), "read": 0, "good": []}
        found |= {"bad": Counter(), "first": {}, "layouts": Counter(), "boxes": {}}
        unknown: Unknown | None = None
        for sample in samples:
            unknown = merge_unknown(unknown, sample.members.unknown)
        found["unknown"] = unknown
        if self.part is not None:
            samples = [sample for sample in samples if sample.rank < self.part]
        elif self.number is not None:
            chosen = heapq.nsmallest(self.number, samples)
            samples = sorted(chosen, key=lambda sample: sample.position)
        try:
            self._check_samples(samples, found)
        except (OSError, ShardError) as error:
            fault = fault or str(error)
        finally:
            open_files.close()
        return {**found, "fault": fault, "good": heapq.nsmallest(self.keep, found["good"])}

    def _check_samples(self, samples: Sequence[Sample], found: dict[str, Any]) -> None:
        compose, crops = compose_from_config(self.config), make_cheap_crops(self.config)
        boxes = CropBoxes(crops, len(samples))
        found["boxes"] = boxes.counts
        for sample in samples:
            try:
                members = read_sample(sample, found["shard"])
                measure = partial(boxes.add, read_about=sample.read_about)
                layout = check_sample(members, compose, crops, self.dimensions, measure)
            except (OSError, ShardError):
                raise
            except Exception as error:  # an unforeseen one would end a training
                unforeseen = f"{type(error).__name__} when it is read"
                reason = error.reason if isinstance(error, BadSample) else unforeseen
                detail = str(error).removeprefix(reason).removeprefix(": ")
                if reason == "undecodable image":
                    extension, span = first_member(sample.members, IMAGE_MEMBERS)
                    if span.size > MAX_INFLATED:
                        reason, detail = f"oversized {extension}", f"{span.size} bytes, {detail}"
                found["bad"][reason] += 1
                found["first"].setdefault(reason, (sample.uid, detail))
            else:
                found["layouts"][layout] += 1
                found["good"].append(sample)
            found["read"] += 1


# --- the teachers ---------------------------------------------------------------------------------
def load_teachers(
    config: ReinforcementConfig, named: list[tuple[str, str]]
) -> tuple[list["Teacher"], list[Compose]]:
    """The named teachers, or those of the config, and the augmentation as each of them sees it.

    Raises:
        SystemExit: one cannot be loaded, or the augmentation does not suit them.
    """
    from lib.teachers import Teacher, adapt_crops  # OpenCLIP takes seconds and 200 MB

    if not named:
        config.need("model_name", "pretrained")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teachers = []
    for model, weights in named or config.teachers:
        teachers.append(Teacher(model, weights, device, "fp32"))
    return teachers, adapt_crops(config, teachers)[1]


def embed_sample(
    members: dict[str, Any], teachers: Sequence["Teacher"], crops: Sequence[Compose]
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Embed all augmentations and captions of a sample again.

    Yields:
        for each teacher its number, ``image`` and rows ``[A, D_k]``, then with ``text`` and rows
        ``[C + S, D_k]``.
    """
    from lib.teachers import to_bytes

    img, stored = decode_image(members), augmentation_parameters(members)
    captions = [*original_captions(members), *synthetic_captions(members)]
    for number, (teacher, crop) in enumerate(zip(teachers, crops, strict=True)):
        images = [to_bytes(crop.reapply(img, crop.decompress(entry))[0]) for entry in stored]
        chunks = torch.stack(images).split(EMBED_AT_ONCE)
        embedded = [teacher.embed(chunk, captions) for chunk in chunks]
        yield number, "image", torch.cat([image_emb for image_emb, _ in embedded])
        yield number, "text", embedded[0][1]


def compare_embeddings(
    samples: Iterable[tuple[str, Sample]],
    teachers: Sequence["Teacher"],
    dimensions: list[int],
    crops: Sequence[Compose],
    min_cosine: float,
) -> list[dict[str, Any]]:
    """Embed good samples ``(shard, sample)`` again, and compare with what is stored.

    Returns:
        for each teacher, for its images and for its texts: numbers for the table, the worst row.
    """
    cosines: dict[tuple[int, str], list[tuple[float, str, str, int]]] = defaultdict(list)
    for shard, sample in tqdm(samples, desc="embed", unit=" images"):
        members = read_sample(sample, shard)
        stored = embeddings(members)
        for number, kind, rows in embed_sample(members, teachers, crops):
            block = stored[f"{kind}_emb"].float().split(dimensions, dim=1)[number]
            similarity = torch.cosine_similarity(rows, block, dim=1).nan_to_num(-1.0)
            for row, cosine in enumerate(similarity.tolist()):
                cosines[number, kind].append((cosine, shard, sample.uid, row))
    open_files.close()
    found = []
    for (number, kind), compared in cosines.items():
        least, shard, uid, row = min(compared)
        values = [cosine for cosine, *_ in compared]
        numbers = {
            "teacher": number,
            "model": teachers[number].name,
            "pretrained": teachers[number].pretrained,
            "of": kind,
            "rows": len(values),
            "min": least,
            "mean": sum(values) / len(values),
            "under_min_cosine": sum(value < min_cosine for value in values),
            "worst": {"shard": shard, "uid": uid, "row": row},
        }
        found.append(numbers)
    return found


# --- the report -----------------------------------------------------------------------------------
def merge_results(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of all shards as one report, whatever the order in which they came."""
    report: dict[str, Any] = {"shards": len(results), "samples": 0, "read": 0, "bad": Counter()}
    report |= {"first": {}, "layouts": Counter(), "faults": {}}
    unknown: Unknown | None = None
    for found in sorted(results, key=lambda found: found["shard"]):
        for name in ("samples", "read"):
            report[name] += found[name]
        for name in ("bad", "layouts"):
            report[name].update(found[name])
        for reason, (uid, detail) in found["first"].items():
            first = {"shard": found["shard"], "uid": uid, "detail": detail}
            report["first"].setdefault(reason, first)
        if found["fault"]:
            report["faults"][found["shard"]] = found["fault"]
        unknown = merge_unknown(unknown, found["unknown"])
    report["unknown"] = unknown.number if unknown else 0
    report["first_unknown"] = str(unknown) if unknown else ""
    report["crop_boxes"] = judge(merge_counts([found["boxes"] for found in results]))
    return report


def describe_row(found: dict[str, Any]) -> str:
    """Where the worst row of a comparison is."""
    kind, worst = "augmentation" if found["of"] == "image" else "caption", found["worst"]
    return printable(f"{kind} {worst['row']} of {worst['uid']} of {worst['shard']}", 300)


def format_report(report: dict[str, Any]) -> str:
    read, bad = report["read"], report["bad"]
    lines = [f"{report['shards']:,} shards, {report['samples']:,} samples, {read:,} of them read"]
    for layout, number in report["layouts"].most_common(5):
        lines.append(f"  {number:,} with {layout}")
    rows = [("usable", read - bad.total()), *bad.most_common()]
    width = max(len(label) for label, _ in rows)
    lines += ["", f"{'':<{width}}  {'samples':>11}  {'share':>8}  first"]
    for label, number in rows:
        place = ""
        if first := report["first"].get(label):
            place = f"{first['uid']} of {first['shard']}: {first['detail']}".removesuffix(": ")
        share = f"{number / max(read, 1):.2%}"
        line = f"{label:<{width}}  {number:>11,}  {share:>8}  {printable(place, 300)}"
        lines.append(line.rstrip())
    if report["unknown"]:
        lines += ["", printable(report["first_unknown"], 1000)]
    if boxes := report["crop_boxes"]:
        lines += ["", f"{'crop boxes cover, of the image':<36}    median  expected  below 0.9"]
        for direction in DIRECTIONS:
            numbers = boxes[direction]
            lines.append(
                f"{direction:<36}  {numbers['median']:>8.2f}  {numbers['expected']:>8.2f}  "
                f"{numbers['below_0.9']:>9.2%}"
            )
    if report["faults"]:
        lines += ["", f"shards with something wrong: {len(report['faults'])}"]
        for shard, fault in report["faults"].items():
            lines.append(f"  {printable(shard)}: {printable(fault)}")
    if report["teachers"]:
        lines += ["", "cosine of stored and new embeddings    rows       min      mean  worst"]
    for found in report["teachers"]:
        kind = "augmentations" if found["of"] == "image" else "captions"
        label = f"teacher {found['teacher']} {found['model'].rpartition('/')[2]}, {kind}"
        lines.append(
            f"{label:<36}  {found['rows']:>5,}  {found['min']:>8.5f}  {found['mean']:>8.5f}  "
            + describe_row(found)
        )
    return "\n".join(lines)


def find_problems(report: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Why training cannot use the shards, and what to do: a sentence each; empty if it can."""
    problems = []
    read, bad, faults = report["read"], report["bad"], report["faults"]
    if faults:
        shard, fault = next(iter(faults.items()))
        problems.append(
            f"{len(faults)} of {report['shards']} shards have something wrong, the first "
            f"{printable(shard)}: {printable(fault)} (run the join again with --recheck, or leave "
            "them out)"
        )
    if not read:
        hint = " (read a larger part)" if report["samples"] else ""
        problems.append(f"not one sample was read{hint}")
    elif bad.total() / read > args.max_bad:
        reason = bad.most_common(1)[0][0]
        advice = next((ADVICE[begin] for begin in ADVICE if reason.startswith(begin)), "")
        problems.append(
            f"{bad.total():,} of {read:,} samples ({bad.total() / read:.2%}) can't be used, more "
            f"than --max-bad {args.max_bad:g}; most: {reason} ({advice or DEFAULT_ADVICE})"
        )
    if (boxes := report["crop_boxes"]) and boxes["verdict"]:
        problems.append(boxes["verdict"])
    low = [found for found in report["teachers"] if not found["min"] >= args.min_cosine]
    if low:
        found = min(low, key=lambda found: found["min"])
        problems.append(
            f"stored embeddings are not those of the teachers: a cosine of {found['min']:.4f}, "
            f"under --min-cosine {args.min_cosine:g}, at {describe_row(found)} (made with other "
            "images, parameters or teachers: join with --verify-hash, and compare the config)"
        )
    if args.teachers is not None and not report["teachers"] and read:
        problems.append("no sample was good enough to embed it again")
    return problems


# --- the command ----------------------------------------------------------------------------------
def find_shards(given: Sequence[str]) -> list[tuple[str, int | None]]:
    """The shards of folders, paths and brace patterns, each with its number in sizes.json."""
    shards: dict[str, None] = {}
    for text in given:
        if Path(text).is_dir():
            folder = Path(text)
            for name in find_files(folder, ".tar"):
                shards[str(folder / name)] = None
            for name in find_files(folder, SIZES):  # they may list shards that are missing now
                path = folder / name
                for shard in read_sizes_or_exit(path.parent) if path.name == SIZES else ():
                    shards[str(path.parent / Path(shard).name)] = None
        else:
            shards.update(dict.fromkeys(expand_braces(text)))
    if not any(os.path.isfile(shard) for shard in shards):
        raise SystemExit(
            f"no shards in {' '.join(given)}: expected a folder with joined shards (*.tar), or a "
            "brace pattern of them; scripts/join_datacompdr12m.sh or scripts/join_shards.py "
            "--dataset makes them"
        )
    sizes = {folder: read_sizes_or_exit(folder) for folder in {Path(s).parent for s in shards}}
    return [(shard, sizes[Path(shard).parent].get(Path(shard).name)) for shard in shards]


def read_sizes_or_exit(folder: Path) -> dict[str, int]:
    try:
        return read_sizes(str(folder))
    except ValueError as error:
        raise SystemExit(f"{error}; run the join again, or remove the file") from None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=describe_datasets("joined"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = "folder of joined shards, or a pattern such as 'DIR/{00000000..00001023}.tar'"
    add("shards", nargs="*", metavar="SHARDS", help=text)
    text = "data set whose joined shards and config are the defaults of SHARDS and --config"
    add_dataset_option(parser, text)
    text = (
        "config that the set was reinforced with; default: that of --dataset, or "
        f"configs/{DEFAULT_CONFIG.name}"
    )
    add("--config", type=Path, help=text)
    some = parser.add_mutually_exclusive_group()
    text = "read this share of the samples, for example 0.01"
    some.add_argument("--part", type=float, metavar="SHARE", help=text)
    some.add_argument("--samples", type=int, metavar="N", help="read N samples of each shard")
    text = "width of each teacher's block of the embeddings; default: of the config's teachers"
    add("--teacher-dimension", type=int, nargs="+", metavar="D", help=text)
    text = "largest share of bad samples that is not an error; default %(default)s"
    add("--max-bad", type=float, default=0.01, metavar="SHARE", help=text)
    cores, text = min(8, os.cpu_count() or 1), "processes; default: one for each core, up to 8"
    add("--workers", type=int, default=cores, help=text)
    text = "seed of the choice of samples; default %(default)s"
    add("--seed", type=int, default=0, help=text)
    text = "embed some samples again, and compare; default teachers: the config's. Give it last"
    add("--teachers", nargs="*", metavar="MODEL PRETRAINED", help=text)
    text = "number of images for --teachers; default %(default)s"
    add("--embed", type=int, default=32, metavar="N", help=text)
    text = "smallest cosine for --teachers; default %(default)s"
    add("--min-cosine", type=float, default=0.98, metavar="C", help=text)
    add("--report", type=Path, metavar="FILE", help="write all results to this file, as JSON")
    args = parser.parse_args(arguments)
    dataset = DATASETS[args.dataset] if args.dataset else None
    args.config = args.config or (dataset.config_path if dataset else DEFAULT_CONFIG)
    args.shards = args.shards or ([str(dataset.joined.path())] if dataset else [])
    if not args.shards:
        parser.error("expected SHARDS or --dataset")
    if args.part is not None and not 0 < args.part <= 1:
        parser.error(f"--part {args.part:g}: expected a share, over 0 and at most 1")
    check_least(parser, args, 1, "samples", "workers", "embed")
    if not 0 <= args.max_bad <= 1:
        parser.error(f"--max-bad {args.max_bad:g}: expected a share, 0 to 1")
    if args.teacher_dimension and min(args.teacher_dimension) < 1:
        parser.error("--teacher-dimension: expected each at least 1")
    if args.teachers and len(args.teachers) % 2:
        parser.error("--teachers: expected a model and its weights for each teacher, or nothing")
    if args.report and not args.report.parent.is_dir():
        parser.error(f"--report {args.report}: there is no such folder")
    return args


def choose_teachers(
    args: argparse.Namespace, config: ReinforcementConfig
) -> tuple[list["Teacher"], list[Compose], list[int]]:
    """The teachers to compare with (none without --teachers), the augmentation as each of them
    sees it, and the widths of the blocks."""
    if args.teachers is None:
        if args.teacher_dimension:
            return [], [], args.teacher_dimension
        from lib.teachers import teacher_dimensions

        return [], [], teacher_dimensions(config)
    named = list(zip(args.teachers[::2], args.teachers[1::2], strict=True))
    teachers, crops = load_teachers(config, named)
    dimensions = [teacher.measure_dimension() for teacher in teachers]
    if args.teacher_dimension not in (None, dimensions):
        raise SystemExit(
            f"--teacher-dimension {args.teacher_dimension}, but the teachers' are {dimensions}"
        )
    return teachers, crops, dimensions


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = read_config(args.config)
    shards = find_shards(args.shards)
    teachers, crops, dimensions = choose_teachers(args, config)
    keep = args.embed if teachers else 0
    verify = ShardVerifier(
        config.augmentation, dimensions, args.seed, args.part, args.samples, keep
    )
    found = run_all(verify, shards, args.workers)
    results = list(tqdm(found, desc="verify", total=len(shards), unit=" shards"))
    report = merge_results(results)
    good = ((sample.rank, found["shard"], sample) for found in results for sample in found["good"])
    chosen = [(shard, sample) for _, shard, sample in heapq.nsmallest(args.embed, good)]
    report["teachers"] = []
    if chosen:
        report["teachers"] = compare_embeddings(
            chosen, teachers, dimensions, crops, args.min_cosine
        )
    problems = find_problems(report, args)
    print(format_report(report))
    if args.report:
        layouts = [layout.to_json(number) for layout, number in report["layouts"].items()]
        written = {**report, "layouts": layouts, "usable": not problems, "wrong": problems}
        publish_json(args.report, {"arguments": vars(args), **written})
    if problems:
        print(f"\nNOT usable: {'; '.join(problems)}", flush=True)
        raise SystemExit(1)
    usable = report["read"] - report["bad"].total()
    print(f"\nusable: training can use {usable:,} of the {report['read']:,} samples read; go ahead")


if __name__ == "__main__":
    # ShardError, BadSample: a shard was changed meanwhile
    run_command(main, ShardError, BadSample, interrupted="nothing was changed, run it again")
