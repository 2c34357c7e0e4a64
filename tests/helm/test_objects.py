"""What the chart makes is what Kubernetes, KubeRay and the Prometheus operator take, and its parts find one another."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chart import CASES, CHART, NAME, NAMESPACE, Object, Release, case, helm, needed

kubernetes_validate = needed("kubernetes_validate")

pytestmark = pytest.mark.helm

SCHEMAS = {
    path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")
}  # fmt: skip
VERSIONS = ("1.29", "1.33", "1.37")
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def labels_of(object_: Object) -> dict[str, str]:
    return dict(object_["metadata"].get("labels", {}))


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """As Kubernetes does."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )


@functools.cache  # most objects are the same in most cases
def taken(text: str, version: str) -> None:
    """Raises kubernetes_validate.ValidationError where Kubernetes of that version would refuse the object."""
    kubernetes_validate.validate(json.loads(text), version, strict=True)


@EVERY_CASE
def test_helm_finds_nothing_to_complain_of(name: str) -> None:
    report = helm.lint(CHART, CASES[name], strict=True, namespace=NAMESPACE)
    assert not report["errors"]
    assert {each["error"] for each in report["messages"]} <= {"icon is recommended"}


@EVERY_CASE
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    for each in case(name).objects:
        if each["kind"].lower() not in SCHEMAS:
            taken(json.dumps(each), version)


@EVERY_CASE
def test_operators_take_their_objects(name: str) -> None:
    for each in case(name).objects:
        if each["kind"].lower() in SCHEMAS:
            jsonschema.validate(each, SCHEMAS[each["kind"].lower()])


@EVERY_CASE
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_pods_of_a_ray_cluster(name: str, version: str) -> None:
    [cluster] = case(name).of("RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        as_template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "x"},
            "template": group["template"],
        }
        taken(json.dumps(as_template), version)


def test_a_misspelt_field_of_a_custom_resource_is_found() -> None:
    [cluster] = case("defaults").of("RayCluster")
    wrong = {**cluster, "spec": {**cluster["spec"], "workerGroupSpec": []}}
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate(wrong, SCHEMAS["raycluster"])


@EVERY_CASE
def test_names_are_unique_and_short_enough(name: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in case(name).objects]
    assert len(names) == len(set(names))
    assert all(len(each) <= 63 for _, each in names)
    [cluster] = case(name).of("RayCluster")
    assert len(cluster["metadata"]["name"] + "-head-svc") <= 63, "KubeRay would cut the head's Service"


def test_long_names_are_cut() -> None:
    cluster = helm.Chart.load(CHART).render({}, name="a" * 53, namespace=NAMESPACE)["tandem/templates/raycluster.yaml"]
    assert f"name: {'a' * 30}-ray-" in cluster


@EVERY_CASE
def test_every_selector_finds_its_own_pods_and_no_others(name: str) -> None:
    release = case(name)
    for each in [*release.of("Deployment"), *release.of("StatefulSet")]:
        own = [pod for pod in release.pods() if selects(each["spec"]["selector"], pod.labels)]
        assert [pod.owner for pod in own] == [f"{each['kind']}/{each['metadata']['name']}"]
    for service in release.of("Service"):
        found = {
            pod.part for pod in release.pods() if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        }
        assert found == {"redis" if service["metadata"]["name"].endswith("-redis") else "serve"}
    parts = {
        NAME: {"serve"}, f"{NAME}-workers": {"ray-worker"}, f"{NAME}-serve": {"serve"}, f"{NAME}-redis": {"redis"},
        f"{NAME}-ray": {"ray-head", "ray-worker"},
    }  # fmt: skip
    for each in release.of("PodDisruptionBudget"):
        found = {pod.part for pod in release.pods() if selects(each["spec"]["selector"], pod.labels)}
        assert found == parts[each["metadata"]["name"]]
    for each in [*release.of("NetworkPolicy"), *release.of("PodMonitor")]:
        selector = each["spec"].get("podSelector") or each["spec"]["selector"]
        assert {pod.part for pod in release.pods() if selects(selector, pod.labels)} == parts[each["metadata"]["name"]]


@EVERY_CASE
def test_every_port_that_is_named_is_a_containers(name: str) -> None:
    release = case(name)
    for service in release.of("Service"):
        for pod in [
            each for each in release.pods() if selects({"matchLabels": service["spec"]["selector"]}, each.labels)
        ]:
            for port in service["spec"]["ports"]:
                assert port["targetPort"] in pod.ports
                if service["spec"].get("clusterIP") == "None":  # its port is the pod's
                    assert pod.ports[port["targetPort"]] == port["port"]
    for policy in release.of("NetworkPolicy"):
        chosen = [each for each in release.pods() if selects(policy["spec"]["podSelector"], each.labels)]
        named = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert all(named <= set(pod.ports) for pod in chosen), f"{policy['metadata']['name']}: {named}"
    for monitor in release.of("PodMonitor"):
        chosen = [each for each in release.pods() if selects(monitor["spec"]["selector"], each.labels)]
        ports = {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]}
        assert all(ports <= set(pod.ports) for pod in chosen)
    for monitor in release.of("ServiceMonitor"):
        [service] = [each for each in release.of("Service") if selects(monitor["spec"]["selector"], labels_of(each))]
        ports = {each["port"] for each in monitor["spec"]["endpoints"]}
        assert ports <= {port["name"] for port in service["spec"]["ports"]}


@EVERY_CASE
def test_what_is_referred_to_is_there_or_is_the_users(name: str) -> None:
    """Secrets and ConfigMaps: rendered, or named in the values."""
    release, given = case(name), json.dumps(CASES[name])
    rendered = {(each["kind"], each["metadata"]["name"]) for each in release.objects}
    for kind, referred in _references(list(release.objects)):
        assert (kind, referred) in rendered or f'"{referred}"' in given, f"{kind} {referred}"


@EVERY_CASE
def test_keys_that_are_asked_of_a_secret_are_in_it(name: str) -> None:
    release = case(name)
    made = {each["metadata"]["name"]: set(each["data"]) for each in release.of("Secret")}
    for pod in release.pods():
        variables = [each for container in pod.containers() for each in container.get("env", [])]
        asked = [each["valueFrom"]["secretKeyRef"] for each in variables if "secretKeyRef" in each.get("valueFrom", {})]
        for each in asked:
            assert each["key"] in made.get(each["name"], {each["key"]}), each
        for volume in [each["secret"] for each in pod.spec.get("volumes", []) if "secret" in each]:
            for item in volume.get("items", []):
                assert item["key"] in made.get(volume["secretName"], {item["key"]}), item


def _references(node: Any) -> list[tuple[str, str]]:
    found = []
    if isinstance(node, list):
        return [each for part in node for each in _references(part)]
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("secretKeyRef", "keySecret", "credentials"):
                found.append(("Secret", value["name"]))
            elif key == "secret" and isinstance(value, dict):
                found.append(("Secret", value.get("secretName") or value["name"]))
            elif key == "configMap":
                found.append(("ConfigMap", value["name"]))
            elif key == "serviceAccountName" and value != "default":
                found.append(("ServiceAccount", value))
            else:
                found += _references(value)
    return found


def test_networks_are_closed_to_all_but_those_named() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in case("closed network").of("NetworkPolicy")}
    inside = {"podSelector": {"matchLabels": {"tandem/cluster": NAME}}}
    serve, ray, redis = (policies[f"{NAME}-{part}"] for part in ("serve", "ray", "redis"))
    assert [sorted(port["port"] for port in rule.get("ports", [])) for rule in serve["ingress"]] == [
        [], ["grpc", "http"], ["http"],
    ]  # fmt: skip
    assert all(rule["from"] for rule in [*serve["ingress"], *ray["ingress"], *redis["ingress"]])
    assert redis["ingress"] == [{"from": [inside], "ports": [{"protocol": "TCP", "port": "redis"}]}]
    assert ray["ingress"][0] == {"from": [inside]}
    assert all(each["egress"][0] == {"to": [inside]} for each in policies.values())
    defaults = {each["metadata"]["name"]: each["spec"] for each in case("defaults").of("NetworkPolicy")}
    assert defaults[f"{NAME}-ray"]["ingress"] == [{"from": [inside]}]
    assert not case("open network").of("NetworkPolicy")


def sizes(release: Release) -> dict[str, tuple[int, int, int]]:
    [cluster] = release.of("RayCluster")
    return {
        each["groupName"]: (each["minReplicas"], each["replicas"], each["maxReplicas"])
        for each in cluster["spec"]["workerGroupSpecs"]
    }  # fmt: skip


def test_ray_has_a_pod_for_every_worker() -> None:
    assert sizes(case("defaults")) == {"prefill": (1, 1, 1), "decode": (2, 2, 2)}
    assert sizes(case("several pods")) == {"prefill": (4, 4, 4), "decode": (16, 16, 16)}, "room for a pod that surges"
    assert sizes(case("autoscaling")) == {"prefill": (2, 2, 5), "decode": (4, 4, 10)}
    [cluster] = case("autoscaling").of("RayCluster")
    assert cluster["spec"]["enableInTreeAutoscaling"]
    [scaler] = case("autoscaling").of("HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == case("autoscaling").named("Deployment")["metadata"]["name"]
    assert "replicas" not in case("autoscaling").named("Deployment")["spec"], "an upgrade would undo what it did"


def test_a_budget_never_keeps_the_only_pod_where_it_is() -> None:
    assert {each["metadata"]["name"] for each in case("defaults").of("PodDisruptionBudget")} == {f"{NAME}-workers"}
    assert len(case("several pods").of("PodDisruptionBudget")) == 2
    assert not case("own secrets and models").of("PodDisruptionBudget")


def test_the_ray_cluster_is_another_one_for_another_image() -> None:
    one, other = (case(name).of("RayCluster")[0]["metadata"]["name"] for name in ("defaults", "gpus"))
    assert one != other
    for name in ("defaults", "gpus"):
        [cluster] = case(name).of("RayCluster")
        assert f"address: {cluster['metadata']['name']}-head-svc.{NAMESPACE}.svc:6379" in case(name).settings
        images = {each["image"] for pod in case(name).pods() if pod.part != "redis" for each in pod.containers()}
        assert len(images) == 1, "prefill, decode and serve are of one version"


def test_notes_say_what_is_missing() -> None:
    assert "the device would lie idle" in case("gpus").notes
    assert "without Redis a stream ends" in case("no Redis").notes
    assert "stop the cluster" in case("defaults").notes
    assert "NOTE" not in case("keys, mutual tls, monitored").notes
    assert "ray.gcsStore.redisAddress is empty" in case("another Redis").notes
