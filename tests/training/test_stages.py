"""Runs in stages: their configs, and two of them from start to end."""

import pytest

from tilescan.cli import main
from tilescan.training import stages
from tilescan.training.config import ConfigError, default_config, override
from tilescan.training.metrics import read_rows
from tilescan.training.train import train

TWO = (
    {"name": "old", "train.steps": 4, "optimizer.schedule": "constant"},
    {"data.sources": ("mine.txt",), "train.steps": 6, "train.start_optimizer": True},
)


def config_of(found=TWO, *assignments):
    config = default_config()
    config.stages = found
    for assignment in assignments:
        override(config, assignment)
    return config


def test_a_stage_has_its_keys_and_starts_from_the_one_before():
    old, new = stages.stage_configs(config_of(), "runs/both").items()
    assert [old[0], new[0]] == ["old", "stage_2"]
    assert old[1].train.start_from == "" and new[1].train.start_from == "runs/both/old"
    assert (old[1].train.steps, new[1].train.steps) == (4, 6)
    assert (old[1].optimizer.schedule, new[1].optimizer.schedule) == ("constant", "cosine")
    assert new[1].data.sources == ("mine.txt",) and new[1].train.start_optimizer
    assert old[1].stages == new[1].stages == ()


def test_what_the_first_stage_starts_from_is_not_the_others():
    start = ("train.start_from=runs/x", "train.start_step=500", "train.start_optimizer=True")
    first, second = stages.stage_configs(config_of(({}, {}), *start), "runs/w").values()
    assert (first.train.start_from, first.train.start_step) == ("runs/x", 500)
    assert (second.train.start_from, second.train.start_step) == ("runs/w/stage_1", None)
    assert first.train.start_optimizer and not second.train.start_optimizer


def test_stages_come_from_the_command_line():
    config = config_of((), "stages=({'train.steps': 5}, {'name': 'b', 'train.steps': 7})")
    assert list(stages.stage_configs(config, "runs")) == ["stage_1", "b"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((), "stages is empty"),
        (("old",), "stage 1 is 'old', not a mapping of keys"),
        (({"name": "a"}, {"name": "a"}), "stage 2 needs a name of its own, without '/', not 'a'"),
        (({"name": "a/b"},), "stage 1 needs a name of its own"),
        (({"train.step": 5},), "stage 'stage_1': unknown key 'train.step'; .*'train.steps'"),
        (({"train.steps": 0},), "stage 'stage_1': train.steps = 0 must be at least 1"),
        (({"train.steps": "many"},), "stage 'stage_1': "),
        (({"stages": ()},), "unknown key 'stages'"),
        (
            ({"train.checkpoint_every": 0}, {"train.checkpoint_every": 0}),
            "stage 'stage_1': train.checkpoint_every = 0 leaves nothing for the next",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(found, message):
    with pytest.raises(ConfigError, match=message):
        stages.stage_configs(config_of(found), "runs")


def test_a_single_run_has_none(tmp_path):
    with pytest.raises(ConfigError, match="stages are runs of their own"):
        train(config_of(), tmp_path)


@pytest.mark.slow
def test_two_stages_from_start_to_end(tmp_path, monkeypatch, capsys):
    """The second begins where the first ended; asked twice both are finished."""
    monkeypatch.chdir(tmp_path)
    for letter in "on":
        (tmp_path / letter).mkdir()
        for i in range(30):
            (tmp_path / letter / f"{i}.txt").write_text(letter * (20 + i))
    both = (
        {"name": "old", "data.sources": ("o",)},
        {"name": "new", "data.sources": ("n",), "data.replay": 0.25, "data.replay_sources": ("o",)},
    )
    words = [
        "train", "--workdir=run", f"--config.stages={both}", "--config.train.steps=4",
        "--config.train.progress=False", "--config.train.tensorboard=False",
        "--config.data.seq_len=16", "--config.data.batch_size=8", "--config.model.d_model=16",
        "--config.model.n_heads=2", "--config.model.repeats=1",
        "--config.data.fractions=(0.6,0.4,0.0)", "--config.data.eval_sources=o",
    ]  # fmt: skip
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert "stage old" in said and "stage new" in said and "validation/n/loss" in said
    rows = {name: read_rows(f"run/{name}/metrics.jsonl") for name in ("old", "new")}
    loss = lambda name, step: next(
        r["loss"] for r in rows[name] if (r["step"], r["split"]) == (step, "validation/o")
    )
    assert loss("new", 0) == loss("old", 4)
    assert main.main(words) == 0
    assert capsys.readouterr().out == said
