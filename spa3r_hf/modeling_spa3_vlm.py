"""Spa3-VLM (arXiv 2602.21186, section 3.4): any vision-language model of `transformers`, reading Spa3R's latents."""

import functools
import inspect
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .adapter_spa3_vlm import assign_scenes, idle_inputs
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
from .fusion_spa3_vlm import SceneReading, Scenes, check_scenes
from .lora_spa3_vlm import fill_lora, lora_state_dict, plain_key, vlm_is_trained, without_lora
from .modeling_spa3_vlm_adapters import Spa3AdapterModel, encode_scenes, features_owner


logger = logging.get_logger(__name__)

_SPATIAL_INPUTS = ("pixel_values", "latents", "scene_ids")


class Spa3VLM(Spa3AdapterModel):
    """
    A vision-language model whose visual tokens read the scene that they are part of.

    The VLM is held as it is, in `vlm`, and what is not found here is looked up there (`config`, `device`,
    `gradient_checkpointing_enable`, ...). While a forward runs, the visual tokens that its `get_image_features` gives
    pass through the active adapter. Nothing else of the VLM is touched, and nothing of it outside of a forward.

    Qwen3-VL's deepstack features are left as they are: they are added to hidden states that already carry the fused
    visual tokens at the same positions, so that the scene reaches those layers, and one adapter serves every family.

    Example:

    ```python
    >>> vlm = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
    >>> model = get_spa3_vlm(vlm, Spa3RModel.from_pretrained("org/spa3r"), Spa3AdapterConfig())
    >>> model(**inputs, spatial_pixel_values=views, labels=labels).loss.backward()  # trains the adapter alone
    >>> model.save_pretrained("adapter")

    >>> model = Spa3VLM.from_pretrained("adapter")
    >>> latents = model.get_spatial_latents(views)  # once for a scene, for any number of questions
    >>> answer = model.generate(**inputs, spatial_latents=latents, max_new_tokens=16)
    ```

    LoRA on the language model comes with `Spa3AdapterConfig(lora_config=peft.LoraConfig(...))`. To train the whole
    language model, `model.language_model.requires_grad_(True)`; `save_pretrained` then saves the VLM as well.
    """

    def get_spatial_latents(self, spatial_pixel_values: Scenes) -> Tensor | list[Tensor | None]:
        """
        What the visual tokens read of each scene; give it as `spatial_latents` to any number of forwards.

        Args:
            spatial_pixel_values: (S, V, 3, H, W) in [0, 1], V views of S scenes, H and W multiples of the encoder's
                patch size; or, where scenes differ, a list of (V_i, 3, H_i, W_i), None for a scene that is not given.

        Returns:
            (S, Q, D), or a list of (Q, D): latents; of the backbone's features, where `spatial_features` says so, all
            patches of all views, (S, V * N, 2C), or a list of (V_i * N_i, 2C).

        Raises:
            ValueError: There is no spatial encoder, or the pictures are not as described.
        """
        if self.spatial_encoder is None:
            raise ValueError(
                "spatial_pixel_values are given, but there is no spatial encoder; expected spatial_latents"
            )
        features = self.adapter_config.spatial_features
        if isinstance(spatial_pixel_values, Tensor):
            return encode_scenes(self.spatial_encoder, spatial_pixel_values, features)
        alike: dict[torch.Size, dict[int, Tensor]] = {}
        for scene, views in enumerate(spatial_pixel_values):
            if views is not None:
                alike.setdefault(views.shape, {})[scene] = views
        latents: list[Tensor | None] = [None] * len(spatial_pixel_values)
        for scenes in alike.values():
            encoded = encode_scenes(self.spatial_encoder, torch.stack(list(scenes.values())), features)
            for scene, tokens in zip(scenes, encoded, strict=True):
                latents[scene] = tokens
        return latents

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        spatial_pixel_values: Scenes | None = None,
        spatial_latents: Scenes | None = None,
        spatial_scene_ids: Tensor | Sequence[int] | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """
        The VLM's own forward, with its visual tokens fused with the scenes that are given.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), padded on either side.
            spatial_pixel_values: The views of S scenes, as `get_spatial_latents` takes them. Or
            spatial_latents: (S, Q, D), or a list of (Q_s, D), None for a scene that is not given: the scenes' tokens.
            spatial_scene_ids: The scene, 0 to S - 1, or -1 for none: of every image of the batch, in the order of
                their placeholders in `input_ids`, an image being an unbroken run of them; or (B, L), of every
                position, which serves images without text between them, and images that a processor cuts into tiles.
                Default: the images of a sample are one scene, and there is a scene for every sample, or for every
                sample that has images.
            labels: (B, L), -100 = not to be predicted.
            kwargs: All else that the VLM takes: `pixel_values`, ...

        Returns:
            What the VLM returns. With `integration="append"`, `logits` are those of the positions of `input_ids`; all
            else that has a length (`past_key_values`, `hidden_states`, ...) has the longer sequences'.

        Raises:
            ValueError: Scenes, images and placeholders do not go together, or scenes are not of the adapter's width.
        """
        inputs = dict(kwargs, input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        reading = self._reading(inputs, spatial_pixel_values, spatial_latents, spatial_scene_ids)
        sequence = None if reading is None else reading.sequence
        return_dict, logits_to_keep = inputs.pop("return_dict", True), 0
        if sequence is not None:
            logits_to_keep = inputs.pop("logits_to_keep", 0)
        with self._fusing(reading):
            output = self.vlm(**inputs, return_dict=True)
        if sequence is not None:
            logits = sequence.restore(output.logits)
            output.logits = (
                logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
            )
        if reading is None and output.get("loss") is not None:
            output.loss = self._with_idle_adapter(output.loss)
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """
        The VLM's own `generate`; scenes are given as in `forward`, and encoded once.

        Raises:
            ValueError: As in `forward`.
        """
        spatial = [kwargs.pop(f"spatial_{name}", None) for name in _SPATIAL_INPUTS]
        prompts = kwargs.pop("input_ids", inputs)
        arguments = kwargs if prompts is None else {"input_ids": prompts, **kwargs}
        reading = self._reading(arguments, *spatial)
        if reading is not None:
            reading.may_repeat = True
        if reading is None or reading.sequence is None:
            with self._fusing(reading):
                return self.vlm.generate(**arguments)
        length = arguments["input_ids"].shape[1]
        if arguments.get("max_length") is not None:
            arguments["max_length"] += length - prompts.shape[1]
        with self._fusing(reading):
            output = self.vlm.generate(**arguments)

        def with_own_prompts(sequences: Tensor) -> Tensor:
            own = prompts.repeat_interleave(len(sequences) // len(prompts), 0)
            return torch.cat((own.to(sequences.device), sequences[:, length:]), dim=1)

        if isinstance(output, Tensor):
            return with_own_prompts(output)
        output.sequences = with_own_prompts(output.sequences)
        return output

    def _reading(
        self,
        inputs: dict[str, Any],
        pixel_values: Scenes | None,
        latents: Scenes | None,
        scene_ids: Tensor | Sequence[int] | None,
    ) -> SceneReading | None:
        """What the visual tokens of `inputs` read, if anything. Where scenes are appended, `inputs` become longer."""
        if unknown := sorted(name for name in inputs if name.startswith("spatial_")):
            known = ", ".join(f"spatial_{name}" for name in _SPATIAL_INPUTS)
            raise TypeError(f"{unknown} are given; expected {known}")
        self._warn_of_lost_positions(inputs)
        given, name = (pixel_values, "spatial_pixel_values") if latents is None else (latents, "spatial_latents")
        if self._is_disabled or given is None:
            return None
        if pixel_values is not None and latents is not None:
            raise ValueError("spatial_pixel_values and spatial_latents are given; expected one of them")
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("pixel_values_videos are given; expected the frames of a video as images")
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ValueError("input_ids are not given; expected them, as they say which image is whose")
        config = self.adapter_config
        reader = f"adapter {self.active_adapter!r} reads {config.spatial_features} of that width"
        check_scenes(given, name, config.spatial_hidden_size, reader)
        is_image = input_ids == self.vlm.config.image_token_id
        if not is_image.any():
            # Text, or what a user's own loop feeds one token after the other.
            return None
        scenes = assign_scenes(is_image, len(given), scene_ids)
        missing = [scene for scene, tokens in enumerate(given) if tokens is None]
        if missing:
            scenes = torch.where(torch.isin(scenes, torch.tensor(missing, device=scenes.device)), -1, scenes)
        if not (scenes >= 0).any():
            return None
        tokens = self.get_spatial_latents(given) if latents is None else latents
        home = next(self.adapter.parameters()).device
        reading = SceneReading(is_image, scenes, [None if scene is None else scene.to(home) for scene in tokens])
        if config.integration == "append":
            padding = getattr(self.vlm.config.get_text_config(), "pad_token_id", None) or 0
            inputs.update(reading.extend_inputs(inputs, self.vlm.config.image_token_id, padding))
        return reading

    def _warn_of_lost_positions(self, inputs: dict[str, Any]) -> None:
        has_grids = inputs.get("image_grid_thw") is not None and inputs.get("position_ids") is None
        if has_grids and inputs.get("mm_token_type_ids") is None:
            if "mm_token_type_ids" in inspect.signature(self.vlm.forward).parameters:
                logger.warning_once(
                    "image_grid_thw are given without mm_token_type_ids, so that this VLM counts the visual tokens of "
                    "an image as a line of text, not as its rows and columns; expected what its processor gives"
                )

    @contextmanager
    def _fusing(self, reading: SceneReading | None) -> Iterator[None]:
        """While this lasts, this VLM's visual tokens pass through the active adapter."""
        if reading is None:
            yield
            return
        fuse = functools.partial(reading.fuse, self.adapter, hidden_size=self.adapter_config.hidden_size)
        with self._fused_features.standing_in(features_owner(self.vlm), fuse):
            yield
        if not reading.is_done:
            raise ValueError(
                f"scenes and image placeholders are given, but {type(self.vlm).__name__} computed no visual tokens; "
                "expected pixel_values, and a model whose forward calls get_image_features"
            )

    def _with_idle_adapter(self, loss: Tensor) -> Tensor:
        """
        A loss that no adapter had a part in, still depending on the active one, with gradients of zero.

        Where several processes train together (DDP, FSDP), one may have text alone when the others have images.
        """
        parameter = next(self.adapter.parameters())
        if self._is_disabled or not (self.training and torch.is_grad_enabled() and parameter.requires_grad):
            return loss
        result = self.adapter(*idle_inputs(self.adapter_config, parameter))
        return loss + 0.0 * result.float().sum().to(loss.device)

    # --- files

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
        cls,
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
    ) -> "Spa3VLM":
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


def get_spa3_vlm(
    vlm: PreTrainedModel,
    spatial_encoder: nn.Module | None,
    adapter_config: Spa3AdapterConfig,
    adapter_name: str = "default",
) -> Spa3VLM:
    """
    Give a vision-language model a fresh adapter, to be trained; all else is frozen.

    Args:
        vlm: A model of `AutoModelForImageTextToText`; it is held, not copied.
        spatial_encoder: A [`Spa3RModel`], or a [`Spa3RVGGTModel`] where `spatial_features` are those of the backbone.
            None, if only ready-made `spatial_latents` will be given.
        adapter_config: What is None in it is filled in, on a copy.
        adapter_name: What the adapter is to be called.

    Raises:
        TypeError: `vlm` or `spatial_encoder` is no such model.
        ValueError: Spa3-VLM cannot work with this VLM, or the configuration is for another.
    """
    model = Spa3VLM(vlm, spatial_encoder)
    model.add_adapter(adapter_name, adapter_config)
    model.set_adapter(adapter_name)
    return model


__all__ = ["Spa3VLM", "get_spa3_vlm"]
