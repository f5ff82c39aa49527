"""Markov chain Monte Carlo: many chains as one batch of tensors, and the checks of its draws."""

from .checks import (
    Check,
    ConvergenceError,
    Verdict,
    check_bfmi,
    check_chains,
    check_divergences,
    check_ess,
    check_mcmc,
    check_nested_r_hat,
    check_r_hat,
)
from .diagnostics import (
    bfmi,
    effective_sample_size,
    nested_r_hat,
    rank_normalize,
    running_r_hat,
    split_r_hat,
    to_inference_data,
)
from .hmc import HMC
from .warmup import WarmupState

__all__ = [
    "HMC",
    "Check",
    "ConvergenceError",
    "Verdict",
    "WarmupState",
    "bfmi",
    "check_bfmi",
    "check_chains",
    "check_divergences",
    "check_ess",
    "check_mcmc",
    "check_nested_r_hat",
    "check_r_hat",
    "effective_sample_size",
    "nested_r_hat",
    "rank_normalize",
    "running_r_hat",
    "split_r_hat",
    "to_inference_data",
]
