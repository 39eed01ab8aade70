"""Share shards among tasks, which may be those of a Slurm array, and among torchrun's ranks."""

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

Shard = TypeVar("Shard")  # a name, or whatever stands for a shard

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add --task-index and --task-count, whose defaults are Slurm's."""
    add, slurm = parser.add_argument, os.environ.get
    index = int(slurm("SLURM_ARRAY_TASK_ID", 0)) - int(slurm("SLURM_ARRAY_TASK_MIN", 0))
    text = "number of this task, 0 to N - 1; default: Slurm's, or 0"
    add("--task-index", type=int, default=index, metavar="I", help=text)
    count, text = int(slurm("SLURM_ARRAY_TASK_COUNT", 1)), "number of tasks; default: Slurm's, or 1"
    add("--task-count", type=int, default=count, metavar="N", help=text)


def check_task(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a line if there is no such task."""
    if not 0 <= args.task_index < args.task_count:
        parser.error(
            f"--task-index {args.task_index} --task-count {args.task_count}: expected an index of "
            "0 to count - 1"
        )


def select_share(shards: Sequence[Shard], index: int, count: int) -> Sequence[Shard]:
    """The shards of a task: neighbours, so that they are in few folders."""
    return shards[len(shards) * index // count : len(shards) * (index + 1) // count]


def wait_for_other_ranks() -> None:
    """Under torchrun, wait until all ranks are done: one that fails would end the others."""
    import torch.distributed as dist  # takes 200 MB and seconds, for commands that need no torch

    if dist.is_torchelastic_launched() and WORLD_SIZE > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()
