"""Scripts of `training/` in tests: as modules, and in processes of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file


TRAINING = Path(__file__).resolve().parents[1] / "training"
# Same order of sums in every run: what is compared bit for bit needs it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def load_script(name: str) -> ModuleType:
    """A script as a module, for its `main`."""
    specification = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def start_script(name: str, arguments: list[str], processes: int = 1, **options) -> subprocess.Popen:
    """Start a script, on several processes with torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(TRAINING / f"{name}.py"), *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process: subprocess.Popen) -> str:
    """What a script printed, once it has ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(checkpoint: Path) -> list[dict]:
    """What was logged until a checkpoint, without what depends on the time."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "train_runtime" not in entry]


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    """Two safetensors files, bit for bit, or within `rtol` and `atol`."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if tolerance:
            torch.testing.assert_close(value, second[key], **tolerance)
        else:
            assert torch.equal(value, second[key]), key
