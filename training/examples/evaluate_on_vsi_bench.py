"""
Answer VSI-Bench's questions, with the scene and without it, and score both.

    python training/examples/evaluate_on_vsi_bench.py                        # questions about two generated rooms
    python training/examples/evaluate_on_vsi_bench.py --source nyu-visionx/VSI-Bench --media data/vsi_bench --limit 200

`training/run_vsi_bench.py` does the same with everything around it: resume, several GPUs, intervals, tables.
"""

import argparse
from itertools import groupby

import evaluate

from spa3r_hf import Spa3VLM, Spa3VLMProcessor
from spa3r_hf.benchmarks import load_benchmark, with_media
from spa3r_hf.rooms_benchmark import room_benchmark
from spa3r_hf.scene_answers import SceneAnswerer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="hub_configs/spa3-vlm-nano", help="folder or Hub repo")
    parser.add_argument("--source", help="parquet, JSONL or Hub repo of the questions; default: generated rooms")
    parser.add_argument("--media", help="folder with the videos or the zips of them; default: beside the source")
    parser.add_argument("--limit", type=int, help="ask the first so many questions only")
    parser.add_argument("--rooms_dir", default="outputs/room_videos", help="where generated rooms are kept")
    parser.add_argument("--metric", default="hub_configs/vsi_bench", help="folder or Hub repo")
    args = parser.parse_args(argv)

    source = args.source or room_benchmark(args.rooms_dir, num_rooms=2, num_questions=40, image_size=(96, 128))
    questions = with_media(load_benchmark("vsi_bench", source)[: args.limit], args.media or source)
    questions = sorted(questions, key=lambda question: question.scene)  # a scene is looked at once
    model = Spa3VLM.from_pretrained(args.adapter, dtype="float32").eval()
    answerer = SceneAnswerer(model, Spa3VLMProcessor.from_pretrained(args.adapter))

    def ask() -> list[str]:
        answers = []
        for _, group in groupby(questions, key=lambda question: question.scene):
            asked = list(group)
            video = str(asked[0].video)
            answers += [answer.text for answer in answerer.answer(video, [each.prompt for each in asked])]
        return answers

    given = {"with the scene": ask()}
    with model.disable_adapter():
        given["without"] = ask()
    metric = evaluate.load(args.metric)
    for name, answers in given.items():
        scores = metric.compute(
            predictions=answers,
            references=[question.ground_truth for question in questions],
            question_types=[question.question_type for question in questions],
        )
        print(f"{name}: {scores['overall']:.1f} of 100, over {len(questions)} questions")


if __name__ == "__main__":
    main()
