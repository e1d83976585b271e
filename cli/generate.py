"""`tilescan generate`: continues texts with a language model, or talks with it."""

import argparse
import contextlib
import functools
import json
import math
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tilescan.cli import arguments, interrupts, runs

if typing.TYPE_CHECKING:
    from tilescan.decoding.continuation import Sampling
    from tilescan.decoding.writers import GeneratedText, Writer

ABOUT = "continue a text with a language model, or talk with it"
DESCRIPTION = """\
Continue a text with a language model, or talk with it: SmolLM2, the work folder of a training run,
a folder with safetensors, or a GGUF file.

  tilescan generate --prompt="The capital of France is"                 SmolLM2-135M, 93 MB
  tilescan generate --chat                                              a talk, turn by turn
  tilescan generate --checkpoint=runs/first --prompt="import "          what you trained
  tilescan generate --checkpoint=gpt2/ --prompt="Once" --temperature=0.8 --top-p=0.95 --seed=1
  tilescan generate --prompts=questions.txt --json > answers.jsonl      a prompt a line, in batches
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--checkpoint",
        type=arguments.given,
        default="smollm2",
        help="a run's workdir, folder with safetensors, GGUF file [smollm2]",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="the text to continue; - reads it from standard input")
    what.add_argument(
        "--prompts",
        metavar="FILE",
        type=arguments.given,
        help='a file of prompts, one a line (.jsonl: a string or an object with "prompt" a '
        "line); - reads the lines of standard input",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the checkpoint's chat template; without --prompts turn by turn, until the end "
        "of input [where there is a template and the prompt ends with a question mark]",
    )
    parser.add_argument("--system", metavar="TEXT", help="a chat's first message to the model")
    parser.add_argument("--max-new-tokens", type=int, help="at most so many [64; an answer 512]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest [0]")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of parameters and computation; bfloat16 takes half the memory, and on CPUs three "
        "times as long [a run's own, else float32]",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts read together [8]")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--logprobs", action="store_true", help="of each token, with --json")


def run(options: argparse.Namespace) -> int:
    """Continues prompts or answers turns, and says how fast; returns the exit status."""
    with interrupts.end_at_once():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from tilescan.decoding.arguments import check_max_new_tokens
    from tilescan.decoding.continuation import Sampling

    # What is wrong in itself is said before a model is loaded.
    _check(options)
    prompts = _prompts(options)
    if options.max_new_tokens is not None:
        check_max_new_tokens(options.max_new_tokens)
    sampling = Sampling.check(options.temperature, options.top_k, options.top_p, options.seed)
    writer = runs.load_writer(
        options.checkpoint,
        dtype=options.dtype,
        prepare=lambda writer: _prepare(options, writer, prompts, sampling),
    )
    if options.chat and options.prompts is None and not options.json:
        return _talk(options, writer, prompts)
    if options.json or len(prompts) > 1:
        return _continue_all(options, writer, prompts)
    return _continue_one(options, writer, prompts[0])


def _check(options: argparse.Namespace) -> None:
    """Refuses options that don't go together; says which change nothing."""
    refuse = options.parser.error
    if options.prompt is None and options.prompts is None and not options.chat:
        refuse("one of the arguments --prompt --prompts --chat is required")
    if options.json and options.prompt is None and options.prompts is None:
        refuse("--json needs --prompt or --prompts")
    if options.logprobs and not options.json:
        refuse("--logprobs needs --json")
    if options.batch_size < 1:
        refuse(f"--batch-size={options.batch_size} must be at least 1")
    if options.system is not None and options.chat is False:
        refuse("--system needs a chat template; --no-chat uses none")
    if options.temperature == 0 and (options.top_k, options.top_p) != (None, None):
        _note(
            "--top-k and --top-p change nothing at temperature 0, which takes the likeliest "
            "token; --temperature=1 samples"
        )


def _prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of a command line; none where a chat begins without one."""
    from tilescan.data.tokenizers import utf8
    from tilescan.decoding.prompts import read_prompts

    if options.prompts == "-":
        return read_prompts(sys.stdin, "standard input")
    if options.prompts is not None:
        with open(options.prompts, encoding="utf-8") as file:
            return read_prompts(file, options.prompts)
    if options.prompt is None:
        return []
    prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    utf8(prompt, "prompt")
    return [prompt]


def _asks(options: argparse.Namespace, writer: "Writer", prompt: str) -> bool:
    """Whether a prompt is put into the chat template."""
    from tilescan.decoding.chat import is_question, require_template

    if options.chat or options.system is not None:
        require_template(writer)
        return True
    return options.chat is None and writer.template is not None and is_question(prompt)


def _ids(options: argparse.Namespace, writer: "Writer", prompt: str) -> Any:
    from tilescan.decoding.prompts import ids_of

    return ids_of(writer, prompt, _asks(options, writer, prompt), options.system)


def _prepare(
    options: argparse.Namespace, writer: "Writer", prompts: Sequence[str], sampling: "Sampling"
) -> Callable[[], Any]:
    """Checks the prompts; returns what compiles for the first of them, or a chat's first turn."""
    from tilescan.decoding.chat import ROOM, require_template
    from tilescan.decoding.prompts import check_prompts, padded_length
    from tilescan.decoding.writers import compile_ahead

    if options.chat:
        require_template(writer)
    to_ids, most = functools.partial(_ids, options, writer), _most(options, writer, prompts)
    lengths = check_prompts(writer, prompts, most, to_ids)
    # A turn that is not known yet is read in chunks of both kinds.
    longest = max(lengths[: options.batch_size], default=9)
    batch, room = 1, longest + most
    if options.json or len(prompts) > 1:
        batch = min(options.batch_size, len(prompts))
        longest = padded_length(longest) if batch > 1 else longest
        room = longest + most
    elif not prompts or _asks(options, writer, prompts[0]):
        room = max(ROOM, longest)
    packed = batch > 1
    return functools.partial(
        compile_ahead, writer, longest, room, sampling, batch=batch, packed=packed
    )


def _most(options: argparse.Namespace, writer: "Writer", prompts: Sequence[str]) -> int:
    """The number of new tokens: an answer ends by itself, a text seldom."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    one = len(prompts) == 1 and _asks(options, writer, prompts[0])
    return 512 if options.chat or one else 64


def _continue_one(options: argparse.Namespace, writer: "Writer", prompt: str) -> int:
    """Writes what follows one prompt, token by token."""
    from tilescan.decoding.text import generate_text

    most = _most(options, writer, [prompt])
    if _asks(options, writer, prompt):
        if options.chat is None:
            _note_question()
        shown = ""
        done = _conversation(options, writer).reply(prompt, max_new_tokens=most, write=_write)
    else:
        pieces = []

        def write(piece: str) -> None:
            # The prompt comes with the first piece: not before an error about it.
            _write(piece if pieces else prompt + piece)
            pieces.append(piece)

        settings = {key: getattr(options, key) for key in _SAMPLING}
        done = generate_text(writer, prompt, max_new_tokens=most, write=write, **settings)
        shown = "" if pieces else prompt  # the model ended the text at once
    print(shown, end="")
    print(f"\n\n{_speed(done)}", file=sys.stderr)
    return 0


def _talk(options: argparse.Namespace, writer: "Writer", prompts: Sequence[str]) -> int:
    """Answers turns: the prompt, if there is one, and the lines of standard input."""
    conversation, most = _conversation(options, writer), _most(options, writer, prompts)
    for turn in _turns(prompts):
        done = conversation.reply(turn, max_new_tokens=most, write=_write)
        print(flush=True)
        if done.tokens == most:
            _note(f"cut after {most} tokens; --max-new-tokens allows more")
    return 0


def _turns(prompts: Sequence[str]) -> Iterator[str]:
    """The prompt, then lines of standard input; after a prompt only those of a terminal."""
    yield from prompts
    terminal = sys.stdin.isatty()
    if prompts and not terminal:
        return
    if terminal:
        print("(Ctrl-D ends the chat)", file=sys.stderr)
        with contextlib.suppress(ImportError):  # keys that edit a line, where there is the library
            import readline  # noqa: F401
    with contextlib.suppress(EOFError):
        while True:
            with interrupts.raise_exception():
                turn = input("> " if terminal else "")
            if turn.strip():
                yield turn


def _continue_all(options: argparse.Namespace, writer: "Writer", prompts: Sequence[str]) -> int:
    """Writes what follows each prompt, in order, as text or as JSON."""
    from tilescan.decoding.prompts import continue_prompts

    asked = [_asks(options, writer, prompt) for prompt in prompts]
    if options.chat is None and options.system is None and any(asked):
        _note_question(f"{sum(asked)} of {len(prompts)} prompts are questions")
    answers = continue_prompts(
        writer,
        prompts,
        batch_size=min(options.batch_size, len(prompts)),
        max_new_tokens=_most(options, writer, prompts),
        **{key: getattr(options, key) for key in _SAMPLING},
        to_ids=lambda prompt: _ids(options, writer, prompt),
    )
    for i, answer in enumerate(answers):
        if options.json:
            fields = answer._asdict() | dict(seconds=round(answer.seconds, 3))
            if not options.logprobs:
                del fields["logprobs"]
            print(json.dumps(fields, ensure_ascii=False), flush=True)
        else:
            print(("\n" if i else "") + ("" if asked[i] else answer.prompt) + answer.text)
    return 0


_SAMPLING = ("temperature", "top_k", "top_p", "seed")


def _conversation(options: argparse.Namespace, writer: "Writer") -> Any:
    from tilescan.decoding.chat import Conversation

    settings = {key: getattr(options, key) for key in _SAMPLING}
    return Conversation(writer, system=options.system, **settings)


def _speed(done: "GeneratedText") -> str:
    speed = f"{done.tokens} tokens"
    if math.isfinite(done.first_seconds):
        speed += f"; first after {done.first_seconds:.1f} s"
    if math.isfinite(done.tokens_per_second):  # a few tokens have no rate
        speed += f", then {done.tokens_per_second:.1f} tokens/s"
    return speed


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _note_question(what: str = "the prompt is a question") -> None:
    _note(f"{what}: asked by the checkpoint's chat template; --no-chat continues the text")
