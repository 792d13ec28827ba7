"""Telemetry of devices and modules arrives in the cloud as it was sent, under the right sender."""

import asyncio
import contextlib
import json

from blackbox import mqtt, sdk
from blackbox.sequence import Arrivals
from blackbox.site import MQTT_PORT


def system_property(record, name):
    """A system property by its name without regard to case and separators."""
    plain = {key.replace("-", "").replace("_", "").lower(): value for key, value in record["systemProperties"].items()}
    return plain.get(name.lower())


def check_one(site, identity, send):
    marker = f"one-{identity.client_id}"
    properties = {"marker": marker, "naïve key": "50 % / ü & = ?", "empty": ""}
    body = json.dumps({"temperature": 21.5, "unit": "°C"})
    send(sdk.message(body, properties, "application/json", "utf-8", message_id="id-1"))
    record = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker)[0]
    assert record["body"] == body.encode()
    assert (record["deviceId"], record.get("moduleId") or None) == (identity.device, identity.module)
    assert record["properties"] == properties
    assert system_property(record, "contentType") == "application/json"
    assert system_property(record, "contentEncoding") == "utf-8"
    assert system_property(record, "messageId") == "id-1"


def test_device_telemetry_keeps_properties_type_and_encoding(site):
    with sdk.client(site, site.leaf) as client:
        check_one(site, site.leaf, client.send_message)


def test_module_telemetry_keeps_properties_type_and_encoding(site):
    sender = site.modules["sender"]
    with sdk.client(site, sender) as client:
        check_one(site, sender, client.send_message)


def test_module_output_goes_up_under_the_module(site):
    sender = site.modules["sender"]
    with sdk.client(site, sender) as client:
        check_one(site, sender, lambda message: client.send_message_to_output(message, "anything"))


def test_empty_and_binary_bodies_pass(site):
    with sdk.client(site, site.leaf) as client:
        for marker, body in (("empty-body", b""), ("binary-body", bytes(range(256)))):
            client.send_message(sdk.message(body, {"marker": marker}))
            records = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker)
            assert [record["body"] for record in records] == [body]


def wait_numbers(site, marker, senders, count):
    """The bodies that arrived, as numbers, by sender."""
    records = site.cloud.wait_telemetry(
        marker, lambda record: record["properties"].get("marker") == marker, count * len(senders)
    )
    numbers = {sender.client_id: [] for sender in senders}
    for record in records:
        module = record.get("moduleId")
        numbers[f"{record['deviceId']}/{module}" if module else record["deviceId"]].append(int(record["body"]))
    return numbers


def test_many_in_flight_from_the_sdk_arrive_once(site):
    count = 150
    senders = [*site.leaves, site.modules["sender"]]

    async def send_all(identity):
        async with sdk.async_client(site, identity) as client:
            # Each call runs in a thread of the SDK's pool, so their order is not ours to judge.
            await asyncio.gather(
                *(client.send_message(sdk.message(str(n), {"marker": "many"})) for n in range(count))
            )

    async def main():
        await asyncio.gather(*(send_all(identity) for identity in senders))

    asyncio.run(main())
    for sender, numbers in wait_numbers(site, "many", senders, count).items():
        assert sorted(numbers) == list(range(count)), sender
    site.wait_drained()


def test_many_in_flight_from_several_senders_keep_their_order(site):
    count = 400
    senders = [*site.leaves, site.modules["sender"]]
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(mqtt.Connection(site.address, MQTT_PORT, site.authority.root)) for _ in senders]
        for wire, sender in zip(wires, senders):
            assert wire.login(sender) == 0
        for wire, sender in zip(wires, senders):
            topic = sender.events_topic + "marker=order"
            wire.send(b"".join(mqtt.publish(topic, str(n).encode(), n + 1) for n in range(count)))
        for wire in wires:
            acknowledged = [int.from_bytes(wire.expect(mqtt.PUBACK), "big") - 1 for _ in range(count)]
            assert acknowledged == list(range(count)), "acknowledgements come in the order of the messages"
    for sender, numbers in wait_numbers(site, "order", senders, count).items():
        assert numbers == list(range(count)), f"{sender}: {Arrivals.of(numbers)}"
    site.wait_drained()
