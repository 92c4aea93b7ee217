"""Patch a model, answer a question about a long text, print what was computed, unpatch.

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
    prompt = torch.tensor([document.tokens + question.tokens])

    with patched(model, "flexprefill.yaml", prefill={"gamma": 0.9}):
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        print(sparsity_report(model))
    answer = tokenizer.decode(output[0, prompt.shape[1] :])
    print(f"asked for {question.key}: answered {answer!r}, expected {question.answer}")


if __name__ == "__main__":
    main()
