"""What only the implicit guide has: noise, a contrast, a learned density."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae import models
from pyro_vae.guides import AutoFlow, AutoImplicit
from pyro_vae.models import rosenbrock
from pyro_vae.nn import MLP
from pyro_vae.ratios import AdaptiveContrast

pytestmark = pytest.mark.usefixtures("param_store")


@pytest.fixture
def model(dtype, device):
    one = torch.ones((), dtype=dtype, device=device)

    def model():
        rate = pyro.sample("rate", dist.LogNormal(0.5 * one, 2 * one))
        pyro.sample("z", dist.Normal(rate, one))

    return model


def test_density_is_learned(model):
    assert AutoImplicit(model).get_posterior().learned_density


def test_draws_are_noise_through_the_network(model, dtype):
    guide = AutoImplicit(model, noise_dim=7, hidden_dims=(5, 4))
    guide.setup()
    network = guide.sampler.network
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [5, 4, 2]
    torch.manual_seed(1)
    z = guide.get_posterior().rsample((9,))
    torch.manual_seed(1)
    noise = torch.randn(9, 7, dtype=dtype, device=z.device)
    torch.testing.assert_close(z, guide.sampler.loc + guide.sampler.scale * network(noise))


def test_the_discriminator_is_ours_to_choose(model):
    class T(nn.Module):
        def __init__(self, latent_dim):
            super().__init__()
            self.mlp = MLP(latent_dim, 1, (4,))

        def forward(self, z):
            return self.mlp(z).squeeze(-1)

    guide = AutoImplicit(model, discriminator=T)
    q = guide.get_posterior()
    assert isinstance(guide.ratio.network, T)
    z = q.sample((5,))
    torch.testing.assert_close(
        q.log_prob(z),
        guide.ratio.network(guide.ratio.contrast.standardize(z)) + guide.ratio.contrast.log_prob(z),
    )


def test_adaptive_contrast_starts_at_the_samplers_moments(model):
    """Both sides are 4,096 and 20,000 draws: means within four standard errors, sd within 10 %."""
    guide = AutoImplicit(model)
    with torch.no_grad():
        z = guide.get_posterior().sample((20_000,))
    contrast = guide.ratio.contrast
    assert isinstance(contrast, AdaptiveContrast)
    se = z.std(0) * math.sqrt(1 / 4096 + 1 / 20_000)
    assert ((contrast.loc - z.mean(0)).abs() < 4 * se).all()
    assert ((contrast.scale / z.std(0) - 1).abs() < 0.1).all()


def test_prior_contrast_is_the_prior_in_unconstrained_space(model):
    """log rate ~ N(0.5, 2) with the Jacobian; z ~ N(rate, 1)."""
    guide = AutoImplicit(model, contrast="prior")
    guide.setup()
    contrast = guide.ratio.contrast
    z = torch.randn(6, 4, 2).to(guide.sampler.loc).requires_grad_()
    expected = dist.Normal(0.5, 2.0).log_prob(z[..., 0])
    expected = expected + dist.Normal(z[..., 0].exp(), 1.0).log_prob(z[..., 1])
    torch.testing.assert_close(contrast.log_prob(z), expected)
    assert torch.equal(contrast.standardize(z), z)

    draws = contrast.sample(torch.Size((5000, 2)))
    assert draws.shape == (5000, 2, 2)
    assert draws.dtype == z.dtype
    log_rate = draws.reshape(-1, 2)[:, 0]
    residual = draws.reshape(-1, 2)[:, 1] - log_rate.exp()
    assert abs(log_rate.mean() - 0.5) < 4 * 2 / 100
    assert abs(log_rate.std() / 2 - 1) < 4 / math.sqrt(20_000)
    assert abs(residual.mean()) < 4 / 100
    assert abs(residual.std() - 1) < 4 / math.sqrt(20_000)


def test_untrained_log_prob_is_the_contrasts(model):
    """T starts at zero, so the density claimed at first is that of r."""
    for contrast in ("adaptive", "prior"):
        pyro.clear_param_store()
        guide = AutoImplicit(model, contrast=contrast)
        q = guide.get_posterior()
        z = q.sample((5,))
        torch.testing.assert_close(q.log_prob(z), guide.ratio.contrast.log_prob(z))


def test_prior_contrast_needs_a_prior():
    guide = AutoImplicit(rosenbrock, contrast="prior")
    guide.setup()
    with pytest.raises(ValueError, match="'x' has an improper prior"):
        guide.get_posterior().discriminate(5)


def test_bad_contrast(model):
    with pytest.raises(ValueError, match="'adaptive' or 'prior', found 'posterior'"):
        AutoImplicit(model, contrast="posterior")


def test_less_noise_than_latents_has_no_density(model):
    with pytest.raises(ValueError, match="found 1, expected 2 or more"):
        AutoImplicit(model, noise_dim=1).setup()


FUNCTIONS = [name for name in models.__all__ if not isinstance(getattr(models, name), type)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("make", [AutoFlow, AutoImplicit])
def test_starts_on_every_model(make, name):
    """A half-Cauchy's mean is infinite: a guide must not start there."""
    guide = make(getattr(models, name))
    guide.setup()
    assert all(value.isfinite().all() for value in guide.state_dict().values())


def test_a_failed_setup_is_none():
    """The second call says what is wrong again, rather than that a parameter is missing."""
    guide = AutoImplicit(models.gauss, noise_dim=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="noise_dim must be at least the number of latents"):
            guide()
    with pytest.raises(ValueError, match="hidden_dims must be at least the number of latents"):
        AutoImplicit(models.gauss, hidden_dims=(8, 1)).setup()


def test_a_start_that_is_not_finite_names_its_site():
    def infinite(site):
        return torch.full_like(site["fn"].sample(), torch.inf)

    with pytest.raises(ValueError, match="site 'x' starts at"):
        AutoFlow(models.gauss, init_loc_fn=infinite).setup()
