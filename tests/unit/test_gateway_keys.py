"""Who may enter: the keys file, its commands, and the ids that only their owner can use."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat

import pytest

from engine.errors import InvalidInput, Unavailable
from engine.gateway import keys
from engine.gateway.keys import Keys
from engine.gateway.seal import Seal, SealedStudy, new_secret

HANDLE = "0123456789abcdef" * 4
A, B = "a" * 32, "b" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


# --- keys ------------------------------------------------------------------------------------------------------------
def test_a_key_is_not_in_its_file_which_is_its_owners_only(path):
    key = keys.add(path, "ward")
    assert key not in path.read_text() and key.removeprefix("m3d-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["keys.json"]


def test_a_key_that_is_added_or_revoked_counts_at_once(path):
    first = keys.add(path, "first")
    known = Keys(path)
    second = keys.add(path, "second", ("admin",))
    assert known.find(first).roles == ("ask", "upload") and known.find(second).roles == ("admin",)
    assert known.find(second + "x") is None and known.find("") is None
    keys.revoke(path, "first")
    assert known.find(first) is None and known.find(second).name == "second"


def test_a_name_that_is_used_again_gets_another_owner(path):
    first = owner_of(path, keys.add(path, "ward"))
    keys.revoke(path, "ward")
    assert owner_of(path, keys.add(path, "ward")) != first


def owner_of(path, key):
    return Keys(path).find(key).owner


def test_the_secret_of_the_seal_outlives_changes_of_the_file(path):
    keys.add(path, "first")
    secret = Keys(path).secret
    keys.add(path, "second")
    keys.revoke(path, "first")
    assert Keys(path).secret == secret and len(secret) == 64


def test_a_key_expires(path, monkeypatch):
    key = keys.add(path, "ward", days=2)
    found = Keys(path).find(key)
    assert not found.has_expired()
    monkeypatch.setattr(keys.time, "time", lambda: found.created + 2 * 86_400)
    assert found.has_expired()


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version": 2}', b"\xff", None])
def test_a_damaged_file_lets_nobody_in(path, damage):
    key = keys.add(path, "ward")
    known = Keys(path)
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(Unavailable, match="keys.json"):
        known.find(key)


def test_a_damaged_file_is_reported_without_its_content(path):
    keys.add(path, "ward")
    content = json.loads(path.read_text())
    content["keys"][0]["hash"] = "not-a-hash-but-secret"
    path.write_text(json.dumps(content))
    with pytest.raises(Unavailable, match="keys.0.hash") as raised:
        keys.read(path)
    assert "not-a-hash" not in str(raised.value)


def test_a_file_that_others_may_read_is_refused(path):
    keys.add(path, "ward")
    path.chmod(0o640)
    with pytest.raises(Unavailable, match="chmod 600"):
        Keys(path)


@pytest.mark.parametrize(
    "name, settings, cause",
    [
        ("", {}, "name"),
        ("a b", {}, "name"),
        ("../x", {}, "name"),
        ("a" * 65, {}, "name"),
        ("a", {"roles": ("ask", "root")}, "roles are ask, upload, admin"),
        ("a", {"roles": ()}, "roles"),
        ("a", {"days": 0}, "days"),
        ("a", {"days": float("nan")}, "days"),
        ("a", {"rate_per_minute": 0}, "rate_per_minute"),
    ],
)
def test_what_cannot_be_a_key_is_refused_and_writes_nothing(path, name, settings, cause):
    with pytest.raises(InvalidInput, match=cause):
        keys.add(path, name, **settings)
    assert not path.exists()


def test_a_name_is_taken_once_and_an_unknown_one_cannot_be_revoked(path):
    keys.add(path, "ward")
    with pytest.raises(InvalidInput, match="revoke it"):
        keys.add(path, "ward")
    with pytest.raises(InvalidInput, match="it has ward"):
        keys.revoke(path, "clinic")


def test_keys_that_are_added_at_the_same_time_are_all_there(path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=keys.add, args=(path, f"key{i}")) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(key.name for key in keys.read(path).keys) == [f"key{i}" for i in range(6)]


# --- ids -------------------------------------------------------------------------------------------------------------
def test_an_id_opens_for_its_owner_and_is_the_same_each_time():
    seal = Seal(new_secret())
    study = SealedStudy("localhost:8001", HANDLE)
    public = seal.study_id(A, study)
    assert seal.open_study(A, public) == study and seal.study_id(A, study) == public
    assert re.fullmatch(r"study-[A-Za-z0-9_-]+", public)


def test_an_id_tells_nothing_of_its_handle_and_differs_between_owners_servers_and_gateways():
    seal = Seal(new_secret())
    ids = {
        seal.study_id(A, SealedStudy("one", HANDLE)),
        seal.study_id(B, SealedStudy("one", HANDLE)),
        seal.study_id(A, SealedStudy("two", HANDLE)),
        Seal(new_secret()).study_id(A, SealedStudy("one", HANDLE)),
    }
    assert len(ids) == 4 and not any(HANDLE[:8] in public for public in ids)


def test_an_id_of_somebody_else_of_another_kind_or_made_up_does_not_open():
    seal = Seal(new_secret())
    public = seal.study_id(A, SealedStudy("one", HANDLE))
    assert seal.open_study(B, public) is None
    assert seal.open_file(A, public.replace("study-", "file-")) is None
    assert Seal(new_secret()).open_study(A, public) is None
    for place in range(len("study-"), len(public)):
        changed = public[:place] + ("A" if public[place] != "A" else "B") + public[place + 1 :]
        assert seal.open_study(A, changed) is None, place
    for other in ("", "study-", "study-!", "study-A", "study-" + "A" * 10_000, public + "\n", " " + public, HANDLE):
        assert seal.open_study(A, other) is None
    name = seal.file_id(A, b"0123456789abcdef")
    assert seal.open_file(A, name) == b"0123456789abcdef" and seal.open_file(B, name) is None
