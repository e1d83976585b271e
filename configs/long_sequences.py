"""Training configurations of 1.3B parameters for sequences of 128 thousand to 4 million tokens.

    tilescan plan --topology=v5p:4x4x4 --config=configs/long_sequences.py:transformer \\
        --config.mesh.sequence=16 --config.mesh.fsdp=4 --config.data.batch_size=4

`python -m tilescan.planning.table` compiles all of them for 64, 256 and 512 chips.
"""

import ml_collections

from tilescan.training.config import default_config

MODELS = ("transformer", "mamba2", "hybrid")


def get_config(model: str = "transformer") -> ml_collections.ConfigDict:
    """Returns the config for rows of 131,072 tokens, in bfloat16, with layers rematerialized.

    transformer  24 layers of attention (16 heads, 8 key-value heads of 128) and SwiGLU; zigzag
    mamba2       48 layers of Mamba-2, state 128, heads of 64 (arXiv 2405.21060, 1.3B)
    hybrid       6 times 7 layers of Mamba-2 and one of attention

    Raises:
      ValueError: another name.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r} is unknown; it can be one of {', '.join(MODELS)}")
    config = default_config()
    config.model.update(d_model=2048, n_heads=16, n_kv_heads=8, mlp_dim=6144, vocab_size=50304)
    config.model.remat = "full"
    config.precision.compute_dtype = "bfloat16"
    config.data.update(seq_len=2**17, batch_size=1)
    config.model.repeats = {"transformer": 24, "mamba2": 48, "hybrid": 6}[model]
    if model == "mamba2":
        config.model.pattern = ("mamba2",)
    if model == "hybrid":
        config.model.pattern = ("mamba2",) * 7 + ("attention",)
    if model == "transformer":  # a recurrence takes tokens in their order alone
        config.model.sequence_balance = "zigzag"
    return config
