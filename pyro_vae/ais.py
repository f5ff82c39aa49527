"""Annealed importance sampling of log p(x): a lower bound, and an upper one on simulated data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capture import capture
from .joint import Estimate, Joint, check_least, chunks, evaluation_mode, log_mean_weight
from .mcmc.kernel import end as accept_or_reject
from .threads import one_thread_if_small
from .unconstrained import _no_validation

__all__ = ["AIS", "BDMC", "ais", "bdmc", "sigmoid_schedule"]

TARGET_ACCEPT = 0.65  # Wu et al., and optimal for HMC in high dimensions (Neal, 2011)
ADAPTATION_RATE = 0.2  # of log ε, per unit of the acceptance probability's error
INITIAL_STEP_SIZE = 0.1
STEP_SIZES = (1e-4, 1.0)
COMPILE_FROM = 50_000  # gradients: compilation takes seconds


class AIS(NamedTuple):
    """What annealed importance sampling found.

    Attributes:
        log_evidence: The estimate of the mean log p(x), a lower bound in expectation. Where its
            ``effective`` chains are fewer than 2, its standard error is not to be trusted.
        log_weights: Of each chain [C, N].
        z: Where the chains ended [C, N, d]: with these weights, draws from p(z|x).
        accept_prob: The mean acceptance probability of each chain [C, N], which step sizes are
            adapted to: near ``target_accept`` however poorly chains mix, and no sign of a good
            estimate. That is the gap of :func:`bdmc`.
    """

    log_evidence: Estimate
    log_weights: Tensor
    z: Tensor
    accept_prob: Tensor


class BDMC(NamedTuple):
    """The two sides of bidirectional Monte Carlo, on data drawn from the model.

    Attributes:
        lower: The mean log p(x) by AIS, a lower bound in expectation.
        upper: By the chains that run backwards from exact draws of p(z|x), an upper bound. Its
            standard error, and that of the gap, is from the spread over examples: chains from
            one draw are not independent.
        gap: upper − lower, and with it the largest error of AIS on data such as these.
        z: The latents that the data were made of [N, d].
        x: The data [N, *event].
    """

    lower: Estimate
    upper: Estimate
    gap: Estimate
    z: Tensor
    x: Tensor


def sigmoid_schedule(num_temperatures: int, scale: float = 4.0) -> Tensor:
    r"""Return inverse temperatures 0 = β₀ < … < β_T = 1, dense near both ends.

    .. math:: \tilde β_t = σ(δ (2t/T - 1)), \qquad
        β_t = \frac{\tilde β_t - \tilde β_0}{\tilde β_T - \tilde β_0}

    Args:
        num_temperatures: T.
        scale: δ.

    Returns:
        The T + 1 numbers, in float64.

    References:
        | On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov,
        | Grosse, 2017), section 2 and its code
        | https://arxiv.org/abs/1611.04273

    Example:
        >>> sigmoid_schedule(4)
        tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    check_least(num_temperatures=(num_temperatures, 1))
    t = torch.linspace(-scale, scale, num_temperatures + 1, dtype=torch.float64).sigmoid()
    return (t - t[0]) / (t[-1] - t[0])


class _State(NamedTuple):
    """Chains [C, n], their positions [C, n, d], both log densities and their gradients."""

    z: Tensor
    log_prior: Tensor
    log_likelihood: Tensor
    prior_gradient: Tensor
    likelihood_gradient: Tensor


class _Annealer:
    """HMC transitions at any temperature, for C chains of each of n examples, as one batch."""

    def __init__(
        self,
        joint: Joint,
        x: Tensor,
        num_chains: int,
        num_steps: int,
        target_accept: float,
        *,
        compile: bool,
    ) -> None:
        self.num_steps = num_steps
        self.target_accept = target_accept
        dtype = joint.prior(1).sample().dtype
        z = x.new_zeros((num_chains, len(x), joint.latent_dim), dtype=dtype)
        scalar = z.new_ones(())

        def densities(z: Tensor, x: Tensor) -> _State:
            def total(log_density: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, Tensor]:
                def value(z: Tensor) -> tuple[Tensor, Tensor]:
                    result = log_density(z, *args)
                    return result.sum(), result

                return torch.func.grad(value, has_aux=True)(z)

            prior_gradient, log_prior = total(joint.log_prior)
            likelihood_gradient, log_likelihood = total(joint.log_likelihood, x)
            return _State(z, log_prior, log_likelihood, prior_gradient, likelihood_gradient)

        def force(state: Any, beta: Tensor) -> Tensor:
            return state.prior_gradient + beta * state.likelihood_gradient

        def leapfrog(
            state: Any, momentum: Tensor, step_size: Tensor, beta: Tensor, x: Tensor
        ) -> tuple[Any, Tensor]:
            state = _State(*state)
            half = step_size / 2
            momentum = momentum + half * force(state, beta)
            state = densities(state.z + step_size * momentum, x)
            return tuple(state), momentum + half * force(state, beta)

        def finish(
            old: Any, new: Any, start: Tensor, end: Tensor, uniform: Tensor, beta: Tensor
        ) -> tuple[Any, Tensor]:
            old, new = _State(*old), _State(*new)

            def potential(state: _State) -> Tensor:
                return -(state.log_prior + beta * state.log_likelihood)

            before = potential(old) + start.square().sum(-1) / 2
            one = torch.ones_like(beta)
            *_, accept_prob, accepted, _, _ = accept_or_reject(
                old.z,
                potential(old),
                force(old, beta),
                new.z,
                potential(new),
                force(new, beta),
                end,
                before,
                uniform,
                one,
            )
            row = accepted.unsqueeze(-1)
            chosen = [
                torch.where(row if b.dim() > accepted.dim() else accepted, b, a)
                for a, b in zip(old, new, strict=True)
            ]
            return tuple(chosen), accept_prob

        with torch.no_grad(), _no_validation():
            self._densities = capture(densities, z, x, compile=False)
            state = tuple(self._densities(z, x))
            graph = self._densities.graph
            values = [] if graph is None else [node.meta.get("val") for node in graph.graph.nodes]
            #: How many numbers the largest of its operations is over.
            self.size = max([z.numel(), *(v.numel() for v in values if isinstance(v, Tensor))])
            inputs = (state, z, z.new_ones((len(x), 1)), scalar, x)
            uniform = state[1]
            # Compiled programs have as many threads as there were when they were compiled.
            with one_thread_if_small(self.size, x.device):
                self._leapfrog = capture(leapfrog, *inputs, compile=compile)
                self._finish = capture(finish, state, state, z, z, uniform, scalar, compile=compile)

    def start(self, z: Tensor, x: Tensor) -> Any:
        return tuple(self._densities(z, x))

    def step(self, state: Any, step_size: Tensor, beta: Tensor, x: Tensor) -> tuple[Any, Tensor]:
        """Make one transition that leaves p(z) p(x|z)^β as it is; return acceptance [C, n] too."""
        start = torch.randn_like(state[0])
        uniform = torch.rand_like(state[1])
        new, momentum = state, start
        for _ in range(self.num_steps):
            new, momentum = self._leapfrog.run(new, momentum, step_size, beta, x)
        return self._finish.run(state, new, start, momentum, uniform, beta)


class _Run(NamedTuple):
    log_weights: Tensor  # [C, n]
    z: Tensor  # [C, n, d]
    accept_prob: Tensor  # [C, n]


def _forward(annealer: _Annealer, x: Tensor, z: Tensor, betas: Tensor) -> tuple[_Run, list[Tensor]]:
    """Run chains from β = 0 to 1 and sum (β_t − β_{t−1}) log p(x|z_{t−1}).

    The last chain of each example is the scout. Returns the run of the others, and the step sizes
    [n, 1] of each temperature.
    """
    state = annealer.start(z, x)
    log_weights = torch.zeros_like(state[2], dtype=torch.float64)
    accepted = torch.zeros_like(state[1])
    low, high = (math.log(size) for size in STEP_SIZES)
    log_step_size = torch.full_like(z[-1, :, :1], math.log(INITIAL_STEP_SIZE))
    step_sizes = []
    for beta, increment in zip(betas[1:].to(z), betas.diff().tolist(), strict=True):
        log_weights += increment * state[2].double()
        step_sizes.append(log_step_size.exp())
        state, accept_prob = annealer.step(state, step_sizes[-1], beta, x)
        accepted += accept_prob
        change = ADAPTATION_RATE * (accept_prob[-1] - annealer.target_accept)
        log_step_size = (log_step_size + change.unsqueeze(-1)).clamp(low, high)
    run = _Run(log_weights, state[0], accepted / len(step_sizes))
    return _Run(*(part[:-1] for part in run)), step_sizes


def _backward(
    annealer: _Annealer, x: Tensor, z: Tensor, betas: Tensor, step_sizes: list[Tensor]
) -> Tensor:
    """Run chains from β = 1 to 0; return the log weights [C, n] of the same paths forwards."""
    state = annealer.start(z, x)
    log_weights = torch.zeros_like(state[2], dtype=torch.float64)
    steps = list(zip(betas[1:].to(z), betas.diff().tolist(), step_sizes, strict=True))
    for beta, increment, step_size in reversed(steps):
        state, _ = annealer.step(state, step_size, beta, x)
        log_weights += increment * state[2].double()
    return log_weights[:-1]


class _Settings:
    """The arguments that ``ais`` and ``bdmc`` share, checked."""

    def __init__(
        self,
        num_temperatures: int,
        num_chains: int,
        num_leapfrog_steps: int,
        target_accept: float,
        chunk_size: int,
        compile: bool | None,
        num_examples: int,
    ) -> None:
        check_least(num_chains=(num_chains, 1), num_leapfrog_steps=(num_leapfrog_steps, 1))
        check_least(chunk_size=(chunk_size, num_chains + 1))  # an example's run side by side
        if not 0 < target_accept < 1:
            raise ValueError(f"target_accept must be between 0 and 1, found {target_accept}")
        self.betas = sigmoid_schedule(num_temperatures)
        self.num_chains = num_chains
        self.num_steps = num_leapfrog_steps
        self.target_accept = target_accept
        self.num_rows = min(num_examples, chunk_size // (num_chains + 1))
        num_gradients = num_temperatures * num_leapfrog_steps
        num_gradients *= math.ceil(num_examples / self.num_rows)
        self.compile = num_gradients >= COMPILE_FROM if compile is None else compile

    def annealer(self, joint: Joint, x: Tensor) -> _Annealer:
        return _Annealer(
            joint,
            self.padded(x),
            self.num_chains + 1,
            self.num_steps,
            self.target_accept,
            compile=self.compile,
        )

    def padded(self, x: Tensor) -> Tensor:
        """Fill a chunk up to the size that the programs were made for."""
        x = x[: self.num_rows]
        return torch.cat([x, x[:1].expand(self.num_rows - len(x), *x.shape[1:])]).contiguous()


def ais(
    model: Callable,
    x: Tensor,
    num_temperatures: int = 1000,
    num_chains: int = 5,
    *,
    num_leapfrog_steps: int = 10,
    target_accept: float = TARGET_ACCEPT,
    chunk_size: int = 4096,
    compile: bool | None = None,
) -> AIS:
    r"""Estimate log p(x) by annealed importance sampling with HMC transitions.

    .. math:: p_t(z) \propto p(z) \, p(x|z)^{β_t}, \qquad
        \log w = \sum_{t=1}^T (β_t - β_{t-1}) \log p(x|z_{t-1}), \qquad
        \log p(x) \approx \log \tfrac{1}{C} \sum_c w_c

    z₀ is a draw from the prior, z_t one from z_{t−1} by a transition of Hamiltonian Monte Carlo
    that leaves p_t as it is, β those of :func:`sigmoid_schedule`. No guide takes part: the estimate
    knows nothing of q(z|x), and is a lower bound in expectation however well the chains mix.

    All chains of all examples are one batch. Step sizes follow the temperatures: each example has
    one more chain, the *scout*, whose log ε moves by 0.2 times the difference of its acceptance
    probability from ``target_accept``; the others take its step sizes, and it has no weight.
    The paper's code adapts each chain to its own past. Then p_t is not left as it is, and on a
    linear-Gaussian model such an estimate was found 0.2 nats *above* the truth.

    Args:
        model: A :class:`~pyro_vae.models.VAE`, or a Pyro model with one plate of data, one latent
            and one observed site.
        x: Data [N, \*event].
        num_temperatures: T.
        num_chains: C, for each example.
        num_leapfrog_steps: Of each transition.
        target_accept: The acceptance probability that step sizes are adapted to.
        chunk_size: How many chains run at once, those of at least one example.
        compile: Whether to compile the leapfrog step, which takes seconds; by default from 50,000
            of them on.

    Raises:
        ValueError: For numbers out of range, or a model or data that :class:`Joint` refuses.

    References:
        | Annealed importance sampling (Neal, 2001)
        | https://arxiv.org/abs/physics/9803008

        | On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov,
        | Grosse, 2017)
        | https://arxiv.org/abs/1611.04273

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> x = torch.randn(20, 1) * 2**0.5
        >>> estimate = ais(model, x, num_temperatures=100).log_evidence
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x).mean()
        >>> bool((exact - estimate.value).abs() < 0.1)
        True
    """
    settings = _Settings(
        num_temperatures,
        num_chains,
        num_leapfrog_steps,
        target_accept,
        chunk_size,
        compile,
        max(len(x), 1),
    )
    joint = Joint(model, x)
    with torch.no_grad(), evaluation_mode(model):
        annealer = settings.annealer(joint, x)
        with one_thread_if_small(annealer.size, x.device):
            runs = [run for _, run, _ in _forward_chunks(joint, annealer, settings, x)]
    log_weights, z, accept_prob = (torch.cat(parts, 1) for parts in zip(*runs, strict=True))
    return AIS(_log_mean(log_weights), log_weights, z, accept_prob)


def _forward_chunks(
    joint: Joint, annealer: _Annealer, settings: _Settings, x: Tensor
) -> Iterator[tuple[slice, _Run, list[Tensor]]]:
    """Yield the examples of each chunk, their run, and the step sizes with the padding."""
    for rows in chunks(len(x), settings.num_rows):
        batch = settings.padded(x[rows])
        z = joint.prior(len(batch)).sample((settings.num_chains + 1,))
        run, step_sizes = _forward(annealer, batch, z, settings.betas)
        yield rows, _Run(*(part[:, : len(x[rows])] for part in run)), step_sizes


def _log_mean(log_weights: Tensor) -> Estimate:
    return log_mean_weight(
        log_weights.logsumexp(0), (2 * log_weights).logsumexp(0), len(log_weights)
    )


def bdmc(
    model: Callable,
    x: Tensor,
    num_temperatures: int = 1000,
    num_chains: int = 5,
    *,
    num_leapfrog_steps: int = 10,
    target_accept: float = TARGET_ACCEPT,
    chunk_size: int = 4096,
    compile: bool | None = None,
) -> BDMC:
    r"""Bound log p(x) of data drawn from the model from both sides.

    z ~ p(z), x ~ p(x|z): then z is an exact draw from p(z|x), and the chain of :func:`ais` can run
    backwards from it, from β = 1 to 0. One over its weight has the expectation 1/p(x), so that

    .. math:: \mathbb{E} \left[ -\log \tfrac{1}{C} \sum_c w_c^{-1} \right] \ge \log p(x)

    and the two sides hold the truth between them. That says how far :func:`ais` with the same
    settings can be from the truth, for this model on data such as it makes.

    Args:
        model: As in :func:`ais`.
        x: Data [N, \*event]; as many are drawn, of the same shape. Its values are not looked at.
        num_temperatures: T, and the rest as in :func:`ais`.
        num_chains: C.
        num_leapfrog_steps: Of each transition.
        target_accept: The acceptance probability that step sizes are adapted to.
        chunk_size: How many chains run at once.
        compile: Whether to compile the leapfrog step.

    Raises:
        ValueError: As :func:`ais`.

    References:
        | Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani,
        | Adams, 2015)
        | https://arxiv.org/abs/1511.02543

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> found = bdmc(model, torch.zeros(50, 1), num_temperatures=100)
        >>> bool(found.gap.value < 0.1)
        True
    """
    settings = _Settings(
        num_temperatures,
        num_chains,
        num_leapfrog_steps,
        target_accept,
        chunk_size,
        compile,
        max(len(x), 1),
    )
    joint = Joint(model, x)
    forwards, backwards = [], []
    with torch.no_grad(), evaluation_mode(model):
        z, x = joint.sample(len(x))
        annealer = settings.annealer(joint, x)
        with one_thread_if_small(annealer.size, x.device):
            for rows, run, step_sizes in _forward_chunks(joint, annealer, settings, x):
                # The forward run knows x alone: its step sizes do not depend on z, given x.
                start = settings.padded(z[rows]).expand(num_chains + 1, -1, -1).contiguous()
                batch = settings.padded(x[rows])
                log_weights = _backward(annealer, batch, start, settings.betas, step_sizes)
                forwards.append(run.log_weights)
                backwards.append(log_weights[:, : len(x[rows])])
    lower = _log_mean(torch.cat(forwards, 1))
    inverse = _log_mean(-torch.cat(backwards, 1))
    assert lower.per_example is not None
    assert inverse.per_example is not None
    upper = -inverse.per_example
    gap = upper - lower.per_example
    num = len(gap)
    spread = gap.std() if num > 1 else gap.new_tensor(torch.nan)
    error = float(spread / num**0.5)
    errors = spread.expand(num)
    return BDMC(
        lower,
        Estimate(float(upper.mean()), error, upper, errors),
        Estimate(float(gap.mean()), error, gap, errors),
        z,
        x,
    )
