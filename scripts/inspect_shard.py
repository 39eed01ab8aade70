"""Show the contents of a shard's first samples, and whether training can read them.

    python scripts/inspect_shard.py hf://apple/DFNDR-12M    # its first shard on the Hub
    python scripts/inspect_shard.py hf://apple/DFNDR-12M/00000000.tar --samples 5
    python scripts/inspect_shard.py datasets/DFNDR-12M-noimage/00000000.tar --dataset dfndr12m

For each sample the script prints its members with their sizes, the keys of JSON members, names,
types and shapes of arrays, and the beginning of texts. Then it reads the sample with training's own
code. A reinforcement shard of the Hub has no image, and perhaps no caption: then the reinforcements
alone are checked, and the script prints what the join has to add. Run it before you download or
join a data set that you do not know.

Of a shard on the Hub only the beginning is transferred, and nothing is written to disk. HF_TOKEN,
HF_ENDPOINT and HF_HOME work as in huggingface_hub. Nothing is unpickled, and at most 256 MiB of a
shard are read.

The last line says whether training can read the samples. The exit status is 0 if it can, or could
after a join, and 1 otherwise. scripts/verify_shards.py checks whole shards, after the join.
"""

import argparse
import io
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from lib.config import DEFAULT_CONFIG, read_config
from lib.datasets import DATASETS, add_dataset_option
from lib.hub import Beginning, HubShard, LimitReached, open_beginning
from lib.report import check_least, printable, run_command
from lib.shards import MAX_JSON, describe_type
from PIL import Image
from torch import Tensor

from dr.sample import (
    IMAGE_FORMATS,
    BadSample,
    check_inflated,
    decode_image,
    load_pth_gz,
    missing,
    select,
)
from dr.sampling import RandomChoice
from dr.tar import CHUNK, IMAGE_MEMBERS, KNOWN_MEMBERS, PLAIN_MEMBERS, Members, read_samples
from dr.transforms import Compose

MAX_READ = 2**28  # bytes of a shard
SHOWN = 12  # keys of an object, arrays of a member
TEXT, LINE = 100, 1000  # characters of a text, of the description of a member


# --- reading --------------------------------------------------------------------------------------
@contextmanager
def open_shard(shard: Path | HubShard) -> Iterator[Beginning]:
    """The beginning of a local file, or of a shard on the Hub."""
    if isinstance(shard, HubShard):
        with open_beginning(shard, MAX_READ) as beginning:
            yield beginning
    else:
        with open(shard, "rb") as file:
            yield Beginning(iter(partial(file.read, CHUNK), b""), MAX_READ)


# --- describing -----------------------------------------------------------------------------------
def describe_json(data: bytes) -> str:
    """The keys of an object with their types, and the beginning of texts."""
    if len(data) > MAX_JSON:
        return f"JSON of over {MAX_JSON} bytes, not read"
    content = json.loads(data)
    if not isinstance(content, dict):
        return describe_value(content)
    shown = [f"{key}: {describe_value(content[key])}" for key in list(content)[:SHOWN]]
    return "; ".join([*shown, *(["…"] if len(content) > SHOWN else [])]) or "an empty object"


def describe_value(value: Any) -> str:
    if isinstance(value, list):
        first = f", the first is {describe_value(value[0])}" if value else ""
        return f"list of {len(value)}{first}"
    if isinstance(value, str | int | float):
        return f"{describe_type(value)}, {printable(repr(value), TEXT)}"
    return describe_type(value)


def describe_npz(data: bytes) -> str:
    """Names, types and shapes of the arrays, from their headers."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_inflated(archive, "npz")
        for entry in archive.infolist()[:SHOWN]:
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read = np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            found[entry.filename.removesuffix(".npy")] = f"{dtype} {list(shape)}"
    return describe_arrays(found)


def describe_tensors(loaded: Any) -> str:
    """Names, types and shapes of the tensors of a ``pth.gz`` or ``safetensors``."""
    if not isinstance(loaded, dict):
        return f"{type(loaded).__name__}, expected a dict of tensors"
    found = {}
    for name, value in islice(loaded.items(), SHOWN):
        is_tensor = isinstance(value, Tensor)
        text = f"{value.dtype} {list(value.shape)}" if is_tensor else type(value).__name__
        found[str(name)] = text.removeprefix("torch.")
    return describe_arrays(found)


def describe_arrays(found: dict[str, str]) -> str:
    return "; ".join(f"{name} {text}" for name, text in found.items()) or "no arrays"


def describe_image(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as img:
        return f"{img.format} image, {img.width}x{img.height}, {img.mode}"


def describe_text(data: bytes) -> str:
    return printable(repr(data[: 4 * TEXT].decode("utf-8", "replace").strip()), TEXT)


def describe_member(extension: str, data: bytes) -> str:
    """The content of a member in a line; what is wrong with it, if it cannot be read."""
    try:
        if extension in IMAGE_MEMBERS:
            return describe_image(data)
        if extension == "npz":
            return describe_npz(data)
        if extension == "pth.gz":
            return describe_tensors(load_pth_gz(data))
        if extension == "safetensors":
            return describe_tensors(safetensors.torch.load(data))
        if extension.rpartition(".")[2] == "json":
            return describe_json(data)
        if extension.rpartition(".")[2] == "txt":
            return describe_text(data)
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        line = f"{type(error).__name__}: {error}"
        return f"cannot be read: {printable(line, 200)}"
    return "not read by training"


# --- judging --------------------------------------------------------------------------------------
def find_fault(members: Members[bytes], compose: Compose, keys: re.Pattern | None) -> str | None:
    """Why training cannot read a sample; None if it can, or lacks only an image or a caption.

    Args:
        members: of the sample, by extension.
        compose: the augmentation that the stored parameters belong to.
        keys: matches the lists of synthetic captions to use; None: all.
    """
    complete = dict(members)
    has_image = not members.keys().isdisjoint(IMAGE_MEMBERS)
    if not has_image:
        complete["jpg"] = b""  # stands in, so that training's code reads the rest
    complete.setdefault("txt", b"a caption")
    try:
        select(complete, compose, RandomChoice(), list_keys=keys)
        if has_image:
            decode_image(members)
    except BadSample as error:
        return printable(error, 300)
    except Exception as error:  # an unforeseen one would end a training
        return printable(f"{type(error).__name__}: {error}", 300)
    return None


def print_sample(number: int, key: str, members: Members[bytes]) -> None:
    print(f"\nsample {number}: {printable(key, 80)}")
    width = max((len(printable(name, 40)) for name in members), default=0)
    for name, data in members.items():
        unknown = "" if name in KNOWN_MEMBERS else " (unknown extension)"
        content = printable(describe_member(name, data), LINE) + unknown
        print(f"  {printable(name, 40):<{width}}  {len(data):>11,} bytes  {content}")


# --- the command ----------------------------------------------------------------------------------
def parse_regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = (
        "a tar, or hf://OWNER/NAME/PATH of a data set on the Hub, or hf://OWNER/NAME for its first "
        "shard; default: the first shard of --dataset on the Hub"
    )
    add("shard", nargs="?", metavar="SHARD", help=text)
    add_dataset_option(parser, "data set that the shard belongs to: sets --config")
    text = "samples to read, from the first; default %(default)s"
    add("--samples", type=int, default=3, metavar="N", help=text)
    text = (
        "config that the set was reinforced with; default: that of --dataset, or "
        f"configs/{DEFAULT_CONFIG.name}"
    )
    add("--config", type=Path, help=text)
    text = (
        "keys of the lists of synthetic captions to use, as in training's option "
        "--dataset-reinforcement-syn-text-key-regex"
    )
    add("--syn-text-key-regex", type=parse_regex, metavar="R", help=text)
    args = parser.parse_args(arguments)
    dataset = DATASETS[args.dataset] if args.dataset else None
    if not args.shard and not dataset:
        parser.error("expected SHARD or --dataset")
    check_least(parser, args, 1, "samples")
    args.config = args.config or (dataset.config_path if dataset else DEFAULT_CONFIG)
    return args


def choose_shard(args: argparse.Namespace) -> Path | HubShard:
    if not args.shard:
        return HubShard.first_of(DATASETS[args.dataset])
    return HubShard.parse(args.shard) if args.shard.startswith("hf://") else Path(args.shard)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    compose = read_config(args.config).compose
    shard = choose_shard(args)
    print(f"{printable(shard)}: the first {args.samples} samples")
    count, counts, lacks, faults = 0, Counter[str](), Counter[str](), Counter[str]()
    damage = None
    try:
        with open_shard(shard) as stream:
            for key, members in islice(read_samples(stream, lambda _: True), args.samples):
                print_sample(count, key, members)
                fault = find_fault(members, compose, args.syn_text_key_regex)
                lacking = missing(members, PLAIN_MEMBERS)
                print("  " + describe_verdict(fault, lacking))
                counts.update(list(members))
                lacks.update(lacking)
                faults.update([fault] if fault else [])
                count += 1
    except tarfile.TarError as error:
        damage = f"not a whole, uncompressed tar: {printable(error)}"
    except LimitReached:
        damage = f"its first {count + 1} samples have over {MAX_READ} bytes"
    print(f"\n{count:,} samples read")
    for name, number in counts.items():
        print(f"  {number:>6,} with {printable(name, 40)}")
    if count and "url.txt" not in counts:
        print("  no image URLs (url.txt)")
    print(conclude(count, lacks, faults, damage))
    if faults or damage or not count:
        raise SystemExit(1)


def describe_verdict(fault: str | None, lacking: list[str]) -> str:
    if fault:
        return f"training cannot read it: {fault}"
    if lacking:
        lacks = " and ".join(lack.removeprefix("lacks ") for lack in lacking)
        return f"training can read its reinforcements; it lacks {lacks}"
    return "training can read it"


def conclude(count: int, lacks: Counter[str], faults: Counter[str], damage: str | None) -> str:
    """The last line: whether training can read the samples, and what to do."""
    if damage:
        return f"training cannot read this shard: {damage}"
    if not count:
        return "training cannot read this shard: it has no samples"
    if faults:
        return (
            f"training cannot read {faults.total()} of these {count} samples; most: "
            f"{faults.most_common(1)[0][0]}"
        )
    if lacks:
        found = ", ".join(
            f"{number} lack {lack.removeprefix('lacks ')}" for lack, number in lacks.items()
        )
        return (
            f"training can read the reinforcements of these {count} samples; {found}: the join "
            "(scripts/join_shards.py) takes these from other shards"
        )
    return f"training can read these {count} samples"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for captions beyond the terminal's letters
    run_command(main, interrupted="nothing was changed")
