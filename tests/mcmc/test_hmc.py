"""HMC against exact posteriors, as an object with Pyro's interface, and under bad input."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae.capture import capture
from pyro_vae.mcmc import HMC, effective_sample_size
from pyro_vae.mcmc.draws import Draws
from pyro_vae.mcmc.kernel import (
    HMCKernel,
    HMCState,
    Metric,
    hmc_step,
    make_leapfrog,
    potential_and_gradient,
)

Y = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
SIGMA = torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])


def eight_schools(y=Y, sigma=SIGMA):
    """The posterior of the AVB paper; two mirrored modes."""
    zero, one = sigma.new_zeros(()), sigma.new_ones(())
    mu = pyro.sample("mu", dist.Normal(zero, one))
    tau = pyro.sample("tau", dist.Normal(zero, one))
    with pyro.plate("schools", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(zero, one))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def exact_tau():
    """Grid and normalised weights of p(τ | y): given τ the evidence is Gaussian."""
    y, sigma = Y.double().numpy(), SIGMA.double().numpy()
    tau = np.linspace(-6, 6, 4001)
    log_evidence = np.array(
        [
            stats.multivariate_normal.logpdf(y, np.zeros(8), np.diag(sigma**2 + t**2) + 1.0)
            for t in tau
        ]
    )
    log_weight = log_evidence + stats.norm.logpdf(tau)
    weight = np.exp(log_weight - log_weight.max())
    return tau, weight / weight.sum()


def exact_mean_mu():
    tau, weight = exact_tau()
    y, sigma = Y.double().numpy(), SIGMA.double().numpy()
    variance = sigma**2 + tau[:, None] ** 2
    return float((weight * (y / variance).sum(1) / (1 + (1 / variance).sum(1))).sum())


def agree(draws, exact, n_eff, what):
    """Assert that a mean lies within four Monte Carlo standard errors of the exact value."""
    error = (draws.double().mean(0) - exact).abs()
    standard_error = draws.double().std(0) / torch.as_tensor(n_eff).sqrt()
    assert bool((error < 4 * standard_error).all()), (what, error, standard_error)


def run(model, *args, num_chains=64, num_samples=300, warmup_steps=200, **options):
    options = {"progress": False, "seed": 0, "compile": False, **options}
    mcmc = HMC(model, num_chains, num_samples, warmup_steps, **options)
    mcmc.run(*args)
    return mcmc


@pytest.fixture(scope="module")
def small():
    return run(eight_schools, num_chains=32, num_samples=60, warmup_steps=60)


# -- right answers ------------------------------------------------------------------------


def check_eight_schools(mcmc):
    diagnostics = mcmc.diagnostics()
    samples = mcmc.get_samples()
    tau, weight = exact_tau()
    n_eff = {name: diagnostics[name]["n_eff"] for name in samples}
    agree(samples["tau"], 0.0, n_eff["tau"], "E tau")
    agree(samples["eta"], 0.0, n_eff["eta"], "E eta")
    agree(samples["mu"], exact_mean_mu(), n_eff["mu"], "E mu")
    # τ² mixes no slower than τ, whose ESS is a lower bound here.
    agree(samples["tau"] ** 2, (weight * tau**2).sum(), n_eff["tau"], "E tau^2")
    verdict = mcmc.check()
    assert verdict.passed, str(verdict)


@pytest.mark.slow
def test_two_mode_eight_schools():
    mcmc = HMC(eight_schools, 256, 800, 300, progress=False, seed=1, compile=True)
    mcmc.run()
    check_eight_schools(mcmc)
    # The whole marginal of τ: by symmetry half on each side, and quartiles of |τ|.
    tau, weight = exact_tau()
    draws = mcmc.get_samples()["tau"].double().abs()
    n_eff = float(mcmc.diagnostics()["tau"]["n_eff"])
    for point in (0.2, 0.6, 1.2):
        exact = weight[np.abs(tau) < point].sum()
        standard_error = math.sqrt(exact * (1 - exact) / n_eff)
        assert abs(float((draws < point).double().mean()) - exact) < 4 * standard_error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ground_truth_of_the_paper(seed):
    mcmc = HMC(eight_schools, 256, 1954, progress=False, seed=seed)
    mcmc.run()
    check_eight_schools(mcmc)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_conjugate_sites_on_their_supports(dtype):
    counts = torch.tensor([3.0, 1.0, 6.0], dtype=dtype)
    heads = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=dtype)
    times = torch.tensor([0.5, 2.0, 1.0], dtype=dtype)
    one = torch.ones((), dtype=dtype)

    def model():
        p = pyro.sample("p", dist.Dirichlet(counts.new_ones(3)))
        pyro.factor("counts", (counts * p.log()).sum())
        q = pyro.sample("q", dist.Beta(2 * one, 3 * one))
        rate = pyro.sample("rate", dist.Gamma(2 * one, one))
        with pyro.plate("flips", 4):
            pyro.sample("heads", dist.Bernoulli(q), obs=heads)
        with pyro.plate("waits", 3):
            pyro.sample("times", dist.Exponential(rate), obs=times)

    mcmc = run(model, compile=dtype == torch.float32)
    samples = mcmc.get_samples()
    assert all(value.dtype == dtype for value in samples.values())
    exact = {
        "p": dist.Dirichlet(1 + counts),
        "q": dist.Beta(5 * one, 4 * one),
        "rate": dist.Gamma(5 * one, 1 + times.sum()),
    }
    for name, posterior in exact.items():
        n_eff = mcmc.diagnostics()[name]["n_eff"]
        agree(samples[name], posterior.mean.double(), n_eff, name)
        # The squares of these bounded-skew variables mix alike; half the ESS is granted them.
        second = (posterior.variance + posterior.mean**2).double()
        agree(samples[name] ** 2, second, n_eff / 2, f"{name}^2")


def test_heavy_tail():
    """A half-Cauchy site: quantiles, since it has no mean."""

    def model():
        pyro.sample("scale", dist.HalfCauchy(2.0))

    mcmc = run(model, num_samples=500)
    draws = mcmc.get_samples()["scale"]
    n_eff = float(mcmc.diagnostics()["scale"]["n_eff"])
    for p in (0.25, 0.5, 0.75):
        quantile = 2.0 * math.tan(math.pi / 2 * p)
        error = abs(float((draws < quantile).double().mean()) - p)
        assert error < 4 * math.sqrt(p * (1 - p) / n_eff)


def test_correlated_gaussian_of_condition_number_ten_thousand():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    covariance = rotation @ torch.diag(torch.logspace(-2, 2, 8, dtype=torch.float64)) @ rotation.T
    precision = covariance.inverse()

    def model():
        zero = precision.new_zeros(8)
        x = pyro.sample("x", dist.Normal(zero, 1.0).to_event(1).mask(False))
        pyro.factor("density", -0.5 * x @ precision @ x)

    mcmc = run(model, num_chains=32, num_samples=150, warmup_steps=150)
    draws = mcmc.get_samples(group_by_chain=True)["x"].double() @ rotation
    n_eff = effective_sample_size(draws.square())
    exact = torch.logspace(-2, 2, 8, dtype=torch.float64)
    # The relative standard error of a Gaussian's variance is sqrt(2 / ESS) of its squares.
    error = (draws.square().mean((0, 1)) / exact - 1).abs()
    assert bool((error < 4 * (2 / n_eff).sqrt()).all())
    assert float(n_eff.min()) > 500


def test_lengths_are_jittered_so_that_no_gaussian_is_revisited():
    """A trajectory of 2π brings a standard normal back to where it was; a jittered one does not."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    mcmc = run(model, num_samples=200, warmup_steps=100, trajectory_length=2 * math.pi)
    assert float(mcmc.diagnostics()["x"]["n_eff"].min()) > 0.1 * 64 * 200


# -- the kernel ---------------------------------------------------------------------------


def quartic(z):
    return -(z**4).sum(-1) / 4 - (z[..., 0] * z[..., 1]) ** 2


def integrate(leapfrog, state, momentum, step_size, steps, mass):
    position, potential, gradient = state
    for _ in range(steps):
        position, momentum, potential, gradient = leapfrog(
            position, momentum, gradient, torch.tensor([[step_size]]).double(), mass
        )
    return HMCState(position, potential, gradient), momentum


def energy_error(potential, step_size):
    torch.manual_seed(0)
    position = torch.randn(50, 3, dtype=torch.float64)
    momentum = torch.randn(50, 3, dtype=torch.float64)
    mass = torch.ones(3, dtype=torch.float64)
    state = HMCState(position, *potential(position))
    end, last = integrate(
        make_leapfrog(potential), state, momentum, step_size, round(1 / step_size), mass
    )
    change = end.potential + last.square().sum(-1) / 2
    change = change - state.potential - momentum.square().sum(-1) / 2
    return float(change.abs().mean())


def test_leapfrog_is_reversible():
    potential = potential_and_gradient(quartic)
    torch.manual_seed(0)
    position, momentum = torch.randn(2, 20, 3, dtype=torch.float64)
    mass = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    start = HMCState(position, *potential(position))
    leapfrog = make_leapfrog(potential)
    end, last = integrate(leapfrog, start, momentum, 0.05, 30, mass)
    back, first = integrate(leapfrog, end, -last, 0.05, 30, mass)
    torch.testing.assert_close(back.position, position)
    torch.testing.assert_close(first, -momentum)
    assert not torch.allclose(end.position, position, atol=0.1)


def test_energy_error_is_of_second_order_and_shows_a_wrong_gradient():
    right = potential_and_gradient(quartic)

    def wrong(z):
        potential, gradient = right(z)
        return potential, 1.05 * gradient

    # Halving the step divides the error by four; with a wrong gradient it stays.
    assert 3 < energy_error(right, 0.02) / energy_error(right, 0.01) < 5
    assert energy_error(wrong, 0.01) > 0.9 * energy_error(wrong, 0.02)


def test_one_broken_chain_does_not_touch_the_others():
    def density(z):
        wall = torch.where(z[..., 0] > 50.0, torch.nan, 0.0)
        return -z.square().sum(-1) / 2 + wall * z[..., 0]

    potential = potential_and_gradient(density)
    kernel = HMCKernel(((1, make_leapfrog(potential)),))
    metric = Metric.unit(torch.zeros(2), dense=False)

    def step(position):
        torch.manual_seed(0)
        state = HMCState(position, *potential(position))
        return hmc_step(kernel, state, torch.full((4, 1), 0.3), metric, 5)

    good = torch.zeros(4, 2)
    broken = good.clone()
    broken[2] = torch.tensor([1e3, 0.0])
    (expected, _), (state, info) = step(good), step(broken)
    assert info.diverging.tolist() == [False, False, True, False]
    assert float(info.accept_prob[2]) == 0.0
    assert torch.equal(state.position[2], broken[2])
    others = [0, 1, 3]
    assert torch.equal(state.position[others], expected.position[others])


def test_a_density_that_is_nan_in_places_spoils_no_other_chain():
    """Proposals beyond the wall are refused, and what is left is a truncated normal."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 1.5, torch.nan, 0.0))

    mcmc = run(model, num_samples=500)
    draws = mcmc.get_samples()["x"]
    assert float(draws.max()) <= 1.5
    exact = stats.truncnorm(-math.inf, 1.5)
    agree(draws, exact.mean(), mcmc.diagnostics()["x"]["n_eff"], "truncated")


# -- models of other kinds ----------------------------------------------------------------


@pytest.mark.slow
def test_discrete_sites_are_summed_out():
    x = torch.tensor([-2.1, -1.9, 2.2, 1.8, 2.0])

    def common():
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5).to_event(1))
        return loc, pyro.sample("share", dist.Beta(2.0, 2.0))

    def discrete():
        loc, share = common()
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(share))
            pyro.sample("x", dist.Normal(loc[kind.long()], 0.5), obs=x)

    def summed():
        loc, share = common()
        weights = torch.stack([1 - share, share], -1)
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", mixture, obs=x)

    one, two = run(discrete, seed=0), run(summed, seed=1)
    assert set(one.get_samples()) == {"loc", "share"}
    for name in ("loc", "share"):
        found, wanted = one.get_samples()[name], two.get_samples()[name]
        error = found.var(0) / one.diagnostics()[name]["n_eff"]
        error = (error + wanted.var(0) / two.diagnostics()[name]["n_eff"]).sqrt()
        assert bool(((found.mean(0) - wanted.mean(0)).abs() < 4 * error).all()), name

    def counts():
        pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'n'"):
        run(counts)


@pytest.mark.slow
def test_a_model_that_branches_runs_on_pyros_nuts(tmp_path):
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * x)
        pyro.sample("y", dist.Normal(x if x > 0 else 3 * x, 1.0), obs=y)

    mcmc = HMC(model, 64, 200, 100, progress=False, seed=0)
    with pytest.warns(UserWarning, match="runs 4 of the 64 chains"):
        mcmc.run(torch.tensor(1.0))
    assert mcmc.num_chains == 4
    assert mcmc.get_samples(group_by_chain=True)["x"].shape == (4, 200)
    x = torch.linspace(-6, 6, 4001).double()
    log_p = dist.Normal(0, 1).log_prob(x) + dist.Normal(torch.where(x > 0, x, 3 * x), 1).log_prob(
        torch.tensor(1.0)
    )
    exact = float((torch.softmax(log_p, 0) * x).sum())
    agree(mcmc.get_samples()["x"], exact, mcmc.diagnostics()["x"]["n_eff"], "branch")
    data = mcmc.to_arviz()
    assert data.sample_stats["energy"].shape == (4, 200)
    assert "twice" in data.posterior
    assert str(mcmc.check())
    some = HMC(model, 64, 20, 20, thin=2, progress=False, seed=0, save_params=["twice"])
    with pytest.warns(UserWarning, match="runs 4 of the 64 chains"):
        some.run(torch.tensor(1.0))
    assert some.get_samples()["twice"].shape == (80,)
    with pytest.raises(ValueError, match="cannot be batched"):
        some.warmup(torch.tensor(1.0))


# -- the interface ------------------------------------------------------------------------


def test_shapes_and_sites(small):
    samples = small.get_samples()
    assert {name: list(value.shape) for name, value in samples.items()} == {
        "mu": [32 * 60],
        "tau": [32 * 60],
        "eta": [32 * 60, 8],
    }
    grouped = small.get_samples(group_by_chain=True)
    assert grouped["eta"].shape == (32, 60, 8)
    assert torch.equal(grouped["eta"].reshape(-1, 8), samples["eta"])
    assert small.get_samples(num_samples=7)["eta"].shape == (7, 8)
    assert small.get_samples(num_samples=7, group_by_chain=True)["eta"].shape == (32, 7, 8)
    assert small.unconstrained.shape == (32, 60, 10)
    assert small.num_superchains == 16


def test_diagnostics(small):
    diagnostics = small.diagnostics()
    for site, shape in [("mu", ()), ("tau", ()), ("eta", (8,))]:
        assert set(diagnostics[site]) == {"n_eff", "r_hat", "nested_r_hat"}
        assert all(value.shape == shape for value in diagnostics[site].values())
    chains = [f"chain {i:02d}" for i in range(32)]
    assert list(diagnostics["divergences"]) == chains == sorted(chains)
    assert list(diagnostics["acceptance rate"]) == chains
    assert all(0.0 <= rate <= 1.0 for rate in diagnostics["acceptance rate"].values())


def test_summary(small, capsys):
    small.summary(prob=0.8)
    printed = capsys.readouterr().out
    for text in ("10.0%", "90.0%", "eta[7]", "nested r_hat", "16 superchains of 2 chains"):
        assert text in printed
    with pytest.raises(ValueError, match="prob: found 2"):
        small.summary(prob=2)


def test_arviz(small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    diverging = small._draws.stats["diverging"]
    diverging[3, 10] = True
    small._diagnostics = None
    try:
        for data in (arviz.from_pyro(small), small.to_arviz()):
            assert data.posterior["eta"].shape == (32, 60, 8)
            assert data.sample_stats["diverging"].values.nonzero() == ([10], [3])
            np.testing.assert_allclose(data.observed_data["y"].values, Y.numpy())
    finally:
        diverging[3, 10] = False
        small._diagnostics = None
    stats = data.sample_stats
    assert {"energy", "acceptance_rate", "lp", "n_steps", "step_size"} <= set(stats)
    lp = small.model_density.log_density(small.unconstrained)
    np.testing.assert_allclose(stats["lp"].values, lp.numpy(), rtol=1e-4, atol=1e-4)


def test_arviz_has_the_log_likelihood_of_every_observation(small):
    data = small.to_arviz()
    samples = small.get_samples(group_by_chain=True)
    loc = samples["mu"] + samples["tau"] * samples["eta"].permute(2, 0, 1)
    wanted = dist.Normal(loc.permute(1, 2, 0), SIGMA).log_prob(Y)
    np.testing.assert_allclose(data.log_likelihood["y"], wanted, rtol=1e-4, atol=1e-4)
    assert "log_likelihood" not in small.to_arviz(log_likelihood=False).groups()


def test_predictive_takes_the_draws(small):
    predictive = pyro.infer.Predictive(eight_schools, small.get_samples(num_samples=30))
    assert predictive(None)["y"].shape == (30, 8)


def test_check_gives_a_verdict(small):
    verdict = small.check()
    assert "r_hat" in str(verdict).lower().replace(" ", "_") or "R̂" in str(verdict)
    stuck = run(eight_schools, num_chains=8, num_samples=60, num_superchains=8)
    stuck._draws.values[""][:, 3] = 9.0  # a chain in a place of its own
    stuck._samples = stuck._diagnostics = None
    assert not stuck.check().passed


def test_arviz_has_deterministic_sites():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * x)

    mcmc = run(model, num_chains=4, num_samples=5, warmup_steps=5)
    assert list(mcmc.get_samples()) == ["x"]
    posterior = mcmc.to_arviz().posterior
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["x"])


def test_seed_and_global_generator():
    draws = [
        run(eight_schools, num_chains=4, num_samples=5, warmup_steps=5).unconstrained
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    state = torch.get_rng_state()
    run(eight_schools, num_chains=4, num_samples=5, warmup_steps=5)
    assert torch.equal(state, torch.get_rng_state())
    again = []
    for _ in range(2):
        torch.manual_seed(3)
        mcmc = run(eight_schools, num_chains=4, num_samples=5, warmup_steps=5, seed=None)
        again.append(mcmc.unconstrained)
    assert torch.equal(*again)
    assert not torch.equal(again[0], draws[0])


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 25])
def test_short_warm_ups(warmup_steps):
    mcmc = run(eight_schools, num_chains=2, num_samples=3, warmup_steps=warmup_steps)
    assert mcmc.get_samples()["eta"].shape == (6, 8)


def test_initial_params():
    start = {"mu": torch.zeros(4), "tau": torch.ones(4), "eta": torch.zeros(4, 8)}
    options = {"num_chains": 4, "num_samples": 3, "warmup_steps": 0}
    mcmc = run(eight_schools, initial_params=start, num_superchains=2, **options)
    assert mcmc.num_superchains == 2
    start["mu"] = torch.arange(4.0) / 4
    mcmc = run(eight_schools, initial_params=start, num_superchains=2, **options)
    assert mcmc.num_superchains == 4  # no start is shared
    with pytest.raises(ValueError, match=r"site 'eta': found shape \[4\]; expected \[4, 8\]"):
        run(eight_schools, initial_params={**start, "eta": torch.zeros(4)}, **options)
    with pytest.raises(ValueError, match="found the sites \\['mu'\\]"):
        run(eight_schools, initial_params={"mu": torch.zeros(4)}, **options)
    start["tau"][2] = math.nan
    with pytest.raises(ValueError, match=r"not finite in the chains \[2\]"):
        run(eight_schools, initial_params=start, **options)


def interrupt_after(monkeypatch, calls):
    """Make the transition after so many raise what Ctrl-C raises."""
    left = iter(range(calls))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return hmc_step(*args)

    for module in ("hmc", "warmup"):
        monkeypatch.setattr(f"pyro_vae.mcmc.{module}.hmc_step", interrupted)


def test_interrupt_keeps_the_draws(monkeypatch):
    mcmc = HMC(eight_schools, 4, 50, 5, progress=False, compile=False)
    interrupt_after(monkeypatch, 5 + 7)
    with pytest.warns(UserWarning, match="7 of 50 draws"):
        mcmc.run()
    assert mcmc.num_samples == 7
    assert mcmc.get_samples(group_by_chain=True)["tau"].shape == (4, 7)
    assert mcmc.to_arviz().sample_stats["n_steps"].shape == (4, 7)


@pytest.mark.parametrize(
    "block_bytes",
    [1 << 24, pytest.param(3000, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)],
)
def test_draws_are_the_same_however_they_are_written(monkeypatch, block_bytes):
    """64, 17 or 1 at once, and looked at in between."""
    options = {"num_chains": 4, "num_samples": 150, "warmup_steps": 5}
    whole = run(with_twice, **options)
    monkeypatch.setattr("pyro_vae.mcmc.draws._BLOCK_BYTES", block_bytes)
    mcmc = HMC(with_twice, 4, 150, 5, progress=False, compile=False, seed=0)
    mcmc.save_params = ["x", "twice"]
    interrupt_after(monkeypatch, 5 + 101)
    append = Draws.append

    def look(draws, *args):
        append(draws, *args)
        if draws.count % 7 == 0:
            assert draws.thinned(10).isfinite().all()

    monkeypatch.setattr(Draws, "append", look)
    with pytest.warns(UserWarning, match="101 of 150 draws"):
        mcmc.run()
    found, expected = (x.get_samples(group_by_chain=True) for x in (mcmc, whole))
    torch.testing.assert_close(found["x"], expected["x"][:, :101])
    torch.testing.assert_close(found["twice"], 2 * expected["x"][:, :101])


@pytest.mark.parametrize(
    "dim", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 33]
)
@pytest.mark.parametrize("metric", ["diag", "dense"])
@pytest.mark.parametrize("num_chains", [1, 8])
def test_programs_are_called_with_the_layout_they_were_made_for(
    monkeypatch, tmp_path, dim, metric, num_chains
):
    """Compiled code does not look at strides: other ones would be wrong numbers."""

    def strides(x):
        return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]

    def checked(function, *examples, **kwargs):
        captured = capture(function, *examples, **{**kwargs, "compile": False})
        run, expected = captured.run, [strides(x) for x in examples]

        def check(*inputs):
            assert [strides(x) for x in inputs] == expected
            return run(*inputs)

        captured.run = check
        return captured

    def model():
        zero = torch.zeros(dim, dtype=torch.float64)
        pyro.sample("x", dist.Normal(zero, 1.0).to_event(1))

    monkeypatch.setattr("pyro_vae.mcmc.hmc.capture", checked)
    options = {"compile": True, "progress": False, "metric": metric, "seed": 0}
    mcmc = HMC(model, num_chains, 10, 25, **options)
    mcmc.run()
    mcmc.save_warmup(tmp_path / "state.pt")
    mcmc.warmup_state = mcmc.last_state
    mcmc.run()
    other = HMC(model, num_chains, 10, 25, **options)
    other.load_warmup(tmp_path / "state.pt")
    other.run()
    assert other.unconstrained.dtype is torch.float64
    assert bool(other.unconstrained.isfinite().all())


@pytest.mark.parametrize("calls", [pytest.param(0, marks=pytest.mark.slow), 33])
def test_interrupted_warm_up_goes_on_as_if_nothing_had_happened(monkeypatch, calls, tmp_path):
    options = {"num_chains": 8, "num_samples": 5, "warmup_steps": 40}
    whole = run(eight_schools, **options)
    mcmc = HMC(eight_schools, 8, 5, 40, progress=False, compile=False, seed=0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            mcmc.run()
    assert mcmc.warmup_state.adaptation.step == calls
    mcmc.save_warmup(tmp_path / "state.pt")
    mcmc.run()
    assert torch.equal(mcmc.unconstrained, whole.unconstrained)
    other = HMC(eight_schools, 8, 5, 40, progress=False, compile=False, seed=0)
    other.load_warmup(tmp_path / "state.pt")
    other.run()
    assert torch.equal(other.unconstrained, whole.unconstrained)


@pytest.mark.slow
def test_warm_up_apart_gives_the_same_draws_and_can_be_kept(tmp_path):
    options = {"num_chains": 8, "num_samples": 5, "warmup_steps": 40}
    whole = run(eight_schools, **options)
    mcmc = HMC(eight_schools, 8, 5, 40, progress=False, compile=False, seed=0)
    mcmc.warmup()
    mcmc.save_warmup(tmp_path / "state.pt")
    for _ in range(2):  # from the same state, with the same seed
        mcmc.run()
        assert torch.equal(mcmc.unconstrained, whole.unconstrained)
    assert mcmc.step_size == whole.step_size
    # Another seed, other draws, without a warm-up.
    mcmc.seed = 1
    mcmc.run()
    assert not torch.equal(mcmc.unconstrained, whole.unconstrained)
    # More draws go on where the last ended.
    before = mcmc.unconstrained.clone()
    mcmc.warmup_state = mcmc.last_state
    mcmc.run()
    assert float((mcmc.unconstrained[:, 0] - before[:, -1]).abs().mean()) < 2.0
    assert mcmc.last_state.stream == 3  # other random numbers, though the seed is the same
    wrong = HMC(eight_schools, 4, 5, 40, progress=False)
    wrong.load_warmup(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="warmup_state: found 8 chains; expected num_chains, 4"):
        wrong.run()
    wrong = HMC(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), 8, 5, 40, progress=False)
    wrong.load_warmup(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"warmup_state: found the sites \{'mu'"):
        wrong.run()
    with pytest.raises(RuntimeError, match="no warm-up yet"):
        HMC(eight_schools).save_warmup(tmp_path / "none.pt")


def test_warm_up_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("evil",)

    torch.save({"chains": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        HMC(eight_schools).load_warmup(tmp_path / "evil.pt")


def test_thin_keeps_every_so_many(tmp_path):
    options = {"num_chains": 4, "warmup_steps": 20}
    every = run(eight_schools, num_samples=12, **options)
    third = run(eight_schools, num_samples=4, thin=3, **options)
    assert torch.equal(third.unconstrained, every.unconstrained[:, 2::3])
    assert third.to_arviz().sample_stats["lp"].shape == (4, 4)
    steps, all_steps = (x.to_arviz().sample_stats["n_steps"].values[0] for x in (third, every))
    assert steps.tolist() == all_steps.reshape(4, 3).sum(-1).tolist()


def with_twice():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scale", dist.Exponential(1.0))
    pyro.deterministic("twice", 2 * x)


@pytest.mark.slow
def test_draws_of_some_sites_in_files(tmp_path):
    options = {"num_chains": 4, "num_samples": 70, "warmup_steps": 20}
    memory = run(with_twice, **options)
    files = run(with_twice, draws_dir=tmp_path / "draws", **options)
    assert torch.equal(files.unconstrained, memory.unconstrained)
    assert (tmp_path / "draws" / "unconstrained.bin").stat().st_size == 70 * 4 * 3 * 4
    some = run(with_twice, save_params=["twice"], draws_dir=tmp_path / "some", **options)
    assert list(some.get_samples()) == ["twice"]
    torch.testing.assert_close(some.get_samples()["twice"], 2 * memory.get_samples()["x"])
    assert (tmp_path / "some" / "twice.bin").exists()
    assert "twice" in some.diagnostics()
    assert list(some.to_arviz().posterior) == ["twice"]
    with pytest.raises(RuntimeError, match="only the sites \\['twice'\\] were kept"):
        _ = some.unconstrained
    with pytest.raises(ValueError, match="save_params: found \\['y'\\]"):
        run(with_twice, save_params=["y"], **options)
    with pytest.raises(ValueError, match="save_params: found 'twice'"):
        run(with_twice, save_params="twice", **options)


@pytest.mark.slow
def test_compiled_programs_serve_new_data():
    mcmc = HMC(eight_schools, 32, 400, 100, progress=False, compile=True, seed=0)
    mcmc.run()
    programs = [program.program[2] for program in mcmc._programs.values()]
    mcmc.run(-Y, SIGMA)  # the posterior mirrored: constants of the program, not code
    assert [program.program[2] for program in mcmc._programs.values()] == programs
    n_eff = mcmc.diagnostics()["mu"]["n_eff"]
    agree(mcmc.get_samples()["mu"], -exact_mean_mu(), n_eff, "E mu")
    mcmc.run(Y[:4], SIGMA[:4])  # other shapes, another program
    assert mcmc.get_samples()["eta"].shape[1] == 4


def test_too_many_chains_are_refused_before_they_are_tried():
    def wide():
        pyro.sample("x", dist.Normal(torch.zeros(10_000), 1.0).to_event(1))

    mcmc = HMC(wide, 4096, 1_000_000, progress=False)
    with pytest.raises(ValueError, match=r"num_chains: found 4096, which takes about \d+\.\d GiB"):
        mcmc.run()


@pytest.mark.slow
def test_a_chain_far_out_arrives():
    """Five hundred observations make a density so steep at the prior that no common step fits."""
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    y = x.sum(-1) + 0.1 * torch.randn(500)

    def regression():
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 3.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", 500):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    mcmc = run(regression, num_chains=32, num_samples=20, warmup_steps=100, num_superchains=32)
    assert float(mcmc.get_samples()["w"].std(0).max()) < 0.02
    assert int(mcmc._draws.stats["diverging"].sum()) == 0


def test_dense_metric_makes_a_correlated_gaussian_easy():
    torch.manual_seed(0)
    factor = torch.linalg.qr(torch.randn(20, 20)).Q * torch.logspace(-1, 0, 20)
    x = dist.MultivariateNormal(torch.zeros(20), factor @ factor.T + 1e-6 * torch.eye(20))

    def model():
        pyro.sample("x", x)

    steps = {}
    for metric in ("diag", "dense"):
        mcmc = run(model, num_chains=64, num_samples=30, warmup_steps=100, metric=metric)
        assert mcmc.inverse_mass.dim() == (2 if metric == "dense" else 1)
        steps[metric] = float(mcmc._draws.stats["num_steps"].double().mean())
        n_eff = mcmc.diagnostics()["x"]["n_eff"]
        agree(mcmc.get_samples()["x"], 0.0, n_eff, metric)
    assert 3 * steps["dense"] < steps["diag"]
    assert run(model, num_chains=2, num_samples=2, warmup_steps=10).inverse_mass.dim() == 1


def test_progress_goes_to_stderr(capsys):
    run(eight_schools, num_chains=2, num_samples=20, warmup_steps=20, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "accept=" in captured.err
    assert "step_size=" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains: found 0"),
        ({"num_samples": 0}, "num_samples: found 0"),
        ({"warmup_steps": -1}, "warmup_steps: found -1"),
        ({"num_chains": 2.5}, "num_chains: found 2.5"),
        ({"max_leapfrog_steps": 0}, "max_leapfrog_steps: found 0"),
        ({"trajectory_length": 0.0}, "trajectory_length: found 0"),
        ({"trajectory_length": math.nan}, "trajectory_length: found nan"),
        ({"target_accept": 1.0}, "target_accept: found 1"),
        ({"jitter": 1.5}, "jitter: found 1.5"),
        ({"thin": 0}, "thin: found 0"),
        ({"metric": "full"}, "metric: found 'full'"),
        ({"num_chains": 10, "num_superchains": 4}, "num_superchains: found 4"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HMC(eight_schools, **options)


def test_bad_models_are_named():
    with pytest.raises(RuntimeError, match="call run"):
        HMC(eight_schools).get_samples()
    with pytest.raises(ValueError, match="observed site 'y': found 1 NaN of 8"):
        run(eight_schools, torch.where(Y > 2, torch.nan, Y))

    def flat():
        pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(ValueError, match="improper posterior"):
        run(flat)


@pytest.mark.gpu
def test_cuda():
    mcmc = run(eight_schools, Y.cuda(), SIGMA.cuda(), num_samples=100, compile=True)
    assert mcmc.get_samples()["tau"].is_cuda
    assert sum(map(len, mcmc.diagnostics()["divergences"].values())) == 0
    assert mcmc.to_arviz().posterior["tau"].shape == (64, 100)


@pytest.mark.parametrize(
    ("num_chains", "expected"),
    [(4, 4), (16, 16), (256, 16), (100, 20), (50, 10), (34, 17), (37, 37)],
)
def test_default_superchains_are_enough(num_chains, expected):
    """Two or four starting points would say too little about the modes that chains miss."""
    assert HMC(eight_schools, num_chains).num_superchains == expected
