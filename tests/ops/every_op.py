"""Every op with a batch and a time, as a table that tests of all of them go through.

Dimensions: B batch, T query time, S key time, H heads or channels of a state space, G key-value
heads or groups, D head dim, P value dim, N state dim, E embedding, V vocabulary, W and K kernel
widths; w, k and n are W - 1, K - 1 and 2 N.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tilescan import ops
from tilescan.ops import masks, s4, state_space
from tilescan.ops.cross_entropy import chunked_cross_entropy, chunked_log_probabilities

SIZES = dict(B=2, T=5, S=5, H=4, G=2, D=4, P=3, N=2, E=4, V=6, W=3, K=6)


class Op(NamedTuple):
    """Floating arrays by their letters, split into those with a batch and those it shares."""

    call: Callable  # of (arrays by name, segment ids [B, T]); gives a tree of floating arrays
    own: dict[str, str]
    shared: dict[str, str] = {}

    @property
    def letters(self) -> set[str]:
        return {x for letters in (self.own | self.shared).values() for x in letters if x.isupper()}


def arrays(op: Op, dtype=jnp.float32, seed=0, **sizes):
    """({name: NumPy's array}, segment ids [B, T]); sizes differ from SIZES where given."""
    sizes, rng = SIZES | sizes, np.random.default_rng(seed)
    sizes |= dict(w=max(sizes["W"] - 1, 0), k=max(sizes["K"] - 1, 0), n=2 * sizes["N"])
    shapes = {name: [sizes[x] for x in letters] for name, letters in (op.own | op.shared).items()}
    made = {name: rng.standard_normal(s).astype(dtype) for name, s in shapes.items()}
    ids = np.sort(rng.integers(1, 4, (sizes["B"], sizes["T"])), axis=1)
    return made, ids.astype(np.int32)


def _attention(mask):
    def call(x, ids):
        seen = masks.Segments(ids) if mask is None else mask
        return ops.attention(x["q"], x["k"], x["v"], mask=seen, bias=x.get("bias"), return_lse=True)

    return call


def _scan(op, *names, gates=(), packed=True):
    """op of the named arrays, with decays and steps computed from any values."""
    of = dict(dt=jax.nn.softplus, A=lambda a: -jnp.exp(a), beta=jax.nn.sigmoid)
    of |= dict(decay=lambda a: -jnp.exp(a))

    def call(x, ids):
        given = [of.get(name, lambda a: a)(x[name]) for name in names]
        by_name = {name: x[name] for name in gates}
        if packed:
            by_name["segment_ids"] = ids
        return op(*given, initial_state=x.get("before"), **by_name)

    return call


def _decode(x, ids):
    lengths = jnp.full(ids.shape[:1], x["k"].shape[1], jnp.int32)
    return ops.decode_attention(x["q"], x["k"], x["v"], lengths=lengths, return_lse=True, split=2)


def _losses(x, ids):
    return chunked_cross_entropy(
        x["hidden"], x["head"], ids, jnp.ones(ids.shape, jnp.float32), chunk=2, z_loss=0.1
    )["loss"]  # fmt: skip


def _diagonal(x, ids):
    system = [jax.lax.complex(-jnp.exp(x["A"]), x["A"]), *(x[n] + 0j for n in ("b", "c"))]
    return state_space.diagonal_state_space(
        x["u"], x["log_dt"], *system, initial_state=x["state"], segment_ids=ids, chunk=4
    )


def _dplr(x, ids):
    system = [jax.lax.complex(-jnp.exp(x["A"]), x["A"]), *(x[n] + 0j for n in ("p", "b", "c"))]
    return state_space.dplr_state_space(x["u"], x["log_dt"], *system, segment_ids=ids, chunk=4)


HEADS = dict(q="BTHD", k="BTGD", v="BTGP")
KEYS = dict(q="BTHD", k="BSGD", v="BSGP")
STATE = dict(before="BHDP")
OPS = {
    "attention": Op(_attention(masks.Full()), KEYS),
    "attention, causal": Op(_attention(masks.Causal()), KEYS),
    "attention, packed": Op(_attention(None), HEADS),
    "attention, window and prefix": Op(
        _attention(masks.Causal() & masks.SlidingWindow(1) | masks.Prefix(2)), HEADS
    ),
    "attention, lambda": Op(_attention(masks.Lambda(1, 2)), HEADS),
    "attention, bias": Op(_attention(masks.Causal()), KEYS, dict(bias="HTS")),
    "attention, own bias": Op(_attention(masks.Causal()), KEYS | dict(bias="BHTS")),
    "decode_attention": Op(_decode, KEYS),
    "ssd": Op(
        _scan(ops.ssd, "x", "dt", "A", "B", "C", gates=("D", "dt_bias")),
        dict(x="BTHP", dt="BTH", B="BTGN", C="BTGN", before="BHPN"),
        dict(A="H", D="H", dt_bias="H"),
    ),
    "gated_linear_attention": Op(
        _scan(ops.gated_linear_attention, "q", "k", "v", "decay"),
        HEADS | STATE | dict(decay="BTHD"),
    ),
    "retention": Op(
        _scan(ops.gated_linear_attention, "q", "k", "v", "decay"), HEADS | STATE | dict(decay="BTH")
    ),
    "delta_rule": Op(
        _scan(ops.delta_rule, "q", "k", "v", "beta"), HEADS | STATE | dict(beta="BTH")
    ),
    "gated_delta_rule": Op(
        _scan(ops.gated_delta_rule, "q", "k", "v", "beta", "decay"),
        HEADS | STATE | dict(beta="BTH", decay="BTH"),
    ),
    "selective_scan": Op(
        _scan(ops.selective_scan, "x", "dt", "A", "B", "C", gates=("D", "z", "dt_bias")),
        dict(x="BTE", dt="BTE", B="BTN", C="BTN", z="BTE", before="BEN"),
        dict(A="EN", D="E", dt_bias="E"),
    ),
    "selective_scan, groups": Op(
        _scan(ops.selective_scan, "x", "dt", "A", "B", "C"),
        dict(x="BTE", dt="BTE", B="BTGN", C="BTGN", before="BEN"),
        dict(A="EN"),
    ),
    "linear_recurrence": Op(
        _scan(ops.linear_recurrence, "a", "b"), dict(a="BTE", b="BTE", before="BE")
    ),
    "linear_recurrence, one decay": Op(
        _scan(ops.linear_recurrence, "a", "b"), dict(b="BTE", before="BE"), dict(a="E")
    ),
    "short_convolution": Op(
        _scan(ops.short_convolution, "x", "weight", gates=("bias",)),
        dict(x="BTE", before="BwE"),
        dict(weight="WE", bias="E"),
    ),
    "long_convolution": Op(
        _scan(
            ops.long_convolution, "u", "kernel", gates=("D", "pre_gate", "post_gate"), packed=False
        ),
        dict(u="BTE", pre_gate="BTE", post_gate="BTE", before="BkE"),
        dict(kernel="KE", D="E"),
    ),
    "chunked_cross_entropy": Op(_losses, dict(hidden="BTE"), dict(head="EV")),
    "chunked_log_probabilities": Op(
        lambda x, ids: chunked_log_probabilities(x["hidden"], x["head"], ids, chunk=2),
        dict(hidden="BTE"),
        dict(head="EV"),
    ),
    "diagonal_state_space": Op(
        _diagonal, dict(u="BTH", state="BHn"), dict(log_dt="H", A="HN", b="HN", c="HN")
    ),
    "dplr_state_space": Op(_dplr, dict(u="BTH"), dict(log_dt="H", A="HN", p="HN", b="HN", c="HN")),
    "s4d_step": Op(
        lambda x, ids: s4.s4d_step(
            x["state"] + 0j, x["u"], *(x[name] + 0j for name in ("A", "b", "c"))
        )[1],
        dict(state="BHN", u="BH"),
        dict(A="HN", b="HN", c="HN"),
    ),
}
