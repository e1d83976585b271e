"""What FlashAttention-2's paper publishes: speed-ups and training speed on A100s."""

# Section 4.1, over standard attention: a range in the text (the figures' points are not in it).
OVER_STANDARD = (3, 10)
# Section 3.1.1: speed-up of skipping the tiles above the diagonal, on long sequences.
CAUSAL = (1.7, 1.8)
# Table 1: TFLOP/s of each of 8 A100s in training, by model and context: without FlashAttention,
# with it, with FlashAttention-2.
TRAINING = {
    "GPT3-1.3B, 2k": (142, 189, 196),
    "GPT3-1.3B, 8k": (72, 170, 220),
    "GPT3-2.7B, 2k": (149, 189, 205),
    "GPT3-2.7B, 8k": (80, 175, 225),
}
