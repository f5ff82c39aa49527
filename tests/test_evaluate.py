"""Estimators against the closed forms of the linear-Gaussian model, and against planted defects."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae import evaluate
from pyro_vae.divergences import MMD
from pyro_vae.evaluate import (
    active_units,
    aggregate_mmd,
    class_distribution,
    elbo,
    iw_svi,
    iwae,
    latents,
    log_det_cov,
    marginal_kl,
    svm_error,
)
from pyro_vae.guides import Flow, Gaussian, Implicit
from pyro_vae.guides.amortized import Amortized
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLP

sys.path.insert(0, str(Path(__file__).parent))
from linear_gaussian import Exact, LinearGaussian, diagonal_gap, width_gap

TRUTH = LinearGaussian()
F64 = torch.float64


def mean_evidence(x: Tensor) -> float:
    return float(TRUTH.evidence(x).mean())


# --- likelihoods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_trace", [False, True])
def test_the_exact_posterior_gives_the_evidence_without_error(as_trace: bool) -> None:
    model = TRUTH.pyro_model if as_trace else TRUTH.vae()
    x = TRUTH.draw(7)
    exact = TRUTH.evidence(x)
    estimate = iwae(model, Exact(TRUTH), x, 20)
    assert estimate.per_example is not None
    torch.testing.assert_close(estimate.per_example, exact)
    assert estimate.std_error < 1e-6
    found = elbo(model, Exact(TRUTH), x, 200)
    assert abs(found.elbo.value - float(exact.mean())) < 3 * found.elbo.std_error
    gaps = iw_svi(model, Exact(TRUTH), x, 200, num_steps=100, covariance="full")
    assert abs(gaps.log_evidence.value - float(exact.mean())) < 0.005
    assert gaps.elbo is not None
    assert abs(gaps.elbo.value - float(exact.mean())) < 1e-6  # the logs of equal weights
    assert abs(gaps.approximation_gap.value) < 0.02


def test_parts_of_the_elbo_against_closed_forms() -> None:
    """E log p(x|z), KL and the error of reconstruction are quadratic forms in x."""
    truth, x = TRUTH, TRUTH.draw(20)
    found = elbo(truth.vae(), Exact(truth), x, 400)
    mean, covariance = truth.posterior_mean(x), truth.covariance
    kl = (covariance.trace() - torch.logdet(covariance) - truth.d + mean.square().sum(-1)) / 2
    torch.testing.assert_close(found.kl.per_example, kl)
    assert found.kl.std_error < 1e-12
    residual = x - mean @ truth.weight.T - truth.bias
    spread = (truth.weight @ covariance @ truth.weight.T).trace()
    squares = residual.square().sum(-1) + spread
    log_likelihood = -truth.x_dim / 2 * math.log(2 * math.pi) - squares / 2
    for estimate, exact in [
        (found.log_likelihood, log_likelihood),
        (found.reconstruction_error, squares / truth.x_dim),
    ]:
        assert estimate is not None
        assert estimate.per_example is not None
        assert estimate.per_example_error is not None
        assert abs(estimate.value - float(exact.mean())) < 3 * estimate.std_error
        z = (estimate.per_example - exact) / estimate.per_example_error
        assert z.abs().max() < 4.5
    assert not found.claimed


def test_iwae_and_its_error() -> None:
    x = TRUTH.draw(50)
    estimate = iwae(TRUTH.vae(), Exact(TRUTH, width=1.2), x, 1000)
    assert estimate.per_example is not None
    assert estimate.per_example_error is not None
    assert 0 < estimate.std_error < 0.05
    assert abs(estimate.value - mean_evidence(x)) < 3 * estimate.std_error
    z = (estimate.per_example - TRUTH.evidence(x)) / estimate.per_example_error
    assert 0.7 < z.std() < 1.3  # 50 of them: 0.1 is one standard error
    assert estimate.data_std_error == pytest.approx(float(estimate.per_example.std()) / 50**0.5)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10_000])
def test_chunks_change_nothing_but_the_draws(chunk_size: int) -> None:
    x = TRUTH.draw(9)
    guide = Exact(TRUTH, width=1.1)
    estimate = iwae(TRUTH.vae(), guide, x, 50, chunk_size=chunk_size)
    assert abs(estimate.value - mean_evidence(x)) < 4 * estimate.std_error
    found = elbo(TRUTH.vae(), guide, x, 50, chunk_size=chunk_size)
    expected = mean_evidence(x) - width_gap(TRUTH.d, 1.1)
    assert abs(found.elbo.value - expected) < 4 * found.elbo.std_error


def test_chunks_bound_what_is_decoded_at_once() -> None:
    sizes = []
    model = TRUTH.vae()
    model.decoder.register_forward_hook(lambda _, args, out: sizes.append(out[..., 0].numel()))
    x = TRUTH.draw(30)
    guide = Exact(TRUTH, width=1.1)
    iwae(model, guide, x, 100, chunk_size=64)
    elbo(model, guide, x, 10, chunk_size=64)
    iw_svi(model, guide, x, 100, num_steps=2, chunk_size=64)
    evaluate.ais(model, x, 2, 5, chunk_size=64)
    evaluate.bdmc(model, x[:1].expand(30, -1), 2, 5, chunk_size=64)
    assert 50 <= max(sizes) <= 64


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_a_guide_of_the_wrong_width_shows_its_gap(width: float) -> None:
    """Planted: the inference gap is KL(N(μ, w²Σ) ‖ N(μ, Σ)), whatever x is."""
    x = TRUTH.draw(20)
    gaps = iw_svi(TRUTH.vae(), Exact(TRUTH, width=width), x, 500, num_steps=100, covariance="full")
    expected = width_gap(TRUTH.d, width)
    assert gaps.inference_gap is not None
    assert gaps.amortization_gap is not None
    assert expected > 1
    assert abs(gaps.inference_gap.value - expected) < 3 * gaps.inference_gap.std_error
    # The full Gaussian of its own is the posterior.
    assert abs(gaps.approximation_gap.value) < 3 * gaps.approximation_gap.std_error + 0.01
    assert abs(gaps.amortization_gap.value - expected) < 3 * gaps.amortization_gap.std_error + 0.01


def test_the_approximation_gap_of_a_factorised_gaussian() -> None:
    """The best diagonal guide has no amortisation gap; its inference gap is known."""
    x = TRUTH.draw(20)
    gaps = iw_svi(TRUTH.vae(), Exact(TRUTH, diagonal=True), x, 1000)
    expected = diagonal_gap(TRUTH)
    assert expected > 0.3
    assert gaps.inference_gap is not None
    assert gaps.amortization_gap is not None
    assert abs(gaps.inference_gap.value - expected) < 3 * gaps.inference_gap.std_error
    assert abs(gaps.approximation_gap.value - expected) < (
        3 * gaps.approximation_gap.std_error + 0.01
    )
    assert abs(gaps.amortization_gap.value) < 3 * gaps.amortization_gap.std_error + 0.02
    assert abs(gaps.log_evidence.value - mean_evidence(x)) < 3 * gaps.log_evidence.std_error


def test_iw_svi_mends_a_guide_that_is_far_off_and_starts_at_the_prior() -> None:
    x = TRUTH.draw(10)
    exact = mean_evidence(x)
    far = Exact(TRUTH, width=0.5, shift=1.5)
    assert iwae(TRUTH.vae(), far, x, 500).value < exact - 5
    for guide in (far, None):
        found = iw_svi(TRUTH.vae(), guide, x, 1000, num_steps=200)
        assert abs(found.log_evidence.value - exact) < 3 * found.log_evidence.std_error + 0.01
    assert found.elbo is None
    assert found.inference_gap is None


def test_steps_of_one_example_do_not_touch_another() -> None:
    x = TRUTH.draw(6)
    torch.manual_seed(0)
    whole = iw_svi(TRUTH.vae(), None, x, 4000, num_steps=100)
    alone = iw_svi(TRUTH.vae(), None, x[3:4], 4000, num_steps=100)
    assert whole.best_elbo.per_example is not None
    error = 4 * 2**0.5 * alone.best_elbo.std_error
    assert abs(float(whole.best_elbo.per_example[3]) - alone.best_elbo.value) < error + 0.01


@pytest.mark.slow
def test_figures_of_the_linear_gaussian_model() -> None:
    """IWAE-5000 and IW-SVI within 3 standard errors and 0.05 nats of the evidence, d = 8."""
    x = TRUTH.draw(100)
    exact = mean_evidence(x)
    guide = Exact(TRUTH, diagonal=True)
    svi = iw_svi(TRUTH.vae(), guide, x)
    for estimate in (iwae(TRUTH.vae(), guide, x), svi.log_evidence):
        assert abs(estimate.value - exact) < 0.05
        assert abs(estimate.value - exact) < 3 * estimate.std_error
    assert svi.log_evidence.std_error < 0.01


# --- guides of all kinds -------------------------------------------------------------------------


def make_vae(d: int = 3) -> VAE:
    return VAE(MLP(d, 16, (8,)), Bernoulli(), d, (16,))


def binary(num: int) -> Tensor:
    return torch.bernoulli(torch.full((num, 16), 0.5))


@pytest.mark.parametrize("kind", [Gaussian, Flow, Implicit, "pyro"])
def test_every_guide(kind: object) -> None:
    model, x = make_vae(), binary(12)
    if kind == "pyro":

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))
    else:
        guide = kind(MLP(16, 8), 3)  # type: ignore[operator]
    found = elbo(model, guide, x, 20, chunk_size=32)
    assert found.claimed == (kind is Implicit)
    assert math.isfinite(found.elbo.value)
    gaps = iw_svi(model, guide, x, 50, num_steps=3)
    assert (gaps.inference_gap is None) == (kind is Implicit)
    for estimate in (
        aggregate_mmd(model, guide, x),
        log_det_cov(model, guide, x),
        active_units(model, guide, x),
    ):
        assert math.isfinite(estimate.value)
        assert estimate.std_error >= 0
    if kind is Implicit:
        with pytest.raises(ValueError, match="whose density is learned"):
            iwae(model, guide, x, 10)
        with pytest.raises(ValueError, match="whose density is learned"):
            marginal_kl(model, guide, x)
        return
    iwae_found = iwae(model, guide, x, 300, chunk_size=32)
    assert iwae_found.value > found.elbo.value - 3 * found.elbo.std_error
    marginal_kl(model, guide, x, 50)


def test_a_flows_draws_are_not_kept() -> None:
    """A Zuko distribution remembers what was drawn from it: each chunk has one of its own."""
    guide = Flow(MLP(16, 8), 3)
    q = guide.get_posterior(binary(4))
    held = [z for z, _ in evaluate._particles(q, 20, 8)]
    assert len(held) == 10
    assert sum(z.numel() for z in held) == 20 * 4 * 3
    assert not any("Tensor" in type(v).__name__ for v in getattr(q, "cache", {}).values())


def test_a_point_guide_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 3), event_dim=1))

    with pytest.raises(ValueError, match="must have a density, found a point"):
        elbo(make_vae(), guide, binary(2))
    with pytest.raises(ValueError, match="must have a density, found a point"):
        iwae(make_vae(), guide, binary(2))


def test_a_guide_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"event shape \[4\], expected \[2\] and \[3\]"):
        elbo(make_vae(), Gaussian(MLP(16, 8), 4), binary(2))
    with pytest.raises(ValueError, match=r"site 'z' alone, found \['y'\]"):
        elbo(make_vae(), Gaussian(MLP(16, 8), 3, site="y"), binary(2))


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model = VAE(nn.Sequential(nn.Dropout(0.5), MLP(3, 16)), Bernoulli(), 3, (16,))
    guide = Gaussian(nn.Sequential(nn.Dropout(0.5), MLP(16, 8)), 3)
    x = binary(5)
    guide.encoder[0].eval()  # type: ignore[index, operator]
    before = [m.training for m in (*model.modules(), *guide.modules())]
    first = latents(model, guide, x, mean=True)
    assert torch.equal(first, latents(model, guide, x, mean=True))  # without dropout
    iw_svi(model, guide, x, 10, num_steps=2)
    assert before == [m.training for m in (*model.modules(), *guide.modules())]
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, x: elbo(m, g, x, 1), "num_particles must be at least 2, found 1"),
        (lambda m, g, x: iwae(m, g, x, 0), "num_particles must be at least 1, found 0"),
        (lambda m, g, x: iwae(m, g, x, 5, chunk_size=0), "chunk_size must be at least 1, found 0"),
        (lambda m, g, x: iw_svi(m, g, x, num_steps=0), "num_steps must be at least 1, found 0"),
        (lambda m, g, x: iw_svi(m, g, x, chunk_size=4), "chunk_size must be at least 8, found 4"),
        (
            lambda m, g, x: iw_svi(m, g, x, covariance="block"),
            "covariance must be 'diagonal' or 'full', found 'block'",
        ),
        (lambda m, g, x: marginal_kl(m, g, x, 1), "num_samples must be at least 2, found 1"),
        (lambda m, g, x: aggregate_mmd(m, g, x[:1]), "at least 2 examples, found 1"),
        (lambda m, g, x: active_units(m, g, x[:1]), "at least 2 examples, found 1"),
        (lambda m, g, x: log_det_cov(m, g, x[:3]), "found 3 and 3"),
        (lambda m, g, x: elbo(m, g, x + 0.5), "0"),
        (lambda m, g, x: elbo(m, g, x[:0]), "at least one row"),
        (lambda m, g, x: svm_error(m, g, (x, None), (x, None)), "train must have labels"),
        (
            lambda m, g, x: svm_error(m, g, (x, torch.zeros(3)), (x, torch.zeros(3))),
            "train must have a label for each example",
        ),
        (
            lambda m, g, x: svm_error(m, g, (x, torch.arange(5)), (x, torch.full((5,), 7))),
            r"expected labels of the classes in train, found \[7\] and in train \[0, 1, 2, 3, 4\]",
        ),
        (
            lambda m, g, x: class_distribution(m, (x, torch.ones(5).long()), (x, torch.arange(5))),
            "labels of at least two classes, found one",
        ),
        (
            lambda m, g, x: class_distribution(
                m, (x, torch.arange(5) - 1), (x, torch.arange(5) - 1)
            ),
            "train: expected labels that are whole numbers from 0, found torch.int64 from -1",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(make_vae(), Gaussian(MLP(16, 8), 3), binary(5))


# --- the aggregate posterior ---------------------------------------------------------------------


class Moments(Amortized):
    """q(z|x) = N(x, diag s²): with x ~ N(m, V) the aggregate is N(m, V + diag s²)."""

    def __init__(self, scale: list[float]) -> None:
        super().__init__(nn.Linear(1, 1), len(scale))
        self.scale = torch.tensor(scale, dtype=F64)

    def get_posterior(self, x: Tensor, *args: object, **kwargs: object) -> dist.Distribution:
        return dist.Normal(x, self.scale.expand_as(x)).to_event(1)


def identity_model(x: Tensor) -> Tensor:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1], dtype=F64), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)


def gaussian_rows(num: int, mean: list[float], scale: list[float]) -> Tensor:
    """Rows whose mean and covariance are exactly these: no sampling error in what is compared."""
    rows = torch.randn(num, len(mean), dtype=F64)
    rows = rows - rows.mean(0)
    factor = torch.linalg.cholesky(torch.atleast_2d(rows.T.cov(correction=0)))
    white = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
    return torch.tensor(mean, dtype=F64) + white * torch.tensor(scale, dtype=F64)


def test_marginal_kl_and_mutual_information_of_gaussians() -> None:
    """A mixture of 4000 wide components is Gaussian to within what is measured here."""
    mean, spread, width = [0.5, 0.0], [0.8, 0.3], [0.6, 0.9]
    x = gaussian_rows(4000, mean, spread)
    found = marginal_kl(identity_model, Moments(width), x, 4000)
    variance = torch.tensor(spread).square() + torch.tensor(width).square()
    kl = float((variance + torch.tensor(mean).square() - 1 - variance.log()).sum() / 2)
    information = float((variance / torch.tensor(width).square()).log().sum() / 2)
    assert kl > 0.05
    assert abs(found.marginal_kl.value - kl) < 3 * found.marginal_kl.std_error + 0.005
    assert abs(found.mutual_information.value - information) < (
        3 * found.mutual_information.std_error + 0.005
    )
    # Their sum is the mean KL of the guide, in closed form.
    mean_kl = elbo(identity_model, Moments(width), x, 2).kl.value
    both = found.marginal_kl.value + found.mutual_information.value
    assert abs(both - mean_kl) < 3 * (
        found.marginal_kl.std_error + found.mutual_information.std_error
    )


def test_mutual_information_of_separate_components_is_log_n() -> None:
    x = torch.arange(8, dtype=F64).unsqueeze(1) * 100
    found = marginal_kl(identity_model, Moments([0.1]), x, 100).mutual_information
    assert found.value == pytest.approx(math.log(8))


@pytest.mark.parametrize("chunk_size", [1, 100, 1 << 20])
def test_marginal_kl_by_chunks_is_the_mixture_written_out(chunk_size: int) -> None:
    x = torch.randn(13, 2, dtype=F64)
    guide = Moments([0.5, 0.7])
    torch.manual_seed(0)
    found = marginal_kl(identity_model, guide, x, 13, chunk_size=chunk_size)
    torch.manual_seed(0)
    order = torch.randperm(13)
    width = min(13, max(1, math.isqrt(chunk_size)))
    z = torch.cat([guide.get_posterior(x[part]).sample() for part in order.split(width)])
    log_q = guide.get_posterior(x).log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(13)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert found.marginal_kl.value == pytest.approx(float((log_q - log_p).mean()))


def test_mmd_is_that_of_the_divergence_and_of_the_closed_form() -> None:
    """MMD² of N(m, 1.5 I) and N(0, I) under the RBF kernel is known."""
    mean = [0.7, 0.0]
    x = gaussian_rows(1500, mean, [1.0, 1.0])
    guide = Moments([0.5**0.5, 0.5**0.5])
    found = aggregate_mmd(identity_model, guide, x)
    bandwidth, d = 2.0, 2

    def kernel(variance: float, distance: float) -> float:
        total = bandwidth + variance
        return (bandwidth / total) ** (d / 2) * math.exp(-distance / (2 * total))

    exact = kernel(3.0, 0.0) - 2 * kernel(2.5, 0.49) + kernel(2.0, 0.0)
    assert exact > 0.03
    assert abs(found.value - exact) < 3 * found.std_error
    torch.manual_seed(1)
    tiled = aggregate_mmd(identity_model, guide, x[:50], chunk_size=64)
    torch.manual_seed(1)
    z = torch.cat([guide.get_posterior(part).sample() for part in x[:50].split(8)])
    draws = dist.Normal(torch.zeros(2, dtype=F64), 1.0).expand([50, 2]).sample()
    assert tiled.value == pytest.approx(float(MMD()(z, draws)))


def test_the_error_of_the_mmd_is_the_spread_over_repetitions() -> None:
    values, errors = [], []
    for _ in range(60):
        x = 0.6 + torch.randn(100, 2, dtype=F64)
        found = aggregate_mmd(identity_model, Moments([0.3, 0.3]), x)
        values.append(found.value)
        errors.append(found.std_error)
    spread = float(torch.tensor(values).std())
    assert 0.7 < sum(errors) / len(errors) / spread < 1.5


def test_log_det_cov_of_gaussians() -> None:
    spread, width = [0.8, 0.3], [0.6, 0.9]
    x = gaussian_rows(2000, [1.0, 2.0], spread)
    found = log_det_cov(identity_model, Moments(width), x, 50)
    variance = torch.tensor(spread).square() + torch.tensor(width).square()
    exact = float(variance.log().sum() / 2)
    assert abs(found.value - exact) < 3 * found.std_error
    standard = gaussian_rows(2000, [0.0, 0.0], [0.8, 0.8])
    found = log_det_cov(identity_model, Moments([0.6, 0.6]), standard, 50)
    assert abs(found.value) < 3 * found.std_error
    # The bootstrap's error of a normal sample's log determinant: √(2/(N d)) where x is all of it.
    found = log_det_cov(identity_model, Moments([1e-3, 1e-3]), standard, 2)
    assert found.std_error == pytest.approx((2 / (2000 * 2)) ** 0.5, rel=0.25)


def test_active_units_are_those_that_depend_on_x() -> None:
    """Planted: two of four dimensions have means whose variance lies above 0.01."""
    x = gaussian_rows(500, [0.0] * 4, [1.0, 0.2, 0.05, 0.0])
    found = active_units(identity_model, Moments([0.1, 0.5, 1.0, 1.0]), x)
    assert found.value == 2
    assert found.std_error == 0
    expected = torch.tensor([1.0, 0.04, 0.0025, 0.0], dtype=F64) * 500 / 499
    torch.testing.assert_close(found.per_example, expected)
    near = gaussian_rows(500, [0.0], [0.1])  # right at the threshold
    assert active_units(identity_model, Moments([0.1]), near).std_error > 0.3


def test_active_units_of_a_guide_known_by_its_draws_alone() -> None:
    """The variance of the mean of finitely many draws is no activity."""

    class Drawn(Moments):
        def get_posterior(self, x: Tensor, *args: object, **kwargs: object) -> dist.Distribution:
            q = super().get_posterior(x)
            flow = dist.TransformedDistribution(q.base_dist, [], validate_args=False)
            return dist.Independent(flow, 1)  # whose mean torch does not know

    x = gaussian_rows(500, [0.0, 0.0], [0.5, 0.0])
    found = active_units(identity_model, Drawn([2.0, 2.0]), x)
    assert found.per_example is not None
    assert found.value == 1
    assert abs(float(found.per_example[1])) < 5 * 4 / 256 * (2 / 500) ** 0.5


# --- labels --------------------------------------------------------------------------------------


class Stripes(nn.Module):
    """Decode z to the image of class k: a bright row, chosen by where z lies."""

    def __init__(self, thresholds: list[float]) -> None:
        super().__init__()
        self.thresholds = torch.tensor(thresholds)

    def forward(self, z: Tensor) -> Tensor:
        k = (z[..., :1] > self.thresholds).sum(-1)
        image = nn.functional.one_hot(k, 4).unsqueeze(-1).expand(*k.shape, 4, 4)
        return (image.flatten(-2) * 2 - 1) * 5.0


def stripes(y: Tensor) -> Tensor:
    return nn.functional.one_hot(y, 4).unsqueeze(-1).expand(-1, 4, 4).flatten(1).float()


QUARTILES = [-0.6745, 0.0, 0.6745]


def test_class_distribution_of_a_model_with_the_right_and_the_wrong_classes() -> None:
    y = torch.arange(400) % 4
    data = (stripes(y), y)
    right = VAE(Stripes(QUARTILES), Bernoulli(), 1, (16,))
    found = class_distribution(right, data, data, 2000, num_steps=100)
    assert found.classifier_error.value == 0
    assert 0 <= found.cross_entropy.value < 3 * found.cross_entropy.std_error + 0.005
    assert abs(found.of_test.value) < 1e-3
    wrong = VAE(Stripes([-1.2816, 0.0, 1.2816]), Bernoulli(), 1, (16,))  # 0.1, 0.4, 0.4, 0.1
    found = class_distribution(wrong, data, data, 2000, num_steps=100)
    exact = 0.5 * math.log(0.25 / 0.1) + 0.5 * math.log(0.25 / 0.4)
    assert exact > 0.2
    assert abs(found.cross_entropy.value - exact) < 3 * found.cross_entropy.std_error + 0.01
    assert float(found.sampled.sum()) == pytest.approx(1, abs=1e-5)


def test_svm_error_of_latents_that_know_the_label_and_that_do_not() -> None:
    y = torch.arange(600) % 3
    informed = y[:, None] + 0.1 * torch.randn(600, 1, dtype=F64)
    blind = torch.randn(600, 1, dtype=F64)
    guide = Moments([0.1])
    for x, low, high in ((informed, 0.0, 0.02), (blind, 0.55, 0.8)):
        found = svm_error(identity_model, guide, (x[:300], y[:300]), (x[300:], y[300:]), 200)
        assert low <= found.value <= high
        share = found.value
        assert found.std_error == pytest.approx((share * (1 - share) / 300) ** 0.5)
    with pytest.raises(ValueError, match="at least two classes"):
        svm_error(identity_model, guide, (x, 0 * y), (x, y))
