"""The command line is a promise: this list changes with the CHANGELOG, on purpose, or not at all."""

from __future__ import annotations

import click
import pytest

from paceline.cli.app import commands
from paceline.config import QUANTIZATIONS
from paceline.formats import FORMATS

FLAGS = {
    "batch": """
        --block-size --chat-template --debug --deterministic --device --download-dir --dtype --enable-prefix-caching
        --enforce-eager --generation-config --help --kv-cache-gib --load-format --max-model-len --max-num-batched-tokens
        --max-num-seqs --memory-gib --mode --model --model-impl --offload --offload-dir --pipeline-parallel-size
        --quantization --quantize --quiet --revision --scheduling-policy --seed --served-model-name
        --speculative-config --tensor-parallel-size --threads --tokenizer --trust-remote-code
    """,
    "bench": "--help",
    "bench latency": """
        --against --context --debug --device --dtype --help --json --mode --plot --quantize --quiet --rounds
        --tensor-parallel-size --threads
    """,
    "bench throughput": """
        --against --batch --debug --decode-only --device --dtype --groups --help --input-len --json --max-num-seqs
        --mixed --mode --output-len --plot --prefix --quantize --quiet --requests --rounds --seed --step-tokens
        --threads
    """,
    "bench serve": """
        --api-key --debug --goodput --groups --help --ignore-eos --input-len --json --mixed --model --output-len --plot
        --prefix --quiet --rate --requests --seed --warmup
    """,
    "chat": """
        --chat-template --debug --deterministic --device --dtype --help --ignore-eos --max-model-len --max-tokens
        --memory-gib --min-p --min-tokens --mode --model --model-impl --no-history --offload --offload-dir --offload-to
        --pipeline-parallel-size --quantize --quiet --raw --repetition-penalty --revision --seed --speculative --stop
        --system --temperature --tensor-parallel-size --threads --top-k --top-p
    """,
    "env": "--debug --help --json --measure",
    "explain": """
        --chat-template --debug --deterministic --device --dtype --help --json --max-model-len --memory-gib --mode
        --model --model-impl --offload --offload-dir --offload-to --pipeline-parallel-size --quantize --quiet --revision
        --rows --speculative --tensor-parallel-size --threads
    """,
    "generate": """
        --chat-template --debug --deterministic --device --dtype --help --ignore-eos --json --max-model-len --max-tokens
        --memory-gib --min-p --min-tokens --mode --model --model-impl --offload --offload-dir --offload-to
        --pipeline-parallel-size --quantize --quiet --raw --repetition-penalty --revision --seed --speculative --stop
        --system --temperature --tensor-parallel-size --threads --top-k --top-p
    """,
    "models": "--debug --help --json",
    "models delete": "--debug --help --yes",
    "models path": "--debug --help",
    "models pull": "--debug --help --quiet --revision",
    "serve": """
        --allow-credentials --allowed-headers --allowed-methods --allowed-origins --api-key
        --api-server-count --api-workers --block-size
        --chat-template --config --debug --deterministic --device --download-dir --drain-timeout --dtype
        --enable-prefix-caching --enforce-eager --generation-config --help --host --kv-cache-gib --load-format
        --log-prompts --log-requests --max-body-bytes --max-logprobs --max-model-len --max-num-batched-tokens
        --max-num-queued-reqs --max-num-queued-tokens --max-num-seqs --max-queue --max-queue-tokens
        --memory-gib --metrics-alias --mode --model --model-impl --offload --offload-dir
        --otlp-traces-endpoint --pipeline-parallel-size --port --quantization --quantize --revision --root-path
        --scheduling-policy
        --seed --served-model-name --speculative-config --ssl-certfile --ssl-keyfile --ssl-keyfile-password
        --tensor-parallel-size --threads --tokenizer --trust-remote-code --trust-request-chat-template
        --uvicorn-log-level
    """,
    "optimize": """
        --against --bench --compile-rest --debug --device --dtype --help --json --level --plot --quantize --rounds
        --shape --threads
    """,
    "tune": "--debug --device --dtype --help --out --quantize --quiet --rows",
    "plan": """
        --bandwidth --block-size --debug --device --devices --dtype --fp32-gradients --gpu --help --json --kv-cache-gib
        --max-model-len --max-num-batched-tokens --max-num-seqs --measure --memory --micro-batch --precision --quantize
        --recompute --revision --sequence-length --sequence-parallel --tensor-parallel-size --train
    """,
}


def every_command(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """The commands below `group`, and those below these, by the words that call them."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        found[prefix + name] = command
        if isinstance(command, click.Group):
            found |= every_command(command, f"{prefix}{name} ")
    return found


COMMANDS = every_command(commands)


def test_the_commands_are_these():
    assert set(COMMANDS) == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_are_these(name):
    command = COMMANDS[name]
    with click.Context(command, info_name=name, help_option_names=["-h", "--help"]) as context:
        options = {flag for option in command.get_params(context) for flag in option.opts if flag.startswith("--")}
    assert options == set(FLAGS[name].split())


@pytest.mark.parametrize("name", FLAGS)
def test_every_command_and_flag_is_explained(name):
    assert COMMANDS[name].help
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.help.endswith("."), option.name


def test_every_weight_format_can_be_asked_for():
    assert {*QUANTIZATIONS, "dense"} == set(FORMATS)
