"""The adapter's configuration and layers, and the matching of visual tokens with scenes."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spa3r_hf import Spa3AdapterConfig
from spa3r_hf.adapter_spa3_vlm import (
    AppendedSequence,
    assign_scenes,
    build_adapter,
    fuse_by_scene,
    lengths_with_appended,
    merge_appended,
    number_images,
)
from spa3r_hf.fusion_spa3_vlm import SceneReading


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "spatial_hidden_size": 6}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained_adapter(**settings):
    adapter = build_adapter(Spa3AdapterConfig(**SIZES, **settings))
    with torch.no_grad():
        for seed, parameter in enumerate(adapter.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) * 0.4)
    return adapter


# --- configuration


def test_defaults_are_the_papers():
    config = Spa3AdapterConfig()
    assert (config.integration, config.spatial_features, config.lora_config) == ("cross_attention", "latents", None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"integration": "concat"}, r"integration = 'concat'; expected one of \('cross_attention', 'append'\)"),
        ({"spatial_features": "views"}, r"spatial_features = 'views'; expected one of \('latents', 'backbone'\)"),
        ({"hidden_size": 0}, "hidden_size = 0; expected a number above 0"),
        ({"num_attention_heads": -1}, "num_attention_heads = -1; expected a number above 0"),
        ({"spatial_hidden_size": 0}, "spatial_hidden_size = 0; expected a number above 0"),
        ({"hidden_size": 18}, "hidden_size = 18; expected a multiple of 4"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "num_attention_heads = 3; expected a divisor of hidden_size"),
        ({"num_heads": 3, "width": 1}, r"does not know \['num_heads', 'width'\]; its keys are \['integration', "),
        ({"lora_config": 8}, "lora_config is a int; expected a peft.LoraConfig or a dict"),
        ({"lora_config": {"peft_type": "IA3"}}, "lora_config is of peft_type 'IA3'; expected 'LORA'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Spa3AdapterConfig(**settings)


def test_wrong_types():
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        Spa3AdapterConfig(hidden_size="16")


def test_configuration_in_a_file(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["v_proj", "q_proj"])
    config = Spa3AdapterConfig(**SIZES, integration="append", lora_config=lora, base_model_name_or_path="org/base")
    assert config.lora_config["target_modules"] == ["q_proj", "v_proj"] and config.lora_config["r"] == 4
    config.save_pretrained(tmp_path / "new")
    assert Spa3AdapterConfig.from_pretrained(tmp_path / "new") == config
    assert LoraConfig(**config.lora_config).target_modules == {"q_proj", "v_proj"}
    file = tmp_path / "new" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for change, message in (
        ({"adapter_type": None, "peft_type": "LORA"}, "the configuration of a PEFT adapter of type 'LORA'; expected"),
        ({"adapter_type": "other"}, "the configuration of adapter_type = 'other'; expected adapter_type = 'spa3_vlm'"),
        ({"hidden": 16}, r"does not know \['hidden'\]"),
    ):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            Spa3AdapterConfig.from_pretrained(file.parent)
    for text, message in (("[]", "holds a list; expected an object"), ("{", "is no JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Spa3AdapterConfig.from_pretrained(file.parent)
    with pytest.raises(OSError, match="cannot find adapter_config.json of the adapter"):
        Spa3AdapterConfig.from_pretrained(tmp_path)


def test_configuration_needs_no_torch():
    """Its module alone, as a file of a saved folder would be loaded."""
    code = """
import sys
sys.modules["torch"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("configuration", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["configuration"] = module
spec.loader.exec_module(module)
module.Spa3AdapterConfig(hidden_size=16)
"""
    from spa3r_hf import configuration_spa3_vlm

    subprocess.run([sys.executable, "-c", code, configuration_spa3_vlm.__file__], check=True)


# --- layers


@torch.no_grad()
def test_cross_attention_adapter_by_its_definition():
    adapter = trained_adapter()
    visual, spatial = random(3, 7, 16), random(3, 5, 6)
    y = adapter.spatial_projection.fc2(F.gelu(adapter.spatial_projection.fc1(spatial)))
    part = adapter.attention

    def heads(states: Tensor) -> Tensor:
        return torch.stack(states.split(8, dim=-1), dim=1)

    query, key = part.q_norm(heads(part.q_proj(visual))), part.k_norm(heads(part.k_proj(y)))
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    attended = torch.cat((weights @ heads(part.v_proj(y))).unbind(1), dim=-1)
    states = F.layer_norm(part.o_proj(attended), (16,), adapter.norm.weight, adapter.norm.bias, 1e-5)
    change = adapter.mlp.fc2(F.gelu(adapter.mlp.fc1(states))) * adapter.gate(states).sigmoid()
    torch.testing.assert_close(adapter(visual, spatial), visual + change, rtol=1e-5, atol=1e-5)
    assert adapter.mlp.fc1.out_features == 4 and change.abs().mean() > 0.1


@torch.no_grad()
def test_fresh_adapter_changes_nothing():
    adapter = build_adapter(Spa3AdapterConfig(**SIZES))
    for dtype in (torch.float32, torch.bfloat16):
        visual = random(2, 7, 16).to(dtype)
        fused = adapter(visual, random(2, 5, 6))
        assert torch.equal(fused, visual) and fused.dtype == dtype
    assert adapter.gate.weight.abs().min() > 0 and not adapter.mlp.fc2.weight.any()


def test_adapter_needs_all_sizes():
    with pytest.raises(ValueError, match=r"are \(16, None, None\); expected numbers"):
        build_adapter(Spa3AdapterConfig(hidden_size=16))


# --- which scene


def placeholders(*rows: str) -> Tensor:
    """One row a string; "x" is a placeholder."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_images_are_unbroken_runs():
    is_image = placeholders("xx.x..", "......", "x.xxxx")
    assert number_images(is_image)[is_image].tolist() == [0, 0, 1, 2, 3, 3, 3, 3]


def test_scenes_of_samples_and_of_images():
    is_image = placeholders("xx.x..", "......", "x.xxxx")
    one, none, two = [0, 0, -1, 0, -1, -1], [-1] * 6, [2, -1, 2, 2, 2, 2]
    assert assign_scenes(is_image, 3).tolist() == [one, none, two]
    assert assign_scenes(is_image, 2).tolist() == [one, none, [1, -1, 1, 1, 1, 1]]
    by_image = [[1, 1, -1, -1, -1, -1], none, [0, -1, 1, 1, 1, 1]]
    assert assign_scenes(is_image, 2, [1, -1, 0, 1]).tolist() == by_image
    everywhere = torch.tensor([[1, 1, 1, -1, 0, 0], [0] * 6, [0, 0, 1, 1, 1, 1]])
    assert assign_scenes(is_image, 2, everywhere).tolist() == by_image
    assert assign_scenes(placeholders("..", ".."), 2).tolist() == [[-1, -1], [-1, -1]]
    assert assign_scenes(placeholders("..", ".."), 1, []).tolist() == [[-1, -1], [-1, -1]]


@torch.no_grad()
def test_tokens_read_their_scenes_only():
    adapter = trained_adapter()
    visual = random(9, 16)
    scenes = torch.tensor([1, 0, -1, 3, 1, 1, 2, 0, 3])
    spatial = [random(5, 6, seed=1), random(3, 6, seed=2), None, random(4, 6, seed=3)]
    fused = fuse_by_scene(adapter, visual, scenes, spatial)
    for token, scene, result in zip(visual, scenes.tolist(), fused, strict=True):
        tokens = None if scene < 0 else spatial[scene]
        expected = token if tokens is None else adapter(token[None, None], tokens[None])[0, 0]
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert fuse_by_scene(adapter, visual, torch.full((9,), -1), spatial) is visual


@torch.no_grad()
def test_rows_that_generate_repeats_keep_their_scenes():
    """Visual tokens of every row twice, one after the other, as older versions of the library have them."""
    adapter, is_image = trained_adapter(), placeholders("xx.", "xxx")
    spatial, visual = [random(5, 6, seed=1), random(3, 6, seed=2)], random(5, 16)
    once = BaseModelOutputWithPooling(pooler_output=visual)
    SceneReading(is_image, assign_scenes(is_image, 2), spatial).fuse(adapter, once, hidden_size=16)
    rows = [visual[:2], visual[:2], visual[2:], visual[2:]]
    twice = BaseModelOutputWithPooling(pooler_output=torch.cat(rows)[:, None])
    SceneReading(is_image, assign_scenes(is_image, 2), spatial, may_repeat=True).fuse(adapter, twice, hidden_size=16)
    expected = [once.pooler_output[:2]] * 2 + [once.pooler_output[2:]] * 2
    torch.testing.assert_close(twice.pooler_output, torch.cat(expected)[:, None], rtol=1e-5, atol=1e-5)
    for visual_tokens, may_repeat in ((torch.cat(rows), False), (random(6, 16), True), (random(3, 16), True)):
        wrong = BaseModelOutputWithPooling(pooler_output=visual_tokens)
        reading = SceneReading(is_image, assign_scenes(is_image, 2), spatial, may_repeat=may_repeat)
        with pytest.raises(ValueError, match=rf"make {len(visual_tokens)} visual tokens, but input_ids hold 5 image"):
            reading.fuse(adapter, wrong, hidden_size=16)
    with pytest.raises(ValueError, match="a Tensor without pooler_output; expected the visual tokens there"):
        SceneReading(is_image, assign_scenes(is_image, 2), spatial).fuse(adapter, visual, hidden_size=16)
    with pytest.raises(ValueError, match="visual tokens of width 12; expected the language model's 16"):
        narrow = BaseModelOutputWithPooling(pooler_output=random(5, 12))
        SceneReading(is_image, assign_scenes(is_image, 2), spatial).fuse(adapter, narrow, hidden_size=16)


# --- appended


def test_scenes_follow_their_last_token():
    """Two scenes in the first sample, one of them shared with the third; padding on the left."""
    is_image = placeholders("xx.x..", "......", "x.xxxx")
    scenes = assign_scenes(is_image, 2, [1, 0, -1, 1])
    sequence = AppendedSequence.for_scenes(scenes, lengths=[1, 2])
    first, second = -2, -3
    assert sequence.source.tolist() == [
        [0, 1, second, second, 2, 3, first, 4, 5],
        [-1, -1, -1, 0, 1, 2, 3, 4, 5],
        [-1, 0, 1, 2, 3, 4, 5, second, second],
    ]
    ids = torch.arange(10, 28).view(3, 6)
    longer = sequence.extend(ids, appended=7, padding=0)
    assert longer.tolist() == [
        [10, 11, 7, 7, 12, 13, 7, 14, 15],
        [0, 0, 0, 16, 17, 18, 19, 20, 21],
        [0, 22, 23, 24, 25, 26, 27, 7, 7],
    ]
    assert torch.equal(sequence.restore(longer), ids) and longer.dtype == ids.dtype
    assert torch.equal(sequence.restore(longer[..., None].expand(-1, -1, 2)), ids[..., None].expand(-1, -1, 2))

    visual, tokens = torch.arange(8.0)[:, None], [torch.tensor([[100.0]]), torch.tensor([[200.0], [201.0]])]
    source = sequence.placeholders(is_image, repeats=1)
    merged = merge_appended(source, visual, tokens)[:, 0]
    assert merged.tolist() == [0, 1, 200, 201, 2, 100, 3, 4, 5, 6, 7, 200, 201]
    assert lengths_with_appended(source, [2, 1, 1, 4]) == [4, 2, 1, 6]
    # Every row twice, as for two beams: the first sample's tokens, again, then the third's, again.
    twice = sequence.placeholders(is_image, repeats=2)
    rows = [visual[:3], visual[:3], visual[3:], visual[3:]]
    repeated = merge_appended(twice, torch.cat(rows), tokens)[:, 0]
    assert repeated.tolist() == [0, 1, 200, 201, 2, 100] * 2 + [3, 4, 5, 6, 7, 200, 201] * 2


def test_nothing_to_append_leaves_the_sequence():
    sequence = AppendedSequence.for_scenes(torch.full((2, 3), -1), lengths=[4])
    assert sequence.source.tolist() == [[0, 1, 2], [0, 1, 2]]
