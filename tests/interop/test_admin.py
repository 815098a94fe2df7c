"""The admin listener: pages and an API for those who run it, and nothing for pages and programs that should not reach it."""

import json
import re
import socket

import httpx
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from world import CONSENT, SECRETS, SERVICE, wait_for

TOKEN = SECRETS["ADMIN_TOKEN"]
PATHS = [
    "/", "/events", "/connect/main?user=default", "/connect/main?ticket=x", "/callback/main?code=c&state=s", "/disconnect",
    "/v1/connections", "/v1/connections/main/default", "/v1/openapi.json", "/style.css", "/live.js", "/favicon.ico", "/nothing-here",
]
STATES = {"connected", "not_connected", "reauthorize", "fix_configuration", "on_demand", "unreadable"}


@pytest.fixture
def admin(sidebearer):
    """Runs a sidecar, and calls its admin listener."""
    opened = []

    def run(**settings):
        settings = {"providers": {"main": CONSENT}} | settings
        running = sidebearer(**settings).run()
        opened.append(httpx.Client(base_url=running.admin, trust_env=False, timeout=60))
        return running, opened[-1]

    yield run
    for client in opened:
        client.close()


def ask(client, method, path, **options):
    """An answer's head: some bodies never end."""
    with client.stream(method, path, **options) as answer:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.read()
        return answer


# What browsers are kept from.


STRANGERS = [
    "evil.test", "evil.test:{port}", "127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.1.evil.test:{port}", "127.0.0.2:{port}",
    "x@127.0.0.1:{port}", "0.0.0.0:{port}",
]


@pytest.mark.parametrize("host", STRANGERS)
def test_a_request_in_another_hosts_name_is_refused_on_every_path(admin, servers, host):
    """LST-004, OAU-008: a page whose name was pointed at this machine learns nothing and changes nothing."""
    running, client = admin()
    host = host.format(port=running.admin.rsplit(":", 1)[1])
    for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT"):
        for path in PATHS:
            answer = ask(client, method, path, headers={"host": host})
            assert answer.status_code in ({400, 403} if "@" in host else {403}), (method, path, answer.status_code)
            assert "location" not in answer.headers and "set-cookie" not in answer.headers


def test_the_names_of_this_machine_are_answered(admin):
    running, client = admin()
    port = running.admin.rsplit(":", 1)[1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", f"LocalHost:{port}"):
        assert client.get("/v1/connections", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.test", "http://127.0.0.1:1", "null", "https://127.0.0.1:{port}", "http://127.0.0.1"])
def test_a_request_of_a_foreign_page_is_refused_on_every_path(admin, origin):
    """LST-005, LST-021"""
    running, client = admin()
    origin = origin.format(port=running.admin.rsplit(":", 1)[1])
    for method in ("GET", "POST", "DELETE"):
        for path in PATHS:
            answer = ask(client, method, path, headers={"origin": origin, "sec-fetch-site": "cross-site"})
            assert answer.status_code == 403, (method, path, answer.status_code)


def test_no_answer_lets_other_pages_in_stays_in_a_cache_or_tells_where_one_came_from(admin):
    """LST-005, OAU-018"""
    running, client = admin()
    for method in ("GET", "POST", "OPTIONS", "DELETE"):
        for path in PATHS:
            headers = ask(client, method, path).headers
            assert not [name for name in headers if name.startswith("access-control-")], (method, path)
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy, (method, path, policy)
            assert "unsafe" not in policy
            assert "no-store" in headers["cache-control"], (method, path)
            assert headers["referrer-policy"] == "no-referrer", (method, path)
            assert headers["x-content-type-options"] == "nosniff", (method, path)
            assert headers["x-frame-options"] == "DENY", (method, path)


FETCH = """async ([url, options]) => {
    try { const answer = await fetch(url, options); return [answer.type, answer.status, await answer.text()]; }
    catch (error) { return [String(error)]; }
}"""


def test_a_page_elsewhere_can_neither_read_nor_change_nor_frame_anything(admin, servers, person):
    """LST-004, LST-005, OAU-018"""
    running, client = admin()
    victim = person()
    victim.connect(running)
    victim.open("https://app.test/")
    api, proxy = f"{running.admin}/v1/connections", f"http://{running.address}"
    for url in (api, running.admin, f"{running.admin}/v1/openapi.json", f"{running.admin}/events", proxy, f"{proxy}/http://plain.test/"):
        assert victim.page.evaluate(FETCH, [url, {}]) == ["TypeError: Failed to fetch"]
    wish, unasked = json.dumps({"provider": "main", "user": "default"}), {"method": "POST", "mode": "no-cors", "credentials": "include"}
    writes = [
        (f"{api}/main/default", {"method": "DELETE"}),
        (api, {"method": "POST", "body": wish}),
        (api, unasked | {"body": wish}),
        (f"{running.admin}/disconnect", unasked | {"body": "provider=main&user=default"}),
    ]
    for url, options in writes:
        victim.page.evaluate(FETCH, [url, options])
    victim.page.evaluate("""(url) => {
        document.body.innerHTML = `<form method="post" action="${url}">
            <input name="provider" value="main"><input name="user" value="default"><button>Win a prize</button></form>`;
    }""", f"{running.admin}/disconnect")
    victim.press("Win a prize")
    victim.page.wait_for_url(f"{running.admin}/disconnect")
    assert client.get("/v1/connections").json()["connections"][0]["state"] == "connected"
    assert running.get().status_code == 200
    assert servers.report()["revokedGrants"] == 0


# Done when there is something in the frame, be it the browser's own page.
FRAME = """(url) => new Promise((done) => {
    const frame = document.createElement('iframe');
    frame.onload = () => done();
    frame.src = url;
    document.body.replaceChildren(frame);
})"""


@pytest.mark.parametrize("path", ["/", "/connect/main?user=default"])
def test_no_page_can_be_framed(admin, person, path):
    """OAU-018"""
    running, _ = admin()
    victim = person()
    victim.open("https://app.test/")
    victim.page.evaluate(FRAME, running.admin + path)
    # The browser complains of the refusal that this is about.
    wait_for(lambda: victim.page.wait_for_timeout(10) or victim.violations, "the refusal to be told")
    [frame] = victim.page.frames[1:]
    assert frame.get_by_role("button").count() == 0
    assert frame.get_by_role("heading", level=1, name=re.compile("Connect|Sidebearer")).count() == 0
    victim.violations.clear()


def field(page, name):
    return re.search(f'name="{name}" value="([^"]*)"', page)[1]


def test_a_form_counts_only_with_the_field_and_the_cookie_of_the_same_browser(admin, servers):
    """LST-021"""
    running, mine = admin()
    with httpx.Client(base_url=running.admin, trust_env=False, timeout=60) as theirs:
        page = "/connect/main?user=default"
        csrf, other = (field(somebody.get(page).text, "csrf") for somebody in (mine, theirs))
        form = {"user": "default", "scope": ""}
        assert mine.post("/connect/main", data=form).status_code == 403
        assert mine.post("/connect/main", data=form | {"csrf": ""}).status_code == 403
        assert mine.post("/connect/main", data=form | {"csrf": other}).status_code == 403
        nobody = httpx.post(f"{running.admin}/connect/main", data=form | {"csrf": csrf}, trust_env=False, timeout=60)
        assert nobody.status_code == 403
        assert mine.get(page.replace("/connect/main?", "/disconnect?"), params={"provider": "main", "csrf": csrf}).status_code in {404, 405}
        begun = mine.post("/connect/main", data=form | {"csrf": csrf})
        assert (begun.status_code, begun.headers["location"].startswith("https://auth.test/auth?")) == (303, True)


def test_the_cookie_is_for_this_listener_alone_and_no_script_reads_it(admin):
    """OAU-002"""
    running, client = admin()
    cookie = client.get("/connect/main?user=default").headers["set-cookie"]
    name, *attributes = [part.strip() for part in cookie.split(";")]
    assert name.startswith("sidebearer_browser=") and len(name.split("=", 1)[1]) >= 22
    assert {"httponly", "samesite=lax", "path=/"} <= {attribute.lower() for attribute in attributes}
    assert not [attribute for attribute in attributes if attribute.lower().startswith("domain")]


def test_the_admin_listener_cannot_be_reached_through_the_proxy(admin):
    """LST-002, LST-007: what an agent may not do by itself, it may not do in the proxy's name."""
    running, _ = admin()
    port = running.admin.rsplit(":", 1)[1]
    for name in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "127.0.0.2", "[::ffff:127.0.0.1]"):
        for request in (f"GET http://{name}:{port}/v1/connections", f"CONNECT {name}:{port}"):
            answer = said_to(running.address, f"{request} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n")
            assert int(answer.split()[1]) in {403, 502, 508}, (request, answer)
            assert b"connections" not in answer


def said_to(address, text):
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=60) as stream:
        stream.sendall(text.encode())
        return stream.recv(65536)


TRICKS = [
    "//v1/connections/main/default", "/v1/../v1/connections/main/default", "/v1/connections/main/default/",
    "/V1/connections/main/default", "/v1/connections//default", "/x/../v1/connections/main/default",
]


def test_paths_are_taken_literally(admin):
    """LST-021"""
    running, client = admin()
    agent = running.sidebearer
    agent.connect("main", client="app")
    for path in TRICKS:
        address = running.admin.removeprefix("http://")
        answer = said_to(address, f"DELETE {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
        assert int(answer.split()[1]) in {400, 404, 405}, path
    assert agent.connection("main")["state"] == "connected"


# The admin token.


def test_with_an_admin_token_everything_but_a_users_own_way_asks_for_it(admin, servers, person):
    """LST-021"""
    running, client = admin(admin_token="${ADMIN_TOKEN}")
    guarded = ["/", "/events", "/connect/main?user=default", "/v1/connections", "/v1/connections/main/default", "/v1/openapi.json"]
    for path in guarded:
        answer = ask(client, "DELETE" if path.count("/") == 4 else "GET", path)
        assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, 'Basic realm="sidebearer"'), path
    for wrong in (f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Basic Og==", "Bearer"):
        assert client.get("/v1/connections", headers={"authorization": wrong}).status_code == 401
    assert client.get("/v1/connections", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/v1/connections", auth=("anyone", TOKEN)).status_code == 200
    operator = person(http_credentials={"username": "me", "password": TOKEN})
    operator.sees_state(running, "not_connected")
    # A user has no admin token: the link of their agent's request is enough, and good for nothing else.
    user = person()
    link = running.get().json()["connect_url"]
    # Not by the browser: without a window to ask for a password in, Chromium shows no page for a 401.
    assert client.get(link.split("?")[0] + "?user=default").status_code == 401
    user.open(link)
    user.press("Continue to Main")
    user.consent()
    user.sees("Main is connected")
    assert TOKEN not in link
    assert running.get().status_code == 200
    assert client.get("/").status_code == 401


def test_a_users_link_cannot_be_turned_into_another_users(admin, person):
    running, client = admin(admin_token="${ADMIN_TOKEN}")
    link = running.get().json()["connect_url"]
    for changed in (link + "&user=bob", link[:-1], link + "A", link.replace("ticket=", "ticket=A")):
        answer = client.get(changed)
        assert answer.status_code in {400, 401, 403, 404} or ("bob" not in answer.text and answer.status_code == 200), changed
    assert client.get(link.replace("/connect/main", "/connect/other")).status_code in {401, 403, 404}


# The JSON API.


class Contract:
    """What openapi.json promises."""

    def __init__(self, document):
        validate(document)
        self.document = document
        self.registry = Registry().with_resource("urn:api", Resource.from_contents(document, default_specification=DRAFT202012))

    def keeps(self, answer, method, path):
        operation = self.document["paths"][path][method.lower()]
        responses = operation["responses"]
        promised = responses.get(str(answer.status_code)) or responses.get(f"{answer.status_code // 100}XX") or responses["default"]
        if "$ref" in promised:
            promised = self.document["components"]["responses"][promised["$ref"].rsplit("/", 1)[1]]
        kind = answer.headers["content-type"].split(";")[0]
        schema = absolute(promised["content"][kind]["schema"])
        OAS31Validator(schema, registry=self.registry).validate(answer.json())
        return answer


def absolute(schema):
    return json.loads(json.dumps(schema).replace('"$ref": "#/', '"$ref": "urn:api#/'))


def test_the_api_answers_as_its_openapi_document_says(admin, servers, person):
    running, client = admin(providers={"main": CONSENT, "service": SERVICE}, return_to=["https://app.test/"])
    api = Contract(client.get("/v1/openapi.json").json())
    listed = api.keeps(client.get("/v1/connections"), "GET", "/v1/connections").json()["connections"]
    assert {entry["provider"] for entry in listed} >= {"main"}
    assert {entry["state"] for entry in listed} <= STATES
    wish = {"provider": "main", "user": "carol", "scopes": ["write"], "return_to": "https://app.test/done"}
    begun = api.keeps(client.post("/v1/connections", json=wish), "POST", "/v1/connections")
    assert begun.status_code == 201
    carol = person()
    carol.open(begun.json()["connect_url"])
    carol.press("Continue to Main")
    carol.consent("carol")
    carol.sees("The application")
    assert "integration=connected" in carol.page.url
    [hers] = [entry for entry in client.get("/v1/connections").json()["connections"] if entry["user"] == "carol"]
    assert (hers["provider"], hers["title"], hers["state"]) == ("main", "Main", "connected")
    assert set(hers["scopes"]) == {"read", "write", "offline_access"}
    gone = api.keeps(client.delete("/v1/connections/main/carol"), "DELETE", "/v1/connections/{provider}/{user}")
    assert (gone.status_code, gone.json()["disconnected"], gone.json()["revoked"]) == (200, True, True)
    assert servers.report()["revokedGrants"] == 1
    again = api.keeps(client.delete("/v1/connections/main/carol"), "DELETE", "/v1/connections/{provider}/{user}")
    assert again.status_code == 404


MISTAKES = {
    "another provider": {"provider": "nope", "user": "carol"},
    "no provider": {"user": "carol"},
    "a provider without consent": {"provider": "service", "user": "carol"},
    "a page that is not allowed": {"provider": "main", "user": "carol", "return_to": "https://evil.test/"},
    "an unknown member": {"provider": "main", "user": "carol", "scope": "read"},
    "a list": [],
}


@pytest.mark.parametrize("body", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wish_that_makes_no_sense_is_a_problem_with_a_code(admin, body):
    running, client = admin(providers={"main": CONSENT, "service": SERVICE}, return_to=["https://app.test/"])
    api = Contract(client.get("/v1/openapi.json").json())
    answer = api.keeps(client.post("/v1/connections", json=body), "POST", "/v1/connections")
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] and answer.json()["status"] == answer.status_code


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_the_api_takes_json_alone(admin, kind):
    """LST-005: what a page elsewhere can send without asking first is not taken."""
    running, client = admin()
    body = json.dumps({"provider": "main", "user": "carol"})
    answer = client.post("/v1/connections", content=body, headers={"content-type": kind} if kind else {})
    assert 400 <= answer.status_code < 500
    assert answer.json()["code"]


def test_events_come_as_they_happen_and_hold_no_secret(admin, servers, person):
    """LEK-004"""
    running, client = admin()
    with client.stream("GET", "/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        person().connect(running)
        assert running.get("/echo?key=canary-in-a-query").status_code == 200
        moments = []
        for line in stream.iter_lines():
            if line.startswith("data:"):
                moments.append(json.loads(line.removeprefix("data:")))
                if moments[-1]["kind"] == "request":
                    break
    assert {"at", "kind", "level", "what", "outcome", "note", "route", "took"} <= moments[-1].keys()
    assert {moment["kind"] for moment in moments} <= {"request", "token", "consent"}
    assert (moments[-1]["outcome"], moments[-1]["level"]) == ("200", "good")
    assert "/echo" in moments[-1]["what"]
    assert [moment for moment in moments if moment["outcome"] == "connected"]
    text = json.dumps(moments)
    assert not [secret for secret in [*servers.issued(), "canary-in-a-query"] if secret in text]


def test_without_an_admin_listener_there_is_none(sidebearer):
    running = sidebearer(providers={"main": CONSENT}, admin="off").run()
    assert running.admin is None
    answer = running.get()
    assert (answer.status_code, answer.json()["code"]) == (403, "not_connected")
    assert "sidebearer connect main" in answer.json()["hint"]
