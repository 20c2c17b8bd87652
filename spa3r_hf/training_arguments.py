"""What the training scripts' command lines have in common: recipes, and where a run goes on from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .checkpoint_spa3r import last_checkpoint


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
        ValueError: The file holds something else, or an argument that does not exist.
        SystemExit: A flag that cannot be used.
    """
    parser = HfArgumentParser(kinds, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**(defaults or {}))
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        read = json.loads if argv[0].endswith(".json") else yaml.safe_load
        recipe = read(Path(argv[0]).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{argv[0]} holds {recipe!r}; expected names of arguments and their values")
        unknown = sorted(recipe.keys() - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"{argv[0]} has unknown arguments {unknown}; see --help for those that exist")
        # As flags they are checked as flags are; those that follow override them.
        flags = [flag for name, value in recipe.items() if value is not None for flag in _to_flags(name, value)]
        argv = flags + argv[1:]
    return parser.parse_args_into_dataclasses(argv)


def _to_flags(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(value if isinstance(value, str) else json.dumps(value) for value in values)]


def checkpoint_to_resume(output_dir: str | Path, resume_from_checkpoint: str | None) -> str | None:
    """
    The checkpoint that a run goes on from, if any.

    Args:
        output_dir: Of the run.
        resume_from_checkpoint: A checkpoint, or "last" for the last one in `output_dir`.

    Raises:
        FileNotFoundError: There is no last one.
        FileExistsError: A new run would be mixed up with an old one's checkpoints.
    """
    if resume_from_checkpoint == "last":
        return str(last_checkpoint(output_dir))
    old = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
    if old and not resume_from_checkpoint:
        raise FileExistsError(
            f"{output_dir} holds the checkpoints of another run, {old}; expected --resume_from_checkpoint last, or "
            "another --output_dir"
        )
    return resume_from_checkpoint


__all__ = ["checkpoint_to_resume", "parse_with_recipe"]
