"""Weights in shards: FSDP2 on two processes learns what one process does, and saves what it saves."""

import subprocess
import sys
from pathlib import Path

import torch
from script_runs import ENVIRONMENT
from tiny_vlms import SAMPLES, SPATIAL_WIDTH, close, latents, tiny_inputs, trained

from spa3r_hf import Spa3VLM


# Runs on each process: the samples of its own, text alone on one of them in the second step.
TRAIN = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, sys.argv[1])
from test_modeling_spa3_vlm_sharded import STEPS, fresh, losses_of

dist.init_process_group("gloo")
model, mesh = fresh(), init_device_mesh("cpu", (2,))
for layer in model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for step in STEPS:
    losses_of(model, [step[dist.get_rank()]])[0].backward()
    optimizer.step()
    optimizer.zero_grad()
state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    model.save_pretrained(sys.argv[2], state_dict=state_dict)
dist.barrier()
dist.destroy_process_group()
"""
STEPS = [([0, 1], [2, 3]), ([3], [1])]


def fresh() -> Spa3VLM:
    model = trained("qwen2_5_vl", None, spatial_hidden_size=SPATIAL_WIDTH).train()
    model.language_model.requires_grad_(True)
    return model


def losses_of(model: Spa3VLM, parts: list[list[int]]) -> list[torch.Tensor]:
    """The loss of each batch of numbers of samples."""
    losses = []
    for numbers in parts:
        inputs = tiny_inputs("qwen2_5_vl", [SAMPLES[number] for number in numbers])
        losses.append(model(**inputs, spatial_latents=latents()[numbers], labels=inputs["input_ids"]).loss)
    return losses


def test_two_processes_with_shards_learn_as_one(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    arguments = [str(tmp_path / "train.py"), str(Path(__file__).parent), str(tmp_path / "saved")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    model = fresh()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in STEPS:
        sum(losses_of(model, list(step))).div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = Spa3VLM.from_pretrained(tmp_path / "saved").state_dict()
    expected, before = model.state_dict(), fresh().state_dict()
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        close(saved[name], value)
    moved = {name for name, value in expected.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("adapters.") for name in moved) and any(".layers." in name for name in moved)
