import json
from pathlib import Path

import pytest

from paceline.cli import app


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A model's description alone: it runs with random weights."""
    from transformers import BertConfig

    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=200
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_it_tells_what_is_replaced_and_what_that_brings(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tiny_bert / "figures.json"
    given = ["optimize", str(tiny_bert), "--bench", "--shape", "2x7", "--rounds", "2", "--device", "cpu"]
    assert app.main([*given, "--json", str(out)]) == 0
    told = capsys.readouterr().out
    assert "3 linears as one" in told
    assert "What each pass brings, at 2x7:" in told
    found = json.loads(out.read_text())
    assert [(row["engine"], row["batch"], row["length"]) for row in found["rows"]] == [
        ("eager float32", 2, 7),
        ("paceline", 2, 7),
    ]
    assert 0 <= found["rows"][1]["error"] < 1e-5
    assert all(row["milliseconds"] > 0 for row in found["rows"])
    assert found["stages"][0]["name"] == "the model's own forward"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shape", "8by128"], "--shape takes batch x length, as in 8x128, got '8by128'"),
        (["--json", "x.json"], "belong to --bench"),
    ],
)
def test_bad_flags(tiny_bert: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert app.main(["optimize", str(tiny_bert), *flags]) == 2
    assert said in capsys.readouterr().err
