"""Memory of saving and of resuming at another layout: ``python tools/memory_checkpoint.py``.

A Llama of 0.5 B parameters (bf16, fp32 master weights, ZeRO-1, AdamW) takes one step on two data-parallel ranks and is
saved; two fresh tensor-parallel ranks resume it, save it again, and take a step. The two checkpoints are then compared
tensor by tensor, bit for bit.

Extra memory of a save is the growth of anonymous memory while it runs; of a load, its peak less what is there when it
has ended, which holds the state itself. Memory that was freed before is given back first, so that it cannot hide any.
Files that are mapped or cached count separately: the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - found by the line above
from torch import nn  # noqa: E402

from neuron_lightning import checkpoint  # noqa: E402
from neuron_lightning.checkpoint.boxes import whole  # noqa: E402
from neuron_lightning.checkpoint.reader import Checkpoint  # noqa: E402
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM  # noqa: E402
from neuron_lightning.optim import ParallelOptimizer  # noqa: E402
from neuron_lightning.parallel import parallel_state  # noqa: E402
from neuron_lightning.parallel.initialize import deferred_init, materialize  # noqa: E402
from neuron_lightning.testing import run_distributed  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Size:
    """How large a model is; the defaults have 0.506 B parameters."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 29
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    vocab_size: int = 32000


@dataclass
class Usage:
    """Memory of one rank around one piece of work, in bytes.

    Attributes:
        before, peak, after: anonymous resident memory.
        files: largest growth of mapped files.
        seconds: how long it took.
    """

    before: int = 0
    peak: int = 0
    after: int = 0
    files: int = 0
    seconds: float = 0.0

    @property
    def extra(self) -> int:
        """What was needed beside what is there before or afterwards."""
        return self.peak - max(self.before, self.after)


@dataclass
class Report:
    """What one rank saw.

    Attributes:
        held: bytes of weights and optimizer state on this rank.
        usages: by piece of work.
        loss: of the last step.
    """

    held: int = 0
    usages: dict[str, Usage] = field(default_factory=dict)
    loss: float = float("nan")


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0][:-1]: int(parts[1]) << 10 for parts in lines if parts[0] in ("RssAnon:", "RssFile:")}


@contextmanager
def measured(report: Report, name: str) -> Iterator[None]:
    """Samples this process' memory every few milliseconds while it runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    usage, first, ended = Usage(), _status(), threading.Event()
    usage.before = usage.peak = first["RssAnon"]

    def sample() -> None:
        while not ended.wait(0.002):
            now = _status()
            usage.peak = max(usage.peak, now["RssAnon"])
            usage.files = max(usage.files, now["RssFile"] - first["RssFile"])

    thread, begun = threading.Thread(target=sample), time.monotonic()
    thread.start()
    try:
        yield
    finally:
        usage.seconds = time.monotonic() - begun
        ended.set()
        thread.join()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        usage.after = _status()["RssAnon"]
        report.usages[name] = usage


def _build(size: Size, seed: int) -> tuple[LlamaForCausalLM, ParallelOptimizer]:
    torch.set_default_dtype(torch.bfloat16)
    with deferred_init():
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **asdict(size)))
    materialize(model, seed)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, ParallelOptimizer(adam, zero1=True, master_weights=True)


def _step(model: nn.Module, optimizer: ParallelOptimizer) -> float:
    ids = torch.randint(1000, (1, 8), generator=torch.Generator().manual_seed(3))
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _held(model: nn.Module, optimizer: ParallelOptimizer) -> int:
    state = sum(
        t.numel() * t.element_size() for piece in optimizer.export_state() for t in piece.tensors.values()
    )
    return state + sum(p.numel() * p.element_size() for p in model.parameters())


def _save(path: str, model: nn.Module, optimizer: ParallelOptimizer) -> None:
    checkpoint.write_checkpoint(
        path,
        module_state=model.state_dict(),
        parameters=dict(model.named_parameters()),
        optimizers=[optimizer],
        trainer_state={"global_step": 1},
    )


def rank_saves(size: Size, tp: int, path: str) -> Report:
    """Builds, takes a step, saves."""
    parallel_state.initialize_model_parallel(tp)
    model, optimizer = _build(size, 0)
    report = Report(loss=_step(model, optimizer))
    report.held = _held(model, optimizer)
    with measured(report, "save"):
        _save(path, model, optimizer)
    return report


def rank_resumes(size: Size, tp: int, path: str, again: str) -> Report:
    """Builds with other weights, resumes, saves, takes a step."""
    parallel_state.initialize_model_parallel(tp)
    model, optimizer = _build(size, 1)
    report, named = Report(), dict(model.named_parameters())
    with measured(report, "load weights"):
        checkpoint.load_module_state(path, model.state_dict(), named)
    with measured(report, "load optimizer"):
        checkpoint.load_optimizer_state(path, [optimizer], named)
    report.held = _held(model, optimizer)
    with measured(report, "save"):
        _save(again, model, optimizer)
    report.loss = _step(model, optimizer)
    return report


def differences(first: str, second: str) -> list[str]:
    """Names of tensors that are not the same in two checkpoints, one tensor in memory at a time."""
    a, b = Checkpoint(Path(first)), Checkpoint(Path(second))
    names = [name for name in a.manifest.tensors if not name.startswith(("trainer/", "rank."))]
    others = [name for name in b.manifest.tensors if not name.startswith(("trainer/", "rank."))]
    found = sorted(set(names) ^ set(others))
    for name in set(names) & set(others):
        record, other = a.manifest.tensors[name], b.manifest.tensors[name]
        if (record.dtype, record.shape) != (other.dtype, other.shape):
            found.append(name)
            continue
        left, right = (torch.empty(record.shape, dtype=record.dtype) for _ in range(2))
        a.read_box(record, whole(record.shape), left)
        b.read_box(other, whole(record.shape), right)
        if not torch.equal(left, right):
            found.append(name)
    return found


@dataclass
class Result:
    """A whole measurement.

    Attributes:
        state: unique bytes of weights, master weights and moments.
        disk: bytes of the checkpoint.
        saved, resumed: by rank.
        different: tensors that are not equal after the resume.
    """

    state: int
    disk: int
    saved: list[Report]
    resumed: list[Report]
    different: list[str]


def measure(size: Size, folder: str, save_tp: int = 1, load_tp: int = 2, timeout: float = 900.0) -> Result:
    """Saves under one layout of two ranks and resumes under another."""
    first, second = f"{folder}/first", f"{folder}/second"
    saved = run_distributed(rank_saves, 2, size, save_tp, first, timeout=timeout)
    resumed = run_distributed(rank_resumes, 2, size, load_tp, first, second, timeout=timeout)
    tensors = Checkpoint(Path(first)).manifest.tensors.items()
    numel = sum(
        torch.Size(t.shape).numel() * t.dtype.itemsize for n, t in tensors if not n.startswith("trainer/")
    )
    disk = sum(path.stat().st_size for path in Path(first).iterdir())
    return Result(numel, disk, saved, resumed, differences(first, second))


def print_result(result: Result) -> None:
    """A line for each piece of work and rank."""
    print(
        f"state: {result.state / GIB:.3f} GiB; on disk {result.disk / GIB:.3f} GiB ({result.disk / result.state - 1:+.4%})"
    )
    print(
        f"{'':<28}{'holds':>9}{'before':>9}{'peak':>9}{'after':>9}{'extra':>9}{'of state':>10}{'files':>9}{'s':>7}"
    )
    for title, reports in (("saved at", result.saved), ("resumed at", result.resumed)):
        for rank, report in enumerate(reports):
            for name, u in report.usages.items():
                sizes = "".join(
                    f"{value / MIB:>9.0f}" for value in (report.held, u.before, u.peak, u.after, u.extra)
                )
                print(
                    f"{f'{title} rank {rank}: {name}':<28}{sizes}{u.extra / result.state:>10.2%}"
                    f"{u.files / MIB:>9.0f}{u.seconds:>7.1f}"
                )
    print(
        f"MiB a rank. Loss of the step before the save {result.saved[0].loss:.4f}, after the resume {result.resumed[0].loss:.4f}"
    )
    print("all tensors equal" if not result.different else f"DIFFERENT: {result.different[:10]}")


def main() -> int:
    """Exit code 0 if everything came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", default=None, help="where the two checkpoints are written (15 GB); removed again"
    )
    parser.add_argument("--layers", type=int, default=Size.num_hidden_layers)
    parser.add_argument("--hidden", type=int, default=Size.hidden_size)
    parser.add_argument("--save-tp", type=int, default=1, choices=(1, 2))
    parser.add_argument("--load-tp", type=int, default=2, choices=(1, 2))
    options = parser.parse_args()
    size = Size(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers
    )
    folder = tempfile.mkdtemp(prefix="memory-checkpoint-", dir=options.folder or os.getcwd())
    try:
        result = measure(size, folder, options.save_tp, options.load_tp)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_result(result)
    return 1 if result.different else 0


if __name__ == "__main__":
    sys.exit(main())
