"""Scans that come in parts: what they become, and that no mistake and no ill will makes anything else of them, such as
a scan with bytes that nobody sent (of memory that another patient's scan was in before)."""

import numpy as np
import pytest

from engine.errors import InvalidInput, ResourceExhausted, Unavailable
from engine.runtime import uploads as uploads_module
from engine.runtime.study_store import content_digest
from engine.runtime.uploads import DEADLINE_S, IDLE_S, SLOW_S, Uploads
from engine.scan.limits import Limits

FILE = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def uploads(clock):
    return Uploads(Limits(max_bytes=FILE.size), clock)


def send(uploads, name: str, part_bytes: int, file=FILE, start=0, peer=""):
    """Send the rest of a file from `start` on; what the last part gave. The ones before must give nothing."""
    for begin in range(start, file.size, part_bytes):
        whole = uploads.add(name, begin, file.size, file[begin : begin + part_bytes], peer)
        assert (whole is None) == (begin + part_bytes < file.size)
    return whole


@pytest.mark.parametrize("part_bytes", [1000, 33_333, 99_999, 100_000])
def test_parts_become_the_file_and_its_digest(uploads, part_bytes):
    whole = send(uploads, "a", part_bytes)
    np.testing.assert_array_equal(whole.data, FILE)
    assert whole.digest.hexdigest() == content_digest(FILE)


def test_uploads_in_turns_are_not_mixed_up(uploads):
    files, complete = {"a": FILE, "b": FILE[::-1].copy()}, []
    for begin in range(0, FILE.size, 10_000):
        for name, file in files.items():
            whole = uploads.add(name, begin, file.size, file[begin : begin + 10_000])
            if whole is not None:
                np.testing.assert_array_equal(whole.data, file)
                assert whole.digest.hexdigest() == content_digest(file)
                complete.append(name)
    assert complete == ["a", "b"]


@pytest.mark.parametrize(
    "start, size, part",
    [
        (20_000, FILE.size, FILE[20_000:30_000]),
        (5_000, FILE.size, FILE[5_000:10_000]),
        (10_000, FILE.size - 1, FILE[10_000:20_000]),
        (10_000, FILE.size, FILE),
        (10_000, FILE.size, FILE[:0]),
        (10_000, -1, FILE[10_000:20_000]),
        (-1, FILE.size, FILE[:1]),
    ],
    ids=["skips bytes", "overlaps", "another size", "too long", "empty", "negative size", "negative start"],
)
def test_a_part_that_is_not_the_next_one_is_refused_and_ends_the_upload(uploads, start, size, part):
    uploads.add("a", 0, FILE.size, FILE[:10_000])
    with pytest.raises(InvalidInput, match="not the next part|no part of a file"):
        uploads.add("a", start, size, part)
    with pytest.raises(Unavailable, match="does not know the upload"):
        uploads.add("a", 10_000, FILE.size, FILE[10_000:20_000])
    np.testing.assert_array_equal(send(uploads, "a", 50_000).data, FILE)


@pytest.mark.parametrize("start, size, part", [(0, 0, FILE[:0]), (0, 5, FILE[:0]), (0, 5, FILE[:6]), (0, -5, FILE[:5])])
def test_a_first_part_that_cannot_be_one_is_refused(uploads, start, size, part):
    with pytest.raises(InvalidInput, match="no part of a file"):
        uploads.add("a", start, size, part)


def test_a_file_over_the_limit_is_refused_with_its_first_part(uploads):
    with pytest.raises(InvalidInput, match="over this server's limit of 100,000"):
        uploads.add("a", 0, FILE.size + 1, FILE[:10])


def test_two_uploads_under_one_name_both_end_with_an_error(uploads):
    """Else the one patient's first half and the other's second would become a study."""
    uploads.add("a", 0, FILE.size, FILE[:50_000])
    with pytest.raises(InvalidInput, match="both are ended"):
        uploads.add("a", 0, FILE.size, FILE[::-1][:50_000].copy())
    with pytest.raises(Unavailable, match="does not know the upload"):
        uploads.add("a", 50_000, FILE.size, FILE[50_000:])
    np.testing.assert_array_equal(send(uploads, "a", 25_000).data, FILE)


def test_uploads_that_bring_a_byte_now_and_then_give_way_to_a_new_one(uploads, clock, monkeypatch):
    monkeypatch.setattr(uploads_module, "PROGRESS_BYTES", 1000)
    most = FILE.size - 100
    for name in "ab":
        uploads.add(name, 0, FILE.size, FILE[:most])
    for second in range(1, 10):
        clock.now += SLOW_S / 8
        for name in "ab":
            start = most + second - 1
            uploads.add(name, start, FILE.size, FILE[start : start + 1])
    np.testing.assert_array_equal(send(uploads, "c", 10_000).data, FILE)


def test_three_slow_uploads_do_not_shut_everybody_out(clock, monkeypatch):
    """As somebody tried it: two scans of 2 GiB but for 16 MiB, a third of 31 MiB, then a byte of each every 12 s. Here
    a MiB is 40 bytes."""
    mib = 40
    monkeypatch.setattr(uploads_module, "PROGRESS_BYTES", mib)
    uploads, started = Uploads(Limits(max_bytes=2048 * mib), clock), clock.now
    slow = {"a": 2032 * mib, "b": 2032 * mib, "c": 31 * mib}
    newcomer = FILE[: 13 * mib]

    def another_byte():
        clock.now += 12
        for name in slow:
            uploads.add(name, slow[name], 2048 * mib, FILE[:1], peer=f"of {name}")
            slow[name] += 1

    for name, here in slow.items():
        uploads.add(name, 0, 2048 * mib, FILE[:here], peer=f"of {name}")
    while clock.now + 12 <= started + SLOW_S:
        another_byte()
        with pytest.raises(ResourceExhausted, match="try again"):
            send(uploads, "new", 4 * mib, newcomer, peer="of new")
    another_byte()
    np.testing.assert_array_equal(send(uploads, "new", 4 * mib, newcomer, peer="of new").data, newcomer)


def test_one_connection_takes_half_of_the_memory_at_most_and_another_the_rest(uploads):
    most = FILE.size - 1
    uploads.add("a", 0, FILE.size, FILE[:most], peer="greedy")
    uploads.add("b", 0, FILE.size, FILE[:1], peer="greedy")
    for start, part in ((1, FILE[1:2]), (0, FILE[:2])):
        with pytest.raises(ResourceExhausted, match="over this connection.*100,000 bytes"):
            uploads.add("b", start, FILE.size, part, peer="greedy")
    np.testing.assert_array_equal(send(uploads, "c", 10_000, peer="other").data, FILE)
    np.testing.assert_array_equal(send(uploads, "a", 1, start=most, peer="greedy").data, FILE)


def test_a_complete_upload_counts_for_its_connection_until_its_data_is_let_go(uploads):
    held = [send(uploads, "a", 50_000, peer="greedy").data[10:]]
    with pytest.raises(ResourceExhausted, match="over this connection"):
        uploads.add("b", 0, FILE.size, FILE[:1], peer="greedy")
    held.pop()
    np.testing.assert_array_equal(send(uploads, "b", 50_000, peer="greedy").data, FILE)


def test_a_connections_own_slow_upload_gives_way_to_its_next_one(uploads, clock):
    """Else a client whose upload broke off could not send a large scan again before IDLE_S."""
    uploads.add("a", 0, FILE.size, FILE[:-1], peer="client")
    uploads.add("b", 0, FILE.size, FILE[:-1], peer="other")
    clock.now += SLOW_S + 1
    np.testing.assert_array_equal(send(uploads, "c", 50_000, peer="client").data, FILE)
    np.testing.assert_array_equal(send(uploads, "b", 1, start=FILE.size - 1, peer="other").data, FILE)
    with pytest.raises(Unavailable, match="give way"):
        uploads.add("a", FILE.size - 1, FILE.size, FILE[-1:], peer="client")


def test_of_too_many_uploads_over_one_connection_one_of_its_own_gives_way(uploads, monkeypatch):
    monkeypatch.setattr(uploads_module, "MAX_UPLOADS_PER_CONNECTION", 3)
    uploads.add("small", 0, 20, FILE[:1], peer="other")
    for name, received in (("a", 10), ("b", 2), ("c", 3)):
        uploads.add(name, 0, 20, FILE[:received], peer="greedy")
    for name in "de":
        uploads.add(name, 0, 20, FILE[:4], peer="greedy")
    for name in "bc":
        with pytest.raises(Unavailable, match="give way"):
            uploads.add(name, 5, 20, FILE[5:20], peer="greedy")
    for name, start, peer in (("small", 1, "other"), ("a", 10, "greedy"), ("d", 4, "greedy"), ("e", 4, "greedy")):
        np.testing.assert_array_equal(send(uploads, name, 5, FILE[:20], start, peer).data, FILE[:20])


def test_a_part_over_another_connection_ends_the_upload(uploads):
    uploads.add("a", 0, FILE.size, FILE[:50_000], peer="client")
    with pytest.raises(InvalidInput, match="another connection.*it is ended"):
        uploads.add("a", 50_000, FILE.size, FILE[50_000:], peer="other")
    with pytest.raises(Unavailable, match="not its own"):
        uploads.add("a", 50_000, FILE.size, FILE[50_000:], peer="client")


def test_an_upload_that_keeps_its_pace_does_not_give_way(uploads, clock, monkeypatch):
    monkeypatch.setattr(uploads_module, "PROGRESS_BYTES", 1000)
    for name in "ab":
        uploads.add(name, 0, FILE.size, FILE[:90_000])
    for start in range(90_000, 99_000, 1000):
        clock.now += SLOW_S / 2
        for name in "ab":
            uploads.add(name, start, FILE.size, FILE[start : start + 1000])
    with pytest.raises(ResourceExhausted):
        send(uploads, "c", 10_000)
    for name in "ab":
        np.testing.assert_array_equal(send(uploads, name, 500, start=99_000).data, FILE)


def test_an_upload_has_a_deadline(uploads, clock):
    uploads.add("a", 0, FILE.size, FILE[:10])
    for start in range(10, 30):
        clock.now += IDLE_S / 2
        uploads.forget_idle()
        if clock.now - 1000 > DEADLINE_S:
            break
        uploads.add("a", start, FILE.size, FILE[start : start + 1])
    clock.now += DEADLINE_S
    uploads.forget_idle()
    with pytest.raises(Unavailable):
        uploads.add("a", 30, FILE.size, FILE[30:])


def test_a_part_or_a_name_that_is_too_large_is_refused(monkeypatch, uploads):
    monkeypatch.setattr(uploads_module, "MAX_PART_BYTES", 100)
    with pytest.raises(InvalidInput, match="at most 100 bytes, not 101"):
        uploads.add("a", 0, FILE.size, FILE[:101])
    with pytest.raises(InvalidInput, match="at most 64 characters, not 65"):
        uploads.add("n" * 65, 0, FILE.size, FILE[:100])
    assert send(uploads, "n" * 64, 100) is not None


def test_what_does_not_fit_takes_the_place_of_those_that_have_waited_longest(uploads, clock):
    most = FILE.size - 1  # two of them and two bytes may be here
    for name, start, end in (("a", 0, 10), ("b", 0, most), ("a", 10, most), ("c", 0, 2)):
        uploads.add(name, start, FILE.size, FILE[start:end])
    clock.now += SLOW_S + 1
    uploads.add("c", 2, FILE.size, FILE[2:3])
    with pytest.raises(Unavailable, match="give way"):
        uploads.add("b", most, FILE.size, FILE[most:])
    for name, start in (("a", most), ("c", 3)):
        np.testing.assert_array_equal(send(uploads, name, 50_000, start=start).data, FILE)


def test_what_does_not_fit_beside_uploads_in_progress_is_refused(uploads, clock):
    most = FILE.size - 1
    for name in "ab":
        uploads.add(name, 0, FILE.size, FILE[:most])
    clock.now += SLOW_S
    uploads.add("c", 0, FILE.size, FILE[:2])
    with pytest.raises(ResourceExhausted, match="try again"):
        uploads.add("c", 2, FILE.size, FILE[2:3])
    for name in "ab":
        np.testing.assert_array_equal(send(uploads, name, 1, start=most).data, FILE)
    np.testing.assert_array_equal(send(uploads, "c", 50_000).data, FILE)


def test_a_complete_upload_takes_room_until_its_data_is_let_go(uploads):
    held = [send(uploads, name, 50_000).data[10:] for name in "ab"]
    with pytest.raises(ResourceExhausted):
        uploads.add("c", 0, FILE.size, FILE[:1])
    held.pop()
    np.testing.assert_array_equal(send(uploads, "c", 50_000).data, FILE)


def test_what_is_only_announced_takes_nobodys_place(uploads, clock):
    uploads.add("a", 0, FILE.size, FILE[:10])
    clock.now += SLOW_S + 1
    for name in "bcdef":
        uploads.add(name, 0, FILE.size, FILE[:1])
    np.testing.assert_array_equal(send(uploads, "a", 50_000, start=10).data, FILE)


def test_an_upload_that_waits_too_long_is_forgotten(uploads, clock):
    for name in "ab":
        uploads.add(name, 0, 100, FILE[:10])
    clock.now += IDLE_S
    uploads.forget_idle()
    uploads.add("b", 10, 100, FILE[10:20])
    clock.now += 1
    uploads.forget_idle()
    with pytest.raises(Unavailable):
        uploads.add("a", 10, 100, FILE[10:20])
    np.testing.assert_array_equal(send(uploads, "b", 40, FILE[:100], start=20).data, FILE[:100])


def test_of_too_many_uploads_the_one_gives_way_of_which_the_least_has_come(uploads, monkeypatch):
    monkeypatch.setattr(uploads_module, "MAX_UPLOADS", 3)
    for name, received in (("a", 10), ("b", 1), ("c", 1)):
        uploads.add(name, 0, 20, FILE[:received])
    for name in "defgh":
        uploads.add(name, 0, 20, FILE[:1])
    np.testing.assert_array_equal(send(uploads, "a", 5, FILE[:20], start=10).data, FILE[:20])
    with pytest.raises(Unavailable, match="give way"):
        uploads.add("c", 1, 20, FILE[1:20])


def test_a_file_that_no_memory_is_left_for_is_refused(uploads, monkeypatch):
    monkeypatch.setattr(uploads_module.np, "empty", raises_memory_error)
    with pytest.raises(ResourceExhausted, match="no memory"):
        uploads.add("a", 0, 20, FILE[:10])


def raises_memory_error(*_):
    raise MemoryError
