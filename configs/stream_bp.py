"""StreamBP (Luo et al., NeurIPS 2025, arXiv 2506.03077): tables 1, 3, 6 and 7, and figure 5.

    tilescan run stream_bp --scale=cpu
    python -m tilescan.experiments.run --config=configs/stream_bp.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 12 minutes on 2 cores; memory at the shapes of Qwen3-4B, times of a small model
  accelerator  half a billion parameters on one GPU or TPU of 80 GB: about an hour

Memory is what the compiler plans, so that lengths that would need 40 GB are searched on a laptop.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "stream_bp"
    config.scale = scale

    # Table 3: the longest sequence within a budget of temporaries; Qwen3-4B's shapes.
    memory = config.memory = _model(
        vocab_size=151_936, d_model=2560, layers=36, n_heads=32, n_kv_heads=8, mlp_dim=9728
    )
    memory.head_dim = 128
    memory.losses = ("sft", "grpo", "dpo")
    memory.methods = ("none", "checkpoint", "mst", "stream")
    memory.starts = (2304, 20_480, 38_400, 74_240)  # first lengths to try, of these methods
    memory.budget_gb = 40.0
    memory.step = 128
    memory.chunks = 8
    memory.logit_chunk = 128

    # Table 1: time of a gradient by length.
    times = config.times = _model()
    times.lengths = (1024, 2048, 4096, 8192)
    times.methods = ("none", "checkpoint", "mst", "stream")
    times.chunks = 4
    times.logit_chunk = 128
    times.repeats = 3  # rounds; the table shows medians

    # Figure 5: time and memory by the number of chunks.
    counts = config.counts = _model()
    counts.length = 4096
    counts.counts = (1, 2, 4, 8, 16)
    counts.logit_chunk = 128
    counts.repeats = 3

    # Table 6: errors of gradients.
    precision = config.precision = _model()
    precision.length = 1024
    precision.chunks = 4
    precision.logit_chunk = 100
    precision.seeds = (0, 1, 2)

    # Table 7: the losses of whole trainings.
    parity = config.parity = _model(vocab_size=32, d_model=64, layers=2, mlp_dim=128)
    parity.losses = ("sft", "grpo", "dpo")
    parity.learning_rates = (3e-3, 3e-4, 3e-4)
    parity.length = 64
    parity.batch_size = 16
    parity.steps = 300
    parity.sft_steps = 200  # of the model that GRPO and DPO start from
    parity.sft_learning_rate = 3e-3
    parity.chunks = 4
    parity.logit_chunk = 24

    if scale == "smoke":
        _smoke(config)
    elif scale == "accelerator":
        _accelerator(config)
    return config


def _model(**changes) -> ml_collections.ConfigDict:
    """A section with a model of 5 million parameters, 2 of them embeddings."""
    section = ml_collections.ConfigDict()
    section.vocab_size = 8192
    section.d_model = 256
    section.layers = 4
    section.n_heads = 4
    section.n_kv_heads = 4
    section.mlp_dim = 704
    section.dtype = "float32"
    section.update(changes)
    return section


def _smoke(config) -> None:
    for section in (config.memory, config.times, config.counts, config.precision, config.parity):
        section.vocab_size = 16
        section.d_model = 8
        section.layers = 1
        section.n_heads = section.n_kv_heads = 2
        section.mlp_dim = 16
        section.logit_chunk = 4
    config.memory.head_dim = 4
    config.memory.losses = ("sft",)
    config.memory.methods = ("checkpoint", "stream")
    config.memory.starts = (256, 256)
    config.memory.budget_gb = 2e-3
    config.memory.step = 128
    config.memory.chunks = config.times.chunks = config.precision.chunks = 2
    config.times.lengths = (16,)
    config.times.methods = ("checkpoint", "stream")
    config.times.repeats = config.counts.repeats = 1
    config.counts.length = 16
    config.counts.counts = (1, 2)
    config.precision.length = 16
    config.precision.seeds = (0,)
    parity = config.parity
    parity.losses = ("dpo",)
    parity.learning_rates = (1e-3,)
    parity.length = 16
    parity.batch_size = 4
    parity.steps = parity.sft_steps = 12
    parity.chunks = 2


def _accelerator(config) -> None:
    config.memory.dtype = "bfloat16"
    for section in (config.times, config.counts, config.precision):
        section.vocab_size = 32_000
        section.d_model = 1280
        section.layers = 24
        section.n_heads = section.n_kv_heads = 20
        section.mlp_dim = 3456
        section.dtype = "bfloat16"
    config.times.lengths = (2048, 4096, 8192, 16_384, 32_768)
    config.times.repeats = config.counts.repeats = 10
    config.counts.length = 16_384
    config.precision.dtype = "float32"
    config.precision.length = 4096
    config.parity.steps = 500
