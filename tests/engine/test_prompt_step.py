"""Steps with a few prompt tokens on buffers that never move: what goes where, and which are left to the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paceline.config import KVGroup
from paceline.engine.prompt_step import DECODES, TOKENS, Content, Form, PromptStep
from paceline.inputs import AttentionMetadata, GroupMetadata, ModelInputs
from paceline.phases import Phases
from paceline.sizing import PROMPTS, SMALL_STEP

BLOCK, CONTEXT, WIDTH = 4, 40, 3
GROUPS = (KVGroup("full", (0,), None, 1, 8), KVGroup("window", (1,), 6, 1, 8))


class Model:
    """Remembers what it was given; its hidden states tell a token's id, position and slot."""

    device, dtype, kv_groups = torch.device("cpu"), torch.float32, GROUPS

    def __init__(self) -> None:
        self.seen: list[ModelInputs] = []

    def __call__(self, inputs: ModelInputs, kv: Any) -> torch.Tensor:
        self.seen.append(inputs)
        slots_T = inputs.attention.groups[0].slot_mapping_T
        return torch.stack([inputs.token_ids_T, inputs.positions_T, slots_T], dim=1).float()


def make(model: Model, *, max_decodes: int = 40, **options: Any) -> PromptStep:
    return PromptStep(
        model, [], BLOCK, hidden_size=WIDTH, max_decodes=max_decodes, max_model_len=CONTEXT, uncaptured=0, **options
    )


def step_of(*counts: int) -> ModelInputs:
    """Requests with so many tokens, each at the end of a context of twice as many; ids, slots and blocks tell them."""
    starts = tuple(int(n) for n in np.cumsum([0, *counts]))
    tokens = torch.arange(starts[-1])
    tables = torch.arange(2 * len(counts), dtype=torch.int32).view(len(counts), 2) + 1
    groups = tuple(
        GroupMetadata(tables + 100 * g, tokens + 1000 * (g + 1), group.window, ()) for g, group in enumerate(GROUPS)
    )
    attention = AttentionMetadata(starts, tuple(2 * n for n in counts), BLOCK, groups)
    return ModelInputs(tokens + 10, tokens + 500, attention)


def run(step: PromptStep, inputs: ModelInputs) -> tuple[Content, torch.Tensor]:
    content = step.content_of(inputs.attention.query_starts)
    assert content is not None
    return content, step.run(inputs, content)


def test_decodes_and_prompts_are_filled_up_each():
    model = Model()
    step = make(model)
    content, hidden_TC = run(step, step_of(1, 1, 5, 7))
    assert content == Content(Form(8, 64), 2, 12)
    (inputs,) = model.seen
    assert hidden_TC.shape == (72, WIDTH)
    places = content.rows_of(np.arange(14))
    assert places.tolist() == [0, 1, *range(8, 20)]
    assert hidden_TC[places].tolist() == [[10 + t, 500 + t, 1000 + t] for t in range(14)]
    unused = np.setdiff1d(np.arange(72), places)
    for group in inputs.attention.groups:
        assert (group.slot_mapping_T[unused] == -1).all()
    ragged = inputs.attention.ragged
    assert ragged is not None
    assert ragged.decodes == 8
    assert ragged.lens_R.tolist() == [2, 2, *[0] * 6, 10, 14, *[0] * (PROMPTS - 3), 52]
    assert ragged.starts_R.tolist() == [*range(8), 8, 13, *[20] * (PROMPTS - 2), 72]
    tables_RB = inputs.attention.groups[1].block_tables_RB
    assert tables_RB[[0, 1, 8, 9], :2].tolist() == [[101, 102], [103, 104], [105, 106], [107, 108]]
    assert inputs.attention.groups[1].window == 6


@pytest.mark.parametrize("context", [CONTEXT, 4 * SMALL_STEP])
def test_no_request_is_longer_than_its_block_table(context):
    """The one that fills up attends over the null block, as often as it has tokens."""
    model = Model()
    step = PromptStep(model, [], BLOCK, hidden_size=WIDTH, max_decodes=40, max_model_len=context, uncaptured=0)
    step.prepare(Phases(), Form(8, SMALL_STEP))
    attention = model.seen[-1].attention
    assert attention.ragged is not None
    for group in attention.groups:
        assert attention.ragged.lens_R.max() <= group.block_tables_RB.shape[1] * BLOCK
        assert group.block_tables_RB.shape[1] * BLOCK >= context


def test_nothing_of_an_earlier_step_is_left_where_it_matters():
    model = Model()
    step = make(model)
    run(step, step_of(*[1] * 8, *[4] * (PROMPTS - 1)))
    content, _ = run(step, step_of(1, 5))
    assert content.form == Form(8, 64)
    attention = model.seen[-1].attention
    assert attention.ragged is not None
    assert attention.ragged.lens_R.tolist() == [2, *[0] * 7, 10, *[0] * (PROMPTS - 2), 59]
    assert attention.ragged.starts_R.tolist() == [*range(8), 8, *[13] * (PROMPTS - 1), 72]
    for group in attention.groups:
        assert (group.slot_mapping_T[1:8] == -1).all()
        assert (group.slot_mapping_T[13:] == -1).all()
        assert (group.block_tables_RB[-1] == 0).all()  # of the request that fills up: the null block


def test_the_request_that_fills_up_has_no_block_even_where_a_decode_had_its_row():
    model = Model()
    step = make(model)
    run(step, step_of(*[1] * 40, 5))
    run(step, step_of(1, 5))
    assert (model.seen[-1].attention.groups[0].block_tables_RB[-1] == 0).all()


@pytest.mark.parametrize(
    ("counts", "form"),
    [
        ((9,), Form(0, 64)),
        ((65,), Form(0, 128)),
        ((1, 500), Form(8, 512)),
        ((SMALL_STEP,), Form(0, 512)),
        ((1,) * 9, Form(32, 64)),
        ((1,) * 33 + (2,), Form(40, 64)),
        ((1,) * 40 + (2,), Form(40, 64)),
        ((2,) * (PROMPTS - 1), Form(0, 64)),
        ((5, 1, 1), Form(0, 64)),  # only those before every prompt are decodes
    ],
)
def test_sizes_that_are_captured(counts, form):
    content = make(Model()).content_of(step_of(*counts).attention.query_starts)
    assert content is not None
    assert content.form == form


@pytest.mark.parametrize("counts", [(SMALL_STEP + 1,), (1,) * 41 + (2,), (2,) * PROMPTS])
def test_larger_steps_are_left_to_the_host(counts):
    assert make(Model()).content_of(step_of(*counts).attention.query_starts) is None


def test_a_form_that_comes_once_is_not_captured():
    step = PromptStep(Model(), [], BLOCK, hidden_size=WIDTH, max_decodes=40, max_model_len=CONTEXT)
    assert step.content_of([0, 9]) is None
    assert step.content_of([0, 70]) is None
    assert step.content_of([0, 12]) == Content(Form(0, 64), 0, 12)


def test_exact_steps_have_nothing_unused():
    model = Model()
    content, hidden_TC = run(make(model, exact=True), step_of(1, 1, 5))
    assert content.form == Form(2, 5)
    assert hidden_TC.tolist() == [[10 + t, 500 + t, 1000 + t] for t in range(7)]


def test_every_form_can_be_prepared():
    model, keys = Model(), []

    def capture(key: Any, compute: Any) -> None:
        keys.append(key)
        compute()

    step = make(model, run=capture)
    forms = step.forms
    assert forms == [Form(rows, tokens) for rows in (0, 8, 32, 40) for tokens in TOKENS]
    assert [form.decodes for form in make(Model(), max_decodes=256).forms][:: len(TOKENS)] == [*DECODES, 256]
    for form in forms:
        step.prepare(Phases(), form)
        attention = model.seen[-1].attention
        assert attention.ragged is not None
        assert attention.ragged.lens_R.tolist() == [0] * (form.decodes + PROMPTS - 1) + [form.tokens]
        assert (attention.groups[0].slot_mapping_T == -1).all()
    assert keys == forms


def test_what_was_prepared_serves_the_first_step():
    step = PromptStep(Model(), [], BLOCK, hidden_size=WIDTH, max_decodes=40, max_model_len=CONTEXT)
    step.prepare(Phases(), Form(0, 64))
    assert step.content_of([0, 9]) is not None
    assert step.content_of([0, 70]) is None


def test_the_counters_of_the_decodes_kernel_are_there_where_decodes_are():
    model = Model()
    step = make(model)
    run(step, step_of(1, 5))
    run(step, step_of(5))
    with_decodes, without = (inputs.attention.counts for inputs in model.seen)
    assert with_decodes is not None
    assert without is None
