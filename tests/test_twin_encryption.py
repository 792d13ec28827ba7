"""With a workload API, twins are encrypted where they are stored, unless EncryptTwinStore says otherwise."""

import contextlib

from blackbox import sdk, wait
from blackbox.workload import WorkloadSite

ROUTES = {"up": "FROM /messages/* INTO $upstream"}


def stored(site, text):
    """Whether a file of the store holds the text."""
    found = [content_of(path) for path in site.storage.rglob("*") if path.is_file()]
    assert any(found)
    return any(text.encode() in content for content in found)


def content_of(path):
    """Nothing, if the store has removed the file meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def report(site, **properties):
    """The hub has stored it when this returns."""
    with sdk.client(site, site.leaf) as client:
        client.patch_twin_reported_properties(properties)


def reported(site):
    with sdk.client(site, site.leaf) as client:
        return {name: value for name, value in client.get_twin()["reported"].items() if not name.startswith("$")}


def test_stored_twins_show_nothing_and_are_read_again_after_a_restart(tmp_path):
    site = WorkloadSite(tmp_path, ROUTES)
    try:
        site.start_daemon()
        site.start_hub()
        report(site, sealedname="sealed-planted-value")
        assert not stored(site, "sealed-planted-value") and not stored(site, "sealedname")
        # Only the store can answer now.
        site.cut_upstream()
        wait.until("the upstream is away", lambda: site.status()["upstream"]["state"] != "up")
        assert site.hub.stop() == 0
        site._settings["EncryptTwinStore"] = "false"
        site.start_hub()
        assert reported(site) == {"sealedname": "sealed-planted-value"}
        report(site, plainname="plain-planted-value")
        assert stored(site, "plain-planted-value"), "the search would find it"
        assert site.hub.stop() == 0
        del site._settings["EncryptTwinStore"]
        site.start_hub()
        assert reported(site) == {"sealedname": "sealed-planted-value", "plainname": "plain-planted-value"}
    finally:
        site.close()


def test_without_a_workload_api_the_operator_is_told_once(make_site):
    site = make_site(settings={"EncryptTwinStore": "true"})
    assert site.hub.text().count("EH1017") == 1
    report(site, plainname="plain-planted-value")
    assert stored(site, "plain-planted-value")
