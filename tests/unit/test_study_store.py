import errno
import multiprocessing
import os
import shutil
import stat
import subprocess

import numpy as np
import pytest

from engine.errors import ResourceExhausted, StudyNotFound
from engine.runtime import study_store
from engine.runtime.study_store import StudyStore, content_digest
from engine.volume import Crop
from tests.locks import waiting_for

MB = 1_000_000
spawn = multiprocessing.get_context("spawn")


def handle_of(name: str) -> str:
    return content_digest(name.encode())


def image_of(megabytes: float) -> np.ndarray:
    return np.zeros((1, 1, 1, int(megabytes * MB / 4)), np.float32)


@pytest.fixture
def store(tmp_path):
    with StudyStore(tmp_path / "store", 10 * MB) as store:
        yield store


def test_a_piece_comes_back_as_it_was_stored_read_only_and_mapped(store):
    handle = handle_of("scan")
    tokens = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    store.add(handle, {"preset": "ct"}, image_of(1))
    assert store.get(handle, "visual_tokens") is None
    store.put(handle, "visual_tokens", tokens)
    stored = store.get(handle, "visual_tokens")
    np.testing.assert_array_equal(stored, tokens)
    assert isinstance(stored, np.memmap) and not stored.flags.writeable
    assert stored.ctypes.data % 64 == 0
    assert store.info(handle) == {"preset": "ct"}


def test_a_handle_depends_on_content_affine_preset_and_model(store):
    content = content_digest(b"scan")
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    handles = {
        store.handle_of(content, None, "auto", "model"),
        store.handle_of(content_digest(b"another scan"), None, "auto", "model"),
        store.handle_of(content, affine, "auto", "model"),
        store.handle_of(content, affine + 1e-9, "auto", "model"),
        store.handle_of(content, None, "ct", "model"),
        store.handle_of(content, None, "auto", "another model"),
    }
    assert len(handles) == 6 and all(len(handle) == 64 for handle in handles)
    crops = [None, Crop.of("0:1,0:1,0:1"), Crop.of("0:1,0:1,0:2"), Crop.of("0:1,0:1,0:1mm")]
    assert len({store.handle_of(content, affine, "ct", "m", crop) for crop in crops}) == 4
    assert store.handle_of(content, affine, "ct", "m", crops[1]) == store.handle_of(
        content, affine, "ct", "m", Crop.of((0, 0, 0, 1, 1, 1))
    )
    assert store.handle_of(content, affine, "ct", "m") == store.handle_of(content, affine.astype(np.float32), "ct", "m")


def _handle(root, handles):
    handles.put(StudyStore(root).handle_of("content", None, "auto", "model"))


def test_a_handle_is_the_same_in_all_processes_of_a_server_and_nowhere_else(tmp_path):
    """Else who knows a scan, or its digest, could ask about what others have uploaded."""
    handles = spawn.SimpleQueue()
    root = tmp_path / "store"
    with StudyStore(tmp_path / "other") as other:
        workers = [spawn.Process(target=_handle, args=(root, handles)) for _ in range(3)]
        with StudyStore(root):  # so that it outlives each of them
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            ours = {handles.get() for _ in workers}
        assert len(ours) == 1 and other.handle_of("content", None, "auto", "model") not in ours
    with StudyStore(root) as again:
        assert again.handle_of("content", None, "auto", "model") not in ours


@pytest.mark.parametrize(
    "handle", ["", "..", "../../etc", "x" * 64, "A" * 64, "0" * 63, "0" * 1000, handle_of("never")]
)
def test_an_unknown_handle_is_not_found_and_says_to_upload_again(store, handle):
    assert handle not in store
    for use in (
        lambda: store.info(handle),
        lambda: store.get(handle, "image"),
        lambda: store.put(handle, "image", image_of(1)),
    ):
        with pytest.raises(StudyNotFound, match="upload the scan again") as error:
            use()
        assert len(str(error.value)) < 200


def test_a_removed_study_is_unknown_and_what_was_read_of_it_stays(store):
    kept, gone = handle_of("kept"), handle_of("gone")
    for handle in (kept, gone):
        store.add(handle, {}, image_of(1))
    image = store.get(gone, "image")
    store.remove(gone)
    assert gone not in store and kept in store and store.used_bytes < 2 * MB
    np.testing.assert_array_equal(image, image_of(1))
    with pytest.raises(StudyNotFound):
        store.remove(gone)


def test_a_study_that_is_removed_while_a_piece_is_computed_is_not_there_for_it(store):
    handle = handle_of("scan")
    store.add(handle, {}, image_of(1))

    def compute(image):
        store.remove(handle)
        return image

    with pytest.raises(StudyNotFound):
        store.computed(handle, "visual_tokens", compute)
    assert store.used_bytes == 0


def test_the_least_recently_used_study_is_evicted_first(store):
    a, b, c, d = (handle_of(name) for name in "abcd")
    for n, handle in enumerate((a, b, c)):
        store.add(handle, {}, image_of(3))
        os.utime(store.root / handle / "info.json", ns=(n, n))
    store.get(a, "image")  # now b is the oldest
    store.add(d, {}, image_of(3))
    assert [handle in store for handle in (a, b, c, d)] == [True, False, True, True]


def test_the_limit_holds_for_pieces_added_later(store):
    a, b = handle_of("a"), handle_of("b")
    store.add(a, {}, image_of(4))
    store.add(b, {}, image_of(4))
    store.put(b, "segmentation_features", image_of(4))
    assert a not in store and b in store and store.used_bytes <= 10 * MB


def test_a_reader_keeps_its_piece_after_eviction(store):
    a, b = handle_of("a"), handle_of("b")
    image = np.full_like(image_of(6), 3.0)
    store.add(a, {}, image)
    mapped = store.get(a, "image")
    store.add(b, {}, image_of(6))
    assert a not in store
    np.testing.assert_array_equal(mapped, image)


def test_a_study_being_computed_is_not_evicted(store):
    a, b = handle_of("a"), handle_of("b")
    store.add(a, {}, image_of(6))
    with store.lock(a, "visual_tokens"):
        with pytest.raises(ResourceExhausted, match="try again"):
            store.add(b, {}, image_of(6))
        assert a in store
    store.add(b, {}, image_of(6))
    assert a not in store and b in store


def test_a_study_larger_than_the_store_is_refused_and_evicts_nothing(store):
    a, b = handle_of("a"), handle_of("b")
    store.add(a, {}, image_of(3))
    with pytest.raises(ResourceExhausted, match="11 MB.*10 MB.*study_store_mb"):
        store.add(b, {}, image_of(11))
    with pytest.raises(ResourceExhausted, match="study_store_mb"):
        store.put(a, "visual_tokens", image_of(8))
    assert a in store


def studies_of(store) -> set[str]:
    return {entry.name for entry in store.root.iterdir() if not entry.name.startswith(".")}


@pytest.fixture
def full(store, monkeypatch):
    """Makes the file system full for all arrays, until so many studies are left."""
    write = study_store._write_array

    def make_full(until: int):
        def write_if_there_is_room(path, array):
            write(path, array)
            if len(studies_of(store)) > until:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(study_store, "_write_array", write_if_there_is_room)

    return make_full


def used_in_turn(store, names: str) -> list[str]:
    """Adds studies, of which the first was not used for the longest time."""
    handles = [handle_of(name) for name in names]
    for n, handle in enumerate(handles):
        store.add(handle, {}, image_of(1))
        os.utime(store.root / handle / "info.json", ns=(n, n))
    return handles


def test_a_full_file_system_evicts_the_least_recently_used_until_there_is_room(store, full):
    a, b, c, d = used_in_turn(store, "abcd")
    full(until=2)
    store.add(handle_of("e"), {}, image_of(1))
    assert studies_of(store) == {c, d, handle_of("e")}
    assert (store.get(handle_of("e"), "image") == image_of(1)).all()


def test_a_full_file_system_evicts_no_study_that_is_being_computed(store, full):
    a, b, c = used_in_turn(store, "abc")
    full(until=2)
    with store.lock(b, "visual_tokens"):
        store.put(a, "visual_tokens", image_of(1))
    assert studies_of(store) == {a, b} and store.get(a, "visual_tokens") is not None


def test_a_full_file_system_without_anything_to_evict_is_a_clear_error_and_leaves_nothing_behind(store, full):
    a, b = used_in_turn(store, "ab")
    full(until=0)
    with store.lock(b, "visual_tokens"):
        with pytest.raises(ResourceExhausted, match="shm-size"):
            store.put(a, "visual_tokens", image_of(1))
        assert studies_of(store) == {a, b}
        with pytest.raises(ResourceExhausted, match="shm-size"):
            store.add(handle_of("c"), {}, image_of(1))
    assert studies_of(store) == {b}
    assert not (store.root / ".unfinished").exists()


def test_another_error_than_a_full_file_system_evicts_nothing(store, monkeypatch):
    handles = used_in_turn(store, "ab")

    def broken(path, array):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(study_store, "_write_array", broken)
    with pytest.raises(OSError, match="Input/output"):
        store.add(handle_of("c"), {}, image_of(1))
    assert studies_of(store) == set(handles)


@pytest.fixture
def small_file_system(tmp_path):
    """A file system of 10 MB in memory, as /dev/shm is one."""
    folder = tmp_path / "shm"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=10M", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a map of a piece may be left


def test_what_others_put_into_shared_memory_costs_studies_and_not_the_next_scan(small_file_system):
    with StudyStore(small_file_system / "store", 10 * MB) as store:
        a, b = used_in_turn(store, "ab")
        (small_file_system / "a giant message").write_bytes(bytes(shutil.disk_usage(small_file_system).free - 1000))
        image = np.random.default_rng(0).random((1, 1, 1, MB // 4), np.float32)
        store.add(handle_of("c"), {}, image)
        assert studies_of(store) == {b, handle_of("c")}
        np.testing.assert_array_equal(store.get(handle_of("c"), "image"), image)
        with pytest.raises(ResourceExhausted, match="shm-size"):
            store.put(b, "visual_tokens", image_of(4))
        assert studies_of(store) == {b}


@pytest.mark.parametrize("limit", [0, MB // 2, 1 << 60])
def test_a_limit_that_the_file_system_cannot_hold_is_refused(tmp_path, limit):
    with pytest.raises(ResourceExhausted, match="study_store_mb"):
        StudyStore(tmp_path / "store", limit)


def test_only_the_user_can_read_the_store(store):
    handle = handle_of("scan")
    store.add(handle, {}, image_of(1))
    store.put(handle, "visual_tokens", image_of(1))
    for path in (store.root, *store.root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def _encode_once(root, handle, encoded):
    def encode(image):
        encoded.put(os.getpid())
        return np.full((4, 4), os.getpid(), np.float32)

    StudyStore(root).computed(handle, "visual_tokens", encode)


def test_processes_that_want_the_same_piece_compute_it_once(store):
    handle = handle_of("scan")
    store.add(handle, {}, image_of(1))
    encoded = spawn.SimpleQueue()
    workers = [spawn.Process(target=_encode_once, args=(store.root, handle, encoded)) for _ in range(3)]
    with store.lock(handle, "visual_tokens"):  # until all have found it missing
        for worker in workers:
            worker.start()
        while waiting_for(store) < 3:
            assert encoded.empty()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    winner = encoded.get()
    assert encoded.empty()
    assert (store.get(handle, "visual_tokens") == winner).all()


def test_a_piece_that_could_not_be_computed_is_computed_by_the_next_who_asks(store):
    handle = handle_of("scan")
    store.add(handle, {}, image_of(1))
    with pytest.raises(ZeroDivisionError):
        store.computed(handle, "visual_tokens", lambda image: 1 / 0)
    assert store.computed(handle, "visual_tokens", lambda image: image[..., :3]).shape == (1, 1, 1, 3)
    with pytest.raises(StudyNotFound):
        store.computed(handle_of("other"), "visual_tokens", lambda image: image)


def _hold(root, handle, held):
    store = StudyStore(root)

    def write(unfinished):
        unfinished.write_bytes(b"half a piece")
        held.send(None)
        held.recv()

    with store.lock(handle, "visual_tokens"):
        store._make_room_and(write, handle, 1)


def test_a_killed_process_frees_its_locks_and_its_half_written_piece_is_removed(store):
    handle = handle_of("scan")
    store.add(handle, {}, image_of(1))
    ours, theirs = spawn.Pipe()
    worker = spawn.Process(target=_hold, args=(store.root, handle, theirs))
    worker.start()
    ours.recv()
    worker.kill()
    worker.join()
    assert (store.root / ".unfinished").exists()
    with store.lock(handle, "visual_tokens"):
        store.put(handle, "visual_tokens", image_of(1))
    assert handle in store and not (store.root / ".unfinished").exists()


def test_locks_of_different_pieces_and_studies_do_not_wait_for_each_other(store):
    a, b = handle_of("a"), handle_of("b")
    with store.lock(a, "image"), store.lock(a, "visual_tokens"), store.lock(b, "image"):
        with pytest.raises(BlockingIOError), store._locked(study_store._first_byte(a), 1, wait=False):
            pass


def test_the_last_to_leave_removes_the_store(tmp_path):
    first, second = StudyStore(tmp_path / "store", 10 * MB), StudyStore(tmp_path / "store")
    assert second.limit_bytes == 10 * MB
    first.close()
    assert (tmp_path / "store").exists()
    second.close()
    second.close()
    assert not (tmp_path / "store").exists()
