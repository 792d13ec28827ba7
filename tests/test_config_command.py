"""`edgehub config`: where each setting comes from, without a secret, and a schema that the defaults fit."""

import json

from blackbox import process

KEY = "cGxhbnRlZCBzZWNyZXQgbnVtYmVyIG9uZQ=="
ENVIRONMENT = {
    "IotHubConnectionString": f"HostName=h;DeviceId=e;ModuleId=$edgeHub;SharedAccessKey={KEY}",
    "mqttSettings__enabled": "false",
    "amqpSettings__enabled": "false",
    "httpSettings__enabled": "false",
    "OptimizeForPerformance": "false",
    "StorageFolders": "/x",
}


def config(*arguments, variables=None, code=0):
    done = process.run(["config", *arguments], variables if variables is not None else ENVIRONMENT)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def test_every_value_has_its_origin(tmp_path):
    file = tmp_path / "edgehub.toml"
    file.write_text("MaxConnectedClients = 7\n[listen]\nmqtt_port = 1\n")
    shown = json.loads(config("show", "--config", file, "--set", "listen.mqtt_port=2", "--format", "json"))
    by_name = {setting["name"]: setting for setting in shown["settings"]}
    assert by_name["MaxConnectedClients"]["origin"] == {"kind": "file", "place": str(file)}
    assert (by_name["listen.mqtt_port"]["value"], by_name["listen.mqtt_port"]["origin"]["kind"]) == ("2", "flag")
    assert by_name["mqttSettings.enabled"]["origin"] == {"kind": "environment", "place": "mqttSettings__enabled"}
    assert by_name["CloudOperationTimeoutSecs"]["origin"] == {"kind": "default", "place": None}
    assert by_name["IotHubConnectionString"]["value"] == "***"
    assert by_name["OptimizeForPerformance"]["effect"] == "ignored" and by_name["OptimizeForPerformance"]["note"]
    assert [(unknown["name"], unknown["suggestion"]) for unknown in shown["unknown"]] == [
        ("StorageFolders", "StorageFolder")
    ]
    assert shown["error"] is None
    text = config("show", "--config", file)
    assert "unknown: StorageFolders" in text and "no effect: the store sizes itself" in text
    assert KEY not in text and "***" in text
    given = config("show", "--given", "--config", file)
    assert "CloudOperationTimeoutSecs" not in given and "MaxConnectedClients" in given


def test_what_is_not_usable_is_shown_with_the_reason():
    shown = json.loads(config("show", "--format", "json", variables={"MessageAckTimeoutSecs": "soon"}))
    assert "nothing says who the hub is" in shown["error"]
    assert "settings file" in config("show", "--config", "/nonexistent.toml", code=1)


def leaves(schema, above=""):
    for name, entry in schema["properties"].items():
        if "properties" in entry:
            yield from leaves(entry, f"{above}{name}.")
        else:
            yield f"{above}{name}", entry


def test_schema_and_reference_know_every_setting_that_is_shown():
    schema = dict(leaves(json.loads(config("schema"))))
    shown = json.loads(config("show", "--format", "json"))["settings"]
    assert len(shown) > 30 and all(setting["name"] in schema for setting in shown)
    reference = config("reference")
    assert all(f"| `{name}` |" in reference or f"| `{name}.*` |" in reference for name in schema)
    assert schema["MaxUpstreamBatchSize"]["maximum"] == 500
    assert schema["IotHubConnectionString"]["writeOnly"] is True
