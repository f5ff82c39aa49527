r"""Have the chains converged, and how many independent draws are theirs worth?

Draws are [num_chains, num_samples, \*shape] everywhere, and every entry of the shape is judged on
its own. The mathematics is arviz's; what is here makes it fast for hundreds of chains and adds what
arviz lacks, nested R̂. :mod:`pyro_vae.mcmc.checks` judges what is computed here.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

__all__ = [
    "bfmi",
    "effective_sample_size",
    "nested_r_hat",
    "rank_normalize",
    "running_r_hat",
    "split_r_hat",
    "to_inference_data",
]

# Draws a chain from which R̂ and ESS can be told: with fewer, the halves of a chain are so short
# that arviz's sum over autocorrelations is empty, and its ESS larger than the number of draws.
MIN_DRAWS = 10

# Entries of a site that are copied at once: taken one by one out of [chains, n, entries], each
# would read the whole array.
BLOCK = 16


def arviz() -> ModuleType:
    """Import arviz, whose import takes a second, when it is needed."""
    with warnings.catch_warnings():
        # ArviZ announces its own next major version once a day when imported.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as module
    return module


def _check_superchains(samples: Tensor, num_superchains: int, least: int) -> None:
    num_chains = samples.shape[0] if samples.dim() > 0 else 0
    if num_superchains < least or num_chains % num_superchains != 0 or samples.dim() < 2:
        raise ValueError(
            f"num_superchains: found {num_superchains} for samples of shape {list(samples.shape)}; "
            "expected a divisor of the number of chains, the first dimension, of at least "
            f"{least}"
        )


def entries(samples: Tensor) -> Iterator[NDArray[np.float64]]:
    r"""Go through the entries of draws [num_chains, num_samples, \*shape]: each [chains, n]."""
    flat = samples.detach().reshape(*samples.shape[:2], -1)
    for block in flat.split(BLOCK, dim=2):
        yield from block.cpu().to(torch.float64).permute(2, 0, 1).contiguous().numpy()


def _by_entry(samples: Tensor, diagnostic: Callable[[NDArray[np.float64]], float]) -> Tensor:
    """Apply a diagnostic of one entry [num_chains, num_samples] to each: [*shape]."""
    values = [diagnostic(entry) for entry in entries(samples)]
    return torch.tensor(values, dtype=torch.float64).reshape(samples.shape[2:])


# -- one entry, [chains, n] -----------------------------------------------------------------


def split_chains(x: NDArray[Any]) -> NDArray[Any]:
    """Make two chains of the halves of each, all first halves before all second ones."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, x.shape[1] - half :]])


@lru_cache(maxsize=4)
def _normal_scores(size: int) -> NDArray[np.float64]:
    """Return the normal scores of the ranks 1, 1.5, …, ``size``; ties have halves for ranks."""
    ranks = np.arange(2, 2 * size + 1) / 2
    scores: NDArray[np.float64] = ndtri((ranks - 3 / 8) / (size + 1 / 4))
    scores.setflags(write=False)
    return scores


def normal_scores(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace draws of one entry by the normal scores of their ranks; NaN if any is not finite.

    One unstable sort and one table of normal quantiles for all entries take a tenth of the time of
    ``scipy.stats.rankdata`` and ``norm.ppf``, in which arviz's R̂ spends nearly all of its own.
    """
    flat = x.ravel()
    if flat.size == 0 or not np.isfinite(flat).all():
        return np.full(x.shape, np.nan)
    order = np.argsort(flat)
    ordered = flat[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    count = np.diff(first, append=flat.size)
    # The ranks first + 1, …, first + count of a group of ties have the mean below; the table
    # begins with rank 1 and goes by halves.
    scores = _normal_scores(flat.size)[2 * first + count - 1]
    result = np.empty(flat.size)
    result[order] = scores if len(first) == flat.size else np.repeat(scores, count)
    return result.reshape(x.shape)


def fold(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return distances from the median: what differs in scale now differs in location."""
    if x.size == 0:
        return x
    with np.errstate(invalid="ignore"):  # infinite draws
        folded: NDArray[np.float64] = np.abs(x - np.median(x))
    return folded


def r_hat_of_split(x: NDArray[np.float64]) -> float:
    """Return R̂ of chains that have been split and ranked already."""
    if 2 * x.shape[1] < MIN_DRAWS or not np.isfinite(x).all():
        return float("nan")
    if (x == x[:, :1]).all():  # where arviz divides by zero, its numba code to NaN
        return float("nan") if (x == x[0, 0]).all() else float("inf")
    return float(arviz().rhat(x, method="identity"))


def ess_of_split(x: NDArray[Any]) -> float:
    """Return the ESS for the mean of chains that have been split already."""
    if 2 * x.shape[1] < MIN_DRAWS or not np.isfinite(x).all():
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(arviz().ess(x, method="identity"))


def tail_ess(x: NDArray[np.float64]) -> float:
    """Return the smaller ESS of the 5% and the 95% quantile."""
    if not np.isfinite(x).all():
        return float("nan")
    low, high = np.quantile(x, [0.05, 0.95])
    return min(ess_of_split(split_chains(x <= quantile)) for quantile in (low, high))


def nested_r_hat_of_split(x: NDArray[np.float64], num_superchains: int) -> float:
    """Return nested R̂ of chains that have been split: halves of superchains are superchains."""
    return float(_nested_r_hat(torch.from_numpy(x), 2 * num_superchains))


# -- all entries ----------------------------------------------------------------------------


def rank_normalize(samples: Tensor) -> Tensor:
    r"""Replace draws by normal scores of their ranks among all draws of all chains.

    .. math:: z = \Phi^{-1}\Bigl(\frac{r - 3/8}{S + 1/4}\Bigr),

    with r the rank among the S draws of an entry, its average among draws that are equal. R̂ and ESS
    of z exist where the draws have no variance, and see any monotone transformation alike.

    Args:
        samples: Draws [num_chains, num_samples, \*shape].

    Returns:
        Scores of that shape, ``torch.float64`` on the CPU; NaN in an entry with a draw that is not
        finite.

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), equation 14
        | https://arxiv.org/abs/1903.08008

    Example:
        >>> rank_normalize(torch.tensor([[1.0, 100.0], [-5.0, 1.0]]))
        tensor([[ 0.0000,  1.0491],
                [-1.0491,  0.0000]], dtype=torch.float64)
    """
    if samples.numel() == 0:
        return torch.zeros(samples.shape, dtype=torch.float64)
    scores = torch.from_numpy(np.stack([normal_scores(entry) for entry in entries(samples)]))
    return scores.permute(1, 2, 0).reshape(samples.shape)


def _nested_r_hat(samples: Tensor, num_superchains: int) -> Tensor:
    chain_means = samples.mean(1).unflatten(0, (num_superchains, -1))  # [K, M, *shape]
    between = chain_means.mean(1).var(0)
    within = samples.new_zeros(())
    if samples.shape[1] > 1:
        within = within + samples.var(1).unflatten(0, (num_superchains, -1)).mean((0, 1))
    if chain_means.shape[1] > 1:
        within = within + chain_means.var(1).mean(0)
    ratio = torch.where(between == 0, 0.0, between / within)
    return (1.0 + ratio).sqrt()


def nested_r_hat(samples: Tensor, num_superchains: int, rank_normalized: bool = False) -> Tensor:
    r"""Compute the nested R̂ of many short chains.

    Chains are grouped: the M chains of a *superchain* start at one point, and different superchains
    at overdispersed points. With :math:`\bar x_{km}` the mean of chain m in superchain k,

    .. math:: \hat R = \sqrt{1 + B/W}, \quad B = \operatorname{Var}_k \bar x_{k}, \quad
        W = \operatorname{mean}_k [\operatorname{Var}_m \bar x_{km}
            + \operatorname{mean}_m \operatorname{Var}_n x_{kmn}].

    Plain R̂ asks every chain to have forgotten its start *and* to have estimated its mean well;
    with hundreds of short chains the second is not needed. Nested R̂ averages the noise of the M
    chains away and leaves the first. Without bias from the start it is about
    :math:`\sqrt{1 + 1/(M · \mathrm{ESS})}`, with the ESS of one chain.

    One chain of many in another mode hardly moves it: the variance between the chains of a
    superchain is part of W. :func:`~pyro_vae.mcmc.checks.check_chains` looks for that.

    Args:
        samples: Draws [num_chains, num_samples, \*shape]; chains of a superchain are neighbours.
        num_superchains: Number of superchains, at least 2; divides the number of chains.
        rank_normalized: Whether to do as :func:`split_r_hat` does: split each superchain into
            halves, which are superchains, and take the larger value of the ranked and of the folded
            draws. It sees drifts that all chains share, differences of scale, and draws without a
            variance, which the definition does not. The floor is then
            :math:`\sqrt{1 + 2/(M · \mathrm{ESS})}`.

    Returns:
        R̂ for every component [\*shape]; 1 where the draws are constant.

    Raises:
        ValueError: If the number of chains is no multiple of ``num_superchains``.

    References:
        | Nested R̂: Assessing the convergence of Markov chain Monte Carlo when running many short
          chains (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2022), definition 2.1
        | https://arxiv.org/abs/2110.13017
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), section 4.1
        | https://arxiv.org/abs/1903.08008

    Example:
        >>> draws = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
        >>> bool(nested_r_hat(draws, num_superchains=8) < 1.01)
        True
        >>> draws[:8] *= 2.0  # one superchain's scale, not its mean
        >>> bool(nested_r_hat(draws, 8) < 1.01), bool(nested_r_hat(draws, 8, True) < 1.01)
        (True, False)
    """
    _check_superchains(samples, num_superchains, least=2)
    if not rank_normalized:
        return _nested_r_hat(samples.detach().to(torch.float64), num_superchains)

    def largest(entry: NDArray[np.float64]) -> float:
        split = split_chains(entry)
        ranked = nested_r_hat_of_split(normal_scores(split), num_superchains)
        folded = nested_r_hat_of_split(normal_scores(fold(split)), num_superchains)
        return float(np.maximum(ranked, folded))  # NaN if either is

    return _by_entry(samples, largest)


def split_r_hat(samples: Tensor) -> Tensor:
    r"""Compute the split R̂ of rank-normalised and of folded draws, the larger of the two.

    .. math:: \hat R = \sqrt{\frac{n - 1}{n} + \frac{\operatorname{Var}_m \bar z_m}
        {\operatorname{mean}_m \operatorname{Var}_n z_{mn}}}

    over the halves m of all chains, each of n draws, where z are the draws as
    :func:`rank_normalize` gives them (do the chains agree on the location?), and the same of their
    distances from the median (do they agree on the scale?).

    Args:
        samples: Draws [num_chains, num_samples, \*shape].

    Returns:
        R̂ for every component [\*shape]; NaN where the draws are constant or not finite, or fewer
        than ten a chain; infinite where no chain moves.

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), section 4.1
        | https://arxiv.org/abs/1903.08008

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> bool(split_r_hat(draws) < 1.01)
        True
        >>> draws[0] *= 5.0  # a difference of scale alone
        >>> bool(split_r_hat(draws) > 1.1)
        True
    """

    def largest(entry: NDArray[np.float64]) -> float:
        split = split_chains(entry)
        ranked = r_hat_of_split(normal_scores(split))
        folded = r_hat_of_split(normal_scores(fold(split)))
        return float(np.maximum(ranked, folded))

    return _by_entry(samples, largest)


def running_r_hat(samples: Tensor, num_superchains: int) -> float:
    r"""Compute the largest R̂ over all entries in milliseconds, for a display while chains run.

    It is the nested R̂ of the halves of the superchains, without ranks and folding, and for chains
    that all have their own start the usual split R̂ but for a factor
    :math:`\sqrt{1 - 1/n}` on its within-chain part.

    Args:
        samples: Draws [num_chains, num_samples, \*shape] so far.
        num_superchains: Number of superchains; as many as chains where each has its own start.

    Returns:
        The largest R̂; NaN for fewer than four draws or one that is not finite.

    Raises:
        ValueError: If the number of chains is no multiple of ``num_superchains``.

    References:
        | Nested R̂: Assessing the convergence of Markov chain Monte Carlo when running many short
          chains (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2022), definition 2.1
        | https://arxiv.org/abs/2110.13017

    Example:
        >>> draws = torch.randn(64, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> running_r_hat(draws, num_superchains=8) < 1.01
        True
    """
    _check_superchains(samples, num_superchains, least=1)
    half = samples.shape[1] // 2
    if half < 2 or samples.numel() == 0:
        return float("nan")
    samples = samples.detach().to(torch.float64)
    split = torch.cat([samples[:, :half], samples[:, samples.shape[1] - half :]])
    return float(_nested_r_hat(split, 2 * num_superchains).max())


def effective_sample_size(samples: Tensor, method: Literal["bulk", "tail"] = "bulk") -> Tensor:
    r"""Compute the effective sample size over all chains, of the bulk or of the tails.

    .. math:: \mathrm{ESS} = \frac{S}{1 + 2 \sum_{t \ge 1} \hat\rho_t}, \quad
        \hat\rho_t = 1 - \frac{W - \operatorname{mean}_m \hat\gamma_{mt}}{\widehat{\mathrm{var}}^+},

    with the autocovariances :math:`\hat\gamma_{mt}` of chain m at lag t, W their mean at lag 0, the
    variance :math:`\widehat{\mathrm{var}}^+` over all chains, and the sum ended by Geyer's initial
    monotone sequence. The bulk is that of :func:`rank_normalize`'s scores, for means; the tails
    take the smaller one of the indicators of the 5% and the 95% quantile, for intervals.

    Args:
        samples: Draws [num_chains, num_samples, \*shape].
        method: Of what.

    Returns:
        ESS for every component [\*shape]; NaN where draws are not finite, or fewer than ten a
        chain.

    Raises:
        ValueError: For another ``method``.

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), sections 3.2 and 4.3
        | https://arxiv.org/abs/1903.08008

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> repeated = draws.repeat_interleave(10, dim=1)  # ten times as many, worth no more
        >>> bool(effective_sample_size(repeated) / effective_sample_size(draws) < 1.2)
        True
    """
    if method == "bulk":
        return _by_entry(samples, lambda x: ess_of_split(normal_scores(split_chains(x))))
    if method == "tail":
        return _by_entry(samples, tail_ess)
    raise ValueError(f"method: found {method!r}; expected 'bulk' or 'tail'")


def bfmi(energy: Tensor, pooled: bool = False) -> Tensor:
    r"""Compute the energy Bayesian fraction of missing information.

    .. math:: \mathrm{E\text{-}BFMI} =
        \frac{\operatorname{mean}_n (E_n - E_{n-1})^2}{\operatorname{Var}_n E_n}

    compares how far fresh momenta carry the energy in one transition with how far it has to go. It
    is 2 for energies that are independent, and small where a heavy tail is explored by a random
    walk over energies.

    Args:
        energy: Values of the Hamiltonian [num_chains, num_samples].
        pooled: Whether to give one value, the mean of the numerator over all chains by the variance
            of all their energies. Short chains that have not gone through all energies
            underestimate their own variance, and the smallest of hundreds of values is noise.

    Returns:
        The value of each chain [num_chains], or of all [].

    Raises:
        ValueError: If the energies are no matrix of at least two columns.

    References:
        | Diagnosing Suboptimal Cotangent Disintegrations in Hamiltonian Monte Carlo (Betancourt,
          2016), section 3
        | https://arxiv.org/abs/1604.00695

    Example:
        >>> energy = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
        >>> bfmi(energy).shape, bool((bfmi(energy, pooled=True) - 2).abs() < 0.1)
        (torch.Size([4]), True)
        >>> bool((bfmi(energy.cumsum(1)) < 0.01).all())
        True
    """
    if energy.dim() != 2 or energy.shape[1] < 2:
        raise ValueError(
            f"energy: found the shape {list(energy.shape)}; expected [num_chains, num_samples] "
            "with at least 2 samples"
        )
    energy = energy.detach().cpu().to(torch.float64)
    if pooled:
        return energy.diff(dim=1).square().mean() / energy.var()
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.asarray(arviz().bfmi(energy.numpy())))


def to_inference_data(**groups: dict[str, Any]) -> Any:
    r"""Convert groups of tensors to an arviz ``InferenceData``.

    Args:
        groups: ``posterior``, ``sample_stats`` and the like with values
            [num_chains, num_samples, \*shape]; ``observed_data`` with values [\*shape].

    Returns:
        The ``InferenceData``.
    """
    arrays = {
        group: {
            name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            for name, value in values.items()
        }
        for group, values in groups.items()
    }
    with warnings.catch_warnings():
        # Many short chains are meant: arviz takes them for a wrong shape.
        warnings.filterwarnings("ignore", message="More chains")
        return arviz().from_dict(**arrays)
