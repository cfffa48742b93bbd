"""The TensorBoard logger, with NxD's protocol and without needing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from neuron_lightning.errors import ConfigError

_FLUSH_SECONDS = 5


class NeuronTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event files, written by exactly one rank and readable while the run goes on.

    NxD's scripts tell the logger when to write by setting ``print_step``: -1 means "not now", a positive number is
    the step of the next record. Scripts that never set it are served at every record, at the step that Lightning
    gives (the number of optimizer steps under :class:`~neuron_lightning.NeuronXLAStrategy`).

    Args:
        log_rank0: NxD's choice between global rank 0 and the last pipeline stage. With one pipeline stage, all
            that this release has, global rank 0 writes in both cases.
        **kwargs: as :class:`~lightning.pytorch.loggers.TensorBoardLogger` takes them (``save_dir`` first of all);
            ``flush_secs`` is 5 unless given.

    Raises:
        ConfigError: ``log_rank0`` is no bool: as in NxD it comes first, and ``save_dir`` is a keyword.
    """

    def __init__(self, log_rank0: bool = False, **kwargs: Any) -> None:
        if not isinstance(log_rank0, bool):
            raise ConfigError(
                f"log_rank0, the first argument of NeuronTensorBoardLogger, must be a bool, not {log_rank0!r}: give the "
                f"folder by its keyword, NeuronTensorBoardLogger(save_dir={log_rank0!r})."
            )
        kwargs.setdefault("flush_secs", _FLUSH_SECONDS)
        super().__init__(**kwargs)
        self.log_rank0 = log_rank0
        self.print_step: int | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes scalars at ``step``.

        Args:
            metrics: numbers by name.
            step: the record's step; where it is None, ``print_step`` if a script has set that.
        """
        if self.print_step == -1:
            return
        if step is None and self.print_step is not None:
            step = self.print_step
        super().log_metrics(dict(metrics), step)
