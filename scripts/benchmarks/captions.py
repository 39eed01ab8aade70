"""Measure scripts/caption_shards.py on generated metadata: time and memory.

    python scripts/benchmarks/captions.py [--rows 12000000] [--samples 10000000] [--folder DIR]
                                          [--memory 1GB and other options of caption_shards.py]

The benchmark makes metadata with the large columns of DataComp-1B (uid, url, text of about 75
bytes, two sizes, a score, sha256), a million rows a file, and reinforcement shards of 20,000
samples whose uids are spread over the metadata at random. To save space a sample has one empty
member instead of five, so reading real uids takes longer. Then it runs caption_shards.py, which
prints its table.

It needs 1.7 KB for each sample and 0.2 KB for each row (20 GB by default) in a temporary folder,
which is removed.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import duckdb
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for lib
from lib.tar_writer import write_tar

SCRIPT = Path(__file__).resolve().parents[1] / "caption_shards.py"
METADATA_ROWS = 1_000_000  # of a file
SHARD_SAMPLES = 20_000
# Words of 1 to 8 letters, 4,096 different ones: zstd reduces them to about 40 %, as real captions.
METADATA = """
COPY (
    SELECT md5(i::VARCHAR) AS uid, 'https://img.example.org/' || md5('u' || i) || '.jpg' AS url,
        array_to_string(list_transform(
            range(10 + (hash(i) % 8)::INT),
            lambda k: left(
                translate(md5(((hash(i * 31 + k) % 4096))::VARCHAR), '0123456789', 'ghijklmnop'),
                1 + (hash(i * 37 + k) % 8)::INT)), ' ') AS text,
        600 AS original_width, 400 AS original_height, (hash(i) % 1000) / 1000 AS score,
        md5('s' || i) AS sha256
    FROM range({first}, {end}) t(i)
) TO '{path}' (FORMAT parquet)
"""


def make_sources(folder: Path, rows: int, samples: int) -> tuple[Path, Path]:
    """Write the metadata and the reinforcement shards; returns their folders."""
    metadata, shards = folder / "metadata", folder / "reinforcements"
    metadata.mkdir()
    shards.mkdir()
    config = {"memory_limit": "2GB", "temp_directory": str(folder / "spill")}
    database = duckdb.connect(config=config)
    starts = range(0, rows, METADATA_ROWS)
    for number, first in enumerate(tqdm(starts, desc="metadata", unit=" files")):
        path, end = metadata / f"{number:05d}.parquet", min(rows, first + METADATA_ROWS)
        database.execute(METADATA.format(first=first, end=end, path=path))
    # Uids in the order of a permutation of the rows: the step and their number are coprime.
    step = next(n for n in range(rows * 5 // 8 + 1, 2 * rows) if math.gcd(n, rows) == 1)
    starts = range(0, samples, SHARD_SAMPLES)
    for number, first in enumerate(tqdm(starts, desc="reinforcements", unit=" shards")):
        end = min(samples, first + SHARD_SAMPLES)
        query = f"SELECT md5((i * {step} % {rows})::VARCHAR) FROM range({first}, {end}) t(i)"
        uids = [uid for (uid,) in database.execute(query).fetchall()]
        with open(shards / f"{number:08d}.tar", "wb") as file:
            write_tar(file, ((uid, {"paug.json": b""}) for uid in uids))
    return metadata, shards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=12_000_000, help="rows of the metadata; default %(default)s"
    )
    parser.add_argument(
        "--samples", type=int, default=10_000_000, help="samples in the shards; default %(default)s"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder in which to make the temporary folder; default: the system's",
    )
    args, further = parser.parse_known_args()
    if not 0 < args.samples <= args.rows:
        parser.error(f"--samples: found {args.samples}, expected 1 to --rows, {args.rows}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        metadata, shards = make_sources(Path(folder), args.rows, args.samples)
        command = [sys.executable, SCRIPT, "--metadata", metadata]
        command += ["--shards-of", shards, "--output", Path(folder) / "captions", *further]
        done = subprocess.run([str(part) for part in command], check=False)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
