"""Values: each is described, and what is misspelt or does not go together is refused with a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart import CHART, CHOSEN, Object, helm, loaded, merged, render

from cluster.config import ClusterConfig

pytestmark = pytest.mark.helm

SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS: Object = yaml.safe_load((CHART / "values.yaml").read_text())
# Settings that the chart itself gives, or that no pod may have.
OURS = {
    "model", "host", "port", "grpc_port", "prefill", "decode", "mixed", "routers", "kv_memory", "swap_memory",
    "threads", "api_keys", "tls_cert", "tls_key", "tls_ca", "tls_client_ca", "tls_name", "join_token_file", "redis",
    "redis_prefix", "address", "worker_host", "start_timeout_s", "stop_timeout_s", "allow_faults", "run_dir",
}  # fmt: skip


def closed(schema: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Object]]:
    """Every object of the schema that has its own keys, with where it is."""
    if "properties" in schema:
        yield path, schema
        for key, each in schema["properties"].items():
            yield from closed(each, (*path, key))


def at(path: tuple[str, ...], value: object) -> Object:
    """Values with this one at the place."""
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


PLACES = [(*path, key) for path, schema in closed(SCHEMA) for key in schema["properties"]]


def test_every_value_is_described() -> None:
    for path, schema in closed(SCHEMA):
        assert schema["additionalProperties"] is False, path
        assert schema["description"], path
        for key, each in schema["properties"].items():
            assert each["description"], (*path, key)


def test_values_and_schema_have_the_same_keys() -> None:
    for path, schema in closed(SCHEMA):
        found: Any = DEFAULTS
        for key in path:
            found = found[key]
        known = set(schema["properties"]) - {"global"}
        assert known == set(found) or path == ("settings",), path


def test_settings_are_those_of_serve() -> None:
    known = set(SCHEMA["properties"]["settings"]["properties"])
    assert known == set(ClusterConfig.model_fields) - OURS
    assert not known & OURS


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_misspelt_value_is_refused_by_name(place: tuple[str, ...]) -> None:
    wrong = (*place[:-1], place[-1] + "s")
    if wrong[-1] in SCHEMA["properties"]:
        pytest.skip("it is another value's name")
    with pytest.raises(helm.HelmValuesError, match=f"additional properties '{wrong[-1]}' not allowed"):
        loaded().validate_schema(merged(DEFAULTS, at(wrong, 1)))


WRONG: list[tuple[Object, str]] = [
    ({"serve": {"replicas": "two"}}, "/serve/replicas': got string, want integer"),
    ({"serve": {"routers": 17}}, "/serve/routers': maximum: got 17, want 16"),
    ({"serve": {"drainSeconds": 3601}}, "/serve/drainSeconds': maximum"),
    ({"workers": {"decode": {"replicas": 0}}}, "/workers/decode/replicas': minimum: got 0, want 1"),
    ({"workers": {"kvMemory": "much"}}, "/workers/kvMemory': 'much' does not match"),
    ({"image": {"digest": "sha256:12"}}, "/image/digest'"),
    ({"image": {"pullPolicy": "Sometimes"}}, "value must be one of 'Always', 'IfNotPresent', 'Never'"),
    ({"securityContext": {"runAsUser": 0}}, "/securityContext/runAsUser': minimum: got 0, want 1"),
    ({"settings": {"port": 80}}, "/settings': additional properties 'port' not allowed"),
    ({"workers": {"decode": {"resources": {"limit": {}}}}}, "additional properties 'limit' not allowed"),
    ({"auth": {"apiKeysSecret": "Keys!"}}, "/auth/apiKeysSecret'"),
    ({"ray": {"gcsStore": {"redisAddress": "redis"}}}, "/ray/gcsStore/redisAddress'"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_refused_by_place_and_limit(values: Object, message: str) -> None:
    with pytest.raises(helm.HelmValuesError) as refused:
        render(values)
    assert message in str(refused.value)


UNFIT: list[tuple[Object, str]] = [
    ({"redis": {"enabled": False}}, "serve.routers: 2 routers share their state"),
    (
        {"redis": {"enabled": False}, "serve": {"routers": 1, "replicas": 2}},
        "serve.replicas: 2 pods share their streams",
    ),
    ({"redis": {"bundled": False}}, "redis.urlSecret: a Secret with the URL of your Redis is needed"),
    ({"tls": {"enabled": True}}, "tls.secret: a Secret with tls.crt, tls.key and ca.crt is needed"),
    ({"tls": {"clientCaSecret": "ca"}}, "tls.clientCaSecret: asks clients for certificates, which needs tls.enabled"),
    ({"tls": {"enabled": True, "secret": "s", "clientCaSecret": "ca"}}, "tls.clientSecret: is empty"),
    ({"auth": {"apiKeysSecret": "keys"}}, "auth.operatorKeySecret: is empty"),
    ({"autoscaling": {"minReplicas": 4}}, "autoscaling.minReplicas: 4 is more than maxReplicas, 3"),
    ({"serve": {"grpcPort": 8000}}, "serve.grpcPort: 8000 is the HTTP port too"),
    ({"ray": {"nodeManagerPort": 8000}}, "ray.nodeManagerPort: 8000 is a port of serve too"),
]


@pytest.mark.parametrize(("values", "message"), UNFIT, ids=[message for _, message in UNFIT])
def test_values_that_do_not_go_together_are_refused(values: Object, message: str) -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        render(values)
    assert message in str(refused.value)


def test_the_defaults_are_what_is_rendered_without_values() -> None:
    with_defaults = render(copy.deepcopy(DEFAULTS))
    chosen = [each for each in with_defaults.objects if each["kind"] not in CHOSEN]
    assert chosen == [each for each in render().objects if each["kind"] not in CHOSEN]
