"""The contract of the VAE model, for every observation and kind of decoder."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn

import pyro_vae
from pyro_vae import SVI, fit
from pyro_vae.divergences import MMD
from pyro_vae.guides import Flow, Implicit
from pyro_vae.guides import Gaussian as GaussianGuide
from pyro_vae.losses import (
    AVB_ELBO,
    DVAE_ELBO,
    GECO_ELBO,
    GRAE_ELBO,
    IWAE_ELBO,
    BetaVAE_ELBO,
    InfoVAE_ELBO,
    Taylor_ELBO,
    TermsELBO,
)
from pyro_vae.models import (
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Observation,
)
from pyro_vae.nn import MLP, ConvDecoder, MLPDecoder, MLPEncoder, ResidualDiscriminator
from pyro_vae.pixelcnn import PixelCNN

N, D, SIZE = 5, 3, 40
IMAGE = (2, 4, 4)


def vector(observation: Observation) -> VAE:
    return VAE(MLP(D, 6 * observation.num_params, (8,)), observation, D, (6,))


def image(observation: Observation) -> VAE:
    channels, *rest = IMAGE
    shape = (channels * observation.num_params, *rest)
    return VAE(MLPDecoder(D, shape, (8,)), observation, D, IMAGE)


def convolutional(observation: Observation) -> VAE:
    channels, *rest = IMAGE
    decoder = ConvDecoder(D, (channels * observation.num_params, *rest), (8, 4), batch_norm=False)
    return VAE(decoder, observation, D, IMAGE)


def autoregressive(observation: Observation) -> VAE:
    decoder = PixelCNN(D, IMAGE, observation.num_params, hidden_dim=4, num_layers=2, kernel_size=3)
    return VAE(decoder, observation, D, IMAGE)


MODELS: dict[str, Callable[[], VAE]] = {
    "vector Bernoulli": lambda: vector(Bernoulli()),
    "vector Gaussian": lambda: vector(Gaussian(0.3)),
    "image Gaussian learned": lambda: image(Gaussian("learned")),
    "image Gaussian pixel": lambda: image(Gaussian("pixel")),
    "image ContinuousBernoulli": lambda: image(ContinuousBernoulli()),
    "convolutional DiscretizedLogistic": lambda: convolutional(DiscretizedLogistic(16)),
    "autoregressive Bernoulli": lambda: autoregressive(Bernoulli()),
    "autoregressive DiscretizedLogistic": lambda: autoregressive(DiscretizedLogistic(16)),
}


@pytest.fixture(params=MODELS)
def model(request, dtype, device):
    return MODELS[request.param]().to(device, dtype)


@pytest.fixture
def x(model):
    return data(model)


def data(model: VAE, num: int = N) -> Tensor:
    """Take draws of a model as data."""
    return model.sample(num)


def encoder(model: VAE) -> nn.Module:
    return MLPEncoder(model.event_shape, 8, (16,)).to(model.prior().mean)


def gaussian(model: VAE, **kwargs) -> GaussianGuide:
    return GaussianGuide(encoder(model), model.latent_dim, **kwargs).to(model.prior().mean)


# --- values ---------------------------------------------------------------------------------------


def test_trace_is_the_formula(model, x):
    """N(0, I) and the observation, scaled to the size of the data set."""
    model.size = SIZE
    trace = poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (N, D)
    assert torch.equal(trace.nodes["_RETURN"]["value"], x)
    prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    params = model.decoder(z, x) if model.autoregressive else model.decoder(z)
    likelihood = model.observation.dist(params, len(model.event_shape)).log_prob(x)
    expected = (prior + likelihood).sum() * SIZE / N
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    (frame,) = trace.nodes["x"]["cond_indep_stack"]
    assert (frame.name, frame.dim, frame.size, frame.full_size) == ("data", -1, N, SIZE)


def test_names_are_ours_to_choose():
    model = VAE(MLP(D, 6), Gaussian(), D, (6,), site="code", observed="y", plate="rows")
    trace = poutine.trace(model).get_trace(torch.zeros(N, 6))
    assert {"code", "y", "rows"} <= set(trace.nodes)
    assert "site='code', observed='y', plate='rows'" in repr(model)


def test_shapes_and_type(model, x, dtype):
    assert (model.prior().batch_shape, model.prior().event_shape) == ((), (D,))
    assert model.prior().sample().dtype == dtype
    z = model.prior().sample((3, N))
    p = model.likelihood(z, x)
    assert (p.batch_shape, p.event_shape) == ((3, N), model.event_shape)
    assert p.log_prob(x).dtype == dtype
    found = model.reconstruct(z)
    assert found.shape == (3, N, *model.event_shape)
    assert model.sample(7).shape == (7, *model.event_shape)
    assert model.sample(7).dtype == dtype
    assert not model.sample(7).requires_grad
    if not model.autoregressive:
        torch.testing.assert_close(found, p.mean)
        assert found.requires_grad


def test_draws_are_from_the_model(model):
    """At one z: the mean is that of the observation, within standard errors."""
    if model.autoregressive:
        pytest.skip("its means are no closed form; frequencies are counted in test_pixelcnn")
    num = 8000
    z = model.prior().sample()
    draws = model.sample(num, z=z.expand(num, D)).detach()
    error = draws.std(0) / math.sqrt(num)
    assert ((draws.mean(0) - model.reconstruct(z)).abs() < 4.5 * error).all()


def test_draws_use_the_prior():
    decoder = nn.Linear(D, D, bias=False)
    nn.init.eye_(decoder.weight)
    model = VAE(decoder, Gaussian(0.5), D, (D,))
    x = model.sample(20_000)
    covariance = torch.cov(x.T)
    # Var z + 0.5² on the diagonal; standard errors of a covariance's entries
    assert (covariance - 1.25 * torch.eye(D)).abs().max() < 4.5 * 1.25 * math.sqrt(2 / 20_000)
    assert (x.mean(0).abs() < 4.5 * math.sqrt(1.25 / 20_000)).all()


def test_linear_model_has_its_exact_evidence(dtype):
    """With the exact posterior every importance weight is log N(x; b, W Wᵀ + s² I)."""
    s = 0.4
    model = VAE(nn.Linear(D, 6), Gaussian(s), D, (6,)).to(dtype)
    W, b = model.decoder.weight.detach(), model.decoder.bias.detach()
    x = model.sample(N)
    eye = torch.eye(6, dtype=dtype)
    evidence = torch.distributions.MultivariateNormal(b, W @ W.T + s**2 * eye).log_prob(x)
    precision = torch.eye(D, dtype=dtype) + W.T @ W / s**2

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.linalg.solve(precision, W.T @ ((x - b) / s**2).T).T
            pyro.sample("z", pyro.distributions.MultivariateNormal(loc, precision_matrix=precision))

    for elbo in (BetaVAE_ELBO(analytic_kl=False), IWAE_ELBO(3)):
        loss = elbo.differentiable_loss(model, guide, x)
        torch.testing.assert_close(loss, -evidence.sum())


def test_particles_in_a_plate_are_particles_one_by_one(model, x):
    z = model.prior().sample((4, N))

    def at(z: Tensor) -> Tensor:
        conditioned = poutine.condition(model, {"z": z})
        trace = poutine.trace(conditioned).get_trace(x)
        trace.compute_log_prob()
        return trace.nodes["x"]["log_prob"] + trace.nodes["z"]["log_prob"]

    with pyro.plate("particles", 4, dim=-2):
        together = at(z)
    torch.testing.assert_close(together, torch.stack([at(one) for one in z]))


def test_vectorised_over_latents_by_vmap(model, x):
    """As HMC's chains are."""
    z = model.prior().sample((4, N))
    found = torch.vmap(lambda z: model.likelihood(z, x).log_prob(x))(z)
    torch.testing.assert_close(found, model.likelihood(z, x).log_prob(x))


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(model, x, parallel):
    found = Predictive(model, guide=gaussian(model), num_samples=6, parallel=parallel)(x)
    assert found["z"].shape == (6, N, D)
    assert found["x"].shape == (6, N, *model.event_shape)


# --- parameters -----------------------------------------------------------------------------------


def test_gradients_reach_every_parameter(model, x):
    for num_particles in (1, 4):
        guide = gaussian(model)
        elbo = BetaVAE_ELBO(num_particles=num_particles, vectorize_particles=True)
        model.zero_grad()
        elbo(model, guide)(x).backward()
        for name, param in (*model.named_parameters(), *guide.named_parameters()):
            assert param.grad is not None, name
            assert param.grad.isfinite().all(), name
            assert param.grad.abs().sum() > 0, name


def test_evaluation_is_training(model, x):
    z = model.prior().sample((N,))
    log_prob = model.likelihood(z, x).log_prob(x)
    assert torch.equal(model.eval().likelihood(z, x).log_prob(x), log_prob)


def test_parameters_are_seen_and_not_stored(model, x):
    guide = gaussian(model)
    with poutine.trace(param_only=True) as capture:
        Trace_ELBO().loss_and_grads(model, guide, x)
    seen = {node["value"].unconstrained() for node in capture.trace.nodes.values()}
    assert seen == {*model.parameters(), *guide.parameters()}
    assert not list(pyro.get_param_store().keys())
    assert set(BetaVAE_ELBO()(model, guide).parameters()) == seen


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_copies(model, x, how, request):
    z = model.prior().sample((N,))
    if how == "state_dict":
        torch.manual_seed(7)
        twin = MODELS[request.node.callspec.params["model"]]().to(x)
        if list(twin.parameters()):
            assert not torch.equal(
                twin.likelihood(z, x).log_prob(x), model.likelihood(z, x).log_prob(x)
            )
        twin.load_state_dict(model.state_dict())
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.likelihood(z, x).log_prob(x), model.likelihood(z, x).log_prob(x))


def test_a_learned_scale_finds_the_noise():
    """Data of scale 0.2 around 0.5, a decoder of constants: s is the sample's own."""
    torch.manual_seed(0)
    x = 0.5 + 0.2 * torch.randn(500, 4)
    model = VAE(MLP(1, 4, ()), Gaussian("learned"), 1, (4,))
    guide = GaussianGuide(MLP(4, 2, ()), 1)
    nn.init.zeros_(model.decoder[-1].weight)
    model.decoder[-1].weight.requires_grad_(False)
    fit(
        model, guide, BetaVAE_ELBO(), x, num_steps=200, progress=False,
        optim=partial(torch.optim.Adam, lr=4e-2),
    )  # fmt: skip
    with torch.no_grad():
        scale = model.likelihood(torch.zeros(1)).base_dist.scale[0].item()
    assert scale == pytest.approx((x - x.mean(0)).square().mean().sqrt().item(), rel=0.02)


# --- under losses and guides ----------------------------------------------------------------------

LOSSES: dict[str, Callable[[], TermsELBO]] = {
    "BetaVAE": lambda: BetaVAE_ELBO(),
    "IWAE": lambda: IWAE_ELBO(3),
    "GECO": lambda: GECO_ELBO(tolerance=0.1, rate=0.01),
    "GRAE": lambda: GRAE_ELBO(),
    "GRAE Hessian": lambda: GRAE_ELBO(beta=50.0, curvature="hessian"),
    "Taylor": lambda: Taylor_ELBO(),
    "DVAE": lambda: DVAE_ELBO(0.1),
    "InfoVAE": lambda: InfoVAE_ELBO(0.0, 10.0, MMD()),
}

#: Each observation, each kind of decoder and each loss; three while working.
QUICK = [
    ("vector Bernoulli", "GECO"),
    ("image ContinuousBernoulli", "IWAE"),
    ("autoregressive DiscretizedLogistic", "BetaVAE"),
]
SLOW = [
    ("vector Bernoulli", "GRAE"),
    ("vector Gaussian", "GRAE Hessian"),
    ("image Gaussian learned", "Taylor"),
    ("image Gaussian pixel", "DVAE"),
    ("image Gaussian pixel", "GRAE"),
    ("image ContinuousBernoulli", "GRAE"),
    ("convolutional DiscretizedLogistic", "GECO"),
    ("autoregressive Bernoulli", "InfoVAE"),
]
PAIRS = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]


def test_every_model_and_loss_is_paired():
    names, losses = zip(*QUICK, *SLOW, strict=True)
    assert set(names) == set(MODELS)
    assert set(losses) == set(LOSSES)


def losses_of(name: str, loss: str, compile: bool) -> list[float]:
    torch.manual_seed(0)
    model = MODELS[name]()
    x, guide = data(model, 16), gaussian(model, size=SIZE)
    model.size = SIZE
    svi = SVI(model, guide, partial(torch.optim.Adam, lr=1e-3), LOSSES[loss](), compile=compile)
    torch.manual_seed(1)
    steps = [svi.step(x) for _ in range(3)]
    assert svi._player.reason is None
    assert bool(svi._player.programs) == compile
    return steps


@pytest.mark.parametrize(("name", "loss"), PAIRS)
def test_captured_steps_are_those_of_plain_pyro(name, loss, monkeypatch):
    """Without a warning: nothing falls back."""
    monkeypatch.setattr("pyro_vae.compiled.compile_graph", lambda graph, inputs: (graph, False))
    plain = losses_of(name, loss, compile=False)
    assert losses_of(name, loss, compile=True) == pytest.approx(plain, rel=1e-3, abs=1e-3)


def test_a_discretised_logistic_wants_the_hessian():
    model = vector(DiscretizedLogistic(16))
    x, guide = data(model), gaussian(model)
    with pytest.raises(ValueError, match=r"found DiscretizedLogisticDistribution.*hessian"):
        GRAE_ELBO().differentiable_loss(model, guide, x)
    elbo = LOSSES["GRAE Hessian"]()
    assert elbo.differentiable_loss(model, guide, x).isfinite()


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_steps_are_those_of_plain_pyro():
    plain = losses_of("image Gaussian pixel", "BetaVAE", compile=False)
    compiled = losses_of("image Gaussian pixel", "BetaVAE", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_batch_statistics_move_in_captured_steps(monkeypatch):
    """Buffers of a decoder with batch normalisation are those of plain steps."""
    monkeypatch.setattr("pyro_vae.compiled.compile_graph", lambda graph, inputs: (graph, False))
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = VAE(ConvDecoder(D, (1, 8, 8), (8, 4)), Bernoulli(), D, (1, 8, 8))
        guide = gaussian(model)
        x = torch.rand(16, 1, 8, 8).round()
        adam = partial(torch.optim.Adam, lr=1e-3)
        svi = SVI(model, guide, adam, BetaVAE_ELBO(), compile=compile)
        torch.manual_seed(1)
        for _ in range(3):
            svi.step(x)
        assert svi._player.reason is None
        found.append(dict(model.named_buffers()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert all(int(v) == 3 for k, v in found[1].items() if k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("kind", ["Flow", pytest.param("Implicit", marks=pytest.mark.slow)])
def test_under_guides_without_a_gaussian(kind):
    torch.manual_seed(0)
    model = image(Bernoulli())
    discriminator = ResidualDiscriminator(D, 16, 1, x_dim=math.prod(IMAGE))
    small = {"noise_dim": 4, "hidden_dims": (16,), "discriminator": discriminator}
    make = {
        "Flow": partial(Flow, transforms=2, hidden_features=(8,)),
        "Implicit": partial(Implicit, **small),
    }[kind]
    guide = make(encoder(model), D, size=SIZE)
    model.size = SIZE
    elbo = AVB_ELBO() if kind == "Implicit" else BetaVAE_ELBO()
    adam = partial(torch.optim.Adam, lr=5e-3)
    x = data(model, 2).repeat(10, 1, 1, 1)
    losses = fit(
        model,
        guide,
        elbo,
        x,
        num_steps=60,
        optim=adam,
        adversary_optim=adam,
        num_adversary_steps=1,
        progress=False,
    ).losses
    assert losses[-10:].mean() < losses[:10].mean()


def test_trains_as_an_elbo_module():
    model = image(Gaussian("pixel"))
    guide, x = gaussian(model), data(model)
    module = pyro_vae.losses.BetaVAE_ELBO()(model, guide)
    optim = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = module(x)
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(N, 4, 4), r"site 'x': expected x of shape \[N, 2, 4, 4\], found \[5, 4, 4\]"),
        (torch.zeros(N, 2, 4, 5), r"shape \[N, 2, 4, 4\], found \[5, 2, 4, 5\]"),
        (torch.zeros(2, 4, 4), r"shape \[N, 2, 4, 4\], found \[2, 4, 4\]"),
        (torch.zeros(0, 2, 4, 4), "site 'x': x must have rows, found none"),
        (torch.full((N, 2, 4, 4), 1.5), r"site 'x': Bernoulli takes numbers in \[0, 1\]"),
        (torch.full((N, 2, 4, 4), math.nan), r"site 'x': .*such as nan"),
        (torch.zeros(N, 2, 4, 4, dtype=torch.uint8), "site 'x': .*found torch.uint8"),
        ([0.0], r"site 'x': expected a tensor \[N, 2, 4, 4\], found list"),
        (torch.zeros(SIZE + 1, 2, 4, 4), "size must be at least the rows of x: found 40 and 41"),
    ],
)
def test_bad_data(x, message):
    model = image(Bernoulli())
    model.size = SIZE
    with pytest.raises(ValueError, match=message):
        model(x)


def test_bad_data_in_a_step_names_the_site():
    model = image(Bernoulli())
    svi = SVI(model, gaussian(model), partial(torch.optim.Adam, lr=1e-3), BetaVAE_ELBO())
    with pytest.raises(ValueError, match="site 'x': Bernoulli takes"):
        svi.step(torch.full((N, *IMAGE), 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, found 0"),
        ({"size": 0}, "size must be at least 1, found 0"),
        ({"event_shape": ()}, r"event_shape must be that of one data point.*found \(\)"),
        ({"event_shape": (3, 0)}, r"event_shape must be .*found \(3, 0\)"),
        ({"observation": nn.Identity()}, "observation must be one of .*found Identity"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "decoder": MLP(D, 6),
        "observation": Gaussian(),
        "latent_dim": D,
        "event_shape": (6,),
    }
    with pytest.raises(ValueError, match=message):
        VAE(**{**arguments, **change})


def test_a_decoder_that_does_not_fit():
    model = VAE(MLP(D, 6), Gaussian("pixel"), D, (6,))
    with pytest.raises(
        ValueError,
        match=r"return 2 numbers .*found shape \[5, 6\] for z \[5, 3\], expected \[5, 12",
    ):
        model(torch.zeros(N, 6))


def test_latents_of_another_shape():
    model = vector(Gaussian())
    with pytest.raises(
        ValueError, match=r"z must have shape \[\*, 3\], latent_dim: found \[5, 2\]"
    ):
        model.likelihood(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"z must have shape \[4, 3\], found \[5, 3\]"):
        model.sample(4, z=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="num must be at least 1, found 0"):
        model.sample(0)


def test_prior_is_of_the_decoders_type() -> None:
    """Only the decoder was brought to double precision: nothing else of the model has a type."""
    model = VAE(nn.Linear(3, 5).double(), Gaussian(0.7), 3, (5,))
    assert model.sample(2).dtype == torch.float64
    assert model.float().sample(2).dtype == torch.float32
