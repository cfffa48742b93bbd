"""Functions that scripts put off to the end of the step (``xm.add_step_closure``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor


class StepClosures:
    """Closures in the order they were added; run at the end of the step, in turn or on one background thread."""

    def __init__(self) -> None:
        self._pending: list[tuple[Callable[..., Any], tuple[Any, ...], bool]] = []
        self._running: list[Future[Any]] = []
        self._thread: ThreadPoolExecutor | None = None

    def add(self, closure: Callable[..., Any], args: Sequence[Any], run_async: bool) -> None:
        """Puts ``closure(*args)`` off to the end of the step."""
        self._pending.append((closure, tuple(args), run_async))

    def run(self) -> None:
        """Runs what was added. An error of an earlier background closure is raised here."""
        done = [future for future in self._running if future.done()]
        self._running = [future for future in self._running if future not in done]
        for future in done:
            future.result()
        pending, self._pending = self._pending, []
        for closure, args, run_async in pending:
            if run_async:
                self._submit(closure, args)
            else:
                closure(*args)

    def wait(self) -> None:
        """Waits for background closures; raises the first error among them."""
        running, self._running = self._running, []
        for future in running:
            future.result()

    def _submit(self, closure: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-closures")
        # The next step may write into these tensors while the thread still reads them.
        frozen = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
        self._running.append(self._thread.submit(closure, *frozen))
