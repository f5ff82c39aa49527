"""What code that may be traced into a graph has to know: where a value is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

__all__ = ["settled"]


def settled(condition: Callable[[], Tensor | bool]) -> bool:
    """Decide a question about values; while a graph is captured, once, for the values at hand.

    For checks that raise, and for choices that no later value changes, such as whether two scales
    are the same tensor. A check that passed when a program was captured is not made again when
    its graph runs.

    Args:
        condition: Returns a boolean, or a tensor that is one.

    Example:
        >>> x = torch.ones(3)
        >>> settled(lambda: (x > 0).all())
        True
    """
    with disable_proxy_modes_tracing(), torch.no_grad():
        return bool(condition())
