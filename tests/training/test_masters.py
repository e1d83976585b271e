"""bfloat16 parameters move by small updates: float32 masters, saved, restored and cut like them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_training import VOCAB, Rows, TinyModel, tiny_config, tiny_datasets

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training import sharding, steps
from tilescan.training.checkpoints import CheckpointError, Checkpoints
from tilescan.training.metrics import read_rows
from tilescan.training.optimizers import make_optimizer
from tilescan.training.settings import MeshConfig, OptimizerConfig
from tilescan.training.train import sharded_init, train

SMALL = {"state_dim": 4, "fft": False}


class Weights(nn.Module):
    """Parameters whose gradient is 1 everywhere, in a dtype."""

    dtype: str

    @nn.compact
    def __call__(self, tokens, *, positions=None, segment_ids=None):
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, jnp.float32, 0.5, 2.0)
        w = self.param("w", lambda *a: init(*a).astype(self.dtype), (1000,), self.dtype)
        return w.astype(jnp.float32), None


def sum_of_weights(params, batch, key=None):
    total = jnp.sum(params["w"].astype(jnp.float32))
    zero = jnp.zeros(())
    sums = {"loss": total, "nll": zero, "correct": zero, "weight": jnp.ones(()), "exact": zero}
    return total, sums | {"rows": jnp.ones(())}


def moved(dtype, count=200):
    config = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0
    )
    tx, rate = make_optimizer(config, count)
    batch = {"tokens": jnp.zeros((1, 1), jnp.int32)}
    state = jax.jit(lambda: steps.init_state(Weights(dtype), tx, batch, 0))()
    step = jax.jit(steps.make_train_step(sum_of_weights, tx, rate))
    first, metrics = state.params["w"], None
    for _ in range(count):
        state, metrics = step(state, batch)
    return first, state, metrics


def test_a_small_learning_rate_moves_bfloat16_parameters_as_far_as_float32_ones():
    """200 Adam updates of 1e-4 are 2e-2; bfloat16's neighbours are 4e-3 to 8e-3 apart."""
    first, state, metrics = moved("bfloat16")
    first = first.astype(jnp.float32)
    master = state.masters["w"]
    assert state.params["w"].dtype == jnp.bfloat16 and master.dtype == jnp.float32
    np.testing.assert_allclose(master, first - 2e-2, atol=1e-5)
    np.testing.assert_array_equal(state.params["w"], master.astype(jnp.bfloat16))
    drift = float(jnp.mean(state.params["w"].astype(jnp.float32) - first))
    assert drift == pytest.approx(-2e-2, rel=0.2)
    assert float(metrics["update_norm"]) == pytest.approx(1e-4 * np.sqrt(1000), rel=1e-3)
    wide_first, wide, _ = moved("float32")
    assert wide.masters is None
    np.testing.assert_allclose(wide.params["w"], wide_first - 2e-2, atol=1e-5)


def narrow_model(*pattern):
    mixers = {"s4d": SMALL} if "s4d" in pattern else {}
    sizes = dict(mlp_dim=32, param_dtype="bfloat16", mixers=mixers)
    return LanguageModel(LanguageModelConfig(VOCAB, 16, pattern, 1, **sizes))


class Mixed(nn.Module):
    """Narrow parameters and a wide one."""

    @nn.compact
    def __call__(self, tokens, *, positions=None, segment_ids=None):
        logits = nn.Embed(VOCAB, VOCAB, param_dtype=jnp.bfloat16)(tokens)
        return logits * self.param("scale", nn.initializers.ones, (1, 1, VOCAB)), None


def test_decays_of_a_recurrence_stay_float32():
    tx, _ = make_optimizer(OptimizerConfig(), 1000)
    batch = {"tokens": jnp.zeros((1, 4), jnp.int32)}
    init = lambda: steps.init_state(narrow_model("s4d"), tx, batch, 0)
    state = jax.eval_shape(init)
    dtypes = {
        jax.tree_util.keystr(path): x.dtype.name
        for path, x in jax.tree.leaves_with_path(nn.unbox(state.params))
    }
    narrow = {name for name, dtype in dtypes.items() if dtype == "bfloat16"}
    assert narrow and set(dtypes.values()) == {"bfloat16", "float32"}
    masters = jax.tree.leaves_with_path(state.masters)
    assert {jax.tree_util.keystr(path) for path, _ in masters} == narrow


def test_wide_parameters_among_narrow_ones_have_no_masters():
    """A donated state has no buffer twice."""
    model = Mixed()
    tx, rate = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    batch = {k: jnp.asarray(v) for k, v in next(Rows()).items()}
    state = jax.jit(lambda: steps.init_state(model, tx, batch, 0))()
    narrow = [x for x in jax.tree.leaves(state.params) if x.dtype == jnp.bfloat16]
    wide = [x for x in jax.tree.leaves(state.params) if x.dtype == jnp.float32]
    masters = jax.tree.leaves(state.masters)
    assert narrow and wide and len(masters) == len(narrow)
    assert {x.dtype for x in masters} == {jnp.dtype("float32")}
    loss = steps.make_loss(model, "language_model")
    step = jax.jit(steps.make_train_step(loss, tx, rate), donate_argnums=0)
    structure = jax.tree.structure(state)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert jax.tree.structure(state) == structure and np.isfinite(metrics["loss"])
    for x, master in zip(
        [x for x in jax.tree.leaves(state.params) if x.dtype == jnp.bfloat16],
        jax.tree.leaves(state.masters),
        strict=True,
    ):
        np.testing.assert_array_equal(x, master.astype(jnp.bfloat16))


def test_masters_lie_where_their_parameters_lie():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tx, _ = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    shardings, abstract, initialize = sharded_init(
        narrow_model("mlp"), tx, next(iter(Rows())), 0, mesh
    )
    state = initialize()
    where = lambda tree: {
        jax.tree_util.keystr(path): x.sharding for path, x in jax.tree.leaves_with_path(tree)
    }
    masters, params = where(state.masters), where(state.params)
    assert masters and masters.items() <= params.items()
    assert any(not x.is_fully_replicated for x in masters.values())
    assert where(abstract.masters) == masters
    assert jax.tree.leaves(shardings.masters) == list(masters.values())


@pytest.mark.slow
def test_a_continued_run_is_the_same_to_the_byte(tmp_path):
    run = ("train.steps=8", "train.checkpoint_every=4", "train.keep=9", "train.eval_every=8")
    run += ("optimizer.learning_rate=1e-5", "precision.param_dtype=bfloat16")
    model, data = narrow_model("mlp"), {"train": tiny_datasets()["train"]}
    go = lambda *more: train(tiny_config(*run, *more), tmp_path, model=model, datasets=data)
    final = go()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 8
    assert go("train.resume_step=4") == final
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_checkpoint_without_masters_is_refused_by_name(tmp_path):
    state = {"params": jnp.ones(3, jnp.bfloat16)}
    saver = Checkpoints(tmp_path)
    try:
        saver.save(1, state, Rows())
        saver.wait()
        with pytest.raises(CheckpointError, match="masters: absent there"):
            saver.restore(1, state | {"masters": jax.ShapeDtypeStruct((3,), jnp.float32)})
    finally:
        saver.close()


def test_a_float32_model_is_trained_as_before():
    """No masters: the state has the leaves it always had."""
    tx, _ = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    batch = {"tokens": jnp.zeros((1, 4), jnp.int32)}
    state = jax.eval_shape(lambda: steps.init_state(TinyModel(), tx, batch, 0))
    assert state.masters is None
    names = {str(path[0]) for path, _ in jax.tree.leaves_with_path(state)}
    assert names == {".step", ".params", ".opt_state", ".key"}
