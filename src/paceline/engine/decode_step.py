"""A decode of one token a request on device buffers that never move, so that a CUDA graph can hold it.

A request keeps its row while it decodes, whoever else comes and goes, so that a step writes only what changes: on the
host the numbers that count on, all rows at once, and what a new request asks; block by block what tables gain. One
copy sends it. Chosen tokens stay on the device as the next step's inputs, and come to the host beside, whenever it
looks: it never has to wait for a step before it launches the next. A step with prompts in it, which the host makes anew
and a graph holds where they are few (engine/prompt_step.py), takes its decodes' tokens from these buffers and leaves
all that it chooses there.

Shapes: R rows of the step (requests, then unused rows up to a size that is captured), M rows of the buffers, B blocks
of the longest context, G groups of the cache, N requests in the scheduler's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.decode_buffers import Staging, groups_of, make_fields
from paceline.engine.prompt_step import PromptStep, Run, run_plainly
from paceline.engine.request_tokens import RequestTokens
from paceline.engine.step import PLACEHOLDER, ScheduledRequest
from paceline.inputs import AttentionMetadata, KVLayer, ModelInputs
from paceline.kernels.decode_attention import make_counts
from paceline.log import get_logger
from paceline.models.model import Model
from paceline.phases import Phases
from paceline.sampling.random import MASK, uniforms
from paceline.sampling.static import CHOOSERS, KINDS, TOP_P_OFF, Chosen, Kind, RowParams
from paceline.transfer import send

log = get_logger(__name__)

# Steps whose staging buffers may be in use at once: one that the host writes, and two that it has not collected.
RING = 3

Ints = npt.NDArray[np.int64]


def fits(scheduled: Sequence[ScheduledRequest], states: Sequence[RequestTokens]) -> bool:
    """Whether a step chooses one token at most for each request, and from its logits alone."""
    return not any(
        request.scored
        or request.num_drafts
        or (
            request.samples
            and (state.plain_from is None or request.start + len(request.token_ids) - 1 < state.plain_from)
        )
        for request, state in zip(scheduled, states, strict=True)
    )


def all_decode(scheduled: Sequence[ScheduledRequest]) -> bool:
    """Whether each request computes its last token alone."""
    return all(len(request.token_ids) == 1 and request.samples for request in scheduled)


def _kind_of(states: Sequence[RequestTokens]) -> Kind:
    """That serves them all."""
    return max({state.kind for state in states}, key=KINDS.index)


class Decodes(NamedTuple):
    """What a graph is captured for: so many rows, and a kind of sampling."""

    rows: int
    kind: Kind

    def __str__(self) -> str:
        return f"decodes of {self.rows} rows ({self.kind})"


NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Ends:
    """The requests of a step that choose a token: from which row of T, and at which position of theirs it will be."""

    states: list[RequestTokens]
    last_N: Ints
    positions_N: Ints


@dataclass(frozen=True)
class PendingDecode:
    """A step on its way. `rows_N`: each request's."""

    staging: Staging
    rows_N: Ints

    def result(self) -> tuple[list[int], list[bool]]:
        """Each request's token, and whether its logits were finite. Waits for the step."""
        self.staging.wait()
        ids, values = self.staging.result.numpy()
        fine = np.isfinite(values.view(np.float32)[: len(values)])
        return ids[self.rows_N].tolist(), fine[self.rows_N].tolist()


class DecodeStep:
    """`run` is given Decodes and what computes a step of them: once, or by a graph of it.

    `round_up`: the rows that a step of so many requests computes. Unused rows have length 0 and slots of -1: only
    kernels that know them may get any. `max_rows` is the most requests of a step. `prompts`: what computes steps with a
    few tokens of prompts.
    """

    def __init__(
        self,
        model: Model,
        kv: Sequence[KVLayer],
        block_size: int,
        *,
        max_rows: int,
        max_model_len: int,
        run: Run = run_plainly,
        round_up: Callable[[int], int] = int,
        prompts: PromptStep | None = None,
    ) -> None:
        self.model, self.kv, self.block_size, self.max_rows = model, kv, block_size, max_rows
        self.prompts = prompts
        self._run, self._round_up = run, round_up
        groups, device = len(model.kv_groups), model.device
        blocks = -(-max_model_len // block_size)
        self._host = make_fields(groups, max_rows, torch.device("cpu"))
        self._edits_GM, self._blocks_GM = self._host.edits_GM.numpy(), self._host.blocks_GM.numpy()
        self._host_tables_GMB = np.zeros((groups, max_rows, blocks), dtype=np.int32)
        self._seeds_M = np.zeros(max_rows, dtype=np.uint64)
        self._fields = make_fields(groups, max_rows, device)
        self._tables_GMB = torch.zeros((groups, max_rows, blocks), dtype=torch.int32, device=device)
        # The chosen tokens, which are also the next step's, and beside them what is finite where they can be trusted.
        self._result = torch.zeros((2, max_rows), dtype=torch.int64, device=device)
        self._token_ids, self._values = self._result[0], self._result[1].view(torch.float32)[:max_rows]
        self._ring = cycle([Staging(groups, max_rows, blocks, device) for _ in range(RING)])
        # The last step: its requests in the scheduler's order and their rows, None where their next tokens are not the
        # device's; rows that were computed; the kind that served them all.
        self._states: list[RequestTokens] | None = None
        self._rows_N = NO_ROWS
        self._row_of: dict[RequestTokens, int] = {}
        self._num_rows, self._kind = 0, KINDS[0]
        self._row_states: list[RequestTokens | None] = [None] * max_rows  # whose parameters the host's fields have
        self._row_tables: list[tuple[tuple[int, ...], ...] | None] = [None] * max_rows  # what the device has
        self._steps: dict[tuple[int, Kind], Callable[[], None]] = {}

    @property
    def nbytes(self) -> int:
        """Of the buffers on the device (sizing_cuda.decode_buffer_bytes), those of `prompts` included."""
        prompts = 0 if self.prompts is None else self.prompts.nbytes
        return self._fields.all.nbytes + self._tables_GMB.nbytes + self._result.nbytes + prompts

    def launch(self, scheduled: Sequence[ScheduledRequest], states: list[RequestTokens]) -> PendingDecode:
        """Start a step of requests that `fits`; nothing is waited for. A token that the host does not know must have
        been chosen by the launch before this one."""
        staging = next(self._ring)
        staging.wait()  # three steps ago: long since done
        starts_N = np.array([request.start for request in scheduled], dtype=np.int64)
        moved = states != self._states
        if moved:
            self._place(states)
            self._write_tokens(starts_N, states)
            self._take_places(states)
        edits = self._write_tables(staging, scheduled)
        self._write_positions(starts_N)
        rows, kind = self._num_rows, self._kind
        self._send_fields(staging)
        for group, count in enumerate(edits):
            if count:
                places, blocks = self._fields.edits_GM[group, :count], self._fields.blocks_GM[group, :count]
                self._tables_GMB[group].view(-1).scatter_(0, places, blocks)
        if moved:
            given, fed = self._fields.token_M[:rows], self._token_ids[self._fields.previous_M[:rows]]
            self._token_ids[:rows] = torch.where(given != PLACEHOLDER, given, fed)
        self._run(Decodes(rows, kind), self._step_of(rows, kind))
        return self._receive(staging, self._rows_N)

    def launch_mixed(
        self, inputs: ModelInputs, unknown: Sequence[tuple[int, RequestTokens]], ends: Ends
    ) -> PendingDecode:
        """Start a step with prompts in it: nothing is waited for. `unknown`: which of its tokens the launch before this
        one has chosen, and for whom."""
        staging, device = next(self._ring), self.model.device
        staging.wait()
        if unknown:
            places = send(np.array([place for place, _ in unknown]), device)
            rows = send(np.array([self._row_of[state] for _, state in unknown]), device)
            inputs.token_ids_T.index_copy_(0, places, self._token_ids[rows])
        if ends.states:
            self._place(ends.states)
            self._take_places(ends.states)
            self._write_uniforms(ends.positions_N)
            self._send_fields(staging)
        content = None if self.prompts is None else self.prompts.content_of(inputs.attention.query_starts)
        if self.prompts is not None and content is not None:
            hidden_TD, last_N = self.prompts.run(inputs, content), content.rows_of(ends.last_N)
        else:
            hidden_TD, last_N = self.model(inputs, self.kv), ends.last_N
        if ends.states:
            last_R = np.empty_like(self._rows_N)
            last_R[self._rows_N] = last_N
            hidden_RD = hidden_TD[send(last_R, device)]
            CHOOSERS[self._kind](self.model.logits(hidden_RD), *self._choice(len(last_R)))
        return self._receive(staging, self._rows_N if ends.states else NO_ROWS)

    @torch.inference_mode()
    def prepare(self, phases: Phases, num_requests: int = 1, kind: Kind = "greedy") -> None:
        """Run a step of so many unused rows, so that its kernels are loaded, and its graph captured, before a request
        waits for them; `phases` gets the seconds of each. For a runner without requests: what the device holds of
        their tokens is lost."""
        self.forget_rows()
        rows = self._round_up(num_requests)
        self._clear(0, rows)
        self._fields.all.copy_(self._host.all)
        compute = self._step_of(rows, kind)
        with phases.time("kernels"):
            compute()
        with phases.time("graphs"):
            self._run(Decodes(rows, kind), compute)

    def new_rows(self, states: Sequence[RequestTokens]) -> int | None:
        """The rows that a step of these requests computes, where none of its kind has been before."""
        key = self._round_up(len(states)), _kind_of(states)
        return None if key in self._steps else key[0]

    def lower(self, num_requests: int) -> None:
        """Memory does not hold a step of so many requests: the next smaller size is the largest from now on."""
        rows = self._round_up(num_requests)
        self.max_rows = max((n for n in range(1, num_requests) if self._round_up(n) < rows), default=0)
        log.warning("no memory is left for decodes of %d requests ahead of the host", num_requests)

    def forget_rows(self) -> None:
        """Tokens were chosen elsewhere since the last launch: the next one sends what it needs."""
        self._states = None

    # ------------------------------------------------------------------------------------ when requests come and go

    def _place(self, states: list[RequestTokens]) -> None:
        """Give each request a row of the first ones: its own where it has one among them."""
        count = len(states)
        had = [self._row_of.get(state, count) for state in states]
        taken = {row for row in had if row < count}
        free = (row for row in range(count) if row not in taken)
        rows = [row if row < count else next(free) for row in had]
        self._rows_N = np.array(rows, dtype=np.int64)
        self._num_rows = self._round_up(count)
        self._kind = _kind_of(states)
        self._clear(count, self._num_rows)

    def _clear(self, first: int, end: int) -> None:
        """Make rows `first` to `end` ones without a request, which ask for nothing."""
        if first == end:
            return
        host, vocab = self._host, self.model.vocab_size
        for field in (host.position_M, host.length_M, host.token_M):
            field[first:end] = 0
        host.slots_GM[:, first:end] = -1
        self._row_states[first:end] = [None] * (end - first)
        off = RowParams(*(torch.tensor([value]) for value in (True, 0.0, 1.0, 0.0, vocab, TOP_P_OFF)))
        for name, value in vars(off).items():
            vars(host.params)[name][first:end] = value

    def _write_tokens(self, starts_N: Ints, states: list[RequestTokens]) -> None:
        """Where each row's token comes from: the host, or a row of the last step."""
        rows, token, previous = self._rows_N.tolist(), self._host.token_M.numpy(), self._host.previous_M.numpy()
        for row, state, position in zip(rows, states, starts_N.tolist(), strict=True):
            if position < state.num_known:
                token[row], previous[row] = state.known(position), 0
            else:
                token[row], previous[row] = PLACEHOLDER, self._row_of[state]
        previous[len(rows) : self._num_rows] = 0

    def _take_places(self, states: list[RequestTokens]) -> None:
        """From here on the rows are those of `_place`; what the requests ask that are new in theirs."""
        self._row_of = dict(zip(states, self._rows_N.tolist(), strict=True))
        self._states = states
        fields, vocab = [field.numpy() for field in vars(self._host.params).values()], self.model.vocab_size
        for row, state in zip(self._rows_N.tolist(), states, strict=True):
            if self._row_states[row] is state:
                continue
            self._row_states[row] = state
            self._seeds_M[row] = state.new.seed & MASK
            asked = state.new.params
            values = (
                asked.greedy,
                0.0,  # _write_uniforms knows it
                1.0 if asked.greedy else asked.temperature,
                asked.min_p,
                min(asked.top_k, vocab) if asked.top_k > 0 else vocab,
                asked.top_p if asked.top_p < 1 else TOP_P_OFF,
            )
            for field, value in zip(fields, values, strict=True):
                field[row] = value

    # ------------------------------------------------------------------------------------------------- at every step

    def _write_tables(self, staging: Staging, scheduled: Sequence[ScheduledRequest]) -> list[int]:
        """Take in the block tables that changed: those that gained a block as edits, the others whole. Returns how many
        edits each group has. Blocks behind a shorter table's end stay: no length reaches them."""
        had, rows = self._row_tables, self._rows_N.tolist()
        edits = [0] * len(self.model.kv_groups)
        changed = [
            (row, request.block_tables)
            for row, request in zip(rows, scheduled, strict=True)
            if request.block_tables is not had[row]
        ]
        for row, tables in changed:
            for group, table in enumerate(tables):
                held = had[row]
                count = 0 if held is None or table[: len(held[group])] != held[group] else len(held[group])
                self._host_tables_GMB[group, row, count : len(table)] = table[count:]
                if len(table) == count + 1:
                    place = edits[group]
                    edits[group] = place + 1
                    self._edits_GM[group, place] = row * self._host_tables_GMB.shape[2] + count
                    self._blocks_GM[group, place] = table[count]
                elif len(table) > count:
                    staged = staging.tables_GMB[group, row, : len(table)]
                    staged.numpy()[:] = self._host_tables_GMB[group, row, : len(table)]
                    self._tables_GMB[group, row, : len(table)].copy_(staged, non_blocking=True)
            had[row] = tables
        return edits

    def _write_positions(self, starts_N: Ints) -> None:
        """The position that each row computes, and what follows from it."""
        rows, host = self._rows_N, self._host
        host.position_M.numpy()[rows] = starts_N
        host.length_M.numpy()[rows] = starts_N + 1
        blocks_N, offsets_N = np.divmod(starts_N, self.block_size)
        slots_GN = self._host_tables_GMB[:, rows, blocks_N].astype(np.int64) * self.block_size + offsets_N
        host.slots_GM.numpy()[:, rows] = slots_GN
        self._write_uniforms(starts_N + 1)

    def _write_uniforms(self, positions_N: Ints) -> None:
        """What draws the tokens at these positions."""
        if self._kind != "greedy":
            rows = self._rows_N
            self._host.params.uniform_R.numpy()[rows] = uniforms(self._seeds_M[rows], positions_N)

    def _send_fields(self, staging: Staging) -> None:
        staging.fields.all.copy_(self._host.all)
        self._fields.all.copy_(staging.fields.all, non_blocking=True)

    def _receive(self, staging: Staging, rows_N: Ints) -> PendingDecode:
        staging.result.copy_(self._result, non_blocking=True)
        if staging.event is not None:
            staging.event.record()
        return PendingDecode(staging, rows_N)

    # --------------------------------------------------------------------------------------------- what computes it

    def _step_of(self, rows: int, kind: Kind) -> Callable[[], None]:
        if (rows, kind) not in self._steps:
            self._steps[rows, kind] = self._build(rows, kind)
        return self._steps[rows, kind]

    def _build(self, rows: int, kind: Kind) -> Callable[[], None]:
        """What computes a step of so many rows, from buffers to buffers."""
        fields = self._fields
        groups = groups_of(self.model.kv_groups, self._tables_GMB[:, :rows], fields.slots_GM[:, :rows])
        counts = make_counts(rows, self.model.device)
        attention = AttentionMetadata(range(rows + 1), (), self.block_size, groups, fields.length_M[:rows], counts)
        params, chosen = self._choice(rows)
        inputs = ModelInputs(chosen.ids_R, fields.position_M[:rows], attention)
        choose = CHOOSERS[kind]

        def compute() -> None:
            choose(self.model.logits(self.model(inputs, self.kv)), params, chosen)

        return compute

    def _choice(self, rows: int) -> tuple[RowParams, Chosen]:
        """What the first rows ask, and where their tokens go."""
        params = RowParams(**{name: tensor[:rows] for name, tensor in vars(self._fields.params).items()})
        return params, Chosen(self._token_ids[:rows], self._values[:rows])
