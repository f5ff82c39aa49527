"""GECO's constraints against hand-computed values, brute force and planted defects."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from pyro_vae.capture import capture
from pyro_vae.constraints import (
    ClassificationAccuracy,
    FeatureReconstructionError,
    PatchCrossCorrelation,
    ReconstructionError,
)

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
X_HAT = torch.tensor([[[1.0, 2.5], [3.0, 3.0]], [[0.0, 0.0], [0.0, 0.2]]], dtype=torch.float64)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# -- reconstruction error -------------------------------------------------------------------------


def test_reconstruction_error_by_hand():
    """½² + 1² = 1.25 and 0.2² = 0.04, over four elements."""
    element, image = ReconstructionError(0.5), ReconstructionError(0.5, per="image")
    torch.testing.assert_close(element(X, X_HAT), values(1.25 / 4 - 0.25, 0.01 - 0.25))
    torch.testing.assert_close(image(X, X_HAT), values(1.25 - 0.25, 0.04 - 0.25))


def test_tolerance_is_the_root_mean_square_error_that_is_just_allowed():
    """κ² and not κ is taken off: noise of this size is at the boundary, twice of it beyond."""
    x = torch.rand(50, 28, 28, dtype=torch.float64)
    noise = torch.randn(50, 28, 28, dtype=torch.float64)
    constraint = ReconstructionError(0.1)
    # The mean of 39,200 squares of N(0, 0.01) has the standard error 0.01 √2/√39200 = 7e-5.
    assert constraint(x, x + 0.1 * noise).mean().item() == pytest.approx(0, abs=3e-4)
    assert constraint(x, x + 0.2 * noise).mean().item() == pytest.approx(0.03, abs=2e-3)
    torch.testing.assert_close(constraint(x, x), torch.full((50,), -0.01).double())


@pytest.mark.parametrize("per", ["element", "image"])
def test_relative_is_the_same_constraint_in_units_of_what_it_tolerates(per):
    plain, relative = (ReconstructionError(0.3, per, relative=r) for r in (False, True))
    torch.testing.assert_close(0.3**2 * relative(X, X_HAT), plain(X, X_HAT))
    features = [
        FeatureReconstructionError(lambda x: x.mean(-1), 0.3, per, relative=r)
        for r in (False, True)
    ]
    torch.testing.assert_close(0.3**2 * features[1](X, X_HAT), features[0](X, X_HAT))


def test_data_points_without_an_event_dimension():
    found = ReconstructionError(1.0)(values(0.0, 1.0), values(0.0, 3.0))
    torch.testing.assert_close(found, values(-1.0, 3.0))


def test_pixels_may_be_integers():
    x = torch.tensor([[0, 255]], dtype=torch.uint8)
    found = ReconstructionError(0.0)(x, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([(1 + 255**2) / 2]))


# -- features -------------------------------------------------------------------------------------


def test_feature_reconstruction_error_by_hand():
    """Row sums (3, 7) against (3.5, 6), and (0, 0) against (0, 0.2)."""

    def rows(x):
        return x.sum(-1)

    element = FeatureReconstructionError(rows, 0.5)
    image = FeatureReconstructionError(rows, 0.5, per="image")
    torch.testing.assert_close(element(X, X_HAT), values(1.25 / 2 - 0.25, 0.02 - 0.25))
    torch.testing.assert_close(image(X, X_HAT), values(1.25 - 0.25, 0.04 - 0.25))


def test_features_that_lose_what_differs_are_satisfied():
    x = torch.rand(3, 8, dtype=torch.float64)
    constraint = FeatureReconstructionError(lambda x: x.mean(-1), 0.1)
    assert (constraint(x, x.flip(-1)) <= 0).all()
    assert (ReconstructionError(0.1)(x, x.flip(-1)) > 0).all()


def network(out_dim=3):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Linear(6, out_dim),
    ).double()


@pytest.mark.parametrize(
    "make",
    [
        partial(FeatureReconstructionError, tolerance=0.1),
        partial(ClassificationAccuracy, accuracy=0.9),
    ],
)
def test_the_network_is_left_as_it_is(make):
    """No gradient, no new batch statistics, no dropout, whatever mode the loss is put into."""
    fixed = network()
    before = copy.deepcopy(fixed.state_dict())
    constraint = make(fixed).train()
    x_hat = X_HAT.clone().requires_grad_()
    first = constraint(X, x_hat)
    torch.testing.assert_close(constraint(X, x_hat), first, rtol=0, atol=0)
    first.sum().backward()
    assert x_hat.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in fixed.parameters())
    for name, value in fixed.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in fixed.parameters())


# -- classification -------------------------------------------------------------------------------


def logits(x):
    """Three classes; the logits are log probabilities."""
    return x.log()


PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)


def test_classification_accuracy_by_hand():
    """The label is x's most probable class; x̂ gives it 0.3 and 0.9."""
    x_hat = torch.tensor([[0.3, 0.6, 0.1], [0.05, 0.05, 0.9]], dtype=torch.float64)
    constraint = ClassificationAccuracy(logits, accuracy=0.8)
    torch.testing.assert_close(constraint(PROBABILITIES, x_hat), values(0.8 - 0.3, 0.8 - 0.9))


@pytest.mark.parametrize(
    "labels",
    [
        lambda x: torch.tensor([1, 0]),
        lambda x: torch.tensor([1, 0], dtype=torch.int32),
        lambda x: torch.tensor([[0, 1, 0], [1, 0, 0]]),
        lambda x: torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    ],
)
def test_labels_may_be_given(labels):
    constraint = ClassificationAccuracy(logits, accuracy=0.8, labels=labels)
    found = constraint(PROBABILITIES, PROBABILITIES)
    torch.testing.assert_close(found, values(0.8 - 0.2, 0.8 - 0.3))


def test_a_step_against_the_violation_raises_the_accuracy():
    """With the sign that the paper prints it would lower it."""
    constraint = ClassificationAccuracy(nn.Linear(4, 3).double(), accuracy=0.9)
    x = torch.randn(20, 4, dtype=torch.float64)
    x_hat = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    violation = constraint(x, x_hat)
    violation.sum().backward()
    better = constraint(x, x_hat.detach() - 0.1 * x_hat.grad)
    assert (better < violation).all()
    exact = torch.full((20,), 0.9).double() - constraint.classifier(x).softmax(-1).amax(-1)
    torch.testing.assert_close(constraint(x, x), exact)


def test_no_gradient_through_the_labels():
    x = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    x_hat = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    ClassificationAccuracy(logits, 0.9, labels=lambda x: x)(x, x_hat).sum().backward()
    assert x.grad is None
    assert x_hat.grad is not None


# -- patches --------------------------------------------------------------------------------------


def whiten(patch, min_contrast):
    vector = [*(patch - patch.mean()).flatten().tolist()]
    vector.append(min_contrast * math.sqrt(len(vector)))
    norm = math.sqrt(sum(v * v for v in vector))
    return [v / norm for v in vector]


def correlations(x, x_hat, size, stride, min_contrast=1e-2):
    """ψ(x, i)ᵀψ(x̂, i) of one image [C, H, W], one a location."""
    height, width = x.shape[-2:]
    found = []
    for i in range(0, height - size[0] + 1, stride):
        for j in range(0, width - size[1] + 1, stride):
            a, b = (
                whiten(image[:, i : i + size[0], j : j + size[1]], min_contrast)
                for image in (x, x_hat)
            )
            found.append(sum(v * w for v, w in zip(a, b, strict=True)))
    return found


@pytest.mark.parametrize("per", ["patch", "image"])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), ((2, 4), 2), (6, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_agree_with_loops(per, size, stride, channels):
    x, x_hat = torch.rand(2, 4, channels, 7, 6, dtype=torch.float64)
    x_hat = 0.7 * x + 0.3 * x_hat
    x_hat[0, :, :4] = 0.5  # some flat patches
    x[1, :, 3:] = 0.2
    size_2d = size if isinstance(size, tuple) else (size, size)
    expected = []
    for image, image_hat in zip(x, x_hat, strict=True):
        violations = [0.8 - c for c in correlations(image, image_hat, size_2d, stride)]
        expected.append(sum(violations) / (len(violations) if per == "patch" else 1))
    constraint = PatchCrossCorrelation(size, 0.8, stride=stride, per=per)
    torch.testing.assert_close(constraint(x, x_hat), values(*expected))
    flat = PatchCrossCorrelation(size, 0.8, stride, per, image_shape=(channels, 7, 6))
    torch.testing.assert_close(flat(x.flatten(1), x_hat.flatten(1)), values(*expected))
    if channels == 1:
        torch.testing.assert_close(constraint(x.squeeze(1), x_hat.squeeze(1)), values(*expected))


def test_correlation_is_the_textbook_one_where_there_is_contrast():
    """One patch of a large contrast: Pearson's correlation of its pixels."""
    x, x_hat = torch.rand(2, 1, 5, 5, dtype=torch.float64)
    pearson = torch.corrcoef(torch.stack([x.flatten(), x_hat.flatten()]))[0, 1].item()
    constraint = PatchCrossCorrelation(5, tolerance=0.5, min_contrast=1e-6)
    torch.testing.assert_close(constraint(x, x_hat), values(0.5 - pearson))
    assert PatchCrossCorrelation(5, 0.5)(x, x_hat).item() == pytest.approx(0.5 - pearson, abs=5e-3)


def test_brightness_and_contrast_do_not_count_but_structure_does():
    x = torch.rand(3, 9, 9, dtype=torch.float64)
    constraint = PatchCrossCorrelation(4, tolerance=0.9)
    torch.testing.assert_close(constraint(x, x), torch.full((3,), -0.1).double())
    assert (constraint(x, 0.5 * x + 0.3) < -0.09).all()
    assert (constraint(x, 1 - x) > 1.8).all()  # 0.9 + 1, the negative image
    assert (constraint(x, x.flip(-1)) > 0.3).all()
    assert (constraint(x, torch.zeros_like(x)) > 0.7).all()
    assert (ReconstructionError(0.1)(x, 0.5 * x + 0.3) > 0).all()


def test_flat_patches_are_satisfied_by_flat_patches_alone():
    """Else no reconstruction, however good, would do for digits on an empty background."""
    x = torch.zeros(1, 8, 8, dtype=torch.float64)
    x[:, 2:5, 2:5] = 1
    constraint = PatchCrossCorrelation(2, tolerance=0.9)
    torch.testing.assert_close(constraint(x, x), values(-0.1))
    torch.testing.assert_close(constraint(x, x + 0.3), values(-0.1))
    noisy = torch.where(x == 0, 0.1 * torch.rand_like(x), x)
    assert constraint(x, noisy).item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_finite_at_flat_patches(dtype):
    for x in (torch.zeros(2, 6, 6, dtype=dtype), torch.rand(2, 6, 6, dtype=dtype)):
        for start in (torch.zeros_like(x), torch.full_like(x, 1e4), x):
            x_hat = start.clone().requires_grad_()
            violation = PatchCrossCorrelation(3, 0.9)(x, x_hat)
            violation.sum().backward()
            assert violation.isfinite().all()
            assert x_hat.grad.isfinite().all()


def test_gradient_leads_from_a_flat_image_to_the_data():
    x = torch.rand(2, 6, 6, dtype=torch.float64)
    x_hat = torch.zeros_like(x).requires_grad_()
    constraint = PatchCrossCorrelation(3, 0.9)
    adam = torch.optim.Adam([x_hat], 0.05)
    for _ in range(200):
        adam.zero_grad()
        constraint(x, x_hat).sum().backward()
        adam.step()
    assert (constraint(x, x_hat) < 0).all()


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    x = torch.rand(1, 7, 7, dtype=torch.float64)
    x_hat = x.clone()
    x_hat[:, 6] = 0
    torch.testing.assert_close(PatchCrossCorrelation(3, 0.9, stride=3)(x, x_hat), values(-0.1))
    assert PatchCrossCorrelation(3, 0.9)(x, x_hat) > -0.1


# -- the contract of all four ---------------------------------------------------------------------

CONSTRAINTS = {
    "element": lambda: ReconstructionError(0.1),
    "image": lambda: ReconstructionError(0.1, per="image"),
    "relative": lambda: ReconstructionError(0.1, relative=True),
    "features": lambda: FeatureReconstructionError(network(), 0.1),
    "accuracy": lambda: ClassificationAccuracy(network(), 0.9),
    "patches": lambda: PatchCrossCorrelation(2, 0.9),
}


@pytest.fixture(params=CONSTRAINTS)
def constraint(request, dtype, device):
    return CONSTRAINTS[request.param]().to(device, dtype)


@pytest.fixture
def pair(dtype, device):
    x, x_hat = torch.rand(2, 5, 2, 2, dtype=dtype, device=device)
    return x, x_hat.requires_grad_()


def test_one_value_a_data_point_with_a_gradient_of_that_point(constraint, pair, dtype):
    x, x_hat = pair
    violation = constraint(x, x_hat)
    assert (violation.shape, violation.dtype) == ((5,), dtype)
    (gradient,) = torch.autograd.grad(violation[1], x_hat)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2, 3, 4]].abs().sum() == 0


def test_gradient_agrees_with_differences(constraint):
    x, x_hat = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    constraint = constraint.cpu().double()
    assert torch.autograd.gradcheck(lambda x_hat: constraint(x, x_hat), x_hat.requires_grad_())


def test_an_exact_reconstruction_satisfies(constraint, pair):
    if not isinstance(constraint, ClassificationAccuracy):  # an unsure classifier stays unsure
        x, _ = pair
        assert (constraint(x, x) < 0).all()


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda constraint: pickle.loads(pickle.dumps(constraint))]
)
def test_copies_are_alike(constraint, pair, clone):
    other = clone(constraint)
    assert repr(other) == repr(constraint)
    torch.testing.assert_close(other(*pair), constraint(*pair), rtol=0, atol=0)
    other.load_state_dict(constraint.state_dict())
    assert other.tolerance == constraint.tolerance


def test_gradient_can_be_captured_as_a_graph(constraint, pair):
    x, x_hat = (value.detach() for value in pair)

    def total(x_hat, x):
        return constraint(x, x_hat).sum()

    graph = capture(torch.func.grad(total), x_hat, x, compile=False)  # or it warns
    x, x_hat = torch.rand_like(x), torch.rand_like(x_hat)
    expected = torch.func.grad(total)(x_hat, x)
    torch.testing.assert_close(graph(x_hat, x), expected)


def test_shapes_that_differ_are_named(constraint, pair):
    x, x_hat = pair
    with pytest.raises(ValueError, match=r"x \[4, 2, 2\], x_hat \[5, 2, 2\]"):
        constraint(x[:4], x_hat)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReconstructionError(-0.1), "tolerance must not be negative, .* found -0.1"),
        (lambda: ReconstructionError(math.nan), "tolerance must .* found nan"),
        (lambda: ReconstructionError(0.1, per="pixel"), r"per must be one of .* found 'pixel'"),
        (lambda: ReconstructionError(0.0, relative=True), "tolerance must be positive .* found 0"),
        (lambda: FeatureReconstructionError(len, -1.0), "tolerance must not be negative"),
        (lambda: FeatureReconstructionError(len, 1.0, per="row"), "per must be one of"),
        (lambda: FeatureReconstructionError(3, 1.0), "expected a module or callable, found int"),
        (
            lambda: FeatureReconstructionError(torch.sum, 1.0)(X, X_HAT),
            r"features must .* found \[\] and \[\], expected \[2, ...\]",
        ),
        (lambda: ClassificationAccuracy(logits, 0.0), r"accuracy must be in \(0, 1\], found 0.0"),
        (lambda: ClassificationAccuracy(logits, 1.1), "accuracy must be in"),
        (
            lambda: ClassificationAccuracy(lambda x: x, 0.9)(X, X_HAT),
            r"classifier must .* found \[2, 2, 2\], expected \[2, K\]",
        ),
        (
            lambda: ClassificationAccuracy(logits, 0.9, lambda x: x[:, 0])(
                PROBABILITIES, PROBABILITIES
            ),
            r"labels must .* integers \[2\] or one-hot labels \[2, 3\]: found torch.float64 \[2\]",
        ),
        (
            lambda: ClassificationAccuracy(logits, 0.9, lambda x: torch.tensor([0, 3]))(
                PROBABILITIES, PROBABILITIES
            ),
            "labels must be from 0 to 2",
        ),
        (lambda: PatchCrossCorrelation(1, 0.9), "patch_size must be of two pixels or more"),
        (lambda: PatchCrossCorrelation((0, 3), 0.9), "patch_size must be"),
        (lambda: PatchCrossCorrelation(3, -0.5), "tolerance must not be negative"),
        (lambda: PatchCrossCorrelation(3, 1.5), r"a correlation in \[0, 1\], found 1.5"),
        (lambda: PatchCrossCorrelation(3, 0.9, stride=0), "stride must be at least 1, found 0"),
        (lambda: PatchCrossCorrelation(3, 0.9, per="element"), "per must be one of"),
        (lambda: PatchCrossCorrelation(3, 0.9, image_shape=(9,)), "image_shape must be"),
        (lambda: PatchCrossCorrelation(3, 0.9, min_contrast=0.0), "min_contrast must be positive"),
        (
            lambda: PatchCrossCorrelation(3, 0.9)(X, X_HAT),
            r"patch_size must fit .* found \(3, 3\), expected at most \(2, 2\)",
        ),
        (
            lambda: PatchCrossCorrelation(2, 0.9)(X.flatten(1), X_HAT.flatten(1)),
            r"found \[2, 4\], expected \[M, H, W\] or \[M, C, H, W\]",
        ),
        (
            lambda: PatchCrossCorrelation(2, 0.9, image_shape=(3, 3))(X, X_HAT),
            r"found \[2, 2, 2\], expected .*\(3, 3\)",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
