"""Answers with everything of a scene shared among its questions are those without; what is shared is computed once."""

import copy
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_spa3r
from tiny_processors import chat_template, tiny_vlm_folder
from tiny_vlms import CONFIGS, FAMILIES, close, counted, disturb, propagated, tiny_vlm, trained
from transformers import Qwen3NextConfig
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.errors import BadSampleError
from spa3r_hf.scene_answers import SceneAnswer, SceneAnswerer
from spa3r_hf.scene_prefix import NoSharedPrefixError, common_length, empty_cache, rows_of_questions
from spa3r_hf.video import VideoFrames


# Of different lengths, with beginnings in common, one of them twice.
PROMPTS = ["w11 w12", "w11 w13 w14 w15 w16", "w11 w20", "w11 w13 w14 w17", "w11 w12", "w11 w41 w42 w43 w44 w45 w46"]
STEPS = 6
EOS_IDS = [57, 59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79, 81, 83, 85]


def picture(seed: int, width: int = 84, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


FRAMES = [picture(seed) for seed in range(3)]


class Processors(dict):
    """A processor of every family, made when it is asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, family: str) -> Spa3VLMProcessor:
        folder = tiny_vlm_folder(family, self.root / family)
        try:
            self[family] = Spa3VLMProcessor.from_vlm(folder, Spa3RImageProcessor(size=42))
        except ValueError as error:
            if "Could not load any image processor" not in str(error):
                raise
            pytest.skip(f"this version of transformers needs torchvision for {family}")  # 5.17: Idefics3, SmolVLM
        return self[family]


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    return Processors(tmp_path_factory.mktemp("vlms"))


@pytest.fixture(scope="module")
def encoder():
    return tiny_spa3r().spa3r


@pytest.fixture
def qwen(processors, encoder):
    return trained("qwen2_5_vl", encoder), processors["qwen2_5_vl"]


def vlm_of(model):
    return getattr(model, "vlm", model)


def texts_of(model, processor, prompts=PROMPTS, frames=FRAMES, **options) -> list[str]:
    return [answer.text for answer in SceneAnswerer(model, processor, **options).answer(frames, prompts)]


@contextmanager
def recorded(model):
    """The scores that the model gives to the next token, (B, vocabulary) for each forward."""
    scores: list[torch.Tensor] = []
    head = vlm_of(model).get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: scores.append(output[:, -1].float()))
    yield scores
    hook.remove()


@contextmanager
def lengths_read(model):
    """The shape (B, L) of what each forward of the language model reads."""
    shapes: list[tuple[int, int]] = []

    def count(module, args, kwargs):
        shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    hook = vlm_of(model).get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    yield shapes
    hook.remove()


@contextmanager
def tower_calls(model):
    """Calls of the vision tower."""
    calls: list[str] = []
    core = vlm_of(model).base_model
    tower = next(getattr(core, name) for name in ("visual", "vision_tower", "vision_model") if hasattr(core, name))
    hook = tower.register_forward_hook(lambda *_: calls.append("vision tower"))
    yield calls
    hook.remove()


def assert_equal_with_and_without(model, processor, tolerance=1e-5, frames=FRAMES) -> list[str]:
    """The same answers, and the same scores at every step of each."""
    with recorded(model) as plain:
        expected = texts_of(model, processor, frames=frames, max_new_tokens=STEPS, reuse=False)
    with recorded(model) as shared:
        texts = texts_of(model, processor, frames=frames, max_new_tokens=STEPS, tie_tolerance=0)
    assert texts == expected
    # Without: so many steps for each question. With: the prefix, then so many steps for all, the shortest first.
    assert (len(plain), len(shared)) == (STEPS * len(PROMPTS), 1 + STEPS)
    order = sorted(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index].split()))
    for row, index in enumerate(order):
        scores = torch.stack([step[row] for step in shared[1:]])
        close(scores, torch.cat(plain[index * STEPS : (index + 1) * STEPS]), tolerance)
    # Different questions are told apart.
    assert (shared[1][0] - shared[1][-1]).abs().max() > 0.1
    return texts


# --- every family


@pytest.mark.parametrize("integration", ["cross_attention", "append"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_without_reuse(family, integration, processors, encoder):
    model, processor = trained(family, encoder, integration=integration), processors[family]
    texts = assert_equal_with_and_without(model, processor)
    assert texts[0] == texts[4]
    for batch_size in (1, 2, 4):
        assert texts_of(model, processor, max_new_tokens=STEPS, batch_size=batch_size) == texts
    # They depend on the scene, and a scene leaves nothing behind.
    answerer = SceneAnswerer(model, processor, max_new_tokens=STEPS)
    others = [answer.text for answer in answerer.answer([picture(7), picture(8)], PROMPTS)]
    assert others != texts and others == texts_of(
        model, processor, frames=[picture(7), picture(8)], max_new_tokens=STEPS, reuse=False
    )
    assert [answer.text for answer in answerer.answer(FRAMES, PROMPTS)] == texts


@pytest.mark.parametrize("family", FAMILIES)
def test_vlm_alone_and_disabled_adapter_answer_alike(family, processors, encoder):
    model, processor = trained(family, encoder), processors[family]
    texts = assert_equal_with_and_without(model.vlm, processor)
    with model.disable_adapter(), counted(model) as calls:
        assert texts_of(model, processor, max_new_tokens=STEPS) == texts
    assert not calls
    assert texts_of(model, processor, max_new_tokens=STEPS) != texts


@pytest.mark.parametrize("integration", ["cross_attention", "append"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_shared_is_computed_once(family, integration, processors, encoder):
    model, processor = trained(family, encoder, integration=integration), processors[family]
    with counted(model) as encoded, tower_calls(model) as seen, lengths_read(model) as shapes:
        texts_of(model, processor, max_new_tokens=STEPS, batch_size=4)
    assert encoded == ["backbone", "encoder"] and seen == ["vision tower"]
    inputs = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video", "video": FRAMES}, {"type": "text", "text": prompt}]}],
            **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
        )["input_ids"][0].tolist()
        for prompt in PROMPTS
    ]
    # All begin with the views and w11; what follows in the template is "<eos> assistant :", 4 tokens and the text.
    shared = next(place for place in range(1000) if len({row[place] for row in inputs}) > 1)
    appended = len(model.get_spatial_latents(torch.zeros(1, 3, 3, 28, 42))[0]) if integration == "append" else 0
    lengths = sorted(len(row) - shared for row in inputs)
    once = (1, 1)
    assert shapes[0] == (1, shared + appended) and inputs[0][shared - 1] == 11
    assert shapes[1:] == [
        *[(4, lengths[3]), *[(4, 1)] * (STEPS - 1)],
        *[(2, lengths[5]), *[(2, 1)] * (STEPS - 1)],
    ]
    assert once not in shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_lower_precision(family, processors, encoder):
    model, processor = trained(family, encoder), processors[family]
    model.vlm.to(torch.bfloat16)
    with recorded(model) as plain:
        texts_of(model, processor, max_new_tokens=1, reuse=False)
    with recorded(model) as shared:
        answers = texts_of(model, processor, max_new_tokens=1, tie_tolerance=0)
    assert len(answers) == len(PROMPTS)
    order = sorted(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index].split()))
    scores, scale = torch.stack([plain[index][0] for index in order]), plain[0].std()
    assert (scores - shared[1]).abs().mean() < 0.05 * scale


# --- windows


def sliding_gemma(window: int):
    config = CONFIGS["gemma3"]()
    config.text_config.sliding_window = window
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.load_state_dict(tiny_vlm("gemma3").state_dict())
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("window", [4, 8, 30])
def test_prefix_longer_than_the_window_is_shared(window, processors, encoder):
    model = disturb(get_spa3_vlm(sliding_gemma(window), encoder, Spa3AdapterConfig()))
    processor = processors["gemma3"]
    expected = texts_of(model, processor, max_new_tokens=STEPS, reuse=False)
    assert expected != texts_of(
        disturb(get_spa3_vlm(tiny_vlm("gemma3"), encoder, Spa3AdapterConfig())), processor, max_new_tokens=STEPS
    )
    with tower_calls(model) as seen, lengths_read(model) as shapes:
        assert texts_of(model, processor, max_new_tokens=STEPS) == expected
    assert seen == ["vision tower"]
    # Padding would take places in the window: only questions of one length go together.
    assert [rows for rows, length in shapes if length > 1] == [1, 3, 1, 1, 1]
    with recorded(model) as plain:
        texts_of(model, processor, PROMPTS[:2], max_new_tokens=STEPS, reuse=False)
    with recorded(model) as shared:
        texts_of(model, processor, PROMPTS[:2], max_new_tokens=STEPS)
    close(torch.cat(shared[1:]), torch.cat(plain), 1e-5)


# --- where nothing can be shared


def test_questions_before_the_views_are_asked_one_by_one(qwen, caplog):
    model, processor = qwen
    processor = copy.deepcopy(processor)
    reverse = "{% for entry in message.content | reverse %}"
    processor.chat_template = chat_template("qwen2_5_vl").replace("{% for entry in message.content %}", reverse)
    expected = texts_of(model, processor, max_new_tokens=STEPS, reuse=False)
    with tower_calls(model) as seen, propagated("transformers"), propagated("spa3r_hf.scene_answers"):
        assert texts_of(model, processor, max_new_tokens=STEPS) == expected
        assert texts_of(model, processor, PROMPTS[:2], max_new_tokens=STEPS) == expected[:2]
    assert len(seen) == len(PROMPTS) + 2
    assert caplog.text.count("one by one: the chat template puts what differs between questions before") == 1


def test_caches_that_cannot_be_copied_are_not(qwen, monkeypatch, caplog):
    model, processor = qwen

    class Hybrid:
        config = Qwen3NextConfig(num_hidden_layers=4)

    with pytest.raises(NoSharedPrefixError, match=r"Hybrid has a cache of Linear\w+, which cannot be copied"):
        empty_cache(Hybrid())
    monkeypatch.setattr("spa3r_hf.scene_answers.empty_cache", lambda vlm: empty_cache(Hybrid()))
    with tower_calls(model) as seen, propagated("spa3r_hf.scene_answers"):
        texts = texts_of(model, processor, max_new_tokens=STEPS)
    assert len(seen) == len(PROMPTS) and "Hybrid has a cache of" in caplog.text
    monkeypatch.undo()
    assert texts == texts_of(model, processor, max_new_tokens=STEPS)


def test_ties_are_broken_without_reuse(qwen):
    model, processor = qwen
    expected = texts_of(model, processor, max_new_tokens=STEPS, reuse=False)
    for tolerance, calls in ((0.0, 1), (1e9, 1 + len(PROMPTS))):
        with tower_calls(model) as seen:
            assert texts_of(model, processor, max_new_tokens=STEPS, tie_tolerance=tolerance) == expected
        assert len(seen) == calls
    # Two words with one score, so that they tie wherever they are the best.
    with torch.no_grad():
        head = model.vlm.get_output_embeddings().weight
        head[50:] = head[:50].clone()
    tied = texts_of(model, processor, max_new_tokens=STEPS, reuse=False)
    with tower_calls(model) as seen:
        assert texts_of(model, processor, max_new_tokens=STEPS) == tied
    assert len(seen) == 1 + len(PROMPTS)


# --- what generation goes by


def test_each_answer_ends_at_its_own_end(qwen):
    model, processor = qwen
    whole = texts_of(model, processor, max_new_tokens=12)
    model.generation_config.eos_token_id = EOS_IDS
    texts = texts_of(model, processor, max_new_tokens=12)
    assert texts == texts_of(model, processor, max_new_tokens=12, reuse=False)
    lengths = []
    for text, longer in zip(texts, whole, strict=True):
        words = longer.split()
        ends = [place for place, word in enumerate(words) if word in {f"w{token}" for token in EOS_IDS}]
        assert text.split() == words[: min(ends, default=len(words))]
        lengths.append(len(text.split()))
    assert len(set(lengths)) > 1
    model.generation_config.eos_token_id = int(whole[0].split()[0].removeprefix("w"))
    assert texts_of(model, processor)[0] == ""


def test_decoding_is_greedy_whatever_the_configuration_says(qwen):
    model, processor = qwen
    texts = texts_of(model, processor, max_new_tokens=STEPS)
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 3, "num_beams": 4}
    model.generation_config.update(**settings)
    for reuse in (True, False):
        assert texts_of(model, processor, max_new_tokens=STEPS, reuse=reuse) == texts
    assert model.generation_config.do_sample and model.generation_config.num_beams == 4


@pytest.mark.parametrize("integration", ["cross_attention", "append"])
def test_all_else_of_the_configuration_counts(integration, processors, encoder):
    model, processor = trained("qwen2_5_vl", encoder, integration=integration), processors["qwen2_5_vl"]
    texts = texts_of(model, processor, max_new_tokens=12)
    # Padding between prefix and question must not count as said before.
    model.generation_config.update(repetition_penalty=1.6, cache_implementation="static", pad_token_id=EOS_IDS[0])
    penalised = texts_of(model, processor, max_new_tokens=12, reuse=False)
    assert penalised != texts
    assert texts_of(model, processor, max_new_tokens=12) == penalised


def test_the_mode_of_each_part_is_given_back(qwen):
    model, processor = qwen
    expected = texts_of(model, processor, max_new_tokens=STEPS)
    model.vlm.config.get_text_config().attention_dropout = 0.5
    for layer in model.vlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    assert texts_of(model, processor, max_new_tokens=STEPS) == expected
    assert [module.training for module in model.modules()] == modes


def test_model_on_named_devices(qwen, encoder, tmp_path):
    model, processor = qwen
    expected = texts_of(model, processor, max_new_tokens=STEPS)
    model.vlm.save_pretrained(tmp_path)
    for device_map in ("cpu", "auto"):
        vlm = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map, dtype="float32")
        other = disturb(get_spa3_vlm(vlm, encoder, Spa3AdapterConfig()))
        assert texts_of(other, processor, max_new_tokens=STEPS) == expected


# --- scenes and questions of all kinds


@pytest.fixture
def video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "room.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 84, 60, "yuv420p"
        for seed in range(90):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture(seed // 9)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_are_decoded_once(qwen, video, tmp_path, monkeypatch):
    model, processor = qwen
    decoded: list[int] = []
    decode = VideoFrames.pictures

    def count(self, indices):
        decoded.extend(indices)
        return decode(self, indices)

    monkeypatch.setattr(VideoFrames, "pictures", count)
    answers = SceneAnswerer(model, processor, max_new_tokens=STEPS).answer(video, PROMPTS)
    # A frame for every 2 s of 9 s.
    assert len(decoded) == 4 and {answer.num_frames for answer in answers} == {4}
    alone = SceneAnswerer(model, processor, max_new_tokens=STEPS, reuse=False).answer(str(video), PROMPTS)
    assert alone == answers and len(decoded) == 4 + 4 * len(PROMPTS)
    # The same pictures by other ways.
    pictures = [VideoFrames(video)[index] for index in decoded[:4]]
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(pictures):
        frame.save(folder / f"{index}.png")
    for scene in (pictures, folder):
        assert SceneAnswerer(model, processor, max_new_tokens=STEPS).answer(scene, PROMPTS) == answers


def test_a_single_question_and_a_single_view(qwen):
    model, processor = qwen
    answerer = SceneAnswerer(model, processor, max_new_tokens=STEPS)
    texts = texts_of(model, processor, max_new_tokens=STEPS, reuse=False)
    assert answerer.answer(FRAMES, PROMPTS[1:2]) == [SceneAnswer(texts[1], 3)]
    assert answerer.answer(FRAMES, [PROMPTS[1]] * 3) == [SceneAnswer(texts[1], 3)] * 3
    assert texts_of(model, processor, frames=FRAMES[:1], max_new_tokens=STEPS) == texts_of(
        model, processor, frames=FRAMES[:1], max_new_tokens=STEPS, reuse=False
    )


def messages(text: str, *entries: dict, system: str = "w70 w71") -> list[dict]:
    return [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [*entries, {"type": "text", "text": text}]},
        {"role": "assistant", "content": "w33"},
        {"role": "user", "content": text},
    ]


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "gemma3", "internvl"])
def test_questions_with_more_in_them(family, processors, encoder):
    model, processor = trained(family, encoder), processors[family]
    with_reuse, without = (
        SceneAnswerer(model, processor, max_new_tokens=STEPS, reuse=reuse) for reuse in (True, False)
    )
    two_scenes = [
        {"type": "image", "image": FRAMES[0], "scene": "kitchen"},
        {"type": "text", "text": "w29"},
        {"type": "image", "image": FRAMES[1], "scene": "hall"},
    ]
    for entries in (two_scenes, two_scenes[:2], []):
        questions = [messages(prompt, *entries) for prompt in PROMPTS]
        with tower_calls(model) as seen:
            answers = with_reuse.answer_messages(questions)
        assert len(seen) == bool(entries)
        assert answers == without.answer_messages(questions)
        assert {answer.num_frames for answer in answers} == {sum(entry["type"] == "image" for entry in entries)}
    assert with_reuse.answer_messages([]) == []
    # Texts that differ between the views cannot be shared.
    others = [messages(prompt, *two_scenes, system=prompt) for prompt in PROMPTS]
    assert with_reuse.answer_messages(others) == without.answer_messages(others)
    with pytest.raises(ValueError, match="question 1 has 1 views and question 0 has 2"):
        with_reuse.answer_messages([messages("w11", *two_scenes), messages("w11", *two_scenes[:2])])


# --- what cannot be answered


@pytest.mark.parametrize("reuse", [True, False])
def test_bad_input_is_named(qwen, tmp_path, reuse):
    answerer = SceneAnswerer(*qwen, reuse=reuse)
    assert answerer.answer(tmp_path / "missing.mp4", []) == []
    for prompts, found in ((["w11", ""], "''"), (["w11", " \n"], r"' \\n'"), (["w11", None], "None")):
        with pytest.raises(ValueError, match=f"prompt 1 is {found}; expected a text that is not empty"):
            answerer.answer(FRAMES, prompts)
    with pytest.raises(ValueError, match="prompts = 'w11 w12'; expected a list of texts"):
        answerer.answer(FRAMES, "w11 w12")
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        answerer.answer(tmp_path / "missing.mp4", PROMPTS)
    pytest.importorskip("av")
    for name, data in {"empty.mp4": b"", "text.mp4": b"no video"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadSampleError, match=f"{name} cannot be read"):
            answerer.answer(tmp_path / name, PROMPTS)
    with pytest.raises(BadSampleError, match="no frames"):
        answerer.answer([], PROMPTS)
    with pytest.raises(BadSampleError, match="expected a path or a list of pictures"):
        answerer.answer(3, PROMPTS)


@pytest.mark.parametrize("option, value", [("max_new_tokens", 0), ("batch_size", -1), ("tie_tolerance", -0.1)])
def test_options_out_of_range_are_refused(qwen, option, value):
    with pytest.raises(ValueError, match=f"{option} = {value}; expected at least"):
        SceneAnswerer(*qwen, **{option: value})
    with pytest.raises(TypeError, match="the processor is a PreTrainedTokenizerFast|TokenizersBackend"):
        SceneAnswerer(qwen[0], qwen[1].tokenizer)


# --- tokens


def test_tokens_of_questions_are_put_together():
    image = 90
    first = [1, image, image, 5, image, image, 6, 7]
    shortened = [[1, 5, image, image, 6, 7], [1, 5, image, image, 6, 8, 9], [1, 5, image, image, 4]]
    rows = rows_of_questions(first, shortened, image)
    assert rows == [first, [*first[:6], 6, 8, 9], [*first[:6], 4]]
    assert common_length(rows) == 6 and common_length(rows[:2]) == 7
    assert common_length([first, first]) == len(first) - 1 and common_length([first, first[:4]]) == 3
    for other in ([1, 3, image, image, 6, 7], [image, 6, 7]):
        with pytest.raises(NoSharedPrefixError, match="before the last view"):
            rows_of_questions(first, [shortened[0], other], image)
    with pytest.raises(NoSharedPrefixError):
        rows_of_questions(first, [[1, 5, image, image, 6, 8]], image)
    assert rows_of_questions([1, 2], [[1, 2], [3]], image) == [[1, 2], [3]]
