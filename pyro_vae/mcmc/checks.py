"""Checks that judge a run of Markov chain Monte Carlo: may its draws be called the posterior?

:mod:`pyro_vae.mcmc.diagnostics` computes, this module judges: each ``check_*`` returns a
:class:`Check`, and :func:`check_mcmc` runs all that apply and returns a :class:`Verdict`.

The thresholds are such that what passes is wrong by no more than a few hundredths of a posterior
standard deviation in a mean: a nested R̂ of 1.01 by 0.14/√K over K starts, 400 effective draws by
0.05, one divergence in a thousand draws by 0.01 to 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from . import diagnostics

__all__ = [
    "Check",
    "ConvergenceError",
    "Verdict",
    "check_bfmi",
    "check_chains",
    "check_divergences",
    "check_ess",
    "check_mcmc",
    "check_nested_r_hat",
    "check_r_hat",
]

MAX_R_HAT = 1.01  # Vehtari et al. (2021), section 4.1
MIN_ESS = 400.0  # there, section 4.3: 50 for each half of four chains
MIN_BFMI = 0.3  # Betancourt (2016); the number is Stan's and arviz's
MAX_DIVERGENT = 1e-3  # measured, see check_divergences
FALSE_POSITIVE_RATE = 1e-3  # of a run, in checks that are tests

NUM_BATCHES = 20  # of a chain, for the standard error of its mean
MIN_MOVES = 0.1  # of those of the median chain
MIN_JUDGES = 3  # chains among which a majority can tell one from the others
SHOWN = 5  # chains that a message names
MIN_GATHERED = 5  # divergences of which one can say where they lie
GATHERED = 4.0  # standard errors by which their mean is away from the posterior's


class Check(NamedTuple):
    """What one check found.

    Attributes:
        name: What was checked.
        passed: Whether it passed; ``None`` where the run does not hold what the check needs.
        value: What was found, in the worst place.
        threshold: What it was held against.
        where: The worst place: an entry of a site, such as ``eta[3]``, or a chain.
        message: In one line: what was found, what is expected, and what to do.
    """

    name: str
    passed: bool | None
    value: float
    threshold: float
    where: str
    message: str

    def __str__(self) -> str:
        """Return the check as a line of the verdict."""
        mark = {True: "passed", False: "FAILED", None: "not checked"}[self.passed]
        return f"{self.name} {mark}: {self.message}"


class ConvergenceError(ValueError):
    """Draws that failed their checks were to be taken for the posterior.

    Attributes:
        verdict: The :class:`Verdict`.
    """

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True)
class Verdict:
    """What all checks of a run found; true if none failed.

    Attributes:
        checks: A :class:`Check` each.
        run: What was checked, in words.
    """

    checks: tuple[Check, ...]
    run: str

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        if self.passed:
            missing = ", ".join(check.name for check in self.checks if check.passed is None)
            return f"passed: {self.run}" + (f"; not checked: {missing}" if missing else "")
        return f"FAILED ({', '.join(check.name for check in self.failed)}): {self.run}"

    def __str__(self) -> str:
        """Return the headline and a line for each check."""
        return "\n".join([self.headline, *(f"  {check}" for check in self.checks)])

    def raise_if_failed(self) -> None:
        """Raise an error that holds the verdict, if a check failed.

        Raises:
            ConvergenceError: A ``ValueError``.
        """
        if not self.passed:
            raise ConvergenceError(str(self), self)


# -- what is checked ------------------------------------------------------------------------


class _Entry:
    """One entry of a site, [chains, n]; its ranks are computed once for all checks."""

    def __init__(self, label: str, draws: NDArray[np.float64]) -> None:
        self.label, self.draws = label, draws

    @cached_property
    def split(self) -> NDArray[np.float64]:
        return diagnostics.split_chains(self.draws)

    @cached_property
    def ranked(self) -> NDArray[np.float64]:
        return diagnostics.normal_scores(self.split)

    @cached_property
    def folded(self) -> NDArray[np.float64]:
        return diagnostics.normal_scores(diagnostics.fold(self.split))


class _Run:
    """Draws [chains, n, *shape] by site and what the sampler recorded, whoever drew them."""

    def __init__(
        self,
        samples: Mapping[str, Any],
        num_superchains: int | None = None,
        energy: Any = None,
        diverging: Any = None,
    ) -> None:
        self.samples = {name: _tensor(value).detach() for name, value in samples.items()}
        shapes = {name: list(value.shape[:2]) for name, value in self.samples.items()}
        if not shapes:
            raise ValueError("there are no draws to check: found no sites")
        self.shape = next(iter(shapes.values()))
        if len(self.shape) < 2 or any(shape != self.shape for shape in shapes.values()):
            raise ValueError(
                f"draws: found the first dimensions {shapes}; expected [num_chains, num_samples], "
                "the same for all sites"
            )
        if 0 in self.shape:
            raise ValueError(f"draws: found {self.shape[0]} chains of {self.shape[1]} draws")
        self.num_chains, self.num_samples = self.shape
        self.num_superchains = num_superchains or self.num_chains
        if self.num_chains % self.num_superchains != 0:
            raise ValueError(
                f"num_superchains: found {num_superchains}; expected a divisor of the number of "
                f"chains, {self.num_chains}"
            )
        self.energy = self._by_draw("energy", energy)
        self.diverging = self._by_draw("diverging", diverging)
        self._known: dict[str, list[Any]] = {}

    def _by_draw(self, name: str, value: Any) -> Tensor | None:
        if value is None:
            return None
        value = _tensor(value).detach().cpu()
        if list(value.shape) != self.shape:
            raise ValueError(
                f"{name}: found the shape {list(value.shape)}; expected {self.shape}, as the draws"
            )
        return value

    @classmethod
    def of(cls, mcmc: Any, num_superchains: int | None = None) -> _Run:
        if isinstance(mcmc, cls):
            return mcmc
        if hasattr(mcmc, "posterior"):
            return cls._of_inference_data(mcmc, num_superchains)
        if isinstance(mcmc, Mapping):
            return cls(mcmc, num_superchains)
        if not hasattr(mcmc, "get_samples"):
            raise ValueError(
                f"mcmc: found {type(mcmc).__name__}; expected a run HMC or MCMC, an InferenceData, "
                "or draws [num_chains, num_samples, ...] by site"
            )
        samples = mcmc.get_samples(group_by_chain=True)
        if hasattr(mcmc, "to_arviz"):  # our own, which records everything
            if num_superchains is None:
                num_superchains = mcmc.num_superchains
            recorded = getattr(mcmc, "sample_stats", None)  # spares making an InferenceData
            if recorded is None:
                recorded = mcmc.to_arviz(log_likelihood=False).sample_stats
            return cls(samples, num_superchains, **_recorded(recorded))
        run = cls(samples, num_superchains)
        # Pyro's MCMC: its diagnostics need four draws.
        found = mcmc.diagnostics().get("divergences") if run.num_samples >= 4 else None
        if found is not None:
            run.diverging = torch.zeros(run.shape, dtype=torch.bool)
            for chain in range(run.num_chains):
                run.diverging[chain, list(found[f"chain {chain}"])] = True
        return run

    @classmethod
    def _of_inference_data(cls, data: Any, num_superchains: int | None) -> _Run:
        samples = {
            str(name): value.transpose("chain", "draw", ...)
            for name, value in data.posterior.data_vars.items()
        }
        if num_superchains is None:
            num_superchains = data.posterior.attrs.get("num_superchains")
        recorded = _recorded(data.sample_stats) if "sample_stats" in data.groups() else {}
        return cls(samples, num_superchains, **recorded)

    def __str__(self) -> str:
        chains = "1 chain" if self.num_chains == 1 else f"{self.num_chains} chains"
        starts = (
            f" from {self.num_superchains} starts" if self.num_superchains < self.num_chains else ""
        )
        return f"{chains} of {self.num_samples} draws{starts}"

    def _entries(self) -> Iterator[_Entry]:
        """Go through the entries that vary.

        What has one value in all draws, such as the zeros of a Cholesky factor, has no R̂. Where it
        is computed, such as the ones on a correlation matrix's diagonal, it varies by rounding.
        """
        for name, value in self.samples.items():
            eps = torch.finfo(value.dtype).eps if value.dtype.is_floating_point else 0.0
            indices = np.ndindex(*value.shape[2:])
            for index, draws in zip(indices, diagnostics.entries(value), strict=True):
                low, high = draws.min(), draws.max()
                finite = math.isfinite(low) and math.isfinite(high)
                if not finite or high - low > 4 * eps * max(abs(low), abs(high)):
                    at = f"[{', '.join(map(str, index))}]" if index else ""
                    yield _Entry(name + at, draws)

    def compute(self, *names: str) -> None:
        """Compute statistics of all entries in one pass."""
        wanted = [name for name in names if name not in self._known]
        if not wanted:
            return
        table: dict[str, list[Any]] = {name: [] for name in ("label", *wanted)}
        for entry in self._entries():
            table["label"].append(entry.label)
            for name in wanted:
                table[name].append(_STATISTICS[name](entry, self))
        self._known.update(table)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return a statistic of every entry [entries, ...]."""
        self.compute(name)
        return np.array(self._known[name])

    @property
    def labels(self) -> list[str]:
        """Name the entries of the statistics."""
        return self._known["label"]

    @property
    def has_majority(self) -> bool:
        """Whether there is enough to tell one chain from the others."""
        return self.num_chains >= MIN_JUDGES and self.num_samples >= diagnostics.MIN_DRAWS

    @cached_property
    def not_finite(self) -> str:
        """Say which site has draws that are not finite, and in which chains; empty if none."""
        for name, value in self.samples.items():
            bad = ~torch.isfinite(value).flatten(1).all(1)
            if bad.any():
                chains = bad.nonzero().flatten().tolist()
                return f"site {name!r} has NaN or infinite draws in {_name_chains(chains)}"
        return ""


def _tensor(value: Any) -> Tensor:
    # A copy, since arrays that come out of xarray may not be writable, which torch warns of.
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _recorded(stats: Any) -> dict[str, Any]:
    """Return what checks need of a sampler's statistics, under arviz's names, where it is there."""
    found = {name: stats[name] for name in ("energy", "diverging") if name in stats}
    return {
        name: value if isinstance(value, Tensor) else value.transpose("chain", "draw")
        for name, value in found.items()
    }


def _larger_r_hat(entry: _Entry, run: _Run) -> float:
    ranked, folded = map(diagnostics.r_hat_of_split, (entry.ranked, entry.folded))
    return float(np.maximum(ranked, folded))


def _larger_nested_r_hat(entry: _Entry, run: _Run) -> float:
    ranked, folded = (
        diagnostics.nested_r_hat_of_split(x, run.num_superchains)
        for x in (entry.ranked, entry.folded)
    )
    return float(np.maximum(ranked, folded))


def _chance_r_hat(entry: _Entry, run: _Run) -> float:
    """Return what nested R̂ would be near if the starts were forgotten.

    The chains of a superchain differ by chance alone, and M of them make a superchain's mean.
    """
    groups = entry.ranked.mean(1).reshape(2 * run.num_superchains, -1)
    return math.sqrt(1 + groups.var(1, ddof=1).mean() / groups.shape[1])  # scores have W near 1


def _outlyingness(entry: _Entry, run: _Run) -> NDArray[np.float64]:
    """Return how far each chain's mean is from the others', in standard errors [chains]."""
    found = [_mean_z_scores(x, run.num_chains) for x in (entry.ranked, entry.folded)]
    result: NDArray[np.float64] = np.max(found, axis=0)
    return result


def _mean_z_scores(split: NDArray[np.float64], num_chains: int) -> NDArray[np.float64]:
    """Return |mean − median of the means| / standard error; see :func:`check_chains`."""
    x = np.concatenate([split[:num_chains], split[num_chains:]], axis=1)
    batches = _num_batches(x.shape[1])
    length = x.shape[1] // batches
    batch_means = x[:, : batches * length].reshape(num_chains, batches, length).mean(2)
    own = batch_means.var(1, ddof=1) / batches
    mean = x.mean(1)
    distance = np.abs(mean - np.median(mean))
    spread = 1.4826 * np.median(distance)  # the standard deviation of a normal distribution
    # The median of C means has itself a variance of π/(2C) of theirs.
    variance = np.maximum(own, spread**2) * (1 + math.pi / (2 * num_chains))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / np.sqrt(variance))


def _num_batches(num_samples: int) -> int:
    return min(NUM_BATCHES, num_samples // 2)


def _divergent_score(entry: _Entry, run: _Run) -> float:
    """Return the mean normal score of the draws at which trajectories diverged."""
    assert run.diverging is not None
    diverging = diagnostics.split_chains(run.diverging.numpy()).astype(bool)
    return float(entry.ranked[diverging].mean()) if diverging.any() else math.nan


_STATISTICS: dict[str, Callable[[_Entry, _Run], Any]] = {
    "r_hat": _larger_r_hat,
    "nested_r_hat": _larger_nested_r_hat,
    "chance_r_hat": _chance_r_hat,
    "bulk_ess": lambda entry, run: diagnostics.ess_of_split(entry.ranked),
    "tail_ess": lambda entry, run: diagnostics.tail_ess(entry.draws),
    "outlyingness": _outlyingness,
    "divergent_score": _divergent_score,
}


def _name_chains(chains: list[int]) -> str:
    shown = ", ".join(map(str, chains[:SHOWN]))
    more = f" and {len(chains) - SHOWN} more" if len(chains) > SHOWN else ""
    return ("chain " if len(chains) == 1 else "chains ") + shown + more


def _cannot_judge(run: _Run, name: str, threshold: float, statistic: str) -> Check | None:
    """Return the check where its statistic is NaN or there is none, with the reason."""
    values = run[statistic]
    if not run.labels:
        message = "no site varies: there is nothing to compare"
        return Check(name, None, math.nan, threshold, "", message)
    bad = np.isnan(values)
    if not bad.any():
        return None
    where = run.labels[int(bad.argmax())]
    if run.not_finite:
        message = f"{run.not_finite}; expected finite ones: find where the model is not finite"
    else:
        message = (
            f"cannot be told for {where} from {run}; expected at least {diagnostics.MIN_DRAWS} "
            "draws a chain: draw more"
        )
    return Check(name, False, math.nan, threshold, where, message)


# -- the checks -----------------------------------------------------------------------------


def check_r_hat(mcmc: Any, max_r_hat: float = MAX_R_HAT) -> Check:
    r"""Check that the chains agree: the split R̂ of rank-normalised and of folded draws.

    R̂ is near :math:`\sqrt{1 + 1/\mathrm{ESS}}` with the ESS of half a chain, so that 1.01 asks each
    chain for about 100 effective draws besides agreement. Chains that are meant to be shorter are
    judged by :func:`check_nested_r_hat`.

    Args:
        mcmc: As for :func:`check_mcmc`.
        max_r_hat: R̂ has to be below.

    Returns:
        The :class:`Check`; its value is the largest R̂.

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), section 4.1
        | https://arxiv.org/abs/1903.08008

    Example:
        >>> draws = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> check_r_hat({"w": draws}).passed
        True
        >>> draws[3, :, 1] += 5.0
        >>> check = check_r_hat({"w": draws})
        >>> check.passed, check.where
        (False, 'w[1]')
    """
    run, name = _Run.of(mcmc), "R̂"
    if check := _cannot_judge(run, name, max_r_hat, "r_hat"):
        return check
    worst = int(run["r_hat"].argmax())
    value, where = float(run["r_hat"][worst]), run.labels[worst]
    passed = value < max_r_hat
    message = f"largest {value:.4f} at {where}; expected below {max_r_hat:g}"
    if not passed:
        message += (
            ": the chains, or the halves of a chain, disagree; warm up for longer, draw more, or "
            "reparametrise"
        )
    return Check(name, passed, value, max_r_hat, where, message)


def check_nested_r_hat(
    mcmc: Any, max_r_hat: float = MAX_R_HAT, num_superchains: int | None = None
) -> Check:
    r"""Check that chains have forgotten where they started: nested R̂, ranked, folded and split.

    Nested R̂ averages over the M chains that share a start, and stays near
    :math:`\sqrt{1 + 2K/\mathrm{ESS}}` where the K starts are forgotten, with the ESS of all chains
    together: halves of superchains are superchains here. Below 1.01 the variance that the starts
    leave in a superchain's mean is less than 2% of the posterior's. To get there takes an ESS of
    more than 100 K, so that a failure may mean too few draws; its message says what chance alone
    would give, from how much the chains of one start differ.

    Args:
        mcmc: As for :func:`check_mcmc`.
        max_r_hat: Nested R̂ has to be below.
        num_superchains: Number of distinct starts, whose chains are neighbours, at least 2; by
            default what the run says.

    Returns:
        The :class:`Check`; its value is the largest nested R̂.

    Raises:
        ValueError: If there are fewer than two superchains, or they have but one chain.

    References:
        | Nested R̂: Assessing the convergence of Markov chain Monte Carlo when running many short
          chains (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2022)
        | https://arxiv.org/abs/2110.13017

    Example:
        >>> draws = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
        >>> check_nested_r_hat({"x": draws}, num_superchains=8).passed
        True
        >>> starts = torch.linspace(-1.0, 1.0, 8).repeat_interleave(8)
        >>> check_nested_r_hat({"x": draws + starts[:, None]}, num_superchains=8).passed
        False
    """
    run, name = _Run.of(mcmc, num_superchains), "nested R̂"
    if not 2 <= run.num_superchains < run.num_chains:
        raise ValueError(
            f"num_superchains: found {run.num_superchains} for {run.num_chains} chains; expected "
            "at least 2, of two chains or more"
        )
    if check := _cannot_judge(run, name, max_r_hat, "nested_r_hat"):
        return check
    worst = int(run["nested_r_hat"].argmax())
    value, where = float(run["nested_r_hat"][worst]), run.labels[worst]
    passed = value < max_r_hat
    message = f"largest {value:.4f} at {where}; expected below {max_r_hat:g}"
    if not passed:
        chance = float(run["chance_r_hat"][worst])
        message += f", and about {chance:.4f} by chance: "
        if value - 1 > 3 * (chance - 1):
            message += "chains from different starts disagree; warm up for longer or reparametrise"
        else:
            message += "draw more, or start from fewer points"
    return Check(name, passed, value, max_r_hat, where, message)


def check_ess(mcmc: Any, min_ess: float = MIN_ESS) -> Check:
    r"""Check that the draws are worth enough independent ones, in the bulk and in both tails.

    With 400 a mean is known to 0.05 posterior standard deviations. Vehtari et al. ask for 100 a
    chain of four, so that R̂ itself can be trusted; hundreds of chains share the task, and their sum
    is what counts.

    Args:
        mcmc: As for :func:`check_mcmc`.
        min_ess: Effective sample size over all chains that each entry has to have.

    Returns:
        The :class:`Check`; its value is the smallest ESS.

    References:
        | Rank-normalization, folding, and localization: an improved R̂ (Vehtari, Gelman, Simpson,
          Carpenter, Bürkner, 2021), section 4.3
        | https://arxiv.org/abs/1903.08008

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> check_ess({"x": draws}).passed, check_ess({"x": draws.cumsum(1)}).passed
        (True, False)
    """
    run, name = _Run.of(mcmc), "ESS"
    run.compute("bulk_ess", "tail_ess")
    for statistic in ("bulk_ess", "tail_ess"):
        if check := _cannot_judge(run, name, min_ess, statistic):
            return check
    ess = np.stack([run["bulk_ess"], run["tail_ess"]])
    bulk, tail = ess.min(1)
    value, where = float(ess.min()), run.labels[int(ess.min(0).argmin())]
    passed = value >= min_ess
    message = (
        f"smallest {bulk:.0f} in the bulk, {tail:.0f} in the tails, at {where}; expected at least "
        f"{min_ess:g}"
    )
    if not passed:
        factor = math.ceil(min_ess / max(value, 1.0))
        message += f": draw {factor} times as many, or reparametrise"
    return Check(name, passed, value, min_ess, where, message)


def check_bfmi(mcmc: Any, min_bfmi: float = MIN_BFMI) -> Check:
    r"""Check that fresh momenta reach all energies: the E-BFMI.

    The value of all chains together has to be large enough, as short chains that have not gone
    through all energies overestimate their own. A single chain's may be smaller by what chance
    explains: near the threshold b its standard error is :math:`2 \sqrt{b (1 - b/4)/n}`, that of an
    AR(1) process, and over all chains one run in a thousand would fail by chance.

    Args:
        mcmc: As for :func:`check_mcmc`.
        min_bfmi: What the E-BFMI has to reach.

    Returns:
        The :class:`Check`; its value is the E-BFMI of all chains, or that of the chain that fails;
        it is not checked where there are no energies.

    References:
        | Diagnosing Suboptimal Cotangent Disintegrations in Hamiltonian Monte Carlo (Betancourt,
          2016)
        | https://arxiv.org/abs/1604.00695
    """
    run, name = _Run.of(mcmc), "E-BFMI"
    if run.energy is None or run.num_samples < 2:
        return Check(
            name, None, math.nan, min_bfmi, "", "the run has no record of energies to judge by"
        )
    bad = ~torch.isfinite(run.energy).all(1)
    if bad.any():
        where = _name_chains(bad.nonzero().flatten().tolist())
        message = f"NaN or infinite energies in {where}; expected finite ones"
        return Check(name, False, math.nan, min_bfmi, where, message)
    pooled = float(diagnostics.bfmi(run.energy, pooled=True))
    by_chain = diagnostics.bfmi(run.energy)
    chain = int(by_chain.nan_to_num(nan=math.inf).argmin())
    lowest, where = float(by_chain[chain]), f"chain {chain}"
    standard_error = 2 * math.sqrt(min_bfmi * (1 - min_bfmi / 4) / run.num_samples)
    allowance = stats.norm.isf(FALSE_POSITIVE_RATE / run.num_chains) * standard_error
    value = lowest if pooled >= min_bfmi and lowest < min_bfmi - allowance else pooled
    passed = value >= min_bfmi
    message = (
        f"{pooled:.2f} over all chains, smallest {lowest:.2f} in {where}; expected at least "
        f"{min_bfmi:g}"
    )
    if not passed:
        message += ": the energy moves too slowly, as under heavy tails; reparametrise"
    return Check(name, passed, value, min_bfmi, where, message)


def check_divergences(mcmc: Any, max_proportion: float = MAX_DIVERGENT) -> Check:
    r"""Check that divergent trajectories are accidents, not a region that cannot be entered.

    Stan warns of any. Of half a million draws a few diverge where nothing is amiss, so what counts
    is their proportion: chains that pass by a region and fail to enter it diverge at every pass. In
    trials on the centred Eight Schools and on Neal's funnel (256 chains of 1000 draws, five
    acceptance targets each) the posterior mass that was missing from the neck was at most some five
    times the proportion: with 0.25% of draws divergent 1% was missing and a mean was off by 0.034
    standard deviations, with 0.09% and less by at most 0.014. The limit of 0.1% is for means and
    intervals; 0 is Stan's rule.

    The message says where divergences gather: there the posterior is hard.

    Args:
        mcmc: As for :func:`check_mcmc`.
        max_proportion: Largest proportion of divergent draws.

    Returns:
        The :class:`Check`; its value is the proportion; it is not checked where there is no record
        of divergences.

    References:
        | Diagnosing Biased Inference with Divergences (Betancourt, 2017)
        | https://mc-stan.org/learn-stan/case-studies/divergences_and_bias.html
    """
    run, name = _Run.of(mcmc), "divergences"
    if run.diverging is None:
        message = "the run has no record of divergences to judge by"
        return Check(name, None, math.nan, max_proportion, "", message)
    by_chain = run.diverging.to(torch.float64).sum(1)
    count, total = int(by_chain.sum()), run.diverging.numel()
    value, where = count / total, f"chain {int(by_chain.argmax())}" if count else ""
    passed = value <= max_proportion
    expected = math.floor(max_proportion * total)
    message = f"{count} of {total} draws; expected at most {expected}"
    scores = run["divergent_score"] if count >= MIN_GATHERED else np.empty(0)
    if np.isfinite(scores).any():
        worst = int(np.nan_to_num(np.abs(scores)).argmax())
        if abs(scores[worst]) * math.sqrt(count) > GATHERED:
            quantile = stats.norm.cdf(scores[worst])
            message += f"; most near the {100 * quantile:.1f}% quantile of {run.labels[worst]}"
    if not passed:
        message += ": reparametrise there, or raise the target acceptance"
    return Check(name, passed, value, max_proportion, where, message)


def check_chains(mcmc: Any, false_positive_rate: float = FALSE_POSITIVE_RATE) -> Check:
    r"""Check each chain against all others: does it move, and in the same place?

    One chain of many that stays in a mode of its own moves no R̂: among 256 chains it is 0.4% of the
    variance. So the mean of each chain, of the scores of
    :func:`~pyro_vae.mcmc.diagnostics.rank_normalize`, is compared with the median of all chains'
    means, and likewise that of the folded draws, which shows a chain whose scale is another. With
    C chains of n draws, for each entry

    .. math:: t_c = \frac{|\bar z_c - \operatorname{median}_c \bar z_c|}
        {\sqrt{(1 + \pi/2C) \max(s_c^2, v)}}

    where :math:`s_c^2` is the Monte Carlo variance of the chain's own mean from b = 20 batches of
    its draws, and v that of all chains' means, from their median absolute deviation, which stands
    firm while less than half of the chains go astray. Where the chains have converged, batch means
    that are long enough to be independent give t a Student distribution with b − 1 degrees of
    freedom; where they are not, because the chains mix slowly, the first variance is too small and
    the second is not; and a chain that visits a rare mode and returns has a large variance of its
    own. Bonferroni's bound over the C chains, the entries d and the two kinds of scores,

    .. math:: P(\max t > t^*) \le 2 C d \, P(|T_{b-1}| > t^*),

    gives the threshold t* for a false positive rate of a whole run. It is a bound: t is the smaller
    one of two ratios.

    With 4, 64 or 256 converged AR(1) chains of 5 effective draws and more the bound held: of 6000
    runs that R̂ or nested R̂ let pass, none was flagged. Modes between which a chain goes but once
    or twice in a run are not told from separate ones: then it takes longer chains.

    A chain that moves in fewer than a tenth of the iterations of the median chain is stuck,
    wherever it is. Fewer than three chains have no majority, and only their moves are checked.

    Args:
        mcmc: As for :func:`check_mcmc`.
        false_positive_rate: Probability that converged chains fail, over all chains and entries.

    Returns:
        The :class:`Check`; its value is the number of chains that are unlike the others.

    Example:
        >>> draws = torch.randn(256, 100, generator=torch.Generator().manual_seed(0))
        >>> check_chains({"x": draws}).passed
        True
        >>> draws[17] += 10.0  # a mode of its own
        >>> check = check_chains({"x": draws})
        >>> check.passed, check.where
        (False, 'chain 17')
        >>> check_nested_r_hat({"x": draws}, num_superchains=16).passed
        True
    """
    run, name = _Run.of(mcmc), "chains"
    if run.not_finite:
        message = f"{run.not_finite}; expected finite ones: find where the model is not finite"
        return Check(name, False, math.nan, 0.0, "", message)
    found, where = [], ""
    moves = _moves(run)
    if run.num_samples > 1:
        stuck = np.flatnonzero((moves == 0) | (moves < MIN_MOVES * np.median(moves))).tolist()
        if stuck:
            where = f"chain {stuck[0]}"
            found.append(
                f"{_name_chains(stuck)} moved {int(moves[stuck[0]])} times in "
                f"{run.num_samples - 1} iterations, the median chain {np.median(moves):.0f}"
            )
    else:
        stuck = []
    astray: list[int] = []
    if run.has_majority:
        t = run["outlyingness"].reshape(-1, run.num_chains)
        freedom = _num_batches(2 * (run.num_samples // 2)) - 1
        threshold = stats.t.isf(false_positive_rate / (4 * max(t.size, 1)), freedom)
        astray = np.flatnonzero((t > threshold).any(0)).tolist()
        if astray:
            entry, chain = np.unravel_index(t.argmax(), t.shape)
            where = where or f"chain {chain}"
            found.append(
                f"{_name_chains(astray)} stayed away from the others, most {chain} at "
                f"{run.labels[entry]}, by {t.max():.0f} of its standard errors (expected at most "
                f"{threshold:.1f})"
            )
    flagged = len({*stuck, *astray})
    if flagged:
        message = (
            "; ".join(found) + ": a mode of their own or a point that they cannot leave; "
            "warm up for longer or reparametrise, do not drop them"
        )
    elif not run.has_majority:
        message = (
            f"none is stuck; to compare them takes {MIN_JUDGES} of {diagnostics.MIN_DRAWS} draws"
        )
    else:
        message = f"none of {run.num_chains} is stuck or apart from the others"
    return Check(name, not flagged, float(flagged), 0.0, where, message)


def _moves(run: _Run) -> NDArray[np.float64]:
    """Return how many times each chain changed its position [chains]."""
    moved = torch.zeros((run.num_chains, run.num_samples - 1), dtype=torch.bool)
    for value in run.samples.values():
        for part in value.reshape(*run.shape, -1).split(diagnostics.BLOCK, dim=2):
            moved |= (part[:, 1:] != part[:, :-1]).any(2).cpu()
    return moved.sum(1).numpy().astype(np.float64)


def check_mcmc(
    mcmc: Any,
    *,
    num_superchains: int | None = None,
    max_r_hat: float = MAX_R_HAT,
    min_ess: float = MIN_ESS,
    min_bfmi: float = MIN_BFMI,
    max_divergent: float = MAX_DIVERGENT,
) -> Verdict:
    r"""Run every check and say whether the draws may be called the posterior.

    Where many chains share a start, nested R̂ says whether they have forgotten it; where each has
    its own, R̂ does. A check that needs what the run did not record says so. Entries with one value
    in all draws, such as the zeros of a Cholesky factor, are left out.

    Args:
        mcmc: A run :class:`~pyro_vae.mcmc.HMC` or :class:`pyro.infer.MCMC`, an arviz
            ``InferenceData``, or draws by site, [num_chains, num_samples, \*shape].
        num_superchains: Number of distinct starts, whose chains are neighbours; by default what our
            HMC says, and as many as chains for others.
        max_r_hat: See :func:`check_r_hat` and :func:`check_nested_r_hat`.
        min_ess: See :func:`check_ess`.
        min_bfmi: See :func:`check_bfmi`.
        max_divergent: See :func:`check_divergences`.

    Returns:
        The :class:`Verdict`: print it, ask for ``passed``, or call ``raise_if_failed``.

    Raises:
        ValueError: If there are no draws, or their shapes do not fit together.

    Example:
        >>> draws = torch.randn(256, 100, generator=torch.Generator().manual_seed(0))
        >>> verdict = check_mcmc({"x": draws}, num_superchains=16)
        >>> print(verdict.headline)
        passed: 256 chains of 100 draws from 16 starts; not checked: E-BFMI, divergences
        >>> draws[17] += 8.0
        >>> print(check_mcmc({"x": draws}, num_superchains=16).headline)
        FAILED (chains): 256 chains of 100 draws from 16 starts
    """
    run = _Run.of(mcmc, num_superchains)
    nested = 1 < run.num_superchains < run.num_chains
    statistics = ["nested_r_hat" if nested else "r_hat", "bulk_ess", "tail_ess"]
    if run.has_majority:
        statistics.append("outlyingness")
    if run.diverging is not None and int(run.diverging.sum()) >= MIN_GATHERED:
        statistics.append("divergent_score")
    run.compute(*statistics)
    return Verdict(
        (
            check_nested_r_hat(run, max_r_hat) if nested else check_r_hat(run, max_r_hat),
            check_ess(run, min_ess),
            check_chains(run),
            check_bfmi(run, min_bfmi),
            check_divergences(run, max_divergent),
        ),
        str(run),
    )
