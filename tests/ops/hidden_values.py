"""What a mask hides, whatever it holds, changes nothing: a check for every form of attention."""

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.ops import masks, reference

NOT_FINITE = (np.nan, np.inf, -np.inf)


def poisoned(x, rows, rng):
    """x [B, T, ...] with values that are not finite in half of the entries of bool rows [B, T]."""
    x = np.array(x, np.float32)
    entries = rng.random(x.shape) < 0.5
    entries.reshape(*rows.shape, -1)[..., 0] = True
    entries &= rows.reshape(rows.shape + (1,) * (x.ndim - 2))
    x[entries] = rng.choice(NOT_FINITE, entries.sum())
    return x


def assert_hidden(
    run, mask, shape, where, *, q_offset=None, tolerance=2e-6, dtype="float32", compiled=False
):
    """Asserts that what is not finite reaches exactly the rows and keys that see it.

    Args:
      run: (q, k, v, do, dlse) -> (o, lse, dq, dk, dv), or (o, lse) alone.
      shape: B, T, S, H, G, D.
      where: "keys", the first that are visible late in the sequence, or "queries", of which there
        are early ones; in both cases also what sees nothing and what nobody sees.
      compiled: whether run is compiled already, as where tests share a program.
    """
    B, T, S, H, G, D = shape
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    q, k, v, do = normal(B, T, H, D), normal(B, S, G, D), normal(B, S, G, D), normal(B, T, H, D)
    dlse = normal(B, T, H)
    visible = np.broadcast_to(np.asarray(masks.as_array(mask, T, S, q_offset)), (B, T, S))
    sees, seen = visible.any(2), visible.any(1)
    q_bad, k_bad, do_bad = ~sees, ~seen, ~sees
    if where == "keys":
        k_bad |= np.arange(S)[None] == [[int(0.7 * S) + b] for b in range(B)]
    else:
        q_bad |= np.arange(T)[None] == [[int(0.3 * T) + b] for b in range(B)]
        do_bad |= np.arange(T)[None] == [[int(0.4 * T) + b] for b in range(B)]
    row_bad = (q_bad & sees) | (visible & k_bad[:, None]).any(2)
    undefined = row_bad | (do_bad & sees)
    key_bad = (visible & undefined[:, :, None]).any(1)
    assert 0 < undefined.mean() < 0.9 and (where == "keys" or 0 < key_bad.mean() < 0.9)

    zero = lambda x, rows: np.where(rows.reshape(rows.shape + (1,) * (x.ndim - 2)), 0, x)
    clean = (
        zero(q, q_bad),
        zero(k, k_bad),
        zero(v, k_bad),
        zero(do, undefined),
        zero(dlse, undefined),
    )
    pairs = (q, q_bad), (k, k_bad), (v, k_bad), (do, do_bad), (dlse, do_bad)
    poison = (poisoned(x, rows, rng) for x, rows in pairs)
    types = (dtype,) * 4 + ("float32",)

    def results(arrays):
        arrays = (jnp.asarray(x, t) for x, t in zip(arrays, types, strict=True))
        return [np.asarray(x, np.float32) for x in run(*arrays)]

    run = run if compiled else jax.jit(run)
    want, got = results(clean), results(poison)
    bad = row_bad, row_bad, undefined, key_bad, key_bad
    for name, x, y, rows in zip(("o", "lse", "dq", "dk", "dv"), got, want, bad, strict=False):
        y = np.where(np.isneginf(y), -1e9, y)
        x = np.where(np.isneginf(x), -1e9, x)
        assert np.isfinite(y).all(), name
        scale = max(1.0, np.abs(y[y > -1e8]).max())
        np.testing.assert_allclose(x[~rows], y[~rows], rtol=0, atol=tolerance * scale, err_msg=name)
        broken = ~np.isfinite(x[rows])
        assert broken.reshape(len(broken), -1).any(1).all(), name


# What users write for "hidden"; of the bias's own dtype where that holds it.
HIDING = (-np.inf, np.finfo(np.float32).min, np.finfo(np.float32).min / 2, -2e30)


def assert_bias_hides(
    run, shape, *, tolerance=2e-6, dtype="float32", bias_dtype="float32", compiled=False
):
    """Asserts that a bias below -1e30 hides keys, and whole rows, as a mask does.

    Args:
      run: (q, k, v, bias [B, H, T, S], do, dlse) -> (o, lse, dq, dk, dv, dbias or None).
      shape: B, T, S, H, G, D.
      compiled: whether run is compiled already.
    """
    B, T, S, H, G, D = shape
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    q, k, v, do = normal(B, T, H, D), normal(B, S, G, D), normal(B, S, G, D), normal(B, T, H, D)
    dlse, bias = normal(B, T, H), normal(B, H, T, S)
    hidden = rng.random((B, H, T, S)) < 0.3
    hidden[:, :, 3:6] = hidden[:, 0, T - 1] = True  # whole rows
    bias = np.where(hidden, rng.choice(HIDING, hidden.shape), bias)
    types = (dtype,) * 3 + (bias_dtype, dtype, "float32")
    arrays = [jnp.asarray(x, t) for x, t in zip((q, k, v, bias, do, dlse), types, strict=True)]
    got = (run if compiled else jax.jit(run))(*arrays)
    q, k, v, bias, do, dlse = (np.asarray(x, np.float64) for x in arrays)
    dlse = np.where(hidden.all(3).swapaxes(1, 2), 0, dlse)
    want = reference.attention_and_gradients(
        q, k, v, do, dlse, bias=np.where(hidden, -np.inf, bias)
    )
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv", "dbias"), got, want, strict=True):
        if x is None:
            continue
        x = np.asarray(x, np.float64)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y), err_msg=name)
        x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        atol = tolerance * max(1.0, np.abs(y).max())
        rtol = 2**-8 if name == "dbias" and bias_dtype == "bfloat16" else 0
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)
    for x in (got[0], got[2]):
        assert not np.asarray(x)[:, 3:6].any()  # rows without keys: nothing, and no gradient
