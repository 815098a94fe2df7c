"""The unit, checked by systemd and started by one: a machine of this one's /usr, booted for a second."""

import json
import re
import shutil

import pytest
import yaml

from containers import run
from kubelet import STORE_KEY
from leaks import canaries, leaks
from world import ROOT, SECRETS, SERVICE

SYSTEMD = ROOT / "deploy/systemd"
# Each line is shown, and then what comes of it.
SCRIPT = """\
systemd-analyze verify --recursive-errors=no /etc/systemd/system/sidebearer.service
systemctl status --no-pager --lines=0 sidebearer
stat --format='%n %a %U' /run/sidebearer/ca.pem /run/sidebearer /var/lib/sidebearer/
curl --fail --silent --show-error https://api.test/echo
cp /out/next.yaml /etc/sidebearer/proxy.yaml
systemctl reload sidebearer
timeout 90 sh -c 'until curl --silent https://api.test/refused | grep denied; do sleep 0.1; done'
curl --fail --silent --show-error https://api.test/after-reload
systemctl stop sidebearer
systemctl show sidebearer --property=ExecMainStatus,Result,ActiveState
ls /run/sidebearer
journalctl --unit=sidebearer --no-pager --output=cat --boot
"""
PROBE = """\
[Unit]
Wants=sidebearer.service
After=sidebearer.service
[Service]
Type=oneshot
EnvironmentFile=/out/agent.env
StandardOutput=file:/out/transcript
StandardError=inherit
ExecStart=/bin/sh -x /out/script
ExecStopPost=systemctl exit 0
"""


def test_its_exposure_is_2_at_most():
    unit = SYSTEMD / "sidebearer.service"
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit).stdout
    assert float(re.search(r"Overall exposure level for sidebearer.service: ([0-9.]+)", said).group(1)) <= 2.0


@pytest.fixture
def machine(program, servers, tmp_path):
    """Folders of a machine that has the unit, its configuration and its secrets, and servers on its loopback."""
    folders = {name: tmp_path / name for name in ("bin", "etc", "units", "out")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copy(program, folders["bin"] / "sidebearer")
    for name in ("sidebearer.service", "sidebearer.env"):
        shutil.copy(SYSTEMD / name, folders["units" if name.endswith("service") else "etc"] / name)
    (folders["units"] / "probe.service").write_text(PROBE)
    secrets = {"store-key": STORE_KEY, "admin-token": SECRETS["ADMIN_TOKEN"], "billing-client-secret": SECRETS["BASIC_SECRET"]}
    (folders["etc"] / "secrets").mkdir(mode=0o700)
    for name, text in secrets.items():
        (folders["etc"] / "secrets" / name).write_text(text + "\n")
        (folders["etc"] / "secrets" / name).chmod(0o600)
    shutil.copy(servers.certificates.ca, folders["etc"] / "company.pem")
    return folders


def configuration(servers, **settings):
    """The one that is shipped, with the servers that there are."""
    shipped = yaml.safe_load((SYSTEMD / "proxy.yaml").read_text())
    provider = SERVICE | {"client_secret": shipped["providers"]["billing"]["client_secret"]}
    return json.dumps(shipped | {
        "extra_ca_files": ["/etc/sidebearer/company.pem"],
        "resolve": {f"{name}.test:443": f"127.0.0.1:{servers.ports[name]}" for name in ("auth", "api")},
        "providers": {"billing": provider},
        "routes": [{"host": "api.test", "provider": "billing"}],
    } | settings)


def boot(machine):
    """Boots a machine of our /usr and nothing else of ours, in our network, for the probe; gives what that wrote."""
    binds = [
        f"--bind-ro={machine['bin']}:/usr/local/bin", f"--bind={machine['etc']}:/etc/sidebearer", f"--bind={machine['out']}:/out",
        *(f"--bind-ro={unit}:/etc/systemd/system/{unit.name}" for unit in machine["units"].iterdir()),
    ]
    options = ["--quiet", f"--machine=sidebearer-{machine['out'].stat().st_ino}", "--register=no", "--keep-unit", "--volatile=yes"]
    kernel = ["systemd.firstboot=off", "systemd.mask=systemd-networkd.service", "systemd.unit=probe.service"]
    run("systemd-nspawn", *options, "--directory=/", "--boot", *binds, "--", *kernel, timeout=300)
    return (machine["out"] / "transcript").read_text()


def test_a_machine_starts_reloads_and_stops_it(machine, servers):
    (machine["etc"] / "proxy.yaml").write_text(configuration(servers))
    routes = [{"host": "api.test", "paths": ["/after-reload"], "provider": "billing"}, {"host": "api.test", "deny": True}]
    (machine["out"] / "next.yaml").write_text(configuration(servers, routes=routes))
    (machine["out"] / "script").write_text(SCRIPT)
    shutil.copy(ROOT / "deploy/env/agent.env", machine["out"])
    said = boot(machine)
    # A shell writes each command behind a `+`.
    commands = [part.partition("\n") for part in re.split(r"^\+ ", said, flags=re.M)[1:]]
    of = lambda start: next(output for command, _, output in commands if command.startswith(start))
    assert of("systemd-analyze verify") == ""
    assert "Active: active (running)" in of("systemctl status")
    # The service's user has no name any more by the time that somebody asks who it was; only the modes count.
    modes = [line.split()[1] for line in of("stat").splitlines()]
    assert modes == ["644", "755", "700"]
    for call in ("echo", "after-reload"):
        assert json.loads(of(f"curl --fail --silent --show-error https://api.test/{call}"))["authorizations"] == 1
    assert "denied" in of("timeout")
    assert {"ExecMainStatus=0", "Result=success", "ActiveState=inactive"} == set(of("systemctl show").split())
    assert "No such file" in of("ls")
    events = [json.loads(line) for line in of("journalctl").splitlines() if line.startswith("{")]
    assert [event for event in events if event["message"] == "stopped" and event["clean"]]
    assert list(leaks(machine["out"], list(canaries(servers)))) == []
