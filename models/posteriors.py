"""Posteriors that are hard in different ways: what a sampler or a guide is measured on.

Each model comes with a function that simulates its data, from a generator of its own and for other
sizes too; the default arguments are data of the size that the docstring names. ``POSTERIORS`` lists
them, with the three of :mod:`pyro_vae.models.eight_schools`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .eight_schools import (
    SIGMA_AVB,
    SIGMA_GELMAN,
    Y_AVB,
    Y_GELMAN,
    eight_schools_avb,
    eight_schools_centered,
    eight_schools_noncentered,
)

__all__ = [
    "POSTERIORS",
    "Posterior",
    "bounded_and_simplex",
    "bounded_and_simplex_data",
    "correlated_gaussian",
    "correlated_gaussian_data",
    "funnel_noncentered",
    "gaussian_process",
    "gaussian_process_data",
    "hierarchical_regression",
    "hierarchical_regression_data",
    "linear_regression",
    "linear_regression_data",
    "logistic_regression",
    "logistic_regression_data",
]

Moments = dict[str, tuple[Tensor, Tensor]]


def _generator(seed: int) -> torch.Generator:
    """Make a generator of our own: data must neither read nor move torch's global one."""
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw in float64, whatever the data's type is to be: one seed gives one data set."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _check_regression(x: Tensor, y: Tensor | None) -> None:
    if x.dim() != 2 or (y is not None and y.shape != x.shape[:1]):
        found = "None" if y is None else list(y.shape)
        raise ValueError(
            "x must have the shape [N, D] and y [N], one row a data point; "
            f"found x {list(x.shape)} and y {found}"
        )


def _linear(coefficients: Tensor, x: Tensor) -> Tensor:
    """Return x b, shape [N], for coefficients b [D] and predictors [N, D].

    Under further plates b is [*plates, 1, D], where 1 holds the place of the plate of the data:
    the result is [*plates, N].
    """
    return (coefficients @ x.T).reshape(*coefficients.shape[:-2], len(x))


# -- linear regression ----------------------------------------------------------------------------


def linear_regression_data(
    num_data: int = 500,
    num_features: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Simulate a linear regression with standard normal predictors and unit noise.

    Args:
        num_data: N.
        num_features: D.
        dtype: Type of the data.
        seed: Seed of a private generator.

    Returns:
        ``x`` [N, D] and ``y`` [N].

    Example:
        >>> x, y = linear_regression_data(20, 3)
        >>> x.shape, y.shape
        (torch.Size([20, 3]), torch.Size([20]))
    """
    generator = _generator(seed)
    x = _normal(num_data, num_features, generator=generator)
    coefficients = _normal(num_features, generator=generator)
    y = 1.0 + x @ coefficients + _normal(num_data, generator=generator)
    return x.to(dtype), y.to(dtype)


X_LINEAR, Y_LINEAR = linear_regression_data()


def linear_regression(x: Tensor = X_LINEAR, y: Tensor | None = Y_LINEAR) -> None:
    r"""Linear regression with an unknown noise scale, 500 × 10 by default.

    .. math:: a, b_k \sim N(0, 2.5), \quad \sigma \sim \text{Exponential}(1), \quad
        y_i \sim N(a + b^T x_i, \sigma)

    Sites: ``intercept`` [], ``coefficients`` [D], ``noise_scale`` [], observed ``y`` [N].

    Args:
        x: Predictors [N, D].
        y: Responses [N]; ``None`` samples them.

    Raises:
        ValueError: If the shapes are not [N, D] and [N].

    References:
        | The default priors of rstanarm for standardised data
        | https://mc-stan.org/rstanarm/articles/priors.html

    Example:
        >>> x, y = linear_regression_data(20, 3)
        >>> trace = pyro.poutine.trace(linear_regression).get_trace(x, y)
        >>> trace.nodes["coefficients"]["value"].shape
        torch.Size([3])
    """
    _check_regression(x, y)
    scale = x.new_tensor(2.5)
    intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), scale))
    coefficients = pyro.sample(
        "coefficients", dist.Normal(x.new_zeros(x.shape[1]), scale).to_event(1)
    )
    noise_scale = pyro.sample("noise_scale", dist.Exponential(x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + _linear(coefficients, x), noise_scale), obs=y)


# -- logistic regression --------------------------------------------------------------------------


def logistic_regression_data(
    num_data: int = 1000,
    num_features: int = 25,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Simulate a logistic regression with standard normal predictors.

    Args:
        num_data: N.
        num_features: D.
        dtype: Type of the data.
        seed: Seed of a private generator.

    Returns:
        ``x`` [N, D] and ``y`` [N], zeros and ones.

    Example:
        >>> x, y = logistic_regression_data(20, 3)
        >>> x.shape, y.shape
        (torch.Size([20, 3]), torch.Size([20]))
    """
    generator = _generator(seed)
    x = _normal(num_data, num_features, generator=generator)
    logits = 0.5 + x @ (0.5 * _normal(num_features, generator=generator))
    uniform = torch.rand(num_data, generator=generator, dtype=torch.float64)
    return x.to(dtype), (uniform < logits.sigmoid()).to(dtype)


X_LOGISTIC, Y_LOGISTIC = logistic_regression_data()


def logistic_regression(x: Tensor = X_LOGISTIC, y: Tensor | None = Y_LOGISTIC) -> None:
    r"""Logistic regression, 1000 × 25 by default.

    .. math:: a, b_k \sim N(0, 1), \quad
        y_i \sim \text{Bernoulli}(\text{logit}^{-1}(a + b^T x_i))

    Sites: ``intercept`` [], ``coefficients`` [D], observed ``y`` [N].

    Args:
        x: Predictors [N, D].
        y: Responses [N], zeros and ones; ``None`` samples them.

    Raises:
        ValueError: If the shapes are not [N, D] and [N].

    References:
        | An adaptive MCMC scheme for setting trajectory lengths in HMC (Hoffman, Radul, Sountsov,
          2021), section 5, where a posterior of this kind is among the examples
        | https://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> x, y = logistic_regression_data(20, 3)
        >>> trace = pyro.poutine.trace(logistic_regression).get_trace(x, y)
        >>> trace.nodes["coefficients"]["value"].shape
        torch.Size([3])
    """
    _check_regression(x, y)
    one = x.new_ones(())
    intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), one))
    coefficients = pyro.sample(
        "coefficients", dist.Normal(x.new_zeros(x.shape[1]), one).to_event(1)
    )
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + _linear(coefficients, x)), obs=y)


# -- correlated Gaussian --------------------------------------------------------------------------


def correlated_gaussian_data(
    dim: int = 100,
    condition_number: float = 1e4,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor]:
    """Make a precision matrix with random axes, which no diagonal metric conditions.

    The variances along the axes are equally spaced in their logarithm, about 1.

    Args:
        dim: D.
        condition_number: Ratio of the largest variance along an axis to the smallest.
        dtype: Type of the data.
        seed: Seed of a private generator.

    Returns:
        ``precision`` [D, D], alone in a tuple.

    Example:
        >>> (precision,) = correlated_gaussian_data(3, 100.0, dtype=torch.float64)
        >>> torch.linalg.cond(precision)
        tensor(100.0000, dtype=torch.float64)
    """
    axes, _ = torch.linalg.qr(_normal(dim, dim, generator=_generator(seed)))
    half = math.log10(condition_number) / 2
    eigenvalues = torch.logspace(-half, half, dim, dtype=torch.float64)
    return ((axes * eigenvalues @ axes.T).to(dtype),)


(PRECISION,) = correlated_gaussian_data()


def correlated_gaussian(precision: Tensor = PRECISION) -> None:
    r"""Zero-mean Gaussian, by default with 100 dimensions and condition number 10,000.

    .. math:: \log p(x) = -\tfrac12 x^T \Lambda x + \text{const}

    A quadratic form rather than a ``MultivariateNormal``, whose Cholesky factor and triangular
    solves would be most of the work.

    Sites: ``x`` [D].

    Args:
        precision: Λ [D, D], symmetric and positive definite.

    Raises:
        ValueError: If ``precision`` is not a square matrix.

    Example:
        >>> conditioned = pyro.condition(correlated_gaussian, {"x": torch.ones(2)})
        >>> pyro.poutine.trace(conditioned).get_trace(torch.eye(2)).log_prob_sum()
        tensor(-1.)
    """
    if precision.dim() != 2 or precision.shape[0] != precision.shape[1]:
        raise ValueError(
            f"precision must have the shape [D, D]; found precision {list(precision.shape)}"
        )
    # The normal distribution only says where to start: masked, it adds nothing to the density.
    start = dist.Normal(precision.new_zeros(len(precision)), precision.new_ones(()))
    x = pyro.sample("x", start.to_event(1).mask(False))
    pyro.factor("log_density", -0.5 * (x @ precision * x).sum(-1))


# -- hierarchical regression ----------------------------------------------------------------------


def hierarchical_regression_data(
    num_groups: int = 40,
    num_data: int = 400,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Simulate a regression in groups of different sizes, each with its own line.

    Args:
        num_groups: J.
        num_data: N, at least J: no group is empty.
        dtype: Type of the data.
        seed: Seed of a private generator.

    Returns:
        ``group`` [N], ``x`` [N], ``y`` [N] and ``num_groups``.

    Example:
        >>> group, x, y, num_groups = hierarchical_regression_data(4, 20)
        >>> len(group), num_groups
        (20, 4)
    """
    generator = _generator(seed)
    others = torch.randint(num_groups, (num_data - num_groups,), generator=generator)
    group = torch.cat([torch.arange(num_groups), others])
    x = _normal(num_data, generator=generator)
    intercept = 1.0 + 0.7 * _normal(num_groups, generator=generator)
    slope = -0.5 + 0.4 * _normal(num_groups, generator=generator)
    noise = 0.8 * _normal(num_data, generator=generator)
    y = intercept[group] + slope[group] * x + noise
    return group, x.to(dtype), y.to(dtype), num_groups


GROUP, X_HIERARCHICAL, Y_HIERARCHICAL, _ = hierarchical_regression_data()


def hierarchical_regression(
    group: Tensor = GROUP,
    x: Tensor = X_HIERARCHICAL,
    y: Tensor | None = Y_HIERARCHICAL,
    num_groups: int = 40,
) -> None:
    r"""Varying intercepts and slopes in the non-centred form, by default of 40 groups.

    .. math::
        m_a, m_b \sim N(0, 2.5), \quad s_a, s_b, \sigma \sim \text{HalfNormal}(1), \quad
        \tilde a_j, \tilde b_j \sim N(0, 1), \\
        a_j = m_a + s_a \tilde a_j, \quad b_j = m_b + s_b \tilde b_j, \quad
        y_i \sim N(a_{j(i)} + b_{j(i)} x_i, \sigma)

    Sites: ``intercept_loc`` [], ``intercept_scale`` [], ``slope_loc`` [], ``slope_scale`` [],
    ``noise_scale`` [], ``intercept_raw`` [J], ``slope_raw`` [J], deterministic ``intercept`` [J]
    and ``slope`` [J], observed ``y`` [N].

    Args:
        group: Group of each data point [N], integers from 0 to J − 1.
        x: Predictor [N].
        y: Response [N]; ``None`` samples it.
        num_groups: J.

    Raises:
        ValueError: If the data are not vectors of one length, or ``group`` does not hold integers.

    References:
        | Data Analysis Using Regression and Multilevel/Hierarchical Models (Gelman, Hill, 2006),
          chapter 13

    Example:
        >>> data = hierarchical_regression_data(4, 20)
        >>> trace = pyro.poutine.trace(hierarchical_regression).get_trace(*data)
        >>> trace.nodes["intercept"]["value"].shape
        torch.Size([4])
    """
    if x.dim() != 1 or group.shape != x.shape or (y is not None and y.shape != x.shape):
        found = "None" if y is None else list(y.shape)
        raise ValueError(
            "group, x and y must be vectors of one length, one entry a data point; "
            f"found group {list(group.shape)}, x {list(x.shape)} and y {found}"
        )
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group must hold integers from 0 to num_groups - 1; found {group.dtype}")
    zero, one, wide = x.new_zeros(()), x.new_ones(()), x.new_tensor(2.5)
    intercept_loc = pyro.sample("intercept_loc", dist.Normal(zero, wide))
    intercept_scale = pyro.sample("intercept_scale", dist.HalfNormal(one))
    slope_loc = pyro.sample("slope_loc", dist.Normal(zero, wide))
    slope_scale = pyro.sample("slope_scale", dist.HalfNormal(one))
    noise_scale = pyro.sample("noise_scale", dist.HalfNormal(one))
    with pyro.plate("groups", num_groups):
        intercept_raw = pyro.sample("intercept_raw", dist.Normal(zero, one))
        slope_raw = pyro.sample("slope_raw", dist.Normal(zero, one))
        intercept = pyro.deterministic("intercept", intercept_loc + intercept_scale * intercept_raw)
        slope = pyro.deterministic("slope", slope_loc + slope_scale * slope_raw)
    with pyro.plate("data", len(x)):
        mean = intercept[..., group] + slope[..., group] * x
        pyro.sample("y", dist.Normal(mean, noise_scale), obs=y)


# -- Gaussian process -----------------------------------------------------------------------------


def gaussian_process_data(
    num_data: int = 100, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Simulate noisy values of a smooth function, one point per 0.1 on average.

    Args:
        num_data: N.
        dtype: Type of the data.
        seed: Seed of a private generator.

    Returns:
        ``x`` [N], sorted, and ``y`` [N].

    Example:
        >>> x, y = gaussian_process_data(20)
        >>> x.shape, y.shape
        (torch.Size([20]), torch.Size([20]))
    """
    generator = _generator(seed)
    x = torch.rand(num_data, generator=generator, dtype=torch.float64).sort().values
    x = x * (num_data / 10)
    covariance = torch.exp(-((x[:, None] - x) ** 2) / 2) + 0.3**2 * torch.eye(num_data).double()
    y = torch.linalg.cholesky(covariance) @ _normal(num_data, generator=generator)
    return x.to(dtype), y.to(dtype)


X_PROCESS, Y_PROCESS = gaussian_process_data()


def gaussian_process(x: Tensor = X_PROCESS, y: Tensor | None = Y_PROCESS) -> None:
    r"""Gaussian process regression, the function integrated out, by default of 100 points.

    .. math:: \alpha, \ell, \sigma \sim \text{LogNormal}(0, 1), \quad
        y \sim N(0, K + \sigma^2 I), \quad
        K_{ij} = \alpha^2 \exp(-(x_i - x_j)^2 / (2 \ell^2))

    Where rounding makes the covariance singular, the density is NaN.

    Sites: ``amplitude`` [], ``lengthscale`` [], ``noise_scale`` [], observed ``y`` [N].

    Args:
        x: Where the function was measured [N].
        y: Its noisy values [N]; ``None`` samples them.

    Raises:
        ValueError: If ``x`` and ``y`` are not vectors of one length.

    References:
        | Gaussian Processes for Machine Learning (Rasmussen, Williams, 2006), equation (5.8)
        | https://gaussianprocess.org/gpml/

    Example:
        >>> trace = pyro.poutine.trace(gaussian_process).get_trace(*gaussian_process_data(20))
        >>> trace.nodes["y"]["value"].shape
        torch.Size([20])
    """
    if x.dim() != 1 or (y is not None and y.shape != x.shape):
        found = "None" if y is None else list(y.shape)
        raise ValueError(
            "x and y must be vectors of one length, one entry a data point; "
            f"found x {list(x.shape)} and y {found}"
        )
    log_normal = dist.LogNormal(x.new_zeros(()), x.new_ones(()))
    amplitude = pyro.sample("amplitude", log_normal)[..., None, None]
    lengthscale = pyro.sample("lengthscale", log_normal)[..., None, None]
    noise_scale = pyro.sample("noise_scale", log_normal)[..., None, None]
    squared_distance = (x[:, None] - x) ** 2
    covariance = amplitude**2 * torch.exp(-squared_distance / (2 * lengthscale**2))
    covariance = covariance + noise_scale**2 * torch.eye(len(x), dtype=x.dtype, device=x.device)
    # Among many chains one that strays must not raise an error for all: NaN marks it alone.
    scale_tril, info = torch.linalg.cholesky_ex(covariance)
    scale_tril = torch.where((info == 0)[..., None, None], scale_tril, torch.nan)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), scale_tril=scale_tril), obs=y)


# -- Neal's funnel --------------------------------------------------------------------------------

FUNNEL_SCALE = torch.tensor(3.0)


def funnel_noncentered(scale: Tensor = FUNNEL_SCALE, dim: int = 10) -> None:
    r"""Neal's funnel in the non-centred form, by default in 10 dimensions.

    .. math:: y \sim N(0, s), \quad \tilde x_i \sim N(0, 1), \quad x_i = e^{y/2} \tilde x_i

    Sites: ``y`` [], ``x_raw`` [dim − 1], deterministic ``x`` [dim − 1].

    Args:
        scale: s [].
        dim: Number of dimensions, y among them.

    Raises:
        ValueError: If ``scale`` is not a single number, or ``dim`` is less than 2.

    References:
        | Slice sampling (Neal, 2003), section 8
        | https://doi.org/10.1214/aos/1056562461

    Example:
        >>> trace = pyro.poutine.trace(funnel_noncentered).get_trace()
        >>> trace.nodes["x"]["value"].shape
        torch.Size([9])
    """
    if scale.dim() != 0:
        raise ValueError(f"scale must be a single number, shape []; found {list(scale.shape)}")
    if dim < 2:
        raise ValueError(f"dim must be at least 2; found {dim}")
    y = pyro.sample("y", dist.Normal(scale.new_zeros(()), scale))
    normal = dist.Normal(scale.new_zeros(dim - 1), scale.new_ones(())).to_event(1)
    x_raw = pyro.sample("x_raw", normal)
    pyro.deterministic("x", torch.exp(y / 2)[..., None] * x_raw, event_dim=1)


# -- an interval, the positive numbers and a simplex ----------------------------------------------


def bounded_and_simplex_data(
    num_bands: int = 50,
    num_materials: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Simulate the spectrum of a mixture whose first material dominates.

    Each material reflects most at a wavelength of its own; the share of a material in the mixture
    is half of that of the one before.

    Args:
        num_bands: N.
        num_materials: K.
        dtype: Type of the data.
        seed: Seed of a private generator.

    Returns:
        ``spectra`` [N, K] and ``y`` [N].

    Example:
        >>> spectra, y = bounded_and_simplex_data(20, 3)
        >>> spectra.shape, y.shape
        (torch.Size([20, 3]), torch.Size([20]))
    """
    wavelength = torch.linspace(0, 1, num_bands, dtype=torch.float64)
    peak = torch.linspace(0, 1, num_materials, dtype=torch.float64)
    spectra = 0.2 + 0.6 * torch.exp(-((wavelength[:, None] - peak) ** 2) / (2 * 0.15**2))
    shares = 0.5 ** torch.arange(num_materials, dtype=torch.float64)
    noise = 0.05 * _normal(num_bands, generator=_generator(seed))
    y = 1.1 * spectra @ (shares / shares.sum()) + noise
    return spectra.to(dtype), y.to(dtype)


SPECTRA, Y_SPECTRUM = bounded_and_simplex_data()


def bounded_and_simplex(spectra: Tensor = SPECTRA, y: Tensor | None = Y_SPECTRUM) -> None:
    r"""Spectral unmixing: sites on an interval, on the positive numbers and on a simplex.

    The light from a mixture of K materials, seen in N bands under an illumination g, tells the
    share of each material.

    .. math:: g \sim \text{Uniform}(0.5, 1.5), \quad w \sim \text{Dirichlet}(1, \dots, 1), \quad
        \sigma \sim \text{Exponential}(1), \quad y_i \sim N(g \, S_i w, \sigma)

    Sites: ``illumination`` [] in (0.5, 1.5), ``shares`` [K] on the simplex, ``noise_scale`` [],
    observed ``y`` [N].

    Args:
        spectra: Spectrum of each material S [N, K].
        y: Spectrum of the mixture [N]; ``None`` samples it.

    Raises:
        ValueError: If the shapes are not [N, K] and [N].

    References:
        | Semi-supervised linear spectral unmixing using a hierarchical Bayesian model for
          hyperspectral imagery (Dobigeon, Tourneret, Chang, 2008)
        | https://doi.org/10.1109/TSP.2008.917851

    Example:
        >>> trace = pyro.poutine.trace(bounded_and_simplex).get_trace()
        >>> trace.nodes["shares"]["value"].sum()
        tensor(1.0000)
    """
    if spectra.dim() != 2 or (y is not None and y.shape != spectra.shape[:1]):
        found = "None" if y is None else list(y.shape)
        raise ValueError(
            "spectra must have the shape [N, K] and y [N], one row a band; "
            f"found spectra {list(spectra.shape)} and y {found}"
        )
    half, one = spectra.new_tensor(0.5), spectra.new_ones(())
    illumination = pyro.sample("illumination", dist.Uniform(half, one + half))
    shares = pyro.sample("shares", dist.Dirichlet(spectra.new_ones(spectra.shape[1])))
    noise_scale = pyro.sample("noise_scale", dist.Exponential(one))
    with pyro.plate("data", len(spectra)):
        pyro.sample("y", dist.Normal(illumination * _linear(shares, spectra), noise_scale), obs=y)


# -- exact moments --------------------------------------------------------------------------------
#
# Most of these posteriors are Gaussian once one to three hyperparameters are given: then mean and
# standard deviation are integrals over a grid of these alone. On a smooth density that vanishes
# at both ends the trapezoidal rule, a plain sum, converges faster than any power of the spacing.


def _mixture(log_weight: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sd of a mixture of G parts with moments [G, *shape]."""
    weight = torch.softmax(log_weight, 0).reshape(-1, *[1] * (mean.dim() - 1))
    total = (weight * mean).sum(0)
    return total, (weight * (variance + (mean - total) ** 2)).sum(0).sqrt()


def _point(log_weight: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sd of a quantity that the grid point determines, ``value`` [G]."""
    return _mixture(log_weight, value, torch.zeros_like(value))


def _box(
    log_density: Callable[[Tensor], Tensor], start: Tensor, half_width: float, num: int = 21
) -> tuple[Tensor, Tensor]:
    """Find where a density has its mass; return a grid there [G, H] and log densities [G].

    The grid moves to the mean that it finds, and narrows to 8 standard deviations either side: no
    more than right for a density that is not far from a Gaussian.
    """
    center, half = start, torch.full_like(start, half_width)
    unit = torch.cartesian_prod(*[torch.linspace(-1, 1, num, dtype=start.dtype)] * len(start))
    for _ in range(6):
        grid = center + half * unit.reshape(-1, len(start))
        values = log_density(grid)
        center, sd = _mixture(values, grid, torch.zeros_like(grid))
        half = torch.maximum(8 * sd, 2 * half / (num - 1))
    return grid, values


def _linear_moments(x: Tensor, y: Tensor) -> Moments:
    """Given σ, intercept and coefficients are Gaussian; σ lies on a grid of its logarithm."""
    x, y = x.double(), y.double()
    design = torch.cat([x.new_ones(len(x), 1), x], 1)
    # In the eigenbasis of the Gram matrix every σ costs a sum.
    eigenvalues, basis = torch.linalg.eigh(design.T @ design)
    projected = basis.T @ (design.T @ y)

    def given(noise_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [G, P] and variance [G, P] in the eigenbasis, for σ [G, 1]."""
        precision = eigenvalues / noise_scale**2 + 1 / 2.5**2
        return projected / noise_scale**2 / precision, 1 / precision

    def log_density(log_noise: Tensor) -> Tensor:
        noise_scale = log_noise.exp()
        mean, variance = given(noise_scale)
        fit = (projected * mean).sum(-1)
        log_determinant = variance.log().sum(-1)
        residual = (y @ y - fit) / noise_scale[:, 0] ** 2
        prior = log_noise[:, 0] - noise_scale[:, 0]
        return prior - len(y) * log_noise[:, 0] + (log_determinant - residual) / 2

    grid, log_weight = _box(log_density, y.std().log().reshape(1), 4.0, num=201)
    mean, variance = given(grid.exp())
    covariance = (basis * variance[:, None]) @ basis.T
    mean, sd = _mixture(log_weight, mean @ basis.T, covariance.diagonal(dim1=-2, dim2=-1))
    return {
        "intercept": (mean[0], sd[0]),
        "coefficients": (mean[1:], sd[1:]),
        "noise_scale": _point(log_weight, grid[:, 0].exp()),
    }


def _schools_moments(
    y: Tensor, sigma: Tensor, mu_scale: float, tau: Tensor, log_prior: Tensor, effect: str
) -> Moments:
    """Given τ, μ and the effects of the schools are Gaussian.

    Args:
        y: Effects [J].
        sigma: Standard errors [J].
        mu_scale: Standard deviation of μ under its prior.
        tau: Grid of τ [G].
        log_prior: Log density of the grid under the prior of τ [G].
        effect: Site of the effects: θ itself, or the standard normal η of θ = μ + τ η.
    """
    # y_j ~ N(μ, v_j) with the effect integrated out, v_j = σ_j² + τ².
    variance = sigma**2 + tau[:, None] ** 2
    mu_precision = (1 / variance).sum(-1) + mu_scale**-2
    mu_mean = (y / variance).sum(-1) / mu_precision
    residual = (y**2 / variance).sum(-1) - mu_mean**2 * mu_precision
    log_weight = log_prior - (residual + variance.log().sum(-1) + mu_precision.log()) / 2
    # θ_j given μ is N(μ + k_j (y_j − μ), k_j σ_j²) with k_j = τ² / v_j; η_j = (θ_j − μ) / τ, in
    # which τ cancels.
    if effect == "theta":
        gain = tau[:, None] ** 2 / variance
        mean = gain * y + (1 - gain) * mu_mean[:, None]
        spread = gain * sigma**2 + (1 - gain) ** 2 / mu_precision[:, None]
    else:
        gain = tau[:, None] / variance
        mean = gain * (y - mu_mean[:, None])
        spread = sigma**2 / variance + gain**2 / mu_precision[:, None]
    return {
        "mu": _mixture(log_weight, mu_mean, 1 / mu_precision),
        "tau": _point(log_weight, tau),
        effect: _mixture(log_weight, mean, spread),
    }


def _avb_moments(y: Tensor, sigma: Tensor) -> Moments:
    tau = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    return _schools_moments(y.double(), sigma.double(), 1.0, tau, -(tau**2) / 2, "eta")


def _gelman_moments(effect: str) -> Callable[[Tensor, Tensor], Moments]:
    def moments(y: Tensor, sigma: Tensor) -> Moments:
        log_tau = torch.linspace(-25, 10, 4001, dtype=torch.float64)
        tau = log_tau.exp()
        log_prior = log_tau - torch.log1p((tau / 5) ** 2)
        return _schools_moments(y.double(), sigma.double(), 5.0, tau, log_prior, effect)

    return moments


def _gaussian_moments(precision: Tensor) -> Moments:
    covariance = torch.linalg.inv(precision.double())
    return {"x": (covariance.new_zeros(len(covariance)), covariance.diagonal().sqrt())}


def _hierarchical_moments(group: Tensor, x: Tensor, y: Tensor, num_groups: int) -> Moments:
    """Given the three scales all is Gaussian, and the groups are independent given both means.

    With u_i = (1, x_i) the line of group j has the prior N(m, diag(s²)), s = (s_a, s_b). All 2 × 2
    matrices of all groups at all grid points are one tensor [G, J, 2, 2].
    """
    x, y = x.double(), y.double()
    features = torch.stack([torch.ones_like(x), x], -1)
    gram = x.new_zeros(num_groups, 2, 2).index_add(
        0, group, features[:, :, None] * features[:, None]
    )
    moment = x.new_zeros(num_groups, 2).index_add(0, group, features * y[:, None])
    identity = torch.eye(2, dtype=x.dtype)

    def given(log_scales: Tensor) -> tuple[Tensor, ...]:
        """Return what is known of means and lines at the grid points [G, 3] of log (s_a, s_b, σ).

        That is the log density; mean [G, 2] and covariance [G, 2, 2] of m; and for z_j, where the
        line is m + s z_j: its mean [G, J, 2] = offset − slope m, the slope [G, J, 2, 2], and its
        variance given m [G, J, 2].
        """
        scales = log_scales.exp()
        s, noise = scales[:, None, :2], scales[:, 2, None, None]
        # z_j given m is Gaussian with precision T_j = I + s Gram_j s / σ².
        inner = identity + s[..., None] * gram * s[..., None, :] / noise[..., None] ** 2
        covariance = torch.linalg.inv(inner)
        offset = (covariance @ (s * moment / noise**2)[..., None])[..., 0]
        coupling = s[..., None] * gram / noise[..., None] ** 2
        slope = covariance @ coupling
        precision = identity / 2.5**2 + (gram / noise[..., None] ** 2 - coupling.mT @ slope).sum(1)
        linear = (moment / noise**2 - (coupling.mT @ offset[..., None])[..., 0]).sum(1)
        mean_covariance = torch.linalg.inv(precision)
        mean = (mean_covariance @ linear[..., None])[..., 0]
        fit = ((s * moment / noise**2) * offset).sum((1, 2)) + (linear * mean).sum(-1)
        log_determinant = inner.logdet().sum(-1) + precision.logdet()
        log_density = (
            (log_scales - scales**2 / 2).sum(-1)  # the half-normal priors, in the logarithm
            - len(y) * log_scales[:, 2]
            - (y @ y / scales[:, 2] ** 2 - fit + log_determinant) / 2
        )
        spread = covariance.diagonal(dim1=-2, dim2=-1)
        return log_density, mean, mean_covariance, offset, slope, spread

    start = x.new_tensor([-0.5, -0.5, -0.5])
    grid, log_weight = _box(lambda points: given(points)[0], start, 4.0)
    _, mean, covariance, offset, slope, spread = given(grid)
    raw_mean = offset - (slope @ mean[:, None, :, None])[..., 0]
    through_mean = (slope @ covariance[:, None] * slope).sum(-1)
    loc, loc_sd = _mixture(log_weight, mean, covariance.diagonal(dim1=-2, dim2=-1))
    raw, raw_sd = _mixture(log_weight, raw_mean, spread + through_mean)
    scales = [_point(log_weight, grid[:, k].exp()) for k in range(3)]
    return {
        "intercept_loc": (loc[0], loc_sd[0]),
        "intercept_scale": scales[0],
        "slope_loc": (loc[1], loc_sd[1]),
        "slope_scale": scales[1],
        "noise_scale": scales[2],
        "intercept_raw": (raw[:, 0], raw_sd[:, 0]),
        "slope_raw": (raw[:, 1], raw_sd[:, 1]),
    }


def _process_moments(x: Tensor, y: Tensor) -> Moments:
    """Sum over a grid of the three logarithms; one eigenbasis serves a whole lengthscale."""
    x, y = x.double(), y.double()
    squared_distance = (x[:, None] - x) ** 2

    def log_density(grid: Tensor) -> Tensor:
        lengthscale, which = grid[:, 1].unique(return_inverse=True)
        kernel = torch.exp(-squared_distance / (2 * lengthscale.exp()[:, None, None] ** 2))
        eigenvalues, basis = torch.linalg.eigh(kernel)
        projected = (y @ basis) ** 2
        scales = (2 * grid).exp()  # the squares
        variance = scales[:, :1] * eigenvalues[which].clamp(min=0) + scales[:, 2:]
        prior = -(grid**2).sum(-1) / 2
        return prior - (projected[which] / variance + variance.log()).sum(-1) / 2

    grid, log_weight = _box(log_density, x.new_zeros(3), 3.0)
    sites = ("amplitude", "lengthscale", "noise_scale")
    return {site: _point(log_weight, grid[:, k].exp()) for k, site in enumerate(sites)}


def _funnel_moments(scale: Tensor, dim: int) -> Moments:
    scale = scale.double()
    raw = scale.new_zeros(dim - 1)
    return {"y": (torch.zeros_like(scale), scale), "x_raw": (raw, torch.ones_like(raw))}


# -- the registry ---------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """A model, its data, and what is known of the posterior.

    Attributes:
        model: The Pyro model.
        data: The function (dtype, seed) → arguments of the model. Real data have no seed and
            ignore it.
        mean_sd: The function of the model's arguments that returns, by latent site, its exact
            mean and standard deviation in float64, each of the site's shape; ``None`` where
            neither a formula nor a quadrature is at hand.
    """

    model: Callable[..., None]
    data: Callable[[torch.dtype, int], tuple]
    mean_sd: Callable[..., Moments] | None = None


def _real(*data: Tensor) -> Callable[[torch.dtype, int], tuple]:
    return lambda dtype, seed: tuple(value.to(dtype) for value in data)


def _simulated(simulate: Callable[..., tuple]) -> Callable[[torch.dtype, int], tuple]:
    return lambda dtype, seed: simulate(dtype=dtype, seed=seed)


POSTERIORS: dict[str, Posterior] = {
    "eight_schools_centered": Posterior(
        eight_schools_centered, _real(Y_GELMAN, SIGMA_GELMAN), _gelman_moments("theta")
    ),
    "eight_schools_noncentered": Posterior(
        eight_schools_noncentered, _real(Y_GELMAN, SIGMA_GELMAN), _gelman_moments("theta_trans")
    ),
    "eight_schools_avb": Posterior(eight_schools_avb, _real(Y_AVB, SIGMA_AVB), _avb_moments),
    "linear_regression": Posterior(
        linear_regression, _simulated(linear_regression_data), _linear_moments
    ),
    "logistic_regression": Posterior(logistic_regression, _simulated(logistic_regression_data)),
    "correlated_gaussian": Posterior(
        correlated_gaussian, _simulated(correlated_gaussian_data), _gaussian_moments
    ),
    "hierarchical_regression": Posterior(
        hierarchical_regression, _simulated(hierarchical_regression_data), _hierarchical_moments
    ),
    "gaussian_process": Posterior(
        gaussian_process, _simulated(gaussian_process_data), _process_moments
    ),
    "funnel_noncentered": Posterior(
        funnel_noncentered, lambda dtype, seed: (FUNNEL_SCALE.to(dtype), 10), _funnel_moments
    ),
    "bounded_and_simplex": Posterior(bounded_and_simplex, _simulated(bounded_and_simplex_data)),
}
