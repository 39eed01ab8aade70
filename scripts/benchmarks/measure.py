"""Shared code of the benchmarks: a header, medians of alternating runs, and memory."""

import multiprocessing
import os
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def machine() -> str:
    """The CPU, its cores and memory, and the load."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GB; load {os.getloadavg()[0]:.1f}"


def print_header(args: Namespace, *libraries: ModuleType) -> None:
    """Print the machine, the versions, the seed and the number of runs."""
    versions = [f"{library.__name__} {library.__version__}" for library in libraries]
    print(machine())
    system = f"{platform.system()} {platform.release()}"
    print(", ".join([system, f"Python {platform.python_version()}", *versions]))
    print(f"seed {args.seed}; median of {args.runs} runs, alternating\n")


def median_seconds(
    variants: dict[str, Callable[[], object]],
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time functions alternately; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(runs + 1):
        for name, function in variants.items():
            start = clock()
            function()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def process_memory(field: str = "VmRSS") -> float:
    """A field of /proc/self/status in MB: VmRSS is the current size, VmHWM the largest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1000
    raise ValueError(f"/proc/self/status has no {field}")


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Call a function of a module in a new process, so that earlier allocations do not count."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
