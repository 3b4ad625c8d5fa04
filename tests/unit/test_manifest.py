"""A manifest says what is wrong with it, and with the repository around it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest

from engine.errors import RepositoryError
from engine.manifest import Manifest
from tests.conftest import ROOT
from tests.unit.fake_models import manifest

PLAN = {"tensorrt": "11.4.0.106", "compute_capability": "8.9", "version_compatible": False, "hardware_compatible": True}
MEMORY = {"weights": 8, "contexts": [3, 4], "bindings": 2, "source": "engine"}
WHOLE = manifest(
    graphs={"study": {"plan": PLAN, "gpu_memory": MEMORY}, "m3d_segment": {"max_error": 0.0}},
    files={"study/1/model.plan": 8},
)


@pytest.fixture
def repository(tmp_path):
    for model in WHOLE.models:
        (tmp_path / model / "1").mkdir(parents=True)
        shutil.copy(ROOT / "model_repository" / model / "config.pbtxt", tmp_path / model)
    (tmp_path / "study" / "1" / "model.plan").write_bytes(bytes(8))
    WHOLE.write(tmp_path)
    return tmp_path


def test_what_was_written_is_read_and_checks(repository):
    assert Manifest.read(repository) == WHOLE
    assert (WHOLE.graph_plans, WHOLE.gpu_memory) == ({"study": PLAN}, {"study": MEMORY})
    WHOLE.check(repository)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_repository_without_a_manifest_is_refused_with_a_command_that_a_shell_takes(tmp_path, target):
    folder = tmp_path / "my models; and others"
    with pytest.raises(RepositoryError, match="never exported") as refused:
        Manifest.read(folder, target)
    command = shlex.split(re.search("`(.*)`", str(refused.value))[1])
    assert command[-4:] == ["--target", target, "--repository", str(folder)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graphs": []}, "graphs"),
        ({"graphs": {"study": 1}}, "graphs"),
        ({"files": ["a"]}, "files"),
        ({"files": {"a": "1"}}, "files"),
        ({"models": "study"}, "models"),
        ({"image_size": 3}, "image_size"),
        ({"image_size": [1, 2]}, "image_size"),
        ({"eos_token_ids": [None]}, "eos_token_ids"),
        ({"seg_token_id": True}, "seg_token_id"),
        (
            {"plans": None, "checkpoint": 1},
            "checkpoint must be a valid string, not 1; plans must be an object",
        ),
        ({"graphs": {"study": {"plan": []}}}, "graphs.study.plan must be an object"),
        ({"graphs": {"study": {"gpu_memory": 9}}}, "graphs.study.gpu_memory must be an object, not 9"),
        (
            {"graphs": {"study": {"gpu_memory": {**MEMORY, "contexts": [1, None]}}}},
            "graphs.study.gpu_memory.contexts.1 must be a valid integer, not None",
        ),
        (
            {"graphs": {"study": {"plan": {**PLAN, "compute_capability": None}}}},
            "graphs.study.plan.compute_capability must be a valid string, not None",
        ),
        (
            {"graphs": {"study": {"plan": {**PLAN, "version_compatible": "no"}}}},
            "graphs.study.plan.version_compatible must be a valid boolean, not 'no'",
        ),
    ],
)
def test_a_damaged_manifest_is_named_with_what_is_wrong(repository, change, words):
    path = repository / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RepositoryError, match=rf"manifest.json is damaged \(.*{words}.*\): export the"):
        Manifest.read(repository)


def test_the_first_of_many_lost_files_are_named(repository):
    lost = replace(WHOLE, files={**WHOLE.files, **{f"decoder/1/llm/{k}.safetensors": 1 for k in range(5)}})
    with pytest.raises(RepositoryError, match=r"/0.safetensors \(missing\), .*/2.safetensors \(missing\) and 2 more: "):
        lost.check(repository)


def test_a_repository_copied_from_another_version_is_told_by_its_tensors(repository):
    config = repository / "study" / "config.pbtxt"
    config.write_text(config.read_text().replace('"UPLOAD"', '"UPLOADED"'))
    with pytest.raises(RepositoryError, match=r"another version's.*: study \(UPLOAD\); copy"):
        WHOLE.check(repository)


def test_a_model_that_is_not_there_at_all_is_named_before_its_files(repository):
    (repository / "study" / "1" / "model.plan").unlink()
    (repository / "study" / "config.pbtxt").unlink()
    with pytest.raises(RepositoryError, match="lacks the models study that"):
        WHOLE.check(repository)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 1, "versions": {"m3d-engine": "0.1.0"}}, r"written by m3d-engine 0\.1\.0 \(format 1\)"),
        ({"format": 1, "versions": {}}, r"another version of m3d-engine \(format 1\)"),
        ({"of_tomorrow": 1}, "another version of m3d-engine"),
    ],
)
def test_an_export_of_another_version_is_refused_with_the_command_that_makes_it_anew(tmp_path, changes, words):
    values = {**json.loads(WHOLE.to_json()), "checkpoint": "owner/a name", **changes}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(RepositoryError, match=words) as refused:
        Manifest.read(tmp_path)
    command = str(refused.value).partition("`python export/build_engines.py ")[2].rstrip("`")
    given = dict(zip(*[iter(shlex.split(command))] * 2))
    expected = {"--checkpoint": "owner/a name", "--target": values["target"], "--precision": values["precision"]}
    assert given == expected | {"--repository": str(tmp_path)} | (
        {"--clip-checkpoint": values["clip_checkpoint"]} if values["clip_checkpoint"] else {}
    )


def test_an_export_that_lacks_what_this_version_writes_is_refused(tmp_path):
    values = json.loads(WHOLE.to_json())
    del values["checkpoint_commit"]
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(RepositoryError, match="export again"):
        Manifest.read(tmp_path)
