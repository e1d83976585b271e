"""What S4's paper publishes: accuracy, cost against a dense state matrix, and generation."""

# Tables 6 (digits) and 4, accuracy in percent.
ACCURACY = {
    "digits": {"s4": 99.63, "attention": 98.9},
    "listops": {"s4": 59.60, "attention": 36.37},
    "image": {"s4": 88.65, "attention": 42.44},
    "pathfinder": {"s4": 94.20, "attention": 71.40},
}
# Table 2, dense (LSSL) over S4 by the paper's dimension: time of a step, memory.
COST = {
    128: (9.32 / 4.77, 222 / 5.3),
    256: (20.6 / 3.07, 1685 / 12.6),
    512: (140.7 / 4.75, 13140 / 33.5),
}
# Table 8: 48K tokens a second against 0.8K, of models of this width.
SPEED, WIDTH = 60.0, 1024
