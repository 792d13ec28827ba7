"""The AMQP listeners: over TLS, in a WebSocket, without TLS when asked for; and the head behind each."""

import re
import socket

import pytest

from blackbox import mqtt, websocket
from blackbox.site import HTTPS_PORT
from blackbox.websocket import BINARY, WebSocket

AMQP_PORT = 5671
# The protocol headers of the SASL layer and of AMQP itself (OASIS AMQP 1.0, part 5.3.2 and part 2.2).
SASL = b"AMQP\x03\x01\x00\x00"
AMQP = b"AMQP\x00\x01\x00\x00"
MECHANISMS = b"\x00\x53\x40"  # the descriptor of the frame in which the server offers its mechanisms


@pytest.fixture(scope="module")
def listening(request, tmp_path_factory):
    """A site whose hub has every listener on."""
    from conftest import EVERYTHING_UP, running_site

    settings = {
        "amqpSettings__enabled": "true", "httpSettings__enabled": "true", "EDGEHUB_LISTEN__AMQP_PLAIN": 0,
    }  # fmt: skip
    with running_site(tmp_path_factory.mktemp("site"), EVERYTHING_UP, settings=settings) as site:
        yield site


def read_at_least(stream, count):
    data = b""
    while len(data) < count:
        part = stream.recv(4096)
        assert part, f"the hub ended the connection after {data!r}"
        data += part
    return data


def assert_amqp(stream):
    """The head answers the SASL header with its own, and offers its mechanisms."""
    stream.sendall(SASL)
    answer = read_at_least(stream, len(SASL) + 8 + len(MECHANISMS))
    assert answer.startswith(SASL) and MECHANISMS in answer, answer


def test_amqp_over_tls(listening):
    with websocket.connect(listening, AMQP_PORT) as stream:
        assert_amqp(stream)


def test_amqp_without_tls_only_on_loopback(listening):
    opened = re.search(r"AMQP head is open without TLS address=127\.0\.0\.1:(\d+)", listening.hub.text())
    assert opened, listening.hub.text()
    with socket.create_connection(("127.0.0.1", int(opened.group(1))), timeout=mqtt.TIMEOUT_SECS) as stream:
        assert_amqp(stream)


@pytest.mark.parametrize("wanted", ["AMQPWSB10", "amqpwsb10", "nonsense, AMQPWSB10"])
def test_amqp_in_a_websocket(listening, wanted):
    with WebSocket(listening, HTTPS_PORT, Sec_WebSocket_Protocol=wanted) as stream:
        assert stream.status == 101 and "sec-websocket-protocol: AMQPWSB10" in stream.head, stream.head
        stream.send(websocket.frame(BINARY, SASL))
        received = b""
        while MECHANISMS not in received:
            opcode, payload = stream.receive()
            assert opcode == BINARY
            received += payload
        assert received.startswith(SASL), received


def test_without_its_listener_a_protocol_is_not_offered_in_websockets(make_site):
    site = make_site(settings={"httpSettings__enabled": "true"})  # a site's AMQP listener is off
    with WebSocket(site, HTTPS_PORT, Sec_WebSocket_Protocol="AMQPWSB10") as stream:
        assert stream.status == 400
    with WebSocket(site, HTTPS_PORT, Sec_WebSocket_Protocol="AMQPWSB10, mqtt") as stream:
        assert stream.status == 101 and "sec-websocket-protocol: mqtt" in stream.head
    with pytest.raises(OSError):
        socket.create_connection((site.address, AMQP_PORT), timeout=mqtt.TIMEOUT_SECS).close()
