"""Two hundred clients at once: they connect, send and receive, lose the hub in the middle of it, and come back at once."""

import threading
from collections import deque

import paho.mqtt.client as paho
import pytest

from blackbox import service, wait
from blackbox.identity import Identity
from blackbox.sequence import Arrivals
from blackbox.site import EDGE, MQTT_PORT, Site
from conftest import EVERYTHING_UP

CLIENTS = 200
BEFORE, AROUND = 5, 10  # messages of each client, before the hub is killed and around that
ALL_SECS = 240
LOOP_SECS = 0.5


class Client:
    """A device with paho-mqtt on a thread of its own; it connects again until it is told to stop."""

    def __init__(self, site, identity, start):
        self.identity = identity
        self.acknowledged, self.twins, self.commands = 0, 0, []
        self._site, self._start, self._stopping = site, start, threading.Event()
        self._numbers, self._requests = deque(), set()
        self._client = paho.Client(identity.client_id, clean_session=False)
        self._client.username_pw_set(identity.username, identity.token())
        self._client.tls_set(str(site.authority.root))
        self._client.on_connect = self._connected
        self._client.on_publish = self._published
        self._client.on_message = self._message
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def publish(self, numbers):
        self._numbers.extend(numbers)

    def stop(self):
        self._stopping.set()

    def join(self):
        self._thread.join(ALL_SECS)
        assert not self._thread.is_alive(), self.identity

    def _run(self):
        self._start.wait(ALL_SECS)
        connect = lambda: self._client.connect(self._site.address, MQTT_PORT)  # noqa: E731
        while not self._stopping.is_set():
            try:
                connect()
                connect = self._client.reconnect
                while not self._stopping.is_set() and self._client.loop(LOOP_SECS) == paho.MQTT_ERR_SUCCESS:
                    self._publish()
            except OSError:
                # The hub is away; the next turn comes again, not too soon.
                self._stopping.wait(LOOP_SECS)
        self._client.disconnect()

    def _publish(self):
        """What could not be written is kept by paho-mqtt, and goes out after the next connection."""
        while self._numbers and self._client.is_connected():
            body = str(self._numbers.popleft())
            self._client.publish(f"{self.identity.events_topic}marker=many", body, qos=1)

    def _connected(self, client, _userdata, _flags, _code):
        client.subscribe([("$iothub/twin/res/#", 1), (f"devices/{self.identity.device}/messages/devicebound/#", 1)])
        self._requests.add(client.publish("$iothub/twin/GET/?$rid=1", qos=1).mid)

    def _published(self, _client, _userdata, mid):
        if mid not in self._requests:
            self.acknowledged += 1

    def _message(self, _client, _userdata, message):
        if message.topic.startswith("$iothub/twin/res/200/"):
            self.twins += 1
        else:
            self.commands.append(message.payload)


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, EVERYTHING_UP, settings={"MaxConnectedClients": CLIENTS}, cloud=service.NamedByAddress)
    try:
        yield made
    finally:
        made.close()


def create(site, manager):
    scope = manager.get_device(EDGE).device_scope
    for number in range(CLIENTS):
        name = f"many{number}"
        keys = manager.create_device_with_sas(name, "", "", "enabled", device_scope=scope).authentication
        yield Identity(site.cloud.host_name, name, None, keys.symmetric_key.primary_key)


def wait_for_all(what, clients, probe):
    wait.until(f"{what} of all", lambda: all(map(probe, clients)), ALL_SECS)


def test_nothing_is_lost_when_all_come_at_once_and_the_hub_is_killed(site):
    with service.manager_of(site) as manager:
        identities = list(create(site, manager))
        site.start_hub()
        start = threading.Event()
        clients = [Client(site, identity, start) for identity in identities]
        try:
            for client in clients:
                client.publish(range(BEFORE))
            start.set()
            wait_for_all("the twins", clients, lambda client: client.twins >= 1)
            wait_for_all("acknowledgements", clients, lambda client: client.acknowledged == BEFORE)
            for client in clients:
                manager.send_c2d_message(client.identity.device, client.identity.device)
            wait_for_all("the commands", clients, lambda client: client.commands)
            # What is acknowledged now is in the hub's store only.
            site.cut_upstream()
            count = BEFORE + AROUND
            for client in clients:
                client.publish(range(BEFORE, count))
            some = CLIENTS * BEFORE + CLIENTS
            wait.until("some are acknowledged", lambda: sum(client.acknowledged for client in clients) >= some)
            site.hub.kill()
            twins = {client: client.twins for client in clients}
            site.start_hub()
            wait_for_all("the twins again", clients, lambda client: client.twins > twins[client])
            wait_for_all("acknowledgements", clients, lambda client: client.acknowledged == count)
            site.restore_upstream()
        finally:
            start.set()
            for client in clients:
                client.stop()
            for client in clients:
                client.join()
    assert all(set(client.commands) == {client.identity.device.encode()} for client in clients)

    def arrived():
        found = {client.identity.device: [] for client in clients}
        for record in site.cloud.telemetry():
            if record["properties"].get("marker") == "many":
                found[record["deviceId"]].append(int(record["body"]))
        return found if all(len(set(numbers)) == count for numbers in found.values()) else None

    found = wait.until("all messages are in the cloud", arrived, ALL_SECS)
    site.wait_drained()
    for numbers in found.values():
        Arrivals.of(numbers).assert_complete(range(count))
