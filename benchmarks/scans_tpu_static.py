"""Programs of the diagonal scans, to be compiled for TPUs that are not here."""

import jax


def linear_gradient(B, T, D, dtype, constant=False, segments=False, implementation=None):
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


def selective_gradient(B, T, E, N, dtype, segments=False, implementation=None):
    """As `linear_gradient`, of the selective scan with D, z and a softplus of dt."""
    from ops.selective_scan import selective_scan

    spec = jax.ShapeDtypeStruct
    x, BC = spec((B, T, E), dtype), spec((B, T, N), dtype)
    A, D, state = (spec(shape, "float32") for shape in ((E, N), (E,), (B, E, N)))
    ids = spec((B, T), "int32") if segments else None

    def function(x, dt, A, B, C, D, z, state, ids, dy, dlast):
        run = lambda x, dt, A, B, C, D, z, state: selective_scan(
            x, dt, A, B, C, D=D, z=z, dt_softplus=True, initial_state=state, segment_ids=ids,
            implementation=implementation,
        )  # fmt: skip
        return jax.vjp(run, x, dt, A, B, C, D, z, state)[1]((dy, dlast))

    return function, (x, x, A, BC, BC, D, x, state, ids, x, state)
