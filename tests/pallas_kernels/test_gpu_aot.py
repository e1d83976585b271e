"""The GPU attention kernels compiled for an H100, where a CUDA plugin is installed."""

import pytest

from tilescan.planning import aot_gpu

BASE = {"batch": 1, "length": 1024, "heads": 2, "kv_heads": 2, "dtype": "bfloat16"}
LIMIT = 232448  # bytes of shared memory that a thread block may have
BIAS = (1, 2, 1024, 1024)


def compile_one(**job):
    if aot_gpu.cuda_python() is None:
        pytest.skip("no CUDA plugin: name an interpreter with one by TILESCAN_CUDA_PYTHON")
    return aot_gpu.compile_jobs([{**BASE, **job}])[0]


@pytest.mark.parametrize(
    ("dim", "job"),
    [
        (64, {"mask": "packed", "logit_cap": 30.0}),
        (128, {"mask": "causal"}),
        (128, {"mask": "packed", "logit_cap": 30.0}),
        (128, {"mask": "packed", "logit_cap": 30.0, "bias": BIAS}),
        (192, {"mask": "prefix", "value_dim": 128}),
        (192, {"mask": "causal", "value_dim": 128, "bias": BIAS}),
        (240, {"mask": "causal", "value_dim": 256}),
        (256, {"mask": "packed", "logit_cap": 30.0}),
        (256, {"mask": "packed", "logit_cap": 30.0, "bias": BIAS}),
    ],
    ids=str,
)
def test_compiles_without_spills(dim, job):
    kernels = compile_one(kernel="op", head_dim=dim, **job)["kernels"]
    names = ["dkv", "dq", "forward"] if dim <= 128 else ["dk", "dq", "dv", "forward"]
    assert sorted(report["name"] for report in kernels) == [f"flash_{name}" for name in names]
    for report in kernels:
        assert report["spill_stores"] == report["spill_loads"] == 0, report
        assert report["shared_memory"] <= LIMIT
        assert report["loop"]["hgmma"] > 0
        assert not report["warnings"]


def test_too_much_shared_memory_is_reported():
    blocks = {"block_q": 128, "block_k": 128, "stages": 8}
    report = compile_one(kernel="forward", head_dim=128, mask="full", blocks=blocks)
    assert "shared memory" in report["error"]


def test_main_loop_ignores_the_way_around_a_barrier():
    listing = "\n".join(
        [
            " -:-:-:Y:01 /*0000*/ MOV R1, R2 ;",
            ".L_x_0:",
            " -:-:-:Y:04 /*0010*/ @!P0 BRA `(.L_x_2) ;",
            ".L_x_1:",
            " -:-:-:Y:02 /*0020*/ HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;",
            " -:-:-:Y:03 /*0030*/ MUFU.EX2 R3, R3 ;",
            " -:-:-:Y:05 /*0040*/ @P1 BRA `(.L_x_0) ;",
            " -:-:-:Y:05 /*0050*/ EXIT ;",
            ".L_x_2:",
            " -:-:-:Y:01 /*0060*/ SYNCS.PHASECHK P0, [R1] ;",
            " -:-:-:Y:01 /*0070*/ @!P0 BRA `(.L_x_2) ;",
            " -:-:-:Y:01 /*0080*/ BRA `(.L_x_1) ;",
        ]
    )
    loop = aot_gpu.main_loop(listing)
    assert loop["hgmma"] == 1
    assert loop["mufu"] == 1
    assert loop["issue_cycles"] == 4 + 2 + 3 + 5 + 1  # and the last branch of the detour
