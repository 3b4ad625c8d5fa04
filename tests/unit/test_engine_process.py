"""vLLM's process starts from any program, whatever its main module is like."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

# Without a main guard: if the new process imported it, it would start another, which Python refuses.
SCRIPT = """
import multiprocessing, operator, sys
sys.path.insert(0, {root!r})
from engine.runtime.decoder.engine_process import spawned_apart

def start():
    process = multiprocessing.get_context("spawn").Process(target=operator.add, args=(1, 2))
    process.start()
    process.join()
    return process.exitcode

with spawned_apart():
    print("apart", start())
print("as ever", start())
"""


def test_a_process_that_is_spawned_apart_does_not_run_the_script_again_and_others_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["apart 0", "as ever 1"] and "RuntimeError" in done.stderr
