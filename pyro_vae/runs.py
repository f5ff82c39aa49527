"""Trained runs: what they are made of, where they lie, and how they are opened.

A run is a directory. ``config.yaml`` says what was trained on what, in plain numbers and words;
``best.safetensors`` holds weights. Both are data: opening a run that a stranger made runs no code
of theirs. Classes are named, and looked up in the registry here.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor, nn

from . import constraints, divergences, losses, models
from .checkpoint import replacing
from .data import Data, load
from .guides import Flow, Gaussian, Implicit
from .losses import TermsELBO
from .losses.geco import Constraint
from .models import VAE
from .nn import (
    ConvDecoder,
    ConvEncoder,
    GRAEDecoder,
    GRAEEncoder,
    JointDiscriminator,
    MLPDecoder,
    MLPEncoder,
    ResidualDiscriminator,
)
from .pixelcnn import PixelCNN

__all__ = [
    "Config",
    "DataConfig",
    "GuideConfig",
    "LossConfig",
    "ModelConfig",
    "Run",
    "TrainingConfig",
    "build",
    "open_run",
    "read_config",
]

#: Names of the files in a run's directory.
CONFIG, BEST, LAST, LOG = "config.yaml", "best.safetensors", "last.ckpt", "log.csv"

#: What a loss's options may name, besides numbers and words. Nothing else is ever looked up.
REGISTRY: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(getattr(losses, name) for name in losses.__all__ if name != "TermsELBO"),
        divergences.MMD,
        divergences.Stein,
        divergences.Adversarial,
        constraints.ReconstructionError,
        constraints.PatchCrossCorrelation,
        ResidualDiscriminator,
    )
}

LOSSES = [name for name, cls in REGISTRY.items() if issubclass(cls, TermsELBO)]


# --- configurations -------------------------------------------------------------------------------


def _check_sizes(section: str, config: Any, *names: str) -> None:
    """Raise a ValueError for a size, or one of several, that is below one."""
    for name in names:
        value = getattr(config, name)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"{section}.{name} must be at least 1, found {value}")


@dataclass
class ModelConfig:
    """The generative model: a decoder, an observation, a standard normal prior.

    Args:
        architecture: "mlp"; for images "conv", in DCGAN's style, and "pixelcnn", autoregressive;
            "grae_mnist" and "grae_celeba", those of the GRAE paper, for 28×28 and 64×64.
        latent_dim: Dimension of z.
        hidden_dims: Widths of the hidden layers of an MLP, from z on; the guide's are the reverse.
        hidden_channels: Channels of convolutions, from the image on; each layer halves its sides.
        observation: "bernoulli", "gaussian", "continuous_bernoulli" or "discretized_logistic"; by
            default Bernoulli for binary data and Gaussian for all other.
        scale: Scale of a Gaussian or a discretised logistic: a number, "learned" or "pixel".
        levels: Grey levels of a discretised logistic.
        event_shape: Shape of one example; that of the data by default.
    """

    architecture: Literal["mlp", "conv", "pixelcnn", "grae_mnist", "grae_celeba"] = "mlp"
    latent_dim: int = 8
    hidden_dims: list[int] = field(default_factory=lambda: [256, 256])
    hidden_channels: list[int] = field(default_factory=lambda: [32, 64])
    observation: (
        Literal["bernoulli", "gaussian", "continuous_bernoulli", "discretized_logistic"] | None
    ) = None
    scale: float | Literal["learned", "pixel"] = "learned"
    levels: int = 256
    event_shape: list[int] | None = None

    def __post_init__(self) -> None:
        _check_sizes(
            "model", self, "latent_dim", "hidden_dims", "hidden_channels", "levels", "event_shape"
        )


@dataclass
class GuideConfig:
    """The inference network: an encoder like the decoder, and a distribution.

    Args:
        kind: "gaussian", "flow" or "implicit".
        covariance: A Gaussian's: "diagonal" or "full".
        transforms: Number of a flow's couplings.
        noise: Where noise enters an implicit guide: "features"; "input", for an MLP; or "basis".
        contrast: What an implicit guide's density is learned against: "adaptive" or "prior".
        hidden_dims: Widths of an MLP encoder; by default those of the decoder, in reverse.
    """

    kind: Literal["gaussian", "flow", "implicit"] = "gaussian"
    covariance: Literal["diagonal", "full"] = "diagonal"
    transforms: int = 4
    noise: Literal["features", "input", "basis"] = "features"
    contrast: Literal["adaptive", "prior"] = "adaptive"
    hidden_dims: list[int] | None = None

    def __post_init__(self) -> None:
        _check_sizes("guide", self, "transforms", "hidden_dims")


@dataclass
class LossConfig:
    """The loss, and its options.

    Args:
        name: One of pyro_vae.losses.
        options: Its arguments. One that is an object is its class's name, or a mapping with the
            name and its arguments, such as {name: Stein, kernel: imq}; GECO's constraint may be
            several, by names of one's own.
    """

    name: str = "BetaVAE_ELBO"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The data.

    Args:
        name: One of pyro_vae.data.NAMES.
        root: Directory of the files.
        train_size: How many examples to train on; all by default.
        binarize: "threshold", "sample" (once) or "dynamic" (anew for each batch).
        download: Whether to download what is not there.
        seed: Of subsets and of binarising once.
    """

    name: str = "digits"
    root: str | None = None
    train_size: int | None = None
    binarize: Literal["threshold", "sample", "dynamic"] | None = None
    download: bool = False
    seed: int = 0


@dataclass
class TrainingConfig:
    """How to train.

    Args:
        num_epochs: Times that all data are seen, at most.
        batch_size: Examples of a step, in each process.
        lr: Adam's learning rate at the start.
        final_lr: The learning rate at the end, reached by exponential decay, as in the paper on
            amortised inference regularisation; a tenth of ``lr`` by default, ``lr`` for no decay.
        clip_norm: Bound on the norm of all gradients together.
        adversary_lr: Learning rate of a discriminator, where there is one.
        num_adversary_steps: Its steps for each of the guide's.
        patience: Validations without improvement after which to stop; by default never.
        monitor: What is to improve: "iwae", the importance-weighted bound, or "loss"; "last" takes
            the weights of the end for the best. By default the first where the guide's density is
            exact and trained, and the last under GECO, whose multiplier changes the loss and which
            does not train the observation's scale.
        num_particles: Particles of the importance-weighted bound on the validation split.
        validate_every: Epochs from one validation to the next.
        picture_every: Epochs from one set of pictures to the next, 0 for none.
        checkpoint_seconds: Time from one checkpoint to the next; 0 for one at each step.
        precision: "32-true", "64-true" or "bf16-mixed".
        compile: Whether to compile the steps; by default for 5000 steps or more, in one process.
        devices: Processes on this node, each with a device of its own.
        num_nodes: Nodes.
        seed: Of weights, order and noise.
    """

    num_epochs: int = 150
    batch_size: int = 64
    lr: float = 3e-3
    final_lr: float | None = None
    clip_norm: float | None = None
    adversary_lr: float = 1e-3
    num_adversary_steps: int = 1
    patience: int | None = None
    monitor: Literal["iwae", "loss", "last"] | None = None
    num_particles: int = 10
    validate_every: int = 5
    picture_every: int = 50
    checkpoint_seconds: float = 30.0
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    compile: bool | None = None
    devices: int = 1
    num_nodes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"training.{f.name} must be finite, found {value}")
        for name in (
            "num_epochs",
            "batch_size",
            "num_adversary_steps",
            "num_particles",
            "validate_every",
            "devices",
            "num_nodes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, found {getattr(self, name)}")
        for name in ("lr", "final_lr", "clip_norm", "adversary_lr", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"training.{name} must be positive, found {value}")
        if self.final_lr is not None and self.final_lr > self.lr:
            raise ValueError(
                f"training.final_lr must be at most training.lr, {self.lr}: found {self.final_lr}"
            )
        for name in ("picture_every", "checkpoint_seconds", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"training.{name} must not be negative, found {getattr(self, name)}"
                )
        if self.compile and self.devices * self.num_nodes > 1:
            raise ValueError(
                "training.compile is for one process, found True with "
                f"{self.devices * self.num_nodes} processes"
            )


@dataclass
class Config:
    """All that a run is made of.

    Args:
        model: The generative model.
        guide: The inference network.
        loss: The loss.
        data: The data.
        training: How to train.

    Example:
        >>> config = Config(loss=LossConfig("InfoVAE_ELBO", {"alpha": 0.0, "lambda_": 100.0}))
        >>> config.model.latent_dim
        8
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, tree: Any) -> Config:
        """Make one of nested mappings, as a YAML file holds them; what is left out is default.

        Raises:
            ValueError: For an unknown key, with the nearest known one, or a value of another type.
        """
        check_keys(tree, cls)
        import jsonargparse

        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "config")
        try:
            parsed = parser.parse_object({"config": tree}).as_dict()["config"]
        except (jsonargparse.ArgumentError, TypeError) as error:
            raise ValueError(_one_line(error)) from error
        return cls(**{name: SECTIONS[name](**values) for name, values in parsed.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return nested mappings of plain values."""
        return asdict(self)


#: The configuration's parts, by name.
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "guide": GuideConfig,
    "loss": LossConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace('Parser key "config.', 'config key "').split())


def check_keys(tree: Any, kind: type, path: str = "") -> None:
    """Raise a ValueError for an unknown key of a configuration, with the nearest known one.

    Args:
        tree: Nested mappings.
        kind: The dataclass that they stand for.
        path: Where in the configuration they are.
    """
    if not isinstance(tree, Mapping):
        where = f"config key {path!r}" if path else "the config"
        raise ValueError(f"{where}: expected a mapping, found {type(tree).__name__}")
    known = [f.name for f in fields(kind)]
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise unknown_key(full, [f"{path}.{k}" if path else k for k in known])
        if kind is Config:
            check_keys(value, SECTIONS[key], full)


def unknown_key(key: str, known: Iterable[str], what: str = "config key") -> ValueError:
    """Return the error for a key that is none, which names the nearest."""
    known = list(known)
    nearest = get_close_matches(key, known, n=1, cutoff=0.0)
    return ValueError(f"{what} {key!r} is unknown: did you mean {nearest[0]!r}?")


def read_config(path: Path) -> Config:
    """Read a configuration from a YAML file, in which no tag makes an object.

    Raises:
        ValueError: If the file is not there, or is no configuration.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(path)!r} is not there: expected the directory of a run, which `pyro-vae train "
            "--out DIRECTORY` makes"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} is no configuration: {_one_line(error)}") from error
    try:
        return Config.from_dict({} if tree is None else tree)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


#: What of a run may be changed where it goes on.
CHANGEABLE = frozenset(
    f"training.{name}"
    for name in (
        "num_epochs",
        "patience",
        "checkpoint_seconds",
        "picture_every",
        "devices",
        "num_nodes",
    )
)


def check_resumed(config: Config, path: Path) -> None:
    """Raise a ValueError for the first thing in which a configuration is not that of a run.

    How long to train, how often to save and draw, and on how many processes may differ.

    Args:
        config: What is asked for, by :func:`settle` complete.
        path: The run's own file.
    """
    stored = read_config(path).to_dict()
    asked = yaml.safe_load(yaml.safe_dump(config.to_dict()))  # tuples to lists
    for key, expected, found in _differences(stored, asked, ""):
        if key not in CHANGEABLE:
            raise ValueError(
                f"resume: found {key} = {found!r}, expected {expected!r}, that of {str(path)!r}; "
                f"only {', '.join(sorted(CHANGEABLE))} may be changed"
            )


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, the old and the new value of what differs between nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield path, old, new


def write_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML."""
    with replacing(path) as partial_path:
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        partial_path.write_text(text, encoding="utf-8")


# --- from configurations to objects ---------------------------------------------------------------


def load_data(config: DataConfig) -> Data:
    """Load the data of a configuration; ``binarize="dynamic"`` leaves them grey."""
    once = config.binarize if config.binarize != "dynamic" else None
    data = load(
        config.name,
        root=config.root,
        train_size=config.train_size,
        binarize=once,
        seed=config.seed,
        download=config.download,
    )
    if config.binarize == "dynamic" and data.kind != "unit":
        raise ValueError(
            f"data.binarize 'dynamic' draws black and white from grey: found {data.kind!r} data"
        )
    return data


def settle(config: Config, data: Data) -> Config:
    """Return a configuration with what it leaves to the data: the event's shape, the observation.

    Raises:
        ValueError: For an option that would do nothing, such as a flow's under a Gaussian guide.

    Example:
        >>> config = settle(Config(), load_data(DataConfig("digits")))
        >>> config.model.event_shape, config.model.observation
        ([1, 8, 8], 'gaussian')
    """
    binary = data.kind == "binary" or config.data.binarize == "dynamic"
    model = replace(
        config.model,
        event_shape=config.model.event_shape or list(data.event_shape),
        observation=config.model.observation or ("bernoulli" if binary else "gaussian"),
    )
    settled = replace(config, model=model)
    _check_options(settled)
    return settled


#: Options that are not for every choice: which, of what it is an option, and for which values.
OPTIONS_OF: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("model.hidden_dims", "model.architecture", ("mlp",)),
    ("model.hidden_channels", "model.architecture", ("conv", "pixelcnn")),
    ("model.scale", "model.observation", ("gaussian", "discretized_logistic")),
    ("model.levels", "model.observation", ("discretized_logistic",)),
    ("guide.covariance", "guide.kind", ("gaussian",)),
    ("guide.transforms", "guide.kind", ("flow",)),
    ("guide.noise", "guide.kind", ("implicit",)),
    ("guide.contrast", "guide.kind", ("implicit",)),
    ("guide.hidden_dims", "model.architecture", ("mlp",)),
)


def _check_options(config: Config) -> None:
    """Raise a ValueError for an option that was set and would do nothing."""
    default = Config()
    for option, choice, values in OPTIONS_OF:
        value, chosen = _option(config, option), _option(config, choice)
        if value != _option(default, option) and chosen not in values:
            raise ValueError(
                f"{option} is an option of {choice} {' and '.join(map(repr, values))}: found "
                f"{value!r} with {choice} {chosen!r}"
            )


def _option(config: Config, name: str) -> Any:
    section, _, option = name.partition(".")
    return getattr(getattr(config, section), option)


def build(config: Config) -> tuple[VAE, nn.Module, TermsELBO]:
    """Make model, guide and loss, with fresh weights.

    Args:
        config: What to make, by :func:`settle` complete.

    Raises:
        ValueError: For an architecture that does not fit the event's shape, and unknown names.

    Example:
        >>> config = Config(ModelConfig(event_shape=[1, 8, 8]), GuideConfig("flow"))
        >>> model, guide, loss = build(config)
        >>> model.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """
    if not config.model.event_shape:
        raise ValueError("model.event_shape must be given, found none")
    event_shape = tuple(config.model.event_shape)
    observation = _observation(config.model)
    decoder, encoder = _networks(config, event_shape, observation.num_params)
    model = VAE(decoder, observation, config.model.latent_dim, event_shape)
    guide = _guide(config, encoder, event_shape)
    return model, guide, build_loss(config)


def _observation(config: ModelConfig) -> models.Observation:
    if config.observation == "bernoulli":
        return models.Bernoulli()
    if config.observation == "continuous_bernoulli":
        return models.ContinuousBernoulli()
    if config.observation == "discretized_logistic":
        return models.DiscretizedLogistic(config.levels, config.scale)
    return models.Gaussian(config.scale)


def _networks(
    config: Config, event_shape: tuple[int, ...], num_params: int
) -> tuple[nn.Module, nn.Module]:
    """Return decoder and encoder."""
    settings, d = config.model, config.model.latent_dim
    out_shape = (num_params * event_shape[0], *event_shape[1:])
    noisy = config.guide.kind == "implicit" and config.guide.noise == "input"
    if settings.architecture == "mlp":
        widths = tuple(settings.hidden_dims)
        *inner, last = tuple(config.guide.hidden_dims or reversed(widths)) or (d,)
        # With noise at the input, the encoder takes rows of x and the noise.
        x_shape = (math.prod(event_shape) + _noise_dim(d),) if noisy else event_shape
        return MLPDecoder(d, out_shape, widths), MLPEncoder(x_shape, last, tuple(inner))
    if noisy:
        raise ValueError(
            "guide.noise 'input' hands the encoder rows of x and noise: found model.architecture "
            f"{settings.architecture!r}, whose encoder takes images; expected 'mlp', or "
            "guide.noise 'features' or 'basis'"
        )
    if len(event_shape) != 3:
        raise ValueError(
            f"model.architecture {settings.architecture!r} is for images [C, H, W]: found examples "
            f"of shape {list(event_shape)}; expected 'mlp'"
        )
    if settings.architecture in ("grae_mnist", "grae_celeba"):
        name: Any = settings.architecture.removeprefix("grae_")
        return GRAEDecoder(d, name, num_params), GRAEEncoder(name)
    channels = tuple(settings.hidden_channels)
    # Without batch normalisation: densities of a data point depend on no other then.
    encoder = ConvEncoder(event_shape, 256, channels, batch_norm=False)
    if settings.architecture == "pixelcnn":
        return PixelCNN(d, event_shape, num_params), encoder
    return ConvDecoder(d, out_shape, channels[::-1], batch_norm=False), encoder


def _noise_dim(latent_dim: int) -> int:
    """Return the size of the noise at an encoder's input."""
    return 2 * latent_dim + 4


def _guide(config: Config, encoder: nn.Module, event_shape: tuple[int, ...]) -> nn.Module:
    settings, d = config.guide, config.model.latent_dim
    num_features = getattr(encoder, "out_features", None)
    if settings.kind == "gaussian":
        return Gaussian(encoder, d, covariance=settings.covariance, num_features=num_features)
    if settings.kind == "flow":
        return Flow(encoder, d, transforms=settings.transforms, num_features=num_features)
    x_dim = int(torch.Size(event_shape).numel())
    discriminator = JointDiscriminator(x_dim, d, (256, 256))
    return Implicit(
        encoder,
        d,
        noise=settings.noise,
        noise_dim=_noise_dim(d) if settings.noise == "input" else None,
        contrast=settings.contrast,
        num_features=num_features,
        discriminator=discriminator,
    )


def build_loss(config: Config) -> TermsELBO:
    """Make the loss.

    Raises:
        ValueError: For a name that is no loss's, an unknown option, and values out of range.
    """
    name = config.loss.name
    if name not in LOSSES:
        raise unknown_key(name, LOSSES, "loss")
    options = dict(config.loss.options)
    return _make({"name": name, **options}, "loss", config.model.latent_dim)


def _make(value: Any, path: str, latent_dim: int, kind: Any = Any) -> Any:
    """Make what an option says: an object of the registry, several by name, or a plain value."""
    if isinstance(value, str) and value in REGISTRY:
        value = {"name": value}
    if isinstance(value, Mapping):
        several = next((o for o in _alternatives(kind) if get_origin(o) is Mapping), None)
        if several and "name" not in value:
            _, element = get_args(several)
            made = {key: _make(v, f"{path}.{key}", latent_dim) for key, v in value.items()}
            for key, item in made.items():
                _check_kind(item, element, f"{path}.{key}")
            return made
        name = value.get("name")
        if not isinstance(name, str) or name not in REGISTRY:
            raise unknown_key(str(name), REGISTRY, f"{path}.name")
        cls = REGISTRY[name]
        known = _parameters(cls)
        arguments = {}
        for key, option in value.items():
            if key == "name":
                continue
            if key not in known:
                raise unknown_key(f"{path}.{key}", [f"{path}.{k}" for k in known], f"{name} option")
            arguments[key] = _make(option, f"{path}.{key}", latent_dim, known[key].kind)
            _check_kind(arguments[key], known[key].kind, f"{path}.{key}")
        if cls is ResidualDiscriminator:
            arguments.setdefault("latent_dim", latent_dim)
        if cls is divergences.Adversarial:
            arguments.setdefault("discriminator", ResidualDiscriminator(latent_dim))
        for key, parameter in known.items():
            if parameter.required and key not in arguments:
                raise ValueError(
                    f"{path}.{key} must be given for {name}: found none, "
                    f"expected {_in_words(parameter.kind)}"
                )
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} {name}: {_one_line(error)}") from error
    if isinstance(value, (list, tuple)):
        return [_make(item, path, latent_dim) for item in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML takes 1e-3 for a word
    return value


class _Parameter(NamedTuple):
    """What an argument may be, by its annotation, and whether it has to be given."""

    kind: Any
    required: bool


def _parameters(cls: type) -> dict[str, _Parameter]:
    """Return a class's arguments by name, those passed on to its bases as well."""
    found: dict[str, _Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        kinds = get_type_hints(vars(base)["__init__"])
        parameters = inspect.signature(base).parameters.values()
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in found:
                found[p.name] = _Parameter(kinds.get(p.name, Any), p.default is p.empty)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _check_kind(value: Any, kind: Any, path: str) -> None:
    """Raise a ValueError if an option is not what its annotation says.

    Where nothing but an object will do, the nearest name of one that fits is said.
    """
    if _is_of(value, kind):
        return
    options = _alternatives(kind)
    names = [name for name, cls in REGISTRY.items() if any(_makes(cls, o) for o in options)]
    plain = any(option in (int, float, bool, str) for option in options)
    if names and not plain and not isinstance(value, (list, nn.Module)):
        raise unknown_key(str(value), names, path)
    raise ValueError(f"{path}: found {value!r}, expected {_in_words(kind)}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return what a union is one of."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotation's kind: a whole number is a float, a list a tuple."""
    for option in _alternatives(kind):
        cls = get_origin(option) or option
        if cls is Any:
            return True
        if cls in (int, float):
            numbers = (int,) if cls is int else (int, float)
            if isinstance(value, numbers) and not isinstance(value, bool):
                return True
        elif isinstance(value, list) and cls in (tuple, Sequence):
            (element, *_) = get_args(option) or (Any,)
            if all(_is_of(item, element) for item in value):
                return True
        elif isinstance(value, cls) and not (isinstance(value, str) and cls is not str):
            return True
    return False


def _makes(cls: type, option: Any) -> bool:
    """Whether objects of a class are what an annotation asks for."""
    if option is nn.Module:
        return cls is ResidualDiscriminator
    if option == Constraint:
        return cls in (constraints.ReconstructionError, constraints.PatchCrossCorrelation)
    return isinstance(option, type) and issubclass(cls, option)


def _in_words(kind: Any) -> str:
    """Say what an annotation asks for."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    found = []
    for option in _alternatives(kind):
        cls = get_origin(option) or option
        if cls in (tuple, Sequence):
            found.append("a list")
        elif cls is type(None):
            found.append("null")
        else:
            found.append(words.get(cls, f"a {getattr(cls, '__name__', cls)}"))
    return " or ".join(found)


def check_data(model: VAE, data: Data) -> None:
    """Raise a ValueError if the data do not fit the model, before the first step."""
    for name, split in data.splits.items():
        if tuple(split.x.shape[1:]) != tuple(model.event_shape):
            raise ValueError(
                f"the {name} split of {data.name!r}: found examples of shape "
                f"{list(split.x.shape[1:])}, the model is one of {list(model.event_shape)}"
            )
        try:
            model.observation.check(split.x)
        except ValueError as error:
            raise ValueError(f"the {name} split of {data.name!r}: {error}") from error


# --- weights --------------------------------------------------------------------------------------


def weights_of(model: nn.Module, guide: nn.Module, loss: Any) -> dict[str, Tensor]:
    """Return the state of all three by name, as a run's files hold it."""
    parts = {"model": model, "guide": guide, "loss": loss}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        if isinstance(module, nn.Module)
        for name, value in module.state_dict().items()
    }


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as safetensors."""
    from safetensors.torch import save

    content = save({name: value.detach().cpu().contiguous() for name, value in weights.items()})
    with replacing(path) as partial_path:
        partial_path.write_bytes(content)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights from safetensors.

    Raises:
        ValueError: If the file is not there, cut short or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} is not there: was the run trained?") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is cut short or damaged: {_one_line(error)}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, in which nothing but tensors and plain values is allowed.

    Raises:
        ValueError: If the file is not there, cut short, damaged or holds anything else.
    """
    if not path.exists():
        raise ValueError(f"{str(path)!r} is not there: there is nothing to resume from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch have many of their own
        reason = _one_line(error).partition(". ")[0]
        raise ValueError(
            f"checkpoint {str(path)!r} is cut short, damaged or no checkpoint: {reason}"
        ) from error


def state_of(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint."""
    found = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"checkpoint {str(path)!r} holds no weights, expected a 'state_dict'")
    return found


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ValueError for the first tensor in which a file and an architecture differ."""
    for name, value in expected.items():
        if name not in found:
            raise ValueError(
                f"{str(path)!r} is of another architecture: found no {name!r}, expected one of "
                f"shape {list(value.shape)}"
            )
        if found[name].shape != value.shape:
            raise ValueError(
                f"{str(path)!r} is of another architecture: found {name!r} of shape "
                f"{list(found[name].shape)}, expected {list(value.shape)}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(
                f"{str(path)!r} is of another architecture: found {name!r} of shape "
                f"{list(found[name].shape)}, expected none of that name"
            )


def load_weights(
    model: nn.Module, guide: nn.Module, loss: Any, weights: Mapping[str, Tensor], path: Path
) -> None:
    """Put weights into all three.

    Raises:
        ValueError: If they are of another architecture, with the first mismatch.
    """
    check_same(weights, weights_of(model, guide, loss), path)
    for part, module in {"model": model, "guide": guide, "loss": loss}.items():
        if isinstance(module, nn.Module):
            own = {k[len(part) + 1 :]: v for k, v in weights.items() if k.startswith(part + ".")}
            module.load_state_dict(own)


# --- runs -----------------------------------------------------------------------------------------


class Run:
    """A trained run.

    Attributes:
        path: Its directory.
        config: What it was made of.
        model: The generative model, a :class:`~pyro_vae.models.VAE`, in the type of the weights.
        guide: The inference network.
        loss: The loss, with its multipliers and schedules as they were.
    """

    def __init__(
        self, path: Path, config: Config, model: VAE, guide: nn.Module, loss: TermsELBO
    ) -> None:
        self.path, self.config = path, config
        self.model, self.guide, self.loss = model, guide, loss

    def data(self) -> Data:
        """Return the data that it was trained on, in the weights' type.

        Dynamic binarisation is drawn once.
        """
        return self._data

    @cached_property
    def _data(self) -> Data:
        config = self.config.data
        once = "sample" if config.binarize == "dynamic" else config.binarize
        dtype = next(self.model.parameters()).dtype
        return load_data(replace(config, binarize=once)).to(dtype=dtype)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Run({str(self.path)!r}: {c.model.architecture} × {c.guide.kind} × {c.loss.name} "
            f"on {c.data.name})"
        )


def open_run(path: str | Path, weights: Literal["best", "last"] = "best") -> Run:
    """Open a trained run; nothing in its files is run.

    The configuration is read as plain values, its names are looked up among this library's own
    classes, and weights are read as tensors alone.

    Args:
        path: Directory of the run.
        weights: Those of the best validation, or of the last checkpoint.

    Raises:
        ValueError: If it is no run, or one of its files is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     open_run(directory)
        Traceback (most recent call last):
        ValueError: ... is not there: expected the directory of a run...
    """
    if weights not in ("best", "last"):
        raise ValueError(f"weights must be 'best' or 'last', found {weights!r}")
    path = Path(path)
    config = read_config(path / CONFIG)
    file = path / (BEST if weights == "best" else LAST)
    found = read_weights(file) if weights == "best" else state_of(read_checkpoint(file), file)
    try:
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn make room for these
            model, guide, loss = build(config)
    except ValueError as error:
        raise ValueError(f"{str(path / CONFIG)!r}: {error}") from error
    for part, module in {"model": model, "guide": guide, "loss": loss}.items():
        own = [v.dtype for k, v in found.items() if k.startswith(part + ".")]
        module.to(next((dtype for dtype in own if dtype.is_floating_point), None))
        module.eval()
    load_weights(model, guide, loss, found, file)
    return Run(path, config, model, guide, loss)


# --- where to run, where to write -----------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """Return a device, or raise a ValueError if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {name!r}: {reason}") from error
    return device


def check_writable(directory: Path) -> None:
    """Make a directory; raise a ValueError, before the work, if it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"out: cannot write to {str(directory)!r}: {error.strerror}; "
            "expected a directory that can be made and written to"
        ) from error
