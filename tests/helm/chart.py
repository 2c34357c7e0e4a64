"""The chart, rendered by Helm's own code, as what tests ask of it: objects, pods, containers, commands."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml


def needed(module: str) -> Any:
    """A module of the extra `helm`. Without it the tests are skipped, unless TANDEM_REQUIRE names them."""
    if "helm" in os.environ.get("TANDEM_REQUIRE", "").split(","):
        return import_module(module)
    return pytest.importorskip(module, reason="pip install -e '.[helm]'")


helm = needed("helm_python")

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "helm" / "tandem"
RELEASE, NAMESPACE = "demo", "llm"
NAME = "demo-tandem"

CHOSEN = ("Secret",)  # kinds that are drawn anew at each rendering
Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod as an object makes it. `part`: the label that selects it."""

    owner: str  # kind/name, and the group of a RayCluster
    labels: dict[str, str]
    spec: Object

    @property
    def part(self) -> str:
        """serve, ray-head, ray-worker, redis or test."""
        return self.labels["tandem/part"]

    def containers(self) -> list[Object]:
        """All, those that run before the others too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> Object:
        """The one of this name."""
        [found] = [each for each in self.containers() if each["name"] == name]
        return found

    @property
    def ports(self) -> dict[str, int]:
        """What its containers listen on, by name."""
        return {port["name"]: port["containerPort"] for each in self.containers() for port in each.get("ports", [])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """All that a set of values makes."""

    objects: tuple[Object, ...]
    notes: str

    def of(self, kind: str) -> list[Object]:
        """Objects of a kind."""
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str = NAME) -> Object:
        """The object of that name."""
        [found] = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found

    def pods(self) -> list[Pod]:
        """Every kind of pod that comes of it."""
        return [
            Pod(owner=owner, labels=template["metadata"]["labels"], spec=template["spec"])
            for each in self.objects
            for owner, template in _templates(each)
        ]

    def pod(self, part: str) -> Pod:
        """The first pod of a part."""
        return next(each for each in self.pods() if each.part == part)

    @property
    def settings(self) -> str:
        """The settings file of the serve pods."""
        return str(self.named("ConfigMap", f"{NAME}-settings")["data"]["tandem.yaml"])


def _templates(object_: Object) -> Iterator[tuple[str, Object]]:
    owner = f"{object_['kind']}/{object_['metadata']['name']}"
    if object_["kind"] in ("Deployment", "StatefulSet"):
        yield owner, object_["spec"]["template"]
    elif object_["kind"] == "Pod":
        yield owner, object_
    elif object_["kind"] == "RayCluster":
        yield f"{owner}/head", object_["spec"]["headGroupSpec"]["template"]
        for group in object_["spec"]["workerGroupSpecs"]:
            yield f"{owner}/{group['groupName']}", group["template"]


@functools.cache
def loaded(folder: Path = CHART) -> Any:
    """The chart as Helm holds it."""
    return helm.Chart.load(folder)


def render(values: Object | None = None, *, folder: Path = CHART) -> Release:
    """Raises helm.HelmValuesError where the schema refuses the values, HelmRenderError where a template does."""
    pages = loaded(folder).render(values or {}, name=RELEASE, namespace=NAMESPACE)
    notes = next(page for name, page in pages.items() if name.endswith("NOTES.txt"))
    objects = [
        each
        for name, page in sorted(pages.items())
        if not name.endswith("NOTES.txt")
        for each in yaml.safe_load_all(page)
        if each is not None
    ]
    return Release(objects=tuple(objects), notes=notes)


TLS = {"tls": {"enabled": True, "secret": "server-certificate"}}
MUTUAL = {
    "tls": {
        "enabled": True, "secret": "server-certificate", "clientCaSecret": "client-authority", "clientSecret": "client",
        "name": "llm.example.org",
    }
}  # fmt: skip
KEYS = {"auth": {"apiKeysSecret": "keys", "operatorKeySecret": "operator"}}
MONITORED = {
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
        "rules": {"enabled": True},
        "dashboards": {"enabled": True, "annotations": {"folder": "LLM"}},
    }
}
GPU = {"requests": {"cpu": "8"}, "limits": {"nvidia.com/gpu": 1, "memory": "64Gi"}}


def merged(*parts: Object) -> Object:
    """Values of several cases together."""
    result: Object = {}
    for part in parts:
        for key, value in copy.deepcopy(part).items():
            known = result.get(key)
            result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


# What users combine; every rule of the tests holds in each of them.
CASES: dict[str, Object] = {
    "defaults": {},
    "tls": TLS,
    "mutual tls": MUTUAL,
    "keys": KEYS,
    "keys, mutual tls, monitored": merged(KEYS, MUTUAL, MONITORED),
    "monitored": MONITORED,
    "another Redis": {"redis": {"bundled": False, "urlSecret": "redis-url"}},
    "another Redis for Ray too": {
        "redis": {"bundled": False, "urlSecret": "redis-url"},
        "ray": {"gcsStore": {"redisAddress": "redis.example.org:6379", "passwordSecret": "redis-password"}},
    },
    "no Redis": {"redis": {"enabled": False}, "serve": {"routers": 1}},
    "gpus": {
        "image": {"tag": "0.1.0-cuda"},
        "workers": {"prefill": {"resources": GPU}, "decode": {"resources": GPU, "runtimeClassName": "nvidia"}},
    },
    "autoscaling": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 5}},
    "several pods": {
        "serve": {"replicas": 3, "drainSeconds": 600, "maxSurge": 1}, "workers": {"decode": {"replicas": 4}}
    },
    "closed network": merged(
        MONITORED,
        {
            "networkPolicy": {
                "clients": [{"podSelector": {"matchLabels": {"app": "gateway"}}}],
                "monitoring": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
                "restrictEgress": True,
                "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"protocol": "TCP", "port": 443}]}],
            }
        },
    ),
    "open network": {"networkPolicy": {"enabled": False}},
    "own secrets and models": {
        "auth": {"secretsSecret": "secrets"},
        "model": {"name": "/models/qwen", "existingClaim": "models"},
        "settings": {"dtype": "bfloat16", "exact": False, "log_level": "debug"},
        "ray": {"auth": False},
        "podDisruptionBudget": {"enabled": False},
        "tests": {"enabled": False},
        "serviceAccount": {"create": False},
        "imagePullSecrets": [{"name": "registry"}],
        "serve": {"extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}], "tolerations": [{"operator": "Exists"}]},
        "workers": {"swapMemory": "0"},
    },
}  # fmt: skip


@functools.cache
def case(name: str) -> Release:
    """One of the cases, rendered."""
    return render(CASES[name])
