"""The operator's verbs: they look into a running hub without a key, and change something only when told to."""

import http.client
import json
import socket
import stat

from blackbox import mqtt, sdk, wait
from blackbox.sequence import Arrivals
from blackbox.site import MQTT_PORT

INPUT = "edge1/receiver/in1"
TO_RECEIVER = {
    "toReceiver": 'FROM /messages/modules/sender/outputs/alarm INTO BrokeredEndpoint("/modules/receiver/inputs/in1")',
}
UP = {"up": "FROM /messages/* WHERE NOT is_defined(level) INTO $upstream"}
ROUTES = {**TO_RECEIVER, **UP}
# The stand-in for the cloud takes this property of the application for the name of an output, and refuses a blank one.
REFUSED_ABOVE = "iothub-outputname=%20"
# A second hub opens no port of the first.
ELSEWHERE = {
    "EDGEHUB_LISTEN__METRICS_ADDRESS": "127.0.0.1",
    "httpSettings__metrics_port": 0,
    "EDGEHUB_LISTEN__MQTT_ADDRESS": "127.0.0.1",
    "EDGEHUB_LISTEN__MQTT_PORT": 0,
}


def publish(site, identity, properties, bodies):
    """Raw messages with these properties, each acknowledged by the hub."""
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(identity) == 0
        for number, body in enumerate(bodies, start=1):
            wire.publish_acknowledged(identity.events_topic + properties, body, number)


def alarm(site, bodies, properties="level=hot&%24.ct=text%2Fplain"):
    publish(site, site.modules["sender"], f"%24.on=alarm&{properties}", bodies)


def shown(site, name):
    return next(queue for queue in site.ask("queues", "list")["queues"] if queue["queue"] == name)


def assert_balanced(site):
    """Exit code 0 says that every account adds up; so must the numbers."""
    ledger = site.ask("ledger")
    assert ledger["gap"] == 0 == ledger["total"]["gap"], ledger
    assert "the ledger adds up" in site.operate("ledger")
    return ledger


def restart(site, routes=None):
    assert site.hub.stop() == 0
    if routes is not None:
        site.set_routes(routes)
    site.start_hub()


def test_what_waits_is_shown_and_bodies_only_when_asked_for(make_site):
    site = make_site(ROUTES)
    alarm(site, [b"planted secret 1", b"\xff\x00", b"\x1b[2Jthree"])
    queue = shown(site, INPUT)
    assert (queue["state"], queue["queued"], queue["endpoint"]) == ("attached", 3, INPUT)
    assert queue["oldest_age_ms"] is not None
    messages = site.ask("queues", "show", INPUT)["messages"]["messages"]
    assert [entry["offset"] for entry in messages] == [0, 1, 2]
    first = messages[0]["message"]
    assert (first["sender"], first["output"], first["body_bytes"]) == ("edge1/sender", "alarm", 16)
    assert first["system"]["contentType"] == "text/plain"
    assert first["properties"] == [{"name": "level", "value": "hot"}]
    assert messages[0]["time_left_ms"] > 3_600_000
    for text in (site.operate("queues", "show", INPUT), json.dumps(messages)):
        assert "planted secret" not in text and "edge1/sender" in text, text
    whole = site.ask("queues", "show", INPUT, "--bodies")["messages"]["messages"]
    bodies = [entry["message"]["body"] for entry in whole]
    assert bodies == [{"text": "planted secret 1"}, {"base64": "/wA="}, {"text": "\x1b[2Jthree"}]
    text = site.operate("queues", "show", INPUT, "--bodies")
    assert "planted secret 1" in text and "\x1b" not in text, "what devices send must not steer a terminal"
    page = site.ask("queues", "show", INPUT, "--from", "1", "--limit", "1")["messages"]
    assert ([entry["offset"] for entry in page["messages"]], page["next"]) == ([1], 2)
    table = site.operate("queues", "list").splitlines()
    assert table[0].split() == ["QUEUE", "ENDPOINT", "PRIORITY", "STATE", "QUEUED", "OLDEST"]
    assert any(line.split()[:5] == [INPUT, INPUT, "default", "attached", "3"] for line in table), table
    assert "queue of this name" in site.operate("queues", "show", "nobody", code=1)
    assert_balanced(site)


def test_a_purge_says_what_it_would_do_and_does_it_when_told(make_site):
    site = make_site(ROUTES)
    alarm(site, [str(n).encode() for n in range(5)])
    before = site.ask("ledger")
    assert "Would drop 5 messages" in site.operate("queues", "purge", INPUT)
    dry = site.ask("queues", "purge", INPUT, "--before", "2")
    assert dry == {"queue": INPUT, "applied": False, "messages": 2, "before": 2}
    assert site.ask("ledger") == before
    assert site.ask("queues", "purge", INPUT, "--before", "2", "--apply")["messages"] == 2
    received = []
    with sdk.receiver(site, site.modules["receiver"], lambda message: received.append(int(message.data))):
        site.wait_drained()
        # The SDK may acknowledge before it hands over.
        wait.until("all are handed over", lambda: len(received) >= 3)
    assert received == [2, 3, 4]
    alarm(site, [b"more"])
    assert "Dropped 1 message" in site.operate("queues", "purge", INPUT, "--apply")
    total = assert_balanced(site)["total"]
    assert (total["delivered"], total["dropped"], total["queued"]) == (3, {"purged": 3}, 0)
    restart(site)
    assert assert_balanced(site)["total"] == total, "what was purged stays purged"


def test_a_queue_without_a_route_is_visible_and_delivered_when_the_route_returns(make_site):
    site = make_site(ROUTES)
    alarm(site, [str(n).encode() for n in range(20)])
    restart(site, UP)
    detached = shown(site, INPUT)
    assert (detached["state"], detached["queued"]) == ("detached", 20)
    assert "detached" in site.operate("queues", "list")
    assert len(site.ask("queues", "show", INPUT)["messages"]["messages"]) == 20
    assert_balanced(site)
    restart(site, ROUTES)
    assert (shown(site, INPUT)["state"], shown(site, INPUT)["queued"]) == ("attached", 20)
    received = []
    with sdk.receiver(site, site.modules["receiver"], lambda message: received.append(int(message.data))):
        site.wait_drained()
        wait.until("all are handed over", lambda: len(set(received)) == 20)
    arrivals = Arrivals.of(received)
    arrivals.assert_complete(range(20))
    arrivals.assert_ordered()
    assert_balanced(site)


def test_dead_letters_are_seen_put_back_and_dropped(make_site):
    site = make_site(ROUTES)
    publish(site, site.leaf, REFUSED_ABOVE, [b"planted secret 2", b"planted secret 3"])
    publish(site, site.leaf, "marker=good", [b"good"])
    site.cloud.wait_telemetry("good", lambda record: record["properties"].get("marker") == "good")

    def letters(*arguments):
        return site.ask("dlq", "list", *arguments)["dead_letters"]

    wait.until("both are dead letters", lambda: len(letters()) == 2)
    first, second = letters("--queue", "iothub")
    assert (first["queue"], first["reason"], first["offset"]) == ("iothub", "rejected_by_receiver", 0)
    assert (first["message"]["sender"], letters("--queue", INPUT)) == (site.leaf.device, [])
    ids = [first["id"], second["id"]]
    for text in (site.operate("dlq", "list"), site.operate("dlq", "show", str(ids[0])), json.dumps(first)):
        assert "planted secret" not in text, text
    assert "planted secret 2" in site.operate("dlq", "show", str(ids[0]), "--bodies")
    assert "no dead letter 99" in site.operate("dlq", "show", "99", code=1)

    before = assert_balanced(site)
    for verb in (["dlq", "redrive", "--all"], ["dlq", "drop", "--all"], ["queues", "redrive", "iothub"]):
        assert "--apply" in site.operate(*verb), verb
        answer = site.ask(*verb)
        assert (answer["applied"], answer["queues"]) == (False, {"iothub": 2}), verb
    assert site.ask("ledger") == before

    # Refused once more, it comes back as another dead letter.
    assert site.ask("dlq", "redrive", str(ids[0]), "--apply")["queues"] == {"iothub": 1}
    wait.until("it is refused again", lambda: [letter["id"] for letter in letters()] == [ids[1], ids[1] + 1])
    account = assert_balanced(site)
    assert (account["dead_letters"]["delivered"], account["total"]["accepted"]) == (1, before["total"]["accepted"] + 1)
    answer = site.ask("dlq", "drop", str(ids[1]), "99", "--apply")
    assert (answer["queues"], answer["missing"]) == ({"iothub": 1}, [99])
    assert "Dropped 1 dead letter of iothub" in site.operate("dlq", "drop", "--queue", "iothub", "--apply")
    assert "There are no dead letters" in site.operate("dlq", "list")
    dropped = assert_balanced(site)["dead_letters"]
    assert (dropped["dropped"], dropped["queued"]) == ({"purged": 2}, 0)


def admin_socket(site):
    return site.storage / "edgeHub/admin.sock"


def test_the_socket_is_private_and_survives_a_kill(make_site):
    site = make_site(ROUTES)
    path = admin_socket(site)
    assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    site.hub.kill()
    assert path.exists()
    error = site.operate("ledger", code=5)
    assert str(path) in error and "no hub is running" in error and len(error.splitlines()) == 1, error
    site.start_hub()
    assert_balanced(site)
    assert site.hub.stop() == 0
    assert not path.exists()
    site.operate("queues", "list", code=5)


def test_no_answer_holds_a_key(make_site):
    site = make_site(ROUTES)
    alarm(site, [b"x"])
    publish(site, site.leaf, "", [b"y"])
    answers = []
    for target in ("/v1/ledger", "/v1/queues", "/v1/queues/edge1%2Freceiver%2Fin1/messages?bodies=true",
                   "/v1/dead-letters?bodies=true", "/v1/nothing"):  # fmt: skip
        connection = http.client.HTTPConnection("edgehub", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(admin_socket(site)))
        connection.request("GET", target)
        answers.append(connection.getresponse().read().decode())
        connection.close()
    everything = "".join(answers) + site.hub.text()
    identities = [site._hub_identity, site.leaf, *site.modules.values()]  # pylint: disable=protected-access
    for identity in identities:
        assert identity.key not in everything
    assert "SharedAccessSignature" not in everything and '"error"' in answers[-1]


def test_a_hub_without_room_for_its_socket_says_so(make_site, tmp_path):
    site = make_site(ROUTES)
    long = tmp_path / ("x" * 120)
    done = site.run_hub_to_end(EDGEHUB_ADMIN__SOCKET=admin_socket(site), StorageFolder=tmp_path / "b",
                               **ELSEWHERE)  # fmt: skip
    assert done.returncode == 2 and "another hub listens there" in done.stderr, done.stderr
    done = site.run_hub_to_end(EDGEHUB_ADMIN__SOCKET=long, StorageFolder=tmp_path / "b", **ELSEWHERE)
    assert done.returncode == 2 and "at most 107" in done.stderr, done.stderr
    assert_balanced(site)
