"""The files in docs/deploy are valid, and every name in them exists. No container runs here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
from dockerfile_parse import DockerfileParser
from ruamel.yaml import YAML

from cortex.operator.config.schema import Configuration, variable
from cortex.operator.config.sources import FILE_VARIABLE, load
from operator_harness import CORTEX

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
VARIABLES = {FILE_VARIABLE, *(variable(name) for name in Configuration.model_fields)}


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_variables(variables: dict[str, str]) -> None:
    assert {name for name in variables if name.startswith("CORTEX_")} <= VARIABLES
    load({}, None, {name: value for name, value in variables.items() if name != FILE_VARIABLE})


# systemd


def unit_settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / unit).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", ["cortex.service", "ray.service"])
def test_systemd_accepts_the_units_without_warnings(unit: str, tmp_path: Path) -> None:
    text = (DEPLOY / unit).read_text()
    copy = tmp_path / unit
    copy.write_text(text.replace("/opt/cortex/bin", str(Path(CORTEX).parent)))
    assert run("systemd-analyze", "--man=no", "verify", str(copy)) == ""


def test_the_unit_runs_cortex_serve_and_kills_no_jobs() -> None:
    found = unit_settings("cortex.service")
    assert shlex.split(found["ExecStart"][0])[1:] == ["serve"]
    check_variables(dict(line.split("=", 1) for line in found["Environment"]))
    assert (found["KillMode"], found["OOMPolicy"]) == (["process"], ["continue"])
    assert found["StateDirectory"] == ["cortex"]
    assert "CORTEX_SERVE_DATA_DIR=/var/lib/cortex" in found["Environment"]


def test_every_option_of_ray_in_its_unit_and_on_its_page_exists() -> None:
    found = unit_settings("ray.service")
    assert found["KillMode"] == ["process"]
    # Some are in no help text.
    code = (
        "from ray.scripts.scripts import start; print(*(o for p in start.params for o in p.opts))"
    )
    known = set(run(sys.executable, "-c", code).split())
    page = (ROOT / "docs" / "ray-cluster.md").read_text()
    commands = [*found["ExecStart"], *re.findall(r'^RAY_OPTIONS="(.*)"', page, re.MULTILINE)]
    commands += re.findall(r"^ray start .*", page, re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        options = {word.partition("=")[0] for word in shlex.split(command) if word[0] == "-"}
        assert options <= known, command


def test_the_operators_file_on_the_page_of_the_cluster_is_accepted(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ray-cluster.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "operator.yaml"
    file.write_text(text)
    assert load({}, file, {}).configuration.engine == "ray"


# The image


@pytest.fixture
def image(tmp_path: Path) -> DockerfileParser:
    # The library could write to the file.
    shutil.copy(DEPLOY / "Dockerfile", tmp_path / "Dockerfile")
    return DockerfileParser(str(tmp_path / "Dockerfile"))


def arguments_of(image: DockerfileParser, instruction: str) -> list[str]:
    return [s["value"] for s in image.structure if s["instruction"] == instruction]


def test_the_image_uses_known_instructions_and_existing_files(image: DockerfileParser) -> None:
    known = {
        "COMMENT", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE",
        "HEALTHCHECK", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    assert {step["instruction"] for step in image.structure} <= known
    names = [value.split()[-1] for value in arguments_of(image, "FROM") if " AS " in value]
    for value in arguments_of(image, "COPY"):
        *options, _ = value.split()
        if options[0].startswith("--from="):
            assert options[0].removeprefix("--from=") in names
            continue
        for source in options:
            assert (ROOT / source).exists(), source
    assert all(
        re.fullmatch(r"[\w./-]+:[\w.-]+( AS \w+)?", value) for value in arguments_of(image, "FROM")
    )


def test_the_image_runs_the_operator_as_an_unprivileged_user(image: DockerfileParser) -> None:
    assert json.loads(arguments_of(image, "ENTRYPOINT")[0]) + json.loads(image.cmd) == [
        "cortex",
        "serve",
    ]
    (user,) = arguments_of(image, "USER")
    created = next(value for value in arguments_of(image, "RUN") if "useradd" in value)
    assert f" {user} " in created
    check_variables(image.envs)
    assert image.envs["CORTEX_SERVE_DATA_DIR"] in arguments_of(image, "VOLUME")
    assert str(Configuration.model_fields["port"].default) in arguments_of(image, "EXPOSE")
    health = arguments_of(image, "HEALTHCHECK")[0]
    program = json.loads(health[health.index("[") :])
    compile(program[2], "healthcheck", "exec")
    assert "/healthz" in program[2]


def test_the_files_copied_into_the_image_suffice_to_install_the_package(
    image: DockerfileParser, tmp_path: Path
) -> None:
    for value in arguments_of(image, "COPY"):
        if not value.startswith("--from="):
            *sources, _ = value.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, tmp_path / source)
    command = next(value for value in arguments_of(image, "RUN") if "uv sync" in value)
    sync = shlex.split(command[command.index("uv sync") :])
    venv = tmp_path / "venv"
    uv = str(Path(sys.executable).with_name("uv"))
    run(
        uv, *sync[1:], "--quiet", "--no-compile-bytecode", "--project", str(tmp_path), "--python",
        sys.executable, UV_PROJECT_ENVIRONMENT=str(venv), VIRTUAL_ENV="",
    )  # fmt: skip
    assert run(str(venv / "bin" / "cortex"), "version").strip()
    assert not (venv / "bin" / "pytest").exists()


# compose


@pytest.fixture
def services() -> Any:
    return YAML(typ="safe").load(DEPLOY / "compose.yaml")["services"]


def test_the_compose_file_is_valid() -> None:
    tool = str(Path(sys.executable).with_name("check-jsonschema"))
    run(tool, "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))


def test_the_operator_of_the_compose_file_uses_its_database(services: Any) -> None:
    operator, database = services["operator"], services["database"]
    check_variables(operator["environment"])
    store = Configuration(store=operator["environment"]["CORTEX_SERVE_STORE"]).store or ""
    made = database["environment"]
    assert store == f"postgresql://{made['POSTGRES_USER']}@database/{made['POSTGRES_DB']}"
    assert operator["environment"]["PGPASSWORD"] == made["POSTGRES_PASSWORD"]
    assert operator["depends_on"] == {"database": {"condition": "service_healthy"}}
    build = operator["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    named = {volume.split(":")[0] for each in services.values() for volume in each["volumes"]}
    assert named == YAML(typ="safe").load(DEPLOY / "compose.yaml")["volumes"].keys()


# Kubernetes

KUBERNETES = DEPLOY / "kubernetes"
# Fields of KubeRay's ray.io/v1 that the manifest may use, and whether they are required.
RAY_SPEC = {"rayVersion": False, "headGroupSpec": True, "workerGroupSpecs": False}
RAY_HEAD = {"rayStartParams": True, "template": True, "labels": False}
RAY_WORKERS = RAY_HEAD | {
    "groupName": True, "replicas": False, "minReplicas": True, "maxReplicas": True,
}  # fmt: skip


def documents(name: str) -> list[Any]:
    return list(YAML(typ="safe").load_all((KUBERNETES / name).read_text()))


def manifests() -> list[Any]:
    applied = documents("kustomization.yaml")[0]["resources"]
    return [each for name in (*applied, "first-token.yaml") for each in documents(name)]


def manifest(kind: str, name: str) -> Any:
    (found,) = [
        each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def ray_cluster() -> Any:
    return manifest("RayCluster", "cortex")


def templates() -> list[Any]:
    """The templates of all pods."""
    spec = ray_cluster()["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    plain = [each["spec"]["template"] for each in manifests() if "template" in each["spec"]]
    return plain + [group["template"] for group in groups]


def containers() -> list[Any]:
    return [each for template in templates() for each in template["spec"]["containers"]]


def test_the_manifests_are_valid_by_the_kubernetes_schemas() -> None:
    for each in manifests():
        if each["kind"] != "RayCluster":
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    for number, template in enumerate(templates()):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}}
        pod["spec"] = template["spec"]
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_kubernetes_schemas_find_an_unknown_field() -> None:
    wrong = manifest("StatefulSet", "cortex")
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_ray_cluster_has_only_fields_of_kuberay() -> None:
    cluster = ray_cluster()
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    checked = [(spec, RAY_SPEC), (spec["headGroupSpec"], RAY_HEAD)]
    checked += [(group, RAY_WORKERS) for group in spec["workerGroupSpecs"]]
    for found, known in checked:
        assert found.keys() <= known.keys()
        assert {name for name, is_required in known.items() if is_required} <= found.keys()
    for found, _ in checked[1:]:
        assert all(isinstance(value, str) for value in found["rayStartParams"].values())
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["rayVersion"] == importlib.metadata.version("ray")


def test_every_name_that_the_manifests_use_exists() -> None:
    kustomization = documents("kustomization.yaml")[0]
    made = {each["name"]: each["envs"] for each in kustomization["secretGenerator"]}
    services = {each["metadata"]["name"] for each in manifests() if each["kind"] == "Service"}
    services.add(f"{ray_cluster()['metadata']['name']}-head-svc")  # KubeRay makes it
    for container in containers():
        variables = {each["name"]: each.get("value", "") for each in container.get("env", [])}
        check_variables(variables)
        for each in container.get("env", []):
            if "valueFrom" in each:
                assert each["valueFrom"]["secretKeyRef"] == {
                    "name": "cortex-database",
                    "key": "password",
                }
        if "CORTEX_SERVE_STORE" in variables:
            host = urlsplit(variables["CORTEX_SERVE_STORE"]).hostname
            assert host in services
        if "CORTEX_SERVE_RAY_ADDRESS" in variables:
            assert variables["CORTEX_SERVE_RAY_ADDRESS"].partition(":")[0] in services
    assert made == {"cortex-database": ["database.env"]}
    images = {container["image"].partition(":")[0] for container in containers()}
    assert images == {"postgres", *(each["name"] for each in kustomization["images"])}
    for each in manifests():
        if each["kind"] == "Service":
            owner = manifest("StatefulSet", each["metadata"]["name"])
            labels = owner["spec"]["template"]["metadata"]["labels"]
            assert each["spec"]["selector"].items() <= labels.items()


def test_every_mounted_volume_is_declared() -> None:
    for each in manifests():
        if each["kind"] == "StatefulSet":
            claims = [claim["metadata"]["name"] for claim in each["spec"]["volumeClaimTemplates"]]
            spec = each["spec"]["template"]["spec"]
            volumes = {volume["name"] for volume in spec["volumes"]} | set(claims)
            mounts = {mount["name"] for c in spec["containers"] for mount in c["volumeMounts"]}
            assert mounts == volumes


def test_kubernetes_probes_the_operators_health_routes() -> None:
    spec = manifest("StatefulSet", "cortex")["spec"]
    assert spec["replicas"] == 1
    (container,) = spec["template"]["spec"]["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}
    assert probes == {
        "startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz",
    }  # fmt: skip
    (port,) = container["ports"]
    assert port["containerPort"] == Configuration.model_fields["port"].default
    assert run("bash", "-n", "-c", container["command"][2]) == ""
    assert "exec cortex serve" in container["command"][2]


def test_no_pod_of_the_manifests_runs_as_root() -> None:
    for template in templates():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"]
        assert template["spec"]["automountServiceAccountToken"] is False
    assert all(not each["securityContext"]["allowPrivilegeEscalation"] for each in containers())


def test_the_kubernetes_image_is_the_plain_image_with_ray() -> None:
    text = (KUBERNETES / "Dockerfile").read_text()
    plain = (DEPLOY / "Dockerfile").read_text()
    build = plain[plain.index("FROM") : plain.index("\n\nFROM")]
    assert build + " --extra ray" in text
    assert "ray[default]==" in text  # for the probes of KubeRay
    assert "useradd --system --create-home --uid 10001 cortex" in text
