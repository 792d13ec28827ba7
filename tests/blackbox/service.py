"""A site whose cloud can be reached by unmodified service SDKs, and what they do there."""

import contextlib
import os
import subprocess

import certifi
import pytest
from azure.iot.hub import IoTHubRegistryManager
from azure.iot.hub.models import CloudToDeviceMethod, Twin, TwinProperties

from . import node, process
from . import site as site_module

AMQP_PORT = 5671  # fixed in the service SDKs, like 443


class NamedByAddress(site_module.Cloud):
    """A cloud whose name is its address, at the ports that service SDKs have fixed."""

    def __init__(self, folder, authority):
        super().__init__(folder, authority)
        site_module.CLOUD_HOST = self.address
        self.amqp_port, self.https_port = AMQP_PORT, site_module.HTTPS_PORT


@contextlib.contextmanager
def reachable_cloud():
    """Sites made within have such a cloud."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_module, "CLOUD_HOST", site_module.CLOUD_HOST)
        patch.setattr(site_module, "Cloud", NamedByAddress)
        yield


class Service:
    """The Python service SDK, and the Node one where feedback is wanted. Both trust the test's authority."""

    def __init__(self, site, monkeypatch):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(site.authority.root))
        monkeypatch.setattr(certifi, "where", lambda: str(site.authority.root))
        self._root = site.authority.root
        done = process.run(
            ["cloud", "connection-string", "--data-dir", site.cloud.data, "--host-name", site.cloud.address]
        )
        assert done.returncode == 0, done.stderr
        self._connection_string = done.stdout.strip()
        self.manager = IoTHubRegistryManager.from_connection_string(self._connection_string)

    def twin(self, identity):
        if identity.module:
            return self.manager.get_module_twin(identity.device, identity.module)
        return self.manager.get_twin(identity.device)

    def reported(self, identity):
        return self.twin(identity).properties.reported or {}

    def desire(self, identity, properties):
        change = Twin(properties=TwinProperties(desired=properties))
        if identity.module:
            return self.manager.update_module_twin(identity.device, identity.module, change, "*")
        return self.manager.update_twin(identity.device, change, "*")

    def invoke(self, identity, name, payload):
        call = CloudToDeviceMethod(method_name=name, payload=payload, response_timeout_in_seconds=30)
        if identity.module:
            return self.manager.invoke_device_module_method(identity.device, identity.module, call)
        return self.manager.invoke_device_method(identity.device, call)

    def waiting(self, identity):
        """How many messages of the cloud wait for a device."""
        return self.manager.get_device(identity.device).cloud_to_device_message_count

    def send_and_wait_feedback(self, identity, body, message_id):
        """Sends a message of the cloud and waits for its feedback: the status code."""
        done = subprocess.run(
            ["node", str(node.SOURCE / "service.js"), "amqp", self._connection_string, "send", identity.device, body,
             message_id],
            env={"PATH": os.environ["PATH"], "NODE_PATH": str(node.modules()), "NODE_EXTRA_CA_CERTS": str(self._root)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=node.RUN_SECS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        sent, feedback = done.stdout.splitlines()
        assert sent == f"sent {message_id}", done.stdout
        word, of, status, device = feedback.split(" ")
        assert (word, of, device) == ("feedback", message_id, identity.device), feedback
        return status
