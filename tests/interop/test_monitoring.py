"""The alerts and the dashboard of deploy/monitoring: Prometheus' own tool reads them, each alert is seen to come, and what
they name is there."""

import itertools
import json
import re
import subprocess

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from world import API, ROOT, SERVICE, USER

MONITORING = ROOT / "deploy/monitoring"
RULES = yaml.safe_load((MONITORING / "prometheus-rules.yaml").read_text())["spec"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

ROUTES = [
    {"host": "api.test", "provider": "service"},
    {"host": "api.test", "paths": ["/echo/once"], "provider": "service", "retry": "never"},
    {"host": "old.test", "provider": "user"},
]
# What Prometheus itself, and the PodMonitor, say of each sidecar.
FROM_PROMETHEUS = {"job", "instance", "namespace", "pod", "le"}


def promtool(*arguments, cwd):
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def rules(tmp_path):
    """The folder of a file of rules, as the operator hands it to Prometheus."""
    (tmp_path / "sidebearer.rules.yaml").write_text(yaml.safe_dump(RULES))
    return tmp_path


def without_variables(query):
    query = re.sub(r"\[\$__(rate_interval|range)\]", "[5m]", query)
    return query.replace("$namespace", ".*")


def queries():
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_each_kind_of_pod_with_a_sidecar_has_its_monitor():
    documents = [yaml.safe_load_all(path.read_text()) for path in sorted((ROOT / "deploy/kubernetes").rglob("*.yaml"))]
    manifests = [one["spec"] for one in itertools.chain(*documents) if isinstance(one, dict) and "spec" in one]
    # A patch of a component may name no labels.
    templates = [one["template"] for one in manifests if "metadata" in one.get("template", {})]
    monitors = list(yaml.safe_load_all((MONITORING / "podmonitor.yaml").read_text()))
    scraped = []
    for monitor in monitors:
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["path"] == "/metrics"
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        pods = [one for one in templates if wanted <= one["metadata"].get("labels", {}).items()]
        named = [port for pod in pods for port in ports(pod["spec"]) if port.get("name") == endpoint["port"]]
        assert named, monitor["metadata"]["name"]
        scraped += named
    # No pod has a health listener that no monitor knows.
    assert len(scraped) == sum(port.get("name") == "health" for one in templates for port in ports(one["spec"]))


def ports(pod):
    containers = pod.get("initContainers", []) + pod.get("containers", [])
    return [port for container in containers for port in container.get("ports", [])]


def test_prometheus_takes_the_rules(rules):
    promtool("check", "rules", "sidebearer.rules.yaml", cwd=rules)


def test_each_alert_comes_when_it_should_and_not_before(rules):
    (rules / "rules_test.yaml").write_text((MONITORING / "rules_test.yaml").read_text())
    promtool("test", "rules", "rules_test.yaml", cwd=rules)
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    seen = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert seen == {alert["alert"] for alert in ALERTS}


def test_whoever_is_woken_finds_out_what_to_do():
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        path, anchor = alert["annotations"]["runbook_url"].split("#")
        assert anchor == alert["alert"].lower()
        _, runbook = (ROOT / path).read_text().split(f"\n### {alert['alert']}\n\n")
        assert runbook.split("\n###")[0].strip(), alert["alert"]


def test_prometheus_takes_each_query_of_the_dashboard(tmp_path):
    rules = [{"record": f"panel:{number}", "expr": without_variables(query)} for number, query in enumerate(queries())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "--lint=none", "queries.yaml", cwd=tmp_path)


def test_the_dashboard_asks_for_its_data_source_and_no_panel_covers_another():
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "namespace"] and "id" not in DASHBOARD
    asked = [panel["datasource"] for panel in PANELS]
    asked += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert {json.dumps(source) for source in asked} == {'{"type": "prometheus", "uid": "${datasource}"}'}
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for one, other in itertools.combinations([panel["gridPos"] for panel in everything], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert [panel["title"] for panel in everything if panel["type"] == "row"] == [
        "Is it serving?", "Who must reconnect?", "Is the provider failing?", "What does it cost?",
    ]


def test_whatever_rules_and_dashboard_name_is_in_a_scrape(sidebearer, servers):
    """Metrics and labels, of a sidecar that has had one of everything."""
    agent = sidebearer(providers={"service": SERVICE, "user": USER}, routes=ROUTES, health="127.0.0.1:0", audit={"file": "audit"})
    agent.connect("user")
    running = agent.run()
    with running.client() as client:
        client.get(f"{API}/echo")
        servers.tell("revoke")
        client.get(f"{API}/echo")
        servers.tell("revoke")
        client.get(f"{API}/echo/once")
        client.get(f"{API}/echo?access_token=refused")
        client.get("https://old.test/echo")
    text = httpx.get(f"http://{said(running)['health']}/metrics", timeout=60).text
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for query in queries() + [alert["expr"] for alert in ALERTS]:
        named = set(re.findall(r"\b(?:sidebearer|process)_[a-z_]+\b", query))
        assert named <= labels.keys(), f"{named - labels.keys()} in {query}"
        if not named:
            assert query == 'up{job="sidebearer"} == 0'
            continue
        grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", query)
        used = {label.strip() for group in grouped for label in group.split(",")}
        used |= {label for group in re.findall(r"{([^}]*)}", query) for label in re.findall(r"(\w+)[=!]", group)}
        assert used - FROM_PROMETHEUS <= set().union(*(labels[name] for name in named)), query
    for panel in PANELS:
        for target in panel["targets"]:
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            named = re.findall(r"\b(?:sidebearer|process)_[a-z_]+\b", target["expr"])
            assert used - FROM_PROMETHEUS <= set().union(*(labels[name] for name in named)), target


def said(running):
    return next(event for event in running.events() if event["message"] == "listening")
