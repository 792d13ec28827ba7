"""What a client has proved is checked again while it is connected; renewing a token loses nothing."""

import json
import time

import pytest

from blackbox import mqtt, sdk, wait
from blackbox.sequence import Arrivals
from blackbox.site import MQTT_PORT, WEBSOCKETS

# Expired tokens count for five more minutes.
TOLERANCE_SECS = 300
# The SDK renews two minutes before the end, so after a few seconds.
RENEWED_TOKEN_SECS = 124
SETTINGS = {**WEBSOCKETS, "DeviceScopeCacheRefreshRateSecs": "1"}


def connection(site):
    return mqtt.Connection(site.address, MQTT_PORT, site.authority.root)


def test_an_expired_token_ends_the_open_connection(site):
    with connection(site) as first:
        # Who it is has been asked of the upstream from here on.
        assert first.login(site.leaf) == 0
    with connection(site) as expiring, connection(site) as lasting:
        assert lasting.login(site.leaves[1]) == 0
        expires_at = time.time() - TOLERANCE_SECS + 10
        assert expiring.login(site.leaf, token=site.leaf.token(expires_at)) == 0
        expiring.publish_acknowledged(site.leaf.events_topic + "marker=before", b"x")
        expiring.expect_closed()
        assert time.time() >= int(expires_at) + TOLERANCE_SECS
        lasting.ping()
    with connection(site) as renewed:
        assert renewed.login(site.leaf) == 0


def change_registry(site, device, change):
    path = site.folder / "cloud" / "registry.json"
    document = json.loads(path.read_text())
    document["identities"] = [
        changed
        for entry in document["identities"]
        for changed in [change(entry) if entry["deviceId"] == device else entry]
        if changed is not None
    ]
    fresh = path.with_suffix(".changed")
    fresh.write_text(json.dumps(document))
    fresh.rename(path)


@pytest.mark.parametrize("change", ["disabled", "removed"])
def test_a_device_that_loses_its_right_is_cut_off(site, change):
    device = site.leaves[1] if change == "disabled" else site.leaves[2]
    with connection(site) as open_one, connection(site) as other:
        assert open_one.login(device) == 0
        assert other.login(site.leaf) == 0
        disabled = {"status": "disabled"}
        change_registry(
            site, device.device, lambda entry: {**entry, **disabled} if change == "disabled" else None
        )
        open_one.expect_closed()
        other.ping()
    with connection(site) as again:
        assert again.login(device) == 5


@pytest.mark.parametrize("websockets", [False, True])
def test_the_sdk_renews_its_token_without_loss(site, websockets):
    marker = f"renew-{websockets}"
    sender, sent = site.modules["sender"], 0
    connected_before = site.hub.text().count("client edge1/sender connected")
    with sdk.client(site, sender, websockets=websockets, sastoken_ttl=RENEWED_TOKEN_SECS) as client:

        def reconnected():
            return site.hub.text().count("client edge1/sender connected") >= connected_before + 3

        deadline = time.monotonic() + wait.DEADLINE_SECS
        while not reconnected():
            assert time.monotonic() < deadline, "the SDK has not renewed its token twice"
            client.send_message(sdk.message(str(sent), {"marker": marker}))
            sent += 1
    # What was not acknowledged when the SDK changed its connection comes again: at least once, in order.
    site.wait_drained()
    records = [record for record in site.cloud.telemetry() if record["properties"].get("marker") == marker]
    arrivals = Arrivals.of([int(record["body"]) for record in records])
    arrivals.assert_complete(range(sent))
    arrivals.assert_ordered()
