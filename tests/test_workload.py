"""Without a connection string: certificate, trust and signatures come from the workload API, for hub and modules."""

import hashlib
import json
import os
import queue
import signal
import socket
import ssl
import stat

import pytest
from azure.iot.device import IoTHubModuleClient

from blackbox import mqtt, pages, process, sdk, wait
from blackbox.process import Process
from blackbox.site import CLOUD_HOST, EDGE, MQTT_PORT
from blackbox.workload import WorkloadSite

ROUTES = {
    "up": "FROM /messages/* WHERE IS_DEFINED(marker) INTO $upstream",
    "toModule": 'FROM /messages/modules/sender/outputs/out INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = WorkloadSite(tmp_path_factory.mktemp("site"), ROUTES)
    try:
        made.start_daemon()
        made.start_hub()
        yield made
    finally:
        made.close()


def module_client(site, monkeypatch, module):
    for name, value in site.module_environment(module, gateway=site.address).items():
        monkeypatch.setenv(name, value)
    return IoTHubModuleClient.create_from_edge_environment(connection_retry_interval=sdk.RETRY_SECS)


def shown_certificate(site):
    """The certificate of a new handshake, judged by the stand-in's root."""
    context = ssl.create_default_context(cafile=str(site.root))
    with socket.create_connection((site.address, MQTT_PORT), timeout=mqtt.TIMEOUT_SECS) as raw:
        with context.wrap_socket(raw, server_hostname=site.address) as stream:
            return hashlib.sha256(stream.getpeercert(binary_form=True)).hexdigest()


def test_modules_talk_through_the_hub_with_nothing_but_their_environment(site, monkeypatch):
    received = queue.Queue()
    receiver = module_client(site, monkeypatch, "receiver")
    sender = module_client(site, monkeypatch, "sender")
    try:
        receiver.on_message_received = received.put  # connects
        for n in range(10):
            sender.send_message_to_output(sdk.json_message(json.dumps({"n": n})), "out")
        numbers = [json.loads(received.get(timeout=wait.DEADLINE_SECS).data)["n"] for _ in range(10)]
        assert numbers == list(range(10))
        sender.send_message(sdk.message("up", {"marker": "by workload"}))
    finally:
        sender.shutdown()
        receiver.shutdown()
    # The upstream trusted the hub's token, and the hub the upstream's certificate.
    site.cloud.wait_telemetry("a message", lambda record: record["properties"].get("marker") == "by workload")
    assert site.status()["upstream"]["state"] == "up"


def assert_renewed(site, certificate, connected):
    wait.until("another certificate is shown", lambda: shown_certificate(site) != certificate)
    # The session of before is still there.
    connected.publish_acknowledged(site.leaf.events_topic, b"after", 2)


def test_a_renewal_that_is_asked_for_closes_no_session(site):
    with mqtt.Connection(site.address, MQTT_PORT, site.root) as wire:
        assert wire.login(site.leaf) == 0
        wire.publish_acknowledged(site.leaf.events_topic, b"before", 1)
        certificate = shown_certificate(site)
        os.kill(site.hub.pid, signal.SIGHUP)
        assert_renewed(site, certificate, wire)


def test_a_renewal_comes_by_itself(tmp_path):
    site = WorkloadSite(tmp_path, ROUTES, settings={"ServerCertificateRenewAfterInMs": 1000})
    try:
        site.start_daemon()
        site.start_hub()
        with mqtt.Connection(site.address, MQTT_PORT, site.root) as wire:
            assert wire.login(site.leaf) == 0
            assert_renewed(site, shown_certificate(site), wire)
    finally:
        site.close()


def test_a_hub_waits_for_a_daemon_that_is_not_there_yet(tmp_path):
    site = WorkloadSite(tmp_path, ROUTES)
    try:
        site.hub = Process(
            "hub", ["run", "--manifest", tmp_path / "deployment.json"], site.environment(), tmp_path / "hub.log"
        )

        def waits():
            code, _, text = pages.get(site.pages, "/healthz")
            return code == 503 and "workload.sock" in text

        site.hub.wait_ready("/healthz names the socket", waits)
        site.start_daemon()
        site.hub.wait_ready("/healthz answers 200", lambda: pages.get(site.pages, "/healthz")[0] == 200)
        # A daemon that goes away takes nothing with it, and is found again.
        site.daemon.stop()
        with mqtt.Connection(site.address, MQTT_PORT, site.root) as wire:
            assert wire.login(site.leaf) == 0
        certificate = shown_certificate(site)
        site.start_daemon()
        os.kill(site.hub.pid, signal.SIGHUP)
        wait.until("another certificate is shown", lambda: shown_certificate(site) != certificate)
    finally:
        site.close()


def test_a_hub_that_waits_can_be_stopped(tmp_path):
    site = WorkloadSite(tmp_path, ROUTES)
    try:
        hub = Process(
            "hub", ["run", "--manifest", tmp_path / "deployment.json"], site.environment(), tmp_path / "hub.log"
        )
        hub.wait_ready("/healthz answers 503", lambda: pages.get(site.pages, "/healthz")[0] == 503)
        assert hub.stop() == 0, hub.text()
    finally:
        site.close()


def test_the_stand_in_is_for_its_user_only_and_knows_its_modules_only(site):
    assert stat.S_IMODE(os.stat(site.socket).st_mode) == 0o600
    again = process.run(
        ["cloud", "workload", "--socket", site.socket, "--data-dir", site.cloud.data, "--host-name", CLOUD_HOST,
         "--device-id", EDGE],
    )  # fmt: skip
    assert again.returncode == 1 and str(site.socket) in again.stderr, again.stderr
