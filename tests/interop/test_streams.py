"""Either HTTP version on either side, and bodies that are longer than anything may hold."""

import json

import pytest

from world import API

LENGTH = 256 * 1024 * 1024
# What may be held of a body for a replay, some buffers, and the noise of an allocator.
ROOM = 48 * 1024 * 1024


@pytest.mark.parametrize("alpn", ["--http2", "--http1.1", "--no-alpn"])
@pytest.mark.parametrize("host, versions", [("api.test", {"2.0", "1.1"}), ("old.test", {"1.1"})])
def test_each_http_version_meets_each(sidebearer, servers, host, versions, alpn):
    """TLS-010"""
    done = sidebearer().exec("curl", "-fsS", alpn, "-w", "spoke %{http_version}\n", f"https://{host}/echo", "-d", "a body")
    echo, spoke = done.stdout.splitlines()
    assert spoke == ("spoke 2" if alpn == "--http2" else "spoke 1.1")
    assert json.loads(echo)["httpVersion"] in versions
    assert json.loads(echo)["bodyLength"] == 6


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_long_bodies_stream_both_ways_in_bounded_memory(sidebearer, version, figure):
    agent = sidebearer()
    running = agent.run()
    assert running.get().status_code == 200
    before = peak_memory(running)
    long = agent.folder / "long"
    with long.open("wb") as file:
        file.truncate(LENGTH)
    curl = ["curl", "-fsS", version, "--noproxy", "", "--proxy", f"http://{running.address}", "--cacert", str(agent.ca)]
    uploaded = agent.outside(*curl, "-T", str(long), f"{API}/echo")
    assert json.loads(uploaded)["bodyLength"] == LENGTH
    downloaded = agent.outside(*curl, "-o", "/dev/null", "-w", "%{size_download}", f"{API}/zeros/{LENGTH}")
    assert int(downloaded) == LENGTH
    grown = peak_memory(running) - before
    figure(f"{LENGTH >> 20} MiB up and down, peak memory {before >> 20} MiB + {grown >> 20} MiB")
    assert grown < ROOM


def peak_memory(running):
    status = open(f"/proc/{running.process.pid}/status").read()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024
