"""Which tokens of a sequence a device holds.

Under a causal mask, a device with the first tokens has little work and one with the last has much.
Three orders of the tokens, for P devices along an axis:

    contiguous  device p holds one run of T / P tokens, in their order
    zigzag      two runs, number p and number 2P - 1 - p of 2P (Llama 3, arXiv 2407.21783, 3.3.2)
    striped     every P-th token, from token p on (striped attention, arXiv 2311.09431)

The order is applied once, where batches are built; whatever depends on a token's position (rotary
phases, masks, the loss) takes positions, ids and targets in the same order.

A sequence that is processed chunk by chunk, all devices sharing each chunk, has an order of its
own, `Runs`; attention of a chunk has fewer queries than keys, so it takes a pair of them.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Array, Int, Integer

from tilescan.ops.mask_placed import Range
from tilescan.ops.sequence_parallel.kinds import BALANCES


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of tokens, each sharded over the devices: device p holds the p-th of P equal shards.

    Attributes:
      bounds: the positions at which the runs begin, and at which the last one ends.
    """

    bounds: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each run, over all devices."""
        return tuple(end - start for start, end in itertools.pairwise(self.bounds))


# Which tokens a device holds: a name of BALANCES, or runs. Attention also takes a pair of them, of
# its queries and of its keys.
Balance = str | Runs


def of_queries_and_keys(balance: Balance | tuple[Balance, Balance]) -> tuple[Balance, Balance]:
    """Returns the orders of queries and of keys."""
    return balance if isinstance(balance, tuple) else (balance, balance)


def order(T: int, P: int, balance: Balance) -> Int[np.ndarray, " {T}"]:
    """Returns the position of each token when the devices' tokens are concatenated.

    `x[:, order(T, P, balance)]` puts a sequence in this order; its inverse is `restore`.

    Raises:
      ValueError: P (2P for zigzag) doesn't divide T; an unknown balance.
    """
    check(T, P, balance)
    if isinstance(balance, Runs):
        held = [s for p in range(P) for s in ranges(p, P, T // P, balance)]
        return np.concatenate([np.arange(s.start, s.start + s.length) for s in held])
    positions = np.arange(T)
    if balance == "striped":
        return positions.reshape(T // P, P).T.reshape(T)
    if balance == "zigzag":
        runs = positions.reshape(2 * P, T // (2 * P))
        return np.concatenate([runs[[p, 2 * P - 1 - p]].reshape(-1) for p in range(P)])
    return positions


def restore(T: int, P: int, balance: Balance) -> Int[np.ndarray, " {T}"]:
    """Returns the row of each position, the inverse permutation of `order`."""
    return np.argsort(order(T, P, balance))


def first(balance: Balance) -> int:
    """Returns the position at which a sequence in this order begins."""
    return balance.bounds[0] if isinstance(balance, Runs) else 0


def ranges(
    p: int | np.integer | Integer[Array, ""], P: int, T: int, balance: Balance
) -> tuple[Range, ...]:
    """Returns the positions of device p's T tokens, as few ranges; p may be traced."""
    if isinstance(balance, Runs):
        lengths = [n // P for n in balance.lengths]
        rows = itertools.accumulate(lengths, initial=0)
        return tuple(
            Range(start + p * n, 1, n, row)
            for start, n, row in zip(balance.bounds, lengths, rows, strict=False)
        )
    if balance == "striped":
        return (Range(p, P, T),)
    if balance == "zigzag":
        n = T // 2
        return Range(p * n, 1, n), Range((2 * P - 1 - p) * n, 1, n, n)
    return (Range(p * T, 1, T),)


def check(T: int, P: int, balance: Balance) -> None:
    """Checks that P devices can share T tokens in this order.

    Raises:
      ValueError: they can't.
    """
    if isinstance(balance, Runs):
        if sum(balance.lengths) != T or any(n % P or n < 1 for n in balance.lengths):
            raise ValueError(
                f"runs of {balance.lengths} tokens must be multiples of {P} devices, {T} in all"
            )
        return
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} is unknown; it must be one of {', '.join(BALANCES)}")
    shards = 2 * P if balance == "zigzag" else P
    if T % shards:
        raise ValueError(
            f"balance={balance!r} splits a sequence into {shards} equal shards for {P} devices, "
            f"and {T} tokens are not a multiple of {shards}; pad the sequence to "
            f"{-(-T // shards) * shards}"
        )
