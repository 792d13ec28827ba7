"""The stand-in for the cloud hub alone, at the ports that service SDKs have fixed."""

import http.client
import ssl

from . import process
from .certificates import Authority
from .identity import Identity
from .process import Process
from .site import HTTPS_PORT, MQTT_PORT, free_address, free_port

AMQP_PORT = 5671
ADDRESS_TRIES_MAX = 20


class ServiceCloud:
    """A stand-in whose host name is its address, so that SDKs find it without a name server."""

    def __init__(self, folder):
        self.data = folder / "cloud"
        self._log = folder / "cloud.log"
        self.authority = Authority(folder)
        self.address = _free_address()
        self._chain, self._key = self.authority.server("cloud", [self.address])
        self.process = None

    @property
    def root(self):
        return self.authority.root

    @property
    def root_pem(self):
        return self.authority.root_pem.decode()

    def start(self):
        arguments = ["cloud", "--data-dir", self.data, "--host-name", self.address, "--certificate", self._chain]
        arguments += ["--private-key", self._key, "--amqp-listen", f"{self.address}:{AMQP_PORT}"]
        arguments += ["--https-listen", f"{self.address}:{HTTPS_PORT}", "--mqtt-listen", f"{self.address}:{MQTT_PORT}"]
        self.process = Process("cloud", [*arguments, "--log-level", "debug"], {}, self._log)
        self.process.wait_ready("answers /", self._answers)

    def _answers(self):
        connection = http.client.HTTPSConnection(
            self.address, HTTPS_PORT, timeout=10, context=ssl.create_default_context(cafile=str(self.root))
        )
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def run(self, *arguments, code=0):
        """Runs a verb of `edgehub cloud` on the stand-in's folder; returns what it prints."""
        done = process.run(["cloud", *arguments, "--data-dir", self.data])
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stderr

    def connection_string(self):
        """That of services."""
        return self.run("connection-string", "--host-name", self.address).strip()

    def identity(self, device, module=None):
        arguments = ["connection-string", "--host-name", self.address, "--device-id", device]
        return Identity.parse(self.run(*arguments, *(["--module-id", module] if module else [])))

    def close(self):
        if self.process is not None:
            if self.process.running():
                assert self.process.stop() == 0, self.process.text()[-4000:]
            self.process.assert_no_panic()


def _free_address():
    for _ in range(ADDRESS_TRIES_MAX):
        address = free_address()
        try:
            for port in (AMQP_PORT, HTTPS_PORT):
                free_port(address, port)
            return address
        except OSError as error:
            reason = error
    raise AssertionError(f"no loopback address has ports {AMQP_PORT} and {HTTPS_PORT} free: {reason}")
