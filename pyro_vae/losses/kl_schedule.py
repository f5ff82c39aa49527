"""The KL's weight over the steps or epochs, as state of a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["KLSchedule"]


class KLSchedule(nn.Module):
    r"""Raise the KL's weight from one value to another: constant, linear or in cycles.

    .. math:: \beta_t = \beta_{min} + (\beta_{max} - \beta_{min}) \min(1, (t \bmod c) / w)

    for a warm-up of w and cycles of c steps or epochs. t is a buffer: it is saved with the loss
    and restored.

    Args:
        n_steps_kl_warmup: w in steps, which the loss counts.
        n_epochs_kl_warmup: w in epochs, which you count: call :meth:`epoch` after each. With
            neither, β is ``max_kl_weight`` throughout.
        min_kl_weight: β at the start of the warm-up.
        max_kl_weight: β at its end.
        cycle: c, in the warm-up's unit; without it there is one warm-up.

    Raises:
        ValueError: For both warm-ups at once, one that is not positive, a cycle shorter than it, or
            a negative weight.

    References:
        | Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing
        | (Fu et al., 2019)
        | https://arxiv.org/abs/1903.10145

    Example:
        >>> schedule = KLSchedule(n_steps_kl_warmup=4, cycle=6)
        >>> weights = []
        >>> for step in range(8):
        ...     weights.append(float(schedule.weight))
        ...     schedule.step()
        >>> weights
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.0, 0.25]
    """

    count: Tensor

    def __init__(
        self,
        n_steps_kl_warmup: int | None = None,
        n_epochs_kl_warmup: int | None = None,
        *,
        min_kl_weight: float = 0.0,
        max_kl_weight: float = 1.0,
        cycle: int | None = None,
    ) -> None:
        super().__init__()
        if n_steps_kl_warmup is not None and n_epochs_kl_warmup is not None:
            raise ValueError(
                "expected n_steps_kl_warmup or n_epochs_kl_warmup, found both: "
                f"{n_steps_kl_warmup} and {n_epochs_kl_warmup}"
            )
        self.by_epoch = n_epochs_kl_warmup is not None
        warmup = n_epochs_kl_warmup if self.by_epoch else n_steps_kl_warmup
        if warmup is not None and warmup < 1:
            raise ValueError(f"the KL warm-up must be at least 1 long, found {warmup}")
        if cycle is not None and (warmup is None or cycle < warmup):
            raise ValueError(f"cycle must be no shorter than the warm-up {warmup}, found {cycle}")
        for name, weight in (("min_kl_weight", min_kl_weight), ("max_kl_weight", max_kl_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, found {weight}")
        self.warmup = warmup
        self.cycle = cycle
        self.min_kl_weight = min_kl_weight
        self.max_kl_weight = max_kl_weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> Tensor:
        """β now, a scalar."""
        top = torch.tensor(self.max_kl_weight, dtype=torch.float64, device=self.count.device)
        if self.warmup is None:
            return top
        count = self.count if self.cycle is None else self.count % self.cycle
        progress = (count.double() / self.warmup).clamp(max=1)
        return self.min_kl_weight + (top - self.min_kl_weight) * progress

    def step(self) -> None:
        """Count a step; the loss does it."""
        if not self.by_epoch:
            self.count = self.count + 1

    def epoch(self) -> None:
        """Count an epoch."""
        if self.by_epoch:
            self.count = self.count + 1

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        unit = "epochs" if self.by_epoch else "steps"
        return (
            f"warmup={self.warmup} {unit}, cycle={self.cycle}, "
            f"min_kl_weight={self.min_kl_weight}, max_kl_weight={self.max_kl_weight}"
        )
