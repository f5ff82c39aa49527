"""Losses as programs: one run of model, guide and loss, with gradients and state, as a graph.

:mod:`pyro_vae.capture` turns functions of tensors into graphs. A loss is not one: it reads
parameters, and buffers that it changes. Here these become inputs of the graph, by where they live,
so that what a user does to them between two steps is seen by the next.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import JitTrace_ELBO
from pyro.infer.trace_mean_field_elbo import JitTraceMeanField_ELBO
from pyro.infer.util import is_identically_zero
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .capture import _compile, _copy, _lift
from .dataflow import constants, dtype_of, evaluate, hold, index_by_numbers
from .graphs import make_graph
from .unconstrained import _no_validation, _no_vmap_warning, _RowByRow

__all__ = [
    "CannotCaptureError",
    "Home",
    "LossGraph",
    "Snapshot",
    "Surroundings",
    "compile_graph",
    "describe",
    "difference",
    "differentiable",
    "run_on_copies",
    "trace",
]

_aten = torch.ops.aten

LossFunction = Callable[..., Tensor]


class CannotCaptureError(Exception):
    """Why a program is no static graph of tensor operations."""


# --- where tensors live --------------------------------------------------------------------------


class Home(NamedTuple):
    """Where a tensor is looked up: ``owner[key]``.

    Attributes:
        owner: A module's parameters, buffers or attributes, Pyro's parameter store, the globals of
            a function.
        key: Its name there.
        name: Its name for a reader.
        is_state: Whether a run may change it: no parameter, and no global.
    """

    owner: Any
    key: str
    name: str
    is_state: bool

    def get(self) -> Tensor | None:
        """Return the tensor that lives here now."""
        value = self.owner.get(self.key)
        return value if isinstance(value, Tensor) else None


# Their functions are looked into for what they close over, not for what their modules hold.
_LIBRARIES = frozenset({"torch", "pyro", "pyro_vae", "zuko", "functools", "builtins", "numpy"})


# What every module has: the tables that are looked at one by one, and hooks.
_OF_MODULES = frozenset(vars(nn.Module()))


def _is_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


class Surroundings:
    """The tensors and modules that a loss, a model and a guide can reach.

    They are found by looking: into modules, through closures, partial functions and bound methods,
    and at the globals that a function names.

    Args:
        *roots: Callables, modules, losses.

    Attributes:
        homes: By the id of each tensor found, where it lives.
        modules: All modules found.
        plain: Where numbers, strings and distributions live, on which the course may depend.
        store: The parameters in Pyro's store, which clearing it replaces.

    Example:
        >>> decoder = nn.Linear(2, 3)
        >>> surroundings = Surroundings(decoder)
        >>> surroundings.homes[id(decoder.weight)].name
        'weight of Linear'
    """

    def __init__(self, *roots: Any) -> None:
        self.homes: dict[int, Home] = {}
        self.modules: list[nn.Module] = []
        self.plain: list[tuple[Any, str]] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # what has been seen must not die, or its id be another's
        self.store = pyro.get_param_store()._params
        for name in self.store:
            self._take(self.store, name, f"parameter {name!r}", is_state=False)
        pending = list(roots)
        while pending:
            pending += self._visit(pending.pop())

    def _take(self, owner: Any, key: str, name: str, is_state: bool) -> None:
        value = owner.get(key)
        if isinstance(value, Tensor):
            self.homes.setdefault(id(value), Home(owner, key, name, is_state))
        elif isinstance(value, (bool, int, float, str, Distribution)):
            self.plain.append((owner, key))

    def _visit(self, thing: Any) -> list[Any]:
        """Take in one object, and return what can be reached from it."""
        if thing is None or isinstance(thing, (str, bytes, int, float, Tensor, type)):
            return []
        if id(thing) in self._seen or isinstance(thing, types.ModuleType):
            return []
        self._seen.add(id(thing))
        self._kept.append(thing)
        if isinstance(thing, (tuple, list)):
            return list(thing) if len(thing) <= 1000 else []
        if isinstance(thing, dict):
            if len(thing) > 1000:
                return []
            for key in thing:
                self._take(thing, key, f"item {key!r}", is_state=True)
            return list(thing.values())
        if isinstance(thing, partial):
            return [thing.func, *thing.args, *thing.keywords.values()]
        if isinstance(thing, types.MethodType):
            return [thing.__self__, thing.__func__]
        if isinstance(thing, types.FunctionType):
            return self._visit_function(thing)
        if isinstance(thing, nn.Module):
            return self._visit_module(thing)
        known = isinstance(thing, (ELBO, Messenger))
        if not known and _is_library(type(thing).__module__):
            return []
        attributes = getattr(thing, "__dict__", {})
        for key in attributes:
            self._take(attributes, key, f"{key} of {type(thing).__name__}", is_state=True)
        return list(attributes.values())

    def _visit_module(self, module: nn.Module) -> list[Any]:
        self.modules.append(module)
        kind = type(module).__name__
        for owner, is_state in ((module._parameters, False), (module._buffers, True)):
            for key in owner:
                self._take(owner, key, f"{key} of {kind}", is_state)
        self.plain.append((vars(module), "training"))
        own = [key for key in vars(module) if key not in _OF_MODULES]
        if not (type(module).__module__ or "").startswith("torch."):  # sizes, which never change
            for key in own:
                self._take(vars(module), key, f"{key} of {kind}", is_state=True)
        return [*module._modules.values(), *(vars(module)[key] for key in own)]

    def _visit_function(self, function: types.FunctionType) -> list[Any]:
        reached: list[Any] = [
            getattr(function, "__wrapped__", None),
            *(function.__defaults__ or ()),
        ]
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            owner = _Cell(cell)
            self._take(owner, name, f"{name} of a closure", is_state=False)
            reached.append(owner.get(name))
        if not _is_library(function.__module__):
            names = set(_names(function.__code__)) & set(function.__globals__)
            for name in sorted(names):
                self._take(function.__globals__, name, f"global {name}", is_state=False)
                reached.append(function.__globals__[name])
        return reached

    def state(self) -> list[tuple[Home, Tensor]]:
        """Return what a run may change, with where it lives."""
        found = [(home, home.get()) for home in self.homes.values() if home.is_state]
        return [(home, tensor) for home, tensor in found if tensor is not None]

    def fingerprint(self) -> tuple:
        """Return the numbers, strings and distributions that there are now."""
        values = [owner.get(key) for owner, key in self.plain]
        # A distribution is compared as the object that it is; it is kept while we are.
        return tuple(id(x) if isinstance(x, Distribution) else x for x in values)


class _Cell:
    """What a function closes over, as the one value of a mapping."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, key: str) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not assigned yet
            return None


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names in a function and in those that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


class Snapshot:
    """The state before a run, to be put back."""

    def __init__(self, surroundings: Surroundings) -> None:
        self.saved = [
            (home, tensor, tensor.detach().clone()) for home, tensor in surroundings.state()
        ]

    def replaced(self) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors in whose place there are others now, and these."""
        pairs = [(old, home.get()) for home, old, _ in self.saved]
        return [(old, new) for old, new in pairs if new is not None and new is not old]

    def changes(self) -> dict[int, Tensor]:
        """Return, by the id of each old tensor that was changed or replaced, its new value."""
        changed = {}
        for home, old, value in self.saved:
            new = home.get()
            # By value: batch statistics change without a new version.
            if new is not None and not _equal(new, value):
                changed[id(old)] = new.detach().clone()  # the old one is put back
        return changed

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was."""
        for home, tensor, value in self.saved:
            home.owner[home.key] = tensor
            if not _equal(tensor, value):
                tensor.copy_(value)


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    same: Tensor = (x == y) | ((x != x) & (y != y))  # NaN is NaN
    return bool(same.all())


# --- tracing -------------------------------------------------------------------------------------


class _NoBakedValues(TorchDispatchMode):
    """Refuse to read a number from a tensor that the trace takes for a constant."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            mode = get_proxy_mode()
            if mode is not None and get_proxy_slot(args[0], mode.tracer, None) is None:
                raise CannotCaptureError("the program asks for the value of a tensor")
        return func(*args, **(kwargs or {}))


class _ValuesAsLists(_RowByRow):
    """Refuse what reads a whole tensor, and keep what raises for some values from doing so.

    A decomposition that fails is NaN, as :class:`~pyro_vae.unconstrained._RowByRow` has it.
    """

    _WHOLE = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._WHOLE and get_proxy_mode() is not None:
            raise CannotCaptureError(
                f"the program asks for the values of a tensor ({func.__name__})"
            )
        return super().__torch_function__(func, types, args, kwargs)


class Traced(NamedTuple):
    """A function of tensors as a graph.

    Attributes:
        graph: Takes the tensors held, then the inputs, to a list of tensors.
        held: The tensors that the function closes over, each once.
        baked: Tensors of which only values are left: the masks of a flow, by which it indexes.
    """

    graph: fx.GraphModule
    held: list[Tensor]
    baked: list[Tensor]


def trace(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Traced:
    """Run a function of tensors once, and return what it does as a graph.

    Raises:
        CannotCaptureError: If its course, or the shape of a tensor in it, depends on values.
    """
    try:
        with _no_validation(), _no_vmap_warning(), _refusing():
            module = make_graph(_modes(function), *inputs)
    except CannotCaptureError:
        raise
    except Exception as error:
        raise CannotCaptureError(_reason(error)) from error
    baked = _settle_shapes(module)
    for node in module.graph.nodes:
        if _has_shape_of_values(module, node):
            raise CannotCaptureError(
                f"the shape of a tensor depends on values ({node.target.__name__})"
            )
    lifted, held = _lift(module)
    lifted.graph.eliminate_dead_code()
    lifted.recompile()
    return Traced(lifted, held, baked)


def _modes(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def run(*inputs: Tensor) -> list[Tensor]:
        with _NoBakedValues():
            return function(*inputs)

    return run


@contextmanager
def _refusing() -> Iterator[None]:
    with _ValuesAsLists():
        yield


def _reason(error: Exception) -> str:
    message = str(error).partition("Trace Shapes:")[0]
    if "trying to get value out of a tracing tensor" in message:
        return "its course depends on the value of a tensor"
    return f"{type(error).__name__}: {' '.join(message.split())}"


def _has_shape_of_values(module: fx.GraphModule, node: fx.Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if not _is_indexing(node):
        return True
    indices: Any = node.args[1]
    return any(dtype_of(module, index) in (torch.bool, torch.uint8) for index in indices)


def _settle_shapes(module: fx.GraphModule) -> list[Tensor]:
    """Compute now what shapes depend on, where it is a function of constants; return these.

    Whoever runs the graph has to look whether they are still the same.
    """
    constant = constants(module, lambda tensor: not tensor.requires_grad)
    shaping = [node for node in module.graph.nodes if _has_shape_of_values(module, node)]
    whole = [node for node in shaping if node in constant]
    indexing: list[Any] = [n for n in shaping if n not in constant and _is_indexing(n)]
    indices = {x for node in indexing for x in node.args[1] if x in constant}
    masks = {x for x in indices if dtype_of(module, x) is torch.bool}
    if not (whole or masks):
        return []
    values = evaluate(module, constant, {*whole, *masks})
    for node in indexing:
        index_by_numbers(module, node, {mask: values[mask] for mask in masks})
    for node in whole:
        node.replace_all_uses_with(hold(module, values[node], node))
    sources: set[fx.Node] = set()
    pending = [*whole, *masks]
    while pending:
        node = pending.pop()
        if node not in sources:
            sources.add(node)
            pending += node.all_input_nodes
    module.graph.eliminate_dead_code()
    module.recompile()
    return [getattr(module, str(node.target)) for node in sources if node.op == "get_attr"]


def _is_indexing(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is _aten.index


# --- losses --------------------------------------------------------------------------------------


class _NaNForItem(TorchFunctionMode):
    """Let a loss have its ``.item()``, whose value must not matter."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return math.nan if func is torch.Tensor.item else func(*args, **(kwargs or {}))


#: Pyro's losses whose value asks for numbers, and whose surrogate is the loss as a tensor.
_BY_SURROGATE = (Trace_ELBO, TraceMeanField_ELBO, JitTrace_ELBO, JitTraceMeanField_ELBO)


def differentiable(loss: Any) -> LossFunction | None:
    """Return a loss as a function of model, guide and arguments to a scalar that can be traced.

    Returns:
        None for a loss that has no such form, which only takes steps.
    """
    if type(loss) in _BY_SURROGATE:
        return partial(_surrogate, loss)
    if isinstance(loss, ELBO):
        return getattr(loss, "differentiable_loss", None)
    return loss


def _surrogate(loss: Any, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
    total: Any = 0.0
    for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
        for name, site in guide_trace.nodes.items():
            parts = site.get("score_parts")
            if parts is not None and not is_identically_zero(parts.score_function):
                raise CannotCaptureError(
                    f"guide site {name!r} is not reparameterised: its gradient has a "
                    "score-function term, which needs the value of the loss"
                )
        with _NaNForItem():
            _, part = loss._differentiable_loss_particle(model_trace, guide_trace)
        total = total + part / loss.num_particles
    return total


class LossGraph:
    """One run of a loss as a graph: value, gradients, and what it changes.

    Args:
        function: Takes model, guide and their arguments to the loss, a scalar.
        model: A Pyro model.
        guide: A Pyro guide.
        args: Positional arguments; tensors among them are inputs of the graph.
        kwargs: The same by keyword.
        params: The parameters to differentiate by; none for the value alone.
        surroundings: Where tensors live.

    Attributes:
        graph: From the tensors held, then those among the arguments, to the loss, the gradients of
            ``reached`` and the new values of ``rebound``.
        held: What the graph reads, and may change in place.
        reached: The parameters that the loss depends on, those with a gradient.
        rebound: Buffers that a run replaces by others.

    Raises:
        CannotCaptureError: If the loss is no static program.
    """

    def __init__(
        self,
        function: LossFunction,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict,
        params: list[Tensor],
        surroundings: Surroundings,
    ) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        self.params = params
        self.reached: list[Tensor] = []
        self.rebound: list[Tensor] = []

        def run(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            run_args, run_kwargs = structure.unflatten(filled)
            with torch.set_grad_enabled(bool(params)):
                loss = function(model, guide, *run_args, **run_kwargs)
                if not isinstance(loss, Tensor) or loss.dim() != 0:
                    raise CannotCaptureError("the loss is not a scalar tensor")
                grads: Sequence[Tensor | None] = ()
                if params:
                    if not loss.requires_grad:
                        raise CannotCaptureError("the loss depends on no parameter")
                    grads = torch.autograd.grad(loss, params, allow_unused=True)
            reached = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
            self.reached = [p for p, _ in reached]
            # Cloned, since one buffer's new value may be another's old one.
            replaced = [(old, new.detach().clone()) for old, new in snapshot.replaced()]
            misfits.update(
                id(old) for old, new in replaced if describe(old)[::2] != describe(new)[::2]
            )
            replaced = [(old, new) for old, new in replaced if id(old) not in misfits]
            self.rebound = [old for old, _ in replaced]
            return [loss.detach(), *(g for _, g in reached), *(new for _, new in replaced)]

        snapshot = Snapshot(surroundings)
        misfits: set[int] = set()  # replaced by a tensor of another shape or type
        try:
            self.graph, held, baked = trace(run, inputs)
        finally:
            snapshot.restore()
        known = {id(tensor) for tensor in held}
        extra = [old for old in self.rebound if id(old) not in known]
        # A buffer that is only written is an input as well.
        self.held = [*held, *extra]
        for _ in extra:
            self._add_input(len(held))
        for tensor in self.held:
            home = surroundings.homes.get(id(tensor))
            if home is not None and (home.get() is not tensor or id(tensor) in misfits):
                raise CannotCaptureError(f"{home.name} was replaced while the program ran")
        self.homes = [surroundings.homes.get(id(tensor)) for tensor in self.held]
        self.baked = [(surroundings.homes.get(id(x)), x, x._version) for x in baked]

    def _add_input(self, position: int) -> None:
        """Let the graph have one more input, which it does not use."""
        graph = self.graph.graph
        nodes = [node for node in graph.nodes if node.op == "placeholder"]
        before = nodes[position] if position < len(nodes) else _first_operation(graph)
        with graph.inserting_before(before):
            graph.placeholder(f"written_{len(nodes)}")
        self.graph.recompile()


def describe(x: Tensor) -> tuple[Any, ...]:
    """Return all that a compiled program depends on of an input."""
    return x.shape, x.stride(), x.dtype, x.device


def _first_operation(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def run_on_copies(
    graph: Callable[..., Any], inputs: Sequence[Tensor], changing: set[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a graph on copies of the inputs that it may change; return its outputs, and all inputs.

    The inputs are returned as they are afterwards.
    """
    copies = [_copy(x) if i in changing else x for i, x in enumerate(inputs)]
    with torch.no_grad():
        outputs = list(graph(*copies))
    return outputs, copies


def compile_graph(
    graph: fx.GraphModule, inputs: list[Tensor]
) -> tuple[Callable[..., Sequence[Tensor]], bool]:
    """Compile a graph; return it as it is, with a warning, where that is not possible."""
    try:
        return _compile(graph, inputs, one_file=True), True
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        reason = f"{type(inner).__name__}: {str(inner).strip()}".split("\n")[0]
        warnings.warn(
            f"the program cannot be compiled and runs operation by operation; the reason: {reason}",
            stacklevel=2,
        )
        return graph, False


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int | None:
    """Return the position of the first tensor that is not the same up to rounding, or None.

    Sums in another order differ by a few thousand roundings of a tensor's largest entry; one whose
    terms cancel, by as many of what is large in the others.
    """
    pairs = [(x.detach(), y.detach()) for x, y in zip(found, expected, strict=True)]
    sizes = [_size(y) for _, y in pairs]
    # A number kept in double precision may come from others that are not: the coarsest type counts
    # of what is rounded (no counter of steps is).
    rounded = {x.dtype for x, y in pairs if x.is_floating_point() and not torch.equal(x, y)}
    tolerance = max((torch.finfo(dtype).eps ** 0.5 for dtype in rounded), default=0.0)
    for index, ((x, y), size) in enumerate(zip(pairs, sizes, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return index
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return index
            continue
        atol = tolerance * max(size, tolerance * max(sizes))
        if not torch.allclose(x, y, rtol=tolerance, atol=atol, equal_nan=True):
            return index
    return None


def _size(x: Tensor) -> float:
    """Return the largest finite entry, without its sign."""
    if not x.is_floating_point() or not x.numel():
        return 0.0
    return float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max())
