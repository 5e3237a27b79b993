"""Figures in one look, which leave matplotlib's global style as it is: image grids, sheets, curves and dot plots."""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

from prism_lib.files import atomic, check_images

DIFFERENCE_LIMIT = 0.5  # of the grey range, to both sides
DIFFERENCE_COLORS = "RdBu_r"
CELL = 1.9  # inches per image: at 150 dpi a little more than the 256 pixels of a phantom
GAP = 0.08  # inches between them
TINT = np.array([86, 180, 233], np.float32)  # sky blue of the colour-blind safe palette

Intervals = Mapping[str, tuple[float, float, float]]  # estimate, low, high
Points = Mapping[str, tuple[float, float, float, float]]  # cost, estimate, low, high


@contextmanager
def _subplots(*shape: int, layout: str = "constrained", **options: Any) -> Iterator[tuple[Figure, Any]]:
    """`plt.subplots` in seaborn's look, with a palette that colour-blind readers can tell apart."""
    look = {**sns.plotting_context("paper"), **sns.axes_style("ticks")}
    cycle = plt.cycler(color=sns.color_palette("colorblind"))
    with plt.rc_context({**look, "axes.prop_cycle": cycle, "axes.spines.top": False, "axes.spines.right": False}):
        yield plt.subplots(*shape, layout=layout, **options)


def show_grid(images: Tensor, titles: Sequence[str] = (), *, columns: int | None = None, title: str = "") -> Figure:
    """Images (N, C, H, W) in [0, 1] in rows of ``columns`` (a near-square layout by default)."""
    count = _check(images, "images", titles=titles)
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    size = CELL * columns, (CELL + 0.2 * bool(titles)) * rows + 0.3 * bool(title)
    with _subplots(rows, columns, figsize=size, squeeze=False) as (figure, axes):
        for index, axis in enumerate(axes.flat):
            axis.set_axis_off()
            if index < count:
                _show(axis, images[index])
                axis.set_title(titles[index] if titles else "", fontsize="small")
        if title:
            figure.suptitle(title)
    return figure


def counterfactual_sheet(
    original: Tensor,
    edited: Tensor,
    truth: Tensor | None = None,
    *,
    notes: Sequence[str] = (),
    title: str = "",
    edited_name: str = "counterfactual",
) -> Figure:
    """A row per image: original | counterfactual | truth, where known | signed difference; ``notes`` right of it."""
    count = _check(original, "original", notes=notes)
    columns = {"original": original, edited_name: edited}
    columns |= {} if truth is None else {"true counterfactual": truth}
    for name, images in columns.items():
        if images.shape != original.shape:
            raise ValueError(f"{name} has shape {tuple(images.shape)}, original {tuple(original.shape)}")
        _check(images, name)
    beside = max([1.4, *(0.08 * len(line) for note in notes for line in note.splitlines())]) if notes else 0  # inches
    width, height = (len(columns) + 1) * (CELL + GAP) + beside, count * (CELL + GAP) + 0.95
    options: dict[str, Any] = {"squeeze": False, "subplot_kw": {"xticks": [], "yticks": [], "frame_on": False}}
    size = width, height + 0.3 * bool(title)
    with _subplots(count, len(columns) + 1, layout="compressed", figsize=size, **options) as (figure, axes):
        for axis, name in zip(axes[0], [*columns, "signed difference"], strict=True):
            axis.set_title(name, fontsize="medium")
        for row in range(count):
            for axis, images in zip(axes[row], columns.values(), strict=False):
                _show(axis, images[row])
            last = axes[row, -1]
            look: dict[str, Any] = {"cmap": DIFFERENCE_COLORS, "vmin": -DIFFERENCE_LIMIT, "vmax": DIFFERENCE_LIMIT}
            drawn = last.imshow(_change(edited[row], original[row]), **look)
            if notes:
                last.text(1.06, 0.5, notes[row], transform=last.transAxes, va="center", linespacing=1.5, size="small")
        bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.8 / axes.shape[1], anchor=(1, 0.5), aspect=15)
        bar.set_label("darker  ←  grey level  →  brighter", loc="right", fontsize="small")
        if title:
            figure.suptitle(title)
    return figure


def _change(after: Tensor, before: Tensor) -> np.ndarray:
    """After minus before, (C, H, W) each, averaged over channels: (H, W)."""
    return (after.float() - before.float()).mean(0).detach().cpu().numpy()


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str) -> Figure:
    """Lines by name, each ``(x, y)``."""
    with _subplots(figsize=(4.8, 3.2)) as (figure, axis):
        for name, (x, y) in series.items():
            axis.plot(x, y, label=name.replace("_", " "), marker="o" if len(x) < 12 else "")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if len(series) > 1:
            columns = 3 if max(map(len, series)) < 16 else 2  # as many as fit
            figure.legend(frameon=False, loc="outside upper center", ncols=min(columns, len(series)))
    return figure


def dot_plot(values: Intervals, *, xlabel: str, title: str = "") -> Figure:
    """A row per name, ``(estimate, low, high)``."""
    rows, (estimates, lows, highs) = range(len(values)), zip(*values.values(), strict=True)
    with _subplots(figsize=(4.8, 0.35 * len(values) + 1.0)) as (figure, axis):
        axis.hlines(rows, lows, highs, color="0.6", linewidth=2)
        axis.plot(estimates, rows, "o")
        axis.set_yticks(rows, [name.replace("_", " ") for name in values])
        axis.set(xlabel=xlabel, title=title, ylim=(len(values) - 0.5, -0.5))
    return figure


def grouped_dots(values: Mapping[str, Intervals], *, xlabel: str, ylabel: str = "", title: str = "") -> Figure:
    """A block per outer name, a row per inner one, ``(estimate, low, high)``; a colour and mark per inner name."""
    names = list(dict.fromkeys(name for block in values.values() for name in block))
    palette = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    marks = dict(zip(names, "osD^vPX*<>" * (1 + len(names) // 10), strict=False))
    rows = sum(len(block) for block in values.values()) + len(values)
    with _subplots(figsize=(4.8, 0.16 * rows + 1.6)) as (figure, axis):
        row, ticks = 0, {}
        for group, block in values.items():
            ticks[row + (len(block) - 1) / 2] = group.replace("_", " ")
            for name, (estimate, low, high) in block.items():
                label = name.replace("_", " ") if group == next(iter(values)) else None
                axis.hlines(row, low, high, color=palette[name], linewidth=1.5, alpha=0.6)
                axis.plot(estimate, row, marks[name], color=palette[name], label=label)
                row += 1
            row += 1
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(row - 1.2, -0.8))
        figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


def pareto(values: Points, *, xlabel: str, ylabel: str = "", title: str = "") -> Figure:
    """A point per name, ``(cost, error, low, high)``; a line joins those that nothing beats, others are gray."""
    ordered = sorted(values, key=lambda name: values[name][:2])
    best_before = accumulate((values[name][1] for name in ordered), min, initial=float("inf"))
    front = [name for name, best in zip(ordered, best_before, strict=False) if values[name][1] < best]
    named = {name: values[name][:2] for name in values if name in front or len(values) <= 10}  # so few can all be named
    color = sns.color_palette("colorblind")[0]
    with _subplots(figsize=(6.4, 3.4)) as (figure, axis):
        for name, (cost, error, low, high) in values.items():
            shade = color if name in front else "0.7"
            axis.vlines(cost, low, high, color=shade, linewidth=1, alpha=0.5)
            axis.plot(cost, error, "o", color=shade)
        axis.plot(*zip(*(values[name][:2] for name in front), strict=True), color=color, linewidth=1)
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log")
        costs = [cost for cost, *_ in values.values()]
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if np.log10(max(costs) / min(costs)) < 2 else (1,)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
        _name_points(figure, axis, named, front)
    return figure


def _name_points(figure: Figure, axis: Axes, points: Mapping[str, tuple[float, float]], front: Sequence[str]) -> None:
    """Names in the right margin, in the order of their points' heights, each with a thin line to its point."""
    figure.draw_without_rendering()  # settles limits and height
    line = 10 / (axis.get_window_extent().height * 72 / figure.dpi)  # a line of text, as a share of the axis
    order = sorted(points, key=lambda name: points[name][1])
    heights = (axis.transData - axis.transAxes).transform([points[name] for name in order])[:, 1]
    steps = line * np.arange(len(order))  # without them, names a line apart are at one height
    places = np.minimum(np.maximum.accumulate(heights - steps), max(1.0, steps[-1]) - steps[-1]) + steps
    arrow = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    look: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "size": "x-small", "annotation_clip": False}
    for name, place in zip(order, places, strict=True):
        shade = "black" if name in front else "0.4"
        axis.annotate(name.replace("_", " "), points[name], (1.03, place), color=shade, arrowprops=arrow, **look)


def timeline(rows: Mapping[str, Sequence[str]], *, xlabel: str, title: str = "") -> Figure:
    """A band per name, with a cell for each step in the colour of its state."""
    states = list(dict.fromkeys(state for row in rows.values() for state in row))
    palette = dict(zip(states, sns.color_palette("colorblind", len(states)), strict=True))
    with _subplots(figsize=(6.0, 0.35 * len(rows) + 1.0)) as (figure, axis):
        for place, row in enumerate(rows.values()):
            for step, state in enumerate(row, 1):
                axis.barh(place, 0.94, left=step - 0.47, height=0.7, color=palette[state])
        axis.set_yticks(range(len(rows)), list(rows))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel=xlabel, title=title, ylim=(len(rows) - 0.5, -0.5))
        handles = [plt.Rectangle((0, 0), 1, 1, color=palette[state]) for state in states]
        figure.legend(handles, states, frameon=False, loc="outside upper right", ncols=len(states))
    return figure


KINDS: dict[str, Callable[..., Figure]] = {"dots": dot_plot, "grouped": grouped_dots, "pareto": pareto}


def draw(kind: str, values: Mapping[str, Any], title: str, xlabel: str, ylabel: str = "") -> Figure:
    """A drawing that is given as data (`tables.Drawing`)."""
    return KINDS[kind](values, title=title, xlabel=xlabel, **({"ylabel": ylabel} if ylabel else {}))


def save_figure(figure: Figure, name: str, figures_dir: str | os.PathLike[str], *, pdf: bool = False) -> Path:
    """Write ``<figures_dir>/<name>.png`` (and .pdf) and return the PNG's path; the same figure gives the same bytes."""
    folder = Path(figures_dir)
    unsaid: dict[str, tuple[str, ...]] = {"png": ("Software",), "pdf": ("Creator", "Producer", "CreationDate")}
    for kind in ("pdf", "png") if pdf else ("png",):
        with atomic(folder / f"{name}.{kind}") as partial:
            figure.savefig(partial, format=kind, dpi=150, metadata=dict.fromkeys(unsaid[kind]), facecolor="white")
    return folder / f"{name}.png"


def _show(axis: Axes, image: Tensor) -> None:
    axis.imshow(image.detach().float().cpu().permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)


def _check(images: Tensor, name: str, **texts: Sequence[str]) -> int:
    check_images(images, name=name)
    for what, given in texts.items():
        if given and len(given) != len(images):
            raise ValueError(f"{len(given)} {what} for {len(images)} images")
    return len(images)


# --- views for the screen: (H, W, 3) uint8 of images (C, H, W) in [0, 1], redrawn in milliseconds ------------------


def view(image: Tensor) -> np.ndarray:
    """An image as it is."""
    return np.ascontiguousarray(levels(image.expand(3, -1, -1)))


def levels(image: Tensor, bits: int = 8) -> np.ndarray:
    """The levels of an image, of 8 or 16 bits: (H, W) if it is gray, else (H, W, 3); 8-bit input comes back exactly."""
    scaled = (image.detach().cpu().double().clamp(0, 1) * (2**bits - 1)).round()
    return scaled.permute(1, 2, 0).squeeze(-1).numpy().astype(f"uint{bits}")


def difference(after: Tensor, before: Tensor) -> np.ndarray:
    """The signed difference in the colours of every figure: red brighter, blue darker, white unchanged."""
    unit = (_change(after, before) / (2 * DIFFERENCE_LIMIT) + 0.5).clip(0, 1)
    return (colormaps[DIFFERENCE_COLORS](unit)[..., :3] * 255).round().astype(np.uint8)


def overlay(image: Tensor, mask: Tensor) -> np.ndarray:
    """The image with its mask (1, H, W) in [0, 1] tinted."""
    weight = mask.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy() * 0.45
    return (view(image) * (1 - weight) + TINT * weight).round().astype(np.uint8)


def png(picture: np.ndarray, compress_level: int = 1) -> bytes:
    """Levels (H, W) or (H, W, 3) as the bytes of a PNG file, by default compressed little and quickly."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()
