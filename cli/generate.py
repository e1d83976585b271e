"""`tilescan generate`: continues a text with a language model."""

import argparse
import functools
import math
import sys

from tilescan.cli import arguments, runs

ABOUT = "continue a text with a language model"
DESCRIPTION = """\
Continue a text with a language model: SmolLM2, the work folder of a training run, a folder with
safetensors, or a GGUF file.

  tilescan generate --prompt="The capital of France is"                 SmolLM2-135M, 93 MB
  tilescan generate --checkpoint=runs/first --prompt="import "          what you trained
  tilescan generate --checkpoint=gpt2/ --prompt="Once" --temperature=0.8 --top-p=0.95 --seed=1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--checkpoint",
        type=arguments.given,
        default="smollm2",
        help="a run's workdir, folder with safetensors, GGUF file [smollm2]",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest [0]")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Continues a prompt, token by token, and says how fast; returns the exit status."""
    from tilescan.decoding.text import generate_text

    if options.temperature == 0 and (options.top_k, options.top_p) != (None, None):
        print(
            "note: --top-k and --top-p change nothing at temperature 0, which takes the likeliest "
            "token; --temperature=1 samples",
            file=sys.stderr,
        )
    pieces = []

    def write(piece: str) -> None:
        # The prompt comes with the first piece: not before an error about it, or about the file.
        print(piece if pieces else options.prompt + piece, end="", flush=True)
        pieces.append(piece)

    done = generate_text(
        functools.partial(runs.load_writer, options.checkpoint),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        write=write,
    )
    if not pieces:  # the model ended the text at once
        print(options.prompt, end="")
    speed = f"{done.tokens} tokens"
    if pieces:
        speed += f"; first after {done.first_seconds:.1f} s"
    if math.isfinite(done.tokens_per_second):  # a few tokens have no rate
        speed += f", then {done.tokens_per_second:.1f} tokens/s"
    print(f"\n\n{speed}", file=sys.stderr)
    return 0
