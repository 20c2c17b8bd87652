"""Pictures of what Spa3R predicts and learns: feature maps as colours, contact sheets, curves and charts.

Arrays come as numpy, pictures go as PIL images; nothing is read, and only `save_gif` writes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .optional import require


# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00"
# What is drawn, by its name in a log: label, colour, line.
_LOSSES = {
    "loss": ("total", "black", "-"),
    "eval_loss": ("total, evaluation", "black", "--"),
    "geometric_cosine": ("geometric 1 − cosine", _BLUE, "-"),
    "geometric_l1": ("geometric smooth L1", _BLUE, ":"),
    "semantic_cosine": ("semantic 1 − cosine", _ORANGE, "-"),
    "semantic_l1": ("semantic smooth L1", _ORANGE, ":"),
    "depth_probe": ("depth probe", _GREEN, "-"),
}
_METRICS = {
    "geometric_cosine": ("geometric cosine", _BLUE, "-"),
    "geometric_centred_cosine": ("geometric centred cosine", _BLUE, "--"),
    "semantic_cosine": ("semantic cosine", _ORANGE, "-"),
    "semantic_centred_cosine": ("semantic centred cosine", _ORANGE, "--"),
}
_BASELINES = {"nearest_context": _YELLOW, "mean": "#999999", "other_scene": "#D0D0D0"}

# Eight equal steps of the "magma" colour map: from black (0) to pale yellow (1), evenly brighter to the eye.
_ERROR_COLOURS = np.array(
    [
        (0, 0, 4),
        (28, 16, 68),
        (79, 18, 123),
        (129, 37, 129),
        (181, 54, 122),
        (229, 80, 100),
        (251, 135, 97),
        (254, 194, 135),
        (252, 253, 191),
    ],
    dtype=np.float64,
)

# Measures of the contact sheet, in pixels.
_CELL, _GAP, _MARGIN = 224, 12, 28
_TITLE, _HEADING, _CAPTION, _LEGEND = 48, 30, 28, 64
_INK, _GREY = (32, 32, 32), (110, 110, 110)


def _finite(array: np.ndarray, name: str, axes: str) -> np.ndarray:
    """`array` as float32, refused if it has other axes than `axes`, is empty, or holds what is not finite."""
    array = np.asarray(array, dtype=np.float32)
    if array.ndim != len(axes.split(", ")) or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected ({axes}), not empty")
    finite = np.isfinite(array)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(np.argmin(finite), array.shape))
        raise ValueError(f"{name} holds {array[index]} at {index}; expected finite numbers")
    return array


@dataclass(frozen=True)
class FeatureBasis:
    """Three directions of feature space shown as red, green and blue.

    Attributes:
        mean: (C,), subtracted first.
        components: (3, C), orthonormal, the strongest first.
        low: (3,), coordinates shown as 0.
        high: (3,), coordinates shown as 255; equal to `low` for a direction without variation, shown as 128.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_rgb(self, features: np.ndarray) -> np.ndarray:
        """Colours, uint8 (h, w, 3), of a feature map (h, w, C); what lies beyond the range is clipped to it.

        Raises:
            ValueError: Another shape, or a number that is not finite.
        """
        features = _finite(features, "features", "h, w, C")
        if features.shape[-1] != len(self.mean):
            raise ValueError(f"features have {features.shape[-1]} channels; the basis was fitted on {len(self.mean)}")
        coordinates = (features - self.mean) @ self.components.T
        span = self.high - self.low
        scaled = np.where(span > 0, (coordinates - self.low) / np.where(span > 0, span, 1.0), 128 / 255)
        return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def feature_basis(features: np.ndarray) -> FeatureBasis:
    """The principal components of features, to colour true and predicted maps alike.

    Args:
        features: (..., C), C >= 3: the true features, best of all views of a scene together.

    Returns:
        The basis, its range the 1st to the 99th percentile. The sign of a component is the one that makes its largest
        entry positive, so the same features always get the same colours.

    Raises:
        ValueError: Fewer than two features or three channels, or a number that is not finite.
    """
    features = np.asarray(features)
    if features.ndim < 2 or features.shape[-1] < 3 or features[..., 0].size < 2:
        raise ValueError(f"features have shape {features.shape}; expected (..., C), two or more, of C >= 3 channels")
    features = _finite(features.reshape(-1, features.shape[-1]), "features", "patches, C")
    mean = features.mean(0)
    centred = features - mean
    _, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))  # the strongest last
    components = directions[:, :-4:-1].T
    largest = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(3), largest])[:, None]
    low, high = np.percentile(centred @ components.T, (1, 99), axis=0)
    # What rounding leaves of a direction without variation would otherwise be blown up to full colours.
    noise = high - low <= 1e-5 * np.abs(features).max()
    return FeatureBasis(mean, components, low, np.where(noise, low, high))


def cosine_error(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """1 - cosine, float64 (h, w), between the features (h, w, C) of each patch; 1 where one of them is zero.

    Raises:
        ValueError: Shapes that are wrong or differ, or a number that is not finite.
    """
    predicted = _finite(predicted, "predicted", "h, w, C").astype(np.float64)
    true = _finite(true, "true", "h, w, C").astype(np.float64)
    if predicted.shape != true.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, true has {true.shape}; expected the same")
    lengths = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(true, axis=-1)
    return (1 - (predicted * true).sum(-1) / np.maximum(lengths, 1e-12)).clip(0, 2)


def _error_to_rgb(error: np.ndarray, max_error: float) -> np.ndarray:
    """Colours, uint8 (..., 3), of errors (...): black at 0, pale yellow from `max_error` on."""
    position = (error / max_error).clip(0, 1)
    stops = np.linspace(0, 1, len(_ERROR_COLOURS))
    channels = [np.interp(position, stops, channel) for channel in _ERROR_COLOURS.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, width: float, colour=_INK, anchor="lm"
) -> None:
    """Writes `text`, shortened to `width` pixels, with its left middle (or another PIL anchor) at `place`."""
    font = ImageFont.load_default(size=size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text = text.rstrip() + "..."
    draw.text(place, text, fill=colour, font=font, anchor=anchor)


def _check_scene(
    pixel_values: np.ndarray,
    view_mask: np.ndarray,
    targets: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
) -> None:
    """Refuses what `prediction_sheet` cannot draw."""
    num_views, channels, height, width = _finite(pixel_values, "pixel_values", "V, 3, H, W").shape
    if channels != 3:
        raise ValueError(f"pixel_values has shape {pixel_values.shape}; expected (V, 3, H, W)")
    if pixel_values.min() < 0 or pixel_values.max() > 1:
        raise ValueError(f"pixel_values range from {pixel_values.min()} to {pixel_values.max()}; expected [0, 1]")
    if view_mask.shape != (num_views,) or view_mask.dtype != np.bool_ or view_mask.all() or not view_mask.any():
        raise ValueError(f"view_mask is {view_mask}; expected {num_views} booleans, at least one True and one False")
    if not targets or targets.keys() != predictions.keys():
        raise ValueError(
            f"targets are {sorted(targets)}, predictions are {sorted(predictions)}; expected the same kinds, not none"
        )
    for kind in targets:
        views, rows, columns, _ = shape = _finite(targets[kind], f"targets[{kind!r}]", "V, h, w, C").shape
        if views != num_views or rows * width != columns * height:
            raise ValueError(
                f"targets[{kind!r}] has shape {shape}; expected maps of {num_views} views with square patches "
                f"on pictures of {height} x {width} pixels"
            )
        predicted_shape = _finite(predictions[kind], f"predictions[{kind!r}]", "V, h, w, C").shape
        if predicted_shape != shape:
            raise ValueError(
                f"predictions[{kind!r}] has shape {predicted_shape}; expected {shape} as its targets have"
            )


def prediction_sheet(
    pixel_values: np.ndarray,
    view_mask: np.ndarray,
    targets: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    *,
    bases: Mapping[str, FeatureBasis] | None = None,
    title: str = "",
    distances: Sequence[tuple[float, float]] | None = None,
    max_error: float = 0.5,
) -> Image.Image:
    """One scene on one sheet: the context views, then a row for each target view.

    A row shows the target view and, for each kind of feature, its true map, the predicted map in the same colours, and
    the error, 1 - cosine per patch, with its mean.

    Args:
        pixel_values: (V, 3, H, W) in [0, 1].
        view_mask: (V,), True = target view; at least one of each.
        targets: True feature maps (V, h, w, C) by kind, such as "geometric" and "semantic"; patches are square.
        predictions: Predicted feature maps, the same kinds and shapes.
        bases: The colours of each kind; None: `feature_basis` of the true features of this scene. One basis for
            several scenes shows how they differ, one of its own shows more of a scene.
        title: Such as the scene's name.
        distances: For each target view, in order, how far its camera is from the nearest context view:
            scene units, degrees.
        max_error: End of the error's colour range.

    Raises:
        ValueError: Shapes that do not fit, kinds that differ, no context or no target view, numbers that are not
            finite or out of range.
    """
    view_mask = np.asarray(view_mask)
    _check_scene(pixel_values, view_mask, targets, predictions)
    context_views, target_views = np.flatnonzero(~view_mask).tolist(), np.flatnonzero(view_mask).tolist()
    if distances is not None:
        shape = _finite(np.asarray(distances), "distances", "target views, 2").shape
        if shape != (len(target_views), 2):
            raise ValueError(f"distances has shape {shape}; expected ({len(target_views)}, 2)")
    if not 0 < max_error <= 2:
        raise ValueError(f"max_error is {max_error}; expected a number above 0, at most 2")

    height, width = pixel_values.shape[2:]
    columns = 1 + 3 * len(targets)
    cell = (_CELL, max(1, round(_CELL * height / width)))
    row = cell[1] + _CAPTION + _GAP
    context_rows = math.ceil(len(context_views) / columns)
    sheet_width = 2 * _MARGIN + columns * (_CELL + _GAP) - _GAP
    top = _MARGIN + (_TITLE if title else 0)
    targets_top = top + _HEADING + context_rows * row + 2 * _HEADING
    legend_top = targets_top + len(target_views) * row
    sheet = Image.new("RGB", (sheet_width, legend_top + _LEGEND + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)

    def left(column: int) -> int:
        return _MARGIN + column * (_CELL + _GAP)

    def place(colours: np.ndarray, column: int, y: int, caption: str = "", resample=Image.Resampling.NEAREST) -> None:
        sheet.paste(Image.fromarray(colours).resize(cell, resample), (left(column), y))
        _text(draw, (left(column), y + cell[1] + _CAPTION / 2), caption, 16, _CELL, _GREY)

    def place_view(view: int, column: int, y: int, caption: str) -> None:
        colours = (255 * pixel_values[view].transpose(1, 2, 0)).round().astype(np.uint8)
        place(colours, column, y, caption, Image.Resampling.LANCZOS)

    if title:
        _text(draw, (_MARGIN, _MARGIN + 14), title, 28, sheet_width - 2 * _MARGIN)
    _text(draw, (_MARGIN, top + _HEADING / 2 - 3), "context views", 20, sheet_width)
    for i, view in enumerate(context_views):
        place_view(view, i % columns, top + _HEADING + i // columns * row, f"view {view}")

    _text(draw, (_MARGIN, targets_top - 1.5 * _HEADING - 3), "target views", 20, _CELL)
    for k, (kind, true) in enumerate(targets.items()):
        basis, predicted = bases[kind] if bases else feature_basis(true), predictions[kind]
        first = 1 + 3 * k
        middle = left(first + 1) + _CELL / 2
        _text(draw, (middle, targets_top - 1.5 * _HEADING - 3), f"{kind} features", 20, 3 * _CELL, anchor="mm")
        rule = targets_top - _HEADING - 1
        draw.line((left(first), rule, left(first + 2) + _CELL - 1, rule), fill=_GREY)
        for c, heading in enumerate(("true", "predicted", "error")):
            centre = (left(first + c) + _CELL / 2, targets_top - _HEADING / 2)
            _text(draw, centre, heading, 18, _CELL, anchor="mm")
        for i, view in enumerate(target_views):
            y = targets_top + i * row
            error = cosine_error(predicted[view], true[view])
            place(basis.to_rgb(true[view]), first, y)
            place(basis.to_rgb(predicted[view]), first + 1, y)
            place(_error_to_rgb(error, max_error), first + 2, y, f"mean {error.mean():.3f}")
    for i, view in enumerate(target_views):
        caption = f"view {view}"
        if distances is not None:
            caption += ": {:.2f} units, {:.0f}° off".format(*distances[i])
        place_view(view, 0, targets_top + i * row, caption)

    y = legend_top + 18
    start = "error = 1 - cosine per patch:  0"  # the font has no minus sign
    _text(draw, (_MARGIN, y), start, 16, sheet_width, _GREY)
    bar = _MARGIN + math.ceil(ImageFont.load_default(size=16).getlength(start)) + 8
    scale = _error_to_rgb(np.tile(np.linspace(0, max_error, 160), (14, 1)), max_error)
    sheet.paste(Image.fromarray(scale), (bar, y - 7))
    _text(draw, (bar + 168, y), f"{max_error:g} or more", 16, sheet_width, _GREY)
    legend = "features: their first three principal components, fitted on true maps"
    if distances is not None:
        legend += "; off: from the nearest context camera"
    _text(draw, (_MARGIN, y + 28), legend, 16, sheet_width - 2 * _MARGIN, _GREY)
    return sheet


def _figure(width: float, columns: int) -> tuple[Any, Any]:
    """A figure of `width` x 4.5 inches with `columns` axes side by side, outside pyplot's global state."""
    figure = require("matplotlib.figure", extra="train").Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    all_axes = figure.subplots(1, columns, squeeze=False)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, all_axes


def figure_to_image(figure: Any) -> Image.Image:
    """A matplotlib figure, drawn."""
    canvas = require("matplotlib.backends.backend_agg", extra="train").FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _number(record: Mapping[str, Any], key: str, where: str) -> float:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value!r}; expected a finite number")
    return float(value)


def loss_curve(history: Sequence[Mapping[str, Any]], *, title: str = "") -> Image.Image:
    """Losses, and evaluation metrics if there are any, against the training step.

    Args:
        history: `Trainer.state.log_history`. Shown are `loss`, its components under the names they have in the
            output of `Spa3RForPreTraining`, and `eval_loss`, on a logarithmic axis if they span a factor of ten;
            beside them the cosine similarities `eval_<kind>_cosine` and `eval_<kind>_centred_cosine`. All else is
            passed over.
        title: Such as the run's name.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: No loss in the history, a record without its step, or a value that is not a finite number.
    """
    metrics = {f"eval_{key}": curve for key, curve in _METRICS.items()}
    curves: dict[str, list[tuple[float, float]]] = {}
    for i, record in enumerate(history):
        for key in (_LOSSES | metrics).keys() & record.keys():
            if "step" not in record:
                raise ValueError(f"history, record {i}, has no step: {dict(record)}")
            step, value = (_number(record, name, f"history, record {i}") for name in ("step", key))
            curves.setdefault(key, []).append((step, value))
    if not curves.keys() & _LOSSES.keys():
        raise ValueError(f"history of {len(history)} records has none of {list(_LOSSES)}")

    panels = [("loss", _LOSSES)]
    if curves.keys() & metrics.keys():
        panels.append(("cosine similarity, evaluation", metrics))
    figure, all_axes = _figure(8.0 * len(panels), len(panels))
    for axes, (label, names) in zip(all_axes, panels, strict=True):
        for key, (name, colour, line) in names.items():
            if key in curves:
                marker = "o" if len(curves[key]) <= 25 else None
                axes.plot(*zip(*curves[key], strict=True), line, label=name, color=colour, marker=marker, markersize=4)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    values = [value for key in _LOSSES.keys() & curves.keys() for _, value in curves[key]]
    if 0 < 10 * min(values) <= max(values):
        all_axes[0].set_yscale("log", subs=[])
        all_axes[0].yaxis.set_major_locator(require("matplotlib.ticker", extra="train").LogLocator(subs=(1, 2, 5)))
        all_axes[0].yaxis.set_major_formatter("{x:g}")
    if title:
        figure.suptitle(title)
    return figure_to_image(figure)


def metrics_chart(metrics: Mapping[str, Any], *, title: str = "") -> Image.Image:
    """Bars of the cosine similarity of predicted and true features, Spa3R beside what knows less.

    Args:
        metrics: An evaluation's results: `<kind>_cosine` and `<kind>_centred_cosine` for the kinds "geometric" and
            "semantic", and under "baselines" the same for "nearest_context", "mean" and "other_scene". What is absent
            is left out.
        title: Such as the data's name.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: None of the metrics is there, or one is not a finite number.
    """
    present = [key for key in _METRICS if key in metrics]
    if not present:
        raise ValueError(f"metrics have the keys {sorted(metrics)}; expected one or more of {list(_METRICS)}")
    baselines = metrics.get("baselines", {})
    bars = [("Spa3R", _BLUE, metrics)]
    bars += [(name, colour, baselines[name]) for name, colour in _BASELINES.items() if name in baselines]
    figure, (axes,) = _figure(max(6.0, 2.4 * len(present) + 1.5), 1)
    bar_width = 0.84 / len(bars)
    for i, (name, colour, values) in enumerate(bars):
        groups = [group for group, key in enumerate(present) if key in values]
        heights = [_number(values, present[group], name) for group in groups]
        places = [group + (i - (len(bars) - 1) / 2) * bar_width for group in groups]
        drawn = axes.bar(places, heights, 0.92 * bar_width, label=name.replace("_", " "), color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(present)), [_METRICS[key][0].replace(" ", "\n", 1) for key in present])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(present) - 0.4)
    axes.margins(y=0.08)
    axes.set_ylabel("cosine similarity with the true features")
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False)
    if title:
        axes.set_title(title)
    return figure_to_image(figure)


def save_gif(images: Sequence[Image.Image], file: str | PathLike[str] | BinaryIO, milliseconds: int = 200) -> None:
    """Writes pictures of one size as an endlessly repeated animation, each shown `milliseconds` (in steps of 10).

    Raises:
        ValueError: No pictures, sizes that differ, or less than 10 milliseconds.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images have the sizes {sorted(sizes)}; expected one or more pictures of one size")
    if milliseconds < 10:
        raise ValueError(f"milliseconds is {milliseconds}; expected 10 or more")
    first, *others = (image.convert("RGB") for image in images)
    first.save(file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
