"""The rules of methods for decode. A forward is a call for each layer of the model, as the hook makes them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from sparse_patch.call import AttentionCall, ForwardState, KVState
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.ops.attention import table
from sparse_patch.plans import Dense, PagePlan, Plan
from sparse_patch.testing.calls import in_buffer, make_call, row_alone
from sparse_patch.testing.rules import Case, mask_of, no_host_sync, require, visible, without_values

LENGTH = 300
STEPS = 6  # tokens that are decoded one after the other


def _calls(case: Case, length: int = LENGTH, queries: int = 1, **options: object) -> list[AttentionCall]:
    """The calls of one forward: the last tokens of other keys in each layer."""
    layers = sorted(case.method(**case.small).layers_of(case.shape.num_layers))
    calls = [make_call(length, queries=queries, seed=layer, **options) for layer in layers]  # type: ignore[arg-type]
    return [replace(call, phase="decode", layer=layer) for call, layer in zip(calls, layers, strict=True)]


def _forward(method: BoundMethod, calls: Sequence[AttentionCall]) -> list[Plan]:
    """The plans of one forward."""
    state: ForwardState = {}
    return [_step(method, replace(call, forward_state=state)) for call in calls]


def _step(method: BoundMethod, call: AttentionCall) -> Plan:
    """One call as the hook runs it."""
    method.remember(call)
    plan = method.plan(call)
    if not isinstance(plan, Dense):
        attended = table.attend(call, plan, "reference")
        if attended.logits is not None and attended.lse is not None:
            method.select(call, attended.logits, attended.lse[..., -1])
    return plan


def _masks(method: BoundMethod, calls: Sequence[AttentionCall]) -> list[torch.Tensor]:
    return [mask_of(plan, call) for plan, call in zip(_forward(method, calls), calls, strict=True)]


def a_step_is_sparse_and_reads_only_what_is_there(case: Case) -> None:
    """Of one forward through all layers."""
    calls = _calls(case, row_starts=[0, 21])
    masks = _masks(case.bound(), calls)
    for call, mask in zip(calls, masks, strict=True):
        require(
            not (mask & ~visible(call)).any(),
            "a step reads no padding and nothing behind the last key",
            f"layer {call.layer} does",
            "positions counted from the batch's first token and not from `call.row_starts()`",
        )
    require(
        any(not torch.equal(mask, visible(call)) for call, mask in zip(calls, masks, strict=True)),
        "the small settings are sparse",
        "every layer reads everything",
        "min_length is not 0 in `small`, or its budget holds the whole cache",
    )


def full_settings_read_everything(case: Case) -> None:
    """Or answer that the call is dense."""
    calls = _calls(case)
    require(
        all(torch.equal(m, visible(call)) for m, call in zip(_masks(case.bound_in_full(), calls), calls, strict=True)),
        "the full settings read every key",
        "some key is left out",
        "`full` is not full, or a bound that is off by one",
    )


def a_short_cache_is_dense(case: Case) -> None:
    """Of methods with a `min_length`."""
    if "min_length" in case.method.model_fields:
        plans = _forward(case.bound(min_length=LENGTH + 1), _calls(case))
        require(
            all(isinstance(plan, Dense) for plan in plans),
            "a cache below min_length is read densely",
            f"one of {LENGTH} tokens is read sparsely with min_length {LENGTH + 1}",
            "`why_dense` without `super().why_dense(call)`",
        )


def a_padded_row_is_the_row_without_the_batch(case: Case) -> None:
    """What each row reads."""
    method, calls = case.bound(), _calls(case, row_starts=[0, 21, 100])
    for row in range(3):
        start = int(calls[0].row_starts()[row])
        alone = _masks(method, [row_alone(call, row)[0] for call in calls])
        require(
            all(
                torch.equal(mask[row, ..., start:], expected[0])
                for mask, expected in zip(_masks(method, calls), alone, strict=True)
            ),
            "a padded row reads what it reads without the batch",
            f"row {row}, which begins at key {start}, reads other keys",
            "positions counted from the batch's first token and not from `call.row_starts()`, or a choice made over "
            "all rows together",
        )


def a_static_cache_is_as_a_growing_one(case: Case) -> None:
    """Its buffer is longer than what is valid, and only the device knows the length."""
    method, calls = case.bound(), _calls(case, row_starts=[0, 21])
    static = [in_buffer(call, 77) for call in calls]
    for call, growing, fixed in zip(calls, _masks(method, calls), _masks(method, static), strict=True):
        require(
            torch.equal(growing, fixed[..., : call.kv_length]) and not fixed[..., call.kv_length :].any(),
            "a static cache is read as a growing one with the same keys",
            f"layer {call.layer} reads other keys",
            "`call.kv_length` used for the number of valid keys: of a static cache that is the buffer's size, and "
            "`call.lengths()` is the number",
        )


def one_plan_serves_a_range_of_lengths(case: Case) -> None:
    """A decode step that runs as a CUDA graph is planned once, and its host knows a length that grows."""
    method, calls = case.bound(), [in_buffer(call, 77) for call in _calls(case, row_starts=[0, 21])]
    planned, grown = ([replace(call, known_end=LENGTH + more) for call in calls] for more in (0, 50))
    if any((method.why_dense(a) is None) != (method.why_dense(b) is None) for a, b in zip(planned, grown, strict=True)):
        return  # the step is planned again
    for call, mask, later in zip(calls, _masks(method, planned), _masks(method, grown), strict=True):
        require(
            torch.equal(mask, later),
            "a step is planned by the length that the host knows in `why_dense` only",
            f"layer {call.layer} reads other keys if the host says {LENGTH + 50} and not {LENGTH}",
            "`call.length`, `call.known_end` or `call.decisive_length` in `choose` or `plan`; a CUDA graph would keep "
            "what it gave first. `call.lengths()` is the number on the device",
        )


def what_is_kept_gives_the_plans_of_a_fresh_start(case: Case) -> None:
    """A prompt, then token by token; also after the rows of the cache changed places (beam search)."""
    method, kept = case.bound(), [KVState() for _ in _calls(case)]
    for length in range(LENGTH - STEPS, LENGTH + 1):
        rows = torch.tensor([1, 0] if length == LENGTH else [0, 1])
        if length == LENGTH:
            for state in kept:
                state.change_rows(lambda tensor: tensor.flip(0))
        calls = [_until(call, length, first=length == LENGTH - STEPS, rows=rows) for call in _whole(case)]
        with_state = [replace(call, kv_state=state) for call, state in zip(calls, kept, strict=True)]
        if calls[0].phase == "prefill":
            for call in with_state:
                method.remember(call)
            continue
        require(
            all(map(torch.equal, _masks(method, calls), _masks(method, with_state))),
            "what is kept beside the cache gives the plans of a fresh start",
            f"they differ at {length} tokens",
            "`statistics` that does not take in every token, tensors in `call.kv_state` whose first dimension is not "
            "the batch, or something that is kept on the method",
        )
    require(
        method.keeps_state or not any(any(state.tensors.values()) for state in kept),
        "a method that keeps tensors beside the cache says so",
        "it wrote to `call.kv_state`",
        "`keeps_state = True` is missing in the class",
    )


def _whole(case: Case) -> list[AttentionCall]:
    return _calls(case, queries=LENGTH, row_starts=[0, 21])


def _until(call: AttentionCall, length: int, first: bool, rows: torch.Tensor) -> AttentionCall:
    """The call at a length: all tokens if it is the first, else the last one. Rows in another order if asked for."""
    begin = 0 if first else length - 1
    assert call.kv_start is not None
    return replace(
        call,
        q=call.q[rows, :, begin:length],
        k=call.k[rows, :, :length],
        v=call.v[rows, :, :length],
        kv_start=call.kv_start[rows],
        q_start=begin,
        phase="prefill" if first else "decode",
        forward_state={},
    )


def forwards_do_not_meet(case: Case) -> None:
    """Two forwards of one model, a layer of each in turn: threads, and prompts in turn."""
    method, first, second = case.bound(), _calls(case), _calls(case, length=LENGTH - 40)
    expected = _masks(method, first), _masks(method, second)
    states: tuple[ForwardState, ForwardState] = {}, {}
    for layer, pair in enumerate(zip(first, second, strict=True)):
        for number, call in enumerate(pair):
            plan = _step(method, replace(call, forward_state=states[number]))
            require(
                torch.equal(mask_of(plan, call), expected[number][layer]),
                "two forwards in turn read what each reads by itself",
                f"layer {call.layer} reads something else",
                "something that is kept on the method; `call.forward_state` is the place for it",
            )


def several_queries_are_served(case: Case) -> None:
    """A verification of candidates: dense, or each query as far as it sees."""
    calls = _calls(case, queries=3)
    for call, mask in zip(calls, _masks(case.bound(), calls), strict=True):
        require(
            not (mask & ~visible(call)).any(),
            "a query reads no key after itself",
            "one of three that come together does",
            'answer Dense("more than one query") in `why_dense` if `call.q.shape[2] > 1`',
        )


def planning_reads_nothing_on_the_host(case: Case) -> None:
    """Of a growing cache and of a static one."""
    method = case.bound()
    for calls in (_calls(case, row_starts=[0, 21]), [in_buffer(call, 77) for call in _calls(case, row_starts=[0, 21])]):
        _masks(method, calls)  # what is made once for the model may be
        with no_host_sync() as mode:
            state: ForwardState = {}
            for call in calls:
                fake = without_values(call, mode, state)
                method.remember(fake)
                plan = method.plan(fake)
                if isinstance(plan, PagePlan) and plan.wants_logits:
                    logits = torch.empty(2, call.q.shape[1], call.kv_length)
                    method.select(fake, logits, torch.empty(2, call.q.shape[1]))


RULES = (
    a_step_is_sparse_and_reads_only_what_is_there,
    full_settings_read_everything,
    a_short_cache_is_dense,
    a_padded_row_is_the_row_without_the_batch,
    a_static_cache_is_as_a_growing_one,
    one_plan_serves_a_range_of_lengths,
    what_is_kept_gives_the_plans_of_a_fresh_start,
    forwards_do_not_meet,
    several_queries_are_served,
    planning_reads_nothing_on_the_host,
)
