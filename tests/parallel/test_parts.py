"""A rank's matrices are the whole model's, cut: in every format, and read without the rest of a file's rows."""

from __future__ import annotations

import pytest
import torch

from paceline import sizing
from paceline.config import ParallelConfig
from paceline.formats import keeps_memory, resident_bytes
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.models.load import Cut, load_decoder
from paceline.models.registry import read_decoder_config
from paceline.parallel.communicator import Communicator
from paceline.parallel.parts import RankSplit, join
from paceline.parallel.split import Rank, held_by, local_config


def split_decoders(config, parallel, quantize):
    """Each rank's decoder; its groups are never used, because nothing is run."""
    found = []
    whole = read_decoder_config(config)
    for index in range(parallel.world_size):
        communicator = Communicator(Rank(index, parallel), None, None, None)
        checkpoint = RandomCheckpoint(config, dtype=torch.float32, seed=1)
        decoder = load_decoder(checkpoint, whole, dtype=torch.float32, quantize=quantize, split=RankSplit(communicator))
        join(decoder, whole, communicator)
        found.append(decoder)
    return found


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("split", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", ["llama-mqa", "llama-bias", "gemma2", "qwen3-moe-mixed", "bloom", "gpt2", "opt"])
def test_each_rank_holds_what_is_planned_for_it_to_the_byte(configs, held_bytes, name, split, quantize):
    whole, parallel, cpu = read_decoder_config(configs[name]), ParallelConfig(*split), torch.device("cpu")
    format = quantize or "dense"
    for index, decoder in enumerate(split_decoders(configs[name], parallel, quantize)):
        rank = Rank(index, parallel)
        held = held_by(whole, rank)
        planned = sizing.weight_bytes(
            local_config(whole, rank),
            4,
            resident_bytes(format, torch.float32, cpu),
            tied_head_shares=keeps_memory(format, (held.head_rows, whole.hidden_size), torch.float32, cpu),
            held=held,
        )
        assert planned.total == held_bytes(decoder)


@pytest.fixture
def wide(configs):
    """Heads and inner channels of which a half is whole tiles of int4's largest groups."""
    return {**configs["llama"], "hidden_size": 64, "intermediate_size": 1024, "head_dim": 256, "num_hidden_layers": 1}


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_the_shards_of_a_matrix_make_the_whole_one(wide, format):
    checkpoint = RandomCheckpoint(wide, dtype=torch.float32, seed=1)
    whole = load_decoder(checkpoint, read_decoder_config(wide), dtype=torch.float32, quantize=format)
    parts = split_decoders(wide, ParallelConfig(2), format)

    def values(decoder, name):
        return decoder.get_submodule(name).weight.unpack().float()

    def joined(name, dim=0):
        return torch.cat([values(part, name) for part in parts], dim)

    gate, up = values(whole, "blocks.0.mlp.gate_up").chunk(2)
    gates, ups = zip(*(values(part, "blocks.0.mlp.gate_up").chunk(2) for part in parts), strict=True)
    assert torch.equal(torch.cat(gates), gate)
    assert torch.equal(torch.cat(ups), up)
    heads = values(whole, "blocks.0.attention.qkv").view(8, 256, 64)  # 4 of queries, 2 of keys, 2 of values
    own = [values(part, "blocks.0.attention.qkv").view(4, 256, 64) for part in parts]
    assert torch.equal(torch.stack([own[0][i] for i in range(4)]), heads[[0, 1, 4, 6]])
    assert torch.equal(torch.stack([own[1][i] for i in range(4)]), heads[[2, 3, 5, 7]])
    assert torch.equal(joined("head"), values(whole, "head"))
    for name in ("blocks.0.attention.out", "blocks.0.mlp.down"):
        if format == "int8":  # a scale of its own for each half of a row: finer
            exact = load_decoder(checkpoint, read_decoder_config(wide), dtype=torch.float32)
            true = values(exact, name)
            assert (joined(name, 1) - true).norm() < (values(whole, name) - true).norm()
        else:  # int4's groups stay whole
            assert torch.equal(joined(name, 1), values(whole, name))


def test_a_stage_reads_its_layers_only(configs):
    config = configs["llama"]
    first, last = split_decoders(config, ParallelConfig(1, 2), None)
    assert [len(part.blocks) for part in (first, last)] == [2, 1]
    assert first.head.weight.shape[0] == 0
    assert last.head.weight.shape[0] == 67
    assert last.embedding.table_VD.shape[0] == 0
    whole = load_decoder(RandomCheckpoint(config, dtype=torch.float32, seed=1), read_decoder_config(config),
                         dtype=torch.float32)  # fmt: skip
    expected = whole.get_submodule("blocks.2.mlp.down").weight.unpack()
    assert torch.equal(last.get_submodule("blocks.0.mlp.down").weight.unpack(), expected)


def test_a_cut_of_fused_parts_finds_them_in_one_tensor_or_in_several():
    cut = Cut((range(2, 4), range(1, 2)), range(3))
    assert cut.by_file((8, 4), 2) == [[range(2, 4)], [range(1, 2)]]
    assert cut.by_file((8, 4), 1) == [[range(2, 4), range(9, 10)]]
    assert cut.shape(6) == (3, 3)
