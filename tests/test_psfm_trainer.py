import json
import math
from collections import Counter
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_spa3r
from transformers import TrainingArguments

from spa3r_hf import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r_hf.psfm_data import PSFMBatchSampler, PSFMDataset
from spa3r_hf.psfm_splits import batches_of, split_scenes
from spa3r_hf.psfm_trainer import PSFMTrainer
from spa3r_hf.scenes import LazyImages, Scene


PROCESSOR = Spa3RImageProcessor(size=28, patch_size=14)


def scene(name: str, seed: int = 0) -> Scene:
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(6)]
    return Scene(name, images, (1, 1))


def trainer_of(folder, scenes=None, images_per_batch: int = 8, model=None, **options) -> PSFMTrainer:
    scenes = scenes or [scene(str(i), i) for i in range(3)]
    settings = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3, **options}
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=0, **settings)
    split = split_scenes([scene("train")], PROCESSOR, held_out=[scene("x", 7), scene("y", 8)], num_views=4)
    return PSFMTrainer(
        model=model or tiny_spa3r(),
        args=args,
        train_dataset=PSFMDataset(scenes, PROCESSOR, on_bad_sample="skip"),
        eval_dataset=batches_of(split.eval_samples),
        mean_batches=batches_of(split.mean_samples),
        batch_sampler=PSFMBatchSampler(
            12, images_per_batch, (4, 4), batches_per_step=args.gradient_accumulation_steps
        ),
        processing_class=PROCESSOR,
    )


def test_losses_and_scores_are_logged_as_numbers(tmp_path):
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    history = trainer.state.log_history
    losses = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "eval_loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4]
    assert [record["step"] for record in evaluations] == [2, 4]
    for record in losses:
        parts = [record[f"{kind}_{name}"] for kind in ("geometric", "semantic") for name in ("l1", "cosine")]
        parts.append(record["depth_probe"])
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
    for key in ("geometric_cosine", "geometric_centred_cosine", "semantic_cosine", "semantic_l1"):
        assert math.isfinite(evaluations[0][f"eval_{key}"])
    assert not any("train_samples_per_second" in record for record in history)
    scores = trainer.score()
    assert scores["geometric_cosine"] == evaluations[-1]["eval_geometric_cosine"] and trainer.model.training
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    frozen = ("spa3r.backbone.", "semantic_teacher.")
    assert changed and not any(key.startswith(frozen) for key in changed)


def test_the_best_checkpoint_can_be_taken_up_at_the_end(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "geometric_cosine", "greater_is_better": True}
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2, **options)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model-trained.safetensors")
    for key, value in best.items():
        assert torch.equal(trainer.model.state_dict()[key], value)


def test_accumulated_batches_are_averaged(tmp_path):
    """Two batches of one scene, accumulated, are one batch of both."""
    weights = []
    for name, options in (("one", {}), ("two", {"images_per_batch": 4, "gradient_accumulation_steps": 2})):
        trainer = trainer_of(tmp_path / name, **options)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for key, value in weights[0].items():
        assert torch.allclose(value, weights[1][key], atol=2e-5), key


def test_frozen_weights_are_written_once(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    frozen = tmp_path / "run" / "model-frozen.safetensors"
    assert list((tmp_path / "run").rglob("*frozen*")) == [frozen]
    written = frozen.stat().st_mtime_ns
    checkpoint = tmp_path / "run" / "checkpoint-2"
    # The model that goes on is another one; the checkpoint says what its weights are.
    resumed = trainer_of(tmp_path / "run", model=tiny_spa3r(seed=1))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert frozen.stat().st_mtime_ns == written
    elsewhere = trainer_of(tmp_path / "elsewhere", model=tiny_spa3r(seed=2))
    elsewhere.train(resume_from_checkpoint=str(checkpoint))
    elsewhere.save_model()
    for one in (resumed.model, Spa3RForPreTraining.from_pretrained(tmp_path / "elsewhere")):
        for key, value in trainer.model.state_dict().items():
            assert torch.equal(one.state_dict()[key], value), key
    assert resumed.state.log_history[:-1] == trainer.state.log_history[:-1]  # the last one holds the run time


@pytest.mark.parametrize("batches_per_step", [1, 2])
def test_samples_that_cannot_be_read_are_counted_and_left_out(tmp_path, caplog, batches_per_step):
    """Some batches hold nothing that can be read."""
    damaged = Scene("damaged", LazyImages([b"no picture"] * 4, "damaged"), (1, 1))
    scenes = [scene("a"), damaged]
    trainer = trainer_of(tmp_path, scenes, images_per_batch=4, gradient_accumulation_steps=batches_per_step)
    keys = [key for batch in trainer.batch_sampler for key in batch][: 4 * batches_per_step]
    expected = sum(index % 2 for _, index, _ in keys)
    assert 0 < expected < len(keys)
    trainer.train()
    (message,) = trainer.bad_samples
    assert "scene 'damaged', view 0 cannot be opened" in message
    assert trainer.bad_samples == Counter({message: expected})
    assert caplog.text.count("left out: scene 'damaged'") == 1
    for parameter in trainer.model.parameters():
        assert parameter.isfinite().all()
    for record in trainer.state.log_history[:-1]:  # a step with nothing to read has no loss
        parts = [value for key, value in record.items() if key.endswith(("_l1", "_cosine", "_probe"))]
        assert record.get("loss", 0) == pytest.approx(sum(parts), rel=1e-5)
    assert any("loss" in record for record in trainer.state.log_history)


def test_a_batch_of_bad_samples_gives_zero_gradients_to_all_that_is_trained(tmp_path):
    trainer = trainer_of(tmp_path)
    loss = trainer.compute_loss(trainer.model, {"bad_samples": ["this"]})
    loss.backward()
    assert loss == 0 and trainer.bad_samples == {"this": 1}
    for parameter in trainer.model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert not parameter.requires_grad or not parameter.grad.any()


def test_push_to_hub_sends_the_folder_without_checkpoints(tmp_path, monkeypatch):
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
        paths = [str(path.relative_to(folder_path)) for path in tmp_path.joinpath("run").rglob("*") if path.is_file()]
        uploads.append(set(huggingface_hub.utils.filter_repo_objects(paths, ignore_patterns=ignore_patterns)))
        assert repo_id == "someone/run"

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **kwargs: SimpleNamespace(repo_id=f"someone/{name}")
    )
    trainer = trainer_of(tmp_path / "run", push_to_hub=True, hub_strategy="end")
    trainer.train()
    trainer.save_model()
    assert not uploads
    (tmp_path / "run" / "README.md").write_text("our card")
    trainer.push_to_hub()
    (sent,) = uploads
    assert {"model-trained.safetensors", "model-frozen.safetensors", "model.safetensors.index.json"} < sent
    assert {"config.json", "preprocessor_config.json", "modeling_spa3r.py", "README.md"} < sent
    assert not any("checkpoint-" in name or name.endswith((".pt", ".bin", ".pth")) for name in sent)
    assert (tmp_path / "run" / "README.md").read_text() == "our card"
    index = json.loads((tmp_path / "run" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-trained.safetensors", "model-frozen.safetensors"}


def test_checkpoints_are_not_pushed_while_training(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy = every_save; expected end"):
        trainer_of(tmp_path, push_to_hub=True)
