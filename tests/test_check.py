"""`edgehub check`: one line each of what a hub would stumble over, and an exit code that says how bad it is."""

import json
from contextlib import closing

from blackbox import process
from blackbox.certificates import Authority
from blackbox.proxy import HttpProxy
from blackbox.site import CLOUD_HOST
from blackbox.workload import WorkloadSite

CHECKS = ["settings", "certificates", "store", "disk", "clock", "names", "upstream_amqp", "upstream_https", "routes"]


def check(site, codes, *arguments, manifest=True, **changed):
    codes = codes if isinstance(codes, tuple) else (codes,)
    variables = {**site.environment(), **changed}
    if manifest:
        arguments = ("--manifest", site.folder / "deployment.json", *arguments)
    done = process.run(["check", *arguments, "--format", "json"], variables)
    assert done.returncode in codes, (done.stdout, done.stderr)
    report = json.loads(done.stdout)
    assert [entry["check"] for entry in report["checks"]] == CHECKS
    assert report["verdict"] == ["ok", "warning", "error"][done.returncode]
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


def test_a_web_socket_is_opened_where_the_hub_would_open_one(site):
    found = check(site, 1, UpstreamProtocol="AmqpWs")
    port = site.https_link.port
    assert found["upstream_amqp"] == ("ok", f"127.0.0.1:{port} is reached in a WebSocket, its certificate is trusted")
    assert found["upstream_https"] == ("ok", f"127.0.0.1:{port} is reached, its certificate is trusted")


def test_a_proxy_is_asked_as_the_hub_asks_it(site):
    # A name that only the proxy knows.
    way = {"UpstreamProtocol": "AmqpWs", "EDGEHUB_UPSTREAM__HOST": CLOUD_HOST, "EDGEHUB_UPSTREAM__HTTPS_PORT": "443"}
    with closing(HttpProxy((site.cloud.address, site.cloud.https_port))) as proxy:
        found = check(site, 1, https_proxy=f"http://127.0.0.1:{proxy.port}", **way)
        by = f"{CLOUD_HOST}:443 is reached through the proxy 127.0.0.1:{proxy.port}"
        assert found["upstream_amqp"] == ("ok", f"{by} in a WebSocket, its certificate is trusted")
        assert found["upstream_https"] == ("ok", f"{by}, its certificate is trusted")
        assert found["names"] == ("ok", f"127.0.0.1 is known; {site.address} is known")
        assert "s from that of the upstream" in found["clock"][1]
        assert proxy.asked == [f"CONNECT {CLOUD_HOST}:443 HTTP/1.1"] * 2
    with closing(HttpProxy((site.cloud.address, 1), "407 Proxy Authentication Required")) as proxy:
        found = check(site, 2, https_proxy=f"http://me:planted@127.0.0.1:{proxy.port}", **way)
        for name in ("upstream_amqp", "upstream_https"):
            verdict, text = found[name]
            assert verdict == "error" and f"the proxy 127.0.0.1:{proxy.port} answers 407" in text, found
            assert "planted" not in text
    found = check(site, 2, https_proxy="http://127.0.0.1:1", **way)
    assert found["upstream_https"][0] == "error", found
    assert "the proxy 127.0.0.1:1 is not reached" in found["upstream_https"][1], found
    # AMQP without a WebSocket does not go through it.
    found = check(site, 2, https_proxy="http://127.0.0.1:1", EDGEHUB_UPSTREAM__HOST="nowhere.invalid")
    assert found["names"][0] == "error" and "nowhere.invalid, which is the upstream" in found["names"][1], found


def test_without_a_key_certificate_and_trust_come_from_the_security_daemon(tmp_path):
    with closing(WorkloadSite(tmp_path, {})) as site:
        found = check(site, 2)
        verdict, text = found["certificates"]
        assert verdict == "error" and "workload API" in text and str(site.socket) in text, found
        assert found["upstream_https"][0] == "error", "whom to trust there is not known either"
        site.start_daemon()
        # How full the disk of this machine is is not for the test to say.
        found = check(site, (0, 1))
        assert found["certificates"][0] == "ok" and "valid until" in found["certificates"][1], found
        assert "its certificate is trusted" in found["upstream_amqp"][1], found


def test_settings_that_cannot_be_used_leave_the_rest_unsaid(site):
    found = check(site, 2, manifest=False, MessageAckTimeoutSecs="soon")
    assert found["settings"][0] == "error" and "MessageAckTimeoutSecs" in found["settings"][1]
    assert {verdict for name, (verdict, _) in found.items() if name != "settings"} == {"skipped"}


def test_a_check_changes_nothing(make_site, tmp_path):
    site = make_site()
    folder = tmp_path / "not there yet"
    check(site, 1, StorageFolder=folder)
    assert not folder.exists()
