"""MQTT over WebSocket on the HTTPS port: unmodified SDKs, a foreign client, and broken ones."""

import json
import queue
import ssl
import struct
import threading

import paho.mqtt.client as paho
import pytest

from blackbox import mqtt, sdk, wait, websocket
from blackbox.node import Client as NodeClient
from blackbox.site import HTTPS_PORT, WEBSOCKETS
from blackbox.websocket import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, WebSocket

SETTINGS = WEBSOCKETS
ROUTES = {
    "up": "FROM /messages/* WHERE IS_DEFINED(marker) INTO $upstream",
    "toModule": 'FROM /messages/modules/sender/outputs/out INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
}


def marked(marker):
    return lambda record: record["properties"].get("marker") == marker


def test_the_python_sdk_sends_as_device_and_module(site):
    for identity in (site.leaf, site.modules["sender"]):
        marker = f"py-{identity.client_id}"
        with sdk.client(site, identity, websockets=True) as client:
            for n in range(20):
                client.send_message(sdk.message(str(n), {"marker": marker, "k": "50 % / ü"}))
        records = site.cloud.wait_telemetry(marker, marked(marker), 20)
        assert [int(record["body"]) for record in records] == list(range(20))
        assert {record["properties"]["k"] for record in records} == {"50 % / ü"}


def test_a_module_receives_over_websocket_what_came_over_tcp(site):
    received = queue.Queue()
    with sdk.receiver(site, site.modules["receiver"], received.put, websockets=True):
        with sdk.client(site, site.modules["sender"]) as sender:
            for n in range(30):
                sender.send_message_to_output(sdk.json_message(json.dumps({"n": n})), "out")
        numbers = [json.loads(received.get(timeout=wait.DEADLINE_SECS).data)["n"] for _ in range(30)]
        assert numbers == list(range(30))
        site.wait_drained()


@pytest.mark.parametrize("transport", ["tcp", "ws"])
def test_the_node_sdk_sends_as_device_and_module(site, transport):
    for identity in (site.leaf, site.modules["sender"]):
        marker = f"node-{transport}-{identity.client_id.replace('/', '-')}"
        with NodeClient(site, transport, identity, "send", 10, marker) as client:
            assert client.wait_end() == ["sent 10"]
        records = site.cloud.wait_telemetry(marker, marked(marker), 10)
        assert [json.loads(record["body"])["n"] for record in records] == list(range(10))
        assert {record["properties"]["naïve key"] for record in records} == {"50 % / ü & = ?"}


@pytest.mark.parametrize("transport", ["tcp", "ws"])
def test_a_node_module_receives_what_a_node_module_sends(site, transport):
    with NodeClient(site, transport, site.modules["receiver"], "receive", 10, "none") as receiver:
        receiver.wait_line("ready")
        with NodeClient(site, transport, site.modules["sender"], "output", 10, f"out-{transport}") as sender:
            assert sender.wait_end() == ["sent 10"]
        receiver.wait_line('got in1 {"n":9}')
        site.wait_drained()
        assert receiver.lines[1:] == [f'got in1 {{"n":{n}}}' for n in range(10)]


def test_a_foreign_client_on_another_path(site):
    identity, count = site.leaf, 200
    client = paho.Client(client_id=identity.client_id, transport="websockets")
    client.tls_set(ca_certs=str(site.authority.root), tls_version=ssl.PROTOCOL_TLS_CLIENT)
    client.ws_set_options(path="/any/path?x=1")
    client.username_pw_set(identity.username, identity.token())
    client.max_inflight_messages_set(count)
    acknowledged, complete = [], threading.Event()

    def on_publish(_client, _userdata, packet_id):
        acknowledged.append(packet_id)
        if len(acknowledged) == count:
            complete.set()

    client.on_publish = on_publish
    client.connect(site.address, HTTPS_PORT)
    client.loop_start()
    try:
        sent = [client.publish(identity.events_topic + "marker=paho", str(n), qos=1).mid for n in range(count)]
        assert complete.wait(wait.DEADLINE_SECS), f"{len(acknowledged)} of {count} acknowledged"
        assert acknowledged == sent, "acknowledgements come in the order of the messages"
    finally:
        client.disconnect()
        client.loop_stop()
    records = site.cloud.wait_telemetry("paho", marked("paho"), count)
    assert [int(record["body"]) for record in records] == list(range(count))


def test_packets_in_fragments_and_several_in_one_message(site):
    packets = mqtt.connect_as(site.leaf) + mqtt.publish(site.leaf.events_topic + "marker=cut", b"cut", 9)
    with WebSocket(site, HTTPS_PORT) as wire:
        assert wire.status == 101, wire.head
        wire.send(websocket.frame(BINARY, packets[:1], final=False))
        for byte in packets[1:40]:
            wire.send(websocket.frame(CONTINUATION, bytes([byte]), final=False))
        wire.send(websocket.frame(PING, b"between"), websocket.frame(CONTINUATION, packets[40:60]))
        wire.expect(PONG, b"between")
        wire.send(websocket.frame(BINARY, packets[60:]))
        # A hub that comes to it late answers both in one message.
        wire.expect_bytes(b"\x20\x02\x00\x00" + b"\x40\x02\x00\x09")
        # A large message comes in several frames' worth of bytes and counts as one.
        body = b"x" * 200_000
        wire.send(websocket.frame(BINARY, mqtt.publish(site.leaf.events_topic + "marker=large", body, 10)))
        wire.expect(BINARY, b"\x40\x02\x00\x0a")
        wire.send(websocket.frame(BINARY, b"\xe0\x00"))
        wire.expect(CLOSE, struct.pack(">H", 1000))
        wire.send(websocket.frame(CLOSE, struct.pack(">H", 1000)))
        wire.expect_end()
    assert site.cloud.wait_telemetry("large", marked("large"))[0]["body"] == body


def test_the_client_closes_in_order(site):
    with WebSocket(site, HTTPS_PORT) as wire:
        wire.send(websocket.frame(BINARY, mqtt.connect_as(site.leaf)))
        wire.expect(BINARY, b"\x20\x02\x00\x00")
        wire.send(websocket.frame(CLOSE, struct.pack(">H", 1001)))
        wire.expect(CLOSE, struct.pack(">H", 1001))
        wire.expect_end()


@pytest.mark.parametrize("after_login", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("text", websocket.frame(TEXT, b"x"), 1003),
        ("no mask", b"\x82\x01x", 1002),
        ("endless frame", b"\x82\xff\x7f" + b"\xff" * 7 + b"mask", 1009),
        ("stray continuation", websocket.frame(CONTINUATION, b"x"), 1002),
    ],
)
def test_broken_frames_end_their_connection(site, name, data, code, after_login):
    del name
    with WebSocket(site, HTTPS_PORT) as wire:
        if after_login:
            wire.send(websocket.frame(BINARY, mqtt.connect_as(site.leaf)))
            wire.expect(BINARY, b"\x20\x02\x00\x00")
        wire.send(data)
        opcode, payload = wire.receive()
        assert (opcode, payload[:2]) == (CLOSE, struct.pack(">H", code))
        wire.expect_end()


def test_what_is_no_upgrade_is_answered(site):
    for changed, status in [
        ({"Sec-WebSocket-Protocol": None}, 400),
        ({"Sec-WebSocket-Protocol": "xmpp"}, 400),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Key": "short"}, 400),
        ({"Upgrade": "h2c"}, 426),
        ({"Upgrade": None, "Connection": None}, 426),
        ({"path": "/twins/leaf1/methods", "Upgrade": None, "Connection": None}, 405),
    ]:
        with WebSocket(site, HTTPS_PORT, **changed) as wire:
            assert wire.status == status, (changed, wire.head)


def test_a_wrong_key_is_refused(site):
    with WebSocket(site, HTTPS_PORT) as wire:
        wire.send(websocket.frame(BINARY, mqtt.connect_as(site.leaf.with_other_key())))
        wire.expect(BINARY, b"\x20\x02\x00\x05")
        wire.expect(CLOSE, struct.pack(">H", 1000))
