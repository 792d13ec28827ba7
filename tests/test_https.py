"""Plain requests on the HTTPS port of the built program: who may call methods, what is answered, the metrics page."""

import http.client
import json
import ssl

import pytest

from blackbox.site import HTTPS_PORT, WEBSOCKETS

SETTINGS = WEBSOCKETS
PATH = "/twins/edge1/modules/receiver/methods?api-version=2018-06-30"
CALL = json.dumps({"methodName": "m", "payload": {"a": 1}})


def ask(site, verb, path, body=None, headers=None):
    context = ssl.create_default_context(cafile=str(site.authority.root))
    connection = http.client.HTTPSConnection(site.address, HTTPS_PORT, context=context, timeout=60)
    try:
        connection.request(verb, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def caller(site, token=None):
    sender = site.modules["sender"]
    return {"x-ms-edge-moduleId": sender.client_id, "Authorization": token or sender.token()}


def test_a_module_with_its_token_reaches_clients_only_that_are_there(site):
    status, headers, text = ask(site, "POST", PATH, CALL, caller(site))
    assert (status, json.loads(text)) == (404, {"message": "Client edge1/receiver not found"})
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize("wrong", ["another key", "another module", "nothing"])
def test_without_the_token_of_the_caller_nothing_is_called(site, wrong):
    headers = caller(site)
    if wrong == "another key":
        headers["Authorization"] = site.modules["sender"].with_other_key().token()
    elif wrong == "another module":
        headers["Authorization"] = site.modules["receiver"].token()
    else:
        del headers["Authorization"]
    status, _, text = ask(site, "POST", PATH, CALL, headers)
    assert status == 401 and json.loads(text)["message"], text


def test_bodies_are_judged_before_the_caller(site):
    status, _, text = ask(site, "POST", PATH, "{not json", caller(site))
    assert status == 400 and json.loads(text)["message"], text
    status, _, text = ask(site, "POST", PATH, " " * (256 * 1024 + 1), caller(site))
    assert status == 413, text


def test_the_metrics_page_is_the_same_as_on_its_own_port(site):
    status, headers, text = ask(site, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4"), headers
    assert "edgehub_tls_handshakes_total" in text


def test_what_is_not_there_is_empty(site):
    for path in ("/", "/twins/edge1", "/devices/edge1/messages/events", "/status", "/healthz"):
        assert ask(site, "POST", path, "{}")[0::2] == (404, ""), path
