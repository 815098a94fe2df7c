"""What is left of a grant in the sidecar's memory once it is gone."""

import os

import pytest

from world import USER, wait_for


def in_memory(pid, tokens):
    """Those of the tokens that stand in the process's writable memory."""
    found = set()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for place, access, *_ in map(str.split, maps):
            if not access.startswith("rw"):
                continue
            start, end = (int(address, 16) for address in place.split("-"))
            memory.seek(start)
            try:
                content = memory.read(end - start)
            except OSError:  # The kernel's own, or unmapped just now.
                continue
            found |= {token for token in tokens if token.encode() in content}
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into the memory of a process that shows it to nobody")
def test_no_token_is_left_in_memory_once_its_connection_is_gone(sidebearer, servers):
    """LEK-010: nor of those that were replaced on the way."""
    agent = sidebearer(providers={"user": USER})
    before = set(servers.issued())
    first = agent.connect("user")
    running = agent.run()
    assert running.get().status_code == 200
    servers.tell("revoke")
    assert running.get().status_code == 200
    tokens = {first, *servers.issued()} - before
    # Two refresh tokens have come to the sidecar and two access tokens, besides the one that it was given.
    assert len(tokens) == 5 and in_memory(running.process.pid, tokens)
    agent.command("disconnect", "user", "--config", agent.config)
    wait_for(lambda: running.get().status_code == 403, "the connection to be gone")
    # The last answer of the provider stays in the buffer of a connection that is kept for 4 s.
    wait_for(lambda: not in_memory(running.process.pid, tokens), "the last token to be wiped", seconds=60)
