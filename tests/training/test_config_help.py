"""`--help-config`: every key, its default, and a meaning taken from the source."""

import pytest

from tilescan.cli import main as cli
from tilescan.training import config_help
from tilescan.training.config import default_config, known_keys


def test_every_key_has_a_line_with_its_default_and_a_meaning():
    config = default_config()
    keys = known_keys(config)
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    lines = config_help.help_lines()
    assert [line.split(" = ")[0] for line in lines] == leaves
    wrapped = config_help.help_lines(60)
    assert max(map(len, wrapped)) <= 60 and wrapped[0].startswith(leaves[0])
    assert " ".join(" ".join(wrapped).split()) == " ".join(" ".join(lines).split())
    about = config_help.meanings()
    assert [key for key in leaves if not about.get(key)] == []
    assert "train.steps = 1000                        updates of the parameters" in lines
    assert about["model.mixers.mamba.use_bias"] == "of the convolution; of W_in and W_out."
    assert about["optimizer.warmup_steps"].startswith("Updates until the peak; None: a tenth of")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_command_lists_them(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help-config"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == config_help.help_lines()
