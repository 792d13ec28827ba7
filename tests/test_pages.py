"""The pages: metrics that a Prometheus parser accepts, health, and a status whose ledgers add up."""

import math
import re

from blackbox import pages, sdk, wait

COMMON = {"iothub", "edge_device", "instance_number"}
LOG_LINE = re.compile(
    r"^<[0-7]> \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [+-]\d\d:\d\d \[(VRB|DBG|INF|WRN|ERR|FTL)\] (\[[^]]+\] )?- "
)


def test_the_metrics_page_parses_and_counts(site):
    with sdk.client(site, site.leaf) as client:
        for _ in range(10):
            client.send_message(sdk.message("x", {"marker": "count"}))
        site.cloud.wait_telemetry("count", lambda record: record["properties"].get("marker") == "count", 10)
        site.wait_drained()
        address = site.pages
        assert pages.total(address, "edgehub_connected_clients") == 1
        assert pages.total(address, "edgehub_messages_received_total", id="leaf1", route_output="") == 10
        sent = {"from": "leaf1", "to": "upstream", "to_route_input": "", "priority": "2000000000"}
        assert pages.total(address, "edgehub_messages_sent_total", **sent) == 10
        assert pages.total(address, "edgehub_queue_length", endpoint="iothub") == 0
    samples = pages.samples(address)
    ours = [(name, labels, value) for name, labels, value in samples if name.startswith("edgehub_")]
    assert ours
    for name, labels, value in ours:
        assert COMMON <= labels.keys(), (name, labels)
        assert labels["edge_device"] == "edge1" and labels["iothub"] == "cloud.test"
        assert not name.endswith("_total") or value >= 0 and not math.isnan(value)
    quantiles = {labels["quantile"] for name, labels, _ in ours if name == "edgehub_message_size_bytes"}
    assert {"0.1", "0.5", "0.9", "0.99"} <= quantiles


def test_status_and_health(site):
    assert pages.get(site.pages, "/healthz")[0] == 200
    status = site.status()
    assert "upstream" in status and "queues" in status
    site.assert_balanced()
    assert pages.get(site.pages, "/nothing")[0] == 404


def test_the_upstream_state_is_seen(site):
    def state():
        return str(site.status()["upstream"])

    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message("x", {"marker": "up"}))
        site.cloud.wait_telemetry("up", lambda record: record["properties"].get("marker") == "up")
        connected = state()
        site.cut_upstream()
        wait.until("the status shows the loss", lambda: state() != connected)
        site.restore_upstream()
        client.send_message(sdk.message("x", {"marker": "up again"}))
        site.cloud.wait_telemetry("up again", lambda record: record["properties"].get("marker") == "up again", 1, 120)


def test_the_log_has_the_reference_s_line_form_and_no_secret(site):
    lines = [line for line in site.hub.text().splitlines() if line]
    assert lines
    odd = [line for line in lines if not LOG_LINE.match(line)]
    assert not odd, odd[:5]
    for identity in (site.leaf, *site.modules.values()):
        assert identity.key not in site.hub.text()
    assert "SharedAccessSignature" not in site.hub.text()
