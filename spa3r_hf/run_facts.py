"""What a training run was: the facts that its model card and `run.json` state."""

import os
import re
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainingArguments


def shown_command(script: str, argv: Sequence[str], num_processes: int) -> str:
    """The command as typed, without secrets."""
    launcher = ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]
    words = [re.sub(r"([_-]token=).*", r"\1...", word) for word in argv]
    follows_token = [index > 0 and argv[index - 1].endswith(("_token", "-token")) for index in range(len(argv))]
    words = ["..." if hidden else word for hidden, word in zip(follows_token, words, strict=True)]
    return shlex.join([*launcher, f"training/{script}", *words])


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
