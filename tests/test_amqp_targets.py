"""Several targets at one broker: routes with addresses of their own at RabbitMQ, over AMQP 1.0."""

import contextlib

import pytest

from blackbox import pages, sdk, wait
from blackbox.rabbitmq import RabbitMq
from blackbox.sequence import Arrivals

DEADLINE_SECS = 240
ROUTES = {
    "alarms": "FROM /messages/* WHERE level = 'hot' INTO $upstream",
    "history": "FROM /messages/* INTO $upstream",
    "plant": "FROM /messages/* INTO $upstream",
    "audit": "FROM /messages/* WHERE level = 'hot' INTO $upstream",
}


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    made = RabbitMq(tmp_path_factory.mktemp("broker"))
    with contextlib.closing(made):
        made.start()
        yield made


def settings(broker, name, alarms=None):
    """Alarms and audit to one queue, history to another, plant to a topic exchange; nothing to the address of all others."""
    alarms = alarms or f"/amq/queue/{name}-alarms"
    return {
        "EDGEHUB_UPSTREAM__KIND": "amqp",
        "EDGEHUB_UPSTREAM__URL": f"amqp://guest:guest@{broker.address}:{broker.port}",
        "EDGEHUB_UPSTREAM__ADDRESS": "/queue/rest",
        "EDGEHUB_UPSTREAM__TARGETS__alarms": alarms,
        "EDGEHUB_UPSTREAM__TARGETS__AUDIT": alarms,
        "EDGEHUB_UPSTREAM__TARGETS__history": f"/amq/queue/{name}-history",
        "EDGEHUB_UPSTREAM__TARGETS__plant": f"/exchange/{name}-plant/{{deviceId}}.telemetry",
        "CloudOperationTimeoutSecs": 20,  # as long as it may take a loaded machine to start a broker
    }


def send(client, first, end):
    """Numbers, every other one hot."""
    for n in range(first, end):
        client.send_message(sdk.message(str(n), {"level": "hot" if n % 2 == 0 else "cold"}))


class Queue:
    """What was taken out of a queue so far."""

    def __init__(self, broker, name):
        self._broker, self._name = broker, name
        self.numbers = []

    def move(self, name):
        """Goes on with another queue, which may hold some of the same messages."""
        self.numbers.extend(int(body) for _, body in self._broker.take(self._name))
        self._name = name

    def collect(self, wanted):
        """Takes messages until all of `wanted` came; checks that nothing overtook."""
        wanted = set(wanted)

        def probe():
            self.numbers.extend(int(body) for _, body in self._broker.take(self._name))
            return wanted <= set(self.numbers)

        try:
            wait.until(f"{len(wanted)} messages in {self._name}", probe, DEADLINE_SECS)
        finally:
            print(self._name, len(self.numbers), "messages,", Arrivals.of(self.numbers).duplicates, "twice")
        assert set(self.numbers) == wanted, sorted(set(self.numbers) - wanted)[:20]
        Arrivals.of(self.numbers).assert_ordered()


def targets(broker, name, alarms_arguments=None):
    broker.declare(f"{name}-alarms", alarms_arguments)
    broker.declare(f"{name}-history")
    broker.declare(f"{name}-plant")
    broker.bind(f"{name}-plant", f"{name}-plant", "topic", "leaf1.#")
    return [Queue(broker, f"{name}-{queue}") for queue in ("alarms", "history", "plant")]


def queued(site, part):
    return sum(queue["ledger"]["queued"] for queue in site.status()["queues"] if part in queue["endpoint"])


def even(first, end):
    return [n for n in range(first, end) if n % 2 == 0]


def test_each_target_gets_a_message_once_and_is_shown(broker, make_site):
    alarms, history, plant = targets(broker, "shown")
    site = make_site(ROUTES, settings=settings(broker, "shown"))
    with sdk.client(site, site.leaf) as client, sdk.client(site, site.leaves[1]) as other:
        send(client, 0, 60)
        send(other, 1000, 1010)
    alarms.collect(even(0, 60) + even(1000, 1010))
    history.collect([*range(60), *range(1000, 1010)])
    plant.collect(range(60))
    site.wait_drained()
    for queue in (alarms, history, plant):
        assert Arrivals.of(queue.numbers).duplicates == 0, queue.numbers
    ways = {way["target"]: way for way in site.status()["upstream_targets"]}
    assert len(ways) == 3 and all(way["state"] == "up" for way in ways.values()), ways
    delivered = {queue["endpoint"]: queue["ledger"]["delivered"] for queue in site.status()["queues"]}
    assert delivered["iothub[/amq/queue/shown-alarms]"] == 35, delivered
    assert "to /amq/queue/shown-alarms: " in site.operate("status")
    assert "iothub[/exchange/shown-plant/{deviceId}.telemetry]" in site.operate("queues", "list")
    metrics = pages.get(site.pages, "/metrics")[2]
    assert 'target="/amq/queue/shown-alarms"' in metrics
    assert 'to_route_input="/amq/queue/shown-history"' in metrics


def test_a_full_queue_holds_up_no_other_target(broker, make_site):
    limit = {"x-max-length": 10, "x-overflow": "reject-publish"}
    alarms, history, plant = targets(broker, "full", limit)
    broker.bind("full-alarms", "full")
    site = make_site(ROUTES, settings=settings(broker, "full", "/exchange/full/x"))
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 100)
        history.collect(range(100))
        plant.collect(range(100))
        wait.until("the queue is full", lambda: broker.count("full-alarms") >= 10, DEADLINE_SECS)
        assert queued(site, "/exchange/full/x") >= 50 - 16
        send(client, 100, 140)
        history.collect(range(140))
        plant.collect(range(140))
    for name in ("history", "plant"):
        way = next(way for way in site.status()["upstream_targets"] if f"full-{name}" in way["target"])
        assert (way["state"], way["failures"]) == ("up", 0), way
    # A queue without a limit in its place gets the rest.
    broker.declare("full-free")
    broker.bind("full-free", "full")
    with broker.channel() as channel:
        channel.queue_unbind("full-alarms", "full", "")
    alarms.move("full-free")
    alarms.collect(even(0, 140))
    site.wait_drained()
    for queue in (history, plant):
        assert Arrivals.of(queue.numbers).duplicates == 0, queue.numbers


def test_a_target_that_was_deleted_holds_up_no_other(broker, make_site):
    alarms, history, plant = targets(broker, "deleted")
    site = make_site(ROUTES, settings=settings(broker, "deleted"))
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 20)
        alarms.collect(even(0, 20))
        plant.collect(range(20))
        with broker.channel() as channel:
            channel.exchange_delete("deleted-plant")
        send(client, 20, 80)
        alarms.collect(even(0, 80))
        history.collect(range(80))
        wait.until("what has nowhere to go waits", lambda: queued(site, "plant") == 60, DEADLINE_SECS)
        broker.bind("deleted-plant", "deleted-plant", "topic", "leaf1.#")
        plant.collect(range(80))
    site.wait_drained()


def test_hub_and_broker_die_and_every_target_gets_all(broker, make_site):
    alarms, history, plant = targets(broker, "crash")
    site = make_site(ROUTES, settings=settings(broker, "crash"))
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 60)
        alarms.collect(even(0, 60))
        broker.kill()
        send(client, 60, 120)
    assert site.queued() > 0
    site.hub.kill()
    # Without routes of their own the targets still get what waits for them.
    site.set_routes({"history": ROUTES["history"]})
    site.start_hub()
    assert queued(site, "plant") > 0
    broker.start()
    with sdk.client(site, site.leaf) as client:
        send(client, 120, 160)
    alarms.collect(even(0, 120))
    history.collect(range(160))
    plant.collect(range(120))
    site.wait_drained()
    assert all(not queue["detached"] for queue in site.status()["queues"]), site.status()["queues"]
