"""Parameters of a model's configuration, read from a repository as Triton reads them."""

from __future__ import annotations

import pytest

from engine.errors import RepositoryError
from engine.runtime.decoder_settings import DecoderSettings
from engine.runtime.parameters import Parameters
from engine.runtime.request_pool import RequestPool
from tests.conftest import ROOT

REPOSITORY = ROOT / "model_repository"


def test_the_configuration_for_a_cpu_comes_before_the_models_own():
    settings = DecoderSettings.from_parameters(Parameters.read(REPOSITORY, "decoder", "cpu").values)
    assert settings.block_size == 32 and settings.enforce_eager
    assert Parameters.read(REPOSITORY, "decoder", "tensorrt").integer("block_size", 0) == 16


def test_a_model_without_one_has_its_own():
    assert Parameters.read(REPOSITORY, "study", "cpu").integer("threads", 0) == 4
    assert RequestPool.of(Parameters.read(REPOSITORY, "study", "cpu")).capacity == 4 + 64


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "study").mkdir()
    with pytest.raises(RepositoryError, match=r"study/config\.pbtxt cannot be read"):
        Parameters.read(tmp_path, "study", "cpu")
    (tmp_path / "study" / "config.pbtxt").write_text("name: ")
    with pytest.raises(RepositoryError, match=r"study/config\.pbtxt cannot be read"):
        Parameters.read(tmp_path, "study", "cpu")
