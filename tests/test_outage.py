"""The upstream goes away and comes back: everything that was acknowledged arrives, in order."""

from blackbox import sdk, wait
from blackbox.sequence import Arrivals

FAST = {"CloudOperationTimeoutSecs": 3}


def numbers(site):
    return [int(record["body"]) for record in site.cloud.telemetry() if record["properties"].get("marker") == "n"]


def send(client, first, end):
    for n in range(first, end):
        client.send_message(sdk.message(str(n), {"marker": "n"}))


def check_all(site, count, deadline_secs=180):
    wait.until(f"all {count} arrive", lambda: len(set(numbers(site))) == count, deadline_secs)
    site.wait_drained()
    arrivals = Arrivals.of(numbers(site))
    arrivals.assert_complete(range(count))
    arrivals.assert_ordered()
    return arrivals


def test_a_cut_and_restored_upstream(make_site):
    site = make_site(settings=FAST)
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 50)
        site.cut_upstream()
        send(client, 50, 150)
        assert site.queued() > 0
        site.assert_balanced()
        site.restore_upstream()
        send(client, 150, 200)
        check_all(site, 200)


def test_an_upstream_that_flaps_under_load(make_site):
    site = make_site(settings=FAST)
    with sdk.client(site, site.leaf) as client:
        for turn in range(5):
            send(client, turn * 40, turn * 40 + 20)
            site.amqp_link.cut()
            send(client, turn * 40 + 20, turn * 40 + 40)
            site.amqp_link.restore()
        check_all(site, 200)


def test_an_upstream_that_goes_silent(make_site):
    site = make_site(settings=FAST)
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 20)
        check_all(site, 20)
        site.amqp_link.stall()
        send(client, 20, 60)
        made_before = site.amqp_link.accepted
        # The hub must give the silent connection up by itself; only then does the link come back.
        wait.until("the hub tries a new connection", lambda: site.amqp_link.accepted > made_before, 90)
        site.restore_upstream()
        check_all(site, 60)


def test_a_hub_that_restarts_without_upstream_serves_from_what_it_knows(make_site):
    site = make_site(settings=FAST)
    with sdk.client(site, site.leaf) as client:
        send(client, 0, 20)
    check_all(site, 20)
    site.cut_upstream()
    assert site.hub.stop() == 0
    site.start_hub()
    with sdk.client(site, site.leaf) as client:
        send(client, 20, 60)
    assert site.queued() == 40
    site.restore_upstream()
    check_all(site, 60)
