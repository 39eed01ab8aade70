"""How often each sample is seen in each pass, over real runs of the patched trainer: prints a
table.

    python tests/sampling_coverage.py [OPEN_CLIP_TREE]

The layouts of LAYOUTS are trained one after the other under torchrun, on 1, 2 and 3 processes on
the CPU. A sample's pass is told by its augmentation: in four passes each of its four comes once.
test_sampling_runs.py asserts the same.
"""

import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import environment, run  # noqa: E402
from shards import AUGMENTATION, reinforced_sample, uid, write_shard  # noqa: E402

from dr.sampling import ScheduledChoice, ShardOrder, iterate_windows  # noqa: E402

SEED = 3
AUGMENTATIONS = 4  # and so many passes can be told apart


class Layout(NamedTuple):
    sizes: list[int]  # samples in each shard
    ranks: int
    workers: int
    batch: int  # of a rank
    epoch: int  # samples
    epochs: int

    def passes(self):
        return (
            self.epochs
            * -(-self.epoch // (self.batch * self.ranks))
            * self.batch
            * self.ranks
            / sum(self.sizes)
        )


LAYOUTS = [
    #      shards         ranks  workers  batch  epoch  epochs
    Layout([24, 24], 1, 0, 8, 48, 2),  # all divide
    Layout([17, 9, 5], 1, 2, 4, 31, 3),
    Layout([50], 1, 3, 7, 20, 6),  # one shard for three workers
    Layout([24, 24, 24, 24], 2, 2, 8, 96, 2),  # all divide
    Layout([24, 24, 24, 24], 2, 1, 8, 32, 8),  # an epoch is a third of a pass
    Layout([13, 7, 20, 1, 8], 2, 2, 5, 49, 3),  # nothing divides
    Layout([13, 7, 20, 1, 8], 2, 3, 4, 120, 1),  # an epoch spans passes
    Layout([3, 2], 2, 2, 2, 4, 4),  # nearly as many streams as samples
    Layout([24, 24, 24], 3, 1, 8, 72, 3),  # all divide
    Layout([31, 30, 29], 3, 2, 5, 40, 7),
    Layout([2, 1, 4], 3, 4, 1, 6, 4),  # fewer samples than streams
    Layout([60, 40], 3, 2, 6, 250, 1),
    Layout([7] * 15, 3, 1, 9, 50, 6),
]


def write_shards(folder, sizes):
    """Shards of numbered samples with AUGMENTATIONS augmentations and 3 synthetic captions; returns
    their pattern."""
    number = itertools.count()
    for shard, size in enumerate(sizes):
        samples = [
            (uid(seed), reinforced_sample(seed, AUGMENTATIONS, 3))
            for seed in itertools.islice(number, size)
        ]
        write_shard(folder / f"{shard:08d}.tar", samples)
    return f"{folder}/{{00000000..{len(sizes) - 1:08d}}}.tar"


def write_config(folder):
    path = Path(folder) / "config.json"
    path.write_text(
        json.dumps(
            {"num_samples": AUGMENTATIONS, "reinforce": {"image_augmentation": AUGMENTATION}}
        )
    )
    return path


def options(shards, config, logs, name="run", **changes):
    """The trainer's options for recorded_training.py."""
    given = {
        "train_data": shards, "dataset_type": "webdataset", "train_num_samples": 64, "epochs": 2, "batch_size": 8,
        "workers": 2, "model": ROOT / "tests" / "data" / "tiny_vit.json", "warmup": 2, "lr": "1e-3", "seed": SEED,
        "precision": "fp32", "dist_backend": "gloo", "log_every_n_steps": 1, "logs": logs, "name": name,
        "dataset_reinforcement": True, "dataset_reinforcement_config": config, "distill_teacher_dimension": 12,
        "distill_logit_scale": 100, "dataset_without_replacement": True, **changes,
    }  # fmt: skip
    words = []
    for option, value in given.items():
        if value is not None and value is not False:
            words += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def command(ranks, runs, folder):
    """Of recorded_training.py, under torchrun."""
    path = Path(folder) / "runs.json"
    path.write_text(json.dumps(runs, default=str))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *torchrun, ROOT / "tests" / "recorded_training.py", path]


def train(tree, ranks, runs, folder):
    return run(command(ranks, runs, folder), env=environment(tree))


def recorded(*folders):
    """What was trained on, as {(rank, batch of the run): entry}.

    Of several runs, each of which went on with the last one, what led to the end.
    """
    batches = {}
    for folder in folders:
        found, started = {}, None
        for path in Path(folder).glob("*.jsonl"):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if "epoch" in entry:
                    at = entry["epoch"] * entry["batches"] + entry["first"]
                    started = at if started is None else min(started, at)
                elif "samples" in entry:
                    found[path.stem, at] = entry
                    at += 1
                else:
                    found[path.stem, at - 1].setdefault("losses", []).append(entry["loss"])
        batches = {key: entry for key, entry in batches.items() if key[1] < started} | found
    return batches


def seen(batches):
    """How often each (pass, sample) was trained on."""
    pass_of = {}
    count = Counter()
    for entry in batches.values():
        for sample, augmentation in zip(entry["samples"], entry["augmentations"], strict=True):
            if sample not in pass_of:
                turns = [
                    ScheduledChoice(SEED, pass_).choose(uid(sample), "augmentation", AUGMENTATIONS)
                    for pass_ in range(AUGMENTATIONS)
                ]
                pass_of[sample] = {turn: pass_ for pass_, turn in enumerate(turns)}
            count[pass_of[sample][augmentation], sample] += 1
    return count


def iterate_positions(*stream):
    """What ``iterate_windows`` yields, position by position."""
    return itertools.chain.from_iterable(iterate_windows(*stream))


def taken(sampling):
    """The (pass, shard, place) that streams have taken, by what a checkpoint says; on one
    layout."""
    streams, total = len(sampling["cursors"]), sum(sampling["sizes"])
    order = lru_cache(None)(lambda pass_: ShardOrder(sampling["seed"], pass_, sampling["sizes"]))
    found = []
    for stream, cursor in enumerate(sampling["cursors"]):
        for pass_, position, after in iterate_positions(
            sampling["seed"], total, [], streams, stream, (0, 0)
        ):
            if after > tuple(cursor):
                break
            found.append((pass_, *order(pass_).locate(position)))
    return found


def main():
    work = Path(tempfile.mkdtemp(prefix="coverage-"))
    tree = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "open_clip"
    try:
        config = write_config(work)
        for ranks in sorted({layout.ranks for layout in LAYOUTS}):
            runs = []
            for number, layout in enumerate(LAYOUTS):
                if layout.ranks == ranks:
                    shards = write_shards(work / f"shards{number}", layout.sizes)
                    runs.append(one_run(layout, shards, config, work / f"run{number}"))
            done = train(tree, ranks, runs, work)
            if done.returncode:
                sys.exit(done.stderr[-5000:])
        counts = ("complete passes: once", "twice", "never", "rest: once", "twice")
        head = ("shards", "ranks", "workers", "batch", "epochs", "passes", *counts)
        print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for number, layout in enumerate(LAYOUTS):
            row = coverage(layout, work / f"run{number}")
            sizes = f"{len(layout.sizes)} of {min(layout.sizes)} to {max(layout.sizes)}"
            cells = (
                sizes,
                *layout[1:4],
                f"{layout.epochs} x {layout.epoch}",
                f"{layout.passes():.2f}",
                *row,
            )
            print(f"| {' | '.join(map(str, cells))} |")
    finally:
        shutil.rmtree(work)


def one_run(layout, shards, config, folder, **changes):
    given = {
        "workers": layout.workers,
        "batch_size": layout.batch,
        "train_num_samples": layout.epoch,
        **changes,
    }
    return {
        "record": folder / "record",
        "options": options(shards, config, folder, epochs=layout.epochs, **given),
    }


def coverage(layout, folder):
    """(samples of complete passes seen once, twice or more, never; samples of the others seen once,
    twice or more)."""
    import torch

    last = torch.load(
        folder / "run" / "checkpoints" / f"epoch_{layout.epochs}.pt", weights_only=True
    )
    passes = Counter(pass_ for pass_, *_ in taken(last["dr"]["sampling"]))
    total = sum(layout.sizes)
    done = [pass_ for pass_, count in passes.items() if count == total]
    count = seen(recorded(folder / "record"))
    keys = [(pass_, sample) for pass_ in done for sample in range(total)]
    once = sum(count[key] == 1 for key in keys)
    twice = sum(count[key] > 1 for key in keys)
    rest = [times for (pass_, _), times in count.items() if pass_ not in done]
    return once, twice, len(keys) - once - twice, rest.count(1), len(rest) - rest.count(1)


if __name__ == "__main__":
    main()
