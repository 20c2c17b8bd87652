"""Answers on disk: whole lines, nothing lost and nothing twice, never of two settings at once."""

import json

import pytest

from spa3r_hf.evaluation_store import (
    Answer,
    AnswerWriter,
    check_settings,
    count_lines,
    flat,
    read_answers,
    read_json_lines,
)


def answers(*ids: str, **values) -> list[Answer]:
    return [Answer(key, f"w{key}", 3, 0.5, **values) for key in ids]


def test_what_is_appended_is_read(tmp_path):
    odd = [Answer("3", "\ud800 四 \n\r\u2028 x"), Answer("4", error="video x.mp4 is damaged"), Answer("5", 4.5)]
    with AnswerWriter(tmp_path, 0) as writer:
        writer.append(answers("1", "2"))
        writer.append(odd)
    with AnswerWriter(tmp_path, 7) as writer:
        writer.append(answers("6"))
    expected = {answer.id: answer for answer in [*answers("1", "2"), *odd, *answers("6")]}
    assert read_answers(tmp_path) == expected
    assert count_lines(tmp_path / "answers" / "part-00000.jsonl") == 5 and count_lines(tmp_path / "none") == 0


def test_answers_are_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("spa3r_hf.evaluation_store.os.fsync", lambda number: synced.append(number))
    writer = AnswerWriter(tmp_path)
    writer.append(answers("1", "2"))
    assert read_answers(tmp_path).keys() == {"1", "2"} and len(synced) == 1  # before it is closed
    writer.close()


@pytest.mark.parametrize(
    "tail",
    [b"{", b'{"id": "3", "output": "w', b'{"id": "3", "output": "w3"}', b"\x00\x00\x00", b"\x00\x00\n", b"\xff"],
)
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path, tail):
    with AnswerWriter(tmp_path) as writer:
        writer.append(answers("1", "2"))
    path = writer.path
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read_answers(tmp_path).keys() == {"1", "2"} and path.read_bytes() == whole + tail
    with AnswerWriter(tmp_path) as writer:
        assert path.read_bytes() == whole
        writer.append(answers("3"))
    assert read_answers(tmp_path).keys() == {"1", "2", "3"}


def test_a_damaged_line_in_the_midst_is_an_error(tmp_path):
    with AnswerWriter(tmp_path) as writer:
        writer.append(answers("1", "2", "3"))
    lines = writer.path.read_bytes().splitlines(keepends=True)
    writer.path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(ValueError, match=r"part-00000.jsonl, line 2: .*expected a JSON object"):
        read_answers(tmp_path)
    writer.path.write_bytes(lines[0] + b'{"id": "2", "said": "w2"}\n' + lines[2])
    with pytest.raises(ValueError, match=r"line 2: .*'said'.*expected an answer as this evaluation writes it"):
        read_answers(tmp_path)


def test_one_answer_for_each_question(tmp_path):
    failed = Answer("1", error="its video is damaged")
    for part, given in enumerate([[failed], [failed], answers("1", "2"), [failed]]):
        with AnswerWriter(tmp_path, part) as writer:
            writer.append(given)
    assert read_answers(tmp_path)["1"] == answers("1")[0]  # that it once failed counts no more
    with AnswerWriter(tmp_path, 1) as writer:
        writer.append(answers("2"))
    with pytest.raises(ValueError, match="id 2 has an answer already"):
        read_answers(tmp_path)


def test_two_writers_of_one_part(tmp_path):
    pytest.importorskip("fcntl")
    with AnswerWriter(tmp_path) as writer:
        writer.append(answers("1"))
        with pytest.raises(BlockingIOError, match="is being written by another process"):
            AnswerWriter(tmp_path)
        with AnswerWriter(tmp_path, 1) as other:
            other.append(answers("2"))
        writer.append(answers("3"))
    assert read_answers(tmp_path).keys() == {"1", "2", "3"}


def test_settings(tmp_path):
    settings = {"model": {"id": "one", "revision": "a"}, "frames": 8, "adapter": None, "sizes": (1, 2)}
    check_settings(tmp_path / "out", settings)
    check_settings(tmp_path / "out", settings)
    other = settings | {"model": {"id": "one", "revision": "b"}, "adapter": {"id": "two"}}
    with pytest.raises(FileExistsError) as caught:
        check_settings(tmp_path / "out", other)
    message = str(caught.value)
    assert "model.revision = 'a', now 'b'" in message and "adapter.id = None, now 'two'" in message
    assert "frames" not in message and "model.id" not in message
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["model"]["revision"] == "a"
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}


def test_lines_of_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\r\n\n{"id": 2}')  # no end, and none needed
    assert [row for _, row in read_json_lines(path)] == [{"id": 1}, {"id": 2}]
    path.write_bytes(b'{"id": 1}\n{"id"')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        list(read_json_lines(path))
