"""Every mixer of the project against every invariant. A new mixer is one line in MIXERS."""

import pytest
from adapters import attention_op
from suite import cases, linen

from models.attention import Attention
from models.mamba import Mamba
from models.mamba2 import Mamba2
from ops.masks import Causal, Full, SlidingWindow

MIXERS = [
    attention_op("op-causal", Causal()),
    attention_op("op-window", SlidingWindow(11), reach=12),
    attention_op("op-full", Full(), causal=False),
    linen("attention", Attention(n_heads=4, n_kv_heads=2, head_dim=8)),
    linen("attention-window", Attention(4, 4, 8, SlidingWindow(20), position="alibi"), reach=21),
    linen("mamba", Mamba(d_model=32, state_dim=4)),
    linen("mamba2", Mamba2(d_model=32, state_dim=8, head_dim=16, n_groups=2)),
]


@pytest.mark.parametrize(
    "mixer,check", cases(MIXERS), ids=lambda x: getattr(x, "__name__", repr(x))
)
def test_invariant(mixer, check):
    check(mixer)
