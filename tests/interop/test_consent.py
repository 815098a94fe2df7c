"""Users connect an account in a real browser, with a real provider, and the agent's requests go on."""

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from world import CONSENT, wait_for


@pytest.fixture
def consent(sidebearer):
    """Runs a sidecar whose provider waits for its user."""
    def run(settings={}, **provider):
        return sidebearer(providers={"main": CONSENT | provider}, **settings).run()

    return run


def calls(servers):
    return servers.report()["token"]["calls"]


def start(somebody, running, more=""):
    somebody.open(f"{running.admin}/connect/main?user=default{more}")
    somebody.sees("Connect Main")
    somebody.press("Continue to Main")


def callback(somebody, servers, running, more=""):
    """Consents, and stops where the provider would send the browser back."""
    servers.tell("set", pause=True)
    start(somebody, running, more)
    somebody.consent()
    return somebody.way_back()


def is_refused(somebody, url, code):
    assert somebody.open(url).status == 400
    somebody.sees("Main is not connected")
    somebody.sees_code(code)


# The whole flow.


def test_a_user_connects_on_the_dashboard_and_the_agents_next_request_succeeds(consent, servers, person):
    running, alice = consent(), person()
    assert running.get().status_code == 403
    alice.sees_state(running, "not_connected")
    alice.picture("dashboard-before")
    alice.clicks_in_row(running, "Connect")
    alice.sees("Connect Main")
    alice.picture("connect")
    alice.press("Continue to Main")
    alice.consent("alice")
    alice.sees("Main is connected")
    alice.picture("connected")
    answer = running.get()
    assert (answer.status_code, answer.json()["sub"]) == (200, "alice")
    alice.sees_state(running, "connected")
    alice.picture("dashboard-after")
    assert calls(servers) == {"authorization_code": 1}
    assert alice.hosts() == {"127.0.0.1", "auth.test"}


def test_the_whole_flow_works_without_scripts(consent, person):
    running, alice = consent(), person(java_script_enabled=False)
    alice.clicks_in_row(running, "Connect")
    alice.press("Continue to Main")
    alice.consent()
    alice.sees("Main is connected")
    assert running.get().status_code == 200
    alice.disconnects(running)
    expect(alice.row()).to_have_attribute("data-state", "not_connected")
    assert running.get().status_code == 403


def test_the_whole_flow_works_with_the_keyboard_alone(consent, person):
    running, alice = consent(), person()
    alice.open(f"{running.admin}/")
    for stop in ("Connect", "Continue to Main"):
        alice.tab_to(stop)
        alice.page.keyboard.press("Enter")
        alice.page.wait_for_url("**/connect/*" if stop == "Connect" else "https://auth.test/**")
    alice.consent()
    alice.sees("Main is connected")
    alice.open(f"{running.admin}/")
    alice.tab_to("Disconnect")
    alice.page.keyboard.press("Enter")
    expect(alice.row()).to_have_attribute("data-state", "not_connected")


def test_the_provider_gets_a_pkce_challenge_a_state_and_the_configured_scopes_and_parameters(consent, servers, person):
    """OAU-007, OAU-008"""
    running, alice = consent(), person()
    servers.tell("set", pause=True)
    start(alice, running)
    alice.consent()
    asked = parse_qs(urlsplit(next(url for url in alice.requested if "/auth?" in url)).query)
    assert sorted(asked["scope"][0].split()) == ["offline_access", "read"]
    assert (asked["response_type"], asked["prompt"], asked["code_challenge_method"]) == (["code"], ["consent"], ["S256"])
    assert asked["redirect_uri"] == [f"{running.admin}/callback/main"]
    assert len(asked["state"][0]) >= 22
    alice.open(alice.way_back())
    alice.sees("Main is connected")
    form = servers.report()["lastTokenRequest"]["form"]
    assert form["redirect_uri"] == f"{running.admin}/callback/main"
    assert 43 <= len(form["code_verifier"]) <= 128


def test_a_confidential_client_proves_itself_when_it_exchanges_the_code(consent, servers, person):
    running = consent(client_id="vault", client_secret="${VAULT_SECRET}", client_auth="client_secret_basic")
    person().connect(running)
    request = servers.report()["lastTokenRequest"]
    assert (request["authorization"], request["secretInBody"]) == ("Basic", False)
    assert running.get().status_code == 200


def test_a_provider_that_sends_its_users_to_a_login_page_elsewhere_is_reached(consent, servers, person):
    servers.tell("set", detour=True)
    running, alice = consent(), person()
    alice.connect(running)
    assert "login.test" in alice.hosts()


def test_a_dashboard_opened_on_localhost_connects_as_well(consent, person):
    running, alice = consent(), person()
    alice.open(running.admin.replace("127.0.0.1", "localhost"))
    alice.page.get_by_text("Connect", exact=True).click()
    alice.press("Continue to Main")
    alice.consent()
    alice.sees("Main is connected")


# Who may finish it, and how often.


def test_a_consent_that_is_finished_twice_says_so_and_costs_one_exchange(consent, servers, person):
    """OAU-006"""
    running, alice = consent(), person()
    url = callback(alice, servers, running)
    alice.open(url)
    alice.sees("Main is connected")
    assert alice.open(url).status == 200
    alice.sees("Main is already connected")
    alice.picture("already-connected")
    mallory = person()
    assert mallory.open(url).status == 400
    mallory.sees("Main is not connected")
    assert calls(servers) == {"authorization_code": 1}


def test_callbacks_that_race_cost_one_exchange(consent, servers, person):
    """OAU-001, OAU-006"""
    running, alice = consent(), person()
    url = callback(alice, servers, running)
    cookies = {cookie["name"]: cookie["value"] for cookie in alice.context.cookies(running.admin)}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.get(url, cookies=cookies, trust_env=False, timeout=60), range(8)))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers if answer.status_code != 200]
    assert calls(servers) == {"authorization_code": 1}
    assert running.get().status_code == 200


def test_two_consents_at_a_time_in_one_browser_both_end_well(consent, servers, person):
    running, alice = consent(), person()
    first, second = callback(alice, servers, running), callback(alice, servers, running)
    for url in (first, second):
        alice.open(url)
        alice.sees("Main is connected")
    assert calls(servers) == {"authorization_code": 2}


def test_a_consent_that_another_browser_started_is_not_finished(consent, servers, person):
    """OAU-002: an attacker's account must not become the victim's."""
    running, mallory, victim = consent(), person(), person()
    url = callback(mallory, servers, running)
    is_refused(victim, url, "other_browser")
    start(victim, running)
    is_refused(victim, callback(mallory, servers, running), "other_browser")
    assert calls(servers) == {}
    assert running.get().status_code == 403


def test_a_callback_with_a_state_that_nobody_started_is_refused_and_ruins_nothing(consent, servers, person):
    """OAU-001"""
    running, alice = consent(), person()
    url = httpx.URL(callback(alice, servers, running))
    state = url.params["state"]
    changed = state[:-1] + ("A" if state[-1] != "A" else "B")
    for wrong in ("", "x", changed, state + "A", state * 100):
        is_refused(alice, str(url.copy_set_param("state", wrong)), "state_unknown")
    is_refused(alice, str(url.copy_remove_param("state")), "state_unknown")
    assert calls(servers) == {}
    alice.open(str(url))
    alice.sees("Main is connected")


def test_a_callback_at_another_providers_path_exchanges_no_code(sidebearer, servers, person):
    """OAU-004: whom the code was asked from is part of the state."""
    running, alice = sidebearer(providers={"main": CONSENT, "second": CONSENT}).run(), person()
    url = callback(alice, servers, running)
    assert alice.open(url.replace("/callback/main", "/callback/second")).status == 400
    assert calls(servers) == {}


IMPOSTORS = ["https://evil.test", "https://auth.test/", "https://AUTH.test", "https://auth.test:443", "http://auth.test"]


@pytest.mark.parametrize("iss", IMPOSTORS)
def test_an_answer_in_another_issuers_name_is_refused_before_the_code_is_sent(consent, servers, person, iss):
    """OAU-004"""
    running, alice = consent(), person()
    servers.tell("set", iss=iss)
    is_refused(alice, callback(alice, servers, running), "issuer_mismatch")
    assert calls(servers) == {}


def test_an_answer_in_nobodys_name_is_refused_when_the_provider_says_that_it_always_names_itself(consent, servers, person):
    """OAU-004"""
    running, alice = consent(), person()
    servers.tell("set", iss=None)
    is_refused(alice, callback(alice, servers, running), "issuer_missing")
    assert calls(servers) == {}


# What else can come of it.


def test_a_refusal_is_shown_as_text_and_says_what_to_do(consent, servers, person):
    """OAU-003"""
    said = "<img src=x onerror=alert(1)><b>no</b> \u202enever\u202c"
    servers.tell("set", refusal=said)
    running, alice = consent(), person()
    start(alice, running)
    alice.refuse()
    alice.sees("Main is not connected")
    alice.sees_code("access_denied")
    alice.picture("refused")
    assert "<img src=x onerror=alert(1)><b>no</b>" in alice.text()
    assert alice.page.locator("main img, main b").count() == 0
    assert "again" in alice.text()
    assert calls(servers) == {}
    assert running.get().json()["code"] == "not_connected"


def test_a_refusal_in_another_issuers_name_is_not_shown(consent, servers, person):
    """OAU-004"""
    servers.tell("set", refusal="call 0900-EVIL now", iss="https://evil.test")
    running, alice = consent(), person()
    start(alice, running)
    alice.refuse()
    alice.sees("Main is not connected")
    alice.sees_code("issuer_mismatch")
    assert "0900" not in alice.text()


def test_a_code_that_the_provider_does_not_take_leaves_the_user_unconnected(consent, servers, person):
    running, alice = consent(), person()
    url = httpx.URL(callback(alice, servers, running))
    is_refused(alice, str(url.copy_set_param("code", "made-up")), "exchange_failed")
    assert running.get().status_code == 403
    alice.sees_state(running, "not_connected")


# Where it starts and where it ends.


def test_the_link_in_the_agents_answer_opens_the_page_that_mends_it(consent, person):
    running, alice = consent(), person()
    answer = running.get()
    problem = answer.json()
    assert (answer.status_code, answer.headers["content-type"], problem["code"]) == (403, "application/problem+json", "not_connected")
    assert problem["connect_url"].startswith(f"{running.admin}/connect/main")
    assert problem["connect_url"] in problem["detail"]
    alice.open(problem["connect_url"])
    alice.press("Continue to Main")
    alice.consent()
    alice.sees("Main is connected")
    assert running.get().status_code == 200


def test_an_application_that_sent_its_user_gets_them_back(consent, servers, person):
    running, alice = consent({"return_to": ["https://app.test/settings/"]}), person()
    start(alice, running, "&return_to=https://app.test/settings/accounts?tab=1")
    alice.consent()
    alice.sees("The application")
    landed = httpx.URL(alice.page.url)
    assert (landed.path, landed.params["tab"], landed.params["integration"]) == ("/settings/accounts", "1", "connected")
    assert running.get().status_code == 200


ELSEWHERE = [
    "https://evil.test/", "https://app.test.evil.test/settings/", "https://app.test@evil.test/settings/", "https://app.test/other/",
    "https://app.test/settings/../other/", "https://app.test/settings/%2e%2e/other/", "https://app.test/settings",
    "http://app.test/settings/", "https://app.test:444/settings/", "//app.test/settings/", "javascript:alert(1)", "/settings/",
    "https:\\\\evil.test/settings/",
]


@pytest.mark.parametrize("page", ELSEWHERE)
def test_no_consent_ends_at_a_page_that_is_not_allowed(consent, servers, page):
    running = consent({"return_to": ["https://app.test/settings/"]})
    answer = httpx.get(f"{running.admin}/connect/main", params={"user": "default", "return_to": page}, trust_env=False, timeout=60)
    assert answer.status_code == 400, answer.text
    assert 'name="return_to"' not in answer.text


def links_in_the_log(running):
    return [event for event in running.events() if any("/connect/main" in str(value) for value in event.values())]


def test_requests_that_wait_for_their_user_go_on_after_the_consent_and_one_link_is_logged(consent, person):
    running, alice = consent(on_missing={"wait": "50s"}), person()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(running.get) for _ in range(3)]
        wait_for(lambda: links_in_the_log(running), "the link in the log")
        alice.open(f"{running.admin}/")
        link = alice.page.locator("#waiting a")
        expect(link).to_have_count(1)
        alice.picture("dashboard-waiting")
        link.click()
        alice.press("Continue to Main")
        alice.consent()
        alice.sees("Main is connected")
        assert [request.result(timeout=60).status_code for request in waiting] == [200] * 3
    assert len(links_in_the_log(running)) == 1


def test_a_request_that_waited_in_vain_is_told_where_to_connect(consent):
    running = consent(on_missing={"wait": "1s"})
    asked = time.monotonic()
    answer = running.get()
    # Not as long as others are waited for.
    assert 1 <= time.monotonic() - asked < 20
    assert (answer.status_code, answer.json()["code"]) == (403, "not_connected")
    assert "/connect/main" in answer.json()["connect_url"]


# A connection's life.


def test_a_connection_made_in_a_browser_outlives_its_access_token(consent, servers, person):
    """RTY-001"""
    running = consent()
    person().connect(running)
    assert running.get().status_code == 200
    servers.tell("revoke")
    assert running.get().status_code == 200
    assert calls(servers) == {"authorization_code": 1, "refresh_token": 1}


def test_a_user_who_connects_again_replaces_the_connection(consent, servers, person):
    running, alice = consent(), person()
    alice.connect(running)
    before = running.get().json()
    alice.clicks_in_row(running, "Reconnect")
    alice.sees("Connect Main")
    alice.press("Continue to Main")
    alice.consent()
    alice.sees("Main is connected")
    after = running.get().json()
    assert after["sub"] == "alice"
    assert after["token"] != before["token"]
    assert calls(servers) == {"authorization_code": 2}
    alice.open(f"{running.admin}/")
    assert alice.page.locator("tr[data-provider]").count() == 1


def test_access_that_was_taken_back_at_the_provider_is_mended_on_the_dashboard(consent, servers, person):
    """RTY-003, C15: until then the agent gets the API's own 401."""
    running, alice = consent(), person()
    alice.connect(running)
    servers.tell("revoke-connections")
    assert running.get().status_code == 401
    alice.sees_state(running, "reauthorize")
    alice.picture("dashboard-reauthorize")
    alice.clicks_in_row(running, "Reconnect")
    alice.press("Continue to Main")
    alice.consent()
    alice.sees("Main is connected")
    assert running.get().status_code == 200


def test_a_connection_that_died_is_asked_for_again_once_its_token_has_expired(consent, servers, person):
    """TOK-017, C18"""
    # Not used in its last 5 s (C16), so every request needs a new one.
    servers.tell("set", ttl=3)
    running, alice = consent(), person()
    alice.connect(running)
    assert running.get().status_code == 200
    servers.tell("revoke-connections")
    answer = running.get()
    assert (answer.status_code, answer.json()["code"]) == (403, "reauthorize")
    alice.open(answer.json()["connect_url"])
    alice.press("Continue to Main")
    alice.consent()
    alice.sees("Main is connected")
    assert running.get().status_code == 200


def test_disconnect_revokes_at_the_provider_and_the_next_request_is_told_to_connect(consent, servers, person):
    """TOK-038"""
    running, alice = consent(), person()
    before = set(servers.issued())
    alice.connect(running)
    assert running.get().status_code == 200
    tokens = [token for token in servers.issued() if token not in before and servers.active(token)]
    assert len(tokens) == 2
    alice.disconnects(running)
    expect(alice.row()).to_have_attribute("data-state", "not_connected")
    assert alice.page.url.split("?")[0] == f"{running.admin}/"
    alice.picture("dashboard-disconnected")
    assert [servers.active(token) for token in tokens] == [False, False]
    seen = servers.report()["api"]["requests"]
    answer = running.get()
    assert (answer.status_code, answer.json()["code"]) == (403, "not_connected")
    assert servers.report()["api"]["requests"] == seen


def test_an_api_that_wants_another_scope_comes_with_a_link_that_asks_for_all_of_them(consent, servers, person):
    """OAU-016, RTY-018"""
    running, alice = consent(), person()
    alice.connect(running)
    for scope, asked in (("write", {"offline_access", "read", "write"}), ("delete", {"delete", "offline_access", "read", "write"})):
        refused = running.get(f"/needs/{scope}")
        assert (refused.status_code, refused.text) == (403, f"this token is not for {scope}\n")
        alice.open(refused.headers["sidebearer-connect-url"])
        assert set(alice.page.locator("ul.scopes li").all_inner_texts()) == asked
        alice.press("Continue to Main")
        alice.consent()
        alice.sees("Main is connected")
        assert running.get(f"/needs/{scope}").status_code == 200
    alice.picture("connected-more-scopes")
    assert running.get("/needs/write").status_code == 200
    assert calls(servers) == {"authorization_code": 3}


# The dashboard as people see it.


def test_the_dashboard_shows_what_happens_as_it_happens(consent, person):
    running, alice = consent(), person()
    alice.open(f"{running.admin}/")
    expect(alice.page.locator("#live")).to_have_text("live")
    assert running.get("/echo?secret=1").status_code == 403
    moment = alice.page.locator("#recent tr", has_text="api.test").first
    expect(moment).to_contain_text("/echo")
    expect(moment).to_contain_text("403")
    assert "secret" not in alice.text()
    bob = person()
    bob.connect(running)
    expect(alice.row()).to_have_attribute("data-state", "connected")
    assert running.get().status_code == 200
    expect(alice.page.locator("#recent tr", has_text="200").first).to_contain_text("api.test")
    alice.picture("dashboard-live")


def luminance(alice, part):
    red, green, blue = alice.page.evaluate(f"getComputedStyle(document.body).{part}.match(/[0-9.]+/g).slice(0, 3).map(Number)")
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_come_in_the_colours_that_people_prefer(consent, person, scheme):
    running, alice = consent(), person(color_scheme=scheme)
    alice.connect(running)
    alice.picture(f"connected-{scheme}")
    alice.open(f"{running.admin}/")
    alice.picture(f"dashboard-{scheme}")
    assert (luminance(alice, "color") > luminance(alice, "backgroundColor")) == (scheme == "dark")


@pytest.mark.parametrize("path", ["/", "/connect/main?user=default"])
def test_pages_fit_a_telephone(consent, person, path):
    running, alice = consent(), person(viewport={"width": 360, "height": 740})
    alice.open(running.admin + path)
    alice.picture(f"telephone-{'connect' if 'connect' in path else 'dashboard'}")
    assert alice.page.evaluate("document.documentElement.scrollWidth") <= 360
