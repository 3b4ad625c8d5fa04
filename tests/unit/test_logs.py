"""The log: levels, request ids, and nothing in it of what is asked and answered."""

from __future__ import annotations

import logging
import re
import threading

import pytest

from engine import logs
from engine.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("engine_log")


def say_all():
    for level in logs.LEVELS:
        getattr(logging.getLogger("engine.some.module"), level)("words of %s", level)


@pytest.mark.parametrize("number, level", list(enumerate(logs.LEVELS)))
def test_a_level_shows_what_is_as_important_and_nothing_less(capsys, number, level):
    logs.set_up("study", level)
    say_all()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("words of ")[2] for line in lines] == list(logs.LEVELS[number:])


def test_the_environment_sets_the_level_and_an_argument_comes_first(capsys, monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "error")
    logs.set_up("study")
    say_all()
    assert len(capsys.readouterr().err.splitlines()) == 1
    logs.set_up("study", "debug")
    say_all()
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_warnings_are_shown_where_nothing_is_set(capsys):
    logs.set_up("study")
    say_all()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_unknown_level_is_refused_with_those_that_there_are(m3d, monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "loud")
    with pytest.raises(InvalidInput, match="loud.*debug, info, warning, error"):
        logs.set_up("study")
    code, _, err = m3d("--log-level", "louder", "sample", "foot-mr")
    assert code == 2 and "louder" in err and "debug, info, warning, error" in err


def test_a_second_set_up_takes_the_place_of_the_first(capsys):
    logs.set_up("one", "info")
    logs.set_up("two", "info")
    logging.getLogger("engine").info("once")
    assert re.fullmatch(r"\S+ \S+ INFO two - engine: once\n", capsys.readouterr().err)


def test_a_record_has_the_id_of_its_request_in_whichever_thread(capsys):
    logs.set_up("study", "info")

    def work():
        with logs.request("b"):
            logging.getLogger("engine").info("inner")

    with logs.request("a"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        logging.getLogger("engine").info("outer")
    logging.getLogger("engine").info("after")
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"study (\S+) engine: (\w+)", line).groups() for line in lines] == [
        ("b", "inner"),
        ("a", "outer"),
        ("-", "after"),
    ]


def test_a_log_that_nobody_reads_ends_nothing(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    logs.set_up("study", "info")
    monkeypatch.setattr("sys.stderr", Closed())
    logging.getLogger("engine").info("words")
