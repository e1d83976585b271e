"""What the training tests share: a very small model with named axes, invented data, a run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
from flax import linen as nn

from tilescan.models import LanguageModel, LanguageModelConfig
from tilescan.training.config import default_config, override

VOCAB, WIDTH, HIDDEN, HEADS = 32, 16, 32, 4


class TinyModel(nn.Module):
    """Embedding, a gated mix over the past, heads, MLP, dropout, output: one of each named axis."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens, *, positions=None, segment_ids=None):
        init, named = nn.initializers.normal(0.1), nn.with_logical_partitioning
        embedding = self.param("embedding", named(init, ("vocab", "embed")), (VOCAB, WIDTH))
        up = self.param("up", named(init, ("embed", "heads", "head_dim")), (WIDTH, HEADS, 8))
        down = self.param("down", named(init, ("mlp", "embed")), (HEADS * 8, WIDTH))
        scale = self.param("scale", named(nn.initializers.ones, ("norm",)), (WIDTH,))
        x = embedding[tokens]
        past = x.cumsum(1) / (1.0 + np.arange(tokens.shape[1], dtype=np.float32))[None, :, None]
        h = nn.tanh(np.float32(1) * (x + past)) * scale[None, None]
        h = nn.relu((h[..., None, None] * up[None, None]).sum(2)).reshape(*tokens.shape, -1)
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        return (x + h @ down) @ embedding.T, None


def hybrid_model():
    """A language model with attention and a recurrence, whose sequence can be cut."""
    return LanguageModel(
        LanguageModelConfig(
            vocab_size=VOCAB,
            d_model=WIDTH,
            pattern=("attention", "mamba2"),
            repeats=1,
            n_heads=4,
            n_kv_heads=2,
            mixers=dict(mamba2=dict(head_dim=4, state_dim=4)),
        )
    )


class Rows:
    """An endless, checkpointable stream of batches: row i depends on i alone."""

    def __init__(self, batch_size=8, seq_len=12, nan_at=None):
        self.batch_size, self.seq_len, self.nan_at, self.index = batch_size, seq_len, nan_at, 0

    def __iter__(self):
        return Rows(self.batch_size, self.seq_len, self.nan_at)

    def __next__(self):
        rng = np.random.default_rng([7, self.index])
        tokens = rng.integers(0, VOCAB, (self.batch_size, self.seq_len + 1)).astype(np.int32)
        tokens[:, 1::2] = (tokens[:, :-1:2] * 3 + 1) % VOCAB  # half of it can be learnt
        weights = (rng.random((self.batch_size, self.seq_len)) < 0.8).astype(np.float32)
        if self.index == self.nan_at:
            weights[0, 0] = np.nan
        self.index += 1
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def tiny_datasets(nan_at=None, validation=3):
    some = iter(Rows())
    some.index = 10**6
    held_out = [next(some) for _ in range(validation)]
    held_out[-1] = {k: v[:5] for k, v in held_out[-1].items()}  # a last batch that is not full
    return {"train": Rows(nan_at=nan_at), "validation": held_out}


def tiny_config(*assignments):
    config = default_config()
    config.data.batch_size, config.data.seq_len = 8, 12
    config.train.update(
        steps=12, log_every=1, eval_every=6, checkpoint_every=4, progress=False, tensorboard=False
    )
    config.optimizer.update(learning_rate=1e-2, warmup_steps=3)
    for assignment in assignments:
        override(config, assignment)
    return config


def start_process(*arguments, code=""):
    """Starts `main` with these arguments in another process, after `code` has run there."""
    here = pathlib.Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    program = f"{code}\nimport tiny_training\ntiny_training.main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main():
    from tilescan.training.train import train

    train(tiny_config(*sys.argv[2:]), sys.argv[1], model=TinyModel(0.1), datasets=tiny_datasets())
