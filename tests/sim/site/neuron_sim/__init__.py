"""A simulated `neuron` device, process-group backend and compiler, for tests: nothing here computes on hardware.

PyTorch finds it as it finds the real one, by the entry points beside this package, in a process that has this
folder's parent on its path and nowhere else. ``python -m tests.sim`` compiles it, and runs tests on it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from neuron_sim import binary

_C = binary.load()


def autoload() -> None:
    """Called by PyTorch when it is imported."""
    from neuron_sim import device_module, lowering

    torch.utils.rename_privateuse1_backend("neuron")
    torch._register_device_module("neuron", device_module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    dist.Backend.register_backend("neuron", _process_group, extended_api=True, devices=["neuron"])
    torch._C._distributed_c10d.Backend.options = _OWN_OPTIONS  # asked for when a group is split
    _C.set_unlowered(list(lowering.WITHOUT))


class _Own:
    """Stands for a backend's own options, where they need not leave C++; a copy of them is none given."""

    def __deepcopy__(self, memo: object) -> None:
        return None


_OWN_OPTIONS = _Own()


def _process_group(options: object, _: object) -> dist.Backend:
    gloo = dist.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, timeout=options.timeout
    )
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    gloo.options.global_ranks_in_group, gloo.options.group_name = (
        ranks,
        options.group_id,
    )  # read when it is split
    return _C.wrap_gloo(gloo, ranks)
