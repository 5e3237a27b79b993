"""Figures: the difference map's convention, what stands in a sheet, the same bytes from the same figure."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.image import imread
from matplotlib.text import Text

from prism_lib.reporting import plots

mpl.use("Agg")
IMAGES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def drawn(figure):
    """The pixel arrays of a figure's image axes, in order."""
    return [axis.images[0] for axis in figure.axes if axis.images]


def test_sheet_shows_original_edit_truth_and_difference():
    edited = IMAGES + 0.1
    figure = plots.counterfactual_sheet(IMAGES, edited, IMAGES, notes=["1", "2", "3"], title="Removal")
    shown = drawn(figure)
    assert len(shown) == 3 * 4
    assert torch.equal(torch.tensor(shown[0].get_array()), IMAGES[0, 0])
    assert torch.equal(torch.tensor(shown[1].get_array()), edited[0, 0])
    headings = [axis.get_title() for axis in figure.axes[:4]]
    assert headings == ["original", "counterfactual", "true counterfactual", "signed difference"]
    assert "brighter" in figure.axes[-1].get_xlabel()  # the colour bar
    assert len(drawn(plots.counterfactual_sheet(IMAGES, edited))) == 3 * 3


def test_brighter_is_red_darker_is_blue_unchanged_is_white():
    image = torch.full((1, 2, 2), 0.5)
    edited = image + torch.tensor([[[0.5, -0.5], [0.0, 0.0]]])
    shown = plots.counterfactual_sheet(image[None], edited[None]).axes[2].images[0]
    red, blue, white = shown.to_rgba(torch.tensor([0.5, -0.5, 0.0]).numpy())
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    assert min(white[:3]) > 0.95
    assert shown.get_clim() == (-0.5, 0.5)
    assert shown.get_array().tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_grid_holds_every_image_gray_and_colour():
    assert len(drawn(plots.show_grid(IMAGES, ["a", "b", "c"], columns=2, title="Three"))) == 3
    colour = drawn(plots.show_grid(IMAGES.expand(3, 3, 16, 16)))
    assert colour[0].get_array().shape == (16, 16, 3)


def test_curves_and_dots_draw_the_numbers():
    figure = plots.curves(
        {"loss": ([1, 2, 3], [0.3, 0.2, 0.1]), "other": ([1, 2], [1, 2])},
        xlabel="step",
        ylabel="loss",
    )
    axis = figure.axes[0]
    assert axis.lines[0].get_ydata().tolist() == [0.3, 0.2, 0.1]
    assert [text.get_text() for text in figure.legends[0].texts] == ["loss", "other"]
    dots = plots.dot_plot({"remove_x": (0.5, 0.4, 0.6)}, xlabel="CPG").axes[0]
    assert dots.lines[0].get_xdata().tolist() == [0.5]
    assert dots.get_yticklabels()[0].get_text() == "remove x"


def test_a_figure_drawn_twice_is_the_same_file(tmp_path):
    first, second = (
        plots.save_figure(plots.counterfactual_sheet(IMAGES, IMAGES), "sheet", tmp_path / name, pdf=True)
        for name in ("one", "two")
    )
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".pdf").read_bytes() == second.with_suffix(".pdf").read_bytes()
    assert sorted(file.name for file in first.parent.iterdir()) == ["sheet.pdf", "sheet.png"]
    assert imread(first).shape[0] > 3 * 150  # three rows of images


def test_a_failed_write_leaves_the_old_figure(tmp_path, monkeypatch):
    figure = plots.show_grid(IMAGES)
    path = plots.save_figure(figure, "grid", tmp_path)
    before = path.read_bytes()

    def full(target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(figure, "grid", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    assert path.read_bytes() == before


def test_the_global_style_stays_as_it_was():
    before = dict(mpl.rcParams)
    plots.show_grid(IMAGES)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.show_grid(IMAGES[0]), "images must be"),
        (lambda: plots.show_grid(IMAGES * 4), r"images must lie in \[0, 1\]"),
        (lambda: plots.show_grid(IMAGES, ["a"]), "1 titles for 3 images"),
        (lambda: plots.counterfactual_sheet(IMAGES, IMAGES[:2]), "counterfactual has shape"),
        (lambda: plots.counterfactual_sheet(IMAGES, IMAGES * float("nan")), "counterfactual .* have NaN"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_of_few_points_do_not_lie_on_each_other():
    near = {f"method {n}": (2.0, 0.3 + n / 1000, 0.2, 0.4) for n in range(4)}
    figure = plots.pareto(near | {"slow": (90.0, 0.3, 0.2, 0.4)}, xlabel="seconds")
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the line to the point
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_of_many_points_the_front_alone_is_named():
    many = {f"method {n}": (1.0 + n, 1.0 + n, n, 2.0 + n) for n in range(20)}
    (axis,) = plots.pareto(many, xlabel="seconds").axes
    assert [text.get_text() for text in axis.texts] == ["method 0"]


def test_names_keep_the_order_of_their_points_and_stay_beside_the_axis():
    crowded = {f"method {n}": (1.0 + n, 0.9 - n / 1000, 0.2, 0.9) for n in range(9)}
    figure = plots.pareto(crowded | {"far below": (20.0, 0.0, 0.0, 0.1)}, xlabel="seconds")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    places = {text.get_text(): Text.get_window_extent(text) for text in axis.texts}
    assert sorted(places, key=lambda name: -places[name].y0) == [f"method {n}" for n in range(9)] + ["far below"]
    assert all(axis.get_window_extent().x1 < place.x0 and place.x1 <= figure.bbox.x1 for place in places.values())
    assert max(place.y1 for place in places.values()) <= figure.bbox.y1
