"""What the ranks get is what the scheduler gave, block tables included, and small."""

from __future__ import annotations

import pickle
import random

from paceline.engine.step import BlockCopy, Branch, NewRequest, ScheduledRequest, SchedulerOutput
from paceline.engine.wire import Receiver, Sender
from paceline.sampling.params import SamplingParams


def through(sender, receiver, output):
    return receiver.decode(pickle.loads(pickle.dumps(sender.encode(output), 5)))


def scheduled(request_id, tables, start=7, **more):
    return ScheduledRequest(request_id, start, (3,), 0, True, tables, **more)


def test_every_field_arrives():
    new = NewRequest("a", (1, 2, 3), SamplingParams(temperature=0.5, logit_bias={3: 1.0}), 5, frozenset({2}), ((4, 5),))
    output = SchedulerOutput(
        (
            ScheduledRequest("a", 0, (1, 2, 3), 0, False, ((1, 2), (3,)), range(2)),
            ScheduledRequest("b", 9, (4, 5), 1, True, ((7,), ())),
        ),
        (new,),
        (BlockCopy(0, 1, 2),),
        ("c",),
        (Branch("b", "a", 9),),
    )
    assert through(Sender(), Receiver(), output) == output


def test_tables_that_change_anyhow_arrive_and_unchanged_ones_are_the_same_object():
    chance, sender, receiver = random.Random(0), Sender(), Receiver()
    tables = {f"request {i}": ((1, 2, 3), (4,)) for i in range(4)}
    arrived = {}
    for step in range(200):
        finished = ()
        if step % 17 == 16:
            name = chance.choice(sorted(tables))
            finished, tables[name] = (name,), ((), ())
        for name in tables:
            if chance.random() < 0.5:
                full, window = tables[name]
                if chance.random() < 0.3:  # preempted, or a window that moved on
                    full = tuple(chance.randrange(5) for _ in range(chance.randrange(6)))
                    window = (0, *window[1:])
                tables[name] = (*full, chance.randrange(9)), window
        output = SchedulerOutput(
            tuple(scheduled(name, tables[name], step) for name in tables if chance.random() < 0.8), finished=finished
        )
        found = through(sender, receiver, output)
        assert found == output
        for ours, theirs in zip(output.scheduled, found.scheduled, strict=True):
            before = arrived.get(ours.request_id)
            if before is not None and before[0] is ours.block_tables and ours.request_id not in finished:
                assert theirs.block_tables is before[1]
            arrived[ours.request_id] = (ours.block_tables, theirs.block_tables)


def test_a_step_of_many_long_requests_is_small():
    sender = Sender()
    tables = [(tuple(range(i, i + 256)),) for i in range(256)]
    requests = tuple(scheduled(f"request-{i}", table, 4000) for i, table in enumerate(tables))
    first = len(pickle.dumps(sender.encode(SchedulerOutput(requests)), 5))
    grown = tuple(scheduled(f"request-{i}", ((*table[0], 9),), 4001) for i, table in enumerate(tables))
    changed = len(pickle.dumps(sender.encode(SchedulerOutput(grown)), 5))
    same = len(pickle.dumps(sender.encode(SchedulerOutput(grown)), 5))
    assert first > 150_000
    assert changed < 20_000
    assert same < 12_000
