"""Samples while a model trains: the same texts when a run is continued, on any mesh; trackers."""

import json
import sys
import types

import jax
import numpy as np
import pytest
from tiny_training import TinyModel, tiny_config, tiny_datasets

from tilescan.data import sources
from tilescan.data.documents import Document
from tilescan.decoding.sampling import generate
from tilescan.training import samples, sharding, trackers
from tilescan.training.config import ConfigError, settings
from tilescan.training.inputs import make_model
from tilescan.training.metrics import read_rows
from tilescan.training.optimizers import make_optimizer
from tilescan.training.samples import make_sampler
from tilescan.training.settings import MeshConfig
from tilescan.training.train import sharded_init, train
from tilescan.training.trained import load_run

SMALL = (
    "model.d_model=8", "model.repeats=1", "model.n_heads=2", "model.mlp_dim=8",
    "model.vocab_size=300", "data.sources=invented", "train.steps=4", "train.checkpoint_every=2",
    "train.eval_every=2", "train.sample_every=2", "train.sample_prompt=import ",
    "train.sample_tokens=6",
)  # fmt: skip


@pytest.fixture
def documents(monkeypatch):
    made = [Document(f"invented/{i}", "abc " * 9) for i in range(40)]
    monkeypatch.setattr(sources, "load", lambda name: made)


@pytest.mark.slow
def test_texts_are_written_by_one_program_and_again_when_a_run_goes_on(
    documents, tmp_path, monkeypatch
):
    traced = []
    monkeypatch.setattr(samples, "generate", lambda *a, **k: traced.append(0) or generate(*a, **k))
    train(tiny_config(*SMALL), tmp_path)
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [2, 4] and len(traced) == 1
    assert all(row["text"].startswith("import ") for row in rows)
    assert rows[0]["text"] != rows[1]["text"]

    # What the parameters of the last step write; ids without a token are no text.
    run = load_run(tmp_path)
    prompt = np.frombuffer(b"import ", np.uint8).astype(np.int32)
    key = jax.random.fold_in(jax.random.key(0), 4)
    want = generate(
        run.model, run.params, prompt[None], max_new_tokens=6, temperature=1.0, key=key, eos=256
    )
    bytes_of = bytes(i for i in want.tokens[0, : want.lengths[0]].tolist() if i < 256)
    assert rows[-1]["text"] == "import " + bytes_of.decode("utf-8", "replace")

    # Continued from the middle: the same files.
    files = ["samples.jsonl", "metrics.jsonl"]
    before = [(tmp_path / name).read_bytes() for name in files]
    train(tiny_config(*SMALL, "train.resume_step=2"), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in files] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("mesh.fsdp=2", "mesh.tensor=2"),
        ("mesh.sequence=2", "mesh.fsdp=4", "model.sequence_balance=zigzag"),
        (
            "mesh.sequence=2", "mesh.parameters_over_sequence=true", "model.pattern=mamba2,mlp",
            "model.mixers.mamba2.head_dim=8",
        ),
    ],
)  # fmt: skip
def test_texts_are_the_same_on_any_mesh(keys):
    c = settings(tiny_config(*SMALL, "data.seq_len=16", *keys))
    model, mesh = make_model(c), sharding.make_mesh(c.mesh)
    tx, _ = make_optimizer(c.optimizer, c.train.steps)
    example = sharding.in_order({"tokens": np.zeros((8, 16), np.int32)}, mesh, c.balance)
    _, abstract, initialize = sharded_init(model, tx, example, 0, mesh, sharding.rules(c.mesh))
    params = initialize().params
    data = types.SimpleNamespace(fingerprint={"tokenizer": "byte"})
    one = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    there = make_sampler(model, c, data, mesh, abstract.params)(params, 3)
    shapes = jax.eval_shape(lambda: params)
    plain = make_sampler(model, c, data, one, shapes)(jax.device_get(params), 3)
    assert there == plain and there.startswith("import ")


def test_samples_that_cannot_be_are_refused_before_the_first_step(documents, tmp_path):
    with pytest.raises(ConfigError, match="train.sample_every = 2 needs a LanguageModel"):
        train(tiny_config(*SMALL), tmp_path, model=TinyModel(), datasets=tiny_datasets())
    with pytest.raises(ConfigError, match="these data have no tokenizer: set it to 0"):
        train(tiny_config(*SMALL), tmp_path, datasets=tiny_datasets())
    short = tiny_config(*SMALL, "model.position=learned", "model.max_len=12")
    with pytest.raises(ConfigError, match="train.sample_tokens = 6: prompt .* are 13 tokens"):
        train(short, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_named_first(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package wandb: pip install -e .\[wandb\]"):
        train(tiny_config("train.tracker=wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Fake(types.ModuleType):
    """What trackers.weights_and_biases uses of wandb, kept in lists."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.rows, self.ended = [], [], []
        self.log = lambda values, step: self.rows.append((step, values))
        self.finish = lambda exit_code: self.ended.append(exit_code)

    def init(self, **options):
        if options["project"] == "refused":
            raise self.Error("no account.")
        self.begun.append(options)
        return self


def test_weights_and_biases_continues_a_run(tmp_path, monkeypatch):
    wandb = Fake()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for restored in (None, 4):
        with trackers.weights_and_biases(tmp_path, {"seed": 1}, restored) as tell:
            tell(5, {"train/loss": 2.0})
    first, again = wandb.begun
    assert (
        first["id"] == again["id"] == json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    )
    assert first["resume"] == "allow" and first["name"] == tmp_path.name
    assert first["project"] == "tilescan" and first["config"] == {"seed": 1}
    assert wandb.rows == [(5, {"train/loss": 2.0})] * 2 and wandb.ended == [0, 0]
    # A run that begins again is another one; one that fails says so.
    with pytest.raises(KeyError), trackers.weights_and_biases(tmp_path, {}, None):
        raise KeyError
    assert wandb.begun[-1]["id"] != first["id"] and wandb.ended[-1] == 1
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    with (
        pytest.raises(RuntimeError, match="no account; WANDB_MODE=offline needs neither"),
        trackers.weights_and_biases(tmp_path, {}, None),
    ):
        pass
