"""A connection that takes longer than its request's token lives."""

import time
from concurrent.futures import ThreadPoolExecutor

from faults import Faults
from world import API, USER, wait_for

# Used for 10 s, and over after 15.
TTL = 15


def test_no_token_is_sent_that_ended_while_the_connection_was_made(sidebearer, servers):
    """C16, TOK-015"""
    servers.tell("set", ttl=TTL)
    way_to_api = Faults(lambda: servers.ports["api"])
    limits = {"upstream_handshake_timeout": "60s"}
    agent = sidebearer(providers={"user": USER}, ports={"api": way_to_api.port}, limits=limits)
    agent.connect("user")
    running = agent.run()
    assert running.get("/quick/alice/0").status_code == 200
    obtained = time.monotonic()
    way_to_api.stall()
    way_to_api.cut()
    wait_for(lambda: not way_to_api.pairs, "the first connection to end")
    with running.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, f"{API}/quick/alice/0", content=b"a body")
        wait_for(lambda: way_to_api.pairs, "the next connection to begin")
        # Its request has this token, and no other.
        assert servers.granted("refresh_token") == 1
        wait_for(lambda: time.monotonic() > obtained + TTL + 0.2, "the token to end")
        assert not answer.done()
        way_to_api.heal()
        assert answer.result().status_code == 200
    assert servers.ledger()["expired"] == []
    way_to_api.close()
