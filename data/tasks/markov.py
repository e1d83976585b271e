"""Walks of a Markov chain, whose log probabilities are known: sequences to learn wholly."""

import numpy as np
from jaxtyping import Float, Int


class MarkovChain:
    """A chain over V tokens, each of which mostly goes on to a few others.

    Attributes:
      next: probabilities of the next token (column) by the last one (row) [V, V], float64; nothing
        is impossible.
    """

    next: Float[np.ndarray, "V V"]

    def __init__(self, vocab_size: int, seed: int):
        """Makes each token's probabilities from a Dirichlet distribution of weights 0.2."""
        rng = np.random.default_rng([seed, vocab_size])
        self.next = rng.dirichlet(np.full(vocab_size, 0.2), size=vocab_size)
        self.next = 0.98 * self.next + 0.02 / vocab_size

    def walks(
        self, first: Int[np.ndarray, " B"], steps: int, rng: np.random.Generator
    ) -> Int[np.ndarray, "B T"]:
        """Returns walks that begin with `first`, int32, T = 1 + steps."""
        walk = [first]
        cumulative = np.cumsum(self.next, axis=1)
        for _ in range(steps):
            sampled = rng.random((len(first), 1))
            chosen = np.sum(cumulative[walk[-1]] < sampled, axis=1)
            walk.append(np.minimum(chosen, len(self.next) - 1))
        return np.stack(walk, axis=1).astype(np.int32)

    def log_probabilities(self, walks: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T-1"]:
        """Returns the logarithm of each step's probability, float32."""
        return np.log(self.next[walks[:, :-1], walks[:, 1:]]).astype(np.float32)
