"""Folders to Hub repos: each made to stand on its own, and sent in one commit, so that nothing half-sent is seen."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, metadata_load, metadata_update
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_spa3_vlm import SPATIAL_ENCODER_FOLDER, VLM_FOLDER
from .configuration_spa3_vlm import ADAPTER_CONFIG_NAME


# What a training run leaves beside its model that is of no use to others.
IGNORED = ("checkpoint-*", "runs", "logs", "__pycache__", ".*", "*.tmp", "training_args.bin", "optimizer.pt")
CARD_NAME = "README.md"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Upload a folder as a Hub repo, which is made if need be.

    Large files that are there already are not sent again: what was interrupted goes on when it is called once more.
    All files become visible together, with the commit at the end.

    Args:
        folder: A model, an adapter, a data set, or a Space with its card (a metric is one, too); what it takes from
            folders beside it is sent along, see `complete_folder`.
        repo_id: "name" or "owner/name".
        repo_type: "model", "dataset" or "space".
        private: Whether a repo that is made is private. None: as the owner's settings say.
        revision: A branch, made if need be. None: main.
        token: None: the one that `hf auth login` left, or HF_TOKEN.
        commit_message: None: "Upload <name of the folder>".

    Raises:
        FileNotFoundError: The folder does not exist or is empty, or what it refers to is missing.
        ValueError: A Space without `sdk` in its card.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise FileNotFoundError(f"{folder} is no folder with files; expected one to upload")
    api = HfApi(token=token)
    space: dict[str, Any] = {"space_sdk": _space_sdk(folder)} if repo_type == "space" else {}
    with tempfile.TemporaryDirectory() as temporary:
        complete = complete_folder(folder, Path(temporary) / "repo")
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **space).repo_id
        for page in (CARD_NAME, "index.html"):
            _name_in_page(complete / page, folder.resolve().name, repo_id)
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=complete,
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            revision=revision,
        )


def push_results(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """
    Upload an evaluation to the repo of the model that was evaluated, below `evaluation/<name of the folder>`.

    Args:
        folder: What `run_vsi_bench.py` wrote.
        repo_id, private, revision, token, commit_message: As for `push_folder`.
        results: `model-index` for the repo's card, see `model_card.evaluation_index`; what it says of other
            evaluations stays. None: the card is left as it is.

    Raises:
        FileNotFoundError: The folder does not exist or is empty.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise FileNotFoundError(f"{folder} is no folder with files; expected the output folder of an evaluation")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=f"evaluation/{folder.resolve().name}",
        commit_message=commit_message or f"Upload the evaluation {folder.resolve().name}",
        revision=revision,
        ignore_patterns=list(IGNORED),
    )
    if results:
        metadata_update(repo_id, dict(results), overwrite=True, revision=revision, token=token)
    return commit


def complete_folder(folder: Path, target: Path) -> Path:
    """
    A copy of a folder that needs nothing beside it.

    - Weights that its index finds in other folders are written into it, as are the VLM and the spatial encoder of an
      adapter that names folders of this machine.
    - The code of the classes that its configurations name is put with them, so that it loads with `trust_remote_code`.
    - Checkpoints and logs are left out (`IGNORED`).

    Raises:
        FileNotFoundError: Something that it refers to is missing.
    """
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*IGNORED), copy_function=_link)
    _embed_weights(folder, target)
    _embed_parts(folder, target)
    for part in (target, target / VLM_FOLDER, target / SPATIAL_ENCODER_FOLDER):
        for module in _named_modules(part):
            own = Path(__file__).parent / f"{module}.py"
            if not own.is_file():
                continue  # of another package, or in the folder already
            for path in (own, *map(Path, get_relative_import_files(own))):
                _write(part / path.name, path.read_text())
    return target


def _link(source: str, target: str) -> None:
    """Large files take their place once, where the file system can do that."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # it may be a link to the original
    path.write_text(text)


def _embed_weights(folder: Path, target: Path) -> None:
    index_file = target / SAFE_WEIGHTS_INDEX_NAME
    if not index_file.is_file():
        return
    weight_map: dict[str, str] = json.loads(index_file.read_text())["weight_map"]
    if all(Path(name).name == name for name in weight_map.values()):
        return
    tensors: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}, where {index_file.name} has weights, does not exist")
        with safe_open(folder / name, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key, place in weight_map.items() if place == name}
        if Path(name).name == name:
            (target / name).unlink()
    save_file(tensors, target / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    index_file.unlink()


def _embed_parts(folder: Path, target: Path) -> None:
    """The models that an adapter names by folders of this machine, put beside it."""
    config_file = target / ADAPTER_CONFIG_NAME
    if not config_file.is_file():
        return
    config = json.loads(config_file.read_text())
    for key, place in (
        ("base_model_name_or_path", VLM_FOLDER),
        ("spatial_encoder_name_or_path", SPATIAL_ENCODER_FOLDER),
    ):
        name = config.get(key)
        if name is None or name == place:
            continue
        source = next((path for path in (folder / name, Path(name)) if path.is_dir()), None)
        if source is not None:
            complete_folder(source, target / place)
            config[key] = place
        elif name.startswith((".", "/")):
            raise FileNotFoundError(f"{key} = {name} of {folder / ADAPTER_CONFIG_NAME} does not exist")
    _write(config_file, json.dumps(config, indent=2) + "\n")


def _named_modules(folder: Path) -> set[str]:
    """The modules of the classes that the `auto_map`s of a folder's JSON files name."""
    names: set[str] = set()
    for path in folder.glob("*config.json"):
        for reference in _references(json.loads(path.read_text())):
            if "--" not in reference:  # else in another repo
                names.add(reference.split(".")[0])
    return names


def _references(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key == "auto_map":
                for found in value.values():
                    yield from (name for name in (found if isinstance(found, list) else [found]) if name)
            else:
                yield from _references(value)


def _name_in_page(page: Path, name: str, repo_id: str) -> None:
    """What a page tells people to load becomes the repo: `from_pretrained("spa3r-nano")`, "hub_configs/spa3r-nano"."""
    if page.is_file():
        _write(page, re.sub(rf'"(hub_configs/)?{re.escape(name)}"', f'"{repo_id}"', page.read_text()))


def _space_sdk(folder: Path) -> str:
    card = folder / CARD_NAME
    sdk = (metadata_load(card) or {}).get("sdk") if card.is_file() else None
    if sdk is None:
        raise ValueError(f"{card} does not say the Space's sdk; expected `sdk: gradio`, `static` or `docker` on top")
    return sdk
