"""A random permutation that is computed where it is asked for, and never stored.

A Feistel network permutes ``0 … 4^k - 1``; ids beyond the end are walked through it again until they fall inside
(cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It depends on nothing but
its arguments: not on a library's version, nor on how much of it was read before.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
UInt64 = npt.NDArray[np.uint64]


class Permutation:
    """A permutation of ``range(size)``, drawn by ``key``.

    Args:
        size: number of elements.
        key: any text; equal keys give equal permutations.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The elements at ``positions``: (n,) int64, each in ``range(size)``."""
        values = self._encrypt(positions.astype(np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: UInt64) -> UInt64:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        encrypted: UInt64 = (left << bits) | right
        return encrypted


def _mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014); wraps around by intention."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64 = x ^ (x >> np.uint64(31))
    return mixed
