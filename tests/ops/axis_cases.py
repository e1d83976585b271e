"""Calls of every op, smallest of all, with what the dimensions of their arrays are."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.ops import cross_entropy, masks, s4, state_space
from tilescan.ops.attention import attention, decode_attention, merge_partials
from tilescan.ops.delta_rule import delta_rule, gated_delta_rule
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.short_convolution import short_convolution
from tilescan.ops.ssd import ssd

B, T, H, G, D, P, N, E = 4, 10, 4, 2, 4, 3, 3, 8
CAUSAL = masks.Causal()
# Which axis of a mesh shards which dimension.
SHARDED = {"B": "data", "H": "tensor", "G": "tensor", "E": "tensor", "V": "tensor"}


@dataclasses.dataclass
class Case:
    """call(arrays) gives a tuple of results.

    letters: of each array, results: of each result; "" sums over rows, which devices add up.
    """

    call: Callable
    arrays: dict[str, np.ndarray]
    letters: dict[str, str]
    results: tuple[str, ...]


def normal(name, *shape):
    seed = int.from_bytes(name.encode(), "little") % 2**31
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ids(length=T, first=0):
    """Two segments a row, at other steps in each."""
    steps = np.arange(length)[None] >= np.arange(2, 2 + 2 * B, 2)[:, None] + first
    return steps.astype(np.int32)


SIZES = dict(B=B, T=T, S=T, H=H, G=G, D=D, P=P, N=N, E=E, W=3, K=5, V=12, M=8, L=1)


def case(op, results, options=None, **letters):
    """A case of op(**arrays): standard normal values, with the sizes of the letters."""
    arrays = {name: normal(name, *(SIZES[c] for c in of)) for name, of in letters.items()}
    call = lambda arrays: _tuple(op(**arrays, **(options or {})))
    return Case(call, arrays, letters, results)


def adapted(base, change=lambda arrays: arrays, arrays=None, letters=None):
    """A case whose arrays are changed before the call, with some of them given."""
    call = lambda arrays: base.call(change(arrays))
    return Case(call, base.arrays | (arrays or {}), base.letters | (letters or {}), base.results)


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def packed(base, length=T):
    return adapted(base, arrays={"segment_ids": ids(length)}, letters={"segment_ids": "BT"})


def _attention(mask=CAUSAL, segments=False, **more):
    """Attention with a mask, to which the array "ids" adds segments."""

    def call(q, k, v, ids=None, **options):
        seen = mask if ids is None else mask & masks.Segments(ids)
        return attention(q, k, v, mask=seen, return_lse=True, **options)

    base = case(call, ("BTHP", "BTH"), q="BTHD", k="BSGD", v="BSGP", **more)
    if segments:
        base = adapted(base, arrays={"ids": ids()}, letters={"ids": "BT"})
    return base


def _decode(segments=False, **more):
    def call(q, k, v, lengths, ids=None, bias=None):
        mask = masks.Causal()
        if ids is not None:
            mask = mask & masks.Segments(ids[:, :2], ids)
        options = dict(lengths=lengths, mask=mask, bias=bias, return_lse=True, split=4)
        return decode_attention(q[:, :2], k, v, **options)

    base = case(call, ("BTHP", "BTH"), q="BTHD", k="BSGD", v="BSGP", **more)
    given = {"lengths": np.asarray([3, 10, 6, 2], np.int32)} | ({"ids": ids()} if segments else {})
    return adapted(
        base, arrays=given, letters={"lengths": "B"} | ({"ids": "BT"} if segments else {})
    )


def _positive(*names):
    """Makes what must be positive positive, and rates and log-decays negative."""

    def change(arrays):
        arrays = dict(arrays)
        for name in names:
            sign = -1 if name in ("A", "log_decay") else 1
            arrays[name] = sign * jax.nn.softplus(arrays[name])
        return arrays

    return change


def _ssd(**more):
    base = case(ssd, ("BTHP", "BHPN"), x="BTHP", dt="BTH", A="H", B="BTGN", C="BTGN", **more)
    return adapted(base, _positive("dt", "A"))


def _linear(op=gated_linear_attention, change=(), **more):
    base = case(op, ("BTHP", "BHDP"), q="BTHD", k="BTGD", v="BTGP", **more)

    def prepare(arrays):
        arrays = _positive(*change)(arrays)
        if "beta" in arrays:  # a rule that is stable
            unit = arrays["k"] / jnp.linalg.norm(arrays["k"], axis=-1, keepdims=True)
            arrays |= {"beta": jax.nn.sigmoid(arrays["beta"]), "k": unit}
        return arrays

    return adapted(base, prepare)


def _selective(groups="", **more):
    BC = f"BT{groups}N"
    base = case(selective_scan, ("BTE", "BEN"), x="BTE", dt="BTE", A="EN", B=BC, C=BC, **more)
    return adapted(base, _positive("dt", "A"))


def _convolution(T=T, op=short_convolution, results=("BTE", "BWE"), options=None, **letters):
    return case(op, results, options, **letters)


_SYSTEM = dict(log_dt="H", A="HN", B="HN", C="HN")
_DPLR = dict(log_dt="H", Lambda="HN", P="HN", B="HN", C="HN")


def _complex(arrays):
    """Systems in complex numbers, with stable poles."""
    arrays = dict(arrays)
    for name in ("A", "Lambda", "P", "B", "C", "Abar", "Bbar"):
        if name in arrays:
            x = arrays[name]
            re = -0.5 - jax.nn.softplus(x) if name in ("A", "Lambda") else x
            arrays[name] = jax.lax.complex(re, jnp.roll(x, 1, axis=-1))
    return arrays


def _real(x):
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def _system(op, letters, results, options=None, **more):
    """Of systems; complex results have a replicated leading axis of real and imaginary part."""
    base = adapted(case(op, results, options, **letters, **more), _complex)
    call = base.call
    base.call = lambda arrays: tuple(map(_real, call(arrays)))
    return base


def _step(op, letters):
    def call(state, **arrays):
        state = jax.lax.complex(state, jnp.roll(state, 1, axis=-1))
        return op(state, **arrays)

    return _system(call, dict(state="BHN", u="BH") | letters, ("_BHN", "BH"))


def _loss(op, per_token, results, options):
    def call(hidden, head, targets, weights=None):
        given = (targets,) if weights is None else (targets, weights)
        out = op(hidden, head, *given, **options)
        return tuple(out[k] for k in sorted(out)) if isinstance(out, dict) else (out,)

    base = case(call, results, hidden="BTM", head="MV")
    targets = np.random.default_rng(0).integers(0, SIZES["V"], (B, T)).astype(np.int32)
    weights = (np.arange(B * T).reshape(B, T) % 3).astype(np.float32)
    given = dict(targets=targets, weights=weights)
    return adapted(
        base,
        arrays={name: given[name] for name in per_token},
        letters=dict.fromkeys(per_token, "BT"),
    )


def _any_loss(hidden, head, targets, weights, **options):
    def objective(logits, x):
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.sum(log_p * jax.nn.one_hot(x["targets"], logits.shape[-1]), -1)
        return -jnp.sum(picked * x["weights"]), jnp.sum(x["weights"])

    per_token = {"targets": targets, "weights": weights}
    loss, sums = cross_entropy.sum_over_chunks(objective, hidden, head, per_token, **options)
    return {"loss": loss, "weight": sums}


_CONV = dict(x="BTE", weight="WE")
_LONG = dict(u="BTE", kernel="KE")
_BOTH = ("targets", "weights")
_MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(3),
    "prefix": masks.Causal() | masks.Prefix(3),
    "lambda": masks.Lambda(2, 3),
    "blocks": masks.BlockSparse(np.tri(5, dtype=bool), 2),
}

# The first of each op is its representative in the quick table.
CASES: dict[str, dict[str, Case]] = {
    "attention": {
        "causal, segments": _attention(segments=True),
        "bias": _attention(bias="BHTS"),
        "bias of heads": _attention(bias="HTS"),
        **{name: _attention(mask) for name, mask in _MASKS.items()},
        **{f"{name}, segments": _attention(mask, True) for name, mask in _MASKS.items()},
    },
    "decode_attention": {
        "plain": _decode(),
        "segments, bias": _decode(True, bias="BHLS"),
    },
    "merge_partials": {
        "two": case(merge_partials, ("BTHP", "BTH"), o1="BTHP", lse1="BTH", o2="BTHP", lse2="BTH")
    },
    "ssd": {
        "plain": _ssd(),
        "all": packed(_ssd(D="H", dt_bias="H", initial_state="BHPN")),
        "ids of the state": packed(_ssd(initial_state="BHPN"), T + 1),
    },
    "gated_linear_attention": {
        "vectors": _linear(log_decay="BTHD", change=["log_decay"]),
        "no decay": _linear(),
        "all": packed(_linear(log_decay="BTH", change=["log_decay"], initial_state="BHDP")),
    },
    "delta_rule": {
        "plain": _linear(delta_rule, beta="BTH"),
        "all": packed(_linear(delta_rule, beta="BTH", initial_state="BHDP")),
    },
    "gated_delta_rule": {
        "plain": _linear(gated_delta_rule, ["log_decay"], beta="BTH", log_decay="BTH"),
        "all": packed(
            _linear(
                gated_delta_rule, ["log_decay"], beta="BTH", log_decay="BTH", initial_state="BHDP"
            )
        ),
    },
    "selective_scan": {
        "plain": _selective(),
        "all": packed(_selective(D="E", z="BTE", dt_bias="E", initial_state="BEN")),
        "groups": packed(_selective("G", initial_state="BEN"), T + 1),
    },
    "linear_recurrence": {
        "plain": case(linear_recurrence, ("BTE", "BE"), a="BTE", b="BTE"),
        "all": packed(
            case(linear_recurrence, ("BTEN", "BEN"), a="EN", b="BTEN", initial_state="BEN")
        ),
        "backwards": case(
            linear_recurrence, ("BTE", "BE"), dict(reverse=True), a="E", b="BTE"
        ),
    },
    "short_convolution": {
        "plain": case(short_convolution, ("BTE", "BWE"), **_CONV),
        "all": packed(
            adapted(
                case(short_convolution, ("BTE", "BWE"), dict(activation="silu"), **_CONV, bias="E"),
                arrays={"initial_state": normal("s", B, 2, E)},
                letters={"initial_state": "BWE"},
            )
        ),
    },
    "long_convolution": {
        "plain": case(long_convolution, ("BTE", "BKE"), dict(method="fft"), **_LONG),
        "direct": case(long_convolution, ("BTE", "BKE"), dict(method="direct"), **_LONG),
        "all": adapted(
            case(
                long_convolution, ("BTE", "BKE"), dict(method="matmul"), **_LONG,
                D="E", pre_gate="BTE", post_gate="BTE",
            ),
            arrays={"initial_state": normal("s", B, 4, E)},
            letters={"initial_state": "BKE"},
        ),
    },
    "diagonal_state_space": {
        "plain": _system(
            state_space.diagonal_state_space, _SYSTEM, ("BTH", "BHN"), dict(chunk=4), u="BTH"
        ),
        "state": adapted(
            _system(state_space.diagonal_state_space, _SYSTEM, ("BTHP", "BHPN"), u="BTHP"),
            arrays={"initial_state": normal("s", B, H, P, 2 * N)},
            letters={"initial_state": "BHPN"},
        ),
        "segments": packed(
            _system(
                state_space.diagonal_state_space, _SYSTEM, ("BTH", "BHN"), dict(chunk=4), u="BTH"
            )
        ),
    },
    "dplr_state_space": {
        "plain": _system(
            state_space.dplr_state_space, _DPLR, ("BTH", "BHN"), dict(chunk=4), u="BTH"
        ),
        "all": packed(
            adapted(
                _system(
                    state_space.dplr_state_space, _DPLR, ("BTH", "BHN"), dict(chunk=4), u="BTH"
                ),
                arrays={"initial_state": normal("s", B, H, 2 * N)},
                letters={"initial_state": "BHN"},
            ),
            T + 1,
        ),
        "one step": _system(
            lambda u, **system: state_space.dplr_state_space(u[:, :1], **system),
            _DPLR, ("BTH", "BHN"), u="BTH",
        ),
    },
    "dplr_kernel": {"plain": _system(state_space.dplr_kernel, _DPLR, ("LH",), dict(length=6))},
    "dense_kernel": {
        "plain": case(
            state_space.dense_kernel, ("LH",), dict(length=6), log_dt="H", A="HNN", B="HN", C="HN"
        )
    },
    "s4d_kernel": {
        "plain": _system(s4.s4d_kernel, _SYSTEM, ("LH",), dict(length=6)),
        "bilinear": _system(
            s4.s4d_kernel, _SYSTEM, ("LH",), dict(length=6, discretization="bilinear")
        ),
    },
    "s4d_step": {"plain": _step(s4.s4d_step, dict(Abar="HN", Bbar="HN", C="HN"))},
    "s4d_discretize": {
        "plain": _system(s4.s4d_discretize, dict(log_dt="H", A="HN", B="HN"), ("_HN", "_HN"))
    },
    "s4_dplr_kernel": {"plain": _system(s4.s4_dplr_kernel, _DPLR, ("LH",), dict(length=6))},
    "s4_dplr_step": {"plain": _step(s4.s4_dplr_step, _DPLR)},
    "dplr_truncate": {
        "plain": _system(
            s4.dplr_truncate, {k: v for k, v in _DPLR.items() if k != "B"}, ("_HN",), dict(length=6)
        )
    },
    "dplr_discretize": {
        "plain": _system(
            s4.dplr_discretize,
            {k: v for k, v in _DPLR.items() if k != "C"},
            ("_HNN", "_HN"),
        )
    },
    "chunked_cross_entropy": {
        "plain": _loss(cross_entropy.chunked_cross_entropy, _BOTH, ("",) * 6, dict(chunk=4)),
        "z loss": _loss(
            cross_entropy.chunked_cross_entropy,
            _BOTH,
            ("",) * 6,
            dict(chunk=T, z_loss=0.1, logit_cap=5.0),
        ),
    },
    "chunked_log_probabilities": {
        "plain": _loss(
            cross_entropy.chunked_log_probabilities, ("targets",), ("BT",), dict(chunk=4)
        )
    },
    "sum_over_chunks": {"plain": _loss(_any_loss, _BOTH, ("",) * 2, dict(chunk=4))},
}  # fmt: skip


def everything(case: Case, call: Callable, arrays):
    """(results, gradients of every floating array) of one loss that counts each result."""
    real = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {n: x for n, x in arrays.items() if n not in real}

    def loss(real):
        out = call(real | rest)
        parts = [jnp.sum(jnp.sin(x) * (i + 1)) for i, x in enumerate(out)]
        return functools.reduce(jnp.add, parts), out

    grads, out = jax.grad(loss, has_aux=True)(real)
    return out, grads
