"""The metrics as the reference's dashboards read them: names, labels and values; and what the log looks like beside them."""

import re

from blackbox import mqtt, pages, sdk, wait
from blackbox.site import MQTT_PORT

COMMON = {"iothub", "edge_device", "instance_number"}
ROUTES = {
    "toReceiver": 'FROM /messages/modules/sender/outputs/out INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
    "up": "FROM /messages/modules/receiver/outputs/up INTO $upstream",
}
TRAFFIC = {"from", "to", "from_route_output", "to_route_input"}
# Labels after the common ones, and whether the reference's collector may forward the series.
OF_THE_REFERENCE = {
    "edgehub_messages_received_total": ({"route_output", "id"}, True),
    "edgehub_message_size_bytes": ({"id"}, False),
    "edgehub_messages_sent_total": (TRAFFIC | {"priority"}, True),
    "edgehub_message_send_duration_seconds": (TRAFFIC, False),
    "edgehub_message_process_duration_seconds": ({"from", "to", "priority"}, True),
    "edgehub_messages_dropped_total": ({"reason", "from", "from_route_output"}, True),
    "edgehub_messages_unack_total": ({"reason", "from", "from_route_output"}, True),
    "edgehub_queue_length": ({"endpoint", "priority"}, True),
    "edgehub_gettwin_total": ({"source", "id"}, True),
    "edgehub_gettwin_duration_seconds": ({"source", "id"}, False),
    "edgehub_reported_properties_total": ({"target", "id"}, True),
    "edgehub_reported_properties_update_duration_seconds": ({"target", "id"}, False),
    "edgehub_direct_methods_total": ({"from", "to"}, True),
    "edgehub_direct_method_duration_seconds": ({"from", "to"}, False),
    "edgehub_offline_count_total": ({"id"}, True),
    "edgehub_offline_duration_seconds": ({"id"}, True),
    "edgehub_operation_retry_total": ({"id", "operation"}, True),
    "edgehub_client_connect_failed_total": ({"id", "reason"}, True),
    "edgehub_client_connect_success_total": ({"id"}, False),
    "edgehub_client_disconnect_total": ({"id"}, False),
    "edgehub_connected_clients": (set(), False),
}
QUANTILES = {"0.1", "0.5", "0.9", "0.99"}
LOG_LINE = re.compile(r"^<[0-7]> \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [+-]\d\d:\d\d \[[A-Z]{3}\] (\[[^]]+\] )?- ")


def reference_of(name):
    """The family of a sample, and what it is to look like."""
    for family in (name, name.removesuffix("_sum"), name.removesuffix("_count")):
        if family in OF_THE_REFERENCE:
            return OF_THE_REFERENCE[family]
    return None


def assert_to_the_letter(site):
    """M1, M5: the labels of each series of the reference, no more and no fewer, and its quantiles."""
    quantiles = {}
    for name, labels, _ in pages.samples(site.pages):
        assert COMMON <= labels.keys(), (name, labels)
        expected = reference_of(name)
        if expected is None:
            continue
        wanted, telemetry = expected
        own = labels.keys() - COMMON - {"ms_telemetry", "quantile"}
        assert own == wanted, (name, labels)
        assert labels.get("ms_telemetry") == ("True" if telemetry else None), (name, labels)
        if "quantile" in labels:
            quantiles.setdefault(name, set()).add(labels["quantile"])
    assert quantiles and all(found == QUANTILES for found in quantiles.values()), quantiles


def test_messages_are_counted_on_each_part_of_their_way(site):
    """M2: device or module, to a module, upstream."""
    receiver = site.modules["receiver"]
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as up:
        with sdk.receiver(site, receiver, lambda message: None), sdk.client(site, site.modules["sender"]) as sender:
            for _ in range(10):
                sender.send_message_to_output(sdk.message("x"), "out")
            site.wait_drained()
        assert up.login(receiver) == 0
        for number in range(1, 11):
            up.publish_acknowledged(f"{receiver.events_topic}%24.on=up", b"y", number)
        site.wait_drained()
    page = site.pages
    total = pages.total
    assert total(page, "edgehub_messages_received_total", id="edge1/sender", route_output="out") == 10
    assert total(page, "edgehub_messages_received_total", id="edge1/receiver", route_output="up") == 10
    to_module = {"from": "edge1/sender", "to": "edge1/receiver", "from_route_output": "out", "to_route_input": "in1"}
    to_cloud = {"from": "edge1/receiver", "to": "upstream", "from_route_output": "up", "to_route_input": ""}
    for way in (to_module, to_cloud):
        assert total(page, "edgehub_messages_sent_total", priority="2000000000", **way) == 10, way
        assert total(page, "edgehub_message_send_duration_seconds_count", **way) >= 1, way
        ends = {name: way[name] for name in ("from", "to")}
        assert total(page, "edgehub_message_process_duration_seconds_count", priority="2000000000", **ends) == 10
        # Seconds, not the nanoseconds that the reference mistakes for them.
        assert 0 < total(page, "edgehub_message_process_duration_seconds_sum", priority="2000000000", **ends) < 300
    assert total(page, "edgehub_message_size_bytes_count", id="edge1/sender") == 10
    assert_to_the_letter(site)


def test_what_is_lost_is_counted_with_its_reason(make_site):
    """M3: no route, expired, not stored; see also test_store_full."""
    site = make_site(ROUTES, ttl_secs=1)
    sender = site.modules["sender"]
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(sender) == 0
        wire.publish_acknowledged(f"{sender.events_topic}%24.on=nowhere", b"x", 1)
        wire.publish_acknowledged(f"{sender.events_topic}%24.on=out", b"x", 2)
    lost = {"reason": "no_route", "from": "edge1/sender", "from_route_output": "nowhere"}
    assert pages.total(site.pages, "edgehub_messages_dropped_total", **lost) == 1
    wait.until(
        "the other has expired",
        lambda: pages.total(site.pages, "edgehub_messages_dropped_total", reason="ttl_expiry") == 1,
    )
    assert_to_the_letter(site)


def test_queue_length_is_exact_during_an_outage_and_after(site):
    """M4."""
    receiver = site.modules["receiver"]
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        # Who it is is asked of the upstream.
        assert wire.login(receiver) == 0
        site.cut_upstream()
        for number in range(1, 8):
            wire.publish_acknowledged(f"{receiver.events_topic}%24.on=up", b"y", number)
            length = pages.total(site.pages, "edgehub_queue_length", endpoint="iothub", priority="2000000000")
            assert length == number
    site.restore_upstream()
    wait.until("it is empty", lambda: pages.total(site.pages, "edgehub_queue_length", endpoint="iothub") == 0, 120)
    assert pages.total(site.pages, "edgehub_offline_count_total", id="edge1/$edgeHub") >= 1
    assert_to_the_letter(site)


def test_clients_are_counted_under_the_reference_s_text(site):
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.leaf) == 0
        wait.until("it is connected", lambda: pages.total(site.pages, "edgehub_connected_clients") == 1)
    text = "DeviceId: leaf1 [IotHubHostName: cloud.test]"
    assert pages.total(site.pages, "edgehub_client_connect_success_total", id=text) >= 1
    wait.until("it has left", lambda: pages.total(site.pages, "edgehub_client_disconnect_total", id=text) >= 1)
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.leaf.with_other_key()) != 0
    failed = {"id": "leaf1", "reason": "not_authenticated"}
    wait.until(
        "it was refused", lambda: pages.total(site.pages, "edgehub_client_connect_failed_total", **failed) >= 1
    )
    assert_to_the_letter(site)


def test_log_lines_have_the_reference_s_form(site):
    """M6."""
    odd = [line for line in site.hub.text().splitlines() if line and not LOG_LINE.match(line)]
    assert not odd, odd[:5]


def test_metrics_that_are_off_are_not_there(make_site):
    """M7."""
    site = make_site(ROUTES, settings={"Metrics__Listener__MetricsEnabled": "false"})
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.leaf) == 0
        wire.publish_acknowledged(site.leaf.events_topic, b"x", 1)
    assert pages.samples(site.pages) == []
    assert pages.get(site.pages, "/healthz")[0] == 200
