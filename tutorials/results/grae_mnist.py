"""β-VAEs and GRAEs of MNIST: figures 2, 3, 4 and 7 of Kumar, Poole (2020), by small networks.

Each row of the CSV is one network: its objectives on test images, how far its decoder's Jacobian is
from orthogonal, and the Fréchet distance of its samples from the test set.
"""

import argparse
import csv
import math
import time
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import nn

import pyro_vae
from pyro_vae import fit
from pyro_vae.data import load
from pyro_vae.guides import Gaussian
from pyro_vae.losses import GRAE_ELBO, BetaVAE_ELBO, Taylor_ELBO
from pyro_vae.nn import MLP

LATENT_DIM = 12
HIDDEN = 128
BATCH = 64
FIELDS = [
    *("method", "block", "beta", "seed", "beta_vae", "taylor", "grae"),
    *("across", "within", "relation_error", "reconstruction", "frechet", "seconds"),
]


def load_images(name="mnist", train_size=None):
    """Return training images and classes, and test ones, images as rows."""
    data = load(name, train_size=train_size)
    return *((part.x.flatten(1), part.y) for part in (data.train, data.test)), data


class Point(Gaussian):
    """Guide with hardly any width: under the β-VAE's loss a plain autoencoder of small codes."""

    def get_posterior(self, x, *args):
        return dist.Normal(super().get_posterior(x).mean, 1e-3).to_event(1)


def make_decoder(x_dim, hidden=HIDDEN):
    return nn.Sequential(MLP(LATENT_DIM, x_dim, (hidden, hidden)), nn.Sigmoid())


def make_guide(x_dim, block=1, hidden=HIDDEN):
    """Make a Gaussian guide with a covariance of blocks of that size, or a point for 0."""
    kinds = {0: {}, 1: {"covariance": "diagonal"}, LATENT_DIM: {"covariance": "full"}}
    kind = kinds.get(block, {"covariance": "block", "block_size": block})
    guide = Gaussian if block else Point
    return guide(MLP(x_dim, hidden, (hidden,)), LATENT_DIM, **kind)


def make_model(decoder, batch_size=None):
    """Make the paper's model: Gaussian observations of unit variance, whatever the loss's β."""

    def model(x, variance=1.0):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=batch_size) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), variance**0.5).to_event(1), obs=x[i])

    return model


def make_loss(method, beta):
    """Return the loss of "vae" and "plain" or of "grae", the paper's GRAE≈."""
    if method == "grae":
        return GRAE_ELBO(beta, curvature="columns", num_columns=1)
    return BetaVAE_ELBO(beta)


def train(loss, x, seed, block=1, guide=None, num_steps=2000, lr=2e-3):
    """Return a decoder and a guide, Gaussian unless another is given, that minimise the loss."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    decoder = make_decoder(x.shape[1])
    guide = make_guide(x.shape[1], block) if guide is None else guide
    guide.subsample_size = BATCH
    optim = partial(torch.optim.Adam, lr=lr)
    model = make_model(decoder, BATCH)
    fit(model, guide, loss, x, num_steps=num_steps, optim=optim, progress=False)
    guide.subsample_size = None
    return decoder, guide


def trainer(method, block, x):
    """Return a function from β and a seed to a decoder and a guide trained with them.

    They are the same objects each time, and one compiled program serves all β: as the paper says,
    β times the KL is the ELBO of observations of variance β, times β.
    """
    pyro.clear_param_store()
    decoder, guide = make_decoder(x.shape[1]), make_guide(x.shape[1], block)
    networks = nn.ModuleList([decoder, guide])
    loss = pyro_vae.compile(make_loss(method, 1.0)(make_model(decoder), guide))

    def train_again(beta, seed, num_steps=2000, lr=2e-3):
        torch.manual_seed(seed)
        for layer in networks.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.Adam(networks.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _step in range(num_steps):
            optimizer.zero_grad()
            loss(x[torch.randint(len(x), (BATCH,))], torch.tensor(beta)).backward()
            optimizer.step()
            schedule.step()
        return decoder, guide

    return train_again


def with_best_covariance(model, guide, beta):
    """Return a guide of the same mean and of the covariance of equation (11)."""

    def best(x):
        with poutine.block():  # what runs in here is no part of the guide
            q = GRAE_ELBO(beta).posterior(model, guide, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return best


def objectives(model, guide, beta, x, trained=True):
    """Return the objectives (2), (7) and (13), in nats an image, without ½ log 2π a pixel.

    Where the guide's covariance is not trained, (2) is that of equation (11) in its place.
    """
    constant = x.shape[1] / 2 * math.log(2 * math.pi)
    best = guide if trained else with_best_covariance(model, guide, beta)
    pairs = {
        "beta_vae": (BetaVAE_ELBO(beta, num_particles=10), best),
        "taylor": (Taylor_ELBO(beta, curvature="gauss-newton"), best),
        "grae": (GRAE_ELBO(beta), guide),
    }
    return {
        name: sum(loss.loss(model, q, part) for part in x.split(250)) / len(x) - constant
        for name, (loss, q) in pairs.items()
    }


@torch.no_grad()
def matrices(decoder, guide, beta, x):
    """Return Σ⁻¹ of the guide and JᵀJ of the decoder at its mean, both [N, d, d]."""
    q = guide.get_posterior(x)
    covariance = q.variance.diag_embed() if guide.covariance == "diagonal" else q.covariance_matrix
    by_formula = GRAE_ELBO(beta).posterior_covariance(make_model(decoder), guide, x)
    gram = beta * (torch.linalg.inv(by_formula) - torch.eye(LATENT_DIM))
    return torch.linalg.inv(covariance), gram


def squared_cosine(gram, pairs):
    """Return the mean squared cosine between pairs of columns of J, weighted by their norms.

    The weight of a pair is the product of its squared norms, so that columns which do nothing
    count for nothing; pairs is a mask [d, d].
    """
    norms = gram.diagonal(dim1=-2, dim2=-1)
    weights = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return ((gram.square() * pairs).sum() / (weights * pairs).sum()).item()


def structure(decoder, guide, beta, x, block):
    """Return what of JᵀJ lies within the guide's blocks and across them; how far (11) is off."""
    precision, gram = matrices(decoder, guide, beta, x)
    index = torch.arange(LATENT_DIM) // max(block, 1)
    same = index[:, None] == index
    found = precision - (torch.eye(LATENT_DIM) + gram / beta)
    error = (torch.linalg.matrix_norm(found) / torch.linalg.matrix_norm(precision)).mean().item()
    within = squared_cosine(gram, same & ~torch.eye(LATENT_DIM, dtype=torch.bool))
    return {"across": squared_cosine(gram, ~same), "within": within, "relation_error": error}


def train_classifier(x, y, num_epochs=3):
    """Return a classifier, features of 64 numbers and a linear layer."""
    torch.manual_seed(0)
    features = nn.Sequential(MLP(x.shape[1], 64, (256,), nn.ReLU), nn.ReLU())
    classifier = nn.Sequential(features, nn.Linear(64, int(y.max()) + 1))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _epoch in range(num_epochs):
        for i in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(x[i]), y[i]).backward()
            optimizer.step()
    return classifier


@torch.no_grad()
def frechet_distance(classifier, a, b):
    """Return ‖μ_a − μ_b‖² + tr(S_a + S_b − 2 (S_a S_b)^½) of the features of two sets of images."""
    a, b = (classifier[0](images).double() for images in (a, b))
    root = torch.linalg.eigh(a.T.cov())
    root = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt() @ root.eigenvectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross
    ).item()


@torch.no_grad()
def draw(decoder, num, seed=0):
    """Return the decoder's means at draws from the prior."""
    return decoder(torch.randn(num, LATENT_DIM, generator=torch.Generator().manual_seed(seed)))


def run(train, method, block, beta, seed, test_x, classifier, num_steps=2000, num_test=1000):
    """Train a network and return its row."""
    start = time.time()
    decoder, guide = train(beta, seed, num_steps)
    half = test_x[: len(test_x) // 2]
    with torch.no_grad():
        error = (decoder(guide.get_posterior(half).mean) - half).square().sum(-1).mean().item()
    row = {
        **objectives(make_model(decoder), guide, beta, test_x[:num_test], method == "vae"),
        **structure(decoder, guide, beta, test_x[:500], block),
        "reconstruction": error,
        "frechet": frechet_distance(classifier, draw(decoder, len(half)), half),
    }
    if method != "vae":  # no covariance was trained
        row["relation_error"] = math.nan
    numbers = {name: f"{value:.5g}" for name, value in row.items()}
    key = {"method": method, "block": block, "beta": beta, "seed": seed}
    return key | numbers | {"seconds": f"{time.time() - start:.0f}"}


METHODS = {  # and the β for each
    ("vae", 1): (0.1, 0.2, 0.4, 0.7, 1.0),
    ("grae", 1): (0.1, 0.2, 0.4, 0.7, 1.0),
    ("vae", 2): (0.1, 0.2, 0.4, 0.7, 1.0),
    ("vae", 3): (0.1, 0.2, 0.4, 0.7, 1.0),
    ("vae", LATENT_DIM): (0.4, 1.0),
    ("plain", 0): (0.4,),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="mnist", help="a data set of pyro_vae.data.load")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--fast", action="store_true", help="two tiny cases on digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if args.fast:
        args.data, args.steps = "digits", 20
    torch.set_num_threads(1)
    start = time.time()
    (x, y), (test_x, test_y), data = load_images(args.data)
    classifier = train_classifier(x, y)
    first, second = test_x.tensor_split(2)
    with torch.no_grad():
        accuracy = (classifier(test_x).argmax(-1) == test_y).float().mean()
    with args.out.open("w", newline="") as file:
        seeds = " ".join(map(str, args.seeds))
        file.write(
            f"# python tutorials/results/{Path(__file__).name} --data {args.data} --seeds {seeds} "
            f"--steps {args.steps}\n"
            f"# two x86-64 cores, busy with other work; one thread; torch {torch.__version__}\n"
            f"# {data}\n"
            f"# features: a classifier of accuracy {accuracy:.4f} on the test set\n"
            f"# Fréchet distance of the halves of the test set: "
            f"{frechet_distance(classifier, second, first):.4f}\n"
        )
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for (method, block), betas in list(METHODS.items())[: 2 if args.fast else None]:
            train_again = trainer(method, block, x)
            for beta in betas[: 1 if args.fast else None]:
                for seed in args.seeds[: 1 if args.fast else None]:
                    case = method, block, beta, seed
                    row = run(train_again, *case, test_x, classifier, args.steps)
                    writer.writerow(row)
                    file.flush()
                    print(*row.values())
    wall = f"\n# wall time {time.time() - start:.0f} s\n"
    args.out.write_text(args.out.read_text().replace("\n", wall, 1))


if __name__ == "__main__":
    main()
