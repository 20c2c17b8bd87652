"""The converter of Spa3-VLM's full checkpoints, through its command line."""

import json
import os
from pathlib import Path

import pytest
import torch
from golden_spa3_vlm import CONFIG, GOLDEN, TENSORS, WEIGHTS, check_numbers, with_encoder
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import finish, load_script, start_script
from tiny_models import golden
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from spa3r_hf import Spa3RModel, Spa3VLM, Spa3VLMProcessor
from spa3r_hf.conversion_spa3_vlm import convert_original_spa3_vlm


_TOKENS = {150: "<|image_pad|>", 151: "<|video_pad|>", 152: "<|vision_start|>", 153: "<|vision_end|>"}


def write_processor_files(folder: Path) -> None:
    """A tokenizer and the settings of pictures for the golden VLM."""
    vocabulary = {_TOKENS.get(index, f"w{index}"): index for index in range(160)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(_TOKENS.values()))
    template = (
        "{% for m in messages %}{% for e in m.content %}{% if e.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ e.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", pad_token="w0", chat_template=template
    ).save_pretrained(folder)
    images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(images | {"temporal_patch_size": 2}))


def write_shards(folder: Path, weights: dict[str, torch.Tensor], number: int = 3) -> None:
    """Safetensors shards with their index, as `transformers` writes them."""
    folder.mkdir(exist_ok=True)
    names = sorted(weights)
    shard_of = {
        name: f"model-{1 + place % number:05d}-of-{number:05d}.safetensors" for place, name in enumerate(names)
    }
    for shard in set(shard_of.values()):
        save_file({name: weights[name].contiguous() for name in names if shard_of[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch malicious",)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The checkpoint in the forms that it may come in, and reference numbers, right and wrong."""
    work = tmp_path_factory.mktemp("release")
    write_shards(work / "release", with_encoder())
    write_processor_files(work / "release")
    (work / "release" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.5}))
    scenes = {name: golden("rms_norm")[1][name] for name in ("input.images", "output.latents")}
    save_file(TENSORS | scenes, work / "numbers.safetensors")
    wrong = {"output.logits": TENSORS["output.logits"] + 0.01}
    save_file(TENSORS | wrong, work / "wrong.safetensors")
    save_file(WEIGHTS, work / "bare.safetensors")
    torch.save({"state_dict": WEIGHTS}, work / "whole.pt")
    torch.save({"state_dict": WEIGHTS, "hook": Malicious()}, work / "malicious.pt")
    return work


@pytest.fixture(scope="module")
def main():
    script = load_script("convert_spa3r")

    def run(checkpoint: Path, output_dir: Path, *more: object) -> None:
        words = ["--kind", "spa3_vlm", "--checkpoint", checkpoint, "--output_dir", output_dir, *more]
        script.main([str(word) for word in words])

    return run


def test_the_release_becomes_three_folders(work, tmp_path):
    """In a process of its own, as it is typed."""
    out = tmp_path / "spa3-vlm"
    arguments = ["--kind", "spa3_vlm", "--checkpoint", work / "release", "--output_dir", out]
    arguments += ["--reference", work / "numbers.safetensors"]
    output = finish(start_script("convert_spa3r", list(map(str, arguments))))
    for name in ("logits", "loss", "logits_without_spatial", "fused_image_embeds", "latents"):
        assert f"agrees with the reference: {name} (largest difference" in output
    training = [key for key in golden("rms_norm")[0] if key.startswith(("decoder.", "heads.", "dino.", "pose_tok"))]
    assert all(repr(key) in output for key in training)  # left out, and said so

    keys = load_file(out / "adapter_model.safetensors").keys()
    assert len(keys) == 24 and all(key.startswith("spatial_adapter.") for key in keys)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "./vlm" and settings["base_model_type"] == "qwen2_5_vl"
    assert settings["spatial_encoder_name_or_path"] == "./spatial_encoder"
    model = Spa3VLM.from_pretrained(out)
    check_numbers(model)
    reference = golden("rms_norm")[1]
    with torch.no_grad():
        z = model.get_spatial_latents(reference["input.images"])
    torch.testing.assert_close(z, reference["output.latents"], rtol=1e-4, atol=1e-5)
    assert model.vlm.generation_config.eos_token_id == [2, 7]

    # Each folder stands for itself.
    assert isinstance(AutoModel.from_pretrained(out / "spatial_encoder"), Spa3RModel)
    assert AutoImageProcessor.from_pretrained(out / "spatial_encoder").size == 56  # VGGT's
    AutoModelForImageTextToText.from_pretrained(out / "vlm")
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor) is Spa3VLMProcessor and processor.spatial_image_processor.size == 56
    again = Spa3VLMProcessor.from_vlm(out / "vlm", out / "spatial_encoder")
    content = [{"type": "image", "image": Image.new("RGB", (60, 60), "red")}, {"type": "text", "text": "w11 w12"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    one, other = (p.apply_chat_template([{"role": "user", "content": content}], **options) for p in (processor, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert model.generate(**one, max_new_tokens=2).shape[1] <= one["input_ids"].shape[1] + 2


@pytest.mark.parametrize("form", ["fixture", "bare.safetensors", "whole.pt"])
def test_one_file_without_an_encoder(main, work, tmp_path, form, capsys):
    """A configuration comes in the file's metadata, beside it, or from the base VLM."""
    checkpoint, more = work / form, []
    if form == "fixture":
        checkpoint = GOLDEN
    elif form == "bare.safetensors":
        convert_original_spa3_vlm(WEIGHTS, CONFIG).vlm.save_pretrained(tmp_path / "base")
        more = ["--base_vlm", tmp_path / "base"]
        write_processor_files(tmp_path / "base")
    else:
        checkpoint = tmp_path / form
        checkpoint.write_bytes((work / form).read_bytes())
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    main(checkpoint, tmp_path / "out", *more, "--reference", GOLDEN)
    report = capsys.readouterr().err
    assert "reads spatial_latents that are given" in report and "agrees with the reference: logits" in report
    model = Spa3VLM.from_pretrained(tmp_path / "out")
    assert model.spatial_encoder is None
    check_numbers(model)
    if form == "bare.safetensors":  # the weights are the base's, which has a home
        assert not (tmp_path / "out" / "vlm").exists() and "which the adapter names" in report
        assert model.adapter_config.base_model_name_or_path == str(tmp_path / "base")
        assert AutoProcessor.from_pretrained(tmp_path / "out").spatial_image_processor.size == 518
    else:
        assert (tmp_path / "out" / "vlm").is_dir() and "so that no processor is saved; see --base_vlm" in report


def test_a_trained_vlm_is_saved_although_its_base_has_a_home(main, work, tmp_path, capsys):
    changed = WEIGHTS | {"lm_head.weight": WEIGHTS["lm_head.weight"] + 1}
    convert_original_spa3_vlm(changed, CONFIG).vlm.save_pretrained(tmp_path / "base")
    write_processor_files(tmp_path / "base")
    main(GOLDEN, tmp_path / "out", "--base_vlm", tmp_path / "base")
    report = capsys.readouterr().err
    assert "it was trained, and is saved as well" in report and "nothing shows that this model computes" in report
    check_numbers(Spa3VLM.from_pretrained(tmp_path / "out"))
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")) is Spa3VLMProcessor


def test_types_and_settings_are_kept(main, tmp_path):
    vlm = ("visual.", "model.", "lm_head.")
    mixed = {key: value.bfloat16() if key.startswith(vlm) else value for key, value in with_encoder().items()}
    write_shards(tmp_path / "mixed", mixed)
    main(tmp_path / "mixed", tmp_path / "out", "--set", "backbone_config.initializer_range=0.01")
    model = Spa3VLM.from_pretrained(tmp_path / "out")
    types = {name.split(".")[0]: value.dtype for name, value in model.state_dict().items()}
    assert types == {"vlm": torch.bfloat16, "spatial_encoder": torch.float32, "adapters": torch.float32}
    assert model.spatial_encoder.config.backbone_config.initializer_range == 0.01


def lose_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_a_shard(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def add_to_a_shard(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {"more": torch.ones(1)}, path)


def point_elsewhere(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


def no_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def another_key(folder: Path) -> None:
    write_shards(folder, WEIGHTS | {"geometry_gate.2.weight": torch.ones(1)})


def a_key_less(folder: Path) -> None:
    write_shards(folder, {key: value for key, value in WEIGHTS.items() if key != "ln.bias"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def a_list_for_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_shard, "model-00002-of-00003.safetensors is refused"),
        (cut_a_shard, "model-00001-of-00003.safetensors is refused"),
        (add_to_a_shard, "0 tensors are missing, such as [], and 1 are not expected, such as ['more']"),
        (point_elsewhere, "names the shard '../model-00001-of-00003.safetensors'; expected a file of the same folder"),
        (no_map, "has no weight_map; expected the name of a file for every tensor"),
        (no_weights, "holds no weights; expected one of ('model.safetensors', "),
        (another_key, "geometry_gate.2.weight"),
        (a_key_less, "such as ['norm.bias']"),
        (no_config, "there is no config.json with"),
        (a_list_for_config, "config.json holds a list; expected an object"),
        (another_model, "the configuration is of a 'qwen2'; expected a vision-language model's"),
    ],
)
def test_folders_that_are_refused(main, tmp_path, monkeypatch, capsys, spoil, message):
    write_shards(tmp_path / "release", WEIGHTS)
    spoil(tmp_path / "release")
    refuse(main, tmp_path / "release", tmp_path, capsys, message)


def refuse(main, checkpoint: Path, tmp_path: Path, capsys, message: str, *more: object) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(checkpoint, tmp_path / "out", *more)
    report = capsys.readouterr().err
    assert stop.value.code == 1 and "nothing is saved: " in report and message in report, report
    assert set(tmp_path.iterdir()) == before


def test_files_numbers_and_settings_that_are_refused(main, work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refuse(main, work / "malicious.pt", tmp_path, capsys, "malicious.pt is refused; expected safetensors or a pickle")
    refuse(main, work / "nothing", tmp_path, capsys, "nothing is refused")
    reference = ("--reference", work / "wrong.safetensors")
    refuse(main, work / "release", tmp_path, capsys, "logits differs by up to 0.01", *reference)
    setting = ("--set", "num_latents=3")
    refuse(main, work / "release", tmp_path, capsys, "encoder.queries: (8, 32) instead of (1, 3, 32)", *setting)
    refuse(main, GOLDEN, tmp_path, capsys, "has no keys geometry_encoder.spa3r.*", *setting)
    refuse(main, GOLDEN, tmp_path, capsys, "nowhere", "--base_vlm", tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        main(work / "release", tmp_path / "out", "--kind", "vggt", "--base_vlm", "a/b")
    assert "--base_vlm is for --kind spa3_vlm; this is vggt" in capsys.readouterr().err
