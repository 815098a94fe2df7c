"""Fixtures: the servers in a network of their own, the image as it is shipped, and a kubelet's work done by podman."""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# The servers, and the search for secrets, are the interop suite's.
sys.path.insert(1, str(Path(__file__).parent.parent / "interop"))

from containers import ARCH, Engine, build_agent, build_sidebearer
from kubelet import IDLE, KUBERNETES, Kubelet, find, kustomize, pod_of
from leaks import canaries, leaks
from network import NameServer, leave_the_network
from postgres import Postgres
from world import Servers


@pytest.fixture(scope="session")
def all_servers(tmp_path_factory):
    leave_the_network()
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()


@pytest.fixture
def servers(all_servers):
    all_servers.tell("reset")
    return all_servers


@pytest.fixture(scope="session")
def built():
    """The folder that build.sh has filled."""
    return build_sidebearer()


@pytest.fixture(scope="session")
def program(built):
    """The static program for this machine."""
    return next(path for path in built.glob(f"sidebearer-*-{ARCH}"))


@pytest.fixture(scope="session")
def engine(built, tmp_path_factory):
    engine = Engine(tmp_path_factory.mktemp("containers"))
    engine.load(next(built.glob("*.oci.tar")))
    build_agent(engine, tmp_path_factory.mktemp("agent"))
    yield engine
    engine.close()
    shutil.rmtree(engine.folder)


@pytest.fixture
def kubelet(engine, servers, tmp_path):
    with kubelet_in(engine, servers, tmp_path) as kubelet:
        yield kubelet


@contextmanager
def kubelet_in(engine, servers, folder):
    """Runs pods; in the end, what their containers wrote is searched for every secret there was."""
    kubelet = Kubelet(engine, servers, folder)
    yield kubelet
    kubelet.stop_all()
    # LEK-001, LEK-006
    assert list(leaks(kubelet.outputs, list(canaries(servers)))) == []


@pytest.fixture
def postgres(all_servers):
    postgres = Postgres(all_servers.certificates)
    yield postgres
    postgres.close()


@pytest.fixture(scope="class")
def pod(engine, all_servers, tmp_path_factory):
    """One for all tests of a class: the deployment of the examples, with an agent that waits to be told what to do."""
    deployment = pod_of(find(kustomize(KUBERNETES / "examples"), "Deployment", "researcher"))
    with kubelet_in(engine, all_servers, tmp_path_factory.mktemp("pod")) as kubelet:
        yield kubelet.run("deployment", deployment, IDLE)


@pytest.fixture
def dns(servers):
    """A name server that knows one address for every name."""
    with NameServer() as server:
        yield server
