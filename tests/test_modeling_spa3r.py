import copy
import json

import pytest
import torch
from tiny_models import GOLDEN, golden, scene_pixels, some_cameras, tiny_spa3r, tiny_spa3r_config
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining, Spa3RImageProcessor, Spa3RModel
from spa3r_hf.camera_spa3r import relative_to_first_view
from spa3r_hf.conversion_spa3r import compare_with_reference, convert_original_spa3r, reference_outputs
from spa3r_hf.modeling_spa3r import draw_view_mask, num_context_views


PREDICTIONS = ("geometric_prediction", "semantic_prediction", "depth_prediction")
FROZEN = ("spa3r.backbone.", "semantic_teacher.")
MASK = torch.tensor([[False, True, False, True], [False, False, True, True]])


def close(left: Tensor, right: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def model() -> Spa3RForPreTraining:
    return tiny_spa3r()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return scene_pixels()


@pytest.fixture(scope="module")
def output(model, pixels):
    with torch.no_grad():
        return model(pixels, view_mask=MASK)


# --- the numbers of the release


@pytest.mark.parametrize("qk_norm", GOLDEN)
def test_every_golden_output_is_reproduced(qk_norm):
    weights, reference = golden(qk_norm)
    model = convert_original_spa3r(weights)
    assert model.config.backbone_config.global_qk_norm == qk_norm
    names = {key.removeprefix("output.") for key in reference if key.startswith("output.")}
    outputs = reference_outputs(model, reference["input.images"], reference["input.view_mask"])
    assert set(outputs) == names
    for name in names:
        expected = reference[f"output.{name}"].reshape(outputs[name].shape)
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert set(compare_with_reference(model, reference)) == names


def test_golden_with_explicit_config_and_under_a_prefix():
    weights, _ = golden("layer_norm")
    inferred = convert_original_spa3r(weights)
    config = Spa3RConfig(
        backbone_config={
            **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64},
            **{"image_size": 56, "patch_embedding_layers": 2, "camera_num_attention_heads": 2},
            **{"dpt_hidden_size": 16, "dpt_out_channels": [8, 16, 16, 16], "dpt_layers": [0, 1, 2, 3]},
        },
        semantic_config={
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
            **{"num_register_tokens": 4},
        },
        **{"hidden_size": 32, "num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 128, "num_latents": 8, "masking_mode": "two_pass"},
    )
    assert inferred.config.to_dict() == {**config.to_dict(), "dtype": inferred.config.to_dict()["dtype"]}
    prefixed = {f"model.{key}": value for key, value in weights.items()}
    for model in (convert_original_spa3r(weights, config), convert_original_spa3r(prefixed)):
        for name, value in inferred.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


# --- invariants


@pytest.mark.parametrize("mode", ["asymmetric", "two_pass"])
def test_batch_of_two_is_two_of_one(pixels, mode):
    model = tiny_spa3r(masking_mode=mode)
    with torch.no_grad():
        both = model(pixels, view_mask=MASK)
        for i in range(2):
            one = model(pixels[i : i + 1], view_mask=MASK[i : i + 1])
            for key in ("latents", "extrinsics", "geometric_target", *PREDICTIONS):
                close(one[key][0], both[key][i])


def test_the_loss_comes_first(model, pixels, output):
    with torch.no_grad():
        assert next(iter(output)) == "loss"
        torch.testing.assert_close(model(pixels, view_mask=MASK, return_dict=False)[0], output.loss)


def test_permuted_views_permute_predictions(model, pixels, output):
    order = [0, 3, 2, 1]
    with torch.no_grad():
        permuted = model(pixels[:, order], view_mask=MASK[:, order])
    close(permuted.latents, output.latents)
    for key in (*PREDICTIONS, "semantic_target", "extrinsics"):
        close(permuted[key], output[key][:, order])
    close(permuted.loss, output.loss)


@pytest.mark.parametrize("mode", ["asymmetric", "two_pass"])
def test_latents_do_not_depend_on_target_pixels(pixels, mode):
    model = tiny_spa3r(masking_mode=mode)
    other = torch.where(MASK[..., None, None, None], 1 - pixels, pixels)
    with torch.no_grad():
        first, second = model(pixels, view_mask=MASK), model(other, view_mask=MASK)
        context = torch.stack([scene[~mask] for scene, mask in zip(pixels, MASK, strict=True)])
        alone = model.spa3r(context).latents
    assert torch.equal(first.latents, second.latents)
    assert not torch.allclose(first.geometric_target, second.geometric_target)
    close(first.latents, alone)


def test_eager_attention_agrees_with_sdpa(model, pixels, output):
    assert model.config._attn_implementation == "sdpa"
    other = tiny_spa3r()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation("eager")
    assert other.spa3r.backbone.config._attn_implementation == "eager"
    with torch.no_grad():
        result = other(pixels, view_mask=MASK)
    for key in ("latents", "geometric_target", *PREDICTIONS):
        close(result[key], output[key], 1e-4)


def test_attention_is_never_given_a_mask(model, pixels, monkeypatch):
    calls = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recording(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, query.shape[2], key.shape[2]))
        return original(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recording)
    model(pixels, view_mask=MASK)
    assert calls and all(mask is None for mask, _, _ in calls)
    view_tokens = 3 + 6
    sizes = [(queries, keys) for _, queries, keys in calls]
    layers = model.config.backbone_config.num_hidden_layers
    assert sizes.count((2 * view_tokens, 2 * view_tokens)) == layers  # context sees context
    assert sizes.count((2 * view_tokens, 4 * view_tokens)) == layers  # target sees all


def test_world_frame_of_given_cameras_does_not_matter(model, pixels):
    extrinsics, intrinsics = some_cameras()
    other_world = some_cameras(2, 1, seed=1)[0]
    moved = extrinsics[..., :3] @ other_world[..., :3]
    shift = extrinsics[..., :3] @ other_world[..., 3:] + extrinsics[..., 3:]
    moved = torch.cat((moved, shift), dim=-1)
    with torch.no_grad():
        first = model(pixels, MASK, extrinsics, intrinsics)
        second = model(pixels, MASK, moved, intrinsics)
        single = model(pixels[1:], MASK[1:], extrinsics[1:], intrinsics[1:])
        bottom = torch.tensor([0.0, 0, 0, 1]).expand(2, 4, 1, 4)
        homogeneous = model(pixels, MASK, torch.cat((extrinsics, bottom), dim=2), intrinsics)
    close(first.extrinsics[:, 0], torch.eye(4)[:3].expand(2, 3, 4))
    for key in ("extrinsics", *PREDICTIONS, "loss"):
        close(second[key], first[key], 2e-4)
        close(homogeneous[key], first[key])
        if key != "loss":
            close(single[key][0], first[key][1])
    assert torch.equal(first.latents, second.latents)


def test_given_cameras_replace_the_camera_head(model, pixels, monkeypatch, output):
    def fail(*args):
        raise AssertionError("the camera head ran")

    monkeypatch.setattr(model.spa3r.backbone.camera_head, "forward", fail)
    with torch.no_grad():
        result = model(pixels, MASK, output.extrinsics, output.intrinsics)
        decoded = model.decode(
            output.latents, relative_to_first_view(output.extrinsics), output.intrinsics, image_size=(28, 42)
        )
    for key in PREDICTIONS:
        close(result[key], decoded[key], 1e-4)


def test_decode_answers_as_the_forward_does(model, output):
    with torch.no_grad():
        decoded = model.decode(output.latents, output.extrinsics, output.intrinsics, (28, 42))
        one = model.decode(output.latents, output.extrinsics[:, 2:3], output.intrinsics[:, 2:3], (28, 42))
    for key in (*PREDICTIONS, "decoder_tokens"):
        close(decoded[key], output[key])
        close(one[key][:, 0], output[key][:, 2])


# --- losses, targets, options


@pytest.mark.parametrize("loss_views", ["all", "target"])
def test_losses_by_their_definition(pixels, loss_views):
    model = tiny_spa3r(loss_views=loss_views)
    with torch.no_grad():
        result = model(pixels, view_mask=MASK)
    views = MASK if loss_views == "target" else torch.ones_like(MASK)
    for kind in ("geometric", "semantic"):
        predicted, target = result[f"{kind}_prediction"][views], result[f"{kind}_target"][views]
        difference = (predicted - target).abs()
        smooth_l1 = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
        unit = [x / x.norm(dim=-1, keepdim=True) for x in (predicted, target)]
        close(result.losses[f"{kind}_l1"], smooth_l1)
        close(result.losses[f"{kind}_cosine"], (1 - (unit[0] * unit[1]).sum(-1)).mean())
    depth = F.smooth_l1_loss(result.depth_prediction[views], result.depth_target[views])
    close(result.losses["depth_probe"], depth)
    close(result.loss, sum(result.losses.values()))


def test_camera_conditionings_differ_and_depend_on_the_camera(pixels):
    extrinsics, intrinsics = some_cameras()
    predictions = {}
    for conditioning in ("prope", "plucker"):
        model = tiny_spa3r(camera_conditioning=conditioning)
        with torch.no_grad():
            first = model(pixels, MASK, extrinsics, intrinsics).geometric_prediction
            turned = model(pixels, MASK, extrinsics.flip(1), intrinsics).geometric_prediction
            batch = model(pixels[:1], MASK[:1], extrinsics[:1], intrinsics[:1]).geometric_prediction
        assert not torch.allclose(first, turned, atol=1e-3)
        close(batch[0], first[0])
        predictions[conditioning] = first
    assert not torch.allclose(predictions["prope"], predictions["plucker"], atol=1e-3)


@pytest.mark.parametrize("kind, other", [("geometric", "semantic"), ("semantic", "geometric")])
def test_one_kind_of_target(pixels, kind, other):
    model = tiny_spa3r(targets=[kind])
    result = model(pixels, view_mask=MASK)
    assert (model.semantic_teacher is None) == (kind == "geometric")
    assert set(result.losses) == {f"{kind}_l1", f"{kind}_cosine", "depth_probe"}
    assert getattr(result, f"{other}_prediction") is None and getattr(result, f"{other}_target") is None
    result.loss.backward()
    assert result.loss.isfinite()
    if kind == "geometric":
        with pytest.raises(ValueError, match=r"targets = \['geometric'\]; expected 'semantic' among them"):
            model.semantic_features(pixels)


def test_without_probe_the_depth_head_does_not_run(pixels):
    for probe, runs in ((True, 1), (False, 0)):
        model, calls = tiny_spa3r(depth_probe=probe), []
        model.spa3r.backbone.depth_head.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        result = model(pixels, view_mask=MASK)
        assert len(calls) == runs
        assert (result.depth_prediction is not None) == probe and ("depth_probe" in result.losses) == probe


def test_the_probe_teaches_nothing_but_itself(pixels):
    model = tiny_spa3r()
    model(pixels, view_mask=MASK).losses["depth_probe"].backward()
    taught = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert taught == {"depth_head"}


def test_view_mask_is_respected_or_drawn(model, pixels, output):
    assert torch.equal(output.view_mask, MASK)
    torch.manual_seed(3)
    drawn = model(pixels).view_mask
    torch.manual_seed(3)
    assert torch.equal(drawn, draw_view_mask(2, 4, model.config.mask_ratio))
    close(model(pixels, view_mask=drawn).latents, model(pixels, view_mask=drawn.clone()).latents)


def test_draw_view_mask_is_fair_and_seeded():
    draws = draw_view_mask(6000, 5, 0.5, generator=torch.Generator().manual_seed(0))
    assert not draws[:, 0].any() and draws.dtype == torch.bool
    assert (draws.sum(1) == 3).all()
    share = draws[:, 1:].float().mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 6000) ** 0.5
    state = torch.random.get_rng_state()
    again = draw_view_mask(6000, 5, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(draws, draw_view_mask(6000, 5, 0.5, generator=torch.Generator().manual_seed(1)))
    assert [num_context_views(4, ratio) for ratio in (0.25, 0.5, 0.75)] == [3, 2, 1]


# --- training


def test_frozen_parts_stay_and_all_others_move(pixels):
    model = tiny_spa3r().train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in dict(model.named_parameters()) if name.startswith(FROZEN)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        model(pixels, view_mask=MASK).loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in frozen), name


def assert_frozen(model) -> None:
    assert model.training and model.encoder.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


def test_frozen_parts_are_frozen_however_the_model_came_to_be(tmp_path):
    model = tiny_spa3r()
    model.save_pretrained(tmp_path)
    for candidate in (model, Spa3RForPreTraining.from_pretrained(tmp_path), Spa3RForPreTraining(model.config)):
        assert not any(parameter.requires_grad for parameter in candidate.semantic_teacher.parameters())
        assert not any(parameter.requires_grad for parameter in candidate.spa3r.backbone.parameters())
        candidate.train()
        assert_frozen(candidate.spa3r)
        assert candidate.decoder.training and not candidate.semantic_teacher.training
    assert_frozen(Spa3RModel.from_pretrained(tmp_path).train())
    model.requires_grad_(True).train()
    assert_frozen(model.spa3r)


def test_gradient_checkpointing_changes_nothing(pixels):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_spa3r().train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # the name that transformers 5.17 knows
            assert model.decoder.layers[0].gradient_checkpointing
        loss = model(pixels, view_mask=MASK).loss
        loss.backward()
        gradients.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, plain), (loss_again, checkpointed) = gradients
    assert torch.equal(loss, loss_again) and plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        close(gradient, checkpointed[name], 1e-6)


@pytest.mark.parametrize("conditioning", ["prope", "plucker"])
def test_autocast_to_bfloat16(pixels, conditioning):
    model = tiny_spa3r(camera_conditioning=conditioning).train()
    exact = model(pixels, view_mask=MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(pixels, view_mask=MASK)
    result.loss.backward()
    assert result.loss.dtype == torch.float32 and result.extrinsics.dtype == torch.float32
    for name, loss in result.losses.items():
        assert abs(loss / exact.losses[name] - 1) < 0.05, name
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


def test_encoder_compiles_to_one_graph(pixels):
    model = tiny_spa3r().spa3r
    with torch.no_grad():
        expected = model(pixels).latents
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(pixels).latents, expected)
        assert torch._dynamo.explain(model)(pixels).graph_break_count == 0


def test_hidden_states_and_attentions_are_the_encoders(pixels):
    model = tiny_spa3r(attn_implementation="eager").eval()
    result = model(pixels, view_mask=MASK, output_hidden_states=True, output_attentions=True)
    prefix, patches = 2 + 5, 2 * 6
    assert [tuple(state.shape) for state in result.hidden_states] == [
        *[(2, prefix + patches, 32)] * 2,
        (2, 5, 32),
    ]
    assert [tuple(weights.shape[-2:]) for weights in result.attentions] == [(19, 19), (5, 19)]


# --- bad input

NAN_PIXELS = scene_pixels()
NAN_PIXELS[1, 2, 0, 3, 4] = torch.nan


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pixel_values": scene_pixels(height=30)}, r"30 x 42 pixels; expected sides that are multiples of 14"),
        ({"pixel_values": scene_pixels()[0]}, r"shape \(4, 3, 28, 42\); expected \(scenes, views, 3, height, width\)"),
        ({"pixel_values": scene_pixels()[:, :, :1]}, r"shape \(2, 4, 1, 28, 42\)"),
        ({"pixel_values": NAN_PIXELS}, r"scene 1, view 2 of pixel_values has NaN or infinite"),
        ({"view_mask": MASK[:, :3]}, r"torch.bool of shape \(2, 3\); expected torch.bool of shape \(2, 4\)"),
        ({"view_mask": MASK.int()}, r"torch.int32 of shape \(2, 4\); expected torch.bool"),
        ({"view_mask": ~MASK}, r"makes the first view of a scene a target: \[\[True, False"),
        (
            {"view_mask": torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool()},
            r"\[2, 3\] context views; expected the same",
        ),
        ({"extrinsics": some_cameras()[0]}, "only one of extrinsics and intrinsics"),
        ({"intrinsics": some_cameras()[1]}, "only one of extrinsics and intrinsics"),
    ],
)
def test_bad_input_is_named(model, pixels, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**({"pixel_values": pixels, "view_mask": MASK} | arguments))


def test_bad_cameras_are_named(model, pixels, output):
    extrinsics, intrinsics = some_cameras()
    skewed, endless, flat = extrinsics.clone(), intrinsics.clone(), intrinsics.clone()
    skewed[1, 3, 0, 0] += 1
    endless[0, 2, 0, 0] = torch.inf
    flat[0, 1, 1, 1] = 0
    cases = [
        ((extrinsics[:, :3], intrinsics), r"extrinsics have shape \(2, 3, 3, 4\); expected \(2, 4, 3, 4\)"),
        ((extrinsics, intrinsics[0]), r"intrinsics have shape \(4, 3, 3\); expected \(2, 4, 3, 3\)"),
        ((skewed, intrinsics), "scene 1, view 3 has a rotation that is not orthonormal"),
        ((-extrinsics, intrinsics), "scene 0, view 0 has a rotation that is not orthonormal with determinant 1"),
        ((extrinsics, endless), "scene 0, view 2 has numbers that are not finite"),
        ((extrinsics, flat), "scene 0, view 1 has a focal length that is not above 0"),
    ]
    for cameras, message in cases:
        with pytest.raises(ValueError, match=message):
            model(pixels, MASK, *cameras)
        with pytest.raises(ValueError, match="expected"):
            model.decode(output.latents, *cameras, (28, 42))
    with pytest.raises(ValueError, match=r"latents have shape \(2, 4, 32\); expected \(scenes, 5, 32\)"):
        model.decode(output.latents[:, 1:], extrinsics, intrinsics, (28, 42))
    with pytest.raises(ValueError, match=r"image_size = \(28, 40\)"):
        model.decode(output.latents, extrinsics, intrinsics, (28, 40))


def test_mask_ratios_that_leave_nothing_are_named(model, pixels):
    with pytest.raises(ValueError, match="2 views at mask_ratio = 0.9 leave 0 context views"):
        draw_view_mask(1, 2, 0.9)
    with pytest.raises(ValueError, match="1 views at mask_ratio = 0.5 leave 0 context views"):
        model(pixels[:, :1])
    with pytest.raises(ValueError, match="4 views at mask_ratio = 0.0 leave 4 context views"):
        draw_view_mask(1, 4, 0.0)


# --- files


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("spa3r")
    model.save_pretrained(path)
    Spa3RImageProcessor(size=42).save_pretrained(path)
    return path


def test_saved_model_computes_the_same(folder, pixels, output):
    assert [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".safetensors")] == [
        "model.safetensors"
    ]
    loaded, info = Spa3RForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    with torch.no_grad():
        result = loaded(pixels, view_mask=MASK)
    for key in ("latents", "loss", "semantic_target", *PREDICTIONS):
        assert torch.equal(result[key], output[key]), key


def test_encoder_loads_from_a_pre_training_checkpoint(folder, model, pixels, tmp_path):
    encoder, info = Spa3RModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(encoder(pixels).latents, model.spa3r(pixels).latents)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(Spa3RModel.from_pretrained(tmp_path)(pixels).latents, encoder(pixels).latents)
    whole, info = Spa3RForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert all(not name.startswith("spa3r.") for name in info["missing_keys"])
    assert torch.equal(whole.spa3r(pixels).latents, encoder(pixels).latents)


def test_auto_classes(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), Spa3RConfig)
    assert type(AutoModel.from_pretrained(folder)) is Spa3RModel
    assert type(AutoModelForPreTraining.from_pretrained(folder)) is Spa3RForPreTraining
    assert isinstance(AutoImageProcessor.from_pretrained(folder), Spa3RImageProcessor)


def test_load_in_bfloat16(folder, pixels, output):
    model = Spa3RForPreTraining.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        result = model(pixels, view_mask=MASK)
    assert result.loss.isfinite()
    assert F.cosine_similarity(result.latents.float(), output.latents, dim=-1).min() > 0.99


def test_saving_leaves_the_caller_s_config_alone_but_for_what_the_library_writes(model, tmp_path):
    settings = copy.deepcopy(tiny_spa3r_config().to_dict())
    Spa3RForPreTraining(Spa3RConfig(**settings)).save_pretrained(tmp_path)
    assert settings == tiny_spa3r_config().to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_spa3r.Spa3RConfig",
        "AutoModel": "modeling_spa3r.Spa3RModel",
        "AutoModelForPreTraining": "modeling_spa3r.Spa3RForPreTraining",
    }
