"""ZeCO (Chou et al., 2025, arXiv 2507.01004): linear attention over devices, and LASP-1, LASP-2.

    tilescan run zeco --scale=cpu
    python -m tilescan.experiments.run --config=configs/zeco.py:cpu

Scales:
  smoke        seconds; a few devices, tiny sizes
  cpu          about five minutes on 2 cores; programs are compiled, not run, for up to the paper's
               256 devices at its shapes (8,192 tokens a device, 32 heads of 128); what runs, on up
               to 8 virtual devices, is small
  accelerator  as cpu, with longer trainings

Counts are exact and need no accelerator. Seconds on many devices cannot be measured on one machine:
tables have the published ones beside a model of two numbers a schedule, which says so.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "zeco"
    config.scale = scale

    # All schedules against one device, forward and gradients.
    exactness = config.exactness = ml_collections.ConfigDict()
    exactness.devices = (1, 2, 4, 8)
    exactness.length = 256  # of a device
    exactness.heads = 4
    exactness.dim = 64
    exactness.decays = ("scalar", "vector")
    exactness.dtypes = ("float32", "float64")

    # What the compiled programs send, at the shape of the paper's operator.
    traffic = config.traffic = ml_collections.ConfigDict()
    traffic.devices = (2, 4, 8, 16, 32, 64, 128, 256)
    traffic.length = 8192  # of a device
    traffic.heads = 32
    traffic.dim = 128

    # All-Scan alone, by the number of blocks.
    blocks = config.blocks = ml_collections.ConfigDict()
    blocks.devices = (2, 4, 8, 16, 32, 64, 128, 256)
    blocks.blocks = (8, 32, 128)

    # The same model, data and seed on one device and with time cut over several.
    training = config.training = ml_collections.ConfigDict()
    training.parts = 4
    training.kinds = ("all_scan", "chain", "all_gather", "log_step")
    training.dtypes = ("float64", "float32")
    training.layers = 2
    training.d_model = 64
    training.heads = 4
    training.vocab_size = 65
    training.batch = 4
    training.length = 256
    training.steps = 150
    training.rate = 3e-3

    if scale == "smoke":
        exactness.devices = (2,)
        exactness.length = 16
        exactness.heads = 2
        exactness.dim = 4
        exactness.decays = ("vector",)
        exactness.dtypes = ("float64",)
        traffic.devices = (4,)
        traffic.length = 32
        traffic.heads = 8
        traffic.dim = 8
        blocks.devices = (4,)
        blocks.blocks = (4, 8)
        training.parts = 2
        training.kinds = ("all_scan",)
        training.dtypes = ("float64",)
        training.layers = 1
        training.d_model = 16
        training.heads = 2
        training.vocab_size = 17
        training.batch = 1
        training.length = 32
        training.steps = 3
    elif scale == "accelerator":
        exactness.length = 2048
        training.d_model = 512
        training.layers = 6
        training.length = 4096
        training.steps = 500
    return config
