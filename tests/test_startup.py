"""What the hub cannot work with ends it with a clear line and an exit code; what it can, it says and goes on."""

import json
from pathlib import Path

import pytest

from blackbox import pages, process, sdk, wait
from blackbox.site import free_address, manifest

MANIFESTS = Path(__file__).resolve().parents[1] / "server/tests/manifests"
UNUSABLE = {
    "module-composition-skeleton.broken.json": "line",
    "tutorial-lower-layer.broken.json": "line 19",
    "tutorial-top-layer.broken.json": "line",
    "tutorial-top-layer.extra-brace-at-end.broken.json": "$edgeHub",
}


def assert_clear_failure(done, *parts):
    """Ends with an exit code, and one line on standard error says what, why, and what to do."""
    assert done.returncode not in (0, 101) and done.returncode > 0, (done.returncode, done.stdout, done.stderr)
    output = done.stdout + done.stderr
    assert "panicked" not in output, output
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert str(part) in done.stderr, f"{part!r} is not in {done.stderr!r}"


def elsewhere(storage):
    """Settings of a second hub that takes nothing from the first."""
    address = free_address()
    return {
        "StorageFolder": storage,
        "EDGEHUB_LISTEN__METRICS_ADDRESS": address,
        "EDGEHUB_LISTEN__MQTT_ADDRESS": address,
        "EDGEHUB_LISTEN__AMQP_ADDRESS": address,
    }


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_broken_manifest_is_named_with_its_fault(site, name):
    file = MANIFESTS / name
    done = process.run(["run", "--manifest", file], site.environment())
    assert_clear_failure(done, file, UNUSABLE[name])


def test_every_broken_manifest_is_covered():
    expected = json.loads((MANIFESTS / "expected.json").read_text())
    broken = {name for name, entry in expected.items() if entry["json"] == "invalid" or not entry.get("hubSchema")}
    assert broken == set(UNUSABLE)


STORE = {"storeAndForwardConfiguration": {"timeToLiveSecs": 1}}
UNUSABLE_DESIRED = {
    "no store section": ({"schemaVersion": "1.1", "routes": {}}, "storeAndForwardConfiguration"),
    "no time to live": (
        {"schemaVersion": "1.1", "routes": {}, "storeAndForwardConfiguration": {}}, "timeToLiveSecs"),
    "no version": ({"routes": {}, **STORE}, "schemaVersion"),
    "unknown version": ({"schemaVersion": "2.0", "routes": {}, **STORE}, "2.0"),
    "no minor version": ({"schemaVersion": "1", "routes": {}, **STORE}, "schema"),
    "no routes": ({"schemaVersion": "1.1", **STORE}, "routes"),
    "routes are a list": ({"schemaVersion": "1.1", "routes": [], **STORE}, "routes"),
}  # fmt: skip


@pytest.mark.parametrize(("desired", "part"), UNUSABLE_DESIRED.values(), ids=UNUSABLE_DESIRED.keys())
def test_unusable_desired_properties_are_refused(site, tmp_path, desired, part):
    content = manifest({})
    content["modulesContent"]["$edgeHub"]["properties.desired"] = desired
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(content))
    variables = {**site.environment(), **elsewhere(tmp_path)}
    assert_clear_failure(process.run(["run", "--manifest", file], variables), part)


def test_a_route_that_does_not_parse_is_reported_and_the_others_work(make_site):
    site = make_site({"good": "FROM /messages/* INTO $upstream", "bad": "FROM /messages/* WHERE level = INTO $upstream"})
    wait.until("the log names the bad route", lambda: "bad" in site.hub.text())
    assert "bad" in json.dumps(site.status()) or "line 1" in site.hub.text()
    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message("through the good one", {"marker": "good"}))
    site.cloud.wait_telemetry("good", lambda record: record["properties"].get("marker") == "good")


def test_a_store_folder_that_cannot_be_written_is_named(site, tmp_path):
    file = tmp_path / "a file"
    file.write_text("not a folder")
    assert_clear_failure(site.run_hub_to_end(**elsewhere(file)), file)


def test_a_store_that_another_hub_has_open_is_named(site):
    assert_clear_failure(site.run_hub_to_end(**elsewhere(site.storage)), site.storage)


def test_a_port_in_use_is_named(site, tmp_path):
    free = elsewhere(tmp_path)
    pages_taken = {**free, "EDGEHUB_LISTEN__METRICS_ADDRESS": site.address}
    assert_clear_failure(site.run_hub_to_end(**pages_taken), f"{site.address}:{site.pages[1]}", "in use")
    mqtt_taken = {**free, "EDGEHUB_LISTEN__MQTT_ADDRESS": site.address}
    assert_clear_failure(site.run_hub_to_end(**mqtt_taken), f"{site.address}:8883", "in use")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"IotHubConnectionString": ""}, "IotHubConnectionString"),
        ({"IotHubConnectionString": "HostName=h"}, "IotHubConnectionString"),
        ({"EdgeHubDevServerCertificateFile": "/nonexistent.pem"}, "/nonexistent.pem"),
        ({"EdgeHubDevServerPrivateKeyFile": "/dev/null"}, "/dev/null"),
        ({"MessageAckTimeoutSecs": "soon"}, "MessageAckTimeoutSecs"),
    ],
    ids=["no identity", "half an identity", "no certificate", "empty key", "not a number"],
)
def test_unusable_settings_are_named(site, tmp_path, change, part):
    done = site.run_hub_to_end(**{**elsewhere(tmp_path), **change})
    assert_clear_failure(done, part)
    assert site.leaf.key not in done.stderr


def test_unknown_options_are_named(site):
    for arguments in (["--nonsense"], ["frobnicate"], ["run", "--set", "no.such.setting=1"]):
        done = process.run(arguments, site.environment())
        assert done.returncode not in (0, 101)
        assert arguments[-1].split("=")[0] in done.stderr, done.stderr


def test_the_first_hub_went_on(site):
    assert pages.get(site.pages, "/healthz")[0] == 200
