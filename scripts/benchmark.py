"""How fast the loader and the training step are, beside the plain way to write them.

    python scripts/benchmark.py loader [--data PATTERN] [--profile]
    python scripts/benchmark.py step [--model ViT-B-16 --batch 256]

Each prints one table: variant, figure, ratio to the plain way, which is measured in the same run, by turns; medians.

loader      CPU time of one worker of a DataLoader, its shuffle buffer full. `plain` reads tars by WebDataset, shuffles
            raw samples, decodes every member, picks afterwards, converts the image through RGBA and normalises it to
            float32. `recipe` is dr/data.py. `floor` only decodes the JPEG, crops, resizes, and applies the two drawn
            operations. Without --data on shards of photographs of 512 pixels with 30 augmentations (pip install
            scikit-image), in both formats of embeddings. Memory is what the shuffle buffer takes.
step        The reinforced step, and a CLIP step that encodes the same two captions for each image; data in memory.

Leaves out: reading from a disk (the shards are in the page cache), and several GPUs.
"""

import argparse
import gzip
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from argparse import Namespace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe's root, for dr
from dr.batch import add_teacher, unpack_batch
from dr.data import tar_to_samples, training_stages
from dr.loss import DRClipLoss
from dr.params import register_model
from dr.sample import caption, decode_image, synthetic_captions
from dr.transforms import compose_from_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "datacompdr12m.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEACHERS = 768, 768  # widths


def print_header(args):
    model = "CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            model,
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{model}, {os.cpu_count()} cores{gpu}; load {os.getloadavg()[0]:.1f}")
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, np, wds))
    print(
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}"
    )
    print(f"seed {args.seed}; median of {args.runs} runs by turns\n")


def by_turns(variants, runs, clock=time.perf_counter):
    """``{name: median seconds}`` of functions that are called in turn; the first turn is not counted."""
    seconds = {name: [] for name in variants}
    for turn in range(runs + 1):
        for name, function in variants.items():
            start = clock()
            function()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident(field="VmRSS"):
    """MB of this process: VmRSS now, VmHWM at most so far."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) / 1000


def in_fresh_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# --- loader -----------------------------------------------------------------------------------------------------------
def stored_augmentation():
    return compose_from_config(json.loads(CONFIG.read_text())["reinforce"]["image_augmentation"])


def photograph(photos, rng):
    """A part of a photograph, 512 pixels long, with the noise that makes real ones as large as they are."""
    photo = photos[rng.integers(len(photos))]
    width, height = (round(side * rng.uniform(0.5, 1)) for side in photo.size)
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    scale = 512 / max(width, height)
    size = round(width * scale), round(height * scale)
    pixels = np.asarray(
        photo.resize(size, Image.BICUBIC, (left, top, left + width, top + height))
    ).astype(int)
    return Image.fromarray(
        (pixels + rng.integers(-4, 5, pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def write_shards(folder, samples, seed):
    """``{"fp32 npz": shard, "bf16 pth.gz": shard}``, of the same samples."""
    try:
        from skimage import data
    except ImportError:
        raise SystemExit(
            "needs photographs: pip install scikit-image, or give --data PATTERN"
        ) from None
    photos = [
        Image.fromarray(getattr(data, name)())
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    compose = stored_augmentation()
    shards = {"fp32 npz": folder / "fp32.tar", "bf16 pth.gz": folder / "bf16.tar"}
    with (
        tarfile.open(shards["fp32 npz"], "w") as wide,
        tarfile.open(shards["bf16 pth.gz"], "w") as narrow,
    ):
        for number in range(samples):
            img, stream = photograph(photos, rng), io.BytesIO()
            img.save(stream, "JPEG", quality=95)
            parameters = [compose.compress(compose(img)[1]) for _ in range(30)]
            captions = [
                " ".join(rng.choice(["a", "photo", "of", "some", "old", "cat", "house"], 12))
                for _ in range(6)
            ]
            stored = {
                name: np.concatenate([unit(rows, width, rng) for width in TEACHERS], axis=1)
                for name, rows in (("image_emb", 30), ("text_emb", 6))
            }
            npz, pth = io.BytesIO(), io.BytesIO()
            np.savez(npz, **stored)
            torch.save(
                {name: torch.from_numpy(rows).bfloat16() for name, rows in stored.items()}, pth
            )
            members = {
                "jpg": stream.getvalue(),
                "txt": captions[0].encode(),
                "url.txt": b"https://example.org/" + bytes(60),
                "syn.json": json.dumps({"syn_text": captions[1:]}).encode(),
                "paug.json": json.dumps({"param_aug": parameters}).encode(),
            }
            for tar, last in (
                (wide, {"npz": npz.getvalue()}),
                (narrow, {"pth.gz": gzip.compress(pth.getvalue())}),
            ):
                for extension, data in {
                    **members,
                    **last,
                    "json": b'{"uid": "", "sha256": ""}',
                }.items():
                    info = tarfile.TarInfo(f"{number:032x}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return shards


def unit(rows, width, rng):
    features = rng.standard_normal((rows, width), dtype=np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def tokenizer():
    import open_clip

    return open_clip.get_tokenizer("ViT-B-16")


def plain_pipeline(shards, shuffle, batch):
    compose = stored_augmentation()
    tokenize = tokenizer()

    def decode(sample):
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGBA").convert("RGB")
        members = {name: json.loads(data) for name, data in sample.items() if name.endswith("json")}
        members |= {name: data.decode() for name, data in sample.items() if name.endswith("txt")}
        if "npz" in sample:
            embeddings = {
                name: torch.tensor(rows)
                for name, rows in np.load(io.BytesIO(sample["npz"])).items()
            }
        else:
            embeddings = torch.load(
                io.BytesIO(gzip.decompress(sample["pth.gz"])), weights_only=True
            )
        return image, members, embeddings

    def pick(decoded):
        image, members, embeddings = decoded
        parameters, captions = members["paug.json"]["param_aug"], members["syn.json"]["syn_text"]
        augmentation, caption = random.randrange(len(parameters)), random.randrange(len(captions))
        image, _ = compose.reapply(image, compose.decompress(parameters[augmentation]))
        texts = tokenize([members["txt"], captions[caption]])
        rows = (
            embeddings["image_emb"][augmentation].float(),
            embeddings["text_emb"][[0, 1 + caption]].float(),
        )
        return image, texts, *rows

    return wds.DataPipeline(
        lambda: ({"url": url} for url in cycle(shards)),
        wds.tarfile_to_samples(),
        wds.shuffle(shuffle[0], initial=shuffle[1], rng=random.Random(0)),
        wds.map(decode),
        wds.map(pick),
        wds.batched(batch, partial=False),
    )


def recipe_pipeline(shards, shuffle, batch):
    preprocess = T.Compose(
        [
            T.RandomResizedCrop(224, interpolation=T.InterpolationMode.BICUBIC),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    options = Namespace(
        dataset_reinforcement=True,
        dataset_reinforcement_config=str(CONFIG),
        dataset_reinforcement_mix_synthetic=False,
        dataset_reinforcement_mix_synthetic_ratio=0.0,
        distill_teacher_dimension=[-1],
        image_interpolation=None,
        batch_size=batch,
    )
    stages = training_stages(options, preprocess, tokenizer(), True, len(shards))
    return wds.DataPipeline(
        lambda: ({"url": url} for url in cycle(shards)),
        stages.shards,
        stages.open,
        stages.read,
        wds.shuffle(shuffle[0], initial=shuffle[1], rng=random.Random(0)),
        *stages.prepare,
    )


PIPELINES = {"plain": plain_pipeline, "recipe": recipe_pipeline}


def floor_pipeline(shards, shuffle, batch):
    """Decode, crop, resize and apply the two operations, for samples in turn; a batch of them is only a number."""
    compose = stored_augmentation()
    crop, augment = compose.transforms["random_resized_crop"], compose.transforms["rand_augment"]
    samples = []
    for sample in wds.tarfile_to_samples()([{"url": str(shards[0])}]):
        parameters = json.loads(sample["paug.json"])["param_aug"]
        samples.append(
            ({"jpg": sample["jpg"]}, [compose.decompress(stored) for stored in parameters])
        )
    turn = cycle(samples)
    while True:
        for sample, parameters in islice(turn, batch):
            chosen = random.choice(parameters)
            image = crop.apply(decode_image(sample), chosen["random_resized_crop"])
            augment.apply(image, chosen["rand_augment"])
        yield (torch.tensor(batch),)


VARIANTS = {**PIPELINES, "floor": floor_pipeline}


class Clocked(IterableDataset):
    """A variant's batches, each with the CPU time that its worker has spent so far."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __iter__(self):
        variant, *arguments = self.arguments
        for batch in VARIANTS[variant](*arguments):
            yield batch, time.process_time()


def worker_seconds(source, batches):
    """CPU seconds that a worker took for so many batches; it works ahead, so that some of them are there already."""
    *_, (_, first) = islice(source, 1)
    *_, (_, last) = islice(source, batches)
    return last - first


def memory_of(variant, shards, size):
    """MB that a full shuffle buffer adds to a process."""
    torch.set_num_threads(1)
    next(iter(PIPELINES[variant](shards, (1, 1), 1)))
    before = resident()
    next(iter(PIPELINES[variant](shards, (size, size), 1)))
    return resident() - before


def loader(args):
    batch, number = 64, args.batches
    print(
        "| embeddings | variant | samples/s and core | ratio | ms a sample | MB of a shuffle buffer | ratio "
        "| KB to the trainer | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if args.data:
            sets = {args.data: list(braceexpand(args.data))}
        else:
            sets = {
                kind: [str(path)]
                for kind, path in write_shards(Path(folder), args.samples, args.seed).items()
            }
        for kind, shards in sets.items():
            random.seed(args.seed)
            torch.manual_seed(args.seed)
            sources = {
                name: iter(
                    DataLoader(
                        Clocked(name, shards, (args.shuffle, args.shuffle), batch),
                        None,
                        num_workers=1,
                    )
                )
                for name in VARIANTS
            }
            sent = {
                name: sum(t.nbytes for t in next(source)[0]) / batch / 1000
                for name, source in sources.items()
            }
            for source in (
                sources.values()
            ):  # as a worker is after its first minutes: the heap takes no new pages
                worker_seconds(source, 1 + args.shuffle // batch)
            turns = {name: [] for name in VARIANTS}
            for _ in range(args.runs):
                for name, source in sources.items():
                    turns[name].append(worker_seconds(source, number) / number / batch)
            del source, sources  # their workers with them
            seconds = {name: statistics.median(values) for name, values in turns.items()}
            memory = {
                name: in_fresh_process(memory_of, name, shards, args.shuffle) for name in PIPELINES
            }
            for name, took in seconds.items():
                cells = [f"{1 / took:,.0f}", f"{seconds['plain'] / took:.2f}", f"{1000 * took:.2f}"]
                if name in PIPELINES:
                    cells += [f"{memory[name]:,.0f}", f"{memory[name] / memory['plain']:.2f}"]
                    cells += [f"{sent[name]:.0f}", f"{sent[name] / sent['plain']:.2f}"]
                print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)
            if args.profile:
                profile(shards, (args.shuffle, args.shuffle), number * args.runs, seconds)


def profile(shards, shuffle, batches, seconds):
    """Where the recipe's time goes: CPU time inside each stage, less that inside the stages before it.

    Args:
        shards: tars.
        shuffle: size of the buffer, twice.
        batches: how many of 64.
        seconds: what a sample took in a worker, of each variant.
    """
    torch.set_num_threads(1)  # as in a worker
    # recipe_pipeline's stages; the time of one without a name is the next one's
    names = [
        "shards",
        "",
        "read tars",
        "draw rows",
        "shuffle",
        "decode and augment",
        "",
        "tokenise and batch",
    ]
    spent = dict.fromkeys(filter(None, names), 0.0)

    def timed(name, source):
        while True:
            start = time.process_time()
            item = next(source)
            spent[name] += time.process_time() - start
            yield item

    first, *stages = recipe_pipeline(shards, shuffle, 64).pipeline
    source = timed(names[0], first())
    for name, stage in zip(names[1:], stages, strict=True):
        source = iter(stage(source))
        source = timed(name, source) if name else source
    next(source)
    spent.update(dict.fromkeys(spent, 0.0))
    for _ in islice(source, batches):
        pass
    times = [value / batches / 64 for value in spent.values()]
    stages = {
        name: now - before
        for name, before, now in zip(list(spent)[1:], times[:-1], times[1:], strict=True)
    }
    stages["hand over to the trainer"] = seconds["recipe"] - sum(
        stages.values()
    )  # what the worker takes beyond that

    samples = list(islice(tar_to_samples({"url": url} for url in cycle(shards)), 256))
    captions = [
        text for sample in samples for text in (caption(sample), synthetic_captions(sample)[0])
    ]
    tokenize = tokenizer()
    within = {
        ("draw rows", "inflating"): lambda: [
            zlib.decompress(sample["pth.gz"], 31) for sample in samples
        ],
        ("tokenise and batch", "tokenising"): lambda: tokenize(captions),
    }
    if "npz" in samples[0]:
        del within["draw rows", "inflating"]
    alone = {
        key: value / len(samples) for key, value in by_turns(within, 5, time.process_time).items()
    }
    alone["decode and augment", "floor"] = seconds["floor"]
    print("\n| stage | ms a sample | of which, alone |\n|---|---|---|")
    for name, value in stages.items():
        parts = ", ".join(
            f"{part} {1000 * alone[of, part]:.2f}" for of, part in alone if of == name
        )
        print(f"| {name} | {1000 * value:.2f} | {parts} |")
    print()


# --- step -------------------------------------------------------------------------------------------------------------
def step(args):
    import open_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    generator = torch.Generator().manual_seed(args.seed)
    model = open_clip.create_model(register_model(args.model), device=device, output_dict=True)
    size = (
        model.visual.image_size
        if isinstance(model.visual.image_size, int)
        else model.visual.image_size[0]
    )
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler(device, enabled=args.precision == "amp" and device == "cuda")
    pixels = torch.randint(256, (args.batch, size, size, 3), generator=generator, dtype=torch.uint8)
    texts = torch.randint(1, 49000, (args.batch, 2, model.context_length), generator=generator)
    stored = F.normalize(torch.randn(args.batch, 3, sum(TEACHERS), generator=generator), dim=2)
    batch = pixels, texts, stored[:, 0], stored[:, 1:], torch.tensor([MEAN, STD])
    batch = [tensor.pin_memory() if device == "cuda" else tensor for tensor in batch]
    ready = (pixels.permute(0, 3, 1, 2).contiguous().float() / 255 - 0.45) / 0.27
    ready = ready.pin_memory() if device == "cuda" else ready
    distill = DRClipLoss(
        teacher_dimension=TEACHERS,
        distill_loss_weights=args.weights,
        average_after_softmax=True,
        dist_logit_scale=100.0,
    )
    contrastive = open_clip.ClipLoss()

    def reinforced():
        images, captions, teacher = unpack_batch(batch, torch.device(device))
        return sum(distill(**add_teacher(model(images, captions), teacher)))

    def plain():
        images = ready.to(device, non_blocking=True)
        captions = batch[1].to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        out = model(images, captions)
        original, synthetic = out["text_features"].chunk(2)
        return sum(
            contrastive(out["image_features"], text, out["logit_scale"])
            for text in (original, synthetic)
        )

    def run(loss):
        def one():
            optimizer.zero_grad()
            kind = torch.bfloat16 if args.precision == "amp_bf16" else torch.float16
            with torch.autocast(device, kind, enabled=args.precision != "fp32"):
                value = loss()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            if device == "cuda":
                torch.cuda.synchronize()

        return one

    seconds = by_turns({"plain, 2 captions": run(plain), "reinforced": run(reinforced)}, args.runs)
    print(f"{args.model}, batch {args.batch}, {args.precision} on {device}\n")
    print("| step | ms | samples/s | ratio |\n|---|---|---|---|")
    for name, took in seconds.items():
        ratio = took / seconds["plain, 2 captions"]
        print(f"| {name} | {1000 * took:,.1f} | {args.batch / took:,.1f} | {ratio:.3f} |")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loader", "step"])
    parser.add_argument("--runs", type=int, default=5, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    part = parser.add_argument_group("loader")
    part.add_argument("--data", metavar="PATTERN", help="joined shards of yours")
    part.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="in the shards made without --data; default %(default)s",
    )
    part.add_argument(
        "--batches", type=int, default=8, help="of 64 samples in a run; default %(default)s"
    )
    part.add_argument(
        "--shuffle",
        type=int,
        default=5000,
        help="samples in the shuffle buffer; default OpenCLIP's",
    )
    part.add_argument(
        "--profile", action="store_true", help="also a table of what each stage costs"
    )
    part = parser.add_argument_group("step")
    part.add_argument("--model", default="ViT-B-16", help="default %(default)s")
    part.add_argument("--batch", type=int, default=256, help="default %(default)s")
    part.add_argument("--precision", choices=["amp_bf16", "amp", "fp32"], default="amp_bf16")
    part.add_argument(
        "--weights", type=float, nargs=2, default=[0.25, 0.75], help="w0 w1; default %(default)s"
    )
    part.add_argument("--grad-checkpointing", action="store_true")
    args = parser.parse_args(arguments)
    print_header(args)
    {"loader": loader, "step": step}[args.what](args)


if __name__ == "__main__":
    main()
