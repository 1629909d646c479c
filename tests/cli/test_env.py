"""`paceline env`: facts in text and JSON, secrets kept, and a broken torch told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paceline.cli.app import main
from paceline.cli.env_facts import read_facts

SECTIONS = ["software", "cpu", "memory", "caches", "variables", "torch", "devices", "kernels", "choices"]


@pytest.fixture(scope="module")
def facts():
    return read_facts(measure=False)


def test_nothing_fails_here(facts):
    assert list(facts) == SECTIONS
    assert not [name for name, section in facts.items() if "error" in section or "warnings" in section]


def test_versions_are_those_of_this_process(facts):
    import torch

    import paceline

    assert facts["software"]["paceline"] == paceline.__version__
    assert facts["software"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["devices"]["cpu"]["threads"] == torch.get_num_threads()


def test_the_choices_are_what_the_engine_does(facts):
    """Asked of the code that decides; here, what that means on this device."""
    import torch

    from paceline.engine.device import pick_device
    from paceline.formats.dense import OneDNNWeight, pack

    device = pick_device("auto")
    assert facts["choices"]["device"].startswith(f"{device}: ")
    packed = isinstance(pack(torch.zeros(64, 64, device=device)), OneDNNWeight)
    (line,) = [line for line in facts["choices"]["linear"] if line.startswith("float32: ")] or [""]
    assert ("oneDNN" in line) == packed
    if device.type == "cpu":
        assert facts["choices"]["dtype"][2] == "stored float16 runs in float32"
    assert "%" in facts["choices"]["kv_cache"]


def test_a_refusal_of_onednn_gives_its_reason(monkeypatch):
    import paceline.kernels.linear as linear

    monkeypatch.setattr(linear, "onednn_refusal", lambda shape, dtype, device: "the moon is full")
    assert all(
        line.endswith("F.linear, as the moon is full") for line in read_facts(measure=False)["choices"]["linear"]
    )


def test_text_and_json_tell_the_same(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == SECTIONS == list(found)
    assert re.search(rf"^  total +{found['memory']['total_bytes'] / 2**30:.2f} GiB$", text, re.MULTILINE)
    assert f"  linear     {found['choices']['linear'][0]}\n" in text


def test_measure_reads_the_memory(capsys):
    assert main(["env", "--measure"]) == 0
    assert re.search(r"^  cpu +.*, read \d+\.\d GB/s$", capsys.readouterr().out, re.MULTILINE)


def test_secrets_and_the_home_directory_are_not_shown(monkeypatch, capsys):
    home = str(Path.home())
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    monkeypatch.setenv("HTTPS_PROXY", "http://ali:baba@proxy:8080")
    monkeypatch.setenv("PACELINE_CACHE", f"{home}/models")
    monkeypatch.setenv("TRITON_CACHE_DIR", f"/data{home}/triton")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    assert "sesame" not in text
    assert "baba" not in text
    variables = json.loads(text)["variables"]
    assert variables["HF_TOKEN"] == "set"
    assert variables["HTTPS_PROXY"] == "http://***@proxy:8080"
    assert variables["PACELINE_CACHE"] == "~/models"
    assert variables["TRITON_CACHE_DIR"] == f"/data{home}/triton"
    assert json.loads(text)["caches"]["hub_token"] == "set, in HF_TOKEN"


def test_a_broken_torch_is_told_and_the_rest_stands(paceline, tmp_path):
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open\\nshared object file')")
    import paceline as package

    source = str(Path(package.__file__).parents[1])
    process = paceline("env", env={"PYTHONPATH": f"{tmp_path}:{source}"})
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert process.stdout.count("error  OSError: libcudart.so.12: cannot open shared object file\n") == 4
    assert re.search(r"^  total +[\d.]+ GiB$", process.stdout, re.MULTILINE)


def test_what_a_driver_warns_of_is_told(monkeypatch):
    import warnings

    import torch

    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert read_facts(measure=False)["torch"]["warnings"] == ["CUDA initialization: the driver is too old"]
