"""What the training scripts' command lines share: arguments, recipes, errors, and where a run goes on from."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.logging import disable_progress_bar

from .checkpoint_spa3r import last_checkpoint
from .hub_errors import explain_hub_error


Config = TypeVar("Config", bound=PreTrainedConfig)


@dataclass
class RunArguments(TrainingArguments):
    """What all training runs share; each script adds its `output_dir` and how it optimises."""

    report_to: None | str | list[str] = "none"
    seed: int = 0
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; 'last': the last one in output_dir."}
    )
    # Before the end there is no model card.
    hub_strategy: str = "end"


@dataclass
class RoomArguments:
    """The procedural rooms that a teacher is trained and scored on."""

    num_rooms: int = field(default=1500, metadata={"help": "Rooms to train on."})
    cache_dir: str = field(
        default="outputs/rooms", metadata={"help": "Where rendered rooms are kept, 3 MB each, for later runs."}
    )
    num_eval_rooms: int = field(default=32, metadata={"help": "Rooms to evaluate on."})
    split: Literal["validation", "test"] = field(default="validation", metadata={"help": "Rooms to evaluate on."})

    def facts(self) -> dict[str, str]:
        """What `run.json` says of them."""
        return {
            "data": f"procedural rooms 0 to {self.num_rooms - 1}",
            "held_out": f"{self.num_eval_rooms} rooms of the {self.split} split",
        }


@contextmanager
def usage_errors(name: str) -> Iterator[None]:
    """
    End a script with one line on stderr and exit code 2, as argparse does, when it was called wrongly.

    It goes around what a script does before it trains. A setting, a file or a folder that is wrong is a ValueError, an
    OSError or what a configuration says of its fields; anything else, and all that comes later, keeps its traceback.

    Args:
        name: The script's `__name__`. Who imports it and calls its `main` gets the error itself.
    """
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        if name != "__main__":
            raise
        message = explain_hub_error(error) or str(error)
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}\n")
        raise SystemExit(2) from error


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without argparse's usage, which goes through all of TrainingArguments.
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse_with_recipe(
    kinds: Sequence[type], argv: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """
    Arguments of a script, as one instance of each of some data classes.

    Args:
        kinds: The data classes.
        argv: A YAML or JSON file with names of arguments and their values may come first; flags override it.
        defaults: Instead of the classes' own.

    Raises:
        ValueError: The file or the flags name an argument that does not exist, or hold something that cannot be read.
        OSError: The file cannot be opened.
        SystemExit: A flag that cannot be used.
    """
    parser = _Parser(kinds, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**(defaults or {}))
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe = read_recipe(argv[0])
        unknown = sorted(map(str, recipe.keys() - {argument.name for kind in kinds for argument in fields(kind)}))
        if unknown:
            raise ValueError(f"{argv[0]} has unknown arguments {unknown}; see --help for those that exist")
        # As flags they are checked as flags are; those that follow override them.
        flags = [flag for name, value in recipe.items() if value is not None for flag in _to_flags(name, value)]
        argv = flags + argv[1:]
    try:
        *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except json.JSONDecodeError as error:
        raise ValueError(f"an argument is {error.doc!r}; expected JSON: {error}") from error
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; see --help for those that exist")
    return tuple(arguments)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    The names and values of a YAML or JSON file.

    Raises:
        ValueError: It holds something else.
        OSError: It cannot be opened.
    """
    try:
        text = Path(path).read_text()
        recipe = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds {recipe!r}; expected names of arguments and their values")
    return recipe


def _to_flags(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(value if isinstance(value, str) else json.dumps(value) for value in values)]


def read_config(argument: str, path: str | Path, kind: type[Config], **options: Any) -> Config:
    """
    The configuration of a folder or Hub repo.

    Args:
        argument: Where the path comes from, for the message.
        path: Folder or name of the repo.
        kind: What it has to be.
        options: Of `AutoConfig.from_pretrained`.

    Raises:
        ValueError: There is none, or it is of another model.
    """
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument} = {path} has no configuration that can be read: {error}") from error
    if not isinstance(config, kind):
        raise ValueError(f"{argument} = {path} is a {config.model_type!r}; expected {kind.model_type!r}")
    return config


def start_run(args: TrainingArguments) -> None:
    """
    Set up a process of a training script: what it logs, to stderr, and its random numbers.

    Raises:
        ValueError: It sees several GPUs, which `Trainer` would use in a way that no model here is made for.
    """
    logging.basicConfig(
        level=logging.INFO if args.should_log else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    for name in ("httpx", "httpx2"):  # huggingface_hub's, which tell every request
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()  # of loading and saving; training keeps its own
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs; expected torchrun --nproc_per_node {args.n_gpu}, or one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    set_seed(args.seed)


def checkpoint_to_resume(output_dir: str | Path, resume_from_checkpoint: str | None) -> str | None:
    """
    The checkpoint that a run goes on from, if any.

    Args:
        output_dir: Of the run.
        resume_from_checkpoint: A checkpoint, or "last" for the last one in `output_dir`.

    Raises:
        FileNotFoundError: There is no last one, or none at the given place.
        FileExistsError: A new run would be mixed up with an old one's checkpoints.
    """
    if resume_from_checkpoint == "last":
        return str(last_checkpoint(output_dir))
    if resume_from_checkpoint:
        if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint = {resume_from_checkpoint} is no checkpoint: it holds no "
                f"{TRAINER_STATE_NAME}; expected <output_dir>/checkpoint-<step>, or last"
            )
        return resume_from_checkpoint
    old = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
    if old:
        raise FileExistsError(
            f"{output_dir} holds the checkpoints of another run, {old}; expected --resume_from_checkpoint last, or "
            "another --output_dir"
        )
    return None


__all__ = [
    "RoomArguments",
    "RunArguments",
    "checkpoint_to_resume",
    "parse_with_recipe",
    "read_config",
    "read_recipe",
    "start_run",
    "usage_errors",
]
