"""The command line: ``pyro-vae``, generated from the signatures of the functions below."""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch

from . import models
from .compare import GUIDES
from .compare import compare as _compare

__all__ = ["compare", "main"]


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
    _check_writable(out)
    result = _compare(
        function,
        [name.strip() for name in guides.split(",") if name.strip()],
        num_steps=steps,
        num_draws=num_draws,
        num_chains=num_chains,
        num_samples=num_samples,
        allow_failed_checks=allow_failed_checks,
        seed=seed,
        **_data(function, _find_device(device), getattr(torch, dtype)),
    )
    print(result)
    result.save(out)
    print(f"written to {out}", file=sys.stderr)
    return 1 if result.errors else 0


class _Parser(jsonargparse.ArgumentParser):
    def add_argument(self, *args: str, **kwargs: Any) -> Any:
        """Spell options with hyphens, ``--num-chains``; one that is true or false is a switch."""
        names = [name if name == "--print_config" else name.replace("_", "-") for name in args]
        if kwargs.get("type") is bool:
            kwargs = {"action": "store_true", "help": kwargs["help"]}
        return super().add_argument(*names, **kwargs)


def main(args: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    try:
        return jsonargparse.auto_cli(
            {"compare": compare},
            args=args,
            prog="pyro-vae",
            parser_class=_Parser,
        )
    except (ValueError, OSError) as error:
        print(f"pyro-vae: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130


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


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {name!r}: {reason}") from error
    return device


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


def _check_writable(directory: Path) -> None:
    """Fail before the work rather than after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"out: cannot write to {str(directory)!r}: {error.strerror}; "
            "expected a directory that can be made and written to"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
