"""A run of `tilescan train` leads on: to text, to a diagnosis, to a folder that loads elsewhere."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.cli import main as cli
from tilescan.cli import runs
from tilescan.decoding import load_writer
from tilescan.models import LanguageModel
from tilescan.models.checkpoints import load_pretrained
from tilescan.training import sharding
from tilescan.training.config import as_dict, default_config, settings
from tilescan.training.metrics import read_rows
from tilescan.training.trained import is_run, load_run
from tilescan.training.workdir import summary

TINY = {
    "data.sources": "python_stdlib",
    "data.max_documents": 4,
    "data.fractions": "(1.0,0.0,0.0)",
    "data.seq_len": 16,
    "data.batch_size": 8,
    "model.d_model": 16,
    "model.repeats": 1,
    "model.pattern": "mamba2",
    "model.position": "none",
    "model.tie_embeddings": "false",
    "model.mixers.mamba2.state_dim": 4,
    "model.mixers.mamba2.head_dim": 16,
    "train.steps": 1,
    "train.tensorboard": "false",
    "train.sample_every": 1,
    "train.sample_prompt": "import ",
    "train.sample_tokens": 4,
    "optimizer.warmup_steps": 0,
}


def train(workdir, **keys):
    words = [f"--config.{key}={value}" for key, value in (TINY | keys).items()]
    return cli.main(["train", f"--workdir={workdir}", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    assert train(folder) == 0
    return folder


def test_a_start_is_summed_up(run, capsys):
    found = load_run(run)
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    text = "in float32, computed in float32 (auto); 128 tokens a step on"
    assert train(run) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"{count:,} parameters {text}") and "already finished at step 1" in err


@pytest.mark.parametrize(
    ("restored", "words"),
    [(None, "steps 1 to 1000"), (0, "continues from step 0 to"), (7, "from step 7 to 1000")],
)
def test_a_start_says_where_it_starts(restored, words):
    c, params = settings(default_config()), {"a": np.zeros((2, 3)), "b": np.zeros(1)}
    said = summary(c, params, sharding.make_mesh(c.mesh), restored)
    assert said.startswith("7 parameters") and words in said and "4,096 tokens" in said


def test_a_run_is_read_by_its_folder_alone(run, tmp_path, caplog):
    assert is_run(run) and not is_run(tmp_path)
    before = sorted(path for path in run.rglob("*"))
    found = load_run(run)
    assert sorted(path for path in run.rglob("*")) == before
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert found.step == 1 and found.model.config.pattern == ("mamba2",)
    assert found.settings.data.seq_len == 16
    logits, _ = found.model.apply({"params": found.params}, jnp.zeros((1, 3), jnp.int32))
    assert logits.shape == (1, 3, 258)


def test_samples_are_written_where_they_are_asked_for(run):
    [row] = read_rows(run / "samples.jsonl")
    assert row["step"] == 1 and row["text"].startswith("import ")


def test_what_was_trained_writes(run, capsys):
    argv = ["generate", f"--checkpoint={run}", "--prompt=im", "--max-new-tokens=3"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("im")


def test_what_was_trained_is_diagnosed(run, tmp_path, capsys):
    """The training length and the newline are the run's."""
    figure = f"--figure={tmp_path / 'found.svg'}"
    assert cli.main(["diagnose", str(run), "--lengths=32", figure]) == 0
    assert "that at 16 tokens" in capsys.readouterr().out
    assert cli.main(["diagnose", str(tmp_path), "--lengths=32", figure]) == 1


def test_what_was_trained_loads_elsewhere(run, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert cli.main(["export", str(run), str(folder)]) == 0
    out = capsys.readouterr().out
    assert "step 1 of" in out and "model.safetensors" in out and "tokenizer.json" in out

    # The same logits, and the same text from the same ids.
    config, params = load_pretrained(folder)
    ours = load_run(run)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (1, 9)))
    want, _ = ours.model.apply({"params": ours.params}, tokens)
    got, _ = LanguageModel(config).apply({"params": params}, tokens)
    np.testing.assert_allclose(got, want, atol=1e-6)
    there, here = load_writer(folder), runs.load_writer(str(run))
    text = "aé€\n\x00😀 <"
    np.testing.assert_array_equal(there.tokenizer.encode(text), here.tokenizer.encode(text))
    assert there.tokenizer.decode(there.tokenizer.encode(text)) == text
    assert there.ends == (256,)

    assert cli.main(["export", str(run), str(folder)]) == 1
    assert "holds config.json already" in capsys.readouterr().err
    assert cli.main(["export", str(folder), str(tmp_path / "b")]) == 1
    assert "is not the workdir of a training run" in capsys.readouterr().err


def test_models_without_a_layout_are_refused_by_name(run, tmp_path, capsys, monkeypatch):
    found = load_run(run)
    other = dataclasses.replace(found.model.config, pattern=("gla", "mlp"), mixers={})
    monkeypatch.setattr(
        "tilescan.training.trained.load_run",
        lambda _: found._replace(model=LanguageModel(other)),
    )
    assert cli.main(["export", str(run), str(tmp_path / "new")]) == 1
    assert "can be exported" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_runs_without_a_language_model_are_refused(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{")
    argv = ["generate", f"--checkpoint={tmp_path}", "--prompt=a"]
    assert cli.main(argv) == 1 and "config.json cannot be read" in capsys.readouterr().err
    config = default_config()
    (tmp_path / "config.json").write_text(json.dumps(as_dict(settings(config))))
    assert cli.main(argv) == 1
    assert "holds no checkpoint yet: the first comes at step 200" in capsys.readouterr().err
    config.task, config.classifier.n_classes = "classification", 2
    (tmp_path / "config.json").write_text(json.dumps(as_dict(settings(config))))
    assert cli.main(argv) == 1 and "task 'classification'" in capsys.readouterr().err
    assert cli.main([*argv, "--temperature=-1"]) == 1  # said before anything is read
    assert "temperature=-1.0" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("tilescan 0.")
