"""Operations of attention as FlashAttention-2 counts them.

Letters: B batch, T query time, S key time, H heads, D head dim.
"""


def attention_flops(B, T, S, H, D, *, causal=False, direction="fwd"):
    """Floating-point operations: 4 T S D H B forward, halved if causal, backward 2.5 times that.

    Args:
      direction: "fwd", "bwd" or "fwd+bwd".
    """
    forward = 4.0 * B * T * S * H * D * (0.5 if causal else 1.0)
    factors = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
    if direction not in factors:
        raise ValueError(f"direction={direction!r} must be one of {', '.join(factors)}")
    return forward * factors[direction]


def window_flops(B, T, left, H, D, *, direction="fwd"):
    """The same for T = S and a causal window of left + 1 keys: the visible scores alone."""
    visible = sum(min(i, left) + 1 for i in range(T))
    return attention_flops(B, T, T, H, D, direction=direction) * visible / T**2
