"""Markdown tables on standard output, which may grow a row at a time."""

from __future__ import annotations

from collections.abc import Iterable


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def table(header: list[str], rows: Iterable[list[str]] = ()) -> None:
    """Print an empty line, the header and the rows that there are by now."""
    print()
    row(*header)
    print("|" + "---|" * len(header), flush=True)
    for cells in rows:
        row(*cells)
