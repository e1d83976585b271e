"""What ZeCO's paper publishes, by way of a note on it: times and throughput on H100s."""

# Milliseconds of the primitives by devices: 8K tokens a device, width 4,096, 32 heads.
PRIMITIVE = {
    "all_gather": {8: 0.375, 16: 0.658, 32: 1.616, 64: 2.543, 128: 4.350, 256: 8.514},
    "all_scan": {8: 0.226, 16: 0.297, 32: 0.448, 64: 0.739, 128: 1.272, 256: 2.165},
}
# Milliseconds of the operator of a 1B GLA, 16K tokens a device, 16 heads.
OPERATOR = {
    "chain": {8: 22.59, 32: 39.03, 128: 113.71},
    "all_gather": {8: 19.39, 32: 25.72, 128: 35.72},
    "all_scan": {8: 7.32, 32: 7.65, 128: 9.88},
}
ALONE = {8: 6.39, 32: 6.44, 128: 6.12}  # data parallelism: nothing is sent
# Tokens per second and GPU, training a 1B GLA with 32K tokens a device, by GPUs.
TRAINING = {
    8: {"chain": 27014, "all_gather": 42946, "all_scan": 47369, "data": 49633},
    64: {"chain": 12268, "all_gather": 37485, "all_scan": 44468, "data": 48230},
    128: {"all_gather": 33327, "all_scan": 43278, "data": 47848},
    256: {"all_gather": 25402, "all_scan": 40967, "data": 46588},
}
