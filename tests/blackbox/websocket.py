"""A WebSocket client of few lines that can also misbehave."""

import base64
import os
import socket
import ssl
import struct

from .mqtt import TIMEOUT_SECS

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def connect(site, port):
    raw = socket.create_connection((site.address, port), timeout=TIMEOUT_SECS)
    context = ssl.create_default_context(cafile=str(site.authority.root))
    return context.wrap_socket(raw, server_hostname=site.address)


def request(path="/$iothub/websocket", **changed):
    """An upgrade; a header given as None is left out."""
    headers = {
        "Host": "hub", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(), "Sec-WebSocket-Protocol": "mqtt",
    }  # fmt: skip
    headers.update({name.replace("_", "-"): value for name, value in changed.items()})
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode()


def frame(opcode, payload=b"", final=True):
    mask = os.urandom(4)
    size = len(payload)
    if size < 126:
        head = bytes([0x80 | size])
    elif size < 65536:
        head = bytes([0xFE]) + struct.pack(">H", size)
    else:
        head = bytes([0xFF]) + struct.pack(">Q", size)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes([(0x80 if final else 0) | opcode]) + head + mask + masked


class WebSocket:
    """An upgraded connection; every wait has a deadline."""

    def __init__(self, site, port, path="/$iothub/websocket", **changed):
        self._socket = connect(site, port)
        self._buffer = b""
        self._socket.sendall(request(path, **changed))
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        self.status = int(head.split()[1])
        self.head = head.decode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def _fill(self):
        data = self._socket.recv(65536)
        if not data:
            raise EOFError()
        self._buffer += data

    def _take(self, count):
        while len(self._buffer) < count:
            self._fill()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def send(self, *frames):
        self._socket.sendall(b"".join(frames))

    def receive(self):
        """The next frame as (opcode, payload); the server's are never in fragments here."""
        first, size = self._take(2)
        assert first & 0x80 and not size & 0x80, "a final frame without mask"
        if size == 126:
            size = struct.unpack(">H", self._take(2))[0]
        elif size == 127:
            size = struct.unpack(">Q", self._take(8))[0]
        return first & 0x0F, self._take(size)

    def expect(self, opcode, payload):
        assert self.receive() == (opcode, payload)

    def expect_bytes(self, wanted):
        """The next bytes of the stream, in however many messages."""
        got = b""
        while len(got) < len(wanted):
            opcode, payload = self.receive()
            assert opcode == BINARY, (opcode, payload)
            got += payload
        assert got == wanted

    def expect_end(self):
        try:
            self._fill()
        except EOFError:
            return
        raise AssertionError(f"expected the end, got {self._buffer!r}")
