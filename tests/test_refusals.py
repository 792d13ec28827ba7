"""Who may not connect, and who may not speak for another."""

import time
from dataclasses import replace

import pytest
from azure.iot.device.exceptions import CredentialError

from blackbox import mqtt, sdk
from blackbox.site import MQTT_PORT

ACCEPTED, UNAVAILABLE, NOT_AUTHORIZED = 0, 3, 5


def connection(site):
    return mqtt.Connection(site.address, MQTT_PORT, site.authority.root)


@pytest.fixture(autouse=True)
def others_go_on(site):
    """A client that was there before stays connected and served."""
    with connection(site) as other:
        assert other.login(site.leaves[2]) == ACCEPTED
        yield
        other.publish_acknowledged(site.leaves[2].events_topic, b"still here", 7)


def test_a_wrong_key_is_refused_for_the_sdk(site):
    with sdk.client(site, site.leaf.with_other_key(), connect=False) as client:
        with pytest.raises(CredentialError):
            client.connect()


def test_an_unknown_device_is_refused_for_the_sdk(site):
    with sdk.client(site, site.stranger, connect=False) as client:
        with pytest.raises(CredentialError):
            client.connect()


def test_a_wrong_key_of_a_module_is_refused(site):
    with connection(site) as wire:
        assert wire.login(site.modules["sender"].with_other_key()) == NOT_AUTHORIZED
        wire.expect_closed()


def test_an_expired_token_is_refused(site):
    with connection(site) as wire:
        assert wire.login(site.leaf, token=site.leaf.token(time.time() - 3600)) == NOT_AUTHORIZED
        wire.expect_closed()


def test_a_token_of_another_device_is_refused(site):
    with connection(site) as wire:
        assert wire.login(site.leaf, token=site.leaves[1].token()) == NOT_AUTHORIZED
        wire.expect_closed()


def test_a_token_of_another_cloud_is_refused(site):
    with connection(site) as wire:
        assert wire.login(site.leaf, token=replace(site.leaf, host="other.test").token()) == NOT_AUTHORIZED
        wire.expect_closed()


def test_garbage_in_place_of_a_token_is_refused(site):
    for token in ("x", "SharedAccessSignature ", "SharedAccessSignature sr=&sig=&se=", "\x7f" * 5000):
        with connection(site) as wire:
            assert wire.login(site.leaf, token=token) == NOT_AUTHORIZED
            wire.expect_closed()


def test_a_client_id_that_is_not_the_user_names_is_refused(site):
    with connection(site) as wire:
        wire.send(mqtt.connect(site.leaves[1].client_id, site.leaf.username, site.leaf.token()))
        assert wire.expect(mqtt.CONNACK)[1] == NOT_AUTHORIZED
        wire.expect_closed()


def test_a_broken_user_name_is_answered_with_unavailable(site):
    for username in ("", "host", "host/leaf1", "host/leaf1/?nothing=here", "host/leaf1/a/b/c/?api-version=2021-04-12"):
        with connection(site) as wire:
            wire.send(mqtt.connect(site.leaf.client_id, username, site.leaf.token()))
            assert wire.expect(mqtt.CONNACK)[1] == UNAVAILABLE, username
            wire.expect_closed()


def test_nobody_publishes_for_another(site):
    with connection(site) as wire:
        assert wire.login(site.leaf) == ACCEPTED
        wire.send(mqtt.publish(site.leaves[1].events_topic + "marker=forged", b"forged", 1))
        wire.expect_closed()
    with connection(site) as wire:
        assert wire.login(site.leaf) == ACCEPTED
        wire.publish_acknowledged(site.leaf.events_topic + "marker=own", b"own")
    site.cloud.wait_telemetry("own", lambda record: record["properties"].get("marker") == "own")
    assert not [r for r in site.cloud.telemetry() if r["properties"].get("marker") == "forged"]


def test_the_newer_connection_of_an_identity_wins(site):
    with connection(site) as older, connection(site) as newer:
        assert older.login(site.leaf) == ACCEPTED
        assert newer.login(site.leaf) == ACCEPTED
        older.expect_closed()
        newer.publish_acknowledged(site.leaf.events_topic, b"from the newer")
