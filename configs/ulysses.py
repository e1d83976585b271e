"""DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv 2309.14509): heads for time by all-to-all.

    tilescan run ulysses --scale=cpu
    python -m tilescan.experiments.run --config=configs/ulysses.py:cpu

Scales:
  smoke        seconds; a few devices, tiny sizes
  cpu          about ten minutes on 2 cores; programs are compiled, not run, for up to 64 devices
               at the width of a GPT of 1.2B; what runs, on up to 8 virtual devices, is small
  accelerator  as cpu, with longer trainings

Counts and the compiler's plan of buffers need no accelerator. Throughput on many devices cannot be
measured on one machine.
"""

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section, sharded_training, smoke_sharded_training


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("ulysses", scale)
    # "Any attention": each against one device, forward and gradients.
    config.exactness = section(
        devices=(2, 4, 8),
        kinds=("full", "causal", "gqa", "alibi", "window", "sparse", "ssd"),
        seq_len=128,  # of the whole sequence
        n_heads=8,
        head_dim=16,
    )
    # What a layer sends.
    config.traffic = section(
        seq_lens=(1024, 4096, 16384),
        devices=(2, 4, 8),
        weak_seq_len=1024,  # of a device, when it grows with the devices
        weak_devices=(2, 4, 8, 16, 64),
        strategies=("ulysses", "megatron_sp", "ring_self_attention", "ring"),
        d_model=2048,
        n_heads=64,
    )
    # The longest sequence of a model of 1.2B parameters.
    config.memory = section(
        devices=(1, 2, 4, 8, 16, 64),
        strategies=("ulysses", "megatron_sp"),
        n_layers=24,
        d_model=2048,
        n_heads=64,
        vocab_size=50_304,
        unit=1024,  # lengths are multiples of so many tokens a device
        gib=40.0,
        tolerance=0.02,
    )
    config.training = sharded_training(devices=(2, 4, 8), n_heads=8, seq_len=128)
    if scale == "smoke":
        config.exactness.update(
            devices=(2,), kinds=("causal", "ssd"), seq_len=32, n_heads=2, head_dim=8
        )
        config.traffic.update(seq_lens=(64,), devices=(2,), weak_seq_len=32, weak_devices=(2, 4))
        config.traffic.update(strategies=("ulysses", "megatron_sp"), d_model=32, n_heads=4)
        config.memory.update(devices=(1, 2), n_layers=2, d_model=32, n_heads=2, vocab_size=64)
        config.memory.update(unit=32, gib=0.002, tolerance=4.0)
        smoke_sharded_training(config.training, devices=(2,))
    elif scale == "accelerator":
        config.exactness.seq_len = 4096
        config.training.update(n_layers=6, d_model=512, seq_len=4096, steps=500)
    return config
