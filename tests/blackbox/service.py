"""The service side of a site's cloud: the Python service SDK, unmodified, and what it needs to find the stand-in."""

from contextlib import contextmanager

import certifi
import pytest
from azure.iot.hub import IoTHubRegistryManager
from azure.iot.hub.models import CloudToDeviceMethod, Twin, TwinProperties

from . import process, site

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
