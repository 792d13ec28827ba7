"""Faults towards the upstream, one after the other, over one hub that is never restarted: everything arrives, in order.

Each case: traffic of several senders before; the fault; traffic during it; the hub shows what is the matter; healing; traffic
after it. The time from healing to the first settled message is printed at the end, never asserted on.
"""

import datetime
import os
import time
from dataclasses import dataclass
from typing import Callable

import pytest

from blackbox import healing, pages, wait
from blackbox.certificates import Authority
from blackbox.identity import Identity
from blackbox.network import Network
from blackbox.proxy import Proxy
from blackbox.service import NamedByAddress, manager_of
from blackbox.site import CLOUD_HOST, Site
from blackbox.traffic import Traffic
from conftest import EVERYTHING_UP

# Short enough for a table of faults, long enough for a loaded machine.
SETTINGS = {"CloudOperationTimeoutSecs": 5, "RuntimeLogLevel": "info"}
NOTICED_SECS = 120
MANY = 50
# How long the upstream asks for a pause; minutes in the long form.
THROTTLED_SECS = int(os.environ.get("EDGEHUB_TEST_THROTTLED_SECS", "20"))
EACH = 20


class Field:
    """A site whose hub lives in a network of its own, and what can happen to it there."""

    def __init__(self, folder):
        self.network = Network(CLOUD_HOST)
        self.site = None
        try:
            site = Site(folder, EVERYTHING_UP, settings=SETTINGS, cloud=NamedByAddress, network=self.network)
            self.site = site
            names = [f"many{number}" for number in range(MANY)]
            site.cloud.add_like(site.leaf, names)
            self.many = [Identity(site.cloud.host_name, name, None, site.leaf.key) for name in names]
            # The cloud's other address; the ports are the same.
            self.others = [
                Proxy(target, self.network.clouds[1], link.port)
                for target, link in (
                    ((site.cloud.address, site.cloud.amqp_port), site.amqp_link),
                    ((site.cloud.address, site.cloud.https_port), site.https_link),
                )
            ]
            site.start_hub()
            self.pid = site.hub.pid
            self.traffic = Traffic(site, [*site.leaves, site.modules["sender"]])
        except BaseException:
            self.close()
            raise

    def upstream(self):
        return self.site.status()["upstream"]

    def wait_shown(self, what, probe):
        """Waits until the hub shows something; what it shows instead is part of the failure."""
        try:
            return wait.until(f"the hub shows {what}", probe, NOTICED_SECS)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows {self.upstream()}") from None

    def certificate(self, stem, names, authority=None, **validity):
        """Somebody with this certificate is found where the cloud was."""
        made = (authority or self.site.authority).server(stem, names, **validity)
        for link in (self.site.amqp_link, self.site.https_link):
            link.impersonate(*made)

    def links(self, verb):
        for link in (self.site.amqp_link, self.site.https_link):
            getattr(link, verb)()

    def restore(self):
        """Whatever was done to the network and the links is undone."""
        self.network.heal()
        self.network.resolve(self.network.clouds[0])
        self.site.restore_upstream()
        for link in self.others:
            link.vanish()

    def close(self):
        try:
            if self.site is not None:
                self.site.close()
        finally:
            self.network.close()


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    made = Field(tmp_path_factory.mktemp("faults"))
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True)
class Fault:
    """A fault of the way between hub and cloud. `causes` are those of which one is shown, `words` stand in the reason."""

    name: str
    strike: Callable
    causes: tuple = ()
    words: tuple = ()
    heal: Callable = Field.restore


def first(field):
    return field.network.clouds[0]


def half_open(field):
    """The cloud's machine is gone, and its sockets with it; the hub's sockets hear nothing of it."""
    field.network.drop(first(field))
    field.links("vanish")


def moved(field):
    """The name leads to the other address; the first stays dead."""
    field.network.resolve(field.network.clouds[1])


def expired(field):
    field.certificate("expired", [CLOUD_HOST], lifetime=datetime.timedelta(minutes=-1))


def stranger(field):
    folder = field.site.folder / "stranger"
    folder.mkdir(exist_ok=True)
    field.certificate("untrusted", [CLOUD_HOST], authority=Authority(folder, "a stranger"))


FAULTS = [
    Fault("packets dropped until the hub gives the connection up", lambda field: field.network.drop(first(field)),
          ("connect",), ("no connection within",)),
    Fault("packets swallowed, sockets answer (half-open)", lambda field: field.links("stall"),
          ("connect", "no_progress", "lost")),
    Fault("no way to the address (ICMP)", lambda field: (field.network.refuse(first(field)), field.links("vanish")),
          ("connect",)),
    Fault("connection refused", lambda field: field.links("refuse"), ("connect",), ("refused",)),
    Fault("connections cut as soon as they are made", lambda field: field.links("cut"), ("tls", "lost", "connect")),
    Fault("name not known", lambda field: (field.network.resolve(None), field.links("vanish")), ("name_lookup",)),
    Fault("address change", lambda field: field.network.drop(first(field)), ("connect",), heal=moved),
    Fault("TLS certificate expired", expired, ("tls",), ("expired",)),
    Fault("TLS certificate with another name",
          lambda field: field.certificate("other", ["elsewhere.test"]), ("tls",), ("not valid for name",)),
    Fault("TLS certificate of an unknown authority", stranger, ("tls",), ("UnknownIssuer",)),
    Fault("TLS certificate not valid yet",
          lambda field: field.certificate("early", [CLOUD_HOST], since=-datetime.timedelta(hours=2)),
          ("tls",), ("not valid yet",)),
]  # fmt: skip


def shown(field, fault):
    """What status page and operator's screen show, once both name the fault."""
    upstream = field.upstream()
    if upstream["last_cause"] not in fault.causes or upstream["state"] != "backing_off":
        return None
    if not all(word.lower() in upstream["reason"].lower() for word in fault.words):
        return None
    screen = field.site.operate("status")
    line = next(line for line in screen.splitlines() if line.startswith("upstream "))
    if "backing_off" not in line or not all(word.lower() in line.lower() for word in fault.words):
        return None
    assert "upstream_unreachable" in screen, screen
    return upstream


def all_is_well(field, count):
    """Everything is settled, by the same process."""
    field.traffic.publish(count)
    field.traffic.settle()
    wait.until("the upstream is up", lambda: field.upstream()["state"] == "up")
    assert field.site.hub.running() and field.site.hub.pid == field.pid
    for line in field.site.hub.text().splitlines():
        assert "[FTL]" not in line, line


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_the_way_heals_without_a_restart(field, fault):
    all_is_well(field, EACH)
    failures = field.upstream()["failures"]
    try:
        fault.strike(field)
        field.traffic.publish(EACH)
        noticed = field.wait_shown(
            f"one of {fault.causes}",
            lambda: field.upstream()["failures"] > failures and shown(field, fault),
        )
        field.traffic.publish(EACH)
        assert field.site.queued() >= EACH * len(field.traffic.senders)
        times = field.traffic.heal(lambda: fault.heal(field))
        all_is_well(field, EACH)
    finally:
        field.restore()
    healing.note(fault.name, f"backing_off, {noticed['last_cause']}", *times, 2 * EACH * len(field.traffic.senders))


def test_packets_dropped_while_sockets_stay(field):
    all_is_well(field, EACH)
    failures = field.upstream()["failures"]
    try:
        field.network.drop(first(field))
        field.traffic.publish(EACH)
        wait.until("messages are on their way", lambda: field.upstream()["in_flight"] > 0)
        times = field.traffic.heal(field.network.heal)
        all_is_well(field, EACH)
    finally:
        field.restore()
    kept = "the connection stays" if field.upstream()["failures"] == failures else "another connection"
    healing.note("packets dropped while sockets stay", kept, *times, EACH * len(field.traffic.senders))


def test_half_open(field):
    all_is_well(field, EACH)
    try:
        half_open(field)
        field.traffic.publish(EACH)
        wait.until("messages are on their way", lambda: field.upstream()["in_flight"] > 0)
        times = field.traffic.heal(field.network.heal)
        all_is_well(field, EACH)
    finally:
        field.restore()
    healing.note("half-open: the peer has forgotten the connection", field.upstream()["last_cause"], *times,
                 EACH * len(field.traffic.senders))  # fmt: skip


def test_throttled(field):
    all_is_well(field, EACH)
    asking = field.traffic.senders[0]
    fault = f"AzIoTHub_FaultOperationType=InvokeThrottling&AzIoTHub_FaultOperationDurationInSecs={THROTTLED_SECS}"
    before = field.traffic.delivered()
    asking.publish(1, fault)
    wait.until("the upstream has the message that asks for it", lambda: field.traffic.delivered() > before)
    ends = time.monotonic() + THROTTLED_SECS
    field.traffic.publish(EACH)
    field.wait_shown("that it is throttled", lambda: field.upstream()["state"] == "throttled")
    screen = field.site.operate("status")
    assert "throttled" in next(line for line in screen.splitlines() if line.startswith("upstream ")), screen
    field.traffic.publish(EACH)
    # Nobody is told when it ends: the hub tries by itself.
    times = field.traffic.settled_since(ends, field.traffic.delivered(), field.site.queued())
    all_is_well(field, EACH)
    healing.note(f"throttled for {THROTTLED_SECS} s", "throttled", *times, 2 * EACH * len(field.traffic.senders))


def test_one_refused_among_fifty(field):
    everyone = Traffic(field.site, field.many)
    refused = everyone.senders[7]
    try:
        everyone.publish(EACH)
        everyone.settle()
        failures = field.upstream()["failures"]
        with manager_of(field.site) as manager:
            switch(manager, refused.identity, "disabled")
            everyone.publish(EACH)
            wait.until("the others flow", lambda: field.site.queued() == EACH, NOTICED_SECS)
            field.wait_shown("one that waits", lambda: field.upstream()["parked_senders"] == 1)
            upstream = field.upstream()
            assert (upstream["state"], upstream["failures"]) == ("up", failures), upstream
            times = everyone.heal(lambda: switch(manager, refused.identity, "enabled"))
        everyone.publish(EACH)
        everyone.settle()
        assert field.upstream()["failures"] == failures, "the connection was never touched"
        all_is_well(field, EACH)
    finally:
        everyone.close()
    healing.note(f"one refused identity among {MANY}", "up, 1 parked", *times, EACH)


def switch(manager, identity, status):
    device = manager.get_device(identity.device)
    manager.update_device_with_sas(
        identity.device, device.etag, identity.key, identity.key, status, device_scope=device.device_scope
    )


def test_a_link_detached_with_an_error(field):
    all_is_well(field, EACH)
    sender, failures = field.traffic.senders[0], field.upstream()["failures"]
    retries = lambda: pages.total(field.site.pages, "edgehub_operation_retry_total", id="iothub")  # noqa: E731
    before = retries()
    sender.publish(1, "AzIoTHub_FaultOperationType=KillAmqpD2CLink&AzIoTHub_FaultOperationDelayInSecs=1")

    def struck():
        sender.publish(1)
        return retries() > before

    wait.until("the link is lost", struck, NOTICED_SECS)
    healed, delivered = time.monotonic(), field.traffic.delivered()
    sender.publish(EACH)
    times = field.traffic.settled_since(healed, delivered, EACH)
    assert "EH5012" in field.site.operate("status"), "the screen names it"
    all_is_well(field, EACH)
    assert field.upstream()["failures"] == failures, "only what failed is made anew"
    healing.note("link detached with an error", "up", *times, EACH)
