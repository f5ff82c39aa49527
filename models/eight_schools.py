"""Eight Schools, three ways that are often confused.

``eight_schools_avb`` is the posterior of the adversarial variational Bayes paper: other numbers
than Gelman's, and τ on the whole real line, so that the posterior has two mirrored modes.
``eight_schools_centered`` and ``eight_schools_noncentered`` are Gelman's data under the priors of
posteriordb. (Pyro's own example uses a third set of priors, μ ~ N(0, 10) and τ ~ HalfCauchy(25).)
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["eight_schools_avb", "eight_schools_centered", "eight_schools_noncentered"]

# The numbers that the authors of adversarial variational Bayes ran, from their public notebook.
Y_AVB = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
SIGMA_AVB = torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])

# Rubin (1981), table 1; Gelman et al., Bayesian Data Analysis, section 5.5.
Y_GELMAN = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA_GELMAN = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def _num_schools(y: Tensor | None, sigma: Tensor) -> int:
    if sigma.dim() != 1 or (y is not None and y.shape != sigma.shape):
        found = "None" if y is None else list(y.shape)
        raise ValueError(
            "y and sigma must be vectors of one length, one entry a school; "
            f"found y {found} and sigma {list(sigma.shape)}"
        )
    return len(sigma)


def eight_schools_avb(y: Tensor | None = Y_AVB, sigma: Tensor = SIGMA_AVB) -> None:
    r"""Eight Schools as in the adversarial variational Bayes paper, with a two-mode posterior.

    .. math:: \mu, \tau, \eta_j \sim N(0, 1), \qquad y_j \sim N(\mu + \tau \eta_j, \sigma_j)

    τ is *not* a scale: it lies on the whole real line. The posterior is unchanged under
    (τ, η) → (−τ, −η), so E τ = E η = 0 exactly.

    Sites: ``mu`` [], ``tau`` [], ``eta`` [J], observed ``y`` [J].

    Args:
        y: Effects of the J schools [J]; ``None`` samples them.
        sigma: Their standard errors [J].

    Raises:
        ValueError: If ``y`` and ``sigma`` are not vectors of one length.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.1
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> trace = pyro.poutine.trace(eight_schools_avb).get_trace()
        >>> [name for name, site in trace.nodes.items() if site["type"] == "sample"]
        ['schools', 'mu', 'tau', 'eta', 'y']
    """
    schools = pyro.plate("schools", _num_schools(y, sigma))
    zero, one = sigma.new_zeros(()), sigma.new_ones(())
    mu = pyro.sample("mu", dist.Normal(zero, one))
    tau = pyro.sample("tau", dist.Normal(zero, one))
    with schools:
        eta = pyro.sample("eta", dist.Normal(zero, one))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def eight_schools_centered(y: Tensor | None = Y_GELMAN, sigma: Tensor = SIGMA_GELMAN) -> None:
    r"""Gelman's Eight Schools in the centred form, whose funnel is hard for HMC and VI alike.

    .. math:: \mu \sim N(0, 5), \quad \tau \sim \text{HalfCauchy}(5), \quad
        \theta_j \sim N(\mu, \tau), \quad y_j \sim N(\theta_j, \sigma_j)

    Sites: ``mu`` [], ``tau`` [], ``theta`` [J], observed ``y`` [J].

    Args:
        y: Effects of the J schools [J]; ``None`` samples them.
        sigma: Their standard errors [J].

    Raises:
        ValueError: If ``y`` and ``sigma`` are not vectors of one length.

    References:
        | posteriordb, eight_schools-eight_schools_centered
        | https://github.com/stan-dev/posteriordb

    Example:
        >>> trace = pyro.poutine.trace(eight_schools_centered).get_trace()
        >>> trace.nodes["theta"]["value"].shape
        torch.Size([8])
    """
    schools = pyro.plate("schools", _num_schools(y, sigma))
    mu = pyro.sample("mu", dist.Normal(sigma.new_zeros(()), sigma.new_tensor(5.0)))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(5.0)))
    with schools:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor | None = Y_GELMAN, sigma: Tensor = SIGMA_GELMAN) -> None:
    r"""Gelman's Eight Schools in the non-centred form: the posterior of the centred one, easier.

    .. math:: \mu \sim N(0, 5), \quad \tau \sim \text{HalfCauchy}(5), \quad
        \tilde\theta_j \sim N(0, 1), \quad \theta_j = \mu + \tau \tilde\theta_j, \quad
        y_j \sim N(\theta_j, \sigma_j)

    Sites: ``mu`` [], ``tau`` [], ``theta_trans`` [J], deterministic ``theta`` [J], observed
    ``y`` [J].

    Args:
        y: Effects of the J schools [J]; ``None`` samples them.
        sigma: Their standard errors [J].

    Raises:
        ValueError: If ``y`` and ``sigma`` are not vectors of one length.

    References:
        | posteriordb, eight_schools-eight_schools_noncentered
        | https://github.com/stan-dev/posteriordb

    Example:
        >>> trace = pyro.poutine.trace(eight_schools_noncentered).get_trace()
        >>> trace.nodes["theta"]["value"].shape
        torch.Size([8])
    """
    schools = pyro.plate("schools", _num_schools(y, sigma))
    zero, one = sigma.new_zeros(()), sigma.new_ones(())
    mu = pyro.sample("mu", dist.Normal(zero, sigma.new_tensor(5.0)))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(5.0)))
    with schools:
        theta_trans = pyro.sample("theta_trans", dist.Normal(zero, one))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)
