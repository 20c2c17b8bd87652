"""The nano VLM's parts, questions about rooms as instruction data, and the comparison on them, end to end."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from script_runs import load_script
from tiny_models import tiny_spa3r
from transformers import AutoModelForImageTextToText, AutoTokenizer

from spa3r_hf import Spa3RImageProcessor, Spa3VLMProcessor
from spa3r_hf.instruction_data import InstructionData, InstructionSet, messages_of
from spa3r_hf.nano_vlm import fresh_nano_vlm, save_nano_vlm, train_tokenizer
from spa3r_hf.rooms_instructions import RoomInstructions, room_instructions
from spa3r_hf.sft_data import SFTCollator
from spa3r_hf.spa3_vlm_comparison import comparison_table, pick_evenly, score_answers, score_guessing


for package in ("embreex", "evaluate", "accelerate"):
    pytest.importorskip(package)
SIZES = {"num_rooms": 3, "num_eval_rooms": 2, "image_size": 56, "num_frames": 12, "most": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nano")


@pytest.fixture(scope="module")
def rooms(work) -> RoomInstructions:
    return room_instructions(work / "rooms", **SIZES)


def test_rooms_as_instruction_data(rooms, work):
    names = [{question.scene_name for question in part} for part in (rooms.train, rooms.held_out)]
    assert names[0] <= {f"room_{seed:06d}" for seed in range(3)} and not names[0] & names[1]
    record = rooms.records(rooms.train)[0]
    first = messages_of(record, Path(), "r")
    assert first[0]["content"][0] == {"type": "video", "video": str(rooms.frames / rooms.train[0].scene_name)}
    assert first[1]["content"][0]["text"] == rooms.train[0].ground_truth
    assert len(list(Path(record["video"]).glob("*.png"))) == 12
    before = {path: path.stat().st_mtime_ns for path in (work / "rooms").rglob("*")}
    again = room_instructions(work / "rooms", **SIZES)
    assert again == rooms and before == {path: path.stat().st_mtime_ns for path in (work / "rooms").rglob("*")}


def test_questions_that_follow_each_other(rooms):
    records = rooms.records(rooms.train, per_conversation=3)
    turns = [turn for record in records for turn in record["conversations"]]
    asked = Counter(turn["value"].removeprefix("<video>") for turn in turns)
    alone = rooms.records(rooms.train)
    assert asked == Counter(turn["value"].removeprefix("<video>") for r in alone for turn in r["conversations"])
    assert max(len(record["conversations"]) for record in records) == 6
    for record in records:
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<video>") and sum("<video>" in value for value in values) == 1


def test_the_tokenizer_spells_numbers_out(rooms):
    texts = [turn["value"] for record in rooms.records(rooms.train) for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts, 600)
    assert len(tokenizer) <= 600
    for text in (*texts[:5], "Ünseen 𝔘nicode <b>", "3.75 m"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("12.5") == ["1", "2", ".", "5"]
    # Whole words are tokens.
    tokenizer = train_tokenizer(texts)
    assert all(len(tokenizer(text)["input_ids"]) < 0.4 * len(text) for text in texts if len(text) > 50)


def test_a_fresh_vlm_is_small_and_can_be_trained_on(rooms, work):
    texts = [turn["value"] for record in rooms.records(rooms.train) for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    model = fresh_nano_vlm(tokenizer)
    save_nano_vlm(work / "fresh", model, tokenizer)
    assert sum(path.stat().st_size for path in (work / "fresh").iterdir()) < 4e6
    loaded = AutoModelForImageTextToText.from_pretrained(work / "fresh", dtype="float32")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)  # rounded, both
    processor = Spa3VLMProcessor.from_vlm(work / "fresh", Spa3RImageProcessor(size=56), max_frames=4)
    data = InstructionData([InstructionSet("rooms", rooms.records(rooms.train, 2))])
    batch = SFTCollator(processor)([data[0], data[1]])
    assert SFTCollator(processor).tokens_per_view() == 4
    tokenizer = AutoTokenizer.from_pretrained(work / "fresh")
    for row, number in zip(batch["labels"], (0, 1), strict=True):
        answers = [
            message["content"][0]["text"] for message in data[number].messages() if message["role"] == "assistant"
        ]
        learnt = tokenizer.decode(row[row != -100])
        assert learnt == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_scores_and_their_table(rooms):
    right = score_answers(rooms.held_out, [question.ground_truth for question in rooms.held_out])
    assert right["overall"] == 100 and score_answers(rooms.held_out, [""] * len(rooms.held_out))["overall"] == 0
    guessed = score_guessing(rooms.train, rooms.held_out)
    assert guessed.keys() == {"constant", "question_only"}
    for scores in guessed.values():
        assert 0 < scores["overall"] < 100 and "object_rel_direction" in scores
    lines = comparison_table({**guessed, "base": right}).splitlines()
    assert len(lines) == 5 and "100.0" in lines[-1] and f"{guessed['constant']['overall']:.1f}" in lines[2]
    few = pick_evenly(rooms.held_out, 10)
    assert set(Counter(question.question_type for question in few).values()) == {1}


def test_the_scripts_without_data(work, monkeypatch):
    """Build the VLM, then compare the ways to give it the scene: what a newcomer types first, with small sizes."""
    monkeypatch.chdir(work)
    tiny_spa3r().spa3r.save_pretrained("encoder")
    Spa3RImageProcessor(size=56).save_pretrained("encoder")
    shared = ["--num_rooms", "3", "--num_eval_rooms", "2", "--image_size", "56", "--questions_per_type", "2"]
    shared += ["--rooms_dir", "rooms", "--num_workers", "1", "--eval_questions", "10", "--max_steps", "2", "--use_cpu"]
    shared += ["--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
    load_script("build_nano_vlm").main([*shared, "--vlm_dir", "nano-vlm"])
    assert {"README.md", "eval.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in Path("nano-vlm").iterdir()
    }
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").state_dict()
        for folder in ("outputs/nano-vlm/fresh", "nano-vlm")
    )
    assert not torch.equal(
        before["model.visual.patch_embed.proj.weight"], after["model.visual.patch_embed.proj.weight"]
    )

    script = load_script("run_spa3_vlm")
    models = ["--vlm_name_or_path", "nano-vlm", "--spatial_encoder_name_or_path", "encoder"]
    script.main([*shared, *models, "--output_dir", "comparison"])
    results = json.loads(Path("comparison/eval.json").read_text())
    trained = ["base", "vggt", "append", "cross_attention"]
    assert list(results) == ["constant", "question_only", "untrained", *trained]
    for name in trained:
        config = json.loads(Path(f"comparison/{name}/adapter_config.json").read_text())
        assert config["integration"] == ("append" if name == "append" else "cross_attention")
        assert config["spatial_features"] == ("backbone" if name == "vggt" else "latents")
        answers = [json.loads(line) for line in Path(f"comparison/{name}/answers.jsonl").read_text().splitlines()]
        assert {"question_type", "ground_truth", "answer"} <= answers[0].keys()
        assert "(question alone)" in Path(f"comparison/{name}/README.md").read_text()
    with pytest.raises(ValueError, match=r"variants has \['none'\]; expected some of"):
        script.main([*shared, *models, "--variants", "none"])
    with pytest.raises(ValueError, match="expected --data for anything else"):
        script.main([*shared, *models, "--resume_from_checkpoint", "comparison"])
