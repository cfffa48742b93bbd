"""``save_checkpoint`` and ``load_checkpoint`` with NxD's signatures, for scripts with a training loop of their own.

They write and read this package's checkpoint folders, ``<path>/<tag>``. Every function is called by all ranks
together. What NxD needs to know about files (``num_workers``, ``use_xser`` and the like) is accepted: there is one
format, and each rank writes its share of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver, exchange
from neuron_lightning.errors import CheckpointError

_NUMBER = re.compile(r"\d+")


class _Background:
    """The one saver of scripts that save with ``async_save=True``."""

    saver: AsyncSaver | None = None


def save_checkpoint(
    path: str | os.PathLike[str],
    tag: str | int,
    model: nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    user_content: Any = None,
    num_workers: int = 8,
    use_xser: bool = False,
    num_kept_ckpts: int | None = None,
    async_save: bool = False,
    zero1_optimizer: bool = False,
) -> None:
    """Writes ``<path>/<tag>``: model, optimizer, scheduler and whatever else. All ranks together.

    Args:
        path: folder of the run's checkpoints, or a URL that fsspec knows.
        tag: name of this one. The last number in it orders checkpoints (``step_300``); without one, the order of
            saving does.
        model: whose parameters and buffers are saved; sharded ones by their shards.
        optimizer: of :func:`~neuron_lightning.initialize_parallel_optimizer`.
        scheduler: anything with ``state_dict()``.
        user_content: plain values and tensors, the same on all ranks; :func:`load_checkpoint` returns it.
        num_workers: accepted; without effect.
        use_xser: accepted; without effect.
        num_kept_ckpts: once this one is committed, only so many of the newest are kept.
        async_save: return when a snapshot is taken and write in the background; :func:`finalize_checkpoint` waits.
        zero1_optimizer: accepted; the optimizer knows.

    Raises:
        CheckpointError: on all ranks; nothing that was saved before is touched. With ``async_save``, the next
            save or :func:`finalize_checkpoint` raises it.
    """
    if model is None or not isinstance(model, nn.Module):
        raise CheckpointError(
            f"save_checkpoint needs the module itself as model=, not {type(model).__name__}: a checkpoint is named "
            "after its parameters and knows by them how they are sharded."
        )
    if num_kept_ckpts is not None and num_kept_ckpts < 1:
        raise CheckpointError(
            f"num_kept_ckpts must be at least 1, or None to keep all, not {num_kept_ckpts}."
        )
    finalize_checkpoint()
    target = _join(path, tag)
    what: dict[str, Any] = {
        "module_state": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizers": [] if optimizer is None else [_inner(optimizer)],
        "trainer_state": {
            "global_step": _order(path, tag),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "user_content": user_content,
        },
    }
    follow = partial(_keep, path, num_kept_ckpts)
    if async_save:
        _saver().save(target, on_commit=follow, **what)
        return
    checkpoint.write_checkpoint(target, **what)
    _on_rank_zero("delete older checkpoints", follow)


def load_checkpoint(
    path: str | os.PathLike[str],
    tag: str | int | None = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    num_workers: int = 8,
    strict: bool = True,
) -> Any:
    """Loads ``<path>/<tag>`` into model, optimizer and scheduler, whatever layout wrote it. All ranks together.

    Args:
        path: folder of the run's checkpoints.
        tag: which; None is the newest, by the order that :func:`save_checkpoint` describes.
        model: gets its weights and buffers; None leaves them out.
        optimizer: gets its state; needs ``model``.
        scheduler: gets its state.
        num_workers: accepted; without effect.
        strict: whether names on one side only are an error.

    Returns:
        The ``user_content`` that was saved.

    Raises:
        CheckpointError: there is none, it is damaged, or of another model.
    """
    finalize_checkpoint()
    source = _newest(path) if tag is None else _join(path, tag)
    state: Mapping[str, Any] = exchange.together(
        f"read {source}", lambda: checkpoint.read_trainer_state(source)
    )[exchange.world()[0]]
    if model is not None:
        parameters = dict(model.named_parameters())
        checkpoint.load_module_state(source, model.state_dict(), parameters, strict=strict)
        if optimizer is not None:
            checkpoint.load_optimizer_state(source, [_inner(optimizer)], parameters)
    elif optimizer is not None:
        raise CheckpointError(
            "load_checkpoint(optimizer=…) needs model=… too: its state is named after parameters."
        )
    if scheduler is not None:
        if state.get("scheduler") is None:
            raise CheckpointError(f"{source} holds no scheduler state: it was saved without scheduler=.")
        scheduler.load_state_dict(state["scheduler"])
    return state.get("user_content")


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a committed checkpoint. All ranks together."""
    return bool(_on_rank_zero(f"list {path}", lambda: len(checkpoint.list_checkpoints(_text(path)))))


def finalize_checkpoint() -> None:
    """Waits until a checkpoint that is being written in the background is committed. All ranks together.

    Raises:
        CheckpointError: it could not be written; the same error on all ranks.
    """
    if _Background.saver is not None:
        _Background.saver.wait()


def close_background_saver() -> None:
    """Gives the memory of background saving back; before the process group is destroyed. All ranks together."""
    saver, _Background.saver = _Background.saver, None
    if saver is not None:
        saver.close()


def _saver() -> AsyncSaver:
    if _Background.saver is None:
        _Background.saver = AsyncSaver()
    return _Background.saver


def _inner(optimizer: Any) -> Any:
    """The optimizer itself: Lightning hands out a wrapper."""
    return optimizer if hasattr(optimizer, "export_state") else getattr(optimizer, "optimizer", optimizer)


def _order(path: str | os.PathLike[str], tag: str | int) -> int:
    numbers = _NUMBER.findall(str(tag))
    if numbers:
        return int(numbers[-1])
    return int(_on_rank_zero(f"list {path}", lambda: 1 + max(map(_step, _there(path)), default=0)))


def _newest(path: str | os.PathLike[str]) -> str:
    found = _on_rank_zero(f"list {path}", lambda: [info.path for info in _there(path)])
    if not found:
        raise CheckpointError(f"there is no checkpoint in {_text(path)}: save one first, or check the path.")
    return str(found[-1])


def _keep(path: str | os.PathLike[str], count: int | None) -> None:
    if count is not None:
        for info in _there(path)[:-count]:
            checkpoint.remove_checkpoint(info.path)


def _there(path: str | os.PathLike[str]) -> list[checkpoint.CheckpointInfo]:
    return checkpoint.list_checkpoints(_text(path))


def _step(info: checkpoint.CheckpointInfo) -> int:
    return info.step or 0


def _on_rank_zero(what: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns on rank 0, on every rank. Collective."""
    return exchange.together(what, lambda: work() if exchange.world()[0] == 0 else None)[0]


def _text(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)


def _join(path: str | os.PathLike[str], tag: str | int) -> str:
    return f"{_text(path).rstrip('/')}/{tag}"
