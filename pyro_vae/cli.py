"""The command line: ``pyro-vae``, generated from the signatures of the functions below."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import torch
import yaml

from . import models
from .compare import GUIDES
from .compare import compare as _compare
from .runs import (
    CONFIG,
    SECTIONS,
    Config,
    DataConfig,
    GuideConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
    check_keys,
    check_writable,
    find_device,
    open_run,
    unknown_key,
)

__all__ = ["compare", "evaluate", "main", "sample", "train", "traverse"]

RUN = Path("out/run")
DEFAULTS = Config()


def compare(
    model: str,
    out: Path | None = None,
    seed: int = 0,
    guides: str = ",".join(GUIDES),
    steps: int | None = None,
    num_chains: int = 256,
    num_samples: int = 2000,
    num_draws: int = 10_000,
    allow_failed_checks: bool = False,
    device: str = "cpu",
    dtype: Literal["float32", "float64"] = "float32",
) -> int:
    """Fit guides to a model's posterior and say how far each one is from HMC.

    Prints a table and writes table.csv, checks.txt, posterior.png, convergence.png and draws.nc.
    Where HMC's draws fail their checks it says which and stops, with exit status 2.

    Args:
        model: A model of pyro_vae.models, such as eight_schools_avb, or package.module:function
            of your own; the defaults of its arguments are the data.
        out: Directory to write to; out/MODEL by default.
        seed: Seed of everything random.
        guides: Names of guides, separated by commas.
        steps: Optimisation steps of every guide; by default what each kind needs.
        num_chains: HMC's chains.
        num_samples: Draws of each chain.
        num_draws: Draws of each guide, and of each half of HMC's chains, that are compared.
        allow_failed_checks: Go on where HMC failed its checks, and mark its row as such.
        device: Where to run, such as cpu or cuda.
        dtype: Floating-point type.
    """
    function = _find_model(model)
    out = Path("out") / model.rpartition(":")[-1] if out is None else out
    check_writable(out)
    result = _compare(
        function,
        [name.strip() for name in guides.split(",") if name.strip()],
        num_steps=steps,
        num_draws=num_draws,
        num_chains=num_chains,
        num_samples=num_samples,
        allow_failed_checks=allow_failed_checks,
        seed=seed,
        **_data(function, find_device(device), getattr(torch, dtype)),
    )
    print(result)
    result.save(out)
    print(f"written to {out}", file=sys.stderr)
    return 1 if result.errors else 0


def train(
    out: Path = RUN,
    model: ModelConfig = DEFAULTS.model,
    guide: GuideConfig = DEFAULTS.guide,
    loss: LossConfig = DEFAULTS.loss,
    data: DataConfig = DEFAULTS.data,
    training: TrainingConfig = DEFAULTS.training,
    resume: bool = False,
    device: str = "cpu",
) -> int:
    """Train any model × guide × loss on a data set, in a directory of its own.

    --model conv, --guide flow, --loss InfoVAE_ELBO and --data mnist choose; their options follow,
    as in --loss InfoVAE_ELBO --loss.lambda_ 100 --loss.divergence Stein. The directory's
    config.yaml repeats the run: --config RUN/config.yaml.

    Args:
        out: Directory of the run.
        model: The generative model; --model NAME is its architecture.
        guide: The inference network; --guide NAME is its kind.
        loss: The loss, one of pyro_vae.losses by --loss NAME; its arguments are its options.
        data: The data; --data NAME is their name.
        training: How to train.
        resume: Go on with the run that is there, as if it had not been interrupted.
        device: Where to run, such as cpu or cuda.
    """
    from .train import train as _train

    config = Config(model, guide, loss, data, training)
    found = _train(config, out, resume=resume, device=device, progress=sys.stderr.isatty())
    print(f"trained {found}", file=sys.stderr)
    return 0


def evaluate(
    run: Path,
    num_examples: int = 300,
    iwae_particles: int = 1000,
    svi_examples: int = 100,
    svi_particles: int = 1000,
    ais_examples: int = 25,
    ais_temperatures: int = 250,
    ais_chains: int = 5,
    posterior_examples: int = 3,
    chunk_size: int = 4096,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Judge a trained run: writes metrics.json, report.md and pictures into its directory.

    Args:
        run: Directory of the run.
        num_examples: Test examples of the ELBO and IWAE.
        iwae_particles: Particles of IWAE; papers take 5000.
        svi_examples: Test examples of IW-SVI and the gaps.
        svi_particles: Particles of IW-SVI.
        ais_examples: Test examples of annealed importance sampling.
        ais_temperatures: Its temperatures; papers take 1000.
        ais_chains: Its chains for each example.
        posterior_examples: Test examples whose true posterior is drawn, by HMC above two latents,
            which takes minutes for a convolutional decoder; 0 for none.
        chunk_size: What bounds the memory: examples times particles at once.
        device: Where to run, such as cpu or cuda.
        seed: Seed of everything random.
    """
    from .report import report

    place = find_device(device)
    found = open_run(run)
    check_writable(run)
    model, guide = found.model.to(place), found.guide.to(place)
    report(
        model,
        guide,
        found.data().to(place),
        run,
        loss=found.loss,
        num_examples=num_examples,
        iwae_particles=iwae_particles,
        svi_examples=svi_examples,
        svi_particles=svi_particles,
        ais_examples=ais_examples,
        ais_temperatures=ais_temperatures,
        ais_chains=ais_chains,
        posterior_examples=posterior_examples,
        chunk_size=chunk_size,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    print((run / "report.md").read_text(encoding="utf-8"))
    print(f"written to {run}", file=sys.stderr)
    return 0


def sample(run: Path, num: int = 64, seed: int = 0, out: Path | None = None) -> int:
    """Draw from a trained run's model: writes samples.png and samples.npz.

    Args:
        run: Directory of the run.
        num: How many.
        seed: Seed of everything random.
        out: Directory to write to; the run's by default.
    """
    from .pictures import save_samples

    out = out or run
    found = open_run(run)
    check_writable(out)
    save_samples(found.model, num, seed, out)
    print(f"written to {out}", file=sys.stderr)
    return 0


def traverse(
    run: Path,
    index: int = 0,
    num_steps: int = 11,
    extent: float = 2.5,
    out: Path | None = None,
) -> int:
    """Move one latent at a time, from where an example lies: writes traversals.png.

    Args:
        run: Directory of the run.
        index: Which example of the test split.
        num_steps: Steps of each latent.
        extent: How far from 0, in standard deviations of the prior.
        out: Directory to write to; the run's by default.
    """
    from .pictures import save_traversals

    out = out or run
    found = open_run(run)
    check_writable(out)
    x = found.data().test.x
    if not 0 <= index < len(x):
        raise ValueError(f"index must be from 0 to {len(x) - 1}, found {index}")
    save_traversals(found.model, found.guide, x[index : index + 1], num_steps, extent, out)
    print(f"written to {out}", file=sys.stderr)
    return 0


class _Parser(jsonargparse.ArgumentParser):
    def add_argument(self, *args: str, **kwargs: Any) -> Any:
        """Spell options with hyphens, ``--num-chains``; one that is true or false is a switch."""
        names = [name if name == "--print_config" else name.replace("_", "-") for name in args]
        if kwargs.get("type") is bool:
            kwargs = {"action": "store_true", "help": kwargs["help"]}
        return super().add_argument(*names, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in a line, in the place of the usage, which has a line an option."""
        command = getattr(ex, "subcommand_parser", None) or self
        text = re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))
        prog = command.prog.replace(" [options]", "")
        raise ValueError(f"{text.rstrip('. ')} (`{prog} --help` lists the options)") from ex


def main(args: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = sys.argv[1:] if args is None else args
    try:
        if args[:1] == ["train"]:
            args = ["train", *_spelled_out(args[1:])]
        return jsonargparse.auto_cli(
            {
                "compare": compare,
                "train": train,
                "evaluate": evaluate,
                "sample": sample,
                "traverse": traverse,
            },
            args=args,
            prog="pyro-vae",
            parser_class=_Parser,
        )
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"pyro-vae: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    """Return what an error says, without Pyro's table of shapes and torch's tensors."""
    text = str(error)
    for start in ("Trace Shapes:", "\ntensor("):
        text = text.partition(start)[0]
    return " ".join(text.split())


# --- options of `train` ---------------------------------------------------------------------------

SWITCHES = ("resume", "data.download")
# What `--model NAME` and its like set.
_CHOICES = {"model": "architecture", "guide": "kind", "loss": "name", "data": "name"}


def _spelled_out(args: list[str]) -> list[str]:
    """Take ``train``'s arguments to those of its parser.

    ``--loss X --loss.a.b v`` become the loss's name and a mapping of its options, which are
    joined with those of a configuration file.
    """
    rest: list[str] = []
    files: list[str] = []
    loss: dict[str, Any] = {}
    pending = list(args)
    out, resume = str(RUN), False
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if name in ("--help", "-h") or key.startswith("print_config") or not key:
            rest.append(name + equals + value)
            continue
        _check_option(key)
        if key in SWITCHES:
            on = _is_on(name, value) if equals else True
            if key == "resume":
                resume = on
            else:
                section, _, inner = key.partition(".")
                rest.append(f"--{section}={{{inner}: {str(on).lower()}}}")
            continue
        if not equals:
            if not pending:
                raise ValueError(f"option {name}: expected a value")
            value = pending.pop(0)
        section, dot, inner = key.partition(".")
        if key == "config":
            files.append(value)
        elif section == "loss":
            _put(loss, ["name"] if not dot else _path(inner), value)
        else:
            if key == "out":
                out = value
            inner = inner or _CHOICES.get(section, "")
            rest.append("--" + ".".join(filter(None, [section, inner])).replace("_", "-"))
            rest.append(value)
    if resume:
        rest.append("--resume")
    if resume and not files:
        files = [str(Path(out) / CONFIG)]
    for file in files:
        tree = _read(Path(file))
        if isinstance(found := tree.get("loss"), dict):
            loss = _join({"name": found.get("name"), **(found.get("options") or {})}, loss)
        rest = ["--config", file, *rest]
    name = loss.pop("name", None)
    if name is not None:
        rest.append(f"--loss.name={name}")
    if name is not None or loss:
        rest.append(f"--loss.options={yaml.safe_dump(loss, default_flow_style=True).strip()}")
    return rest


def _is_on(name: str, text: str) -> bool:
    """Return what a switch is set to."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"option {name}: found {text!r}, expected true or false")
    return text.lower() == "true"


def _path(inner: str) -> list[str]:
    """Return the way to a loss's option; ``name`` and ``options`` of the file's format go too."""
    parts = inner.split(".")
    return parts[1:] if parts[0] == "options" and len(parts) > 1 else parts


def _put(tree: dict[str, Any], path: list[str], text: str) -> None:
    """Put a value into nested mappings; one that was a name becomes a mapping with that name."""
    *above, last = path
    for key in above:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = tree[key] = {"name": inner}
        tree = inner
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"option --loss.{'.'.join(path)}: found {text!r}, expected a number, a word or YAML"
        ) from error
    if isinstance(tree.get(last), dict) and isinstance(value, str):
        tree[last]["name"] = value
    else:
        tree[last] = value


def _join(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Put new options over old ones, unless they are of another class."""
    if "name" in new and new["name"] != old.get("name"):
        return new
    joined = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        joined[key] = _join(old[key], value) if both else value
    return joined


def _check_option(key: str) -> None:
    section, dot, inner = key.partition(".")
    top = [*SECTIONS, "out", "resume", "device", "config"]
    if section not in top:
        raise unknown_key("--" + key, ["--" + name for name in top], "option")
    if dot and section != "loss":
        known = [f.name for f in fields(SECTIONS[section])] if section in SECTIONS else []
        if inner not in known:
            raise unknown_key("--" + key, [f"--{section}.{k}" for k in known] or top, "option")
    if not dot and section == "training":
        known = [f"--training.{f.name}" for f in fields(TrainingConfig)]
        raise ValueError(f"option --training: expected one of {', '.join(known)}")


def _read(path: Path) -> dict[str, Any]:
    """Read a configuration file for what it says of the loss, after a look at its keys."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"config: cannot read {str(path)!r}: {' '.join(str(error).split())}"
        ) from (error)
    check_keys(tree, Config)
    return tree


# --- arguments of `compare` -----------------------------------------------------------------------


def _find_model(name: str) -> Callable:
    module, colon, function = name.rpartition(":")
    if not colon:
        if name not in models.__all__:
            raise ValueError(
                f"model: found {name!r}, expected one of {models.__all__} "
                "or package.module:function"
            )
        return getattr(models, name)
    if "" not in sys.path:  # the user's own file in the current directory
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: cannot find {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"model: {name!r} is not a function, found {type(found).__name__}")
    return found


def _data(model: Callable, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's default arguments, tensors on the device and in the type."""
    data: dict[str, Any] = {}
    for name, parameter in inspect.signature(model).parameters.items():
        value = parameter.default
        if value is inspect.Parameter.empty:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            raise ValueError(f"model: the argument {name!r} has no default to serve as data")
        if isinstance(value, torch.Tensor):
            value = value.to(device, dtype if value.is_floating_point() else value.dtype)
        data[name] = value
    chosen = device.type != "cpu" or dtype != torch.get_default_dtype()
    if chosen and not any(isinstance(value, torch.Tensor) for value in data.values()):
        raise ValueError(
            f"device, dtype: found {device} and {dtype}, but the model has no tensor among its "
            "arguments' defaults that could take them there"
        )
    return data


if __name__ == "__main__":
    sys.exit(main())
