"""A Pyro model and its data as a log density over one unconstrained vector.

Imported from :mod:`pyro_vae.capture`, which turns such a density into a compiled graph.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributions import Transform
from torch.distributions import transform_to as torch_transform_to
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .enumeration import check_enumerable, enumerated, log_marginals, plate_nesting, sum_out
from .supports import bijection_to

__all__ = ["LatentSite", "UnconstrainedModel"]

# Half the width of the interval, in unconstrained space, from which a start is drawn where the
# prior cannot be sampled; the value used by Stan and Pyro.
_INIT_RADIUS = 2.0

# Runs far from the prior that look for dependences which no gradient shows.
_WIDE_PROBES = 20

# Draws from the prior until one is found at which the model runs: a covariance matrix that depends
# on the latents need not be positive definite at each.
_PRIOR_TRIES = 10


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


def _nan_where(failed: Tensor, result: Tensor) -> Tensor:
    """Put NaN into the matrices or vectors of a batch whose computation failed."""
    failed = failed.reshape(failed.shape + (1,) * (result.dim() - failed.dim()))
    return torch.where(failed, torch.nan, result)


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    return _nan_where(info > 0, factor)


def _inverse(matrix: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(matrix)
    return _nan_where(info > 0, inverse)


def _solve(matrix: Tensor, right: Tensor, *, left: bool = True) -> Tensor:
    failed = torch.linalg.lu_factor_ex(matrix.detach()).info > 0
    # The gradient solves again, and raises if it cannot.
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    regular = torch.where(failed.unsqueeze(-1).unsqueeze(-1), one, matrix)
    solution, _ = torch.linalg.solve_ex(regular, right, left=left)
    return _nan_where(failed, solution)


class _RowByRow(TorchFunctionMode):
    """Keep in its row what goes wrong in one row of a batch, and batch what torch does not.

    A Cholesky factor, inverse or solution that does not exist is NaN, where torch raises for the
    whole batch: the log density of that row is NaN then, and no other row notices. Assignment under
    a boolean mask, which several distributions use and torch.vmap refuses, fills the mask.

    A graph can be captured although Python asks for the value of a tensor, if this is not of the
    batch and hence no function of the latents, but of the data: ``if (x < 0).any(): ...``.

    Args:
        batched: Whether the row is one of a batch under torch.vmap.
        zero: A zero of the batch, if new tensors are to be of the batch too. Otherwise a model that
            makes a tensor of zeros and fills it with what depends on the latents, step by step,
            cannot be batched.

    Attributes:
        met: Whether any operation was one of these. A model that has none runs without this.
    """

    _INSTEAD: ClassVar[dict[Any, Callable[..., Tensor]]] = {
        torch.linalg.cholesky: _cholesky,
        torch.cholesky: _cholesky,
        torch.Tensor.cholesky: _cholesky,
        torch.linalg.inv: _inverse,
        torch.inverse: _inverse,
        torch.Tensor.inverse: _inverse,
        torch.linalg.solve: _solve,
        torch.Tensor.data.__get__: torch.Tensor.detach,  # type: ignore[attr-defined]
    }
    _VALUE = frozenset(
        getattr(torch.Tensor, name)
        for name in ("__bool__", "__float__", "__index__", "__int__", "item", "tolist")
    )
    _SPECIAL = frozenset({torch.Tensor.__setitem__, *_INSTEAD, *_VALUE})
    _NEW = frozenset(
        getattr(of, prefix + name + suffix)
        for of, prefix, suffix in [
            (torch, "", ""),
            (torch, "", "_like"),
            (torch.Tensor, "new_", ""),
        ]
        for name in ("zeros", "ones", "empty", "full")
    )

    def __init__(self, batched: bool = False, zero: Tensor | None = None) -> None:
        super().__init__()
        self.batched = batched
        self.zero = zero
        self.met = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._SPECIAL:
            result = func(*args, **kwargs)
            if self.zero is not None and func in self._NEW and result.is_floating_point():
                return result + self.zero.to(result)
            return result
        self.met = True
        if func is torch.Tensor.__setitem__:
            tensor, index, value = args
            is_mask = isinstance(index, Tensor) and index.dtype is torch.bool
            is_number = not isinstance(value, Tensor) or value.dim() == 0
            if is_mask and is_number and index.shape == tensor.shape:
                return tensor.masked_fill_(index, value)
        elif func in self._VALUE:
            if self.batched and not is_batchedtensor(args[0]):
                with disable_proxy_modes_tracing():
                    return func(*args, **kwargs)
        elif "out" not in kwargs:
            func = self._INSTEAD[func]
        return func(*args, **kwargs)


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
    """Silence torch's remarks about what only we do to the model.

    An operation is looped over rather than batched; a latent whose value the model asks for is
    tracked by autograd.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
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


def _tracked(a: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether autograd tracks any tensor that a distribution, constraint or container holds."""
    if isinstance(a, Tensor):
        return a.requires_grad
    if id(a) in seen:  # a transform and its inverse hold each other
        return False
    seen = seen | {id(a)}
    if isinstance(a, (list, tuple)):
        return any(_tracked(value, seen) for value in a)
    if isinstance(a, dict):
        return any(_tracked(value, seen) for value in a.values())
    known = (torch.distributions.Distribution, torch.distributions.constraints.Constraint)
    if isinstance(a, (*known, Transform)) or type(a).__module__.startswith("pyro."):
        return any(_tracked(value, seen) for value in vars(a).values())
    return False


def _describe(shape: Any) -> str:
    return str(list(shape))


def _reason(error: Exception) -> str:
    """Say in one line what an exception says."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]


class UnconstrainedModel:
    r"""Turn a Pyro model and its data into a log density over one unconstrained vector.

    With :math:`\theta = T(z)` the latent sites and :math:`T` the bijection from
    :math:`\mathbb{R}^d` to their supports,

    .. math:: \log p(x, z) = \log \sum_k p(x, k, T(z)) + \log |\det \partial T / \partial z|

    where k are the discrete latent sites, if there are any.

    The model runs some times when the object is made, to learn its structure; it must be *static*:
    the same sites with the same shapes whatever the values. Scales, masks, ``pyro.factor``, plates,
    constrained and dependent supports and improper priors are respected; parameters keep the
    values that they have then. Where an observed value is missing (NaN) under a mask, a draw from
    its distribution stands in for it, so that gradients stay finite. Where a matrix has no Cholesky
    factor or inverse, the log density is NaN, in that row of a batch alone.

    With ``enumerate_discrete``, discrete latent sites are summed out by Pyro's parallel
    enumeration, as ``pyro.infer.NUTS`` does: independent sites in a ``pyro.plate``, chains in
    ``pyro.markov``, annotations ``infer={"enumerate": "parallel"}`` or none. A scale around a
    discrete site lies inside the sum. Neither the discrete sites nor deterministic ones that depend
    on them have values then; ``pyro.infer.infer_discrete`` finds the former, given the continuous
    ones.

    No global state is changed, neither the parameter store nor the random number generators nor
    the validation settings. Only :meth:`sample_prior` and :meth:`initial` consume random numbers.

    Args:
        model: A Pyro model.
        args: Its positional arguments, the data.
        kwargs: Its keyword arguments.
        enumerate_discrete: Whether to sum out discrete latent sites; without it, the model may have
            none.

    Attributes:
        sites: The continuous latent sites by name, in the order of the model, as
            :class:`LatentSite`.
        discrete: The names of the discrete latent sites, which are summed out.
        observed: The observed values by name, without ``pyro.factor`` and deterministic sites.
        dim: Length d of the unconstrained vector.
        dtype: Common data type of latent and observed values.
        device: Device of the latent values.

    Raises:
        ValueError: If a latent site is discrete and not to be summed out, or cannot be; a plate is
            subsampled; an observation is NaN or outside its support; there is no continuous latent
            site; or the latent sites depend on the values.

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
        *,
        enumerate_discrete: bool = False,
    ) -> None:
        self.model = model
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.discrete: tuple[str, ...] = ()
        self._params: dict[str, Tensor] = {}
        self._substitutes: dict[str, Tensor] = {}
        self._enumerated_size = 0
        self._batching = "plain"  # or "filled", or "none": see _map
        with torch.no_grad(), _private_random_state(), _private_params(), _RowByRow():
            trace = self._validated_run()
            self._params = {
                name: site["value"].detach().clone()
                for name, site in trace.nodes.items()
                if site["type"] == "param"
            }
            self.discrete = self._check_latents(trace, enumerate_discrete)
            with _no_validation(), _no_vmap_warning():
                again = self._numeric_run()
                probes = [again, *self._probe()]
                self._check_static(trace, probes)
                self._check_observed(trace, again)
                self._nesting = plate_nesting(
                    [*self._latents(again).values(), *self._observed(again).values()]
                )
                # What depends on a discrete site, which no probe need show.
                mixed = self._check_enumeration(again) if self.discrete else set()
                # A mode costs as much as the operations of a small model.
                self._needs_mode = self._meets_special(again)

        self.sites: dict[str, LatentSite] = {}
        start = 0
        latents = self._continuous(again)  # not validated, like the probes to be compared with
        for name, site in latents.items():
            shape = site["value"].shape
            transform = bijection_to(site["fn"].support)
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
            if name not in self._improper | mixed and not varies(name, lambda fn: fn)
        }
        self._deterministic = [
            name
            for name, site in again.nodes.items()
            if site["type"] == "sample"
            and site["infer"].get("_deterministic")
            and name not in mixed
        ]
        self.observed: dict[str, Tensor] = {
            name: site["value"]
            for name, site in self._observed(again).items()
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
        """How many numbers one evaluation is over: latent, observed, and each value enumerated."""
        observed = sum(value.numel() for value in self.observed.values())
        return self.dim + max(observed, self._enumerated_size)

    # -- the model's structure --------------------------------------------------------------

    def _run(
        self, choose: Callable[[str, Any], Tensor | None], enumerate_discrete: bool = False
    ) -> Any:
        """Run the model once with the latent sites that ``choose`` returns; return its trace."""
        model = self.model
        substitute = _Substitute(choose, self._substitutes, self._params)
        with ExitStack() as stack:
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            if enumerate_discrete:
                enumeration, model = enumerated(model, self._nesting)
                stack.enter_context(enumeration)
            stack.enter_context(substitute)
            model(*self.args, **self.kwargs)
        return tracer.trace

    def _validated_run(self) -> Any:
        """Run the model at a draw from the prior, validated as the user has it."""
        first: Exception | None = None
        with _validation(pyro.distributions.is_validation_enabled()):
            for _ in range(_PRIOR_TRIES):
                try:
                    return self._run(self._from_prior)
                except ValueError as error:  # perhaps a value that the prior rarely draws
                    first = first or error
        assert first is not None
        raise first

    def _numeric_run(self) -> Any:
        """Run the model at a draw from the prior where no observation has density NaN, if any."""
        for _ in range(_PRIOR_TRIES):
            trace = self._run(self._from_prior)
            sites = self._observed(trace).values()
            if not any(bool(torch.isnan(self._site_log_prob(site)).any()) for site in sites):
                break
        return trace

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
            if fn.support.is_discrete:
                return value
            transform = bijection_to(fn.support)
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

    def _continuous(self, trace: Any) -> dict[str, Any]:
        latents = self._latents(trace)
        return {name: site for name, site in latents.items() if name not in self.discrete}

    def _check_latents(self, trace: Any, enumerate_discrete: bool) -> tuple[str, ...]:
        """Check the latent sites; return the names of those to be summed out."""
        latents = self._latents(trace)
        discrete = tuple(name for name in latents if latents[name]["fn"].support.is_discrete)
        for name, site in self._latents(trace).items():
            if name not in discrete:
                try:
                    bijection_to(site["fn"].support)
                except ValueError as error:
                    raise ValueError(f"latent site {name!r}: {error}") from error
        for name in discrete:
            check_enumerable(name, latents[name])
            if not enumerate_discrete:
                raise ValueError(
                    f"latent site {name!r} is discrete ({type(latents[name]['fn']).__name__}); "
                    "expected continuous latents: sum it out (enumerate_discrete=True)"
                )
        if len(latents) == len(discrete):
            found = ", ".join(self._observed(trace)) or "none"
            raise ValueError(
                "the model has no latent site that is continuous; found "
                + (f"the discrete sites {list(discrete)} and " if discrete else "only ")
                + f"the observed sites: {found}; expected at least one pyro.sample statement of a "
                "continuous distribution without obs"
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
        return discrete

    def _check_static(self, trace: Any, others: list[Any]) -> None:
        first = {n: _describe(s["value"].shape) for n, s in self._latents(trace).items()}
        for other in others:
            second = {n: _describe(s["value"].shape) for n, s in self._latents(other).items()}
            if first != second:
                raise ValueError(
                    "the latent sites depend on random values: one run of the model has "
                    f"{first}, another {second}; expected the same sites and shapes in every run"
                )

    def _rerun(self, trace: Any) -> Any:
        """Run the model again at the continuous values of a trace, with the others enumerated."""
        values = {name: site["value"] for name, site in self._continuous(trace).items()}
        return self._run(lambda name, fn: values.get(name), bool(self.discrete))

    def _meets_special(self, trace: Any) -> bool:
        """Whether the model or its density does anything of which `_RowByRow` takes care."""
        with _RowByRow() as mode:
            other = self._rerun(trace)
            for site in {**self._latents(other), **self._observed(other)}.values():
                self._site_log_prob(site)
        return mode.met

    def _check_enumeration(self, trace: Any) -> set[str]:
        """Check that the discrete sites can be summed out; return which sites depend on them."""
        latents = self._continuous(trace)
        try:
            other = self._rerun(trace)
            sites = {**self._latents(other), **self._observed(other)}
            self._enumerated_size = sum(self._site_log_prob(x).numel() for x in sites.values())
            self._joint(other, sites)
        except Exception as error:
            raise ValueError(
                f"the discrete latent sites {list(self.discrete)} cannot be summed out; the "
                f"reason: {_reason(error)}; expected a model that Pyro can enumerate in parallel: "
                "plates that form a tree, chains in pyro.markov, no Python branch on a discrete "
                "value, Vindex where one is an index"
            ) from error
        mixed = set()
        for name, site in trace.nodes.items():
            if name not in other.nodes or site["type"] != "sample" or site_is_subsample(site):
                continue
            if site["infer"].get("_deterministic"):
                if other.nodes[name]["value"].shape != site["value"].shape:
                    mixed.add(name)
            elif name in latents and other.nodes[name]["fn"].batch_shape != site["fn"].batch_shape:
                mixed.add(name)
                transform = bijection_to(other.nodes[name]["fn"].support)
                if transform(transform.inv(site["value"])).shape != site["value"].shape:
                    raise ValueError(
                        f"latent site {name!r}: found a support that depends on a discrete latent "
                        "site; expected one support, since one unconstrained value has one value"
                    )
        return mixed

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

        def choose(name: str, fn: Any) -> Tensor | None:
            if name not in parts:
                return None  # is enumerated
            transform = bijection_to(fn.support)
            value: Tensor = transform(parts[name])
            log_jacobians.append(transform.log_abs_det_jacobian(parts[name], value).sum())
            return value

        return self._run(choose, bool(self.discrete)), log_jacobians

    def _joint(self, trace: Any, sites: Mapping[str, Any]) -> Tensor:
        """Add up the log densities of some sites of a trace, discrete ones summed out."""
        if self.discrete:
            return sum_out(trace, sites, self._site_log_prob, self._nesting)
        total: Tensor | float = 0.0
        for site in sites.values():
            total = total + self._site_log_prob(site).sum()
        assert isinstance(total, Tensor)
        return total

    def _log_density_row(self, z: Tensor, latent_only: bool) -> Tensor:
        trace, log_jacobians = self._run_unconstrained(z)
        sites = self._latents(trace)
        if not latent_only:
            sites = {**sites, **self._observed(trace)}
        total = self._joint(trace, sites)
        for term in log_jacobians:
            total = total + term
        return total.to(self.dtype)

    def _log_likelihood_row(self, z: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run_unconstrained(z)
        sites = {name: trace.nodes[name] for name in self.observed}

        def unscaled(site: Mapping[str, Any]) -> Tensor:
            return self._site_log_prob({**site, "scale": 1.0})

        if self.discrete:
            discrete = {name: trace.nodes[name] for name in self.discrete}
            return log_marginals(trace, sites, discrete, unscaled, self._nesting)
        return {name: unscaled(site) for name, site in sites.items()}

    def _constrain_row(self, z: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run_unconstrained(z)
        return {name: trace.nodes[name]["value"] for name in self.sites}

    def _deterministic_row(self, z: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run_unconstrained(z)
        return {name: trace.nodes[name]["value"] for name in self._deterministic}

    def _unconstrain_row(self, values: dict[str, Tensor]) -> Tensor:
        trace = self._run(lambda name, fn: values.get(name), bool(self.discrete))
        parts = [
            bijection_to(trace.nodes[name]["fn"].support).inv(values[name]).reshape(-1)
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

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Surround runs of the model whose latent values are given."""
        with _private_params(), _no_validation(), _no_vmap_warning():
            yield

    def _alone(self, row: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Keep what goes wrong in a row in that row, in a batch or alone."""

        def run(values: Any) -> Any:
            if not self._needs_mode and self._batching != "filled":
                return row(values)
            leaf, zero = tree_leaves(values)[0], None
            if self._batching == "filled":
                zero = torch.zeros_like(leaf.reshape(-1)[0])
            with _RowByRow(is_batchedtensor(leaf), zero):
                return row(values)

        return run

    def _vmap(self, row: Callable[[Any], Any], batch: Any) -> Any:
        """Apply ``row`` along the first dimension of ``batch`` by torch.vmap, or raise.

        A model that torch.vmap refuses as it is may pass if the tensors that it makes are of the
        batch from the beginning, which costs memory.
        """
        run = torch.vmap(self._alone(row), randomness="different")
        try:
            return run(batch)
        except Exception:
            if self._batching == "filled":
                raise
            self._batching = "filled"
            try:
                return run(batch)
            except Exception:
                self._batching = "plain"
        return run(batch)  # the reason that counts is the first

    def _map(self, row: Callable[[Any], Any], batch: Any) -> Any:
        """Apply ``row`` along the first dimension of ``batch``, a tensor or a dict of tensors."""
        with self._running():
            if self._batching != "none":
                try:
                    return self._vmap(row, batch)
                except Exception as error:
                    # The same row alone tells a model's own error from one of batching.
                    self._alone(row)(tree_map(lambda x: x[0], batch))
                    self._batching = "none"
                    warnings.warn(
                        "the model cannot be batched by torch.vmap and runs row by row, which is "
                        f"slow; the reason: {_reason(error)}",
                        stacklevel=3,
                    )
            run = self._alone(row)
            count = len(tree_leaves(batch)[0])
            rows = [run(tree_map(lambda x, i=i: x[i], batch)) for i in range(count)]
            return tree_map(lambda *xs: torch.stack(xs), *rows)

    def _map_vectors(self, row: Callable[[Tensor], Any], z: Tensor) -> Any:
        self._check_vector(z)
        shape = z.shape[:-1]
        if z.dim() == 1:
            with self._running():
                return self._alone(row)(z)
        if shape.numel() == 0:
            with self._running():
                one = self._alone(row)(z.new_zeros(self.dim))
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
            Values [*, *shape] by site; empty if the model has none. A site that depends on a
            discrete latent has no single value and is left out.
        """
        result: dict[str, Tensor] = self._map_vectors(self._deterministic_row, z)
        return result

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        r"""Return log p(x_i | z) of every single observation, for each observed site.

        Scales are left out, and what is masked has log density 0. With discrete latents k, each
        observation's is :math:`\log \sum_k p(x_i | k, z) p(k | z)`. ``pyro.factor`` is no
        observation.

        Args:
            z: Unconstrained vectors [*, dim].

        Returns:
            Log densities [*, *batch_shape] by observed site, with the batch shape of the site: as
            arviz has them in its group ``log_likelihood``.
        """
        result: dict[str, Tensor] = self._map_vectors(self._log_likelihood_row, z)
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

    def batching_error(self) -> str | None:
        """Return why torch.vmap cannot run the model and its gradient on a batch, or ``None``.

        If it cannot, every method runs the model row by row from now on, without the warning that
        it gives otherwise: whoever asks knows.
        """

        def total(z: Tensor) -> Tensor:
            result: Tensor = self._vmap(lambda row: self._log_density_row(row, False), z)
            return result.sum()

        z = torch.zeros(2, self.dim, dtype=self.dtype, device=self.device)
        with self._running():
            try:
                torch.func.grad(total)(z)
            except Exception as error:
                self._batching = "none"
                return _reason(error)
        return None

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
        with self._running():
            roots = {name: fn.sample((num,)) for name, fn in self._roots.items()}
            if len(roots) == len(self.sites):
                return self.unconstrain(roots)

            def row(given: dict[str, Tensor]) -> Tensor:
                def choose(name: str, fn: Any) -> Tensor | None:
                    return given[name] if name in given else self._from_prior(name, fn)

                trace = self._run(choose)
                parts = [
                    bijection_to(trace.nodes[name]["fn"].support).inv(trace.nodes[name]["value"])
                    for name in self.sites
                ]
                return torch.cat([part.reshape(-1).to(self.dtype) for part in parts])

            # Never without an entry, so that vmap knows the size.
            given = {**roots, "": torch.zeros(num, dtype=self.dtype, device=self.device)}
            run = self._alone(row)
            try:
                return torch.vmap(run, randomness="different")(given)
            except Exception:
                # Many samplers draw in place, which torch.vmap does not allow.
                return torch.stack([run({k: v[i] for k, v in given.items()}) for i in range(num)])

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
            ValueError: If a row is still not finite; names the sites that are responsible. If the
                log density is random.
        """
        if num < 1:
            raise ValueError(f"num: found {num}; expected at least 1")
        z = self._draw(num)
        bad = ~self._finite(z)
        for attempt in range(1, max_tries):
            count = int(bad.sum())
            if count == 0:
                break
            if attempt < max_tries // 2:
                z[bad] = self._draw(count)
            else:
                z[bad] = (torch.rand(count, self.dim).to(z) * 2 - 1) * _INIT_RADIUS
            bad[bad.clone()] = ~self._finite(z[bad])
        if not bool(bad.any()):
            self._check_repeatable(z[:1])
            return z
        culprits = self._culprits(z[bad][0])
        raise ValueError(
            f"no starting point found for {int(bad.sum())} of {num} rows in {max_tries} tries; "
            f"not finite: {culprits}; expected a finite log density and gradient"
        )

    def _value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log densities [n] at [n, dim] and their gradients [n, dim]."""

        def total(points: Tensor) -> tuple[Tensor, Tensor]:
            value = self.log_density(points)
            return value.sum(), value

        gradient, value = torch.func.grad(total, has_aux=True)(z)
        return value, gradient

    def _finite(self, z: Tensor) -> Tensor:
        """Which rows of [n, dim] have a finite vector, log density and gradient: [n]."""
        value, gradient = self._value_and_gradient(z)
        finite = torch.isfinite(gradient).all(-1) & torch.isfinite(value)
        return finite & torch.isfinite(z).all(-1)

    @torch.no_grad()
    def _culprits(self, z: Tensor) -> str:
        """Name what is not finite at [dim]."""
        with self._running(), _RowByRow():
            trace, _ = self._run_unconstrained(z)
            names = []
            for name, site in {**self._latents(trace), **self._observed(trace)}.items():
                log_prob = self._site_log_prob(site)
                if self.discrete:  # some of the values of a discrete site may well be impossible
                    left = log_prob.dim() - self._nesting
                    log_prob = log_prob.flatten(0, left - 1).amax(0) if left > 0 else log_prob
                if not bool(torch.isfinite(log_prob).all()):
                    names.append(f"log_prob of site {name!r}")
        if not names:
            _, gradient = self._value_and_gradient(z.unsqueeze(0))
            names = [
                f"the gradient at site {name!r}"
                for name, site in self.sites.items()
                if not bool(torch.isfinite(gradient[0, site.slice]).all())
            ]
        return ", ".join(names) or "the log density"

    @torch.no_grad()
    def _check_repeatable(self, z: Tensor) -> None:
        """Raise if the log density at [1, dim] is random."""
        with _private_random_state():
            one, two = float(self.log_density(z)), float(self.log_density(z))
        if abs(one - two) > 1e-3 * max(1.0, abs(one)):
            raise ValueError(
                f"the log density is random: found {one:.6g} and {two:.6g} at one point; expected "
                "a model whose random numbers all come from pyro.sample (and modules in eval mode)"
            )
