"""Callbacks that know sharded, asynchronous checkpoints."""
