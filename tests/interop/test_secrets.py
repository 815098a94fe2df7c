"""No file and no output of the sidecar ever holds a token or a secret, at the most talkative level."""

from urllib.parse import parse_qs, urlsplit

import httpx

from leaks import canaries, leaks
from world import API, CONSENT, ODD, SECRETS, SERVICE, USER, wait_for


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


def test_no_consent_leaves_a_token_a_code_or_a_secret_behind(sidebearer, servers, person):
    """LEK-001, LEK-003, LEK-004, LST-012: in the browser, on the command line and by a device's code."""
    vault = CONSENT | {"client_id": "vault", "client_secret": "${VAULT_SECRET}", "client_auth": "client_secret_basic"}
    agents = [{"name": "researcher", "secret": "${RESEARCHER_SECRET}", "users": ["alice"]}]
    agent = sidebearer(providers={"main": vault}, agents=agents, admin_token="${ADMIN_TOKEN}")
    agent.environment["RUST_LOG"] = "trace"
    running = agent.run()
    operator = person(http_credentials={"username": "operator", "password": SECRETS["ADMIN_TOKEN"]})
    proxy = httpx.Proxy(f"http://{running.address}", auth=("alice", SECRETS["RESEARCHER_SECRET"]))
    patient = {"trust_env": False, "timeout": 60}
    admin = httpx.Client(base_url=running.admin, auth=("operator", SECRETS["ADMIN_TOKEN"]), **patient)
    seen = []
    with httpx.Client(proxy=proxy, verify=running.trust(), **patient) as client, admin, admin.stream("GET", "/events") as events:
        link = client.get(f"{API}/echo").json()["connect_url"]
        operator.open(link)
        operator.press("Continue to Main")
        operator.refuse()
        operator.sees("Main is not connected")
        operator.connect(running, user="alice")
        assert client.get(f"{API}/echo").status_code == 200
        servers.tell("revoke")
        assert client.get(f"{API}/echo").status_code == 200
        assert client.get(f"{API}/needs/write").status_code == 403
        for path in ("/", "/v1/connections", link):
            seen.append(admin.get(path).text)
        by_paste(agent, servers, operator)
        by_device(agent, operator)
        agent.command("status", "--json", "--config", agent.config)
        agent.command("disconnect", "main", "--user", "alice", "--config", agent.config)
        wait_for(lambda: client.get(f"{API}/echo").status_code == 403, "the connection to be gone")
        for line in events.iter_lines():
            seen.append(line)
            if '"403"' in line and "/echo" in line and sum("/echo" in one for one in seen) > 3:
                break
    assert running.terminate() == 0
    assert '"level":"TRACE"' in running.log.read_text()
    cookies = [cookie["value"] for cookie in operator.context.cookies(running.admin)]
    assert cookies
    secrets = [*canaries(servers), *cookies]
    assert list(leaks(agent.folder, secrets)) == []
    assert [secret for secret in secrets if secret in "\n".join(seen)] == []
    # What a running sidecar started is known to that browser alone; the command line prints its own to be opened.
    states = [parse_qs(urlsplit(url).query)["state"][0] for url in operator.requested if "/auth?" in url][:2]
    assert len(states) == 2 and not [state for state in states if state in running.log.read_text()]


def by_paste(agent, servers, somebody):
    servers.tell("set", pause=True)
    connecting = agent.start("connect", "main", "--user", "alice", "--no-browser", "--config", agent.config)
    somebody.open(connecting.says("open"))
    somebody.consent()
    connecting.type(somebody.way_back())
    assert connecting.ends()[0] == 0


def by_device(agent, somebody):
    connecting = agent.start("connect", "main", "--user", "alice", "--device", "--no-browser", "--config", agent.config)
    somebody.open(connecting.says("open"))
    somebody.enter_code(connecting.says("code"))
    somebody.press("It does")
    somebody.consent()
    assert connecting.ends()[0] == 0
