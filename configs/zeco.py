"""ZeCO (Chou et al., 2025, arXiv 2507.01004): linear attention over devices, and LASP-1, LASP-2.

    tilescan run zeco --scale=cpu
    python -m tilescan.experiments.run --config=configs/zeco.py:cpu

Scales:
  smoke        seconds; a few devices, tiny sizes
  cpu          about ten minutes on 2 cores; programs are compiled, not run, for up to the paper's
               256 devices at its shapes (8,192 tokens a device, 32 heads of 128); what runs, on up
               to 8 virtual devices, is small
  accelerator  as cpu, with longer trainings

Counts are exact and need no accelerator. Seconds on many devices cannot be measured on one machine:
tables have the published ones beside a model of two parameters a schedule, which says so.
"""

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section, sharded_training, smoke_sharded_training


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("zeco", scale)
    # All schedules against one device, forward and gradients.
    config.exactness = section(
        devices=(1, 2, 4, 8),
        seq_len=256,  # of a device
        n_heads=4,
        head_dim=64,
        decays=("scalar", "vector"),
        dtypes=("float32", "float64"),
    )
    # What the compiled programs send, at the shape of the paper's operator.
    config.traffic = section(
        devices=(2, 4, 8, 16, 32, 64, 128, 256),
        seq_len=8192,  # of a device
        n_heads=32,
        head_dim=128,
    )
    # All-Scan alone, by the number of blocks.
    config.blocks = section(devices=(2, 4, 8, 16, 32, 64, 128, 256), blocks=(8, 32, 128))
    config.training = sharded_training(
        devices=4, kinds=("all_scan", "chain", "all_gather", "log_step"), seq_len=256
    )
    if scale == "smoke":
        config.exactness.update(devices=(2,), seq_len=16, n_heads=2, head_dim=4)
        config.exactness.update(decays=("vector",), dtypes=("float64",))
        config.traffic.update(devices=(4,), seq_len=32, n_heads=8, head_dim=8)
        config.blocks.update(devices=(4,), blocks=(4, 8))
        smoke_sharded_training(config.training, devices=2, kinds=("all_scan",))
    elif scale == "accelerator":
        config.exactness.seq_len = 2048
        config.training.update(n_layers=6, d_model=512, seq_len=4096, steps=500)
    return config
