"""A decode of one token a request on device buffers that never move, so that a CUDA graph can hold it.

The host writes one staging buffer and copies it; block tables follow where one changed. Chosen tokens stay on the
device as the next step's inputs, and come to the host beside, whenever it looks: it never has to wait for a step before
it launches the next.

Shapes: R rows of the step (requests, then unused rows up to a size that is captured), M rows of the buffers, B blocks
of the longest context, G groups of the cache, F fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from paceline.engine.request_tokens import RequestTokens
from paceline.engine.step import PLACEHOLDER, ScheduledRequest
from paceline.inputs import AttentionMetadata, GroupMetadata, KVLayer, ModelInputs
from paceline.kernels.decode_attention import make_counts
from paceline.models.model import Model
from paceline.phases import Phases
from paceline.sampling.random import uniform
from paceline.sampling.static import CHOOSERS, KINDS, TOP_P_OFF, Chosen, Kind, RowParams

# Steps whose staging buffers may be in use at once: one that the host writes, and two that it has not collected.
RING = 3

# Fields of a staging buffer, 8 bytes a row each; the slots of the G groups follow.
FIELDS = ("position", "length", "token", "previous", "greedy", "uniform", "temperature", "min_p", "top_k", "top_p")

Capture = Callable[[tuple[int, Kind], Callable[[], None]], None]


def run_plainly(key: tuple[int, Kind], compute: Callable[[], None]) -> None:
    """The twin of engine/graphs.py: no capture."""
    compute()


def fits(scheduled: ScheduledRequest, state: RequestTokens) -> bool:
    """Whether the request's share of a step is a plain decode: one token, chosen from its logits alone."""
    return (
        len(scheduled.token_ids) == 1
        and scheduled.samples
        and not scheduled.scored
        and state.plain_from is not None
        and scheduled.start >= state.plain_from
    )


@dataclass(frozen=True)
class _Fields:
    """One staging buffer, or the device's copy of it: [F + G, M] of 8 bytes, and each field as what it is."""

    all: torch.Tensor
    position: torch.Tensor  # int64
    length: torch.Tensor  # int32
    token: torch.Tensor  # int64: known to the host, or PLACEHOLDER
    previous: torch.Tensor  # int64: the row of the last step that chose the token
    slots: tuple[torch.Tensor, ...]  # int64, one a group; -1 where there is no request
    params: RowParams


def _fields(num_groups: int, rows: int, device: torch.device, *, pin: bool = False) -> _Fields:
    table = torch.zeros((len(FIELDS) + num_groups, rows), dtype=torch.int64, device=device, pin_memory=pin)
    of = dict(zip(FIELDS, table, strict=False))
    params = RowParams(
        greedy_R=of["greedy"].view(torch.bool)[:rows],
        uniform_R=of["uniform"].view(torch.float64),
        temperature_R=of["temperature"].view(torch.float32)[:rows],
        min_p_R=of["min_p"].view(torch.float32)[:rows],
        top_k_R=of["top_k"],
        top_p_R=of["top_p"].view(torch.float64),
    )
    length = of["length"].view(torch.int32)[:rows]
    slots = tuple(table[len(FIELDS) :])
    return _Fields(table, of["position"], length, of["token"], of["previous"], slots, params)


class _Staging:
    """What one step sends and gets back, in host memory that the device copies by itself."""

    def __init__(self, num_groups: int, rows: int, blocks: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        host = torch.device("cpu")
        self.fields = _fields(num_groups, rows, host, pin=on_cuda)
        self.tables_GMB = torch.zeros((num_groups, rows, blocks), dtype=torch.int32, pin_memory=on_cuda)
        self.result = torch.zeros((2, rows), dtype=torch.int64, pin_memory=on_cuda)
        self.event = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the device has done all that this buffer was last used for."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(frozen=True)
class PendingDecode:
    """A decode on its way."""

    staging: _Staging
    num_rows: int

    def result(self) -> tuple[list[int], list[bool]]:
        """Each request's token, and whether its logits were finite. Waits for the step."""
        self.staging.wait()
        ids, values = self.staging.result.numpy()
        count = self.num_rows
        return ids[:count].tolist(), np.isfinite(values.view(np.float32)[:count]).tolist()


class DecodeStep:
    """`run` is given (rows, kind of sampling) and what computes a step of them: once, or by a graph of it.

    `round_up`: the rows that a step of so many requests computes. Unused rows have length 0 and slots of -1: only
    kernels that know them may get any. `max_rows` is the most requests of a step, and one of the sizes.
    """

    def __init__(
        self,
        model: Model,
        kv: Sequence[KVLayer],
        block_size: int,
        *,
        max_rows: int,
        max_model_len: int,
        run: Capture = run_plainly,
        round_up: Callable[[int], int] = int,
    ) -> None:
        self.model, self.kv, self.block_size, self.max_rows = model, kv, block_size, max_rows
        self._run, self._round_up = run, round_up
        groups, device = len(model.kv_groups), model.device
        blocks = -(-max_model_len // block_size)
        self._fields = _fields(groups, max_rows, device)
        self._tables_GMB = torch.zeros((groups, max_rows, blocks), dtype=torch.int32, device=device)
        # The chosen tokens, which are also the next step's, and beside them what is finite where they can be trusted.
        self._result = torch.zeros((2, max_rows), dtype=torch.int64, device=device)
        self._token_ids, self._values = self._result[0], self._result[1].view(torch.float32)[:max_rows]
        self._ring = cycle([_Staging(groups, max_rows, blocks, device) for _ in range(RING)])
        self._row_of: dict[RequestTokens, int] = {}  # of the requests in the last step
        self._states: list[RequestTokens] | None = None  # whose next tokens the device has, row by row
        self._row_tables: list[tuple[tuple[int, ...], ...] | None] = [None] * max_rows  # what the device has
        self._steps: dict[tuple[int, Kind], Callable[[], None]] = {}

    @property
    def nbytes(self) -> int:
        """Of the buffers on the device (sizing_cuda.decode_buffer_bytes)."""
        return self._fields.all.nbytes + self._tables_GMB.nbytes + self._result.nbytes

    def launch(self, scheduled: Sequence[ScheduledRequest], states: list[RequestTokens]) -> PendingDecode:
        """Start a step of requests that `fits`; nothing is waited for. A token that the host does not know must have
        been chosen by the launch before this one."""
        staging = next(self._ring)
        staging.wait()  # three steps ago: long since done
        rows = self._round_up(len(scheduled))
        moved = self._write(staging.fields, scheduled, states, rows)
        kind = max((state.kind for state in states), key=KINDS.index)
        if kind != "greedy":
            self._write_params(staging.fields.params, scheduled, states, rows)
        self._fields.all.copy_(staging.fields.all, non_blocking=True)
        self._copy_tables(staging, scheduled)
        if moved:
            given, fed = self._fields.token[:rows], self._token_ids[self._fields.previous[:rows]]
            self._token_ids[:rows] = torch.where(given != PLACEHOLDER, given, fed)
        self._run((rows, kind), self._step_of(rows, kind))
        staging.result.copy_(self._result, non_blocking=True)
        if staging.event is not None:
            staging.event.record()
        return PendingDecode(staging, len(scheduled))

    @torch.inference_mode()
    def prepare(self, phases: Phases, num_requests: int = 1, kind: Kind = "greedy") -> None:
        """Run a step of so many unused rows, so that its kernels are loaded, and its graph captured, before a request
        waits for them; `phases` gets the seconds of each. For a runner without requests: what the device holds of
        their tokens is lost."""
        rows = self._round_up(num_requests)
        fields = next(self._ring).fields
        self._write(fields, [], [], rows)
        self._write_params(fields.params, [], [], rows)
        self._fields.all.copy_(fields.all)
        compute = self._step_of(rows, kind)
        with phases.time("kernels"):
            compute()
        with phases.time("graphs"):
            self._run((rows, kind), compute)

    def forget_rows(self) -> None:
        """Tokens were chosen elsewhere since the last launch: the next one sends what it needs."""
        self._states = None

    def _write(
        self, fields: _Fields, scheduled: Sequence[ScheduledRequest], states: list[RequestTokens], rows: int
    ) -> bool:
        """Fill the staging buffer; whether the tokens on the device are not those of these rows."""
        count, size = len(scheduled), self.block_size
        positions = [request.start for request in scheduled]
        _put(fields.position, positions, rows, 0)
        _put(fields.length, [position + 1 for position in positions], rows, 0)
        for group, slots in enumerate(fields.slots):
            found = [r.block_tables[group][r.start // size] * size + r.start % size for r in scheduled]
            _put(slots, found, rows, -1)
        if states == self._states:
            return False
        pairs = [(state, p, p < state.num_known) for state, p in zip(states, positions, strict=True)]
        _put(fields.token, [state.known(p) if known else PLACEHOLDER for state, p, known in pairs], rows, 0)
        _put(fields.previous, [0 if known else self._row_of[state] for state, _, known in pairs], rows, 0)
        self._row_of = dict(zip(states, range(count), strict=True))
        self._states = states
        return True

    def _write_params(
        self, params: RowParams, scheduled: Sequence[ScheduledRequest], states: Sequence[RequestTokens], rows: int
    ) -> None:
        asked = [state.new.params for state in states]
        vocab = self.model.vocab_size
        numbers = [
            0.0 if state.kind == "greedy" else uniform(state.new.seed, request.start + 1)
            for request, state in zip(scheduled, states, strict=True)
        ]
        _put(params.uniform_R, numbers, rows, 0.0)
        _put(params.greedy_R, [p.greedy for p in asked], rows, True)
        _put(params.temperature_R, [1.0 if p.greedy else p.temperature for p in asked], rows, 1.0)
        _put(params.min_p_R, [p.min_p for p in asked], rows, 0.0)
        _put(params.top_k_R, [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in asked], rows, vocab)
        _put(params.top_p_R, [p.top_p if p.top_p < 1 else TOP_P_OFF for p in asked], rows, TOP_P_OFF)

    def _copy_tables(self, staging: _Staging, scheduled: Sequence[ScheduledRequest]) -> None:
        """The block tables that changed. Blocks behind a shorter table's end stay: no length reaches them."""
        for row, request in enumerate(scheduled):
            tables = request.block_tables
            if tables is self._row_tables[row]:
                continue
            self._row_tables[row] = tables
            for group, table in enumerate(tables):
                staged = staging.tables_GMB[group, row, : len(table)]
                staged.numpy()[:] = table
                self._tables_GMB[group, row, : len(table)].copy_(staged, non_blocking=True)

    def _step_of(self, rows: int, kind: Kind) -> Callable[[], None]:
        if (rows, kind) not in self._steps:
            self._steps[rows, kind] = self._build(rows, kind)
        return self._steps[rows, kind]

    def _build(self, rows: int, kind: Kind) -> Callable[[], None]:
        """What computes a step of so many rows, from buffers to buffers."""
        fields = self._fields
        groups = tuple(
            GroupMetadata(tables_MB[:rows], slots[:rows], group.window, ())
            for tables_MB, slots, group in zip(self._tables_GMB, fields.slots, self.model.kv_groups, strict=True)
        )
        counts = make_counts(rows, self.model.device)
        attention = AttentionMetadata(range(rows + 1), (), self.block_size, groups, fields.length[:rows], counts)
        chosen = Chosen(self._token_ids[:rows], self._values[:rows])
        inputs = ModelInputs(chosen.ids_R, fields.position[:rows], attention)
        params = RowParams(**{name: tensor[:rows] for name, tensor in vars(fields.params).items()})
        choose = CHOOSERS[kind]

        def compute() -> None:
            choose(self.model.logits(self.model(inputs, self.kv)), params, chosen)

        return compute


def _put(field: torch.Tensor, values: Sequence[float], rows: int, unused: float) -> None:
    """Write a host field: the requests' values, then one for the unused rows."""
    array, count = field.numpy(), len(values)
    array[:count] = values
    if rows > count:
        array[count:rows] = unused
