"""Batch files: what is refused, and what is left of a file that a killed run was writing."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from paceline.batch.files import BatchAnswer, BatchResponse, open_answers, open_requests
from paceline.errors import UsageError


def request_line(custom_id="a", **changes):
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "é", "n": 1}}
    return json.dumps({**request, **changes}, ensure_ascii=False) + "\n"


def answer(custom_id, status=200):
    return BatchAnswer("batch_req_1", custom_id, BatchResponse(status, "req-1", msgspec.Raw(b'{"x": 1}')))


def test_requests_are_found_by_their_places(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(request_line("a") + "\n  \n" + request_line("ü", body={"prompt": "x"}) + request_line("c").strip())
    with open_requests(str(path)) as requests:
        assert [place.custom_id for place in requests.places] == ["a", "ü", "c"]
        read = [requests.read(place) for place in reversed(requests.places)]
    assert [one.custom_id for one in read] == ["c", "ü", "a"]
    assert json.loads(bytes(read[1].body)) == {"prompt": "x"}
    assert (read[0].method, read[0].url) == ("POST", "/v1/completions")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no request"),
        ("\n\n", "holds no request"),
        (request_line() + "{", "line 2 is not a batch's: Input data was truncated"),
        (request_line() + "\n[]\n", "line 3 is not a batch's: Expected `object`, got `array`"),
        (request_line(custom_id=7), "line 1 is not a batch's: Expected `str`, got `int` - at `$.custom_id`"),
        ('{"custom_id": "a", "method": "POST", "url": "/x"}', "missing required field `body`"),
        (request_line() + request_line("b") + request_line(), "line 3: custom_id 'a' is that of line 1, too"),
    ],
)
def test_a_file_that_is_no_batch_names_its_line(tmp_path, text, says):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError) as raised, open_requests(str(path)):
        pass
    assert says in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"in.jsonl cannot be read: No such file"):
        open_requests(str(tmp_path / "in.jsonl")).__enter__()
    with pytest.raises(UsageError, match=r"out.jsonl cannot be written: No such file"):
        open_answers(str(tmp_path / "no" / "out.jsonl"), set()).__enter__()


def test_an_answer_is_a_line_in_openais_form(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_answers(str(path), {"a", "b"}) as answers:
        answers.add(answer("a"))
        assert path.read_bytes().endswith(b"}\n")  # at once, not at the end
        answers.add(answer("b", 400))
        assert (answers.answered, answers.num_failed) == ({"a", "b"}, 1)
    first, second = map(json.loads, path.read_text().splitlines())
    response = {"status_code": 200, "request_id": "req-1", "body": {"x": 1}}
    assert first == {"id": "batch_req_1", "custom_id": "a", "response": response, "error": None}
    assert second["response"]["status_code"] == 400


def test_what_was_cut_off_is_removed_wherever_it_was_cut(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_answers(str(path), {"a", "b"}) as answers:
        answers.add(answer("a", 500))
        whole = os.path.getsize(path)
        answers.add(answer("b"))
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        with open_answers(str(path), {"a", "b"}) as answers:
            assert (answers.answered, answers.num_failed) == ({"a"}, 1)
            assert os.path.getsize(path) == whole
            answers.add(answer("b"))
        assert path.read_bytes() == data


def test_answers_of_another_batch_stay_as_they_are(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_answers(str(path), {"a"}) as answers:
        answers.add(answer("a"))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="line 1 answers 'a', which this batch does not ask: write to another file"):
        open_answers(str(path), {"b"}).__enter__()
    path.write_bytes(before + b"notes\n")
    with pytest.raises(UsageError, match="line 2 is not a batch's"):
        open_answers(str(path), {"a"}).__enter__()
    assert path.read_bytes() == before + b"notes\n"
