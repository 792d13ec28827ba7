"""SIGKILL at any moment: nothing that was acknowledged is lost, order is kept, repetitions are counted."""

import random
import threading

from azure.iot.device import exceptions

from blackbox import mqtt, sdk, wait
from blackbox.sequence import Arrivals
from blackbox.site import MQTT_PORT

MODULE_ROUTE = {"r": 'FROM /messages/* INTO BrokeredEndpoint("/modules/receiver/inputs/in1")'}


def up(site):
    return [int(record["body"]) for record in site.cloud.telemetry() if record["properties"].get("marker") == "n"]


def test_killed_while_the_sdk_sends(make_site):
    site = make_site()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    count, acknowledged, failed = 400, [], []
    kills = [threading.Event() for _ in range(3)]
    kill_at = dict(zip(sorted(rng.sample(range(20, count - 20), len(kills))), kills))

    def kill_when_told():
        for told in kills:
            told.wait()
            site.hub.kill()
            site.start_hub()

    killer = threading.Thread(target=kill_when_told, daemon=True)
    killer.start()
    while len(acknowledged) < count:
        with sdk.client(site, site.leaf, connect=False) as client:
            try:
                client.connect()
                for n in range(len(acknowledged), count):
                    if n in kill_at:
                        kill_at[n].set()
                    sdk.send_within(client, sdk.message(str(n), {"marker": "n"}), 10)
                    acknowledged.append(n)
            except (exceptions.ClientError, exceptions.ConnectionDroppedError, sdk.Stuck) as error:
                # The SDK leaves it to the application to send again what it could not send.
                failed.append(error)
    killer.join(wait.DEADLINE_SECS)
    wait.until("all arrive", lambda: len(set(up(site))) == count)
    site.wait_drained()
    arrivals = Arrivals.of(up(site))
    print(f"{len(failed)} sends failed, {arrivals.duplicates} duplicates")
    arrivals.assert_complete(acknowledged)
    arrivals.assert_ordered()


def test_killed_under_a_pipelined_publisher_again_and_again(make_site):
    """Whatever was acknowledged on the wire before each kill is there afterwards, exactly in order."""
    site = make_site(MODULE_ROUTE)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    acknowledged, number = [], 0
    for _ in range(3):
        with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
            assert wire.login(site.leaf) == 0
            first, burst = number, rng.randint(500, 1500)
            topic = site.leaf.events_topic
            packets = b"".join(mqtt.publish(topic, str(first + i).encode(), i + 1) for i in range(burst))
            number += burst
            wire.send(packets)  # small enough for the socket's buffers
            stop_after = rng.randint(1, burst)
            try:
                for _ in range(stop_after):
                    acknowledged.append(first + int.from_bytes(wire.expect(mqtt.PUBACK), "big") - 1)
            finally:
                site.hub.kill()
            try:
                while True:
                    acknowledged.append(first + int.from_bytes(wire.expect(mqtt.PUBACK), "big") - 1)
            except mqtt.Closed:
                pass
        site.start_hub()
    assert acknowledged == sorted(set(acknowledged)), "acknowledgements come in the order of the messages"
    site.assert_balanced()
    kept = site.queued()
    assert kept >= len(acknowledged)

    numbers, arrived = [], threading.Event()

    def take(message):
        numbers.append(int(message.data))
        if len(numbers) >= kept:
            arrived.set()

    with sdk.receiver(site, site.modules["receiver"], take):
        assert arrived.wait(180), f"{len(numbers)} of {kept} arrived"
        site.wait_drained()
        wait.until("all are handed over", lambda: len(set(numbers)) >= kept)
    arrivals = Arrivals.of(numbers)
    arrivals.assert_complete(acknowledged)
    arrivals.assert_ordered()
    print(f"{len(acknowledged)} acknowledged, {kept} kept, {arrivals.duplicates} duplicates")


def test_killed_while_a_module_takes_its_backlog(make_site):
    site = make_site(MODULE_ROUTE)
    count = 200
    with sdk.client(site, site.leaf) as client:
        for n in range(count):
            client.send_message(sdk.message(str(n)))
    numbers, some, all_there = [], threading.Event(), threading.Event()

    def take(message):
        numbers.append(int(message.data))
        if len(numbers) >= 40:
            some.set()
        if len(set(numbers)) == count:
            all_there.set()

    with sdk.receiver(site, site.modules["receiver"], take):
        assert some.wait(wait.DEADLINE_SECS)
        site.hub.kill()
    site.start_hub()
    with sdk.receiver(site, site.modules["receiver"], take):
        assert all_there.wait(180), f"{len(set(numbers))} of {count} arrived"
        site.wait_drained()
    arrivals = Arrivals.of(numbers)
    arrivals.assert_complete(range(count))
    arrivals.assert_ordered()
    print(f"duplicates {arrivals.duplicates}")


def test_the_subscriptions_of_a_session_survive_the_kill(make_site):
    """The Python SDK does not subscribe again after a reconnect: the stored session carries it."""
    site = make_site(MODULE_ROUTE)
    receiver = site.modules["receiver"]
    inputs = f"devices/{receiver.device}/modules/{receiver.module}/inputs/#"
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        wire.send(mqtt.connect_as(receiver, clean=False))
        assert wire.expect(mqtt.CONNACK) == b"\x00\x00"
        wire.send(mqtt.subscribe(1, [inputs]))
        assert wire.expect(mqtt.SUBACK) == b"\x00\x01\x01"
        site.hub.kill()
    site.start_hub()
    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message("after the kill"))
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        wire.send(mqtt.connect_as(receiver, clean=False))
        assert wire.expect(mqtt.CONNACK) == b"\x01\x00", "the session is present"
        payload = wire.expect(mqtt.PUBLISH | 2)
        topic_bytes = int.from_bytes(payload[:2], "big")
        assert payload[2 : 2 + topic_bytes].startswith(inputs[:-1].encode() + b"in1/")
        assert payload[4 + topic_bytes :] == b"after the kill"
        wire.send(mqtt.packet(mqtt.PUBACK, payload[2 + topic_bytes : 4 + topic_bytes]))
        site.wait_drained()
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        wire.send(mqtt.connect_as(receiver, clean=True))
        assert wire.expect(mqtt.CONNACK) == b"\x00\x00", "a clean session is never present"
