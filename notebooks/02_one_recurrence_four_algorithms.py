# %% [markdown]
# # One recurrence, four algorithms
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
#
# State space models (S4, Mamba, Mamba-2) and linear attention carry a state through time. Stripped
# of everything else, they all compute
#
# $$ x_t = a_t\, x_{t-1} + b_t . $$
#
# It looks sequential: $x_t$ has to wait for $x_{t-1}$. It is not, and what these models can do rests
# on the freedom to compute that line in different orders: **step by step**, as a **tree**, in
# **chunks** of matrix products, or, where the decay $a$ is constant, as one **convolution**.
#
# This notebook writes each of them in a few lines of NumPy, draws who waits for whom, compares them
# with the library's, and counts what they cost. Then it asks what fits into a state of fixed size,
# and ends with a language model that is nothing but one state, read from a text of yours.
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
import functools
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from tilescan.experiments.harness.notebook_style import COLORS, use_notebook_style
from tilescan.ops import s4
from tilescan.ops.delta_rule import delta_rule
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.ssd import ssd
from tilescan.ops.state_space import diagonal_state_space

use_notebook_style()
SMALL = os.environ.get("TILESCAN_NOTEBOOK_SIZE") == "small"  # how the tests run this notebook

# %% [markdown]
# ## Part 1: four orders
#
# **Step by step**, as it is written. One number in memory, and $T$ steps that wait for each other.

# %%
def steps(a, b):
    x, out = 0.0, []
    for a_t, b_t in zip(a, b, strict=True):
        x = a_t * x + b_t
        out.append(x)
    return np.array(out)


# %% [markdown]
# **As a tree.** A step is the map $x \mapsto a x + b$. Two steps in a row are such a map again,
#
# $$ a_2 (a_1 x + b_1) + b_2 = (a_1 a_2)\, x + (a_2 b_1 + b_2), $$
#
# so a pair $(a, b)$ can stand for any number of steps, and pairs can be grouped in any way: the
# operation is associative. In the version of Hillis and Steele each pair first covers 1 step; then
# it merges with the pair 1 to the left and covers 2, with the pair 2 to the left and covers 4, and
# after $\log_2 T$ rounds it covers all steps up to its own.

# %%
def combine(first, then):
    return first[0] * then[0], then[0] * first[1] + then[1]


def tree(a, b):
    distance = 1
    while distance < len(b):
        new_a, new_b = combine((a[:-distance], b[:-distance]), (a[distance:], b[distance:]))
        a, b = np.r_[a[:distance], new_a], np.r_[b[:distance], new_b]
        distance *= 2
    return b


# %% [markdown]
# **In chunks.** Unroll the recurrence over $c$ steps. With $\alpha_i = a_1 a_2 \cdots a_i$,
#
# $$ x_i = \alpha_i\, x_\mathrm{in} + \sum_{j \le i} \frac{\alpha_i}{\alpha_j}\, b_j , $$
#
# the sum is a product with a lower triangular matrix $L_{ij} = \alpha_i / \alpha_j$. Matrix products
# are what accelerators are best at, and only one state passes from chunk to chunk.

# %%
def chunks(a, b, c=4):
    x, out = 0.0, []
    for start in range(0, len(b), c):
        log_alpha = np.cumsum(np.log(a[start:start + c]))
        L = np.tril(np.exp(log_alpha[:, None] - log_alpha[None]))
        out.append(L @ b[start:start + c] + np.exp(log_alpha) * x)
        x = out[-1][-1]
    return np.concatenate(out)


# %% [markdown]
# **As a convolution.** If $a$ is constant, $L_{ij} = a^{i - j}$ depends on the distance alone: $x$ is
# $b$ convolved with $1, a, a^2, \dots$, which an FFT does in $T \log T$, without any state.

# %%
def convolution(a, b):
    assert (a == a[0]).all(), "a convolution needs a constant decay"
    return np.convolve(b, a[0] ** np.arange(len(b)))[:len(b)]


rng = np.random.default_rng(0)
T = 16
b = rng.standard_normal(T)
for a in (np.full(T, 0.9), rng.uniform(0.5, 1, T)):
    exact = steps(a, b)
    np.testing.assert_allclose(tree(a, b), exact)
    np.testing.assert_allclose(chunks(a, b), exact)
    of_library, _ = linear_recurrence(*(jnp.float32(x)[None] for x in (a, b)))
    np.testing.assert_allclose(of_library[0], exact, rtol=1e-5)
np.testing.assert_allclose(convolution(np.full(T, 0.9), b), steps(np.full(T, 0.9), b))

# %% [markdown]
# Same numbers, different orders. Below, who waits for whom, for 16 steps: time goes to the right,
# and what is further up has to be computed later. An arrow is a state (or a pair) that is handed on;
# a line is one product $L_{ij} b_j$, and all lines of a row can be computed at once.

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3.8))


def arrow(axis, start, end, color):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 2,
                                              "shrinkB": 2})


def fan(axis, columns, y, reach=None):
    for i in columns:
        for j in range(columns[0], i + 1):
            axis.plot([j, i], [y, y + 1], color=COLORS[2], lw=0.6, ls="-", marker="")


def dots(axis, x, y):
    axis.plot(x, np.broadcast_to(y, np.shape(x)), color="black", ls="", marker="o", ms=3)


for t in range(T - 1):
    arrow(axes[0], (t, t), (t + 1, t + 1), COLORS[0])
dots(axes[0], range(T), range(T))
for r in range(4):
    for t in range(2**r, T):
        arrow(axes[1], (t - 2**r, r), (t, r + 1), COLORS[1])
    dots(axes[1], range(T), r)
dots(axes[1], range(T), 4)
for c in range(4):
    fan(axes[2], range(4 * c, 4 * c + 4), 0)
    if c:
        arrow(axes[2], (4 * c - 1, c), (4 * c + 3, c + 1), COLORS[0])
    dots(axes[2], range(4 * c, 4 * c + 4), 0)
    dots(axes[2], range(4 * c, 4 * c + 4), 1)
    dots(axes[2], [4 * c + 3], c + 1)
fan(axes[3], range(T), 0)
for y in (0, 1):
    dots(axes[3], range(T), y)
for axis, title, depth in zip(axes, ("steps: 15 deep", "tree: 4 deep", "chunks: 4 deep",
                                     "convolution: 1 deep"), (15, 4, 4, 1), strict=True):
    axis.set(title=title, xlabel="time", xticks=[0, 15], yticks=range(0, depth + 1, max(1, depth // 5)))
_ = axes[0].set(ylabel="operations that wait for each other")

# %% [markdown]
# ## Part 2: the same, for S4D
#
# A real model has many channels $h$, each with a state of $N$ numbers, and reads it out:
#
# $$ x_t = \bar A\, x_{t-1} + \bar B\, u_t, \qquad y_t = 2\,\mathrm{Re}(C x_t). $$
#
# In S4D ([arXiv 2206.11893](https://arxiv.org/abs/2206.11893)) $A$ is diagonal and complex,
# $A_n = -\frac12 + i \pi n$: mode $n$ makes $n$ half turns in a unit of time, and all decay alike.
# It describes continuous time, $x' = A x + B u$. A step $\Delta$ makes it discrete (zero-order hold:
# $u$ stays constant within a step):
#
# $$ \bar A = e^{\Delta A}, \qquad \bar B = A^{-1} (e^{\Delta A} - 1) B. $$
#
# Each channel has a $\Delta$ of its own, so some channels see the last few tokens and others the
# last thousand. Modes come in conjugate pairs, of which one half is kept; hence $2\,\mathrm{Re}$.

# %%
H, N = 16, 8
A = np.broadcast_to(s4.s4d_init(2 * N, "lin"), (H, N))
np.testing.assert_allclose(A[0], -0.5 + 1j * np.pi * np.arange(N))
B, C = np.ones((H, N)), rng.standard_normal((H, N, 2)) @ [1, 1j]
log_dt = np.linspace(np.log(1e-3), np.log(1e-1), H)
Abar = np.exp(np.exp(log_dt)[:, None] * A)
Bbar = (Abar - 1) / A * B


def in_float64(u):
    """The definition, step by step: u and y are [T, H]."""
    x, ys = np.zeros((H, N), complex), []
    for u_t in u:
        x = Abar * x + Bbar * u_t[:, None]
        ys.append(2 * (C * x).sum(-1).real)
    return np.array(ys)


impulse = np.zeros((400, H))
impulse[0] = 1
response = in_float64(impulse)
figure, axes = plt.subplots(1, 3, figsize=(11, 2.8))
for axis, h, color in zip(axes, (5, 10, 15), COLORS, strict=False):
    axis.plot(response[:, h], marker="", ls="-", color=color)
    axis.set(title=f"channel {h}: $\\Delta$ = {np.exp(log_dt[h]):.3f}", xlabel="time")
_ = axes[0].set(ylabel="answer to one impulse")

# %% [markdown]
# These curves are the kernels $K_l = 2\,\mathrm{Re}(C \bar A^l \bar B)$ of the convolution. And here
# are the four algorithms again, now in JAX: the first two with its `scan` and `associative_scan`,
# the other two are the library's. (Its chunks never hold a state for each token, and its convolution
# can replace the FFT by matrix products, which suits TPUs.)

# %%
parameters = [jnp.float32(log_dt), *(jnp.complex64(x) for x in (A, B, C))]
decay, drive, read = (jnp.complex64(x) for x in (Abar, Bbar, C))


def read_out(x):
    return 2 * jnp.real(jnp.sum(read * x, -1))


@jax.jit
def scan_steps(u):
    def step(x, u_t):
        x = decay * x + drive * u_t[..., None]
        return x, read_out(x)

    x = jnp.zeros((len(u), H, N), jnp.complex64)
    return jax.lax.scan(step, x, u.swapaxes(0, 1))[1].swapaxes(0, 1)


@jax.jit
def scan_tree(u):
    b = drive * u[..., None]  # [batch, time, H, N]: a state for each token
    return read_out(jax.lax.associative_scan(combine, (jnp.broadcast_to(decay, b.shape), b), axis=1)[1])


@jax.jit
def scan_chunks(u):
    return diagonal_state_space(u, *parameters)[0]


@jax.jit
def scan_convolution(u):
    return long_convolution(u, s4.s4d_kernel(*parameters, u.shape[1]))[0]


ALGORITHMS = {"steps": scan_steps, "tree": scan_tree, "chunks": scan_chunks,
              "convolution": scan_convolution}
u = rng.standard_normal((1, 1000, H))
exact = in_float64(u[0])
for name, algorithm in ALGORITHMS.items():
    error = np.abs(algorithm(jnp.float32(u))[0] - exact).max() / np.abs(exact).max()
    print(f"{name:12s} max error {error:.1e} of the largest output, in float32")
    assert error < 3e-5
    np.testing.assert_allclose(algorithm(jnp.float32(impulse[None]))[0], response, atol=1e-4)

# %% [markdown]
# ## What they cost
#
# For one channel with $N$ states over $T$ steps, in chunks of $c$:
#
# | | work | depth | memory |
# | --- | --- | --- | --- |
# | steps | $T N$ | $T$ | $N$ |
# | tree | $T N$, a few times over | $\log T$ | $T N$ |
# | chunks | $T (c + N)$, as matrix products | $T / c$ | $T (1 + N / c)$ |
# | convolution | $T \log T$, and $T N$ for the kernel | $\log T$ | $T$ |
#
# Memory is what XLA says that the compiled program needs besides inputs and outputs. Time is
# relative to that of the steps (on a CPU, processor time of all cores together).

# %%
LENGTHS = [256, 1024] if SMALL else [256, 1024, 4096, 16384, 65536]


def mebibytes(algorithm, T):
    compiled = algorithm.lower(jax.ShapeDtypeStruct((1, T, H), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def seconds(T, runs=3 if SMALL else 9):
    """The fastest run of each algorithm; they take turns."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    u = jax.random.normal(jax.random.key(0), (1, T, H))
    times = {name: [] for name in ALGORITHMS}
    for _ in range(1 + runs):
        for name, algorithm in ALGORITHMS.items():
            start = clock()
            algorithm(u).block_until_ready()
            times[name].append(clock() - start)
    return {name: min(t[1:]) for name, t in times.items()}  # the first run compiles


memory = {name: [mebibytes(f, T) for T in LENGTHS] for name, f in ALGORITHMS.items()}
times = [seconds(T) for T in LENGTHS]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for name in ALGORITHMS:
    left.loglog(LENGTHS, memory[name], label=name)
    right.loglog(LENGTHS, [t[name] / t["steps"] for t in times])
left.set(ylabel="temporary memory, MiB", title="memory")
right.set(ylabel="time / time of steps", title="time, forward")
for axis in (left, right):
    axis.set_xticks(LENGTHS, [f"{T:,}" for T in LENGTHS])
    axis.minorticks_off()
    axis.set(xlabel="tokens")
figure.legend(loc="outside lower center", ncols=4)
for name in ALGORITHMS:
    print(f"{name:12s}", ", ".join(f"{m:8.3f}" for m in memory[name]), "MiB at", LENGTHS, "tokens")
assert memory["steps"][-1] == memory["steps"][0] and memory["chunks"][-1] < memory["tree"][-1]

# %% [markdown]
# The tree keeps a state for each token, which is what runs out of memory first; its short depth is
# worth that only with more lanes than a CPU has. Steps keep one state, and on a processor with few
# lanes they are a good method; on an accelerator they would leave nearly all of it idle. Chunks lie
# between. The convolution has no state, which is also its limit: to generate text token by token, a
# model has to go back to steps.
#
# ## Part 3: what a state is good for
#
# A state is all that later steps need of the past. So a sequence can be split anywhere: the first
# piece returns `final_state`, the second takes it as `initial_state`. Streaming, generating, training
# on pieces of a book, and sharding a sequence over devices (notebook 03) are all this one identity.

# %%
T = 120
a = jnp.complex64([0.5, 0.9, 0.98, 0.97 * np.exp(0.5j)])
b = jnp.zeros((1, T, 4), jnp.complex64).at[:, jnp.array([5, 45, 85])].set(1.0)
whole, last = linear_recurrence(a, b)
first, carried = linear_recurrence(a, b[:, :50])
second, end = linear_recurrence(a, b[:, 50:], initial_state=carried)
np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
np.testing.assert_allclose(end, last, atol=1e-6)

# %% [markdown]
# The opposite is needed where several documents are packed into one row: there each has to start
# from nothing. The library's ops take `segment_ids` for that, and exercise 1 asks how it is done.
# Below, three impulses into four channels: one that forgets at once, two slower ones, and one that
# turns while it decays. Above as one document, below as three.

# %%
ids = jnp.repeat(jnp.arange(3), 40)[None]
packed, _ = linear_recurrence(a, b, segment_ids=ids)
for i in range(3):
    alone, _ = linear_recurrence(a, b[:, 40 * i:40 * (i + 1)])
    np.testing.assert_allclose(packed[:, 40 * i:40 * (i + 1)], alone, atol=1e-6)

figure, axes = plt.subplots(2, 1, figsize=(11, 3.8), sharex=True)
for axis, x, title in ((axes[0], whole, "one document"), (axes[1], packed, "three documents, packed")):
    shown = axis.imshow(np.real(x[0]).T, aspect="auto", cmap="PuOr", vmin=-1.5, vmax=1.5)
    axis.set_yticks(range(4), ["a = 0.5", "0.9", "0.98", "0.97 $e^{i/2}$"])
    axis.set(title=title)
    axis.spines[:].set_visible(False)
for edge in (39.5, 79.5):
    axes[1].axvline(edge, color="black", lw=1)
axes[1].set(xlabel="time")
_ = figure.colorbar(shown, ax=axes, label="Re x")

# %% [markdown]
# ## Part 4: decays that the input selects
#
# Mamba-2 ([arXiv 2405.21060](https://arxiv.org/abs/2405.21060)) lets each token choose its decay, and
# makes the state a matrix: $h_t \in \mathbb{R}^{P \times N}$,
#
# $$ h_t = e^{\Delta_t A}\, h_{t-1} + \Delta_t x_t B_t^\top, \qquad y_t = h_t C_t . $$
#
# A constant decay is gone, and with it the convolution. But part 1's unrolled form stays:
#
# $$ y_i = \sum_{j \le i} L_{ij}\, (C_i \cdot B_j)\; \Delta_j x_j, \qquad
#    L_{ij} = e^{A (\Delta_{j+1} + \dots + \Delta_i)} . $$
#
# Read $C$ as queries, $B$ as keys and $\Delta x$ as values: this is attention without a softmax, with
# a mask $L$ of decays in place of zeros and ones. The same layer is a recurrence (linear in $T$) and
# a matrix (parallel). Chunks take both: the squares on the diagonal as a matrix, all that lies to
# their left through a state.

# %%
T, P, S = 96, 4, 8
keys = jax.random.split(jax.random.key(1), 4)
x = jax.random.normal(keys[0], (1, T, 1, P))
dt = jax.nn.softplus(2 * jax.random.normal(keys[1], (1, T, 1)) - 2)
B, C = (jax.random.normal(key, (1, T, 1, S)) for key in keys[2:])
y, _ = ssd(x, dt, -jnp.ones(1), B, C)

total = np.cumsum(-dt[0, :, 0])
L = np.exp(np.where(np.tri(T, dtype=bool), total[:, None] - total[None], -np.inf))
scores = L * (C[0, :, 0] @ B[0, :, 0].T)
np.testing.assert_allclose(y[0, :, 0], scores @ (dt[0, :, 0, None] * x[0, :, 0]), atol=1e-4)

h, ys = np.zeros((P, S)), []  # and step by step
for t in range(T):
    h = np.exp(-dt[0, t, 0]) * h + dt[0, t, 0] * np.outer(x[0, t, 0], B[0, t, 0])
    ys.append(h @ C[0, t, 0])
np.testing.assert_allclose(y[0, :, 0], ys, atol=1e-4)

figure, axes = plt.subplots(1, 2, figsize=(11, 5))
for axis, image, top, title in ((axes[0], L, 1, "decays $L$"),
                                (axes[1], np.abs(scores), 4, "$|L \\circ CB^\\top|$: what $y_i$ takes from $x_j$")):
    axis.imshow(image, cmap="Blues", vmin=0, vmax=top)
    axis.set(title=title, xlabel="j", ylabel="i")
    for edge in range(0, T, 16):
        axis.add_patch(Rectangle((edge - 0.5, edge - 0.5), 16, 16, fill=False, color=COLORS[1]))

# %% [markdown]
# Where a token chooses a large $\Delta$, it closes the door: everything before it is dark to all
# after it. The orange squares are chunks of 16.
#
# ## Part 5: what fits into a state
#
# Such a state is an associative memory. Drop the decay, and write pairs of a key and a value:
#
# $$ S \leftarrow S + k\, v^\top, \qquad \text{and ask: } S^\top k_i = v_i\, |k_i|^2 + \sum_{j \ne i} (k_j \cdot k_i)\, v_j . $$
#
# With keys of length 1 the first term is the answer, and the sum is noise. Random keys of dimension
# $D$ have products of about $\pm 1 / \sqrt D$, so $n$ pairs with values of length 1 make noise of
# length $\sqrt{(n - 1) / D}$: at about $n = D$ it is as large as the answer, and the state is **full**.
# Attention has no such limit, but its "state" grows with each token.
#
# A memory that is full has to forget, or to write better. The **delta rule** first reads what the
# state says for the key, and writes only the difference:
#
# $$ S \leftarrow S + \beta\, k\, (v - S^\top k)^\top . $$
#
# So a key that is written again gets the new value *in place of* the old one.

# %%
def random_keys(n, D):
    k = rng.standard_normal((n, D))
    return k / np.linalg.norm(k, axis=1, keepdims=True)


def write(S, k, v, rule):
    for k_t, v_t in zip(k, v, strict=True):
        S = S + np.outer(k_t, v_t - S.T @ k_t if rule == "delta rule" else v_t)
    return S


def written(k, v, rule, state=None):
    """The same by the library, whose arrays are [batch, time, heads, dim]."""
    k, v = (jnp.float32(x)[None, :, None] for x in (k, v))
    if rule == "delta rule":
        return delta_rule(k, k, v, jnp.ones((1, k.shape[1], 1)), initial_state=state)[1]
    return gated_linear_attention(k, k, v, initial_state=state)[1]


k, v = random_keys(50, 32), np.eye(10)[rng.integers(0, 10, 50)]
for rule in ("sum", "delta rule"):
    np.testing.assert_allclose(written(k, v, rule)[0, 0], write(np.zeros((32, 10)), k, v, rule), atol=1e-4)

# %% [markdown]
# On the left below, the noise when $n$ pairs were written by a plain sum, for three sizes of state:
# measured (markers) and as the formula has it (lines). On the right, a stream that *rewrites*: 32
# keys get new values (one of ten) again and again, and the question is for the latest one.

# %%
def recalled(S, k, v):
    return (np.argmax(k @ np.asarray(S[0, 0]), axis=1) == v.argmax(1)).mean()


def mean(measure, repeats=3 if SMALL else 20):
    return np.mean([measure() for _ in range(repeats)])


def noise(n, D):
    k, v = random_keys(n, D), np.eye(10)[rng.integers(0, 10, n)]
    return ((k @ np.asarray(written(k, v, "sum")[0, 0]) - v) ** 2).sum(1).mean()


def rewrites(times, D, rule):
    k = random_keys(32, D)
    v = np.eye(10)[rng.integers(0, 10, (times, 32))]
    return recalled(written(np.tile(k, (times, 1)), v.reshape(-1, 10), rule), k, v[-1])


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
counts, times = 2 ** np.arange(2, 10), [1, 2, 4, 8, 16]
for D, color, marker in zip((16, 64, 256), COLORS, "os^", strict=False):
    measured = [mean(lambda: noise(n, D)) ** 0.5 for n in counts]
    left.loglog(counts, measured, color=color, marker=marker, ls="", label=f"D = {D}")
    left.loglog(counts, ((counts - 1) / D) ** 0.5, color=color, marker="", ls="-", lw=1)
    np.testing.assert_allclose(measured, ((counts - 1) / D) ** 0.5, rtol=1 if SMALL else 0.25)
left.axhline(1, color="0.5", lw=0.8)
left.annotate("the answer", (4, 1), (0, 4), textcoords="offset points", color="0.4")
left.set(xlabel="pairs written", ylabel="length of the noise", title="a plain sum fills up")
left.set_xticks(counts, counts)
kept = {rule: [mean(lambda: rewrites(n, 128, rule)) for n in times] for rule in ("delta rule", "sum")}
for rule, shares in kept.items():
    right.plot(times, 32 * np.array(shares), label=rule)
right.set(xlabel="times that each key was written", ylabel="recalled, of 32",
          title="the latest value, D = 128", xscale="log", ylim=(0, 33))
right.set_xticks(times, times)
right.axhline(3.2, color="0.5", lw=0.8)
right.annotate("guessing", (1, 3.2), (0, -12), textcoords="offset points", color="0.4")
for axis in (left, right):
    axis.minorticks_off()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
assert kept["delta rule"][-1] > 0.9 and kept["sum"][-1] < 0.6

# %% [markdown]
# A decay would let the sum forget the old values, along with everything else of that age; the delta
# rule forgets what it replaces. Gated DeltaNet has both. How trained models of this kind fail when
# they never learned to forget is measured in `experiments/papers/stuffed_mamba`.
#
# ## Yours: a language model that is one state
#
# Here is all of this in use. Read a text letter by letter. The key is made of the last six letters
# (a random vector for each of the endings of one to six letters, summed, so that similar contexts
# have similar keys), the value is the letter that follows. One pass over the text with `delta_rule`,
# and the state *is* the model: no gradients, no epochs. To write, read the state at the key of the
# last six letters, sample the next one, repeat.
#
# **Put in a text of your own, a poem or a page of code, and run the two cells again.** What changes
# with `D`, with `SHARPNESS`, with the rule, with the prompt?

# %%
TEXT = """
The lighthouse keeper wrote down every ship that passed, and at night he read the list aloud so
that the sea would know it too. Nobody asked him to. The list grew longer than the tower was high.
One day he forgot the first ship, and on the same day a letter came from it. It said that the ship
had passed at night, that nobody had seen it, and that it had read of itself in the list.
"""
PROMPT = "The lighthouse"
SHARPNESS = 12  # 0: any letter is as likely as any other; large: always the best one

# %%
text = " ".join(TEXT.split())
letters = sorted(set(text))


@functools.cache
def vector(ending, D):
    return np.random.default_rng(list(ending.encode())).standard_normal(D)


def key_of(context, D):
    k = sum(vector(context[-n:], D) for n in range(1, 7))
    return k / np.linalg.norm(k)


def read_text(D, rule, passes=1):
    """The state [D, letters] after reading the text, and the share of it that the state recalls."""
    k = np.array([key_of(text[:t], D) for t in range(6, len(text))])
    v = np.eye(len(letters))[[letters.index(letter) for letter in text[6:]]]
    state = None
    for _ in range(passes):
        state = written(k, v, rule, state)
    return np.asarray(state[0, 0]), recalled(state, k, v)


def continued(state, prompt, n=100, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        score = key_of(prompt, len(state)) @ state
        p = np.exp(SHARPNESS * (score - score.max()))
        prompt += rng.choice(letters, p=p / p.sum())
    return prompt


SIZES = [16, 64] if SMALL else [16, 64, 256, 1024]
WAYS = {"sum": ("sum", 1), "delta rule": ("delta rule", 1), "delta rule, read 4 times": ("delta rule", 4)}
figure, axis = plt.subplots()
for i, (name, (rule, passes)) in enumerate(WAYS.items()):
    found = {D: read_text(D, rule, passes) for D in SIZES}
    axis.bar(np.arange(len(SIZES)) + 0.27 * (i - 1), [share for _, share in found.values()],
             width=0.25, hatch=("", "//", "..")[i], edgecolor="white", label=name)
    print(f"{name}:")
    for D in (SIZES[0], SIZES[-1]):
        print(f"  D = {D:4d}: {continued(found[D][0], PROMPT)}")
axis.set(xlabel=f"D: the state has D x {len(letters)} numbers, the text {len(text)} letters",
         ylabel="share of letters recalled", ylim=(0, 1))
axis.set_xticks(range(len(SIZES)), SIZES)
_ = axis.legend(loc="upper left", bbox_to_anchor=(1, 1))

# %% [markdown]
# A small state has no room, by whatever rule. In a large one the sum is drowned by what is frequent,
# and the delta rule writes only what is new to it. With more passes over the text it converges, as a
# model does that is trained: the update *is* a step of gradient descent on
# $\frac12 |S^\top k - v|^2$, with $\beta$ as the learning rate. What a real model has beyond this is
# that it learns its keys, values and decays.
#
# ## Exercise 1: start from nothing
#
# Documents are packed into one row. How can a recurrence start anew at the first step of each,
# *without* a change to the algorithm? Change the decays: `starts` is true where a document starts.

# %%
def decays_of_packed(a, starts):
    """Decays [T] that make x_t = a_t x_(t-1) + b_t start from nothing where `starts`, bool [T]."""
    return None  # your turn


# %%
def check_packed():
    a, b = rng.uniform(0.5, 1, (2, 40))
    ids = np.repeat([1, 2, 3], [7, 20, 13])
    starts = np.r_[True, ids[1:] != ids[:-1]]
    answer = decays_of_packed(a, starts)
    if answer is None:
        return "not yet: decays_of_packed returns None"
    wanted, _ = linear_recurrence(jnp.float32(a)[None], jnp.float32(b)[None], segment_ids=ids[None])
    for name, algorithm in (("steps", steps), ("tree", tree)):
        got = algorithm(np.asarray(answer), b)
        if not np.allclose(got, wanted[0], atol=1e-5):
            return f"not yet: {name} differs by {np.abs(got - wanted[0]).max():.2g}"
    return "right"


print(check_packed())

# %% [markdown]
# <details><summary>Solution</summary>
#
# A decay of 0 forgets everything before it. (Why does `chunks` of part 1 not survive this? It takes
# a logarithm of the decay; the library keeps logarithms, too, and masks $L$ instead.)
#
# ```python
# def decays_of_packed(a, starts):
#     return np.where(starts, 0.0, a)
# ```
#
# </details>
#
# ## Exercise 2: the gradient is the same recurrence, backwards
#
# Let a loss depend on all $x_t$, and let $g_t = \partial \mathrm{loss} / \partial x_t$ be its direct
# derivatives. What is the derivative by $b_t$, through $x_t$ and all later states? Write it with
# `steps` alone. (Only $x_{t+1}$ sees $x_t$. So how does the derivative at $t$ depend on that at
# $t + 1$?)

# %%
def gradient_of_b(a, g):
    """d loss / d b, [T], of decays a and direct derivatives g, both [T]."""
    return None  # your turn


# %%
def check_gradient():
    a, g = rng.uniform(0.5, 1, (2, 30))
    answer = gradient_of_b(a, g)
    if answer is None:
        return "not yet: gradient_of_b returns None"
    loss = lambda b: jnp.sum(g * linear_recurrence(jnp.float32(a)[None], b[None])[0][0])
    wanted = jax.grad(loss)(jnp.zeros(30))
    if not np.allclose(answer, wanted, atol=1e-4):
        return f"not yet: differs by {np.abs(answer - wanted).max():.2g} from jax.grad"
    return "right"


print(check_gradient())

# %% [markdown]
# <details><summary>Solution</summary>
#
# $\bar x_t = g_t + a_{t+1} \bar x_{t+1}$: the recurrence from the last step to the first, with decays
# that are shifted by one. And $x_t$ depends on $b_t$ with factor 1. The library's backward pass does
# just this (`linear_recurrence(..., reverse=True)`), so the gradient costs what the forward pass does.
#
# ```python
# def gradient_of_b(a, g):
#     shifted = np.r_[a[1:], 0.0]
#     return steps(shifted[::-1], g[::-1])[::-1]
# ```
#
# </details>
#
# ## Where to go from here
#
# `ops/` has each of these recurrences with one public function, and `ops/reference.py` their
# definitions. `tests/invariants` holds every token mixer to the identities of part 3. Notebook 03
# sends the state from device to device.
