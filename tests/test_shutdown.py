"""A stop: publishers first, what is under way is finished, what is left is said, and a second signal ends it at once."""

import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor

from blackbox import mqtt, pages, wait
from blackbox.service import NamedByAddress, Service, invoke, manager_of
from blackbox.site import MQTT_PORT

INPUT = "edge1/receiver/in1"
ROUTES = {
    "toReceiver": 'FROM /messages/modules/sender/* INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
    "up": "FROM /messages/* WHERE NOT is_defined($connectionModuleId) INTO $upstream",
}
# Nothing in these tests is to end because time is up.
SETTINGS = {"ShutdownWaitPeriod": 600}


class Consumer:
    """A module that takes its messages and answers when it is told to."""

    def __init__(self, site):
        identity = site.modules["receiver"]
        self.wire = mqtt.Connection(site.address, MQTT_PORT, site.authority.root)
        assert self.wire.login(identity) == 0
        self.wire.send(mqtt.subscribe(1, [f"devices/{identity.device}/modules/{identity.module}/#"]))
        self.wire.expect(mqtt.SUBACK)

    def take(self):
        """The packet id and body of the next message."""
        first, payload = self.wire.receive()
        assert first & 0xF0 == mqtt.PUBLISH and first & 0x06 == 2, hex(first)
        length = struct.unpack(">H", payload[:2])[0]
        rest = payload[2 + length :]
        return struct.unpack(">H", rest[:2])[0], rest[2:]

    def acknowledge(self, packet_id):
        self.wire.send(mqtt.packet(mqtt.PUBACK, struct.pack(">H", packet_id)))


def publisher(site, name="sender"):
    identity = site.modules[name]
    wire = mqtt.Connection(site.address, MQTT_PORT, site.authority.root)
    assert wire.login(identity) == 0
    return wire, identity.events_topic


def terminate(site):
    os.kill(site.hub.pid, signal.SIGTERM)
    wait.until("the stop has begun", lambda: "Stopping: nothing more is accepted" in site.hub.text())


def ended(site):
    wait.until("the hub has ended", lambda: not site.hub.running())
    return site.hub.stop()


def test_publishers_end_first_and_what_is_under_way_is_finished(make_site):
    site = make_site(ROUTES, settings=SETTINGS)
    consumer = Consumer(site)
    wire, topic = publisher(site)
    for number in (1, 2):
        wire.publish_acknowledged(topic, str(number).encode(), number)
    taken = [consumer.take(), consumer.take()]
    terminate(site)
    wire.expect_closed()
    assert pages.get(site.pages, "/readyz")[0] == 503
    assert '"code":"stopping"' in pages.get(site.pages, "/healthz")[2]
    assert site.hub.running(), "what is under way is waited for"
    for packet_id, _ in taken:
        consumer.acknowledge(packet_id)
    assert ended(site) == 0
    text = site.hub.text()
    assert "Nothing is left in the queues" in text and text.rstrip().endswith("Shutdown complete."), text[-2000:]
    site.start_hub()
    assert site.queued() == 0, "nothing comes twice"


def test_what_nobody_is_there_for_is_named_and_kept(make_site):
    site = make_site(ROUTES, settings=SETTINGS)
    # Who they are is asked of the upstream.
    wire, topic = publisher(site)
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as leaf:
        assert leaf.login(site.leaf) == 0
        site.cut_upstream()
        wait.until("the loss is seen", lambda: "upstream_unreachable" in pages.get(site.pages, "/healthz")[2])
        for number in (1, 2, 3):
            wire.publish_acknowledged(topic, b"x", number)
        leaf.publish_acknowledged(site.leaf.events_topic, b"up", 1)
    assert site.hub.stop() == 0
    assert f"What is queued stays stored queued=4 queues={INPUT}: 3, iothub: 1" in site.hub.text()
    site.start_hub()
    assert site.queued() == 4


def test_a_second_signal_ends_at_once_and_loses_nothing(make_site):
    site = make_site(ROUTES, settings=SETTINGS)
    consumer = Consumer(site)
    wire, topic = publisher(site)
    wire.publish_acknowledged(topic, b"kept", 1)
    assert consumer.take()[1] == b"kept"
    terminate(site)
    os.kill(site.hub.pid, signal.SIGTERM)
    assert ended(site) == 0
    text = site.hub.text()
    assert "Another signal: ending at once" in text and "Shutdown complete." not in text, text[-2000:]
    assert f"queues={INPUT}: 1" in text
    site.start_hub()
    assert Consumer(site).take()[1] == b"kept"
    wait.until("it is still there", lambda: site.queued() == 1)


def test_without_a_wait_nothing_is_waited_for(make_site):
    site = make_site(ROUTES, settings={"ShutdownWaitPeriod": 0})
    consumer = Consumer(site)
    wire, topic = publisher(site)
    wire.publish_acknowledged(topic, b"kept", 1)
    assert consumer.take()[1] == b"kept"
    assert site.hub.stop() == 0
    assert "Not everything that could be delivered was" in site.hub.text()


def test_the_answer_of_a_method_that_is_under_way_reaches_its_caller(make_site):
    site = make_site(ROUTES, settings=SETTINGS, cloud=NamedByAddress)
    with manager_of(site) as manager, mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as leaf:
        assert leaf.login(site.leaf) == 0
        leaf.send(mqtt.subscribe(1, ["$iothub/methods/POST/#"]))
        leaf.expect(mqtt.SUBACK)
        with ThreadPoolExecutor() as pool:
            invoked = pool.submit(called_at_last, manager, site.leaf)
            _, payload = leaf.receive()
            rid = payload.split(b"?$rid=")[1][:36].decode()
            terminate(site)
            wait.until("other clients are refused", lambda: refused(site))
            assert site.hub.running() and not invoked.done(), "the answer is waited for"
            leaf.send(mqtt.publish(f"$iothub/methods/res/200/?$rid={rid}", b'{"done":1}', qos=0))
            answer = invoked.result(timeout=wait.DEADLINE_SECS)
        assert (answer.status, answer.payload) == (200, {"done": 1})
        assert ended(site) == 0


def test_a_message_of_the_cloud_that_a_device_acknowledges_in_time_does_not_come_again(make_site):
    site = make_site(ROUTES, settings=SETTINGS, cloud=NamedByAddress)
    with manager_of(site) as manager, mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as leaf:
        service = Service(site, manager)
        assert leaf.login(site.leaf) == 0
        leaf.send(mqtt.subscribe(1, [f"devices/{site.leaf.device}/messages/devicebound/#"]))
        leaf.expect(mqtt.SUBACK)
        manager.send_c2d_message(site.leaf.device, "take it")
        first, payload = leaf.receive()
        assert first & 0x06 == 2 and payload.endswith(b"take it")
        length = struct.unpack(">H", payload[:2])[0]
        terminate(site)
        wait.until("other clients are refused", lambda: refused(site))
        leaf.send(mqtt.packet(mqtt.PUBACK, payload[2 + length : 4 + length]))
        assert ended(site) == 0
        wait.until("the cloud has heard of it", lambda: service.waiting(site.leaf) == 0)


def called_at_last(manager, identity):
    """Calls a method; until the hub has told the cloud that the device takes methods, the cloud says that it is away."""

    def call():
        try:
            return invoke(manager, identity, "reboot", {})
        except Exception as error:  # pylint: disable=broad-except # the SDK's own, of several kinds
            if "Not Found" not in str(error):
                raise
            return None

    return wait.until("the method is called", call)


def refused(site):
    """Whether a new client is told to come again: the hub has begun to stop."""
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        return wire.login(site.modules["sender"]) != 0
