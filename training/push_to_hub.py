"""
Send something made here to the Hub.

    python training/push_to_hub.py --folder outputs/psfm --repo_id org/spa3r                   # a model or an adapter
    python training/push_to_hub.py --folder hub_configs/vsi_bench --repo_id org/vsi_bench --kind metric
    python training/push_to_hub.py --folder hub_configs/space --repo_id org/spa3r-demo --kind space
    python training/push_to_hub.py --folder outputs/vsi_bench --repo_id org/spa3-vlm --kind results

A model is sent with the code that it needs where this package is absent, and with weights that it shares with folders
beside it. Results go to the repo of the model that was evaluated, with its card's `model-index`. Training scripts push
by themselves: `--push_to_hub --hub_model_id org/name`.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from spa3r_hf.hub_upload import push_folder, push_results
from spa3r_hf.model_card import evaluation_index
from spa3r_hf.training_arguments import usage_errors


logger = logging.getLogger("push_to_hub")
REPO_TYPES = {"model": "model", "metric": "space", "space": "space", "dataset": "dataset"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what to send")
    parser.add_argument("--repo_id", required=True, help="where to: name or owner/name; made if need be")
    parser.add_argument("--kind", choices=[*REPO_TYPES, "results"], default="model")
    parser.add_argument("--private", action="store_true", default=None, help="if the repo is made, only for you")
    parser.add_argument("--revision", help="a branch, made if need be; default: main")
    parser.add_argument("--message", help="of the commit")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    options = {"private": args.private, "revision": args.revision, "commit_message": args.message}
    with usage_errors(__name__):
        if args.kind == "results":
            results = json.loads((args.folder / "results.json").read_text())
            commit = push_results(
                args.folder, args.repo_id, results=evaluation_index(results, args.repo_id), **options
            )
        else:
            commit = push_folder(args.folder, args.repo_id, repo_type=REPO_TYPES[args.kind], **options)
    logger.info("%s is at %s", args.folder, commit.commit_url)


if __name__ == "__main__":
    main()
