# %% [markdown]
# # Attention as tiles
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# Attention compares $T$ queries with $S$ keys. With $Q \in \mathbb{R}^{T \times D}$ and
# $K, V \in \mathbb{R}^{S \times D}$,
#
# $$ O = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt D} + M\right) V, \qquad
#    M_{ij} = \begin{cases} 0 & \text{if query } i \text{ sees key } j \\ -\infty & \text{if not.} \end{cases} $$
#
# Written like this, it needs a matrix of $T \times S$ scores. At 131,072 tokens that is 64 GiB in
# float32, for one head of one sequence. And with a mask much of it is $-\infty$ anyway.
#
# FlashAttention ([arXiv 2205.14135](https://arxiv.org/abs/2205.14135)) computes the same $O$, exactly,
# without ever holding that matrix. This notebook builds it from three ideas, each in a few lines of
# NumPy, and compares each with the library:
#
# 1. divide the scores into **tiles**, and let the mask say which of them need any work;
# 2. put the **softmax** together tile by tile;
# 3. in the backward pass, **compute again** what was not stored.
#
# Then it counts what they save. The last part is yours: a text and a mask that you write.
#
# To run it: `pip install -e .[notebooks]` in a checkout, then `jupyter lab notebooks`. On Colab,
# the badge opens a dialog: paste the address of this repository, choose this notebook, and write
# the same address into the next cell. It takes a minute or two on a CPU.

# %%
import sys

REPOSITORY = ""  # needed on Colab alone: https://github.com/...
if "google.colab" in sys.modules:
    assert REPOSITORY, "write the address of the repository that this notebook is from above"
    get_ipython().run_line_magic("pip", f"install --quiet git+{REPOSITORY}")

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from tilescan.experiments.harness.notebook_style import COLORS, use_notebook_style
from tilescan.ops import masks
from tilescan.ops.attention import attention, merge_partials
from tilescan.ops.masks import BlockSparse, Causal, Full, Lambda, Prefix, Segments, SlidingWindow

use_notebook_style()
SMALL = os.environ.get("TILESCAN_NOTEBOOK_SIZE") == "small"  # how the tests run this notebook

# %% [markdown]
# ## Part 1: a mask decides which tiles need work
#
# In a language model a query sees its own position and those before it: the mask is *causal*,
# $j \le i$. Divide the scores into tiles of 8 by 8. Then there are three kinds of tile:
#
# - **empty**: no query of the tile sees any of its keys, and nothing has to be computed;
# - **full**: each query sees each key, and no mask has to be applied;
# - **partial**: only here does the mask have to be looked at, element by element.
#
# To sort the tiles of any mask, look at all elements:

# %%
EMPTY, PARTIAL, FULL = 0, 1, 2


def kinds_by_element(seen, tile):
    """The kind of each tile of a mask, bool [T, T]."""
    n = len(seen) // tile
    tiles = seen.reshape(n, tile, n, tile).swapaxes(1, 2)  # [row, column, query, key]
    return tiles.any((2, 3)).astype(int) + tiles.all((2, 3))


T, tile = 64, 8
query, key = np.arange(T)[:, None], np.arange(T)[None, :]
print(kinds_by_element(key <= query, tile))

# %% [markdown]
# But that looks at $T^2$ elements, which is the cost that we want to avoid. For a causal mask it is
# enough to look at the corners of a tile: *some* element is visible if the tile's first key is not
# after its last query, and *all* are visible if its last key is not after its first query.

# %%
def causal_kinds(T, tile):
    first = np.arange(0, T, tile)
    last = first + tile - 1
    return (first[None] <= last[:, None]).astype(int) + (last[None] <= first[:, None])


assert (causal_kinds(T, tile) == kinds_by_element(key <= query, tile)).all()

# %% [markdown]
# `ops.masks` does the same for a whole algebra of masks. A mask is a small *value*, not an array:
# it says what a query sees (`mask(q, k)`), it knows the kinds of its tiles from their corners
# (`tile_kinds`), and masks combine with `&` (both allow it) and `|` (either does).

# %%
documents = np.repeat([1, 2, 3], [20, 12, 32])[None]  # three texts packed into one row
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
    seen = masks.as_array(mask, T, T).reshape(T, T)
    kinds = masks.tile_kinds(mask, T, T, tile, tile)[0]
    certain = kinds != PARTIAL  # "partial" may be said of a tile that is not, never the reverse
    assert (kinds == kinds_by_element(seen, tile))[certain].all()
    print(f"{name:17s} {mask}")

# %% [markdown]
# Below are all eight of them. Dark cells are scores that a query sees. The background is the tile's
# kind, and the number is how many of the 64 tiles are left to compute.

# %%
# Colors of 2 * kind + visible: empty tiles, partial tiles (hidden, visible), full tiles.
PALETTE = ["#eeeeee", "white", "#fbe3c4", COLORS[1], "white", COLORS[0]]


def draw(axis, mask, T, tile):
    image = masks.picture(mask, T, T, tile, tile)
    axis.imshow(image, cmap=ListedColormap(PALETTE), vmin=0, vmax=5)
    axis.set_xticks(np.arange(0, T + 1, tile) - 0.5, [])
    axis.set_yticks(np.arange(0, T + 1, tile) - 0.5, [])
    axis.grid(color="white", linewidth=1.2)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def legend_of_kinds(figure):
    kinds = (0, "empty: skipped"), (3, "partial: masked"), (5, "full: no mask needed")
    patches = [Patch(color=PALETTE[color], label=text) for color, text in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)


figure, axes = plt.subplots(2, 4, figsize=(11, 6))
for axis, (name, mask) in zip(axes.flat, gallery.items(), strict=True):
    draw(axis, mask, T, tile)
    axis.set_title(f"{name}: {masks.live_tiles(masks.tile_kinds(mask, T, T, tile, tile))}")
axes[0, 0].set(ylabel="queries")
axes[1, 0].set(ylabel="queries", xlabel="keys")
legend_of_kinds(figure)

# %% [markdown]
# The number of tiles is a forecast of the time, and nothing has to run to know it. Here it is for
# tiles of 512 by 512 at up to a million tokens. With $n = T / 512$:
#
# | mask | tiles | grows as |
# | --- | --- | --- |
# | full | $n^2$ | $T^2$ |
# | causal | $n (n + 1) / 2$ | $T^2$ |
# | butterfly | $n (1 + \log_2 n)$ | $T \log T$ |
# | window of 1,024 | about $3 n$ | $T$ |

# %%
lengths = 2 ** np.arange(14, 18 if SMALL else 21)
patterns = {
    "full": lambda n: Full(),
    "causal": lambda n: Causal(),
    "butterfly": lambda n: BlockSparse(masks.butterfly(n), 512),
    "window of 1,024": lambda n: SlidingWindow(1023),
}
figure, axis = plt.subplots()
live = {}
for name, pattern in patterns.items():
    live[name] = [int(masks.live_tiles(masks.tile_kinds(pattern(T // 512), T, T, 512, 512)))
                  for T in map(int, lengths)]
    (line,) = axis.loglog(lengths, live[name], base=2)
    axis.annotate(name, (lengths[-1], live[name][-1]), (10, 0), textcoords="offset points",
                  va="center", color=line.get_color())
axis.set(xlabel="tokens", ylabel="tiles to compute")
axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])

n = int(lengths[-1]) // 512
assert live["full"][-1] == n**2 and live["causal"][-1] == n * (n + 1) // 2
assert live["butterfly"][-1] == n * (1 + np.log2(n))
assert live["window of 1,024"][-1] == 3 * n - 3  # all but the first two rows of tiles have 3
print(f"at {lengths[-1]:,} tokens:", {name: counts[-1] for name, counts in live.items()})

# %% [markdown]
# ## Part 2: a softmax in pieces
#
# Skipping tiles is the easy half. The hard one: a softmax divides by a sum over a *whole row* of
# scores, and a tile has only a piece of that row.
#
# So keep two things for each piece $p$ of the keys: its own output $o_p$, normalized by its own sum,
# and the logarithm of that sum,
#
# $$ \mathrm{lse}_p = \log \sum_{j \in p} e^{s_j}, \qquad
#    o_p = \sum_{j \in p} e^{s_j - \mathrm{lse}_p}\, v_j . $$
#
# Two pieces merge into what one softmax over both would have given:
#
# $$ \mathrm{lse} = \log(e^{\mathrm{lse}_1} + e^{\mathrm{lse}_2}), \qquad
#    o = e^{\mathrm{lse}_1 - \mathrm{lse}}\, o_1 + e^{\mathrm{lse}_2 - \mathrm{lse}}\, o_2 . $$
#
# An example that you can do in your head: three keys with the scores $\ln 1$, $\ln 2$ and $\ln 5$
# and the values 1, 2 and 4. The weights are 1/8, 2/8 and 5/8, so the output is 25/8, wherever the
# keys are split.

# %%
def piece(scores, values):
    weights = np.exp(scores)
    return weights @ values / weights.sum(), np.log(weights.sum())


scores, values = np.log([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 4.0])
for split in (1, 2):
    (o1, lse1), (o2, lse2) = piece(scores[:split], values[:split]), piece(scores[split:], values[split:])
    lse = np.log(np.exp(lse1) + np.exp(lse2))
    o = np.exp(lse1 - lse) * o1 + np.exp(lse2 - lse) * o2
    print(f"{split} + {3 - split} keys: o = {o:.4f}, e^lse = {np.exp(lse):.4f}")
    assert np.isclose(o, 25 / 8) and np.isclose(lse, np.log(8))
    of_library, _ = merge_partials(*map(jnp.asarray, ([o1], lse1, [o2], lse2)))
    assert np.isclose(of_library[0], o)

# %% [markdown]
# One danger is left: $e^{s}$ overflows float32 from $s = 89$ on. So walk along the tiles with a
# running maximum $m$, take exponentials of $s - m$ only, and when a tile brings a new maximum, shrink
# what was summed before by $e^{m_\mathrm{old} - m_\mathrm{new}}$. This is the *online softmax*
# ([arXiv 1805.02867](https://arxiv.org/abs/1805.02867)). Here it walks along one row of 64 scores:

# %%
rng = np.random.default_rng(4)
s, v = 2 * rng.standard_normal(64) + np.linspace(0, 3, 64), rng.standard_normal(64)
m, total, o = -np.inf, 0.0, 0.0
history = []
for j in range(0, 64, 8):
    new_m = max(m, s[j:j + 8].max())
    p, shrink = np.exp(s[j:j + 8] - new_m), np.exp(m - new_m)
    m, total, o = new_m, total * shrink + p.sum(), o * shrink + p @ v[j:j + 8]
    history.append((m, m + np.log(total), o / total))
exact = np.exp(s) @ v / np.exp(s).sum()
assert np.isclose(o / total, exact)

maxima, lses, outputs = np.array(history).T
ends = np.arange(8, 65, 8) - 0.5
figure, (left, right) = plt.subplots(1, 2)
left.bar(range(64), s, color=np.where(np.arange(64) // 8 % 2, "0.8", "0.65"))
left.step(np.r_[-0.5, ends], np.r_[maxima, maxima[-1]], where="post", marker="", label="maximum so far")
left.plot(ends, lses, linestyle="--", label="lse so far")
left.set(xlabel="key", ylabel="score", title="one row of scores, in tiles of 8", ylim=(None, 11))
left.legend(loc="upper left", ncols=2)
right.plot(ends, outputs, label="output of the tiles so far")
right.axhline(exact, color="0.3", lw=1)
right.annotate("softmax over the whole row", (8, exact), (0, 5), textcoords="offset points")
_ = right.set(xlabel="keys seen", title="the output after each tile", ylim=(None, max(outputs.max(), exact) + 0.25))

# %% [markdown]
# Before the last tile the output is right for the keys seen so far; after it, for the row. Now the
# whole algorithm: for each row of tiles, walk along the tiles that are not empty.

# %%
def tile_scores(q, k, mask, kinds, i, j, tile):
    """Scores of the tile that begins with query i and key j; the mask where it matters."""
    s = q[i:i + tile] @ k[j:j + tile].T * q.shape[1] ** -0.5
    if kinds[i // tile, j // tile] == PARTIAL:
        s = np.where(mask(np.arange(i, i + tile)[:, None], np.arange(j, j + tile)[None]), s, -1e30)
    return s


def tiled_attention(q, k, v, mask, tile):
    kinds = masks.tile_kinds(mask, len(q), len(k), tile, tile)[0]
    o, lse = np.zeros_like(v), np.zeros(len(q))
    for i in range(0, len(q), tile):
        m, total, rows = np.full(tile, -1e30), np.zeros(tile), slice(i, i + tile)
        for j in np.flatnonzero(kinds[i // tile]) * tile:  # empty tiles are not even visited
            s = tile_scores(q, k, mask, kinds, i, j, tile)
            new_m = np.maximum(m, s.max(axis=1))
            p, shrink = np.exp(s - new_m[:, None]), np.exp(m - new_m)
            o[rows] = o[rows] * shrink[:, None] + p @ v[j:j + tile]
            total, m = total * shrink + p.sum(axis=1), new_m
        o[rows] /= total[:, None]
        lse[rows] = m + np.log(total)
    return o, lse


T = 64
q, k, v = rng.standard_normal((3, T, 16))
for mask in (Causal(), SlidingWindow(20), Causal() | Prefix(20), Lambda(4, 14)):
    s = np.where(masks.as_array(mask, T, T), q @ k.T / 4, -np.inf)
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    dense = weights / weights.sum(axis=1, keepdims=True) @ v
    assert np.allclose(tiled_attention(q, k, v, mask, tile)[0], dense, atol=1e-12)

# %% [markdown]
# The memory is one tile, whatever $T$ is. That is the forward pass of FlashAttention.
#
# ## Part 3: the backward pass computes the tiles again
#
# Automatic differentiation would keep each tile's $p$ for the backward pass, and there the $T^2$
# would be back. But $\mathrm{lse}$ is enough to compute any tile of the normalized weights again,
# $P_{ij} = e^{s_{ij} - \mathrm{lse}_i}$. With a cotangent $dO$ the chain rule gives
#
# $$ dV = P^\top dO, \qquad
#    dS = P \circ (dO\, V^\top - \delta), \quad \delta_i = \sum_d dO_{id}\, O_{id}, \qquad
#    dQ = \frac{dS\, K}{\sqrt D}, \quad dK = \frac{dS^\top Q}{\sqrt D}, $$
#
# and each of these sums splits over tiles. ($\delta$ is the softmax's own derivative: it subtracts
# the weighted mean of $dO\,V^\top$ over a row, which equals $dO \cdot O$, so no tile has to know the
# rest of its row.)

# %%
def tiled_gradients(q, k, v, o, lse, do, mask, tile):
    kinds = masks.tile_kinds(mask, len(q), len(k), tile, tile)[0]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    delta, scale = (do * o).sum(axis=1), q.shape[1] ** -0.5
    for i, j in np.argwhere(kinds) * tile:
        rows, columns = slice(i, i + tile), slice(j, j + tile)
        p = np.exp(tile_scores(q, k, mask, kinds, i, j, tile) - lse[rows, None])
        ds = p * (do[rows] @ v[columns].T - delta[rows, None])
        dv[columns] += p.T @ do[rows]
        dq[rows] += ds @ k[columns] * scale
        dk[columns] += ds.T @ q[rows] * scale
    return dq, dk, dv


mask, do = Causal() | Prefix(20), rng.standard_normal((T, 16))
o, lse = tiled_attention(q, k, v, mask, tile)
ours = tiled_gradients(q, k, v, o, lse, do, mask, tile)


def library(q, k, v):  # takes [batch, time, heads, head_dim]
    return attention(*(x[None, :, None] for x in (q, k, v)), mask=mask)[0, :, 0]


theirs, pullback = jax.vjp(library, *(jnp.float32(x) for x in (q, k, v)))
np.testing.assert_allclose(o, theirs, atol=1e-5)
for mine, its in zip(ours, pullback(jnp.float32(do)), strict=True):
    np.testing.assert_allclose(mine, its, atol=2e-5)

# %% [markdown]
# The last lines compare with the library: `ops.attention` *is* these two functions, with batches,
# heads, any length, and Pallas kernels for TPUs and Hopper GPUs where the program runs on one.
#
# ## What follows from it
#
# Because pieces merge, a few things come for free. Each is an identity, so each is an assert.
#
# **Keys may lie in two places**, say on two devices. Each attends to its own keys, and the answers
# merge. (Ring attention is this; notebook 03 draws it.)

# %%
def random_qkv(T, heads=4, D=64):
    return jax.random.normal(jax.random.key(0), (3, 1, T, heads, D))


def close(a, b, error=1e-5):
    return float(jnp.abs(a - b).max()) < error * float(jnp.abs(b).max())


q, k, v = random_qkv(300)
whole = attention(q, k, v, mask=Causal())
assert close(whole, jax.nn.dot_product_attention(q, k, v, is_causal=True))

here, there = slice(0, 170), slice(170, 300)
o1, lse1 = attention(q, k[:, here], v[:, here], mask=Causal(), q_offset=0, return_lse=True)
o2, lse2 = attention(q, k[:, there], v[:, there], mask=Causal(), q_offset=-170, return_lse=True)
assert close(merge_partials(o1, lse1, o2, lse2)[0], whole)
assert jnp.isneginf(lse2[:, here]).all() and (o2[:, here] == 0).all()  # saw no key: 0, not NaN

# %% [markdown]
# **Decoding**: one new query against all keys so far is the last row of the whole. By default the
# last query stands at the last key, so nothing has to be said.

# %%
assert close(attention(q[:, -1:], k, v, mask=Causal()), whole[:, -1:])

# %% [markdown]
# **Packing**: short documents that share a row get what they would get alone.

# %%
ids = jnp.repeat(jnp.array([1, 2, 3]), jnp.array([100, 30, 170]))[None]
packed = attention(q, k, v, mask=Causal() & Segments(ids))
for start, end in ((0, 100), (100, 130), (130, 300)):
    alone = attention(q[:, start:end], k[:, start:end], v[:, start:end], mask=Causal())
    assert close(packed[:, start:end], alone)


# %% [markdown]
# ## What it saves
#
# Memory first. XLA says how much a compiled program needs besides its inputs and outputs without
# running it, so the dense square can be judged at any length: forward and backward, one sequence,
# 4 heads of 64, float32. Then time of the forward pass, relative to that of the dense program. On a
# CPU this is processor time, over all cores, so that other programs don't distort it.

# %%
PROGRAMS = {
    "dense": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    "causal tiles": lambda q, k, v: attention(q, k, v, mask=Causal()),
    "a window of 256, in tiles": lambda q, k, v: attention(q, k, v, mask=SlidingWindow(255)),
}


def mebibytes(f, T):
    gradient = jax.grad(lambda *qkv: jnp.sum(f(*qkv)), (0, 1, 2))
    shape = jax.ShapeDtypeStruct((1, T, 4, 64), jnp.float32)
    compiled = jax.jit(gradient).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def seconds(T, runs=3 if SMALL else 7):
    """The fastest run of each program; they take turns."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    qkv = random_qkv(T)
    compiled = {name: jax.jit(f) for name, f in PROGRAMS.items()}
    times = {name: [] for name in PROGRAMS}
    for _ in range(1 + runs):
        for name, f in compiled.items():
            start = clock()
            f(*qkv).block_until_ready()
            times[name].append(clock() - start)
    return {name: min(t[1:]) for name, t in times.items()}  # the first run compiles


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
LENGTHS = [256, 512, 1024] if SMALL else [1024, 2048, 4096, 8192, 16384]
memory = {name: [mebibytes(PROGRAMS[name], T) for T in LENGTHS] for name in PROGRAMS}
for name in ("dense", "causal tiles"):
    left.loglog(LENGTHS, memory[name], label=name)
left.set(xlabel="tokens", ylabel="temporary memory, MiB", title="memory, forward and backward")

TIMED = [256, 512, 1024] if SMALL else [512, 1024, 2048, 4096]
times = [seconds(T) for T in TIMED]
right.axhline(1, color=COLORS[0], lw=1)
right.annotate("dense", (TIMED[-1], 1), (0, 4), textcoords="offset points", ha="right")
right.plot([], [])  # lines have the colors that they have on the left
for name in list(PROGRAMS)[1:]:
    right.plot(TIMED, [t["dense"] / t[name] for t in times], label=name)
right.set(xlabel="tokens", ylabel="time of dense / time", title="time, forward", xscale="log", ylim=0)
for axis, ticks in ((left, LENGTHS), (right, TIMED)):
    axis.set_xticks(ticks, [f"{T:,}" for T in ticks])
    axis.minorticks_off()
    axis.legend(loc="upper left")

for name in PROGRAMS:
    print(f"{name:26s}", ", ".join(f"{m:8,.0f}" for m in memory[name]), "MiB at", LENGTHS, "tokens")
assert memory["causal tiles"][-1] < memory["dense"][-1]
if not SMALL:  # twice the length: four times the square, and at most twice the tiles' memory
    assert memory["dense"][-1] > 3.5 * memory["dense"][-2]
    assert memory["causal tiles"][-1] < 2.5 * memory["causal tiles"][-2]
    assert times[-1]["causal tiles"] < times[-1]["dense"]

# %% [markdown]
# The square's memory grows with $T^2$. That of the tiles is a few MiB for those at work, plus
# outputs, $\mathrm{lse}$ and $\delta$, which grow with $T$. From 8,192 tokens on a window needs the
# same, so it has no curve of its own. In time the window pulls ahead, as the count of tiles in
# part 1 said.
#
# ## Yours: a text and a mask
#
# Each paragraph below becomes a document, each word a token, and all of them are packed into one
# row. **Change the text, or the mask, and run the two cells again.** Some masks to start with:
# `Causal()`, `SlidingWindow(6, 6)`, `Lambda(4, 8)` (the first 4 and the last 8),
# `Causal() | Prefix(12)`; all of them with `& Segments(ids)` or without.

# %%
TEXT = """
The lighthouse keeper wrote down every ship that passed, and at night he read the list aloud so
that the sea would know it too.

Nobody asked him to. The list grew longer than the tower was high.

One day he forgot the first ship, and on the same day a letter came from it.
"""


def mine(ids):
    return Causal() & Segments(ids) & SlidingWindow(9)


# %%
paragraphs = [paragraph.split() for paragraph in TEXT.strip().split("\n\n")]
words = [word for paragraph in paragraphs for word in paragraph]
ids = np.repeat(np.arange(len(paragraphs)), [len(p) for p in paragraphs])[None]
T, mask, edge = len(words), mine(ids), 4
kinds = masks.tile_kinds(mask, T, T, edge, edge)
seen = masks.as_array(mask, T, T).reshape(T, T)

figure, axis = plt.subplots(figsize=(11, 7))
draw(axis, mask, T, edge)
axis.set_yticks(range(0, T, edge), words[::edge])
axis.set_xticks(range(0, T, edge), words[::edge], rotation=60, ha="right")
axis.grid(visible=False)
axis.set(title=f"{mask}\n{masks.live_tiles(kinds)} of {kinds.size} tiles")
legend_of_kinds(figure)
print(f'"{words[-1]}" sees: {" ".join(np.array(words)[seen[-1]])}')
print(f"a query sees {seen.sum(1).mean():.1f} keys on average, at most {seen.sum(1).max()}")

# Whatever the mask is, tiles give what the definition by the whole matrix gives.
q, k, v = random_qkv(T)
assert close(attention(q, k, v, mask=mask), attention(q, k, v, mask=mask, implementation="reference"))

# %% [markdown]
# ## Exercise 1: merge, safely
#
# The merge in part 2 computes $e^{\mathrm{lse}}$, which overflows at $\mathrm{lse} = 1000$ and turns
# into NaN where a piece saw no key ($\mathrm{lse} = -\infty$, $o = 0$). Write one that does neither,
# in NumPy. It should also give $o = 0$, $\mathrm{lse} = -\infty$ if *neither* piece saw a key.

# %%
def merge(o1, lse1, o2, lse2):
    """(o, lse) of two pieces: o1, o2 are [D], lse1, lse2 numbers."""
    return None  # your turn


# %%
def check_merge():
    o1, o2 = np.array([1.0, 2.0]), np.array([3.0, 6.0])
    cases = (o1, 0.0, o2, 0.0), (o1, 1000.0, o2, 999.0), (o1, -1000.0, o2, -1001.0)
    nothing = np.zeros(2), -np.inf
    cases += (*nothing, o2, 3.0), (o1, 3.0, *nothing), (*nothing, *nothing)
    for case in cases:
        answer = merge(*case)
        if answer is None:
            return "not yet: merge returns None"
        wanted = merge_partials(*map(jnp.asarray, case))
        if not all(np.allclose(a, b) for a, b in zip(answer, wanted, strict=True)):
            return f"not yet: merge{case} gives {answer}, the library {wanted}"
    return "right"


print(check_merge())

# %% [markdown]
# <details><summary>Solution</summary>
#
# Subtract the maximum before taking exponentials; if it is $-\infty$, subtract 0 instead.
#
# ```python
# def merge(o1, lse1, o2, lse2):
#     m = max(lse1, lse2)
#     m = m if np.isfinite(m) else 0.0
#     w1, w2 = np.exp(lse1 - m), np.exp(lse2 - m)
#     total = w1 + w2
#     if total == 0:
#         return np.zeros_like(o1), -np.inf
#     return (w1 * o1 + w2 * o2) / total, m + np.log(total)
# ```
#
# </details>
#
# ## Exercise 2: the tiles of a window
#
# With `SlidingWindow(w - 1)` a query sees itself and the $w - 1$ keys before it. In a sequence of
# $n$ tiles of $c \times c$, how many tiles have to be computed? Find a formula, for any $w \ge 1$.
# (Start with one row of tiles far from the beginning: to which tile does the *first* query of the
# row reach back?)

# %%
def window_tiles(n, c, w):
    return None  # your turn


# %%
def check_window_tiles():
    for n, c, w in ((8, 8, 1), (8, 8, 2), (8, 8, 8), (8, 8, 9), (8, 8, 10), (5, 16, 40), (4, 8, 99)):
        answer = window_tiles(n, c, w)
        wanted = masks.live_tiles(masks.tile_kinds(SlidingWindow(w - 1), n * c, n * c, c, c))
        if answer is None:
            return "not yet: window_tiles returns None"
        if answer != wanted:
            return f"not yet: window_tiles{(n, c, w)} gives {answer}, and there are {wanted}"
    return "right"


print(check_window_tiles())

# %% [markdown]
# <details><summary>Solution</summary>
#
# The first query of a row of tiles reaches $w - 1$ keys back, that is into
# $r = \lceil (w - 1) / c \rceil$ tiles before its own. So row $i$ has $\min(i, r) + 1$ tiles.
#
# ```python
# def window_tiles(n, c, w):
#     r = -(-(w - 1) // c)
#     return sum(min(i, r) + 1 for i in range(n))
# ```
#
# </details>
#
# ## Where to go from here
#
# `ops/masks.py` has the algebra of masks: a new pattern is a new mask, and every backend skips its
# tiles. `ops/attention_xla.py` is part 2 and 3 in JAX, `pallas_kernels/` the same for TPUs and
# Hopper GPUs. `tests/ops/test_masks.py` checks each tile against each of its elements. Notebook 02
# does for recurrences what this one did for attention.
