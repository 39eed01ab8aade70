"""Measure the loader: CPU time, memory of the shuffle buffer, bytes handed over to the trainer.

    python scripts/benchmarks/loader.py [--data PATTERN] [--profile]

The script measures the CPU time of one worker of a DataLoader with a full shuffle buffer, for
variants that run alternately, and prints a table:

    plain                 reads tars with WebDataset, shuffles raw samples, decodes every member,
                          selects afterwards, converts the image through RGBA and normalises it to
                          float32
    this loader           the loader of dr/, with replacement: it selects first, and decodes only
                          the selected parts
    this loader, passes   the loader of dr/, without replacement: random access in place of the
                          shuffle buffer
    floor                 only decodes the JPEG, crops, resizes, and applies the two stored
                          operations of RandAugment

Ratios are to `plain`. Without --data the script makes shards of photographs of 512 pixels with 30
augmentations, in both formats of embeddings; this needs scikit-image (pip install scikit-image).

Reading from a disk is not measured: the shards are in the page cache.
"""

import argparse
import gzip
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from braceexpand import braceexpand
from measure import in_fresh_process, median_seconds, print_header, process_memory
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
from dr.batch import Batch
from dr.chain import SkipLimit, Tally, batches, shuffled
from dr.pipeline import make_processor
from dr.sample import USED_MEMBERS, ReinforcedProcessor, caption, decode_image, synthetic_captions
from dr.sources import Item, ShardReader, StreamState, count_samples, passes, stream
from dr.transforms import Compose, compose_from_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "datacompdr12m.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEACHERS = 768, 768  # widths
AUGMENTATIONS, CAPTIONS = 30, 6  # of a sample, the original caption included
BATCH = 64


# --- this loader ----------------------------------------------------------------------------------
# The only part that knows how dr/ builds its loaders: adapt it together with dr/.
def make_reinforced_processor(batch: int) -> ReinforcedProcessor:
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
        dataset_reinforcement_syn_text_key_regex="^syn_text.*$",
        dataset_reinforcement_filter_image_size=0,
        distill_teacher_dimension=[-1],
        image_interpolation=None,
        batch_size=batch,
    )
    return make_processor(options, preprocess)


def stream_samples(shards: list[str]) -> Iterator[Item]:
    """With replacement: shards one after the other, repeated for ever."""
    return stream(({"url": url} for url in cycle(shards)), USED_MEMBERS.__contains__)


def pass_samples(shards: list[str]) -> Iterator[Item]:
    """Without replacement: passes over all samples, in one stream."""
    sizes = [size for size, _ in count_samples(shards)]
    state = StreamState(0, sizes, previous=[], streams=1, stream=0, cursor=(0, 0))
    return passes(ShardReader(shards, USED_MEMBERS.__contains__), state)


def make_batches(
    samples: Iterator[Item], shuffle: int | None, batch: int, processor: Any = None
) -> Iterator[Batch]:
    """The batches of dr/; ``shuffle`` is the size of the buffer, None: without one."""
    processor = processor or make_reinforced_processor(batch)
    stage = None
    if shuffle is not None:
        stage = partial(shuffled, size=shuffle, initial=shuffle, rng=random.Random(0))
    tally = Tally(processor.members, SkipLimit(10**12, 1.0))
    for made, _ in batches(samples, processor, tokenizer(), batch, tally, stage):
        yield made


def with_replacement(shards: list[str], shuffle: int, batch: int) -> Iterator[Batch]:
    return make_batches(stream_samples(shards), shuffle, batch)


def without_replacement(shards: list[str], shuffle: int, batch: int) -> Iterator[Batch]:
    return make_batches(pass_samples(shards), None, batch)


class TimedProcessor:
    """A processor that adds the CPU time of its two steps to ``spent``."""

    def __init__(self, processor: ReinforcedProcessor, spent: dict[str, float]):
        self.members, self.statistics = processor.members, processor.statistics
        self.select = timed(processor.select, spent, "select")
        self.augment = timed(processor.augment, spent, "decode and augment")


# --- the other variants ---------------------------------------------------------------------------
def stored_augmentation() -> Compose:
    return compose_from_config(json.loads(CONFIG.read_text())["reinforce"]["image_augmentation"])


def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-16")


def plain_pipeline(shards: list[str], shuffle: int, batch: int) -> wds.DataPipeline:
    compose = stored_augmentation()
    tokenize = tokenizer()

    def decode(sample: dict) -> tuple:
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGBA").convert("RGB")
        members = {name: json.loads(data) for name, data in sample.items() if name.endswith("json")}
        members |= {name: data.decode() for name, data in sample.items() if name.endswith("txt")}
        if "npz" in sample:
            arrays = np.load(io.BytesIO(sample["npz"]))
            embeddings = {name: torch.tensor(rows) for name, rows in arrays.items()}
        else:
            inflated = io.BytesIO(gzip.decompress(sample["pth.gz"]))
            embeddings = torch.load(inflated, weights_only=True)
        return image, members, embeddings

    def choose(decoded: tuple) -> tuple:
        image, members, embeddings = decoded
        parameters, captions = members["paug.json"]["param_aug"], members["syn.json"]["syn_text"]
        augmentation, caption = random.randrange(len(parameters)), random.randrange(len(captions))
        image, _ = compose.reapply(image, compose.decompress(parameters[augmentation]))
        texts = tokenize([members["txt"], captions[caption]])
        image_emb = embeddings["image_emb"][augmentation].float()
        text_emb = embeddings["text_emb"][[0, 1 + caption]].float()
        return image, texts, image_emb, text_emb

    return wds.DataPipeline(
        lambda: ({"url": url} for url in cycle(shards)),
        wds.tarfile_to_samples(),
        wds.shuffle(shuffle, initial=shuffle, rng=random.Random(0)),
        wds.map(decode),
        wds.map(choose),
        wds.batched(batch, partial=False),
    )


def floor_pipeline(shards: list[str], shuffle: int, batch: int) -> Iterator[tuple[torch.Tensor]]:
    """Decode, crop, resize and apply the two stored operations; yields a number for each batch."""
    compose = stored_augmentation()
    crop, augment = compose.transforms["random_resized_crop"], compose.transforms["rand_augment"]
    samples = []
    for sample in wds.tarfile_to_samples()([{"url": str(shards[0])}]):
        stored = json.loads(sample["paug.json"])["param_aug"]
        samples.append(({"jpg": sample["jpg"]}, [compose.decompress(params) for params in stored]))
    repeated = cycle(samples)
    while True:
        for sample, parameters in islice(repeated, batch):
            params = random.choice(parameters)
            image = crop.apply(decode_image(sample), params["random_resized_crop"])
            augment.apply(image, params["rand_augment"])
        yield (torch.tensor(batch),)


VARIANTS = {
    "plain": plain_pipeline,
    "this loader": with_replacement,
    "this loader, passes": without_replacement,
    "floor": floor_pipeline,
}
LOADERS = [name for name in VARIANTS if name != "floor"]  # the variants that give batches


# --- shards ---------------------------------------------------------------------------------------
def photograph(photos: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    """A part of a photograph, 512 pixels long; noise makes its file as large as real ones."""
    photo = photos[rng.integers(len(photos))]
    width, height = (round(side * rng.uniform(0.5, 1)) for side in photo.size)
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    scale = 512 / max(width, height)
    size = round(width * scale), round(height * scale)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box)).astype(int)
    noisy = pixels + rng.integers(-4, 5, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def unit_rows(rows: int, rng: np.random.Generator) -> np.ndarray:
    """``[rows, ΣD_k]``: a block of unit length for each teacher."""
    blocks = [rng.standard_normal((rows, width), dtype=np.float32) for width in TEACHERS]
    return np.concatenate([b / np.linalg.norm(b, axis=1, keepdims=True) for b in blocks], axis=1)


def write_shards(folder: Path, samples: int, seed: int) -> dict[str, list[str]]:
    """Write the same samples with either format of embeddings; returns ``{format: shards}``."""
    try:
        from skimage import data
    except ImportError:
        raise SystemExit(
            "needs photographs: pip install scikit-image, or give --data PATTERN"
        ) from None
    names = ("astronaut", "coffee", "chelsea", "rocket")
    photos = [Image.fromarray(getattr(data, name)()) for name in names]
    words = ["a", "photo", "of", "some", "old", "cat", "house"]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    compose = stored_augmentation()
    with (
        tarfile.open(folder / "fp32.tar", "w") as fp32,
        tarfile.open(folder / "bf16.tar", "w") as bf16,
    ):
        for number in range(samples):
            image, jpeg = photograph(photos, rng), io.BytesIO()
            image.save(jpeg, "JPEG", quality=95)
            parameters = [compose.compress(compose(image)[1]) for _ in range(AUGMENTATIONS)]
            captions = [" ".join(rng.choice(words, 12)) for _ in range(CAPTIONS)]
            stored = {
                "image_emb": unit_rows(AUGMENTATIONS, rng),
                "text_emb": unit_rows(CAPTIONS, rng),
            }
            npz, pth = io.BytesIO(), io.BytesIO()
            np.savez(npz, **stored)
            torch.save(
                {name: torch.from_numpy(rows).bfloat16() for name, rows in stored.items()}, pth
            )
            members = {
                "jpg": jpeg.getvalue(),
                "txt": captions[0].encode(),
                "url.txt": b"https://example.org/" + bytes(60),
                "syn.json": json.dumps({"syn_text": captions[1:]}).encode(),
                "paug.json": json.dumps({"param_aug": parameters}).encode(),
                "json": b'{"uid": "", "sha256": ""}',
            }
            add_sample(fp32, number, members | {"npz": npz.getvalue()})
            add_sample(bf16, number, members | {"pth.gz": gzip.compress(pth.getvalue())})
    return {"fp32 npz": [f"{folder}/fp32.tar"], "bf16 pth.gz": [f"{folder}/bf16.tar"]}


def add_sample(tar: tarfile.TarFile, number: int, members: dict[str, bytes]) -> None:
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{number:032x}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


# --- measurements ---------------------------------------------------------------------------------
class TimedBatches(IterableDataset):
    """A variant's batches, each with the CPU time that its worker has spent so far."""

    def __init__(self, variant: str, *arguments: Any):
        self.variant, self.arguments = variant, arguments

    def __iter__(self) -> Iterator[tuple[tuple, float]]:
        for batch in VARIANTS[self.variant](*self.arguments):
            yield batch, time.process_time()


def worker_seconds(batches: Iterator[tuple[tuple, float]], count: int) -> float:
    """CPU seconds of a worker for ``count`` batches. It works ahead, so some are there already."""
    _, start = next(batches)
    for _ in range(count):
        _, end = next(batches)
    return end - start


def buffer_memory(variant: str, shards: list[str], size: int) -> float:
    """MB that a full shuffle buffer adds to a process."""
    torch.set_num_threads(1)
    next(iter(VARIANTS[variant](shards, 1, 1)))
    before = process_memory()
    next(iter(VARIANTS[variant](shards, size, 1)))
    return process_memory() - before


def measure(kind: str, shards: list[str], args: Namespace) -> dict[str, float]:
    """Print the rows of one set of shards; returns seconds a sample, by variant."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    workers = {
        name: iter(DataLoader(TimedBatches(name, shards, args.shuffle, BATCH), None, num_workers=1))
        for name in VARIANTS
    }
    sent = {}  # KB a sample
    for name, worker in workers.items():
        batch, _ = next(worker)
        tensors = [part for part in batch if isinstance(part, torch.Tensor)]
        sent[name] = sum(tensor.nbytes for tensor in tensors) / BATCH / 1000
        # Until the heap takes no new pages, as after a worker's first minutes.
        worker_seconds(worker, 1 + args.shuffle // BATCH)
    turns: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.runs):
        for name, worker in workers.items():
            turns[name].append(worker_seconds(worker, args.batches) / args.batches / BATCH)
    del worker, workers  # ends the processes
    seconds = {name: statistics.median(values) for name, values in turns.items()}
    memory = {name: in_fresh_process(buffer_memory, name, shards, args.shuffle) for name in LOADERS}
    for name, took in seconds.items():
        cells = [kind, name, f"{1 / took:,.0f}"]
        cells += [f"{seconds['plain'] / took:.2f}", f"{1000 * took:.2f}"]
        if name in LOADERS:
            cells += [f"{memory[name]:,.0f}", f"{memory[name] / memory['plain']:.2f}"]
            cells += [f"{sent[name]:.0f}", f"{sent[name] / sent['plain']:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return seconds


def timed(function: Callable, spent: dict[str, float], name: str) -> Callable:
    """The same function, which adds its CPU time to ``spent[name]``."""

    def run(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments)
        finally:
            spent[name] += time.process_time() - start

    return run


def profile(shards: list[str], args: Namespace, seconds: dict[str, float]) -> None:
    """Print the CPU time of each stage of this loader, with replacement.

    Args:
        shards: tars.
        args: the command's options.
        seconds: what a sample took in a worker, by variant.
    """
    torch.set_num_threads(1)  # as in a worker
    rest = "shuffle, tokenise and batch"
    spent = dict.fromkeys(("read tars", "select", "decode and augment", rest), 0.0)
    read = timed(stream_samples(shards).__next__, spent, "read tars")
    processor = TimedProcessor(make_reinforced_processor(BATCH), spent)
    made = make_batches(iter(read, None), args.shuffle, BATCH, processor)
    next(made)
    spent.update(dict.fromkeys(spent, 0.0))
    count, start = args.batches * args.runs, time.process_time()
    for _ in range(count):
        next(made)
    spent[rest] = time.process_time() - start - sum(spent.values())
    stages = {name: value / count / BATCH for name, value in spent.items()}
    stages["hand over to the trainer"] = seconds["this loader"] - sum(stages.values())

    samples = [item.sample for item in islice(stream_samples(shards), 256)]
    texts = [text for s in samples for text in (caption(s), synthetic_captions(s)[0])]
    tokenize = tokenizer()
    parts = {"tokenising": lambda: tokenize(texts)}
    if "pth.gz" in samples[0]:
        parts["inflating"] = lambda: [zlib.decompress(sample["pth.gz"], 31) for sample in samples]
    alone = {
        name: value / len(samples)
        for name, value in median_seconds(parts, 5, time.process_time).items()
    }
    alone["floor"] = seconds["floor"]
    stage_of = {"inflating": "select", "floor": "decode and augment", "tokenising": rest}
    print("\n| stage | ms a sample | of which, alone |\n|---|---|---|")
    for name, value in stages.items():
        found = [part for part in alone if stage_of[part] == name]
        within = ", ".join(f"{part} {1000 * alone[part]:.2f}" for part in found)
        print(f"| {name} | {1000 * value:.2f} | {within} |")
    print()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        metavar="PATTERN",
        help="joined shards, with braces as in WebDataset; default: made",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="samples in each shard that is made; default %(default)s",
    )
    parser.add_argument(
        "--batches", type=int, default=8, help="batches of 64 samples in a run; default %(default)s"
    )
    parser.add_argument(
        "--shuffle",
        type=int,
        default=5000,
        help="samples in the shuffle buffer; default %(default)s, as OpenCLIP's",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also print the CPU time of each stage of this loader",
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="runs of each variant; default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default %(default)s")
    args = parser.parse_args(arguments)

    print_header(args, torch, np, wds)
    print(
        "| embeddings | variant | samples/s of CPU time | ratio | ms a sample "
        "| MB of a shuffle buffer | ratio | KB to the trainer | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if args.data:
            sets = {args.data: list(braceexpand(args.data))}
        else:
            sets = write_shards(Path(folder), args.samples, args.seed)
        for kind, shards in sets.items():
            seconds = measure(kind, shards, args)
            if args.profile:
                profile(shards, args, seconds)


if __name__ == "__main__":
    main()
