"""The operator's screen: health with reasons, who is connected, and messages as they pass."""

import json
import re
import threading

from blackbox import mqtt, pages, process, sdk, wait
from blackbox.site import MQTT_PORT

ROUTES = {"up": "FROM /messages/* WHERE NOT is_defined(nowhere) INTO $upstream"}
CODE = re.compile(r"\[(WRN|ERR|FTL)\] ")


def health(site, page="/healthz"):
    status, kind, text = pages.get(site.pages, page)
    assert kind.startswith("application/json")
    return status, json.loads(text)


def codes(site):
    return {warning["code"] for warning in health(site)[1]["warnings"]}


def test_health_names_what_is_the_matter_since_when_and_what_to_do(site):
    wait.until("the upstream is connected", lambda: "upstream_unreachable" not in codes(site))
    status, answer = health(site)
    assert (status, answer["status"], answer["reasons"]) == (200, "ready", []), answer
    site.cut_upstream()
    wait.until("the loss is told", lambda: "upstream_unreachable" in codes(site))
    for page in ("/healthz", "/readyz", "/startupz"):
        status, answer = health(site, page)
        assert (status, answer["status"], answer["reasons"]) == (200, "ready", []), "it still serves"
        warning = next(warning for warning in answer["warnings"] if warning["code"] == "upstream_unreachable")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", warning["since"]), warning
        assert "messages are stored" in warning["hint"]
    since = warning["since"]
    assert health(site)[1]["warnings"][0]["since"] == since, "the time stays that of the beginning"
    site.restore_upstream()
    wait.until("the warning ends", lambda: "upstream_unreachable" not in codes(site), 120)


def test_a_certificate_that_ends_soon_is_told(site):
    # Those of the tests live two days.
    assert "certificate_expiring" in codes(site)
    left = pages.total(site.pages, "edgehub_certificate_expiry_seconds", kind="server")
    assert 86_400 < left < 2 * 86_400 + 60


def test_the_screen(site):
    with sdk.client(site, site.leaf) as client:
        client.send_message(sdk.message("x", {"marker": "screen"}))
        site.wait_drained()
        screen = site.operate("status")
        for part in ("edge1 of cloud.test, edgehub ", "ready", "1 routes in force, from ", " up since ", "1 of at most",
                     "durability sync", "adds up", "iothub"):  # fmt: skip
            assert part in screen, (part, screen)
        answer = site.ask("status")
        assert answer["upstream"]["state"] == "up" and answer["clients"]["connected"] == 1
        assert answer["health"]["status"] == "ready"
        assert any(queue["queue"] == "iothub" and queue["delivered"] >= 1 for queue in answer["queues"])


def test_warnings_are_counted_by_their_codes(site):
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        wire.send(b"\x20\x00")
        wire.expect_closed()
    wait.until("the warning is on the screen", lambda: site.ask("status")["warnings"])
    for warning in site.ask("status")["warnings"]:
        assert re.fullmatch(r"EH\d{4}", warning["code"]) and warning["count"] >= 1 and warning["next"], warning
        wait.until(
            "the metric says the same",
            lambda code=warning["code"]: pages.total(site.pages, "edgehub_log_warnings_total", code=code) >= 1,
        )
    lines = [line for line in site.hub.text().splitlines() if CODE.search(line)]
    assert lines and all(re.search(r" code=EH\d{4}( |$)", line) for line in lines), lines


def test_clients_are_listed_shown_and_sent_away(site):
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.leaves[1]) == 0
        shown = site.ask("clients", "show", "leaf2")
        assert (shown["id"], shown["protocol"], shown["takes_inputs"]) == ("leaf2", "mqtt", False)
        assert shown["credentials_until"] and shown["peer"].startswith("127.")
        assert "leaf2" in site.operate("clients", "list")
        assert any(client["id"] == "leaf2" for client in site.ask("clients", "list")["clients"])
        assert "--apply" in site.operate("clients", "kick", "leaf2")
        wire.ping()
        assert "may come again" in site.operate("clients", "kick", "leaf2", "--apply")
        wire.expect_closed()
    wait.until("it has left", lambda: "leaf2" not in site.operate("clients", "list"))
    assert "no client of this id" in site.operate("clients", "show", "leaf2", code=1)
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.leaves[1]) == 0


class Tap:
    """`edgehub tap` in the background."""

    def __init__(self, site, *arguments):
        self.done = None

        def run():
            self.done = process.run(["tap", *arguments], {"StorageFolder": site.storage}, 180)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def running(self):
        return self._thread.is_alive()

    def text(self):
        self._thread.join()
        assert self.done.returncode == 0, (self.done.stdout, self.done.stderr)
        return self.done.stdout


def test_a_tap_shows_what_passes_and_no_body_unless_asked(site):
    topic = site.leaf.events_topic
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(site.leaf) == 0
        for flags in ([], ["--bodies"]):
            tap = Tap(site, "--where", "level = 'hot'", "--limit", "2", "--format", "json", *flags)
            number = 0
            while tap.running():
                # Sent until it has enough: when it opened is not known.
                number += 1
                wire.publish_acknowledged(f"{topic}level=cold", b"planted cold", number % 65_000 + 1)
                wire.publish_acknowledged(f"{topic}level=hot", b"planted hot", number % 65_000 + 1)
            lines = [json.loads(line) for line in tap.text().splitlines()]
            assert len(lines) == 3 and lines[-1]["end"] == "limit" and lines[-1]["matched"] >= 2, lines
            for line in lines[:2]:
                assert line["endpoints"] == ["iothub"] and line["message"]["sender"] == "leaf1"
                assert line["message"]["properties"] == [{"name": "level", "value": "hot"}]
            assert ("planted hot" in tap.text()) == bool(flags) and "cold" not in tap.text()
    site.wait_drained()


def test_a_tap_ends_by_itself_and_refuses_what_does_not_compile(site):
    text = site.operate("tap", "--where", "level = 'never'", "--seconds", "1")
    assert text == "0 messages met the condition.\n"
    assert "condition or source" in site.operate("tap", "--where", "level = ", code=1)
    assert "condition or source" in site.operate("tap", "--from", "nowhere", code=1)
