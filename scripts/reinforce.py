"""Reinforce a data set: store teachers' embeddings of each sample's augmented images and captions.

    python scripts/reinforce.py --input 'DIR/{00000000..00001023}.tar' --output DIR \\
        --config configs/datacompdr12m.json --synthetic-captions captions.jsonl

The script reads image-caption shards, as `scripts/join_shards.py --require image,caption` makes
them. For each it writes one reinforcement shard of the same name, with the members of DataCompDR:
`<uid>.url.txt` (if the sample has it), `.syn.json`, `.paug.json`, `.npz` (or `.pth.gz`, in
bfloat16), and `.json` with the image's sha256.

The config names the teachers (`model_name` and `pretrained`, separated by commas: OpenCLIP model
names or model config files; OpenCLIP tags or checkpoint files), the number of augmentations
(`num_samples`), and the augmentation. Synthetic captions are lines of JSON:
`{"uid": …, "syn_text": [str, …]}`. Teachers run in float32 unless --precision says otherwise.

These samples are skipped and counted by reason: samples that lack an image, a caption or synthetic
captions, or whose image, json or uid cannot be used. Blank synthetic captions are not stored. A
shard fails, with an error message of one line, if it is damaged or cut off, or if all its samples
are skipped. The other shards are reinforced, and the exit status is 1.

Under torchrun the ranks share the shards. A shard gets its name when it is complete, so the command
can be run again: finished shards are skipped. The augmentations of a sample depend only on --seed
and its uid.

The script does not make synthetic captions, and downloads nothing but OpenCLIP's own weights.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from lib.captions import read_synthetic_captions
from lib.config import ReinforcementConfig, read_config
from lib.publish import publish, publish_json, remove_leftovers
from lib.report import printable, run_command
from lib.shards import (
    FORBIDDEN_NAME,
    MAX_NAME,
    ShardError,
    expand_braces,
    is_forbidden,
    parse_json_object,
    parse_uid,
    strip_name,
)
from lib.tar_writer import write_tar
from lib.teachers import Teacher
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from dr.sample import (
    IMAGE_MEMBERS,
    PLAIN_MEMBERS,
    BadSample,
    bound_caption,
    caption,
    check_members,
    decode_image,
    first_member,
)
from dr.tar import Members, read_samples
from dr.transforms import Compose

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SETTINGS = "reinforce.json"  # in the output folder: how its shards were made
READ_MEMBERS = (*IMAGE_MEMBERS, "txt", "json", "url.txt")

Sample = dict[str, Any]  # as AugmentedShard yields it


class AugmentedShard(IterableDataset):
    """The samples of a shard with their augmentations, in order, for any number of workers.

    Args:
        shard: path of the tar.
        compose: the augmentation, without normalisation.
        augmentations: number for each sample.
        synthetic: synthetic captions by uid.
        seed: of the augmentations.
    """

    def __init__(
        self,
        shard: str,
        compose: Compose,
        augmentations: int,
        synthetic: dict[str, list[str]],
        seed: int,
    ) -> None:
        self.shard, self.compose, self.augmentations = shard, compose, augmentations
        self.synthetic, self.seed = synthetic, seed

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples; or ``skipped``, why one cannot be used; or ``damage``, of the tar."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            with open(self.shard, "rb") as file:
                samples = read_samples(file, READ_MEMBERS.__contains__, whole=True)
                for index, (key, members) in enumerate(samples):
                    if index % step == first:
                        try:
                            yield self.augment(key, members)
                        except BadSample as error:
                            yield {"uid": key, "skipped": error.reason, "detail": str(error)}
        except (tarfile.TarError, OSError) as error:  # a worker would add its traceback
            yield {"damage": str(error)}

    def augment(self, key: str, members: Members[bytes]) -> Sample:
        """Sample the augmentations of a sample, and apply them.

        Raises:
            BadSample: it lacks something, or has something unreadable.
        """
        check_members(members, PLAIN_MEMBERS)
        try:
            about = parse_json_object(members.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise BadSample("unreadable json", error) from error
        try:
            if is_forbidden(strip_name(key)):
                raise ValueError(FORBIDDEN_NAME)
            uid = parse_uid(about.get("uid", strip_name(key)))
        except ValueError as error:
            raise BadSample(str(error)) from error
        if len(os.fsencode(f"{uid}.paug.json")) > MAX_NAME:
            raise BadSample(f"a name of over {MAX_NAME} bytes")
        if uid not in self.synthetic:
            raise BadSample("no synthetic captions")
        synthetic = [bound_caption(text) for text in self.synthetic[uid]]
        if not synthetic:
            raise BadSample("no usable synthetic caption", "the list is empty, or all are blank")
        sha256 = about.get("sha256")
        _, image = first_member(members, IMAGE_MEMBERS)
        img = decode_image(members)
        digest = hashlib.sha256(f"{self.seed} {uid}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        augmented = [self.compose(img) for _ in range(self.augmentations)]
        return {
            "uid": uid,
            "sha256": sha256 if isinstance(sha256, str) else hashlib.sha256(image).hexdigest(),
            "url": members.get("url.txt"),
            "images": torch.stack([image for image, _ in augmented]),
            "params": [self.compose.compress(params) for _, params in augmented],
            "captions": [caption(members), *synthetic],
        }


def encode_members(
    sample: Sample, image_emb: torch.Tensor, text_emb: torch.Tensor, as_bf16: bool
) -> dict[str, bytes]:
    """The members of a sample of a reinforcement shard, by extension.

    Args:
        sample: as :class:`AugmentedShard` yields it.
        image_emb: ``[A, ΣD_k]``.
        text_emb: ``[1 + S, ΣD_k]``.
        as_bf16: whether to store bfloat16.
    """
    embeddings = {"image_emb": image_emb, "text_emb": text_emb}
    stream, members = io.BytesIO(), dict[str, bytes]()
    if sample["url"]:
        members["url.txt"] = sample["url"]
    members["syn.json"] = json.dumps({"syn_text": sample["captions"][1:]}).encode()
    members["paug.json"] = json.dumps({"param_aug": sample["params"]}).encode()
    if as_bf16:
        torch.save({name: rows.to(torch.bfloat16) for name, rows in embeddings.items()}, stream)
        members["pth.gz"] = gzip.compress(stream.getvalue(), mtime=0)
    else:
        np.savez(stream, **{name: rows.numpy() for name, rows in embeddings.items()})  # type: ignore[arg-type]
        members["npz"] = stream.getvalue()
    members["json"] = json.dumps({"uid": sample["uid"], "sha256": sample["sha256"]}).encode()
    return members


def make_batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Group samples until a group has ``size`` augmented images or more, or no sample is left."""
    batch: list[Sample] = []
    images = 0
    for sample in samples:
        batch.append(sample)
        images += len(sample["images"])
        if images >= size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def skip_bad_samples(
    samples: Iterable[Sample], shard: str, skipped: Counter[str]
) -> Iterator[Sample]:
    """Yield the usable samples, and count the others; raises ShardError if the shard is damaged."""
    seen = set[str]()
    for sample in samples:
        if "damage" in sample:
            raise ShardError(f"not a whole tar: {sample['damage']}")
        if "skipped" not in sample and sample["uid"] in seen:
            reason = "a uid twice in one shard"
            sample = {"uid": sample["uid"], "skipped": reason, "detail": reason}
        if "skipped" in sample:
            skipped[sample["skipped"]] += 1
            uid, detail = printable(sample["uid"]), printable(sample["detail"], 1000)
            print(f"warning: skipped sample {uid} of {shard}: {detail}", file=sys.stderr)
        else:
            seen.add(sample["uid"])
            yield sample


def embed_samples(
    samples: Iterable[Sample], teachers: Sequence[Teacher], batch_size: int, as_bf16: bool
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield ``(uid, members)`` of the samples of a reinforcement shard."""
    for batch in make_batches(samples, batch_size):
        images = torch.cat([sample["images"] for sample in batch])
        captions = [text for sample in batch for text in sample["captions"]]
        embedded = [teacher.embed(images, captions) for teacher in teachers]
        image_emb = torch.cat([image_rows for image_rows, _ in embedded], dim=1)
        text_emb = torch.cat([text_rows for _, text_rows in embedded], dim=1)
        image_parts = image_emb.split([len(sample["images"]) for sample in batch])
        text_parts = text_emb.split([len(sample["captions"]) for sample in batch])
        for sample, image_rows, text_rows in zip(batch, image_parts, text_parts, strict=True):
            yield sample["uid"], encode_members(sample, image_rows, text_rows, as_bf16)


def reinforce_shard(
    dataset: AugmentedShard,
    output: Path,
    teachers: Sequence[Teacher],
    args: argparse.Namespace,
    skipped: Counter[str],
) -> int:
    """Write one shard, and count the skipped samples by reason; returns how many were written.

    Raises:
        ShardError: the shard is damaged, or no sample is left. Nothing was written.
    """
    lost = Counter[str]()
    loader = DataLoader(dataset, batch_size=None, num_workers=args.workers)
    usable = skip_bad_samples(loader, dataset.shard, lost)
    samples = embed_samples(usable, teachers, args.batch_size, args.format == "pth.gz")

    def write(file: BinaryIO) -> int:
        written = write_tar(file, samples)
        if not written:
            reasons = ", ".join(f"{number} {reason}" for reason, number in lost.items())
            raise ShardError(f"no sample would be left: {reasons or 'the shard is empty'}")
        return written

    remove_leftovers(output)
    try:
        return publish(output, write)
    finally:
        skipped.update(lost)


def wait_for_other_ranks() -> None:
    """Under torchrun, wait until all ranks are done: one that fails would end the others."""
    if dist.is_torchelastic_launched() and WORLD_SIZE > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()


def check_settings(args: argparse.Namespace, config: ReinforcementConfig) -> None:
    """Record how the shards are made; exits with a line if the folder's were made otherwise."""
    named = [name for pair in config.teachers for name in pair]
    files = [str(args.synthetic_captions), *filter(os.path.isfile, named)]
    settings = {
        "config": config.fields,
        "format": args.format,
        "precision": args.precision,
        "seed": args.seed,
        "sha256": {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files},
    }
    recorded = args.output / SETTINGS
    if recorded.exists() and json.loads(recorded.read_text()) != settings:
        raise SystemExit(
            f"error: the shards in {args.output} were made with other settings (see {recorded}): "
            "choose another folder"
        )
    publish_json(recorded, settings)


def find_shards(pattern: str, output: Path) -> list[str]:
    """The input shards; exits with a line if some are missing, have the same name, or are the
    output's."""
    shards = expand_braces(pattern)
    absent = [shard for shard in shards if not os.path.isfile(shard)]
    if absent:
        raise SystemExit(
            f"error: {len(absent)} of {len(shards)} shards of --input are missing, the first is "
            f"{absent[0]}"
        )
    if len({os.path.basename(shard) for shard in shards}) < len(shards):
        raise SystemExit(
            "error: --input names several shards of one file name: reinforce each folder into an "
            "--output of its own"
        )
    for shard in shards:
        if os.path.realpath(shard) == os.path.realpath(output / os.path.basename(shard)):
            raise SystemExit(
                f"error: --output {output} is the folder of --input {shard}: choose another folder"
            )
    return shards


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, help="image-caption shards, as a brace pattern")
    add("--output", required=True, type=Path, help="folder for the reinforcement shards")
    add("--config", required=True, type=Path, help="reinforcement config, as in configs/")
    text = "lines of JSON with uid and syn_text"
    add("--synthetic-captions", required=True, type=Path, help=text)
    text = "store float32 (npz) or bfloat16 (pth.gz); default %(default)s"
    add("--format", choices=["npz", "pth.gz"], default="npz", help=text)
    text = "precision of the teachers; default %(default)s"
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=text)
    text = "augmented images to embed at a time; default %(default)s"
    add("--batch-size", type=int, default=256, help=text)
    text = "processes of each rank that decode and augment; default %(default)s"
    add("--workers", type=int, default=0, help=text)
    text = "seed of the augmentations; default %(default)s"
    add("--seed", type=int, default=0, help=text)
    args = parser.parse_args(arguments)
    for option, least in (("batch_size", 1), ("workers", 0)):
        if (value := getattr(args, option)) < least:
            parser.error(f"--{option.replace('_', '-')} {value}: expected at least {least}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = read_config(args.config)
    config.need("model_name", "pretrained", "num_samples")
    compose, augmentations = config.without_normalization(), config.augmentations
    synthetic, blank = read_synthetic_captions(args.synthetic_captions)
    if blank and RANK == 0:
        print(f"warning: {args.synthetic_captions}: {blank} captions are blank", file=sys.stderr)
    own = find_shards(args.input, args.output)[RANK::WORLD_SIZE]
    check_settings(args, config)

    outputs = {shard: args.output / os.path.basename(shard) for shard in own}
    todo = [shard for shard in own if not outputs[shard].exists()]
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    teachers = [Teacher(*teacher, device, args.precision) for teacher in config.teachers if todo]
    for teacher in teachers:
        teacher.check_crop(config)

    skipped, written, failed = Counter[str](), 0, dict[str, str]()
    bar = tqdm(todo, f"reinforce (rank {RANK})", unit="shard", disable=None if RANK == 0 else True)
    for shard in bar:
        dataset = AugmentedShard(shard, compose, augmentations, synthetic, args.seed)
        try:
            written += reinforce_shard(dataset, outputs[shard], teachers, args, skipped)
        except ShardError as error:
            failed[shard] = printable(error, 1000)
            bar.write(f"{shard}: failed: {failed[shard]}", file=sys.stderr)
    reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    print(
        f"rank {RANK}: {len(todo) - len(failed)} shards reinforced, {written} samples"
        + (f"; skipped: {reasons}" if reasons else "")
    )
    sys.stdout.flush()
    wait_for_other_ranks()
    if failed:
        shard, reason = next(iter(failed.items()))
        raise SystemExit(
            f"error: rank {RANK}: {len(failed)} of {len(todo)} shards failed, the first is "
            f"{shard}: {reason}; run it again when they are fixed"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    run_command(main, ShardError)
