import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_spa3r
from tiny_processors import OPTIONS, Processors, chat_template, tiny_tokenizer, tiny_vlm_folder
from tiny_vlms import BOS, END, EOS, FAMILIES, IMAGE, PAD, START, tiny_vlm
from transformers import AutoProcessor, Gemma3Processor, SmolVLMProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, get_spa3_vlm
from spa3r_hf.errors import BadSampleError
from spa3r_hf.media_spa3_vlm import FrameSampling, find_frames
from spa3r_hf.processing_spa3_vlm import Spa3VLMProcessor


USER, ASSISTANT, COLON, FAKE, GLOBAL = 4, 5, 6, 94, 95
# A picture of 84 x 60 pixels is 42 x 28 to the encoder and 40 x 28 to Qwen's patches of 2, merged by 2.
NUM_TOKENS = {**dict.fromkeys(FAMILIES, 4), **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), 70)}


def picture(seed: int = 0, width: int = 84, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def view(seed: int = 0, **entry) -> dict:
    return {"type": "image", "image": picture(seed), **entry}


def ask(*entries: dict, text: str = "w11 w12") -> list[dict]:
    return [{"role": "user", "content": [*entries, {"type": "text", "text": text}]}]


def process(processor: Spa3VLMProcessor, conversation: list, **options):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return processor.apply_chat_template(conversation, **options)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    return Processors(tmp_path_factory.mktemp("vlms"), size=42)


@pytest.fixture
def processor(processors):
    return processors["qwen2_5_vl"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def as_pictures(views: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(seen.mul(255).round().byte().permute(1, 2, 0).numpy()) for seen in views]


def assert_same_inputs(inputs, expected):
    assert inputs.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(inputs[name], values), name


# --- pixels


def unpatchify(patches: torch.Tensor, grid: list[int], patch: int, merge: int = 2) -> np.ndarray:
    """Qwen's flat patches -> (frame, 3, height, width)."""
    _, rows, columns = grid
    blocks = patches.view(rows // merge, columns // merge, merge, merge, 3, 2, patch, patch)
    return blocks.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(2, 3, rows * patch, columns * patch).numpy()


def test_text_alone_is_text_in_a_list(processors, family):
    listed = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "w11"), ("assistant", "w12"))
    ]
    plain = [{"role": "user", "content": "w11"}, {"role": "assistant", "content": "w12"}]
    expected = [USER, COLON, 11, EOS, ASSISTANT, COLON, 12, EOS]
    for conversation in (listed, plain):
        ids = process(processors[family], conversation)["input_ids"][0].tolist()
        assert ids == ([BOS, *expected] if family == "gemma3" else expected)


@pytest.mark.parametrize("patch", [14, 16])
def test_vlm_and_encoder_see_the_same_pixels(patch):
    images = Qwen2VLImageProcessorPil(patch_size=patch)
    processor = Spa3VLMProcessor(images, tiny_tokenizer("qwen2_5_vl"), chat_template("qwen2_5_vl"))
    views = [{"type": "image", "image": picture(seed, 640, 480)} for seed in range(2)]
    inputs = process(processor, ask(*views))
    spatial = inputs["spatial_pixel_values"]
    # 518 x 392 to the encoder, as VGGT's own preprocessing has it; cut to multiples of 28 or 32 for the VLM.
    assert spatial.shape == (1, 2, 3, 392, 518) and spatial.dtype == torch.float32
    expected = Spa3RImageProcessor()([entry["image"] for entry in views], return_tensors="pt")["pixel_values"]
    assert torch.equal(spatial, expected)
    width, height = {14: (504, 392), 16: (512, 384)}[patch]
    grid = [1, height // patch, width // patch]
    assert inputs["image_grid_thw"].tolist() == [grid, grid]
    assert (inputs["input_ids"] == IMAGE).sum() == 2 * height * width // (2 * patch) ** 2
    mean, std = (np.array(values)[:, None, None] for values in (images.image_mean, images.image_std))
    for patches, seen in zip(inputs["pixel_values"].chunk(2), spatial[0].numpy(), strict=True):
        restored = unpatchify(patches, grid, patch) * std + mean
        for frame in restored:
            np.testing.assert_allclose(frame, seen[:, :height, :width], atol=1e-6)
            np.testing.assert_array_equal(np.rint(frame * 255), np.rint(seen[:, :height, :width] * 255))


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("qwen")])
def test_families_of_one_size_get_the_whole_view(processors, family):
    processor = processors[family]
    inputs = process(processor, ask(view(0), view(1)))
    views = as_pictures(inputs["spatial_pixel_values"][0])
    assert [seen.size for seen in views] == [(42, 28)] * 2
    whole = {
        **{"internvl": {"crop_to_patches": False}, "gemma3": {"do_pan_and_scan": False}},
        **dict.fromkeys(("idefics3", "smolvlm"), {"do_image_splitting": False}),
    }
    expected = processor.image_processor([views], return_tensors="pt", **whole.get(family, {}))
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_large_and_small_pictures_are_not_resized_again(processors):
    """The family's own limits, here of 65,536 to 131,072 pixels, would have them resized."""
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        inputs = process(processors[family], ask(view()))
        assert inputs["image_grid_thw"].tolist() == [[1, 14, 20]]
    with pytest.raises(ValueError, match=r"made \d+ patches, image_grid_thw = .*; expected 280, \[\[1, 14, 20\]\]"):
        process(processors["qwen3_vl"], ask(view()), processor_kwargs={"images_kwargs": {"do_resize": True}})


def test_padded_views_are_seen_by_both(processor):
    other = Spa3VLMProcessor.from_vlm(
        processor.vlm_processor, Spa3RImageProcessor(size=42, mode="pad"), min_frames=2, max_frames=3
    )
    inputs = process(other, ask(view(), {"type": "image", "image": picture(1, 60, 84)}))
    assert inputs["spatial_pixel_values"].shape == (1, 2, 3, 42, 42)
    assert inputs["image_grid_thw"].tolist() == [[1, 20, 20]] * 2
    assert other.frame_sampling == FrameSampling(2.0, 2, 3)


# --- prompts


def test_prompts_of_one_view_are_as_by_hand(processors, family):
    inputs = process(processors[family], ask(view()), add_generation_prompt=True)
    visual = [IMAGE] * (10 if family == "llava_onevision" else NUM_TOKENS[family])
    visual = {
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"), [START, *visual, END]),
        **dict.fromkeys(("idefics3", "smolvlm"), [FAKE, GLOBAL, *visual, FAKE]),
        "llava_onevision": visual,
    }[family]
    expected = [USER, COLON, *visual, 11, 12, EOS, ASSISTANT, COLON]
    expected = [BOS, *expected] if family == "gemma3" else expected  # once, although the tokenizer might add another
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]
    name = {"gemma3": "token_type_ids"}.get(family, "mm_token_type_ids")
    if name in inputs:
        assert torch.equal(inputs[name] == 1, inputs["input_ids"] == IMAGE)
    assert (name in inputs) == (family == "gemma3" or family.startswith("qwen"))


def test_smolvlm_is_treated_as_by_its_own_class(processors, monkeypatch):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", object())
    parts = {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    ours = processors["smolvlm"]
    own = type("SmolVLMProcessor", (SmolVLMProcessor,), parts)(ours.image_processor, ours.tokenizer, None, 4)
    inputs = process(ours, ask(view(0), view(1)))
    prompt = ours.apply_chat_template(ask(view(0), view(1)))
    views = [
        Image.fromarray((v * 255).round().byte().permute(1, 2, 0).numpy()) for v in inputs["spatial_pixel_values"][0]
    ]
    expected = own(text=prompt, images=[views], return_tensors="pt", do_image_splitting=False)
    assert_same_inputs({name: inputs[name] for name in expected}, expected)


def test_tokenizer_keeps_its_special_tokens(processors):
    for family in ("idefics3", "smolvlm"):
        tokenizer = tiny_tokenizer(family)
        tokenizer.add_special_tokens({"additional_special_tokens": ["w20"]})
        before = tokenizer.all_special_tokens, len(tokenizer)
        options = {"vlm_processor_class": "Idefics3Processor", "vlm_processor_options": OPTIONS[family]}
        Spa3VLMProcessor(processors[family].image_processor, tokenizer, chat_template(family), **options)
        assert (tokenizer.all_special_tokens, len(tokenizer)) == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_where_it_is_said(processors, family, side):
    processor = processors[family]
    conversations = [ask(), ask(view(), view(1)), ask(view(2))]
    batch = process(processor, conversations, padding_side=side)
    for row, mask, conversation in zip(batch["input_ids"], batch["attention_mask"], conversations, strict=True):
        alone = process(processor, conversation)["input_ids"][0]
        assert mask.sum() == len(alone)
        columns = slice(-len(alone), None) if side == "left" else slice(len(alone))
        assert torch.equal(row[columns], alone) and mask[columns].all()
        assert (row[mask == 0] == PAD).all()


def test_default_padding_is_left_where_answers_are_to_follow(processor):
    conversations = [ask(text="w11"), ask(text="w11 w12 w13")]
    assert process(processor, conversations, add_generation_prompt=True)["attention_mask"][0, 0] == 0
    assert process(processor, conversations)["attention_mask"][0, -1] == 0  # the tokenizer's own side
    fixed = process(processor, conversations, padding="max_length", max_length=20)
    assert fixed["input_ids"].shape == (2, 20)


def test_text_of_prompts_and_the_last_message(processor):
    conversation = [*ask(view()), {"role": "assistant", "content": "w13"}]
    prompt = processor.apply_chat_template(conversation)
    assert prompt == ("user : <|vision_start|><|image_pad|><|vision_end|>w11 w12  <eos>\nassistant : w13  <eos>\n")
    begun = prompt.removesuffix("  <eos>\n")
    assert processor.apply_chat_template([conversation], continue_final_message=True) == [begun]
    ids = processor.apply_chat_template(conversation, tokenize=True)
    assert ids == process(processor, conversation)["input_ids"].tolist()
    assert processor.decode(ids[0], skip_special_tokens=True) == "user : w11 w12 assistant : w13"
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["user : w11 w12 assistant : w13"]
    # A prompt alone needs no pixels.
    absent = [*ask({"type": "image", "image": "absent.png"}), conversation[1]]
    assert processor.apply_chat_template(absent) == prompt
    # The caller's messages stay as they were.
    assert conversation[0]["content"][0]["image"].size == (84, 60)


# --- scenes


def test_views_of_a_conversation_are_one_scene(processor):
    inputs = process(processor, [ask(view(0), view(1)), ask(), ask(view(2))])
    assert "spatial_scene_ids" not in inputs
    shapes = [tuple(scene.shape) for scene in inputs["spatial_pixel_values"]]
    assert shapes == [(2, 3, 28, 42), (1, 3, 28, 42)]
    alike = process(processor, [ask(view(0)), ask(), ask(view(2))])["spatial_pixel_values"]
    assert alike.shape == (2, 1, 3, 28, 42)
    assert torch.equal(alike[1], inputs["spatial_pixel_values"][1])
    assert "spatial_pixel_values" not in process(processor, [ask()])
    arrays = process(processor, [ask(view(0)), ask()], return_tensors="np")
    np.testing.assert_array_equal(arrays["spatial_pixel_values"], alike[:1].numpy())


def test_named_scenes_are_read_by_their_own_views(processors, family):
    first = ask(view(0, scene="a"), view(1, scene="b"), {"type": "text", "text": "w13"}, view(2, scene="a"))
    inputs = process(processors[family], [ask(), first, ask(view(3))])
    scenes = inputs["spatial_pixel_values"]
    assert [tuple(scene.shape) for scene in scenes] == [(n, 3, 28, 42) for n in (2, 1, 1)]
    is_image, ids = inputs["input_ids"] == IMAGE, inputs["spatial_scene_ids"]
    assert ids.shape == is_image.shape and torch.equal(ids >= 0, is_image)
    count = 5 if family == "llava_onevision" else NUM_TOKENS[family]
    assert ids[1][is_image[1]].tolist() == [0] * count + [1] * count + [0] * count
    assert set(ids[2][is_image[2]].tolist()) == {2}
    for scene, seeds in zip(scenes, ([0, 2], [1], [3]), strict=True):
        expected = Spa3RImageProcessor(size=42)([picture(seed) for seed in seeds], return_tensors="pt")
        assert torch.equal(scene, expected["pixel_values"][0])


def test_scenes_may_differ_in_shape_but_not_the_views_of_one(processor):
    tall = {"type": "image", "image": picture(1, 60, 84)}
    inputs = process(processor, ask(view(scene=0), {**tall, "scene": 1}))
    assert [tuple(scene.shape) for scene in inputs["spatial_pixel_values"]] == [(1, 3, 28, 42), (1, 3, 42, 42)]
    assert inputs["image_grid_thw"].tolist() == [[1, 14, 20], [1, 20, 20]]
    message = r"sample 1, view 1 is 42 x 42 pixels .* the first of its scene 42 x 28 .*expected views of one shape"
    with pytest.raises(BadSampleError, match=message):
        process(processor, [ask(), ask(view(), tall)])


# --- the model


def test_vlms_take_the_inputs(processors, family):
    model = get_spa3_vlm(tiny_vlm(family), tiny_spa3r().spa3r, Spa3AdapterConfig()).eval()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.normal_(std=0.3)
    # All but the first have the views of several scenes, or none.
    conversations = [ask(view(0), view(1)), ask(), ask(view(2, scene="a"), view(3, scene="b"))]
    inputs = process(processors[family], conversations, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        for row, conversation in zip(logits, conversations, strict=True):
            alone = process(processors[family], conversation, add_generation_prompt=True)
            torch.testing.assert_close(model(**alone).logits[0, -1], row, rtol=1e-4, atol=1e-4)
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1]], logits.argmax(-1))
    unread = model.vlm(**{name: value for name, value in inputs.items() if not name.startswith("spatial")})
    changed = (unread.logits[:, -1] - logits).abs().amax(-1) > 1e-3
    assert changed.tolist() == [True, False, True]


# --- videos


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 100, 156, 218, 435, 451, 1800, 2697])
@pytest.mark.parametrize("rate", [24, 30, 30000 / 1001])
def test_frames_of_a_steady_video_are_those_of_the_release(count, rate):
    """Its evaluation takes `linspace(0, num_frames - 1, 32)`, rounded down."""
    sampling = FrameSampling(min_frames=32, max_frames=32)
    expected = np.linspace(0, count - 1, 32).astype(int) if count > 32 else np.arange(count)
    assert sampling.choose(count, np.arange(count) / rate) == expected.tolist()
    assert sampling.choose(count) == expected.tolist()


def test_number_of_frames_follows_the_time():
    def number(seconds, **options):
        return len(FrameSampling(**options).choose(30 * seconds + 1, np.arange(30 * seconds + 1) / 30))

    assert [number(seconds) for seconds in (1, 8, 11, 13, 16, 60)] == [4, 4, 6, 6, 8, 8]
    assert number(60, seconds_per_frame=4, max_frames=100) == 15
    assert number(60, seconds_per_frame=600, min_frames=1) == 1
    # 10 s with a frame a second, then 90 s with one every ten: evenly in time, not in number.
    uneven = np.concatenate([np.arange(10), np.arange(10, 101, 10)]).astype(float)
    assert FrameSampling(max_frames=5).choose(len(uneven), uneven) == [0, 11, 14, 16, 19]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seconds_per_frame": 0}, "seconds_per_frame = 0; expected a number above 0"),
        ({"min_frames": 0}, "min_frames = 0 and max_frames = 8"),
        ({"min_frames": 9}, "min_frames = 9 and max_frames = 8; expected 1 <= min_frames <= max_frames"),
    ],
)
def test_unusable_sampling_is_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**options)
    with pytest.raises(ValueError, match=message):
        Spa3VLMProcessor.from_vlm(processor.vlm_processor, **options)


def test_frames_are_fed_as_pictures(processor, tmp_path):
    for index in range(11):
        picture(index).save(tmp_path / f"{index}.png")
    frames = [picture(index) for index in (0, 1, 2, 4, 5, 7, 8, 10)]
    expected = process(processor, ask(*({"type": "image", "image": frame} for frame in frames)))
    assert expected["spatial_pixel_values"].shape == (1, 8, 3, 28, 42)
    every = [picture(index) for index in range(11)]
    for media in (tmp_path, str(tmp_path), f"file://{tmp_path}", every, [np.asarray(frame) for frame in every]):
        assert_same_inputs(process(processor, ask({"type": "video", "video": media})), expected)
    paths = [str(tmp_path / f"{index}.png") for index in range(11)]
    assert_same_inputs(process(processor, ask({"type": "video", "path": paths})), expected)
    single = ask(*({"type": "image", "url": paths[index]} for index in (0, 1, 2, 4, 5, 7, 8, 10)))
    assert_same_inputs(process(processor, single), expected)


def test_frames_of_a_video_file(processor, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "room.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"g": "6"})
        stream.width, stream.height, stream.pix_fmt = 84, 60, "yuv420p"
        for index in range(45):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (84, 60), (5 * index,) * 3))))
        container.mux(stream.encode())
    frames = [open_frame() for open_frame in find_frames(path, FrameSampling(), "room")]  # 11 s: 6 frames
    assert [np.asarray(frame).mean() for frame in frames] == pytest.approx([0, 40, 85, 130, 175, 220], abs=4)
    inputs = process(processor, ask({"type": "video", "video": str(path)}))
    expected = process(processor, ask(*({"type": "image", "image": frame} for frame in frames)))
    assert_same_inputs(inputs, expected)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadSampleError, match="room.mp4"):
        process(processor, ask({"type": "video", "video": str(path)}))


# --- bad input


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([], "sample 0 is a conversation of no message; expected a list of at least one message"),
        ([[], ask()], "sample 0 is a conversation of no message"),
        ("w11", "sample 0 is a conversation of 'w11'"),
        (["w11"], "sample 0, message 0 is 'w11'; expected {'role': ..., 'content': ...}"),
        ([{"content": "w11"}], "sample 0, message 0 is {'content': 'w11'}; expected {'role'"),
        ([{"role": "user"}], "message 0 has content None; expected text or a list of entries"),
        ([{"role": "user", "content": 3}], "message 0 has content 3; expected text or a list of entries"),
        (ask({"type": "image"}), r"entry 0 has no image: its keys are \['type'\]; expected it under 'image'"),
        (ask({"type": "video", "image": 1}), r"entry 0 has no video: its keys are \['image', 'type'\]"),
        (
            ask({"type": "sound", "sound": "x.wav"}),
            "message 0, entry 0 is of type 'sound'; expected an entry of",
        ),
        (ask("w11"), "sample 0, message 0, entry 0 is 'w11'; expected an entry of type 'text', 'image' or 'video'"),
        (ask({"type": "text"}), "entry 0 is {'type': 'text'}; expected {'type': 'text', 'text': ...}"),
        ([*ask(), *ask(view(scene=[1]))], r"sample 0, message 1, entry 0 has scene \[1\]; expected a name"),
        (ask({"type": "video", "video": []}), "sample 0, message 0, entry 0 is a video with no frames"),
        (ask({"type": "video", "video": 3}), "entry 0 has a int as its video; expected a path or a list of pictures"),
        (ask({"type": "image", "image": 3}), "sample 0, message 0, entry 0 is a int; expected a PIL picture"),
        (
            ask({"type": "image", "url": "https://x.org/a.png"}),
            "entry 0 is at 'https://x.org/a.png'; expected",
        ),
        (ask({"type": "image", "image": picture(0, 200, 3)}), "sample 0, view 0: .* is 200 x 3 pixels"),
        (ask({"type": "image", "image": Image.new("RGB", (0, 3))}), "entry 0 is 0 x 3 pixels; expected at least one"),
        (ask({"type": "video", "video": [None]}), "message 0, entry 0, frame 0 is a NoneType; expected a PIL picture"),
        (ask({"type": "video", "video": "x" * 3000}), "entry 0: 'xxx.* cannot be opened: File name too long"),
        (ask(view(), text="w11 <|image_pad|>"), r"sample 0 has 1 views and 2 times '<\|image_pad\|>' in its prompt"),
        (ask(text="w11 <|video_pad|>"), r"sample 0 has '<\|video_pad\|>' in its prompt; expected none"),
    ],
)
def test_unusable_conversations_are_named(processor, conversation, message):
    with pytest.raises(BadSampleError, match=message):
        process(processor, conversation)


def test_missing_and_broken_media_are_named(processor, tmp_path):
    for kind, name in (("image", "view.png"), ("video", "room.mp4"), ("video", "frames")):
        path = tmp_path / name
        with pytest.raises(FileNotFoundError, match=f"sample 1, message 0, entry 0: {path} does not exist"):
            process(processor, [ask(), ask({"type": kind, kind: str(path)})])
    (tmp_path / "frames").mkdir()
    with pytest.raises(BadSampleError, match="frames holds no pictures"):
        process(processor, ask({"type": "video", "video": tmp_path / "frames"}))
    (tmp_path / "room.mp4").write_bytes(b"no video")
    with pytest.raises(BadSampleError, match="room.mp4"):
        process(processor, ask({"type": "video", "video": tmp_path / "room.mp4"}))
    (tmp_path / "view.png").write_bytes(b"no picture")
    with pytest.raises(BadSampleError, match="message 0, entry 0.*view.png.*expected a picture"):
        process(processor, ask({"type": "image", "image": tmp_path / "view.png"}))


def test_nothing_is_cut_off(processors, family):
    processor = processors[family]
    conversation = ask(view(), view(1))
    inputs = process(processor, conversation)
    length, visual = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    assert_same_inputs(process(processor, conversation, max_length=length), inputs)
    message = f"sample 1 has {length} tokens, {visual} of them visual; expected at most max_length = {length - 1}"
    with pytest.raises(BadSampleError, match=message):
        process(processor, [ask(), conversation], max_length=length - 1)
    with pytest.raises(ValueError, match="truncation is given; expected none"):
        process(processor, conversation, truncation=True)


def test_more_placeholders_than_visual_tokens_are_refused(processors):
    """Gemma 3 has another token in prompts than in input_ids: written by a user, the latter would go unnoticed."""
    with pytest.raises(BadSampleError, match="sample 1 has 9 image placeholders in input_ids; expected 8"):
        process(processors["gemma3"], [ask(), ask(view(), view(1), text="w11 <image_soft_token>")])
    for family, tiles in (("internvl", "crop_to_patches"), ("idefics3", "do_image_splitting")):
        options = {"images_kwargs": {tiles: True}}
        with pytest.raises(BadSampleError, match=r"sample 0 has \d+ image placeholders in input_ids; expected 4"):
            process(processors[family], ask({"type": "image", "image": picture(0, 168, 84)}), processor_kwargs=options)


def test_views_and_prompts_without_messages(processor):
    prompt = processor.apply_chat_template(ask(view()))
    expected = process(processor, ask(view()))
    for images in (picture(), [picture()], [[picture()]], [np.asarray(picture())]):
        assert_same_inputs(processor(images, prompt, return_tensors="pt"), expected)
    batch = processor([[picture()], []], [prompt, "w11"], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    lists = processor([[picture()], []], [prompt, "w11"], padding=False)
    assert lists["input_ids"] == [expected["input_ids"][0].tolist(), [11]]
    two = processor([picture(0), picture(1)], prompt + prompt, scenes=[["a", "b"]])
    assert [len(scene) for scene in two["spatial_pixel_values"]] == [1, 1] and two["spatial_scene_ids"][0][3] == 0
    for arguments, message in (
        (([picture(), picture()], prompt), "sample 0 has 2 views and 1 times"),
        ((None, prompt), "sample 0 has 0 views and 1 times"),
        (([picture()], [prompt, "w11"]), "1 images for 2 prompts; expected a list of views for each"),
        (([[picture()]],), "text is not given"),
        ((None, "w11", [picture()]), "videos are given; expected their frames as images"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(*arguments)
    with pytest.raises(ValueError, match=r"scenes name \[2\] views of the samples; expected \[1\]"):
        processor([picture()], prompt, scenes=[["a", "b"]])


# --- files


def test_saved_processors_are_restored(processors, family, tmp_path):
    processor = Spa3VLMProcessor.from_vlm(processors[family].vlm_processor, Spa3RImageProcessor(size=42), max_frames=6)
    if family == "smolvlm":
        processor = processors[family]  # whose own class there is not to be had
    settings = {
        name: value for name, value in processor.to_dict().items() if name not in ("auto_map", "image_processor")
    }
    processor.save_pretrained(tmp_path)
    conversations = [ask(view(0), view(1)), ask(view(2))]
    expected = process(processor, conversations)
    for load in (Spa3VLMProcessor.from_pretrained, AutoProcessor.from_pretrained):
        restored = load(tmp_path)
        assert type(restored) is Spa3VLMProcessor
        assert settings.items() <= restored.to_dict().items() and settings["max_frames"] in (6, 8)
        inputs = process(restored, conversations)
        assert inputs.keys() == expected.keys() and "spatial_pixel_values" in restored.model_input_names
        for name in expected:
            pairs = zip(inputs[name], expected[name], strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs), name
    assert AutoProcessor.from_pretrained(tmp_path, min_frames=32, max_frames=32).frame_sampling.choose(99)[-1] == 98


def test_processor_of_an_encoders_folder(processors, tmp_path):
    Spa3RImageProcessor(size=56, mode="pad").save_pretrained(tmp_path)
    ours = Spa3VLMProcessor.from_vlm(processors["gemma3"].vlm_processor, tmp_path)
    assert ours.spatial_options == {"size": 56, "mode": "pad", "patch_size": 14}
    assert ours.vlm_processor_class == "Gemma3Processor" and isinstance(ours.vlm_processor, Gemma3Processor)
    paper = Spa3VLMProcessor.from_vlm(processors["gemma3"].vlm_processor)
    assert paper.spatial_image_processor.size == 518 and paper.frame_sampling == FrameSampling(2.0, 4, 8)


def test_files_that_contradict_each_other_are_refused(tmp_path):
    def change(name: str, **settings) -> None:
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    tiny_vlm_folder("qwen2_5_vl", tmp_path)
    change("preprocessor_config.json", patch_size=14)
    with pytest.raises(ValueError, match="patch_size is 14 by the files of the processor, but 2 in the VLM's config"):
        Spa3VLMProcessor.from_vlm(tmp_path)
    tiny_vlm_folder("gemma3", tmp_path)
    change("processor_config.json", image_seq_length=256)
    with pytest.raises(ValueError, match="image_seq_length is 256 by .* but 4 in the VLM's config"):
        Spa3VLMProcessor.from_vlm(tmp_path)
    tiny_vlm_folder("gemma3", tmp_path)
    change("config.json", image_token_id=89)
    with pytest.raises(ValueError, match="image_token_id is 90 by .* but 89 in"):
        Spa3VLMProcessor.from_vlm(tmp_path)
    change("config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ValueError, match="is a model of type 'qwen2'; expected a vision-language model"):
        Spa3VLMProcessor.from_vlm(tmp_path)


def test_other_families_and_options_are_refused(processor):
    parts = processor.image_processor, processor.tokenizer, processor.chat_template
    with pytest.raises(ValueError, match="the VLM's processor is a FuyuProcessor; expected one of .*Gemma3Processor"):
        Spa3VLMProcessor(*parts, vlm_processor_class="FuyuProcessor")
    with pytest.raises(TypeError, match="no option"):
        Spa3VLMProcessor(*parts, spatial_options={"sise": 42})
    with pytest.raises(ValueError, match="size is 43"):
        Spa3VLMProcessor(*parts, spatial_options={"size": 43})


LOAD = """
import sys
sys.modules["spa3r_hf"] = None
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor

root = Path(sys.argv[1])
processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
assert "transformers_modules" in type(processor).__module__
conversation = [{"role": "user", "content": [{"type": "video", "video": str(root / "frames")}]}]
options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
save_file(dict(processor.apply_chat_template(conversation, **options)), root / "inputs.safetensors")
"""


def test_saved_folder_needs_no_package(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "frames").mkdir()
    picture().save(tmp_path / "frames" / "0.png")
    expected = process(processor, [{"role": "user", "content": [{"type": "video", "video": tmp_path / "frames"}]}])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", LOAD, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_same_inputs(load_file(tmp_path / "inputs.safetensors"), dict(expected))
    assert {path.name for path in tmp_path.glob("*.py")} == {
        *("processing_spa3_vlm.py", "media_spa3_vlm.py", "tokens_spa3_vlm.py", "image_processing_spa3r.py"),
        *("camera_spa3r.py", "errors.py", "optional.py", "scenes.py", "video.py"),
    }
