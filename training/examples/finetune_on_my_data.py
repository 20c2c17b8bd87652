"""
Go on training Spa3R on scenes of my own: photographs or videos, without poses or labels.

    python training/examples/finetune_on_my_data.py photographs --max_steps 200
    python training/examples/finetune_on_my_data.py room.mp4 --model org/spa3r --output_dir outputs/my-spa3r

`training/run_psfm.py --model_name_or_path ... --data_dir ...` does the same with everything around it: resume, bad
files, several GPUs, a model card, the Hub.
"""

import argparse
from typing import Any

from transformers import AutoImageProcessor, TrainingArguments

from spa3r_hf import Spa3RForPreTraining
from spa3r_hf.model_card import psfm_table
from spa3r_hf.psfm_data import PSFMBatchSampler, PSFMDataset
from spa3r_hf.psfm_splits import batches_of, split_scenes
from spa3r_hf.psfm_trainer import PSFMTrainer
from spa3r_hf.scenes import open_scenes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of photographs, of such folders or of videos; a video; ScanNet(++)")
    parser.add_argument("--model", default="hub_configs/spa3r-nano", help="folder or Hub repo")
    parser.add_argument("--output_dir", default="outputs/my-spa3r")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--views", type=int, default=6, help="of a sample, context and target")
    args = parser.parse_args(argv)

    model = Spa3RForPreTraining.from_pretrained(args.model, dtype="float32")
    processor = AutoImageProcessor.from_pretrained(args.model)
    split = split_scenes(open_scenes(args.data, use_cameras=False), processor, num_views=args.views)
    scenes: Any = split.train
    views = min(args.views, split.smallest_scene or args.views)
    repeats = max(1, 64 // len(scenes))  # a handful of scenes gives many samples
    logs: Any = {"logging_steps": max(1, args.max_steps // 10), "save_strategy": "no", "report_to": "none"}
    settings = TrainingArguments(args.output_dir, max_steps=args.max_steps, learning_rate=5e-4, **logs)
    trainer = PSFMTrainer(
        model=model,
        args=settings,
        train_dataset=PSFMDataset(scenes, processor),
        eval_dataset=batches_of(split.eval_samples),
        mean_batches=batches_of(split.mean_samples),
        batch_sampler=PSFMBatchSampler(repeats * len(scenes), 24, (min(4, views), views), 1, seed=0),
        processing_class=processor,
    )
    print(f"before, on {split.held_out}:\n{psfm_table(trainer.score())}")
    trainer.train()
    print(f"after:\n{psfm_table(trainer.score())}")
    trainer.save_model()
    print(f"saved: AutoModel.from_pretrained({args.output_dir!r})")


if __name__ == "__main__":
    main()
