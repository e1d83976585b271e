"""Can Mamba Always Enjoy the "Free Lunch"? (arXiv 2410.03810): copying and dynamic programming.

    tilescan run mamba_free_lunch --scale=cpu
    python -m tilescan.experiments.run --config=configs/mamba_free_lunch.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about an hour on 2 cores
  accelerator  70M parameters, strings up to 40: hours on one GPU or TPU

What to expect at scale cpu: strings of 4 are copied by all; of strings of 10 the Transformer copies
most, and Mamba the more the larger its state is. At 4 letters Mamba needs fewer examples, against
the paper's order, so that claim is not shown. Steps that look a few numbers back suit Mamba better,
those that look over the whole input the Transformer.
"""

from ml_collections import ConfigDict

from tilescan.configs.common import paper, section


def get_config(scale: str = "cpu") -> ConfigDict:
    """Returns the paper's config; --config.section.key=value overrides any of its values."""
    config = paper("mamba_free_lunch", scale)
    # Theorems 1 and 2: nothing is trained.
    config.score = section(decays=(0.9, 0.99), lengths=(4, 8, 16, 32, 64, 128, 256, 512))
    config.score.tolerance = 0.1  # of an output whose size is 1
    # Theorem 3: nothing is trained.
    config.recall = section(
        state_dim=32, vocab=26, items=(8, 16, 32, 64, 128, 256), trials=16, sharpness=64.0
    )
    # Blocks of attention and MLP; a Mamba has two layers for each.
    model = dict(d_model=64, repeats=2, n_heads=4, mamba2_head_dim=32)
    # Copying strings of 1 to n_max letters, new ones at every step.
    config.copy = section(n_max=(4, 10), mamba_state_dims=(16,), mamba2_state_dims=(4, 16, 64))
    config.copy.update(**model, seeds=(0, 1, 2), train=_training(steps=600, evaluations=20))
    # Dynamic programming: all steps before the answer, or the answer alone.
    config.dp = section(problems=("lis", "lagged_fibonacci"), steps_written=(True,))
    config.dp.update(lis_length=10, operators=3, local_length=16, mamba2_state_dim=16)
    config.dp.update(**model, seeds=(0, 1), train=_training(steps=300))
    if scale == "smoke":
        small = dict(d_model=16, repeats=1, n_heads=2, mamba2_head_dim=16, seeds=(0,))
        config.score.update(decays=(0.9,), lengths=(4, 8, 16))
        config.recall.update(state_dim=8, items=(4, 16), trials=2)
        config.copy.update(n_max=(2,), mamba_state_dims=(), mamba2_state_dims=(4,), **small)
        config.copy.train = _training(steps=4, evaluations=2, batch_size=8)
        config.dp.update(problems=("lagged_fibonacci",), local_length=4, **small)
        config.dp.train = _training(steps=4, batch_size=8)
    elif scale == "accelerator":
        config.copy.update(n_max=(20, 30, 40), mamba2_state_dims=(16, 64, 128))
        config.copy.update(d_model=768, repeats=10, n_heads=12, mamba2_head_dim=64)
        config.copy.train = _training(steps=50_000, evaluations=20, learning_rate=5e-4)
        config.dp.update(problems=("lis", "arithmetic", "lagged_fibonacci"))
        config.dp.update(steps_written=(True, False), lis_length=50, operators=10, local_length=64)
        config.dp.update(d_model=512, repeats=6, n_heads=8, mamba2_state_dim=64, mamba2_head_dim=64)
        config.dp.train = _training(steps=20_000, learning_rate=5e-4)
    return config


def _training(
    *, steps: int, evaluations: int = 1, batch_size: int = 64, learning_rate: float = 2e-3
) -> ConfigDict:
    """Returns a part of training's config: four batches an evaluation, a tenth to warm up."""
    every = {"log_every": steps, "eval_every": steps // evaluations, "eval_batches": 4}
    return section(
        data={"batch_size": batch_size},
        train={"steps": steps, **every},
        optimizer={"learning_rate": learning_rate, "warmup_steps": steps // 10},
    )
