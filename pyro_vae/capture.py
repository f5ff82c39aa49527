"""From a Pyro program to tensor operations.

Pyro's effect handlers are plain Python: once a *static* model has run, only tensor operations are
left of it. :class:`UnconstrainedModel` turns a model with its data into a log density over one
unconstrained vector, batched by :func:`torch.vmap`; :func:`capture` turns any function of tensors,
such a density or its gradient, into one graph and compiles it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor, nn
from torch.distributions import Transform, biject_to
from torch.distributions import transform_to as torch_transform_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["LatentSite", "UnconstrainedModel", "capture"]

# Half the width of the interval, in unconstrained space, from which a start is drawn where the
# prior cannot be sampled; the value used by Stan and Pyro.
_INIT_RADIUS = 2.0

# Runs far from the prior that look for dependences which no gradient shows.
_WIDE_PROBES = 20


class LatentSite(NamedTuple):
    """One latent site of a model, and its place in the unconstrained vector.

    Attributes:
        name: The name of the ``pyro.sample`` statement.
        shape: Shape of its value, batch and event.
        unconstrained_shape: Shape of the value in unconstrained space.
        event_dim: Number of event dimensions of its distribution.
        transform: The bijection from the real numbers to its support. Where the support depends
            on other latents (``Uniform(0, x)``), the one of the model's first run.
        slice: Where the site lies in the unconstrained vector.
        dtype: Data type of its value.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    event_dim: int
    transform: Transform
    slice: slice
    dtype: torch.dtype


class _Substitute(Messenger):
    """Set latent sites by ``choose(name, fn)``, observed sites and parameters from tables."""

    def __init__(
        self,
        choose: Callable[[str, Any], Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.choose = choose
        self.observed = observed or {}
        self.params = params or {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"]:
            if msg["name"] in self.observed:
                msg["value"] = self.observed[msg["name"]]
        elif msg["value"] is None:
            msg["value"] = self.choose(msg["name"], msg["fn"])

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]
            msg["done"] = True


@contextmanager
def _private_params() -> Iterator[None]:
    """Remove from the parameter store what a run of the model added to it."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - before:
            del store[name]


@contextmanager
def _private_random_state() -> Iterator[None]:
    """Leave torch's random number generators as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _validation(enabled: bool) -> Iterator[None]:
    """Switch validation on or off, in Pyro and in torch, and leave both as they were.

    The two can differ: a library may switch off torch's alone, as Zuko does when it is imported.
    """
    default = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(enabled):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(default)


def _no_validation() -> AbstractContextManager[None]:
    """Switch off validation, whose value-dependent branches no tensor program can follow."""
    return _validation(False)


@contextmanager
def _no_vmap_warning() -> Iterator[None]:
    """Silence torch's remark that an operation is looped over rather than batched."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        yield


def _is_improper(site: Mapping[str, Any]) -> bool:
    """Whether a latent site contributes nothing to the density, so that it has no prior."""
    fn = site["fn"]
    if site["mask"] is False:
        return True
    while fn is not None:
        if type(fn).__name__ == "ImproperUniform" or getattr(fn, "_mask", None) is False:
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def _same(a: Any, b: Any) -> bool:
    """Compare two distributions, constraints or containers by the tensors that they hold."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.shape == b.shape
            and (a is b or bool(torch.equal(a, b)))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    known = (torch.distributions.Distribution, torch.distributions.constraints.Constraint)
    if isinstance(a, known) or type(a).__module__.startswith("pyro."):
        return a is b or _same(vars(a), vars(b))
    if isinstance(a, (int, float, bool, str, type(None), Transform)):
        return bool(a == b)
    return a is b


def _tracked(a: Any) -> bool:
    """Whether autograd tracks any tensor that a distribution, constraint or container holds."""
    if isinstance(a, Tensor):
        return a.requires_grad
    if isinstance(a, (list, tuple)):
        return any(map(_tracked, a))
    if isinstance(a, dict):
        return any(map(_tracked, a.values()))
    known = (torch.distributions.Distribution, torch.distributions.constraints.Constraint)
    if isinstance(a, (*known, Transform)) or type(a).__module__.startswith("pyro."):
        return any(_tracked(value) for value in vars(a).values() if value is not a)
    return False


def _describe(shape: Any) -> str:
    return str(list(shape))


class UnconstrainedModel:
    r"""Turn a Pyro model and its data into a log density over one unconstrained vector.

    With :math:`\theta = T(z)` the latent sites and :math:`T` the bijection from
    :math:`\mathbb{R}^d` to their supports,

    .. math:: \log p(x, z) = \log p(x, T(z)) + \log |\det \partial T / \partial z|.

    The model runs twice when the object is made, to learn its structure; it must be *static*: the
    same sites with the same shapes whatever the values. Scales, masks, ``pyro.factor``, plates,
    constrained and dependent supports and improper priors are respected; parameters keep the
    values that they have then. Where an observed value is missing (NaN) under a mask, a draw from
    its distribution stands in for it, so that gradients stay finite.

    No global state is changed, neither the parameter store nor the random number generators nor
    the validation settings. Only :meth:`sample_prior` and :meth:`initial` consume random numbers.

    Args:
        model: A Pyro model, whose latent sites are continuous.
        args: Its positional arguments, the data.
        kwargs: Its keyword arguments.

    Attributes:
        sites: The latent sites by name, in the order of the model, as :class:`LatentSite`.
        observed: The observed values by name, without ``pyro.factor`` and deterministic sites.
        dim: Length d of the unconstrained vector.
        dtype: Common data type of latent and observed values.
        device: Device of the latent values.

    Raises:
        ValueError: If a latent site is discrete, a plate is subsampled, an observation is NaN or
            outside its support, there is no latent site, or the structure depends on the values.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> density = UnconstrainedModel(model, (torch.tensor([0.5, -1.0]),))
        >>> density.log_density(torch.zeros(3, density.dim))
        tensor([-3.3818, -3.3818, -3.3818])
        >>> density.constrain(torch.zeros(density.dim))
        {'scale': tensor(1.)}
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self._params: dict[str, Tensor] = {}
        self._substitutes: dict[str, Tensor] = {}
        self._batched = True
        with torch.no_grad(), _private_random_state(), _private_params():
            with _validation(pyro.distributions.is_validation_enabled()):
                trace = self._run(self._from_prior)
            self._params = {
                name: site["value"].detach().clone()
                for name, site in trace.nodes.items()
                if site["type"] == "param"
            }
            self._check_latents(trace)
            with _no_validation():
                again = self._run(self._from_prior)
                self._check_static(trace, again)
                self._check_observed(trace, again)
                probes = [again, *self._probe()]

        self.sites: dict[str, LatentSite] = {}
        start = 0
        for name, site in self._latents(trace).items():
            shape = site["value"].shape
            transform = biject_to(site["fn"].support)
            unconstrained_shape = torch.Size(transform.inverse_shape(shape))
            stop = start + unconstrained_shape.numel()
            self.sites[name] = LatentSite(
                name=name,
                shape=shape,
                unconstrained_shape=unconstrained_shape,
                event_dim=site["fn"].event_dim,
                transform=transform,
                slice=slice(start, stop),
                dtype=site["value"].dtype,
            )
            start = stop
        self.dim = start
        latents = self._latents(trace)

        def varies(name: str, of: Callable[[Any], Any]) -> bool:
            """Whether something of a latent site depends on the values of the others."""
            found = [of(self._latents(probe)[name]["fn"]) for probe in probes]
            return any(_tracked(x) or not _same(of(latents[name]["fn"]), x) for x in found)

        self._improper = {name for name, site in latents.items() if _is_improper(site)}
        self._dynamic_support = any(varies(name, lambda fn: fn.support) for name in latents)
        # Distributions that depend on no other latent are sampled at once, without the model.
        self._roots = {
            name: site["fn"]
            for name, site in latents.items()
            if name not in self._improper and not varies(name, lambda fn: fn)
        }
        self.observed: dict[str, Tensor] = {
            name: site["value"]
            for name, site in self._observed(trace).items()
            if not site_is_factor(site)
        }
        values = [site["value"] for site in latents.values()]
        values += [value for value in self.observed.values() if value.is_floating_point()]
        self.dtype: torch.dtype = values[0].dtype
        for value in values:
            self.dtype = torch.promote_types(self.dtype, value.dtype)
        self.device: torch.device = values[0].device

    @property
    def size(self) -> int:
        """How many numbers one evaluation is over, latent and observed."""
        return self.dim + sum(value.numel() for value in self.observed.values())

    # -- the model's structure --------------------------------------------------------------

    def _run(self, choose: Callable[[str, Any], Tensor | None]) -> Any:
        """Run the model once with the latent sites that ``choose`` returns; return its trace."""
        substitute = _Substitute(choose, self._substitutes, self._params)
        with poutine.block(), poutine.trace() as tracer, substitute:
            self.model(*self.args, **self.kwargs)
        return tracer.trace

    def _probe(self) -> list[Any]:
        """Run the model at latent values that autograd tracks, to see what depends on them.

        One run is at prior draws; the others far and wide, for what depends on values through a
        comparison, or through a function that is constant where the prior lies.
        """

        def tracked(name: str, fn: Any) -> Tensor:
            value = self._from_prior(name, fn)
            assert value is not None
            return value.detach().clone().requires_grad_(value.is_floating_point())

        def wide(name: str, fn: Any) -> Tensor:
            value = tracked(name, fn)
            transform = biject_to(fn.support)
            value = transform(5 * torch.randn_like(transform.inv(value)))
            return value.detach().requires_grad_(True)

        probes = []
        with torch.enable_grad():
            probes.append(self._run(tracked))
            for _ in range(_WIDE_PROBES):
                # No density so far out, such as a covariance that is singular, says nothing.
                with suppress(ValueError, RuntimeError, ArithmeticError):
                    probes.append(self._run(wide))
        return probes

    @staticmethod
    def _from_prior(name: str, fn: Any) -> Tensor | None:
        """Draw a latent value from its prior, or by its support if the prior has no sampler."""
        try:
            value: Tensor = fn.sample()
        except NotImplementedError:
            transform = torch_transform_to(fn.support)
            shape = transform.inverse_shape(fn.shape())
            tensors = [v for v in vars(fn.support).values() if isinstance(v, Tensor)]
            like = tensors[0] if tensors else torch.empty(())
            value = transform((torch.rand(shape).to(like) * 2 - 1) * _INIT_RADIUS)
        return value

    @staticmethod
    def _latents(trace: Any) -> dict[str, Any]:
        return {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }

    @staticmethod
    def _observed(trace: Any) -> dict[str, Any]:
        return {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and site["is_observed"]
            and not site_is_subsample(site)
            and not site["infer"].get("_deterministic")
        }

    def _check_latents(self, trace: Any) -> None:
        latents = self._latents(trace)
        if not latents:
            found = ", ".join(self._observed(trace)) or "none"
            raise ValueError(
                f"the model has no latent site; found only the observed sites: {found}; "
                "expected at least one pyro.sample statement without obs"
            )
        for name, site in latents.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"latent site {name!r} is discrete ({type(site['fn']).__name__}); expected "
                    "continuous latents: sum it out, for example by dist.MixtureSameFamily"
                )
        for name, site in trace.nodes.items():
            for frame in site.get("cond_indep_stack", ()):
                full = frame.full_size if frame.full_size is not None else frame.size
                if site["type"] == "sample" and frame.size != full:
                    raise ValueError(
                        f"site {name!r} lies in plate {frame.name!r}, which is subsampled: found "
                        f"{frame.size} of {full}; expected the whole plate, since a random part "
                        "of the data has no fixed posterior"
                    )

    def _check_static(self, trace: Any, again: Any) -> None:
        first = {n: _describe(s["value"].shape) for n, s in self._latents(trace).items()}
        second = {n: _describe(s["value"].shape) for n, s in self._latents(again).items()}
        if first != second:
            raise ValueError(
                "the latent sites depend on random values: one run of the model has "
                f"{first}, another {second}; expected the same sites and shapes in every run"
            )

    def _check_observed(self, validated: Any, trace: Any) -> None:
        """Check the observations; ``validated`` is a trace under the user's own settings."""
        for name, site in self._observed(trace).items():
            value, fn = site["value"], site["fn"]
            if not isinstance(value, Tensor):
                continue
            missing = torch.isnan(value) if value.is_floating_point() else torch.zeros(())
            log_prob = self._site_log_prob(site)
            if bool(missing.any()) or bool(torch.isnan(log_prob).any()):
                if bool(torch.isnan(log_prob).any()):
                    found = (
                        f"{int(missing.sum())} NaN of {value.numel()} values"
                        if bool(missing.any())
                        else "a log density of NaN"
                    )
                    raise ValueError(
                        f"observed site {name!r}: found {found}; expected numbers, or a mask over "
                        "the missing ones (pyro.poutine.mask, or .mask() of the distribution)"
                    )
                stand_in = fn.sample().expand(value.shape)
                self._substitutes[name] = torch.where(missing, stand_in, value)
            if getattr(validated.nodes[name]["fn"], "_validate_args", False):
                inside = fn.support.check(self._substitutes.get(name, value))
                outside = scale_and_mask((~inside).to(torch.float), mask=site["mask"])
                if bool(outside.any()) and not hasattr(fn, "_mask"):
                    raise ValueError(
                        f"observed site {name!r}: found {int(outside.sum())} values outside the "
                        f"support of {type(fn).__name__}; expected {fn.support}"
                    )

    @staticmethod
    def _site_log_prob(site: Mapping[str, Any]) -> Tensor:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        result: Tensor = scale_and_mask(log_prob, site["scale"], site["mask"])
        return result

    # -- one unconstrained vector -----------------------------------------------------------

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        """Cut [dim] into the unconstrained values of the sites."""
        return {
            name: z[site.slice].reshape(site.unconstrained_shape).to(site.dtype)
            for name, site in self.sites.items()
        }

    def _run_unconstrained(self, z: Tensor) -> tuple[Any, list[Tensor]]:
        """Run the model at one unconstrained vector; return its trace and the log Jacobians."""
        parts = self._split(z)
        log_jacobians: list[Tensor] = []

        def choose(name: str, fn: Any) -> Tensor:
            transform = biject_to(fn.support)
            value: Tensor = transform(parts[name])
            log_jacobians.append(transform.log_abs_det_jacobian(parts[name], value).sum())
            return value

        return self._run(choose), log_jacobians

    def _log_density_row(self, z: Tensor, latent_only: bool) -> Tensor:
        trace, terms = self._run_unconstrained(z)
        sites = self._latents(trace)
        if not latent_only:
            sites = {**sites, **self._observed(trace)}
        terms += [self._site_log_prob(site).sum() for site in sites.values()]
        total = z.new_zeros(())
        for term in terms:
            total = total + term
        return total.to(self.dtype)

    def _constrain_row(self, z: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run_unconstrained(z)
        return {name: trace.nodes[name]["value"] for name in self.sites}

    def _deterministic_row(self, z: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run_unconstrained(z)
        return {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and site["infer"].get("_deterministic")
        }

    def _unconstrain_row(self, values: dict[str, Tensor]) -> Tensor:
        trace = self._run(lambda name, fn: values[name])
        parts = [
            biject_to(trace.nodes[name]["fn"].support).inv(values[name]).reshape(-1)
            for name in self.sites
        ]
        return torch.cat([part.to(self.dtype) for part in parts])

    # -- batches ----------------------------------------------------------------------------

    def _check_vector(self, z: Tensor) -> None:
        if z.dim() == 0 or z.shape[-1] != self.dim:
            raise ValueError(
                f"z: found shape {_describe(z.shape)}; expected [*, {self.dim}], "
                f"the sites {list(self.sites)}"
            )

    def _map(self, row: Callable[[Any], Any], batch: Any) -> Any:
        """Apply ``row`` along the first dimension of ``batch``, a tensor or a dict of tensors."""
        with _private_params(), _no_validation(), _no_vmap_warning():
            if self._batched:
                try:
                    return torch.vmap(row, randomness="different")(batch)
                except Exception as error:
                    # The same row alone tells a model's own error from one of batching.
                    row(tree_map(lambda x: x[0], batch))
                    self._batched = False
                    warnings.warn(
                        "the model cannot be batched by torch.vmap and runs row by row, which is "
                        f"slow; the reason: {type(error).__name__}: {error}",
                        stacklevel=3,
                    )
            count = len(tree_leaves(batch)[0])
            rows = [row(tree_map(lambda x, i=i: x[i], batch)) for i in range(count)]
            return tree_map(lambda *xs: torch.stack(xs), *rows)

    def _map_vectors(self, row: Callable[[Tensor], Any], z: Tensor) -> Any:
        self._check_vector(z)
        shape = z.shape[:-1]
        if z.dim() == 1:
            with _private_params(), _no_validation():
                return row(z)
        if shape.numel() == 0:
            with _private_params(), _no_validation():
                one = row(z.new_zeros(self.dim))
            return tree_map(lambda x: x.new_empty(shape + x.shape), one)
        result = self._map(row, z.reshape(-1, self.dim))
        return tree_map(lambda x: x.reshape(shape + x.shape[1:]), result)

    def log_density(self, z: Tensor) -> Tensor:
        """Return log p(x, z), the log Jacobian of the transforms included.

        Args:
            z: Unconstrained vectors [*, dim].

        Returns:
            Log densities [*], differentiable in ``z``.
        """
        result: Tensor = self._map_vectors(lambda row: self._log_density_row(row, False), z)
        return result

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), the latent sites and the log Jacobian alone.

        Args:
            z: Unconstrained vectors [*, dim].

        Returns:
            Log densities [*], differentiable in ``z``.
        """
        result: Tensor = self._map_vectors(lambda row: self._log_density_row(row, True), z)
        return result

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Return the values of the latent sites.

        Args:
            z: Unconstrained vectors [*, dim].

        Returns:
            Values [*, *shape] by site.
        """
        if self._dynamic_support:
            result: dict[str, Tensor] = self._map_vectors(self._constrain_row, z)
            return result
        self._check_vector(z)
        batch = z.shape[:-1]
        with _no_validation():
            return {
                name: site.transform(
                    z[..., site.slice].reshape(batch + site.unconstrained_shape).to(site.dtype)
                )
                for name, site in self.sites.items()
            }

    def deterministic(self, z: Tensor) -> dict[str, Tensor]:
        """Return the values of the ``pyro.deterministic`` sites.

        Args:
            z: Unconstrained vectors [*, dim].

        Returns:
            Values [*, *shape] by site; empty if the model has none.
        """
        result: dict[str, Tensor] = self._map_vectors(self._deterministic_row, z)
        return result

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the unconstrained vectors of given site values, the inverse of `constrain`.

        Args:
            values: Values [*, *shape] of every latent site.

        Returns:
            Unconstrained vectors [*, dim].

        Raises:
            ValueError: If a site is missing or unknown, or a shape does not fit.
        """
        if set(values) != set(self.sites):
            raise ValueError(
                f"values: found the sites {sorted(values)}; expected {sorted(self.sites)}"
            )
        batches = {}
        for name, site in self.sites.items():
            shape, rank = values[name].shape, len(site.shape)
            batches[name] = shape[: len(shape) - rank]
            if shape[len(shape) - rank :] != site.shape or len(shape) < rank:
                raise ValueError(
                    f"values, site {name!r}: found shape {_describe(shape)}; "
                    f"expected [*, {', '.join(map(str, site.shape))}]"
                )
        if len(set(batches.values())) > 1:
            raise ValueError(f"values: found different leading shapes {batches}; expected one")
        batch = next(iter(batches.values()))
        if self._dynamic_support:
            rows = {name: values[name].reshape((-1, *self.sites[name].shape)) for name in values}
            result: Tensor = self._map(self._unconstrain_row, rows)
            return result.reshape((*batch, self.dim))
        with _no_validation():
            parts = [
                site.transform.inv(values[name]).reshape((*batch, -1)).to(self.dtype)
                for name, site in self.sites.items()
            ]
        return torch.cat(parts, dim=-1)

    # -- draws ------------------------------------------------------------------------------

    def sample_prior(self, num_samples: int) -> Tensor:
        """Draw from the prior p(z), in unconstrained space.

        Args:
            num_samples: Number of draws.

        Returns:
            Draws [num_samples, dim].

        Raises:
            ValueError: If the prior of a site is improper.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: found {num_samples}; expected at least 1")
        for name in self.sites:
            if name in self._improper:
                raise ValueError(
                    f"latent site {name!r} has an improper prior (ImproperUniform, or masked out) "
                    "and cannot be sampled; expected proper priors at every site"
                )
        return self._draw(num_samples)

    @torch.no_grad()
    def _draw(self, num: int) -> Tensor:
        """Draw [num, dim] from the prior, improper sites uniformly in unconstrained space."""
        with _private_params(), _no_validation(), _no_vmap_warning():
            roots = {name: fn.sample((num,)) for name, fn in self._roots.items()}
            if len(roots) == len(self.sites):
                return self.unconstrain(roots)

            def row(given: dict[str, Tensor]) -> Tensor:
                def choose(name: str, fn: Any) -> Tensor | None:
                    return given[name] if name in given else self._from_prior(name, fn)

                trace = self._run(choose)
                parts = [
                    biject_to(trace.nodes[name]["fn"].support).inv(trace.nodes[name]["value"])
                    for name in self.sites
                ]
                return torch.cat([part.reshape(-1).to(self.dtype) for part in parts])

            given = {**roots, "": torch.empty(num)}  # never empty, so that vmap knows the size
            try:
                return torch.vmap(row, randomness="different")(given)
            except Exception:
                # Many samplers draw in place, which torch.vmap does not allow.
                return torch.stack([row({k: v[i] for k, v in given.items()}) for i in range(num)])

    def initial(self, num: int, max_tries: int = 100) -> Tensor:
        """Find starting points with a finite log density and gradient.

        Points are drawn from the prior, or uniformly from (-2, 2) in unconstrained space where a
        prior is improper; rows that are not finite are drawn again, the second half of the tries
        uniformly at every site.

        Args:
            num: Number of points.
            max_tries: How often a row is drawn at most.

        Returns:
            Unconstrained vectors [num, dim].

        Raises:
            ValueError: If a row is still not finite; names the sites that are responsible.
        """
        if num < 1:
            raise ValueError(f"num: found {num}; expected at least 1")
        z = self._draw(num)
        bad = ~self._finite(z)
        for attempt in range(1, max_tries):
            count = int(bad.sum())
            if count == 0:
                return z
            if attempt < max_tries // 2:
                z[bad] = self._draw(count)
            else:
                z[bad] = (torch.rand(count, self.dim).to(z) * 2 - 1) * _INIT_RADIUS
            bad[bad.clone()] = ~self._finite(z[bad])
        if not bool(bad.any()):
            return z
        culprits = self._culprits(z[bad][0])
        raise ValueError(
            f"no starting point found for {int(bad.sum())} of {num} rows in {max_tries} tries; "
            f"not finite: {culprits}; expected a finite log density and gradient"
        )

    def _finite(self, z: Tensor) -> Tensor:
        """Which rows of [n, dim] have a finite vector, log density and gradient: [n]."""

        def total(points: Tensor) -> tuple[Tensor, Tensor]:
            value = self.log_density(points)
            return value.sum(), value

        gradient, value = torch.func.grad(total, has_aux=True)(z)
        finite = torch.isfinite(gradient).all(-1) & torch.isfinite(value)
        return finite & torch.isfinite(z).all(-1)

    @torch.no_grad()
    def _culprits(self, z: Tensor) -> str:
        with _private_params(), _no_validation():
            trace, _ = self._run_unconstrained(z)
            sites = {**self._latents(trace), **self._observed(trace)}
            names = [
                f"log_prob of site {name!r}"
                for name, site in sites.items()
                if not bool(torch.isfinite(self._site_log_prob(site)).all())
            ]
        return ", ".join(names) or f"the gradient at the sites {list(self.sites)}"


class _Captured:
    """A captured function: one graph for one set of input shapes."""

    def __init__(self, run: Callable[..., Any], graph: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._run = run
        self.graph = graph
        self._signature = self._describe(inputs)

    @staticmethod
    def _describe(inputs: tuple[Any, ...]) -> list[Any]:
        return [
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)
            for leaf in tree_leaves(inputs)
        ]

    def __call__(self, *inputs: Any) -> Any:
        found = self._describe(inputs)
        if found != self._signature:
            raise ValueError(
                f"inputs of a captured function: found {found}; expected {self._signature}, "
                "as in the example that it was captured with"
            )
        with torch.no_grad():
            return self._run(*inputs)


def capture(
    fn: Callable[..., Any], *example_inputs: Any, compile: bool = True
) -> Callable[..., Any]:
    """Turn a function of tensors into one graph of tensor operations, and compile it.

    The function runs once, on the examples; what it does in Python, Pyro's effect handlers
    included, happens then and never again. Tensors that it closes over become constants. Gradients
    are taken *inside* the function, by :func:`torch.func.grad`: what is returned runs without
    autograd.

    A function that cannot be captured (its course depends on values) is returned as it is, and one
    that cannot be compiled (there is no C++ compiler) as a graph; both with one warning.

    Args:
        fn: A function of tensors, or of tuples, lists and dicts of them.
        example_inputs: Inputs of the shapes, types and devices that it will be called with.
        compile: Whether :func:`torch.compile` takes the graph; it costs seconds and pays off after
            thousands of calls.

    Returns:
        The same function, for inputs of the same shapes; others raise a ``ValueError``.

    Example:
        >>> def energy(x):
        ...     return x.square().sum() / 2
        >>> gradient = capture(torch.func.grad(energy), torch.zeros(3), compile=False)
        >>> gradient(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 2., 3.])
    """
    # A tensor given twice would be taken for one input.
    inputs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, example_inputs)
    try:
        with torch.no_grad(), _no_vmap_warning():
            graph = make_fx(fn)(*inputs)
    except Exception as error:
        fn(*inputs)  # an error of the function itself is the caller's to see
        warnings.warn(
            "the function cannot be captured as a graph and runs as plain Python, which is slow; "
            f"the reason: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return fn
    if not compile:
        return _Captured(graph, graph, example_inputs)
    try:
        # No code of ours runs here: the warnings are those of torch about itself. Its first
        # compilation switches validation off for good, in all of torch.distributions.
        with torch.no_grad(), _no_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(graph, dynamic=False, fullgraph=True)
            compiled(*inputs)
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        reason = f"{type(inner).__name__}: {str(inner).strip()}".split("\n")[0]
        warnings.warn(
            f"the graph cannot be compiled and runs operation by operation; the reason: {reason}",
            stacklevel=2,
        )
        return _Captured(graph, graph, example_inputs)
    return _Captured(compiled, graph, example_inputs)
