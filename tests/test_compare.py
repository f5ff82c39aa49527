"""`compare` against closed forms, as a guest in the user's process, and under bad input.

Exact draws from known posteriors serve as the reference wherever HMC is not what is tested.
"""

import importlib
import math
import random
import re
import warnings

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch.distributions import constraints, kl_divergence

from pyro_vae import compare
from pyro_vae.guides import AutoFlow
from pyro_vae.mcmc import HMC
from pyro_vae.mcmc.checks import ConvergenceError
from pyro_vae.models import gauss

COLUMNS = [
    "guide",
    "kl",
    "kl_se",
    "knn_kl",
    "knn_kl_se",
    "elbo",
    "max_mean_error",
    "max_sd_error",
    "khat",
    "steps",
    "seconds",
]
FAILED = "hmc (failed its checks)"
N = 4000

X = torch.tensor([1.0, 2.0, 3.0])
MEAN, SD = 1.5, 0.5  # of the posterior below
LOG_EVIDENCE = float(dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(X))


def linear_gaussian(x=X):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def normal_guide(mean, sd):
    def guide(x=X):
        pyro.sample("m", dist.Normal(mean, sd))

    return guide


def exact(x=X):
    pyro.sample("m", dist.Normal(MEAN, SD))


def learnable(x=X):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("m", dist.Normal(loc, scale))


def posterior_draws(n=2 * N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {"m": MEAN + SD * torch.randn(n, generator=generator)}


def run(guides, model=linear_gaussian, **options):
    """Compare guides as they are with exact draws, unless told otherwise."""
    defaults = {"reference": posterior_draws(), "num_steps": 0, "num_draws": N, "progress": False}
    return compare(model, guides, **{**defaults, **options})


def rows(comparison):
    return comparison.table.set_index("guide")


def numbers(comparison):
    return comparison.table.drop(columns="seconds")


# -- numbers against closed forms -----------------------------------------------------------


@pytest.fixture(scope="module")
def known():
    guides = {
        "exact": exact,
        "shifted": normal_guide(MEAN + SD, SD),
        "wide": normal_guide(MEAN, 2 * SD),
        "narrow": normal_guide(MEAN, 0.2 * SD),
    }
    return run(guides)


def test_the_table_has_its_columns_and_the_reference_first(known):
    assert list(known.table.columns) == COLUMNS
    assert list(known.table["guide"]) == ["hmc", "exact", "shifted", "wide", "narrow"]
    assert not known.errors
    first = rows(known).loc["hmc"]
    assert first[["kl", "kl_se", "elbo", "khat"]].isna().all()
    assert list(rows(known)["steps"].iloc[1:]) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("guide", "expected"),
    # KL(N(δ, 1) ‖ N(0, 1)) = δ²/2 and KL(N(0, s²) ‖ N(0, 1)) = (s² − 1)/2 − log s. The wide guide
    # has draws where the reference has none, and the estimator is known to be low there.
    [("hmc", 0.0), ("exact", 0.0), ("shifted", 0.5), ("narrow", -0.48 - math.log(0.2))],
)
def test_kl_to_the_reference(known, guide, expected):
    row = rows(known).loc[guide]
    assert 0 < row["knn_kl_se"] < 0.05
    assert abs(row["knn_kl"] - expected) < 4 * row["knn_kl_se"]


def test_kl_by_densities(known):
    table = rows(known)
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(X)
    assert known.evidence.guide == "exact"
    assert known.evidence.value == pytest.approx(evidence.item(), abs=1e-4)
    assert known.evidence.standard_error < 1e-5
    assert math.isnan(table.loc["hmc", "kl"])
    assert table.loc["exact", "kl"] == pytest.approx(0, abs=1e-4)
    for guide, kl in (
        ("shifted", 0.5),
        ("wide", 1.5 - math.log(2)),
        ("narrow", -0.48 - math.log(0.2)),
    ):
        assert 0 < table.loc[guide, "kl_se"] < 0.04
        assert abs(table.loc[guide, "kl"] - kl) < 4 * table.loc[guide, "kl_se"]


def test_no_kl_without_weights_that_can_be_trusted():
    comparison = run({"narrow": normal_guide(MEAN, 0.2 * SD)})
    assert rows(comparison).loc["narrow", "khat"] > 0.7
    assert comparison.evidence is None
    assert math.isnan(rows(comparison).loc["narrow", "kl"])


def test_neighbours_that_cannot_tell_a_wide_guide_are_told_on():
    d = 20

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))

    def wide():
        pyro.sample("z", dist.Normal(torch.zeros(d), 1.5).to_event(1))

    reference = {"z": torch.randn(2 * N, d, generator=torch.Generator().manual_seed(2))}
    comparison = run({"exact": model, "wide": wide}, model, reference=reference)
    row = rows(comparison).loc["wide"]
    expected = d * ((1.5**2 - 1) / 2 - math.log(1.5))
    assert abs(row["kl"] - expected) < 4 * row["kl_se"]
    assert row["knn_kl"] < expected / 2
    evidence, told = repr(comparison).splitlines()[-2:]
    assert evidence.startswith("log p(x) = ")
    assert re.fullmatch(r"wide: knn_kl is \S+, kl is 4\.\S+ nats: believe the latter", told)


@pytest.mark.parametrize(("guide", "expected"), [("hmc", 0.0), ("exact", 0.0), ("shifted", 1.0)])
def test_mean_error_in_posterior_standard_deviations(known, guide, expected):
    # The difference of two means of N draws each, and the unit's own error.
    standard_error = math.sqrt((2 + expected**2 / 2) / N)
    assert abs(rows(known).loc[guide, "max_mean_error"] - expected) < 4 * standard_error


@pytest.mark.parametrize(
    ("guide", "ratio"), [("hmc", 1.0), ("exact", 1.0), ("wide", 2.0), ("narrow", 0.2)]
)
def test_sd_error_in_posterior_standard_deviations(known, guide, ratio):
    standard_error = ratio * math.sqrt(1 / N)  # a standard deviation's is σ/√(2n); two of them
    found = rows(known).loc[guide, "max_sd_error"]
    assert abs(found - abs(ratio - 1)) < 4 * standard_error


def test_elbo_of_the_exact_posterior_is_the_log_evidence(known):
    assert rows(known).loc["exact", "elbo"] == pytest.approx(LOG_EVIDENCE, abs=1e-5)


@pytest.mark.parametrize(
    ("guide", "kl", "sd"),
    # log w = −KL + fluctuations: δu for the shift, (s² − 1)(u² − 1)/2 for the scale.
    [
        ("shifted", 0.5, 1.0),
        ("wide", 1.5 - math.log(2.0), 1.5 * math.sqrt(2)),
        ("narrow", -0.48 - math.log(0.2), 0.48 * math.sqrt(2)),
    ],
)
def test_elbo_is_the_log_evidence_minus_kl(known, guide, kl, sd):
    error = rows(known).loc[guide, "elbo"] - (LOG_EVIDENCE - kl)
    assert abs(error) < 4 * sd / math.sqrt(N)


def test_khat_tells_the_guide_that_is_too_narrow(known):
    khat = rows(known)["khat"]
    assert khat["exact"] == 0.0  # equal weights: no tail, and no NaN or infinity
    assert khat["wide"] < 0.5  # bounded weights
    # P(w > t) falls as t^(−1/k) with k = 1 − s² = 0.96; the fit has 3√N = 190 draws of the tail.
    assert abs(khat["narrow"] - 0.96) < 4 * 1.96 / math.sqrt(190)
    assert khat["narrow"] > 0.7


def test_khat_only_where_there_is_a_density():
    comparison = run({"point": AutoDelta(linear_gaussian), "implicit": "implicit"}, num_draws=500)
    table = rows(comparison)
    assert math.isnan(table.loc["point", "khat"])
    assert table.loc["point", "knn_kl"] == math.inf
    assert math.isnan(table.loc["implicit", "khat"])
    assert table.loc["implicit", ["knn_kl", "elbo", "max_sd_error"]].notna().all()


def test_guides_are_fitted():
    comparison = run(["full_rank", learnable], num_steps=400)
    for label, row in rows(comparison).iloc[1:].iterrows():
        # The family holds the posterior: what is left is the optimiser's.
        assert row["elbo"] == pytest.approx(LOG_EVIDENCE, abs=0.01), label
        assert row["max_mean_error"] < 0.15
        assert row["steps"] == 400
        assert row["seconds"] > 0
        steps, kl = zip(*comparison.curves[label], strict=True)
        assert steps[0] == 0
        assert steps[-1] == 400
        assert kl[-1] < kl[0] - 1


@pytest.mark.slow
def test_mean_field_on_correlated_latents_ends_at_its_optimum():
    draws = dist.MultivariateNormal(*_gauss_parameters()).sample((2 * N,))
    comparison = run(
        ["mean_field", "flow"], gauss, reference={"x": draws}, num_steps=500,
        options={"flow": {"num_steps": 100}},
    )  # fmt: skip
    row = rows(comparison).loc["mean_field"]
    # With correlation ρ = 0.8: sd √(1 − ρ²) = 0.6, KL −½ log(1 − ρ²) = 0.511.
    assert row["max_sd_error"] == pytest.approx(0.4, abs=0.05)
    assert row["elbo"] == pytest.approx(0.5 * math.log(1 - 0.64), abs=0.05)
    assert abs(row["knn_kl"] - 0.511) < 4 * row["knn_kl_se"] + 0.02
    assert rows(comparison).loc["flow", "knn_kl"] < row["knn_kl"] - 0.3


def _gauss_parameters():
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    return torch.zeros(2), root @ root.T


# -- supports, shapes, plates, arguments ----------------------------------------------------


def constrained(shift=0.0, concentration=(2.0, 3.0, 4.0), a=1.0):
    pyro.sample("positive", dist.LogNormal(shift, 0.5))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor(concentration)))
    base = dist.Beta(torch.tensor(a), torch.tensor(a))
    interval = dist.TransformedDistribution(base, dist.transforms.AffineTransform(-1.0, 3.0))
    pyro.sample("interval", interval)


def test_constrained_sites():
    def other():
        constrained(0.3, (3.0, 3.0, 4.0), 2.0)

    n = 2 * N
    reference = {
        "positive": dist.LogNormal(0.0, 0.5).sample((n,)),
        "simplex": dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).sample((n,)),
        "interval": -1 + 3 * torch.rand(n),
    }
    comparison = run({"exact": constrained, "other": other}, constrained, reference=reference)
    table = rows(comparison)
    assert table.loc["exact", "elbo"] == pytest.approx(0, abs=1e-5)
    assert abs(table.loc["exact", "knn_kl"]) < 4 * table.loc["exact", "knn_kl_se"]
    # KL does not change under the maps to unconstrained space.
    beta = dist.Beta(torch.tensor(2.0), torch.tensor(2.0))
    kl = float(
        kl_divergence(dist.Normal(0.3, 0.5), dist.Normal(0.0, 0.5))
        + kl_divergence(
            dist.Dirichlet(torch.tensor([3.0, 3.0, 4.0])),
            dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])),
        )
        + kl_divergence(beta, dist.Beta(torch.tensor(1.0), torch.tensor(1.0)))
    )
    assert abs(table.loc["other", "knn_kl"] - kl) < 4 * table.loc["other", "knn_kl_se"]
    assert table.loc["other", "elbo"] == pytest.approx(-kl, abs=4 * 1.0 / math.sqrt(N))
    for draws in comparison.draws.values():
        assert (draws["positive"] > 0).all()
        np.testing.assert_allclose(draws["simplex"].sum(-1), 1, atol=1e-5)
        assert ((draws["interval"] > -1) & (draws["interval"] < 2)).all()
    # Moments are those of the sites themselves: E exp(z) grows by the factor exp(0.3).
    mean = math.exp(0.125)
    sd = mean * math.sqrt(math.exp(0.25) - 1)
    found = (
        comparison.draws["other"]["positive"].mean() - comparison.draws["hmc"]["positive"].mean()
    )
    assert found == pytest.approx(mean * (math.exp(0.3) - 1), abs=4 * 2 * sd / math.sqrt(N))


def test_sites_with_event_dimensions():
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("factor", dist.LKJCholesky(3, 2.0))

    n = 2000
    reference = {"w": torch.randn(n, 2, 3), "factor": dist.LKJCholesky(3, 2.0).sample((n,))}
    comparison = run(["full_rank", model], model, reference=reference, num_draws=1000)
    assert not comparison.errors
    row = rows(comparison).loc["model"]
    assert row["elbo"] == pytest.approx(0, abs=1e-4)
    # The zeros of the Cholesky factor are no coordinates of the posterior.
    assert row["max_mean_error"] < 4 * math.sqrt(2 / 1000) * 1.5
    assert comparison.draws["full_rank"]["w"].shape == (1000, 2, 3)
    assert comparison.draws["full_rank"]["factor"].shape == (1000, 3, 3)
    labels = [f"w[{i}, {j}]" for i in range(2) for j in range(3)]
    assert comparison.plot([(labels[0], labels[5])]).axes[0].get_ylabel() == "w[1, 2]"


def test_plates_in_several_dimensions():
    x = torch.arange(6.0).reshape(2, 3) / 3

    def model():
        columns, lines = pyro.plate("columns", 3, dim=-1), pyro.plate("lines", 2, dim=-2)
        with columns:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with lines, columns:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def posterior():
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("lines", 2, dim=-2):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    n = 2000
    reference = {"w": torch.randn(n, 3), "z": x / 2 + 0.5**0.5 * torch.randn(n, 2, 3)}
    comparison = run([posterior, "mean_field"], model, reference=reference, num_draws=1000)
    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum())
    assert rows(comparison).loc["posterior", "elbo"] == pytest.approx(evidence, abs=1e-4)
    assert comparison.draws["mean_field"]["z"].shape == (1000, 2, 3)
    assert not comparison.errors


def test_positional_and_keyword_arguments_reach_model_and_guide():
    def model(x, *, sd):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, sd), obs=x)

    def guide(x, *, sd):
        precision = 1 + len(x) / sd**2
        pyro.sample("m", dist.Normal(x.sum() / sd**2 / precision, precision**-0.5))

    comparison = compare(
        model, [guide], X, sd=torch.tensor(1.0), reference=posterior_draws(), num_steps=0,
        progress=False,
    )  # fmt: skip
    assert rows(comparison).loc["guide", "elbo"] == pytest.approx(LOG_EVIDENCE, abs=1e-4)


# -- kinds of guides ------------------------------------------------------------------------


def pair():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a, 1.0))


def pair_draws(n=2 * N):
    a = torch.randn(n)
    return {"a": a, "b": a + torch.randn(n)}


def test_a_guide_that_draws_its_sites_in_another_order():
    def backwards():
        b = pyro.sample("b", dist.Normal(0.0, 2**0.5))
        pyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

    row = rows(run([backwards], pair, reference=pair_draws())).loc["backwards"]
    assert row["elbo"] == pytest.approx(0, abs=1e-5)
    assert abs(row["knn_kl"]) < 4 * row["knn_kl_se"]


def test_a_guide_with_an_auxiliary_site():
    def joint():
        infer = {"is_auxiliary": True}
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer=infer)
        pyro.sample("a", dist.Delta(u[..., 0]))
        pyro.sample("b", dist.Delta(u[..., 0] + u[..., 1]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = rows(run([joint], pair, reference=pair_draws())).loc["joint"]
    assert row["elbo"] == pytest.approx(0, abs=1e-5)
    assert abs(row["knn_kl"]) < 4 * row["knn_kl_se"]


@pytest.mark.slow
def test_a_list_of_guides():
    guide = AutoGuideList(pair)
    guide.append(AutoNormal(poutine.block(pair, hide=["b"])))
    guide.append(AutoNormal(poutine.block(pair, hide=["a"])))
    row = rows(run({"list": guide}, pair, reference=pair_draws(), num_steps=600)).loc["list"]
    # The best product of normals has the conditional precisions 2 and 1: KL ½ log 2.
    assert row["elbo"] == pytest.approx(-0.5 * math.log(2), abs=0.03)


class Encoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[torch.nn.Linear](3, 2)

    def forward(self, x=X):
        loc, log_scale = self.net(x).unbind(-1)
        pyro.sample("m", dist.Normal(loc, log_scale.exp()))


class RegisteredEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)

    def forward(self, x=X):
        pyro.module("encoder", self)
        loc, log_scale = self.net(x).unbind(-1)
        pyro.sample("m", dist.Normal(loc, log_scale.exp()))


@pytest.mark.usefixtures("param_store")
@pytest.mark.slow
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("kind", [Encoder, RegisteredEncoder])
def test_encoders_are_fitted_in_place(kind, registered):
    encoder, other = kind(), kind()
    if registered:  # under the same names, the first under those of the one that is fitted
        encoder()
        other()
    row = rows(run([encoder], num_steps=1000)).loc[kind.__name__]
    assert row["elbo"] == pytest.approx(LOG_EVIDENCE, abs=0.02)
    loc, log_scale = encoder.net(X).detach()
    assert float(loc) == pytest.approx(MEAN, abs=0.1)
    assert float(log_scale.exp()) == pytest.approx(SD, abs=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("param_store")
def test_unnamed_modules_do_not_share_parameters():
    trained, fresh = Encoder(), Encoder()
    trained()  # registers net.weight and net.bias
    weight = trained.net.weight.detach().clone()
    table = rows(run({"fresh": fresh}, num_steps=1000))
    assert table.loc["fresh", "elbo"] == pytest.approx(LOG_EVIDENCE, abs=0.02)
    assert torch.equal(trained.net.weight, weight)


def test_two_guides_of_one_class_do_not_share_parameters():
    def start(mean):
        return AutoNormal(linear_gaussian, init_loc_fn=lambda site: torch.tensor(mean))

    guides = {"near": start(MEAN), "far": start(9.0)}
    table = rows(run(guides, num_draws=500))
    assert table.loc["near", "max_mean_error"] < 0.3
    assert table.loc["far", "max_mean_error"] > 10


def test_guides_trained_beforehand_are_taken_as_they_are(param_store):
    guide = AutoNormal(linear_gaussian)
    svi = SVI(
        linear_gaussian,
        guide,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(64, vectorize_particles=True),
    )
    for _ in range(300):
        svi.step()
    other = SVI(
        linear_gaussian,
        learnable,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(64, vectorize_particles=True),
    )
    for _ in range(300):
        other.step()
    before = {name: value.detach().clone() for name, value in param_store.items()}
    comparison = run({"module": guide, "function": learnable}, num_steps=0)
    for label in ("module", "function"):
        row = rows(comparison).loc[label]
        assert row["elbo"] == pytest.approx(LOG_EVIDENCE, abs=0.03)
        assert (row["steps"], row["seconds"]) == (0, 0)
    assert before.keys() == set(param_store.keys())
    for name, value in param_store.items():
        assert torch.equal(value, before[name])


def test_one_guide_as_it_is_beside_one_that_is_fitted():
    options = {"exact": {"num_steps": 0}}
    comparison = run({"exact": exact, "mean_field": "mean_field"}, num_steps=30, options=options)
    assert list(rows(comparison)["steps"].iloc[1:]) == [0, 30]
    assert not comparison.errors
    assert list(comparison.curves) == ["mean_field"]


@pytest.mark.slow
def test_options_replace_the_defaults_of_one_guide():
    options = {
        "b": {"loss": Trace_ELBO(), "optim": lambda params: torch.optim.SGD(params, lr=1e-9)}
    }
    guides = {"a": AutoNormal(linear_gaussian), "b": AutoNormal(linear_gaussian)}
    table = rows(run(guides, num_steps=200, options=options, num_draws=500))
    assert table.loc["a", "elbo"] > LOG_EVIDENCE - 0.1
    assert table.loc["b", "elbo"] < LOG_EVIDENCE - 0.5


# -- models and guides that cannot run many draws at once -----------------------------------


def run_and_count_warnings(*args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comparison = run(*args, **options)
    found = [w for w in caught if "for many draws at once" in str(w.message)]
    assert len(caught) == len(found), [str(w.message) for w in caught]
    return comparison, found


COUNTS = torch.tensor([3.0, 2.0, 1.0])


def categories():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    if p.dim() != 1:
        raise RuntimeError("one draw at a time, please")
    pyro.sample("counts", dist.Multinomial(6, p), obs=COUNTS)


@pytest.mark.slow
def test_a_model_that_looks_at_shapes(monkeypatch):
    module = importlib.import_module("pyro_vae.compare")
    monkeypatch.setattr(module, "LOOPED_CURVE_DRAWS", 50)

    def posterior():
        pyro.sample("p", dist.Dirichlet(1 + COUNTS))

    reference = {"p": dist.Dirichlet(1 + COUNTS).sample((1000,))}
    options = {"reference": reference, "num_draws": 300, "options": {"posterior": {"num_steps": 0}}}
    comparison, found = run_and_count_warnings(
        [posterior, "mean_field"], categories, num_steps=40, **options
    )
    assert ["posterior" in str(w.message) for w in found] == [True, False]
    assert all("one draw at a time, please" in str(w.message) for w in found)
    assert all(w.filename == __file__ for w in found)
    evidence = float(dist.DirichletMultinomial(torch.ones(3), 6).log_prob(COUNTS))
    table = rows(comparison)
    assert table.loc["posterior", "elbo"] == pytest.approx(evidence, abs=1e-4)
    assert abs(table.loc["posterior", "knn_kl"]) < 4 * table.loc["posterior", "knn_kl_se"]
    assert not comparison.errors
    assert comparison.curves["mean_field"][-1][1] < comparison.curves["mean_field"][0][1] - 0.5


def test_a_model_that_would_be_silently_wrong_for_many_draws():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("likelihood", -x.square().sum() / 2)  # over all draws, if there are many

    def posterior():
        pyro.sample("x", dist.Normal(torch.zeros(2), 0.5**0.5).to_event(1))

    reference = {"x": 0.5**0.5 * torch.randn(1000, 2)}
    comparison, found = run_and_count_warnings(
        [posterior], model, reference=reference, num_draws=200
    )
    assert len(found) == 1
    assert "log p(x, z)" in str(found[0].message)
    # ∫ N(x; 0, I) exp(−‖x‖²/2) dx = ½
    assert rows(comparison).loc["posterior", "elbo"] == pytest.approx(math.log(0.5), abs=1e-5)


def test_a_guide_that_would_be_silently_wrong_for_many_draws():
    def posterior():
        a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(a.sum(), 1.0))

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(a[..., 0], 1.0))

    a = torch.randn(1000, 1)
    reference = {"a": a, "b": a[:, 0] + torch.randn(1000)}
    comparison, found = run_and_count_warnings(
        [posterior], model, reference=reference, num_draws=200
    )
    assert len(found) == 1
    assert "log q(z)" in str(found[0].message) or "log p(x, z)" in str(found[0].message)
    assert rows(comparison).loc["posterior", "elbo"] == pytest.approx(0, abs=1e-5)


# -- a guest in the user's process ----------------------------------------------------------


@pytest.mark.parametrize("local", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_parameter_store_is_left_as_it_was(param_store, local):
    with pyro.settings.context(module_local_params=local):
        pyro.param("loc", torch.tensor(7.0))
        pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        pyro.param("unrelated", torch.tensor(3.0))
        used = AutoNormal(linear_gaussian)
        svi = SVI(linear_gaussian, used, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        svi.step()
        before = param_store.get_state()
        values = {name: value.detach().clone() for name, value in before["params"].items()}
        guides = {
            "fresh": AutoNormal(linear_gaussian),
            "mean_field": "mean_field",
            "flow": "flow",
            "implicit": "implicit",
            "function": learnable,
        }
        comparison = run(guides, num_steps=5, num_draws=200)
        assert not comparison.errors
        after = param_store.get_state()
        assert list(after["params"]) == list(before["params"])
        assert after["constraints"] == before["constraints"]
        for name, value in after["params"].items():
            assert value is before["params"][name]
            assert torch.equal(value, values[name]), name
        svi.step()


def test_the_model_s_own_parameters_are_held_fixed(param_store):
    def model(x=X):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, sd), obs=x)

    pyro.param("sd", torch.tensor(2.0), constraint=constraints.positive)
    comparison = run(["mean_field"], model, num_steps=400)
    # With the user's sd = 2, not with the model's initial 1.
    evidence = float(dist.MultivariateNormal(torch.zeros(3), 4 * torch.eye(3) + 1).log_prob(X))
    assert rows(comparison).loc["mean_field", "elbo"] == pytest.approx(evidence, abs=0.02)
    assert pyro.param("sd").detach() == 2.0


@pytest.mark.slow
def test_a_seed_leaves_the_random_state_alone_and_repeats():
    def whole(seed):
        return run(
            ["mean_field", "flow", "implicit"], reference=None, num_steps=5, num_draws=200,
            num_chains=64, num_samples=100, seed=seed,
        )  # fmt: skip

    def states():
        legacy = np.random.get_state()  # noqa: NPY002 - this is the global one
        return torch.get_rng_state().tolist(), legacy[1].tolist(), random.getstate()

    before = states()
    first = whole(3)
    assert states() == before
    torch.randn(7)
    pd.testing.assert_frame_equal(numbers(whole(3)), numbers(first), check_exact=True)
    other = whole(4)
    assert (numbers(other)["knn_kl"] != numbers(first)["knn_kl"]).all()


def test_without_a_seed_the_generator_is_used():
    torch.manual_seed(5)
    first = run([exact], seed=None, num_draws=100)
    second = run([exact], seed=None, num_draws=100)
    assert (first.draws["exact"]["m"] != second.draws["exact"]["m"]).all()
    torch.manual_seed(5)
    again = run([exact], seed=None, num_draws=100)
    np.testing.assert_array_equal(again.draws["exact"]["m"], first.draws["exact"]["m"])


@pytest.mark.parametrize(
    "label",
    ["mean_field", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "implicit"))],
)
def test_a_guide_s_numbers_do_not_depend_on_the_others(label):
    company = ["implicit", "flow", "mean_field"]
    together = run(company, num_steps=5, num_draws=200)
    alone = run([label], num_steps=5, num_draws=200)
    shared = ["seconds", "kl", "kl_se"]  # the evidence is that of the best guide
    pd.testing.assert_series_equal(
        rows(together).loc[label].drop(shared), rows(alone).loc[label].drop(shared)
    )
    np.testing.assert_array_equal(alone.draws[label]["m"], together.draws[label]["m"])


@pytest.mark.parametrize("broken", [False, True])
def test_the_number_of_threads_is_put_back(broken):
    def guide(x=X):
        learnable()
        if broken and torch.get_num_threads() == 1:
            raise RuntimeError("boom")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        comparison = run([guide], num_steps=5, num_draws=100)
        assert bool(comparison.errors) == broken
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "default", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_float64_data(default):
    def model(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), x.new_ones(())))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, x.new_ones(())), obs=x)

    options = {"num_steps": 5, "num_chains": 64, "num_samples": 100, "num_draws": 200}
    guides = ["mean_field", "full_rank", "flow", "implicit"]
    torch.set_default_dtype(default)
    try:
        comparison = compare(model, guides, X.double(), progress=False, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not comparison.errors
    for label, draws in comparison.draws.items():
        assert draws["m"].dtype == np.float64, label


def test_an_interrupt_leaves_the_process_as_it_was(param_store):
    calls = 0

    def guide(x=X):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyboardInterrupt
        learnable()

    pyro.param("loc", torch.tensor(7.0))
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run([guide], num_steps=1000, num_draws=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(param_store.items()) == {"loc": torch.tensor(7.0)}


def test_progress_goes_to_stderr(capsys):
    run(["mean_field"], num_steps=3, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mean_field: KL to the reference" in captured.err
    assert "hmc: passed: 1 chain of 8000 draws" in captured.err
    run(["mean_field"], num_steps=3, progress=False)
    assert capsys.readouterr().err == ""


# -- references -----------------------------------------------------------------------------


def test_our_hmc_runs_by_default():
    comparison = run([exact], reference=None, num_chains=64, num_samples=100)
    first = rows(comparison).loc["hmc"]
    assert isinstance(comparison.reference, HMC)
    assert comparison.reference.num_chains == 64
    assert first["steps"] == 100 + comparison.reference.warmup_steps
    assert comparison.verdict.passed
    assert all(check.passed for check in comparison.verdict.checks)  # none is left out
    assert first["seconds"] > 0
    # Halves of 3200 draws; consecutive ones are correlated, the standard error says how much.
    assert abs(first["knn_kl"]) < 4 * first["knn_kl_se"]
    assert len(comparison.draws["hmc"]["m"]) == 3200
    row = rows(comparison).loc["exact"]
    assert abs(row["knn_kl"]) < 4 * row["knn_kl_se"]


def test_a_failed_run_is_not_called_the_truth():
    with pytest.raises(ValueError, match=r"failed its checks.*FAILED \(.*ESS") as caught:
        run([exact], reference=None, num_chains=4, num_samples=20)
    assert isinstance(caught.value, ConvergenceError)
    assert "ESS" in [check.name for check in caught.value.verdict.failed]
    text = str(caught.value)
    assert "at m; expected at least 400" in text  # what was found, what is expected
    assert "draw " in text  # and what to do
    assert "allow_failed_checks" in text


def apart(num_chains=4):
    """Draws of which one chain is in a mode of its own."""
    draws = posterior_draws(1000 * num_chains)["m"].reshape(num_chains, -1)
    draws[0] += 10 * SD
    return {"m": draws}


@pytest.mark.filterwarnings("ignore:the reference failed its checks")
def test_a_failed_reference_is_marked_wherever_it_is_named(tmp_path):
    comparison = run([exact], reference=apart(), allow_failed_checks=True)
    assert not comparison.verdict
    assert list(comparison.table["guide"]) == [FAILED, "exact"]
    lines = repr(comparison).splitlines()
    assert lines[1].strip().startswith(FAILED)
    assert lines[4].startswith("hmc FAILED (R̂, ESS, chains): 4 chains of 1000 draws")
    assert [axis.get_title() for axis in comparison.plot().axes] == ["exact", FAILED]
    assert list(comparison.draws) == list(comparison.to_arviz()) == ["exact", "hmc"]
    comparison.save(tmp_path)
    assert (tmp_path / "checks.txt").read_text(encoding="utf-8").startswith("hmc FAILED (R̂")
    assert list(pd.read_csv(tmp_path / "table.csv")["guide"]) == [FAILED, "exact"]
    assert read(tmp_path / "draws.nc", "hmc").posterior.attrs["checks"].startswith("FAILED (R̂")


def test_going_on_with_a_failed_reference_warns():
    with pytest.warns(UserWarning, match="every row may be wrong with it: FAILED") as caught:
        run([exact], reference=apart(), allow_failed_checks=True)
    # In pyro_vae's eyes the caller of `compare` is the helper `run`.
    assert [warning.filename for warning in caught] == [__file__]


def test_one_chain_of_many_in_another_mode_is_refused():
    with pytest.raises(ConvergenceError, match="chain 0 stayed away from the others") as caught:
        run([exact], reference=apart(256))
    assert "chain 0" in [check.where for check in caught.value.verdict.failed]


def test_hmc_run_beforehand():
    hmc = HMC(linear_gaussian, 32, 100, 100, progress=False, compile=False, seed=0)
    hmc.run()
    comparison = run([exact], reference=hmc)
    assert comparison.reference is hmc
    assert rows(comparison).loc["exact", "max_mean_error"] < 0.2


@pytest.mark.slow
def test_pyro_mcmc():
    mcmc = MCMC(NUTS(linear_gaussian), num_samples=1500, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    comparison = run([exact], reference=mcmc)
    assert comparison.reference is mcmc
    assert len(comparison.draws["hmc"]["m"]) == 750  # the first half of a single chain
    found = {check.name: check.passed for check in comparison.verdict.checks}
    assert found["divergences"]
    assert found["E-BFMI"] is None  # Pyro keeps no energies
    assert "not checked: E-BFMI" in comparison.verdict.headline
    row = rows(comparison).loc["exact"]
    assert abs(row["knn_kl"]) < 4 * row["knn_kl_se"]


@pytest.mark.parametrize(
    "draws",
    [
        posterior_draws(4000)["m"].reshape(8, 500),
        posterior_draws(4000)["m"].reshape(1, 4000),
        posterior_draws(4000)["m"].numpy().astype(np.float64),
    ],
    ids=["chains", "one chain", "numpy"],
)
def test_plain_draws(draws):
    comparison = run([exact], reference={"m": draws, "deterministic": draws})
    first, row = (rows(comparison).loc[label] for label in ("hmc", "exact"))
    assert abs(first["knn_kl"]) < 4 * first["knn_kl_se"]
    assert abs(row["knn_kl"]) < 4 * row["knn_kl_se"]
    assert list(comparison.draws["hmc"]) == ["m"]
    assert pd.isna(first["steps"])
    assert pd.isna(first["seconds"])


def test_halves_are_of_chains_that_are_independent():
    # Chains that disagree: halves by time would hide it, odd chains against even ones show it.
    with pytest.warns(UserWarning, match="the reference failed its checks"):
        comparison = run([exact], reference=apart(), allow_failed_checks=True)
    assert rows(comparison).loc[FAILED, "max_mean_error"] > 0.5


@pytest.mark.slow
def test_halves_do_not_share_starting_points():
    # Chains in superchains: where those disagree, the halves have to.
    def two_modes():
        m = pyro.sample("m", dist.Normal(0.0, 20.0))
        pyro.factor("modes", -8 * ((m / 10) ** 2 - 1) ** 2 * 100)

    starts = torch.tensor([-10.0, 10.0]).repeat_interleave(4)
    hmc = HMC(
        two_modes, 8, 50, 50, initial_params={"m": starts}, num_superchains=2,
        progress=False, compile=False, seed=0,
    )  # fmt: skip
    hmc.run()
    with pytest.warns(UserWarning, match="chains from different starts disagree"):
        comparison = run([two_modes], two_modes, reference=hmc, allow_failed_checks=True)
    first = rows(comparison).loc[FAILED]
    assert first["max_mean_error"] > 1.5
    assert first["knn_kl"] > 1


def test_draws_repeated_by_rejections_are_no_atoms():
    draws = posterior_draws(1000)["m"].repeat_interleave(3)
    first = rows(run([exact], reference={"m": draws})).loc["hmc"]
    assert math.isfinite(first["knn_kl"])
    assert abs(first["knn_kl"]) < 0.5


def test_few_draws_have_no_standard_error():
    with pytest.warns(UserWarning, match="at least 10 draws a chain"):
        comparison = run([exact], reference=posterior_draws(8), allow_failed_checks=True)
    table = rows(comparison)
    assert table["knn_kl"].notna().all()
    assert table["knn_kl_se"].isna().all()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"other": torch.randn(100)}, r"reference: the model's sites \['m'\] are missing"),
        ({"m": torch.randn(100, 2, 3)}, r"reference: site 'm' has the shape \[100, 2, 3\]"),
        ({"m": torch.tensor([0.0, math.nan] * 10)}, r"reference: .* \['m'\] are not finite"),
        ({"m": torch.ones(100)}, r"reference: the sites \['m'\] have .* one value"),
        ({"m": torch.randn(7)}, "reference: found 1 chains of 7 draws, expected at least 4"),
        ({"m": torch.randn(3, 3)}, "reference: found 3 chains of 3 draws"),
        ({"m": torch.randn(0)}, "reference: found 1 chains of 0 draws"),
        ("hmc", "reference: found str, expected a run HMC or MCMC"),
        (HMC(linear_gaussian, 4, 10), "reference: found HMC without draws; call its run"),
        (MCMC(NUTS(linear_gaussian), num_samples=10), "reference: found MCMC without draws"),
    ],
)
def test_bad_references(reference, message):
    with pytest.raises(ValueError, match=message):
        run([exact], reference=reference)


def test_references_whose_sites_do_not_fit_together():
    with pytest.raises(ValueError, match=r"'a': \[1, 500\], 'b': \[1, 400\]"):
        run([pair], pair, reference={"a": torch.randn(500), "b": torch.randn(400)})
    with pytest.raises(ValueError, match=r"'a': \[1, 500\], 'b': \[5, 100\]"):
        run([pair], pair, reference={"a": torch.randn(500), "b": torch.randn(5, 100)})


def test_draws_outside_the_support_are_named():
    def model():
        pyro.sample("free", dist.Normal(0.0, 1.0))
        pyro.sample("positive", dist.LogNormal(0.0, 1.0))

    reference = {"free": torch.randn(100), "positive": torch.randn(100)}
    with pytest.raises(ValueError, match=r"draws of the sites \['positive'\]"):
        run([model], model, reference=reference)


# -- bad input ------------------------------------------------------------------------------


def test_guides_with_the_wrong_sites():
    message = r"guide 'less' misses the model's sites \['b'\]: found \['a'\], expected \['a', 'b'\]"
    with pytest.raises(ValueError, match=message):
        run({"less": lambda: pyro.sample("a", dist.Normal(0.0, 1.0))}, pair)

    def more(x=X):
        exact(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    message = r"guide 'more' has the sites \['extra'\], which the model does not.*is_auxiliary"
    with pytest.raises(ValueError, match=message):
        run([exact, more])


@pytest.mark.parametrize(
    ("guides", "message"),
    [
        (["mean_feild"], "unknown name 'mean_feild', .*did you mean 'mean_field'"),
        ("nonsense", "unknown name 'nonsense', expected some of .*'mean_field'"),
        ([], "guides: found none"),
        ({}, "guides: found none"),
        ([3], "guides: 'int' is not callable"),
        (None, "guides: 'NoneType' is not callable"),
        ([AutoNormal], r"guides: 'AutoNormal' is a class; expected an instance"),
        (["flow", "flow"], r"guides: found \['flow'\] more than once; give a mapping"),
        ({"hmc": exact}, "guides: the label 'hmc' is the reference's"),
        ({1: exact}, "guides: the label 1 must be a string"),
    ],
)
def test_bad_guides(guides, message):
    with pytest.raises(ValueError, match=message):
        run(guides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws must be at least 4, found 0"),
        ({"num_draws": 3}, "num_draws must be at least 4, found 3"),
        ({"num_steps": -1}, "num_steps must not be negative, found -1"),
        ({"reference": None, "num_chains": 0}, "num_chains: found 0; expected"),
        ({"reference": None, "num_samples": 0}, "num_samples: found 0; expected"),
        ({"options": {"flow": {}}}, r"options: found 'flow', expected some of \['exact'\]"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        run([exact], **options)


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5))
    exact()


def missing_data():
    linear_gaussian(torch.tensor([1.0, math.nan]))


def subsampled():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, subsample_size=2) as index:
        pyro.sample("x", dist.Normal(m, 1.0), obs=X[index])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "latent site 'k' is discrete"),
        (missing_data, "observed site 'x': found 1 NaN of 2 values"),
        (subsampled, "plate 'data', which is subsampled"),
    ],
)
def test_bad_models(model, message):
    with pytest.raises(ValueError, match=message):
        run([exact], model)


def test_no_guide_that_can_be_run():
    def broken(x=X):
        raise KeyError("boom")

    with pytest.raises(ValueError, match=r"guide 'broken' cannot be run .*KeyError: 'boom'"):
        run([broken], reference=None)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_failures_cost_their_own_row_alone(tmp_path):
    def model():
        m = pyro.sample("m", dist.Normal(MEAN, SD))
        root = 0 * (m + 5).sqrt()  # NaN for m < −5
        pyro.sample("root", dist.Normal(root, 1.0, validate_args=False), obs=torch.zeros(()))

    def broken():
        raise KeyError("boom")

    def lost():
        pyro.sample("m", dist.Normal(pyro.param("start", torch.tensor(-50.0)), 1.0))

    def nothing_to_learn():
        pyro.sample("m", dist.Normal(MEAN, SD))

    guides = [broken, lost, nothing_to_learn, "mean_field"]
    comparison = run(guides, model, num_steps=20, num_draws=200)
    table = rows(comparison)
    assert list(table.index) == ["hmc", "broken", "lost", "nothing_to_learn", "mean_field"]
    assert list(table.columns) == [*COLUMNS[1:], "error"]
    failed = ["broken", "lost", "nothing_to_learn"]
    assert sorted(comparison.errors) == failed
    assert table.loc[failed, COLUMNS[1:]].isna().all(axis=None)
    assert table.loc["broken", "error"] == "KeyError: 'boom'"
    assert "loss is not finite" in table.loc["lost", "error"]
    assert "'root'" in table.loc["lost", "error"]
    assert "nothing to fit" in table.loc["nothing_to_learn", "error"]
    assert table.loc["mean_field", COLUMNS[3:]].notna().all()
    assert pd.isna(table.loc["mean_field", "error"])
    assert list(comparison.draws) == ["mean_field", "hmc"]
    comparison.save(tmp_path)
    saved = pd.read_csv(tmp_path / "table.csv")
    assert list(saved["guide"]) == list(table.index)
    assert "nothing to fit" in repr(comparison)


def test_an_error_takes_one_line():
    calls = 0

    def guide(x=X):
        nonlocal calls
        calls += 1
        # Pyro adds the shapes of all sites to the message.
        scale = 1.0 if calls == 1 else -1.0
        pyro.sample("m", dist.Normal(pyro.param("p", torch.tensor(0.0)), scale))

    error = run({"guide": guide, "exact": exact}).errors["guide"]
    assert "\n" not in error
    assert "GreaterThan" in error
    assert "Trace Shapes" not in error


# -- results --------------------------------------------------------------------------------


def two_sites():
    pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.fixture(scope="module")
def saved():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(1000, 3, generator=generator)
    reference = {"s": (draws[:, 0] / 2).exp(), "w": draws[:, 1:]}
    return run(
        {"exact": two_sites, "mean_field": "mean_field"}, two_sites, reference=reference,
        num_draws=300, num_steps=12, options={"exact": {"num_steps": 0}},
    )  # fmt: skip


def read(file, label):
    """Read one group into memory and close the file, as the next test may write it."""
    with az.rc_context({"data.load": "eager"}):
        return az.InferenceData.from_netcdf(str(file), base_group=label)


def test_save_writes_everything(saved, tmp_path):
    directory = tmp_path / "new" / "folder"
    saved.save(str(directory))
    assert sorted(path.name for path in directory.iterdir()) == [
        "checks.txt",
        "convergence.png",
        "draws.nc",
        "posterior.png",
        "table.csv",
    ]
    table = pd.read_csv(directory / "table.csv")
    pd.testing.assert_frame_equal(table, saved.table, check_dtype=False)
    verdict = f"hmc {saved.verdict}\n"
    assert verdict.startswith("hmc passed: 1 chain of 1000 draws; not checked: E-BFMI, divergences")
    assert (directory / "checks.txt").read_text(encoding="utf-8") == verdict
    checks = read(directory / "draws.nc", "hmc").posterior.attrs["checks"]
    assert checks == str(saved.verdict)
    for name in ("posterior.png", "convergence.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    for label, draws in saved.draws.items():
        posterior = read(directory / "draws.nc", label).posterior
        assert set(posterior.data_vars) == {"s", "w"}
        for name, x in draws.items():
            expected = saved.reference_chains[name] if label == "hmc" else x[None]
            np.testing.assert_array_equal(posterior[name].values, expected)


def test_save_replaces_what_an_earlier_comparison_wrote(saved, tmp_path):
    (tmp_path / "unrelated.txt").write_text("stays")
    saved.save(tmp_path)
    run({"other": exact}, num_draws=100).save(tmp_path)
    assert list(pd.read_csv(tmp_path / "table.csv")["guide"]) == ["hmc", "other"]
    assert set(read(tmp_path / "draws.nc", "other").posterior.data_vars) == {"m"}
    with pytest.raises(KeyError):
        read(tmp_path / "draws.nc", "mean_field")
    assert not (tmp_path / "convergence.png").exists()  # nothing was fitted this time
    assert (tmp_path / "unrelated.txt").read_text() == "stays"


def test_to_arviz(saved):
    data = saved.to_arviz()
    assert list(data) == ["exact", "mean_field", "hmc"]
    summary = az.summary(data["exact"], kind="stats")
    assert list(summary.index) == ["s", "w[0]", "w[1]"]
    assert summary.loc["s", "mean"] == pytest.approx(saved.draws["exact"]["s"].mean(), abs=1e-3)
    figures = plt.get_fignums()
    try:
        axes = az.plot_forest(list(data.values()), model_names=list(data))
        assert "s" in " ".join(text.get_text() for text in axes[0].get_yticklabels())
    finally:
        for number in set(plt.get_fignums()) - set(figures):
            plt.close(number)


def test_plot_shows_each_posterior_and_the_reference_last(saved):
    axes = saved.plot().axes
    assert [axis.get_title() for axis in axes[:3]] == ["exact", "mean_field", "hmc"]
    assert [(axes[i].get_xlabel(), axes[i].get_ylabel()) for i in (0, 3)] == [
        ("s", "w[0]"),
        ("w[0]", "w[1]"),
    ]
    chosen = saved.plot([("w[1]", "s")]).axes
    assert (chosen[0].get_xlabel(), chosen[0].get_ylabel()) == ("w[1]", "s")
    with pytest.raises(ValueError, match=r"'w\[2\]', expected some of \['s', 'w\[0\]', 'w\[1\]'\]"):
        saved.plot([("s", "w[2]")])


def test_plot_of_one_and_of_two_coordinates(known):
    assert [axis.get_xlabel() for axis in known.plot().axes] == ["m"] * 5
    assert known.plot().axes[0].get_ylabel() == "density"
    comparison = run([pair], pair, reference=pair_draws(2000), num_draws=50)
    assert len(comparison.plot().axes) == 2


def test_plot_convergence(saved, known):
    lines = saved.plot_convergence().axes[0].lines
    assert [line.get_label() for line in lines] == ["mean_field", "reference against itself"]
    assert len(lines[0].get_xdata()) == 13
    with pytest.raises(ValueError, match="no curve"):
        known.plot_convergence()


def test_figures_are_unknown_to_pyplot(saved, tmp_path):
    before = plt.get_fignums(), plt.get_backend()
    saved.save(tmp_path)
    assert (plt.get_fignums(), plt.get_backend()) == before


def test_repr_is_the_table(saved):
    text = repr(saved)
    assert [line.split()[0] for line in text.splitlines()] == [
        "guide",
        "hmc",
        "exact",
        "mean_field",
        "log",
    ]
    assert "nan" not in text.lower().replace("<na>", "")


def test_draws_belong_to_the_table(known):
    for label in known.draws:
        assert known.draws[label]["m"].shape == (N,)
    truth = posterior_draws()["m"].numpy()  # moments are those of all its draws
    mean, sd = known.draws["shifted"]["m"].mean(), known.draws["shifted"]["m"].std()
    row = rows(known).loc["shifted"]
    assert row["max_mean_error"] == pytest.approx(abs(mean - truth.mean()) / truth.std(), rel=1e-3)
    assert row["max_sd_error"] == pytest.approx(abs(sd / truth.std() - 1), abs=1e-3)


def test_the_reference_keeps_its_chains():
    draws = posterior_draws(4000)["m"].reshape(8, 500)
    comparison = run([exact], reference={"m": draws}, num_draws=1000)
    kept = comparison.to_arviz()["hmc"].posterior["m"].values
    assert kept.shape[0] == 8
    assert kept.shape[1] < 500
    assert all(np.isin(kept[i], draws[i].numpy()).all() for i in range(8))
    # More chains than draws are no reason for a warning.
    many = run([exact], reference={"m": posterior_draws(4000)["m"].reshape(400, 10)})
    assert many.to_arviz()["hmc"].posterior["m"].shape[0] == 400


@pytest.mark.slow
def test_every_guide_by_name_on_its_model():
    """The four names are those of the four guides, made for the model that is compared."""
    kinds = {"full_rank": AutoMultivariateNormal, "flow": AutoFlow}
    reference = {"x": dist.MultivariateNormal(*_gauss_parameters()).sample((1000,))}
    by_name = run(list(kinds), gauss, reference=reference, num_steps=3, num_draws=200)
    for label, kind in kinds.items():
        by_hand = run({label: kind(gauss)}, gauss, reference=reference, num_steps=3, num_draws=200)
        shared = ["seconds", "kl", "kl_se"]
        expected = rows(by_hand).loc[label].drop(shared)
        pd.testing.assert_series_equal(rows(by_name).loc[label].drop(shared), expected)
