"""Checkpoints of other tools, and ours, as one thing: tensors by canonical name that are read slice by slice."""
