"""What the optimizer's machinery asks of the storage of a run of parameters, however that storage is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from neuron_lightning.backends import Backend
from neuron_lightning.optim.buckets import BucketLayout, Piece, Run

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes that master weights and fp32 accumulation are for."""


class Unit:
    """One tensor that the user's optimizer updates on this rank.

    Attributes:
        tensor: a parameter, a piece of one, or a slice that holds pieces of several.
        pieces: which elements of which parameters it holds, in order.
    """

    __slots__ = ("_low", "pieces", "tensor")

    def __init__(self, tensor: Tensor, pieces: Sequence[Piece], low: int | None = None) -> None:
        self.tensor = tensor
        self.pieces = tuple(pieces)
        self._low = low

    def cut(self, value: Tensor, piece: Piece) -> Tensor:
        """The elements of ``piece`` in a tensor of this unit's shape: flat, a view."""
        if self._low is None:
            return value.reshape(-1)
        begin = piece.offset - self._low
        return value[begin : begin + piece.stop - piece.start]


class Bucket(ABC):
    """Parameters of one dtype on one device, their gradients, and what this rank updates of them.

    Attributes:
        layout: which parameter lies where.
        units: what this rank updates.
        has_master: whether units are fp32 copies.
    """

    layout: BucketLayout
    units: list[Unit]
    has_master: bool

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    @abstractmethod
    def grad_dtype(self) -> torch.dtype:
        """Dtype that gradients are accumulated and reduced in."""

    @property
    @abstractmethod
    def update_dtype(self) -> torch.dtype:
        """Dtype that the optimizer computes in."""

    # -- gradients -------------------------------------------------------------------------------------

    @abstractmethod
    def grad_view(self, index: int) -> Tensor:
        """Where the gradient of parameter ``index`` accumulates in this window, in the parameter's shape."""

    @abstractmethod
    def average(self, backend: Backend, group: dist.ProcessGroup | None, replicas: int) -> None:
        """Averages the window's gradients over ``replicas`` ranks, each element where it is updated."""

    @abstractmethod
    def terms(self) -> Iterable[tuple[Tensor, Run]]:
        """This rank's averaged gradients, flat, cut where tensor parallelism treats them differently; views."""

    @abstractmethod
    def reduced(self) -> list[Tensor]:
        """This rank's averaged gradients; to be changed in place."""

    @abstractmethod
    def reduced_piece(self, piece: Piece) -> Tensor:
        """The averaged gradient of one of this rank's pieces, flat."""

    # -- the update ------------------------------------------------------------------------------------

    @abstractmethod
    def attach(self, received: Sequence[bool]) -> set[int]:
        """Gives the units their gradients; returns the ``id`` of those that have one.

        Args:
            received: by parameter, whether it has a gradient on any data-parallel rank.
        """

    def detach(self) -> None:
        """Takes the gradients from the units again."""
        for unit in self.units:
            unit.tensor.grad = None

    @abstractmethod
    def publish(self) -> None:
        """Brings the updated units into the weights, as far as this rank can by itself."""

    @abstractmethod
    def gather(self, backend: Backend, group: dist.ProcessGroup | None) -> dist.Work | None:
        """Starts to collect every rank's updated part of the weights; returns what to wait for."""

    @abstractmethod
    def reload(self) -> None:
        """Takes the units from the weights again, where they are copies."""

    @abstractmethod
    def check_attached(self) -> None:
        """Checks that the parameters still live here. Raises :class:`OptimizerError`."""


def average_into(
    own: Tensor, full: Tensor, backend: Backend, group: dist.ProcessGroup | None, replicas: int
) -> None:
    """Averages ``full`` over ``replicas`` ranks: this rank's slice into ``own``, or all of it where ``own`` is as long.

    Args:
        own: the slice, or ``full`` itself.
        full: scratch afterwards, where it is not ``own``.
        backend: that reduces.
        group: of the ranks.
        replicas: their number.
    """
    half = full.dtype == torch.float16
    if half:
        full.mul_(1.0 / replicas)  # first, because a sum over many ranks leaves fp16's range
    if own.numel() < full.numel():
        backend.reduce_scatter(own, full, group)
    else:
        backend.all_reduce(full, group)
    if not half:
        own.mul_(1.0 / replicas)
