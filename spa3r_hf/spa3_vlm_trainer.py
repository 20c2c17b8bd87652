"""`transformers.Trainer` for Spa3-VLM."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import HubStrategy

from .instruction_data import InstructionData
from .latent_cache import SceneEncoder
from .modeling_spa3_vlm import Spa3VLM
from .processing_spa3_vlm import Spa3VLMProcessor
from .scene_trainer import SceneTrainer
from .sft_data import IGNORED, EstimatedLengths, LengthGroupedBatchSampler, SFTCollator


logger = logging.getLogger(__name__)

Trained = Literal["adapter", "lora", "language_model"]
# What the VLMs of `transformers` call the part that brings the vision tower's features to the language model's width.
_MERGERS = ("merger", "deepstack_merger_list", "multi_modal_projector", "connector")


def vision_mergers(vlm: PreTrainedModel) -> list[nn.Module]:
    """
    The parts of a VLM between its vision tower and its language model.

    Raises:
        ValueError: There is none of a known name.
    """
    mergers = [module for name, module in vlm.named_modules() if name.rpartition(".")[2] in _MERGERS]
    if not mergers:
        raise ValueError(
            f"{type(vlm).__name__} has no vision merger; expected a module of one of the names {_MERGERS}"
        )
    return mergers


def choose_trained(model: Spa3VLM, trained: Trained, train_merger: bool = False) -> None:
    """
    Say what of a model is trained: its active adapter, with its LoRA if it has one, and

    Args:
        model: As `get_spa3_vlm` or `from_pretrained(..., is_trainable=True)` gives it.
        trained: "language_model": also the whole language model, with its embeddings and its output layer (the paper's
            setting). "adapter" and "lora": nothing else; they differ in whether the adapter has a LoRA.
        train_merger: Whether the vision merger is trained as well.

    Raises:
        ValueError: The adapter has a LoRA and is not to have one, or the reverse; or the VLM has no known merger.
    """
    has_lora = model.adapter_config.lora_config is not None
    if has_lora != (trained == "lora"):
        has = "a" if has_lora else "no"
        raise ValueError(f"trained = {trained!r}, but the adapter has {has} LoRA; expected an adapter made for it")
    modules: list[nn.Module] = []
    if trained == "language_model":
        modules += [model.language_model, model.vlm.get_output_embeddings()]
    if train_merger:
        modules += vision_mergers(model.vlm)
    for module in modules:
        module.requires_grad_(True)


def answer_loss(
    logits: Tensor, labels: Tensor, num_answer_tokens: Tensor | int | None = None
) -> tuple[Tensor, Tensor | None]:
    """
    Cross-entropy of the answers' tokens, and the share of them that the model would choose.

    Args:
        logits: (B, L, vocabulary).
        labels: (B, L), -100 where nothing is to be predicted.
        num_answer_tokens: What the sum is divided by. Default: the number in these labels.

    Returns:
        The loss, and the accuracy; None where there are no answers.
    """
    learnt = labels[:, 1:] != IGNORED
    predicted, expected = logits[:, :-1][learnt].float(), labels[:, 1:][learnt]
    if num_answer_tokens is None:
        num_answer_tokens = len(expected)
    total = F.cross_entropy(predicted, expected, reduction="sum") if len(expected) else 0.0 * logits.float().sum()
    accuracy = (predicted.argmax(-1) == expected).float().mean() if len(expected) else None
    # A step all of whose samples were bad has none.
    return total / torch.as_tensor(num_answer_tokens, device=total.device).clamp(min=1), accuracy


class Spa3VLMTrainer(SceneTrainer):
    """
    Trainer of [`Spa3VLM`] on instruction data.

    - batches are those of `SFTCollator`; each token of an answer counts alike, in whatever batch, accumulation step or
      process it is, so that N processes learn what N accumulation steps do;
    - the spatial encoder stands apart while the model trains (see `SceneEncoder`);
    - checkpoints hold what `Spa3VLM.save_pretrained` writes: adapter, LoRA, and the VLM only if it is trained;
    - samples that could not be used are counted in `bad_samples` by message;
    - the log has `token_accuracy` beside `loss`;
    - nothing goes to the Hub before `push_to_hub`.

    Args:
        scene_encoder: Encodes the scenes. None: they are left out, as if there was no adapter, and it is not trained.
        collate_fn: The batches' maker, with the cache of `scene_encoder`.
        batch_sampler: See `SceneTrainer`.

    Raises:
        ValueError: `push_to_hub` with another `hub_strategy` than "end".
    """

    model: Spa3VLM

    def __init__(
        self,
        *,
        model: Spa3VLM,
        args: TrainingArguments,
        scene_encoder: SceneEncoder | None,
        collate_fn: SFTCollator,
        batch_sampler: LengthGroupedBatchSampler,
        **kwargs,
    ):
        if args.push_to_hub and args.hub_strategy != HubStrategy.END:
            raise ValueError(f"hub_strategy = {args.hub_strategy}; expected end: before it there is no model card")
        if scene_encoder is None:
            model.adapter.requires_grad_(False)
        super().__init__(
            model=model,
            args=args,
            batch_sampler=batch_sampler,  # type: ignore[arg-type]  # it has what is asked of one
            collate_fn=collate_fn,  # type: ignore[arg-type]  # samples are records
            **kwargs,
        )
        # The Trainer counts the answers' tokens of a step, and `compute_loss` divides by them.
        self.model_accepts_loss_kwargs = True
        self.scene_encoder = None if scene_encoder is None else scene_encoder.to(args.device)
        self.bad_samples: Counter[str] = Counter()

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        # Else each of its iterators draws from the stream that LoRA's dropout draws from, with workers less often.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)  # type: ignore[attr-defined]
        return loader

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        encoder, self.model.spatial_encoder = self.model.spatial_encoder, None
        try:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.model.spatial_encoder = encoder
        self.bad_samples = sum(gather_object([self.bad_samples]), Counter())
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        for message in inputs.pop("bad_samples"):
            if message not in self.bad_samples:
                logger.warning("left out: %s", message)
            self.bad_samples[message] += 1
        labels = inputs.pop("labels")
        if self.scene_encoder is None:
            inputs = {name: value for name, value in inputs.items() if not name.startswith("spatial_")}
        else:
            inputs = self.scene_encoder.complete(inputs)
        output = model(**inputs)
        loss, accuracy = answer_loss(output.logits, labels, num_items_in_batch)
        if accuracy is not None:
            self.add_losses({"token_accuracy": accuracy})
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Those of all processes; the gradients will be averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The Trainer would push here, before there is a card.
        super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | os.PathLike, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # in shards, as it was saved
            super()._load_from_checkpoint(str(resume_from_checkpoint), model)
        else:
            self.accelerator.unwrap_model(model or self.model).restore(resume_from_checkpoint)

    def create_model_card(self, *args, **kwargs) -> None:
        """The script writes the card, from the run's own numbers; `push_to_hub` sends it along."""


def instruction_trainer(
    model: Spa3VLM,
    processor: Spa3VLMProcessor,
    data: InstructionData,
    args: TrainingArguments,
    *,
    scene_encoder: SceneEncoder | None,
    max_length: int | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
) -> Spa3VLMTrainer:
    """A trainer on instruction data, with its batches; see `SFTCollator` and `Spa3VLMTrainer`."""
    collator = SFTCollator(
        processor, max_length, on_bad_sample, None if scene_encoder is None else scene_encoder.cache
    )
    batch_sampler = LengthGroupedBatchSampler(
        data,
        EstimatedLengths(data, collator.tokens_per_view(), processor.max_frames),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps * args.world_size,
        args.seed,
    )
    return Spa3VLMTrainer(
        model=model,
        args=args,
        train_dataset=data,
        scene_encoder=scene_encoder,
        collate_fn=collator,
        batch_sampler=batch_sampler,
        processing_class=processor,
    )


__all__ = ["Spa3VLMTrainer", "answer_loss", "choose_trained", "instruction_trainer", "vision_mergers"]
