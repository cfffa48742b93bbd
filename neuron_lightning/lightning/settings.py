"""What the strategy was asked for: its arguments and ``nxd_config`` merged, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from neuron_lightning.config import NeuronConfig
from neuron_lightning.errors import ConfigError

STATE_DICT_TYPES = ("deduped", "sharded")


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """One consistent set of settings; equal on all ranks.

    Attributes:
        config: the configuration in force.
        max_grad_norm: norm that every step of a wrapped optimizer clips to; None unless ``nxd_config`` was given
            and clips (``Trainer(gradient_clip_val=…)`` takes its place in the steps where it clips).
        tp_plan: module-name pattern -> way of sharding, or None.
        state_dict_type: how checkpoints are cut.
        sync_module_states: whether all weights come from the first data-parallel rank.
    """

    config: NeuronConfig
    max_grad_norm: float | None
    tp_plan: Mapping[str, str] | None
    state_dict_type: str
    sync_module_states: bool

    @classmethod
    def resolve(
        cls,
        *,
        nxd_config: Mapping[str, Any] | None,
        sizes: Mapping[str, int],
        zero1: bool | None,
        sequence_parallel: bool | None,
        tp_plan: Mapping[str, str] | None,
        state_dict_type: str,
        sync_module_states: bool,
        later: Mapping[str, Any],
    ) -> StrategySettings:
        """Merges the strategy's arguments into ``nxd_config``.

        Args:
            nxd_config: NxD's configuration, if any.
            sizes: parallel sizes by NxD's names; 1 means "as nxd_config says".
            zero1: None means "as nxd_config says", as do the next two.
            sequence_parallel: see above.
            tp_plan: see above.
            state_dict_type: see :data:`STATE_DICT_TYPES`.
            sync_module_states: see the attribute.
            later: arguments that this release does not support, which must be None or False.

        Raises:
            ConfigError: a contradiction, an unknown value, or something that this release lacks.
        """
        _check_later(later)
        if state_dict_type not in STATE_DICT_TYPES:
            raise ConfigError(
                f"state_dict_type must be one of {', '.join(STATE_DICT_TYPES)}, not {state_dict_type!r}."
            )
        given = NeuronConfig.from_any(nxd_config)
        changes: dict[str, Any] = {}
        for name, size in sizes.items():
            changes[name] = _merged(name, None if size == 1 else size, given[name], nxd_config is not None)
        changes["sequence_parallel"] = _merged(
            "sequence_parallel", sequence_parallel, given.sequence_parallel, nxd_config is not None
        )
        optimizer = given.optimizer_config
        cut = _merged("zero1", zero1, optimizer.zero_one_enabled, nxd_config is not None)
        if cut != optimizer.zero_one_enabled:  # so there is no nxd_config, and "as ZeRO-1" is resolved anew
            changes["optimizer_config"] = replace(optimizer, zero_one_enabled=cut)
            changes["mixed_precision_config"] = {}
        return cls(
            config=replace(given, **changes),
            max_grad_norm=optimizer.clip_norm if nxd_config is not None else None,
            tp_plan=dict(tp_plan) if tp_plan is not None else None,
            state_dict_type=state_dict_type,
            sync_module_states=sync_module_states,
        )

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.config.tensor_parallel_size

    @property
    def zero1(self) -> bool:
        """Whether optimizer state is cut over the data-parallel ranks."""
        return self.config.optimizer_config.zero_one_enabled

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are cut along the sequence."""
        return self.config.sequence_parallel

    @property
    def master_weights(self) -> bool:
        """fp32 copies of narrower weights."""
        return bool(self.config.mixed_precision_config.use_master_weights)

    @property
    def fp32_grad_accumulation(self) -> bool:
        """fp32 gradients of narrower weights."""
        return bool(self.config.mixed_precision_config.use_fp32_grad_acc)

    def flat(self) -> dict[str, str]:
        """Every setting as text, to compare ranks."""
        return {
            **self.config.flat(),
            "max_grad_norm": repr(self.max_grad_norm),
            "tp_plan": repr(sorted((self.tp_plan or {}).items())),
            "state_dict_type": self.state_dict_type,
            "sync_module_states": repr(self.sync_module_states),
        }


def _merged(name: str, argument: Any, configured: Any, has_config: bool) -> Any:
    if argument is None:
        return configured
    if has_config and configured != argument:
        raise ConfigError(
            f"NeuronXLAStrategy was given {name}={argument!r}, but nxd_config says {configured!r}; "
            "say it in one place, or the same in both."
        )
    return argument


def _check_later(later: Mapping[str, Any]) -> None:
    for name, value in later.items():
        if value not in (None, False):
            raise ConfigError(
                f"{name}={value!r} is not supported by this release; leave it out"
                + {
                    "layout": " and give tensor_parallel_size yourself.",
                    "compile": " and compile inside configure_model if you must (torch.compile of a submodule).",
                }.get(name, ".")
            )
