"""The container engine with a storage of its own, and the two images that pods are made of."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from world import PYTHON, ROOT

# Debian's runc as root, wherever the tests run: without systemd, and with limits that need no right to raise them.
ENGINE = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
dns_servers = [{dns}]
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
STORAGE = """\
[storage]
driver = "vfs"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
SIDEBEARER, AGENT = "localhost/sidebearer:0.1.0", "localhost/agent:1"
NOT_NEEDED = ("test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "ensurepip", "config-*")
CLIENTS = ("requests", "urllib3", "idna", "certifi", "charset_normalizer")


def run(*command, check=True, timeout=300, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, **options)
    if check:
        assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def target():
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def build_sidebearer():
    """What is shipped, but for this machine only and without the shipped profile's long optimisation.

    SIDEBEARER_DIST names the folder of another build in its place.
    """
    if given := os.environ.get("SIDEBEARER_DIST"):
        return Path(given)
    out = target() / "container-test"
    with Engine(target() / "container-test-storage") as engine:
        wishes = {"ARCHES": ARCH, "PROFILE": "dev", "CARGO_PROFILE_DEV_DEBUG": "0", "OUT": str(out)}
        run(ROOT / "deploy/container/build.sh", env=engine.environment | wishes, timeout=1800)
    return out


def build_agent(engine, folder):
    """An image of curl and Python with the libraries that they have here: no registry is asked."""
    root, stdlib = folder / "root", Path(sysconfig.get_path("stdlib"))
    shutil.copytree(stdlib, root / stdlib.relative_to("/"), ignore=shutil.ignore_patterns(*NOT_NEEDED))
    for package in CLIENTS:
        shutil.copytree(Path(sysconfig.get_path("purelib")) / package, root / "app" / package)
    interpreter = Path(os.path.realpath(PYTHON))
    # Where it looks for its library.
    place(interpreter, interpreter, root)
    programs = {"python3": interpreter} | {name: Path(shutil.which(name)).resolve() for name in ("curl", "sh", "sleep")}
    for name, program in programs.items():
        place(program, Path("/bin") / name, root)
    for binary in (*programs.values(), *(stdlib / "lib-dynload").glob("*.so")):
        for library in libraries(binary):
            place(library, library, root)
    (root / "tmp").mkdir()
    (folder / "Containerfile").write_text("FROM scratch\nCOPY root /\nENV PATH=/bin PYTHONPATH=/app\nUSER 10001:10001\nCMD [\"sleep\", \"3600\"]\n")
    engine.buildah("bud", "--isolation", "chroot", "--tag", AGENT, folder)


def libraries(binary):
    for line in run("ldd", binary, check=False).stdout.splitlines():
        path = line.split("=>")[-1].split()[0]
        if path.startswith("/"):
            yield Path(path)


def place(source, at, root):
    to = root / at.relative_to("/")
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.exists():
        shutil.copy(source, to)


class Engine:
    """podman and buildah on a storage in a folder."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
        # Pods ask our name server; containers in networks of podman's ask podman's.
        self.environment, self.in_networks = (
            self.settings(name, dns) for name, dns in (("pods.conf", '"127.0.0.1"'), ("networks.conf", ""))
        )

    def settings(self, name, dns):
        (self.folder / name).write_text(ENGINE.format(folder=self.folder, dns=dns))
        paths = {"CONTAINERS_CONF": self.folder / name, "CONTAINERS_STORAGE_CONF": self.folder / "storage.conf"}
        # Health checks are run by tests, and not by timers of a systemd that may not be there.
        return os.environ | {variable: str(path) for variable, path in paths.items()} | {"DISABLE_HC_SYSTEMD": "true"}

    def podman(self, *arguments, **options):
        return run("podman", *arguments, env=self.environment, **options)

    def buildah(self, *arguments):
        return run("buildah", *arguments, env=self.environment)

    def load(self, archive):
        self.podman("load", "--quiet", "--input", archive)

    def inspect(self, container):
        return json.loads(self.podman("inspect", container).stdout)[0]

    def close(self):
        self.podman("pod", "rm", "--all", "--force", "--time", "0", check=False)
        self.podman("rm", "--all", "--force", "--time", "0", check=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder, ignore_errors=True)
