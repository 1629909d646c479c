"""What `paceline env` tells, as plain data. Torch comes last, and a torch or a driver that is broken is a fact too."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline import __version__, host
from paceline.loading.wheel import cache_dir

if TYPE_CHECKING:
    import torch

Facts = dict[str, Any]  # JSON values; names end in _bytes or _bytes_per_second where they are that

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub")
# Shown where they are set. Of the first only that: they are secrets.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
UNPACKED = "unpacked before each product: saves memory, not time (opt-in)"
VARIABLES = (
    *("PACELINE_CACHE", "PACELINE_TUNED", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_PRELOAD", "MALLOC_CONF"),
    *("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "TOKENIZERS_PARALLELISM"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR"),
)


def read_facts(*, measure: bool) -> dict[str, Facts]:
    """Section -> facts, in the order in which they are shown. A section that fails says so and nothing else does.
    `measure`: also the read bandwidth of each device, 0.2 s each."""
    sections: dict[str, Callable[[], Facts]] = {
        "software": _software,
        "cpu": _cpu,
        "memory": _memory,
        "caches": _caches,
        "variables": _variables,
        "torch": _torch,
        "devices": lambda: _devices(measure),
        "kernels": _kernels,
        "choices": _choices,
    }
    return {name: _guarded(read) for name, read in sections.items()}


def _guarded(read: Callable[[], Facts]) -> Facts:
    """The section, with any warnings that reading it gave; or the error that it ended in."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            facts = read()
        except Exception as error:  # whatever a broken installation raises: OSError, ImportError, RuntimeError
            facts = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    if caught:
        facts["warnings"] = [" ".join(str(warning.message).split()) for warning in caught]
    return facts


# --------------------------------------------------------------------------------------------------- without torch


def _software() -> Facts:
    return {
        "paceline": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> Facts:
    cpu = host.read_cpu()
    return {
        "model": cpu.model,
        "cores": cpu.cores,
        "threads": cpu.threads,
        "threads_usable": cpu.usable,
        "cgroup_limit": cpu.quota,
        "instructions": " ".join(cpu.isa) or None,
    }


def _memory() -> Facts:
    return {
        "total_bytes": host.total_memory(),
        "available_bytes": host.available_memory(),
        "cgroup_limit_bytes": host.cgroup_bytes("memory.max"),
    }


def _caches() -> Facts:
    from huggingface_hub import constants, get_token

    token = "none: gated models need one" if get_token() is None else "set, in the hub's token file"
    if any(os.environ.get(name) for name in SECRETS):
        token = "set, in HF_TOKEN"
    return {
        "hub_cache": _shown(constants.HF_HUB_CACHE),
        "own_cache": _shown(str(cache_dir())),
        "hub_token": token,
        "hub_offline": constants.HF_HUB_OFFLINE,
    }


def _variables() -> Facts:
    found = {name: _shown(os.environ[name]) for name in VARIABLES if name in os.environ}
    return found | {name: "set" for name in SECRETS if os.environ.get(name)}


def _shown(value: str) -> str:
    """`value` fit for a bug report: no password in an address, and the home directory as ~."""
    value = re.sub(r"//[^/@\s]*@", "//***@", value)
    home = str(Path.home())
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|$)", "~", value) if len(home) > 1 else value


# ------------------------------------------------------------------------------------------------------ with torch


def _torch() -> Facts:
    import torch

    return {
        "version": torch.__version__,  # with what it was built for, which its package's version may leave out
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        "onednn_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "built_for_cuda": torch.version.cuda,
        "nvidia_driver": host.nvidia_driver(),
        "cuda_devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def _devices(measure: bool) -> Facts:
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {name: _guarded(lambda name=name: _device(torch.device(name), measure)) for name in ["cpu", *names]}  # type: ignore[misc]


def _device(device: torch.device, measure: bool) -> Facts:
    import torch

    facts: Facts = {"threads": torch.get_num_threads(), "available_bytes": host.available_memory()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts = {
            "model": about.name,
            "compute_capability": f"{about.major}.{about.minor}",
            "free_bytes": free,
            "total_bytes": total,
        }
    if measure:
        from paceline.benchmark.bandwidth import read_bandwidth

        facts["read_bytes_per_second"] = round(read_bandwidth(device))
    return facts


def _kernels() -> Facts:
    """Of Triton: its version, and on each device what its kernels can do there."""
    import torch

    from paceline.cli.env_kernels import NO_GPU, kernel_lines
    from paceline.kernels.gemv_launch import tables_of
    from paceline.kernels.gpu import gpu

    facts: Facts = {"triton": _version("triton")}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = gpu(torch.device("cuda", index))
        tables = [(_shown(str(path)), len(table)) for path, table in tables_of(found.name)]
        facts[f"cuda:{index}"] = kernel_lines(found, tables)
    return facts if len(facts) > 1 else facts | {"gpu": NO_GPU}


def _choices() -> Facts:
    """What `device="auto"` and `dtype="auto"` lead to here, asked of the code that decides."""
    import torch

    from paceline.engine.device import pick_device, pick_dtype

    device = pick_device("auto")
    stored = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = {dtype: pick_dtype("auto", dtype, device) for dtype in stored}
    return {
        "device": f"{device}: {_why_device(device)}",
        "dtype": [
            f"stored {_name(given)} runs {'so' if given == run else f'in {_name(run)}'}"
            for given, run in dtypes.items()
        ],
        "linear": _linear(sorted(set(dtypes.values()), key=str), device),
        "attention": _attention(dtypes[torch.bfloat16], device),
        "int8": _on_gpu(dtypes[torch.bfloat16], device) or _int8(device),
        "int4": _on_gpu(dtypes[torch.bfloat16], device) or _int4(device),
        "fp8": _on_gpu(dtypes[torch.bfloat16], device) or UNPACKED,
        "kv_cache": _kv_cache(device),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_device(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"the first of {torch.cuda.device_count()} that torch sees"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    driver = host.nvidia_driver()
    seen = "no NVIDIA driver is loaded" if driver is None else f"the driver is {driver}"
    return f"torch was built for CUDA {torch.version.cuda} but finds no device; {seen}"


def _linear(dtypes: list[torch.dtype], device: torch.device) -> list[str]:
    import torch

    from paceline.kernels.gemv import DENSE_ROWS
    from paceline.kernels.gpu import triton_refusal
    from paceline.kernels.linear import onednn_refusal

    lines = []
    for dtype in dtypes:
        refusal = onednn_refusal((1024, 1024), dtype, device)
        how = "oneDNN, laid out in its blocks at load" if refusal is None else f"torch's F.linear, as {refusal}"
        if device.type == "cuda":
            refusal = triton_refusal(device, dtype) or ("it is for 16 bits" if dtype == torch.float32 else None)
            how = "a Triton kernel" if refusal is None else f"no Triton kernel, as {refusal}"
            how = f"up to {DENSE_ROWS} rows {how}; else torch's F.linear"
        lines.append(f"{_name(dtype)}: {how}")
    return lines


def _attention(dtype: torch.dtype, device: torch.device) -> str:
    from paceline.kernels.attention import SDPA_BACKENDS
    from paceline.kernels.gpu import triton_refusal

    if device.type == "cpu":
        return "paged; torch's scaled_dot_product_attention for one request, plain products for a batch of decodes"
    refusal = triton_refusal(device, dtype)
    if refusal is None:
        return "paged; a Triton kernel for decodes and one for prompts and mixed steps"
    backends = ", ".join(backend.name.lower() for backend in SDPA_BACKENDS)
    return (
        f"paged; no Triton kernel, as {refusal}: plain products for decodes, else torch's scaled_dot_product_attention "
        f"over {backends}"
    )


def _on_gpu(dtype: torch.dtype, device: torch.device) -> str | None:
    """How packed weights are multiplied where Triton's kernels run; None elsewhere."""
    from paceline.kernels.gemv import MAX_ROWS
    from paceline.kernels.gpu import triton_refusal

    if triton_refusal(device, dtype) is not None:
        return None
    return f"up to {MAX_ROWS} rows read as stored by a Triton kernel, above that unpacked (opt-in)"


def _int8(device: torch.device) -> str:
    from paceline.formats.int8 import MAX_PACKED_ROWS

    if device.type == "cpu":
        return f"torch's _weight_int8pack_mm in bfloat16 up to {MAX_PACKED_ROWS} rows, above that unpacked (opt-in)"
    return UNPACKED


def _int4(device: torch.device) -> str:
    from paceline.formats.int4 import MAX_PACKED_ROWS
    from paceline.kernels.linear_int4 import BLOCKS, int4_refusal

    reason = int4_refusal(max(BLOCKS), device)
    if reason is None:
        op = f"torch's _weight_int4pack_mm_for_cpu in bfloat16 up to {MAX_PACKED_ROWS} rows, above that unpacked"
        return f"{op}; the output head in int8 (opt-in)"
    return UNPACKED if device.type == "cuda" else f"{UNPACKED}: {reason}"


def _kv_cache(device: torch.device) -> str:
    from paceline.engine.memory import CPU_CACHE_SHARE, CUDA_MEMORY_SHARE

    if device.type == "cpu":
        return f"at most {CPU_CACHE_SHARE:.0%} of the memory that the weights leave available"
    return f"what the weights and a step leave of {CUDA_MEMORY_SHARE:.0%} of the memory free before loading"
