"""Mixers, layers and models under Explicit, Auto and Manual axes, and a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tilescan.decoding.sampling import generate
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.models.attention import Attention
from tilescan.models.gated_delta_net import GatedDeltaNet
from tilescan.models.gated_linear_attention import GatedLinearAttention
from tilescan.models.h3 import H3
from tilescan.models.language_model import SequenceClassifier
from tilescan.models.layers import MLP, Embedding, LayerNorm, RMSNorm
from tilescan.models.mamba import Mamba
from tilescan.models.mamba2 import Mamba2
from tilescan.models.s4 import S4, S4D
from tilescan.ops import masks
from tilescan.training import steps

B, T, E, V = 4, 6, 8, 12
X = np.random.default_rng(0).standard_normal((B, T, E), np.float32)
TOKENS = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
IDS = (np.arange(T)[None] >= np.arange(1, 1 + B)[:, None]).astype(np.int32)
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto, "manual": None}
SPLITS = ("rows", "both")
CONFIG = LanguageModelConfig(
    vocab_size=V,
    d_model=E,
    n_heads=4,
    n_kv_heads=2,
    repeats=2,
    pattern=("attention", "mlp", "mamba2"),
    mixers=dict(mamba2=dict(head_dim=4, state_dim=4)),
)

# Modules of [B, T, E]; the first column of "tensor" shards heads and channels.
MODULES = {
    "attention": Attention(4, 2, 4),
    "local attention": Attention(4, 2, 4, mask=masks.Causal() & masks.SlidingWindow(2)),
    "mamba": Mamba(E, state_dim=3),
    "mamba2": Mamba2(E, state_dim=4, head_dim=8),
    "s4": S4(E, state_dim=4),
    "s4d": S4D(E, state_dim=4),
    "h3": H3(E, head_dim=2, taps=3, state_dim=4),
    "gla": GatedLinearAttention(E, n_heads=2, gate_rank=3),
    "gated_deltanet": GatedDeltaNet(E, n_heads=2),
    "mlp": MLP("swiglu", 16),
    "rmsnorm": RMSNorm(),
    "layernorm": LayerNorm(),
    "embedding": Embedding(V, E),
    "language model": LanguageModel(CONFIG),
    "classifier": SequenceClassifier(CONFIG, 3),
}
OF_TOKENS = ("embedding", "language model", "classifier")
PACKED = {n: m for n, m in MODULES.items() if n not in ("mlp", "rmsnorm", "layernorm", "embedding")}
CUT = ("heads", "kv_heads", "mlp", "inner", "vocab")
# Of the ops in them, ops/test_axis_kinds.py and test_shard_map.py have every kind of axes.
QUICK = [(name, "explicit", "both") for name in ("mamba", "embedding")]
QUICK += [("mlp", "manual", "rows")]


def cells(names):
    grid = [(n, k, s) for n in names for k in KINDS for s in SPLITS if (k, s) != ("manual", "both")]
    return [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in grid]


def mesh_of(kind):
    types = {} if KINDS[kind] is None else dict(axis_types=(KINDS[kind],) * 2)
    return jax.make_mesh((4, 2), ("data", "tensor"), **types)


def boxes_of(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


def params_of(boxes):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: 0.4 * rng.standard_normal(a.shape).astype(np.float32), nn.unbox(boxes)
    )


def specs_of(boxes, split):
    """Parameters sharded over "tensor" by the names of their dimensions, each once."""

    def one(leaf):
        names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
        shape = leaf.value.shape if names else ()
        entries = [
            "tensor" if a in CUT and n % 2 == 0 else None for a, n in zip(names, shape, strict=True)
        ]
        first = entries.index("tensor") if "tensor" in entries else -1
        return P(*(e if i == first and split == "both" else None for i, e in enumerate(entries)))

    return jax.tree.map(one, boxes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def put(tree, mesh, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def agree(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, np.abs(b).max()), rtol=1e-5)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def everything(module, packed, total, params, x, ids):
    """(loss, y, gradients by parameters and by x)."""

    def loss(params, x):
        options = dict(segment_ids=ids) if packed else {}
        y = first(module.apply({"params": params}, x, **options))
        return total(jnp.sum(jnp.sin(y))), y

    real = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.value_and_grad(loss, (0, 1) if real else 0, has_aux=True)(params, x)


def check(name, kind, split, packed):
    module, x = MODULES[name], TOKENS if name in OF_TOKENS else X
    boxes = boxes_of(module, x)
    params, specs, rows = params_of(boxes), specs_of(boxes, split), P("data")
    run = functools.partial(everything, module, packed)
    own = lambda total: total
    want = jax.jit(functools.partial(run, own))(params, x, IDS)
    mesh = mesh_of(kind)
    call = functools.partial(run, own)
    if kind == "manual":
        call = functools.partial(run, lambda total: jax.lax.psum(total, "data"))
        grads = (P(), rows) if x is X else P()
        call = jax.shard_map(
            call, mesh=mesh, in_specs=(P(), rows, rows), out_specs=((P(), rows), grads)
        )
    with jax.set_mesh(mesh):
        at = NamedSharding(mesh, rows)
        given = put(params, mesh, specs), jax.device_put(x, at), jax.device_put(IDS, at)
        got = jax.jit(call)(*given)
    agree(got, want)
    if kind == "explicit":
        y = jax.typeof(got[0][1]).sharding.spec
        assert y[0] == "data" and set(y[1:-1]) <= {None}
        # Logits stay sharded where the head is.
        assert y[-1] == ("tensor" if name == "language model" and split == "both" else None)


@pytest.mark.parametrize(("name", "kind", "split"), cells(MODULES))
def test_values_and_gradients(name, kind, split):
    check(name, kind, split, packed=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "split"), cells(PACKED))
def test_packed_values_and_gradients(name, kind, split):
    check(name, kind, split, packed=True)


STEPS = [("explicit", "both", 1), ("explicit", "both", 2), ("explicit", "rows", 1)]
STEPS += [("auto", "both", 2), ("manual", "rows", 1)]


@pytest.mark.slow  # training/test_sharding.py has a step on a mesh of all axes
@pytest.mark.parametrize(("kind", "split", "microbatches"), STEPS)
def test_a_training_step(kind, split, microbatches):
    model = LanguageModel(CONFIG)
    tx = optax.adam(0.1)
    boxes, mesh = boxes_of(model, TOKENS), mesh_of(kind)
    params = params_of(boxes)
    batch = dict(tokens=TOKENS, targets=TOKENS[:, ::-1], weights=IDS.astype(np.float32))
    batch |= dict(segment_ids=IDS)
    state = steps.TrainState(
        np.int32(0), params, jax.jit(tx.init)(params), jax.random.key_data(jax.random.key(0))
    )
    loss = steps.make_loss(model, "language_model")
    make = functools.partial(steps.make_train_step, tx=tx, rate=lambda t: jnp.float32(0.1))
    want = jax.jit(make(loss, microbatches=microbatches))(state, batch)
    if kind == "manual":
        whole = lambda *args: jax.lax.psum(loss(*args), "data")
        step = jax.shard_map(make(whole), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    else:
        step = make(loss, microbatches=microbatches)
    specs = specs_of(boxes, split)
    moments = optax.tree.map_params(
        tx, lambda _, s: s, state.opt_state, specs, transform_non_params=lambda _: P()
    )
    specs = steps.TrainState(P(), specs, moments, P())
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, NamedSharding(mesh, P("data")))
        got = jax.jit(step)(put(state, mesh, specs), rows)
    agree(got[1], want[1])
    # Adam's first step is the sign of the gradient: where that is all but 0 it may be either.
    agree(got[0].opt_state, want[0].opt_state)
    if kind == "explicit":
        for x, spec in zip(
            jax.tree.leaves(got[0].params), jax.tree.leaves(specs.params), strict=True
        ):
            assert jax.typeof(x).sharding.spec == P(*spec, *(None,) * (x.ndim - len(spec)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_generation(kind):
    model, mesh = LanguageModel(CONFIG), mesh_of(kind)
    boxes = boxes_of(model, TOKENS)
    params = params_of(boxes)
    want = generate(model, params, TOKENS, max_new_tokens=3)
    with jax.set_mesh(mesh):
        rows = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
        sharded = put(params, mesh, specs_of(boxes, "both"))
        got = generate(model, sharded, rows, max_new_tokens=3)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    agree(got.logprobs, want.logprobs)
