"""Twins, direct methods and cloud-to-device messages while something fails: the link up, the hub, the client.

What a client was told holds: what it reported arrives, what it missed comes, and what cannot be answered is refused in
time. The operations upstream have a deadline that is longer than those of the tests: who waits for it fails.
"""

import queue
import threading
from contextlib import contextmanager

import pytest
from azure.iot.device import IoTHubModuleClient, MethodResponse, exceptions

from blackbox import mqtt, node, pages, sdk, service, wait
from blackbox.service import desire, twin
from blackbox.site import EDGE, MQTT_PORT, WEBSOCKETS, Site
from blackbox.workload import WorkloadSite
from conftest import EVERYTHING_UP

SETTINGS = {
    **WEBSOCKETS,
    "CloudOperationTimeoutSecs": "300",
    "MinTwinSyncPeriodSecs": "0",
    "ReportedPropertiesSyncFrequencySecs": "1",
}
SOON_SECS = wait.DEADLINE_SECS
# The SDK waits for an answer to its plain requests for 10 s; the least time for an answer of a method is 5 s.
RESPONSE_SECS_MIN = 5
FLAPS = 5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    made = Site(folder, EVERYTHING_UP, settings=SETTINGS, cloud=service.NamedByAddress)
    try:
        made.prober = made.cloud.create_identity("prober", None, "--parent", EDGE)
        made.start_hub()
        wait.until("the upstream is connected", lambda: upstream(made) == "up")
        proved(made)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def manager(site):
    with service.manager_of(site) as made:
        yield made


def proved(site):
    """A message goes up: after it, the hub does not wait long before it tries a lost connection again."""
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.prober) == 0
        wire.publish_acknowledged(site.prober.events_topic, b"probe")
    site.wait_drained()


def upstream(site):
    return site.ask("status")["upstream"]["state"]


def reconnect(site):
    if upstream(site) != "up":
        site.restore_upstream()
        wait.until("the upstream is connected", lambda: upstream(site) == "up")
        proved(site)


@contextmanager
def offline(site):
    """Without upstream until the end, or until `reconnect`."""
    site.cut_upstream()
    try:
        wait.until("the loss is noticed", lambda: upstream(site) != "up")
        yield
    finally:
        reconnect(site)


def restart(site, how):
    if how == "killed":
        site.hub.kill()
    else:
        assert site.hub.stop() == 0
    site.start_hub()


def connected(site):
    return {client["id"]: client["connection"] for client in site.ask("clients", "list")["clients"]}


def soon(call, *arguments, **named):
    """What a call of the SDK returns, which by itself may wait for ever."""
    outcome = queue.Queue()

    def run():
        try:
            outcome.put((call(*arguments, **named), None))
        except Exception as error:  # pylint: disable=broad-except
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    value, error = outcome.get(timeout=SOON_SECS)
    if error is not None:
        raise error
    return value


def count_of_commands(manager, identity):
    return manager.get_device(identity.device).cloud_to_device_message_count


# Twins


@pytest.mark.parametrize("kind", ["device", "module"])
def test_a_twin_is_read_from_the_store_without_upstream_also_after_a_restart(site, manager, kind):
    identity = site.leaf if kind == "device" else site.modules["receiver"]
    desire(manager, identity, {"deep": {"list": [1, {"a": True}], "text": "ü"}})
    # The session is stored: the client subscribes to nothing when it comes back.
    with sdk.client(site, identity) as client:
        client.patch_twin_reported_properties({"state": kind})
        wait.until(
            "the report is in the cloud", lambda: twin(manager, identity).properties.reported.get("state") == kind
        )
        online = client.get_twin()
        assert online["desired"]["deep"]["text"] == "ü" and online["reported"]["state"] == kind
        with offline(site):
            assert soon(client.get_twin) == online
            restart(site, "stopped")
            wait.until("the client comes back", lambda: identity.client_id in connected(site) and client.connected)
            assert soon(client.get_twin) == online
            soon(client.patch_twin_reported_properties, {"state": "offline"})
            read = soon(client.get_twin)
            assert (read["desired"], read["reported"]["state"]) == (online["desired"], "offline")


def test_a_twin_that_was_never_read_is_empty_without_upstream(site, manager):
    identity = site.modules["sender"]
    desire(manager, identity, {"unknown": 1})
    with offline(site), sdk.client(site, identity) as client:
        read = soon(client.get_twin)
        assert "unknown" not in read["desired"], read
        patches = queue.Queue()
        client.on_twin_desired_properties_patch_received = patches.put
        reconnect(site)
        assert soon(client.get_twin)["desired"]["unknown"] == 1


@pytest.mark.parametrize("between", ["nothing", "stopped", "killed"])
def test_what_is_reported_without_upstream_arrives_as_one_state(site, manager, between):
    identity = site.leaves[1]
    with sdk.client(site, identity) as client:
        client.patch_twin_reported_properties({"a": 0, "b": None, "kept": between, "part": {"x": 1, "y": 2}})

        def arrived():
            reported = twin(manager, identity).properties.reported
            return reported if reported.get("kept") == between and "b" not in reported else None

        before = wait.until("the state before is in the cloud", arrived)
        with offline(site):
            for patch in ({"a": 1}, {"b": 2}, {"a": None}, {"part": {"x": None, "z": [3]}}):
                soon(client.patch_twin_reported_properties, patch)
            # The client is away from here on: what it was told holds without it.
            soon(client.shutdown)
            if between != "nothing":
                restart(site, between)
            wait.until("it is away", lambda: identity.client_id not in connected(site))

    def merged():
        reported = twin(manager, identity).properties.reported
        return reported if reported.get("b") == 2 else None

    after = wait.until("what was reported is in the cloud", merged)
    assert "a" not in after and after["part"] == {"y": 2, "z": [3]} and after["kept"] == between, after
    assert after["$version"] == before["$version"] + 1, "the changes are one for the cloud"
    with sdk.client(site, identity) as client:
        read = soon(client.get_twin)["reported"]
        assert {name: read[name] for name in ("b", "kept", "part")} == {name: after[name] for name in ("b", "kept", "part")}


def test_changes_that_a_subscriber_missed_come_as_one_difference(site, manager):
    identity = site.leaf
    with sdk.client(site, identity) as client:
        patches = queue.Queue()
        client.on_twin_desired_properties_patch_received = patches.put
        version = client.get_twin()["desired"]["$version"]
        desire(manager, identity, {"level": 1, "gone": True, "part": {"x": 1, "y": 2}})
        assert patches.get(timeout=SOON_SECS)["$version"] == version + 1
        with offline(site):
            desire(manager, identity, {"level": 2, "part": {"x": None}})
            desire(manager, identity, {"level": 3, "gone": None})
        missed = {"level": 3, "gone": None, "part": {"x": None}, "$version": version + 3}
        assert patches.get(timeout=SOON_SECS) == missed
        # From there on it goes change by change.
        desire(manager, identity, {"level": 4})
        assert patches.get(timeout=SOON_SECS) == {"level": 4, "$version": version + 4}
        assert patches.empty()


def test_changes_that_a_client_missed_while_it_was_away_are_in_its_twin(site, manager):
    identity = site.leaves[1]
    desire(manager, identity, {"level": 1})
    with sdk.client(site, identity) as client:
        client.on_twin_desired_properties_patch_received = queue.Queue().put
        assert client.get_twin()["desired"]["level"] == 1
    wait.until("the client is away", lambda: identity.client_id not in connected(site))
    desire(manager, identity, {"level": 2})
    patches = queue.Queue()
    with sdk.client(site, identity, connect=False) as client:
        client.on_twin_desired_properties_patch_received = patches.put  # connects
        assert soon(client.get_twin)["desired"]["level"] == 2
    wait.until("the client is away again", lambda: identity.client_id not in connected(site))
    # Changed while both were away: the client comes back to a hub that knows the older ones only.
    patches = queue.Queue()
    with offline(site), sdk.client(site, identity, connect=False) as client:
        version = desire(manager, identity, {"level": 3}).properties.desired["$version"]
        client.on_twin_desired_properties_patch_received = patches.put  # connects
        assert soon(client.get_twin)["desired"]["level"] == 2
        reconnect(site)
        got = patches.get(timeout=SOON_SECS)
        if got["$version"] < version:
            # The SDK reads the twin by itself when it connects, and calls the handler with what it finds.
            got = patches.get(timeout=SOON_SECS)
        assert got == {"level": 3, "$version": version}


# Direct methods


def call(name, payload=None, connect_secs=0, response_secs=30):
    return {
        "methodName": name, "payload": payload, "connectTimeoutInSeconds": connect_secs,
        "responseTimeoutInSeconds": response_secs,
    }  # fmt: skip


def invoke(caller, target, *arguments, **named):
    return soon(caller.invoke_method, call(*arguments, **named), target.device, target.module)


def refusal(caller, target, *arguments, **named):
    """The status with which a call is refused."""
    with pytest.raises(exceptions.ClientError) as refused:
        invoke(caller, target, *arguments, **named)
    text = f"{refused.value.__cause__}"
    return next(status for status in (400, 401, 404, 429, 500, 503, 504) if f"returned: {status} " in text)


def answers(client, status=200):
    """The client answers methods with their argument."""

    def answer(request):
        payload = {"name": request.name, "got": request.payload}
        client.send_method_response(MethodResponse.create_from_method_request(request, status, payload))

    client.on_method_request_received = answer


def calls_begun(site, target):
    return pages.total(site.pages, "edgehub_direct_methods_total", to=target.client_id)


@pytest.fixture(scope="module")
def caller(site):
    """A module that was started for development: a connection string and a file with the authority."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EdgeHubConnectionString", site.modules["sender"].connection_string(gateway=site.address))
        patch.setenv("EdgeModuleCACertificateFile", str(site.authority.root))
        made = IoTHubModuleClient.create_from_edge_environment(connection_retry_interval=sdk.RETRY_SECS)
    try:
        yield made
    finally:
        soon(made.shutdown)


@pytest.mark.parametrize("kind", ["device", "module"])
def test_modules_call_methods_with_and_without_upstream(site, caller, kind):
    target = site.leaves[2] if kind == "device" else site.modules["receiver"]
    with sdk.client(site, target) as client:
        answers(client, 418)
        for payload in (None, 7, {"deep": [1, "ü"]}):
            assert invoke(caller, target, "m", payload) == {"status": 418, "payload": {"name": "m", "got": payload}}
        with offline(site):
            assert invoke(caller, target, "off") == {"status": 418, "payload": {"name": "off", "got": None}}


def test_who_is_not_there_is_not_waited_for(site, caller):
    target = site.leaves[2]
    assert refusal(caller, target, "m") == 404
    # Connected, but takes no methods: a session of nobody.
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(target) == 0
        assert refusal(caller, target, "m") == 404
        assert refusal(caller, target, "m", connect_secs=1) == 404


def test_calls_wait_for_a_client_that_connects_in_time(site, caller):
    target = site.leaves[2]
    begun = calls_begun(site, target)
    answered = queue.Queue()
    threading.Thread(
        target=lambda: answered.put(invoke(caller, target, "late", 1, connect_secs=300)), daemon=True
    ).start()
    wait.until("the call waits", lambda: calls_begun(site, target) == begun + 1)
    assert answered.empty()
    with sdk.client(site, target) as client:
        answers(client)
        assert answered.get(timeout=SOON_SECS) == {"status": 200, "payload": {"name": "late", "got": 1}}


def test_a_call_without_an_answer_ends_in_time_and_its_late_answer_is_nobodys(site, caller):
    target = site.leaves[2]
    with sdk.client(site, target) as client:
        requests = queue.Queue()
        client.on_method_request_received = requests.put
        wait.until("the client takes methods", lambda: taken(caller, target, client, requests))
        assert refusal(caller, target, "slow", response_secs=RESPONSE_SECS_MIN) == 504
        late = requests.get(timeout=SOON_SECS)
        client.send_method_response(MethodResponse.create_from_method_request(late, 200, "late"))
        answers(client)
        assert invoke(caller, target, "next", 2) == {"status": 200, "payload": {"name": "next", "got": 2}}


def taken(caller, target, client, requests):
    """Whether a first call comes through and is answered."""
    answered = queue.Queue()
    threading.Thread(target=lambda: answered.put(invoke(caller, target, "first")), daemon=True).start()
    request = requests.get(timeout=SOON_SECS)
    client.send_method_response(MethodResponse.create_from_method_request(request, 200, None))
    return answered.get(timeout=SOON_SECS)["status"] == 200


def test_a_call_ends_with_the_connection_that_was_asked(site, caller):
    target = site.leaves[2]
    with sdk.client(site, target) as client:
        requests, status = queue.Queue(), queue.Queue()
        client.on_method_request_received = requests.put
        threading.Thread(
            target=lambda: status.put(refusal(caller, target, "never", response_secs=300)), daemon=True
        ).start()
        assert requests.get(timeout=SOON_SECS).name == "never"
        soon(client.shutdown)
        assert status.get(timeout=SOON_SECS) == 504


def test_modules_call_methods_with_nothing_but_their_environment(tmp_path, monkeypatch):
    site = WorkloadSite(tmp_path, EVERYTHING_UP, settings=WEBSOCKETS)
    clients = []
    try:
        site.start_daemon()
        site.start_hub()
        for module in ("sender", "receiver"):
            for name, value in site.module_environment(module, gateway=site.address).items():
                monkeypatch.setenv(name, value)
            clients.append(IoTHubModuleClient.create_from_edge_environment(connection_retry_interval=sdk.RETRY_SECS))
        caller, target = clients
        receiver = site.modules["receiver"]
        assert refusal(caller, receiver, "m") == 404
        answers(target)
        assert invoke(caller, receiver, "m", [1]) == {"status": 200, "payload": {"name": "m", "got": [1]}}
    finally:
        for client in clients:
            soon(client.shutdown)
        site.close()


# Cloud-to-device messages


@pytest.mark.parametrize("away", ["the device", "the upstream", "both"])
def test_messages_wait_in_the_cloud(site, manager, away):
    identity = site.leaves[2]
    messages = queue.Queue()

    def take():
        return sdk.client(site, identity, connect=False)

    def check(body):
        assert messages.get(timeout=SOON_SECS).data == body.encode()
        wait.until("it is completed", lambda: count_of_commands(manager, identity) == 0)

    with take() as client:
        client.on_message_received = messages.put  # connects
        manager.send_c2d_message(identity.device, f"{away}: before")
        check(f"{away}: before")
        if away == "the upstream":
            with offline(site):
                manager.send_c2d_message(identity.device, away)
                assert count_of_commands(manager, identity) == 1
            check(away)
            return
    wait.until("the device is away", lambda: identity.client_id not in connected(site))
    if away == "the device":
        manager.send_c2d_message(identity.device, away)
        assert count_of_commands(manager, identity) == 1 and messages.empty()
        with take() as client:
            client.on_message_received = messages.put
            check(away)
        return
    with offline(site):
        manager.send_c2d_message(identity.device, away)
        restart(site, "killed")
        with take() as client:
            client.on_message_received = messages.put
            wait.until("the device is there", lambda: identity.client_id in connected(site))
            assert messages.empty()
            reconnect(site)
            check(away)


def received(wire):
    """The body of the next message, which is acknowledged."""
    payload = wire.expect(mqtt.PUBLISH | 2)
    topic_bytes = int.from_bytes(payload[:2], "big")
    wire.send(mqtt.packet(mqtt.PUBACK, payload[2 + topic_bytes : 4 + topic_bytes]))
    return payload[4 + topic_bytes :]


def test_who_has_unsubscribed_gets_nothing_until_it_subscribes_again(site, manager):
    identity = site.leaves[2]
    topic = f"devices/{identity.device}/messages/devicebound/#"
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(identity) == 0
        for number in range(3):
            wire.send(mqtt.subscribe(1, [topic]))
            assert wire.expect(mqtt.SUBACK) == b"\x00\x01\x01"
            if number > 0:
                assert received(wire) == b"unwanted %d" % (number - 1)
            manager.send_c2d_message(identity.device, f"wanted {number}")
            assert received(wire) == b"wanted %d" % number
            wait.until("it is completed", lambda: count_of_commands(manager, identity) == 0)
            wire.send(mqtt.packet(0xA2, b"\x00\x02" + mqtt.text(topic)))
            assert wire.expect(0xB0) == b"\x00\x02"
            manager.send_c2d_message(identity.device, f"unwanted {number}")
            wire.ping()
        assert count_of_commands(manager, identity) == 1
        wire.send(mqtt.subscribe(1, [topic]))
        assert wire.expect(mqtt.SUBACK) == b"\x00\x01\x01"
        assert received(wire) == b"unwanted 2"
        wait.until("it is completed", lambda: count_of_commands(manager, identity) == 0)


def test_a_message_that_expires_in_the_cloud_is_told_to_its_sender(site, manager):
    identity = site.leaves[1]
    with offline(site), sdk.client(site, identity, connect=False) as client:
        messages = queue.Queue()
        client.on_message_received = messages.put  # connects
        told = node.service(
            service.connection_string(site.cloud), site.authority.root, "amqp", "send", identity.device, "stale", "id-1", "1000"
        )
        assert told == ["sent id-1", f"feedback id-1 Expired {identity.device}"]
        reconnect(site)
        manager.send_c2d_message(identity.device, "fresh")
        assert messages.get(timeout=SOON_SECS).data == b"fresh"
    assert messages.empty()


# Two clients of one identity


def test_of_two_clients_of_one_identity_the_newer_wins(site):
    identity = site.leaf
    told = site.hub.text().count("EH2009")
    with sdk.client(site, identity, auto_connect=False, connection_retry=False) as older:
        soon(older.send_message, sdk.message("older"))
        with sdk.client(site, identity) as newer:
            wait.until("the older is closed", lambda: not older.connected)
            soon(newer.send_message, sdk.message("newer"))
            assert newer.connected
            assert soon(newer.get_twin)["desired"]["$version"] >= 1
    wires = []
    try:
        for _ in range(FLAPS + 1):
            wires.append(mqtt.Connection(site.address, MQTT_PORT, site.authority.root))
            assert wires[-1].login(identity) == 0
        for wire in wires[:-1]:
            wire.expect_closed()
        wires[-1].ping()
    finally:
        for wire in wires:
            wire.close()
    wait.until("it is warned", lambda: site.hub.text().count("EH2009") == told + 1)
    warning = next(line for line in reversed(site.hub.text().splitlines()) if "EH2009" in line)
    assert identity.client_id in warning, warning
