"""What becomes of a language model that dies: restarted, told, or given up. vLLM is a stand-in here."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import types
from multiprocessing import util
from pathlib import Path

import pytest
import torch

import engine.runtime
from engine.errors import Unavailable
from engine.runtime.acceleration import Pass
from engine.runtime.decoder import engine_process, llm_engine
from engine.runtime.decoder.llm_engine import LlmEngine
from engine.runtime.decoder_settings import DecoderSettings
from engine.runtime.run_folder import VARIABLE, RunFolder
from tests.conftest import ROOT

RESTARTS = 2


class Llm:
    """An AsyncLLM that dies when `errored` is set."""

    def __init__(self):
        self.errored = False

    async def collective_rpc(self, method, args=()):
        return [int(Pass.VLLM)]


class Engine(LlmEngine):
    """told: health, and what was said of a broken one, in their order. fails: what the next start raises."""

    def __init__(self):
        self.told = []
        self.fails: Exception | None = None
        super().__init__(
            Path("nowhere"),
            torch.float32,
            64,
            0,
            DecoderSettings(restarts=RESTARTS),
            self.told.append,
            lambda words: self.told.append(f"broken: {words}"),
        )

    def _make(self):
        if self.fails:
            raise self.fails
        return Llm()

    async def refusal(self) -> str:
        with pytest.raises(Unavailable) as refused:
            async for _ in self.generate(torch.zeros(1, 1), None, "key", "salt"):
                pass
        return str(refused.value)

    async def die(self) -> str:
        """As a question notices it; its refusal."""
        self._llm.errored = True
        return await self.refusal()


@pytest.fixture
def llm(monkeypatch):
    async def checked(*_):
        return []

    async def end(llm):
        pass

    monkeypatch.setattr(llm_engine, "check_seg_states", checked)
    monkeypatch.setattr(llm_engine, "_end", end)
    monkeypatch.setattr(llm_engine.vllm_environment, "prepare", lambda threads: None)
    return Engine()


def test_a_dead_engine_comes_back_and_its_health_is_told(llm):
    async def run():
        await llm.start()
        for _ in range(RESTARTS):
            assert await llm.die() == "the language model is restarting: try again in a minute"
            await llm.restarted()
        await llm.stop()

    asyncio.run(run())
    assert llm.told == ["ready", *["restarting", "ready"] * RESTARTS, "stopped"]


def test_an_engine_that_dies_too_often_is_told_to_be_broken_once_and_promises_nothing(llm):
    async def run():
        await llm.start()
        for _ in range(RESTARTS):
            await llm.die()
            await llm.restarted()
        return [await llm.die(), await llm.refusal()]

    why = "out of order (it stopped 3 times within an hour; the server's log says why)"
    assert asyncio.run(run()) == [f"the language model is {why}: the server must be started again"] * 2
    assert llm.told[-2:] == [why, f"broken: the language model is {why}"]
    assert sum(words.startswith("broken") for words in llm.told) == 1


def test_deaths_of_more_than_an_hour_ago_do_not_count(llm, monkeypatch):
    monkeypatch.setattr(llm_engine, "RESTART_WINDOW_S", 0)

    async def run():
        await llm.start()
        for _ in range(3 * RESTARTS):
            await llm.die()
            await llm.restarted()
        await llm.stop()

    asyncio.run(run())
    assert llm.told[-3:] == ["restarting", "ready", "stopped"]


@pytest.mark.parametrize("where", ["_make", "_end"])
def test_an_engine_that_does_not_start_again_is_broken(llm, monkeypatch, where):
    async def fail(llm):
        raise RuntimeError("no memory")

    async def run():
        await llm.start()
        llm.fails = RuntimeError("no memory") if where == "_make" else None
        if where == "_end":
            monkeypatch.setattr(llm_engine, "_end", fail)
        await llm.die()
        await llm.restarted()
        return await llm.refusal()

    refusal = asyncio.run(run())
    ready, restarting, why, broken = llm.told
    assert (ready, restarting) == ("ready", "restarting") and why.startswith("out of order (it did not start again: ")
    assert "no memory" in why and ("GB of memory left" in why) == (where == "_make")
    assert refusal == f"the language model is {why}: the server must be started again"
    assert broken == f"broken: the language model is {why}"


def test_a_start_that_fails_says_how_much_memory_is_left(llm):
    llm.fails = RuntimeError("Engine core initialization failed")
    with pytest.raises(Unavailable, match=r"Engine core initialization failed.* [\d.]+ GB of memory left.*m3d inspect"):
        asyncio.run(llm.start())


def test_an_engine_that_dies_without_a_question_is_noticed(llm, monkeypatch):
    monkeypatch.setattr(llm_engine, "WATCH_INTERVAL_S", 0.001)
    restarting = asyncio.Event()

    async def run():
        llm._on_health = lambda health: health == "restarting" and restarting.set()
        await llm.start()
        llm._llm.errored = True
        await asyncio.wait_for(restarting.wait(), 30)
        await llm.restarted()
        await llm.stop()

    asyncio.run(run())


# --- the model that Triton runs --------------------------------------------------------------------------------------
@pytest.fixture
def model(monkeypatch, caplog):
    """model_repository/decoder/1/model.py, without a decoder."""
    backend = types.ModuleType("triton_python_backend_utils")
    backend.InferenceResponse = object
    backend.InferenceRequest = backend.Tensor = object
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    for name in (
        "triton_io",
        "decoder_service",
    ):  # what holds on to another stand-in, and no other test shall find these
        monkeypatch.setitem(sys.modules, f"engine.runtime.{name}", None)
        monkeypatch.setattr(engine.runtime, name, None, raising=False)
        del sys.modules[f"engine.runtime.{name}"]
        delattr(engine.runtime, name)
    names = runpy.run_path(str(ROOT / "model_repository/decoder/1/model.py"))
    model = names["TritonPythonModel"]()
    model.end, model.log = names["_end"], caplog
    return model


def test_health_reaches_the_front_and_triton(model, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    model.folder = RunFolder.of_server()
    for health in ("ready", "restarting", "ready", "out of order (it stopped 4 times)"):
        model._tell(health)
        assert RunFolder(tmp_path).health == health and model.is_ready() is (health == "ready")


def test_without_a_front_health_is_told_to_triton_only(model, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    model.folder = RunFolder.of_server()
    model._tell("ready")
    assert model.is_ready()


def test_health_that_cannot_be_written_stops_no_restart(model, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    model.folder = RunFolder.of_server()
    shutil.rmtree(tmp_path / "run")
    model._tell("restarting")
    assert not model.is_ready() and "could not be written" in model.log.text


def test_a_broken_language_model_ends_its_process_with_a_line_in_the_log(model, monkeypatch, capfd):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    model.end("the language model is out of order (it stopped 4 times within an hour; the server's log says why)")
    assert exits == [1]
    said = capfd.readouterr().err
    assert said.startswith("decoder: the language model is out of order (it stopped 4 times within an hour")
    assert said.endswith("start the server again\n")


def test_python_takes_no_modules_apart_once_all_is_closed(model, monkeypatch):
    done = []
    monkeypatch.setattr(atexit, "register", lambda *call: done.append(call))
    model.service, model.store = (
        types.SimpleNamespace(close=lambda name=name: done.append(name)) for name in ("service", "store")
    )
    model.finalize()
    assert done == ["service", "store", (os._exit, 0)]


# --- the engine's process --------------------------------------------------------------------------------------------
def _take_its_time(ours):
    signal.signal(signal.SIGTERM, lambda *_: ours.send("vLLM's way"))
    atexit.register(ours.send, "Python's way")
    util.Finalize(None, ours.send, ["semaphores are cleared away"], exitpriority=0)
    engine_process.end_at_once_when_asked()
    ours.send("ready")
    while True:
        signal.pause()


def test_an_engines_process_ends_at_once_when_it_is_asked_to():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_take_its_time, args=(theirs,))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    process.terminate()
    assert ours.recv() == "semaphores are cleared away"
    with pytest.raises(EOFError):
        ours.recv()
    process.join()
    assert process.exitcode == 0
