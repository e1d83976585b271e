"""The strategies to shard one sequence over devices, by name.

One setting names a strategy for attention, one for recurrences, or both:

    "ring"              attention by a ring; recurrences by their default, "all_scan"
    "ring_kernel"       the ring on TPUs alone, its transfers within the attention kernels
    "log_step"          recurrences by a log-step scan; attention by its default, "ring"
    "ulysses+chain"     attention by all-to-all, recurrences by a chain
    "all_gather"        both gather: keys and values (LASP-2H), states (LASP-2)
"""

from typing import NamedTuple

from tilescan.spelling import did_you_mean

# Each is described in the module of its name.
ATTENTION_KINDS = ("ring", "ulysses", "usp", "all_gather", "ring_self_attention")
# The same for TPUs alone.
TPU_ATTENTION_KINDS = ("ring_kernel",)
SCAN_KINDS = ("all_scan", "chain", "all_gather", "log_step")
# Which tokens a device holds; see `ops.sequence_parallel.layouts`.
BALANCES = ("contiguous", "zigzag", "striped")


class Kinds(NamedTuple):
    """The strategies of attention and of recurrences."""

    attention: str
    scan: str


def kinds(setting: str) -> Kinds:
    """Returns the strategies that a setting names; by default "ring" and "all_scan".

    Raises:
      ValueError: a name that neither attention nor recurrences have.
    """
    names = setting.split("+")
    attention = ATTENTION_KINDS + TPU_ATTENTION_KINDS
    if len(names) == 2 and names[0] in attention and names[1] in SCAN_KINDS:
        return Kinds(*names)
    if len(names) == 1 and setting in attention + SCAN_KINDS:
        return Kinds(
            setting if setting in attention else ATTENTION_KINDS[0],
            setting if setting in SCAN_KINDS else SCAN_KINDS[0],
        )
    raise ValueError(
        f"sequence_parallel={setting!r} is unknown; "
        f"{did_you_mean(setting, attention + SCAN_KINDS)}attention takes one of "
        f"{', '.join(attention)}, recurrences one of {', '.join(SCAN_KINDS)}, and both "
        "are written 'ring+all_scan'"
    )
