"""What Ulysses' paper publishes: times on many GPUs, and the longest sequences."""

# Tables 2 and 3: milliseconds of an iteration and TFLOPs a GPU, by GPUs and length (recalled).
SCALING = {
    (64, 65536): (9676.8, 161.4),
    (64, 131072): (32432.1, 165.5),
    (128, 131072): (17052.5, 157.4),
    (256, 131072): (9886.7, 136.1),
    (256, 262144): (33486.5, 147.4),
}
# Figure 2: the longest sequence of GPT-1.2B by GPUs (A100).
LONGEST = {1: 8192, 64: 1_048_576}
