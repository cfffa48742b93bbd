"""The machinery behind :class:`~neuron_lightning.optim.ParallelOptimizer`: all of its mutable state is here.

Lightning hands out objects of a class that inherits the wrapper's, with another instance dictionary; so the
wrapper holds nothing but this engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.build import check_params, make_buckets, make_reducer
from neuron_lightning.optim.flat import FlatBucket, OwnPiece
from neuron_lightning.optim.inner import InnerOptimizer, can_fuse, needs_closure
from neuron_lightning.optim.norm import clip_coefficient
from neuron_lightning.optim.probe import examine, require_elementwise
from neuron_lightning.optim.state import (
    MASTER,
    ParamState,
    adopt_state,
    check_length,
    export_piece,
    import_piece,
)
from neuron_lightning.optim.window import Phase, Window
from neuron_lightning.parallel import mesh as meshes


class Engine:
    """Flat storage, accumulation window, reduction and the inner optimizer of one wrapped optimizer.

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
            self.mesh,
            sharded=zero1,
            master_weights=master_weights,
            fp32_grad_accumulation=fp32_grad_accumulation,
            bucket_bytes=bucket_bytes,
        )
        self._reducer = make_reducer(self.params, self.buckets, self.mesh, sharded=zero1)
        views: list[Tensor | None] = [None] * len(self.params)
        for bucket in self.buckets:
            for slot in bucket.layout.slots:
                views[slot.param] = bucket.grad_view(slot.param)
        self._window = Window(self.params, views)
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
            bucket.own_grads.clamp_(-clip_value, clip_value)
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
        if not self._window.received[index]:
            return None
        view = self._window.view(index)
        if not self.zero1:
            return view.clone()
        flat = torch.zeros(param.numel(), dtype=view.dtype, device=view.device)
        for piece in self.pieces():
            if piece.where.param == index:
                flat[piece.where.start : piece.where.stop] = piece.grad
        return self._reducer.sum_over_replicas(flat).view(param.shape)

    def zero_grad(self, set_to_none: bool) -> None:
        """Forgets the window's gradients (or zeroes those that are there)."""
        with torch.no_grad():
            self._window.clear(set_to_none)

    # -- the step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Takes one step, evaluating ``closure`` first."""
        if closure is not None and needs_closure(self.outer):
            self._inner.pull()
            result = self._inner.step(closure=lambda: self._evaluate(closure))
            self._finish(self.buckets)
        else:
            result = _call(closure)
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
            bucket.reload_master()

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

    def _attach(self, buckets: list[FlatBucket]) -> set[int]:
        """Gives the optimizer's tensors their gradients; returns the ``id`` of those that have one."""
        attached = set()
        for bucket in buckets:
            casted = None
            for piece in bucket.pieces:
                if not self._window.received[piece.where.param]:
                    continue
                grad = piece.grad
                if grad.dtype != piece.tensor.dtype:
                    casted = bucket.own_grads.to(piece.tensor.dtype) if casted is None else casted
                    grad = bucket.within_slice(casted, piece.where).view(grad.shape)
                piece.tensor.grad = grad
                attached.add(id(piece.tensor))
        return attached

    def _finish(self, buckets: list[FlatBucket]) -> list[dist.Work | None]:
        for bucket in buckets:
            for piece in bucket.pieces:
                piece.tensor.grad = None
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
            bucket.own_grads.mul_(factor)

    # -- state -------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[Tensor, Any]:
        """State of the inner optimizer, keyed by its tensors."""
        return self._inner.optimizer.state

    def pieces(self) -> list[OwnPiece]:
        """What this rank updates, by bucket and offset."""
        return [piece for bucket in self.buckets for piece in bucket.pieces]

    def export_state(self) -> list[ParamState]:
        """State of every piece that this rank updates."""
        states = []
        for bucket in self.buckets:
            for piece in bucket.pieces:
                param = self.params[piece.where.param]
                state = export_piece(piece, param, self.state.get(piece.tensor, {}), self.traits)
                if bucket.master is not None:
                    state.tensors[MASTER] = piece.tensor.detach().reshape(-1)
                states.append(state)
        return states

    @torch.no_grad()
    def import_state(self, states: list[ParamState]) -> None:
        """Replaces the state of the given pieces."""
        pieces = {
            (id(self.params[p.where.param]), p.where.start, p.where.stop): (p, bucket.master is not None)
            for bucket in self.buckets
            for p in bucket.pieces
        }
        groups = {id(p): group for group in self._inner.optimizer.param_groups for p in group["params"]}
        for given in states:
            found = pieces.get((id(given.param), given.start, given.stop))
            if found is None:
                raise OptimizerError(
                    f"optimizer state for the elements [{given.start}, {given.stop}) of a parameter of shape "
                    f"{tuple(given.param.shape)} {given.name!r} is not a piece that this rank updates; cut it to "
                    "the ranges that export_state() returns."
                )
            piece, has_master = found
            self.state[piece.tensor] = import_piece(piece, given, groups[id(piece.tensor)], self.traits)
            if has_master and MASTER in given.tensors:
                check_length(MASTER, given.tensors[MASTER], given)
                piece.tensor.copy_(given.tensors[MASTER].reshape(piece.tensor.shape))

    # -- construction ------------------------------------------------------------------------------------

    def _make_inner(self) -> InnerOptimizer:
        by_param: dict[int, list[Tensor]] = {}
        for piece in self.pieces():
            by_param.setdefault(id(self.params[piece.where.param]), []).append(piece.tensor)
        members = [
            [t for p in group["params"] for t in by_param.get(id(p), [])] for group in self.outer.param_groups
        ]
        kinds = {(bucket.weights.device, bucket.update_dtype) for bucket in self.buckets}
        inner = InnerOptimizer(self.outer, members, fused=can_fuse(self.outer, kinds))
        adopt_state(self.outer, inner.optimizer, [(self.params[p.where.param], p) for p in self.pieces()])
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
