"""StreamBP (Luo et al., NeurIPS 2025, arXiv 2506.03077): tables 1, 3, 6 and 7, and figure 5.

    tilescan run stream_bp --scale=cpu
    python -m tilescan.experiments.run --config=configs/stream_bp.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 20 minutes on 2 cores; memory at the shapes of Qwen3-4B, times of a small model
  accelerator  half a billion parameters on one GPU or TPU of 80 GB: about an hour

Memory is what the compiler plans, so that lengths that would need 40 GB are searched on a laptop.
"""

from typing import Any

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section

LOSSES = ("sft", "grpo", "dpo")
METHODS = ("none", "checkpoint", "mst", "stream")


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("stream_bp", scale)
    # Table 3: the longest sequence within a budget of temporaries; Qwen3-4B's shapes.
    qwen = dict(vocab_size=151_936, d_model=2560, repeats=36, n_heads=32, n_kv_heads=8)
    config.memory = section(
        model=_model(**qwen, mlp_dim=9728, head_dim=128, qk_norm=True),
        losses=LOSSES,
        methods=METHODS,
        starts=(2304, 20_480, 38_400, 74_240),  # first lengths to try, of these methods
    )
    config.memory.update(budget_gb=40.0, step=128, chunks=8, logit_chunk=128)
    # Table 1: time of a gradient by length, in as many chunks as Table 3's memory is of; `repeats`
    # are rounds, the table shows medians.
    rounds = dict(logit_chunk=128, repeats=5)
    config.times = section(model=_model(), methods=METHODS, chunks=8, **rounds)
    config.times.lengths = (1024, 2048, 4096, 8192)
    # Figure 5: time and memory by the number of chunks.
    config.counts = section(model=_model(), length=4096, counts=(1, 2, 4, 8, 16), **rounds)
    # Table 6: errors of gradients.
    config.precision = section(model=_model(tie_embeddings=False), length=1024, seeds=(0, 1, 2))
    config.precision.update(chunks=4, logit_chunk=100)
    # Table 7: the losses of whole trainings; GRPO and DPO start from a model trained by SFT.
    config.parity = section(
        model=_model(vocab_size=32, d_model=64, repeats=2, mlp_dim=128),
        losses=LOSSES,
        learning_rates=(3e-3, 3e-4, 3e-4),
        seeds=(0, 1, 2),
    )
    config.parity.update(length=64, batch_size=16, steps=300, chunks=4, logit_chunk=24)
    config.parity.update(sft_steps=200, sft_learning_rate=3e-3)
    if scale == "smoke":
        tiny = dict(vocab_size=16, d_model=8, repeats=1, n_heads=2, n_kv_heads=2, mlp_dim=16)
        both = dict(methods=("checkpoint", "stream"), chunks=2)
        for name in ("memory", "times", "counts", "precision", "parity"):
            config[name].model.update(tiny)
            config[name].logit_chunk = 4
        config.memory.model.head_dim = 4
        config.memory.update(losses=("sft",), budget_gb=2e-3, starts=(256, 256), **both)
        config.times.update(lengths=(16,), repeats=1, **both)
        config.counts.update(length=16, counts=(1, 2), repeats=1)
        config.precision.update(length=16, seeds=(0,), chunks=2)
        config.parity.update(losses=("dpo",), learning_rates=(1e-3,), length=16, batch_size=8)
        config.parity.update(steps=12, sft_steps=12, chunks=2, seeds=(0,))
    elif scale == "accelerator":
        large = dict(vocab_size=32_000, d_model=1280, repeats=24, mlp_dim=3456)
        for part in (config.times, config.counts, config.precision):
            part.model.update(large, n_heads=20, n_kv_heads=20)
        for part in (config.memory, config.times, config.counts):
            part.model.dtype = "bfloat16"
        config.times.update(lengths=(2048, 4096, 8192, 16_384, 32_768), repeats=10)
        config.counts.update(length=16_384, repeats=10)
        config.precision.length = 4096
        config.parity.steps = 500
    return config


def _model(**changes: Any) -> ConfigDict:
    """Fields of a LanguageModelConfig of 5 million parameters, 2 of them embeddings."""
    fields = dict(vocab_size=8192, d_model=256, repeats=4, n_heads=4, n_kv_heads=4, mlp_dim=704)
    return section(**{**fields, "dtype": "float32", **changes})
