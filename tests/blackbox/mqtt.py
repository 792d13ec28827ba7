"""A plain MQTT 3.1.1 client that can also misbehave: packets are written byte by byte."""

import socket
import ssl
import struct

TIMEOUT_SECS = 60.0

CONNACK, PUBLISH, PUBACK, SUBACK, PINGRESP = 0x20, 0x30, 0x40, 0x90, 0xD0


def remaining_length(value):
    out = bytearray()
    while True:
        value, digit = divmod(value, 128)
        out.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(out)


def packet(first_byte, payload):
    return bytes([first_byte]) + remaining_length(len(payload)) + payload


def text(value):
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(encoded)) + encoded


def connect(client_id, username=None, password=None, keep_alive_secs=60, clean=True, name="MQTT", level=4):
    flags = (2 if clean else 0) | (0x80 if username is not None else 0) | (0x40 if password is not None else 0)
    payload = text(name) + bytes([level, flags]) + struct.pack(">H", keep_alive_secs) + text(client_id)
    for field in (username, password):
        if field is not None:
            payload += text(field)
    return packet(0x10, payload)


def connect_as(identity, token=None, **options):
    return connect(identity.client_id, identity.username, token or identity.token(), **options)


def publish(topic, body, packet_id=None, qos=1):
    head = text(topic) + (struct.pack(">H", packet_id) if qos else b"")
    return packet(PUBLISH | qos << 1, head + body)


def subscribe(packet_id, filters):
    return packet(0x82, struct.pack(">H", packet_id) + b"".join(text(name) + b"\x01" for name in filters))


class Closed(Exception):
    """The hub ended the connection."""


class Connection:
    """One TLS connection; every wait has a deadline."""

    def __init__(self, host, port, root_file, handshake=True, certificate=None):
        raw = socket.create_connection((host, port), timeout=TIMEOUT_SECS)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = raw
        if handshake:
            context = ssl.create_default_context(cafile=str(root_file))
            if certificate:
                context.load_cert_chain(*map(str, certificate))
            self._socket = context.wrap_socket(raw, server_hostname=host)
        self._buffer = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._socket.close()

    def send(self, data):
        """Sends; that the hub has closed already is seen when reading."""
        try:
            self._socket.sendall(data)
        except (ConnectionError, ssl.SSLError):
            pass

    def receive(self):
        """The next packet as (first byte, payload)."""
        while True:
            whole = self._whole_packet()
            if whole:
                return whole
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise AssertionError(f"the hub neither answers nor closes within {TIMEOUT_SECS} s") from None
            except (ConnectionError, ssl.SSLError):
                data = b""
            if not data:
                raise Closed()
            self._buffer += data

    def _whole_packet(self):
        size, shift = 0, 0
        for index in range(1, min(len(self._buffer), 5)):
            byte = self._buffer[index]
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                end = index + 1 + size
                if len(self._buffer) < end:
                    return None
                first, payload = self._buffer[0], bytes(self._buffer[index + 1 : end])
                del self._buffer[:end]
                return first, payload
        return None

    def expect(self, first_byte):
        first, payload = self.receive()
        assert first == first_byte, f"expected packet {first_byte:#x}, got {first:#x} {payload!r}"
        return payload

    def expect_closed(self):
        """No further packet comes, and the connection ends."""
        try:
            first, payload = self.receive()
        except Closed:
            return
        raise AssertionError(f"expected the connection to be closed, got packet {first:#x} {payload!r}")

    def login(self, identity, **options):
        """CONNECT and the code of the answer."""
        self.send(connect_as(identity, **options))
        return self.expect(CONNACK)[1]

    def publish_acknowledged(self, topic, body, packet_id=1):
        self.send(publish(topic, body, packet_id))
        assert self.expect(PUBACK) == struct.pack(">H", packet_id)

    def ping(self):
        self.send(b"\xc0\x00")
        assert self.expect(PINGRESP) == b""
