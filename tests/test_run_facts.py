"""What a run says of itself when it took several commands."""

import json
import time
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from spa3r_hf.run_facts import RunRecord


def record_of(folder, argv, resume=None, seconds_ago: float = 0.0) -> RunRecord:
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    return RunRecord("run_it.py", argv, args, resume, time.monotonic() - seconds_ago)


def facts_of(record: RunRecord) -> dict:
    trainer = SimpleNamespace(state=TrainerState(global_step=7), hub_model_id=None)
    return record.facts(trainer, nn.Linear(2, 2))


def tell(record: RunRecord, event: str) -> list[dict]:
    """What `commands.json` holds after an event of the Trainer's."""
    getattr(record, event)(record.args, TrainerState(is_world_process_zero=True), TrainerControl())
    folder = record.args.output_dir
    with open(f"{folder}/commands.json") as file:
        return json.load(file)


def test_seconds_of_all_commands_are_added_up(tmp_path):
    folder = tmp_path / "run"
    first = record_of(folder, ["--max_steps", "5"], seconds_ago=100)
    assert [entry["seconds"] for entry in tell(first, "on_train_begin")] == [pytest.approx(100, abs=5)]
    first.started -= 40
    tell(first, "on_save")
    # It is killed; of what came after its last checkpoint nothing is known.
    resume = str(folder / "checkpoint-3")
    second = record_of(folder, ["--max_steps", "5", "--resume_from_checkpoint", "last"], resume, seconds_ago=10)
    commands = [entry["command"] for entry in tell(second, "on_train_begin")]
    assert commands == [
        "python training/run_it.py --max_steps 5",
        "python training/run_it.py --max_steps 5 --resume_from_checkpoint last",
    ]
    third = record_of(folder, second.argv, resume, seconds_ago=1)
    facts = facts_of(third)
    assert facts["command"] == "; ".join(commands)  # one typed twice is shown once
    assert facts["seconds"] == pytest.approx(100 + 40 + 10 + 1, abs=10)
    assert facts["steps"] == 7 and facts["name"] == "run" and facts["parameters"] == 6
    assert len(json.loads((folder / "commands.json").read_text())) == 3


def test_earlier_commands_are_those_beside_the_checkpoint(tmp_path):
    facts_of(record_of(tmp_path / "old", ["--old"], seconds_ago=50))
    moved = facts_of(record_of(tmp_path / "new", ["--new"], str(tmp_path / "old" / "checkpoint-3")))
    assert moved["command"].count(";") == 1 and moved["seconds"] == pytest.approx(50, abs=5)
    fresh = facts_of(record_of(tmp_path / "old", ["--fresh"]))
    assert fresh["command"] == "python training/run_it.py --fresh" and fresh["seconds"] < 5


def test_commands_without_seconds_are_still_named(tmp_path):
    (tmp_path / "commands.json").write_text('["python training/run_it.py --old"]')
    facts = facts_of(record_of(tmp_path, ["--new"], str(tmp_path / "checkpoint-3"), seconds_ago=3))
    assert facts["command"] == "python training/run_it.py --old; python training/run_it.py --new"
    assert facts["seconds"] == pytest.approx(3, abs=2)


def test_other_processes_write_nothing(tmp_path):
    record = record_of(tmp_path / "run", [])
    for event in ("on_train_begin", "on_save"):
        getattr(record, event)(record.args, TrainerState(is_world_process_zero=False), TrainerControl())
    assert not (tmp_path / "run" / "commands.json").exists()
