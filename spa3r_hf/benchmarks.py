"""VSI-Bench, CV-Bench, SPAR-Bench and ViewSpatial-Bench as questions of one form.

```python
questions = load_benchmark("vsi_bench", config="debiased")[:100]
questions = with_media(questions, "folder/of/zips")
answers = [ask(question.video, question.prompt) for question in questions]
print(score_benchmark("vsi_bench", questions, answers).summary["overall"])
```
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from PIL import Image

from .benchmarks_media import find_files
from .benchmarks_questions import (
    IMAGE_COLUMN,
    Question,
    cv_bench_question,
    spar_bench_question,
    viewspatial_bench_question,
    vsi_bench_question,
)
from .benchmarks_scores import BENCHMARKS
from .optional import require
from .scenes import VIDEO_SUFFIXES, LazyImages, natural_key


def load_benchmark(
    name: str, source: str | Path | None = None, *, config: str | None = None, revision: str | None = None
) -> list[Question]:
    """
    The questions of a benchmark, in the natural order of their ids.

    Args:
        name: "vsi_bench", "cv_bench", "spar_bench" or "viewspatial_bench".
        source: A folder laid out as the benchmark's repo, a parquet, JSONL or JSON file of its rows, or a repo id; by
            default the benchmark's own repo on the Hub.
        config: VSI-Bench: "full" (default), "debiased", "pruned". CV-Bench: "default", "2D", "3D".
        revision: Of the repo.

    Raises:
        FileNotFoundError: There is no such source, or the folder does not hold the files of this configuration.
        ValueError: An unknown name or configuration; a row of an unknown type, without options, or with a ground truth
            that cannot be, or an id that occurs twice; the message names the row.
        ImportError: `datasets` (parquet files and the Hub) or `evaluate` (VSI-Bench) is not installed.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark = {name!r}; expected one of {BENCHMARKS}")
    benchmark = _BENCHMARKS[name]
    config = next(iter(benchmark.files)) if config is None else config
    if config not in benchmark.files:
        raise ValueError(f"config = {config!r} of {name}; expected one of {tuple(benchmark.files)}")
    source = benchmark.repo if source is None else source
    questions = []
    for index, row in enumerate(_rows(benchmark, source, config, revision)):
        try:
            questions.append(benchmark.to_question(row, index))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{source}, row {index}: {error!r}; expected the columns of {name}, with values"
            ) from error
    if not questions:
        raise ValueError(f"{source} holds no questions of {name} ({config}); expected at least one")
    repeated = [key for key, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source}: {len(repeated)} ids occur more than once, as id {repeated[0]}; expected unique ids"
        )
    return sorted(questions, key=lambda question: natural_key(question.id))


def with_media(
    questions: Sequence[Question],
    folder: str | Path,
    cache_dir: str | Path | None = None,
    unusable: dict[str, str] | None = None,
) -> list[Question]:
    """
    The questions with their videos or pictures found; see `find_files` for folders, zips and errors.

    Where `unusable` is given, questions with a file that is named there are left without their videos or pictures.

    Raises:
        FileNotFoundError: Some are missing: all are looked for before anything else happens.
    """
    files = find_files((name for question in questions for name in question.media), folder, cache_dir, unusable)
    found = []
    for question in questions:
        paths = [files[name] for name in question.media if name in files]
        if paths and len(paths) == len(question.media):
            if len(paths) == 1 and paths[0].suffix.lower() in VIDEO_SUFFIXES:
                question = replace(question, video=paths[0])
            else:
                question = replace(question, images=LazyImages(paths, question.scene))
        found.append(question)
    return found


def download_media(name: str, questions: Iterable[Question], revision: str | None = None) -> Path:
    """The folder of the zips that hold the media of the questions, downloaded from the benchmark's repo on the Hub."""
    archives = sorted({f"{media.split('/')[0]}.zip" for question in questions for media in question.media})
    folder = snapshot_download(_BENCHMARKS[name].repo, repo_type="dataset", revision=revision, allow_patterns=archives)
    return Path(folder)


def fingerprint(questions: Iterable[Question]) -> str:
    """A hash of ids, scenes, types, questions, options and ground truths, whatever their order and the prompts."""
    rows = sorted(
        [
            question.id,
            question.scene,
            question.question_type,
            question.question,
            question.options,
            question.ground_truth,
        ]
        for question in questions
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass(frozen=True)
class _Benchmark:
    """
    Attributes:
        repo: On the Hub.
        files: Configuration -> the file patterns it may be laid out in, the first whose patterns are all there counts.
        to_question: From a row and its number.
    """

    repo: str
    files: dict[str, tuple[tuple[str, ...], ...]]
    to_question: Callable[[Mapping[str, Any], int], Question]


# The Hub's own glob for VSI-Bench's full configuration, test*.parquet, would match parts of it twice in some folders.
_BENCHMARKS = {
    "vsi_bench": _Benchmark(
        "nyu-visionx/VSI-Bench",
        {
            "full": (
                ("test.parquet",),
                ("test-*.parquet",),
                ("test_debiased*.parquet", "test_pruned*.parquet"),
                ("test.jsonl",),
            ),
            "debiased": (("test_debiased*.parquet",), ("test_debiased*.jsonl",)),
            "pruned": (("test_pruned*.parquet",), ("test_pruned*.jsonl",)),
        },
        vsi_bench_question,
    ),
    "cv_bench": _Benchmark(
        "nyu-visionx/CV-Bench",
        {
            "default": (
                ("test_2d*.parquet", "test_3d*.parquet"),
                ("test.parquet",),
                ("test-*.parquet",),
                ("test_2d*.jsonl", "test_3d*.jsonl"),
                ("test.jsonl",),
            ),
            "2D": (("test_2d*.parquet",), ("test_2d*.jsonl",)),
            "3D": (("test_3d*.parquet",), ("test_3d*.jsonl",)),
        },
        cv_bench_question,
    ),
    "spar_bench": _Benchmark(
        "jasonzhango/SPAR-Bench",
        {"default": (("data/test-*.parquet",), ("test-*.parquet",), ("test.jsonl",))},
        spar_bench_question,
    ),
    "viewspatial_bench": _Benchmark(
        "lidingm/ViewSpatial-Bench",
        {"ViewSpatial-Bench": (("ViewSpatial-Bench.json",), ("test.jsonl",))},
        viewspatial_bench_question,
    ),
}


def _rows(benchmark: _Benchmark, source: str | Path, config: str, revision: str | None) -> Iterator[Mapping[str, Any]]:
    path = Path(source)
    if path.is_file():
        yield from _select(_rows_of_files([path]), config, path)
    elif path.is_dir():
        files = _files_of(path, benchmark.files[config])
        if files:
            yield from _rows_of_files(files)
        else:
            whole = next(iter(benchmark.files))
            files = _files_of(path, benchmark.files[whole])
            if not files:
                raise FileNotFoundError(f"{path} holds none of the files of {config}: {benchmark.files[config]}")
            yield from _select(_rows_of_files(files), config, path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        datasets = require("datasets", extra="eval")
        try:
            table = datasets.load_dataset(str(source), config, split="test", revision=revision)
        except (ConnectionError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{source} does not exist, nor on the Hub ({error})") from error
        yield from _rows_of_dataset(table)
    else:
        raise FileNotFoundError(f"{source} does not exist; expected a folder, a file or a repo id (owner/name)")


def _files_of(folder: Path, layouts: Iterable[tuple[str, ...]]) -> list[Path]:
    for patterns in layouts:
        found = [sorted(folder.glob(pattern)) for pattern in patterns]
        if all(found):
            return [file for files in found for file in files]
    return []


def _select(rows: Iterator[Mapping[str, Any]], config: str, path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a configuration out of a file that may hold all."""
    column, wanted = {
        "debiased": ("pruned", False),
        "pruned": ("pruned", True),
        "2D": ("type", "2D"),
        "3D": ("type", "3D"),
    }.get(config, (None, None))
    for row in rows:
        if column is None:
            yield row
        elif column not in row:
            raise ValueError(f"{path} has no column {column!r} to tell which rows are {config}; expected one")
        elif row[column] == wanted:
            yield row


def _rows_of_files(files: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    if files[0].suffix == ".parquet":
        datasets = require("datasets", extra="eval")
        names = [str(file) for file in files]
        yield from _rows_of_dataset(datasets.load_dataset("parquet", data_files=names, split="train"))
        return
    for file in files:
        if file.suffix == ".json":
            yield from json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".jsonl":
            yield from _rows_of_jsonl(file)
        else:
            raise ValueError(f"{file} is no table; expected a .parquet, .jsonl or .json file")


def _rows_of_jsonl(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: {error}; expected a JSON object") from error
            yield row


def _rows_of_dataset(table: Any) -> Iterator[Mapping[str, Any]]:
    """Rows whose pictures are read only when they are looked at: those of a whole benchmark take gigabytes."""
    if IMAGE_COLUMN not in table.column_names:
        yield from table
        return
    datasets = require("datasets", extra="eval")
    undecoded = datasets.Image(decode=False)
    is_list = not isinstance(table.features[IMAGE_COLUMN], (datasets.Image, dict))
    pictures = table.select_columns(IMAGE_COLUMN)
    pictures = pictures.cast_column(IMAGE_COLUMN, datasets.List(undecoded) if is_list else undecoded)
    for index, row in enumerate(table.remove_columns(IMAGE_COLUMN)):
        yield {**row, IMAGE_COLUMN: _RowImages(pictures, index)}


@dataclass(frozen=True)
class _RowImages(Sequence[Image.Image]):
    """The pictures of one row of a table with encoded pictures."""

    table: Any
    row: int

    def _encoded(self) -> list[Any]:
        pictures = self.table[self.row][IMAGE_COLUMN]
        pictures = pictures if isinstance(pictures, list) else [pictures]
        return [picture["bytes"] or Path(picture["path"]) for picture in pictures]

    def __len__(self) -> int:
        return len(self._encoded())

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # no slices
        return LazyImages(self._encoded(), f"row {self.row}")[index]
