"""What every loss must do, applied to each one exported.

The reference is a small VAE in plain torch, written beside the one in Pyro: z = μ + σ ε, with ε
from the same seed. Losses run as plain Pyro and as captured programs; see the fixture `run`.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

import pyro_vae.losses as losses
from pyro_vae import NonFiniteError, fit
from pyro_vae.constraints import ReconstructionError
from pyro_vae.divergences import MMD, Adversarial, Stein
from pyro_vae.guides import Gaussian, Implicit
from pyro_vae.losses import (
    AVB_ELBO,
    DVAE_ELBO,
    GECO_ELBO,
    GRAE_ELBO,
    IWAE_ELBO,
    BetaVAE_ELBO,
    InfoVAE_ELBO,
    KLSchedule,
    Taylor_ELBO,
    TermsELBO,
)
from pyro_vae.nn import MLP, ResidualDiscriminator

pytestmark = pytest.mark.usefixtures("param_store")

# N · d is a multiple of 16: torch then draws a batch of particles as it draws them one by one.
N, D, LATENT = 8, 5, 2


class Decoder(nn.Module):
    """The model: z ~ N(0, I), x | z Bernoulli with logits W z + b."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(LATENT, D)

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self.linear)
        size = len(x) if self.size is None else self.size
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            prior = dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.linear(z)).to_event(1), obs=x)


class Pair(NamedTuple):
    model: Decoder
    guide: Gaussian
    x: Tensor


def make_pair(dtype: torch.dtype = torch.float64, seed: int = 0, size: int | None = None) -> Pair:
    torch.manual_seed(seed)
    guide = Gaussian(MLP(D, 6, (6,)), LATENT, size=size)
    x = torch.rand(N, D).round()
    return Pair(Decoder(size).to(dtype), guide.to(dtype), x.to(dtype))


# --- the objectives in plain torch, S = 1 --------------------------------------------------------


class Parts(NamedTuple):
    """What the formulas are made of, at one draw of ε."""

    loc: Tensor
    scale: Tensor
    z: Tensor
    x: Tensor
    logits: Tensor
    weight: Tensor

    @property
    def nll(self) -> Tensor:
        return binary_cross_entropy_with_logits(self.logits, self.x, reduction="none").sum(-1)

    @property
    def kl_by_dim(self) -> Tensor:
        return (self.loc**2 + self.scale**2 - 1) / 2 - self.scale.log()

    @property
    def kl(self) -> Tensor:
        return self.kl_by_dim.sum(-1)


def parts(pair: Pair, noise: float = 0.0) -> Parts:
    x = pair.x
    if noise:
        x = x + noise * torch.randn_like(x)
    moments = pair.guide.head(pair.guide.encoder(x))
    loc, scale = moments[:, :LATENT], moments[:, LATENT:].exp()
    z = loc + scale * torch.randn(N, LATENT, dtype=x.dtype)
    return Parts(loc, scale, z, pair.x, pair.model.linear(z), pair.model.linear.weight)


def prior_draws(like: Tensor) -> Tensor:
    return torch.randn(N, LATENT, dtype=like.dtype)


def mmd(z: Tensor, y: Tensor) -> Tensor:
    """Unbiased, RBF with ℓ² = d, by a double loop."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (-((a - b) ** 2).sum() / (2 * LATENT)).exp()

    n = len(z)
    within = sum(k(a[i], a[j]) for a in (z, y) for i in range(n) for j in range(n) if i != j)
    between = sum(k(a, b) for a in z for b in y)
    return within / (n * (n - 1)) - 2 * between / n**2


def elbo(p: Parts) -> Tensor:
    return (p.nll + p.kl).sum()


def free_bits(p: Parts) -> Tensor:
    return p.nll.sum() + N * 0.3 * p.kl_by_dim.mean(0).clamp(min=0.25).sum()


def infovae(p: Parts) -> Tensor:
    alpha, lambda_ = -0.5, 4.0
    divergence = mmd(p.z, prior_draws(p.z))
    return (p.nll + (1 - alpha) * p.kl + (alpha + lambda_ - 1) * divergence).sum()


def stein(p: Parts) -> Tensor:
    z, y = p.z, prior_draws(p.z)
    zd = z.detach()
    difference = zd[:, None] - zd[None]  # [j, i]
    k = (-(difference**2).sum(-1) / (2 * LATENT)).exp()
    phi = (k[..., None] * (-zd[:, None] - difference / LATENT)).mean(0)
    surrogate = -(z * phi).sum() / N
    value = mmd(zd, y)
    return (p.nll + p.kl).sum() + N * 2 * (value + surrogate - surrogate.detach())


def adversarial(network: nn.Module) -> Callable[[Parts], Tensor]:
    def formula(p: Parts) -> Tensor:
        prior_draws(p.z)
        t = network(p.z)
        return p.nll.sum() + N * ((-logsigmoid(-t)).mean() - math.log(2))

    return formula


def geco(p: Parts) -> Tensor:
    error = (p.x - p.logits.sigmoid()).square().mean(-1) - 0.3**2
    return (p.kl + error).sum()  # λ = 1 and C̄ = Ĉ at first


def iwae(p: Parts) -> Tensor:
    log_q = dist.Normal(p.loc, p.scale).log_prob(p.z).sum(-1)
    log_p = dist.Normal(torch.zeros_like(p.z), 1.0).log_prob(p.z).sum(-1)
    return (p.nll - log_p + log_q).sum()  # one particle; more in test_iwae.py


def curvature(p: Parts) -> Tensor:
    """J^T W J of the Bernoulli likelihood, at the logits given."""
    s = p.logits.sigmoid()
    return torch.einsum("di,nd,dj->nij", p.weight, s * (1 - s), p.weight)


def at_mean(pair: Pair) -> Parts:
    moments = pair.guide.head(pair.guide.encoder(pair.x))
    loc, scale = moments[:, :LATENT], moments[:, LATENT:].exp()
    return Parts(loc, scale, loc, pair.x, pair.model.linear(loc), pair.model.linear.weight)


def grae(p: Parts) -> Tensor:
    beta = 0.5
    inverse = torch.eye(LATENT, dtype=p.z.dtype) + curvature(p) / beta
    return (p.nll + beta / 2 * (p.loc**2).sum(-1) + beta / 2 * inverse.logdet()).sum()


def taylor(p: Parts) -> Tensor:
    trace = (curvature(p).diagonal(dim1=-2, dim2=-1) * p.scale**2).sum(-1)
    return (p.nll + trace / 2 + 0.5 * p.kl).sum()


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(99)
        net = ResidualDiscriminator(LATENT, 4, 1)
        nn.init.normal_(net.output.weight)
    return net.to(dtype)


class Case(NamedTuple):
    """A loss, and its formula as a function of a pair, in plain torch."""

    make: Callable[..., TermsELBO]
    formula: Callable[[Pair], Tensor]


def case(make: Callable[..., TermsELBO], formula: Callable[[Parts], Tensor], noise: float = 0.0):
    return Case(make, lambda pair: formula(parts(pair, noise)))


CASES: dict[str, Case] = {
    "AVB_ELBO": case(lambda **k: AVB_ELBO(**{"num_particles": 1, **k}), elbo),
    "BetaVAE_ELBO": case(BetaVAE_ELBO, elbo),
    "BetaVAE_ELBO, β": case(lambda **k: BetaVAE_ELBO(2.0, **k), lambda p: (p.nll + 2 * p.kl).sum()),
    "BetaVAE_ELBO, free bits": case(lambda **k: BetaVAE_ELBO(0.3, free_bits=0.25, **k), free_bits),
    "BetaVAE_ELBO, schedule": case(
        lambda **k: BetaVAE_ELBO(
            KLSchedule(n_steps_kl_warmup=5, min_kl_weight=0.5, max_kl_weight=2.0), **k
        ),
        lambda p: (p.nll + 0.5 * p.kl).sum(),
    ),
    "DVAE_ELBO": case(lambda **k: DVAE_ELBO(0.3, **k), elbo, noise=0.3),
    "GECO_ELBO": case(lambda **k: GECO_ELBO(tolerance=0.3, **k), geco),
    "GRAE_ELBO": Case(lambda **k: GRAE_ELBO(beta=0.5, **k), lambda pair: grae(at_mean(pair))),
    "GRAE_ELBO, Gauss-Newton": Case(
        lambda **k: GRAE_ELBO(beta=0.5, curvature="gauss-newton", **k),
        lambda pair: grae(at_mean(pair)),
    ),
    "IWAE_ELBO": case(lambda **k: IWAE_ELBO(**{"num_particles": 1, **k}), iwae),
    "InfoVAE_ELBO": case(lambda **k: InfoVAE_ELBO(-0.5, 4.0, MMD(), **k), infovae),
    "InfoVAE_ELBO, Stein": case(lambda **k: InfoVAE_ELBO(0.0, 3.0, Stein(), **k), stein),
    "InfoVAE_ELBO, adversarial": case(
        lambda dtype=torch.float64, **k: InfoVAE_ELBO(1.0, 1.0, Adversarial(network(dtype)), **k),
        adversarial(network()),
    ),
    "Taylor_ELBO": Case(lambda **k: Taylor_ELBO(beta=0.5, **k), lambda pair: taylor(at_mean(pair))),
}
NAMES = list(CASES)
#: Those that never draw z.
DETERMINISTIC = ("GRAE_ELBO", "GRAE_ELBO, Gauss-Newton", "Taylor_ELBO")


def make(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> TermsELBO:
    if name == "InfoVAE_ELBO, adversarial":
        kwargs["dtype"] = dtype
    return CASES[name].make(**kwargs)


def test_every_loss_exported_is_under_the_contract() -> None:
    exported = set(losses.__all__) - {"TermsELBO", "KLSchedule"}
    assert {name.split(",")[0] for name in NAMES} == exported


def parameters(pair: Pair) -> dict[str, nn.Parameter]:
    return dict(nn.ModuleDict({"model": pair.model, "guide": pair.guide}).named_parameters())


def gradients(pair: Pair, loss: Tensor) -> dict[str, Tensor]:
    named = parameters(pair)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zeros = (torch.zeros_like(p) for p in named.values())
    return {name: z if g is None else g for name, g, z in zip(named, grads, zeros, strict=True)}


#: A compiler takes some ten seconds a program: each loss once, with its plainest arguments.
FORMULAS = [
    *((name, "plain") for name in NAMES),
    *((name, "captured") for name in NAMES),
    *(
        pytest.param(name, "compiled", marks=[pytest.mark.compiled, pytest.mark.slow])
        for name in NAMES
        if "," not in name
    ),
]


@pytest.mark.parametrize(("name", "run"), FORMULAS, indirect=["run"])
def test_value_and_gradients_are_those_of_the_formula(name: str, run: Any) -> None:
    pair = make_pair()
    module = run.module(make(name), pair.model, pair.guide)
    run.start_elsewhere(module, 1 - pair.x)
    torch.manual_seed(1)
    loss = module(pair.x)
    torch.manual_seed(1)
    expected = CASES[name].formula(pair)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, wanted = gradients(pair, loss), gradients(pair, expected)
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_that_they_should(name: str, run: Any) -> None:
    pair = make_pair()
    found = gradients(pair, run.module(make(name), pair.model, pair.guide)(pair.x))
    dead = {key for key, grad in found.items() if not grad.abs().sum() > 0}
    assert dead == set()
    scale = found["guide.head.bias"][LATENT:]
    # GRAE asks the guide for its mean alone
    assert bool((scale == 0).all()) == name.startswith("GRAE")


@pytest.mark.parametrize("name", NAMES)
def test_svi_takes_the_step_of_the_module(name: str, run: Any) -> None:
    by_svi, by_torch = make_pair(), make_pair()
    elbo, module = make(name), make(name)(by_torch.model, by_torch.guide)
    svi = run.SVI(by_svi.model, by_svi.guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
    values = []
    for step in range(3):
        torch.manual_seed(step)
        values.append(svi.step(by_svi.x))
    pyro.clear_param_store()  # or both decoders would be the first
    optim = torch.optim.SGD([*by_torch.model.parameters(), *by_torch.guide.parameters()], lr=1e-3)
    for step, value in enumerate(values):
        torch.manual_seed(step)
        optim.zero_grad()
        loss = module(by_torch.x)
        loss.backward()
        optim.step()
        assert value == pytest.approx(loss.item(), rel=1e-12)
    for key, parameter in parameters(by_torch).items():
        torch.testing.assert_close(parameters(by_svi)[key], parameter, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_subsampled_plate_scales_the_whole(name: str, run: Any) -> None:
    values = []
    for size in (N, 10 * N):
        pair = make_pair(size=size)
        module = run.module(make(name), pair.model, pair.guide)
        torch.manual_seed(1)
        values.append(module(pair.x).item())
        pyro.clear_param_store()
    assert values[1] == pytest.approx(10 * values[0], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vectorized", [False, True])
def test_precision(name: str, vectorized: bool, run: Any) -> None:
    values = []
    for dtype in (torch.float32, torch.float64):
        pair = make_pair(dtype)
        kwargs = {"vectorize_particles": vectorized, "num_particles": 1}
        torch.manual_seed(1)
        noise = name not in DETERMINISTIC
        loss = run.module(make(name, dtype, **kwargs), pair.model, pair.guide)(pair.x)
        pyro.clear_param_store()
        assert loss.dtype == dtype
        values.append(loss.item())
        assert math.isfinite(loss.item())
        # other numbers are drawn in the other precision
        if not noise:
            assert values[0] == pytest.approx(values[-1], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_particles_in_a_plate_or_one_by_one(name: str, run: Any) -> None:
    pair = make_pair()
    values, grads = [], []
    for vectorized in (False, True):
        elbo = make(name, num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
        torch.manual_seed(1)
        loss = run.module(elbo, pair.model, pair.guide)(pair.x)
        values.append(loss.item())
        grads.append(gradients(pair, loss))
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_same_seed_same_value(name: str, run: Any) -> None:
    pair, values = make_pair(), []
    module = run.module(make(name), pair.model, pair.guide)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(module(pair.x).item())
    assert values[0] == values[1]
    assert (values[0] == values[2]) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_as_good(name: str, copied: Callable) -> None:
    pair, elbo = make_pair(), make(name)
    elbo.differentiable_loss(pair.model, pair.guide, pair.x)  # has a state now
    values = []
    for loss in (elbo, copied(elbo)):
        torch.manual_seed(1)
        values.append(loss.loss(pair.model, pair.guide, pair.x))
    assert values[0] == values[1]


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_state_dict_bit_for_bit(name: str, run: Any) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
        pair = make_pair()
        module = run.module(make(name), pair.model, pair.guide)
        pyro.clear_param_store()
        return module, torch.optim.Adam(module.parameters(), lr=1e-2), pair.x

    def steps(module: nn.Module, optim: torch.optim.Optimizer, x: Tensor) -> list[float]:
        values = []
        for _ in range(3):
            optim.zero_grad()
            loss = module(x)
            loss.backward()
            optim.step()
            values.append(loss.item())
        return values

    module, optim, x = start()
    steps(module, optim, x)
    saved = copy.deepcopy((module.state_dict(), optim.state_dict()))
    rng = torch.get_rng_state()
    wanted = steps(module, optim, x)
    resumed, optim, x = start()
    resumed.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])
    torch.set_rng_state(rng)
    assert steps(resumed, optim, x) == wanted


STATEFUL = [name for name in NAMES if name.startswith(("GECO", "BetaVAE_ELBO, schedule"))]


@pytest.mark.parametrize("name", STATEFUL)
def test_state_advances_in_training_alone(name: str, run: Any) -> None:
    pair, elbo = make_pair(), make(name)
    svi = run.SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    before = copy.deepcopy(elbo.state_dict())
    svi.evaluate_loss(pair.x)
    elbo.loss(pair.model, pair.guide, pair.x)
    with torch.no_grad():
        elbo.differentiable_loss(pair.model, pair.guide, pair.x)
    module = run.module(elbo, pair.model, pair.guide)
    with torch.no_grad():
        module(pair.x)
    module.eval()(pair.x)
    assert str(elbo.state_dict()) == str(before)
    module.train()(pair.x)
    once = copy.deepcopy(elbo.state_dict())
    assert str(once) != str(before)
    svi.step(pair.x)
    assert str(elbo.state_dict()) != str(once)


@pytest.mark.parametrize("name", NAMES)
def test_plain_functions_will_do(name: str, run: Any) -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", lambda: torch.ones(LATENT, D, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        w = pyro.param("v", lambda: torch.ones(D, LATENT, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ w / D, 0.5).to_event(1))

    x = make_pair().x
    svi = run.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), make(name))
    svi.step(x)
    before = pyro.param("w").clone(), pyro.param("v").clone()
    assert math.isfinite(svi.step(x))
    for key, value in zip(("w", "v"), before, strict=True):
        assert (pyro.param(key) != value).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_changes_nothing(name: str, run: Any) -> None:
    pair = make_pair()
    svi = run.SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 1e-3}), make(name))
    svi.step(pair.x)
    before = copy.deepcopy(parameters(pair))
    with torch.no_grad():
        pair.guide.head.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"guide site 'z'|z must be finite"):
        svi.step(pair.x)
    del before["guide.head.bias"]
    for key, value in before.items():
        assert (parameters(pair)[key] == value).all()


# --- the second player ---------------------------------------------------------------------------


def implicit(dtype: torch.dtype = torch.float64) -> Implicit:
    torch.manual_seed(3)
    return Implicit(MLP(D, 6, (6,)), LATENT).to(dtype)


GUIDE_DENSITY = [name for name in NAMES if name not in DETERMINISTIC]


@pytest.mark.parametrize("name", GUIDE_DENSITY)
def test_adversary_trains_discriminators_alone(name: str) -> None:
    pair, guide, elbo = make_pair(), implicit(), make(name)
    of_guide = {p for n, p in guide.named_parameters() if "discriminator" not in n}
    discriminators = set(guide.parameters()) - of_guide | set(elbo.parameters())
    with poutine.trace(param_only=True) as capture:
        loss = elbo.adversary(pair.model, guide, pair.x)
    seen = {site["value"].unconstrained() for site in capture.trace.nodes.values()}
    assert seen == discriminators
    loss.backward()
    grads = {p: p.grad for p in (*guide.parameters(), *pair.model.parameters())}
    assert all(grad is None for p, grad in grads.items() if p not in discriminators)
    assert all(p.grad is not None for p in discriminators)


@pytest.mark.parametrize("name", GUIDE_DENSITY)
def test_loss_never_trains_a_discriminator(name: str) -> None:
    pair, guide, elbo = make_pair(), implicit(), make(name)
    of_guide = {p for n, p in guide.named_parameters() if "discriminator" not in n}
    with poutine.trace(param_only=True) as capture:
        elbo.loss_and_grads(pair.model, guide, pair.x)
    seen = {site["value"].unconstrained() for site in capture.trace.nodes.values()}
    assert seen == of_guide | set(pair.model.parameters())
    assert all(p.grad is not None for p in seen)
    discriminators = set(guide.parameters()) - of_guide | set(elbo.parameters())
    assert all(p.grad is None for p in discriminators)


@pytest.mark.parametrize("name", GUIDE_DENSITY)
def test_fit_drives_both_players(name: str, run: Any) -> None:
    pair, guide, elbo = make_pair(), implicit(), make(name)
    before = copy.deepcopy((guide.state_dict(), elbo.state_dict()))
    fit(
        pair.model, guide, elbo, pair.x, num_steps=4, num_adversary_steps=1, progress=False,
        compile=run.compile,
    )  # fmt: skip
    for old, module in zip(before, (guide, elbo), strict=True):
        for key, value in module.named_parameters():
            assert (value != old[key]).any(), key


def test_no_adversary_where_there_is_nothing_to_learn() -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match=r"no guide site with a learned density.*\['z'\]"):
        BetaVAE_ELBO().adversary(pair.model, pair.guide, pair.x)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_losses_at_the_mean_say_why_an_implicit_guide_will_not_do(name: str) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match="'z'"):
        make(name)(pair.model, implicit())(pair.x)


def test_beta_of_zero_leaves_the_kl_out() -> None:
    """Without it a guide's scale falls to nothing, its KL is infinite, and 0 · ∞ is NaN."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.5, torch.tensor(0.0), validate_args=False))

    expected = -dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0))
    assert torch.allclose(BetaVAE_ELBO(0.0).differentiable_loss(model, guide), expected)


def test_density_of_an_implicit_guide_is_not_asked_for_at_alpha_one() -> None:
    """The MMD-VAE needs samples of q(z|x) alone."""
    pair, guide = make_pair(), implicit()
    with torch.no_grad():
        for parameter in guide.discriminator.parameters():
            parameter.fill_(float("nan"))
    assert math.isfinite(InfoVAE_ELBO(1.0, 10.0).loss(pair.model, guide, pair.x))
    assert math.isnan(InfoVAE_ELBO(0.5, 10.0).loss(pair.model, guide, pair.x))


# --- GECO's other observations -------------------------------------------------------------------


def test_geco_keeps_the_other_observations_and_factors() -> None:
    pair = make_pair()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            fn = dist.Bernoulli(logits=pair.model.linear(z)).to_event(1)
            pyro.sample("x", fn, obs=x)
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=x.sum(-1))
            pyro.factor("f", -0.5 * x.sum(-1))

    torch.manual_seed(1)
    found = GECO_ELBO(tolerance=0.3, site="x").loss(model, pair.guide, pair.x)
    torch.manual_seed(1)
    p = parts(pair)
    others = dist.Normal(p.z.sum(-1), 1.0).log_prob(p.x.sum(-1)) - 0.5 * p.x.sum(-1)
    assert found == pytest.approx((geco(p) - others.sum()).item(), rel=1e-12)


def test_geco_constrains_what_no_mask_hides() -> None:
    pair = make_pair()
    mask = torch.arange(N) < 5
    x = torch.where(mask.unsqueeze(-1), pair.x, 1e9)  # would show

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            fn = dist.Normal(pair.model.linear(z).sigmoid(), 1.0).to_event(1)
            with poutine.mask(mask=mask):
                pyro.sample("x", fn, obs=x)

    def guide(x: Tensor) -> None:
        pair.guide(pair.x)

    elbo = GECO_ELBO(tolerance=0.3)
    torch.manual_seed(1)
    found = elbo.differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    p = parts(pair)
    error = (p.x - p.logits.sigmoid()).square().mean(-1) - 0.3**2
    assert found.item() == pytest.approx((p.kl.sum() + error[mask].sum()).item(), rel=1e-12)
    assert elbo.moving_averages.item() == pytest.approx(error[mask].mean().item(), rel=1e-12)


def test_geco_forgets_a_step_that_is_not_finite() -> None:
    pair, elbo = make_pair(), GECO_ELBO(tolerance=0.1)
    elbo.differentiable_loss(pair.model, pair.guide, pair.x)
    before = copy.deepcopy(elbo.state_dict())
    with torch.no_grad():
        pair.guide.head.bias[0] = float("nan")
    with pyro.validation_enabled(False):
        elbo.differentiable_loss(pair.model, pair.guide, pair.x)
    assert str(elbo.state_dict()) == str(before)


# --- bad input -----------------------------------------------------------------------------------


def constant(shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, x_hat: x.new_zeros(shape)


@pytest.mark.parametrize(
    ("make_loss", "message"),
    [
        (lambda: InfoVAE_ELBO(alpha=1.1), "alpha must be at most 1, found 1.1"),
        (lambda: InfoVAE_ELBO(lambda_=0.0), "lambda_ must be positive, found 0.0"),
        (lambda: InfoVAE_ELBO(-1.0, 1.0), "alpha .* must not be negative, found -1.0"),
        (lambda: BetaVAE_ELBO(-1.0), "beta must not be negative, found -1.0"),
        (lambda: BetaVAE_ELBO(free_bits=-1.0), "free_bits must not be negative"),
        (lambda: KLSchedule(0), "warm-up must be at least 1 long, found 0"),
        (lambda: KLSchedule(2, 2), "found both"),
        (lambda: KLSchedule(10, cycle=5), "cycle must be no shorter than the warm-up 10, found 5"),
        (lambda: KLSchedule(cycle=5), "cycle must be no shorter"),
        (lambda: GECO_ELBO(), "expected a constraint or a tolerance, found neither"),
        (lambda: GECO_ELBO(constraint={}), "at least one constraint, found none"),
        (lambda: GECO_ELBO(tolerance=-0.1), "-0.1"),
        (lambda: GECO_ELBO(tolerance=0.1, decay=1.0), r"decay must be in \[0, 1\), found 1.0"),
        (
            lambda: GECO_ELBO(ReconstructionError(0.1), 0.2),
            "constraint 'constraint' has a tolerance of 0.1, found another: 0.2",
        ),
        (lambda: GECO_ELBO(tolerance=0.1, rate=0.0), "rate must be positive, found 0.0"),
        (lambda: GECO_ELBO(tolerance=0.1, bounds=(2.0, 3.0)), "bounds must be positive and hold 1"),
        (lambda: DVAE_ELBO(-0.1), "noise_scale must not be negative, found -0.1"),
        (lambda: DVAE_ELBO(0.1, mix=1.5), r"mix must be in \[0, 1\), found 1.5"),
        (lambda: DVAE_ELBO(0.1, elbo=pyro.infer.Trace_ELBO()), "found Trace_ELBO"),
        (lambda: DVAE_ELBO(0.1, elbo=IWAE_ELBO(), num_particles=2), r"\['num_particles'\]"),
        (lambda: IWAE_ELBO(0), "num_particles must be at least 1, found 0"),
        (lambda: AVB_ELBO(objective="hinge"), "objective must be one of .* found 'hinge'"),
        (lambda: GRAE_ELBO(beta=0.0), "beta"),
        (lambda: GRAE_ELBO(curvature="none"), "curvature"),
        (lambda: Taylor_ELBO(beta=-1.0), "beta"),
    ],
)
def test_bad_arguments(make_loss: Callable[[], TermsELBO], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss()


@pytest.mark.parametrize(
    ("elbo", "message"),
    [
        (GECO_ELBO(constant((3,))), rf"constraint 'constraint' .* found the shape \[3\].*\[{N}\]"),
        (GECO_ELBO({"a": ReconstructionError(0.1), "b": constant(())}), "constraint 'b'"),
        (GECO_ELBO(tolerance=0.1, site="y"), r"expected 'y', found \['x'\]"),
        (
            DVAE_ELBO(0.1, inputs=["y"]),
            r"no argument 'y' among those passed .* expected some of \['x'\]",
        ),
    ],
)
def test_bad_use(elbo: TermsELBO, message: str) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match=message):
        elbo(pair.model, pair.guide)(pair.x)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("InfoVAE_ELBO")][:2])
def test_a_divergence_needs_two(name: str) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match="2"):
        make(name)(pair.model, pair.guide)(pair.x[:1])


def test_stein_needs_a_score_for_a_prior_that_is_not_standard_normal() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_ones(LATENT), 2.0).to_event(1))

    pair = make_pair()
    with pytest.raises(ValueError, match="site 'z', found Normal with loc 1 and scale 2"):
        InfoVAE_ELBO(0.0, 2.0, Stein())(model, pair.guide)(pair.x)
    score = Stein(score=lambda z: (1 - z) / 4)
    assert InfoVAE_ELBO(0.0, 2.0, score)(model, pair.guide)(pair.x).isfinite()


def test_noise_reaches_named_inputs_of_the_guide_alone() -> None:
    seen: dict[str, list[Tensor]] = {"model": [], "guide": []}

    def model(x: Tensor, y: Tensor) -> None:
        seen["model"] += [x, y]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))

    def guide(x: Tensor, y: Tensor) -> None:
        seen["guide"] += [x, y]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :LATENT], 1.0).to_event(1))

    x, y = torch.randn(N, D), torch.randn(N, 3)
    DVAE_ELBO(0.1, inputs=["y"]).loss(model, guide, x, y=y)
    assert seen["model"][0] is x
    assert seen["model"][1] is y
    assert seen["guide"][0] is x
    noise = seen["guide"][1] - y
    # 24 draws: the standard error of their sd is 0.1/√48
    assert noise.std().item() == pytest.approx(0.1, abs=4 * 0.1 / 48**0.5)
    with pytest.raises(ValueError, match=r"argument 'y' must be a tensor of floating point.*int64"):
        DVAE_ELBO(0.1, inputs=["y"]).loss(model, guide, x, y=y.long())


def test_softplus_is_the_logistic_loss_of_the_adversary() -> None:
    """The adversary of the divergence minimises −E_q log σ(T) − E_p log(1 − σ(T))."""
    pair = make_pair()
    elbo = make("InfoVAE_ELBO, adversarial")
    torch.manual_seed(1)
    found = elbo.adversary(pair.model, pair.guide, pair.x)
    torch.manual_seed(1)
    parts(pair)  # the guide's own samples are looked at first
    p = parts(pair)
    draws = prior_draws(p.z)
    net = network()
    expected = softplus(-net(p.z)).mean() + softplus(net(draws)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_nonfinite_is_an_arithmetic_and_a_value_error() -> None:
    assert issubclass(NonFiniteError, ValueError)
    assert issubclass(NonFiniteError, ArithmeticError)
