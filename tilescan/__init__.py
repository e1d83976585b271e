"""Long-sequence models in JAX: tiled attention, associative scans, and the papers built on them.

The packages stand beside this folder, at the top of the repository; the links here give them one
import name: `from tilescan.ops.attention import attention`.
"""

__version__ = "0.1.0"
