"""The state of a training in a file, from which it goes on as if it had not been interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .player import Player, Surroundings

__all__ = ["Checkpoint", "replacing"]

FORMAT = 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a place beside a file to write to; what is written there then takes its place.

    A full disk or an interruption leaves the file as it was.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be written, with the file's name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "file.txt"
        ...     with replacing(path) as partial_path:
        ...         _ = partial_path.write_text("whole")
        ...     path.read_text()
        'whole'
    """
    partial_path = path.with_name(path.name + ".part")
    try:
        yield partial_path
        with partial_path.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name of a file without content
        os.replace(partial_path, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError of a full disk
        raise OSError(
            f"{str(path)!r} could not be written, and is as it was before: {error}"
        ) from error
    finally:
        with suppress(OSError):
            partial_path.unlink(missing_ok=True)


class Checkpoint:
    """A file with all that decides how a training goes on.

    Parameters, their averages, optimisers, buffers of loss, model and guide, random number
    generators, and the record of the losses. It is written beside its place and moved there, so
    that a full disk or an interruption leaves the last good one; it is read with ``weights_only``,
    so that a stranger's file runs no code.

    Args:
        path: The file.
        players: By name, the players of the training.
        loss: The loss, whose own state is kept.
    """

    def __init__(
        self, path: str | os.PathLike[str], players: Mapping[str, Player], loss: Any
    ) -> None:
        self.path = Path(path)
        self.players = players
        self.loss = loss

    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.path.exists()

    def save(self, record: Any, extra: dict[str, Any]) -> None:
        """Write the state after a step, with what else the training has to remember."""
        state = {
            "format": FORMAT,
            "record": dict(vars(record)),
            "extra": extra,
            "players": {name: self._state(player) for name, player in self.players.items()},
            "buffers": [
                (type(module).__name__, key, value.detach())
                for module, key, value in self._buffers()
            ],
            "random": torch.get_rng_state(),
            "random_cuda": (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []),
        }
        with replacing(self.path) as partial_path:
            torch.save(state, partial_path)

    def load(self, args: tuple, kwargs: dict, record: Any) -> dict[str, Any]:
        """Read the state, put it into players, loss and record, and return what else was saved.

        Raises:
            ValueError: If the file is damaged, or of another training.
        """
        try:
            state = torch.load(self.path, weights_only=True)
            if state["format"] != FORMAT:
                raise ValueError(f"found the format {state['format']}, expected {FORMAT}")
        except Exception as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r}: found a file that is damaged or no checkpoint "
                f"({type(error).__name__}: {error}); remove it to start anew"
            ) from error
        steps = len(state["record"]["losses"])
        if steps != len(record.losses):
            raise self._other(f"a training of {steps} steps", f"num_steps={len(record.losses)}")
        if set(state["players"]) != set(self.players):
            raise self._other(f"the players {sorted(state['players'])}", str(sorted(self.players)))
        for name, player in self.players.items():
            player.meet(args, kwargs)
            self._restore(name, player, state["players"][name])
        buffers = self._buffers()
        if len(buffers) != len(state["buffers"]):
            raise self._other(f"{len(state['buffers'])} buffers", str(len(buffers)))
        for (module, key, old), saved in zip(buffers, state["buffers"], strict=True):
            kind, name, value = saved
            if (type(module).__name__, key, old.shape) != (kind, name, value.shape):
                raise self._other(
                    f"a buffer {name!r} of {kind}, {list(value.shape)}",
                    f"{key!r} of {type(module).__name__}, {list(old.shape)}",
                )
            module._buffers[key] = value.to(old.device)
        vars(record).update(state["record"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        extra: dict[str, Any] = state["extra"]
        return extra

    def _other(self, found: str, expected: str) -> ValueError:
        return ValueError(
            f"checkpoint {str(self.path)!r} is of another training: found {found}, expected "
            f"{expected}; remove it to start anew"
        )

    @staticmethod
    def _state(player: Player) -> dict[str, Any]:
        entries = player.optimizers.entries(list(player.params))
        return {
            "params": [param.detach() for param in player.params],
            "means": [mean.detach() for mean in player.params.values()],
            "optimizers": [dict(entry.optimizer.state[entry.param]) for entry in entries],
            "rates": [player.base_rate(entry.group) for entry in entries],
            "num_steps": player.num_steps,
        }

    @torch.no_grad()
    def _restore(self, name: str, player: Player, state: dict[str, Any]) -> None:
        found = [list(value.shape) for value in state["params"]]
        expected = [list(param.shape) for param in player.params]
        if found != expected:
            raise self._other(f"parameters of the shapes {found} under {name}", str(expected))
        entries = player.optimizers.entries(list(player.params))
        rows = zip(
            entries,
            state["params"],
            state["means"],
            state["optimizers"],
            state["rates"],
            strict=True,
        )
        for entry, value, mean, slots, rate in rows:
            entry.param.copy_(value)
            if player.average:
                player.params[entry.param].copy_(mean)
            device = entry.param.device
            entry.optimizer.state[entry.param] = {
                key: x.to(device) if isinstance(x, Tensor) and key != "step" else x
                for key, x in slots.items()
            }
            player.set_base_rate(entry.group, rate)
        player.set_num_steps(state["num_steps"])

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        player = next(iter(self.players.values()))
        surroundings = Surroundings(player.model, player.guide, self.loss)
        return [
            (module, key, value)
            for module in surroundings.modules
            for key, value in module._buffers.items()
            if value is not None
        ]
