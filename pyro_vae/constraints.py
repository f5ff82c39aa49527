r"""Constraints on reconstructions, for GECO: what a good reconstruction is, in units of the data.

A constraint is a callable (x, x̂) → [M], of data x [M, \*event] and reconstructions x̂ of the same
shape, one value a data point: *positive* where the constraint is violated, at most 0 where it is
satisfied. GECO asks for its mean to be at most 0. Any callable will do; those of the paper's Table
1 are here, as modules that carry their tolerance κ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, softmax, unfold

__all__ = [
    "ClassificationAccuracy",
    "FeatureReconstructionError",
    "PatchCrossCorrelation",
    "ReconstructionError",
]


class ReconstructionError(nn.Module):
    r"""Ask for a mean squared error of at most κ².

    .. math:: C(x, \hat x) = \| x - \hat x \|^2 - \kappa^2

    with the norm's square *averaged* over the elements of a data point (``per="element"``), so
    that κ is a root mean square error in units of x, or *summed* (``per="image"``), so that κ is
    the length of x − x̂. The paper's κ of 0.06 to 0.175 are the former, of pixels in [0, 1].

    ``relative`` divides by κ²: the same constraint in units of what it tolerates, for which one
    ``rate`` suits every κ. See :class:`~pyro_vae.losses.GECO_ELBO`.

    Args:
        tolerance: κ, in units of x.
        per: ``"element"`` or ``"image"``.
        relative: Whether the violation is :math:`\| x - \hat x \|^2 / \kappa^2 - 1`.

    Shapes:
        x [M, \*event], x̂ [M, \*event] → [M], in squared units of x, or, if relative, without units.

    Raises:
        ValueError: If κ is negative or not finite, or 0 and the violation relative to it; ``per``
            is unknown; or, when called, x and x̂ differ in shape.

    References:
        | Taming VAEs (Rezende, Viola, 2018), table 1, RE
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> constraint = ReconstructionError(0.1)
        >>> x = torch.zeros(2, 4)
        >>> constraint(x, x + torch.tensor([[0.0], [0.2]]))  # 0 − 0.1², 0.2² − 0.1²
        tensor([-0.0100,  0.0300])
        >>> ReconstructionError(0.1, relative=True)(x, x + torch.tensor([[0.0], [0.2]]))
        tensor([-1.0000,  3.0000])
    """

    def __init__(self, tolerance: float, per: str = "element", relative: bool = False) -> None:
        super().__init__()
        self.tolerance = _tolerance(tolerance, relative=relative)
        self.per = _choice(per, ("element", "image"))
        self.relative = relative

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the violation [M]."""
        x, x_hat = _pair(x, x_hat)
        return _excess(_squared_error(x, x_hat, self.per), self.tolerance, self.relative)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"tolerance={self.tolerance}, per={self.per!r}, relative={self.relative}"


class FeatureReconstructionError(nn.Module):
    r"""Ask for features of the reconstruction that are within κ of those of the data.

    .. math:: C(x, \hat x) = \| f(x) - f(\hat x) \|^2 - \kappa^2

    f may be layers of a trained classifier, or local statistics of an image. A module stays as it
    is: its weights are held fixed and it is kept in evaluation mode, while the gradient goes
    through it to x̂.

    Args:
        features: f, a module or callable [M, \*event] → [M, \*feature].
        tolerance: κ, in units of the features.
        per: Whether the squared error is averaged over features (``"element"``) or summed
            (``"image"``).
        relative: Whether the violation is divided by κ².

    Shapes:
        x [M, \*event], x̂ [M, \*event] → [M], in squared units of the features, or, if relative,
        without units.

    Raises:
        ValueError: As :class:`ReconstructionError`, and if f does not return one entry a data
            point.

    References:
        | Taming VAEs (Rezende, Viola, 2018), table 1, FRE
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> constraint = FeatureReconstructionError(lambda x: x.mean((1, 2)), tolerance=1.0)
        >>> constraint(torch.zeros(3, 5, 5), 2 * torch.ones(3, 5, 5))  # 2² − 1²
        tensor([3., 3., 3.])
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        tolerance: float,
        per: str = "element",
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.features = _Fixed(features)
        self.tolerance = _tolerance(tolerance, relative=relative)
        self.per = _choice(per, ("element", "image"))
        self.relative = relative

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the violation [M]; the gradient reaches x̂ and no weight of f's."""
        x, x_hat = _pair(x, x_hat)
        f, f_hat = self.features(x), self.features(x_hat)
        if f.ndim == 0 or f.shape != f_hat.shape or len(f) != len(x):
            raise ValueError(
                "features must return one entry for each data point: found "
                f"{list(f.shape)} and {list(f_hat.shape)}, expected [{len(x)}, ...]"
            )
        return _excess(_squared_error(f, f_hat, self.per), self.tolerance, self.relative)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"tolerance={self.tolerance}, per={self.per!r}, relative={self.relative}"


class ClassificationAccuracy(nn.Module):
    r"""Ask that a classifier give the label of the data to the reconstruction, too.

    .. math:: C(x, \hat x) = \kappa - l(x)^\top c(\hat x)

    with c the classifier's probabilities and l(x) the one-hot label of x, so that κ is the
    probability that the right class is to get on average: a soft accuracy. The paper prints the
    opposite sign, lᵀc − κ ≤ 0, which would ask for an accuracy of *at most* κ.

    A module's weights are held fixed and it is kept in evaluation mode; the gradient goes through
    it to x̂.

    Args:
        classifier: A module or callable [M, \*event] → [M, K], whose *logits* it returns; log
            probabilities are logits, too.
        accuracy: κ, in (0, 1].
        labels: Callable that takes x to integer labels [M] or one-hot labels [M, K]; by default
            the classifier's own choice on x. A loss hands a constraint nothing but x and x̂: where
            labels come with the data, close over a table of them.

    Shapes:
        x [M, \*event], x̂ [M, \*event] → [M], from κ − 1 to κ.

    Raises:
        ValueError: If κ is outside (0, 1], or, when called, the shapes of x and x̂, of logits or
            of labels do not fit.

    References:
        | Taming VAEs (Rezende, Viola, 2018), table 1, CLA
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> def classifier(x):  # the logits of two classes
        ...     return torch.stack([-x, x], -1)
        >>> constraint = ClassificationAccuracy(classifier, accuracy=0.9)
        >>> constraint(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0]))  # 0.9 − 0.9975, − 0.5
        tensor([-0.0975,  0.4000])
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor],
        accuracy: float,
        labels: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < accuracy <= 1:
            raise ValueError(f"accuracy must be in (0, 1], found {accuracy}")
        self.classifier = _Fixed(classifier)
        self.tolerance = float(accuracy)
        self.labels = labels

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the violation [M]; the gradient reaches x̂ and no weight of the classifier's."""
        x, x_hat = _pair(x, x_hat)
        logits = self.classifier(x_hat)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(
                "classifier must return the logits of K classes: found "
                f"{list(logits.shape)}, expected [{len(x)}, K]"
            )
        return self.tolerance - (self._labels(x, logits) * softmax(logits, -1)).sum(-1)

    @torch.no_grad()
    def _labels(self, x: Tensor, logits: Tensor) -> Tensor:
        labels = self.classifier(x).argmax(-1) if self.labels is None else self.labels(x)
        if labels.shape == logits.shape:
            return labels.detach().to(logits)
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must return integers [{len(x)}] or one-hot labels {list(logits.shape)}: "
                f"found {labels.dtype} {list(labels.shape)}"
            )
        classes = torch.arange(logits.shape[1], device=labels.device)
        labels = labels[:, None] == classes
        _check_labels(labels)
        return labels.to(logits)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"accuracy={self.tolerance}"


class PatchCrossCorrelation(nn.Module):
    r"""Ask for patches of the reconstruction that correlate with those of the data by κ or more.

    .. math:: C(x, \hat x) = \sum_i \left[ \kappa - \psi(x, i)^\top \psi(\hat x, i) \right]

    with ψ(x, i) the whitened patch at location i: the pixels of all channels, minus their mean,
    divided by their norm. So brightness and contrast of a patch do not count; its structure does.
    The sum of the paper is over locations (``per="image"``); ``per="patch"`` takes the mean
    instead, so that the size of an image does not scale the constraint.

    A flat patch, such as an empty background, has no structure to correlate. Let it be of P
    pixels; every centred patch gets one more component, :math:`c \sqrt P` with c
    ``min_contrast``, before it is normalised. Two flat patches then correlate fully, a flat one
    and a structured one do not, an exact reconstruction has ψᵀψ = 1 throughout, and gradients are
    finite. Where the standard deviation of the pixels is well above c it changes nothing.

    Args:
        patch_size: Height and width of a patch, or one number for both, in pixels.
        tolerance: κ, a correlation in [0, 1].
        stride: Distance between locations, in pixels. With 1, every location counts; larger
            strides are quicker by their square. Pixels beyond the last whole patch are not seen.
        per: ``"patch"``, the mean over locations, or ``"image"``, the sum.
        image_shape: ``(H, W)`` or ``(C, H, W)`` of data points that are not of that shape, such as
            flat vectors.
        min_contrast: Standard deviation of pixels below which a patch counts as flat, in units of
            x. The default suits pixels in [0, 1].

    Shapes:
        x [M, C, H, W] or [M, H, W], or of any shape with ``image_shape``; x̂ the same → [M].

    Raises:
        ValueError: If κ is outside [0, 1], a size is not positive, ``per`` is unknown, or, when
            called, x and x̂ differ in shape, are no images or are smaller than a patch.

    References:
        | Taming VAEs (Rezende, Viola, 2018), table 1, pNCC
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> constraint = PatchCrossCorrelation(patch_size=4, tolerance=0.9)
        >>> x = torch.rand(2, 8, 8)
        >>> constraint(x, x)  # 0.9 − 1
        tensor([-0.1000, -0.1000])
        >>> bool((constraint(x, torch.rand(2, 8, 8)) > 0).all())
        True
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        tolerance: float,
        stride: int = 1,
        per: str = "patch",
        image_shape: tuple[int, ...] | None = None,
        min_contrast: float = 1e-2,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if len(self.patch_size) != 2 or min(self.patch_size) < 1 or math.prod(self.patch_size) < 2:
            raise ValueError(f"patch_size must be of two pixels or more, found {patch_size}")
        self.tolerance = _tolerance(tolerance)
        if self.tolerance > 1:
            raise ValueError(f"tolerance must be a correlation in [0, 1], found {tolerance}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, found {stride}")
        if image_shape is not None and (len(image_shape) not in (2, 3) or min(image_shape) < 1):
            raise ValueError(f"image_shape must be (H, W) or (C, H, W), found {image_shape}")
        if not (math.isfinite(min_contrast) and min_contrast > 0):
            raise ValueError(f"min_contrast must be positive, found {min_contrast}")
        self.stride = stride
        self.per = _choice(per, ("patch", "image"))
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.min_contrast = min_contrast

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the violation [M]."""
        x, x_hat = _pair(x, x_hat)
        violation = self.tolerance - (self.whiten(x) * self.whiten(x_hat)).sum(1)
        return violation.mean(1) if self.per == "patch" else violation.sum(1)

    def whiten(self, x: Tensor) -> Tensor:
        """Return ψ(x, i) for all locations i, [M, patch, locations], each of norm 1."""
        patches = unfold(self._images(x), self.patch_size, stride=self.stride)
        centred = patches - patches.mean(1, keepdim=True)
        flat = self.min_contrast * math.sqrt(patches.shape[1])
        return normalize(pad(centred, (0, 0, 0, 1), value=flat), dim=1)

    def _images(self, x: Tensor) -> Tensor:
        shape = x.shape[1:] if self.image_shape is None else torch.Size(self.image_shape)
        if shape.numel() != x.shape[1:].numel() or len(shape) not in (2, 3):
            expected = "[M, H, W] or [M, C, H, W]" if self.image_shape is None else self.image_shape
            raise ValueError(f"x must hold images: found {list(x.shape)}, expected {expected}")
        channels = 1 if len(shape) == 2 else shape[0]
        if shape[-2] < self.patch_size[0] or shape[-1] < self.patch_size[1]:
            raise ValueError(
                f"patch_size must fit into the image: found {self.patch_size}, "
                f"expected at most {tuple(shape[-2:])}"
            )
        return x.reshape(len(x), channels, *shape[-2:])

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return (
            f"patch_size={self.patch_size}, tolerance={self.tolerance}, stride={self.stride}, "
            f"per={self.per!r}"
        )


class _Fixed(nn.Module):
    """A network that is not trained: its weights pass no gradient, it stays in evaluation mode."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(function):
            raise ValueError(f"expected a module or callable, found {type(function).__name__}")
        self.function = function
        self.eval()

    def train(self, mode: bool = True) -> _Fixed:
        """Stay in evaluation mode: batch statistics would follow the reconstructions."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.function, nn.Module):
            return self.function(x)
        weights = {k: v.detach() for k, v in self.function.named_parameters()}
        return torch.func.functional_call(self.function, weights, x)


def _check_labels(one_hot: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    try:
        bad = int((~one_hot.any(1)).sum())
    except RuntimeError:  # being captured: no value is known yet
        return
    if bad:
        raise ValueError(
            f"labels must be from 0 to {one_hot.shape[1] - 1}, one for each logit: "
            f"{bad} of {len(one_hot)} are not"
        )


def _squared_error(a: Tensor, b: Tensor, per: str) -> Tensor:
    squared = (a - b).square().reshape(len(a), -1)
    return squared.mean(1) if per == "element" else squared.sum(1)


def _excess(squared: Tensor, tolerance: float, relative: bool) -> Tensor:
    return squared / tolerance**2 - 1 if relative else squared - tolerance**2


def _tolerance(tolerance: float, *, relative: bool = False) -> float:
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must not be negative, and finite, found {tolerance}")
    if relative and tolerance == 0:
        raise ValueError("tolerance must be positive for a violation relative to it, found 0")
    return float(tolerance)


def _choice(per: str, choices: tuple[str, ...]) -> str:
    if per not in choices:
        raise ValueError(f"per must be one of {list(choices)}, found {per!r}")
    return per


def _pair(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim == 0 or x.shape != x_hat.shape:
        raise ValueError(
            "x and x_hat must have one shape [M, *event]: found "
            f"x {list(x.shape)}, x_hat {list(x_hat.shape)}"
        )
    return x.to(x_hat.dtype), x_hat  # pixels may be integers
