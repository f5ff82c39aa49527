"""Guides beside HMC: how far is each one's posterior from the truth?"""

from __future__ import annotations

import difflib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.poutine as poutine
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm import tqdm

from .capture import UnconstrainedModel
from .divergences import knn_kl
from .fit import adversarial_recipe, fit, has_learned_density
from .guides import AutoFlow, AutoImplicit
from .losses import AVB_ELBO
from .mcmc import HMC
from .mcmc.checks import ConvergenceError, Verdict, check_mcmc
from .mcmc.diagnostics import to_inference_data
from .plots import plot_convergence, plot_marginals
from .threads import one_thread_if_small

__all__ = ["GUIDES", "Comparison", "compare"]

#: Guides that :func:`compare` knows by name: each takes a model to a guide.
GUIDES: dict[str, Callable[[Callable], Callable]] = {
    "mean_field": AutoNormal,
    "full_rank": AutoMultivariateNormal,
    "flow": AutoFlow,
    "implicit": AutoImplicit,
}

REFERENCE = "hmc"
FAILED_REFERENCE = f"{REFERENCE} (failed its checks)"
COLUMNS = (
    "guide",
    "kl",
    "kl_se",
    "knn_kl",
    "knn_kl_se",
    "elbo",
    "max_mean_error",
    "max_sd_error",
    "khat",
    "steps",
    "seconds",
)

MIN_DRAWS = 4  # that have a third neighbour
TRIAL_DRAWS = 3  # on which running many at once is held against running them one by one
LOOPED_PARTICLES = 8  # where the model or the guide has to be run once a draw
LOOPED_CURVE_DRAWS = 500
LARGE_KL = 0.5  # nats from which an estimate by neighbours is held against one by densities
EQUAL_WEIGHTS = 1e-3  # nats by which log importance weights may differ and count as equal
CURVE_POINTS = 12
CURVE_DRAWS = 2500  # a side shows where a curve goes; the table takes num_draws


class Evidence(NamedTuple):
    """log p(x) in nats, by importance sampling from a guide.

    Attributes:
        value: The logarithm of the importance weights' mean.
        standard_error: Its Monte Carlo standard error, by the delta method.
        guide: The label of the guide that was drawn from.
    """

    value: float
    standard_error: float
    guide: str


class Comparison:
    """Posteriors of several guides beside a reference.

    Attributes:
        table: One row a posterior, the reference against itself first. See :func:`compare`.
        draws: By name, reference last: by site, draws [num_draws, *site].
        curves: By guide: pairs of step and kNN KL to the reference while it was fitted, on fewer
            draws than in the table.
        baseline: The kNN KL of the reference to itself on as many draws as in the curves.
        errors: By guide: why its fit failed.
        reference: What the reference draws came from.
        reference_chains: By site, thinned draws of the reference [chains, n, *site].
        verdict: What :func:`~pyro_vae.mcmc.checks.check_mcmc` found in the reference. If it is
            false, the reference's row is named ``hmc (failed its checks)``: no row then says how
            far a guide is from the posterior.
        evidence: log p(x), an :class:`Evidence`, or ``None`` if no guide's importance weights can
            be trusted.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        draws: Mapping[str, Mapping[str, NDArray]],
        curves: Mapping[str, Sequence[tuple[int, float]]],
        baseline: float,
        errors: Mapping[str, str],
        reference: Any,
        reference_chains: Mapping[str, NDArray],
        verdict: Verdict,
        evidence: Evidence | None,
    ) -> None:
        self.table = table
        self.draws = draws
        self.curves = curves
        self.baseline = baseline
        self.errors = errors
        self.reference = reference
        self.reference_chains = reference_chains
        self.verdict = verdict
        self.evidence = evidence

    def __repr__(self) -> str:
        table = self.table.drop(columns="error", errors="ignore")
        lines = [table.to_string(index=False, na_rep="", float_format="{:.4g}".format)]
        if self.evidence:
            value, se, label = self.evidence
            lines.append(f"log p(x) = {value:.4g} ± {se:.2g}, by importance sampling from {label}")
        lines += [
            f"{label}: knn_kl is {knn:.2g}, kl is {kl:.2g} nats: believe the latter"
            for label, kl, knn in self.table[["guide", "kl", "knn_kl"]].to_numpy()
            if kl > LARGE_KL and knn < kl / 2
        ]
        lines += [f"{label} failed: {error}" for label, error in self.errors.items()]
        if not self.verdict.passed:
            lines.append(f"{REFERENCE} {self.verdict}")
        return "\n".join(lines)

    def plot(self, pairs: Sequence[tuple[str, str]] | None = None) -> Figure:
        """Draw two-dimensional marginals, one column a posterior, the reference last.

        Args:
            pairs: Coordinates of each row, such as ``("tau", "eta[0]")``; by default the first
                with the second and the second with the third.

        Raises:
            ValueError: For a coordinate that the model does not have.
        """
        coordinates = {label: _coordinates(values) for label, values in self.draws.items()}
        names = list(coordinates[REFERENCE])
        if pairs is None:
            pairs = list(pairwise(names[:3])) or [(names[0], names[0])]
        for name in (name for pair in pairs for name in pair):
            if name not in names:
                raise ValueError(f"pairs: found the coordinate {name!r}, expected some of {names}")
        coordinates[_reference_name(self.verdict)] = coordinates.pop(REFERENCE)
        return plot_marginals(coordinates, pairs)

    def plot_convergence(self) -> Figure:
        """Draw the KL divergence to the reference against optimisation steps.

        Raises:
            ValueError: If no guide was fitted here.
        """
        if not self.curves:
            raise ValueError("no guide was fitted in this comparison: there is no curve to plot")
        return plot_convergence(self.curves, baseline=self.baseline)

    def to_arviz(self) -> dict[str, az.InferenceData]:
        """Return an ``InferenceData`` with a ``posterior`` group for each posterior, by name.

        The reference keeps its chains, thinned to about as many draws as the guides', and its
        ``posterior`` has the attribute ``checks``, the verdict on all its draws; a guide's draws
        are independent and count as one chain.
        """
        chains = {
            label: {name: x[None] for name, x in values.items()}
            for label, values in self.draws.items()
        }
        chains[REFERENCE] = dict(self.reference_chains)
        result = {label: to_inference_data(posterior=values) for label, values in chains.items()}
        result[REFERENCE].posterior.attrs["checks"] = str(self.verdict)
        return result

    def save(self, directory: str | Path) -> None:
        """Write the table, the reference's checks, the pictures and the draws.

        The files are ``table.csv``, ``checks.txt``, ``posterior.png``, ``convergence.png`` and
        ``draws.nc``, in which each posterior is a group:
        ``az.InferenceData.from_netcdf(file, base_group="flow")``.

        Args:
            directory: Made if it does not exist; files of these names are replaced.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.table.to_csv(directory / "table.csv", index=False)
        (directory / "checks.txt").write_text(f"{REFERENCE} {self.verdict}\n", encoding="utf-8")
        self.plot().savefig(directory / "posterior.png", dpi=120)
        convergence = directory / "convergence.png"
        convergence.unlink(missing_ok=True)
        if self.curves:
            self.plot_convergence().savefig(convergence, dpi=120)
        file = directory / "draws.nc"
        file.unlink(missing_ok=True)
        for label, data in self.to_arviz().items():
            data.to_netcdf(str(file), base_group=label, overwrite_existing=False)


def compare(
    model: Callable,
    guides: Sequence[str | Callable] | Mapping[str, str | Callable] = tuple(GUIDES),
    *args: Any,
    reference: Any = None,
    num_steps: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    num_draws: int = 10_000,
    num_chains: int = 256,
    num_samples: int = 2000,
    allow_failed_checks: bool = False,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Comparison:
    r"""Fit guides to a model's posterior and measure how far each one is from the reference.

    The table has one row a posterior. The first is the reference against itself, one half of its
    chains against the other: what the estimators say when there is no difference. Before that it
    has to pass :func:`~pyro_vae.mcmc.checks.check_mcmc`, on the model's sites: R̂ or nested R̂, ESS,
    each chain against the others, and of HMC and MCMC what they recorded.

    ==================  ===========================================================================
    ``kl``              KL(guide ‖ posterior) = log p(x) − ELBO in nats, where the guide has a true
                        density, with log p(x) by importance sampling from the guide that gives
                        most, two standard errors less, of those with k̂ below 0.7 (0.57 for 200
                        draws). If all of these miss the same part of the posterior, it is too small
                        by −log of the share that they reach
    ``kl_se``           its Monte Carlo standard error
    ``knn_kl``          KL(guide ‖ reference) in nats, by :func:`~pyro_vae.divergences.knn_kl` on
                        ``num_draws`` draws a side, in unconstrained space, each coordinate divided
                        by the reference's standard deviation. It needs no density, but is too
                        small above some ten dimensions, above all for guides that are too wide
    ``knn_kl_se``       its Monte Carlo standard error
    ``elbo``            evidence lower bound in nats, from ``num_draws`` draws; where the guide's
                        density is learned, what the discriminator claims: no bound, and it was
                        trained on the last iterates where the guide is their average
    ``max_mean_error``  largest difference of a site's mean from the reference's, in its posterior
                        standard deviations
    ``max_sd_error``    largest difference of a site's standard deviation, in the same unit
    ``khat``            Pareto k̂ of the importance weights, usable below 0.7; 0 where they are all
                        equal; only where the guide has a true density
    ``steps``           optimisation steps, or transitions of each chain
    ``seconds``         time to fit or to sample, compilation included
    ==================  ===========================================================================

    A guide whose fit fails has a row of NaNs, and a column ``error`` appears that says why.
    Model parameters are held fixed. The parameter store is left as it was: modules are fitted in
    place, but what ``pyro.param`` statements of a plain function make is forgotten; fit such a
    guide beforehand and pass ``num_steps=0``.

    Args:
        model: A Pyro model with continuous latent sites.
        guides: Names in :data:`GUIDES`, or guides: anything with a Pyro guide's interface. A
            mapping gives them labels.
        *args: Passed to model and guides.
        reference: Run :class:`~pyro_vae.mcmc.HMC` or :class:`pyro.infer.MCMC`, or draws by site,
            [n, \*site] or [chains, n, \*site]. By default our HMC, run here. Thin draws that repeat
            because proposals were rejected: repeats make ``knn_kl`` look smaller. Its rows and
            draws go by the name ``hmc``, whatever it is.
        num_steps: Optimisation steps of every guide; 0 takes the guides as they are. By default
            what each kind of guide needs.
        options: By label of the guide: arguments of :func:`~pyro_vae.fit`, ``loss`` included, that
            replace the defaults and ``num_steps``.
        num_draws: Draws of each guide, and of each half of the reference.
        num_chains: Chains of the reference run here.
        num_samples: Draws of each of its chains, after as many warm-up steps as HMC takes by
            default.
        allow_failed_checks: Whether to go on with a reference that failed its checks, with a
            warning. Its row is then named ``hmc (failed its checks)``, in the table and pictures.
        seed: Seed of everything random here; afterwards the generator goes on as if nothing had
            been drawn. ``None`` uses the generator as it is.
        progress: Whether to show progress bars and rows as they come.
        **kwargs: Passed to model and guides.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: For an unknown guide; a guide that misses a site of the model or has one too
            many; if no guide can be run; discrete latents, NaN in the data or a subsampled plate;
            a reference without one of the model's sites or with fewer than four draws in a half.
        ConvergenceError: If the reference failed its checks: a ``ValueError`` with the ``verdict``.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> comparison = compare(
        ...     gauss, [AutoNormal(gauss)], num_chains=64, num_samples=200, num_draws=800,
        ...     num_steps=300, progress=False,
        ... )
        >>> list(comparison.table["guide"])
        ['hmc', 'AutoNormal']
        >>> comparison.verdict.headline
        'passed: 64 chains of 200 draws from 16 starts'
    """
    if num_draws < MIN_DRAWS:
        raise ValueError(f"num_draws must be at least {MIN_DRAWS}, found {num_draws}")
    if num_steps is not None and num_steps < 0:
        raise ValueError(f"num_steps must not be negative, found {num_steps}")
    built = _build_guides(model, guides)
    options = dict(options or {})
    for label in options:
        if label not in built:
            raise ValueError(f"options: found {label!r}, expected some of {list(built)}")
    density = UnconstrainedModel(model, args, kwargs)
    failures = {}
    for label, guide in built.items():
        with _seeded(seed), _private_params(guide):  # a guide's first call makes its parameters
            try:
                found = _find_sites(guide, args, kwargs)
            except Exception as error:  # its row will say so
                failures[label] = error
                continue
        _check_sites(label, found, set(density.sites))
    if len(failures) == len(built):
        label, failure = next(iter(failures.items()))
        raise ValueError(
            f"guide {label!r} cannot be run with the model's arguments: {_describe(failure)}"
        ) from failure
    with _seeded(seed):
        truth = _Reference(
            reference, density, num_draws, num_chains, num_samples, allow_failed_checks, progress
        )
        rows, errors, draws, curves = [truth.row()], {}, {}, {}
        log_weights: dict[str, Tensor] = {}
        for label, guide in built.items():
            with _seeded(seed), _private_params(guide):
                study = _Study(label, guide, density, truth, progress)
                try:
                    study.fit(num_steps, options.get(label, {}))
                    row, draws[label], weights = study.judge(num_draws)
                    if not math.isnan(row["khat"]):
                        log_weights[label] = weights
                except Exception as error:  # one guide's failure must not cost the other rows
                    errors[label] = _describe(error)
                    row = {"guide": label}
                if study.curve:
                    curves[label] = study.curve
            rows.append(row)
            if progress:
                result = errors.get(label) or f"KL to the reference {row['knn_kl']:.3f}"
                _say(f"{label}: {result}")
    evidence = _add_kl(rows, log_weights)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["kl"], table["kl_se"] = table["kl"].astype(float), table["kl_se"].astype(float)
    table["steps"] = table["steps"].astype("Int64")
    if errors:
        table["error"] = table["guide"].map(errors)
    draws[REFERENCE] = truth.draws
    baseline = truth.own_kl(CURVE_DRAWS).value
    return Comparison(
        table, draws, curves, baseline, errors, truth.source, truth.chains, truth.verdict, evidence
    )


class _Reference:
    """The truth, if it passes its checks: two halves of its unconstrained draws, each [n, d]."""

    def __init__(
        self,
        source: Any,
        density: UnconstrainedModel,
        num_draws: int,
        num_chains: int,
        num_samples: int,
        allow_failed_checks: bool,
        progress: bool,
    ) -> None:
        self.density = density
        self.steps, self.seconds = None, math.nan
        if source is None:
            source = HMC(density.model, num_chains, num_samples, progress=progress)
            started = time.perf_counter()
            source.run(*density.args, **density.kwargs)
            self.seconds = time.perf_counter() - started
            self.steps = source.warmup_steps + source.num_samples
        self.source = source
        values = _get_samples(source)
        z = _chains(values, density)
        if constant := _name_sites(density, z.flatten(0, 1).std(0) == 0):
            raise ValueError(
                f"reference: the sites {constant} have an entry with one value in all draws; "
                "expected draws from a density"
            )
        self.verdict = check_mcmc(_to_sites(density, z) if source is values else source)
        _accept(self.verdict, allow_failed_checks, progress)
        chains_per_start = 1
        if isinstance(source, HMC):
            chains_per_start = source.num_chains // source.num_superchains
        halves = _halve(z, chains_per_start)
        self.first, self.second = (_thin(half, num_draws) for half in halves)
        self.draws = _to_sites(density, self.first)
        self.chains = _to_sites(density, z[:, :: max(1, z.shape[0] * z.shape[1] // num_draws)])
        self.half_moments = [_moments(_to_sites(density, half)) for half in halves]
        self.moments = _moments(_to_sites(density, z.flatten(0, 1)))
        self.scale = z.flatten(0, 1).std(0)

    def kl(self, z: Tensor) -> Any:
        """Return the kNN KL of draws z [n, d] to as many of the reference's, in its sds.

        As many, because the estimator's bias depends on both numbers.
        """
        count = min(len(z), len(self.first))
        return knn_kl(_thin(z, count) / self.scale, _thin(self.first, count) / self.scale)

    def own_kl(self, num_draws: int) -> Any:
        """Return the kNN KL of the reference's second half to its first."""
        # Draws that repeat because proposals were rejected are no atoms of the posterior.
        draws = _thin(self.second, num_draws)
        _, first_seen = np.unique(draws.cpu().numpy(), axis=0, return_index=True)
        return self.kl(draws[np.sort(first_seen)])

    def row(self) -> dict[str, Any]:
        """Return the reference's own row: its second half against the first."""
        kl = self.own_kl(len(self.second))
        return {
            "guide": _reference_name(self.verdict),
            "knn_kl": kl.value,
            "knn_kl_se": kl.standard_error,
            **_moment_errors(*reversed(self.half_moments)),
            "steps": self.steps,
            "seconds": self.seconds,
        }


class _Study:
    """One guide on its way from a fit to its row."""

    def __init__(
        self,
        label: str,
        guide: Callable,
        density: UnconstrainedModel,
        truth: _Reference,
        progress: bool,
    ) -> None:
        self.label, self.guide, self.density, self.truth = label, guide, density, truth
        self.progress = progress
        self.curve: list[tuple[int, float]] = []
        self.steps, self.seconds = 0, 0.0
        self.learned_density, self.vectorized = False, True

    def fit(self, num_steps: int | None, options: Mapping[str, Any]) -> None:
        density = self.density
        self.learned_density = has_learned_density(self.guide, *density.args, **density.kwargs)
        self.vectorized = _vectorizes(self.label, density, self.guide)
        recipe = _recipe(density, self.guide, self.learned_density, self.vectorized)
        if num_steps is not None:
            recipe["num_steps"] = num_steps
        recipe = {**recipe, **options}
        self.steps = recipe["num_steps"]
        if not self.steps:
            return
        loss = recipe.pop("loss")
        recipe = {
            "train_model": False,
            "callback": self._record,
            "callback_every": max(1, self.steps // CURVE_POINTS),
            "progress": self.progress,
            "description": self.label,
            **recipe,
        }
        with one_thread_if_small(loss.num_particles * density.size, density.device):
            result = fit(density.model, self.guide, loss, *density.args, **recipe, **density.kwargs)
        self.seconds = result.seconds

    def _record(self, step: int, loss: float) -> None:
        count = CURVE_DRAWS if self.vectorized else LOOPED_CURVE_DRAWS
        z, _ = _draw(self.density, self.guide, count, self.vectorized)
        if z.isfinite().all():
            self.curve.append((step, self.truth.kl(z).value))

    def judge(self, num_draws: int) -> tuple[dict[str, Any], dict[str, NDArray], Tensor]:
        """Return the row, draws by site, and log p(x, z) − log q(z) of each [num_draws]."""
        z, log_weights = _draw(self.density, self.guide, num_draws, self.vectorized)
        kl, draws = self.truth.kl(z), _to_sites(self.density, z)
        khat = math.nan
        if not self.learned_density and math.isfinite(kl.value):  # infinite at a guide with atoms
            khat = _pareto_khat(log_weights)
        row = {
            "guide": self.label,
            "knn_kl": kl.value,
            "knn_kl_se": kl.standard_error,
            "elbo": log_weights.mean().item(),
            **_moment_errors(_moments(draws), self.truth.moments),
            "khat": khat,
            "steps": self.steps,
            "seconds": self.seconds,
        }
        return row, draws, log_weights


def _add_kl(rows: Sequence[dict[str, Any]], log_weights: Mapping[str, Tensor]) -> Evidence | None:
    """Complete the rows of guides with a density by log p(x) − ELBO; return log p(x).

    The bound on k̂ is that of Pareto smoothed importance sampling (Vehtari et al., 2024), section
    3.2.3: what so many draws can tell the mean of.
    """
    by_label = {row["guide"]: row for row in rows}
    found = [
        Evidence(*_log_mean(weights), label)
        for label, weights in log_weights.items()
        if by_label[label]["khat"] < min(0.7, 1 - 1 / math.log10(len(weights)))
    ]
    if not found:
        return None
    # Weights that miss a part of the posterior are smaller, never larger but by noise.
    evidence = max(found, key=lambda e: e.value - 2 * e.standard_error)
    for label, weights in log_weights.items():
        row, x = by_label[label], weights.double()
        row["kl"] = evidence.value - x.mean().item()
        row["kl_se"] = math.hypot(evidence.standard_error, x.std().item() / len(x) ** 0.5)
    return evidence


def _log_mean(log_weights: Tensor) -> tuple[float, float]:
    """Return the logarithm of the weights' mean, and its standard error by the delta method."""
    x = log_weights.double()
    weights = (x - x.max()).exp()
    relative = (weights.std() / weights.mean()).item() / len(x) ** 0.5
    return (x.max() + weights.mean().log()).item(), relative


def _build_guides(
    model: Callable, guides: Sequence[str | Callable] | Mapping[str, str | Callable]
) -> dict[str, Callable]:
    """Return guides by label, those given by name made for the model."""
    if isinstance(guides, str) or not isinstance(guides, (Sequence, Mapping)):
        guides = [guides]
    if not isinstance(guides, Mapping):
        labels = [g if isinstance(g, str) else _guide_name(g) for g in guides]
        repeated = {label for label in labels if labels.count(label) > 1}
        if repeated:
            raise ValueError(
                f"guides: found {sorted(repeated)} more than once; give a mapping from labels"
            )
        guides = dict(zip(labels, guides, strict=True))
    if not guides:
        raise ValueError(f"guides: found none, expected some of {list(GUIDES)} or guides")
    if REFERENCE in guides:
        raise ValueError(f"guides: the label {REFERENCE!r} is the reference's")
    built = {}
    for label, guide in guides.items():
        if not isinstance(label, str):
            raise ValueError(f"guides: the label {label!r} must be a string")
        if isinstance(guide, str):
            if guide not in GUIDES:
                near = difflib.get_close_matches(guide, GUIDES, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"guides: found the unknown name {guide!r}, expected some of "
                    f"{list(GUIDES)}{hint}"
                )
            guide = GUIDES[guide](model)
        if isinstance(guide, type):
            raise ValueError(
                f"guides: {label!r} is a class; expected an instance, such as {label}(model)"
            )
        if not callable(guide):
            raise ValueError(f"guides: {label!r} is not callable, found {type(guide).__name__}")
        built[label] = guide
    return built


def _guide_name(guide: Callable) -> str:
    return getattr(guide, "__name__", type(guide).__name__)


def _recipe(
    density: UnconstrainedModel, guide: Callable, learned_density: bool, vectorized: bool
) -> dict[str, Any]:
    """Say how a kind of guide is fitted."""
    particles: dict[str, Any] = {
        "num_particles": 128 if vectorized else LOOPED_PARTICLES,
        "vectorize_particles": vectorized,
        "max_plate_nesting": _max_plate_nesting(density, guide),
    }
    if learned_density:
        return {"loss": AVB_ELBO(num_adversary_particles=384, **particles), **adversarial_recipe()}
    learning_rate = 5e-3 if isinstance(guide, AutoFlow) else 2e-2
    return {
        "loss": Trace_ELBO(**particles),
        "num_steps": 2400 if isinstance(guide, AutoFlow) else 1500,
        "optim": partial(torch.optim.Adam, lr=learning_rate),
        "average": 0.99,
    }


def _find_sites(guide: Callable, args: tuple, kwargs: dict) -> set[str]:
    """Return the names of the latent sites that a guide samples."""
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name
        for name, site in trace.iter_stochastic_nodes()
        if not site["infer"].get("is_auxiliary") and not site_is_subsample(site)
    }


def _check_sites(label: str, found: set[str], expected: set[str]) -> None:
    missing, extra = expected - found, found - expected
    if missing or extra:
        parts = [f"misses the model's sites {sorted(missing)}"] if missing else []
        parts += [f"has the sites {sorted(extra)}, which the model does not"] if extra else []
        raise ValueError(
            f"guide {label!r} {' and '.join(parts)}: found {sorted(found)}, "
            f"expected {sorted(expected)} (others need infer={{'is_auxiliary': True}})"
        )


def _reference_name(verdict: Verdict) -> str:
    return REFERENCE if verdict.passed else FAILED_REFERENCE


def _accept(verdict: Verdict, allow_failed_checks: bool, progress: bool) -> None:
    """Say what the checks of the reference found; refuse it, or warn, if one failed."""
    if not verdict.passed and not allow_failed_checks:
        raise ConvergenceError(
            f"the reference failed its checks, so it is not called the posterior: {verdict}\n"
            "Do what the lines above say, with more chains or samples or a reference of your own; "
            "or go on with a reference that is marked as failed, by allow_failed_checks",
            verdict,
        )
    if progress:
        _say(f"{REFERENCE}: {verdict.headline}")
    if not verdict.passed:
        warnings.warn(
            f"the reference failed its checks, and every row may be wrong with it: {verdict}",
            stacklevel=4,
        )


def _say(line: str) -> None:
    """Print a line above the progress bars, on stderr as they are."""
    tqdm.write(line, file=sys.stderr)


def _chains(values: Mapping[str, Any], density: UnconstrainedModel) -> Tensor:
    """Return reference draws by site as unconstrained vectors [chains, n, d]."""
    missing = set(density.sites) - set(values)
    if missing:
        raise ValueError(
            f"reference: the model's sites {sorted(missing)} are missing, found {sorted(values)}"
        )
    grouped = {}
    for name, site in density.sites.items():
        x = torch.as_tensor(values[name], dtype=density.dtype, device=density.device).detach()
        batch = x.dim() - len(site.shape)
        if batch not in (1, 2) or x.shape[batch:] != site.shape:
            raise ValueError(
                f"reference: site {name!r} has the shape {list(x.shape)}, expected "
                f"[n, *{list(site.shape)}] or [chains, n, *{list(site.shape)}]"
            )
        grouped[name] = x if batch == 2 else x[None]
    shapes = {name: list(x.shape[:2]) for name, x in grouped.items()}
    chains, count = next(iter(shapes.values()))
    if any(shape != [chains, count] for shape in shapes.values()):
        raise ValueError(f"reference: found different [chains, n] by site, {shapes}; expected one")
    if (chains // 2 * count if chains > 1 else count // 2) < MIN_DRAWS:
        raise ValueError(
            f"reference: found {chains} chains of {count} draws, expected at least {MIN_DRAWS} "
            "draws in each half: more chains or samples"
        )
    z = density.unconstrain(grouped)
    if bad := _name_sites(density, ~z.flatten(0, 1).isfinite().all(0)):
        raise ValueError(
            f"reference: some draws of the sites {bad} are not finite or not inside the support"
        )
    return z


def _get_samples(reference: Any) -> Mapping[str, Any]:
    """Return a reference's draws by site."""
    if isinstance(reference, Mapping):
        return reference
    if not hasattr(reference, "get_samples"):
        raise ValueError(
            f"reference: found {type(reference).__name__}, expected a run HMC or MCMC, or a "
            "mapping from sites to draws"
        )
    try:
        values = reference.get_samples(group_by_chain=True)
    except RuntimeError:
        values = None
    if values is None:
        raise ValueError(
            f"reference: found {type(reference).__name__} without draws; call its run() first"
        )
    return values


def _name_sites(density: UnconstrainedModel, where: Tensor) -> list[str]:
    """Name the sites of which some coordinate [d] of the unconstrained vector is true."""
    return [name for name, site in density.sites.items() if where[site.slice].any()]


def _describe(error: Exception) -> str:
    """Say in one line what an error says; Pyro's go on with the shapes of all sites."""
    message = " ".join(str(error).partition("Trace Shapes:")[0].split())
    return f"{type(error).__name__}: {message}"


def _thin(z: Tensor, num_draws: int) -> Tensor:
    """Keep num_draws evenly spaced rows, or all if there are fewer."""
    if len(z) <= num_draws:
        return z
    return z[torch.linspace(0, len(z) - 1, num_draws, device=z.device).round().long()]


@torch.no_grad()
def _draw(
    density: UnconstrainedModel, guide: Callable, num_draws: int, vectorized: bool
) -> tuple[Tensor, Tensor]:
    """Draw from a guide: unconstrained vectors [n, d] and log p(x, z) − log q(z) [n]."""
    if vectorized:
        model_trace, guide_trace, dim = _run_vectorized(density, guide, num_draws)
        values = {
            name: guide_trace.nodes[name]["value"].reshape(num_draws, *site.shape)
            for name, site in density.sites.items()
        }
        log_p, log_q = (_log_probs(trace, num_draws, dim) for trace in (model_trace, guide_trace))
        return density.unconstrain(values), log_p - log_q
    with poutine.block():
        runs = [_run(density, guide) for _ in range(num_draws)]
    values = {
        name: torch.stack([q.nodes[name]["value"] for _, q in runs]) for name in density.sites
    }
    log_weights = torch.stack([p.log_prob_sum() - q.log_prob_sum() for p, q in runs])
    return density.unconstrain(values), log_weights


@torch.no_grad()
def _vectorizes(label: str, density: UnconstrainedModel, guide: Callable) -> bool:
    """Say whether many draws at once have the densities that they have one by one; warn if not."""
    with poutine.block():
        _run(density, guide)  # what fails here fails either way
        try:
            at_once = _trial_log_probs(density, guide)
        except Exception as error:
            reason = _describe(error)
        else:
            names = ("log p(x, z)", "log q(z)")
            wrong = [
                f"{name} at a draw is {a:.6g} among others, {b:.6g} alone"
                for name, pair in zip(names, at_once, strict=True)
                for a, b in pair
                if not math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-2) and not math.isnan(a)
            ]
            if not wrong:
                return True
            reason = wrong[0]
    warnings.warn(
        f"guide {label!r}: it or the model cannot be run for many draws at once ({reason}); "
        "running them one by one, which is slow",
        stacklevel=5,
    )
    return False


def _trial_log_probs(
    density: UnconstrainedModel, guide: Callable
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return log p(x, z) and log q(z) of a few draws, at once and alone."""
    single = _run(density, guide)[1]
    model_trace, guide_trace, dim = _run_vectorized(density, guide, TRIAL_DRAWS)
    at_once = [_log_probs(trace, TRIAL_DRAWS, dim).tolist() for trace in (model_trace, guide_trace)]
    alone = []
    for i in range(TRIAL_DRAWS):
        draw = single.copy()
        for name, site in single.iter_stochastic_nodes():
            if site_is_subsample(site):
                continue
            if _is_delta(site["fn"]):  # follows from the other sites
                del draw.nodes[name]
                continue
            value = guide_trace.nodes[name]["value"]
            value = value.reshape(TRIAL_DRAWS, *site["value"].shape)[i]
            draw.nodes[name] = {**site, "value": value}
        traces = _run(density, poutine.replay(guide, trace=draw))
        alone.append([trace.log_prob_sum().item() for trace in traces])
    log_p, log_q = zip(*alone, strict=True)
    return list(zip(at_once[0], log_p, strict=True)), list(zip(at_once[1], log_q, strict=True))


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist") and not isinstance(fn, Delta):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _run(density: UnconstrainedModel, guide: Callable) -> tuple[poutine.Trace, poutine.Trace]:
    guide_trace = poutine.trace(guide).get_trace(*density.args, **density.kwargs)
    model = poutine.replay(density.model, trace=guide_trace)
    return poutine.trace(model).get_trace(*density.args, **density.kwargs), guide_trace


def _max_plate_nesting(density: UnconstrainedModel, guide: Callable) -> int:
    """Return how many plate dimensions guide and model use."""
    with poutine.block(), torch.no_grad():
        traces = _run(density, guide)
    return max(
        (
            -frame.dim
            for trace in traces
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ),
        default=0,
    )


def _run_vectorized(
    density: UnconstrainedModel, guide: Callable, num_draws: int
) -> tuple[poutine.Trace, poutine.Trace, int]:
    """Run guide and model once, inside a plate of draws to the left of all others; say where."""
    dim = -1 - _max_plate_nesting(density, guide)
    with poutine.block(), pyro.plate("_draws", num_draws, dim=dim):
        model_trace, guide_trace = _run(density, guide)
    return model_trace, guide_trace, dim


def _log_probs(trace: poutine.Trace, num_draws: int, dim: int) -> Tensor:
    """Sum a trace's log densities over all but the draws [n], which lie in the dimension dim."""
    trace.compute_log_prob()
    total = torch.zeros(())
    for site in trace.nodes.values():
        if site["type"] != "sample" or "log_prob" not in site:
            continue
        log_prob = site["log_prob"]
        # What does not vary over the draws, a constant factor say, may lack their dimension.
        if log_prob.dim() < -dim or log_prob.shape[dim] != num_draws:
            total = total + log_prob.sum()
        else:
            total = total + log_prob.reshape(num_draws, -1).sum(1)
    return total.expand(num_draws)


def _pareto_khat(log_weights: Tensor) -> float:
    x = log_weights.double().cpu().numpy()
    if not np.isfinite(x).all():
        return math.nan
    if np.ptp(x) < EQUAL_WEIGHTS:  # there is no tail to fit but that of rounding errors
        return 0.0
    return float(az.psislw(x)[1])


def _to_sites(density: UnconstrainedModel, z: Tensor) -> dict[str, NDArray]:
    """Return draws z [n, d] by site, [n, *site], as arrays."""
    return {name: x.detach().cpu().numpy() for name, x in density.constrain(z).items()}


def _coordinates(values: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Name every entry of the sites' values: ``eta[0]``, ``eta[1]``, …, each [n]."""
    result = {}
    for name, x in values.items():
        for index in np.ndindex(x.shape[1:]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            result[label] = x[(slice(None), *index)]
    return result


def _moments(draws: Mapping[str, NDArray]) -> tuple[NDArray, NDArray]:
    """Return mean and standard deviation of every entry of the sites."""
    entries = _coordinates(draws).values()
    mean = np.array([x.mean(dtype=np.float64) for x in entries])
    return mean, np.array([x.std(dtype=np.float64) for x in entries])


def _moment_errors(
    found: tuple[NDArray, NDArray], truth: tuple[NDArray, NDArray]
) -> dict[str, float]:
    """Compare the sites' moments, in posterior standard deviations."""
    (mean, sd), (true_mean, true_sd) = found, truth
    varies = true_sd > 0  # not the zeros of a Cholesky factor
    mean_error = np.abs(mean - true_mean)[varies] / true_sd[varies]
    sd_error = np.abs(sd - true_sd)[varies] / true_sd[varies]
    return {"max_mean_error": float(mean_error.max()), "max_sd_error": float(sd_error.max())}


def _halve(z: Tensor, chains_per_start: int) -> list[Tensor]:
    """Split draws [chains, n, d] into two independent halves, each [*, d].

    Chains that started at one point stay together, or both halves would show the same modes.
    """
    groups = z.unflatten(0, (-1, chains_per_start)).flatten(1, 2)
    if len(groups) == 1:
        return list(groups[0].tensor_split(2))
    return [groups[0::2].flatten(0, 1), groups[1::2].flatten(0, 1)]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's generators, and set them back afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _private_params(guide: Callable) -> Iterator[None]:
    """Give a guide a parameter store of its own, with copies of the user's parameters in it.

    Guides of one class share their parameters' names, so each takes its own from its module.
    """
    store = pyro.get_param_store()
    state = store.get_state()
    own = set()
    if isinstance(guide, PyroModule) and guide._pyro_name:
        own = {name for name in state["params"] if name.startswith(f"{guide._pyro_name}.")}
    elif isinstance(guide, PyroModule):
        own = {name.removesuffix("_unconstrained") for name, _ in guide.named_parameters()}
    params = {}
    for name, value in state["params"].items():
        if name in own:
            continue
        if not isinstance(value, torch.nn.Parameter):  # a module would go on without its copy
            value = value.detach().clone().requires_grad_(value.requires_grad)
        params[name] = value
    constraints = {name: state["constraints"][name] for name in params}
    with store.scope({"params": params, "constraints": constraints}):
        yield
