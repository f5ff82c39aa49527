"""Any guide × any loss: every cell of the README's table trains on scikit-learn's digits.

Fifty steps, in which the loss must stay finite and fall. Pairs that make no sense say why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_vae.guides as guides
import pyro_vae.losses as losses
from pyro_vae import SVI, fit
from pyro_vae.divergences import MMD, Adversarial, Stein
from pyro_vae.guides import AutoFlow, AutoImplicit, Flow, Gaussian, Implicit
from pyro_vae.guides.amortized import Amortized
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
from pyro_vae.nn import MLP, ResidualDiscriminator, weight_norm_cap

pytestmark = pytest.mark.usefixtures("param_store")

LATENT, FEATURES, NOISE, NUM_STEPS = 4, 32, 12, 50


@cache
def digits() -> Tensor:
    """Pixels in [0, 1] [256, 64]."""
    return torch.tensor(load_digits().data[:256] / 16, dtype=torch.float32)


def model(decoder: nn.Module, x: Tensor) -> None:
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)


def encoder(extra: int = 0) -> nn.Module:
    return MLP(64 + extra, FEATURES, (64,))


GUIDES: dict[str, Callable[[], Amortized]] = {
    "Gaussian diagonal": lambda: Gaussian(encoder(), LATENT),
    "Gaussian block": lambda: Gaussian(encoder(), LATENT, covariance="block", block_size=2),
    "Gaussian full": lambda: Gaussian(encoder(), LATENT, covariance="full"),
    "Gaussian WNI": lambda: Gaussian(weight_norm_cap(encoder(), 2.0), LATENT),
    "Flow": lambda: Flow(encoder(), LATENT, transforms=2, hidden_features=(32,)),
    "Implicit features": lambda: Implicit(encoder(), LATENT, noise_dim=NOISE, hidden_dims=(32,)),
    "Implicit input": lambda: Implicit(encoder(NOISE), LATENT, noise="input", noise_dim=NOISE),
    "Implicit basis": lambda: Implicit(encoder(), LATENT, noise="basis", num_basis=8),
}

LOSSES: dict[str, Callable[[], TermsELBO]] = {
    "AVB_ELBO": lambda: AVB_ELBO(num_particles=2),
    "BetaVAE_ELBO": lambda: BetaVAE_ELBO(
        KLSchedule(n_steps_kl_warmup=20, min_kl_weight=0.9), free_bits=0.1
    ),
    "DVAE_ELBO": lambda: DVAE_ELBO(0.1, mix=0.5),
    "DVAE_ELBO(IWAE_ELBO)": lambda: DVAE_ELBO(0.1, elbo=IWAE_ELBO(4)),
    "GECO_ELBO": lambda: GECO_ELBO(tolerance=0.1, rate=0.01),
    "GRAE_ELBO": lambda: GRAE_ELBO(),
    "GRAE_ELBO columns": lambda: GRAE_ELBO(curvature="columns", num_columns=1),
    "IWAE_ELBO": lambda: IWAE_ELBO(4),
    "IWAE_ELBO DReG": lambda: IWAE_ELBO(4, doubly_reparameterized=True),
    "InfoVAE_ELBO MMD": lambda: InfoVAE_ELBO(0.0, 10.0, MMD()),
    "InfoVAE_ELBO Stein": lambda: InfoVAE_ELBO(0.0, 10.0, Stein()),
    "InfoVAE_ELBO adversarial": lambda: InfoVAE_ELBO(
        0.0, 2.0, Adversarial(ResidualDiscriminator(LATENT, 32, 1))
    ),
    "Taylor_ELBO": lambda: Taylor_ELBO(),
}

#: What needs other arguments where one data point is all there is: D wants several particles,
#: and x has noise in it.
ONE_POSTERIOR: dict[str, Callable[[], TermsELBO]] = {
    "GECO_ELBO": lambda: GECO_ELBO(tolerance=1.0, rate=0.05),
    "InfoVAE_ELBO MMD": lambda: InfoVAE_ELBO(0.0, 2.0, MMD(), **MANY),
    "InfoVAE_ELBO Stein": lambda: InfoVAE_ELBO(0.0, 2.0, Stein(), **MANY),
    "InfoVAE_ELBO adversarial": lambda: InfoVAE_ELBO(
        0.0, 2.0, Adversarial(ResidualDiscriminator(2, 16, 1)), **MANY
    ),
}
MANY: dict[str, Any] = {"num_particles": 16, "vectorize_particles": True}

#: Losses that expand about the guide's mean, and guides that have none.
AT_THE_MEAN = ("GRAE_ELBO", "GRAE_ELBO columns", "Taylor_ELBO")
WITHOUT_MEAN = ("Flow", "Implicit features", "Implicit input", "Implicit basis")


def pairs(quick: Callable[[str, str], bool]) -> list[Any]:
    """Return the whole table; what is not `quick` comes with the slow tests."""
    return [
        pytest.param(guide, loss, marks=[] if quick(guide, loss) else [pytest.mark.slow])
        for guide in GUIDES
        for loss in LOSSES
    ]


def test_the_table_has_every_loss_and_every_amortised_guide() -> None:
    exported = set(losses.__all__) - {"TermsELBO", "KLSchedule"}
    assert {name.split(" ")[0].split("(")[0] for name in LOSSES} == exported
    amortised = {name for name in guides.__all__ if issubclass(getattr(guides, name), Amortized)}
    assert {name.split(" ")[0] for name in GUIDES} == amortised - {"Amortized"}


# A row and a column of the table while working.
@pytest.mark.parametrize(
    ("guide", "loss"), pairs(lambda g, o: g == "Gaussian diagonal" or o == "BetaVAE_ELBO")
)
def test_pair_trains_on_digits(guide: str, loss: str) -> None:
    torch.manual_seed(0)
    q, elbo, decoder = GUIDES[guide](), LOSSES[loss](), MLP(LATENT, 64, (64,))
    adam = partial(torch.optim.Adam, lr=2e-3)

    def train() -> Tensor:
        return fit(
            partial(model, decoder),
            q,
            elbo,
            digits(),
            num_steps=NUM_STEPS,
            optim=adam,
            adversary_optim=adam,
            num_adversary_steps=1,
            progress=False,
        ).losses

    if loss in AT_THE_MEAN and guide in WITHOUT_MEAN:
        with pytest.raises(ValueError, match=r"guide site 'z'.* mean in closed form"):
            train()
        return
    values = train()
    assert values.isfinite().all()
    first, last = values[:10], values[-10:]
    # by many standard errors of the two means, as far as noise from step to step goes
    error = ((first.var() + last.var()) / 10).sqrt()
    assert first.mean() - last.mean() > 3 * error


# While working, a guide of each kind, and losses of one and two players (test_contract has each).
@pytest.mark.usefixtures("operation_by_operation")
@pytest.mark.parametrize(
    ("guide", "loss"),
    pairs(
        lambda g, o: (
            (g == "Gaussian diagonal" and o in ("IWAE_ELBO", "InfoVAE_ELBO adversarial"))
            or (o == "BetaVAE_ELBO" and g not in ("Implicit features", "Implicit basis"))
        )
    ),
)
def test_pair_steps_as_a_program_as_in_plain_pyro(guide: str, loss: str) -> None:
    """The captured steps, run operation by operation, and plain ones from one seed."""
    if loss in AT_THE_MEAN and guide in WITHOUT_MEAN:
        pytest.skip(f"{guide} has no mean in closed form, which {loss} expands about")
    curves = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        q, elbo, decoder = GUIDES[guide](), LOSSES[loss](), MLP(LATENT, 64, (64,))
        adam = partial(torch.optim.Adam, lr=2e-3)
        losses_of = [elbo.adversary] if "Implicit" in guide or elbo.needs_adversary else []
        players = [
            SVI(partial(model, decoder), q, adam, of, compile=compile) for of in (*losses_of, elbo)
        ]
        torch.manual_seed(1)
        curves.append([player.step(digits()) for _ in range(3) for player in players])
        assert all(player._player.reason is None for player in players)
        assert all(bool(player._player.programs) == compile for player in players)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-3)


# --- one posterior: Pyro's automatic guides, and ours --------------------------------------------

X = torch.tensor([1.0, -2.0, 0.5])


def regression(x: Tensor) -> None:
    """z ~ N(0, I), x | z normal around a fixed linear function of z."""
    W = torch.tensor([[1.0, 0.0, 0.5], [0.5, 1.0, -1.0]])
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("observations", len(x)):
        pyro.sample("x", dist.Normal(z @ W, 0.5), obs=x)


AUTO_GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoFlow": AutoFlow,
    "AutoImplicit": AutoImplicit,
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("guide", AUTO_GUIDES)
def test_pair_fits_one_posterior(guide: str, loss: str) -> None:
    torch.manual_seed(0)
    elbo = ONE_POSTERIOR.get(loss, LOSSES[loss])()
    adam = partial(torch.optim.Adam, lr=1e-2)
    train = partial(
        fit,
        regression,
        AUTO_GUIDES[guide](regression, init_scale=0.5),
        elbo,
        X,
        num_steps=150,
        optim=adam,
        adversary_optim=adam,
        progress=False,
    )
    # A Taylor expansion wants a Gaussian site, where automatic guides have deltas.
    if loss == "Taylor_ELBO" or (loss in AT_THE_MEAN and guide in ("AutoFlow", "AutoImplicit")):
        with pytest.raises(ValueError, match="guide site "):
            train()
        return
    values = train().losses
    assert values.isfinite().all()
    if isinstance(elbo, GECO_ELBO):  # its multiplier, and with it the value, may grow
        assert elbo.moving_averages < 0.75  # what it is at z = 0
    else:
        assert values[-30:].mean() < values[:10].mean()
