"""
Checkpoints of a model most of which is frozen: what is trained in each, what is frozen written once.

A checkpoint is an ordinary sharded one. Its index names two files, `model-trained.safetensors` beside it and
`model-frozen.safetensors`, which may be in another folder (`../model-frozen.safetensors`), so that `from_pretrained`
and `Trainer` read it as any other.
"""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


FROZEN_NAME = "model-frozen.safetensors"
TRAINED_NAME = "model-trained.safetensors"


def trained_keys(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that require gradients."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_frozen(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write everything of the state dict that is not trained to `folder / model-frozen.safetensors`."""
    trained = trained_keys(model)
    frozen = {key: value.contiguous() for key, value in model.state_dict().items() if key not in trained}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(frozen, Path(folder) / FROZEN_NAME, metadata={"format": "pt"})


def save_trained(model: PreTrainedModel, folder: str | os.PathLike, frozen_folder: str | os.PathLike) -> None:
    """
    Write configuration, code and trained weights to `folder`, and an index that finds the rest in `frozen_folder`.

    Raises:
        FileNotFoundError: `save_frozen` has not been called for `frozen_folder`.
    """
    folder, frozen_file = Path(folder), Path(frozen_folder) / FROZEN_NAME
    if not frozen_file.is_file():
        raise FileNotFoundError(f"{frozen_file} does not exist; expected the frozen weights that save_frozen writes")
    trained = trained_keys(model)
    state_dict = model.state_dict()
    model.save_pretrained(folder, state_dict={key: state_dict[key] for key in trained}, max_shard_size="1TB")
    (folder / SAFE_WEIGHTS_NAME).replace(folder / TRAINED_NAME)
    frozen_name = Path(os.path.relpath(frozen_file, folder)).as_posix()
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in state_dict.values())},
        "weight_map": {key: TRAINED_NAME if key in trained else frozen_name for key in sorted(state_dict)},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def last_checkpoint(folder: str | os.PathLike) -> Path:
    """
    The `checkpoint-<step>` of the highest step, passing over one whose writing was cut short.

    Raises:
        FileNotFoundError: There is none.
    """
    # The Trainer writes its state last.
    states = [path for path in Path(folder).glob("checkpoint-[0-9]*/trainer_state.json") if path.stat().st_size]
    steps = {int(path.parent.name.removeprefix("checkpoint-")): path.parent for path in states}
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint to resume from; expected {folder}/checkpoint-<step>")
    return steps[max(steps)]
