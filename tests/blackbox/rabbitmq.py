"""RabbitMQ with its AMQP 1.0 plug-in, on ports and folders of a test's own."""

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pika

from . import wait
from .site import free_port

SERVERS = Path("/usr/lib/rabbitmq/lib")
START_SECS = 300  # its start takes ten seconds of a processor of its own


class RabbitMq:
    """A broker that keeps its queues over `kill` and `start`. User and password are `guest`."""

    def __init__(self, folder: Path):
        found = sorted(SERVERS.glob("rabbitmq_server-*/sbin/rabbitmq-server"))
        assert found, f"no RabbitMQ below {SERVERS}: run `make setup-tests`, or install Debian's rabbitmq-server"
        self._program = found[-1]
        self._folder = folder / "rabbitmq"
        self._folder.mkdir()
        self.address = "127.0.0.1"
        self.port, distribution, epmd = (free_port(self.address) for _ in range(3))
        (self._folder / "enabled_plugins").write_text("[rabbitmq_amqp1_0].\n")
        (self._folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = {self.address}:{self.port}\n")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": self.address,
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
        }
        self._child = None

    def start(self):
        with (self._folder / "console.log").open("ab") as output:
            # A group of its own: the script starts the machine and waits for it.
            self._child = subprocess.Popen(
                [str(self._program)], env=self._environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

        def answers():
            assert self._child.poll() is None, (self._folder / "console.log").read_text()[-4000:]
            socket.create_connection((self.address, self.port), timeout=10).close()
            with contextlib.suppress(pika.exceptions.AMQPConnectionError), self.channel():
                return True

        wait.until("RabbitMQ answers", answers, START_SECS)

    def kill(self):
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def close(self):
        if self._child is not None and self._child.poll() is None:
            self.kill()
        # Its port mapper has left the group.
        with contextlib.suppress(OSError):
            port = self._environment["ERL_EPMD_PORT"]
            subprocess.run(["epmd", "-port", port, "-kill"], capture_output=True, timeout=10, check=False)

    @contextlib.contextmanager
    def channel(self):
        """A channel in the broker's own protocol, which is none of the hub's."""
        connection = pika.BlockingConnection(pika.ConnectionParameters(self.address, self.port, heartbeat=0))
        try:
            yield connection.channel()
        finally:
            connection.close()

    def declare(self, queue, arguments=None):
        with self.channel() as channel:
            channel.queue_declare(queue, durable=True, arguments=arguments)

    def bind(self, queue, exchange, kind="fanout", key=""):
        """An exchange that hands everything to a queue, or of kind `topic` what fits the key."""
        with self.channel() as channel:
            channel.exchange_declare(exchange, kind, durable=True)
            channel.queue_bind(queue, exchange, key)

    def delete(self, queue):
        with self.channel() as channel:
            channel.queue_delete(queue)

    def take(self, queue):
        """Takes all messages out of a queue: properties and body of each."""
        taken = []
        with self.channel() as channel:
            while True:
                method, properties, body = channel.basic_get(queue, auto_ack=True)
                if method is None:
                    return taken
                taken.append((properties, body))

    def count(self, queue):
        with self.channel() as channel:
            return channel.queue_declare(queue, passive=True).method.message_count
