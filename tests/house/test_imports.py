"""What importing costs: nothing heavy until it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "triton", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "numpy", "rich"}


def heavy_modules_after(code: str) -> set[str]:
    """The heavy top-level packages that a fresh interpreter has imported once it ran `code`."""
    probe = f"{code}\nimport sys, json; sys.stderr.write(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    process = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    return HEAVY & set(json.loads(process.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import paceline",
        "from paceline import PacelineError, SamplingParams, SpeculativeConfig; SamplingParams(temperature=0.5)",
        "from paceline.cli import main; assert main(['--help']) == 0",
        "from paceline.cli import main; assert main(['generate', '--help']) == 0",
        "from paceline.cli import main; assert main(['plan', '--help']) == 0",
        "from paceline.cli import main; assert main(['plan', 'x', '--devices', '2']) == 2",
        "from paceline.cli import main; assert main(['chat', '--help']) == 0",
        "from paceline.cli import main; assert main(['env', '--help']) == 0",
        "from paceline.cli import main; assert main(['models', '--help']) == 0",
        "from paceline.cli import main; assert main(['models', 'delete', '--help']) == 0",
        "from paceline.cli import main; assert main(['bench', 'latency', '--help']) == 0",
        "from paceline.cli import main; assert main(['bench', 'latency', '--rounds', '0']) == 2",
        "from paceline.cli import main; assert main(['bench', 'serve', '--rate', '0']) == 2",
        "from paceline.cli import main; assert main(['generate', '--top-p', '2', 'Hi']) == 2",
        "from paceline.cli import main; assert main(['batch', '--help']) == 0",
        "from paceline.cli import main; assert main(['serve', '--help']) == 0",
        "from paceline.cli import main; assert main(['serve', '--port', 'x']) == 2",
    ],
    ids=[
        "paceline",
        "params",
        "help",
        "generate-help",
        "plan-help",
        "plan-usage-error",
        "chat-help",
        "env-help",
        "models-help",
        "models-delete-help",
        "bench-help",
        "bench-usage-error",
        "bench-serve-usage-error",
        "usage-error",
        "batch-help",
        "serve-help",
        "serve-usage-error",
    ],
)
def test_nothing_heavy_is_imported(code):
    assert heavy_modules_after(code) == set()


def test_every_public_name_resolves():
    import paceline

    for name in paceline.__all__:
        assert getattr(paceline, name) is not None
    assert set(paceline.__all__) <= set(dir(paceline))


def test_an_unknown_name_is_an_attribute_error():
    import paceline

    with pytest.raises(AttributeError, match="has no attribute 'LLLM'"):
        _ = paceline.LLLM
