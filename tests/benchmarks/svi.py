"""The time of a step of `pyro_vae.SVI`, beside Pyro's, hand-written PyTorch's and NumPyro's.

    python tests/benchmarks/svi.py [--cases a,b] [--losses a,b] [--rounds N] [--seconds S]
                                   [--threads N]
    python tests/benchmarks/svi.py --growth FILE.png

The cases:

*full_rank*: Eight Schools, a full-rank Gaussian guide, Trace_ELBO; one sample a step. Also with
`steps_per_call=50`, Pyro's JitTrace_ELBO, eager PyTorch on analytic densities, and NumPyro's
jitted `svi.update`.

*flow*: the same model with an `AutoFlow`.

*implicit*: the same with an `AutoImplicit`, 32 particles; two steps of the adversary and one of the
guide are a step.

*hierarchical*: a regression with 40 groups and 2000 observations, of which 200 a step.

*vae*: a 784-500-500-20 VAE on 128 rows, under each of `--losses`, beside the same by hand as a
PyTorch user writes it: the loss under `torch.compile`, forward and backward, and a fused Adam. By
hand nothing looks whether loss and gradients are finite, and the random numbers are the compiler's
own, which take longer than torch's: it shows under DVAE_ELBO, with 784 of them a row.

*digits*: a 64-64-64-8 VAE on scikit-learn's digits, 64 a step.

*memory*: the most memory that a process with the VAE of *vae* under BetaVAE_ELBO holds, ours and
by hand, each in a process of its own. Compilation is most of it, so the peak of later steps alone
is given too.

How it is measured: all sides are in one process and take turns, a burst of `--seconds` each, for
`--rounds` rounds. Times are medians of the rounds, ratios medians of the ratios within a round. The
first step, with all that it sets up, captures and compiles, is timed beside; with torch's cache of
compiled code as it is. Each side has parameters of its own, with names of their own. Pyro's
validation is on, its default. torch has one thread unless `--threads` says otherwise: where another
process takes one of the cores, its threads wait for one another, and an operation on ten numbers
takes milliseconds. What warns in the first steps, a program that falls back to plain Pyro above
all, is listed below the table: read it before the ratios.

`--growth` plots the step time, ours and Pyro's, against the number of latent sites, the size of a
plate and the number of particles. All print Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pyro
import pyro.distributions as dist
import torch
from markdown_tables import row, table
from pyro.infer import ELBO, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae
from pyro_vae.guides import AutoFlow, AutoImplicit, Gaussian
from pyro_vae.losses import (
    AVB_ELBO,
    DVAE_ELBO,
    GECO_ELBO,
    GRAE_ELBO,
    IWAE_ELBO,
    BetaVAE_ELBO,
    InfoVAE_ELBO,
)
from pyro_vae.models import eight_schools_avb
from pyro_vae.models.eight_schools import SIGMA_AVB, Y_AVB
from pyro_vae.nn import MLP

LOSSES: dict[str, Callable[[], ELBO]] = {
    "BetaVAE_ELBO": BetaVAE_ELBO,
    "InfoVAE_ELBO": lambda: InfoVAE_ELBO(0.0, 10.0),
    "GECO_ELBO": lambda: GECO_ELBO(tolerance=0.1),
    "IWAE_ELBO": lambda: IWAE_ELBO(5),
    "DVAE_ELBO": lambda: DVAE_ELBO(0.1),
    "GRAE_ELBO": lambda: GRAE_ELBO(curvature="columns", num_columns=1),
}

STEPS_PER_CALL = 50
WARMUP_CALLS = 5  # TorchScript compiles at its second and third
MEMORY_STEPS = 20

SITES = [1, 3, 10, 30, 100]
PLATE_SIZES = [10, 100, 1_000, 10_000, 100_000]
PARTICLES = [1, 10, 100, 1_000]

Burst = Callable[[int], Any]


class Side(NamedTuple):
    """One side of a comparison.

    `start` builds everything and returns what makes a number of calls, of `unit` steps each.
    """

    label: str
    start: Callable[[], Burst]
    unit: int = 1


class Figures(NamedTuple):
    """First step in seconds, and the seconds of a step in each round; warnings of the first."""

    first: float
    rounds: list[float]
    complaints: list[str]


# -- timing ---------------------------------------------------------------------------------------


def measure(sides: list[Side], rounds: int, seconds: float) -> list[Figures]:
    """Time all sides in turn, after their first steps; the first side is ours."""
    bursts, firsts, complaints, calls = [], [], [], []
    for k, side in enumerate(sides):
        torch.manual_seed(k)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            burst = side.start()
            started = time.perf_counter()
            burst(1)
            firsts.append(time.perf_counter() - started)
            burst(WARMUP_CALLS)
            started = time.perf_counter()
            burst(3)
            each = (time.perf_counter() - started) / 3
        heard = {str(w.message) for w in caught if issubclass(w.category, UserWarning)}
        complaints.append(sorted(heard))
        calls.append(max(round(seconds / each), 1))
        bursts.append(burst)
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for k, (side, burst) in enumerate(zip(sides, bursts, strict=True)):
            started = time.perf_counter()
            burst(calls[k])
            found[k].append((time.perf_counter() - started) / (calls[k] * side.unit))
    pyro.clear_param_store()
    return [Figures(*each) for each in zip(firsts, found, complaints, strict=True)]


def repeat(step: Callable[[], Any]) -> Burst:
    """Return what takes a step so many times."""

    def burst(num_calls: int) -> None:
        for _ in range(num_calls):
            step()

    return burst


def svi_burst(
    kind: type, model: Callable, guide: Callable, lr: float, loss: Any, *args: Any, **settings: Any
) -> Burst:
    """Return bursts of pyro_vae's or Pyro's SVI."""
    svi = kind(model, guide, pyro.optim.Adam({"lr": lr}), loss, **settings)
    return repeat(lambda: svi.step(*args))


_numbers = itertools.count()


def named(guide: AutoGuide) -> AutoGuide:
    """Give an automatic guide's parameters names of their own in Pyro's store."""
    guide._pyro_name = f"{type(guide).__name__}_{next(_numbers)}"
    return guide


def ours_and_pyro(start: Callable[[type], Burst]) -> list[Side]:
    """Return both sides, of what is made from the class of the SVI."""
    return [
        Side("pyro_vae.SVI", lambda: start(pyro_vae.SVI)),
        Side("pyro.infer.SVI", lambda: start(pyro.infer.SVI)),
    ]


# -- the cases ------------------------------------------------------------------------------------


def full_rank() -> dict[str, list[Side]]:
    def start(kind: type, loss: ELBO, **settings: Any) -> Burst:
        guide = named(AutoMultivariateNormal(eight_schools_avb))
        return svi_burst(kind, eight_schools_avb, guide, 1e-2, loss, **settings)

    ours, pyros = ours_and_pyro(lambda kind: start(kind, Trace_ELBO()))
    in_blocks = Side(
        f"pyro_vae.SVI, steps_per_call={STEPS_PER_CALL}",
        lambda: start(pyro_vae.SVI, Trace_ELBO(), steps_per_call=STEPS_PER_CALL),
        unit=STEPS_PER_CALL,
    )
    jit = Side(
        "pyro.infer.SVI, JitTrace_ELBO",
        lambda: start(pyro.infer.SVI, JitTrace_ELBO(ignore_jit_warnings=True)),
    )
    eager = Side("PyTorch by hand, eager", eager_full_rank)
    return {"full_rank": [ours, in_blocks, pyros, jit, eager, Side("NumPyro", numpyro_full_rank)]}


def eager_full_rank() -> Burst:
    """Return bursts of the same in plain PyTorch, with the densities written out."""
    dim = 2 + len(SIGMA_AVB)
    loc = torch.zeros(dim, requires_grad=True)
    log_diagonal = torch.full((dim,), -2.3, requires_grad=True)  # of AutoMultivariateNormal: 0.1
    below = torch.zeros(dim, dim, requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_diagonal, below], lr=1e-2)
    # Constants of log p − log q: those of the normal densities of z cancel.
    constant = -SIGMA_AVB.log().sum() - 0.5 * len(SIGMA_AVB) * torch.tensor(2 * torch.pi).log()

    def step() -> float:
        noise = torch.randn(dim)
        z = loc + (below.tril(-1) + log_diagonal.exp().diag()) @ noise
        mean = z[0] + z[1] * z[2:]
        log_p = constant - 0.5 * (z.square().sum() + ((Y_AVB - mean) / SIGMA_AVB).square().sum())
        log_q = -0.5 * noise.square().sum() - log_diagonal.sum()
        loss = log_q - log_p
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return repeat(step)


def numpyro_full_rank() -> Burst:
    """Return bursts of NumPyro's jitted update; a burst ends when its last state is there."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI
    from numpyro.infer import Trace_ELBO as NumPyroELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal as FullRank

    y, sigma = jnp.asarray(Y_AVB.numpy()), jnp.asarray(SIGMA_AVB.numpy())

    def model() -> None:
        mu = numpyro.sample("mu", ndist.Normal(0.0, 1.0))
        tau = numpyro.sample("tau", ndist.Normal(0.0, 1.0))
        with numpyro.plate("schools", len(y)):
            eta = numpyro.sample("eta", ndist.Normal(0.0, 1.0))
            numpyro.sample("y", ndist.Normal(mu + tau * eta, sigma), obs=y)

    svi = SVI(model, FullRank(model), numpyro.optim.Adam(1e-2), NumPyroELBO())
    update = jax.jit(svi.update)
    state = None

    def burst(num_calls: int) -> None:
        nonlocal state
        if state is None:
            state = svi.init(jax.random.PRNGKey(0))
        for _ in range(num_calls):
            state, loss = update(state)
        jax.block_until_ready((state, loss))

    return burst


def flow() -> dict[str, list[Side]]:
    def start(kind: type) -> Burst:
        guide = named(AutoFlow(eight_schools_avb))
        guide.setup()
        return svi_burst(kind, eight_schools_avb, guide, 1e-3, Trace_ELBO())

    return {"flow": ours_and_pyro(start)}


def implicit() -> dict[str, list[Side]]:
    def start(kind: type) -> Burst:
        guide = named(AutoImplicit(eight_schools_avb))
        guide.setup()
        elbo = AVB_ELBO(num_particles=32)
        adam = {"lr": 1e-3, "betas": (0.5, 0.999)}
        svi = kind(eight_schools_avb, guide, pyro.optim.Adam(adam), elbo)
        adversary = kind(eight_schools_avb, guide, pyro.optim.Adam(adam), elbo.adversary)
        return repeat(lambda: (adversary.step(), adversary.step(), svi.step()))

    return {"implicit": ours_and_pyro(start)}


NUM_GROUPS, NUM_OBSERVATIONS, NUM_SUBSAMPLED = 40, 2000, 200


def regression(x: Tensor, group: Tensor, y: Tensor) -> None:
    """Regress y on x with an intercept and a slope for each group, non-centred."""
    zero, one = x.new_zeros(()), x.new_ones(())
    intercept = pyro.sample("intercept", dist.Normal(zero, one))
    slope = pyro.sample("slope", dist.Normal(zero, one))
    intercept_scale = pyro.sample("intercept_scale", dist.HalfNormal(one))
    slope_scale = pyro.sample("slope_scale", dist.HalfNormal(one))
    noise = pyro.sample("noise", dist.HalfNormal(one))
    with pyro.plate("groups", NUM_GROUPS):
        a = pyro.sample("a", dist.Normal(zero, one))
        b = pyro.sample("b", dist.Normal(zero, one))
    intercepts, slopes = intercept + intercept_scale * a, slope + slope_scale * b
    with pyro.plate("data", len(x), subsample_size=NUM_SUBSAMPLED) as rows:
        mean = intercepts[group[rows]] + slopes[group[rows]] * x[rows]
        pyro.sample("y", dist.Normal(mean, noise), obs=y[rows])


def hierarchical() -> dict[str, list[Side]]:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, NUM_OBSERVATIONS, generator=generator)
    group = torch.arange(NUM_OBSERVATIONS) % NUM_GROUPS
    a, b = torch.randn(2, NUM_GROUPS, generator=generator)
    y = 0.5 + 0.3 * a[group] + (1 + 0.5 * b[group]) * x + 0.5 * noise

    def start(kind: type) -> Burst:
        guide = named(AutoNormal(regression))
        return svi_burst(kind, regression, guide, 1e-2, Trace_ELBO(), x, group, y)

    return {"hierarchical": ours_and_pyro(start)}


PIXELS, HIDDEN, LATENTS, BATCH = 784, 500, 20, 128


def random_pixels() -> Tensor:
    return (torch.rand(BATCH, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def bernoulli_vae() -> tuple[Callable, nn.Module]:
    """Return model and guide."""
    decoder = MLP(LATENTS, PIXELS, (HIDDEN, HIDDEN))
    name = f"decoder_{next(_numbers)}"

    def model(x: Tensor) -> None:
        pyro.module(name, decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model, Gaussian(MLP(PIXELS, HIDDEN, (HIDDEN,)), LATENTS)


def vae_burst(kind: type, loss: str) -> Burst:
    model, guide = bernoulli_vae()
    return svi_burst(kind, model, guide, 1e-3, LOSSES[loss](), random_pixels())


# The losses of `LOSSES` by hand, of data [N, pixels] and the networks.


def posterior(x: Tensor, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Return mean and log scale of q(z|x), [N, d] each."""
    loc, log_scale = encoder(x).chunk(2, -1)
    return loc, log_scale


def sample(loc: Tensor, log_scale: Tensor) -> Tensor:
    return loc + log_scale.exp() * torch.randn_like(loc)


def summed_kl(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return KL(q(z|x) ‖ N(0, I)), summed over the data."""
    return 0.5 * (loc.square() + (2 * log_scale).exp() - 1).sum() - log_scale.sum()


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """Return −log p(x|z), summed over the data."""
    return binary_cross_entropy_with_logits(logits, x, reduction="sum")


def beta_vae(x: Tensor, encoder: nn.Module, decoder: nn.Module) -> Tensor:
    loc, log_scale = posterior(x, encoder)
    return cross_entropy(decoder(sample(loc, log_scale)), x) + summed_kl(loc, log_scale)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (-squared / (2 * LATENTS)).exp()


def info_vae(x: Tensor, encoder: nn.Module, decoder: nn.Module) -> Tensor:
    loc, log_scale = posterior(x, encoder)
    z = sample(loc, log_scale)
    prior = torch.randn_like(z)
    n = len(z)
    within = (kernel(z, z).sum() + kernel(prior, prior).sum() - 2 * n) / (n * (n - 1))
    mmd = within - 2 * kernel(z, prior).mean()
    return cross_entropy(decoder(z), x) + summed_kl(loc, log_scale) + 9 * n * mmd


class GECO(nn.Module):
    """A mean squared error of at most 0.1² a pixel, with its moving average and multiplier."""

    multiplier: Tensor
    average: Tensor
    num_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("multiplier", torch.ones((), dtype=torch.float64))
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, encoder: nn.Module, decoder: nn.Module) -> Tensor:
        loc, log_scale = posterior(x, encoder)
        x_hat = decoder(sample(loc, log_scale)).sigmoid()
        error = (x - x_hat).square().mean() - 0.1**2
        now, multiplier = error.detach(), self.multiplier
        average = torch.where(self.num_steps == 0, now, self.average.lerp(now.double(), 0.01))
        # Not in place: under torch.compile (2.13) a double of no dimensions stays as it was.
        self.average = average
        self.multiplier = (multiplier * (0.3 * average).exp()).clamp(1e-6, 1e6)
        self.num_steps = self.num_steps + 1
        return summed_kl(loc, log_scale) + len(x) * multiplier * (error + average - now)


def iwae(x: Tensor, encoder: nn.Module, decoder: nn.Module) -> Tensor:
    loc, log_scale = posterior(x, encoder)
    noise = torch.randn(5, *loc.shape)
    z = loc + log_scale.exp() * noise
    logits = decoder(z)
    log_p = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    # The constants of the normal densities of z cancel.
    log_w = log_p + (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)
    return (math.log(5) - log_w.logsumexp(0)).sum()


def dvae(x: Tensor, encoder: nn.Module, decoder: nn.Module) -> Tensor:
    loc, log_scale = posterior(x + 0.1 * torch.randn_like(x), encoder)
    return cross_entropy(decoder(sample(loc, log_scale)), x) + summed_kl(loc, log_scale)


def grae(x: Tensor, encoder: nn.Module, decoder: nn.Module) -> Tensor:
    loc, _ = posterior(x, encoder)
    column = torch.randperm(LATENTS)[:1]
    unit = (torch.arange(LATENTS) == column).to(loc).expand_as(loc)
    # The column of the Jacobian. torch.func.jvp has no backward under torch.compile (2.13).
    vjp: Any = torch.func.vjp  # typed as if it could also return a third
    logits, pull = vjp(decoder, loc)
    _, push = vjp(pull, torch.zeros_like(logits))
    (slope,) = push((unit,))
    p = logits.sigmoid()
    w = (p * (1 - p) * slope.square()).sum(-1)
    return cross_entropy(logits, x) + 0.5 * loc.square().sum() + LATENTS / 2 * w.log1p().sum()


BY_HAND: dict[str, Callable[[Tensor, nn.Module, nn.Module], Tensor]] = {
    "BetaVAE_ELBO": beta_vae,
    "InfoVAE_ELBO": info_vae,
    "GECO_ELBO": GECO(),
    "IWAE_ELBO": iwae,
    "DVAE_ELBO": dvae,
    "GRAE_ELBO": grae,
}


def compiled_vae(loss: str) -> Burst:
    """Return bursts of the same VAE and loss as a PyTorch user writes them."""
    encoder = nn.Sequential(MLP(PIXELS, HIDDEN, (HIDDEN,)), nn.Linear(HIDDEN, 2 * LATENTS))
    decoder = MLP(LATENTS, PIXELS, (HIDDEN, HIDDEN))
    params = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
    loss_function = torch.compile(BY_HAND[loss])
    x = random_pixels()

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_function(x, encoder, decoder)
        loss.backward()
        optimizer.step()
        return loss.item()

    return repeat(step)


def vae(losses: list[str]) -> dict[str, list[Side]]:
    cases = {}
    for loss in losses:
        sides = ours_and_pyro(partial(vae_burst, loss=loss))
        by_hand = Side("PyTorch by hand, torch.compile", partial(compiled_vae, loss))
        cases[f"vae, {loss}"] = [*sides, by_hand]
    return cases


def digits() -> dict[str, list[Side]]:
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    batches = [batch for batch in pixels.split(64) if len(batch) == 64]

    def start(kind: type) -> Burst:
        decoder = MLP(8, 64, (64, 64))
        name = f"decoder_{next(_numbers)}"

        def model(x: Tensor) -> None:
            pyro.module(name, decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(8), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 0.25).to_event(1), obs=x)

        guide = Gaussian(MLP(64, 64, (64,)), 8)
        svi = kind(model, guide, pyro.optim.Adam({"lr": 1e-3}), BetaVAE_ELBO())
        coming = itertools.cycle(batches)
        return repeat(lambda: svi.step(next(coming)))

    return {"digits": ours_and_pyro(start)}


CASES: dict[str, Callable[[], dict[str, list[Side]]]] = {
    "full_rank": full_rank,
    "flow": flow,
    "implicit": implicit,
    "hierarchical": hierarchical,
    "digits": digits,
}
CASE_NAMES = ["full_rank", "flow", "implicit", "hierarchical", "vae", "digits", "memory"]


def step_times(cases: dict[str, list[Side]], rounds: int, seconds: float) -> None:
    """Measure and print case by case, then what was warned of."""
    table(["case", "side", "first step, s", "step, µs", "times faster ours is"])
    heard = []
    for case, sides in cases.items():
        figures = measure(sides, rounds, seconds)
        ours = figures[0].rounds
        for side, (first, found, complaints) in zip(sides, figures, strict=True):
            ratio = statistics.median(a / b for a, b in zip(found, ours, strict=True))
            times = "" if found is ours else f"{ratio:.2f}×"
            row(case, side.label, f"{first:.2f}", f"{1e6 * statistics.median(found):,.1f}", times)
            heard += [f"- {case}, {side.label}: {text}" for text in complaints]
    if heard:
        print("\nWarnings:\n\n" + "\n".join(heard), flush=True)


# -- memory ---------------------------------------------------------------------------------------


def peak_mib() -> float:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux starts ru_maxrss at what the parent held: the benchmark, with all its libraries.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def memory_one(side: str) -> None:
    """In a process of its own: print the peak before, with and after the first step."""
    imported = peak_mib()
    if side == "by hand":
        burst = compiled_vae("BetaVAE_ELBO")
    else:
        burst = vae_burst(pyro_vae.SVI, "BetaVAE_ELBO")
    burst(MEMORY_STEPS)
    peak = peak_mib()
    later = float("nan")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    except OSError:
        pass
    else:
        burst(MEMORY_STEPS)
        later = peak_mib()
    print(json.dumps([imported, peak, later]))


def memory() -> None:
    """Measure each side in a fresh process."""
    table(["case", "side", "peak, MiB", "of later steps", "of the imports"])
    for side, label in (("ours", "pyro_vae.SVI"), ("by hand", "PyTorch by hand, torch.compile")):
        command = [sys.executable, __file__, "--memory-one", side]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"memory, {label}: {done.stderr}")
        imported, peak, later = json.loads(done.stdout.splitlines()[-1])
        row("memory", label, f"{peak:,.0f}", f"{later:,.0f}", f"{imported:,.0f}")


# -- growth ---------------------------------------------------------------------------------------


def with_sites(num_sites: int) -> Callable[[type], Burst]:
    def model() -> None:
        total = sum(
            pyro.sample(f"z{i}", dist.Normal(torch.zeros(()), 1.0)) for i in range(num_sites)
        )
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.ones(()))

    return lambda kind: svi_burst(kind, model, named(AutoNormal(model)), 1e-2, Trace_ELBO())


def with_plate(size: int) -> Callable[[type], Burst]:
    y = torch.randn(size, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return lambda kind: svi_burst(kind, model, named(AutoNormal(model)), 1e-2, Trace_ELBO(), y)


def with_particles(num_particles: int) -> Callable[[type], Burst]:
    def start(kind: type) -> Burst:
        loss = Trace_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)
        guide = named(AutoMultivariateNormal(eight_schools_avb))
        return svi_burst(kind, eight_schools_avb, guide, 1e-2, loss)

    return start


def growth(path: str, rounds: int, seconds: float) -> None:
    """Measure, print and plot how the step time grows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("latent sites", with_sites, SITES, "AutoNormal"),
        ("plate size", with_plate, PLATE_SIZES, "AutoNormal, one latent a row"),
        ("particles", with_particles, PARTICLES, "Eight Schools, full rank, vectorised"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    table(
        ["grows", "size", "first step of ours, s", "ours, µs", "Pyro, µs", "times faster ours is"]
    )
    for axis, (label, start, sizes, note) in zip(axes, panels, strict=True):
        found: list[tuple[float, float]] = []
        for size in sizes:
            ours, pyros = measure(ours_and_pyro(start(size)), rounds, seconds)
            ratio = statistics.median(b / a for a, b in zip(ours.rounds, pyros.rounds, strict=True))
            found.append((statistics.median(ours.rounds), statistics.median(pyros.rounds)))
            times = [f"{1e6 * x:,.1f}" for x in found[-1]]
            row(label, f"{size:,}", f"{ours.first:.2f}", *times, f"{ratio:.2f}×")
            for text in ours.complaints:
                print(f"{label} {size}: {text}", file=sys.stderr)
        axis.loglog(sizes, [1e6 * a for a, _ in found], "o-", label="pyro_vae.SVI")
        axis.loglog(sizes, [1e6 * b for _, b in found], "s--", label="pyro.infer.SVI")
        axis.set(xlabel=label, ylabel="µs a step", title=note)
        axis.title.set_size(9)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# -- the command line -----------------------------------------------------------------------------


def _names(kind: str, text: str, known: list[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"--{kind}: found {name!r}; expected some of {','.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASE_NAMES), help="by default all")
    parser.add_argument("--losses", default=",".join(LOSSES), help="of the case vae")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a side in a round")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--growth", metavar="FILE.png", help="plot step time against size")
    parser.add_argument("--memory-one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = _names("cases", options.cases, CASE_NAMES)
    losses = _names("losses", options.losses, list(LOSSES))
    for option in ("rounds", "threads"):
        if getattr(options, option) < 1:
            found = getattr(options, option)
            raise SystemExit(f"--{option}: found {found}; expected at least 1")
    torch.set_num_threads(options.threads)
    if options.memory_one:
        memory_one(options.memory_one)
        return
    cores, threads = os.cpu_count(), torch.get_num_threads()
    print(f"{cores} cores, {threads} torch threads, load {os.getloadavg()[0]:.1f} at the start")
    if options.growth:
        growth(options.growth, options.rounds, options.seconds)
        return
    timed: dict[str, list[Side]] = {}
    for case in cases:
        if case != "memory":
            timed |= vae(losses) if case == "vae" else CASES[case]()
    if timed:
        step_times(timed, options.rounds, options.seconds)
    if "memory" in cases:
        memory()


if __name__ == "__main__":
    main()
