"""GRAE and its Taylor objective, against closed forms and plain torch."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.autograd import functional
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_vae.curvature import Expansion
from pyro_vae.guides import AutoFlow, AutoImplicit
from pyro_vae.losses import DVAE_ELBO, GRAE_ELBO, Taylor_ELBO
from pyro_vae.terms import NonFiniteError

CURVATURES = ["hessian", "gauss-newton", "columns", "first-order"]


def plate(x, size=None):
    size = len(x) if size is None else size
    return pyro.plate("data", size, subsample=torch.arange(len(x)))


# --- the linear-Gaussian model: everything is known ----------------------------------------------


class LinearGaussian:
    """z ~ N(0, I), x | z ~ N(W z + b, s² I), with dimensions drawn at random."""

    def __init__(self, seed, n=5):
        torch.manual_seed(seed)
        self.d = int(torch.randint(1, 5, ()))
        dim = int(torch.randint(self.d, 8, ()))
        self.W = torch.randn(dim, self.d).double()
        self.b, self.s = torch.randn(dim).double(), 0.5 + torch.rand(()).double()
        self.eye = torch.eye(self.d).double()
        self.x = torch.randn(n, dim).double()
        self.precision = self.eye + self.W.T @ self.W / self.s**2
        mean = torch.linalg.solve(self.precision, self.W.T @ (self.x - self.b).T / self.s**2)
        self.posterior = dist.MultivariateNormal(mean.T, precision_matrix=self.precision)
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(dim).double()
        self.evidence = dist.MultivariateNormal(self.b, covariance).log_prob(self.x)

    def model(self, x, size=None):
        with plate(x, size):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, self.s).to_event(1), obs=x)

    def guide(self, fn):
        def guide(x, size=None):
            with plate(x, size):
                pyro.sample("z", fn)

        return guide

    def elbo(self, q, beta=1.0):
        """E_q log p(x|z) − β KL(q ‖ p), in closed form [N]."""
        error = self.x - self.b - q.mean @ self.W.T
        covariance = q.covariance_matrix
        squares = error.square().sum(-1) + torch.einsum("di,nij,dj->n", self.W, covariance, self.W)
        log_p = -squares / (2 * self.s**2) - len(self.b) * (
            self.s.log() + math.log(2 * math.pi) / 2
        )
        kl = (
            covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
            + q.mean.square().sum(-1)
            - self.d
            - covariance.logdet()
        ) / 2
        return log_p - beta * kl

    def gaussians(self):
        """A guide of each structure, none of them the posterior; and each with its covariance."""
        n, d = len(self.x), self.d
        mean = torch.randn(n, d).double()
        scale = torch.rand(n, d).double() + 0.2
        full = torch.randn(n, d, d).double()
        full = full @ full.mT + 0.1 * self.eye
        block = full.clone()
        block[:, : d // 2, d // 2 :] = block[:, d // 2 :, : d // 2] = 0
        as_full = dist.MultivariateNormal(mean, scale_tril=scale.diag_embed())
        yield "diagonal", dist.Normal(mean, scale).to_event(1), as_full
        for name, covariance in (("block", block), ("full", full)):
            fn = dist.MultivariateNormal(mean, covariance)
            yield name, fn, fn


@pytest.fixture(params=range(6))
def linear(request):
    return LinearGaussian(request.param)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_covariance_is_that_of_the_posterior(curvature, linear):
    """At β = 1; the guide's own covariance plays no part."""
    guide = linear.guide(dist.Normal(linear.posterior.mean, 7.0).to_event(1))
    posterior = GRAE_ELBO(curvature=curvature).posterior(linear.model, guide, linear.x)
    torch.testing.assert_close(posterior.mean, linear.posterior.mean)
    torch.testing.assert_close(posterior.covariance_matrix, linear.posterior.covariance_matrix)
    assert not posterior.mean.requires_grad
    found = GRAE_ELBO(curvature=curvature).posterior_covariance(linear.model, guide, linear.x)
    assert found.equal(posterior.covariance_matrix)
    scaled = GRAE_ELBO(beta=0.3).posterior_covariance(linear.model, guide, linear.x)
    precision = linear.eye + linear.W.T @ linear.W / linear.s**2 / 0.3
    torch.testing.assert_close(scaled, precision.inverse().expand_as(scaled))


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_loss_at_the_posterior_mean_is_the_evidence(curvature, linear):
    """To the constant: log p(x|z) is quadratic, and Σ is the posterior's."""
    guide = linear.guide(dist.Delta(linear.posterior.mean, event_dim=1))
    loss = GRAE_ELBO(curvature=curvature).differentiable_loss(linear.model, guide, linear.x)
    torch.testing.assert_close(loss, -linear.evidence.sum())


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_taylor_is_the_elbo(curvature, beta, linear):
    for _, fn, q in linear.gaussians():
        loss = Taylor_ELBO(beta, curvature)
        found = loss.differentiable_loss(linear.model, linear.guide(fn), linear.x)
        torch.testing.assert_close(found, -linear.elbo(q, beta).sum())


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_gap_between_taylor_and_grae(beta, linear):
    for _, fn, q in linear.gaussians():
        args = linear.model, linear.guide(fn), linear.x
        found = Taylor_ELBO(beta).loss(*args) - GRAE_ELBO(beta, "hessian").loss(*args)
        A = linear.eye + linear.W.T @ linear.W / linear.s**2 / beta
        product = A @ q.covariance_matrix
        trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
        gap = beta / 2 * (trace - product.logdet() - linear.d)
        assert found == pytest.approx(gap.sum().item(), rel=1e-8, abs=1e-8)
        assert (gap > 0).all()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_taylor_with_the_best_covariance_is_grae(beta, linear):
    mean = torch.randn(len(linear.x), linear.d).double()
    guide = linear.guide(dist.Delta(mean, event_dim=1))
    best = GRAE_ELBO(beta).posterior(linear.model, guide, linear.x)
    args = linear.model, linear.guide(best), linear.x
    assert Taylor_ELBO(beta).loss(*args) == pytest.approx(GRAE_ELBO(beta).loss(*args), rel=1e-9)


# --- a VAE with a nonlinear decoder, beside the same in plain torch ------------------------------

LATENT, PIXELS, HIDDEN = 4, 7, 6


class VAE(nn.Module):
    def __init__(self, family="logits"):
        super().__init__()
        self.family = family
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, LATENT))
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS)
        )

    def model(self, x, size=None):
        pyro.module("decoder", self.decoder)
        with plate(x, size):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), x.new_ones(())).to_event(1))
            g = self.decoder(z)
            if self.family == "normal":
                fn = dist.Normal(g, x.new_tensor(0.5))
            else:
                fn = (
                    dist.Bernoulli(logits=g)
                    if self.family == "logits"
                    else dist.Bernoulli(g.sigmoid())
                )
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("encoder", self.encoder)
        with plate(x, size):
            h = self.encoder(x)
            pyro.sample("z", dist.Normal(h, 0.3 * torch.ones_like(h)).to_event(1))

    def output(self, z):
        g = self.decoder(z)
        return g.sigmoid() if self.family == "probs" else g

    def log_likelihood(self, z, x):
        g = self.decoder(z)
        if self.family == "normal":
            return dist.Normal(g, 0.5).log_prob(x).sum()
        return -binary_cross_entropy_with_logits(g, x, reduction="sum")

    def weights(self, z, x):
        g = self.output(z)
        if self.family == "normal":
            return torch.full_like(g, 4.0)
        if self.family == "logits":
            return g.sigmoid() * (1 - g.sigmoid())
        return 1 / (1 - x - g) ** 2

    def precision(self, h, x, curvature):
        """−H of one data point, by brute force."""
        if curvature == "hessian":
            return -functional.hessian(lambda z: self.log_likelihood(z, x), h, create_graph=True)
        J = functional.jacobian(self.output, h, create_graph=True)
        return J.T @ (self.weights(h, x)[:, None] * J)

    def reference(self, x, beta, curvature, columns=range(LATENT), orthogonality=0.0):
        """The loss, data point by data point."""
        total = 0.0
        for xn in x:
            h = self.encoder(xn)
            G = self.precision(h, xn, curvature)
            w = G.diagonal()
            if curvature in ("hessian", "gauss-newton"):
                R = beta / 2 * torch.logdet(torch.eye(LATENT).to(G) + G / beta)
            elif curvature == "columns":
                R = beta / 2 * LATENT / len(columns) * sum((1 + w[i] / beta).log() for i in columns)
            else:
                R = LATENT / len(columns) * sum(w[i] / 2 for i in columns)
            for i, j in itertools.combinations(range(LATENT), 2) if orthogonality else ():
                R = R + orthogonality * G[i, j] ** 2 / (w[i] * w[j])
            total = total - self.log_likelihood(h, xn) + beta / 2 * h.square().sum() + R
        return total


def make_vae(family="logits", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    vae = VAE(family).to(dtype)
    x = torch.rand(5, PIXELS, dtype=dtype)
    return vae, x if family == "normal" else x.round()


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


pytestmark = pytest.mark.usefixtures("param_store")


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("family", ["logits", "probs", "normal"])
def test_value_and_gradients_are_those_of_plain_torch(family, curvature):
    vae, x = make_vae(family)
    beta = 3.0 if curvature == "hessian" else 0.4  # wide enough for a Hessian of any sign
    loss = GRAE_ELBO(beta, curvature).differentiable_loss(vae.model, vae.guide, x)
    expected = vae.reference(x, beta, curvature)
    torch.testing.assert_close(loss, expected)
    for found, grad in zip(gradients(loss, vae), gradients(expected, vae), strict=True):
        assert grad.any()
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_taylor_value_and_gradients_are_those_of_plain_torch(curvature):
    vae, x = make_vae()
    loss = Taylor_ELBO(0.4, curvature).differentiable_loss(vae.model, vae.guide, x)
    expected = 0.0
    for xn in x:
        h = vae.encoder(xn)
        trace = -(0.3**2) * vae.precision(h, xn, curvature).trace()
        kl = (h.square() + 0.3**2 - 1).sum() / 2 - LATENT * math.log(0.3)
        expected = expected - vae.log_likelihood(h, xn) - trace / 2 + 0.4 * kl
    torch.testing.assert_close(loss, expected)
    for found, grad in zip(gradients(loss, vae), gradients(expected, vae), strict=True):
        assert grad.any()
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("curvature", ["gauss-newton", "columns", "first-order"])
def test_penalty_on_columns_that_are_not_orthogonal(curvature):
    vae, x = make_vae()
    loss = GRAE_ELBO(0.4, curvature, orthogonality=1.7)
    found = loss.differentiable_loss(vae.model, vae.guide, x)
    expected = vae.reference(x, 0.4, curvature, orthogonality=1.7)
    torch.testing.assert_close(found, expected)
    for mine, grad in zip(gradients(found, vae), gradients(expected, vae), strict=True):
        torch.testing.assert_close(mine, grad)


def test_penalty_vanishes_for_orthogonal_columns_and_counts_pairs_of_parallel_ones():
    x = torch.zeros(2, 5).double()

    def penalty(W):
        def model(x):
            with plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

        def guide(x):
            with plate(x):
                pyro.sample("z", dist.Delta(x.new_ones(len(x), 3), event_dim=1))

        with_penalty = GRAE_ELBO(orthogonality=1.0).loss(model, guide, x)
        return with_penalty - GRAE_ELBO().loss(model, guide, x)

    assert penalty(torch.eye(3, 5).double() * 2) == pytest.approx(0, abs=1e-12)
    parallel = torch.tensor([1.0, -2.0, 3.0]).double()[:, None] * torch.ones(5).double()
    assert penalty(parallel) == pytest.approx(2 * 3)  # two points, three pairs each
    assert penalty(torch.zeros(3, 5).double()) == 0  # of no length: no angle


# --- columns -------------------------------------------------------------------------------------


def test_all_columns_bound_the_determinant():
    """Hadamard; an equality for orthogonal columns."""
    for seed in range(5):
        vae, x = make_vae(seed=seed)
        args = vae.model, vae.guide, x
        assert GRAE_ELBO(0.4, "columns").loss(*args) > GRAE_ELBO(0.4).loss(*args)
    linear = LinearGaussian(1)
    linear.W = torch.linalg.qr(linear.W).Q * torch.arange(1, linear.d + 1)
    args = linear.model, linear.guide(dist.Delta(linear.posterior.mean, event_dim=1)), linear.x
    assert GRAE_ELBO(0.4, "columns").loss(*args) == pytest.approx(GRAE_ELBO(0.4).loss(*args))


@pytest.mark.parametrize("curvature", ["columns", "first-order"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_drawn_columns_are_right_on_average(k, curvature, monkeypatch):
    """Over all choices; each is the sum of its columns, scaled by d/k."""
    vae, x = make_vae()
    loss = GRAE_ELBO(0.4, curvature, num_columns=k)
    values = []
    for choice in itertools.permutations(range(LATENT)):
        monkeypatch.setattr(torch, "randperm", lambda d, choice=choice: torch.tensor(choice))
        values.append(loss.loss(vae.model, vae.guide, x))
        expected = vae.reference(x, 0.4, curvature, columns=choice[:k])
        assert values[-1] == pytest.approx(expected.item(), rel=1e-10)
    expected = GRAE_ELBO(0.4, curvature).loss(vae.model, vae.guide, x)
    assert sum(values) / len(values) == pytest.approx(expected, rel=1e-10)
    assert max(values) - min(values) > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_drawn_pairs_are_right_on_average(k, monkeypatch):
    vae, x = make_vae()
    values = []
    for choice in itertools.permutations(range(LATENT)):
        monkeypatch.setattr(torch, "randperm", lambda d, choice=choice: torch.tensor(choice))
        loss = GRAE_ELBO(0.4, "columns", num_columns=k, orthogonality=1.7)
        values.append(loss.loss(vae.model, vae.guide, x))
    expected = GRAE_ELBO(0.4, "columns", orthogonality=1.7).loss(vae.model, vae.guide, x)
    assert sum(values) / len(values) == pytest.approx(expected, rel=1e-10)


def test_columns_are_drawn_anew_and_by_the_seed():
    vae, x = make_vae()
    loss = GRAE_ELBO(0.4, "columns", num_columns=1)

    def values(seed):
        torch.manual_seed(seed)
        return [loss.loss(vae.model, vae.guide, x) for _ in range(20)]

    assert values(0) == values(0)
    assert len({round(value, 9) for value in values(0)}) == LATENT  # every column comes up


@pytest.mark.parametrize(("orthogonality", "count"), [(0.0, 1), (0.1, 2)])
def test_no_more_columns_are_computed_than_needed(orthogonality, count, monkeypatch):
    vae, x = make_vae()
    asked, gauss_newton = [], Expansion.gauss_newton

    def spy(self, columns):
        asked.append(len(columns))
        return gauss_newton(self, columns)

    monkeypatch.setattr(Expansion, "gauss_newton", spy)
    GRAE_ELBO(0.4, "columns", 1, orthogonality).loss(vae.model, vae.guide, x)
    assert asked == [count]


def test_all_columns_are_hadamards_sum_and_not_random():
    vae, x = make_vae()
    args = vae.model, vae.guide, x
    expected = vae.reference(x, 0.4, "columns").item()
    for k in (None, LATENT):
        state = torch.get_rng_state()
        assert GRAE_ELBO(0.4, "columns", num_columns=k).loss(*args) == pytest.approx(expected)
        assert torch.get_rng_state().equal(state)


# --- as a loss among Pyro's ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_nothing_is_sampled(make):
    vae, x = make_vae()
    state = torch.get_rng_state()
    values = {make().loss(vae.model, vae.guide, x) for _ in range(3)}
    values |= {
        make(num_particles=5, vectorize_particles=vectorize, max_plate_nesting=1).loss(
            vae.model, vae.guide, x
        )
        for vectorize in (True, False)
    }
    assert len(values) == 1
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_three_ways_to_ask_for_the_value_and_no_grad(make):
    vae, x = make_vae()
    loss = make()
    value = loss.differentiable_loss(vae.model, vae.guide, x)
    assert value.item() == loss.loss(vae.model, vae.guide, x)
    assert value.item() == loss(vae.model, vae.guide)(x).item()
    expected = gradients(value, vae)
    assert value.item() == loss.loss_and_grads(vae.model, vae.guide, x)
    for param, grad in zip(vae.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad)
    with torch.no_grad():
        silent = loss.differentiable_loss(vae.model, vae.guide, x)
    assert silent.item() == value.item()
    assert not silent.requires_grad


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_svi_steps_as_a_torch_optimiser(make):
    vae, x = make_vae()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    module, by_torch = make()(vae.model, vae.guide), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        by_torch.append(loss.item())
    pyro.clear_param_store()
    vae, x = make_vae()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), make())
    by_svi = [*(svi.step(x) for _ in range(3)), svi.evaluate_loss(x)]
    assert by_svi == pytest.approx(by_torch, rel=1e-12)
    assert by_svi == sorted(by_svi, reverse=True)


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_minibatch_stands_for_the_data_set(make):
    vae, x = make_vae()
    value = make().loss(vae.model, vae.guide, x)
    assert make().loss(vae.model, vae.guide, x, size=50) == pytest.approx(10 * value)
    parts = [make().loss(vae.model, vae.guide, part, size=5) for part in x.split(1)]
    assert sum(parts) / 5 == pytest.approx(value)  # each of the five stands for all


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_masked_points_are_absent(make):
    vae, x = make_vae()
    mask = torch.tensor([True, False, True, True, False])

    def masked(program):
        return poutine.mask(program, mask=mask)

    value = make().loss(masked(vae.model), masked(vae.guide), x)
    assert value == pytest.approx(make().loss(vae.model, vae.guide, x[mask]))


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_scale_of_all_sites_and_of_the_latents_alone(make):
    vae, x = make_vae()

    def scaled(program, scale):
        return poutine.scale(program, scale=scale)

    value = make(0.4).loss(scaled(vae.model, 2.5), scaled(vae.guide, 2.5), x)
    assert value == pytest.approx(2.5 * make(0.4).loss(vae.model, vae.guide, x))

    def annealed(program):  # Pyro's way to weigh the KL
        def run(x):
            with Annealing():
                program(x)

        return run

    value = make(1.0).loss(annealed(vae.model), annealed(vae.guide), x)
    assert value == pytest.approx(make(0.4).loss(vae.model, vae.guide, x))


class Annealing(poutine.messenger.Messenger):
    """Scale the site z, as poutine.scale around its statement does."""

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["scale"] = msg["scale"] * 0.4


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoDelta, AutoMultivariateNormal])
def test_autoguides_have_a_mean(make_guide):
    """In plates or in one site of all latents, the value is the same."""
    linear = LinearGaussian(3)
    guide = make_guide(linear.model, init_loc_fn=lambda site: linear.posterior.mean)
    guide(linear.x)
    loss = GRAE_ELBO().differentiable_loss(linear.model, guide, linear.x)
    torch.testing.assert_close(loss, -linear.evidence.sum())
    loss.backward()
    locs = [p for name, p in guide.named_parameters() if "scale" not in name]
    assert locs
    for loc in locs:  # the mean of the posterior is where the loss is flat
        assert loc.grad is not None
        torch.testing.assert_close(loc.grad, torch.zeros_like(loc))


def test_latents_shared_by_all_data():
    """Eight Schools' kind of model: mu, tau and eta are one point of ten latents."""
    torch.manual_seed(0)
    y = torch.randn(8).double()

    def model():
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
        tau = pyro.sample("tau", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, 1.0), obs=y)

    guide = AutoNormal(
        model, init_loc_fn=lambda site: 0.3 * torch.ones(site["fn"].shape()).double()
    )
    guide()
    z = 0.3 * torch.ones(10).double()

    def log_likelihood(z):
        return dist.Normal(z[0] + z[1] * z[2:], 1.0).log_prob(y).sum()

    for curvature in ("hessian", "gauss-newton"):
        if curvature == "hessian":
            precision = -functional.hessian(log_likelihood, z)
        else:
            J = functional.jacobian(lambda z: z[0] + z[1] * z[2:], z)
            precision = J.T @ J
        beta = 4.0
        A = torch.eye(10).double() + precision / beta
        expected = -log_likelihood(z) + beta / 2 * z.square().sum() + beta / 2 * A.logdet()
        loss = GRAE_ELBO(beta, curvature)
        assert loss.loss(model, guide) == pytest.approx(expected.item())
        torch.testing.assert_close(loss.posterior_covariance(model, guide)[0], A.inverse())


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_latents_in_a_plate_of_their_own(make):
    """Regression weights: the data are in another plate, and each depends on all weights."""
    linear = LinearGaussian(2, n=1)
    y, X = linear.x[0] - linear.b, linear.W

    def model():
        with pyro.plate("weights", linear.d):
            w = pyro.sample("w", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(X @ w, linear.s), obs=y)

    posterior = GRAE_ELBO().posterior(model, AutoDelta(model, lambda site: y.new_zeros(linear.d)))
    torch.testing.assert_close(posterior.covariance_matrix, linear.posterior.covariance_matrix[:1])
    scale = torch.rand(linear.d).double() + 0.2

    def guide():
        with pyro.plate("weights", linear.d):
            pyro.sample("w", dist.Normal(linear.posterior.mean[0], scale))

    q = dist.MultivariateNormal(linear.posterior.mean, scale_tril=scale.diag().unsqueeze(0))
    expected = linear.evidence if make is GRAE_ELBO else linear.elbo(q)
    assert make().loss(model, guide) == pytest.approx(-expected.item())


def test_inner_loss_of_a_denoising_one():
    vae, x = make_vae()
    torch.manual_seed(1)
    found = DVAE_ELBO(0.5, elbo=GRAE_ELBO()).loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    noisy = x + 0.5 * torch.randn_like(x)
    assert found == pytest.approx(GRAE_ELBO().loss(vae.model, lambda x: vae.guide(noisy), x))


@pytest.mark.parametrize("loss", [GRAE_ELBO(0.4, "columns", 1, 0.5), Taylor_ELBO(0.4)])
def test_copies_agree(loss):
    vae, x = make_vae()
    values = []
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.manual_seed(1)
        values.append(other.loss(vae.model, vae.guide, x))
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_single_precision(curvature):
    vae, x = make_vae(dtype=torch.float32)
    loss = GRAE_ELBO(3.0, curvature).differentiable_loss(vae.model, vae.guide, x)
    assert loss.dtype == torch.float32
    other, y = make_vae(dtype=torch.float32)
    expected = other.double().reference(y.double(), 3.0, curvature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        GRAE_ELBO(0.5),
        GRAE_ELBO(0.5, "hessian"),
        GRAE_ELBO(0.5, "columns", num_columns=1, orthogonality=0.1),
        GRAE_ELBO(0.5, "first-order"),
        Taylor_ELBO(0.5),
        Taylor_ELBO(0.5, "gauss-newton"),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{loss.curvature}",
)
def test_training_on_digits(loss):
    digits = pytest.importorskip("sklearn.datasets").load_digits().data[:64]
    x = torch.tensor(digits / 16).float().round()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 4))
    decoder = nn.Sequential(nn.Linear(4, 32), nn.ELU(), nn.Linear(32, 64))

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    values = []
    for _ in range(50):
        optimizer.zero_grad()
        values.append(loss.loss_and_grads(model, guide, x) / len(x))
        optimizer.step()
    assert all(map(math.isfinite, values))
    assert sum(values[-5:]) / 5 < 0.75 * values[0]


# --- what makes no sense -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRAE_ELBO(0.0), "beta must be positive and finite, found 0"),
        (lambda: Taylor_ELBO(math.inf), "beta must be positive and finite, found inf"),
        (lambda: GRAE_ELBO(math.nan), "found nan"),
        (lambda: GRAE_ELBO(curvature="exact"), "one of .*'columns'.* found 'exact'"),
        (lambda: Taylor_ELBO(curvature="columns"), "one of .*, found 'columns'"),
        (lambda: GRAE_ELBO(curvature="columns", num_columns=0), "at least 1, found 0"),
        (lambda: GRAE_ELBO(num_columns=2), "num_columns is for .* found 2 with 'gauss-newton'"),
        (lambda: GRAE_ELBO(orthogonality=-1.0), "orthogonality .* found -1"),
        (lambda: GRAE_ELBO(curvature="hessian", orthogonality=1.0), "orthogonality .* 'hessian'"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_columns_than_latents():
    vae, x = make_vae()
    loss = GRAE_ELBO(curvature="columns", num_columns=LATENT + 1)
    with pytest.raises(ValueError, match=r"num_columns must be at most .* 4, found 5"):
        loss.loss(vae.model, vae.guide, x)


def positive(x):
    with plate(x):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_prior_that_is_no_standard_normal(make):
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"_ELBO needs a standard normal prior at site 'z'"):
        make().loss(positive, AutoNormal(positive), x)


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
@pytest.mark.parametrize("make_guide", [AutoFlow, AutoImplicit])
def test_guide_without_a_mean(make_guide, make):
    linear = LinearGaussian(0)
    guide = make_guide(linear.model)
    guide(linear.x)
    with pytest.raises(ValueError, match=r"about the guide's mean, .* found \w+Distribution"):
        make().loss(linear.model, guide, linear.x)


def test_taylor_takes_a_gaussian_guide():
    linear = LinearGaussian(0)
    guide = linear.guide(dist.Delta(linear.posterior.mean, event_dim=1))
    with pytest.raises(ValueError, match=r"Taylor_ELBO .* Normal .* guide site 'z', found Delta"):
        Taylor_ELBO().loss(linear.model, guide, linear.x)


def laplace(x):
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Laplace(z, 1.0), obs=x)


def test_family_without_a_known_curvature():
    guide = AutoNormal(laplace)
    guide(torch.ones(3))
    with pytest.raises(ValueError, match=r"site 'x' is not known: found Laplace.*\"hessian\""):
        GRAE_ELBO().loss(laplace, guide, torch.ones(3))


def test_where_no_covariance_is_best():
    """x ~ N(z², 1) has H = 2(x − 3z²)… = 2x at z = 0: I − H/β = 1 − 2x/β."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Delta(torch.zeros(len(x))))

    x = torch.tensor([0.1, 0.7, 2.0])
    loss = GRAE_ELBO(1.0, "hessian")
    for use in (loss.loss, loss.posterior_covariance):
        with pytest.raises(ValueError, match=r"at 2 of 3 data points, first at 1: .*\['z'\]"):
            use(model, guide, x)
    wide = GRAE_ELBO(8.0, "hessian").posterior_covariance(model, guide, x).flatten()
    torch.testing.assert_close(wide, 1 / (1 - 2 * x / 8))
    assert math.isfinite(GRAE_ELBO(1.0).loss(model, guide, x))


@pytest.mark.parametrize("make", [GRAE_ELBO, Taylor_ELBO])
def test_values_that_are_not_finite(make):
    vae, x = make_vae()
    with torch.no_grad():
        vae.decoder[0].weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"x|decoder"):
        make().loss_and_grads(vae.model, vae.guide, x)
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="decoder"):
        make().loss_and_grads(vae.model, vae.guide, x)
