"""Answers that no model has to be asked for: the same to every question, or those of somebody else's run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .benchmarks_questions import Question
from .evaluation_store import Answer, read_json_lines


_CONSTANT = "constant:"
# Names of the column of predictions; the second is that of this package's own predictions.jsonl.
_COLUMNS = ("prediction", "output")


def given_answers(
    given: str, all_questions: Sequence[Question], questions: Sequence[Question], on_missing: str = "raise"
) -> dict[str, Answer]:
    """
    Answers to some questions, by their ids.

    Args:
        given: "constant:A/2" answers A where an option's letter is asked for, and 2 elsewhere. Or a JSONL file whose
            rows have the `id` of a question, and as `prediction` or `output` what was answered: text, a number, null.
        all_questions: Of the benchmark: no other may be answered.
        questions: Those that have to be.
        on_missing: Whether one that is not stops everything ("raise") or is noted as such ("skip").

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `given` is neither; the file has no such columns, an id twice or of no question, or too few.
    """
    if given.startswith(_CONSTANT):
        letter, slash, number = given.removeprefix(_CONSTANT).partition("/")
        if not (letter and slash and number):
            raise ValueError(f"answers = {given!r}; expected {_CONSTANT}LETTER/NUMBER, such as {_CONSTANT}A/2")
        return {
            question.id: Answer(question.id, letter if _wants_letter(question) else number) for question in questions
        }
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"answers = {given!r}: no such file; expected a JSONL file, or {_CONSTANT}A/2")
    outputs = _read(path)
    unknown = sorted(outputs.keys() - {question.id for question in all_questions})
    if unknown:
        raise ValueError(
            f"{path} has {len(unknown)} ids that no question has, such as {unknown[:3]}; expected the benchmark's ids"
        )
    missing = [question.id for question in questions if question.id not in outputs]
    if missing and on_missing == "raise":
        raise ValueError(
            f"{path} has no answer to {len(missing)} of {len(questions)} questions, such as {missing[:3]}; expected "
            "one for each, or --on_bad_sample skip, which counts them as wrong"
        )
    answers = {key: Answer(key, output) for key, output in outputs.items()}
    return answers | {key: Answer(key, error=f"{path.name} has no answer") for key in missing}


def _wants_letter(question: Question) -> bool:
    # Some benchmarks list the options in the question itself.
    truth = question.ground_truth.strip()
    return bool(question.options) or (len(truth) == 1 and truth.isalpha())


def _read(path: Path) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for where, row in read_json_lines(path):
        column = next((name for name in _COLUMNS if name in row), None)
        if column is None or row.get("id") is None:
            raise ValueError(f"{where} has the keys {sorted(row)}; expected id, and one of {_COLUMNS}")
        key, output = str(row["id"]), row[column]
        if key in outputs:
            raise ValueError(f"{where}: id {key} occurs a second time; expected one answer for each question")
        # JSON has no NaN; to every way of reading numbers, the text is none either.
        outputs[key] = str(output) if isinstance(output, float) and not math.isfinite(output) else output
    return outputs


__all__ = ["given_answers"]
