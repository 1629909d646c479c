"""What optimize() made of a model: counted as it happens, told on request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from paceline.fusion.cuda_graphs import Counts
from paceline.log import get_logger

log = get_logger(__name__)


@dataclass
class GraphReport:
    """One captured graph. `replaced`: how often each pass found its pattern. `left`: what a pass saw and left, with
    the reason, and how often. `error`: of the rewritten graph's results against the captured one's, relative, on the
    inputs of the first call. `refused`: why it runs as it was captured; None where it does not.
    `cuda_graphs`: of the calls on a GPU; None without. `copied_bytes`: of the model's weights that the graph holds a
    copy of, joined or packed; the graphs of one model share them."""

    nodes_before: int
    nodes_after: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    error: float | None = None
    refused: str | None = None
    cuda_graphs: Counts | None = None
    copied_bytes: int = 0


@dataclass
class Report:
    """What was replaced, graph by graph; `eager`: calls that ran the model's own forward, by reason; `breaks`: where
    Dynamo had to leave code to Python, by reason; `notes`: what was done otherwise than asked."""

    name: str
    graphs: list[GraphReport] = field(default_factory=list)
    eager: Counter[str] = field(default_factory=Counter)
    breaks: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, note: str) -> None:
        log.warning("%s: %s", self.name, note)
        self.notes.append(note)

    def leave(self, reason: str) -> None:
        """Count a call that the model's own forward answers, and say why the first time."""
        if not self.eager[reason]:
            log.warning("%s runs as it is: %s", self.name, reason)
        self.eager[reason] += 1

    @property
    def replaced(self) -> Counter[str]:
        return sum((graph.replaced for graph in self.graphs), Counter())

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.graphs)} graph{'' if len(self.graphs) == 1 else 's'} captured"]
        for index, graph in enumerate(self.graphs, 1):
            counts = ", ".join(f"{count} {name}" for name, count in graph.replaced.items()) or "nothing replaced"
            counts += f"; copies of {graph.copied_bytes / 1e6:.1f} MB of weights" if graph.copied_bytes else ""
            error = "" if graph.error is None else f"; error {graph.error:.1e}"
            lines.append(f"  graph {index}: {graph.nodes_before} -> {graph.nodes_after} nodes: {counts}{error}")
            if graph.cuda_graphs is not None:
                calls = graph.cuda_graphs
                made = f"{calls.captured} CUDA graphs captured"
                lines.append(f"    {made}: {calls.replayed} calls replayed one, {calls.eager} did not")
            if graph.refused:
                lines.append(f"    runs as captured: {graph.refused}")
            lines.extend(f"    left {count}x: {reason}" for reason, count in graph.left.items())
        lines.extend(f"  {count} calls ran as the model is: {reason}" for reason, count in self.eager.items())
        lines.extend(f"  left to Python {count}x: {reason}" for reason, count in self.breaks.items())
        lines.extend(f"  {note}" for note in self.notes)
        return "\n".join(lines)
