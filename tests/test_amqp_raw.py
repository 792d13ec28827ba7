"""The AMQP head as raw clients of several authors use it: rhea, Qpid Proton (over its C library), uAMQP."""

import os
import time

import pytest

from blackbox import raw
from blackbox.identity import Identity
from blackbox.sequence import Arrivals
from blackbox.site import CLOUD_HOST, Site

SETTINGS = {"amqpSettings__enabled": "true", "RuntimeLogLevel": "info"}
ROUTES = {
    "everything": "FROM /messages/* INTO $upstream",
    "inputs": 'FROM /messages/modules/sender/* INTO BrokeredEndpoint("/modules/receiver/inputs/in")',
}
# Messages on one link; the long form of the test has 100,000.
MESSAGES = int(os.environ.get("EDGEHUB_TEST_AMQP_MESSAGES", "20000"))
IDENTITIES = int(os.environ.get("EDGEHUB_TEST_AMQP_IDENTITIES", "1000"))
RUN_SECS = max(300, MESSAGES // 100)
# uAMQP only sends, and knows no SASL for its tokens.
RECEIVING = ["rhea", "proton"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site"), ROUTES, settings=SETTINGS)
    try:
        names = [f"many{number}" for number in range(IDENTITIES)]
        made.cloud.add_like(made.leaf, names)
        made.many = [Identity(CLOUD_HOST, name, None, made.leaf.key) for name in names]
        made.start_hub()
        yield made
    finally:
        made.close()


def arrived(site, marker, count):
    """The records of a marker when all have arrived and nothing is left in the hub."""
    records = site.cloud.wait_telemetry(
        marker, lambda record: record["properties"].get("marker") == marker, count, RUN_SECS
    )
    site.wait_drained()
    return records


def assert_numbers(records, identity, count):
    assert {(record["deviceId"], record.get("moduleId") or None) for record in records} == {
        (identity.device, identity.module)
    }
    numbers = Arrivals.of([int(record["body"]) for record in records])
    numbers.assert_ordered()
    numbers.assert_complete(range(count))
    assert numbers.duplicates == 0


@pytest.mark.parametrize("client", raw.CLIENTS)
def test_many_messages_on_one_link_arrive_once_and_in_order(site, client):
    marker = f"pipeline-{client}"
    told = raw.run(
        site, "pipeline", RUN_SECS, client, identity=raw.node_of(site.leaf), marker=marker, count=MESSAGES,
        secs=RUN_SECS,
    )  # fmt: skip
    assert told["ends"] == {"accepted": MESSAGES, "rejected": 0, "released": 0, "modified": 0}
    assert_numbers(arrived(site, marker, MESSAGES), site.leaf, MESSAGES)


@pytest.mark.parametrize("client", ["rhea", "uamqp"])
def test_a_batch_is_as_many_messages(site, client):
    marker, count = f"batch-{client}", 40
    told = raw.run(site, "batch", client=client, identity=raw.node_of(site.leaf), marker=marker, count=count)
    assert told["ends"]["accepted"] == 1, told
    assert_numbers(arrived(site, marker, count), site.leaf, count)


@pytest.mark.parametrize("client", RECEIVING)
@pytest.mark.parametrize("sasl", ["ANONYMOUS", "PLAIN"])
def test_a_client_comes_in_by_sasl(site, client, sasl):
    for identity in (site.leaf, site.modules["receiver"]):
        marker = f"{client}-{sasl}-{identity.client_id}"
        told = raw.run(
            site, "pipeline", client=client, identity=raw.node_of(identity), sasl=sasl, marker=marker, count=10
        )
        assert told["ends"]["accepted"] == 10, told
        assert_numbers(arrived(site, marker, 10), identity, 10)


def test_a_token_is_renewed_while_answers_have_credit(site):
    """uAMQP takes the answer to put-token for a failure if it comes before the request is settled."""
    identity, now = site.leaves[1], time.time()
    node = {**raw.node_of(identity), "tokens": [identity.token(now + 3_000 + number) for number in range(10)]}
    told = raw.run(site, "pipeline", client="uamqp", identity=node, marker="renewed", count=10)
    assert (told["ends"]["accepted"], told["retries"]) == (10, 0), told
    assert_numbers(arrived(site, "renewed", 10), identity, 10)


def test_a_thousand_identities_share_one_connection(site):
    nodes = [raw.node_of(identity) for identity in site.many]
    told = raw.run(site, "identities", RUN_SECS, identities=nodes, marker="many")
    assert told == {"put": IDENTITIES, "accepted": IDENTITIES}
    records = arrived(site, "many", IDENTITIES)
    assert sorted(record["deviceId"] for record in records) == sorted(identity.device for identity in site.many)
    assert all(record["body"].decode() == record["deviceId"] for record in records)


@pytest.mark.parametrize("client", RECEIVING)
@pytest.mark.parametrize("who", ["other-key", "stranger", "another"])
def test_a_link_without_a_good_token_is_refused(site, who, client):
    node = {
        "other-key": lambda: raw.node_of(site.leaf.with_other_key()),
        "stranger": lambda: raw.node_of(site.stranger),
        # The token is good, for somebody else.
        "another": lambda: {**raw.node_of(site.leaf), "events": raw.node_of(site.leaves[1])["events"]},
    }[who]()
    assert raw.run(site, "refused", client=client, identity=node) == {"condition": "amqp:unauthorized-access"}


@pytest.mark.parametrize("client", RECEIVING)
def test_messages_are_cut_into_frames_of_512_bytes_both_ways(site, client):
    marker, sizes = f"frames-{client}", [0, 1, 400, 511, 512, 513, 5_000, 100_000, 261_000]
    told = raw.run(
        site, "frames", client=client, identity=raw.node_of(site.modules["sender"]), receiver=raw.node_of(site.modules["receiver"]),
        marker=marker, sizes=sizes,
    )  # fmt: skip
    assert told["ends"]["accepted"] == len(sizes) and told["same"], told
    records = arrived(site, marker, len(sizes))
    assert [record["body"] for record in records] == [str(n).encode() * size for n, size in enumerate(sizes)]


@pytest.mark.parametrize("client", RECEIVING)
def test_credit_of_one_late_settlement_and_drain(site, client):
    told = raw.run(
        site, "credit", client=client, identity=raw.node_of(site.modules["sender"]), receiver=raw.node_of(site.modules["receiver"]),
        marker="credit", count=20,
    )  # fmt: skip
    assert (told["ends"]["accepted"], told["bodies"]) == (20, list(range(20)))
    assert (told["credit"], told["drained"], told["again"]) == (0, 0, "credit-again")
    site.wait_drained()


@pytest.mark.parametrize("client", RECEIVING)
def test_a_silent_link_is_kept_alive_by_heartbeats(site, client):
    marker = f"heartbeat-{client}"
    told = raw.run(
        site, "heartbeat", client=client, identity=raw.node_of(site.leaf), marker=marker, idle=5_000, beats=2
    )
    assert told["heard"] >= 2 and told["ends"]["accepted"] == 1, told
    arrived(site, marker, 1)
