"""An identity that raises when a program containing it is lowered.

Which platform a program is for is known when it is lowered, not when it is traced: this is how an
op says then, and in words, that it has no kernel for that platform.
"""

from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_refuse = Primitive("refuse_to_lower")
_refuse.def_abstract_eval(lambda x, message: x)


def refuse(x, message: str):
    """x, in a program that cannot be lowered: lowering raises ValueError(message)."""
    return _refuse.bind(x, message=message)


def _raise(message):
    raise ValueError(message)


_refuse.def_impl(lambda x, message: _raise(message))
mlir.register_lowering(_refuse, lambda context, x, message: _raise(message))
batching.primitive_batchers[_refuse] = lambda xs, dims, message: (refuse(*xs, message), dims[0])
