"""Every mixer of the project against every invariant. A new mixer is one line in MIXERS."""

import pytest
from adapters import attention_op
from suite import cases, linen

from models.attention import Attention
from ops.masks import Causal, Full, SlidingWindow

MIXERS = [
    attention_op("op-causal", Causal()),
    attention_op("op-window", SlidingWindow(11), reach=12),
    attention_op("op-full", Full(), causal=False),
    linen("attention", Attention(n_heads=4, n_kv_heads=2, head_dim=8)),
    linen("attention-window", Attention(4, 4, 8, SlidingWindow(20), position="alibi"), reach=21),
]


@pytest.mark.parametrize(
    "mixer,check", cases(MIXERS), ids=lambda x: getattr(x, "__name__", repr(x))
)
def test_invariant(mixer, check):
    check(mixer)
