"""A callback that notices when training compiles again, says why, and can stop it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.backends.counts import Counts
from neuron_lightning.errors import ConfigError, RecompileError
from neuron_lightning.lightning.recompiles.dynamo import DynamoWatch, is_compiled
from neuron_lightning.lightning.recompiles.operators import Call, OperatorRecord, differences, shown
from neuron_lightning.lightning.recompiles.reads import ReadWatch

_REMEDIES = (
    "Few shapes: neuron_lightning.data.PadToBuckets. Numbers that change: tensors on the device. Values of tensors: "
    "log them (self.log), or read them at steps that log."
)


class RecompileGuard(Callback):
    """Counts the graphs that each optimizer step compiles, and names what caused one after the first steps.

    A compilation stops training for seconds on a host, and for minutes on Neuron cores. ``NeuronXLAStrategy`` adds
    this callback by itself on ``xla``, and where ``torch.compile`` is used; add your own to set its arguments.

    On ``xla`` the causes are found by comparing the operators of the step with those of an earlier one, and by
    watching what reads a tensor's value; with ``torch.compile`` they are the compiler's own.

    Args:
        max_recompiles: compilations after the first steps before the run fails; None: only warn.
        warmup_steps: optimizer steps that may compile: the first makes the optimizer's state, the second has it.
        locate: record the operators of every step, so that already the first cause is named with its line; it
            makes recording a step slower. None: record from the first unexpected compilation on. False: never.

    Attributes:
        num_recompiles: graphs compiled after the first steps.
        reports: what was said of each.

    Raises:
        ConfigError: a number that makes no sense.
        RecompileError: more than ``max_recompiles``.
    """

    def __init__(
        self, max_recompiles: int | None = None, warmup_steps: int = 3, locate: bool | None = None
    ) -> None:
        for name, value in (("max_recompiles", max_recompiles), ("warmup_steps", warmup_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name} must be an integer of 0 or more, not {value!r}.")
        self.max_recompiles = max_recompiles
        self.warmup_steps = warmup_steps
        self.locate = locate
        self.num_recompiles = 0
        self.reports: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self._first_step: int | None = None
        self._step = 0
        self._before: Counts | None = None
        self._reads: ReadWatch | None = None
        self._reads_reported: set[Any] = set()
        self._record: OperatorRecord | None = None
        self._references: dict[bool, list[Call]] = {}
        self._differences: list[str] | None = None
        self._recording = bool(self.locate)
        self._shapes: set[Any] = set()
        self._new_shape: str | None = None
        self._dynamo = DynamoWatch()

    # -- hooks -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count."""
        self._forget()
        self._first_step = trainer.global_step
        if get_backend().records_graphs:
            self._reads = ReadWatch(get_backend().device_type)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Judges the batch before, whose last graph has run by now, and watches this one."""
        self._judge()
        self._step = trainer.global_step
        self._note_shapes(batch)
        self._before = get_backend().graph_counts()
        if self._reads is not None:
            self._reads.begin()
            if self._recording:
                self._record = OperatorRecord(get_backend().device_type)
                self._record.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops watching."""
        self._stop_watching(stepped=trainer.global_step != self._step)

    def on_validation_start(self, *_: Any) -> None:
        """What validation compiles is not the steps'."""
        self._judge()

    def on_train_end(self, *_: Any) -> None:
        """Judges the last batch."""
        self._judge()

    def on_exception(self, *_: Any) -> None:
        """Leaves nothing behind."""
        self._stop_watching(stepped=False)

    # -- judging ---------------------------------------------------------------------------------------

    def _stop_watching(self, *, stepped: bool) -> None:
        self._differences = None
        if self._record is not None:
            record, self._record = self._record, None
            record.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            reference = self._references.get(stepped)
            if reference is not None:
                self._differences = differences(reference, record.calls)
            self._references[stepped] = record.calls
        if self._reads is not None:
            self._reads.end()

    def _judge(self) -> None:
        before, self._before = self._before, None
        again = self._dynamo.new()
        if before is None or self._first_step is None:
            return
        warm = self._step - self._first_step < self.warmup_steps
        compiled = (get_backend().graph_counts() - before).compiled
        if not warm:
            self._report_reads(compiled)
            for one in again:
                self._found(1, f"{one.place} was compiled again: {one.reason}")
            if compiled:
                self._found(compiled, self._cause())
                self._recording = self.locate is not False
        self._new_shape = None

    def _cause(self) -> str:
        causes = [self._new_shape] if self._new_shape else []
        if self._reads is not None and self._reads.found:
            causes += [f"{place}: {what} reads a tensor's value" for place, what in self._reads.found]
        causes += self._differences or []
        if causes:
            return shown(causes)
        if self._differences is not None:
            return "the operators that Python called are the same as before"
        return "its operators were not recorded" + (
            ""
            if self.locate is False
            else "; they are from now on, so that the next cause can be named (RecompileGuard(locate=True) does from the start)"
        )

    def _report_reads(self, compiled: int) -> None:
        """Says once of each line that it reads; it costs a graph and a wait at every step, compiled or not."""
        if self._reads is None or compiled:
            return
        for (place, what), times in self._reads.found.items():
            if (place, what) not in self._reads_reported:
                self._say(
                    f"step {self._step}: {place}: {what} reads a tensor's value {times} time(s) in a batch"
                )
        self._reads_reported.update(self._reads.found)

    def _found(self, number: int, cause: str) -> None:
        self.num_recompiles += number
        self._say(
            f"step {self._step} compiled {number} graph(s), {self.num_recompiles} since the first "
            f"{self.warmup_steps} steps: {cause}"
        )
        if self.max_recompiles is not None and self.num_recompiles > self.max_recompiles:
            raise RecompileError(
                f"{self.num_recompiles} graph(s) were compiled after the first {self.warmup_steps} steps, "
                f"max_recompiles is {self.max_recompiles}. The last one, at step {self._step}: {cause}. {_REMEDIES}"
            )

    def _say(self, report: str) -> None:
        self.reports.append(report)
        rank_zero_warn(f"RecompileGuard: {report}. {_REMEDIES}")

    def _note_shapes(self, batch: Any) -> None:
        shapes = tuple(_shapes(batch))
        if self._shapes and shapes not in self._shapes:
            known = next(iter(self._shapes))
            changed = [f"{name} is {shape}" for name, shape in shapes if (name, shape) not in known]
            self._new_shape = (
                f"the batch has a new shape: {', '.join(changed) or 'other entries'} (it was {dict(known)})"
            )
        self._shapes.add(shapes)


def guard_against_recompiles(trainer: Trainer, module: LightningModule) -> None:
    """Adds the callback where graphs are compiled, unless the user has one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, RecompileGuard) for callback in callbacks):
        return
    if get_backend().records_graphs or is_compiled(module):
        callbacks.append(RecompileGuard())


def _shapes(batch: Any, name: str = "batch") -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(batch, Tensor):
        yield name, tuple(batch.shape)
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _shapes(value, f"{name}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from _shapes(value, f"{name}[{index}]")
