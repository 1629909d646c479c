"""Build a Decoder from a checkpoint, one tensor at a time: read the parts, cast, concatenate, pack, drop.

Peak memory is the model plus one fused tensor in the model's dtype and the part being read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from logging import INFO, WARNING
from typing import Protocol

import torch
from torch import nn

from paceline import formats
from paceline.config import DecoderConfig
from paceline.errors import CheckpointError, OutOfMemoryError, is_out_of_memory
from paceline.formats.streamed import PIECE_ROWS, StreamedTable, WeightStream, stream_matrix, stream_table
from paceline.kernels.linear import TOO_SMALL, onednn_refusal
from paceline.kernels.linear_int4 import int4_refusal
from paceline.layers.linear import Linear
from paceline.layers.moe import MoE
from paceline.loading.progress import Progress, Silent
from paceline.loading.rules import PLAIN, Layout, Stored, stored_names
from paceline.loading.upload import FEWEST_BYTES, FileSpan, Upload, upload_refusal
from paceline.log import get_logger
from paceline.models.decoder import Decoder, Parts
from paceline.models.multimodal import OTHER_PARTS
from paceline.models.registry import family_of
from paceline.sizing import gib

log = get_logger(__name__)

Split = Callable[[DecoderConfig, "CheckpointParts"], tuple[DecoderConfig, Parts]]
"""Of the whole model what one rank builds: its config, and its parts of the checkpoint's (parallel/parts.py)."""

VOCABULARY_TABLES = ("embedding.weight", "head.weight")
# Stored by old releases of transformers, computed from the config by everyone.
INERT_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


class Tensors(Protocol):
    """The part of loading.Checkpoint that is needed here; names are Hugging Face's."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...

    def span(self, name: str) -> FileSpan | None: ...


@dataclass(frozen=True)
class Cut:
    """The part of a matrix that one rank holds: of each fused part some `rows`, and of them some `columns` (None:
    all)."""

    rows: tuple[range, ...]
    columns: range | None = None

    def shape(self, columns: int) -> tuple[int, int]:
        """What it leaves of a matrix of so many columns."""
        return sum(map(len, self.rows)), columns if self.columns is None else len(self.columns)

    def by_file(self, rows: tuple[int, ...], num_files: int) -> list[list[range]]:
        """The rows kept of each stored tensor, where the parts of `rows` rows lie in so many: one each, or all in
        one."""
        if num_files == len(rows):
            return [[kept] for kept in self.rows]
        starts = accumulate(rows, initial=0)
        return [[range(start + kept.start, start + kept.stop) for start, kept in zip(starts, self.rows, strict=False)]]


class CheckpointParts:
    """A decoder's Parts, read from a checkpoint under the family's weight rules. `files`: the checkpoint's own name of
    a tensor that the rules name. `upload` fills large ones in the background, which may go on until the decoder is
    built: what builds it keeps the tensors of tables and linears and does not look at their values."""

    def __init__(
        self,
        checkpoint: Tensors,
        names: Mapping[str, Stored],
        files: Mapping[str, str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        format: str = "dense",
        stream: WeightStream | None = None,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.files = files
        self.dtype = dtype
        self.device = device
        self.format = format
        self.stream = stream
        self.upload: Upload | None = None  # while the decoder is built
        self.progress = progress
        self.used: set[str] = set()
        self.current = ""  # the parameter being read or packed
        self.plain: Counter[str] = Counter()  # why matrices on the CPU do not run in its packed ops
        self.finer: dict[str, list[str]] = {}  # why matrices are not in the format asked for, and which

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of its own memory, never a view of the checkpoint's file."""
        return self._read(name, (shape[0],), shape[1:])

    def linear(
        self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False, cut: Cut | None = None
    ) -> Linear:
        """`rows` and `columns` are the whole matrix's, of which `cut` is read and packed."""
        if cut is not None:
            return self._linear_cut(name, rows, columns, bias, cut)
        bias_N = self._read(f"{name}.bias", rows, ()) if bias else None
        format = formats.head_format(self.format) if name == "head" else self._matrix_format(name, sum(rows), columns)
        if self.stream is not None:
            pieces = self._pieces(f"{name}.weight", rows, (columns,))
            shape = (sum(rows), columns)
            return Linear(stream_matrix(self.stream, pieces, shape, dtype=self.dtype, format=format), bias_N)
        return Linear(self._pack(self._read(f"{name}.weight", rows, (columns,), self.upload), format), bias_N)

    def _linear_cut(self, name: str, rows: tuple[int, ...], columns: int, bias: bool, cut: Cut) -> Linear:
        bias_N = self._read_cut(f"{name}.bias", rows, (), replace(cut, columns=None)) if bias else None
        head = name == "head"
        format = formats.head_format(self.format) if head else self._matrix_format(name, *cut.shape(columns))
        return Linear(self._pack(self._read_cut(f"{name}.weight", rows, (columns,), cut), format), bias_N)

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor | StreamedTable:
        if self.stream is None:
            return self._read(name, (rows,), (columns,), self.upload)
        offset = self.stream.store.nbytes
        for values in self._pieces(name, (rows,), (columns,)):
            self.stream.store.append(values.to(self.dtype))
        return StreamedTable(self.stream.store, offset, (rows, columns), self.dtype, self.device)

    def tied(self, table_VD: torch.Tensor | StreamedTable) -> Linear:
        """The output head over the embedding's values; shares their memory where the format keeps them as they are."""
        format, self.current = formats.head_format(self.format), "head.weight"
        if isinstance(table_VD, torch.Tensor):
            return Linear(self._pack(table_VD, format))
        assert self.stream is not None
        return Linear(stream_table(self.stream, table_VD, format=format))

    def num_bytes(self) -> int:
        """Bytes of all the tensors that the names lead to, as read."""
        return self._bytes(
            self.files[name] for stored in self.names.values() for name in stored.names if name in self.files
        )

    def bytes_read(self) -> int:
        """Of those that were asked for so far."""
        return self._bytes(self.used)

    def _bytes(self, files: Iterable[str]) -> int:
        return sum(math.prod(self.checkpoint.shape(name)) * self.checkpoint.dtype(name).itemsize for name in files)

    def _matrix_format(self, name: str, rows: int, columns: int) -> str:
        reason = formats.refusal(self.format, rows, columns)
        if reason is not None:
            self.finer.setdefault(reason, []).append(name)
        return formats.matrix_format(self.format, rows, columns)

    def _pack(self, values_NK: torch.Tensor, format: str) -> formats.Weight:
        reason = None
        if format == "dense" and self.device.type == "cpu":
            reason = onednn_refusal(values_NK.shape, values_NK.dtype, values_NK.device)
        elif format == "int4" and self.device.type == "cpu":
            reason = int4_refusal(values_NK.shape[0], values_NK.device)
        if reason is not None:
            self.plain[reason] += 1
        shape = (values_NK.shape[0], values_NK.shape[1])
        if self.upload is not None and not formats.keeps_memory(format, shape, self.dtype, self.device):
            self.upload.wait()
        return formats.pack(values_NK, format, dtype=self.dtype, device=self.device)

    def _read(
        self, name: str, rows: tuple[int, ...], rest: tuple[int, ...], upload: Upload | None = None
    ) -> torch.Tensor:
        """The parameter; with `upload` its values may still be on their way (`upload.wait`)."""
        self.current = name
        fused, start = torch.empty((sum(rows), *rest), dtype=self.dtype, device=self.device), 0
        for file, layout, count in self._stored(name, rows, rest):
            part, start = fused[start : start + count], start + count
            span = self.checkpoint.span(file) if upload is not None else None
            if upload is None or span is None or span.nbytes < FEWEST_BYTES:
                part.copy_(self._values(file, layout))
            elif layout == PLAIN and self.checkpoint.dtype(file) == self.dtype:
                upload.add(span, part)
            else:
                part.copy_(layout.ours(self._uploaded(upload, file, span)))
        return fused

    def _read_cut(self, name: str, rows: tuple[int, ...], rest: tuple[int, ...], cut: Cut) -> torch.Tensor:
        """The rank's part of the parameter. Of a file that is mapped only the pages that hold it are read, but for
        other layouts than ours and types that are computed."""
        self.current = name
        shape = cut.shape(rest[0]) if rest else (sum(map(len, cut.rows)),)
        columns = None if cut.columns is None else slice(cut.columns.start, cut.columns.stop)
        fused, start = torch.empty(shape, dtype=self.dtype, device=self.device), 0
        stored = list(self._stored(name, rows, rest))
        for (file, layout, _), ranges in zip(stored, cut.by_file(rows, len(stored)), strict=True):
            values: torch.Tensor | None = None
            for kept in ranges:
                part, start = fused[start : start + len(kept)], start + len(kept)
                span = None if columns is not None or layout != PLAIN else self._span_of(file, kept)
                if self.upload is not None and span is not None:
                    self.upload.add(span, part)
                    continue
                if values is None:
                    values = self._values(file, layout)
                rows_RK = values[kept.start : kept.stop]
                part.copy_(rows_RK if columns is None else rows_RK[:, columns])
        return fused

    def _span_of(self, file: str, rows: range) -> FileSpan | None:
        """Where some rows of a tensor lie in its file; None where they are to be read plainly."""
        span = self.checkpoint.span(file) if self.upload is not None else None
        if span is None or self.checkpoint.dtype(file) != self.dtype:
            return None
        row = span.nbytes // max(self.checkpoint.shape(file)[0], 1)
        if len(rows) * row < FEWEST_BYTES:
            return None
        return FileSpan(span.path, span.offset + rows.start * row, len(rows) * row)

    def _uploaded(self, upload: Upload, file: str, span: FileSpan) -> torch.Tensor:
        """A tensor as it is stored, on the device."""
        values = torch.empty(self.checkpoint.shape(file), dtype=self.checkpoint.dtype(file), device=self.device)
        upload.add(span, values)
        upload.wait()
        return values

    def _pieces(self, name: str, rows: tuple[int, ...], rest: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The same a few rows at a time, for what shall never be whole in memory."""
        self.current = name
        for file, layout, _ in self._stored(name, rows, rest):
            yield from torch.split(self._values(file, layout), PIECE_ROWS)

    def _stored(self, name: str, rows: tuple[int, ...], rest: tuple[int, ...]) -> Iterator[tuple[str, Layout, int]]:
        """The checkpoint's tensors whose rows, one after the other, are the parameter's: name, layout and rows."""
        stored = self.names[name]
        if len(stored.names) == 1:  # fused in the checkpoint already
            rows = (sum(rows),)
        for part, count in zip(stored.names, rows, strict=True):
            file = self._check(name, part, stored.layout.stored_shape((count, *rest)))
            self.used.add(file)
            yield file, stored.layout, count

    def _values(self, file: str, layout: Layout) -> torch.Tensor:
        """In our order of rows; a view of the file where it can be."""
        values = self.checkpoint.read(file)
        self.progress.advance(values.nbytes)
        return layout.ours(values)

    def _check(self, name: str, part: str, expected: tuple[int, ...]) -> str:
        if part not in self.files:
            raise CheckpointError(
                f"tensor '{part}' is missing from the checkpoint (expected shape {list(expected)}): "
                "download the model again, or check that config.json belongs to it"
            )
        file = self.files[part]
        found = tuple(self.checkpoint.shape(file))
        if name in VOCABULARY_TABLES and found[1:] == expected[1:] and found != expected:
            raise CheckpointError(
                f"tensor '{file}' has {found[0]} rows and config.json's vocab_size is {expected[0]}: download both "
                "again, or, if tokens were added or removed, set vocab_size to the rows that there are"
            )
        if found != expected:
            raise CheckpointError(
                f"tensor '{file}' has shape {list(found)}, expected {list(expected)}: config.json does not belong to it"
            )
        return file


def names_in_file(wanted: Collection[str], stored: Collection[str], prefix: str) -> dict[str, str]:
    """Of the tensors that the rules name, those that the checkpoint has -> its own name for each.

    Checkpoints of multimodal models keep the language model under a prefix of its own, those of a bare model leave
    the family's `prefix` out. Raises CheckpointError where two of its tensors could be the same one.
    """
    found: dict[str, str] = {}
    for name in stored:
        for theirs, ours in (("", ""), ("language_model.", ""), ("model.language_model.", prefix), ("", prefix)):
            ours_name = ours + name.removeprefix(theirs)
            if name.startswith(theirs) and ours_name in wanted:
                if ours_name in found:
                    raise CheckpointError(
                        f"the checkpoint has '{found[ours_name]}' and '{name}', both the model's '{ours_name}'"
                    )
                found[ours_name] = name
                break
    return found


def settle_tied_head(checkpoint: Tensors, config: DecoderConfig) -> DecoderConfig:
    """`config`, untied where it ties the output head to the embedding and the checkpoint has a head that differs.

    transformers decides so too (5.23, `tie_weights`): the tensor that was stored is meant. That is said; an equal copy,
    which every .bin file has, is no news.
    """
    if not config.tie_embeddings:
        return config
    table, head = _vocabulary_names(config)
    files = names_in_file({table, head}, checkpoint.names(), family_of(config).prefix)
    if len(files) < 2:
        return config
    table_VD, head_VD = checkpoint.read(files[table]), checkpoint.read(files[head])
    if torch.equal(table_VD, head_VD.to(table_VD.dtype)):
        return config
    log.warning(
        "config.json ties the output head to the embedding, but '%s' differs from '%s': it is used as it is, untied; "
        "set tie_word_embeddings to false in config.json",
        files[head],
        files[table],
    )
    return replace(config, tie_embeddings=False)


def _vocabulary_names(config: DecoderConfig) -> tuple[str, str]:
    """What the family calls the embedding and the output head, tied or not."""
    rules = family_of(config).weight_rules(replace(config, tie_embeddings=False))
    theirs = {rule.ours: rule.theirs[0] for rule in rules}
    return theirs["embedding.weight"], theirs["head.weight"]


def load_decoder(
    checkpoint: Tensors,
    config: DecoderConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    stream: WeightStream | None = None,
    progress: Progress | None = None,
    split: Split | None = None,
) -> Decoder:
    """The model, in `dtype` on `device`; `quantize` names the weight format of the linears (None: dense, lossless up
    to the cast to `dtype`). int4's head is int8, and so are matrices that int4 would not make smaller. With `stream`
    matrices go into its store, and only the small tensors stay on the device. `progress` counts the bytes read. With
    `split` it is one rank's part of the model.

    Raises CheckpointError for a tensor that is missing or of the wrong shape, UsageError for an unknown format,
    OutOfMemoryError where no memory is left on the way.
    """
    family = family_of(config)
    names = stored_names(
        family.weight_rules(config), config.num_layers, 0 if config.moe is None else config.moe.num_experts
    )
    wanted = {name for stored in names.values() for name in stored.names}
    parts = CheckpointParts(
        checkpoint,
        names,
        names_in_file(wanted, checkpoint.names(), family.prefix),
        dtype=dtype,
        device=torch.device(device),
        format=quantize or "dense",
        stream=stream,
        progress=progress or Silent(),
    )
    decoder = _build(config, parts, family.block, split)
    tied_copy: set[str] = set()  # of the embedding: settle_tied_head has compared them
    if config.tie_embeddings:
        tied_copy.update(names_in_file({_vocabulary_names(config)[1]}, checkpoint.names(), family.prefix).values())
    stored = set(checkpoint.names())
    other = {name for name in stored if name.startswith(OTHER_PARTS)}
    if other:
        log.warning("text only: %d tensors, of the part that sees images, are not loaded", len(other))
    mine = parts.used if split is None else set(parts.files.values())  # what this rank leaves out others have
    report_unused(stored - other - mine - tied_copy)
    for reason, finer in parts.finer.items():
        shown = ", ".join(finer[:3]) + (", ..." if len(finer) > 3 else "")
        used, asked = formats.FINER[parts.format], parts.format
        log.warning("%d matrices are in %s, not %s (%s): %s", len(finer), used, asked, shown, reason)
    for reason, count in parts.plain.items():
        log.log(INFO if reason == TOO_SMALL else WARNING, "%d matrices run through plain torch: %s", count, reason)
    return decoder


def _build(
    config: DecoderConfig,
    parts: CheckpointParts,
    block: Callable[[DecoderConfig, int, Parts], nn.Module],
    split: Split | None,
) -> Decoder:
    own: Parts
    config, own = (config, parts) if split is None else split(config, parts)
    parts.progress.start("loading", parts.num_bytes())
    try:
        if parts.stream is not None or upload_refusal(parts.device) is not None:
            decoder = Decoder(config, own, block)
        else:
            with Upload(parts.device, parts.progress) as parts.upload:
                decoder = Decoder(config, own, block)
        if parts.device.type == "cuda":
            for module in decoder.modules():
                if isinstance(module, MoE):
                    module.stack()
        return decoder
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"no memory is left on {parts.device} for '{parts.current}', with {gib(parts.bytes_read())} of "
            f"{gib(parts.num_bytes())} read: another process may have taken what was free; use quantization='int8' or "
            "'int4', offload='auto' or a smaller model"
        ) from error
    finally:
        parts.progress.done()


def report_unused(names: Collection[str]) -> None:
    """Say once which tensors of the checkpoint the model has no place for."""
    unused = sorted(name for name in names if not name.endswith(INERT_SUFFIXES))
    if unused:
        shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        log.warning("%d tensors of the checkpoint are not used by this model: %s", len(unused), shown)
