"""The files of deploy/ and docker-compose.yml: valid, of one version, and with settings that exist."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import jsonschema_rs
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from app import __version__
from app.config.variables import own_variables

ROOT = Path(__file__).parents[3]
K8S = ROOT / "deploy/k8s"
CHART = ROOT / "deploy/helm/llm-service"
OVERLAYS = ["base", "overlays/gpu", "overlays/vllm"]
KUBERNETES = "1.32"


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def manifests() -> list[Path]:
    return sorted(file for file in K8S.rglob("*.yaml") if file.name != "kustomization.yaml")


@pytest.mark.parametrize("file", manifests(), ids=lambda file: str(file.relative_to(K8S)))
def test_a_manifest_is_what_the_schema_of_kubernetes_allows(file: Path):
    """Unknown fields are refused, too: the cluster would pass over a misspelt probe in silence."""
    for document in documents(file.read_text()):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_built_and_valid(overlay: str):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, for kustomize")
    built = subprocess.run([kubectl, "kustomize", str(K8S / overlay)], capture_output=True, text=True, check=True)

    found = documents(built.stdout)

    for document in found:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"} <= {
        document["kind"] for document in found
    }
    assert {"llm-service"} == {document["metadata"].get("namespace", "llm-service") for document in found}


def test_the_file_of_compose_is_what_its_specification_allows():
    """Misspelt keys and values are refused, and so is a volume that is nowhere declared."""
    text = (ROOT / "docker-compose.yml").read_text()

    found = compose(text)
    found.validate()
    found.validate_volumes()

    assert {"llm-service", "postgres", "redis", "prometheus", "grafana", "vllm"} <= set(found.service_names())
    with pytest.raises(ValueError, match="healthchek"):
        compose(text.replace("healthcheck:", "healthchek:", 1))


def compose(text: str) -> PyCompose:
    """Return a file of Compose without its anchors, which are YAML's affair."""
    return PyCompose.from_json(json.dumps(yaml.safe_load(text)))


def settings_of_deployments() -> Iterator[tuple[str, str]]:
    """Yield each variable that a deployment sets for the service, and where."""
    for file in K8S.rglob("*.yaml"):
        for name in re.findall(r"(?:^ *|name: )([A-Z]+(?:__[A-Z_]+)+)\b", file.read_text(), re.MULTILINE):
            yield name, str(file.relative_to(ROOT))
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for service in ("llm-service", "llm-service-vllm"):
        for name in compose["services"][service]["environment"]:
            yield name, f"docker-compose.yml, {service}"
    for file in (CHART / "values.yaml", *(CHART / "templates").iterdir()):
        for name in re.findall(r"\b([A-Z]+(?:__[A-Z_]+)+)\b", file.read_text()):
            yield name, str(file.relative_to(ROOT))


def test_every_variable_of_a_deployment_is_one_that_the_service_reads():
    found = list(settings_of_deployments())

    known = own_variables() | {"SECTION__KEY"}
    assert [] == [(name, where) for name, where in found if name not in known]
    assert 10 < len(found)


def test_all_deployments_name_the_version_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    base = yaml.safe_load((K8S / "base/kustomization.yaml").read_text())
    gpu = yaml.safe_load((K8S / "overlays/gpu/kustomization.yaml").read_text())

    assert (__version__, __version__) == (chart["version"], chart["appVersion"])
    assert (__version__, f"{__version__}-cuda") == (base["images"][0]["newTag"], gpu["images"][0]["newTag"])


def test_the_charts_values_satisfy_its_schema_and_a_misspelt_one_does_not():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert jsonschema_rs.is_valid(schema, values)
    assert not jsonschema_rs.is_valid(schema, values | {"replicaCount": 2})
    assert set(values) == set(schema["properties"]) - {"global"}


EVERYTHING = {
    "autoscaling": {"enabled": True},
    "persistence": {"enabled": True, "storageClass": "fast"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "resources": {"limits": {"nvidia.com/gpu": 1}},
    "settings": {"MODEL__NAME": "org/name"},
}
NOTHING = {
    "podDisruptionBudget": {"enabled": False},
    "networkPolicy": {"enabled": False},
}


def test_helm_finds_nothing_wrong_with_the_chart():
    found = helm_python.lint(CHART)

    assert ([], ["icon is recommended"]) == (found["errors"], [each["error"] for each in found["messages"]])


@pytest.mark.parametrize(
    ("values", "optional"),
    [
        pytest.param({}, {"PodDisruptionBudget", "NetworkPolicy"}, id="as it comes"),
        pytest.param(
            EVERYTHING,
            {"HorizontalPodAutoscaler", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy"},
            id="everything",
        ),
        pytest.param(NOTHING, set[str](), id="as little as goes"),
    ],
)
def test_what_helm_makes_of_the_chart_is_valid(values: dict[str, Any], optional: set[str]):
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name="demo", namespace="llm")
    found = [each for name, text in rendered.items() if name.endswith(".yaml") for each in documents(text)]

    for document in found:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "ConfigMap"} | optional == {document["kind"] for document in found}


def test_the_charts_templates_use_every_value_and_no_other():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    texts = "".join(file.read_text() for file in (CHART / "templates").iterdir())
    used = {tuple(path.split(".")) for path in re.findall(r"\.Values\.([A-Za-z.]+)", texts)}
    free = {"settings", "resources", "nodeSelector", "affinity"}
    there = {
        path
        for name, value in values.items()
        for path in ([(name, key) for key in value] if isinstance(value, dict) and name not in free else [(name,)])
    }

    assert there == used


def test_no_container_of_ours_runs_as_root_or_writes_to_its_root():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    (deployment,) = documents((K8S / "base/deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]

    assert all(
        compose[name]["read_only"] and compose[name]["cap_drop"] == ["ALL"]
        for name in ("llm-service", "llm-service-vllm")
    )
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert pod["terminationGracePeriodSeconds"] > 10 + 25
    assert (ROOT / "Dockerfile").read_text().count("USER 10001") == 2
