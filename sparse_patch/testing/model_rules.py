"""The rules that a patched model keeps."""

from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_patch.config import load_config
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import sparsity_report
from sparse_patch.model_shape import ModelShape
from sparse_patch.testing.rules import Case, require

PROMPT = 300
ANSWER = 4


@cache
def small_model(shape: ModelShape) -> PreTrainedModel:
    """A Llama of a shape with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=shape.hidden_size,
            intermediate_size=2 * shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            max_position_embeddings=1024,
        )
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a padded batch's answer, `[ANSWER, B, vocabulary]`."""
    ids = torch.randint(3, 97, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    result = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.stack(result.logits)


def generate_runs_sparsely_and_unpatching_is_exact(case: Case) -> None:
    """With the small settings, in a padded batch."""
    model = small_model(case.shape)
    before, name = _logits(model), case.method.registered_name()
    with patched(model, load_config({case.phase: {"method": name, **case.small}}, on_unsupported="error")):
        after = _logits(model)
        report = sparsity_report(model)
    calls = sum(getattr(layer, case.phase).sparse_calls for layer in report.layers)
    require(calls > 0, f"generate runs {case.phase} sparsely", "the report counts no sparse call", "see its fallbacks")
    require(
        bool(after.isfinite().all()),
        "logits are finite",
        "some are not",
        "padding, or what lies behind a cache's end, is read",
    )
    require(torch.equal(_logits(model), before), "unpatching is exact", "logits changed", "weights were written to")


def full_settings_give_the_models_own_logits(case: Case) -> None:
    """To rounding."""
    model, name = small_model(case.shape), case.method.registered_name()
    expected = _logits(model)
    with patched(model, load_config({case.phase: {"method": name, **case.full}}, on_unsupported="error")):
        found = _logits(model)
    require(
        torch.allclose(found, expected, atol=1e-4, rtol=1e-4),
        "full settings give the logits of the model without the patch",
        f"they differ by {float((found - expected).abs().max()):.1e}",
        "`full` is not full",
    )


RULES = (generate_runs_sparsely_and_unpatching_is_exact, full_settings_give_the_models_own_logits)
