"""What the page does, with all that is a visitor's own in the session that is passed along."""

import functools
import html
import logging
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from ask import GENERIC, TYPES, Asker
from scenes import LIMITS, Session, open_example, open_upload

from spa3r_hf.feature_field import (
    Camera,
    Field,
    FieldModel,
    cosine,
    draw_from,
    draw_map,
    write_cloud,
    write_orbit,
)
from spa3r_hf.upload_limits import check_prompt


logger = logging.getLogger("spa3r_space")
SLIDERS = -1  # in the place of a view's number
QUICK = 256  # patches of a view, up to which the orbit is drawn unasked
UNKNOWN = "not known"
GONE = "This scene is no longer kept here. Please pick an example, or upload it again."
PROGRESS = gr.Progress()


def readable(handler: Callable) -> Callable:
    """What goes wrong as a message: what a visitor can do something about in its own words, all else in general."""

    @functools.wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except ValueError as error:
            logger.info("%s: %s", handler.__name__, error)
            message = html.escape(str(error), quote=False)
        except Exception:
            logger.exception("%s failed", handler.__name__)
            message = "Something went wrong here. Your scene is as it was; please try again, or another one."
        raise gr.Error(message, duration=15, print_exception=False)

    return wrapper


class Handlers:
    """
    The page's events. What they raise is a `gr.Error` with a message for the visitor.

    Args:
        model: Sees and predicts.
        asker: Answers, if there is one.
        files: The folder of uploaded files, in which sessions have theirs.
    """

    def __init__(self, model: FieldModel, asker: Asker | None, files: Path):
        self.model = model
        self.asker = asker
        self.files = files

    def _opened(self, session: Session | None) -> tuple[Session, Field]:
        if session is None:
            raise ValueError(GONE)
        if session.field is None:
            session.field = self.model.read(session.context_views)
        return session, session.field

    # --- scenes

    @readable
    def open_first(self, session: Session | None, progress=PROGRESS) -> tuple:
        progress(0, desc="Opening the first example")
        return self._replace(session, open_example(0, self.model.processor, self.files))

    @readable
    def open_selected(self, session: Session | None, chosen: gr.SelectData, progress=PROGRESS) -> tuple:
        progress(0, desc="Opening the example")
        return self._replace(session, open_example(chosen.index, self.model.processor, self.files))

    @readable
    def open_files(self, session: Session | None, paths: list[str] | None, progress=PROGRESS) -> tuple:
        return self._replace(session, open_upload(paths or [], self.model.processor, self.files, progress))

    def _replace(self, old: Session | None, new: Session) -> tuple:
        """The old one goes only when the new one could be seen, and then all that was shown of it."""
        try:
            shown = self._show(new)
        except Exception:
            new.close()
            raise
        if old is not None:
            old.close()
        questions = [[TYPES[entry["type"]], entry["text"]] for entry in new.questions or GENERIC]
        return new, *shown, None, gr.Dataset(samples=questions), "", "", "", ""

    @readable
    def toggle(self, session: Session | None, chosen: gr.SelectData) -> tuple:
        self._opened(session)[0].toggle(chosen.index)
        return self._show(session)

    def _show(self, session: Session | None) -> tuple:
        """Thumbnails, status, and the views to look from: at first the first one that is held out."""
        session, _ = self._opened(session)
        status = (
            f"**{session.title}**, {len(session.views)} views. The {sum(session.context)} framed ones are context, "
            "the others are held out: click to switch."
        )
        places = [("the sliders", SLIDERS)]
        for view, is_context in enumerate(session.context):
            places.append((f"view {view + 1} ({'context' if is_context else 'held out'})", view))
        first = session.context.index(False) if False in session.context else 0
        thumbnails = gr.Gallery(value=session.thumbnails(), selected_index=None)
        return thumbnails, status, gr.Dropdown(choices=places, value=first)

    # --- the field

    @readable
    def draw_context(self, session: Session | None, kind: str) -> list[tuple]:
        session, field = self._opened(session)
        maps = zip(np.flatnonzero(session.context), field.context.features[kind], strict=True)
        return [(draw_map(field.bases[kind], features), f"view {view + 1}") for view, features in maps]

    @readable
    def look_from_view(self, session: Session | None, kind: str, view: int, *camera: float) -> tuple:
        """The sliders as the view's camera has them, and what there is to see."""
        if view == SLIDERS:
            return *camera, *self._look(session, kind, camera)
        session, field = self._opened(session)
        if not 0 <= view < len(session.views):
            raise ValueError(f"view {view + 1}; expected 1 to {len(session.views)}")
        if session.context[view]:
            seen, place = field.context, sum(session.context[:view])
        else:
            seen, place = self.model.look_at(session.context_views, session.views[view]), 0
        extrinsics, intrinsics = seen.extrinsics[place], seen.intrinsics[place]
        predicted = self.model.predict(field, extrinsics[None], intrinsics[None], kind)[0]
        true = seen.features[kind][place]
        yaw, pitch, *position = astuple(Camera.of(extrinsics))
        similar = f"Cosine similarity of predicted and true: **{cosine(predicted, true):.2f}**"
        return (
            round(yaw, 1),
            round(pitch, 1),
            *(round(number, 2) for number in position),
            f"View {view + 1}",
            session.views[view],
            draw_map(field.bases[kind], predicted),
            draw_map(field.bases[kind], true),
            similar,
        )

    @readable
    def look(self, session: Session | None, kind: str, *camera: float) -> tuple:
        return SLIDERS, *self._look(session, kind, camera)

    def _look(self, session: Session | None, kind: str, camera: tuple[float, ...]) -> tuple:
        _, field = self._opened(session)
        extrinsics = Camera(*camera).extrinsics()
        predicted = self.model.predict(field, extrinsics[None], field.context.intrinsics[:1], kind)[0]
        return (
            "The point cloud from there",
            draw_from(field, extrinsics),
            draw_map(field.bases[kind], predicted),
            None,
            "No picture was taken there: nothing to compare with.",
        )

    @readable
    def orbit(
        self,
        session: Session | None,
        kind: str,
        yaw: float,
        pitch: float,
        forward: float,
        right: float,
        up: float,
        progress=PROGRESS,
    ) -> str:
        session, field = self._opened(session)
        camera = Camera(yaw, pitch, forward, right, up)
        return self._write(
            session, "orbit.gif", lambda path: write_orbit(self.model, field, camera, kind, path, progress)
        )

    @readable
    def orbit_if_quick(
        self,
        session: Session | None,
        kind: str,
        yaw: float,
        pitch: float,
        forward: float,
        right: float,
        up: float,
        progress=PROGRESS,
    ) -> str | None:
        rows, columns = self.model.grid_size(self._opened(session)[1].image_size)
        return self.orbit(session, kind, yaw, pitch, forward, right, up, progress) if rows * columns <= QUICK else None

    @readable
    def cloud(self, session: Session | None, colours: str, is_shown: bool = True) -> Any:
        """The file of the point cloud, if anybody is looking at it."""
        if not is_shown:
            return gr.skip()
        session, field = self._opened(session)
        kind = colours if colours in self.model.kinds else None
        return self._write(session, "cloud.glb", lambda path: write_cloud(field, path, kind))

    def _write(self, session: Session, name: str, write: Callable[[Path], None]) -> str:
        path = session.new_file(name)
        try:
            write(path)
        except FileNotFoundError as error:  # the page was closed meanwhile
            raise ValueError(GONE) from error
        return str(path)

    # --- questions

    @readable
    def example_question(self, session: Session | None, index: int) -> tuple[str, str, str, str]:
        """The question, its true answer, and no answers yet."""
        entry = (self._opened(session)[0].questions or GENERIC)[index]
        return entry["text"], entry.get("answer", UNKNOWN), "", ""

    @readable
    def ask(self, session: Session | None, question: str, progress=PROGRESS) -> tuple[str, str, str]:
        """The true answer, and those without and with the scene's latents, which are computed once."""
        session, _ = self._opened(session)
        if self.asker is None:
            raise ValueError("There is no Spa3-VLM here: see the notice above.")
        question = check_prompt(question, LIMITS)
        if session.spatial_latents is None:
            progress(0.1, desc="Encoding the scene, once")
            session.spatial_latents = self.asker.encode(session.views)
        progress(0.4, desc="Answering without the latents")
        without = self.asker.answer(session.views, question, None)
        progress(0.7, desc="Answering with the latents")
        answer = self.asker.answer(session.views, question, session.spatial_latents)
        known = {entry["text"]: entry["answer"] for entry in session.questions}
        return known.get(question, UNKNOWN), without, answer
