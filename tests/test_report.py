"""The report: what it writes, what it leaves out and why, and that it touches nothing else."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_vae.data import Data, Split, load
from pyro_vae.guides import Gaussian, Implicit
from pyro_vae.losses import DVAE_ELBO, GRAE_ELBO, BetaVAE_ELBO
from pyro_vae.models import VAE, Bernoulli, DiscretizedLogistic
from pyro_vae.models import Gaussian as GaussianObservation
from pyro_vae.nn import MLP
from pyro_vae.pictures import (
    plot_latents,
    plot_posteriors,
    plot_reconstructions,
    plot_samples,
)
from pyro_vae.report import _plain, report

sys.path.insert(0, str(Path(__file__).parent))
from linear_gaussian import Exact, LinearGaussian

QUICK: dict[str, Any] = {
    "num_examples": 20,
    "elbo_particles": 10,
    "iwae_particles": 50,
    "svi_examples": 5,
    "svi_particles": 50,
    "svi_steps": 10,
    "ais_examples": 4,
    "ais_temperatures": 20,
    "aggregate_examples": 100,
    "marginal_samples": 100,
    "class_samples": 100,
    "classifier_steps": 20,
    "num_labels": 100,
    "posterior_examples": 2,
}
SHORT = QUICK | {"svi_examples": 0, "ais_examples": 0, "posterior_examples": 0}
NAMES = {
    "elbo",
    "log_likelihood",
    "kl",
    "reconstruction_error",
    "elbo_train",
    "iwae",
    "iw_svi",
    "inference_gap",
    "approximation_gap",
    "amortization_gap",
    "ais",
    "bdmc_lower",
    "bdmc_upper",
    "bdmc_gap",
    "marginal_kl",
    "mutual_information",
    "mmd",
    "active_units",
    "log_det_cov",
    "class_cross_entropy",
    "class_cross_entropy_test",
    "classifier_error",
    "svm_error",
}
PICTURES = {"samples.png", "reconstructions.png", "latents.png", "posteriors.png"}


def digits() -> Data:
    data = load("digits")
    return Data(
        "digits",
        *(Split(part.x[:150], part.y[:150]) for part in data.splits.values()),  # type: ignore[index]
        kind=data.kind,
        source=data.source,
    )


def make(data: Data, d: int = 2, kind: type = Gaussian) -> tuple[VAE, nn.Module]:
    pixels = data.event_shape.numel()
    decoder = nn.Sequential(MLP(d, pixels, (16,)), nn.Unflatten(-1, data.event_shape))
    encoder = nn.Sequential(nn.Flatten(1), MLP(pixels, 16, (16,)))
    return VAE(decoder, GaussianObservation(0.3), d, data.event_shape), kind(encoder, d)


def test_everything_is_written_and_says_the_same(tmp_path: Path) -> None:
    data = digits()
    model, guide = make(data)
    found = report(model, guide, data, tmp_path / "new" / "run", **QUICK)
    out = tmp_path / "new" / "run"
    assert {p.name for p in out.iterdir()} == {"metrics.json", "report.md"} | PICTURES
    assert set(found["metrics"]) == NAMES
    assert found["left_out"] == {}
    written = json.loads((out / "metrics.json").read_text())
    assert set(written["metrics"]) == NAMES
    for name, entry in written["metrics"].items():
        assert entry["value"] == found["metrics"][name]["value"]
        assert math.isfinite(entry["value"])
        assert entry["std_error"] >= 0
    text = (out / "report.md").read_text()
    assert set(re.findall(r"\]\((.*?\.png)\)", text)) == PICTURES
    for name, value in QUICK.items():
        assert written["settings"][name] == value
        assert f"| {name} | {value} |" in text
    assert data.source in text
    assert "IWAE-50" in text
    assert list(written["side_by_side"]) == ["ELBO", "IWAE-50", "IW-SVI-50", "AIS"]
    assert len(written["classes"]["data"]) == 10
    # Every table has rows of one length, whatever bars its cells hold.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_and_nothing_else_changes(tmp_path: Path) -> None:
    data = digits()
    model, guide = make(data)
    model.train()
    guide.eval()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - whether the global state is left alone
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    quick = QUICK | {"posterior_examples": 0, "classifier_steps": 5}
    first = report(model, guide, data, tmp_path, **quick)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert model.training
    assert not guide.training
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(6)
    second = report(model, guide, data, tmp_path, **quick)
    assert first["metrics"] == second["metrics"]
    other = report(model, guide, data, tmp_path, **quick, seed=1)
    assert other["metrics"]["elbo"] != first["metrics"]["elbo"]
    assert first["left_out"] == {"posteriors": "posterior_examples=0"}


def test_what_does_not_apply_is_left_out_with_the_reason(tmp_path: Path) -> None:
    data = digits()
    blank = Data(
        "blank", *(Split(p.x, None) for p in data.splits.values()), kind="unit", source="made up"
    )
    model, guide = make(blank, kind=Implicit)
    found = report(model, guide, blank, tmp_path, **QUICK | {"ais_examples": 0})
    assert set(found["left_out"]) == {
        "iwae",
        "inference_gap",
        "amortization_gap",
        "ais",
        "bdmc",
        "marginal_kl",
        "mutual_information",
        "class_cross_entropy",
        "svm_error",
    }
    assert not set(found["left_out"]) & set(found["metrics"])
    text = (tmp_path / "report.md").read_text()
    assert "* svm_error: blank has no labels" in text
    assert "ELBO (claimed: the guide's density is learned)" in text
    for name, reason in found["left_out"].items():
        assert f"* {name}: {reason}" in text


def test_figures_are_those_of_the_linear_gaussian_model(tmp_path: Path) -> None:
    """The exact posterior as guide: the whole report agrees with closed forms, in float64."""
    truth = LinearGaussian(d=3, x_dim=5)
    torch.manual_seed(0)
    splits = (Split(truth.draw(n), None) for n in (500, 50, 50))
    data = Data("made", *splits, kind="real", source="made up")
    found = report(
        truth.vae(),
        Exact(truth),
        data,
        tmp_path,
        num_examples=50,
        ais_temperatures=100,
        ais_examples=50,
        posterior_examples=0,
    )
    assert found["settings"]["dtype"] == "torch.float64"
    exact = float(truth.evidence(data.test.x).mean())
    metrics = found["metrics"]
    for name in ("elbo", "iwae", "ais"):
        error = abs(metrics[name]["value"] - exact)
        assert error < 4 * metrics[name]["std_error"] + 1e-4 + 0.05 * (name == "ais")
    assert abs(metrics["inference_gap"]["value"]) < 0.02
    assert metrics["bdmc_gap"]["value"] > -3 * metrics["bdmc_gap"]["std_error"]
    # q(z) is the prior, up to what 500 examples leave open.
    assert metrics["marginal_kl"]["value"] < 0.05
    assert abs(metrics["log_det_cov"]["value"]) < 4 * metrics["log_det_cov"]["std_error"]
    information = -float(torch.logdet(truth.covariance)) / 2
    assert metrics["mutual_information"]["value"] == pytest.approx(information, abs=0.1)


@pytest.mark.parametrize("inside", [False, True])
def test_q_of_a_grae_run_is_its_posterior(tmp_path: Path, inside: bool) -> None:
    """On a linear-Gaussian model that is the exact one, whatever the guide's own covariance."""
    truth = LinearGaussian(d=3, x_dim=5)
    torch.manual_seed(0)
    splits = (Split(truth.draw(n), None) for n in (20, 5, 20))
    data = Data("made", *splits, kind="real", source="made up")
    grae = GRAE_ELBO()
    loss = DVAE_ELBO(0.1, elbo=grae) if inside else grae
    untrained = Exact(truth, width=5.0, diagonal=True)
    found = report(truth.vae(), untrained, data, tmp_path, loss=loss, **SHORT)
    exact = float(truth.evidence(data.test.x).mean())
    assert found["metrics"]["iwae"]["value"] == pytest.approx(exact)
    assert found["q"] == "GRAE's posterior, equation (11) about the guide's mean"
    text = (tmp_path / "report.md").read_text()
    assert found["q"] in text
    assert text.startswith("# VAE and Exact on made")
    other = report(truth.vae(), untrained, data, tmp_path, loss=BetaVAE_ELBO(), **SHORT)
    assert other["metrics"]["elbo"]["value"] < exact - 5
    assert other["q"] == "the guide's"


def test_degenerate_weights_are_marked(tmp_path: Path) -> None:
    """Weights of a guide that is far off: the error of each is below 1, and means nothing."""
    truth = LinearGaussian(d=3, x_dim=5, scale=0.01)
    torch.manual_seed(0)
    splits = (Split(truth.draw(n), None) for n in (20, 5, 20))
    data = Data("made", *splits, kind="real", source="made up")
    quick = QUICK | {"posterior_examples": 0, "svi_steps": 1, "ais_temperatures": 2}
    found = report(truth.vae(), Exact(truth, shift=1.0), data, tmp_path, **quick)
    text = (tmp_path / "report.md").read_text()
    warning = "degenerate in {0} of {0} examples: a lower bound, its s.e. is not to be trusted"
    for name, count in {"iwae": 20, "iw_svi": 5, "ais": 4, "bdmc_lower": 4}.items():
        entry = found["metrics"][name]
        assert math.isfinite(entry["std_error"])
        assert re.search(r"effective ones: median 1\.\d, least 1\.\d", entry["about"])
        assert warning.format(count) in entry["about"]
        assert entry["about"] in text
    assert found["side_by_side"]["AIS"]["degenerate"] == 4
    assert found["side_by_side"]["ELBO"]["degenerate"] is None
    assert "acceptance" not in text
    good = report(truth.vae(), Exact(truth), data, tmp_path, **SHORT)
    assert "degenerate" not in good["metrics"]["iwae"]["about"]


@pytest.mark.parametrize("train_classes", [[3, 3], [4, 5]])
def test_labels_that_do_not_suffice_cost_their_figures_alone(
    tmp_path: Path, train_classes: list[int]
) -> None:
    data = digits()
    y = torch.tensor(train_classes).repeat(75)
    test = Split(data.test.x, torch.arange(150) % 3)
    data = Data("digits", Split(data.train.x, y), data.validation, test, "unit", "made up")
    found = report(*make(data), data, tmp_path, **SHORT)
    reason = "at least two classes, found one" if train_classes == [3, 3] else "found [0, 1, 2]"
    for name in ("class_cross_entropy", "svm_error"):
        assert reason in found["left_out"][name]
        assert name not in found["metrics"]
    assert "elbo" in found["metrics"]
    assert (tmp_path / "report.md").exists()


@pytest.mark.slow
def test_what_likelihoods_are_is_said(tmp_path: Path) -> None:
    grey = digits()
    splits = (Split((part.x > 0.5).float(), None) for part in grey.splits.values())
    binary = Data("binary", *splits, kind="binary", source="made up")
    _, guide = make(grey)
    decoder = nn.Sequential(MLP(2, 64, (16,)), nn.Unflatten(-1, grey.event_shape))
    model = VAE(decoder, Bernoulli(), 2, grey.event_shape)
    quick = SHORT | {"ais_examples": 2}
    found = report(model, guide, grey, tmp_path, **quick)
    text = (tmp_path / "report.md").read_text()
    assert found["scores"] == "Negative cross-entropies"
    assert "no log density" in text
    assert "Log densities" not in text
    assert "the data are grey" in found["left_out"]["bdmc"]
    assert not any(name.startswith("bdmc") for name in found["metrics"])
    found = report(model, guide, binary, tmp_path, **quick)
    assert found["scores"] == "Log probabilities"
    assert "bdmc_gap" in found["metrics"]
    assert "Log probabilities in nats" in (tmp_path / "report.md").read_text()
    decoder = nn.Sequential(MLP(2, 128, (16,)), nn.Unflatten(-1, (2, 8, 8)))
    model = VAE(decoder, DiscretizedLogistic(levels=17), 2, grey.event_shape)
    assert report(model, guide, grey, tmp_path, **SHORT)["scores"] == "Log probabilities"
    found = report(*make(grey), grey, tmp_path, **SHORT)
    assert found["scores"] == "Log densities"
    text = (tmp_path / "report.md").read_text()
    assert "bootstrap's for log det Cov and active units" in text
    assert "the largest is the closest" not in text


@pytest.mark.slow
def test_chunks_bound_what_is_encoded_at_once(tmp_path: Path) -> None:
    data = digits()
    model, guide = make(data)
    rows = []
    guide.encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    report(model, guide, data, tmp_path, **SHORT | {"chunk_size": 12})
    assert max(rows) <= 12


@pytest.mark.parametrize("event_shape", [(1, 8, 8), (3, 6, 5), (2,), (7,)])
def test_pictures_of_any_data(event_shape: tuple[int, ...]) -> None:
    x = torch.randn(5, *event_shape)
    for figure in (plot_samples(x), plot_reconstructions(x, x + 1)):
        assert isinstance(figure, Figure)
        figure.canvas.draw()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_latent_pictures_of_any_dimension(d: int) -> None:
    z = torch.randn(400, d)
    for labels in (None, torch.arange(40) % 3):
        figure = plot_latents(0.1 * z + 2, z, z[:40], labels)
        figure.canvas.draw()
        first = figure.axes[0].get_xlabel()
        assert first.startswith("component 1" if d > 2 else "z[0]")


@pytest.mark.parametrize("d", [1, 2])
def test_the_grid_finds_the_posterior(d: int) -> None:
    """Mean and variance on the grid are those of the closed form, though it is narrow."""
    from pyro_vae.joint import Joint
    from pyro_vae.pictures import _grid

    truth = LinearGaussian(d=d, x_dim=4, scale=0.05)
    x = truth.draw(1)
    points, density = _grid(
        Joint(truth.vae(), x), x[0], np.zeros((10, d)) + truth.posterior_mean(x).numpy(), 4096
    )
    mesh = np.stack(np.meshgrid(*points, indexing="ij"), -1)
    weight = density / density.sum()
    mean = (weight[..., None] * mesh).reshape(-1, d).sum(0)
    spread = (weight[..., None] * (mesh - mean) ** 2).reshape(-1, d).sum(0)
    np.testing.assert_allclose(mean, truth.posterior_mean(x)[0].numpy(), atol=1e-3)
    np.testing.assert_allclose(spread, truth.covariance.diagonal().numpy(), rtol=0.02)


@pytest.mark.slow
def test_posteriors_by_hmc_in_more_dimensions() -> None:
    from pyro_vae.joint import Joint
    from pyro_vae.pictures import _hmc

    truth = LinearGaussian(d=4, x_dim=6)
    x = truth.draw(2)
    figure, how = plot_posteriors(truth.vae(), Exact(truth), x)
    assert how == "by HMC, which passed its checks"
    assert len(figure.axes) == 2
    draws, _ = _hmc(Joint(truth.vae(), x), x)
    assert draws.shape[1:] == (2, 4)
    error = 5 * (truth.covariance.diagonal() / 1000).sqrt().numpy()
    assert (np.abs(draws.mean(0) - truth.posterior_mean(x).numpy()) < error).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"elbo_particles": 1}, "elbo_particles must be at least 2, found 1"),
        ({"num_examples": 0}, "num_examples must be at least 1, found 0"),
        ({"ais_examples": -1}, "ais_examples must be at least 0, found -1"),
        ({"chunk_size": 7}, "chunk_size must be at least 8, found 7"),
    ],
)
def test_bad_numbers(tmp_path: Path, kwargs: dict, message: str) -> None:
    data = digits()
    with pytest.raises(ValueError, match=message):
        report(*make(data), data, tmp_path, **QUICK | kwargs)
    assert not list(tmp_path.iterdir())


def test_bad_places_and_data(tmp_path: Path) -> None:
    data = digits()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot make the directory"):
        report(*make(data), data, tmp_path / "file", **QUICK)
    _, guide = make(data)
    model = VAE(MLP(2, 16), Bernoulli(), 2, (16,))
    with pytest.raises(ValueError, match=r"rows of shape \(1, 8, 8\), expected \(16,\)"):
        report(model, guide, data, tmp_path, **QUICK)


def test_a_diverged_model_is_refused_and_infinities_are_null_in_json(tmp_path: Path) -> None:
    data = digits()
    model, guide = make(data)
    with torch.no_grad():
        next(guide.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the guide's 'encoder.1.0.weight' is not finite"):
        report(model, guide, data, tmp_path, **QUICK)
    assert not list(tmp_path.iterdir())
    assert _plain({"a": (math.nan, -math.inf, 1.0), "b": "text"}) == {
        "a": [None, None, 1.0],
        "b": "text",
    }
