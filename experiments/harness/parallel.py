"""Measures cells one after another or several at once; those that take times have the machine."""

import concurrent.futures
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import jax
from absl import logging

from tilescan.experiments.harness import load
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
        for outcome in _side_by_side(measure, cells, jobs):
            if isinstance(outcome[1], load.NotAlone):
                alone.append(outcome[0])
            else:
                yield outcome
    for cell in alone:
        begin(cell)
        yield _tried(cell, lambda cell=cell: measure(cell))


def _side_by_side(measure: Measure, cells: Sequence[Cell], jobs: int) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which forks don't survive
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(cells)),
        context,
        initializer=_begin_worker,
        initargs=(jax.config.read(_QUICK),),
    )
    futures = {pool.submit(measure, cell): cell for cell in cells}
    try:
        for future in concurrent.futures.as_completed(futures):
            yield _tried(futures[future], future.result)
    except BaseException:  # an interrupt, or a full disk: no cell may go on unseen
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


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


def _begin_worker(quick: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends its workers
    logging.set_verbosity(logging.WARNING)
    jax.config.update(_QUICK, quick)
    load.share_machine()
