"""`tilescan plan` compiles the real training step, for devices here and for TPUs elsewhere."""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import aot_tpu
from experiments import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
    "--config.model.d_model=64", "--config.model.n_heads=4", "--config.model.n_kv_heads=1",
    "--config.model.repeats=1", "--config.model.vocab_size=64", "--config.model.mlp_dim=128",
    "--config.data.seq_len=256", "--config.data.batch_size=8",
    "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
)  # fmt: skip
KERNELS = "Pallas kernels flash_attention_dkv, flash_attention_dq, flash_attention_forward\n"


def for_tpus(*overrides):
    """Output of the command in a process of its own: libtpu reads its environment once."""
    child = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "plan", "--topology=v5e:2x4", *overrides],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


@pytest.mark.skipif(not aot_tpu.available(), reason="libtpu is not installed (extra dev)")
def test_the_step_of_eight_tpus_runs_the_attention_kernels():
    """Packed documents on a mesh whose tensor axis does not divide the one key-value head."""
    out = for_tpus(*SMALL)
    assert "devices        8 x TPU v5 lite\n" in out
    assert KERNELS in out


def test_the_step_of_this_machine(capsys):
    assert cli.main(["plan", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "devices        8 x cpu\n" in out and "Pallas kernels none\n" in out
    assert "tokens a step  2,048\n" in out
