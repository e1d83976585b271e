"""What the maths is: one public function per operation, every backend behind it.

    from tilescan.ops import attention, masks
    o = attention(q, k, v, mask=masks.Causal())

`ops.attention` is the function; its module's other names are imported from the module, as in
`from tilescan.ops.attention import merge_partials`.
"""

from tilescan.ops import masks
from tilescan.ops.attention import attention, decode_attention, merge_partials
from tilescan.ops.delta_rule import delta_rule, gated_delta_rule
from tilescan.ops.gated_linear_attention import gated_linear_attention
from tilescan.ops.linear_recurrence import linear_recurrence
from tilescan.ops.long_convolution import long_convolution
from tilescan.ops.selective_scan import selective_scan
from tilescan.ops.short_convolution import short_convolution
from tilescan.ops.ssd import ssd

__all__ = [
    "attention",
    "decode_attention",
    "delta_rule",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_recurrence",
    "long_convolution",
    "masks",
    "merge_partials",
    "selective_scan",
    "short_convolution",
    "ssd",
]
