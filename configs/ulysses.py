"""DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv 2309.14509): heads for time by all-to-all.

    tilescan run ulysses --scale=cpu
    python -m tilescan.experiments.run --config=configs/ulysses.py:cpu

Scales:
  smoke        seconds; a few devices, tiny sizes
  cpu          about eight minutes on 2 cores; programs are compiled, not run, for up to 64 devices
               at the width of a GPT of 1.2B; what runs, on up to 8 virtual devices, is small
  accelerator  as cpu, with longer trainings

Counts and the compiler's plan of buffers need no accelerator. Throughput on many devices cannot be
measured on one machine.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "ulysses"
    config.scale = scale

    # "Any attention": each against one device, forward and gradients.
    exactness = config.exactness = ml_collections.ConfigDict()
    exactness.devices = (2, 4, 8)
    exactness.kinds = ("full", "causal", "gqa", "alibi", "window", "sparse", "ssd")
    exactness.length = 128  # of the whole sequence
    exactness.heads = 8
    exactness.dim = 16

    # What a layer sends.
    traffic = config.traffic = ml_collections.ConfigDict()
    traffic.lengths = (1024, 4096, 16384)
    traffic.devices = (2, 4, 8)
    traffic.weak_length = 1024  # of a device, when it grows with the devices
    traffic.weak_devices = (2, 4, 8, 16, 64)
    traffic.ways = ("ulysses", "megatron_sp", "ring_self_attention", "ring")
    traffic.width = 2048
    traffic.heads = 64

    # The longest text of a model of 1.2B parameters.
    memory = config.memory = ml_collections.ConfigDict()
    memory.devices = (1, 2, 4, 8, 16, 64)
    memory.ways = ("ulysses", "megatron_sp")
    memory.layers = 24
    memory.width = 2048
    memory.heads = 64
    memory.vocab_size = 50_304
    memory.unit = 1024  # lengths are multiples of so many tokens a device
    memory.gib = 40.0
    memory.tolerance = 0.02

    # The same model, data and seed on one device and with time cut over several.
    training = config.training = ml_collections.ConfigDict()
    training.parts = (2, 4, 8)
    training.dtypes = ("float64", "float32")
    training.layers = 2
    training.d_model = 64
    training.heads = 8
    training.vocab_size = 65
    training.batch = 4
    training.length = 128
    training.steps = 150
    training.rate = 3e-3

    if scale == "smoke":
        exactness.devices = (2,)
        exactness.kinds = ("causal", "ssd")
        exactness.length = 32
        exactness.heads = 2
        exactness.dim = 8
        traffic.lengths = (64,)
        traffic.devices = (2,)
        traffic.weak_length = 32
        traffic.weak_devices = (2, 4)
        traffic.ways = ("ulysses", "megatron_sp")
        traffic.width = 32
        traffic.heads = 4
        memory.devices = (1, 2)
        memory.layers = 2
        memory.width = 32
        memory.heads = 2
        memory.vocab_size = 64
        memory.unit = 32
        memory.gib = 0.0005
        memory.tolerance = 0.5
        training.parts = (2,)
        training.dtypes = ("float64",)
        training.layers = 1
        training.d_model = 16
        training.heads = 2
        training.vocab_size = 17
        training.batch = 1
        training.length = 32
        training.steps = 3
    elif scale == "accelerator":
        exactness.length = 4096
        training.d_model = 512
        training.layers = 6
        training.length = 4096
        training.steps = 500
    return config
