"""FlashAttention-2 (Dao, ICLR 2024, arXiv 2307.08691): table 1, figures 4 to 7, counts of work.

    tilescan run flash_attention_2 --scale=cpu
    python -m tilescan.experiments.run --config=configs/flash_attention_2.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 5 minutes on 2 cores
  accelerator  the paper's own grid: hidden 2048, 16k tokens, lengths 512 to 16k; one GPU or TPU

What to expect at scale cpu: the counts are exact and the same on every machine; causal attention
takes a little more than half the time of full attention at 4096.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "flash_attention_2"
    config.scale = scale

    # Operations of the two papers' loops, counted for one head.
    counts = config.counts = ml_collections.ConfigDict()
    counts.lengths = (512, 1024, 2048)
    counts.head_dim = 64
    counts.block_q = 64
    counts.block_k = 64
    counts.tiles_a_side = (1, 2, 4, 8, 16, 32, 64)  # of a causal mask

    # Figures 4 to 7: tokens and hidden size fixed, so that the length is traded for the batch.
    speed = config.speed = ml_collections.ConfigDict()
    speed.lengths = (512, 1024, 2048, 4096)
    speed.head_dims = (64, 128)
    speed.tokens = 4096
    speed.hidden = 512
    speed.dtype = "float32"
    speed.repeats = 5  # rounds; the table shows medians

    # Table 1, on one device: a training step, forward to update. The paper: 1.3B parameters and
    # more, contexts of 2k and 8k.
    training = config.training = ml_collections.ConfigDict()
    training.lengths = (512, 2048)
    training.tokens = 2048  # of a batch
    training.d_model = 256
    training.layers = 4
    training.n_heads = 4
    training.dtype = "float32"
    training.tokenizer = "byte"  # of which only the size of the vocabulary matters
    training.repeats = 5

    if scale == "smoke":
        counts.lengths = (64, 128)
        counts.head_dim = 16
        counts.block_q = counts.block_k = 32
        counts.tiles_a_side = (1, 2)
        speed.lengths = (64,)
        speed.head_dims = (16,)
        speed.tokens = 64
        speed.hidden = 32
        speed.repeats = 1
        training.lengths = (32, 64)
        training.tokens = 64
        training.d_model = 16
        training.layers = 1
        training.n_heads = 2
        training.repeats = 1
    elif scale == "accelerator":
        speed.lengths = (512, 1024, 2048, 4096, 8192, 16384)
        speed.tokens = 16384
        speed.hidden = 2048
        speed.dtype = "bfloat16"
        speed.repeats = 30
        training.lengths = (2048, 8192)
        training.tokens = 8192
        training.d_model = 1024  # 350M parameters: what one device holds
        training.layers = 24
        training.n_heads = 16
        training.dtype = "bfloat16"
        training.tokenizer = "gpt2"
        training.repeats = 20
    return config
