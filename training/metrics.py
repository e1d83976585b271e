"""Where a run's numbers go: metrics.jsonl, timing.jsonl, TensorBoard, a tracker and the terminal.

metrics.jsonl, samples.jsonl and gradient_norms.jsonl hold only what the seed determines, so that a
resumed run's file is the same, byte for byte, as an uninterrupted one's; how long things took is in
timing.jsonl.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence

import tensorboardX
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tilescan.files import is_on_disk
from tilescan.training.paths import write_whole
from tilescan.training.trackers import Tracker


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Reads the rows of a JSON-lines file; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is not JSON; names it.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line:
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


class JsonLines:
    """A JSON-lines file that goes on after `step`; later rows are dropped, all of them if None.

    In a bucket, whose objects can't be appended to, `sync` and `close` write the whole of it.
    """

    def __init__(self, path: str | os.PathLike, step: int | None):
        kept = [row for row in read_rows(path) if step is not None and row["step"] <= step]
        self.rows, self._path = kept, path
        self._write_whole()
        self._file = open(path, "a", encoding="utf-8") if is_on_disk(path) else None

    def _write_whole(self) -> None:
        write_whole(self._path, "".join(map(_line, self.rows)))

    def write(self, row: dict) -> None:
        """Adds a row, which the next reader of a disk sees at once."""
        self.rows.append(row)
        if self._file:
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Returns when the rows are on disk or in the bucket."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        else:
            self._write_whole()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
        else:
            self._write_whole()


class Recorder:
    """Writes rows to all places; only process 0 of several has one that does.

    Args:
        workdir: folder of metrics.jsonl, timing.jsonl and TensorBoard's files.
        step: None for a fresh run; else the step restored, after which older rows are dropped.
        total_steps: for the bar.
        samples: whether there will be any, for which there is samples.jsonl then.
        gradient_norms: whether there will be any, for which there is gradient_norms.jsonl then.
        trackers: are called with each row of metrics, and with the speed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        step: int | None,
        total_steps: int,
        *,
        tensorboard: bool,
        progress: bool,
        samples: bool = False,
        gradient_norms: bool = False,
        trackers: Sequence[Tracker] = (),
    ):
        workdir = epath.Path(workdir)
        self.metrics = JsonLines(workdir / "metrics.jsonl", step)
        self.timing = JsonLines(workdir / "timing.jsonl", step)
        self.samples = JsonLines(workdir / "samples.jsonl", step) if samples else None
        path = workdir / "gradient_norms.jsonl"
        norms = JsonLines(path, step) if gradient_norms or path.exists() else None
        if norms and not gradient_norms:  # later ones are of steps that are taken again
            norms.close()
            norms = None
        self.gradient_norms, optional = norms, (self.samples, norms)
        self._files = [self.metrics, self.timing, *(f for f in optional if f is not None)]
        self._trackers = tuple(trackers)
        self._board = None
        if tensorboard and is_on_disk(workdir):  # its files grow line by line, as objects can't
            purge = None if step is None else step + 1
            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=purge, write_to_disk=True
            )
        self._total, self._bar, self._lines = total_steps, None, False
        if progress:
            self._start_bar(step or 0)
        self._tokens, self._since = 0.0, None

    def _start_bar(self, step: int) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            self._lines = True
            return
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, completed=step, text="compiling")

    def row(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes one row of metrics; `values` are plain floats."""
        self.metrics.write({"step": step, "split": split, **values})
        self._tell(step, {f"{split}/{name}": value for name, value in values.items()})
        if split != "train":
            self._say(step, f"{split} loss {values['loss']:.4f}")

    def _tell(self, step: int, values: dict[str, float]) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        for tell in self._trackers:
            tell(step, values)

    def sample(self, step: int, text: str) -> None:
        """Writes a text of the model's; there must be `samples`."""
        self.samples.write({"step": step, "text": text})
        if self._board:  # as Markdown, in which four spaces keep lines as they are
            self._board.add_text("sample", "    " + text.replace("\n", "\n    "), step)
        if self._bar:
            self._bar.console.print(f"step {step} writes: {text!r}", markup=False, highlight=False)
        else:
            self._say(step, f"writes: {text!r}")

    def count(self, tokens: float) -> None:
        """Counts the tokens of a finished step; the first one, which compiles, starts the clock."""
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._tokens += tokens

    def speed(self, step: int, loss: float) -> None:
        """Writes and shows tokens per second since the clock was last restarted."""
        now = time.perf_counter()
        if self._since is None or not self._tokens:
            self._say(step, f"loss {loss:.4f}")
            return
        seconds = now - self._since
        per_second = self._tokens / seconds
        row = {"step": step, "seconds": seconds, "tokens_per_second": per_second}
        self.timing.write(row)
        self._tell(step, {"timing/tokens_per_second": per_second})
        self._say(step, f"loss {loss:.4f}  {per_second:,.0f} tokens/s")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last row (an evaluation, a save) out of the speed."""
        self._tokens = 0.0
        if self._since is not None:
            self._since = time.perf_counter()

    def _say(self, step: int, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif self._lines:
            with contextlib.suppress(BrokenPipeError):  # nobody reads on; the run goes on
                print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Returns when every row is on disk: to be called before a checkpoint of their step."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Stops the bar and closes all files."""
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        for file in self._files:
            file.close()
