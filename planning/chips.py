"""Vendors' figures of chips: the project's one table of peaks."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a vendor says of a chip: bounds, which no program exceeds.

    Attributes:
      name: as it is sold.
      kinds: what `jax.Device.device_kind` contains.
      memory: bytes that a program may use.
      flops: dense bfloat16 FLOP/s.
      bandwidth: bytes a second of its memory.
      links: bytes a second that it sends over all its links together, one way; None: not stated.
    """

    name: str
    kinds: tuple[str, ...]
    memory: float
    flops: float
    bandwidth: float
    links: float | None


# Google Cloud's pages "TPU v4" to "TPU v6e": HBM capacity and bandwidth, peak bf16, and half of the
# "bidirectional inter-chip interconnect bandwidth (per chip)". NVIDIA's datasheets of H100 (SXM5)
# and H200: half of NVLink's 900 GB/s; between hosts the network is slower.
CHIPS = {
    "v4": Chip("TPU v4", ("TPU v4",), 32 * GIB, 275e12, 1228e9, None),
    "v5e": Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1638e9, 400e9),
    "h100": Chip("H100 SXM", ("H100",), 80 * GIB, 989e12, 3350e9, 450e9),
    "h200": Chip("H200 SXM", ("H200",), 141e9, 989e12, 4800e9, 450e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`, None if it is not in the table."""
    kinds = {kind.lower(): chip for chip in CHIPS.values() for kind in chip.kinds}
    # "TPU v5 lite" contains "TPU v5" as well: the longest name is meant.
    found = [kind for kind in kinds if kind in device_kind.lower()]
    return kinds[max(found, key=len)] if found else None
