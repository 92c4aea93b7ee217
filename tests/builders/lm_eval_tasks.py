"""Models, requests and tasks for lm-eval, without a download."""

import json
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_patch.evaluation.lm_eval import TASKS

SPARSE = {"prefill": {"method": "flexprefill", "block_size": 32, "min_budget": 64, "min_length": 256, "gamma": 0.6}}


def model(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=number, metadata=("task", number, 1))
        for number, args in enumerate(arguments)
    ]


def offline_tasks(path: str, *folders: Path, **metadata: Any) -> TaskManager:
    """The packaged tasks and some folders, without lm-eval's own thousands, which take long to list."""
    known = {"max_seq_lengths": [640], "num_samples": 4, "tokenizer": path, **metadata}
    return TaskManager(include_path=[TASKS, *folders], include_defaults=False, metadata=known)


def own_tasks(folder: Path, number: int = 4) -> Path:
    """A user's own tasks: YAML files on a local JSON file."""
    folder = folder / "mine"
    folder.mkdir()
    words = ["green", "blue", "yellow"]
    lines = [
        {
            "question": f"The grass is green. The sky is blue. The sun is yellow. {text}",
            "choices": words,
            "label": label,
        }
        for text, label in [("The grass is", 0), ("The sky is", 1), ("The sun is", 2)] * (number // 3 + 1)
    ][:number]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\n"
    (folder / "own_choice.yaml").write_text(
        f"task: own_choice\n{data}output_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    (folder / "own_generate.yaml").write_text(
        f"task: own_generate\n{data}output_type: generate_until\ndoc_to_text: question\n"
        'doc_to_target: "{{choices[label]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match}]\nmetadata: {version: 1.0}\n"
    )
    return folder
