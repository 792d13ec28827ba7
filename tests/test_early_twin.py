"""A client that reads its twin before its hub has reached the cloud."""

import queue

from blackbox import sdk, service, wait
from blackbox.site import Site
from conftest import EVERYTHING_UP


def test_who_reads_an_unknown_twin_as_empty_hears_what_it_holds(tmp_path):
    site = Site(tmp_path, EVERYTHING_UP, cloud=service.NamedByAddress)
    try:
        # The scope is fetched on the other link, so clients can come.
        site.amqp_link.cut()
        site.start_hub()
        with service.manager_of(site) as manager, sdk.client(site, site.leaf) as leaf:
            patches = queue.Queue()
            leaf.on_twin_desired_properties_patch_received = patches.put
            assert leaf.get_twin()["desired"] == {"$version": 0}
            service.desire(manager, site.leaf, {"mark": 1})
            site.amqp_link.restore()
            assert patches.get(timeout=2 * wait.DEADLINE_SECS) == {"mark": 1, "$version": 2}
            service.desire(manager, site.leaf, {"mark": 2})
            assert patches.get(timeout=2 * wait.DEADLINE_SECS) == {"mark": 2, "$version": 3}
            assert leaf.get_twin()["desired"] == {"mark": 2, "$version": 3}
    finally:
        site.close()
