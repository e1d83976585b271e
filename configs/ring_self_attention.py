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

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section, sharded_training, smoke_sharded_training

BOTH = ("tensor", "ring_self_attention")  # tensor parallelism and RSA


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("ring_self_attention", scale)
    # Both reductions, and the other strategies, against one device's attention.
    config.exactness = section(devices=(1, 2, 4, 8), seq_len=64, n_heads=8, head_dim=16)
    # What a layer sends. (On two devices a ring is one message, which the compiler sends once for
    # both passes.)
    config.traffic = section(devices=(4, 12, 64), batch_size=4, seq_len=768)
    # The model whose training step is compiled: BERT-Base.
    config.model = section(n_layers=12, d_model=768, n_heads=12, vocab_size=30_528)
    # Table 4: memory when batch or length grow with the devices.
    config.weak = section(
        devices=(1, 2, 4, 8),
        strategies=(*BOTH, "ring", "ulysses"),
        batch_size=64,  # of a device, at `seq_len`; of the whole at `short` tokens a device
        seq_len=512,
        short=256,
    )
    # The largest batch, at `seq_len`, and the longest sequence, at `batch_size`.
    config.largest = section(
        devices=(1, 4, 12, 16, 64),
        strategies=BOTH,
        gib=32.0,
        seq_len=512,
        batch_size=64,
        tolerance=0.01,
    )
    # The longest sequence with Linformer's attention.
    config.linformer = section(devices=(1, 4, 32), batch_size=4, rows=256)
    # An MLP alone: B L by which sequence parallelism needs less.
    config.crossover = section(devices=(2, 4, 8), tokens=(4, 8, 16, 24, 40, 64, 128))  # B L / H
    config.training = sharded_training(devices=4, batch_size=8, seq_len=64, steps=300)
    config.training.learning_rate = 1e-3
    if scale == "smoke":
        config.exactness.update(devices=(2,), seq_len=16, n_heads=2, head_dim=4)
        config.traffic.update(devices=(4,), batch_size=1, seq_len=16)
        config.model.update(n_layers=2, d_model=16, n_heads=4, vocab_size=32)
        config.weak.update(devices=(1, 2), strategies=BOTH, batch_size=2, seq_len=32, short=16)
        config.largest.update(devices=(2,), gib=0.002, seq_len=16, batch_size=2, tolerance=4.0)
        config.linformer.update(devices=(1, 2), batch_size=1, rows=4)
        config.crossover.update(devices=(2,), tokens=(4, 64))
        smoke_sharded_training(config.training, devices=2)
    elif scale == "accelerator":
        config.exactness.seq_len = 4096
        config.training.update(n_layers=12, d_model=768, n_heads=12, seq_len=512, steps=1000)
    return config
