"""`transformers.Trainer` for Spa3-VLM."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .instruction_data import Instruction, InstructionData
from .instruction_evaluation import ShortQuestion, answer_conversations, score_short_answers, short_question
from .latent_cache import SceneEncoder
from .modeling_spa3_vlm import Spa3VLM
from .processing_spa3_vlm import Spa3VLMProcessor
from .scene_trainer import SceneTrainer
from .sft_data import BAD_SAMPLE_ERRORS, IGNORED, EstimatedLengths, LengthGroupedBatchSampler, SFTCollator


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
    - the log has `token_accuracy` beside `loss`;
    - `eval_dataset` is scored by the loss of its answers, and by what the model answers where the right answer is
      short (see `score_short_answers`); of a set with a rate below 1 it is always the same records.

    Args:
        scene_encoder: Encodes the scenes. None: they are left out, as if there was no adapter, and it is not trained.
        collate_fn: The batches' maker, with the cache of `scene_encoder`.
        args, batch_sampler: See `SceneTrainer`.
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
        if scene_encoder is None:
            model.adapter.requires_grad_(False)
        super().__init__(model=model, args=args, batch_sampler=batch_sampler, collate_fn=collate_fn, **kwargs)
        # The Trainer counts the answers' tokens of a step, and `compute_loss` divides by them.
        self.model_accepts_loss_kwargs = True
        self.scene_encoder = None if scene_encoder is None else scene_encoder.to(args.device)
        self.bad_eval_samples: list[str] = []

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        encoder, self.model.spatial_encoder = self.model.spatial_encoder, None
        try:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.model.spatial_encoder = encoder
        self.gather_bad_samples()
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        self.count_bad_samples(inputs.pop("bad_samples"))
        labels = inputs.pop("labels")
        output = model(**self._with_scenes(inputs))
        loss, accuracy = answer_loss(output.logits, labels, num_items_in_batch)
        if accuracy is not None:
            self.add_losses({"token_accuracy": accuracy})
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Those of all processes; the gradients will be averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _with_scenes(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self.scene_encoder is None:
            return {name: value for name, value in inputs.items() if not name.startswith("spatial_")}
        return self.scene_encoder.complete(inputs)

    # --- scores

    @torch.no_grad()
    def score(self, data: InstructionData | None = None) -> dict[str, float]:
        """
        Score instruction data, `eval_dataset` by default, each process a part of it.

        Messages of samples that could not be used are in `bad_eval_samples` afterwards.

        Returns:
            `loss`, of the answers' tokens, `token_accuracy`, and what `score_short_answers` gives. (Where weights are
            in shards, FSDP's or ZeRO-3's, the model cannot be asked, and there are no such scores.)
        """
        data = self.eval_dataset if data is None else data
        samples = [data[int(number)] for number in data.draw(0)]  # type: ignore[union-attr, index]
        bad_samples: list[str] = []
        with self.evaluated_model() as model, self.accelerator.autocast():
            sums = self._sum_losses(model, samples, bad_samples)
            is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
            answers = [] if is_sharded else self._answer(model, samples)
        loss, right, count = sum(gather_object([sums]), torch.zeros(3)).tolist()
        self.bad_eval_samples = sorted(set(gather_object(bad_samples)))
        for message in self.bad_eval_samples:
            logger.warning("left out of the evaluation: %s", message)
        scores = {"loss": loss / count, "token_accuracy": right / count} if count else {}
        if answers := gather_object(answers):
            scores |= score_short_answers(*zip(*answers, strict=True))
        return scores

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        return self.log_scores(self.score(eval_dataset), metric_key_prefix)

    def _sum_losses(self, model: Spa3VLM, samples: Sequence[Instruction], bad_samples: list[str]) -> Tensor:
        """For this process's part, sums over the answers' tokens: of losses, of those that are right, of all."""
        size, rank, others = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        sums = torch.zeros(3)
        for start in range(0, len(batches), others):
            # Where the weights are in shards, all processes have to go through the model equally often.
            batch = self._prepare_inputs(self.collate_fn(batches[min(start + rank, len(batches) - 1)]))
            messages, labels = batch.pop("bad_samples"), batch.pop("labels")
            logits = model(**self._with_scenes(batch)).logits
            if start + rank < len(batches):
                bad_samples += messages
                loss, accuracy = answer_loss(logits, labels, 1)
                count = int((labels[:, 1:] != IGNORED).sum())
                sums += torch.tensor([float(loss), count * float(accuracy or 0), count])
        return sums

    def _answer(self, model: Spa3VLM, samples: Sequence[Instruction]) -> list[tuple[ShortQuestion, str]]:
        """The short questions of this process's part, with what the model answers."""
        answers: list[tuple[ShortQuestion, str]] = []
        size = self.args.per_device_eval_batch_size
        questions = self._short_questions(samples[self.args.process_index :: self.args.world_size])
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            try:
                answers += self._ask(model, batch)
            except BAD_SAMPLE_ERRORS:  # which has been named, else this would not be reached
                for question in batch:
                    with suppress(*BAD_SAMPLE_ERRORS):
                        answers += self._ask(model, [question])
        return answers

    def _short_questions(self, samples: Sequence[Instruction]) -> list[ShortQuestion]:
        questions: list[ShortQuestion] = []
        for sample in samples:
            with suppress(*BAD_SAMPLE_ERRORS):
                questions += filter(None, [short_question(sample)])
        return questions

    def _ask(self, model: Spa3VLM, questions: Sequence[ShortQuestion]) -> list[tuple[ShortQuestion, str]]:
        conversations = [question.messages for question in questions]
        processor: Any = self.processing_class
        answers = answer_conversations(model, processor, conversations, self.scene_encoder, len(questions))
        return list(zip(questions, answers, strict=True))

    # --- checkpoints

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

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def instruction_trainer(
    model: Spa3VLM,
    processor: Spa3VLMProcessor,
    data: InstructionData,
    args: TrainingArguments,
    *,
    scene_encoder: SceneEncoder | None,
    eval_data: InstructionData | None = None,
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
        eval_dataset=eval_data,
        scene_encoder=scene_encoder,
        collate_fn=collator,
        batch_sampler=batch_sampler,
        processing_class=processor,
    )


__all__ = ["Spa3VLMTrainer", "answer_loss", "choose_trained", "instruction_trainer", "vision_mergers"]
