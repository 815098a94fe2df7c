"""The servers alone, with no sidecar between: what the other tests stand on."""

import base64
import hashlib
import os
import select
import socket
import subprocess
import time
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Error

from faults import Faults
from postgres import HOST, ROLE
from world import ODD, SECRETS, as_sent, wait_for

ODD_ID, ODD_SECRET = ODD["client_id"], SECRETS["ODD_SECRET"]


def token(servers, headers=None, port=None, **form):
    return servers.call("auth", "POST", "/token", headers=headers or {}, port=port, data=form)


def redeem(servers, refresh_token, port=None):
    return token(servers, port=port, grant_type="refresh_token", client_id="public", refresh_token=refresh_token)


def service_token(servers):
    basic = {"authorization": f"Basic {as_sent('basic', SECRETS['BASIC_SECRET'])}"}
    return token(servers, basic, grant_type="client_credentials").json()["access_token"]


def test_the_provider_revokes_a_family_whose_refresh_token_is_used_twice(servers):
    first = servers.refresh_token()
    second = redeem(servers, first).json()["refresh_token"]
    assert second != first
    assert redeem(servers, first).json()["error"] == "invalid_grant"
    assert redeem(servers, second).json()["error"] == "invalid_grant"
    assert servers.report()["revokedGrants"] == 1


def test_the_provider_refuses_basic_credentials_that_are_not_form_urlencoded(servers):
    bare = base64.b64encode(f"{ODD_ID}:{ODD_SECRET}".encode()).decode()
    refused = token(servers, {"authorization": f"Basic {bare}"}, grant_type="client_credentials")
    granted = token(servers, {"authorization": f"Basic {as_sent(ODD_ID, ODD_SECRET)}"}, grant_type="client_credentials")
    assert (refused.json()["error"], granted.status_code) == ("invalid_client", 200)


@pytest.mark.parametrize("http2, version", [(False, "HTTP/1.1"), (True, "HTTP/2")])
def test_the_api_answers_401_as_soon_as_a_token_is_revoked(servers, http2, version):
    bearer = {"authorization": f"Bearer {service_token(servers)}"}
    accepted = servers.call("api", "GET", "/echo", headers=bearer, http2=http2)
    assert (accepted.status_code, accepted.http_version) == (200, version)
    servers.tell("revoke")
    refused = servers.call("api", "GET", "/echo", headers=bearer, http2=http2)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == 'Bearer realm="api", error="invalid_token"'


def test_the_api_refuses_a_request_without_a_token(servers):
    assert servers.call("api", "GET", "/echo").status_code == 401


@pytest.mark.parametrize("http2", [False, True])
def test_the_api_counts_every_authorization_header(servers, http2):
    token = service_token(servers)
    headers = [("authorization", f"Bearer {token}"), ("authorization", "Bearer another")]
    assert servers.call("api", "GET", "/echo", headers=headers, http2=http2).json()["authorizations"] == 2


def test_the_api_serves_a_git_repository(servers):
    bearer = {"authorization": f"Bearer {service_token(servers)}"}
    refs = servers.call("api", "GET", "/git/notes.git/info/refs?service=git-upload-pack", headers=bearer)
    assert refs.headers["content-type"] == "application/x-git-upload-pack-advertisement"
    assert b"refs/heads/main" in refs.content


VERIFIER = "a-verifier-of-43-characters-or-more-0123456789"
CALLBACK = "http://127.0.0.1:1/callback"


def authorization_url(**changes):
    challenge = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).decode().rstrip("=")
    asked = {
        "response_type": "code", "client_id": "app", "redirect_uri": CALLBACK, "scope": "read offline_access", "prompt": "consent",
        "state": "s1", "code_challenge": challenge, "code_challenge_method": "S256",
    }
    return "https://auth.test/auth?" + urlencode({key: value for key, value in (asked | changes).items() if value})


def answer(alice):
    return {key: value for key, [value] in parse_qs(urlsplit(alice.way_back()).query).items()}


def test_a_browser_consents_and_the_code_is_good_once_for_tokens_of_the_one_who_logged_in(servers, person):
    servers.tell("set", pause=True)
    carol = person()
    carol.open(authorization_url())
    carol.consent("carol")
    back = answer(carol)
    assert (back["iss"], back["state"]) == ("https://auth.test", "s1")
    form = {"grant_type": "authorization_code", "client_id": "app", "redirect_uri": CALLBACK, "code": back["code"]}
    assert token(servers, **form, code_verifier=VERIFIER[::-1]).json()["error"] == "invalid_grant"
    tokens = token(servers, **form, code_verifier=VERIFIER).json()
    bearer = {"authorization": f"Bearer {tokens['access_token']}"}
    assert servers.call("api", "GET", "/echo", headers=bearer).json()["sub"] == "carol"
    assert servers.call("api", "GET", "/needs/write", headers=bearer).headers["www-authenticate"].endswith('scope="write"')
    assert token(servers, **form, code_verifier=VERIFIER).json()["error"] == "invalid_grant"
    assert not servers.active(tokens["refresh_token"])
    assert {back["code"], VERIFIER, *(tokens[name] for name in ("access_token", "refresh_token"))} <= set(servers.issued())
    assert carol.hosts() == {"auth.test"}


def test_the_provider_insists_on_pkce_and_says_that_its_answers_name_it(servers, person):
    metadata = servers.call("auth", "GET", "/.well-known/openid-configuration").json()
    assert metadata["authorization_response_iss_parameter_supported"] is True
    assert metadata["code_challenge_methods_supported"] == ["S256"]
    servers.tell("set", pause=True)
    alice = person()
    alice.open(authorization_url(code_challenge=None, code_challenge_method=None))
    assert answer(alice)["error"] == "invalid_request"


def test_the_provider_refuses_names_itself_wrongly_and_makes_a_detour_when_told_to(servers, person):
    servers.tell("set", pause=True, detour=True, refusal="<b>no</b>", iss="https://evil.test")
    alice = person()
    alice.open(authorization_url())
    alice.refuse()
    assert answer(alice) == {"error": "access_denied", "error_description": "<b>no</b>", "iss": "https://evil.test", "state": "s1"}
    assert "login.test" in alice.hosts()
    servers.tell("set", iss=None)
    alice.open(authorization_url())
    alice.refuse()
    assert "iss" not in answer(alice)


def test_a_device_is_told_to_slow_down_and_gets_its_tokens_when_its_user_has_said_the_code(servers, person):
    servers.tell("set", slowDowns=1)
    device = servers.call("auth", "POST", "/device/auth", data={"client_id": "app", "scope": "read offline_access"}).json()
    assert device["interval"] == 1
    poll = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "client_id": "app", "device_code": device["device_code"]}
    assert [token(servers, **poll).json()["error"] for _ in range(2)] == ["slow_down", "authorization_pending"]
    alice = person()
    alice.open(device["verification_uri"])
    alice.enter_code(device["user_code"])
    alice.press("It does")
    alice.consent()
    alice.sees("Your device is connected")
    assert "refresh_token" in token(servers, **poll).json()
    assert len(servers.report()["polls"]) == 3


def test_a_browser_finds_nothing_beyond_this_machine(person):
    with pytest.raises(Error, match="ERR_NAME_NOT_RESOLVED"):
        person().open("https://example.org/")


def test_the_ledger_tells_who_used_a_refresh_token_and_which_came_a_second_time(servers):
    first, entrance = servers.refresh_token(user="carol"), servers.entrance()
    second = redeem(servers, first).json()["refresh_token"]
    redeem(servers, first, port=entrance)
    redeem(servers, second)
    ledger = servers.ledger()
    told = [(use["user"], use["rotation"], use["outcome"], use["entrance"] == entrance) for use in ledger["uses"]]
    assert told == [("carol", 0, "granted", False), ("carol", 0, "invalid_grant", True), ("carol", 1, "invalid_grant", False)]
    granted = ledger["uses"][0]
    assert 0 <= granted["at"] - granted["committed"] < 10_000_000
    assert abs(granted["at"] - time.time() * 1_000_000) < 60_000_000
    assert [(one["user"], one["by"]) for one in ledger["revocations"]] == [("carol", "/token")]


def test_the_ledger_tells_of_tokens_past_their_end_and_of_those_of_somebody_else(servers):
    servers.tell("set", ttl=1)
    token = redeem(servers, servers.refresh_token(user="carol")).json()["access_token"]
    bearer = {"authorization": f"Bearer {token}"}
    wait_for(lambda: servers.call("api", "GET", "/quick/dave/7", headers=bearer).status_code == 401, "the token to end")
    ledger = servers.ledger()
    assert ledger["mistaken"] >= 1
    assert [(one["user"], one["sidecar"]) for one in ledger["expired"]] == [("dave", "7")]


def test_the_network_in_front_of_a_server_fails_in_every_way(servers):
    with socket.create_server(("127.0.0.1", 0)) as server:
        faults = Faults(lambda: server.getsockname()[1])

        def call():
            agent = socket.create_connection(("127.0.0.1", faults.port), timeout=30)
            return agent, server.accept()[0]

        def passes(one, other):
            one.sendall(b"x")
            return other.recv(1) == b"x"

        agent, served = call()
        assert passes(agent, served) and passes(served, agent)
        faults.delay(0.2)
        started = time.monotonic()
        assert passes(agent, served) and time.monotonic() - started >= 0.2
        faults.heal()
        faults.stall()
        agent.sendall(b"y")
        assert not select.select([served], [], [], 0.2)[0]
        faults.heal()
        assert served.recv(1) == b"y"
        faults.cut()
        for end in (agent, served):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        faults.refuse()
        with pytest.raises(ConnectionResetError):
            socket.create_connection(("127.0.0.1", faults.port), timeout=30).recv(1)
        faults.heal()
        assert passes(*call())
        faults.close()


def test_the_database_server_takes_its_client_by_tls_with_its_password_alone(postgres):
    database = postgres.database()

    def connects(password, **how):
        told = {"host": "127.0.0.1", "port": postgres.port, "user": ROLE, "dbname": database} | how
        command = [postgres.programs / "psql", "-X", "-A", "-t", "-c", "SELECT 'in'", " ".join(f"{key}={value}" for key, value in told.items())]
        return subprocess.run(command, env={"PATH": os.environ["PATH"], "PGPASSWORD": password}, capture_output=True, text=True)

    trusted = {"sslmode": "verify-full", "sslrootcert": postgres.certificates.ca, "host": HOST, "hostaddr": "127.0.0.1"}
    password = SECRETS["STORE_PASSWORD"]
    assert connects(password, **trusted).stdout == "in\n"
    assert "password authentication failed" in connects("another", **trusted).stderr
    assert "no encryption" in connects(password, sslmode="disable").stderr
    postgres.restart(immediate=True)
    assert connects(password, **trusted).stdout == "in\n"
