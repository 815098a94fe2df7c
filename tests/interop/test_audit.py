"""The audit trail of the real program: on a disk that is full, through a kill, and on standard output."""

import json
import signal
import subprocess
import threading

import httpx
import pytest

from world import API, wait_for

LOG = "info"
UNWRITTEN = "the audit trail cannot be written; said once"
AGAIN = "the audit trail is written again"
RELOADED = "configuration unchanged"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def said(running, message):
    return [event for event in running.events() if event.get("message") == message]


def uses(path, event="use"):
    """The lines that are whole; what a full disk cut off stands on a line of its own, and is written whole again."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            assert line.startswith("{"), line
    return [line for line in found if line["event"] == event]


def filled(disk):
    full = disk / "full"
    with full.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(512))
    return full


def test_a_full_disk_stops_no_request_and_no_line_is_lost_that_could_wait(sidebearer, small_disk):
    trail = small_disk / "audit"
    running = sidebearer(audit={"file": str(trail)}).run()
    with running.client() as client:
        paths = [f"/echo/{number}/{'x' * 700}" for number in range(90)]
        for path in paths:
            assert client.get(API + path).status_code == 200
        wait_for(lambda: said(running, UNWRITTEN), "the full disk to be told")
        # More than fits: what is there is moved to where there is room, as logrotate does.
        kept = small_disk.parent / "kept"
        kept.write_bytes(trail.read_bytes())
        trail.unlink()
        wait_for(lambda: said(running, AGAIN), "the trail to go on")
        assert client.get(f"{API}/last").status_code == 200
    running.terminate()
    lines = uses(kept) + uses(trail)
    assert [line["path"] for line in lines] == [*paths, "/last"]
    assert [line["seq"] for line in lines] == list(range(1, 92))
    assert len(said(running, UNWRITTEN)) == len(said(running, AGAIN)) == 1


def test_a_required_trail_refuses_until_its_disk_has_room(sidebearer, servers, small_disk):
    trail = small_disk / "audit"
    running = sidebearer(audit={"file": str(trail), "required": True}).run()
    assert running.get("/first").status_code == 200
    full = filled(small_disk)
    asked = servers.report()["api"]["requests"]
    # What is left of the last page takes a few lines.
    refused = next(answer for answer in (running.get(f"/{'x' * 900}") for _ in range(20)) if answer.status_code != 200)
    assert (refused.status_code, refused.json()["code"]) == (503, "audit_unavailable")
    assert running.get("/refused").status_code == 503
    first, *sent = [line["path"] for line in uses(trail, "intent")]
    assert first == "/first" and "/refused" not in sent
    assert servers.report()["api"]["requests"] - asked <= len(sent)
    full.unlink()
    assert running.get("/again").status_code == 200
    running.terminate()
    assert [line["status"] for line in uses(trail) if line["path"] in ("/first", "/again")] == [200, 200]


def test_no_kill_hides_a_use_whose_answer_an_agent_has_seen(sidebearer, tmp_path):
    trail = tmp_path / "audit"
    running = sidebearer(audit={"file": str(trail), "required": True}).run()
    seen, begun = [], threading.Event()

    def agent(name):
        with running.client() as client:
            for number in range(10_000):
                path = f"/echo/{name}/{number}"
                try:
                    client.get(API + path)
                except httpx.HTTPError:
                    return
                seen.append(path)
                if len(seen) > 60:
                    begun.set()

    agents = [threading.Thread(target=agent, args=[name]) for name in "abcd"]
    for thread in agents:
        thread.start()
    assert begun.wait(30)
    running.process.send_signal(signal.SIGKILL)
    for thread in agents:
        thread.join(30)
    assert set(seen) <= {line["path"] for line in uses(trail, "intent")}


def test_at_a_hang_up_the_next_line_goes_into_a_file_of_its_own(sidebearer, tmp_path):
    trail, moved = tmp_path / "audit", tmp_path / "audit.1"
    running = sidebearer(audit={"file": str(trail)}).run()
    assert running.get("/first").status_code == 200
    wait_for(lambda: trail.read_text(), "the first line")
    trail.rename(moved)
    running.process.send_signal(signal.SIGHUP)
    wait_for(lambda: said(running, RELOADED), "the reload")
    assert running.get("/second").status_code == 200
    running.terminate()
    assert [[line["path"] for line in uses(file)] for file in (moved, trail)] == [["/first"], ["/second"]]


def test_standard_output_has_the_trail_and_nothing_else(sidebearer):
    running = sidebearer(audit={"file": "-"}).run()
    assert running.get("/echo?q=in-the-query").status_code == 200
    running.terminate()
    lines = [line for line in running.log.read_text().splitlines() if '"event":"use"' in line]
    assert [json.loads(line)["path"] for line in lines] == ["/echo"]
    assert "in-the-query" not in lines[0]
