# %% [markdown]
# # A sequence on eight devices
#
# A sequence that is too long for one device is sharded along time: device $p$ of $P$ holds $T/P$
# tokens. Embeddings, norms and MLPs look at one token at a time and notice nothing. The layers
# that mix over time have to send something, and what they send is what distinguishes the strategies:
#
# - **attention** needs every key that a query sees: keys travel, or heads are traded for time;
# - **a recurrence** needs one state, that of the moment before its first token.
#
# This notebook draws who holds what, who sends what to whom and when, counts the bytes in the
# compiled programs, and ends with a model that trains on eight devices as on one. The devices are
# virtual ones: eight parts of one CPU. So nothing here is about speed; values, messages, bytes and
# memory are those of real programs.

# %%
import functools
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec

from tilescan.data import sources
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.ops.attention import attention
from tilescan.ops.masks import Causal, SlidingWindow
from tilescan.ops.sequence_parallel import ATTENTION, SCAN_KINDS, layouts
from tilescan.ops.sequence_parallel.affine_scan import affine_scan
from tilescan.ops.sequence_parallel.ring_attention import rounds
from tilescan.training import sharding, steps
from tilescan.training.collectives import collectives, sent_bytes
from tilescan.training.settings import MeshConfig

SMALL = os.environ.get("TILESCAN_NOTEBOOK_SIZE", "full") == "small"
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False})
P = 8
COLORS = plt.get_cmap("tab10")(np.arange(P))
assert jax.device_count() >= P, "start Python with XLA_FLAGS as above"


def mesh_of(count):
    return jax.make_mesh((count,), ("sequence",), devices=jax.devices()[:count],
                         axis_types=(jax.sharding.AxisType.Auto,))


def over(count, function, *, result=PartitionSpec(None, "sequence")):
    """function of one device's shard, compiled for `count` devices that share dimension 1."""
    time = PartitionSpec(None, "sequence")
    return jax.jit(jax.shard_map(function, mesh=mesh_of(count), in_specs=time, out_specs=result,
                                 check_vma=False))


# %% [markdown]
# ## Who holds what
#
# Three orders of the tokens. Under a causal mask a query costs as many keys as it has before it, so
# with runs of equal length the last device has fifteen times the first one's work, and in a ring
# all wait for the slowest. **Zigzag** gives each device an early run and a late one,
# **striped** every eighth token. The order is made once, where batches are made; positions, masks
# and targets follow it.

# %%
T = 64
figure, axes = plt.subplots(3, 2, figsize=(9, 3.6), layout="constrained",
                            gridspec_kw={"width_ratios": [3, 1]})
for (strip, bars), balance in zip(axes, layouts.BALANCES, strict=True):
    held = layouts.order(T, P, balance).reshape(P, T // P)
    owner = np.empty(T, int)
    owner[held] = np.arange(P)[:, None]
    strip.imshow(COLORS[owner][None], aspect="auto", extent=(0, T, 0, 1))
    strip.set(title=f"{balance}: the device of each token", yticks=[], xlim=(0, T))
    work = (held + 1).sum(1)
    bars.bar(range(P), work / work.sum() * P, color=COLORS)
    bars.axhline(1, color="0.4", lw=0.8)
    bars.set(title="causal work / mean", xticks=range(P), ylim=(0, 2.1))
    print(f"{balance:10s} the busiest device has {work.max() / work.mean():.2f} of the mean")
axes[2, 0].set(xlabel="position")
_ = axes[2, 1].set(xlabel="device")

# %% [markdown]
# ## Ring attention: round by round
#
# Queries stay. In round $r$ device $p$ has the keys of device $p - r$, attends to them, and hands
# them on while it does. What of those keys the mask lets it see is drawn below: one square is one
# device in one round, the color says whose keys it has, and how much of the square is filled, how
# many of the pairs of query and key are to be computed.

# %%
def visible(mask, balance, T=64):
    """[P, rounds]: the share of the pairs that device p computes in round r, and whose keys."""
    held = layouts.order(T, P, balance).reshape(P, T // P)
    owner = (np.arange(P)[:, None] - np.arange(rounds(mask, P, T // P, balance))) % P
    pairs = mask(held[:, None, :, None], held[owner][:, :, None, :])
    return np.asarray(pairs).mean((2, 3)), owner


def draw(axis, mask, balance):
    share, owner = visible(mask, balance)
    for p in range(P):
        for r in range(share.shape[1]):
            axis.add_patch(plt.Rectangle((r, p), 0.9, 0.9, fc="0.95", ec="none"))
            axis.add_patch(plt.Rectangle((r, p), 0.9, 0.9 * share[p, r], fc=COLORS[owner[p, r]]))
    slowest = share.max(0).sum() / share.sum(1).mean()
    axis.set(xlim=(0, P), ylim=(P, 0), xlabel="round", yticks=np.arange(P) + 0.45,
             yticklabels=range(P), xticks=np.arange(P) + 0.45, xticklabels=range(P),
             title=f"{balance}:\n{slowest:.2f} of the mean")
    return slowest


figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.9), sharey=True, layout="constrained")
waits = {b: draw(a, Causal(), b) for a, b in zip(axes, layouts.BALANCES, strict=False)}
draw(axes[3], Causal() & SlidingWindow(11), "contiguous")
axes[3].set_title("a window of 12:\n3 rounds are enough")
_ = axes[0].set(ylabel="device")
assert waits["zigzag"] < 1.2 < waits["contiguous"]
assert visible(Causal() & SlidingWindow(11), "contiguous")[0].shape[1] == 3

# %% [markdown]
# The number is the sum over rounds of the busiest device's work, over the mean: no device gets new keys
# before all have passed theirs on. Contiguous runs waste half of it. Rounds that no device needs are never
# run: a window costs as many as it is long.
#
# Is it exact? Each device merges partial results by their log-sum-exp, and the gradients of keys
# travel home in a second ring. Against attention on one device, values and gradients in float32:

# %%
rng = np.random.default_rng(0)
T, H, G, D = 256, 8, 2, 16
q, k, v, weights = (jnp.asarray(rng.standard_normal((1, T, heads, D)), jnp.float32)
                    for heads in (H, G, G, H))


def loss(q, k, v, weights, attend):
    return jnp.sum(attend(q, k, v) * weights)


whole = functools.partial(attention, mask=Causal())
want = whole(q, k, v), *jax.grad(functools.partial(loss, attend=whole), (0, 1, 2))(q, k, v, weights)
for name, strategy in ATTENTION.items():
    if name == "ring_kernel":  # the ring by remote copies, which TPUs alone have
        continue
    for balance in ("contiguous",) if SMALL else ("contiguous", "zigzag"):
        order, back = layouts.order(T, P, balance), layouts.restore(T, P, balance)
        attend = functools.partial(strategy, mask=Causal(), balance=balance)
        gradients = jax.grad(functools.partial(loss, attend=attend), (0, 1, 2))
        moved = [x[:, order] for x in (q, k, v, weights)]
        got = over(P, attend)(*moved[:3]), *over(P, gradients)(*moved)
        error = max(float(jnp.abs(a[:, back] - b).max() / jnp.abs(b).max())
                    for a, b in zip(got, want, strict=True))
        print(f"{name:20s} {balance:10s} largest error of o, dq, dk, dv: {error:.1e}")
        assert error < 1e-5

# %% [markdown]
# ## What attention sends
#
# The compiled programs say what they send; `training.collectives` reads it off, loops included.
# Below, bytes that one device sends for one attention, forward and backward, in two experiments: the same
# sequence over more devices, and a sequence that grows with them, 128 tokens a device.

# %%
COUNTS = (2, 8) if SMALL else (2, 4, 8)


def sent(name, count, T, heads=8, groups=8):
    """MiB that a device sends in forward and backward; float32."""
    attend = functools.partial(ATTENTION[name], mask=Causal())
    gradients = jax.grad(functools.partial(loss, attend=attend), (0, 1, 2))
    shapes = [jax.ShapeDtypeStruct((1, T, n, D), jnp.float32) for n in (heads, groups, groups, heads)]
    program = over(count, gradients).lower(*shapes).compile()
    return sum(sent_bytes(collectives(program.as_text())).values()) / 2**20


figure, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained")
cases = (("T = 1024, 8 heads", 8, lambda n: 1024), ("T = 128 P, 8 heads", 8, lambda n: 128 * n),
         ("T = 128 P, 8 heads share 1 key head", 1, lambda n: 128 * n))
table = {}
for axis, (title, groups, length) in zip(axes, cases, strict=True):
    for (name, marker) in zip(("ring", "all_gather", "ulysses"), "os^", strict=True):
        table[title, name] = [sent(name, n, length(n), groups=groups) for n in COUNTS]
        axis.plot(COUNTS, table[title, name], marker + "-", label=name)
    axis.set(title=title, xlabel="devices", xticks=COUNTS, ylim=(0, None))
axes[0].set(ylabel="MiB sent by a device")
_ = axes[0].legend(frameon=False)
for (title, name), row in table.items():
    print(f"{title:36s} {name:10s}", " ".join(f"{n:7.3f}" for n in row))
grown = table["T = 128 P, 8 heads", "ulysses"]
assert grown[-1] < 2 * grown[0] < table["T = 128 P, 8 heads", "ring"][-1]

# %% [markdown]
# A device of a ring, or of a gather, sees all keys pass: its traffic grows with the sequence,
# however many devices share it. In Ulysses a device trades away only what it holds, so its traffic
# stays when tokens and devices grow together. With few key-value heads the picture turns: keys are
# small, and what Ulysses sends is mostly queries and outputs. A ring can also overlap its messages
# with the computation, an all-to-all cannot.
#
# ## What memory a device needs
#
# Same programs, other question: the temporary memory of a device, for one sequence of 16,384 tokens.

# %%
def mebibytes(name, count, T=2048 if SMALL else 16384):
    attend = functools.partial(ATTENTION[name], mask=Causal())
    gradients = jax.grad(functools.partial(loss, attend=attend), (0, 1, 2))
    shapes = [jax.ShapeDtypeStruct((1, T, 8, D), jnp.float32)] * 4
    program = over(count, gradients).lower(*shapes).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


names = ("ring", "ulysses", "all_gather", "ring_self_attention")
memory = {name: [mebibytes(name, n) for n in COUNTS] for name in names}
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for (name, row), marker in zip(memory.items(), "o^sd", strict=True):
    axis.loglog(COUNTS, row, marker + "-", label=name)
    print(f"{name:20s}", " ".join(f"{n:7.2f}" for n in row), "MiB on", COUNTS, "devices")
axis.set(xlabel="devices", ylabel="temporary MiB of a device", xticks=COUNTS, xticklabels=COUNTS)
axis.minorticks_off()
_ = axis.legend(frameon=False)
assert all(memory[name][-1] < memory[name][0] for name in ("ring", "ulysses"))
assert SMALL or memory["all_gather"][-1] > 0.8 * memory["all_gather"][0]

# %% [markdown]
# A ring holds its own tokens and one neighbor's keys, Ulysses the same for some heads: both fall as
# devices are added. A gather holds the keys of the whole sequence however many share it. Ring
# Self-Attention, as the paper has it, keeps rows of scores as long as the sequence: with devices
# they fall, with the length they grow by its square.
#
# ## Recurrences: a state goes from device to device
#
# A device's shard of a recurrence is one affine map of the state, $S \mapsto A_p S + S_p$: what it
# does to the state that enters, and what it adds. All devices work theirs out at once, from zeros.
# Then device $p$ needs $S_\mathrm{in}(p)$, the maps before it in a row. There are four schedules. Here
# they are played through in plain Python, with nothing but the messages that are drawn, and their
# results compared with those of the real ops.

# %%
def chain(A, S):
    """Each waits for the one before it (LASP)."""
    S_in, messages = np.zeros_like(S), []
    for p in range(P - 1):
        S_in[p + 1] = A[p] * S_in[p] + S[p]
        messages.append((p, p + 1, p, p + 1))
    return S_in, messages


def all_gather(A, S):
    """All maps to every device, which then folds those before it (LASP-2)."""
    S_in, messages = np.zeros_like(S), []
    for q in range(P):
        for p in range(q):
            S_in[q] = A[p] * S_in[q] + S[p]
            messages.append((0, P - 1, p, q))
    return S_in, messages


def log_step(A, S):
    """After messages over 1, 1, 2, 4 devices every device has all maps before it (Hillis, Steele)."""
    before = lambda x, d: np.concatenate([np.zeros_like(x[:d]), x[:-d]])
    messages = [(0, 1, p, p + 1) for p in range(P - 1)]
    A, S, distance, tick = before(A, 1), before(S, 1), 1, 1
    while distance < P - 1:
        messages += [(tick, tick + 1, p, p + distance) for p in range(1, P - distance)]
        A, S = A * before(A, distance), A * before(S, distance) + S
        distance, tick = 2 * distance, tick + 1
    return S, messages


def all_scan(A, S, K=8):
    """The chain in K blocks of the state: device p sends block t - p while others send theirs (ZeCO)."""
    S_in, messages, rows = np.zeros_like(S), [], np.split(np.arange(S.shape[1]), K)
    for t in range(P + K - 2):
        for p in range(P - 1):
            if 0 <= t - p < K:
                block = rows[t - p]
                S_in[p + 1, block] = A[p, block] * S_in[p, block] + S[p, block]
                messages.append((t / K, (t + 1) / K, p, p + 1))
    return S_in, messages


rng = np.random.default_rng(1)
A, S = np.exp(-rng.random((P, 16, 1))), rng.standard_normal((P, 16, 4))
SCHEDULES = {"chain": chain, "all_gather": all_gather, "log_step": log_step, "all_scan": all_scan}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True, layout="constrained")
ends = {}
for axis, kind in zip(axes, SCHEDULES, strict=True):
    S_in, messages = SCHEDULES[kind](A, S)
    scan = lambda A, S, kind=kind: affine_scan(jnp.log(A[:, 0]), S[:, 0], kind=kind)[0][:, None]
    # Dimension 1 is the one that is sharded: one row of it a device.
    of_op = over(P, scan)(*(jnp.asarray(x.swapaxes(0, 1), jnp.float32) for x in (A, S)))
    np.testing.assert_allclose(of_op.swapaxes(0, 1), S_in, atol=1e-5)
    for start, end, p, q in messages:
        axis.annotate("", (end, q), (start, p),
                      arrowprops={"arrowstyle": "->", "color": COLORS[p], "lw": 0.9})
    ends[kind] = max(m[1] for m in messages)
    axis.set(title=f"{kind}: {ends[kind]:.3g}", xlim=(0, P), ylim=(P - 0.5, -0.5), xlabel="time",
             yticks=range(P))
_ = axes[0].set(ylabel="device")
assert set(SCHEDULES) == set(SCAN_KINDS) and min(ends, key=ends.get) == "all_scan"

# %% [markdown]
# Time is counted in states that pass over one link, a model without the cost of starting a message:
# that is what makes `log_step` good for small states on many devices, and pipelined `all_scan` for
# large ones. In the compiled programs every device runs the same loop and sends in each round,
# needed or not, which is what the next table counts (the TPU kernel of All-Scan sends only what is
# needed).

# %%
for kind in SCAN_KINDS:
    scan = lambda A, S, kind=kind: affine_scan(jnp.log(A[:, 0]), S[:, 0], kind=kind)[0][:, None]
    shapes = [jax.ShapeDtypeStruct((64, P, n), jnp.float32) for n in (1, 64)]
    found = collectives(over(P, scan).lower(*shapes).compile().as_text())
    messages = sum(c.times for c in found)
    states = sum(sent_bytes(found).values()) / (4 * 64 * 64)
    print(f"{kind:10s} {messages:3d} messages, {states:5.2f} states sent by a device")

# %% [markdown]
# ## A model on eight devices
#
# For a model it is two settings. A hybrid of Mamba-2 and attention reads the source code of Python's
# standard library; `mesh.sequence` says how many devices share each row. What a training step sends:

# %%
T = 64 if SMALL else 256
STEPS = 3 if SMALL else 40
model = LanguageModel(LanguageModelConfig(
    vocab_size=256, d_model=64, pattern=("mamba2", "mlp", "attention", "mlp"), repeats=1,
    n_heads=4, n_kv_heads=2, mixers={"mamba2": {"state_dim": 16, "head_dim": 16}},
    attention_sequence_parallel="ring", scan_sequence_parallel="all_scan",
))
text = np.frombuffer("".join(d.text for d in sources.load("python_stdlib")[:20]).encode(), np.uint8)


def batches(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - T - 1, rows)
        tokens = np.stack([text[s : s + T + 1] for s in starts]).astype(np.int32)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:],
               "weights": np.ones((rows, T), np.float32)}


tx = optax.adamw(2e-3)
step = steps.make_train_step(steps.make_loss(model, "language_model"), tx, lambda _: 2e-3)


def train(count):
    """(losses, gradient norms, the compiled step) with rows sharded over `count` devices."""
    mesh = sharding.make_mesh(MeshConfig(data=1, sequence=count), jax.devices()[:count])
    with sharding.use(mesh):
        stream = (sharding.put_batch(batch, mesh) for batch in batches())
        first = next(stream)
        make = lambda: nn.unbox(steps.init_state(model, tx, first, seed=0))
        state = jax.device_put(make(), sharding.replicated(mesh))
        program = jax.jit(step).lower(state, first).compile()
        rows = []
        for batch, _ in zip(stream, range(STEPS)):
            state, metrics = program(state, batch)
            rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(rows), program


alone, _ = train(1)
together, program = train(P)
kinds = {}
for c in collectives(program.as_text()):
    runs, amount = kinds.get(c.kind, (0, 0))
    kinds[c.kind] = runs + c.times, amount + c.sent_bytes
for kind, (runs, amount) in kinds.items():
    print(f"{kind:20s} {runs:4d} runs, {amount / 2**10:8.1f} KiB sent by a device")

# %% [markdown]
# Permutations are the ring, the states and the last tokens that a short convolution reads across a
# border; all-reduces add up gradients of parameters and sums of the loss. Does it learn the same?

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(alone[:, 0], lw=4, color="0.8", label="one device")
left.plot(together[:, 0], color=COLORS[3], label="eight devices")
left.set(xlabel="update", ylabel="loss (nats a byte)")
left.legend(frameon=False)
difference = np.abs(together / alone - 1)
right.semilogy(difference[:, 0] + 1e-9, label="loss")
right.semilogy(difference[:, 1] + 1e-9, label="norm of the gradient")
right.set(xlabel="update", ylabel="relative difference")
_ = right.legend(frameon=False)
print(f"max relative difference: {difference[0].max():.1e} in the first update, "
      f"{difference[:, 0].max():.1e} in the loss later")
assert difference[0].max() < 1e-5
assert difference[:, 0].max() < 1e-4
if not SMALL:
    assert alone[-5:, 0].mean() < alone[:5, 0].mean() - 1

# %% [markdown]
# The updates are the same but for the order of float32 sums. What rounding does later depends on the
# task: each update starts from the one before, and where learning is abrupt, two orders of summation
# diverge in the end, on one device as well. In float64 the tests hold the ops to 1e-12.
#
# From here: `docs/sequence_parallel.md` says which mixers, strategies and orders go together,
# `tilescan plan` compiles a training step for TPU slices and counts its bytes, and
# `configs/ulysses.py`, `zeco.py` and `ring_self_attention.py` measure the papers.
