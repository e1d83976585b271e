"""From a configuration alone to a trained model: real pipelines and models, invented texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_training import tiny_config

from tilescan.data import sources
from tilescan.data.documents import Document
from tilescan.models import LanguageModel, SequenceClassifier
from tilescan.training import inputs, steps
from tilescan.training.config import ConfigError, override, settings
from tilescan.training.metrics import read_rows
from tilescan.training.optimizers import make_optimizer
from tilescan.training.train import train

MODEL = ("model.d_model=16", "model.repeats=1", "model.n_heads=2", "model.mlp_dim=32")
DATA = ("data.sources=invented", "data.seq_len=24", "data.batch_size=8", "train.eval_batches=0")


@pytest.fixture(scope="module")
def documents():
    """Forty texts of two kinds, told apart by their letters."""
    rng = np.random.default_rng(0)

    def text(kind):
        return "".join(rng.choice(list("abcd " if kind == "low" else "wxyz "), rng.integers(9, 60)))

    kinds = ["low", "high"] * 20
    made = [Document(f"invented/{i}", text(kind), kind) for i, kind in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load", lambda name: made)
        yield made


def config(*assignments):
    return tiny_config(*MODEL, *DATA, *assignments)


@pytest.mark.slow
def test_a_language_model_learns_the_letters_and_resumes_to_the_same_bytes(documents, tmp_path):
    learn = ("optimizer.learning_rate=0.03", "train.keep=9")
    final = train(config(*learn), tmp_path)
    first = read_rows(tmp_path / "metrics.jsonl")[0]
    assert first["split"] == "validation" and first["loss"] == pytest.approx(np.log(258), abs=0.5)
    assert final["validation/loss"] < first["loss"] - 1.0
    assert final["test/weight"] > 0

    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config(*learn, "train.resume_step=4"), tmp_path) == final
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("count", "fractions", "missing"),
    [(1, "(0.8,0.1,0.1)", "validation and test"), (1, "(0.8,0.0,0.2)", "test")],
)
def test_parts_without_documents_are_told(documents, count, fractions, missing):
    few = config(f"data.max_documents={count}", f"data.fractions={fractions}")
    with pytest.warns(UserWarning, match=f"of {count} .* none is left for {missing}: nothing"):
        assert set(inputs.make_datasets(settings(few))) == {"train"}


@pytest.mark.filterwarnings("error")
def test_parts_that_nobody_asked_for_are_not_missed(documents):
    one = config("data.max_documents=1", "data.fractions=(1.0,0.0,0.0)")
    assert set(inputs.make_datasets(settings(one))) == {"train"}


@pytest.mark.slow
def test_a_classifier_learns_the_labels(documents, tmp_path):
    final = train(
        config("task=classification", "train.steps=30", "optimizer.learning_rate=0.02"), tmp_path
    )
    assert final["validation/accuracy"] == 1.0 and final["validation/weight"] == 2
    assert final["test/accuracy"] == 1.0


def test_precision_reaches_the_model_and_the_loss_stays_float32(documents):
    c = settings(config("precision.compute_dtype=bfloat16", "precision.param_dtype=bfloat16"))
    model, rows = inputs.make_model(c), next(iter(inputs.make_datasets(c)["train"]))
    tx, rate = make_optimizer(c.optimizer, 10)
    state = jax.eval_shape(lambda: steps.init_state(model, tx, rows, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert jnp.dtype("bfloat16") not in {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)}
    step = steps.make_train_step(steps.make_loss(model, c.task), tx, rate)
    state = state.replace(params=nn.meta.unbox(state.params))
    new, metrics = jax.eval_shape(step, state, rows)
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape
    assert jax.tree.all(jax.tree.map(same, state, new))


def test_models_are_made_as_configured(documents):
    c = settings(config())
    model = inputs.make_model(c)
    assert isinstance(model, LanguageModel) and model.config.vocab_size == 258
    assert model.config.d_model == 16
    c = settings(config("task=classification", "model.vocab_size=300", "classifier.pooling=last"))
    model = inputs.make_model(c, inputs.make_datasets(c))
    assert isinstance(model, SequenceClassifier)
    assert (model.n_classes, model.pooling, model.config.vocab_size) == (2, "last", 300)
    with pytest.raises(ConfigError, match="classifier.n_classes is needed"):
        inputs.make_model(c)


def test_a_model_that_cannot_be_is_refused_with_the_configuration():
    bad = tiny_config()
    override(bad, "model.n_heads=7")
    with pytest.raises(ConfigError, match="model: n_heads=7 does not divide d_model=512"):
        settings(bad)


def test_evaluation_passes_once_over_the_held_out_documents(documents):
    c = settings(config())
    datasets = inputs.make_datasets(c)
    held_out = inputs.pipelines.split_documents(documents, 0, c.data.fractions)["validation"]
    for _ in range(2):
        batches = list(inputs.eval_batches(datasets["validation"], 8, 0))
        seen = sum((batch["segment_ids"] > 0).sum() for batch in batches)
        assert seen == sum(len(d.text) + 1 for d in held_out)
    assert len(list(inputs.eval_batches(datasets["validation"], 8, 1))) == 1


def test_seeds_change_the_order_and_not_the_split(documents):
    one, two = (inputs.make_datasets(settings(config(f"seed={seed}"))) for seed in (0, 1))
    same = lambda name: np.array_equal(
        next(iter(one[name]))["tokens"], next(iter(two[name]))["tokens"]
    )
    assert same("validation") and not same("train")


def test_max_documents_takes_the_first(documents):
    c = settings(config("data.max_documents=10"))
    some = inputs.make_datasets(c)["train"].fingerprint["corpus"]
    assert some != inputs.make_datasets(settings(config()))["train"].fingerprint["corpus"]


def test_rows_that_fill_a_batch_up_weigh_nothing():
    batch = {"tokens": np.ones((3, 4), np.int32), "labels": np.ones(3, np.int32)}
    padded = inputs.pad_rows(batch, 5)
    assert jax.tree.map(np.shape, padded) == {"tokens": (5, 4), "labels": (5,), "weights": (5,)}
    assert padded["weights"].tolist() == [1, 1, 1, 0, 0]
