"""A store that fills up: publishers are refused, nothing that was acknowledged is lost, and it goes on by itself."""

import os
import random
import shutil
import subprocess

import pytest

from blackbox import mqtt, pages, sdk, wait
from blackbox.sequence import Arrivals
from blackbox.site import MQTT_PORT

TO_MODULE = {"r": 'FROM /messages/* INTO BrokeredEndpoint("/modules/receiver/inputs/in1")'}
SMALL_BYTES = 64 << 20
BODY_BYTES = 16 << 10
WINDOW = 20
# How long the publisher keeps trying while the store is full.
FULL_SECS = float(os.environ.get("EDGEHUB_TEST_FULL_SECS", "3"))


@pytest.fixture
def small_file_system(tmp_path):
    """A file system of 64 MB. It needs the right to mount; without it the test fails and says so."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "edgehub-test", folder], capture_output=True, text=True
    )
    assert made.returncode == 0, f"a file system of its own cannot be mounted (root is needed): {made.stderr}"
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


class Publisher:
    """Sends numbered messages until it is refused, and knows which were acknowledged."""

    def __init__(self, site, identity):
        self._site, self._identity = site, identity
        self._next = 0
        self.acknowledged, self.arrived = [], []

    def fill(self, count_max):
        """Sends until the hub refuses, or `count_max` messages; whether it was refused."""
        with mqtt.Connection(self._site.address, MQTT_PORT, self._site.authority.root) as wire:
            assert wire.login(self._identity) == 0
            sent, waiting = 0, []
            try:
                while sent < count_max or waiting:
                    while sent < count_max and len(waiting) < WINDOW:
                        number = self._next
                        self._next += 1
                        sent += 1
                        # Random, so that it takes on disk what it takes here.
                        body = str(number).encode() + b" " + random.randbytes(BODY_BYTES)
                        waiting.append(number)
                        wire.send(mqtt.publish(self._identity.events_topic, body, number % 65535 + 1))
                    assert int.from_bytes(wire.expect(mqtt.PUBACK), "big") == waiting[0] % 65535 + 1
                    self.acknowledged.append(waiting.pop(0))
            except mqtt.Closed:
                return True
            return False

    def refused_now(self):
        return self.fill(1)

    def accepted_now(self):
        return not self.fill(1)


def dropped(site):
    return sum(sum(ledger["dropped"].values()) for ledger in site.ledgers())


def delivered(site):
    return sum(ledger["delivered"] for ledger in site.ledgers())


def drain(site, publisher):
    """Lets the module take everything, and checks it against what was acknowledged."""
    numbers = []

    def take(message):
        numbers.append(int(message.data.split(b" ", 1)[0]))

    with sdk.receiver(site, site.modules["receiver"], take):
        wait.until("the backlog is delivered", lambda: site.queued() == 0, 120)
        wait.until("the SDK has handed it over", lambda: delivered(site) <= len(publisher.arrived) + len(numbers))
    publisher.arrived += numbers
    arrivals = Arrivals.of(publisher.arrived)
    arrivals.assert_complete(publisher.acknowledged)
    arrivals.assert_ordered()
    assert dropped(site) == 0
    site.assert_balanced()


def fill_up(site, publisher):
    """Publishes until the store is full, and keeps trying for a while."""
    assert publisher.fill(8 * SMALL_BYTES // BODY_BYTES), "the store never refused anything"
    kept = len(publisher.acknowledged)
    assert kept > 200, f"full after {kept} messages of {BODY_BYTES} bytes"
    clock = wait.time.monotonic
    end = clock() + FULL_SECS
    while clock() < end:
        publisher.refused_now()
        assert site.hub.running()
        site.assert_balanced()
    return kept


def test_the_limit_of_the_configuration(make_site):
    limit = 48 << 20
    site = make_site(TO_MODULE, max_size_bytes=limit)
    publisher = Publisher(site, site.modules["sender"])
    fill_up(site, publisher)
    used = sum(file.stat().st_size for file in site.storage.rglob("*") if file.is_file())
    assert used <= limit * 1.1, f"{used} bytes on disk with a limit of {limit}"
    # What the engine gives back makes room for single messages again and again.
    wait.until("it is full", lambda: publisher.refused_now() and pages.total(site.pages, "edgehub_store_full") == 1)
    drain(site, publisher)
    wait.until("messages are accepted again", publisher.accepted_now)
    drain(site, publisher)


def test_a_small_file_system(make_site, small_file_system):
    site = make_site(TO_MODULE, storage=small_file_system)
    publisher = Publisher(site, site.modules["sender"])
    fill_up(site, publisher)
    # A restart at the worst moment: the store opens, and everything is still there.
    site.hub.kill()
    site.start_hub()
    drain(site, publisher)
    wait.until("messages are accepted again", publisher.accepted_now)
    drain(site, publisher)


def test_another_program_fills_the_file_system(make_site, small_file_system):
    site = make_site(TO_MODULE, storage=small_file_system)
    publisher = Publisher(site, site.modules["sender"])
    assert not publisher.fill(100)
    hog, reserve = small_file_system / "hog", small_file_system / "edgeHub/store/RESERVE"
    reserve_bytes = reserve.stat().st_size
    with hog.open("wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        except OSError:
            pass
    free_bytes = shutil.disk_usage(small_file_system).free
    if reserve.exists():
        assert free_bytes < 65536
    else:
        # The store gave it up while it still was taken from: all that is left is left without the reserve.
        os.truncate(hog, hog.stat().st_size - reserve_bytes)
    wait.until("the hub refuses", publisher.refused_now)
    # Deliveries and their checkpoints go on, though not a byte can be stored by others.
    drain(site, publisher)
    hog.unlink()
    wait.until("messages are accepted again", publisher.accepted_now)
    site.hub.kill()
    site.start_hub()
    publisher.fill(100)
    drain(site, publisher)
