"""Pictures of posteriors and of the way to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["plot_convergence", "plot_marginals"]

NUM_BINS = 120
CONTOUR_MASSES = (0.95, 0.8, 0.5, 0.2)


def plot_marginals(
    draws: Mapping[str, Mapping[str, NDArray]],
    pairs: Sequence[tuple[str, str]],
) -> Figure:
    """Draw marginals of several posteriors side by side, one column each, on common axes.

    Args:
        draws: By name of the posterior, by name of the coordinate: draws [n]. The last posterior
            sets the range of the axes: put the reference there.
        pairs: Names of the two coordinates of each row. A pair of twice the same is a histogram.

    Returns:
        A figure, unknown to pyplot.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), figure 4
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> rng = np.random.default_rng(0)
        >>> draws = {"a": rng.normal(size=(2, 500)), "b": rng.normal(size=(2, 500))}
        >>> draws = {name: dict(zip("xy", x)) for name, x in draws.items()}
        >>> len(plot_marginals(draws, [("x", "y")]).axes)
        2
    """
    rows, columns = len(pairs), len(draws)
    figure = Figure(figsize=(2.3 * columns + 0.6, 2.3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="row", sharey="row")
    reference = list(draws.values())[-1]
    for row, (a, b) in enumerate(pairs):
        ranges = [_axis_range(reference[name]) for name in (a, b)]
        for column, (label, values) in enumerate(draws.items()):
            axis = axes[row, column]
            if a == b:
                _histogram(axis, values[a], ranges[0])
            else:
                _density(axis, values[a], values[b], ranges)
            if row == 0:
                axis.set_title(label)
            axis.set_xlabel(a)
            if column == 0:
                axis.set_ylabel("density" if a == b else b)
    return figure


def plot_convergence(
    curves: Mapping[str, Sequence[tuple[int, float]]], baseline: float | None = None
) -> Figure:
    """Draw the KL divergence to the reference against optimisation steps, a line a guide.

    Args:
        curves: By name of the guide: pairs of step and KL, in nats.
        baseline: KL of the reference against itself, the estimator's own bias.

    Returns:
        A figure, unknown to pyplot.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), figure 3
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> figure = plot_convergence({"flow": [(0, 3.0), (100, 0.1)]}, baseline=0.01)
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['flow', 'reference against itself']
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for label, curve in curves.items():
        steps, values = [step for step, _ in curve], [value for _, value in curve]
        axis.plot(steps, values, marker=".", label=label)
    if baseline is not None:
        axis.axhline(baseline, color="black", linestyle=":", label="reference against itself")
    # Near the reference the estimate scatters around zero: linear there, logarithmic above.
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xlabel("optimisation steps")
    axis.set_ylabel("KL to the reference [nats]")
    axis.legend()
    return figure


def _axis_range(x: NDArray) -> tuple[float, float]:
    # Not further out: a heavy tail would press everything else into a corner.
    low, high = np.quantile(x, [0.01, 0.99])
    margin = 0.25 * (high - low) + 1e-6
    return float(low - margin), float(high + margin)


def _histogram(axis, x: NDArray, limits: tuple[float, float]) -> None:  # type: ignore[no-untyped-def]
    """Draw a histogram; its area is the share of the draws within the limits."""
    counts, edges = np.histogram(x, bins=NUM_BINS // 2, range=limits)
    axis.stairs(counts / (len(x) * np.diff(edges)), edges, fill=True)
    axis.set_xlim(*limits)
    if not counts.any():
        _say_empty(axis)


def _say_empty(axis) -> None:  # type: ignore[no-untyped-def]
    axis.text(0.5, 0.5, "no draws here", transform=axis.transAxes, ha="center", color="gray")


def _density(axis, a: NDArray, b: NDArray, ranges: list[tuple[float, float]]) -> None:  # type: ignore[no-untyped-def]
    """Shade a smoothed histogram; its levels hold 95, 80, 50 and 20 percent of the draws."""
    counts, a_edges, b_edges = np.histogram2d(a, b, bins=NUM_BINS, range=ranges)
    density = gaussian_filter(counts.T, sigma=3.0)
    axis.set_xlim(*ranges[0])
    axis.set_ylim(*ranges[1])
    if not density.any():  # the range is the reference's
        _say_empty(axis)
        return
    descending = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(descending) / descending.sum()
    levels = np.unique(descending[np.searchsorted(mass, CONTOUR_MASSES)])
    centers = [(edges[:-1] + edges[1:]) / 2 for edges in (a_edges, b_edges)]
    axis.contourf(*centers, density, levels=[*levels, density.max() * 1.001], cmap="viridis")
    axis.contour(*centers, density, levels=levels, colors="white", linewidths=0.4)
