"""What makes an implicit (AVB) guide reliable and quick: a study on one posterior.

The posterior is the Eight Schools example of the AVB paper (Mescheder et al.
2017), ten-dimensional with two mirrored modes.  It can be sampled exactly, so
every variant is scored by a nearest-neighbour KL against the truth, by the
mass it gives to tau > 0, and by its claimed ELBO against the log evidence.
It is plain PyTorch, so that any part of the method can be changed by a flag;
`pyro_vae.compare` fits its implicit guide by the recipe found here.

    python tests/benchmarks/avb_study.py                              # the recipe, seeds 0-2
    python tests/benchmarks/avb_study.py --variants recipe no_anneal --seeds 0-9
    python tests/benchmarks/avb_study.py --variants all --csv study.csv

A variant is `recipe`, a name from VARIANTS, or overrides of the recipe joined
by commas: `t_act=lrelu,d_steps=2`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import nn
from torch.nn.functional import softplus

# ------------------------------------------------------------------ posterior
Y = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
SIGMA = torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])
DIM = 10
LOG_2PI = math.log(2 * math.pi)
_PREC = 1 / SIGMA
_CONST = -0.5 * (DIM + 8) * LOG_2PI - float(SIGMA.log().sum())


def log_joint(z, likelihood_weight=1.0):
    """log p(y, z) of z = (mu, tau, eta_1..8), row by row."""
    mu, tau, eta = z[:, :1], z[:, 1:2], z[:, 2:]
    residual = (Y - mu - tau * eta) * _PREC
    return -0.5 * (z.square().sum(1) + likelihood_weight * residual.square().sum(1)) + _CONST


def exact_posterior(n, seed):
    """n exact draws and the log evidence: tau on a grid, the rest in closed form."""
    rng = np.random.default_rng(seed)
    y, s2 = Y.double().numpy(), SIGMA.double().numpy() ** 2
    tau = np.linspace(-8, 8, 20001)
    w = 1 / (s2 + tau[:, None] ** 2)  # y_j | mu, tau has precision w_j
    prec, lin = 1 + w.sum(1), (w * y).sum(1)
    log_p = (
        -0.5 * tau**2
        - 0.5 * LOG_2PI
        - 4 * LOG_2PI
        + 0.5 * np.log(w).sum(1)
        - 0.5 * np.log(prec)
        - 0.5 * (w * y**2).sum(1)
        + 0.5 * lin**2 / prec
    )
    top = log_p.max()
    density = np.exp(log_p - top)
    cdf = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    log_z = top + math.log(cdf[-1] * (tau[1] - tau[0]))
    t = np.interp(rng.random(n), cdf / cdf[-1], tau)
    w = 1 / (s2 + t[:, None] ** 2)
    prec = 1 + w.sum(1)
    mu = (w * y).sum(1) / prec + rng.standard_normal(n) / np.sqrt(prec)
    prec = 1 + t[:, None] ** 2 / s2
    eta = t[:, None] * (y - mu[:, None]) / s2 / prec + rng.standard_normal((n, 8)) / np.sqrt(prec)
    return np.concatenate([mu[:, None], t[:, None], eta], 1), log_z


def knn_kl(x, y, scale, k=1):
    """Nearest-neighbour estimate of KL(x || y) from draws (Wang et al. 2009)."""
    x, y = x / scale, y / scale
    (n, d), m = x.shape, len(y)
    rho = cKDTree(x).query(x, k + 1)[0][:, k]
    nu = cKDTree(y).query(x, k)[0].reshape(n, -1)[:, -1]
    return d * np.mean(np.log(nu / np.maximum(rho, 1e-12))) + math.log(m / (n - 1))


# --------------------------------------------------------------------- recipe
@dataclass(frozen=True)
class Config:
    # guide
    noise: int = 24
    g_width: int = 128
    g_layers: int = 2
    g_act: str = "elu"
    g_skip: bool = False  # z = linear(eps) + net(eps), net's last layer small
    g_scale: float = 1.0  # sd of the linear part at the start
    # discriminator
    t_width: int = 64
    t_blocks: int = 3
    t_block_layers: int = 1
    t_act: str = "lrelu"
    t_quad: bool = False  # plus a learned quadratic form of zbar
    t_spectral: bool = False
    # batches and players
    d_batch: int = 384
    g_batch: int = 128
    d_steps: int = 3
    reuse: bool = False  # the guide's batch is also the first D batch
    moments: str = "ema"  # batch | ema | big
    moments_decay: float = 0.9
    whiten: bool = False  # full-covariance contrast
    objective: str = "logistic"  # logistic | fdiv
    # optimisation
    steps: int = 6000
    g_lr: float = 5e-4
    d_lr: float = 3e-3
    beta1: float = 0.5
    g_beta2: float = 0.999
    d_beta2: float = 0.999
    g_end: float = 0.0  # last learning rate as a share of the first
    d_end: float = 0.1
    hold: float = 0.0  # share of steps at the full rate before the cosine
    warmup: int = 0
    clip: float = 0.0
    d_clip: float = 0.0
    pretrain: int = 0  # D-only steps before the first guide step
    # averaging
    ema: float = 0.99
    d_ema: float = 0.0  # guide steps use an average of T
    # stabilisers
    r1: float = 0.0
    smooth: float = 0.0
    instance_noise: float = 0.0  # at the start, falling linearly to zero
    anneal: float = 0.4  # share of steps over which the likelihood is tempered in
    # after training
    refresh: int = 300


ACT = {
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "lrelu": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
}


class Guide(nn.Module):
    def __init__(self, c):
        super().__init__()
        sizes = [c.noise] + [c.g_width] * c.g_layers
        layers = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), ACT[c.g_act]()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], DIM))
        self.skip = None
        if c.g_skip:
            self.skip = nn.Linear(c.noise, DIM, bias=False)
            nn.init.orthogonal_(self.skip.weight, gain=c.g_scale)
            with torch.no_grad():
                self.net[-1].weight.mul_(0.1)
                self.net[-1].bias.zero_()
        self.noise = c.noise

    def forward(self, n):
        eps = torch.randn(n, self.noise)
        z = self.net(eps)
        return z if self.skip is None else z + self.skip(eps)


class Block(nn.Module):
    def __init__(self, width, layers, act, wrap):
        super().__init__()
        self.act = act
        self.layers = nn.ModuleList(wrap(nn.Linear(width, width)) for _ in range(layers))

    def forward(self, h):
        r = h
        for layer in self.layers:
            r = layer(self.act(r))
        return h + r


class Discriminator(nn.Module):
    def __init__(self, c):
        super().__init__()
        wrap = nn.utils.parametrizations.spectral_norm if c.t_spectral else (lambda m: m)
        act = ACT[c.t_act]()
        self.first = wrap(nn.Linear(DIM, c.t_width))
        self.blocks = nn.Sequential(
            *(Block(c.t_width, c.t_block_layers, act, wrap) for _ in range(c.t_blocks))
        )
        self.act = act
        self.last = nn.Linear(c.t_width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.quad = nn.Parameter(torch.zeros(DIM, DIM)) if c.t_quad else None

    def forward(self, zbar):
        t = self.last(self.act(self.blocks(self.first(zbar)))).squeeze(-1)
        if self.quad is not None:
            t = t + ((zbar @ self.quad) * zbar).sum(-1) / math.sqrt(DIM)
        return t


class Contrast:
    """N(m, L L') with the guide's moments, which carry no gradient."""

    def __init__(self, c):
        self.c, self.m, self.cov = c, None, None

    @torch.no_grad()
    def update(self, z, decay=None):
        m = z.mean(0)
        cov = (z - m).T @ (z - m) / (len(z) - 1) if self.c.whiten else z.var(0)
        if self.m is None or not decay:
            self.m, self.cov = m, cov
        else:
            self.m = self.m + (1 - decay) * (m - self.m)
            self.cov = self.cov + (1 - decay) * (cov - self.cov)
        if self.c.whiten:
            self.chol = torch.linalg.cholesky(self.cov + 1e-6 * torch.eye(DIM))
            self.inv = torch.linalg.inv(self.chol).T.contiguous()
            self.log_det = self.chol.diagonal().log().sum()
        else:
            self.s = self.cov.sqrt() + 1e-6
            self.log_det = self.s.log().sum()

    def standardise(self, z):
        return (z - self.m) @ self.inv if self.c.whiten else (z - self.m) / self.s

    def log_prob_bar(self, zbar):
        return -0.5 * zbar.square().sum(-1) - self.log_det - 0.5 * DIM * LOG_2PI


def schedule(step, c, end):
    if step < c.warmup:
        return (step + 1) / c.warmup
    p = max(0.0, (step / c.steps - c.hold) / (1 - c.hold))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(p, 1.0)))


def d_loss(t, zbar, c, noise=0.0):
    eta = torch.randn_like(zbar)
    n = len(zbar)
    x = torch.cat([zbar, eta])
    if noise:
        x = x + noise * torch.randn_like(x)
    if c.r1:
        x.requires_grad_(True)
    out = t(x)
    a, b = out[:n], out[n:]
    if c.objective == "fdiv":
        loss = (b - 1).clamp(max=15).exp().mean() - a.mean()
    else:
        loss = softplus(-a).mean() + softplus(b).mean()
        if c.smooth:
            loss = loss + c.smooth * (a.mean() - b.mean())
    if c.r1:
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = loss + 0.5 * c.r1 * g.square().sum(1).mean()
    return loss


def log_ratio(t, zbar, c):
    out = t(zbar)
    return out - 1 if c.objective == "fdiv" else out


def average(target, source, decay):
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - decay)


def fit(c, seed, progress=None):
    """One fit; returns the averaged guide, the last guide, T, the contrast, seconds."""
    torch.manual_seed(seed)
    guide, t, contrast = Guide(c), Discriminator(c), Contrast(c)
    mean_guide = copy.deepcopy(guide).requires_grad_(False)
    t_mean = copy.deepcopy(t).requires_grad_(False) if c.d_ema else None
    g_params, t_params = list(guide.parameters()), list(t.parameters())
    g_opt = torch.optim.Adam(g_params, c.g_lr, betas=(c.beta1, c.g_beta2), fused=True)
    d_opt = torch.optim.Adam(t_params, c.d_lr, betas=(c.beta1, c.d_beta2), fused=True)

    def d_step(z, noise):
        if c.moments != "big":
            contrast.update(z, c.moments_decay if c.moments == "ema" else None)
        loss = d_loss(t, contrast.standardise(z), c, noise)
        d_opt.zero_grad()
        loss.backward()
        if c.d_clip:
            nn.utils.clip_grad_norm_(t_params, c.d_clip)
        d_opt.step()
        if t_mean is not None:
            average(t_mean, t, c.d_ema)

    start = time.perf_counter()
    with torch.no_grad():
        contrast.update(guide(4096))
    for _ in range(c.pretrain):
        with torch.no_grad():
            z = guide(c.d_batch)
        d_step(z, 0.0)
    for step in range(c.steps):
        g_opt.param_groups[0]["lr"] = c.g_lr * schedule(step, c, c.g_end)
        d_opt.param_groups[0]["lr"] = c.d_lr * schedule(step, c, c.d_end)
        noise = c.instance_noise * (1 - step / c.steps)
        if c.moments == "big":
            with torch.no_grad():
                contrast.update(guide(2048))
        z = guide(c.g_batch) if c.reuse else None
        for i in range(c.d_steps):
            if c.reuse and i == 0:
                z_d = z.detach()
            else:
                with torch.no_grad():
                    z_d = guide(c.d_batch)
            d_step(z_d, noise)
        if z is None:
            z = guide(c.g_batch)
        if c.moments == "batch":
            contrast.update(z)
        beta = min(1.0, 0.1 + 0.9 * step / (c.anneal * c.steps)) if c.anneal else 1.0
        zbar = contrast.standardise(z)
        for p in t_params:
            p.requires_grad_(False)
        ratio = log_ratio(t_mean if t_mean is not None else t, zbar, c)
        loss = (ratio + contrast.log_prob_bar(zbar) - log_joint(z, beta)).mean()
        g_opt.zero_grad()
        loss.backward()
        for p in t_params:
            p.requires_grad_(True)
        if c.clip:
            nn.utils.clip_grad_norm_(g_params, c.clip)
        g_opt.step()
        # the average starts short and grows, so that it forgets the start
        average(mean_guide, guide, min(c.ema, (1 + step) / (10 + step)))
        if progress and (step + 1) % progress == 0:
            print(f"  step {step + 1} loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return mean_guide, guide, t, contrast, time.perf_counter() - start


@torch.no_grad()
def claimed_elbo(guide, t, contrast, c, n=20000):
    z = guide(n)
    zbar = contrast.standardise(z)
    return (log_joint(z) - log_ratio(t, zbar, c) - contrast.log_prob_bar(zbar)).mean().item()


def refresh(guide, t, contrast, c):
    """D-only steps against the averaged guide, with its moments held fixed."""
    t = copy.deepcopy(t)
    with torch.no_grad():
        contrast.update(guide(20000))
    opt = torch.optim.Adam(t.parameters(), c.d_lr, betas=(0.9, 0.999), fused=True)
    for i in range(c.refresh):
        opt.param_groups[0]["lr"] = c.d_lr * 0.5 * (1 + math.cos(math.pi * i / c.refresh))
        with torch.no_grad():
            zbar = contrast.standardise(guide(c.d_batch))
        opt.zero_grad()
        d_loss(t, zbar, c).backward()
        opt.step()
    return t


def evaluate(c, seed, truth, truth_sd, log_z):
    guide, last, t, contrast, seconds = fit(c, seed)
    with torch.no_grad():
        z, z_last = guide(10000).double().numpy(), last(10000).double().numpy()
    row = {"seed": seed, "seconds": seconds, "ms_step": 1e3 * seconds / c.steps}
    if not np.isfinite(z).all():
        return row | dict.fromkeys(["kl", "kl_last", "tau_pos", "gap", "gap_refreshed"], math.nan)
    row["kl"] = knn_kl(z, truth, truth_sd)
    row["kl_last"] = knn_kl(z_last, truth, truth_sd)
    row["tau_pos"] = float((z[:, 1] > 0).mean())
    with torch.no_grad():
        contrast.update(guide(20000))
    row["gap"] = log_z - claimed_elbo(guide, t, contrast, c)
    row["gap_refreshed"] = math.nan
    if c.refresh:
        row["gap_refreshed"] = log_z - claimed_elbo(
            guide, refresh(guide, t, contrast, c), contrast, c
        )
    return row


RECIPE = Config()
VARIANTS = {
    "recipe": {},
    "no_anneal": {"anneal": 0.0},
    "one_d_step": {"d_steps": 1},
    "two_d_steps": {"d_steps": 2},
    "reuse_batch": {"reuse": True, "d_batch": 256, "g_batch": 256},
    "wide_t": {"t_width": 128, "d_lr": 2e-3},
    "deep_t": {"t_blocks": 5},
    "silu_t": {"t_act": "silu"},
    "quadratic_t": {"t_quad": True},
    "silu_guide": {"g_act": "silu"},
    "deep_guide": {"g_layers": 3},
    "linear_skip": {"g_skip": True},
    "linear_skip_small": {"g_skip": True, "g_scale": 0.3},
    "fast_guide": {"g_lr": 2e-3},
    "fast_t": {"d_lr": 8e-3},
    "equal_batches": {"d_batch": 256, "g_batch": 256},
    "batch_moments": {"moments": "batch"},
    "big_moments": {"moments": "big"},
    "whitened_contrast": {"whiten": True},
    "short_memory": {"g_beta2": 0.99, "d_beta2": 0.99},
    "more_momentum": {"beta1": 0.9},
    "clipped": {"clip": 10.0},
    "r1": {"r1": 0.01},
    "label_smoothing": {"smooth": 0.05},
    "instance_noise": {"instance_noise": 0.3},
    "spectral_norm": {"t_spectral": True},
    "averaged_t": {"d_ema": 0.9},
    "f_divergence": {"objective": "fdiv"},
}


def parse_variant(text):
    if text in VARIANTS:
        return replace(RECIPE, **VARIANTS[text])
    kinds = {f.name: type(getattr(RECIPE, f.name)) for f in fields(Config)}
    out = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in kinds or not value:
            raise SystemExit(
                f"unknown variant {text!r}: name one of {sorted(VARIANTS)} or key=value"
            )
        if kinds[key] is str:
            out[key] = value
        else:
            out[key] = kinds[key](ast.literal_eval(value))
    return replace(RECIPE, **out)


def parse_seeds(text):
    out = []
    for part in text.split(","):
        a, _, b = part.partition("-")
        out += range(int(a), int(b or a) + 1)
    return out


COLUMNS = ["kl", "kl_last", "tau_pos", "gap", "gap_refreshed", "seconds", "ms_step"]


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--variants", nargs="+", default=["recipe"], help="names, key=value lists, or all"
    )
    p.add_argument("--seeds", default="0-2", help="such as 0-9 or 0,3,5")
    p.add_argument("--steps", type=int, help="guide steps of every variant")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--csv", help="also append the rows to this file")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    truth, log_z = exact_posterior(10000, 1234)
    sd = exact_posterior(200000, 99)[0].std(0)
    bias = [knn_kl(exact_posterior(10000, 10 + i)[0], truth, sd) for i in range(2)]
    print(
        f"log evidence {log_z:.4f}; estimator on exact draws: "
        + ", ".join(f"{b:+.4f}" for b in bias)
    )
    names = list(VARIANTS) if args.variants == ["all"] else args.variants
    print("  ".join(["seed".rjust(6)] + [h.rjust(13) for h in COLUMNS]))
    for name in names:
        c = parse_variant(name)
        if args.steps:
            c = replace(c, steps=args.steps)
        print(f"# {name}", flush=True)
        rows = []
        for seed in parse_seeds(args.seeds):
            row = evaluate(c, seed, truth, sd, log_z)
            rows.append(row)
            print(
                "  ".join([str(seed).rjust(6)] + [f"{row[k]:13.4f}" for k in COLUMNS]), flush=True
            )
            if args.csv:
                with open(args.csv, "a", newline="") as f:
                    w = csv.writer(f)
                    if f.tell() == 0:
                        w.writerow(["variant", "seed", *COLUMNS, *(k.name for k in fields(Config))])
                    w.writerow([name, seed, *(row[k] for k in COLUMNS), *asdict(c).values()])
        med = {k: statistics.median(r[k] for r in rows) for k in COLUMNS}
        print("  ".join(["median"] + [f"{med[k]:13.4f}" for k in COLUMNS]))
        print(
            f"  worst  {max(r['kl'] for r in rows):13.4f}  (tau>0 in "
            f"[{min(r['tau_pos'] for r in rows):.3f}, {max(r['tau_pos'] for r in rows):.3f}])",
            flush=True,
        )


if __name__ == "__main__":
    main()
