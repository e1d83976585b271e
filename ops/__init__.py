"""What the maths is: one public function per operation, every backend behind it.

    from ops import attention, masks
    o = attention(q, k, v, mask=masks.Causal())

`ops.attention` is the function; its module's other names are imported from the module, as in
`from ops.attention import merge_partials`.
"""

from ops import masks
from ops.attention import attention, decode_attention, merge_partials
from ops.delta_rule import delta_rule, gated_delta_rule
from ops.gated_linear_attention import gated_linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.long_convolution import long_convolution
from ops.selective_scan import selective_scan
from ops.short_convolution import short_convolution
from ops.ssd import ssd

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
