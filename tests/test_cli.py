"""The command line: what it prints where, what it writes, and how it says no."""

import math
import re
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml

from pyro_vae import cli
from pyro_vae.compare import GUIDES

SMALL = ["--num-chains", "64", "--num-samples", "100", "--num-draws", "200", "--steps", "4"]
TOO_SMALL = [*SMALL, "--num-chains", "4", "--num-samples", "20"]  # to pass the checks
COLUMNS = [
    "guide",
    "kl",
    "kl_se",
    "knn_kl",
    "knn_kl_se",
    "elbo",
    "max_mean_error",
    "max_sd_error",
    "khat",
    "steps",
    "seconds",
]


def run(*args):
    """Run the command line here; return its exit status."""
    try:
        return cli.main([str(arg) for arg in args])
    except SystemExit as end:  # the parser's own way
        return end.code


def read(file, label):
    with az.rc_context({"data.load": "eager"}):
        return az.InferenceData.from_netcdf(str(file), base_group=label)


def test_compare_prints_the_table_and_writes_the_files(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert run("compare", "gauss", "--guides", "mean_field,flow", "--out", out, *SMALL) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == COLUMNS  # stdout holds the table and nothing else
    named = [line.split()[0] for line in lines[1:] if not line.startswith("log p(x) = ")]
    assert named == ["hmc", "mean_field", "flow"]
    assert f"written to {out}" in captured.err
    assert "flow: KL to the reference" in captured.err
    assert "hmc: passed: 64 chains of 100 draws from 16 starts" in captured.err
    assert (out / "checks.txt").read_text(encoding="utf-8").startswith("hmc passed: 64 chains")
    table = pd.read_csv(out / "table.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["guide"]) == ["hmc", "mean_field", "flow"]
    assert list(table["steps"].iloc[1:]) == [4, 4]
    assert (
        table.loc[1:, ["knn_kl", "elbo", "max_mean_error", "max_sd_error"]].notna().all(axis=None)
    )
    for name in ("posterior.png", "convergence.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for label in table["guide"]:
        x = read(out / "draws.nc", label).posterior["x"].values
        chains = 64 if label == "hmc" else 1  # the reference keeps its chains
        assert x.shape[0] == chains
        assert 200 <= x.shape[0] * x.shape[1] < 200 + 2 * chains
        assert x.shape[2] == 2
        assert x.dtype == np.float32


@pytest.mark.slow
def test_an_existing_directory_is_written_over(tmp_path):
    assert run("compare", "gauss", "--guides", "mean_field,flow", "--out", tmp_path, *SMALL) == 0
    assert run("compare", "gauss", "--guides", "full_rank", "--out", tmp_path, *SMALL) == 0
    assert list(pd.read_csv(tmp_path / "table.csv")["guide"]) == ["hmc", "full_rank"]
    with pytest.raises(KeyError):
        read(tmp_path / "draws.nc", "flow")


@pytest.mark.slow
def test_the_seed_decides(tmp_path):
    def numbers(seed):
        args = ["--guides", "mean_field", "--seed", seed, "--out", tmp_path]
        assert run("compare", "gauss", *args, *SMALL) == 0
        return pd.read_csv(tmp_path / "table.csv").drop(columns="seconds")

    assert (numbers(2)["knn_kl"] != numbers(1)["knn_kl"]).all()


@pytest.mark.slow
def test_out_is_named_after_the_model_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("compare", "gauss", "--guides", "mean_field", *SMALL) == 0
    assert (tmp_path / "out" / "gauss" / "table.csv").exists()


def test_a_failed_run_of_hmc_is_refused(tmp_path, capsys):
    args = ["--guides", "mean_field", "--out", tmp_path, *TOO_SMALL]
    assert run("compare", "gauss", *args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("pyro-vae: error: "))
    assert "the reference failed its checks" in lines[first]
    assert "ESS" in lines[first]
    assert "allow_failed_checks" in lines[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the reference failed its checks")
def test_a_failed_run_of_hmc_is_marked_where_it_is_allowed(tmp_path, capsys):
    args = ["--guides", "mean_field", "--out", tmp_path, *TOO_SMALL]
    assert run("compare", "--allow-failed-checks", "gauss", *args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].strip().startswith("hmc (failed its checks)")
    assert lines[3].startswith("hmc FAILED (")
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["guide"]) == ["hmc (failed its checks)", "mean_field"]


OWN_MODEL = """
import pyro, pyro.distributions as dist, torch

def decay(times=torch.tensor([1.0, 2.0]), *, unit=1.0):
    rate = pyro.sample("rate", dist.LogNormal(times.new_zeros(()), unit))
    with pyro.plate("data", len(times)):
        pyro.sample("times", dist.Exponential(rate), obs=times)

def without_data(times):
    decay(times)

number = 3
"""


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A module in the current directory, as the console script finds it."""
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("own_model", None)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_model_of_one_s_own(own_model, dtype):
    args = ["--guides", "mean_field", "--dtype", dtype]
    assert run("compare", "own_model:decay", *args, *SMALL) == 0
    out = own_model / "out" / "decay"
    assert read(out / "draws.nc", "hmc").posterior["rate"].dtype == dtype
    assert (read(out / "draws.nc", "mean_field").posterior["rate"] > 0).all()


@pytest.mark.usefixtures("own_model")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nonsense", "model: found 'nonsense', expected one of ["),
        ("own_model", "or package.module:function"),
        ("own_model:absent", "model: cannot find 'own_model:absent'"),
        ("no_such_module:model", "model: cannot find 'no_such_module:model'"),
        ("own_model:number", "model: 'own_model:number' is not a function"),
        ("own_model:without_data", "model: the argument 'times' has no default"),
        (":decay", "model: cannot find ':decay'"),
    ],
)
def test_bad_models(model, message, capsys):
    check_refusal(capsys, message, "compare", model, *SMALL)


def check_refusal(capsys, message, *args):
    """One line on stderr that says why, exit status 2, nothing on stdout."""
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("pyro-vae: error: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--guides", "flwo"], "unknown name 'flwo', expected some of"),
        (["--guides", "flow,flow"], "found ['flow'] more than once"),
        (["--guides", ","], "guides: found none, expected some of ['mean_field'"),
        (["--num-chains", "0"], "num_chains: found 0; expected"),
        (["--num-samples", "0"], "num_samples: found 0; expected"),
        (["--num-draws", "1"], "num_draws must be at least 4, found 1"),
        (["--steps", "-1"], "num_steps must not be negative, found -1"),
        (["--device", "nonsense"], "device: cannot use 'nonsense'"),
    ],
)
def test_bad_values(tmp_path, capsys, args, message):
    check_refusal(capsys, message, "compare", "gauss", "--out", tmp_path, *args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path, capsys):
    args = ["--device", "cuda", "--out", tmp_path]
    check_refusal(capsys, "device: cannot use 'cuda'", "compare", "gauss", *args)


def test_out_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_compare", lambda *args, **kwargs: pytest.fail("the work began"))
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        message = f"out: cannot write to {str(out)!r}"
        check_refusal(capsys, message, "compare", "gauss", "--out", out)
    assert file.read_text() == "mine"


def data_with_nan(x=torch.tensor([1.0, torch.nan])):  # noqa: B008 - as a user's model has it
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def discrete():
    pyro.sample("coin", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("model", "message"),
    [(data_with_nan, "observed site 'x': found 1 NaN"), (discrete, "'coin' is discrete")],
)
def test_models_that_cannot_be_compared(tmp_path, capsys, monkeypatch, model, message):
    monkeypatch.setattr(cli, "_find_model", lambda name: model)
    check_refusal(capsys, message, "compare", "any", "--out", tmp_path)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["compare"],
        ["nonsense"],
        ["compare", "gauss", "--nonsense", "3"],
        ["compare", "gauss", "--steps", "many"],
        ["compare", "gauss", "--dtype", "float16"],
        ["compare", "gauss", "torus"],
    ],
)
def test_bad_command_lines(capsys, args):
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pyro-vae: error: ")
    assert re.search(r"\(`pyro-vae( compare)? --help` lists the options\)$", line)


@pytest.mark.slow
def test_a_guide_that_fails_is_reported_and_the_others_are_written(tmp_path, capsys, monkeypatch):
    def make(model):
        def guide(*args, **kwargs):
            raise RuntimeError("out of ideas")

        return guide

    monkeypatch.setitem(GUIDES, "broken", make)
    args = ["--guides", "broken,mean_field", "--out", tmp_path]
    assert run("compare", "gauss", *args, *SMALL) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "broken failed: RuntimeError: out of ideas"
    assert "broken: RuntimeError: out of ideas" in captured.err
    table = pd.read_csv(tmp_path / "table.csv").set_index("guide")
    assert list(table.index) == ["hmc", "broken", "mean_field"]
    assert table.loc["broken", "error"] == "RuntimeError: out of ideas"
    assert table.loc["broken", COLUMNS[1:]].isna().all()
    assert table.loc["mean_field", COLUMNS[3:]].notna().all()
    assert (tmp_path / "posterior.png").exists()


@pytest.mark.slow
def test_the_table_is_printed_even_where_it_cannot_be_saved(tmp_path, capsys):
    (tmp_path / "table.csv").mkdir()
    assert run("compare", "gauss", "--guides", "mean_field", "--out", tmp_path, *SMALL) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split() == COLUMNS
    assert captured.err.splitlines()[-1].startswith("pyro-vae: error: ")


def test_an_interrupt_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_compare", interrupted)
    assert run("compare", "gauss", "--out", tmp_path) == 130
    assert capsys.readouterr().err == "pyro-vae: interrupted\n"


def test_help_says_what_there_is(capsys):
    assert run("--help") == 0
    assert "Fit guides to a model's posterior" in capsys.readouterr().out
    assert run("compare", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("out", "seed", "guides", "steps", "num-chains", "num-samples", "num-draws"):
        assert f"--{option} " in text
    assert "[--allow-failed-checks]" in text
    for phrase in (
        "A model of pyro_vae.models, such as eight_schools_avb, or package.module:function",
        "default: mean_field,full_rank,flow,implicit",
        "--dtype {float32,float64}",
        "default: 256",
        "HMC's chains",
        "Go on where HMC failed its checks",
    ):
        assert phrase in text


@pytest.mark.slow
def test_options_from_a_file(tmp_path, capsys):
    assert run("compare", "gauss", *SMALL, "--guides", "mean_field", "--print_config") == 0
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    out = tmp_path / "out"
    assert run("compare", "--config", config, "--out", out, "--steps", "3") == 0
    table = pd.read_csv(out / "table.csv").set_index("guide")
    assert table.loc["mean_field", "steps"] == 3


def test_python_m(tmp_path):
    command = [sys.executable, "-m", "pyro_vae.cli", "compare", "nonsense"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("pyro-vae: error: model: found 'nonsense'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_eight_schools_from_end_to_end(tmp_path):
    """The main job with fewer steps and draws: every file, and the order of the guides."""
    out = tmp_path / "out"
    command = [
        *(Path(sys.executable).parent / "pyro-vae", "compare", "eight_schools_avb", "--out", out),
        *("--steps", "1500", "--num-chains", "128", "--num-samples", "400", "--num-draws", "4000"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = ["checks.txt", "convergence.png", "draws.nc", "posterior.png", "table.csv"]
    assert sorted(path.name for path in out.iterdir()) == names

    table = pd.read_csv(out / "table.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["guide"]) == ["hmc", *GUIDES]
    table = table.set_index("guide")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["guide", *table.index]
    assert lines[-1].startswith("log p(x) = ")
    numbers = ["knn_kl", "knn_kl_se", "max_mean_error", "max_sd_error", "seconds"]
    assert table[numbers].notna().all(axis=None)
    assert table.loc[["hmc", "implicit"], "khat"].isna().all()
    assert table.loc[["mean_field", "full_rank", "flow"], ["kl", "khat"]].notna().all(axis=None)
    assert math.isnan(table.loc["implicit", "kl"])
    assert (table.loc[["mean_field", "full_rank"], "kl"] > math.log(2)).all()
    assert table.loc["flow", "kl"] < 0.3

    kl = table["knn_kl"]
    assert abs(kl["hmc"]) < 4 * table.loc["hmc", "knn_kl_se"]
    # A Gaussian takes one of the two modes, which alone costs log 2.
    assert kl["mean_field"] > math.log(2)
    assert kl["full_rank"] > math.log(2)
    assert kl["flow"] < 0.3
    assert kl["implicit"] < kl["full_rank"] - 0.3
    assert table.loc["flow", "elbo"] > table.loc["full_rank", "elbo"] + 0.3

    for label in table.index:
        posterior = read(out / "draws.nc", label).posterior
        assert posterior["eta"].shape[0] == (128 if label == "hmc" else 1)
        assert posterior["eta"].shape[2] == 8
        assert posterior["tau"].size >= 4000
        # τ and −τ are equally likely.
        mass = float((posterior["tau"] > 0).mean())
        if label in ("hmc", "flow"):
            assert 0.4 < mass < 0.6


# --- train, sample, traverse ----------------------------------------------------------------------

QUICK = [
    "--training.num_epochs=2",
    "--training.validate_every=1",
    "--training.picture_every=0",
    "--data.train_size=128",
    "--model.hidden_dims=[8]",
    "--model.latent_dim=2",
]


def test_train_sample_and_traverse(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--loss", "InfoVAE_ELBO", "--loss.lambda_", "1e2", "--loss.divergence", "Stein"]
    options += ["--loss.divergence.kernel", "imq", "--guide", "flow", "--data", "digits"]
    assert run("train", "--out", out, *options, *QUICK) == 0
    assert "flow × InfoVAE_ELBO on digits" in capsys.readouterr().err
    found = yaml.safe_load((out / "config.yaml").read_text())
    assert found["loss"] == {
        "name": "InfoVAE_ELBO",
        "options": {"lambda_": 100.0, "divergence": {"name": "Stein", "kernel": "imq"}},
    }
    assert found["guide"]["kind"] == "flow"
    assert found["model"]["hidden_dims"] == [8]

    assert run("sample", out, "--num", 5) == 0
    with np.load(out / "samples.npz") as samples:
        shapes = {name: samples[name].shape for name in samples}
    assert shapes == {"x": (5, 1, 8, 8), "mean": (5, 1, 8, 8), "z": (5, 2)}
    assert run("traverse", out, "--index", 3, "--out", tmp_path) == 0
    for picture in (out / "samples.png", tmp_path / "traversals.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_is_repeated_from_its_configuration(tmp_path):
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    assert run("train", "--out", one, "--loss", "GECO_ELBO", "--loss.tolerance", 0.2, *QUICK) == 0
    assert run("train", "--config", one / "config.yaml", "--out", two) == 0
    assert (one / "best.safetensors").read_bytes() == (two / "best.safetensors").read_bytes()
    assert (one / "config.yaml").read_text() == (two / "config.yaml").read_text()
    # options over those of the file; those of another loss are not kept
    config = ["--config", one / "config.yaml", "--out"]
    assert run("train", *config, other, "--loss.rate", "0.1") == 0
    found = yaml.safe_load((other / "config.yaml").read_text())["loss"]
    assert found == {"name": "GECO_ELBO", "options": {"rate": 0.1, "tolerance": 0.2}}
    assert run("train", *config, tmp_path / "beta", "--loss", "BetaVAE_ELBO") == 0
    found = yaml.safe_load((tmp_path / "beta/config.yaml").read_text())["loss"]
    assert found == {"name": "BetaVAE_ELBO", "options": {}}


def test_train_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--out", out, *QUICK) == 0
    assert run("train", "--out", out, *QUICK) == 2
    assert "holds a run already" in last_line(capsys)
    assert run("train", "--out", out, "--resume", "--training.num_epochs", 3) == 0
    assert len((out / "log.csv").read_text().splitlines()) == 1 + 3
    assert run("train", "--out", out, "--resume", "--model.latent-dim", 3) == 2
    assert "found model.latent_dim = 3, expected 2" in last_line(capsys)
    content = (out / "last.ckpt").read_bytes()
    (out / "last.ckpt").write_bytes(content[:1000])
    assert run("train", "--out", out, "--resume") == 2
    assert "last.ckpt' is cut short" in last_line(capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (False, False)),
        (["--resume"], (False, True)),
        (["--resume=true", "--data.download"], (True, True)),
        (["--resume=false", "--data.download=True"], (True, False)),
        (["--data.download=false"], (False, False)),
        (["--data.download", "--data.download=false"], (False, False)),
    ],
)
def test_switches_can_be_turned_off(options, expected, tmp_path, monkeypatch):
    import pyro_vae.train as training

    seen = []
    spy = lambda config, out, resume, **kwargs: seen.append((config, resume))  # noqa: E731
    monkeypatch.setattr(training, "train", spy)
    (tmp_path / "config.yaml").write_text("{}")
    args = ["--out", tmp_path, "--data", "mnist", *options, "--data.train_size", 9]
    assert run("train", *args) == 0
    ((config, resume),) = seen
    assert (config.data.download, resume) == expected
    assert (config.data.name, config.data.train_size) == ("mnist", 9)


def test_a_switch_overrides_the_file(tmp_path, monkeypatch):
    import pyro_vae.train as training

    seen = []
    monkeypatch.setattr(training, "train", lambda config, out, **kwargs: seen.append(config))
    file = tmp_path / "config.yaml"
    file.write_text("data: {name: mnist, download: true}")
    assert run("train", "--config", file, "--data.download=false") == 0
    assert run("train", "--config", file) == 0
    assert [config.data.download for config in seen] == [False, True]
    assert [config.data.name for config in seen] == ["mnist", "mnist"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("site 'z': bad\n   Trace Shapes:\n Param Sites:"),
        ValueError("site 'z': bad\ntensor([[nan,\n nan]])"),
        OSError("site 'z':\n  bad"),
        yaml.YAMLError("site 'z': bad"),
    ],
)
def test_errors_of_many_lines_are_said_in_one(error, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli, "_compare", fail)
    assert run("compare", "gauss", "--out", tmp_path) == 2
    assert capsys.readouterr().err == "pyro-vae: error: site 'z': bad\n"


def last_line(capsys):
    """The one line that an error is."""
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("pyro-vae: error: ")
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modle", "mlp"], "option '--modle' is unknown: did you mean '--model'?"),
        (["--model.latentdim", "3"], "did you mean '--model.latent_dim'?"),
        (["--training", "x"], "option --training: expected one of --training.num_epochs"),
        (["--loss", "InfoVAE"], "did you mean 'InfoVAE_ELBO'?"),
        (["--loss.alpha", "0"], "'loss.alpha' is unknown"),
        (["--loss", "GECO_ELBO"], "expected a constraint or a tolerance"),
        (["--loss"], "option --loss: expected a value"),
        (["--data", "mnits"], "did you mean 'mnist'?"),
        (["--data", "two_points", "--model", "conv"], "is for images"),
        (["--training.batch_size", "1", "--loss", "InfoVAE_ELBO", "--loss.lambda_", "5"], "one"),
        (["--device", "nonsense"], "device: cannot use 'nonsense'"),
        (["--config", "nowhere.yaml"], "config: cannot read 'nowhere.yaml'"),
        (["--resume"], "config: cannot read"),
        (["--training.num_epochs", "0"], "num_epochs must be at least 1"),
        (["--loss.lambda_", "abc", "--loss", "InfoVAE_ELBO"], "loss.lambda_: found 'abc'"),
        (["--loss.num_particles", "2.5"], "loss.num_particles: found 2.5, expected a whole"),
        (["--loss", "InfoVAE_ELBO", "--loss.divergence", "Foo"], "loss.divergence 'Foo' is"),
        (["--loss", "GECO_ELBO", "--loss.constraint", "3"], "loss.constraint '3' is unknown"),
        (["--loss", "DVAE_ELBO"], "loss.noise_scale must be given"),
        (["--model.latent_dim", "0"], "model.latent_dim must be at least 1, found 0"),
        (["--guide.transforms=-1"], "guide.transforms must be at least 1, found -1"),
        (["--training.lr", ".nan"], "training.lr must be finite, found nan"),
        (["--training.lr=1e-4", "--training.final_lr=1e-3"], "final_lr must be at most"),
        (["--device", "meta"], "device: training runs on 'cpu' or 'cuda', found 'meta'"),
        (
            ["--model", "conv", "--guide", "implicit", "--guide.noise", "input"],
            "guide.noise 'input' hands the encoder rows",
        ),
        (["--resume=maybe"], "option --resume: found 'maybe', expected true or false"),
        (["--data.download=0"], "option --data.download: found '0', expected true or false"),
        (["--training.lr", "abc"], 'Parser key "training.lr": Expected a float. Got value: abc'),
        (
            ["--model", "conv", "--model.hidden_dims", "[3]"],
            "model.hidden_dims is an option of model.architecture 'mlp': found [3] with "
            "model.architecture 'conv'",
        ),
        (["--model.levels", "16"], "observation 'discretized_logistic': found 16 with"),
        (["--guide", "flow", "--guide.covariance", "full"], "found 'full' with guide.kind 'flow'"),
        (["--training.num_adversary_steps", "3"], "option of an adversary, which neither"),
        (["--loss", "GECO_ELBO", "--loss.constraint.a", "3"], "loss.constraint.a '3' is unknown"),
        (["--loss.beta", "["], "option --loss.beta: found '[', expected"),
    ],
)
def test_train_says_no_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_train_names_the_nearest_key_of_a_file(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("training: {num_epoch: 3}")
    assert run("train", "--config", file, "--out", tmp_path / "run") == 2
    assert "did you mean 'training.num_epochs'?" in last_line(capsys)
    file.write_text("model: !!python/object/apply:os.mkdir ['trap']")
    assert run("train", "--config", file, "--out", tmp_path / "run") == 2
    assert "cannot read" in last_line(capsys)


@pytest.mark.parametrize("command", ["sample", "traverse", "evaluate"])
def test_what_is_no_run_is_said_in_one_line(command, tmp_path, capsys):
    assert run(command, tmp_path) == 2
    assert "expected the directory of a run" in last_line(capsys)


@pytest.mark.slow
def test_importing_the_command_line_does_not_import_lightning():
    code = "import sys, pyro_vae.cli; print([m for m in ('lightning', 'torchvision', 'tensorboard')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
