"""Either HTTP version on either side, and bodies that are longer than anything may hold, one and many at a time."""

import hashlib
import json
import os
import subprocess
import time

import pytest

from world import API, CLIENTS, NODE, wait_for, wait_until_still

# A log of every frame would be most of what is measured here.
LOG = "info"

MIB = 1024 * 1024
# With INTEROP_GIB=1 every body here has 1 GiB: 132 GiB in all, a quarter of an hour on two cores. Otherwise they are as long
# as it takes to be seen in what is held.
WHOLE = bool(os.environ.get("INTEROP_GIB"))
LENGTH = 1024 * MIB if WHOLE else 128 * MIB
AT_ONCE = 64
LENGTH_AT_ONCE = 1024 * MIB if WHOLE else 8 * MIB
BLOCK = 64 * 1024
# What may be held of a body for a replay, some buffers, and the noise of an allocator.
ROOM = 48 * MIB
# All that may be held for replays together (64 MiB), and for each of the 128 a window of 1 MiB.
ROOM_AT_ONCE = 64 * MIB + 2 * AT_ONCE * MIB
EITHER_VERSION = pytest.mark.parametrize("version", ["--http1.1", "--http2"])


@pytest.mark.parametrize("alpn", ["--http2", "--http1.1", "--no-alpn"])
@pytest.mark.parametrize("host, versions", [("api.test", {"2.0", "1.1"}), ("old.test", {"1.1"})])
def test_each_http_version_meets_each(sidebearer, servers, host, versions, alpn):
    """TLS-010"""
    done = sidebearer().exec("curl", "-fsS", alpn, "-w", "spoke %{http_version}\n", f"https://{host}/echo", "-d", "a body")
    echo, spoke = done.stdout.splitlines()
    assert spoke == ("spoke 2" if alpn == "--http2" else "spoke 1.1")
    assert json.loads(echo)["httpVersion"] in versions
    assert json.loads(echo)["bodyLength"] == 6


def blocks(length):
    """What the API sends: each block of 64 KiB has its number in front."""
    for number in range(length // BLOCK):
        yield number.to_bytes(4) + bytes(BLOCK - 4)


class Content:
    """A file of numbered blocks and its hash."""

    def __init__(self, path, length):
        self.path, self.length = path, length
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for block in blocks(length):
                digest.update(block)
                file.write(block)
        self.sha256 = digest.hexdigest()


@EITHER_VERSION
def test_long_bodies_stream_both_ways_in_bounded_memory(sidebearer, tmp_path, version, figure):
    agent = sidebearer()
    running = agent.run()
    assert running.get().status_code == 200
    before = peak_memory(running)
    content = Content(tmp_path / "long", LENGTH)
    curl = through(running, version)
    uploaded = json.loads(agent.outside(*curl, "-T", content.path, f"{API}/echo"))
    assert (uploaded["bodyLength"], uploaded["bodySha256"]) == (LENGTH, content.sha256)
    downloaded = agent.outside("sh", "-c", '"$@" | sha256sum', "sh", *curl, f"{API}/numbered/{LENGTH}")
    assert downloaded.split()[0] == content.sha256
    grown = peak_memory(running) - before
    figure(f"{LENGTH // MIB} MiB up and down, peak memory {before // MIB} MiB + {grown // MIB} MiB")
    assert grown < ROOM


@pytest.mark.parametrize("host", ["api.test", "old.test"])
def test_many_long_bodies_at_once_stream_in_bounded_memory(sidebearer, servers, tmp_path, host, figure):
    agent = sidebearer()
    running = agent.run()
    assert running.get().status_code == 200
    before = peak_memory(running)
    content = Content(tmp_path / "long", LENGTH_AT_ONCE)
    servers.tell("reset")
    # None is answered before all have come, and none can end before.
    servers.tell("hold", count=2 * AT_ONCE)
    started = time.monotonic()
    half = AT_ONCE // 2
    commands = [[NODE, CLIENTS / "uploads.mjs", running.address, agent.ca, f"https://{host}/echo", content.path, str(half)]]
    commands += [[*through(running, "--http1.1"), "-T", content.path, f"https://{host}/echo"]] * half
    for version in ("--http1.1", "--http2"):
        download = [*through(running, version), f"https://{host}/numbered/{LENGTH_AT_ONCE}"]
        commands += [["sh", "-c", '"$@" | sha256sum', "sh", *download]] * half
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        lines = [line for client in clients for line in client.communicate(timeout=1800 if WHOLE else 300)[0].splitlines()]
    finally:
        for client in clients:
            client.kill()
    seconds = time.monotonic() - started
    assert servers.report()["api"]["held"] == 2 * AT_ONCE
    uploaded = [json.loads(line)["bodySha256"] for line in lines if line.startswith("{")]
    downloaded = [line.split()[0] for line in lines if not line.startswith("{")]
    assert (uploaded, downloaded) == ([content.sha256] * AT_ONCE, [content.sha256] * AT_ONCE)
    grown = peak_memory(running) - before
    figure(
        f"{AT_ONCE} uploads and {AT_ONCE} downloads of {LENGTH_AT_ONCE // MIB} MiB at once in {seconds:.1f} s, "
        f"peak memory {before // MIB} MiB + {grown // MIB} MiB"
    )
    assert grown < ROOM_AT_ONCE


@pytest.mark.parametrize("host", ["api.test", "old.test"])
def test_agents_that_hardly_read_do_not_make_the_memory_grow(sidebearer, servers, host, figure):
    agent = sidebearer()
    running = agent.run()
    assert running.get().status_code == 200
    before = peak_memory(running)
    readers = []
    for number in range(16):
        curl = through(running, "--http2" if number % 2 else "--http1.1")
        slow = [*curl, "--limit-rate", "1k", "-o", "/dev/null", f"https://{host}/numbered/{1024 * MIB}"]
        readers.append(subprocess.Popen(slow, stderr=subprocess.DEVNULL))
    try:
        wait_for(lambda: servers.report()["api"]["authorized"] == 17, "all to be answered")
        grown = wait_until_still(lambda: peak_memory(running), 1) - before
        figure(f"16 readers of 1 KiB/s, peak memory {before // MIB} MiB + {grown // MIB} MiB")
        assert grown < ROOM
        # Whoever does read is not kept waiting by them.
        assert hashlib.sha256(running.get(f"/numbered/{4 * MIB}").content).digest() == digest(4 * MIB)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def digest(length):
    digest = hashlib.sha256()
    for block in blocks(length):
        digest.update(block)
    return digest.digest()


def through(running, version):
    ca = running.sidebearer.ca
    return ["curl", "-fsS", version, "--noproxy", "", "--proxy", f"http://{running.address}", "--cacert", str(ca)]


def peak_memory(running):
    status = open(f"/proc/{running.process.pid}/status").read()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024
