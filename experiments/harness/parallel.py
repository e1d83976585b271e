"""Measures cells one after another or several at once; those that take times have the machine."""

import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool

import jax
from absl import logging

from tilescan.experiments.harness import load, records
from tilescan.experiments.harness.cells import Cell
from tilescan.experiments.harness.records import Record

Measure = Callable[[Cell], Record]
# A record, or the exception of a cell that failed with its traceback.
Outcome = tuple[Cell, Record | Exception, str]
_QUICK = "jax_disable_most_optimizations"  # which worker processes take over


def measured(
    measure: Measure, cells: Sequence[Cell], jobs: int, begin: Callable[[Cell], None]
) -> Iterator[Outcome]:
    """Measures cells, `jobs` at once in processes of their own, and yields what each gave.

    A cell that takes times finds out that others run beside it (`load.NotAlone`) and is measured
    after them, alone.

    Args:
      measure: what measures a cell; for more than one job it can be pickled, as cells can.
      cells: in the order in which they begin.
      jobs: how many at once, at least 1; 1: in this process.
      begin: is told of each cell that begins in this process.

    Yields:
      Each cell with its record, or with its exception and traceback, in the order of their ends.
    """
    alone = list(cells)
    if jobs > 1 and len(alone) > 1:
        alone = []
        with contextlib.closing(_side_by_side(measure, cells, jobs)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome[1], load.NotAlone):
                    alone.append(outcome[0])
                else:
                    yield outcome
    for cell in alone:
        begin(cell)
        yield _tried(cell, lambda cell=cell: measure(cell))


def _side_by_side(measure: Measure, cells: Sequence[Cell], jobs: int) -> Iterator[Outcome]:
    """Measures cells in workers, each of which takes those that differ in their seeds in turn.

    These have programs in common, which a process compiles once. Each worker has cores of its own:
    threads of two computations on the same cores wait for each other (15% of H3's training).
    """
    waiting, jobs = collections.deque(_groups(cells)), min(jobs, len(cells))
    running: dict[concurrent.futures.Future, tuple] = {}  # of a worker's cell: it, what comes next

    def begin(worker: concurrent.futures.Executor, cores: Sequence[int], group: list[Cell]) -> None:
        running[worker.submit(measure, group[0])] = (worker, cores, group[0], group[1:])

    try:
        for cores in _shares(jobs):
            if group := _next(waiting, running):
                begin(_worker(cores), cores, group)
        while running:
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                worker, cores, cell, group = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    worker = _worker(cores)
                if group := group or _next(waiting, running):
                    begin(worker, cores, group)
                else:
                    worker.shutdown(wait=False)
                yield _tried(cell, future.result)
    except BaseException:  # an interrupt, or a full disk: no cell may go on unseen
        for worker, *_ in running.values():
            worker.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()  # at once: records are whole, models go on from their checkpoints
        raise


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Returns cells of the same settings together, in the order of the first of each."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(json.dumps(records.plain(cell.settings), sort_keys=True), []).append(cell)
    return list(found.values())


def _next(waiting: collections.deque, running: Mapping) -> list[Cell]:
    """Returns the next group, or a cell of the longest that a worker still has before it."""
    if waiting:
        return waiting.popleft()
    longest = max((group for *_, group in running.values()), key=len, default=[])
    return [longest.pop()] if longest else []


def _shares(jobs: int) -> list[list[int]]:
    """Returns each worker's cores; none where there are fewer than workers, or none to choose."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[job::jobs] if jobs <= len(cores) else [] for job in range(jobs)]


def _worker(cores: Sequence[int]) -> concurrent.futures.Executor:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which forks don't survive
    options = cores, jax.config.read(_QUICK)
    return concurrent.futures.ProcessPoolExecutor(
        1, context, initializer=_begin_worker, initargs=options
    )


def _tried(cell: Cell, give: Callable[[], Record]) -> Outcome:
    try:
        return cell, give(), ""
    except BrokenProcessPool as error:
        reason = RuntimeError(
            "a worker process died, perhaps for want of memory; what is finished is kept: run the "
            "same command with fewer --jobs"
        )
        reason.__cause__ = error
        return cell, reason, traceback.format_exc()
    except Exception as error:  # one bad cell must not cost the others
        return cell, error, traceback.format_exc()


def _begin_worker(cores: Sequence[int], quick: bool) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.set_verbosity(logging.WARNING)
    jax.config.update(_QUICK, quick)
    load.share_machine()


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has, however that was: nobody reads its results."""
    multiprocessing.parent_process().join()
    os._exit(1)
