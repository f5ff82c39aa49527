"""The time of a training step under Lightning, beside hand-written PyTorch's and Pyro's.

    python tests/benchmarks/train.py [--rounds N] [--seconds S] [--threads N]

A VAE 784-500-500-20 on binary images, batches of 128, Adam at 1e-3. The sides:

*Lightning*: `pyro_vae.train.LightningELBO`, compiled, in a `Trainer` with the callbacks and logs
that `pyro_vae.train.train` gives it; noise seeded for each step, a look at loss and gradients. The
time is that from one batch to the next.

*pyro_vae.SVI*: the same, compiled.

*by hand*: the loss under `torch.compile`, forward and backward, and a fused Adam: that of `svi.py`.

*Pyro*: a loop over `pyro.infer.SVI.step`: that of `svi.py`.

*pythae*: a step of its `BaseTrainer` in an epoch of 20, on its `VAE` with the same layers, if it is
installed. Its trainer evaluates, logs and checkpoints besides, which is not counted.

All sides are in one process and take turns, a burst of `--seconds` each, for `--rounds` rounds;
the others' bursts run while Lightning waits for its next batch. Times are medians of the rounds,
ratios medians of the ratios within a round. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TQDM_DISABLE", "1")  # pythae's bars

import pyro
import torch
from svi import (
    BATCH,
    HIDDEN,
    LATENTS,
    PIXELS,
    Burst,
    compiled_vae,
    random_pixels,
    repeat,
    row,
    table,
    vae_burst,
)
from torch import Tensor, nn

import pyro_vae
from pyro_vae.runs import Config, DataConfig, ModelConfig, TrainingConfig, build
from pyro_vae.train import LightningELBO, _Keep, _quiet

LOSS = "BetaVAE_ELBO"
WARMUP_STEPS = 20
PYTHAE_EPOCH = 20  # steps
MANY = 1_000_000  # batches, as Lightning is told


def pythae_burst() -> Burst:
    """Return bursts of pythae's training steps, whole epochs."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            widths = [PIXELS, HIDDEN, HIDDEN]
            self.body = nn.Sequential(
                nn.Linear(widths[0], widths[1]), nn.ELU(), nn.Linear(widths[1], widths[2])
            )
            self.loc, self.log_var = nn.Linear(HIDDEN, LATENTS), nn.Linear(HIDDEN, LATENTS)

        def forward(self, x: Tensor) -> ModelOutput:
            h = self.body(x)
            return ModelOutput(embedding=self.loc(h), log_covariance=self.log_var(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(LATENTS, HIDDEN),
                nn.ELU(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.ELU(),
                nn.Linear(HIDDEN, PIXELS),
                nn.Sigmoid(),
            )

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.body(z))

    config = VAEConfig(input_dim=(PIXELS,), latent_dim=LATENTS, reconstruction_loss="bce")
    x = random_pixels().repeat(PYTHAE_EPOCH, 1)
    dataset = BaseDataset(x, torch.zeros(len(x)))
    with tempfile.TemporaryDirectory() as directory:
        settings = BaseTrainerConfig(
            output_dir=directory,
            num_epochs=1,
            learning_rate=1e-3,
            per_device_train_batch_size=BATCH,
            no_cuda=True,
        )
        trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), dataset, None, settings)
    trainer.prepare_training()
    epochs = repeat(lambda: trainer.train_step(epoch=1))
    return lambda num_steps: epochs(num_steps // PYTHAE_EPOCH)


def sides() -> dict[str, Burst]:
    """Return what takes turns with Lightning."""
    found = {
        "pyro_vae.SVI": vae_burst(pyro_vae.SVI, LOSS),
        "PyTorch by hand, torch.compile": compiled_vae(LOSS),
        "pyro.infer.SVI": vae_burst(pyro.infer.SVI, LOSS),
    }
    try:
        found["pythae"] = pythae_burst()
    except ImportError as error:
        print(f"pythae is not measured: {error}")
    return found


class Turns:
    """Batches for Lightning; between its bursts the other sides have theirs."""

    def __init__(self, rounds: int, seconds: float) -> None:
        self.rounds, self.seconds = rounds, seconds
        self.times: dict[str, list[float]] = {"Lightning": []}

    def __len__(self) -> int:
        return MANY

    def __iter__(self) -> Iterator[Tensor]:
        x = random_pixels()
        yield from [x] * WARMUP_STEPS  # captured and compiled at the first
        started = time.perf_counter()
        yield from [x] * 5
        num_own = self._count((time.perf_counter() - started) / 5)
        others = sides()
        counts = {}
        for name, burst in others.items():
            burst(WARMUP_STEPS)
            started = time.perf_counter()
            unit = PYTHAE_EPOCH if name == "pythae" else 5
            burst(unit)
            steps = self._count((time.perf_counter() - started) / unit)
            counts[name] = -(-steps // unit) * unit
            self.times[name] = []
        for _ in range(self.rounds):
            started = time.perf_counter()
            yield from [x] * num_own
            self.times["Lightning"].append((time.perf_counter() - started) / num_own)
            for name, burst in others.items():
                started = time.perf_counter()
                burst(counts[name])
                self.times[name].append((time.perf_counter() - started) / counts[name])

    def _count(self, seconds: float) -> int:
        return max(round(self.seconds / seconds), 1)


def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of a step, by side and round."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    config = Config(
        model=ModelConfig(
            latent_dim=LATENTS,
            hidden_dims=[HIDDEN, HIDDEN],
            observation="bernoulli",
            event_shape=[PIXELS],
        ),
        data=DataConfig("binarized_mnist"),
        training=TrainingConfig(batch_size=BATCH, lr=1e-3),
    )
    model, guide, loss = build(config)
    module = LightningELBO(model, guide, loss, random_pixels()[:2], compile=True)
    turns = Turns(rounds, seconds)
    with tempfile.TemporaryDirectory() as directory, _quiet():
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=TensorBoardLogger(directory),
            callbacks=[_Keep(Path(directory), "val_loss", "min", 3600.0)],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=20,
        )
        trainer.fit(module, turns)
    return turns.times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a side in a round")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    for option in ("rounds", "threads"):
        if getattr(options, option) < 1:
            raise SystemExit(f"--{option}: found {getattr(options, option)}; expected at least 1")
    torch.set_num_threads(options.threads)
    cores, threads = os.cpu_count(), torch.get_num_threads()
    print(f"{cores} cores, {threads} torch threads, load {os.getloadavg()[0]:.1f} at the start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = measure(options.rounds, options.seconds)
    table(["side", "step, ms", "Lightning's step is", "SVI's step is"])
    for name, found in times.items():
        ratios = []
        for ours in ("Lightning", "pyro_vae.SVI"):
            ratio = statistics.median(a / b for a, b in zip(times[ours], found, strict=True))
            ratios.append("" if ours == name else f"{ratio:.2f}×")
        row(name, f"{1e3 * statistics.median(found):,.2f}", *ratios)


if __name__ == "__main__":
    main()
