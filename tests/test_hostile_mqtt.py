"""What a client can do to others over MQTT: nothing. Hostile ones run beside a flow that must lose nothing."""

import contextlib
import socket
import ssl
import struct

import pytest

from blackbox import mqtt, pages
from blackbox.flow import Flow
from blackbox.site import MQTT_PORT
from test_bad_input import AFTER_CONNECT, BEFORE_CONNECT

CLIENTS_MAX = 40
SETTINGS = {
    "MaxConnectedClients": CLIENTS_MAX,
    "EDGEHUB_LISTEN__HANDSHAKE_TIMEOUT_SECS": "10",
}
ROUTES = {
    "up": "FROM /messages/* WHERE IS_DEFINED(marker) INTO $upstream",
    "toModule": 'FROM /messages/modules/sender/outputs/out INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
}
MIB = 1 << 20


def connection(site, **options):
    return mqtt.Connection(site.address, MQTT_PORT, site.authority.root, **options)


class TlsClient:
    """TLS by hand: what is sent, and in which pieces, is the test's business."""

    def __init__(self, site):
        context = ssl.create_default_context(cafile=str(site.authority.root))
        self._socket = socket.create_connection((site.address, MQTT_PORT), timeout=mqtt.TIMEOUT_SECS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=site.address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    @property
    def version(self):
        return self._tls.version()

    def handshake(self):
        """Runs the handshake; our last flight is kept back. In TLS 1.3 it ends with our Finished."""
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._socket.sendall(self._outgoing.read())
                self._incoming.write(self._socket.recv(65536))

    def write(self, data):
        """Encrypts `data` behind what was kept back."""
        self._tls.write(data)

    def flush(self, piece_bytes=None):
        """Sends all that was kept back, in one piece or in pieces of this size."""
        data = self._outgoing.read()
        for start in range(0, len(data), piece_bytes or len(data)):
            self._socket.sendall(data[start : start + (piece_bytes or len(data))])

    def read(self, count):
        data = b""
        while len(data) < count:
            try:
                data += self._tls.read(count - len(data))
            except ssl.SSLWantReadError:
                received = self._socket.recv(65536)
                assert received, f"the hub closed after {data!r}"
                self._incoming.write(received)
        return data


@pytest.fixture(autouse=True)
def nothing_panics(site):
    yield
    assert site.hub.running()
    site.hub.assert_no_panic()


def test_connect_comes_with_the_last_flight_of_the_handshake(site):
    with TlsClient(site) as client:
        client.handshake()
        assert client.version == "TLSv1.3"
        client.write(mqtt.connect_as(site.leaf))
        client.flush()
        assert client.read(4) == b"\x20\x02\x00\x00"


def test_a_whole_session_comes_with_the_last_flight_of_the_handshake(site):
    marker = "one-segment"
    with TlsClient(site) as client:
        client.handshake()
        client.write(mqtt.connect_as(site.leaf))
        client.write(mqtt.subscribe(1, ["devices/leaf1/messages/devicebound/#"]))
        client.write(mqtt.publish(f"{site.leaf.events_topic}marker={marker}", b"x", 2))
        client.flush()
        assert client.read(4) == b"\x20\x02\x00\x00"
        answers = client.read(9)
        assert answers in (b"\x90\x03\x00\x01\x01\x40\x02\x00\x02", b"\x40\x02\x00\x02\x90\x03\x00\x01\x01")
    site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker)


def test_every_byte_of_handshake_and_connect_comes_alone(site):
    with TlsClient(site) as client:
        client.handshake()
        for byte in mqtt.connect_as(site.leaf):
            client.write(bytes([byte]))
        client.flush(piece_bytes=1)
        assert client.read(4) == b"\x20\x02\x00\x00"


def test_what_is_sent_before_connack_is_served_in_order(site):
    marker = "pipelined"
    topic = f"{site.leaf.events_topic}marker={marker}"
    with connection(site) as wire:
        publishes = b"".join(mqtt.publish(topic, str(n).encode(), n + 10) for n in range(50))
        filters = mqtt.subscribe(1, ["$iothub/twin/res/#", "devices/leaf1/messages/devicebound/#"])
        wire.send(mqtt.connect_as(site.leaf) + filters + publishes + b"\xc0\x00")
        assert wire.expect(mqtt.CONNACK) == b"\x00\x00"
        answers = [wire.receive() for _ in range(52)]
    acknowledged = [struct.unpack(">H", payload)[0] for first, payload in answers if first == mqtt.PUBACK]
    assert acknowledged == list(range(10, 60))
    assert (mqtt.SUBACK, b"\x00\x01\x01\x01") in answers and (mqtt.PINGRESP, b"") in answers
    records = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker, 50)
    assert [int(record["body"]) for record in records] == list(range(50))


def test_malformed_packets_of_every_kind_disturb_no_other_client(site):
    with Flow(site, site.leaves[2], "beside-malformed") as flow:
        for data in BEFORE_CONNECT.values():
            with connection(site) as wire:
                wire.send(data)
                wire.expect_closed()
        flow.goes_on()
        for data in AFTER_CONNECT.values():
            with connection(site) as wire:
                assert wire.login(site.leaf) == 0
                wire.send(data)
                wire.expect_closed()
        flow.goes_on()


def test_a_module_that_never_reads_costs_others_nothing(site):
    body = b"x" * 200_000
    with contextlib.ExitStack() as stack:
        flow = stack.enter_context(Flow(site, site.leaves[2], "beside-deaf"))
        deaf = stack.enter_context(connection(site))
        assert deaf.login(site.modules["receiver"], clean=False) == 0
        deaf.send(mqtt.subscribe(1, [f"devices/{site.modules['receiver'].device}/modules/receiver/inputs/#"]))
        assert deaf.expect(mqtt.SUBACK) == b"\x00\x01\x01"
        sender = stack.enter_context(connection(site))
        assert sender.login(site.modules["sender"]) == 0
        topic = f"{site.modules['sender'].events_topic}%24.on=out"
        before = site.hub.resident_bytes()
        for number in range(1, 301):
            sender.publish_acknowledged(topic, body, number)
        flow.goes_on()
        # 60 MB wait for the module: on disk, but for one window, the newest entries, and what the store caches.
        assert site.hub.resident_bytes() - before < 40 * MIB
        # The module is not lost: whatever it reads later is whole.
        received = 0
        while received < 5:
            first, payload = deaf.receive()
            assert first & 0xF0 == mqtt.PUBLISH and payload.endswith(body)
            topic_bytes = struct.unpack(">H", payload[:2])[0]
            deaf.send(mqtt.packet(mqtt.PUBACK, payload[2 + topic_bytes : 4 + topic_bytes]))
            received += 1


def test_a_client_that_asks_and_never_reads_is_not_listened_to(site):
    """Pings and twin requests have answers that would fill the memory; the hub stops reading instead."""
    requests = {
        "pings": b"\xc0\x00" * 32_768,
        "twin requests": mqtt.publish("$iothub/twin/GET/?$rid=" + "r" * 900, b"", qos=0) * 70,
    }
    with Flow(site, site.leaves[2], "beside-asking") as flow:
        for name, data in requests.items():
            with connection(site) as wire:
                assert wire.login(site.leaf) == 0
                wire.send(mqtt.subscribe(1, ["$iothub/twin/res/#"]))
                assert wire.expect(mqtt.SUBACK) == b"\x00\x01\x01"
                before = site.hub.resident_bytes()
                wire._socket.settimeout(0.5)
                sent = 0
                with contextlib.suppress(TimeoutError, ssl.SSLError, ConnectionError):
                    while sent < 256 * MIB:
                        wire._socket.sendall(data)
                        sent += len(data)
                flow.goes_on()
                assert site.hub.resident_bytes() - before < 32 * MIB, name
                assert sent < 256 * MIB, f"{name}: the hub listens to who never reads"


def test_connections_that_never_say_who_they_are_keep_nobody_out(site):
    def refused():
        return pages.total(site.pages, "edgehub_connections_refused_total", reason="before_login")

    before = refused()
    with contextlib.ExitStack() as stack:
        flow = stack.enter_context(Flow(site, site.leaves[2], "beside-silent"))
        silent = [stack.enter_context(connection(site)) for _ in range(3 * CLIENTS_MAX)]
        # Half a CONNECT is none.
        silent[-1].send(mqtt.connect_as(site.leaf)[:-1])
        with connection(site) as wire:
            assert wire.login(site.leaf) == 0
        for early in silent[:CLIENTS_MAX]:
            early.expect_closed()
        flow.goes_on()
    assert refused() - before >= 3 * CLIENTS_MAX - CLIENTS_MAX // 2 - 1
