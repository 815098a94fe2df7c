"""One sidecar, several agents and users: a request gets the token of the user it names, or none."""

import asyncio
import base64
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from test_clients import FETCHERS, echoes
from world import API, CLIENTS, CONSENT, PLAIN, SECRETS, SERVICE, free_port

RESEARCHER, WRITER = SECRETS["RESEARCHER_SECRET"], SECRETS["WRITER_SECRET"]
AGENTS = [
    {"name": "researcher", "secret": "${RESEARCHER_SECRET}", "users": ["alice", "bob"]},
    {"name": "writer", "secret": "${WRITER_SECRET}", "users": ["*"], "providers": ["main"]},
]
ROUTES = [
    {"host": "api.test", "paths": ["/service/**"], "provider": "service"},
    {"host": "api.test", "provider": "main"},
    {"host": "plain.test:80", "paths": ["/service/**"], "provider": "service", "plaintext": True},
    {"host": "plain.test:80", "provider": "main", "plaintext": True},
]


@pytest.fixture
def shared(sidebearer):
    """A sidecar for two agents; each user's token is of the provider's user of the same name."""
    agent = sidebearer(providers={"main": CONSENT, "service": SERVICE}, routes=ROUTES, agents=AGENTS)
    for user in ("alice", "bob"):
        agent.connect("main", user, client="app")
    return agent.run()


def basic(user, secret=RESEARCHER):
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()


def client(running, user, secret=RESEARCHER, kind=httpx.Client, **options):
    proxy = httpx.Proxy(f"http://{running.address}", auth=(user, secret))
    return kind(proxy=proxy, verify=running.trust(), trust_env=False, timeout=30, **options)


class Line:
    """One connection to the proxy, on which a test says what it likes."""

    def __init__(self, running):
        host, port = running.address.rsplit(":", 1)
        self.stream = socket.create_connection((host, int(port)), timeout=30)

    def ask(self, target, host, *headers, method="GET"):
        head = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
        self.stream.sendall("\r\n".join([*head, "", ""]).encode())
        return self.answer()

    def answer(self):
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._more()
        head, _, body = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = httpx.Headers([line.split(": ", 1) for line in lines])
        if headers.get("transfer-encoding") == "chunked":
            while not body.endswith(b"0\r\n\r\n"):
                body += self._more()
            body = b"".join(body.split(b"\r\n")[1::2])
        while len(body) < int(headers.get("content-length", 0)):
            body += self._more()
        return int(status.split()[1]), headers, body

    def _more(self):
        piece = self.stream.recv(65536)
        assert piece, "the proxy hung up"
        return piece

    def plain(self, path, *headers):
        return self.ask(PLAIN + path, "plain.test", *headers)


def problem(answer):
    status, headers, body = answer
    assert headers["content-type"] == "application/problem+json"
    return status, json.loads(body)["code"]


@pytest.mark.parametrize("http2", [False, True])
def test_users_that_ask_at_the_same_time_never_get_one_anothers_token(shared, http2):
    """RTY-034"""
    users = ["alice", "bob"] * 20

    async def ask():
        async with client(shared, "alice", kind=httpx.AsyncClient, http2=http2) as alice:
            async with client(shared, "bob", WRITER, kind=httpx.AsyncClient, http2=http2) as bob:
                return await asyncio.gather(*({"alice": alice, "bob": bob}[user].get(f"{API}/echo") for user in users))

    # In a thread of its own: beside Playwright's, there can be no other loop in this one.
    with ThreadPoolExecutor(1) as pool:
        answers = [answer.json() for answer in pool.submit(asyncio.run, ask()).result()]
    assert [answer["sub"] for answer in answers] == users
    assert len({answer["token"] for answer in answers}) == 2


def test_one_users_revoked_token_costs_the_other_nothing(shared, servers):
    """RTY-034"""
    with client(shared, "alice") as alice, client(shared, "bob") as bob:
        alice.get(f"{API}/echo")
        servers.tell("revoke")
        assert alice.get(f"{API}/echo").json()["sub"] == "alice"
        before = servers.granted("refresh_token")
        assert bob.get(f"{API}/echo").json()["sub"] == "bob"
    assert servers.granted("refresh_token") == before + 1


def test_a_connection_kept_alive_may_change_its_user_with_each_request(shared):
    """LST-009"""
    line = Line(shared)
    for user in ("alice", "bob", "alice", "alice", "bob"):
        status, _, body = line.plain("/echo", f"Proxy-Authorization: {basic(user)}")
        assert (status, json.loads(body)["sub"]) == (200, user)
    assert problem(line.plain("/echo")) == (407, "proxy_authentication_required")
    assert json.loads(line.plain("/echo", f"Proxy-Authorization: {basic('bob', WRITER)}")[2])["sub"] == "bob"


def test_a_tunnel_is_its_users_whatever_the_requests_inside_claim(shared):
    """LST-010, LST-012, LST-013"""
    line = Line(shared)
    status, _, _ = line.ask("api.test:443", "api.test:443", f"Proxy-Authorization: {basic('alice')}", method="CONNECT")
    assert status == 200
    line.stream = shared.trust().wrap_socket(line.stream, server_hostname="api.test")
    for claim in ("Proxy-Authorization: " + basic("bob"), "Proxy-Authorization: Basic x", "X-Sidebearer-User: bob", "Sidebearer-User: bob"):
        status, _, body = line.ask("/echo", "api.test", claim)
        assert (status, json.loads(body)["sub"]) == (200, "alice")
        assert "proxy-authorization" not in json.loads(body)["headers"]


WRONG = {
    "nothing": [],
    "another secret": [basic("alice", RESEARCHER[::-1])],
    "a secret cut short": [basic("alice", RESEARCHER[:-1])],
    "no secret": [basic("alice", "")],
    "no colon": ["Basic " + base64.b64encode(b"alice").decode()],
    "another scheme": [f"Bearer {RESEARCHER}"],
    "no base64": ["Basic ***"],
    "far too much": ["Basic " + "A" * 30_000],
    "two at once": [basic("alice"), basic("bob")],
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG.keys())
def test_whoever_does_not_prove_who_they_are_is_asked_to_and_reaches_nothing(shared, servers, values):
    """LST-008"""
    headers = [f"Proxy-Authorization: {value}" for value in values]
    for answer in (Line(shared).plain("/echo", *headers), Line(shared).ask("api.test:443", "api.test:443", *headers, method="CONNECT")):
        assert problem(answer) == (407, "proxy_authentication_required")
        assert answer[1]["proxy-authenticate"] == 'Basic realm="sidebearer"'
    assert servers.report()["api"]["requests"] == 0


def test_hosts_without_a_route_need_credentials_as_well(shared):
    """LST-008: an open proxy for everyone else would be one for attackers."""
    answer = Line(shared).ask("stranger.test:443", "stranger.test:443", method="CONNECT")
    assert problem(answer) == (407, "proxy_authentication_required")


def test_an_agent_acts_for_no_user_and_with_no_provider_beyond_its_own(shared, servers):
    plain = lambda path, *who: problem(Line(shared).plain(path, f"Proxy-Authorization: {basic(*who)}"))
    assert plain("/echo", "carol") == (403, "user_not_allowed")
    assert plain("/service/x", "carol") == (403, "user_not_allowed")
    assert plain("/service/x", "alice", WRITER) == (403, "provider_not_allowed")
    # Anyone, for the writer; she has not connected yet.
    assert plain("/echo", "carol", WRITER) == (403, "not_connected")
    assert servers.report()["api"]["requests"] == 0
    with client(shared, "alice") as researcher:
        assert researcher.get(f"{API}/service/x").status_code == 200
    with client(shared, "alice", WRITER) as writer:
        assert writer.get(f"{API}/service/x").json()["code"] == "provider_not_allowed"
    with client(shared, "carol") as researcher, pytest.raises(httpx.ProxyError, match="403"):
        researcher.get(f"{API}/echo")


@pytest.mark.parametrize("command", [command for command, _ in FETCHERS.values()], ids=FETCHERS.keys())
def test_clients_send_the_credentials_of_their_proxy_url(shared, command):
    for user in ("alice", "bob"):
        assert [echo["sub"] for echo in echoes(as_user(shared, user, *command))] == [user]


def test_git_sends_the_credentials_of_its_proxy_url(shared):
    as_user(shared, "bob", "git", "clone", "-q", f"{API}/git/notes.git", "clone")
    assert (shared.sidebearer.folder / "clone/README").read_text() == "cloned over HTTPS\n"


def test_a_client_that_sends_no_credentials_has_a_listener_of_its_own(sidebearer):
    """LST-013: Java never sends those of a proxy URL. `env` prints no secret for it."""
    ports = {user: free_port() for user in ("alice", "bob")}
    listen = [f"127.0.0.1:{free_port()}", *({"address": f"127.0.0.1:{port}", "user": user} for user, port in ports.items())]
    agent = sidebearer(providers={"main": CONSENT}, agents=AGENTS, listen=listen)
    for user in ports:
        agent.connect("main", user, client="app")
    agent.run()
    for user in ports:
        variables = agent.command("env", "--config", agent.config, "--user", user).stdout
        assert RESEARCHER not in variables and WRITER not in variables
        # The variables alone: the program that reads them has no line to read, and asks three times at once.
        java = ["java", CLIENTS / "Client.java", *[f"{API}/echo"] * 2]
        said = agent.outside("sh", "-c", 'eval "$0"; exec "$@" </dev/null', variables, *map(str, java))
        assert [echo["sub"] for echo in echoes(said)] == [user] * 3


def as_user(running, user, *command):
    variables = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS")
    environment = dict.fromkeys(variables, str(running.sidebearer.ca))
    environment |= {"HTTPS_PROXY": f"http://{user}:{RESEARCHER}@{running.address}", "NODE_USE_ENV_PROXY": "1"}
    return running.sidebearer.outside(*command, **environment)


def test_each_user_connects_with_the_link_of_their_own_request(sidebearer, person):
    """LST-009: whoever consents, the token goes to the user that the link is for."""
    running = sidebearer(providers={"main": CONSENT}, agents=AGENTS).run()
    for user in ("alice", "bob"):
        with client(running, user) as agent:
            link = agent.get(f"{API}/echo").json()["connect_url"]
            somebody = person()
            somebody.open(link)
            assert user in somebody.text()
            somebody.press("Continue to Main")
            somebody.consent(f"{user}-at-main")
            somebody.sees("Main is connected")
            assert agent.get(f"{API}/echo").json()["sub"] == f"{user}-at-main"
    alice = person()
    alice.sees_state(running, "connected", user="bob")
    alice.picture("dashboard-two-users")
    alice.disconnects(running, user="bob")
    with client(running, "alice") as hers, client(running, "bob") as his:
        assert hers.get(f"{API}/echo").json()["sub"] == "alice-at-main"
        assert his.get(f"{API}/echo").json()["code"] == "not_connected"
