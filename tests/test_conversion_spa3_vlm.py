"""The numbers of the release, from its own state dict."""

import pytest
import torch
from golden_spa3_vlm import CONFIG, TENSORS, WEIGHTS, check_numbers, with_encoder
from tiny_models import golden
from transformers import Qwen2_5_VLConfig

from spa3r_hf import Spa3AdapterConfig, Spa3RModel, Spa3VLM
from spa3r_hf.conversion_spa3_vlm import compare_with_release, convert_original_spa3_vlm


@pytest.mark.parametrize("config", [CONFIG, Qwen2_5_VLConfig(**CONFIG)], ids=["dict", "config"])
def test_golden_without_encoder(config):
    model = convert_original_spa3_vlm(WEIGHTS, config)
    assert model.spatial_encoder is None and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    check_numbers(model)


@torch.no_grad()
def test_golden_of_the_full_checkpoint_and_of_its_files(tmp_path):
    model = convert_original_spa3_vlm(with_encoder(), CONFIG)
    check_numbers(model)
    model.save_pretrained(tmp_path)
    again = Spa3VLM.from_pretrained(tmp_path)
    check_numbers(again)
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
        ({"geometry_encoder.spa3r.query_embed.weight": None}, "it has no key query_embed.weight"),
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
    with pytest.raises(ValueError, match="model_type = 'qwen9_vl'; expected one of transformers"):
        convert_original_spa3_vlm(WEIGHTS, CONFIG | {"model_type": "qwen9_vl"})


def test_tied_embeddings(tmp_path):
    """As Qwen2.5-VL-3B's: its files have them once, other writers twice."""
    tied = CONFIG | {"tie_word_embeddings": True}
    once = {key: value for key, value in WEIGHTS.items() if key != "lm_head.weight"}
    for weights in (once, once | {"lm_head.weight": once["model.embed_tokens.weight"].clone()}):
        model = convert_original_spa3_vlm(weights, tied)
        assert model.vlm.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        again = Spa3VLM.from_pretrained(tmp_path)
        assert torch.equal(again.vlm.lm_head.weight, WEIGHTS["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="tie_word_embeddings = True, but the checkpoint's output layer has other"):
        convert_original_spa3_vlm(WEIGHTS, tied)


def test_numbers_are_compared_in_float32_whatever_the_type():
    model = convert_original_spa3_vlm({key: value.bfloat16() for key, value in with_encoder().items()}, CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Spa3VLM does not agree with the reference .*: logits differs by up to"):
        compare_with_release(model, TENSORS)  # weights of 8 bits are others
    after = model.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].dtype == torch.bfloat16 for name, value in before.items()
    )
    # The same weights, in types that hold them.
    rounded = {key: value.bfloat16().float() for key, value in with_encoder().items()}
    wide = convert_original_spa3_vlm(rounded, CONFIG)
    inputs = {key: value for key, value in TENSORS.items() if key.startswith("input.")}
    given = {key.removeprefix("input."): value for key, value in inputs.items() if key != "input.spatial_latents"}
    given["mm_token_type_ids"] = (given["input_ids"] == CONFIG["image_token_id"]).int()
    with torch.no_grad():
        logits = wide(**given, spatial_latents=inputs["input.spatial_latents"]).logits
    assert compare_with_release(model, inputs | {"output.logits": logits}).keys() == {"logits"}


def test_references_that_say_nothing_are_refused():
    model = convert_original_spa3_vlm(WEIGHTS, CONFIG)
    with pytest.raises(ValueError, match="it computes none of .*'output.latents'"):
        compare_with_release(model, golden("rms_norm")[1])
    with pytest.raises(ValueError, match="expected input.pixel_values and input.spatial_latents"):
        compare_with_release(model, {key: value for key, value in TENSORS.items() if key != "input.spatial_latents"})
    whole = convert_original_spa3_vlm(with_encoder(), CONFIG)
    assert compare_with_release(whole, golden("rms_norm")[1]).keys() == {"latents"}
