"""Masks whose live keys are one range per query, in closed form.

A kernel computes the range of its tile from its program id, so that a million tokens need no
table. Everything works on Python integers, NumPy arrays and JAX arrays, traced or not.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Integer

from tilescan.ops.arrays import AnyArray

# Positions of queries or keys, and what a mask says of them: scalars or arrays that broadcast.
Index = int | np.integer | Integer[AnyArray, "..."]
Visible = bool | np.bool_ | Bool[AnyArray, "..."]


def array_module(*values: Any) -> ModuleType:
    """Returns `jnp` if any value is a JAX array (traced or not), else `np`."""
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def _least(a: int | None, b: int | None) -> int | None:
    """Returns the smaller bound, where None is no bound."""
    return a if b is None else b if a is None else min(a, b)


def _greatest(a: int | None, b: int | None) -> int | None:
    """Returns the larger bound, where None is no bound."""
    return None if a is None or b is None else max(a, b)


@dataclasses.dataclass(frozen=True)
class Band:
    """Query i sees key j iff  i-left <= j,  j <= i+right or j < prefix,  and  j < limit.

    `left`, `right` and `limit` may be None: no bound. Live keys of consecutive queries then form
    one range, and so do live queries of consecutive keys; all methods are exact.
    """

    left: int | None = None
    right: int | None = None
    prefix: int = 0
    limit: int | None = None

    def visible(self, q_index: Index, k_index: Index) -> Visible:
        """Returns whether query i sees key j, broadcastable to the shape of both."""
        conditions = []
        if self.left is not None:
            conditions.append(k_index >= q_index - self.left)
        if self.right is not None:
            near = k_index <= q_index + self.right
            conditions.append(near | (k_index < self.prefix) if self.prefix > 0 else near)
        if self.limit is not None:
            conditions.append(k_index < self.limit)
        return functools.reduce(operator.and_, conditions) if conditions else q_index == q_index

    def tile_summary(
        self, q_lo: Index, q_hi: Index, k_lo: Index, k_hi: Index
    ) -> tuple[Visible, Visible]:
        """Returns whether any, and whether all, pairs of a tile are visible."""
        first, last = self._key_range(q_lo, q_hi)
        any_visible = (q_lo <= q_hi) & (k_lo <= k_hi)
        all_visible = any_visible
        if first is not None:
            any_visible = any_visible & (k_hi >= first)
            all_visible = all_visible & (k_lo >= q_hi - self.left)
        if last is not None:
            any_visible = any_visible & (k_lo <= last)
            if first is not None:
                any_visible = any_visible & (first <= last)
        if self.right is not None:
            all_visible = all_visible & ((k_hi <= q_lo + self.right) | (k_hi < self.prefix))
        if self.limit is not None:
            all_visible = all_visible & (k_hi < self.limit)
        return any_visible, all_visible

    def key_bounds(self, q_lo: Index, q_hi: Index, S: Index) -> tuple[Index, Index]:
        """Returns first and last key, inclusive, that q_lo..q_hi see; last < first if none."""
        first, last = self._key_range(q_lo, q_hi)
        xp = array_module(q_lo, q_hi)
        first = xp.zeros_like(q_lo) if first is None else xp.maximum(first, 0)
        last = xp.minimum(xp.full_like(q_hi, S - 1), S - 1 if last is None else last)
        return first, last

    def query_bounds(
        self, k_lo: Index, k_hi: Index, q_first: Index, q_last: Index
    ) -> tuple[Index, Index]:
        """Returns first and last query in [q_first, q_last] that see any key in [k_lo, k_hi]."""
        xp = array_module(k_lo, k_hi, q_first, q_last)
        first, last = q_first, q_last
        if self.right is not None:
            near = xp.where(k_lo < self.prefix, first, k_lo - self.right)
            first = xp.maximum(first, near)
        if self.limit is not None:
            k_hi = xp.minimum(k_hi, self.limit - 1)
        if self.left is not None:
            last = xp.minimum(last, k_hi + self.left)
        none = k_hi < k_lo
        return xp.where(none, q_last + 1, first), xp.where(none, q_last, last)

    def _key_range(self, q_lo, q_hi):
        """Returns the unclipped first and last live key; None where there is no bound."""
        first = None if self.left is None else q_lo - self.left
        last = None
        if self.right is not None:
            last = q_hi + self.right
            if self.prefix > 0:
                last = array_module(q_hi).maximum(last, self.prefix - 1)
        if self.limit is not None:
            end = self.limit - 1
            last = end if last is None else array_module(last).minimum(last, end)
        return first, last

    def __and__(self, other: Band) -> Band | None:
        left, limit = _least(self.left, other.left), _least(self.limit, other.limit)
        if self.right == other.right:
            return Band(left, self.right, min(self.prefix, other.prefix), limit)
        # The band with the nearer right edge must also have the shorter prefix: else the last key
        # of the intersection increases, stays constant and increases again, which is not a band.
        if other.right is None or (self.right is not None and self.right < other.right):
            near, far = self, other
        else:
            near, far = other, self
        if far.right is not None and near.prefix > far.prefix:
            return None
        return Band(left, near.right, near.prefix, limit)

    def __or__(self, other: Band) -> Band | None:
        if self.limit is None and other.limit is None and self.prefix == other.prefix == 0:
            # Both see the diagonal, so the union leaves no hole.
            left, right = _greatest(self.left, other.left), _greatest(self.right, other.right)
            return Band(left, right)
        for a, b in ((self, other), (other, self)):
            only_limit = b.left is None and b.right is None and b.limit is not None
            if only_limit and a.left is None and a.limit is None and a.right is not None:
                return Band(None, a.right, max(a.prefix, b.limit))  # causal | prefix
        return None
