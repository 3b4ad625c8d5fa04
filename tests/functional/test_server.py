"""The server starts, says why it cannot, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

import engine.server as server_module
from engine.client import M3DClient
from engine.contract import DECODER_MODELS
from engine.errors import InvalidInput, RepositoryError, Unavailable
from engine.manifest import Manifest
from engine.server import Server, free_ports, supervisor
from tests.conftest import ROOT, copy_repository
from tests.functional.footprint import Footprint, stub_of
from tests.tiny import QUESTION

pytestmark = pytest.mark.integration

PATIENCE_S = 120


@pytest.fixture
def log(tmp_path):
    return tmp_path / "triton.log"


def ended(pid: int) -> bool:
    """Whether the process ends in time; it need not be a child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], PATIENCE_S)[0])
    finally:
        os.close(descriptor)


class Serving:
    """`m3d serve` in a process of its own, ready."""

    def __init__(self, repository: Path, log: Path):
        ports = {f"--{name.replace('_', '-')}": str(port) for name, port in free_ports().items()}
        self.url = f"127.0.0.1:{ports['--grpc-port']}"
        # As in a terminal: a test run started in the background hands an ignored SIGINT on. Not by a preexec_fn: that
        # forks, and then gRPC wakes up in the child and sometimes aborts it before it has become `m3d serve`.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "engine.cli",
                    "serve",
                    "--repository",
                    str(repository),
                    "--log",
                    str(log),
                    *(word for pair in ports.items() for word in pair),
                ],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.said = ""
        while not re.search(r"^ready on", self.said, re.M):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        (self.supervisor_pid,) = (
            pid
            for pid in supervisor.descendants(self.process.pid)
            if b"supervisor.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        self.footprint = Footprint(self.supervisor_pid)


@pytest.fixture
def serving(light_repository, log):
    serving = Serving(light_repository, log)
    yield serving
    serving.process.kill()
    serving.process.communicate()
    assert ended(serving.supervisor_pid)


# --- ends ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow(group="faults")) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_m3d_serve_stops_on_a_signal_and_leaves_nothing(serving, scans, number):
    with M3DClient(serving.url) as client:
        client.upload(scans[0])
    serving.process.send_signal(number)
    _, err = serving.process.communicate(timeout=PATIENCE_S)
    assert serving.process.returncode == (130 if number == signal.SIGINT else 0) and "Traceback" not in err
    assert serving.footprint.left() == []


def test_nothing_is_left_when_m3d_serve_is_killed(serving):
    serving.process.kill()
    assert ended(serving.supervisor_pid)
    assert serving.footprint.left() == []


def test_m3d_serve_fails_when_triton_dies_and_leaves_nothing(serving):
    os.kill(serving.footprint.triton_pid, signal.SIGKILL)
    _, err = serving.process.communicate(timeout=PATIENCE_S)
    assert serving.process.returncode == 1
    assert "ended by itself (killed by signal 9)" in err and "Traceback" not in err
    assert serving.footprint.left() == []


def test_a_triton_killed_in_the_middle_of_an_answer_is_a_clear_error_and_leaves_nothing(repository, scans, log):
    with Server(repository, **free_ports(), log=log) as server, M3DClient(server.url) as client:
        footprint = Footprint(server.supervisor_pid)
        stream = client.stream(scans[0], QUESTION, max_new_tokens=480)
        next(stream)
        os.kill(footprint.triton_pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match=f"has ended|{server.url} went away"):
            list(stream)
        with pytest.raises(Unavailable, match="signal 9"):
            server.wait()
        with pytest.raises(Unavailable, match=server.url):
            client.upload(scans[0])
    assert footprint.left() == []


def test_the_death_of_a_python_model_ends_the_server_instead_of_letting_everybody_wait(light_repository, scans, log):
    with Server(light_repository, **free_ports(), log=log) as server, M3DClient(server.url, timeout=300) as client:
        footprint = Footprint(server.supervisor_pid)
        client.upload(scans[0])
        os.kill(stub_of(server.supervisor_pid, "vision_encoder"), signal.SIGKILL)
        with pytest.raises(Unavailable, match="the process of vision_encoder ended"):
            server.wait()
        with pytest.raises(Unavailable, match=server.url):
            client.upload(scans[1])
    assert footprint.left() == []


# --- starts that fail ------------------------------------------------------------------------------------------------
def test_a_repository_that_was_never_exported_is_refused_with_the_command(tmp_path, log):
    with pytest.raises(RepositoryError, match="never exported.*build_engines.py --checkpoint"):
        Server(copy_repository(tmp_path), **free_ports(), log=log).start()


def test_a_repository_for_another_target_is_refused(light_repository, log):
    with pytest.raises((RepositoryError, Unavailable), match="target cpu, not tensorrt"):
        Server(light_repository, target="tensorrt", **free_ports(), log=log).start()


def test_a_repository_without_a_model_of_its_manifest_is_refused(light_repository, tmp_path, log):
    repository = shutil.copytree(light_repository, tmp_path / "model_repository")
    shutil.rmtree(repository / "vision_encoder")
    with pytest.raises(RepositoryError, match="lacks the models vision_encoder"):
        Server(repository, **free_ports(), log=log).start()


def test_a_port_in_use_is_named_with_its_option(light_repository, log):
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports["metrics_port"])):
        with pytest.raises(Unavailable, match=f"metrics port {ports['metrics_port']}.*--metrics-port"):
            Server(light_repository, **ports, log=log).start()


def test_free_ports_are_none_that_the_system_hands_out_to_others():
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(20):
        ports = list(free_ports().values())
        assert len(set(ports)) == 2 and all(1024 < port < low for port in ports)


def test_equal_ports_are_refused(light_repository, log):
    with pytest.raises(InvalidInput, match="must differ"):
        Server(light_repository, grpc_port=9001, metrics_port=9001, log=log).start()


def test_a_model_that_does_not_load_is_named_with_its_own_words_and_nothing_is_left(light_repository, tmp_path, log):
    repository = shutil.copytree(light_repository, tmp_path / "model_repository")
    graph = repository / "vision_encoder" / "1" / "model.onnx"
    graph.write_bytes(b"not a graph".ljust(graph.stat().st_size))  # another size would be refused before Triton starts
    before = set(os.listdir(supervisor.SHM))
    server = Server(repository, **free_ports(), log=log)
    with pytest.raises(Unavailable, match=r"vision_encoder: .*\n?.*log: .*triton.log"):
        server.start()
    assert server._supervisor.poll() is not None
    # Other servers on this machine have theirs: what one of them has mapped, or a folder named by a living process.
    held = supervisor.shared_memory_of(supervisor.everybody())
    assert not [
        name
        for name, inode in supervisor.shared_memory().items()
        if name not in before
        and inode not in held
        and name.startswith("m3d-")
        and not os.path.exists(f"/proc/{name.split('-')[2]}")
    ]


# --- while it runs ---------------------------------------------------------------------------------------------------
def test_it_reports_ready_and_metrics(server):
    assert server.is_ready() and server._supervisor.poll() is None
    assert b"nv_inference_count" in urllib.request.urlopen(server.metrics_url, timeout=30).read()


def test_it_listens_on_this_machine_only(server):
    listening = {
        line.split()[1]
        for name in ("tcp", "tcp6")
        if Path(f"/proc/net/{name}").exists()
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    for port in server.ports.values():
        addresses = [address.split(":")[0] for address in listening if int(address.split(":")[1], 16) == port]
        assert addresses and all(address.endswith("0100007F") for address in addresses)  # 127.0.0.1, plain or in IPv6


def test_clients_cannot_load_models(server):
    """A model configuration from a client may carry code."""
    client = InferenceServerClient(server.url)
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        client.load_model("study")
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        client.unload_model("decoder")
    client.close()


def test_a_repository_may_lie_anywhere(light_repository, scans, log, tmp_path):
    odd = shutil.copytree(light_repository, tmp_path / "mödel [re] pos" / "x y", symlinks=True)
    with Server(odd, **free_ports(), log=log) as server, M3DClient(server.url) as client:
        assert client.upload(scans[0]).info.shape
    assert (odd / "study" / "config.pbtxt").is_file()  # the server removed its own link only


def test_two_servers_run_side_by_side(light_repository, server, scans, tmp_path):
    with Server(light_repository, **free_ports(), log=tmp_path / "second.log") as second:
        with M3DClient(second.url) as client:
            assert client.upload(scans[0]).info.shape
        footprint = Footprint(second.supervisor_pid)
    assert footprint.left() == []
    assert server.is_ready()


# --- the language model last ------------------------------------------------------------------------------------------
@pytest.fixture
def decoder_last(monkeypatch):
    """As a server for a GPU loads its models."""
    monkeypatch.setitem(server_module.LOADED_LAST, "cpu", server_module.LOADED_LAST["tensorrt"])


def test_the_language_model_is_loaded_when_all_that_does_not_need_it_is_there(decoder_last, repository, scans, log):
    with Server(repository, **free_ports(), log=log) as server:
        with M3DClient(server.url) as client:
            assert client.is_ready() and client.ask(scans[0], QUESTION, max_new_tokens=4).token_ids
            assert client.segment(scans[0], QUESTION).mask is not None
        with InferenceServerClient(server.inside_url) as inside:
            assert all(inside.is_model_ready(model) for model in Manifest.read(repository).models)
    text = log.read_text()
    assert "failed to load" not in text
    began = {model: text.index(f"loading: {model}:") for model in Manifest.read(repository).models}
    ended = {model: text.index(f"successfully loaded '{model}'") for model in began}
    last = [model for model in began if model in DECODER_MODELS]
    assert max(ended[model] for model in began if model not in last) < began["decoder"] < ended["decoder"]
    assert ended["decoder"] < min(began[model] for model in last[1:])


def test_a_language_model_that_does_not_load_last_ends_the_server_with_its_cause(
    decoder_last, repository, tmp_path, log
):
    broken = shutil.copytree(repository, tmp_path / "model_repository", symlinks=True)
    (broken / "settings.toml").write_text("[decoder.cpu]\ncontext_length = 1_000_000\n")
    server = Server(broken, **free_ports(), log=log)
    with pytest.raises(Unavailable, match="decoder: .*context_length is 1000000: the model has"):
        server.start()
    assert ended(server.supervisor_pid)


def test_a_server_that_is_stopped_while_the_language_model_loads_leaves_nothing(decoder_last, repository, log):
    said = []

    class Stop(Exception):
        pass

    def progress(text):
        said.append(text)
        if "decoder" in text:
            raise Stop

    server = Server(repository, **free_ports(), log=log, on_progress=progress)
    with pytest.raises(Stop):
        server.start()
    assert "loading decoder" in said[-1] and ended(server.supervisor_pid)
