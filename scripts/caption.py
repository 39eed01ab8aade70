"""Write synthetic captions of the images of shards, with one of OpenCLIP's CoCa models.

    python scripts/caption.py --input 'DIR/{00000000..00001023}.tar' --output captions \\
        --model coca_ViT-L-14 --pretrained mscoco_finetuned_laion2b_s13b_b90k

For each shard the script writes `<shard>.jsonl` with a line `{"uid": …, "syn_text": [str, …]}` for
each sample, which scripts/reinforce.py reads. The shards need images; captions are not read.

To use several captioners, run the script for one after the other with the same --output, each with
a --key that starts with `syn_text`: the line of a sample gets a list for each.

The model is an OpenCLIP model name, a model config file, or `hf-hub:ORGANISATION/REPOSITORY`; its
weights are an OpenCLIP tag or a checkpoint file (none for `hf-hub:…`). Captions are sampled
(--top-p, --temperature), or are the best of a beam search (--beams). Blank captions and
repeats are sampled again, up to four times, so a sample may have fewer captions in the end.
Captions depend on --seed and the uid, and are the same in each run on one kind of machine. (Another
--batch-size or another device rounds differently, which may change a word.)

Samples without an image, or whose image, json or uid cannot be used, are skipped and counted by
reason. A shard fails, with an error message of one line, if it is damaged or cut off, or if all its
samples are skipped. The other shards are captioned, and the exit status is 1.

Under torchrun the ranks share the shards; several machines can share them by --task-index and
--task-count. A file gets its name when it is complete, so the command can be run again: finished
shards are skipped. `caption.json` in the output folder records the settings of each key.

Memory: besides the model, one batch of images, and for each of its captions the image's tokens.

Another script, scripts/caption_shards.py, looks up the original captions of DataCompDR-1B.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lib.captioner import Captioner, Sampling
from lib.captions import (
    KEY,
    SETTINGS,
    Captions,
    captions_path,
    find_captions,
    has_captions,
    is_key,
    read_captions,
)
from lib.publish import hash_file, publish, publish_json, remove_leftovers
from lib.report import check_least, run_command
from lib.samples import (
    Sample,
    ShardSamples,
    find_shards,
    no_sample_left,
    process_shards,
    skip_bad_samples,
)
from lib.shards import ShardError
from lib.tasks import RANK, WORLD_SIZE, add_task_options, check_task, select_share
from torch.utils.data import DataLoader
from tqdm import tqdm

from dr.sample import decode_image
from dr.tar import IMAGE_MEMBERS, Members


class Preprocessor:
    """Decodes and preprocesses the image of a sample.

    Args:
        preprocess: the captioner's.
    """

    def __init__(self, preprocess: Any) -> None:
        self.preprocess = preprocess

    def __call__(self, uid: str, members: Members[bytes], about: dict[str, Any]) -> Sample:
        return {"image": self.preprocess(decode_image(members))}


def caption_samples(
    samples: Iterable[Sample], captioner: Captioner, how: Sampling, batch_size: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield uid and captions of samples."""
    samples = iter(samples)
    while batch := list(islice(samples, batch_size)):
        images, uids = torch.stack([s["image"] for s in batch]), [s["uid"] for s in batch]
        yield from zip(uids, captioner.write_captions(images, uids, how), strict=True)


def caption_shard(
    shard: str,
    captioner: Captioner,
    how: Sampling,
    args: argparse.Namespace,
    skipped: Counter[str],
    bar: tqdm,
) -> int:
    """Write the captions of a shard, and count the skipped samples by reason.

    Captions under other keys stay.

    Returns:
        how many samples were captioned.

    Raises:
        ShardError: the shard is damaged, or no sample is left. Nothing was written.
    """
    name = os.path.basename(shard)
    before = find_captions(args.output, name)
    lines: Captions = read_captions(before)[0] if before else {}
    dataset = ShardSamples(shard, {"an image": IMAGE_MEMBERS}, Preprocessor(captioner.preprocess))
    loader = DataLoader(dataset, batch_size=None, num_workers=args.workers)
    lost = Counter[str]()
    usable = skip_bad_samples(loader, shard, lost, set(), bar)

    def write(file: BinaryIO) -> int:
        number, fewer = 0, 0
        for uid, captions in caption_samples(usable, captioner, how, args.batch_size):
            fewer += len(captions) < how.captions
            lists = {**lines.pop(uid, {}), args.key: captions}
            file.write(encode_line(uid, lists))
            number += 1
        if not number:
            raise no_sample_left(lost)
        for uid, lists in lines.items():
            file.write(encode_line(uid, lists))
        if fewer:
            bar.write(f"{shard}: {fewer} samples have under {how.captions} captions", sys.stderr)
        return number

    path = captions_path(args.output, name)
    remove_leftovers(path)
    try:
        return publish(path, write)
    finally:
        skipped.update(lost)


def is_finished(shard: str, args: argparse.Namespace) -> bool:
    """Whether a shard has captions under the key; a damaged file of captions is not finished."""
    path = find_captions(args.output, os.path.basename(shard))
    try:
        return path is not None and has_captions(path, args.key)
    except ShardError:
        return False  # captioning reports what is wrong


def encode_line(uid: str, lists: dict[str, list[str]]) -> bytes:
    return json.dumps({"uid": uid, **lists}).encode() + b"\n"


def check_settings(args: argparse.Namespace, how: Sampling) -> dict[str, Any]:
    """How the captions of all keys are made; exits with a line if others are under this key."""
    files = filter(os.path.isfile, [args.model, args.pretrained])
    settings = {
        "model": args.model,
        "pretrained": args.pretrained,
        "precision": args.precision,
        **how._asdict(),
        "sha256": {name: hash_file(Path(name)) for name in files},
    }
    path = args.output / SETTINGS
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if recorded.setdefault(args.key, settings) != settings:
        raise SystemExit(
            f"error: the captions under {args.key} in {args.output} were made with other settings "
            f"(see {path}): choose another --key or another --output"
        )
    if not path.exists() and next(args.output.glob("*.jsonl*"), None):
        raise SystemExit(
            f"error: {args.output} has captions that this script did not make (there is no "
            f"{SETTINGS}): choose another folder"
        )
    return recorded


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Sampling()
    add("--input", required=True, help="shards with images, as a brace pattern")
    add("--output", required=True, type=Path, help="folder for the files of captions")
    add("--model", required=True, help="OpenCLIP model name, model config file, or hf-hub:NAME")
    text = "OpenCLIP tag or checkpoint file; none for hf-hub:NAME"
    add("--pretrained", default="", help=text)
    text = "key of the stored captions; default %(default)s"
    add("--key", default=KEY, help=text)
    text = "captions of each image; default %(default)s"
    add("--captions", type=int, default=default.captions, help=text)
    text = "total probability of the tokens to sample from; default %(default)s"
    add("--top-p", type=float, default=default.top_p, help=text)
    text = "sampling temperature; default %(default)s"
    add("--temperature", type=float, default=default.temperature, help=text)
    text = "search with this number of beams instead of sampling"
    add("--beams", type=int, default=default.beams, help=text)
    text = "maximum number of tokens of a caption; default %(default)s"
    add("--max-tokens", type=int, default=default.max_tokens, help=text)
    add("--seed", type=int, default=default.seed, help="random seed; default %(default)s")
    text = "precision of the model; bf16 is autocast; default %(default)s"
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=text)
    add("--batch-size", type=int, default=64, help="images at a time; default %(default)s")
    text = "processes of each rank that decode images; default %(default)s"
    add("--workers", type=int, default=0, help=text)
    add_task_options(parser)
    args = parser.parse_args(arguments)
    check_task(parser, args)
    check_least(parser, args, 1, "captions", "max_tokens", "batch_size")
    check_least(parser, args, 0, "workers", "beams")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: expected a probability over 0, at most 1")
    if not args.temperature > 0:
        parser.error(f"--temperature {args.temperature}: expected a number over 0")
    if args.beams and args.beams < args.captions:
        parser.error(f"--beams {args.beams}: expected as many as --captions, {args.captions}")
    if not is_key(args.key):
        parser.error(f"--key {args.key}: expected {KEY}, or a name that starts with it")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    how = Sampling(**{field: getattr(args, field) for field in Sampling._fields})
    shards = find_shards(args.input, args.output)
    own = select_share(shards, args.task_index, args.task_count)[RANK::WORLD_SIZE]
    settings = check_settings(args, how)
    todo = [shard for shard in own if not is_finished(shard, args)]
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    if todo:
        captioner = Captioner(args.model, args.pretrained, device, args.precision)
        if how.max_tokens > captioner.max_tokens:
            raise SystemExit(
                f"error: --max-tokens {how.max_tokens}: {args.model} writes at most "
                f"{captioner.max_tokens}"
            )
        publish_json(args.output / SETTINGS, settings)

    def process(shard: str, skipped: Counter[str], bar: tqdm) -> int:
        return caption_shard(shard, captioner, how, args, skipped, bar)

    process_shards(todo, process, "caption", "captioned")


if __name__ == "__main__":
    run_command(main, ShardError)
