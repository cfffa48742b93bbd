"""Every error that this package raises on purpose.

A message states the rule, the actual numbers and the remedy. All of them derive from
:class:`NeuronLightningError`, so a job script can tell "you must change something" from a bug.
"""

from __future__ import annotations


class NeuronLightningError(Exception):
    """Base of all errors raised on purpose by neuron_lightning."""


class ConfigError(NeuronLightningError, ValueError):
    """A setting is unknown, of the wrong type, or cannot work together with another one."""


class ParallelStateError(NeuronLightningError, RuntimeError):
    """The parallel layout was used before it exists, built twice, or asked for a group that it lacks."""


class DataError(NeuronLightningError, ValueError):
    """Training data is missing, empty, malformed, or contains ids outside the vocabulary."""


class CheckpointError(NeuronLightningError, RuntimeError):
    """A checkpoint cannot be written, read, or does not fit the model that loads it."""


class OptimizerError(NeuronLightningError, ValueError):
    """An optimizer cannot work on sharded state, or was used outside its contract."""


class LaunchError(NeuronLightningError, RuntimeError):
    """The processes that exist contradict what the Trainer was asked for."""


class RecompileError(NeuronLightningError, RuntimeError):
    """Training compiled more graphs than it was allowed to."""
