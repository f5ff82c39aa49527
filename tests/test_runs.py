"""Runs: configurations and back, everything that can be named, and files of strangers."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import pytest
import torch
import yaml

from pyro_vae import runs
from pyro_vae.data import load
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
)

SMALL = ModelConfig(
    latent_dim=2, hidden_dims=[8], hidden_channels=[4, 4], observation="gaussian",
    event_shape=[1, 8, 8],
)  # fmt: skip

# Each loss with the options that it needs, and some that are objects.
LOSSES = {
    "BetaVAE_ELBO": {"beta": {"name": "KLSchedule", "n_steps_kl_warmup": 10}, "free_bits": 0.1},
    "InfoVAE_ELBO": {
        "alpha": 0,
        "lambda_": 10,
        "divergence": {"name": "Stein", "kernel": "imq"},
    },
    "GECO_ELBO": {
        "constraint": {"name": "PatchCrossCorrelation", "patch_size": 3, "tolerance": 0.5}
    },
    "IWAE_ELBO": {"num_particles": 3, "doubly_reparameterized": True},
    "DVAE_ELBO": {"noise_scale": 0.1, "elbo": {"name": "DVAE_ELBO", "noise_scale": 0.1}},
    "GRAE_ELBO": {"curvature": "columns", "num_columns": 1},
    "Taylor_ELBO": {"curvature": "gauss-newton"},
    "AVB_ELBO": {"num_particles": 1},
}


def saved(path, config=None):
    """A run with fresh weights, as if it had been trained."""
    config = config or Config(model=SMALL)
    model, guide, loss = build(config)
    path.mkdir(exist_ok=True)
    runs.write_config(config, path / "config.yaml")
    weights = runs.weights_of(model, guide, loss)
    runs.save_weights(weights, path / "best.safetensors")
    torch.save({"state_dict": weights}, path / "last.ckpt")
    return weights


# --- what can be named ----------------------------------------------------------------------------


def test_every_loss_can_be_named():
    assert set(LOSSES) == set(runs.LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_with_options_that_are_objects(name):
    config = Config(model=SMALL, loss=LossConfig(name, LOSSES[name]))
    model, guide, loss = build(config)
    assert type(loss).__name__ == name
    value = loss.differentiable_loss(model, guide, load("digits").train.x[:8])
    value.backward()
    assert value.isfinite()


def test_several_constraints_by_name():
    options = {
        "constraint": {
            "error": {"name": "ReconstructionError", "tolerance": 0.1},
            "patches": {"name": "PatchCrossCorrelation", "tolerance": 0.5, "patch_size": 3},
        }
    }
    loss = build(Config(model=SMALL, loss=LossConfig("GECO_ELBO", options)))[2]
    kinds = {name: type(constraint).__name__ for name, constraint in loss.constraints.items()}
    assert kinds == {"error": "ReconstructionError", "patches": "PatchCrossCorrelation"}
    assert loss.multipliers.shape == (2,)
    assert loss.constraints["patches"].tolerance == 0.5


def test_a_discriminator_is_made_for_the_latents():
    config = Config(model=SMALL, loss=LossConfig("InfoVAE_ELBO", {"divergence": "Adversarial"}))
    divergence = build(config)[2].divergence
    assert divergence(torch.randn(3, 2), torch.randn(3, 2)) == 0
    options = {"divergence": {"name": "Adversarial", "discriminator": {
        "name": "ResidualDiscriminator", "hidden_dim": 5}}}  # fmt: skip
    config = Config(model=SMALL, loss=LossConfig("InfoVAE_ELBO", options))
    assert build(config)[2].divergence.discriminator.inputs.weight.shape == (5, 2)


@pytest.mark.parametrize("architecture", ["mlp", "conv", "pixelcnn", "grae_mnist"])
@pytest.mark.parametrize("guide", ["gaussian", "full", "flow", "implicit"])
def test_architectures_and_guides(architecture, guide):
    shape = [1, 28, 28] if architecture == "grae_mnist" else [1, 8, 8]
    model = replace(SMALL, architecture=architecture, event_shape=shape, observation="bernoulli")
    chosen = GuideConfig("gaussian", covariance="full") if guide == "full" else GuideConfig(guide)
    model, guide, loss = build(Config(model=model, guide=chosen))
    x = torch.rand(4, *shape).round()
    loss.differentiable_loss(model, guide, x).backward()
    grads = [p.grad is not None for p in (*model.parameters(), *guide.parameters())]
    frozen = 0 if chosen.kind != "implicit" else len(list(guide.discriminator.parameters()))
    assert sum(not has for has in grads) == frozen
    assert model.sample(2).shape == (2, *shape)


@pytest.mark.parametrize("noise", ["features", "input", "basis"])
@pytest.mark.parametrize("shape", [[1, 8, 8], [64]])
def test_noise_of_an_implicit_guide(noise, shape):
    model = replace(SMALL, event_shape=shape)
    guide = GuideConfig("implicit", noise=noise)
    model, guide, loss = build(Config(model=model, guide=guide))
    loss.differentiable_loss(model, guide, torch.rand(4, *shape)).backward()
    z = guide(torch.rand(1, *shape).expand(9, *shape))["z"]
    assert z.shape == (9, 2)
    assert (z.std(0) > 0).all()


@pytest.mark.parametrize("architecture", ["conv", "pixelcnn", "grae_mnist"])
def test_noise_at_the_input_of_a_convolution_is_refused(architecture):
    shape = [1, 28, 28] if architecture == "grae_mnist" else [1, 8, 8]
    model = replace(SMALL, architecture=architecture, event_shape=shape)
    with pytest.raises(ValueError, match=r"guide\.noise 'input'.*expected 'mlp'"):
        build(Config(model=model, guide=GuideConfig("implicit", noise="input")))


@pytest.mark.parametrize(
    ("observation", "scale", "data", "expected"),
    [
        (None, "learned", DataConfig(), "Gaussian"),
        (None, "learned", DataConfig(binarize="dynamic"), "Bernoulli"),
        (None, "learned", DataConfig(binarize="threshold"), "Bernoulli"),
        (None, 0.1, DataConfig("ppca_2d"), "Gaussian"),
        ("continuous_bernoulli", "learned", DataConfig(), "ContinuousBernoulli"),
        ("discretized_logistic", "pixel", DataConfig(), "DiscretizedLogistic"),
    ],
)
def test_observations(observation, scale, data, expected):
    levels = 17 if observation == "discretized_logistic" else 256
    model = ModelConfig(hidden_dims=[8], observation=observation, scale=scale, levels=levels)
    found = runs.load_data(data)
    config = runs.settle(Config(model=model, data=data), found)
    made, _, _ = build(config)
    assert type(made.observation).__name__ == expected
    assert made.event_shape == found.event_shape
    runs.check_data(made, found)
    if expected == "Gaussian":
        assert made.observation.scale == scale


# --- configurations -------------------------------------------------------------------------------


def test_a_configuration_is_written_and_read(tmp_path):
    config = Config(
        model=replace(SMALL, scale="pixel"),
        guide=GuideConfig("flow", hidden_dims=[5]),
        loss=LossConfig("InfoVAE_ELBO", LOSSES["InfoVAE_ELBO"]),
        data=DataConfig(train_size=100, binarize="sample"),
        training=TrainingConfig(lr=1e-4, final_lr=None, compile=True, patience=3),
    )
    runs.write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert read_config(tmp_path / "config.yaml").to_dict() == config.to_dict()
    (tmp_path / "config.yaml").write_text("")
    assert read_config(tmp_path / "config.yaml") == Config()
    (tmp_path / "config.yaml").write_text("training: {lr: 1e-4}")  # a word, in YAML
    assert read_config(tmp_path / "config.yaml").training.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "'modle' is unknown: did you mean 'model'"),
        ("model: {latentdim: 3}", "'model.latentdim' is unknown: did you mean 'model.latent_dim'"),
        ("model: mlp", "'model': expected a mapping, found str"),
        ("- a", "the config: expected a mapping, found list"),
        ("model: {latent_dim: x}", "model.latent_dim.*int"),
        ("model: {architecture: mpl}", "model.architecture"),
        ("training: {num_epochs: 0}", "training.num_epochs must be at least 1, found 0"),
        ("training: {lr: 0}", "training.lr must be positive, found 0"),
        ("training: {seed: -1}", "training.seed must not be negative, found -1"),
        ("training: {devices: 2, compile: true}", "compile is for one process"),
        ("training: {lr: 1e-4, final_lr: 3e-4}", "final_lr must be at most training.lr, 0.0001"),
        ("training: {lr: .nan}", "training.lr must be finite, found nan"),
        ("training: {lr: .inf}", "training.lr must be finite, found inf"),
        ("training: {clip_norm: .inf}", "training.clip_norm must be finite, found inf"),
        ("training: {checkpoint_seconds: .nan}", "checkpoint_seconds must be finite, found nan"),
        ("model: {latent_dim: 0}", "model.latent_dim must be at least 1, found 0"),
        ("model: {hidden_dims: [8, -1]}", r"model.hidden_dims must be .* found \[8, -1\]"),
        ("model: {hidden_channels: [0]}", r"model.hidden_channels must be .* found \[0\]"),
        ("model: {event_shape: [1, 0, 8]}", r"model.event_shape must be .* found \[1, 0, 8\]"),
        ("guide: {transforms: -2}", "guide.transforms must be at least 1, found -2"),
        ("guide: {hidden_dims: [0]}", r"guide.hidden_dims must be at least 1, found \[0\]"),
        ("a: [", "is no configuration"),
    ],
)
def test_bad_configurations(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path / "config.yaml")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("InfoVAE", {}, "loss 'InfoVAE' is unknown: did you mean 'InfoVAE_ELBO'"),
        ("InfoVAE_ELBO", {"alpa": 0}, "'loss.alpa' is unknown: did you mean 'loss.alpha'"),
        ("InfoVAE_ELBO", {"lambda_": -1}, "loss InfoVAE_ELBO: lambda_ must be positive"),
        ("InfoVAE_ELBO", {"alpha": "x"}, "loss.alpha: found 'x', expected a number"),
        ("InfoVAE_ELBO", {"lambda_": True}, "loss.lambda_: found True, expected a number"),
        ("InfoVAE_ELBO", {"divergence": "Foo"}, "loss.divergence 'Foo' is unknown: did you mean"),
        ("InfoVAE_ELBO", {"divergence": "Steen"}, "did you mean 'Stein'"),
        ("InfoVAE_ELBO", {"divergence": "IWAE_ELBO"}, "loss.divergence: found IWAE_ELBO"),
        ("GECO_ELBO", {"constraint": 3}, "loss.constraint '3' is unknown: did you mean"),
        ("GECO_ELBO", {"constraint": "Reconstruction"}, "did you mean 'ReconstructionError'"),
        ("GECO_ELBO", {"tolerance": 1, "bounds": ["a", 2]}, "loss.bounds: .*expected a list"),
        ("BetaVAE_ELBO", {"beta": "abc"}, "loss.beta: .* expected a number or a KLSchedule"),
        (
            "InfoVAE_ELBO",
            {"divergence": {"name": "Stein", "kernel": 3}},
            "loss.divergence.kernel: found 3, expected a word",
        ),
        (
            "InfoVAE_ELBO",
            {"divergence": {"name": "Adversarial", "discriminator": "MLP"}},
            "loss.divergence.discriminator 'MLP' is unknown: did you mean 'ResidualDiscriminator'",
        ),
        ("BetaVAE_ELBO", {"num_particles": 2.5}, "num_particles: found 2.5, expected a whole"),
        ("BetaVAE_ELBO", {"analytic_kl": 1}, "loss.analytic_kl: found 1, expected true or false"),
        ("DVAE_ELBO", {}, "loss.noise_scale must be given for DVAE_ELBO: .* expected a number"),
        ("DVAE_ELBO", {"noise_scale": 0.1, "elbo": 3}, "loss.elbo '3' is unknown"),
        (
            "GECO_ELBO",
            {"constraint": "PatchCrossCorrelation"},
            "loss.constraint.patch_size must be given",
        ),
        ("GECO_ELBO", {}, "expected a constraint or a tolerance"),
        ("DVAE_ELBO", {"noise_scale": 1, "elbo": {"name": "IWAE"}}, "did you mean 'IWAE_ELBO'"),
        (
            "InfoVAE_ELBO",
            {"divergence": {"name": "MMD", "bandwith": 1}},
            "'loss.divergence.bandwith' is unknown: did you mean 'loss.divergence.bandwidths'",
        ),
    ],
)
def test_bad_losses(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(Config(model=SMALL, loss=LossConfig(name, options)))


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["best", "last"])
def test_a_run_opens_as_it_was(weights, tmp_path):
    expected = saved(tmp_path)
    random = torch.get_rng_state()
    run = open_run(tmp_path, weights)
    assert torch.equal(torch.get_rng_state(), random)
    found = runs.weights_of(run.model, run.guide, run.loss)
    assert set(found) == set(expected)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not run.model.training
    assert not run.guide.training
    assert run.data().event_shape == run.model.event_shape
    assert run.data() is run.data()
    assert "mlp × gaussian × BetaVAE_ELBO on digits" in repr(run)


def test_a_run_in_double_precision_opens_in_it(tmp_path):
    weights = saved(tmp_path, Config(model=SMALL, loss=LossConfig("GECO_ELBO", {"tolerance": 0.1})))
    precise = {k: v.double() * (1 + 1e-12) if v.is_floating_point() else v
               for k, v in weights.items()}  # fmt: skip
    runs.save_weights(precise, tmp_path / "best.safetensors")
    run = open_run(tmp_path)
    found = runs.weights_of(run.model, run.guide, run.loss)
    assert all(torch.equal(value, found[name]) for name, value in precise.items())
    x = run.data().test.x[:3]
    assert x.dtype == run.model.sample(1).dtype == run.guide(x)["z"].dtype == torch.float64
    assert isinstance(run.loss.loss(run.model, run.guide, x), float)


def test_multipliers_open_as_they_were(tmp_path):
    config = Config(model=SMALL, loss=LossConfig("GECO_ELBO", {"tolerance": 0.1}))
    weights = saved(tmp_path, config)
    weights["loss.multipliers"] *= 7
    runs.save_weights(weights, tmp_path / "best.safetensors")
    assert open_run(tmp_path).loss.multipliers == 7


def test_dynamic_binarisation_is_drawn_once_for_the_judge(tmp_path):
    saved(tmp_path, Config(model=SMALL, data=DataConfig(binarize="dynamic")))
    assert open_run(tmp_path).data().kind == "binary"


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml' is not there: expected the directory of"):
        open_run(tmp_path)
    saved(tmp_path)
    with pytest.raises(ValueError, match="weights must be 'best' or 'last', found 'first'"):
        open_run(tmp_path, "first")
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best\.safetensors' is not there"):
        open_run(tmp_path)


def test_weights_of_another_architecture(tmp_path):
    saved(tmp_path)
    other = Config(model=replace(SMALL, latent_dim=3))
    runs.write_config(other, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"of shape \[8, 2\], expected \[8, 3\]"):
        open_run(tmp_path)


# --- strangers' files -----------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir ['{trap}']",
        "data: {{root: !!python/object/apply:os.mkdir ['{trap}']}}",
        "loss: {{name: os.mkdir, options: {{path: '{trap}'}}}}",
        "loss: {{name: BetaVAE_ELBO, options: {{beta: {{name: os.mkdir, path: '{trap}'}}}}}}",
        "loss: {{class_path: os.mkdir, init_args: {{path: '{trap}'}}}}",
        "model: {{class_path: os.mkdir, init_args: {{path: '{trap}'}}}}",
        "guide: {{kind: os.mkdir}}",
        "loss: {{name: pyro_vae.cli.main}}",
    ],
)
def test_a_configuration_runs_no_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "run")
    trap = tmp_path / "trap"
    text = text.format(trap=trap)
    if not text.startswith("model"):
        text += "\nmodel: {event_shape: [1, 8, 8], observation: gaussian}"
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run/config\.yaml"):
        open_run(tmp_path / "run")
    assert not trap.exists()


def test_a_module_named_by_a_configuration_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("import os\nos.mkdir('trap')\nclass Loss: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path / "run")
    tree = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for options in ({"beta": "stranger.Loss"}, {"beta": {"name": "stranger.Loss"}}):
        tree["loss"]["options"] = options
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(ValueError, match="loss"):
            open_run(tmp_path / "run")
    tree["loss"] = {"name": "stranger.Loss", "options": {}}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"loss 'stranger\.Loss' is unknown"):
        open_run(tmp_path / "run")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors"])
@pytest.mark.parametrize("writer", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_weights_run_no_code(name, writer, tmp_path):
    saved(tmp_path / "run")
    trap = tmp_path / "trap"
    writer({"state_dict": {"model.decoder.0.0.weight": Malicious(trap)}}, tmp_path / "run" / name)
    with pytest.raises(ValueError, match=name):
        open_run(tmp_path / "run", "best" if name.startswith("best") else "last")
    assert not trap.exists()


def test_a_checkpoint_without_weights(tmp_path):
    saved(tmp_path)
    torch.save({"a": 1}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt' holds no weights"):
        open_run(tmp_path, "last")
