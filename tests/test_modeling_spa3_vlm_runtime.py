"""Types, gradient checkpointing, compiling, placing on devices, copies."""

import copy

import pytest
import torch
from tiny_models import tiny_spa3r
from tiny_vlms import LORA, SAMPLES, close, latents, scenes, tiny_inputs, tiny_vlm, trained
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText

from spa3r_hf import Spa3VLM


@pytest.fixture(scope="module")
def encoder():
    return tiny_spa3r().spa3r


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3"])
@torch.no_grad()
def test_parts_keep_their_types(family, encoder):
    model = trained(family, encoder)
    inputs = tiny_inputs(family, SAMPLES, "left")
    expected = model(**inputs, spatial_pixel_values=scenes()).logits
    model.vlm.bfloat16()
    output = model(**inputs, spatial_pixel_values=scenes())
    assert output.logits.dtype == torch.bfloat16 and model.adapter.gate.weight.dtype == torch.float32
    seen = inputs["attention_mask"].bool()
    assert (output.logits.float() - expected)[seen].abs().mean() < 0.05 * expected[seen].abs().mean()
    model.generate(**inputs, spatial_pixel_values=scenes(), max_new_tokens=2)
    half = copy.deepcopy(model)
    half.adapter.bfloat16()
    half(**inputs, spatial_pixel_values=scenes())
    with torch.autocast("cpu", torch.bfloat16):
        assert trained(family, encoder)(**inputs, spatial_pixel_values=scenes()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_gradient_checkpointing(family, encoder):
    inputs = tiny_inputs(family, SAMPLES)
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = trained(family, encoder, lora_config=LORA).train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(**inputs, spatial_pixel_values=scenes(), labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_compiled_adapter(encoder):
    model = trained("qwen2_5_vl", encoder)
    inputs, keys = tiny_inputs("qwen2_5_vl", SAMPLES), list(model.state_dict())
    expected = model(**inputs, spatial_latents=latents()).logits
    model.adapter.compile(backend="aot_eager", fullgraph=True)
    close(model(**inputs, spatial_latents=latents()).logits, expected)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_copies_are_independent(encoder):
    model = trained("qwen2_5_vl", encoder, lora_config=LORA)
    inputs = tiny_inputs("qwen2_5_vl", SAMPLES)
    expected = model(**inputs, spatial_pixel_values=scenes()).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(**inputs, spatial_pixel_values=scenes()).logits, expected)


@pytest.mark.parametrize("whole", [False, True], ids=["vlm", "whole"])
@torch.no_grad()
def test_compiled_vlm_is_compiled_once(encoder, whole):
    """Other scenes are no reason to compile again."""
    torch._dynamo.reset()
    counter, inputs = CompileCounter(), tiny_inputs("internvl", SAMPLES)
    model, eager = trained("internvl", encoder), trained("internvl", encoder)
    if whole:
        compiled = torch.compile(model, backend=counter)
    else:
        model.vlm.compile(backend=counter)
        compiled = model
    counts = []
    for seed in range(3):
        z = latents(seed=seed)
        close(compiled(**inputs, spatial_latents=z).logits, eager(**inputs, spatial_latents=z).logits)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == counts[:1] * 3
    close(compiled(**inputs).logits, eager(**inputs).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_vlm_in_several_places(encoder, family, tmp_path):
    """Its weights on the disk, as `device_map` puts what nothing else has room for: they are read layer by layer."""
    pytest.importorskip("accelerate")
    model, inputs, z = trained(family, encoder), tiny_inputs(family, SAMPLES, "left"), latents()
    expected = model(**inputs, spatial_latents=z).logits
    model.save_pretrained(tmp_path / "adapter")
    tiny_vlm(family).save_pretrained(tmp_path / "vlm")
    options = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offloaded"}
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm", **options)
    assert any(parameter.device.type == "meta" for parameter in vlm.parameters())
    placed = Spa3VLM.from_pretrained(tmp_path / "adapter", vlm=vlm, spatial_encoder=encoder)
    assert placed.adapter.gate.weight.device.type == "cpu"
    close(placed(**inputs, spatial_latents=z).logits, expected)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    answers = model.generate(**inputs, spatial_latents=z, **greedy)
    assert torch.equal(placed.generate(**inputs, spatial_latents=z, **greedy), answers)
    placed.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@torch.no_grad()
def test_an_encoder_of_its_own_type_within_autocast(encoder):
    """Its latents are the same as without."""
    model = trained("internvl", encoder)
    expected = model.get_spatial_latents(scenes())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.get_spatial_latents(scenes()), expected)
    half = trained("internvl", copy.deepcopy(encoder).bfloat16())
    latents_of_half = half.get_spatial_latents(scenes())
    assert latents_of_half.dtype == torch.bfloat16
    output = half(**tiny_inputs("internvl", SAMPLES), spatial_latents=latents_of_half)
    assert output.logits.dtype == torch.float32 and half.adapter.gate.weight.dtype == torch.float32
