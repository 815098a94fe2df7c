"""nghttp2's own tools, which know no proxy, through a shim that does: many streams, and a token revoked amid them."""

import re
import subprocess
import time

import pytest

from raw import Shim
from world import wait_for

# A log of every frame would be most of what is measured here.
LOG = "info"

REQUESTS = 20_000


@pytest.fixture
def shim(sidebearer):
    """A sidecar, and a port on loopback that leads through it to api.test."""
    running = sidebearer().run()
    shim = Shim(running)
    yield shim
    shim.close()


@pytest.mark.parametrize("options", [["-c10", "-m100"], ["-c50", "--h1", "-m4"]], ids=["HTTP/2", "HTTP/1.1 pipelined"])
def test_no_request_is_lost_or_refused_when_the_token_is_revoked_under_load(shim, servers, figure, options):
    """RTY-014"""
    load = subprocess.Popen(
        ["h2load", f"-n{REQUESTS}", *options, f"--connect-to=127.0.0.1:{shim.port}", "https://api.test/quick"],
        stdout=subprocess.PIPE, text=True,
    )
    started = time.monotonic()
    wait_for(lambda: servers.report()["api"]["authorized"] > REQUESTS / 4, "the load to be under way")
    servers.tell("revoke")
    output, _ = load.communicate(timeout=120)
    seconds = time.monotonic() - started
    report = servers.report()
    figure(f"{REQUESTS / seconds:.0f} requests a second, {report['api']['refused']} refused by the API")
    assert f"{REQUESTS} total, {REQUESTS} started, {REQUESTS} done, {REQUESTS} succeeded, 0 failed, 0 errored, 0 timeout" in output
    assert f"status codes: {REQUESTS} 2xx, 0 3xx, 0 4xx, 0 5xx" in output
    assert report["api"]["refused"] > 0
    assert report["token"]["granted"] == {"client_credentials": 2}


def test_nghttp_gets_several_things_at_once_with_its_priorities(shim, servers):
    done = subprocess.run(
        ["nghttp", "-nvm8", "-H:authority: api.test", "-w10", "-W10", "-p32", "--trailer=x-late: 1", "-d/dev/null",
         f"https://127.0.0.1:{shim.port}/quick"],
        capture_output=True, text=True, timeout=60,
    )
    statuses = re.findall(r":status: (\d+)", done.stdout)
    assert statuses == ["200"] * 8, done.stdout + done.stderr
    assert servers.report()["api"]["authorized"] == 8
