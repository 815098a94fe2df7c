"""What a kubelet does for a pod, done with podman: volumes as it lays them, native sidecars, an order of stopping."""

import base64
import json
import os
import time

import yaml

from containers import AGENT, SIDEBEARER, run
from world import ROOT, SECRETS, SERVICE, wait_for

KUBERNETES = ROOT / "deploy/kubernetes"
STORE_KEY = base64.b64encode(bytes(range(32))).decode()
CURL = ["curl", "-fsS", "https://api.test/echo"]
REQUESTS = ["python3", "-c", "import requests; print(requests.get('https://api.test/echo').text)"]
# An agent that waits to be told what to do.
IDLE = ["sleep", "3600"]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


def kustomize(folder):
    """The manifests of a folder, as `kubectl apply -k` would send them."""
    text = run("kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", folder).stdout
    return list(yaml.safe_load_all(text))


def pod_of(workload):
    return workload["spec"]["template"]["spec"]


def find(manifests, kind, name):
    return next(one for one in manifests if (one["kind"], one["metadata"]["name"]) == (kind, name))


class Kubelet:
    """Runs pods one after the other: all have the one network, and so the same ports."""

    def __init__(self, engine, servers, folder):
        self.engine, self.servers, self.folder = engine, servers, folder
        self.outputs = folder / "outputs"
        self.outputs.mkdir()
        self.pods = []

    def configuration(self, name="base/proxy.yaml", **settings):
        """A proxy.yaml that is shipped, with the servers that there are in place of those of the example."""
        names, ports = ("auth", "api"), self.servers.ports
        shipped = yaml.safe_load((KUBERNETES / name).read_text())
        return shipped | {
            # `off`, which YAML 1.1, as this reads it, takes for a boolean.
            "admin": shipped["admin"] or "off",
            "extra_ca_files": ["/run/secrets/sidebearer/company.pem"],
            "resolve": {f"{name}.test:443": f"127.0.0.1:{ports[name]}" for name in names},
            "providers": {"service": SERVICE | {"client_secret": "${file:/run/secrets/sidebearer/client-secret}"}},
            "routes": [{"host": "api.test", "provider": "service"}],
        } | settings

    def secrets(self):
        company = self.servers.certificates.ca.read_text()
        return {"store-key": STORE_KEY, "client-secret": SECRETS["BASIC_SECRET"] + "\n", "company.pem": company}

    def run(self, workload, pod, command=None, configuration=None, secrets=None):
        """Starts the pod of a rendered workload, with a command in place of its agent's."""
        contents = {
            "configMap": {"proxy.yaml": json.dumps(configuration or self.configuration(), indent=1)},
            "secret": secrets or self.secrets(),
        }
        made = Pod(self, f"{workload}-{len(self.pods)}", pod, command, contents)
        self.pods.append(made)
        made.start()
        return made

    def stop_all(self):
        for pod in self.pods:
            pod.remove()


class Pod:
    """The containers of one pod. podman 4.3 knows no native sidecars, makes no volume of a Secret, and gives an emptyDir to
    whoever mounts it first; so these are made here, and all else it reads from the manifest."""

    def __init__(self, kubelet, name, pod, command, contents):
        self.kubelet, self.engine, self.name = kubelet, kubelet.engine, name
        self.folder = kubelet.folder / name
        self.spec = json.loads(json.dumps(pod))
        for container in self.spec.get("initContainers", []):
            assert container.pop("restartPolicy", None) == "Always", "no other init containers here"
        self.spec["containers"] = self.spec.pop("initContainers", []) + self.spec["containers"]
        for container in self.spec["containers"]:
            if container["name"] == "sidebearer":
                container["image"] = SIDEBEARER
            else:
                container["image"] = AGENT
                container["command"] = command or container.get("command")
            # Limits that this machine may not give; ports to publish, where there is no other network.
            for name in ("resources", "ports"):
                container.pop(name, None)
        # A test restarts what it wants to have restarted.
        self.spec["restartPolicy"] = "Never"
        self.lay_volumes(contents)

    def lay_volumes(self, contents):
        for volume in self.spec["volumes"]:
            for kind in set(volume) & set(contents):
                folder = self.folder / volume["name"]
                self.lay(folder, contents[kind], volume.pop(kind).get("defaultMode", 0o644))
                volume["hostPath"] = {"path": str(folder)}
            if volume.pop("emptyDir", None) is not None:
                folder = self.folder / volume["name"]
                folder.mkdir()
                folder.chmod(0o777)
                volume["hostPath"] = {"path": str(folder)}

    def lay(self, folder, files, mode):
        """As the kubelet does, at first and at each change: a new folder, and one link that is swapped."""
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        fresh = folder / f"..{time.time_ns()}"
        fresh.mkdir()
        for name, text in files.items():
            (fresh / name).write_text(text)
            (fresh / name).chmod(mode)
            os.chown(fresh / name, 0, self.spec.get("securityContext", {}).get("fsGroup", 0))
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(f"..data/{name}")
        (folder / "..next").symlink_to(fresh.name)
        os.replace(folder / "..next", folder / "..data")

    def start(self):
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self.name}, "spec": self.spec}
        path = self.folder / "pod.yaml"
        path.write_text(yaml.safe_dump(manifest))
        self.engine.podman("play", "kube", "--network", "host", path)
        self.await_line("listening")

    def container(self, name):
        return f"{self.name}-{name}"

    def lines(self, name="sidebearer"):
        """What a container has logged; each line of a sidecar's has to be an object."""
        done = self.engine.podman("logs", self.container(name))
        text = done.stdout + done.stderr
        (self.kubelet.outputs / self.container(name)).write_text(text)
        return text.splitlines()

    def events(self):
        return [json.loads(line) for line in self.lines()]

    def await_line(self, message, times=1):
        def told():
            is_running = self.state("sidebearer")["Running"]
            found = [event for event in self.events() if event["message"] == message][times - 1:]
            assert found or is_running, f"the sidecar is gone:\n{self.lines()}"
            return found

        return wait_for(told, f"the line that says `{message}`", seconds=120)[0]

    def state(self, name):
        return self.engine.inspect(self.container(name))["State"]

    def exec(self, *command, name="agent", check=True):
        return self.engine.podman("exec", self.container(name), *command, check=check)

    def signal(self, name, signal):
        self.engine.podman("kill", "--signal", signal, self.container(name))

    def wait(self, name, seconds=60):
        """The exit code of a container that ends by itself."""
        return int(self.engine.podman("wait", self.container(name), timeout=seconds).stdout)

    def restart(self, name):
        self.engine.podman("restart", "--time", "20", self.container(name))

    def remove(self):
        for container in self.spec["containers"]:
            if self.engine.podman("container", "exists", self.container(container["name"]), check=False).returncode == 0:
                self.lines(container["name"])
        self.engine.podman("pod", "rm", "--force", "--time", "0", self.name, check=False)
