"""Pictures of posteriors: what is drawn where, and that pyplot hears nothing of it."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pyro_vae.plots import plot_convergence, plot_marginals


def normal(seed, n=4000, loc=0.0, scale=1.0):
    a, b = loc + scale * np.random.default_rng(seed).normal(size=(2, n))
    return {"a": a, "b": b}


def test_one_column_a_posterior_one_row_a_pair():
    draws = {"first": normal(0), "second": normal(1), "truth": normal(2)}
    figure = plot_marginals(draws, [("a", "b"), ("b", "a"), ("a", "a")])
    axes = np.array(figure.axes).reshape(3, 3)
    assert [axis.get_title() for axis in axes[0]] == ["first", "second", "truth"]
    assert [axis.get_xlabel() for axis in axes[:, 0]] == ["a", "b", "a"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["b", "a", "density"]
    assert not any(axis.get_title() for axis in axes[1:].flat)


def test_the_last_posterior_sets_the_range():
    truth = normal(0, scale=10.0)
    figure = plot_marginals({"narrow": normal(1), "truth": truth}, [("a", "b"), ("a", "a")])
    for axis in figure.axes:
        low, high = axis.get_xlim()
        assert low < np.quantile(truth["a"], 0.01) < np.quantile(truth["a"], 0.99) < high
        assert (low, high) == figure.axes[1].get_xlim()


def test_a_heavy_tail_does_not_stretch_the_axis():
    rng = np.random.default_rng(0)
    draws = {"truth": {"a": np.exp(2 * rng.normal(size=4000)), "b": rng.normal(size=4000)}}
    low, high = plot_marginals(draws, [("a", "b")]).axes[0].get_xlim()
    assert high < 2 * np.quantile(draws["truth"]["a"], 0.99)
    assert low > -high


def test_contours_hold_the_stated_mass():
    draws = normal(0, n=40_000)
    (axis,) = plot_marginals({"truth": draws}, [("a", "b")]).axes
    lines = axis.collections[-1]
    points = np.stack([draws["a"], draws["b"]], 1)
    # One closed path a level, from the lowest: 95, 80, 50, 20 percent. The kernel, 3 bins of 0.06
    # standard deviations, widens a unit variance by 3 percent: the mass within by at most 0.02.
    found = [path.contains_points(points).mean() for path in lines.get_paths()]
    np.testing.assert_allclose(found, [0.95, 0.8, 0.5, 0.2], atol=0.03)


def test_the_area_of_a_histogram_is_the_share_in_range():
    draws = {"half": {"a": np.r_[normal(1)["a"], normal(2, loc=100.0)["a"]]}, "truth": normal(0)}
    half, truth = plot_marginals(draws, [("a", "a")]).axes
    for axis, expected in ((half, 0.5), (truth, 1.0)):
        (stairs,) = axis.patches
        values, edges, _ = stairs.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("pair", [("a", "b"), ("a", "a")])
def test_a_posterior_elsewhere_says_that_its_panel_is_empty(pair):
    draws = {"elsewhere": normal(1, loc=50.0), "truth": normal(0)}
    elsewhere, truth = plot_marginals(draws, [pair]).axes
    assert [text.get_text() for text in elsewhere.texts] == ["no draws here"]
    assert not truth.texts
    assert elsewhere.get_xlim() == truth.get_xlim()


def test_a_posterior_that_is_a_point_can_be_drawn(tmp_path):
    draws = {"point": {"a": np.zeros(100), "b": np.zeros(100)}, "truth": normal(0)}
    plot_marginals(draws, [("a", "b"), ("a", "a")]).savefig(tmp_path / "point.png")


def test_convergence_has_a_line_a_guide_and_the_baseline():
    curves = {"one": [(0, 3.0), (100, 0.1)], "two": [(0, 2.0), (50, 1.0), (100, 0.5)]}
    (axis,) = plot_convergence(curves, baseline=0.01).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == ["one", "two", "reference against itself"]
    np.testing.assert_array_equal(lines["two"].get_xydata(), curves["two"])
    assert set(lines["reference against itself"].get_ydata()) == {0.01}
    assert axis.get_xlabel() == "optimisation steps"
    assert "KL" in axis.get_ylabel()
    assert "nats" in axis.get_ylabel()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines)


def test_convergence_without_a_baseline():
    (axis,) = plot_convergence({"one": [(0, 3.0)]}).axes
    assert [line.get_label() for line in axis.lines] == ["one"]


def test_convergence_of_empty_infinite_and_negative_curves(tmp_path):
    curves = {"empty": [], "infinite": [(0, math.inf), (10, 2.0)], "below": [(0, -0.02)]}
    figure = plot_convergence(curves, baseline=-0.01)
    figure.savefig(tmp_path / "convergence.png")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines[:3]] == [0, 2, 1]
    low, high = figure.axes[0].get_ylim()
    assert low < -0.02
    assert 2.0 <= high < math.inf


def test_pyplot_is_left_alone():
    before = plt.get_fignums(), plt.get_backend()
    plot_marginals({"truth": normal(0)}, [("a", "b")])
    plot_convergence({"one": [(0, 1.0)]})
    assert (plt.get_fignums(), plt.get_backend()) == before
