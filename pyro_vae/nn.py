"""Networks: samplers that turn noise into latents, and discriminators."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

__all__ = ["MLP", "ResidualDiscriminator"]


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


class ResidualDiscriminator(nn.Module):
    r"""Map a latent vector to one number T(z) through residual blocks.

    The last layer starts at zero, so that at first T = 0: both players look alike.

    Args:
        latent_dim: d.
        hidden_dim: Width of the blocks.
        num_blocks: Number of residual blocks, each h + W φ(h) + b with φ a leaky ReLU.

    Shapes:
        z [\*, d] → T(z) [\*].

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
    """

    def __init__(self, latent_dim: int, hidden_dim: int = 64, num_blocks: int = 3) -> None:
        super().__init__()
        self.inputs = nn.Linear(latent_dim, hidden_dim)
        self.blocks = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(num_blocks))
        self.output = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Return T(z)."""
        h = self.inputs(z)
        for block in self.blocks:
            h = h + block(leaky_relu(h, 0.2))
        return self.output(leaky_relu(h, 0.2)).squeeze(-1)
