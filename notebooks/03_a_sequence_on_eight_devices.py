# %% [markdown]
# # A sequence on eight devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# A sequence that is too long for one device can be sharded along time: of $T$ tokens, device $p$ of
# $P$ holds $T / P$. Embeddings, norms and MLPs look at one token at a time and notice nothing. Only
# the layers that mix over time have to send something, and what they send is what tells the
# strategies apart:
#
# - **attention** needs all keys that a query sees. Either keys travel (ring attention, all-gather),
#   or each device trades its share of the time for a share of the heads (Ulysses).
# - **a recurrence** needs one state: that of the moment before its first token.
#
# This notebook builds both in a few lines of NumPy, draws who sends what to whom and when, counts
# bytes by hand and compares them with those of the compiled programs, and trains a model on eight
# devices, on a text of yours.
#
# The devices are virtual: JAX treats one CPU as eight. So nothing here is about speed. But values,
# messages, bytes and memory are those of real programs.
#
# To run it: `pip install -e .[notebooks]` in a checkout, then `jupyter lab notebooks`. On Colab,
# the badge opens a dialog: paste the address of this repository, choose this notebook, and write
# the same address into the next cell. It takes two minutes or three on a CPU, most of them to compile.

# %%
import sys

REPOSITORY = ""  # needed on Colab alone: https://github.com/...
if "google.colab" in sys.modules:
    assert REPOSITORY, "write the address of the repository that this notebook is from above"
    get_ipython().run_line_magic("pip", f"install --quiet git+{REPOSITORY}")

# %%
import functools
import os

# Before JAX starts: eight devices out of one CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec

from tilescan import decoding
from tilescan.experiments.harness.notebook_style import COLORS, use_notebook_style
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.ops.attention import attention
from tilescan.ops.masks import Causal, SlidingWindow
from tilescan.ops.sequence_parallel import ATTENTION, SCAN_KINDS, layouts
from tilescan.ops.sequence_parallel.affine_scan import affine_scan
from tilescan.ops.sequence_parallel.ring_attention import rounds
from tilescan.training import sharding, steps
from tilescan.training.collectives import collectives, sent_bytes
from tilescan.training.settings import MeshConfig

use_notebook_style()
SMALL = os.environ.get("TILESCAN_NOTEBOOK_SIZE") == "small"  # how the tests run this notebook
P = 8
assert jax.device_count() >= P, "restart the kernel and run from the top: JAX had started before"

# %% [markdown]
# ## Part 1: ring attention
#
# Device $p$ has its own queries, keys and values. In round $r = 0, 1, \dots, P - 1$ it holds the keys
# and values of device $p - r$ (modulo $P$), attends to them, and then hands them on to its neighbor
# $p + 1$. After $P$ rounds every query has met every key. The results of the rounds merge as pieces
# of one softmax do (notebook 01): with $\mathrm{lse}$ the logarithm of a piece's sum of exponentials,
#
# $$ o = e^{\mathrm{lse}_1 - \mathrm{lse}}\, o_1 + e^{\mathrm{lse}_2 - \mathrm{lse}}\, o_2, \qquad
#    \mathrm{lse} = \log(e^{\mathrm{lse}_1} + e^{\mathrm{lse}_2}). $$
#
# Here are eight "devices" as the first dimension of NumPy arrays. The ring is `np.roll`.

# %%
def piece(q, k, v, seen):
    """(output, lse) of queries [P, t, D] that see some of the keys [P, t, D]: seen is [P, t, t]."""
    s = np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -1e30)
    m = s.max(-1, keepdims=True)
    weights = np.where(seen, np.exp(s - m), 0)
    total = weights.sum(-1, keepdims=True)
    return weights @ v / np.maximum(total, 1e-30), np.log(np.maximum(total, 1e-30)) + m


def ring(q, k, v, positions):
    """Causal attention over P devices: q, k, v are [P, t, D], positions [P, t]."""
    o, lse = np.zeros_like(v), np.full((*q.shape[:2], 1), -1e30)
    k_positions = positions
    for _ in range(len(q)):
        o2, lse2 = piece(q, k, v, k_positions[:, None, :] <= positions[:, :, None])
        new = np.logaddexp(lse, lse2)
        o, lse = np.exp(lse - new) * o + np.exp(lse2 - new) * o2, new
        k, v, k_positions = (np.roll(x, 1, axis=0) for x in (k, v, k_positions))  # p sends to p + 1
    return o


T, D = 64, 16
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, T, D))
positions = np.arange(T).reshape(P, T // P)
o = ring(*(x[positions] for x in (q, k, v)), positions)
whole = attention(*(jnp.float32(x)[None, :, None] for x in (q, k, v)), mask=Causal())
np.testing.assert_allclose(o.reshape(T, D), whole[0, :, 0], atol=1e-5)

# %% [markdown]
# The library's `ring_attention` is the same for real devices. It is called by all of them at once,
# inside of `jax.shard_map`, with each one's shard; `jax.lax.ppermute` is the ring. To the outside it
# is a function of arrays that are sharded along dimension 1, the time.

# %%
def mesh_of(count):
    return jax.make_mesh((count,), ("sequence",), devices=jax.devices()[:count],
                         axis_types=(jax.sharding.AxisType.Auto,))


def over(count, function):
    """`function` of one device's shard, for `count` devices that share dimension 1."""
    time = PartitionSpec(None, "sequence")
    return jax.jit(jax.shard_map(function, mesh=mesh_of(count), in_specs=time, out_specs=time,
                                 check_vma=False))


ring_of_library = over(P, functools.partial(ATTENTION["ring"], mask=Causal(), balance="contiguous"))
got = ring_of_library(*(jnp.float32(x)[None, :, None] for x in (q, k, v)))
np.testing.assert_allclose(got, whole, atol=1e-5)
print(got.sharding.spec, "on", len(got.sharding.device_set), "devices")

# %% [markdown]
# ## Who holds what
#
# Under a causal mask a query costs as many keys as there are before it. If each device holds one run
# of tokens, the last one has fifteen times the work of the first, and in a ring all wait for the
# slowest. Two other orders share the work better: **zigzag** gives each device an early run and a late
# one, **striped** every eighth token. The order is made once, where batches are made; positions,
# masks and targets follow it (which is why `ring` above takes positions).

# %%
T = 64
figure, axes = plt.subplots(3, 2, figsize=(11, 4.4), gridspec_kw={"width_ratios": [3, 1]})
for (strip, bars), balance in zip(axes, layouts.BALANCES, strict=True):
    held = layouts.order(T, P, balance).reshape(P, T // P)  # [device, positions that it holds]
    o = ring(*(x[held] for x in (q, k, v)), held)
    np.testing.assert_allclose(o, np.asarray(whole[0, :, 0])[held], atol=1e-5)

    owner = np.empty(T, int)
    owner[held] = np.arange(P)[:, None]
    strip.imshow(owner[None], aspect="auto", extent=(0, T, 0, 1), cmap="cividis")
    for t in range(T):
        strip.text(t + 0.5, 0.45, owner[t], ha="center", va="center", fontsize=8,
                   color="white" if owner[t] < 4 else "black")
    strip.set(title=f"{balance}: the device of each token", yticks=[], xlim=(0, T))
    work = (held + 1).sum(1)
    bars.bar(range(P), work / work.mean(), color=plt.get_cmap("cividis")(np.arange(P) / (P - 1)))
    bars.axhline(1, color="black", lw=0.8)
    bars.set(title="work / mean", xticks=range(P), ylim=(0, 2.1))
    print(f"{balance:10s} the busiest device has {work.max() / work.mean():.2f} times the mean work")
axes[2, 0].set(xlabel="position")
_ = axes[2, 1].set(xlabel="device")

# %% [markdown]
# ## Round by round
#
# In each round a device computes what the mask lets its queries see of the keys it holds then. Below,
# a square is one device in one round, filled by the share of its pairs of query and key that have
# to be computed; the number says whose keys it holds. No device gets new keys before all have
# handed theirs on, so a round takes as long as its fullest square.

# %%
def visible(mask, balance, T=64):
    """[P, rounds]: the share of pairs that device p computes in round r, and whose keys they are."""
    held = layouts.order(T, P, balance).reshape(P, T // P)
    owner = (np.arange(P)[:, None] - np.arange(rounds(mask, P, T // P, balance))) % P
    pairs = mask(held[:, None, :, None], held[owner][:, :, None, :])
    return np.asarray(pairs).mean((2, 3)), owner


def draw_rounds(axis, mask, balance):
    share, owner = visible(mask, balance)
    for p, r in np.ndindex(*share.shape):
        axis.add_patch(plt.Rectangle((r, p), 0.92, 0.92, fc="0.93"))
        axis.add_patch(plt.Rectangle((r, p + 0.92 * (1 - share[p, r])), 0.92, 0.92 * share[p, r],
                                     fc=COLORS[5]))
        axis.text(r + 0.46, p + 0.48, owner[p, r], ha="center", va="center", fontsize=8)
    waiting = share.max(0).sum() / share.sum(1).mean()
    axis.set(xlim=(0, P), ylim=(P, 0), xlabel="round", aspect="equal", yticks=np.arange(P) + 0.46,
             yticklabels=range(P), xticks=np.arange(P) + 0.46, xticklabels=range(P))
    axis.set_title(f"{balance}: {waiting:.2f}", fontsize=10)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return waiting


figure, axes = plt.subplots(1, 4, figsize=(11, 3.4), sharey=True)
waits = {b: draw_rounds(axis, Causal(), b) for axis, b in zip(axes, layouts.BALANCES, strict=False)}
draw_rounds(axes[3], Causal() & SlidingWindow(11), "contiguous")
axes[3].set_title("a window of 12: 3 rounds", fontsize=10)
_ = axes[0].set(ylabel="device")
assert waits["zigzag"] < 1.2 < waits["contiguous"]
assert visible(Causal() & SlidingWindow(11), "contiguous")[0].shape[1] == 3

# %% [markdown]
# The number above is the time of all rounds, in units of the mean work of a device: contiguous
# runs waste half of it. Rounds that no device needs are never run, so a window costs as many rounds
# as it is long.
#
# ## Part 2: heads for time
#
# Ulysses ([arXiv 2309.14509](https://arxiv.org/abs/2309.14509)) sends no keys around. Before
# attention, a device has *all heads of its tokens*. One all-to-all turns that into *its heads of all
# tokens*, attention runs as on one device, and a second all-to-all turns the output back. With
# devices as the first dimension of an array, an all-to-all is a transpose:

# %%
def all_to_all(x, split, join):
    """Each device splits its array along `split`, sends part p to device p, joins what it gets."""
    parts = np.stack(np.split(x, len(x), axis=split), axis=1)  # [from, to, ...]
    return np.concatenate(list(parts), axis=join)  # joined over "from": [to, ...]


H, T = 8, 64
q, k, v = rng.standard_normal((3, P, T // P, H, D))  # [device, its tokens, all heads, D]
mine = [all_to_all(x, split=2, join=1) for x in (q, k, v)]  # [device, all tokens, its heads, D]
assert mine[0].shape == (P, T, H // P, D)
causal = np.tri(T, dtype=bool)[None]
o = np.stack([piece(*(x[:, :, h] for x in mine), causal)[0] for h in range(H // P)], axis=2)
o = all_to_all(o, split=1, join=2)  # back: [device, its tokens, all heads, D]
whole = attention(*(jnp.float32(x.reshape(1, T, H, D)) for x in (q, k, v)), mask=Causal())
np.testing.assert_allclose(o.reshape(1, T, H, D), whole, atol=1e-5)

# %% [markdown]
# A third strategy is the plainest: with **all-gather** each device collects the keys and values of
# all, and attends as usual. All three are exact, gradients too. Below they are compared with attention
# on one device, in zigzag order, with two more: `usp` (Ulysses in groups of devices and a ring
# between them) and `ring_self_attention` (rows of scores as long as the sequence, as in
# [arXiv 2105.13120](https://arxiv.org/abs/2105.13120)).

# %%
def gradients_of(name, balance="contiguous"):
    """(o, dq, dk, dv) of one device's shard of q, k, v and of the cotangent of o."""
    attend = functools.partial(ATTENTION[name], mask=Causal(), balance=balance)

    def run(q, k, v, do):
        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    return run


T = 256
q, k, v, do = (jnp.float32(rng.standard_normal((1, T, heads, D))) for heads in (8, 2, 2, 8))
o, pullback = jax.vjp(functools.partial(attention, mask=Causal()), q, k, v)
wanted = o, *pullback(do)
order, back = layouts.order(T, P, "zigzag"), layouts.restore(T, P, "zigzag")
for name in ATTENTION:
    if name == "ring_kernel":  # a ring by remote copies inside of a kernel, which TPUs alone have
        continue
    got = over(P, gradients_of(name, "zigzag"))(*(x[:, order] for x in (q, k, v, do)))
    error = max(float(jnp.abs(a[:, back] - b).max() / jnp.abs(b).max())
                for a, b in zip(got, wanted, strict=True))
    print(f"{name:20s} max relative error of o, dq, dk, dv: {error:.1e}")
    assert error < 1e-5

# %% [markdown]
# ## What they send
#
# Count what one device sends, forward and backward. Let $M_q$ be the bytes of the whole sequence's
# queries (its outputs have as many) and $M_k$ those of its keys (its values have as many).
#
# - **Ring.** Forward, keys and values take $P - 1$ hops of $1/P$ each. Backward they go round again,
#   and their gradients with them, which take $P$ hops to be home:
#   $\left(4\,\frac{P-1}{P} + 2\right) M_k$.
# - **All-gather.** $1/P$ goes to $P - 1$ others, for keys and values. Their gradients are summed and
#   scattered, which costs the same: $4\,\frac{P-1}{P}\, M_k$.
# - **Ulysses.** Of its $1/P$ of the sequence a device keeps $1/P$ and sends the rest: forward
#   $q, k, v$ and $o$, backward their gradients: $\frac{P-1}{P^2}\, (4 M_q + 4 M_k)$. With fewer
#   key-value heads than devices, $M_k$ counts them as repeated until each device has one.
#
# And what do the programs say? `training.collectives` reads the messages off a compiled program,
# loops included. Nothing has to run.

# %%
def by_hand(name, P, T, heads=8, kv_heads=8):
    """Bytes that a device sends, float32."""
    M_q, M_k = 4 * T * heads * D, 4 * T * kv_heads * D
    if name == "ring":
        return (4 * (P - 1) / P + 2) * M_k
    if name == "all_gather":
        return 4 * (P - 1) / P * M_k
    return (P - 1) / P**2 * (4 * M_q + 4 * np.maximum(1, P / kv_heads) * M_k)


def compiled(name, count, T, kv_heads=8):
    shapes = [jax.ShapeDtypeStruct((1, T, n, D), jnp.float32) for n in (8, kv_heads, kv_heads, 8)]
    return over(count, gradients_of(name)).lower(*shapes).compile()


def sent(program):
    return sum(sent_bytes(collectives(program.as_text())).values())


STRATEGIES = ("ring", "all_gather", "ulysses")
COUNTS = (4, 8) if SMALL else (2, 4, 8)
LONG = 2048 if SMALL else 16384
programs = {(name, n): compiled(name, n, LONG) for name in STRATEGIES for n in COUNTS}
for (name, n), program in programs.items():
    print(f"{name:10s} on {n} devices: {sent(program) / 2**20:6.2f} MiB by the program,"
          f" {by_hand(name, n, LONG) / 2**20:6.2f} by hand")
    # On two devices both passes have one hop, of the same keys: XLA makes it once.
    assert sent(program) == by_hand(name, n, LONG) or (name, n) == ("ring", 2)
for name in STRATEGIES:
    assert sent(compiled(name, 8, 1024, kv_heads=1)) == by_hand(name, 8, 1024, kv_heads=1)

# %% [markdown]
# So the formulas can be trusted, and drawn: for one sequence on more and more devices, for a
# sequence that grows with them (2,048 tokens a device), and for the same with one key-value head that
# eight query heads share.

# %%
count = np.array([2, 4, 8])
cases = {
    "T = 16,384": dict(T=16384), "T = 2,048 P": dict(T=2048 * count),
    "T = 2,048 P, one key-value head": dict(T=2048 * count, kv_heads=1),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
for axis, (title, case) in zip(axes, cases.items(), strict=True):
    for name in STRATEGIES:
        axis.plot(count, by_hand(name, count, **case) / 2**20, label=name if axis is axes[0] else None)
    axis.set(title=title, xlabel="devices", xticks=count, ylim=(0, None))
axes[0].set(ylabel="MiB sent by a device")
_ = figure.legend(loc="outside lower center", ncols=3)

# %% [markdown]
# In a ring or a gather a device sees all keys pass: what it sends grows with the sequence, however
# many devices share it. In Ulysses a device trades away only what it holds, so its traffic stays when
# tokens and devices grow together. With few key-value heads the picture turns: keys are small, and
# most of what Ulysses sends is queries and outputs. But bytes are not time: a ring can send while it
# computes, and an all-to-all cannot. And Ulysses can't have more devices than heads.
#
# ## What memory they need
#
# The same programs, another question: a device's temporary memory, forward and backward.

# %%
figure, axis = plt.subplots(figsize=(11, 3.2))
memory = {key: p.memory_analysis().temp_size_in_bytes / 2**20 for key, p in programs.items()}
for i, name in enumerate(STRATEGIES):
    heights = [memory[name, n] for n in COUNTS]
    bars = axis.bar(np.arange(len(COUNTS)) + 0.27 * (i - 1), heights, width=0.25, label=name,
                    hatch=("", "//", "..")[i], edgecolor="white")
    axis.bar_label(bars, fmt="%.0f")
axis.set_xticks(range(len(COUNTS)), [f"{n} devices" for n in COUNTS])
axis.margins(y=0.12)
axis.set(ylabel="MiB of a device", title=f"temporary memory, {LONG:,} tokens, 8 heads of {D}")
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
assert all(memory[name, COUNTS[-1]] < memory[name, COUNTS[0]] for name in ("ring", "ulysses"))
assert SMALL or memory["all_gather", 8] > 0.8 * memory["all_gather", 2]

# %% [markdown]
# A ring holds its own tokens and one neighbor's keys, Ulysses the whole sequence for some heads: both
# fall as devices are added. A gather holds the keys of the whole sequence, however many share it.
#
# ## Part 3: recurrences send a state
#
# For a recurrence $x_t = a_t x_{t-1} + b_t$ (notebook 02) a device's whole shard of time is *one*
# affine map of the state that enters it:
#
# $$ S \mapsto A_p S + S_p, \qquad A_p = \prod_t a_t, \quad S_p = \text{the last state if zero enters.} $$
#
# So all devices first run their shard from zeros, at once. Then each needs $S_\mathrm{in}(p)$, the maps
# of all devices before it in a row. And then each adds what entered: $\alpha_t S_\mathrm{in}$, with
# $\alpha_t$ the product of its decays up to $t$.

# %%
def from_zeros(a, b):
    """States, and products of decays, over each device's shard: [P, t, N]."""
    x, alpha = np.zeros_like(b), np.cumprod(a, axis=1)
    for t in range(b.shape[1]):
        x[:, t] = a[:, t] * (x[:, t - 1] if t else 0) + b[:, t]
    return x, alpha


N = 16
a, b = rng.uniform(0.8, 1, (P, 8, N)), rng.standard_normal((P, 8, N))
x, alpha = from_zeros(a, b)
A, S = alpha[:, -1], x[:, -1]  # each device's map: a decay and a state

S_in = np.zeros((P, N))
for p in range(P - 1):
    S_in[p + 1] = A[p] * S_in[p] + S[p]
x = x + alpha * S_in[:, None]
whole, _ = from_zeros(a.reshape(1, -1, N), b.reshape(1, -1, N))
np.testing.assert_allclose(x.reshape(1, -1, N), whole)

# %% [markdown]
# The loop in the middle is all that devices say to each other, and it is a recurrence itself, over
# devices. Like every recurrence it has several algorithms. Here are the library's four, played
# through in NumPy with nothing but the messages that are drawn, and compared with the library.

# %%
def chain(A, S):
    """Each waits for the one before it (LASP)."""
    S_in, messages = np.zeros_like(S), []
    for p in range(P - 1):
        S_in[p + 1] = A[p] * S_in[p] + S[p]
        messages.append((p, p + 1, p, p + 1))  # (start, end, from, to)
    return S_in, messages


def all_gather(A, S):
    """All maps go to every device, which then applies those before it (LASP-2)."""
    S_in, messages = np.zeros_like(S), []
    for q in range(P):
        for p in range(q):
            S_in[q] = A[p] * S_in[q] + S[p]
            messages.append((0, P - 1, p, q))
    return S_in, messages


def log_step(A, S):
    """After messages over 1, 1, 2 and 4 devices, every device has all maps before it."""
    before = lambda x, d: np.concatenate([np.zeros_like(x[:d]), x[:-d]])
    messages = [(0, 1, p, p + 1) for p in range(P - 1)]
    A, S, distance, tick = before(A, 1), before(S, 1), 1, 1
    while distance < P - 1:
        messages += [(tick, tick + 1, p, p + distance) for p in range(1, P - distance)]
        A, S = A * before(A, distance), A * before(S, distance) + S
        distance, tick = 2 * distance, tick + 1
    return S, messages


def all_scan(A, S, K=8):
    """The chain in K blocks of the state: device p sends block t - p at time t / K (ZeCO)."""
    S_in, messages, blocks = np.zeros_like(S), [], np.split(np.arange(S.shape[1]), K)
    for t in range(P + K - 2):
        for p in range(P - 1):
            if 0 <= t - p < K:
                n = blocks[t - p]
                S_in[p + 1, n] = A[p, n] * S_in[p, n] + S[p, n]
                messages.append((t / K, (t + 1) / K, p, p + 1))
    return S_in, messages


def scan_of_library(kind):
    """`affine_scan` of arrays whose dimension 1 is that of the devices."""
    return over(P, lambda A, S: affine_scan(jnp.log(A[:, 0]), S[:, 0], kind=kind)[0][:, None])


SCHEDULES = {"chain": chain, "all_gather": all_gather, "log_step": log_step, "all_scan": all_scan}
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharey=True)
ends = {}
for axis, (kind, schedule) in zip(axes, SCHEDULES.items(), strict=True):
    got, messages = schedule(A, S)
    np.testing.assert_allclose(got, S_in)
    of_library = scan_of_library(kind)(*(jnp.float32(x.T[:, :, None]) for x in (A, S)))
    np.testing.assert_allclose(of_library[:, :, 0].T, S_in, atol=1e-5)
    for start, end, p, q in messages:
        arrow = {"arrowstyle": "->", "color": COLORS[0], "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (end, q), (start, p), arrowprops=arrow)
    ends[kind] = max(end for _, end, _, _ in messages)
    axis.set(title=f"{kind}: {ends[kind]:.3g}", xlim=(0, P), ylim=(P - 0.5, -0.5), xlabel="time",
             yticks=range(P))
_ = axes[0].set(ylabel="device")
assert set(SCHEDULES) == set(SCAN_KINDS) and min(ends, key=ends.get) == "all_scan"

# %% [markdown]
# The number in a title is the time until the last device has its state, in units of one whole
# state over one link. (Starting a message is free here. Where it is not, `log_step` is good for small
# states on many devices, and the pipeline of `all_scan` for large ones.) Compiled, every device runs
# the same loop and sends in each of its rounds, needed or not:

# %%
def states_by_hand(kind, K=8):
    """States of 64 x 64 that a device sends; a map is a state and 64 decays, 1/64 of a state."""
    return {"chain": P - 1, "all_gather": (P - 1) * (1 + 1 / 64), "all_scan": (P + K - 2) / K,
            "log_step": 4 + 3 / 64}[kind]  # the last message needs no decays


for kind in SCHEDULES:
    shapes = [jax.ShapeDtypeStruct((64, P, n), jnp.float32) for n in (1, 64)]
    found = collectives(scan_of_library(kind).lower(*shapes).compile().as_text())
    states = sum(sent_bytes(found).values()) / (4 * 64 * 64)
    print(f"{kind:10s} {sum(c.times for c in found):3d} messages, {states:5.2f} states sent by a device")
    assert np.isclose(states, states_by_hand(kind))

# %% [markdown]
# Whatever the schedule: a recurrence sends a few states, where attention sends keys by the
# thousand. What is sent does not depend on the length of the sequence at all.
#
# ## Yours: train on eight devices, on your own text
#
# For a model all of this is two settings, and `mesh.sequence` says how many devices share a row.
# Below, a small hybrid of Mamba-2 and attention learns a text by heart, letter by letter, once on one
# device and once on eight. **Put in a text of your own (of more than 128 letters), change the prompt
# and the strategies, and run the two cells again.**

# %%
TEXT = """
The lighthouse keeper wrote down every ship that passed, and at night he read the list aloud so
that the sea would know it too. Nobody asked him to. The list grew longer than the tower was high.
One day he forgot the first ship, and on the same day a letter came from it. It said that the ship
had passed at night, that nobody had seen it, and that it had read of itself in the list.
"""
PROMPT = "The lighthouse"
FOR_ATTENTION = "ring"  # or "all_gather"; or "ulysses", with at most 4 devices for the 4 heads
FOR_RECURRENCES = "all_scan"  # or "chain", "all_gather", "log_step"
DEVICES = 8
UPDATES = 3 if SMALL else 100

# %%
T, RATE = 128, 4e-3
text = np.frombuffer(" ".join(TEXT.split()).encode(), np.uint8)  # tokens are bytes
assert len(text) > T, f"the text has {len(text)} letters; at least {T + 1} are needed"
model = LanguageModel(LanguageModelConfig(
    vocab_size=256, d_model=64, pattern=("mamba2", "attention", "mlp"), repeats=1,
    n_heads=4, n_kv_heads=2, mixers={"mamba2": {"state_dim": 16, "head_dim": 16}},
    attention_sequence_parallel=FOR_ATTENTION, scan_sequence_parallel=FOR_RECURRENCES,
))


def batches(rows=4):
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(text) - T, rows)
        tokens = np.stack([text[s:s + T + 1] for s in starts]).astype(np.int32)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
               "weights": np.ones((rows, T), np.float32)}


optimizer = optax.adamw(RATE)
loss = steps.make_loss(model, "language_model")
step = steps.make_train_step(loss, optimizer, lambda _: RATE)


def train(count):
    """(loss of each update, the compiled step, parameters): `count` devices share each row."""
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=count), jax.devices()[:count])
    with sharding.use(mesh):
        stream = (sharding.put_batch(batch, mesh) for batch in batches())
        first = next(stream)
        state = nn.unbox(steps.init_state(model, optimizer, first, seed=0))
        state = jax.device_put(state, sharding.replicated(mesh))
        program = jax.jit(step).lower(state, first).compile()
        losses = []
        for batch, _ in zip(stream, range(UPDATES)):
            state, metrics = program(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), program, jax.device_get(state.params)


alone, _, _ = train(1)
together, program, params = train(DEVICES)

prompt = np.frombuffer(PROMPT.encode(), np.uint8)[None].astype(np.int32)
sample = decoding.generate(model, params, prompt, max_new_tokens=120)
print(PROMPT + "|" + bytes(np.uint8(sample.tokens[0])).decode(errors="replace"))
totals = {}
for c in collectives(program.as_text()):
    runs, amount = totals.get(c.kind, (0, 0))
    totals[c.kind] = runs + c.times, amount + c.sent_bytes
for kind, (runs, amount) in totals.items():
    print(f"{kind:20s} {runs:4d} in an update, {amount / 2**10:8.1f} KiB sent by a device")

figure, (left, right) = plt.subplots(1, 2)
left.plot(together, color=COLORS[0], marker="", ls="-", label=f"{DEVICES} devices")
shown = np.arange(0, UPDATES, 10)
left.plot(shown, alone[shown], color=COLORS[1], marker="o", ms=9, mfc="none", ls="",
          label="one device, each tenth update")
left.set(xlabel="update", ylabel="loss, nats a letter", title="the same run")
left.legend(loc="upper right")
right.semilogy(np.abs(together / alone - 1) + 1e-9, marker="", ls="-")
right.set(xlabel="update", ylabel="relative difference of the loss", title="what rounding makes of it")
assert abs(together[0] / alone[0] - 1) < 1e-5
assert SMALL or alone[-5:].mean() < alone[:5].mean() - 1

# %% [markdown]
# Before the bar is the prompt, after it what the model that eight devices trained has learned to
# say. Permutations are the ring, the states, and the last tokens that a short convolution reads across
# a border; all-reduces add up gradients of parameters. In exact arithmetic the two runs would be the
# same. In float32 sums have another order, each update starts from the one before, and small
# differences grow; in float64 the tests hold the ops to $10^{-12}$.
#
# ## Exercise 1: how many rounds does a window need?
#
# With `Causal() & SlidingWindow(w - 1)` a query sees itself and the $w - 1$ keys before it. Each of $P$
# devices holds a contiguous run of $t$ tokens. After how many rounds of the ring has every query met
# its keys? (How many devices back is the farthest key of a device's *first* query?)

# %%
def rounds_of_window(w, P, t):
    return None  # your turn


# %%
def check_rounds():
    for w, P, t in ((1, 8, 8), (2, 8, 8), (9, 8, 8), (10, 8, 8), (12, 4, 16), (1000, 8, 8), (40, 3, 8)):
        answer = rounds_of_window(w, P, t)
        wanted = rounds(Causal() & SlidingWindow(w - 1), P, t, "contiguous")
        if answer is None:
            return "not yet: rounds_of_window returns None"
        if answer != wanted:
            return f"not yet: rounds_of_window{(w, P, t)} gives {answer}, and the ring takes {wanted}"
    return "right"


print(check_rounds())

# %% [markdown]
# <details><summary>Solution</summary>
#
# The first query of a device reaches $w - 1$ tokens back from the beginning of its run, that is
# $\lceil (w - 1) / t \rceil$ devices. One more round is its own. And there are at most $P$.
#
# ```python
# def rounds_of_window(w, P, t):
#     return min(P, 1 + -(-(w - 1) // t))
# ```
#
# </details>
#
# ## Exercise 2: ring or Ulysses?
#
# With $H$ heads and $G$ key-value heads of the same size, $M_k = \frac GH M_q$. What is the largest $G$
# with which a device sends fewer bytes in a ring than in Ulysses? Let $P \le G \le H$, so that no heads
# have to be repeated. (Put both formulas of part 2 side by side and solve for $G$. On many devices
# there may be none; return 0 then.)

# %%
def largest_kv_heads_for_ring(H, P):
    """The largest G with P <= G <= H for which a ring sends less than Ulysses; 0 if there is none."""
    return None  # your turn


# %%
def check_ring_or_ulysses():
    for H, P in ((64, 2), (64, 4), (64, 8), (32, 3), (16, 2), (8, 2), (128, 4)):
        answer = largest_kv_heads_for_ring(H, P)
        if answer is None:
            return "not yet: largest_kv_heads_for_ring returns None"
        wins = [G for G in range(P, H + 1)
                if by_hand("ring", P, 1024, H, G) < by_hand("ulysses", P, 1024, H, G)]
        if answer != max(wins, default=0):
            return f"not yet: for {H} heads and {P} devices it is {max(wins, default=0)}, not {answer}"
    return "right"


print(check_ring_or_ulysses())

# %% [markdown]
# <details><summary>Solution</summary>
#
# Multiply both formulas by $P^2 / M_q$, with $g = G / H$: the ring sends less if
# $(6 P^2 - 4 P)\, g < 4 (P - 1)(1 + g)$, that is $g\, (6 P^2 - 8 P + 4) < 4 (P - 1)$. The left side grows
# with $P^2$: on many devices a ring sends less only with very few key-value heads. It is used all the
# same, because it sends while it computes.
#
# ```python
# def largest_kv_heads_for_ring(H, P):
#     numerator, denominator = 4 * (P - 1) * H, 6 * P**2 - 8 * P + 4
#     G = -(-numerator // denominator) - 1
#     return G if P <= G else 0
# ```
#
# </details>
#
# ## Where to go from here
#
# `docs/sequence_parallel.md` says which mixers, strategies and orders go together. `tilescan plan`
# compiles a training step for TPU slices that are not attached, and counts its bytes.
# `experiments/papers/` has `ulysses`, `zeco` and `ring_self_attention`, with the papers' tables beside
# what was measured here.
