"""How log p(x|z) curves about one point z: Hessian, Gauss–Newton matrix, Jacobian columns.

All of it is taken by reverse-mode differentiation of *one* run of the model, so that dropout masks,
batch statistics and minibatch are those of the log-likelihood itself, and all of it can be
differentiated once more, for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributions as td
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .terms import NonFiniteError, Terms, TracePair, _base, _log_prob, _observed, describe
from .tracing import settled

__all__ = [
    "AtMean",
    "Expansion",
    "Output",
    "hessian",
    "jacobian",
    "join_coupled_points",
    "output_curvature",
]

_GAUSSIAN = td.Normal | td.MultivariateNormal | td.LowRankMultivariateNormal


class Output(NamedTuple):
    r"""What a decoder feeds to a distribution, and how sharply that peaks there.

    Attributes:
        params: The parameters g, tensors of the distribution.
        curvature: Takes vectors v [\*, \*g], one a parameter g, to W v of the same shapes, where
            :math:`W = -\nabla_g^2 \log p(x; g)` is positive semidefinite.
    """

    params: tuple[Tensor, ...]
    curvature: Callable[..., tuple[Tensor, ...]]


def output_curvature(fn: Any, x: Tensor) -> Output:
    r"""Return a distribution's parameters g and :math:`W = -\nabla_g^2 \log p(x; g)`.

    g is what the distribution was built with, so W, and with it the Gauss–Newton matrix, is that of
    the paper for each choice (its section 5.1 has probabilities):

    ====================================  ==============================  =========================
    family                                g                               W
    ====================================  ==============================  =========================
    Normal, LogNormal                     loc, scale                      1/s², 2/s²
    MultivariateNormal                    loc                             precision matrix
    Bernoulli                             logits                          σ(ℓ)(1 − σ(ℓ))
    Bernoulli                             probs                           1/(1 − x − g)²
    Binomial, Geometric,                  logits or probs                 likewise, counts of
    NegativeBinomial                                                      successes and failures
    ContinuousBernoulli                   logits                          Var x
    Categorical, OneHotCategorical        logits                          diag p − p pᵀ
    Categorical, OneHotCategorical        probs                           1/p_x² at x
    Poisson                               rate                            x/r²
    Exponential                           rate                            1/r²
    Gamma, Beta, Dirichlet                their natural parameters        Fisher information
    ====================================  ==============================  =========================

    For a Normal's scale W is that of the natural parameters (μ/s², −1/(2s²)), in which it is the
    Fisher information: in (μ, s) itself it would not be positive semidefinite.

    Args:
        fn: The distribution; Independent and MaskedDistribution around it are looked through.
        x: The observation.

    Raises:
        ValueError: For any other family.

    Example:
        >>> output = output_curvature(td.Bernoulli(logits=torch.zeros(2)), torch.ones(2))
        >>> output.curvature(torch.ones(2))
        (tensor([0.2500, 0.2500]),)
    """
    fn = _base(fn)
    if isinstance(fn, td.OneHotCategorical):
        fn, x = fn._categorical, x.argmax(-1)
    if isinstance(fn, td.LogNormal):
        fn = fn.base_dist
    for family, output in _FAMILIES.items():
        if isinstance(fn, family):
            return output(fn, x)
    known = sorted({family.__name__ for family in _FAMILIES} | {"LogNormal", "OneHotCategorical"})
    raise ValueError(f"found {type(fn).__name__}, expected one of {known}")


def _normal(fn: Any, x: Tensor) -> Output:
    w = fn.scale**-2
    return Output((fn.loc, fn.scale), lambda u, v: (w * u, 2 * w * v))


def _multivariate_normal(fn: Any, x: Tensor) -> Output:
    def curvature(v: Tensor) -> tuple[Tensor]:
        return (torch.cholesky_solve(v.unsqueeze(-1), fn.scale_tril).squeeze(-1),)

    return Output((fn.loc,), curvature)


def _diagonal(g: Tensor, w: Tensor) -> Output:
    return Output((g,), lambda v: (w * v,))


def _trials(fn: Any, successes: Tensor | float, failures: Tensor | float) -> Output:
    """Return that of successes · log p + failures · log(1 − p)."""
    from_probs, p = _built_with_probs(fn), fn.probs
    if from_probs:
        return _diagonal(p, successes / p**2 + failures / (1 - p) ** 2)
    return _diagonal(fn.logits, (successes + failures) * p * (1 - p))


def _categorical(fn: Any, x: Tensor) -> Output:
    from_probs, p = _built_with_probs(fn), fn.probs
    if from_probs:
        at_x = torch.nn.functional.one_hot(x.long(), p.shape[-1])
        return _diagonal(p, at_x / p**2)
    return Output((fn.logits,), lambda v: (p * (v - (p * v).sum(-1, keepdim=True)),))


def _gamma(fn: Any, x: Tensor) -> Output:
    a, b = fn.concentration, fn.rate
    return Output((a, b), lambda u, v: (_trigamma(a) * u - v / b, a / b**2 * v - u / b))


def _dirichlet(fn: Any, x: Tensor) -> Output:
    a = fn.concentration

    def curvature(v: Tensor) -> tuple[Tensor]:
        return (_trigamma(a) * v - _trigamma(a.sum(-1, True)) * v.sum(-1, True),)

    return Output((a,), curvature)


def _trigamma(a: Tensor) -> Tensor:
    return torch.polygamma(1, a)


def _built_with_probs(fn: Any) -> bool:
    if ("probs" in vars(fn)) != ("logits" in vars(fn)):
        return "probs" in vars(fn)
    return getattr(fn, "_param", fn.logits) is fn.probs  # one has been computed from the other


_FAMILIES: dict[type, Callable[[Any, Tensor], Output]] = {
    td.Normal: _normal,
    td.MultivariateNormal: _multivariate_normal,
    td.Bernoulli: lambda fn, x: _trials(fn, x, 1 - x),
    td.Binomial: lambda fn, x: _trials(fn, x, fn.total_count - x),
    td.Geometric: lambda fn, x: _trials(fn, 1.0, x),
    td.NegativeBinomial: lambda fn, x: _trials(fn, x, fn.total_count),
    td.ContinuousBernoulli: lambda fn, x: _diagonal(fn.logits, fn.variance),
    td.Categorical: _categorical,
    td.Poisson: lambda fn, x: _diagonal(fn.rate, x / fn.rate**2),
    td.Exponential: lambda fn, x: _diagonal(fn.rate, fn.rate**-2),
    td.Gamma: _gamma,
    td.Beta: lambda fn, x: _dirichlet(fn._dirichlet, x),
    td.Dirichlet: _dirichlet,
}


# --- differentiation -----------------------------------------------------------------------------

Points = Callable[[Sequence[Tensor]], Tensor]


def hessian(log_likelihood: Tensor, values: Sequence[Tensor], points: Points) -> Tensor:
    r"""Return :math:`\nabla_z^2 \log p(x|z)` of N independent data points [N, d, d].

    Args:
        log_likelihood: log p(x|z) [N] or any shape that sums over the same; the data points must
            not depend on one another's latents.
        values: The latents, tensors of any shape that ``log_likelihood`` was computed from.
        points: Brings tensors of the shapes of ``values`` to [N, d].

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> hessian(-(z[:, 0] ** 2) * z[:, 1], [z], lambda values: values[0]).tolist()
        [[[-4.0, -2.0], [-2.0, 0.0]]]
    """
    gradient = points(_grad(log_likelihood, values))
    rows = [points(_grad(gradient[:, i], values)) for i in range(gradient.shape[-1])]
    return torch.stack(rows, -2)


def jacobian(
    outputs: Sequence[Tensor],
    values: Sequence[Tensor],
    points: Points,
    columns: Sequence[int] | Tensor,
) -> list[Tensor]:
    r"""Return columns of the Jacobian of each output, of N independent data points.

    One column is one Jacobian–vector product. It is taken by differentiating the vector–Jacobian
    product :math:`u \mapsto u^T J`, linear in u, once more, in u.

    Args:
        outputs: Tensors of any shape, such as the parameters of an observed distribution.
        values: The latents that they were computed from.
        points: Brings tensors of the shapes of ``values`` to [N, d].
        columns: Which of the d latents, k of them: numbers, or a tensor of them [k].

    Returns:
        For each output a tensor [k, *output]: the derivative by a data point's own latent.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> square, total = jacobian([z**2, z.sum(-1)], [z], lambda values: values[0], [1])
        >>> square.tolist(), total.tolist()
        ([[[0.0, 4.0]]], [[1.0]])
    """
    u = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    uJ = points(_grad(outputs, values, u))  # [N, d]
    columns = torch.as_tensor(columns, device=uJ.device)
    by_column = [_grad(column, u) for column in uJ.index_select(1, columns).unbind(1)]
    return [torch.stack(column) for column in zip(*by_column, strict=True)]


def _grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the differentiable gradient of the sum of ``outputs``, weighted, by each input."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    weights = [torch.ones_like(output) for output in outputs] if weights is None else weights
    reached = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if reached:
        outputs, weights = zip(*reached, strict=True)
        grads = torch.autograd.grad(outputs, inputs, weights, create_graph=True, allow_unused=True)
    pairs = zip(grads, inputs, strict=True)
    return [torch.zeros_like(i) if grad is None else grad for grad, i in pairs]


def _depends(output: Tensor, inputs: Sequence[Tensor]) -> bool:
    if not inputs or not output.requires_grad:
        return False
    grads = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)


# --- one run of model and guide ------------------------------------------------------------------


class AtMean(Messenger):
    """Set each latent site to the mean of its distribution, instead of sampling it.

    Values that are given, observed or replayed, stay as they are.

    Raises:
        ValueError: If a distribution has no mean in closed form, or a density that is learned.
        NonFiniteError: If a mean is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> with AtMean():
        ...     pyro.sample("z", dist.Normal(3.0, 1.0)).item()
        3.0
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        mean = _mean(msg["fn"])
        if mean is None:
            raise ValueError(
                f"guide site {msg['name']!r}: log p(x|z) is expanded about the guide's mean, and "
                "nothing else of the guide's shape plays a part; expected a distribution with a "
                f"mean in closed form, such as Normal, found {type(_base(msg['fn'])).__name__}. A "
                "guide that is known by its samples, implicit or a flow, needs a loss that samples"
            )
        if not settled(lambda: mean.isfinite().all()):
            raise NonFiniteError(
                f"guide site {msg['name']!r}: expected a finite mean, found "
                f"{int((~mean.isfinite()).sum())} of {mean.numel()} numbers of the mean of "
                f"{type(_base(msg['fn'])).__name__} not finite"
            )
        # A node of its own, so that derivatives are along this site and no other way.
        value = mean.clone()
        msg["value"] = value if value.requires_grad else value.requires_grad_()
        msg["done"] = True


def join_coupled_points(pair: TracePair) -> TracePair:
    """Take data points that an observed site couples as one.

    Regression weights in a plate of their own are not data points, though that plate holds all the
    latents: each observation depends on all of them.

    Args:
        pair: A run of model and guide, whose latents require gradients. It is changed: the plates
            that do not hold all observed sites which depend on the latents are taken from a latent
            site, so that :class:`~pyro_vae.terms.Terms` does not count them as data plates.
    """
    first, *others = (pair.model.nodes[name] for name in pair.model.stochastic_nodes)
    values = [site["value"] for site in (first, *others)]
    plates = list(first["cond_indep_stack"])
    for site in _observed(pair.model):
        outside = [plate for plate in plates if plate not in site["cond_indep_stack"]]
        if outside and _depends(_log_prob(site), values):
            plates = [plate for plate in plates if plate not in outside]
    first["cond_indep_stack"] = tuple(plates)
    return pair


class Expansion:
    r"""Second-order expansion of log p(x|z) about the latents h of one run.

    .. math:: \log p(x|z) \approx f_x(h) + \nabla f_x(h)^T (z - h)
        + \tfrac12 (z - h)^T H (z - h)

    N and d are those of the :class:`~pyro_vae.terms.Terms`: data points, and the latents of each,
    all sites and inner plates together. Where no plate holds all latents, N is 1 and d their
    number.

    Args:
        terms: Of one run, whose latents require gradients (see :class:`AtMean` and
            :func:`join_coupled_points`).
        who: The loss to name in errors.

    Attributes:
        h: The latents [N, d].
        kl_scale: What ``poutine.scale`` around the latents alone makes of their KL.

    Raises:
        ValueError: If the prior is no standard normal, or depends on another latent; if latents
            are masked otherwise than by data point, or scaled unlike one another; if an observed
            site outside the data plates depends on latents.
    """

    def __init__(self, terms: Terms, who: str) -> None:
        self.terms = terms
        self.who = who
        model, guide = terms.pairs[0]
        self._latents = [model.nodes[name] for name in terms.latents]
        self._guide_fns = [guide.nodes[name]["fn"] for name in terms.latents]
        self._observed = [site for site in _observed(model) if terms._is_data(site)]
        self.values = [site["value"] for site in self._latents]
        self.kl_scale = self._same_scale([guide.nodes[name] for name in terms.latents])
        self._check()
        self.h = self.points(self.values)

    @cached_property
    def hessian(self) -> Tensor:
        """H [N, d, d], exact."""
        return hessian(self.terms.log_likelihood[0], self.values, self.points)

    def gauss_newton(self, columns: Sequence[int] | Tensor | None = None) -> Tensor:
        r"""Return :math:`J^T W J` [N, k, k] for k columns of J, or for all d of them.

        J is the Jacobian of the observed distributions' parameters; see :func:`output_curvature`
        for these and for W. It is −H where they are linear or piecewise linear in z.

        Raises:
            ValueError: If the family of an observed site is unknown, or the latents reach it by a
                parameter that :func:`output_curvature` does not have.
        """
        if columns is None:
            columns = range(self.h.shape[-1])
        gram = self.h.new_zeros(len(self.h), len(columns), len(columns))
        outputs = [self._output(site) for site in self._observed]
        params = [g for output in outputs for g in output.params]
        J = iter(jacobian(params, self.values, self.points, columns))
        for site, output in zip(self._observed, outputs, strict=True):
            own = [next(J) for _ in output.params]  # each [k, *g]
            for a, b in zip(own, output.curvature(*own), strict=True):
                factors = self._by_point(a, site), self._by_point(b, site)
                gram = gram + torch.einsum("nik,nil->nkl", *factors)
        return gram

    def covariance(self) -> Tensor:
        r"""Return Σ [N, d, d] of the guide's Gaussian sites.

        Raises:
            ValueError: If a site is not Gaussian, or depends on another latent.
        """
        for name, fn, own in zip(self.terms.latents, self._guide_fns, self.values, strict=True):
            if not isinstance(_base(fn), _GAUSSIAN):
                raise ValueError(
                    f"{self.who} takes Σ from the guide: expected Normal or MultivariateNormal at "
                    f"guide site {name!r}, found {describe(fn)}"
                )
            others = [value for value in self.values if value is not own]
            if _depends(fn.mean, others) or _depends(fn.variance, others):
                raise ValueError(
                    f"{self.who}: expected guide sites independent of one another, found "
                    f"{name!r} to depend on another latent; sample the two as one site"
                )
        columns = []
        for i in range(self.h.shape[-1]):  # Σ e_i, in the shapes of the sites
            unit = _grad(self.h[:, i], self.values)
            column = [_times(_base(fn), u) for fn, u in zip(self._guide_fns, unit, strict=True)]
            columns.append(self.points(column))
        return torch.stack(columns, -1)

    def points(self, values: Sequence[Tensor]) -> Tensor:
        """Bring tensors of the shapes of the latent sites to [N, d]."""
        parts = [
            self.terms._to_points(value, site, site["fn"].event_dim)[0].reshape(
                self.terms.num_points, -1
            )
            for value, site in zip(values, self._latents, strict=True)
        ]
        return torch.cat(parts, -1)

    def _output(self, site: dict) -> Output:
        """Return a site's parameters that depend on the latents, with its mask and scale in W."""
        name, fn, x = site["name"], site["fn"], site["value"]
        if x.shape[x.dim() - fn.event_dim :] != fn.event_shape:
            raise ValueError(
                f"observed site {name!r}: found a value of shape {list(x.shape)}, expected event "
                f"shape {list(fn.event_shape)}, that of its distribution"
            )
        batch = _batch_shape(site)
        fn = fn if batch == fn.batch_shape else fn.expand(batch)
        try:
            params, curvature = output_curvature(fn, x)
        except ValueError as error:
            if not _depends(_log_prob(site), self.values):  # a penalty on weights, say
                return Output((), lambda: ())
            raise ValueError(
                f"{self.who}: the Gauss–Newton curvature of observed site {name!r} is not known: "
                f'{error}, or curvature="hessian"'
            ) from error
        base = _base(fn)
        for key in base.arg_constraints:
            value = vars(base).get(key)
            if key in ("probs", "logits") or any(value is g for g in params):
                continue
            if isinstance(value, Tensor) and _depends(value, self.values):
                raise ValueError(
                    f"{self.who}: the latents reach {key!r} of observed site {name!r}, found a "
                    f'{describe(fn)}; expected other parameters alone, or curvature="hessian"'
                )
        weights = [(self.terms._factor(site), batch), *_masks(fn)]
        weights += [] if site["mask"] is None else [(site["mask"], batch)]

        def weighted(*v: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                prod(_like(weight, shape, g) for weight, shape in weights) * curved
                for g, curved in zip(params, curvature(*v), strict=True)
            )

        return Output(params, weighted)

    def _by_point(self, columns: Tensor, site: dict) -> Tensor:
        """Bring columns [k, *g] of an observed site's parameter to [N, *, k]."""
        event_dim = columns.dim() - len(_batch_shape(site))
        points = self.terms._to_points(columns.movedim(0, -1), site, event_dim)
        return points.reshape(self.terms.num_points, -1, len(columns))

    def _same_scale(self, guide_sites: list[dict]) -> float | Tensor:
        factors = [self.terms._factor(site) for site in (*self._latents, *guide_sites)]
        first = torch.as_tensor(factors[0])
        if first.dim() or not settled(
            lambda: all(first.equal(torch.as_tensor(other)) for other in factors)
        ):
            raise ValueError(
                f"{self.who}: expected one scale, a number, for the latent sites "
                f"{list(self.terms.latents)} in model and guide, found {factors}"
            )
        return factors[0]

    def _check(self) -> None:
        self.terms.check_standard_normal(self.who)
        for site in self._latents:
            name, fn = site["name"], site["fn"]
            if _depends(fn.mean, self.values) or _depends(fn.variance, self.values):
                raise ValueError(
                    f"{self.who} needs a standard normal prior at site {name!r}, found one that "
                    "depends on another latent"
                )
            if _masks(fn) or not self._is_masked_by_point(site):
                raise ValueError(
                    f"{self.who}: found site {name!r} masked, expected a mask of data points by "
                    "poutine.mask around all sites of model and guide"
                )
        if _depends(self.terms.shared, self.values):
            raise ValueError(
                f"{self.who}: expected the observed sites that depend on the latents in the data "
                f"plates {[plate.name for plate in self.terms.plates]}, found one outside"
            )

    def _is_masked_by_point(self, site: dict) -> bool:
        """Say whether a site is masked as the data points are, if at all."""
        mask, present = site["mask"], self.terms.present
        if mask is None or present is None:
            return mask is None
        points = torch.as_tensor(mask, device=present.device).expand(_batch_shape(site))
        points = self.terms._to_points(points, site, 0)[0].reshape(len(present), -1)
        return settled(lambda: (points == present.unsqueeze(-1)).all())


def _mean(fn: Any) -> Tensor | None:
    if getattr(_base(fn), "learned_density", False):
        return None
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None


def _batch_shape(site: dict) -> torch.Size:
    fn, x = site["fn"], site["value"]
    return torch.broadcast_shapes(fn.batch_shape, x.shape[: x.dim() - fn.event_dim])


def _like(weight: Any, shape: torch.Size, g: Tensor) -> Tensor:
    """Bring a weight of a distribution's batch to where it multiplies the parameter g."""
    weight = torch.as_tensor(weight, device=g.device).expand(shape)
    return weight.reshape(weight.shape + (1,) * (g.dim() - weight.dim()))


def _masks(fn: Any) -> list[tuple[Tensor | bool, torch.Size]]:
    """Return the masks around a distribution, and the shapes that they have or expand to."""
    masks = []
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.batch_shape))
        fn = fn.base_dist
    return masks


def _times(fn: Any, v: Tensor) -> Tensor:
    """Return Σ v of a Gaussian, v [*batch, *event]."""
    if isinstance(fn, td.Normal):
        return fn.variance * v
    return (fn.covariance_matrix @ v.unsqueeze(-1)).squeeze(-1)
