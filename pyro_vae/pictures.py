"""Pictures of a variational autoencoder: samples, reconstructions, latents, traversals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .checkpoint import replacing

__all__ = [
    "draw_grid",
    "draw_latents",
    "picture_run",
    "save_samples",
    "save_traversals",
    "traverse",
]

NUM_SAMPLES, NUM_COLUMNS = 64, 16


def draw_grid(images: Tensor, num_columns: int, title: str = "") -> Figure:
    """Draw images in a grid; vectors as points, by their first two elements.

    Args:
        images: Images [N, C, H, W] in [0, 1], of one or three channels, or vectors [N, D].
        num_columns: Images in a row.
        title: Over the grid.

    Returns:
        A figure, unknown to pyplot.

    Example:
        >>> len(draw_grid(torch.rand(10, 1, 8, 8), 5).axes)
        1
    """
    images = images.detach().float().cpu()
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        figure = Figure(figsize=(4, 4), layout="constrained")
        points = images.flatten(1)
        axis = figure.subplots()
        axis.scatter(points[:, 0], points[:, min(1, points.shape[1] - 1)], s=6)
        axis.set(xlabel="x₁", ylabel=f"x{'₂' if points.shape[1] > 1 else '₁'}", title=title)
        return figure
    n, channels, height, width = images.shape
    num_columns = min(num_columns, n)
    num_rows = -(-n // num_columns)
    tiled = torch.ones(num_rows * num_columns, channels, height + 1, width + 1)
    tiled[:n, :, :height, :width] = images.clamp(0, 1)
    tiled = tiled.reshape(num_rows, num_columns, channels, height + 1, width + 1)
    picture = tiled.permute(0, 3, 1, 4, 2).reshape(num_rows * (height + 1), -1, channels)
    figure = Figure(figsize=(0.5 * num_columns + 0.2, 0.5 * num_rows + 0.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(title, fontsize=8)
    return figure


def draw_latents(z: Tensor, y: Tensor | None = None) -> Figure:
    """Draw the two latent coordinates of largest variance, coloured by class.

    Args:
        z: Latents [N, d].
        y: Classes [N].

    Returns:
        A figure, unknown to pyplot.

    Example:
        >>> draw_latents(torch.randn(10, 3)).axes[0].get_xlabel().startswith("z")
        True
    """
    z = z.detach().float().cpu()
    first, *rest = z.var(0).argsort(descending=True)[:2].tolist()
    second = rest[0] if rest else first
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    if y is None:
        axis.scatter(z[:, first], z[:, second], s=6)
    else:
        points = axis.scatter(z[:, first], z[:, second], c=y.cpu(), s=6, cmap="tab10")
        figure.colorbar(points, ax=axis, label="class")
    axis.set(xlabel=f"z[{first}]", ylabel=f"z[{second}]", title="latents")
    return figure


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
    both = torch.cat([few, model.reconstruct(z[:NUM_COLUMNS])])
    means = model.sample(NUM_SAMPLES) if model.autoregressive else _means(model, NUM_SAMPLES)
    return {
        "samples": draw_grid(means, NUM_COLUMNS, "E[x|z], z from the prior"),
        "reconstructions": draw_grid(both, len(few), "data, and their reconstructions"),
        "latents": draw_latents(z, y),
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
    if num < 1:
        raise ValueError(f"num must be at least 1, found {num}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        z = model.prior().sample((num,))
        x = model.sample(num, z=z)
        means = x if model.autoregressive else model.reconstruct(z)
    arrays = {"x": x, "mean": means, "z": z}
    with replacing(out / "samples.npz") as partial_path, partial_path.open("wb") as file:
        np.savez_compressed(file, **{name: value.cpu().numpy() for name, value in arrays.items()})
    save_figure(draw_grid(means, NUM_COLUMNS), out / "samples.png")


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
    save_figure(draw_grid(images, num_steps, title), out / "traversals.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as partial_path:
        figure.savefig(partial_path, format="png", dpi=120)
