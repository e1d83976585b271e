"""`tilescan plan` compiles the real training step, for devices here and for chips elsewhere."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from tilescan.cli import main as cli
from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.ops import lowering, masks
from tilescan.ops.attention import attention
from tilescan.planning import aot_gpu, aot_tpu, chips, topologies
from tilescan.planning import child as plan_child
from tilescan.planning import counts as plan_counts
from tilescan.planning import longest as plan_longest
from tilescan.planning import text as plan_text
from tilescan.planning.plan import plan
from tilescan.planning.report import pallas_kernels
from tilescan.training import config as config_lib
from tilescan.training.environment import compiler_warning, expected_compiler_warning

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
    "--config.model.d_model=64", "--config.model.n_heads=4", "--config.model.n_kv_heads=1",
    "--config.model.repeats=2", "--config.model.vocab_size=64", "--config.model.mlp_dim=128",
    "--config.data.seq_len=256", "--config.data.batch_size=8",
)  # fmt: skip
RING = (*SMALL, "--config.mesh.fsdp=2", "--config.mesh.sequence=4")
ONE_LAYER = (*SMALL, "--config.model.repeats=1", "--config.model.pattern=attention")
TENSOR = (*ONE_LAYER, "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
PAIRS = (
    *ONE_LAYER, "--config.model.attention_sequence_parallel=all_gather",
    "--config.data.seq_len=512", "--config.mesh.fsdp=4", "--config.mesh.sequence=2",
)  # fmt: skip
KERNELS = "Pallas kernels flash_attention_dkv, flash_attention_dq, flash_attention_forward\n"
TPU = pytest.mark.skipif(not aot_tpu.available(), reason="libtpu is not installed (extra dev)")


def small(*overrides, base=RING):
    config = config_lib.default_config()
    for assignment in (*base, *overrides):
        config_lib.override(config, assignment)
    return config


def child(code_or_arguments, **environment):
    """A process of its own: libtpu reads its environment once."""
    start = ["-c", code_or_arguments]
    if not isinstance(code_or_arguments, str):
        start = ["-m", "tilescan.cli.main", "plan", *code_or_arguments]
    done = subprocess.run(
        [sys.executable, *start],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
    )
    return done.returncode, done.stdout, done.stderr


def ring_bytes(B, T, R, G, D, L, size):
    """What a device of a ring sends in a step: keys, values, their gradients, and packed ids.

    Forward keys and values make R - 1 hops, backward once more, and their gradients all R, which
    brings them home. The ids, which no layer changes, go round once forward and in each layer
    backward.
    """
    keys, ids = B * T // R * G * D * size, B * T // R * 4
    return L * keys * (4 * (R - 1) + 2 * R) + ids * (R - 1) * (1 + L)


@pytest.fixture(scope="module")
def small_plan():
    return plan(small(base=PAIRS), memory=2**24)


@pytest.mark.slow
def test_the_ring_of_this_machine_sends_what_the_formula_says():
    p = plan(small(), memory=2**24)
    assert (p.devices, p.mesh) == (8, {"data": 1, "fsdp": 2, "sequence": 4, "tensor": 1})
    expected = ring_bytes(B=8 // 2, T=256, R=4, G=1, D=16, L=2, size=4)
    assert p.sent["collective-permute"]["bytes"] == expected
    assert "unknown" not in p.sent["collective-permute"]
    assert p.sent_bytes > expected  # gradients and cut parameters meet as well


def test_bytes_are_those_of_the_shards(small_plan):
    """float32; only matrices with an embedding dimension, all but the norms' scales, are cut."""
    E, V, D = 64, 64, 16
    matrices = E * 4 * D + 2 * E * D + 4 * D * E + V * E
    norms = 2 * E
    assert small_plan.parameters == matrices + norms
    assert small_plan.bytes["parameters"] == 4 * (matrices // 4 + norms)
    # Two moments, and counters that every device has.
    assert 0 <= small_plan.bytes["optimizer"] - 2 * small_plan.bytes["parameters"] <= 64
    assert small_plan.bytes["batch"] == 5 * 4 * (8 // 4) * (512 // 2)
    assert small_plan.needs >= small_plan.bytes["temporaries"] + 3 * small_plan.bytes["parameters"]


def test_the_text_names_what_fits(small_plan):
    out = plan_text.text(small_plan)
    assert "devices        8 x cpu\nmesh           fsdp 4, sequence 2\n" in out
    assert "fits: needs 0.01 of 0.02 GiB" in out and "reduce-scatter, " in out
    assert "Pallas kernels none\n" in out and "Nothing ran." in out and "bounds" not in out
    assert "parameters float32, computation float32, moments float32\n" in out
    assert "  attention: XLA (kernels are for TPUs and Hopper GPUs, not for cpu)\n" in out
    less = dataclasses.replace(small_plan, memory=small_plan.needs - 1, fits=False)
    assert plan_text.verdict(less).startswith("does not fit: needs 0.01 of 0.01 GiB")
    bounds = plan_text.text(
        dataclasses.replace(small_plan, topology="v5p:2x2x2", bounds=dict(links=1))
    )
    assert "1 s  bytes sent at 600 GB/s, all links of a chip together" in bounds


def test_an_op_says_why_it_has_no_kernel():
    half = jax.ShapeDtypeStruct((1, 8, 1, 16), "float16")
    with lowering.choices() as found:
        jax.jit(lambda q: attention(q, q, q)).trace(half).lower(lowering_platforms=("tpu",))
    why = "q, k and v are float16; bfloat16 and float32 have a kernel"
    assert found == {"attention": {"xla": why}}


def test_a_compiler_that_spills_registers_is_named(small_plan, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError
        return installed[name]

    installed = {}
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert compiler_warning("gpu") is None
    installed["nvidia-nvjitlink"] = "13.5.37"
    assert compiler_warning("cpu") is compiler_warning(None) is compiler_warning("tpu") is None
    assert expected_compiler_warning() is None  # no plugin, or JAX_PLATFORMS=cpu
    warned = plan_text.text(dataclasses.replace(small_plan, warnings=(compiler_warning("cuda"),)))
    assert "\nwarning: with nvidia-nvjitlink 13.5.37 installed, kernels for Hopper GPUs" in warned


def test_kernels_are_named_as_in_their_source():
    calls = (
        '  %flash_attention_dq.3 = (f32[1]) custom-call(%x), custom_call_target="tpu_custom_call"',
        '  ROOT %mpmd_map.7 = bf16[1] custom-call(%x), custom_call_target="mosaic_gpu_v2", '
        'metadata={op_name="jit(f)/jvp(jit(_attention))/flash_dkv/mpmd_map" stack_frame_id=1}',
        '  %other = f32[1] custom-call(%x), custom_call_target="topk"',
    )
    assert pallas_kernels("\n".join(calls)) == ["flash_attention_dq", "flash_dkv"]


def test_a_plan_as_json_holds_every_field(small_plan, capsys, monkeypatch):
    monkeypatch.setattr("tilescan.planning.plan.plan", lambda *args, **options: small_plan)
    assert cli.main(["plan", *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(dataclasses.asdict(small_plan)))
    assert told["needs"] == small_plan.needs and told["seq_len"] == small_plan.seq_len


def test_a_refusal_for_memory_is_told_in_words(small_plan, capsys):
    words = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (223.44G) exceeds available HBM (15.75G). HLO module: x.\nSee"
    )
    refused = dataclasses.replace(
        small_plan, needs=223.44 * 2**30, memory=15.75 * 2**30, at_least=True, fits=False,
        refusal=words, sent=None, bytes={k: 1 for k in ("parameters", "optimizer", "batch")},
    )  # fmt: skip
    out = plan_text.text(refused)
    assert "  does not fit: needs at least 223.44 of 15.75 GiB\n" in out
    assert "the compiler refused: RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom" in out
    assert "\nSee" not in out and "sends" not in out


@pytest.mark.slow
def test_the_longest_sequence_under_a_limit(capsys, tmp_path):
    """From a config file, with overrides; every try is printed, and lengths suit the balance."""
    file = tmp_path / "tiny.py"
    file.write_text(
        "from tilescan.training.config import default_config, override\n"
        "def get_config(size='64'):\n"
        "    config = default_config()\n"
        f"    for word in {SMALL}:\n"
        "        override(config, word)\n"
        "    config.model.repeats = 1\n"
        "    config.model.d_model = int(size)\n"
        "    return config\n"
    )
    arguments = ["plan", f"--config={file}:32", "--longest", "--memory=0.0095"]
    arguments += ["--config.model.sequence_balance=zigzag", "--config.mesh.sequence=4"]
    arguments += [
        "--config.data.seq_len=3072",
        "--config.data.batch_size=2",
        "--config.mesh.fsdp=2",
    ]
    arguments += ["--config.model.pattern=mlp"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    tries = [line for line in out.splitlines() if "tokens: " in line]
    lengths = [int(line.split()[0].replace(",", "")) for line in tries]
    fits = [" fits: " in line for line in tries]
    best = max(n for n, ok in zip(lengths, fits, strict=True) if ok)
    least = min(n for n, ok in zip(lengths, fits, strict=True) if not ok)
    assert best == 4096 and len(tries) == 4 and all(n % 1024 == 0 for n in lengths)
    assert best < least <= best + 1024
    assert f"the longest of these that fits: data.seq_len={best}\n" in out


@settings(max_examples=50, deadline=None)
@given(
    limit=strategies.integers(0, 5000),
    first=strategies.integers(1, 5000),
    resolution=strategies.floats(0, 0.5),
)
def test_the_search_ends_next_to_the_limit(limit, first, resolution):
    tried = []
    found = plan_longest.search(lambda n: tried.append(n) or n <= limit, first, resolution)
    assert found == max([n for n in tried if n <= limit], default=0)
    above = min(n for n in tried if n > limit)
    assert above - found <= max(1, resolution * above)
    assert len(tried) == len(set(tried)) <= 30


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(), masks.Full(), masks.SlidingWindow(3), masks.SlidingWindow(2, 5),
        masks.SlidingWindow(99), masks.Lambda(3, 4), masks.Lambda(9, 4), masks.Lambda(2, 99),
    ],
    ids=repr,
)  # fmt: skip
def test_visible_pairs_are_those_of_the_mask(mask):
    for T in (1, 7, 20):
        i = np.arange(T)
        seen = np.broadcast_to(mask.visible(i[:, None], i[None]), (T, T))
        assert plan_counts.visible_pairs(mask, T) == seen.sum()


def matmul_flops(jaxpr):
    """2 x products of all dot_generals, through everything that contains them but loops."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name not in ("scan", "while")
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * np.prod(eqn.outvars[0].aval.shape) * np.prod([lhs[i] for i in contracted])
        for inner in jax.tree.leaves(list(eqn.params.values())):
            total += matmul_flops(inner.jaxpr) if hasattr(inner, "jaxpr") else 0
    return total


def test_flops_of_attention_and_mlp_are_those_of_the_traced_program():
    config = LanguageModelConfig(
        vocab_size=48, d_model=32, repeats=3, n_heads=4, n_kv_heads=2, scan_layers=False,
        causal=False, attention_implementation="xla",
    )  # fmt: skip
    model, tokens = LanguageModel(config), jax.ShapeDtypeStruct((2, 16), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    traced = jax.make_jaxpr(lambda p, t: model.apply({"params": p}, t)[0])(params, tokens)
    counted = plan_counts.flops(config, params, 2, 16)
    assert counted.matmuls + counted.head + counted.attention == matmul_flops(traced.jaxpr)
    assert counted.recurrences == 0
    full = dataclasses.replace(counted, remat="full")
    again = counted.matmuls + counted.attention
    assert full.step - full.model == again and counted.step == counted.model


@pytest.mark.parametrize(
    ("kind", "entries"),
    [("mamba2", 64 * 2 * 16), ("s4d", 64 * 8), ("gla", 64 * 64 // 8), ("mamba", 64 * 2 * 16)],
)
def test_state_entries_of_recurrent_blocks(kind, entries):
    options = {
        "mamba2": {"state_dim": 16}, "mamba": {"state_dim": 16}, "s4d": {"state_dim": 8},
        "gla": {"n_heads": 4},
    }[kind]  # fmt: skip
    config = LanguageModelConfig(vocab_size=8, d_model=64, pattern=(kind,), mixers={kind: options})
    assert plan_counts.state_entries(config, kind) == entries


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.mesh.sequence=3", "--config.data.seq_len=255"), "3 does not divide the 8"),
        (("--config.mesh.data=2", "--config.mesh.fsdp=8"), "multiply to 16, but there are 8"),
        (("--topology=h100:12",), "h100:N has N GPUs, up to 8 or a multiple"),
        (("--config=nowhere.py",), "there is no file 'nowhere.py'"),
        (("--config=configs/s4.py:smoke",), "is not a training configuration"),
        (("--config=experiments/harness/html.py",), "has no get_config()"),
        (("--longest",), "how much memory has a device of topology=None? Give memory"),
    ],
)
def test_errors_say_what_would_be_right(arguments, message, capsys):
    assert cli.main(["plan", *SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("memory", [-4, 0, float("nan"), float("inf")])
def test_a_memory_that_no_device_has_is_refused(memory):
    with pytest.raises(ValueError, match=f"memory={memory} must be a number of bytes above 0"):
        plan(small(), memory=memory)


def test_gpus_need_an_interpreter_with_the_plugin(monkeypatch, capsys):
    monkeypatch.setenv("TILESCAN_CUDA_PYTHON", "/nowhere/python")
    assert cli.main(["plan", *SMALL, "--topology=h100:8"]) == 1
    err = capsys.readouterr().err
    assert "needs an interpreter with XLA's CUDA plugin" in err
    assert "TILESCAN_CUDA_PYTHON" in err and "--python" not in err  # which `plan` does not take


@pytest.mark.slow
def test_another_interpreter_answers_a_request():
    """The process that plans for GPUs, started with this interpreter and a mesh that is wrong."""
    wrong = config_lib.as_dict(config_lib.settings(small("mesh.sequence=3", "data.seq_len=255")))
    with pytest.raises(ValueError, match="6 does not divide the 1 devices"):
        plan_child.run(sys.executable, [wrong, None, None])


def test_chips_are_known_by_the_kinds_of_devices():
    kinds = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
    }  # fmt: skip
    assert {kind: chips.chip_of(kind) for kind in kinds} == {
        kind: chips.CHIPS[name] for kind, name in kinds.items()
    }
    assert chips.chip_of("cpu") is None


def test_shapes_of_gpus():
    shapes = {"h100:1": "1x1x1", "h100:8": "1x1x8", "h100:64": "1x8x8", "h100:1x2x4": "1x2x4"}
    assert {name: topologies.h100_shape(name) for name in shapes} == shapes


@TPU
def test_the_step_of_eight_tpus_runs_the_attention_kernels():
    """Packed documents on a mesh whose tensor axis does not divide the one key-value head."""
    code, out, err = child(("--topology=v5e:2x4", *TENSOR))
    assert code == 0, err[-3000:]
    assert "devices        8 x TPU v5 lite\n" in out and KERNELS in out
    assert "of 16.00 GiB" in out and "bounds of a step by the figures of TPU v5e's vendor" in out


@TPU
@pytest.mark.slow
def test_a_model_may_send_its_ring_by_kernels():
    """One setting puts the transfers of keys into the attention kernels."""
    words = ("--config.data.seq_len=1024", "--config.model.attention_sequence_parallel=ring_kernel")
    balanced = "--config.model.sequence_balance=zigzag"
    code, out, err = child(("--topology=v5e:2x4", *RING, *words, balanced))
    assert code == 0, err[-3000:]
    assert KERNELS in out and "remote copies by kernels" in out
    assert "collective-permute" not in out
    short = ("--config.data.seq_len=256", *words[1:])
    code, out, err = child(("--topology=v5e:2x4", *RING, *short))
    assert code and "multiples of 128 have a kernel" in err and 'sequence_parallel="ring"' in err


TPU_CODE = """
import dataclasses, json
from tilescan.planning.plan import plan
from tilescan.training import config as config_lib
def planned(*more):
    config = config_lib.default_config()
    for word in RING + ("precision.compute_dtype=float32",) + more:
        config_lib.override(config, word)
    print(json.dumps(dataclasses.asdict(plan(config, "v5e:2x4"))))
planned()
planned("data.seq_len=1048576", "data.batch_size=64")
planned("model.pattern=mamba2")
for topology, mesh in [("v5e:7x9", {}), ("v99:2x2", {}), ("v5e:1x1", dict(fsdp=2)),
                       ("v5p:4x4x4", dict(fsdp=8, sequence=8))]:
    try:
        plan(dict(mesh=mesh), topology)
    except ValueError as error:
        print(json.dumps(str(error)))
""".replace("RING", repr(RING))


@TPU
@pytest.mark.slow
def test_loops_sends_and_refusals_of_tpus():
    """Libtpu's programs don't say how long loops are, and hold a collective in several parts."""
    code, out, err = child(TPU_CODE)
    assert code == 0, err[-3000:]
    ring, refused, mamba, *errors = map(json.loads, out.splitlines())
    # The last gradient of values is rounded to bfloat16 before its last hop.
    keys = (8 // 2) * (256 // 4) * 16 * 4
    exact = ring_bytes(B=8 // 2, T=256, R=4, G=1, D=16, L=2, size=4) - 2 * keys // 2
    assert ring["sent"]["collective-permute"]["bytes"] == exact
    assert not any("unknown" in kind for kind in ring["sent"].values())
    # fsdp = 2: a device sends its half of each matrix, at most twice and at most in float32.
    halves = 4 * (ring["parameters"] - 5 * 64) // 2
    assert halves // 2 < ring["sent"]["all-gather"]["bytes"] <= 2 * halves
    assert ring["fits"] and set(ring["bounds"]) == {"compute", "memory", "links"}

    assert refused["fits"] is False and refused["sent"] is None
    assert refused["memory"] == 15.75 * 2**30 and refused["needs"] > 16 * 2**30
    assert "CompileTimeHbmOom" in refused["refusal"]
    # Mamba-2: a kernel hands on the state, forward and backward, in each of two layers.
    assert "all_scan" in mamba["kernels"]
    assert not any("unknown" in kind for kind in mamba["sent"].values())
    state = (8 // 2) * (2 * 64 // 64) * 64 * 128 * 4
    assert mamba["sent"]["remote-copy"] == {"instructions": 2, "runs": 4, "bytes": 4 * state}

    assert all("is unknown; it is a generation and a shape" in error for error in errors[:2])
    assert "mesh.data=-1" in errors[2] and "1 devices" in errors[2]
    assert "there each axis must be one of 1, 4, 16, 64, products of the slice" in errors[3]


@pytest.mark.slow
@pytest.mark.skipif(aot_gpu.cuda_python() is None, reason="no interpreter with the CUDA plugin")
def test_the_step_of_eight_gpus():
    p = plan(small("precision.compute_dtype=bfloat16"), "h100:8")
    assert (p.devices, p.device) == (8, "NVIDIA H100 80GB HBM3")
    assert p.memory == 80 * 2**30 and p.fits
    kinds = p.sent["collective-permute"]
    keys = ring_bytes(B=8 // 2, T=256, R=4, G=1, D=16, L=2, size=2)
    assert "unknown" not in kinds and kinds["bytes"] >= keys
