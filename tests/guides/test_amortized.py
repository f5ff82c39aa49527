"""The contract that every amortised guide keeps, whatever its family."""

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_vae import fit, guides
from pyro_vae.guides import Flow, Gaussian, Implicit
from pyro_vae.guides.flow import zuko  # imported from here, it leaves validation on
from pyro_vae.losses import AVB_ELBO
from pyro_vae.nn import MLP, ResidualDiscriminator, TwoTowerDiscriminator, weight_norm_cap
from pyro_vae.ratios import logistic_loss, show_parameters

N, X_DIM, D, SIZE = 5, 6, 4, 100

GUIDES = {
    "Gaussian": Gaussian,
    "Gaussian-block": partial(Gaussian, covariance="block", block_size=2),
    "Gaussian-full": partial(Gaussian, covariance="full"),
    "Flow": Flow,
    "Flow-NSF": partial(Flow, flow=zuko.flows.NSF, transforms=2, hidden_features=(8,)),
    "Implicit": Implicit,
    "Implicit-input": partial(Implicit, noise="input", noise_dim=7, hidden_dims=()),
    "Implicit-basis": partial(Implicit, noise="basis"),
    "Implicit-prior": partial(Implicit, contrast="prior"),
    "Implicit-towers": partial(Implicit, discriminator=TwoTowerDiscriminator),
}
KNOWN = [name for name in GUIDES if not name.startswith("Implicit")]
LEARNED = [name for name in GUIDES if name.startswith("Implicit")]


def build(name, **kwargs):
    """Make a guide on an encoder of rows of six numbers, with a discriminator that is not zero."""
    make = GUIDES[name]
    noise = 7 if name == "Implicit-input" else 0
    keywords = {**getattr(make, "keywords", {}), **kwargs}
    if keywords.get("discriminator") is TwoTowerDiscriminator:
        keywords["discriminator"] = TwoTowerDiscriminator(X_DIM, D, (8,), 8)
    guide = getattr(make, "func", make)(MLP(X_DIM + noise, 5, (8,)), D, **keywords)
    if guide.discriminator is not None:
        for param in guide.discriminator.parameters():
            nn.init.normal_(param, std=0.2)
    return guide


@pytest.fixture(params=GUIDES)
def name(request):
    return request.param


@pytest.fixture
def make_guide(name, dtype, device):
    return lambda **kwargs: build(name, **kwargs).to(device, dtype)


@pytest.fixture
def guide(make_guide):
    return make_guide()


@pytest.fixture
def x(dtype, device):
    return torch.randn(N, X_DIM, dtype=dtype, device=device)


class Model(nn.Module):
    """z ~ N(0, I), x ~ N(W z, s²) with s a parameter of each row of the data."""

    def __init__(self, like, **plate):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(X_DIM, D).to(like))
        self.scales = torch.linspace(0.5, 1.5, SIZE).to(like)
        self.plate = plate
        self.indices = None

    def log_likelihood(self, x, z, indices):
        loc, scale = z @ self.weight.T, self.scales[indices, None]
        return torch.distributions.Normal(loc, scale).log_prob(x).sum(-1)

    def forward(self, x):
        show_parameters(self)
        plate = {"size": len(x), **self.plate}
        with pyro.plate("data", **plate) as indices:
            self.indices = indices
            if len(x) > len(indices):
                x = x[indices]
            zeros = x.new_zeros(D)
            z = pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))
            likelihood = dist.Normal(z @ self.weight.T, self.scales[indices, None])
            pyro.sample("x", likelihood.to_event(1), obs=x)


@pytest.fixture
def model(x):
    return Model(x)


def own(guide):
    """Return the parameters that are not the discriminator's."""
    pairs = guide.named_parameters()
    return {name: param for name, param in pairs if not name.startswith("discriminator.")}


def learned(guide):
    return {n: param for n, param in guide.named_parameters() if n.startswith("discriminator.")}


def draws(guide, x, n=8):
    torch.manual_seed(1)
    return guide.get_posterior(x).sample((n,))


def test_every_guide_is_tested():
    """Those for one posterior in test_guides.py."""
    assert {name.split("-")[0] for name in GUIDES} == {
        name for name in guides.__all__ if not name.startswith(("Auto", "Amortized"))
    }


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_call_returns_the_site(name, dtype, device):
    x = torch.randn(N, X_DIM, dtype=dtype, device=device)
    guide = build(name).to(device, dtype)
    trace = poutine.trace(guide).get_trace(x)
    (value,) = trace.nodes["_RETURN"]["value"].values()
    assert trace.nodes["z"]["value"] is value
    assert value.shape == (N, D)
    assert value.dtype == dtype
    assert value.device.type == device.type
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (N,)
    assert trace.nodes["z"]["log_prob"].dtype == dtype
    assert trace.nodes["z"]["log_prob"].isfinite().all()


def test_names_are_ours_to_choose(make_guide, x):
    trace = poutine.trace(make_guide(site="latent", plate="rows")).get_trace(x)
    assert list(trace.nodes["_RETURN"]["value"]) == ["latent"]
    (frame,) = trace.nodes["latent"]["cond_indep_stack"]
    assert (frame.name, frame.dim, frame.size) == ("rows", -1, N)


def test_posterior_shapes(guide, x):
    q = guide.get_posterior(x)
    assert (q.batch_shape, q.event_shape) == ((N,), (D,))
    z = q.rsample((3, 2))
    assert z.shape == (3, 2, N, D)
    assert z.requires_grad
    assert q.log_prob(z).shape == (3, 2, N)
    assert q.expand((7, N)).rsample((3,)).shape == (3, 7, N, D)
    assert len(z.reshape(-1, D).unique(dim=0)) == 6 * N
    assert guide.sample_latent(x).shape == (N, D)
    assert guide.sample_latent(x).requires_grad


def test_each_row_has_a_posterior_of_its_own(guide, x):
    """The density of row i is that under x[i], whatever the other rows are."""
    z = draws(guide, x)
    log_prob = guide.get_posterior(x).log_prob(z)
    for i in range(N):
        alone = guide.get_posterior(x[i : i + 1]).log_prob(z[:, i : i + 1])
        torch.testing.assert_close(alone, log_prob[:, i : i + 1])
    swapped = guide.get_posterior(x.flip(0)).log_prob(z)
    if guide.discriminator is None or guide.contrast == "adaptive":
        assert ((swapped - log_prob).abs() > 1e-6).sum() >= log_prob.numel() - 8  # N is odd


def test_the_density_is_that_of_the_value(guide, x):
    """Also where the distribution keeps it with the draw."""
    q = guide.get_posterior(x)
    z = q.rsample((8,))
    torch.testing.assert_close(q.log_prob(z), guide.get_posterior(x).log_prob(z.clone()))


def test_under_plates_of_particles(guide, x):
    def particles():
        with pyro.plate("more", 2, dim=-3), pyro.plate("particles", 3, dim=-2):
            return guide(x)

    trace = poutine.trace(particles).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (2, 3, N, D)
    assert len(z.reshape(-1, D).unique(dim=0)) == 6 * N
    torch.testing.assert_close(
        trace.nodes["z"]["log_prob"], guide.get_posterior(x).log_prob(z.detach())
    )


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(guide, model, x, parallel):
    found = Predictive(model, guide=guide, num_samples=20, parallel=parallel)(x)
    assert found["z"].shape == (20, N, D)
    assert found["x"].shape == (20, N, X_DIM)
    assert len(found["z"].reshape(-1, D).unique(dim=0)) == 20 * N


def test_median_and_quantiles(guide, x):
    levels = [0.1, 0.5, 0.9]
    quantiles = guide.quantiles(torch.tensor(levels), x)["z"]
    assert quantiles.shape == (3, N, D)
    assert quantiles.dtype == x.dtype
    assert not quantiles.requires_grad
    assert (quantiles.diff(dim=0) > 0).all()
    assert guide.median(x)["z"].shape == (N, D)
    # A probability from 4,000 draws, at a quantile from 1,000.
    with torch.no_grad():
        z = guide.get_posterior(x).sample((4000,))
    for level, value in zip([*levels, 0.5], [*quantiles, guide.median(x)["z"]], strict=True):
        se = math.sqrt(level * (1 - level) * (1 / 4000 + 1 / 1000))
        assert ((z < value).to(x).mean(0) - level).abs().max() < 5 * se


def test_same_seed_same_draws(guide, x):
    assert torch.equal(draws(guide, x), draws(guide, x))
    torch.manual_seed(2)
    assert not torch.equal(guide.get_posterior(x).sample((8,)), draws(guide, x))


def test_the_density_takes_no_random_numbers(guide, x):
    """A loss's value is the same whether or not it asks for log q."""
    z = draws(guide, x)
    torch.manual_seed(1)
    first = guide.get_posterior(x).log_prob(z)
    torch.manual_seed(2)
    assert torch.equal(guide.get_posterior(x).log_prob(z), first)


# --- parameters -----------------------------------------------------------------------------------


def test_all_parameters_exist_at_construction(guide, model, x):
    before = {name: id(param) for name, param in guide.named_parameters()}
    assert before
    state = set(guide.state_dict())
    guide(x)
    guide.median(x)
    Trace_ELBO().loss_and_grads(model, guide, x)
    assert {name: id(param) for name, param in guide.named_parameters()} == before
    assert set(guide.state_dict()) == state


#: Of the programs one of each kind of density; a flow takes longer to capture than a second or two.
CAPTURED = [
    pytest.param(name, "captured", marks=[] if quick else [pytest.mark.slow])
    for name in GUIDES
    for quick in [name in {"Gaussian-full", "Implicit"}]
]
COMPILED = pytest.param("Implicit", "compiled", marks=[pytest.mark.compiled, pytest.mark.slow])


@pytest.mark.parametrize(("name", "run"), [*CAPTURED, COMPILED], indirect=True)
def test_captured_loss_and_gradients_are_the_plain_ones(guide, model, x, run):
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    plain = type(run)(compile=False)
    expected = plain.loss_and_gradients(elbo, model, guide, x)
    torch.testing.assert_close(run.loss_and_gradients(elbo, model, guide, x), expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_reach_the_guide_and_not_the_discriminator(guide, model, x, vectorize):
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss_and_grads(model, guide, x)
    for name, param in own(guide).items():
        assert param.grad.abs().sum() > 0, name
        assert param.grad.isfinite().all(), name
    assert all(param.grad is None for param in learned(guide).values())


def test_svi_and_elbo_module_see_the_same_parameters(guide, model, x):
    with poutine.trace(param_only=True) as capture:
        Trace_ELBO().loss_and_grads(model, guide, x)
    seen = {node["value"].unconstrained() for node in capture.trace.nodes.values()}
    assert seen == {*own(guide).values(), *model.parameters()}
    module = Trace_ELBO()(model, guide)
    assert set(module.parameters()) == seen | set(learned(guide).values())
    module.zero_grad()
    module(x).backward()
    assert {param for param in module.parameters() if param.grad is not None} == seen


def test_trains(make_guide, model, x, run):
    """The loss falls; under SVI and under a torch optimiser the steps are the same ones."""
    finals = []
    for through in ("SVI", "ELBOModule"):
        torch.manual_seed(3)
        guide = make_guide()
        twin = copy.deepcopy(model)
        elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        losses = []
        before = copy.deepcopy(guide.state_dict())
        if through == "SVI":
            svi = run.SVI(twin, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
            losses = [svi.step(x) for _ in range(30)]
        else:
            module = elbo(twin, guide)
            optim = torch.optim.Adam(module.parameters(), lr=1e-2)
            for _ in range(30):
                optim.zero_grad()
                loss = module(x)
                loss.backward()
                optim.step()
                losses.append(loss.item())
        assert torch.tensor(losses).isfinite().all()
        if guide.discriminator is None:  # a learned density is another player's to keep up
            assert sum(losses[-10:]) < sum(losses[:10])
        for name, value in guide.state_dict().items():
            if name.startswith("discriminator."):
                assert torch.equal(value, before[name]), name
        finals.append(guide.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], msg=name)


def test_a_second_guide_trains_too(make_guide, x):
    """Through Pyro's global store it would be given the first one's parameters."""

    def model(x):
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(D)
            pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))

    for _ in range(2):
        guide = make_guide()
        before = [param.detach().clone() for param in own(guide).values()]
        params = list(own(guide).values())
        SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
        after = list(own(guide).values())
        assert all(a is p for a, p in zip(after, params, strict=True))
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_copies(guide, make_guide, x, how):
    """A copy has the same draws and densities, and no tensor in common."""
    z = draws(guide, x)
    log_prob = guide.get_posterior(x).log_prob(z)
    if how == "state_dict":
        twin = make_guide()
        assert not torch.equal(draws(twin, x), z)
        twin.load_state_dict(copy.deepcopy(guide.state_dict()))
    elif how == "deepcopy":
        twin = copy.deepcopy(guide)
    else:
        twin = pickle.loads(pickle.dumps(guide))
    assert torch.equal(draws(twin, x), z)
    torch.testing.assert_close(twin.get_posterior(x).log_prob(z), log_prob)
    with torch.no_grad():
        for param in twin.parameters():
            param.add_(0.1)
    assert not torch.equal(draws(twin, x), z)
    assert torch.equal(draws(guide, x), z)
    torch.testing.assert_close(guide.get_posterior(x).log_prob(z), log_prob)


def test_encoder_may_be_capped(name, x):
    guide = build(name).to(x)
    weight_norm_cap(guide.encoder, 0.3)
    assert copy.deepcopy(guide)(x)["z"].shape == (N, D)
    guide(x)["z"].sum().backward()
    weights = [layer.weight for layer in guide.encoder if isinstance(layer, nn.Linear)]
    assert all((weight.norm(dim=1) < 0.3 + 1e-6).all() for weight in weights)
    assert all(param.grad is not None for param in guide.encoder.parameters())


# --- the plate of the data ------------------------------------------------------------------------


def written_out(guide, model, x, z, indices, scale):
    """Return −scale · Σ [log p(x|z) + log p(z) − log q(z|x)], the mean over particles."""
    with torch.no_grad():
        log_p = model.log_likelihood(x, z, indices)
        log_p = log_p + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_q = guide.get_posterior(x).log_prob(z)
        return -scale * (log_p - log_q).reshape(-1, len(x)).sum(-1).mean()


def loss_and_latents(guide, model, x, particles=1, vectorize=True):
    values = []

    def recorded(x):
        values.append(guide(x)["z"].detach())
        return {"z": values[-1]}

    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1)
    return elbo.differentiable_loss(model, recorded, x).detach(), torch.stack(values)


@pytest.mark.parametrize("vectorize", [True, False])
def test_full_data(guide, model, x, vectorize):
    loss, z = loss_and_latents(guide, model, x, 3, vectorize)
    expected = written_out(guide, model, x, z, torch.arange(N), 1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_minibatch_in_hand(make_guide, x, vectorize):
    """Scaled by size/N on both sides; the model's indices stay the model's."""
    indices = torch.tensor([90, 3, 41, 77, 12])
    model = Model(x, size=SIZE, subsample=indices)
    guide = make_guide(size=SIZE)
    loss, z = loss_and_latents(guide, model, x, 3, vectorize)
    torch.testing.assert_close(loss, written_out(guide, model, x, z, indices, SIZE / N))
    assert torch.equal(model.indices, indices)


def test_a_subsample_that_the_guide_draws(make_guide, dtype, device, run):
    """The model is replayed on the guide's indices, which differ from call to call."""
    data = torch.randn(SIZE, X_DIM, dtype=dtype, device=device)
    model = Model(data, subsample_size=N)
    guide = make_guide(subsample_size=N)
    module = run.module(Trace_ELBO(max_plate_nesting=1), model, guide)
    seen = []
    for seed in range(2):
        torch.manual_seed(seed)
        found = module(data).detach()
        i = model.indices.clone()  # a program writes where the last ones are
        torch.manual_seed(seed)
        loss, z = loss_and_latents(guide, model, data)  # from the same random numbers
        assert torch.equal(model.indices, i)
        assert z.shape == (1, N, D)
        assert len(i.unique()) == N
        torch.testing.assert_close(loss, written_out(guide, model, data[i], z, i, SIZE / N))
        torch.testing.assert_close(found, loss)
        seen.append(i)
    assert not torch.equal(*seen)
    trace = poutine.trace(guide).get_trace(data)
    assert trace.nodes["z"]["scale"] == SIZE / N


class Labelled(Gaussian):
    """Feeds the encoder from two arguments."""

    def features(self, x, label, *, weight):
        return self.encoder(torch.cat([x, label[:, None] * weight], 1))


def test_features_of_several_arguments(dtype, device):
    """Cut alike where the guide draws the rows; what is of another length is left alone."""
    data = torch.randn(SIZE, X_DIM - 1, dtype=dtype, device=device)
    label = torch.arange(SIZE).to(data)
    for kwargs in ({}, {"subsample_size": N}):
        guide = Labelled(MLP(X_DIM, 5, (8,)), D, **kwargs).to(data)
        weight = torch.ones(1).to(data)
        trace = poutine.trace(guide).get_trace(data, label, weight=weight)
        i = trace.nodes["data"]["value"] if kwargs else slice(None)
        expected = guide.get_posterior(data[i], label[i], weight=weight).mean
        torch.testing.assert_close(trace.nodes["z"]["fn"].mean, expected)
        assert guide.median(data, label, weight=weight)["z"].shape == (SIZE, D)


# --- densities that are known ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in GUIDES if name.startswith("Gaussian")])
def test_gaussian_is_its_formula(guide, name, x):
    """The factor put together entry by entry, the density by a solve."""
    block = {"Gaussian": 1, "Gaussian-block": 2, "Gaussian-full": D}[name]
    with torch.no_grad():
        nn.init.normal_(guide.head.weight)
        out = guide.encoder(x) @ guide.head.weight.T + guide.head.bias
        z = draws(guide, x)
        q = guide.get_posterior(x)
        below = iter(range(2 * D, out.shape[1]))
        tril = torch.zeros(N, D, D).to(x)
        for i in range(D):
            for j in range(i):
                if i // block == j // block:
                    tril[:, i, j] = out[:, next(below)]
            tril[:, i, i] = out[:, D + i].exp()
        assert list(below) == []
        white = torch.linalg.solve(tril, (z - out[:, :D])[..., None])[..., 0]
        expected = -0.5 * white.square().sum(-1) - 0.5 * D * math.log(2 * math.pi)
        expected = expected - torch.linalg.det(tril).log()
        torch.testing.assert_close(q.log_prob(z), expected)
        if block == 1:
            assert (q.stddev > 0).all()
            with pytest.raises(AttributeError):
                _ = q.scale_tril
        else:
            torch.testing.assert_close(q.scale_tril, tril)
            assert ((q.scale_tril != 0).sum((1, 2)) == D * (block + 1) // 2).all()
            assert (q.scale_tril.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("name", [name for name in GUIDES if name.startswith("Gaussian")])
def test_gaussian_draws_have_its_covariance(guide, x):
    with torch.no_grad():
        nn.init.normal_(guide.head.weight)
        q = guide.get_posterior(x[:1])
        z = q.sample((20_000,))[:, 0]
        z_bar = (z - q.mean) / q.stddev
        assert (z_bar.mean(0) * math.sqrt(len(z))).abs().max() < 4.5
        tril = getattr(q, "scale_tril", torch.diag_embed(q.stddev))[0]
        white = torch.linalg.solve_triangular(tril, (z - q.mean).T, upper=False)
        assert (torch.cov(white) - torch.eye(D).to(x)).abs().max() < 5 * math.sqrt(2 / len(z))


def test_gaussian_quantiles_are_exact(x):
    guide = Gaussian(MLP(X_DIM, 5), D, covariance="full").to(x)
    q = guide.get_posterior(x)
    upper = guide.quantiles([0.975], x)["z"][0]
    torch.testing.assert_close(upper, (q.mean + 1.959964 * q.stddev).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(guide.median(x)["z"], q.mean.detach())


def test_diagonal_kl_is_closed_form(x):
    """What a loss needs for a KL without a sample."""
    q = Gaussian(MLP(X_DIM, 5), D).to(x).get_posterior(x)
    zeros = x.new_zeros(D)
    kl = torch.distributions.kl_divergence(q, dist.Normal(zeros, zeros + 1).to_event(1))
    var, mean = q.variance, q.mean
    torch.testing.assert_close(kl, 0.5 * (var + mean.square() - 1 - var.log()).sum(-1))


@pytest.mark.parametrize("name", [name for name in GUIDES if name.startswith("Flow")])
def test_flow_is_the_change_of_variables(guide, x):
    """log q(z|x) = log N(u; 0, I) − log |det ∂z/∂u|, the Jacobian by autograd; z = μ + σ f(u)."""
    loc, log_scale = guide.head(guide.encoder(x)).chunk(2, -1)
    inner = guide.flow(guide.encoder(x))
    u = torch.randn(N, D).to(x)
    z = loc + log_scale.exp() * inner.transform.inv(u)
    q = guide.get_posterior(x)
    for i in range(N):

        def push(u, i=i):
            one = guide.get_posterior(x[i : i + 1])
            return one.dist.transform.inv(u[None])[0]

        torch.testing.assert_close(push(u[i]), z[i])
        jacobian = torch.autograd.functional.jacobian(push, u[i])
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(u[i]).sum()
        expected = expected - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(q.log_prob(z)[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(
    "kwargs", [{}, {"flow": zuko.flows.MAF, "transforms": 2, "hidden_features": (16,)}]
)
@torch.no_grad()
def test_flow_integrates_to_one(dim, kwargs, x):
    guide = Flow(MLP(X_DIM, 5), dim, **kwargs).to(x)
    guide.head.bias.add_(0.3)
    q = guide.get_posterior(x[:2])
    z = q.sample((20_000,))
    low, high = z.flatten(0, 1).min(0).values - 2, z.flatten(0, 1).max(0).values + 2
    points = {1: 10_000, 2: 250}[dim]
    axes = [torch.linspace(a, b, points).to(z) for a, b in zip(low, high, strict=True)]
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    grid = torch.cartesian_prod(*axes).reshape(-1, 1, dim).expand(-1, 2, dim)
    mass = q.log_prob(grid).exp().sum(0) * cell
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=0.01, rtol=0)


def test_flow_arguments_arrive():
    encoder = MLP(X_DIM, 5)
    assert len(Flow(encoder, D).flow.transform.transforms) == 6
    assert len(Flow(encoder, D, transforms=2).flow.transform.transforms) == 2
    spline = Flow(encoder, D, zuko.flows.NSF, transforms=3, size=7)
    assert isinstance(spline.flow, zuko.flows.NSF)
    assert len(spline.flow.transform.transforms) == 3
    assert spline.size == 7


# --- densities that are learned -------------------------------------------------------------------


@pytest.fixture(params=LEARNED)
def implicit(request, dtype, device):
    return build(request.param).to(device, dtype)


def test_learned_densities_say_so(implicit, x):
    assert implicit.get_posterior(x).learned_density
    for name in KNOWN:
        assert not getattr(build(name).to(x).get_posterior(x), "learned_density", False)


def test_learned_log_prob_is_its_formula(implicit, x):
    """T(x, z̄) + log r(z|x), written out."""
    q = implicit.get_posterior(x)
    z = draws(implicit, x)
    contrast = q.ratio.contrast
    z_bar = (z - contrast.loc) / contrast.scale
    log_r = -0.5 * z_bar.square().sum(-1) - 0.5 * D * math.log(2 * math.pi)
    log_r = log_r - contrast.scale.log().expand(N, D).sum(-1)
    torch.testing.assert_close(q.log_prob(z), implicit.discriminator(x, z_bar) + log_r)
    swapped = implicit.discriminator(x.flip(0), z_bar)
    assert (swapped - implicit.discriminator(x, z_bar)).abs().max() > 1e-3


def test_learned_density_passes_gradients_to_z_alone(implicit, x):
    """Nothing through T's x, through the contrast's moments, or into T."""
    x.requires_grad_()
    q = implicit.get_posterior(x)
    z = q.rsample((8,))
    constant = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(constant).sum(), constant)
    (through_z,) = torch.autograd.grad(z, x, slope, retain_graph=True)
    (total,) = torch.autograd.grad(q.log_prob(z).sum(), x)
    torch.testing.assert_close(total, through_z)
    assert not q.log_prob(constant.detach()).requires_grad


def test_adversary_sees_and_trains_the_discriminator_alone(implicit, x, model, run):
    elbo = AVB_ELBO(num_particles=8)
    with poutine.trace(param_only=True) as capture:
        elbo.adversary(model, implicit, x).backward()
    seen = {node["value"].unconstrained() for node in capture.trace.nodes.values()}
    assert seen == set(implicit.discriminator.parameters())
    assert all(param.grad.abs().sum() > 0 for param in implicit.discriminator.parameters())
    assert all(param.grad is None for param in own(implicit).values())
    svi = run.SVI(model, implicit, pyro.optim.Adam({"lr": 1e-2}), elbo.adversary)
    before = copy.deepcopy(implicit.state_dict())
    svi.step(x)
    for name, value in implicit.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("discriminator."), name


def test_fit_drives_both_players(implicit, x, model, run):
    before = copy.deepcopy(implicit.state_dict())
    elbo = AVB_ELBO(num_particles=4)
    result = fit(model, implicit, elbo, x, num_steps=2, progress=False, compile=run.compile)
    assert result.losses.isfinite().all()
    assert result.adversary_losses.isfinite().all()
    for name, param in implicit.named_parameters():
        assert not torch.equal(param, before[name]), name


@pytest.mark.parametrize("batch", [(), (3,)])
def test_discriminate(implicit, x, batch):
    """T at draws of q and of r, q first."""
    q = implicit.get_posterior(x).expand((*batch, N))
    torch.manual_seed(1)
    t_q, t_r = q.discriminate(7)
    assert t_q.shape == t_r.shape == (7, *batch, N)
    torch.manual_seed(1)
    shape = torch.Size((7, *batch, N))
    with torch.no_grad():
        z = q.sampler(shape)
        contrast = q.ratio.contrast
        z_r = contrast.sample(shape)
        for t, value in ((t_q, z), (t_r, z_r)):
            z_bar = (value - contrast.loc) / contrast.scale
            torch.testing.assert_close(t.detach(), implicit.discriminator(x, z_bar))
        assert not torch.allclose(t_q, t_r)


def test_prior_contrast_is_standard_normal(x):
    contrast = build("Implicit-prior").to(x).get_posterior(x).ratio.contrast
    assert torch.equal(contrast.loc, x.new_zeros(D))
    assert torch.equal(contrast.scale, x.new_ones(D))
    assert contrast.sample(torch.Size((7, N))).shape == (7, N, D)


@pytest.mark.parametrize("noise", ["features", "input", "basis"])
def test_adaptive_contrast_has_the_moments_for_each_x(noise, x):
    """Of 20,000 draws each: means within five standard errors, variances within five."""
    noise_dim = 7
    encoder = MLP(X_DIM + (noise_dim if noise == "input" else 0), 5, (8,))
    many = {"noise": noise, "noise_dim": noise_dim, "num_moment_particles": 20_000}
    guide = Implicit(encoder, D, **many).to(x)
    q = guide.get_posterior(x)
    with torch.no_grad():
        z = q.sample((20_000,))
        var, mean = torch.var_mean(z, 0)
        fourth = (z - mean).pow(4).mean(0)
        contrast = q.ratio.contrast
        assert contrast.loc.shape == (N, D)
        assert ((contrast.loc - mean).abs() < 5 * (2 * var / len(z)).sqrt()).all()
        se = (2 * (fourth - var.square()) / len(z)).sqrt()
        assert ((contrast.scale.square() - var).abs() < 5 * se).all()
        # They differ between rows by more than that, and between elements.
        assert ((mean[0] - mean[1]).abs() > 10 * (var[0] / len(z)).sqrt()).any()


@pytest.mark.parametrize("num_moment_particles", [6, 16])
def test_moments_of_a_linear_sampler_are_exact(num_moment_particles, x):
    """The noise of the moments is antithetic and white, however little there is."""
    guide = Implicit(
        nn.Linear(X_DIM, 5),
        2,
        hidden_dims=(),
        noise_dim=3,
        num_moment_particles=num_moment_particles,
    )
    q = guide.to(x).get_posterior(x)
    layer = guide.head[0]
    expected = guide.encoder(x) @ layer.weight[:, :5].T + layer.bias
    torch.testing.assert_close(q.ratio.contrast.loc, expected.detach())
    scale = layer.weight[:, 5:].norm(dim=1).detach().expand(N, 2)
    torch.testing.assert_close(q.ratio.contrast.scale, scale)


def test_noise_enters_where_it_is_said_to(x):
    """z recomputed from the noise, in plain torch."""
    for noise in ("features", "input", "basis"):
        width = {"features": 7, "input": 7, "basis": 3 * 2}[noise]
        guide = Implicit(
            MLP(X_DIM + 7 * (noise == "input"), 5, (8,)),
            2,
            noise=noise,
            noise_dim=2 if noise == "basis" else 7,
            num_basis=3,
            hidden_dims=(9,),
        ).to(x)
        torch.manual_seed(1)
        z = guide.get_posterior(x).rsample((4,))
        torch.manual_seed(1)
        eps = torch.randn(4, N, width, dtype=x.dtype, device=x.device)
        wide = x.expand(4, N, X_DIM)
        if noise == "features":
            expected = guide.head(torch.cat([guide.encoder(wide), eps], -1))
        elif noise == "input":
            expected = guide.head(guide.encoder(torch.cat([wide, eps], -1)))
        else:
            first, last = guide.basis.network[0], guide.basis.network[2]
            a = guide.head(guide.encoder(x)).reshape(N, 3, 2)
            expected = torch.zeros_like(z)
            for i in range(3):
                rows = slice(32 * i, 32 * (i + 1))
                h = eps[..., 2 * i : 2 * i + 2] @ first.weight[rows, :, 0].T + first.bias[rows]
                out = slice(2 * i, 2 * i + 2)
                v = nn.functional.elu(h) @ last.weight[out, :, 0].T + last.bias[out]
                expected = expected + v * a[:, i]
        torch.testing.assert_close(z, expected)


def test_default_discriminator_knows_the_width_of_x():
    assert build("Implicit").discriminator.of_x[0].in_features == X_DIM
    assert build("Implicit-input").discriminator.of_x[0].in_features == X_DIM
    images = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    guide = Implicit(images, D)
    assert guide.discriminator.of_x[0].in_features == 64
    assert guide.get_posterior(torch.randn(3, 8, 8)).log_prob(torch.randn(2, 3, D)).shape == (2, 3)


def test_a_collapsed_guide_keeps_a_density(x):
    guide = build("Implicit").to(x)
    with torch.no_grad():
        guide.head[-1].weight.zero_()
    q = guide.get_posterior(x)
    assert q.log_prob(q.rsample()).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["adaptive", "prior"])
def test_learns_a_density_that_is_secretly_gaussian(contrast):
    """z = W x + b + V ε with correlation 0.7, T alone trained.

    Over q's draws the mean of the absolute error of log q is below 0.05 nats. Untrained, log q is
    the contrast's, and the mean of the error is −KL(q ‖ r) ≤ ½ log(1 − 0.7²) = −0.34.
    """
    guide = Implicit(
        nn.Linear(3, 4),
        2,
        noise_dim=4,
        hidden_dims=(),
        contrast=contrast,
        discriminator=ResidualDiscriminator(2, x_dim=3),
    )
    layer = guide.head[0]
    with torch.no_grad():
        layer.weight[:, 4:] = torch.tensor([[0.6, 0.0, 0.3, 0.0], [0.5, 0.35, 0.0, 0.2]])
    x = torch.randn(500, 3)

    @torch.no_grad()
    def error():
        mix = layer.weight[:, 4:]
        loc = guide.encoder(x) @ layer.weight[:, :4].T + layer.bias
        q, truth = guide.get_posterior(x), dist.MultivariateNormal(loc, mix @ mix.T)
        z = q.sample((40,))
        return q.log_prob(z) - truth.log_prob(z)

    assert error().mean() < -0.3
    steps = 2000
    optim = torch.optim.Adam(guide.discriminator.parameters(), lr=3e-3, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in range(steps):
        optim.zero_grad()
        logistic_loss(*guide.get_posterior(torch.randn(64, 3)).discriminate(16)).backward()
        optim.step()
        schedule.step()
    assert error().abs().mean() < 0.05


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, found 0"),
        ({"num_features": 0}, "num_features must be at least 1, found 0"),
        ({"size": 0}, "size must be at least 1, found 0"),
        ({"subsample_size": 0}, "subsample_size must be at least 1, found 0"),
        ({"encoder": nn.Conv1d(1, 1, 1)}, "num_features must be given: found no linear layer"),
    ],
)
@pytest.mark.parametrize("make", [Gaussian, Flow, Implicit])
def test_bad_arguments(make, kwargs, message):
    arguments = {"encoder": MLP(X_DIM, 5), "latent_dim": D, **kwargs}
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (Gaussian, {"covariance": "low-rank"}, "covariance must be .* found 'low-rank'"),
        (Gaussian, {"covariance": "block"}, "found block_size=None and covariance='block'"),
        (Gaussian, {"block_size": 2}, "found block_size=2 and covariance='diagonal'"),
        (Gaussian, {"covariance": "block", "block_size": 3}, "found 3, expected a divisor of 4"),
        (Gaussian, {"covariance": "block", "block_size": 0}, "found 0, expected a divisor of 4"),
        (Implicit, {"noise": "output"}, "noise must be .* found 'output'"),
        (Implicit, {"contrast": "posterior"}, "contrast must be .* found 'posterior'"),
        (Implicit, {"noise_dim": 3}, "noise_dim must be .* found 3, expected 4 or more"),
        (Implicit, {"hidden_dims": (8, 3)}, "hidden_dims must be .* found 3, expected 4"),
        (Implicit, {"noise": "basis", "num_basis": 0}, "num_basis must be at least 1"),
        (Implicit, {"noise": "basis", "num_basis": 3, "noise_dim": 1}, "found 3, expected 4"),
        (Implicit, {"num_moment_particles": 5}, "must be even and positive, found 5"),
        (Implicit, {"num_moment_particles": 0}, "must be even and positive, found 0"),
        (Implicit, {"noise": "input", "noise_dim": 6}, "expected more than noise_dim=6"),
    ],
)
def test_bad_family_arguments(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(MLP(X_DIM, 5), D, **kwargs)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_moments_that_are_none_are_named(covariance):
    guide = Gaussian(MLP(X_DIM, 5, (8,)), D, covariance=covariance, site="code")
    with torch.no_grad():
        guide.head.bias[D : D + 2] = -200  # exp(-200) is no float32
    with pytest.raises(ValueError, match=rf"'code'.*found {2 * N} of {D * N} standard deviations"):
        guide.get_posterior(torch.zeros(N, X_DIM))
    with torch.no_grad():
        guide.head.bias[D : D + 2] = 0
        guide.head.bias[0] = math.nan
    with pytest.raises(ValueError, match=rf"'code'.*found {N} of \d+ moments not finite"):
        guide.get_posterior(torch.zeros(N, X_DIM))


def test_an_encoder_of_images_needs_a_discriminator():
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 5))
    with pytest.raises(ValueError, match="discriminator must be given"):
        Implicit(encoder, D)
    guide = Implicit(encoder, D, discriminator=ResidualDiscriminator(D, x_dim=64))
    x = torch.randn(N, 1, 8, 8)
    assert guide(x)["z"].shape == (N, D)
    assert guide.get_posterior(x).log_prob(torch.zeros(N, D)).shape == (N,)


@pytest.mark.parametrize("bad", [torch.tensor(1.0), [1.0], None])
def test_bad_data(guide, bad):
    with pytest.raises(ValueError, match="first argument must be a tensor of rows"):
        guide(bad)


def test_features_that_do_not_fit(x):
    guide = Gaussian(MLP(X_DIM, 5), D, num_features=6).to(x)
    with pytest.raises(ValueError, match=r"shape \(5, 5\), expected \(5, 6\)"):
        guide(x)


def test_noise_that_the_encoder_has_no_room_for(x):
    guide = Implicit(MLP(X_DIM, 5), 1, noise="input", noise_dim=2).to(x)
    with pytest.raises(ValueError, match="found 6 elements of x, expected 4"):
        guide(x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 4}, "size must be at least the rows of x: found 4 and 5"),
        ({"size": 9, "subsample_size": 2}, "found 5 rows, expected size=9"),
        ({"subsample_size": 6}, "subsample_size must be at most the rows of x: found 6 and 5"),
    ],
)
def test_bad_sizes(kwargs, message, x):
    guide = Gaussian(MLP(X_DIM, 5), D, **kwargs).to(x)
    with pytest.raises(ValueError, match=message):
        guide(x)


class Conditional(Implicit):
    """Of x [N, 3] and y [N, 2]."""

    def features(self, x, y):
        return self.encoder(torch.cat([x, y], -1))


class SeesAll(Conditional):
    def condition(self, x, y):
        return torch.cat([x, y], -1)


def test_discriminator_of_a_conditional_guide_sees_what_the_encoder_does():
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"made for 5 elements.*found 3: expected a condition\(\)"):
        Conditional(MLP(5, 4, (8,)), 2).get_posterior(x, y)
    guide = SeesAll(MLP(5, 4, (8,)), 2)
    for network in (guide.discriminator.joint, guide.discriminator.of_x):
        torch.nn.init.normal_(network[-1].weight)
    z = torch.zeros(6, 2)
    ratio, other = (guide.get_posterior(x, cond).ratio.frozen(z) for cond in (y, y + 1))
    assert ratio.shape == (6,)
    assert (ratio != other).all()


def test_no_rows():
    with pytest.raises(ValueError, match="must have rows, found none"):
        Gaussian(MLP(3, 4), 2)(torch.zeros(0, 3))
