"""What must hold for every token mixer, whatever is inside it.

A mixer maps x [B, T, E] to y [B, T, E] and carries a state from one piece of a sequence to the
next. `Mixer` wraps one for the checks; for a Linen module it is one line, `linen(name, module)`.
A check takes a mixer and raises AssertionError. `INVARIANTS` lists them all; `test_mixers.py`
applies them to the mixers of the project, and `test_suite.py` shows that each of them can fail.

Dimensions: B batch, T time, E width.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 2
# The checks have few lengths, since each is compiled; they divide no chunk.
LENGTHS = (1, 2, 50, 100)
SPLITS = ((1, 50), (50, 50), (50, 1))  # of the first of 100 tokens
DOCUMENTS = (50, 1, 2, 40)  # packed into one row, with 7 tokens of padding at its end
F32_ERROR = 1e-5  # relative RMS of two methods to compute the same in float32


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A mixer as the checks see it.

    Attributes:
      name: shown in test ids.
      apply: (params, x, *, state, positions, segment_ids) -> (y, state), computing in x's dtype;
        state None: the whole sequence at once, and None comes back.
      init_state: (batch, max_len, dtype) -> the state before the first token.
      init: key -> params, float32.
      width: E.
      causal: whether y_t depends on the past alone; else the checks with states are left out.
      reach: how many of the latest tokens y_t depends on, itself included; None: all.
      bf16_error: bound of the relative RMS error of y in bfloat16 (2^-8 is one rounding); four
        times as much is granted to gradients.
      token_error: bound of the relative RMS error of the gradient of a document of one token.
      leak: what rounding may leave of the largest gradient past t: 0, but for Fourier transforms.
    """

    name: str
    apply: Callable[..., tuple[jax.Array, Any]]
    init_state: Callable[[int, int, Any], Any]
    init: Callable[[jax.Array], Any]
    width: int = 32
    causal: bool = True
    reach: int | None = None
    bf16_error: float = 4 * 2**-8
    token_error: float = F32_ERROR
    leak: float = 0.0

    def __repr__(self):
        return self.name

    @functools.cached_property
    def params(self):
        return jax.jit(self.init)(jax.random.key(zlib.crc32(self.name.encode())))

    @functools.cached_property
    def run(self):
        """`apply` under jit."""
        return jax.jit(self._apply)

    @functools.cached_property
    def differentiate(self):
        """`y_and_gradients` under jit. The checks share it, to compile once per length."""
        return jax.jit(self.y_and_gradients)

    def y_and_gradients(self, params, x, weights, segment_ids=None, positions=None):
        """y, and the gradients of sum(y * weights) with respect to (params, x)."""

        def loss(params, x):
            y, state = self._apply(params, x, segment_ids=segment_ids, positions=positions)
            assert state is None, "without a state, a mixer must return None for it"
            return jnp.sum(y.astype(jnp.float32) * weights.astype(jnp.float32)), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, gradients

    def _apply(self, params, x, state=None, positions=None, segment_ids=None):
        return self.apply(params, x, state=state, positions=positions, segment_ids=segment_ids)

    def inputs(self, length: int, seed: int = 0) -> np.ndarray:
        """Normal x [B, length, E]; a shorter one is the beginning of a longer one."""
        rng = np.random.default_rng(seed)
        return rng.standard_normal((length, BATCH, self.width), np.float32).swapaxes(0, 1)


def linen(name: str, module, **settings) -> Mixer:
    """A Linen mixer: `__call__(x, *, state, positions, segment_ids)`, `init_state`, `dtype`."""
    width = settings.setdefault("width", Mixer.width)

    def apply(params, x, **options):
        return module.clone(dtype=x.dtype).apply(params, x, **options)

    def init(key):
        params = module.init(key, jnp.zeros((BATCH, 4, width)))
        return jax.tree.map(jnp.asarray, unboxed(params))

    def init_state(batch, max_len, dtype):
        return module.clone(dtype=dtype).init_state(batch, max_len)

    return Mixer(name, apply, init_state, init, **settings)


def unboxed(params):
    """Parameters without the boxes that carry their logical axis names."""
    from flax.core import meta

    return meta.unbox(params)


# --- comparing --------------------------------------------------------------------------------


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def assert_close(actual, expected, what: str, bound: float = F32_ERROR):
    """Trees agree leaf by leaf, by RMS of the difference over RMS of what is expected.

    A leaf much smaller than the largest one is measured against a tenth of that: gradients
    that cancel to zero (of the keys of a single token) are zero up to the others' rounding.
    """
    actual, expected = (jax.tree.leaves_with_path(x) for x in (actual, expected))
    assert len(actual) == len(expected)
    least = max(0.1 * max(rms(e) for _, e in expected), 1e-30)
    for (path, a), (_, e) in zip(actual, expected, strict=True):
        where = what + jax.tree_util.keystr(path)
        assert a.shape == e.shape, f"{where}: shape {a.shape} for {e.shape}"
        error = rms(np.asarray(a, np.float64) - np.asarray(e, np.float64)) / max(rms(e), least)
        assert error <= bound, f"{where}: relative error {error:.2e} > {bound:.2e}"


def assert_finite(tree, what: str):
    for path, leaf in jax.tree.leaves_with_path(tree):
        bad = int(np.sum(~np.isfinite(np.asarray(leaf, np.float32))))
        assert bad == 0, f"{what}{jax.tree_util.keystr(path)}: {bad} of {leaf.size} not finite"


# --- the invariants ---------------------------------------------------------------------------


def run_in_pieces(mixer, params, x, pieces, segment_ids=None, positions=None):
    """ys of consecutive pieces, each from the state that the one before left."""
    state = mixer.init_state(x.shape[0], x.shape[1], x.dtype)
    ys, start = [], 0
    for length in pieces:
        piece = lambda a, s=np.s_[:, start : start + length]: None if a is None else a[s]
        y, state = mixer.run(
            params,
            piece(x),
            state=state,
            positions=piece(positions),
            segment_ids=piece(segment_ids),
        )
        ys.append(y)
        start += length
    return ys


def joined(*arguments):
    """y of `run_in_pieces` with these arguments, outside of a trace."""
    return np.concatenate(run_in_pieces(*arguments), axis=1)


def split_equals_whole(mixer: Mixer):
    """Stretches with a carried state give the numbers of the whole sequence."""
    x = mixer.inputs(100)
    whole = np.asarray(mixer.differentiate(mixer.params, x, x)[0])
    for pieces in SPLITS:
        y = joined(mixer, mixer.params, x, pieces)
        assert_close(y, whole[:, : sum(pieces)], f"split {pieces}: y")


def split_gradient_equals_whole(mixer: Mixer):
    """So do gradients through the carried state (truncated or chunked training)."""
    x, weights = mixer.inputs(100), mixer.inputs(100, seed=1)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        y = jnp.concatenate(run_in_pieces(mixer, params, x, (50, 50)), axis=1)
        return jnp.sum(y * weights)

    actual = gradients(mixer.params, x)
    _, expected = mixer.differentiate(mixer.params, x, weights)
    assert_close(actual, expected, "split (50, 50): gradient")


def step_equals_parallel(mixer: Mixer):
    """Token by token, as in decoding, equals all at once; also after a longer prompt."""
    x = mixer.inputs(100)
    whole = np.asarray(mixer.differentiate(mixer.params, x, x)[0])
    y = joined(mixer, mixer.params, x, (1,) * 24)
    assert_close(y, whole[:, :24], "24 steps: y")
    y = joined(mixer, mixer.params, x, (50,) + (1,) * 7)
    assert_close(y, whole[:, :57], "a prompt of 50 tokens and 7 steps: y")


ORDERS = tuple(enumerate((DOCUMENTS, DOCUMENTS[::-1])))  # of the documents in each row


def packed_row():
    """segment_ids and positions [B, 100] of DOCUMENTS, in reverse in the second row."""
    ids, positions = [], []
    for _, lengths in ORDERS:
        lengths = (*lengths, 100 - sum(lengths))
        ids.append(np.repeat([*range(1, len(lengths)), 0], lengths))
        positions.append(np.concatenate([np.arange(n) for n in lengths]))
    return np.stack(ids).astype(np.int32), np.stack(positions).astype(np.int32)


def packed_equals_separate(mixer: Mixer):
    """Documents packed into one row don't see each other: values and gradients."""
    x, weights = mixer.inputs(100), mixer.inputs(100, seed=1)
    ids, positions = packed_row()
    y, (_, dx) = mixer.differentiate(mixer.params, x, weights, ids, positions)
    y, dx = np.asarray(y), np.asarray(dx)
    for length in DOCUMENTS:
        places = [np.flatnonzero(ids[row] == 1 + order.index(length)) for row, order in ORDERS]
        at = np.arange(BATCH)[:, None], np.stack(places)
        # As the beginning of a length that other checks compile, which the end does not change.
        size = next(n for n in LENGTHS if n >= length) if mixer.causal else length
        beginning = lambda a: np.pad(a[at], ((0, 0), (0, size - length), (0, 0)))  # noqa: B023
        alone, (_, dx_alone) = mixer.differentiate(mixer.params, beginning(x), beginning(weights))
        what = f"packed document of length {length}"
        assert_close(y[at], np.asarray(alone)[:, :length], f"{what}: y")
        bound = F32_ERROR if length > 1 else mixer.token_error
        assert_close(dx[at], np.asarray(dx_alone)[:, :length], f"{what}: gradient of x", bound)


def packed_split_equals_whole(mixer: Mixer):
    """A packed row may be split anywhere, within a document or between two."""
    x = mixer.inputs(100)
    ids, positions = packed_row()
    whole, _ = mixer.run(mixer.params, x, segment_ids=ids, positions=positions)
    real = np.asarray(ids > 0)[..., None]
    pieces = 50, 50  # between two in one row, within one in the other
    y = joined(mixer, mixer.params, x, pieces, ids, positions)
    assert_close(y * real, np.asarray(whole) * real, f"packed row, split {pieces}: y")


def causal_by_gradient(mixer: Mixer):
    """The gradient of y_t is zero past t, exactly but for `leak`, and nowhere up to t in reach."""
    x, weights = mixer.inputs(50), mixer.inputs(50, seed=1)
    for t in (0, 31, 49):
        at_t = weights * (np.arange(50) == t)[None, :, None]
        _, (_, dx) = mixer.differentiate(mixer.params, x, at_t)
        used = np.abs(np.asarray(dx)).max(axis=-1)
        first = 0 if mixer.reach is None else max(0, t + 1 - mixer.reach)
        future = used[:, t + 1 :]
        assert np.all(future <= mixer.leak * used.max()), f"y at {t} depends on the future"
        assert np.all(used[:, :first] == 0), f"y at {t} depends on tokens beyond the reach"
        assert np.all(used[:, first : t + 1] > 0), f"y at {t} doesn't depend on all of its past"


def deterministic(mixer: Mixer):
    """A second run gives the same bits, a second compilation too."""
    arguments = mixer.params, mixer.inputs(50), mixer.inputs(50, seed=1)
    expected = jax.tree.leaves(jax.tree.map(np.asarray, mixer.differentiate(*arguments)))
    # A function and an option of its own, of dumps that nobody asks for: JAX keeps what it traced
    # by the function, and the suite what it compiled by program and options.
    options = {"xla_dump_max_hlo_modules": 1}
    again = jax.jit(lambda *a: mixer.y_and_gradients(*a), compiler_options=options)
    for what, run in (("run", mixer.differentiate), ("compilation", again)):
        for a, e in zip(jax.tree.leaves(run(*arguments)), expected, strict=True):
            assert np.array_equal(a, e), f"a second {what} gave other bits"


def cast(tree, dtype):
    return jax.tree.map(lambda a: np.asarray(a).astype(dtype), tree)


def bf16_close_to_float32(mixer: Mixer):
    """bfloat16 errs by few roundings: y and gradients against float32 of the same numbers."""
    numbers = mixer.params, mixer.inputs(100), mixer.inputs(100, seed=1)
    params, x, weights = cast(numbers, jnp.bfloat16)
    wide = cast((params, x, weights), jnp.float32)
    y, gradients = mixer.differentiate(params, x, weights)
    y_wide, gradients_wide = mixer.differentiate(*wide)
    assert y.dtype == jnp.bfloat16, f"y is {y.dtype} for x in bfloat16"
    assert_close(y, y_wide, "bfloat16: y", mixer.bf16_error)
    assert_close(gradients, gradients_wide, "bfloat16: gradient", 4 * mixer.bf16_error)


def finite_at_extremes(mixer: Mixer):
    """Huge, tiny and constant inputs give finite values and gradients."""
    x, weights = mixer.inputs(100), mixer.inputs(100, seed=1)
    spike = np.array(x)
    spike[:, 31] *= 1e4
    for what, extreme in (
        ("1e4 * normal", 1e4 * x),
        ("1e-30 * normal", 1e-30 * x),
        ("zeros", 0 * x),
        ("all 1e4", np.full_like(x, 1e4)),
        ("one spike of 1e4", spike),
    ):
        for dtype in (jnp.float32, jnp.bfloat16):
            numbers = cast((mixer.params, extreme, weights), dtype)
            y, gradients = mixer.differentiate(*numbers)
            assert_finite(y, f"{what} in {dtype.__name__}: y")
            assert_finite(gradients, f"{what} in {dtype.__name__}: gradient")


def any_length(mixer: Mixer):
    """Lengths that divide nothing: a causal mixer gives what it gives within a longer sequence."""
    longest, all_weights = mixer.inputs(LENGTHS[-1]), mixer.inputs(LENGTHS[-1], seed=1)
    for length in LENGTHS:
        x, weights = longest[:, :length], all_weights[:, :length]
        y, gradients = mixer.differentiate(mixer.params, x, weights)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_finite((y, gradients), f"length {length}")
        if mixer.causal:
            kept = all_weights * (np.arange(LENGTHS[-1]) < length)[None, :, None]
            whole, (dparams, dx) = mixer.differentiate(mixer.params, longest, kept)
            whole, dx = (np.asarray(a)[:, :length] for a in (whole, dx))
            assert_close(y, whole, f"length {length}: y")
            assert_close(gradients, (dparams, dx), f"length {length}: gradient")


WITH_STATE = (
    split_equals_whole,
    split_gradient_equals_whole,
    step_equals_parallel,
    packed_split_equals_whole,
    causal_by_gradient,
)
WITHOUT_STATE = (
    packed_equals_separate,
    deterministic,
    bf16_close_to_float32,
    finite_at_extremes,
    any_length,
)
INVARIANTS = WITH_STATE + WITHOUT_STATE


def cases(mixers):
    """(mixer, invariant) for each mixer and each invariant that applies to it."""
    return [(m, check) for m in mixers for check in (INVARIANTS if m.causal else WITHOUT_STATE)]
