"""Markov chain Monte Carlo: many chains as one batch of tensors, and their diagnostics."""

from .diagnostics import effective_sample_size, nested_r_hat, split_r_hat, to_inference_data
from .hmc import HMC

__all__ = ["HMC", "effective_sample_size", "nested_r_hat", "split_r_hat", "to_inference_data"]
