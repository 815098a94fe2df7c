"""The servers alone, with no sidecar between: what the other tests stand on."""

import base64

import pytest

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
