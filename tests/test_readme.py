"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_vae.cli import main

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[-2][:30])
def test_example(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one of them saves a picture
    if "open_run" in example:  # what the commands above it have made
        assert main(["train", "--training.num_epochs", "1", "--out", "out/digits"]) == 0
    scope: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, str(README), "exec"), scope)
    if "mcmc" in scope:
        assert scope["mcmc"].check().passed
    elif "run" in scope:
        assert scope["x_hat"].shape == (300, 1, 8, 8)
    elif "comparison" not in scope:
        losses = scope["result"].losses if "result" in scope else torch.tensor(scope["losses"])
        assert losses[-50:].mean() < losses[:50].mean()
