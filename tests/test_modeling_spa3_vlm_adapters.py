"""Adapters beside each other, LoRA, the whole language model; and their files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_spa3r
from tiny_vlms import (
    FAMILIES,
    LORA,
    SAMPLES,
    SPATIAL_WIDTH,
    WIDTH,
    counted,
    disturb,
    latents,
    propagated,
    scenes,
    tiny_inputs,
    tiny_vlm,
    trained,
)

from spa3r_hf import Spa3AdapterConfig, Spa3VLM, get_spa3_vlm


@pytest.fixture(scope="module")
def encoder():
    return tiny_spa3r().spa3r


# --- every family


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_adapter_gives_identical_logits(family, encoder, tmp_path):
    model = trained(family, encoder, lora_config=LORA)
    inputs = tiny_inputs(family, SAMPLES)
    expected = model(**inputs, spatial_pixel_values=scenes()).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key for key in keys if not key.startswith("lora.")} == ADAPTER_KEYS
    lora = [key for key in keys if key.startswith("lora.")]
    assert len(lora) == 2 * 2 * 2 and all(".layers." in key and "vision" not in key for key in lora)
    again = Spa3VLM.from_pretrained(tmp_path, vlm=tiny_vlm(family), spatial_encoder=encoder)
    assert torch.equal(again(**inputs, spatial_pixel_values=scenes()).logits, expected)
    assert not any(parameter.requires_grad for parameter in again.parameters()) and not again.training


ADAPTER_KEYS = {
    f"spatial_adapter.{module}.{kind}"
    for module in (
        *("spatial_projection.fc1", "spatial_projection.fc2", "attention.q_proj", "attention.k_proj"),
        *("attention.v_proj", "attention.o_proj", "attention.q_norm", "attention.k_norm", "norm"),
        *("mlp.fc1", "mlp.fc2", "gate"),
    )
    for kind in ("weight", "bias")
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_disabled_adapter_is_the_base(family, encoder):
    vlm = tiny_vlm(family)
    inputs = tiny_inputs(family, SAMPLES, "left")
    base, answers = vlm(**inputs).logits, vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
    model = disturb(get_spa3_vlm(vlm, encoder, Spa3AdapterConfig(lora_config=LORA)))
    logits = model(**inputs, spatial_pixel_values=scenes()).logits
    with model.disable_adapter(), counted(model) as calls:
        assert torch.equal(model(**inputs, spatial_pixel_values=scenes()).logits, base)
        generated = model.generate(**inputs, spatial_pixel_values=scenes(), max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, answers)
    assert not calls
    assert torch.equal(model(**inputs, spatial_pixel_values=scenes()).logits, logits)
    assert not torch.equal(logits, base)


# --- adapters beside each other, LoRA, the whole language model


@torch.no_grad()
def test_named_adapters(encoder, tmp_path):
    inputs, z = tiny_inputs("qwen2_5_vl", SAMPLES), latents()
    settings = {
        "plain": {},
        "lora": {"lora_config": LORA},
        "other": {"lora_config": {**LORA, "target_modules": ["k_proj"]}},
    }
    settings["append"] = {"integration": "append"}
    expected = {}
    for seed, (name, setting) in enumerate(settings.items()):
        model = disturb(get_spa3_vlm(tiny_vlm("qwen2_5_vl"), encoder, Spa3AdapterConfig(**setting)), seed)
        expected[name] = model(**inputs, spatial_latents=z).logits
        model.save_pretrained(tmp_path / name)
    model = Spa3VLM.from_pretrained(tmp_path / "lora", tiny_vlm("qwen2_5_vl"), encoder, adapter_name="lora")
    for name in ("plain", "other", "append"):
        model.load_adapter(tmp_path / name, name)
        assert model.active_adapter == "lora"
    for name in (*settings, *reversed(settings)):
        model.set_adapter(name)
        assert torch.equal(model(**inputs, spatial_latents=z).logits, expected[name])
        with model.disable_adapter():
            assert torch.equal(model(**inputs, spatial_latents=z).logits, tiny_vlm("qwen2_5_vl")(**inputs).logits)
        trained_names = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
        assert trained_names and all(f".{name}." in parameter for parameter in trained_names)
        assert any("lora_" in parameter for parameter in trained_names) == (name in ("lora", "other"))
    model.set_adapter("lora", inference_mode=True)
    with model.disable_adapter():
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # What else is trained still is when an adapter comes.
    model.language_model.norm.weight.requires_grad_(True)
    model.load_adapter(tmp_path / "lora", "third")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "vlm.model.language_model.norm.weight"
    ]
    model.language_model.norm.weight.requires_grad_(False)
    model.delete_adapter("third")
    model.save_pretrained(tmp_path / "again", adapter_name="other")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    model.delete_adapter("lora")
    assert model.active_adapter == "plain" and list(model.adapters) == ["plain", "other", "append"]
    assert torch.equal(model(**inputs, spatial_latents=z).logits, expected["plain"])
    model.delete_adapter("plain")
    assert torch.equal(model(**inputs, spatial_latents=z).logits, expected["other"])
    for name in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"no adapter 'lora'; expected one of \['other', 'append'\]"):
            name("lora")
    with pytest.raises(ValueError, match="there is an adapter 'other' already"):
        model.load_adapter(tmp_path / "other", "other")
    with pytest.raises(ValueError, match="expected a name without dots"):
        model.add_adapter("v1.0", Spa3AdapterConfig())
    model.delete_adapter("other")
    with pytest.raises(ValueError, match="'append' is the only adapter"):
        model.delete_adapter("append")
    assert not any("lora_" in name for name in model.state_dict())


def test_lora_is_trained_with_the_adapter(encoder):
    from peft import LoraConfig

    config = Spa3AdapterConfig(lora_config=LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    model = get_spa3_vlm(tiny_vlm("qwen2_5_vl").bfloat16(), encoder, config)
    inputs = tiny_inputs("qwen2_5_vl", SAMPLES)
    # The base is untouched, and so are its logits at the start.
    assert torch.equal(
        model(**inputs, spatial_latents=latents()).logits, tiny_vlm("qwen2_5_vl").bfloat16()(**inputs).logits
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(**inputs, spatial_latents=latents(), labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith("adapters.") or "lora_" in name}
    assert moved >= {name for name in expected if "k_norm.bias" not in name} and moved <= expected
    assert all(value.dtype == torch.float32 for name, value in model.state_dict().items() if name in expected)
    assert not any("visual" in name for name in expected)


def test_lora_without_a_target(encoder):
    vlm = tiny_vlm("qwen2_5_vl")
    for target in ("nothing", "qkv"):  # the latter is the vision tower's
        with pytest.raises(
            ValueError, match=rf"target_modules = \['{target}'\]; expected modules of the language model"
        ):
            get_spa3_vlm(vlm, encoder, Spa3AdapterConfig(lora_config={"target_modules": [target]}))
    # The VLM is as it was.
    get_spa3_vlm(vlm, encoder, Spa3AdapterConfig(lora_config=LORA))


@torch.no_grad()
def test_trained_vlm_is_saved_and_found_again(encoder, tmp_path):
    model = trained("qwen2_5_vl", encoder, lora_config=LORA)
    model.language_model.requires_grad_(True)
    for name, parameter in model.language_model.named_parameters():
        parameter.add_(0.01 if "norm" in name else 0.0)
    inputs = tiny_inputs("qwen2_5_vl", SAMPLES)
    expected = model(**inputs, spatial_latents=latents()).logits
    model.save_pretrained(tmp_path / "first")
    again = Spa3VLM.from_pretrained(tmp_path / "first", spatial_encoder=encoder)
    assert torch.equal(again(**inputs, spatial_latents=latents()).logits, expected)
    # Without gradients, and from a folder of its own: still the only place where these weights are.
    again.save_pretrained(tmp_path / "second")
    moved = Spa3VLM.from_pretrained(tmp_path / "second", spatial_encoder=encoder)
    assert torch.equal(moved(**inputs, spatial_latents=latents()).logits, expected)
    settings = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "./vlm" and settings["base_model_type"] == "qwen2_5_vl"
    moved.save_pretrained(tmp_path / "third", save_vlm=False)
    assert not (tmp_path / "third" / "vlm").exists()
    settings = json.loads((tmp_path / "third" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "second" / "vlm")
    # From a gathered state dict, as a sharded training gives it.
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.zero_()
    model.save_pretrained(tmp_path / "gathered", state_dict=state_dict)
    gathered = Spa3VLM.from_pretrained(tmp_path / "gathered", spatial_encoder=encoder)
    assert torch.equal(gathered(**inputs, spatial_latents=latents()).logits, expected)


@torch.no_grad()
def test_training_goes_on_from_a_folder(encoder, tmp_path):
    """In place: these are the parameters that an optimizer has."""
    model = trained("qwen2_5_vl", encoder, lora_config=LORA)
    model.language_model.norm.weight.requires_grad_(True).add_(0.5)
    model.save_pretrained(tmp_path / "both")
    inputs, z = tiny_inputs("qwen2_5_vl", SAMPLES), latents()
    expected = model(**inputs, spatial_latents=z).logits
    other = disturb(get_spa3_vlm(tiny_vlm("qwen2_5_vl", 1), encoder, Spa3AdapterConfig(lora_config=LORA)), 9)
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in other.named_parameters()}
    other.restore(tmp_path / "both")
    assert torch.equal(other(**inputs, spatial_latents=z).logits, expected)
    assert {name: (id(p), p.requires_grad) for name, p in other.named_parameters()} == before
    wider = trained("qwen2_5_vl", encoder, lora_config={**LORA, "r": 3})
    with pytest.raises(ValueError, match="the language model's LoRA: 8 keys"):
        wider.restore(tmp_path / "both")
    appending = trained("qwen2_5_vl", encoder, integration="append")
    with pytest.raises(ValueError, match="the weights do not fit adapter 'default'"):
        appending.restore(tmp_path / "both")


# --- files


SHA = "0123456789abcdef0123456789abcdef01234567"


def store(model, cache, repo: str, **options) -> None:
    """Put what `model` saves into a Hub cache, as if it had been downloaded."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(SHA)
    model.save_pretrained(root / "snapshots" / SHA, **options)


@torch.no_grad()
def test_models_are_found_by_their_recorded_ids(encoder, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoModelForImageTextToText

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    options = {"cache_dir": tmp_path, "local_files_only": True}
    store(tiny_vlm("internvl"), tmp_path, "org/base")
    store(encoder, tmp_path, "org/spa3r")
    vlm = AutoModelForImageTextToText.from_pretrained("org/base", **options)
    spatial_encoder = AutoModel.from_pretrained("org/spa3r", **options)
    model = disturb(get_spa3_vlm(vlm, spatial_encoder, Spa3AdapterConfig()))
    store(model, tmp_path, "org/adapter")
    store(model, tmp_path, "org/whole", save_vlm=True, save_spatial_encoder=True)
    folder = tmp_path / "models--org--adapter" / "snapshots" / SHA
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        **{"adapter_type": "spa3_vlm", "integration": "cross_attention", "spatial_features": "latents"},
        **{"hidden_size": WIDTH, "num_attention_heads": 2, "spatial_hidden_size": SPATIAL_WIDTH, "lora_config": None},
        **{"base_model_name_or_path": "org/base", "base_model_revision": SHA, "base_model_type": "internvl"},
        **{"spatial_encoder_name_or_path": "org/spa3r", "spatial_encoder_revision": SHA},
    }
    inputs = tiny_inputs("internvl", SAMPLES)
    expected = model(**inputs, spatial_pixel_values=scenes()).logits
    for repo in ("org/base", "org/spa3r"):
        # These have moved on; the adapter has not.
        (tmp_path / f"models--{repo.replace('/', '--')}" / "refs" / "main").write_text(SHA[::-1])
    for repo in ("org/adapter", "org/whole"):
        again = Spa3VLM.from_pretrained(repo, **options)
        assert torch.equal(again(**inputs, spatial_pixel_values=scenes()).logits, expected)
        assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = Spa3VLM.from_pretrained(folder, is_trainable=True, dtype=torch.bfloat16, **options)
    assert trainable.vlm.dtype == torch.bfloat16 and trainable.adapter.gate.weight.dtype == torch.float32
    assert all(p.requires_grad == name.startswith("adapters.") for name, p in trainable.named_parameters())
    with pytest.raises(OSError, match="cannot find adapter_config.json of the adapter org/nothing"):
        Spa3VLM.from_pretrained("org/nothing", **options)
    with pytest.raises(ValueError, match=r"vlm and \['dtype'\] are given"):
        Spa3VLM.from_pretrained(folder, vlm=vlm, dtype=torch.bfloat16)


@torch.no_grad()
def test_other_base_than_the_adapter_was_trained_for(encoder, tmp_path, caplog):
    vlm = tiny_vlm("qwen2_5_vl")
    vlm.name_or_path = vlm.config._name_or_path = "org/base"
    model = trained("qwen2_5_vl", encoder)
    model.adapter_configs["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    Spa3VLM.from_pretrained(tmp_path, vlm, encoder)
    with pytest.raises(ValueError, match="for base_model_type = 'qwen2_5_vl'; this VLM .* has 'qwen2_vl'"):
        Spa3VLM.from_pretrained(tmp_path, tiny_vlm("qwen2_vl"), encoder)
    wider = tiny_vlm("qwen2_5_vl")
    wider.config.text_config.hidden_size = 24
    with pytest.raises(ValueError, match="for hidden_size = 16; this VLM or spatial encoder has 24"):
        Spa3VLM.from_pretrained(tmp_path, wider, encoder)
    with pytest.raises(ValueError, match="for spatial_hidden_size = 32; this VLM or spatial encoder has 48"):
        Spa3VLM.from_pretrained(tmp_path, vlm, tiny_spa3r(hidden_size=48).spa3r)
    vlm.name_or_path = "org/finetune"
    with caplog.at_level("WARNING"), propagated("transformers"), propagated("spa3r_hf"):
        Spa3VLM.from_pretrained(tmp_path, vlm, encoder)
    assert "the adapter is for base_model = 'org/base', and is now used with 'org/finetune'" in caplog.text


def test_files_that_do_not_fit(encoder, tmp_path):
    model = trained("qwen2_5_vl", encoder, lora_config=LORA)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights, vlm = load_file(file), tiny_vlm("qwen2_5_vl")

    def refused(changed, message):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            Spa3VLM.from_pretrained(tmp_path, vlm, encoder)

    refused(weights | {"vlm.lm_head.weight": torch.ones(2)}, r"1 keys, such as \['vlm.lm_head.weight'\]")
    refused({k: v for k, v in weights.items() if k != "spatial_adapter.gate.bias"}, r"such as \['gate.bias'\]")
    refused(weights | {"spatial_adapter.gate.bias": torch.ones(3)}, r"such as \['gate.bias'\]")
    refused({k: v for k, v in weights.items() if not k.startswith("lora.")}, "the language model's LoRA: 8 keys")
    # A refused adapter leaves the VLM as it was.
    save_file(weights, file)
    Spa3VLM.from_pretrained(tmp_path, vlm, encoder)
    with pytest.raises(ValueError, match="does not say its VLM; expected it as vlm="):
        Spa3VLM.from_pretrained(tmp_path, spatial_encoder=encoder)


def test_push_to_hub(encoder, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path, **options):
            import os

            calls.append((options["repo_id"], sorted(os.listdir(folder_path)), options["commit_message"]))
            return "commit"

    monkeypatch.setattr("spa3r_hf.modeling_spa3_vlm_files.HfApi", Api)
    assert trained("smolvlm", encoder).push_to_hub("adapter", private=True, token="secret") == "commit"
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert calls == [
        ("token", "secret"),
        ("create", "adapter", True, True),
        ("me/adapter", files, "Upload Spa3-VLM adapter"),
    ]


def test_trainable_parameters_are_told(encoder, capsys):
    vlm = tiny_vlm("qwen2_5_vl")
    model = get_spa3_vlm(vlm, encoder, Spa3AdapterConfig())
    # Two linear layers for the scene, four for the attention with its norms, a norm, an MLP and a gate.
    adapter = (32 * 16 + 16) + (16 * 16 + 16) + 4 * (16 * 16 + 16) + 2 * 2 * 8 + 2 * 16 + (16 * 4 + 4 + 4 * 16 + 16)
    adapter += 16 * 16 + 16
    total = adapter + sum(p.numel() for part in (vlm, encoder) for p in part.parameters())
    assert model.get_nb_trainable_parameters() == (adapter, total)
    model.print_trainable_parameters()
    share = 100 * adapter / total
    assert capsys.readouterr().out == (
        f"trainable params: {adapter:,d} || all params: {total:,d} || trainable%: {share:.4f}\n"
    )


def test_merging_is_refused_with_a_reason(encoder):
    model = get_spa3_vlm(tiny_vlm("internvl"), encoder, Spa3AdapterConfig(lora_config=LORA))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            NotImplementedError, match="cannot be merged into the VLM, as what it adds to a visual token"
        ):
            merge()


def test_configuration_is_completed_on_a_copy(encoder):
    config = Spa3AdapterConfig(num_attention_heads=4)
    model = get_spa3_vlm(tiny_vlm("gemma3"), encoder, config)
    assert config == Spa3AdapterConfig(num_attention_heads=4)
    assert model.adapter_config.num_attention_heads == 4 and model.adapter.attention.head_dim == 4
    with pytest.raises(ValueError, match="num_attention_heads = 3; expected a divisor of hidden_size = 16"):
        get_spa3_vlm(tiny_vlm("gemma3"), encoder, Spa3AdapterConfig(num_attention_heads=3))


def test_quantised_base(encoder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    tiny_vlm("qwen2_5_vl").save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", **options)
    inputs, z = tiny_inputs("qwen2_5_vl", SAMPLES), latents()
    base = vlm(**inputs).logits
    model = get_spa3_vlm(vlm, encoder, Spa3AdapterConfig(lora_config=LORA))
    assert torch.equal(model(**inputs, spatial_latents=z).logits, base)
    expected = disturb(model)(**inputs, spatial_latents=z).logits
    model(**inputs, spatial_latents=z, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    assert len(list((tmp_path / "adapter").iterdir())) == 2
    again = Spa3VLM.from_pretrained(tmp_path / "adapter", spatial_encoder=encoder, **options)
    assert torch.equal(again(**inputs, spatial_latents=z).logits, expected)
