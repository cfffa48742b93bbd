"""Tensor-, sequence- and data-parallel building blocks on plain local tensors."""
