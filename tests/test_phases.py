from __future__ import annotations

from paceline import phases


def test_parts_in_order_and_a_part_that_comes_again(monkeypatch):
    clock = iter([1.0, 1.5, 2.0, 4.0, 10.0, 10.25])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    found = phases.Phases()
    for name in ("weights", "kernels", "weights"):
        with found.time(name):
            pass
    assert list(found.seconds.items()) == [("weights", 0.75), ("kernels", 2.0)]


def test_parts_that_run_beside_each_other():
    """A compiler in a thread and graphs between requests: whichever ends first, the other is the one that runs."""
    found = phases.Phases()
    compiling, capturing = found.time("compile"), found.time("graphs")
    compiling.__enter__()
    capturing.__enter__()
    assert found.current == "graphs"
    compiling.__exit__(None, None, None)
    assert found.current == "graphs"
    capturing.__exit__(None, None, None)
    assert found.current is None
    assert set(found.seconds) == {"compile", "graphs"}
