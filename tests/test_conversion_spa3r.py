import os

import pytest
import torch
from safetensors.torch import save_file
from script_runs import load_script, start_script
from tiny_models import GOLDEN, golden
from transformers import DINOv3ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from spa3r_hf import Spa3RForPreTraining, Spa3RModel, Spa3RVGGTConfig, Spa3RVGGTModel
from spa3r_hf.conversion_spa3r import (
    compare_with_reference,
    convert_original_dinov3,
    convert_original_spa3r,
    convert_original_vggt,
    infer_spa3r_config,
)


VGGT = ("aggregator.", "camera_head.", "depth_head.", "point_head.")


@pytest.fixture(scope="module")
def weights():
    return golden("layer_norm")[0]


@pytest.fixture(scope="module")
def vggt_weights(weights):
    """As the file of VGGT-1B is: with a point tracker that is not used."""
    vggt = {key: value for key, value in weights.items() if key.startswith(VGGT)}
    return vggt | {"track_head.tracker.fmap_norm.weight": torch.ones(8)}


@pytest.fixture(scope="module")
def dinov3_weights(weights):
    """As the file of DINOv3 is: with a norm for local crops, and RoPE periods in bfloat16."""
    dinov3 = {key.removeprefix("dino."): value for key, value in weights.items() if key.startswith("dino.")}
    dinov3["rope_embed.periods"] = dinov3["rope_embed.periods"].bfloat16()
    return dinov3 | {"local_cls_norm.weight": torch.ones(32), "local_cls_norm.bias": torch.zeros(32)}


def test_vggt_file(weights, vggt_weights, caplog):
    with caplog.at_level("INFO"):
        model = convert_original_vggt(vggt_weights)
    assert "global blocks normalise queries and keys with layer_norm" in caplog.text
    assert "track_head.tracker.fmap_norm.weight" in caplog.text
    compare_with_reference(model, golden("layer_norm")[1])
    inside = convert_original_spa3r(weights).spa3r.backbone.state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in model.state_dict().items())


def test_dinov3_file(weights, dinov3_weights):
    model = convert_original_dinov3(dinov3_weights)
    inside = convert_original_spa3r(weights).semantic_teacher.state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in model.state_dict().items())


def test_options_override_what_is_inferred(weights):
    config = infer_spa3r_config(weights, mask_ratio=0.25, backbone_config={"camera_num_attention_heads": 4})
    assert (config.mask_ratio, config.masking_mode) == (0.25, "two_pass")
    assert config.backbone_config.camera_num_attention_heads == 4
    assert config.backbone_config.dpt_layers == (0, 1, 2, 3)


def test_arguments_are_left_alone(weights):
    before = dict(weights)
    model = convert_original_spa3r(weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert weights.keys() == before.keys() and all(weights[key] is before[key] for key in before)
    assert weights["encoder.norm.weight"].any()


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("aggregator.new.weight", torch.ones(1), r"1 left over: \['spa3r.backbone.aggregator.new.weight'\]"),
        ("extra.bias", torch.ones(1), r"1 left over: \['extra.bias'\]"),
        ("encoder.blocks.1.mlp.fc2.bias", None, r"1 missing: \['spa3r.encoder.layers.1.mlp.fc2.bias'\]"),
        ("query_embed.weight", None, "not an original Spa3R checkpoint: it has no key query_embed.weight"),
        ("aggregator.camera_token", None, "not an original VGGT checkpoint: it has no key aggregator.camera_token"),
        ("dino.norm.weight", None, r"1 missing: \['semantic_teacher.norm.weight'\]"),
        (
            "dino.rope_embed.periods",
            torch.ones(4),
            r"periods are \[1.0, 1.0, 1.0, 1.0\]; rope_theta = 100.0 .* gives",
        ),
        ("dino.blocks.1.attn.qkv.bias_mask", torch.ones(96), "blocks.1.attn.qkv.bias_mask masks more than the keys'"),
        ("encoder.norm.bias", torch.ones(31), r"encoder.norm.bias: \(31,\) instead of \(32,\)"),
        ("depth_prob.fc1.weight", torch.ones(32, 128), r"depth_head.fc1.weight: \(32, 128\) instead of \(128, 32\)"),
    ],
)
def test_what_does_not_fit_is_named(weights, key, change, message):
    changed = {name: value for name, value in weights.items() if name != key}
    if change is not None:
        changed[key] = change
    with pytest.raises(ValueError, match=message):
        convert_original_spa3r(changed)


def test_other_norm_than_the_checkpoint_has_is_refused(vggt_weights):
    settings = convert_original_vggt(vggt_weights).config.to_dict()
    with pytest.raises(ValueError, match=r"8 left over: \['global_layers.0.attention.k_norm.bias'"):
        convert_original_vggt(vggt_weights, Spa3RVGGTConfig(**(settings | {"global_qk_norm": "rms_norm"})))


def test_other_files_are_refused(dinov3_weights, weights):
    with pytest.raises(ValueError, match="not an original VGGT checkpoint: it has no key aggregator.camera_token"):
        convert_original_vggt(dinov3_weights)
    with pytest.raises(ValueError, match="not an original DINOv3 checkpoint"):
        convert_original_dinov3(weights)
    periods_lost = {key: value for key, value in dinov3_weights.items() if key != "rope_embed.periods"}
    with pytest.raises(ValueError, match="rope_embed.periods are None"):
        convert_original_dinov3(periods_lost, convert_original_dinov3(dinov3_weights).config)


def test_reference_that_differs_or_says_nothing_is_refused(vggt_weights):
    model = convert_original_vggt(vggt_weights)
    _, reference = golden("layer_norm")
    wrong = reference["output.aggregator.layer_2"].clone()
    wrong[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="aggregator.layer_2 differs by up to 1"):
        compare_with_reference(model, reference | {"output.aggregator.layer_2": wrong})
    with pytest.raises(ValueError, match=r"depth.depth has shape \(1, 4, 42, 56, 1\) instead of \(1, 3, 42, 56, 1\)"):
        depth = reference["output.depth.depth"][:, 1:]
        compare_with_reference(model, reference | {"output.depth.depth": depth})
    with pytest.raises(ValueError, match=r"it computes none of \['output.latents'\]"):
        compare_with_reference(model, {key: reference[key] for key in ("input.images", "output.latents")})
    with pytest.raises(ValueError, match="no input.images"):
        compare_with_reference(model, {"output.latents": reference["output.latents"]})


# --- the command line


class Malicious:
    def __reduce__(self):
        return os.system, ("touch malicious",)


@pytest.fixture(scope="module")
def files(weights, vggt_weights, dinov3_weights, tmp_path_factory):
    """Checkpoints in the forms that they come in, and reference numbers that are another model's."""
    path = tmp_path_factory.mktemp("checkpoints")
    torch.save({"epoch": torch.tensor(3), "state_dict": {f"model.{k}": v for k, v in weights.items()}}, path / "w.pt")
    torch.save({"model": vggt_weights}, path / "vggt.pt")
    save_file(dinov3_weights, path / "dinov3.safetensors")
    torch.save({"state_dict": weights, "hook": Malicious()}, path / "malicious.pt")
    (path / "damaged.pt").write_bytes((path / "vggt.pt").read_bytes()[:5000])
    (path / "damaged.safetensors").write_bytes((path / "dinov3.safetensors").read_bytes()[:5000])
    torch.save([torch.ones(2)], path / "list.pt")
    reference = golden("layer_norm")[1]
    save_file(reference | {"output.latents": reference["output.latents"] + 1}, path / "other_numbers.safetensors")
    return path


def test_command_line(files, tmp_path):
    """In processes of their own: one checkpoint that agrees with the reference, one that does not."""
    shared = ["--kind", "spa3r", "--checkpoint", files / "w.pt"]
    processes = [
        start_script(
            "convert_spa3r", list(map(str, [*shared, "--reference", reference, "--output_dir", tmp_path / name]))
        )
        for reference, name in ((GOLDEN["layer_norm"], "good"), (files / "other_numbers.safetensors", "bad"))
    ]
    good, bad = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 1], good + bad
    assert "agrees with the reference: asymmetric.prediction.semantic" in good
    assert "nothing is saved: " in bad and "latents differs by up to 1" in bad and "Traceback" not in bad
    assert not (tmp_path / "bad").exists()
    reference = golden("layer_norm")[1]
    compare_with_reference(Spa3RForPreTraining.from_pretrained(tmp_path / "good"), reference)
    with torch.no_grad():
        latents = Spa3RModel.from_pretrained(tmp_path / "good")(reference["input.images"]).latents
    torch.testing.assert_close(latents, reference["output.latents"], rtol=1e-4, atol=1e-5)


def test_converted_folders_load_again(files, tmp_path, capsys):
    main = load_script("convert_spa3r").main
    main(
        [
            *("--kind", "spa3r", "--checkpoint", str(GOLDEN["rms_norm"]), "--reference", str(GOLDEN["rms_norm"])),
            *("--output_dir", str(tmp_path / "spa3r")),
            *("--set", "mask_ratio=0.25", "loss_views=target", "backbone_config.initializer_range=0.01"),
        ]
    )
    report = capsys.readouterr().err
    assert "queries and keys with rms_norm" in report and '"num_latents": 8' in report
    model = Spa3RForPreTraining.from_pretrained(tmp_path / "spa3r")
    assert (model.config.mask_ratio, model.config.loss_views) == (0.25, "target")
    assert model.config.backbone_config.initializer_range == 0.01

    main(
        [
            *("--kind", "vggt", "--checkpoint", str(files / "vggt.pt"), "--output_dir", str(tmp_path / "vggt")),
            *("--reference", str(GOLDEN["layer_norm"])),
        ]
    )
    assert "queries and keys with layer_norm" in capsys.readouterr().err
    compare_with_reference(Spa3RVGGTModel.from_pretrained(tmp_path / "vggt"), golden("layer_norm")[1])
    assert AutoImageProcessor.from_pretrained(tmp_path / "vggt").size == 56

    main(["--kind", "dinov3", "--checkpoint", str(files / "dinov3.safetensors"), "--output_dir", str(tmp_path / "d")])
    assert "nothing shows that this model computes what the original does" in capsys.readouterr().err
    DINOv3ViTModel.from_pretrained(tmp_path / "d")


@pytest.mark.parametrize(
    "kind, checkpoint, more, message",
    [
        ("spa3r", "malicious.pt", [], "malicious.pt is refused; expected safetensors or a pickle of tensors alone"),
        ("vggt", "damaged.pt", [], "damaged.pt is refused"),
        ("dinov3", "damaged.safetensors", [], "damaged.safetensors is refused"),
        ("vggt", "absent.pt", [], "absent.pt"),
        ("vggt", "list.pt", [], "list.pt holds no state dict"),
        ("vggt", "dinov3.safetensors", [], "it has no key aggregator.camera_token"),
        ("vggt", "vggt.pt", ["--set", "hidden_sise=3"], "does not know ['hidden_sise']"),
        ("vggt", "vggt.pt", ["--set", "num_hidden_layers=5"], "44 missing: ['frame_layers.4.attention.k_norm.bias'"),
        ("vggt", "vggt.pt", ["--set", "hidden_size=wide"], "'hidden_size' expected int, got str (value: 'wide')"),
        ("vggt", "vggt.pt", ["--set", "hidden_size"], "--set hidden_size; expected key=value"),
    ],
)
def test_command_line_refuses(files, tmp_path, capsys, monkeypatch, kind, checkpoint, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        load_script("convert_spa3r").main(
            ["--kind", kind, "--checkpoint", str(files / checkpoint), "--output_dir", str(tmp_path / "out"), *more]
        )
    report = capsys.readouterr().err
    assert stop.value.code == 1 and "nothing is saved: " in report and message in report, report
    assert list(tmp_path.iterdir()) == []
