"""Rotary positions, ALiBi, positions of packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilescan.models import positions as P


def rotate(x, position, **settings):
    return P.apply_rope(x, jnp.full(x.shape[:2], position), **settings)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_scores_depend_on_distance_alone(interleaved):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 16))
    score = lambda i, j: jnp.sum(
        rotate(q, i, interleaved=interleaved) * rotate(k, j, interleaved=interleaved), axis=-1
    )
    np.testing.assert_allclose(score(9, 2), score(107, 100), atol=1e-4)
    assert np.abs(score(9, 2) - score(9, 3)).max() > 1e-2
    np.testing.assert_allclose(rotate(q, 0), q)


def test_rope_is_the_complex_product():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 8))
    angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    ours = P.apply_rope(
        jnp.asarray(x, jnp.float32), jnp.arange(5)[None], theta=100.0, interleaved=True
    )
    np.testing.assert_allclose(ours[..., 0::2], turned.real, atol=1e-5)
    np.testing.assert_allclose(ours[..., 1::2], turned.imag, atol=1e-5)


def test_half_split_is_interleaved_with_channels_in_another_order():
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 12))
    at = jnp.tile(jnp.arange(7)[None], (2, 1))
    split = lambda a: jnp.concatenate([a[..., 0::2], a[..., 1::2]], axis=-1)
    half = P.apply_rope(split(x), at)
    np.testing.assert_allclose(half, split(P.apply_rope(x, at, interleaved=True)), atol=1e-6)


def test_scalings_of_the_frequencies():
    plain = P.rope_frequencies(64, 10000.0)
    linear = P.rope_frequencies(64, 10000.0, P.RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear, plain / 4)
    scaling = P.RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
    wavelength = 2 * np.pi / plain
    llama3 = P.rope_frequencies(64, 10000.0, scaling)
    np.testing.assert_allclose(llama3[wavelength < 128], plain[wavelength < 128])
    np.testing.assert_allclose(llama3[wavelength > 512], plain[wavelength > 512] / 8)
    assert (np.diff(llama3) < 0).all()


SCALINGS = [
    None,
    P.RopeScaling("linear", 8.0),
    P.RopeScaling("linear", 0.2),  # above one radian per position
    P.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    P.RopeScaling("per_frequency", factors=tuple(np.linspace(0.5, 9.0, 32))),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_exact_at_sixteen_million_and_beyond(scaling, interleaved):
    """A float32 product of position and frequency is off by 0.5 radians there."""
    ends = (64, 131_072, 10**7, 16_800_000, 2**27)
    positions = np.concatenate([[*range(end - 40, end), *range(-end, 2 - end)] for end in ends])
    x = np.random.default_rng(0).normal(size=(1, len(positions), 1, 64)).astype(np.float32)
    options = dict(theta=500000.0, scaling=scaling, interleaved=interleaved)
    rotate = jax.jit(lambda x, at: P.apply_rope(x, at, **options))
    got = rotate(x, jnp.asarray(positions)[None])
    frequencies = P.rope_frequencies(64, 500000.0, scaling)
    turn = np.exp(1j * positions.astype(np.longdouble)[:, None] * frequencies)[None, :, None]
    if interleaved:
        want = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        ours = got[..., 0::2] + 1j * got[..., 1::2]
    else:
        want = (x[..., :32] + 1j * x[..., 32:]) * turn
        ours = got[..., :32] + 1j * got[..., 32:]
    assert np.abs(np.asarray(ours) - want).max() < 5e-7 * np.abs(want).max()


def test_rope_of_counted_positions_is_exact_at_ten_million():
    """Positions as a state counts them, from 10^7 on; a score depends on the distance alone."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 64))

    @jax.jit
    def scores(start):
        at = P.token_positions(1, 5, start=start[None])
        keys = P.apply_rope(jnp.broadcast_to(k, (1, 5, 1, 64)), at)
        return jnp.sum(P.apply_rope(q, at[:, 4:]) * keys, axis=-1)

    want = scores(jnp.int32(0))
    for start in (10**6, 10**7, 2**31 - 6):
        np.testing.assert_allclose(scores(jnp.int32(start)), want, atol=2e-5)


def test_rope_takes_positions_of_every_integer_dtype():
    frequencies = P.rope_frequencies(16)
    want = P.rope_angles(jnp.asarray([[3, 100]], jnp.int32), frequencies)
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
        got = P.rope_angles(jnp.asarray([[3, 100]], dtype), frequencies)
        np.testing.assert_array_equal(got, want)
    beyond = P.rope_angles(jnp.asarray([[3, 2**31]], jnp.uint32), frequencies)
    np.testing.assert_array_equal(beyond[:, 0], want[:, 0])
    assert np.isnan(beyond[:, 1]).all()
    with jax.enable_x64(True):
        wide = P.rope_angles(jnp.asarray([[3, -(2**31) - 1]], jnp.int64), frequencies)
        np.testing.assert_array_equal(wide[:, 0], want[:, 0])
        assert wide.dtype == jnp.float32 and np.isnan(wide[:, 1]).all()
    with pytest.raises(TypeError, match="positions must be integers, got float32"):
        P.apply_rope(jnp.ones((1, 2, 1, 16)), jnp.ones((1, 2)))


def test_rope_of_float64_is_float64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 1, 1, 8), jnp.float64)
        got = P.apply_rope(x, jnp.asarray([[10**7]]), interleaved=True)
        turn = np.exp(1j * 1e7 * P.rope_frequencies(8)) * (1 + 1j)
        np.testing.assert_allclose(got[0, 0, 0, 0::2], turn.real, atol=1e-8)
        np.testing.assert_allclose(got[0, 0, 0, 1::2], turn.imag, atol=1e-8)


def test_alibi_distances_are_whole_beyond_what_float32_counts():
    got = P.alibi_bias(2, 2, 4, 2**24 + 1, causal=False)[0, :, :, 3]
    slopes = P.alibi_slopes(2)[:, None]
    np.testing.assert_array_equal(got, -slopes * np.float32([[2**24 - 2, 2**24 - 1]]))


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(P.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(P.alibi_slopes(16)[:2], [2**-0.5, 2**-1.0])
    twelve = P.alibi_slopes(12)
    np.testing.assert_allclose(twelve[:8], P.alibi_slopes(8))
    np.testing.assert_allclose(twelve[8:], P.alibi_slopes(16)[0:8:2])


def test_the_cheap_alibi_gives_the_same_softmax():
    T = 50
    cheap = P.alibi_bias(6, T, T, 0, causal=True)
    full = P.alibi_bias(6, T, T, 0, causal=False)
    assert cheap.shape == (1, 6, 1, T) and full.shape == (1, 6, T, T)
    logits = jax.random.normal(jax.random.key(0), (1, 6, T, T))
    past = jnp.tril(jnp.ones((1, 1, T, T), bool))
    a = jax.nn.softmax(jnp.where(past, logits + cheap, -jnp.inf))
    b = jax.nn.softmax(jnp.where(past, logits + full, -jnp.inf))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_positions_restart_with_segments_and_go_on_from_a_state():
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4]])
    np.testing.assert_array_equal(
        P.token_positions(2, 6, ids), [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    )
    start, last = jnp.asarray([5, 5]), jnp.asarray([1, 9])
    np.testing.assert_array_equal(
        P.token_positions(2, 6, ids, start, last), [[5, 6, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    )
    np.testing.assert_array_equal(P.token_positions(2, 3, start=start), [[5, 6, 7]] * 2)


def test_odd_heads_and_unknown_scalings_are_refused():
    with pytest.raises(ValueError, match="head_dim=5 is odd"):
        P.rope_frequencies(5)
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        P.RopeScaling("linear", 0)


def test_each_frequency_may_have_its_own_factor():
    plain = P.rope_frequencies(8)
    scaled = P.rope_frequencies(8, scaling=P.RopeScaling("per_frequency", factors=[1, 2, 4, 8]))
    np.testing.assert_allclose(scaled, plain / [1, 2, 4, 8], rtol=1e-15)
    both = P.RopeScaling("per_frequency", 3.0, factors=[1, 2, 4, 8])
    np.testing.assert_allclose(P.rope_frequencies(8, scaling=both), scaled / 3, rtol=1e-15)
    with pytest.raises(ValueError, match="factors are 4, but head_dim=6 has 3 frequencies"):
        P.rope_frequencies(6, scaling=both)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(factor=float("nan")), "factor must be positive, got nan"),
        (dict(factor=float("inf")), "factor must be positive, got inf"),
        (dict(kind="llama3", low_freq_factor=4.0), "high_freq_factor=4.0 must be .* above low"),
        (dict(kind="llama3", original_max_len=0), "original_max_len must be positive, got 0"),
        (dict(factors=(1.0,)), "kind='linear': 'per_frequency' needs them"),
        (dict(kind="per_frequency"), "factors=None with kind='per_frequency'"),
        (dict(kind="per_frequency", factors=(1.0, 0.0)), "factors must be positive, got 0.0"),
    ],
)
def test_scalings_that_would_give_no_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        P.RopeScaling(**fields)
