"""The stand-in for the cloud hub as public service SDKs see it, with devices that are connected to it directly."""

import json
import os
import queue
import subprocess
import threading
from contextlib import contextmanager

import certifi
import pytest
from azure.iot.device import IoTHubDeviceClient, MethodResponse
from azure.iot.hub import IoTHubRegistryManager
from azure.iot.hub.models import CloudToDeviceMethod, Twin, TwinProperties
from msrest.exceptions import HttpOperationError

from blackbox import node, wait
from blackbox.cloud import ServiceCloud

WAIT_SECS = wait.DEADLINE_SECS


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    made = ServiceCloud(tmp_path_factory.mktemp("cloud"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def manager(cloud, monkeypatch):
    """The Python service SDK; it trusts the test's authority."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cloud.root))
    monkeypatch.setattr(certifi, "where", lambda: str(cloud.root))
    made = IoTHubRegistryManager.from_connection_string(cloud.connection_string())
    yield made


def service(cloud, transport, *arguments):
    """One run of the Node service SDK; what it tells."""
    done = subprocess.run(
        ["node", str(node.SOURCE / "service.js"), transport, cloud.connection_string(), *arguments],
        env={"PATH": os.environ["PATH"], "NODE_PATH": str(node.modules()), "NODE_EXTRA_CA_CERTS": str(cloud.root)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        timeout=node.RUN_SECS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{cloud.process.text()[-4000:]}"
    return done.stdout.splitlines()


@contextmanager
def device(cloud, name):
    """A device that is connected to the stand-in itself."""
    text = cloud.identity(name).connection_string()
    made = IoTHubDeviceClient.create_from_connection_string(text, server_verification_cert=cloud.root_pem)
    try:
        made.connect()
        yield made
    finally:
        ending = threading.Thread(target=made.shutdown, daemon=True)
        ending.start()
        ending.join(5)


def test_node_identities_and_twins(cloud):
    assert service(cloud, "amqp", "registry", "node1") == [
        "again DeviceAlreadyExistsError",
        "twin s1 3 2",
        "stale InvalidEtagError",
        "query node1 false",
        "modules part",
        "counted true",
        "gone DeviceNotFoundError",
    ]


def test_python_identities(manager):
    made = manager.create_device_with_sas("py1", "", "", "enabled", iot_edge=True)
    assert made.capabilities.iot_edge and made.authentication.symmetric_key.primary_key
    leaf = manager.create_device_with_sas("py1leaf", "", "", "enabled", device_scope=made.device_scope)
    assert leaf.parent_scopes == [made.device_scope]
    changed = manager.update_device_with_sas(
        "py1leaf", leaf.etag, leaf.authentication.symmetric_key.primary_key,
        leaf.authentication.symmetric_key.secondary_key, "disabled", device_scope=leaf.device_scope,
    )  # fmt: skip
    assert changed.status == "disabled"
    with pytest.raises(HttpOperationError) as refused:
        manager.delete_device("py1leaf", leaf.etag)
    assert refused.value.response.status_code == 412
    manager.create_module_with_sas("py1", "part", "", "", "")
    assert {module.module_id for module in manager.get_modules("py1")} == {"$edgeAgent", "$edgeHub", "part"}
    manager.delete_module("py1", "part")
    assert {"py1", "py1leaf"} <= {found.device_id for found in manager.get_devices()}
    for name in ("py1leaf", "py1"):
        manager.delete_device(name)
    with pytest.raises(HttpOperationError) as refused:
        manager.get_device("py1")
    assert refused.value.response.status_code == 404


def test_the_hubs_configuration_is_put_by_sdk_and_by_command_line(cloud, manager, tmp_path):
    manager.create_device_with_sas("edge1", "", "", "enabled", iot_edge=True)
    desired = {"schemaVersion": "1.1", "routes": {"all": "FROM /messages/* INTO $upstream"}}
    twin = manager.update_module_twin("edge1", "$edgeHub", Twin(properties=TwinProperties(desired=desired)), "*")
    assert twin.properties.desired["routes"] == desired["routes"]
    document = tmp_path / "patch.json"
    document.write_text(json.dumps({"properties": {"desired": {"routes": {"all": None, "hot": "FROM /* INTO $upstream"}}}}))
    names = ["--device-id", "edge1", "--module-id", "$edgeHub"]
    shown = json.loads(cloud.run("twin", "patch", *names, str(document)))
    assert shown["properties"]["desired"]["routes"] == {"hot": "FROM /* INTO $upstream"}
    twin = manager.get_module_twin("edge1", "$edgeHub")
    assert twin.properties.desired["$version"] == shown["properties"]["desired"]["$version"] == 3
    assert json.loads(cloud.run("twin", "get", *names))["etag"] == twin.etag
    document.write_text("{")
    assert "not JSON" in cloud.run("twin", "patch", *names, str(document), code=1)
    assert "does not exist" in cloud.run("twin", "get", "--device-id", "none", code=1)


def test_a_device_hears_of_its_twin_from_sdk_and_command_line(cloud, manager, tmp_path):
    manager.create_device_with_sas("twin1", "", "", "enabled")
    with device(cloud, "twin1") as client:
        patches = queue.Queue()
        client.on_twin_desired_properties_patch_received = patches.put
        manager.update_twin("twin1", Twin(properties=TwinProperties(desired={"level": 1})), "*")
        assert patches.get(timeout=WAIT_SECS) == {"level": 1, "$version": 2}
        document = tmp_path / "patch.json"
        document.write_text('{"properties":{"desired":{"level":null,"mode":"slow"}}}')
        cloud.run("twin", "patch", "--device-id", "twin1", str(document))
        assert patches.get(timeout=WAIT_SECS) == {"level": None, "mode": "slow", "$version": 3}
        client.patch_twin_reported_properties({"state": {"ready": True}})
        assert client.get_twin()["reported"] == {"state": {"ready": True}, "$version": 2}
        twin = manager.get_twin("twin1")
        assert twin.properties.reported["state"] == {"ready": True} and twin.connection_state == "Connected"


def test_a_device_answers_methods(cloud, manager):
    manager.create_device_with_sas("method1", "", "", "enabled")
    with device(cloud, "method1") as client:

        def answer(request):
            payload = {"name": request.name, "got": request.payload}
            client.send_method_response(MethodResponse.create_from_method_request(request, 201, payload))

        client.on_method_request_received = answer
        assert service(cloud, "amqp", "method", "method1", "reboot", '{"delay":3}') == [
            'method 201 {"name":"reboot","got":{"delay":3}}'
        ]
        call = CloudToDeviceMethod(method_name="stop", payload=[1], response_timeout_in_seconds=30)
        result = manager.invoke_device_method("method1", call)
        assert (result.status, result.payload) == (201, {"name": "stop", "got": [1]})
    with pytest.raises(HttpOperationError) as refused:
        manager.invoke_device_method("edge-none", CloudToDeviceMethod(method_name="stop"))
    assert refused.value.response.status_code == 404


@pytest.mark.parametrize("transport", ["amqp", "ws"])
def test_messages_reach_a_device_and_feedback_comes_back(cloud, manager, transport):
    name = f"message-{transport}"
    manager.create_device_with_sas(name, "", "", "enabled")
    with device(cloud, name) as client:
        messages = queue.Queue()
        client.on_message_received = messages.put
        told = service(cloud, transport, "send", name, "hello", "id-1")
        assert told == ["sent id-1", f"feedback id-1 Success {name}"]
        got = messages.get(timeout=WAIT_SECS)
        assert (got.data, got.message_id, got.custom_properties["marker"]) == (b"hello", "id-1", "m 1")
        manager.send_c2d_message(name, "by Python", {"messageId": "id-2", "kind": "b"})
        got = messages.get(timeout=WAIT_SECS)
        assert (got.data, got.message_id, got.custom_properties["kind"]) == (b"by Python", "id-2", "b")
        manager.amqp_svc_client.disconnect_sync()
    assert service(cloud, transport, "refused", "message-none") == ["refused DeviceNotFoundError"]


def test_a_message_waits_for_its_device(cloud, manager):
    manager.create_device_with_sas("later1", "", "", "enabled")
    manager.send_c2d_message("later1", "early")
    manager.amqp_svc_client.disconnect_sync()
    assert manager.get_device("later1").cloud_to_device_message_count == 1
    with device(cloud, "later1") as client:
        messages = queue.Queue()
        client.on_message_received = messages.put
        assert messages.get(timeout=WAIT_SECS).data == b"early"
        # The SDK may hand it over before it acknowledges it.
        wait.until("the message is completed", lambda: manager.get_device("later1").cloud_to_device_message_count == 0)


def test_another_key_lets_no_service_in(cloud, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cloud.root))
    text = cloud.connection_string().rpartition("SharedAccessKey=")[0]
    other = IoTHubRegistryManager.from_connection_string(f"{text}SharedAccessKey=YW5vdGhlciBrZXk=")
    with pytest.raises(HttpOperationError) as refused:
        other.get_devices()
    assert refused.value.response.status_code == 401
