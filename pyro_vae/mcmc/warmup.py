"""The warm-up of HMC as a state that can be saved, and a function that takes it one step on."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adaptation import (
    QUARTER_PERIOD,
    Adaptation,
    DualAveraging,
    PooledMoments,
    TrajectoryLength,
    adapt,
    jittered,
    num_leapfrog_steps,
)
from .kernel import HMCInfo, HMCKernel, HMCState, Metric, hmc_step, kinetic_energy, normal_like

__all__ = ["Schedule", "WarmupState", "find_step_size", "start", "warm_up"]


class Schedule(NamedTuple):
    """What the user chose about the warm-up.

    Attributes:
        warmup_steps: Its length.
        target_accept: Acceptance probability that the step size is tuned to.
        trajectory_length: A fixed length, or ``None`` where it is tuned.
        jitter: Half the width of the interval of lengths, as a fraction of the length.
        max_leapfrog_steps: Largest number of leapfrog steps in an iteration.
    """

    warmup_steps: int
    target_accept: float
    trajectory_length: float | None
    jitter: float
    max_leapfrog_steps: int

    def num_steps(self, length: float, step_size: float, index: int) -> int:
        """Return the number of leapfrog steps in an iteration."""
        return num_leapfrog_steps(length, step_size, self.jitter, self.max_leapfrog_steps, index)


class WarmupState(NamedTuple):
    r"""Where the chains are and what the warm-up has learnt: all that sampling starts from.

    Attributes:
        chains: Where the chains are.
        adaptation: What was learnt so far.
        sites: Shapes of the model's latent sites in unconstrained space, by name.
        num_superchains: Number of distinct starting points of the chains.
        generator_state: State of the warm-up's random number generator, so that an interrupted
            warm-up goes on as if nothing had happened.
        stream: Which random numbers sampling uses, so that a run that goes on where another ended
            does not use the same again.
    """

    chains: HMCState
    adaptation: Adaptation
    sites: dict[str, list[int]]
    num_superchains: int
    generator_state: Tensor
    stream: int = 1

    def save(self, path: str | Path) -> None:
        """Write the state to a file, to be read by `load`."""
        torch.save(_unpack(self), path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "WarmupState":
        """Read a state that was saved; no code in the file is run.

        Args:
            path: The file.
            device: Where the chains shall be.
        """
        data = torch.load(path, map_location=device, weights_only=True)
        adaptation = data["adaptation"]
        return cls(
            chains=HMCState(**data["chains"]),
            adaptation=Adaptation(
                step=adaptation["step"],
                step_size=DualAveraging(**adaptation["step_size"]),
                length=TrajectoryLength(**adaptation["length"]),
                metric=Metric(**adaptation["metric"]),
                moments=PooledMoments(**adaptation["moments"]),
                factor=adaptation["factor"],
                diverged=adaptation["diverged"],
                made=adaptation["made"],
            ),
            sites=data["sites"],
            num_superchains=data["num_superchains"],
            generator_state=data["generator_state"].cpu(),
            stream=data["stream"],
        )


def _unpack(value: Any) -> Any:
    """Turn named tuples into dicts, which load without running code."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _unpack(part) for name, part in value._asdict().items()}
    return value


def find_step_size(
    kernel: HMCKernel,
    chains: HMCState,
    metric: Metric,
    target_accept: float,
    generator: torch.Generator,
) -> float:
    """Double or halve the step size until one leapfrog step crosses the target acceptance.

    Raises:
        ValueError: If no step size does.
    """
    step_size, direction = 1.0, 0
    like = chains.position
    while 1e-10 < step_size < 1e10:
        noise = normal_like(like, generator)
        momentum, before = kernel.begin(chains.potential, noise, *metric)
        sizes = like.new_full((len(like), 1), step_size)
        end, momentum = kernel.integrate(chains, momentum, sizes, metric, 1)
        error = end.potential + kinetic_energy(momentum, metric.inverse_mass) - before
        accept = torch.exp(-error.clamp(min=0)).nan_to_num(nan=0.0)
        turn = 1 if float(accept.mean()) > target_accept else -1
        if direction not in (0, turn):
            return step_size
        direction = turn
        step_size *= 2.0**turn
    raise ValueError(
        f"no step size has an acceptance near {target_accept}: found {step_size:.0e} still too "
        + ("small" if direction > 0 else "large")
        + "; expected a smooth log density that is neither flat (an improper posterior) nor "
        "different from its gradient"
    )


def start(
    kernel: HMCKernel,
    chains: HMCState,
    schedule: Schedule,
    dense: bool,
    sites: dict[str, list[int]],
    num_superchains: int,
    generator: torch.Generator,
) -> WarmupState:
    """Return the state in which the warm-up begins."""
    like = chains.position[0]
    metric = Metric.unit(like, dense)
    step_size = find_step_size(kernel, chains, metric, schedule.target_accept, generator)
    adaptation = Adaptation(
        step=0,
        step_size=DualAveraging.start(step_size, schedule.target_accept),
        length=TrajectoryLength.start(schedule.trajectory_length or QUARTER_PERIOD),
        metric=metric,
        moments=PooledMoments.start(like, dense),
        factor=torch.ones_like(chains.position[:, :1]),
    )
    return WarmupState(chains, adaptation, sites, num_superchains, generator.get_state())


def warm_up(
    kernel: HMCKernel,
    state: WarmupState,
    schedule: Schedule,
    generator: torch.Generator,
) -> tuple[WarmupState, HMCInfo]:
    """Make one iteration of the warm-up; return the next state, and what happened."""
    adaptation = state.adaptation
    step_size = adaptation.step_size.step_size
    steps = schedule.num_steps(adaptation.length.length, step_size, adaptation.step)
    sizes = jittered(step_size * adaptation.factor, schedule.jitter, generator)
    before = state.chains
    after, info = hmc_step(kernel, before, sizes, adaptation.metric, steps, generator)
    adaptation, renewed = adapt(
        adaptation,
        before,
        after,
        info,
        schedule.warmup_steps,
        schedule.max_leapfrog_steps,
        tune_length=schedule.trajectory_length is None,
    )
    if renewed:
        target = schedule.target_accept
        found = find_step_size(kernel, after, adaptation.metric, target, generator)
        adaptation = adaptation._replace(step_size=DualAveraging.start(found, target))
    state = state._replace(
        chains=after, adaptation=adaptation, generator_state=generator.get_state()
    )
    return state, info
