"""OpenAI's batch files: a request a line in, an answer a line out, in whatever order answers are ready.

https://platform.openai.com/docs/api-reference/batch/request-input and .../request-output
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import msgspec

from paceline.errors import UsageError

T = TypeVar("T")


class BatchRequest(msgspec.Struct, frozen=True):
    """A line of the input. `body`: the endpoint's own, as bytes of JSON."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class BatchResponse(msgspec.Struct, frozen=True):
    """What the endpoint answered; a request that it refused has that status and OpenAI's error object in `body`."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchAnswer(msgspec.Struct, frozen=True):
    """A line of the output. `error` is OpenAI's for requests that no endpoint answered; here each is answered."""

    id: str
    custom_id: str
    response: BatchResponse
    error: None = None


_request = msgspec.json.Decoder(BatchRequest)
_answer = msgspec.json.Decoder(BatchAnswer)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Place:
    """Where a request is: its line's first byte, and the bytes of the line."""

    custom_id: str
    offset: int
    length: int


class Requests:
    """A file of requests. The bodies stay on the disk until they are asked."""

    def __init__(self, file: BinaryIO, places: Sequence[Place]) -> None:
        self._file = file
        self.places = places

    def read(self, place: Place) -> BatchRequest:
        self._file.seek(place.offset)
        return _request.decode(self._file.read(place.length))


@contextmanager
def open_requests(path: str) -> Iterator[Requests]:
    """Raises UsageError that names the line for a file that cannot be read or is not a batch's."""
    with _open(path, "rb", "read") as file:
        yield Requests(file, _find(file, path))


def _find(file: BinaryIO, path: str) -> list[Place]:
    places: list[Place] = []
    seen: dict[str, int] = {}
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            custom_id = _read(_request, line, f"{path} line {number}").custom_id
            if custom_id in seen:
                raise UsageError(
                    f"{path} line {number}: custom_id '{custom_id}' is that of line {seen[custom_id]}, too: "
                    "each must be its own"
                )
            seen[custom_id] = number
            places.append(Place(custom_id, offset, len(line)))
        offset += len(line)
    if not places:
        raise UsageError(f"{path} holds no request")
    return places


class Answers:
    """A file of answers, added to. `answered`: the custom_ids of those there; `num_failed` counts the refused ones."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.answered: set[str] = set()
        self.num_failed = 0

    def note(self, answer: BatchAnswer) -> None:
        """It is there."""
        self.answered.add(answer.custom_id)
        self.num_failed += answer.response.status_code != 200

    def add(self, answer: BatchAnswer) -> None:
        """Write it whole. Raises OSError."""
        line = _encode(answer) + b"\n"
        # One call for a line: what kills the process comes before or after it. A full disk may take a part, which the
        # next run removes.
        if self._file.write(line) != len(line):
            raise OSError("the disk is full")
        self.note(answer)


@contextmanager
def open_answers(path: str, asked: Collection[str]) -> Iterator[Answers]:
    """A file to add answers to. What was cut off when an earlier run was killed is removed first, so every line is
    whole. Raises UsageError for a file that cannot be written, or holds anything but answers to what is `asked`."""
    with _open(path, "a+b", "written") as file:
        answers = Answers(file)
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            answer = _read(_answer, line, f"{path} line {number}")
            if answer.custom_id not in asked:
                raise UsageError(
                    f"{path} line {number} answers '{answer.custom_id}', which this batch does not ask: "
                    "write to another file"
                )
            answers.note(answer)
            whole += len(line)
        file.truncate(whole)
        yield answers
        os.fsync(file.fileno())


def _open(path: str, mode: Literal["rb", "a+b"], verb: str) -> BinaryIO:
    try:
        # Unbuffered where it is written: a line is on its way to the disk when `add` returns.
        return Path(path).open(mode, buffering=0 if mode == "a+b" else -1)
    except OSError as error:
        raise UsageError(f"{path} cannot be {verb}: {error.strerror}") from None


def _read(decoder: msgspec.json.Decoder[T], line: bytes, where: str) -> T:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not a batch's: {error}") from None
