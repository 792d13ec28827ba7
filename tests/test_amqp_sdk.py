"""The AMQP head as the unmodified Node SDK sees it, over TCP and in WebSockets, as device and as module."""

import pytest

from blackbox import sdk, wait
from blackbox.device import Device, Refused
from blackbox.sequence import Arrivals
from blackbox.service import NamedByAddress, Service, manager_of
from blackbox.site import WEBSOCKETS
from conftest import running_site

SETTINGS = {
    **WEBSOCKETS,
    "amqpSettings__enabled": "true",
    "ReportedPropertiesSyncFrequencySecs": "1",
}
ROUTES = {
    "everything": "FROM /messages/* INTO $upstream",
    "inputs": 'FROM /messages/* WHERE wanted = "input" INTO BrokeredEndpoint("/modules/receiver/inputs/in")',
}
TRANSPORTS = pytest.mark.parametrize("transport", ["amqp", "amqp-ws"])
KINDS = pytest.mark.parametrize("kind", ["device", "module"])
SENT_BEFORE_KILL = 3000
PROPERTIES = {"naïve key": "50 % / ü & = ?", "empty": "", "wanted": "input"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    options = {"settings": SETTINGS, "cloud": NamedByAddress}
    with running_site(tmp_path_factory.mktemp("site"), ROUTES, **options) as made:
        sdk.wait_twins(made, made.modules["receiver"])
        yield made


@pytest.fixture
def service(site):
    with manager_of(site) as manager:
        yield Service(site, manager)


def who(site, kind):
    return site.leaf if kind == "device" else site.modules["sender"]


@TRANSPORTS
def test_who_has_no_good_key_is_refused(site, transport):
    for identity in (site.leaf.with_other_key(), site.stranger):
        with Device(site, transport, identity) as device:
            device.do("noRetry")
            # Tokens are kept, not judged: the SDK hears of it when it attaches its first link.
            device.do("open")
            with pytest.raises(Refused, match="UnauthorizedError"):
                device.do("send", body="{}")


@TRANSPORTS
@KINDS
def test_telemetry_arrives_above_and_at_an_input(site, kind, transport):
    identity = who(site, kind)
    marker = f"{kind}-{transport}"
    properties = {"marker": marker, **PROPERTIES}
    with Device(site, transport, site.modules["receiver"]) as receiver, Device(site, transport, identity) as sender:
        receiver.do("inputs")
        receiver.do("open")
        sender.do("open")
        output = "out" if kind == "module" else None
        sender.do("send", body='{"n":1}', properties=properties, messageId=marker, output=output)
        record = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker)[0]
        assert (record["deviceId"], record.get("moduleId") or None) == (identity.device, identity.module)
        assert (record["body"], record["properties"]) == (b'{"n":1}', properties)
        system = {name.replace("-", "").lower(): value for name, value in record["systemProperties"].items()}
        assert (system["messageid"], system["contenttype"]) == (marker, "application/json")
        assert system["contentencoding"] == "utf-8"
        got = receiver.wait_event("input", input="in", body='{"n":1}')
        assert (got["properties"], got["error"]) == (properties, None)
        sender.do("close")
        site.wait_drained()


@TRANSPORTS
@KINDS
def test_a_twin_is_read_reported_to_and_its_changes_arrive(site, service, kind, transport):
    identity = who(site, kind)
    mark = f"{kind}-{transport}"
    with Device(site, transport, identity) as device:
        device.do("open")
        version = device.do("twin")["desired"]["$version"]
        device.do("report", patch={"state": {"mark": mark}})
        wait.until("the cloud has what was reported", lambda: service.reported(identity).get("state") == {"mark": mark})
        service.desire(identity, {"mark": mark, "gone": 1})
        device.wait_event("desired", change={"mark": mark, "gone": 1, "$version": version + 1})
        service.desire(identity, {"gone": None})
        device.wait_event("desired", change={"gone": None, "$version": version + 2})
        read = device.do("read")
        assert read["desired"]["mark"] == mark and "gone" not in read["desired"], read
        assert read["reported"]["state"] == {"mark": mark}, read
        device.do("close")


@TRANSPORTS
@KINDS
def test_methods_are_called_and_answered(site, service, kind, transport):
    identity = who(site, kind)
    with Device(site, transport, identity) as device:
        device.do("open")
        device.do("methods", name="reboot")

        # What the client takes is told upstream behind its back.
        def answered():
            try:
                result = service.invoke(identity, "reboot", {"delay": 3})
            except Exception:  # pylint: disable=broad-except
                return None
            return result.status, result.payload

        assert wait.until("the method reaches the client", answered) == (202, {"got": {"delay": 3}})
        result = service.invoke(identity, "reboot", [1, None, "ü"])
        assert (result.status, result.payload) == (202, {"got": [1, None, "ü"]})
        device.do("close")


@TRANSPORTS
def test_messages_of_the_cloud_are_completed_rejected_and_abandoned(site, service, transport):
    identity = site.leaves[1]
    with Device(site, transport, identity) as device:
        device.do("messages", then=["complete", "reject", "abandon", "complete"])
        device.do("open")
        for verdict, status in (("complete", "Success"), ("reject", "Rejected")):
            name = f"{verdict}-{transport}"
            assert service.send_and_wait_feedback(identity, name, name) == status
            got = device.wait_event("message", body=name)
            assert (got["messageId"], got["properties"], got["verdict"]) == (name, {"marker": "m 1"}, verdict)
            device.wait_event("settled", body=name, error=None)
        # What is abandoned comes again.
        assert service.send_and_wait_feedback(identity, "again", f"again-{transport}") == "Success"
        verdicts = [event["verdict"] for event in device.events("message") if event["body"] == "again"]
        assert verdicts == ["abandon", "complete"]
        wait.until("the cloud's queue is empty", lambda: service.waiting(identity) == 0)
        device.do("close")


@TRANSPORTS
def test_the_sdk_comes_back_after_a_kill_of_the_hub(site, service, transport):
    identity = site.leaves[2]
    marker = f"killed-{transport}"

    def of_marker(record):
        return record["properties"].get("marker") == marker

    with Device(site, transport, identity) as device:
        device.do("open")
        device.do("twin")
        device.do("methods", name="reboot")
        # The kill comes while the SDK sends; what it does with what is not acknowledged is its own affair.
        sending = device.start("sendMany", marker=marker, count=SENT_BEFORE_KILL)
        site.cloud.wait_telemetry(marker, of_marker)
        site.hub.kill()
        site.start_hub()
        acknowledged = device.result(sending)
        # The SDK tries again by itself.
        device.do("send", body=str(SENT_BEFORE_KILL), properties={"marker": marker})
        site.cloud.wait_telemetry(
            "the last", lambda record: of_marker(record) and record["body"] == str(SENT_BEFORE_KILL).encode()
        )
        site.wait_drained()
        arrived = Arrivals.of([int(record["body"]) for record in site.cloud.telemetry() if of_marker(record)])
        arrived.assert_complete([*acknowledged, SENT_BEFORE_KILL])
        version = service.twin(identity).properties.desired["$version"]
        service.desire(identity, {"mark": marker})
        device.wait_event("desired", change={"mark": marker, "$version": version + 1})

        def answered():
            try:
                return service.invoke(identity, "reboot", 1).status
            except Exception:  # pylint: disable=broad-except
                return None

        assert wait.until("the method reaches the client again", answered) == 202
        device.do("close")


@TRANSPORTS
def test_the_sdk_comes_back_soon_after_a_stop_of_the_hub(site, service, transport):
    identity = site.leaves[2]
    marker = f"stopped-{transport}"
    with Device(site, transport, identity) as device:
        device.do("open")
        device.do("twin")
        device.do("send", body="0", properties={"marker": marker})
        assert site.hub.stop() == 0
        site.start_hub()
        # Within the deadline of all that waits here, which is shorter than the 45 s for which the SDK waits for answers
        # on a connection that was closed while its sessions were open.
        device.do("send", body="1", properties={"marker": marker})
        version = service.twin(identity).properties.desired["$version"]
        service.desire(identity, {"mark": marker})
        device.wait_event("desired", change={"mark": marker, "$version": version + 1})
        records = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker, 2)
        assert [record["body"] for record in records] == [b"0", b"1"]
        device.do("close")


@TRANSPORTS
def test_a_newer_client_takes_over(site, transport):
    marker = f"taken-over-{transport}"
    with Device(site, transport, site.leaf) as older, Device(site, transport, site.leaf) as newer:
        for device in (older, newer):
            device.do("noRetry")
            device.do("open")
        older.do("send", body="older", properties={"marker": marker})
        newer.do("send", body="newer", properties={"marker": marker})
        older.wait_event("disconnect")
        newer.do("send", body="still", properties={"marker": marker})
        records = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker, 3)
        assert [record["body"] for record in records] == [b"older", b"newer", b"still"]
        assert not newer.events("disconnect")
