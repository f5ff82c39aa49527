"""Training: the step is torch's, a run resumes to the bit, files survive what may happen."""

from __future__ import annotations

import csv
import math
import os
import pickle
import pickletools
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_vae.train as training
from pyro_vae import NonFiniteError
from pyro_vae.checkpoint import replacing
from pyro_vae.data import load
from pyro_vae.losses import AVB_ELBO, BetaVAE_ELBO
from pyro_vae.runs import (
    Config,
    DataConfig,
    GuideConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
    build,
    open_run,
    read_config,
    write_config,
)
from pyro_vae.train import Batches, LightningELBO, exponential, train


def small(guide="gaussian", loss="BetaVAE_ELBO", options=None, data=None, **settings):
    """A configuration whose training takes a second."""
    settings = {
        "num_epochs": 3,
        "batch_size": 64,
        "validate_every": 2,
        "picture_every": 0,
        **settings,
    }
    return Config(
        model=ModelConfig(latent_dim=2, hidden_dims=[16]),
        guide=GuideConfig(guide),
        loss=LossConfig(loss, options or {}),
        data=DataConfig(train_size=256, **(data or {})),
        training=TrainingConfig(**settings),
    )


def module_of(config, x, loss=None, **kwargs):
    """A LightningELBO of fresh weights."""
    config = replace(config, model=replace(config.model, event_shape=[1, 8, 8]))
    if config.model.observation is None:
        config.model.observation = "gaussian"
    torch.manual_seed(0)
    model, guide, made = build(config)
    return LightningELBO(model, guide, loss or made, x[:2], **kwargs)


def fit_by_hand(module, x, num_steps):
    """Take steps without a Trainer, whose part is played here."""
    optimizers = module.configure_optimizers()
    module.optimizers = lambda *_: optimizers if len(optimizers) > 1 else optimizers[0]
    module.manual_backward = lambda loss: loss.backward()
    for _ in range(num_steps):
        module.training_step(x, 0)


def checkpoint_of(path):
    return torch.load(path / "last.ckpt", weights_only=True)


def log_of(path):
    return list(csv.DictReader((path / "log.csv").read_text().splitlines()))


def assert_same_run(a, b):
    """Weights, optimisers, the best weights and the log, to the bit."""
    one, two = checkpoint_of(a), checkpoint_of(b)
    assert one["num_steps_done"] == two["num_steps_done"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for mine, theirs in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        for index, state in mine["state"].items():
            for name, value in state.items():
                assert torch.equal(value, theirs["state"][index][name]), (index, name)
    for name in ("best.safetensors", "log.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture(scope="module")
def digits():
    return load("digits", train_size=256).train.x


# --- the step -------------------------------------------------------------------------------------


def test_a_step_is_that_of_torch_on_the_average_loss(digits):
    x = digits[:32]
    optim = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    module = module_of(small(), x, optim=optim, seed=3)
    before = [p.detach().clone() for p in module.parameters()]
    fit_by_hand(module, x, 1)
    after = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for param, value in zip(module.parameters(), before, strict=True):
            param.copy_(value)
    torch.manual_seed(training._seed_of(3, "step", 0, 0))
    loss = BetaVAE_ELBO().differentiable_loss(module.model, module.guide, x) / len(x)
    grads = torch.autograd.grad(loss, list(module.parameters()))
    for old, new, grad in zip(before, after, grads, strict=True):
        torch.testing.assert_close(new, old - 0.1 * grad)


def test_gradients_are_clipped_together(digits):
    optim = lambda params: torch.optim.SGD(params, lr=1.0)  # noqa: E731
    module = module_of(small(), digits, optim=optim, clip_norm=0.5)
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    fit_by_hand(module, digits, 1)
    after = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert math.isclose(float((after - before).norm()), 0.5, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("guide", "loss", "owner"),
    [
        ("implicit", AVB_ELBO(num_particles=1), lambda module: module.guide.discriminator),
        ("gaussian", None, lambda module: module.loss.divergence.discriminator),
    ],
)
def test_the_adversary_has_its_own_optimiser_and_step_ratio(digits, guide, loss, owner):
    config = small(guide, "InfoVAE_ELBO", {"lambda_": 10.0, "divergence": "Adversarial"})
    module = module_of(config, digits, loss, num_adversary_steps=3)
    ours, theirs = module.configure_optimizers()
    in_groups = lambda o: {id(p) for g in o.param_groups for p in g["params"]}  # noqa: E731
    discriminator = {id(p) for p in owner(module).parameters()}
    assert in_groups(theirs) == discriminator
    assert not in_groups(ours) & discriminator
    everything = {id(p) for p in (*module.model.parameters(), *module.guide.parameters())}
    assert in_groups(ours) == everything - discriminator
    assert theirs.param_groups[0]["betas"] == (0.5, 0.999)
    fit_by_hand(module, digits[:32], 2)
    ours, theirs = module.optimizers()
    count = lambda o: {int(state["step"]) for state in o.state.values()}  # noqa: E731
    assert count(ours) == {2}
    assert count(theirs) == {6}


def test_learning_rates_decay_exponentially(digits):
    module = module_of(small(), digits, schedule=exponential(0.01), num_steps=4)
    rates = []
    for step in range(5):
        fit_by_hand(module, digits[:32], 1)
        rates.append(module.optimizers().param_groups[0]["lr"])
        assert module.num_steps_done == step + 1
    assert rates == pytest.approx([1e-3 * 0.01 ** (k / 4) for k in range(5)])


def test_what_is_not_finite_is_named_and_leaves_the_parameters(digits):
    module = module_of(small(), digits)
    fit_by_hand(module, digits, 2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    bad = digits.clone()
    bad[3] = math.nan
    module.model.observation.check = lambda x: None
    with pytest.raises(NonFiniteError, match=r"step 2 of the loss: .*'z'"):
        module.training_step(bad, 0)
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_plain_functions_and_nonsense_are_refused(digits):
    module = module_of(small(), digits)
    with pytest.raises(ValueError, match="model must be a torch module"):
        LightningELBO(lambda x: None, module.guide, BetaVAE_ELBO(), digits[:2])
    for name in ("num_adversary_steps", "num_particles", "size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
            module_of(small(), digits, **{name: 0})
    with pytest.raises(ValueError, match="a schedule needs num_steps"):
        module_of(small(), digits, schedule=exponential(0.1))
    for param in module.parameters():
        param.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that can be trained"):
        LightningELBO(module.model, module.guide, BetaVAE_ELBO(), digits[:2])


def test_making_a_module_draws_no_number_and_moves_no_buffer(digits):
    module = module_of(small("implicit"), digits)
    random = torch.get_rng_state()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    LightningELBO(module.model, module.guide, AVB_ELBO(), digits[:2])
    assert torch.equal(torch.get_rng_state(), random)
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_epoch_shows_each_row_at_most_once_in_an_order_of_its_own():
    x = torch.arange(103)
    step = 0
    batches = Batches(x, 10, seed=1, step=lambda: step)
    assert len(batches) == 10
    first = list(batches)
    assert len(set(torch.cat(first).tolist())) == 100
    step = 3  # what is resumed goes on in the same order
    assert all(torch.equal(a, b) for a, b in zip(batches, first[3:], strict=True))
    step = 10
    assert not torch.equal(torch.cat(list(batches)), torch.cat(first))
    assert [len(batch) for batch in Batches(x, 1000)] == [103]


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_files(tmp_path):
    random = torch.get_rng_state()
    run = train(small(num_epochs=40, validate_every=10, lr=1e-2, picture_every=20), tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    rows = log_of(tmp_path)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 41))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 5
    bounds = [float(row["val_iwae"]) for row in rows if row["val_iwae"]]
    assert len(bounds) == 4
    assert bounds[-1] > bounds[0]
    assert -float(rows[-1]["val_loss"]) < bounds[-1]  # ten particles against one
    assert float(rows[-1]["lr"]) == pytest.approx(1e-2 * 0.1 ** (159 / 160))
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == [
        f"epoch_{epoch:04d}_{name}.png"
        for epoch in (20, 40)
        for name in ("latents", "reconstructions", "samples")
    ]
    assert any((tmp_path / "tensorboard").iterdir())
    assert run.model.sample(2).shape == (2, 1, 8, 8)


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize(
    "stop", [*(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 3, 8)), 4, 6]
)  # of 12 steps, 4 an epoch
@pytest.mark.parametrize(
    ("guide", "loss", "options"),
    [
        ("gaussian", "GECO_ELBO", {"tolerance": 0.2}),
        ("implicit", "BetaVAE_ELBO", {"beta": {"name": "KLSchedule", "n_epochs_kl_warmup": 3}}),
    ],
)
def test_a_run_resumes_to_the_bit_from_any_step(
    guide, loss, options, stop, tmp_path, whole_runs, monkeypatch
):
    config = small(guide, loss, options, {"binarize": "dynamic"}, checkpoint_seconds=0)
    whole = whole_runs(config)

    def step(self, x, index, original=LightningELBO.training_step):
        if self.num_steps_done == stop:
            raise InterruptionError
        original(self, x, index)

    with monkeypatch.context() as patch:
        patch.setattr(LightningELBO, "training_step", step)
        with pytest.raises(InterruptionError):
            train(config, tmp_path)
    assert checkpoint_of(tmp_path)["num_steps_done"] == stop
    train(out=tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Runs that nothing interrupted, one for each configuration."""
    known = {}

    def run(config):
        key = repr(config)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole")
            train(config, known[key])
        return known[key]

    return run


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_bit(tmp_path):
    config = small(
        "gaussian",
        "InfoVAE_ELBO",
        {"lambda_": 10.0, "divergence": "Adversarial"},
        {"binarize": "dynamic"},
        num_epochs=60,
        checkpoint_seconds=0,
    )
    train(config, tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from pyro_vae.runs import read_config\nfrom pyro_vae.train import train\n"
        "train(read_config(Path(sys.argv[1])), sys.argv[2], resume=len(sys.argv) > 3)\n"
    )
    out, chance = tmp_path / "killed", random.Random(time.time())
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "whole/config.yaml")]
    steps = []
    for attempt in range(2):
        process = subprocess.Popen([*command, str(out), *(["resume"] if attempt else [])])
        before = steps[-1] if steps else 0
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "last.ckpt").exists() and checkpoint_of(out)["num_steps_done"] > before:
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(checkpoint_of(out)["num_steps_done"])
    train(out=out, resume=True)
    print(f"killed after steps {steps} of {60 * 4}")
    assert_same_run(tmp_path / "whole", out)


def test_training_stops_when_validation_no_longer_improves(tmp_path):
    # nothing is learned: the learning rate is next to nothing
    config = small(num_epochs=50, validate_every=1, patience=2, lr=1e-12)
    train(config, tmp_path)
    rows = log_of(tmp_path)
    assert 3 <= len(rows) < 50


@pytest.mark.parametrize(
    ("guide", "loss", "expected"),
    [
        ("gaussian", "BetaVAE_ELBO", "val_iwae"),
        ("implicit", "BetaVAE_ELBO", "val_loss"),
        ("gaussian", "GRAE_ELBO", "val_loss"),  # the guide's covariance is not trained
        ("gaussian", "DVAE_ELBO", "val_loss"),
    ],
)
def test_what_is_judged_by(guide, loss, expected, tmp_path, monkeypatch):
    options = {"noise_scale": 0.1, "elbo": "GRAE_ELBO"} if loss == "DVAE_ELBO" else {}
    seen = []

    class Keep(training._Keep):
        def __init__(self, out, monitor, *args):
            seen.append(monitor)
            super().__init__(out, monitor, *args)

    monkeypatch.setattr(training, "_Keep", Keep)
    train(small(guide, loss, options, num_epochs=1), tmp_path)
    assert seen == [expected]
    (state,) = [s for s in checkpoint_of(tmp_path)["callbacks"].values() if "best" in s]
    assert math.isfinite(state["best"])


def test_iwae_of_a_learned_density_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a guide with an exact density, found Implicit"):
        train(small("implicit", monitor="iwae"), tmp_path / "run")


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precision(precision, tmp_path):
    run = train(small("flow", precision=precision, num_epochs=2), tmp_path)
    expected = torch.float64 if precision == "64-true" else torch.float32
    weights = checkpoint_of(tmp_path)["state_dict"]
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {expected}
    assert run.model.sample(1).isfinite().all()
    x = run.data().test.x[:3]
    assert x.dtype == run.model.sample(1).dtype == run.guide(x)["z"].dtype == expected
    assert open_run(tmp_path, "last").loss.loss(run.model, run.guide, x) > -math.inf


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_steps_are_plain_ones(tmp_path):
    for options in ({}, {"name": "Adversarial"}):
        extra = {"lambda_": 10.0, "divergence": options} if options else {}
        name = "InfoVAE_ELBO" if options else "BetaVAE_ELBO"
        found = {}
        for compile in (False, True):
            out = tmp_path / f"{name}_{compile}"
            train(small(loss=name, options=extra, compile=compile), out)
            found[compile] = checkpoint_of(out)["state_dict"]
        for key, value in found[False].items():
            torch.testing.assert_close(found[True][key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "loss", "options"),
    [
        ("gaussian", "InfoVAE_ELBO", {"lambda_": 10.0}),
        ("implicit", "GECO_ELBO", {"tolerance": 0.2}),
    ],
)
def test_two_processes_under_lightning(guide, loss, options, tmp_path):
    config = small(guide, loss, options, devices=2, batch_size=32, lr=1e-2, num_epochs=10)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from pyro_vae.runs import read_config\nfrom pyro_vae.train import train\n"
        "if __name__ == '__main__':\n"
        "    print(train(read_config(Path(sys.argv[1])), sys.argv[2]))\n"
    )
    write_config(config, tmp_path / "config.yaml")
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "config.yaml", out],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = log_of(out)
    assert [int(row["step"]) for row in rows] == [4 * k for k in range(1, 11)]
    losses = [float(row["loss"]) for row in rows]
    assert all(map(math.isfinite, losses))
    if loss == "InfoVAE_ELBO":  # GECO's moves with its multiplier
        assert losses[-1] < losses[0]
    else:
        assert checkpoint_of(out)["state_dict"]["loss.multipliers"] != 1
    assert open_run(out).model.sample(1).isfinite().all()


def test_a_process_imports_torchvision_before_lightning(tmp_path):
    """What a process is given is found in pyro_vae.train before anything of Lightning's."""
    config = small(devices=2)
    model = replace(config.model, event_shape=[1, 8, 8], observation="gaussian")
    config, data = replace(config, model=model), load("digits", train_size=256)
    module = training._module(config, *build(config), data)
    trainer = training._trainer(config, module, data, tmp_path, torch.device("cpu"), False)
    launcher = trainer.strategy.launcher
    given = pickletools.genops(pickle.dumps(launcher._wrapping_function))
    names = [arg for _, arg, _ in given if isinstance(arg, str) and arg in sys.modules]
    first = next(name for name in names if name not in ("builtins", "copyreg"))
    assert first == training.__name__
    assert launcher._start_method == "spawn"
    assert trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}


@pytest.mark.slow
def test_two_processes_from_the_command_line(tmp_path):
    options = {"devices": 2, "num_epochs": 1, "picture_every": 0}
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "pyro-vae", "train", "--out", tmp_path / "run"),
            *(f"--training.{name}={value}" for name, value in options.items()),
            *("--data.train_size=128", "--model.hidden_dims=[8]"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in log_of(tmp_path / "run")] == ["1"]


# --- what may happen to files ---------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    config = small(num_epochs=2, checkpoint_seconds=0)
    train(config, tmp_path / "run")
    return config, tmp_path / "run"


def test_a_run_is_not_overwritten(trained):
    config, out = trained
    before = (out / "best.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, out)
    assert (out / "best.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="holds no run to go on with"):
        train(config, out.parent / "other", resume=True)


def test_a_finished_run_can_go_on_for_longer(trained):
    config, out = trained
    longer = replace(config, training=replace(config.training, num_epochs=4))
    train(longer, out, resume=True)
    assert checkpoint_of(out)["num_steps_done"] == 16


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"hidden_dims": [16, 8]}, r"model\.hidden_dims = \[16, 8\], expected \[16\]"),
        ("training", {"lr": 0.5}, r"training\.lr = 0\.5, expected 0\.003"),
        ("training", {"batch_size": 32}, r"training\.batch_size = 32, expected 64"),
        ("data", {"train_size": 128}, r"data\.train_size = 128, expected 256"),
        ("loss", {"options": {"beta": 2.0}}, r"loss\.options\.beta = 2\.0, expected None"),
        ("guide", {"kind": "flow"}, r"guide\.kind = 'flow', expected 'gaussian'"),
    ],
)
def test_what_is_resumed_is_what_was_begun(trained, section, changes, message):
    config, out = trained
    before = {name: (out / name).read_bytes() for name in ("config.yaml", "last.ckpt")}
    other = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(ValueError, match=message):
        train(other, out, resume=True)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_another_architecture_is_named_by_its_first_mismatch(trained):
    config, out = trained

    def resume(**changes):
        stored = replace(read_config(out / "config.yaml"), **changes)
        write_config(stored, out / "config.yaml")
        train(out=out, resume=True)

    model = replace(config.model, event_shape=[1, 8, 8], observation="gaussian")
    with pytest.raises(
        ValueError, match=r"last.ckpt' is of another architecture: .*'model.decoder"
    ):
        resume(model=replace(model, hidden_dims=[16, 8]))
    with pytest.raises(ValueError, match=r"found 'model.decoder.0.0.weight' of shape \[16, 2\]"):
        resume(model=replace(model, latent_dim=3))
    with pytest.raises(ValueError, match=r"found no 'loss\.multipliers'"):
        resume(model=model, loss=LossConfig("GECO_ELBO", {"tolerance": 0.1}))


def test_a_run_that_ended_before_it_had_weights_is_not_in_the_way(tmp_path, monkeypatch):
    def step(self, x, index):
        raise InterruptionError

    with monkeypatch.context() as patch:
        patch.setattr(LightningELBO, "training_step", step)
        with pytest.raises(InterruptionError):
            train(small(lr=0.5), tmp_path)
    assert (tmp_path / "config.yaml").exists()
    train(small(lr=1e-3, num_epochs=1), tmp_path)
    assert read_config(tmp_path / "config.yaml").training.lr == 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_named(trained, share):
    _, out = trained
    for name, use in (
        ("last.ckpt", lambda: train(out=out, resume=True)),
        ("last.ckpt", lambda: open_run(out, "last")),
        ("best.safetensors", lambda: open_run(out)),
    ):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=rf"{name}' is cut short"):
            use()
        (out / name).write_bytes(content)


def test_a_full_disk_leaves_the_last_good_checkpoint(trained, monkeypatch):
    config, out = trained
    before = (out / "last.ckpt").read_bytes()

    def save(state, path, original=torch.save):
        original(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    longer = replace(config, training=replace(config.training, num_epochs=4))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match=r"last.ckpt' could not be written.*No space left"):
            train(longer, out, resume=True)
    assert (out / "last.ckpt").read_bytes() == before
    assert not list(out.glob("*.part"))
    train(longer, out, resume=True)  # once there is space again
    assert checkpoint_of(out)["num_steps_done"] == 16


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_left_as_it_was(tmp_path):
    """A limit of the system's own, met in the middle of torch.save."""
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal, sys\nfrom pathlib import Path\nimport torch\n"
        "from pyro_vae.checkpoint import replacing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n"
        "    with replacing(Path(sys.argv[1])) as path:\n"
        "        torch.save(torch.zeros(1 << 20), path)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    file = tmp_path / "file"
    file.write_bytes(b"good")
    command = [sys.executable, "-W", "ignore", str(script), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "could not be written, and is as it was before" in done.stdout, done.stderr
    assert file.read_bytes() == b"good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "script.py"]


def test_what_an_error_leaves_is_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    writing = replacing(file)
    writing.__enter__().write_text("new")
    assert not writing.__exit__(KeyError, KeyError(), None)
    assert file.read_text() == "old"
    assert not list(tmp_path.glob("*.part"))
    with replacing(file) as path:
        path.write_text("new")
    assert file.read_text() == "new"


# --- bad input ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    bad = [
        (small(loss="InfoVAE_ELBO", options={"lambda_": 5.0}, batch_size=1), "a batch of one"),
        (replace(small(), model=ModelConfig(event_shape=[1, 4, 4])), r"of shape \[1, 8, 8\]"),
        (
            replace(
                small(),
                model=ModelConfig(observation="bernoulli"),
                data=DataConfig("ppca_2d"),
            ),
            "Bernoulli takes",
        ),
        (replace(small(), model=ModelConfig("conv"), data=DataConfig("two_points")), "for images"),
        (replace(small(), data=DataConfig("two_points", binarize="dynamic")), "found 'real' data"),
    ]
    for config, message in bad:
        with pytest.raises(ValueError, match=message):
            train(config, out)
        assert not out.exists()


def test_a_batch_of_one_will_do_where_the_loss_allows_it(tmp_path):
    config = small(batch_size=1, num_epochs=1)
    train(replace(config, data=replace(config.data, train_size=3)), tmp_path)
    assert checkpoint_of(tmp_path)["num_steps_done"] == 3


def test_an_empty_split_is_refused(tmp_path, monkeypatch):
    data = load("digits")
    with pytest.raises(ValueError, match="empty"):
        replace(data, validation=type(data.validation)(data.validation.x[:0]))


@pytest.mark.parametrize(
    ("settings", "rates"),
    [({}, (1e-5, 1e-6)), ({"final_lr": 1e-5}, (1e-5, 1e-5)), ({"final_lr": 1e-7}, (1e-5, 1e-7))],
)
def test_the_rate_falls_from_lr_to_final_lr(settings, rates, digits):
    config = small(lr=1e-5, **settings)
    config = replace(
        config,
        model=replace(config.model, event_shape=[1, 8, 8], observation="gaussian"),
    )
    module = training._module(config, *build(config), load("digits", train_size=256))
    (optimizer,) = module.configure_optimizers()
    lr = optimizer.param_groups[0]["initial_lr"]
    assert (lr, lr * module.schedule(1.0)) == pytest.approx(rates)


def test_training_is_refused_on_what_lightning_would_not_use(tmp_path):
    with pytest.raises(ValueError, match="device: training runs on 'cpu' or 'cuda', found 'meta'"):
        train(small(), tmp_path / "run", device="meta")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot use 'cuda'"):
        train(small(), tmp_path / "run", device="cuda")


@pytest.mark.gpu
@pytest.mark.slow
def test_a_run_on_cuda(tmp_path):
    for loss, options in (("BetaVAE_ELBO", {}), ("InfoVAE_ELBO", {"lambda_": 10.0})):
        for compile in (False, True):
            out = tmp_path / f"{loss}_{compile}"
            run = train(small(loss=loss, options=options, compile=compile), out, device="cuda")
            assert run.model.sample(1).isfinite().all()


def test_the_last_weights_are_gecos_best(tmp_path):
    """Its multiplier changes the loss, and the bound is with a scale that it does not train."""
    config = small(loss="GECO_ELBO", options={"tolerance": 0.12})
    train(config, tmp_path / "run", progress=False)
    best, last = (
        open_run(tmp_path / "run", weights).model.state_dict() for weights in ("best", "last")
    )
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_geco_has_nothing_to_be_patient_about(tmp_path):
    config = small(loss="GECO_ELBO", options={"tolerance": 0.12}, patience=2)
    with pytest.raises(ValueError, match=r"training\.monitor 'last', GECO's default"):
        train(config, tmp_path / "run", progress=False)
