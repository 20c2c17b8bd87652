"""Answers on disk as they are given, so that an evaluation can be killed at any moment and go on."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
ANSWERS_FOLDER = "answers"


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        id: Of the question.
        output: What the model wrote, or whatever stands in its place; None where the question was not answered.
        num_frames: How many views of the scene were seen; None where that is not known.
        seconds: What the answer took; questions that were asked together share their time evenly.
        error: Why there is no answer, where the question could not be asked.
    """

    id: str
    output: Any = None
    num_frames: int | None = None
    seconds: float = 0.0
    error: str | None = None


class AnswerWriter:
    """
    Appends answers to the part that belongs to one process, `answers/part-00000.jsonl`.

    Args:
        folder: Of the evaluation.
        part: Which process this is.

    Raises:
        BlockingIOError: Another process that is running is the same part.
    """

    def __init__(self, folder: Path, part: int = 0):
        self.path = folder / ANSWERS_FOLDER / f"part-{part:05d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        _lock(self._file, self.path)
        _cut_torn_line(self.path)

    def append(self, answers: Iterable[Answer]) -> None:
        """Write whole lines, and return once they are on the disk."""
        # In one go; ASCII, as half a surrogate pair, which a model may write, is no UTF-8.
        self._file.write("".join(json.dumps(asdict(answer), allow_nan=False) + "\n" for answer in answers).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "AnswerWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_answers(folder: Path) -> dict[str, Answer]:
    """
    All answers of an evaluation, by the ids of their questions. The last line of a part, if it is torn, is not there.

    A question that could not be asked at first, and was answered later on, has been answered.

    Raises:
        ValueError: A line that is not the last cannot be read, or a question has two answers.
    """
    answers: dict[str, Answer] = {}
    for path in sorted((folder / ANSWERS_FOLDER).glob("part-*.jsonl")):
        for where, row in read_json_lines(path, may_be_torn=True):
            try:
                answer = Answer(**row)
            except TypeError as error:
                raise ValueError(f"{where}: {error}; expected an answer as this evaluation writes it") from error
            before = answers.get(answer.id)
            if before is not None and before.error is None and answer.error is None:
                raise ValueError(f"{where}: id {answer.id} has an answer already; expected one for each question")
            if before is None or before.error is not None:
                answers[answer.id] = answer
    return answers


def count_lines(path: Path) -> int:
    """Whole lines of a file that may still be growing, or not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_json_lines(path: Path, may_be_torn: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    The objects of a JSONL file, each with what to call its place in messages.

    Args:
        path: The file.
        may_be_torn: Whether a last line that cannot be read, or does not end, is passed over.

    Raises:
        ValueError: A line is no JSON object.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # also what is no UTF-8
            if may_be_torn and number == len(lines):
                return
            raise ValueError(f"{where}: {error}; expected a JSON object") from error
        if may_be_torn and number == len(lines) and not line.endswith(b"\n"):
            return  # it is cut off when its process goes on
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {str(row)[:80]!r}; expected a JSON object")
        yield where, row


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed, or the process ends in whatever way."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BlockingIOError(
            f"{path} is being written by another process; expected one evaluation at a time for an --output_dir"
        ) from error
    except OSError:  # some network file systems have no locks
        logger.warning("%s cannot be locked; nothing else may write to its folder now", path)


def _cut_torn_line(path: Path) -> None:
    """So that what is appended begins a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    if lines and not (lines[-1].endswith(b"\n") and _is_json(lines[-1])):
        with path.open("rb+") as file:
            file.truncate(len(content) - len(lines[-1]))
            os.fsync(file.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return not line.strip()
    return True


# --- what the answers of a folder were given with


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Note what decides the answers, or refuse to mix them with those of other settings that are in the folder.

    Raises:
        FileExistsError: The folder holds answers of other settings; the message names what differs.
    """
    path = folder / SETTINGS_NAME
    now = flat(json.loads(json.dumps(settings)))
    advice = "expected the same, to go on with them, or another --output_dir"
    if path.exists():
        there = flat(json.loads(path.read_text()))
        differing = [
            f"{name} = {there.get(name)!r}, now {now.get(name)!r}"
            for name in dict.fromkeys((*now, *there))
            if now.get(name) != there.get(name)
        ]
        if differing:
            raise FileExistsError(f"{folder} holds answers with {'; '.join(differing)}; {advice}")
    elif any((folder / ANSWERS_FOLDER).glob("part-*.jsonl")):
        raise FileExistsError(f"{folder} holds answers without {SETTINGS_NAME}, which says of what; {advice}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n")


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    parts = [flat(value, f"{prefix}.{name}" if prefix else name) for name, value in settings.items()]
    return {name: value for part in parts for name, value in part.items()}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that others see whole, or as it was before."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


__all__ = ["Answer", "AnswerWriter", "check_settings", "read_answers"]
