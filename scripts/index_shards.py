"""Write an index next to each shard, with which training opens it in one read.

    python scripts/index_shards.py datasets/DataCompDR-12M/shards --workers 8

The join writes the indices of its shards itself. This script is for shards from other tools,
or copied without their modification time. It reads the headers of a shard, and those of its
embeddings, but no other content. `<shard>.index` is JSON, of about 90 bytes for each sample;
dr/index.py describes it. Indices that are up to date stay as they are.

A shard that is damaged, or contains anything but regular files with names of up to 100 bytes, gets
no index. Training reads such a shard without one. The script reports it, and the exit status is 1.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lib.pool import run_all
from lib.report import check_least, describe_error, format_table, printable, run_command
from lib.shards import ShardError, expand_braces, find_files
from lib.tar_writer import has_index, write_index
from tqdm import tqdm


def index_shard(shard: str) -> tuple[str, str, str]:
    """Write a shard's index, unless it is up to date; returns the shard, its state and the error,
    if any."""
    try:
        if has_index(Path(shard)):
            return shard, "already there", ""
        write_index(Path(shard))
        return shard, "written", ""
    except (ShardError, OSError) as error:
        return shard, "failed", describe_error(error)


def find_shards(given: Sequence[str]) -> list[str]:
    """The shards of folders, paths and brace patterns."""
    shards: list[str] = []
    for text in given:
        if Path(text).is_dir():
            shards += [str(Path(text, name)) for name in find_files(Path(text), ".tar")]
        else:
            shards += expand_braces(text)
    if not any(map(os.path.isfile, shards)):
        raise SystemExit(f"no shards (*.tar) in {' '.join(given)}")
    return shards


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "folders of shards, shards, or patterns such as 'DIR/{0000..1023}.tar'"
    parser.add_argument("shards", nargs="+", metavar="DIR|PATTERN", help=text)
    cores, text = min(8, os.cpu_count() or 1), "processes; default: one for each core, up to 8"
    parser.add_argument("--workers", type=int, default=cores, help=text)
    args = parser.parse_args(arguments)
    check_least(parser, args, 1, "workers")
    shards, states = find_shards(args.shards), Counter[str]()
    bar = tqdm(run_all(index_shard, shards, args.workers), total=len(shards), unit=" shards")
    for shard, state, error in bar:
        states[state] += 1
        if error:
            bar.write(f"{shard}: no index: {printable(error)}", file=sys.stderr)
    print(format_table((f"indices {state}", number) for state, number in sorted(states.items())))
    if states["failed"]:
        raise SystemExit(f"{states['failed']} of {len(shards)} shards have no index")


if __name__ == "__main__":
    run_command(main, processes="--workers")
