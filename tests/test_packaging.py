"""The package installs as users get it: wheel, sdist and editable, from outside the repository.

No test here needs a network: builds run without isolation, installations without dependencies.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {"pyro_vae": "pyro_vae", "models": "pyro_vae.models", "guides": "pyro_vae.guides"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]

# Runs in the interpreter that has the installation, and says what is there.
PROBE = """
import importlib, importlib.util, json, sys
from importlib import metadata, resources

names = sys.argv[1:]
distribution = metadata.distribution("pyro-vae")
print(json.dumps({
    "files": {name: importlib.import_module(name).__file__ for name in names},
    "top_level": [n for n in ("models", "guides", "tests") if importlib.util.find_spec(n)],
    "py_typed": resources.files("pyro_vae").joinpath("py.typed").is_file(),
    "entry_points": {e.name: e.value for e in distribution.entry_points},
    "version": [distribution.version, importlib.import_module("pyro_vae._version").__version__],
}))
"""


def _pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def _run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command outside the repository; its output is the message if it fails."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _packages_on_disk() -> set[str]:
    found = set()
    for folder, package in SOURCES.items():
        for file in (REPOSITORY / folder).rglob("*.py"):
            inner = file.parent.relative_to(REPOSITORY / folder).parts
            found.add(".".join([package, *inner]))
    return found


def test_every_package_on_disk_is_in_pyproject() -> None:
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(_packages_on_disk()), (
        "[tool.setuptools] packages in pyproject.toml and the folders on disk differ"
    )


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = _pyproject()
    declared = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(r for extra in project["project"]["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, declared):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} excludes the tested {pin}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hold: no caches, no earlier builds."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    copy = tmp_path_factory.mktemp("source")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, _run(listing, REPOSITORY).split("\0")):
        if (REPOSITORY / name).is_file():  # a file just removed is still listed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, each built from the sources."""
    out = tmp_path_factory.mktemp("dist")
    flags = ["--no-isolation", "--wheel", "--sdist", "--outdir", str(out)]
    _run([sys.executable, "-m", "build", *flags, str(source)], out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def _check(report: dict[str, Any], root: Path) -> None:
    assert report["top_level"] == []
    assert report["py_typed"]
    assert report["entry_points"] == {"pyro-vae": "pyro_vae.cli:main"}
    assert len(set(report["version"])) == 1
    strangers = {n: f for n, f in report["files"].items() if not Path(f).is_relative_to(root)}
    assert not strangers, f"not imported from {root}: {strangers}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_built_package_imports(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "installed"
    _run([*PIP, "install", *OFFLINE, "--target", str(target), str(built[kind])], tmp_path)
    # -S: no .pth file is read, so an editable installation of this environment cannot lend a
    # module that the built package lacks.
    paths = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    command = [sys.executable, "-S", "-c", PROBE, *sorted(_packages_on_disk())]
    output = _run(command, tmp_path, PYTHONPATH=os.pathsep.join(paths))
    _check(json.loads(output), target)


@pytest.mark.slow
def test_editable_installation_imports(source: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        _run([str(python), "-c", "import site; print(site.getsitepackages()[0])"], tmp_path).strip()
    )
    # The dependencies, and setuptools, are this environment's; lines in a .pth file add folders
    # without reading the .pth files in them.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    _run([*PIP, "--python", str(python), "install", *OFFLINE, "-e", str(source)], tmp_path)
    output = _run([str(python), "-c", PROBE, *sorted(_packages_on_disk())], tmp_path)
    _check(json.loads(output), source)
    assert "compare" in _run([str(python.parent / "pyro-vae"), "--help"], tmp_path)


@pytest.mark.slow
def test_built_files(built: dict[str, Path]) -> None:
    """The wheel claims `pyro_vae` alone; both archives carry the licence and every module."""
    with zipfile.ZipFile(built["wheel"]) as archive:
        wheel = set(archive.namelist())
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pyro_vae"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)

    with tarfile.open(built["sdist"]) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    for name in ["LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "tests/conftest.py"]:
        assert name in sdist
    for folder, package in SOURCES.items():
        for file in (REPOSITORY / folder).rglob("*.py"):
            inner = file.relative_to(REPOSITORY / folder).as_posix()
            assert f"{package.replace('.', '/')}/{inner}" in wheel
            assert f"{folder}/{inner}" in sdist
