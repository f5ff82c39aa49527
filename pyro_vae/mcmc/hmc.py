"""Hamiltonian Monte Carlo with hundreds of chains as one batch of tensors."""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pyro.infer.mcmc.util import select_samples
from pyro.ops.stats import hpdi
from torch import Tensor
from tqdm import tqdm

from ..capture import Captured, UnconstrainedModel, capture, same_graph
from ..threads import one_thread_if_small
from .adaptation import jittered
from .checks import Verdict, check_mcmc
from .diagnostics import (
    effective_sample_size,
    nested_r_hat,
    running_r_hat,
    split_r_hat,
    to_inference_data,
)
from .draws import Draws, available_bytes, peak_bytes
from .fallback import can_batch, run_nuts
from .kernel import (
    HMCInfo,
    HMCKernel,
    HMCState,
    Metric,
    begin,
    by_chain,
    end,
    hmc_step,
    make_leapfrog,
    potential_and_gradient,
)
from .warmup import Schedule, WarmupState, start, warm_up

__all__ = ["HMC"]

# Iterations from which compiling the leapfrog step pays for the seconds that it takes.
_COMPILE_FROM = 1000

# Leapfrog steps that one call makes in long runs of small problems, where the calls themselves
# cost more than the arithmetic. It gains a fifth, and several seconds more of compilation.
_UNROLL = 4
_UNROLL_FROM = 5000
_UNROLL_UP_TO = 1 << 16

# Up to this dimension, compiled programs on the CPU run over chains, not over dimensions: the inner
# loops are longer.
_BY_CHAIN_UP_TO = 32

# A dense metric is the default up to this dimension, if it is made of this many draws a dimension:
# its products cost dim² a step, which pays where the density itself is not far cheaper.
_DENSE_UP_TO = 128
_DRAWS_PER_DIM = 25

# Problems smaller than this are not asked how much memory they will take.
_SMALL = 1 << 18

# Superchains where their number is not given, if that divides the number of chains.
_NUM_SUPERCHAINS = 16

# Rows whose constrained values are computed at once.
_CONSTRAIN_ROWS = 1 << 16

# Numbers of a log likelihood up to which an arviz object holds it without being asked.
_MAX_LOG_LIKELIHOOD = 1 << 27

# A display is refreshed at most once in this many iterations: reading the acceptance off a GPU
# waits for it. Its R̂ looks at this many draws of a chain.
_PROGRESS_EVERY = 20
_PROGRESS_DRAWS = 100


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


class _Made(NamedTuple):
    """The programs of a run, and the potential that they were made for."""

    potential: Captured
    dense: bool
    kernel: HMCKernel


class HMC:
    r"""Sample a Pyro model's posterior by Hamiltonian Monte Carlo, many chains at once.

    All chains are one batch of tensors: one compiled leapfrog step moves them together, and they
    adapt together. In the warm-up they learn a step size (dual averaging on the harmonic mean of
    acceptance), a metric (variances or covariances pooled over chains, in windows that double) and
    a trajectory length (ChEES); a chain that accepts nothing shrinks its own step size until it
    arrives among the others. Lengths are jittered from iteration to iteration, step sizes from
    chain to chain. Discrete latent sites that can be enumerated are summed out, as Pyro's own
    kernels do.

    What a model does not allow is given up step by step, with a warning that says why: a model
    that cannot be compiled runs as a graph, one that cannot be captured runs as plain Python under
    ``torch.vmap``, one that cannot be batched runs on Pyro's own NUTS, with a few chains.

    A small problem on the CPU runs on one thread, whatever ``torch.get_num_threads()`` says, and
    puts the number back.

    The interface is that of ``pyro.infer.MCMC``; ``arviz.from_pyro`` accepts it too.

    Args:
        model: A Pyro model with continuous latent sites, or discrete ones that can be enumerated.
        num_chains: Number of chains.
        num_samples: Draws kept *per chain*.
        warmup_steps: Iterations before them, which adapt.
        trajectory_length: Mean length of a trajectory, where the metric is the identity; by
            default it is tuned.
        jitter: Lengths are spread evenly between ``1 - jitter`` and ``1 + jitter`` times their
            mean, by the number of steps, rounded up, and step sizes over a fifth below the adapted
            one; where chains diverged in the warm-up, step sizes vary more widely, from 0.15 to 1.2
            times it, and with them lengths.
        target_accept: Acceptance probability that the step size is tuned to.
        metric: ``"diag"`` or ``"dense"``; by default dense up to 128 dimensions if there are
            enough chains to learn it from.
        max_leapfrog_steps: Largest number of leapfrog steps in an iteration.
        initial_params: Starting points in *unconstrained* space, [num_chains, \*shape] by site; by
            default draws from the prior.
        num_superchains: Number of distinct starting points; the chains that share one are a
            superchain, which nested R̂ needs. By default the divisor of the number of chains, from
            8 to 32, that is nearest to 16; as many as chains where these are few, there is none,
            or starts are given.
        thin: Iterations from one kept draw to the next.
        save_params: Names of the latent and deterministic sites to keep; by default all.
        draws_dir: Directory of files that hold the draws, mapped into memory, for draws that
            outgrow it; by default they are held in memory.
        compile: Whether to compile the leapfrog step, which costs some seconds; by default from
            1000 iterations on.
        progress: Whether to show a progress bar on stderr.
        seed: Seed for this run alone; by default torch's global generator is used. A compiled run
            uses its random numbers in another order than one that is not.

    Attributes:
        num_chains: Number of chains.
        num_samples: Draws kept per chain; fewer than asked for if the run was interrupted.
        num_superchains: Number of superchains.
        model_density: The model as an :class:`~pyro_vae.capture.UnconstrainedModel`, after `run`.
        unconstrained: Draws in unconstrained space [num_chains, num_samples, dim], after `run`.
        warmup_state: Where `run` starts, without a warm-up of its own; set by `warmup`,
            `load_warmup` or an interrupted warm-up. Set it to ``None`` to warm up again, or to
            ``last_state`` for more draws.
        last_state: Where the last run ended: the chains, and all that was learnt.
        step_size: The adapted step size, after `run`; see ``jitter``.
        trajectory_length: The trajectory length, tuned after `run`.
        inverse_mass: The adapted inverse mass matrix, [dim] or [dim, dim], after `run`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        | An adaptive MCMC scheme for setting trajectory lengths in HMC (Hoffman, Radul, Sountsov,
          2021)
        | https://proceedings.mlr.press/v130/hoffman21a.html
        | MCMC using Hamiltonian dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901

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
        warmup_steps: int = 300,
        *,
        trajectory_length: float | None = None,
        jitter: float = 0.5,
        target_accept: float = 0.8,
        metric: Literal["diag", "dense"] | None = None,
        max_leapfrog_steps: int = 1024,
        initial_params: Mapping[str, Tensor] | None = None,
        num_superchains: int | None = None,
        thin: int = 1,
        save_params: Sequence[str] | None = None,
        draws_dir: str | Path | None = None,
        compile: bool | None = None,
        progress: bool = True,
        seed: int | None = None,
    ) -> None:
        for name, value, least in [
            ("num_chains", num_chains, 1),
            ("num_samples", num_samples, 1),
            ("warmup_steps", warmup_steps, 0),
            ("max_leapfrog_steps", max_leapfrog_steps, 1),
            ("thin", thin, 1),
        ]:
            if int(value) != value or value < least:
                raise ValueError(f"{name}: found {value}; expected an integer of at least {least}")
        if trajectory_length is not None and not 0 < trajectory_length < math.inf:
            raise ValueError(
                f"trajectory_length: found {trajectory_length}; expected a positive number"
            )
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter: found {jitter}; expected a number from 0 to 1")
        if not 0 < target_accept < 1:
            raise ValueError(
                f"target_accept: found {target_accept}; expected a number between 0 and 1"
            )
        if metric not in (None, "diag", "dense"):
            raise ValueError(f"metric: found {metric!r}; expected 'diag', 'dense' or None")
        if num_superchains is None:
            num_superchains = _default_num_superchains(int(num_chains))
        elif num_superchains < 1 or num_chains % num_superchains != 0:
            raise ValueError(
                f"num_superchains: found {num_superchains}; expected a divisor of num_chains, "
                f"{num_chains}"
            )
        if isinstance(save_params, str):
            raise ValueError(f"save_params: found {save_params!r}; expected a list of site names")
        self.num_chains = self._num_chains = int(num_chains)
        self.num_superchains = self._num_superchains = int(num_superchains)
        self.warmup_steps = int(warmup_steps)
        self.trajectory_length = trajectory_length
        self.thin = int(thin)
        self.save_params = None if save_params is None else list(save_params)
        self.draws_dir = None if draws_dir is None else Path(draws_dir)
        self.initial_params = initial_params
        self.progress = progress
        self.seed = seed
        self.kernel = _Kernel(model)
        self.compile = (
            num_samples * thin + warmup_steps >= _COMPILE_FROM if compile is None else bool(compile)
        )
        self.warmup_state: WarmupState | None = None
        self.last_state: WarmupState | None = None
        self._programs: dict[str, Captured] = {}
        self._made: _Made | None = None
        self._metric = metric
        self._schedule = Schedule(
            self.warmup_steps,
            float(target_accept),
            None if trajectory_length is None else float(trajectory_length),
            float(jitter),
            int(max_leapfrog_steps),
        )
        self._num_samples = int(num_samples)
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._draws: Draws | None = None
        self._samples: dict[str, Tensor] | None = None
        self._diagnostics: dict[str, Any] | None = None

    # -- running ----------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Draw the samples; the arguments are the model's.

        Where ``warmup_state`` is set, sampling starts from it (and a warm-up that was interrupted
        goes on); otherwise the chains warm up first. An interrupt from the keyboard ends the
        sampling and keeps what was drawn; in the warm-up, it keeps the state, so that another
        `run` goes on there.

        Raises:
            ValueError: If the model or its data do not allow HMC, no starting point with a finite
                density is found, ``initial_params`` or ``warmup_state`` do not fit the model, or
                the draws do not fit into memory.
        """
        self._forget()
        with self._prepared(args, kwargs):
            reason = can_batch(self.model_density)
            if reason is not None:
                self._run_pyro(reason)
                return
            kernel, chains = self._kernel_and_start()
            state = self._warmed_up(kernel, chains)
            self._sample(kernel, state)

    def _run_pyro(self, reason: str) -> None:
        """Let Pyro's NUTS draw from a model that cannot be batched."""
        draws = run_nuts(
            self.model_density,
            self._num_samples * self.thin,
            self.warmup_steps,
            self.num_chains,
            reason=reason,
            initial=None if self.initial_params is None else self._start(),
            target_accept=self._schedule.target_accept,
            progress=self.progress,
            seed=self._seed,
        )
        kept = slice(self.thin - 1, None, self.thin)
        by_draw = {name: getattr(draws, name)[:, kept] for name in Draws.FIELDS}
        self.num_chains = self.num_superchains = len(draws.position)
        self.step_size = float(draws.step_size.mean())
        saved = None if self.save_params is None else self._saved
        self._draws = Draws.of_chains(by_draw, saved, self.draws_dir)

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Warm up without sampling; the arguments are the model's.

        Afterwards ``warmup_state`` holds what was learnt, and `run` samples from there. With one
        seed, `warmup` and `run` give the draws of `run` alone.

        Raises:
            ValueError: As `run`.
        """
        self._forget()
        self.warmup_state = None
        with self._prepared(args, kwargs):
            if reason := can_batch(self.model_density):
                raise ValueError(
                    "the model cannot be batched and runs on Pyro's NUTS, whose warm-up cannot be "
                    f"kept; expected run() without warmup(); the reason: {reason}"
                )
            kernel, chains = self._kernel_and_start()
            self.warmup_state = self._warmed_up(kernel, chains)

    def save_warmup(self, path: str | Path) -> None:
        """Write what the warm-up has learnt, and where the chains are, to a file."""
        state = self.warmup_state or self.last_state
        if state is None:
            raise RuntimeError("there is no warm-up yet; call warmup() or run() first")
        state.save(path)

    def load_warmup(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Read a file that `save_warmup` wrote; the next `run` samples from there.

        Args:
            path: The file; no code in it is run.
            device: Where the chains shall be.
        """
        self.warmup_state = WarmupState.load(path, device)

    def _forget(self) -> None:
        self._draws = self._samples = self._diagnostics = None
        self.num_chains, self.num_superchains = self._num_chains, self._num_superchains

    @contextmanager
    def _prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Learn the model's structure; run the block without gradients, with a seed of its own."""
        self._args, self._kwargs = args, kwargs
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            density = UnconstrainedModel(self.kernel.model, args, kwargs, enumerate_discrete=True)
            self.model_density = density
            self._seed = seed
            with one_thread_if_small(self.num_chains * density.size, density.device):
                yield

    def _generator(self, stream: int) -> torch.Generator:
        """Return the generator of a phase; the sampling's does not depend on the warm-up's."""
        seed = (self._seed + stream * 0x9E3779B97F4A7C15) % 2**63
        return torch.Generator(self.model_density.device).manual_seed(seed)

    def _kernel_and_start(self) -> tuple[HMCKernel, HMCState]:
        """Return the compiled programs, and where the chains begin or go on."""
        density = self.model_density
        position = self._start() if self.warmup_state is None else self._resume_at()
        few = density.dim <= _BY_CHAIN_UP_TO and density.device.type == "cpu"
        layout: Callable[[Tensor], Tensor] = (
            by_chain if few and self.compile else torch.Tensor.contiguous
        )
        position = layout(position)
        potential = potential_and_gradient(density.log_density)
        self._check_memory(potential, position)
        # Pyro's handlers run once; the programs are made of the graph that is left. Where it is the
        # one of the last run, so are they.
        captured = capture(potential, position, compile=False)
        potential = captured.run
        energy, gradient = potential(position)
        chains = HMCState(position, energy, layout(gradient))
        metric = Metric.unit(position[0], self._dense())
        made = self._made
        if made is not None and made.dense == metric.dense and same_graph(made.potential, captured):
            return made.kernel, chains
        step_size, momentum = position.new_ones((len(position), 1)), position
        lengths = [1]
        small = len(position) * density.size <= _UNROLL_UP_TO
        if self.compile and small and self._num_samples * self.thin >= _UNROLL_FROM:
            lengths = [_UNROLL, 1]

        def program(name: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
            """Capture a function; a run on data of the same shapes finds it compiled."""

            def laid_out(*inputs: Tensor) -> tuple[Tensor, ...]:
                return tuple(layout(x) if x.dim() == 2 else x for x in function(*inputs))

            earlier = self._programs.get(name)
            made = capture(laid_out, *inputs, compile=self.compile, reuse=earlier)
            self._programs[name] = made
            return made.run

        def begin_laid_out(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            """Draw momenta: too few operations for a compilation to pay."""
            momentum, energy = begin(*inputs)
            return layout(momentum), energy

        like = (position, momentum, chains.gradient, step_size, metric.inverse_mass)
        leapfrogs = [
            (n, program(f"leapfrog {n}", make_leapfrog(potential, n), *like)) for n in lengths
        ]
        inputs = (*chains, *chains, momentum, *[chains.potential] * 2, metric.inverse_mass)
        kernel = HMCKernel(
            leapfrogs=tuple(leapfrogs),
            begin=begin_laid_out,
            end=program("end", end, *inputs),
        )
        self._made = _Made(captured, metric.dense, kernel)
        return kernel, chains

    def _dense(self) -> bool:
        """Whether the metric is a matrix."""
        if self.warmup_state is not None:
            return self.warmup_state.adaptation.metric.dense
        if self._metric is not None:
            return self._metric == "dense"
        dim = self.model_density.dim
        draws = self.num_chains * self.warmup_steps // 2  # in the last, longest window
        return dim <= _DENSE_UP_TO and draws >= _DRAWS_PER_DIM * dim

    def _start(self) -> Tensor:
        """Return the starting points [num_chains, dim], in the order of the superchains."""
        density = self.model_density
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
        self._check_finite(position, "initial_params")
        groups = position.unflatten(0, (self.num_superchains, -1))
        if not bool((groups == groups[:, :1]).all()):
            self.num_superchains = self.num_chains  # no two chains share their start for certain
        return position

    def _sites(self) -> dict[str, list[int]]:
        sites = self.model_density.sites
        return {name: list(site.unconstrained_shape) for name, site in sites.items()}

    def _resume_at(self) -> Tensor:
        """Return the positions of ``warmup_state``, in the model's type and on its device."""
        assert self.warmup_state is not None
        density, chains = self.model_density, self.warmup_state.chains
        if self.warmup_state.sites != self._sites():
            raise ValueError(
                f"warmup_state: found the sites {self.warmup_state.sites}; expected {self._sites()}"
            )
        if len(chains.position) != self.num_chains:
            raise ValueError(
                f"warmup_state: found {len(chains.position)} chains; expected num_chains, "
                f"{self.num_chains}"
            )
        if (chains.position.dtype, chains.position.device) != (density.dtype, density.device):
            raise ValueError(
                f"warmup_state: found {chains.position.dtype} on {chains.position.device}; "
                f"expected the model's {density.dtype} on {density.device}"
            )
        self.num_superchains = self.warmup_state.num_superchains
        self._check_finite(chains.position, "warmup_state")
        return chains.position.contiguous()

    def _check_finite(self, position: Tensor, what: str) -> None:
        log_density = self.model_density.log_density(position)
        bad = torch.nonzero(~torch.isfinite(log_density)).flatten().tolist()
        if bad:
            raise ValueError(
                f"{what}: found a log density that is not finite in the chains {bad}; "
                "expected points inside the support of the posterior"
            )

    def _check_memory(self, potential: Callable[..., Any], position: Tensor) -> None:
        """Say how much memory the run will take where there is not so much."""
        density = self.model_density
        rows = {"": position[:1]} if self.save_params is None else self._saved(position[:1])
        chains = HMCState(position, position[:, 0], position)
        draws = self._num_samples * Draws.bytes_per_draw(chains, rows)
        work = 0
        if len(position) * density.size > _SMALL:
            two = position[:2].contiguous()
            graph = capture(potential, two, compile=False).graph
            work = 0 if graph is None else peak_bytes(graph, two) // 2 * len(position)
        if self.draws_dir is not None:
            self.draws_dir.mkdir(parents=True, exist_ok=True)
            left = shutil.disk_usage(self.draws_dir).free
            if draws > left:
                raise ValueError(
                    f"draws_dir: found {left / 2**30:.1f} GiB free in {self.draws_dir}; expected "
                    f"{draws / 2**30:.1f} GiB, for {self._num_samples} draws of {len(position)} "
                    "chains"
                )
        free = available_bytes(density.device)
        in_memory = work + (draws if self.draws_dir is None else 0)
        if free is not None and in_memory > free:
            raise ValueError(
                f"num_chains: found {len(position)}, which takes about {draws / 2**30:.1f} GiB for "
                f"{self._num_samples} draws and {work / 2**30:.1f} GiB for a leapfrog step, of "
                f"{free / 2**30:.1f} GiB that are free on {density.device}; expected fewer chains "
                "or draws (or thin, save_params or draws_dir)"
            )

    def _warmed_up(self, kernel: HMCKernel, chains: HMCState) -> WarmupState:
        """Return the state after the warm-up, of which some or all may have been made before."""
        generator = self._generator(0)
        if self.warmup_state is None:
            state = start(
                kernel,
                chains,
                self._schedule,
                self._dense(),
                self._sites(),
                self.num_superchains,
                generator,
            )
        else:
            state = self.warmup_state._replace(chains=chains)  # the data may be others
            generator.set_state(state.generator_state)
        todo = self.warmup_steps - state.adaptation.step
        with self._bar("warm-up", todo) as bar:
            try:
                while state.adaptation.step < self.warmup_steps:
                    state, info = warm_up(kernel, state, self._schedule, generator)
                    self._show(bar, info, state.adaptation.step_size.step_size)
            except KeyboardInterrupt:
                self.warmup_state = state
                raise
        return state

    def _sample(self, kernel: HMCKernel, state: WarmupState) -> None:
        chains, adaptation = state.chains, state.adaptation
        self.step_size = adaptation.step_size.averaged_step_size
        self.inverse_mass = adaptation.metric.inverse_mass
        self.trajectory_length = self._schedule.trajectory_length
        if self.trajectory_length is None:
            self.trajectory_length = adaptation.length.averaged_length
        sizes = chains.position.new_full((len(chains.position), 1), self.step_size)
        saved = None if self.save_params is None else self._saved
        draws = Draws(self._num_samples, chains, saved, self.draws_dir)
        generator = self._generator(state.stream)
        index, wide = 0, adaptation.narrow_places
        with self._bar("sample", self._num_samples) as bar:
            try:
                while draws.count < self._num_samples:
                    diverging = torch.zeros_like(chains.potential, dtype=torch.bool)
                    leapfrogs = 0
                    for _ in range(self.thin):
                        steps = self._schedule.num_steps(
                            self.trajectory_length, self.step_size, index
                        )
                        index += 1
                        chains, info = hmc_step(
                            kernel,
                            chains,
                            jittered(sizes, self._schedule.jitter, generator, wide),
                            adaptation.metric,
                            steps,
                            generator,
                        )
                        diverging |= info.diverging
                        leapfrogs += steps
                    draws.append(chains, info._replace(diverging=diverging, num_steps=leapfrogs))
                    self._show(bar, info, self.step_size, draws)
            except KeyboardInterrupt:
                if draws.count == 0:
                    raise
                warnings.warn(
                    f"interrupted: {draws.count} of {self._num_samples} draws a chain are kept",
                    stacklevel=4,
                )
        draws.finish()
        self._draws = draws
        self.last_state = state._replace(chains=chains, stream=state.stream + 1)

    def _bar(self, stage: str, total: int) -> Any:
        return tqdm(desc=stage, total=total, disable=not self.progress)

    def _show(self, bar: Any, info: HMCInfo, step_size: float, draws: Draws | None = None) -> None:
        if not bar.disable and (bar.n + 1) % _PROGRESS_EVERY == 0:
            shown = {
                "accept": f"{float(info.accept_prob.mean()):.2f}",
                "step_size": f"{step_size:.3g}",
                "leapfrogs": info.num_steps,
            }
            if draws is not None:
                recent = draws.thinned(_PROGRESS_DRAWS)
                shown["r_hat"] = f"{running_r_hat(recent, self.num_superchains):.3f}"
                shown["divergences"] = int(draws.stats["diverging"][: draws.count].sum())
            bar.set_postfix(shown, refresh=False)
        bar.update()

    # -- results ----------------------------------------------------------------------------

    def _saved(self, position: Tensor) -> dict[str, Tensor]:
        """Return the values [n, *shape] of the sites in ``save_params``."""
        density, names = self.model_density, self.save_params or []
        values = dict(density.constrain(position))
        if not set(names) <= set(values):
            values.update(density.deterministic(position))
        if unknown := [name for name in names if name not in values]:
            raise ValueError(
                f"save_params: found {unknown}; expected latent or deterministic sites, of "
                f"{sorted(values)}"
            )
        return {name: values[name] for name in names}

    def _drawn(self) -> Draws:
        if self._draws is None:
            raise RuntimeError("there are no draws yet; call run() first")
        return self._draws

    @property
    def num_samples(self) -> int:
        """Draws per chain."""
        return self._num_samples if self._draws is None else self._draws.count

    @property
    def unconstrained(self) -> Tensor:
        """Draws in unconstrained space [num_chains, num_samples, dim]."""
        values = self._drawn().values
        if "" not in values:
            raise RuntimeError(
                f"only the sites {sorted(values)} were kept (save_params), not the positions"
            )
        return values[""].transpose(0, 1)

    def _computed(self, function: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        r"""Apply a function of positions to all draws: [num_chains, num_samples, \*shape]."""
        shape = (self.num_chains, self.num_samples)
        rows = self.unconstrained.reshape(-1, self.model_density.dim)
        with torch.no_grad():
            parts = [function(part) for part in rows.split(_CONSTRAIN_ROWS)]
        return {
            name: torch.cat([part[name] for part in parts]).unflatten(0, shape) for name in parts[0]
        }

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        r"""Return the draws of the latent sites, or of those in ``save_params``.

        Args:
            num_samples: How many to pick, with replacement; by default all, in order.
            group_by_chain: Whether to keep the chains apart.

        Returns:
            Draws [num_chains · num_samples, \*shape] by site, or
            [num_chains, num_samples, \*shape].
        """
        if self._samples is None:
            values = self._drawn().values
            if "" in values:
                self._samples = self._computed(self.model_density.constrain)
            else:
                self._samples = {name: value.transpose(0, 1) for name, value in values.items()}
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
            diverging = draws.stats["diverging"].t().cpu()
            result["divergences"] = {
                chain: torch.nonzero(row).flatten().tolist()
                for chain, row in zip(self._chains(), diverging, strict=True)
            }
            rates = draws.stats["accepted"].to(torch.float64).mean(0).tolist()
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

    def check(self) -> Verdict:
        """Judge whether the draws can be called the posterior's.

        Returns:
            The verdict of :func:`~pyro_vae.mcmc.check_mcmc`: print it, ask ``passed``, or let it
            ``raise_if_failed``.
        """
        return check_mcmc(self)

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """What arviz calls the sampler's statistics, each [num_chains, num_samples]."""
        stats = self._drawn().stats
        shape = (self.num_chains, self.num_samples)
        return {
            "diverging": stats["diverging"].t(),
            "energy": stats["energy"].t(),
            "acceptance_rate": stats["accept_prob"].t(),
            "lp": -stats["potential"].t(),
            "n_steps": stats["num_steps"].t().expand(shape),
            "step_size": torch.full(shape, self.step_size, dtype=torch.float64),
        }

    def to_arviz(self, log_likelihood: bool | None = None) -> Any:
        """Convert the draws, the sampler's statistics and the data to an arviz ``InferenceData``.

        Args:
            log_likelihood: Whether to compute the log likelihood of every observation in every
                draw, which ``arviz.loo`` and ``arviz.waic`` need; by default up to 2²⁷ numbers.

        Returns:
            An ``InferenceData`` with the groups ``posterior`` (deterministic sites too),
            ``sample_stats``, ``log_likelihood`` and ``observed_data``.
        """
        shape = (self.num_chains, self.num_samples)
        posterior = self.get_samples(group_by_chain=True)
        groups: dict[str, Any] = {}
        if self.save_params is None:
            density = self.model_density
            posterior = {**posterior, **self._computed(density.deterministic)}
            if log_likelihood is None:
                size = sum(value.numel() for value in density.observed.values())
                log_likelihood = size * math.prod(shape) <= _MAX_LOG_LIKELIHOOD
            if log_likelihood and density.observed:
                groups["log_likelihood"] = self._computed(density.log_likelihood)
        elif log_likelihood:
            raise ValueError(
                "log_likelihood: found True; expected False where save_params keeps some sites"
            )
        data = to_inference_data(
            posterior=posterior,
            sample_stats=self.sample_stats,
            observed_data=self.model_density.observed,
            **groups,
        )
        data.posterior.attrs["num_superchains"] = self.num_superchains  # for check_mcmc
        return data
