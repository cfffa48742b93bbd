"""The tensors of one bucket: weights, gradients, and the slice of them that this rank updates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.buckets import BucketLayout, Piece

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes that master weights and fp32 accumulation are for."""


class OwnPiece:
    """A piece of a parameter that this rank updates.

    Attributes:
        where: which elements of which parameter.
        tensor: what the optimizer updates: a view of the master copy or of the weights, 1-D; the parameter
            itself, or a view in its shape, where every rank updates whole parameters.
        grad: the reduced gradient of those elements, in the accumulation dtype, in the shape of ``tensor``.
    """

    __slots__ = ("grad", "tensor", "where")

    def __init__(self, where: Piece, tensor: Tensor, grad: Tensor) -> None:
        self.where = where
        self.tensor = tensor
        self.grad = grad


class FlatBucket:
    """Flat storage for a run of parameters of one dtype on one device.

    On construction the data of each parameter moves into :attr:`weights`, bit for bit; the Parameter objects
    stay, so whatever is tied stays tied.

    Args:
        layout: which parameter lies where; ``layout.num_slices`` is the number of ranks that share the update.
        params: all distinct parameters of the optimizer; the layout's indices count in this list.
        accumulation_dtype: dtype of the gradients.
        rank: the slice that this rank updates.
        master: keep an fp32 copy of that slice.
        whole: pieces are whole parameters in their own shape (one slice), for optimizers that need it.

    Attributes:
        weights: (size,) in the parameters' dtype.
        grads: (size,) in the accumulation dtype.
        own_weights: (size / num_slices,) this rank's slice of ``weights``.
        own_grads: (size / num_slices,) this rank's slice of ``grads``.
        master: (size / num_slices,) fp32, or None.
        pieces: the pieces of that slice.
    """

    def __init__(
        self,
        layout: BucketLayout,
        params: list[nn.Parameter],
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
        self.pieces = [self._own_piece(piece, params[piece.param], whole) for piece in layout.pieces(rank)]

    @property
    def update_dtype(self) -> torch.dtype:
        """Dtype that the optimizer computes in."""
        return self.weights.dtype if self.master is None else self.master.dtype

    def grad_view(self, index: int) -> Tensor:
        """Where the gradient of parameter ``index`` accumulates, in the parameter's shape."""
        return self._views[index][2]

    def within_slice(self, flat: Tensor, piece: Piece) -> Tensor:
        """The part of ``flat``, which stands for this rank's slice, that belongs to ``piece``."""
        begin = piece.offset - self._low
        return flat[begin : begin + piece.stop - piece.start]

    def check_attached(self) -> None:
        """Checks that the parameters still live in this bucket.

        Raises:
            OptimizerError: somebody replaced the data of one.
        """
        for index, (param, weight, _) in self._views.items():
            if param.data_ptr() != weight.data_ptr():
                raise OptimizerError(
                    f"parameter {index} of the optimizer (shape {tuple(param.shape)}, {param.dtype}) no longer "
                    "lives in the optimizer's flat buffer: after the optimizer is wrapped, weights may change "
                    "only in place (param.copy_(...), load_state_dict without assign=True) followed by "
                    "reload_master_weights(); move or cast the module before the optimizer is wrapped."
                )

    def reload_master(self) -> None:
        """Takes the master copy from the weights again."""
        if self.master is not None:
            self.master.copy_(self.own_weights)

    def publish(self) -> None:
        """Casts the updated master copy into this rank's slice of the weights."""
        if self.master is not None:
            self.own_weights.copy_(self.master)

    def _move_in(self, param: nn.Parameter, offset: int) -> tuple[Tensor, Tensor]:
        """Makes the data of ``param`` a view of the bucket; returns its weight and gradient views."""
        weight = self.weights[offset : offset + param.numel()].view(param.shape)
        weight.copy_(param.data)
        param.data = weight
        return weight, self.grads[offset : offset + param.numel()].view(param.shape)

    def _own_piece(self, piece: Piece, param: nn.Parameter, whole: bool) -> OwnPiece:
        grad = self.within_slice(self.own_grads, piece)
        if whole and self.master is None:
            return OwnPiece(piece, param, grad.view(param.shape))
        tensor = self.within_slice(self.own_weights if self.master is None else self.master, piece)
        if whole:
            return OwnPiece(piece, tensor.view(param.shape), grad.view(param.shape))
        return OwnPiece(piece, tensor, grad)
