"""lm-eval-harness with sparse attention: the model `hf-sparse`, and lm-eval's command line with it.

    sparse-patch lm-eval --model hf-sparse --model_args pretrained=M,config=flexprefill.yaml --tasks needle
    lm_eval.simple_evaluate(model=SparseLM(model), tasks=[...])  # in a notebook; the model may be patched

`hidden_states` runs a model up to its head, `model` answers lm-eval's requests, `command` is the command line.
Importing this package registers the model with lm-eval, because lm-eval scans no entry points.
"""

from sparse_patch.evaluation.lm_eval.command import TASKS, main
from sparse_patch.evaluation.lm_eval.model import SparseLM

__all__ = ["TASKS", "SparseLM", "main"]
