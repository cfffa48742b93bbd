"""What the checkpoint benchmark compares: each row saves or loads the same tensors on each rank."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from workload import SEED, Workload

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint.plan import Planner
from neuron_lightning.models.llama import LlamaForCausalLM
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import parallel_state

CHUNK = 8 << 20


class State:
    """A Llama, tensor parallel over both ranks, and its AdamW after a step; fp32, 12 bytes a parameter.

    Args:
        workload: the model.
    """

    def __init__(self, workload: Workload) -> None:
        parallel_state.initialize_model_parallel(dist.get_world_size())
        torch.manual_seed(SEED + dist.get_rank())
        self.model = LlamaForCausalLM(workload.hf_config())
        self.optimizer = ParallelOptimizer(torch.optim.AdamW(self.model.parameters(), lr=1e-3), zero1=False)
        torch.stack([p.square().sum() for p in self.model.parameters()]).sum().backward()
        self.optimizer.step()
        self.parameters = dict(self.model.named_parameters())
        self.planner = Planner()

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors of this rank by name."""
        found = {f"model/{name}": p.detach() for name, p in self.parameters.items()}
        names = {id(p): name for name, p in self.parameters.items()}
        for piece in self.optimizer.export_state():
            for key, flat in piece.tensors.items():
                found[f"optimizer/{names[id(piece.param)]}/{key}"] = flat
        return found

    def written(self) -> dict[str, Tensor]:
        """Those that this rank writes: what every rank holds alike (norms) is written by the first alone."""
        return {n: t for n, t in self.tensors().items() if dist.get_rank() == 0 or "norm" not in n}

    def distributed(self) -> dict[str, Tensor]:
        """The same for torch.distributed.checkpoint: plain tensors under names that no other rank has.

        (DTensors would be more natural; its asynchronous save cannot copy them on the CPU: torch 2.13 ends with
        "Attempted to call copy_() on an invalid python storage".)
        """
        return {f"{dist.get_rank()}/{name}": tensor for name, tensor in self.written().items()}

    def ours(self) -> dict[str, Any]:
        """Keywords of ``write_checkpoint``."""
        return {
            "module_state": self.model.state_dict(),
            "parameters": self.parameters,
            "optimizers": [self.optimizer],
            "trainer_state": {"global_step": 1},
        }


def rank_file(folder: Path) -> Path:
    """This rank's file."""
    return folder / f"rank-{dist.get_rank()}"


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def into_new_folder(save: Callable[[State, Path], None]) -> Callable[[State, Path], None]:
    """Makes the folder first; at the end the file and its name are durable."""

    def row(state: State, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save(state, rank_file(folder))
        sync(rank_file(folder))
        sync(folder)

    return row


def raw(state: State, path: Path) -> None:
    """As many bytes, from one buffer, in 8 MiB writes: what the disk gives."""
    write_raw(state, path, early=False)


def raw_early(state: State, path: Path) -> None:
    """The same, each piece handed to the disk at once."""
    write_raw(state, path, early=True)


def write_raw(state: State, path: Path, *, early: bool) -> None:
    size = sum(t.numel() * t.element_size() for t in state.written().values())
    handle, data = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), buffer(size)
    for start in range(0, size, CHUNK):
        rest = data[start : start + CHUNK]
        count = len(rest)
        while rest:
            rest = rest[os.write(handle, rest) :]
        if early:
            os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)
    os.close(handle)


_buffers: dict[int, Tensor] = {}


def buffer(size: int) -> memoryview:
    """Random bytes, made once."""
    if size not in _buffers:
        _buffers[size] = torch.randint(256, (size,), dtype=torch.uint8)
    return memoryview(_buffers[size].numpy())


def save_torch(state: State, path: Path) -> None:
    """torch.save of this rank's tensors."""
    torch.save({n: t.clone() if is_part(t) else t for n, t in state.written().items()}, path)


def is_part(tensor: Tensor) -> bool:
    """Whether torch.save would write more than the tensor: the whole storage that it is a part of."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def save_safetensors(state: State, path: Path) -> None:
    """safetensors' own writer."""
    safetensors.save_file(state.written(), path)


def save_dcp(state: State, folder: Path) -> None:
    """torch.distributed.checkpoint, which calls fsync itself."""
    dcp.save(state.distributed(), storage_writer=dcp.FileSystemWriter(folder))
    sync(folder)


def save_ours(state: State, folder: Path) -> None:
    """This package."""
    checkpoint.write_checkpoint(folder, planner=state.planner, **state.ours())


SAVES: dict[str, Callable[[State, Path], None]] = {
    "ours": save_ours,
    "torch.save": into_new_folder(save_torch),
    "safetensors": into_new_folder(save_safetensors),
    "torch.distributed.checkpoint": save_dcp,
    "raw write + fsync": into_new_folder(raw),
    "raw write, early flush": into_new_folder(raw_early),
}


def hashed(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_in(state: State, loaded: dict[str, Tensor]) -> None:
    """Into the live tensors."""
    live = state.tensors()
    with torch.no_grad():
        for name, tensor in loaded.items():
            live[name].copy_(tensor)


def load_ours(state: State, folder: Path, *, verify: bool) -> None:
    """This package."""
    checkpoint.load_module_state(folder, state.model.state_dict(), state.parameters, verify=verify)
    checkpoint.load_optimizer_state(folder, [state.optimizer], state.parameters, verify=verify)


def load_torch(state: State, folder: Path, *, verify: bool) -> None:
    """torch.load of this rank's file, after hashing it where it is verified."""
    if verify:
        hashed(rank_file(folder))
    copy_in(state, torch.load(rank_file(folder), weights_only=True))


def load_safetensors(state: State, folder: Path, *, verify: bool) -> None:
    """safetensors' own reader, after hashing where it is verified."""
    if verify:
        hashed(rank_file(folder))
    copy_in(state, safetensors.load_file(rank_file(folder)))


def load_dcp(state: State, folder: Path, *, verify: bool) -> None:
    """torch.distributed.checkpoint, in place, after hashing this rank's file where it is verified."""
    if verify:
        hashed(folder / f"__{dist.get_rank()}_0.distcp")
    dcp.load(state.distributed(), storage_reader=dcp.FileSystemReader(folder))


LOADS: dict[str, tuple[str, Callable[..., None]]] = {
    "ours": ("ours", load_ours),
    "torch.load": ("torch.save", load_torch),
    "safetensors": ("safetensors", load_safetensors),
    "torch.distributed.checkpoint": ("torch.distributed.checkpoint", load_dcp),
}
"""By name: which save wrote what it loads, and how."""


class Copy:
    """A plain copy of the same bytes into the same memory again and again: what a snapshot cannot be faster than."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._kept = {n: torch.empty_like(t) for n, t in state.written().items()}

    def start(self, folder: Path) -> None:
        """The copy; nothing is written."""
        for name, tensor in self._state.written().items():
            self._kept[name].copy_(tensor)

    def finish(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """Nothing to give back."""


class OursAsync:
    """This package's saver."""

    def __init__(self, state: State) -> None:
        self._state, self._saver = state, checkpoint.AsyncSaver()

    def start(self, folder: Path) -> None:
        """The part that blocks."""
        self._saver.save(folder, **self._state.ours())

    def finish(self) -> None:
        """Until it is durable."""
        self._saver.wait()

    def close(self) -> None:
        """Its group."""
        self._saver.close()


class DcpAsync:
    """torch.distributed.checkpoint's asynchronous save, on a group of its own.

    Args:
        state: what to save.
        kept: whether its staging memory is used again.
    """

    def __init__(self, state: State, *, kept: bool) -> None:
        self._state, self._group = state, dist.new_group(backend="gloo")
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if kept else None
        self._future: Any = None

    def start(self, folder: Path) -> None:
        """The part that blocks."""
        self._folder = folder
        self._future = dcp.async_save(
            self._state.distributed(),
            storage_writer=dcp.FileSystemWriter(folder),
            process_group=self._group,
            async_stager=self._stager,
        )

    def finish(self) -> None:
        """Until it is durable."""
        self._future.result()
        sync(self._folder)

    def close(self) -> None:
        """Its group."""
        dist.destroy_process_group(self._group)


ASYNCS: dict[str, Callable[[State], Any]] = {
    "plain copy": Copy,
    "ours": OursAsync,
    "torch.distributed.checkpoint": lambda state: DcpAsync(state, kept=False),
    "…, staging memory kept": lambda state: DcpAsync(state, kept=True),
}


def evict(folder: Path) -> Iterator[int]:
    """Drops a folder's files from the page cache; yields the size of each."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield os.fstat(file.fileno()).st_size


def clear(folder: Path) -> None:
    """Removes what a row wrote."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
