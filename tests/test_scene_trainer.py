"""What the trainers on scenes have in common."""

import multiprocessing

import pytest
import torch
from tiny_models import tiny_vggt_config
from torch.utils.data import default_collate
from transformers import AutoModel, DINOv3ViTConfig, DINOv3ViTModel, TrainingArguments

from spa3r_hf import Spa3RImageProcessor, Spa3RVGGTModel
from spa3r_hf.geometry_trainer import GeometryTrainer
from spa3r_hf.psfm_data import PSFMBatchSampler
from spa3r_hf.scene_trainer import SceneTrainer
from spa3r_hf.semantic_trainer import PatchCategoryModel, SemanticTrainer


class Keys:
    """A data set whose samples are what they are asked for by."""

    def __len__(self):
        return 6

    def __getitem__(self, key):
        return {"key": torch.tensor(key)}


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


def geometry_trainer(folder, **options) -> GeometryTrainer:
    return GeometryTrainer(
        model=Spa3RVGGTModel(tiny_vggt_config()),
        args=arguments(folder, **options),
        train_dataset=Keys(),
        batch_sampler=PSFMBatchSampler(6, 8, (2, 2)),
        processing_class=Spa3RImageProcessor(size=28, patch_size=14),
    )


def semantic_trainer(folder, **options) -> SemanticTrainer:
    config = DINOv3ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return SemanticTrainer(
        model=PatchCategoryModel(config),
        args=arguments(folder, **options),
        train_dataset=Keys(),
        probe_batches=[],
        batch_sampler=PSFMBatchSampler(6, 8, (2, 2)),
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_draw_nothing_from_the_models_stream(tmp_path, workers):
    loader = geometry_trainer(tmp_path, dataloader_num_workers=workers, seed=3).get_train_dataloader()
    before = torch.get_rng_state()
    keys = [batch["key"].tolist() for _ in range(2) for batch in loader]
    assert keys and torch.equal(torch.get_rng_state(), before)
    assert not multiprocessing.active_children() or workers


def test_any_sampler_of_epochs_will_do(tmp_path):
    class Pairs:
        batch_size, drop_last, steps_per_epoch, epoch = None, True, 2, 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 2

        def __iter__(self):
            return iter([[self.epoch, 10], [self.epoch, 20]])

    trainer = SceneTrainer(
        model=torch.nn.Linear(1, 1),
        args=arguments(tmp_path),
        train_dataset=Keys(),
        batch_sampler=Pairs(),
        collate_fn=default_collate,
    )
    loader = trainer.get_train_dataloader()
    keys = [batch["key"].tolist() for _ in range(2) for batch in loader]
    assert keys == [[0, 10], [0, 20], [1, 10], [1, 20]]


def test_bad_samples_are_counted_and_said_once(tmp_path, caplog):
    trainer = geometry_trainer(tmp_path)
    trainer.count_bad_samples(["this", "that"])
    trainer.count_bad_samples(["this"])
    trainer.gather_bad_samples()
    assert trainer.bad_samples == {"this": 2, "that": 1}
    assert caplog.text.count("left out: this") == 1 and caplog.text.count("left out: that") == 1


def test_a_model_is_scored_in_eval_mode_and_goes_on_as_before(tmp_path):
    trainer = geometry_trainer(tmp_path)
    for training in (True, False):
        trainer.model.train(training)
        with pytest.raises(KeyError), trainer.evaluated_model() as model:
            assert model is trainer.model and not model.training
            raise KeyError
        assert trainer.model.training is training


def test_one_process_writes(tmp_path, monkeypatch):
    """Several that write one file at once can leave a damaged one."""
    for build in (geometry_trainer, semantic_trainer):
        trainer = build(tmp_path / build.__name__)
        with monkeypatch.context() as other:
            other.setattr(TrainingArguments, "should_save", False)
            for folder in (None, str(tmp_path / build.__name__ / "checkpoint-1")):
                trainer.save_model(folder)
        assert not (tmp_path / build.__name__).exists() or not list((tmp_path / build.__name__).rglob("*"))
        trainer.save_model()
        assert list((tmp_path / build.__name__).glob("*.safetensors"))


def test_a_checkpoint_has_the_classifier_and_the_folder_the_teacher(tmp_path):
    trainer = semantic_trainer(tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer.save_model()
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model, DINOv3ViTModel)
    for key, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.vit.state_dict()[key])
    other = semantic_trainer(tmp_path)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    other._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for key, value in other.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key])


@pytest.mark.parametrize("build", [geometry_trainer, semantic_trainer])
def test_nothing_is_pushed_before_there_is_a_card(tmp_path, build, monkeypatch):
    with pytest.raises(ValueError, match="hub_strategy = every_save; expected end: before it there is no model card"):
        build(tmp_path, push_to_hub=True)
    monkeypatch.setattr(SceneTrainer, "init_hf_repo", lambda self, **kwargs: None)
    trainer = build(tmp_path, push_to_hub=True, hub_strategy="end")
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: pytest.fail("pushed"))
    trainer.save_model()
    (tmp_path / "README.md").write_text("our card")
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "our card"
