"""Three hubs one below another: what a device of the lowest sends arrives in the cloud, and the cloud's changes come down."""

import pytest

from blackbox import mqtt, sdk, wait
from blackbox.layers import Plant
from blackbox.site import MQTT_PORT

DEADLINE_SECS = 120.0


@pytest.fixture(scope="module", params=["Amqp", "Mqtt"])
def plant(request, tmp_path_factory):
    settings = {"UpstreamProtocol": request.param}
    made = Plant(tmp_path_factory.mktemp("plant"), ("top", "middle", "bottom"), settings)
    try:
        made.leaf = made.create("leaf1", None, "--parent", "bottom")
        made.module = made.create("bottom", "sender")
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def bottom(plant):
    return plant.layers[-1]


def connection(layer):
    return mqtt.Connection(layer.address, MQTT_PORT, layer.authority.root)


def wait_marked(layer, marker, count=1):
    found = layer.cloud.wait_telemetry(
        marker, lambda record: record["properties"].get("marker") == marker, count, DEADLINE_SECS
    )
    return [(record["deviceId"], record.get("moduleId") or None, record["body"]) for record in found]


@pytest.mark.parametrize("sender", ["leaf", "module"])
def test_what_clients_of_the_lowest_hub_send_arrives_in_the_cloud(plant, bottom, sender):
    identity = getattr(plant, sender)
    marker = f"sent-{sender}"
    with sdk.client(bottom, identity) as client:
        client.send_message(sdk.message("21.5", {"marker": marker}))
    assert wait_marked(bottom, marker) == [(identity.device, identity.module, b"21.5")]


def test_a_new_identity_is_usable_at_the_lowest_hub_and_a_removed_one_is_turned_away(plant, bottom):
    # They have all that was there at the start.
    for layer in plant.layers:
        wait.until(
            f"{layer.name} knows its scope", lambda layer=layer: "leaf1" in known(layer, bottom), DEADLINE_SECS
        )
    made = plant.create("newcomer", None, "--parent", "bottom")
    with connection(bottom) as wire:
        assert wire.login(made) == 0
        wire.publish_acknowledged(made.events_topic + "marker=newcomer", b"1")
        assert wait_marked(bottom, "newcomer") == [("newcomer", None, b"1")]
        plant.remove("newcomer")
        # Called at the cloud, it goes down through all hubs; the question whether the device exists goes up again.
        payload = {"deviceIds": ["newcomer"]}

        def refreshed():
            status, answer = plant.invoke("bottom", "$edgeHub", "RefreshDeviceScopeIdentityCache", payload)
            # Not found: its link to the cloud is being made.
            assert status in (200, 404), (status, answer)
            return status == 200 and answer["status"] == 200

        wait.until("the lowest hub has refreshed the identity", refreshed, DEADLINE_SECS)
        wire.expect_closed()
    with connection(bottom) as wire:
        assert wire.login(made) == 5
    with connection(bottom) as wire:
        assert wire.login(plant.leaf) == 0
    for layer in plant.layers[:-1]:
        assert "newcomer" not in known(layer, bottom), layer.name


def known(layer, bottom):
    """The devices that a hub would tell the lowest one of."""
    if layer is bottom:
        return ["leaf1"]
    status, answer = layer.below(bottom.identity, "bottom")
    assert status == 200, answer
    return [entry["deviceId"] for entry in answer["devices"]]


def test_what_is_sent_while_the_top_is_away_arrives_when_it_is_back(plant, bottom):
    top = plant.layers[0]
    assert top.hub.stop() == 0, top.hub.text()[-4000:]
    with connection(bottom) as wire:
        assert wire.login(plant.leaf) == 0
        for number in range(10):
            wire.publish_acknowledged(plant.leaf.events_topic + "marker=away", str(number).encode(), number + 1)
    top.start_hub()
    found = wait_marked(bottom, "away", 10)
    # Once at least, and in order.
    bodies = [int(body) for _, _, body in found]
    assert sorted(set(bodies)) == list(range(10)) and list(dict.fromkeys(bodies)) == list(range(10)), bodies
