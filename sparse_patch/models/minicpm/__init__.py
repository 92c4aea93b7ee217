"""MiniCPM 1, 2, 4 and 4.1 as native Transformers models; the code that comes with a checkpoint never runs.

Transformers has no dense MiniCPM, and the checkpoints' code does not use the attention interface of Transformers. But
MiniCPM is a Llama with four constants, and Granite is the same Llama with the same constants under other names:

    embeddings  x scale_emb                              embedding_multiplier
    residuals   x scale_depth / sqrt(num_hidden_layers)  residual_multiplier
    logits      / (hidden_size / dim_model_base)         logits_scaling
    q.k         x head_dim ** -0.5                       attention_multiplier

The weights have the same names, so they are loaded into `GraniteForCausalLM`. Sources: MiniCPM (arXiv 2404.06395),
MiniCPM4 (arXiv 2506.07900) and Transformers' Granite. Neither the published weights nor their code were available;
statements about that code are from memory.

`rope` has the kinds of rotary embedding, `config` reads config.json, `weights` checks the weights, and `loading` makes
the model.
"""

from sparse_patch.models.minicpm.config import MODEL_TYPE
from sparse_patch.models.minicpm.loading import is_minicpm, load_minicpm, minicpm_config

__all__ = ["MODEL_TYPE", "is_minicpm", "load_minicpm", "minicpm_config"]
