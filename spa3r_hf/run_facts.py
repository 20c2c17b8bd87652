"""What a training run was: the facts that its model card and `run.json` state."""

import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from .shown_names import shown_path


def shown_command(script: str, argv: Sequence[str], num_processes: int) -> str:
    """The command as typed, without secrets and without this machine's folders."""
    launcher = ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]
    words = [re.sub(r"([_-]token=).*", r"\1...", word) for word in argv]
    follows_token = [index > 0 and argv[index - 1].endswith(("_token", "-token")) for index in range(len(argv))]
    words = ["..." if hidden else word for hidden, word in zip(follows_token, words, strict=True)]
    return shlex.join([*launcher, f"training/{script}", *map(_shown_word, words)])


def without_folders(commands: str) -> str:
    """Commands that were noted with this machine's folders, "; " between them, as `shown_command` gives them now."""
    return "; ".join(shlex.join(map(_shown_word, shlex.split(command))) for command in commands.split("; "))


def _shown_word(word: str) -> str:
    flag, value = re.fullmatch(r"(--?[\w-]+=)?(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    return (flag or "") + shown_path(value)


def run_facts(
    script: str, argv: Sequence[str], args: TrainingArguments, model: nn.Module, steps: int, started: float
) -> dict[str, Any]:
    """
    Args:
        script: Name of the training script.
        argv: Its arguments.
        args: The arguments of the Trainer.
        model: What was trained.
        steps: How long.
        started: `time.monotonic()` at the start.
    """
    on_cuda = args.device.type == "cuda"
    return {
        "command": shown_command(script, argv, args.world_size),
        "steps": steps,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "seconds": round(time.monotonic() - started, 1),
        "hardware": torch.cuda.get_device_name() if on_cuda else f"{os.cpu_count()} CPU cores",
        "processes": args.world_size,
        "versions": {
            "spa3r_hf": version("spa3r_hf"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


class RunRecord(TrainerCallback):
    """
    The facts of a run of several commands, each of which goes on from a checkpoint of the one before.

    The commands and their seconds are kept in `commands.json` in the output folder, which is written at the start and
    with every checkpoint: a command that is killed counts up to its last one.

    Args:
        script: Name of the training script.
        argv: Its arguments.
        args: The arguments of the Trainer.
        resume: The checkpoint that it goes on from, if any; earlier commands are read from beside it.
        started: `time.monotonic()` at the start.
    """

    file_name = "commands.json"

    def __init__(self, script: str, argv: Sequence[str], args: TrainingArguments, resume: str | None, started: float):
        self.script, self.argv, self.args, self.started = script, list(argv), args, started
        self.earlier = _read_commands(Path(resume).parent / self.file_name) if resume else []

    def commands(self) -> list[dict[str, Any]]:
        """`command` and `seconds` of each, so far."""
        command = shown_command(self.script, self.argv, self.args.world_size)
        return [*self.earlier, {"command": command, "seconds": round(time.monotonic() - self.started, 1)}]

    def facts(self, trainer: Trainer, model: nn.Module) -> dict[str, Any]:
        """`run_facts`, of all commands, and the run's `name`; `model` is what was trained."""
        self._write()
        commands = self.commands()
        return {
            **run_facts(self.script, self.argv, self.args, model, trainer.state.global_step, self.started),
            "command": "; ".join(dict.fromkeys(entry["command"] for entry in commands)),
            "seconds": round(sum(entry["seconds"] for entry in commands), 1),
            "name": trainer.hub_model_id or Path(str(self.args.output_dir)).resolve().name,
        }

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._write()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._write()

    def _write(self) -> None:
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{self.file_name}"  # a command that is killed leaves a whole file
        part.write_text(json.dumps(self.commands(), indent=2) + "\n")
        part.replace(folder / self.file_name)


def _read_commands(path: Path) -> list[dict[str, Any]]:
    commands = json.loads(path.read_text()) if path.exists() else []
    # Files of before seconds were kept are lists of commands.
    return [entry if isinstance(entry, dict) else {"command": entry, "seconds": 0.0} for entry in commands]
