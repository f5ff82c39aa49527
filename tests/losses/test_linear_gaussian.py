"""Every loss on the model where all is known: z ~ N(0, I), x|z ~ N(W z + b, s² I).

p(x) is Gaussian, the posterior is N(M⁻¹ Wᵀ (x − b)/s², M⁻¹) with M = I + Wᵀ W/s².
"""

from __future__ import annotations

import math
from functools import cached_property

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor

from pyro_vae.divergences import MMD, Adversarial, Stein
from pyro_vae.losses import (
    AVB_ELBO,
    DVAE_ELBO,
    IWAE_ELBO,
    BetaVAE_ELBO,
    InfoVAE_ELBO,
    KLSchedule,
    TermsELBO,
)
from pyro_vae.nn import ResidualDiscriminator

F64 = torch.float64


class LinearGaussian:
    """The model, data drawn from it, and Gaussian guides around its posterior."""

    def __init__(self, seed: int, num_points: int = 40) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.d, self.D = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        self.W, self.b = randn(self.D, self.d), randn(self.D)
        self.s = 0.4 + float(torch.rand((), generator=generator))
        self.x = randn(num_points, self.d) @ self.W.T + self.b + self.s * randn(num_points, self.D)
        self.precision = torch.eye(self.d, dtype=F64) + self.W.T @ self.W / self.s**2
        self.shift = torch.tensor(0.0, dtype=F64, requires_grad=True)  # of the guide's mean
        self.widen = torch.tensor(0.0, dtype=F64, requires_grad=True)  # log factor of its scale

    def mean(self, x: Tensor) -> Tensor:
        return (x - self.b) @ self.W @ self.precision.inverse() / self.s**2

    def model(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, self.s).to_event(1), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        tril = torch.linalg.cholesky(self.precision.inverse()) * self.widen.exp()
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            q = dist.MultivariateNormal(self.mean(x) + self.shift, scale_tril=tril)
            pyro.sample("z", q)

    @cached_property
    def log_evidence(self) -> Tensor:
        """log p(x) [N]."""
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(self.D, dtype=F64)
        return dist.MultivariateNormal(self.b, covariance).log_prob(self.x)

    def gap(self, shift: float, widen: float) -> float:
        """KL(q ‖ posterior), the same for each data point."""
        mean = torch.full((self.d,), shift, dtype=F64)
        distance = float(mean @ self.precision @ mean)
        scale = math.exp(2 * widen)
        return 0.5 * (distance + self.d * (scale - 1 - 2 * widen))


@pytest.fixture(params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def oracle(request: pytest.FixtureRequest) -> LinearGaussian:
    return LinearGaussian(request.param)


ELBOS = {
    "AVB_ELBO": lambda **k: AVB_ELBO(**{"num_particles": 4, **k}),
    "BetaVAE_ELBO": BetaVAE_ELBO,
    "DVAE_ELBO without noise": lambda **k: DVAE_ELBO(0.0, **k),
    "IWAE_ELBO": IWAE_ELBO,
    "InfoVAE_ELBO": InfoVAE_ELBO,
}


@pytest.mark.parametrize("make", ELBOS.values(), ids=ELBOS)
def test_elbo_at_the_posterior_is_the_evidence_whatever_is_drawn(
    make: type[TermsELBO], oracle: LinearGaussian
) -> None:
    """With log q − log p at the sample each draw gives log p(x), without a Monte Carlo error."""
    elbo = make(analytic_kl=False)
    for size in (len(oracle.x), 1000):
        scale = size / len(oracle.x)
        found = elbo.loss(oracle.model, oracle.guide, oracle.x, size)
        assert found == pytest.approx(-scale * oracle.log_evidence.sum().item(), rel=1e-9)


@pytest.mark.parametrize("analytic_kl", [True, False])
@pytest.mark.parametrize("make", ELBOS.values(), ids=ELBOS)
def test_elbo_away_from_the_posterior_falls_short_by_the_kl(
    make: type[TermsELBO], analytic_kl: bool, oracle: LinearGaussian
) -> None:
    shift, widen, runs = 0.3, -0.2, 200
    with torch.no_grad():
        oracle.shift += shift
        oracle.widen += widen
    kwargs = {} if make is IWAE_ELBO else {"num_particles": 16, "vectorize_particles": True}
    if make is IWAE_ELBO:
        kwargs = {"num_particles": 1}
    elbo = make(analytic_kl=analytic_kl, **kwargs)
    values = torch.tensor(
        [elbo.loss(oracle.model, oracle.guide, oracle.x) for _ in range(runs)], dtype=F64
    )
    expected = -oracle.log_evidence.sum() + len(oracle.x) * oracle.gap(shift, widen)
    standard_error = values.std() / runs**0.5
    assert abs(values.mean() - expected) < 4 * standard_error
    # the test can tell: the KL itself is many standard errors
    assert len(oracle.x) * oracle.gap(shift, widen) > 20 * standard_error


def test_gradient_of_the_elbo_is_that_of_the_kl(oracle: LinearGaussian) -> None:
    with torch.no_grad():
        oracle.shift += 0.3
        oracle.widen -= 0.2
    elbo = BetaVAE_ELBO(num_particles=2000, vectorize_particles=True)
    loss = elbo(oracle.model, oracle.guide)(oracle.x)  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, [oracle.shift, oracle.widen])
    n, ones = len(oracle.x), torch.ones(oracle.d, dtype=F64)
    by_shift = n * 0.3 * float(ones @ oracle.precision @ ones)
    by_widen = n * oracle.d * (math.exp(-0.4) - 1)
    # 80,000 draws of ε: the gradients' relative standard errors are well below one per cent
    assert found[0].item() == pytest.approx(by_shift, rel=0.03)
    assert found[1].item() == pytest.approx(by_widen, rel=0.06)


# --- importance weighting ------------------------------------------------------------------------


def iwae_values(oracle: LinearGaussian, k: int, runs: int, batch: int | None = None) -> Tensor:
    elbo, values = IWAE_ELBO(k), []
    for _ in range(runs):
        x = oracle.x if batch is None else oracle.x[torch.randperm(len(oracle.x))[:batch]]
        values.append(-elbo.loss(oracle.model, oracle.guide, x, len(oracle.x)))
    return torch.tensor(values, dtype=F64)


def away(seed: int) -> LinearGaussian:
    oracle = LinearGaussian(seed)
    with torch.no_grad():
        oracle.shift += 0.4
        oracle.widen += 0.1
    return oracle


def test_iwae_rises_to_the_evidence_from_below() -> None:
    oracle = away(0)
    evidence = oracle.log_evidence.sum()
    means, errors = [], []
    for k in (1, 10, 200):
        values = iwae_values(oracle, k, 200)
        means.append(values.mean())
        errors.append(values.std() / 200**0.5)
    for i in (0, 1):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    assert all(mean < evidence + 4 * error for mean, error in zip(means, errors, strict=True))
    assert evidence - means[2] < 0.05 * (evidence - means[0])


def test_iwae_is_the_same_under_a_minibatch_in_expectation() -> None:
    oracle = away(1)
    full, mini = iwae_values(oracle, 8, 200), iwae_values(oracle, 8, 800, batch=10)
    error = math.hypot(full.std() / 200**0.5, mini.std() / 800**0.5)
    assert abs(full.mean() - mini.mean()) < 4 * error


def test_iwae_where_pyro_s_own_is_above_the_evidence() -> None:
    """The defect that ours must not have: N/B inside the logarithm."""
    oracle = away(2)
    evidence = oracle.log_evidence.sum()
    theirs = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    values = []
    for _ in range(200):
        x = oracle.x[torch.randperm(len(oracle.x))[:2]]
        values.append(-theirs.loss(oracle.model, oracle.guide, x, len(oracle.x)))
    found = torch.tensor(values, dtype=F64)
    ours = iwae_values(oracle, 50, 200, batch=2)
    assert found.mean() - ours.mean() > 4 * math.hypot(
        found.std() / 200**0.5, ours.std() / 200**0.5
    )
    assert ours.mean() < evidence + 4 * ours.std() / 200**0.5


@pytest.mark.parametrize("vectorize_particles", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_doubly_reparameterized_gradient_is_unbiased(vectorize_particles: bool) -> None:
    oracle, runs = away(0), 300
    gradients = {}
    for doubly in (False, True):
        elbo = IWAE_ELBO(4, doubly_reparameterized=doubly, vectorize_particles=vectorize_particles)
        found = []
        for _ in range(runs):
            loss = elbo(oracle.model, oracle.guide)(oracle.x)  # type: ignore[arg-type]
            found.append(torch.stack(torch.autograd.grad(loss, [oracle.shift, oracle.widen])))
        gradients[doubly] = torch.stack(found)
    mean = {doubly: g.mean(0) for doubly, g in gradients.items()}
    error = {doubly: g.std(0) / runs**0.5 for doubly, g in gradients.items()}
    assert ((mean[True] - mean[False]).abs() < 4 * torch.hypot(error[True], error[False])).all()
    assert (mean[False].abs() > 8 * error[False]).all()  # the test can tell


def test_doubly_reparameterized_gradient_vanishes_at_the_posterior(oracle: LinearGaussian) -> None:
    """Each draw's does, while the usual gradient is only zero on average."""
    gradients = []
    for doubly in (True, False):
        loss = IWAE_ELBO(4, doubly_reparameterized=doubly)(oracle.model, oracle.guide)(oracle.x)  # type: ignore[arg-type]
        gradients.append(torch.stack(torch.autograd.grad(loss, [oracle.shift, oracle.widen])))
    assert gradients[0].abs().max() < 1e-9
    assert gradients[1].abs().max() > 1e-3


@pytest.mark.slow
def test_doubly_reparameterized_gradient_follows_latents_that_depend_on_latents() -> None:
    """z₁ → z₂ in the guide; against the gradient of the value, on average."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    a = torch.tensor(1.5, dtype=F64, requires_grad=True)
    c = torch.tensor(1.3, dtype=F64, requires_grad=True)
    theta = torch.tensor(-0.5, dtype=F64, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(theta * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, 0.7))
            pyro.sample("z2", dist.Normal(c * z1, 0.9))

    runs, gradients = 2000, {}
    for doubly in (False, True):
        elbo = IWAE_ELBO(3, doubly_reparameterized=doubly)(model, guide)  # type: ignore[arg-type]
        gradients[doubly] = torch.stack(
            [torch.stack(torch.autograd.grad(elbo(x), [a, c, theta])) for _ in range(runs)]
        )
    mean = {doubly: g.mean(0) for doubly, g in gradients.items()}
    error = {doubly: g.std(0) / runs**0.5 for doubly, g in gradients.items()}
    assert ((mean[True] - mean[False]).abs() < 4 * torch.hypot(error[True], error[False])).all()
    assert (mean[False].abs() > 6 * error[False]).all()


def test_iwae_says_where_a_subsampled_plate_would_stand_inside_the_logarithm() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    x = torch.zeros(10)
    with pytest.raises(ValueError, match=r"site 'x' .* subsampled plate 'data' \(10 of 100\)"):
        IWAE_ELBO(2).loss(model, guide, x)
    assert math.isfinite(IWAE_ELBO(1).loss(model, guide, x))


def test_iwae_says_where_the_joint_density_is_no_sum_over_points() -> None:
    def model(x: Tensor, depends: bool) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("outside", z.sum(-1) if depends else x.sum())

    def guide(x: Tensor, depends: bool) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"sites \['outside'\] lie outside the plates"):
        IWAE_ELBO(3, vectorize_particles=False).loss(model, guide, x, True)
    assert math.isfinite(IWAE_ELBO(3, vectorize_particles=False).loss(model, guide, x, False))


# --- InfoVAE's special cases, to the last digit --------------------------------------------------

BETA = 0.37


def same(a: TermsELBO, b: TermsELBO, oracle: LinearGaussian) -> bool:
    values = []
    for elbo in (a, b):
        torch.manual_seed(1)
        values.append(elbo.loss(oracle.model, oracle.guide, oracle.x))
    return values[0] == values[1]


def test_infovae_is_the_elbo_and_the_beta_vae(oracle: LinearGaussian) -> None:
    with torch.no_grad():
        oracle.shift += 0.5
    assert same(InfoVAE_ELBO(0.0, 1.0), BetaVAE_ELBO(), oracle)
    assert same(InfoVAE_ELBO(1 - BETA, BETA), BetaVAE_ELBO(1 - (1 - BETA)), oracle)
    assert not same(InfoVAE_ELBO(0.0, 1.5), BetaVAE_ELBO(), oracle)


class MMDVAE(TermsELBO):
    """The MMD-VAE as its authors' code has it: reconstruction and a weighted MMD."""

    def formula(self, terms):  # type: ignore[no-untyped-def]
        nll = terms.total(-terms.log_likelihood)
        return nll + 499.0 * terms.num_points * MMD()(*(value[0] for value in terms.aggregate()))


class AAE(TermsELBO):
    """The adversarial autoencoder: reconstruction and the Jensen-Shannon divergence."""

    def __init__(self, divergence: Adversarial) -> None:
        super().__init__()
        self.divergence = divergence

    def formula(self, terms):  # type: ignore[no-untyped-def]
        nll = terms.total(-terms.log_likelihood)
        return nll + terms.num_points * self.divergence(*(value[0] for value in terms.aggregate()))


def test_infovae_is_the_mmd_vae_and_the_adversarial_autoencoder(oracle: LinearGaussian) -> None:
    def close(a: TermsELBO, b: TermsELBO) -> bool:
        values = []
        for elbo in (a, b):
            torch.manual_seed(1)
            values.append(elbo.loss(oracle.model, oracle.guide, oracle.x))
        return values[0] == pytest.approx(values[1], rel=1e-13)

    assert close(InfoVAE_ELBO(1.0, 499.0, MMD()), MMDVAE())
    network = ResidualDiscriminator(oracle.d, 8, 1).double()
    torch.nn.init.normal_(network.output.weight)
    jensen_shannon = Adversarial(network, "saturating")
    assert close(InfoVAE_ELBO(1.0, 1.0, jensen_shannon), AAE(jensen_shannon))
    assert not close(InfoVAE_ELBO(1.0, 500.0, MMD()), MMDVAE())


def test_divergence_is_of_the_aggregate_posterior_over_the_minibatch() -> None:
    """q(z) is N(0, I) for data from the model, at the exact posterior, and MMD says so; q(z|x)
    is far from it for each x, which is what Pyro's Trace_MMD would compare."""
    n = 1000
    oracle = LinearGaussian(0, num_points=n)
    with torch.no_grad():
        terms = InfoVAE_ELBO().terms(oracle.model, oracle.guide, oracle.x)
        z, draws = (value[0] for value in terms.aggregate())
        assert z.shape == draws.shape == (n, oracle.d)
        # both means are over n independent draws: sd of the unbiased estimate, by permutation
        mixed = torch.cat([z, draws])
        null = torch.stack([MMD()(*mixed[torch.randperm(2 * n)].split(n)) for _ in range(20)])
        assert MMD()(z, draws) < 4 * null.std()
        of_one = terms.pairs[0].guide.nodes["z"]["fn"].sample((500,))[:, 0]
        assert MMD()(of_one, draws[:500]) > 20 * null.std()


def test_stein_and_mmd_agree_on_the_value(oracle: LinearGaussian) -> None:
    """Stein's surrogate has a gradient only; what it reports is the MMD."""
    assert same(InfoVAE_ELBO(0.0, 3.0, Stein()), InfoVAE_ELBO(0.0, 3.0, Stein().mmd), oracle)


# --- denoising -----------------------------------------------------------------------------------


def test_denoising_costs_what_the_noise_does(oracle: LinearGaussian) -> None:
    """E_ε KL(q(z|x + ε) ‖ p(z|x)) = ½ σ² tr(Aᵀ M A), A the slope of the guide's mean."""
    slope = oracle.W @ oracle.precision.inverse() / oracle.s**2  # [D, d]
    runs, costs = 400, []
    for sigma in (0.1, 0.3, 1.0):
        elbo = DVAE_ELBO(sigma, analytic_kl=False)
        values = torch.tensor(
            [elbo.loss(oracle.model, oracle.guide, oracle.x) for _ in range(runs)], dtype=F64
        )
        found = values.mean() + oracle.log_evidence.sum()
        expected = len(oracle.x) * sigma**2 / 2 * (slope @ oracle.precision @ slope.T).trace()
        assert abs(found - expected) < 4 * values.std() / runs**0.5
        costs.append(found)
    assert costs[0] < costs[1] < costs[2]


def test_partially_denoising_costs_its_share(oracle: LinearGaussian) -> None:
    slope = oracle.W @ oracle.precision.inverse() / oracle.s**2
    cost = len(oracle.x) * 0.5**2 / 2 * (slope @ oracle.precision @ slope.T).trace()
    runs, elbo = 400, DVAE_ELBO(0.5, 0.25, analytic_kl=False)
    values = torch.tensor(
        [elbo.loss(oracle.model, oracle.guide, oracle.x) for _ in range(runs)], dtype=F64
    )
    expected = 0.75 * cost - oracle.log_evidence.sum()
    assert abs(values.mean() - expected) < 4 * values.std() / runs**0.5
    assert 0.25 * cost > 8 * values.std() / runs**0.5  # the test can tell


def test_partially_denoising_has_one_state_for_both_parts(oracle: LinearGaussian) -> None:
    """Without noise it is the loss inside, step for step."""
    schedule = {"n_steps_kl_warmup": 4}
    plain = BetaVAE_ELBO(KLSchedule(**schedule))
    mixed = DVAE_ELBO(0.0, 0.5, BetaVAE_ELBO(KLSchedule(**schedule)))
    for _ in range(4):
        values = []
        for elbo in (plain, mixed):
            with torch.no_grad():
                oracle.widen.fill_(-20)  # no noise in z to speak of
            values.append(elbo.differentiable_loss(oracle.model, oracle.guide, oracle.x).item())
        assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.slow
def test_divergence_of_several_particles_is_unbiased() -> None:
    """At the posterior MMD² is 0; pairs of particles of one x would raise it."""
    oracle, values = LinearGaussian(1, num_points=16), []
    elbo = InfoVAE_ELBO(0.0, 2.0, num_particles=16, vectorize_particles=True)
    truth = LinearGaussian(1, num_points=16)
    for _ in range(400):
        noise = torch.randn(16, oracle.d, dtype=F64) @ truth.W.T
        x = noise + truth.b + truth.s * torch.randn(16, oracle.D, dtype=F64)
        with torch.no_grad():
            terms = elbo.terms(oracle.model, oracle.guide, x)
            values.append(elbo._divergence(terms))
    found = torch.stack(values)
    standard_error = found.std() / len(found) ** 0.5
    assert abs(found.mean()) < 4 * standard_error
    assert standard_error < 0.002  # pairs within one x raise it by 0.02 and more


@pytest.mark.parametrize("vectorize_particles", [True, False])
def test_diwae_has_one_noise_for_all_particles(vectorize_particles: bool) -> None:
    oracle, seen = LinearGaussian(0), []

    def guide(x: Tensor, size: int | None = None) -> None:
        seen.append(x)
        oracle.guide(x, size)

    iwae = IWAE_ELBO(5, vectorize_particles=vectorize_particles, max_plate_nesting=1)
    elbo = DVAE_ELBO(0.5, elbo=iwae)
    elbo.loss(oracle.model, guide, oracle.x)
    assert len(seen) == (1 if vectorize_particles else 5)
    assert all((x == seen[0]).all() for x in seen)
    assert (seen[0] != oracle.x).any()
    elbo.loss(oracle.model, guide, oracle.x)
    assert (seen[-1] != seen[0]).any()
