"""The Neuron runtime's choice of cores, held against the number of ranks on a node. One rank drives one core.

``NEURON_RT_VISIBLE_CORES`` names cores, ``NEURON_RT_NUM_CORES`` counts them (0: all); the first beats the second.
Both are about a process: a launcher may set them for all ranks alike, or give every rank a core of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from neuron_lightning.errors import ConfigError

VISIBLE_CORES = "NEURON_RT_VISIBLE_CORES"
NUM_CORES = "NEURON_RT_NUM_CORES"
PROCESS_INDEX = "NEURON_PJRT_PROCESS_INDEX"
"""Set by torch_xla, together with ``NEURON_RT_VISIBLE_CORES``, when it leaves a process one of the cores."""

NUM_RANKS = "LOCAL_WORLD_SIZE"
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_RANK")


def parse_visible_cores(text: str) -> list[int]:
    """The cores that a value of ``NEURON_RT_VISIBLE_CORES`` names: ``4``, ``0-3`` or ``0,2,4-5``.

    Raises:
        ConfigError: another form, a range that runs backwards, or a core named twice.
    """
    cores: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ConfigError(
                f"{VISIBLE_CORES}={text!r} cannot be read at {part.strip()!r}: it must be core numbers and rising "
                "ranges of them with commas between, such as 4, 0-3 or 0,2,4-5; correct it, or unset it to use "
                "every core."
            )
        cores += range(first, last + 1)
    twice = sorted({core for core in cores if cores.count(core) > 1})
    if twice:
        raise ConfigError(
            f"{VISIBLE_CORES}={text!r} names core(s) {twice} more than once: a core belongs to one process; name "
            "each of them once."
        )
    return cores


def parse_num_cores(text: str) -> int:
    """The value of ``NEURON_RT_NUM_CORES``; 0 means all cores. Raises :class:`ConfigError` unless a whole number."""
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ConfigError(
            f"{NUM_CORES}={text!r} cannot be read: it must be a whole number of cores, 0 for all of them; correct "
            "it, or unset it."
        )
    return int(text)


def refusal(variables: Mapping[str, str], ranks: int | None, *, core_per_rank: bool) -> str | None:
    """Why this choice of cores does not fit ``ranks`` processes on this node; None where it does.

    Args:
        variables: environment variables.
        ranks: processes on this node; None where unknown: then only the form of the variables is judged.
        core_per_rank: whether a launcher may have given each rank a core of its own. torch-xla wants to be told
            all of a node's cores and divides them itself.

    Raises:
        ConfigError: a variable is malformed.
    """
    visible = parse_visible_cores(variables[VISIBLE_CORES]) if variables.get(VISIBLE_CORES) else []
    number = parse_num_cores(variables[NUM_CORES]) if variables.get(NUM_CORES) else 0
    if ranks is None:
        return None
    if visible:
        if len(visible) == ranks or _is_own(variables, visible, core_per_rank):
            return None
        return _message(f"{VISIBLE_CORES}={variables[VISIBLE_CORES]}", len(visible), ranks)
    if number in (0, 1, ranks):  # each process takes so many free ones
        return None
    return _message(f"{NUM_CORES}={variables[NUM_CORES]}", number, ranks)


def local_rank(variables: Mapping[str, str]) -> int | None:
    """The rank on this node as the launcher tells it; None in a process that nobody launched."""
    return next((int(variables[name]) for name in LOCAL_RANKS if name in variables), None)


def number_of_ranks(variables: Mapping[str, str]) -> int | None:
    """The ranks on this node as torchrun tells it; None elsewhere."""
    return int(variables[NUM_RANKS]) if NUM_RANKS in variables else None


def _is_own(variables: Mapping[str, str], visible: list[int], core_per_rank: bool) -> bool:
    """Whether the one visible core is this rank's alone, as far as one rank can tell.

    Ranks that were given a core each have them in rising order, so a core's number is not below its rank. A number
    that all ranks share, ``0`` above all, is below the rank of some, and those find out.
    """
    if len(visible) != 1:
        return False
    rank = local_rank(variables)
    return PROCESS_INDEX in variables or (core_per_rank and rank is not None and visible[0] >= rank)


def _message(setting: str, cores: int, ranks: int) -> str:
    wanted = f"0-{ranks - 1}" if ranks > 1 else "0"
    return (
        f"one rank drives one NeuronCore, but {ranks} rank(s) run on this node and {setting} leaves them {cores} "
        f"core(s): start {cores} rank(s) (torchrun --nproc-per-node {cores}), or set {VISIBLE_CORES} to {ranks} "
        f"core(s), such as {wanted} (unset, every core is visible)."
    )
