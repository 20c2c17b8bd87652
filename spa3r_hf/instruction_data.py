"""Instruction data: conversations about pictures and videos, from JSON and JSONL files, as chat messages."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .benchmarks_questions import vsi_bench_question
from .errors import BadSampleError


_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_MEDIA_KEYS = ("image", "images", "video")
_PLACEHOLDERS = re.compile(r"(<image>|<video>)")
_SPECIFICATION = re.compile(r"(?P<path>.+)%(?P<percent>\d+(\.\d+)?)")
# The last number of a seed says what is drawn, so that no two kinds of draw share a stream.
_RECORDS, _ORDER = 1, 2


@dataclass(frozen=True)
class Instruction:
    """
    A conversation to learn from, not read yet.

    Attributes:
        name: For messages: its file, and where in it.
        record: See `messages_of`; or the line of a JSONL file that holds it.
        media_dir: What its paths are relative to.
    """

    name: str
    record: Mapping[str, Any] | bytes
    media_dir: Path

    def messages(self) -> list[dict[str, Any]]:
        """
        See `messages_of`.

        Raises:
            BadSampleError: It cannot be used.
        """
        return messages_of(self._parsed(), self.media_dir, self.name)

    @property
    def question_type(self) -> Any:
        """What the record says of its question's type, if anything; raises as `messages` does."""
        record = self._parsed()
        return record.get("question_type") if isinstance(record, Mapping) else None

    def _parsed(self) -> Any:
        if not isinstance(self.record, bytes):
            return self.record
        try:
            return json.loads(self.record)
        except ValueError as error:
            raise BadSampleError(f"{self.name} is no JSON: {error}") from error


def messages_of(record: Any, media_dir: Path, name: str) -> list[dict[str, Any]]:
    """
    A record of VSI-590K, SPAR-234K, LLaVA-Hound or VLM-3R as messages for `Spa3VLMProcessor.apply_chat_template`.

    Args:
        record: `conversations`, a list of `{"from": "human" | "gpt", "value": ...}` in turn, which may begin with one
            from "system"; and `image` (path or list of paths), `images` (list of paths) or `video` (path of a video or
            of a folder of its frames). In what a human says stands `<image>` for each picture, and `<video>` or
            `<image>` for a video.
        media_dir: What paths are relative to.
        name: For messages.

    Raises:
        BadSampleError: The record is not like this.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError(f"{name} is a {type(record).__name__}; expected an object with conversations")
    turns = _turns(record.get("conversations"), name)
    kind, media = _media(record, name)
    places = [found for role, text in turns if role == "user" for found in _PLACEHOLDERS.findall(text)]
    if len(places) != len(media) or (kind == "image" and "<video>" in places):
        what = f"{len(media)} pictures" if kind == "image" else "a video"
        raise BadSampleError(
            f"{name} has {what} and the placeholders {places}; expected "
            + (f"<image> {len(media)} times" if kind == "image" else "<video> once")
        )
    entries = iter([{"type": kind, kind: str(media_dir / path)} for path in media])
    messages = []
    for role, text in turns:
        parts = _PLACEHOLDERS.split(text) if role == "user" else [text]
        content = [
            next(entries) if _PLACEHOLDERS.fullmatch(part) and role == "user" else {"type": "text", "text": part}
            for part in parts
            if part
        ]
        messages.append({"role": role, "content": content})
    return messages


def _turns(conversation: Any, name: str) -> list[tuple[str, str]]:
    """Role and text of each turn."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise BadSampleError(f"{name} has conversations = {conversation!r}; expected a list of at least two turns")
    turns: list[tuple[str, str]] = []
    for index, turn in enumerate(conversation):
        speaker, text = (turn.get(key) for key in ("from", "value")) if isinstance(turn, Mapping) else (None, None)
        if speaker not in _ROLES or not isinstance(text, str) or not text.strip():
            raise BadSampleError(
                f"{name}, turn {index} is {turn!r}; expected {{'from': 'human' or 'gpt', 'value': some text}}"
            )
        # White space around an answer would be learnt, and may become one token with what stands before it.
        turns.append((_ROLES[speaker], text.strip() if speaker == "gpt" else text))
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadSampleError(
            f"{name} has turns of {[turn['from'] for turn in conversation]}; expected human and gpt in turn, gpt last"
        )
    return turns


def _media(record: Mapping[str, Any], name: str) -> tuple[str, list[str]]:
    """Of what kind ("image" or "video") the files of a record are, and their paths."""
    given = {key: record[key] for key in _MEDIA_KEYS if record.get(key) not in (None, "", [])}
    if len(given) > 1:
        raise BadSampleError(f"{name} has {sorted(given)}; expected one of them")
    for key, value in given.items():
        paths = value if isinstance(value, list) and key != "video" else [value]
        if not all(isinstance(path, str) for path in paths):
            raise BadSampleError(f"{name} has {key} = {value!r}; expected the path of a file")
        return "video" if key == "video" else "image", paths
    return "image", []


# --- files of records


class InstructionSet(Sequence[Instruction]):
    """
    Records from one place. Those of a JSONL file stay on the disk until they are asked for.

    Args:
        name: For messages.
        records: See `messages_of`.
        media_dir: What their paths are relative to.
        rate: The share of them that an epoch has, above 0; above 1, some or all come more than once.

    Raises:
        ValueError: There are none, or the rate is out of its range.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Mapping[str, Any] | bytes],
        media_dir: str | os.PathLike = ".",
        rate: float = 1.0,
    ):
        if not len(records):
            raise ValueError(f"{name} holds no records; expected at least one")
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} has rate = {rate}; expected a number above 0")
        self.name = name
        self.records = records
        self.media_dir = Path(media_dir)
        self.rate = rate

    @classmethod
    def open(cls, specification: str, media_dir: str | os.PathLike | None = None) -> "InstructionSet":
        """
        Args:
            specification: Path of a JSON file (a list of records) or of a JSONL file (one a line); "data.json%25" is a
                quarter of it.
            media_dir: What paths of pictures and videos are relative to. Default: the folder of the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no such list, or the rate is out of its range.
        """
        match = _SPECIFICATION.fullmatch(specification)
        path = Path(match["path"] if match else specification)
        rate = float(match["percent"]) / 100 if match else 1.0
        if not path.is_file():
            raise FileNotFoundError(f"instruction data {path} does not exist; expected a JSON or JSONL file")
        records: Any
        if path.suffix == ".jsonl":
            records = _Lines(path)
        else:
            try:
                records = json.loads(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}; expected a list of records") from error
            if not isinstance(records, list):
                raise ValueError(f"{path} holds a {type(records).__name__}; expected a list of records")
        return cls(str(path), records, path.parent if media_dir is None else media_dir, rate)

    @property
    def num_samples(self) -> int:
        """How many of its records an epoch has."""
        return max(1, round(self.rate * len(self)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Instruction:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        where = f"line {self.records.numbers[index]}" if isinstance(self.records, _Lines) else f"record {index}"
        return Instruction(f"{self.name}, {where}", self.records[index], self.media_dir)


class _Lines(Sequence[bytes]):
    """The lines of a file that are not blank; their numbers, from 1, are `numbers`."""

    def __init__(self, path: Path):
        self.path = path
        numbers, offsets, offset = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    numbers.append(number)
                    offsets.append(offset)
                offset += len(line)
        self.numbers, self.offsets = np.array(numbers, dtype=np.int64), np.array(offsets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return file.readline()


class InstructionData(Dataset[Instruction]):
    """
    Several sets, mixed. Items are numbered through all records of all sets; `draw` says which of them an epoch has.

    Args:
        sets: At least one.
        seed: Of all draws.

    Raises:
        ValueError: There is no set.
    """

    def __init__(self, sets: Sequence[InstructionSet], seed: int = 0):
        if not sets:
            raise ValueError("there are 0 sets of instruction data; expected at least 1")
        self.sets = list(sets)
        self.seed = seed
        self._ends = np.cumsum([len(part) for part in self.sets])

    @property
    def num_samples(self) -> int:
        """Records in an epoch."""
        return sum(part.num_samples for part in self.sets)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Instruction:
        number = range(len(self))[number]
        place = int(np.searchsorted(self._ends, number, side="right"))
        part = self.sets[place]
        return part[number - int(self._ends[place]) + len(part)]

    def draw(self, epoch: int) -> np.ndarray:
        """
        The numbers (num_samples,) of the records of an epoch, in random order.

        A set is gone through in one random order after another. Where an epoch has a quarter of it, the next epoch has
        the next quarter, until all have been seen.
        """
        drawn = []
        for place, (part, end) in enumerate(zip(self.sets, self._ends, strict=True)):
            size, count = len(part), part.num_samples
            first, last = epoch * count // size, ((epoch + 1) * count - 1) // size
            orders = [
                np.random.default_rng((self.seed, turn, place, _RECORDS)).permutation(size)
                for turn in range(first, last + 1)
            ]
            start = epoch * count - first * size
            drawn.append(end - size + np.concatenate(orders)[start : start + count])
        return np.random.default_rng((self.seed, epoch, _ORDER)).permutation(np.concatenate(drawn))


# --- questions of benchmarks as records


def question_records(
    rows: Iterable[Mapping[str, Any]], video_of: Callable[[str], str | os.PathLike]
) -> list[dict[str, Any]]:
    """
    Records that ask the questions of VSI-Bench's table as the benchmark does, with the right answers.

    Args:
        rows: With VSI-Bench's columns (see `rooms_questions_balance.question_rows`).
        video_of: The video, or folder of frames, of a scene's name.

    Raises:
        ValueError: A row is none of VSI-Bench.
        ImportError: `evaluate` is missing, which VSI-Bench's metric needs.
    """
    records = []
    for index, row in enumerate(rows):
        question = vsi_bench_question(row, index)
        turns = (("human", "<video>" + question.prompt), ("gpt", question.ground_truth))
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        video = os.fspath(video_of(row["scene_name"]))
        records.append(
            {
                "id": question.id,
                "question_type": question.question_type,
                "conversations": conversations,
                "video": video,
            }
        )
    return records


__all__ = ["Instruction", "InstructionData", "InstructionSet", "messages_of", "question_records"]
