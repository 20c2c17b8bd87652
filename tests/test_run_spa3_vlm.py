"""The training script of Spa3-VLM, through its command line, on tiny models."""

import json
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from script_runs import TRAINING, assert_same_weights, finish, load_script, losses, start_script
from tiny_models import tiny_spa3r
from tiny_processors import tiny_vlm_folder
from tiny_vlms import tiny_vlm
from transformers import AutoModelForImageTextToText

from spa3r_hf import Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor
from spa3r_hf.errors import BadSampleError
from spa3r_hf.instruction_data import InstructionData, InstructionSet
from spa3r_hf.sft_data import SFTCollator


pytest.importorskip("accelerate")
RECIPES = TRAINING / "recipes"
ADAPTER = "adapter_model.safetensors"
# 13 records: an epoch of 4 steps of 4, saved in its midst and in that of the next.
STEPS = {"max_steps": 9, "save_steps": 3, "logging_steps": 2, "learning_rate": 1e-2}
BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def script():
    return load_script("run_spa3_vlm")


def record(*texts: str, **media) -> dict:
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
        **media,
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny VLM, `vlm`, a tiny encoder, `encoder`, and records about pictures, a video and nothing."""
    work = tmp_path_factory.mktemp("spa3_vlm")
    tiny_vlm("qwen2_5_vl").save_pretrained(work / "vlm")
    tiny_vlm_folder("qwen2_5_vl", work / "vlm")
    tiny_spa3r().spa3r.save_pretrained(work / "encoder")
    Spa3RImageProcessor(size=28).save_pretrained(work / "encoder")
    generator = np.random.default_rng(0)
    (work / "frames").mkdir()
    for path in [*(work / f"{number}.png" for number in range(4)), *(work / f"frames/{i}.png" for i in range(5))]:
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    pictures = [record(f"<image> w{20 + number}", f"w{30 + number}", image=f"{number}.png") for number in range(4)] + [
        record(f"<image><image> w{20 + i}", f"w{i}", "w12", "w13", images=["0.png", f"{i}.png"]) for i in range(1, 4)
    ]
    (work / "pictures.json").write_text(json.dumps(pictures))
    others = [record("<video> w40 w41", "w42", video="frames"), record("<video> w43", "w44 w45", video="frames")]
    others += [record(f"w{number} " * 9, f"w{number + 1}") for number in range(50, 58)]
    (work / "others.jsonl").write_text("\n".join(map(json.dumps, others)))
    held_out = [record(f"<image> w{20 + number}", f"w{30 + number}", image=f"{number}.png") for number in range(3)]
    held_out += [
        record("<video> w40", "w42 " * 9, video="frames"),
        record("w43", "4", question_type="object_counting"),
    ]
    (work / "held_out.json").write_text(json.dumps(held_out))
    return work


def flags(work: Path, output: str, **options) -> list[str]:
    settings = {
        **{"vlm_name_or_path": work / "vlm", "spatial_encoder_name_or_path": work / "encoder"},
        **{"data": [work / "pictures.json", f"{work / 'others.jsonl'}%60"], "output_dir": work / output},
        **{"use_cpu": True, "max_frames": 4, **STEPS, **BATCH, **options},
    }
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]


start = partial(start_script, "run_spa3_vlm")


@pytest.fixture(scope="module")
def finished(work) -> tuple[Path, str]:
    """A run by recipe, never interrupted, and what it printed."""
    recipe = {"train": "lora", "lora_r": 2, "lora_dropout": 0.1, "max_steps": 99, "seed": 3}
    (work / "recipe.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    output = finish(start([str(work / "recipe.yaml"), *flags(work, "finished", latents_dir=work / "latents")]))
    return work / "finished", output


def test_what_a_run_leaves(finished, work):
    folder, output = finished
    names = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
    assert {"adapter_config.json", ADAPTER, "README.md", "run.json", "tokenizer.json"} <= names
    assert not {"model.safetensors", "vlm", "spatial_encoder"} & names  # what is not trained is not saved
    keys = load_file(folder / ADAPTER).keys()
    assert all(key.startswith(("spatial_adapter.", "lora.")) for key in keys) and any("lora." in key for key in keys)
    assert load_file(folder / "checkpoint-3" / ADAPTER).keys() == keys
    assert not list(folder.rglob("vlm"))

    run = json.loads((folder / "run.json").read_text())
    assert run["steps"] == 9 and run["bad_samples"] == {} and run["trained"] == "lora"
    assert run["data"][1].startswith("6 of 10 records of")
    history = losses(folder / "checkpoint-9")
    logged = [entry for entry in history if "loss" in entry]
    assert logged[-1]["loss"] < logged[0]["loss"] and run["loss"] == logged[-1]["loss"]
    assert all(0 <= entry["token_accuracy"] <= 1 for entry in logged)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None and str(work) not in card.text  # these folders are nobody else's
    assert f"{run['loss']:.4f}" in card.text and run["vlm"] == "vlm"
    assert "parameters are trained" in output and "Traceback" not in output
    assert len(list((work / "latents").rglob("*.safetensors"))) == 4 + 3 + 1 + 1  # the white picture, too

    model = Spa3VLM.from_pretrained(folder)
    processor = Spa3VLMProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": str(work / "1.png")}, {"type": "text", "text": " w21"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    )
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_killed_run_goes_on_bit_for_bit(finished, work):
    """Killed in the midst of an epoch, it goes on with workers, across its end; what was not cached now is."""
    folder, _ = finished
    options = {"latents_dir": work / "latents", "dataloader_num_workers": 1}
    arguments = [str(work / "recipe.yaml"), *flags(work, "killed", **options)]
    process = start(arguments)
    state = work / "killed" / "checkpoint-3" / "trainer_state.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (work / "killed" / "checkpoint-9").exists()
    finish(start([*arguments, "--resume_from_checkpoint", "last"]))
    assert losses(work / "killed" / "checkpoint-9") == losses(folder / "checkpoint-9")
    for name in ("checkpoint-9", "."):
        assert_same_weights(work / "killed" / name / ADAPTER, folder / name / ADAPTER)


def test_two_processes_are_as_one_with_twice_the_batches(script, work):
    """Text alone in one process, pictures in the other; the whole VLM is trained, its merger as well."""
    options = {"train_merger": True, "max_steps": 4, "save_steps": 2, "seed": 1, "learning_rate": 1e-3}
    options |= {"eval_data": work / "held_out.json", "eval_strategy": "steps", "eval_steps": 2}
    process = start(flags(work, "two", **options, gradient_accumulation_steps=1), processes=2)
    script.main(flags(work, "one", **options))
    output = finish(process)
    assert output.count("the last loss is") == 1  # only one of them speaks
    for name in (ADAPTER, "vlm/model.safetensors"):
        assert_same_weights(work / "two" / name, work / "one" / name, rtol=1e-3, atol=1e-4)
    for one, other in zip(losses(work / "two/checkpoint-4"), losses(work / "one/checkpoint-4"), strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)
        assert one.get("eval_loss", 0) == pytest.approx(other.get("eval_loss", 0), rel=1e-4)
    scores = [json.loads((work / name / "eval.json").read_text()) for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4) and "exact_match" in scores[0]

    # What was trained is what was to be, and goes on from where it was.
    before, after = (load_file(folder / "model.safetensors") for folder in (work / "vlm", work / "one" / "vlm"))
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    frozen = {key for key in before if "visual" in key and "merger" not in key}
    assert frozen and not moved & frozen and moved == before.keys() - frozen
    script.main(flags(work, "resumed", **options, resume_from_checkpoint=work / "one" / "checkpoint-2"))
    assert_same_weights(work / "resumed" / "vlm/model.safetensors", work / "one" / "vlm/model.safetensors")
    assert_same_weights(work / "resumed" / ADAPTER, work / "one" / ADAPTER)


def test_scores_while_it_trains(script, work):
    """They are those of the model at that time, and being scored changes nothing."""
    options = {"train": "lora", "lora_r": 2, "lora_dropout": 0.2, "max_steps": 4, "save_strategy": "no"}
    scored = {"eval_data": work / "held_out.json", "eval_strategy": "steps", "eval_steps": 2}
    scored |= {"per_device_eval_batch_size": 2}
    script.main(flags(work, "unscored", **options))
    script.main(flags(work, "scored", **options | scored | {"save_strategy": "steps", "save_steps": 2}))
    assert_same_weights(work / "unscored" / ADAPTER, work / "scored" / ADAPTER)
    assert not (work / "unscored" / "eval.json").exists()

    history = losses(work / "scored/checkpoint-4")
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    scores = json.loads((work / "scored" / "eval.json").read_text())
    assert {name: evaluations[1][f"eval_{name}"] for name in scores} == scores
    assert scores.keys() >= {"loss", "token_accuracy", "exact_match", "object_counting", "overall"}
    for checkpoint, entry in zip((2, 4), evaluations, strict=True):
        model = Spa3VLM.from_pretrained(work / f"scored/checkpoint-{checkpoint}")
        assert entry["eval_loss"] == pytest.approx(loss_by_hand(model, work), rel=1e-5)
    card = (work / "scored" / "README.md").read_text()
    assert f"{scores['loss']:.4f}" in card and f"{scores['exact_match']:.1f}" in card


def loss_by_hand(model: Spa3VLM, work: Path) -> float:
    """Mean over all answers' tokens of the records held out, one record at a time."""
    processor = Spa3VLMProcessor.from_pretrained(work / "scored")
    data = InstructionData([InstructionSet.open(str(work / "held_out.json"))])
    total = count = 0
    for number in range(len(data)):
        batch = SFTCollator(processor)([data[number]])
        labels, batch = batch.pop("labels"), {key: value for key, value in batch.items() if key != "bad_samples"}
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1][labels[:, 1:] != -100]
        total += float(torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_the_best_checkpoint_is_kept(script, work):
    """Where the greatest loss is the best, that is an early one."""
    options = {"max_steps": 3, "save_steps": 1, "eval_data": f"{work / 'held_out.json'}%60"}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    script.main(flags(work, "best", **options, metric_for_best_model="loss"))
    evaluations = [entry["eval_loss"] for entry in losses(work / "best/checkpoint-3") if "eval_loss" in entry]
    best = 1 + evaluations.index(max(evaluations))
    assert best < 3 and len(evaluations) == 3
    for name in (ADAPTER, "vlm/model.safetensors"):
        assert_same_weights(work / "best" / name, work / f"best/checkpoint-{best}" / name)
    assert json.loads((work / "best" / "eval.json").read_text())["loss"] == pytest.approx(max(evaluations), rel=1e-6)


def test_the_adapter_alone_by_either_way_of_integration(script, work):
    for options in ({"integration": "append"}, {"spatial_features": "backbone"}):
        name = next(iter(options.values()))
        script.main(flags(work, name, train="adapter", max_steps=2, save_strategy="no", **options))
        config = json.loads((work / name / "adapter_config.json").read_text())
        assert options.items() <= config.items() and config["lora_config"] is None
        assert all(key.startswith("spatial_adapter.") for key in load_file(work / name / ADAPTER))
        model = Spa3VLM.from_pretrained(work / name)
        base = AutoModelForImageTextToText.from_pretrained(work / "vlm")
        assert all(torch.equal(one, two) for one, two in zip(model.vlm.parameters(), base.parameters(), strict=True))
    # An adapter that was trained is trained on.
    script.main(
        flags(work, "more", train="adapter", max_steps=1, save_strategy="no", adapter_name_or_path=work / "append")
    )
    config = json.loads((work / "more" / "adapter_config.json").read_text())
    assert config["integration"] == "append"
    with pytest.raises(ValueError, match="trained = 'lora', but the adapter has no LoRA"):
        script.main(flags(work, "no", train="lora", adapter_name_or_path=work / "append"))
    with pytest.raises(ValueError, match="spatial_features = backbone is for a new adapter; .*append has latents"):
        script.main(flags(work, "no", spatial_features="backbone", adapter_name_or_path=work / "append"))


def test_bad_samples_stop_a_run_or_are_named(script, work, caplog):
    bad = [
        record("<image> w11", "w12", image="missing.png"),
        record("<image><image> w11", "w12", image="0.png"),
        record("<image> w11", "w12", image="0.png"),
        record("w11 " * 200, "w12"),
    ]
    (work / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)) + "\n{")
    options = {"data": [work / "bad.jsonl"], "max_steps": 3, "train": "adapter", "max_length": 150}
    options |= {"save_strategy": "no", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(BadSampleError, match="bad.jsonl, "):
        script.main(flags(work, "raised", **options | {"max_steps": 5}))
    script.main(flags(work, "skipped", **options | {"max_steps": 5}, on_bad_sample="skip"))
    run = json.loads((work / "skipped" / "run.json").read_text())
    assert sorted(run["bad_samples"].values()) == [1] * 4 and run["steps"] == 5
    messages = "\n".join(run["bad_samples"])
    for part in ("line 1", "missing.png does not exist", "line 2", "expected <image> 1 times", "line 4", "max_length"):
        assert part in messages
    assert "line 5 is no JSON" in messages and "4 bad samples were left out" in caplog.text
    assert f"left out 1 times: {next(iter(run['bad_samples']))}" in (work / "skipped" / "README.md").read_text()


def test_bad_samples_of_an_evaluation_are_named(script, work):
    bad = [record("<image> w11", "w12", image="missing.png"), record("<image> w11", "w12", image="0.png")]
    (work / "bad_held_out.json").write_text(json.dumps(bad))
    options = {"train": "adapter", "max_steps": 1, "save_strategy": "no", "eval_data": work / "bad_held_out.json"}
    with pytest.raises(BadSampleError, match="missing.png"):
        script.main(flags(work, "bad_evaluation", **options))
    script.main(flags(work, "bad_evaluation", **options, on_bad_sample="skip"))
    (message,) = json.loads((work / "bad_evaluation" / "run.json").read_text())["bad_samples"]
    assert "bad_held_out.json, record 0" in message and "missing.png does not exist" in message
    assert "exact_match" in json.loads((work / "bad_evaluation" / "eval.json").read_text())


def test_bf16(script, work):
    options = {"train": "adapter", "bf16": True, "dtype": "bfloat16", "max_steps": 2, "save_strategy": "no"}
    script.main(flags(work, "bf16", **options))
    weights = load_file(work / "bf16" / ADAPTER)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in weights.values())


def test_mistakes_are_named(script, finished, work, tmp_path):
    with pytest.raises(FileExistsError, match="finished holds the checkpoints of another run.*last"):
        script.main(flags(work, "finished"))
    with pytest.raises(FileNotFoundError, match="nothing-here holds no checkpoint to resume from"):
        script.main(flags(work, "nothing-here", resume_from_checkpoint="last"))
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        script.main(flags(work, "no", data=["nowhere.json%25"]))
    with pytest.raises(ValueError, match="no data to train on; expected --data as well"):
        script.parse_arguments(["--eval_data", "a.json"])
    with pytest.raises(ValueError, match="eval_strategy"):
        script.main(flags(work, "no", eval_strategy="steps", eval_steps=1))
    with pytest.raises(ValueError, match="expected modules of the language model"):
        script.main(flags(work, "no", train="lora", lora_target_modules=["nothing_proj"]))
    (tmp_path / "a.yaml").write_text("integrations: append")
    with pytest.raises(ValueError, match=r"a.yaml has unknown arguments \['integrations'\]"):
        script.parse_arguments([str(tmp_path / "a.yaml")])


def test_configurations_for_accelerate_are_read():
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(RECIPES / "accelerate_fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    for stage in (2, 3):
        config = load_config_from_file(str(RECIPES / f"accelerate_zero{stage}.yaml"))
        assert config.deepspeed_config["zero_stage"] == stage and config.mixed_precision == "bf16"


def test_recipes_of_the_repository_are_read(script):
    for recipe in RECIPES.glob("spa3_vlm_*.yaml"):
        arguments = [str(recipe), "--use_cpu", "--bf16", "false", "--data", "a.json", "b.json%25"]
        model, data, _, args = script.parse_arguments(arguments)
        assert data.data == ["a.json", "b.json%25"] and args.learning_rate == 1e-5
        assert model.train == "language_model" and (data.min_frames, data.max_frames) == (4, 8)
