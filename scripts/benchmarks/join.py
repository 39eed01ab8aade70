"""Measure the join: time and memory, next to `cat` and to unpacking and packing again.

    python scripts/benchmarks/join.py [--samples 5000] [--runs 3] [--folder DIR]

The script makes two shards of images with captions and two of reinforcements, of random bytes in
realistic proportions: a sample has an image of 60 KB, an npz of 222 KB and five small members. Then
it runs alternately, with one process for both shards and with two processes for one shard each:

    cat                 each pair of source shards into one file
    unpack and pack     each pair into a folder with tar, and the folder into a tar in which samples
                        are together; removing the folder is not measured
    join                scripts/join_shards.py

The table has the seconds until the command ends and until its bytes are on disk (sync), the median
of the runs; the largest process's peak memory (at least this one's, 20 MB); and ratios to cat. The
sources are in the page cache, as far as they fit. At the end come the size and the rounding error
of --embeddings bf16, for random embeddings of unit length.

It needs about 5 times the size of the sources (14 GB for 5,000 samples) in a temporary folder,
which is removed.
"""

import argparse
import gzip
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from measure import print_header

SCRIPTS = Path(__file__).resolve().parents[1]
SHARDS = ("00000000.tar", "00000001.tar")
IMAGE, EMBEDDINGS = 60_000, 221_700  # bytes; 36 x 1536 float32 and npz's headers
# Bytes of the other members of a sample of the 12M set, without txt.
SMALL = {"url.txt": 80, "syn.json": 300, "paug.json": 4_000, "json": 120}

GZIP_LEVELS = (0, 1, 9)  # join_shards.py uses 1

Pair = tuple[Path, Path]  # a shard of images, and the shard of reinforcements


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for uid, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{uid}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            tar.members.clear()  # it keeps every header otherwise


def make_sources(folder: Path, samples: int, seed: int) -> list[Pair]:
    rng, pairs = random.Random(seed), []

    def image(uid: str) -> tuple[str, dict[str, bytes]]:
        return uid, {"jpg": rng.randbytes(IMAGE), "txt": b"a caption of some words"}

    def reinforcement(uid: str) -> tuple[str, dict[str, bytes]]:
        members = {extension: rng.randbytes(size) for extension, size in SMALL.items()}
        members |= {"npz": rng.randbytes(EMBEDDINGS), "json": json.dumps({"uid": uid}).encode()}
        return uid, members

    for name in SHARDS:
        uids = [rng.randbytes(16).hex() for _ in range(samples)]
        pair = folder / "images" / name, folder / "reinforcements" / name
        write_shard(pair[0], map(image, uids))
        write_shard(pair[1], map(reinforcement, uids))
        pairs.append(pair)
    return pairs


def shell_commands(pairs: list[Pair], output: Path, workers: int) -> dict[str, list[str]]:
    """``{way: shell commands to run at the same time}``."""
    cat, pack = [], []
    for images, reinforcements in pairs:
        joined = output / images.name
        cat.append(f"cat {images} {reinforcements} > {joined}")
        pack.append(
            f"mkdir {joined}.d && tar xf {images} -C {joined}.d "
            f"&& tar xf {reinforcements} -C {joined}.d "
            f"&& tar cf {joined} -C {joined}.d --sort=name ."
        )
    if workers == 1:
        cat, pack = [" && ".join(cat)], [" && ".join(pack)]
    sources = " ".join(f"--source {path.parent}" for path in pairs[0])
    script = f"{sys.executable} {SCRIPTS}/join_shards.py"
    join = f"{script} {sources} --output {output} --workers {workers}"
    return {"cat": cat, "unpack and pack": pack, "join": [join]}


def measure(commands: list[str], output: Path) -> tuple[float, float, float]:
    """Seconds, seconds with sync, and MB of commands at the same time. Removes their output."""
    output.mkdir()
    os.sync()
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            ["bash", "-c", f"set -e; {command}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]
    ends = [os.wait4(process.pid, 0) for process in processes]
    seconds = time.monotonic() - start
    os.sync()
    synced = time.monotonic() - start
    if any(status for _, status, _ in ends):
        raise SystemExit(f"failed: {' / '.join(commands)}")
    shutil.rmtree(output)
    return seconds, synced, max(usage.ru_maxrss for _, _, usage in ends) / 1000


def print_embeddings(seed: int) -> None:
    """Print the size and the rounding error of the embeddings of some samples in bf16."""
    import numpy as np
    import safetensors.torch
    import torch

    rng = np.random.default_rng(seed)
    npz_sizes, packed_sizes, errors = [], {level: [] for level in GZIP_LEVELS}, []
    for _ in range(100):
        # two teachers, each of unit length by itself
        blocks = rng.standard_normal((36, 2, 768), dtype=np.float32)
        rows = (blocks / np.linalg.norm(blocks, axis=-1, keepdims=True)).reshape(36, 1536)
        stored = {"image_emb": rows[:30], "text_emb": rows[30:]}
        npz, pth = io.BytesIO(), io.BytesIO()
        np.savez(npz, **stored)
        rounded = {name: torch.from_numpy(part).bfloat16() for name, part in stored.items()}
        torch.save(rounded, pth)
        npz_sizes.append(npz.tell())
        for level, sizes in packed_sizes.items():
            sizes.append(len(gzip.compress(pth.getvalue(), level, mtime=0)))
        for name, part in rounded.items():
            error = np.abs(part.float().numpy() - stored[name])
            errors.append([error.max(), (error / np.abs(stored[name])).max()])
    sizes = ", ".join(f"{np.mean(s):,.0f} at level {level}" for level, s in packed_sizes.items())
    print(
        f"\n36 x 1536 embeddings, bytes a sample: npz {np.mean(npz_sizes):,.0f}; "
        f"bf16 safetensors {len(safetensors.torch.save(rounded)):,}; "
        f"bf16 pth.gz {sizes} (0: no compression)"
    )
    absolute, relative = np.max(errors, axis=0)
    print(f"largest rounding error: {absolute:.1e}, {relative:.2%} of the number")


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=5000, help="samples in each shard; default %(default)s"
    )
    parser.add_argument(
        "--runs", type=int, default=3, help="runs of each command; default %(default)s"
    )
    parser.add_argument(
        "--folder",
        default=tempfile.gettempdir(),
        help="folder for temporary files; default %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default %(default)s")
    args = parser.parse_args()

    needed = 5 * len(SHARDS) * args.samples * (IMAGE + EMBEDDINGS + sum(SMALL.values()) + 8 * 1024)
    free = shutil.disk_usage(args.folder).free
    if free < needed:
        raise SystemExit(
            f"{args.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; "
            "give another --folder"
        )
    print_header(args)
    kind = first_line("stat", "-f", "-c", "%T", args.folder)
    print(f"2 shards of {args.samples:,} samples on {kind}; {first_line('tar', '--version')}\n")
    print("| workers | way | s | s with sync | GB/s | MB | x cat | x cat with sync |")
    print(f"|{'---|' * 8}")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark_join-") as folder:
        pairs = make_sources(Path(folder), args.samples, args.seed)
        size = sum(path.stat().st_size for pair in pairs for path in pair)
        output = Path(folder) / "out"
        for workers in (1, 2):
            ways = shell_commands(pairs, output, workers)
            turns: dict[str, list[tuple]] = {way: [] for way in ways}
            for _ in range(args.runs):
                for way, commands in ways.items():
                    turns[way].append(measure(commands, output))
            medians = {
                way: [statistics.median(column) for column in zip(*turns[way], strict=True)]
                for way in ways
            }
            for way, (seconds, synced, memory) in medians.items():
                cells = [f"{workers}", way, f"{seconds:.2f}", f"{synced:.2f}"]
                cells += [f"{size / seconds / 1e9:.2f}", f"{memory:.0f}"]
                cells += [f"{seconds / medians['cat'][0]:.2f}", f"{synced / medians['cat'][1]:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    print_embeddings(args.seed)


if __name__ == "__main__":
    main()
