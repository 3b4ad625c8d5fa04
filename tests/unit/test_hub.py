"""Checkpoints on the hub: what is fetched, how a download goes on, what happens without the hub, what errors say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.unit.fake_hub import FakeHub

pytestmark = pytest.mark.integration

CONFIG = b'{"model_type": "lamed_phi3"}'
TOKENIZER = {"tokenizer.model": b"pieces", "tokenizer_config.json": b"{}", "added_tokens.json": b"{ }"}
SHARDS = {f"model-0000{k}-of-00002.safetensors": bytes([k]) * (1_000_000 * k) for k in (1, 2)}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS))}).encode()}
READ = {"config.json": CONFIG, "generation_config.json": b"[]", **TOKENIZER, **INDEX, **SHARDS}
# What lies beside them in the published repositories, and in those of people who merged a checkpoint themselves.
STRAY = {
    "README.md": b"#",
    ".gitattributes": b"",
    "modeling_m3d_lamed.py": b"raise SystemExit",
    "model.bin": b"the same once more",
    "merged_model.bin": b"and again",
    "pretrained_ViT.bin": b"a part",
    "pytorch_model.bin": b"older",
    "training_args.bin": b"code",
    "adapter_model.safetensors": b"merged in already",
    "notes.txt": b"",
}
BIG = bytes(range(256)) * 100_000  # 25.6 MB: the library writes 10 MiB at a time
# What a process does here: locate each source, tell the results and what was said.
SCRIPT = """
import json, sys
from engine.errors import CheckpointError
from engine.models import hub
{setup}
for source in sys.argv[1:]:
    said = []
    try:
        located = hub.locate(source, said.append)
        files = sorted(str(path.relative_to(located.folder)) for path in located.folder.rglob("*") if path.is_file())
        print(json.dumps({{"folder": str(located.folder), "commit": located.commit, "files": files, "said": said}}))
    except CheckpointError as error:
        print(json.dumps({{"error": str(error), "said": said}}))
"""


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.close()


class Machine:
    """A machine with a cache of its own, which runs `hub.locate` in processes of their own."""

    def __init__(self, home, hub):
        self.home, self.hub = home, hub
        self.cache = home / "hub"

    def start(self, *sources, setup="", **environment):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        own = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(setup=setup), *sources],
            cwd=ROOT,
            env={**kept, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def locate(self, *sources, **how):
        """What became of the sources: of one, its own result; of more, a list."""
        process = self.start(*sources, **how)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        results = [json.loads(line) for line in out.splitlines()]
        return results[0] if len(sources) == 1 else results

    def content(self, located):
        return {name: (self.cache.parent / located["folder"] / name).read_bytes() for name in located["files"]}


@pytest.fixture
def machine(tmp_path, hub):
    return Machine(tmp_path / "huggingface", hub)


def test_only_files_that_are_read_are_fetched_and_each_once(hub, machine):
    commit = hub.push("owner/name", {**READ, **STRAY})
    located = machine.locate("owner/name")
    assert located["commit"] == commit and located["folder"].endswith(f"/snapshots/{commit}")
    assert machine.content(located) == READ
    assert hub.fetched() == sorted(READ)
    hub.forget()
    assert machine.locate("owner/name")["files"] == sorted(READ)
    assert hub.requests == ["GET /api/models/owner/name/revision/main"]


@pytest.mark.parametrize(
    "weights, read",
    [
        ({"model.safetensors": b"1", **INDEX, **SHARDS, "pytorch_model.bin": b"2"}, ["model.safetensors"]),
        (
            {
                "pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-1.bin"}}',
                "pytorch_model-1.bin": b"1",
            },
            ["pytorch_model-1.bin", "pytorch_model.bin.index.json"],
        ),
        ({"pytorch_model.bin": b"1", "model.bin": b"2"}, ["pytorch_model.bin"]),
        ({"model.bin": b"1", "merged_model.bin": b"2"}, ["model.bin"]),
    ],
)
def test_the_first_form_of_weights_that_is_there_is_fetched(hub, machine, weights, read):
    hub.push("owner/name", {"config.json": CONFIG, **weights})
    assert machine.locate("owner/name")["files"] == ["config.json", *read]


def test_an_adapter_is_fetched_where_the_config_names_a_base_model(hub, machine):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1", "model.safetensors": b"2"}
    hub.push("owner/name", {"config.json": b'{"base_model": {}}', **adapter})
    assert machine.locate("owner/name")["files"] == sorted([*adapter, "config.json"])


def test_revisions_and_subfolders_are_found_and_the_commit_is_told(hub, machine):
    old = hub.push("owner/name", {"config.json": CONFIG, "model.safetensors": b"old"}, "v1", "refs/pr/4")
    two = {f"small/{name}": content for name, content in READ.items()}
    new = hub.push("owner/name", {**two, "large/config.json": CONFIG, "large/model.safetensors": b"large"})
    tag, request, pinned, small, large = machine.locate(
        "owner/name@v1", "owner/name@refs/pr/4", f"owner/name@{old}", "owner/name/small", f"owner/name/large@{new}"
    )
    assert [located["commit"] for located in (tag, request, pinned, small, large)] == [old, old, old, new, new]
    assert machine.content(tag)["model.safetensors"] == b"old"
    assert machine.content(small) == READ and small["folder"].endswith(f"{new}/small")
    assert machine.content(large)["model.safetensors"] == b"large"


def test_a_commit_that_is_here_needs_no_hub(hub, machine):
    commit = hub.push("owner/name", READ)
    machine.locate("owner/name")
    hub.forget()
    assert machine.locate(f"owner/name@{commit}")["files"] == sorted(READ)
    assert hub.requests == []


def test_a_moved_branch_is_followed_and_what_did_not_change_is_not_fetched_again(hub, machine):
    hub.push("owner/name", READ)
    machine.locate("owner/name")
    hub.forget()
    commit = hub.push("owner/name", {**READ, "config.json": b"{\n}"})
    located = machine.locate("owner/name")
    assert located["commit"] == commit and machine.content(located)["config.json"] == b"{\n}"
    assert set(hub.fetched()).isdisjoint(SHARDS)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_download_goes_on_where_the_connection_broke(hub, machine, how, resume):
    hub.push("owner/name", {"config.json": CONFIG, "model.safetensors": BIG})
    hub.cut["model.safetensors"], hub.resume = (22_000_000, how), resume
    assert machine.content(machine.locate("owner/name"))["model.safetensors"] == BIG
    first, second = (line for line in hub.requests if line.startswith("GET /storage/"))
    assert "bytes=" not in first
    assert_matches(second, "bytes=(10485760|20971520)-")  # what a reset takes away was not read yet


def test_a_download_goes_on_where_an_earlier_process_was_killed(hub, machine):
    hub.push("owner/name", {"config.json": CONFIG, "model.safetensors": BIG})
    hub.cut["model.safetensors"] = (22_000_000, "stall")
    process = machine.start("owner/name")
    parts = f"*/blobs/{hashlib.sha256(BIG).hexdigest()}.incomplete"
    part = wait_for(lambda: next((at for at in machine.cache.glob(parts) if at.stat().st_size == 20_971_520), None))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    hub.forget()
    located = machine.locate("owner/name")
    assert machine.content(located)["model.safetensors"] == BIG and not part.exists()
    assert [line.split()[-1] for line in hub.requests if line.startswith("GET /storage/")] == ["bytes=20971520-"]
    assert "[1/1] model.safetensors, 25.60 MB, of which 20.97 MB are here" in located["said"]


def test_the_token_is_for_the_hub_alone(hub, machine):
    hub.push("owner/name", READ)
    machine.locate("owner/name", HF_TOKEN="hf_secret")
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "storage": {None}}


def test_two_processes_at_once_fetch_a_large_file_once(hub, machine):
    hub.push("owner/name", {"config.json": CONFIG, "model.safetensors": BIG})
    processes = [machine.start("owner/name") for _ in range(2)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert all(machine.content(result)["model.safetensors"] == BIG for result in results)
    assert hub.fetched().count("model.safetensors") == 1


def test_what_arrives_damaged_is_refused_and_fetched_anew(hub, machine):
    hub.push("owner/name", READ)
    name = next(iter(SHARDS))
    hub.served[name] = bytes(len(SHARDS[name]))
    assert f"{name} of owner/name arrived damaged" in machine.locate("owner/name")["error"]
    hub.served.clear()
    assert machine.content(machine.locate("owner/name")) == READ


def test_the_download_tells_how_much_there_is_and_each_file(hub, machine):
    commit = hub.push("owner/name", READ)
    said = machine.locate("owner/name")["said"]
    total = sum(map(len, READ.values())) - len(CONFIG) - len(*INDEX.values())  # these say what is read
    assert said[0].startswith(f"owner/name at commit {commit}: 6 of 8 files are fetched, {total / 1e6:.2f} MB, into ")
    assert said[-1] == "[6/6] model-00002-of-00002.safetensors, 2.00 MB" and len(said) == 7


def test_offline_the_copy_of_a_revision_is_used(hub, machine):
    old = hub.push("owner/name", READ, "v1")
    new = hub.push("owner/name", {**READ, "config.json": b"{}"})
    machine.locate("owner/name@v1", "owner/name")
    hub.forget()
    sources = ("owner/name@v1", "owner/name", f"owner/name@{old}")
    by_switch = machine.locate(*sources, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    hub.refuse["api"] = "down"
    by_fault = machine.locate(*sources)
    hub.close()
    by_network = machine.locate(*sources)
    for results in (by_switch, by_fault, by_network):
        assert [located["commit"] for located in results] == [old, new, old]
        assert all(located["files"] == sorted(READ) for located in results)
        assert f"main is taken to be commit {new}" in results[1]["said"][0] and results[2]["said"] == []


def lose(machine, *names):
    for name in names:
        (pointer,) = machine.cache.glob(f"*/snapshots/*/{name}")
        pointer.resolve().unlink()
        pointer.unlink()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_offline_every_file_that_the_copy_lacks_is_named_with_a_command(hub, machine, listed, switch):
    commit = hub.push("owner/name", READ)
    machine.locate("owner/name")
    lose(machine, *SHARDS)
    if not listed:  # as another program fills the cache
        next(machine.cache.glob("*/m3d/*.json")).unlink()
    if not switch:
        hub.close()
    error = machine.locate("owner/name", **({"HF_HUB_OFFLINE": "1"} if switch else {}))["error"]
    first, second = (f"{name} ({len(SHARDS[name]) / 1e6:.2f} MB)" if listed else name for name in SHARDS)
    assert f"lacks {first}, {second}: " in error and ("HF_HUB_OFFLINE" in error) == switch
    names = "".join(f" {name}" for name in SHARDS) if listed else ""
    assert f"`hf download owner/name{names} --revision {commit}`" in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.model"])
def test_offline_a_small_file_that_the_copy_lacks_is_not_taken_for_absent(hub, machine, name):
    hub.push("owner/name", READ)
    machine.locate("owner/name")
    lose(machine, name)
    assert f"lacks {name} (" in machine.locate("owner/name", HF_HUB_OFFLINE="1")["error"]


def test_offline_a_copy_without_weights_says_so(hub, machine):
    hub.push("owner/name", READ)
    machine.locate("owner/name")
    lose(machine, *INDEX, *SHARDS)
    next(machine.cache.glob("*/m3d/*.json")).unlink()
    assert "lacks the weights (model.safetensors or " in machine.locate("owner/name", HF_HUB_OFFLINE="1")["error"]


def test_offline_without_a_copy_says_what_to_do(hub, machine):
    hub.push("owner/name", READ)
    error = machine.locate("owner/name@v1", HF_HUB_OFFLINE="1")["error"]
    assert "HF_HUB_OFFLINE (or" in error and "no copy of its revision v1: run this once with network" in error
    assert hub.requests == []


@pytest.mark.parametrize(
    "where, fault, words",
    [
        (
            "api",
            "missing",
            "no folder here, and no repository on the hub, or a private one: .* `hf auth login` or set HF_",
        ),
        ("api", "private", "no repository on the hub, or a private one: check the name, or run `hf auth login`"),
        (
            "files",
            "gated",
            "access is restricted: ask for it on URL/owner/name, then run `hf auth login` or set HF_TOKEN",
        ),
        ("api", "gated", "access is restricted: ask for it on URL/owner/name"),
        ("api", "token", r"refuses access \(401, .*\): run `hf auth login`"),
        ("files", "forbidden", r"refuses access \(403, .*\): run `hf auth login`"),
        ("api", "busy", r"the hub answers 429 .* run again later"),
        (
            "api",
            "down",
            r"URL is out of reach \(.*503.*\), and .* no copy of its revision main: run this once with network",
        ),
        ("files", "down", r"the hub answers 503 \(.*\): run again later, what has arrived is kept"),
        ("api", "nothing", "URL does not answer as a Hugging Face hub does .*: check HF_ENDPOINT"),
    ],
)
def test_a_refusal_names_its_cause_and_what_to_do(hub, machine, where, fault, words):
    hub.push("owner/name", READ)
    hub.refuse[where] = fault
    # The library tries again for half a minute where a server has trouble.
    error = machine.locate("owner/name", setup="import time; time.sleep = lambda seconds: None")["error"]
    assert_matches(error, words.replace("URL", hub.url))


def test_a_refusal_tells_of_the_copy_that_is_here(hub, machine):
    commit = hub.push("owner/name", READ)
    machine.locate("owner/name")
    hub.refuse["api"] = "private"
    assert f"(HF_HUB_OFFLINE=1 uses the copy of commit {commit})" in machine.locate("owner/name")["error"]


def test_a_wrong_endpoint_or_none_is_told(hub, machine):
    hub.html = True
    assert f"{hub.url} does not answer as a Hugging Face hub does" in machine.locate("owner/name")["error"]
    hub.close()
    assert f"{hub.url} is out of reach (ConnectError" in machine.locate("owner/name")["error"]
    assert "127.0.0.1:9 is out of reach" in machine.locate("owner/name", HF_ENDPOINT="127.0.0.1:9")["error"]


def test_a_revision_that_is_not_there_is_named(hub, machine):
    hub.push("owner/name", READ)
    error = machine.locate("owner/name@v7")["error"]
    assert error.startswith("owner/name@v7: the repository has no revision v7") and f"{hub.url}/owner/name" in error


def test_a_repository_with_checkpoints_in_its_folders_names_them(hub, machine):
    hub.push("owner/name", {f"{top}/{name}": content for top in ("large", "small") for name, content in READ.items()})
    for source in ("owner/name", "owner/name/tiny"):
        error = machine.locate(source)["error"]
        assert error.startswith(f"{source} holds no weights")
        assert error.endswith("; owner/name/large is a checkpoint; owner/name/small is a checkpoint")
    assert hub.fetched() == []


def test_a_shard_that_the_repository_lacks_is_named(hub, machine):
    hub.push("owner/name", {name: content for name, content in READ.items() if "00002-of" not in name})
    error = machine.locate("owner/name")["error"]
    assert error == ("owner/name: its index names model-00002-of-00002.safetensors, which the repository does not hold")
    assert set(hub.fetched()).isdisjoint(SHARDS)


def test_too_small_a_disk_is_told_in_figures_before_the_download(hub, machine):
    hub.push("owner/name", READ)
    setup = "import shutil; shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(9e6, 7e6, 2e6)"
    error = machine.locate("owner/name", setup=setup)["error"]
    assert (
        "owner/name needs 3.00 MB more in " in error
        and " where 2.00 MB are free: free 1.00 MB, or set HF_HOME" in error
    )
    assert set(hub.fetched()).isdisjoint(SHARDS)


@pytest.mark.parametrize("code, words", [("ENOSPC", "is full: free some of it, or"), ("EACCES", "cannot be written")])
def test_a_disk_that_takes_no_more_is_told(hub, machine, code, words):
    hub.push("owner/name", READ)
    setup = f"""
import errno, os
from huggingface_hub import file_download
def http_get(*arguments, **named): raise OSError(errno.{code}, os.strerror(errno.{code}))
file_download.http_get = http_get
"""
    assert_matches(machine.locate("owner/name", setup=setup)["error"], f"{words}.* set HF_HOME to a folder")


def test_a_file_of_the_cache_that_was_cut_off_is_named(hub, machine):
    hub.push("owner/name", READ)
    located = machine.locate("owner/name")
    path = (machine.home / located["folder"] / "model-00001-of-00002.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:-1])
    assert (
        f"has 999,999 bytes, in the repository it has 1,000,000: delete {path} and "
        in machine.locate("owner/name")["error"]
    )


def wait_for(condition, seconds=60):
    for _ in range(seconds * 20):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("did not happen")


def assert_matches(text, words):
    assert re.search(words, text), text
