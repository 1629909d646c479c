"""What is told of the kernels on GPUs that are not here."""

from __future__ import annotations

from paceline.cli.env_kernels import kernel_lines
from paceline.kernels.gpu import GPU

TABLE = ("kernels/tuned/NVIDIA_H100.json", 28)


def test_a_hopper_with_a_table_of_ours_and_one_of_the_users():
    lines = kernel_lines(GPU("NVIDIA H100", 132, (9, 0)), [TABLE, ("~/table.json", 3)])
    assert lines == [
        "NVIDIA H100, compute capability 9.0, 132 multiprocessors",
        "run in float32, float16 and bfloat16",
        "each starts while its predecessor runs (programmatic dependent launch)",
        "28 launches tuned in kernels/tuned/NVIDIA_H100.json",
        "3 launches tuned in ~/table.json",
        "other launches by rule",
    ]


def test_an_older_one_says_what_it_lacks_and_what_is_done_instead():
    assert kernel_lines(GPU("NVIDIA T4", 40, (7, 5)), []) == [
        "NVIDIA T4, compute capability 7.5, 40 multiprocessors",
        "run in float32 and float16",
        "no bfloat16 before compute capability 8.0: such checkpoints run in float16",
        "no loads of fp8 before compute capability 8.9: its bytes are taken apart",
        "each starts after its predecessor: programmatic dependent launch is from compute capability 9.0 on",
        "launches by rule: no table was tuned for this device (paceline tune writes one)",
    ]


def test_amd():
    lines = kernel_lines(GPU("AMD Instinct MI300X", 304), [])
    assert lines[:3] == [
        "AMD Instinct MI300X, AMD, 304 multiprocessors",
        "run in float32, float16 and bfloat16",
        "each starts after its predecessor: programmatic dependent launch is NVIDIA's alone",
    ]


def test_without_triton_it_says_why_and_what_runs():
    why = "Triton does not run here: RuntimeError: Failed to find C compiler."
    assert kernel_lines(GPU("NVIDIA H100", 132, (9, 0), triton=why), [TABLE]) == [
        "NVIDIA H100, compute capability 9.0, 132 multiprocessors",
        f"do not run: {why}",
        "torch's operators run instead; decodes have no CUDA graph",
    ]
