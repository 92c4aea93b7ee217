"""The rules of methods for prefill."""

from dataclasses import replace

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import table
from sparse_patch.plans import BlockPlan, Dense, SparsePlan
from sparse_patch.testing.calls import make_call, row_alone
from sparse_patch.testing.rules import BrokenRule, Case, attend, mask_of, no_host_sync, require, visible, without_values

LENGTH = 400
CHUNK = 150


def _plan_of(case: Case, call: AttentionCall, what: str) -> SparsePlan:
    plan = case.bound().plan(call)
    if isinstance(plan, Dense):
        raise BrokenRule(
            "the small settings are sparse",
            f"{what} of {call.kv_length} tokens is dense ({plan.reason})",
            "min_length is not 0 in `small`, or its budgets hold the whole prompt",
        )
    return plan


def inputs_are_left_alone(case: Case) -> None:
    """Planning writes to nothing that it is given."""
    call = make_call(LENGTH, row_starts=[0, 33])
    before = [tensor.clone() for tensor in (call.q, call.k, call.v)]
    case.bound().plan(call)
    require(
        all(map(torch.equal, before, (call.q, call.k, call.v))),
        "planning leaves queries, keys and values as they are",
        "one was written to",
        "an operation in place (`masked_fill_`, `/=`, ...) on a view of them",
    )


def a_prompt_is_sparse_and_causal(case: Case) -> None:
    """Whole and in chunks."""
    for queries, what in ((LENGTH, "a prompt"), (CHUNK, "a chunk")):
        call = make_call(LENGTH, queries=queries)
        plan = _plan_of(case, call, what)
        mask = plan.mask()
        require(
            not (mask & ~visible(call)).any(),
            "a query reads no key after itself",
            f"the plan of {what} does",
            "a block above the diagonal in a plan that was not made by BlockPlan.from_blocks",
        )
        require(
            bool(mask.diagonal(LENGTH - queries, -2, -1).all()),
            "every query reads its own key",
            f"a query of {what} does not",
            "the diagonal block is not selected; a query with no key at all gives 0",
        )
        require(
            0 < float(plan.density().min()) <= float(plan.density().mean()) < 1,
            "the small settings are sparse",
            f"the plan of {what} reads everything",
            "budgets in `small` that hold the whole prompt",
        )


def lists_are_in_order(case: Case) -> None:
    """Of plans by blocks: ascending, each block once, the diagonal last."""
    plan = _plan_of(case, make_call(LENGTH), "a prompt")
    if not isinstance(plan, BlockPlan):
        return
    step = plan.indices.diff(dim=-1)[..., : plan.indices.shape[-1] - 1] > 0
    inside = torch.arange(step.shape[-1]) < (plan.counts[..., None] - 1)
    require(
        bool((step | ~inside).all()) and bool(plan.on_diagonal.all()),
        "a list has each block once, in ascending order, the diagonal one last",
        "one has not",
        "lists written by hand; BlockPlan.from_blocks makes them of a map",
    )


def a_padded_row_is_the_row_without_the_batch(case: Case) -> None:
    """Plans and outputs."""
    for queries in (LENGTH, CHUNK):
        batch = make_call(LENGTH, queries=queries, row_starts=[0, 7, 64, 130], value_dim=24)
        plan = _plan_of(case, batch, "a padded batch")
        output = attend(batch, plan)
        for row in range(4):
            alone, real = row_alone(batch, row)
            start = int(batch.row_starts()[row])
            plan_alone = _plan_of(case, alone, "a row without the batch")
            same = torch.equal(plan.mask()[row, :, real, start:], plan_alone.mask()[0])
            near = torch.allclose(output[row, :, real], attend(alone, plan_alone)[0], atol=2e-6, rtol=1e-5)
            require(
                same and near,
                "a padded row selects what it selects without the batch",
                f"row {row}, which begins at key {start}, selects other keys",
                "positions counted from the batch's first token and not from `call.row_starts()`, padding among the "
                "keys that are compared, or a choice made over all rows together",
            )


def a_short_row_is_dense_in_a_batch(case: Case) -> None:
    """As it is without the batch; of methods with a `min_length`."""
    if "min_length" not in case.method.model_fields:
        return
    batch = make_call(LENGTH, row_starts=[0, 250])
    method = case.bound(min_length=200)
    plan, alone = method.plan(batch), method.plan(row_alone(batch, 1)[0])
    require(
        isinstance(alone, Dense) and isinstance(method.plan(make_call(150)), Dense),
        "a prompt below min_length is dense",
        "one of 150 tokens is sparse with min_length 200",
        "`why_dense` without `super().why_dense(call)`",
    )
    short, long = mask_of(plan, batch)[1], mask_of(plan, batch)[0]
    require(
        bool((short == visible(batch)[1]).all()) and not bool((long == visible(batch)[0]).all()),
        "a short row in a batch is dense, as it is without the batch",
        "it is sparse there, or makes the long row dense",
        "a plan made by hand; a `Selection` of `select` gets its short rows filled",
    )


def groups_of_heads_are_independent(case: Case) -> None:
    """The heads of one KV head do not depend on those of another; not of methods with a file of settings by head."""
    if any(case.small.get(field) for field in case.method.files):
        return
    call = make_call(LENGTH, heads=(6, 3))
    order, q_order = torch.tensor([2, 0, 1]), torch.tensor([4, 5, 0, 1, 2, 3])
    moved = replace(call, q=call.q[:, q_order], k=call.k[:, order], v=call.v[:, order])
    first, second = (_plan_of(case, each, "a prompt").mask() for each in (call, moved))
    require(
        torch.equal(first[:, q_order], second),
        "the heads of a KV head choose by themselves",
        "they choose other keys if the KV heads are in another order",
        "a sum or a maximum over all heads; under tensor parallelism a process has some of them only",
    )


def full_settings_read_everything(case: Case) -> None:
    """Or answer that the call is dense."""
    for queries in (LENGTH, CHUNK):
        call = make_call(LENGTH, queries=queries)
        require(
            torch.equal(mask_of(case.bound_in_full().plan(call), call), visible(call)),
            "the full settings read every key",
            "some key is left out",
            "`full` is not full, or a bound that is off by one",
        )


def an_op_executes_the_plan(case: Case) -> None:
    """All backends of it alike, and the same call the same way."""
    call = make_call(LENGTH, row_starts=[0, 33])
    plan = _plan_of(case, call, "a prompt")
    require(
        type(plan) in table.OPS,
        "a plan is of a kind that an op executes",
        f"{type(plan).__name__} is not",
        "a plan class of your own without an op folder",
    )
    output = table.attend(call, plan, "torch").out
    require(
        torch.allclose(output, attend(call, plan), atol=2e-5, rtol=1e-5),
        "every backend gives the same output",
        "torch and the reference differ",
        "lists that name a block twice, or counts behind which lists go on",
    )
    again = _plan_of(case, call, "a prompt")
    require(
        torch.equal(again.mask(), plan.mask()),
        "the same call gives the same plan",
        "a second one differs",
        "random numbers, or something that is kept on the method between calls",
    )


def planning_reads_nothing_on_the_host(case: Case) -> None:
    """Not of padded batches either."""
    method = case.bound()
    call = make_call(LENGTH, row_starts=[0, 33])
    method.plan(call)  # what is made once for the model may be
    with no_host_sync() as mode:
        method.plan(without_values(call, mode, {}))


RULES = (
    inputs_are_left_alone,
    a_prompt_is_sparse_and_causal,
    lists_are_in_order,
    full_settings_read_everything,
    a_short_row_is_dense_in_a_batch,
    a_padded_row_is_the_row_without_the_batch,
    groups_of_heads_are_independent,
    an_op_executes_the_plan,
    planning_reads_nothing_on_the_host,
)
