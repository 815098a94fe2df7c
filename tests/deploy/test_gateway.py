"""The gateway and an agent behind it, each from its manifest, on a real PostgreSQL."""

import json

import pytest

from containers import AGENT
from kubelet import CURL, KUBERNETES, find, kustomize, pod_of
from postgres import HOST, ROLE
from world import SECRETS, SERVICE

AGENT_SECRET = "agent-canary-secret-77e1"


@pytest.fixture(scope="module")
def manifests():
    return kustomize(KUBERNETES / "gateway")


@pytest.fixture
def gateway(kubelet, manifests, postgres, servers):
    """Its pod; the database and the provider are those of the tests."""
    url = f"postgres://{ROLE}@{HOST}:5432/{postgres.database()}"
    configuration = kubelet.configuration("gateway/proxy.yaml", routes=[{"host": "api.test", "provider": "billing"}])
    secret = "${file:/run/secrets/sidebearer/billing-client-secret}"
    configuration["providers"] = {"billing": SERVICE | {"client_secret": secret}}
    configuration["store"]["url"] = url
    configuration["resolve"][f"{HOST}:5432"] = f"127.0.0.1:{postgres.port}"
    secrets = kubelet.secrets() | {
        "researcher-secret": AGENT_SECRET,
        "billing-client-secret": SECRETS["BASIC_SECRET"],
        "database-password": SECRETS["STORE_PASSWORD"],
    }
    pod = pod_of(find(manifests, "Deployment", "sidebearer"))
    return kubelet.run("gateway", pod, configuration=configuration, secrets=secrets)


@pytest.fixture
def agent(engine, manifests, gateway, tmp_path):
    """Runs a command as the agent of the manifest, with the ConfigMap that its head says how to make."""
    folder = tmp_path / "sidebearer-ca"
    folder.mkdir()
    folder.chmod(0o755)
    for name, option in (("ca", "--pem"), ("bundle", "--bundle")):
        (folder / f"{name}.pem").write_text(gateway.exec("/sidebearer", "ca", option, name="sidebearer").stdout)
    container = pod_of(find(manifests, "Deployment", "researcher"))["containers"][0]

    def run(*command, secret=AGENT_SECRET):
        values = {one["name"]: one.get("value", secret).replace("$(SIDEBEARER_SECRET)", secret) for one in container["env"]}
        options = [f"--env={name}={value}" for name, value in values.items()]
        options += ["--network=host", f"--volume={folder}:/run/sidebearer:ro", "--rm"]
        return engine.podman("run", *options, AGENT, *command, check=False)

    return run


def test_an_agent_that_shows_its_secret_is_authenticated_and_reaches_nothing_else(agent, gateway, dns):
    done = agent(*CURL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["authorizations"] == 1
    assert "sidebearer.sidebearer.svc" in dns.asked
    refused = agent(*CURL, "--verbose", secret="some-other-secret-of-nobody")
    assert "HTTP/1.1 407" in refused.stderr
    elsewhere = agent("curl", "--verbose", "-fsS", "https://not-routed.test/")
    assert "HTTP/1.1 403" in elsewhere.stderr
    assert AGENT_SECRET not in "".join(gateway.lines())
