"""Fixtures, and the closing lines of the suite."""

import pytest

from world import SERVICE, Servers, Sidebearer

FIGURES = []


@pytest.fixture(scope="session")
def all_servers(tmp_path_factory):
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()


@pytest.fixture
def servers(all_servers):
    all_servers.tell("reset")
    return all_servers


@pytest.fixture
def sidebearer(servers, tmp_path):
    """Makes a configured `sidebearer`; without arguments, one that routes the API to a client-credentials provider."""
    made = []

    def make(**settings):
        settings.setdefault("providers", {"service": SERVICE})
        made.append(Sidebearer(servers, tmp_path / f"sidebearer-{len(made)}", **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def figure(request):
    """Keeps a measured figure for the end of the run, where people look."""
    return lambda text: FIGURES.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        count = {outcome: len(reporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")}
        skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
        print(f"{count['passed']} passed, {count['failed'] + count['error']} failed{skipped}")
