"""The configuration of the hub is that of its twin: routes come from the cloud, and what came of them goes back."""

import json

import pytest

from blackbox import pages, process, sdk, wait
from blackbox.process import Process
from blackbox.site import EDGE, Site

UP = "FROM /messages/* INTO $upstream"
BAD = "FROM /messages/* WHERE level = INTO $upstream"


def desired(routes, schema="1.1"):
    return {
        "schemaVersion": schema,
        "routes": routes,
        "storeAndForwardConfiguration": {"timeToLiveSecs": 7200},
    }


class TwinSite(Site):
    """A site whose hub is started without a manifest."""

    def begin_hub(self):
        """Starts the hub; it may have to wait for its configuration."""
        settings = {"ReportedPropertiesSyncFrequencySecs": "1"}
        self.hub = Process("hub", ["run"], {**self.environment(), **settings}, self.folder / "hub.log")
        self.hub.wait_ready("/healthz answers", lambda: pages.get(self.pages, "/healthz")[0] in (200, 503))

    def wait_serving(self):
        wait.until("/healthz answers 200", lambda: pages.get(self.pages, "/healthz")[0] == 200)

    def deploy(self, properties, verb="replace"):
        document = self.folder / "twin.json"
        document.write_text(json.dumps({"properties": {"desired": properties}}))
        self._twin(verb, document)

    def reported(self):
        return json.loads(self._twin("get"))["properties"]["reported"]

    def wait_reported(self, what, matches):
        def probe():
            reported = self.reported()
            return reported if matches(reported) else None

        return wait.until(f"reported properties: {what}", probe)

    def wait_status(self, code):
        """The status of the newest desired properties, when the hub has told it."""
        version = json.loads(self._twin("get"))["properties"]["desired"]["$version"]
        reported = self.wait_reported(
            f"{code} for version {version}",
            lambda reported: reported.get("lastDesiredVersion") == version
            and reported["lastDesiredStatus"]["code"] == code,
        )
        return reported["lastDesiredStatus"]["description"]

    def routes(self):
        in_force = self.status()["configuration"]["in_force"]
        return in_force and in_force["routes"]

    def _twin(self, verb, *arguments):
        where = ["--data-dir", self.cloud.data, "--device-id", EDGE, "--module-id", "$edgeHub"]
        done = process.run(["cloud", "twin", verb, *where, *arguments])
        assert done.returncode == 0, (verb, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture
def twin_site(tmp_path):
    site = TwinSite(tmp_path, {})
    try:
        yield site
    finally:
        site.close()


def send(site, marker):
    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message(marker, {"marker": marker}))


def arrived(site, marker):
    return site.cloud.wait_telemetry(marker, lambda record: record["properties"].get("marker") == marker)


def test_routes_come_from_the_twin_and_what_came_of_them_goes_back(twin_site):
    site = twin_site
    site.begin_hub()
    # Nothing was deployed: the ports stay closed, and the page says what is waited for.
    code, _, text = pages.get(site.pages, "/healthz")
    assert (code, json.loads(text)["status"]) == (503, "starting"), text
    site.deploy(desired({"up": UP}))
    site.wait_serving()
    assert site.routes() == ["up"]
    assert site.wait_status(200) == ""
    send(site, "first")
    arrived(site, "first")

    # A patch that breaks one route: the others run, it keeps its last good version, and the cloud hears which and where.
    site.deploy({"routes": {"up": BAD, "also": UP, "worse": "FROM"}}, "patch")
    description = site.wait_status(400)
    assert description.startswith("Error while parsing desired properties - "), description
    assert "route up - " in description and "route worse - " in description, description
    assert "line 1 column" in description, description
    assert site.routes() == ["also", "up"]
    # The patch after it corrects only what was wrong.
    site.deploy({"routes": {"up": UP, "worse": None}}, "patch")
    assert site.wait_status(200) == ""
    assert site.routes() == ["also", "up"]
    # Unreadable as a whole: what is in force stays.
    site.deploy({"schemaVersion": "1.4"}, "patch")
    assert "unsupported SchemaVersion: 1.4" in site.wait_status(400)
    assert site.routes() == ["also", "up"]
    send(site, "last")
    arrived(site, "last")


def test_connected_clients_are_reported(twin_site):
    site = twin_site
    site.deploy(desired({"up": UP}))
    site.begin_hub()
    site.wait_serving()
    module = site.modules["sender"]
    key = f"{EDGE}/sender"
    with sdk.client(site, site.leaf), sdk.client(site, module):
        reported = site.wait_reported(
            "both are connected", lambda reported: {"leaf1", key} <= (reported.get("clients") or {}).keys()
        )
        assert reported["clients"]["leaf1"]["status"] == "Connected", reported
        assert reported["clients"][key]["lastConnectedTimeUtc"].endswith("Z"), reported
        assert reported["schemaVersion"] == "1.0" and reported["version"]["version"], reported
    reported = site.wait_reported(
        "the device is gone, the module is disconnected",
        lambda reported: "leaf1" not in reported["clients"] and reported["clients"][key]["status"] == "Disconnected",
    )
    assert "lastDisconnectedTimeUtc" in reported["clients"][key], reported
    # The next run forgets who was connected in this one.
    assert site.hub.stop() == 0
    site.begin_hub()
    site.wait_serving()
    site.wait_reported("the clients of the last run are cleared", lambda reported: not reported.get("clients"))


def test_a_restart_without_the_cloud_goes_on_with_what_was_in_force(twin_site):
    site = twin_site
    site.deploy(desired({"up": UP}))
    site.begin_hub()
    site.wait_serving()
    send(site, "known")
    arrived(site, "known")
    # What the twin says last is bad; what was good before it is in force, also after the restart.
    site.deploy({"routes": {"up": BAD}}, "patch")
    site.wait_status(400)
    assert site.hub.stop() == 0
    site.cut_upstream()
    site.begin_hub()
    site.wait_serving()
    assert site.routes() == ["up"]
    # Its clients are known as well.
    send(site, "offline")
    site.restore_upstream()
    arrived(site, "offline")
