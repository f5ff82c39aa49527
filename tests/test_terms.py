"""Terms against Pyro's own ELBOs, by value and gradient, and against sums written out in torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_vae.capture import capture
from pyro_vae.losses import TermsELBO
from pyro_vae.terms import NonFiniteError, Terms, get_trace_pair, is_standard_normal

pytestmark = pytest.mark.usefixtures("param_store")

INF = float("inf")
F64 = torch.float64


class ELBO(TermsELBO):
    def formula(self, terms: Terms) -> Tensor:
        return terms.total(terms.kl - terms.log_likelihood)


def ramp(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Numbers that all differ, without a random draw."""
    return torch.linspace(low, high, math.prod(shape), dtype=F64).reshape(shape)


def param(name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return pyro.param(name, lambda: ramp(*shape, low=low, high=high))


def positive(name: str, *shape: int) -> Tensor:
    return param(name, *shape, low=0.3, high=1.4)


def normal(*shape: int, event_dim: int = 0) -> dist.Distribution:
    zeros = torch.zeros(shape, dtype=F64)
    return dist.Normal(zeros, torch.ones_like(zeros)).to_event(event_dim)


def evaluate(elbo: Any, model: Callable, guide: Callable, *args: Any) -> dict[str, Tensor]:
    """Return the loss and its gradient in each parameter."""
    torch.manual_seed(1)
    with poutine.trace(param_only=True) as traced:
        loss = elbo.differentiable_loss(model, guide, *args)
    sites = {n: site["value"].unconstrained() for n, site in traced.trace.nodes.items()}
    grads = torch.autograd.grad(loss, list(sites.values()), allow_unused=True)
    return {"loss": loss.detach(), **{n: g for n, g in zip(sites, grads, strict=True)}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(g is not None and g.abs().sum() > 0 for n, g in ours.items() if n != "loss")
    for name, value in ours.items():
        other = theirs[name]
        value = torch.zeros_like(other) if value is None and other is not None else value
        other = torch.zeros_like(value) if other is None and value is not None else other
        torch.testing.assert_close(
            value, other, rtol=1e-9, atol=1e-9, msg=f"{name}: {value} {other}"
        )


def terms_of(model: Callable, guide: Callable, *args: Any, num_particles: int = 1, **kwargs: Any):
    kwargs = {"vectorize_particles": True, "max_plate_nesting": 3} | kwargs
    return ELBO(num_particles=num_particles, **kwargs).terms(model, guide, *args)


# --- the same value and gradient as Pyro ---------------------------------------------------------


class Case(NamedTuple):
    model: Callable
    guide: Callable
    args: tuple = ()
    num_points: int = 1
    mean_field: bool = True  # Pyro's TraceMeanField_ELBO has a value, and it is right


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def pair(
    *,
    model_z: Callable = lambda: normal(3, event_dim=1),
    guide_z: Callable = lambda fn: fn,
    around: Callable = lambda site: lambda f: f,
    wrap: Callable = lambda f: f,
    wrap_guide: Callable | None = None,
    more: Callable = lambda z: None,
    size: int = 4,
    model_plate: Callable = lambda: pyro.plate("data", 4),
    guide_plate: Callable | None = None,
    outside: Callable = lambda: None,
    more_of_guide: Callable = lambda: None,
    outside_of_guide: Callable = lambda: None,
) -> tuple[Callable, Callable]:
    """One latent vector a data point; ``around("z")`` wraps that site's statement."""

    def sample(owner: str, name: str, fn: dist.Distribution, obs: Tensor | None = None) -> Tensor:
        return around(f"{owner} {name}")(pyro.sample)(name, fn, obs=obs)

    def model() -> None:
        outside()
        with model_plate() as idx:
            z = sample("model", "z", model_z())
            mean = z @ param("w", 3, 2)
            sample("model", "x", dist.Normal(mean, 0.7).to_event(1), obs=ramp(size, 2)[idx])
            more(z)

    def guide() -> None:
        outside_of_guide()
        with (guide_plate or model_plate)() as idx:
            loc, scale = param("loc", size, 3)[idx], positive("scale", size, 3)[idx]
            sample("guide", "z", guide_z(dist.Normal(loc, scale).to_event(1)))
            more_of_guide()

    return wrap(model), (wrap_guide or wrap)(guide)


@case
def plain() -> Case:
    return Case(*pair(), num_points=4)


@case
def one_point() -> Case:
    return Case(*pair(size=1, model_plate=lambda: pyro.plate("data", 1)))


@case
def other_name_of_the_plate() -> Case:
    return Case(*pair(guide_plate=lambda: pyro.plate("batch", 4)), num_points=4)


@case
def subsample_drawn() -> Case:
    return Case(
        *pair(size=20, model_plate=lambda: pyro.plate("data", 20, subsample_size=4)), num_points=4
    )


@case
def subsample_given() -> Case:
    idx = torch.tensor([3, 5, 11])
    return Case(
        *pair(
            size=20,
            model_plate=lambda: pyro.plate("data", 20, subsample=idx),
            guide_plate=lambda: pyro.plate("other name", 20, subsample=idx),
        ),
        num_points=3,
    )


@case
def scaled_by_a_number() -> Case:
    return Case(*pair(wrap=poutine.scale(scale=0.3)), num_points=4)


def point_scale() -> Any:  # another object at each call
    return poutine.scale(scale=ramp(4, low=0.5, high=3.0))


@case
def scaled_by_point() -> Case:
    return Case(
        *pair(wrap=lambda f: point_scale()(f), wrap_guide=lambda f: point_scale()(f)),
        num_points=4,
    )


@case
def scaled_by_point_and_subsampled() -> Case:
    return Case(
        *pair(
            size=20,
            wrap=point_scale(),
            model_plate=lambda: pyro.plate("data", 20, subsample_size=4),
        ),
        num_points=4,
    )


def only(name: str, handler: Any) -> Callable:
    return lambda site: handler if site.endswith(name) else (lambda f: f)


@case
def scaled_by_a_tensor() -> Case:
    def scaled(f: Callable) -> Callable:
        return poutine.scale(f, scale=torch.tensor(0.3, dtype=F64))

    return Case(*pair(wrap=scaled, wrap_guide=scaled), num_points=4)


@case
def kl_annealed() -> Case:
    return Case(*pair(around=only(" z", poutine.scale(scale=0.2))), num_points=4)


@case
def kl_annealed_by_point() -> Case:
    """Three points of three coordinates: a scale [N] may not land on the coordinates."""
    scale = poutine.scale(scale=ramp(3, low=0.5, high=3.0))
    plate = {"size": 3, "model_plate": lambda: pyro.plate("data", 3)}
    return Case(*pair(around=only(" z", scale), **plate), num_points=3)


@case
def observation_scaled() -> Case:
    return Case(*pair(around=only(" x", poutine.scale(scale=3.0))), num_points=4)


@case
def model_scaled_guide_not() -> Case:
    wraps = {"wrap": poutine.scale(scale=0.3), "wrap_guide": lambda f: f}
    return Case(*pair(**wraps), num_points=4, mean_field=False)


def point_mask() -> Any:
    return poutine.mask(mask=torch.tensor([True, False, True, True]))


@case
def masked() -> Case:
    return Case(*pair(wrap=point_mask()), num_points=4)


@case
def masked_by_other_objects() -> Case:
    return Case(*pair(wrap=point_mask(), wrap_guide=point_mask()), num_points=4, mean_field=False)


@case
def masked_twice() -> Case:
    return Case(*pair(wrap=point_mask(), around=only(" x", point_mask())), num_points=4)


@case
def masked_model_only() -> Case:
    wraps = {"wrap": point_mask(), "wrap_guide": lambda f: f}
    return Case(*pair(**wraps), num_points=4, mean_field=False)


@case
def masked_latent_only() -> Case:
    return Case(*pair(around=only(" z", point_mask())), num_points=4)


@case
def masked_observation_only() -> Case:
    return Case(*pair(around=only(" x", point_mask())), num_points=4)


@case
def masked_out() -> Case:
    return Case(*pair(around=only(" x", poutine.mask(mask=False))), num_points=4)


@case
def masked_distributions() -> Case:
    """The prior's mask is another than the guide's: no closed form."""
    mask = torch.tensor([True, False, True, True])
    model, guide = pair(
        model_z=lambda: normal(4, 3, event_dim=1).mask(mask),
        guide_z=lambda fn: fn.mask(mask.flip(0)),
    )
    return Case(model, guide, num_points=4, mean_field=False)  # Pyro takes what is in both masks


@case
def observations_missing() -> Case:
    """Pyro splits a site with obs_mask in two: one observed, one latent and masked in the model."""

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", normal())
            mask = torch.tensor([True, False, True])
            pyro.sample("x", dist.Normal(param("w") * z, 0.5), obs=ramp(3), obs_mask=mask)

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(param("loc", 3), positive("scale", 3)))
            pyro.sample("x_unobserved", dist.Normal(param("loc x", 3), positive("scale x", 3)))

    return Case(model, guide, num_points=3, mean_field=False)  # Pyro's leaves out the mask


@case
def factors_and_deterministic() -> Case:
    def more(z: Tensor) -> None:
        pyro.factor("inside", -(z**2).sum(-1))
        pyro.deterministic("sum", z.sum(-1))
        pyro.deterministic("count", torch.tensor(3))
        pyro.sample("y", dist.Poisson(z.sum(-1).exp()), obs=torch.arange(4))

    def outside() -> None:
        pyro.factor("outside", -(param("w", 3, 2) ** 2).sum())

    return Case(*pair(more=more, outside=outside), num_points=4)


@case
def guide_with_factors() -> Case:
    """In a guide a factor belongs to log q: a Jacobian, say."""

    def more_of_guide() -> None:
        pyro.factor("inside", param("loc", 4, 3).sum(-1), has_rsample=True)

    def outside_of_guide() -> None:
        pyro.factor("outside", param("a") ** 2 + 1, has_rsample=True)

    model, guide = pair(more_of_guide=more_of_guide, outside_of_guide=outside_of_guide)
    return Case(model, guide, num_points=4, mean_field=False)


@case
def guide_with_auxiliary_site() -> Case:
    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(param("w") * z, 0.5), obs=ramp(4))

    def guide() -> None:
        with pyro.plate("data", 4):
            fn = dist.Normal(param("loc", 4), positive("scale", 4))
            u = pyro.sample("u", fn, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 0.5))

    return Case(model, guide, num_points=4)


@case
def guide_with_auxiliary_site_outside() -> Case:
    """Latents of different data points depend on one another: they are one point."""
    model, _ = pair()

    def mixed() -> None:
        fn = dist.Normal(param("loc u"), positive("scale u"))
        u = pyro.sample("u", fn, infer={"is_auxiliary": True})
        _, guide = pair(
            guide_z=lambda fn: dist.Normal(u.unsqueeze(-1) + fn.base_dist.loc, 0.5).to_event(1)
        )
        guide()

    return Case(model, mixed)


@case
def inner_subsample() -> Case:
    """A subsampled plate within the data plate, of observations alone."""

    def model() -> None:
        data, pixels = pyro.plate("data", 3, dim=-2), pyro.plate("pixels", 6, 2, dim=-1)
        with data:
            z = pyro.sample("z", normal())
            with pixels as idx:
                pyro.sample("x", dist.Normal(param("w") * z, 0.5), obs=ramp(3, 6)[:, idx])

    def guide() -> None:
        with pyro.plate("data", 3, dim=-2):
            pyro.sample("z", dist.Normal(param("loc", 3, 1), positive("scale", 3, 1)))

    return Case(model, guide, num_points=3)


@case
def two_data_plates() -> Case:
    """Both hold all latents, one subsampled; an observation lies in one of them only."""

    def plates() -> tuple:
        rows = pyro.plate("rows", 9, subsample=torch.tensor([2, 4, 8]), dim=-2)
        return rows, pyro.plate("columns", 2, dim=-1)

    def model() -> None:
        rows, columns = plates()
        with rows:
            pyro.sample("y", dist.Normal(param("w"), 1.0), obs=ramp(3, 1))
            with columns:
                z = pyro.sample("z", normal(2, event_dim=1))
                pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=ramp(3, 2))

    def guide() -> None:
        rows, columns = plates()
        with rows, columns:
            fn = dist.Normal(param("loc", 3, 2, 2), positive("scale", 3, 2, 2))
            pyro.sample("z", fn.to_event(1))

    return Case(model, guide, num_points=6)


@case
def sequential_plate() -> Case:
    def model() -> None:
        for i in pyro.plate("data", 6, subsample=torch.tensor([1, 4])):
            z = pyro.sample(f"z{i}", normal())
            pyro.sample(f"x{i}", dist.Normal(param("w") * z, 0.5), obs=ramp(6)[i])

    def guide() -> None:
        for i in pyro.plate("data", 6, subsample=torch.tensor([1, 4])):
            pyro.sample(f"z{i}", dist.Normal(param(f"loc{i}"), positive(f"scale{i}")))

    return Case(model, guide)


@case
def global_and_local() -> Case:
    """No plate holds all latents: one point, whose parts have scales of their own."""

    def model() -> None:
        mu = pyro.sample("mu", normal(2, event_dim=1))
        with pyro.plate("data", 8, subsample=torch.tensor([1, 4])):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(param("w") * z.sum(-1), 0.5), obs=ramp(2))

    def guide() -> None:
        loc, scale = param("loc mu", 2), positive("scale mu", 2)
        mu = pyro.sample("mu", dist.Normal(loc, scale).to_event(1))
        with pyro.plate("data", 8, subsample=torch.tensor([1, 4])):
            fn = dist.Normal(param("loc", 2, 2) + mu, positive("scale", 2, 2))
            pyro.sample("z", fn.to_event(1))

    return Case(model, guide)


def ladder(order: tuple[str, ...]) -> tuple[Callable, Callable]:
    """z2 → z1 → x; the guide draws them in the order given, each from the one before."""

    def model() -> None:
        with pyro.plate("data", 3):
            z2 = pyro.sample("z2", normal())
            z1 = pyro.sample("z1", dist.Normal(param("w") * z2, 0.8))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=ramp(3))

    def guide() -> None:
        with pyro.plate("data", 3):
            before = torch.zeros(3, dtype=F64)
            for name in order:
                loc, scale = param(f"loc {name}", 3), positive(f"scale {name}", 3)
                before = pyro.sample(name, dist.Normal(loc + 0.9 * before, scale))

    return model, guide


@case
def ladder_in_one_order() -> Case:
    return Case(*ladder(("z2", "z1")), num_points=3)


@case
def ladder_in_opposite_orders() -> Case:
    return Case(*ladder(("z1", "z2")), num_points=3, mean_field=False)


@case
def constrained() -> Case:
    def model() -> None:
        with pyro.plate("data", 2):
            a = pyro.sample("a", dist.LogNormal(torch.zeros(2, dtype=F64), 1.0))
            b = pyro.sample("b", dist.Beta(2 * torch.ones(2, dtype=F64), 3.0))
            c = pyro.sample("c", dist.Dirichlet(torch.ones(2, 3, dtype=F64)))
            rate = param("w") ** 2 * a * b * c[..., 0]
            pyro.sample("x", dist.Exponential(rate), obs=ramp(2, low=0.5))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("a", dist.LogNormal(param("loc", 2), positive("scale", 2)))
            pyro.sample("b", dist.Beta(positive("b1", 2), positive("b0", 2)))
            pyro.sample("c", dist.Dirichlet(positive("alpha", 2, 3)))

    return Case(model, guide, num_points=2)


def automatic(make: Callable) -> Callable[[], Case]:
    """Return an autoguide of a model with a positive global latent and two local ones."""

    def make_case() -> Case:
        def model() -> None:
            tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), tau))
                v = pyro.sample("v", dist.Dirichlet(torch.ones(2, dtype=F64)))
                pyro.sample("x", dist.Normal(param("w") * z * v[..., 0], 0.5), obs=ramp(3))

        guide = make(model)
        guide()  # creates its parameters
        return Case(model, guide.to(F64) if isinstance(guide, nn.Module) else guide, (), 1, False)

    return make_case


def guide_list(model: Callable) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["tau", "z"])))
    guide.append(AutoDelta(poutine.block(model, expose=["v"])))
    return guide


CASES |= {
    make.__name__: automatic(make)
    for make in (
        AutoDelta,
        AutoDiagonalNormal,
        AutoIAFNormal,
        AutoLowRankMultivariateNormal,
        AutoMultivariateNormal,
        AutoNormal,
        AutoNormalMessenger,
        guide_list,
    )
}


@case
def auto_normal_in_the_data_plate() -> Case:
    model, _ = pair()
    guide = AutoNormal(model)
    guide()
    return Case(model, guide, (), 4, False)


@pytest.mark.parametrize("analytic_kl", [False, True], ids=["sampled", "analytic"])
@pytest.mark.parametrize(("num_particles", "vectorize"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Found (plate|vars|non-auxiliary):UserWarning")  # Pyro's
def test_value_and_gradient_are_pyros(name, num_particles, vectorize, analytic_kl):
    model, guide, args, num_points, mean_field = CASES[name]()
    kwargs = {
        "num_particles": num_particles,
        "vectorize_particles": vectorize,
        "max_plate_nesting": 2,
    }
    theirs = (TraceMeanField_ELBO if analytic_kl else Trace_ELBO)(**kwargs)
    ours = ELBO(analytic_kl=analytic_kl, **kwargs)
    found = evaluate(ours, model, guide, *args)
    if mean_field or not analytic_kl:
        assert_same(found, evaluate(theirs, model, guide, *args))

    torch.manual_seed(1)
    terms = ours.terms(model, guide, *args)
    shape = (num_particles, num_points)
    assert (terms.num_particles, terms.num_points) == shape
    parts = (terms.log_likelihood, terms.log_prior, terms.log_guide, terms.kl, terms.log_weight)
    assert {part.shape for part in parts} == {shape}
    assert terms.kl_by_dim.shape[:2] == terms.z.shape[:2] == shape
    assert terms.shared.shape == shape[:1]
    torch.testing.assert_close(terms.kl_by_dim.sum(-1), terms.kl)
    if not analytic_kl:  # the other way to the same value
        bound = terms.total(terms.log_weight) + terms.shared.mean()
        torch.testing.assert_close(-bound.detach(), found["loss"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Found (plate|vars|non-auxiliary):UserWarning")  # Pyro's
def test_closed_forms_are_the_mean_of_the_estimates(name):
    """For each data point, within five standard errors of 4000 particles."""
    model, guide, args, *_ = CASES[name]()
    found = {}
    for analytic_kl in (True, False):
        torch.manual_seed(1)
        terms = terms_of(model, guide, *args, num_particles=4000, analytic_kl=analytic_kl)
        found[analytic_kl] = terms.kl.detach()
    excess = found[True] - found[False]
    error = 5 * excess.std(0) / 4000**0.5
    assert (excess.mean(0).abs() <= error + 1e-9).all()


# --- which points there are ----------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("dims", [*itertools.permutations((-1, -2, -3))])
def test_sums_over_inner_plates_wherever_the_data_plate_lies(dims, num_particles):
    """A latent in the data plate, one in a plate within, observations in a third plate within."""
    sizes = dict(zip(("data", "parts", "copies"), (4, 3, 2), strict=True))

    def plates() -> list:
        pairs = zip(sizes.items(), dims, strict=True)
        return [pyro.plate(name, size, dim=dim) for (name, size), dim in pairs]

    def within(*names: str) -> Tensor:
        shape = [1, 1, 1]
        for name, dim in zip(sizes, dims, strict=True):
            shape[dim] = sizes[name] if name in names else 1
        return ramp(*shape)

    def model() -> None:
        data, parts, copies = plates()
        with data:
            a = pyro.sample("a", normal())
            with parts:
                b = pyro.sample("b", dist.Normal(a, 0.7))
                with copies:
                    fn = dist.Normal((a * b).unsqueeze(-1), 0.5 * torch.ones(2, dtype=F64))
                    x = torch.stack([within(*sizes), within(*sizes) ** 2], -1)
                    pyro.sample("x", fn.to_event(1), obs=x)

    def guide() -> None:
        data, parts, _ = plates()
        with data:
            a = pyro.sample("a", dist.Normal(within("data"), 0.9))
            with parts:
                pyro.sample("b", dist.Normal(0.5 * a + within("data", "parts"), 0.8))

    terms = terms_of(model, guide, num_particles=num_particles)
    assert [plate.name for plate in terms.plates] == ["data"]

    def values(*names: str) -> Tensor:  # [S, 1 or 4, …]
        value = terms.pairs[0].model.nodes[names[0]]["value"]
        return value.reshape([num_particles, *within(*names[1:]).shape])

    def points(log_prob: Tensor) -> Tensor:
        return log_prob.movedim(dims[0], 1).flatten(2).sum(-1)

    a, b, x = values("a", "data"), values("b", "data", "parts"), within(*sizes)

    def log_normal(value: Tensor, loc: Tensor, scale: float) -> Tensor:
        return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)

    log_p = points(log_normal(a, 0 * a, 1.0)) + points(log_normal(b, a, 0.7))
    log_q = points(log_normal(a, within("data"), 0.9))
    log_q = log_q + points(log_normal(b, 0.5 * a + within("data", "parts"), 0.8))
    log_x = log_normal(x, a * b, 0.5) + log_normal(x**2, a * b, 0.5)
    torch.testing.assert_close(terms.log_prior, log_p)
    torch.testing.assert_close(terms.log_guide, log_q)
    torch.testing.assert_close(terms.log_likelihood, points(log_x))
    kl_b = (0.5 * a + within("data", "parts") - a) ** 2 / (2 * 0.49) + math.log(0.7 / 0.8)
    kl_b = points(kl_b + 0.5 * (0.64 / 0.49 - 1))
    kl_a = points((within("data") ** 2 / 2 - math.log(0.9) + 0.5 * (0.81 - 1)).expand_as(a))
    torch.testing.assert_close(terms.kl, kl_a + kl_b)
    assert terms.kl_by_dim.shape == (num_particles, 4, 1 + 3)  # b has three parts
    z = torch.cat([v.movedim(dims[0], 1).flatten(2) for v in (a, b)], -1)
    torch.testing.assert_close(terms.z, z)


# --- latents ------------------------------------------------------------------------------------

CONSTRAINED = {  # distribution, length of its unconstrained vector
    "lognormal": (lambda: dist.LogNormal(torch.ones(2, dtype=F64), 0.5).to_event(1), 2),
    "beta": (lambda: dist.Beta(2 * torch.ones((), dtype=F64), 3.0), 1),
    "dirichlet": (lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0], dtype=F64)), 2),
    "lkj": (lambda: dist.LKJCholesky(3, torch.ones((), dtype=F64)), 3),
    "image": (lambda: normal(2, 3, 4, event_dim=3), 24),
    "matrix": (lambda: normal(3).expand([2, 3]).to_event(2), 6),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", CONSTRAINED)
def test_latents_are_unconstrained_vectors(name, vectorize):
    """z of the guide, drawn from the prior, is distributed as draws from the prior are."""
    make, d = CONSTRAINED[name]

    S = 2000 if vectorize else 3

    def program(fn: dist.Distribution, more: int) -> None:
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("v", fn)
            if more:
                pyro.sample("w", normal())

    def guide(more: int) -> None:
        fn = make()
        if not fn.has_rsample:
            draws = fn.sample(torch.Size([S, 1, 2, 3] if vectorize else [2, 3]))
            fn = dist.Delta(draws, event_dim=fn.event_dim)
        program(fn, more)

    for more in (0, 1):
        kwargs = {"num_particles": S, "vectorize_particles": vectorize}
        terms = terms_of(lambda more: program(make(), more), guide, more, **kwargs)
        z, draws = terms.z, terms.sample_prior()
        assert z.shape == draws.shape == (terms.num_particles, 6, d + more)
        assert z.dtype == draws.dtype == F64
        # The first point of all is the first vector: no transposition.
        value = terms.pairs[0].model.nodes["v"]["value"]
        value = value.reshape(-1, *make().event_shape)[1]
        transform = torch.distributions.biject_to(make().support)
        torch.testing.assert_close(z[0, 1, :d], transform.inv(value).flatten())
        if vectorize:
            assert not draws.equal(z)
            error = 5 * (2 / 12000) ** 0.5 * z.std((0, 1))
            assert ((z.mean((0, 1)) - draws.mean((0, 1))).abs() < error).all()


@pytest.mark.parametrize("vectorize", [True, False])
def test_prior_draws_of_several_latents_keep_their_dependence(vectorize):
    """z1 | z2 ~ N(w z2, 0.8²), w = −1: Cov(z1, z2) = −1, Var z1 = 1.64; standard error 0.02."""
    model, guide = ladder(("z2", "z1"))
    S = 3000 if vectorize else 300
    terms = terms_of(model, guide, num_particles=S, vectorize_particles=vectorize)
    draws = terms.sample_prior().detach()
    assert draws.shape == (S, 3, 2)
    tolerance = 0.1 if vectorize else 0.3
    expected = torch.tensor([[1.0, -1.0], [-1.0, 1.64]], dtype=F64)
    torch.testing.assert_close(draws.flatten(0, 1).T.cov(), expected, atol=tolerance, rtol=0)
    with pytest.raises(ValueError, match=r"\['z2', 'z1'\] .* expected run_model, found None"):
        Terms(terms.pairs).sample_prior()


def test_closed_form_of_a_full_covariance_against_a_diagonal_prior():
    """½ (tr Σ/s² + ‖μ‖²/s² − d − log det Σ/s²), s = 2; nothing of it is sampled."""
    tril = torch.tensor([[1.0, 0.0], [0.7, 0.5]], dtype=F64)

    def model() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1))

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.MultivariateNormal(ramp(3, 2), scale_tril=tril))

    terms = terms_of(model, guide, num_particles=2)
    quadratic = (tril @ tril.T).trace() / 4 + ramp(3, 2).square().sum(-1) / 4 - 2
    expected = 0.5 * (quadratic - 2 * math.log(0.5) + 2 * math.log(4))
    torch.testing.assert_close(terms.kl, expected.expand(2, 3))
    assert terms.kl_by_dim.shape == (2, 3, 1)  # it does not split by coordinate


def test_kl_by_coordinate_and_site():
    model, guide = pair()
    terms = terms_of(model, guide)
    loc, scale = ramp(4, 3), ramp(4, 3, low=0.3, high=1.4)
    expected = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
    torch.testing.assert_close(terms.kl_by_dim[0].detach(), expected)
    pyro.clear_param_store()
    case = CASES["guide_with_auxiliary_site"]()
    assert terms_of(case.model, case.guide).kl_by_dim.shape == (1, 4, 2)  # z, and q(u)
    pyro.clear_param_store()
    case = CASES["ladder_in_opposite_orders"]()
    assert terms_of(case.model, case.guide).kl_by_dim.shape == (1, 3, 1)  # no closed form


# --- plates, scales and masks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("plain", 1.0),
        ("subsample_drawn", 5.0),
        ("subsample_given", 20 / 3),
        ("two_data_plates", 3.0),
        ("scaled_by_a_number", 0.3),
        ("scaled_by_a_tensor", 0.3),
        ("scaled_by_point", ramp(4, low=0.5, high=3.0)),
        ("scaled_by_point_and_subsampled", 5 * ramp(4, low=0.5, high=3.0)),
        ("kl_annealed", 1.0),
        ("global_and_local", 1.0),
        ("sequential_plate", 3.0),
        ("inner_subsample", 1.0),
    ],
)
def test_scale_of_a_point_is_apart_from_the_scales_of_sites(name, scale):
    """The terms are those of the points at hand; what all sites share is in ``scale``."""
    case = CASES[name]()
    terms = terms_of(case.model, case.guide)
    torch.testing.assert_close(
        torch.as_tensor(terms.scale, dtype=F64), torch.as_tensor(scale, dtype=F64)
    )
    values = ramp(1, case.num_points)
    torch.testing.assert_close(terms.total(values), (torch.as_tensor(scale) * values[0]).sum())
    one = terms.total(torch.ones((), dtype=F64))
    torch.testing.assert_close(one, torch.as_tensor(scale, dtype=F64).expand(case.num_points).sum())
    site = terms.pairs[0].model.nodes.get("z")
    if name in ("subsample_drawn", "scaled_by_point"):  # no scale within
        log_prior = site["fn"].log_prob(site["value"])
        torch.testing.assert_close(terms.log_prior[0], log_prior)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("plain", None),
        ("masked", [True, False, True, True]),
        ("masked_by_other_objects", [True, False, True, True]),
        ("masked_twice", [True, False, True, True]),
        ("masked_model_only", None),
        ("masked_latent_only", None),
        ("masked_observation_only", None),
        ("masked_out", None),
        ("observations_missing", None),
    ],
)
def test_a_point_is_absent_if_all_its_sites_are_masked(name, present, num_particles):
    case = CASES[name]()
    terms = terms_of(case.model, case.guide, num_particles=num_particles)
    found = terms.present
    assert (found if found is None else found.tolist()) == present
    kept = torch.ones(case.num_points, dtype=torch.bool) if found is None else found
    values = ramp(num_particles, case.num_points)
    torch.testing.assert_close(terms.mean(values), values[:, kept].mean())
    parts = ramp(num_particles, case.num_points, 2)
    torch.testing.assert_close(terms.mean(parts), parts[:, kept].mean((0, 1)))
    torch.testing.assert_close(terms.total(values), values[:, kept].sum() / num_particles)
    z, draws = terms.aggregate()
    assert z.equal(terms.z[:, kept])
    assert draws.shape == z.shape


def test_particles_of_the_only_data_point_are_one_group():
    def model() -> None:
        pyro.sample("z", normal(3).to_event(1))

    terms = terms_of(model, model, num_particles=5)
    z, draws = terms.aggregate()
    assert z.shape == draws.shape == (1, 5, 3)
    assert z[0].equal(terms.z[:, 0])


def test_what_a_mask_leaves_of_an_observed_site():
    def model(mask: Tensor, event: bool = False) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", normal())
            fn = dist.Normal(z.unsqueeze(-1).expand((*z.shape, 2)), 1.0)
            fn = fn.mask(mask).to_event(1) if event else fn.to_event(1).mask(mask)
            pyro.sample("x", fn, obs=ramp(3, 2))
            pyro.sample("y", dist.Normal(z, 1.0), obs=ramp(3))

    def guide(*args: Any) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", normal())

    mask = torch.tensor([True, False, True])
    terms = terms_of(partial(model, mask), guide, num_particles=2)
    assert terms.unmasked("x").tolist() == [mask.tolist()] * 2
    assert terms.unmasked("y").tolist() == [[True] * 3] * 2
    rest = terms.pairs[0].model.nodes["y"]
    expected = rest["fn"].log_prob(rest["value"]).reshape(2, 3)
    torch.testing.assert_close(terms.log_likelihood_without("x"), expected)
    pixels = torch.tensor([[True, True], [True, False], [True, True]])
    terms = terms_of(partial(model, pixels, True), guide)
    with pytest.raises(ValueError, match="observed site 'x': expected a mask of whole data points"):
        terms.unmasked("x")


@pytest.mark.parametrize("by", ["poutine", "distribution"])
def test_padding_of_sequences(by):
    """Of three sequences of at most four steps, one is empty: as if it were not there."""
    mask = torch.tensor([[True] * 4, [False] * 4, [True, True, False, False]])

    def sample(name: str, fn: dist.Distribution, **kwargs: Any) -> Tensor:
        if by == "distribution":
            return pyro.sample(name, fn.mask(mask), **kwargs)
        with poutine.mask(mask=mask):
            return pyro.sample(name, fn, **kwargs)

    def model() -> None:
        with pyro.plate("data", 3, dim=-2), pyro.plate("steps", 4, dim=-1):
            z = sample("z", normal())
            sample("x", dist.Normal(z, 1.0), obs=ramp(3, 4))

    def guide() -> None:
        with pyro.plate("data", 3, dim=-2), pyro.plate("steps", 4, dim=-1):
            sample("z", dist.Normal(ramp(3, 4), 0.5))

    terms = terms_of(model, guide, num_particles=2)
    assert terms.num_points == 12
    assert terms.present.tolist() == mask.flatten().tolist()
    assert (terms.kl[:, ~terms.present] == 0).all()
    assert (terms.log_likelihood[:, ~terms.present] == 0).all()
    torch.testing.assert_close(terms.total(torch.ones((), dtype=F64)), torch.tensor(6.0, dtype=F64))


def test_all_masked():
    model, guide = pair(wrap=poutine.mask(mask=False))
    terms = terms_of(model, guide)
    assert terms.present.tolist() == [False] * 4
    assert terms.total(ramp(1, 4)) == terms.mean(ramp(1, 4)) == 0
    assert terms.aggregate()[0].shape == (1, 0, 3)
    elbo = ELBO(max_plate_nesting=1)
    assert elbo.loss(model, guide) == 0


# --- observations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_reconstruction_of_images(vectorize, num_particles):
    mask = torch.tensor([True, False, True, True])

    def more(z: Tensor) -> None:
        probs = z.sigmoid()[..., None, None].expand(*z.shape, 2, 5)  # [*, C, H, W]
        fn = dist.Bernoulli(probs).to_event(3).mask(mask)
        pyro.sample("image", fn, obs=(ramp(4, 3, 2, 5) > 0).to(F64))
        pyro.factor("penalty", -z.square().sum(-1))
        with pyro.plate("within", 2, dim=-2):
            pyro.sample("y", dist.Poisson(z[..., 0].exp()), obs=torch.arange(4))
        pyro.sample("label", dist.Categorical(z.softmax(-1)), obs=torch.arange(4) % 3)

    model, guide = pair(more=more, outside=lambda: pyro.factor("f", torch.zeros((), dtype=F64)))
    kwargs = {"num_particles": num_particles, "vectorize_particles": vectorize}
    terms = terms_of(model, guide, **kwargs)
    S = num_particles
    x, mean = terms.reconstruction("image")
    assert x.shape == mean.shape == (S, 4, 3, 2, 5)
    torch.testing.assert_close(x, (ramp(4, 3, 2, 5) > 0).to(F64).expand(S, 4, 3, 2, 5))
    torch.testing.assert_close(mean, terms.z.sigmoid()[..., None, None].expand(S, 4, 3, 2, 5))
    y, rate = terms.reconstruction("y")
    assert y.shape == rate.shape == (S, 4, 2)
    assert y.equal(torch.arange(4)[:, None].expand(S, 4, 2))
    torch.testing.assert_close(rate, terms.z[..., :1].exp().expand(S, 4, 2))
    with pytest.raises(ValueError, match=r"expected one .*found \['x', 'image', 'y', 'label'\]"):
        terms.reconstruction()
    with pytest.raises(ValueError, match="expected 'f', found"):
        terms.reconstruction("f")
    with pytest.raises(ValueError, match="'label' must have a mean, found Categorical"):
        terms.reconstruction("label")


def test_reconstruction_of_the_one_observed_site():
    def more(z: Tensor) -> None:
        pyro.factor("penalty", -z.square().sum(-1))
        pyro.deterministic("logits", z, event_dim=1)

    model, guide = pair(more=more)
    x, mean = terms_of(model, guide).reconstruction()
    assert x.equal(ramp(4, 2)[None])
    assert mean.shape == (1, 4, 2)


# --- what it takes: programs, types, settings -----------------------------------------------------


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.linear(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))


class PyroDecoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroParam(torch.ones(2, 3))
        self.noise = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, self.noise).to_event(1), obs=x)


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["module", "pyro module"])
def test_modules_and_types(kind, dtype, validation):
    """Types are those of the program, whatever the default is."""
    decoder = Decoder().to(dtype)
    model = decoder.model if kind == "module" else PyroDecoder().to(dtype)
    x = ramp(5, 3).to(dtype)
    with pyro.validation_enabled(validation):
        for kwargs in ({}, {"num_particles": 4, "vectorize_particles": True}):
            expected = evaluate(Trace_ELBO(max_plate_nesting=1, **kwargs), model, decoder.guide, x)
            ours = ELBO(max_plate_nesting=1, analytic_kl=False, **kwargs)
            found = evaluate(ours, model, decoder.guide, x)
            assert found["loss"].dtype == dtype
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value)
            with torch.no_grad():
                terms = ours.terms(model, decoder.guide, x)
                for name in ("log_likelihood", "log_prior", "log_guide", "kl", "shared", "z"):
                    assert getattr(terms, name).dtype == dtype, name
                    assert not getattr(terms, name).requires_grad


def test_observed_integers_do_not_choose_the_type():
    def model() -> None:
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Poisson(torch.ones(3, dtype=F64)), obs=torch.arange(3))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0), obs=torch.zeros(3))
            pyro.sample("z", normal())

    terms = terms_of(model, lambda: pyro.plate("data", 3)(lambda: pyro.sample("z", normal()))())
    assert terms.log_prior.dtype == terms.log_likelihood.dtype == F64


def test_plates_are_guessed_for_vectorised_particles():
    model, guide = pair()
    elbo = ELBO(num_particles=3, vectorize_particles=True)
    assert elbo.terms(model, guide).kl.shape == (3, 4)
    elbo = ELBO(num_particles=3, vectorize_particles=True)
    model, guide = ladder(("z2", "z1"))
    pyro.clear_param_store()
    assert elbo.terms(model, guide).z.shape == (3, 3, 2)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    "name", ["plain", "subsample_given", "masked", "kl_annealed", "factors_and_deterministic"]
)
def test_can_be_captured_as_a_graph(name, num_particles):
    """No value decides anything: the terms, their means and totals are tensor operations."""
    case = CASES[name]()
    elbo = ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    case.guide()

    def loss(shift: Tensor) -> Tensor:
        terms = elbo.terms(case.model, case.guide)
        value = terms.total(terms.kl + shift - terms.log_likelihood) - terms.shared.mean()
        return value + terms.mean(terms.kl_by_dim).sum() + terms.z.sum()

    with pyro.validation_enabled(False):
        graph = capture(loss, torch.ones((), dtype=F64), compile=False)
        torch.manual_seed(1)
        expected = loss(2 * torch.ones((), dtype=F64)).detach()
        torch.manual_seed(1)
        found = graph(2 * torch.ones((), dtype=F64))
    assert graph.graph is not None
    torch.testing.assert_close(found, expected)


def test_densities_of_flows_without_an_inverse():
    """A flow's density is known at its last sample alone, which is the last particle's."""
    flow = dist.transforms.Planar(2)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide() -> None:
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    kwargs = {"num_particles": 3, "max_plate_nesting": 0}
    torch.manual_seed(1)
    expected = Trace_ELBO(**kwargs).loss(model, guide)
    torch.manual_seed(1)
    assert ELBO(**kwargs).loss(model, guide) == pytest.approx(expected)


# --- complaints -----------------------------------------------------------------------------------


def local(name: str = "z", fn: Callable = normal, plate: Callable | None = None, **kwargs: Any):
    """Return a program of one site in a plate."""

    def program() -> None:
        with plate() if plate else pyro.plate("data", 4):
            pyro.sample(name, fn(), **kwargs)

    return program


def both(*programs: Callable) -> Callable:
    return lambda: [program() for program in programs]


SCALAR = dist.Normal(torch.zeros(()), 1.0)
BAD_PAIRS = {
    "no latents": (local(obs=torch.ones(4)), lambda: None, "has no latent site"),
    "not in the guide": (local(), lambda: None, r"must sample the model's latent sites \['z'\]"),
    "enumerated": (
        local("c", lambda: dist.Bernoulli(0.5), infer={"enumerate": "parallel"}),
        lambda: None,
        r"must sample the model's latent sites \['c'\]",
    ),
    "discrete": (
        local("c", lambda: dist.Categorical(torch.ones(2))),
        local("c", lambda: dist.Categorical(torch.ones(2))),
        r"guide site 'c' must be reparameterisable .* found Categorical",
    ),
    "not in the model": (
        local(),
        both(local(), lambda: pyro.sample("u", SCALAR)),
        r"guide site 'u' is no latent site of the model, which has \['z'\]",
    ),
    "observed in the guide": (
        local(),
        both(local(), lambda: pyro.sample("x", SCALAR, obs=torch.zeros(()))),
        r"guide site 'x' is no latent site",
    ),
    "factor of a score": (
        local(),
        both(local(), lambda: pyro.factor("f", torch.zeros(()), has_rsample=False)),
        r"guide site 'f' must be reparameterisable .* found Unit",
    ),
    "event shape": (
        local(fn=lambda: normal(2, event_dim=1)),
        local(fn=lambda: normal(3, event_dim=1)),
        r"guide site 'z': found shape \[4, 3\] .*expected \[4, 2\]",
    ),
    "event dimensions": (
        local(),
        lambda: pyro.sample("z", normal(4, event_dim=1)),
        r"guide site 'z': found shape \[4\] with 1 event dimensions, expected \[4\] with 0",
    ),
    "no plate in the guide": (
        local(),
        lambda: pyro.sample("z", SCALAR),
        r"guide site 'z': found shape \[\].*expected \[4\]",
    ),
    "full size": (
        local(plate=lambda: pyro.plate("data", 20, subsample=torch.arange(4))),
        local(plate=lambda: pyro.plate("rows", 40, subsample=torch.arange(4))),
        "guide site 'z': plate 'rows' is 4 of 40; expected 4 of 20, as the model's plate 'data'",
    ),
    "subsample of the guide's own": (
        local(plate=lambda: pyro.plate("data", 20, subsample_size=4)),
        local(plate=lambda: pyro.plate("rows", 20, subsample_size=4)),
        "guide plate 'rows' draws a subsample, 4 of 20, but the model has no plate",
    ),
    "plate without a size": (
        local(fn=lambda: normal(4), plate=lambda: pyro.plate("data")),
        local(fn=lambda: normal(4)),
        "plate 'data' must have a size",
    ),
    "undeclared batch": (
        both(local(), lambda: pyro.sample("x", normal(4), obs=torch.zeros(4, dtype=F64))),
        local(),
        'site "x", invalid log_prob shape',
    ),
    "shape of the data": (
        both(local(), local("x", plate=lambda: pyro.plate("b", 4), obs=torch.zeros(5))),
        local(),
        r"site 'x': found a value of shape \[5\], expected \[4\]",
    ),
    "data out of support": (
        both(local(), lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0), obs=-torch.ones(()))),
        local(),
        "log density of site 'x'",
    ),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_complaints_name_the_site(name):
    model, guide, message = BAD_PAIRS[name]
    with pytest.raises(ValueError, match=message):
        ELBO(max_plate_nesting=1).loss(model, guide)


def test_standard_normal_priors():
    zero, eye = torch.zeros(2), torch.eye(2)
    for fn in (
        normal(3, event_dim=1),
        SCALAR.expand([3]).mask(False),
        dist.MultivariateNormal(zero, eye),
    ):
        assert is_standard_normal(fn)
    others = [dist.Normal(zero, torch.tensor([1.0, 2.0])), dist.Normal(zero + 0.1, 1.0)]
    others += [
        dist.MultivariateNormal(zero, 2 * eye),
        dist.LogNormal(zero, 1.0),
        dist.Laplace(0, 1),
    ]
    assert not any(map(is_standard_normal, others))
    terms_of(*pair()).check_standard_normal("This")
    model = local(fn=lambda: dist.Normal(torch.zeros(4), torch.tensor([1.0, 2.0, 1.0, 1.0])))
    message = (
        "This needs a standard normal prior at site 'z', found Normal with loc 0 and scale 1 … 2"
    )
    with pytest.raises(ValueError, match=message):
        terms_of(model, model).check_standard_normal("This")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", None),
        ("subsample_drawn", None),
        ("subsample_given", None),
        ("scaled_by_point_and_subsampled", None),
        ("sequential_plate", None),  # all sites are in it
        ("factors_and_deterministic", None),  # the one outside is a constant
        ("global_and_local", r"site 'z' lies in the subsampled plate 'data' \(2 of 8\)"),
        ("inner_subsample", r"site 'x' lies in the subsampled plate 'pixels' \(2 of 6\)"),
    ],
)
def test_check_of_what_decomposes_into_points(name, message):
    case = CASES[name]()
    terms = terms_of(case.model, case.guide, num_particles=3, vectorize_particles=True)
    if message is None:
        terms.check_decomposes("This")
    else:
        with pytest.raises(ValueError, match=f"This: {message}"):
            terms.check_decomposes("This")


def test_what_does_not_decompose():
    def sequential() -> None:
        mu = pyro.sample("mu", normal())
        for i in pyro.plate("data", 6, subsample=torch.tensor([1, 4])):
            pyro.sample(f"x{i}", dist.Normal(mu, 0.5), obs=ramp(6)[i])

    terms = terms_of(sequential, lambda: pyro.sample("mu", normal()), num_particles=2)
    with pytest.raises(ValueError, match="This: site 'x1' lies in the subsampled plate 'data'"):
        terms.check_decomposes("This")

    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", normal())
        pyro.factor("outside", z.sum(-1, keepdim=z.dim() > 1))

    terms = terms_of(model, local(), num_particles=2, max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"This: the observed sites \['outside'\] lie outside"):
        terms.check_decomposes("This")

    def guide() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", normal())
        pyro.factor("jacobian", z.sum(-1, keepdim=z.dim() > 1), has_rsample=True)

    terms = terms_of(local(), guide, num_particles=2, max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"This: the observed sites \['jacobian'\] lie outside"):
        terms.check_decomposes("This")

    case = CASES["subsample_drawn"]()
    terms = terms_of(case.model, case.guide, num_particles=2, vectorize_particles=False)
    with pytest.raises(ValueError, match=r"each particle draws its own .*'data'.* site 'x'"):
        terms.check_decomposes("This")


def test_what_is_not_finite_is_named_once():
    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z, param("w")), obs=torch.ones(4, dtype=F64))
        pyro.factor("f", torch.tensor(-INF))

    with pyro.validation_enabled(False):
        pyro.param("w", torch.tensor(math.nan, dtype=F64))
        terms = terms_of(model, local(), num_particles=2, vectorize_particles=False)
        names = ["parameter 'w' of the model", "log_prob of model site 'x'"]
        assert terms.nonfinite() == [*names, "log_prob of model site 'f'"]
        with pytest.raises(NonFiniteError, match=r"parameter 'w'.*site 'x'"):
            ELBO(max_plate_nesting=1).loss_and_grads(model, local())


def test_messenger_guides_and_pairs():
    model, _ = pair()
    traces = get_trace_pair(model, AutoNormalMessenger(model), (), {}, INF)
    assert traces.model.nodes["z"]["value"] is traces.guide.nodes["z"]["value"]
    assert "data" not in traces.model.nodes  # the plate's subsample


def test_guide_that_draws_rows_of_a_plate_that_the_model_takes_whole():
    def model(size: int | None) -> None:
        with pyro.plate("data", 6, subsample_size=size):
            pyro.sample("z", normal())

    def guide(size: int | None) -> None:
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("z", normal())

    message = r"draws a subsample, 2 of 6.*expected pyro.plate\('data', 6, subsample_size=2\)"
    with pytest.raises(ValueError, match=message):
        get_trace_pair(model, guide, (None,), {}, float("inf"))
    get_trace_pair(model, guide, (2,), {}, float("inf"))
