"""``NeuronModelCheckpoint``: when checkpoints are saved, which are kept, and what they are called."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from neuron_lightning.checkpoint import is_checkpoint, list_checkpoints
from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.callbacks import folder_link
from neuron_lightning.lightning.callbacks.retention import Saved, Shelf


class NeuronModelCheckpoint(ModelCheckpoint):
    """Saves checkpoints when everything that belongs to an optimizer step is done, and keeps the right ones.

    Takes the arguments of Lightning's ``ModelCheckpoint`` and differs from it as follows.

    * A save happens after the module's ``on_train_batch_end`` and after a validation of the same step, so that
      ``monitor`` is of the step that is saved, whoever logged it. A save that is due while the monitored metric is
      of an earlier step (a validation metric between validations) waits for the next value.
    * ``every_n_train_steps`` and ``train_time_interval`` count optimizer steps and time under manual optimization
      too. Rank 0's clock decides.
    * Without ``monitor``, ``save_top_k`` keeps that many of the newest; with it, the best.
    * ``save_last`` keeps the newest whatever its score. Nothing is written twice: ``last.ckpt`` is a link to it (on
      object stores there is no link). ``ckpt_path="last"`` needs neither: it means the highest step in the folder.
    * A checkpoint is deleted only once the one that replaces it is committed and all that are to be kept are there.
      What a crash kept from being deleted is deleted when the run is resumed.
    * ``best_model_path``, ``best_k_models`` and ``last_model_path`` name committed checkpoints only.

    Args:
        dirpath: folder of the checkpoints; default: where the logger, or the Trainer, keeps its files.
        filename: name pattern, as ``ModelCheckpoint`` takes it; default ``{epoch}-{step}``.
        monitor: name of a logged metric that ranks checkpoints; rank 0's value counts.
        verbose: say what is saved and why.
        save_last: keep the newest too; ``"link"`` means the same.
        save_top_k: how many are kept; -1 all, 0 none.
        save_on_exception: must be False: after a failure of one rank the others cannot take part in a save.
        save_weights_only: without optimizer and trainer state; cannot be resumed from.
        mode: ``min`` or ``max`` of ``monitor``.
        auto_insert_metric_name: as in ``ModelCheckpoint``.
        every_n_train_steps: optimizer steps between saves.
        train_time_interval: time between saves.
        every_n_epochs: epochs between saves; the default, every epoch, where no other trigger is given.
        save_on_train_epoch_end: False: the epoch trigger saves after every validation instead.
        enable_version_counter: append ``-v1`` to a name that is taken; otherwise it is replaced.

    Raises:
        ConfigError: ``save_on_exception``, or another strategy than ``NeuronXLAStrategy``.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        if save_on_exception:
            raise ConfigError(
                "save_on_exception=True is not possible: all ranks write a checkpoint together, and after a failure of "
                "one of them the others would wait for it; save more often (every_n_train_steps, train_time_interval)."
            )
        if isinstance(save_top_k, bool) or not isinstance(save_top_k, int) or save_top_k < -1:
            raise ConfigError(f"save_top_k must be -1 (keep all), 0 or a number to keep, not {save_top_k!r}.")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=min(save_top_k, 1) if monitor is None else save_top_k,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )
        self.save_top_k = save_top_k  # Lightning knows no number of newest ones
        self._shelf = Shelf()
        self._due = False
        self._validated: dict[str, int] = {}
        self._before_validation: dict[str, Any] = {}
        self._keeps_time = False
        self._recovered = False

    # -- Lightning's hooks -----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder. Raises :class:`ConfigError` under another strategy."""
        if not hasattr(trainer.strategy, "after_commit"):
            raise ConfigError(
                f"NeuronModelCheckpoint needs NeuronXLAStrategy, not {type(trainer.strategy).__name__}: use "
                "lightning's ModelCheckpoint with other strategies."
            )
        super().setup(trainer, pl_module, stage)
        self._recovered = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and finishes what a crash interrupted: deletions that were due."""
        super().on_train_start(trainer, pl_module)
        self._due, self._validated = False, {}
        self._keeps_time = trainer.is_global_zero
        self._recover(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finishes interrupted deletions where a resumed run had nothing left to train."""
        super().on_fit_end(trainer, pl_module)
        if not self._recovered:
            self._recover(trainer)

    def _recover(self, trainer: Trainer) -> None:
        """Forgets checkpoints that are gone, and deletes those that should be. All ranks together."""
        self._recovered = True
        present = [one.path for one in self._shelf.kept if is_checkpoint(one.path)]
        self._shelf = self._shelf.only(trainer.strategy.broadcast(present))
        self._adopt(self._shelf)
        if self._shelf.obsolete and trainer.is_global_zero:
            self._retire(trainer, self._shelf)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved here: the module's own hook and the step's validation are still to come."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the epoch's save is due at the boundary that follows."""
        if self._epoch_trigger(trainer) and self._should_save_on_train_epoch_end(trainer):
            self._due = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the metrics before a validation, to know which are its own."""
        self._before_validation = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes which metrics are fresh, and that a save is due where the epoch trigger follows validations."""
        if trainer.sanity_checking:
            return
        before, self._before_validation = self._before_validation, {}
        for name, value in trainer.callback_metrics.items():
            if before.get(name) is not value:
                self._validated[name] = trainer.global_step
        if self._epoch_trigger(trainer) and not self._should_save_on_train_epoch_end(trainer):
            self._due = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves nothing: other ranks may be gone."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves nothing here: the strategy calls :meth:`finish` when its own deferred saves are done."""

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state as it is once this checkpoint is committed, and what is kept."""
        return {**super().state_dict(), **self._public(self._shelf), "shelf": self._shelf.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` described; checkpoints are looked for in the present folder."""
        shelf = Shelf.from_state(state_dict["shelf"])
        self._shelf = shelf.moved(str(state_dict["dirpath"]), str(self.dirpath))
        self._adopt(self._shelf)
        self.current_score = state_dict["current_score"]

    # -- what the strategy calls -----------------------------------------------------------------------

    def is_time(self) -> bool:
        """On rank 0: whether ``train_time_interval`` is over."""
        interval, last = self._train_time_interval, self._last_time_checked
        if interval is None or last is None or not self._keeps_time:
            return False
        return time.monotonic() - last >= interval.total_seconds()

    def on_boundary(self, trainer: Trainer, *, epoch_ended: bool, is_time: bool) -> None:
        """Saves if a trigger says so; called when everything that belongs to a step is done. All ranks together."""
        every = self._every_n_train_steps
        self._due |= is_time or (every > 0 and trainer.global_step % every == 0)
        if is_time:
            self._last_time_checked = time.monotonic()
        self._due |= self._ends_here(trainer) and not epoch_ended and self._epoch_trigger(trainer)
        if self._due and self.save_top_k == 0 and not self.save_last:
            self._due = False
        if self._due and not self._should_skip_saving_checkpoint(trainer):
            self._save_due(trainer, epoch_ended)

    def finish(self, trainer: Trainer) -> None:
        """Saves what is still due at the end of training. All ranks together."""
        wanted = self._due or (bool(self.save_last) and not self._last_checkpoint_saved)
        if wanted and not self._should_skip_saving_checkpoint(trainer):
            metrics = self._monitor_candidates(trainer)
            fresh = self.monitor is None or self._is_fresh(trainer, metrics)
            if not fresh:
                rank_zero_warn(
                    f"training ended before a value of {self.monitor!r} for step {trainer.global_step} was logged: the "
                    "last checkpoint is saved without one."
                )
            self._save(trainer, metrics, ranked=fresh)

    def save_now(self, trainer: Trainer) -> None:
        """Saves the present step unless it is saved already, and keeps it as the newest. All ranks together."""
        if self._last_global_step_saved != trainer.global_step:
            metrics = self._monitor_candidates(trainer)
            self._save(trainer, metrics, ranked=self.monitor is None and self.save_top_k != 0)

    # -- one save --------------------------------------------------------------------------------------

    def _epoch_trigger(self, trainer: Trainer) -> bool:
        every = self._every_n_epochs
        return every > 0 and (trainer.current_epoch + 1) % every == 0

    def _ends_here(self, trainer: Trainer) -> bool:
        """Whether training ends inside the epoch, whose end is then no good place for a save."""
        return bool(trainer.should_stop) or 0 <= trainer.max_steps <= trainer.global_step

    def _save_due(self, trainer: Trainer, epoch_ended: bool) -> None:
        metrics = self._monitor_candidates(trainer)
        if epoch_ended:  # its number has moved on already
            metrics["epoch"] = torch.tensor(trainer.current_epoch - 1, device="cpu")
        if self.monitor is not None and not self._is_fresh(trainer, metrics):
            self._require_metric(trainer, metrics, epoch_ended)
            return
        self._save(trainer, metrics, ranked=True)

    def _is_fresh(self, trainer: Trainer, metrics: Mapping[str, Any]) -> bool:
        """Whether the monitored metric is there and, if validations log it, of this step."""
        step = trainer.global_step
        return self.monitor in metrics and self._validated.get(str(self.monitor), step) == step

    def _require_metric(self, trainer: Trainer, metrics: Mapping[str, Any], epoch_ended: bool) -> None:
        validated = not trainer.enable_validation or bool(self._validated)
        if self.monitor not in metrics and epoch_ended and validated:
            raise ConfigError(
                f"NeuronModelCheckpoint(monitor={self.monitor!r}): after a whole epoch nothing of that name is logged; "
                f"there are {', '.join(sorted(metrics))}. Log it with self.log({self.monitor!r}, …), or monitor one of "
                "these."
            )

    def _save(self, trainer: Trainer, metrics: dict[str, Tensor], *, ranked: bool) -> None:
        self._due = False
        step = trainer.global_step
        score = self._score(trainer, metrics) if ranked and self.monitor is not None else None
        if ranked and not self._shelf.admits(score, limit=self.save_top_k, mode=self.mode):
            if self.verbose:
                rank_zero_info(f"step {step}: {self.monitor}={score} is not among the best {self.save_top_k}")
            if not self.save_last:
                return
            ranked = False
        plan = partial(
            self._shelf.with_saved,
            limit=self.save_top_k,
            mode=self.mode,
            ranked=ranked,
            keep_newest=bool(self.save_last),
        )
        path = self._name(trainer, metrics, plan(Saved(path="", step=step, score=score)).obsolete)
        self._shelf = plan(Saved(path=path, step=step, score=score))
        self.current_score = None if score is None else torch.tensor(score, device="cpu")
        if self.verbose:
            rank_zero_info(f"step {step}: saving {path}")
        trainer.save_checkpoint(path, self.save_weights_only)
        self._last_global_step_saved, self._last_checkpoint_saved = step, path
        strategy: Any = trainer.strategy
        strategy.after_commit(
            partial(self._committed, trainer, self._shelf),
            on_rank_zero=partial(self._tidy, trainer, self._shelf, path),
        )

    def _score(self, trainer: Trainer, metrics: Mapping[str, Any]) -> float:
        """Rank 0's value on every rank; one that is no number counts as the worst."""
        score = float(trainer.strategy.broadcast(float(metrics[str(self.monitor)])))
        return score if score == score else math.inf * (1 if self.mode == "min" else -1)

    def _name(self, trainer: Trainer, metrics: dict[str, Tensor], free: Collection[str]) -> str:
        """A name that nothing has, or whose owner this save makes obsolete; rank 0's on every rank."""
        path, version = self.format_checkpoint_name(metrics), self.STARTING_VERSION
        path = trainer.strategy.broadcast(path)
        taken = {one.path for one in self._shelf.kept}
        while self._enable_version_counter and path not in free:
            if path not in taken and not self.file_exists(path, trainer):
                break
            path = trainer.strategy.broadcast(self.format_checkpoint_name(metrics, ver=version))
            version += 1
        return path

    # -- once it is committed --------------------------------------------------------------------------

    def _committed(self, trainer: Trainer, shelf: Shelf) -> None:
        """On every rank."""
        self._adopt(shelf)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _adopt(self, shelf: Shelf) -> None:
        for name, value in self._public(shelf).items():
            setattr(self, name, value)

    def _public(self, shelf: Shelf) -> dict[str, Any]:
        """Lightning's attributes, as they are when what is on the shelf is committed."""
        scores = {
            one.path: torch.tensor(one.score, device="cpu") for one in shelf.best if one.score is not None
        }
        best = shelf.best[0] if shelf.best else None
        worst = shelf.best[-1] if shelf.best and len(shelf.best) == self.save_top_k else None
        newest = max(shelf.kept, key=lambda one: one.step, default=None)
        unranked = torch.tensor(math.inf if self.mode == "min" else -math.inf, device="cpu")
        return {
            "best_model_path": "" if best is None else best.path,
            "best_model_score": None
            if best is None or best.score is None
            else torch.tensor(best.score, device="cpu"),
            "best_k_models": scores,
            "kth_best_model_path": "" if worst is None else worst.path,
            "kth_value": unranked
            if worst is None or worst.score is None
            else torch.tensor(worst.score, device="cpu"),
            "last_model_path": "" if newest is None else newest.path,
        }

    def _tidy(self, trainer: Trainer, shelf: Shelf, path: str) -> None:
        """On rank 0: moves the link and deletes what the save made superfluous."""
        if self.save_last and "://" not in path:
            link = Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            if not folder_link.point(link, Path(path)):
                rank_zero_warn(
                    f"{link} is not a link, so it is left as it is and does not name the newest checkpoint {path}: "
                    "move it away."
                )
        self._retire(trainer, shelf)

    def _retire(self, trainer: Trainer, shelf: Shelf) -> None:
        """Deletes what is obsolete, provided that all that are to be kept are there."""
        if missing := [one.path for one in shelf.kept if not is_checkpoint(one.path)]:
            rank_zero_warn(f"{missing[0]} is not there; {', '.join(shelf.obsolete)} is kept in its place.")
            return
        strategy: Any = trainer.strategy
        for path in shelf.obsolete:
            if path != strategy.kept_for_user:
                strategy.checkpoint_io.remove_checkpoint(path)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The committed checkpoint of the highest step: Lightning looks for ``last*`` by modification time."""
        newest = list_checkpoints(str(self.dirpath or ""))[-1:]
        return {info.path for info in newest}
