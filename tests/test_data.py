"""Data sets: their splits, the formats of their files, and what is said of what was read."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from pyro_vae import data as library
from pyro_vae.data import NAMES, Data, Split, dynamic_binarize, import_torchvision, load, ppca_2d

FILES = Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).parents[2] / "shared" / "data")

MADE_UP = ["two_points", "four_pixels", "ppca_2d", "ppca_2d_tanh", "ppca_2d_sigmoid", "ppca_2d_elu"]

PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _no_data_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))


def real(file: str) -> Any:
    """Skip a test, by name, where the real file is not there."""
    missing = not (FILES / file).exists()
    return pytest.mark.skipif(missing, reason=f"{file} is not in {FILES}")


BINARIZED = real("binarized_mnist.npz")
MNIST = real("mnist/MNIST/raw/train-images-idx3-ubyte.gz")
OMNIGLOT = real("omniglot28_resized.npz")
SILHOUETTES = real("caltech101_silhouettes_randsplit.npz")
FREY = real("freyfaces.npz")


def sizes(data: Data) -> tuple[int, ...]:
    return tuple(len(split.x) for split in data.splits.values())


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


# --- What any data set is ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", *MADE_UP])
def test_a_set_that_is_always_there(name: str) -> None:
    data = load(name)
    assert data.name == name
    assert name in NAMES
    for split in data.splits.values():
        assert split.x.dtype == torch.float32
        assert split.x.shape[1:] == data.event_shape
        if split.y is not None:
            assert split.y.dtype == torch.int64
            assert split.y.shape == split.x.shape[:1]
    again = load(name)
    for part in PARTS:
        assert torch.equal(data.splits[part].x, again.splits[part].x)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    load("digits", train_size=10, binarize="sample")
    load("ppca_2d")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["digits", "ppca_2d", "four_pixels"])
@pytest.mark.parametrize("binarize", [None, "sample"])
def test_smaller_training_sets_are_part_of_larger_ones(name: str, binarize: Any) -> None:
    if name == "ppca_2d":
        binarize = None
    whole = load(name, binarize=binarize)
    for size in (1, 7, 100, len(whole.train.x)):
        part = load(name, train_size=size, binarize=binarize)
        assert torch.equal(part.train.x, whole.train.x[:size])
        assert torch.equal(part.validation.x, whole.validation.x)
        assert torch.equal(part.test.x, whole.test.x)


def test_another_seed_draws_another_subset_of_the_same_split() -> None:
    first, second = (load("digits", train_size=100, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.test.x, second.test.x)
    whole = rows(load("digits").train.x)
    assert rows(first.train.x) <= whole
    assert rows(second.train.x) <= whole


def test_digits_are_those_of_scikit_learn_each_once() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    assert sizes(data) == (1200, 297, 300)
    assert (data.kind, list(data.event_shape), data.num_classes) == ("unit", [1, 8, 8], 10)
    pixels, labels = load_digits(return_X_y=True)
    expected = np.column_stack([pixels / 16, labels])
    found = np.concatenate(
        [np.column_stack([x.reshape(-1, 64).numpy(), y]) for x, y in data.splits.values()]
    )
    assert np.array_equal(np.sort(found, axis=0), np.sort(expected, axis=0))
    # 30 of each class in the test split, give or take
    assert data.test.y is not None
    assert 15 <= data.test.y.bincount().min() <= data.test.y.bincount().max() <= 45


@pytest.mark.parametrize("size", [0, -1, 1201, 10**9])
def test_a_training_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"train_size: found {size}, expected 1 to 1200"):
        load("digits", train_size=size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_size": 2.5}, "train_size: found 2.5, expected an integer"),
        ({"train_size": True}, "train_size: found True"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 0.5}, "seed: found 0.5"),
        ({"binarize": "dynamic"}, "binarize: found 'dynamic'.*dynamic_binarize"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("digits", **arguments)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mnst", "mnist"),
        ("binarised_mnist", "binarized_mnist"),
        ("frey_faces", "freyfaces"),
        ("caltech101", "caltech101_silhouettes"),
        ("ppca_tanh", "ppca_2d_tanh"),
        ("", None),
        (3, None),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name: Any, nearest: str | None) -> None:
    with pytest.raises(ValueError, match="did you mean") as info:
        load(name)
    if nearest is not None:
        assert str(info.value).endswith(f"did you mean {nearest!r}?")


X, Y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test": Split(X[:0])}, "the test split of 'own' is empty"),
        (
            {"validation": Split(torch.rand(4, 2, 2))},
            r"validation .* \[2, 2\], expected \[1, 2, 2\]",
        ),
        ({"train": Split(X, Y[:3])}, r"classes of shape \[3\], expected \[4\]"),
        ({"train": Split(X + 1)}, r"elements in \[1.*expected \[0, 1\]"),
        ({"train": Split(X / 0)}, "not finite"),
        ({"train": Split(X.byte())}, "uint8, expected a floating-point type"),
        ({"kind": "binary"}, "other than 0 and 1"),
        ({"kind": "grey"}, "kind must be"),
    ],
)
def test_data_that_is_wrong(wrong: dict[str, Any], message: str) -> None:
    right = {"train": Split(X, Y), "validation": Split(X, Y), "test": Split(X, Y), "kind": "unit"}
    Data(name="own", source="made up", **right)
    with pytest.raises(ValueError, match=message):
        Data(name="own", source="made up", **{**right, **wrong})


def test_data_moves_to_a_device_and_a_type(device: torch.device, dtype: torch.dtype) -> None:
    data = load("digits").to(device, dtype)
    for x, y in data.splits.values():
        assert (x.device.type, x.dtype) == (device.type, dtype)
        assert y is not None
        assert (y.device.type, y.dtype) == (device.type, torch.int64)
    assert load("ppca_2d").to("cpu").train.y is None


def test_data_describes_itself() -> None:
    assert repr(load("ppca_2d")) == "Data('ppca_2d', 4000 + 1000 + 1000 of [2], real: made up)"


@pytest.mark.slow
def test_importing_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys; import pyro_vae; before = set(sys.modules); import pyro_vae.data; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & {'torchvision', 'sklearn', 'scipy', 'PIL', 'lightning'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Binarisation --------------------------------------------------------------------------------


def test_threshold_is_above_one_half() -> None:
    grey, black = load("digits"), load("digits", binarize="threshold")
    assert black.kind == "binary"
    for part in PARTS:
        assert torch.equal(black.splits[part].x, (grey.splits[part].x > 0.5).float())
        assert torch.equal(black.splits[part].y, grey.splits[part].y)  # type: ignore[arg-type]
    # 8 of 16 grey levels is one half, and white
    assert not black.train.x[grey.train.x == 0.5].any()


def test_sample_is_drawn_once_with_the_grey_levels_as_means() -> None:
    grey = load("digits")
    draws = [load("digits", binarize="sample", seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0].test.x, draws[1].test.x)
    assert not torch.equal(draws[0].test.x, draws[2].test.x)
    assert draws[0].kind == "binary"
    x, bits = grey.test.x, draws[0].test.x
    assert torch.equal(bits[x == 0], x[x == 0])
    assert torch.equal(bits[x == 1], x[x == 1])
    error = ((x * (1 - x)).sum().sqrt() / x.numel()).item()
    assert bits.mean().item() == pytest.approx(x.mean().item(), abs=4 * error)


def test_dynamic_binarisation_is_drawn_anew_with_the_grey_levels_as_means() -> None:
    x = torch.linspace(0, 1, 11, dtype=torch.float64).expand(20000, 11)
    generator = torch.Generator().manual_seed(0)
    first, second = dynamic_binarize(x, generator), dynamic_binarize(x, generator)
    assert first.dtype == torch.float64
    assert not torch.equal(first, second)
    assert torch.equal(first, dynamic_binarize(x, torch.Generator().manual_seed(0)))
    p = x[0]
    assert ((first.mean(0) - p).abs() <= 4 * (p * (1 - p) / len(x)).sqrt()).all()
    assert dynamic_binarize(x[:0]).shape == (0, 11)


@pytest.mark.parametrize("x", [torch.tensor([1.5]), torch.tensor([-0.1]), torch.tensor([np.nan])])
def test_dynamic_binarisation_of_what_is_not_grey(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x "):
        dynamic_binarize(x)


@pytest.mark.parametrize("name", ["two_points", "ppca_2d"])
def test_real_numbers_are_not_binarised(name: str) -> None:
    with pytest.raises(ValueError, match="any real numbers"):
        load(name, binarize="threshold")


# --- Made-up sets --------------------------------------------------------------------------------


def test_two_points() -> None:
    data = load("two_points")
    assert (data.kind, list(data.event_shape), data.num_classes) == ("real", [1], 2)
    for x, y in data.splits.values():
        assert y is not None
        assert torch.equal(x[:, 0], 2.0 * y - 1)
        assert y.bincount().tolist() == [256, 256]


def test_four_pixels() -> None:
    data = load("four_pixels")
    assert (data.kind, list(data.event_shape), data.num_classes) == ("binary", [1, 2, 2], 4)
    for x, y in data.splits.values():
        assert y is not None
        assert torch.equal(x.flatten(1), torch.eye(4)[y])
        assert y.bincount().tolist() == [128] * 4


@pytest.mark.parametrize("seed", [0, 1])
def test_ppca_has_the_covariance_of_its_model(seed: int) -> None:
    data = load("ppca_2d", seed=seed)
    assert (data.kind, sizes(data), data.num_classes) == ("real", (4000, 1000, 1000), None)
    W = ppca_2d(1, seed=seed).W.double()
    assert W.norm(dim=0).tolist() == pytest.approx([2, 1])
    expected = W @ W.T + 0.05**2 * torch.eye(2)
    x = torch.cat([split.x for split in data.splits.values()]).double()
    # Var of the mean of x_i x_j is (C_ii C_jj + C_ij²) / N, for a Gaussian of mean zero
    diagonal = expected.diagonal()
    error = ((diagonal[:, None] * diagonal + expected**2) / len(x)).sqrt()
    assert ((x.T @ x / len(x) - expected).abs() <= 4 * error).all()
    assert (x.mean(0).abs() <= 4 * (diagonal / len(x)).sqrt()).all()


INVERSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
}


@pytest.mark.parametrize("nonlinearity", INVERSE)
def test_ppca_through_a_nonlinearity(nonlinearity: str) -> None:
    x, z, W = ppca_2d(6000, nonlinearity, seed=2)
    noise = (x - INVERSE[nonlinearity](z @ W.T)) / 0.05
    assert noise.mean().item() == pytest.approx(0, abs=4 / 12000**0.5)
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / 12000) ** 0.5)
    assert z.var().item() == pytest.approx(1, abs=4 * (2 / 12000) ** 0.5)
    name = "ppca_2d" if nonlinearity == "identity" else f"ppca_2d_{nonlinearity}"
    loaded = torch.cat([split.x for split in load(name, seed=2).splits.values()])
    assert rows(loaded) == rows(x)


def test_ppca_draws_another_matrix_from_another_seed() -> None:
    assert not torch.equal(ppca_2d(1, seed=0).W, ppca_2d(1, seed=1).W)
    assert torch.equal(ppca_2d(1, seed=0).W, ppca_2d(9, "elu", seed=0).W)


def test_ppca_with_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="nonlinearity: found 'relu'"):
        ppca_2d(10, "relu")
    with pytest.raises(ValueError, match="num: found 0"):
        ppca_2d(0)


# --- Where files are -----------------------------------------------------------------------------

WITH_FILES = [name for name in NAMES if name not in ("digits", *MADE_UP)]


@pytest.mark.parametrize("name", WITH_FILES)
def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError) as info:
        load(name, root=tmp_path / "nowhere")
    message = str(info.value)
    assert str(tmp_path / "nowhere") in message
    assert ("download=True" in message) != ("Put " in message)
    assert "PYRO_VAE_DATA" in message
    assert not (tmp_path / "nowhere").exists()


def test_the_root_is_the_argument_else_the_environment_else_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "environment"))
    for root, place in (
        (str(tmp_path / "argument"), tmp_path / "argument"),
        ("~/own", tmp_path / "home" / "own"),
        (None, tmp_path / "environment"),
    ):
        with pytest.raises(FileNotFoundError, match=str(place)):
            load("freyfaces", root=root)
    monkeypatch.delenv("PYRO_VAE_DATA")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "home/.cache/pyro_vae/data")):
        load("freyfaces")


# --- Writers of small files of each format -------------------------------------------------------

RNG = np.random.default_rng(0)


def write_idx(folder: Path, train: int = 60, test: int = 10, compress: bool = True) -> None:
    folder.mkdir(parents=True)
    for part, size in (("train", train), ("t10k", test)):
        x = RNG.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        y = (np.arange(size) % 10).astype(np.uint8)
        for what, array in (("images-idx3", x), ("labels-idx1", y)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = header + array.tobytes()
            file = folder / f"{part}-{what}-ubyte"
            if compress:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                file.write_bytes(raw)


def bits(size: int) -> np.ndarray:
    return RNG.integers(0, 2, (size, 784), dtype=np.uint8)


def write_binarized(root: Path) -> None:
    arrays = {part: np.packbits(bits(12), axis=1) for part in ("train", "valid", "test")}
    np.savez(root / "binarized_mnist.npz", **arrays)  # type: ignore[arg-type]


def write_amat(root: Path) -> None:
    for part in ("train", "valid", "test"):
        np.savetxt(root / f"binarized_mnist_{part}.amat", bits(12), fmt="%d")


def write_omniglot28(root: Path) -> None:
    np.savez(
        root / "omniglot28_resized.npz",
        train=RNG.integers(0, 256, (40, 784), dtype=np.uint8),
        test=RNG.integers(0, 256, (20, 784), dtype=np.uint8),
        train_char=(np.arange(40) % 4).astype(np.int16),
        test_char=(np.arange(20) % 2 + 4).astype(np.int16),
        char_names=np.array([f"{a}/character0{i}" for a in "ABC" for i in (1, 2)]),
    )


def write_chardata(root: Path) -> None:
    matrices = {}
    for key, size in (("", 40), ("test", 20)):
        matrices[f"{key}data"] = RNG.random((784, size))
        matrices[f"{key}target"] = np.eye(50)[:, np.arange(size) % 50]
    savemat(root / "chardata.mat", matrices)


def write_silhouettes(root: Path) -> None:
    arrays = {}
    for part in ("train", "valid", "test"):
        arrays[part] = np.packbits(bits(12), axis=1)
        arrays[f"{part}_labels"] = (np.arange(12) % 5 + 1).astype(np.uint8)
    np.savez(root / "caltech101_silhouettes_randsplit.npz", **arrays)  # type: ignore[arg-type]


def write_split1(root: Path) -> None:
    matrices = {}
    for part in ("train", "val", "test"):
        matrices[f"{part}_data"] = bits(12)
        matrices[f"{part}_labels"] = (np.arange(12) % 5 + 1)[:, None].astype(np.uint8)
    savemat(root / "caltech101_silhouettes_28_split1.mat", matrices)


def write_freyfaces(root: Path) -> None:
    np.savez(root / "freyfaces.npz", x=RNG.integers(0, 256, (30, 560), dtype=np.uint8))


def write_rawface(root: Path) -> None:
    ff = RNG.integers(0, 256, (560, 30), dtype=np.uint8)
    savemat(root / "frey_rawface.mat", {"ff": ff})


class Format(NamedTuple):
    name: str
    write: Callable[[Path], None]
    file: str  # one of those that are written
    sizes: tuple[int, int, int]


def idx_format(name: str, folder: str, file: str, compress: bool = True) -> Format:
    def write(root: Path) -> None:
        write_idx(root / folder, compress=compress)

    return Format(name, write, f"{folder}/{file}", (50, 10, 10))


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
SILHOUETTE_FILES = "caltech101_silhouettes_randsplit.npz", "caltech101_silhouettes_28_split1.mat"
TWELVE = (12, 12, 12)
FORMATS = [
    idx_format("mnist", "MNIST/raw", f"{IMAGES}.gz"),
    idx_format("mnist", "mnist/MNIST/raw", f"{LABELS}.gz"),
    idx_format("mnist", "MNIST/raw", IMAGES, compress=False),
    idx_format("fashion_mnist", "FashionMNIST/raw", f"{IMAGES}.gz"),
    idx_format("color_mnist", "MNIST/raw", f"{LABELS}.gz"),
    Format("binarized_mnist", write_binarized, "binarized_mnist.npz", TWELVE),
    Format("binarized_mnist", write_amat, "binarized_mnist_valid.amat", TWELVE),
    Format("omniglot28", write_omniglot28, "omniglot28_resized.npz", (37, 3, 20)),
    Format("omniglot28", write_chardata, "chardata.mat", (38, 2, 20)),
    Format("caltech101_silhouettes", write_silhouettes, SILHOUETTE_FILES[0], TWELVE),
    Format("caltech101_silhouettes", write_split1, SILHOUETTE_FILES[1], TWELVE),
    Format("freyfaces", write_freyfaces, "freyfaces.npz", (24, 3, 3)),
    Format("freyfaces", write_rawface, "frey_rawface.mat", (24, 3, 3)),
]
every_format = pytest.mark.parametrize(
    "case", FORMATS, ids=lambda case: f"{case.name}-{case.file.replace('/', '-')}"
)

SHAPES = {"freyfaces": [1, 28, 20], "color_mnist": [3, 28, 28]}


@every_format
def test_a_small_file_of_each_format(case: Format, tmp_path: Path) -> None:
    name, write, _, expected = case
    write(tmp_path)
    listing = sorted(tmp_path.rglob("*"))
    data = load(name)
    assert sizes(data) == expected
    assert list(data.event_shape) == SHAPES.get(name, [1, 28, 28])
    binary = name in ("binarized_mnist", "caltech101_silhouettes")
    assert data.kind == ("binary" if binary else "unit")
    # unknown bytes are not taken for the published ones
    assert "unknown" in data.source
    assert "SHA-256" in data.source
    assert data.source.endswith("do not compare with published numbers")
    assert sorted(tmp_path.rglob("*")) == listing  # nothing was written
    again = load(name)
    for part in PARTS:
        assert torch.equal(data.splits[part].x, again.splits[part].x)
    subset = load(name, train_size=5)
    assert torch.equal(subset.train.x, data.train.x[:5])


@every_format
@pytest.mark.parametrize("damage", ["cut", "no bytes", "other bytes", "pickle"])
def test_a_damaged_file_is_named(case: Format, damage: str, tmp_path: Path) -> None:
    name, write, file, _ = case
    write(tmp_path)
    path = tmp_path / file
    raw = path.read_bytes()
    path.write_bytes(
        {
            "cut": raw[: len(raw) * 2 // 3 + 1],
            "no bytes": b"",
            "other bytes": bytes(range(256)) * 8,
            "pickle": pickle.dumps({"x": 1}),
        }[damage]
    )
    with pytest.raises(ValueError, match=file.rpartition("/")[2]) as info:
        load(name)
    assert "is damaged" in str(info.value)


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (tmp_path / "freyfaces.pkl").write_bytes(bomb)
    with pytest.raises(FileNotFoundError, match=r"freyfaces\.pkl' is a pickle.*numpy\.savez"):
        load("freyfaces")
    (tmp_path / "freyfaces.npz").write_bytes(bomb)
    with pytest.raises(ValueError, match="damaged"):
        load("freyfaces")
    np.savez(tmp_path / "freyfaces.npz", x=np.array([Bomb(tmp_path / "exploded")], dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        load("freyfaces")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "file", "arrays", "message"),
    [
        ("freyfaces", "freyfaces.npz", {"y": np.zeros((30, 560), np.uint8)}, "no array 'x'"),
        ("freyfaces", "freyfaces.npz", {"x": np.zeros((30, 784), np.uint8)}, r"\[N, 560\]"),
        ("freyfaces", "freyfaces.npz", {"x": np.zeros((30, 560))}, "'x' of float64.*uint8"),
        ("freyfaces", "freyfaces.npz", {"x": np.zeros((0, 560), np.uint8)}, "empty 'x'"),
        ("freyfaces", "frey_rawface.mat", {"ff": np.zeros((30, 560), np.uint8)}, "560"),
        ("freyfaces", "frey_rawface.mat", {"gg": np.zeros((560, 30), np.uint8)}, "no numbers 'ff'"),
        ("freyfaces", "frey_rawface.mat", {"ff": np.full((560, 30), 256)}, "0 to 255"),
        ("omniglot28", "chardata.mat", {"data": np.ones((784, 9))}, "no numbers 'target'"),
        (
            "omniglot28",
            "chardata.mat",
            {
                "data": np.full((784, 9), 2.0),
                "target": np.eye(9),
                "testdata": np.ones((784, 9)),
                "testtarget": np.eye(9),
            },
            r"pixels in \[2, 2\]",
        ),
        (
            "omniglot28",
            "chardata.mat",
            {
                "data": np.ones((784, 9)),
                "target": np.eye(9),
                "testdata": np.ones((784, 9)),
                "testtarget": np.eye(8),
            },
            "8 labels for 9 images",
        ),
    ],
)
def test_a_file_with_other_contents(
    name: str, file: str, arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    if file.endswith("npz"):
        np.savez(tmp_path / file, **arrays)  # type: ignore[arg-type]
    else:
        savemat(tmp_path / file, arrays)
    with pytest.raises(ValueError, match=message) as info:
        load(name)
    assert file in str(info.value)


def test_too_few_images_for_three_splits(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST/raw", train=5)
    with pytest.raises(ValueError, match="the validation split of 'mnist' is empty"):
        load("mnist")


def test_idx_labels_that_do_not_fit_the_images(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST/raw"
    write_idx(folder)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        (folder / "t10k-labels-idx1-ubyte.gz").read_bytes()
    )
    with pytest.raises(ValueError, match=r"train-labels.*10 labels for 60 images"):
        load("mnist")


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path: Path) -> None:
    """Their files have the same names."""
    write_idx(tmp_path / "here")
    assert sizes(load("mnist", root=tmp_path / "here")) == (50, 10, 10)
    with pytest.raises(FileNotFoundError):
        load("fashion_mnist", root=tmp_path / "here")


def test_idx_files_are_read_as_they_are(tmp_path: Path) -> None:
    write_idx(tmp_path / "raw")
    folder = tmp_path / "MNIST/raw"
    folder.parent.mkdir()
    (tmp_path / "raw").rename(folder)
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    images = torch.tensor(list(raw)).reshape(60, 1, 28, 28) / 255
    data = load("mnist")
    assert rows(data.train.x) == rows(images[:50])  # the last sixth is held out
    assert rows(data.validation.x) == rows(images[50:])
    index = [int((images == x).flatten(1).all(1).nonzero()) for x in data.train.x]
    assert data.train.y is not None
    assert data.train.y.tolist() == [i % 10 for i in index]


def test_color_mnist_is_mnist_in_one_colour_for_each_image(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST/raw", train=600)
    grey, coloured = load("mnist"), load("color_mnist")
    assert coloured.source.startswith("made up from MNIST/raw")
    colours = []
    for part in PARTS:
        x, y = coloured.splits[part]
        assert torch.equal(y, grey.splits[part].y)  # type: ignore[arg-type]
        found = x.flatten(2).sum(2) / grey.splits[part].x.flatten(2).sum(2)
        expected = grey.splits[part].x * found[:, :, None, None]
        assert torch.allclose(x, expected, atol=1e-6)
        colours.append(found)
    found = torch.cat(colours)
    # uniform on the cube, channels independent: 610 colours
    assert ((found.mean(0) - 0.5).abs() <= 4 * (1 / 12 / len(found)) ** 0.5).all()
    assert (found.T.corrcoef() - torch.eye(3)).abs().max() <= 4 / len(found) ** 0.5
    assert torch.equal(load("color_mnist", train_size=20).train.x, coloured.train.x[:20])
    assert not torch.equal(load("color_mnist", seed=1).test.x, coloured.test.x)


def test_text_files_hold_the_bits_row_by_row(tmp_path: Path) -> None:
    write_amat(tmp_path)
    x = torch.tensor(np.loadtxt(tmp_path / "binarized_mnist_valid.amat"), dtype=torch.float32)
    assert rows(load("binarized_mnist").validation.x) == rows(x)


@pytest.mark.parametrize("wrong", ["0 1 2 0\n", "0 1\n", "0.0 1.0\n", "\n"])
def test_text_files_that_hold_something_else(wrong: str, tmp_path: Path) -> None:
    write_amat(tmp_path)
    with (tmp_path / "binarized_mnist_test.amat").open("a") as file:
        file.write(wrong)
    if wrong == "\n":  # a blank line more is no damage
        assert sizes(load("binarized_mnist")) == (12, 12, 12)
    else:
        with pytest.raises(ValueError, match=r"binarized_mnist_test\.amat"):
            load("binarized_mnist")


def test_matlab_images_are_column_by_column(tmp_path: Path) -> None:
    """An image of MATLAB, written in MATLAB's order: a vertical bar at the left."""
    image = np.zeros((28, 28))
    image[:, :3] = 1
    column_major = image.flatten(order="F")
    matrices: dict[str, np.ndarray] = {}
    for part in ("train", "val", "test"):
        # as published: a silhouette is 0, the background 1
        matrices[f"{part}_data"] = np.repeat(1 - column_major[None], 20, 0).astype(np.uint8)
        matrices[f"{part}_labels"] = np.full((20, 1), 101, np.uint8)
    savemat(tmp_path / "caltech101_silhouettes_28_split1.mat", matrices)
    matrices = {}
    for key in ("", "test"):
        matrices[f"{key}data"] = np.repeat(column_major[:, None], 20, 1)
        matrices[f"{key}target"] = np.eye(50)[:, [7] * 20]
    savemat(tmp_path / "chardata.mat", matrices)
    expected = torch.tensor(image, dtype=torch.float32)
    for name, label in (("caltech101_silhouettes", 100), ("omniglot28", 7)):
        for x, y in load(name).splits.values():
            assert torch.equal(x, expected.expand_as(x))
            assert (y == label).all()  # type: ignore[union-attr]


def test_frey_faces_of_both_formats_are_the_same(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (30, 560), dtype=np.uint8)
    np.savez(tmp_path / "freyfaces.npz", x=x)
    savemat(tmp_path / "frey_rawface.mat", {"ff": x.T})
    first = load("freyfaces")
    (tmp_path / "freyfaces.npz").unlink()
    second = load("freyfaces")
    assert torch.equal(first.test.x, second.test.x)
    images = torch.tensor(x.reshape(-1, 1, 28, 20)) / 255
    assert rows(torch.cat([split.x for split in first.splits.values()])) == rows(images)


def test_omniglot_classes_are_alphabets(tmp_path: Path) -> None:
    write_omniglot28(tmp_path)
    data = load("omniglot28")
    assert data.num_classes == 3
    assert set(data.train.y.tolist()) == {0, 1}  # type: ignore[union-attr]
    assert set(data.test.y.tolist()) == {2}  # type: ignore[union-attr]


def test_published_files_come_before_stand_ins(tmp_path: Path) -> None:
    write_chardata(tmp_path)
    write_omniglot28(tmp_path)
    write_split1(tmp_path)
    write_silhouettes(tmp_path)
    assert load("omniglot28").source.startswith("chardata.mat")
    assert load("caltech101_silhouettes").source.startswith("caltech101_silhouettes_28_split1.mat")


def test_a_checksum_says_what_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chardata(tmp_path)
    raw = (tmp_path / "chardata.mat").read_bytes()
    for digest in (hashlib.sha256(raw).hexdigest(), hashlib.md5(raw).hexdigest()):
        monkeypatch.setattr(library, "_KNOWN", {digest: "the one"})
        assert load("omniglot28").source == "chardata.mat: the one"
    write_chardata(tmp_path)
    assert "unknown" in load("omniglot28").source


def test_a_mixture_of_files_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_amat(tmp_path)
    known = {
        hashlib.sha256(path.read_bytes()).hexdigest(): f"version {i % 2}"
        for i, path in enumerate(sorted(tmp_path.iterdir()))
    }
    monkeypatch.setattr(library, "_KNOWN", known)
    assert "a mixture of version 0, version 1" in load("binarized_mnist").source


# --- The real files ------------------------------------------------------------------------------


@BINARIZED
def test_binarized_mnist_is_the_published_one_bit_for_bit() -> None:
    data = load("binarized_mnist", root=FILES)
    assert sizes(data) == (50000, 10000, 10000)
    assert (data.kind, data.num_classes) == ("binary", None)
    assert data.source == "binarized_mnist.npz: the bits of the published .amat files"
    means = [split.x.double().mean().item() for split in data.splits.values()]
    assert means == pytest.approx([0.13056, 0.13113, 0.13251], abs=5e-6)
    # sorted by digit in the file: zeros have more ink than ones; here the first rows are a sample
    inks = data.test.x.flatten(1).mean(1).double()
    error = inks.std() / 1000**0.5
    assert (inks[:1000].mean() - inks.mean()).abs() <= 4 * error
    # rewritten as text, as published, it has the published checksums
    with np.load(FILES / "binarized_mnist.npz") as archive:
        for part in ("train", "valid", "test"):
            x = np.unpackbits(archive[part], axis=1, count=784)
            text = np.full((len(x), 2 * 784), ord(" "), np.uint8)
            text[:, ::2] = x + ord("0")
            text[:, -1] = ord("\n")
            digest = hashlib.sha256(text.tobytes()).hexdigest()
            assert library._KNOWN[digest] == "the published files"


@MNIST
def test_mnist_is_the_published_one() -> None:
    data = load("mnist", root=FILES)
    assert sizes(data) == (50000, 10000, 10000)
    assert data.source == "MNIST/raw: the published MNIST"
    assert (data.kind, data.num_classes) == ("unit", 10)
    x = torch.cat([data.train.x, data.validation.x]).double()
    assert x.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert x.std().item() == pytest.approx(0.3081, abs=5e-5)
    counts = torch.cat([data.train.y, data.validation.y]).bincount()  # type: ignore[list-item]
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test.y.bincount().tolist() == [  # type: ignore[union-attr]
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


@MNIST
def test_mnist_with_one_byte_changed_is_not_the_published_one(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    for file in (FILES / "mnist/MNIST/raw").iterdir():
        raw = file.read_bytes()
        if file.name.startswith("t10k-labels"):
            labels = bytearray(gzip.decompress(raw))
            labels[-1] = (labels[-1] + 1) % 10
            raw = gzip.compress(bytes(labels))
        (folder / file.name).write_bytes(raw)
    assert "t10k-labels-idx1-ubyte.gz has the SHA-256" in load("mnist", train_size=1).source


@OMNIGLOT
def test_omniglot28_is_a_stand_in() -> None:
    data = load("omniglot28", root=FILES)
    assert sizes(data) == (18000, 1280, 13180)
    assert (data.kind, data.num_classes) == ("unit", 50)
    assert data.source == (
        "omniglot28_resized.npz: a stand-in, not the IWAE paper's chardata.mat: do not compare "
        "with published numbers"
    )
    assert set(data.train.y.tolist()).isdisjoint(data.test.y.tolist())  # type: ignore[union-attr]


@SILHOUETTES
def test_silhouettes_are_a_stand_in() -> None:
    data = load("caltech101_silhouettes", root=FILES)
    assert sizes(data) == (4100, 2264, 2307)
    assert (data.kind, data.num_classes) == ("binary", 101)
    assert "a stand-in" in data.source
    assert data.source.endswith("do not compare with published numbers")


@FREY
def test_frey_faces() -> None:
    data = load("freyfaces", root=FILES)
    assert sizes(data) == (1565, 200, 200)
    assert (data.kind, list(data.event_shape)) == ("unit", [1, 28, 20])
    assert data.source == "freyfaces.npz: the published images"
    x = torch.cat([split.x for split in data.splits.values()])
    assert (255 * x.min()).round() == 8
    assert (255 * x.max()).round() == 238


# --- torchvision ---------------------------------------------------------------------------------


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 with ten images a file, whose checksums are taken for the published ones."""
    kind = import_torchvision().datasets.CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = RNG.integers(0, 256, (60, 3072), dtype=np.uint8)
    lists: dict[str, list] = {"train_list": [], "test_list": []}
    for i in range(6):
        path = folder / (f"data_batch_{i + 1}" if i < 5 else "test_batch")
        batch = {"data": images[10 * i : 10 * i + 10], "labels": list(range(10))}
        path.write_bytes(pickle.dumps(batch))
        lists["train_list" if i < 5 else "test_list"].append([path.name, md5(path)])
    meta = folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for key, value in lists.items():
        monkeypatch.setattr(kind, key, value)
    monkeypatch.setitem(kind.meta, "md5", md5(meta))
    np.save(tmp_path / "images.npy", images)
    return folder


def test_cifar10(cifar10: Path) -> None:
    data = load("cifar10")
    assert sizes(data) == (45, 5, 10)
    assert (data.kind, list(data.event_shape), data.num_classes) == ("unit", [3, 32, 32], 10)
    images = torch.tensor(np.load(cifar10.parent / "images.npy")).reshape(-1, 3, 32, 32) / 255
    assert rows(data.train.x) == rows(images[:45])
    assert rows(data.validation.x) == rows(images[45:50])
    assert rows(data.test.x) == rows(images[50:])
    index = [int((images[50:] == x).flatten(1).all(1).nonzero()) for x in data.test.x]
    assert data.test.y.tolist() == index  # type: ignore[union-attr]
    assert "published CIFAR-10" in data.source


def test_cifar10_is_not_unpickled_if_its_checksum_is_wrong(cifar10: Path) -> None:
    (cifar10 / "test_batch").write_bytes(pickle.dumps(Bomb(cifar10 / "exploded")))
    with pytest.raises(ValueError, match="cifar-10-batches-py' is damaged or incomplete"):
        load("cifar10")
    assert not (cifar10 / "exploded").exists()


@pytest.fixture
def omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kind = import_torchvision().datasets.Omniglot
    root = tmp_path / "omniglot-py"
    checksums = {}
    for part, alphabets in (("images_background", "AB"), ("images_evaluation", "C")):
        for alphabet in alphabets:
            for character in ("character01", "character02"):
                folder = root / part / alphabet / character
                folder.mkdir(parents=True)
                for drawer in range(10):
                    pixels = np.full((105, 105), 255, np.uint8)  # paper
                    pixels[drawer, :7] = 0  # ink
                    Image.fromarray(pixels).convert("1").save(folder / f"{drawer:02}.png")
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            archive.writestr("nothing", part)
        checksums[part] = md5(root / f"{part}.zip")
    monkeypatch.setattr(kind, "zips_md5", checksums)
    return root


def test_omniglot(omniglot: Path) -> None:
    data = load("omniglot")
    assert sizes(data) == (37, 3, 20)
    assert (data.kind, list(data.event_shape), data.num_classes) == ("binary", [1, 105, 105], 6)
    for split in data.splits.values():
        assert (split.x.flatten(1).sum(1) == 7).all()
        assert split.x[:, 0, :10, 0].sum() == len(split.x)
    assert set(data.test.y.tolist()) == {4, 5}  # type: ignore[union-attr]
    assert set(data.train.y.tolist()) == {0, 1, 2, 3}  # type: ignore[union-attr]


def test_a_damaged_image_is_named(omniglot: Path) -> None:
    (omniglot / "images_evaluation/C/character01/03.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(ValueError, match=str(omniglot)):
        load("omniglot")


@pytest.fixture
def celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kind = import_torchvision().datasets.CelebA
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 13)]
    for i, name in enumerate(names):
        # one colour in the middle, which is kept, and another around it, which is not
        image = Image.new("RGB", (178, 218), (0, 255, 0))
        image.paste((20 * i, 0, 100), (19, 39, 159, 179))
        image.save(folder / "img_align_celeba" / name, quality=95)
    header = "12\na b\n"
    for file, start, row in (
        ("list_attr_celeba.txt", header, "1 -1"),
        ("identity_CelebA.txt", "", "1"),
        ("list_bbox_celeba.txt", header, "1 1"),
        ("list_landmarks_align_celeba.txt", header, "1 1"),
    ):
        (folder / file).write_text(start + "".join(f"{name} {row}\n" for name in names))
    parts = "".join(f"{name} {i // 4}\n" for i, name in enumerate(names))
    (folder / "list_eval_partition.txt").write_text(parts)
    files = [("", md5(path), path.name) for path in folder.glob("*.txt")]
    monkeypatch.setattr(kind, "file_list", files)
    return folder


def test_celeba(celeba: Path) -> None:
    data = load("celeba")
    assert sizes(data) == (4, 4, 4)
    assert (data.kind, list(data.event_shape), data.num_classes) == ("unit", [3, 64, 64], None)
    for first, split in zip((0, 4, 8), data.splits.values(), strict=True):
        inner = 255 * split.x[:, :, 4:-4, 4:-4]  # what JPEG does at the edge of colours is not ours
        reds = inner[:, 0].mean((1, 2))
        order = reds.argsort()
        expected = 20.0 * torch.arange(first, first + 4)
        assert torch.allclose(reds[order], expected, atol=3)
        assert inner[:, 1].max() < 8
        assert torch.allclose(inner[:, 2], torch.tensor(100.0), atol=8)
    part = load("celeba", train_size=2)
    assert torch.equal(part.train.x, data.train.x[:2])


def test_celeba_reads_no_image_that_is_not_asked_for(celeba: Path) -> None:
    whole = load("celeba")
    kept = 255 * load("celeba", train_size=1).train.x[0, 0, 32, 32]
    assert torch.equal(whole.train.x[:1], load("celeba", train_size=1).train.x)
    for i in range(4):
        if i != round(kept.item() / 20):
            (celeba / "img_align_celeba" / f"{i + 1:06}.jpg").unlink()
    assert torch.equal(load("celeba", train_size=1).train.x, whole.train.x[:1])
    with pytest.raises(ValueError, match="missing or damaged"):
        load("celeba")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "omniglot"])
def test_a_download_that_fails_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    utils = importlib.import_module(f"{import_torchvision().__name__}.datasets.utils")
    monkeypatch.setattr(utils, "_urlretrieve", fail)
    monkeypatch.setattr(utils, "_get_redirect_url", fail)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*no route to host"):
        load(name, download=True)


def test_mnist_is_read_after_torchvision_has_downloaded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = import_torchvision().datasets.MNIST

    def download(self: Any) -> None:
        write_idx(Path(self.raw_folder))
        for file in Path(self.raw_folder).iterdir():
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))

    monkeypatch.setattr(kind, "download", download)
    with pytest.raises(FileNotFoundError):
        load("mnist", root=tmp_path / "new")
    assert sizes(load("mnist", root=tmp_path / "new", download=True)) == (50, 10, 10)
    assert sizes(load("mnist", root=tmp_path / "new")) == (50, 10, 10)


def run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.slow
def test_torchvision_imports_beside_any_torch() -> None:
    run(
        "from pyro_vae.data import import_torchvision as get\n"
        "first = get()\n"
        "import torchvision\n"
        "from pyro_vae import data\n"
        "declared = len(data._operators)\n"
        "assert first is torchvision is get()\n"
        "assert len(data._operators) == declared <= 1\n"
        "assert torchvision.datasets.MNIST\n"
    )


@pytest.mark.slow
def test_nothing_is_declared_where_torchvision_has_its_operators() -> None:
    run(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "from pyro_vae import data\n"
        "schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'\n"
        "for name in ('nms', 'qnms'):\n"
        "    if not hasattr(torch.ops.torchvision, name):\n"
        "        library.define(name + schema)\n"
        "data.import_torchvision()\n"
        "assert not data._operators\n"
    )


def test_another_error_of_torchvision_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(library.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()
    assert len(library._operators) <= 1
