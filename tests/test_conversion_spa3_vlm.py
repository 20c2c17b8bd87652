"""The numbers of the release, from its own state dict."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FIXTURES, golden
from transformers import Qwen2_5_VLConfig

from spa3r_hf import Spa3AdapterConfig, Spa3RModel, Spa3VLM
from spa3r_hf.conversion_spa3_vlm import convert_original_spa3_vlm


GOLDEN = FIXTURES / "spa3_vlm_reference.safetensors"
TENSORS = load_file(GOLDEN)
WEIGHTS = {key.removeprefix("weights."): value for key, value in TENSORS.items() if key.startswith("weights.")}
with safe_open(GOLDEN, "pt") as file:
    CONFIG = json.loads(file.metadata()["config"])


def golden_inputs() -> dict[str, torch.Tensor]:
    inputs = {name: TENSORS[f"input.{name}"] for name in ("input_ids", "pixel_values", "image_grid_thw", "labels")}
    # What the processors of today give, and what those of the release's time had the model find out.
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == CONFIG["image_token_id"]).int()}


def close(output, name: str) -> None:
    torch.testing.assert_close(output, TENSORS[f"output.{name}"].view(output.shape), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def check(model: Spa3VLM) -> None:
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


def with_encoder() -> dict[str, torch.Tensor]:
    return WEIGHTS | {f"geometry_encoder.spa3r.{key}": value for key, value in golden("rms_norm")[0].items()}


@pytest.mark.parametrize("config", [CONFIG, Qwen2_5_VLConfig(**CONFIG)], ids=["dict", "config"])
def test_golden_without_encoder(config):
    model = convert_original_spa3_vlm(WEIGHTS, config)
    assert model.spatial_encoder is None and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    check(model)


@torch.no_grad()
def test_golden_of_the_full_checkpoint_and_of_its_files(tmp_path):
    model = convert_original_spa3_vlm(with_encoder(), CONFIG)
    check(model)
    model.save_pretrained(tmp_path)
    again = Spa3VLM.from_pretrained(tmp_path)
    check(again)
    reference = golden("rms_norm")[1]
    for converted in (model, again):
        z = converted.get_spatial_latents(reference["input.images"])
        torch.testing.assert_close(z, reference["output.latents"], rtol=1e-4, atol=1e-5)
    assert isinstance(again.spatial_encoder, Spa3RModel)
    assert Spa3AdapterConfig.from_pretrained(tmp_path) == again.adapter_config == model.adapter_config


@torch.no_grad()
def test_what_only_training_needs_may_be_absent():
    expected = convert_original_spa3_vlm(with_encoder(), CONFIG).spatial_encoder.state_dict()
    training = ("decoder.", "pose_tokenizer.", "heads.", "depth_prob.", "dino.")
    names = tuple(f"geometry_encoder.spa3r.{name}" for name in training)
    lean = {key: value for key, value in with_encoder().items() if not key.startswith(names)}
    assert len(lean) < len(with_encoder())
    converted = convert_original_spa3_vlm(lean, CONFIG).spatial_encoder.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.items())


def test_types_are_those_of_the_checkpoint():
    vlm = ("visual.", "model.", "lm_head.")
    mixed = {key: value.bfloat16() if key.startswith(vlm) else value for key, value in with_encoder().items()}
    model = convert_original_spa3_vlm(mixed, CONFIG)
    types = {name.split(".")[0]: value.dtype for name, value in model.state_dict().items()}
    assert types == {"vlm": torch.bfloat16, "spatial_encoder": torch.float32, "adapters": torch.float32}


def test_the_state_dict_is_left_alone():
    weights = with_encoder()
    before = {key: value.clone() for key, value in weights.items()}
    model = convert_original_spa3_vlm(weights, CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert weights.keys() == before.keys() and all(torch.equal(weights[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"geometry_gate.0.bias": None}, r"the adapter of this VLM: 1 keys .* such as \['gate.bias'\]"),
        ({"ln.weight": torch.ones(3)}, r"such as \['norm.weight'\]"),
        ({"geometry_gate.1.bias": torch.ones(3)}, r"unexpected_keys.*geometry_gate.1.bias"),
        ({"geom_cross_attention.q_norm.weight": None}, r"no weights for the adapter's \['attention.q_norm.weight'\]"),
        ({"model.norm.weight": None}, r"missing_keys.*norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, r"mismatched_keys.*norm.weight"),
        ({"geometry_encoder.other": torch.ones(3)}, r"unexpected_keys.*geometry_encoder.other"),
        ({"geometry_encoder.spa3r.other": torch.ones(3)}, r"1 keys that are none of its: \['other'\]"),
        ({"geometry_encoder.spa3r.encoder.norm.bias": None}, r"1 missing: \['encoder.norm.bias'\]"),
        ({"geometry_encoder.spa3r.query_embed.weight": None}, r"it has no \['query_embed.weight'\]"),
        ({"geometry_encoder.spa3r.aggregator.camera_token": None}, "aggregator.camera_token"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    weights = {key: value for key, value in (with_encoder() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_original_spa3_vlm(weights, CONFIG)


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match="no checkpoint of Spa3-VLM"):
        convert_original_spa3_vlm(golden("rms_norm")[0], CONFIG)
    adapter = {key: value for key, value in WEIGHTS.items() if not key.startswith(("visual.", "model.", "lm_head."))}
    with pytest.raises(ValueError, match="no weights for the VLM"):
        convert_original_spa3_vlm(adapter, CONFIG)
    with pytest.raises(ValueError, match="hidden_size = 64; this VLM or spatial encoder has 32|does not fit"):
        convert_original_spa3_vlm(WEIGHTS, CONFIG | {"hidden_size": 32})
