"""Two processes with half a batch each take the step that one takes with the whole batch.

This file is a script as well: the processes run it. They work in double precision on the same
random numbers as one process would, each on its rows of them, so that nothing but the sums' order
differs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.distributed import average, gather, num_processes
from pyro_vae.divergences import MMD, Adversarial, Stein
from pyro_vae.guides import Gaussian, Implicit
from pyro_vae.losses import (
    AVB_ELBO,
    DVAE_ELBO,
    GECO_ELBO,
    GRAE_ELBO,
    IWAE_ELBO,
    BetaVAE_ELBO,
    InfoVAE_ELBO,
    KLSchedule,
    Taylor_ELBO,
)
from pyro_vae.nn import MLP, JointDiscriminator, ResidualDiscriminator
from pyro_vae.ratios import AdaptiveContrast, show_parameters

N, D, PIXELS = 8, 2, 5
NUM_STEPS = 3  # of each loss: its state takes part


def discriminator() -> nn.Module:
    """One that has learned something: its last layer is not zero."""
    network = ResidualDiscriminator(D, 8, 1)
    nn.init.normal_(network.output.weight)
    return network


LOSSES: dict[str, Callable] = {
    "BetaVAE": BetaVAE_ELBO,
    "BetaVAE, schedule": lambda: BetaVAE_ELBO(KLSchedule(n_steps_kl_warmup=4, min_kl_weight=0.1)),
    # between the KL of the halves: in one of them nothing is to be learned
    "BetaVAE, free bits": lambda: BetaVAE_ELBO(free_bits=0.237),
    "InfoVAE, MMD": lambda: InfoVAE_ELBO(0.5, 20.0),
    "InfoVAE, biased MMD": lambda: InfoVAE_ELBO(0.5, 20.0, MMD("imq", unbiased=False)),
    "InfoVAE, particles": lambda: InfoVAE_ELBO(
        1.0, 20.0, num_particles=2, vectorize_particles=True, max_plate_nesting=1
    ),
    "InfoVAE, Stein": lambda: InfoVAE_ELBO(0.0, 20.0, Stein()),
    "InfoVAE, adversarial": lambda: InfoVAE_ELBO(0.0, 20.0, Adversarial(discriminator())),
    "InfoVAE, saturating": lambda: InfoVAE_ELBO(
        0.0, 20.0, Adversarial(discriminator(), "saturating")
    ),
    "GECO": lambda: GECO_ELBO(tolerance=0.5, decay=0.9),
    "IWAE": lambda: IWAE_ELBO(3, max_plate_nesting=1),
    "IWAE, DReG": lambda: IWAE_ELBO(3, doubly_reparameterized=True, max_plate_nesting=1),
    "DVAE": lambda: DVAE_ELBO(0.3, mix=0.4),
    "DIWAE": lambda: DVAE_ELBO(0.3, elbo=IWAE_ELBO(3, max_plate_nesting=1)),
    "DVAE, GECO": lambda: DVAE_ELBO(0.3, elbo=GECO_ELBO(tolerance=0.5)),
    "GRAE": GRAE_ELBO,
    "GRAE, first order": lambda: GRAE_ELBO(curvature="first-order", orthogonality=0.1),
    "Taylor": Taylor_ELBO,
    "AVB, implicit": lambda: AVB_ELBO(num_particles=1),
    "AVB, basis": lambda: AVB_ELBO(num_particles=1),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = MLP(D, PIXELS, (8,))

    def forward(self, x: Tensor) -> None:
        show_parameters(self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)


def make(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, elbo = Model(), LOSSES[name]()
    if name.startswith("AVB"):
        t = JointDiscriminator(PIXELS, D, (8,))
        for network in (t.joint, t.of_x, t.of_z):
            nn.init.normal_(network[-1].weight)
        guide: nn.Module = Implicit(
            MLP(PIXELS, 8, (8,)),
            D,
            noise="basis" if "basis" in name else "features",
            hidden_dims=(8,),
            num_moment_particles=4,
            discriminator=t,
        )
    else:
        guide = Gaussian(MLP(PIXELS, 8, (8,)), D, covariance="full")
    return model.double(), guide.double(), elbo.double()


def steps(name: str, x: Tensor) -> dict[str, Tensor]:
    """Return gradients of both players, averaged over processes, and the loss's state."""
    model, guide, elbo = make(name)
    modules = nn.ModuleDict({"model": model, "guide": guide, "loss": elbo})
    learned = name.startswith("AVB") or elbo.needs_adversary
    found: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        for player, loss in (("guide", elbo.differentiable_loss), ("adversary", elbo.adversary)):
            if player == "adversary" and not learned:
                continue
            modules.zero_grad()
            value = loss(model, guide, x) / (len(x) if player == "guide" else 1)
            value.backward()
            found[f"{step} {player}"] = average(value.detach())
            for key, param in modules.named_parameters():
                if param.grad is not None:
                    found[f"{step} {player} {key}"] = average(param.grad)
    found |= {f"buffer {key}": value for key, value in elbo.named_buffers()}
    return {key: value.clone() for key, value in found.items()}


class SharedNoise:
    """Random numbers of the joint batch, of which a process sees its rows: dimension −2 of N."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.generator = torch.Generator()

    def restart(self) -> None:
        self.generator.manual_seed(1)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = tuple(shape)
        own = N // self.size
        assert shape[-2] == own, shape
        joint = (*shape[:-2], N, shape[-1])
        noise = torch.empty(joint, dtype=dtype).normal_(generator=self.generator)
        return noise[..., self.rank * own : (self.rank + 1) * own, :]

    def install(self) -> None:
        import torch.distributions.multivariate_normal as multivariate
        import torch.distributions.normal as normal

        def standard_normal(shape, dtype, device):  # type: ignore[no-untyped-def]
            return self.normal(shape, dtype)

        def sample(self_, sample_shape=()):  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return self_.rsample(torch.Size(sample_shape))

        normal._standard_normal = multivariate._standard_normal = standard_normal
        normal.Normal.sample = sample

        def randn(*size, dtype=None, device=None):  # type: ignore[no-untyped-def]
            size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self.normal(size, dtype or torch.get_default_dtype())

        self.randn, self.randn_like = torch.randn, torch.randn_like
        torch.randn = randn
        torch.randn_like = lambda x: self.normal(x.shape, x.dtype)

    def uninstall(self) -> None:
        torch.randn, torch.randn_like = self.randn, self.randn_like


def all_losses(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    x = torch.randn(N, PIXELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own = N // size
    found = {}
    noise = SharedNoise(rank, size)
    for name in LOSSES:
        made = make(name)  # what it draws is no noise
        del made
        noise.restart()
        noise.install()
        original = globals()["make"]

        def quietly(name: str, noise: SharedNoise = noise, original: Callable = original):  # type: ignore[no-untyped-def]
            noise.uninstall()
            try:
                return original(name)
            finally:
                noise.install()

        globals()["make"] = quietly
        try:
            found[name] = steps(name, x[rank * own : (rank + 1) * own])
        finally:
            globals()["make"] = original
            noise.uninstall()
    return found


def primitives(rank: int) -> dict[str, Tensor]:
    """Gather parts of different lengths, average, and take the gradient of a function of both."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    own = (z[:2] if rank == 0 else z[2:]).requires_grad_()
    mean = average(own.mean(0))
    (gather(own).square().sum() + mean.exp().sum()).backward()
    contrast = AdaptiveContrast(z.new_zeros(2), z.new_ones(2), decay=0.0)
    contrast.adapt(own)
    return {
        "gathered": gather(own).detach(),
        "grad": own.grad,
        "mean": mean.detach(),
        "loc": contrast.loc,
        "scale": contrast.scale,
    }


def main(rank: str, directory: str) -> None:
    torch.set_num_threads(1)
    file = Path(directory) / "rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=int(rank), world_size=2
    )
    assert num_processes() == 2
    found = {"two": all_losses(int(rank), 2), "primitives": primitives(int(rank))}
    torch.distributed.destroy_process_group()
    if rank == "0":
        found["one"] = all_losses(0, 1)
    torch.save(found, Path(directory) / f"{rank}.pt")


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found."""
    directory = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(directory)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_take_the_step_of_the_joint_batch(name, found):
    one = found[0]["one"][name]
    assert sum(value.abs().sum() > 0 for value in one.values()) > NUM_STEPS  # something to compare
    for rank in range(2):
        two = found[rank]["two"][name]
        assert set(two) == set(one)
        for key, expected in one.items():
            torch.testing.assert_close(two[key], expected, rtol=1e-9, atol=1e-11, msg=key)


def test_every_loss_is_here():
    import pyro_vae.losses as losses

    tested = {type(make(name)[2]).__name__ for name in LOSSES}
    exported = {name for name in losses.__all__ if name.endswith("_ELBO")}
    assert tested == exported


@pytest.mark.slow
def test_parts_of_different_lengths_are_gathered_with_gradients(found):
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parts = [z[:2], z[2:]]
    means = torch.stack([part.mean(0) for part in parts]).mean(0)
    for rank in range(2):
        mine = found[rank]["primitives"]
        assert torch.equal(mine["gathered"], z)
        torch.testing.assert_close(mine["mean"], means)
        # of the sum of both processes' losses: twice 2z, and through the average of two means
        expected = 4 * parts[rank] + means.exp() / len(parts[rank])
        torch.testing.assert_close(mine["grad"], expected)
        torch.testing.assert_close(mine["loc"], z.mean(0))
        torch.testing.assert_close(mine["scale"], z.std(0))


def test_one_process_gets_back_what_it_gave():
    x = torch.randn(3, 2)
    assert gather(x) is x
    assert average(x) is x
    assert num_processes() == 1


if __name__ == "__main__":
    main(*sys.argv[1:])
