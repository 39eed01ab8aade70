"""Run one step of the quickstart: its output goes to a log file, its progress to one line.

    python scripts/quickstart/progress.py [--samples N] LABEL LOG COMMAND …

The script reads the progress from the command's output: from OpenCLIP's training log (then
--samples is the number of samples of the whole run), or from a tqdm bar. On a terminal one line is
redrawn, with the time left; elsewhere a few lines are printed. If the command fails, the end of the
log is printed.
"""

import argparse
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

TRAINED = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/(\d+) ")
EVALUATED = re.compile(
    r"Eval Epoch: \d+ .*image_to_text_R@1: ([\d.]+).*text_to_image_R@1: ([\d.]+)"
)
BAR = re.compile(r"(\d+)%\|")  # of tqdm
LINE = "{desc}{percentage:4.0f} % |{bar}| {elapsed}, {remaining} left{postfix}"
WIDEST = 100  # columns
TICK = 1.0  # seconds after which the line is redrawn
SILENCE = 60.0  # least seconds between two lines that are not on a terminal
TAIL = 40  # lines that are printed of a failed step's log


def read_lines(pipe: BinaryIO) -> Iterator[tuple[str, bool]]:
    """Lines of output, each with whether it is complete; an empty one after every TICK.

    A line that ends in a carriage return is incomplete: the next one is printed over it.
    """
    rest = b""
    while True:
        if not select.select([pipe], [], [], TICK)[0]:
            yield "", False
            continue
        data = os.read(pipe.fileno(), 1 << 16)
        *lines, rest = re.split(rb"(?<=[\r\n])", rest + data.replace(b"\r\n", b"\n"))
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r\n"), line.endswith(b"\n")
        if not data:
            if rest:
                yield rest.decode(errors="replace"), True
            return


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """One step's progress: a line on a terminal, a few lines elsewhere.

    Args:
        label: begins each line.
        samples: of a whole training run; None for a command with a tqdm bar.
    """

    def __init__(self, label: str, samples: int | None) -> None:
        self.label = label
        self.samples = samples
        self.recall = ""  # of the latest evaluation
        self.start = self.printed = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.bar = tqdm(
            desc=label,
            total=100,
            bar_format=LINE,
            ncols=min(shutil.get_terminal_size().columns - 1, WIDEST),
            file=sys.stdout,
            leave=False,
            smoothing=0,
            disable=not self.terminal,
        )

    def read(self, line: str) -> None:
        """Take the progress from a line of the command's output, if it has any."""
        if self.samples and (match := TRAINED.search(line)):
            epoch, done, epoch_samples = map(int, match.groups())
            self.show((epoch * epoch_samples + done) / self.samples)
        elif match := EVALUATED.search(line):
            self.recall = f", R@1 {100 * float(match[1]):.1f} / {100 * float(match[2]):.1f} %"
            self.bar.set_postfix_str(self.recall.removeprefix(", "))
        elif not self.samples and (match := BAR.search(line)):
            self.show(int(match[1]) / 100)
        if self.terminal:
            self.bar.refresh()

    def show(self, part: float) -> None:
        now = time.monotonic()
        self.bar.n = 100 * part
        if not self.terminal and now - self.printed >= SILENCE and 0 < part < 1:
            left = format_seconds((now - self.start) / part * (1 - part))
            print(f"{self.label} {part:.0%}, {left} left{self.recall}", flush=True)
            self.printed = now

    def close(self, succeeded: bool) -> None:
        self.bar.close()
        took = format_seconds(time.monotonic() - self.start)
        print(f"{self.label} {'' if succeeded else 'failed after '}{took}{self.recall}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, help="number of samples of a training run")
    parser.add_argument("label", metavar="LABEL", help="begins each line")
    parser.add_argument("log", type=Path, metavar="LOG", help="file for the command's output")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND …")
    args = parser.parse_args()

    progress = Progress(args.label, args.samples)
    process = subprocess.Popen(
        args.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout
    try:
        with open(args.log, "w") as log:
            for line, complete in read_lines(process.stdout):
                if complete:
                    print(line, file=log, flush=True)
                progress.read(line)
        status = process.wait()
    except KeyboardInterrupt:  # the command got it too
        process.wait()
        progress.bar.close()
        raise SystemExit(130) from None
    progress.close(status == 0)
    if status:
        tail = args.log.read_text().splitlines()[-TAIL:]
        print(*tail, f"error: the step failed, see {args.log}", sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
