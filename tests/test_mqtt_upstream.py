"""The upstream over MQTT, plain and in WebSockets: to the cloud, and from a child hub through its parent.

Everything that holds over AMQP holds here: what was acknowledged arrives, in order per sender, under its sender, through
outages; twins, direct methods and messages from the cloud pass.
"""

import json
import queue
import threading

import pytest
from azure.iot.device import MethodResponse
from azure.iot.hub.models import CloudToDeviceMethod
from blackbox import pages, sdk, service, wait
from blackbox.process import Process
from blackbox.proxy import Proxy
from blackbox.sequence import Arrivals
from blackbox.site import MQTT_PORT, Cloud, Site, free_address, free_port, manifest

from conftest import EVERYTHING_UP

FAST = {"CloudOperationTimeoutSecs": "5"}
DEADLINE_SECS = 180.0


class OverMqtt:
    """A cloud that takes MQTT of devices and hubs as well."""

    def start(self):
        self.mqtt_port = free_port(self.address)
        arguments = [
            "cloud", "--data-dir", self.data, "--host-name", self.host_name, "--certificate", self._chain,
            "--private-key", self._key, "--amqp-listen", f"{self.address}:{self.amqp_port}",
            "--https-listen", f"{self.address}:{self.https_port}", "--mqtt-listen", f"{self.address}:{self.mqtt_port}",
        ]  # fmt: skip
        self.process = Process("cloud", arguments, {}, self._log)
        self.process.wait_ready("answers /telemetry", lambda: self.telemetry() is not None)


class MqttCloud(OverMqtt, Cloud):
    pass


class MqttServiceCloud(OverMqtt, service.NamedByAddress):
    pass


class MqttSite(Site):
    """A site whose hub goes up over MQTT only: its AMQP link stays unused."""

    def __init__(self, folder, protocol, cloud=MqttCloud, settings=None):
        super().__init__(folder, EVERYTHING_UP, settings={**FAST, **(settings or {})}, cloud=cloud)
        self.protocol = protocol
        self.mqtt_link = Proxy((self.cloud.address, self.cloud.mqtt_port))

    def environment(self):
        return {
            **super().environment(),
            "UpstreamProtocol": self.protocol,
            "EDGEHUB_UPSTREAM__MQTT_PORT": self.mqtt_link.port,
        }

    def links(self):
        return self.mqtt_link, self.https_link

    def cut_upstream(self):
        for link in self.links():
            link.cut()

    def restore_upstream(self):
        for link in self.links():
            link.restore()

    def close(self):
        try:
            super().close()
            assert self.amqp_link.accepted == 0, "the hub went up over AMQP"
        finally:
            self.mqtt_link.close()


@pytest.fixture(params=["Mqtt", "MqttWs"])
def site(request, tmp_path):
    made = MqttSite(tmp_path, request.param)
    try:
        made.start_hub()
        yield made
    finally:
        made.close()


def numbers(cloud, identity):
    def own(record):
        return (record["deviceId"], record.get("moduleId") or None) == (identity.device, identity.module)

    return [int(record["body"]) for record in cloud.telemetry() if own(record)]


def send(client, first, end):
    for number in range(first, end):
        client.send_message(sdk.message(str(number), {"marker": "ü & = %"}, "application/json", "utf-8"))


def check_all(cloud, identity, count):
    found = wait.until(
        f"all {count} of {identity.client_id} arrive",
        lambda: (seen := numbers(cloud, identity)) and len(set(seen)) == count and seen,
        DEADLINE_SECS,
    )
    arrivals = Arrivals.of(found)
    arrivals.assert_complete(range(count))
    arrivals.assert_ordered()


def test_devices_and_modules_through_an_outage(site):
    module = site.modules["sender"]
    with sdk.client(site, site.leaf) as leaf, sdk.client(site, module) as sender:
        send(leaf, 0, 40)
        send(sender, 0, 40)
        wait.until("the upstream is connected", lambda: site.status()["upstream"]["state"] == "up", DEADLINE_SECS)
        check_all(site.cloud, site.leaf, 40)
        check_all(site.cloud, module, 40)
        site.wait_drained()
        site.cut_upstream()
        send(leaf, 40, 100)
        send(sender, 40, 100)
        state = wait.until("the loss is noticed", lambda: offline(site), DEADLINE_SECS)
        assert state["last_cause"] and state["reason"], state
        assert site.queued() == 120
        site.assert_balanced()
        site.restore_upstream()
        send(leaf, 100, 120)
        send(sender, 100, 120)
    check_all(site.cloud, site.leaf, 120)
    check_all(site.cloud, module, 120)
    site.wait_drained()
    record = site.cloud.telemetry()[0]
    assert record["properties"] == {"marker": "ü & = %"}
    assert record["systemProperties"].get("contentType") == "application/json", record


def offline(site):
    status = site.status()["upstream"]
    return status["state"] in ("backing_off", "connecting") and status


def test_a_silent_upstream_is_given_up_and_nothing_is_lost(tmp_path):
    made = MqttSite(tmp_path, "Mqtt")
    try:
        made.start_hub()
        with sdk.client(made, made.leaf) as leaf:
            send(leaf, 0, 20)
            check_all(made.cloud, made.leaf, 20)
            made.mqtt_link.stall()
            send(leaf, 20, 60)
            wait.until("it is noticed", lambda: offline(made), DEADLINE_SECS)
            made.restore_upstream()
            send(leaf, 60, 80)
        check_all(made.cloud, made.leaf, 80)
        made.wait_drained()
    finally:
        made.close()


def test_a_hub_that_is_killed_sends_what_it_acknowledged(tmp_path):
    made = MqttSite(tmp_path, "Mqtt")
    try:
        made.start_hub()
        with sdk.client(made, made.leaf) as leaf:
            send(leaf, 0, 20)
            check_all(made.cloud, made.leaf, 20)
            made.cut_upstream()
            send(leaf, 20, 60)
            made.hub.kill()
        made.restore_upstream()
        made.start_hub()
        check_all(made.cloud, made.leaf, 60)
        made.wait_drained()
    finally:
        made.close()


class Child:
    """A hub below that of a site, and a leaf of its own. It asks the cloud who is in its scope, and sends to the parent."""

    def __init__(self, site, folder):
        self.address = free_address()
        self.messages_link = Proxy((site.address, MQTT_PORT))
        self.identities_link = Proxy((site.cloud.address, site.cloud.https_port))
        self.pages = (self.address, free_port(self.address))
        self.root_pem = site.root_pem
        self._hub_identity = site.cloud.create_identity("edge2", None, "--edge-enabled", "--parent", "edge1")
        self.leaf = site.cloud.create_identity("below", None, "--parent", "edge2")
        self.module = site.cloud.create_identity("edge2", "inner")
        chain, key = site.authority.server("child", [self.address])
        self._manifest, self._log = folder / "child.json", folder / "child.log"
        self._manifest.write_text(json.dumps(manifest(EVERYTHING_UP)))
        (folder / "child-storage").mkdir()
        self._environment = {
            "IotHubConnectionString": self._hub_identity.connection_string(),
            "EdgeDeviceHostName": self.address,
            "EdgeHubDevServerCertificateFile": chain,
            "EdgeHubDevServerPrivateKeyFile": key,
            "EdgeHubDevTrustBundleFile": site.authority.root,
            "StorageFolder": folder / "child-storage",
            "RuntimeLogLevel": "debug",
            "amqpSettings__enabled": "false",
            "httpSettings__enabled": "false",
            "httpSettings__metrics_port": self.pages[1],
            "EDGEHUB_LISTEN__MQTT_ADDRESS": self.address,
            "EDGEHUB_LISTEN__MQTT_PORT": MQTT_PORT,
            "EDGEHUB_LISTEN__METRICS_ADDRESS": self.address,
            "EDGEHUB_UPSTREAM__HOST": "localhost",
            "EDGEHUB_UPSTREAM__MQTT_PORT": self.messages_link.port,
            "EDGEHUB_UPSTREAM__HTTPS_PORT": self.identities_link.port,
            "EDGEHUB_UPSTREAM__TRUST_FILE": site.authority.root,
            "UpstreamProtocol": "Mqtt",
            **FAST,
        }
        self.hub = None

    def start(self):
        self.hub = Process("child", ["run", "--manifest", self._manifest], self._environment, self._log)
        self.hub.wait_ready("/healthz answers 200", lambda: pages.get(self.pages, "/healthz")[0] == 200)

    def drained(self):
        status = pages.status(self.pages)
        return status["gap"] == 0 and all(ledger["queued"] == 0 for ledger in pages.ledgers(status))

    def close(self):
        try:
            if self.hub is not None:
                if self.hub.running():
                    assert self.hub.stop() == 0, self.hub.text()[-4000:]
                self.hub.assert_no_panic()
        finally:
            self.messages_link.close()
            self.identities_link.close()


def test_a_child_hub_through_its_parent(tmp_path):
    parent = MqttSite(tmp_path, "Mqtt")
    child = Child(parent, tmp_path)
    try:
        parent.start_hub()
        child.start()
        with sdk.client(child, child.leaf) as leaf, sdk.client(child, child.module) as module:
            send(leaf, 0, 30)
            send(module, 0, 30)
            check_all(parent.cloud, child.leaf, 30)
            # The parent goes away and comes back; both hubs keep what they have.
            assert parent.hub.stop() == 0
            send(leaf, 30, 60)
            send(module, 30, 60)
            parent.start_hub()
            send(leaf, 60, 80)
            send(module, 60, 80)
        check_all(parent.cloud, child.leaf, 80)
        check_all(parent.cloud, child.module, 80)
        wait.until("the child has sent all", child.drained, DEADLINE_SECS)
        parent.wait_drained()
    finally:
        try:
            child.close()
        finally:
            parent.close()


def test_twins_methods_and_messages_from_the_cloud(tmp_path):
    made = MqttSite(tmp_path, "Mqtt", cloud=MqttServiceCloud)
    try:
        made.start_hub()
        with service.manager_of(made) as manager, sdk.client(made, made.leaf, connect=False) as leaf:
            messages, patches = queue.Queue(), queue.Queue()
            leaf.on_message_received = messages.put
            leaf.on_twin_desired_properties_patch_received = patches.put

            def answer(request):
                response = MethodResponse.create_from_method_request(request, 207, {"got": request.payload})
                threading.Thread(target=leaf.send_method_response, args=(response,), daemon=True).start()

            leaf.on_method_request_received = answer
            assert "desired" in leaf.get_twin()
            leaf.patch_twin_reported_properties({"level": 7})

            def reported():
                return service.twin(manager, made.leaf).properties.reported.get("level") == 7

            wait.until("the report is in the cloud", reported, DEADLINE_SECS)
            service.desire(manager, made.leaf, {"wish": 1})
            patch = wait.until("the change is there", lambda: not patches.empty() and patches.get(), DEADLINE_SECS)
            assert patch["wish"] == 1, patch
            call = CloudToDeviceMethod(method_name="try", payload={"a": 1}, response_timeout_in_seconds=60)
            result = manager.invoke_device_method(made.leaf.device, call)
            assert (result.status, result.payload) == (207, {"got": {"a": 1}}), result.as_dict()
            manager.send_c2d_message(made.leaf.device, "hello", properties={"n": "1"})
            message = wait.until("the message is there", lambda: not messages.empty() and messages.get(), DEADLINE_SECS)
            assert message.data == b"hello" and message.custom_properties["n"] == "1"
    finally:
        made.close()
