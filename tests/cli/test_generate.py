"""`tilescan generate` on a tiny model, in this process."""

import io
import json
import signal

import pytest
from tiny_writers import tiny_writer

from tilescan.cli import main as cli
from tilescan.decoding import chat, reader


@pytest.fixture
def generate(capsys, monkeypatch):
    """Runs the command on the tiny model; returns (status, output, errors)."""
    monkeypatch.setattr(reader, "CHUNKS", (1,))
    monkeypatch.setattr(chat, "ROOM", 64)
    handlers = []

    def load(path, *, dtype, prepare):
        handlers.append(signal.getsignal(signal.SIGINT))
        prepare(tiny_writer())()
        return tiny_writer()

    monkeypatch.setattr("tilescan.cli.runs.load_writer", load)

    def run(*argv, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        before = signal.getsignal(signal.SIGINT)
        status = cli.main(["generate", "--max-new-tokens=3", *argv])
        # Ctrl-C ends the process itself while a model is loaded and writes, and only then.
        assert handlers.pop() == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == before
        return (status, *capsys.readouterr())

    return run


def test_prompts_come_from_options_input_and_files(generate, tmp_path):
    status, once, err = generate("--prompt=To be")
    assert status == 0 and once.startswith("To be") and "tokens" in err and "note" not in err
    assert generate("--prompt=-", stdin="To be\n")[1] == once
    file = tmp_path / "prompts.txt"
    file.write_text("To be\nWho?\n")
    options = [f"--prompts={file}", "--json", "--logprobs", "--batch-size=1"]
    _, out, err = generate(*options)
    first, second = map(json.loads, out.splitlines())
    assert first["prompt"] == "To be" and first["prompt"] + first["text"] == once
    assert len(first["tokens"]) == len(first["logprobs"]) and first["seconds"] >= 0
    # A question is asked by the template, and that is said.
    assert "1 of 2 prompts are questions: asked by the checkpoint's chat template" in err
    _, out, err = generate("--prompt=Who?")
    assert out == second["text"] and "the prompt is a question" in err
    _, out, err = generate("--prompt=Who?", "--no-chat")
    assert out.startswith("Who?") and "question" not in err


def test_a_chat_answers_each_line_of_input(generate):
    status, out, err = generate("--chat", stdin="Who?\n\nAnd you?\n")
    assert status == 0 and out.count("\n") >= 2 and "tokens/s" not in err
    status, once, _ = generate("--chat", "--prompt=Who?")
    assert status == 0 and out.startswith(once[:-1])


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "one of the arguments --prompt --prompts --chat is required"),
        (["--prompt=a", "--prompts=b"], "not allowed with argument --prompt"),
        (["--chat", "--json"], "--json needs --prompt or --prompts"),
        (["--prompt=a", "--logprobs"], "--logprobs needs --json"),
        (["--prompt=a", "--batch-size=0"], "--batch-size=0 must be at least 1"),
        (["--prompt=a", "--no-chat", "--system=b"], "--system needs a chat template"),
        (["--prompt=a", "--dtype=float16"], "invalid choice: 'float16'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--checkpoint=gone", *argv])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_files_of_prompts_are_read_before_a_model(capsys, tmp_path):
    assert cli.main(["generate", "--checkpoint=gone", f"--prompts={tmp_path}/none.txt"]) == 1
    assert "none.txt" in capsys.readouterr().err
