"""The machinery behind :class:`~neuron_lightning.optim.ParallelOptimizer`: all of its mutable state is here.

Lightning hands out objects of a class that inherits the wrapper's, with another instance dictionary; so the
wrapper holds nothing but this engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import Bucket, Unit
from neuron_lightning.optim.buckets import Piece
from neuron_lightning.optim.build import check_params, make_buckets, make_reducer, members_by_group
from neuron_lightning.optim.inner import InnerOptimizer, can_fuse, needs_closure
from neuron_lightning.optim.norm import clip_coefficient
from neuron_lightning.optim.probe import examine, require_elementwise
from neuron_lightning.optim.state import (
    MASTER,
    ParamState,
    adopt_state,
    check_length,
    export_piece,
    fill,
    import_unit,
)
from neuron_lightning.optim.window import Phase, Window
from neuron_lightning.parallel import mesh as meshes


class Engine:
    """Storage, accumulation window, reduction and the inner optimizer of one wrapped optimizer.

    Args:
        outer: the user's instance.
        zero1: spread the update over data-parallel ranks.
        max_grad_norm: norm to clip to in every step; None for no clipping.
        master_weights: fp32 copies of parameters narrower than fp32.
        fp32_grad_accumulation: accumulate gradients of such parameters in fp32.
        bucket_bytes: size of the gradient buffer of one bucket.
    """

    def __init__(
        self,
        outer: Optimizer,
        *,
        zero1: bool,
        max_grad_norm: float | None,
        master_weights: bool,
        fp32_grad_accumulation: bool,
        bucket_bytes: int,
    ) -> None:
        self.outer = outer
        self.zero1 = zero1
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.mesh = meshes.current()
        self._norm_is_current = self._clipped = False
        everything = [p for group in outer.param_groups for p in group["params"]]
        self.params: list[nn.Parameter] = [p for p in everything if p.requires_grad]
        self._frozen: list[nn.Parameter] = [p for p in everything if not p.requires_grad]
        check_params(self.params)
        self.traits = examine(outer)
        if zero1 or self.mesh.sizes["tp"] > 1:
            require_elementwise(outer, self.traits, zero1=zero1)
        self.buckets = make_buckets(
            self.params,
            outer.param_groups,
            self.mesh,
            sharded=zero1,
            master_weights=master_weights,
            fp32_grad_accumulation=fp32_grad_accumulation,
            bucket_bytes=bucket_bytes,
        )
        self._reducer = make_reducer(self.params, self.buckets, self.mesh, sharded=zero1)
        homes: list[Bucket | None] = [None] * len(self.params)
        for bucket in self.buckets:
            for slot in bucket.layout.slots:
                homes[slot.param] = bucket
        self._window = Window(self.params, homes)
        self._inner = self._make_inner()

    # -- gradients ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def synchronize(self) -> None:
        """Reduces the window's gradients, once."""
        if self._window.phase is Phase.REDUCED:
            return
        self._check()
        received = self._window.collect()
        self._window.zero([index for index, here in enumerate(received) if not here])
        self._reducer.average_gradients()
        self._window.received = self._reducer.agree(received)
        self._window.phase = Phase.REDUCED
        self._window.show(not self.zero1)
        self._norm_is_current = self._clipped = False

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norm of the reduced gradients before any clipping."""
        self.synchronize()
        if self.grad_norm is None or not self._norm_is_current:
            self.grad_norm = self._reducer.norm()
            self._norm_is_current = True
        return self.grad_norm

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scales the reduced gradients so that their norm is at most ``max_norm``; returns the norm before."""
        norm = self.norm()
        self._scale(clip_coefficient(norm, float(max_norm)))
        self._clipped = True
        return norm

    @torch.no_grad()
    def clip_grad_value(self, clip_value: float) -> None:
        """Limits every element of the reduced gradients to ``[-clip_value, clip_value]``."""
        self.norm()
        for bucket in self.buckets:
            for grads in bucket.reduced():
                grads.clamp_(-clip_value, clip_value)
        self._clipped = True

    @torch.no_grad()
    def unscale(self, inv_scale: Tensor) -> Tensor:
        """Multiplies the reduced gradients by ``inv_scale``; returns 1.0 if any is not finite, on any rank."""
        self.synchronize()
        self._scale(inv_scale)
        self._norm_is_current = False
        return self._reducer.found_inf()

    @torch.no_grad()
    def full_grad(self, param: nn.Parameter) -> Tensor | None:
        """The averaged gradient of ``param`` in its (local) shape; None if no rank had one."""
        index = next((i for i, p in enumerate(self.params) if p is param), None)
        if index is None:
            raise OptimizerError(
                f"full_grad() takes a trainable parameter of this optimizer; the given tensor of shape "
                f"{tuple(param.shape)} is none of its {len(self.params)}."
            )
        if self._window.phase is Phase.OPEN:
            self.synchronize()
        if self._window.phase is Phase.OVER and get_backend().records_graphs:
            raise OptimizerError(
                "full_grad() after step(): on this backend the step frees the gradients; read them between "
                "synchronize() and step()."
            )
        if not self._window.received[index]:
            return None
        view = self._window.view(index)
        if not self.zero1:
            return view.clone()
        flat = torch.zeros(param.numel(), dtype=view.dtype, device=view.device)
        for bucket in self.buckets:
            for unit in bucket.units:
                for piece in unit.pieces:
                    if piece.param == index:
                        flat[piece.start : piece.stop] = bucket.reduced_piece(piece)
        return self._reducer.sum_over_replicas(flat).view(param.shape)

    def zero_grad(self, set_to_none: bool) -> None:
        """Forgets the window's gradients (or zeroes those that are there)."""
        with torch.no_grad():
            self._window.clear(set_to_none)

    # -- the step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Takes one step, evaluating ``closure`` first."""
        backend = get_backend()
        if closure is not None and needs_closure(self.outer):
            self._inner.pull()
            result = self._inner.step(closure=lambda: self._evaluate(closure))
            self._finish(self.buckets)
        else:
            result = _call(closure)
            backend.mark_step()  # forward and backward are one graph, the step is another
            self._prepare()
            self._inner.pull()
            self._update()
        self._inner.push()
        self._window.show(False)
        self._window.phase = Phase.OVER
        self.outer.__dict__["_opt_called"] = True  # what a scheduler made for the user's instance looks at
        return result

    @torch.no_grad()
    def reload_master_weights(self) -> None:
        """Takes the fp32 copies from the weights again."""
        for bucket in self.buckets:
            bucket.reload()

    def _prepare(self) -> None:
        """Reduced, clipped gradients, whoever has or has not asked for them."""
        self.norm()
        if self.max_grad_norm is not None and not self._clipped:
            self.clip_grad_norm(self.max_grad_norm)

    def _update(self) -> None:
        batches = [[b] for b in self.buckets] if self.traits.bucketwise else [self.buckets]
        pending: list[dist.Work | None] = []
        for batch in batches:
            members = self._attach(batch)
            if members or not self.traits.bucketwise:
                self._inner.step(members if len(batches) > 1 else None)
            pending += self._finish(batch)
        for work in pending:
            if work is not None:
                work.wait()

    def _attach(self, buckets: list[Bucket]) -> set[int]:
        """Gives the optimizer's tensors their gradients; returns the ``id`` of those that have one."""
        return {tensor for bucket in buckets for tensor in bucket.attach(self._window.received)}

    def _finish(self, buckets: list[Bucket]) -> list[dist.Work | None]:
        for bucket in buckets:
            bucket.detach()
            bucket.publish()
        return [self._reducer.gather_weights(bucket) for bucket in buckets]

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The closure for an optimizer that evaluates the loss itself: the same loss on every rank."""
        for bucket in self.buckets:
            bucket.publish()
        loss = _call(closure)
        self._prepare()
        self._attach(self.buckets)
        if isinstance(loss, Tensor):
            return self._reducer.sum_over_replicas(loss.detach().clone()) / self._reducer.num_replicas
        return loss

    def _scale(self, factor: Tensor) -> None:
        for bucket in self.buckets:
            for grads in bucket.reduced():
                grads.mul_(factor)

    # -- state -------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[Tensor, Any]:
        """State of the inner optimizer, keyed by its tensors."""
        return self._inner.optimizer.state

    def units(self) -> list[Unit]:
        """What this rank updates, by bucket and offset."""
        return [unit for bucket in self.buckets for unit in bucket.units]

    def held_tensors(self) -> list[Tensor]:
        """The device tensors that :meth:`export_state` reads."""
        held = [bucket_unit.tensor for bucket_unit in self.units()]
        return held + [
            v for entries in self.state.values() for v in entries.values() if isinstance(v, Tensor)
        ]

    def export_state(self, copies: Mapping[int, Tensor]) -> list[ParamState]:
        """State of every piece that this rank updates; by ``id`` of the live tensor, copies to read instead."""
        states = []
        for bucket in self.buckets:
            for unit in bucket.units:
                entries = {k: copies.get(id(v), v) for k, v in self.state.get(unit.tensor, {}).items()}
                updated = copies.get(id(unit.tensor), unit.tensor).detach()
                for piece in unit.pieces:
                    state = export_piece(unit, piece, self.params[piece.param], entries, self.traits)
                    if bucket.has_master:
                        state.tensors[MASTER] = unit.cut(updated, piece)
                    states.append(state)
        return states

    @torch.no_grad()
    def import_state(self, states: list[ParamState]) -> None:
        """Replaces the state of the given pieces."""
        places = {
            (id(self.params[piece.param]), piece.start, piece.stop): (number, piece)
            for number, unit in enumerate(self.units())
            for piece in unit.pieces
        }
        by_unit: dict[int, dict[Piece, ParamState]] = {}
        for given in states:
            place = places.get((id(given.param), given.start, given.stop))
            if place is None:
                raise OptimizerError(
                    f"optimizer state for the elements [{given.start}, {given.stop}) of a parameter of shape "
                    f"{tuple(given.param.shape)} {given.name!r} is not a piece that this rank updates; cut it to "
                    "the ranges that export_state() returns."
                )
            by_unit.setdefault(place[0], {})[place[1]] = given
        groups = {id(p): group for group in self._inner.optimizer.param_groups for p in group["params"]}
        masters = [bucket.has_master for bucket in self.buckets for _ in bucket.units]
        units = self.units()
        for number, parts in by_unit.items():
            unit = units[number]
            present = self.state.get(unit.tensor, {})
            self.state[unit.tensor] = import_unit(unit, parts, present, groups[id(unit.tensor)], self.traits)
            saved = {piece: one.tensors[MASTER] for piece, one in parts.items() if MASTER in one.tensors}
            if masters[number] and saved:
                for piece, value in saved.items():
                    check_length(MASTER, value, parts[piece])
                fill(unit, saved)

    # -- construction ------------------------------------------------------------------------------------

    def _make_inner(self) -> InnerOptimizer:
        members = members_by_group(self.buckets, self.params, self.outer.param_groups)
        kinds = {(bucket.device, bucket.update_dtype) for bucket in self.buckets}
        backend = get_backend()
        if backend.records_graphs:
            inner = InnerOptimizer(self.outer, members, as_data=backend.scalar)
        else:
            inner = InnerOptimizer(self.outer, members, fused=can_fuse(self.outer, kinds))
        adopt_state(self.outer, inner.optimizer, self.units(), self.params)
        return inner

    def _check(self) -> None:
        if any(p.requires_grad for p in self._frozen):
            raise OptimizerError(
                "a parameter that was frozen (requires_grad=False) when the optimizer was wrapped is trainable "
                "now: it has no place in the flat buffers; unfreeze before the optimizer is made, or make a new one."
            )
        if sum(len(group["params"]) for group in self.outer.param_groups) != len(self.params) + len(
            self._frozen
        ):
            raise OptimizerError(
                "the parameter groups of the optimizer have changed since it was wrapped: flat buffers are laid "
                "out once; pass all groups to the constructor."
            )
        for bucket in self.buckets:
            bucket.check_attached()


def _call(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
