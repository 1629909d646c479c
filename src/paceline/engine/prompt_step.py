"""A step with a few prompt tokens in it on device buffers that never move, so that a CUDA graph can hold it.

Kernel by kernel such a step is the host's time: of Llama-3.1-8B's shape 16 ms for 128 tokens, of which the device works
7. Its decodes come first, then the tokens of its prompts, both filled up to sizes that are captured. Unused decodes
have length 0 and slots of -1; the tokens that fill the prompts up have slots of -1 too, and belong to a request without
blocks, which attends over as many keys of the null block: zeros.

Shapes: D rows of decodes, P tokens of prompts, T = D + P, Q prompts, that request included; R = D + Q, B blocks of the
longest context or of P tokens, G groups of the cache, N requests that choose a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.decode_buffers import groups_of
from paceline.inputs import AttentionMetadata, KVLayer, ModelInputs, Ragged
from paceline.kernels.decode_attention import make_counts
from paceline.models.model import Model
from paceline.phases import Phases
from paceline.sizing import PROMPTS, SMALL_STEP
from paceline.transfer import send

Run = Callable[[Hashable, Callable[[], None]], None]
Ints = npt.NDArray[np.int64]

DECODES = (0, 8, 32, 64, 128, 192)  # that are captured, and the most of all
TOKENS = (64, 128, 256, SMALL_STEP)
# A form that comes once is run kernel by kernel: a program that asks one question does not wait for a capture.
UNCAPTURED = 1


def run_plainly(key: Hashable, compute: Callable[[], None]) -> None:
    """The twin of engine/graphs.py: no capture."""
    compute()


@dataclass(frozen=True)
class Form:
    """What a graph is captured for: so many rows of decodes, and tokens of prompts."""

    decodes: int
    tokens: int

    def __str__(self) -> str:
        return f"steps of {self.decodes} decodes and {self.tokens} tokens of prompts"


@dataclass(frozen=True)
class Content:
    """What a step has in a form: its first `decodes` requests have one token each."""

    form: Form
    decodes: int
    tokens: int

    def rows_of(self, tokens_N: Ints) -> Ints:
        """Where tokens of the step are in the form."""
        return np.where(tokens_N < self.decodes, tokens_N, tokens_N + self.form.decodes - self.decodes)


class PromptStep:
    """`run` is given a Form and what computes it. `max_decodes` is the most of a step; `exact`: nothing is filled up,
    for what knows no unused rows."""

    def __init__(
        self,
        model: Model,
        kv: Sequence[KVLayer],
        block_size: int,
        *,
        hidden_size: int,
        max_decodes: int,
        max_model_len: int,
        run: Run = run_plainly,
        exact: bool = False,
        uncaptured: int = UNCAPTURED,
    ) -> None:
        self.model, self.kv, self.block_size, self.max_decodes = model, kv, block_size, max_decodes
        self._run, self._exact, self._uncaptured = run, exact, uncaptured
        self._decodes = [*(size for size in DECODES if size < max_decodes), max_decodes]
        groups, device = len(model.kv_groups), model.device
        tokens, requests = max_decodes + SMALL_STEP, max_decodes + PROMPTS
        self._token_ids_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._positions_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._slots_GT = torch.full((groups, tokens), -1, dtype=torch.int64, device=device)
        longest = max(max_model_len, SMALL_STEP)  # the latter of the request that fills up
        blocks = -(-longest // block_size)
        self._tables_GRB = torch.zeros((groups, requests, blocks), dtype=torch.int32, device=device)
        self._starts_R1 = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self._lens_R = torch.zeros(requests, dtype=torch.int32, device=device)
        self._hidden_TC = torch.zeros((tokens, hidden_size), dtype=model.dtype, device=device)
        self._steps: dict[Form, Callable[[], None]] = {}
        self._seen: dict[Form, int] = {}

    @property
    def nbytes(self) -> int:
        """Of the buffers on the device (sizing_cuda.prompt_buffer_bytes)."""
        buffers = (self._token_ids_T, self._positions_T, self._slots_GT, self._tables_GRB, self._hidden_TC)
        return sum(buffer.nbytes for buffer in (*buffers, self._starts_R1, self._lens_R))

    @property
    def forms(self) -> list[Form]:
        """All that are captured, the smallest first."""
        return [Form(decodes, tokens) for decodes in self._decodes for tokens in TOKENS]

    def content_of(self, query_starts: Sequence[int]) -> Content | None:
        """Of a step whose requests begin there, counted as one of its form; None for one that is computed kernel by
        kernel."""
        counts_R = np.diff(query_starts)
        decodes = int(np.argmin(np.append(counts_R, 0) == 1))
        tokens = query_starts[-1] - decodes
        if decodes > self.max_decodes or tokens > SMALL_STEP or len(counts_R) - decodes >= PROMPTS:
            return None
        form = Form(decodes, tokens)
        if not self._exact:
            form = Form(
                next(size for size in self._decodes if decodes <= size), next(size for size in TOKENS if tokens <= size)
            )
        self._seen[form] = seen = self._seen.get(form, 0) + 1
        return Content(form, decodes, tokens) if seen > self._uncaptured else None

    def run(self, inputs: ModelInputs, content: Content) -> torch.Tensor:
        """The hidden states of a step, [T, C], good until the next one; `content.rows_of` says where which is."""
        self._fill(inputs, content)
        form = content.form
        self._run(form, self._step_of(form))
        return self._hidden_TC[: form.decodes + form.tokens]

    @torch.inference_mode()
    def prepare(self, phases: Phases, form: Form) -> None:
        """Run a step of so many unused rows, so that its graph is captured before a request waits for it. For a moment
        in which no step is in flight."""
        self._seen[form] = self._uncaptured
        self._clear(form)
        self._bound(Content(form, 0, 0), np.zeros(0, dtype=np.int64), ())
        with phases.time("graphs"):
            self._run(form, self._step_of(form))

    # ------------------------------------------------------------------------------------------------- at every step

    def _clear(self, form: Form) -> None:
        """Nothing is kept of any token, and the request that fills up has no block."""
        self._slots_GT[:, : form.decodes + form.tokens].fill_(-1)
        self._tables_GRB[:, form.decodes + PROMPTS - 1].zero_()

    def _fill(self, inputs: ModelInputs, content: Content) -> None:
        attention, form = inputs.attention, content.form
        self._clear(form)
        num_requests = len(attention.seq_lens)
        for first, last, to in (
            (0, content.decodes, 0),
            (content.decodes, content.decodes + content.tokens, form.decodes),
        ):
            end = to + last - first
            self._token_ids_T[to:end].copy_(inputs.token_ids_T[first:last])
            self._positions_T[to:end].copy_(inputs.positions_T[first:last])
            for slots_T, group in zip(self._slots_GT, attention.groups, strict=True):
                slots_T[to:end].copy_(group.slot_mapping_T[first:last])
        for first, last, to in ((0, content.decodes, 0), (content.decodes, num_requests, form.decodes)):
            for tables_RB, group in zip(self._tables_GRB, attention.groups, strict=True):
                given_RB = group.block_tables_RB[first:last]
                tables_RB[to : to + last - first, : given_RB.shape[1]].copy_(given_RB)
        self._bound(content, np.asarray(attention.query_starts), attention.seq_lens)

    def _bound(self, content: Content, query_starts: Ints, seq_lens: Sequence[int]) -> None:
        """Where requests begin and how much they attend over. Prompts that are not there have no tokens."""
        form, decodes = content.form, content.decodes
        starts_R1 = np.full(form.decodes + PROMPTS + 1, form.decodes + content.tokens, dtype=np.int32)
        lens_R = np.zeros(form.decodes + PROMPTS, dtype=np.int32)
        starts_R1[: form.decodes] = np.arange(form.decodes)
        prompts = query_starts[decodes:-1]
        starts_R1[form.decodes : form.decodes + len(prompts)] = content.rows_of(prompts)
        lens_R[:decodes] = seq_lens[:decodes]
        lens_R[form.decodes : form.decodes + len(prompts)] = seq_lens[decodes:]
        starts_R1[-1], lens_R[-1] = form.decodes + form.tokens, form.tokens - content.tokens
        bounds = send(np.concatenate([starts_R1, lens_R]), self.model.device)
        self._starts_R1[: len(starts_R1)].copy_(bounds[: len(starts_R1)])
        self._lens_R[: len(lens_R)].copy_(bounds[len(starts_R1) :])

    # --------------------------------------------------------------------------------------------- what computes it

    def _step_of(self, form: Form) -> Callable[[], None]:
        if form not in self._steps:
            self._steps[form] = self._build(form)
        return self._steps[form]

    def _build(self, form: Form) -> Callable[[], None]:
        tokens, requests, device = form.decodes + form.tokens, form.decodes + PROMPTS, self.model.device
        groups = groups_of(self.model.kv_groups, self._tables_GRB[:, :requests], self._slots_GT[:, :tokens])
        ragged = Ragged(self._starts_R1[: requests + 1], self._lens_R[:requests], form.decodes)
        attention = AttentionMetadata((), (), self.block_size, groups, ragged=ragged)
        if form.decodes:
            attention = replace(attention, counts=make_counts(form.decodes, device))
        inputs = ModelInputs(self._token_ids_T[:tokens], self._positions_T[:tokens], attention)

        def compute() -> None:
            self._hidden_TC[:tokens].copy_(self.model(inputs, self.kv))

        return compute
