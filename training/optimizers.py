"""Optimizers: optax's update rules, and groups of parameters by regular expression.

One update of a parameter p with gradient g, at the t-th update (t = 0, 1, ...):

    u = rule(clip(g))                                   # adam, sgd or lion, see RULES
    p <- p - rate(t) * lr_multiplier * (u + weight_decay * p)

The decay is decoupled (Loshchilov and Hutter 2019, eq. 12) for every rule. `lr_multiplier` and
`weight_decay` come from the first group whose pattern is found in the parameter's path
("decoder/block_0/attention/query/kernel").
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from tilescan.training.schedules import make_schedule
from tilescan.training.settings import OptimizerConfig, ParamGroup

RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "adam": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "lion": lambda c: optax.scale_by_lion(c.b1, c.b2),
    "sgd": lambda c: optax.trace(c.b1) if c.b1 else optax.identity(),
}

# Parameters that are A, B and P of a state space.
_STATE_MATRICES = {
    "s4": r"(log_A_real|A_imag|/[PB]_(real|imag))$",
    "s4d": r"(log_A_real|A_imag)$",
    "h3": r"(log_A_real|A_imag)$",
    "dense s4": r"/[AB]$",
}
# Other parameters of a state space, which don't decay where its paper says so.
_UNDECAYED = {"h3": r"(^|/)(C_real|C_imag|D|shift|D_shift)$"}


def path_name(path: tuple[Any, ...]) -> str:
    """Names a leaf of a tree: ('block', 'kernel') -> "block/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def group_of(name: str, config: OptimizerConfig) -> ParamGroup:
    """Returns the first group whose pattern is in the parameter's name, defaults filled in."""
    for group in config.groups:
        if re.search(group.pattern, name):
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            return ParamGroup(group.pattern, group.lr_multiplier, decay)
    return ParamGroup(".*", 1.0, config.weight_decay)


def check_groups(config: OptimizerConfig, params: PyTree) -> None:
    """Raises ValueError for a group that no parameter falls into: a misspelled pattern, probably.

    Groups of the default configuration are exempt: not every model has norms or biases.
    """
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    used = {group_of(name, config).pattern for name in names}
    default = {group.pattern for group in OptimizerConfig().groups}
    for group in config.groups:
        if group.pattern not in used | default:
            shadowed = any(re.search(group.pattern, name) for name in names)
            why = "every parameter it matches is in an earlier group" if shadowed else (
                f"it matches none of {len(names)} parameters, for example {names[0]!r} and "
                f"{names[-1]!r}"
            )  # fmt: skip
            raise ValueError(
                f"optimizer.groups: the pattern {group.pattern!r} has no effect: {why}"
            )


def _scale_by_group(config: OptimizerConfig, rate: Callable) -> optax.GradientTransformation:
    """Maps u to -rate(t) * lr_multiplier * (u + weight_decay * p), by each parameter's group."""

    def update(updates, state, params):
        step_size = rate(state.count)

        def scale(path, u, p):
            group = group_of(path_name(path), config)
            return -step_size * group.lr_multiplier * (u + group.weight_decay * p)

        new = jax.tree.map_with_path(scale, updates, params)
        return new, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32)), update
    )


def state_space_groups(
    mixer: str, learning_rate: float, *, slowest: float = 1e-3, frozen: bool = False
) -> tuple[dict[str, Any], ...]:
    """Returns entries of `optimizer.groups`: a state space trains slowly and does not decay.

    As S4's paper trains (arXiv 2111.00396): A, B, P and the step of time at a rate of at most
    `slowest`; C and D are like all other parameters, but for H3's (2212.14052), which don't decay.

    Args:
      mixer: "s4", "s4d", "h3", or "dense s4" for S4 with a dense matrix.
      learning_rate: of the other parameters.
      slowest: the rate of the state space, unless the others' is smaller.
      frozen: whether A, B and P stay what they were at the start.

    Raises:
      ValueError: another mixer.
    """
    if mixer not in _STATE_MATRICES:
        known = ", ".join(_STATE_MATRICES)
        raise ValueError(f"mixer={mixer!r} has no group of its own; known: {known}")
    factor = min(1.0, slowest / learning_rate)
    factors = {_STATE_MATRICES[mixer]: 0.0 if frozen else factor, r"log_dt$": factor}
    factors |= {_UNDECAYED[mixer]: 1.0} if mixer in _UNDECAYED else {}
    return tuple(
        {"pattern": pattern, "lr_multiplier": lr_multiplier, "weight_decay": 0.0}
        for pattern, lr_multiplier in factors.items()
    )


def make_optimizer(
    config: OptimizerConfig, steps: int
) -> tuple[optax.GradientTransformation, Callable]:
    """Returns the optax transformation and its schedule `rate(t)`.

    Because a group's constants are looked up by path when the update is traced, groups leave no
    trace in the optimizer's state: its structure, and so a checkpoint's, depends on `name` and
    `clip_norm` alone.
    """
    rate = make_schedule(config, steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, RULES[config.name](config), _scale_by_group(config, rate)), rate
