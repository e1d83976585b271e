"""What copying from a distance asks of attention and of a decaying state, built by hand.

"Can Mamba Always Enjoy the Free Lunch?" (arXiv 2410.03810): theorem 1 (a state of constant size
needs a score that grows exponentially with the distance), theorem 2 (attention one that grows as a
logarithm) and theorem 3 (a state with a key for each item copies exactly). Nothing is trained: the
ops of this project run on the constructed queries, keys and values.

Dimensions: L distance in tokens, N state dim, n items.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilescan.ops.attention import attention
from tilescan.ops.gated_linear_attention import gated_linear_attention

ATTENTION, STATE = "attention", "decaying state"
LARGEST_SCORE = 1e30  # float32 ends at 3e38


def required_score(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Finds the smallest score of an item that copies its value, by bisection, at each distance.

    The last of L + 1 tokens asks for the first. That one's value is 1, all others' is -1, the worst
    case; their scores are 0. Attention takes the softmax of the scores; the state multiplies what
    it holds by `decay` at each step, and adds up scores times values.

    Settings: mechanism (ATTENTION or STATE), decay (of STATE), lengths, tolerance (largest error of
    the output).

    Returns:
      {"lengths", "scores"}; a length whose score exceeds what float32 holds is left out.
    """
    lengths, scores = [], []
    for length in settings["lengths"]:
        error = jax.jit(_copy_error(settings["mechanism"], length, settings.get("decay")))
        score = _smallest(lambda s, error=error: float(error(s)) <= settings["tolerance"])
        if score is not None:
            lengths.append(length)
            scores.append(score)
    return {"lengths": lengths, "scores": scores}


def _copy_error(mechanism: str, length: int, decay: float | None) -> Callable:
    """Returns score -> how far the last token's output is below the first token's value 1."""
    time = length + 1
    v = jnp.where(jnp.arange(time) == 0, 1.0, -1.0)[None, :, None, None]
    q = jnp.ones((1, time, 1, 1))

    def error(score):
        k = jnp.zeros((1, time, 1, 1)).at[0, 0].set(score)
        if mechanism == ATTENTION:
            o = attention(q, k, v, scale=1.0, implementation="xla")
        else:
            log_decay = jnp.full((1, time, 1), np.log(decay), jnp.float32)
            o, _ = gated_linear_attention(q, k, v, log_decay, scale=1.0, implementation="xla")
        return 1.0 - o[0, -1, 0, 0]

    return error


def _smallest(enough: Callable[[float], bool], digits: float = 1e-5) -> float | None:
    """Returns the smallest x > 0 with enough(x), to relative precision; None: > LARGEST_SCORE."""
    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 4 * high
        if high > LARGEST_SCORE:
            return None
    while high - low > digits * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def recall(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Counts how many of n stored items come back, from a state of N x V and from attention.

    Item i is a random one of V symbols under key i: one-hot vectors as values; keys are orthonormal
    as long as n <= N (theorem 3), beyond that random directions, the best that is left. Nothing
    decays. After all items each is asked for by its key; it is recalled if its symbol has the
    largest output.

    Settings: state_dim (N), vocab (V), items (numbers of items), trials, sharpness (factor of
    attention's scores).

    Returns:
      {"items", ATTENTION: [share recalled], STATE: [share recalled]}, means over the trials.
    """
    N, V, trials = settings["state_dim"], settings["vocab"], settings["trials"]
    rng = np.random.default_rng(seed)
    shares = {ATTENTION: [], STATE: []}
    for n in settings["items"]:
        keys = jnp.asarray(_keys(rng, trials, n, N), jnp.float32)[:, :, None]
        symbols = rng.integers(0, V, (trials, n))
        values = jax.nn.one_hot(symbols, V)[:, :, None]
        written = [jnp.zeros_like(a) for a in (keys, values)]
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip((keys, values), written, strict=True))
        q = jnp.concatenate([jnp.zeros_like(keys), keys], axis=1)
        from_state, _ = gated_linear_attention(q, k, v, scale=1.0, implementation="xla")
        scale = settings["sharpness"]
        attended = attention(keys, keys, values, scale=scale, implementation="xla")
        for name, o in ((STATE, from_state[:, n:]), (ATTENTION, attended)):
            found = np.argmax(np.asarray(o[:, :, 0]), axis=-1)
            shares[name].append(float(np.mean(found == symbols)))
    return {"items": list(settings["items"]), **shares}


def _keys(rng: np.random.Generator, trials: int, n: int, N: int) -> np.ndarray:
    """Returns unit vectors [trials, n, N]: orthonormal if n <= N, else random directions."""
    keys = rng.normal(size=(trials, max(n, 1), N))
    if n <= N:
        q, _ = np.linalg.qr(np.swapaxes(keys, 1, 2))
        return np.swapaxes(q, 1, 2)
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)
