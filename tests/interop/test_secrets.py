"""No file and no output of the sidecar ever holds a token or a secret, at the most talkative level."""

from urllib.parse import quote_plus

from world import API, ODD, SECRETS, SERVICE, USER, as_sent


def canaries(servers):
    for secret in SECRETS.values():
        yield from {secret, quote_plus(secret)}
    yield as_sent("basic", SECRETS["BASIC_SECRET"])
    yield as_sent(ODD["client_id"], SECRETS["ODD_SECRET"])
    yield from servers.issued()


def leaks(folder, canaries):
    needles = [canary.encode() for canary in canaries]
    for file in filter(lambda path: path.is_file(), folder.rglob("*")):
        content = file.read_bytes()
        for needle in needles:
            if (at := content.find(needle)) >= 0:
                line = content[content.rfind(b"\n", 0, at) + 1:at][-300:].decode(errors="replace")
                yield f"{file.name}: {needle[:4].decode()}... after {line!r}"


def test_nothing_the_sidecar_writes_holds_a_token_or_a_secret(sidebearer, servers):
    """LEK-001, LEK-006, LEK-011"""
    odd = ODD | {"client_credentials": {"scopes": ["read"]}}
    agent = sidebearer(
        providers={"user": USER, "service": SERVICE, "odd": odd},
        routes=[
            {"host": "api.test", "paths": ["/user/**"], "provider": "user"},
            {"host": "api.test", "paths": ["/odd/**"], "provider": "odd"},
            {"host": "api.test", "provider": "service"},
        ],
    )
    # Its libraries too: some of them write whole headers at this level.
    agent.environment["RUST_LOG"] = "trace"
    agent.connect("user")
    running = agent.run()
    paths = ("/user/x", "/odd/x", "/service/x")
    with running.client() as http1, running.client(http2=True) as http2:
        assert [http1.get(API + path).status_code for path in paths] == [200] * 3
        servers.tell("revoke")
        assert [http2.get(API + path).status_code for path in paths] == [200] * 3
    agent.exec("curl", "-fsS", f"{API}/user/x")
    agent.command("status", "--json", "--config", agent.config)
    agent.command("store", "verify", "--config", agent.config)
    assert running.terminate() == 0
    assert '"level":"TRACE"' in running.log.read_text()
    assert list(leaks(agent.folder, canaries(servers))) == []
