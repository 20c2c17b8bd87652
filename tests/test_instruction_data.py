"""Records of instruction data: formats, mixtures, bad ones."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spa3r_hf.errors import BadSampleError
from spa3r_hf.instruction_data import InstructionData, InstructionSet, messages_of, question_records


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(path: str) -> dict:
    return {"type": "image", "image": f"/media/{path}"}


@pytest.mark.parametrize(
    ("record", "first"),
    [
        ({"image": "a.jpg", "conversations": said("<image>\nWhat?", "A")}, [image("a.jpg"), text("\nWhat?")]),
        (
            {"image": ["a.jpg", "b/c.png"], "conversations": said("Here <image> and <image>: which?", "A")},
            [text("Here "), image("a.jpg"), text(" and "), image("b/c.png"), text(": which?")],
        ),
        (
            {"images": ["a.jpg", "b.jpg"], "video": None, "conversations": said("<image><image>Which?", "A")},
            [image("a.jpg"), image("b.jpg"), text("Which?")],
        ),
        (
            {"video": "v.mp4", "conversations": said("<video>\nHow many?", "3")},
            [{"type": "video", "video": "/media/v.mp4"}, text("\nHow many?")],
        ),
        (
            {"video": "/frames", "image": "", "conversations": said("<image>\nHow many?", "3")},
            [{"type": "video", "video": "/frames"}, text("\nHow many?")],
        ),
        ({"conversations": said("How are you?", " Well. \n")}, [text("How are you?")]),
    ],
    ids=["image", "images within text", "images", "video", "image for a video", "text"],
)
def test_records_become_messages(record, first):
    messages = messages_of(record, Path("/media"), "r")
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == first
    assert messages[1]["content"] == [text(record["conversations"][1]["value"].strip())]


def test_several_turns_and_a_system_prompt():
    turns = [{"from": "system", "value": "Be brief."}, *said("<image>A?", "a", "And <image>?", "an <image>")]
    messages = messages_of({"images": ["1", "2"], "conversations": turns}, Path("/media"), "r")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == [text("And "), image("2"), text("?")]
    assert messages[4]["content"] == [text("an <image>")]  # what is answered has no pictures


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "r is a list; expected an object with conversations"),
        ({}, "r has conversations = None; expected a list"),
        ({"conversations": []}, r"r has conversations = \[\]; expected a list of at least two"),
        ({"conversations": said("What?")}, r"turns of \['human'\]; expected human and gpt in turn"),
        ({"conversations": said("A", "B", "C")}, "gpt last"),
        ({"conversations": said("A", "B")[::-1]}, r"turns of \['gpt', 'human'\]"),
        ({"conversations": [{"from": "system", "value": "A"}]}, "expected human and gpt in turn"),
        ({"conversations": [{"from": "user", "value": "A"}, *said("A", "B")]}, "turn 0 is {'from': 'user'"),
        ({"conversations": said("A", " ")}, "turn 1 is .*expected .*some text"),
        ({"conversations": said("A", 3)}, "turn 1 is .*expected .*some text"),
        ({"image": "a", "conversations": said("What?", "A")}, r"1 pictures and the placeholders \[\]; expected <im"),
        ({"conversations": said("<image>What?", "A")}, "0 pictures and the placeholders .*expected <image> 0 times"),
        ({"images": ["a", "b"], "conversations": said("<image>What?", "A")}, "2 pictures .*<image> 2 times"),
        ({"image": "a", "conversations": said("<video>What?", "A")}, "1 pictures and the placeholders .*<video>"),
        ({"video": "a", "conversations": said("<video><video>?", "A")}, "a video and .*expected <video> once"),
        ({"video": ["a"], "conversations": said("<video>?", "A")}, r"video = \['a'\]; expected the path"),
        ({"image": {"bytes": 1}, "conversations": said("<image>?", "A")}, "image = .*; expected the path"),
        ({"image": "a", "video": "b", "conversations": said("<image>?", "A")}, r"\['image', 'video'\]; expected one"),
    ],
)
def test_bad_records_are_named(record, message):
    with pytest.raises(BadSampleError, match=message):
        messages_of(record, Path("/media"), "r")


def test_files_of_both_kinds(tmp_path):
    records = [{"image": f"{number}.jpg", "conversations": said("<image>?", str(number))} for number in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps(records[0]), "", *map(json.dumps, records[1:])]) + "\n\n")
    listed, lines = InstructionSet.open(str(tmp_path / "a.json")), InstructionSet.open(str(tmp_path / "b.jsonl"))
    assert len(listed) == len(lines) == 4
    for one, other in zip(listed, lines, strict=True):
        assert one.messages() == other.messages()
    assert listed[2].messages()[0]["content"][0]["image"] == str(tmp_path / "2.jpg")
    assert listed[2].name == f"{tmp_path}/a.json, record 2" and lines[2].name == f"{tmp_path}/b.jsonl, line 4"
    elsewhere = InstructionSet.open(str(tmp_path / "b.jsonl%50"), "/media")
    assert elsewhere[-1].messages()[0]["content"][0] == image("3.jpg") and elsewhere.num_samples == 2


def test_a_damaged_line_spoils_nothing_else(tmp_path):
    good = json.dumps({"conversations": said("A", "B")})
    (tmp_path / "a.jsonl").write_text(f'{good}\n{good[:20]}\n{good}\n[1]\n"\xff"\n', encoding="latin-1")
    data = InstructionData([InstructionSet.open(str(tmp_path / "a.jsonl"))])
    assert data[0].messages() == data[2].messages()
    for number, message in ((1, "line 2 is no JSON"), (3, "line 4 is a list"), (4, "line 5 is no JSON")):
        with pytest.raises(BadSampleError, match=f"a.jsonl, {message}"):
            data[number].messages()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "a.json is no JSON"),
        ("b.json", "{}", "b.json holds a dict; expected a list of records"),
        ("c.json", "[]", "c.json holds no records"),
        ("d.jsonl", "\n", "d.jsonl holds no records"),
        ("e.jsonl%0", "{}", "rate = 0.0; expected a number above 0"),
    ],
)
def test_files_that_are_no_data(tmp_path, name, content, message):
    (tmp_path / name.removesuffix("%0")).write_text(content)
    with pytest.raises(ValueError, match=message):
        InstructionSet.open(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="nothing.json does not exist"):
        InstructionSet.open(str(tmp_path / "nothing.json%25"))


def numbered(name: str, count: int, rate: float) -> InstructionSet:
    return InstructionSet(name, [{"conversations": said(name, str(number))} for number in range(count)], rate=rate)


def drawn(data: InstructionData, epoch: int) -> Counter:
    return Counter(
        tuple(message["content"][0]["text"] for message in data[int(number)].messages()) for number in data.draw(epoch)
    )


def test_sets_are_mixed_by_their_rates():
    data = InstructionData([numbered("a", 40, 0.25), numbered("b", 6, 1.0), numbered("c", 5, 2.5)], seed=3)
    assert len(data) == 51 and data.num_samples == 10 + 6 + 12
    epochs = [drawn(data, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert Counter({name: sum(n for key, n in epoch.items() if key[0] == name) for name in "abc"}) == {
            **{"a": 10, "b": 6, "c": 12}
        }
        assert all(epoch["b", str(number)] == 1 for number in range(6))
    seen = sum(epochs, Counter())
    assert all(seen["a", str(number)] == 1 for number in range(40))  # four quarters are the whole
    assert all(9 <= seen["c", str(number)] <= 10 for number in range(5))  # 48 in all
    assert data.num_samples == len(data.draw(0))


def test_draws_depend_on_seed_and_epoch_alone():
    sets = [numbered("a", 40, 0.25), numbered("b", 6, 1.0)]
    data = InstructionData(sets, seed=3)
    later = data.draw(5)
    assert np.array_equal(later, InstructionData(sets, seed=3).draw(5))
    assert not np.array_equal(later, data.draw(4))
    assert not np.array_equal(later, InstructionData(sets, seed=4).draw(5))
    assert not np.array_equal(data.draw(0), np.sort(data.draw(0)))
    with pytest.raises(ValueError, match="0 sets"):
        InstructionData([])


def test_questions_of_vsi_bench_as_it_asks_them():
    pytest.importorskip("evaluate")
    shared = {"dataset": "rooms", "scene_name": "room_000007"}
    rows = [
        {**shared, "id": 0, "question_type": "object_counting", "question": "How many?", "ground_truth": "3"}
        | {"options": None},
        {**shared, "id": 1, "question_type": "route_planning", "question": "Where?", "ground_truth": "B"}
        | {"options": ["A. left", "B. right"]},
    ]
    records = question_records(rows, lambda scene: Path("/rooms") / scene)
    number, letter = (messages_of(record, Path("/media"), "r") for record in records)
    assert number[0]["content"] == [
        {"type": "video", "video": "/rooms/room_000007"},
        text("These are frames of a video.\nHow many?\nPlease answer the question using a single word or phrase."),
    ]
    assert letter[0]["content"][1]["text"] == (
        "These are frames of a video.\nWhere?\nOptions:\nA. left\nB. right\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [messages[1]["content"][0]["text"] for messages in (number, letter)] == ["3", "B"]
    with pytest.raises(ValueError, match="question type 'riddle'"):
        question_records([rows[0] | {"question_type": "riddle"}], str)
