"""Pyro's own NUTS, for a model that cannot run as a batch of chains.

A Python branch on the value of a latent (``if x > 0:``, ``.item()``) follows one chain at a time.
Such a model has a density and a gradient all the same, and Pyro's kernel needs no more.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.infer import NUTS
from torch import Tensor
from tqdm import tqdm

from ..unconstrained import UnconstrainedModel

__all__ = ["MAX_CHAINS", "NUTSDraws", "can_batch", "run_nuts"]

# Chains run one after the other, each about as long as hundreds at once.
MAX_CHAINS = 4


class NUTSDraws(NamedTuple):
    """What `run_nuts` returns.

    Attributes:
        position: Draws in unconstrained space [num_chains, num_samples, dim].
        potential: Their negative log densities [num_chains, num_samples].
        energy: The energy with which each transition began, potential and kinetic
            [num_chains, num_samples]; the E-BFMI compares these.
        accept_prob: Mean acceptance probability over the states of each trajectory
            [num_chains, num_samples].
        accepted: Whether the chain moved [num_chains, num_samples].
        diverging: Whether the trajectory ended by a divergence [num_chains, num_samples].
        num_steps: Number of leapfrog steps [num_chains, num_samples].
        step_size: The adapted step sizes [num_chains].
    """

    position: Tensor
    potential: Tensor
    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    diverging: Tensor
    num_steps: Tensor
    step_size: Tensor


def can_batch(density: UnconstrainedModel) -> str | None:
    """Return why a model cannot run as a batch of chains, or ``None`` if it can.

    Costs two evaluations of the model. Where it returns a reason, the density runs row by row from
    then on, without a warning of its own.

    Args:
        density: The model.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.factor("kink", -x if x > 0 else x)
        >>> can_batch(UnconstrainedModel(model))
        "RuntimeError: vmap: It looks like you're attempting to use a Tensor in some ...
    """
    return density.batching_error()


class _Recorder(NUTS):
    """Pyro's NUTS, with a note of what it keeps to itself."""

    def _sample_r(self, name: str) -> Any:
        r, unscaled = super()._sample_r(name)
        if name.startswith("r_t="):  # not where the step size is being looked for
            self.kinetic = float(self._kinetic_energy(unscaled))
            self.leapfrogs, self.accept_sum, self.diverged = 0, 0.0, False
        return r, unscaled

    def _build_basetree(self, *args: Any) -> Any:
        tree = super()._build_basetree(*args)
        self.leapfrogs += 1
        self.accept_sum += float(tree.sum_accept_probs)
        self.diverged |= bool(tree.diverging)
        return tree

    def step(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
        """Make a transition; return the state and its statistics, in the order of `NUTSDraws`."""
        start, before, _ = self._fetch_from_cache()
        state = self.sample(state)
        end, potential, _ = self._fetch_from_cache()
        return state, [
            float(potential),
            float(before) + self.kinetic,
            self.accept_sum / self.leapfrogs,
            float(end is not start),
            float(self.diverged),
            float(self.leapfrogs),
        ]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Run the block under a seed of its own, or under torch's generator as it is."""
    if seed is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def run_nuts(
    density: UnconstrainedModel,
    num_samples: int,
    warmup_steps: int,
    num_chains: int = MAX_CHAINS,
    *,
    reason: str,
    initial: Tensor | None = None,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    seed: int | None = None,
    progress: bool = False,
) -> NUTSDraws:
    """Sample a posterior by Pyro's NUTS, one chain after the other, and say so in a warning.

    Each chain adapts a step size and a diagonal metric of its own. An interrupt from the keyboard
    keeps the chains that are complete, or what there is of the first. Neither the parameter store
    nor the settings of torch and Pyro are changed.

    Args:
        density: The model.
        num_samples: Draws kept of each chain.
        warmup_steps: Iterations before them.
        num_chains: Number of chains asked for; at most 4 are run.
        reason: Why the chains do not run as a batch, as `can_batch` says it; part of the warning.
        initial: Starting points in unconstrained space [num_chains, dim], of which the first four
            are used; by default draws from the prior.
        target_accept: Acceptance probability that the step size is tuned to.
        max_tree_depth: How often a trajectory doubles at most.
        seed: Seed for this run alone; by default torch's global generator is used.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The draws and their statistics, of as many chains as were run.

    Raises:
        ValueError: If ``initial`` has another shape.
        KeyboardInterrupt: If it comes before the first draw.

    References:
        | The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo
          (Hoffman, Gelman, 2014)
        | https://arxiv.org/abs/1111.4246
    """
    chains = min(num_chains, MAX_CHAINS)
    if initial is not None and (initial.shape[1:] != (density.dim,) or len(initial) < chains):
        raise ValueError(
            f"initial: found shape {list(initial.shape)}; expected {[chains, density.dim]}"
        )
    warnings.warn(
        f"the chains cannot run as a batch; Pyro's NUTS runs {chains} of the {num_chains} chains, "
        f"one after the other, which is slow; the reason: {reason}",
        stacklevel=2,
    )
    positions: list[Tensor] = []
    stats: list[Tensor] = []
    step_sizes: list[float] = []
    interrupted = False
    with _seeded(seed), poutine.block(), torch.enable_grad():
        starts = density.initial(chains) if initial is None else initial[:chains].detach()
        with tqdm(total=chains * (warmup_steps + num_samples), disable=not progress) as bar:
            for start in starts:
                draws: list[tuple[Tensor, list[float]]] = []
                kernel = _Recorder(
                    potential_fn=lambda state: -density.log_density(state["z"]),
                    target_accept_prob=target_accept,
                    max_tree_depth=max_tree_depth,
                )
                try:
                    kernel.initial_params = state = {"z": start.clone()}
                    kernel.setup(warmup_steps)
                    for step in range(warmup_steps + num_samples):
                        state, found = kernel.step(state)
                        if step >= warmup_steps:
                            draws.append((state["z"].detach(), found))
                        bar.update()
                except KeyboardInterrupt:
                    interrupted = True
                    if not positions and not draws:
                        raise
                if len(draws) == num_samples or not positions:
                    positions.append(torch.stack([position for position, _ in draws]))
                    stats.append(torch.tensor([found for _, found in draws], dtype=torch.float64))
                    step_sizes.append(float(kernel.step_size))
                if interrupted:
                    break
    if interrupted:
        warnings.warn(
            f"interrupted: {len(positions)} of {chains} chains of {len(positions[0])} draws are "
            "kept",
            stacklevel=2,
        )
    position = torch.stack(positions)
    potential, energy, accept_prob, accepted, diverging, steps = torch.stack(stats).unbind(-1)
    return NUTSDraws(
        position=position,
        potential=potential.to(position),
        energy=energy.to(position),
        accept_prob=accept_prob.to(position),
        accepted=accepted.bool().to(position.device),
        diverging=diverging.bool().to(position.device),
        num_steps=steps.long().to(position.device),
        step_size=position.new_tensor(step_sizes),
    )
