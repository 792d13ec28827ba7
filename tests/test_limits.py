"""A message and a packet of exactly the limit pass; one byte more does not."""

import pytest

from blackbox import mqtt
from blackbox.site import MQTT_PORT

MESSAGE_BYTES_MAX = 262_144
PACKET_BYTES_MAX = 262_144


def added_bytes(identity):
    """Names and values that the hub adds and that count against the limit."""
    size = len("edgeMessageId") + 36 + len("edgeHubOriginInterface") + len("internal")  # wherever it entered
    size += len("connectionDeviceId") + len(identity.device)
    if identity.module:
        size += len("connectionModuleId") + len(identity.module)
    return size


@pytest.fixture(params=["device", "module"])
def sender(request, site):
    return site.leaf if request.param == "device" else site.modules["sender"]


def connected(site, identity):
    wire = mqtt.Connection(site.address, MQTT_PORT, site.authority.root)
    assert wire.login(identity) == 0
    return wire


def body_for_message_of(size_bytes, identity, properties):
    used = added_bytes(identity) + sum(len(name) + len(value) for name, value in properties.items())
    return b"x" * (size_bytes - used)


def bodies_seen(site, marker, length):
    records = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("m") == marker)
    return [len(record["body"]) for record in records] == [length]


def test_the_size_of_a_message(site, sender):
    marker = f"size-{sender.device}"
    properties = {"m": marker}
    topic = f"{sender.events_topic}m={marker}"
    exact = body_for_message_of(MESSAGE_BYTES_MAX, sender, properties)
    assert len(mqtt.publish(topic, exact + b"x", 1)) <= PACKET_BYTES_MAX, "here the message's limit binds first"
    with connected(site, sender) as wire:
        wire.publish_acknowledged(topic, exact)
        wire.send(mqtt.publish(topic, exact + b"x", 2))
        wire.expect_closed()
    assert bodies_seen(site, marker, len(exact))


def packet_of(size_bytes, topic):
    header = 1 + len(mqtt.remaining_length(size_bytes))
    body = b"x" * (size_bytes - header - len(mqtt.text(topic)) - len("id"))
    packet = mqtt.publish(topic, body, 1)
    assert len(packet) == size_bytes
    return packet, body


def test_the_size_of_a_packet(site, sender):
    marker = f"packet-{sender.device}"
    # Percent-encoded, a property costs the packet three times what it counts in the message.
    topic = f"{sender.events_topic}m={marker}&p=" + "%21" * 200
    packet, body = packet_of(PACKET_BYTES_MAX, topic)
    message = len(body) + added_bytes(sender) + len("m") + len(marker) + len("p") + 200
    assert message < MESSAGE_BYTES_MAX, "here the packet's limit binds first"
    with connected(site, sender) as wire:
        wire.send(packet)
        assert wire.expect(mqtt.PUBACK) == b"\x00\x01"
        wire.send(packet_of(PACKET_BYTES_MAX + 1, topic)[0])
        wire.expect_closed()
    assert bodies_seen(site, marker, len(body))


def test_a_packet_that_only_claims_to_be_too_large_is_cut_off_at_once(site):
    with connected(site, site.leaf) as wire:
        wire.send(b"\x32" + mqtt.remaining_length(PACKET_BYTES_MAX))
        wire.expect_closed()
