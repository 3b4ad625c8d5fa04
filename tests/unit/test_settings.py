"""settings.toml: what users set, for the server and for M3DEngine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import tomllib

from engine import contract
from engine.errors import RepositoryError
from engine.runtime.settings import Settings
from engine.server import repository
from tests.conftest import ROOT

REPOSITORY = ROOT / "model_repository"
EARLIER = 'parameters { key: "study_store_mb" value { string_value: "16" } }\n'


def written(folder, text: str):
    (folder / "settings.toml").write_text(text)
    return folder


def test_the_tracked_file_names_every_setting_with_its_default():
    tracked = tomllib.loads((REPOSITORY / "settings.toml").read_text())
    assert Settings.read(REPOSITORY) == Settings()
    named = {(model, name) for model, table in tracked.items() for name in table}
    assert named == {(model, name) for model, table in asdict(Settings()).items() for name in table}
    every, of_a_gpu = asdict(Settings())["decoder"]["cpu"].keys(), {"gpu_memory_utilization", "tensor_parallel_size"}
    assert tracked["decoder"]["cpu"].keys() == every - of_a_gpu
    assert tracked["decoder"]["tensorrt"].keys() == every - {"threads"}


def test_every_model_but_the_ensembles_has_a_table_of_its_name():
    assert set(asdict(Settings())) == {name for name, model in contract.MODELS.items() if not model.ensemble}


def test_what_is_left_out_has_its_default(tmp_path):
    assert Settings.read(tmp_path) == Settings()
    settings = Settings.read(written(tmp_path, "[study]\nmax_files = 7\n[decoder.cpu]\nkv_cache_gib = 2\n"))
    assert settings.study.limits.max_files == 7 and settings.study.threads == 4
    cpu, gpu = settings.decoder_on("cpu"), settings.decoder_on("tensorrt")
    assert (cpu.kv_cache_gib, cpu.block_size, cpu.enforce_eager) == (2, 32, True)
    assert (gpu.kv_cache_gib, gpu.block_size, gpu.enforce_eager) == (0, 16, False)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[decoder.cpu]\nmax_num_sequences = 3", "decoder.cpu.max_num_sequences is unknown; known are kv_cache_gib"),
        ("[decoder]\nmax_num_seqs = 3", "decoder.max_num_seqs is unknown; known are cpu, tensorrt"),
        ("[studies]", "studies is unknown; known are study, decoder"),
        ("study = 3", "study must be an object, not 3"),
        ("[decoder.cpu]\nmax_num_seqs = 'many'", "decoder.cpu.max_num_seqs must be a valid integer, not 'many'"),
        ("[decoder.cpu]\nenforce_eager = 1", "decoder.cpu.enforce_eager must be a valid boolean, not 1"),
        ("[decoder.cpu]\nmax_num_seqs = 0", "max_num_seqs must be greater than or equal to 1, not 0"),
        ("[decoder.cpu]\nkv_cache_gib = nan", "kv_cache_gib must be a finite number, not nan"),
        ("[decoder.tensorrt]\ngpu_memory_utilization = 90", "must be less than or equal to 1, not 90"),
        ("[decoder.tensorrt]\nblock_size = 24", "block_size must be a multiple of 16, not 24"),
        ("[vision_encoder]\nprecision = 'int8'", "precision must be 'auto', 'fp32' or 'bf16', not 'int8'"),
        ("[retrieval]\nthreads = true", "retrieval.threads must be a valid integer, not True"),
        ("[study", "cannot be read"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(tmp_path, text, words):
    with pytest.raises(RepositoryError, match=rf"settings\.toml.*{re.escape(words)}"):
        Settings.read(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    (tmp_path / "settings.toml").mkdir()
    with pytest.raises(RepositoryError, match="cannot be read"):
        Settings.read(tmp_path)


@pytest.mark.parametrize(("model", "path"), [("study", "config.pbtxt"), ("decoder", "configs/cpu.pbtxt")])
def test_settings_in_the_configurations_of_an_earlier_version_are_not_ignored(tmp_path, model, path):
    folder = shutil.copytree(REPOSITORY, tmp_path / "copy")
    text = EARLIER if model == "study" else EARLIER.replace("study_store_mb", "max_num_seqs")
    (folder / model / path).parent.mkdir(exist_ok=True)
    with open(folder / model / path, "a") as file:
        file.write(text)
    with pytest.raises(RepositoryError, match=rf"{path}.*settings of table {model}.*`python -m engine.server.repos"):
        Settings.read(folder)
    repository.write(folder)
    assert Settings.read(folder) == Settings()


def test_the_command_writes_the_configurations_and_no_settings(tmp_path):
    settings = written(tmp_path, "[study]\nthreads = 2\n") / "settings.toml"
    subprocess.run([sys.executable, "-m", "engine.server.repository", tmp_path], cwd=ROOT, check=True)
    assert Settings.read(tmp_path).study.threads == 2 and (tmp_path / "m3d_chat" / "config.pbtxt").is_file()
    assert settings.read_text() == "[study]\nthreads = 2\n"
