"""A TCP proxy that can cut, refuse, stall, impersonate and restore a link."""

import contextlib
import selectors
import socket
import ssl
import struct
import threading

BUFFER_BYTES = 65536
HANDSHAKE_SECS = 60


class Proxy:
    """Forwards connections to `target`. All methods may be called from any thread."""

    def __init__(self, target, host="127.0.0.1", port=0):
        self._target = target
        self._lock = threading.Lock()
        self._connections = set()
        self._refusing = False
        self._context = None
        self._stalled = threading.Event()
        self.accepted = 0
        self._listener = None
        # Keeps the port while it is closed (see `refuse`), so that nobody else is given it.
        self._keeper = socket.socket()
        self._keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._keeper.bind((host, port))
        self.address = self._keeper.getsockname()
        self._listen(self.address)

    def _listen(self, address):
        self._listener = socket.create_server(address)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

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

    def refuse(self):
        """Ends all connections and closes the port, until `restore`: the machine answers with a reset."""
        self.cut()
        self._close_port()

    def vanish(self):
        """Ends all connections with a reset. Where the network loses that, the other end knows of nothing."""
        with self._lock:
            connections = list(self._connections)
        for pair in connections:
            with contextlib.suppress(OSError):
                pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Says nothing to the peer; the thread that forwards wakes up and closes.
                pair[0].shutdown(socket.SHUT_RD)

    def impersonate(self, chain, key):
        """Ends all connections; new ones meet somebody with this certificate who says nothing, until `restore`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(chain), str(key))
        with self._lock:
            self._context = context
        self.vanish()

    def stall(self):
        """Half-open: connections stay, nothing passes any more, until `restore`, which ends them."""
        self._stalled.set()

    def restore(self):
        """Serves again. Connections that were stalled are ended: what they swallowed is lost."""
        with self._lock:
            self._refusing, self._context = False, None
            stalled = list(self._connections) if self._stalled.is_set() else []
            self._stalled.clear()
        for pair in stalled:
            _shut(pair)
        if self._listener is None:
            self._listen(self.address)

    def close(self):
        self.refuse()
        self._keeper.close()

    def _close_port(self):
        listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone would not wake the thread that accepts.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener):
        while True:
            try:
                client, _peer = listener.accept()
            except OSError:
                return
            with self._lock:
                refusing, context = self._refusing, self._context
                self.accepted += 1
            if context is not None:
                threading.Thread(target=_impersonate, args=(client, context), daemon=True).start()
                continue
            if refusing:
                client.close()
                continue
            if not self._admit(client):
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, timeout=60)
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


def _impersonate(client, context):
    """Shakes hands if the client does, and ends when it does."""
    client.settimeout(HANDSHAKE_SECS)
    with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as wrapped:
        wrapped.recv(BUFFER_BYTES)
    client.close()


def _shut(pair):
    for end in pair:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
