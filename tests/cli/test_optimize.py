import json
import sys
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


def test_the_rest_is_compiled_where_it_is_asked_for(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.fusion.passes import compile_rest

    monkeypatch.setattr(compile_rest, "compiled", lambda function: function)  # in seconds
    given = ["optimize", str(tiny_bert), "--shape", "2x7", "--rounds", "1", "--device", "cpu"]
    for bench in ([], ["--bench"]):
        for flag in ([], ["--compile-rest"]):
            assert app.main([*given, *bench, *flag]) == 0
            told = capsys.readouterr().out
            assert ("parts by torch.compile" in told) is bool(flag)
            assert ("compile rest" in told) is bool(flag and bench)


def test_openvino_takes_turns_with_the_others(tiny_bert: Path) -> None:
    pytest.importorskip("openvino")
    out = tiny_bert / "figures.json"
    given = ["optimize", str(tiny_bert), "--bench", "--shape", "1x9", "--shape", "3x7", "--rounds", "2"]
    assert app.main([*given, "--device", "cpu", "--against", "openvino", "--json", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["engine"] == "openvino"]
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 9), (3, 7)]
    assert all(0 < row["error"] < 1e-5 and row["milliseconds"] > 0 for row in rows)


def test_a_runtime_that_is_not_installed_is_one_line(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    given = ["optimize", str(tiny_bert), "--bench", "--shape", "1x7", "--rounds", "1", "--device", "cpu"]
    assert app.main([*given, "--against", "openvino"]) == 2
    assert "--against openvino needs it: pip install openvino" in capsys.readouterr().err.splitlines()[-1]


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
