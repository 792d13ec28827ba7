"""A device that publishes all the time, beside clients that must not disturb it."""

import itertools
import threading

from . import amqp, mqtt, wait
from .site import MQTT_PORT

DEADLINE_SECS = 120.0


class OverMqtt:
    """QoS 1, each message once the last one is acknowledged."""

    def __init__(self, site, identity, marker):
        self._wire = mqtt.Connection(site.address, MQTT_PORT, site.authority.root)
        assert self._wire.login(identity) == 0
        self._topic = f"{identity.events_topic}marker={marker}"

    def publish(self, number):
        self._wire.publish_acknowledged(self._topic, str(number).encode(), number % 65_535 + 1)

    def close(self):
        self._wire.close()


class OverAmqp:
    """Unsettled, each message once the last one is accepted."""

    def __init__(self, site, identity, marker):
        self._wire = amqp.Wire(site).login(identity)
        self._marker = marker

    def publish(self, number):
        assert self._wire.publish(amqp.data(str(number).encode(), self._marker)) == amqp.ACCEPTED

    def close(self):
        self._wire.socket.close()


class Flow:
    """What it has been acknowledged must be in the cloud at its end, once and in order."""

    def __init__(self, site, identity, marker, over=OverMqtt):
        self._site, self._identity, self._marker, self._over = site, identity, marker, over
        self._stop = threading.Event()
        self._acknowledged = 0
        self._failure = None
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            publisher = self._over(self._site, self._identity, self._marker)
            try:
                for number in itertools.count():
                    if self._stop.is_set():
                        return
                    publisher.publish(number)
                    self._acknowledged = number + 1
            finally:
                publisher.close()
        except Exception as error:  # pylint: disable=broad-except
            self._failure = error

    def __enter__(self):
        self._thread.start()
        self.goes_on()
        return self

    def goes_on(self, messages=5):
        """It was not stopped by anything: more messages are acknowledged."""
        wanted = self._acknowledged + messages
        wait.until("the flow goes on", lambda: self._failure or self._acknowledged >= wanted, DEADLINE_SECS)
        assert self._failure is None, self._failure

    def __exit__(self, kind, *_):
        self._stop.set()
        self._thread.join()
        if kind is None:
            assert self._failure is None, self._failure
            records = self._site.cloud.wait_telemetry(
                self._marker,
                lambda record: record["properties"].get("marker") == self._marker,
                self._acknowledged,
                DEADLINE_SECS,
            )
            assert [int(record["body"]) for record in records] == list(range(self._acknowledged))
