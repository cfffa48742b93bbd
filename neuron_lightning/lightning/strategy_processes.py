"""Which processes run, on which devices, and this rank's place among them."""

from __future__ import annotations

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy

from neuron_lightning.backends import get_backend, select_backend, use_backend
from neuron_lightning.backends.diagnose import check_environment
from neuron_lightning.errors import LaunchError
from neuron_lightning.lightning import failures, internals, launch
from neuron_lightning.lightning.accelerator import accelerator_for, backend_name
from neuron_lightning.lightning.settings import StrategySettings
from neuron_lightning.parallel import mesh


class ProcessesMixin(ParallelStrategy):
    """Launching, devices and ranks of the strategy."""

    settings: StrategySettings
    _num_nodes: int = 1
    _environment: ClusterEnvironment | None = None

    @property
    def is_distributed(self) -> bool:
        """True: Lightning then inserts samplers and honours ``sync_dist``."""
        return True

    @property
    def num_nodes(self) -> int:
        """Machines; follows the launcher."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices or ())

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Where ranks and addresses come from. The launcher decides unless the user passed a plugin."""
        if self._environment is None:
            arguments = internals.trainer_arguments()
            if arguments is not None and not arguments.environment_given:
                self._environment = launch.environment_for(launch.detect())
        return self._environment

    @cluster_environment.setter
    def cluster_environment(self, environment: ClusterEnvironment | None) -> None:
        self._environment = environment

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        devices = self.parallel_devices
        if not devices:
            return get_backend().device(0)
        return devices[self.local_rank]

    def set_world_ranks(self) -> None:
        """Settles backend, devices and number of processes from what the Trainer and the launcher say.

        Raises:
            ConfigError: an accelerator that contradicts ``NEURON_LIGHTNING_BACKEND`` or has no device.
            LaunchError: the Trainer contradicts the launcher, or tp does not divide the world.
        """
        arguments = internals.trainer_arguments()
        if arguments is not None:
            self._settle_processes(arguments)
        environment = self.cluster_environment
        if environment is not None:
            environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            environment.set_world_size(self.num_nodes * self.num_processes)
        setattr(rank_zero_only, "rank", self.global_rank)  # noqa: B010 - an attribute of a function
        failures.install(self.global_rank)
        self._check_world()

    def _settle_processes(self, arguments: internals.TrainerArguments) -> None:
        requested = backend_name(arguments.accelerator)
        use_backend(*select_backend(requested))
        backend = get_backend()
        if arguments.accelerator == "auto":
            self.accelerator = accelerator_for(backend)
        settled = launch.settle(launch.detect(), arguments.devices, arguments.num_nodes, backend)
        check_environment(backend.name, len(settled.device_indices), requested=requested is not None)
        self.parallel_devices = [backend.device(index) for index in settled.device_indices]
        self._num_nodes = settled.num_nodes
        if arguments.trainer is not None:
            self._extend_entries(arguments.trainer)

    def _extend_entries(self, trainer: Trainer) -> None:
        """Called with the Trainer while it is under construction; others of the strategy's parts have more to add."""
        internals.before_entry(trainer, lambda: None)

    def _check_world(self) -> None:
        tp, world = self.settings.tp, self.world_size
        if world % tp:
            raise LaunchError(
                f"world size {world} is not divisible by tensor_parallel_size {tp}: the ranks form whole "
                f"tensor-parallel groups; start a multiple of {tp} ranks (torchrun --nproc-per-node {tp}), or choose "
                f"a tensor_parallel_size from {[d for d in range(1, world + 1) if world % d == 0]}."
            )

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        if environment is not None and self.num_processes * self.num_nodes > 1:
            self._launcher = internals.script_launcher(environment, self.num_processes, self.num_nodes)

    # -- this rank's place -----------------------------------------------------------------------------

    @property
    def data_parallel_rank(self) -> int:
        """Position among the data-parallel replicas."""
        return mesh.current().coordinates["dp"]

    @property
    def data_parallel_size(self) -> int:
        """Number of data-parallel replicas."""
        return mesh.current().sizes["dp"]

    @property
    def tensor_parallel_rank(self) -> int:
        """Position in the tensor-parallel group."""
        return mesh.current().coordinates["tp"]

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks of a tensor-parallel group."""
        return self.settings.tp

    @property
    def pipeline_parallel_rank(self) -> int:
        """Pipeline stage."""
        return mesh.current().coordinates["pp"]

    @property
    def pipeline_parallel_size(self) -> int:
        """Number of pipeline stages."""
        return mesh.current().sizes["pp"]
