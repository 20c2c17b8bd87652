"""The same suite for every family of VLMs; then what does not depend on the family."""

import pytest
import torch
from tiny_models import scene_pixels, tiny_spa3r
from tiny_vlms import (
    COUNTS,
    FAMILIES,
    IMAGE,
    SAMPLES,
    SPATIAL_WIDTH,
    Sample,
    close,
    counted,
    latents,
    propagated,
    scenes,
    some_sample,
    tiny_inputs,
    tiny_vlm,
    trained,
)
from torch import nn

from spa3r_hf import Spa3AdapterConfig, get_spa3_vlm


@pytest.fixture(scope="module")
def encoder():
    return tiny_spa3r().spa3r


# --- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_changes_no_logit(family, encoder):
    vlm = tiny_vlm(family)
    inputs = tiny_inputs(family, SAMPLES)
    before = vlm(**inputs).logits
    model = get_spa3_vlm(vlm, encoder, Spa3AdapterConfig())
    with counted(model) as calls:
        assert torch.equal(model(**inputs, spatial_pixel_values=scenes()).logits, before)
    assert calls == ["backbone", "encoder"]
    assert torch.equal(model(**inputs).logits, before) and torch.equal(model.vlm(**inputs).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_the_adapter_and_nothing_else(family, encoder):
    model = trained(family, encoder).train()
    inputs = tiny_inputs(family, SAMPLES)
    assert not model.spatial_encoder.training and model.vlm.training
    model(**inputs, spatial_pixel_values=scenes(), labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("adapters.default."):
            # A shift of all keys alike changes no attention.
            assert parameter.grad.abs().max() > 1e-6 or "k_norm.bias" in name, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.parametrize("settings", [{}, {"integration": "append"}], ids=["cross_attention", "append"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batch_equals_singles(family, settings, encoder):
    model = trained(family, encoder, **settings)
    views = scenes()
    singles = [
        model(**tiny_inputs(family, [sample]), spatial_pixel_values=views[i : i + 1]).logits[0]
        for i, sample in enumerate(SAMPLES)
    ]
    for padding in ("right", "left"):
        inputs = tiny_inputs(family, SAMPLES, padding)
        logits = model(**inputs, spatial_pixel_values=views).logits
        assert logits.shape[:2] == inputs["input_ids"].shape
        for row, mask, single in zip(logits, inputs["attention_mask"], singles, strict=True):
            close(row[mask.bool()], single)
        # One scene for every sample that has pictures means the same.
        fewer = model(**inputs, spatial_pixel_values=views[[0, 2, 3]]).logits
        assert torch.equal(fewer, logits)


@pytest.mark.parametrize("settings", [{}, {"integration": "append"}], ids=["cross_attention", "append"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_sample_reads_its_own_scene(family, settings, encoder):
    model = trained(family, encoder, **settings)
    inputs, z = tiny_inputs(family, SAMPLES), latents()
    logits = model(**inputs, spatial_latents=z).logits
    without = model(**inputs).logits
    for i, count in enumerate(COUNTS):
        other = z.clone()
        other[i] = latents(seed=8)[i]
        differs = (model(**inputs, spatial_latents=other).logits - logits).abs().amax((1, 2)) > 1e-3
        assert differs.tolist() == [row == i and count > 0 for row in range(len(SAMPLES))]
        # A sample whose scene is not given passes unchanged.
        missing = model(**inputs, spatial_latents=[None if row == i else z[row] for row in range(len(z))]).logits
        seen = inputs["attention_mask"].bool()
        close(missing[i][seen[i]], without[i][seen[i]])
        close(missing[i - 1][seen[i - 1]], logits[i - 1][seen[i - 1]])


@pytest.mark.parametrize("settings", [{}, {"integration": "append"}], ids=["cross_attention", "append"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_equals_greedy_loop(family, settings, encoder):
    model = trained(family, encoder, **settings)
    views = scenes(2)
    chosen = [SAMPLES[0], SAMPLES[2]]
    inputs = tiny_inputs(family, chosen, "left")
    with counted(model) as calls:
        answers = model.generate(**inputs, spatial_pixel_values=views, max_new_tokens=5, do_sample=False)
    assert calls == ["backbone", "encoder"]
    assert torch.equal(answers[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for i, sample in enumerate(chosen):
        longer = Sample(list(sample.parts))
        for _ in range(5):
            logits = model(**tiny_inputs(family, [longer]), spatial_pixel_values=views[i : i + 1]).logits
            longer.parts.append(int(logits[0, -1].argmax()))
        assert answers[i, -5:].tolist() == longer.parts[-5:]
    # The scene has a say, and latents that were made before say the same.
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    again = model.generate(**inputs, spatial_latents=model.get_spatial_latents(views), **options)
    assert torch.equal(again.sequences, answers)
    assert (model.generate(**inputs, **options).logits[0] - again.logits[0]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"integration": "append"}], ids=["cross_attention", "append"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beams_keep_their_scenes(family, settings, encoder):
    """Each sample's beams are those that it has alone."""
    model = trained(family, encoder, **settings)
    chosen, z = [SAMPLES[0], SAMPLES[1], SAMPLES[2]], latents(3)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    inputs = tiny_inputs(family, chosen, "left")
    answers = model.generate(**inputs, spatial_latents=z, **options)
    for i, sample in enumerate(chosen):
        alone = model.generate(**tiny_inputs(family, [sample]), spatial_latents=z[i : i + 1], **options)
        assert torch.equal(answers[2 * i : 2 * i + 2, -4:], alone[:, -4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_placeholders_that_differ(family, encoder):
    model = trained(family, encoder)
    inputs = tiny_inputs(family, [SAMPLES[0]])
    more = torch.cat((inputs["input_ids"], torch.tensor([[IMAGE]])), dim=1)
    aligned = {
        name: torch.cat((value, value[:, -1:]), 1) for name, value in inputs.items() if value.shape == more.shape
    }
    with pytest.raises(
        ValueError, match=r"the images make \d+ visual tokens, but input_ids hold \d+ image placeholders"
    ):
        model(
            **{**inputs, **aligned, "input_ids": more, "attention_mask": torch.ones_like(more)},
            spatial_latents=latents(1),
        )
    without = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="computed no visual tokens; expected pixel_values"):
        model(**without, spatial_latents=latents(1))
    # An error leaves nothing behind.
    assert "get_image_features" not in vars(model.vlm.base_model)
    assert not model.vlm._forward_pre_hooks


# --- which scene is read


@torch.no_grad()
def test_several_scenes_in_a_sample(encoder):
    """Each picture reads its own scene; a scene may be shared by samples, and a picture have none."""
    model = trained("qwen2_5_vl", encoder)
    inputs, z = tiny_inputs("qwen2_5_vl", SAMPLES), latents(3)
    seen = {}

    def remember(module, args, output):
        seen["tokens"], seen["fused"] = args[0], output

    def fused_tokens(**given):
        features = {}
        compute = model.vlm.base_model.get_image_features

        def spy(*args, **kwargs):
            features["output"] = compute(*args, **kwargs)
            features["before"] = torch.cat(features["output"].pooler_output)
            return features["output"]

        model.vlm.base_model.get_image_features = spy
        model(**inputs, **given)
        del model.vlm.base_model.get_image_features
        return features["before"], features["output"].pooler_output

    # Pictures of 2, 0, 1 and 3, with 4 and 6 tokens in turn.
    before, fused = fused_tokens(spatial_latents=z, spatial_scene_ids=[2, 0, 0, -1, 1, 0])
    lengths = [4, 6, 4, 4, 6, 4]
    assert [len(tokens) for tokens in fused] == lengths
    for tokens, scene, result in zip(before.split(lengths), [2, 0, 0, -1, 1, 0], fused, strict=True):
        close(result, tokens if scene < 0 else model.adapter(tokens[None], z[scene : scene + 1])[0])
    # The same, said for every position.
    ids = torch.full_like(inputs["input_ids"], -1)
    images = inputs["input_ids"] == IMAGE
    ids[images] = torch.tensor([2, 0, 0, -1, 1, 0]).repeat_interleave(torch.tensor(lengths))
    again = fused_tokens(spatial_latents=z, spatial_scene_ids=ids)[1]
    assert all(torch.equal(left, right) for left, right in zip(again, fused, strict=True))
    # A default that is said means the same as none.
    default = model(**inputs, spatial_latents=z).logits
    assert torch.equal(model(**inputs, spatial_latents=z, spatial_scene_ids=[0, 0, 1, 2, 2, 2]).logits, default)


@torch.no_grad()
def test_scenes_of_different_sizes(encoder):
    """Lists of scenes with different views, or tokens, equal the scenes one by one."""
    for settings in ({}, {"integration": "append"}, {"spatial_features": "backbone"}):
        model = trained("internvl", encoder, **settings)
        inputs = tiny_inputs("internvl", SAMPLES)
        views = [scene_pixels(1, count, 28, width)[0] for count, width in ((1, 28), (2, 28), (3, 28), (2, 42))]
        views[1] = None
        logits = model(**inputs, spatial_pixel_values=views).logits
        for i, sample in enumerate(SAMPLES):
            given = {} if views[i] is None else {"spatial_pixel_values": views[i][None]}
            alone = model(**tiny_inputs("internvl", [sample]), **given).logits[0]
            close(logits[i, : len(alone)], alone)
        if not settings:
            pieces = [latents(1, tokens)[0] for tokens in (1, 5, 3, 4)]
            logits = model(**inputs, spatial_latents=pieces).logits
            alone = model(**tiny_inputs("internvl", SAMPLES[3:]), spatial_latents=pieces[3][None]).logits[0]
            close(logits[3, : len(alone)], alone)


@torch.no_grad()
def test_backbone_features_are_those_of_all_views(encoder):
    model = trained("qwen2_5_vl", encoder, spatial_features="backbone")
    views = scenes(2, views=3)
    config = encoder.config.backbone_config
    expected = encoder.backbone(views).last_hidden_state[:, :, config.num_prefix_tokens :]
    features = model.get_spatial_latents(views)
    assert features.shape == (2, 3 * 4, config.feature_size) and torch.equal(features, expected.flatten(1, 2))
    assert model.adapter_config.spatial_hidden_size == config.feature_size
    inputs = tiny_inputs("qwen2_5_vl", [SAMPLES[0], SAMPLES[2]])
    with counted(model) as calls:
        logits = model(**inputs, spatial_pixel_values=views).logits
    assert calls == ["backbone"]
    alone = trained("qwen2_5_vl", encoder.backbone, spatial_features="backbone")
    assert torch.equal(alone(**inputs, spatial_pixel_values=views).logits, logits)
    with pytest.raises(ValueError, match="has no latents; expected a Spa3RModel, or spatial_features = 'backbone'"):
        get_spa3_vlm(tiny_vlm("qwen2_5_vl"), encoder.backbone, Spa3AdapterConfig())


@torch.no_grad()
def test_deepstack_features_are_left_alone(encoder):
    model = trained("qwen3_vl", encoder)
    inputs, seen = tiny_inputs("qwen3_vl", SAMPLES), []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["deepstack_visual_embeds"][0]), with_kwargs=True
    )
    model(**inputs, spatial_latents=latents())
    model(**inputs)
    assert len(seen) == 2 and torch.equal(*seen)
    # Appended tokens have none.
    appending = trained("qwen3_vl", encoder, integration="append")
    appending.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["deepstack_visual_embeds"][0]), with_kwargs=True
    )
    appending(**inputs, spatial_latents=latents())
    rows = seen[2].abs().sum(1) > 0
    assert torch.equal(seen[2][rows], seen[0]) and int((~rows).sum()) == 3 * 5
    hook.remove()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"spatial_latents": latents(4, width=16)}, r"spatial_latents are 16 wide; expected 32, .* reads latents"),
        ({"spatial_latents": latents()[0]}, r"a scene of shape \(32,\); expected \(tokens, 32\) for each scene"),
        ({"spatial_latents": latents(4, tokens=0)}, r"shape \(0, 32\)"),
        ({"spatial_latents": latents(2)}, "2 scenes are given for 4 samples, 3 of them with images; expected one"),
        ({"spatial_latents": latents(5)}, "5 scenes are given for 4 samples"),
        ({"spatial_latents": latents(), "spatial_pixel_values": scenes()}, "expected one of them"),
        ({"spatial_pixel_values": scenes()[0]}, r"shape \(3, 28, 28\); expected \(views, 3, height, width\)"),
        ({"spatial_pixel_values": scene_pixels(4, 1, 28, 30)}, "30"),
        ({"spatial_pixel_values": scenes() * 255}, "float32 from .* to 255; expected floating point numbers in"),
        ({"spatial_pixel_values": (scenes() * 255).byte()}, "scene 0 of torch.uint8; expected a tensor of floating"),
        ({"spatial_pixel_values": list(scenes() * torch.nan)}, "scene 0, view 0 of pixel_values has NaN"),
        ({"spatial_latents": [*latents(3), latents()[0] * torch.nan]}, "hold scene 3 with NaN or infinite numbers"),
        ({"spatial_latents": latents() / 0}, "hold scene 0 with NaN or infinite numbers"),
        ({"spatial_latents": latents().numpy()}, "hold scene 0 as a ndarray; expected a tensor"),
        ({"spatial_latents": []}, "0 scenes are given for 4 samples"),
        ({"spatial_latents": latents(), "spatial_scene_ids": [0, 1]}, "2 spatial_scene_ids are given for 6 images"),
        ({"spatial_latents": latents(), "spatial_scene_ids": [0, 1, 2, 3, 4, 0]}, "range from 0 to 4; expected -1"),
        ({"spatial_latents": latents(), "spatial_scene_ids": [0, 1, 2, 3, -2, 0]}, "range from -2 to 3"),
        ({"spatial_latents": latents(), "spatial_scene_ids": torch.zeros(6)}, "torch.float32; expected whole numbers"),
        ({"spatial_latents": latents(), "spatial_scene_ids": [[0, 1, 2, 3]]}, r"shape \(1, 4\); expected \(images,\)"),
        ({"spatial_latents": latents(), "pixel_values_videos": torch.zeros(1)}, "frames of a video as images"),
        ({"spatial_latents": latents(), "input_ids": None}, "input_ids are not given"),
    ],
)
def test_wrong_inputs(given, message, encoder):
    model = trained("qwen2_5_vl", encoder)
    inputs = tiny_inputs("qwen2_5_vl", SAMPLES) | given
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=1)


def test_misspelt_inputs_are_not_passed_over(encoder):
    """The VLMs of the library take any keyword."""
    model, inputs = trained("qwen2_5_vl", encoder), tiny_inputs("qwen2_5_vl", SAMPLES)
    for call in (model, model.generate):
        with pytest.raises(
            TypeError, match=r"\['spatial_latent'\] are given; expected spatial_pixel_values, spatial_lat"
        ):
            call(**inputs, spatial_latent=latents())
    with pytest.raises(ValueError, match="expected floating point numbers in"):
        model.get_spatial_latents((scenes() * 255).byte())


def test_missing_encoder_and_positions(encoder, caplog):
    model = trained("qwen2_5_vl", None, spatial_hidden_size=SPATIAL_WIDTH)
    inputs = tiny_inputs("qwen2_5_vl", SAMPLES)
    model(**inputs, spatial_latents=latents())
    with pytest.raises(ValueError, match="no spatial encoder; expected spatial_latents"):
        model(**inputs, spatial_pixel_values=scenes())
    with pytest.raises(ValueError, match="spatial_hidden_size are .* None.*; expected numbers"):
        get_spa3_vlm(tiny_vlm("qwen2_5_vl"), None, Spa3AdapterConfig())
    with pytest.raises(ValueError, match="position_ids are given; expected none with integration = 'append'"):
        appending = trained("internvl", encoder, integration="append")
        appending(
            **tiny_inputs("internvl", SAMPLES[:1]), position_ids=torch.arange(18)[None], spatial_latents=latents(1)
        )
    with caplog.at_level("WARNING"), propagated("transformers"):
        model(**{name: value for name, value in inputs.items() if name != "mm_token_type_ids"})
    assert "image_grid_thw are given without mm_token_type_ids" in caplog.text


def test_batches_without_pictures(encoder):
    """Nothing is computed for them, and every process of a distributed training has gradients all the same."""
    texts = [some_sample(0, 1), some_sample(0, 2)]
    inputs = tiny_inputs("qwen2_5_vl", texts)
    for settings in ({}, {"integration": "append"}):
        model = trained("qwen2_5_vl", encoder, **settings).train()
        with counted(model) as calls:
            output = model(**inputs, labels=inputs["input_ids"], spatial_pixel_values=scenes(2))
        assert not calls
        assert torch.equal(output.loss, model.vlm(**inputs, labels=inputs["input_ids"]).loss)
        output.loss.backward()
        assert all(not parameter.grad.any() for parameter in model.adapter.parameters())
        assert model.eval()(**inputs, labels=inputs["input_ids"]).loss.grad_fn is None


@torch.no_grad()
def test_appended_tokens_follow_the_scene(encoder):
    """The longer sequence, written out by hand, gives the same logits."""
    model = trained("qwen2_5_vl", encoder, integration="append")
    sample, z = some_sample(2, 0), latents(2)
    inputs = tiny_inputs("qwen2_5_vl", [sample])
    ids = inputs["input_ids"][0].tolist()
    ends = [i + 1 for i, token in enumerate(ids) if token == IMAGE and ids[i + 1] != IMAGE]
    compute = model.vlm.base_model.get_image_features
    pieces = compute(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True).pooler_output
    tokens = torch.cat([torch.cat((piece, model.adapter(z[i]))) for i, piece in enumerate(pieces)])
    longer = ids[: ends[0]] + [IMAGE] * 5 + ids[ends[0] : ends[1]] + [IMAGE] * 5 + ids[ends[1] :]
    embeds = model.get_input_embeddings()(torch.tensor([longer]))
    embeds[0, torch.tensor(longer) == IMAGE] = tokens
    types = torch.tensor([[int(token == IMAGE) for token in longer]], dtype=torch.int)
    for end in (ends[0], ends[1] + 5):
        types[0, end : end + 5] = 0
    positions, _ = model.vlm.model.get_rope_index(torch.tensor([longer]), types, inputs["image_grid_thw"])
    expected = model.vlm(inputs_embeds=embeds, position_ids=positions).logits[0]
    kept = [i for i in range(len(longer)) if not (ends[0] <= i < ends[0] + 5 or ends[1] + 5 <= i < ends[1] + 10)]
    output = model(**inputs, spatial_latents=z, spatial_scene_ids=[0, 1])
    close(output.logits[0], expected[kept])
    few = model(**inputs, spatial_latents=z, spatial_scene_ids=[0, 1], logits_to_keep=2, return_dict=False)[0]
    close(few[0], expected[kept][-2:])
    # Scenes are never to be predicted.
    labels = torch.where(torch.arange(len(ids)) >= len(ids) - 3, inputs["input_ids"], -100)
    loss = model(**inputs, spatial_latents=z, spatial_scene_ids=[0, 1], labels=labels).loss
    close(loss, torch.nn.functional.cross_entropy(expected[kept][-4:-1], inputs["input_ids"][0, -3:]))
    answers = model.generate(**inputs, spatial_latents=z, spatial_scene_ids=[0, 1], max_length=len(ids) + 3)
    assert answers.shape == (1, len(ids) + 3)


# --- what can be wrapped


def test_models_that_cannot_be_wrapped(encoder):
    from peft import LoraConfig, get_peft_model
    from transformers import BlipConfig, BlipForConditionalGeneration, MllamaConfig, MllamaForConditionalGeneration

    with torch.device("meta"):
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        mllama = MllamaForConditionalGeneration(
            MllamaConfig(text_config={**small, "vocab_size": 100, "pad_token_id": 0, "cross_attention_layers": [0]})
        )
        blip = BlipForConditionalGeneration(BlipConfig(text_config=small, vision_config=small))
    with pytest.raises(ValueError, match="a MllamaForConditionalGeneration: it has no get_image_features, where"):
        get_spa3_vlm(mllama, encoder, Spa3AdapterConfig())
    with pytest.raises(ValueError, match="BlipForConditionalGeneration: .*; its configuration has no image_token_id"):
        get_spa3_vlm(blip, encoder, Spa3AdapterConfig())
    with pytest.raises(TypeError, match="the VLM is a Linear; expected a model of AutoModelForImageTextToText"):
        get_spa3_vlm(nn.Linear(1, 1), encoder, Spa3AdapterConfig())
    with pytest.raises(TypeError, match="the spatial encoder is a Linear; expected a Spa3RModel"):
        get_spa3_vlm(tiny_vlm("internvl"), nn.Linear(1, 1), Spa3AdapterConfig())
    peft_model = get_peft_model(tiny_vlm("internvl"), LoraConfig(target_modules=["q_proj"]))
    for vlm in (peft_model, peft_model.get_base_model()):
        with pytest.raises(ValueError, match=r"already carries PEFT adapters; .*Spa3AdapterConfig\(lora_config="):
            get_spa3_vlm(vlm, encoder, Spa3AdapterConfig())


def test_pre_training_model_is_taken_for_its_encoder():
    whole = tiny_spa3r()
    assert get_spa3_vlm(tiny_vlm("internvl"), whole, Spa3AdapterConfig()).spatial_encoder is whole.spa3r


@torch.no_grad()
def test_loop_with_a_cache(encoder):
    """A user's own loop: the whole prompt, then one token at a time, whatever inputs are given again."""
    model = trained("internvl", encoder)
    inputs, z = tiny_inputs("internvl", SAMPLES[:1]), latents(1)
    expected = model.generate(**inputs, spatial_latents=z, max_new_tokens=4, do_sample=False)
    output = model(**inputs, spatial_latents=z, use_cache=True)
    mask, answers = inputs["attention_mask"], inputs["input_ids"]
    for _ in range(4):
        token = output.logits[:, -1:].argmax(-1)
        answers, mask = torch.cat((answers, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
        output = model(token, mask, past_key_values=output.past_key_values, spatial_latents=z, use_cache=True)
    assert torch.equal(answers, expected)
