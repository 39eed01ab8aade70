"""Say whether training can use joined shards, before days of GPU time: read all of them, or a random part.

    python scripts/verify_shards.py datasets/DataCompDR-12M/shards --workers 8             # every sample
    python scripts/verify_shards.py 'DIR/{00000000..00001023}.tar' --part 0.01 --teachers  # a first look, with proof

Of each sample: what training itself looks at, by its own code (an image, captions, augmentation parameters, embeddings,
row counts, widths); then what training would see only when it draws just that: that the image decodes, that *all* crop
boxes lie inside it, that all embeddings are finite, and each teacher's block has unit length (to 1e-3; in bfloat16
1e-2). Each sample counts once, under the first thing wrong with it. Of each shard: that it is a whole tar, that it
holds samples, and as many as the sizes.json beside it says. Every shard's headers are read; with --part or --samples
only the chosen samples' contents. The choice depends on --seed and the uid alone.

--teachers embeds some of the good samples again, each under all its stored augmentations, with all its captions, by
reinforce.py's own teachers in float32, and compares with what is stored: the proof that images, parameters and
embeddings belong together. The config names them, as for reinforce.py; or name them here, `--teachers MODEL PRETRAINED
MODEL PRETRAINED`, where the weights are checkpoint files on a machine without network for one. The published ones want
a GPU.

Prints a table; the last line says whether the shards are usable, and what to do. Exit status 0: usable. 1: a larger
share of the samples read than --max-bad is unusable, a shard is damaged or lacks samples, a cosine is under
--min-cosine, or there was nothing to read. Writes nothing but --report, a JSON file with all of it.

Leaves out: uids that are in several shards, and whether a caption says what the picture shows.
"""

import argparse
import functools
import hashlib
import heapq
import json
import multiprocessing
import os
import random
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from join_shards import Source, expand, publish_json, run_all
from PIL import Image
from shard_members import HEADER_BUFFER, ShardError, open_files, scan
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the recipe's root, for dr
from dr.sample import (
    MAX_INFLATED,
    USED_MEMBERS,
    BadSample,
    augmentation_parameters,
    caption,
    decode_image,
    draw,
    embeddings,
    synthetic_captions,
)
from dr.transforms import Compose, compose_from_config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "datacompdr12m.json"
MAX_MEMBER = MAX_INFLATED  # bytes of a member as it is stored; more are not read
UNIT_TOLERANCE = {torch.bfloat16: 1e-2}  # bfloat16 has 8 bits
UNIT_TOLERANCE_ELSE = 1e-3
CROPS = (
    "resize",
    "center_crop",
    "random_crop",
    "random_resized_crop",
)  # what moves pixels before and in the crops
EMBED_AT_ONCE = 64  # augmented images

# What to do about a reason, by how it begins.
ADVICE = {
    "lacks": "join again without --keep-incomplete: scripts/join_shards.py leaves out samples that lack something",
    "crop box": "these images are not the ones that were embedded: join with --verify-hash, and download at the size "
    "that was used then",
    "undecodable": "download these images again, and join again",
    "embedding width": "give the config that the set was made with (--config), or --teacher-dimension",
    "a teacher's block": "give the config that the set was made with (--config), or --teacher-dimension; if they are "
    "right, the reinforcements are damaged",
    "augmentation parameters": "give the config that the set was made with (--config)",
}
ADVICE_ELSE = "get the source shards of these samples again, and join again with --recheck"


class Sample(NamedTuple):
    """A sample of a shard, of which only headers were read."""

    rank: float  # in 0 … 1, by seed and uid: the order in which samples are chosen
    index: int  # in its shard
    uid: str
    members: dict  # extension -> Span
    fault: str | None  # why it can't be used


# reading


def samples_in(file, seed):
    """Yield the samples of a shard as training's reader puts them together: neighbours that share a key."""
    uid, members, fault, index = None, {}, None, 0

    def sample():
        digest = hashlib.sha256(f"{seed} {uid}".encode("utf-8", "surrogateescape")).digest()
        return Sample(int.from_bytes(digest[:8], "big") / 2**64, index, uid, members, fault)

    for name, _, span, member_fault in scan(file):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue  # not part of a sample for WebDataset either
        key, extension = folder + slash + stem, extension.lower()
        if key != uid or extension in members:
            if uid is not None:
                yield sample()
                index += 1
            uid, members, fault = key, {}, None
        members[extension] = span
        fault = fault or member_fault
    if uid is not None:
        yield sample()


def read(sample, shard):
    """The members that training uses, as its reader gives them."""
    if sample.fault:
        raise BadSample(sample.fault)
    spans = {
        extension: span for extension, span in sample.members.items() if extension in USED_MEMBERS
    }
    for extension, span in spans.items():
        if span.size > MAX_MEMBER:
            raise BadSample(
                f"oversized {extension}", f"{span.size} bytes, at most {MAX_MEMBER} are taken"
            )
    return {
        "__key__": sample.uid,
        "__url__": shard,
        **{extension: span.read() for extension, span in spans.items()},
    }


def without_pixels(config):
    """The crops of an augmentation onto one pixel, for a blank image: refuses the same boxes, and costs little."""
    crops = {name: {**config[name]} for name in CROPS if name in config}
    crops.get("random_crop", {}).pop("fill", None)  # a colour, perhaps
    if "random_resized_crop" in crops:
        crops["random_resized_crop"] = {
            **crops["random_resized_crop"],
            "size": 1,
            "interpolation": "nearest",
        }
    return compose_from_config(crops)


def check(sample: dict, compose: Compose, crops: Compose, dimensions: list[int]) -> tuple:
    """Everything that can be said of a sample without its teachers.

    Args:
        sample: its members by extension.
        compose: what the stored parameters are for.
        crops: the same, ``without_pixels``.
        dimensions: D_k, the width of each teacher's block.

    Returns:
        its layout: the numbers of augmentations and of synthetic captions, the width, the precision.

    Raises:
        BadSample: training could not use it, or one of the things that it could draw from it.
    """
    draw(
        sample, compose, random.Random(0), width=sum(dimensions)
    )  # training's checks, by training's code
    parameters, stored = augmentation_parameters(sample), embeddings(sample)
    try:
        params = [compose.decompress(entry) for entry in parameters]
    except ValueError as error:
        raise BadSample("augmentation parameters", error) from error
    for name, rows in stored.items():
        if not rows.float().isfinite().all():
            raise BadSample("embeddings are not finite", name)
        tolerance = UNIT_TOLERANCE.get(rows.dtype, UNIT_TOLERANCE_ELSE)
        for teacher, block in enumerate(rows.float().split(dimensions, dim=1)):
            norms = block.norm(dim=1)
            worst = int((norms - 1).abs().argmax())
            if not abs(float(norms[worst]) - 1) <= tolerance:
                raise BadSample(
                    "a teacher's block is not of unit length",
                    f"row {worst} of {name}, teacher {teacher}: {float(norms[worst]):.4g}",
                )
    blank = Image.new("L", decode_image(sample).size)
    for entry in params:
        try:
            crops.reapply(blank, entry)
        except ValueError as error:
            raise BadSample("crop box outside the image", error) from error
    image_emb, text_emb = stored["image_emb"], stored["text_emb"]
    precision = str(image_emb.dtype).removeprefix("torch.")
    return len(image_emb), len(text_emb) - 1, image_emb.shape[1], precision


def printable(text, limit=160):
    """Text out of a shard, for a terminal."""
    text = "".join(char if char.isprintable() else "?" for char in str(text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def verify_shard(item, config, dimensions, seed, part, number, keep):
    """Check a shard, or a part of it; what was found.

    Args:
        item: its path, and how many samples it should hold, if that is known.
        config: an ``image_augmentation`` object.
        part, number: the share of the samples to read, or how many; None: all.
        keep: of how many good samples to return where they are, for the teachers.
    """
    path, expected = item
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # there is a process for each core
    found = {
        "shard": path,
        "samples": 0,
        "read": 0,
        "bad": Counter(),
        "first": {},
        "layouts": Counter(),
    }
    compose, crops = compose_from_config(config), without_pixels(config)
    samples, good, fault = [], [], None
    try:
        with open(path, "rb", buffering=HEADER_BUFFER) as file:
            for sample in samples_in(file, seed):  # one by one: those before a damage are kept
                samples.append(sample)
        if not samples:
            fault = "holds no sample"
        elif expected not in (None, len(samples)):
            fault = f"holds {len(samples)} samples, the sizes.json beside it says {expected}"
    except (OSError, ShardError) as error:
        fault = (getattr(error, "strerror", None) or str(error)).removeprefix(f"{path} is ")
    found["samples"] = len(samples)
    if part is not None:
        samples = [sample for sample in samples if sample.rank < part]
    elif number is not None:
        samples = sorted(heapq.nsmallest(number, samples), key=lambda sample: sample.index)
    try:
        for sample in samples:
            try:
                layout = check(read(sample, path), compose, crops, dimensions)
            except (OSError, ShardError):
                raise
            except Exception as error:  # what nobody has foreseen would end a training
                known = isinstance(error, BadSample)
                reason = error.reason if known else f"{type(error).__name__} when it is read"
                found["bad"][reason] += 1
                detail = str(error).removeprefix(reason).removeprefix(": ")
                found["first"].setdefault(reason, (sample.uid, detail))
            else:
                found["layouts"][layout] += 1
                good.append(sample)
            found["read"] += 1
    except (OSError, ShardError) as error:
        fault = fault or str(error)
    finally:
        open_files.close()
    return {**found, "fault": fault, "good": heapq.nsmallest(keep, good)}


# the teachers


def load_teachers(config, where, named, size_of):
    """The teachers, each ``(model, weights, Teacher, D_k)``; one line if they can't be had."""
    from reinforce import Teacher, check_crop, named_teachers  # OpenCLIP takes seconds and 200 MB

    named = named or named_teachers(config, where)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teachers = []
    for model, weights in named:
        try:
            teacher = Teacher(model, weights, device, "fp32")
        except Exception as error:  # OpenCLIP, the Hub and torch raise what they like
            line = (str(error).splitlines() or [""])[0]
            raise SystemExit(
                f"the teacher {model} {weights} can't be loaded: {type(error).__name__}: {printable(line)}"
            ) from None
        check_crop(size_of, model, teacher, where)
        height, width = size_of.transforms["random_resized_crop"].size
        dimension = teacher.embed(torch.zeros(1, 3, height, width), [""])[0].shape[1]
        teachers.append((model, weights, teacher, dimension))
    return teachers


def embed_again(samples, teachers, compose, min_cosine):
    """Embed samples again, and compare with what is stored.

    Args:
        samples: ``(shard, Sample)`` of each, found to be good.
        teachers: as ``load_teachers`` gives them.
        compose: the augmentation, without normalisation.

    Returns:
        for each teacher and for its images and its texts: numbers for the table, and the worst row's place.
    """
    dimensions = [dimension for *_, dimension in teachers]
    rows = {
        (t, kind): [] for t in range(len(teachers)) for kind in ("image", "text")
    }  # (cosine, shard, uid, row)
    for shard, sample in tqdm(samples, desc="embed", unit=" images"):
        members = read(sample, shard)
        stored = {
            name: table.float().split(dimensions, dim=1)
            for name, table in embeddings(members).items()
        }
        params = [compose.decompress(entry) for entry in augmentation_parameters(members)]
        captions = [caption(members), *synthetic_captions(members)]
        img, images = decode_image(members), []
        for start in range(0, len(params), EMBED_AT_ONCE):
            batch = torch.stack(
                [compose.reapply(img, entry)[0] for entry in params[start : start + EMBED_AT_ONCE]]
            )
            images.append([teacher.embed(batch, captions) for _, _, teacher, _ in teachers])
        for t in range(len(teachers)):
            again = {"image": torch.cat([batch[t][0] for batch in images]), "text": images[0][t][1]}
            for kind, table in again.items():
                cosines = torch.cosine_similarity(
                    table, stored[f"{kind}_emb"][t], dim=1
                ).nan_to_num(-1.0)
                rows[t, kind] += [
                    (cosine, shard, sample.uid, row) for row, cosine in enumerate(cosines.tolist())
                ]
    open_files.close()
    found = []
    for (t, kind), cosines in rows.items():
        least, shard, uid, row = min(cosines)
        found.append(
            {
                "teacher": t,
                "model": teachers[t][0],
                "pretrained": teachers[t][1],
                "of": kind,
                "rows": len(cosines),
                "min": least,
                "mean": sum(cosine for cosine, *_ in cosines) / len(cosines),
                "under_min_cosine": sum(cosine < min_cosine for cosine, *_ in cosines),
                "worst": {"shard": shard, "uid": uid, "row": row},
            }
        )
    return found


# telling


def put_together(results):
    """The shards' findings as one, the same whatever the order in which the processes came to them."""
    report = {
        "shards": len(results),
        "samples": 0,
        "read": 0,
        "bad": Counter(),
        "first": {},
        "layouts": Counter(),
    }
    report["faults"] = {}
    for found in sorted(results, key=lambda found: found["shard"]):
        for name in ("samples", "read"):
            report[name] += found[name]
        for name in ("bad", "layouts"):
            report[name].update(found[name])
        for reason, (uid, detail) in found["first"].items():
            report["first"].setdefault(
                reason, {"shard": found["shard"], "uid": uid, "detail": detail}
            )
        if found["fault"]:
            report["faults"][found["shard"]] = found["fault"]
    return report


def table(report):
    """The findings for people."""
    read, bad = report["read"], report["bad"]
    lines = [f"{report['shards']:,} shards, {report['samples']:,} samples, {read:,} of them read"]
    for (augmentations, synthetic, width, precision), number in report["layouts"].most_common(5):
        held = f"{augmentations} augmentations, {synthetic} synthetic captions, embeddings {width} wide, {precision}"
        lines.append(f"  {number:,} with {held}")
    rows = [
        ("usable", read - bad.total(), ""),
        *((reason, number, reason) for reason, number in bad.most_common()),
    ]
    width = max(len(label) for label, *_ in rows)
    lines += ["", f"{'':<{width}}  {'samples':>11}  {'share':>8}  first"]
    for label, number, reason in rows:
        first = report["first"].get(reason)
        told = (
            f"{first['uid']} of {first['shard']}: {first['detail']}".removesuffix(": ")
            if first
            else ""
        )
        share = f"{number / max(read, 1):.2%}"
        lines.append(
            f"{label:<{width}}  {number:>11,}  {share:>8}  {printable(told, 300)}".rstrip()
        )
    if report["faults"]:
        lines += ["", f"shards with something wrong: {len(report['faults'])}"]
        lines += [
            f"  {printable(shard)}: {printable(fault)}" for shard, fault in report["faults"].items()
        ]
    if report["teachers"]:
        lines += ["", "cosine of stored and new embeddings    rows       min      mean  worst"]
        for found in report["teachers"]:
            worst = found["worst"]
            of = "augmentation" if found["of"] == "image" else "caption"
            label = (
                f"teacher {found['teacher']} {found['model'].rpartition('/')[2]}, {found['of']}s"
            )
            lines.append(
                f"{label:<36}  {found['rows']:>5,}  {found['min']:>8.5f}  {found['mean']:>8.5f}  "
                + printable(f"{of} {worst['row']} of {worst['uid']} of {worst['shard']}", 300)
            )
    return "\n".join(lines)


def verdict(report, max_bad, min_cosine, teachers_wanted):
    """What is wrong with the shards, a sentence for each thing, with what to do; empty: training can use them."""
    wrong = []
    read, bad, faults = report["read"], report["bad"], report["faults"]
    if faults:
        shard, fault = next(iter(faults.items()))
        wrong.append(
            f"{len(faults)} of {report['shards']} shards have something wrong, the first {printable(shard)}: "
            f"{printable(fault)} (run the join again with --recheck, or leave them out)"
        )
    if not read:
        wrong.append(
            "not one sample was read" + (" (read a larger part)" if report["samples"] else "")
        )
    elif bad.total() / read > max_bad:
        reason = bad.most_common(1)[0][0]
        advice = next(
            (told for begin, told in ADVICE.items() if reason.startswith(begin)), ADVICE_ELSE
        )
        wrong.append(
            f"{bad.total():,} of {read:,} samples ({bad.total() / read:.2%}) can't be used, more than --max-bad "
            f"{max_bad:g}; most: {reason} ({advice})"
        )
    low = [found for found in report["teachers"] if not found["min"] >= min_cosine]
    if low:
        found = min(low, key=lambda found: found["min"])
        of = "augmentation" if found["of"] == "image" else "caption"
        place = printable(
            f"{of} {found['worst']['row']} of {found['worst']['uid']} of {found['worst']['shard']}",
            300,
        )
        wrong.append(
            f"stored embeddings are not what the teachers make of the samples: a cosine of {found['min']:.4f}, under "
            f"--min-cosine {min_cosine:g}, at {place} (made with other images, parameters or teachers: join with "
            "--verify-hash, and compare the config)"
        )
    if teachers_wanted and not report["teachers"] and read:
        wrong.append("no sample was good enough to embed it again")
    return wrong


# what a person gave


def find_shards(given):
    """The shards of folders, paths and brace patterns, in order, each with the samples that sizes.json counts there."""
    shards = {}
    for text in given:
        if Path(text).is_dir():
            folder = Path(text)
            shards.update(
                dict.fromkeys(str(folder / name) for name in Source(folder, None).shards())
            )
            for sizes in sorted(
                folder.rglob("sizes.json")
            ):  # also those that were counted once and are gone
                shards.update(
                    dict.fromkeys(
                        str(sizes.parent / Path(name).name) for name in read_sizes(sizes.parent)
                    )
                )
        else:
            shards.update(dict.fromkeys(expand(text)))
    if not any(os.path.isfile(shard) for shard in shards):
        raise SystemExit(
            f"no shards in {' '.join(given)}: expected a folder with joined shards (*.tar), or a brace pattern of "
            "them; scripts/join_datacompdr12m.sh makes them"
        )
    return [(shard, read_sizes(Path(shard).parent).get(Path(shard).name)) for shard in shards]


@functools.cache
def read_sizes(folder):
    """``{shard: samples}`` of the sizes.json in a folder; empty: there is none."""
    path = folder / "sizes.json"
    if not path.exists():
        return {}
    try:
        sizes = json.loads(path.read_text())
        if not isinstance(sizes, dict) or not all(
            isinstance(number, int) for number in sizes.values()
        ):
            raise ValueError("expected an object of whole numbers by shard")
    except (ValueError, RecursionError) as error:
        raise SystemExit(
            f"{path} can't be read: {error}; run the join again, or remove it"
        ) from None
    return sizes


def read_config(path):
    """The reinforcement config, and the Compose of its augmentation."""
    try:
        config = json.loads(path.read_text())
        return config, compose_from_config(config["reinforce"]["image_augmentation"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"--config {path} is no reinforcement config: {type(error).__name__}: {error}; see configs/{CONFIG.name}"
        ) from None


def teacher_dimensions(config, where):
    """D_k of the teachers that a config names, as OpenCLIP's model configs have them."""
    import open_clip
    from reinforce import named_teachers

    from dr.params import register_model

    try:
        models = [
            open_clip.get_model_config(register_model(name))
            for name, _ in named_teachers(config, where)
        ]
        return [model["embed_dim"] for model in models]
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        raise SystemExit(
            f"--config {where}: its model_name names no models that OpenCLIP knows; give --teacher-dimension"
        ) from None


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option = parser.add_argument
    add_option(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="folder of joined shards, or 'DIR/{00000000..00001023}.tar'",
    )
    add_option(
        "--config",
        type=Path,
        default=CONFIG,
        help=f"how the set was reinforced; default configs/{CONFIG.name}",
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--part", type=float, metavar="SHARE", help="read this share of the samples, 0.01 for one"
    )
    some.add_argument("--samples", type=int, metavar="N", help="read N samples of each shard")
    add_option(
        "--teacher-dimension",
        type=int,
        nargs="+",
        metavar="D",
        help="width of each teacher's block, as --distill-teacher-dimension; default: of the config's teachers",
    )
    add_option(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="bad samples allowed; default %(default)s",
    )
    add_option(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes; default %(default)s",
    )
    add_option("--seed", type=int, default=0, help="of the choice of samples; default %(default)s")
    add_option(
        "--teachers",
        nargs="*",
        metavar="MODEL PRETRAINED",
        help="embed again, and compare; default teachers: the config's. Give it after SHARDS",
    )
    add_option(
        "--embed",
        type=int,
        default=32,
        metavar="N",
        help="images for --teachers; default %(default)s",
    )
    add_option(
        "--min-cosine",
        type=float,
        default=0.98,
        metavar="C",
        help="for --teachers; default %(default)s",
    )
    add_option("--report", type=Path, metavar="FILE", help="write what was found as JSON")
    args = parser.parse_args(arguments)
    if args.part is not None and not 0 < args.part <= 1:
        parser.error(f"--part {args.part:g}: a share, over 0 and at most 1")
    for option in ("samples", "workers", "embed"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"--{option} {value}: at least 1")
    if not 0 <= args.max_bad <= 1:
        parser.error(f"--max-bad {args.max_bad:g}: a share, 0 to 1")
    if args.teacher_dimension and min(args.teacher_dimension) < 1:
        parser.error("--teacher-dimension: each at least 1")
    if args.teachers and len(args.teachers) % 2:
        parser.error(
            "--teachers: a model and its weights for each teacher, or nothing for the config's"
        )
    if args.report and not args.report.parent.is_dir():
        parser.error(f"--report {args.report}: there is no such folder")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    config, stored_compose = read_config(args.config)
    shards = find_shards(args.shards)
    teachers = []
    if args.teachers is not None:
        from reinforce import unnormalized

        if "random_resized_crop" not in stored_compose.transforms:
            raise SystemExit(
                f"--config {args.config}: --teachers needs a random_resized_crop, of the teachers' size"
            )
        compose = unnormalized(config)
        named = list(zip(args.teachers[::2], args.teachers[1::2], strict=True))
        teachers = load_teachers(config, args.config, named, compose)
        dimensions = [dimension for *_, dimension in teachers]
        if args.teacher_dimension not in (None, dimensions):
            raise SystemExit(
                f"--teacher-dimension {args.teacher_dimension}, but the teachers' are {dimensions}"
            )
    else:
        dimensions = args.teacher_dimension or teacher_dimensions(config, args.config)

    verify = functools.partial(
        verify_shard,
        config=config["reinforce"]["image_augmentation"],
        dimensions=dimensions,
        seed=args.seed,
        part=args.part,
        number=args.samples,
        keep=args.embed if teachers else 0,
    )
    results = list(
        tqdm(
            run_all(verify, shards, args.workers), desc="verify", total=len(shards), unit=" shards"
        )
    )
    report = put_together(results)
    good = ((sample.rank, found["shard"], sample) for found in results for sample in found["good"])
    chosen = [(shard, sample) for _, shard, sample in heapq.nsmallest(args.embed, good)]
    report["teachers"] = (
        embed_again(chosen, teachers, compose, args.min_cosine) if teachers and chosen else []
    )
    wrong = verdict(report, args.max_bad, args.min_cosine, bool(teachers))
    print(table(report))
    if args.report:
        fields = ("augmentations", "synthetic_captions", "width", "precision", "samples")
        layouts = [
            dict(zip(fields, (*layout, number), strict=True))
            for layout, number in report["layouts"].items()
        ]
        found = {**report, "layouts": layouts, "usable": not wrong, "wrong": wrong}
        publish_json(args.report, {"arguments": vars(args), **found})
    if wrong:
        print(f"\nNOT usable: {'; '.join(wrong)}", flush=True)
        raise SystemExit(1)
    usable = report["read"] - report["bad"].total()
    print(f"\nusable: training can use {usable:,} of the {report['read']:,} samples read; go ahead")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was changed, run it again") from None
    except BrokenProcessPool:
        raise SystemExit(
            "a worker was killed, short of memory perhaps; run it again, with fewer --workers"
        ) from None
    except (
        OSError,
        ShardError,
        BadSample,
    ) as error:  # the latter two: a shard was changed meanwhile
        raise SystemExit(str(error)) from None
