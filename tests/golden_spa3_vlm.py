"""The release's Spa3-VLM at tiny size: its weights and its numbers."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FIXTURES, golden

from spa3r_hf import Spa3VLM


GOLDEN = FIXTURES / "spa3_vlm_reference.safetensors"
TENSORS = load_file(GOLDEN)
WEIGHTS = {key.removeprefix("weights."): value for key, value in TENSORS.items() if key.startswith("weights.")}
with safe_open(GOLDEN, "pt") as file:
    CONFIG = json.loads(file.metadata()["config"])


def with_encoder() -> dict[str, torch.Tensor]:
    """The weights together with those of the release's Spa3R, as the full checkpoint has them."""
    return WEIGHTS | {f"geometry_encoder.spa3r.{key}": value for key, value in golden("rms_norm")[0].items()}


def golden_inputs() -> dict[str, torch.Tensor]:
    inputs = {name: TENSORS[f"input.{name}"] for name in ("input_ids", "pixel_values", "image_grid_thw", "labels")}
    # What the processors of today give, and what those of the release's time had the model find out.
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == CONFIG["image_token_id"]).int()}


def close(output, name: str) -> None:
    torch.testing.assert_close(output, TENSORS[f"output.{name}"].view(output.shape), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def check_numbers(model: Spa3VLM) -> None:
    """All numbers that the release gives."""
    inputs, z = golden_inputs(), TENSORS["input.spatial_latents"]
    output = model(**inputs, spatial_latents=z)
    close(output.logits, "logits")
    close(output.loss, "loss")
    for context in (model.disable_adapter(), torch.no_grad()):
        with context:
            without = model(**inputs)
        close(without.logits, "logits_without_spatial")
        close(without.loss, "loss_without_spatial")
    grids = {"image_grid_thw": inputs["image_grid_thw"], "return_dict": True}
    tokens = torch.cat(model.vlm.get_image_features(inputs["pixel_values"], **grids).pooler_output)
    close(tokens, "image_embeds")
    close(model.adapter(tokens[None], z)[0], "fused_image_embeds")
