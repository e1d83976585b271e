"""GRPO and DPO on whole logits against the losses by chunks, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from streamed_models import B, T, gradient, largest_error, setup

from tilescan.training import whole_losses
from tilescan.training.stream_bp import stream_dpo_loss, stream_grpo_loss

OPTIONS = dict(kl_weight=0.1, temperature=0.8, clip_low=0.1, clip_high=0.3)


@pytest.mark.parametrize("loss", ["grpo", "dpo"])
def test_they_are_the_losses_by_chunks(loss, float64):
    model, params, batch = setup(repeats=1, pattern=("mlp",))
    rng = np.random.default_rng(2)
    given = lambda: jnp.asarray(-3 + 0.3 * rng.normal(size=(B, T)))
    batch["weights"] = (batch["weights"] > 0).astype(jnp.float64)
    batch |= {"old_log_probs": given(), "reference_log_probs": given()}
    batch["advantages"] = jnp.asarray([1.0, -2.0])
    if loss == "grpo":
        whole = whole_losses.grpo_loss(model, **OPTIONS)
        chunked = stream_grpo_loss(model, chunks=None, logit_chunk=5, **OPTIONS)
    else:
        whole = whole_losses.dpo_loss(model, beta=0.3)
        chunked = stream_dpo_loss(model, chunks=None, logit_chunk=5, beta=0.3)
    (value, sums), got = gradient(whole, params, batch)
    (want, others), exact = gradient(chunked, params, batch)
    np.testing.assert_allclose(value, want, rtol=1e-10)
    assert float(sums["weight"]) == float(others["weight"]) == (2 if loss == "grpo" else 1)
    assert sums.keys() <= others.keys()
    assert largest_error(got, exact) < 1e-9
