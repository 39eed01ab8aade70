"""Measure the loader: CPU time, memory, bytes read, and bytes handed over to the trainer.

    python scripts/benchmarks/loader.py [--data PATTERN …] [--profile]

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

Ratios are to `plain`. KB and reads of a sample are what the worker has asked the system for
(/proc/self/io, Linux only), whether from the page cache or from a disk. Without --data the script
makes shards of photographs of 512 pixels with 30 augmentations, in all formats of embeddings, with
indices; this needs scikit-image (pip install scikit-image).

The shards are in the page cache. --cold drops them from it before each turn, to measure wall time
from a local disk; the page cache of other files stays.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
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
from typing import Any, NamedTuple

import numpy as np
import open_clip
import safetensors.torch
import torch
import webdataset as wds
from braceexpand import braceexpand
from measure import in_fresh_process, median_seconds, print_header, process_memory
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for lib
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
from lib.tar_writer import write_index

from dr.batch import Batch
from dr.chain import SkipLimit, Tally, batches, in_order, shuffled
from dr.files import is_url
from dr.pipeline import make_processor
from dr.sample import USED_MEMBERS, ReinforcedProcessor, caption, decode_image, synthetic_captions
from dr.sampling import WINDOW
from dr.sources import (
    Item,
    ShardReader,
    StreamState,
    count_samples,
    passes,
    passes_by_window,
    stream,
)
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


def make_batches(
    samples: Iterator[Item],
    shuffle: int | None,
    batch: int,
    processor: Any = None,
    window: int = 0,
) -> Iterator[Batch]:
    """The batches of dr/.

    Args:
        samples: items, with the members of a sample.
        shuffle: size of the shuffle buffer; None: without one.
        batch: size of a batch.
        processor: of the samples; None: a new one.
        window: samples within which items are in another order than that of their turns.
    """
    processor = processor or make_reinforced_processor(batch)
    tally = Tally(processor.members, SkipLimit(10**12, 1.0))
    stage = order = None
    if shuffle is not None:
        stage = partial(shuffled, size=shuffle, initial=shuffle, rng=random.Random(0))
    if window:
        order = partial(in_order, size=window, tally=tally)
    for made, _ in batches(samples, processor, tokenizer(), batch, tally, stage, order):
        yield made


def with_replacement(shards: list[str], shuffle: int, batch: int) -> Iterator[Batch]:
    return make_batches(stream_samples(shards), shuffle, batch)


def without_replacement(shards: list[str], shuffle: int, batch: int) -> Iterator[Batch]:
    """Passes over all samples, in one stream."""
    sizes = [size for size, _ in count_samples(shards)]
    state = StreamState(0, sizes, previous=[], streams=1, stream=0, cursor=(0, 0))
    reader = ShardReader(shards, USED_MEMBERS.__contains__)
    if any(map(is_url, shards)):
        window = min(WINDOW, sum(sizes) + 1)
        return make_batches(passes_by_window(reader, state), None, batch, window=window)
    return make_batches(passes(reader, state), None, batch)


class TimedProcessor:
    """A processor that adds the CPU time of its two steps to ``spent``."""

    def __init__(self, processor: ReinforcedProcessor, spent: dict[str, float]):
        self.members, self.statistics = processor.members, processor.statistics
        self.select = timed(processor.select, spent, "select")
        self.read_rows = processor.read_rows
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
        elif "safetensors" in sample:
            embeddings = safetensors.torch.load(sample["safetensors"])
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
    kinds = {"fp32 npz": "npz", "bf16 pth.gz": "pth.gz", "bf16 safetensors": "safetensors"}
    with contextlib.ExitStack() as stack:
        tars = {
            kind: stack.enter_context(tarfile.open(folder / f"{kind}.tar", "w"))
            for kind in kinds.values()
        }
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
            rounded = {name: torch.from_numpy(rows).bfloat16() for name, rows in stored.items()}
            torch.save(rounded, pth)
            members = {
                "jpg": jpeg.getvalue(),
                "txt": captions[0].encode(),
                "url.txt": b"https://example.org/" + bytes(60),
                "syn.json": json.dumps({"syn_text": captions[1:]}).encode(),
                "paug.json": json.dumps({"param_aug": parameters}).encode(),
                "json": b'{"uid": "", "sha256": ""}',
            }
            embeddings = {"npz": npz.getvalue(), "pth.gz": gzip.compress(pth.getvalue())}
            embeddings["safetensors"] = safetensors.torch.save(rounded)
            for kind, tar in tars.items():
                add_sample(tar, number, members | {kind: embeddings[kind]})
    for kind in kinds.values():
        write_index(folder / f"{kind}.tar")
    return {title: [f"{folder}/{kind}.tar"] for title, kind in kinds.items()}


def add_sample(tar: tarfile.TarFile, number: int, members: dict[str, bytes]) -> None:
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{number:032x}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


# --- measurements ---------------------------------------------------------------------------------
class Spent(NamedTuple):
    """What a worker has spent so far: CPU time, bytes and reads."""

    seconds: float
    bytes: int
    reads: int

    @classmethod
    def so_far(cls) -> "Spent":
        counters = {"rchar": 0, "syscr": 0}
        if Path("/proc/self/io").exists():
            lines = Path("/proc/self/io").read_text().splitlines()
            counters = {name: int(value) for name, value in (line.split(": ") for line in lines)}
        return cls(time.process_time(), counters["rchar"], counters["syscr"])


class TimedBatches(IterableDataset):
    """A variant's batches, each with what its worker has spent so far, and the worker's memory."""

    def __init__(self, variant: str, *arguments: Any):
        self.variant, self.arguments = variant, arguments

    def __iter__(self) -> Iterator[tuple[tuple, Spent, float]]:
        for batch in VARIANTS[self.variant](*self.arguments):
            yield batch, Spent.so_far(), process_memory()


class Turns:
    """The turns of one variant, with its worker.

    Attributes:
        seconds, bytes, reads: of a sample, for each turn.
        memory: MB of the worker after the last turn.
        sent: KB that it has handed over for a sample.
    """

    def __init__(self, variant: str, shards: list[str], args: Namespace):
        dataset = TimedBatches(variant, shards, args.shuffle, BATCH)
        self.worker = iter(DataLoader(dataset, None, num_workers=1))
        self.seconds, self.bytes, self.reads = [], [], []  # type: ignore[var-annotated]
        batch, *_ = next(self.worker)
        tensors = [part for part in batch if isinstance(part, torch.Tensor)]
        self.sent = sum(tensor.nbytes for tensor in tensors) / BATCH / 1000
        # Until the heap takes no new pages, as after a worker's first minutes.
        for _ in range(1 + args.shuffle // BATCH):
            next(self.worker)

    def take(self, batches: int, wall: bool) -> None:
        """One turn. The worker works ahead, so some batches are there already."""
        _, start, _ = next(self.worker)
        begin = time.perf_counter()
        for _ in range(batches):
            _, end, self.memory = next(self.worker)
        samples = batches * BATCH
        elapsed = time.perf_counter() - begin if wall else end.seconds - start.seconds
        self.seconds.append(elapsed / samples)
        self.bytes.append((end.bytes - start.bytes) / samples)
        self.reads.append((end.reads - start.reads) / samples)


def buffer_memory(variant: str, shards: list[str], size: int) -> float:
    """MB that a full shuffle buffer adds to a process."""
    torch.set_num_threads(1)
    next(iter(VARIANTS[variant](shards, 1, 1)))
    before = process_memory()
    next(iter(VARIANTS[variant](shards, size, 1)))
    return process_memory() - before


def drop_from_page_cache(shards: list[str]) -> None:
    for shard in shards:
        with open(shard, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(kind: str, shards: list[str], args: Namespace) -> dict[str, float]:
    """Print the rows of one set of shards; returns seconds a sample, by variant."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    variants = {name: Turns(name, shards, args) for name in args.variants}
    for _ in range(args.runs):
        for turns in variants.values():
            if args.cold:
                drop_from_page_cache(shards)
            turns.take(args.batches, args.wall)
    seconds = {name: statistics.median(turns.seconds) for name, turns in variants.items()}
    for name, turns in variants.items():
        took = seconds[name]
        cells = [kind, name, f"{1 / took:,.0f}", f"{seconds[args.variants[0]] / took:.2f}"]
        cells += [f"{1000 * took:.2f}", f"{turns.memory:,.0f}"]
        if name in LOADERS:
            buffer = 0.0
            if name != "this loader, passes":  # it has none
                buffer = in_fresh_process(buffer_memory, name, shards, args.shuffle)
            cells += [f"{buffer:,.0f}"]
            cells += [f"{statistics.median(turns.bytes) / 1000:.0f}"]
            cells += [f"{statistics.median(turns.reads):.1f}", f"{turns.sent:.0f}"]
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
        nargs="+",
        help="joined shards, with braces as in WebDataset, also in an object store (s3://…), with "
        "the variant 'this loader, passes'; each pattern is a set of its own; default: generated",
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
    text = "variants to measure; ratios are to the first one; default: all"
    choices: dict[str, Any] = {"choices": list(VARIANTS), "default": list(VARIANTS)}
    parser.add_argument("--variants", nargs="+", **choices, help=text)
    text = "drop the shards from the page cache before each turn, and measure wall time"
    parser.add_argument("--cold", action="store_true", help=text)
    parser.add_argument("--wall", action="store_true", help="measure wall time")
    args = parser.parse_args(arguments)
    args.wall |= args.cold
    if args.profile and not {"this loader", "floor"} <= set(args.variants):
        parser.error("--profile needs the variants 'this loader' and floor")

    print_header(args, torch, np, wds)
    print(
        f"| embeddings | variant | samples/s{'' if args.wall else ' of CPU time'} | ratio "
        "| ms a sample | MB of the worker | MB of a shuffle buffer | KB read | reads "
        "| KB to the trainer |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if args.data:
            sets = {pattern: list(braceexpand(pattern)) for pattern in args.data}
        else:
            sets = write_shards(Path(folder), args.samples, args.seed)
        for kind, shards in sets.items():
            seconds = measure(kind, shards, args)
            if args.profile:
                profile(shards, args, seconds)


if __name__ == "__main__":
    main()
