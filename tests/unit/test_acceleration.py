"""What makes a CPU faster is one folder: without it the engine imports, and says that it takes longer."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.conftest import ROOT, copy_checkout

PROGRAM = """
import engine.cli, engine.doctor, engine.local, engine.server, engine.runtime.graphs, engine.runtime.decoder
from engine.errors import RepositoryError
from engine.runtime import acceleration
from engine.runtime.decoder import vllm_environment, worker_extension
from engine.runtime.onnx_session import chosen_precision

vllm_environment.prepare(0)
acceleration.give_way()
assert acceleration.variables() == {} and chosen_precision("auto", "bf16") == "fp32"
assert acceleration.shorten_pass(None, acceleration.Pass.DECODE_KERNEL) == acceleration.Pass.VLLM
try:
    acceleration.open_bf16("model.onnx", 1)
except RepositoryError as error:
    assert "set precision to" in str(error)
print(engine.doctor._acceleration().state)
"""


def test_the_engine_works_without_the_folder(tmp_path):
    """In a copy, from which it is deleted."""
    folder = copy_checkout(tmp_path / "checkout")
    for file in (folder / "engine" / "runtime" / "cpu").iterdir():
        file.unlink()
    (folder / "engine" / "runtime" / "cpu").rmdir()
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["note"], done.stderr


def test_nothing_but_the_seam_imports_the_folder():
    package, found = "engine.runtime.cpu", []
    for file in sorted((ROOT / "engine").rglob("*.py")):
        if (ROOT / "engine" / "runtime" / "cpu") in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [f"{node.module}.{name.name}" for name in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            found += [file.name for name in names if name == package or name.startswith(f"{package}.")]
    assert set(found) == {"acceleration.py"}


def test_a_fault_inside_the_folder_is_not_taken_for_its_absence(tmp_path):
    folder = copy_checkout(tmp_path / "checkout")
    entry = folder / "engine" / "runtime" / "cpu" / "entry.py"
    entry.write_text("import no_such_library\n" + entry.read_text().replace("from __future__ import annotations\n", ""))
    program = "import engine.runtime.acceleration"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode and "No module named 'no_such_library'" in done.stderr
