"""FLOPs of attention as FlashAttention-2 counts them.

Dimensions: B batch, T query time, S key time, H heads, D head dim.
"""


def attention_flops(
    B: int, T: int, S: int, H: int, D: int, *, causal: bool = False, direction: str = "fwd"
) -> float:
    """Returns FLOPs: 4 T S D H B forward, half of them if causal, and backward 2.5 times those.

    Args:
      direction: "fwd", "bwd" or "fwd+bwd".

    Raises:
      ValueError: any other direction.
    """
    forward = 4.0 * B * T * S * H * D * (0.5 if causal else 1.0)
    factors = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
    if direction not in factors:
        raise ValueError(f"direction={direction!r} must be one of {', '.join(factors)}")
    return forward * factors[direction]


def window_flops(B: int, T: int, left: int, H: int, D: int, *, direction: str = "fwd") -> float:
    """Returns the FLOPs for T = S and a causal window of left + 1 keys: of visible scores alone."""
    visible = sum(min(i, left) + 1 for i in range(T))
    return attention_flops(B, T, T, H, D, direction=direction) * visible / T**2
