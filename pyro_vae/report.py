"""One report of a trained model and guide: every figure of ``evaluate``, and pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import pyro.poutine as poutine
import torch
from matplotlib.figure import Figure
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn
from tqdm import tqdm

from . import evaluate
from ._version import __version__
from .joint import (
    Estimate,
    Joint,
    check_least,
    chunks,
    evaluation_mode,
    has_exact_density,
    posterior,
)
from .losses import DVAE_ELBO, GRAE_ELBO
from .pictures import (
    plot_latents,
    plot_posteriors,
    plot_reconstructions,
    plot_samples,
    save_figure,
)

if TYPE_CHECKING:
    from .data import Data

__all__ = ["report"]

NUM_SAMPLES = 64  # in a picture
NUM_RECONSTRUCTIONS = 10
LEAST_EFFECTIVE = 2  # importance weights of an example, for a standard error
GRAE_ROWS = 256  # whose Jacobians are there at once


def report(
    model: Callable,
    guide: Callable,
    data: Data,
    out: str | Path,
    *,
    loss: Any = None,
    num_examples: int = 300,
    elbo_particles: int = 100,
    iwae_particles: int = 1000,
    svi_examples: int = 100,
    svi_particles: int = 1000,
    svi_steps: int = 150,
    ais_examples: int = 25,
    ais_temperatures: int = 250,
    ais_chains: int = 5,
    aggregate_examples: int = 10_000,
    marginal_samples: int = 2000,
    class_samples: int = 2000,
    classifier_steps: int = 500,
    num_labels: int = 1000,
    posterior_examples: int = 3,
    chunk_size: int = 4096,
    compile: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    r"""Judge a model and its guide, and write ``metrics.json``, ``report.md`` and pictures.

    The defaults are for small images on two cores; each is stated in the report. A figure that does
    not apply (no labels, a density that is learned) is left out, with the reason. Likelihoods are
    those of the test split. The figures of a paper take ``iwae_particles=5000``,
    ``ais_temperatures=1000`` and all examples.

    Args:
        model: A :class:`~pyro_vae.models.VAE`, or a Pyro model that
            :class:`~pyro_vae.evaluate.Joint` takes.
        guide: Its guide.
        data: A data set, as :func:`pyro_vae.data.load` returns it. It is brought to the device and
            dtype of the model's first parameter.
        out: A directory, made if it does not exist; files of these names are replaced.
        loss: What the guide was trained with. A :class:`~pyro_vae.losses.GRAE_ELBO`, alone or
            inside a :class:`~pyro_vae.losses.DVAE_ELBO`, trains the guide's mean alone: q(z|x) is
            then its ``posterior``. Any other loss changes nothing.
        num_examples: Of the test split, drawn at random, for ELBO and IWAE; at most all.
        elbo_particles: Draws from q(z|x) for each.
        iwae_particles: k of IWAE-k.
        svi_examples: The first of these examples, for IW-SVI; 0 leaves it out.
        svi_particles: k of IW-SVI.
        svi_steps: Gradient steps of IW-SVI, twice.
        ais_examples: The first of these, for AIS, and as many simulated for BDMC; 0 leaves both
            out.
        ais_temperatures: Of AIS and BDMC.
        ais_chains: Chains of each example.
        aggregate_examples: Of the training split, drawn at random, for what is said of q(z).
        marginal_samples: Draws for the marginal KL and the mutual information.
        class_samples: Draws from the model for the distribution of classes.
        classifier_steps: To train the classifier of these.
        num_labels: For the support vector machine.
        posterior_examples: Whose true posterior is drawn; 0 leaves the picture out.
        chunk_size: How many latents are decoded at once, or examples encoded; of pairs of these,
            for what is said of q(z), its square at most.
        compile: Whether AIS compiles its leapfrog step; by default where it takes many.
        seed: Of all random numbers; torch's generators are left as they were.
        progress: Whether to show a progress bar.

    Returns:
        What is in ``metrics.json``: ``metrics`` by name, each with ``value``, ``std_error``,
        ``data_std_error`` and ``about``; ``q``, whose q(z|x) it is; ``scores``, what likelihoods
        are: log densities, log probabilities, or, of a Bernoulli observation of grey data, negative
        cross-entropies; ``settings``; ``data``; ``left_out``, the reasons by name; ``pictures``;
        ``seconds``; ``versions``.

    Raises:
        ValueError: For numbers out of range, parameters that are not finite, a directory that
            cannot be made, data that do not fit the model, or where GRAE's posterior with the
            exact Hessian does not exist.

    Example:
        >>> import tempfile
        >>> from pyro_vae.data import load
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> from pyro_vae.nn import MLP
        >>> data = load("four_pixels")
        >>> decoder = nn.Sequential(MLP(2, 4, (16,)), nn.Unflatten(-1, data.event_shape))
        >>> model = VAE(decoder, Bernoulli(), 2, data.event_shape)
        >>> guide = Gaussian(nn.Sequential(nn.Flatten(1), MLP(4, 8)), 2)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     found = report(model, guide, data, out, ais_examples=0, svi_examples=0)
        ...     sorted(path.name for path in Path(out).iterdir())[:2]
        ['latents.png', 'metrics.json']
        >>> found["metrics"]["elbo"]["value"] < 0
        True
    """
    not_settings = ("model", "guide", "data", "out", "loss", "progress")
    settings = {k: v for k, v in locals().items() if k not in not_settings}
    _check(settings)
    for who, module in (("model", model), ("guide", guide)):
        for name, value in _parameters(module):
            if not value.isfinite().all():
                raise ValueError(f"the {who}'s {name!r} is not finite: there is nothing to judge")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot make the directory {str(out)!r}: {error}") from error
    tensors = (value for _, value in (*_parameters(model), *_parameters(guide)))
    like = next((value for value in tensors if value.is_floating_point()), data.test.x)
    data = data.to(device=like.device, dtype=like.dtype)
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluation_mode(model, guide):
        torch.manual_seed(seed)
        judge = _Judge(model, guide, data, out, settings, loss)
        judge.run(progress)
    found: dict[str, Any] = {
        "metrics": {name: _as_dict(*entry) for name, entry in judge.metrics.items()},
        "side_by_side": judge.side_by_side,
        "classes": judge.classes,
        "left_out": judge.left_out,
        "q": judge.q,
        "scores": "Negative cross-entropies" if judge.grey else judge.scores,
        "data": {"name": data.name, "source": data.source, "kind": data.kind}
        | {f"num_{name}": len(part.x) for name, part in data.splits.items()},
        "settings": settings | {"device": str(like.device), "dtype": str(like.dtype)},
        "pictures": judge.pictures,
        "seconds": judge.seconds,
        "versions": {
            "pyro_vae": __version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
        },
    }
    (out / "metrics.json").write_text(json.dumps(_plain(found), indent=2) + "\n")
    (out / "report.md").write_text(_markdown(found, judge), encoding="utf-8")
    return found


def _check(settings: dict[str, Any]) -> None:
    least = {
        "num_examples": 1,
        "elbo_particles": 2,
        "iwae_particles": 2,
        "svi_particles": 2,
        "svi_steps": 1,
        "ais_temperatures": 1,
        "ais_chains": 1,
        "aggregate_examples": 2,
        "marginal_samples": 2,
        "class_samples": 2,
        "classifier_steps": 1,
        "num_labels": 2,
        "chunk_size": max(8, settings["ais_chains"] + 1),
        "svi_examples": 0,
        "ais_examples": 0,
        "posterior_examples": 0,
    }
    check_least(**{name: (settings[name], smallest) for name, smallest in least.items()})


def _parameters(module: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, nn.Module):
        yield from module.named_parameters()
        yield from module.named_buffers()


def _grae_guide(loss: GRAE_ELBO, model: Callable, guide: Callable, site: str) -> Callable:
    """Return the guide that GRAE stands for: its own covariance was never trained."""

    def grae(x: Tensor) -> None:
        with poutine.block():
            parts = [loss.posterior(model, guide, x[rows]) for rows in chunks(len(x), GRAE_ROWS)]
        loc = torch.cat([part.loc for part in parts])
        q = MultivariateNormal(loc, scale_tril=torch.cat([part.scale_tril for part in parts]))
        with pyro.plate("data", len(x)):
            pyro.sample(site, q)

    return grae


def _degenerate(effective: Tensor) -> int:
    """Count the examples in which a single importance weight dominates."""
    return int((effective < LEAST_EFFECTIVE).sum())


def _effective(found: Estimate) -> str:
    """Say how many effective weights there are, and where they are too few for a standard error."""
    assert found.effective is not None
    effective = found.effective.double()
    median, least = float(effective.quantile(0.5)), float(effective.min())
    said = f"effective ones: median {median:.{1 if median < 100 else 0}f}, least {least:.1f}"
    if few := _degenerate(effective):
        said += (
            f"; weights degenerate in {few} of {len(effective)} examples: a lower bound, its s.e. "
            "is not to be trusted"
        )
    return said


def _family(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def _is_discrete(family: Any) -> bool:
    try:
        return bool(family.support.is_discrete)
    except NotImplementedError:
        return False


class _Judge:
    """Computes the figures one after another and remembers what became of each."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        data: Data,
        out: Path,
        settings: dict[str, Any],
        loss: Any,
    ) -> None:
        self.model, self.guide, self.data, self.out = model, guide, data, out
        self.settings = settings
        self.guide_name, self.q = type(guide).__name__, "the guide's"
        self.metrics: dict[str, tuple[str, str, Estimate, str]] = {}  # section, label, about
        self.side_by_side: dict[str, dict[str, float | None]] = {}
        self.classes: dict[str, list[float]] = {}
        self.left_out: dict[str, str] = {}
        self.pictures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.chunks = {"chunk_size": settings["chunk_size"]}
        # Of which the side of a square is encoded at once.
        self.pairs = {"chunk_size": min(evaluate.PAIRS, settings["chunk_size"] ** 2)}
        self.joint = Joint(model, data.test.x)
        while isinstance(loss, DVAE_ELBO):
            loss = loss.elbo
        if isinstance(loss, GRAE_ELBO):
            self.guide = _grae_guide(loss, model, guide, self.joint.site)
            equation = 9 if loss.curvature == "hessian" else 11
            self.q = f"GRAE's posterior, equation ({equation}) about the guide's mean"
        order = torch.randperm(len(data.test.x))[: settings["num_examples"]]
        self.x = data.test.x[order.to(data.test.x.device)]
        count = settings["aggregate_examples"]
        order = torch.randperm(len(data.train.x))[:count].to(data.train.x.device)
        self.aggregate = data.train.x[order]
        with torch.no_grad():
            q = posterior(guide, self.x[:1], self.joint)
            likelihood = self.joint.likelihood(q.sample(), self.x[:1])
        self.exact = has_exact_density(q)
        family = _family(likelihood)
        binary = all(((p.x == 0) | (p.x == 1)).all() for p in (data.test, data.train))
        self.grey = isinstance(family, torch.distributions.Bernoulli) and not binary
        self.scores = "Log probabilities" if _is_discrete(family) else "Log densities"
        if self.grey:
            self.scores = (
                "The observation is Bernoulli and the data are grey, not all 0 or 1: what stands "
                "for log p(x|z) is a negative cross-entropy, no log density, and so are ELBO and "
                "log p(x), which compare with nothing but others like them. Negative "
                "cross-entropies"
            )

    def run(self, progress: bool) -> None:
        parts = (
            self._likelihood,
            self._svi,
            self._annealed,
            self._aggregate_posterior,
            self._labels,
            self._draw,
        )
        bar = tqdm(parts, disable=not progress)
        for part in bar:
            name = part.__name__.strip("_")
            bar.set_description(name.replace("_", " "))
            start = time.perf_counter()
            part()
            self.seconds[name] = round(time.perf_counter() - start, 2)

    def _add(self, section: str, name: str, label: str, found: Estimate, about: str = "") -> None:
        self.metrics[name] = (section, label, found, about)

    def _compare(self, name: str, found: Estimate) -> None:
        """Put the mean over the examples of AIS beside it."""
        count = min(self.settings["ais_examples"], len(self.x))
        values, errors = found.per_example, found.per_example_error
        if not count or values is None or errors is None or len(values) < count:
            return
        part = Estimate.mean(values[:count], errors[:count])
        few = None if found.effective is None else _degenerate(found.effective[:count])
        self.side_by_side[name] = {
            "value": part.value,
            "std_error": part.std_error,
            "degenerate": few,
        }

    def _likelihood(self) -> None:
        s, x = self.settings, self.x
        where = "Likelihood"
        draws = f"{len(x)} test examples, {s['elbo_particles']} draws each"
        found = evaluate.elbo(self.model, self.guide, x, s["elbo_particles"], **self.chunks)
        claim = " (claimed: the guide's density is learned)" if found.claimed else ""
        self._add(where, "elbo", "ELBO" + claim, found.elbo, draws)
        self._add(where, "log_likelihood", "E log p(x\\|z)", found.log_likelihood, draws)
        self._add(where, "kl", "KL(q(z\\|x) ‖ p(z))" + claim, found.kl, draws)
        if found.reconstruction_error is None:
            self.left_out["reconstruction_error"] = (
                "the observation has no mean, or the decoder is autoregressive and is given x"
            )
        else:
            about = f"{draws}; mean square of an element"
            label = "reconstruction error"
            self._add(where, "reconstruction_error", label, found.reconstruction_error, about)
        if not found.claimed:
            self._compare("ELBO", found.elbo)
        train = self.aggregate[: len(x)]
        found = evaluate.elbo(self.model, self.guide, train, s["elbo_particles"], **self.chunks)
        about = f"{len(train)} training examples, {s['elbo_particles']} draws each"
        self._add(where, "elbo_train", "ELBO, training split" + claim, found.elbo, about)
        if not self.exact:
            self.left_out["iwae"] = "the guide has no exact density: the bound would be a claim"
            return
        k = s["iwae_particles"]
        estimate = evaluate.iwae(self.model, self.guide, x, k, **self.chunks)
        about = f"{len(x)} test examples, {k} particles; {_effective(estimate)}"
        self._add(where, "iwae", f"log p(x), IWAE-{k}", estimate, about)
        self._compare(f"IWAE-{k}", estimate)

    def _svi(self) -> None:
        s = self.settings
        x = self.x[: s["svi_examples"]]
        if not len(x):
            self.left_out["iw_svi"] = "svi_examples=0"
            return
        k, steps = s["svi_particles"], s["svi_steps"]
        found = evaluate.iw_svi(self.model, self.guide, x, k, num_steps=steps, **self.chunks)
        about = f"{len(x)} test examples, twice {steps} steps, {k} particles"
        about += f"; {_effective(found.log_evidence)}"
        where = "Likelihood"
        self._add(where, "iw_svi", f"log p(x), IW-SVI-{k}", found.log_evidence, about)
        self._compare(f"IW-SVI-{k}", found.log_evidence)
        gaps = (
            ("inference_gap", "inference gap", found.inference_gap),
            ("approximation_gap", "approximation gap, diagonal Gaussian", found.approximation_gap),
            ("amortization_gap", "amortisation gap", found.amortization_gap),
        )
        for name, label, gap in gaps:
            if gap is None:
                self.left_out[name] = "the guide has no exact density, and no ELBO that is a bound"
            else:
                self._add(where, name, label, gap, about)

    def _annealed(self) -> None:
        s = self.settings
        x = self.x[: s["ais_examples"]]
        if not len(x):
            self.left_out["ais"] = self.left_out["bdmc"] = "ais_examples=0"
            return
        arguments = (s["ais_temperatures"], s["ais_chains"])
        options = self.chunks | {"compile": s["compile"]}
        sizes = f"{arguments[0]} temperatures, {arguments[1]} chains"
        found = evaluate.ais(self.model, x, *arguments, **options)
        about = f"{len(x)} test examples, {sizes}; {_effective(found.log_evidence)}"
        where = "Likelihood"
        self._add(where, "ais", "log p(x), AIS", found.log_evidence, about)
        self._compare("AIS", found.log_evidence)
        if self.grey:
            self.left_out["bdmc"] = (
                "the model makes binary data, the data are grey: a gap on the one says nothing of "
                "the other"
            )
            return
        sides = evaluate.bdmc(self.model, x, *arguments, **options)
        about = f"{len(x)} simulated examples, {sizes}"
        for name, estimate in (("lower", sides.lower), ("upper", sides.upper), ("gap", sides.gap)):
            label = "BDMC gap" if name == "gap" else f"BDMC {name} bound"
            said = f"{about}; {_effective(estimate)}" if name == "lower" else about
            self._add(where, f"bdmc_{name}", label, estimate, said)

    def _aggregate_posterior(self) -> None:
        s, x = self.settings, self.aggregate
        arguments = (self.model, self.guide, x)
        where, about = "Aggregate posterior", f"{len(x)} training examples"
        if self.exact:
            found = evaluate.marginal_kl(*arguments, s["marginal_samples"], **self.pairs)
            draws = f"{about}, {s['marginal_samples']} draws"
            label = "KL(q(z) ‖ p(z))"
            self._add(where, "marginal_kl", label, found.marginal_kl, draws)
            bound = f"{draws}; at most log {len(x)} = {math.log(len(x)):.2f}"
            label = "mutual information of x and z"
            self._add(where, "mutual_information", label, found.mutual_information, bound)
        else:
            reason = "the guide has no exact density"
            self.left_out["marginal_kl"] = self.left_out["mutual_information"] = reason
        if len(x) > 1:
            mmd = evaluate.aggregate_mmd(*arguments, **self.pairs)
            self._add(where, "mmd", "MMD² of q(z) and p(z)", mmd, f"{about}, RBF kernel, ℓ² = d")
            active = evaluate.active_units(*arguments, **self.chunks)
            count = f"{about}; of {self.joint.latent_dim}, Var E[z_i\\|x] > 0.01"
            self._add(where, "active_units", "active units", active, count)
        if len(x) > self.joint.latent_dim:
            cov = evaluate.log_det_cov(*arguments, **self.chunks)
            label = "log det Cov q(z) / d"
            self._add(where, "log_det_cov", label, cov, f"{about}, 10 draws each")
        else:
            self.left_out["log_det_cov"] = "no more examples than dimensions"

    def _labels(self) -> None:
        train, test = self.data.train, self.data.test
        if train.y is None or test.y is None:
            for name in ("class_cross_entropy", "svm_error"):
                self.left_out[name] = f"{self.data.name} has no labels"
            return
        self._classes((train.x, train.y), (test.x, test.y))
        self._svm((train.x, train.y), (test.x, test.y))

    def _classes(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        s, where = self.settings, "Samples and labels"
        count, steps = s["class_samples"], s["classifier_steps"]
        try:
            found = evaluate.class_distribution(
                self.model, train, test, count, num_steps=steps, **self.chunks
            )
        except ValueError as error:  # labels that do not suffice: the rest is not lost for them
            self.left_out["class_cross_entropy"] = str(error)
            return
        about = f"{s['class_samples']} samples, a classifier of 256 hidden units"
        label = "l_ce, classes of samples against those of the data"
        self._add(where, "class_cross_entropy", label, found.cross_entropy, about)
        about = f"{len(test[0])} test examples; what there is to reach"
        self._add(where, "class_cross_entropy_test", "l_ce of test examples", found.of_test, about)
        label = "test error of this classifier"
        self._add(where, "classifier_error", label, found.classifier_error, "")
        self.classes = {"data": found.true.tolist(), "samples": found.sampled.tolist()}

    def _svm(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        count = min(self.settings["num_labels"], len(train[0]))
        try:
            svm = evaluate.svm_error(self.model, self.guide, train, test, count, **self.chunks)
        except ValueError as error:
            self.left_out["svm_error"] = str(error)
            return
        about = f"RBF kernel, E[z\\|x] of {count} labelled training examples"
        self._add("Samples and labels", "svm_error", "test error of an SVM on latents", svm, about)

    @torch.no_grad()
    def _draw(self) -> None:
        x, joint = self.x, self.joint
        z = joint.prior(NUM_SAMPLES).sample()
        self._save("samples", plot_samples(joint.reconstruct(z)), "Mean images of prior draws")
        part = x[:NUM_RECONSTRUCTIONS]
        z = evaluate.latents(self.model, self.guide, part)[0]
        figure = plot_reconstructions(part, joint.reconstruct(z))
        self._save("reconstructions", figure, "Test examples above, their reconstructions below")
        part, labels = self.data.test.x, self.data.test.y
        draws = evaluate.latents(self.model, self.guide, part, num_draws=20, **self.chunks)
        means = evaluate.latents(self.model, self.guide, part, mean=True, **self.chunks)
        prior = joint.prior(20_000).sample()
        figure = plot_latents(draws.flatten(0, 1), prior, means, labels)
        caption = "q(z) of the test split and p(z): contours that hold 50, 80 and 95 percent"
        self._save("latents", figure, caption)
        count = self.settings["posterior_examples"]
        if not count:
            self.left_out["posteriors"] = "posterior_examples=0"
            return
        figure, how = plot_posteriors(
            self.model, self.guide, x[:count], chunk_size=self.settings["chunk_size"]
        )
        caption = f"True posteriors p(z|x) ({how}) and q(z|x) of {len(x[:count])} test examples"
        self._save("posteriors", figure, caption)

    def _save(self, name: str, figure: Figure, caption: str) -> None:
        save_figure(figure, self.out / f"{name}.png")
        self.pictures[f"{name}.png"] = caption


# --- text ----------------------------------------------------------------------------------------


def _as_dict(section: str, label: str, found: Estimate, about: str) -> dict[str, Any]:
    return {
        "value": found.value,
        "std_error": found.std_error,
        "data_std_error": found.data_std_error if section == "Likelihood" else None,
        "about": about.replace("\\|", "|"),
    }


def _plain(value: Any) -> Any:
    """Return what JSON can hold: NaN and infinities are null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float | None, error: float | None) -> str:
    """Print a number to two digits of its error."""
    if value is None or not math.isfinite(value):
        return "" if value is None else str(value)
    if not error or not math.isfinite(error):
        return f"{value:.4g}"
    return f"{value:.{min(8, max(0, 1 - math.floor(math.log10(error))))}f}"


def _error(error: float | None) -> str:
    return "" if error is None or not math.isfinite(error) else f"{error:.2g}"


def _markdown(found: dict[str, Any], judge: _Judge) -> str:
    data, settings = found["data"], found["settings"]
    model, guide = type(judge.model).__name__, judge.guide_name
    sizes = ", ".join(f"{data[f'num_{part}']} {part}" for part in judge.data.splits)
    lines = [
        f"# {model} and {guide} on {data['name']}",
        "",
        f"Data: {data['source']}; {sizes}; elements: {data['kind']}; an example is "
        f"{list(judge.joint.event_shape)}, z has {judge.joint.latent_dim} dimensions. "
        f"q(z|x) is {judge.q}.",
        "",
        f"{judge.scores} in nats, summed over the elements of an example, all constants included.",
        "",
        "The s.e. of likelihoods, gaps of inference, KL(q(z) ‖ p(z)), mutual information and l_ce "
        "of samples is Monte Carlo's, for these very examples. That of BDMC's upper bound and gap, "
        "MMD², log det Cov, active units, l_ce of test examples and test errors is over examples: "
        "the bootstrap's for log det Cov and active units, binomial for errors. Where a likelihood "
        "is a mean over examples, the s.e. over examples is for the population they come from.",
    ]
    section = ""
    for name, (where, label, estimate, about) in judge.metrics.items():
        if where != section:
            section = where
            lines += ["", f"## {section}", ""]
            lines += ["| | value | s.e. | s.e. over examples | |", "|---|---|---|---|---|"]
        entry = found["metrics"][name]
        error, spread = entry["std_error"], entry["data_std_error"]
        value = _number(estimate.value, error)
        lines.append(f"| {label} | {value} | {_error(error)} | {_error(spread)} | {about} |")
    if len(judge.side_by_side) > 1:
        count = min(settings["ais_examples"], len(judge.x))
        lines += ["", f"## log p(x) of the same {count} test examples", ""]
        lines += ["| | value | s.e. | weights degenerate |", "|---|---|---|---|"]
        for name, beside in judge.side_by_side.items():
            shown, few = _number(beside["value"], beside["std_error"]), beside["degenerate"]
            share = "" if few is None else f"in {few} of {count}"
            lines.append(f"| {name} | {shown} | {_error(beside['std_error'])} | {share} |")
        gap = "bdmc_gap" in judge.metrics
        lines += [
            "",
            "All are lower bounds in expectation: of two that differ by more than their standard "
            "errors, the larger is the closer. Where weights are degenerate, with fewer than "
            f"{LEAST_EFFECTIVE} effective ones, the s.e. is not to be trusted"
            + ("; how far AIS may be from the truth, BDMC's gap says." if gap else "."),
        ]
    if judge.classes:
        lines += ["", "## Classes", ""]
        lines.append("| | " + " | ".join(map(str, range(len(judge.classes["data"])))) + " |")
        lines.append("|---" * (len(judge.classes["data"]) + 1) + "|")
        for name, shares in judge.classes.items():
            lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    lines += ["", "## Pictures", ""]
    for path, caption in judge.pictures.items():
        lines += [f"![{caption}]({path})", "", f"*{caption}.*", ""]
    if judge.left_out:
        lines += ["## Left out", ""]
        lines += [f"* {name}: {reason}" for name, reason in judge.left_out.items()]
        lines.append("")
    lines += ["## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    lines += [f"| {name} | {value} |" for name, value in found["versions"].items()]
    spent = ", ".join(f"{name} {value:.1f}" for name, value in judge.seconds.items())
    lines += [f"| seconds | {spent} |", ""]
    return "\n".join(lines)
