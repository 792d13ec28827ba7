"""What the C library Qpid Proton does with the AMQP head that other raw clients do not: wrong passwords, each outcome, silence."""

import os
import signal

from blackbox import raw, wait

SETTINGS = {"amqpSettings__enabled": "true", "RuntimeLogLevel": "info"}
INPUT = "/modules/receiver/inputs/in"
ROUTES = {"inputs": f'FROM /messages/modules/sender/* INTO BrokeredEndpoint("{INPUT}")'}
DEADLINE_SECS = 120


def run(site, verb, **arguments):
    return raw.run(site, verb, DEADLINE_SECS, "proton", **arguments)


def dead_letters(site):
    return sum(ledger["dead_lettered"] for ledger in site.ledgers())


def test_every_outcome_of_a_message_at_an_input(site):
    plans = [
        ["accepted"],
        ["released", "accepted"],
        ["modified-failed", "released", "modified", "accepted"],
        ["modified-undeliverable"],
        ["released", "modified-undeliverable"],
        ["rejected"],
        ["modified-failed", "rejected"],
        ["accepted"],
    ]
    before = dead_letters(site)
    told = run(
        site, "outcomes", identity=raw.node_of(site.modules["sender"]),
        receiver=raw.node_of(site.modules["receiver"]), marker="outcomes", plans=plans,
    )  # fmt: skip
    assert told["came"] == [len(plan) for plan in plans]
    site.wait_drained()
    # What is not wanted is kept for the operator.
    assert dead_letters(site) - before == 4


def test_a_wrong_password_ends_the_login(site):
    for identity in (site.leaf.with_other_key(), site.stranger):
        told = run(site, "refused", identity=raw.node_of(identity), sasl="PLAIN")
        assert "amqp:unauthorized-access" in told["end"], told


def test_a_client_that_wants_a_heartbeat_too_often_is_told_so(site):
    assert "amqp:not-allowed" in run(site, "silence", idle=4_000)["end"]


def test_a_client_leaves_a_hub_that_is_silent(site):
    """The hub stands still: its heartbeats end, and the client gives it up. Afterwards the hub goes on for all."""
    try:
        told = run(site, "silence", idle=5_000, when={"opened": lambda: os.kill(site.hub.pid, signal.SIGSTOP)})
    finally:
        os.kill(site.hub.pid, signal.SIGCONT)
    assert "amqp:resource-limit-exceeded" in told["end"], told
    wait.until("the hub answers", lambda: site.status()["gap"] == 0, DEADLINE_SECS)
    accepted = run(site, "pipeline", identity=raw.node_of(site.leaf), marker="after", count=10)["ends"]["accepted"]
    assert accepted == 10
