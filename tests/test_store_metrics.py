"""What the store's writes cost, as metrics."""

from blackbox import mqtt, pages
from blackbox.site import MQTT_PORT

WRITES = "edgehub_store_write_duration_seconds"


def test_writes_of_the_store_are_timed(site):
    sender = site.modules["sender"]
    with mqtt.Connection(site.address, MQTT_PORT, site.authority.root) as wire:
        assert wire.login(sender) == 0
        for number in (1, 2, 3):
            wire.publish_acknowledged(sender.events_topic, b"x", number)
    samples = list(pages.samples(site.pages))
    counts = {labels["kind"]: value for name, labels, value in samples if name == f"{WRITES}_count"}
    assert counts["batch_fsync"] >= 3, counts
    assert any(name == WRITES and labels["quantile"] == "0.99" for name, labels, _ in samples)
    assert not [sample for sample in samples if sample[0] == "edgehub_store_errors_total"]
