"""Have the chains converged, and how many independent draws are theirs worth?"""

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["effective_sample_size", "nested_r_hat", "split_r_hat", "to_inference_data"]


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        # ArviZ announces its own next major version once a day when imported.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    module: ModuleType = arviz
    return module


def nested_r_hat(samples: Tensor, num_superchains: int) -> Tensor:
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

    Args:
        samples: Draws [num_chains, num_samples, \*shape]; chains of a superchain are neighbours.
        num_superchains: Number of superchains, at least 2; divides the number of chains.

    Returns:
        R̂ for every component [\*shape]; 1 where the draws are constant.

    Raises:
        ValueError: If the number of chains is no multiple of ``num_superchains``.

    References:
        | Nested R̂: Assessing the convergence of Markov chain Monte Carlo when running many short
          chains (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2022), definition 2.1
        | https://arxiv.org/abs/2110.13017

    Example:
        >>> draws = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
        >>> bool(nested_r_hat(draws, num_superchains=8) < 1.01)
        True
    """
    num_chains = samples.shape[0] if samples.dim() > 0 else 0
    if num_superchains < 2 or num_chains % num_superchains != 0 or samples.dim() < 2:
        raise ValueError(
            f"num_superchains: found {num_superchains} for samples of shape {list(samples.shape)}; "
            "expected a divisor of the number of chains, the first dimension, of at least 2"
        )
    samples = samples.detach().to(torch.float64)
    chain_means = samples.mean(1).unflatten(0, (num_superchains, -1))  # [K, M, *shape]
    between = chain_means.mean(1).var(0)
    within = samples.new_zeros(())
    if samples.shape[1] > 1:
        within = within + samples.var(1).unflatten(0, (num_superchains, -1)).mean((0, 1))
    if chain_means.shape[1] > 1:
        within = within + chain_means.var(1).mean(0)
    ratio = torch.where(between == 0, 0.0, between / within)
    return (1.0 + ratio).sqrt()


def _by_component(samples: Tensor, method: str) -> Tensor:
    """Apply a diagnostic of arviz to draws [num_chains, num_samples, *shape]: [*shape]."""
    draws = samples.detach().cpu().to(torch.float64).numpy()
    flat = draws.reshape((*draws.shape[:2], -1))
    arviz = _arviz()
    diagnostic = {"ess": arviz.ess, "rhat": arviz.rhat}[method]
    values = [float(diagnostic(flat[:, :, i])) for i in range(flat.shape[2])]
    return torch.tensor(values, dtype=torch.float64).reshape(draws.shape[2:])


def effective_sample_size(samples: Tensor) -> Tensor:
    r"""Compute the bulk effective sample size, of rank-normalised draws, over all chains.

    Args:
        samples: Draws [num_chains, num_samples, \*shape].

    Returns:
        ESS for every component [\*shape].

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), section 4.3
        | https://arxiv.org/abs/1903.08008
    """
    return _by_component(samples, "ess")


def split_r_hat(samples: Tensor) -> Tensor:
    r"""Compute the split R̂ of rank-normalised and of folded draws, the larger of the two.

    Args:
        samples: Draws [num_chains, num_samples, \*shape].

    Returns:
        R̂ for every component [\*shape].

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), section 4.1
        | https://arxiv.org/abs/1903.08008
    """
    return _by_component(samples, "rhat")


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
    arviz = _arviz()
    with warnings.catch_warnings():
        # Many short chains are meant: arviz takes them for a wrong shape.
        warnings.filterwarnings("ignore", message="More chains")
        return arviz.from_dict(**arrays)
