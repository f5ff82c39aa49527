"""Capturing graphs, and rewriting them: the same numbers, by faster operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["make_graph", "share_matrices"]

_aten = torch.ops.aten


def make_graph(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Run a function of tensors once, and return its operations as a graph.

    It is ``make_fx`` with one mode for what is noted of each value. On real tensors ``make_fx``
    makes a mode for every operation, each with a copy of the Python stack, which is slow.

    Args:
        function: What to capture.
        inputs: Real tensors to run it on.

    Example:
        >>> graph = make_graph(lambda x: 2 * x, torch.ones(3))
        >>> graph(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 4., 6.])
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function)(*inputs)


def _stride(node: object) -> tuple[int, ...] | None:
    """Return the strides of a node's value when the graph was captured."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return None if meta is None else tuple(meta.stride)


def share_matrices(graph: fx.GraphModule) -> None:
    r"""Make one product of matrices where a batch of them shares a factor.

    Under :func:`torch.vmap`, ``w @ X`` with a vector w of each row and one matrix X for all becomes
    the batch of products of [1, K] and X repeated, [K, N], which no library does well. It is the
    product of the rows, [n, K], and X.

    Args:
        graph: A graph that was captured on real tensors; it is changed in place.

    Example:
        >>> x = torch.randn(3, 5)
        >>> graph = make_graph(torch.vmap(lambda w: w @ x), torch.randn(7, 3))
        >>> share_matrices(graph)
        >>> [node.target.__name__ for node in graph.graph.nodes if "mm" in str(node.target)]
        ['mm.default']
    """
    for node in list(graph.graph.nodes):
        if node.target is not _aten.bmm.default:
            continue
        left, right = node.args
        for shared, at_right in ((right, True), (left, False)):
            stride = _stride(shared)
            if stride is None or stride[0] != 0 or shared.meta["tensor_meta"].shape[0] == 1:
                continue  # strides of 0 are those of a factor repeated
            with graph.graph.inserting_before(node):
                product = _product(graph.graph, left, right, at_right)
            node.replace_all_uses_with(product)
            product.meta.update(node.meta)
            graph.graph.erase_node(node)
            break
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _product(graph: fx.Graph, left: fx.Node, right: fx.Node, at_right: bool) -> fx.Node:
    """Add [n, M, K] times [n, K, N], of which one factor is the same n times; [n, M, N]."""
    batch, rows, inner = left.meta["tensor_meta"].shape
    columns = right.meta["tensor_meta"].shape[2]
    call = graph.call_function
    if at_right:
        matrix = call(_aten.select.int, (right, 0, 0))
        flat = call(_aten.reshape.default, (left, [batch * rows, inner]))
        product = call(_aten.mm.default, (flat, matrix))
        return call(_aten.reshape.default, (product, [batch, rows, columns]))
    # As the transposes: [n, N, K] times [K, M].
    matrix = call(_aten.t.default, (call(_aten.select.int, (left, 0, 0)),))
    turned = call(_aten.transpose.int, (right, 1, 2))
    flat = call(_aten.reshape.default, (turned, [batch * columns, inner]))
    product = call(_aten.mm.default, (flat, matrix))
    product = call(_aten.reshape.default, (product, [batch, columns, rows]))
    product = call(_aten.transpose.int, (product, 1, 2))
    # What follows may count on the strides of a batch of products.
    return call(_aten.clone.default, (product,), {"memory_format": torch.contiguous_format})
