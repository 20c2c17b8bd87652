"""The Space without a browser: scenes and what is refused, the page's events, answers, examples, card."""

import gc
import importlib.metadata
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


gr = pytest.importorskip("gradio", reason='the Space needs pip install "spa3r_hf[space]"')
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from space_scenes import (  # noqa: E402
    HTML,
    NANO,
    SPACE,
    SVG,
    app,
    ask,
    decompression_bomb,
    handlers,
    make_examples,
    photographs,
    scenes,
    tiny_spa3_vlm,
    video,
)

from spa3r_hf.feature_field import Camera, FieldModel  # noqa: E402
from spa3r_hf.rooms_questions import QUESTION_TYPES  # noqa: E402


def quiet(*_, **__) -> None:
    """In the place of a progress bar."""


@pytest.fixture(scope="module")
def model() -> FieldModel:
    return FieldModel(NANO)


@pytest.fixture(scope="module")
def asker(tmp_path_factory) -> ask.Asker:
    return ask.Asker(tiny_spa3_vlm(tmp_path_factory.mktemp("vlm")))


@pytest.fixture
def page(model, tmp_path) -> handlers.Handlers:
    return handlers.Handlers(model, None, tmp_path)


def chosen(index: int) -> gr.SelectData:
    return gr.SelectData(None, {"index": index, "value": None})


def opened(page: handlers.Handlers, example: int = 0) -> scenes.Session:
    return page.open_selected(None, chosen(example), quiet)[0]


# --- which views are context


@pytest.mark.parametrize(
    ("num_views", "context"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1]), (4, [0, 1, 3]), (5, [0, 1, 3, 4]), (16, [0, 1, 3, 4])],
)
def test_at_first_some_views_are_context_and_one_between_them_is_not(num_views, context):
    assert [view for view, is_context in enumerate(scenes.default_context(num_views)) if is_context] == context


def test_views_can_be_switched_but_the_first(page):
    session = opened(page)
    field, (_, status, places) = session.field, page.toggle(session, chosen(2))
    assert [view for view, is_context in enumerate(session.context) if is_context] == [0, 1, 2, 3, 4]
    assert session.field is not field and len(session.field.context.depth) == 5
    assert "The 5 framed ones are context" in status
    assert ("view 3 (context)", 2) in places.choices and places.value == 5
    before = session.thumbnails()
    page.toggle(session, chosen(2))
    after = session.thumbnails()
    assert [view for view in range(12) if before[view] != after[view]] == [2]
    with pytest.raises(gr.Error, match="first view is always context"):
        page.toggle(session, chosen(0))
    for beyond in (-1, 12):
        with pytest.raises(gr.Error, match=f"view = {beyond}; expected 0 to 11"):
            page.toggle(session, chosen(beyond))
    assert session.context == scenes.default_context(12)


@pytest.mark.parametrize("context", [[True] * 12, [True] + [False] * 11])
def test_all_views_may_be_context_or_the_first_alone(page, context):
    session = opened(page)
    session.context = [*context[:11], not context[11]]
    page.toggle(session, chosen(11))
    assert session.context == context and len(session.field.context.depth) == sum(context)
    assert page.look_from_view(session, "geometric", 4, *[0] * 5)[-1].startswith("Cosine")


# --- sessions


def test_what_a_session_made_goes_with_it(page, tmp_path, monkeypatch):
    still = Camera().extrinsics()
    monkeypatch.setattr("spa3r_hf.feature_field.orbit_cameras", lambda *_: np.stack([still, still]))
    session = opened(page)
    folder = Path(session.folder.name)
    assert folder.parent == tmp_path
    first = Path(page.cloud(session, "photographs"))
    second = Path(page.cloud(session, "semantic"))
    gif = Path(page.orbit(session, "geometric", 0, 0, 0, 0, 0, quiet))
    assert first != second and not first.exists()  # one of a kind
    assert sorted(folder.iterdir()) == sorted([second, gif])
    session.close()
    assert not folder.exists() and session.field is None
    session.close()


def test_a_page_that_was_closed_meanwhile_leaves_no_files(page, tmp_path):
    session = opened(page)
    session.close()
    with pytest.raises(gr.Error, match="no longer kept here"):
        page.cloud(session, "photographs")
    assert not list(tmp_path.iterdir())


def test_a_session_that_nobody_holds_goes_too(page, tmp_path):
    session = opened(page)
    page.cloud(session, "photographs")
    assert any(tmp_path.rglob("*.glb"))
    del session
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_another_scene_takes_the_place_of_the_old_one(page, tmp_path):
    old = opened(page)
    new = page.open_selected(old, chosen(1), quiet)[0]
    assert new.title == "Living room" and not Path(old.folder.name).exists()
    with pytest.raises(gr.Error, match="example 9; expected 0 to 3"):
        page.open_selected(new, chosen(9), quiet)
    assert Path(new.folder.name).exists() and len(list(tmp_path.iterdir())) == 1


def test_a_session_that_is_gone_is_told_so(page):
    for event in (
        lambda: page.draw_context(None, "geometric"),
        lambda: page.toggle(None, chosen(1)),
        lambda: page.look(None, "geometric", 0, 0, 0, 0, 0),
        lambda: page.ask(None, "How many?", quiet),
        lambda: page.cloud(None, "photographs"),
    ):
        with pytest.raises(gr.Error, match="no longer kept here. Please pick an example"):
            event()


def test_sessions_share_nothing(page):
    one, other = opened(page, 0), opened(page, 0)
    page.toggle(one, chosen(5))
    assert other.context == scenes.default_context(12) and one.folder.name != other.folder.name
    assert one.field is not other.field and one.views is not other.views


def test_a_session_is_as_small_as_the_card_says(model, tmp_path):
    paths = photographs(tmp_path / "files", scenes.LIMITS.max_files, size=(1500, 1500))
    session = scenes.open_upload(paths, model.processor, tmp_path, quiet)
    session.context = [True] * 16
    session.field = model.read(session.context_views)
    views = session.field.context
    arrays = [views.pixels, views.depth, views.extrinsics, views.intrinsics, *views.features.values()]
    size = sum(array.nbytes for array in arrays) + session.field.latents.nbytes
    size += sum(view.width * view.height * 3 for view in session.views)
    assert 9e6 < size < 12e6


# --- the field


def test_the_sliders_move_the_camera(page):
    session = opened(page)
    at_first = page.look(session, "geometric", 0, 0, 0, 0, 0)
    place, name, cloud, predicted, true, found = at_first
    assert place == handlers.SLIDERS and true is None and "No picture was taken there" in found
    moved = page.look(session, "geometric", 25, 0, 0, 0, 0)
    assert (np.asarray(predicted) != np.asarray(moved[3])).any() and (np.asarray(cloud) != np.asarray(moved[2])).any()
    # Who has not moved sees the first view.
    seen = np.asarray(session.views[0].resize(cloud.size)).astype(float)
    assert np.abs(np.asarray(cloud).astype(float) - seen).mean() < 30
    assert np.abs(np.asarray(moved[2]).astype(float) - seen).mean() > 40


def test_the_camera_of_a_held_out_view(page, model):
    session = opened(page)
    *sliders, name, picture, predicted, true, found = page.look_from_view(session, "geometric", 2, 9, 9, 9, 9, 9)
    seen = model.look_at(session.context_views, session.views[2])
    camera = Camera.of(seen.extrinsics[0])
    assert sliders == pytest.approx([camera.yaw, camera.pitch, camera.forward, camera.right, camera.up], abs=0.06)
    assert name == "View 3" and picture is session.views[2]
    similar = float(re.search(r"\*\*(-?[\d.]+)\*\*", found)[1])
    assert 0.3 < similar < 1
    # The sliders go on from there: to the same prediction, but for its roll and its lens.
    again = page.look(session, "geometric", *sliders)[3]
    assert np.abs(np.asarray(again).astype(float) - np.asarray(predicted)).mean() < 12
    with pytest.raises(gr.Error, match="view 13; expected 1 to 12"):
        page.look_from_view(session, "geometric", 12, *[0] * 5)


def test_choosing_the_sliders_leaves_the_camera_where_it_is(page):
    session = opened(page)
    camera = (12.0, 3.0, 0.1, 0.2, 0.3)
    assert page.look_from_view(session, "semantic", handlers.SLIDERS, *camera)[:5] == camera


def test_maps_of_the_context_views(page):
    session = opened(page)
    maps = page.draw_context(session, "semantic")
    assert [caption for _, caption in maps] == ["view 1", "view 2", "view 4", "view 5"]
    assert len({picture.tobytes() for picture, _ in maps}) == 4


def test_what_nobody_looks_at_is_not_made(page, tmp_path):
    session = opened(page)
    page.cloud(session, "photographs", False)
    assert not list(tmp_path.rglob("*.glb"))


# --- what visitors bring


def test_photographs_of_all_sizes_become_one_scene(model, tmp_path):
    paths = photographs(tmp_path / "a", 2, 0, (300, 200)) + photographs(tmp_path / "b", 2, 1, (120, 160))
    session = scenes.open_upload(paths, model.processor, tmp_path, quiet)
    assert session.title == "Your photographs" and {view.size for view in session.views} == {(336, 224)}
    assert session.questions == []
    assert model.read(session.context_views).image_size == (70, 112)


@pytest.mark.parametrize("count", [1, 2])
def test_few_photographs_are_enough(page, tmp_path, count):
    session = page.open_files(None, photographs(tmp_path / "few", count), quiet)[0]
    assert all(session.context) and len(page.draw_context(session, "geometric")) == count
    assert page.look_from_view(session, "geometric", 0, *[0] * 5)[5] == "View 1"
    questions = page.open_files(None, photographs(tmp_path / "few", count), quiet)[5]
    assert [row[0] for row in questions.constructor_args["samples"]] == list(ask.TYPES.values())


def test_a_video_becomes_views(model, tmp_path):
    pytest.importorskip("av")
    seen = []
    session = scenes.open_upload(
        [video(tmp_path / "room.mp4", 6.0)], model.processor, tmp_path, lambda now, **_: seen.append(now)
    )
    assert session.title == "Your video" and len(session.views) == 6 and seen[-1] == (5, 6)
    brightness = [np.asarray(view).mean() for view in session.views]
    assert brightness == sorted(brightness)


BAD = (
    *("corrupt", "svg", "html", "bomb", "empty file", "large file", "heic", "10,000 files", "no file", "traversal"),
    *("outside", "link", "gone", "no video", "script", "line"),
)


def bad_uploads(folder: Path) -> dict[str, tuple[list, str]]:
    """Name: files, and what the message says."""
    good = photographs(folder, 1)[0]

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    outside = folder.parent / "outside.jpg"
    outside.write_bytes(good.read_bytes())
    link = folder / "link.jpg"
    link.symlink_to(outside)
    return {
        "corrupt": ([file("torn.jpg", good.read_bytes()[:-400])], r"'torn.jpg' is damaged"),
        "svg": ([good, file("drawing.jpg", SVG)], r"'drawing.jpg' is no picture; expected JPEG, PNG, WEBP"),
        "html": ([file("page.png", HTML)], r"'page.png' is no picture"),
        "bomb": ([decompression_bomb(folder / "bomb.png")], r"'bomb.png' (has|is too large)"),
        "empty file": ([file("none.jpg", b"")], r"'none.jpg' has 0 bytes"),
        "large file": ([file("long.jpg", bytes(12_000_001))], r"12000001 bytes; expected 1 to 12000000"),
        "heic": ([file("phone.heic", b"\0\0\0\x18ftypheic" + bytes(20))], "HEIC and AVIF pictures are not read here"),
        "10,000 files": ([good] * 10_000, "10000 files; expected at most 16 photographs"),
        "no file": ([], "no file; expected photographs"),
        "traversal": ([folder / ".." / "outside.jpg"], r"'outside.jpg' has '..' in its path"),
        "outside": ([outside], r"'outside.jpg' is outside the upload folder"),
        "link": ([link], r"'link.jpg' is (no regular file|outside)"),
        "gone": ([folder / "gone.jpg"], r"'gone.jpg' cannot be opened"),
        "no video": ([file("film.mp4", b"\0\0\0\x18ftypisom" + bytes(500))], r"'film.mp4' cannot be read as a video"),
        "script": ([file("<img src=x>.jpg", SVG)], r"'_img src_x_.jpg' is no picture"),
        "line": ([photographs(folder, 1, 7, (2000, 4))[0]], "1024 x 2 pixels .* expected a less elongated picture"),
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_message(page, tmp_path, name):
    if name == "no video":
        pytest.importorskip("av")
    page.files = tmp_path / "uploads"
    page.files.mkdir()
    files, message = bad_uploads(page.files)[name]
    session = opened(page)
    before = set(page.files.iterdir())
    with pytest.raises(gr.Error, match=message) as caught:
        page.open_files(session, files, quiet)
    assert str(tmp_path) not in str(caught.value) and "<" not in str(caught.value).strip("'\"<>")
    assert set(page.files.iterdir()) == before and Path(session.folder.name).exists()  # the scene lives on
    assert page.draw_context(session, "geometric")


def test_videos_that_are_too_long_are_refused(page, tmp_path):
    pytest.importorskip("av")
    two_hours = video(tmp_path / "long.mp4", 7200.0)
    with pytest.raises(gr.Error, match=r"'long.mp4' lasts 7\d\d\d seconds or more; expected at most 120"):
        page.open_files(None, [two_hours], quiet)
    with pytest.raises(gr.Error, match="2 files, a video among them; expected photographs, or one video alone"):
        page.open_files(None, [two_hours, *photographs(tmp_path, 1)], quiet)


def test_what_nobody_foresaw_is_told_without_its_details(page, monkeypatch):
    session = opened(page)
    monkeypatch.setattr(page.model, "read", lambda views: 1 / 0)
    with pytest.raises(gr.Error, match="Something went wrong here. Your scene is as it was") as caught:
        page.toggle(session, chosen(5))
    assert "division" not in str(caught.value)


# --- questions


def test_prompts_are_those_of_the_benchmark():
    examples = scenes.list_examples()
    asked = [question for example in examples for question in example["questions"]]
    assert len(asked) == 40
    for question in asked:
        assert ask.prompt_of(question["text"]) == question["prompt"]


def test_there_are_questions_of_each_type():
    assert tuple(ask.TYPES) == QUESTION_TYPES
    for questions in (ask.GENERIC, *(example["questions"] for example in scenes.list_examples())):
        assert tuple(question["type"] for question in questions) == QUESTION_TYPES
        assert max(len(question["text"]) for question in questions) <= scenes.LIMITS.max_prompt_characters


@pytest.mark.parametrize(
    ("answer", "shown"),
    [("B", "B. bed"), ("B.", "B. bed"), ("D", "D"), ("3.5", "3.5"), ("", "(no answer)"), ("B bed", "B bed")],
)
def test_letters_are_spelt_out(answer, shown):
    assert ask.spelt_out(answer, "Which?\nA. table\nB. bed") == shown


def test_a_scene_is_encoded_once_and_both_answers_come(model, asker, tmp_path):
    page = handlers.Handlers(model, asker, tmp_path)
    session = opened(page)
    encoded = []
    hook = asker.model.spatial_encoder.register_forward_hook(lambda *_: encoded.append(1))
    try:
        text, truth, *empty = page.example_question(session, 4)
        assert truth == "B. bed" and empty == ["", ""] and text.endswith("D. stool")
        found, without, answer = page.ask(session, f"  {text}\n", quiet)
        assert found == truth and without and answer
        assert page.ask(session, "Is there a bed?", quiet)[0] == "not known"
        assert page.ask(session, text, quiet) == (found, without, answer)
        assert len(encoded) == 1
        page.toggle(session, chosen(5))
        page.ask(session, text, quiet)
        assert len(encoded) == 1  # from all views, whichever are context
    finally:
        hook.remove()


def test_the_answers_are_the_models(model, asker, tmp_path):
    session = scenes.open_example(0, model.processor, tmp_path)
    question, latents = session.questions[0]["text"], asker.encode(session.views)
    content = [{"type": "video", "video": session.views}, {"type": "text", "text": ask.prompt_of(question)}]
    inputs = asker.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    )
    output = asker.model.generate(**inputs, max_new_tokens=ask.MAX_NEW_TOKENS, do_sample=False)
    expected = asker.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert asker.answer(session.views, question, latents) == ask.spelt_out(expected, question)
    inputs.pop("spatial_pixel_values")
    output = asker.model.vlm.generate(**inputs, max_new_tokens=ask.MAX_NEW_TOKENS, do_sample=False)
    expected = asker.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert asker.answer(session.views, question, None) == ask.spelt_out(expected, question)
    assert asker.answer(session.views, question, -3 * latents) != asker.answer(session.views, question, latents)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 100_000, "the prompt has 100000 characters; expected at most 2000"),
        (" \n", "the prompt is empty"),
        ("a\0b", r"U\+0000"),
    ],
)
def test_bad_prompts_are_refused(model, asker, tmp_path, prompt, message):
    page = handlers.Handlers(model, asker, tmp_path)
    with pytest.raises(gr.Error, match=message):
        page.ask(opened(page), prompt, quiet)


def test_without_a_vlm_there_are_no_answers_and_a_notice(page, monkeypatch, tmp_path):
    with pytest.raises(gr.Error, match="no Spa3-VLM here"):
        page.ask(opened(page), "How many?", quiet)
    monkeypatch.setenv("SPA3R_VLM_ADAPTER", str(tmp_path / "missing"))
    monkeypatch.setenv("SPA3R_DEVICE", "cpu")
    blocks = app.load()
    parts = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    assert "no Spa3-VLM could be loaded" in parts["notice"].value and not parts["ask"].interactive
    assert {"places", "yaw", "pitch", "forward", "right", "up"} - parts.keys() == {"places"}


def test_a_model_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SPA3R_MODEL", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="nowhere"):
        app.load()


# --- files of the Space


def test_the_examples_are_small_and_complete():
    files = [path for path in (SPACE / "examples").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5e6
    for example in scenes.list_examples():
        pictures = sorted((SPACE / "examples" / example["name"]).glob("*.jpg"))
        assert [path.name for path in pictures] == [f"{view:02d}.jpg" for view in range(12)]
        assert {Image.open(path).size for path in pictures} == {(336, 336)}


def test_the_command_of_the_card_makes_the_examples(tmp_path):
    for package in ("embreex", "evaluate", "scipy"):
        pytest.importorskip(package)
    assert make_examples.ROOMS == tuple(each["seed"] - 2_000_000 for each in scenes.list_examples())
    make_examples.main(["--output_dir", str(tmp_path), "--rooms", str(make_examples.ROOMS[2])])
    (made,) = json.loads((tmp_path / "examples.json").read_text())
    assert made == scenes.list_examples()[2]
    for path in (tmp_path / made["name"]).glob("*.jpg"):
        shipped = np.asarray(Image.open(SPACE / "examples" / made["name"] / path.name)).astype(int)
        assert np.abs(np.asarray(Image.open(path)) - shipped).mean() < 1


def test_the_card_and_the_requirements_agree():
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(SPACE / "README.md").data.to_dict()
    pins = dict(
        line.split("==") for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert (data["sdk"], data["app_file"], data["license"]) == ("gradio", "app.py", "mit")
    assert (SPACE / data["app_file"]).is_file()
    assert data["sdk_version"] == pins["gradio"] == importlib.metadata.version("gradio")
    assert len(data["short_description"]) <= 60 and all("/" in name for name in data["models"])
    constraints = dict(
        line.split("==") for line in (SPACE.parents[1] / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert {name: pin for name, pin in pins.items() if constraints.get(name, pin) != pin} == {}
    for name in re.findall(r"\]\((\w+\.jpg)\)", (SPACE / "README.md").read_text()):
        assert (SPACE / name).stat().st_size < 200_000
    for path in SPACE.glob("*.py"):
        assert len(path.read_text().splitlines()) < 300
