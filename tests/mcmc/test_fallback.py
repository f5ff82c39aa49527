"""Pyro's NUTS for models that do not batch: against quadrature, with every statistic."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vae.capture import UnconstrainedModel
from pyro_vae.mcmc.diagnostics import effective_sample_size
from pyro_vae.mcmc.fallback import NUTSDraws, can_batch, run_nuts


def branch(x):
    """A regression whose slope depends on the sign of a latent, by a Python branch."""
    z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
    loc = 2 * z if z > 0.3 else 0.6 - 0.5 * (z - 0.3)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


X = torch.tensor([1.0, 0.2, 1.5])


def quadrature(x):
    """Return means and standard deviations of (z, log scale) on a grid."""
    z, u = torch.meshgrid(
        torch.linspace(-5, 5, 2001, dtype=torch.float64),
        torch.linspace(-4, 4, 801, dtype=torch.float64),
        indexing="ij",
    )
    loc = torch.where(z > 0.3, 2 * z, 0.6 - 0.5 * (z - 0.3))
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(0.0, 0.5).log_prob(u)
    for value in x.tolist():
        log_p = log_p + dist.Normal(loc, u.exp()).log_prob(torch.tensor(value).double())
    p = torch.softmax(log_p.flatten(), 0)
    points = torch.stack([z.flatten(), u.flatten()], -1)
    mean = p @ points
    return mean, (p @ (points - mean).square()).sqrt()


def test_says_why_a_model_does_not_batch():
    assert "data-dependent control flow" in can_batch(UnconstrainedModel(branch, (X,)))

    def item():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z * float(z))

    assert "item()" in can_batch(UnconstrainedModel(item))

    def fine(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Multinomial(3, torch.stack([z.sigmoid(), 1 - z.sigmoid()])), obs=x)

    assert can_batch(UnconstrainedModel(fine, (torch.tensor([1.0, 2.0]),))) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_the_posterior(dtype, param_store):
    x = X.to(dtype)
    density = UnconstrainedModel(branch, (x,))
    reason = can_batch(density)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="runs 2 of the 2 chains, one after the other.*control"):
        draws = run_nuts(density, 700, 200, 2, reason=reason, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not param_store.keys()
    assert isinstance(draws, NUTSDraws)
    assert draws.position.shape == (2, 700, 2)
    assert draws.position.dtype == dtype
    for value in (draws.potential, draws.energy, draws.accept_prob):
        assert value.shape == (2, 700)
        assert value.dtype == dtype
    assert draws.accepted.dtype == draws.diverging.dtype == torch.bool
    assert draws.num_steps.dtype == torch.int64
    assert draws.step_size.shape == (2,)

    mean, std = quadrature(x)
    position = draws.position.double()
    error = std / effective_sample_size(position).sqrt()
    assert bool(((position.mean((0, 1)) - mean).abs() < 4 * error).all())
    squares = (position - mean).square()
    error = squares.flatten(0, 1).std(0) / effective_sample_size(squares).sqrt()
    assert bool(((squares.mean((0, 1)) - std.square()).abs() < 4 * error).all())


def test_statistics_mean_what_they_say():
    density = UnconstrainedModel(branch, (X.double(),))
    with pytest.warns(UserWarning, match="one after the other"):
        draws = run_nuts(density, 200, 100, 1, reason=can_batch(density), seed=1)
    draws = NUTSDraws(*(value[0] for value in draws))
    expected = torch.stack([-density.log_density(row) for row in draws.position])
    torch.testing.assert_close(draws.potential, expected)
    # The momentum of a transition begins from a normal distribution: 2 K is chi-squared with two
    # degrees of freedom, of mean 2 and standard deviation 2. Four standard errors.
    kinetic = draws.energy[1:] - draws.potential[:-1]
    assert bool((kinetic > 0).all())
    assert abs(float(2 * kinetic.mean()) - 2) < 4 * 2 / math.sqrt(199)
    moved = (draws.position[1:] != draws.position[:-1]).any(-1)
    assert torch.equal(draws.accepted[1:], moved)
    assert 0.5 < float(draws.accept_prob.mean()) <= 1
    assert int(draws.num_steps.min()) >= 1
    assert int(draws.num_steps.max()) < 2**10
    assert float(draws.diverging.double().mean()) < 0.1


def test_divergences_are_counted():
    def cliff():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", -1e6 * z.square() if z > 0.5 else 0.0 * z)

    density = UnconstrainedModel(cliff)
    with pytest.warns(UserWarning, match="one after the other"):
        draws = run_nuts(density, 60, 20, 1, reason=can_batch(density), seed=0)
    assert bool(draws.diverging.any())
    assert not bool(draws.diverging.all())
    assert bool((draws.position <= 0.5).all())


def test_a_seed_makes_it_reproducible_and_starts_are_honoured():
    density = UnconstrainedModel(branch, (X,))
    reason = can_batch(density)
    start = torch.tensor([[1.0, 0.5], [-2.0, 0.1], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    runs = []
    for seed in (3, 3, 4):
        with pytest.warns(UserWarning, match="runs 4 of the 5 chains"):
            runs.append(run_nuts(density, 3, 2, 5, reason=reason, initial=start, seed=seed))
    assert runs[0].position.shape == (4, 3, 2)
    assert torch.equal(runs[0].position, runs[1].position)
    assert not torch.equal(runs[0].position, runs[2].position)
    # A chain that starts so far out is still on its way.
    start[1, 0] = 1e4
    with pytest.warns(UserWarning, match="runs 2 of the 2 chains"):
        draws = run_nuts(density, 1, 0, 2, reason=reason, initial=start, seed=0, max_tree_depth=1)
    assert float(draws.position[0, 0, 0]) < 100 < float(draws.position[1, 0, 0])
    for bad, shape in [(start[0], r"\[2\]"), (start[:1], r"\[1, 2\]"), (start[:, :1], r"\[5, 1\]")]:
        with pytest.raises(ValueError, match=rf"initial: found shape {shape}; expected \[2, 2\]"):
            run_nuts(density, 1, 1, 2, reason=reason, initial=bad)


class Interrupting:
    """A model that presses the keys once it has run so often."""

    def __init__(self):
        self.runs, self.stop_at = 0, None

    def __call__(self, x):
        self.runs += 1
        if self.runs == self.stop_at:
            raise KeyboardInterrupt
        branch(x)


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupt_keeps_what_was_drawn(finished):
    model = Interrupting()
    density = UnconstrainedModel(model, (X,))
    reason = can_batch(density)

    def run():
        model.runs = 0
        return run_nuts(density, 30, 20, 2, reason=reason, initial=torch.zeros(2, 2), seed=0)

    with pytest.warns(UserWarning, match="one after the other"):
        full = run()
    second = int(full.num_steps[1].sum())
    # Among the draws of the second chain, or of the first, after about as many runs each.
    model.stop_at = model.runs - second // 2 - (0 if finished else model.runs // 2)
    kept = r"interrupted: 1 of 2 chains of \d+ draws are kept"
    with pytest.warns(UserWarning, match="one after"), pytest.warns(UserWarning, match=kept):
        draws = run()
    drawn = draws.position.shape[1]
    assert drawn == 30 if finished else 0 < drawn < 30
    assert torch.equal(draws.position[0], full.position[0, :drawn])
    assert all(len(value) == 1 for value in draws)


def test_an_interrupt_in_the_warm_up_is_the_callers():
    model = Interrupting()
    density = UnconstrainedModel(model, (X,))
    reason = can_batch(density)
    model.stop_at = model.runs + 20
    with pytest.warns(UserWarning, match="one after"), pytest.raises(KeyboardInterrupt):
        run_nuts(density, 30, 20, 2, reason=reason, initial=torch.zeros(2, 2), seed=0)


def test_discrete_sites_are_summed_out():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z + k if z > 0 else z - k, 1.0), obs=x)

    density = UnconstrainedModel(model, (X[0],), enumerate_discrete=True)
    with pytest.warns(UserWarning, match="one after"):
        draws = run_nuts(density, 5, 5, 1, reason=can_batch(density), seed=0)
    expected = -density.log_density(draws.position[0])
    torch.testing.assert_close(draws.potential[0], expected)


def test_is_invisible_to_handlers_around_it():
    density = UnconstrainedModel(branch, (X,))
    reason = can_batch(density)
    with pytest.warns(UserWarning, match="one after"), poutine.trace() as tracer:
        run_nuts(density, 2, 1, 1, reason=reason)
    assert not tracer.trace.nodes


def test_sites_that_come_and_go_stay_an_error():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 2.5:  # rarely, and not in two draws from the prior
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the latent sites depend on random values"):
        UnconstrainedModel(model)
