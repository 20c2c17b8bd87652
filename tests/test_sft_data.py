"""Conversations to batches: labels on the answers, bad samples, batches of like lengths."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import Processors, tiny_tokenizer
from tiny_vlms import EOS, FAMILIES, tiny_vlm
from torch.utils.data import DataLoader

from spa3r_hf import Spa3AdapterConfig, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.errors import BadSampleError
from spa3r_hf.instruction_data import InstructionData, InstructionSet
from spa3r_hf.latent_cache import LatentCache
from spa3r_hf.sft_data import EstimatedLengths, LengthGroupedBatchSampler, SFTCollator, answer_pieces


SIZE = 28


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Pictures, one of them damaged and one of another shape, and a folder of frames."""
    folder = tmp_path_factory.mktemp("media")
    generator = np.random.default_rng(0)

    def draw(path: Path, height: int = 32) -> None:
        Image.fromarray(generator.integers(0, 256, (height, 32, 3), dtype=np.uint8)).save(path)

    for number in range(3):
        draw(folder / f"{number}.png")
    draw(folder / "flat.png", height=16)
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "frames").mkdir()
    for number in range(5):
        draw(folder / "frames" / f"{number}.png")
    (folder / "no_frames").mkdir()
    return folder


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    return Processors(tmp_path_factory.mktemp("vlms"), size=SIZE, min_frames=2, max_frames=3)


@pytest.fixture
def processor(processors):
    return processors["qwen2_5_vl"]


def record(*texts: str, **media) -> dict:
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
        **media,
    }


MIXED = [
    record("<image> w11 w12", "w20 w21", image="0.png"),
    record("w13", "w22", "w14 w15", "w23 w24 w25"),
    record("<video> w16", "w26", video="frames"),
    record("<image> w17 <image> w18", "w27", "w19", "w28 w29", images=["1.png", "2.png"]),
]
ANSWERS = [["w20 w21"], ["w22", "w23 w24 w25"], ["w26"], ["w27", "w28 w29"]]


def data(records: list[dict], media: Path, **options) -> InstructionData:
    return InstructionData([InstructionSet("set", records, media, **options)])


def runs_of(labels: torch.Tensor, tokenizer) -> list[str]:
    """What is learnt of a row, text by text."""
    found: list[list[int]] = [[]]
    for label in labels.tolist():
        if label == -100:
            found.append([])
        else:
            found[-1].append(label)
    return [tokenizer.decode(run) for run in found if run]


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers(processors, media, family):
    processor = processors[family]
    batch = SFTCollator(processor)(data(MIXED, media))
    assert batch["bad_samples"] == []
    for row, labels, mask, answers in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], ANSWERS, strict=True
    ):
        assert runs_of(labels, processor.tokenizer) == [f"{answer} <eos>" for answer in answers]
        learnt = labels != -100
        assert torch.equal(row[learnt], labels[learnt]) and mask[learnt].all()
    assert len(batch["spatial_pixel_values"]) == 3  # the second has no pictures
    assert [len(views) for views in batch["spatial_pixel_values"]] == [1, 3, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learnt_from_is_what_the_processor_makes(processors, media, family):
    """The batch is that of the processor, and before the first answer stands the prompt that it makes to generate."""
    processor, samples = processors[family], data(MIXED, media)
    conversations = [samples[number].messages() for number in range(len(samples))]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding_side": "right"}
    expected = processor.apply_chat_template(conversations, **options)
    batch = SFTCollator(processor)(samples)
    assert batch.keys() == expected.keys() | {"labels", "bad_samples"}
    for name in expected.keys() - {"spatial_pixel_values"}:
        assert torch.equal(batch[name], expected[name]), name
    for messages, row, labels in zip(conversations, batch["input_ids"], batch["labels"], strict=True):
        asked = [message for message in messages if message["role"] == "user"][:1]
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True, **options)["input_ids"][0]
        start = int((labels != -100).nonzero()[0])
        assert torch.equal(row[:start], prompt)


# Forms that chat templates of today's VLMs have: who speaks, how a turn begins and ends, what comes first.
_IM = "{% for m in messages %}{% if loop.first and m.role != 'system' %}<im>system w50 <eos>\n{% endif %}"
_ENTRIES = "{% for e in m.content %}{% if e.type == 'image' %}PIC{% else %}{{ e.text }}{% endif %}{% endfor %}"
FORMS = {
    "a system prompt of its own": (
        _IM
        + "<im>{{ m.role }}\n"
        + _ENTRIES
        + "<eos>\n{% endfor %}{% if add_generation_prompt %}<im>assistant\n{% endif %}",
        "<eos>",
    ),
    "other white space before an answer": (
        "{% for m in messages %}<im>{{ m.role }} {% for e in m.content if e.type == 'image' %}PIC{% endfor %}"
        "{% for e in m.content if e.type == 'text' %}{{ '\n' + e.text }}{% endfor %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<im>assistant\n{% endif %}",
        "<eos>",
    ),
    "a space before text": (
        "{% for m in messages %}{{ m.role | capitalize }}:{% for e in m.content %}{% if e.type == 'image' %}PIC"
        "{% else %} {{ e.text }}{% endif %}{% endfor %}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "<eos>",
    ),
    "another name for the assistant": (
        "{% for m in messages %}<im>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% for e in m.content %}{% if e.type == 'image' %}PIC{% else %}{{ e.text | trim }}{% endif %}{% endfor %}"
        "<eos>\n{% endfor %}{% if add_generation_prompt %}<im>model\n{% endif %}",
        "<eos>",
    ),
    "no generation prompt": (
        "{% for m in messages %}{% if m.role == 'user' %}[Q] "
        + _ENTRIES
        + " [/Q]{% else %}"
        + _ENTRIES
        + "<eos>{% endif %}{% endfor %}",
        "<eos>",
    ),
    "no end but a line": (
        "{% for m in messages %}{{ m.role }}: " + _ENTRIES + "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "\n",
    ),
}


def conversation(*texts: str) -> list[dict]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]


def render(template: str):
    tokenizer = tiny_tokenizer("qwen2_5_vl")
    return lambda messages, prompt: tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_found_in_every_form_of_template(form):
    template, end = FORMS[form]
    messages = conversation("What?", "A", "And <b>?", "A long one.")
    messages[0]["content"].insert(0, {"type": "image"})
    text = render(template)
    pieces = answer_pieces(messages, text, {"<eos>"})
    learnt = [piece.strip(" ") for piece, is_answer in pieces if is_answer]
    assert learnt == [f"A{end}", f"A long one.{end}"]
    whole = "".join(piece for piece, _ in pieces)
    if form != "other white space before an answer":
        assert whole == text(messages, False)
    # Before each answer stands what the model is given to go on from.
    assert whole.startswith(text(messages[:1], True))
    assert "".join(whole.split()) == "".join(text(messages, False).split())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "writes an answer as 'assistant '"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "'1Q' is not in '2QA'"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
            "{% if add_generation_prompt %}bot: {% endif %}",
            "expected its generation prompt 'bot: '",
        ),
        (
            "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content[0].text }} {% endif %}"
            "{% endfor %}",
            "'Q A ' is not in 'Q B '",
        ),
    ],
    ids=["no answers", "rewritten", "another prompt", "answers forgotten"],
)
def test_templates_that_hide_the_answers(template, message):
    with pytest.raises(ValueError, match="chat template.*" + message) as caught:
        answer_pieces(conversation("Q", "A", "B", "C"), render(template), {"<eos>"})
    assert not isinstance(caught.value, BadSampleError)


def test_an_unanswered_question_and_a_template_that_refuses(processor, media):
    with pytest.raises(BadSampleError, match="there is no answer"):
        answer_pieces(conversation("Q"), render(FORMS["no end but a line"][0]), set())
    refusing = Spa3VLMProcessor(
        processor.image_processor,
        processor.tokenizer,
        "{{ raise_exception('no system prompts') }}",
        spatial_options={"size": SIZE},
    )
    with pytest.raises(BadSampleError, match="set, record 1 is not for this VLM's chat template: no system prompts"):
        SFTCollator(refusing)([data(MIXED, media)[1]])
    refusing.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SFTCollator(refusing)


BAD = {
    "damaged.png": (record("<image>w11", "w12", image="damaged.png"), r"damaged.png\) cannot be decoded"),
    "missing.png": (record("<image>w11", "w12", image="missing.png"), "missing.png does not exist"),
    "missing video": (record("<video>w11", "w12", video="missing.mp4"), "missing.mp4 does not exist"),
    "no frames": (record("<video>w11", "w12", video="no_frames"), "no_frames"),
    "too few pictures": (record("<image><image>w11", "w12", image="0.png"), "expected <image> 1 times"),
    "shapes": (record("<image><image>w11", "w12", image=["0.png", "flat.png"]), "expected views of one shape"),
    "too long": (record("w11 " * 300, "w12"), "expected at most max_length = 260 .nothing is cut off"),
    "too many views": (record("<image>" * 6 + "w11", "w12", image=["0.png"] * 6), "of them visual; .*nothing is cut"),
    "nothing said": (record(), "expected a list of at least two turns"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_raised_or_left_out_and_named(processor, media, kind):
    bad, message = BAD[kind]
    samples = data([MIXED[0], bad, MIXED[1]], media)
    with pytest.raises(BadSampleError, match=message) as caught:
        SFTCollator(processor, max_length=260)(samples)
    assert "set, record 1" in str(caught.value)
    batch = SFTCollator(processor, max_length=260, on_bad_sample="skip")(samples)
    good = SFTCollator(processor)([samples[0], samples[2]])
    assert batch.pop("bad_samples") == [str(caught.value)] and good.pop("bad_samples") == []
    assert_same(batch, good)


def assert_same(batch: dict, other: dict) -> None:
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        assert all(torch.equal(one, two) for one, two in zip(value, other[name], strict=True)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_pictures_goes_through_the_same_modules(processors, media, family):
    """The white picture changes nothing that is learnt of the others."""
    processor = processors[family]
    skipping = SFTCollator(processor, on_bad_sample="skip")
    text = skipping([data(MIXED, media)[1]])
    assert (text["labels"][1] == -100).all() and len(text["spatial_pixel_values"]) == 1
    assert runs_of(text["labels"][0], processor.tokenizer) == ["w22 <eos>", "w23 w24 w25 <eos>"]
    nothing = skipping(data([BAD["missing.png"][0]], media))
    assert (nothing["labels"] == -100).all() and len(nothing["bad_samples"]) == 1 and len(nothing["labels"]) == 1

    model = get_spa3_vlm(tiny_vlm(family), None, Spa3AdapterConfig(spatial_hidden_size=4)).train()
    inputs = {name: text[name] for name in text.keys() - {"bad_samples", "spatial_pixel_values", "labels"}}
    logits = model(**inputs, spatial_latents=[torch.ones(3, 4)]).logits
    learnt = text["labels"][0, 1:] != -100
    logits[0, :-1][learnt].logsumexp(-1).sum().backward()
    for parameter in model.adapter.parameters():  # has a part in it, of which nothing is learnt
        assert parameter.grad is not None and not parameter.grad.any()
    alone = {"input_ids": text["input_ids"][:1], "attention_mask": text["attention_mask"][:1]}
    if "token_type_ids" in inputs:
        alone["token_type_ids"] = inputs["token_type_ids"][:1]
    expected = model(**alone).logits[0, :-1][learnt]
    torch.testing.assert_close(logits[0, :-1][learnt], expected, rtol=1e-4, atol=1e-4)


def test_latents_that_are_known_take_the_place_of_pixels(processor, media, tmp_path):
    cache = LatentCache(tmp_path, "encoder", "float32")
    samples = data(MIXED, media)
    first = SFTCollator(processor, cache=cache)(samples)
    assert first["spatial_latents"] == [None] * 3 and len(set(first["spatial_keys"])) == 3
    latents = torch.randn(5, 4)
    cache.save(first["spatial_keys"][1], latents)
    later = SFTCollator(processor, cache=cache)(samples)
    assert later["spatial_keys"] == first["spatial_keys"]
    assert later["spatial_pixel_values"][1] is None and torch.equal(later["spatial_latents"][1], latents)
    for place in (0, 2):
        assert later["spatial_latents"][place] is None
        assert torch.equal(later["spatial_pixel_values"][place], first["spatial_pixel_values"][place])


def sampler(samples: InstructionData, batch: int = 2, batches: int = 1, seed: int = 0) -> LengthGroupedBatchSampler:
    return LengthGroupedBatchSampler(samples, EstimatedLengths(samples, 10, 3), batch, batches, seed)


def test_batches_hold_samples_of_like_lengths(media):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 100, 64).tolist()
    samples = data([record("x" * 4 * length, "y" * 4) for length in lengths], media)
    batches = list(sampler(samples, batch=4, batches=2))
    assert len(batches) == 16 == len(sampler(samples, batch=4, batches=2))
    assert sorted(number for batch in batches for number in batch) == list(range(64))
    spread = np.mean([np.ptp([lengths[number] for number in batch]) for batch in batches])
    assert spread < 0.2 * np.mean([np.ptp(generator.permutation(lengths)[:4]) for _ in range(100)])
    of_steps = [np.mean([lengths[number] for number in batch]) for batch in batches[::2]]
    assert of_steps != sorted(of_steps)  # long and short ones in random order


def test_batches_depend_on_seed_and_epoch_alone(media):
    samples = data([record("x" * number, "y") for number in range(1, 12)], media)
    one = sampler(samples, batch=2, batches=2)
    assert one.steps_per_epoch == 3 and len(one) == 6
    first = list(one)
    assert first == list(one) == list(sampler(samples, batch=2, batches=2))
    # The last step is filled with one that the epoch has already had.
    assert sorted(set(number for batch in first for number in batch)) == list(range(11))
    one.set_epoch(1)
    assert list(one) != first and list(sampler(samples, batch=2, batches=2, seed=1)) != first
    few = data([record("x", "y")], media)
    assert list(sampler(few, batch=3)) == [[0, 0, 0]]
    with pytest.raises(ValueError, match="samples_per_batch is 0"):
        sampler(samples, batch=0)


def test_lengths_are_told_without_opening_pictures(media):
    samples = data([*MIXED, record("<video>" + "x" * 40, "y" * 8, video="missing.mp4"), record()], media)
    lengths = EstimatedLengths(samples, 10, 3)
    assert [lengths(number) for number in range(6)] == [10 + 2 + 1, 3, 31, 23, 30 + 10 + 2, 0]


def test_tokens_per_view(processors):
    # 28 x 28 pixels in patches of 2, merged by 2.
    assert SFTCollator(processors["qwen2_5_vl"]).tokens_per_view() == 49
    assert SFTCollator(processors["gemma3"]).tokens_per_view() == 4


def test_a_loader_with_workers(processor, media):
    samples = data(MIXED * 2, media)
    collator = SFTCollator(processor)
    loaders = [
        DataLoader(samples, batch_sampler=sampler(samples), collate_fn=collator, num_workers=workers)
        for workers in (0, 1)
    ]
    for one, other in zip(*loaders, strict=True):
        assert_same({**one, "bad_samples": []}, {**other, "bad_samples": []})
        assert (one["labels"] == EOS).any(1).sum() == 2
