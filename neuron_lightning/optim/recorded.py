"""Buckets for devices that record graphs: no tensor shares memory with another, and all ranks record the same graph.

Where operators are recorded and run later, a view is a value of its own: weights kept both as parameters and in a flat
buffer would be stored twice, and each write through a view would rebuild the buffer. So parameters and gradients
stay tensors by themselves, and are joined only inside the graph of the step. A slice of the joined parameters
is one unit whatever it holds, because ranks that updated different pieces would each record a graph of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning.backends import Backend
from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import Bucket, Unit, average_into
from neuron_lightning.optim.buckets import BucketLayout, Piece, Run


class _Recorded(Bucket):
    """What both kinds have in common: a tensor for the gradient of each parameter."""

    def __init__(
        self,
        layout: BucketLayout,
        params: list[nn.Parameter],
        *,
        accumulation_dtype: torch.dtype,
        master: bool,
    ) -> None:
        self.layout = layout
        self.has_master = master
        self._params = {slot.param: params[slot.param] for slot in layout.slots}
        self._first = params[layout.slots[0].param]
        self._accumulation_dtype = accumulation_dtype
        self._grads: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def grad_dtype(self) -> torch.dtype:
        return self._accumulation_dtype

    @property
    def update_dtype(self) -> torch.dtype:
        return torch.float32 if self.has_master else self._first.dtype

    def grad_view(self, index: int) -> Tensor:
        """As declared. Made when it is asked for and dropped by the step, so that no graph has to return it."""
        if index not in self._grads:
            self._grads[index] = torch.zeros_like(self._params[index], dtype=self._accumulation_dtype)
        return self._grads[index]

    def detach(self) -> None:
        super().detach()
        self._grads = {}

    def check_attached(self) -> None:
        """Nothing to check: the parameters live where they always did."""

    def _all_grads(self) -> dict[int, Tensor]:
        return {slot.param: self.grad_view(slot.param) for slot in self.layout.slots}

    def _joined(self, tensors: dict[int, Tensor] | dict[int, nn.Parameter]) -> Tensor:
        """(size,): the tensors of all parameters at their offsets, zeros between them."""
        parts: list[Tensor] = []
        end = 0
        for slot in self.layout.slots:
            flat = tensors[slot.param].detach().reshape(-1)
            if slot.offset > end:
                parts.append(flat.new_zeros(slot.offset - end))
            parts.append(flat)
            end = slot.offset + slot.numel
        if self.layout.size > end:
            parts.append(parts[-1].new_zeros(self.layout.size - end))
        return torch.cat(parts)

    def _spread(self, flat: Tensor, tensors: dict[int, Tensor] | dict[int, nn.Parameter]) -> None:
        """The reverse: copies each parameter's part of ``flat`` into its tensor."""
        for slot in self.layout.slots:
            target = tensors[slot.param]
            target.detach().copy_(flat[slot.offset : slot.offset + slot.numel].view(target.shape))


class WholeBucket(_Recorded):
    """Parameters that this rank updates whole. Arguments as :class:`SliceBucket`, without a rank."""

    def __init__(
        self,
        layout: BucketLayout,
        params: list[nn.Parameter],
        runs: Sequence[Run],
        *,
        accumulation_dtype: torch.dtype,
        master: bool,
    ) -> None:
        super().__init__(layout, params, accumulation_dtype=accumulation_dtype, master=master)
        self._masters = {i: p.detach().float() for i, p in self._params.items()} if master else {}
        self.units = [
            Unit(self._masters.get(piece.param, params[piece.param]), (piece,)) for piece in layout.pieces(0)
        ]
        self._cuts = [(piece.param, _within(piece, runs)) for piece in layout.pieces(0)]

    def average(self, backend: Backend, group: dist.ProcessGroup | None, replicas: int) -> None:
        if replicas > 1:
            grads = self._all_grads()
            joined = self._joined(grads)
            average_into(joined, joined, backend, group, replicas)
            self._spread(joined, grads)

    def terms(self) -> Iterator[tuple[Tensor, Run]]:
        for index, runs in self._cuts:
            flat = self.grad_view(index).view(-1)
            for run in runs:
                yield flat if len(runs) == 1 else flat[run.start : run.stop], run

    def reduced(self) -> list[Tensor]:
        return list(self._all_grads().values())

    def reduced_piece(self, piece: Piece) -> Tensor:
        return self.grad_view(piece.param).reshape(-1)[piece.start : piece.stop]

    def attach(self, received: Sequence[bool]) -> set[int]:
        attached = set()
        for unit in self.units:
            index = unit.pieces[0].param
            if received[index]:
                unit.tensor.grad = self.grad_view(index).to(unit.tensor.dtype)
                attached.add(id(unit.tensor))
        return attached

    def publish(self) -> None:
        for index, master in self._masters.items():
            self._params[index].detach().copy_(master)

    def gather(self, backend: Backend, group: dist.ProcessGroup | None) -> dist.Work | None:
        return None

    def reload(self) -> None:
        for index, master in self._masters.items():
            master.copy_(self._params[index].detach())


class SliceBucket(_Recorded):
    """Parameters of which this rank updates one slice (ZeRO-1), kept beside them.

    Args:
        layout: which parameter lies where, in ``layout.num_slices`` slices.
        params: all distinct parameters of the optimizer; the layout's indices count in this list.
        runs: how tensor parallelism treats the elements of this rank's slice: one run of all of it where it can be,
            whatever lies in it, so that the ranks' graphs are the same.
        accumulation_dtype: dtype of the gradients.
        rank: the slice that this rank updates.
        master: keep the slice in fp32.
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
    ) -> None:
        super().__init__(layout, params, accumulation_dtype=accumulation_dtype, master=master)
        self._low, self._high = layout.slice_bounds(rank)
        own = self._joined(self._params)[self._low : self._high].to(self.update_dtype, copy=True)
        self.units = [Unit(own, layout.pieces(rank), self._low)]
        self._runs = runs
        self._own_grads: Tensor | None = None

    def average(self, backend: Backend, group: dist.ProcessGroup | None, replicas: int) -> None:
        joined = self._joined(self._all_grads())
        self._own_grads = joined.new_empty(self._high - self._low)
        average_into(self._own_grads, joined, backend, group, replicas)

    def terms(self) -> Iterator[tuple[Tensor, Run]]:
        own = self._averaged_slice()
        for run in self._runs:
            whole = (run.start, run.stop) == (self._low, self._high)
            yield own if whole else own[run.start - self._low : run.stop - self._low], run

    def reduced(self) -> list[Tensor]:
        return [self._averaged_slice()]

    def reduced_piece(self, piece: Piece) -> Tensor:
        return self.units[0].cut(self._averaged_slice(), piece)

    def attach(self, received: Sequence[bool]) -> set[int]:
        missing = [slot.param for slot in self.layout.slots if not received[slot.param]]
        if len(missing) == len(self.layout.slots):
            return set()
        if missing:
            raise OptimizerError(
                f"{len(missing)} of {len(self.layout.slots)} parameters that are updated together got no gradient in "
                f"this step (the first: parameter {missing[0]}, shape {tuple(self._params[missing[0]].shape)}): under "
                "ZeRO-1 on this backend a slice of all of them is one tensor, and each must get one. Freeze what is not "
                "trained (requires_grad=False) before the optimizer is made, or switch ZeRO-1 off."
            )
        (unit,) = self.units
        unit.tensor.grad = self._averaged_slice().to(unit.tensor.dtype)
        return {id(unit.tensor)}

    def detach(self) -> None:
        super().detach()
        self._own_grads = None

    def publish(self) -> None:
        """Nothing: the weights are only written when all slices are there."""

    def gather(self, backend: Backend, group: dist.ProcessGroup | None) -> dist.Work | None:
        own = self.units[0].tensor.detach().to(self._first.dtype)
        flat = own.new_empty(self.layout.size)
        backend.all_gather(flat, own, group)
        self._spread(flat, self._params)
        return None

    def reload(self) -> None:
        self.units[0].tensor.copy_(self._joined(self._params)[self._low : self._high])

    def _averaged_slice(self) -> Tensor:
        if self._own_grads is None:
            raise OptimizerError(
                "the gradients of this window are not reduced, or the step has consumed them: call synchronize() "
                "after its last backward()."
            )
        return self._own_grads


def _within(piece: Piece, runs: Sequence[Run]) -> list[Run]:
    """The runs inside a piece, counted from its first element."""
    begin, end = piece.offset, piece.offset + piece.stop - piece.start
    return [
        run._replace(start=max(run.start, begin) - begin, stop=min(run.stop, end) - begin)
        for run in runs
        if run.start < end and run.stop > begin
    ]
