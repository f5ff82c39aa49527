"""Hamiltonian Monte Carlo with hundreds of chains as one batch of tensors."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from pyro.infer.mcmc.util import select_samples
from pyro.ops.stats import hpdi
from torch import Tensor
from tqdm import tqdm

from ..capture import UnconstrainedModel, capture
from ..threads import one_thread_if_small
from .adaptation import (
    DualAveraging,
    PooledVariance,
    halton,
    harmonic_mean_acceptance,
    num_leapfrog_steps,
    warmup_windows,
)
from .diagnostics import effective_sample_size, nested_r_hat, split_r_hat, to_inference_data
from .kernel import (
    HMCInfo,
    HMCState,
    Leapfrog,
    hmc_step,
    kinetic_energy,
    make_leapfrog,
    potential_and_gradient,
)

__all__ = ["HMC"]

# Iterations from which compiling the leapfrog step pays for the seconds that it takes.
_COMPILE_FROM = 1000

# Superchains where their number is not given, if that divides the number of chains.
_NUM_SUPERCHAINS = 16

# Rows whose constrained values are computed at once.
_CONSTRAIN_ROWS = 1 << 16

# A display is refreshed at most once in this many iterations: reading the acceptance off a GPU
# waits for it.
_PROGRESS_EVERY = 20


def _default_num_superchains(num_chains: int) -> int:
    """Return the divisor from 8 to 32 that is nearest to 16, or all where there is none.

    With fewer starting points nested R̂ knows too little; with few chains each has its own.
    """
    if num_chains <= _NUM_SUPERCHAINS:
        return num_chains
    least, most = _NUM_SUPERCHAINS // 2, 2 * _NUM_SUPERCHAINS
    divisors = [n for n in range(least, most + 1) if num_chains % n == 0]
    return min(divisors, key=lambda n: abs(n - _NUM_SUPERCHAINS), default=num_chains)


class _Kernel(NamedTuple):
    """What arviz asks of a Pyro MCMC kernel."""

    model: Callable[..., Any]


class _Draws(NamedTuple):
    """Everything recorded while sampling, each [num_samples, num_chains, ...]."""

    position: Tensor
    potential: Tensor
    energy: Tensor
    accept_prob: Tensor
    accepted: Tensor
    diverging: Tensor
    num_steps: Tensor  # [num_samples]


class HMC:
    r"""Sample a Pyro model's posterior by Hamiltonian Monte Carlo, many chains at once.

    All chains are one batch of tensors: one compiled leapfrog step moves them together, and they
    share a step size (dual averaging, harmonic mean of acceptance over chains), a diagonal metric
    (variances pooled over chains in windows of the warm-up), and a number of leapfrog steps,
    jittered in each iteration so that trajectories are between 0 and twice ``trajectory_length``
    long, in units of the metric.

    A small problem on the CPU runs on one thread, whatever ``torch.get_num_threads()`` says, and
    puts the number back.

    The interface is that of ``pyro.infer.MCMC``; ``arviz.from_pyro`` accepts it too.

    Args:
        model: A Pyro model with continuous latent sites.
        num_chains: Number of chains.
        num_samples: Draws kept *per chain*.
        warmup_steps: Iterations before them, which adapt.
        trajectory_length: Mean length of a trajectory, where the posterior has unit scales.
        target_accept: Acceptance probability that the step size is tuned to.
        max_leapfrog_steps: Largest number of leapfrog steps in an iteration.
        initial_params: Starting points in *unconstrained* space, [num_chains, \*shape] by site.
        num_superchains: Number of distinct starting points; the chains that share one are a
            superchain, which nested R̂ needs. By default the divisor of the number of chains, from
            8 to 32, that is nearest to 16; as many as chains where these are few, there is none,
            or starts are given.
        compile: Whether to compile the leapfrog step, which costs some seconds; by default from
            1000 iterations on.
        progress: Whether to show a progress bar on stderr.
        seed: Seed for this run alone; by default torch's global generator is used.

    Attributes:
        num_chains: Number of chains.
        num_samples: Draws kept per chain; fewer than asked for if the run was interrupted.
        num_superchains: Number of superchains.
        model_density: The model as an :class:`~pyro_vae.capture.UnconstrainedModel`, after `run`.
        unconstrained: Draws in unconstrained space [num_chains, num_samples, dim], after `run`.
        step_size: The adapted step size, after `run`.
        inverse_mass: The adapted diagonal [dim] of the inverse mass matrix, after `run`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901
        | An adaptive MCMC scheme for setting trajectory lengths in HMC (Hoffman, Radul, Sountsov,
          2021)
        | https://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> mcmc = HMC(model, 32, num_samples=50, warmup_steps=50, progress=False, seed=0)
        >>> mcmc.run(torch.tensor([1.0, 2.0, 3.0]))  # posterior: N(1.5, 0.5²)
        >>> draws = mcmc.get_samples()["mean"]
        >>> draws.shape, bool((draws.mean() - 1.5).abs() < 0.1)
        (torch.Size([1600]), True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_chains: int = 256,
        num_samples: int = 1000,
        warmup_steps: int = 500,
        *,
        trajectory_length: float = math.pi / 2,
        target_accept: float = 0.8,
        max_leapfrog_steps: int = 1024,
        initial_params: Mapping[str, Tensor] | None = None,
        num_superchains: int | None = None,
        compile: bool | None = None,
        progress: bool = True,
        seed: int | None = None,
    ) -> None:
        for name, value, least in [
            ("num_chains", num_chains, 1),
            ("num_samples", num_samples, 1),
            ("warmup_steps", warmup_steps, 0),
            ("max_leapfrog_steps", max_leapfrog_steps, 1),
        ]:
            if int(value) != value or value < least:
                raise ValueError(f"{name}: found {value}; expected an integer of at least {least}")
        if not (math.isfinite(trajectory_length) and trajectory_length > 0):
            raise ValueError(
                f"trajectory_length: found {trajectory_length}; expected a positive number"
            )
        if not 0 < target_accept < 1:
            raise ValueError(
                f"target_accept: found {target_accept}; expected a number between 0 and 1"
            )
        if num_superchains is None:
            num_superchains = _default_num_superchains(int(num_chains))
        elif num_superchains < 1 or num_chains % num_superchains != 0:
            raise ValueError(
                f"num_superchains: found {num_superchains}; expected a divisor of num_chains, "
                f"{num_chains}"
            )
        self.num_chains = int(num_chains)
        self.num_superchains = int(num_superchains)
        self.warmup_steps = int(warmup_steps)
        self.trajectory_length = float(trajectory_length)
        self.target_accept = float(target_accept)
        self.max_leapfrog_steps = int(max_leapfrog_steps)
        self.initial_params = initial_params
        self.progress = progress
        self.seed = seed
        self.kernel = _Kernel(model)
        self.compile = (
            num_samples + warmup_steps >= _COMPILE_FROM if compile is None else bool(compile)
        )
        self._num_samples = int(num_samples)
        self._num_superchains = self.num_superchains
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._draws: _Draws | None = None
        self._samples: dict[str, Tensor] | None = None
        self._diagnostics: dict[str, Any] | None = None

    # -- running ----------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Draw the samples; the arguments are the model's.

        An interrupt from the keyboard ends the sampling and keeps what was drawn.

        Raises:
            ValueError: If the model or its data do not allow HMC, no starting point with a finite
                density is found, or ``initial_params`` do not fit the model.
        """
        self._args, self._kwargs = args, kwargs
        self._draws = self._samples = self._diagnostics = None
        with torch.no_grad(), self._seeded():
            self.model_density = UnconstrainedModel(self.kernel.model, args, kwargs)
            with one_thread_if_small(
                self.num_chains * self.model_density.size, self.model_density.device
            ):
                self._run()

    def _run(self) -> None:
        position = self._start()
        potential = potential_and_gradient(self.model_density.log_density)
        inverse_mass = torch.ones_like(position[0])
        step_size = inverse_mass.new_ones(())
        leapfrog = capture(
            make_leapfrog(potential),
            *(position, position, position, step_size, inverse_mass),
            compile=self.compile,
        )
        state = HMCState(position, *potential(position))
        with tqdm(total=self.warmup_steps + self._num_samples, disable=not self.progress) as bar:
            state = self._warm_up(leapfrog, state, bar)
            self._sample(leapfrog, state, bar)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            yield

    def _start(self) -> Tensor:
        """Return the starting points [num_chains, dim], in the order of the superchains."""
        density = self.model_density
        self.num_superchains = self._num_superchains
        if self.initial_params is None:
            points = density.initial(self.num_superchains)
            return points.repeat_interleave(self.num_chains // self.num_superchains, dim=0)
        if set(self.initial_params) != set(density.sites):
            raise ValueError(
                f"initial_params: found the sites {sorted(self.initial_params)}; expected "
                f"{sorted(density.sites)}"
            )
        for name, site in density.sites.items():
            found, expected = (
                list(self.initial_params[name].shape),
                [self.num_chains, *site.unconstrained_shape],
            )
            if found != expected:
                raise ValueError(
                    f"initial_params, site {name!r}: found shape {found}; expected {expected}, "
                    "unconstrained, one row a chain"
                )
        position = torch.cat(
            [
                self.initial_params[name].reshape(self.num_chains, -1).to(density.device)
                for name in density.sites
            ],
            dim=-1,
        ).to(density.dtype)
        bad = torch.nonzero(~torch.isfinite(density.log_density(position))).flatten().tolist()
        if bad:
            raise ValueError(
                f"initial_params: found a log density that is not finite in the chains {bad}; "
                "expected points inside the support of the posterior"
            )
        groups = position.unflatten(0, (self.num_superchains, -1))
        if not bool((groups == groups[:, :1]).all()):
            self.num_superchains = self.num_chains  # no two chains share their start for certain
        return position

    def _reasonable_step_size(self, leapfrog: Leapfrog, state: HMCState, mass: Tensor) -> float:
        """Double or halve the step size until one leapfrog step crosses the target acceptance."""
        step_size, direction = 1.0, 0
        while 1e-10 < step_size < 1e10:
            momentum = torch.randn_like(state.position) * mass.rsqrt()
            before = state.potential + kinetic_energy(momentum, mass)
            size = mass.new_tensor(step_size)
            _, momentum, potential, _ = leapfrog(
                state.position, momentum, state.gradient, size, mass
            )
            error = potential + kinetic_energy(momentum, mass) - before
            accept = torch.exp(-error.clamp(min=0)).nan_to_num(nan=0.0)
            turn = 1 if float(accept.mean()) > self.target_accept else -1
            if direction not in (0, turn):
                break
            direction = turn
            step_size *= 2.0**turn
        else:
            raise ValueError(
                f"no step size has an acceptance near {self.target_accept}: found {step_size:.0e} "
                "still too " + ("small" if direction > 0 else "large") + "; expected a smooth log "
                "density that is neither flat (an improper posterior) nor different from its "
                "gradient"
            )
        return step_size

    def _warm_up(self, leapfrog: Leapfrog, state: HMCState, bar: Any) -> HMCState:
        inverse_mass = torch.ones_like(state.position[0])
        step_size = self._reasonable_step_size(leapfrog, state, inverse_mass)
        averaging = DualAveraging.start(step_size, self.target_accept)
        windows = warmup_windows(self.warmup_steps)
        # The metric learns between the first tenth of the warm-up and the last window's end.
        learn_from = self.warmup_steps // 10
        variance = PooledVariance.start(inverse_mass)
        for step in range(self.warmup_steps):
            size = averaging.step_size
            state, info = self._transition(leapfrog, state, size, inverse_mass, step)
            averaging = averaging.update(harmonic_mean_acceptance(info.accept_prob, info.diverging))
            if windows and learn_from <= step < windows[-1]:
                variance = variance.update(state.position)
            if step + 1 in windows:
                inverse_mass = variance.variance(fallback=inverse_mass)
                variance = PooledVariance.start(inverse_mass)
                averaging = DualAveraging.start(
                    self._reasonable_step_size(leapfrog, state, inverse_mass), self.target_accept
                )
            self._show(bar, "warm-up", info, size)
        self.step_size = averaging.averaged_step_size
        self.inverse_mass = inverse_mass
        return state

    def _sample(self, leapfrog: Leapfrog, state: HMCState, bar: Any) -> None:
        shape = (self._num_samples, self.num_chains)
        like = state.potential
        draws = _Draws(
            position=like.new_empty((*shape, state.position.shape[-1])),
            potential=like.new_empty(shape),
            energy=like.new_empty(shape),
            accept_prob=like.new_empty(shape),
            accepted=like.new_empty(shape, dtype=torch.bool),
            diverging=like.new_empty(shape, dtype=torch.bool),
            num_steps=torch.empty(self._num_samples, dtype=torch.int64),
        )
        drawn = 0
        try:
            for step in range(self._num_samples):
                state, info = self._transition(
                    leapfrog, state, self.step_size, self.inverse_mass, step
                )
                draws.position[step] = state.position
                draws.potential[step] = state.potential
                draws.energy[step] = info.energy
                draws.accept_prob[step] = info.accept_prob
                draws.accepted[step] = info.accepted
                draws.diverging[step] = info.diverging
                draws.num_steps[step] = info.num_steps
                drawn = step + 1
                self._show(bar, "sample", info, self.step_size)
        except KeyboardInterrupt:
            if drawn == 0:
                raise
            warnings.warn(
                f"interrupted: {drawn} of {self._num_samples} draws a chain are kept", stacklevel=4
            )
        self._draws = _Draws(*(value[:drawn] for value in draws))

    def _transition(
        self, leapfrog: Leapfrog, state: HMCState, step_size: float, mass: Tensor, index: int
    ) -> tuple[HMCState, HMCInfo]:
        steps = num_leapfrog_steps(
            self.trajectory_length, step_size, halton(index + 1), self.max_leapfrog_steps
        )
        return hmc_step(leapfrog, state, mass.new_tensor(step_size), mass, steps)

    def _show(self, bar: Any, stage: str, info: HMCInfo, step_size: float) -> None:
        if not bar.disable and (bar.n + 1) % _PROGRESS_EVERY == 0:
            bar.set_description(stage, refresh=False)
            bar.set_postfix(
                accept=f"{float(info.accept_prob.mean()):.2f}",
                step_size=f"{step_size:.3g}",
                leapfrogs=info.num_steps,
                refresh=False,
            )
        bar.update()

    # -- results ----------------------------------------------------------------------------

    def _drawn(self) -> _Draws:
        if self._draws is None:
            raise RuntimeError("there are no draws yet; call run() first")
        return self._draws

    @property
    def num_samples(self) -> int:
        """Draws per chain."""
        return self._num_samples if self._draws is None else len(self._draws.position)

    @property
    def unconstrained(self) -> Tensor:
        """Draws in unconstrained space [num_chains, num_samples, dim]."""
        return self._drawn().position.transpose(0, 1)

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        r"""Return the draws of the latent sites.

        Args:
            num_samples: How many to pick, with replacement; by default all, in order.
            group_by_chain: Whether to keep the chains apart.

        Returns:
            Draws [num_chains · num_samples, \*shape] by site, or
            [num_chains, num_samples, \*shape].
        """
        if self._samples is None:
            rows = self.unconstrained.reshape(-1, self.model_density.dim)
            with torch.no_grad():
                parts = [self.model_density.constrain(part) for part in rows.split(_CONSTRAIN_ROWS)]
            self._samples = {
                name: torch.cat([part[name] for part in parts]).unflatten(
                    0, (self.num_chains, self.num_samples)
                )
                for name in self.model_density.sites
            }
        result: dict[str, Tensor] = select_samples(self._samples, num_samples, group_by_chain)
        return result

    def _chains(self) -> list[str]:
        """Names of the chains, padded with zeros: arviz sorts them as text."""
        width = len(str(self.num_chains - 1))
        return [f"chain {index:0{width}d}" for index in range(self.num_chains)]

    def diagnostics(self) -> dict[str, Any]:
        r"""Compute how far the chains have converged.

        Returns:
            For each site a dict of ``n_eff`` (bulk ESS), ``r_hat`` (rank-normalised split R̂) and
            ``nested_r_hat`` (NaN for fewer than two superchains), each [\*shape]; and by chain,
            ``"divergences"`` with the indices of divergent iterations after warm-up, and
            ``"acceptance rate"``.
        """
        if self._diagnostics is None:
            draws = self._drawn()
            result: dict[str, Any] = {}
            for name, value in self.get_samples(group_by_chain=True).items():
                result[name] = {
                    "n_eff": effective_sample_size(value),
                    "r_hat": split_r_hat(value),
                    "nested_r_hat": nested_r_hat(value, self.num_superchains)
                    if self.num_superchains > 1
                    else torch.full(value.shape[2:], torch.nan, dtype=torch.float64),
                }
            diverging = draws.diverging.t().cpu()
            result["divergences"] = {
                chain: torch.nonzero(row).flatten().tolist()
                for chain, row in zip(self._chains(), diverging, strict=True)
            }
            rates = draws.accepted.to(torch.float64).mean(0).tolist()
            result["acceptance rate"] = dict(zip(self._chains(), rates, strict=True))
            self._diagnostics = result
        return self._diagnostics

    def summary(self, prob: float = 0.9) -> None:
        """Print a table of the draws and how far the chains have converged.

        Args:
            prob: Probability mass of the highest-density interval.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob: found {prob}; expected a number between 0 and 1")
        diagnostics = self.diagnostics()
        low, high = f"{50 * (1 - prob):.1f}%", f"{50 * (1 + prob):.1f}%"
        columns = ["mean", "std", "median", low, high, "n_eff", "r_hat", "nested r_hat"]
        rows = []
        for name, value in self.get_samples().items():
            value = value.to(torch.float64)
            interval = hpdi(value, prob=prob)
            site = diagnostics[name]
            stats = [
                *(value.mean(0), value.std(0), value.median(0).values, interval[0], interval[1]),
                *(site["n_eff"], site["r_hat"], site["nested_r_hat"]),
            ]
            for index in product(*map(range, value.shape[1:])):
                label = name + (f"[{','.join(map(str, index))}]" if index else "")
                rows.append((label, [float(stat[index]) for stat in stats]))
        width = max(10, *(len(label) for label, _ in rows))
        print()
        print(" " * width + "".join(f" {column:>12}" for column in columns))
        for label, numbers in rows:
            cells = [*(f" {x:>12.2f}" for x in numbers[:5]), f" {numbers[5]:>12.0f}"]
            print(f"{label:>{width}}" + "".join([*cells, *(f" {x:>12.4f}" for x in numbers[6:])]))
        count = sum(len(indices) for indices in diagnostics["divergences"].values())
        print()
        print(f"{self.num_chains} chains of {self.num_samples} draws; divergences: {count}")
        print("r_hat is rank-normalised and split, which short chains cannot pass;")
        print(
            f"nested r_hat compares {self.num_superchains} superchains of "
            f"{self.num_chains // self.num_superchains} chains: judge many short chains by it"
        )

    def to_arviz(self) -> Any:
        """Convert the draws, the sampler's statistics and the data to an arviz ``InferenceData``.

        Returns:
            An ``InferenceData`` with the groups ``posterior`` (deterministic sites too),
            ``sample_stats`` and ``observed_data``.
        """
        draws = self._drawn()
        rows = self.unconstrained.reshape(-1, self.model_density.dim)
        with torch.no_grad():
            parts = [self.model_density.deterministic(part) for part in rows.split(_CONSTRAIN_ROWS)]
        shape = (self.num_chains, self.num_samples)
        deterministic = {
            name: torch.cat([part[name] for part in parts]).unflatten(0, shape) for name in parts[0]
        }
        return to_inference_data(
            posterior={**self.get_samples(group_by_chain=True), **deterministic},
            sample_stats={
                "diverging": draws.diverging.t(),
                "energy": draws.energy.t(),
                "acceptance_rate": draws.accept_prob.t(),
                "lp": -draws.potential.t(),
                "n_steps": draws.num_steps.expand(shape),
                "step_size": torch.full(shape, self.step_size, dtype=torch.float64),
            },
            observed_data=self.model_density.observed,
        )
