"""The networks: shapes, formulas, and where they start."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from pyro_vae.guides import Gaussian
from pyro_vae.nn import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    GRAEDecoder,
    GRAEEncoder,
    JointDiscriminator,
    MLPDecoder,
    MLPEncoder,
    NoiseBasis,
    ResidualDiscriminator,
    TwoTowerDiscriminator,
    _SameConv2d,
    _SameConvTranspose2d,
    weight_norm_cap,
)

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


@pytest.mark.parametrize("make", [partial(MLP, 3, 2), partial(MLPEncoder, (3,), 2)])
def test_a_slice_of_layers_is_a_plain_stack(make):
    network = make()
    x = torch.randn(5, 3)
    assert type(network[:-1]) is nn.Sequential
    torch.testing.assert_close(network[-1](network[:-1](x)), network(x), rtol=0, atol=0)


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


# --- discriminators on (x, z) ---------------------------------------------------------------------

CONDITIONAL = {
    "two towers": lambda: TwoTowerDiscriminator(6, 3, (5, 4), 7),
    "joint": lambda: JointDiscriminator(6, 3, (5, 4)),
    "residual": lambda: ResidualDiscriminator(3, hidden_dim=5, num_blocks=2, x_dim=6),
}


@pytest.fixture(params=CONDITIONAL)
def fresh(request, dtype, device):
    return CONDITIONAL[request.param]().to(device, dtype)


@pytest.fixture
def discriminator(fresh):
    """Each discriminator, with no weight at zero."""
    for param in fresh.parameters():
        nn.init.normal_(param)
    return fresh


@pytest.fixture
def x(dtype, device):
    return torch.randn(4, 2, 3, dtype=dtype, device=device)


@pytest.fixture
def z(dtype, device):
    return torch.randn(2, 5, 4, 3, dtype=dtype, device=device)


def test_pairs_each_row_of_x_with_its_particles(discriminator, x, z):
    t = discriminator(x, z)
    assert t.shape == (2, 5, 4)
    assert t.dtype == z.dtype
    for n in range(4):
        rows = torch.stack([discriminator(x[n : n + 1], row[n : n + 1]) for row in z.flatten(0, 1)])
        torch.testing.assert_close(t[..., n].flatten(), rows[:, 0])
    torch.testing.assert_close(discriminator(x.flatten(1), z[0, 0]), t[0, 0])
    assert not torch.allclose(discriminator(x.flip(0), z), t)


def test_conditional_starts_at_zero_and_can_leave_it(fresh, x, z):
    assert torch.equal(fresh(x, z), z.new_zeros(2, 5, 4))
    optim = torch.optim.SGD(fresh.parameters(), lr=0.1)
    for _ in range(2):
        optim.zero_grad()
        fresh(x, z)[:1].sum().backward()
        optim.step()
    assert fresh(x, z).abs().min() > 0
    assert all(param.grad.abs().sum() > 0 for param in fresh.parameters())


def test_conditional_gradients_and_state(fresh, x, z):
    twin = copy.deepcopy(fresh)
    for param in fresh.parameters():
        nn.init.normal_(param)
    x.requires_grad_()
    z.requires_grad_()
    fresh(x, z).square().sum().backward()
    for name, tensor in {"x": x, "z": z, **dict(fresh.named_parameters())}.items():
        assert tensor.grad.abs().sum() > 0, name
    twin.load_state_dict(fresh.state_dict())
    assert torch.equal(twin(x, z), fresh(x, z))


def test_two_towers_are_an_inner_product(x, z):
    t = TwoTowerDiscriminator(6, 3).to(z)
    assert [layer.out_features for layer in t.of_x if isinstance(layer, nn.Linear)] == [512] * 3
    assert [layer.out_features for layer in t.of_z if isinstance(layer, nn.Linear)] == [512] * 3
    nn.init.normal_(t.of_z[-1].weight)
    expected = torch.einsum("nk,ijnk->ijn", t.of_x(x.reshape(4, 6)), t.of_z(z))
    torch.testing.assert_close(t(x, z), expected)


def test_joint_is_a_sum(x, z):
    t = JointDiscriminator(6, 3).to(z)
    for network in (t.joint, t.of_x, t.of_z):
        widths = [layer.out_features for layer in network if isinstance(layer, nn.Linear)]
        assert widths == [1024] * 4 + [1]
        nn.init.normal_(network[-1].weight)
    rows = x.reshape(4, 6)
    both = torch.cat([rows.expand(2, 5, 4, 6), z], -1)
    expected = t.joint(both)[..., 0] + t.of_x(rows)[:, 0] + t.of_z(z)[..., 0]
    torch.testing.assert_close(t(x, z), expected)


def test_residual_takes_x_beside_z(x, z):
    t = ResidualDiscriminator(3, x_dim=6).to(z)
    nn.init.normal_(t.output.weight)
    plain = ResidualDiscriminator(9).to(z)
    plain.load_state_dict(t.state_dict())
    torch.testing.assert_close(
        t(x, z), plain(torch.cat([x.reshape(4, 6).expand(2, 5, 4, 6), z], -1))
    )


# --- the noise basis ------------------------------------------------------------------------------


def test_each_basis_vector_has_its_own_noise(dtype, device):
    """v_i depends on ε_i alone; in distribution they differ."""
    basis = NoiseBasis(3, 4, noise_dim=2).to(device, dtype)
    noise = torch.randn(5, 6, dtype=dtype, device=device)
    v = basis(noise)
    assert v.shape == (5, 3, 4)
    assert basis(noise.expand(2, 5, 6)).shape == (2, 5, 3, 4)
    changed = noise.clone()
    changed[:, 2:4] += 1
    moved = (basis(changed) - v).abs().amax((0, 2)) > 1e-3
    assert moved.tolist() == [False, True, False]
    same = basis(noise[:, :2].repeat(1, 3))
    assert (same[:, 0] - same[:, 1]).abs().max() > 1e-3


# --- the cap on weight norms ----------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), (1,)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (3, 2, 5), (1, 2)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, groups=2), (3, 2, 5, 5), (1, 2, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 3, 3, 3), (1, 2, 3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3), (3, 2, 5, 5), (0, 2, 3)),
}


@pytest.fixture(params=LAYERS)
def layer_case(request, dtype, device):
    make, shape, dims = LAYERS[request.param]
    return make().to(device, dtype), torch.randn(shape, dtype=dtype, device=device), dims


def norms(layer, dims):
    return torch.linalg.vector_norm(layer.weight, dim=dims)


def test_cap_is_its_formula(layer_case):
    """v/‖v‖ · min(‖s‖, H), output unit by output unit: some are shortened, others left."""
    layer, x, dims = layer_case
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    cap = norms(layer, dims).median().item()
    before = norms(layer, dims).detach()
    assert (before > cap).any()
    assert weight_norm_cap(layer, cap) is layer
    torch.testing.assert_close(norms(layer, dims).detach(), before.clamp(max=cap))
    direction = (layer.weight * weight).sum() / (layer.weight.norm() * weight.norm())
    assert direction > 0.9
    for unit in range(4):
        index = (slice(None), unit) if 0 in dims else unit
        ratio = layer.weight[index] / weight[index]
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
    assert torch.equal(layer.bias, bias)
    layer(x).square().sum().backward()
    # Every unit's, also where the norm was above the cap.
    assert all(param.grad.abs().min() > 0 for param in layer.parameters())


def test_cap_holds_however_it_is_trained(layer_case):
    layer, x, dims = layer_case
    weight_norm_cap(layer, 0.5)
    optim = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(3):
        optim.zero_grad()
        (-layer(x).square().sum()).backward()
        optim.step()
        assert (norms(layer, dims) <= 0.5 + 1e-5).all()
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(-9.0)
    torch.testing.assert_close(norms(layer, dims), torch.full_like(norms(layer, dims), 0.5))


def test_a_high_cap_changes_nothing(dtype, device):
    mlp = MLP(3, 2, (5,)).to(device, dtype)
    z = torch.randn(4, 3, dtype=dtype, device=device)
    out = mlp(z)
    torch.testing.assert_close(weight_norm_cap(mlp, 100.0)(z), out)
    assert all(layer.weight.dtype == dtype for layer in mlp if isinstance(layer, nn.Linear))


def test_a_layer_at_zero_stays_there_and_can_leave(dtype, device):
    t = weight_norm_cap(ResidualDiscriminator(3), 1.0).to(device, dtype)
    z = torch.randn(4, 3, dtype=dtype, device=device)
    assert torch.equal(t(z), z.new_zeros(4))
    t(z).sum().backward()
    assert all(param.grad.isfinite().all() for param in t.parameters())
    assert t.output.parametrizations.weight.original0.grad.abs().sum() > 0


def test_capped_networks_copy_and_save(dtype, device):
    mlp = weight_norm_cap(MLP(3, 2, (5,)).to(device, dtype), 0.4)
    z = torch.randn(4, 3, dtype=dtype, device=device)
    twin = copy.deepcopy(mlp)
    assert torch.equal(twin(z), mlp(z))
    other = weight_norm_cap(MLP(3, 2, (5,)).to(device, dtype), 0.4)
    assert not torch.equal(other(z), mlp(z))
    other.load_state_dict(mlp.state_dict())
    assert torch.equal(other(z), mlp(z))
    with torch.no_grad():
        for param in twin.parameters():
            param.mul_(0.5)
    assert torch.equal(other(z), mlp(z))
    assert not torch.equal(twin(z), mlp(z))


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_bad_cap(cap):
    with pytest.raises(ValueError, match=f"H must be positive, found {cap}"):
        weight_norm_cap(MLP(3, 2), cap)


def test_nothing_to_cap():
    with pytest.raises(ValueError, match="no weights to cap: found ReLU"):
        weight_norm_cap(nn.ReLU(), 1.0)


def test_cap_says_which_layer_it_cannot_take():
    with pytest.raises(ValueError, match="one group, found 2 in ConvTranspose2d"):
        weight_norm_cap(nn.ConvTranspose2d(4, 4, 3, groups=2), 1.0)


def test_cap_is_put_on_once():
    capped = weight_norm_cap(MLP(3, 2, (4,)), 1.0)
    with pytest.raises(ValueError, match="found a ParametrizedLinear that is; cap a network once"):
        weight_norm_cap(capped, 0.5)


# --- encoders and decoders ------------------------------------------------------------------------

ENCODERS = {
    "MLP image": (lambda: MLPEncoder((2, 3, 4), 7, (8,)), (2, 3, 4)),
    "MLP vector": (lambda: MLPEncoder((6,), 7), (6,)),
    "convolutional": (lambda: ConvEncoder((2, 8, 12), 7, (4, 5)), (2, 8, 12)),
    "convolutional plain": (lambda: ConvEncoder((1, 28, 28), 7, batch_norm=False), (1, 28, 28)),
    "GRAE": (lambda: GRAEEncoder("mnist"), (1, 28, 28)),
}
DECODERS = {
    "MLP image": (lambda: MLPDecoder(3, (2, 3, 4), (8,)), (2, 3, 4)),
    "MLP vector": (lambda: MLPDecoder(3, (6,)), (6,)),
    "convolutional": (lambda: ConvDecoder(3, (2, 8, 12), (5, 4)), (2, 8, 12)),
    "convolutional plain": (lambda: ConvDecoder(3, (2, 28, 28), batch_norm=False), (2, 28, 28)),
    "GRAE": (lambda: GRAEDecoder(3, "mnist", num_params=2), (2, 28, 28)),
}


@pytest.fixture(params=ENCODERS)
def encoder_case(request, dtype, device):
    make, shape = ENCODERS[request.param]
    return make().to(device, dtype), torch.rand(4, *shape, dtype=dtype, device=device)


@pytest.fixture(params=DECODERS)
def decoder_case(request, dtype, device):
    make, shape = DECODERS[request.param]
    return make().to(device, dtype), shape


def test_encoders_take_rows(encoder_case):
    encoder, x = encoder_case
    features = encoder.eval()(x)
    assert features.dtype == x.dtype
    assert features.dim() == 2
    rows = torch.cat([encoder(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(features, rows)
    assert features.std(0).min() > 0


def test_decoders_take_any_batch(decoder_case, dtype, device):
    decoder, shape = decoder_case
    decoder.eval()
    z = torch.randn(2, 4, 3, dtype=dtype, device=device)
    out = decoder(z)
    assert out.dtype == dtype
    assert out.shape == (2, 4, *shape)
    torch.testing.assert_close(out[1, 2], decoder(z[1, 2]))
    assert out.std((0, 1)).min() > 0


def test_guides_take_the_encoders(encoder_case):
    encoder, x = encoder_case
    num = getattr(encoder, "out_features", None)
    guide = Gaussian(encoder, 3, num_features=num).to(x)
    assert guide.get_posterior(x).batch_shape == (4,)


def test_gradients_reach_all_of_an_encoder(encoder_case):
    encoder, x = encoder_case
    x.requires_grad_()
    encoder(x).square().sum().backward()
    for name, tensor in {"input": x, **dict(encoder.named_parameters())}.items():
        assert tensor.grad.abs().sum() > 1e-8, name


def test_gradients_reach_all_of_a_decoder(decoder_case, dtype, device):
    decoder, _ = decoder_case
    z = torch.randn(4, 3, dtype=dtype, device=device, requires_grad=True)
    decoder(z).square().sum().backward()
    for name, tensor in {"input": z, **dict(decoder.named_parameters())}.items():
        assert tensor.grad.abs().sum() > 1e-8, name


def check_saves(network, value):
    twin = copy.deepcopy(network)
    network(value)  # moves batch statistics, if there are
    for param in twin.parameters():
        nn.init.zeros_(param)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(value), network.eval()(value))
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()):
        assert torch.equal(twin.train()(value), network(value))


def test_encoders_save(encoder_case):
    check_saves(*encoder_case)


def test_decoders_save(decoder_case, dtype, device):
    check_saves(decoder_case[0], torch.randn(4, 3, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("size", "hidden"),
    [(28, (8, 8)), (32, (8, 8, 8)), (64, (8,) * 4), (64, (8,) * 6)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutional_sizes(size, hidden, channels):
    shape = (channels, size, size)
    assert ConvEncoder(shape, 5, hidden).eval()(torch.rand(2, *shape)).shape == (2, 5)
    assert ConvDecoder(4, shape, hidden).eval()(torch.randn(2, 4)).shape == (2, *shape)


@pytest.mark.parametrize("make", [partial(ConvEncoder, out_dim=3), partial(ConvDecoder, 3)])
def test_convolutional_sizes_that_do_not_halve(make):
    name = "event_shape" if make.func is ConvEncoder else "out_shape"
    with pytest.raises(ValueError, match=rf"{name}: .* by 8, as 3 layers halve .*found 28 × 28"):
        make(**{name: (1, 28, 28), "hidden_dims": (8, 8, 8)})
    with pytest.raises(ValueError, match=rf"{name} must be \(C, H, W\), found \(28, 28\)"):
        make(**{name: (28, 28)})


def test_grae_architectures_are_those_of_the_appendix():
    """Channels, kernels, strides, and the sizes that they lead to, without computing any."""
    layers = {
        "mnist": (4, [(1, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2), (512, 512, 1)]),
        "celeba": (5, [(3, 128, 1), (128, 256, 2), (256, 512, 2), (512, 1024, 2), (1024, 1024, 2)]),
    }
    ups = {
        "mnist": [(256, 512, 1), (512, 256, 1), (256, 128, 2), (128, 64, 2)],
        "celeba": [(512, 1024, 1), (1024, 512, 2), (512, 256, 2), (256, 128, 2)],
    }
    shapes = {"mnist": (1, 28, 28), "celeba": (3, 64, 64)}
    sizes = {"mnist": [28, 14, 7, 4, 4], "celeba": [64, 32, 16, 8, 4]}
    for name, shape in shapes.items():
        with torch.device("meta"):
            encoder, decoder = GRAEEncoder(name), GRAEDecoder(12, name)
            x, found = torch.empty(2, *shape), []
            for layer in encoder:
                x = layer(x)
                if isinstance(layer, nn.Conv2d):
                    found.append(x.shape[-1])
            assert x.shape == (2, encoder.out_features)
            assert decoder(torch.empty(3, 2, 12)).shape == (3, 2, *shape)
        assert found == sizes[name]
        kernel, expected = layers[name]
        convs = [layer for layer in encoder if isinstance(layer, nn.Conv2d)]
        assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convs] == expected
        transposed = [layer for layer in decoder.layers if isinstance(layer, nn.ConvTranspose2d)]
        assert [(c.in_channels, c.out_channels, c.stride[0]) for c in transposed] == ups[name]
        last = decoder.layers[-1]
        assert (last.in_channels, last.out_channels) == (ups[name][-1][1], shape[0])
        assert {c.kernel_size for c in (*convs, *transposed, last)} == {(kernel, kernel)}
        normed = [sum(isinstance(m, nn.BatchNorm2d) for m in n) for n in (encoder, decoder.layers)]
        assert normed == [5, 4]


def test_transposed_convolution_is_the_adjoint_of_the_convolution(dtype, device):
    """〈conv x, y〉 = 〈x, convT y〉: the crop is where the padding was."""
    for kernel, stride in ((4, 1), (4, 2), (5, 1), (5, 2)):
        conv = _SameConv2d(2, 3, kernel, stride, bias=False).to(device, dtype)
        up = _SameConvTranspose2d(3, 2, kernel, stride, bias=False).to(device, dtype)
        up.weight.data = conv.weight.data
        x = torch.randn(1, 2, 6, 8, dtype=dtype, device=device)
        y = torch.randn(1, 3, 6 // stride, 8 // stride, dtype=dtype, device=device)
        torch.testing.assert_close((conv(x) * y).sum(), (x * up(y)).sum())


def test_unknown_grae_architecture():
    for make in (GRAEEncoder, partial(GRAEDecoder, 3)):
        with pytest.raises(ValueError, match=r"one of \['celeba', 'mnist'\], found 'cifar'"):
            make("cifar")


def test_cap_takes_convolutional_encoders():
    encoder = weight_norm_cap(ConvEncoder((1, 8, 8), 3, (4, 4)), 0.5)
    assert encoder(torch.rand(4, 1, 8, 8)).shape == (4, 3)
