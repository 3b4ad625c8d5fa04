import os
import subprocess
import sys

import pytest

from engine.runtime import server_folder
from engine.runtime.server_folder import ServerFolder


def test_the_last_to_leave_removes_the_folder(tmp_path):
    path = tmp_path / "folder"
    first, second = ServerFolder(path), ServerFolder(path)
    (path / "content").mkdir()
    first.leave()
    first.leave()
    assert (path / "content").exists()
    second.leave()
    assert not path.exists()
    third = ServerFolder(path)
    assert path.exists() and not (path / "content").exists()
    third.leave()


def test_a_process_has_a_folder_for_each_of_its_engines_and_a_sweep_leaves_them(tmp_path, monkeypatch):
    monkeypatch.setattr(server_folder, "SHARED_MEMORY", tmp_path)
    first, second = ServerFolder.of_process(), ServerFolder.of_process()
    assert first.path != second.path
    server_folder.sweep()
    assert first.path.exists() and second.path.exists()
    first.leave()
    assert not first.path.exists() and second.path.exists()
    second.leave()
    # Of a process that is gone, and had the number that this one has.
    left = tmp_path / f"{server_folder.PREFIX}-{os.getpid()}-1-0a1b2c3d"
    left.mkdir(mode=0o700)
    server_folder.sweep()
    assert not left.exists()


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="private"):
        ServerFolder(folder)
    link = tmp_path / "link"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="private"):
        ServerFolder(link)


def test_processes_of_one_server_share_a_folder_that_is_swept_once_the_server_is_dead(tmp_path, monkeypatch):
    # A "server" whose two children each join the folder; it is killed together with them, so nobody cleans up.
    child = (
        f"import pathlib, engine.runtime.server_folder as s; s.SHARED_MEMORY = pathlib.Path('{tmp_path}'); "
        "import sys; sys.stdout.write(f'{s.ServerFolder.of_server().path}\\n'); sys.stdout.flush(); input()"
    )
    server = (
        "import subprocess, sys; c = [subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "stdin=subprocess.PIPE) for _ in range(2)]; input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", server, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    roots = {process.stdout.readline().strip() for _ in range(2)}
    assert len(roots) == 1
    root = tmp_path / os.path.basename(roots.pop())
    monkeypatch.setattr(server_folder, "SHARED_MEMORY", tmp_path)
    server_folder.sweep()
    assert root.exists()
    foreign = tmp_path / f"{server_folder.PREFIX}-1-not-ours"
    foreign.mkdir()
    process.kill()
    process.wait()
    process.stdout.read()  # ends when the children, whose input has ended, are gone
    server_folder.sweep()
    assert not root.exists() and foreign.exists()
