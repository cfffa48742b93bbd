"""Who started these processes, how many there are, and how that fits what the Trainer was asked for.

torchrun is the way; an explicit ``RANK``/``WORLD_SIZE`` environment (Kubeflow, hand-made), Open MPI, SLURM and
LSF work without it; a plain ``python`` run with ``Trainer(devices=N)`` starts its own ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from neuron_lightning.backends import Backend
from neuron_lightning.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes as their launcher describes them in this process' environment.

    Attributes:
        launcher: name for messages.
        rank: global rank.
        local_rank: rank on this node.
        world_size: processes in all.
        local_world_size: processes on this node.
        node_rank: index of this node.
        main_address: host of rank 0, where the launcher says so.
        main_port: port of rank 0, where the launcher says so.
    """

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    main_address: str | None = None
    main_port: int | None = None

    @property
    def num_nodes(self) -> int:
        """``world_size / local_world_size``; raises :class:`LaunchError` if that is not whole."""
        nodes, rest = divmod(self.world_size, self.local_world_size)
        if rest or not nodes:
            raise LaunchError(
                f"{self.launcher}: {self.world_size} processes do not divide over nodes of "
                f"{self.local_world_size}; every node must run the same number of processes."
            )
        return nodes


def detect(env: Mapping[str, str] | None = None) -> Launch | None:
    """The external launch that this process is part of; None for a plain ``python`` run.

    Order: torchrun, explicit ``RANK``/``WORLD_SIZE``, Open MPI, SLURM (``srun``), LSF (``jsrun``).
    """
    env = os.environ if env is None else env
    for found in (_torchrun, _explicit, _open_mpi, _slurm, _lsf):
        launch = found(env)
        if launch is not None:
            return launch
    return None


def global_seed() -> int | None:
    """The seed that ``lightning.seed_everything`` was given, in this process or in the one that started it."""
    return _int(os.environ.get("PL_GLOBAL_SEED"))


def _torchrun(env: Mapping[str, str]) -> Launch | None:
    return _from_rank_variables("torchrun", env) if "TORCHELASTIC_RUN_ID" in env else None


def _explicit(env: Mapping[str, str]) -> Launch | None:
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    return _from_rank_variables("the RANK and WORLD_SIZE environment", env)


def _from_rank_variables(launcher: str, env: Mapping[str, str]) -> Launch:
    world = int(env["WORLD_SIZE"])
    # Kubeflow's PyTorchJob sets no local variables: one process per pod.
    local = int(env.get("LOCAL_WORLD_SIZE", world if "LOCAL_RANK" in env else 1))
    rank = int(env["RANK"])
    return Launch(
        launcher=launcher,
        rank=rank,
        local_rank=int(env.get("LOCAL_RANK", 0)),
        world_size=world,
        local_world_size=local,
        node_rank=int(env.get("GROUP_RANK", rank // local)),
        main_address=env.get("MASTER_ADDR"),
        main_port=_int(env.get("MASTER_PORT")),
    )


def _open_mpi(env: Mapping[str, str]) -> Launch | None:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    if not all(name in env for name in names):
        return None
    rank, world, local_rank, local = (int(env[name]) for name in names)
    address = env.get("MASTER_ADDR", "127.0.0.1" if local == world else None)
    return Launch(
        launcher="Open MPI",
        rank=rank,
        local_rank=local_rank,
        world_size=world,
        local_world_size=local,
        node_rank=rank // local,
        main_address=address,
        main_port=_int(env.get("MASTER_PORT")) or 12910,
    )


def _slurm(env: Mapping[str, str]) -> Launch | None:
    interactive = env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if interactive or not all(n in env for n in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")):
        return None
    rank, world, local = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), _slurm_tasks_per_node(env)
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = SLURMEnvironment.resolve_root_node_address(nodes) if nodes else "127.0.0.1"
    port = _int(env.get("MASTER_PORT")) or 15000 + int(env.get("SLURM_JOB_ID", "0")[-4:])
    return Launch(
        launcher="SLURM",
        rank=rank,
        local_rank=int(env["SLURM_LOCALID"]),
        world_size=world,
        local_world_size=local,
        node_rank=int(env.get("SLURM_NODEID", rank // local)),
        main_address=env.get("MASTER_ADDR", address),
        main_port=port,
    )


def _slurm_tasks_per_node(env: Mapping[str, str]) -> int:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        # "2", "2(x3)" or "2,1": SLURM's list of tasks by node; the first node's count is what all must have.
        if name in env:
            return int(env[name].split(",")[0].split("(")[0])
    return int(env["SLURM_NTASKS"]) // int(env.get("SLURM_NNODES", "1"))


def _lsf(env: Mapping[str, str]) -> Launch | None:
    names = [f"JSM_NAMESPACE_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK")]
    if "LSB_JOBID" not in env or not all(name in env for name in names):
        return None
    rank, world, local_rank = (int(env[name]) for name in names)
    local = int(env.get("JSM_NAMESPACE_LOCAL_SIZE", world))
    return Launch(
        launcher="LSF",
        rank=rank,
        local_rank=local_rank,
        world_size=world,
        local_world_size=local,
        node_rank=rank // local,
    )


def _int(text: str | None) -> int | None:
    return None if text is None else int(text)


class LaunchedEnvironment(ClusterEnvironment):
    """Lightning's view of a :class:`Launch`.

    Stands in where Lightning has no environment (Kubeflow without a plugin, Open MPI without mpi4py) or one
    that refuses what works (SLURM with ``--ntasks`` alone). SLURM's automatic requeue saves from inside a
    signal handler; who wants it passes ``plugins=[SLURMEnvironment(auto_requeue=True)]``.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    @property
    def creates_processes_externally(self) -> bool:
        """True: the launcher made all processes."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0. Raises :class:`LaunchError` if nobody named it."""
        if self._launch.main_address is None:
            raise LaunchError(
                f"{self._launch.launcher} runs {self._launch.world_size} processes on several nodes and does not "
                "say where rank 0 is: set MASTER_ADDR (and MASTER_PORT) in the job's environment."
            )
        return self._launch.main_address

    @property
    def main_port(self) -> int:
        """Port of rank 0's store."""
        return self._launch.main_port or 12910

    @staticmethod
    def detect() -> bool:
        """Whether this process was launched from outside."""
        return detect() is not None

    def world_size(self) -> int:
        """Processes in all."""
        return self._launch.world_size

    def set_world_size(self, size: int) -> None:
        """Checks that Lightning computed what the launcher said."""
        self._check("world size", size, self._launch.world_size)

    def global_rank(self) -> int:
        """Rank among all processes."""
        return self._launch.rank

    def set_global_rank(self, rank: int) -> None:
        """Checks nothing: ranks come from the launcher, whichever order it gave them."""

    def local_rank(self) -> int:
        """Rank on this node."""
        return self._launch.local_rank

    def node_rank(self) -> int:
        """Index of this node."""
        return self._launch.node_rank

    def _check(self, what: str, computed: int, launched: int) -> None:
        if computed != launched:
            raise LaunchError(
                f"{self._launch.launcher} gave {what} {launched}, but the Trainer means {computed}."
            )


def environment_for(launch: Launch | None) -> ClusterEnvironment | None:
    """The environment to use instead of Lightning's choice; None where Lightning's own is right."""
    if launch is None or launch.launcher in ("torchrun", "LSF"):
        return None
    return LaunchedEnvironment(launch)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many processes run, and on which devices of this node."""

    device_indices: tuple[int, ...]
    num_nodes: int

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return len(self.device_indices) * self.num_nodes


def settle(launch: Launch | None, devices: Any, num_nodes: int, backend: Backend) -> Processes:
    """Reconciles ``Trainer(devices=, num_nodes=)`` with the processes that exist.

    Args:
        launch: the external launch, if any.
        devices: as the user gave it; ``"auto"`` and -1 mean "not given".
        num_nodes: as the user gave it; 1 means "not given".
        backend: whose devices are used.

    Raises:
        LaunchError: the two contradict, or there are fewer devices than processes on this node.
    """
    indices = _given_indices(devices)
    if launch is None:
        count = max(1, backend.device_count())
        return Processes(device_indices=indices or tuple(range(count)), num_nodes=num_nodes)
    local = launch.local_world_size
    if indices is not None and len(indices) != local:
        raise LaunchError(
            f"Trainer(devices={devices!r}) asks for {len(indices)} process(es) per node, but {launch.launcher} "
            f"started {local} on this node; drop devices= (it follows the launcher) or start {len(indices)}."
        )
    if num_nodes not in (1, launch.num_nodes):
        raise LaunchError(
            f"Trainer(num_nodes={num_nodes}) contradicts {launch.launcher}, which started {launch.world_size} "
            f"processes on {launch.num_nodes} node(s) of {local}; drop num_nodes= or start {num_nodes} node(s)."
        )
    return Processes(device_indices=indices or _visible_indices(local, backend), num_nodes=launch.num_nodes)


def _visible_indices(local: int, backend: Backend) -> tuple[int, ...]:
    count = backend.device_count()
    if backend.name == "cpu" or count >= local:
        return tuple(range(local))
    if count == 1:  # the scheduler shows every process its own device only
        return (0,) * local
    raise LaunchError(
        f"{local} processes run on this node, but {backend.name} shows {count} device(s): start at most "
        "one process per device."
    )


def _given_indices(devices: Any) -> tuple[int, ...] | None:
    """Device indices from ``Trainer(devices=)``; None if it leaves the number open."""
    if isinstance(devices, str):
        text = devices.strip()
        if text in ("auto", "-1"):
            return None
        parts = [int(part) for part in text.split(",") if part.strip()]
        return tuple(parts) if "," in text else tuple(range(parts[0]))
    if isinstance(devices, Sequence):
        return tuple(int(index) for index in devices)
    return None if devices is None or devices == -1 else tuple(range(int(devices)))
