"""Messages up to a broker that knows nothing of devices: RabbitMQ over AMQP 1.0."""

import contextlib

import pytest

from blackbox import sdk, wait
from blackbox.rabbitmq import RabbitMq
from blackbox.sequence import Arrivals


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    made = RabbitMq(tmp_path_factory.mktemp("broker"))
    with contextlib.closing(made):
        made.start()
        yield made


def settings(broker, address, password="guest"):
    return {
        "EDGEHUB_UPSTREAM__KIND": "amqp",
        "EDGEHUB_UPSTREAM__URL": f"amqp://guest:{password}@{broker.address}:{broker.port}",
        "EDGEHUB_UPSTREAM__ADDRESS": address,
        "CloudOperationTimeoutSecs": 20,  # as long as it may take a loaded machine to start a broker
    }


def send(client, first, end, **properties):
    for n in range(first, end):
        client.send_message(sdk.message(str(n), properties))


def collect(broker, queue, count, into):
    """Takes messages until there are `count` different ones."""

    def probe():
        into.extend(broker.take(queue))
        return len({body for _, body in into}) >= count

    wait.until(f"{count} messages in {queue}", probe, 180)
    return [int(body) for _, body in into]


def test_messages_arrive_durable_in_order_and_with_their_sender(broker, make_site):
    site = make_site(settings=settings(broker, "/queue/from-{deviceId}{moduleId}"))
    with sdk.client(site, site.leaf) as client, sdk.client(site, site.modules["sender"]) as module:
        send(client, 0, 100, level="hot")
        for n in range(50):
            module.send_message_to_output(sdk.json_message(str(n)), "out1")
    device, of_module = [], []
    assert collect(broker, f"from-{site.leaf.device}", 100, device) == list(range(100))
    assert collect(broker, "from-edge1sender", 50, of_module) == list(range(50))
    for properties, _ in device + of_module:
        assert properties.delivery_mode == 2, properties
    properties, _ = device[0]
    # RabbitMQ hands application properties through as they were encoded.
    encoded = properties.headers["x-amqp-1.0-app-properties"]
    assert b"level" in encoded and b"hot" in encoded, properties
    properties, _ = of_module[0]
    assert properties.content_type == "application/json", properties
    site.wait_drained()
    status = site.status()["upstream"]
    assert status["state"] == "up", status


def test_the_broker_dies_and_comes_back(broker, make_site):
    broker.declare("outage")
    site = make_site(settings=settings(broker, "/amq/queue/outage"))
    arrived = []
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 40)
        collect(broker, "outage", 40, arrived)
        broker.kill()
        send(client, 40, 90)
        assert site.queued() > 0
        broker.start()
        send(client, 90, 120)
        numbers = Arrivals.of(collect(broker, "outage", 120, arrived))
    numbers.assert_complete(range(120))
    numbers.assert_ordered()
    site.wait_drained()


def test_an_address_that_does_not_exist_parks_its_senders_only(broker, make_site):
    first, second = site_leaves = ("leaf1", "leaf2")
    for queue in site_leaves:
        broker.declare(f"known-{queue}")
    broker.bind(f"known-{first}", f"plant-{first}")
    site = make_site(settings=settings(broker, "/exchange/plant-{deviceId}/x"))
    with sdk.client(site, site.leaves[0]) as good, sdk.client(site, site.leaves[1]) as bad:
        send(bad, 0, 5)
        send(good, 0, 50)
        assert collect(broker, f"known-{first}", 50, []) == list(range(50))
        wait.until("only what has nowhere to go waits", lambda: site.queued() == 5)
        broker.bind(f"known-{second}", f"plant-{second}")
        assert collect(broker, f"known-{second}", 5, []) == list(range(5))
    site.wait_drained()


def test_a_wrong_password_is_a_reason_and_never_shown(broker, make_site):
    site = make_site(settings=settings(broker, "/queue/none", password="planted-password"))
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 3)

    def refused():
        return "user name or password" in site.status()["upstream"]["reason"]

    wait.until("the reason is told", refused)
    assert "planted-password" not in site.hub.text()
    assert "planted-password" not in str(site.status())
    assert site.queued() == 3
