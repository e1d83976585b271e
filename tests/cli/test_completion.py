"""Shells complete commands, options, papers and keys, by the script that `completion` prints."""

import contextlib
import io
import subprocess

import pytest

from tilescan.cli import completion
from tilescan.cli import main as cli


@pytest.fixture(scope="module")
def script():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["completion", "bash"]) == 0
    return printed.getvalue()


def test_the_script_knows_commands_papers_and_keys(script):
    assert all(name in script for name in ("train", "completion", "flash_attention"))
    assert "--config.train.steps=" in script and "--config.model.mixers.mamba2.state_dim=" in script


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("tilescan compl", "completion"),
        ("tilescan train --config.train.steps", "--config.train.steps="),
        ("tilescan run flash_attention_", "flash_attention_2"),
        ("tilescan run h3 --scale = sm", "smoke"),
        (
            "tilescan train --workdir = x --config.optimizer.learn",
            "--config.optimizer.learning_rate=",
        ),
    ],
)
def test_bash_completes(script, words, found):
    """Bash hands over words that it split at "=" as well."""
    call = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tilescan tilescan"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{call}\necho ${{COMPREPLY[@]}}"], capture_output=True, text=True
    )
    assert done.stdout.strip() == found


def test_another_shell_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["completion", "zhs"])
    err = capsys.readouterr().err
    assert all(shell in err for shell in completion.SHELLS) and "did you mean 'zsh'?" in err
