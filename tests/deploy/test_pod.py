"""A pod of an agent and its sidecar, as the component renders it: the agent holds no secret, and is authenticated."""

import json
import os

import httpx
import pytest

from containers import SIDEBEARER
from kubelet import CURL, IDLE, KUBERNETES, REQUESTS, find, kustomize, pod_of
from world import wait_for


@pytest.fixture(scope="module")
def examples():
    return kustomize(KUBERNETES / "examples")


@pytest.fixture
def deployment(examples):
    return pod_of(find(examples, "Deployment", "researcher"))


def is_authenticated(done):
    """The API answers only who shows a token that its provider honours."""
    return json.loads(done.stdout)["authorizations"] == 1


def python(pod, text, check=True):
    """What the agent sees."""
    return pod.exec("python3", "-c", f"import os; print({text})", check=check)


class TestAPod:
    """Nothing here changes it."""

    def test_curl_and_python_are_authenticated(self, pod):
        assert is_authenticated(pod.exec(*CURL)) and is_authenticated(pod.exec(*REQUESTS))

    def test_the_agent_holds_no_secret(self, pod):
        assert "canary" not in python(pod, "dict(os.environ)").stdout
        seen = "[os.path.exists(path) for path in ('/var/lib/sidebearer', '/run/secrets/sidebearer', '/etc/sidebearer')]"
        assert python(pod, seen).stdout.strip() == "[False, False, False]"

    def test_the_agent_reads_the_ca_and_neither_changes_it_nor_sees_its_key(self, pod):
        files = python(pod, "*sorted(os.listdir('/run/sidebearer'))").stdout.split()
        assert files == ["bundle.pem", "ca.pem", "truststore.p12"]
        bundle = python(pod, "open('/run/sidebearer/bundle.pem').read()").stdout
        assert "BEGIN CERTIFICATE" in bundle and "PRIVATE" not in bundle
        changed = python(pod, "open('/run/sidebearer/ca.pem', 'w')", check=False)
        assert changed.returncode == 1 and "Read-only file system" in changed.stderr

    def test_the_sidecar_has_a_read_only_root_no_capability_and_no_way_to_new_ones(self, pod):
        status = dict(line.split(":\t", 1) for line in process(pod, "status") if ":\t" in line)
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"], status["Uid"].split()[0]) == ("1", "2", "2102")
        root = next(line.split() for line in process(pod, "mounts") if line.split()[1] == "/")
        assert "ro" in root[3].split(",")

    def test_probes_are_answered_at_every_address_of_the_pod(self, pod, deployment):
        probes = next(one for one in deployment["initContainers"] if one["name"] == "sidebearer")
        assert "readinessProbe" not in probes
        for probe in (probes["startupProbe"], probes["livenessProbe"]):
            # Not the address that the proxy itself listens at.
            answer = httpx.get(f"http://127.0.0.9:3130{probe['httpGet']['path']}", trust_env=False, timeout=60)
            assert answer.status_code == 200, answer.text
        # The same without HTTP, for what runs no probes but commands.
        for asked in ([], ["--startup"], ["--ready"]):
            pod.exec("/sidebearer", "healthcheck", *asked, name="sidebearer")

    def test_a_name_that_no_file_knows_is_asked_of_dns(self, pod, servers, dns):
        """By a static program, in an image without libc's configuration."""
        url = f"http://only-in-dns.test:{servers.ports['plain']}/echo"
        answer = pod.exec("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", url)
        # The API's own answer to who has no token.
        assert (answer.stdout, dns.asked >= {"only-in-dns.test"}) == ("401", True)


@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_a_sidecar_that_comes_back_has_the_same_ca_and_the_agent_goes_on(kubelet, deployment, how):
    pod = kubelet.run("deployment", deployment, IDLE)
    before = python(pod, "open('/run/sidebearer/ca.pem').read()").stdout
    assert is_authenticated(pod.exec(*CURL))
    pod.signal("sidebearer", how)
    assert pod.wait("sidebearer") == {"TERM": 0, "KILL": 137}[how]
    pod.restart("sidebearer")
    pod.await_line("listening", times=2)
    assert python(pod, "open('/run/sidebearer/ca.pem').read()").stdout == before
    assert is_authenticated(pod.exec(*CURL))


def test_a_changed_config_map_is_taken_without_a_restart(kubelet, deployment):
    pod = kubelet.run("deployment", deployment, IDLE)
    assert is_authenticated(pod.exec(*CURL))
    denied = kubelet.configuration(routes=[{"host": "api.test", "deny": True}])
    # As the kubelet changes it: one link that is swapped.
    pod.lay(pod.folder / "sidebearer-config", {"proxy.yaml": json.dumps(denied)}, 0o644)
    wait_for(lambda: pod.exec(*CURL, check=False).returncode == 22, "the new configuration")
    assert pod.state("sidebearer")["Running"] and len([one for one in pod.events() if one["message"] == "listening"]) == 1


def test_the_agent_ends_first_and_then_the_sidecar_with_0(kubelet, deployment):
    """As a kubelet stops a pod: what the agent still sends when it is told to end has its sidecar."""
    last = "trap 'curl -fsS https://api.test/echo; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    pod = kubelet.run("deployment", deployment, ["sh", "-c", last])
    wait_for(lambda: "ready" in pod.lines("agent"), "the agent to heed what it is told")
    pod.signal("agent", "TERM")
    assert pod.wait("agent") == 7
    assert told(pod)["authorizations"] == 1
    pod.signal("sidebearer", "TERM")
    assert pod.wait("sidebearer") == 0
    stops = lambda: [event["clean"] for event in pod.events() if event["message"] == "stopped"]
    assert wait_for(stops, "the sidecar's last word") == [True]


def told(pod):
    """The API's answer to an agent that is gone: what a container says is in its log a little after its end."""
    answers = lambda: [line for line in pod.lines("agent") if line.startswith("{")]
    return json.loads(wait_for(answers, "what the agent was told")[-1])


def test_a_job_with_a_classic_sidecar_ends_since_its_agent_says_so(kubelet, examples):
    job = pod_of(find(examples, "Job", "invoices-classic"))
    agent = next(one for one in job["containers"] if one["name"] == "agent")
    command = ["https://api.test/echo" if part.startswith("https://") else part for part in agent["command"]]
    pod = kubelet.run("job", job, command, kubelet.configuration("examples/proxy-classic.yaml"))
    assert (pod.wait("agent"), pod.wait("sidebearer")) == (0, 0)
    assert told(pod)["authorizations"] == 1


@pytest.mark.parametrize("user", ["65532:0", "1000730000:0", "4711:4711"])
def test_it_runs_as_any_user_without_passwd_home_tmp_or_shell(engine, kubelet, user):
    volumes = lay(kubelet, int(user.partition(":")[2]))
    options = [f"--volume={source}:{place}" for place, source in volumes.items()]
    options += ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
    options += ["--network=host", "--passwd=false", "--unsetenv=HOME", f"--user={user}"]
    container = engine.podman("run", "--detach", *options, SIDEBEARER).stdout.strip()
    wait_for(lambda: "listening" in engine.podman("logs", container).stderr, "the sidecar to listen")
    root = f"/proc/{engine.inspect(container)['State']['Pid']}/root"
    assert not [path for path in ("/tmp", "/bin", "/lib", "/etc/passwd") if os.path.exists(root + path)]
    engine.podman("stop", "--time", "20", container)
    assert engine.inspect(container)["State"]["ExitCode"] == 0
    engine.podman("rm", container)


def lay(kubelet, group):
    """Volumes as those of a pod, by where they are mounted."""
    places = ("/etc/sidebearer", "/run/secrets/sidebearer", "/var/lib/sidebearer", "/run/sidebearer")
    volumes = {place: kubelet.folder / str(number) for number, place in enumerate(places)}
    for folder in volumes.values():
        folder.mkdir()
        folder.chmod(0o777)
    (volumes["/etc/sidebearer"] / "proxy.yaml").write_text(json.dumps(kubelet.configuration()))
    for name, text in kubelet.secrets().items():
        secret = volumes["/run/secrets/sidebearer"] / name
        secret.write_text(text)
        secret.chmod(0o440)
        os.chown(secret, 0, group)
    return volumes


def process(pod, what):
    with open(f"/proc/{pod.state('sidebearer')['Pid']}/{what}") as file:
        return file.read().splitlines()
