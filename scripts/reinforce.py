"""Reinforce a data set: store, for each sample, what teachers make of its augmented images and its captions.

    python scripts/reinforce.py --input 'DIR/{00000000..00001023}.tar' --output DIR \\
        --config configs/datacompdr12m.json --synthetic-captions captions.jsonl

Reads image-caption shards (`scripts/join_shards.py --require image,caption` makes them) and writes one shard of
DataCompDR's layout for each: `<uid>.url.txt` (where there is one), `.syn.json`, `.paug.json`, `.npz` (or `.pth.gz`, in
bfloat16) and `.json` with the image's sha256. The config names the teachers (`model_name` and `pretrained`, each with
commas: OpenCLIP model names or model config files; OpenCLIP tags or checkpoint files), the number of augmentations
(`num_samples`) and the augmentation itself. Synthetic captions are lines `{"uid": …, "syn_text": [str, …]}`.

Under torchrun the ranks share out the shards. A shard is written under a temporary name; run again, finished ones are
skipped. The augmentations of a sample depend on --seed and its uid alone. Teachers run in float32 unless told
otherwise.
Leaves out: making the synthetic captions, and downloading anything but OpenCLIP's own weights.
"""

import argparse
import gzip
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import torch
import webdataset as wds
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe's root, for dr
from dr import checkpoint
from dr.params import register_model
from dr.sample import (
    IMAGE_MEMBERS,
    PLAIN_MEMBERS,
    BadSample,
    caption,
    decode_image,
    first_member,
    missing,
)
from dr.transforms import Compose, compose_from_config

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SETTINGS = "reinforce.json"  # in the output folder: how its shards were made


class Teacher:
    """An OpenCLIP model that embeds images and captions, each to unit length."""

    def __init__(self, name: str, pretrained: str, device: torch.device, precision: str):
        self.device, self.autocast = device, precision == "bf16"
        model_name = register_model(name)
        if os.path.isfile(pretrained):
            logging.disable(logging.WARNING)  # "no pretrained weights": they come now
            model = open_clip.create_model(model_name, device=device)
            logging.disable(logging.NOTSET)
            state = checkpoint.load(pretrained, map_location="cpu")
            state = {
                key.removeprefix("module."): value
                for key, value in state.get("state_dict", state).items()
            }
            model.load_state_dict(state)
        else:
            model = open_clip.create_model(model_name, pretrained=pretrained, device=device)
        self.model, self.tokenizer = model.eval(), open_clip.get_tokenizer(model_name)
        self.mean, self.std = (
            model.visual.preprocess_cfg["mean"],
            model.visual.preprocess_cfg["std"],
        )
        self.size = model.visual.preprocess_cfg["size"]

    @torch.inference_mode()
    def embed(
        self, images: torch.Tensor | None, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed images ``[N, 3, H, W]`` in 0…1 and captions; float32 ``[N, D]`` and ``[captions, D]`` on the CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            normalized = F.normalize(images.to(self.device), list(self.mean), list(self.std))
            image_emb = self.model.encode_image(normalized, normalize=True)
            text_emb = self.model.encode_text(
                self.tokenizer(captions).to(self.device), normalize=True
            )
        return image_emb.float().cpu(), text_emb.float().cpu()


def named_teachers(config: dict, where: Path) -> list[tuple[str, str]]:
    """The teachers of a reinforcement config: model name or config file, and weights, of each."""
    names, weights = config["model_name"].split(","), config["pretrained"].split(",")
    if len(names) != len(weights):
        sys.exit(
            f"error: {where}: model_name has {len(names)} entries and pretrained {len(weights)}: one for each"
        )
    return list(zip(names, weights, strict=True))


def unnormalized(config: dict) -> Compose:
    """The augmentation of a reinforcement config without its normalisation: each teacher has its own."""
    return compose_from_config(
        {k: v for k, v in config["reinforce"]["image_augmentation"].items() if k != "normalize"}
    )


def check_crop(compose: Compose, name: str, teacher: Teacher, where: Path) -> None:
    """End with a line where a teacher takes images of another size than the augmentation gives."""
    crop = compose.transforms["random_resized_crop"].size
    if set(crop) != {teacher.size if isinstance(teacher.size, int) else teacher.size[0]}:
        sys.exit(
            f"error: {where}: the crop is {crop} pixels, but teacher {name} takes {teacher.size}"
        )


class Augmented(IterableDataset):
    """The samples of a shard with their drawn augmentations, in order, whatever the number of workers."""

    def __init__(
        self, shard: str, compose, augmentations: int, synthetic: dict[str, list[str]], seed: int
    ):
        self.shard, self.compose, self.augmentations = shard, compose, augmentations
        self.synthetic, self.seed = synthetic, seed

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = wds.DataPipeline(wds.SimpleShardList([self.shard]), wds.tarfile_to_samples())
        for index, sample in enumerate(samples):
            if index % step == first:
                try:
                    yield self.augment(sample)
                except BadSample as error:
                    yield {"uid": sample["__key__"], "skipped": error.reason}

    def augment(self, sample: dict) -> dict:
        for lack in missing(sample, PLAIN_MEMBERS):
            raise BadSample(lack)
        member, image = first_member(sample, IMAGE_MEMBERS)
        try:
            record = json.loads(sample.get("json", b"{}"))
        except ValueError as error:
            raise BadSample("unreadable json", error) from error
        uid = record.get("uid", sample["__key__"])
        if uid not in self.synthetic:
            raise BadSample("no synthetic captions")
        img = decode_image({member: image})
        seed = hashlib.sha256(f"{self.seed} {uid}".encode()).digest()[:8]
        torch.manual_seed(int.from_bytes(seed, "little", signed=True))
        tensors, params = zip(*(self.compose(img) for _ in range(self.augmentations)), strict=True)
        return {
            "uid": uid,
            "sha256": record.get("sha256", hashlib.sha256(image).hexdigest()),
            "url": sample.get("url.txt"),
            "images": torch.stack(tensors),
            "params": [self.compose.compress(param) for param in params],
            "captions": [caption(sample), *self.synthetic[uid]],
        }


def reinforced_members(
    sample: dict, image_emb: torch.Tensor, text_emb: torch.Tensor, as_bf16: bool
) -> dict[str, bytes]:
    """The members of one sample by extension."""
    embeddings = {"image_emb": image_emb, "text_emb": text_emb}
    stream = io.BytesIO()
    if as_bf16:
        torch.save({name: tensor.to(torch.bfloat16) for name, tensor in embeddings.items()}, stream)
        stored = {"pth.gz": gzip.compress(stream.getvalue(), mtime=0)}
    else:
        np.savez(stream, **{name: tensor.numpy() for name, tensor in embeddings.items()})
        stored = {"npz": stream.getvalue()}
    return {
        **({"url.txt": sample["url"]} if sample["url"] else {}),
        "syn.json": json.dumps({"syn_text": sample["captions"][1:]}).encode(),
        "paug.json": json.dumps({"param_aug": sample["params"]}).encode(),
        **stored,
        "json": json.dumps({"uid": sample["uid"], "sha256": sample["sha256"]}).encode(),
    }


def batches(samples, size: int):
    """Lists of samples with at least ``size`` augmented images together (but for the last)."""
    batch, images = [], 0
    for sample in samples:
        batch.append(sample)
        images += len(sample["images"])
        if images >= size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def reinforce_shard(
    shard: str, output: Path, teachers: list[Teacher], args, compose, count: int, synthetic
) -> Counter:
    """Write one shard, under a temporary name until it is complete; returns counts of written and left-out samples."""
    outcome: Counter[str] = Counter()
    dataset = Augmented(shard, compose, count, synthetic, args.seed)

    def usable(samples):
        for sample in samples:
            if "skipped" in sample:
                outcome[sample["skipped"]] += 1
                print(
                    f"warning: left out sample {sample['uid']} of {shard}: {sample['skipped']}",
                    file=sys.stderr,
                )
            else:
                yield sample

    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for batch in batches(
                usable(DataLoader(dataset, batch_size=None, num_workers=args.workers)),
                args.batch_size,
            ):
                images = torch.cat([sample["images"] for sample in batch])
                captions = [text for sample in batch for text in sample["captions"]]
                image_emb, text_emb = (
                    torch.cat(parts, dim=1)
                    for parts in zip(
                        *(teacher.embed(images, captions) for teacher in teachers), strict=True
                    )
                )
                for sample in batch:
                    augmentations, texts = len(sample["images"]), len(sample["captions"])
                    members = reinforced_members(
                        sample, image_emb[:augmentations], text_emb[:texts], args.format != "npz"
                    )
                    image_emb, text_emb = image_emb[augmentations:], text_emb[texts:]
                    for extension, data in members.items():
                        info = tarfile.TarInfo(f"{sample['uid']}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    outcome["written"] += 1
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return outcome


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", required=True, help="image-caption shards, braces as in WebDataset"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder for the reinforced shards"
    )
    parser.add_argument(
        "--config", required=True, type=Path, help="reinforcement config, as in configs/"
    )
    parser.add_argument(
        "--synthetic-captions", required=True, type=Path, help="JSON lines with uid and syn_text"
    )
    parser.add_argument(
        "--format",
        choices=["npz", "pth.gz"],
        default="npz",
        help="float32, or bfloat16 (default npz)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the teachers (default fp32)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, help="augmented images at a time (default 256)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode and augment, for each rank"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config = json.loads(args.config.read_text())
    named, compose = named_teachers(config, args.config), unnormalized(config)
    with open(args.synthetic_captions) as lines:
        synthetic = {record["uid"]: record["syn_text"] for record in map(json.loads, lines)}

    # One output folder holds shards that were made in one way.
    args.output.mkdir(parents=True, exist_ok=True)
    files = [
        str(args.synthetic_captions),
        *(name for pair in named for name in pair if os.path.isfile(name)),
    ]
    settings = {
        "config": config,
        "format": args.format,
        "precision": args.precision,
        "seed": args.seed,
    }
    settings["sha256"] = {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files
    }
    recorded = args.output / SETTINGS
    if recorded.exists() and json.loads(recorded.read_text()) != settings:
        sys.exit(
            f"error: the shards in {args.output} were made with other settings (see {recorded}): choose another folder"
        )
    temporary = recorded.with_name(f".{SETTINGS}.{RANK}")
    temporary.write_text(json.dumps(settings, indent=1))
    os.replace(temporary, recorded)

    shards = list(braceexpand(args.input))
    absent = [shard for shard in shards if not os.path.isfile(shard)]
    if absent:
        sys.exit(
            f"error: {len(absent)} of {len(shards)} shards of --input are not there, the first is {absent[0]}"
        )
    if len({os.path.basename(shard) for shard in shards}) < len(shards):
        sys.exit(
            "error: --input names several shards of one file name: reinforce each folder into an --output of its own"
        )
    todo = [
        (s, o)
        for s in shards[RANK::WORLD_SIZE]
        if not (o := args.output / os.path.basename(s)).exists()
    ]
    device = torch.device(
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    teachers = [Teacher(*teacher, device, args.precision) for teacher in named] if todo else []
    for (name, _), teacher in zip(named, teachers, strict=False):
        check_crop(compose, name, teacher, args.config)

    outcome: Counter[str] = Counter()
    for shard, output in tqdm(
        todo, desc=f"reinforce (rank {RANK})", unit="shard", disable=None if RANK == 0 else True
    ):
        outcome += reinforce_shard(
            shard, output, teachers, args, compose, config["num_samples"], synthetic
        )
    skipped = ", ".join(f"{n} {reason}" for reason, n in outcome.items() if reason != "written")
    print(
        f"rank {RANK}: {len(todo)} shards reinforced, {outcome['written']} samples"
        + (f"; left out: {skipped}" if skipped else "")
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
