"""Our HMC and its peers behind one interface, each as its documentation says to use it.

``Sampler(posterior)`` prepares a sampler; ``run(seed, num_draws)`` warms up, samples, and says how
long either took. Draws count once they are numpy arrays in constrained space, for every sampler.
Times are read off ``clock``, which may be set to `time.process_time`.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_vae.models.posteriors import POSTERIORS

clock: Callable[[], float] = time.perf_counter

MOST_DRAWS = 20_000
INSTALL = 'pip install -c constraints.txt -e ".[bench]"'


class Run(NamedTuple):
    draws: dict[str, np.ndarray]  # [num_chains, num_draws, *shape] by site
    warmup_seconds: float
    sampling_seconds: float


class Sampler:
    """What the samplers share.

    Attributes:
        label: Name in tables.
        modules: What they import.
    """

    label: str
    modules: tuple[str, ...]

    def __init__(self, posterior: str) -> None:
        raise NotImplementedError

    def run(self, seed: int, num_draws: int) -> Run:
        """Warm up and sample; the first call, and one with another ``num_draws``, may compile."""
        raise NotImplementedError

    @classmethod
    def require(cls) -> None:
        """Import the packages, so that no time is counted for it; exit where one is missing."""
        for module in cls.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise SystemExit(f"{cls.label}: {error}; install the peers: {INSTALL}") from error


def _numpy_data(posterior: str, dtype: torch.dtype) -> list:
    args = POSTERIORS[posterior].data(dtype, 0)
    return [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]


def timed_hmc(*args: Any, **kwargs: Any) -> Any:
    """Return an `HMC` whose ``sampling_started`` says when `run` had captured the model again."""
    from pyro_vae.mcmc import HMC

    class TimedHMC(HMC):
        def _sample(self, *args):
            self.sampling_started = clock()
            super()._sample(*args)

    return TimedHMC(*args, **kwargs)


class Ours(Sampler):
    """`pyro_vae.mcmc.HMC` with its defaults (256 chains, float32), compiled even for few draws."""

    label = "pyro_vae HMC"
    # The compiler too, which torch imports when it is first used, and JAX always.
    modules = ("pyro_vae.mcmc", "torch._inductor.compile_fx")

    def __init__(self, posterior: str, num_chains: int = 256, device: str = "cpu") -> None:
        self.model, data, _ = POSTERIORS[posterior]
        self.args = [
            a.to(device) if isinstance(a, torch.Tensor) else a for a in data(torch.float32, 0)
        ]
        self.num_chains, self.num_draws = num_chains, 0

    def run(self, seed: int, num_draws: int) -> Run:
        if num_draws != self.num_draws:
            self.mcmc = timed_hmc(
                self.model, self.num_chains, num_draws, compile=True, progress=False
            )
            self.num_draws = num_draws
        self.mcmc.seed = seed
        started = clock()
        self.mcmc.warmup(*self.args)
        self.mcmc.run(*self.args)
        draws = {k: v.cpu().numpy() for k, v in self.mcmc.get_samples(group_by_chain=True).items()}
        sampling_started = self.mcmc.sampling_started
        return Run(draws, sampling_started - started, clock() - sampling_started)


class NumPyroNUTS(Sampler):
    """NumPyro's NUTS: 64 vectorised chains, 500 warm-up steps, float32.

    The loop around its kernel is ours: under the JAX of constraints.txt `numpyro.infer.MCMC`
    compiles anew in every run, which would be most of what is timed.
    """

    label = "NumPyro NUTS"
    modules = ("numpyro.infer", "hmc_numpyro")

    def __init__(self, posterior: str, num_chains: int = 64) -> None:
        import jax
        import jax.numpy as jnp
        from hmc_numpyro import MODELS
        from numpyro.infer import NUTS

        args = _numpy_data(posterior, torch.float32)
        args = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        warmup_steps = 500

        def initialize(seed, kernel=None):
            # A kernel that starts chains twice is vectorised twice: each start has its own.
            kernel = NUTS(MODELS[posterior]) if kernel is None else kernel
            keys = jax.random.split(jax.random.key(seed), num_chains)
            return kernel.init(keys, warmup_steps, None, args, {})

        kernel = NUTS(MODELS[posterior])
        initialize(0, kernel)

        @jax.jit
        def warm_up(state):
            return jax.lax.fori_loop(
                0, warmup_steps, lambda _, state: kernel.sample(state, args, {}), state
            )

        @partial(jax.jit, static_argnums=1)
        def sample(state, num_draws):
            constrain = jax.vmap(kernel.postprocess_fn(args, {}))

            def step(state, _):
                state = kernel.sample(state, args, {})
                return state, constrain(state.z)

            return jax.lax.scan(step, state, length=num_draws)[1]

        self.initialize, self.warm_up, self.sample = initialize, warm_up, sample
        self.ready = jax.block_until_ready

    def run(self, seed: int, num_draws: int) -> Run:
        started = clock()
        state = self.ready(self.warm_up(self.initialize(seed)))
        warm = clock()
        draws = self.sample(state, num_draws)
        draws = {k: np.swapaxes(np.asarray(v), 0, 1) for k, v in draws.items()}
        return Run(draws, warm - started, clock() - warm)


class BlackjaxChEES(Sampler):
    """BlackJAX's ChEES-HMC: 256 chains, 500 warm-up steps, float32, NumPyro's log density.

    Adam's rate is that of BlackJAX's guide. The diagonal metric is an option there, off by
    default; it is on here, because the chains start dispersed, and without it several of the
    posteriors come out an order of magnitude slower.
    """

    label = "BlackJAX ChEES"
    modules = ("blackjax", "numpyro.infer", "optax", "hmc_numpyro")
    metric: str | None = "diagonal"

    def __init__(self, posterior: str, num_chains: int = 256) -> None:
        import blackjax
        import jax
        import jax.numpy as jnp
        import optax
        from hmc_numpyro import MODELS
        from numpyro.infer.util import initialize_model

        args = _numpy_data(posterior, torch.float32)
        args = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        warmup_steps = 500

        def initialize(key):
            return initialize_model(key, MODELS[posterior], model_args=args)

        info = initialize(jax.random.split(jax.random.key(0), num_chains))
        constrain = jax.vmap(info.postprocess_fn)

        def log_density(z):
            return -info.potential_fn(z)

        adaptation = blackjax.chees_adaptation(
            log_density,
            num_chains,
            adaptation_info_fn=lambda *_: None,
            mass_matrix_estimation=self.metric,
        )
        functions: dict[str, Callable] = {}  # what a compiled function cannot return

        @jax.jit
        def warm_up(key, positions):
            (states, parameters), _ = adaptation.run(
                key,
                positions,
                0.1,
                optax.adam(0.05),
                warmup_steps,
                max_sampling_steps=MOST_DRAWS,
            )
            for name in ("next_random_arg_fn", "integration_steps_fn"):
                functions[name] = parameters.pop(name)
            return states, parameters

        @partial(jax.jit, static_argnums=3)
        def sample(key, states, parameters, num_draws):
            kernel = jax.vmap(blackjax.dynamic_hmc(log_density, **parameters, **functions).step)

            def step(states, key):
                states, _ = kernel(jax.random.split(key, num_chains), states)
                return states, states.position

            _, positions = jax.lax.scan(step, states, jax.random.split(key, num_draws))
            return jax.vmap(constrain)(positions)

        self.key, self.split, self.ready = jax.random.key, jax.random.split, jax.block_until_ready
        self.num_chains = num_chains
        self.initialize, self.warm_up, self.sample = initialize, warm_up, sample

    def run(self, seed: int, num_draws: int) -> Run:
        started = clock()
        start, adapt, sample = self.split(self.key(seed), 3)
        positions = self.initialize(self.split(start, self.num_chains)).param_info.z
        states, parameters = self.ready(self.warm_up(adapt, positions))
        warm = clock()
        draws = self.sample(sample, states, parameters, num_draws)
        draws = {k: np.swapaxes(np.asarray(v), 0, 1) for k, v in draws.items()}
        return Run(draws, warm - started, clock() - warm)


class BlackjaxChEESIdentity(BlackjaxChEES):
    """The same with BlackJAX's default, the identity as metric."""

    label = "BlackJAX ChEES, identity metric"
    metric = None


class Nutpie(Sampler):
    """nutpie with its defaults on a PyMC model compiled by numba: 6 chains on 2 cores, float64.

    It has no phase of sampling alone. Two runs of one seed, one with a fifth of the draws, have
    the same warm-up: their difference is four fifths of the sampling.
    """

    label = "nutpie"
    modules = ("nutpie", "pymc", "numba", "hmc_pymc")

    def __init__(self, posterior: str, num_chains: int = 6) -> None:
        import nutpie
        import pymc as pm
        from hmc_pymc import MODELS

        args = _numpy_data(posterior, torch.float64)
        with pm.Model() as model:
            MODELS[posterior](*args)
        self.model = nutpie.compile_pymc_model(model, backend="numba")
        self.sites = [variable.name for variable in model.free_RVs]
        self.nutpie, self.num_chains = nutpie, num_chains

    def _run(self, seed: int, num_draws: int) -> tuple[dict[str, np.ndarray], float]:
        started = clock()
        trace = self.nutpie.sample(
            self.model,
            draws=num_draws,
            chains=self.num_chains,
            cores=min(2, os.cpu_count() or 1),
            seed=seed,
            progress_bar=False,
            save_warmup=False,
        )
        draws = {site: trace.posterior[site].values for site in self.sites}
        return draws, clock() - started

    def run(self, seed: int, num_draws: int) -> Run:
        few = num_draws // 5
        _, short = self._run(seed, few)
        draws, total = self._run(seed, num_draws)
        sampling = (total - short) * num_draws / (num_draws - few)
        if sampling <= 0:  # too few draws to tell from the warm-up, which is counted too then
            sampling = total
        return Run(draws, max(total - sampling, 0.0), sampling)


class PyroNUTS(Sampler):
    """Pyro's NUTS: one chain, jit on, 200 warm-up steps, float32."""

    label = "Pyro NUTS"
    modules = ("pyro.infer",)

    def __init__(self, posterior: str) -> None:
        self.model, data, _ = POSTERIORS[posterior]
        self.args = data(torch.float32, 0)

    def run(self, seed: int, num_draws: int) -> Run:
        from pyro.infer import MCMC, NUTS

        torch.manual_seed(seed)
        at: dict[str, float] = {}

        def hook(kernel, samples, stage, i) -> None:
            at[stage] = clock()

        kernel = NUTS(self.model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(
            kernel,
            num_samples=num_draws,
            warmup_steps=200,
            disable_progbar=True,
            hook_fn=hook,
        )
        started = clock()
        mcmc.run(*self.args)
        draws = {k: v.numpy() for k, v in mcmc.get_samples(group_by_chain=True).items()}
        return Run(draws, at["Warmup"] - started, clock() - at["Warmup"])


SAMPLERS: dict[str, type[Sampler]] = {
    "ours": Ours,
    "numpyro": NumPyroNUTS,
    "blackjax": BlackjaxChEES,
    "blackjax_identity": BlackjaxChEESIdentity,
    "nutpie": Nutpie,
    "pyro": PyroNUTS,
}
