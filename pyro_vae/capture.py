"""From a Pyro program to tensor operations.

Pyro's effect handlers are plain Python: once a *static* model has run, only tensor operations are
left of it. :class:`UnconstrainedModel` turns a model with its data into a log density over one
unconstrained vector, batched by :func:`torch.vmap`; :func:`capture` turns any function of tensors,
such a density or its gradient, into one graph and compiles it.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .dataflow import (
    changed_inputs,
    constants,
    dtype_of,
    evaluate,
    hold,
    index_by_numbers,
    keep_draws,
)
from .graphs import make_graph, share_matrices
from .unconstrained import LatentSite, UnconstrainedModel, _no_validation, _no_vmap_warning

__all__ = ["Captured", "LatentSite", "UnconstrainedModel", "capture", "same_graph"]


class Captured:
    """A function of tensors that was captured, for inputs like those of its example.

    Attributes:
        graph: The graph, from the tensors among the inputs to the list of those among the outputs;
            ``None`` where the function could not be captured and runs as it is.
        compiled: Whether the graph was compiled.
        run: The function without the check of its inputs, for inner loops. To be called where
            gradients are off, with the structure, shapes, *strides*, types and devices of the
            example: anything else is undefined.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        inputs: tuple[Any, ...],
        graph: fx.GraphModule | None = None,
        compiled: bool = False,
        mutates: bool = False,
    ) -> None:
        self.run = run
        self.graph = graph
        # The code, what its inputs are (constants first), and its compiled form.
        self.program: tuple[str, list[Any], Callable[..., Sequence[Tensor]]] | None = None
        self.compiled = compiled
        leaves, self._structure = tree_flatten(inputs)
        # Compared at every call, which a loop makes thousands of times a second.
        self._expected = [self._describe(leaf) for leaf in leaves]
        self._tensors_only = all(isinstance(x, Tensor) for x in inputs)
        self._mutates = mutates

    @staticmethod
    def _describe(leaf: Any) -> tuple[Any, ...]:
        if isinstance(leaf, Tensor):
            return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
        return (leaf,)

    def __call__(self, *inputs: Any) -> Any:
        """Call the captured function; a tensor with other strides than its example is copied.

        Raises:
            ValueError: If the structure of the inputs, a shape, type or device, or a number that
                is not a tensor, differs from the example.
        """
        if not self._matches(inputs):
            inputs = self._adapt(inputs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.run(*inputs)
        return self.run(*inputs)

    def _matches(self, inputs: tuple[Any, ...]) -> bool:
        """Whether all inputs are tensors, and exactly like those of the example."""
        if not self._tensors_only or len(inputs) != len(self._expected):
            return False
        for x, (shape, stride, dtype, device) in zip(inputs, self._expected, strict=True):
            if not isinstance(x, Tensor) or x.shape != shape or x.stride() != stride:
                return False
            if x.dtype is not dtype or x.device != device:
                return False
        return True

    def _adapt(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs with the strides of the example; raise where more than these differ."""
        leaves, structure = tree_flatten(inputs)
        found = [self._describe(leaf) for leaf in leaves]
        fits = structure == self._structure
        for index in range(len(leaves) if fits else 0):
            one, two = found[index], self._expected[index]
            if len(one) == len(two) == 4 and one[1] != two[1] and not self._mutates:
                shape, stride, dtype, device = two
                if (one[0], *one[2:]) == (shape, dtype, device):
                    like = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                    leaves[index] = like.copy_(leaves[index].detach())
                    continue
            fits = fits and one == two
        if not fits:
            raise ValueError(
                f"inputs of a captured function: found {found}; expected {self._expected}, "
                "as in the example that it was captured with"
            )
        adapted: tuple[Any, ...] = tree_unflatten(leaves, structure)
        return adapted


def _assembler(output: Any) -> Callable[[Sequence[Tensor]], Any]:
    """Return the function from the tensors in an output to the output, fast for the usual ones."""
    if isinstance(output, Tensor):
        return lambda tensors: tensors[0]
    if isinstance(output, (tuple, list)) and all(isinstance(x, Tensor) for x in output):
        make: Callable[[Sequence[Tensor]], Any] = getattr(output, "_make", type(output))
        return make
    leaves, structure = tree_flatten(output)
    # What is not a tensor was settled when the function ran.
    fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def assemble(tensors: Sequence[Tensor]) -> Any:
        leaves = list(fixed)
        for index, tensor in zip(places, tensors, strict=True):
            leaves[index] = tensor
        return tree_unflatten(leaves, structure)

    return assemble


def _lift(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """Turn the tensors that a graph holds into its first inputs; return them beside it.

    Programs that differ in nothing but their constants, such as the data of a model, are then one.
    """
    lifted = copy.deepcopy(graph.graph)
    constants: list[Tensor] = []
    placeholders: dict[int, fx.Node] = {}  # by the tensor's id: one that is met twice is one input
    for node in list(lifted.nodes):
        value = getattr(graph, node.target, None) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            if id(value) not in placeholders:
                with lifted.inserting_before(next(iter(lifted.nodes))):
                    name = f"constant_{len(constants)}"
                    placeholders[id(value)] = lifted.placeholder(name)
                constants.append(value)
            node.replace_all_uses_with(placeholders[id(value)])
            lifted.erase_node(node)
    constants.reverse()  # each went before the ones that were there
    return fx.GraphModule(graph, lifted), constants


_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute once what depends on constants alone, and erase what nothing depends on.

    Beside the time, this removes operations whose shape depends on values, which no compiler takes:
    an index by a constant mask becomes one by numbers.
    """
    graph = module.graph
    constant = constants(module)

    def size(node: fx.Node) -> int:
        value = getattr(module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        return value.numel() if isinstance(value, Tensor) else 0

    def pays(node: fx.Node) -> bool:
        """Whether to read it from memory: not zeros and the like, nor what outgrows its parts."""
        parts = node.all_input_nodes
        if node.op != "call_function" or not parts:
            return False
        if not isinstance(node.meta.get("val"), Tensor):
            return False
        needed = not all(user in constant for user in node.users)
        return needed and size(node) <= max(*map(size, parts), 1024)

    folded = [node for node in constant if pays(node)]
    indexing: list[Any] = [
        node for node in graph.nodes if getattr(node.target, "overloadpacket", None) in _INDEXING
    ]
    indices = {x for node in indexing for x in node.args[1] if x in constant}
    masks = {x for x in indices if dtype_of(module, x) is torch.bool}
    values = evaluate(module, constant, {*folded, *masks})
    for node in indexing:
        index_by_numbers(module, node, {mask: values[mask] for mask in masks})
    for node in folded:
        node.replace_all_uses_with(hold(module, values[node], node))
    graph.eliminate_dead_code()
    module.recompile()


def same_graph(one: Captured | None, two: Captured | None) -> bool:
    """Whether two captured functions compute the same, constants and all.

    Example:
        >>> x = torch.ones(2)
        >>> times = [capture(lambda x, c=c: c * x, x, compile=False) for c in (2, 2, 3)]
        >>> same_graph(times[0], times[1]), same_graph(times[0], times[2])
        (True, False)
    """
    if one is None or two is None or one.graph is None or two.graph is None:
        return False
    if one._expected != two._expected or one._structure != two._structure:
        return False
    (code, constants), (other_code, others) = (
        (module.code, held) for module, held in map(_lift, (one.graph, two.graph))
    )
    return code == other_code and all(
        Captured._describe(x) == Captured._describe(y) and torch.equal(x, y)
        for x, y in zip(constants, others, strict=True)
    )


def capture(
    fn: Callable[..., Any],
    *example_inputs: Any,
    compile: bool = True,
    reuse: Captured | None = None,
) -> Captured:
    """Turn a function of tensors into one graph of tensor operations, and compile it.

    The function runs once, on the examples; what it does in Python, Pyro's effect handlers
    included, happens then and never again. Tensors that it closes over become constants. Gradients
    are taken *inside* the function, by :func:`torch.func.grad`: what is returned runs without
    autograd.

    A function that cannot be captured (its course depends on values) runs as it is, and one that
    cannot be compiled (there is no C++ compiler) as a graph; both with one warning.

    Args:
        fn: A function of tensors, or of tuples, lists and dicts of them.
        example_inputs: Inputs of the shapes, types and devices that it will be called with.
        compile: Whether inductor compiles the graph; it costs seconds and pays off after thousands
            of calls.
        reuse: A function that was captured before. If the new graph differs from its in nothing
            but the values of constants, as the data of a model, its compiled program is taken.

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
    leaves, structure = tree_flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assemble: Callable[[Sequence[Tensor]], Any] = list

    def flat(*given: Tensor) -> list[Tensor]:
        """Call the function with these tensors in place of those of the example."""
        nonlocal assemble
        rest = iter(given)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        output = fn(*tree_unflatten(filled, structure))
        assemble = _assembler(output)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    try:
        with torch.no_grad(), _no_vmap_warning():
            graph = make_graph(flat, *tensors)
            share_matrices(graph)
            _fold_constants(graph)
    except Exception as error:
        fn(*inputs)  # an error of the function itself is the caller's to see
        warnings.warn(
            "the function cannot be captured as a graph and runs as plain Python, which is slow; "
            f"the reason: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return Captured(fn, inputs)
    # Every change of a tensor in place counts up its version.
    mutates = any(tensor._version > 0 for tensor in tensors)

    def finished(call: Callable[..., Sequence[Tensor]], compiled: bool) -> Captured:
        if all(isinstance(x, Tensor) for x in inputs):

            def run(*inputs: Any) -> Any:
                return assemble(call(*inputs))
        else:

            def run(*inputs: Any) -> Any:
                return assemble(call(*(x for x in tree_leaves(inputs) if isinstance(x, Tensor))))

        return Captured(run, inputs, graph, compiled, mutates)

    if not compile:
        return finished(graph, compiled=False)
    lifted, constants = _lift(graph)
    described = [Captured._describe(x) for x in (*constants, *tensors)]
    try:
        if (
            reuse is not None
            and reuse.program is not None
            and reuse.program[:2]
            == (
                lifted.code,
                described,
            )
        ):
            compiled = reuse.program[2]
        else:
            compiled = _compile(lifted, [*constants, *tensors])
        captured = finished(partial(compiled, *constants), compiled=True)
        captured.program = (lifted.code, described, compiled)
        return captured
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        reason = f"{type(inner).__name__}: {str(inner).strip()}".split("\n")[0]
        warnings.warn(
            f"the graph cannot be compiled and runs operation by operation; the reason: {reason}",
            stacklevel=2,
        )
        return finished(graph, compiled=False)


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Silence what torch remarks about its own compiler."""
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def _compile(
    graph: fx.GraphModule, inputs: list[Tensor], one_file: bool | None = None
) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph from tensors to a list of tensors, and run it once, on copies.

    Inductor itself is asked first: the way through ``torch.compile`` adds the guards of dynamo to
    every call, of which a graph has no need and :class:`Captured` makes its own. Whatever fails
    there, ``torch.compile`` has the last word.
    """
    compiled: Callable[..., Sequence[Tensor]]
    # What is random must not depend on whether a program was compiled before.
    cards = {x.device for x in inputs if x.device.type == "cuda"}
    # No code of ours runs here: the warnings are those of torch about itself. Its first compilation
    # switches validation off for good, in all of torch.distributions.
    with (
        torch.random.fork_rng(devices=cards),
        torch.no_grad(),
        _no_validation(),
        _quiet_compiler(),
    ):
        if one_file is None:
            one_file = _has_many_loops(graph)
        one_file = one_file and all(x.device.type == "cpu" for x in inputs)
        for together in [True, False] if one_file else [False]:
            # Inductor may change what it is given, and must not take the graph's notes about its
            # own run for the inputs of this one. The tensors that it holds are shared.
            own = fx.GraphModule(graph, copy.deepcopy(graph.graph))
            for node in own.graph.nodes:
                node.meta.clear()
            num_unused = keep_draws(own)
            try:
                program = _inductor(own, inputs, _options(together))
                return _without_last(program, num_unused) if num_unused else program
            except Exception:
                _forget_instruction_sets()
        compiled = torch.compile(graph, dynamic=False, fullgraph=True)
        compiled(*map(_copy, inputs))
        return compiled


def _without_last(
    program: Callable[..., Sequence[Tensor]], number: int
) -> Callable[..., Sequence[Tensor]]:
    return lambda *inputs: program(*inputs)[:-number]


def _copy(x: Tensor) -> Tensor:
    """Copy a tensor, strides and all, those of what is expanded too."""
    x = x.detach()
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    like = torch.empty_strided(once.shape, once.stride(), dtype=x.dtype, device=x.device)
    return like.copy_(once).expand(x.shape)


def _inductor(
    graph: fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph by inductor; return its program without wrappers where it needs none.

    What inductor returns prepares for outputs that are views of inputs and the like, which costs
    small programs a good part of their time. The program alone is taken where it does the same on
    copies of the inputs, with the same random numbers.
    """
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    programs: list[Any] = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        programs.append(compile_fx_inner(*args, **kwargs))
        return programs[-1]

    changing = changed_inputs(graph)
    before, after = (
        [_copy(x) if i in changing else x.detach() for i, x in enumerate(inputs)] for _ in range(2)
    )
    # Without a shape environment, which holds nothing here, inductor does not look for the program
    # among those that it keeps on disk: to generate it again takes most of a compilation.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    # What AOTAutograd keeps has its wrappers on.
    with tracing(TracingContext(mode)), functorch_config.patch(enable_autograd_cache=False):
        compiled = compile_fx(
            graph,
            list(before),
            inner_compile=remember,
            config_patches=options,
            ignore_shape_env=True,  # all shapes are what they are
        )
    wrapped = cast(Callable[..., Sequence[Tensor]], compiled)
    with torch.random.fork_rng(devices={x.device for x in inputs if x.device.type == "cuda"}):
        expected = wrapped(*before)
    program = getattr(programs[0], "current_callable", None) if len(programs) == 1 else None
    if program is None:
        return wrapped

    def direct(*inputs: Tensor) -> Sequence[Tensor]:
        result: Sequence[Tensor] = program(list(inputs))  # which empties the list
        return result

    def same(x: Any, y: Tensor) -> bool:
        described = isinstance(x, Tensor) and Captured._describe(x) == Captured._describe(y)
        return described and bool(torch.equal(x.nan_to_num(), y.nan_to_num()))

    try:
        found = direct(*after)
    except Exception:  # such as another number of inputs
        return wrapped
    agrees = len(found) == len(expected) and all(map(same, found, expected))
    return direct if agrees and all(map(same, after, before)) else wrapped


# Operations that inductor does not fuse with their neighbours into one loop. (A single index_put is
# the gradient of an index, which it does.)
_UNFUSED = (
    "bmm",
    "cat",
    "constant_pad",
    "cumprod",
    "cumsum",
    "flip",
    "index_put",
    "linalg",
    "sort",
)


def _has_many_loops(graph: fx.GraphModule) -> bool:
    """Whether inductor will probably make more than one loop of a graph."""
    names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
    return sum(name.startswith(_UNFUSED) for name in names) > 1


def _options(one_file: bool) -> dict[str, Any]:
    """Return inductor's options for one compilation, those that this version of torch knows.

    They halve the processor time of a first compilation (torch 2.13, an empty cache): from 12.5 s
    to 4.9 s for the gradient of Eight Schools, which is one loop, and from 24 s to 12 s for that of
    a model with simplices, correlations and ordered cut points, which is twelve.

    Args:
        one_file: Whether to compile all loops, and what calls them, as one C++ program. Otherwise
            each loop is one, and to parse torch's headers takes the compiler longer than all the
            rest; but a call is faster, by some 2 µs for a leapfrog step.
    """
    import torch._inductor.config as config

    options: dict[str, Any] = {
        "cpp_wrapper": one_file,
        # What is random comes from torch's generators, in the order of the graph.
        "fallback_random": True,
        # To precompile the headers takes longer than a program.
        "cpp_cache_precompile_headers": False,
        "size_asserts": False,  # `Captured` compares them where it is called, not run
    }
    if config.cpp.vec_isa_ok is None:
        # Trust the compiler with the instruction sets that the processor has, where inductor would
        # compile, link and load a program for each: 5 s, and 0.7 s in every later process. A
        # compiler that has not got one fails, and `_compile` asks torch.compile, which tries all.
        options["cpp.vec_isa_ok"] = True
    known = set(torch._inductor.list_options())
    return {key: value for key, value in options.items() if key in known}


def _forget_instruction_sets() -> None:
    """Make inductor look again which instruction sets its compiler has, after trusting it."""
    from torch._inductor import cpu_vec_isa

    cached: list[Any] = [cpu_vec_isa.valid_vec_isa_list]
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for kind in type(isa).__mro__:
            cached += vars(kind).values()
    for function in cached:
        if hasattr(function, "cache_clear"):
            function.cache_clear()
