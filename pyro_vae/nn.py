"""Networks: encoders, decoders, samplers that turn noise into latents, discriminators."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad
from torch.nn.utils import parametrize

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GRAEDecoder",
    "GRAEEncoder",
    "JointDiscriminator",
    "MLPDecoder",
    "MLPEncoder",
    "NoiseBasis",
    "ResidualDiscriminator",
    "TwoTowerDiscriminator",
    "weight_norm_cap",
]


class _Layers(nn.Sequential):
    """A stack of layers of which a slice is a plain one: ``MLP(3, 2)[:-1]``."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class MLP(_Layers):
    """Stack linear layers with an activation between them.

    Args:
        in_dim: Size of the last dimension of the input.
        out_dim: Size of the last dimension of the output.
        hidden_dims: Widths of the hidden layers.
        activation: Class of the activation.

    Example:
        >>> import torch
        >>> MLP(3, 2, (16, 16))(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: tuple[int, ...] = (128, 128),
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        widths = (in_dim, *hidden_dims)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        super().__init__(*layers, nn.Linear(widths[-1], out_dim))


class MLPEncoder(_Layers):
    r"""Flatten each x, then apply an :class:`MLP`.

    Args:
        event_shape: Shape of one x.
        out_dim: Number h of features.
        hidden_dims: Widths of the hidden layers.
        activation: Class of the activation.

    Shapes:
        x [N, \*event_shape] → [N, h].

    Example:
        >>> MLPEncoder((1, 8, 8), 32)(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        out_dim: int,
        hidden_dims: tuple[int, ...] = (128, 128),
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        super().__init__(nn.Flatten(1), MLP(prod(event_shape), out_dim, hidden_dims, activation))


class MLPDecoder(_Layers):
    r"""Apply an :class:`MLP`, then give its output a shape.

    Args:
        latent_dim: d.
        out_shape: Shape of what an observation takes, (num_params · C, H, W) or (num_params · D,).
        hidden_dims: Widths of the hidden layers.
        activation: Class of the activation.

    Shapes:
        z [\*, d] → [\*, \*out_shape].

    Example:
        >>> MLPDecoder(4, (1, 8, 8))(torch.randn(3, 5, 4)).shape
        torch.Size([3, 5, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        out_shape: Sequence[int],
        hidden_dims: tuple[int, ...] = (128, 128),
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        super().__init__(
            MLP(latent_dim, prod(out_shape), hidden_dims, activation),
            nn.Unflatten(-1, tuple(out_shape)),
        )


def _halved(shape: Sequence[int], times: int, name: str) -> tuple[int, int]:
    """Return height and width after so many halvings, which must come out even."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name} must be (C, H, W), found {tuple(shape)}")
    _, height, width = shape
    if height % 2**times or width % 2**times:
        raise ValueError(
            f"{name}: height and width must be divisible by {2**times}, as {times} layers halve "
            f"them: found {height} × {width}; hidden_dims= sets the number of layers"
        )
    return height // 2**times, width // 2**times


class _Rows(nn.Module):
    """A decoder that maps rows z [M, d], brought to any batch shape."""

    def _decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        """Return the decoder's output, in the batch shape of z."""
        out = self._decode(z.reshape(-1, z.shape[-1]))
        return out.reshape(*z.shape[:-1], *out.shape[1:])


class ConvEncoder(_Layers):
    r"""Convolutional encoder in the style of DCGAN's discriminator.

    Each layer halves the image: 4×4 convolutions of stride 2, batch normalisation (but for the
    first layer), leaky ReLU; a linear layer at the end.

    Args:
        event_shape: (C, H, W); H and W divisible by 2 to the number of layers.
        out_dim: Number h of features.
        hidden_dims: Channels of the layers. Two suit 28×28, three or four 32×32 and 64×64.
        batch_norm: Whether to normalise. In training mode the features of a data point then depend
            on the others of its minibatch.

    Shapes:
        x [N, C, H, W] → [N, h].

    Raises:
        ValueError: For a shape that is no image's, or cannot be halved as often.

    References:
        | Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
        | Networks (Radford, Metz, Chintala, 2016), section 3
        | https://arxiv.org/abs/1511.06434
        | InfoVAE (Zhao, Song, Ermon, 2017), appendix C: its encoder
        | https://arxiv.org/abs/1706.02262

    Example:
        >>> ConvEncoder((3, 32, 32), 64, (32, 64, 128))(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        out_dim: int,
        hidden_dims: tuple[int, ...] = (64, 128),
        *,
        batch_norm: bool = True,
    ) -> None:
        height, width = _halved(event_shape, len(hidden_dims), "event_shape")
        channels = (event_shape[0], *hidden_dims)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(channels)):
            normed = batch_norm and i > 0  # what a bias does there is undone
            layers.append(nn.Conv2d(a, b, kernel_size=4, stride=2, padding=1, bias=not normed))
            layers += [nn.BatchNorm2d(b)] if normed else []
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Flatten(1), nn.Linear(channels[-1] * height * width, out_dim))


class ConvDecoder(_Rows):
    r"""Convolutional decoder in the style of DCGAN's generator.

    A linear layer makes a small image, each further layer doubles it: batch normalisation, ReLU, a
    4×4 transposed convolution of stride 2.

    Args:
        latent_dim: d.
        out_shape: (num_params · C, H, W), what an observation takes; H and W divisible by 2 to the
            number of layers.
        hidden_dims: Channels that the layers take in, the small image's first.
        batch_norm: Whether to normalise. In training mode p(x|z) of a data point then depends on
            the latents of the others; what needs it point by point (HMC, AIS) wants ``eval()``.

    Shapes:
        z [\*, d] → [\*, num_params · C, H, W].

    Raises:
        ValueError: For a shape that is no image's, or cannot be halved as often.

    References:
        | Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
        | Networks (Radford, Metz, Chintala, 2016), section 3
        | https://arxiv.org/abs/1511.06434

    Example:
        >>> ConvDecoder(8, (1, 28, 28))(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 1, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        out_shape: Sequence[int],
        hidden_dims: tuple[int, ...] = (128, 64),
        *,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        height, width = _halved(out_shape, len(hidden_dims), "out_shape")
        channels = (*hidden_dims, out_shape[0])
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, channels[0] * height * width),
            nn.Unflatten(1, (channels[0], height, width)),
        ]
        for i, (a, b) in enumerate(pairwise(channels), 1):
            bias = not batch_norm or i == len(hidden_dims)
            layers += [nn.BatchNorm2d(a)] if batch_norm else []
            layers += [nn.ReLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=bias)]
        self.layers = nn.Sequential(*layers)

    def _decode(self, z: Tensor) -> Tensor:
        return self.layers(z)


class _SameConv2d(nn.Conv2d):
    """Convolution whose output is the input's size over the stride, rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        margins: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            margins += [total // 2, total - total // 2]
        return super().forward(pad(x, margins))


class _SameConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution whose output is the input's size times the stride."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        total = self.kernel_size[0] - self.stride[0]
        first, height, width = total // 2, *(size * self.stride[0] for size in x.shape[2:])
        out = super().forward(x, output_size)
        return out[..., first : first + height, first : first + width]


#: (channels, kernel size, stride) of each layer.
_GRAE: dict[str, dict] = {
    "mnist": {
        "shape": (1, 28, 28),
        "kernel": 4,
        "encoder": ((64, 1), (128, 2), (256, 2), (512, 2), (512, 1)),
        "start": (256, 7, 7),
        "decoder": ((512, 1), (256, 1), (128, 2), (64, 2)),
    },
    "celeba": {
        "shape": (3, 64, 64),
        "kernel": 5,
        "encoder": ((128, 1), (256, 2), (512, 2), (1024, 2), (1024, 2)),
        "start": (512, 8, 8),
        "decoder": ((1024, 1), (512, 2), (256, 2), (128, 2)),
    },
}


def _grae(name: str) -> dict:
    if name not in _GRAE:
        raise ValueError(f"name must be one of {sorted(_GRAE)}, found {name!r}")
    return _GRAE[name]


class GRAEEncoder(_Layers):
    r"""Convolutional encoder of the GRAE paper, up to where its images are flat.

    The fully connected layer that follows there is the guide's own, which wants to be told
    ``num_features=encoder.out_features``. Convolutions keep the size, or halve it, rounded up;
    each is followed by batch normalisation and ELU.

    Args:
        name: ``"mnist"``, for [1, 28, 28], or ``"celeba"``, for [3, 64, 64].

    Attributes:
        out_features: Number h of features, 8192 or 16384.

    Shapes:
        x [N, C, H, W] → [N, h].

    Raises:
        ValueError: For another name.

    References:
        | On Implicit Regularization in β-VAEs (Kumar, Poole, 2020), appendix D
        | https://arxiv.org/abs/2002.00041

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> encoder = GRAEEncoder("mnist")
        >>> guide = Gaussian(encoder, latent_dim=12, num_features=encoder.out_features)
    """

    def __init__(self, name: Literal["mnist", "celeba"]) -> None:
        net = _grae(name)
        channels, height, width = net["shape"]
        layers: list[nn.Module] = []
        for filters, stride in net["encoder"]:
            layers += [
                _SameConv2d(channels, filters, net["kernel"], stride, bias=False),
                nn.BatchNorm2d(filters),
                nn.ELU(),
            ]
            channels, height, width = filters, -(-height // stride), -(-width // stride)
        super().__init__(*layers, nn.Flatten(1))
        self.out_features = channels * height * width


class GRAEDecoder(_Rows):
    r"""Convolutional decoder of the GRAE paper, without the sigmoid at its end.

    That is the observation's: a Bernoulli takes logits. Before a Gaussian of [0, 1] put it back,
    ``nn.Sequential(GRAEDecoder(…), nn.Sigmoid())``. For CelebA the paper prints a start from
    16×16, which its three doublings would take to 128×128: here it is 8×8.

    Args:
        latent_dim: d.
        name: ``"mnist"``, for [1, 28, 28], or ``"celeba"``, for [3, 64, 64].
        num_params: Numbers per element of x that the observation takes.

    Shapes:
        z [\*, d] → [\*, num_params · C, H, W].

    Raises:
        ValueError: For another name.

    References:
        | On Implicit Regularization in β-VAEs (Kumar, Poole, 2020), appendix D
        | https://arxiv.org/abs/2002.00041

    Example:
        >>> GRAEDecoder(12, "mnist")(torch.randn(5, 12)).shape
        torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self, latent_dim: int, name: Literal["mnist", "celeba"], num_params: int = 1
    ) -> None:
        super().__init__()
        net = _grae(name)
        start = net["start"]
        channels, last = start[0], len(net["decoder"]) - 1
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, prod(start)),
            nn.Unflatten(1, start),
            nn.BatchNorm2d(channels),
            nn.ELU(),
        ]
        for i, (filters, stride) in enumerate(net["decoder"]):
            layers.append(
                _SameConvTranspose2d(channels, filters, net["kernel"], stride, bias=i == last)
            )
            layers += [nn.BatchNorm2d(filters)] if i < last else []
            layers.append(nn.ELU())
            channels = filters
        out_channels = num_params * net["shape"][0]
        self.layers = nn.Sequential(*layers, _SameConv2d(channels, out_channels, net["kernel"], 1))

    def _decode(self, z: Tensor) -> Tensor:
        return self.layers(z)


def _zero(layer: nn.Module) -> None:
    """Start a discriminator's last layer at zero."""
    for param in layer.parameters():
        nn.init.zeros_(param)


def _flatten(x: Tensor) -> Tensor:
    """Take x [N, *] to rows [N, x_dim]."""
    return x.reshape(len(x), -1)


def _join(x: Tensor, z: Tensor) -> Tensor:
    """Put x [N, *] before each z [*, N, d]: [*, N, x_dim + d]."""
    x = _flatten(x)
    return torch.cat([x.expand(*z.shape[:-1], x.shape[-1]), z], -1)


class ResidualDiscriminator(nn.Module):
    r"""Map a latent vector to one number T(z), or T(x, z), through residual blocks.

    The last layer starts at zero, so that at first T = 0: both players look alike.

    Args:
        latent_dim: d.
        hidden_dim: Width of the blocks.
        num_blocks: Number of residual blocks, each h + W φ(h) + b with φ a leaky ReLU.
        x_dim: Number of elements of x, for T(x, z); 0 for T(z).

    Shapes:
        z [\*, d] → T(z) [\*]; x [N, \*event], z [\*, N, d] → T(x, z) [\*, N].

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.1: a
        | five-layer network with ResNet blocks for Eight Schools
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> import torch
        >>> ResidualDiscriminator(10)(torch.randn(4, 3, 10))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.]], grad_fn=<SqueezeBackward1>)
        >>> ResidualDiscriminator(10, x_dim=64)(torch.randn(3, 8, 8), torch.randn(4, 3, 10)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, latent_dim: int, hidden_dim: int = 64, num_blocks: int = 3, x_dim: int = 0
    ) -> None:
        super().__init__()
        self.inputs = nn.Linear(x_dim + latent_dim, hidden_dim)
        self.blocks = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(num_blocks))
        self.output = nn.Linear(hidden_dim, 1)
        _zero(self.output)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return T(z), given z, or T(x, z), given x and z."""
        h = self.inputs(_join(*inputs) if len(inputs) == 2 else inputs[0])
        for block in self.blocks:
            h = h + block(leaky_relu(h, 0.2))
        return self.output(leaky_relu(h, 0.2)).squeeze(-1)


class TwoTowerDiscriminator(nn.Module):
    r"""Map x and z to one number, the inner product of two networks' outputs.

    .. math:: T(x, z) = \langle a(x), b(z) \rangle

    a(x) is computed once for all particles z. b's last layer starts at zero, so that T = 0.

    Args:
        x_dim: Number of elements of x.
        latent_dim: d.
        hidden_dims: Widths of each tower's hidden layers.
        out_dim: Size of a(x) and b(z).
        activation: Class of the activation. Piecewise linear networks learn the steep edges of
            densities sooner than smooth ones.

    Shapes:
        x [N, \*event], z [\*, N, d] → T(x, z) [\*, N].

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.2: the
        | discriminator of the 2×2-pixel example, two hidden layers and an output of 512 each
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> import torch
        >>> TwoTowerDiscriminator(4, 2)(torch.randn(3, 2, 2), torch.randn(7, 3, 2)).shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        x_dim: int,
        latent_dim: int,
        hidden_dims: tuple[int, ...] = (512, 512),
        out_dim: int = 512,
        activation: type[nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        self.of_x = MLP(x_dim, out_dim, hidden_dims, activation)
        self.of_z = MLP(latent_dim, out_dim, hidden_dims, activation)
        _zero(self.of_z[-1])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return T(x, z)."""
        return (self.of_x(_flatten(x)) * self.of_z(z)).sum(-1)


class JointDiscriminator(nn.Module):
    r"""Map x and z to one number by a network on both, plus one on each alone.

    .. math:: T(x, z) = t(x, z) + a(x) + b(z)

    All three last layers start at zero, so that T = 0.

    Args:
        x_dim: Number of elements of x.
        latent_dim: d.
        hidden_dims: Widths of each network's hidden layers.
        activation: Class of the activation.

    Shapes:
        x [N, \*event], z [\*, N, d] → T(x, z) [\*, N].

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.2: the
        | discriminator for MNIST, four layers of 1024
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> import torch
        >>> t = JointDiscriminator(4, 2, hidden_dims=(16, 16))
        >>> t(torch.randn(3, 2, 2), torch.randn(7, 3, 2)).shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        x_dim: int,
        latent_dim: int,
        hidden_dims: tuple[int, ...] = (1024,) * 4,
        activation: type[nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        self.joint = MLP(x_dim + latent_dim, 1, hidden_dims, activation)
        self.of_x = MLP(x_dim, 1, hidden_dims, activation)
        self.of_z = MLP(latent_dim, 1, hidden_dims, activation)
        for network in (self.joint, self.of_x, self.of_z):
            _zero(network[-1])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return T(x, z)."""
        return (self.joint(_join(x, z)) + self.of_x(_flatten(x)) + self.of_z(z)).squeeze(-1)


class NoiseBasis(nn.Module):
    r"""Turn noise into basis vectors :math:`v_i(\varepsilon_i)`, each by a network of its own.

    Args:
        num_basis: Number m of basis vectors.
        out_dim: Size d of each.
        noise_dim: Size of each :math:`\varepsilon_i \sim N(0, I)`.
        hidden_dim: Width of each network's hidden layer.

    Shapes:
        ε [\*, m · noise_dim] → v [\*, m, d].

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), equation III.1
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> NoiseBasis(num_basis=8, out_dim=2, noise_dim=4)(torch.randn(5, 3, 32)).shape
        torch.Size([5, 3, 8, 2])
    """

    def __init__(
        self, num_basis: int, out_dim: int, noise_dim: int = 4, hidden_dim: int = 32
    ) -> None:
        super().__init__()
        self.num_basis = num_basis
        # Convolutions of width one, in groups: m networks side by side.
        ins, hidden, outs = (num_basis * dim for dim in (noise_dim, hidden_dim, out_dim))
        self.network = nn.Sequential(
            nn.Conv1d(ins, hidden, kernel_size=1, groups=num_basis),
            nn.ELU(),
            nn.Conv1d(hidden, outs, kernel_size=1, groups=num_basis),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return v, given ε."""
        rows = noise.reshape(-1, noise.shape[-1])
        # The draws as the convolution's length, which is several times quicker than as its batch.
        return self.network(rows.T).T.reshape(*noise.shape[:-1], self.num_basis, -1)


class _CappedNorm(nn.Module):
    """w = v/‖v‖ · s, s held in [−H, H], for each output unit; v and s are the parameters."""

    def __init__(self, cap: float, dim: int) -> None:
        super().__init__()
        self.cap = cap
        self.dim = dim

    def _norm(self, v: Tensor) -> Tensor:
        dims = [i for i in range(v.dim()) if i != self.dim]
        return torch.linalg.vector_norm(v, dim=dims, keepdim=True)

    def forward(self, s: Tensor, v: Tensor) -> Tensor:
        return v / self._norm(v) * s.clamp(-self.cap, self.cap)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm = self._norm(weight)
        # s starts at the cap where the norm is above it: beyond, it has no gradient. A layer that
        # starts at zero needs a direction to leave in.
        v = torch.where(norm == 0, torch.randn_like(weight), weight)
        return norm.clamp(max=self.cap), v


# The weight's dimension that counts the output units.
_UNIT_DIMS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}


def weight_norm_cap(module: nn.Module, H: float) -> nn.Module:
    r"""Cap the norm of every weight vector of a network, which makes the function smooth.

    Weight-normalised inference: the weights w of each output unit of each linear and convolutional
    layer are reparameterised, in place, as

    .. math:: w = \frac{v}{\lVert v \rVert} \min(\lVert s \rVert, H)

    with v and s the parameters; s is one number and keeps its sign, or a weight that starts at zero
    could not leave. Weights that are below the cap stay as they are, others are
    shortened. A unit whose s has passed H stays at the cap: the minimum has no gradient there.
    Biases are not touched. Applied to an encoder it regularises any guide that uses it;
    the guide's own head is not capped, unless the guide itself is given.
    Where no norm reaches H, training still differs from that of plain weights: the optimiser's
    steps are of v and s.

    Args:
        module: A network, changed in place.
        H: The largest norm.

    Returns:
        The module. It saves by ``state_dict``, with other keys than before: load weights of a plain
        network first. Torch does not pickle parametrised modules.

    Raises:
        ValueError: If H is not positive, or the module has no linear or convolutional layer, a
            transposed convolution in groups, whose units share weights' places, or a layer whose
            weight is parametrised already.

    References:
        | Amortized Inference Regularization (Shu, Bui, Zhao, Kochenderfer, Ermon, 2018),
        | section 3.2
        | https://arxiv.org/abs/1805.08913

    Example:
        >>> encoder = weight_norm_cap(MLP(4, 2, (16,)), H=0.1)
        >>> bool((encoder[0].weight.norm(dim=1) <= 0.1 + 1e-6).all())
        True
    """
    if not H > 0:
        raise ValueError(f"H must be positive, found {H}")
    layers = [
        (layer, dim)
        for layer in module.modules()
        for kind, dim in _UNIT_DIMS.items()
        if isinstance(layer, kind)
    ]
    if not layers:
        raise ValueError(
            f"module has no weights to cap: found {type(module).__name__}, expected a module with "
            "linear or convolutional layers"
        )
    for layer, dim in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"weights must not be parametrised yet, found a {type(layer).__name__} that is; "
                "cap a network once"
            )
        if dim == 1 and getattr(layer, "groups", 1) > 1:
            raise ValueError(
                f"a transposed convolution must be in one group, found {layer.groups} in "
                f"{type(layer).__name__}"
            )
    for layer, dim in layers:
        parametrize.register_parametrization(layer, "weight", _CappedNorm(H, dim))
    return module
