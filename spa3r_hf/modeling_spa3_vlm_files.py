"""Files of Spa3-VLM: an adapter with its LoRA, and the VLM and the spatial encoder where they have no other home."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel

from .checkpoint_spa3_vlm import (
    SPATIAL_ENCODER_FOLDER,
    VLM_FOLDER,
    check_weights,
    location_of,
    name_of,
    read_adapter,
    under_prefix,
    write_adapter,
)
from .configuration_spa3_vlm import Spa3AdapterConfig
from .lora_spa3_vlm import fill_lora, lora_state_dict, plain_key, vlm_is_trained, without_lora
from .modeling_spa3_vlm_adapters import Spa3AdapterModel


Model = TypeVar("Model", bound="SavedSpa3AdapterModel")


class SavedSpa3AdapterModel(Spa3AdapterModel):
    """A [`Spa3AdapterModel`] that can be saved, loaded and uploaded."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
        save_vlm: bool | None = None,
        save_spatial_encoder: bool | None = None,
        **vlm_options: Any,
    ) -> None:
        """
        Write an adapter's `adapter_config.json` and `adapter_model.safetensors`: its own weights and its LoRA's.

        Args:
            save_directory: The folder.
            adapter_name: Which adapter. Default: the active one.
            state_dict: The state dict of this model, where its own is not all there (DeepSpeed ZeRO-3, FSDP).
            save_vlm: Whether the VLM is saved as well, to the folder `vlm`, where `from_pretrained` finds it. Default:
                if any of its own weights require gradients now, or if it came from such a folder.
            save_spatial_encoder: The same for the spatial encoder, folder `spatial_encoder`. Default: if it came from
                such a folder.
            vlm_options: `max_shard_size`, ...: for the VLM's own `save_pretrained`.

        Raises:
            ValueError: There is no adapter of that name.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_name(name)
        folder, config = Path(save_directory), self.adapter_configs[name]
        state_dict = self.state_dict() if state_dict is None else state_dict
        vlm_state = under_prefix(state_dict, "vlm.")
        if save_vlm is None:
            save_vlm = config.base_model_name_or_path == VLM_FOLDER or vlm_is_trained(self.vlm)
        if save_spatial_encoder is None:
            save_spatial_encoder = config.spatial_encoder_name_or_path == SPATIAL_ENCODER_FOLDER
        config = _with_origin(config, "base_model", self.vlm, VLM_FOLDER, save_vlm)
        config = _with_origin(
            config, "spatial_encoder", self.spatial_encoder, SPATIAL_ENCODER_FOLDER, save_spatial_encoder
        )
        lora = {} if config.lora_config is None else lora_state_dict(self.vlm, name, vlm_state)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(folder, config, under_prefix(state_dict, f"adapters.{name}."), lora)
        if save_vlm:
            self.vlm.save_pretrained(folder / VLM_FOLDER, state_dict=without_lora(vlm_state), **vlm_options)
        if save_spatial_encoder and self.spatial_encoder is not None:
            self.spatial_encoder.save_pretrained(folder / SPATIAL_ENCODER_FOLDER)

    def restore(self, folder: str | os.PathLike) -> None:
        """
        Put what `save_pretrained` wrote back into the active adapter, its LoRA, and the VLM if that was saved.

        This is done in place: an optimizer that has these parameters goes on from there.

        Raises:
            OSError: There is no such adapter.
            ValueError: Its weights are not those of the active adapter, its LoRA or this VLM.
        """
        _, weights, lora = read_adapter(folder)
        check_weights(weights, self.adapter.state_dict(), f"adapter {self.active_adapter!r}")
        self.adapter.load_state_dict(weights)
        if self.adapter_config.lora_config is not None:
            fill_lora(self.vlm, self.active_adapter, lora)
        if (Path(folder) / VLM_FOLDER).is_dir():
            saved = AutoModelForImageTextToText.from_pretrained(Path(folder) / VLM_FOLDER).state_dict()
            check_weights(saved, without_lora(self.vlm.state_dict()), "the VLM")
            own = {key: saved[plain_key(key)] for key in self.vlm.state_dict() if plain_key(key) in saved}
            self.vlm.load_state_dict(own, strict=False)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload Spa3-VLM adapter",
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **save_options: Any,
    ) -> CommitInfo:
        """Upload what `save_pretrained(**save_options)` writes to a Hub repository, which is made if need be."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls: type[Model],
        adapter_path_or_repo: str | os.PathLike,
        vlm: PreTrainedModel | None = None,
        spatial_encoder: nn.Module | None = None,
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **vlm_options: Any,
    ) -> Model:
        """
        An adapter, with the VLM and the spatial encoder that it was trained for, in eval mode.

        Args:
            adapter_path_or_repo: A folder that `save_pretrained` wrote, or the id of a Hub repository.
            vlm: The VLM. Default: what the adapter's configuration names, at the revision that it names.
            spatial_encoder: The spatial encoder. Default: the same; none, if it names none.
            adapter_name: What the adapter is to be called here.
            is_trainable: Whether to go on training; else everything is frozen.
            revision: Of the adapter's repository.
            token, cache_dir, local_files_only: For all files that come from the Hub.
            vlm_options: `dtype`, `device_map`, `quantization_config`, `attn_implementation`, ...: for loading the VLM.

        Raises:
            OSError: Files are missing.
            ValueError: The adapter is for another VLM or encoder, or names none and none is given.
        """
        if vlm is not None and vlm_options:
            raise ValueError(f"vlm and {sorted(vlm_options)} are given; expected such options for a VLM to be loaded")
        shared = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        adapter = {**shared, "revision": revision}
        config, weights, lora = read_adapter(adapter_path_or_repo, **adapter)
        if vlm is None:
            if config.base_model_name_or_path is None:
                raise ValueError(f"the adapter {adapter_path_or_repo} does not say its VLM; expected it as vlm=...")
            path = location_of(config.base_model_name_or_path, adapter_path_or_repo, **adapter)
            vlm_options = {**shared, "revision": config.base_model_revision, **vlm_options}
            vlm = AutoModelForImageTextToText.from_pretrained(path, **vlm_options)
        encoder_name = None if spatial_encoder is not None else config.spatial_encoder_name_or_path
        if encoder_name is not None:
            path = location_of(encoder_name, adapter_path_or_repo, **adapter)
            encoder_options = {**shared, "revision": config.spatial_encoder_revision}
            spatial_encoder = AutoModel.from_pretrained(path, **encoder_options)
        model = cls(vlm, spatial_encoder)
        if encoder_name is not None:
            model.spatial_encoder.to(model.adapter_device())
        model.load_weights(adapter_name, config, weights, lora)
        if is_trainable:
            model.set_adapter(adapter_name)
        return model.eval()


def _with_origin(
    config: Spa3AdapterConfig, part: str, model: nn.Module | None, folder: str, is_saved: bool
) -> Spa3AdapterConfig:
    """The configuration to be saved: with `folder` as the origin of a part that is saved, and else never with it."""
    origin: dict[str, Any] = {f"{part}_name_or_path": folder if is_saved else name_of(model), f"{part}_revision": None}
    is_known = not is_saved and getattr(config, f"{part}_name_or_path") != folder
    return config if is_known else replace(config, **origin)


__all__ = ["SavedSpa3AdapterModel"]
