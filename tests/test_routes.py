"""Routes decide: to the input of a module, upstream, or nowhere, by source, properties and body."""

import json
import queue
import threading

from blackbox import pages, sdk, wait
from blackbox.sequence import Arrivals

ROUTES = {
    "moduleToModule": 'FROM /messages/modules/sender/outputs/alarm INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
    "backlog": 'FROM /messages/modules/sender/outputs/backlog INTO BrokeredEndpoint("/modules/receiver/inputs/in2")',
    "replies": "FROM /messages/modules/receiver/outputs/replies INTO $upstream",
    "byProperty": "FROM /messages/* WHERE level = 'high' INTO $upstream",
    "byBody": "FROM /messages/* WHERE $body.machine.temperature > 30 INTO $upstream",
}


def marker_of(record):
    return record["properties"].get("marker")


def test_a_condition_on_a_property_decides(site):
    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message("no", {"marker": "prop", "level": "low"}))
        client.send_message(sdk.message("yes", {"marker": "prop", "level": "high"}))
        client.send_message(sdk.message("no", {"marker": "prop"}))
        client.send_message(sdk.message("end", {"marker": "prop-end", "level": "high"}))
    site.cloud.wait_telemetry("prop-end", lambda record: marker_of(record) == "prop-end")
    assert [r["body"] for r in site.cloud.telemetry() if marker_of(r) == "prop"] == [b"yes"]


def test_a_condition_on_the_body_decides(site):
    with sdk.client(site, site.leaf) as client:
        for temperature in (29.5, 30, 30.5, 31):
            client.send_message(sdk.json_message(json.dumps({"machine": {"temperature": temperature}}), {"marker": "body"}))
        client.send_message(sdk.message('{"machine": {"temperature": 99}}', {"marker": "body"}))
        client.send_message(sdk.message("end", {"marker": "body-end", "level": "high"}))
    site.cloud.wait_telemetry("body-end", lambda record: marker_of(record) == "body-end")
    found = [json.loads(r["body"])["machine"]["temperature"] for r in site.cloud.telemetry() if marker_of(r) == "body"]
    # Without a declared JSON content type the hub does not look into the body.
    assert found == [30.5, 31]


def test_a_module_output_reaches_the_input_of_another_module(site):
    received = queue.Queue()
    with sdk.receiver(site, site.modules["receiver"], received.put) as receiver:
        with sdk.client(site, site.modules["sender"]) as sender:
            for n in range(50):
                sender.send_message_to_output(sdk.json_message(json.dumps({"n": n}), {"n": str(n), "k": "a b&c"}), "alarm")
        messages = [received.get(timeout=wait.DEADLINE_SECS) for _ in range(50)]
        assert [json.loads(m.data)["n"] for m in messages] == list(range(50))
        assert {m.input_name for m in messages} == {"in1"}
        assert all(m.content_type == "application/json" and m.content_encoding == "utf-8" for m in messages)
        assert all(m.custom_properties["k"] == "a b&c" for m in messages)
        receiver.send_message_to_output(sdk.message("seen", {"marker": "reply"}), "replies")
        reply = site.cloud.wait_telemetry("reply", lambda record: marker_of(record) == "reply")[0]
        assert (reply["deviceId"], reply["moduleId"]) == ("edge1", "receiver")
        site.wait_drained()


def test_messages_wait_for_a_module_that_is_away(site):
    with sdk.client(site, site.modules["sender"]) as sender:
        for n in range(40):
            sender.send_message_to_output(sdk.message(str(n)), "backlog")
    wait.until("all 40 are queued", lambda: site.queued() == 40)
    numbers, arrived = [], threading.Event()

    def take(message):
        if message.input_name == "in2":
            numbers.append(int(message.data))
            if len(set(numbers)) == 40:
                arrived.set()

    with sdk.receiver(site, site.modules["receiver"], take):
        assert arrived.wait(wait.DEADLINE_SECS), f"only {len(numbers)} arrived"
        site.wait_drained()
    arrivals = Arrivals.of(numbers)
    arrivals.assert_complete(range(40))
    arrivals.assert_ordered()
    assert arrivals.duplicates == 0, "nothing was interrupted, so nothing may come twice"


def test_a_message_without_a_route_is_acknowledged_and_counted(site):
    def no_route():
        return pages.total(site.pages, "edgehub_messages_dropped_total", reason="no_route")

    before = no_route()
    with sdk.client(site, site.leaf) as client:
        for _ in range(3):
            client.send_message(sdk.message("nobody wants it", {"marker": "nowhere"}))
    wait.until("three more are counted", lambda: no_route() == before + 3)
    assert not [r for r in site.cloud.telemetry() if marker_of(r) == "nowhere"]
