"""A plain AMQP 1.0 client that can also misbehave: frames are written byte by byte."""

import select
import socket
import ssl
import struct

from . import websocket
from .mqtt import Closed
from .raw import AMQP_PORT, node_of
from .site import HTTPS_PORT

OPEN, BEGIN, ATTACH, FLOW, TRANSFER, DISPOSITION, DETACH, END, CLOSE = range(0x10, 0x19)
SASL_MECHANISMS, SASL_INIT, SASL_OUTCOME = 0x40, 0x41, 0x44
ACCEPTED, REJECTED = 0x24, 0x25
HEADER, SASL_HEADER = b"AMQP\x00\x01\x00\x00", b"AMQP\x03\x01\x00\x00"
NULL, TRUE, FALSE, EMPTY = b"\x40", b"\x41", b"\x42", b"\x45"
FRAME_MAX_BYTES = 65_536
TIMEOUT_SECS = 60.0


def uint(value):
    return struct.pack(">BI", 0x70, value)


def text(value):
    return variable(0xB1, value.encode())


def symbol(value):
    return variable(0xB3, value.encode())


def variable(code, data):
    return struct.pack(">BI", code, len(data)) + data


def compound(code, *items):
    data = b"".join(items)
    return struct.pack(">BII", code, len(data) + 4, len(items)) + data


def sequence(*items):
    return compound(0xD0, *items)


def table(*items):
    return compound(0xD1, *items)


def described(code, value):
    return bytes([0x00, 0x53, code]) + value


def frame(body, channel=0, kind=0):
    return struct.pack(">IBBH", len(body) + 8, 2, kind, channel) + body


def performative(code, *fields):
    return frame(described(code, sequence(*fields)))


def data(body, marker=None):
    """A message, with a marker in its application properties."""
    section = described(0x75, variable(0xB0, body))
    return section if marker is None else described(0x74, table(text("marker"), text(marker))) + section


def attach(name, handle, receiver, address):
    here, there = sequence(text("here")), sequence(text(address))
    source, target = (there, here) if receiver else (here, there)
    first = NULL if receiver else uint(0)
    return performative(
        ATTACH, text(name), uint(handle), TRUE if receiver else FALSE, NULL, NULL, described(0x28, source),
        described(0x29, target), NULL, NULL, first,
    )  # fmt: skip


def flow(handle=None, credit=0, echo=False):
    """Of a link when there is a handle, else of the session."""
    link = [NULL] * 4 if handle is None else [uint(handle), uint(0), uint(credit), NULL]
    return performative(FLOW, uint(0), uint(1 << 30), uint(0), uint(1 << 30), *link, FALSE, TRUE if echo else FALSE)


def transfer(handle, number, message, batch=False):
    """The frames of an unsettled delivery."""
    room = FRAME_MAX_BYTES - 100
    pieces = [message[start : start + room] for start in range(0, len(message), room)] or [b""]
    head = [uint(handle), uint(number), variable(0xB0, struct.pack(">I", number)), uint(0x8001_3700 if batch else 0), FALSE]
    more = [TRUE] * (len(pieces) - 1) + [FALSE]
    return b"".join(frame(described(TRANSFER, sequence(*head, last)) + piece) for last, piece in zip(more, pieces))


def decode(content, at=0):
    """A value as a Python one, (code, value) if it is described, and where it ends. Symbols are text."""
    code, at = content[at], at + 1
    if code == 0x00:
        descriptor, at = decode(content, at)
        value, at = decode(content, at)
        return (descriptor, value), at
    kind = code >> 4
    if kind in (0xA, 0xB, 0xC, 0xD, 0xE, 0xF):
        width = 1 if kind in (0xA, 0xC, 0xE) else 4
        end = at + width + int.from_bytes(content[at : at + width], "big")
        rest = content[at + width : end]
        if kind in (0xA, 0xB):
            return rest if code & 0xF == 0 else rest.decode(), end
        items, place = [], width
        if kind in (0xC, 0xD):
            while place < len(rest):
                item, place = decode(rest, place)
                items.append(item)
        return dict(zip(items[::2], items[1::2])) if code & 0xF == 1 else items, end
    size = 0 if kind == 4 else 1 << (kind - 5)
    constant = {0x40: None, 0x41: True, 0x42: False, 0x45: []}.get(code, 0)
    return int.from_bytes(content[at : at + size], "big") if size else constant, at + size


class Wire:
    """One connection in TLS or in a WebSocket; every wait has a deadline."""

    def __init__(self, site, in_websocket=False):
        self._site = site
        self._buffer = bytearray()
        self._numbers = 0
        self._websocket = None
        if in_websocket:
            self._websocket = websocket.WebSocket(site, HTTPS_PORT, Sec_WebSocket_Protocol="AMQPWSB10")
            self.socket = self._websocket._socket
        else:
            self.socket = websocket.connect(site, AMQP_PORT)
        self.socket.settimeout(TIMEOUT_SECS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def packed(self, content):
        """The bytes as they go into the stream."""
        return websocket.frame(websocket.BINARY, content) if self._websocket else content

    def send(self, content):
        """Sends; that the hub has closed already is seen when reading."""
        try:
            self.socket.sendall(self.packed(content))
        except (ConnectionError, ssl.SSLError):
            pass

    def _take(self, count):
        while len(self._buffer) < count:
            try:
                if self._websocket:
                    opcode, content = self._websocket.receive()
                    content = content if opcode == websocket.BINARY else b""
                else:
                    content = self.socket.recv(65_536)
            except TimeoutError:
                raise AssertionError(f"the hub neither answers nor closes within {TIMEOUT_SECS} s") from None
            except (ConnectionError, ssl.SSLError, EOFError):
                content = b""
            if not content:
                raise Closed()
            self._buffer += content
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def receive(self):
        """The next frame that is not empty, as (code, fields, payload)."""
        while True:
            size, offset, _, _ = struct.unpack(">IBBH", self._take(8))
            body = self._take(size - 8)[4 * offset - 8 :]
            if body:
                (code, fields), end = decode(body)
                return code, fields, body[end:]

    def expect(self, wanted):
        """The fields of the next frame of this kind, over flows and what else comes in between."""
        while True:
            code, fields, _ = self.receive()
            if code == wanted:
                return fields
            assert code not in (DETACH, END, CLOSE), f"expected {wanted:#x}, got {code:#x} {fields!r}"

    def header(self, wanted=HEADER):
        self.send(wanted)
        assert self._take(8) == wanted

    def open(self):
        """Connection and session, without anybody who is logged in."""
        self.header()
        return self._open()

    def _open(self):
        self.send(performative(OPEN, text("wire"), text(self._site.address), uint(FRAME_MAX_BYTES)))
        self.send(performative(BEGIN, NULL, uint(0), uint(1 << 30), uint(1 << 30), uint(255)))
        self.expect(BEGIN)
        return self

    def login(self, identity):
        """The same by SASL PLAIN, and the link for telemetry under handle 0."""
        node = node_of(identity)
        self.header(SASL_HEADER)
        self.expect(SASL_MECHANISMS)
        secret = f"\0{node['user']}\0{node['token']}".encode()
        self.send(frame(described(SASL_INIT, sequence(symbol("PLAIN"), variable(0xB0, secret))), kind=1))
        assert self.expect(SASL_OUTCOME)[0] == 0
        self.open()
        self.send(attach("up", 0, False, node["events"]))
        self.expect(FLOW)
        return self

    def publish(self, message, **options):
        """The outcome's descriptor of a message on handle 0."""
        self._numbers += 1
        self.send(transfer(0, self._numbers, message, **options))
        fields = self.expect(DISPOSITION)
        assert fields[1] == self._numbers, fields
        return fields[4][0]

    def end(self):
        """The condition with which the hub closes, if it says one, once the stream has ended."""
        condition = None
        try:
            while True:
                code, fields, _ = self.receive()
                if code == CLOSE and fields:
                    condition = fields[0][1][0]
        except Closed:
            return condition

    def was_cut(self):
        """Whether the hub has hung up on what it has not read; nothing is read here to find out."""
        poll = select.poll()
        poll.register(self.socket.fileno(), select.POLLERR | select.POLLHUP)
        return bool(poll.poll(0))
