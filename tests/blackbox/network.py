"""A hub in a network of its own: its clients' side, and a way to the cloud that can lose packets and change names.

    clients (this machine) ──── hub's namespace ──── router's namespace ──── cloud (this machine)

The router drops without a word; the sockets at both ends know nothing of it. It needs root and `ip` of iproute2.
"""

import contextlib
import ipaddress
import random
import subprocess
import uuid
from pathlib import Path

POOL = ipaddress.ip_network("198.18.0.0/15")  # for tests of networks (RFC 2544); routed nowhere
SITE_PREFIX = 28
TRIES_MAX = 50
HOSTS_BYTES = 256


def ip(*arguments, inside=None):
    """Runs `ip`, in a namespace if told; its failure is the test's."""
    where = ["-n", inside] if inside else []
    done = subprocess.run(["ip", *where, *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(map(str, arguments))}: {done.stderr} (root and iproute2 are needed)"
    return done.stdout


class Network:
    """The namespaces of one hub. `hub` is where clients find it, `clouds` are two addresses for the cloud."""

    def __init__(self, name):
        stem = uuid.uuid4().hex[:8]
        self.namespace, self._router = f"edgehub-{stem}", f"edgehub-{stem}-r"
        self._name = name
        self._files = Path("/etc/netns") / self.namespace
        self._rules = []
        part = _free_part()
        # Clients, way up, way on: two addresses each; the rest for the cloud.
        lan, up, on = ((str(part[at]), str(part[at + 1])) for at in (1, 5, 9))
        self.hub, hub_up = lan[1], up[0]
        self.clouds = (on[1], str(part[13]))
        try:
            ip("netns", "add", self.namespace)
            ip("netns", "add", self._router)
            self._pair(f"l{stem}", None, lan[0], self.namespace, lan[1])
            self._pair(f"u{stem}", self.namespace, up[0], self._router, up[1])
            self._pair(f"o{stem}", self._router, on[0], None, on[1])
            ip("addr", "add", f"{self.clouds[1]}/32", "dev", f"o{stem}b")
            for cloud in self.clouds:
                ip("route", "add", f"{cloud}/32", "via", up[1], inside=self.namespace)
            ip("route", "add", f"{self.clouds[1]}/32", "via", on[1], inside=self._router)
            ip("route", "add", f"{hub_up}/32", "via", on[0])
            forwarding = "echo 1 > /proc/sys/net/ipv4/ip_forward"
            ip("netns", "exec", self._router, "sh", "-c", forwarding)
            self._files.mkdir(parents=True)
            # No name server: what is not in the file has no address.
            (self._files / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            self.resolve(self.clouds[0])
        except BaseException:
            self.close()
            raise

    def inside(self):
        """What a command begins with that is to run in the hub's namespace; its process id stays."""
        return ["ip", "netns", "exec", self.namespace]

    def resolve(self, address):
        """The cloud's name has this address from now on, or none. Written in place, as running programs see the file."""
        line = f"{address} {self._name}\n" if address else "\n"
        text = f"127.0.0.1 localhost\n{line}".encode()
        with (self._files / "hosts").open("r+b" if (self._files / "hosts").exists() else "wb") as hosts:
            # Always as long, so that nobody ever reads a part of it.
            hosts.write(text + b"#" * (HOSTS_BYTES - len(text)))

    def drop(self, address):
        """Packets between the hub and an address of the cloud are lost without a word, both ways."""
        for side in ("to", "from"):
            self._rule("blackhole", side, address)

    def refuse(self, address):
        """The router answers that an address cannot be reached (ICMP)."""
        self._rule("unreachable", "to", address)

    def heal(self):
        """All packets pass again."""
        while self._rules:
            ip("rule", "del", *self._rules.pop(), inside=self._router)

    def _rule(self, kind, side, address):
        rule = (side, f"{address}/32", kind)
        ip("rule", "add", *rule, inside=self._router)
        self._rules.append(rule)

    def close(self):
        for namespace in (self.namespace, self._router):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=30, check=False)
        for name in ("hosts", "resolv.conf"):
            (self._files / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._files.rmdir()

    @staticmethod
    def _pair(stem, first, first_address, second, second_address):
        """A cable between two namespaces; none is this machine's."""
        ends = ((f"{stem}a", first, first_address), (f"{stem}b", second, second_address))
        ip("link", "add", ends[0][0], "type", "veth", "peer", "name", ends[1][0])
        for name, namespace, address in ends:
            if namespace:
                ip("link", "set", name, "netns", namespace)
            ip("addr", "add", f"{address}/30", "dev", name, inside=namespace)
            ip("link", "set", name, "up", inside=namespace)
        for namespace in (first, second):
            if namespace:
                ip("link", "set", "lo", "up", inside=namespace)


def _free_part():
    """The addresses of a part of the pool that this machine has no route to."""
    parts = 2 ** (SITE_PREFIX - POOL.prefixlen)
    for _ in range(TRIES_MAX):
        base = POOL[random.randrange(parts) * 2 ** (32 - SITE_PREFIX)]
        part = ipaddress.ip_network(f"{base}/{SITE_PREFIX}")
        if not ip("route", "show", "root", part).strip():
            return part
    raise AssertionError(f"no part of {POOL} is free")
