"""The strategy's side of resuming: which checkpoint, and how a run gets back what is in it."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from lightning.pytorch.trainer.states import TrainerFn

from neuron_lightning.backends import get_backend
from neuron_lightning.checkpoint import folder
from neuron_lightning.errors import CheckpointError, DataError
from neuron_lightning.lightning import averages, drift, internals_loops, resume
from neuron_lightning.lightning.checkpoint_io import show_transfer
from neuron_lightning.lightning.plain_file import PlainFile, merge_checkpoint
from neuron_lightning.lightning.strategy_checkpoint import CheckpointMixin, layout
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.random import set_rng_state


class ResumeMixin(CheckpointMixin):
    """Choosing and loading of checkpoints."""

    _auto_resume: bool = False
    _restored_from: str | None = None
    _file: PlainFile | None = None
    """The Lightning file that is restored from, if it is one."""
    _verified: str | None = None
    """Path of a checkpoint whose files were all verified just now."""
    _rank_state: Mapping[str, Any] | None = None
    _override: tuple[str, ...] = ()
    _overridden: set[str]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are loaded into sharded parameters on their device."""
        return True

    @classmethod
    def merge_checkpoint(cls, checkpoint_files: Sequence[str | Path], output_file: str | Path) -> None:
        """Makes one Lightning ``.ckpt`` file of a checkpoint's folder, or of files in it; one process calls it.

        The file loads with ``torch.load(weights_only=True)``, and both this strategy and stock Lightning resume from
        it: the latter in a module with the names that this one has on one rank.

        Raises:
            CheckpointError: not files of one checkpoint, damaged, or ``output_file`` exists.
        """
        merge_checkpoint(checkpoint_files, output_file)

    def resolve_checkpoint(self, path: Any) -> Any:
        """The checkpoint that a run starts from, given what the user asked for. All ranks together.

        Args:
            path: ``fit(ckpt_path=…)``; ``"last"`` and ``"best"`` are looked up in the checkpoint callbacks' folders,
                None means the newest intact one there if the strategy was made with ``auto_resume=True``.
        """
        trainer = self._trainer()
        self.kept_for_user = self._verified = None
        if get_backend().is_trial:
            return None
        if path == "last":
            return resume.last(trainer)
        if path == "best":
            return resume.best(trainer)
        if path is not None:
            self.kept_for_user = str(path)
        elif self._auto_resume and trainer.state.fn == TrainerFn.FITTING:
            path = self._verified = resume.newest_intact(trainer)
        return path

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint's trainer state; weights and optimizer state follow when they have a place to go.

        Args:
            checkpoint_path: a folder that :meth:`save_checkpoint` wrote, or a Lightning ``.ckpt`` file with whole
                tensors, such as :meth:`merge_checkpoint` writes.
            weights_only: Lightning's argument. Our folders hold no pickle; a file is read by torch's weights-only
                unpickler, unless an explicit False lets it run code.

        Raises:
            CheckpointError: neither of them, or damaged.
        """
        get_backend().empty_cache()
        path = os.fspath(checkpoint_path)
        self._file = PlainFile(Path(path), trusted=weights_only is False) if os.path.isfile(path) else None
        if self._file is None and not folder.is_checkpoint(path):
            raise CheckpointError(
                f"{path} is not a checkpoint of this package ({_kind(path)}): pass the folder that contains "
                "manifest.json, or a Lightning .ckpt file; other formats are converted by `neuron-lightning convert`."
            )
        state = dict(folder.read_trainer_state(path) if self._file is None else self._file.trainer_state())
        if state.pop("step_done", False) and self._trainer().state.fn == TrainerFn.FITTING:
            internals_loops.keep_validation_done(self._trainer())
        if "loops" in state:
            internals_loops.rewind_unfinished_epoch(state["loops"]["fit_loop"])
        self._restored_from = path
        saved_facts = state.pop("facts", {})
        if self._trainer().state.fn == TrainerFn.FITTING:
            self._overridden = drift.check(saved_facts, self._facts, self._override)
        self._position = state.pop("data_position", None) or {}
        self._saved_batch = saved_facts.get("global_batch_size")
        self._take_rank_state(path, state)
        return {**state, "state_dict": {}}

    def _take_rank_state(self, path: str, state: dict[str, Any]) -> None:
        """Takes over what is this rank's: random states where the layout is the same, loaders' states by replica."""
        saved, present = state.pop("layout", None), layout()
        rank_state = folder.read_rank_state(path, self.global_rank) if saved == present else None
        self._rank_state = rank_state
        self._positions = (rank_state or {}).get("positions", ())
        loaders = (rank_state or {}).get("loaders", [])
        if rank_state is None and saved is not None:
            loaders = self._loaders_of_replica(path, saved)
        if "loops" in state:
            internals_loops.put_loader_states(state["loops"], loaders)

    def _loaders_of_replica(self, path: str, saved: Mapping[str, int]) -> list[Any]:
        """The loaders' states of the rank that read what this one reads, in a layout of other tensor-parallel size."""
        dp_size = mesh.current().sizes["dp"]
        stored = folder.read_rank_state(path, mesh.current().coordinates["dp"] * saved["tp"]) or {}
        loaders: list[Any] = stored.get("loaders", [])
        if loaders and saved["dp"] != dp_size and "data" not in self._override:
            raise DataError(
                f"the data loader's state in {path} is that of one of {saved['dp']} data-parallel rank(s), and this run "
                f"has {dp_size}: resume with as many, use a map-style dataset, or let the epoch start "
                "over with NeuronXLAStrategy(resume_override=['data'])."
            )
        return loaders if saved["dp"] == dp_size else []

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the folder's weights into this rank's shards, in place. All ranks together."""
        module = self.lightning_module
        if module is None or self._restored_from is None:
            raise CheckpointError("load_checkpoint must come before load_model_state_dict.")
        with show_transfer("Loading", self._restored_from) as progress:
            if self._file is not None:
                self._file.load_module(module, strict, progress)
            else:
                folder.load_module_state(
                    self._restored_from,
                    module.state_dict(),
                    dict(module.named_parameters()),
                    strict=strict,
                    verify=self._verified != self._restored_from,
                    progress=progress,
                )
        if isinstance(checkpoint, dict) and self._file is None:
            averages.put_back(
                self._restored_from, checkpoint, module, verify=self._verified != self._restored_from
            )
        for optimizer in self.optimizers:
            if hasattr(optimizer, "reload_master_weights"):
                optimizer.reload_master_weights()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the folder's optimizer state into this rank's shards. All ranks together."""
        module = self.lightning_module
        if module is None or self._restored_from is None:
            raise CheckpointError("load_checkpoint must come before load_optimizer_state_dict.")
        with show_transfer("Loading optimizer state of", self._restored_from) as progress:
            if self._file is not None:
                self._file.load_optimizers(self._stateful(), module, progress)
                return
            folder.load_optimizer_state(
                self._restored_from,
                self._stateful(),
                dict(module.named_parameters()),
                verify=self._verified != self._restored_from,
                progress=progress,
            )

    def _apply_overrides(self) -> None:
        """Lets the values of this run count where ``resume_override`` says so; once everything is loaded."""
        overridden, self._overridden = self._overridden, set()
        if overridden:
            drift.apply_override(self._trainer(), overridden, self._facts)

    def _restore_random_states(self) -> None:
        """Gives this rank its random states back, after everything that draws numbers while it is set up."""
        states, self._rank_state = self._rank_state, None
        if states is not None:
            random.setstate(states["python"])
            numpy.random.set_state(states["numpy"])
            set_rng_state(states["torch"])


def _kind(path: str) -> str:
    if "://" in path:
        return "nothing committed is there"
    return "a folder without a manifest" if os.path.exists(path) else "not there"
