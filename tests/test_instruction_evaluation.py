"""Which records have short answers, and what answers to them score."""

import json
from pathlib import Path

import pytest

from spa3r_hf.errors import BadSampleError
from spa3r_hf.instruction_data import Instruction
from spa3r_hf.instruction_evaluation import score_short_answers, short_question


pytest.importorskip("evaluate")


def record(answer: str, question_type=None, before: tuple[str, ...] = ()) -> dict:
    texts = [*before, "What?", answer]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns} | ({} if question_type is None else {"question_type": question_type})


def question(answer: str, question_type=None, **options):
    return short_question(Instruction("r", record(answer, question_type, **options), Path()))


def test_the_last_question_of_a_record_with_a_short_answer():
    asked = question("a red chair", before=("How many?", "3"))
    assert asked.truth == "a red chair" and asked.question_type is None
    assert [message["role"] for message in asked.messages] == ["user", "assistant", "user"]
    assert question("one two three four five") and question("one two three four five six") is None
    line = Instruction("r", json.dumps(record("3", "object_counting")).encode(), Path())
    assert short_question(line).question_type == "object_counting"
    with pytest.raises(BadSampleError, match="r is no JSON"):
        short_question(Instruction("r", b"{", Path()))


@pytest.mark.parametrize(
    ("answer", "question_type", "expected"),
    [
        ("3", "object_counting", "object_counting"),
        ("B", "route_planning", "route_planning"),
        ("left", "route_planning", None),  # no option's letter
        ("many", "object_counting", None),
        ("3", "object_colour", None),
        ("3", 7, None),
        ("3", None, None),
    ],
)
def test_types_are_vsi_benchs_where_the_answer_is_one(answer, question_type, expected):
    assert question(answer, question_type).question_type == expected


def test_scores_of_each_kind():
    cases = [
        (question("4", "object_counting"), "three"),  # off by a quarter: 6 of the 10 thresholds
        (question("10", "object_counting"), "10 chairs"),
        (question("B", "route_planning"), "b."),
        (question("2.0"), "2"),
        (question("2.0"), "no idea"),
        (question("C"), "C. a lamp"),
        (question("A red chair."), "a  red chair"),
        (question("yes"), "no"),
    ]
    scores = score_short_answers(*zip(*cases, strict=True))
    assert scores["object_counting"] == pytest.approx(80) and scores["route_planning"] == 100
    assert scores["overall"] == pytest.approx(90) == pytest.approx((scores["numerical"] + 100) / 2)
    assert scores["mra"] == 50 and scores["exact_match"] == pytest.approx(100 * 2 / 3)
    assert all(isinstance(value, float) for value in scores.values())
    assert not [name for name in scores if name.startswith(("count", "ci95", "unparseable"))]
    assert score_short_answers([question("yes")], ["Yes."]) == {"exact_match": 100.0}
    assert score_short_answers([], []) == {}
    with pytest.raises(ValueError):
        score_short_answers([question("yes")], [])
