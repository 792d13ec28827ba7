"""Numbered messages of several senders, what of them has arrived, and how long that took after a fault."""

import struct
import time

from . import mqtt, wait
from .sequence import Arrivals
from .site import MQTT_PORT

KEEP_ALIVE_SECS = 3600
WINDOW = 500
SETTLED_SECS = 240  # far beyond the longest pause of the hub


class Sender:
    """A device or module that publishes 0, 1, 2, … with QoS 1, over a connection that is made when it is needed."""

    def __init__(self, site, identity, token=None):
        self.identity, self.sent = identity, 0
        self._site, self._token, self._wire = site, token, None

    def publish(self, count, properties=""):
        """Returns when the hub has acknowledged all."""
        end, waiting = self.sent + count, 0
        wire = self._connected()
        topic = self.identity.events_topic + properties
        while self.sent < end or waiting:
            packets = []
            while self.sent < end and waiting < WINDOW:
                packets.append(mqtt.publish(topic, str(self.sent).encode(), self.sent % 65535 + 1))
                self.sent += 1
                waiting += 1
            wire.send(b"".join(packets))
            while waiting > WINDOW // 2 or (waiting and self.sent == end):
                acknowledged = self.sent - waiting
                assert wire.expect(mqtt.PUBACK) == struct.pack(">H", acknowledged % 65535 + 1)
                waiting -= 1

    def login(self):
        """Connects anew; the code of the answer."""
        self.close()
        wire = mqtt.Connection(self._site.address, MQTT_PORT, self._site.authority.root)
        code = wire.login(self.identity, keep_alive_secs=KEEP_ALIVE_SECS, token=self._token)
        if code == 0:
            self._wire = wire
        else:
            wire.close()
        return code

    def close(self):
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _connected(self):
        if self._wire is None:
            code = self.login()
            assert code == 0, f"{self.identity.client_id} is refused with {code}"
        return self._wire


class Traffic:
    """The senders of a site and the account of what they sent."""

    def __init__(self, site, identities, token_secs=3600):
        self.site = site
        expires_at = time.time() + token_secs
        self.senders = [Sender(site, identity, identity.token(expires_at)) for identity in identities]

    def publish(self, count):
        for sender in self.senders:
            sender.publish(count)

    @property
    def sent(self):
        return sum(sender.sent for sender in self.senders)

    def delivered(self):
        return sum(ledger["delivered"] for ledger in self.site.ledgers())

    def settle(self):
        """Waits until the cloud has everything, each sender's messages in order, and the ledger adds up."""
        wait.until("all queues are empty", lambda: self.site.queued() == 0, SETTLED_SECS)
        self.site.assert_balanced()
        for ledger in self.site.ledgers():
            assert not ledger["dropped"] and not ledger["expired"] and not ledger["dead_lettered"], ledger
        arrived = {sender.identity.client_id: [] for sender in self.senders}
        for record in self.site.cloud.each_message():
            name = "/".join(filter(None, (record["deviceId"], record.get("moduleId"))))
            if name in arrived:
                arrived[name].append(int(record["body"]))
        for sender in self.senders:
            numbers = Arrivals.of(arrived[sender.identity.client_id])
            numbers.assert_complete(range(sender.sent))
            numbers.assert_ordered()

    def heal(self, heal):
        """Heals something; seconds from then until the first message is settled, and until all are."""
        before, queued = self.delivered(), self.site.queued()
        assert queued > 0, "nothing waits that could show the healing"
        heal()
        return self.settled_since(time.monotonic(), before, queued)

    def settled_since(self, healed, before, queued):
        """The same since a moment, maybe one to come, at which `before` were settled and `queued` waited."""
        limit = SETTLED_SECS + max(0, healed - time.monotonic())
        wait.until("a message is settled after the healing", lambda: self.delivered() > before, limit)
        first = time.monotonic() - healed
        wait.until("all are settled", lambda: self.delivered() >= before + queued, limit)
        return first, time.monotonic() - healed

    def close(self):
        for sender in self.senders:
            sender.close()
