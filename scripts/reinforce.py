"""Reinforce a data set: store teachers' embeddings of each sample's augmented images and captions.

    python scripts/reinforce.py --input 'DIR/{00000000..00001023}.tar' --output DIR \\
        --config configs/datacompdr12m.json --synthetic-captions captions

The script reads image-caption shards, as `scripts/make_shards.py` and `scripts/join_shards.py
--require image,caption` make them. For each it writes one reinforcement shard of the same name,
with the members of DataCompDR: `<uid>.url.txt` (if the sample has it), `.syn.json`, `.paug.json`,
`.npz` (or, in bfloat16, `.safetensors` or `.pth.gz`), and `.json` with the image's sha256.

The config names the teachers (`model_name` and `pretrained`, separated by commas: OpenCLIP model
names or model config files; OpenCLIP tags or checkpoint files, which are empty for a model name
`hf-hub:…`), the number of augmentations (`num_samples`), and the augmentation. Each augmentation is
sampled once. If teachers differ in input size or interpolation, it is applied again at each one's
own, as for students in training. Each teacher has its own normalisation. Teachers run in float32
unless --precision says otherwise. `reinforce.json` in the output folder records the
settings, and of each teacher its preprocessing, width, and learned logit scale and bias.

Synthetic captions are lines of JSON: `{"uid": …, "syn_text": [str, …]}`, in one file, which is kept
in memory, or in a folder with a file `<shard>.jsonl` for each shard, as `scripts/caption.py` writes
them. Several captioners have several keys, which start with `syn_text`. Captions under the only key
`syn_text` are stored as in DataCompDR, all others as in DFNDR.

Samples are skipped and counted by reason if they lack an image, a caption or synthetic captions, or
if their image, json or uid cannot be used. Blank synthetic captions are not stored. A
shard fails, with an error message of one line, if it is damaged or cut off, if its captions are, or
if all its samples are skipped. The other shards are reinforced, and the exit status is 1.

Under torchrun the ranks share the shards; several machines can share them by --task-index and
--task-count. A shard gets its name when it is complete, so the command can be run again: finished
shards are skipped. The augmentations of a sample depend only on --seed and its uid.

Memory: the teachers and one batch. A batch has at most --batch-size plus `num_samples` augmented
images for each input size, as bytes; one teacher's images are also floats. Each worker adds two
samples.

The script does not make synthetic captions (scripts/caption.py does), and downloads nothing but
OpenCLIP's own weights.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from lib.captions import KEY, Captions, SyntheticCaptions
from lib.config import ReinforcementConfig, read_config
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
from lib.tar_writer import write_tar
from lib.tasks import RANK, WORLD_SIZE, add_task_options, check_task, select_share
from lib.teachers import Teacher, adapt_crops, to_bytes
from torch.utils.data import DataLoader
from tqdm import tqdm

from dr.sample import (
    IMAGE_MEMBERS,
    PLAIN_MEMBERS,
    BadSample,
    bound_caption,
    decode_image,
    first_member,
    original_captions,
)
from dr.tar import Members
from dr.transforms import Compose

SETTINGS = "reinforce.json"  # in the output folder: how its shards were made


class Augmenter:
    """Samples the augmentations of a sample, and applies them.

    Args:
        compose, crops: the augmentation, as it is and as each teacher sees it; see
            :func:`lib.teachers.adapt_crops`.
        augmentations: number for each sample.
        captions: synthetic captions by uid.
        seed: of the augmentations.
    """

    def __init__(
        self,
        compose: Compose,
        crops: Sequence[Compose],
        augmentations: int,
        captions: Captions,
        seed: int,
    ) -> None:
        self.compose, self.augmentations = compose, augmentations
        self.captions, self.seed = captions, seed
        self.crops = list(dict.fromkeys(crops))  # each once

    def __call__(self, uid: str, members: Members[bytes], about: dict[str, Any]) -> Sample:
        """The parts of a sample's reinforcements, and ``images``, one tensor for each crop.

        Raises:
            BadSample: it lacks synthetic captions, or its image or caption is unreadable.
        """
        if uid not in self.captions:
            raise BadSample("no synthetic captions")
        lists = {
            key: [bound_caption(text) for text in texts]
            for key, texts in self.captions[uid].items()
            if texts
        }
        if not lists:
            raise BadSample("no usable synthetic caption", "the list is empty, or all are blank")
        sha256 = about.get("sha256")
        _, image = first_member(members, IMAGE_MEMBERS)
        img = decode_image(members)
        digest = hashlib.sha256(f"{self.seed} {uid}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        try:
            sampled = [self.compose(img) for _ in range(self.augmentations)]
            params = [params for _, params in sampled]
            images = [
                [augmented for augmented, _ in sampled]
                if crop is self.compose
                else [crop.reapply(img, stored)[0] for stored in params]
                for crop in self.crops
            ]
        except ValueError as error:  # of torchvision: a random_crop larger than the image
            raise BadSample("augmentation", error) from error
        return {
            "sha256": sha256 if isinstance(sha256, str) else hashlib.sha256(image).hexdigest(),
            "url": members.get("url.txt"),
            "images": [torch.stack(list(map(to_bytes, views))) for views in images],
            "params": [self.compose.compress(stored) for stored in params],
            "captions": original_captions(members),
            "synthetic": lists,
        }


def encode_members(
    sample: Sample, image_emb: torch.Tensor, text_emb: torch.Tensor, extension: str
) -> dict[str, bytes]:
    """The members of a sample of a reinforcement shard, by extension.

    Args:
        sample: as :class:`Augmenter` makes it.
        image_emb: ``[A, ΣD_k]``.
        text_emb: ``[C + S, ΣD_k]``, of the original and the synthetic captions.
        extension: of the embeddings' member, ``npz`` (float32), ``safetensors`` or ``pth.gz``
            (both bfloat16).
    """
    lists: dict[str, list[str]] = sample["synthetic"]
    embeddings = {"image_emb": image_emb, "text_emb": text_emb}
    if list(lists) != [KEY]:  # DFNDR's layout
        counts = [len(sample["captions"]), *map(len, lists.values())]
        originals, *parts = text_emb.split(counts)
        embeddings["text_emb"] = originals
        embeddings |= {f"{key}_emb": part for key, part in zip(lists, parts, strict=True)}
    stream, members = io.BytesIO(), dict[str, bytes]()
    if sample["url"]:
        members["url.txt"] = sample["url"]
    members["syn.json"] = json.dumps(lists).encode()
    members["paug.json"] = json.dumps({"param_aug": sample["params"]}).encode()
    if extension == "npz":
        np.savez(stream, **{name: rows.numpy() for name, rows in embeddings.items()})  # type: ignore[arg-type]
        members[extension] = stream.getvalue()
    else:
        rounded = {name: rows.bfloat16().contiguous() for name, rows in embeddings.items()}
        if extension == "safetensors":
            members[extension] = safetensors.torch.save(rounded)
        else:
            torch.save(rounded, stream)
            members[extension] = gzip.compress(stream.getvalue(), mtime=0)
    members["json"] = json.dumps({"uid": sample["uid"], "sha256": sample["sha256"]}).encode()
    return members


def make_batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Group samples until a group has ``size`` augmented images or more, or no sample is left."""
    batch: list[Sample] = []
    images = 0
    for sample in samples:
        batch.append(sample)
        images += len(sample["params"])
        if images >= size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def embed_samples(
    samples: Iterable[Sample],
    teachers: Sequence[Teacher],
    views: Sequence[int],
    batch_size: int,
    extension: str,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield ``(uid, members)`` of the samples of a reinforcement shard.

    Args:
        samples: as :class:`Augmenter` makes them.
        teachers: K of them.
        views: which of a sample's ``images`` each teacher takes.
        batch_size: augmented images to embed at a time.
        extension: of the embeddings' members, as for :func:`encode_members`.
    """
    for number, batch in enumerate(make_batches(samples, batch_size)):
        texts = [[*s["captions"], *chain.from_iterable(s["synthetic"].values())] for s in batch]
        captions = list(chain.from_iterable(texts))
        parts = []
        for teacher, view in zip(teachers, views, strict=True):
            images = torch.cat([sample["images"][view] for sample in batch])
            embedded = teacher.embed(images, captions)
            if number == 0:
                teacher.check_batch(images, captions, *embedded)
            parts.append(embedded)
        image_emb, text_emb = (torch.cat(rows, dim=1) for rows in zip(*parts, strict=True))
        image_parts = image_emb.split([len(sample["params"]) for sample in batch])
        text_parts = text_emb.split(list(map(len, texts)))
        for sample, image_rows, text_rows in zip(batch, image_parts, text_parts, strict=True):
            yield sample["uid"], encode_members(sample, image_rows, text_rows, extension)


def reinforce_shard(
    shard: str,
    augmenter: Augmenter,
    teachers: Sequence[Teacher],
    views: Sequence[int],
    args: argparse.Namespace,
    skipped: Counter[str],
    bar: tqdm,
) -> tuple[int, set[str]]:
    """Write one shard, and count the skipped samples by reason.

    Args:
        shard: path of the image-caption shard.
        augmenter: with the captions of the shard.
        teachers, views: see :func:`embed_samples`.
        args: of the command.
        skipped: receives the counts.
        bar: advances by the bytes read.

    Returns:
        how many samples were written, and the uids of all that were read.

    Raises:
        ShardError: the shard is damaged, or no sample is left. Nothing was written.
    """
    dataset = ShardSamples(shard, PLAIN_MEMBERS, augmenter)
    loader = DataLoader(dataset, batch_size=None, num_workers=args.workers)
    lost, uids = Counter[str](), set[str]()
    usable = skip_bad_samples(loader, shard, lost, uids, bar)
    samples = embed_samples(usable, teachers, views, args.batch_size, args.format)
    output = args.output / os.path.basename(shard)

    def write(file: BinaryIO) -> int:
        written = write_tar(file, samples)
        if not written:
            raise no_sample_left(lost)
        return written

    remove_leftovers(output)
    try:
        return publish(output, write), uids
    finally:
        skipped.update(lost)


def check_settings(
    args: argparse.Namespace, config: ReinforcementConfig, captions: SyntheticCaptions
) -> dict[str, Any]:
    """How the shards are made; exits with a line if the folder's were made otherwise."""
    named = [name for pair in config.teachers for name in pair]
    files = list(filter(os.path.isfile, [str(captions.settings), *named]))
    settings = {
        "config": config.fields,
        "format": args.format,
        "precision": args.precision,
        "seed": args.seed,
        "sha256": {name: hash_file(Path(name)) for name in files},
    }
    recorded = args.output / SETTINGS
    if recorded.exists():
        found = json.loads(recorded.read_text())
        found.pop("teachers", None)  # follow from the config
        if found != settings:
            raise SystemExit(
                f"error: the shards in {args.output} were made with other settings (see "
                f"{recorded}): choose another folder"
            )
    return settings


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, help="image-caption shards, as a brace pattern")
    add("--output", required=True, type=Path, help="folder for the reinforcement shards")
    add("--config", required=True, type=Path, help="reinforcement config, as in configs/")
    text = "lines of JSON with uid and syn_text: a file, or a folder with one for each shard"
    add("--synthetic-captions", required=True, type=Path, help=text)
    text = "store float32 (npz) or bfloat16 (safetensors or pth.gz); default %(default)s"
    add("--format", choices=["npz", "safetensors", "pth.gz"], default="npz", help=text)
    text = "precision of the teachers: bf16 is autocast, pure_bf16 also takes half the memory for "
    text += "weights; default %(default)s"
    add("--precision", choices=["fp32", "bf16", "pure_bf16"], default="fp32", help=text)
    text = "augmented images to embed at a time; default %(default)s"
    add("--batch-size", type=int, default=256, help=text)
    text = "processes of each rank that decode and augment; default %(default)s"
    add("--workers", type=int, default=0, help=text)
    text = "seed of the augmentations; default %(default)s"
    add("--seed", type=int, default=0, help=text)
    add_task_options(parser)
    args = parser.parse_args(arguments)
    check_task(parser, args)
    check_least(parser, args, 1, "batch_size")
    check_least(parser, args, 0, "workers")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = read_config(args.config)
    config.need("model_name", "pretrained", "num_samples")
    captions = SyntheticCaptions(args.synthetic_captions)
    if captions.blank and RANK == 0:
        blank = f"{captions.blank} captions are blank"
        print(f"warning: {args.synthetic_captions}: {blank}", file=sys.stderr)
    shards = find_shards(args.input, args.output)
    own = select_share(shards, args.task_index, args.task_count)[RANK::WORLD_SIZE]
    settings = check_settings(args, config, captions)

    todo = [shard for shard in own if not (args.output / os.path.basename(shard)).exists()]
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    teachers = [Teacher(*teacher, device, args.precision) for teacher in config.teachers if todo]
    compose, crops = adapt_crops(config, teachers)
    if todo:
        about = [teacher.describe() for teacher in teachers]
        publish_json(args.output / SETTINGS, {**settings, "teachers": about})

    def process(shard: str, skipped: Counter[str], bar: tqdm) -> int:
        found = captions.of_shard(os.path.basename(shard))
        augmenter = Augmenter(compose, crops, config.augmentations, found, args.seed)
        views = [augmenter.crops.index(crop) for crop in crops]
        written, uids = reinforce_shard(shard, augmenter, teachers, views, args, skipped, bar)
        if captions.in_shards and (others := len(found.keys() - uids)):
            skipped["captions without a sample"] += others
        return written

    process_shards(todo, process, "reinforce", "reinforced")


if __name__ == "__main__":
    torch.manual_seed(0)
    run_command(main, ShardError)
