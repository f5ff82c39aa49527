"""Rotation angle of the latents against the ELBO: figures 1, 5 and 6 of Kumar, Poole (2020).

Many trials train side by side, in a plate of their own: a trial is a draw of W with its data and a
random start. Each row of the CSV is one trial.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae import fit
from pyro_vae.data import ppca_2d
from pyro_vae.losses import BetaVAE_ELBO

NOISE = 0.05
NONLINEARITIES = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": nn.functional.elu,
}
FIELDS = [
    *("nonlinearity", "amortised", "covariance", "n", "data_seed", "trial"),
    *("elbo", "elbo_se", "angle"),
]


class Decoder(nn.Module):
    """ν(Az) + b, for each trial."""

    def __init__(self, num_trials, nonlinearity):
        super().__init__()
        self.A = nn.Parameter(torch.randn(num_trials, 2, 2))
        self.b = nn.Parameter(torch.zeros(num_trials, 1, 2))
        self.nonlinearity = NONLINEARITIES[nonlinearity]

    def forward(self, z):
        return self.nonlinearity(z @ self.A.mT) + self.b


class Guide(nn.Module):
    """N(Cx + d, Σ), or N(μ_i, Σ_i) for each data point, parameterised as in appendix C.

    O₁ and O₂ are random and orthogonal, so that no axes are special to the optimiser. The two
    latents are sites of their own, one drawn after the other where Σ is full.
    """

    def __init__(self, num_trials, num_points, amortised, covariance):
        super().__init__()
        self.amortised, self.covariance = amortised, covariance
        self.register_buffer("O1", torch.linalg.qr(torch.randn(num_trials, 2, 2))[0])
        self.register_buffer("O2", torch.linalg.qr(torch.randn(num_trials, 1, 2, 2))[0])
        if amortised:
            self.C = nn.Parameter(torch.randn(num_trials, 2, 2))
            self.d = nn.Parameter(torch.zeros(num_trials, 1, 2))
        else:
            self.loc = nn.Parameter(torch.randn(num_trials, num_points, 2))
        self.D = nn.Parameter(torch.randn(num_trials, 1 if amortised else num_points, 2, 2) / 3)

    def mean(self, x):
        return x @ (self.O1 @ self.C).mT + self.d if self.amortised else self.loc

    def forward(self, x):
        pyro.module("guide", self)
        factor = self.O2 @ self.D  # Σ = O₂ D Dᵀ O₂ᵀ
        (a, b), (c, d) = factor[..., 0, :].unbind(-1), factor[..., 1, :].unbind(-1)
        var, covar = factor.square().sum(-1), a * c + b * d
        m1, m2 = self.mean(x).unbind(-1)
        with pyro.plate("trials", x.shape[0], dim=-2), pyro.plate("points", x.shape[1], dim=-1):
            z1 = pyro.sample("z1", dist.Normal(m1, var[..., 0].sqrt()))
            if self.covariance == "diagonal":
                pyro.sample("z2", dist.Normal(m2, var[..., 1].sqrt()))
            else:  # z2 given z1
                scale = (a * d - b * c).abs() / var[..., 0].sqrt()
                pyro.sample("z2", dist.Normal(m2 + covar / var[..., 0] * (z1 - m1), scale))


def make_model(decoder):
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("trials", x.shape[0], dim=-2), pyro.plate("points", x.shape[1], dim=-1):
            z = [pyro.sample(name, dist.Normal(torch.zeros(()), 1.0)) for name in ("z1", "z2")]
            mean = decoder(torch.stack(z, -1))
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)

    return model


def rotation_angle(z, means):
    """Return the angle in (−45°, 45°] from the latents z to their estimates, both [*, N, 2].

    The orthogonal matrix that takes the estimates to z (Procrustes), but for reflections of axes
    and their order.
    """
    u, _, vh = torch.linalg.svd(z.mT @ means)
    rotation = u @ vh
    angle = torch.rad2deg(torch.atan2(rotation[..., 1, 0], rotation[..., 0, 0]))
    return 45 - (45 - angle) % 90


def rotate(angle):
    angle = torch.deg2rad(torch.as_tensor(angle, dtype=torch.float32))
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(
        -1, (2, 2)
    )


def predicted_cost(z, W, nonlinearity, amortised):
    """Return angles and what a diagonal Σ costs at each, in nats, by equations (8) and (14).

    Decoders ν(W R z), R any rotation, are all as good. To second order the best diagonal Σ costs
    ½ Σ_i log(1 + ‖J_{:i}‖²/s²), but for a constant; ‖J_{:i}‖² is averaged over the data first
    where the data share one Σ. The latents are taken to be as uncorrelated in this sample as the
    model makes them. The angles are those of :func:`rotation_angle`.
    """
    L = torch.linalg.cholesky(z.T.cov())
    true, z, W = z, z @ torch.linalg.inv(L).T, W @ L
    R = rotate(torch.arange(-449, 451) / 10)
    h = (z @ W.mT).requires_grad_()
    (slope,) = torch.autograd.grad(NONLINEARITIES[nonlinearity](h).sum(), h)
    norms = slope.square() @ (W @ R).square() / NOISE**2  # [angles, N, 2]
    if amortised:
        norms = norms.mean(1, keepdim=True)
    cost = norms.log1p().sum(-1).mean(-1) / 2
    return rotation_angle(true, z @ R), cost - cost.min()  # the latents are R⁻¹z, in rows


def run(nonlinearity, amortised, covariance, n, data_seeds, trials, num_points=4000, **kwargs):
    """Train all trials of all data sets for 5n steps; return one row for each."""
    data = [ppca_2d(num_points, nonlinearity, seed=seed) for seed in data_seeds]
    x, z = (torch.stack([getattr(d, k) for d in data]).repeat(trials, 1, 1) for k in ("x", "z"))
    pyro.clear_param_store()
    torch.manual_seed(1000 * n)
    decoder = Decoder(len(x), nonlinearity)
    guide = Guide(len(x), num_points, amortised, covariance)
    model = make_model(decoder)
    fit(
        model,
        guide,
        BetaVAE_ELBO(),
        x,
        num_steps=5 * n,
        optim=partial(torch.optim.Adam, lr=0.1),
        schedule=lambda progress: 0.1 ** min(int(5 * progress), 4),  # 0.1 to 1e-5
        progress=False,
        **kwargs,
    )
    with torch.no_grad():
        terms = BetaVAE_ELBO(num_particles=20).terms(model, guide, x)
        bound = (terms.log_likelihood - terms.kl).mean(0).reshape(len(x), num_points)
        angle = rotation_angle(z, guide.mean(x))
    return [
        {
            "nonlinearity": nonlinearity,
            "amortised": int(amortised),
            "covariance": covariance,
            "n": n,
            "data_seed": data_seeds[i % len(data)],
            "trial": i // len(data),
            "elbo": f"{bound[i].mean():.5g}",
            "elbo_se": f"{bound[i].std() / num_points**0.5:.2g}",
            "angle": f"{angle[i]:.3f}",
        }
        for i in range(len(x))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-seeds", type=int, default=5, help="draws of W, z and noise")
    parser.add_argument("--trials", type=int, default=4, help="random starts for each")
    parser.add_argument(
        "--n", type=int, nargs="+", default=[20, 100, 2000], help="of 5n steps each"
    )
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--fast", action="store_true", help="one tiny case")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if args.fast:
        args.data_seeds, args.trials, args.n, args.points = 2, 2, [4], 200
    torch.set_num_threads(1)
    start = time.time()
    with args.out.open("w", newline="") as file:
        command = f"--data-seeds {args.data_seeds} --trials {args.trials} --points {args.points}"
        file.write(
            f"# python tutorials/results/{Path(__file__).name} {command} "
            f"--n {' '.join(map(str, args.n))}\n"
            f"# two x86-64 cores, busy with other work; one thread; torch {torch.__version__}\n"
        )
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for nonlinearity in NONLINEARITIES:
            for amortised in (True, False):
                for covariance in ("diagonal", "full"):
                    for n in args.n:
                        rows = run(
                            *(nonlinearity, amortised, covariance, n),
                            *(range(args.data_seeds), args.trials, args.points),
                            compile=n >= 1000,
                        )
                        writer.writerows(rows)
                        file.flush()
                        print(
                            nonlinearity, amortised, covariance, n, f"{time.time() - start:.0f} s"
                        )
    wall = f"\n# wall time {time.time() - start:.0f} s\n"
    args.out.write_text(args.out.read_text().replace("\n", wall, 1))


if __name__ == "__main__":
    main()
