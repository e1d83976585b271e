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

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("flash_attention_2", scale)
    # FLOPs of the two papers' loops, counted for one head.
    config.counts = section(
        lengths=(512, 1024, 2048),
        head_dim=64,
        block_q=64,
        block_k=64,
        tiles_a_side=(1, 2, 4, 8, 16, 32, 64),  # of a causal mask
    )
    # Figures 4 to 7: tokens and hidden size fixed, so that the length is traded for the batch.
    config.speed = section(
        lengths=(512, 1024, 2048, 4096),
        head_dims=(64, 128),
        tokens=4096,
        hidden=512,
        dtype="float32",
        repeats=5,  # rounds; the table shows medians
    )
    # Table 1, on one device: a training step, forward to update. The paper: 1.3B parameters and
    # more, contexts of 2k and 8k.
    config.training = section(
        lengths=(512, 2048),
        tokens=2048,  # of a batch
        repeats=5,
        train={
            "model": {"d_model": 256, "repeats": 4, "n_heads": 4},
            "precision": {"compute_dtype": "float32"},
            "data": {"tokenizer": "byte"},  # of which only the size of the vocabulary matters
        },
    )
    model = config.training.train.model
    if scale == "smoke":
        config.counts.update(
            lengths=(64, 128), head_dim=16, block_q=32, block_k=32, tiles_a_side=(1, 2)
        )
        config.speed.update(lengths=(64,), head_dims=(16,), tokens=64, hidden=32, repeats=1)
        config.training.update(lengths=(64,), tokens=64, repeats=1)
        model.update(d_model=16, repeats=1, n_heads=2)
    elif scale == "accelerator":
        config.speed.update(
            lengths=tuple(2**k for k in range(9, 15)),
            tokens=16384,
            hidden=2048,
            dtype="bfloat16",
            repeats=30,
        )
        config.training.update(lengths=(2048, 8192), tokens=8192, repeats=20)
        model.update(d_model=1024, repeats=24, n_heads=16)  # 350M parameters: one device holds them
        config.training.train.precision.compute_dtype = "bfloat16"
        config.training.train.data.tokenizer = "gpt2"
    return config
