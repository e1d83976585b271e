"""The cases and peers of benchmarks.attention; run as a program, one of them once, for its memory.

    python -m tilescan.benchmarks.attention_cases tilescan '{"T": 16384, "direction": "fwd"}'

imports little else, so that the peak that it prints is attention's own.

Dimensions: B batch, T time, H heads, D head dim.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tilescan.benchmarks.attention_flops import attention_flops, window_flops
from tilescan.benchmarks.environment import peak_memory_mb
from tilescan.ops import attention, masks

WINDOW = 512
# jax.nn and tokamax's XLA code hold all T x T scores: 8 GB in 8 heads at 16384.
LONGEST_DENSE = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of self-attention; mask is "causal" or "window"."""

    T: int
    direction: str
    mask: str = "causal"
    B: int = 1
    H: int = 8
    D: int = 64
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The case in words, as tables name it."""
        return f"{self.mask} {self.direction} T={self.T}"

    @property
    def flops(self) -> float:
        """FLOPs of the case as FlashAttention-2 counts them."""
        if self.mask == "causal":
            shape = self.B, self.T, self.T, self.H, self.D
            return attention_flops(*shape, causal=True, direction=self.direction)
        return window_flops(self.B, self.T, WINDOW, self.H, self.D, direction=self.direction)


SHAPES = {
    "default": [
        Case(1024, "fwd"),
        Case(1024, "fwd+bwd"),
        Case(4096, "fwd"),
        Case(4096, "fwd+bwd"),
        Case(16384, "fwd"),
        Case(16384, "fwd", "window"),
        Case(16384, "fwd+bwd"),
        Case(16384, "fwd+bwd", "window"),
    ],
    "quick": [Case(512, "fwd"), Case(512, "fwd+bwd"), Case(2048, "fwd", "window")],
}


def ours(
    case: Case, q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Returns this project's attention."""
    mask = masks.Causal() if case.mask == "causal" else masks.SlidingWindow(WINDOW)
    return attention(q, k, v, mask=mask)


def jax_nn(
    case: Case, q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Returns `jax.nn.dot_product_attention`."""
    window = None if case.mask == "causal" else (WINDOW, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)


def tokamax(
    case: Case, q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Returns tokamax's attention, by the implementation that it chooses."""
    import tokamax

    window = None if case.mask == "causal" else (WINDOW, 0)
    return tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)


def ringattention(
    case: Case, q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"]
) -> Float[Array, "B T H D"]:
    """Returns the blockwise attention of ringattention, on a ring of one device, tiles of 512.

    The package does not import with today's JAX, so its one plain file is loaded by itself.
    """
    package = importlib.util.find_spec("ringattention").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("_ring", f"{package}/ringattention_jax.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tile = min(512, case.T)
    blockwise = dict(
        causal_block_size=1, query_chunk_size=tile, key_chunk_size=tile, deterministic=True,
        dropout_rng=None, attn_pdrop=0.0, dtype=q.dtype, precision=None, prevent_cse=False,
        policy=jax.checkpoint_policies.nothing_saveable,
    )  # fmt: skip
    ring = lambda q, k, v: module.ring_attention(q, k, v, None, None, None, "ring", True, blockwise)
    whole = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(ring, mesh=mesh, in_specs=(whole,) * 3, out_specs=whole, check_vma=False)(
        q, k, v
    )


JAX_PEERS = {
    "tilescan": ours,
    "jax.nn": jax_nn,
    "tokamax": tokamax,
    "ringattention": ringattention,
}


def inputs(case: Case) -> list[Float[Array, "B T H D"]]:
    """Returns q, k, v and, for a backward pass, the cotangent, made one by one: they are most of
    the memory of a long case.
    """
    rng = np.random.default_rng(0)
    shape = (case.B, case.T, case.H, case.D)
    make = lambda: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(case.dtype)
    return [make() for _ in range(3 if case.direction == "fwd" else 4)]


def jitted(peer: str, case: Case) -> Callable[..., tuple]:
    """Returns the jitted (o,) of (q, k, v), or (o, dq, dk, dv) of (q, k, v, do)."""
    forward = functools.partial(JAX_PEERS[peer], case)
    if case.direction == "fwd":
        return jax.jit(lambda q, k, v: (forward(q, k, v),))

    def both(q, k, v, do):
        o, pullback = jax.vjp(forward, q, k, v)
        return o, *pullback(do)

    return jax.jit(both)


def main() -> None:
    """Runs one case of one peer once, and prints the process's peak memory as JSON."""
    peer, case = sys.argv[1:]
    case = Case(**json.loads(case))
    arrays = inputs(case)
    compiled = jitted(peer, case).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    print(json.dumps({"peak_mb": round(peak_memory_mb(), 1)}))


if __name__ == "__main__":
    main()
