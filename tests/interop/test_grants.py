"""How a token is asked for: discovery, and each way that a client says who it is."""

from world import BASIC, ODD, POST, SERVICE


def test_the_token_endpoint_is_found_by_rfc_8414(sidebearer, servers):
    assert sidebearer().run().get().status_code == 200
    assert servers.granted("client_credentials") == 1


def test_the_token_endpoint_is_found_by_openid_discovery_where_rfc_8414_is_missing(sidebearer, servers):
    servers.tell("set", rfc8414=False)
    assert sidebearer().run().get().status_code == 200


def test_client_secret_basic_sends_the_secret_in_the_header_alone(sidebearer, servers):
    assert sidebearer().run().get().status_code == 200
    request = servers.report()["lastTokenRequest"]
    assert (request["authorization"], request["secretInBody"]) == ("Basic", False)
    assert request["form"] == {"grant_type": "client_credentials", "scope": "read"}


def test_client_secret_post_sends_the_secret_in_the_body_alone(sidebearer, servers):
    service = POST | {"client_credentials": {"scopes": ["read", "write"]}}
    assert sidebearer(providers={"service": service}).run().get().status_code == 200
    request = servers.report()["lastTokenRequest"]
    assert (request["authorization"], request["secretInBody"]) == ("", True)
    assert request["form"] == {"grant_type": "client_credentials", "client_id": "post", "scope": "read write"}


def test_credentials_with_odd_characters_are_form_urlencoded_inside_basic(sidebearer, servers):
    """RFC 6749 2.3.1"""
    service = ODD | {"client_credentials": {"scopes": ["read"]}}
    assert sidebearer(providers={"service": service}).run().get().status_code == 200
    assert servers.report()["token"]["errors"] == {}


def test_resource_audience_and_other_parameters_reach_the_provider(sidebearer, servers):
    """RFC 8707"""
    wish = {"resource": "https://api.test/", "audience": "https://api.test/v1", "params": {"tenant": "blue & green"}}
    service = BASIC | {"client_credentials": {"scopes": ["read"]} | wish}
    assert sidebearer(providers={"service": service}).run().get().status_code == 200
    form = servers.report()["lastTokenRequest"]["form"]
    assert form == {
        "grant_type": "client_credentials",
        "scope": "read",
        "resource": "https://api.test/",
        "audience": "https://api.test/v1",
        "tenant": "blue & green",
    }


def test_a_token_is_fetched_once_and_used_again(sidebearer, servers):
    running = sidebearer().run()
    tokens = {running.get().json()["token"] for _ in range(5)}
    assert len(tokens) == 1
    assert servers.granted("client_credentials") == 1


def test_check_names_the_provider_that_serves_a_url(sidebearer, servers):
    agent = sidebearer(providers={"billing": SERVICE})
    assert "billing" in agent.command("check", "--config", agent.config, "https://api.test/v1").stdout
    assert servers.report()["token"]["calls"] == {}
