"""The networks: shapes, formulas, and where they start."""

import pytest
import torch
from torch import nn

from pyro_vae.nn import MLP, ResidualDiscriminator

NETWORKS = {
    "MLP": lambda: MLP(3, 2, (5, 4)),
    "ResidualDiscriminator": lambda: ResidualDiscriminator(3, hidden_dim=5, num_blocks=2),
}


@pytest.fixture(params=NETWORKS)
def network(request, dtype, device):
    """Each network, with no weight at zero."""
    network = NETWORKS[request.param]().to(device, dtype)
    for param in network.parameters():
        nn.init.normal_(param)
    return network


@pytest.mark.parametrize("batch", [(), (7,), (2, 7)])
def test_maps_any_batch_row_by_row(network, batch, dtype, device):
    z = torch.randn(*batch, 3, dtype=dtype, device=device)
    out = network(z)
    rows = torch.stack([network(row) for row in z.reshape(-1, 3)])
    assert out.dtype == dtype
    torch.testing.assert_close(out, rows.reshape(out.shape))


def test_output_shapes(dtype, device):
    z = torch.randn(4, 6, 3, dtype=dtype, device=device)
    assert MLP(3, 2).to(z)(z).shape == (4, 6, 2)
    assert ResidualDiscriminator(3).to(z)(z).shape == (4, 6)


def test_gradients_reach_the_input_and_every_parameter(network, dtype, device):
    z = torch.randn(50, 3, dtype=dtype, device=device, requires_grad=True)
    network(z).sum().backward()
    for name, tensor in {"input": z, **dict(network.named_parameters())}.items():
        assert tensor.grad.abs().sum() > 0, name


def test_state_dict_round_trip(network, dtype, device):
    kind = type(network).__name__
    other = NETWORKS[kind]().to(device, dtype)
    other.load_state_dict(network.state_dict())
    z = torch.randn(5, 3, dtype=dtype, device=device)
    assert torch.equal(other(z), network(z))


def test_mlp_has_the_layers_asked_for(dtype, device):
    mlp = MLP(3, 2, (5, 4), activation=nn.Tanh).to(device, dtype)
    z = torch.randn(6, 3, dtype=dtype, device=device)
    h = z
    weights = list(mlp.parameters())
    assert [w.shape for w in weights[::2]] == [(5, 3), (4, 5), (2, 4)]
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h = torch.tanh(h @ weight.T + bias)
    torch.testing.assert_close(mlp(z), h @ weights[-2].T + weights[-1])


def test_mlp_without_hidden_layers_is_linear():
    assert [type(layer) for layer in MLP(3, 2, ())] == [nn.Linear]


def test_discriminator_is_its_formula(dtype, device):
    """A straight line would be fitted by one block as by none: the skip connections count."""
    t = ResidualDiscriminator(3, hidden_dim=5, num_blocks=2).to(device, dtype)
    nn.init.normal_(t.output.weight)
    z = torch.randn(6, 3, dtype=dtype, device=device)

    def phi(h):
        return torch.where(h > 0, h, 0.2 * h)

    h = z @ t.inputs.weight.T + t.inputs.bias
    for block in t.blocks:
        h = h + phi(h) @ block.weight.T + block.bias
    expected = (phi(h) @ t.output.weight.T + t.output.bias)[:, 0]
    torch.testing.assert_close(t(z), expected)


def test_discriminator_starts_at_zero_and_can_leave_it(dtype, device):
    t = ResidualDiscriminator(3).to(device, dtype)
    z = torch.randn(20, 3, dtype=dtype, device=device)
    assert torch.equal(t(z), torch.zeros(20, dtype=dtype, device=device))
    t(z)[:10].sum().backward()
    assert t.output.weight.grad.abs().sum() > 0
    assert len(t.blocks) == 3
