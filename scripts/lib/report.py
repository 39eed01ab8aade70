"""What commands print: tables, text that is safe for a terminal, and errors in one line."""

import argparse
import sys
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool

from .shards import ShardError


def printable(text: object, limit: int = 160) -> str:
    """Text from a shard or a server in one line, without what a terminal might obey."""
    line = " ".join(str(text).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def describe_error(error: BaseException) -> str:
    """An error in one line, with its type unless it is one that explains itself."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, ShardError | OSError) else f"{type(error).__name__}: {line}"


def format_table(rows: Iterable[tuple[str, int]], total: int | None = None) -> str:
    """Labels and numbers in columns; with ``total`` also each number's share of it."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {number:>13,}" for label, number in rows]
    if total is not None:
        shares = (f"  {number / max(total, 1):>6.1%}" for _, number in rows)
        lines = [line + share for line, share in zip(lines, shares, strict=True)]
    return "\n".join(lines)


def check_least(
    parser: argparse.ArgumentParser, args: argparse.Namespace, least: int, *options: str
) -> None:
    """Exit with a line if an option, by its name in ``args``, has a value under ``least``."""
    for option in options:
        if (value := getattr(args, option)) is not None and value < least:
            parser.error(f"--{option.replace('_', '-')} {value}: expected at least {least}")


def run_command(
    main: Callable[[], None],
    *known: type[Exception],
    interrupted: str = "run it again to go on",
    processes: str = "--workers",
) -> None:
    """Run a command's main function, and report expected errors in one line, with exit status 1.

    The line begins with ``error: ``, also if the command raises SystemExit with a text.

    Args:
        main: the command.
        known: errors, besides OSError, whose text is meant for people.
        interrupted: what to do after Ctrl-C.
        processes: the option that sets the number of processes.
    """
    expected: tuple[type[BaseException], ...] = (OSError, *known)
    try:
        main()
    except KeyboardInterrupt:
        # An object whose construction was interrupted may print a traceback as it is deleted.
        sys.unraisablehook = lambda _: None
        raise SystemExit(f"interrupted; {interrupted}") from None
    except BrokenProcessPool:
        raise SystemExit(
            "error: a worker was killed, perhaps because memory ran out: run it again with fewer "
            + processes
        ) from None
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise SystemExit(_prefix_error(stop.code)) from None
        raise
    except expected as error:
        raise SystemExit(_prefix_error(str(error))) from None


def _prefix_error(text: str) -> str:
    """An error as commands print it, with ``error: `` before it."""
    return text if text.startswith("error: ") else f"error: {text}"
