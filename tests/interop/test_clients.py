"""Real clients through `exec`: each is authenticated, and none notices that its token was revoked."""

import hashlib
import json
import subprocess

import pytest

from world import API, CLIENTS, NODE, PYTHON, free_port, wait_for

CURL = ["curl", "-fsS", "-w", "spoke %{http_version}\n"]
FETCHERS = {
    "curl over HTTP/1.1": ([*CURL, "--http1.1", f"{API}/echo"], "1.1"),
    "curl over HTTP/2": ([*CURL, "--http2", f"{API}/echo"], "2"),
    "Python requests": ([PYTHON, CLIENTS / "requests_get.py", f"{API}/echo"], "1.1"),
    "httpx over HTTP/1.1": ([PYTHON, CLIENTS / "httpx_get.py", f"{API}/echo", "1"], "1.1"),
    "httpx over HTTP/2": ([PYTHON, CLIENTS / "httpx_get.py", f"{API}/echo", "2"], "2"),
    "Node fetch": ([NODE, CLIENTS / "fetch.mjs", f"{API}/echo"], "1.1"),
}
# One sidecar for both calls, so that the second one meets a token that was good a moment ago.
TWICE = 'set -e; "$@"; curl -fsS -o /dev/null -X POST "$CONTROL/revoke"; "$@"'


def twice(command):
    return ["sh", "-c", TWICE, "sh", *map(str, command)]


def echoes(output):
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("command, version", FETCHERS.values(), ids=FETCHERS.keys())
def test_a_client_survives_a_revoked_token(sidebearer, servers, command, version):
    """RTY-001, TLS-002"""
    done = sidebearer().exec(*twice(command))
    assert [echo["authorizations"] for echo in echoes(done.stdout)] == [1, 1]
    assert done.stdout.count(f"spoke {version}\n") == 2
    assert servers.report()["token"] == {"calls": {"client_credentials": 2}, "granted": {"client_credentials": 2}, "errors": {}}
    assert servers.report()["api"] == {"requests": 3, "authorized": 2, "refused": 1, "held": 0}


def test_git_clones_over_https_and_survives_a_revoked_token(sidebearer, servers):
    """RTY-001"""
    agent = sidebearer()
    clone = 'git clone -q "$0/git/notes.git" "clone-$1"'
    script = f'set -e; {clone}; curl -fsS -o /dev/null -X POST "$CONTROL/revoke"; set -- 2; {clone}'
    agent.exec("sh", "-c", script, API, "1")
    for number in (1, 2):
        assert (agent.folder / f"clone-{number}/README").read_text() == "cloned over HTTPS\n"
    report = servers.report()
    assert report["token"]["granted"] == {"client_credentials": 2}
    assert report["api"]["refused"] == 1


def test_ca_variables_inherited_by_the_agent_do_not_get_in_the_way(sidebearer, servers):
    """CLIENTS.md 4.9: a machine's own settings already point elsewhere."""
    elsewhere = str(servers.certificates.stranger_cert)
    variables = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS")
    for command, _ in FETCHERS.values():
        done = sidebearer().exec(*command, **dict.fromkeys(variables, elsewhere))
        assert echoes(done.stdout)[0]["authorizations"] == 1


def test_the_variables_that_env_prints_bring_a_client_through(sidebearer):
    agent = sidebearer(listen=f"127.0.0.1:{free_port()}")
    agent.run()
    variables = agent.command("env", "--config", agent.config).stdout
    for command, _ in FETCHERS.values():
        script = 'eval "$0"; exec "$@"'
        environment = {key: agent.environment[key] for key in ("PATH", "HOME")}
        done = subprocess.run(["sh", "-c", script, variables, *command], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert echoes(done.stdout)[0]["authorizations"] == 1


def test_exec_exits_as_its_command_did(sidebearer):
    done = sidebearer().exec("sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert done.returncode == 7
    assert done.stdout == "out\n"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_the_agents_own_authorization_never_reaches_the_api(sidebearer, version):
    own = ["-H", "Authorization: Bearer sk-placeholder", "-H", "authorization: Basic Zm9vOmJhcg=="]
    done = sidebearer().exec("curl", "-fsS", version, *own, f"{API}/echo")
    assert echoes(done.stdout)[0]["authorizations"] == 1


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("expectation", ["Expect:", "Expect: 100-continue"])
def test_a_posted_body_arrives_whole_after_a_401(sidebearer, servers, version, expectation):
    """RTY-005, RTY-012"""
    agent = sidebearer()
    body = agent.folder / "body"
    body.write_bytes(bytes(range(256)) * 400)
    post = ["curl", "-fsS", version, "-H", expectation, "--data-binary", f"@{body}", f"{API}/echo?q=1%2F2"]
    before, after = echoes(agent.exec(*twice(post)).stdout)
    assert (before["method"], before["bodyLength"], before["path"]) == ("POST", 102_400, "/echo?q=1%2F2")
    assert after == before | {"token": after["token"]}
    assert after["token"] != before["token"]
    assert servers.report()["api"]["refused"] == 1


LONG = bytes(range(256)) * 64 * 1024


def test_a_body_too_long_to_replay_gets_the_401_and_the_next_request_a_new_token(sidebearer, servers):
    """RTY-007"""
    with sidebearer().run().client() as client:
        assert client.post(f"{API}/judged-late", content=LONG).json()["bodyLength"] == len(LONG)
        servers.tell("revoke")
        refused = client.post(f"{API}/judged-late", content=LONG)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == 'Bearer realm="api", error="invalid_token"'
        wait_for(lambda: servers.granted("client_credentials") == 2, "the renewal for the next request")
        assert client.get(f"{API}/echo").status_code == 200
    assert servers.granted("client_credentials") == 2


def test_a_401_that_comes_early_is_retried_with_the_whole_of_a_long_body(sidebearer, servers):
    """RTY-009"""
    with sidebearer().run().client() as client:
        assert client.get(f"{API}/echo").status_code == 200
        servers.tell("revoke")
        # This API answers before it reads, and HTTP/2 holds the body back until it does.
        answer = client.post(f"{API}/echo", content=LONG)
    assert answer.status_code == 200
    assert answer.json()["bodySha256"] == hashlib.sha256(LONG).hexdigest()
    assert servers.report()["api"]["refused"] == 1
