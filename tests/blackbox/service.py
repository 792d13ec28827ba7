"""The service side of a site's cloud: the Python service SDK, unmodified, and what it needs to find the stand-in."""

from contextlib import contextmanager

import certifi
import pytest
from azure.iot.hub import IoTHubRegistryManager
from azure.iot.hub.models import CloudToDeviceMethod, Twin, TwinProperties

from . import node, process, site

AMQP_PORT = 5671  # fixed in the service SDK, like 443


class NamedByAddress(site.Cloud):
    """A cloud whose name is its address, at the ports that service SDKs have fixed."""

    def __init__(self, folder, authority):
        super().__init__(folder, authority)
        self.amqp_port, self.https_port = AMQP_PORT, site.HTTPS_PORT

    @property
    def host_name(self):
        return self.address


def connection_string(cloud):
    """That of services."""
    where = ["--data-dir", cloud.data, "--host-name", cloud.host_name]
    done = process.run(["cloud", "connection-string", *where])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def manager_of(made):
    """The service SDK for a site that is up; it trusts the test's authority."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUESTS_CA_BUNDLE", str(made.authority.root))
        patch.setattr(certifi, "where", lambda: str(made.authority.root))
        manager = IoTHubRegistryManager.from_connection_string(connection_string(made.cloud))
        try:
            yield manager
        finally:
            manager.amqp_svc_client.disconnect_sync()


def twin(manager, identity):
    if identity.module:
        return manager.get_module_twin(identity.device, identity.module)
    return manager.get_twin(identity.device)


def desire(manager, identity, properties):
    change = Twin(properties=TwinProperties(desired=properties))
    if identity.module:
        return manager.update_module_twin(identity.device, identity.module, change, "*")
    return manager.update_twin(identity.device, change, "*")


def invoke(manager, identity, name, payload):
    call = CloudToDeviceMethod(method_name=name, payload=payload, response_timeout_in_seconds=30)
    if identity.module:
        return manager.invoke_device_module_method(identity.device, identity.module, call)
    return manager.invoke_device_method(identity.device, call)


class Service:
    """What a service does with the identities of a site."""

    def __init__(self, made, manager):
        self._site, self.manager = made, manager

    def twin(self, identity):
        return twin(self.manager, identity)

    def reported(self, identity):
        return self.twin(identity).properties.reported or {}

    def desire(self, identity, properties):
        return desire(self.manager, identity, properties)

    def invoke(self, identity, name, payload):
        return invoke(self.manager, identity, name, payload)

    def waiting(self, identity):
        """How many messages of the cloud wait for a device."""
        return self.manager.get_device(identity.device).cloud_to_device_message_count

    def send_and_wait_feedback(self, identity, body, message_id):
        """Sends a message of the cloud by the Node SDK and waits for its feedback: the status code."""
        told = node.service(
            connection_string(self._site.cloud), self._site.authority.root, "amqp", "send", identity.device, body,
            message_id,
        )  # fmt: skip
        assert told[0] == f"sent {message_id}", told
        word, of, status, device = told[1].split(" ")
        assert (word, of, device) == ("feedback", message_id, identity.device), told
        return status
