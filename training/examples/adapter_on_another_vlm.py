"""
Give another vision-language model the scene: a fresh adapter, trained on questions about my photographs.

    python training/examples/adapter_on_another_vlm.py photographs/kitchen "How many chairs are there?" 4 --steps 50
    python training/examples/adapter_on_another_vlm.py kitchen "What is left of the oven?" "the sink" \
        --vlm HuggingFaceTB/SmolVLM2-500M-Video-Instruct --encoder org/spa3r

Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, InternVL, Idefics3, SmolVLM and Gemma 3 work; the VLM itself stays as
it is. One question is a demonstration: `training/run_spa3_vlm.py --data records.jsonl` takes as many as you have.
"""

import argparse

from transformers import AutoModel, AutoModelForImageTextToText, TrainingArguments

from spa3r_hf import Spa3AdapterConfig, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.instruction_data import InstructionData, InstructionSet
from spa3r_hf.latent_cache import SceneEncoder
from spa3r_hf.scene_answers import SceneAnswerer
from spa3r_hf.spa3_vlm_trainer import instruction_trainer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="a folder of photographs of one place, or a video")
    parser.add_argument("question")
    parser.add_argument("answer", help="the right one")
    parser.add_argument("--vlm", default="hub_configs/nano-vlm", help="folder or Hub repo")
    parser.add_argument("--encoder", default="hub_configs/spa3r-nano", help="a Spa3R, folder or Hub repo")
    parser.add_argument("--output_dir", default="outputs/my-adapter")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)

    vlm = AutoModelForImageTextToText.from_pretrained(args.vlm, dtype="float32")
    encoder = AutoModel.from_pretrained(args.encoder, dtype="float32")
    model = get_spa3_vlm(vlm, encoder, Spa3AdapterConfig())
    processor = Spa3VLMProcessor.from_vlm(args.vlm, args.encoder)
    turns = [{"from": "human", "value": f"<video>\n{args.question}"}, {"from": "gpt", "value": args.answer}]
    data = InstructionData([InstructionSet("my question", [{"conversations": turns, "video": args.photos}])])
    settings = TrainingArguments(
        args.output_dir,
        max_steps=args.steps,
        learning_rate=1e-3,
        logging_steps=max(1, args.steps // 5),
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
    )
    instruction_trainer(model, processor, data, settings, scene_encoder=SceneEncoder(encoder, "latents")).train()
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    again = SceneAnswerer(Spa3VLM.from_pretrained(args.output_dir, dtype="float32"), processor)
    print(f"{args.question} {again.answer(args.photos, [args.question])[0].text}")


if __name__ == "__main__":
    main()
