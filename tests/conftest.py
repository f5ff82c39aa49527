"""What every test stands on: fixed seeds, an empty parameter store, globals left as they were.

Options: ``--device`` and ``--dtype`` choose what the fixtures of those names hand out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # no display is needed, in subprocesses neither

import matplotlib as mpl
import pyro
import pytest
import torch
from pyro.infer.elbo import ELBOModule


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the `device` fixture (cpu)")
    parser.addoption(
        "--dtype",
        default="float64",
        choices=["float32", "float64"],
        help="dtype of the `dtype` fixture (float64: code that leans on the default dtype fails)",
    )


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run each file in one process, but tutorials one by one: they would be the last to end."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_tutorials.py" in nodeid else super()._split_scope(nodeid)

    return Scheduler(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that ``--device`` names."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.fail(f"--device {device}: torch finds no CUDA device", pytrace=False)
    return device


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The floating-point type that ``--dtype`` names."""
    return getattr(torch, request.config.getoption("--dtype"))


# What a test may not leave changed: name -> (read, restore).
_GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch default device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch distribution validation": (
        lambda: torch.distributions.Distribution._validate_args,
        torch.distributions.Distribution.set_default_validate_args,
    ),
    # Pyro's own validation flags are among its settings.
    "pyro settings": (
        lambda: dict(pyro.settings.get()),
        lambda values: pyro.settings.set(**values),
    ),
    # The backend is one of the rcParams.
    "matplotlib rcParams": (
        lambda: dict(mpl.rcParams.copy()),
        lambda values: dict.update(mpl.rcParams, values),
    ),
}


def _difference(name: str, before: Any, after: Any) -> str:
    if not isinstance(before, dict):
        return f"{name}: {before!r} became {after!r}"
    changed = [
        f"{key}: {value!r} became {after.get(key)!r}"
        for key, value in before.items()
        if after.get(key) != value
    ]
    return f"{name}: " + ", ".join(changed)


@pytest.fixture(autouse=True)
def _globals_are_left_alone() -> Iterator[None]:
    """Seed, clear the parameter store, and fail a test that leaves a global setting changed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = {name: read() for name, (read, _) in _GLOBALS.items()}
    yield
    left = []
    for name, (read, restore) in _GLOBALS.items():
        after = read()
        if isinstance(after, dict):  # a lazily imported module may register settings of its own
            after = {key: after[key] for key in before[name] if key in after}
        if after != before[name]:
            left.append(_difference(name, before[name], after))
            restore(before[name])
    if params := sorted(pyro.get_param_store().keys()):
        pyro.clear_param_store()
        left.append(
            f"pyro's parameter store holds {params} "
            "(a test that is meant to fill it asks for the fixture `param_store`)"
        )
    if left:
        pytest.fail("the test left global state changed:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def param_store() -> Iterator[Any]:
    """Pyro's parameter store, for a test that fills it; empty before and after."""
    store = pyro.get_param_store()
    yield store
    store.clear()


# --- captured programs ---------------------------------------------------------------------------


@pytest.fixture
def operation_by_operation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run graphs uncompiled but in the tests that are marked: a compiler takes seconds a test."""
    if "compiled" not in request.keywords:
        monkeypatch.setattr("pyro_vae.compiled.compile_graph", lambda graph, inputs: (graph, False))


@pytest.fixture
def captured(
    operation_by_operation: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fail a test in which a call of ``SVI``, ``compile`` or ``fit`` is not served by a program.

    In a test marked ``compiled`` each program must be what a compiler has made.
    """
    from pyro_vae.player import Player

    look_up, served = Player._program, []

    def noted(player: Player, *args: Any) -> Any:
        found = look_up(player, *args)
        if player.compile:
            served.append((player, found[0] is not None))
        return found

    monkeypatch.setattr(Player, "_program", noted)
    yield
    assert served, "nothing was captured"
    assert all(by_program for _, by_program in served), [player.reason for player, _ in served]
    if "compiled" in request.keywords:
        programs = [call for player, _ in served for call in player.compiled.values()]
        assert not any(isinstance(call, torch.fx.GraphModule) for call in programs)


class Run:
    """How a test runs a loss: as plain Pyro, or as captured programs."""

    def __init__(self, compile: bool) -> None:
        import pyro_vae

        self.compile = compile
        self.SVI = pyro_vae.SVI if compile else pyro.infer.SVI

    def module(self, loss: Any, model: Callable, guide: Callable) -> ELBOModule:
        """Return ``loss(model, guide)``, compiled if that is how."""
        import pyro_vae

        module = loss(model, guide)
        return pyro_vae.compile(module) if self.compile else module

    def loss_and_gradients(
        self, loss: Any, model: Callable, guide: Callable, x: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Return the loss at x and its gradients by name, after a first call elsewhere."""
        module = self.module(loss, model, guide)
        self.start_elsewhere(module, 0.5 * x)
        module.zero_grad()
        torch.manual_seed(1)
        value = module(x)
        value.backward()
        return value.detach(), {name: param.grad for name, param in module.named_parameters()}

    @staticmethod
    def start_elsewhere(module: ELBOModule, *args: Any) -> None:
        """Call a module with other parameters and random numbers, and set its state back.

        A program is captured then: what it took for a constant that is none shows in later calls.
        """
        state = copy.deepcopy(module.state_dict())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
        torch.manual_seed(2)
        module(*args)
        module.load_state_dict(state)


@pytest.fixture(params=["plain", pytest.param("captured", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest) -> Run:
    """Run as plain Pyro and, among the slow tests, captured; a test may name its own runs.

    There are "plain", "captured" and, in tests marked ``compiled``, "compiled".
    """
    if request.param == "plain":
        return Run(compile=False)
    request.getfixturevalue("captured")
    return Run(compile=True)
