"""schemathesis against /openapi.json: whatever is sent, the gateway answers as its description says."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from engine.gateway import keys
from engine.gateway.settings import GatewaySettings
from tests.unit.fake_m3d import FakeM3D, RunningGateway

pytestmark = pytest.mark.slow(group="fuzz")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    key = keys.add(folder / "keys.json", "fuzz", ("ask", "upload", "admin"), rate_per_minute=1_000_000)
    gateway = RunningGateway(FakeM3D(), folder, folder / "keys.json", GatewaySettings(max_files=100_000))
    gateway.headers = {"Authorization": f"Bearer {key}"}
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def described(gateway):
    return schemathesis.openapi.from_url(f"{gateway.root}/openapi.json", headers=gateway.headers)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_all_answers_are_as_described(gateway, described, mode):
    """mode: requests that fit the description, and others."""
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        def is_answered(case):
            # What fits the description may be refused for what it means: there is no such scan, model or preset.
            excluded = [positive_data_acceptance]
            if case.media_type != "application/json":  # fields of addresses and forms are texts, whatever they were
                excluded.append(negative_data_rejection)
            case.call_and_validate(headers=gateway.headers, excluded_checks=excluded)

        try:
            is_answered()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # nothing can be wrong of a route that takes nothing
