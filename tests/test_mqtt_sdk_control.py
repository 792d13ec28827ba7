"""Twins, direct methods and cloud-to-device messages through hub and cloud: unmodified SDKs of Python and Node over MQTT
and MQTT in WebSockets below, the service SDK above."""

import json
import queue

import pytest
from azure.iot.device import MethodResponse

from blackbox import node, sdk, service, wait
from blackbox.service import desire, invoke, twin
from blackbox.site import WEBSOCKETS
from conftest import EVERYTHING_UP, running_site

SETTINGS = {**WEBSOCKETS, "ReportedPropertiesSyncFrequencySecs": "1"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    options = {"settings": SETTINGS, "cloud": service.NamedByAddress}
    with running_site(tmp_path_factory.mktemp("site"), EVERYTHING_UP, **options) as made:
        sdk.wait_twins(made, made.leaves[2])
        yield made


@pytest.fixture
def manager(site):
    with service.manager_of(site) as made:
        yield made


def who(site, kind):
    return site.leaf if kind == "device" else site.modules["receiver"]


@pytest.mark.parametrize("kind", ["device", "module"])
@pytest.mark.parametrize("websockets", [False, True], ids=["mqtt", "mqtt-ws"])
def test_a_twin_is_read_reported_to_and_its_changes_arrive(site, manager, kind, websockets):
    identity = who(site, kind)
    mark = f"{kind}-{websockets}"
    with sdk.client(site, identity, websockets=websockets) as client:
        patches = queue.Queue()
        client.on_twin_desired_properties_patch_received = patches.put
        version = client.get_twin()["desired"]["$version"]
        desire(manager, identity, {"mark": mark, "gone": 1})
        assert patches.get(timeout=wait.DEADLINE_SECS) == {"mark": mark, "gone": 1, "$version": version + 1}
        desire(manager, identity, {"gone": None})
        assert patches.get(timeout=wait.DEADLINE_SECS) == {"gone": None, "$version": version + 2}
        client.patch_twin_reported_properties({"state": {"mark": mark}})
        wait.until(
            "the cloud has what was reported",
            lambda: (twin(manager, identity).properties.reported or {}).get("state") == {"mark": mark},
        )
        read = client.get_twin()
        assert read["desired"]["mark"] == mark and "gone" not in read["desired"]
        assert read["reported"]["state"] == {"mark": mark}


@pytest.mark.parametrize("kind", ["device", "module"])
@pytest.mark.parametrize("websockets", [False, True], ids=["mqtt", "mqtt-ws"])
def test_methods_are_called_and_answered(site, manager, kind, websockets):
    identity = who(site, kind)
    with sdk.client(site, identity, websockets=websockets) as client:

        def answer(request):
            payload = {"name": request.name, "got": request.payload}
            client.send_method_response(MethodResponse.create_from_method_request(request, 201, payload))

        client.on_method_request_received = answer

        def called(name, payload):
            result = invoke(manager, identity, name, payload)
            return result.status, json.loads(json.dumps(result.payload))

        # What the client takes is told upstream behind its back.
        def answered():
            try:
                return called("first", {"n": 1})
            except Exception:  # pylint: disable=broad-except
                return None

        assert wait.until("methods reach the client", answered) == (201, {"name": "first", "got": {"n": 1}})
        assert called("second", [1, None, "ü"]) == (201, {"name": "second", "got": [1, None, "ü"]})


@pytest.mark.parametrize("kind", ["device", "module"])
@pytest.mark.parametrize("transport", ["tcp", "ws"])
def test_the_node_sdk_has_a_twin_and_methods(site, manager, kind, transport):
    identity = who(site, kind)
    with node.Control(site, transport, identity) as client:
        client.wait_line("ready")
        client.wait_line("reported")
        wait.until(
            "the cloud has what was reported",
            lambda: (twin(manager, identity).properties.reported or {}).get("node") == transport,
        )
        level = f"{kind}-{transport}"
        desire(manager, identity, {"level": level})
        client.wait_line(f'desired "{level}"')

        def answered():
            try:
                result = invoke(manager, identity, "reboot", {"delay": 3})
            except Exception:  # pylint: disable=broad-except
                return None
            return result.status, result.payload

        assert wait.until("the method reaches the client", answered) == (202, {"got": {"delay": 3}})


@pytest.mark.parametrize("websockets", [False, True], ids=["mqtt", "mqtt-ws"])
def test_messages_of_the_cloud_reach_the_device_also_after_it_was_away(site, manager, websockets):
    identity = site.leaves[1]
    for body in ("first", "second"):
        messages = queue.Queue()
        # The handler is there before the connection: a stored session delivers at once.
        with sdk.client(site, identity, connect=False, websockets=websockets) as client:
            client.on_message_received = messages.put  # connects
            for part in ("a", "b"):
                name = f"{body}-{part}-{websockets}"
                manager.send_c2d_message(identity.device, name, {"messageId": name, "kind": "50 % / ü"})
                got = messages.get(timeout=wait.DEADLINE_SECS)
                assert (got.data.decode(), got.message_id) == (name, name)
                assert got.custom_properties["kind"] == "50 % / ü"
            wait.until(
                "the cloud's queue is empty",
                lambda: manager.get_device(identity.device).cloud_to_device_message_count == 0,
            )
