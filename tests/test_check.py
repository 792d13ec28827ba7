"""`edgehub check`: one line each of what a hub would stumble over, and an exit code that says how bad it is."""

import json

from blackbox import process
from blackbox.certificates import Authority

CHECKS = ["settings", "certificates", "store", "disk", "clock", "names", "upstream_amqp", "upstream_https", "routes"]


def check(site, code, *arguments, manifest=True, **changed):
    variables = {**site.environment(), **changed}
    if manifest:
        arguments = ("--manifest", site.folder / "deployment.json", *arguments)
    done = process.run(["check", *arguments, "--format", "json"], variables)
    assert done.returncode == code, (done.stdout, done.stderr)
    report = json.loads(done.stdout)
    assert [entry["check"] for entry in report["checks"]] == CHECKS
    assert report["verdict"] == ["ok", "warning", "error"][code]
    return {entry["check"]: (entry["verdict"], entry["text"]) for entry in report["checks"]}


def test_a_site_in_order_has_only_the_certificate_of_the_tests_to_tell(site):
    found = check(site, 1)
    told = {name for name, (verdict, _) in found.items() if verdict != "ok"}
    # How full the disk of this machine is is not for the test to say.
    assert told - {"disk"} == {"certificates"} and " free; " in found["disk"][1], found
    assert "expires at" in found["certificates"][1], "it lives two days"
    assert "in use by a running hub" in found["store"][1]
    assert "s from that of the upstream" in found["clock"][1]
    text = process.run(["check", "--manifest", site.folder / "deployment.json"], site.environment())
    assert text.returncode == 1 and len(text.stdout.splitlines()) == len(CHECKS), text.stdout
    assert site._hub_identity.key not in text.stdout + text.stderr  # pylint: disable=protected-access


def test_each_fault_is_its_own_line(site, tmp_path):
    file = tmp_path / "a file"
    file.write_text("x")
    other = Authority(tmp_path)
    broken = tmp_path / "manifest.json"
    broken.write_text("{")
    for changed, name, verdict, part in [
        ({"EdgeDeviceHostName": "other.test"}, "certificates", "error", "not for other.test"),
        ({"EdgeHubDevServerCertificateFile": file}, "certificates", "error", str(file)),
        ({"StorageFolder": file}, "store", "error", ""),
        ({"usePersistentStorage": "false"}, "store", "warning", "lost when the process ends"),
        ({"EDGEHUB_UPSTREAM__HOST": "nowhere.invalid"}, "names", "error", "nowhere.invalid"),
        ({"EDGEHUB_UPSTREAM__AMQP_PORT": 1}, "upstream_amqp", "error", "127.0.0.1:1 is not reached"),
        ({"UpstreamProtocol": "Mqtt", "EDGEHUB_UPSTREAM__MQTT_PORT": 1},
         "upstream_mqtt", "error", "127.0.0.1:1 is not reached"),
        ({"EdgeHubDevTrustBundleFile": "", "EDGEHUB_UPSTREAM__TRUST_FILE": other.root},
         "upstream_amqp", "error", "not trusted"),
        ({"RuntimeLogLevle": "debug"}, "settings", "warning", "RuntimeLogLevle"),
    ]:  # fmt: skip
        variables = {**site.environment(), **changed}
        done = process.run(["check", "--format", "json", "--timeout-secs", "5"], variables)
        entries = {entry["check"]: entry for entry in json.loads(done.stdout)["checks"]}
        entry = entries[name]
        assert entry["verdict"] == verdict and part in entry["text"], (changed, entries)
        assert done.returncode == {"warning": 1, "error": 2}[verdict], (changed, entries)
    done = process.run(["check", "--manifest", broken, "--format", "json"], site.environment())
    routes = json.loads(done.stdout)["checks"][-1]
    assert done.returncode == 2 and routes["verdict"] == "error" and "line 1" in routes["text"]


def test_settings_that_cannot_be_used_leave_the_rest_unsaid(site):
    found = check(site, 2, manifest=False, MessageAckTimeoutSecs="soon")
    assert found["settings"][0] == "error" and "MessageAckTimeoutSecs" in found["settings"][1]
    assert {verdict for name, (verdict, _) in found.items() if name != "settings"} == {"skipped"}


def test_a_check_changes_nothing(make_site, tmp_path):
    site = make_site()
    folder = tmp_path / "not there yet"
    check(site, 1, StorageFolder=folder)
    assert not folder.exists()
