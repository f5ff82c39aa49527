"""What the operations of a captured graph change, and which are functions of constants alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

__all__ = [
    "changed_inputs",
    "constants",
    "dtype_of",
    "evaluate",
    "hold",
    "index_by_numbers",
    "keep_draws",
]

_aten = torch.ops.aten

# Operations that change running statistics, which their schemas do not say.
_BATCH_NORMS = (_aten.native_batch_norm, _aten.cudnn_batch_norm, _aten.miopen_batch_norm)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operation changes in place."""
    if getattr(node.target, "overloadpacket", None) in _BATCH_NORMS:
        return [x for x in node.args[3:5] if isinstance(x, fx.Node)]
    return _where(node, lambda argument: argument.alias_info.is_write)


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operation's result may be a view of."""
    if getattr(node.target, "_schema", None) is None:
        return list(node.all_input_nodes)
    return _where(node, lambda argument: True)


def _where(node: fx.Node, wanted: Callable[[Any], bool]) -> list[fx.Node]:
    """Return the arguments that are marked in an operation's schema, and wanted."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = dict(zip((x.name for x in schema.arguments), node.args, strict=False)) | node.kwargs
    marked = [x for x in schema.arguments if x.alias_info is not None and wanted(x)]
    return [x for x in tree_leaves([given.get(x.name) for x in marked]) if isinstance(x, fx.Node)]


def _changing(graph: fx.Graph) -> set[fx.Node]:
    """Return what an operation may change in place, and what that may be a view of."""
    changing: set[fx.Node] = set()
    pending = [x for node in graph.nodes for x in _written(node)]
    while pending:
        node = pending.pop()
        if node not in changing:
            changing.add(node)
            pending += _aliased(node)
    return changing


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Return what the outputs and the changes of inputs depend on, and what changes any of it."""
    live = {node for node in graph.nodes if node.op in ("output", "placeholder")}
    written = {}  # by each operation that changes something: this, and what it may be a view of
    for node in graph.nodes:
        pending, seen = _written(node), set()
        while pending:
            seen.add(pending[-1])
            pending += [x for x in _aliased(pending.pop()) if x not in seen]
        if seen:
            written[node] = seen
    size = 0
    while len(live) > size:
        size = len(live)
        live |= {node for node, changes in written.items() if changes & live}
        for node in reversed(graph.nodes):
            if node in live:
                live.update(node.all_input_nodes)
    return live


def keep_draws(module: fx.GraphModule) -> int:
    """Make outputs of the random draws that nothing depends on, and return how many they are.

    A compiler would leave them out, and every later draw would be another one.
    """
    live = _live(module.graph)
    draws = [node for node in module.graph.nodes if _is_random(node) and node not in live]
    output = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        for place, node in enumerate(draws):
            if len(node.target._schema.returns) > 1:
                draws[place] = module.graph.call_function(operator.getitem, (node, 0))
    output.args = ([*output.args[0], *draws],)
    module.recompile()
    return len(draws)


def changed_inputs(module: fx.GraphModule) -> set[int]:
    """Return the positions of the inputs that a graph may change in place.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x, y: y.add_(x))(torch.ones(2), torch.ones(2))
        >>> changed_inputs(graph)
        {1}
    """
    changing = _changing(module.graph)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    return {index for index, node in enumerate(placeholders) if node in changing}


def constants(
    module: fx.GraphModule, is_constant: Callable[[Tensor], bool] = lambda _: True
) -> dict[fx.Node, None]:
    """Return the nodes that are functions of constants, in order (a dict as an ordered set).

    A constant is a tensor that the graph holds and only reads.

    Args:
        module: A captured graph.
        is_constant: Which of the tensors count.
    """
    changing = _changing(module.graph)
    found: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        if node in changing or not all(x in found for x in node.all_input_nodes):
            continue
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
            if isinstance(value, Tensor) and is_constant(value):
                found[node] = None
        elif node.op == "call_function" and not _is_random(node) and not _written(node):
            found[node] = None
    return found


def evaluate(
    module: fx.GraphModule, constant: Iterable[fx.Node], wanted: set[fx.Node]
) -> dict[fx.Node, Tensor]:
    """Return the values of some of the constant nodes, holding others no longer than needed."""
    needed = set(wanted)
    pending = list(wanted)
    while pending:
        new = [x for x in pending.pop().all_input_nodes if x not in needed]
        needed.update(new)
        pending += new
    order = [node for node in constant if node in needed]
    last = {x: node for node in order for x in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    for node in order:
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for x in node.all_input_nodes:
            if last[x] is node and x not in wanted:
                del values[x]
    return values


def dtype_of(module: fx.GraphModule, node: Any) -> torch.dtype | None:
    """Return the type of a node's value, None for what is no tensor."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return getattr(module, str(node.target)).dtype
    meta = node.meta.get("tensor_meta")
    return None if meta is None else meta.dtype


def hold(module: fx.GraphModule, value: Tensor, before: fx.Node) -> fx.Node:
    """Let a graph hold a tensor; return the node that reads it, before another node."""
    name = f"_held_{sum(1 for _ in module.named_buffers())}"
    module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def index_by_numbers(module: fx.GraphModule, node: fx.Node, masks: dict[fx.Node, Tensor]) -> None:
    """Let an operation index by numbers where it has masks, given their values."""
    indices: Any = node.args[1]
    numbers: list[Any] = []
    for index in indices:
        if index in masks:
            numbers += [hold(module, x, node) for x in masks[index].nonzero(as_tuple=True)]
        else:
            numbers.append(index)
    node.update_arg(1, numbers)
