# %% [markdown]
# # Attention as tiles
#
# Attention compares every query with every key: a square of scores, as long and as wide as the
# sequence. That square is too large to store, and with a mask most of it is empty anyway.
#
# So divide it into **tiles**. A tile that the mask empties costs nothing. A tile that it fills needs
# no masking. Only the tiles on the edge need a closer look. And the softmax, which seems to need
# whole rows, can be put together tile by tile, exactly.
#
# This notebook draws the tiles, counts them, checks the arithmetic, and measures what they save.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from tilescan.ops import masks
from tilescan.ops.attention import attention, merge_partials
from tilescan.ops.masks import BlockSparse, Causal, Full, Lambda, Prefix, Segments, SlidingWindow

SMALL = os.environ.get("TILESCAN_NOTEBOOK_SIZE", "full") == "small"
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False})

# %% [markdown]
# ## Masks are values
#
# A mask says which query sees which key. It is a small value, not an array, and masks are put
# together with `&` and `|`:

# %%
T, tile = 64, 8
documents = np.repeat([1, 2, 3], [20, 12, 32])[None]
gallery = {
    "causal": Causal(),
    "sliding window": SlidingWindow(20),
    "both directions": SlidingWindow(12, 12),
    "prefix LM": Causal() | Prefix(20),
    "sinks + window": Lambda(4, 14),
    "butterfly": BlockSparse(masks.butterfly(8), 8),
    "causal butterfly": Causal() & BlockSparse(masks.butterfly(8), 8),
    "packed documents": Causal() & Segments(documents),
}
for name, mask in gallery.items():
    print(f"{name:17s} {mask}")

# %% [markdown]
# Each can be asked two things. By element, `mask(q, k)`: does this query see this key? By tile,
# `tile_kinds`: is this tile empty, partial or full? Below, both at once. Gray tiles are skipped,
# blue ones are computed without a mask, orange ones with it (dark where visible).

# %%
COLORS = ["#eeeeee", "white", "#fbdcb5", "#e8871e", "white", "#2f6fab"]  # 2 * kind + visible


def draw(axis, mask, T=T, tile=tile):
    image = masks.picture(mask, T, T, tile, tile)
    axis.imshow(image, cmap=ListedColormap(COLORS), vmin=0, vmax=5, interpolation="nearest")
    axis.set_xticks(np.arange(0, T + 1, tile) - 0.5, [])
    axis.set_yticks(np.arange(0, T + 1, tile) - 0.5, [])
    axis.grid(color="white", linewidth=1)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


figure, axes = plt.subplots(2, 4, figsize=(10, 6), layout="constrained")
for axis, (name, mask) in zip(axes.flat, gallery.items(), strict=True):
    kinds = masks.tile_kinds(mask, T, T, tile, tile)
    draw(axis, mask)
    axis.set_title(f"{name}: {masks.live_tiles(kinds)} of {kinds.size}")
axes[0, 0].set(ylabel="queries")
axes[1, 0].set(ylabel="queries", xlabel="keys")
legend = [Patch(color=COLORS[i], label=text) for i, text in
          ((0, "empty: skipped"), (3, "partial: masked"), (5, "full: no mask needed"))]
_ = figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)

# %% [markdown]
# The picture is a promise, so let us check it: no visible score lies in a gray tile, and no
# hidden one in a blue tile.

# %%
for mask in gallery.values():
    seen = masks.as_array(mask, T, T).reshape(-1, T, T)[0]
    kinds = masks.tile_kinds(mask, T, T, tile, tile)[0]
    by_tile = seen.reshape(T // tile, tile, T // tile, tile).swapaxes(1, 2)
    assert not by_tile[kinds == masks.EMPTY].any() and by_tile[kinds == masks.FULL].all()

# %% [markdown]
# ## Counting tiles is counting work
#
# The time of attention is the number of live tiles times the time of one. Nothing has to run to
# know it: here are tiles of 512 up to a million tokens.

# %%
lengths = 2 ** np.arange(11, 18 if SMALL else 21)
patterns = {
    "full": lambda n: Full(),
    "causal": lambda n: Causal(),
    "butterfly": lambda n: BlockSparse(masks.butterfly(n // 512), 512),
    "window of 4096": lambda n: SlidingWindow(4095),
}
live = {name: [masks.live_tiles(masks.tile_kinds(make(int(n)), int(n), int(n), 512, 512))
               for n in lengths] for name, make in patterns.items()}
for name, counts in live.items():
    plt.loglog(lengths, counts, "o-", base=2, label=name)
plt.gca().set(xlabel="tokens", ylabel="live tiles of 512 x 512")
plt.legend(frameon=False)

n = int(lengths[-1] // 512)
assert live["full"][-1] == n**2
assert live["causal"][-1] == n * (n + 1) // 2
assert live["butterfly"][-1] == n * (1 + np.log2(n))
assert live["window of 4096"][-1] == sum(min(i, 8) + 1 for i in range(n))
print(f"at {lengths[-1]} tokens:", {name: int(counts[-1]) for name, counts in live.items()})

# %% [markdown]
# Full and causal grow with the square of the length, the window in proportion to it, the
# butterfly a little faster.
#
# ## A softmax in pieces
#
# A softmax needs the sum over a whole row, and a tile has only a part of the row. The
# solution: keep, for each part, its output `o` and the logarithm of its sum, `lse`. Two parts then
# merge:
#
# $$ \mathrm{lse} = \log(e^{\mathrm{lse}_1} + e^{\mathrm{lse}_2}), \qquad
#    o = e^{\mathrm{lse}_1 - \mathrm{lse}}\, o_1 + e^{\mathrm{lse}_2 - \mathrm{lse}}\, o_2 . $$
#
# An example that one can do by hand: three keys with the scores ln 1, ln 2 and ln 5 and the
# values 1, 2 and 4. The weights are 1/8, 2/8 and 5/8, so the output is 25/8.

# %%
def by_hand(scores, values):
    return np.exp(scores) @ values / np.exp(scores).sum(), np.log(np.exp(scores).sum())


scores, values = np.log([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 4.0])
for split in (1, 2):
    o1, lse1 = by_hand(scores[:split], values[:split])
    o2, lse2 = by_hand(scores[split:], values[split:])
    o, lse = merge_partials(jnp.array([o1]), jnp.array(lse1), jnp.array([o2]), jnp.array(lse2))
    print(f"{split} + {3 - split} keys: o = {o[0]:.6f}, lse = {lse:.6f}")
    assert np.isclose(o[0], 25 / 8) and np.isclose(lse, np.log(8))

# %% [markdown]
# The whole algorithm in a dozen lines of numpy: for each tile of queries, walk along its live
# tiles of keys, and keep a running maximum, sum and output. This is FlashAttention.

# %%
def tiled_attention(q, k, v, mask, tile):
    T, D = q.shape
    o = np.zeros_like(v)
    kinds = masks.tile_kinds(mask, T, T, tile, tile)[0]
    for i in range(0, T, tile):
        top, total, rows = -np.inf, np.zeros(tile), np.arange(i, i + tile)[:, None]
        for j in np.flatnonzero(kinds[i // tile]) * tile:  # empty tiles: not even looked at
            s = q[i:i + tile] @ k[j:j + tile].T * D**-0.5
            if kinds[i // tile, j // tile] == masks.PARTIAL:  # full tiles: nothing to hide
                s = np.where(mask(rows, np.arange(j, j + tile)[None]), s, -1e30)
            new_top = np.maximum(top, s.max(axis=1))
            p, shrink = np.exp(s - new_top[:, None]), np.exp(top - new_top)
            o[i:i + tile] = o[i:i + tile] * shrink[:, None] + p @ v[j:j + tile]
            total, top = total * shrink + p.sum(axis=1), new_top
        o[i:i + tile] /= total[:, None]
    return o


rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, T, 16))
for mask in (Causal(), SlidingWindow(20), Causal() | Prefix(20), Lambda(4, 14)):
    s = np.where(masks.as_array(mask, T, T), q @ k.T / 4, -np.inf)
    dense = np.exp(s - s.max(axis=1, keepdims=True))
    dense = dense / dense.sum(axis=1, keepdims=True) @ v
    assert np.allclose(tiled_attention(q, k, v, mask, tile), dense, atol=1e-12)

# %% [markdown]
# ## The real one
#
# `ops.attention` is that algorithm with gradients, batches, heads, any lengths, and kernels for
# TPU and GPU. It takes `[batch, time, heads, head_dim]` and a mask. What it promises can be said
# in identities. Tiled equals dense:

# %%
def random_qkv(T, heads=4, D=64, seed=0):
    return jax.random.normal(jax.random.key(seed), (3, 1, T, heads, D))


def close(a, b, error=1e-5):
    return float(jnp.abs(a - b).max()) < error * float(jnp.abs(b).max())


q, k, v = random_qkv(300)
tiled = attention(q, k, v, mask=Causal())
assert close(tiled, jax.nn.dot_product_attention(q, k, v, is_causal=True))

# %% [markdown]
# So do gradients, of which no tile was stored either (they are computed again from `lse`):

# %%
def gradient(f):
    return jnp.stack(jax.grad(lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v))), (0, 1, 2))(q, k, v))


assert close(gradient(lambda q, k, v: attention(q, k, v, mask=Causal())),
             gradient(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)))

# %% [markdown]
# The keys may lie in two places, say on two devices: each attends to its own half, and the two
# answers merge. (This is all that ring attention is.)

# %%
o1, lse1 = attention(q, k[:, :170], v[:, :170], mask=Causal(), q_offset=0, return_lse=True)
o2, lse2 = attention(q, k[:, 170:], v[:, 170:], mask=Causal(), q_offset=-170, return_lse=True)
merged, _ = merge_partials(o1, lse1, o2, lse2)
assert close(merged, tiled)
assert jnp.isneginf(lse2[:, :170]).all() and (o2[:, :170] == 0).all()  # saw no key: no NaN, zero

# %% [markdown]
# One new query against all keys so far, as in decoding, is the last row of the whole:

# %%
assert close(attention(q[:, -1:], k, v, mask=Causal()), tiled[:, -1:])

# %% [markdown]
# And documents packed into one row are as good as alone:

# %%
ids = jnp.repeat(jnp.array([1, 2, 3]), jnp.array([100, 30, 170]))[None]
packed = attention(q, k, v, mask=Causal() & Segments(ids))
for start, end in ((0, 100), (100, 130), (130, 300)):
    alone = attention(q[:, start:end], k[:, start:end], v[:, start:end], mask=Causal())
    assert close(packed[:, start:end], alone)

# %% [markdown]
# ## What it saves
#
# Time first: tiles against `jax.nn.dot_product_attention`, which computes the whole square.
# One sequence, 4 heads of 64, float32, on the machine that ran this notebook.

# %%
def dense(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def causal(q, k, v):
    return attention(q, k, v, mask=Causal())


def window(q, k, v):
    return attention(q, k, v, mask=SlidingWindow(511))


CURVES = {"dense, causal": dense, "tiles, causal": causal, "tiles, window of 512": window}
LENGTHS = [256, 512, 1024] if SMALL else [512, 1024, 2048, 4096, 8192, 16384]
LONGEST_DENSE = LENGTHS[-1] if SMALL else 4096  # beyond, the square takes gigabytes


def milliseconds(f, T, repeats=3 if SMALL else 5):
    run, arguments = jax.jit(f), random_qkv(T)
    run(*arguments).block_until_ready()  # the first call compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*arguments).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * np.median(times)


def fits(name, T):
    return T <= LONGEST_DENSE or not name.startswith("dense")


elapsed = {name: [milliseconds(f, T) for T in LENGTHS if fits(name, T)]
           for name, f in CURVES.items()}


def plot(results, ylabel):
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for (name, numbers), marker in zip(results.items(), "os^", strict=True):
        axis.loglog(LENGTHS[:len(numbers)], numbers, marker + "-", label=name)
    axis.set_xticks(LENGTHS, LENGTHS)
    axis.minorticks_off()
    axis.set(xlabel="tokens", ylabel=ylabel)
    axis.legend(frameon=False)


plot(elapsed, "forward, ms")
print("tokens:", *LENGTHS)
for name, numbers in elapsed.items():
    print(f"{name:21s}", ", ".join(f"{t:.3g}" for t in numbers), "ms")

# %% [markdown]
# Then memory. XLA says how much a compiled program needs beside its inputs and outputs, without
# running it, so the dense square can be judged at any length. Forward and backward:

# %%
def mebibytes(f, T):
    gradient = jax.grad(lambda *qkv: jnp.sum(f(*qkv)), (0, 1, 2))
    shape = jax.ShapeDtypeStruct((1, T, 4, 64), jnp.float32)
    compiled = jax.jit(gradient).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


memory = {name: [mebibytes(f, T) for T in LENGTHS] for name, f in CURVES.items()}
plot(memory, "temporary memory, forward and backward, MiB")
for name, numbers in memory.items():
    print(f"{name:21s}", ", ".join(f"{m:.3g}" for m in numbers), "MiB")

assert memory["tiles, causal"][-1] < memory["dense, causal"][-1]
if not SMALL:  # there are many tiles; twice the length: four times the square, twice the tiles
    assert memory["tiles, causal"][-1] < memory["dense, causal"][-1] / 4
    doubling = {name: numbers[-1] / numbers[-2] for name, numbers in memory.items()}
    assert doubling["dense, causal"] > 3.5 and doubling["tiles, causal"] < 2.5

# %% [markdown]
# The square's memory grows with the square of the length, that of tiles in proportion to it (on
# top of a few MiB for the tiles at work). The window's time grows in proportion as well.
#
# From here: `ops/masks.py` is the whole algebra of masks, and a new pattern is a new mask.
# `tests/ops/test_masks.py` checks each tile against each element.
