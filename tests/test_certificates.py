"""Devices that log in with certificates: by thumbprint, by authority, and through a proxy."""

import struct
import urllib.parse

import pytest
from azure.iot.device import IoTHubDeviceClient, X509

from blackbox import mqtt, sdk, websocket
from blackbox.certificates import Authority
from blackbox.site import EDGE, HTTPS_PORT, MQTT_PORT, WEBSOCKETS
from blackbox.websocket import BINARY, WebSocket

SETTINGS = WEBSOCKETS
ACCEPTED, NOT_AUTHORIZED = 0, 5


class World:
    """Devices with certificates, and certificates that fit none."""

    def __init__(self, site):
        authority = site.authority
        elsewhere = site.folder / "elsewhere"
        elsewhere.mkdir()
        foreign = Authority(elsewhere)
        self.files, thumbprints = {}, {}
        for name, made in {
            "own": authority.client("own", "whoever", self_signed=True),
            "second": authority.client("second", "whoever", self_signed=True),
            "expired": authority.client("expired", "bythumb3", self_signed=True, expired=True),
            "issued": authority.client("issued", "byauthority"),
            "issued-expired": authority.client("issued-expired", "byauthority", expired=True),
            "other-name": authority.client("other-name", "bythumb1"),
            "self-made": authority.client("self-made", "byauthority", self_signed=True),
            "foreign": foreign.client("foreign", "byauthority"),
        }.items():
            self.files[name], thumbprints[name] = made

        def create(device, *flags):
            return site.cloud.create_identity(device, None, "--parent", EDGE, *flags)

        own, second, expired = thumbprints["own"], thumbprints["second"], thumbprints["expired"]
        self.devices = {
            "bythumb1": create("bythumb1", "--x509-thumbprint", own[0].upper(), "--x509-thumbprint", second[1]),
            "bythumb2": create("bythumb2", "--x509-thumbprint", own[1]),
            "bythumb3": create("bythumb3", "--x509-thumbprint", expired[0]),
            "byauthority": create("byauthority", "--x509-authority"),
            "bykey": site.leaf,
        }


@pytest.fixture(scope="module")
def world(site):
    return World(site)


def connect_without_password(identity):
    return mqtt.connect(identity.client_id, identity.username)


@pytest.mark.parametrize(
    ("device", "certificate", "code"),
    [
        ("bythumb1", "own", ACCEPTED),
        ("bythumb1", "second", ACCEPTED),
        ("bythumb2", "own", ACCEPTED),
        ("bythumb2", "second", NOT_AUTHORIZED),
        ("bythumb3", "expired", NOT_AUTHORIZED),
        ("bythumb1", None, NOT_AUTHORIZED),
        ("byauthority", "issued", ACCEPTED),
        ("byauthority", "issued-expired", NOT_AUTHORIZED),
        ("byauthority", "other-name", NOT_AUTHORIZED),
        ("byauthority", "self-made", NOT_AUTHORIZED),
        ("byauthority", "foreign", NOT_AUTHORIZED),
        ("bykey", "issued", NOT_AUTHORIZED),
    ],
)
def test_a_certificate_decides(site, world, device, certificate, code):
    identity = world.devices[device]
    files = world.files.get(certificate)
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root, certificate=files) as wire:
        wire.send(connect_without_password(identity))
        assert wire.expect(mqtt.CONNACK)[1] == code
        if code == ACCEPTED:
            wire.publish_acknowledged(identity.events_topic, b"x")
        else:
            wire.expect_closed()


def test_a_module_has_no_certificate_and_a_token_goes_before_one(site, world):
    files = world.files["own"]
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root, certificate=files) as wire:
        wire.send(connect_without_password(site.modules["sender"]))
        assert wire.expect(mqtt.CONNACK)[1] == NOT_AUTHORIZED
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root, certificate=files) as wire:
        assert wire.login(site.leaf) == ACCEPTED


@pytest.mark.parametrize("websockets", [False, True])
@pytest.mark.parametrize(("device", "certificate"), [("bythumb1", "own"), ("byauthority", "issued")])
def test_the_sdk_sends_with_a_certificate(site, world, device, certificate, websockets):
    chain, key = world.files[certificate]
    marker = f"x509-{device}-{websockets}"
    client = IoTHubDeviceClient.create_from_x509_certificate(
        x509=X509(str(chain), str(key)), hostname=site.address, device_id=device,
        server_verification_cert=site.root_pem, websockets=websockets,
    )  # fmt: skip
    try:
        client.connect()
        client.send_message(sdk.message("x", {"marker": marker}))
    finally:
        client.shutdown()
    record = site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker)[0]
    assert record["deviceId"] == device


def test_a_proxy_forwards_certificates_with_its_own_token_only(site, world):
    proxy = site.cloud.create_identity(EDGE, "IoTEdgeAPIProxy")
    chain = urllib.parse.quote(world.files["issued"][0].read_text(), safe="")
    for token, certificate, code in [
        (proxy.token(), chain, ACCEPTED),
        (None, chain, NOT_AUTHORIZED),
        (site.modules["sender"].token(), chain, NOT_AUTHORIZED),
        (proxy.token(), "nonsense", NOT_AUTHORIZED),
        (proxy.token(), None, NOT_AUTHORIZED),
    ]:
        headers = {"x-ms-edge-clientcert": certificate, "Authorization": token}
        with WebSocket(site, HTTPS_PORT, **headers) as wire:
            assert wire.status == 101
            wire.send(websocket.frame(BINARY, connect_without_password(world.devices["byauthority"])))
            wire.expect(BINARY, b"\x20\x02\x00" + struct.pack("B", code))
    # Who forwards without being believed gets nobody in, whatever the password.
    with WebSocket(site, HTTPS_PORT, **{"x-ms-edge-clientcert": chain}) as wire:
        wire.send(websocket.frame(BINARY, mqtt.connect_as(site.leaf)))
        wire.expect(BINARY, b"\x20\x02\x00\x05")
