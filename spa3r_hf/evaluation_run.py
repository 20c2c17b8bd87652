"""Asking a model a benchmark's questions: scene by scene, in one process or several, whatever was answered before."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import distributed
from tqdm.auto import tqdm

from .benchmarks_questions import Question
from .errors import BadSampleError
from .evaluation_store import ANSWERS_FOLDER, Answer, AnswerWriter, count_lines, read_answers


_NUM_NAMED = 10
# A process that has done its share waits for the others, for days if need be.
_TIMEOUT = timedelta(days=30)
# tqdm's own rate turns into seconds a question where these are fewer than one a second.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} left, {rate_noinv_fmt}]"

OnBadSample = Literal["raise", "skip"]


class Answerer(Protocol):
    """As `scene_answers.SceneAnswerer`."""

    def answer(self, video: Any, prompts: Sequence[str]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Processes:
    """
    The processes of an evaluation: this one alone, or those that `torchrun` or `accelerate launch` has started.

    Attributes:
        index: Of this process, 0 to `count` - 1.
        count: How many there are.
        local_index: Of this process on its machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    @classmethod
    def start(cls) -> "Processes":
        """What the environment says; with several, they are connected (by gloo: only words are exchanged)."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_TIMEOUT)
        return cls(distributed.get_rank(), count, int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def first_alone(self, work: Callable[[], Any]) -> Any:
        """Do it in the first process, and then in all others: what it writes is made once."""
        result = work() if self.is_first else None
        self.wait()
        return result if self.is_first else work()

    def stop(self) -> None:
        if self.count > 1 and distributed.is_initialized():
            # A process that ends while gloo still talks is aborted.
            distributed.destroy_process_group()


def device_of(processes: Processes, use_cpu: bool = False) -> torch.device:
    """The GPU of this process, if there are any; else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", processes.local_index % torch.cuda.device_count())


def group_by_scene(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions about the same video or pictures together; scenes in the order of their first questions."""
    scenes: dict[Any, list[Question]] = {}
    for question in questions:
        scenes.setdefault((question.scene, question.media), []).append(question)
    return list(scenes.values())


def share_out(scenes: Sequence[list[Question]], count: int) -> list[list[list[Question]]]:
    """Scenes for each of `count` processes, about as many questions for each; the same wherever it is computed."""
    shares: list[list[list[Question]]] = [[] for _ in range(count)]
    loads = [0] * count
    for scene in sorted(scenes, key=len, reverse=True):
        place = loads.index(min(loads))
        shares[place].append(scene)
        loads[place] += len(scene)
    order = {id(scene): index for index, scene in enumerate(scenes)}
    return [sorted(share, key=lambda scene: order[id(scene)]) for share in shares]


def answer_all(
    make_answerer: Callable[[], Answerer],
    questions: Sequence[Question],
    folder: Path,
    processes: Processes,
    *,
    on_bad_sample: OnBadSample = "raise",
    unusable: Mapping[str, str] | None = None,
) -> tuple[dict[str, Answer], int, float]:
    """
    Ask what has not been answered yet, in all processes; questions that could not be asked are tried again.

    Args:
        make_answerer: Loads the model; not called where there is nothing to be asked.
        questions: All that are to be answered, with their media.
        folder: Where answers are kept.
        processes: Those that share the work.
        on_bad_sample, unusable: See `answer_questions`.

    Returns:
        All answers in the folder by the ids of their questions; how many questions were asked now; and the seconds
        that took.
    """
    known = read_answers(folder)
    remaining = [question for question in questions if question.id not in known or known[question.id].error]
    processes.wait()  # nobody writes until all have read
    if not remaining:
        return known, 0, 0.0
    share = share_out(group_by_scene(remaining), processes.count)[processes.index]
    answerer = make_answerer()
    started = time.monotonic()
    with AnswerWriter(folder, processes.index) as writer:
        progress = Progress(folder, len(questions), len(questions) - len(remaining), processes.is_first)
        answer_questions(answerer, share, writer, on_bad_sample=on_bad_sample, unusable=unusable, progress=progress)
        processes.wait()
        progress.close()
    return read_answers(folder), len(remaining), time.monotonic() - started


def answer_questions(
    answerer: Answerer,
    scenes: Sequence[Sequence[Question]],
    writer: AnswerWriter,
    *,
    on_bad_sample: OnBadSample = "raise",
    unusable: Mapping[str, str] | None = None,
    progress: Callable[[], None] | None = None,
) -> None:
    """
    Ask all questions, the ones about a scene together, and write their answers down.

    Args:
        answerer: Gives a `SceneAnswer` for each prompt.
        scenes: Questions of each, with their media.
        writer: Has the answers of a scene on the disk before the next is looked at.
        on_bad_sample: Whether a scene whose video or pictures cannot be used stops everything ("raise"), or its
            questions are noted as not answered ("skip").
        unusable: Files that are known to be so: name -> reason.
        progress: Called after each scene.

    Raises:
        BadSampleError: A scene cannot be used; the message names it and its questions.
    """
    for scene in scenes:
        started = time.monotonic()
        try:
            given = answerer.answer(_media_of(scene[0], unusable or {}), [question.prompt for question in scene])
        except BadSampleError as error:
            ids = [question.id for question in scene]
            more = f" and {len(ids) - _NUM_NAMED} more" if len(ids) > _NUM_NAMED else ""
            message = f"scene {scene[0].scene}: {error}"
            if on_bad_sample == "raise":
                raise BadSampleError(
                    f"{message}; its questions {ids[:_NUM_NAMED]}{more} are not answered; expected a video or "
                    "pictures that can be used, or --on_bad_sample skip, which counts them as wrong"
                ) from error
            answers = [Answer(question.id, error=message) for question in scene]
        else:
            seconds = round((time.monotonic() - started) / len(scene), 4)
            answers = [
                Answer(question.id, answer.text, answer.num_frames, seconds)
                for question, answer in zip(scene, given, strict=True)
            ]
        writer.append(answers)
        if progress is not None:
            progress()


def _media_of(question: Question, unusable: Mapping[str, str]) -> Any:
    reasons = [unusable[name] for name in question.media if name in unusable]
    if reasons:
        raise BadSampleError("; ".join(reasons))
    return question.images if question.video is None else question.video


class Progress:
    """
    A bar over the questions of all processes, with questions per second and the time left.

    Args:
        folder: Where the processes write their answers.
        num_questions: How many there are.
        num_answered: How many of them had been answered before.
        is_shown: One process shows it.
    """

    def __init__(self, folder: Path, num_questions: int, num_answered: int, is_shown: bool = True):
        self._parts = folder / ANSWERS_FOLDER
        self._written = self._count()
        self._bar = tqdm(
            total=num_questions,
            initial=num_answered,
            unit=" questions",
            smoothing=0.05,
            bar_format=_BAR,
            disable=not is_shown,
        )

    def __call__(self) -> None:
        if not self._bar.disable:
            written = self._count()
            self._bar.update(written - self._written)
            self._written = written

    def close(self) -> None:
        self()
        self._bar.close()

    def _count(self) -> int:
        return sum(count_lines(path) for path in self._parts.glob("part-*.jsonl"))


__all__ = ["Processes", "answer_all", "answer_questions", "group_by_scene", "share_out"]
