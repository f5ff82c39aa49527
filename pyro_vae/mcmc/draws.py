"""Where the draws are kept: in memory, or in files that are mapped into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .kernel import HMCInfo, HMCState

__all__ = ["Draws", "available_bytes", "peak_bytes"]

# Iterations that are written at once, since one by one is slow, and the most memory that they take.
_BLOCK = 64
_BLOCK_BYTES = 1 << 24


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory a device has left, or ``None`` where nothing tells."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        return None


def peak_bytes(graph: fx.GraphModule, *inputs: Tensor) -> int:
    """Return how much memory a graph holds at most, run operation by operation."""
    order = list(graph.graph.nodes)
    last = {node: i for i, user in enumerate(order) for node in user.all_input_nodes}
    sizes: dict[fx.Node, int] = {}

    class Sizes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, Tensor) and node.op == "call_function":
                sizes[node] = value.numel() * value.element_size()
            return value

    Sizes(graph).run(*inputs)
    held = peak = 0
    for i, node in enumerate(order):
        held += sizes.get(node, 0)
        peak = max(peak, held)
        held -= sum(sizes.get(used, 0) for used in node.all_input_nodes if last[used] == i)
    return peak


class Draws:
    r"""Everything recorded while sampling, each [num_samples, num_chains, \*shape].

    Args:
        num_samples: Draws kept of a chain.
        state: A state of the chains.
        sites: Function from positions [n, dim] to the values [n, \*shape] of the sites that are
            kept instead of the positions.
        directory: Where the files lie that hold the draws, as raw numbers; by default there are
            none, and they lie in memory, on the device of the chains.

    Attributes:
        values: The values of ``sites`` by name, or the positions under the name ``""``.
        stats: ``potential``, ``energy``, ``accept_prob``, ``accepted``, ``diverging``
            [num_samples, num_chains], ``num_steps`` [num_samples, 1 or num_chains]. Both lag behind
            ``count`` until `flush`.
    """

    FIELDS = (
        "position",
        "potential",
        "energy",
        "accept_prob",
        "accepted",
        "diverging",
        "num_steps",
    )

    def __init__(
        self,
        num_samples: int,
        state: HMCState,
        sites: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._sites = sites
        self._pending: list[tuple[Tensor | int, ...]] = []
        self._written = 0
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

        def empty(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
            shape = (num_samples, *shape)
            if directory is None:
                return like.new_empty(shape)
            size = torch.Size(shape).numel()
            path = str(directory / f"{name or 'unconstrained'}.bin")
            flat = torch.from_file(path, shared=True, size=size, dtype=like.dtype)
            return flat.reshape(shape)

        chains, potential = len(state.position), state.potential
        one = state.position[:1]
        rows = {"": one} if sites is None else sites(one)
        self.values = {
            name: empty(name, (chains, *row.shape[1:]), row) for name, row in rows.items()
        }
        size = self.bytes_per_draw(state, rows) + state.position.nbytes
        self._block = max(1, min(_BLOCK, _BLOCK_BYTES // size))
        flag = potential.new_empty((), dtype=torch.bool)
        self.stats = {
            "potential": empty("potential", (chains,), potential),
            "energy": empty("energy", (chains,), potential),
            "accept_prob": empty("accept_prob", (chains,), potential),
            "accepted": empty("accepted", (chains,), flag),
            "diverging": empty("diverging", (chains,), flag),
            "num_steps": torch.empty(num_samples, 1, dtype=torch.int64),
        }

    @classmethod
    def of_chains(
        cls,
        draws: Mapping[str, Tensor],
        sites: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
        directory: Path | None = None,
    ) -> Draws:
        r"""Take over what another sampler has drawn.

        Args:
            draws: The fields ``FIELDS``, ``position`` [num_chains, num_samples, dim] and the others
                [num_chains, num_samples].
            sites: As for the class.
            directory: As for the class.
        """
        position = draws["position"]
        first = HMCState(position[:, 0], draws["potential"][:, 0], position[:, 0])
        result = cls(position.shape[1], first, sites, directory)
        rows = {"": position} if sites is None else sites(position.flatten(0, 1))
        for name, row in rows.items():
            chains = row if sites is None else row.unflatten(0, position.shape[:2])
            result.values[name].copy_(chains.transpose(0, 1))
        for name in cls.FIELDS[1:-1]:
            result.stats[name].copy_(draws[name].t())
        result.stats["num_steps"] = draws["num_steps"].t()  # here each chain has its own
        result._written = position.shape[1]
        return result

    @property
    def count(self) -> int:
        """Number of draws so far."""
        return self._written + len(self._pending)

    @staticmethod
    def bytes_per_draw(state: HMCState, values: Mapping[str, Tensor]) -> int:
        """Return the size of one draw of all chains whose rows are ``values`` [1, *shape]."""
        row = sum(value.numel() * value.element_size() for value in values.values())
        return len(state.position) * (row + 3 * state.potential.element_size() + 2)

    def append(self, state: HMCState, info: HMCInfo) -> None:
        """Take in the state after a transition."""
        self._pending.append(
            (
                state.position,
                state.potential,
                info.energy,
                info.accept_prob,
                info.accepted,
                info.diverging,
                info.num_steps,
            )
        )
        if len(self._pending) >= self._block:
            self.flush()

    def flush(self) -> None:
        """Write what was taken in."""
        if not self._pending:
            return
        position, *stats, num_steps = zip(*self._pending, strict=True)
        rows = slice(self._written, self.count)
        positions = torch.stack(position)
        if self._sites is None:
            self.values[""][rows] = positions
        else:
            for name, values in self._sites(positions.flatten(0, 1)).items():
                self.values[name][rows] = values.unflatten(0, positions.shape[:2])
        for name, column in zip(self.FIELDS[1:-1], stats, strict=True):
            self.stats[name][rows] = torch.stack(column)
        self.stats["num_steps"][rows, 0] = torch.tensor(num_steps)
        self._written, self._pending = rows.stop, []

    def thinned(self, num: int) -> Tensor:
        """Return about ``num`` of the draws so far, evenly spaced, [num_chains, num, dim]."""
        self.flush()
        rows = slice(0, self.count, max(1, self.count // num))
        parts = [value[rows].flatten(2) for value in self.values.values()]
        return torch.cat(parts, dim=-1).transpose(0, 1)

    def finish(self) -> None:
        """Cut off what an interrupt left empty."""
        self.flush()
        self.values = {name: value[: self.count] for name, value in self.values.items()}
        self.stats = {name: value[: self.count] for name, value in self.stats.items()}
