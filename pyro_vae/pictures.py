"""Pictures of a variational autoencoder: samples, reconstructions, latents, traversals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from . import evaluate
from .checkpoint import replacing
from .joint import Joint, check_least, chunks, evaluation_mode
from .mcmc import HMC

__all__ = [
    "picture_run",
    "plot_latents",
    "plot_posteriors",
    "plot_reconstructions",
    "plot_samples",
    "save_figure",
    "save_samples",
    "save_traversals",
    "traverse",
]

NUM_SAMPLES, NUM_COLUMNS = 64, 16
MASSES = (0.95, 0.8, 0.5)  # that contours hold
NUM_BINS = 100
GRID = 150  # points a side, for a posterior of up to two dimensions
HMC_CHAINS, HMC_SAMPLES, HMC_WARMUP = 64, 150, 200


def plot_samples(x: Tensor, columns: int = 8, title: str = "") -> Figure:
    r"""Draw images in a grid; data that are no images as lines, or points of two dimensions.

    Args:
        x: Images [N, C, H, W] or vectors [N, D].
        columns: Of the grid.
        title: Over it.

    Returns:
        A figure, unknown to pyplot.

    Example:
        >>> len(plot_samples(torch.rand(16, 1, 8, 8)).axes)
        1
    """
    return _pictures([x], columns=columns, title=title)


def plot_reconstructions(x: Tensor, x_hat: Tensor) -> Figure:
    r"""Draw originals above their reconstructions.

    Args:
        x: Images [N, C, H, W] or vectors [N, D].
        x_hat: Their reconstructions, of the same shape.

    Returns:
        A figure, unknown to pyplot.

    Example:
        >>> len(plot_reconstructions(torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)).axes)
        1
    """
    return _pictures([x, x_hat], columns=len(x), labels=("original", "reconstruction"))


def _pictures(
    rows: list[Tensor], columns: int, labels: tuple[str, ...] = ("samples",), title: str = ""
) -> Figure:
    if rows[0].dim() != 4:
        arrays = [row.detach().cpu().double().flatten(1).numpy() for row in rows]
        return _vectors(arrays, labels, title)
    images = torch.cat(rows).detach().float().cpu()
    low, high = images.min().clamp(max=0), images.max().clamp(min=1)
    if images.shape[1] != 3:
        images = images[:, :1]
    images = (images - low) / (high - low)
    n, channels, height, width = images.shape
    columns = min(columns, n)
    num_rows = -(-n // columns)
    tiled = torch.ones(num_rows * columns, channels, height + 1, width + 1)
    tiled[:n, :, :height, :width] = images
    tiled = tiled.reshape(num_rows, columns, channels, height + 1, width + 1)
    picture = tiled.permute(0, 3, 1, 4, 2).reshape(num_rows * (height + 1), -1, channels)
    figure = Figure(figsize=(0.5 * columns + 0.2, 0.5 * num_rows + 0.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(title, fontsize=8)
    return figure


def _vectors(arrays: list[NDArray], labels: tuple[str, ...], title: str) -> Figure:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    for index, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        if array.shape[1] == 2:
            axis.plot(*array.T, ".", label=label)
        else:
            axis.plot(array.T, color=f"C{index}", alpha=0.4)
            axis.plot([], color=f"C{index}", label=label)
    axis.set_title(title)
    axis.legend()
    return figure


def plot_latents(
    draws: Tensor, prior: Tensor, means: Tensor, labels: Tensor | None = None
) -> Figure:
    r"""Draw contours of q(z) against those of the prior, and the examples' means by label.

    Of more than two dimensions, the two principal components of the means.

    Args:
        draws: From q(z) [M, d].
        prior: Draws from p(z) [M', d].
        means: E[z|x] of examples [N, d].
        labels: Their classes [N].

    Returns:
        A figure, unknown to pyplot.

    Example:
        >>> z = torch.randn(500, 3)
        >>> len(plot_latents(z, torch.randn(500, 3), z[:50]).axes)
        2
    """
    q, p, m = (t.detach().cpu().double().numpy() for t in (draws, prior, means))
    names = ("z[0]", "z[1]")
    if m.shape[1] > 2:
        centre = m.mean(0)
        _, size, directions = np.linalg.svd(m - centre, full_matrices=False)
        share = size[:2] ** 2 / max(float((size**2).sum()), 1e-300)
        q, p, m = ((a - centre) @ directions[:2].T for a in (q, p, m))
        first, second = (f"component {i + 1}, {100 * part:.0f} %" for i, part in enumerate(share))
        names = (first, second)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if m.shape[1] == 1:
        for a, label in ((q, "q(z)"), (p, "p(z)")):
            left.hist(a[:, 0], bins=NUM_BINS, density=True, histtype="step", label=label)
        left.set(xlabel=names[0], ylabel="density")
        m = np.concatenate([m, np.zeros_like(m)], 1)
        names = (names[0], "")
    else:
        ranges = [_range(np.concatenate([q[:, i], p[:, i]])) for i in (0, 1)]
        _contours(left, p, ranges, "gray", "p(z)")
        _contours(left, q, ranges, "C0", "q(z)")
        left.set(xlabel=names[0], ylabel=names[1])
    left.legend()
    colours = None if labels is None else labels.cpu().numpy()
    points = right.scatter(
        m[:, 0], m[:, 1], c=colours, s=5, cmap="tab10" if colours is not None else None
    )
    if colours is not None:
        figure.colorbar(points, ax=right, label="label")
    right.set(xlabel=names[0], ylabel=names[1], title="E[z|x]")
    return figure


@torch.no_grad()
def plot_posteriors(
    model: Callable, guide: Callable, x: Tensor, *, chunk_size: int = 4096
) -> tuple[Figure, str]:
    r"""Draw the true posterior p(z|x) of a few examples beside q(z|x).

    On a grid for one or two latent dimensions; else by draws of our HMC, in the two dimensions that
    differ most from the prior.

    Args:
        model: As in :func:`pyro_vae.evaluate.elbo`.
        guide: As in :func:`pyro_vae.evaluate.elbo`.
        x: Examples [N, \*event], a column each.
        chunk_size: How many latents are decoded at once.

    Returns:
        A figure, unknown to pyplot, and how the truth was found: the grid, or HMC and what its
        checks say.

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> from pyro_vae.nn import MLP
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> figure, how = plot_posteriors(model, Gaussian(MLP(16, 8), 2), torch.ones(2, 16))
        >>> len(figure.axes), how
        (2, 'on a grid')
    """
    joint = Joint(model, x)
    d, count = joint.latent_dim, len(x)
    with evaluation_mode(model, guide):
        q = evaluate.latents(model, guide, x, num_draws=4000, chunk_size=chunk_size)
        if d > 2:
            truth, how = _hmc(joint, x)
        else:
            how = "on a grid"
    figure = Figure(figsize=(3 * count + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for index, axis in enumerate(axes):
        draws = q[:, index].cpu().double().numpy()
        if d == 1:
            (points,), density = _grid(joint, x[index], draws, chunk_size)
            axis.plot(points, density, color="black", label="p(z|x)")
            axis.hist(draws[:, 0], bins=60, density=True, histtype="step", label="q(z|x)")
            axis.set_xlabel("z")
        elif d == 2:
            grid, density = _grid(joint, x[index], draws, chunk_size)
            _filled(axis, grid, density)
            ranges = [(float(p[0]), float(p[-1])) for p in grid]
            _contours(axis, draws, ranges, "C1", "q(z|x)")
            axis.set(xlabel="z[0]", ylabel="z[1]")
        else:
            true = truth[:, index]
            shown = np.sort(np.argsort(true.var(0))[:2])  # that x tells most of
            true, draws = true[:, shown], draws[:, shown]
            ranges = [_range(np.concatenate([true[:, i], draws[:, i]])) for i in (0, 1)]
            _filled(axis, *_histogram(true, ranges))
            _contours(axis, draws, ranges, "C1", "q(z|x)")
            axis.set(xlabel=f"z[{shown[0]}]", ylabel=f"z[{shown[1]}]")
        if index == 0:
            axis.legend()
    return figure, how


def _hmc(joint: Joint, x: Tensor) -> tuple[NDArray, str]:
    """Draw from p(z|x) of all examples [S, N, d]; say what the checks of the draws found."""

    def target() -> None:
        with pyro.plate("examples", len(x), dim=-1):
            z = pyro.sample("z", joint.prior(len(x)))
            pyro.factor("x", joint.log_likelihood(z, x))

    seed = int(torch.randint(1 << 31, ()))
    mcmc = HMC(
        target, HMC_CHAINS, HMC_SAMPLES, HMC_WARMUP, compile=False, progress=False, seed=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict says it
        mcmc.run()
        verdict = mcmc.check()
    checks = "which passed its checks" if verdict.passed else "which FAILED its checks"
    return mcmc.get_samples()["z"].cpu().double().numpy(), f"by HMC, {checks}"


@torch.no_grad()
def _grid(
    joint: Joint, x: Tensor, draws: NDArray, chunk_size: int
) -> tuple[list[NDArray], NDArray]:
    """Return the axes and the density of p(z|x) where it has its mass, and the draws too."""
    d = joint.latent_dim
    corners = [(min(-5.0, a), max(5.0, b)) for a, b in zip(draws.min(0), draws.max(0), strict=True)]
    points: list[NDArray] = []
    density = np.zeros(0)
    for _ in range(3):  # each time closer
        points = [np.linspace(a, b, GRID if d == 2 else 10 * GRID) for a, b in corners]
        mesh = np.stack(np.meshgrid(*points, indexing="ij"), -1).reshape(-1, 1, d)
        z = torch.as_tensor(mesh, dtype=joint.prior(1).sample().dtype, device=x.device)
        parts = [
            (joint.log_likelihood(z[part], x[None]) + joint.log_prior(z[part]))[:, 0]
            for part in chunks(len(z), chunk_size)
        ]
        log_density = torch.cat(parts).double().cpu().numpy().reshape([len(p) for p in points])
        density = np.exp(log_density - log_density.max())
        corners = []
        for axis, p in enumerate(points):
            there = density.max(axis=tuple(i for i in range(d) if i != axis)) > 1e-4
            inside = p[there]
            step = p[1] - p[0]
            low, high = np.quantile(draws[:, axis], [0.005, 0.995])
            corners.append((min(inside[0] - step, low), max(inside[-1] + step, high)))
    volume = math.prod(p[1] - p[0] for p in points)
    return points, density / (density.sum() * volume)


def _range(values: NDArray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.2 * (high - low) + 1e-6
    return float(low - margin), float(high + margin)


def _histogram(points: NDArray, ranges: list[tuple[float, float]]) -> tuple[list[NDArray], NDArray]:
    a, b = points.T
    counts, *edges = np.histogram2d(a, b, bins=NUM_BINS, range=ranges)
    return [(e[:-1] + e[1:]) / 2 for e in edges], gaussian_filter(counts, sigma=2.5)


def _levels(density: NDArray) -> NDArray:
    descending = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(descending) / descending.sum()
    return np.unique(descending[np.searchsorted(mass, MASSES)])


def _contours(
    axis: Any, points: NDArray, ranges: list[tuple[float, float]], colour: str, label: str
) -> None:
    """Draw contours that hold 95, 80 and 50 percent of the draws."""
    centers, density = _histogram(points, ranges)
    if density.any():
        axis.contour(*centers, density.T, levels=_levels(density), colors=colour, linewidths=1.2)
    axis.plot([], color=colour, label=label)


def _filled(axis: Any, points: list[NDArray], density: NDArray) -> None:
    levels = [*_levels(density), density.max() * 1.001]
    axis.contourf(*points, density.T, levels=levels, cmap="Greys", alpha=0.8)
    axis.plot([], color="gray", linewidth=6, label="p(z|x)")


@torch.no_grad()
def picture_run(model: Any, guide: Any, x: Tensor, y: Tensor | None = None) -> dict[str, Figure]:
    """Draw samples, reconstructions (under their originals) and latents, by name.

    Args:
        model: A :class:`~pyro_vae.models.VAE`.
        guide: An amortised guide.
        x: Data [N, *event_shape].
        y: Classes [N].
    """
    z = guide.sample_latent(x)
    few = x[:NUM_COLUMNS]
    means = model.sample(NUM_SAMPLES) if model.autoregressive else _means(model, NUM_SAMPLES)
    return {
        "samples": plot_samples(means, NUM_COLUMNS, "E[x|z], z from the prior"),
        "reconstructions": plot_reconstructions(few, model.reconstruct(z[: len(few)])),
        "latents": plot_latents(z, model.prior().sample((20 * len(z),)), z, y),
    }


def _means(model: Any, num: int) -> Tensor:
    return model.reconstruct(model.prior().sample((num,)))


@torch.no_grad()
def traverse(model: Any, z: Tensor, *, num_steps: int = 11, extent: float = 2.5) -> Tensor:
    r"""Decode z with one coordinate at a time moved from −extent to extent.

    Args:
        model: A :class:`~pyro_vae.models.VAE`.
        z: Where to start [d].
        num_steps: Steps of each coordinate.
        extent: How far from 0, in standard deviations of the prior.

    Returns:
        E[x|z] [d, num_steps, *event_shape].

    Example:
        >>> from pyro_vae.runs import Config, ModelConfig, build
        >>> model, _, _ = build(Config(ModelConfig(latent_dim=3, event_shape=[1, 8, 8])))
        >>> traverse(model, torch.zeros(3)).shape
        torch.Size([3, 11, 1, 8, 8])
    """
    d = len(z)
    places = torch.linspace(-extent, extent, num_steps, dtype=z.dtype, device=z.device)
    moved = z.expand(d, num_steps, d).clone()
    moved[range(d), :, range(d)] = places
    return model.reconstruct(moved.reshape(-1, d)).unflatten(0, (d, num_steps))


@torch.no_grad()
def save_samples(model: Any, num: int, seed: int, out: Path) -> None:
    """Write draws from the model: samples.npz with x and their means and z, samples.png.

    Args:
        model: A :class:`~pyro_vae.models.VAE`.
        num: How many.
        seed: Of the draws.
        out: Directory.
    """
    check_least(num=(num, 1), seed=(seed, 0))
    if seed >= 1 << 64:
        raise ValueError(f"seed must be below 2^64, found {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        z = model.prior().sample((num,))
        x = model.sample(num, z=z)
        means = x if model.autoregressive else model.reconstruct(z)
    arrays = {"x": x, "mean": means, "z": z}
    with replacing(out / "samples.npz") as partial_path, partial_path.open("wb") as file:
        np.savez_compressed(file, **{name: value.cpu().numpy() for name, value in arrays.items()})
    save_figure(plot_samples(means, NUM_COLUMNS), out / "samples.png")


@torch.no_grad()
def save_traversals(
    model: Any, guide: Any, x: Tensor, num_steps: int, extent: float, out: Path
) -> None:
    """Write traversals.png: a row for each latent, moved from where x lies.

    Args:
        model: A :class:`~pyro_vae.models.VAE`.
        guide: An amortised guide.
        x: One example [1, *event_shape].
        num_steps: Steps of each latent.
        extent: How far from 0.
        out: Directory.
    """
    if num_steps < 2 or not extent > 0:
        raise ValueError(
            f"expected at least 2 steps and a positive extent, found {num_steps} and {extent}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        images = traverse(
            model, guide.sample_latent(x)[0], num_steps=num_steps, extent=extent
        ).flatten(0, 1)
    title = f"one latent a row, from −{extent:g} to {extent:g}"
    save_figure(plot_samples(images, num_steps, title), out / "traversals.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as partial_path:
        figure.savefig(partial_path, format="png", dpi=120)
