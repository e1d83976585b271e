"""--config=FILE: what is wrong with a file is named with its line, and nothing is a traceback."""

import pytest

from tilescan.cli import main as cli
from tilescan.experiments import run
from tilescan.training import config_files
from tilescan.training.config import settings

GOOD = "from tilescan.training.config import default_config\n"
WRONG = {
    "": "has no get_config(); it should return a training.config.default_config(), edited",
    "get_config = 3\n": "get_config in {path} is 3, not a function; it should return",
    "def get_config():\n    pass\n": "get_config() at {path}, line 1 returned None, of type",
    "def get_config():\n    return {'model': 1}\n": "returned {'model': 1}, of type dict; it",
    "\ndef get_config(a):\n    return 1\n": "get_config(a) at {path}, line 2 was given nothing",
    "def get_config(:\n": "{path}, line 1: SyntaxError: ",
    "x = 1\n  y = 2\n": "{path}, line 2: IndentationError: ",
    "import no_such_module\n": "{path}, line 1: ModuleNotFoundError: No module named 'no_such_mod",
    "\n\n1 / 0\n": "{path}, line 3: ZeroDivisionError: division by zero",
    "def get_config():\n\n    raise KeyError('a')\n": "{path}, line 3: KeyError: 'a'",
    "import sys\nsys.exit(3)\n": "{path}, line 2: SystemExit: 3",
    GOOD + "def get_config():\n    c = default_config()\n    c.train.stepz = 3\n    return c\n":
        "{path}, line 4: AttributeError: ",
    GOOD + "def get_config():\n    c = default_config()\n    c.train.steps = 'a'\n    return c\n":
        "{path}, line 4: TypeError: ",
    GOOD + "def get_config():\n    return default_config().train\n":
        "is not a training configuration: its get_config() returned one of checkpoint_every, ",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_its_line(tmp_path, capsys, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert cli.main(["train", f"--config={path}", f"--workdir={tmp_path}/run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"tilescan: error: --config={path}")
    assert WRONG[text].replace("{path}", str(path)) in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0\n")
    for name, message in {
        "gone.py": "there is no file",
        "": "is a folder, and not a file with get_config",
        "latin.py": "latin.py",
        "nul.py": "SyntaxError: source code",
    }.items():
        with pytest.raises(ValueError, match=f"^--config={tmp_path}/{name}: .*{message}"):
            config_files.load(f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match=r"to set a key write --config\.train\.steps=5"):
        config_files.load("train.steps=5")


def test_a_file_with_and_without_an_argument(tmp_path):
    path = tmp_path / "mine.py"
    body = "    c = default_config()\n    c.train.steps = int(n)\n    return c\n"
    path.write_text(f"{GOOD}def get_config(n='7'):\n{body}")
    assert settings(config_files.load(str(path))).train.steps == 7
    assert settings(config_files.load(f"{path}:9")).train.steps == 9
    with pytest.raises(ValueError, match=r"mine\.py, line 4: ValueError: invalid literal for int"):
        config_files.load(f"{path}:nine")
    path.write_text(f"{GOOD}def get_config():\n    return default_config()\n")
    with pytest.raises(ValueError, match=r"get_config\(\) at .*, line 2 was given '9': too many"):
        config_files.load(f"{path}:9")


def test_the_absl_module_tells_the_same(tmp_path):
    (tmp_path / "none.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "training.py").write_text(f"{GOOD}get_config = default_config\n")
    for words, message in {
        ("configs/flash_attention.py:smoke", "--steps=5"): "mean .*curves.train.train.steps=5",
        ("configs/flash_attention.py:smoke", "--config.runtime.repeat=5"): "'runtime.repeats'",
        (f"{tmp_path}/none.py",): "line 1 returned None, of type NoneType",
        (f"{tmp_path}/training.py",): "is not a paper's configuration",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run.parse_flags(["run", f"--config={words[0]}", *words[1:]])
