"""`paceline plan`: its tables, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.cli.app import main

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
LLAMA = str(CONFIGS / "llama-3.1-8b.json")
MIXTRAL = str(CONFIGS / "mixtral-8x7b-v0.1.json")


def test_the_tables(capsys):
    assert main(["plan", LLAMA, "--gpu", "H100"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM, 8.03 B parameters, bfloat16" in out
    assert "90% of 80 GiB, NVIDIA H100 data sheet, SXM" in out
    (cache,) = [line for line in out.splitlines() if "cache:" in line]
    assert "32 layers, 128.0 KiB a token" in cache
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "15.7"] in [row[:2] for row in rows]  # GiB of one request of 1k tokens
    assert ["1", "221"] in [row[:2] for row in rows]  # tokens/s of one
    assert "✗" in out


def test_a_model_over_two_gpus(capsys):
    assert main(["plan", LLAMA, "--gpu", "H100", "-tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "Memory of each of 2 devices" in out
    assert "32 layers, 64.0 KiB a token" in out
    assert "without what their sums take" in out


def test_json_has_everything(capsys):
    assert main(["plan", MIXTRAL, "--memory", "100GiB", "--bandwidth", "2000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_parameters"] == 46_702_792_704
    assert found["weights"]["experts"] == 32 * 8 * 3 * 4096 * 14336 * 2
    assert found["bandwidth"] == {"value": 2e12, "source": "as given"}
    assert len(found["speeds"]) == len(found["grid"]) == 5 * len(found["contexts"])


def test_training(capsys):
    assert main(["plan", LLAMA, "--train", "--devices", "64", "--sequence-length", "8192", "--memory", "80GiB"]) == 0
    out = capsys.readouterr().out
    rows = {line.strip()[:7]: line.split() for line in out.splitlines() if line.startswith("  ZeRO")}
    assert rows["ZeRO 1 "][2:5] == ["14.96", "14.96", "1.40"]  # 2, 2 and 12 / 64 bytes of each parameter
    assert "(Korthikanti et al., 2022, equations 1 to 6)" in " ".join(out.split())
    assert "(Rajbhandari et al., 2020, table 1)" in " ".join(out.split())
    assert main(["plan", LLAMA, "--train", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 7


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["--memory", "24"], "memory must be a size with its unit, such as 24GiB", 2),
        (["--memory", "0GiB"], "memory must be greater than 0", 2),
        (["--gpu", "h1000"], "did you mean 'h100'?", 2),
        (["--bandwidth", "-3"], "bandwidth must be greater than 0", 2),
        (["--bandwidth", "3", "--measure"], "contradict each other", 2),
        (["--gpu", "h100", "--measure"], "not that of another GPU", 2),
        (["--gpu", "h100", "--memory", "24GiB"], "give one of them", 2),
        (["--max-model-len", "0"], "max_model_len must be at least 1", 2),
        (["--max-model-len", "200000"], "more than the 131072 positions", 2),
        (["--max-num-seqs", "4096"], "max_num_batched_tokens (2048) must be at least max_num_seqs (4096)", 2),
        (["--devices", "8"], "--devices needs --train", 2),
        (["--train", "--quantize", "int8"], "--quantize has no meaning with --train", 2),
        (["--train", "--gpu", "h100", "--memory", "24GiB"], "give one of them", 2),
        (["--train", "--devices", "6", "--tensor-parallel-size", "4"], "must be a multiple of tensor_parallel", 2),
        (["--train", "--sequence-length", "200000"], "more than the 131072 positions", 2),
    ],
)
def test_what_it_refuses(arguments, says, code, capsys):
    assert main(["plan", LLAMA, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_name_that_is_nothing(capsys):
    assert main(["plan", "lama-3.1-8b"]) == 1
    assert "did you mean 'llama-3.1-8b'?" in capsys.readouterr().err


def test_a_directory_without_weights_is_enough(tmp_path, capsys):
    (tmp_path / "config.json").write_text(Path(LLAMA).read_text())
    assert main(["plan", str(tmp_path), "--memory", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_parameters"] == 8_030_261_248
