"""Who asks a hub for identities that are none of its business gets none, and disturbs nobody."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from blackbox.flow import Flow
from blackbox.layers import Plant

BODY_BYTES_MAX = 16_384
AT_ONCE = 64
CALLS = 256
BELOW = "devicesAndModulesInTargetDeviceScope"


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    """A hub with two children that do not run; the tests speak for them."""
    made = Plant(tmp_path_factory.mktemp("plant"), ("top",))
    try:
        made.child = made.create("child", None, "--edge-enabled", "--parent", "top")
        made.low = made.create("low", None, "--edge-enabled", "--parent", "child")
        made.sibling = made.create("sibling", None, "--edge-enabled", "--parent", "top")
        made.create("child", "filter")
        made.leaf = made.create("leaf", None, "--parent", "child")
        made.top_leaf = made.create("top-leaf", None, "--parent", "top")
        made.create("sibling-leaf", None, "--parent", "sibling")
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def top(plant):
    return plant.layers[0]


def names(answer):
    status, told = answer
    assert status == 200, told
    assert told["continuationLink"] is None
    modules = [f"{entry['deviceId']}/{entry['moduleId']}" for entry in told["modules"]]
    return {entry["deviceId"] for entry in told["devices"]} | set(modules)


def refused(answer, status=401):
    assert answer[0] == status and set(answer[1]) == {"ErrorMessage"}, answer
    return answer[1]["ErrorMessage"]


def test_a_child_is_told_of_itself_and_what_is_below_it(plant, top):
    own = {"child", "leaf", "low", "child/$edgeHub", "child/$edgeAgent", "child/filter"}
    assert names(top.below(plant.child, "child")) == own
    assert names(top.below(plant.child, "low;child")) == {"low", "low/$edgeHub", "low/$edgeAgent"}
    assert names(top.one(plant.child, "child", "leaf")) == {"leaf"}
    assert names(top.one(plant.child, "child", "child", "filter")) == {"child", "child/filter"}
    status, told = top.one(plant.child, "child", "leaf")
    key = told["devices"][0]["authentication"]["symmetricKey"]["primaryKey"]
    assert (status, key) == (200, plant.leaf.key)


def test_another_s_token_tells_nothing(plant, top):
    for identity in (plant.sibling, plant.low, plant.leaf, plant.top_leaf, plant.child.with_other_key()):
        refused(top.below(identity, "child", device="child"))
    path = f"/devices/child/modules/$edgeHub/{BELOW}"
    body = json.dumps({"authChain": "child"})
    assert top.ask("POST", path, body, {})[0] == 401
    assert top.ask("POST", path.replace("$edgeHub", "filter"), body, {"Authorization": plant.child.token()})[0] == 401
    assert top.ask("GET", path, None, {"Authorization": plant.child.token()}) == (405, None)
    assert top.ask("POST", path + "s", body, {"Authorization": plant.child.token()}) == (404, None)


def test_what_is_not_below_the_caller_is_not_told(plant, top):
    for chain in ("top;child", "sibling;child", "sibling-leaf;child", "top-leaf;child", "nobody;child", "sibling", "child;top"):
        refused(top.below(plant.child, chain))
    # What exists elsewhere and what does not exist look the same.
    for target in ("top", "top-leaf", "sibling", "sibling-leaf", "nobody"):
        text = f"child/$edgeHub not authorized to get information for {target}"
        assert refused(top.one(plant.child, "child", target)) == text
    refused(top.one(plant.child, "child", "sibling", "$edgeHub"))
    # And nobody lost anything by being asked for.
    assert names(top.below(plant.sibling, "sibling")) >= {"sibling", "sibling-leaf", "sibling/$edgeHub"}


def test_bodies_that_cannot_be_are_refused(plant, top):
    for body, status in (
        (json.dumps({"authChain": "child", "x": "x" * BODY_BYTES_MAX}), 413),
        ("{", 400),
        (json.dumps({"pageSize": 10}), 400),
        (json.dumps({"authChain": "child/$edgeHub;child"}), 400),
        ("[" * 10_000, 400),
    ):
        refused(top.scope(BELOW, plant.child, body), status)
    refused(top.one(plant.child, "child", " "), 400)


def test_many_questions_at_once_disturb_nobody(plant, top):
    def ask(number):
        if number % 2:
            return top.below(plant.child, "child")
        return top.one(plant.child, "child", f"nobody{number}")

    with Flow(top, plant.top_leaf, "beside") as flow, ThreadPoolExecutor(AT_ONCE) as pool:
        statuses = [status for status, _ in pool.map(ask, range(CALLS))]
        flow.goes_on()
    assert set(statuses) <= {200, 401, 503} and 200 in statuses, statuses
    # Its places are free again.
    assert names(top.one(plant.child, "child", "leaf")) == {"leaf"}
