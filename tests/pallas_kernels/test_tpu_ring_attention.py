"""A ring whose transfers run inside kernels: right, free of races, and what programs hold."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tilescan.benchmarks import sequence_parallel_static
from tilescan.ops import masks
from tilescan.ops.attention import attention
from tilescan.ops.sequence_parallel import layouts, ring_attention
from tilescan.ops.sequence_parallel.ring_attention_tpu import Transfers
from tilescan.pallas_kernels.tpu import ring_attention as kernels
from tilescan.planning import aot_tpu

TIME = P(None, "sequence")


def mesh_of(n):
    return jax.make_mesh((n,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:n])


def transfers(cores=1, copies="eager"):
    """Kernels interpreted with races looked for.

    Copies are made when they are started, so that reading too early is seen, or ("on_wait") when
    they are waited for, so that overwriting the source too early is.
    """
    races = pltpu.InterpretParams(
        detect_races=True,
        on_race="raise",
        dma_execution_mode=copies,
        num_cores_or_threads=cores,
    )
    return dataclasses.replace(Transfers.along("sequence", races), cores=cores)


def on_devices(n, mask, balance, cores=1, copies="eager", by="kernel", **options):
    """attend(q, k, v, ids) of whole sequences, in their order, by n devices."""

    def part(q, k, v, ids):
        seen = mask if ids is None else mask & masks.Segments(ids)
        sender = transfers(cores, copies) if by == "kernel" else None
        return ring_attention(
            q, k, v, mask=seen, balance=balance, return_lse=True, transfers=sender, **options
        )

    def attend(q, k, v, ids):
        T = q.shape[1]
        order, back = layouts.order(T, n, balance), layouts.restore(T, n, balance)
        move = lambda x: None if x is None else x[:, order]
        specs = (TIME, TIME, TIME, None if ids is None else TIME)
        call = jax.shard_map(part, mesh=mesh_of(n), in_specs=specs, out_specs=TIME, check_vma=False)
        return tuple(x[:, back] for x in call(*map(move, (q, k, v, ids))))

    return attend


def inputs(T, H=2, G=1, D=16, dtype=jnp.float32, B=1):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (H, D), (G, D), (G, D), (H, D)
    q, k, v, do = (
        jax.random.normal(key, (B, T, *shape), dtype)
        for key, shape in zip(keys, shapes, strict=False)
    )
    return q, k, v, do, jax.random.normal(keys[4], (B, T, H), jnp.float32)


def packed_ids(T, B):
    """Documents that begin inside shards and run over several."""
    return jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (B, T)), axis=1), jnp.int32)


def results(attend, q, k, v, ids, do, dlse, gradient=True):
    def run(q, k, v):
        if not gradient:
            return attend(q, k, v, ids)
        out, pull = jax.vjp(lambda *x: attend(*x, ids), q, k, v)
        return out, pull((do.astype(out[0].dtype), dlse.astype(out[1].dtype)))

    return jax.jit(run)(q, k, v)


def by_definition(mask, q, k, v, ids, do, dlse, gradient=True, **options):
    """float64, on one device."""
    with jax.enable_x64(True):
        q, k, v, do, dlse = (jnp.asarray(x, jnp.float64) for x in (q, k, v, do, dlse))

        def attend(q, k, v, ids):
            seen = mask if ids is None else mask & masks.Segments(ids)
            return attention(q, k, v, mask=seen, return_lse=True, **options)

        return results(attend, q, k, v, ids, do, dlse, gradient)


def assert_same(
    n, mask, balance, T, *, packed=False, gradient=True, H=2, G=1, B=1, collectives=False, **options
):
    """As one device in float64 has it; with `collectives` also as the ring by collectives has."""
    arrays = inputs(T, H, G, B=B)
    arrays = *arrays[:3], packed_ids(T, B) if packed else None, *arrays[3:]
    cap = {k: v for k, v in options.items() if k == "logit_cap"}
    got = results(on_devices(n, mask, balance, **options), *arrays, gradient)
    wanted = [by_definition(mask, *arrays, gradient, **cap)]
    if collectives:
        wanted.append(results(on_devices(n, mask, balance, by="xla", **cap), *arrays, gradient))
    for want in wanted:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


def test_a_ring_by_kernels_is_attention_and_no_copy_races():
    """Each device sees its own keys and those of one other: two of three rounds."""
    assert_same(3, masks.SlidingWindow(100), "contiguous", 384, gradient=False)


CASES = [
    (4, masks.Causal(), "zigzag", 1024, dict(collectives=True)),
    (4, masks.Causal(), "contiguous", 512, dict(packed=True, collectives=True)),
    (3, masks.Causal(), "zigzag", 768, dict(packed=True, H=4, G=2, B=2)),
    (3, masks.Full(), "contiguous", 384, dict(H=2, G=2, logit_cap=5.0)),
    (4, masks.Full(), "contiguous", 512, dict(copies="on_wait")),
    (4, masks.SlidingWindow(100), "contiguous", 512, dict()),  # gradients return two hops
    (4, masks.Causal() & masks.SlidingWindow(300), "zigzag", 1024, dict()),
    (4, masks.Causal(), "striped", 512, dict()),
    (3, masks.Lambda(4, 200), "contiguous", 768, dict()),
    (2, masks.Causal() | masks.Prefix(150), "zigzag", 512, dict()),
    (1, masks.Causal(), "contiguous", 128, dict()),
    (4, masks.Causal(), "contiguous", 512, dict(cores=2)),
    (4, masks.Full(), "contiguous", 512, dict(cores=2, H=1)),  # nothing to share but tiles
]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "mask", "balance", "T", "options"), CASES)
def test_values_and_gradients_are_those_of_the_definition(n, mask, balance, T, options):
    assert_same(n, mask, balance, T, **options)


@pytest.mark.slow
def test_bfloat16_is_that_of_the_ring_by_collectives():
    """Within the precision of bfloat16; the gradients' sums are sent in float32."""
    q, k, v, do, dlse = inputs(512, dtype=jnp.bfloat16)
    run = lambda by: results(
        on_devices(2, masks.Full(), "contiguous", by=by), q, k, v, None, do, dlse
    )
    for x, y in zip(*(jax.tree.leaves(run(by)) for by in ("kernel", "xla")), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), atol=3e-2)


class Unwaited:
    """A remote copy whose receiver does not wait."""

    def __init__(self, copy):
        self.start, self.wait_send = copy.start, copy.wait_send

    def wait_recv(self):
        pass


@pytest.mark.slow  # test_tpu_all_scan.py has such a twin as well
def test_a_twin_that_does_not_wait_for_keys_is_seen_as_a_race(monkeypatch):
    real = kernels.pltpu.make_async_remote_copy
    monkeypatch.setattr(
        kernels.pltpu, "make_async_remote_copy", lambda *a, **k: Unwaited(real(*a, **k))
    )
    arrays = inputs(384)
    attend = on_devices(3, masks.SlidingWindow(100), "contiguous")
    with pytest.raises(Exception, match="(?i)race"):
        jax.block_until_ready(results(attend, *arrays[:3], None, *arrays[3:], False))
    with contextlib.suppress(Exception):  # the failure of the other devices
        jax.effects_barrier()
    pltpu.reset_tpu_interpret_mode_state()


def traced(n=4, T=256, D=64, dtype=jnp.bfloat16, mask=masks.Causal(), bias=None, **options):  # noqa: B008
    """A ring's gradient, traced for n devices with T tokens each."""
    x = jax.ShapeDtypeStruct((1, n * T, 2, D), dtype)

    def total(q, k, v):
        part = functools.partial(
            ring_attention, mask=mask, bias=bias, transfers="kernel", **options
        )
        call = jax.shard_map(part, mesh=mesh_of(n), in_specs=TIME, out_specs=TIME, check_vma=False)
        return jnp.sum(call(q, k, v).astype(jnp.float32))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(x, x, x)


def test_a_program_for_tpus_has_kernels_and_no_collectives():
    text = traced(balance="zigzag").lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 6 and "collective_permute" not in text


def test_a_twin_without_the_barrier_is_refused(monkeypatch):
    """By JAX when it is lowered: interpreted devices start a kernel together, without a race."""

    def start(self, refs):
        for copy in self._copies(refs):
            copy.start()

    monkeypatch.setattr(kernels.Carry, "_start", start)
    with pytest.raises(Exception, match="(?i)barrier"):
        traced(balance="zigzag").lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(D=8), "head dim D=8; 16 to 256"),
        (dict(T=192, balance="zigzag"), "multiples of 128 have a kernel: pad"),
        (dict(dtype=jnp.float16), "bfloat16 and float32"),
        (dict(bias=np.zeros((1, 1, 1, 1024), np.float32)), "bias has no kernel"),
        (dict(mask=masks.BlockSparse(np.ones((8, 8), bool), 128)), "BlockSparse has no kernel"),
        (dict(implementation="xla"), '"pallas" or None'),
        (dict(), "lowered for cpu"),
    ],
)
def test_errors_say_what_would_be_right(change, message):
    with pytest.raises(ValueError, match=r'transfers="kernel"') as error:
        traced(**change).lower()
    assert message in str(error.value) and 'transfers="xla"' in str(error.value)


def test_an_unknown_way_is_named():
    call = jax.shard_map(
        functools.partial(ring_attention, transfers="rdma"), mesh=mesh_of(2), in_specs=TIME,
        out_specs=TIME, check_vma=False,
    )  # fmt: skip
    x = jnp.zeros((1, 256, 2, 16))
    with pytest.raises(ValueError, match="'xla', 'kernel' or None"):
        jax.eval_shape(call, x, x, x)


needs_libtpu = pytest.mark.skipif(not aot_tpu.available(), reason="libtpu is not installed")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_compiles_for_slices(topology):
    """Kernels alone send keys and gradients; on v5p two cores share them."""
    rows = []
    jobs = [(topology, op) for op in ("ring_kernels", "ring")]
    sequence_parallel_static.rows_of(jobs, rows.append, tokens=512)
    ours, collectives = rows
    assert "error" not in ours and "error" not in collectives, rows
    assert ours["collectives"] == [] and collectives["collectives"] != []
    # As many bytes by kernels as by collectives.
    assert ours["remote_copies"] == collectives["sent_bytes"] > 0
    assert ours["cores"] == (2 if topology.startswith("v5p") else 1)


def test_committed_rows_are_of_the_same_bytes():
    rows = json.loads(sequence_parallel_static.RESULTS.read_text())["rows"]
    of = lambda op: {r["topology"]: r for r in rows if r["op"] == op}
    ours, collectives = of("ring_kernels"), of("ring")
    assert ours.keys() == collectives.keys()
    for topology, row in ours.items():
        assert row["collectives"] == [] and row["sent_bytes"] == 0
        assert row["remote_copies"] == collectives[topology]["sent_bytes"]
