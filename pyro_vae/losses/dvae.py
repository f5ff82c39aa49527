"""Amortised inference regularisation (Shu et al., 2018): noise in the guide's input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..terms import Terms
from .base import TermsELBO
from .beta_vae import BetaVAE_ELBO

__all__ = ["DVAE_ELBO"]


class DVAE_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Minimise a loss whose guide sees noisy data: the denoising VAE.

    .. math:: \mathbb{E}_\varepsilon [ -\mathbb{E}_{q(z|x + \varepsilon)} \log p(x|z)
        + \mathrm{KL}(q(z|x + \varepsilon) \| p(z)) ], \qquad \varepsilon \sim N(0, \sigma^2 I)

    The noise reaches the guide only; the model scores the clean x. It regularises the guide: the
    bound falls below that of the noiseless guide by as much as the noise costs, which grows with σ.

    With an :class:`~pyro_vae.losses.IWAE_ELBO` inside this is DIWAE: one ε for the k samples of a
    data point. With ``mix`` it is the partially denoising VAE, a L(x) + (1 − a) L(x + ε).

    Noise is drawn for all rows that the loss is called with. With much data, call it with
    minibatches rather than with all of it and a plate that takes a few.

    Args:
        noise_scale: σ, in the units of the data.
        mix: a, the weight of the loss without noise, in [0, 1).
        elbo: The loss inside, one of this library's;
            :class:`~pyro_vae.losses.BetaVAE_ELBO`, an ELBO, by default.
        inputs: Names of the model's arguments that are the guide's input and get the noise; the
            first positional argument by default.
        **kwargs: Those of the default loss inside.

    Raises:
        ValueError: For a negative σ, a mix outside [0, 1), an inner loss that is not one of
            this library's. On use: for an input that is not there, or not of floating point.

    References:
        | Amortized Inference Regularization (Shu, Bui, Zhao, Kochenderfer, Ermon, 2018),
        | section 3.1, equations 13 and 16, and section 4
        | https://arxiv.org/abs/1805.08913

    Example:
        >>> from pyro_vae.losses import IWAE_ELBO
        >>> denoising = DVAE_ELBO(noise_scale=0.1)
        >>> partially = DVAE_ELBO(noise_scale=0.1, mix=0.5)
        >>> diwae = DVAE_ELBO(noise_scale=0.1, elbo=IWAE_ELBO(num_particles=8))
    """

    def __init__(
        self,
        noise_scale: float,
        mix: float = 0.0,
        elbo: TermsELBO | None = None,
        *,
        inputs: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not noise_scale >= 0:
            raise ValueError(f"noise_scale must not be negative, found {noise_scale}")
        if not 0 <= mix < 1:
            raise ValueError(
                f"mix must be in [0, 1), found {mix}; without noise, use the loss inside alone"
            )
        if elbo is None:
            elbo = BetaVAE_ELBO(**kwargs)
        elif kwargs:
            raise ValueError(f"give {sorted(kwargs)} to the loss inside, {type(elbo).__name__}")
        if not isinstance(elbo, TermsELBO):
            raise ValueError(
                f"elbo must be one of this library's losses, found {type(elbo).__name__}"
            )
        super().__init__(num_particles=elbo.num_particles, retain_graph=elbo.retain_graph)
        self.noise_scale = noise_scale
        self.mix = mix
        self.elbo: TermsELBO = elbo
        self.inputs = (inputs,) if isinstance(inputs, str) else inputs and tuple(inputs)

    def adversary(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the inner loss's adversary, for the guide as it is used: with noisy inputs."""
        noisy = self._noisy(model, guide, args, kwargs)
        loss = self.elbo.adversary(model, noisy, *args, **kwargs)
        if self.mix:
            clean = self.elbo.adversary(model, guide, *args, **kwargs)
            loss = self.mix * clean + (1 - self.mix) * loss
        return loss

    @property
    def needs_adversary(self) -> bool:
        """Whether the loss inside has an adversary to train."""
        return self.elbo.needs_adversary

    def _evaluate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, *, advance: bool
    ) -> tuple[Tensor, Terms]:
        noisy = self._noisy(model, guide, args, kwargs)
        if self.mix == 0:
            return self.elbo._evaluate(model, noisy, args, kwargs, advance=advance)
        # Both at the same state of the loss inside, which then advances on the noisy part.
        clean, _ = self.elbo._evaluate(model, guide, args, kwargs, advance=False)
        loss, terms = self.elbo._evaluate(model, noisy, args, kwargs, advance=advance)
        return self.mix * clean + (1 - self.mix) * loss, terms

    def _noisy(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Callable:
        """Return the guide with one draw of the noise on its inputs, whatever it is called with."""
        if self.inputs is None:
            if not args:
                raise ValueError(
                    "DVAE_ELBO adds noise to the first positional argument: found none; expected "
                    f"one, or inputs= with some of {sorted(kwargs)}"
                )
            args = (self._perturb(args[0], "the first positional argument"), *args[1:])
        else:
            call = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
            for name in self.inputs:
                if name not in call.arguments:
                    raise ValueError(
                        f"inputs: found no argument {name!r} among those passed to the model, "
                        f"expected some of {sorted(call.arguments)}"
                    )
                call.arguments[name] = self._perturb(call.arguments[name], f"argument {name!r}")
            args, kwargs = call.args, call.kwargs
        return lambda *_, **__: guide(*args, **kwargs)

    def _perturb(self, x: Any, name: str) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of floating point, found {found}")
        return x + self.noise_scale * torch.randn_like(x)
