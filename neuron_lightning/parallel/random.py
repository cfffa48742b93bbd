"""Random numbers under tensor parallelism (Megatron's rule).

Outside tensor-parallel regions the ranks of a tensor-parallel group must draw the same numbers (they hold the
same activations), and data-parallel ranks different ones. Inside, where each rank holds a slice, dropout must
differ by rank: wrap it in ``with get_rng_tracker().fork():``.

Megatron keeps a second generator state for the inside, which activation checkpointing then has to save and
restore. Here the inside is seeded from one number drawn from the default generator, on which the ranks of a
group agree, and the rank: whatever restores the default generator (``torch.utils.checkpoint``, a saved
checkpoint) restores both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.parallel import mesh as _mesh

__all__ = [
    "RngTracker",
    "fork",
    "get_rng_state",
    "get_rng_tracker",
    "get_xla_rng_tracker",
    "model_parallel_manual_seed",
    "model_parallel_xla_manual_seed",
    "next_construction",
    "set_rng_state",
]


class _Seed:
    """What :func:`model_parallel_manual_seed` was given, what it gave to torch, and the layers made since."""

    given: int | None = None
    stream: int | None = None
    construction: int | None = None
    layers = 0


def model_parallel_manual_seed(seed: int) -> None:
    """Seeds torch's default generators: equal within a tensor-parallel group, different between groups.

    Every rank calls it, with the same seed, after the mesh exists. Layers made later are still drawn from
    ``seed`` itself, the same on all ranks, and counted from 0 again.
    """
    mesh = _mesh.current()
    _Seed.given = seed
    _Seed.stream = _mix(seed, *(mesh.coordinates[axis] for axis in ("pp", "dp", "cp", "ep")))
    _Seed.construction, _Seed.layers = None, 0
    torch.manual_seed(_Seed.stream)


model_parallel_xla_manual_seed = model_parallel_manual_seed


def next_construction() -> tuple[int, int]:
    """What the next layer that draws by itself is drawn from: the seed, the same on all ranks, and a count."""
    seed = torch.initial_seed()
    if _Seed.given is not None and seed == _Seed.stream:
        seed = _Seed.given
    if _Seed.construction != seed:
        _Seed.construction, _Seed.layers = seed, 0
    _Seed.layers += 1
    return seed, _Seed.layers - 1


class RngTracker:
    """Hands out the random streams of tensor-parallel regions. Without state of its own: see the module."""

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Context in which random operators draw numbers that differ by tensor-parallel rank.

        Every rank of the tensor-parallel group enters it together. The default generators go on afterwards
        as if one number had been drawn from the CPU's.

        Args:
            name: streams of different names are independent.
        """
        backend = get_backend()
        drawn = int(torch.randint(1 << 62, (1,), device="cpu").numpy()[0])
        states = (torch.default_generator.get_state(), backend.get_rng_state())
        torch.manual_seed(_mix(drawn, _mesh.current().coordinates["tp"], *name.encode()))
        try:
            yield
        finally:
            torch.default_generator.set_state(states[0])
            backend.set_rng_state(states[1])

    def get_states(self) -> dict[str, Tensor]:
        """Same as :func:`get_rng_state`."""
        return get_rng_state()

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Same as :func:`set_rng_state`."""
        set_rng_state(states)


_TRACKER = RngTracker()


def get_rng_tracker() -> RngTracker:
    """The tracker whose ``fork()`` wraps dropout on sharded activations."""
    return _TRACKER


get_xla_rng_tracker = get_rng_tracker
fork = _TRACKER.fork


def get_rng_state() -> dict[str, Tensor]:
    """This rank's complete random state, for a checkpoint: byte tensors ``cpu`` and ``device``."""
    return {"cpu": torch.default_generator.get_state(), "device": get_backend().get_rng_state()}


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Restores what :func:`get_rng_state` returned."""
    torch.default_generator.set_state(states["cpu"])
    get_backend().set_rng_state(states["device"])


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers, without the collisions of sums."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
