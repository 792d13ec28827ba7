"""A layered plant network: a cloud, and hubs one below another, each of which knows its parent only."""

import base64
import hashlib
import hmac
import http.client
import json
import ssl
import time
import urllib.parse

from . import service, site
from .certificates import Authority

ROUTES = {"everything": "FROM /messages/* INTO $upstream"}
SCOPE_VERSION = "api-version=2020-06-30-preview"
ANSWER_SECS = 120  # a hub may take 100 s for an answer
TOKEN_SECS = 3600


def https(address, port, root, verb, path, body, headers):
    """Status and JSON of one request; nothing for an empty answer."""
    context = ssl.create_default_context(cafile=str(root))
    connection = http.client.HTTPSConnection(address, port, context=context, timeout=ANSWER_SECS)
    try:
        connection.request(verb, path, body, headers)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


class Layer(site.Site):
    """A hub of the plant; its upstream is another layer, or the cloud."""

    def __init__(self, plant, name, parent, settings):  # pylint: disable=super-init-not-called
        self.name = name
        self.authority, self.cloud = plant.authority, plant.cloud
        self.folder = plant.folder / name
        self.storage = self.folder / "storage"
        self.storage.mkdir(parents=True)
        self.address = site.free_address()
        self.pages = (self.address, site.free_port(self.address))
        self.amqp_port, self.https_port = site.free_port(self.address), site.free_port(self.address)
        self.network = self.hub = None
        self.identity = plant.create(name, None, "--edge-enabled", *(["--parent", parent.name] if parent else []))
        self._parent, self._settings = parent, settings
        self._chain, self._key = self.authority.server(name, [self.address])
        self._manifest = self.folder / "deployment.json"
        self._ttl_secs, self._max_size_bytes = 7200, None
        self.set_routes(ROUTES)

    def environment(self):
        """As a daemon would set it up: all that it says of the way up is the name of the parent, and its ports."""
        above = self._parent or self.cloud
        return {
            "IotHubConnectionString": self.identity.connection_string(gateway=above.address),
            "EdgeDeviceHostName": self.address,
            "EdgeHubDevServerCertificateFile": self._chain,
            "EdgeHubDevServerPrivateKeyFile": self._key,
            "EdgeHubDevTrustBundleFile": self.authority.root,
            "StorageFolder": self.storage,
            "RuntimeLogLevel": "debug",
            "amqpSettings__port": self.amqp_port,
            "httpSettings__port": self.https_port,
            "httpSettings__metrics_port": self.pages[1],
            "EDGEHUB_LISTEN__AMQP_ADDRESS": self.address,
            "EDGEHUB_LISTEN__HTTPS_ADDRESS": self.address,
            "EDGEHUB_LISTEN__MQTT_ADDRESS": self.address,
            "EDGEHUB_LISTEN__MQTT_PORT": site.MQTT_PORT,
            "EDGEHUB_LISTEN__METRICS_ADDRESS": self.address,
            "EDGEHUB_UPSTREAM__AMQP_PORT": above.amqp_port,
            "EDGEHUB_UPSTREAM__HTTPS_PORT": above.https_port,
            **self._settings,
        }

    def ask(self, verb, path, body, headers):
        """A request on the HTTPS port."""
        return https(self.address, self.https_port, self.authority.root, verb, path, body, headers)

    def scope(self, call, identity, body, device=None):
        """A scope call with the token of an identity; as the hub of its device, or of another."""
        path = f"/devices/{device or identity.device}/modules/$edgeHub/{call}?{SCOPE_VERSION}"
        text = body if isinstance(body, str) else json.dumps(body)
        return self.ask("POST", path, text, {"Authorization": identity.token(), "Content-Type": "application/json"})

    def below(self, identity, chain, device=None):
        return self.scope("devicesAndModulesInTargetDeviceScope", identity, {"pageSize": 10, "authChain": chain}, device)

    def one(self, identity, chain, target, module=None):
        body = {"targetDeviceId": target, "authChain": chain} | ({"targetModuleId": module} if module else {})
        return self.scope("getDeviceAndModuleOnBehalfOf", identity, body)

    def close(self):
        if self.hub is None:
            return
        try:
            if self.hub.running():
                self.assert_balanced()
                assert self.hub.stop() == 0, self.hub.text()[-4000:]
        finally:
            if self.hub.running():
                self.hub.kill()
            self.hub.assert_no_panic()


class Plant:
    """The cloud and its hubs, the top first. The cloud's name has no address, so nobody finds it by that."""

    def __init__(self, folder, names, settings=None):
        """The settings are those of hubs that have a parent."""
        self.folder = folder
        self.authority = Authority(folder)
        self.cloud = site.Cloud(folder, self.authority)
        self.layers = []
        for name in names:
            parent = self.layers[-1] if self.layers else None
            self.layers.append(Layer(self, name, parent, settings if parent and settings else {}))
        self.cloud.start()

    def create(self, device, module=None, *flags):
        return self.cloud.create_identity(device, module, *flags)

    def remove(self, device):
        """Takes a device out of the registry."""
        path = self.cloud.data / "registry.json"
        content = json.loads(path.read_text())
        content["identities"] = [entry for entry in content["identities"] if entry["deviceId"] != device]
        written = path.with_suffix(".new")
        written.write_text(json.dumps(content))
        written.replace(path)

    def start(self):
        for layer in self.layers:
            layer.start_hub()

    def invoke(self, device, module, name, payload):
        """A direct method, called at the cloud by a service; status of the request, and its answer."""
        call = {"methodName": name, "payload": payload, "responseTimeoutInSeconds": 60, "connectTimeoutInSeconds": 60}
        path = f"/twins/{device}/modules/{module}/methods?api-version=2021-04-12"
        headers = {"Authorization": self._service_token(), "Content-Type": "application/json"}
        cloud = self.cloud
        return https(cloud.address, cloud.https_port, self.authority.root, "POST", path, json.dumps(call), headers)

    def _service_token(self):
        parts = dict(part.split("=", 1) for part in service.connection_string(self.cloud).split(";"))
        resource, expires_at = urllib.parse.quote(parts["HostName"], safe=""), int(time.time() + TOKEN_SECS)
        key = base64.b64decode(parts["SharedAccessKey"])
        signature = hmac.new(key, f"{resource}\n{expires_at}".encode(), hashlib.sha256).digest()
        encoded, policy = urllib.parse.quote(base64.b64encode(signature), safe=""), parts["SharedAccessKeyName"]
        return f"SharedAccessSignature sr={resource}&sig={encoded}&se={expires_at}&skn={policy}"

    def close(self):
        """Stops all, the lowest first; whatever the test did, ledgers add up and nothing has panicked."""
        failures = []
        for part in [*reversed(self.layers), self.cloud.process]:
            try:
                if isinstance(part, Layer):
                    part.close()
                else:
                    part.stop()
                    part.assert_no_panic()
            except Exception as error:  # pylint: disable=broad-except
                failures.append(error)
        if failures:
            raise failures[0]
