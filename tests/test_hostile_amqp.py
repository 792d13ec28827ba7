"""What a client can do to others over AMQP: nothing. Hostile ones run beside flows that must lose nothing, before and after
their login, in TLS and in WebSockets."""

import concurrent.futures
import contextlib
import socket
import ssl
import struct
import time

import pytest

from blackbox import amqp, raw
from blackbox.amqp import Wire, described, frame, performative, sequence, symbol, table, text, uint, variable
from blackbox.flow import Flow, OverAmqp, OverMqtt
from blackbox.site import WEBSOCKETS

SETTINGS = {"amqpSettings__enabled": "true", "RuntimeLogLevel": "info", **WEBSOCKETS}
ROUTES = {
    "up": "FROM /messages/* WHERE IS_DEFINED(marker) INTO $upstream",
    "toModule": 'FROM /messages/modules/sender/* WHERE NOT IS_DEFINED(marker) INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
}
MIB = 1 << 20
STREAMS = {"tls": False, "websocket": True}
# Longer than the hub waits for a client that takes no bytes.
CUT_SECS = 180.0


def nested(levels):
    """Lists in lists, nine bytes each."""
    sizes = range(1 + 9 * (levels - 1), 0, -9)
    return b"".join(struct.pack(">BII", 0xD0, size + 4, 1) for size in sizes) + b"\x45"


def begin(properties):
    return performative(
        amqp.BEGIN, amqp.NULL, uint(0), uint(100), uint(100), uint(7), amqp.NULL, amqp.NULL, properties
    )  # fmt: skip


def fatal():
    """Frames after which a connection cannot go on."""
    yield "lists in lists", begin(table(symbol("x"), nested(4_500)))
    yield "described in described", frame(b"\x00\x53\x11" * 15_000)
    for size in (0, 4, 5, 6, 7, 65_537, 0xFFFF_FFFF):
        yield f"a frame of {size} bytes", struct.pack(">I", size) + b"\x02\x00\x00\x00" + b"\x00" * 8
    for code in (0xB0, 0xB1, 0xB3, 0xD0, 0xD1, 0xF0):
        claims = bytes([code]) + b"\xff\xff\xff\xf0" + b"\x00" * 3
        yield f"{code:#x} that claims 4 GiB", begin(table(symbol("x"), claims))
    # Each of them would be a value, and takes no byte.
    many = struct.pack(">BIIB", 0xF0, 5, 0xFFFF_FFF0, 0x43)
    yield "an array of 4 billion zeros", begin(table(symbol("x"), many))
    yield "another protocol", b"GET / HTTP/1.1\r\n\r\n"
    yield "a second open", performative(amqp.OPEN, text("again"))
    yield "a channel that nobody began", frame(described(amqp.FLOW, sequence(*[uint(0)] * 4)), channel=900)


def behind_header(site, in_websocket):
    wire = Wire(site, in_websocket)
    wire.header()
    return wire


def opened(site, in_websocket):
    return Wire(site, in_websocket).open()


def logged_in(site, in_websocket):
    return Wire(site, in_websocket).login(site.leaf)


@contextlib.contextmanager
def others(site, name):
    """A device over AMQP and one over MQTT, which notice nothing; checks both when called."""
    with Flow(site, site.leaves[1], f"amqp-{name}", OverAmqp) as over_amqp:
        with Flow(site, site.leaves[2], f"mqtt-{name}", OverMqtt) as over_mqtt:

            def go_on():
                over_amqp.goes_on()
                over_mqtt.goes_on()

            yield go_on
            go_on()


@pytest.fixture(autouse=True)
def nothing_panics(site):
    yield
    assert site.hub.running()
    site.hub.assert_no_panic()


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("state", [behind_header, opened, logged_in])
def test_a_hostile_frame_ends_its_connection_with_an_error(site, state, stream):
    before = site.hub.resident_bytes()
    with others(site, f"fatal-{state.__name__}-{stream}"):
        for name, content in fatal():
            if state is behind_header and name == "a second open":
                continue
            with state(site, STREAMS[stream]) as wire:
                wire.send(content)
                condition = wire.end()
            assert str(condition).startswith("amqp:"), (name, condition)
        assert site.hub.resident_bytes() - before < 32 * MIB


@pytest.mark.parametrize("stream", STREAMS)
def test_frames_that_are_legal_and_dear_cost_nothing(site, stream):
    everything = b"".join(
        performative(amqp.DISPOSITION, role, uint(0), uint(0xFFFF_FFFE), amqp.TRUE, described(0x24, amqp.EMPTY))
        for role in (amqp.TRUE, amqp.FALSE)
    )
    # Empty, with a header of sixteen bytes.
    extended = b"\x00\x00\x00\x10\x04\x00\x00\x00" + b"\x01" * 8
    with others(site, f"dear-{stream}"):
        for state in (opened, logged_in):
            with state(site, STREAMS[stream]) as wire:
                for _ in range(20):
                    wire.send((everything + extended) * 100)
                if state is logged_in:
                    assert wire.publish(amqp.data(b"after")) == amqp.ACCEPTED
                wire.send(amqp.attach("tokens", 7, True, "$cbs"))
                assert wire.expect(amqp.ATTACH)[0] == "tokens"


@pytest.mark.parametrize("stream", STREAMS)
def test_a_hostile_message_is_refused_alone(site, stream):
    hostile = {
        "lists in annotations": described(0x72, table(symbol("x"), nested(4_500))) + amqp.data(b"x"),
        "lists through frames": described(0x77, nested(25_000)),
        "a body that claims 4 GiB": b"\x00\x53\x75\xb0\xff\xff\xff\xf0",
        "properties that claim 4 GiB": b"\x00\x53\x74\xd1\xff\xff\xff\xf0\x00\x00\x00\x02",
    }
    bombs = {"a batch of many": amqp.data(b"") * 20_000, "a batch of hostile ones": amqp.data(hostile["lists in annotations"])}
    with others(site, f"messages-{stream}"), logged_in(site, STREAMS[stream]) as wire:
        for batch, messages in ((False, hostile), (True, {**hostile, **bombs})):
            for name, message in messages.items():
                assert wire.publish(message, batch=batch) == amqp.REJECTED, name
                assert wire.publish(amqp.data(b"good")) == amqp.ACCEPTED, name


def flood(name, wire, content):
    """Sends, and reads nothing, until the hub hangs up. What it takes while it does that, it forgets at once."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    wire.socket.settimeout(1)
    content, sent = wire.packed(content), 0
    end = time.monotonic() + CUT_SECS
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while not wire.was_cut():
            assert time.monotonic() < end, f"{name}: the hub neither reads nor hangs up: it took {sent} bytes"
            # A write that waited is taken up again where it was.
            with contextlib.suppress(TimeoutError):
                sent += wire.socket.send(content[sent % len(content) :])


def test_a_client_that_asks_and_never_reads_is_not_listened_to(site):
    """Whatever is answered would fill the memory: the hub stops reading, and hangs up when nothing is taken for half a minute."""
    # Each link is refused with an attach and a detach, and that is answered ahead, so that the next may come.
    gone = performative(amqp.DETACH, uint(9), amqp.TRUE)
    asked = (amqp.attach("nowhere", 9, False, "/nowhere") + gone) * 500
    with contextlib.ExitStack() as stack:
        go_on = stack.enter_context(others(site, "deaf"))
        before = site.hub.resident_bytes()
        deaf = {
            f"{stream}, {state.__name__}": stack.enter_context(state(site, in_websocket))
            for stream, in_websocket in STREAMS.items()
            for state in (opened, logged_in)
        }
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(deaf)))
        floods = [pool.submit(flood, name, wire, asked) for name, wire in deaf.items()]
        while not all(each.done() for each in floods):
            go_on()
            assert site.hub.resident_bytes() - before < 64 * MIB
        for each in floods:
            each.result()


def test_a_module_that_settles_nothing_holds_up_nobody_else(site):
    """Neither others, nor its own other link."""
    receiver, body = site.modules["receiver"], b"x" * 200_000
    with others(site, "slow"), Wire(site).login(receiver) as slow, Wire(site).login(site.modules["sender"]) as sender:
        slow.send(amqp.attach("inputs", 1, True, raw.node_of(receiver)["inputs"]) + amqp.flow(1, 1))
        assert slow.expect(amqp.ATTACH)[0] == "inputs"
        before = site.hub.resident_bytes()
        for _ in range(300):
            assert sender.publish(amqp.data(body)) == amqp.ACCEPTED
        # 60 MB wait for the module: on disk, but for one window, the newest entries, and what the store caches.
        assert site.hub.resident_bytes() - before < 48 * MIB
        # The one message that there is credit for, in its frames; more does not come.
        received = b""
        while len(received) < len(body):
            code, _, payload = slow.receive()
            if code == amqp.TRANSFER:
                received += payload
        assert received.endswith(body)
        assert slow.publish(amqp.data(b"its own", "own")) == amqp.ACCEPTED
    site.cloud.wait_telemetry("own", lambda record: record["properties"].get("marker") == "own", 1, CUT_SECS)
