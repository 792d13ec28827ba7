"""A site: a cloud, one edge hub below it, and the identities that both know."""

import base64
import collections
import copy
import http.client
import json
import random
import socket
import ssl
from pathlib import Path

from . import pages, process, wait
from .certificates import Authority
from .identity import Identity
from .process import Process
from .proxy import Proxy

CLOUD_HOST = "cloud.test"
EDGE = "edge1"
MQTT_PORT = 8883  # fixed in the SDKs, so every hub has an address of its own
PAGES_PORT = 9600  # for hubs that have a network of their own
HTTPS_PORT = 443  # fixed too; only sites that ask for WebSockets open it
WEBSOCKETS = {"httpSettings__enabled": "true"}
ADDRESS_TRIES_MAX = 20
BLOCK_BYTES = 1 << 20
LEAVES = ("leaf1", "leaf2", "leaf3")
MODULES = ("sender", "receiver")
# More than the sites that are up at a time have; the oldest are let go of.
_KEPT_PORTS = collections.deque(maxlen=100)


def free_address():
    """A loopback address on which nothing listens at the SDKs' port."""
    for _ in range(ADDRESS_TRIES_MAX):
        address = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"
        try:
            free_port(address, MQTT_PORT)
            return address
        except OSError as error:
            reason = error
    raise AssertionError(f"no loopback address has port {MQTT_PORT} free: {reason}; does a hub listen on all addresses?")


def free_port(address, port=0):
    """A port on which nothing listens. Nobody else is given it for a while, as a socket that does not listen keeps it;
    whoever asks for it by its number, as our programs do, gets it all the same."""
    keeper = socket.socket()
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((address, port))
    except OSError:
        keeper.close()
        raise
    _KEPT_PORTS.append(keeper)
    return keeper.getsockname()[1]


def manifest(routes, ttl_secs=7200, schema="1.1", max_size_bytes=None):
    """A deployment manifest with these routes."""
    limits = {} if max_size_bytes is None else {"storeLimits": {"maxSizeBytes": max_size_bytes}}
    image = {"type": "docker", "settings": {"image": "none", "createOptions": "{}"}}
    return {
        "modulesContent": {
            "$edgeAgent": {
                "properties.desired": {
                    "schemaVersion": "1.1",
                    "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
                    "systemModules": {
                        "edgeAgent": image,
                        "edgeHub": {**image, "status": "running", "restartPolicy": "always"},
                    },
                    "modules": {},
                }
            },
            "$edgeHub": {
                "properties.desired": {
                    "schemaVersion": schema,
                    "routes": routes,
                    "storeAndForwardConfiguration": {"timeToLiveSecs": ttl_secs, **limits},
                }
            },
        }
    }


class Cloud:
    """The stand-in for the cloud hub."""

    def __init__(self, folder: Path, authority: Authority, variables=None):
        self._variables = variables or {}
        self.data = folder / "cloud"
        self.data.mkdir()
        self._log = folder / "cloud.log"
        self._root = authority.root
        self.address = free_address()
        self._chain, self._key = authority.server("cloud", [CLOUD_HOST, "localhost", "127.0.0.1", self.address])
        self.amqp_port, self.https_port = free_port(self.address), free_port(self.address)
        self.process = None

    @property
    def host_name(self):
        """By which identities and tokens know it."""
        return CLOUD_HOST

    def create_identity(self, device, module=None, *flags):
        """The identity made; for an edge device that is its hub module."""
        arguments = ["cloud", "identity", "create", "--data-dir", self.data, "--host-name", self.host_name]
        arguments += ["--device-id", device]
        if module:
            arguments += ["--module-id", module]
        done = process.run([*arguments, *flags])
        assert done.returncode == 0, f"identity {device}/{module}: {done.stderr}"
        made = Identity.parse(done.stdout)
        assert (made.host, made.device) == (self.host_name, device), made.connection_string()
        return made

    def add_like(self, pattern, names):
        """Adds devices to the registry in one write; each is a copy of an identity with a name of its own."""
        path = self.data / "registry.json"
        content = json.loads(path.read_text())
        record = next(entry for entry in content["identities"] if entry["deviceId"] == pattern.device)
        content["identities"] += [{**copy.deepcopy(record), "deviceId": name} for name in names]
        written = path.with_suffix(".new")
        written.write_text(json.dumps(content))
        written.replace(path)

    def start(self):
        self.process = Process(
            "cloud",
            ["cloud", "--data-dir", self.data, "--host-name", self.host_name, "--certificate", self._chain,
             "--private-key", self._key, "--amqp-listen", f"{self.address}:{self.amqp_port}",
             "--https-listen", f"{self.address}:{self.https_port}"],
            self._variables, self._log,
        )  # fmt: skip
        self.process.wait_ready("answers /telemetry", lambda: self.telemetry() is not None)

    def telemetry(self):
        """All messages that have arrived, oldest first; the body decoded."""
        return list(self.each_message())

    def each_message(self):
        """The same one by one, as they are read."""
        context = ssl.create_default_context(cafile=str(self._root))
        connection = http.client.HTTPSConnection(self.address, self.https_port, context=context, timeout=60)
        try:
            connection.request("GET", "/telemetry")
            response = connection.getresponse()
            assert response.status == 200, f"/telemetry answers {response.status}: {response.read()}"
            rest = b""
            while block := response.read(BLOCK_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                for record in map(json.loads, lines):
                    yield {**record, "body": base64.b64decode(record["body"])}
            assert not rest, f"/telemetry ends within a line: {rest[-200:]}"
        except http.client.HTTPException as error:
            raise ConnectionError(error) from error
        finally:
            connection.close()

    def wait_telemetry(self, what, matches, count=1, deadline_secs=wait.DEADLINE_SECS):
        """Waits until `count` messages match, and returns those that do."""

        def probe():
            found = [record for record in self.telemetry() if matches(record)]
            return found if len(found) >= count else None

        return wait.until(f"{count} × {what} in the cloud", probe, deadline_secs)


class Site:
    """Cloud, hub, and TCP proxies between them."""

    def __init__(self, folder: Path, routes, ttl_secs=7200, settings=None, max_size_bytes=None, storage=None,
                 cloud=None, network=None, authority=None):  # fmt: skip
        """With a network the hub runs in its namespace, and finds the cloud by name at the network's first address."""
        self.folder = folder
        self.network = network
        self.authority = authority or Authority(folder)
        self.address = network.hub if network else free_address()
        self.pages = (self.address, PAGES_PORT if network else free_port(self.address))
        self._chain, self._key = self.authority.server("hub", [self.address, "localhost"])
        self._settings = settings or {}
        self._manifest = folder / "deployment.json"
        self._ttl_secs, self._max_size_bytes = ttl_secs, max_size_bytes
        self.set_routes(routes)
        self.storage = storage or folder / "storage"
        self.storage.mkdir(exist_ok=True)
        self.cloud = (cloud or Cloud)(folder, self.authority)
        self._hub_identity = self.cloud.create_identity(EDGE, None, "--edge-enabled")
        self.leaves = [self.cloud.create_identity(leaf, None, "--parent", EDGE) for leaf in LEAVES]
        self.modules = {name: self.cloud.create_identity(EDGE, name) for name in MODULES}
        self.stranger = Identity(self.cloud.host_name, "stranger", None, self.leaves[0].key)
        self.cloud.start()
        links_at = network.clouds[0] if network else "127.0.0.1"
        self.amqp_link = Proxy((self.cloud.address, self.cloud.amqp_port), links_at)
        self.https_link = Proxy((self.cloud.address, self.cloud.https_port), links_at)
        self.hub = None

    @property
    def leaf(self):
        return self.leaves[0]

    @property
    def root_pem(self):
        return self.authority.root_pem.decode()

    def environment(self):
        """The settings of the hub as environment variables."""
        return {
            "IotHubConnectionString": self._hub_identity.connection_string(),
            "EdgeDeviceHostName": self.address,
            "EdgeHubDevServerCertificateFile": self._chain,
            "EdgeHubDevServerPrivateKeyFile": self._key,
            "EdgeHubDevTrustBundleFile": self.authority.root,
            "StorageFolder": self.storage,
            "RuntimeLogLevel": "debug",
            "amqpSettings__enabled": "false",
            "httpSettings__enabled": "false",
            "httpSettings__metrics_port": self.pages[1],
            "EDGEHUB_LISTEN__AMQP_ADDRESS": self.address,
            "EDGEHUB_LISTEN__HTTPS_ADDRESS": self.address,
            "EDGEHUB_LISTEN__MQTT_ADDRESS": self.address,
            "EDGEHUB_LISTEN__MQTT_PORT": MQTT_PORT,
            "EDGEHUB_LISTEN__METRICS_ADDRESS": self.address,
            "EDGEHUB_UPSTREAM__HOST": CLOUD_HOST if self.network else "127.0.0.1",
            "EDGEHUB_UPSTREAM__AMQP_PORT": self.amqp_link.port,
            "EDGEHUB_UPSTREAM__HTTPS_PORT": self.https_link.port,
            "EDGEHUB_UPSTREAM__TRUST_FILE": self.authority.root,
            **self._settings,
        }

    def set_routes(self, routes):
        """Routes that the next start of the hub finds."""
        self._manifest.write_text(json.dumps(manifest(routes, self._ttl_secs, max_size_bytes=self._max_size_bytes)))

    def operate(self, *arguments, code=0):
        """Runs a verb of the operator, who knows where the store is and has no key; returns what it prints."""
        done = process.run(arguments, {"StorageFolder": self.storage})
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stderr

    def ask(self, *arguments):
        """The same as JSON."""
        return json.loads(self.operate(*arguments, "--format", "json"))

    def run_hub_to_end(self, arguments=(), deadline_secs=90, **changed):
        """Starts a second hub with this site's settings that is expected to end by itself."""
        variables = {**self.environment(), **changed}
        return process.run(["run", "--manifest", self._manifest, *arguments], variables, deadline_secs)

    def start_hub(self):
        arguments = ["run", "--manifest", self._manifest]
        inside = self.network.inside() if self.network else ()
        self.hub = Process("hub", arguments, self.environment(), self.folder / "hub.log", inside)
        self.hub.wait_ready("/healthz answers 200", lambda: pages.get(self.pages, "/healthz")[0] == 200)

    def cut_upstream(self):
        self.amqp_link.cut()
        self.https_link.cut()

    def restore_upstream(self):
        self.amqp_link.restore()
        self.https_link.restore()

    def status(self):
        return pages.status(self.pages)

    def ledgers(self):
        # While a message is on its way into the store, the accounts of the store and of its queues differ for a moment.
        status = wait.until("the accounts agree", lambda: (now := self.status())["gap"] == 0 and now)
        found = list(pages.ledgers(status))
        assert len(found) == len(status["queues"]), status
        return found

    def queued(self):
        return sum(ledger["queued"] for ledger in self.ledgers())

    def assert_balanced(self):
        """Every ledger adds up: nothing that was accepted is unaccounted for."""
        for ledger in self.ledgers():
            dropped = ledger["dropped"]
            lost = sum(dropped.values()) if isinstance(dropped, dict) else dropped
            out = ledger["delivered"] + ledger["expired"] + lost + ledger["dead_lettered"] + ledger["queued"]
            assert ledger["gap"] == 0 and ledger["accepted"] == out, ledger

    def wait_drained(self):
        wait.until("all queues are empty", lambda: self.queued() == 0)
        self.assert_balanced()

    def close(self):
        """Stops everything; whatever the test did, ledgers add up and nothing has panicked."""
        try:
            if self.hub is not None:
                try:
                    if self.hub.running():
                        self.assert_balanced()
                        assert self.hub.stop() == 0, self.hub.text()[-4000:]
                finally:
                    if self.hub.running():
                        self.hub.kill()
                    self.hub.assert_no_panic()
        finally:
            self.amqp_link.close()
            self.https_link.close()
            if self.cloud.process.running():
                self.cloud.process.stop()
            self.cloud.process.assert_no_panic()
