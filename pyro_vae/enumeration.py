"""Discrete latent sites summed out exactly, by Pyro's parallel enumeration.

Pyro's handlers give every discrete latent a tensor dimension of its own, to the left of the plates,
and its contraction sums these out along the tree of the plates. Two things differ from what
``pyro.infer.NUTS`` does with them: sums are taken in log space throughout, where Pyro exponentiates
each factor beside its own maximum and underflows if the factors disagree by more than a float
holds; and every single observation has a marginal, for :func:`log_marginals`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from pyro.infer import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

__all__ = ["check_enumerable", "enumerated", "log_marginals", "plate_nesting", "sum_out"]


@lru_cache(maxsize=1024)
def _elimination_order(
    terms: tuple[str, ...], sizes: tuple[tuple[str, int], ...], dims: frozenset[str]
) -> list[str]:
    """Choose in which order to sum out ``dims``: next the one with the smallest intermediate."""
    size = dict(sizes)
    groups = [frozenset(term) for term in terms]
    order: list[str] = []
    left = set(dims)

    def merged(dim: str) -> frozenset[str]:
        return frozenset().union(*(group for group in groups if dim in group))

    def cost(dim: str) -> tuple[int, str]:
        product = 1
        for other in merged(dim):
            product *= size[other]
        return product, dim

    while left:
        dim = min(left, key=cost)
        new = merged(dim) - {dim}
        groups = [group for group in groups if dim not in group] + [new]
        order.append(dim)
        left.discard(dim)
    return order


def _align(term: Tensor, dims: str) -> Tensor:
    """Permute a packed tensor to the order of ``dims``, with size 1 where it has not got one."""
    own: str = term._pyro_dims  # type: ignore[attr-defined]
    aligned = term.permute(tuple(own.index(dim) for dim in dims if dim in own))
    shape = iter(aligned.shape)
    return aligned.reshape([next(shape) if dim in own else 1 for dim in dims])


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """Return log Σ exp, with the gradient 0 rather than NaN where every term is log 0."""
    dead = (x == -torch.inf).all(dim)
    result = torch.logsumexp(torch.where(dead.unsqueeze(dim), 0.0, x), dim)
    return torch.where(dead, -torch.inf, result)


class _LogSumProduct(LogRing):
    """The sums and products of Pyro's contraction, in log space."""

    def sumproduct(self, terms: Iterable[Tensor], dims: Iterable[str]) -> Tensor:
        terms = list(terms)
        sizes = {
            dim: size
            for term in terms
            for dim, size in zip(term._pyro_dims, term.shape, strict=True)  # type: ignore[attr-defined]
        }
        names = tuple(term._pyro_dims for term in terms)  # type: ignore[attr-defined]
        for dim in _elimination_order(names, tuple(sorted(sizes.items())), frozenset(dims)):
            group = [term for term in terms if dim in term._pyro_dims]  # type: ignore[attr-defined]
            terms = [term for term in terms if dim not in term._pyro_dims]  # type: ignore[attr-defined]
            if group:
                terms.append(self._multiply(group, dim))
        return self._multiply(terms, "")

    @staticmethod
    def _multiply(terms: list[Tensor], summed: str) -> Tensor:
        """Add the terms, and sum out one dimension if it is given."""
        found = set("".join(term._pyro_dims for term in terms))  # type: ignore[attr-defined]
        dims = summed + "".join(sorted(found - set(summed)))
        total = _align(terms[0], dims)
        for term in terms[1:]:
            total = total + _align(term, dims)
        if summed:
            total, dims = _logsumexp(total, 0), dims[1:]
        else:
            total = total[...]  # a new object: the dims are written on it
        total._pyro_dims = dims  # type: ignore[attr-defined]
        return total


def enumerated(model: Callable[..., Any], nesting: int) -> tuple[EnumMessenger, Callable[..., Any]]:
    """Return the handler that enumerates, and the model to be run under it.

    Args:
        model: A Pyro model; what its ``infer`` annotations say is respected.
        nesting: How many dimensions on the right belong to plates.
    """
    return EnumMessenger(first_available_dim=-1 - nesting), config_enumerate(model)


def plate_nesting(sites: Iterable[Mapping[str, Any]]) -> int:
    """Return how many dimensions on the right are taken, by plates or by undeclared batches."""
    nesting = 0
    for site in sites:
        frames = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
        nesting = max([nesting, len(site["fn"].batch_shape), *frames])
    return nesting


def _undeclared(site: Mapping[str, Any], shape: torch.Size, nesting: int) -> list[int]:
    """Which of the rightmost dimensions of a log density are of no plate."""
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    return [
        dim for dim in range(-min(nesting, len(shape)), 0) if shape[dim] > 1 and dim not in plates
    ]


def check_enumerable(name: str, site: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a discrete latent site cannot be summed out exactly."""
    fn, infer = site["fn"], site["infer"]
    found = f"latent site {name!r} is discrete ({type(fn).__name__})"
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"{found} and cannot be enumerated: {error or 'its support is not finite'}; expected "
            "a finite support: sum it out by hand, for example by dist.GammaPoisson for a Poisson "
            "with a Gamma rate, or put its dimensions into a pyro.plate"
        ) from error
    how = infer.get("enumerate", "parallel")
    if how != "parallel" or infer.get("num_samples") is not None:
        raise ValueError(
            f"{found}: found infer={{'enumerate': {how!r}, 'num_samples': "
            f"{infer.get('num_samples')!r}}}; expected 'parallel' and None, which sum it out"
        )
    if dims := _undeclared(site, fn.batch_shape, len(fn.batch_shape)):
        raise ValueError(
            f"{found}: found the batch shape {list(fn.batch_shape)}, whose dimensions {dims} lie "
            "in no plate; expected each in a pyro.plate, which says that they are independent"
        )


def _pack(
    trace: Any, sites: Mapping[str, Any], values: Mapping[str, Tensor], nesting: int
) -> dict[str, Tensor]:
    """Let Pyro name the dimensions of the log densities of these sites of an enumerated trace."""
    for name, value in values.items():
        if dims := _undeclared(sites[name], value.shape, nesting):
            value = value.sum(dims, keepdim=True)
        trace.nodes[name]["log_prob"] = trace.nodes[name]["unscaled_log_prob"] = value
    for site in trace.nodes.values():
        site["mask"] = None  # is in the log densities, or of no concern
    trace.pack_tensors()
    return {name: trace.nodes[name]["packed"]["log_prob"] for name in values}


def sum_out(
    trace: Any, sites: Mapping[str, Any], log_prob: Callable[[Any], Tensor], nesting: int
) -> Tensor:
    r"""Return the joint log density of some sites, with the discrete ones summed out.

    .. math:: \log \sum_k \prod_s p_s(k)

    Args:
        trace: A trace of the model under the handler of `enumerated`; written on.
        sites: Those of its sites that count.
        log_prob: The function from a site to its log density, scaled and masked. A scale lies
            inside the sum, as in Pyro's HMC.
        nesting: What `plate_nesting` returned for the model without enumeration.

    Returns:
        A scalar.

    Raises:
        NotImplementedError: If the plates do not form a tree, so that the sum is exponential.
    """
    values = {name: log_prob(site) for name, site in sites.items()}
    packed = _pack(trace, sites, values, nesting)
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name, term in packed.items():
        frames = sites[name]["cond_indep_stack"]
        plates = frozenset(trace.plate_to_symbol[f.name] for f in frames if f.vectorized)
        tree.setdefault(plates, []).append(term)
    summed = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    result: Tensor = contract_to_tensor(tree, summed, ring=_LogSumProduct())
    return result


def log_marginals(
    trace: Any,
    sites: Mapping[str, Any],
    discrete: Mapping[str, Any],
    log_prob: Callable[[Any], Tensor],
    nesting: int,
) -> dict[str, Tensor]:
    r"""Return the log density of every single value of some sites, the discrete ones summed out.

    .. math:: \log p(x_i) = \log \sum_k p(x_i | k) p(k)

    with k the discrete sites on which x_i depends. These are the densities of the values one by
    one: where values share a k, they do not add up to their joint density.

    Args:
        trace: A trace of the model under the handler of `enumerated`; written on.
        sites: Those of its sites whose densities are asked for.
        discrete: Those that are summed out.
        log_prob: The function from a site to its log density.
        nesting: What `plate_nesting` returned for the model without enumeration.

    Returns:
        By site, a tensor with the dimensions of the plates. A dimension of a site that is in no
        plate is one observation if the site depends on a discrete one.
    """
    both = {**sites, **discrete}
    values = {name: log_prob(site) for name, site in both.items()}
    packed = _pack(trace, both, values, nesting)
    of = {trace.nodes[name]["infer"]["_enumerate_symbol"]: name for name in discrete}
    result: dict[str, Tensor] = {}
    for name in sites:
        wanted, seen = [name], {name}
        for found in wanted:  # grows: what a discrete site depends on is summed out too
            for dim in packed[found]._pyro_dims:  # type: ignore[attr-defined]
                if dim in of and of[dim] not in seen:
                    seen.add(of[dim])
                    wanted.append(of[dim])
        if len(wanted) == 1:
            result[name] = values[name]
            continue
        summed = {dim for dim in of if of[dim] in seen}
        term = _LogSumProduct().sumproduct([packed[other] for other in wanted], summed)
        dims = sorted(term._pyro_dims, key=trace.symbol_to_dim.__getitem__)  # type: ignore[attr-defined]
        places = [trace.symbol_to_dim[dim] for dim in dims]
        shape = [1] * (-places[0] if places else 0)
        aligned = _align(term, "".join(dims))
        for place, size in zip(places, aligned.shape, strict=True):
            shape[place] = size
        result[name] = aligned.reshape(shape)
    return result
