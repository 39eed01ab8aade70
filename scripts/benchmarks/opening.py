"""Measure how long a rank takes to open a run on very many shards, and its memory.

    python scripts/benchmarks/opening.py [--shards 65536] [--samples 19531]

The script makes shards without content (sparse files), each with an index of --samples samples,
and a sizes.json for each thousand of them; the default is DataCompDR-1B. Then, for each run, a new
process does what a rank does before its first batch: it reads the sizes of the shards, permutes
them, finds the window in which its stream begins, and opens the shards of this window by their
indices. The files are in the page cache.

It needs 65,536 x 2 files and 200 MB in a temporary folder, which is removed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from measure import in_fresh_process, print_header, process_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for dr
from dr.index import SUFFIX, VERSION, Array
from dr.loader import PassLoader
from dr.sources import ShardReader, StreamState
from dr.tar import BLOCK, padded

IN_FOLDER = 1000  # shards
# A sample of DataCompDR-1B with bf16 embeddings.
SIZES = {"jpg": 68_000, "txt": 80, "syn.json": 600, "paug.json": 3_000, "json": 150}
EMBEDDINGS = {"image_emb": Array(0, 152, 152, "BF16", 10, 1536)}
EMBEDDINGS["text_emb"] = Array(0, 152, EMBEDDINGS["image_emb"].end, "BF16", 6, 1536)


def write_run(folder: Path, shards: int, samples: int) -> None:
    """Write empty shards, with indices that are links to one file in each folder."""
    sizes = {**SIZES, "safetensors": EMBEDDINGS["text_emb"].end}
    total = samples * sum(BLOCK + padded(size) for size in sizes.values()) + 2 * BLOCK
    arrays = {name: list(vars(array).values()) for name, array in EMBEDDINGS.items()}
    content = {"version": VERSION, "bytes": total, "modified": 1, "header": BLOCK}
    content["layouts"] = [{"extensions": list(sizes), "arrays": arrays}]
    content["samples"] = [[f"{n:032x}", 0, *sizes.values()] for n in range(samples)]
    for first in range(0, shards, IN_FOLDER):
        inside = folder / f"{first // IN_FOLDER:03d}"
        inside.mkdir()
        (inside / "index").write_text(json.dumps(content, separators=(",", ":")))
        names = [f"{shard:08d}.tar" for shard in range(first, min(first + IN_FOLDER, shards))]
        for name in names:
            with open(inside / name, "wb") as file:
                file.truncate(total)
            os.utime(inside / name, (1, 1))
            os.link(inside / "index", inside / f"{name}{SUFFIX}")
        (inside / "sizes.json").write_text(json.dumps(dict.fromkeys(names, samples)))


def open_run(folder: str, ranks: int, workers: int) -> tuple[float, float, float, float]:
    """Seconds and MB of the trainer's process, and of one worker, before the first sample."""
    shards = sorted(str(path) for path in Path(folder).glob("*/*.tar"))
    before, begin = process_memory(), time.perf_counter()
    args = Namespace(accum_freq=1, batch_size=1, world_size=ranks, workers=workers, rank=ranks // 2)
    args.seed, args.train_data, args.train_num_samples = 0, folder, None
    loader = PassLoader(args, None, None, shards)  # type: ignore[arg-type]
    loader.sizes  # noqa: B018  (looked up when it is first needed)
    trainer = time.perf_counter() - begin, process_memory() - before

    before, begin = process_memory(), time.perf_counter()
    reader = ShardReader(shards, "jpg".__eq__)
    stream = args.rank * workers
    state = StreamState(0, loader.sizes, [], ranks * workers, stream, (0, 0))
    window = next(state.windows())
    for shard in {shard for shard, _, _ in window}:
        opened = reader.open_shard(shard)
        assert opened.samples and not opened.fault and not opened.index_fault
    return *trainer, time.perf_counter() - begin, process_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=int, default=65_536, help="number of shards; default %(default)s")
    add("--samples", type=int, default=19_531, help="samples in each; default %(default)s")
    add("--ranks", type=int, default=128, help="ranks of the run; default %(default)s")
    add("--workers", type=int, default=8, help="workers of each rank; default %(default)s")
    add("--runs", type=int, default=5, help="runs; default %(default)s")
    args = parser.parse_args()
    args.seed = 0
    print_header(args, torch)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        write_run(Path(folder), args.shards, args.samples)
        runs = [
            in_fresh_process(open_run, folder, args.ranks, args.workers) for _ in range(args.runs)
        ]
    index = len(json.dumps([["0" * 32, 0, *SIZES.values(), 49152]])) * args.samples / 1e6
    print(f"{args.shards * args.samples:,} samples; an index has {index:.1f} MB\n")
    print("| process | seconds | MB |\n|---|---|---|")
    columns = [statistics.median(column) for column in zip(*runs, strict=True)]
    print(f"| a rank's trainer | {columns[0]:.2f} | {columns[1]:.0f} |")
    print(f"| each of its workers | {columns[2]:.2f} | {columns[3]:.0f} |")


if __name__ == "__main__":
    main()
