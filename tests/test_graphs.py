"""Rewritten graphs compute what the captured ones did."""

import pytest
import torch
from torch._guards import TracingContext
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.graphs import make_graph, share_matrices

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def products(graph):
    names = [str(node.target) for node in graph.graph.nodes]
    return [sum(f"aten.{name}.default" in found for found in names) for name in ("bmm", "mm")]


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda w: w @ X, (4,)),
        (lambda w: torch.func.grad(lambda w: (w @ X).sin().sum())(w), (4,)),
        (lambda w: w @ X, (2, 4)),
        (lambda w: torch.matmul(X.expand(1, 4, 6), w.reshape(1, 6, 3)), (6, 3)),
    ],
)
def test_a_shared_factor_becomes_one_product(function, shape):
    batch = torch.randn(5, *shape, dtype=torch.float64)
    graph = make_graph(torch.vmap(function), batch)
    before = products(graph)
    share_matrices(graph)
    assert products(graph)[0] == 0
    assert products(graph)[1] == sum(before)
    other = torch.randn(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(graph(other), torch.vmap(function)(other))


def test_factors_that_differ_are_left_alone():
    batch = torch.randn(5, 4, 4, dtype=torch.float64)
    graph = make_graph(torch.vmap(lambda w: w @ w.sin()), batch)
    share_matrices(graph)
    assert products(graph) == [1, 0]
    torch.testing.assert_close(graph(batch), batch @ batch.sin())


def test_a_captured_graph_is_that_of_make_fx_with_one_fake_mode():
    gradient = torch.func.grad(lambda w: (w @ X).sin().sum())
    batch = torch.randn(5, 4, dtype=torch.float64)
    graph = make_graph(torch.vmap(gradient), batch)
    assert graph.code == make_fx(torch.vmap(gradient))(batch).code
    values = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
    assert len({value.fake_mode for value in values}) == 1
    assert TracingContext.try_get() is None
