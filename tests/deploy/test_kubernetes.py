"""The manifests: valid to the letter, restricted, and an agent's whole set-up from one label."""

import json
import os
import subprocess
from ipaddress import ip_address, ip_network

import kubernetes_validate
import pytest
import yaml

from containers import run
from kubelet import KUBERNETES, WORKLOADS, find, kustomize, pod_of
from restricted import violations
from world import ROOT, wait_for

FOLDERS = ["base", "examples", "gateway", "inject", "locked"]
# From which on native sidecars are stable, and what is newest here; the injector's kind came in between.
VERSIONS = {"base": ("1.33", "1.37"), "examples": ("1.33", "1.37"), "gateway": ("1.33", "1.37"), "inject": ("1.36", "1.37")}
VERSIONS["locked"] = VERSIONS["base"]


@pytest.fixture(scope="module")
def rendered():
    return {folder: kustomize(KUBERNETES / folder) for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_valid(rendered, folder):
    assert rendered[folder]
    for version in VERSIONS[folder]:
        for manifest in rendered[folder]:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("folder", ["base", "gateway"])
def test_the_example_of_the_secret_is_valid_and_holds_what_proxy_yaml_asks_for(folder):
    secrets = list(yaml.safe_load_all((KUBERNETES / folder / "secret.example.yaml").read_text()))
    for secret in secrets:
        kubernetes_validate.validate(secret, "1.37", strict=True)
    text = (KUBERNETES / folder / "proxy.yaml").read_text()
    assert set(secrets[0]["stringData"]) == {part.split("}")[0] for part in text.split("${file:/run/secrets/sidebearer/")[1:]}


def test_the_classic_jobs_configuration_differs_by_what_stops_it():
    read = lambda name: yaml.safe_load((KUBERNETES / name).read_text())
    assert read("examples/proxy-classic.yaml") == read("base/proxy.yaml") | {"admin": "127.0.0.1:3129", "quit": True}


def test_the_locked_pods_configuration_differs_by_what_it_denies():
    read = lambda name: yaml.safe_load((KUBERNETES / name).read_text())
    assert read("locked/proxy.yaml") == read("base/proxy.yaml") | {"unmatched": "deny"}


def test_a_locked_pod_is_restricted_but_for_its_lock_which_comes_first(rendered):
    pod = pod_of(find(rendered["locked"], "Deployment", "researcher"))
    lock, sidecar = pod["initContainers"]
    assert (lock["name"], sidecar["name"]) == ("sidebearer-egress-lock", "sidebearer")
    assert {one.split(":")[0] for one in violations(pod)} == {"sidebearer-egress-lock"}
    assert lock["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    given = {one["name"]: one["value"] for one in lock["env"]}
    assert given == {"SIDECAR_UID": str(sidecar["securityContext"]["runAsUser"]), "PROXY_YAML": "/etc/sidebearer/proxy.yaml"}
    assert {"name": "sidebearer-config", "mountPath": "/etc/sidebearer", "readOnly": True} in lock["volumeMounts"]
    maps = [one for one in rendered["locked"] if one["kind"] == "ConfigMap" and "egress-lock.sh" in one["data"]]
    mounted = next(one for one in pod["volumes"] if one["name"] == "sidebearer-egress-lock")
    assert [one["metadata"]["name"] for one in maps] == [mounted["configMap"]["name"]]
    namespace = find(rendered["locked"], "Namespace", "agents")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "privileged"


@pytest.mark.parametrize("folder", ["examples", "locked"])
def test_no_agent_is_the_user_that_the_sidecar_is(rendered, folder):
    """Nor is 65532, which many images have, the sidecar's."""
    for pod in (pod_of(one) for one in rendered[folder] if one["kind"] in WORKLOADS):
        containers = pod.get("initContainers", []) + pod["containers"]
        users = {one["name"]: one["securityContext"].get("runAsUser", pod["securityContext"]["runAsUser"]) for one in containers}
        assert users.pop("sidebearer") == 2102
        assert not set(users.values()) & {2102, 65532}


def test_an_agent_behind_the_gateway_has_the_variables_too(rendered, variables):
    """But Java's: it sends no credentials that stand in a proxy's URL."""
    pod = pod_of(find(rendered["gateway"], "Deployment", "researcher"))
    given = {one["name"]: one["value"] for one in pod["containers"][0]["env"] if "value" in one}
    gateway = "http://default:$(SIDEBEARER_SECRET)@sidebearer.sidebearer.svc:3128"
    del variables["JAVA_TOOL_OPTIONS"]
    assert given == {name: gateway if value == "http://127.0.0.1:3128" else value for name, value in variables.items()}


@pytest.mark.parametrize("folder", ["examples", "gateway"])
def test_every_pod_passes_the_restricted_standard(rendered, folder):
    pods = {one["metadata"]["name"]: pod_of(one) for one in rendered[folder] if one["kind"] in WORKLOADS}
    assert {name: violations(pod) for name, pod in pods.items()} == {name: [] for name in pods}


def test_the_namespace_enforces_it(rendered):
    labels = find(rendered["base"], "Namespace", "agents")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_check_of_the_standard_finds_what_is_against_it(rendered):
    good = pod_of(find(rendered["examples"], "Deployment", "researcher"))
    spoiled = {
        "hostNetwork": lambda pod: pod.update(hostNetwork=True),
        "hostPath": lambda pod: pod["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        "runAsNonRoot": lambda pod: (pod.pop("securityContext"), pod["containers"][0]["securityContext"].pop("runAsNonRoot", None)),
        "runAsUser": lambda pod: pod["initContainers"][0]["securityContext"].update(runAsUser=0),
        "seccompProfile": lambda pod: pod["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "allowPrivilegeEscalation": lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        "capabilities": lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "privileged": lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
        "hostPort": lambda pod: pod["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
    }
    for rule, spoil in spoiled.items():
        pod = json.loads(json.dumps(good))
        spoil(pod)
        assert [one for one in violations(pod) if rule in one], rule


@pytest.fixture
def sidebearer(program, tmp_path):
    """Runs a subcommand in a folder of its own."""
    return lambda *arguments: run(program, *arguments, cwd=tmp_path, env={"HOME": str(tmp_path)})


@pytest.fixture
def variables(sidebearer, tmp_path):
    """What the program itself tells an agent of a sidecar that is configured as in the base."""
    (tmp_path / "proxy.yaml").write_text("providers: {}\nca: {path: /run/sidebearer}\n")
    return json.loads(sidebearer("env", "--shell", "json").stdout)


@pytest.mark.parametrize("kind, name", [("Deployment", "researcher"), ("Job", "invoices"), ("Job", "invoices-classic")])
def test_an_agent_has_the_variables_that_sidebearer_env_prints(rendered, variables, kind, name):
    pod = pod_of(find(rendered["examples"], kind, name))
    agent = next(one for one in pod["containers"] if one["name"] == "agent")
    given = {one["name"]: one["value"] for one in agent["env"]}
    own = {"LANG"} & set(given)
    assert {name: value for name, value in given.items() if name not in own} == variables


def test_the_file_of_variables_is_what_sidebearer_env_prints(variables):
    lines = (ROOT / "deploy/env/agent.env").read_text().splitlines()
    assert dict(line.split("=", 1) for line in lines if not line.startswith("#")) == variables


def test_the_configuration_passes_the_check(rendered, sidebearer, tmp_path):
    for folder in ("base", "examples", "gateway", "locked"):
        maps = [one for one in rendered[folder] if one["kind"] == "ConfigMap" and "proxy.yaml" in one["data"]]
        assert maps
        for one in maps:
            text = one["data"]["proxy.yaml"]
            for part in text.split("${file:")[1:]:
                path = part.split("}")[0]
                made = tmp_path / path.lstrip("/")
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
                made.chmod(0o440)
                text = text.replace(path, str(made))
            (tmp_path / "proxy.yaml").write_text(text)
            sidebearer("check")


def test_a_gateway_that_stops_takes_connections_until_none_are_led_to_it(rendered):
    pod = pod_of(find(rendered["gateway"], "Deployment", "sidebearer"))
    sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    # `drain` when left out: proxy.yaml.
    drain = int(yaml.safe_load((ROOT / "proxy.yaml").read_text())["drain"].removesuffix("s"))
    assert sleep >= 5 and pod["terminationGracePeriodSeconds"] > sleep + drain


@pytest.mark.parametrize("folder", ["base", "gateway"])
def test_pods_reach_the_name_server_of_their_node_and_not_what_hands_out_its_credentials(rendered, folder):
    """169.254.20.10 is NodeLocal DNSCache's."""
    for policy in (one["spec"] for one in rendered[folder] if one["kind"] == "NetworkPolicy"):
        assert reaches(policy, "169.254.20.10", 53)
        assert not reaches(policy, "169.254.20.10", 443) and not any(reaches(policy, "169.254.169.254", port) for port in (53, 80, 443))


def reaches(policy, address, port):
    """Over what says for which addresses it is."""
    return any(
        ip_address(address) in ip_network(block["cidr"]) and not any(ip_address(address) in ip_network(one) for one in block.get("except", []))
        for rule in policy["egress"] if any(one["port"] == port for one in rule["ports"])
        for block in (peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer)
    )


def test_a_classic_job_tells_its_sidecar_to_stop_however_it_ends(rendered, tmp_path):
    """Its agent's script with a curl that notes what it is asked for, and takes long over the API's answer."""
    job = find(rendered["examples"], "Job", "invoices-classic")
    agent = next(one for one in pod_of(job)["containers"] if one["name"] == "agent")
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\necho "$*" >>"$0.log"\ncase "$*" in *startupz) exit "$STARTED";; *api*) sleep 3;; esac\n')
    curl.chmod(0o755)
    asked = lambda: (tmp_path / "curl.log").read_text().splitlines() if (tmp_path / "curl.log").exists() else []
    environment = lambda started: os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTED": started}
    assert run(*agent["command"], env=environment("7"), check=False, timeout=60).returncode == 7
    assert asked()[-1].endswith("/quit")
    with subprocess.Popen(agent["command"], env=environment("0")) as running:
        wait_for(lambda: "api.example.com" in asked()[-1], "the agent's call")
        running.terminate()
    assert (running.returncode, asked()[-1].endswith("/quit")) == (143, True)
    assert job["spec"]["activeDeadlineSeconds"]


def test_every_sidecar_has_the_port_that_is_scraped(rendered):
    pods = [pod_of(one) for one in rendered["examples"] + rendered["gateway"] if one["kind"] in WORKLOADS]
    sidecars = [one for pod in pods for one in pod.get("initContainers", []) + pod["containers"] if one["name"] == "sidebearer"]
    assert len(sidecars) == 4
    assert all({"name": "health", "containerPort": 3130} in one["ports"] for one in sidecars)


# The component, put on workloads that are not the examples.

FOREIGN = """\
apiVersion: apps/v1
kind: {kind}
metadata: {{name: foreign, labels: {labels}}}
spec:
  selector: {{matchLabels: {{app: foreign}}}}
  template:
    metadata: {{labels: {{app: foreign}}}}
    spec:
      securityContext: {{fsGroup: 1234}}
      initContainers:
        - {{name: first, image: agent}}
      containers:
        - {{name: main, image: agent, env: [{{name: MODE, value: fast}}], volumeMounts: [{{name: data, mountPath: /data}}]}}
        - {{name: second, image: agent}}
      volumes:
        - {{name: data, emptyDir: {{}}}}
"""


@pytest.fixture
def foreign(tmp_path):
    def render(kind, labels, text=FOREIGN, components=("sidecar",), **more):
        (tmp_path / "foreign.yaml").write_text(text.format(kind=kind, labels=json.dumps(labels)))
        places = [f"{os.path.relpath(KUBERNETES, tmp_path)}/components/{name}" for name in components]
        (tmp_path / "kustomization.yaml").write_text(
            json.dumps({"resources": ["foreign.yaml"], "components": places} | more)
        )
        workload = find(kustomize(tmp_path), kind, "foreign")
        for version in VERSIONS["base"]:
            kubernetes_validate.validate(workload, version, strict=True)
        return workload

    return render


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet"])
def test_one_label_authenticates_every_container_and_leaves_what_is_theirs(foreign, variables, kind):
    pod = pod_of(foreign(kind, {"sidebearer": "agent"}))
    # Before the others, which may want to call something too.
    assert [one["name"] for one in pod["initContainers"]] == ["sidebearer", "first"]
    main, second = pod["containers"]
    assert {one["name"]: one["value"] for one in main["env"]} == variables | {"MODE": "fast"}
    assert {one["name"]: one["value"] for one in second["env"]} == variables
    assert {one["name"] for one in main["volumeMounts"]} == {"data", "sidebearer-ca"}
    for container in (main, second):
        mount = next(one for one in container["volumeMounts"] if one["name"] == "sidebearer-ca")
        assert mount == {"name": "sidebearer-ca", "mountPath": "/run/sidebearer", "readOnly": True}
    assert pod["securityContext"] == {"fsGroup": 1234}
    assert "sidebearer" not in str(pod["initContainers"][1])


def test_what_changes_the_workload_after_the_component_leaves_it_valid(foreign):
    patch = {"patch": "{apiVersion: apps/v1, kind: Deployment, metadata: {name: foreign}, spec: {replicas: 3}}"}
    first = foreign("Deployment", {"sidebearer": "agent"}, patches=[patch])
    second = foreign("Deployment", {"sidebearer": "agent"}, components=["sidecar", "egress-lock"])
    assert first["spec"]["replicas"] == 3
    for container in pod_of(first)["containers"] + pod_of(second)["containers"]:
        assert {"name": "sidebearer-ca", "mountPath": "/run/sidebearer", "readOnly": True} in container["volumeMounts"]


@pytest.mark.parametrize("theirs", ["{}", "{allowPrivilegeEscalation: true, runAsUser: 0, capabilities: {add: [SETUID]}}"])
def test_no_agent_of_a_locked_pod_can_become_the_sidecar(foreign, theirs):
    container = "name: main, image: agent, securityContext: " + theirs.replace("{", "{{").replace("}", "}}") + ","
    text = FOREIGN.replace("name: main, image: agent,", container)
    patch = {"patch": "{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: foreign}, spec: {replicas: 3}}"}
    lock = ["sidecar", "egress-lock"]
    for container in pod_of(foreign("StatefulSet", {"sidebearer": "agent"}, text, lock, patches=[patch]))["containers"]:
        security = container["securityContext"]
        assert (security["allowPrivilegeEscalation"], security["capabilities"]) == (False, {"drop": ["ALL"]})
        # What is theirs otherwise stays.
        assert set(security) - {"runAsUser"} == {"allowPrivilegeEscalation", "capabilities"}


def test_a_variable_that_came_from_elsewhere_is_ours_alone(foreign, variables):
    taken = "env: [{{name: HTTPS_PROXY, valueFrom: {{configMapKeyRef: {{name: theirs, key: proxy}}}}}}]"
    text = FOREIGN.replace("env: [{{name: MODE, value: fast}}]", taken)
    main = pod_of(foreign("Deployment", {"sidebearer": "agent"}, text))["containers"][0]
    assert {one["name"]: one for one in main["env"]} == {name: {"name": name, "value": value} for name, value in variables.items()}


def test_without_the_label_nothing_changes(foreign):
    pod = pod_of(foreign("Deployment", {"app": "foreign"}))
    assert "sidebearer" not in json.dumps(pod)


def test_only_the_sidecar_mounts_secrets_and_state(rendered):
    for one in rendered["examples"]:
        if one["kind"] not in WORKLOADS:
            continue
        pod = pod_of(one)
        for container in pod.get("initContainers", []) + pod["containers"]:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert ("sidebearer-secrets" in mounted, "sidebearer-state" in mounted) == (container["name"] == "sidebearer",) * 2
