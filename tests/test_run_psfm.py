"""The training script, through its command line."""

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from script_runs import TRAINING, assert_same_weights, finish, load_script, losses, start_script
from tiny_models import tiny_spa3r_config
from transformers import AutoModel

from spa3r_hf import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r_hf.errors import BadSampleError
from spa3r_hf.run_facts import shown_command
from spa3r_hf.shown_names import shown_text


pytest.importorskip("accelerate")
TRAINED = "model-trained.safetensors"
# An epoch of 8 steps, saved in its midst and in that of the next; logs fall together with neither.
STEPS = {"max_steps": 12, "save_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 6}
BATCHES = {"images_per_batch": 72, "min_views": 4, "max_views": 6}


@pytest.fixture(scope="module")
def script():
    return load_script("run_psfm")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny configuration, `config`, and eight scenes of six pictures, `scenes`."""
    folder = tmp_path_factory.mktemp("psfm")
    tiny_spa3r_config().save_pretrained(folder / "config")
    Spa3RImageProcessor(size=28, patch_size=14).save_pretrained(folder / "config")
    generator = np.random.default_rng(0)
    for scene in range(8):
        (folder / "scenes" / f"scene{scene}").mkdir(parents=True)
        for view in range(6):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "scenes" / f"scene{scene}" / f"{view}.jpg")
    return folder


def flags(work: Path, output: str, **options) -> list[str]:
    settings = {"config_name": work / "config", "data_dir": work / "scenes", "output_dir": work / output}
    settings |= {"use_cpu": True, **options}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


start = partial(start_script, "run_psfm")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TRAINED)


def assert_same_models(one: Path, other: Path, **tolerance: float) -> None:
    assert_same_weights(one / TRAINED, other / TRAINED, **tolerance)


@pytest.fixture(scope="module")
def finished(work) -> tuple[Path, str]:
    """A run by recipe, never interrupted, and what it printed."""
    recipe = work / "recipe.yaml"
    settings = {**STEPS, **BATCHES, "gradient_accumulation_steps": 2, "report_to": ["tensorboard"], "seed": 3}
    lines = [f"{name}: {json.dumps(value)}" for name, value in {**settings, "max_steps": 999}.items()]
    recipe.write_text("# flags override\n" + "\n".join(lines) + "\nlr_scheduler_kwargs:\n  min_lr_rate: 0.5\n")
    output = finish(start([str(recipe), *flags(work, "finished", max_steps=12)]))
    return work / "finished", output


def test_what_a_run_leaves(finished, work):
    folder, output = finished
    scores = json.loads((folder / "eval.json").read_text())
    keys = {f"{kind}_{key}" for kind in ("geometric", "semantic") for key in ("cosine", "centred_cosine", "l1")}
    assert keys < scores.keys() and scores["baselines"].keys() == {"mean", "nearest_context", "other_scene"}
    assert keys == scores["baselines"]["nearest_context"].keys() == scores["baselines"]["other_scene"].keys()
    assert scores["num_scenes"] == 2

    card = ModelCard.load(folder / "README.md")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {key: round(scores[key], 4) for key in keys}
    # Whose pictures these are is not known.
    assert card.data.license is None and card.data.library_name == "transformers"
    assert "depends on scenes, whose licence is not known here" in card.text
    for row in (scores, *scores["baselines"].values()):
        assert f"{row['geometric_cosine']:.3f}" in card.text and f"{row['geometric_cosine']:.3f}" in output
    assert "random weights" in card.text

    run = json.loads((folder / "run.json").read_text())
    assert run["steps"] == 12 and run["seed"] == 3 and run["bad_samples"] == {} and run["num_train_scenes"] == 6
    assert " recipe.yaml " in run["command"] and str(work) not in run["command"] + card.text
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert pictures == {"scene_0.png", "scene_1.png", "loss.png", "scores.png"}
    for name in pictures:
        with Image.open(folder / "pictures" / name) as picture:
            assert np.asarray(picture).std() > 5
    assert list(folder.rglob("events.out.tfevents*"))

    history = losses(folder / "checkpoint-12")
    evaluations = [record for record in history if "eval_geometric_cosine" in record]
    assert [record["step"] for record in evaluations] == [6, 12]
    assert evaluations[-1]["eval_geometric_cosine"] == scores["geometric_cosine"]
    rates = [record["learning_rate"] for record in history if "loss" in record]
    assert min(rates) >= 0.5 * 2e-3 * 0.99 or rates.index(min(rates)) == 0  # from the recipe; the warm-up is lower
    assert all(record["loss"] > 0 for record in history if "loss" in record)
    assert "Writing model shards" not in output and "Traceback" not in output

    model = Spa3RForPreTraining.from_pretrained(folder)
    processor = Spa3RImageProcessor.from_pretrained(folder)
    assert processor.size == 28
    pixels = processor([Image.new("RGB", (40, 40), "red")] * 2, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(folder)(**pixels).latents, model.spa3r(**pixels).latents)


def test_a_killed_run_goes_on_bit_for_bit(finished, work):
    """Killed in the midst of an epoch, it goes on with workers, across the end of the epoch."""
    folder, _ = finished
    shutil.copy(work / "recipe.yaml", work / "killed.yaml")
    arguments = [str(work / "killed.yaml"), *flags(work, "killed", max_steps=12, dataloader_num_workers=1)]
    process = start(arguments)
    state = work / "killed" / "checkpoint-5" / "trainer_state.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (work / "killed" / "checkpoint-10").exists() and not (work / "killed" / "eval.json").exists()
    (work / "killed" / "checkpoint-7").mkdir()  # one whose writing was cut short
    finish(start([*arguments, "--resume_from_checkpoint", "last"]))
    assert losses(work / "killed" / "checkpoint-12") == losses(folder / "checkpoint-12")
    for name in ("checkpoint-10", "checkpoint-12", "."):
        assert_same_models(work / "killed" / name, folder / name)
    assert (work / "killed" / "eval.json").read_text() == (folder / "eval.json").read_text()


def test_two_processes_are_as_one_with_twice_the_batches(finished, work):
    folder, _ = finished
    arguments = [str(work / "recipe.yaml"), "--max_steps", "12", "--gradient_accumulation_steps", "1"]
    output = finish(start(arguments + flags(work, "two"), processes=2))
    assert output.count("geometric cosine") == 1  # only one of them speaks
    assert_same_models(work / "two", folder, rtol=1e-3, atol=1e-4)
    assert load_file(work / "two" / "model-frozen.safetensors").keys()
    frozen = [(work / name / "model-frozen.safetensors").read_bytes() for name in ("two", "finished")]
    assert frozen[0] == frozen[1]
    for one, other in zip(losses(work / "two" / "checkpoint-12"), losses(folder / "checkpoint-12"), strict=True):
        assert one["step"] == other["step"] and one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-3)
    assert json.loads((work / "two" / "run.json").read_text())["command"].startswith("torchrun --nproc_per_node 2")

    if Version(transformers.__version__) < Version("5.18"):
        return  # there, two processes without accelerators cannot load the optimizer
    # Two processes go on in the midst of the second epoch, in another folder.
    checkpoint = work / "two" / "checkpoint-10"
    finish(start(arguments + flags(work, "two-resumed", resume_from_checkpoint=checkpoint), processes=2))
    assert_same_models(work / "two-resumed", work / "two")
    assert (work / "two-resumed" / "model-frozen.safetensors").read_bytes() == frozen[0]


def test_two_processes_of_a_stream_with_damaged_scenes(script, work, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        for scene in range(12):
            files = sorted((work / "scenes" / f"scene{scene % 8}").iterdir())
            images = [{"path": None, "bytes": file.read_bytes()[: 200 if scene == 9 else None]} for file in files]
            yield {"name": f"scene {scene}", "images": images}

    features = datasets.Features({"name": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    (work / "stream").mkdir()
    datasets.Dataset.from_generator(rows, features=features, cache_dir=str(work / "cache")).to_parquet(
        work / "stream" / "train.parquet"
    )
    # A sample a batch: a damaged scene leaves one of two processes with nothing.
    options = {"data_dir": work / "stream", "streaming": True, "eval_scenes": 2, "on_bad_sample": "skip"}
    options |= {"images_per_batch": 4, "min_views": 4, "max_views": 4, "max_steps": 6, "logging_steps": 1}
    options |= {"save_strategy": "no"}
    process = start(flags(work, "stream-two", **options), processes=2)
    script.main(flags(work, "stream-one", **options, gradient_accumulation_steps=2))
    output = finish(process)
    runs = [json.loads((work / name / "run.json").read_text()) for name in ("stream-one", "stream-two")]
    assert_same_models(work / "stream-two", work / "stream-one", rtol=1e-3, atol=1e-4)
    for run in runs:
        assert run["num_train_scenes"] == "a stream"
        assert sum(run["bad_samples"].values()) == 2 and "scene 9" in next(iter(run["bad_samples"]))
    assert "2 bad samples were left out" in output and "scene 'scene 9'" in output


def test_damaged_pictures_stop_a_run_or_are_named(script, work, caplog):
    scenes = work / "damaged"
    shutil.copytree(work / "scenes", scenes)
    for name in ("0.jpg", "3.jpg"):
        file = scenes / "scene1" / name
        file.write_bytes(file.read_bytes()[:300])
    options = {"data_dir": scenes, "max_steps": 2, "min_views": 6, "max_views": 6, "images_per_batch": 48}
    with pytest.raises(BadSampleError, match=r"scene 'scene1', view 0 \(.*damaged/scene1/0\.jpg\) cannot be opened"):
        script.main(flags(work, "raised", **options))
    script.main(flags(work, "skipped", **options, on_bad_sample="skip"))
    bad = json.loads((work / "skipped" / "run.json").read_text())["bad_samples"]
    ((message, times),) = bad.items()
    assert "damaged/scene1/0.jpg" in message and times > 1
    assert f"{times} bad samples were left out" in caplog.text and f"{times} x {message}" in caplog.text
    assert f"left out {times} times: {shown_text(message)}" in (work / "skipped" / "README.md").read_text()
    assert not (scenes / "scene1" / "0.jpg").read_bytes()[300:]


def test_bf16_and_a_json_recipe(script, work):
    recipe = work / "recipe.json"
    overrides = {"mask_ratio": 0.25, "targets": ["geometric"], "backbone_config": {"hidden_size": 48}}
    settings = {"max_steps": 2, "bf16": True, "save_strategy": "no", "config_overrides": overrides, **BATCHES}
    recipe.write_text(json.dumps(settings, indent="\t"))
    script.main([str(recipe), *flags(work, "bf16")])
    config = json.loads((work / "bf16" / "config.json").read_text())
    assert config["mask_ratio"] == 0.25 and config["backbone_config"]["hidden_size"] == 48
    assert config["backbone_config"]["num_hidden_layers"] == 3  # not the default
    scores = json.loads((work / "bf16" / "eval.json").read_text())
    assert np.isfinite(scores["geometric_cosine"]) and "semantic_cosine" not in scores
    assert {value.dtype for value in weights(work / "bf16").values()} == {torch.float32}


def test_one_scene_with_and_without_cameras(script, work, caplog):
    caplog.set_level("INFO")
    kitchen = work / "kitchen"
    shutil.copytree(work / "scenes" / "scene0", kitchen)
    options = {"data_dir": kitchen, "max_steps": 2, "save_strategy": "no"}
    with pytest.raises(ValueError, match="cameras = data, but kitchen has no cameras; expected cameras.npz"):
        script.main(flags(work, "none", **options, cameras="data"))
    script.main(flags(work, "without", **options))
    assert "the smallest scene has no more" in caplog.text
    poses, intrinsics = np.tile(np.eye(4), (6, 1, 1)), np.tile([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]], (6, 1, 1))
    poses[:, 0, 3] = np.arange(6)
    np.savez(kitchen / "cameras.npz", poses=poses, intrinsics=intrinsics)
    script.main(flags(work, "with", **options))
    for name, cameras in (("without", "from the backbone's camera head"), ("with", "from the data")):
        assert json.loads((work / name / "run.json").read_text())["cameras"] == cameras
        scores = json.loads((work / name / "eval.json").read_text())
        assert scores["num_scenes"] == 1 and scores["baselines"].keys() == {"mean", "nearest_context"}
        assert {path.name for path in (work / name / "pictures").iterdir()} == {
            "scene_0.png",
            "loss.png",
            "scores.png",
        }
    assert scores["camera_distance"]["units_mean"] == pytest.approx(1)


def test_procedural_rooms_are_the_default(script, work):
    pytest.importorskip("embreex")
    options = {"max_steps": 2, "num_rooms": 2, "num_eval_rooms": 1, "views_per_room": 6, "images_per_batch": 8}
    options |= {"max_views": 4, "eval_views": 4, "config_name": work / "config"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    script.main([*arguments, "--use_cpu", "--save_strategy", "no", "--output_dir", str(work / "rooms")])
    run = json.loads((work / "rooms" / "run.json").read_text())
    assert run["data"] == "procedural rooms 0 to 1" and run["cameras"] == "from the data"
    assert run["seconds"] > 0 and run["num_train_scenes"] == 2 and len(run["notes"]) == 2


def test_a_new_run_does_not_mix_with_an_old_one(script, finished, work):
    with pytest.raises(FileExistsError, match="finished holds the checkpoints of another run.*checkpoint-12.*last"):
        script.main(flags(work, "finished"))
    with pytest.raises(FileNotFoundError, match="nothing-here holds no checkpoint to resume from"):
        script.main(flags(work, "nothing-here", resume_from_checkpoint="last"))


def test_wrong_arguments_are_named(script, work, tmp_path, capsys):
    for name, content, message in (
        ("a.yaml", "max_stepz: 3", r"a.yaml has unknown arguments \['max_stepz'\]"),
        ("b.yaml", "- max_steps", r"b.yaml holds \['max_steps'\]; expected names of arguments"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            script.parse_arguments([str(tmp_path / name)])
    with pytest.raises(ValueError, match="--max_step"):
        script.parse_arguments(["--max_step", "3"])
    (tmp_path / "c.yaml").write_text("on_bad_sample: ignore")
    for arguments in (["--on_bad_sample", "ignore"], [str(tmp_path / "c.yaml")]):
        with pytest.raises(SystemExit):
            script.parse_arguments(arguments)
        assert "--on-bad-sample: invalid choice: 'ignore'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Spa3RConfig does not know .'mask_ration'"):
        script.main(flags(work, "wrong", config_overrides='{"mask_ration": 0.25}'))
    with pytest.raises(ValueError, match=r"config_overrides = '\[1\]'; expected names of settings and their values"):
        script.main(flags(work, "wrong", config_overrides="[1]"))
    AutoModel.from_config(tiny_spa3r_config().backbone_config).save_pretrained(work / "backbone")
    wider = {
        "backbone_name_or_path": work / "backbone",
        "config_overrides": '{"backbone_config": {"hidden_size": 48}}',
    }
    with pytest.raises(ValueError, match="changes sizes of teachers whose weights are given; expected one or the oth"):
        script.main(flags(work, "wrong", **wider))
    with pytest.raises(
        ValueError, match="semantic_name_or_path = .*backbone is a 'spa3r_vggt'; expected 'dinov3_vit'"
    ):
        script.main(flags(work, "wrong", semantic_name_or_path=work / "backbone"))
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint = .* is no checkpoint"):
        script.main(flags(work, "wrong", resume_from_checkpoint=work / "backbone"))
    (work / "backbone" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="resume_from_checkpoint = .* is a 'spa3r_vggt'; expected 'spa3r'"):
        script.main(flags(work, "wrong", resume_from_checkpoint=work / "backbone"))
    with pytest.raises(ValueError, match="3 views at mask_ratio = 0.75 leave 0 context views"):
        script.main(flags(work, "wrong", config_overrides='{"mask_ratio": 0.75}', min_views=3))
    with pytest.raises(ValueError, match=r"frame_step is \(3,\); expected 1 <= lowest <= highest"):
        script.main(flags(work, "wrong", frame_step=3))
    with pytest.raises(ValueError, match="num_views is 1; expected at least 2"):
        script.main(flags(work, "wrong", eval_views=1))
    with pytest.raises(ValueError, match="config_overrides is for a new model"):
        script.main(flags(work, "wrong", config_overrides="{}", model_name_or_path=work / "config"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        script.main(flags(work, "wrong", data_dir=work / "nowhere"))


def test_recipes_of_the_repository_are_read(script):
    for recipe in (TRAINING / "recipes").glob("psfm_*.yaml"):
        _, _, args = script.parse_arguments([str(recipe), "--use_cpu", "--bf16", "false", "--max_steps", "7"])
        assert args.max_steps == 7 and args.learning_rate == 2e-3 and args.eval_strategy == "steps"


def test_the_command_on_the_card_holds_no_secret(script):
    argv = [
        "--hub_token",
        "hf_secret",
        "--hub-token",
        "hf_secret",
        "--push_to_hub_token=hf_secret",
        "--config_overrides",
        '{"a": 1}',
    ]
    command = shown_command("run_psfm.py", argv, 1)
    assert "hf_secret" not in command and command.startswith("python training/run_psfm.py --hub_token ...")
    assert command.endswith("""--config_overrides '{"a": 1}'""")


def test_without_arguments(script, tmp_path, monkeypatch):
    """What a newcomer types first, with fewer steps and rooms."""
    pytest.importorskip("embreex")
    monkeypatch.chdir(tmp_path)
    small = {"max_steps": 2, "num_rooms": 3, "num_eval_rooms": 2, "views_per_room": 13, "eval_views": 4}
    for arguments in (script.DataArguments, script.PSFMTrainingArguments):
        for name in small.keys() & arguments.__dataclass_fields__.keys():
            monkeypatch.setattr(arguments.__dataclass_fields__[name], "default", small[name])
    script.main([])
    folder = tmp_path / "outputs" / "psfm"
    assert json.loads((folder / "run.json").read_text())["command"] == "python training/run_psfm.py"
    baselines = json.loads((folder / "eval.json").read_text())["baselines"]
    assert baselines.keys() == {"mean", "nearest_context", "other_scene"}
    pictures = {path.name for path in folder.glob("pictures/*")}
    assert pictures == {"loss.png", "scores.png", "scene_0.png", "scene_1.png", "orbit.png", "orbit.gif"}
