"""What the hub says of itself on its pages."""

import http.client
import json

from prometheus_client.parser import text_string_to_metric_families

LEDGER_FIELDS = {"accepted", "delivered", "expired", "dropped", "dead_lettered", "queued", "gap"}


def get(address, path):
    """Status code, content type and text of a page."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.getheader("content-type"), response.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(error) from error
    finally:
        connection.close()


def status(address):
    code, kind, text = get(address, "/status")
    assert code == 200, f"/status answers {code}: {text}"
    assert kind.startswith("application/json"), kind
    return json.loads(text)


def ledgers(value):
    """Every ledger in a status page, wherever it stands."""
    if isinstance(value, dict):
        if LEDGER_FIELDS <= value.keys():
            yield value
        for member in value.values():
            yield from ledgers(member)
    elif isinstance(value, list):
        for member in value:
            yield from ledgers(member)


def samples(address):
    """All samples of the metrics page as (name, labels, value), read by an independent parser."""
    code, kind, text = get(address, "/metrics")
    assert code == 200 and kind.startswith("text/plain"), f"{code} {kind}"
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def total(address, name, **labels):
    """Sum of the samples of a name whose labels include those given."""
    return sum(
        value
        for found, has, value in samples(address)
        if found == name and all(has.get(label) == wanted for label, wanted in labels.items())
    )
