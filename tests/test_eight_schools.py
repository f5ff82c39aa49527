"""The main job's claim, against exact draws: the flow and the implicit guide find both modes."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_vae import compare
from pyro_vae.models import eight_schools_avb
from pyro_vae.models.eight_schools import SIGMA_AVB, Y_AVB


def exact_draws(num: int) -> dict[str, torch.Tensor]:
    """Draw from the posterior: τ by quadrature, the rest given τ in closed form."""
    y, variance = Y_AVB.double(), SIGMA_AVB.double() ** 2
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    covariance = torch.diag_embed(variance + grid[:, None] ** 2) + 1  # of y given τ
    evidence = MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y) - grid**2 / 2
    tau = grid[torch.multinomial(evidence.softmax(0), num, replacement=True)]
    tau = tau + (torch.rand_like(tau) - 0.5) * (grid[1] - grid[0])
    design = torch.cat([torch.ones(num, 8, 1), torch.diag_embed(tau[:, None].expand(num, 8))], -1)
    weighted = design.transpose(1, 2) / variance
    precision = torch.eye(9) + weighted @ design
    posterior = MultivariateNormal(
        torch.linalg.solve(precision, weighted @ y), precision_matrix=precision
    )
    z = posterior.sample()
    draws = {"mu": z[:, 0], "tau": tau, "eta": z[:, 1:]}
    return {name: x.float() for name, x in draws.items()}


@pytest.mark.slow
def test_flow_and_implicit_guide_find_both_modes():
    """The estimates' standard errors are near 0.02 nats."""
    comparison = compare(
        eight_schools_avb, ["flow", "implicit"], reference=exact_draws(40_000), seed=11
    )
    table = comparison.table.set_index("guide")
    assert not comparison.errors
    assert abs(table.loc["hmc", "knn_kl"]) < 4 * table.loc["hmc", "knn_kl_se"]
    assert table.loc["flow", "knn_kl"] < 0.1
    assert table.loc["implicit", "knn_kl"] < 0.25
    for guide in ("flow", "implicit"):
        assert 0.4 < (comparison.draws[guide]["tau"] > 0).mean() < 0.6
        assert table.loc[guide, "max_mean_error"] < 0.25
