"""Runs that differ in their seed alone share their programs; all others have their own."""

import jax
import pytest
from flax import linen as nn

from tilescan.training import config as config_lib
from tilescan.training import inputs, programs, sharding


def kept_for(*assignments, model=None):
    config = config_lib.default_config()
    for assignment in assignments:
        config_lib.override(config, assignment)
    c = config_lib.settings(config)
    model = inputs.make_model(c) if model is None else model
    return programs.kept(model, c, sharding.make_mesh(c.mesh), lambda: (object(),))


def test_another_seed_has_the_same_programs():
    assert kept_for("seed=1") is kept_for("seed=2")


@pytest.mark.parametrize(
    "changed", ["optimizer.learning_rate=1e-2", "model.d_model=64", "train.z_loss=1e-4"]
)
def test_another_setting_has_programs_of_its_own(changed):
    assert kept_for() is not kept_for(changed)


def test_few_are_kept_and_a_model_without_a_hash_has_none():
    first = kept_for("train.steps=7")
    for steps in range(8, 8 + programs.KEPT):
        kept_for(f"train.steps={steps}")
    assert kept_for("train.steps=7") is not first

    class Unhashable(nn.Module):
        sizes: dict

        __hash__ = None

    model = Unhashable({"d": jax.numpy.ones(2)})
    assert kept_for(model=model) is not kept_for(model=model)
