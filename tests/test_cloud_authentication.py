"""Clients that the cloud knows and the hub's scope does not: let in by their own token, which the cloud judges.

Below they speak MQTT and AMQP, above the hub speaks AMQP and MQTT; what they send arrives under their own name.
"""

import time
from dataclasses import replace

import pytest
from blackbox import mqtt, sdk, wait
from blackbox.device import Device, Refused
from blackbox.service import NamedByAddress, Service, manager_of
from blackbox.site import MQTT_PORT, Site
from test_mqtt_upstream import MqttSite

from conftest import EVERYTHING_UP, running_site

ACCEPTED, UNAVAILABLE, NOT_AUTHORIZED = 0, 3, 5
DEADLINE_SECS = 120.0
# Expired tokens count for five more minutes.
TOLERANCE_SECS = 300
# Enough for a login on a busy machine.
LEFT_SECS = 12
# Of wrong tokens: 32 at once, and two per second; what a slow machine takes for the test is in it.
REFUSED_BURST, REFUSED_PER_SEC = 32, 2
MODE = {
    "AuthenticationMode": "CloudAndScope",
    "amqpSettings__enabled": "true",
    "CloudOperationTimeoutSecs": "10",
    "ReportedPropertiesSyncFrequencySecs": "1",
    "MinTwinSyncPeriodSecs": "0",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    options = {"settings": MODE, "cloud": NamedByAddress}
    with running_site(tmp_path_factory.mktemp("site"), EVERYTHING_UP, **options) as made:
        yield made


@pytest.fixture
def service(site):
    with manager_of(site) as manager:
        yield Service(site, manager)


def guest(site, name):
    """A device of the cloud that is below no edge device."""
    return site.cloud.create_identity(name)


def connection(site):
    return mqtt.Connection(site.address, MQTT_PORT, site.authority.root)


def try_login(site, identity, **options):
    with connection(site) as one:
        return one.login(identity, **options)


def wait_login(site, identity, code):
    wait.until(f"{identity.client_id} hears {code}", lambda: try_login(site, identity) == code, DEADLINE_SECS)


def bodies(site, identity):
    def own(record):
        return (record["deviceId"], record.get("moduleId") or None) == (identity.device, identity.module)

    return [record["body"] for record in site.cloud.telemetry() if own(record)]


def wait_bodies(site, identity, expected):
    what = f"{identity.client_id} has sent {expected}"
    wait.until(what, lambda: set(expected) <= set(bodies(site, identity)), DEADLINE_SECS)


@pytest.mark.parametrize("transport", ["mqtt", "amqp"])
def test_a_guest_has_telemetry_twin_methods_and_messages(site, service, transport):
    identity = guest(site, f"guest-{transport}")
    with Device(site, transport, identity) as device:
        device.do("messages")
        device.do("open")
        device.do("send", body='{"n":1}', properties={"marker": transport})
        record = site.cloud.wait_telemetry(
            transport, lambda record: record["properties"].get("marker") == transport
        )[0]
        assert (record["deviceId"], record["body"]) == (identity.device, b'{"n":1}')
        device.do("twin")
        device.do("report", patch={"state": transport})
        reported = lambda: service.reported(identity).get("state") == transport
        wait.until("the cloud has what was reported", reported, DEADLINE_SECS)
        # A change that comes before the upstream tells of changes may be missed; a later one is not.
        numbers = iter(range(1_000))

        def changed():
            service.desire(identity, {"number": next(numbers)})
            return device.events("desired")

        wait.until("a change arrives", changed, DEADLINE_SECS)
        device.do("methods", name="reboot")

        def answered():
            try:
                return service.invoke(identity, "reboot", {"delay": 3}).status
            except Exception:  # pylint: disable=broad-except
                return None

        assert wait.until("the method reaches the client", answered, DEADLINE_SECS) == 202
        assert service.send_and_wait_feedback(identity, "hello", f"hello-{transport}") == "Success"
        device.wait_event("message", body="hello", messageId=f"hello-{transport}")
        device.do("close")
    site.wait_drained()


def test_who_is_in_scope_is_not_asked_for_above(site):
    before = site.amqp_link.accepted
    with sdk.client(site, site.leaf) as leaf, sdk.client(site, site.modules["sender"]) as sender:
        leaf.send_message(sdk.message("in scope"))
        sender.send_message(sdk.message("in scope"))
    wait_bodies(site, site.leaf, [b"in scope"])
    assert try_login(site, site.leaf.with_other_key()) == NOT_AUTHORIZED
    assert site.amqp_link.accepted == before


def test_a_wrong_key_is_refused(site):
    known = guest(site, "refused")
    before = site.amqp_link.accepted
    assert try_login(site, known.with_other_key()) == NOT_AUTHORIZED
    assert try_login(site, site.stranger) == NOT_AUTHORIZED
    assert site.amqp_link.accepted == before + 2
    with Device(site, "amqp", known.with_other_key()) as device:
        device.do("noRetry")
        device.do("open")
        with pytest.raises(Refused, match="UnauthorizedError"):
            device.do("send", body="{}")
    wait_login(site, known, ACCEPTED)


def test_an_expired_token_ends_the_connection_and_a_newer_one_lets_in(site):
    known = guest(site, "expiring")
    expires_at = time.time() - TOLERANCE_SECS + LEFT_SECS
    token = known.token(expires_at)
    with connection(site) as expiring:
        assert expiring.login(known, token=token) == ACCEPTED
        expiring.publish_acknowledged(known.events_topic, b"before")
        expiring.expect_closed()
    assert time.time() >= int(expires_at) + TOLERANCE_SECS
    assert try_login(site, known, token=token) == NOT_AUTHORIZED
    with connection(site) as renewed:
        assert renewed.login(known) == ACCEPTED
        renewed.publish_acknowledged(known.events_topic, b"after")
        wait_bodies(site, known, [b"before", b"after"])
    site.wait_drained()


def test_who_is_known_stays_while_the_upstream_is_away_and_others_are_told_to_come_again(site):
    known, unknown = guest(site, "known"), guest(site, "unknown")
    token = known.token()
    with connection(site) as one:
        assert one.login(known, token=token) == ACCEPTED
        one.publish_acknowledged(known.events_topic, b"before")
        wait_bodies(site, known, [b"before"])
        site.cut_upstream()
        one.publish_acknowledged(known.events_topic, b"during")
    with connection(site) as again:
        assert again.login(known, token=token) == ACCEPTED
        again.publish_acknowledged(known.events_topic, b"later")
        assert try_login(site, unknown) == UNAVAILABLE
        assert try_login(site, known.with_other_key()) in (NOT_AUTHORIZED, UNAVAILABLE)
        site.restore_upstream()
        wait_bodies(site, known, [b"during", b"later"])
    wait_login(site, unknown, ACCEPTED)
    site.wait_drained()


def test_who_is_disabled_above_is_cut_off(site, service):
    known = guest(site, "disabled")
    with connection(site) as one:
        assert one.login(known) == ACCEPTED
        one.publish_acknowledged(known.events_topic, b"1")
        wait_bodies(site, known, [b"1"])
        device = service.manager.get_device(known.device)
        keys = device.authentication.symmetric_key
        arguments = (known.device, device.etag, keys.primary_key, keys.secondary_key)
        service.manager.update_device_with_sas(*arguments, "disabled")
        # The cloud ends its links, and does not let it in again; the hub follows.
        one.expect_closed()
    wait_login(site, known, NOT_AUTHORIZED)
    service.manager.update_device_with_sas(
        known.device, service.manager.get_device(known.device).etag, keys.primary_key, keys.secondary_key, "enabled"
    )
    wait_login(site, known, ACCEPTED)
    token = known.token()
    with_token = lambda: try_login(site, known, token=token) == ACCEPTED
    wait.until("it is let in again with this token", with_token, DEADLINE_SECS)
    with connection(site) as again:
        assert again.login(known, token=token) == ACCEPTED
        again.publish_acknowledged(known.events_topic, b"2")
        wait_bodies(site, known, [b"1", b"2"])
    site.wait_drained()


def test_a_flood_of_wrong_tokens_opens_few_connections_above(site):
    wrong = guest(site, "flooded").with_other_key()
    before, started = site.amqp_link.accepted, time.monotonic()
    codes = [try_login(site, wrong, token=wrong.token(time.time() + 3600 + n)) for n in range(60)]
    assert set(codes) <= {NOT_AUTHORIZED, UNAVAILABLE}, codes
    assert 1 <= site.amqp_link.accepted - before <= 5 * (1 + (time.monotonic() - started) // 60), codes
    made_up = [replace(wrong, device=f"made-up-{n}") for n in range(100)]
    codes = [try_login(site, identity) for identity in made_up]
    assert set(codes) <= {NOT_AUTHORIZED, UNAVAILABLE}, codes
    elapsed_secs = time.monotonic() - started
    assert site.amqp_link.accepted - before <= REFUSED_BURST + REFUSED_PER_SEC * elapsed_secs + 1, codes
    # Who is in scope, and who was let in before, come and go meanwhile.
    assert try_login(site, site.leaf) == ACCEPTED


def test_the_scope_alone_still_refuses_a_guest(tmp_path):
    with running_site(tmp_path, EVERYTHING_UP) as made:
        identity = guest(made, "guest")
        before = made.amqp_link.accepted
        assert try_login(made, identity) == NOT_AUTHORIZED
        assert made.amqp_link.accepted == before


def test_the_cloud_alone_judges_everybody_and_nobody_asks_for_the_scope(tmp_path):
    with running_site(tmp_path, EVERYTHING_UP, settings={**MODE, "AuthenticationMode": "Cloud"}) as made:
        identity = guest(made, "guest")
        for one in (identity, made.leaf, made.modules["sender"]):
            with connection(made) as open_one:
                assert open_one.login(one) == ACCEPTED, one.client_id
                open_one.publish_acknowledged(one.events_topic, b"body")
            assert try_login(made, one.with_other_key()) == NOT_AUTHORIZED
        for one in (identity, made.leaf, made.modules["sender"]):
            wait_bodies(made, one, [b"body"])
        made.wait_drained()
        assert made.https_link.accepted == 0


def test_a_guest_behind_an_upstream_over_mqtt(tmp_path):
    made = MqttSite(tmp_path, "Mqtt", settings=MODE)
    try:
        made.start_hub()
        identity = guest(made, "guest")
        assert try_login(made, identity.with_other_key()) == NOT_AUTHORIZED
        with sdk.client(made, identity) as client:
            client.send_message(sdk.message("one"))
            wait_bodies(made, identity, [b"one"])
            assert client.get_twin()["reported"] is not None
        # With another token: the connection above is made anew.
        with sdk.client(made, identity) as client:
            client.send_message(sdk.message("two"))
            wait_bodies(made, identity, [b"two"])
        made.wait_drained()
    finally:
        made.close()


def test_messages_of_a_guest_wait_for_it_over_a_restart(tmp_path):
    made = Site(tmp_path, EVERYTHING_UP, settings=MODE)
    try:
        made.start_hub()
        identity = guest(made, "guest")
        wait_login(made, identity, ACCEPTED)
        with connection(made) as one:
            token = identity.token()
            assert one.login(identity, token=token) == ACCEPTED
            made.cut_upstream()
            one.publish_acknowledged(identity.events_topic, b"kept")
        made.hub.kill()
        made.restore_upstream()
        made.start_hub()
        with connection(made) as other:
            assert other.login(made.leaf) == ACCEPTED
            other.publish_acknowledged(made.leaf.events_topic, b"other")
        wait_bodies(made, made.leaf, [b"other"])
        # Its token is not known any more, and it is not in scope: nothing goes up for it, and nothing is given up.
        wait.until("one message is left", lambda: made.queued() == 1, DEADLINE_SECS)
        assert bodies(made, identity) == []
        wait_login(made, identity, ACCEPTED)
        wait_bodies(made, identity, [b"kept"])
        made.wait_drained()
    finally:
        made.close()
