"""Run a function over items in several processes, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # of this worker


def end_with_parent(parent: int | None = None) -> None:
    """Have this process end when its parent has ended; it could wait for work forever.

    Args:
        parent: the parent's process id; None: whichever process is the parent now.
    """

    def follow(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, args=(parent or os.getppid(),), daemon=True).start()


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function  # sent once, not with each item
    end_with_parent(parent)


def _work(item: Any) -> Any:
    return _function(item)


def run_all(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """Yield the results of ``function`` as they come; one worker is this process itself."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(function, os.getpid()),
    ) as pool:
        # Workers inherit this: Ctrl-C is for this process, which then ends them.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        # as_completed lets go of each future, and its result, once it was yielded.
        pending = as_completed({pool.submit(_work, item) for item in items})
        signal.signal(signal.SIGINT, interrupt)
        try:
            for future in pending:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
