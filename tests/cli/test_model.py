from __future__ import annotations

from types import SimpleNamespace

import pytest

from paceline.cli import model


@pytest.mark.parametrize(("age", "first"), [(10.0, 98.5), (None, 98.5), (10.0, None)])
def test_the_phases_of_a_start_add_up(monkeypatch, age, first):
    """The process began at 90, its model was loaded at 97 and its first token came at 98.5."""
    monkeypatch.setattr(model, "process_age", lambda: age)
    monkeypatch.setattr(model.time, "perf_counter", lambda: 100.0)
    llm = SimpleNamespace(stats=lambda: SimpleNamespace(phases={"weights": 2.0, "cache": 0.5}))
    answer = SimpleNamespace(last=SimpleNamespace(metrics=SimpleNamespace(first_token_time=first)))
    expected = {"import": 4.5, "weights": 2.0, "cache": 0.5, "first token": 1.5}
    for name, known in (("import", age), ("first token", first)):
        if known is None:
            del expected[name]
    found = model.start_phases(llm, answer, loaded=97.0)
    assert list(found.items()) == list(expected.items())
