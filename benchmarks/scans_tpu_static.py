"""Programs of the diagonal scans, to be compiled for TPUs that are not here."""

import jax


def gradient(op, B, T, D, dtype, constant=False, segments=False, implementation=None):
    """Both results of the public op and the gradients of all its inputs, for given cotangents."""
    from ops.linear_recurrence import linear_recurrence

    spec = jax.ShapeDtypeStruct
    a, b = spec((D,) if constant else (B, T, D), dtype), spec((B, T, D), dtype)
    state = spec((B, D), "complex64" if dtype == "complex64" else "float32")
    ids = spec((B, T), "int32") if segments else None

    def function(a, b, state, ids, dh, dlast):
        run = lambda a, b, state: linear_recurrence(
            a, b, initial_state=state, segment_ids=ids, implementation=implementation
        )
        return jax.vjp(run, a, b, state)[1]((dh, dlast))

    return function, (a, b, state, ids, b, state)
