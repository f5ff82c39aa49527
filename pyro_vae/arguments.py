"""The arguments of model and guide: which of them a compiled program takes as inputs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from .programs import CannotCaptureError

__all__ = ["Arguments"]


class Arguments:
    """What kinds of arguments there were, and which numbers among them change.

    Args:
        model: Whose arguments they are.
    """

    def __init__(self, model: Callable) -> None:
        self.model = model
        self.numbers: set[int] = set()  # leaves that are numbers and inputs of the programs
        self.seen: list[tuple] = []
        self.warned = False
        self.names: list[str] = []
        self._kept: list[Any] = []

    def kind(self, args: tuple, kwargs: dict) -> tuple[tuple, list[Tensor]]:
        """Return what a program depends on, and the tensors that it takes."""
        leaves, structure = _flatten(args, kwargs)
        kind = self._describe(leaves, structure)
        if kind not in self.seen:
            self.names = self._names(args, kwargs)
            self._find_numbers(leaves, structure, kind)
            kind = self._describe(leaves, structure)
            if kind not in self.seen:
                self.seen.append(kind)
        if not self.numbers:
            return kind, [x.detach() for x in leaves if isinstance(x, Tensor)]
        leaves = [self._as_tensor(i, leaf) for i, leaf in enumerate(leaves)]
        return kind, [x.detach() for x in leaves if isinstance(x, Tensor)]

    def with_tensors(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the arguments with tensors in the place of numbers that change."""
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [self._as_tensor(i, leaf) for i, leaf in enumerate(leaves)]
        new_args, new_kwargs = structure.unflatten(leaves)
        return new_args, new_kwargs

    def _as_tensor(self, index: int, leaf: Any) -> Any:
        if index not in self.numbers or not isinstance(leaf, float):
            return leaf
        return torch.tensor(leaf, dtype=torch.float64, device="cpu")

    def _describe(self, leaves: Sequence[Any], structure: Any) -> tuple:
        described: list[Any] = [structure]
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                described.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
            elif index in self.numbers and isinstance(leaf, float):
                described.append(float)
            else:
                described.append((type(leaf), self._identity(leaf)))
        return tuple(described)

    def _identity(self, leaf: Any) -> Any:
        if isinstance(leaf, (bool, int, float, str, bytes, type(None))):
            return leaf
        if not isinstance(leaf, (nn.Module, types.FunctionType, torch.dtype, torch.device)):
            raise CannotCaptureError(
                f"an argument is a {type(leaf).__name__}, whose content may change unseen; "
                "tensors, numbers, strings, modules and functions can be captured"
            )
        if not any(leaf is kept for kept in self._kept):
            self._kept.append(leaf)  # or its id be another's
        return id(leaf)

    def _find_numbers(self, leaves: Sequence[Any], structure: Any, kind: tuple) -> None:
        """Find floats that differ from those seen, where nothing else does."""
        for other in self.seen:
            if other[0] != structure:
                continue
            changed = [
                i for i, (a, b) in enumerate(zip(kind[1:], other[1:], strict=True)) if a != b
            ]
            if all(isinstance(leaves[i], float) for i in changed):
                self.numbers.update(changed)
                self.seen = []
                return

    def _names(self, args: tuple, kwargs: dict) -> list[str]:
        """Name the leaves of the arguments, those by position as the model does."""
        try:
            signature = inspect.signature(getattr(self.model, "forward", self.model))
            parameters = list(signature.parameters)
        except (TypeError, ValueError):
            parameters = []
        names = []
        for path, _ in tree_flatten_with_path((args, kwargs))[0]:
            position = getattr(path[1], "idx", None)
            if position is None:
                name = f"argument {getattr(path[1], 'key', path[1])!r}"
            elif position < len(parameters):
                name = f"argument {parameters[position]!r}"
            else:
                name = f"positional argument {position}"
            names.append(name + keystr(path[2:]))
        return names

    def changing(self, kinds: list[tuple], kind: tuple) -> str:
        """Say which arguments have had several shapes or values."""
        found = []
        for i, own in enumerate(kind[1:], 1):
            others = [k[i] for k in kinds if len(k) == len(kind)]
            values = list(dict.fromkeys([*others, own]))
            if len(values) > 1:
                shown = [list(v[0]) if isinstance(v[0], torch.Size) else v[-1] for v in values]
                what = "shape" if isinstance(own[0], torch.Size) else "value"
                found.append(
                    f"the {what} of {self.names[i - 1]} changes: {shown[0]}, {shown[1]}, …"
                )
        return "; ".join(found)


def _flatten(args: tuple, kwargs: dict) -> tuple[Sequence[Any], Any]:
    """Return leaves and structure, the usual ones without looking into them."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return args, len(args)
    return tree_flatten((args, kwargs))
