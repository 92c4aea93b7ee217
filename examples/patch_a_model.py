"""Patch a model, answer a question about a long text, print what was computed, and unpatch the model.

python examples/patch_a_model.py [MODEL]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_patch import patched, sparsity_report
from sparse_patch.evaluation.document import needle_document


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "needle-llama"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    document = needle_document(tokenizer, length=6000, needles=4)
    question = document.questions[0]
    inputs = tokenizer(document.text + question.text, return_tensors="pt", return_token_type_ids=False)

    with patched(model, "flexprefill.yaml", prefill={"gamma": 0.9}):
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        print(sparsity_report(model))
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    print(f"asked for {document.keys[0]}: answered {answer!r}, expected {question.outputs[0]!r}")


if __name__ == "__main__":
    main()
