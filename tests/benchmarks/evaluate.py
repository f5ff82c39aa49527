"""Annealed importance sampling of many images at once, beside a loop over images; memory.

    python tests/benchmarks/evaluate.py [--cases a,b] [--rounds N] [--threads N] [--images N]
                                        [--temperatures T] [--chains C] [--device cuda]
    python tests/benchmarks/evaluate.py --growth FILE.png

The cases are Bernoulli models with an untrained decoder, whose weights make no difference to the
time: *small*, 4-128-64 on 8×8 images; *digits*, 8-256-256-64, what `pyro-vae train` has by default;
*mnist*, 40-500-500-784.

The sides:

*ours*: `pyro_vae.evaluate.ais`, all images and chains as one batch, with `compile=True` and
without; its compilation is timed beside, with torch's cache of compiled code as it is.

*loop by hand*: plain eager PyTorch, one image after another, its chains as one batch: the decoder
without Pyro, autograd for the gradient, the same schedule, leapfrog steps and adaptation.

*loop of ours*: `ais` on one image after another, its programs captured once.

How it is measured: `--rounds` rounds in which the sides take turns; times are medians, ratios
medians of a round's ratios. The loops run a few images and a share of the temperatures and are
scaled up: every temperature and image costs the same. Ours runs a share of the temperatures too.
The estimates are printed beside ELBO and IWAE of an untrained guide, to show that all is in order.

`--growth` plots the peak memory of MMD, IWAE and AIS against the number of examples or particles,
with `chunk_size` fixed and without chunks, each in a process of its own. All print Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae.ais import _forward_chunks, _Settings
from pyro_vae.evaluate import aggregate_mmd, ais, elbo, iwae
from pyro_vae.guides import Gaussian
from pyro_vae.joint import Joint
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLP

CASES: dict[str, tuple[int, tuple[int, ...], int]] = {
    "small": (4, (128,), 64),
    "digits": (8, (256, 256), 64),
    "mnist": (40, (500, 500), 784),
}
LEAPFROG_STEPS = 10
LOOP_IMAGES = 2


def make(case: str, device: str) -> tuple[VAE, Gaussian]:
    d, hidden, pixels = CASES[case]
    torch.manual_seed(0)
    model = VAE(MLP(d, pixels, hidden), Bernoulli(), d, (pixels,))
    guide = Gaussian(MLP(pixels, hidden[-1], hidden[::-1]), d)
    return model.to(device), guide.to(device)


def by_hand(model: VAE, x: Tensor, betas: list[float], num_chains: int) -> Tensor:
    """Anneal the chains of one image [D] in eager PyTorch; return their log weights."""
    decoder, d = model.decoder, model.latent_dim
    x = x.expand(num_chains, -1)

    def densities(z: Tensor) -> tuple[Tensor, Tensor]:
        logits = decoder(z)
        log_likelihood = (x * logits - softplus(logits)).sum(-1)
        return -z.square().sum(-1) / 2, log_likelihood

    def gradient(z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_prior, log_likelihood = densities(z)
            (found,) = torch.autograd.grad((log_prior + beta * log_likelihood).sum(), z)
        return found, log_prior.detach(), log_likelihood.detach()

    z = torch.randn(num_chains, d, device=x.device)
    log_weights = torch.zeros(num_chains, dtype=torch.float64, device=x.device)
    step_size = torch.full((num_chains, 1), 0.1, device=x.device)
    log_prior, log_likelihood = densities(z)
    for before, beta in itertools.pairwise(betas):
        log_weights += (beta - before) * log_likelihood.double()
        momentum = torch.randn_like(z)
        energy = -log_prior - beta * log_likelihood + momentum.square().sum(-1) / 2
        new = z
        force, _, _ = gradient(new, beta)
        for _ in range(LEAPFROG_STEPS):
            momentum = momentum + step_size / 2 * force
            new = new + step_size * momentum
            force, new_prior, new_likelihood = gradient(new, beta)
            momentum = momentum + step_size / 2 * force
        after = -new_prior - beta * new_likelihood + momentum.square().sum(-1) / 2
        accept_prob = (energy - after).clamp(max=0).exp()
        accepted = torch.rand_like(accept_prob) < accept_prob
        z = torch.where(accepted.unsqueeze(-1), new, z)
        log_prior = torch.where(accepted, new_prior, log_prior)
        log_likelihood = torch.where(accepted, new_likelihood, log_likelihood)
        step_size = step_size * (0.2 * (accept_prob.unsqueeze(-1) - 0.65)).exp()
        step_size = step_size.clamp(1e-4, 1.0)
    return log_weights


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def prepared(
    model: VAE, x: Tensor, share: int, num_chains: int, *, compile: bool
) -> tuple[Callable[[], object], float]:
    """Return what runs our chains over a share of the temperatures, and the seconds to make it."""
    device = str(x.device)
    start = time.perf_counter()
    settings = _Settings(share, num_chains, LEAPFROG_STEPS, 0.65, 4096, compile, len(x))
    joint = Joint(model, x)
    with torch.no_grad():
        annealer = settings.annealer(joint, x)

    @torch.no_grad()
    def run() -> None:
        for _ in _forward_chunks(joint, annealer, settings, x):
            pass

    run()
    synchronize(device)
    return run, time.perf_counter() - start


def speed(options: argparse.Namespace) -> None:
    images, temperatures, chains = options.images, options.temperatures, options.chains
    print(
        f"AIS of {images} images, {temperatures} temperatures, {chains} chains, "
        f"{LEAPFROG_STEPS} leapfrog steps; seconds, {torch.get_num_threads()} threads, "
        f"{options.device}\n"
    )
    print(
        "| case | ours, compiled | (first call) | ours, not | loop by hand | loop of ours |", end=""
    )
    print(" by hand / ours | ours looped / ours |")
    print("|---" * 8 + "|", flush=True)
    for case in options.cases.split(","):
        model, guide = make(case, options.device)
        with torch.no_grad():
            x = model.sample(images)
        share = max(2, temperatures // 20)
        scale = temperatures / share
        compiled, first = prepared(model, x, share, chains, compile=True)
        plain, _ = prepared(model, x, share, chains, compile=False)
        looped, _ = prepared(model, x[:1], share, chains, compile=False)
        betas = torch.linspace(0, 1, share + 1).tolist()

        def hand(model: VAE = model, x: Tensor = x, betas: list[float] = betas) -> None:
            for row in x[:LOOP_IMAGES]:
                by_hand(model, row, betas, chains)

        sides: list[tuple[Callable[[], object], float]] = [
            (compiled, scale),
            (plain, scale),
            (hand, scale * images / LOOP_IMAGES),
            (looped, scale * images),
        ]
        hand()
        rounds = [
            [timed(work, options.device) * factor for work, factor in sides]
            for _ in range(options.rounds)
        ]
        a, b, c, e = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(r[2] / min(r[:2]) for r in rounds)
        own = statistics.median(r[3] / min(r[:2]) for r in rounds)
        print(
            f"| {case} | {a:.1f} | {first:.1f} | {b:.1f} | {c:.0f} | {e:.0f} | {ratio:.1f}× "
            f"| {own:.1f}× |",
            flush=True,
        )
        few = x[:20]
        found = ais(model, few, 100, chains).log_evidence
        beside = elbo(model, guide, few, 100).elbo, iwae(model, guide, few, 5000)
        hand_value = torch.stack([by_hand(model, row, betas, chains) for row in few[:5]])
        mean = (hand_value.detach().logsumexp(1) - torch.tensor(float(chains)).log()).mean()
        print(
            f"  log p(x) of 20 images, 100 temperatures: AIS {found}; ELBO {beside[0]}, "
            f"IWAE-5000 {beside[1]}; of 5 by hand, {share} temperatures: {float(mean):.5g}",
            file=sys.stderr,
            flush=True,
        )


# --- memory --------------------------------------------------------------------------------------

SIZES = {
    "MMD": [1000, 4000, 8000, 16000],
    "IWAE": [500, 1000, 2000, 5000],
    "AIS": [100, 400, 800, 1600],
}
LABELS = {
    "MMD": "examples",
    "IWAE": "particles, 50 examples",
    "AIS": "examples, 5 chains each",
}
CHUNK_SIZE = {"MMD": 1 << 20, "IWAE": 4096, "AIS": 1024}
UNLIMITED_UP_TO = {"MMD": 8000, "IWAE": 2000, "AIS": 1600}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> float:
    """Return a number of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(name)


def worker(what: str, size: int, chunk_size: int) -> None:
    """Print the peak memory of one estimate, above what the process held before, in MB."""
    case = "mnist"
    model, guide = make(case, "cpu")
    num = 50 if what == "IWAE" else size
    x = torch.bernoulli(torch.full((num, CASES[case][2]), 0.3))

    def run(x: Tensor, size: int) -> None:
        if what == "MMD":
            aggregate_mmd(model, guide, x, chunk_size=chunk_size)
        elif what == "IWAE":
            iwae(model, guide, x, size, chunk_size=chunk_size)
        else:
            ais(model, x, 2, 5, num_leapfrog_steps=2, chunk_size=chunk_size, compile=False)

    run(x[:20], 2)  # what is loaded once
    reset_peak()
    before = status("VmRSS")
    run(x, size)
    print(json.dumps(status("VmHWM") - before))


def growth(path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    print("| estimate | | chunk_size | MB above the start |\n|---|---|---|---|", flush=True)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axis, (what, sizes) in zip(axes, SIZES.items(), strict=True):
        for chunk_size, label in ((CHUNK_SIZE[what], "chunks"), (1 << 40, "all at once")):
            shown = [s for s in sizes if label == "chunks" or s <= UNLIMITED_UP_TO[what]]
            peaks = []
            for size in shown:
                command = [sys.executable, __file__, "--worker", f"{what},{size},{chunk_size}"]
                found = subprocess.run(command, check=True, capture_output=True, text=True)
                peaks.append(json.loads(found.stdout))
                chunks = chunk_size if label == "chunks" else "all at once"
                print(
                    f"| {what} | {size} {LABELS[what]} | {chunks} | {peaks[-1]:.0f} |", flush=True
                )
            text = f"chunk_size={chunk_size}" if label == "chunks" else label
            axis.plot(shown, peaks, "o-" if label == "chunks" else "s--", label=text)
        axis.set(xscale="log", yscale="log", xlabel=LABELS[what], ylabel="peak memory [MB]")
        axis.set_title(what)
        axis.grid(True, alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--temperatures", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--growth", metavar="FILE.png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        what, size, chunk_size = options.worker.split(",")
        worker(what, int(size), int(chunk_size))
    elif options.growth:
        growth(options.growth)
    else:
        speed(options)


if __name__ == "__main__":
    main()
