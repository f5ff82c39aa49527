"""What a loss that is no sum over data points needs of the other processes, with gradients.

Data parallel training averages the gradients of the processes. That is the gradient of the joint
batch where a loss is an average over data points. Where it is not (a divergence between q(z) and
p(z), a bound on an average) each process computes the loss of the joint batch from what
:func:`gather` and :func:`average` return. Without a process group both return their argument.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["average", "gather", "num_processes"]


def num_processes() -> int:
    """Return the number of processes that train together, 1 without a process group.

    Example:
        >>> num_processes()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    r"""Put the rows of all processes together, in the order of their ranks.

    The gradient reaches the rows of every process: that of the sum of all processes' losses.

    Args:
        rows: Of this process [n, \*]; n may differ from process to process.

    Returns:
        Those of all [sum of n, \*].

    Example:
        >>> gather(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """
    return rows if num_processes() == 1 else _Gather.apply(rows)


def average(values: Tensor) -> Tensor:
    """Average a tensor over all processes, elementwise, with a gradient.

    Args:
        values: Of one shape in every process.

    Example:
        >>> average(torch.tensor(3.0))
        tensor(3.)
    """
    return values if num_processes() == 1 else _Average.apply(values)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(own) for _ in range(num_processes())]
        dist.all_gather(counts, own)
        ctx.counts = [int(count) for count in counts]
        # What is gathered has to be of one shape everywhere.
        padded = rows.new_zeros(max(ctx.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        grad = grad_output.contiguous().clone()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()]


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean_over_processes(values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return _mean_over_processes(grad_output)


def _mean_over_processes(values: Tensor) -> Tensor:
    values = values.contiguous().clone()
    dist.all_reduce(values)
    return values / num_processes()
