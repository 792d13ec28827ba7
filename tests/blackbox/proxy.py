"""A TCP proxy that can cut, refuse, stall and restore a link."""

import selectors
import socket
import threading

BUFFER_BYTES = 65536


class Proxy:
    """Forwards connections to `target`. All methods may be called from any thread."""

    def __init__(self, target, host="127.0.0.1"):
        self._target = target
        self._lock = threading.Lock()
        self._connections = set()
        self._refusing = False
        self._stalled = threading.Event()
        self.accepted = 0
        self._listener = socket.create_server((host, 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self):
        return self.address[1]

    def cut(self):
        """Ends all connections and closes new ones as soon as they are made, until `restore`."""
        with self._lock:
            self._refusing = True
            connections = list(self._connections)
        for pair in connections:
            _shut(pair)

    def stall(self):
        """Half-open: connections stay, nothing passes any more, until `restore`, which ends them."""
        self._stalled.set()

    def restore(self):
        """Serves again. Connections that were stalled are ended: what they swallowed is lost."""
        with self._lock:
            self._refusing = False
            stalled = list(self._connections) if self._stalled.is_set() else []
            self._stalled.clear()
        for pair in stalled:
            _shut(pair)

    def close(self):
        self.cut()
        # Closing alone would not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _peer = self._listener.accept()
            except OSError:
                return
            with self._lock:
                refusing = self._refusing
                self.accepted += 1
            if refusing:
                client.close()
                continue
            if not self._admit(client):
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            with self._lock:
                refused_meanwhile = self._refusing
                self._connections.add(pair)
            if refused_meanwhile:
                _shut(pair)
            threading.Thread(target=self._forward, args=(pair,), daemon=True).start()

    def _admit(self, _client):
        """Whether a connection is forwarded; a proxy of another kind talks to the client first."""
        return True

    def _forward(self, pair):
        client, server = pair
        other = {client: server, server: client}
        selector = selectors.DefaultSelector()
        for end in pair:
            selector.register(end, selectors.EVENT_READ)
        try:
            while True:
                for key, _events in selector.select():
                    data = key.fileobj.recv(BUFFER_BYTES)
                    if not data:
                        return
                    if not self._stalled.is_set():
                        other[key.fileobj].sendall(data)
        except OSError:
            pass
        finally:
            selector.close()
            with self._lock:
                self._connections.discard(pair)
            for end in pair:
                end.close()


class HttpProxy(Proxy):
    """An HTTP proxy that opens tunnels (CONNECT); all lead to `target`, whichever host was asked for."""

    def __init__(self, target, status="200 Connection established"):
        self.asked = []
        self._status = status
        super().__init__(target)

    def _admit(self, client):
        client.settimeout(10)
        head = b""
        try:
            while not head.endswith(b"\r\n\r\n"):
                byte = client.recv(1)
                if not byte:
                    return False
                head += byte
            self.asked.append(head.split(b"\r\n")[0].decode())
            client.sendall(f"HTTP/1.1 {self._status}\r\n\r\n".encode())
            client.settimeout(None)
        except OSError:
            return False
        return self._status.startswith("200")


def _shut(pair):
    for end in pair:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
