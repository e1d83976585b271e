# %% [markdown]
# # One recurrence, four algorithms
#
# A state space model carries a state through time,
#
# $$ x_t = \bar A\, x_{t-1} + \bar B\, u_t, \qquad y_t = 2\,\mathrm{Re}(C x_t), $$
#
# and everything that this family of models can do comes from the freedom to compute that one line
# in different orders: **step by step**, as a **tree**, in **chunks** of matrix products, or, if
# the decays don't depend on the input, as one **convolution**.
#
# This notebook checks that the four agree, counts what each costs, looks into the states, and ends
# with what happens to a state that was never taught to forget.

# %%
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from tilescan.experiments.harness.workspace import Workspace
from tilescan.experiments.measurements import state_collapse
from tilescan.experiments.measurements.training import metrics
from tilescan.experiments.papers.stuffed_mamba import training as stuffed_training
from tilescan.ops import s4
from tilescan.ops.diagonal_scan import combine
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.ssd import ssd
from tilescan.ops.state_space import diagonal_state_space

SMALL = os.environ.get("TILESCAN_NOTEBOOK_SIZE", "full") == "small"
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False})

# %% [markdown]
# ## The four algorithms
#
# The system is S4D's: for each of `H` channels a diagonal $A_n = -\frac12 + i\pi n$ and a step of
# its own, $\bar A = e^{\Delta A}$. States come in conjugate pairs, of which one half is kept.

# %%
H, N = 16, 8
rng = np.random.default_rng(0)
A = jnp.broadcast_to(jnp.asarray(s4.s4d_init(2 * N, "lin"), jnp.complex64), (H, N))
B = jnp.ones((H, N), jnp.complex64)
C = jnp.asarray(rng.standard_normal((H, N, 2)) @ [1, 1j], jnp.complex64)
log_dt = jnp.asarray(np.linspace(np.log(1e-3), np.log(1e-1), H), jnp.float32)
Abar, Bbar = s4.s4d_discretize(log_dt, A, B)


def driven(u):
    """The inputs of the states: [B, T, H, N]."""
    return u[..., None] * Bbar


def read_out(x):
    return 2 * jnp.real(jnp.sum(C * x, -1))


@jax.jit
def sequential(u):
    """T steps, one after the other; one state in memory."""
    def step(x, u):
        x = Abar * x + u[..., None] * Bbar
        return x, read_out(x)
    x = jnp.zeros((u.shape[0], H, N), jnp.complex64)
    return jax.lax.scan(step, x, u.swapaxes(0, 1))[1].swapaxes(0, 1)


@jax.jit
def associative(u):
    """Pairs (decay, state) merge in any grouping: a tree of log2 T levels, all states in memory."""
    b = driven(u)
    pairs = jnp.broadcast_to(Abar, b.shape), b
    return read_out(jax.lax.associative_scan(combine, pairs, axis=1)[1])


@jax.jit
def chunked(u):
    """Matrix products within chunks, one state between them."""
    return diagonal_state_space(u, log_dt, A, B, C)[0]


@jax.jit
def convolution(u):
    """y = K * u with K_l = 2 Re(C Abar^l Bbar), by FFT; no state at all."""
    return long_convolution(u, s4.s4d_kernel(log_dt, A, B, C, u.shape[1]))[0]


ALGORITHMS = {"sequential": sequential, "associative": associative, "chunked": chunked,
              "convolution": convolution}

# %% [markdown]
# What is right is decided by plain steps in float64:

# %%
def in_float64(u):
    decay = np.exp(np.exp(np.float64(log_dt))[:, None] * np.complex128(A))
    inputs = (decay - 1) / np.complex128(A) * np.complex128(B)
    x, ys = np.zeros((u.shape[0], H, N), complex), []
    for t in range(u.shape[1]):
        x = decay * x + np.float64(u[:, t, :, None]) * inputs
        ys.append(2 * (np.complex128(C) * x).sum(-1).real)
    return np.stack(ys, 1)


u = jnp.asarray(rng.standard_normal((1, 1000, H)), jnp.float32)
exact = in_float64(u)
for name, algorithm in ALGORITHMS.items():
    error = np.abs(algorithm(u) - exact).max() / np.abs(exact).max()
    print(f"{name:12s} largest error {error:.1e} of the largest output")
    assert error < 3e-5

# %% [markdown]
# ## What they cost
#
# Same outputs, different costs. For one channel of N states over T steps, in chunks of c:
#
# | algorithm | work | depth | memory |
# | --- | --- | --- | --- |
# | sequential | T N | T | N |
# | associative | T N, a few times over | log T | T N |
# | chunked | T (c + N) | T / c | T (1 + N / c) |
# | convolution | T log T, after T N for the kernel | log T | T |
#
# So much for counting. Below, time is measured on the machine that ran this notebook, a CPU with
# two cores that other programs share, forward, as the best of several runs; temporary memory is
# what XLA says that the compiled program needs.

# %%
LENGTHS = [256, 1024] if SMALL else [256, 1024, 4096, 16384, 65536]


def milliseconds(algorithm, T):
    u = jax.random.normal(jax.random.key(0), (1, T, H))
    algorithm(u).block_until_ready()
    times = []
    for _ in range(3 if SMALL else 7):
        start = time.perf_counter()
        algorithm(u).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def mebibytes(algorithm, T):
    compiled = algorithm.lower(jax.ShapeDtypeStruct((1, T, H), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


elapsed = {name: [milliseconds(algorithm, T) for T in LENGTHS]
           for name, algorithm in ALGORITHMS.items()}
memory = {name: [mebibytes(algorithm, T) for T in LENGTHS]
          for name, algorithm in ALGORITHMS.items()}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for axis, results, label in ((axes[0], elapsed, "ms"), (axes[1], memory, "temporary MiB")):
    for (name, numbers), marker in zip(results.items(), "os^d", strict=True):
        axis.loglog(LENGTHS, numbers, marker + "-", label=name)
    axis.set(xlabel="tokens", ylabel=label)
_ = axes[0].legend(frameon=False)
for name in ALGORITHMS:
    print(f"{name:12s}", ", ".join(f"{t:.3g} ms" for t in elapsed[name]), "|",
          ", ".join(f"{m:.3g} MiB" for m in memory[name]))
assert memory["chunked"][-1] < memory["associative"][-1]

# %% [markdown]
# The tree keeps a state for every token; that is what runs out of memory first, and two cores have
# no use for so short a depth. Steps keep one state, and on a processor with few lanes they are a
# good method. Chunks lie between: their work is matrix products, and only one state goes from chunk
# to chunk. The convolution has no state, which is also its limit: generation goes back to steps.
#
# ## Looking into the states
#
# Three impulses into one channel of each kind: a mode that forgets at once, two slower ones, and
# one that turns while it decays. Below, the same inputs as three documents packed into one row: the
# `segment_ids` make the states start from nothing.

# %%
T = 120
a = jnp.asarray([0.5, 0.9, 0.98, 0.97 * np.exp(0.5j)], jnp.complex64)
b = jnp.zeros((1, T, 4), jnp.complex64).at[:, jnp.array([5, 45, 85])].set(1.0)
ids = jnp.repeat(jnp.arange(3), 40)[None]
states, _ = linear_recurrence(a, b)
packed, _ = linear_recurrence(a, b, segment_ids=ids)

figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True, layout="constrained")
for axis, x, title in ((axes[0], states, "one document"), (axes[1], packed, "three, packed")):
    shown = axis.imshow(np.real(x[0]).T, aspect="auto", cmap="RdBu", vmin=-1.5, vmax=1.5)
    axis.set_yticks(range(4), ["a = 0.5", "0.9", "0.98", "0.97 e^(i/2)"])
    axis.set_title(title)
axes[1].set(xlabel="time")
_ = figure.colorbar(shown, ax=axes, label="Re x")
for i in range(3):
    alone, _ = linear_recurrence(a, b[:, 40 * i:40 * (i + 1)])
    np.testing.assert_allclose(packed[:, 40 * i:40 * (i + 1)], alone, atol=1e-6)

# %% [markdown]
# A state is all that later tokens need of the past, so a sequence may be split anywhere: the first
# part gives `final_state`, the second takes it as `initial_state`. (Streaming, training on pieces of a
# book and sharding a sequence over devices are all this line.)

# %%
whole, last = linear_recurrence(a, b)
first, carried = linear_recurrence(a, b[:, :50])
second, end = linear_recurrence(a, b[:, 50:], initial_state=carried)
np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
np.testing.assert_allclose(end, last, atol=1e-6)

# %% [markdown]
# ## Decays that the input selects
#
# Mamba-2 lets every token choose its decay, $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^\top$
# and $y_t = h_t C_t$. No convolution does that any more. The other three algorithms stay, and a new
# one joins them: written out, $y = (L \circ C B^\top)(\Delta x)$ is attention without softmax, with a
# mask $L_{ij} = e^{\sum_{j<k\le i} \Delta_k A}$ of decays. Chunks are what lies between: squares of
# that matrix on the diagonal, a state for all that is left of them.

# %%
T, P, S = 96, 4, 8
keys = jax.random.split(jax.random.key(1), 4)
x = jax.random.normal(keys[0], (1, T, 1, P))
dt = jax.nn.softplus(2 * jax.random.normal(keys[1], (1, T, 1)) - 2)
K, Q = (jax.random.normal(key, (1, T, 1, S)) for key in keys[2:])
rate = jnp.asarray([-1.0])
y, _ = ssd(x, dt, rate, K, Q)

decay = jnp.cumsum(dt[0, :, 0] * rate[0])
L = jnp.exp(jnp.where(jnp.tri(T, dtype=bool), decay[:, None] - decay[None], -jnp.inf))
scores = L * (Q[0, :, 0] @ K[0, :, 0].T)
np.testing.assert_allclose(y[0, :, 0], scores @ (dt[0, :, 0, None] * x[0, :, 0]), atol=1e-4)

figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for axis, image, title in ((axes[0], L, "decays L"), (axes[1], jnp.abs(scores), "|L * C B^T|")):
    axis.imshow(image, cmap="Blues", vmax=1 if title == "decays L" else 4)
    axis.set_title(title)
    for edge in range(0, T, 16):
        axis.add_patch(Rectangle((edge - 0.5, edge - 0.5), 16, 16, fill=False, color="#e8871e"))
    axis.set(xlabel="j", ylabel="i")

# %% [markdown]
# ## A state that never learned to forget
#
# The state has a fixed size, and the sequence has not. A model must learn to forget, and it learns
# that only if its training sequences fill the state ("Stuffed Mamba", arXiv 2410.07145). Two small
# Mamba-2 models read a stream of pairs, key and value, and are asked for the last value of a recent
# key: one with a small state, one with a large one, both trained on rows of 16 tokens and then read
# far beyond.

# %%
TRAINED, LONG = 16, 64 if SMALL else 256
DATA = {"keys": 64, "values": 16, "window": 4}
rows = stuffed_training.make_rows("stream", DATA)
folder = pathlib.Path(tempfile.mkdtemp(prefix="tilescan-notebook-"))
workspace = Workspace(folder, folder / "models")  # each model is trained once


def trained(state_dim, length=TRAINED):
    keys = {
        "model.pattern": ("mamba2",), "model.repeats": 2, "model.d_model": 16 if SMALL else 64,
        "model.position": "none", "model.vocab_size": 81,
        "model.mixers.mamba2.state_dim": state_dim,
        "model.mixers.mamba2.head_dim": 16 if SMALL else 32,
        "data.seq_len": length, "data.batch_size": 1024 // length,
        "train.steps": 3 if SMALL else 400, "train.log_every": 1,
        "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 1 if SMALL else 40,
        "optimizer.weight_decay": 0.01,
    }
    settings = {"data": "stream", "rows": DATA, "carry": 1, "train": keys}
    return stuffed_training.trained(workspace, settings, seed=2)


def show_losses(state_dim, length=TRAINED):
    losses = [row["loss"] for row in metrics(trained(state_dim, length).folder, "train")]
    print(f"{state_dim} state dims, rows of {length}: training loss",
          ", ".join(f"{part.mean():.2f}" for part in np.array_split(losses, 10)[::3] if part.size))


batch = rows("test", 16 if SMALL else 512, LONG, (1,))


def loss_by_position(state_dim, length=TRAINED, **mitigation):
    model = trained(state_dim, length)
    config = state_collapse.with_mixer(model.config, **mitigation)
    found = state_collapse.read(config, model.params, batch["tokens"], batch["targets"], chunk=16)
    losses = state_collapse.by_position(found["nll"], batch["weights"], 8)
    return np.array(losses), found


small, large = (4, 8) if SMALL else (8, 128)
for sizes in ((small,), (large,), (large, 64)):
    show_losses(*sizes)
curves = {
    f"{small} state dims": loss_by_position(small),
    f"{large} state dims": loss_by_position(large),
    f"{large}, a window on the state": loss_by_position(large, state_window=TRAINED),
    f"{large}, trained on rows of 64": loss_by_position(large, 64),
}
places = np.arange(LONG // 8) * 8 + 8


def calmer(values):
    """Means of three buckets beyond the training length, where a bucket has few questions."""
    return np.append(values[:2], values[2:].reshape(-1, 3).mean(axis=1))


figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, (losses, _) in curves.items():
    axes[0].plot(calmer(places), calmer(losses / losses[:2].max()), label=name)
axes[0].axvline(TRAINED, color="gray", lw=0.7, ls=":")
axes[0].set(xlabel="position", ylabel="loss / greatest loss within 16 tokens", ylim=0)
axes[0].legend(frameon=False)
for name in list(curves)[:2]:
    found = curves[name][1]
    norm = np.sqrt(found["state_variance"] + found["state_mean"] ** 2).mean(axis=2)
    norm = norm.reshape(len(norm), -1).max(axis=1)
    axes[1].plot((np.arange(len(norm)) + 1) * 16, norm / norm[0], label=name)
axes[1].set(xlabel="position", ylabel="root mean square of the state, times that at 16", ylim=0)
_ = axes[1].legend(frameon=False)
ratio = {}
for name, (losses, _) in curves.items():
    within, beyond = losses[:2].max(), losses[2:]
    ratio[name] = beyond.mean() / within
    print(f"{name:27s} loss within 16 tokens {within:.3f}; beyond, {ratio[name]:.2f} times that, "
          f"at most {beyond.max() / within:.2f} times")

# %%
if not SMALL:  # three steps teach nothing
    collapsed = ratio[f"{large} state dims"]
    assert collapsed > ratio[f"{small} state dims"]
    assert collapsed > ratio[f"{large}, a window on the state"]
    assert collapsed > ratio[f"{large}, trained on rows of 64"]

# %% [markdown]
# The larger state is the better one within 16 tokens, and the one that loses most beyond them. A
# window on the state, put on after training, takes a part of that away: it forgets in the model's
# place. Longer rows teach the model itself to forget. The norms say less: the large state grows
# more than the small one, but at this size neither explodes, as the paper's do at its own.
#
# This is one seed. `configs/stuffed_mamba.py` measures several, over state sizes and lengths (see
# RESULTS.md), and `tilescan diagnose` looks for collapse in a checkpoint of your own.
