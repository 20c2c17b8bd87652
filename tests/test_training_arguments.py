"""Command lines of the training scripts: recipes, mistakes, and where a run goes on from."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from spa3r_hf import Spa3RConfig, Spa3RVGGTConfig
from spa3r_hf.training_arguments import (
    RoomArguments,
    checkpoint_to_resume,
    parse_with_recipe,
    read_config,
    usage_errors,
)


REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Arguments:
    steps: int = field(default=3)
    names: list[str] = field(default_factory=lambda: ["a"])
    settings: dict | None = field(default=None)


def test_flags_override_a_recipe(tmp_path):
    for name, content in (("a.yaml", "steps: 5\nnames: [b, c]\n"), ("b.json", '{"steps": 5, "names": ["b", "c"]}')):
        (tmp_path / name).write_text(content)
        (arguments,) = parse_with_recipe((Arguments,), [str(tmp_path / name), "--names", "d"])
        assert arguments == Arguments(5, ["d"])
    assert parse_with_recipe((Arguments,), [], {"steps": 9}) == (Arguments(9),)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"steps: [1", "a.yaml cannot be read: while parsing a flow sequence"),
        (b"\xff\xfe\xfd", "a.yaml cannot be read: 'utf-8' codec"),
        (b"- steps", r"a.yaml holds \['steps'\]; expected names of arguments and their values"),
        (b"stepz: 3\n4: 5", r"a.yaml has unknown arguments \['4', 'stepz'\]; see --help"),
    ],
)
def test_recipes_that_cannot_be_used_are_named(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse_with_recipe((Arguments,), [str(tmp_path / "a.yaml")])


def test_flags_that_cannot_be_used_are_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        parse_with_recipe((Arguments,), [str(tmp_path / "nowhere.json")])
    with pytest.raises(ValueError, match=r"unknown arguments \['--step', '3'\]; see --help"):
        parse_with_recipe((Arguments,), ["--step", "3"])
    with pytest.raises(SystemExit) as ended:
        parse_with_recipe((Arguments,), ["--steps", "many"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.endswith("error: argument --steps: invalid int value: 'many'; see --help\n")


@pytest.mark.parametrize(
    "error", [ValueError("two\n  lines"), FileNotFoundError("two lines"), StrictDataclassError("two lines")]
)
def test_mistakes_end_a_script_with_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/run_it.py"])
    with pytest.raises(SystemExit) as ended, usage_errors("__main__"):
        raise error
    assert ended.value.code == 2 and capsys.readouterr().err == "run_it.py: error: two lines\n"
    with pytest.raises(type(error)), usage_errors("run_it"):  # imported
        raise error


def test_other_errors_keep_their_traceback():
    for error in (TypeError("a bug"), RuntimeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), usage_errors("__main__"):
            raise error


def test_configurations_of_another_kind_are_refused(tmp_path):
    Spa3RVGGTConfig().save_pretrained(tmp_path / "vggt")
    assert isinstance(read_config("a", tmp_path / "vggt", Spa3RVGGTConfig), Spa3RVGGTConfig)
    with pytest.raises(ValueError, match="config_name = .*vggt is a 'spa3r_vggt'; expected 'spa3r'"):
        read_config("config_name", tmp_path / "vggt", Spa3RConfig)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{")
    for name in ("empty", "odd"):
        with pytest.raises(ValueError, match=f"config_name = .*{name} has no configuration that can be read: "):
            read_config("config_name", tmp_path / name, Spa3RConfig)


def test_where_a_run_goes_on_from(tmp_path):
    assert checkpoint_to_resume(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume from"):
        checkpoint_to_resume(tmp_path, "last")
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert checkpoint_to_resume(tmp_path, "last") == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume("elsewhere", str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    with pytest.raises(
        FileNotFoundError, match="resume_from_checkpoint = .* is no checkpoint: it holds no trainer_st"
    ):
        checkpoint_to_resume(tmp_path, str(tmp_path))
    with pytest.raises(FileExistsError, match="holds the checkpoints of another run.*checkpoint-10"):
        checkpoint_to_resume(tmp_path, None)


def test_facts_of_the_rooms():
    facts = RoomArguments(num_rooms=8, num_eval_rooms=4, split="test").facts()
    assert facts == {"data": "procedural rooms 0 to 7", "held_out": "4 rooms of the test split"}


@pytest.mark.parametrize(
    "command, message",
    [
        (["run_psfm.py", "--config_overrides", "{mask"], "config_overrides = '{mask' is not JSON"),
        (["run_geometry.py", "--model_name_or_path", "hub_configs/spa3r-nano"], "is a 'spa3r'; expected 'spa3r_vggt'"),
        (
            ["run_semantic.py", "--resume_from_checkpoint", "nowhere"],
            "resume_from_checkpoint = nowhere is no checkpoint",
        ),
        (["ablate_psfm.py", "--steps", "0"], "steps = 0; expected at least 1"),
    ],
)
def test_a_wrong_call_of_a_script_is_answered_in_one_line(tmp_path, command, message):
    script, *arguments = command
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "training" / script), *arguments, "--output_dir", str(tmp_path / "out")],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    *warnings, line = result.stderr.splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert line.startswith(f"{script}: error: ") and message in line
    assert not (tmp_path / "out").exists()
