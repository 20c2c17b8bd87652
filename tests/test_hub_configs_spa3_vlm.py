"""The folder of the paper's Spa3-VLM: its files describe what can be made, and what converting the release makes."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from tiny_processors import tiny_tokenizer
from transformers import AutoProcessor

from spa3r_hf import Spa3AdapterConfig, Spa3RConfig, Spa3VLMProcessor
from spa3r_hf.adapter_spa3_vlm import build_adapter


HUB_CONFIGS = Path(__file__).resolve().parent.parent / "hub_configs"
FOLDER = HUB_CONFIGS / "spa3-vlm-qwen2.5-vl-3b"


def test_the_adapter_is_the_papers():
    config = Spa3AdapterConfig.from_pretrained(FOLDER)
    encoder = Spa3RConfig.from_pretrained(HUB_CONFIGS / "spa3r-base")
    assert config.spatial_hidden_size == encoder.hidden_size == 768
    assert (config.integration, config.spatial_features) == ("cross_attention", "latents")
    # What `convert_spa3r.py --kind spa3_vlm` writes: the release has trained the language model, too.
    assert (config.base_model_name_or_path, config.spatial_encoder_name_or_path) == ("./vlm", "./spatial_encoder")
    with torch.device("meta"):
        adapter = build_adapter(config)
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    card = (FOLDER / "README.md").read_text()
    assert f"adapter of {parameters / 1e6:.1f} M parameters" in " ".join(card.split())
    assert adapter.attention.head_dim == 128


def test_the_processor_is_the_papers(tmp_path):
    """With a tokenizer, which comes from the VLM's repository."""
    (tmp_path / "processor_config.json").write_bytes((FOLDER / "processor_config.json").read_bytes())
    tiny_tokenizer("qwen2_5_vl").save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is Spa3VLMProcessor and processor.spatial_image_processor.size == 518
    sampling = processor.frame_sampling
    assert (sampling.seconds_per_frame, sampling.min_frames, sampling.max_frames) == (2.0, 4, 8)
    assert (processor.image_processor.patch_size, processor.image_processor.merge_size) == (14, 2)
    settings = json.loads((FOLDER / "processor_config.json").read_text())
    assert settings["vlm_processor_class"] == processor.vlm_processor_class == "Qwen2_5_VLProcessor"
    encoder = json.loads((HUB_CONFIGS / "spa3r-base" / "preprocessor_config.json").read_text())
    assert all(encoder[name] == value for name, value in settings["spatial_options"].items() if name in encoder)


def test_the_card_says_where_weights_come_from_and_whose_they_are():
    data, text = metadata_load(FOLDER / "README.md"), (FOLDER / "README.md").read_text()
    assert data["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct" and data["library_name"] == "spa3r_hf"
    assert data["pipeline_tag"] == "image-text-to-text" and data["license"] == "other"
    assert data["license_name"] and data["license_link"].startswith("https://") and "model-index" not in data
    assert "training/convert_spa3r.py --kind spa3_vlm --checkpoint" in text and "no weights here" in text
    rows = {line.split("|")[1].split(",")[0].strip(): line for line in text.splitlines() if line.startswith("|")}
    for name in ("Qwen2.5-VL-3B", "VGGT-1B", "ScanNet", "ScanNet++"):
        assert "**no**" in rows[name], name
    for script in re.findall(r"training/\w+\.py", text):
        assert (HUB_CONFIGS.parent / script).is_file()


@pytest.mark.parametrize("name", ["adapter_config.json", "processor_config.json"])
def test_files_are_as_the_library_writes_them(name):
    text = (FOLDER / name).read_text()
    assert json.dumps(json.loads(text), indent=2) + "\n" == text and "/work" not in text
