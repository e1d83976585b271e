"""Every key alone: set to something reasonable it works, or what was set is refused by name."""

import json

import jax
import numpy as np
import pytest

from tilescan.models import LanguageModelConfig
from tilescan.training import config as lib
from tilescan.training import inputs, sharding, steps, train
from tilescan.training.checkpoints import CheckpointError, Checkpoints
from tilescan.training.config import ConfigError, default_config, override, settings
from tilescan.training.optimizers import make_optimizer
from tilescan.training.schedule_config import warmup_steps
from tilescan.training.settings import OptimizerConfig

# Values of keys of the default configuration that work alone.
WORK = {
    "seed": (1, 2**31),
    "train.steps": (1, 2, 5, 9, 10, 50, 99, 100, 101, 10**6),
    "train.microbatches": (2, 16),
    "train.logit_chunk": (1, 100, 256, 1000),
    "train.stream_chunks": (1, 3, 4),
    "train.z_loss": (1e-4,),
    "train.log_every": (1, 5000),
    "train.eval_every": (1, 5000),
    "train.eval_batches": (0, 1),
    "train.checkpoint_every": (0, 1, 5000),
    "train.keep": (1, 9),
    "train.progress": (False,),
    "train.tensorboard": (False,),
    "train.tracker": ("wandb",),
    "train.gradient_norms": (True,),
    "train.start_from": ("smollm2",),
    "train.eval_early": (True,),
    "data.eval_sources": ("(python_stdlib,)",),
    "data.weights": ("(2.5,)",),
    "data.replay_seed": (1,),
    "data.first_batch": (3,),
    "train.sample_every": (1, 5000),
    "train.sample_prompt": ("import",),
    "train.sample_tokens": (1, 1000),
    "train.sample_temperature": (0.0, 0.8),
    "optimizer.name": ("adam", "adamw", "lion", "sgd"),
    "optimizer.learning_rate": (0.0, 1.0),
    "optimizer.schedule": ("constant", "linear", "cosine", "inverse_sqrt"),
    "optimizer.warmup_steps": (0, 1, 999),
    "optimizer.decay_steps": (10, 5000),
    "optimizer.final_fraction": (0, 1.0),
    "optimizer.b1": (0.0, 0.9),
    "optimizer.b2": (0.0, 0.999),
    "optimizer.eps": (0.0,),
    "optimizer.weight_decay": (0.0, 1.0),
    "optimizer.clip_norm": (0.0,),
    "optimizer.groups": ((),),
    "data.sources": ("shakespeare", "a.txt,b.jsonl"),
    "data.seq_len": (1, 2, 100, 255, 4096),
    "data.batch_size": (1, 3, 1000),
    "data.packing": ("packed", "whole", "contiguous"),
    "data.shuffle": (False,),
    "data.fractions": ((1.0, 0.0, 0.0), (0.5, 0.25, 0.25)),
    "data.split_seed": (3,),
    "data.max_documents": (1, 10**6),
    "data.eval_stride": (1, 256),
    "precision.param_dtype": ("float32",),
    "optimizer.end_step": (500, 1000),
    "optimizer.milestones": ("(10,20)",),
    "optimizer.cycle_steps": (10,),
    "optimizer.cycle_peak": (0.5,),
    "optimizer.milestone_factor": (0.5,),
    "optimizer.rewarm_start": (10,),
    "optimizer.rewarm_steps": (10,),
    "optimizer.rewarm_fraction": (0.5,),
    "optimizer.cooldown_steps": (10,),
    "optimizer.constant_fraction": (0.3,),
    "precision.compute_dtype": ("bfloat16", "float32"),
    "classifier.n_classes": (2,),
    "classifier.pooling": ("last",),
    "mesh.data": (1,),
    "mesh.parameters_over_sequence": (True,),
    "model.d_model": (2, 8, 16, 24, 36, 100, 130, 768, 1000),
    "model.n_heads": (1, 4, 16, 256),
    "model.n_kv_heads": (1, 2, 4, 8),
    "model.head_dim": (2, 100),
    "model.repeats": (1, 13),
    "model.pattern": (
        "mlp",
        "attention",
        "mamba2,mlp",
        "(gla)",
        "s4d",
        "local_attention:64",
        "mlp,attention:a",
    ),
    "model.position": ("rope_interleaved", "alibi", "learned", "none"),
    "model.max_len": (64, 10**4),
    "model.rope_theta": (5e5,),
    "model.rope_scaling": ({"kind": "linear", "factor": 2.0},),
    "model.qk_norm": (True,),
    "model.attention_scale": (0.1,),
    "model.attention_logit_cap": (50.0,),
    "model.logit_cap": (30,),
    "model.mlp": ("gelu",),
    "model.mlp_dim": (100,),
    "model.norm": ("layernorm",),
    "model.post_norm": (True,),
    "model.tie_embeddings": (False,),
    "model.remat": ("full", "dots", "offload"),
    "model.scan_layers": (False,),
    "model.vocab_size": (1000,),
    "model.mixers.attention.n_kv_heads": (1, 2),
    "model.mixers.attention.qk_norm": (True,),
    "model.mixers.mlp.dim": (100,),
}
# Those that cannot be, and what the message says of what was set.
REFUSED = {
    "seed=-1": "seed = -1",
    "train.stream_chunks=257": r"train.stream_chunks = 257 .*data.seq_len = 256",
    "train.microbatches=5": "train.microbatches = 5",
    "train.resume_step=-1": "train.resume_step = -1",
    "train.tracker=wandbb": "train.tracker = 'wandbb' is unknown; did you mean 'wandb'",
    "train.sample_every=-1": "train.sample_every = -1",
    "train.sample_prompt=": "train.sample_prompt is empty",
    "train.sample_tokens=0": "train.sample_tokens = 0",
    "train.sample_temperature=-1": "train.sample_temperature = -1",
    "optimizer.warmup_steps=1000": "optimizer.warmup_steps = 1000 .*train.steps = 1000",
    "optimizer.warmup_steps=-1": "optimizer.warmup_steps = -1",
    "optimizer.schedule=wsd": "optimizer.schedule = 'wsd' needs optimizer.decay_steps",
    "optimizer.end_step=1001": "end_step = 1001 exceeds train.steps = 1000: end_step = 1000 or tr",
    "optimizer.phases_in=token": "phases_in = 'token' is unknown; did you mean 'tokens'",
    "optimizer.decay_shape=sqr": "decay_shape = 'sqr' is unknown; did you mean 'sqrt'",
    "optimizer.cooldown_shape=cos": "cooldown_shape = 'cos' is unknown; did you mean 'cosine'",
    "optimizer.cooldown_alpha=0.0": "cooldown_alpha = 0.0 must be above 0",
    "optimizer.cycle_growth=0.5": "cycle_growth = 0.5 must be at least 1",
    "optimizer.milestones=(20,10)": r"milestones = \(20, 10\) must rise, from above 0: \(10, 20\)",
    "data.eval_stride=257": "data.eval_stride = 257 .*data.seq_len = 256",
    "data.fractions=(0,0.5,0.5)": r"data.fractions = \(0, 0.5, 0.5\) leaves no documents to train",
    "data.replay=0.5": "data.replay = 0.5 and data.replay_sources = .*: replay needs both",
    "data.replay_sources=(a,)": "data.replay = 0.0 and data.replay_sources = .*: replay needs both",
    "train.start_step=3": "train.start_step and train.start_optimizer need train.start_from",
    "train.start_optimizer=True": "start_step and train.start_optimizer need train.start_from",
    "mesh.sequence=3": "mesh.sequence = 3 with data.seq_len = 256",
    "model.d_model=1": "d_model=1",
    "model.d_model=0": "d_model=0",
    "model.d_model=101": "d_model=101",
    "model.n_heads=3": "n_heads=3 does not divide d_model=512",
    "model.n_heads=512": "n_heads=512",
    "model.n_heads=0": "n_heads=0",
    "model.n_kv_heads=3": "n_kv_heads=3",
    "model.n_kv_heads=16": "n_kv_heads=16",
    "model.head_dim=33": "head_dim=33 is odd",
    "model.pattern=local_attention": "'local_attention' in pattern needs window",
    "model.mixers.mamba2.state_dim=3": r"'mamba2' has options \(state_dim\), but is not",
    "model.mixers.local_attention.window=64": r"'local_attention' has options \(window\), but",
    "model.mixers.attention.n_kv_heads=3": "mixers: of 'attention', n_kv_heads=3 must divide",
    "model.mixers.attention.position=learned": "mixers: of 'attention', position is 'learned'",
    "model.attention_sequence_parallel=chain": "attention_sequence_parallel is 'chain', which",
    "model.scan_sequence_parallel=ulysses": "scan_sequence_parallel is 'ulysses', which is unknown",
    "model.rope_scaling=linear": "rope_scaling='linear' must hold fields",
    "model.logit_cap=0.0": "logit_cap=0.0 must be positive",
    "model.attention_logit_cap=-1": "attention_logit_cap=-1.* must be positive",
}


def alone(key, value):
    config = default_config()
    override(config, f"{key}={value}")
    return config


def test_every_key_is_tried():
    """A new key comes with values that work."""
    known = lib.known_keys()
    sections = {key.rpartition(".")[0] for key in known}
    tried = set(WORK) | {refused.partition("=")[0] for refused in REFUSED}
    plain = {
        "task", "stages", "data.tokenizer", "train.resume_step", "mesh.fsdp", "mesh.tensor",
        "model.causal",
        "model.input_features", "model.attention_bias", "model.mlp_bias",
        "model.norm_eps", "model.embed_scale", "model.logit_scale", "model.sequence_balance",
        "model.attention_sequence_parallel", "model.scan_sequence_parallel",
        "model.attention_implementation",
    }  # fmt: skip
    keys = {k for k in known if k not in sections and not k.startswith("model.mixers.")}
    assert keys - tried - plain == set() and plain <= keys


@pytest.mark.parametrize("key", WORK)
def test_one_key_set_alone_works(key):
    for value in WORK[key]:
        c = settings(alone(key, value))
        rate = make_optimizer(c.optimizer, c.train.steps)[1]
        assert 0 <= float(rate(0)) <= 1.001 * c.optimizer.learning_rate
        assert 0 <= warmup_steps(c.optimizer, c.train.steps)
        c.model_config(vocab_size=258)


@pytest.mark.slow
@pytest.mark.parametrize("key", WORK)
def test_one_key_set_alone_traces(key):
    """The very training step, its shapes alone."""
    for value in WORK[key]:
        c = settings(alone(key, value))
        mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
        model, (tx, rate) = inputs.make_model(c), make_optimizer(c.optimizer, c.train.steps)
        B, T = c.data.batch_size, c.data.seq_len
        names = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: np.zeros((B, T), np.int32) for name in names}
        batch["weights"] = np.ones((B, T), np.float32)
        example = {name: value[:1] for name, value in batch.items()}
        _, state, _ = train.sharded_init(model, tx, example, c.seed, mesh)
        step = steps.make_train_step(train.make_loss(model, c), tx, rate, c.train.microbatches)
        with sharding.use(mesh):
            _, metrics = jax.eval_shape(step, state, batch)
        assert metrics["loss"].shape == ()


@pytest.mark.parametrize("assignment", REFUSED)
def test_what_cannot_be_is_refused_by_the_name_of_what_was_set(assignment):
    config = default_config()
    override(config, assignment)
    with pytest.raises(ConfigError, match=REFUSED[assignment]):
        settings(config)


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        (dict(), 1000, 100),
        (dict(), 50, 5),
        (dict(), 9, 0),
        (dict(schedule="linear"), 70, 7),
        (dict(schedule="wsd", decay_steps=45), 50, 5),
        (dict(schedule="wsd", decay_steps=48), 50, 2),
        (dict(schedule="wsd", decay_steps=50), 50, 0),
        (dict(schedule="constant"), 50, 100),  # as before a run was made longer
        (dict(schedule="constant"), 5000, 100),
        (dict(schedule="inverse_sqrt", warmup_steps=3), 2, 3),
    ],
)
def test_the_warm_up_follows_the_steps(options, steps, expected):
    assert warmup_steps(OptimizerConfig(**options), steps) == expected


def test_only_what_was_set_is_refused():
    with pytest.raises(ConfigError, match=r"^optimizer.decay_steps = 51 exceeds train.steps = 50"):
        warmup_steps(OptimizerConfig(schedule="wsd", decay_steps=51), 50)
    config = default_config()
    config.optimizer.name, config.optimizer.weight_decay = "adam", 0.1
    with pytest.raises(ConfigError, match="'adam' does not decay weights"):
        settings(config)
    assert OptimizerConfig(name="adam").weight_decay == 0 and OptimizerConfig().weight_decay == 0.1


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        (dict(), 8),
        (dict(d_model=100), 5),
        (dict(d_model=24), 6),
        (dict(d_model=24, position="none"), 8),
        (dict(d_model=14), 7),
        (dict(d_model=2), 1),
        (dict(d_model=96, n_kv_heads=3), 6),
        (dict(d_model=100, head_dim=4), 8),
        (dict(d_model=101, pattern=("mlp",)), 8),
    ],
)
def test_heads_follow_the_width(fields, heads):
    assert LanguageModelConfig(vocab_size=1, **fields).n_heads == heads


def test_learned_positions_reach_as_far_as_the_rows():
    config = alone("data.seq_len", 3000)
    assert settings(config).model_config(1).max_len == 3000
    override(config, "model.max_len=2000")
    assert settings(config).model_config(1).max_len == 2000
    assert settings(default_config()).model_config(1).max_len == 1024


def test_a_default_that_follows_equals_what_it_follows_to():
    """Records of a run with the numbers written out are those of one with the defaults."""
    ours = json.loads(json.dumps(lib.as_dict(settings(default_config()))))
    theirs = json.loads(json.dumps(ours))
    theirs["optimizer"]["warmup_steps"] = 100
    theirs["model"] |= {"n_heads": 8, "max_len": 1024}
    assert lib.differing_keys(ours, theirs) == lib.differing_keys(theirs, ours) == {}
    theirs["optimizer"]["warmup_steps"], theirs["model"]["n_heads"] = 99, 4
    assert lib.differing_keys(ours, theirs) == {
        "optimizer.warmup_steps": (100, 99),
        "model.n_heads": (8, 4),
    }


class Saved(Checkpoints):
    """As much of Checkpoints as `step_to_restore` asks: one checkpoint, at step 2."""

    directory = "checkpoints"

    def __init__(self, *assignments):
        self.config = json.loads(json.dumps(lib.as_dict(settings(with_all(*assignments)))))

    def steps(self):
        return [2]

    def path(self, step):
        return f"checkpoints/{step}"

    def config_at(self, step):
        return self.config


def with_all(*assignments):
    config = default_config()
    for assignment in assignments:
        override(config, assignment)
    return config


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_run_without_end_is_made_longer_with_the_default_warm_up(schedule):
    saver = Saved(f"optimizer.schedule={schedule}", "train.steps=50")
    longer = settings(with_all(f"optimizer.schedule={schedule}", "train.steps=500"))
    assert train.step_to_restore(saver, longer) == 2
    assert warmup_steps(longer.optimizer, 50) == warmup_steps(longer.optimizer, 500)
    with pytest.raises(CheckpointError, match=f"schedule = 'cosine', was '{schedule}'; .*steps"):
        train.step_to_restore(saver, settings(default_config()))
