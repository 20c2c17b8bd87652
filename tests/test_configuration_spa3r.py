import copy

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_models import tiny_spa3r_config, tiny_vggt_config
from transformers import BertConfig, BertModel, DINOv3ViTConfig, ViTConfig

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining, Spa3RModel, Spa3RVGGTConfig, Spa3RVGGTModel


def test_defaults_are_those_of_the_paper():
    config = Spa3RConfig()
    assert (config.hidden_size, config.num_latents, config.num_hidden_layers) == (768, 256, 6)
    assert (config.mask_ratio, config.loss_views, config.masking_mode) == (0.5, "all", "asymmetric")
    backbone, semantic = config.backbone_config, config.semantic_config
    assert (backbone.hidden_size, backbone.feature_size, backbone.num_hidden_layers) == (1024, 2048, 24)
    assert (backbone.num_prefix_tokens, backbone.global_qk_norm) == (5, "layer_norm")
    assert (semantic.hidden_size, semantic.num_hidden_layers, semantic.num_register_tokens) == (1024, 24, 4)


@pytest.mark.parametrize("config", [tiny_spa3r_config(mask_ratio=0.25, loss_views="target"), tiny_vggt_config()])
def test_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert type(config)(**copy.deepcopy(config.to_dict())).to_dict() == config.to_dict()


def test_arguments_are_left_alone():
    backbone, semantic = tiny_vggt_config().to_dict(), {"hidden_size": 48, "num_attention_heads": 3}
    copies = copy.deepcopy(backbone), dict(semantic)
    config = Spa3RConfig(backbone_config=backbone, semantic_config=semantic)
    assert (backbone, semantic) == copies
    assert isinstance(config.backbone_config, Spa3RVGGTConfig) and config.semantic_config.hidden_size == 48


@pytest.mark.parametrize(
    "config_class, settings, message",
    [
        (
            Spa3RConfig,
            {"hidden_sise": 4},
            r"Spa3RConfig does not know \['hidden_sise'\]; its own keys are .*hidden_size",
        ),
        (Spa3RConfig, {"backbone_config": {"hidden_sise": 4}}, r"Spa3RVGGTConfig does not know \['hidden_sise'\]"),
        (Spa3RConfig, {"semantic_config": {"hidden_sise": 4}}, r"DINOv3ViTConfig does not know \['hidden_sise'\]"),
        (Spa3RConfig, {"semantic_config": {"model_type": "vit"}}, "of a 'vit' model; DINOv3ViTConfig expected"),
        (
            Spa3RConfig,
            {"backbone_config": DINOv3ViTConfig()},
            "backbone_config is a DINOv3ViTConfig; expected a Spa3RV",
        ),
        (Spa3RConfig, {"semantic_config": ViTConfig()}, "semantic_config is a ViTConfig; expected a DINOv3ViTConfig"),
        (Spa3RConfig, {"mask_ratio": 0.0}, r"mask_ratio = 0.0; expected a share of the views in \(0, 1\)"),
        (Spa3RConfig, {"mask_ratio": 1.0}, r"mask_ratio = 1.0; expected"),
        (Spa3RConfig, {"mask_ratio": float("nan")}, r"mask_ratio = nan; expected"),
        (
            Spa3RConfig,
            {"hidden_size": 100},
            "hidden_size = 100 with num_attention_heads = 12; expected .* multiple of 8",
        ),
        (Spa3RConfig, {"num_latents": 0}, "Spa3RConfig.num_latents = 0; expected a number above 0"),
        (Spa3RConfig, {"num_register_tokens": -1}, "Spa3RConfig.num_register_tokens = -1; expected"),
        (Spa3RConfig, {"targets": []}, r"targets = \[\]; expected 'geometric', 'semantic', or both"),
        (Spa3RConfig, {"targets": ["clip"]}, r"targets = \['clip'\]; expected"),
        (Spa3RConfig, {"semantic_image_size": 100}, "semantic_image_size = 100; expected a multiple of .* = 16"),
        (
            Spa3RConfig,
            {"backbone_config": {"use_depth_head": False}},
            "depth_probe = True, but .*use_depth_head = False",
        ),
        (Spa3RVGGTConfig, {"patch_sice": 14}, r"Spa3RVGGTConfig does not know \['patch_sice'\]"),
        (Spa3RVGGTConfig, {"hidden_size": 40}, "hidden_size = 40 with num_attention_heads = 16; expected"),
        (Spa3RVGGTConfig, {"image_size": 500}, "image_size = 500; expected a multiple of patch_size = 14"),
        (
            Spa3RVGGTConfig,
            {"dpt_layers": [4, 11, 17, 24]},
            r"dpt_layers = \[4, 11, 17, 24\]; expected four .*\[0, 23\]",
        ),
        (
            Spa3RVGGTConfig,
            {"dpt_out_channels": [6, 8, 8, 8]},
            r"dpt_out_channels = \[6, 8, 8, 8\]; expected four mult",
        ),
        (Spa3RVGGTConfig, {"camera_num_attention_heads": 7}, "camera_num_attention_heads = 7; expected a divisor"),
        (Spa3RVGGTConfig, {"rope_theta": -1.0}, "Spa3RVGGTConfig.rope_theta = -1.0; expected a number above 0"),
    ],
)
def test_bad_settings_are_named(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


@pytest.mark.parametrize(
    "config_class, settings",
    [
        (Spa3RConfig, {"mask_ratio": "half"}),
        (Spa3RConfig, {"masking_mode": "symmetric"}),
        (Spa3RConfig, {"camera_conditioning": "none"}),
        (Spa3RVGGTConfig, {"global_qk_norm": "batch_norm"}),
        (Spa3RVGGTConfig, {"hidden_size": 64.5}),
    ],
)
def test_settings_of_another_type_are_named(config_class, settings):
    ((name, value),) = settings.items()
    with pytest.raises(StrictDataclassError, match=rf"(?s){name}.*expected .*{value}"):
        config_class(**settings)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    for model_class in (Spa3RModel, Spa3RForPreTraining, Spa3RVGGTModel):
        expected = model_class.config_class.model_type
        with pytest.raises(ValueError, match=rf"configuration of a 'bert' model; \w+ expected '{expected}'"):
            model_class.from_pretrained(tmp_path)
