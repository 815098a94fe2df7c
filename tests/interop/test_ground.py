"""The servers alone, with no sidecar between: what the other tests stand on."""

import base64
import hashlib
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Error

from world import ODD, SECRETS, as_sent

ODD_ID, ODD_SECRET = ODD["client_id"], SECRETS["ODD_SECRET"]


def token(servers, headers=None, **form):
    return servers.call("auth", "POST", "/token", headers=headers or {}, data=form)


def redeem(servers, refresh_token):
    return token(servers, grant_type="refresh_token", client_id="public", refresh_token=refresh_token)


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
