"""HMC beside its peers on ten posteriors: effective draws a second, each sampler in turn.

    python tests/benchmarks/hmc.py [--posteriors a,b] [--samplers a,b] [--rounds N] [--cold]
    python tests/benchmarks/hmc.py --check
    python tests/benchmarks/hmc.py --growth FILE.png
    python tests/benchmarks/hmc.py --cuda

The posteriors are those of `pyro_vae.models.posteriors.POSTERIORS`, the samplers those of
`hmc_samplers.py`. What is measured, and how:

*Effective draws*: the smallest bulk ESS (arviz, all chains) over all parameters and their squares,
in constrained space.

*Effective draws a second*, after compilation and warm-up: these, divided by the seconds of the
sampling phase alone, until the draws are numpy arrays. Each sampler draws so many that its phase
lasts about two seconds, or 400,000 if these take less (Pyro's NUTS a fixed few: its figure gives
the order of magnitude only).
On a busy machine `--clock cpu` counts the CPU seconds of all threads instead.
Every sampler has its warm-up anew in each round; the rounds take the samplers in turn; medians of
the rounds, and ratios within a round.

*Seconds for 100,000 effective draws* (`--cold`): compilation + warm-up + 100,000 / the rate above.
Compilation and warm-up are measured in a fresh process with empty caches (torch's, pytensor's and
numba's; JAX keeps none unless told to), and once more in a second process that finds the caches of
the first. Importing the packages, compilers and all, is counted for none. `--rates FILE.csv` takes
the rates of an earlier run's `--out`.

`--check` compares the peers' models with ours, by log density (NumPyro, PyMC) and thereby by
posterior. `--growth` plots our time a draw against chains and dimension. `--cuda` runs ours and
NumPyro's NUTS with 4096 chains on a CUDA device.

All print Markdown; `--out FILE.csv` keeps the raw figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

if "--cuda" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import arviz as az
import hmc_samplers
import numpy as np
import torch
from hmc_samplers import MOST_DRAWS, SAMPLERS, PyroNUTS, Run, Sampler
from markdown_tables import row, table

from pyro_vae.models.posteriors import POSTERIORS

EFFECTIVE_DRAWS = 100_000
PHASE_SECONDS = 2.0
MOST_IN_ALL = 400_000  # draws of all chains, of which arviz takes a second a parameter
DEFAULT_SAMPLERS = ["ours", "numpyro", "blackjax", "nutpie", "pyro"]


def min_ess(draws: dict[str, np.ndarray]) -> float:
    """Return the smallest bulk ESS of draws [chains, n, *site] and of their squares."""
    smallest = np.inf
    for x in draws.values():
        x = np.asarray(x, dtype=np.float64).reshape(*x.shape[:2], -1)
        for k in range(x.shape[2]):
            for value in (x[:, :, k], x[:, :, k] ** 2):
                smallest = min(smallest, float(az.ess(value)))
    return smallest


def max_r_hat(draws: dict[str, np.ndarray]) -> float:
    """Return the largest rank-normalised split R̂."""
    columns = [x.reshape(*x.shape[:2], -1) for x in draws.values()]
    if len(columns[0]) == 1:
        return float("nan")  # one chain
    return max(float(az.rhat(x[:, :, k])) for x in columns for k in range(x.shape[2]))


def worst_mean(posterior: str, draws: dict[str, np.ndarray]) -> float:
    """Return the largest error of a mean, in posterior standard deviations; NaN if unknown."""
    _, data, mean_sd = POSTERIORS[posterior]
    if mean_sd is None:
        return float("nan")
    exact = mean_sd(*data(torch.float64, 0))
    return max(
        float(np.max(np.abs(x.mean((0, 1), dtype=np.float64) - mean.numpy()) / sd.numpy()))
        for x, (mean, sd) in ((draws[site], moments) for site, moments in exact.items())
    )


def calibrate(ready: Sampler) -> int:
    """Return how many draws a chain make a sampling phase of two seconds; compiles for them."""
    if isinstance(ready, PyroNUTS):
        return 300
    num_draws = 100
    while True:
        ready.run(0, num_draws)  # compiles
        run = ready.run(1, num_draws)
        seconds = max(run.sampling_seconds, 1e-3)
        # Fewer draws are no chain to judge, more take memory and arviz's time.
        wanted = int(num_draws * min(PHASE_SECONDS / seconds, 30.0))
        num_chains = len(next(iter(run.draws.values())))
        wanted = min(max(wanted, 100), MOST_DRAWS, max(MOST_IN_ALL // num_chains, 100))
        if seconds > PHASE_SECONDS / 2 or wanted <= num_draws:
            return num_draws
        num_draws = wanted


def rates(posteriors: list[str], samplers: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure every sampler on every posterior, in turn; print as they come, return all figures."""
    records: list[dict[str, Any]] = []
    labels = [SAMPLERS[s].label for s in samplers]
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print("\nEffective draws a second after compilation and warm-up, median; in brackets the range")
    table(["posterior", *labels, "ours / best peer", "ours / Pyro NUTS"])
    for posterior in posteriors:
        ready = {sampler: SAMPLERS[sampler](posterior) for sampler in samplers}
        draws_each = {sampler: calibrate(ready[sampler]) for sampler in samplers}
        found: dict[str, list[float]] = defaultdict(list)
        for k in range(rounds):
            for sampler, num_draws in draws_each.items():
                if sampler == "pyro" and k > 0:
                    found[sampler].append(found[sampler][0])  # takes minutes: once is enough
                    continue
                draws, warmup_seconds, sampling_seconds = ready[sampler].run(100 + k, num_draws)
                ess = min_ess(draws)
                found[sampler].append(ess / sampling_seconds)
                records.append(
                    {
                        "posterior": posterior,
                        "sampler": sampler,
                        "round": k,
                        "num_chains": len(next(iter(draws.values()))),
                        "num_draws": num_draws,
                        "warmup_seconds": warmup_seconds,
                        "sampling_seconds": sampling_seconds,
                        "min_ess": ess,
                        "ess_per_second": ess / sampling_seconds,
                        "max_r_hat": max_r_hat(draws),
                        "worst_mean_in_sd": worst_mean(posterior, draws),
                    }
                )
        del ready
        peers = [s for s in samplers if s not in ("ours", "pyro")]
        best = max(peers, key=lambda s: statistics.median(found[s]), default=None)
        cells = [posterior]
        for sampler in samplers:
            low, mid, high = (
                min(found[sampler]),
                statistics.median(found[sampler]),
                max(found[sampler]),
            )
            cells.append(f"{mid:,.0f} ({low:,.0f} … {high:,.0f})")
        for peer in (best, "pyro" if "pyro" in samplers else None):
            if peer is None or "ours" not in samplers:
                cells.append("")
                continue
            ratios = [a / b for a, b in zip(found["ours"], found[peer], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}×")
        row(*cells)
    details(records)
    return records


def details(records: list[dict[str, Any]]) -> None:
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["posterior"], record["sampler"]].append(record)
    rows = []
    for (posterior, sampler), runs in groups.items():

        def median(key: str, runs: list = runs) -> float:
            return statistics.median(run[key] for run in runs)

        rows.append(
            [
                posterior,
                SAMPLERS[sampler].label,
                f"{runs[0]['num_chains']} × {runs[0]['num_draws']}",
                f"{median('warmup_seconds'):.2f}",
                f"{median('sampling_seconds'):.2f}",
                f"{median('min_ess'):,.0f}",
                f"{max(run['max_r_hat'] for run in runs):.3f}",
                f"{max(run['worst_mean_in_sd'] for run in runs):.3f}",
            ]
        )
    print("\nHow these came about; medians, but R̂ and the error of a mean are the worst found")
    header = ["posterior", "sampler", "chains × draws", "warm-up, s", "sampling, s", "min ESS"]
    table([*header, "R̂", "error of a mean, sd"], rows)


# -- compilation counted --------------------------------------------------------------------------


def cold_one(posterior: str, sampler: str, num_draws: int) -> None:
    """In a process of its own: print what compilation and warm-up took."""
    SAMPLERS[sampler].require()
    started = time.perf_counter()
    ready = SAMPLERS[sampler](posterior)
    ready.run(0, num_draws)
    first = time.perf_counter()
    run: Run = ready.run(1, num_draws)
    again = time.perf_counter() - first
    compilation = max(first - started - again, 0.0)
    print(json.dumps({"compile": compilation, "warmup": run.warmup_seconds}))


def cold(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure compilation, once with empty caches and once with those that this left."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["posterior"], record["sampler"]].append(record)
    rows, totals = [], []
    for (posterior, sampler), runs in groups.items():
        rate = statistics.median(run["ess_per_second"] for run in runs)
        figures = []
        with tempfile.TemporaryDirectory() as caches:
            for cache in ("empty", "filled"):
                found = _in_fresh_process(posterior, sampler, int(runs[0]["num_draws"]), caches)
                seconds = found["compile"] + found["warmup"] + EFFECTIVE_DRAWS / rate
                figures += [found["compile"], found["warmup"], seconds]
                totals.append(
                    {"posterior": posterior, "sampler": sampler, "cache": cache}
                    | {"compile_seconds": found["compile"], "warmup_seconds": found["warmup"]}
                    | {"ess_per_second": rate, "total_seconds": seconds}
                )
        rows.append([posterior, SAMPLERS[sampler].label, *(f"{x:.1f}" for x in figures)])
    print(f"\nSeconds for {EFFECTIVE_DRAWS:,} effective draws, compilation and warm-up counted")
    header = ["posterior", "sampler"]
    for cache in ("caches empty", "caches filled"):
        header += [f"{cache}: compile", "warm-up", "**total**"]
    table(header, rows)
    summary: dict[str, dict[str, float]] = defaultdict(dict)
    for record in totals:
        if record["cache"] == "empty":
            summary[record["posterior"]][record["sampler"]] = record["total_seconds"]
    rows = []
    for posterior, seconds in summary.items():
        peers = {s: t for s, t in seconds.items() if s != "ours"}
        if "ours" in seconds and peers:
            best = min(peers, key=lambda s: peers[s])
            ratio = f"{peers[best] / seconds['ours']:.2f}×"
            rows.append([posterior, f"{seconds['ours']:.1f}", f"{peers[best]:.1f}", best, ratio])
    if rows:
        table(["posterior", "ours, s", "best peer, s", "which", "ours is faster by"], rows)
    return totals


def _in_fresh_process(
    posterior: str, sampler: str, num_draws: int, caches: str
) -> dict[str, float]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "NUMBA_CACHE_DIR": f"{caches}/numba",
        "PYTENSOR_FLAGS": f"base_compiledir={caches}/pytensor",
        "XDG_CACHE_HOME": f"{caches}/xdg",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, "--cold-one", posterior, sampler, str(num_draws)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{posterior}, {sampler}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# -- the command line -----------------------------------------------------------------------------


def cuda(rounds: int) -> list[dict[str, Any]]:
    """Run 4096 chains of ours and of NumPyro's NUTS on one card."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "--cuda: torch finds no CUDA device; expected a CUDA build of torch and a card"
        )
    from hmc_samplers import NumPyroNUTS, Ours

    NumPyroNUTS.require()
    import jax

    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"--cuda: JAX runs on {jax.default_backend()!r}; expected 'gpu': install jax[cuda13]"
        )
    records, rows = [], []
    for posterior in ("hierarchical_regression", "logistic_regression"):
        ready = {
            "ours": Ours(posterior, num_chains=4096, device="cuda"),
            "numpyro": NumPyroNUTS(posterior, num_chains=4096),
        }
        found: dict[str, list[tuple]] = defaultdict(list)
        for sampler in ready.values():
            sampler.run(0, 500)  # compiles
        for k in range(rounds):
            for name, sampler in ready.items():
                draws, warmup_seconds, seconds = sampler.run(100 + k, 500)
                # arviz on all of 4096 chains takes an hour: a sixteenth of them has as much of
                # the total.
                ess = 16 * min_ess({site: x[::16] for site, x in draws.items()})
                found[name].append((4096 * 500 / seconds, ess / seconds, warmup_seconds))
                records.append(
                    {"posterior": posterior, "sampler": name, "round": k, "num_chains": 4096}
                    | {"num_draws": 500, "warmup_seconds": warmup_seconds}
                    | {"sampling_seconds": seconds, "min_ess": ess, "ess_per_second": ess / seconds}
                )
        for name in ready:
            medians = [statistics.median(values) for values in zip(*found[name], strict=True)]
            figures = [f"{x:,.0f}" for x in medians[:2]] + [f"{medians[2]:.1f}"]
            rows.append([posterior, SAMPLERS[name].label, *figures])
    print(f"\n4096 chains on {torch.cuda.get_device_name()}, medians of {rounds} rounds")
    table(["posterior", "sampler", "draws / s", "effective draws / s", "warm-up, s"], rows)
    return records


def _write(path: str | None, records: list[dict[str, Any]]) -> None:
    if path is None or not records:
        return
    columns = list(dict.fromkeys(key for record in records for key in record))
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()}
            )


def _read(path: str) -> list[dict[str, Any]]:
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = ("posterior", "sampler")
    return [
        {k: v if k in text else float(v) for k, v in row.items() if v != ""}
        for row in rows
        if row.get("min_ess")
    ]


def _names(kind: str, text: str, known: list[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"--{kind}: found {name!r}; expected some of {','.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posteriors", default=",".join(POSTERIORS), help="by default all ten")
    parser.add_argument("--samplers", default=",".join(DEFAULT_SAMPLERS), help=", ".join(SAMPLERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds of all threads together, for a machine that is busy with other work",
    )
    parser.add_argument("--cold", action="store_true", help="compilation too, in fresh processes")
    parser.add_argument("--rates", metavar="FILE.csv", help="take these, for --cold, as measured")
    parser.add_argument("--check", action="store_true", help="compare the peers' models with ours")
    parser.add_argument("--growth", metavar="FILE.png", help="plot time a draw against size")
    parser.add_argument("--cuda", action="store_true", help="4096 chains on a CUDA device")
    parser.add_argument("--out", metavar="FILE.csv", help="where to write the raw figures")
    parser.add_argument("--cold-one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("arviz").setLevel(logging.ERROR)
    posteriors = _names("posteriors", options.posteriors, list(POSTERIORS))
    samplers = _names("samplers", options.samplers, list(SAMPLERS))
    if options.clock == "cpu":
        hmc_samplers.clock = time.process_time
    if options.cold_one:
        posterior, sampler, num_draws = options.cold_one
        cold_one(posterior, sampler, int(num_draws))
    elif options.check:
        from hmc_check import check

        check(posteriors)
    elif options.growth:
        from hmc_growth import growth

        _write(options.out, growth(options.growth))
    elif options.cuda:
        _write(options.out, cuda(options.rounds))
    else:
        for sampler in samplers:  # a missing peer is said at once, not after an hour
            SAMPLERS[sampler].require()
        if options.rates:
            records = [r for r in _read(options.rates) if r["posterior"] in posteriors]
        else:
            records = rates(posteriors, samplers, options.rounds)
        _write(options.out, records)
        if options.cold:
            _write(options.out, records + cold(records))


if __name__ == "__main__":
    main()
