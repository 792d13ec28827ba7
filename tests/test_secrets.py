"""Keys and tokens that the hub is given or shown never come out again: not in logs, pages, verbs or errors."""

import base64
import json
import urllib.parse

from blackbox import mqtt, pages, process, sdk, wait
from blackbox.site import MQTT_PORT, manifest

ROUTES = {"up": "FROM /messages/* INTO $upstream"}
PLANTED_PASSWORD = "planted-proxy-word"
PLANTED_MANIFEST = "cGxhbnRlZCBpbiB0aGUgbWFuaWZlc3Q="
PLANTED_UNKNOWN = "cGxhbnRlZCBpbiBhbiB1bmtub3duIG5hbWU="
# A proxy that nobody listens at would cut the hub off from its cloud.
SETTINGS = {
    "EDGEHUB_NONSENSE": PLANTED_UNKNOWN,
    "RuntimeLogLevel": "verbose",
    "SslProtocols": f"tls1.2,HostName=h;SharedAccessKey={PLANTED_UNKNOWN}",
}


def spellings(key):
    """A key as it may show: as it is, percent-encoded, decoded, and in hex."""
    raw = base64.b64decode(key)
    return {key, urllib.parse.quote(key, safe=""), key.rstrip("="), raw.hex(), raw.hex().upper()}


class Secrets:
    """What must not be seen."""

    def __init__(self, site):
        self.texts = {PLANTED_PASSWORD}
        identities = [site._hub_identity, *site.leaves, *site.modules.values()]  # pylint: disable=protected-access
        for key in (*(identity.key for identity in identities), PLANTED_MANIFEST, PLANTED_UNKNOWN):
            self.texts |= spellings(key)

    def add_token(self, token):
        signature = next(part[4:] for part in token.split("&") if part.startswith("sig="))
        self.texts |= {signature, urllib.parse.unquote(signature)}
        return token

    def assert_absent(self, where, text):
        found = [secret for secret in self.texts if secret in text]
        assert not found, f"{where} shows {found}: …{text[max(0, text.find(found[0]) - 200):][:400]}"
        assert "SharedAccessSignature sr=" not in text and "PRIVATE KEY" not in text, where


def outputs(site):
    """Everything that an operator can see, by its name."""
    for page in ("/metrics", "/healthz", "/readyz", "/startupz", "/status"):
        yield page, pages.get(site.pages, page)[2]
    for verb in (["status"], ["clients", "list"], ["clients", "show", "leaf1"], ["ledger"], ["queues", "list"],
                 ["queues", "show", "iothub"], ["dlq", "list"]):  # fmt: skip
        for form in ("text", "json"):
            done = process.run([*verb, "--format", form], {"StorageFolder": site.storage})
            yield " ".join(verb), done.stdout + done.stderr
    given = {**site.environment(), "https_proxy": f"http://me:{PLANTED_PASSWORD}@127.0.0.1:1"}
    document = site.folder / "deployment.json"
    for arguments in (["config", "show"], ["config", "show", "--format", "json"],
                      ["check", "--timeout-secs", "5", "--manifest", document],
                      ["check", "--timeout-secs", "5", "--format", "json", "--manifest", document]):  # fmt: skip
        done = process.run(arguments, given)
        assert "panicked" not in done.stderr and done.stdout, (arguments, done.stderr)
        yield " ".join(map(str, arguments)), done.stdout + done.stderr


def plant_in_manifest(site):
    content = manifest(ROUTES)
    modules = content["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"]
    modules["filter"] = {
        "type": "docker", "status": "running", "restartPolicy": "always", "version": "1.0",
        "settings": {"image": "none", "createOptions": "{}"},
        "env": {"KEY": {"value": PLANTED_MANIFEST}, "BROKEN": PLANTED_MANIFEST},
    }  # fmt: skip
    site._manifest.write_text(json.dumps(content))  # pylint: disable=protected-access


def test_nothing_that_is_secret_comes_out(make_site):
    site = make_site(ROUTES, settings=SETTINGS)
    plant_in_manifest(site)
    assert site.hub.stop() == 0
    site.start_hub()
    secrets = Secrets(site)

    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        for identity, accepted in ((site.leaf, True), (site.leaf.with_other_key(), False), (site.stranger, False)):
            secrets.texts |= spellings(identity.key)
            with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as other:
                code = other.login(identity, token=secrets.add_token(identity.token()))
                assert (code == 0) == accepted, (identity.client_id, code)
        assert wire.login(site.leaf, token=secrets.add_token(site.leaf.token())) == 0
        wire.publish_acknowledged(site.leaf.events_topic + "marker=sent", b"x", 1)
        with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as broken:
            # A token where a user name belongs, and a client id with one in it.
            token = secrets.add_token(site.leaf.token(expires_at=1))
            broken.send(mqtt.connect(f"leaf1{token}", token, token))
            try:
                broken.receive()
            except mqtt.Closed:
                pass
        site.cloud.wait_telemetry("sent", lambda record: record["properties"].get("marker") == "sent")
        for where, text in outputs(site):
            secrets.assert_absent(where, text)
    site.cut_upstream()
    wait.until("the loss is seen", lambda: "upstream_unreachable" in pages.get(site.pages, "/healthz")[2])
    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message("y"))
    secrets.assert_absent("/healthz", pages.get(site.pages, "/healthz")[2])
    assert site.hub.stop() == 0
    secrets.assert_absent("the log", site.hub.text())
    secrets.assert_absent("the log of the cloud", site.cloud.process.text())


def test_errors_name_the_setting_and_not_its_value(site, tmp_path):
    secrets = Secrets(site)
    key = site.leaf.key
    file = tmp_path / "edgehub.toml"
    file.write_text(f'IotHubConnectionString = "HostName=h;SharedAccessKey={key}\n')
    for arguments, variables in [
        (["run"], {"IotHubConnectionString": f"HostName=h;DeviceId=d;ModuleId=$edgeHub;SharedAccessKey={key}!"}),
        (["run"], {"IotHubConnectionString": f"SharedAccessKey={key}"}),
        (["run"], {"MessageAckTimeoutSecs": f"SharedAccessKey={key}"}),
        (["run", "--set", f"IotHubConnectionString=HostName=h;SharedAccessKey={key}"], {}),
        (["run", "--set", f"SharedAccessKey={key}"], {}),
        (["run", "--set", f"{key.rstrip('=')}"], {}),
        (["run", "--config", file], {}),
        (["config", "show", "--config", file], {}),
        (["check", "--config", file], {}),
        (["check"], {"MessageAckTimeoutSecs": f"SharedAccessKey={key}"}),
        (["config", "show"], {"MessageAckTimeoutSecs": f"SharedAccessKey={key}"}),
    ]:
        done = process.run(arguments, variables)
        secrets.assert_absent(" ".join(map(str, arguments[:2])), done.stdout + done.stderr)
        assert "panicked" not in done.stderr and (done.stdout or done.stderr)
