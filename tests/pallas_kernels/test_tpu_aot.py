"""The TPU kernels compile, ahead of time, for TPUs that are not attached."""

import json

import pytest

from tilescan.benchmarks import tpu_static
from tilescan.ops import attention_tpu
from tilescan.planning import aot_tpu
from tilescan.planning.aot_tpu import Job

pytestmark = pytest.mark.skipif(
    not aot_tpu.available(), reason="libtpu is not installed (extra dev)"
)
FORWARD, DQ, DKV = "flash_attention_forward", "flash_attention_dq", "flash_attention_dkv"
CASES = {
    "causal": {"gradient": True, "T": 2048, "S": 2048, "D": 128},
    "everything": {
        "gradient": True, "T": 200, "S": 300, "H": 4, "G": 2, "D": 80, "dtype": "float32",
        "bias": True, "traced_offset": True, "logit_cap": 5.0, "implementation": "pallas",
    },
    "packed": {"gradient": True, "B": 2, "mask": "packed"},
    "lists": {"gradient": False, "mask": "sinks 4 + window 512"},
    "dropout": {
        "gradient": True, "dropout_rate": 0.1, "dropout_seed": 7, "implementation": "pallas",
    },
    "decode": {"gradient": False, "T": 1, "S": 1000, "implementation": "pallas"},
}  # fmt: skip


# All cases on one generation only, for time; "everything" and "lists" are all kernels and walks.
AT_ONCE = {"v5e": ("everything", "lists")}
SLOW = {"v5e": tuple(CASES), "v5p": ("causal", "lists"), "v6e": ("causal", "packed")}
SLOW |= {name: ("causal",) for name in aot_tpu.TOPOLOGIES if name not in SLOW}


@pytest.mark.parametrize(
    ("generation", "names"),
    [*AT_ONCE.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items())],
)
def test_public_op_compiles_to_the_kernels(generation, names):
    """Forward and gradient of `ops.attention`; the compiler is a process of its own."""
    jobs = [Job("tilescan.benchmarks.tpu_static:public", CASES[name]) for name in names]
    results = aot_tpu.compile_jobs(jobs, generation, profile=False)
    for name, result in zip(names, results, strict=True):
        assert "custom_calls" in result, (name, result)
        calls = {call.split(".")[0] for call in result["custom_calls"]}
        assert calls >= ({FORWARD, DQ, DKV} if CASES[name]["gradient"] else {FORWARD}), name
        assert 0 < result["vmem"] <= attention_tpu.VMEM_LIMIT, name


@pytest.mark.slow
def test_too_large_a_tile_is_refused():
    """The check on VMEM can fail: tiles of 4096 within 16 MiB."""
    kwargs = {"kernel": "forward", "mask": "full", "tile": [2048, 2048, 512], **tpu_static.SHAPE}
    job = Job("tilescan.benchmarks.tpu_static:ours", kwargs | {"vmem_limit": 8 * 2**20})
    (result,) = aot_tpu.compile_jobs([job], "v5e", profile=False)
    assert "E1001" in result["error"], result


def test_committed_cycles_are_what_the_compiler_says():
    """One cheap row of the committed table, compiled anew."""
    record = json.loads(tpu_static.RESULTS.read_text())
    (row,) = (
        row
        for row in record["rows"]
        if (row["implementation"], row["kernel"], row["mask"], row["generation"])
        == ("tilescan", "dq", "window 512", "v6e")
    )
    kwargs = {key: row[key] for key in ("kernel", "mask", "tile")} | row["shape"]
    (result,) = aot_tpu.compile_jobs([Job("tilescan.benchmarks.tpu_static:ours", kwargs)], "v6e")
    (cycles,) = (n for name, n in result["cycles"].items() if name.startswith(DQ))
    assert abs(cycles - row["cycles"]) <= 0.02 * row["cycles"]
    assert row["tile"] == tpu_static.default_tile("dq", "v6e", "window 512")


def test_committed_table_beats_the_stock_kernel():
    """Forward, and dQ with dK/dV, on every generation: at most the cycles of JAX's own kernel."""
    rows = json.loads(tpu_static.RESULTS.read_text())["rows"]
    cycles = lambda name, kernel, mask, generation, heads=2: sum(
        row["cycles"]
        for row in rows
        if (row["implementation"], row["kernel"], row["mask"], row["generation"])
        == (name, kernel, mask, generation)
        and (row["source"], row["shape"]["H"]) == ("static profile", heads)
    )
    for generation in aot_tpu.PROFILED:
        for mask in ("full", "causal"):
            key = (mask, generation)
            assert 0 < cycles("tilescan", "forward", *key) <= cycles("jax flash", "forward", *key)
            # On v5p the profiler has no model for what XLA does around two stock heads.
            key += (1 if generation == "v5p" else 2,)
            ours = cycles("tilescan", "dq", *key) + cycles("tilescan", "dkv", *key)
            assert 0 < ours <= cycles("jax flash", "backward", *key)


def test_unknown_generation_is_named():
    with pytest.raises(ValueError, match="v5e"):
        aot_tpu.compile_jobs([], "v5litepod")
