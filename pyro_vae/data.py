"""Data sets in deterministic splits: those of the papers, and what was really read."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NAMES",
    "PPCA",
    "Data",
    "Split",
    "dynamic_binarize",
    "import_torchvision",
    "load",
    "ppca_2d",
]

_PARTS = ("train", "validation", "test")

Kind = Literal["binary", "unit", "real"]


class Split(NamedTuple):
    """Examples, and their classes where there are any.

    Attributes:
        x: Examples [N, *event_shape].
        y: Classes [N], int64, from 0 on; or None.
    """

    x: Tensor
    y: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    r"""A data set in three splits.

    Args:
        name: Its name.
        train: What is learned from.
        validation: What decides when to stop, and which settings are best.
        test: What is reported.
        kind: ``"binary"`` for elements in {0, 1}, ``"unit"`` in [0, 1], ``"real"`` for any numbers.
        source: What was read: files, and whether they are the published ones by their checksums.

    Raises:
        ValueError: If a split is empty, holds other shapes than the others, other elements than
            its kind says, or numbers of examples and classes that differ.

    Example:
        >>> data = load("digits")
        >>> data
        Data('digits', 1200 + 297 + 300 of [1, 8, 8], unit, 10 classes: scikit-learn's digits)
        >>> data.to(dtype=torch.float64).train.x.dtype
        torch.float64
    """

    name: str
    train: Split
    validation: Split
    test: Split
    kind: Kind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "unit", "real"):
            raise ValueError(
                f"kind must be 'binary', 'unit' or 'real', found {self.kind!r} in {self.name!r}"
            )
        for part, (x, y) in self.splits.items():
            where = f"the {part} split of {self.name!r}"
            if not len(x):
                raise ValueError(f"{where} is empty, expected at least one example")
            if x.shape[1:] != self.event_shape:
                raise ValueError(
                    f"{where} holds examples of shape {list(x.shape[1:])}, expected "
                    f"{list(self.event_shape)} as in the training split"
                )
            if y is not None and y.shape != x.shape[:1]:
                raise ValueError(
                    f"{where} has classes of shape {list(y.shape)}, expected [{len(x)}]"
                )
            _check_elements(x, self.kind, where)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name."""
        return {part: getattr(self, part) for part in _PARTS}

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one example."""
        return self.train.x.shape[1:]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None where there are no labels."""
        labels = [split.y for split in self.splits.values() if split.y is not None]
        return max(int(y.max()) for y in labels) + 1 if labels else None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Data:
        """Move the examples to a device and a floating-point type, and the classes to the device.

        Args:
            device: Where to, or None to leave them there.
            dtype: The examples' type, or None to leave it.
        """
        train, validation, test = (
            Split(x.to(device, dtype), None if y is None else y.to(device))
            for x, y in self.splits.values()
        )
        return replace(self, train=train, validation=validation, test=test)

    def __repr__(self) -> str:
        sizes = " + ".join(str(len(split.x)) for split in self.splits.values())
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        shape = list(self.event_shape)
        return f"Data({self.name!r}, {sizes} of {shape}, {self.kind}{classes}: {self.source})"


def _check_elements(x: Tensor, kind: Kind, where: str) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{where} is of {x.dtype}, expected a floating-point type")
    low, high = (float(bound) for bound in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{where} has elements that are not finite")
    if kind != "real" and not (low >= 0 and high <= 1):
        raise ValueError(
            f"{where} is {kind!r} but has elements in [{low:g}, {high:g}], expected [0, 1]"
        )
    if kind == "binary" and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(f"{where} is 'binary' but has elements other than 0 and 1")


def dynamic_binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw black and white images whose means are grey ones, anew for each batch that is taken.

    .. math:: b \sim \mathrm{Bernoulli}(x)

    Args:
        x: Grey images, elements in [0, 1], any shape.
        generator: Where the randomness comes from; by default torch's global generator.

    Returns:
        Images of x's shape and type, elements in {0, 1}.

    Raises:
        ValueError: If x is not of a floating-point type or has elements outside [0, 1].

    References:
        | On the quantitative analysis of deep belief networks (Salakhutdinov, Murray, 2008)

    Example:
        >>> dynamic_binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    if x.numel():
        _check_elements(x, "unit", "x")
    return torch.bernoulli(x, generator=generator)


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    train_size: int | None = None,
    binarize: Literal["threshold", "sample"] | None = None,
    seed: int = 0,
    download: bool = False,
) -> Data:
    r"""Load a data set in three splits, the same every time.

    Of scikit-learn, always there:

    * ``digits``: 8×8 grey; 1200 to train, 297 to validate, 300 to test.

    Of torchvision's files:

    * ``mnist`` and ``fashion_mnist``: 28×28 grey; 50000, 10000, 10000.
    * ``cifar10``: 32×32 colour; 45000, 5000, 10000.
    * ``celeba``: 64×64 colour, the middle 140×140 made smaller; 162770, 19867, 19962. All of it
      takes some 12 GB; with a ``train_size`` no other image of the training split is read.
    * ``omniglot``: 105×105 binary, 1 = ink; 18000, 1280, 13180, characters of other alphabets in
      the test split. Classes: characters.

    Of files of their own:

    * ``binarized_mnist``: 28×28 binary, a draw of MNIST; 50000, 10000, 10000.
    * ``omniglot28``: 28×28 grey, of the IWAE paper; 23000, 1345, 8070. Classes: alphabets.
    * ``caltech101_silhouettes``: 28×28 binary, 1 = silhouette; 4100, 2264, 2307.
    * ``freyfaces``: 28×20 grey; 1565, 200, 200.

    Made up:

    * ``two_points``: {−1, 1}, of the InfoVAE paper; each 256 times in each split.
    * ``four_pixels``: 2×2, one pixel on, of the AVB paper; each 128 times in each split.
    * ``ppca_2d``, ``ppca_2d_tanh``, ``ppca_2d_sigmoid``, ``ppca_2d_elu``: of the GRAE paper, see
      :func:`ppca_2d`; 4000, 1000, 1000.
    * ``color_mnist``: MNIST, each digit in one colour.

    Images are [C, H, W] in [0, 1], vectors [D]. The splits are the standard ones where there are
    any and else drawn once and for all, whatever the seed. Every split is in random order, so that
    its first rows are a fair sample: some files are sorted by class, or hold a film.

    Files are looked for in the root directory and in its folder of the data set's name, MNIST's
    also in MNIST/raw, where torchvision puts them; nothing is written but downloads. OMNIGLOT and
    Caltech-101 silhouettes have stand-ins under the same name where the published file is not
    there: ``Data.source`` says which was read, by its checksum. No file is unpickled, except
    CIFAR-10's, after torchvision has compared their checksums.

    The GECO paper takes Color-MNIST from a paper on GANs, where a digit gets a single colour, and
    does not say which. Here it is uniform on the RGB cube, drawn for each image from the seed.

    Args:
        name: One of ``NAMES``.
        root: The directory; by default the environment's PYRO_VAE_DATA, else
            ``~/.cache/pyro_vae/data``.
        train_size: Take that many examples of the training split, drawn from the seed. Smaller
            ones are part of larger ones. By default all.
        binarize: ``"threshold"`` for x > ½, ``"sample"`` to draw each pixel once, from the seed.
            For new draws in each batch see :func:`dynamic_binarize`.
        seed: Of all that is drawn: training subset, binarisation, made-up sets.
        download: Whether torchvision may download what is not there, into the root.

    Raises:
        ValueError: If the name is unknown, an argument is out of range, or a file is damaged.
        FileNotFoundError: If a file is not there, or cannot be downloaded.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016): OMNIGLOT 28×28
        | https://arxiv.org/abs/1509.00519
        | InfoVAE (Zhao, Song, Ermon, 2017), section 2 https://arxiv.org/abs/1706.02262
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.2
        | https://arxiv.org/abs/1701.04722
        | Taming VAEs (Rezende, Viola, 2018), section 4 https://arxiv.org/abs/1810.00597
        | On Implicit Regularization in β-VAEs (Kumar, Poole, 2020), appendix C
        | https://arxiv.org/abs/2002.00041

    Example:
        >>> data = load("digits", train_size=500, binarize="threshold")
        >>> data.train.x.shape, data.train.y.shape, data.kind
        (torch.Size([500, 1, 8, 8]), torch.Size([500]), 'binary')
    """
    if name not in _READERS:
        nearest = get_close_matches(str(name), NAMES, n=1, cutoff=0)[0]
        raise ValueError(
            f"name: found {name!r}, expected one of {', '.join(NAMES)}; did you mean {nearest!r}?"
        )
    if binarize not in (None, "threshold", "sample"):
        raise ValueError(
            f"binarize: found {binarize!r}, expected None, 'threshold' or 'sample'; for new draws "
            "in each batch use dynamic_binarize"
        )
    if not _is_integer(seed) or seed < 0:
        raise ValueError(f"seed: found {seed!r}, expected an integer from 0 on")
    if train_size is not None and not _is_integer(train_size):
        raise ValueError(f"train_size: found {train_size!r}, expected an integer or None")
    found = _READERS[name](_Request(name, _find_root(root), seed, download))
    if binarize is not None and found.kind == "real":
        raise ValueError(
            f"binarize: found {binarize!r} for {name!r}, whose elements are any real numbers; "
            "expected None"
        )
    num_train = len(found.splits[0])
    if train_size is not None and not 1 <= train_size <= num_train:
        raise ValueError(
            f"train_size: found {train_size}, expected 1 to {num_train}, the size of the training "
            f"split of {name!r}"
        )
    splits = {}
    for stream, (part, rows) in enumerate(zip(_PARTS, found.splits, strict=True)):
        if part == "train":
            order = _shuffled(len(rows), seed)[:train_size]
        else:
            order = _shuffled(len(rows), _SPLIT, stream)
        x, y = rows.take(order)
        if binarize == "threshold":
            x = (x > 0.5).to(x.dtype)
        elif binarize == "sample":
            # row by row in the same order: the subset's draws are the first of the whole split's
            draws = torch.rand(x.shape, generator=_generator(seed, stream, 1))
            x = (draws < x).to(x.dtype)
        splits[part] = Split(x, y)
    kind = found.kind if binarize is None else "binary"
    return Data(name=name, kind=kind, source=found.source, **splits)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


# --- Randomness ----------------------------------------------------------------------------------

_SPLIT = 20170101  # the seed of splits that are drawn once and for all


def _generator(*seed: int) -> torch.Generator:
    state = np.random.SeedSequence([int(s) for s in seed]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _shuffled(size: int, *seed: int) -> Tensor:
    return torch.randperm(size, generator=_generator(*seed))


# --- Rows that become tensors when they are taken ------------------------------------------------


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> Split: ...


class _Arrays:
    """Rows of arrays, divided by a scale when they are taken."""

    def __init__(self, x: np.ndarray, y: np.ndarray | None = None, scale: float = 1) -> None:
        self.x, self.y, self.scale = x, y, scale

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> Split:
        rows = index.numpy()
        x = torch.from_numpy(self.x[rows]).to(torch.float32)
        y = None if self.y is None else torch.from_numpy(self.y[rows].astype(np.int64))
        return Split(x if self.scale == 1 else x.div_(self.scale), y)


class _Images:
    """Rows of a torchvision data set, each decoded when it is taken, to uint8 [C, H, W]."""

    def __init__(
        self,
        dataset: Any,
        decode: Callable[[Any], np.ndarray],
        label: Callable[[Any], int] | None,
        scale: float,
    ) -> None:
        self.dataset, self.decode, self.label, self.scale = dataset, decode, label, scale

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, index: Tensor) -> Split:
        images, labels = [], []
        for i in index.tolist():
            try:
                image, label = self.dataset[i]
                images.append(self.decode(image))
            except (OSError, ValueError, SyntaxError) as error:  # PIL's, of a damaged image
                raise ValueError(
                    f"an image in {str(self.dataset.root)!r} is missing or damaged: {error}"
                ) from error
            if self.label is not None:
                labels.append(self.label(label))
        y = np.array(labels) if self.label is not None else None
        return _Arrays(np.stack(images), y, self.scale).take(torch.arange(len(images)))


@dataclass(frozen=True)
class _Part:
    """Some of other rows."""

    rows: _Rows
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Split:
        return self.rows.take(self.index[index])


@dataclass(frozen=True)
class _Coloured:
    """Grey rows, each in a colour of its own."""

    rows: _Rows
    colours: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Split:
        x, y = self.rows.take(index)
        return Split(x * self.colours[index][:, :, None, None], y)


def _cut(rows: _Rows, *sizes: int) -> list[_Part]:
    """Cut rows, as they lie, into parts of these sizes."""
    return [_Part(rows, index) for index in torch.arange(len(rows)).split(list(sizes))]


def _cut_shuffled(rows: _Rows, *sizes: int) -> list[_Part]:
    """Cut rows, in an order that is always the same, into parts of these sizes."""
    return [_Part(rows, index) for index in _shuffled(len(rows), _SPLIT).split(list(sizes))]


class _Request(NamedTuple):
    name: str
    root: Path
    seed: int
    download: bool


class _Found(NamedTuple):
    splits: Sequence[_Rows]  # to train, validate, test
    kind: Kind
    source: str


# --- Files ---------------------------------------------------------------------------------------


def _find_root(root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        root = os.environ.get("PYRO_VAE_DATA") or Path("~/.cache/pyro_vae/data")
    return Path(root).expanduser()


_NO_COMPARISON = "do not compare with published numbers"

# What files are, by their SHA-256 or MD5.
_KNOWN = {
    # MNIST
    "f68b3c2dcbeaaa9fbdd348bbdeb94873": "the published MNIST",
    "d53e105ee54ea40749a09fcbcd1e9432": "the published MNIST",
    "9fb629c4189551a2d022fa330f9573f3": "the published MNIST",
    "ec29112dd5afa0611ce80d1b7f02629c": "the published MNIST",
    # Fashion-MNIST
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d": "the published Fashion-MNIST",
    "25c81989df183df01b3e8a0aad5dffbe": "the published Fashion-MNIST",
    "bef4ecab320f06d8554ea6380940ec79": "the published Fashion-MNIST",
    "bb300cfdad3c16e7a12a480ee83cd310": "the published Fashion-MNIST",
    # binarized_mnist_{train,valid,test}.amat, and the same bits in binarized_mnist.npz
    "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d": "the published files",
    "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2": "the published files",
    "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c": "the published files",
    "df14a884cb4aa7ac6692463fb31798a687c4e762c73c23a8ae3114fbec4e6093": (
        "the bits of the published .amat files"
    ),
    # chardata.mat
    "21ecaf34373511aa7691cf2e0802aa3d": "the published file of the IWAE paper",
    # omniglot28_resized.npz
    "b9c8b6db5502f38049e34a1ef425852f09fde0157c3ea05454d48ecbb82f979d": (
        f"a stand-in, not the IWAE paper's chardata.mat: {_NO_COMPARISON}"
    ),
    # caltech101_silhouettes_28_split1.mat
    "4483e9c14b188fd09937f9ea6f9ea777": "the published file, the official split1",
    # caltech101_silhouettes_randsplit.npz
    "2ecec44962c2a8b307922e25621871e6aa15c0715614e4e54a2089cf86c9e595": (
        f"a stand-in, all images in a split that is not the official split1: {_NO_COMPARISON}"
    ),
}
# The grey levels of freyfaces.npz and frey_rawface.mat, uint8, image by image.
_FREY_PIXELS = "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78"


def _describe(files: Mapping[Path, bytes], names: str | None = None) -> str:
    """Say which files they are, by their checksums."""
    names = names or ", ".join(path.name for path in files)
    remarks = set()
    for path, raw in files.items():
        sha256 = hashlib.sha256(raw).hexdigest()
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        remark = _KNOWN.get(sha256) or _KNOWN.get(md5)
        if remark is None:
            return (
                f"{names}: unknown, {path.name} has the SHA-256 {sha256[:16]}…, none of a "
                f"published file: {_NO_COMPARISON}"
            )
        remarks.add(remark)
    if len(remarks) > 1:
        return f"{names}: unknown, a mixture of {', '.join(sorted(remarks))}: {_NO_COMPARISON}"
    return f"{names}: {remarks.pop()}"


def _places(request: _Request, *inner: str) -> list[Path]:
    """Where files are looked for."""
    roots = [request.root, request.root / request.name]
    return roots + [place / folder for folder in inner for place in roots]


def _find(places: Sequence[Path], *names: str) -> list[Path] | None:
    """Return the files, if they lie in one of the places."""
    for place in places:
        paths = [place / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return None


def _missing(request: _Request, places: Sequence[Path], files: str, how: str) -> FileNotFoundError:
    looked = ", ".join(str(place) for place in places)
    return FileNotFoundError(
        f"data set {request.name!r}: found no {files}, looked in {looked}. {how} The root is the "
        "argument root, else the environment's PYRO_VAE_DATA, else ~/.cache/pyro_vae/data."
    )


def _damaged(path: Path, found: Any, expected: str) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged: found {found}, expected {expected}")


def _read_idx(path: Path, raw: bytes, num_dims: int) -> np.ndarray:
    """Read the format of MNIST's files: a magic number, sizes, bytes."""
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}", "a whole gzip file") from error
    start = 4 + 4 * num_dims
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, num_dims]):
        raise _damaged(path, f"the first bytes {raw[:start].hex()!r}", f"0000080{num_dims}, sizes")
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    if len(raw) - start != math.prod(shape):
        raise _damaged(path, f"{len(raw) - start} bytes", f"{math.prod(shape)}, for {shape}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_npz(path: Path, raw: bytes, shapes: Mapping[str, tuple[int, ...]]) -> list[np.ndarray]:
    """Read images of these shapes, uint8, and labels, integers of shape (), from an npz file."""
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in shapes if key in archive.files}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise _damaged(path, f"{type(error).__name__}: {error}", "a whole npz file") from error
    for key, shape in shapes.items():
        if key not in arrays:
            raise _damaged(path, f"no array {key!r}", f"the arrays {', '.join(shapes)}")
        array = arrays[key]
        right = array.dtype == np.uint8 if shape else array.dtype.kind in "iu"
        if not right or not array.ndim or array.shape[1:] != shape:
            found = f"{key!r} of {array.dtype} and shape {list(array.shape)}"
            kind = "uint8" if shape else "integers"
            raise _damaged(path, found, f"{kind} of shape [{', '.join(map(str, ('N', *shape)))}]")
        if not len(array):
            raise _damaged(path, f"an empty {key!r}", "at least one example")
    return [arrays[key] for key in shapes]


def _read_mat(path: Path, raw: bytes, keys: Sequence[str]) -> list[np.ndarray]:
    """Read matrices from a MATLAB file."""
    from scipy.io import loadmat

    try:
        arrays = loadmat(io.BytesIO(raw), variable_names=list(keys))
    except Exception as error:  # scipy raises many kinds
        raise _damaged(path, f"{type(error).__name__}: {error}", "a MATLAB file") from error
    for key in keys:
        if key not in arrays or arrays[key].dtype.kind not in "iufb" or not arrays[key].size:
            raise _damaged(path, f"no numbers {key!r}", f"the matrices {', '.join(keys)}")
    return [arrays[key] for key in keys]


def _read_amat(path: Path, raw: bytes) -> np.ndarray:
    """Read lines of 784 zeros and ones with spaces between."""
    bits = np.frombuffer(raw.translate(None, b" \t\r\n"), np.uint8) - ord("0")
    if not len(bits) or len(bits) % 784 or bits.max() > 1:
        raise _damaged(path, f"{len(bits)} characters", "zeros and ones, 784 for each image")
    return bits.reshape(-1, 1, 28, 28)


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, axis=1, count=784).reshape(-1, 1, 28, 28)


def _from_matlab(path: Path, x: np.ndarray) -> np.ndarray:
    """Take rows of pixels in [0, 1], column by column, to images [N, 1, 28, 28]."""
    if x.ndim != 2 or x.shape[1] != 784:
        raise _damaged(path, f"images of shape {list(x.shape)}", "784 pixels each")
    x = x.astype(np.float32)
    if not (x.min() >= 0 and x.max() <= 1):
        raise _damaged(path, f"pixels in [{x.min():g}, {x.max():g}]", "[0, 1]")
    return x.reshape(-1, 1, 28, 28).swapaxes(2, 3)


def _labels(path: Path, y: np.ndarray, x: np.ndarray, first: int = 0) -> np.ndarray:
    """Return classes from 0 on, one for each image."""
    y = y.reshape(-1).astype(np.int64) - first
    if len(y) != len(x) or y.min() < 0:
        found = f"{len(y)} labels for {len(x)} images, or one below {first}"
        raise _damaged(path, found, f"one for each image, from {first} on")
    return y


# --- Readers -------------------------------------------------------------------------------------


def _digits(request: _Request) -> _Found:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows = _Arrays(pixels.astype(np.float32).reshape(-1, 1, 8, 8), labels, 16)
    return _Found(_cut_shuffled(rows, 1200, 297, 300), "unit", "scikit-learn's digits")


_IDX = [
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
]


def _mnist(request: _Request, name: str = "mnist", folder: str = "MNIST") -> _Found:
    request = request._replace(name=name)
    places = _places(request, f"{folder}/raw")
    if name != "mnist":  # MNIST's files have the same names
        places = [place for place in places if place != request.root]
    names = [f"{idx}.gz" for idx in _IDX]
    paths = _find(places, *names) or _find(places, *_IDX)
    if paths is None and request.download:
        _torchvision(request, folder, folder, [{}])
        paths = _find(places, *names) or _find(places, *_IDX)
    if paths is None:
        how = (
            f"Call with download=True, or put the four files into {request.root / folder / 'raw'}."
        )
        raise _missing(request, places, f"{names[0]} and the three others", how)
    files = {path: path.read_bytes() for path in paths}
    arrays = [
        _read_idx(path, raw, 1 if "labels" in path.name else 3) for path, raw in files.items()
    ]
    splits = []
    for images_path, labels_path, x, y in (
        (paths[0], paths[1], arrays[0], arrays[1]),
        (paths[2], paths[3], arrays[2], arrays[3]),
    ):
        if x.shape[1:] != (28, 28) or not len(x):
            raise _damaged(images_path, f"images of shape {list(x.shape)}", "[N, 28, 28]")
        splits.append(_Arrays(x[:, None], _labels(labels_path, y, x), 255))
    held_out = len(splits[0]) // 6
    train, validation = _cut(splits[0], len(splits[0]) - held_out, held_out)
    return _Found([train, validation, splits[1]], "unit", _describe(files, f"{folder}/raw"))


def _fashion_mnist(request: _Request) -> _Found:
    return _mnist(request, "fashion_mnist", "FashionMNIST")


def _color_mnist(request: _Request) -> _Found:
    grey = _mnist(request)
    splits = [
        _Coloured(rows, torch.rand(len(rows), 3, generator=_generator(request.seed, stream, 2)))
        for stream, rows in enumerate(grey.splits)
    ]
    return _Found(splits, "unit", f"made up from {grey.source}")


def _cifar10(request: _Request) -> _Found:
    where, (train, test) = _torchvision(
        request, "CIFAR10", "cifar-10-batches-py", [{"train": True}, {"train": False}]
    )
    rows, test_rows = (
        _Arrays(dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets), 255)
        for dataset in (train, test)
    )
    held_out = len(rows) // 10
    train_rows, validation = _cut(rows, len(rows) - held_out, held_out)
    source = f"{where.name}: the published CIFAR-10, by torchvision's checksums"
    return _Found([train_rows, validation, test_rows], "unit", source)


def _celeba(request: _Request) -> _Found:
    where, datasets = _torchvision(
        request, "CelebA", "celeba", [{"split": split} for split in ("train", "valid", "test")]
    )

    from PIL import Image

    def decode(image: Image.Image) -> np.ndarray:
        left, top = (image.width - 140) // 2, (image.height - 140) // 2
        image = image.convert("RGB").crop((left, top, left + 140, top + 140))
        image = image.resize((64, 64), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)

    splits = [_Images(dataset, decode, None, 255) for dataset in datasets]
    source = f"{where.name}: CelebA, its lists by torchvision's checksums, its images unchecked"
    return _Found(splits, "unit", source)


def _omniglot(request: _Request) -> _Found:
    where, (background, evaluation) = _torchvision(
        request, "Omniglot", "omniglot-py", [{"background": True}, {"background": False}]
    )

    def decode(image: Any) -> np.ndarray:
        return (np.asarray(image)[None] < 128).astype(np.uint8)

    first = background[len(background) - 1][1] + 1
    rows = _Images(background, decode, lambda character: character, 1)
    test = _Images(evaluation, decode, lambda character: character + first, 1)
    held_out = round(len(rows) * 1280 / 19280)
    train, validation = _cut_shuffled(rows, len(rows) - held_out, held_out)
    source = f"{where.name}: the published OMNIGLOT, its archives by torchvision's checksums"
    return _Found([train, validation, test], "binary", source)


_AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"


def _binarized_mnist(request: _Request) -> _Found:
    places = _places(request)
    names = [f"binarized_mnist_{part}.amat" for part in ("train", "valid", "test")]
    if paths := _find(places, "binarized_mnist.npz"):
        files = {path: path.read_bytes() for path in paths}
        shapes = {part: (98,) for part in ("train", "valid", "test")}
        splits = [_unpack(x) for x in _read_npz(paths[0], files[paths[0]], shapes)]
    elif paths := _find(places, *names):
        files = {path: path.read_bytes() for path in paths}
        splits = [_read_amat(path, raw) for path, raw in files.items()]
    else:
        how = f"Put {', '.join(names)} there, from {_AMAT}."
        raise _missing(request, places, "binarized_mnist.npz or .amat files", how)
    return _Found([_Arrays(x) for x in splits], "binary", _describe(files))


def _omniglot28(request: _Request) -> _Found:
    places = _places(request)
    if paths := _find(places, "chardata.mat"):
        files = {path: path.read_bytes() for path in paths}
        x, y, test_x, test_y = _read_mat(
            paths[0], files[paths[0]], ["data", "target", "testdata", "testtarget"]
        )
        splits = []
        for images, alphabets in ((x, y), (test_x, test_y)):
            images = _from_matlab(paths[0], images.T)
            splits.append(_Arrays(images, _labels(paths[0], alphabets.argmax(0), images)))
        held_out = round(len(x.T) * 1345 / 24345)
    elif paths := _find(places, "omniglot28_resized.npz"):
        files = {path: path.read_bytes() for path in paths}
        shapes = {"train": (784,), "test": (784,), "train_char": (), "test_char": ()}
        x, test_x, y, test_y = _read_npz(paths[0], files[paths[0]], shapes)
        alphabets = _alphabets(paths[0], files[paths[0]])
        splits = []
        for images, characters in ((x, y), (test_x, test_y)):
            characters = _labels(paths[0], characters, images)
            if characters.max() >= len(alphabets):
                raise _damaged(
                    paths[0], f"a character {characters.max()}", f"less than {len(alphabets)}"
                )
            splits.append(_Arrays(images.reshape(-1, 1, 28, 28), alphabets[characters], 255))
        held_out = round(len(x) * 1280 / 19280)
    else:
        how = "Put chardata.mat there, from datasets/OMNIGLOT of github.com/yburda/iwae."
        raise _missing(request, places, "chardata.mat or omniglot28_resized.npz", how)
    train, validation = _cut_shuffled(splits[0], len(splits[0]) - held_out, held_out)
    return _Found([train, validation, splits[1]], "unit", _describe(files))


def _alphabets(path: Path, raw: bytes) -> np.ndarray:
    """Return each character's alphabet, a number, from the names ``alphabet/characterNN``."""
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            names = [str(name).partition("/")[0] for name in archive["char_names"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"no 'char_names': {error}", "the characters' names") from error
    return np.unique(names, return_inverse=True)[1]


def _caltech101_silhouettes(request: _Request) -> _Found:
    places = _places(request)
    published, stand_in = (
        "caltech101_silhouettes_28_split1.mat",
        "caltech101_silhouettes_randsplit.npz",
    )
    splits = []
    if paths := _find(places, published):
        files = {path: path.read_bytes() for path in paths}
        parts = ("train", "val", "test")
        keys = [f"{part}_{what}" for part in parts for what in ("data", "labels")]
        arrays = _read_mat(paths[0], files[paths[0]], keys)
        for x, y in zip(arrays[::2], arrays[1::2], strict=True):
            x = 1 - _from_matlab(paths[0], x)  # the file has 1 for the background
            splits.append(_Arrays(x, _labels(paths[0], y, x, first=1)))
    elif paths := _find(places, stand_in):
        files = {path: path.read_bytes() for path in paths}
        shapes: dict[str, tuple[int, ...]] = {}
        for part in ("train", "valid", "test"):
            shapes |= {part: (98,), f"{part}_labels": ()}
        arrays = _read_npz(paths[0], files[paths[0]], shapes)
        for packed, y in zip(arrays[::2], arrays[1::2], strict=True):
            splits.append(_Arrays(_unpack(packed), _labels(paths[0], y, packed, first=1)))
    else:
        how = f"Put {published} there, from https://people.cs.umass.edu/~marlin/data/."
        raise _missing(request, places, f"{published} or {stand_in}", how)
    return _Found(splits, "binary", _describe(files))


def _freyfaces(request: _Request) -> _Found:
    places = _places(request)
    if paths := _find(places, "freyfaces.npz"):
        files = {path: path.read_bytes() for path in paths}
        (x,) = _read_npz(paths[0], files[paths[0]], {"x": (560,)})
    elif paths := _find(places, "frey_rawface.mat"):
        files = {path: path.read_bytes() for path in paths}
        (x,) = _read_mat(paths[0], files[paths[0]], ["ff"])
        x = x.T
    else:
        how = "Put frey_rawface.mat there, from https://cs.nyu.edu/~roweis/data.html."
        if pickled := _find(places, "freyfaces.pkl"):
            how += (
                f" {str(pickled[0])!r} is a pickle, which can run any code when it is read: it is "
                "not. Save its 1965 × 560 grey levels, 0 to 255, by "
                "numpy.savez('freyfaces.npz', x=...)."
            )
        raise _missing(request, places, "freyfaces.npz or frey_rawface.mat", how)
    if x.ndim != 2 or x.shape[1] != 560 or x.min() < 0 or x.max() > 255:
        raise _damaged(paths[0], f"images of shape {list(x.shape)}", "[N, 560] of 0 to 255")
    rows = _Arrays(x.reshape(-1, 1, 28, 20), None, 255)
    held_out = round(len(rows) * 200 / 1965)
    splits = _cut_shuffled(rows, len(rows) - 2 * held_out, held_out, held_out)
    source = _describe(files)
    if hashlib.sha256(x.astype(np.uint8).tobytes()).hexdigest() == _FREY_PIXELS:
        source = f"{paths[0].name}: the published images"
    return _Found(splits, "unit", source)


# --- Made-up sets --------------------------------------------------------------------------------


def _repeated(points: np.ndarray, kind: Kind) -> _Found:
    """Repeat a few points, each as often as the others, to 512 in each split."""
    y = np.arange(512) % len(points)
    rows = _Arrays(points[y].astype(np.float32), y)
    return _Found([rows] * 3, kind, "made up")


def _two_points(request: _Request) -> _Found:
    return _repeated(np.array([[-1.0], [1.0]]), "real")


def _four_pixels(request: _Request) -> _Found:
    return _repeated(np.eye(4).reshape(4, 1, 2, 2), "binary")


class PPCA(NamedTuple):
    """Draws of a model whose latents are known up to reflections and order.

    Attributes:
        x: Observations [N, 2].
        z: The latents that they came from [N, 2].
        W: The matrix [2, 2], with columns of norm 2 and 1.
    """

    x: Tensor
    z: Tensor
    W: Tensor


_NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": torch.nn.functional.elu,
}


def ppca_2d(num: int = 4000, nonlinearity: str = "identity", *, seed: int = 0) -> PPCA:
    r"""Draw from a model in two dimensions on which the uniqueness of latents can be seen.

    .. math:: x = \nu(W z) + 0.05\, \varepsilon, \qquad z, \varepsilon \sim N(0, I_2)

    W's entries are drawn from N(0, 1) and its columns scaled to the norms 2 and 1; with ν the
    identity, x is N(0, WWᵀ + 0.05² I). ``load("ppca_2d", seed=...)`` has the same x, in splits.

    Args:
        num: Number N of draws.
        nonlinearity: ν: ``"identity"``, ``"tanh"``, ``"sigmoid"`` or ``"elu"``.
        seed: Of W, z and ε.

    Raises:
        ValueError: For an unknown nonlinearity or a number below 1.

    References:
        | On Implicit Regularization in β-VAEs (Kumar, Poole, 2020), appendix C
        | https://arxiv.org/abs/2002.00041

    Example:
        >>> x, z, W = ppca_2d(100, "tanh")
        >>> x.shape, W.norm(dim=0)
        (torch.Size([100, 2]), tensor([2., 1.]))
    """
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(
            f"nonlinearity: found {nonlinearity!r}, expected one of {', '.join(_NONLINEARITIES)}"
        )
    if num < 1:
        raise ValueError(f"num: found {num}, expected at least 1")
    W = torch.randn(2, 2, dtype=torch.float64, generator=_generator(seed, 3))
    W = W / torch.linalg.vector_norm(W, dim=0) * torch.tensor([2.0, 1.0], dtype=torch.float64)
    z, noise = (
        torch.randn(num, 2, dtype=torch.float64, generator=_generator(seed, stream))
        for stream in (4, 5)
    )
    x = _NONLINEARITIES[nonlinearity](z @ W.T) + 0.05 * noise
    return PPCA(x.float(), z.float(), W.float())


def _ppca_2d(request: _Request) -> _Found:
    nonlinearity = request.name.removeprefix("ppca_2d").removeprefix("_") or "identity"
    x = ppca_2d(6000, nonlinearity, seed=request.seed).x
    return _Found(_cut(_Arrays(x.numpy()), 4000, 1000, 1000), "real", "made up")


# --- torchvision ---------------------------------------------------------------------------------

_operators: list[Any] = []  # definitions of operators, which last as long as their objects


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators cannot load, and return it.

    Beside a torch that it was not built for, such as one without CUDA, torchvision fails when it
    is imported, and so does what imports it, Lightning among them: it describes two operators,
    ``nms`` and ``qnms``, that are not there. Data sets and transforms use none, so it is enough to
    declare them. Where torchvision is in order, nothing is declared.

    Raises:
        ImportError: If torchvision is not installed.

    Example:
        >>> hasattr(import_torchvision().datasets, "CIFAR10")
        True
    """
    try:
        importlib.import_module("torchvision.datasets")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        _operators.append(library)
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision.datasets")
    return importlib.import_module("torchvision")


def _torchvision(
    request: _Request, kind: str, folder: str, splits: Sequence[Mapping[str, Any]]
) -> tuple[Path, list[Any]]:
    """Open a data set of torchvision; return its folder and its splits."""
    places = [request.root / request.name, request.root]
    found = next((place for place in places if (place / folder).is_dir()), None)
    if found is None and not request.download:
        how = f"Call with download=True, or put torchvision's folder {folder} there."
        raise _missing(request, places, f"folder {folder}", how)
    place = request.root if found is None else found
    make = getattr(import_torchvision().datasets, kind)
    try:
        if request.download:
            place.mkdir(parents=True, exist_ok=True)
        datasets = [make(place, download=request.download, **split) for split in splits]
    except Exception as error:  # torchvision, urllib, gdown and csv raise many kinds
        if request.download:
            raise FileNotFoundError(
                f"data set {request.name!r} could not be downloaded to {str(place)!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        raise ValueError(
            f"{str(place / folder)!r} is damaged or incomplete: {error}. Call with download=True "
            "to complete it"
        ) from error
    return place / folder, datasets


_READERS: dict[str, Callable[[_Request], _Found]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "celeba": _celeba,
    "omniglot": _omniglot,
    "binarized_mnist": _binarized_mnist,
    "omniglot28": _omniglot28,
    "caltech101_silhouettes": _caltech101_silhouettes,
    "freyfaces": _freyfaces,
    "two_points": _two_points,
    "four_pixels": _four_pixels,
    "ppca_2d": _ppca_2d,
    "ppca_2d_tanh": _ppca_2d,
    "ppca_2d_sigmoid": _ppca_2d,
    "ppca_2d_elu": _ppca_2d,
    "color_mnist": _color_mnist,
}

NAMES: tuple[str, ...] = tuple(_READERS)
