"""The base class of models and layers: it calls them under meshes with Explicit axes.

Linear maps contract dimensions that are sharded, mixers split what they project: under Explicit
axes each would have to say how its results are sharded. So `apply` and `init` leave that to the
compiler (`ops.explicit_axes.as_auto`), and the results lie on the mesh as the inputs do.
"""

from typing import Any

from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array

from tilescan.ops.explicit_axes import as_auto, replicated, spec, specs_of


class Module(nn.Module):
    """`flax.linen.Module` whose `apply` and `init` take arrays with Explicit axes.

    The output's first dimensions lie as those of the first input do with which they agree, a state
    as the one that was given; what else there is, as parameters of `init`, is replicated.
    Within a module of another class a module runs in that one's mode.
    """

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module as `flax.linen.Module.apply` does, under any mesh."""
        return as_auto(super().apply, args, kwargs, self._results)

    @nn.nowrap
    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """Returns (output, variables) as `flax.linen.Module` does, under any mesh."""
        return as_auto(super().init_with_output, args, kwargs, replicated)

    @nn.nowrap
    def _results(self, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """The specs of what `apply` returns: y, (y, state), or either with collections."""
        variables, *inputs = args
        named = (kwargs[name] for name in ("x", "tokens") if name in kwargs)
        x = next(iter(inputs), None) if inputs else next(named, None)
        if kwargs.get("mutable") or kwargs.get("capture_intermediates"):
            return self._results(args, kwargs | _PLAIN, out[0]), replicated(args, kwargs, out[1])
        if x is None:
            return replicated(args, kwargs, out)
        if not isinstance(out, tuple):
            return self.output_spec(variables, x, out)
        y, state = out
        given = kwargs.get("state")
        specs = replicated(args, kwargs, state) if given is None else specs_of(given)
        return self.output_spec(variables, x, y), specs

    @nn.nowrap
    def output_spec(self, variables: Any, x: Array, y: Array) -> PartitionSpec:
        """Returns how the output y of the input x is sharded by Explicit axes."""
        pairs = enumerate(zip(x.shape, y.shape, strict=False))
        return spec(x, next((i for i, (n, m) in pairs if n != m), min(x.ndim, y.ndim)))


_PLAIN = dict(mutable=False, capture_intermediates=False)
