"""Update rules against the papers' equations, groups of parameters by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.training.optimizers import (
    check_groups,
    group_of,
    make_optimizer,
    state_space_groups,
)
from tilescan.training.settings import RECURRENCE, ConfigError, OptimizerConfig, ParamGroup


def constant(name, **fields):
    defaults = dict(
        name=name, learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0, groups=()
    )
    return OptimizerConfig(**defaults | fields)


def run(config, params, grads):
    tx, _ = make_optimizer(config, len(grads))
    state = tx.init(params)
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def reference(config, p, grads):
    """The published update rules, one parameter at a time in float64."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        if config.name in ("adam", "adamw"):  # Kingma and Ba 2015, algorithm 1
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g**2
            u = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        elif config.name == "lion":  # Chen et al. 2023, algorithm 2
            u = np.sign(config.b1 * m + (1 - config.b1) * g)
            m = config.b2 * m + (1 - config.b2) * g
        else:  # heavy ball
            m = config.b1 * m + g
            u = m
        p = p - config.learning_rate * (u + config.weight_decay * p)
    return p


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd"])
def test_rule_is_the_paper_s(name):
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=(5, 3)), rng.normal(size=(6, 5, 3))
    config = constant(name, weight_decay=0.0 if name == "adam" else 0.3)
    got = run(config, {"w": jnp.float32(p)}, [{"w": jnp.float32(g)} for g in grads])
    np.testing.assert_allclose(got["w"], reference(config, p, grads), rtol=2e-5, atol=2e-6)


def test_gradient_is_clipped_by_its_global_norm():
    config = constant("sgd", b1=0.0, weight_decay=0.0, clip_norm=1.0)
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((4,), 4.0)}  # global norm 10
    got = run(config, jax.tree.map(jnp.zeros_like, grads), [grads])
    np.testing.assert_allclose(got["a"], -0.1 * 3.0 / 10, rtol=1e-6)
    np.testing.assert_allclose(got["b"], -0.1 * 4.0 / 10, rtol=1e-6)


GROUPS = (
    ParamGroup(r"ssm/(a|dt)$", 0.1, 0.0),
    ParamGroup(r"bias$", 1.0, 0.0),
    ParamGroup(r"frozen", 0.0),
)


def test_groups_scale_the_rate_and_the_decay():
    config = constant("sgd", b1=0.0, weight_decay=0.5, groups=GROUPS)
    names = {"ssm": {"a": 1.0, "x": 1.0}, "dense": {"bias": 1.0}, "frozen": {"w": 1.0}}
    params = jax.tree.map(lambda x: jnp.full((2,), x), names)
    got = run(config, params, [jax.tree.map(jnp.ones_like, params)])
    want = {
        "ssm": {"a": 1 - 0.1 * 0.1, "x": 1 - 0.1 * 1.5},
        "dense": {"bias": 1 - 0.1},
        "frozen": {"w": 1.0},
    }
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)


def test_the_first_group_that_matches_holds():
    config = constant("sgd", groups=(ParamGroup("kernel", 2.0), ParamGroup("a/kernel", 3.0)))
    assert group_of("a/kernel", config).lr_multiplier == 2.0
    assert group_of("other", config).weight_decay == config.weight_decay


def test_groups_leave_no_trace_in_the_state():
    params = {"ssm": {"a": jnp.ones(2)}, "bias": jnp.ones(2)}
    with_groups, _ = make_optimizer(constant("adamw", groups=GROUPS), 5)
    without, _ = make_optimizer(constant("adamw"), 5)
    shapes = [jax.tree.structure(tx.init(params)) for tx in (with_groups, without)]
    assert shapes[0] == shapes[1]


def test_a_group_without_effect_is_refused():
    params = {"dense": {"kernel": 0, "bias": 0}}
    with pytest.raises(ValueError, match=r"'kernal' has no effect: it matches none of 2 .*dense/"):
        check_groups(constant("sgd", groups=(ParamGroup("kernal"),)), params)
    shadowed = (ParamGroup("dense"), ParamGroup("bias"))
    with pytest.raises(ValueError, match=r"'bias' has no effect: every parameter .* earlier group"):
        check_groups(constant("sgd", groups=shadowed), params)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match=r"optimizer.name = 'adamm' .*did you mean 'adam"):
        OptimizerConfig(name="adamm")
    with pytest.raises(ConfigError, match=r"optimizer.schedule = 'cosin' .*did you mean 'cosine'"):
        OptimizerConfig(schedule="cosin")
    with pytest.raises(ConfigError, match="'adam' does not decay weights"):
        OptimizerConfig(name="adam", weight_decay=0.1)


def test_recurrences_and_scales_are_not_decayed_by_default():
    undecayed = ("scale", "bias", "A_log", "dt_bias", "D", "log_dt", "Lambda_re", "Lambda_im", "B")
    for name in undecayed:
        assert group_of(f"backbone/layers/s_0/mixer/{name}", OptimizerConfig()).weight_decay == 0
    for name in ("kernel", "embedding", "conv/weight", "D/kernel", "AB"):
        assert group_of(f"backbone/layers/s_0/mixer/{name}", OptimizerConfig()).weight_decay == 0.1
    slower = OptimizerConfig(groups=(ParamGroup(RECURRENCE, 0.1, 0.0),))
    assert group_of("mixer/A_log", slower).lr_multiplier == 0.1


def test_a_state_space_trains_slowly_and_does_not_decay():
    groups = tuple(ParamGroup(**g) for g in state_space_groups("s4", 1e-2))
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, groups=groups)
    found = lambda name: group_of(f"layers/s4_0/mixer/{name}", config)
    for name in ("log_A_real", "A_imag", "P_real", "B_imag", "log_dt"):
        assert (found(name).lr_multiplier, found(name).weight_decay) == (0.1, 0.0)
    assert (found("C_real").lr_multiplier, found("C_real").weight_decay) == (1.0, 0.1)
    factors = [g["lr_multiplier"] for g in state_space_groups("s4d", 5e-4, frozen=True)]
    assert factors == [0.0, 1.0]  # never faster than the others
    with pytest.raises(ValueError, match="mixer='mamba'"):
        state_space_groups("mamba", 1e-3)
    groups = tuple(ParamGroup(**g) for g in state_space_groups("h3", 2e-3))
    config = OptimizerConfig(weight_decay=0.1, groups=groups)
    for name, factor in (("log_dt", 0.5), ("A_imag", 0.5), ("shift", 1.0), ("D_shift", 1.0)):
        assert (found(name).lr_multiplier, found(name).weight_decay) == (factor, 0.0)
    assert found("query/kernel").weight_decay == 0.1
    dense = tuple(ParamGroup(**g) for g in state_space_groups("dense s4", 1e-2))
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, groups=dense)
    factors = {name: found(name).lr_multiplier for name in ("A", "B", "log_dt", "C_real", "D")}
    assert factors == {"A": 0.1, "B": 0.1, "log_dt": 0.1, "C_real": 1.0, "D": 1.0}
