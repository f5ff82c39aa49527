"""Autoregressive decoder: a gated PixelCNN conditioned on the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

if TYPE_CHECKING:
    from .models import Observation

__all__ = ["PixelCNN", "PixelDraws"]


class PixelDraws(NamedTuple):
    r"""What :meth:`PixelCNN.draw` returns.

    Attributes:
        x: Draws [\*, C, H, W].
        log_prob: Log p(x|z) [\*], the sum of the conditionals that were drawn from.
    """

    x: Tensor
    log_prob: Tensor


class PixelCNN(nn.Module):
    r"""Decoder p(x|z) that conditions each pixel on z and all pixels before it, in raster order.

    .. math:: \log p(x|z) = \sum_{i} \log p(x_i \mid x_{<i}, z)

    and within a pixel each channel on the channels before it. Gated layers of two stacks: the
    vertical sees all rows above, the horizontal the pixels to the left in its own row, so that no
    earlier pixel is hidden in a blind spot. In each layer

    .. math:: y = \tanh(W_f * x + V_f * s) \odot \sigma(W_g * x + V_g * s)

    with s = m(z) a feature map of the image's size, linear in z, and V 1×1 convolutions: the
    latents say what is where. Skip connections run along the horizontal stack.

    A pixel sees L⌊k/2⌋ pixels to its left and L⌊k/2⌋ + 1 rows up, L layers of size k: 12 and 13 by
    default. What lies farther away reaches it through z alone.

    Args:
        latent_dim: d.
        event_shape: (C, H, W).
        num_params: Numbers per element of x that the observation takes.
        hidden_dim: Channels p of the stacks, divisible by C.
        num_layers: Gated layers; the first masks the pixel itself (mask A).
        kernel_size: k, odd, at least 3.
        condition_dim: Channels of s.

    Shapes:
        z [\*, d], x [\*, C, H, W] → [\*, num_params · C, H, W]; batch shapes broadcast.

    Raises:
        ValueError: For a shape that is no image's, an even kernel size, counts below one, a
            ``hidden_dim`` that C does not divide. When called: for an x of another shape.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord, Kalchbrenner, Vinyals,
        | Espeholt, Graves, Kavukcuoglu, 2016), section 2, equation 5 and figure 2
        | https://arxiv.org/abs/1606.05328
        | InfoVAE (Zhao, Song, Ermon, 2017), section 5.2
        | https://arxiv.org/abs/1706.02262

    Example:
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> decoder = PixelCNN(2, (1, 4, 4), hidden_dim=8, num_layers=2)
        >>> model = VAE(decoder, Bernoulli(), latent_dim=2, event_shape=(1, 4, 4))
        >>> model.likelihood(torch.zeros(3, 2), x=torch.ones(3, 1, 4, 4)).batch_shape
        torch.Size([3])
        >>> model.sample(5).shape
        torch.Size([5, 1, 4, 4])
    """

    autoregressive = True

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        num_params: int = 1,
        *,
        hidden_dim: int = 48,
        num_layers: int = 6,
        kernel_size: int = 5,
        condition_dim: int = 8,
    ) -> None:
        super().__init__()
        if len(event_shape) != 3 or min(event_shape) < 1:
            raise ValueError(f"event_shape must be (C, H, W), found {tuple(event_shape)}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, found {kernel_size}")
        counts = {
            "latent_dim": latent_dim,
            "num_params": num_params,
            "num_layers": num_layers,
            "condition_dim": condition_dim,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        channels, height, width = event_shape
        if hidden_dim < 1 or hidden_dim % channels:
            raise ValueError(
                f"hidden_dim must be divisible by the {channels} channels, found {hidden_dim}"
            )
        self.latent_dim = latent_dim
        self.event_shape = torch.Size(event_shape)
        self.num_params = num_params
        self.condition = nn.Sequential(
            nn.Linear(latent_dim, condition_dim * height * width),
            nn.Unflatten(1, (condition_dim, height, width)),
        )
        self.layers = nn.ModuleList(
            _GatedLayer(
                hidden_dim if i else channels,
                hidden_dim,
                condition_dim,
                channels,
                kernel_size,
                first=i == 0,
                last=i == num_layers - 1,
            )
            for i in range(num_layers)
        )
        self.output = nn.Sequential(
            nn.ELU(),
            _MaskedConv2d(hidden_dim, hidden_dim, 1, channels),
            nn.ELU(),
            _MaskedConv2d(hidden_dim, num_params * channels, 1, channels),
        )

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        r"""Return the observation's parameters for each element of x, given those before it."""
        if x.shape[-3:] != self.event_shape:
            raise ValueError(
                f"x must have shape [*, {', '.join(map(str, self.event_shape))}], found "
                f"{list(x.shape)}"
            )
        batch = torch.broadcast_shapes(z.shape[:-1], x.shape[:-3])
        images = x.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        s = self.condition(z.expand(*batch, self.latent_dim).reshape(-1, self.latent_dim))
        vertical = horizontal = _centred(images)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, s)
        out = self.output(horizontal)
        return out.reshape(*batch, *out.shape[1:])

    def sample(self, z: Tensor, observation: Observation, *, cached: bool = True) -> Tensor:
        r"""Draw x [\*, C, H, W] from p(x|z); see :meth:`draw`."""
        return self.draw(z, observation, cached=cached).x

    @torch.no_grad()
    def draw(self, z: Tensor, observation: Observation, *, cached: bool = True) -> PixelDraws:
        r"""Draw x from p(x|z), element by element, and say how probable each draw was.

        Args:
            z: Latents [\*, d].
            observation: What the parameters are those of.
            cached: Whether to keep what the layers made of the pixels before: the whole then takes
                as many operations as one pass; without, a pass for each element.
        """
        channels, height, width = self.event_shape
        rows = z.reshape(-1, self.latent_dim)
        s = self.condition(rows)
        x = s.new_zeros(len(rows), *self.event_shape)
        log_prob = s.new_zeros(len(rows))
        cache = _Cache(self, s) if cached else None
        for i in range(height):
            if cache:
                cache.start_row(x, i)
            for j in range(width):
                for c in range(channels):
                    if cache:
                        params = cache.pixel(x, i, j)
                    else:
                        params = self(rows, x)[:, :, i : i + 1, j : j + 1]
                    one = observation.dist(params[:, c::channels])
                    value = one.sample()
                    x[:, c, i, j] = value[:, 0, 0, 0]
                    log_prob += one.log_prob(value)
        batch = z.shape[:-1]
        return PixelDraws(x.reshape(*batch, *self.event_shape), log_prob.reshape(batch))


def _centred(x: Tensor) -> Tensor:
    """Bring [0, 1] to [−1, 1]: what lies beyond the image, 0, is then no pixel's value."""
    return 2 * x - 1


class _MaskedConv2d(nn.Conv2d):
    """Convolution whose last column, the pixel itself, respects the order of the channels.

    Channel i belongs to the image's channel i mod C. It sees those before its own, and itself
    unless ``strict`` (mask A, else B).
    """

    mask: Tensor

    def __init__(
        self, ins: int, outs: int, width: int, channels: int, *, strict: bool = False
    ) -> None:
        super().__init__(ins, outs, (1, width))
        of_in, of_out = torch.arange(ins) % channels, torch.arange(outs)[:, None] % channels
        mask = torch.ones_like(self.weight)
        mask[:, :, 0, -1] = (of_in < of_out if strict else of_in <= of_out).to(mask)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight * self.mask, self.bias)


class _GatedLayer(nn.Module):
    """A layer of both stacks, on the whole image or on a window of what precedes a pixel.

    The channels of both halves of a gate are in the order of :class:`_MaskedConv2d`: p is divisible
    by C.
    """

    def __init__(
        self,
        ins: int,
        p: int,
        condition_dim: int,
        channels: int,
        kernel_size: int,
        *,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        # The vertical stack's first layer sees the rows above, the others what is made of them.
        self.above = int(first)
        self.vertical = nn.Conv2d(ins, 2 * p, (self.reach + 1, kernel_size))
        self.horizontal = _MaskedConv2d(ins, 2 * p, self.reach + 1, channels, strict=first)
        self.across = nn.Conv2d(2 * p, 2 * p, 1)
        # The last layer's vertical stack goes into the horizontal one, and no further.
        self.on_vertical = None if last else nn.Conv2d(condition_dim, 2 * p, 1, bias=False)
        self.on_horizontal = nn.Conv2d(condition_dim, 2 * p, 1, bias=False)
        self.residual = _MaskedConv2d(p, p, 1, channels)
        self.skips = not first

    def rows(self, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vertical stack before and after its gate; v has margins above and beside."""
        before = self.vertical(v)
        return before, before if self.on_vertical is None else _gate(before + self.on_vertical(s))

    def pixels(self, h: Tensor, before: Tensor, s: Tensor) -> Tensor:
        """Return the horizontal stack; h has a margin to the left."""
        own = self.horizontal(h) + self.across(before) + self.on_horizontal(s)
        out = self.residual(_gate(own))
        return out + h[..., self.reach :] if self.skips else out

    def forward(self, v: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        v = pad(v, (self.reach, self.reach, self.reach + self.above, 0))
        before, after = self.rows(v[:, :, : v.shape[2] - self.above], s)
        return after, self.pixels(pad(h, (self.reach, 0)), before, s)


def _gate(x: Tensor) -> Tensor:
    f, g = x.chunk(2, 1)
    return torch.tanh(f) * torch.sigmoid(g)


class _Cache:
    """What each layer takes in, of the rows and the pixels that are settled."""

    def __init__(self, decoder: PixelCNN, s: Tensor) -> None:
        self.decoder = decoder
        self.s = s
        self.layers: list[_GatedLayer] = list(decoder.layers)  # type: ignore[arg-type]
        num, _, height, width = s.shape
        reach = self.layers[0].reach
        sizes = [layer.vertical.in_channels for layer in self.layers]
        # With the margins that the convolutions want: above and beside; to the left.
        self.vertical = [s.new_zeros(num, k, height + reach + 1, width + 2 * reach) for k in sizes]
        self.horizontal = [s.new_zeros(num, k, 1, width + reach) for k in sizes]
        self.before: list[Tensor] = []

    def start_row(self, x: Tensor, i: int) -> None:
        """Run the vertical stack for row i, whose rows above are settled."""
        reach = self.layers[0].reach
        if i:
            self.vertical[0][:, :, reach + i, reach:-reach] = _centred(x[:, :, i - 1])
        s = self.s[:, :, i : i + 1]
        self.before = []
        for k, layer in enumerate(self.layers):
            # Margins of reach + 1 rows: the first layer's row i ends one above row i.
            window = self.vertical[k][:, :, i + 1 - layer.above : i + reach + 2 - layer.above]
            before, after = layer.rows(window, s)
            self.before.append(before)
            if k + 1 < len(self.layers):
                self.vertical[k + 1][:, :, i + reach + 1, reach:-reach] = after[:, :, 0]
        for h in self.horizontal:
            h.zero_()

    def pixel(self, x: Tensor, i: int, j: int) -> Tensor:
        """Return the parameters at pixel (i, j), given those before it."""
        reach = self.layers[0].reach
        s = self.s[:, :, i : i + 1, j : j + 1]
        if j:  # settled since; what deeper layers made of it saw no more than those before it
            self.horizontal[0][..., reach + j - 1 : reach + j] = _centred(
                x[..., i : i + 1, j - 1 : j]
            )
        out = _centred(x[..., i : i + 1, j : j + 1])
        for k, layer in enumerate(self.layers):
            self.horizontal[k][..., reach + j : reach + j + 1] = out
            window = self.horizontal[k][..., j : j + reach + 1]
            out = layer.pixels(window, self.before[k][..., j : j + 1], s)
        return self.decoder.output(out)
