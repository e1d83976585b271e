"""Can Mamba Always Enjoy the "Free Lunch"? (arXiv 2410.03810): copying and dynamic programming.

    tilescan run mamba_free_lunch --scale=cpu
    python -m tilescan.experiments.run --config=configs/mamba_free_lunch.py:cpu

Scales:
  smoke        seconds; the whole code path on sizes that show nothing
  cpu          about 15 minutes on 2 cores
  accelerator  70M parameters, strings up to 40: hours on one GPU or TPU

What to expect at scale cpu: strings of 4 are copied by all; of strings of 10 the Transformer copies
most, and Mamba the more the larger its state is. At 4 letters Mamba needs fewer examples, against
the paper's order, so that claim is not shown. Steps that look a few numbers back suit Mamba better,
those that look over the whole input the Transformer.
"""

import ml_collections

SCALES = ("smoke", "cpu", "accelerator")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
    """The paper's config; every number may be overridden by --config.section.key=value."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; it must be one of {', '.join(SCALES)}")
    config = ml_collections.ConfigDict()
    config.paper = "mamba_free_lunch"
    config.scale = scale

    # Theorems 1 and 2: nothing is trained.
    score = config.score = ml_collections.ConfigDict()
    score.decays = (0.9, 0.99)
    score.lengths = (4, 8, 16, 32, 64, 128, 256, 512)
    score.tolerance = 0.1  # of an output whose size is 1

    # Theorem 3: nothing is trained.
    recall = config.recall = ml_collections.ConfigDict()
    recall.state_dim = 32
    recall.vocab = 26
    recall.items = (8, 16, 32, 64, 128, 256)
    recall.trials = 16
    recall.sharpness = 64.0

    # Copying strings of 1 to n_max letters, new ones at every step.
    copy = config.copy = ml_collections.ConfigDict()
    copy.n_max = (4, 10)
    copy.d_model = 64
    copy.repeats = 2  # blocks of attention and MLP; a Mamba has two layers for each
    copy.n_heads = 4
    copy.mamba_state_dims = (16,)
    copy.mamba2_state_dims = (4, 16, 64)
    copy.mamba2_head_dim = 32
    copy.batch_size = 64
    copy.steps = 600
    copy.evaluations = 20
    copy.learning_rate = 2e-3
    copy.seeds = (0, 1, 2)

    # Dynamic programming: all steps before the answer, or the answer alone ("direct").
    dp = config.dp = ml_collections.ConfigDict()
    dp.problems = ("lis", "lagged_fibonacci")
    dp.ways = ("steps",)
    dp.lis_length = 10
    dp.operators = 3
    dp.local_length = 16
    dp.d_model = 64
    dp.repeats = 2
    dp.n_heads = 4
    dp.mamba2_state_dim = 16
    dp.mamba2_head_dim = 32
    dp.batch_size = 64
    dp.steps = 300
    dp.learning_rate = 2e-3
    dp.seeds = (0, 1)

    if scale == "smoke":
        score.decays = (0.9,)
        score.lengths = (4, 8, 16)
        recall.state_dim = 8
        recall.items = (4, 16)
        recall.trials = 2
        copy.n_max = (2,)
        copy.mamba_state_dims = ()
        copy.mamba2_state_dims = (4,)
        dp.problems = ("lagged_fibonacci",)
        dp.local_length = 4
        for section in (copy, dp):
            section.d_model = 16
            section.repeats = 1
            section.n_heads = 2
            section.mamba2_head_dim = 16
            section.batch_size = 8
            section.steps = 4
            section.seeds = (0,)
        copy.evaluations = 2
    elif scale == "accelerator":
        copy.n_max = (20, 30, 40)
        copy.d_model = 768
        copy.repeats = 10
        copy.n_heads = 12
        copy.mamba2_state_dims = (16, 64, 128)
        copy.mamba2_head_dim = dp.mamba2_head_dim = 64
        copy.steps = 50_000
        copy.learning_rate = 5e-4
        dp.problems = ("lis", "arithmetic", "lagged_fibonacci")
        dp.ways = ("steps", "direct")
        dp.lis_length = 50
        dp.operators = 10
        dp.local_length = 64
        dp.d_model = 512
        dp.repeats = 6
        dp.n_heads = 8
        dp.mamba2_state_dim = 64
        dp.steps = 20_000
        dp.learning_rate = 5e-4
    return config
