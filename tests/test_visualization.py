import io

import numpy as np
import pytest
from PIL import Image

from spa3r_hf import visualization
from spa3r_hf.visualization import (
    cosine_error,
    feature_basis,
    loss_curve,
    metrics_chart,
    prediction_sheet,
    save_gif,
)


def feature_maps(views: int = 4, rows: int = 6, columns: int = 8, channels: int = 16, seed: int = 0) -> np.ndarray:
    """Three smooth fields of different strength in random directions, off the origin."""
    rng = np.random.default_rng(seed)
    v, y, x = np.meshgrid(np.arange(views), np.arange(rows), np.arange(columns), indexing="ij")
    fields = np.stack((4 * np.sin(x / 2 + v), 2 * np.cos(y / 2), np.sin(x + y + v)), axis=-1)
    directions = np.linalg.qr(rng.normal(size=(channels, 3)))[0].T
    return (fields @ directions + rng.normal(size=channels)).astype(np.float32)


def scene(views: int = 4, height: int = 84, width: int = 112) -> dict:
    rng = np.random.default_rng(1)
    maps = {
        "geometric": feature_maps(views, height // 14, width // 14),
        "semantic": feature_maps(views, height // 14, width // 14, channels=5, seed=1),
    }
    return {
        "pixel_values": rng.random((views, 3, height, width), dtype=np.float32),
        "view_mask": np.arange(views) % 2 == 1,
        "targets": maps,
        "predictions": {kind: features + 0.1 for kind, features in maps.items()},
    }


def written(monkeypatch) -> list[str]:
    """The texts that the sheets of this test draw."""
    texts: list[str] = []
    original = visualization._text

    def record(draw, place, text, *args, **kwargs):
        texts.append(text)
        original(draw, place, text, *args, **kwargs)

    monkeypatch.setattr(visualization, "_text", record)
    return texts


# ---- colours of features


def test_basis_finds_the_directions_of_variation():
    features = feature_maps()
    basis = feature_basis(features)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(3), atol=1e-6)
    centred = features - basis.mean
    # Three fields: three components hold everything, the strongest first.
    np.testing.assert_allclose(centred @ basis.components.T @ basis.components, centred, atol=1e-4)
    spread = (centred @ basis.components.T).reshape(-1, 3).std(0)
    assert spread[0] > spread[1] > spread[2]


def test_colours_use_the_full_range_and_follow_the_components():
    features = feature_maps()
    basis = feature_basis(features)
    colours = np.stack([basis.to_rgb(view) for view in features])
    assert colours.dtype == np.uint8 and colours.shape == features.shape[:-1] + (3,)
    assert (colours.reshape(-1, 3).min(0) == 0).all() and (colours.reshape(-1, 3).max(0) == 255).all()
    far = basis.mean + 1000 * basis.components[0]
    assert basis.to_rgb(far[None, None])[0, 0, 0] == 255
    assert basis.to_rgb((2 * basis.mean - far)[None, None])[0, 0, 0] == 0


def test_same_features_same_colours_whatever_the_order_of_views():
    features = feature_maps()
    basis, reordered = feature_basis(features), feature_basis(features[::-1])
    assert (np.take_along_axis(basis.components, np.abs(basis.components).argmax(1)[:, None], 1) > 0).all()
    difference = basis.to_rgb(features[0]).astype(int) - reordered.to_rgb(features[0])
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(basis.to_rgb(features[0]), feature_basis(features).to_rgb(features[0]))


def test_directions_without_variation_are_grey():
    features = np.full((2, 3, 4, 6), 0.3, dtype=np.float32)
    assert (feature_basis(features).to_rgb(features[0]) == 128).all()
    features[..., 0] += np.arange(4)
    colours = feature_basis(features).to_rgb(features[0])
    assert colours[..., 0].min() == 0 and colours[..., 0].max() == 255
    assert (colours[..., 1:] == 128).all()


def test_bad_features_are_named():
    with pytest.raises(ValueError, match=r"features have shape \(5, 2\).*C >= 3"):
        feature_basis(np.zeros((5, 2)))
    broken = feature_maps()
    broken[1, 2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="features holds nan"):
        feature_basis(broken)
    basis = feature_basis(feature_maps())
    with pytest.raises(ValueError, match="7 channels; the basis was fitted on 16"):
        basis.to_rgb(np.zeros((2, 2, 7)))
    with pytest.raises(ValueError, match=r"features has shape \(2, 16\); expected \(h, w, C\)"):
        basis.to_rgb(np.zeros((2, 16)))


def test_cosine_error():
    true = np.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])
    predicted = np.array([[[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(cosine_error(predicted, true), [[0, 1, 2, 1]], atol=1e-12)
    with pytest.raises(ValueError, match=r"predicted has shape \(1, 3, 2\), true has \(1, 4, 2\)"):
        cosine_error(predicted[:, :3], true)


# ---- contact sheets


@pytest.mark.parametrize("views", [2, 5, 12])
def test_sheet_has_one_row_for_each_target_view(views):
    inputs = scene(views)
    sheet = prediction_sheet(**inputs)
    one_more = prediction_sheet(**(inputs | {"title": "kitchen"}))
    assert sheet.mode == "RGB" and sheet.width == one_more.width
    assert one_more.height - sheet.height == visualization._TITLE
    row = 168 + visualization._CAPTION + visualization._GAP  # pictures of 4:3 become 224 x 168
    context_rows = -(-(views - views // 2) // 7)
    rest = sheet.height - (context_rows + views // 2) * row
    assert rest == 3 * visualization._HEADING + 2 * visualization._MARGIN + visualization._LEGEND
    pixels = np.asarray(sheet)
    margin = visualization._MARGIN - 1
    for border in (pixels[:margin], pixels[-margin:], pixels[:, :margin], pixels[:, -margin:]):
        assert (border == 255).all()


def test_one_kind_makes_a_narrower_sheet():
    inputs = scene()
    one = {name: {"semantic": inputs[name]["semantic"]} for name in ("targets", "predictions")}
    difference = prediction_sheet(**inputs).width - prediction_sheet(**(inputs | one)).width
    assert difference == 3 * (visualization._CELL + visualization._GAP)


def test_a_perfect_prediction_has_no_error(monkeypatch):
    texts = written(monkeypatch)
    inputs = scene()
    inputs["predictions"] = inputs["targets"]
    pixels = np.asarray(prediction_sheet(**inputs))
    assert [text for text in texts if text.startswith("mean")] == 4 * ["mean 0.000"]
    cell, gap = visualization._CELL, visualization._GAP
    top = visualization._MARGIN + 168 + visualization._CAPTION + gap + 3 * visualization._HEADING

    def map_at(column: int) -> np.ndarray:
        left = visualization._MARGIN + column * (cell + gap)
        return pixels[top : top + 168, left : left + cell]

    for first in (1, 4):
        np.testing.assert_array_equal(map_at(first), map_at(first + 1))
        assert map_at(first).std() > 20
        assert (map_at(first + 2) == (0, 0, 4)).all()
    # The picture of a map is the map, each patch a block.
    expected = feature_basis(inputs["targets"]["geometric"]).to_rgb(inputs["targets"]["geometric"][1])
    np.testing.assert_array_equal(map_at(1)[14::28, 14::28], expected)


def test_numbers_and_distances_are_written(monkeypatch):
    texts = written(monkeypatch)
    inputs = scene()
    prediction_sheet(**inputs, distances=[(0.254, 12.4), (1.5, 90.0)], max_error=0.25, title="kitchen")
    assert {"kitchen", "view 1: 0.25 units, 12° off", "view 3: 1.50 units, 90° off", "0.25 or more"} <= set(texts)
    maps = (inputs[name]["geometric"][1] for name in ("predictions", "targets"))
    assert f"mean {cosine_error(*maps).mean():.3f}" in texts


def test_sheet_is_deterministic_and_leaves_its_inputs_alone():
    inputs = scene()
    before = inputs["targets"]["geometric"].copy(), inputs["pixel_values"].copy()
    first, second = (prediction_sheet(**inputs, title="t" * 500) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    np.testing.assert_array_equal(before[0], inputs["targets"]["geometric"])
    np.testing.assert_array_equal(before[1], inputs["pixel_values"])


def test_bad_scenes_are_named():
    inputs = scene()
    maps, pixels = inputs["targets"], inputs["pixel_values"]
    broken = maps["geometric"].copy()
    broken[2, 1, 0, 5] = np.inf
    cases = [
        ({"pixel_values": pixels[:, :2]}, r"pixel_values has shape \(4, 2, 84, 112\)"),
        ({"pixel_values": pixels[0]}, r"pixel_values has shape \(3, 84, 112\); expected \(V, 3, H, W\)"),
        ({"pixel_values": pixels * 255}, r"pixel_values range from .*expected \[0, 1\]"),
        ({"view_mask": np.zeros(4, bool)}, "view_mask is .*at least one True and one False"),
        ({"view_mask": np.ones(4, bool)}, "at least one True and one False"),
        ({"view_mask": np.array([0, 1, 0, 1])}, "expected 4 booleans"),
        ({"view_mask": np.array([False, True])}, "expected 4 booleans"),
        ({"predictions": {"semantic": maps["semantic"]}}, "expected the same kinds"),
        ({"targets": {}, "predictions": {}}, "not none"),
        ({"predictions": maps | {"geometric": broken}}, r"predictions\['geometric'\] holds inf at \(2, 1, 0, 5\)"),
        ({"predictions": maps | {"semantic": maps["geometric"]}}, r"predictions\['semantic'\] has shape"),
        ({"targets": maps | {"semantic": maps["semantic"][:3]}}, "expected maps of 4 views"),
        ({"targets": maps | {"semantic": maps["semantic"][:, :3]}}, "square patches on pictures of 84 x 112"),
        ({"distances": [(1.0, 2.0)]}, r"distances has shape \(1, 2\); expected \(2, 2\)"),
        ({"distances": [(1.0, 2.0), (np.nan, 0.0)]}, "distances holds nan"),
        ({"max_error": 0.0}, "max_error is 0.0"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            prediction_sheet(**(inputs | change))


# ---- curves and charts


HISTORY = [
    {"step": 10, "loss": 2.0, "geometric_l1": 0.4, "geometric_cosine": 0.6, "learning_rate": 1e-3, "grad_norm": 1.0},
    {"step": 20, "loss": 1.0, "geometric_l1": 0.2, "geometric_cosine": 0.3, "learning_rate": 1e-3, "grad_norm": 1.0},
    {"step": 20, "eval_loss": 1.2, "eval_geometric_cosine": 0.7, "eval_runtime": 3.0},
    {"step": 20, "train_runtime": 60.0, "train_loss": 1.5},
]
METRICS = {
    "geometric_cosine": 0.9,
    "geometric_centred_cosine": 0.7,
    "geometric_l1": 0.1,
    "semantic_cosine": 0.8,
    "semantic_centred_cosine": 0.6,
    "baselines": {
        "mean": {"geometric_cosine": 0.7, "geometric_centred_cosine": 0.0, "semantic_cosine": 0.5},
        "nearest_context": {"geometric_cosine": 0.8, "geometric_centred_cosine": 0.4, "semantic_cosine": 0.6},
        "other_scene": {"geometric_cosine": 0.6, "geometric_centred_cosine": -0.1, "semantic_cosine": 0.4},
    },
}


@pytest.fixture
def figures(monkeypatch) -> list:
    """The matplotlib figures behind the pictures that this test makes."""
    pytest.importorskip("matplotlib")
    made: list = []
    original = visualization.figure_to_image

    def record(figure):
        made.append(figure)
        return original(figure)

    monkeypatch.setattr(visualization, "figure_to_image", record)
    return made


def test_loss_curve_shows_losses_and_metrics(figures):
    picture = loss_curve(HISTORY, title="rooms")
    losses, metrics = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines == {
        "total": [[10, 2.0], [20, 1.0]],
        "total, evaluation": [[20, 1.2]],
        "geometric 1 − cosine": [[10, 0.6], [20, 0.3]],
        "geometric smooth L1": [[10, 0.4], [20, 0.2]],
    }
    assert [(line.get_label(), line.get_ydata().tolist()) for line in metrics.lines] == [("geometric cosine", [0.7])]
    assert losses.get_yscale() == "log"
    alone = loss_curve(HISTORY[:2])
    assert picture.mode == "RGB" and picture.width == 2 * alone.width and np.asarray(picture).std() > 5
    assert picture.tobytes() == loss_curve(HISTORY, title="rooms").tobytes()


def test_loss_curve_is_linear_where_losses_are_close_or_not_positive(figures):
    loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}])
    loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.0}])
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "linear"]


def test_bad_histories_are_named():
    with pytest.raises(ValueError, match="history of 0 records"):
        loss_curve([])
    with pytest.raises(ValueError, match="history of 1 records has none of"):
        loss_curve([{"step": 1, "eval_geometric_cosine": 0.5}])
    with pytest.raises(ValueError, match="history, record 1: loss is nan"):
        loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}])
    with pytest.raises(ValueError, match="record 0, has no step"):
        loss_curve([{"loss": 1.0}])


def test_metrics_chart_shows_the_model_beside_the_baselines(figures):
    picture = metrics_chart(METRICS, title="rooms")
    axes = figures[0].axes[0]
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers if bars.get_label()}
    assert bars == {
        "Spa3R": [0.9, 0.7, 0.8, 0.6],
        "nearest context": [0.8, 0.4, 0.6],
        "mean": [0.7, 0.0, 0.5],
        "other scene": [0.6, -0.1, 0.4],
    }
    lefts = sorted(bar.get_x() for bars in axes.containers for bar in bars)
    assert min(np.diff(lefts)) > 0.1  # none hides another
    assert picture.tobytes() == metrics_chart(METRICS, title="rooms").tobytes()


def test_metrics_chart_of_one_kind_without_baselines(figures):
    metrics_chart({"semantic_cosine": 0.5, "runtime": 3.0})
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == ["semantic\ncosine"]


def test_bad_metrics_are_named():
    with pytest.raises(ValueError, match=r"metrics have the keys \['loss'\]"):
        metrics_chart({"loss": 1.0})
    with pytest.raises(ValueError, match="mean: geometric_cosine is nan"):
        metrics_chart({"geometric_cosine": 0.5, "baselines": {"mean": {"geometric_cosine": float("nan")}}})
    with pytest.raises(ValueError, match="Spa3R: geometric_cosine is None"):
        metrics_chart({"geometric_cosine": None})


def test_sheets_need_no_matplotlib_and_curves_say_how_to_get_it(monkeypatch):
    def without(module, extra):
        raise ImportError(f"{module} needs {extra}")

    monkeypatch.setattr(visualization, "require", without)
    prediction_sheet(**scene(2))
    with pytest.raises(ImportError, match="matplotlib.figure needs train"):
        loss_curve(HISTORY)


# ---- animations


def test_save_gif(tmp_path):
    images = [Image.new("RGB", (8, 6), (shade, 0, 0)) for shade in (0, 120, 240)]
    buffer = io.BytesIO()
    save_gif(images, tmp_path / "a.gif", milliseconds=150)
    save_gif(images, buffer, milliseconds=150)
    assert (tmp_path / "a.gif").read_bytes() == buffer.getvalue()
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, (8, 6), 150, 0)
        gif.seek(2)
        assert gif.convert("RGB").getpixel((3, 3)) == (240, 0, 0)


def test_bad_animations_are_named(tmp_path):
    picture = Image.new("RGB", (8, 6))
    with pytest.raises(ValueError, match=r"images have the sizes \[\]"):
        save_gif([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"images have the sizes \[\(4, 4\), \(8, 6\)\]"):
        save_gif([picture, picture.resize((4, 4))], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="milliseconds is 5"):
        save_gif([picture], tmp_path / "a.gif", milliseconds=5)
    assert not (tmp_path / "a.gif").exists()
