"""What a run must have in common with the one that wrote the checkpoint it goes on from.

A checkpoint notes what shapes the course of training. A resumed run in which something of it differs is refused with
key, old and new value, unless ``NeuronXLAStrategy(resume_override=…)`` names the key; then the new value counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.launch import global_seed

NEVER = ("vocab_size", "scheduler.*.class")
"""Keys that no override lets through: what is stored would be of another meaning."""

_MAY_DIFFER = (
    "batch_size",
    "num_workers",
    "max_steps",
    "max_epochs",
    "devices",
    "num_nodes",
    "log",
    "save",
    "checkpoint",
    "rank",
)
"""Parts of hyper-parameter names that say where and how long, not what."""
_COMPUTE = ("params", "fused", "foreach", "capturable", "differentiable")
_SAMPLED_STEPS = (1, 10, 100, 1_000, 10_000, 100_000)
_MOVING = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_is_initial",
    "_get_lr_called_within_step",
    "best",
    "num_bad_epochs",
)
"""State of schedulers that changes while they run."""


def facts(trainer: Trainer, vocab_size: int | None) -> dict[str, Any]:
    """What a checkpoint notes, by key; plain values. Taken once optimizers and schedulers exist and before they run."""
    noted: dict[str, Any] = {
        "seed": global_seed(),
        "vocab_size": vocab_size,
        "precision": str(trainer.precision),
        "gradient_clip_val": _plain(trainer.gradient_clip_val),
    }
    for owner, name in ((trainer.lightning_module, "hparams"), (_datamodule(trainer), "data.hparams")):
        hparams: Mapping[str, Any] = getattr(owner, "hparams", {})
        noted.update(
            {
                f"{name}.{key}": value
                for key, value in hparams.items()
                if isinstance(value, (bool, int, float)) and not any(part in str(key) for part in _MAY_DIFFER)
            }
        )
    for name in ("seq_len", "seed"):
        if isinstance(value := getattr(_datamodule(trainer), name, None), int):
            noted[f"data.{name}"] = value
    for index, optimizer in enumerate(trainer.optimizers):
        noted.update(_optimizer_facts(index, optimizer))
    for index, config in enumerate(trainer.lr_scheduler_configs):
        noted.update(_scheduler_facts(index, config.scheduler))
    return {key: value for key, value in noted.items() if value is not None}


def check(saved: Mapping[str, Any], present: Mapping[str, Any], override: Sequence[str]) -> set[str]:
    """Compares a checkpoint's facts with this run's; returns the keys that differ and are overridden.

    A key that only one of them knows is let through: a newer version of this package, or of the module, notes more.

    Raises:
        ConfigError: for all ranks alike: a key differs and is not overridden, or never can be; or an override that
            is no key at all.
    """
    different = {key for key in saved.keys() & present.keys() if saved[key] != present[key]}
    allowed = {key for key in different if _matches(key, override)}
    refused = sorted(key for key in different if key not in allowed or _is_fixed(key))
    if refused:
        lines = "\n  ".join(
            f"{key}: {saved[key]!r} in the checkpoint, {present[key]!r} now" for key in refused
        )
        free = [key for key in refused if not _is_fixed(key)]
        remedy = (
            f", or let the new values count with NeuronXLAStrategy(resume_override={sorted({_short(k) for k in free})!r})"
            if free
            else ""
        )
        raise ConfigError(
            "this run is configured otherwise than the one that wrote the checkpoint:\n  "
            f"{lines}\nResume with the values of the checkpoint{remedy}."
        )
    for key in sorted(allowed):
        rank_zero_info(
            f"resume_override: {key} is {present[key]!r} from now on ({saved[key]!r} in the checkpoint)."
        )
    return allowed


def check_override(override: Sequence[str]) -> tuple[str, ...]:
    """The patterns of ``resume_override``. Raises :class:`ConfigError` for what cannot be one."""
    if isinstance(override, str) or not all(isinstance(one, str) and one for one in override):
        raise ConfigError(
            f"resume_override must be a list of keys such as ['lr', 'hparams.dropout'], not {override!r}."
        )
    if "vocab_size" in override:
        raise ConfigError(
            "resume_override cannot let vocab_size through: the stored weights are of another shape or meaning; load the "
            "weights alone (neuron_lightning.load_from_checkpoint), or convert the checkpoint."
        )
    return tuple(override)


def apply_override(trainer: Trainer, allowed: set[str], fresh: Mapping[str, Any]) -> None:
    """Gives optimizers and schedulers the values of this run back where they were overridden.

    A learning rate that a schedule has moved keeps its place in the schedule: it is scaled by new over old start.

    Args:
        trainer: its optimizers and schedulers have just been loaded.
        allowed: overridden keys that differ, from :func:`check`.
        fresh: facts of this run, from before loading.
    """
    for index, optimizer in enumerate(trainer.optimizers):
        for number, group in enumerate(optimizer.param_groups):
            for key in group.keys() - set(_COMPUTE):
                name = f"optimizer.{index}.{number}.{key}"
                if name in allowed and key != "lr":
                    old, group[key] = group[key], _like(group[key], fresh[name])
                    if key == "initial_lr" and old:
                        group["lr"] *= fresh[name] / old
                elif name in allowed and "initial_lr" not in group:
                    group[key] = fresh[name]
    for index, config in enumerate(trainer.lr_scheduler_configs):
        state = config.scheduler.state_dict()
        changed = {
            key: fresh[f"scheduler.{index}.{key}"] for key in state if f"scheduler.{index}.{key}" in allowed
        }
        if changed:
            config.scheduler.load_state_dict({**state, **changed})


def _like(old: Any, new: Any) -> Any:
    """``new`` as a tuple where the old value is one (Adam's betas)."""
    return tuple(new) if isinstance(old, tuple) else new


def group_options(optimizer: Any) -> list[dict[str, Any]]:
    """The hyper-parameters of an optimizer's groups."""
    return [
        {key: value for key, value in group.items() if key not in _COMPUTE}
        for group in optimizer.param_groups
    ]


def _optimizer_facts(index: int, optimizer: Any) -> dict[str, Any]:
    noted: dict[str, Any] = {}
    for number, options in enumerate(group_options(optimizer)):
        for key, value in options.items():
            if (plain := _plain(value)) is not None:
                noted[f"optimizer.{index}.{number}.{key}"] = plain
    return noted


def _scheduler_facts(index: int | str, scheduler: Any) -> dict[str, Any]:
    noted: dict[str, Any] = {f"scheduler.{index}.class": type(scheduler).__qualname__}
    for key, value in scheduler.state_dict().items():
        if key not in _MOVING and (plain := _plain(value)) is not None:
            noted[f"scheduler.{index}.{key}"] = plain
    for number, function in enumerate(getattr(scheduler, "lr_lambdas", ())):
        if values := _values(function):
            noted[f"scheduler.{index}.lambda{number}"] = values
    for number, part in enumerate(getattr(scheduler, "_schedulers", ())):
        noted.update(_scheduler_facts(f"{index}.{number}", part))
    return noted


def _values(function: Callable[[int], Any]) -> list[float]:
    """What a schedule that is a function gives at some steps; none if it cannot be asked for them."""
    try:
        return [float(function(step)) for step in _SAMPLED_STEPS]
    except (ArithmeticError, ValueError, TypeError, LookupError):
        return []


def _plain(value: Any) -> Any:
    """Numbers, names and sequences of them, in the form in which they come back from a checkpoint; else None."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(one, (bool, int, float, str)) for one in value):
        return list(value)
    return None


def _matches(key: str, patterns: Sequence[str]) -> bool:
    """A pattern is a whole key (with ``*``), its first or last part, or ``lr`` for all learning rates."""
    parts = key.split(".")
    names = {parts[0], parts[-1]}
    if parts[0] in ("optimizer", "scheduler") and any(word in ("lr", "lrs") for word in parts[-1].split("_")):
        names.add("lr")
    return any(fnmatchcase(key, p) or p in names for p in patterns)


def _short(key: str) -> str:
    parts = key.split(".")
    if _matches(key, ["lr"]):
        return "lr"
    return parts[-1] if parts[0] == "optimizer" else parts[0] if parts[0] == "scheduler" else key


def _is_fixed(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in NEVER)


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
