"""compose.yaml, run by podman-compose: the agent's network leads to the sidecar and nowhere else."""

import json
import os
import re
import shutil

import compose_spec
import pytest
import yaml

from containers import run
from kubelet import CURL, REQUESTS
from leaks import canaries, leaks
from network import Relay
from world import PYTHON, ROOT, SECRETS, SERVICE, wait_for

AGENT_SECRET = "agent-canary-secret-2c90"
NETWORKS = ("inside", "outside")


@pytest.fixture
def project(servers, engine, tmp_path):
    """The folder as a user has filled it, with the servers that there are on the far side of the outer network."""
    folder = tmp_path / "compose"
    shutil.copytree(ROOT / "deploy/compose", folder)
    (tmp_path / "env").mkdir()
    shutil.copy(ROOT / "deploy/env/agent.env", tmp_path / "env")
    head = re.findall(r"^#   (.*)$", (folder / "compose.yaml").read_text(), re.M)
    assert head.pop() == "docker compose up"
    run("bash", "-euc", "\n".join(head), cwd=folder, env=os.environ | {"CLIENT_SECRET": SECRETS["BASIC_SECRET"]})
    company = folder / "secrets/company.pem"
    company.write_text(servers.certificates.ca.read_text())
    company.chmod(0o400)
    os.chown(company, 65532, -1)
    (folder / ".env").write_text(f"AGENT_SECRET={AGENT_SECRET}\n")
    project = Project(folder, engine)
    yield project
    logs = engine.podman("logs", "compose_sidebearer_1", check=False)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/log").write_text(logs.stdout + logs.stderr)
    project.compose("down", "--volumes", "--timeout", "5", check=False)
    assert list(leaks(tmp_path / "outputs", [*canaries(servers), AGENT_SECRET])) == []


class Project:
    def __init__(self, folder, engine):
        self.folder, self.engine = folder, engine

    def compose(self, *arguments, check=True):
        command = [PYTHON, "-m", "podman_compose", "--project-name", "compose", *arguments]
        return run(*command, cwd=self.folder, env=self.engine.in_networks, check=check)

    def gateway(self, network):
        found = json.loads(self.engine.podman("network", "inspect", f"compose_{network}").stdout)[0]
        return found["subnets"][0].get("gateway")

    def is_healthy(self):
        return self.engine.podman("healthcheck", "run", "compose_sidebearer_1", check=False).returncode == 0

    def exec(self, *command, check=True):
        return self.engine.podman("exec", "compose_agent_1", *command, check=check)


def test_the_file_is_what_the_compose_specification_allows():
    text = (ROOT / "deploy/compose/compose.yaml").read_text()
    as_read = re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda found: found[3] if found[2] == "-" else "x", text)
    assert sorted(compose_spec.PyCompose.from_yaml(as_read).service_names()) == ["agent", "sidebearer"]
    with pytest.raises(ValueError, match="cap_dropp"):
        compose_spec.PyCompose.from_yaml(as_read.replace("cap_drop:", "cap_dropp:"))


def test_the_agent_is_authenticated_and_gets_nowhere_by_itself(project, servers):
    configuration = yaml.safe_load((project.folder / "proxy.yaml").read_text())
    provider = SERVICE | {"client_secret": configuration["providers"]["billing"]["client_secret"]}
    # The sidecar first, since only then there are networks, and a gateway that leads to the servers.
    project.compose("up", "--no-start")
    outside = project.gateway("outside")
    with Relay(servers.ports["auth"]) as auth, Relay(servers.ports["api"]) as api:
        (project.folder / "proxy.yaml").write_text(json.dumps(configuration | {
            "admin": "off",
            "extra_ca_files": ["/run/secrets/sidebearer/company.pem"],
            "resolve": {"auth.test:443": f"{outside}:{auth.port}", "api.test:443": f"{outside}:{api.port}"},
            "providers": {"billing": provider},
            "routes": [{"host": "api.test", "provider": "billing"}],
        }))
        project.compose("up", "--detach", "--no-deps", "sidebearer")
        wait_for(project.is_healthy, "the sidecar to be healthy", seconds=60)
        project.compose("up", "--detach", "--no-deps", "agent")
        for client in (CURL, REQUESTS):
            assert json.loads(project.exec(*client).stdout)["authorizations"] == 1
        past = ["curl", "-sS", "--noproxy", "*", "--connect-timeout", "2", "-k", f"https://{outside}:{api.port}/echo"]
        assert project.exec(*past, check=False).returncode in (7, 28)
        stranger = project.exec(*CURL, "--verbose", "--proxy", "http://default:wrong-wrong-wrong@sidebearer:3128", check=False)
        assert "HTTP/1.1 407" in stranger.stderr
