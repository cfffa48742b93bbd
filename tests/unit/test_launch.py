"""What a process reads about its launch from the environment, and how that meets the Trainer's arguments."""

from __future__ import annotations

import pytest

from neuron_lightning.backends.native import NativeBackend
from neuron_lightning.errors import LaunchError
from neuron_lightning.lightning import launch

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "2000",
}
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "123456",
    "SLURM_NODELIST": "node[3-4]",
}
CPU = NativeBackend("cpu")


class Devices(NativeBackend):
    """A CUDA backend with a known number of devices."""

    def __init__(self, count):
        super().__init__("cuda")
        self._count = count

    def device_count(self):
        return self._count


def test_plain_python_is_no_launch():
    assert launch.detect({}) is None
    assert launch.detect({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}) is None


def test_torchrun():
    found = launch.detect(TORCHRUN)
    assert found.launcher == "torchrun"
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (3, 1, 4, 2)
    assert (found.node_rank, found.num_nodes) == (1, 2)


@pytest.mark.parametrize(
    "tasks", [{"SLURM_NTASKS_PER_NODE": "2"}, {"SLURM_TASKS_PER_NODE": "2(x2)"}, {}], ids=str
)
def test_slurm_with_and_without_tasks_per_node(tasks):
    found = launch.detect({**SLURM, **tasks})
    assert (found.launcher, found.rank, found.local_rank, found.node_rank) == ("SLURM", 3, 1, 1)
    assert (found.world_size, found.local_world_size, found.num_nodes) == (4, 2, 2)
    assert (found.main_address, found.main_port) == ("node3", 15000 + 3456)


def test_slurm_interactive_shell_is_no_launch():
    assert launch.detect({**SLURM, "SLURM_JOB_NAME": "bash"}) is None


def test_kubeflow_runs_one_process_per_pod():
    found = launch.detect({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "pod0", "MASTER_PORT": "23456"})
    assert (found.local_rank, found.local_world_size, found.num_nodes, found.node_rank) == (0, 1, 3, 2)


def test_open_mpi_and_lsf():
    mpi = {
        f"OMPI_COMM_WORLD_{k}": v
        for k, v in [("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")]
    }
    assert launch.detect(mpi).main_address == "127.0.0.1"
    lsf = {
        "LSB_JOBID": "7",
        "JSM_NAMESPACE_RANK": "1",
        "JSM_NAMESPACE_SIZE": "2",
        "JSM_NAMESPACE_LOCAL_RANK": "1",
    }
    assert launch.detect(lsf).launcher == "LSF"


def test_open_mpi_on_several_nodes_needs_an_address():
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    found = launch.detect({**mpi, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        _ = launch.environment_for(found).main_address


def test_torchrun_keeps_lightnings_environment_and_others_get_ours():
    assert launch.environment_for(launch.detect(TORCHRUN)) is None
    environment = launch.environment_for(launch.detect(SLURM))
    assert (environment.global_rank(), environment.local_rank(), environment.world_size()) == (3, 1, 4)
    assert environment.creates_processes_externally


@pytest.mark.parametrize("devices", ["auto", -1, "-1", 2, "2", [0, 1], "0,1"])
def test_devices_that_agree_follow_the_launcher(devices):
    settled = launch.settle(launch.detect(TORCHRUN), devices, 1, CPU)
    assert (settled.device_indices, settled.num_nodes, settled.world_size) == ((0, 1), 2, 4)


@pytest.mark.parametrize("devices", [1, 4, [0], "3"])
def test_devices_that_contradict_the_launcher(devices):
    with pytest.raises(LaunchError, match=r"asks for \d process.*torchrun started 2 on this node"):
        launch.settle(launch.detect(TORCHRUN), devices, 1, CPU)


def test_num_nodes_that_contradicts_the_launcher():
    with pytest.raises(LaunchError, match=r"num_nodes=3.*4 processes on 2 node"):
        launch.settle(launch.detect(TORCHRUN), "auto", 3, CPU)


def test_uneven_nodes():
    with pytest.raises(LaunchError, match="do not divide"):
        launch.settle(launch.detect({**TORCHRUN, "WORLD_SIZE": "5"}), "auto", 1, CPU)


def test_plain_python_takes_what_the_trainer_says():
    assert launch.settle(None, 3, 2, CPU).world_size == 6
    assert launch.settle(None, "auto", 1, CPU).device_indices == (0,)
    assert launch.settle(None, "auto", 1, Devices(4)).device_indices == (0, 1, 2, 3)
    assert launch.settle(None, [2, 3], 1, Devices(4)).device_indices == (2, 3)


def test_processes_and_visible_devices():
    found = launch.detect(TORCHRUN)
    assert launch.settle(found, "auto", 1, Devices(8)).device_indices == (0, 1)
    assert launch.settle(found, "auto", 1, Devices(1)).device_indices == (0, 0)
    many = launch.detect({**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(LaunchError, match=r"4 processes run on this node, but cuda shows 2"):
        launch.settle(many, "auto", 1, Devices(2))
