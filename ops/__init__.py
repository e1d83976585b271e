"""What the maths is: one public function per operation, every backend behind it.

    from ops import attention, masks
    o = attention(q, k, v, mask=masks.Causal())

`ops.attention` is the function; its module's other names are imported from the module, as in
`from ops.attention import merge_partials`.
"""

from ops import masks
from ops.attention import attention, decode_attention, merge_partials

__all__ = ["attention", "decode_attention", "masks", "merge_partials"]
