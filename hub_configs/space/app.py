"""
A Space for Spa3R: bring a scene, see its feature field, ask about it.

    python app.py       # http://127.0.0.1:7860, on CPU with the nano models

Environment: SPA3R_MODEL (folder or Hub id of a `Spa3RForPreTraining`), SPA3R_VLM_ADAPTER (of a Spa3-VLM's adapter),
SPA3R_DEVICE ("cuda" or "cpu"; default: a GPU where there is one).
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import torch
from ask import Asker
from handlers import Handlers
from scenes import EXAMPLES, LIMITS, list_examples
from starlette.middleware import Middleware

from spa3r_hf.feature_field import FieldModel
from spa3r_hf.upload_guard import UploadGuard


logger = logging.getLogger("spa3r_space")
HERE = Path(__file__).resolve().parent
KIND_NAMES = {"geometric": "Geometry", "semantic": "Semantics"}
CAMERA = {  # name: range, step, label
    "yaw": (-180, 180, 0.5, "Turn right, degrees"),
    "pitch": (-90, 90, 0.5, "Look up, degrees"),
    "forward": (-1.5, 1.5, 0.01, "Move forward"),  # depths are about 1 on average
    "right": (-1.5, 1.5, 0.01, "Move right"),
    "up": (-1.5, 1.5, 0.01, "Move up"),
}
MOST_SESSIONS, SESSION_SECONDS = 48, 7200  # that are kept at once, and for how long
CACHE_SECONDS = (300, 3600)  # how often files of the page are looked through, and how old they get
INTRO = """# Spa3R: a field of features from a few pictures
Pictures of a place become one small latent, without their cameras being told. From it alone, a decoder predicts the
features that **any other camera** would see."""
STYLE = """
.gradio-container {max-width: 1400px !important; margin: auto; padding-top: 8px !important}
#intro h1 {margin: 0; font-size: 1.6em} #intro p {margin: 4px 0 0}
.caption {text-align: center; opacity: .75}
.gallery-container, .grid-wrap {min-height: 0 !important; height: auto !important; max-height: none !important}
.grid-wrap {padding: 6px !important; overflow: hidden !important}
.grid-container {gap: 6px !important; grid-template-rows: none !important; grid-auto-rows: auto !important}
#examples .grid-container, #views .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
#maps .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr)) !important}
.thumbnail-lg, .thumbnail-lg > img {height: auto !important; aspect-ratio: auto !important}
.caption-label {max-width: 100% !important; padding: 0 5px !important; font-size: .75em !important}
#kind .wrap, #colours .wrap {justify-content: flex-end}
#camera .min_value, #camera .max_value {display: none}
#questions td, #questions th {text-align: left}
#answers textarea {font-size: 1.15em; font-weight: 600}
footer {display: none !important}
"""
PICTURE: dict[str, Any] = {"show_label": False, "interactive": False, "buttons": []}
CHOICE: dict[str, Any] = {"show_label": False, "container": False}
GALLERY: dict[str, Any] = {**PICTURE, "allow_preview": False, "object_fit": "cover"}


def build(model: FieldModel, asker: Asker | None, notice: str = "") -> gr.Blocks:
    """The page; `notice` is shown above the questions."""
    kinds = [(KIND_NAMES[kind], kind) for kind in model.kinds]
    with gr.Blocks(title="Spa3R", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        do = Handlers(model, asker, Path(page.GRADIO_CACHE))
        session = gr.State(None, time_to_live=SESSION_SECONDS, delete_callback=lambda kept: kept and kept.close())
        walking = gr.State(False)
        gr.Markdown(INTRO, elem_id="intro")
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                gr.Markdown("### 1. Bring a scene")
                covers = [(str(EXAMPLES / each["name"] / "00.jpg"), each["title"]) for each in list_examples()]
                examples = gr.Gallery(covers, columns=4, **GALLERY, elem_id="examples")
                upload = gr.UploadButton(
                    "Upload photographs or a video",
                    file_count="multiple",
                    file_types=["image", "video"],
                    size="md",
                    elem_id="upload",
                )
                views = gr.Gallery(columns=4, **GALLERY, elem_id="views")
                status = gr.Markdown("Opening the first example...", elem_id="status")
            with gr.Column(scale=10, min_width=560), gr.Tabs():
                with gr.Tab("2. See the field", elem_id="field_tab") as field_tab:
                    with gr.Row(equal_height=True):
                        with gr.Column():
                            gr.Markdown("What the models see in the **context views**: features, as colours.")
                        with gr.Column():
                            kind = gr.Radio(kinds, value=kinds[0][1], **CHOICE, elem_id="kind")
                    maps = gr.Gallery(columns=8, **GALLERY, elem_id="maps")
                    with gr.Row():
                        with gr.Column(scale=3, min_width=200, elem_id="camera"):
                            place = gr.Dropdown(label="Look from", elem_id="place")
                            camera = [
                                gr.Slider(low, high, 0, step=step, label=label, buttons=[], elem_id=name)
                                for name, (low, high, step, label) in CAMERA.items()
                            ]
                        with gr.Column(scale=8, min_width=400):
                            with gr.Row():
                                with gr.Column(min_width=120):
                                    name = gr.Markdown(elem_classes="caption", elem_id="name")
                                    seen = gr.Image(**PICTURE, elem_id="seen")
                                with gr.Column(min_width=120):
                                    gr.Markdown("Predicted from the latent", elem_classes="caption")
                                    predicted = gr.Image(**PICTURE, elem_id="predicted")
                                with gr.Column(min_width=120):
                                    gr.Markdown("True features", elem_classes="caption")
                                    true = gr.Image(**PICTURE, elem_id="true")
                            with gr.Row():
                                with gr.Column(scale=2, min_width=200):
                                    found = gr.Markdown(elem_id="found")
                                circle = gr.Button("Circle from here", size="sm", min_width=140, elem_id="circle")
                            orbit = gr.Image(type="filepath", **PICTURE, elem_id="orbit")
                            gr.Markdown("The points, dark where no context view looked; and what is predicted.")
                with gr.Tab("Walk around", elem_id="cloud_tab") as cloud_tab:
                    choices = [("Photographs", "photographs"), *kinds]
                    with gr.Row(equal_height=True):
                        with gr.Column():
                            gr.Markdown("What the **context views** show, by the backbone's depth.")
                        with gr.Column():
                            colours = gr.Radio(choices, value="photographs", **CHOICE, elem_id="colours")
                    cloud = gr.Model3D(
                        **{"show_label": False, "height": 620, "interactive": False, "elem_id": "cloud"},
                        clear_color=(0.09, 0.1, 0.13, 1.0),
                        camera_position=(90, 65, 2.6),  # from behind the first view, a little above
                    )
                with gr.Tab("3. Ask", elem_id="ask_tab") as ask_tab:
                    gr.Markdown(notice, visible=bool(notice), elem_id="notice")
                    limit = LIMITS.max_prompt_characters
                    question = gr.Textbox(
                        label="A question about the scene", lines=3, max_lines=7, max_length=limit, elem_id="question"
                    )
                    ask = gr.Button("Ask", variant="primary", interactive=asker is not None, elem_id="ask")
                    with gr.Row(elem_id="answers"):
                        without = gr.Textbox(label="Without the scene's latents", interactive=False, elem_id="without")
                        answer = gr.Textbox(label="With the scene's latents", interactive=False, elem_id="with")
                        truth = gr.Textbox(label="True answer", interactive=False, elem_id="truth")
                    questions = gr.Dataset(
                        components=[gr.Textbox(visible=False, max_lines=1), gr.Textbox(visible=False)],
                        headers=["Type", "Question"],
                        label="Or one of these",
                        samples=[],
                        type="index",
                        elem_id="questions",
                    )

        shown, drawn = [views, status, place], [name, seen, predicted, true, found]
        whole = [session, *shown, orbit, questions, question, truth, without, answer]
        of_camera = [session, kind, *camera]
        settings: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}

        def on(event: Any, handler: Callable, inputs: list, outputs: Any, **options: Any) -> Any:
            return event(handler, inputs, outputs, **settings, **options)

        for opening in (
            on(page.load, do.open_first, [session], whole),
            on(examples.select, do.open_selected, [session], whole),
            on(upload.upload, do.open_files, [session, upload], whole),
            on(views.select, do.toggle, [session], shown),
        ):
            event = on(opening.success, do.draw_context, [session, kind], maps)
            event = on(event.success, do.look_from_view, [session, kind, place, *camera], [*camera, *drawn])
            event = on(event.success, do.cloud, [session, colours, walking], cloud)
            on(event.success, do.orbit_if_quick, of_camera, orbit)
        again = [session, kind, place, *camera]
        on(place.input, do.look_from_view, again, [*camera, *drawn])
        on(on(kind.input, do.draw_context, [session, kind], maps).success, do.look_from_view, again, [*camera, *drawn])
        sliders = functools.partial(gr.on, [slider.input for slider in camera])
        on(sliders, do.look, of_camera, [place, *drawn], show_progress="hidden", trigger_mode="always_last")
        on(circle.click, do.orbit, of_camera, orbit)
        # A viewer that has its file before its tab is shown stays empty (Gradio 6.31).
        on(on(cloud_tab.select, lambda: True, [], walking).success, do.cloud, [session, colours], cloud)
        for tab in (field_tab, ask_tab):
            on(tab.select, lambda: False, [], walking)
        on(colours.input, do.cloud, [session, colours], cloud)
        on(questions.click, do.example_question, [session, questions], [question, truth, without, answer])
        asked = functools.partial(gr.on, [ask.click, question.submit])
        on(asked, do.ask, [session, question], [truth, without, answer])
    return page


def launch_settings(page: gr.Blocks) -> dict[str, Any]:
    """For `page.launch`: looks, limits, and nothing from elsewhere."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return {
        "theme": gr.themes.Default(primary_hue="indigo", font=fonts[0], font_mono=fonts[1]),
        "css": STYLE,
        "footer_links": [],
        "ssr_mode": False,
        "max_file_size": max(LIMITS.max_file_bytes, LIMITS.max_video_bytes),
        "state_session_capacity": MOST_SESSIONS,
        "app_kwargs": {"middleware": [Middleware(UploadGuard, folder=Path(page.GRADIO_CACHE))]},
    }


def beside(name: str) -> Path:
    """A model's folder in this Space, or, in the project's repository, beside it."""
    return next((folder / name for folder in (HERE, HERE.parent) if (folder / name).is_dir()), HERE / name)


def load() -> gr.Blocks:
    """The page with the models that the environment names."""
    device = os.environ.get("SPA3R_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    model = FieldModel(os.environ.get("SPA3R_MODEL") or beside("spa3r-nano"), device)
    adapter = os.environ.get("SPA3R_VLM_ADAPTER") or beside("spa3-vlm-nano")
    asker, notice = None, ""
    try:
        asker = Asker(adapter, device)
    except (OSError, ValueError) as error:
        logger.warning("no Spa3-VLM: %s", error)
        notice = (
            "**Nobody answers here yet**: no Spa3-VLM could be loaded. Put one in the folder `spa3-vlm-nano` beside "
            "this Space, or name its adapter in `SPA3R_VLM_ADAPTER`."
        )
    return build(model, asker, notice)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("spa3r_space").setLevel(logging.INFO)
    page = load()
    page.queue(max_size=40).launch(**launch_settings(page))
