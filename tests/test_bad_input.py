"""Hostile and broken clients: each ends its own connection and nothing else."""

import socket
import struct

import pytest

from blackbox import mqtt, pages, wait
from blackbox.site import MQTT_PORT

# Short enough to be waited for, long enough for a client on a loaded machine.
SETTINGS = {"mqttSettings__ConnectArrivalTimeout": "00:00:06", "EDGEHUB_LISTEN__HANDSHAKE_TIMEOUT_SECS": "6"}

BEFORE_CONNECT = {
    "nothing but zeros": b"\x00" * 64,
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "publish first": mqtt.publish("devices/leaf1/messages/events/", b"x", 1),
    "ping first": b"\xc0\x00",
    "connect with reserved flag": mqtt.packet(0x10, mqtt.text("MQTT") + b"\x04\x03\x00\x3c" + mqtt.text("leaf1")),
    "connect with wrong header flags": mqtt.packet(0x1F, mqtt.text("MQTT") + b"\x04\x02\x00\x3c" + mqtt.text("leaf1")),
    "old protocol name": mqtt.connect("leaf1", "u", "p", name="MQIsdp", level=3),
    "string beyond the packet": mqtt.packet(0x10, b"\xff\xffMQTT\x04\x02\x00\x3c"),
    "bytes behind the last field": mqtt.packet(0x10, mqtt.connect("leaf1", "u", "p")[2:] + b"xx"),
    "length of five bytes": b"\x10\xff\xff\xff\xff\x01",
    "largest length": b"\x10\xff\xff\xff\x7f",
}

AFTER_CONNECT = {
    "second connect": mqtt.connect("leaf1", "u", "p"),
    "qos 2": mqtt.packet(0x34, mqtt.text("devices/leaf1/messages/events/") + b"\x00\x01x"),
    "qos 3": mqtt.packet(0x36, mqtt.text("devices/leaf1/messages/events/") + b"\x00\x01x"),
    "packet id 0": mqtt.publish("devices/leaf1/messages/events/", b"x", 0),
    "empty topic": mqtt.publish("", b"x", 1),
    "wildcard in topic": mqtt.publish("devices/+/messages/events/", b"x", 1),
    "wildcard at the start": mqtt.publish("#", b"x", 1),
    "topic not UTF-8": mqtt.publish(b"devices/leaf1/messages/events/\xff\xfe", b"x", 1),
    "topic with NUL": mqtt.publish(b"devices/leaf1/messages/events/\x00", b"x", 1),
    "topic beyond the packet": mqtt.packet(0x32, b"\x7f\xffabc"),
    "publish without packet id": mqtt.packet(0x32, mqtt.text("devices/leaf1/messages/events/")),
    "subscribe without filter": mqtt.packet(0x82, b"\x00\x01"),
    "subscribe with packet id 0": mqtt.subscribe(0, ["a"]),
    "subscribe with empty filter": mqtt.subscribe(1, [""]),
    "subscribe with bad wildcard": mqtt.subscribe(1, ["a/#/b"]),
    "subscribe with wrong flags": mqtt.packet(0x80, b"\x00\x01" + mqtt.text("a") + b"\x01"),
    "ping with a body": b"\xc0\x01x",
    "disconnect with a body": b"\xe0\x01x",
    "puback cut short": b"\x40\x01\x00",
    "suback from a client": b"\x90\x03\x00\x01\x01",
    "pubrel from a client": b"\x62\x02\x00\x01",
    "reserved type 0": b"\x00\x00",
    "reserved type 15": b"\xf0\x00",
    "twin request without id": mqtt.publish("$iothub/twin/GET/", b"", 1),
}


def connection(site, **options):
    return mqtt.Connection(site.address, MQTT_PORT, site.authority.root, **options)


@pytest.fixture(autouse=True)
def others_go_on(site):
    """A client that was there before is still served, the hub lives, and it has not panicked."""
    with connection(site) as other:
        assert other.login(site.leaves[2]) == 0
        yield
        other.publish_acknowledged(site.leaves[2].events_topic, b"still here", 7)
    assert site.hub.running()
    site.hub.assert_no_panic()


@pytest.mark.parametrize("data", BEFORE_CONNECT.values(), ids=BEFORE_CONNECT.keys())
def test_malformed_before_connect_closes(site, data):
    with connection(site) as wire:
        wire.send(data)
        wire.expect_closed()


@pytest.mark.parametrize("data", AFTER_CONNECT.values(), ids=AFTER_CONNECT.keys())
def test_malformed_after_connect_closes(site, data):
    with connection(site) as wire:
        assert wire.login(site.leaf) == 0
        wire.send(data)
        wire.expect_closed()


def test_another_protocol_level_is_told_so(site):
    for level in (3, 5, 6):
        with connection(site) as wire:
            wire.send(mqtt.connect("leaf1", "u", "p", level=level))
            assert wire.expect(mqtt.CONNACK) == b"\x00\x01"
            wire.expect_closed()


def test_a_session_is_read_byte_by_byte(site):
    with connection(site) as wire:
        for byte in mqtt.connect_as(site.leaf) + mqtt.publish(site.leaf.events_topic, b"slow", 9):
            wire.send(bytes([byte]))
        assert wire.expect(mqtt.CONNACK) == b"\x00\x00"
        assert wire.expect(mqtt.PUBACK) == b"\x00\x09"


def test_a_connect_that_never_completes_is_given_up(site):
    with connection(site) as wire:
        wire.send(mqtt.connect_as(site.leaf)[:-1])
        wire.expect_closed()


def test_a_client_that_says_nothing_is_given_up(site):
    with connection(site) as silent_after_handshake, connection(site, handshake=False) as silent:
        silent_after_handshake.expect_closed()
        silent.expect_closed()


def test_a_silent_client_is_cut_after_its_keep_alive(site):
    with connection(site) as wire:
        assert wire.login(site.leaf, keep_alive_secs=4) == 0
        wire.ping()
        wire.expect_closed()


def test_something_else_than_tls_is_refused(site):
    for data in (mqtt.connect_as(site.leaf), b"\x16\x03\x01\xff\xff" + b"\x00" * 1000, b"GET / HTTP/1.1\r\n\r\n"):
        with connection(site, handshake=False) as wire:
            wire.send(data)
            # A TLS alert may come first; it is no MQTT packet that could be waited for.
            with pytest.raises((mqtt.Closed, AssertionError)) as ended:
                while True:
                    wire.receive()
            assert ended.type is mqtt.Closed


def test_connections_that_are_reset_in_the_middle_leave_nothing(site):
    half = mqtt.publish(site.leaf.events_topic, b"x" * 100_000, 1)[:50_000]
    for _ in range(20):
        wire = connection(site)
        assert wire.login(site.leaf) == 0
        wire.send(half)
        wire._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.close()
    wait.until(
        "only the other client is connected",
        lambda: pages.total(site.pages, "edgehub_connected_clients") == 1,
    )


def test_unknown_topics_and_broken_bags_are_acknowledged_and_counted(site):
    def counted():
        return pages.total(site.pages, "edgehub_messages_dropped_total", reason="bad_topic")

    before = counted()
    with connection(site) as wire:
        assert wire.login(site.leaf) == 0
        for packet_id, topic in enumerate(("no/such/topic", "$edgehub/x", "devices/leaf1/messages/events/a=b=c"), 1):
            wire.publish_acknowledged(topic, b"x", packet_id)
        wire.ping()
    wait.until("unknown topics are counted", lambda: counted() >= before + 2)


def test_a_flood_of_pings_is_answered(site):
    with connection(site) as wire:
        assert wire.login(site.leaf) == 0
        wire.send(b"\xc0\x00" * 1000)
        for _ in range(1000):
            assert wire.expect(mqtt.PINGRESP) == b""
