"""A function applied to many items in several processes of this machine, or on a Ray cluster."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

from gpt.runtime.errors import UserError

POLL = 0.2  # seconds between two looks at the progress of the processes

Report = Callable[[int], object]
_function: Callable[[int, Report], object]  # what this worker does
_report: Report


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Returns the number of threads that a tokenizer may use in this process."""
    return int(os.environ.get("RAYON_NUM_THREADS", cores()))


def thread_map(count: int) -> Callable[..., Iterable[Any]]:
    """Returns `map`, or a map with the same order on several threads."""
    return map if count == 1 else futures.ThreadPoolExecutor(count).map


def run(function: Callable[[int, Report], object], items: Sequence[int], workers: int, report: Report) -> None:
    """Calls `function(item, report)` for each item, in several processes.

    Args:
      function: can be pickled; an exception ends all processes.
      report: called in this process with the sums of the numbers that the processes report.

    Raises:
      UserError: a process was killed, or `function` raised it.
    """
    context, done = multiprocessing.get_context("spawn"), 0
    counter = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    workers = min(workers, len(items))
    executor = futures.ProcessPoolExecutor(workers, context, _begin, (function, counter, max(1, cores() // workers)))
    try:
        with _main_hidden():
            waiting = {executor.submit(_do, item) for item in items}
        while waiting:
            finished, waiting = futures.wait(waiting, POLL, futures.FIRST_EXCEPTION)
            report(counter.value - done)
            done = counter.value
            for future in finished:
                future.result()
    except futures.process.BrokenProcessPool:
        raise UserError("A process was killed, perhaps for lack of memory; try again with fewer processes.") from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def run_on_ray(function: Callable[[int, Report], object], items: Sequence[int], report: Report) -> None:
    """Calls `function(item, …)` for each item, on all machines of a Ray cluster, or on this one if there is none.

    Args:
      report: called with each item that is finished.

    Raises:
      UserError: Ray is not installed, or `function` raised it.
    """
    try:
        import ray
    except ImportError:
        raise UserError('--engine=ray needs the package ray: pip install -e ".[ray]".') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    shared = ray.put(function)
    tasks = {ray.remote(_do_on_ray).remote(shared, item): item for item in items}
    waiting = [*tasks]
    while waiting:
        (finished,), waiting = ray.wait(waiting)
        try:
            ray.get(finished)
        except ray.exceptions.RayTaskError as error:
            raise UserError(str(error.cause)) if isinstance(error.cause, UserError) else error from None
        report(tasks[finished])


def _do_on_ray(function: Callable[[int, Report], object], item: int) -> None:
    _limit_threads(1)
    function(item, lambda size: None)


def _begin(function: Callable[[int, Report], object], counter: Any, threads: int) -> None:
    """Prepares a process that takes items."""
    global _function, _report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    parent = multiprocessing.parent_process()
    # Without this, the process would live on if the first one is killed.
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    _limit_threads(threads)

    def add(size: int) -> None:
        with counter.get_lock():
            counter.value += size

    _function, _report = function, add


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _limit_threads(count: int) -> None:
    """Limits the threads of tokenizers, which have not been used yet; the first name is that of `tokenizers`."""
    os.environ.update(RAYON_NUM_THREADS=str(count), TOKENIZERS_PARALLELISM="true" if count > 1 else "false")


def _do(item: int) -> None:
    try:
        _function(item, _report)
    except UserError as error:
        raise UserError(str(error)) from None  # subclasses cannot be pickled


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keeps new processes from importing the main program, which need not be importable, and takes time."""
    main, names = sys.modules["__main__"], ("__spec__", "__file__")
    saved = {name: getattr(main, name) for name in names if hasattr(main, name)}
    for name in saved:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(main, name, value)
