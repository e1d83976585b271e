"""Keys are known or refused by name; values go to dataclasses and to JSON and come back."""

import dataclasses
import inspect
import json

import ml_collections
import pytest
from absl.flags import FlagValues
from ml_collections import config_flags

from tilescan.training import config as lib
from tilescan.training import schedule_config
from tilescan.training import settings as fields
from tilescan.training.config import ConfigError, default_config, override, settings


def test_defaults_are_the_dataclasses():
    c = settings(default_config())
    for name, cls in fields.SECTIONS.items():
        assert getattr(c, name) == cls()
    assert c.seed == 0 and c.task == "language_model"


def test_every_field_has_a_comment():
    files = (fields, schedule_config)
    source = [line for file in files for line in inspect.getsource(file).splitlines()]
    for cls in (*fields.SECTIONS.values(), fields.ParamGroup):
        for field in dataclasses.fields(cls):
            at = [i for i, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
            assert any("  # " in source[i] or "    # " in source[i - 1] for i in at), field.name


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.stepz=3", "train.steps"),
        ("trian.steps=3", "train.steps"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("model.learning_rate=1", "optimizer.learning_rate"),
        ("optimizer.warmup=1", "optimizer.warmup_steps"),
        ("sede=1", "seed"),
        ("model.mixers.mamba2.d_state=1", "model.mixers.mamba2.state_dim"),
        ("mamba.d_state=1", "model.mixers.mamba.state_dim"),
        ("model.n_layers=1", "model.repeats"),
        ("n_layers=1", "model.repeats"),
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("model.hidden_size=1", "model.d_model"),
    ],
)
def test_override_names_the_nearest_key(wrong, right):
    with pytest.raises(ConfigError, match=f"unknown key .*did you mean '{right}"):
        override(default_config(), wrong)


def test_a_locked_config_names_the_nearest_key():
    with pytest.raises(AttributeError, match='"steps" instead of "stepz"'):
        default_config().train.stepz = 3
    with pytest.raises(KeyError, match='"steps" instead of "stepz"'):
        default_config().update({"train": {"stepz": 3}})


def test_check_keys_names_the_nearest_key_of_a_config_made_by_hand():
    for bad in ({"train": {"stepz": 3}}, {"trian": {}}, {"optimizer": {"lr": 1}}):
        with pytest.raises(ConfigError, match="unknown key .*did you mean"):
            settings(ml_collections.ConfigDict(bad))
    with pytest.raises(ConfigError, match="'train' is a section of the configuration, not 3"):
        settings(ml_collections.ConfigDict({"train": 3}))
    bad = ml_collections.ConfigDict({"optimizer": {"groups": ({"patern": "x"},)}})
    with pytest.raises(ConfigError, match="'patern' in optimizer.groups; did you mean 'pattern'"):
        settings(bad)


def test_absl_flags_override_and_refuse():
    def parse(*arguments):
        flags, argv = FlagValues(), ["program", *arguments]
        config_flags.DEFINE_config_dict(
            "config", default_config(), flag_values=flags, sys_argv=argv
        )
        flags(argv)
        return flags.config

    config = parse(
        "--config.train.steps=7", "--config.optimizer.b2=0.5", "--config.train.resume_step=4"
    )
    assert (config.train.steps, config.optimizer.b2, config.train.resume_step) == (7, 0.5, 4)
    with pytest.raises(Exception, match='"steps" instead of "stepz"'):
        parse("--config.train.stepz=7")


def test_override_reads_literals_words_and_tuples():
    config = default_config()
    for assignment in (
        "--config.train.steps=7",
        "optimizer.learning_rate=1e-3",
        "data.tokenizer=gpt2",
        "data.sources=shakespeare",
        "train.progress=false",
        "train.resume_step=5",
        "optimizer.groups=[{'pattern': 'ssm', 'lr_multiplier': 0.1}]",
    ):
        override(config, assignment)
    c = settings(config)
    assert (c.train.steps, c.train.progress, c.train.resume_step) == (7, False, 5)
    assert c.optimizer.learning_rate == 1e-3 and c.data.tokenizer == "gpt2"
    assert c.data.sources == ("shakespeare",)
    assert c.optimizer.groups == (fields.ParamGroup("ssm", 0.1, None),)
    for wrong, message in {
        "train.steps=3.5": r"train.steps must be of type int like 7, not '3.5'",
        "train.steps=true": r"train.steps must be of type int like 7, not 'true'",
        "data.shuffle=1": r"data.shuffle must be of type bool like True, not '1'",
        "data.fractions=abc": r"data.fractions must be of type tuple like \(0.9, .*not 'abc'",
        "model.head_dim=abc": r"model.head_dim must be of type int, not 'abc'",
        "train=1": r"'train' is a section: set one of its keys, e.g. train\.",
    }.items():
        with pytest.raises(ConfigError, match=message):
            override(config, wrong)
    override(config, "train.resume_step=None")
    assert config.train.resume_step is None
    with pytest.raises(ConfigError, match="not of the form section.key=value"):
        override(config, "train.steps")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt", ("a.txt",)),
        ("~/my texts/a.txt", ("~/my texts/a.txt",)),
        ("shakespeare,/data/a.jsonl.gz:body", ("shakespeare", "/data/a.jsonl.gz:body")),
        ("(a,b)", ("a", "b")),
        ("('a,b.txt','c')", ("a,b.txt", "c")),
        ("['a']", ("a",)),
        ("hf:a/b:c", ("hf:a/b:c",)),
    ],
)
def test_tuples_of_words_need_no_quotes(text, expected):
    config = default_config()
    override(config, f"data.sources={text}")
    assert settings(config).data.sources == expected


def test_values_that_make_no_sense_are_refused():
    for assignment, message in {
        "train.steps=0": r"train.steps = 0 must be at least 1",
        "train.microbatches=3": r"train.microbatches = 3 must divide data.batch_size = 16",
        "data.packing=pakced": r"'pakced' is unknown; did you mean 'packed'",
        "task=clasification": r"did you mean 'classification'",
        "precision.compute_dtype=bf16": r"compute_dtype = 'bf16' .*'bfloat16'",
        "optimizer.schedule=wsd": r"needs optimizer.decay_steps > 0",
        "data.sources=()": r"data.sources is empty",
        "data.fractions=(0.5,0.2)": r"data.fractions = \(0.5, 0.2\) must be three numbers >= 0",
        "optimizer.b1=1.0": r"optimizer.b1 = 1.0 must be in \[0, 1\)",
        "optimizer.eps=-1.0": r"optimizer.eps = -1.0 must be at least 0",
        "optimizer.groups=(1,)": r"optimizer.groups holds 1; each group is a dict with",
        "optimizer.groups=({'pattern': '('},)": r"pattern = '\(' is not a regular expression",
    }.items():
        config = default_config()
        override(config, assignment)
        with pytest.raises(ConfigError, match=message):
            settings(config)


def test_settings_survive_json():
    config = default_config()
    override(config, "optimizer.groups=[{'pattern': 'a', 'weight_decay': 0.0}]")
    c = settings(config)
    text = json.loads(json.dumps(lib.as_dict(c)))
    assert settings(ml_collections.ConfigDict(text)) == c
    assert lib.differing_keys(lib.as_dict(c), text) == {}
    del text["train"]["z_loss"]  # a key that did not exist yet
    assert lib.differing_keys(lib.as_dict(c), text) == {}
    other = default_config()
    other.train.steps = 3
    differing = lib.differing_keys(lib.as_dict(settings(other)), text)
    assert differing["train.steps"] == (3, 1000) and set(differing) == {
        "train.steps",
        "optimizer.groups",
    }
