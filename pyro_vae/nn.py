"""Networks: samplers that turn noise into latents, and discriminators; a cap on their weights."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils import parametrize

__all__ = [
    "MLP",
    "JointDiscriminator",
    "NoiseBasis",
    "ResidualDiscriminator",
    "TwoTowerDiscriminator",
    "weight_norm_cap",
]


class MLP(nn.Sequential):
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
