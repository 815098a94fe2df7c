"""Many requests at once on a token that has just died."""

import asyncio
import time
import uuid
from collections import Counter

import httpx

from world import API

# A log of every frame would be most of what is measured here.
LOG = "info"

REQUESTS = 500


async def fetch_all(running):
    # Half of them on connections of their own, half as streams on a few HTTP/2 connections.
    many = httpx.Limits(max_connections=REQUESTS, max_keepalive_connections=REQUESTS)
    clients = [running.client(httpx.AsyncClient, limits=many)] * 5
    clients += [running.client(httpx.AsyncClient, http2=True) for _ in range(5)]

    async def fetch(client):
        try:
            answer = await client.get(f"{API}/echo", headers={"x-request-id": str(uuid.uuid4())})
            return answer.status_code
        except httpx.HTTPError as error:
            return repr(error)

    try:
        return Counter(await asyncio.gather(*(fetch(clients[n % len(clients)]) for n in range(REQUESTS))))
    finally:
        for client in clients:
            await client.aclose()


def test_500_concurrent_requests_on_a_revoked_token_cost_one_token_call(sidebearer, servers, figure):
    """RTY-014"""
    running = sidebearer().run()
    assert running.get().status_code == 200
    servers.tell("reset")
    servers.tell("revoke")
    servers.tell("hold", count=REQUESTS)
    started = time.monotonic()
    answers = asyncio.run(fetch_all(running))
    seconds = time.monotonic() - started
    report = servers.report()
    figure(
        f"{REQUESTS} requests, {report['api']['held']} of them at the API at the same time with the revoked token: "
        f"answers {dict(answers)}, {report['token']['calls']} token calls, {report['api']['refused']} refused by the API, "
        f"at most {report['tries']['most']} tries a request, {seconds:.1f} s"
    )
    assert answers == {200: REQUESTS}
    assert report["api"]["held"] == REQUESTS
    assert report["token"]["calls"] == {"client_credentials": 1}
    assert report["tries"] == {"requests": REQUESTS, "most": 2}
