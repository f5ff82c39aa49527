"""The PixelCNN decoder: causal by gradients, sampled as it is scored."""

from __future__ import annotations

import copy
import math
from itertools import product

import pyro
import pytest
import torch
from torch import Tensor

from pyro_vae import SVI
from pyro_vae.guides import Gaussian as GaussianGuide
from pyro_vae.losses import BetaVAE_ELBO, InfoVAE_ELBO
from pyro_vae.models import VAE, Bernoulli, DiscretizedLogistic, Gaussian
from pyro_vae.nn import MLPEncoder
from pyro_vae.pixelcnn import PixelCNN

D = 2


def decoder(
    channels: int = 1,
    height: int = 5,
    width: int = 6,
    num_params: int = 1,
    kernel_size: int = 3,
    num_layers: int = 6,
    spread: float = 1.0,
) -> PixelCNN:
    torch.manual_seed(0)
    net = PixelCNN(
        D,
        (channels, height, width),
        num_params,
        hidden_dim=6 * channels,
        num_layers=num_layers,
        kernel_size=kernel_size,
        condition_dim=2,
    ).double()
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(spread)
    return net


def place(channel: int, row: int, column: int) -> tuple[int, int, int]:
    """An element's place in the order: rows, pixels, channels."""
    return row, column, channel


@pytest.mark.parametrize(("channels", "num_params", "kernel_size"), [(1, 1, 3), (3, 2, 5)])
def test_each_element_sees_those_before_it_and_all_of_them(
    channels: int, num_params: int, kernel_size: int
) -> None:
    """Gradients of each parameter by each element of x: nothing later, no blind spot."""
    net = decoder(channels, 4, 5, num_params, kernel_size, num_layers=5)
    elements = list(product(range(channels), range(4), range(5)))
    seen = torch.zeros(len(elements), len(elements))
    for _ in range(2):  # at one x a gradient may vanish
        z = torch.randn(1, D).double()
        x = torch.rand(1, channels, 4, 5).double().requires_grad_()
        # all parameters of an element: [num_params, C, H, W] → [C, H, W]
        out = net(z, x).reshape(num_params, channels, 4, 5)
        for k in range(num_params):
            for row, (c, i, j) in enumerate(elements):
                (grad,) = torch.autograd.grad(out[k, c, i, j], x, retain_graph=True)
                seen[row] += grad[0].abs().flatten()
    for (row, a), (column, b) in product(enumerate(elements), enumerate(elements)):
        before = place(*b) < place(*a)
        assert bool(seen[row, column] > 0) == before, (a, b)


def test_every_parameter_of_an_element_depends_on_z() -> None:
    net = decoder(num_params=2)
    z = torch.randn(1, D).double().requires_grad_()
    out = net(z, torch.rand(1, 1, 5, 6).double())
    for value in out.flatten():
        (grad,) = torch.autograd.grad(value, z, retain_graph=True)
        assert (grad != 0).all()


def test_receptive_field_is_the_one_documented() -> None:
    """L⌊k/2⌋ to the left, L⌊k/2⌋ + 1 rows up."""
    net = decoder(height=9, width=9, num_layers=2, kernel_size=5)
    x = torch.rand(1, 1, 9, 9).double().requires_grad_()
    (grad,) = torch.autograd.grad(net(torch.zeros(1, D).double(), x)[0, 0, 8, 8], x)
    seen = grad[0, 0] != 0
    assert seen[8].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert seen.any(1).nonzero().flatten().tolist() == list(range(3, 9))


OBSERVATIONS = {
    "Bernoulli": Bernoulli(),
    "DiscretizedLogistic": DiscretizedLogistic(levels=4),
    "Gaussian": Gaussian("pixel"),
}


@pytest.mark.parametrize("observation", OBSERVATIONS.values(), ids=OBSERVATIONS)
@pytest.mark.parametrize("channels", [1, 2])
def test_draws_score_as_they_were_drawn(channels: int, observation: Bernoulli) -> None:
    """The product of the conditionals met on the way is the teacher-forced density."""
    net = decoder(channels, num_params=observation.num_params, kernel_size=5, spread=1.5)
    model = VAE(net, observation, D, net.event_shape).double()
    z = torch.randn(2, 3, D).double()
    draws = []
    for cached in (False, True):
        torch.manual_seed(1)
        x, log_prob = net.draw(z, observation, cached=cached)
        assert x.shape == (2, 3, channels, 5, 6)
        observation.check(x)
        torch.testing.assert_close(log_prob, model.likelihood(z, x).log_prob(x))
        draws.append(x)
    # The same random numbers in the same order: the caches hold what a whole pass computes.
    torch.testing.assert_close(draws[0], draws[1])


def test_density_sums_to_one_and_draws_follow_it() -> None:
    """All 16 binary images of 2×2: probabilities by scoring, frequencies by drawing."""
    net = decoder(height=2, width=2, num_layers=3, spread=3.0)
    model = VAE(net, Bernoulli(), D, (1, 2, 2)).double()
    images = torch.tensor(list(product([0.0, 1.0], repeat=4))).double().reshape(16, 1, 2, 2)
    z = torch.randn(D).double()
    p = model.likelihood(z.expand(16, D), images).log_prob(images).exp()
    torch.testing.assert_close(p.sum(), torch.ones(()).double())
    num = 4000
    x = model.sample(num, z=z.expand(num, D))
    codes = (x.flatten(1) @ torch.tensor([8.0, 4, 2, 1]).double()).long()
    found = torch.bincount(codes, minlength=16) / num
    se = (p * (1 - p) / num).sqrt()
    assert ((found - p).abs() < 4.5 * se).all()


def test_gradients_reach_every_parameter() -> None:
    net = decoder(2, num_params=2)
    net(torch.randn(4, D).double(), torch.rand(4, 2, 5, 6).double()).square().sum().backward()
    for name, param in net.named_parameters():
        assert param.grad is not None
        assert param.grad.abs().sum() > 0, name


def test_training_evaluation_copies_and_state() -> None:
    net, z, x = decoder(), torch.randn(3, D).double(), torch.rand(3, 1, 5, 6).double()
    out = net(z, x)
    assert out.dtype == torch.float64
    assert torch.equal(net.eval()(z, x), out)
    assert torch.equal(copy.deepcopy(net)(z, x), out)
    torch.manual_seed(9)
    other = PixelCNN(D, (1, 5, 6), hidden_dim=6, kernel_size=3, condition_dim=2).double()
    assert not torch.equal(other(z, x), out)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(z, x), out)


def test_batch_shapes_broadcast_row_by_row() -> None:
    net = decoder()
    z, x = torch.randn(4, 3, D).double(), torch.rand(3, 1, 5, 6).double()
    out = net(z, x)
    assert out.shape == (4, 3, 1, 5, 6)
    for s, n in product(range(4), range(3)):
        torch.testing.assert_close(net(z[s, n], x[n]), out[s, n])


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["BetaVAE", "InfoVAE"])
def test_trains_in_captured_steps_with_particles(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of two images: their latents are found useful, or not; the loss falls either way."""
    monkeypatch.setattr("pyro_vae.compiled.compile_graph", lambda graph, inputs: (graph, False))
    model = VAE(decoder(height=4, width=4, num_layers=2).float(), Bernoulli(), D, (1, 4, 4))
    guide = GaussianGuide(MLPEncoder((1, 4, 4), 8, (16,)), D)
    particles = {"num_particles": 2, "vectorize_particles": True}
    elbo = BetaVAE_ELBO(**particles) if loss == "BetaVAE" else InfoVAE_ELBO(0.5, 2.0, **particles)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), elbo)
    x = torch.rand(2, 1, 4, 4).round().repeat(8, 1, 1, 1)
    losses = [svi.step(x) for _ in range(20)]
    assert svi._player.reason is None
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_vae_asks_for_x_and_reconstructs_by_sampling() -> None:
    model = VAE(decoder(height=3, width=3), Bernoulli(), D, (1, 3, 3)).double()
    assert model.autoregressive
    z = torch.randn(4, 2, D).double()
    with pytest.raises(ValueError, match=r"found x=None, expected the data \[\*, 1, 3, 3\]"):
        model.likelihood(z)
    x = model.reconstruct(z)
    assert x.shape == (4, 2, 1, 3, 3)
    assert ((x == 0) | (x == 1)).all()
    assert not torch.equal(model.reconstruct(z), x)
    assert model.sample(5).shape == (5, 1, 3, 3)


def test_fits_a_distribution_that_no_factorised_decoder_has() -> None:
    """Checkerboards of either phase, z ignored: the entropy log 2 is reached, not 9 log 2."""
    torch.manual_seed(0)
    board = (torch.arange(3)[:, None] + torch.arange(3)) % 2
    x = torch.stack([board, 1 - board]).unsqueeze(1).to(torch.float32)
    net = PixelCNN(D, (1, 3, 3), hidden_dim=8, num_layers=2, kernel_size=3)
    optim = torch.optim.Adam(net.parameters(), 1e-2)
    z = torch.zeros(2, D)
    for _ in range(150):
        loss = -Bernoulli().dist(net(z, x)).log_prob(x).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    assert loss.item() == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_shape": (5, 6)}, r"event_shape must be \(C, H, W\), found \(5, 6\)"),
        ({"kernel_size": 4}, "kernel_size must be odd and at least 3, found 4"),
        ({"kernel_size": 1}, "kernel_size must be odd and at least 3, found 1"),
        ({"num_layers": 0}, "num_layers must be at least 1, found 0"),
        ({"hidden_dim": 7}, "hidden_dim must be divisible by the 3 channels, found 7"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"latent_dim": D, "event_shape": (3, 5, 6), **change}
    with pytest.raises(ValueError, match=message):
        PixelCNN(**arguments)


def test_x_of_another_shape() -> None:
    z: Tensor = torch.zeros(1, D).double()
    with pytest.raises(ValueError, match=r"shape \[\*, 1, 5, 6\], found \[1, 1, 6, 5\]"):
        decoder()(z, torch.zeros(1, 1, 6, 5).double())
