"""The flow guide's density is a density, and the one of its draws."""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal

from pyro_vae.guides import AutoFlow
from pyro_vae.guides.flow import FlowDistribution, zuko

pytestmark = pytest.mark.usefixtures("param_store")

FLOWS = {
    "NICE": {},
    "NSF": {"flow": zuko.flows.NSF, "transforms": 2, "hidden_features": (16,)},
    "MAF": {"flow": zuko.flows.MAF, "transforms": 2, "hidden_features": (16,)},
}


@pytest.fixture(params=[1, 2, 4])
def dim(request):
    return request.param


@pytest.fixture(params=FLOWS)
def guide(request, dim, dtype, device):
    """A flow that is far from a standard normal, with a location and scale of its own."""

    def model():
        zeros = torch.zeros(dim, dtype=dtype, device=device)
        pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))

    guide = AutoFlow(model, **FLOWS[request.param])
    guide.setup()
    with torch.no_grad():
        guide.loc.copy_(torch.linspace(-0.5, 0.5, dim))
        guide.log_scale.copy_(torch.linspace(-0.2, 0.3, dim))
    return guide


def test_log_prob_is_the_change_of_variables(guide, dim):
    """log q(z) = log N(u; 0, I) − log |det ∂z/∂u|, the Jacobian by autograd."""
    q = guide.get_posterior()
    u = torch.randn(5, dim).to(guide.loc)
    for row in u:
        jacobian = torch.autograd.functional.jacobian(q.dist.transform.inv, row)
        z = q.dist.transform.inv(row)
        expected = Normal(0.0, 1.0).log_prob(row).sum() - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
@torch.no_grad()
def test_integrates_to_one(guide, dim):
    q = guide.get_posterior()
    z = q.sample((20_000,))
    low, high = z.min(0).values - 2, z.max(0).values + 2
    points = {1: 20_000, 2: 250}[dim]  # a random spline in 1-d has steep places
    axes = [torch.linspace(a, b, points).to(z) for a, b in zip(low, high, strict=True)]
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    mass = (q.log_prob(torch.cartesian_prod(*axes).reshape(-1, dim)).exp().sum() * cell).item()
    assert mass == pytest.approx(1.0, abs=0.01)


def test_the_density_kept_with_a_draw_is_the_one_computed_anew(guide):
    kept = guide.get_posterior()
    z = kept.rsample((50,))
    torch.testing.assert_close(kept.log_prob(z), guide.get_posterior().log_prob(z.clone()))
    assert kept.log_prob(z).requires_grad


def test_draws_have_the_density(guide, dim):
    """E_q[p/q] = 1 for a normal p about the draws, within four standard errors."""
    with torch.no_grad():
        q = guide.get_posterior()
        z = q.sample((20_000,))
        p = torch.distributions.Independent(Normal(z.mean(0), 0.5 * z.std(0)), 1)
        weights = (p.log_prob(z) - q.log_prob(z)).exp()
    se = weights.std() / math.sqrt(len(z))
    assert (weights.mean() - 1).abs() < 4 * se
    assert se < 0.15


def test_density_is_known(guide):
    q = guide.get_posterior()
    assert isinstance(q, FlowDistribution)
    assert q.has_rsample
    assert not getattr(q, "learned_density", False)


def test_draws_are_not_kept_alive(guide):
    """A ZukoToPyro caches every draw as long as it lives: each call must have a new one."""
    assert guide.get_posterior() is not guide.get_posterior()
    assert not guide.get_posterior().cache


def test_flow_arguments_arrive():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def count(**kwargs):
        guide = AutoFlow(model, **kwargs)
        guide.setup()
        return len(guide.flow.transform.transforms)

    assert count() == 6
    assert count(transforms=2) == 2
    assert count(flow=zuko.flows.NSF, transforms=3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [True, False])
def test_import_leaves_validation_as_it_was(enabled):
    """Zuko switches it off for all of torch.distributions."""
    script = f"""
import pyro, torch
pyro.enable_validation({enabled})
before = torch.distributions.Distribution._validate_args
import pyro_vae.guides, zuko
assert torch.distributions.Distribution._validate_args is before is {enabled}
assert pyro.distributions.is_validation_enabled() is {enabled}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
