"""How many threads small problems get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread_if_small"]

# An operation over fewer numbers than this spends longer waiting for other threads than computing.
SMALL = 1 << 17


@contextmanager
def one_thread_if_small(size: int, device: torch.device) -> Iterator[None]:
    """Run a block on one thread of the CPU if its operations are small; put the number back.

    Args:
        size: How many numbers a typical operation is over.
        device: Where they lie; another device than the CPU is left alone.

    Example:
        >>> before = torch.get_num_threads()
        >>> with one_thread_if_small(100, torch.device("cpu")):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and size <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
