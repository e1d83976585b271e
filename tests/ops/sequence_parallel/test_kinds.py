"""What a model's setting names."""

import pytest

from tilescan.ops.sequence_parallel import (
    ATTENTION,
    ATTENTION_KINDS,
    TPU_ATTENTION_KINDS,
    Kinds,
    kinds,
)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("ulysses", Kinds("ulysses", "all_scan")),
        ("log_step", Kinds("ring", "log_step")),
        ("all_gather", Kinds("all_gather", "all_gather")),
        ("ring_kernel", Kinds("ring_kernel", "all_scan")),
        ("ring_kernel+chain", Kinds("ring_kernel", "chain")),
    ],
)
def test_a_setting_names_ways_for_attention_and_for_recurrences(setting, expected):
    assert kinds(setting) == expected


def test_every_way_of_attention_has_an_op():
    assert tuple(ATTENTION) == ATTENTION_KINDS + TPU_ATTENTION_KINDS


@pytest.mark.parametrize("setting", ["ring_kernels", "chain+ring", "ring+ring", "ring+chain+chain"])
def test_an_unknown_setting_is_named_with_what_there_is(setting):
    with pytest.raises(ValueError, match="ring_kernel, recurrences one of all_scan") as error:
        kinds(setting)
    assert repr(setting) in str(error.value)
    if setting == "ring_kernels":
        assert "did you mean 'ring_kernel'?" in str(error.value)
