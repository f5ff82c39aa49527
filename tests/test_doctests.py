"""Every example in a docstring runs, under the name by which users import its module.

pytest's own collection goes by path: it would import ``models/x.py`` a second time, as ``models.x``
beside ``pyro_vae.models.x``.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest

# An editable installation maps the last two to folders outside pyro_vae: walk them by name.
PACKAGES = ["pyro_vae", "pyro_vae.models", "pyro_vae.guides"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class _Finder(doctest.DocTestFinder):
    """Finds decorated functions too: the standard one passes over whatever a decorator wrapped."""

    def _from_module(self, module: ModuleType | None, object: Any) -> bool:
        if module is not None and inspect.isfunction(object):
            return object.__module__ == module.__name__
        return super()._from_module(module, object)


def _modules() -> list[str]:
    names = set(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        names.update(info.name for info in pkgutil.walk_packages(path, package + "."))
    return sorted(name for name in names if not name.endswith(".__main__"))


def _doctests() -> list[doctest.DocTest]:
    finder = _Finder(exclude_empty=True)
    found = (finder.find(importlib.import_module(name), name) for name in _modules())
    return [test for tests in found for test in tests if test.examples]


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("example", _doctests(), ids=lambda example: example.name)
def test_example_in_docstring(example: doctest.DocTest) -> None:
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    if result.failed:
        pytest.fail("".join(report), pytrace=False)


def test_models_and_guides_are_among_the_modules() -> None:
    """An empty walk would pass in silence."""
    modules = _modules()
    assert "pyro_vae.losses" in modules
    assert "pyro_vae.models" in modules
    assert "pyro_vae.guides" in modules
