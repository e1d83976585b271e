"""What RSA's paper publishes: memory and speed of BERT-Base on P100s, largest sizes that fit."""

from tilescan.experiments.harness.tables import RECALLED, SECONDARY

# Table 4, GPUs of 16 GB, {devices: MB of a device}: batches of 64 N at 512 tokens, and batches of
# 64 at 256 N tokens.
MEMORY_KINDS = {"batch": SECONDARY, "length": RECALLED}
MEMORY = {
    "batch": {
        "tensor": {1: 8477.28, 2: 9520.47, 4: 12232.52},
        "ring_self_attention": {1: 8477.53, 2: 8478.76, 4: 8481.26, 8: 8490.75},
    },
    "length": {
        "tensor": {1: 3707.39, 2: 4993.43, 4: 8175.93, 8: 14862.09},
        "ring_self_attention": {1: 3707.01, 2: 4670.64, 4: 6601.88, 8: 10536.38},
    },
}
# The same runs' tokens/s, recalled.
SPEED = {
    "batch": {
        "tensor": {1: 9946.15, 2: 15510.19, 4: 20701.96},
        "ring_self_attention": {1: 9261.04, 2: 13938.22, 4: 21269.91, 8: 26401.64},
    },
    "length": {
        "tensor": {1: 9752.61, 2: 14195.17, 4: 19879.27, 8: 22330.5},
        "ring_self_attention": {1: 9340.13, 2: 13144.16, 4: 18243.82, 8: 21625.51},
    },
}
# Of the abstract: RSA on 64 devices over tensor parallelism on 12, as many as BERT-Base has heads.
LARGEST = {"batch": 13.7, "length": 3.0}
# Of the abstract: the longest sequence with sparse attention, 32 devices over one.
SPARSE = 27.0
