"""Buckets in flat memory: weights and gradients are views of two buffers, nothing is copied to reduce or update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning.backends import Backend
from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import Bucket, Unit, average_into
from neuron_lightning.optim.buckets import BucketLayout, Piece, Run


class FlatBucket(Bucket):
    """Flat storage for a run of parameters of one dtype on one device.

    On construction the data of each parameter moves into :attr:`weights`, bit for bit; the Parameter objects
    stay, so whatever is tied stays tied.

    Args:
        layout: which parameter lies where; ``layout.num_slices`` is the number of ranks that share the update.
        params: all distinct parameters of the optimizer; the layout's indices count in this list.
        runs: how tensor parallelism treats the elements of this rank's slice.
        accumulation_dtype: dtype of the gradients.
        rank: the slice that this rank updates.
        master: keep an fp32 copy of that slice.
        whole: units are whole parameters in their own shape (one slice), for optimizers that need it.

    Attributes:
        weights: (size,) in the parameters' dtype.
        grads: (size,) in the accumulation dtype.
        own_weights: (size / num_slices,) this rank's slice of ``weights``.
        own_grads: (size / num_slices,) this rank's slice of ``grads``.
        master: (size / num_slices,) fp32, or None.
    """

    def __init__(
        self,
        layout: BucketLayout,
        params: list[nn.Parameter],
        runs: Sequence[Run],
        *,
        accumulation_dtype: torch.dtype,
        rank: int,
        master: bool,
        whole: bool,
    ) -> None:
        first = params[layout.slots[0].param]
        self.layout = layout
        self.weights = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(layout.size, dtype=accumulation_dtype, device=first.device)
        self._views = {
            s.param: (params[s.param], *self._move_in(params[s.param], s.offset)) for s in layout.slots
        }
        low, high = layout.slice_bounds(rank)
        self._low = low
        self.own_weights, self.own_grads = self.weights[low:high], self.grads[low:high]
        self.master = self.own_weights.float() if master else None
        self.has_master = master
        pieces = layout.pieces(rank)
        self.units = [Unit(self._tensor(piece, params[piece.param], whole), (piece,)) for piece in pieces]
        self._unit_grads = [
            self.reduced_piece(piece).view(unit.tensor.shape)
            for unit, piece in zip(self.units, pieces, strict=True)
        ]
        self._terms = [(self.grads[run.start : run.stop], run) for run in runs]

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.grads.dtype

    @property
    def update_dtype(self) -> torch.dtype:
        return self.weights.dtype if self.master is None else self.master.dtype

    def grad_view(self, index: int) -> Tensor:
        return self._views[index][2]

    def average(self, backend: Backend, group: dist.ProcessGroup | None, replicas: int) -> None:
        if replicas > 1:
            average_into(self.own_grads, self.grads, backend, group, replicas)

    def terms(self) -> Iterable[tuple[Tensor, Run]]:
        return self._terms

    def reduced(self) -> list[Tensor]:
        return [self.own_grads]

    def reduced_piece(self, piece: Piece) -> Tensor:
        return self._within_slice(self.own_grads, piece)

    def attach(self, received: Sequence[bool]) -> set[int]:
        attached = set()
        casted = None
        for unit, grad in zip(self.units, self._unit_grads, strict=True):
            (piece,) = unit.pieces
            if not received[piece.param]:
                continue
            if grad.dtype != unit.tensor.dtype:
                casted = self.own_grads.to(unit.tensor.dtype) if casted is None else casted
                grad = self._within_slice(casted, piece).view(grad.shape)
            unit.tensor.grad = grad
            attached.add(id(unit.tensor))
        return attached

    def publish(self) -> None:
        if self.master is not None:
            self.own_weights.copy_(self.master)

    def gather(self, backend: Backend, group: dist.ProcessGroup | None) -> dist.Work | None:
        if self.layout.num_slices == 1:
            return None
        return backend.all_gather(self.weights, self.own_weights, group, async_op=True)

    def reload(self) -> None:
        if self.master is not None:
            self.master.copy_(self.own_weights)

    def check_attached(self) -> None:
        for index, (param, weight, _) in self._views.items():
            if param.data_ptr() != weight.data_ptr():
                raise OptimizerError(
                    f"parameter {index} of the optimizer (shape {tuple(param.shape)}, {param.dtype}) no longer "
                    "lives in the optimizer's flat buffer: after the optimizer is wrapped, weights may change "
                    "only in place (param.copy_(...), load_state_dict without assign=True) followed by "
                    "reload_master_weights(); move or cast the module before the optimizer is wrapped."
                )

    def _move_in(self, param: nn.Parameter, offset: int) -> tuple[Tensor, Tensor]:
        """Makes the data of ``param`` a view of the bucket; returns its weight and gradient views."""
        weight = self.weights[offset : offset + param.numel()].view(param.shape)
        weight.copy_(param.data)
        param.data = weight
        return weight, self.grads[offset : offset + param.numel()].view(param.shape)

    def _tensor(self, piece: Piece, param: nn.Parameter, whole: bool) -> Tensor:
        if whole and self.master is None:
            return param
        tensor = self._within_slice(self.own_weights if self.master is None else self.master, piece)
        return tensor.view(param.shape) if whole else tensor

    def _within_slice(self, flat: Tensor, piece: Piece) -> Tensor:
        begin = piece.offset - self._low
        return flat[begin : begin + piece.stop - piece.start]
