from __future__ import annotations

import numpy as np
import pytest

from paceline.encoders import results
from paceline.encoders.description import EncoderInfo
from paceline.errors import UsageError

EMBEDS = EncoderInfo("BertModel", "embed", 4, 32, 100)
ROWS = np.array([[3, 4, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)


def classifier(activation: str, size: int = 2) -> EncoderInfo:
    labels = tuple("abc"[:size])
    return EncoderInfo("BertForX", "classify", size, 32, 100, activation=activation, labels=labels)  # type: ignore[arg-type]


def test_embeddings_are_cut_then_normalised() -> None:
    made = results.embeddings(ROWS, EMBEDS, dimensions=2)
    assert made.tolist() == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0.5**0.5, 0.5**0.5]]))
    assert made.dtype == np.float32
    assert results.embeddings(ROWS, EMBEDS, normalize=False).tolist() == ROWS.tolist()
    assert results.embeddings(ROWS, EMBEDS)[2].tolist() == [0.5] * 4


@pytest.mark.parametrize("dimensions", [0, -1, 5])
def test_dimensions_that_are_not_there(dimensions: int) -> None:
    with pytest.raises(UsageError, match="dimensions must be from 1 to 4"):
        results.embeddings(ROWS, EMBEDS, dimensions=dimensions)


def test_activations_survive_large_logits() -> None:
    logits = np.array([[1000.0, -1000.0], [0.0, np.log(3.0)]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert results.probabilities(logits, classifier("softmax")).tolist() == pytest.approx(
            np.array([[1, 0], [0.25, 0.75]])
        )
        assert results.probabilities(logits, classifier("sigmoid")).tolist() == pytest.approx(
            np.array([[1, 0], [0.5, 0.75]])
        )
    assert results.probabilities(logits, classifier("identity")).tolist() == logits.tolist()


def test_scores_and_ranks() -> None:
    assert results.cosines(ROWS[:1], ROWS) == pytest.approx([1, 0, 0.7])
    assert results.cross_scores(np.array([[0.0]], np.float32), classifier("sigmoid", 1)) == [0.5]
    assert results.best_first([1, 3, 2, 3], None) == [1, 3, 2, 0]
    assert results.best_first([1, 3, 2, 3], 2) == [1, 3]
    with pytest.raises(UsageError, match="top_n must be at least 1"):
        results.best_first([1], 0)


def test_each_task_refuses_the_others_calls() -> None:
    with pytest.raises(UsageError, match=r"has no embeddings: use classify$"):
        results.embeddings(ROWS, classifier("softmax"))
    with pytest.raises(UsageError, match="use classify, score or rerank"):
        results.embeddings(ROWS, classifier("sigmoid", 1))
    with pytest.raises(UsageError, match="has no classes: use embed"):
        results.probabilities(ROWS, EMBEDS)
    with pytest.raises(UsageError, match="has 2 classes, where a score needs a single one"):
        results.check_scores(classifier("softmax"))
