"""How fast caption_shards.py is, and in how much memory, on generated metadata.

    python scripts/benchmark_captions.py [--rows 12000000] [--samples 10000000] [--memory 1GB] [--folder DIR]

Makes metadata with the columns of DataComp-1B's that weigh (uid, url, text of about 75 bytes, two sizes, a score,
sha256), a million rows a file, and reinforcement shards of 20,000 samples whose uids are spread over it at random.
So that the disk does with it, a sample there is one empty member instead of five: reading the uids takes longer in
earnest. Runs the script, and prints its table. Options that aren't known here go to the script.

Needs 1.7 KB for each sample and 0.2 KB for each row (20 GB as it stands) in a temporary folder, which is removed.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import duckdb
from join_shards import write_tar
from tqdm import tqdm

SCRIPT = Path(__file__).resolve().parent / "caption_shards.py"
ROWS, SAMPLES = 1_000_000, 20_000  # of a metadata file, of a shard
# words of 1 to 8 letters, 4,096 different ones: zstd makes about 40 % of them, as of real captions
METADATA = """
COPY (
    SELECT md5(i::VARCHAR) AS uid, 'https://img.example.org/' || md5('u' || i) || '.jpg' AS url,
        array_to_string(list_transform(range(10 + (hash(i) % 8)::INT),
            lambda k: left(translate(md5(((hash(i * 31 + k) % 4096))::VARCHAR), '0123456789', 'ghijklmnop'),
                           1 + (hash(i * 37 + k) % 8)::INT)), ' ') AS text,
        600 AS original_width, 400 AS original_height, (hash(i) % 1000) / 1000 AS score, md5('s' || i) AS sha256
    FROM range({first}, {end}) t(i)
) TO '{path}' (FORMAT parquet)
"""


def make_sources(folder, rows, samples):
    for kind in ("metadata", "reinforcements"):
        (folder / kind).mkdir()
    database = duckdb.connect(
        config={"memory_limit": "2GB", "temp_directory": str(folder / "spill")}
    )
    for number, first in enumerate(tqdm(range(0, rows, ROWS), desc="metadata", unit=" files")):
        path = folder / "metadata" / f"{number:05d}.parquet"
        database.execute(METADATA.format(first=first, end=min(rows, first + ROWS), path=path))
    # a permutation of the rows: the step has no common factor with their number
    step = next(n for n in range(rows * 5 // 8 + 1, 2 * rows) if math.gcd(n, rows) == 1)
    for number, first in enumerate(
        tqdm(range(0, samples, SAMPLES), desc="reinforcements", unit=" shards")
    ):
        query = f"SELECT md5((i * {step} % {rows})::VARCHAR) FROM range({first}, {min(samples, first + SAMPLES)}) t(i)"
        uids = [uid for (uid,) in database.execute(query).fetchall()]
        with open(folder / "reinforcements" / f"{number:08d}.tar", "wb") as file:
            write_tar(file, ((uid, {"paug.json": b""}) for uid in uids))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=12_000_000)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    args, further = parser.parse_known_args()
    if not 0 < args.samples <= args.rows:
        parser.error("--samples: at least 1, and no more than --rows")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        make_sources(folder, args.rows, args.samples)
        sources = ["--metadata", folder / "metadata", "--shards-of", folder / "reinforcements"]
        command = [sys.executable, SCRIPT, *sources, "--output", folder / "captions", *further]
        raise SystemExit(subprocess.run([str(part) for part in command], check=False).returncode)


if __name__ == "__main__":
    main()
