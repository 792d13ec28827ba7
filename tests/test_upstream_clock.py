"""A clock that is wrong by a year, or moves on while the upstream is away: nothing is lost, and a right clock is enough to heal.

Times are printed at the end with those of the other faults. The clock is of the tested program alone.
"""

import contextlib
import datetime
import time

import pytest

from blackbox import healing, pages, wait
from blackbox.certificates import Authority
from blackbox.clock import Clock
from blackbox.site import Cloud, Site
from blackbox.traffic import Sender, Traffic
from conftest import EVERYTHING_UP

FAST = {"CloudOperationTimeoutSecs": 3, "RuntimeLogLevel": "info"}
YEAR_AHEAD, YEAR_BACK = "+365d", "-365d"
DECADE = datetime.timedelta(days=3650)
DAYS = datetime.timedelta(days=2)
FIVE_YEARS_SECS = 5 * 365 * 86_400
NOTICED_SECS = 120
EACH = 20


@pytest.fixture
def make_site(tmp_path):
    """A site whose hub has a clock of its own, and whose cloud has the same if asked."""
    with contextlib.ExitStack() as stack:

        def make(certificates_last, with_cloud=False):
            clock = Clock(tmp_path)
            cloud = (lambda *where: Cloud(*where, clock.variables())) if with_cloud else None
            authority = Authority(tmp_path, "a root", certificates_last, certificates_last)
            settings = {**FAST, **clock.variables()}
            site = Site(tmp_path, EVERYTHING_UP, settings=settings, cloud=cloud, authority=authority)
            stack.callback(site.close)
            site.start_hub()
            # Tokens that are good by any of the clocks.
            traffic = Traffic(site, site.leaves, token_secs=FIVE_YEARS_SECS)
            stack.callback(traffic.close)
            return site, clock, traffic

        yield make


def upstream(site):
    return site.status()["upstream"]


def wait_shown(site, cause, word):
    """Status page and screen name cause and reason."""

    def probe():
        now = upstream(site)
        return now["state"] == "backing_off" and now["last_cause"] == cause and word in now["reason"]

    try:
        wait.until(f"the hub shows {cause} with {word!r}", probe, NOTICED_SECS)
    except AssertionError as error:
        raise AssertionError(f"{error}; it shows {upstream(site)}") from None
    wait.until("the screen shows the same", lambda: word in site.operate("status"), NOTICED_SECS)


def lose_connection(site):
    for link in (site.amqp_link, site.https_link):
        link.vanish()


# What the clock does, how long certificates are valid around now, and what keeps the hub from its upstream.
STEPS = {
    "a year ahead": (YEAR_AHEAD, DAYS, "tls", "expired"),
    "a year back": (YEAR_BACK, DAYS, "tls", "not valid yet"),
    "a year back, old certificate": (YEAR_BACK, DECADE, "token", "the token expired"),
}
STARTS = {"a year ahead": (YEAR_AHEAD, "expired"), "a year back": (YEAR_BACK, "not valid yet")}


@pytest.mark.parametrize("step", STEPS)
def test_a_clock_that_is_set_wrong_while_the_hub_runs(make_site, step):
    off, certificates_last, cause, word = STEPS[step]
    site, clock, traffic = make_site(certificates_last)
    pid = site.hub.pid
    traffic.publish(EACH)
    traffic.settle()
    clock.set(off)
    wait.until("the metric shows it", lambda: abs(pages.total(site.pages, "edgehub_clock_skew_seconds")) > 300 * 86_400)
    # What is connected stays so, and goes on.
    traffic.publish(EACH)
    lose_connection(site)
    wait_shown(site, cause, word)
    traffic.publish(EACH)
    times = traffic.heal(clock.set)
    traffic.publish(EACH)
    traffic.settle()
    assert site.hub.running() and site.hub.pid == pid
    healing.note(f"clock set {step} while it runs", f"backing_off, {cause}", *times, 2 * EACH * len(traffic.senders))


@pytest.mark.parametrize("start", STARTS)
def test_a_hub_that_starts_with_a_wrong_clock(make_site, start):
    off, word = STARTS[start]
    site, clock, traffic = make_site(DAYS)
    traffic.publish(EACH)
    traffic.settle()
    site.cut_upstream()
    traffic.publish(EACH)
    traffic.close()
    assert site.hub.stop() == 0
    clock.set(off)
    site.start_hub()
    site.restore_upstream()
    pid = site.hub.pid
    wait_shown(site, "tls", word)
    # Two hours to live, but by this clock a year has passed.
    assert site.queued() == EACH * len(traffic.senders)
    traffic.publish(EACH)
    times = traffic.heal(clock.set)
    traffic.publish(EACH)
    traffic.settle()
    assert site.hub.running() and site.hub.pid == pid
    # What was stored under the wrong clock and under the right one lives through a restart as well.
    site.cut_upstream()
    traffic.publish(EACH)
    traffic.close()
    assert site.hub.stop() == 0
    site.start_hub()
    assert site.queued() == EACH * len(traffic.senders)
    site.restore_upstream()
    traffic.settle()
    healing.note(f"clock {start} at the start", "backing_off, tls", *times, 2 * EACH * len(traffic.senders))


def test_a_token_that_expires_during_the_outage(make_site):
    site, clock, traffic = make_site(DAYS, with_cloud=True)
    traffic.publish(EACH)
    traffic.settle()
    site.cut_upstream()
    traffic.publish(EACH)
    wait.until("the hub shows it", lambda: upstream(site)["state"] == "backing_off", NOTICED_SECS)
    # The tokens that the hub has live an hour.
    clock.set("+2h")
    traffic.publish(EACH)
    times = traffic.heal(site.restore_upstream)
    traffic.publish(EACH)
    traffic.settle()
    assert upstream(site)["failures_by_cause"].get("token", 0) == 0, "no expired token is shown to the upstream"
    healing.note("token expired during the outage", "backing_off, lost", *times, 2 * EACH * len(traffic.senders))


def test_tokens_of_clients_are_judged_by_the_clock_as_it_is(make_site):
    site, clock, _traffic = make_site(DAYS)
    sender = Sender(site, site.leaves[0], site.leaves[0].token(time.time() + 3600))
    clock.set(YEAR_AHEAD)
    assert sender.login() == 5
    wait.until("the screen says why", lambda: "EH2007" in site.operate("status"))
    clock.set()
    sender.publish(EACH)
    site.wait_drained()
    sender.close()
