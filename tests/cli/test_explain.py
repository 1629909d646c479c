"""`paceline explain`: a table and JSON of the same choices."""

from __future__ import annotations

import json

import pytest

from paceline.cli.app import main

MODEL = ["explain", "--device", "cpu", "--max-model-len", "64", "--quiet"]


@pytest.mark.default_model
def test_table_and_json_tell_the_same(default_model_gguf, capsys):
    assert main([*MODEL, "--model", str(default_model_gguf), "--quantize", "int8"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert main([*MODEL, "--model", str(default_model_gguf), "--quantize", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert table[0].split("  ")[0] == "operation"
    assert len(table) == 1 + len(found)
    assert found[-1] == {
        "operation": "launches",
        "kernel": "kernel by kernel",
        "reason": "the device is cpu",
        "count": 1,
    }
    (down,) = [one for one in found if one["operation"].startswith("down ")]
    assert down == {
        "operation": "down 576 x 1536, 8.02 bits a value",
        "kernel": "torch's _weight_int8pack_mm",
        "reason": "",
        "count": 30,
    }


@pytest.mark.default_model
def test_the_number_of_rows_decides(default_model_gguf, capsys):
    assert main([*MODEL, "--model", str(default_model_gguf), "--quantize", "int8", "--rows", "9"]) == 0
    assert "above 8 rows torch's int8 op is slower" in capsys.readouterr().out
