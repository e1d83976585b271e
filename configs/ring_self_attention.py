"""Ring Self-Attention (Li et al., ACL 2023, arXiv 2105.13120): sequence against tensor parallelism.

    tilescan run ring_self_attention --scale=cpu
    python -m tilescan.experiments.run --config=configs/ring_self_attention.py:cpu

Scales:
  smoke        seconds; a few devices, tiny sizes
  cpu          about eight minutes on 2 cores; training steps of BERT-Base's true size are compiled,
               not run, for up to 64 devices; what runs, on up to 8 virtual devices, is small
  accelerator  as cpu, with longer trainings

Counts and the compiler's plan of buffers need no accelerator, and XLA's buffers for CPUs are not
CUDA's: growth compares, not megabytes. Tokens per second cannot be measured on one machine.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "ring_self_attention"
    config.scale = scale

    # Both reductions, and the other ways, against one device's attention.
    exactness = config.exactness = ml_collections.ConfigDict()
    exactness.devices = (1, 2, 4, 8)
    exactness.length = 64
    exactness.heads = 8
    exactness.dim = 16

    # What a layer sends. (On two devices a ring is one message, which the compiler sends once for
    # both passes.)
    traffic = config.traffic = ml_collections.ConfigDict()
    traffic.devices = (4, 12, 64)
    traffic.batch = 4
    traffic.length = 768

    # The model whose training step is compiled: BERT-Base.
    model = config.model = ml_collections.ConfigDict()
    model.layers = 12
    model.width = 768
    model.heads = 12
    model.vocab_size = 30_528

    # Table 4: memory when batch or length grow with the devices.
    weak = config.weak = ml_collections.ConfigDict()
    weak.devices = (1, 2, 4, 8)
    weak.ways = ("tensor", "ring_self_attention", "ring", "ulysses")
    weak.batch = 64  # of a device, at `length`; of the whole at `short` tokens a device
    weak.length = 512
    weak.short = 256

    # The largest batch and the longest text.
    largest = config.largest = ml_collections.ConfigDict()
    largest.devices = (1, 4, 12, 16, 64)
    largest.ways = ("tensor", "ring_self_attention")
    largest.gib = 32.0
    largest.length = 512
    largest.batch = 64
    largest.tolerance = 0.01

    # The longest text with Linformer's attention.
    linformer = config.linformer = ml_collections.ConfigDict()
    linformer.devices = (1, 4, 32)
    linformer.batch = 4
    linformer.rows = 256

    # An MLP alone: B L by which sequence parallelism needs less.
    crossover = config.crossover = ml_collections.ConfigDict()
    crossover.devices = (2, 4, 8)
    crossover.tokens = (4, 8, 16, 24, 40, 64, 128)  # B L / H

    # The same model, data and seed on one device and with time cut over several.
    training = config.training = ml_collections.ConfigDict()
    training.parts = 4
    training.dtypes = ("float64", "float32")
    training.layers = 2
    training.d_model = 64
    training.heads = 4
    training.vocab_size = 65
    training.batch = 8
    training.length = 64
    training.steps = 300
    training.rate = 1e-3

    if scale == "smoke":
        exactness.devices = (2,)
        exactness.length = 16
        exactness.heads = 2
        exactness.dim = 4
        traffic.devices = (4,)
        traffic.batch = 1
        traffic.length = 16
        model.layers = 2
        model.width = 16
        model.heads = 4
        model.vocab_size = 32
        weak.devices = (1, 2)
        weak.ways = ("tensor", "ring_self_attention")
        weak.batch = 2
        weak.length = 32
        weak.short = 16
        largest.devices = (2,)
        largest.gib = 0.0005
        largest.length = 16
        largest.batch = 2
        largest.tolerance = 0.5
        linformer.devices = (1, 2)
        linformer.batch = 1
        linformer.rows = 4
        crossover.devices = (2,)
        crossover.tokens = (4, 64)
        training.dtypes = ("float64",)
        training.parts = 2
        training.layers = 1
        training.d_model = 16
        training.heads = 2
        training.vocab_size = 17
        training.batch = 1
        training.length = 32
        training.steps = 3
    elif scale == "accelerator":
        exactness.length = 4096
        training.d_model = 768
        training.layers = 12
        training.heads = 12
        training.length = 512
        training.steps = 1000
    return config
