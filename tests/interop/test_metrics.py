"""Metrics: what Prometheus reads of a sidecar after real traffic, as its own tool judges it."""

import re
import subprocess

import httpx
import pytest

from world import API, CONSENT, SERVICE, wait_for

FIXED = """
sidebearer_build_info sidebearer_start_time_seconds process_resident_memory_bytes process_open_fds process_max_fds
process_cpu_seconds_total sidebearer_requests_total sidebearer_refusals_total sidebearer_added_latency_seconds_bucket
sidebearer_request_seconds_bucket sidebearer_token_wait_seconds_bucket sidebearer_unauthorized_recovered_total
sidebearer_unauthorized_passed_total sidebearer_replays_skipped_total sidebearer_token_expiry_seconds sidebearer_tokens
sidebearer_renewals_total sidebearer_renewal_seconds_bucket sidebearer_grants sidebearer_store_up sidebearer_unsaved_grants
sidebearer_agent_connections sidebearer_agent_connections_max sidebearer_agent_handshakes_total sidebearer_tunnels
sidebearer_upstream_connections sidebearer_upstream_connects_total sidebearer_upstream_handshake_seconds_bucket
sidebearer_store_seconds_bucket sidebearer_store_errors_total sidebearer_config_last_reload_successful
sidebearer_config_last_reload_success_timestamp_seconds sidebearer_reloads_total sidebearer_audit_lines_total
sidebearer_ca_expiry_seconds
""".split()


def scrape(running, **headers):
    """What is there, kept for the search for secrets."""
    answer = httpx.get(f"{running.health}/metrics", headers=headers, trust_env=False, timeout=60)
    assert answer.status_code == 200
    running.sidebearer.output("metrics").write_text(answer.text)
    return answer.text


@pytest.fixture
def busy(sidebearer, servers):
    """A sidecar that has met most of what there is: renewals, 401s, refusals, tunnels."""
    routes = [{"host": host, "provider": "service"} for host in ("api.test", "old.test")]
    routes[1] |= {"retry": "never"}
    running = sidebearer(providers={"service": SERVICE, "main": CONSENT}, routes=routes, unmatched="tunnel").run()
    with running.client() as client, running.client(http2=True) as faster:
        assert client.get(f"{API}/echo").status_code == 200
        servers.tell("revoke")
        assert faster.get(f"{API}/echo").status_code == 200
        assert client.get("https://old.test/echo").status_code == 200
        servers.tell("revoke")
        assert client.get("https://old.test/echo").status_code == 401
        assert client.get("http://nowhere.test/").status_code == 502
    # It is counted once its answer is written.
    wait_for(lambda: "sidebearer_refusals_total{" in scrape(running), "the last request to be counted")
    return running


def test_a_scrape_after_real_traffic_has_what_was_promised_and_promtool_finds_nothing_wrong(busy):
    text = scrape(busy)
    judged = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=120)
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, "")
    names = set(re.findall(r"^([a-z_]+)[{ ]", text, re.M))
    assert set(FIXED) - names == set()
    value = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[:1] != "#"}
    assert value['sidebearer_unauthorized_recovered_total{provider="service"}'] == 1
    assert value['sidebearer_replays_skipped_total{provider="service",reason="retry_never"}'] == 1
    assert value['sidebearer_grants{provider="main",state="never_connected"}'] == 1
    assert value["sidebearer_store_up"] == 1


def test_prometheus_reads_both_forms(busy):
    """As a server that scrapes asks: for OpenMetrics first."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    assert scrape(busy, accept=accept).endswith("# EOF\n")
    series = lambda text: {line.rsplit(" ", 1)[0] for line in text.splitlines() if line[:1] != "#"}
    # Something may end between the two.
    wait_for(lambda: series(scrape(busy, accept=accept)) == series(scrape(busy)), "the same in both")


def test_a_probe_says_that_it_stops_while_the_last_request_is_answered(sidebearer, servers):
    running = sidebearer().run()
    with running.client() as client, client.stream("GET", f"{API}/events") as answer:
        assert answer.status_code == 200
        running.process.terminate()
        asked = lambda path: httpx.get(f"{running.health}{path}", trust_env=False, timeout=60).status_code
        wait_for(lambda: asked("/readyz") == 503, "readiness to end")
        assert asked("/livez") == 200
        wait_for(lambda: is_refused(running.address), "the listener to close")
        servers.tell("announce", data="last")
        servers.tell("fall-silent")
        assert "data: last" in list(answer.iter_lines())
    assert running.process.wait(timeout=40) == 0


def is_refused(address):
    try:
        httpx.get(f"http://{address}", trust_env=False, timeout=60)
    except httpx.ConnectError:
        return True
    except httpx.HTTPError:
        # Taken as the listener closed.
        return False
