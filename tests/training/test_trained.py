"""A run's model is read back from its work folder, and another run starts from its parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.data.batches import BatchDataset
from tilescan.training import steps
from tilescan.training.checkpoints import UnusableCheckpoint
from tilescan.training.config import default_config, settings
from tilescan.training.train import train
from tilescan.training.trained import load_trained
from tilescan.training.workdir import with_compute_dtype


def config(**keys):
    c = default_config()
    c.update_from_flattened_dict(
        {
            "model.pattern": ("mlp",),
            "model.repeats": 1,
            "model.d_model": 4,
            "model.n_heads": 1,
            "model.position": "none",
            "model.vocab_size": 8,
            "data.seq_len": 4,
            "data.batch_size": 8,
            "train.steps": 2,
            "train.progress": False,
            "train.tensorboard": False,
            **keys,
        }
    )
    return c


def datasets():
    def make(step):
        tokens = np.random.default_rng(step).integers(8, size=(8, 5), dtype=np.int32)
        weights = np.ones((8, 4), np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    return {"train": BatchDataset(make, None, {})}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    train(config(), folder, datasets=datasets())
    return folder


def test_the_model_is_read_back(first):
    model, params = load_trained(config(), first)
    assert model.config.d_model == 4
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.zeros((1, 3), jnp.int32))
    assert logits.shape == (1, 3, 8)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_starts_from_given_parameters(first, tmp_path, dtype):
    _, params = load_trained(config(), first)
    start = jax.tree.map(np.asarray, params)
    c = config(**{"optimizer.learning_rate": 0.0, "seed": 5, "precision.param_dtype": dtype})
    train(c, tmp_path, datasets=datasets(), params=params)
    _, ended = load_trained(c, tmp_path)
    for a, b, kept in zip(*map(jax.tree.leaves, (start, ended, params)), strict=True):
        np.testing.assert_array_equal(a.astype(b.dtype), b)
        np.testing.assert_array_equal(a, kept)  # the caller's are not donated


def test_a_run_keeps_the_dtype_that_its_first_devices_chose(first, tmp_path):
    """What "auto" was stands in config.json; an explicit dtype is never changed."""
    chosen = lambda *args, **keys: with_compute_dtype(settings(config(**keys)), *args).precision
    kept = json.loads((first / "config.json").read_text())
    assert kept["precision"]["compute_dtype"] == "float32"
    assert chosen(first, "tpu").compute_dtype == "float32"
    assert chosen(tmp_path, "tpu").compute_dtype == "bfloat16"
    assert chosen(tmp_path).compute_dtype == "float32"
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"precision": {"compute_dtype": "bfloat16"}}')
    assert chosen(tmp_path).compute_dtype == "bfloat16"
    explicit = {"precision.compute_dtype": "float32"}
    assert chosen(tmp_path, "tpu", **explicit).compute_dtype == "float32"
    assert settings(config()).on("cuda").model_config(8).dtype == jnp.bfloat16


def test_masters_start_from_the_exact_values():
    state = steps.TrainState(
        0, {"w": jnp.zeros(3, jnp.bfloat16)}, None, None, {"w": jnp.zeros(3, jnp.float32)}
    )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = state.replace(params={"w": place}, masters={"w": place})
    given = np.float32([1.001, 2.002, 3.003])
    started = steps.start_from(state, {"w": given}, where)
    assert started.params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(started.masters["w"], given)


def test_parameters_of_another_model_are_named(first, tmp_path):
    with pytest.raises(ValueError, match=r"another model: .*has shape"):
        _, params = load_trained(config(), first)
        train(config(**{"model.d_model": 8}), tmp_path, datasets=datasets(), params=params)


def test_a_run_that_did_not_end_is_refused(first, tmp_path):
    for folder, c in ((tmp_path, config()), (first, config(**{"train.steps": 3}))):
        with pytest.raises(UnusableCheckpoint, match="no checkpoint of the last step"):
            load_trained(c, folder)
