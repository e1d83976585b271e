"""Reads a Mamba-2 checkpoint far beyond its training length and says whether and where it breaks.

tilescan diagnose CHECKPOINT --train-length=8192 --tokens=book.npy
python -m tilescan.cli.diagnose CHECKPOINT --train-length=8192 --tokens=book.npy
"""

import argparse
import pathlib
import sys
import typing
from collections.abc import Sequence
from typing import Any

from tilescan.cli import arguments, runs

if typing.TYPE_CHECKING:
    import numpy

    from tilescan import models
    from tilescan.experiments.harness import tables
    from tilescan.training.settings import Settings

ABOUT = "say where a Mamba-2 checkpoint breaks beyond its training length"
DESCRIPTION = """\
Diagnose state collapse (Stuffed Mamba, arXiv 2410.07145) in a checkpoint of Mamba-2: a folder in
Hugging Face's layout, with config.json and model.safetensors, or the work folder of a training run.

  tilescan diagnose mamba2-130m-hf --train-length=2048 --tokens=book.npy --newline=187
  tilescan diagnose bytes-model --train-length=512 --tokenizer=byte --source=shakespeare
  tilescan diagnose runs/first --source=shakespeare               a run of `tilescan train`
  tilescan diagnose bytes-model --train-length=512                newline prompt alone, no text
  tilescan diagnose ... --decay-scale=0.9999 --b-scale=0.75       forget more, remember less
  tilescan diagnose ... --state-window=2048                       sliding window on the state

What is printed, up to the longest of --lengths:
  loss       mean loss of the text's tokens between two lengths. The model collapses when a loss is
             at least twice the greatest one within the training length.
  variance   greatest variance of a head's state after so many newlines, a prompt that has a
             length and no content. Exploding beyond the training length, it is the cause.
  kept       greatest share of the first token, alpha_1 ... alpha_t, that a head's state still
             holds. Near 1 at the training length: this head never learned to forget.

The text is read a row a document; a GPT-NeoX tokenizer, which the published checkpoints use, is not
in this package: tokenize elsewhere and give the ids, numpy.save("book.npy", ids), [T] or [B, T].
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("checkpoint", type=arguments.given, help="folder with config.json; a run's workdir")
    add("--train-length", type=int, help="tokens of a training row, e.g. 8192 [the run's]")
    add("--lengths", help="where to look, e.g. 1024,8192,32768 [1/2, 1, 2, 4, 8 training lengths]")
    add("--tokens", type=arguments.path, help="ids of long texts: a .npy file, [T] or [B, T]")
    add("--tokenizer", help="instead of --tokens: byte, gpt2, ... [a run's, given --source]")
    add(
        "--source",
        help="[shakespeare] text for --tokenizer, see `tilescan data`, or a path",
    )
    add("--rows", type=int, default=4, help="documents read at once [4]")
    add("--newline", type=int, help="id of the newline [10, or a run's; 187 in GPT-NeoX's]")
    add("--decay-scale", type=float, default=1.0, help="factor of every decay, at most 1")
    add("--b-scale", type=float, default=1.0, help="factor of what enters the state")
    add("--dt-scale", type=float, default=1.0, help="factor of the step sizes")
    add("--state-window", type=int, help="tokens that the state holds")
    add(
        "--figure",
        type=arguments.path,
        default=pathlib.Path("diagnosis.svg"),
        help="[diagnosis.svg]",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the table and the verdict, writes the figure; 0 whatever the verdict is.

    Raises:
      ValueError: lengths, ids or a model that don't fit; FileNotFoundError, CheckpointError: see
        `models.checkpoints.load_pretrained`.
    """
    from tilescan.experiments.measurements import state_collapse

    config, params, settings = runs.load(options.checkpoint)
    if settings is not None:
        _follow_run(options, settings)
    if options.train_length is None:
        raise ValueError(f"{options.checkpoint} is not a run of ours: give --train-length")
    options.newline = 10 if options.newline is None else options.newline
    state_collapse.check_mamba2(config)
    names = ("decay_scale", "b_scale", "dt_scale", "state_window")
    config = state_collapse.with_mixer(config, **{name: getattr(options, name) for name in names})
    if not 0 <= options.newline < config.vocab_size:
        raise ValueError(f"newline={options.newline} is not an id below {config.vocab_size}")
    lengths = parse_lengths(options.lengths, options.train_length)
    tokens = _tokens(options, config.vocab_size, lengths[-1])
    table, verdict, figure = diagnose(
        config, params, lengths, options.train_length, tokens, options.newline
    )
    table.show()
    print(verdict)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_text(figure, encoding="utf-8")
    print(f"figure: {options.figure}")
    return 0


def _follow_run(options: argparse.Namespace, settings: "Settings") -> None:
    """Sets the options that are not given to what a run was trained with."""
    from tilescan.data import tokenizers

    if options.train_length is None:
        options.train_length = settings.data.seq_len
    if options.newline is None:
        options.newline = int(tokenizers.get_tokenizer(settings.data.tokenizer).encode("\n")[0])
    if options.source is not None and options.tokens is None and options.tokenizer is None:
        options.tokenizer = settings.data.tokenizer


def parse_lengths(text: str | None, train_length: int) -> list[int]:
    """Parses increasing lengths; the training length is among them.

    Raises:
      ValueError: no numbers, or none beyond the training length.
    """
    if train_length < 2:
        raise ValueError(f"train_length={train_length} must be at least 2")
    if text is None:
        return [train_length // 2, *(train_length * k for k in (1, 2, 4, 8))]
    try:
        lengths = sorted({int(word) for word in text.split(",")} | {train_length})
    except ValueError:
        raise ValueError(f"lengths={text!r} must be numbers, e.g. 1024,8192,32768") from None
    if lengths[0] < 1 or lengths[-1] <= train_length:
        raise ValueError(
            f"lengths={text!r} must be positive, and one of them above train_length={train_length}"
        )
    return lengths


def diagnose(
    config: "models.LanguageModelConfig",
    params: Any,
    lengths: Sequence[int],
    train_length: int,
    tokens: "numpy.ndarray | None",
    newline: int,
) -> "tuple[tables.Table, str, str]":
    """Returns (table, verdict, SVG) of a model.

    Args:
      config, params: the model.
      lengths: increasing; where it is looked at.
      train_length: one of them.
      tokens: [B, 1 + the longest] ids of text, or None for the newline prompt alone.
      newline: its id.

    Raises:
      ValueError: the lengths have no common divisor of at least 8.
    """
    import math

    import numpy as np

    from tilescan.experiments.harness.figures import line_chart
    from tilescan.experiments.harness.tables import MEASURED, Column, Table
    from tilescan.experiments.measurements import state_collapse

    # The states after newlines, and after the text if there is one.
    chunk = math.gcd(*lengths)
    if chunk < 8:
        raise ValueError(f"lengths={lengths} must be multiples of one number, 64 say")
    prompt = np.full((1, lengths[-1]), newline, np.int32)
    silent = state_collapse.read(config, params, prompt, prompt, chunk=chunk)
    found = silent
    if tokens is not None:
        found = state_collapse.read(config, params, tokens[:, :-1], tokens[:, 1:], chunk=chunk)

    # A row for each length.
    at = np.array(lengths) // chunk - 1
    largest = lambda values: values.mean(axis=2).reshape(len(values), -1).max(axis=1)[at]
    variance, kept = largest(silent["state_variance"]), np.exp(largest(found["log_decay"]))
    losses = [
        None if tokens is None else float(part.mean())
        for part in np.split(found["nll"], lengths[:-1], axis=1)
    ]
    rows = [
        [f"{length:,}", loss, float(v), float(k)]
        for length, loss, v, k in zip(lengths, losses, variance, kept, strict=True)
    ]
    table = Table(
        "diagnosis",
        f"N_S = {state_collapse.state_elements(config):,} state elements",
        [
            Column("up to token"),
            Column("loss since the row above", MEASURED, "nats"),
            Column("variance after newlines", MEASURED),
            Column("first token kept", MEASURED),
        ],
        rows,
    )

    # The verdict: beyond the training length against within.
    within = lengths.index(train_length) + 1
    growth = variance[-1] / max(float(variance[within - 1]), 1e-30)
    verdict = (
        f"variance: {growth:.3g} times that at {train_length:,} tokens; of the first token is kept "
        f"up to there: {kept[within - 1]:.3g}"
    )
    if tokens is not None:
        ratio = max(losses[within:]) / max(losses[:within])
        said = "COLLAPSES" if ratio >= state_collapse.COLLAPSE else "does not collapse"
        verdict = (
            f"The model {said}: the greatest loss beyond {train_length:,} tokens is {ratio:.2f} "
            f"times that within (criterion: {state_collapse.COLLAPSE:g}).\n{verdict}"
        )

    panels = {"variance after newlines": {"checkpoint": (lengths, list(variance))}}
    panels["first token kept"] = {"checkpoint": (lengths, list(kept))}
    if tokens is not None:
        panels = {"loss (nats)": {"checkpoint": (lengths, losses)}, **panels}
    figure = line_chart(panels, x_label="tokens", y_label="", log_x=True, share_y=False)
    return table, verdict, figure


def _tokens(options: argparse.Namespace, vocab_size: int, length: int) -> "numpy.ndarray | None":
    """Reads ids [rows, 1 + length], None if no text was named."""
    import numpy as np

    if options.tokens is not None:
        try:
            ids = np.load(options.tokens)
        except ValueError as error:
            raise ValueError(
                f"tokens={str(options.tokens)!r} is not a .npy file: {error}"
            ) from None
        ids = np.atleast_2d(ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens must be integers [T] or [B, T], got {ids.dtype} {ids.shape}")
    elif options.tokenizer is not None:
        from tilescan.data import sources, tokenizers

        tokenizer = tokenizers.get_tokenizer(options.tokenizer)
        texts = (document.text for document in sources.load(options.source or "shakespeare"))
        encoded = (tokenizer.encode(text) for text in texts if len(text) > length)
        ids = [e[: length + 1] for e in encoded if len(e) > length][: options.rows]
        ids = np.stack(ids) if ids else np.zeros((1, 0), np.int32)
    else:
        return None
    ids = ids[: options.rows, : length + 1]
    if ids.shape[1] <= length:
        raise ValueError(
            f"the text has no {length + 1:,} tokens; give a longer one, or smaller --lengths"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"the text's ids run from {ids.min()} to {ids.max()}, but the model's vocabulary is "
            f"0..{vocab_size - 1}: another tokenizer made them"
        )
    return ids.astype(np.int32)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tilescan.cli.diagnose",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
