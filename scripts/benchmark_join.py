"""How fast the join is, and in how much memory, beside `cat` and beside unpacking and packing again.

    python scripts/benchmark_join.py [--samples 5000] [--runs 3] [--folder DIR]

Makes two shards each of images with captions and of reinforcements, of random bytes in real proportions: a sample has
an image of 60 KB, an npz of 221 KB and five small members. Then, by turns, with one process for both shards and with
two processes for one each:

    cat                 each pair of source shards into one file
    unpack and pack     each pair into a folder with tar, and that into a tar, samples together; the folder's removal
                        is not counted
    join                scripts/join_shards.py

and prints a table: time, in seconds until the command ends and until its bytes are on disk too (sync), median of the
runs; the largest process's peak of memory (at least this one's, 20 MB); times as long as cat. The sources are in the
page cache, as far as it holds them. Last, what --embeddings bf16 makes of random embeddings of unit norm: size, and
rounding error.

Needs about 5 times the sources' size (14 GB at 5,000 samples) in a temporary folder, which is removed at the end.
"""

import argparse
import gzip
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARDS = ("00000000.tar", "00000001.tar")
IMAGE, EMBEDDINGS = 60_000, 221_700  # bytes; 36 x 1536 float32 and npz's headers
SMALL = {
    "url.txt": 80,
    "syn.json": 300,
    "paug.json": 4_000,
    "json": 120,
}  # beside txt; of one sample of the 12M set


def write_shard(path, samples):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for uid, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{uid}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                tar.members.clear()


def make_sources(folder, samples, seed):
    """``[(images, reinforcements)]``, the shards."""
    rng, pairs = random.Random(seed), []
    for name in SHARDS:
        uids = [rng.randbytes(16).hex() for _ in range(samples)]
        pair = folder / "images" / name, folder / "reinforcements" / name
        for path in pair:
            path.parent.mkdir(exist_ok=True)
        write_shard(
            pair[0],
            (
                (uid, {"jpg": rng.randbytes(IMAGE), "txt": b"a caption of some words"})
                for uid in uids
            ),
        )

        def reinforcement(uid):
            small = {extension: rng.randbytes(size) for extension, size in SMALL.items()}
            return small | {
                "npz": rng.randbytes(EMBEDDINGS),
                "json": json.dumps({"uid": uid}).encode(),
            }

        write_shard(pair[1], ((uid, reinforcement(uid)) for uid in uids))
        pairs.append(pair)
    return pairs


def commands(pairs, folder, workers):
    """``{way: shell commands, to be run side by side}``."""
    cat = [
        f"cat {images} {reinforcements} > {folder}/{images.name}"
        for images, reinforcements in pairs
    ]
    pack = [
        f"mkdir {folder}/{images.name}.d && tar xf {images} -C {folder}/{images.name}.d "
        f"&& tar xf {reinforcements} -C {folder}/{images.name}.d "
        f"&& tar cf {folder}/{images.name} -C {folder}/{images.name}.d --sort=name ."
        for images, reinforcements in pairs
    ]
    sources = " ".join(f"--source {path.parent}" for path in pairs[0])
    join = f"{sys.executable} {ROOT}/scripts/join_shards.py {sources} --output {folder} --workers {workers}"
    shared = [lambda ways: ways, lambda ways: [" && ".join(ways)]][workers == 1]
    return {"cat": shared(cat), "unpack and pack": shared(pack), "join": [join]}


def measure(shells, folder):
    """``(seconds, seconds with sync, MB)`` of commands side by side; their output folder is emptied."""
    folder.mkdir()
    os.sync()
    start = time.monotonic()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(["bash", "-c", f"set -e; {shell}"], **silent) for shell in shells]
    ends = [os.wait4(process.pid, 0)[1:] for process in processes]
    ended = time.monotonic() - start
    os.sync()
    synced = time.monotonic() - start
    if any(status for status, _ in ends):
        raise SystemExit(f"failed: {' / '.join(shells)}")
    shutil.rmtree(folder)
    return ended, synced, max(usage.ru_maxrss for _, usage in ends) / 1000


def of_cpu(field):
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith(field)),
        platform.machine(),
    )


def print_header(args):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    tar = subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout.splitlines()[
        0
    ]
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", args.folder], capture_output=True, text=True
    ).stdout.strip()
    print(
        f"{of_cpu('model name')}, {os.cpu_count()} cores, {memory:.0f} GB, {kind}; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {tar}")
    print(
        f"2 shards of {args.samples:,} samples, seed {args.seed}; median of {args.runs} runs by turns\n"
    )


def print_embeddings(args):
    """What bf16 makes of the embeddings of some samples."""
    import numpy as np
    import torch

    sys.path.append(str(ROOT / "scripts"))
    from join_shards import GZIP_LEVEL

    rng, wide, packed, error = (
        np.random.default_rng(args.seed),
        [],
        {0: [], GZIP_LEVEL: [], 9: []},
        [],
    )
    for _ in range(100):
        blocks = rng.standard_normal(
            (36, 2, 768), dtype=np.float32
        )  # two teachers, each of unit length by itself
        rows = (blocks / np.linalg.norm(blocks, axis=-1, keepdims=True)).reshape(36, 1536)
        stored = {"image_emb": rows[:30], "text_emb": rows[30:]}
        stream = io.BytesIO()
        np.savez(stream, **stored)
        wide.append(stream.tell())
        narrow, stream = (
            {name: torch.from_numpy(part).bfloat16() for name, part in stored.items()},
            io.BytesIO(),
        )
        torch.save(narrow, stream)
        for level, sizes in packed.items():
            sizes.append(len(gzip.compress(stream.getvalue(), level, mtime=0)))
        for name, part in narrow.items():
            difference = np.abs(part.float().numpy() - stored[name])
            error.append([difference.max(), (difference / np.abs(stored[name])).max()])
    sizes = ", ".join(f"{np.mean(sizes):,.0f} at level {level}" for level, sizes in packed.items())
    print(
        f"\n36 x 1536 embeddings, bytes of a sample: npz {np.mean(wide):,.0f}; bf16 pth.gz {sizes} (0: no compression)"
    )
    print("largest rounding error: {:.1e}, {:.2%} of the number".format(*np.max(error, axis=0)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=5000, help="in each shard; default %(default)s"
    )
    parser.add_argument("--runs", type=int, default=3, help="default %(default)s")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="for temporary files; default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    needed = 5 * len(SHARDS) * args.samples * (IMAGE + EMBEDDINGS + sum(SMALL.values()) + 8 * 1024)
    if (free := shutil.disk_usage(args.folder).free) < needed:
        raise SystemExit(
            f"{args.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; give a --folder"
        )
    print_header(args)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark_join-") as folder:
        pairs = make_sources(Path(folder), args.samples, args.seed)
        size = sum(path.stat().st_size for pair in pairs for path in pair)
        print(
            f"| workers | way | s | s with sync | GB/s | MB | x cat | x cat with sync |\n|{'---|' * 8}"
        )
        for workers in (1, 2):
            ways = commands(pairs, Path(folder) / "out", workers)
            runs = {way: [] for way in ways}
            for _ in range(args.runs):
                for way, shells in ways.items():
                    runs[way].append(measure(shells, Path(folder) / "out"))
            medians = {
                way: [statistics.median(column) for column in zip(*runs[way], strict=True)]
                for way in ways
            }
            for way, (ended, synced, memory) in medians.items():
                ratios = ended / medians["cat"][0], synced / medians["cat"][1]
                print(
                    f"| {workers} | {way} | {ended:.2f} | {synced:.2f} | {size / ended / 1e9:.2f} | {memory:.0f} "
                    f"| {ratios[0]:.2f} | {ratios[1]:.2f} |",
                    flush=True,
                )
    print_embeddings(args)


if __name__ == "__main__":
    main()
