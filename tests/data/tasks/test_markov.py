"""Walks of Markov chains: their steps are the chain's."""

import numpy as np

from tilescan.data.tasks.markov import MarkovChain


def test_walks_take_the_chains_steps():
    chain, rng = MarkovChain(8, 1), np.random.default_rng(0)
    np.testing.assert_allclose(chain.next.sum(axis=1), 1)
    walks = chain.walks(np.arange(200) % 8, 200, rng)
    assert walks.shape == (200, 201) and walks.dtype == np.int32
    np.testing.assert_array_equal(walks[:, 0], np.arange(200) % 8)
    counts = np.zeros((8, 8))
    np.add.at(counts, (walks[:, :-1], walks[:, 1:]), 1)
    seen = counts.sum(1) > 1000
    shares = counts[seen] / counts[seen].sum(1, keepdims=True)
    assert seen.any()
    np.testing.assert_allclose(shares, chain.next[seen], atol=0.05)


def test_a_walks_log_probabilities_are_those_of_its_steps():
    chain = MarkovChain(5, 0)
    walk = chain.walks(np.array([3]), 4, np.random.default_rng(1))
    want = [np.log(chain.next[a, b]) for a, b in zip(walk[0, :-1], walk[0, 1:], strict=True)]
    np.testing.assert_allclose(chain.log_probabilities(walk)[0], want, rtol=1e-6)
    np.testing.assert_array_equal(chain.next, MarkovChain(5, 0).next)
    assert not np.array_equal(chain.next, MarkovChain(5, 1).next)
