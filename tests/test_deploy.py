"""What stands under deploy/: files that parse, that name what exists, and metrics that are really served."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from door import open_door
from gateway import Worker, gateway
from prometheus_client.parser import text_string_to_metric_families

from phloem.cli.router import parse
from phloem.core.config import Config
from phloem.kvcache.publisher import read_config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(path for path in (DEPLOY / "k8s").rglob("*.yaml"))
IN_VENV = Path(sys.executable).parent


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(str(IN_VENV / name))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def everything() -> list[dict[str, Any]]:
    return [item for path in MANIFESTS for item in documents(path)]


async def scraped() -> list[str]:
    """What a server and a gateway tell."""
    async with open_door() as door, gateway(Worker()) as gate:
        await gate.chat()
        return [(await door.http.get("/metrics")).text, (await gate.http.get("/metrics")).text]


async def served() -> set[str]:
    """Every name that a scrape of a server and of a gateway gives."""
    names: set[str] = set()
    for text in await scraped():
        for family in text_string_to_metric_families(text):
            # A counter by label has no sample before it has counted, but always its family.
            names |= {sample.name for sample in family.samples}
            names |= {f"{family.name}_total"} if family.type == "counter" else set()
    return names


def named(expression: str) -> set[str]:
    return set(re.findall(r"phloem(?:_router)?:[a-z0-9_]+", expression))


async def test_dashboard_and_alerts_ask_for_metrics_that_are_served() -> None:
    board = json.loads((DEPLOY / "grafana" / "phloem.json").read_text())
    asked = {name for panel in board["panels"] for target in panel.get("targets", []) for name in named(target["expr"])}
    (alerts,) = documents(DEPLOY / "prometheus" / "alerts.yaml")
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    asked |= {name for rule in rules for name in named(rule["expr"])}
    assert len(asked) > 20 and not asked - await served()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["targets"] for panel in board["panels"] if panel["type"] != "row")
    assert all(rule["annotations"]["summary"] for rule in rules)


def test_the_dashboard_is_what_its_script_writes() -> None:
    import make_dashboard

    assert json.loads((DEPLOY / "grafana" / "phloem.json").read_text()) == make_dashboard.dashboard()


def test_manifests_name_what_exists() -> None:
    items = everything()
    by_kind = {(item["kind"], item["metadata"]["name"]) for item in items if "metadata" in item}
    for item in (item for item in items if item["kind"] in ("Deployment", "StatefulSet")):
        pod = item["spec"]["template"]
        assert item["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in by_kind
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in by_kind
        drain = Config().server.drain_timeout
        assert pod["spec"]["terminationGracePeriodSeconds"] >= drain + 10
        for container in pod["spec"]["containers"]:
            ports = {port["name"] for port in container["ports"]}
            probes = [
                container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe") if name in container
            ]
            assert probes and all(probe["httpGet"]["port"] in ports for probe in probes)
    for path in MANIFESTS:
        if path.name == "kustomization.yaml":
            (kustomization,) = documents(path)
            resources = [path.parent / name for name in kustomization["resources"]]
            # A file must lie in the folder itself; of another folder all of it is taken.
            assert all(one.is_file() if ".." not in str(one) else (one / path.name).exists() for one in resources)


VARIABLES = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "phloem-0.phloem"}


def containers(item: dict[str, Any]) -> list[dict[str, Any]]:
    spec = item.get("spec", {})
    group = spec.get("leaderWorkerTemplate", {})
    pods = [spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")]
    return [one for pod in pods if pod for one in pod["spec"]["containers"]]


def test_what_containers_are_told_is_understood() -> None:
    items = everything()
    files = {item["metadata"]["name"]: item["data"]["server.yaml"] for item in items if item["kind"] == "ConfigMap"}
    settings = {name: yaml.safe_load(text) for name, text in files.items()}
    for values in settings.values():
        config = Config.from_flat(values)
        events = config.cache.kv_events_config
        assert read_config(events).wanted if events else config.runtime.tp_size > 1
    parts: set[str] = set()
    for container in (one for item in items for one in containers(item)):
        if container["args"][0] == "router":
            found = parse(container["args"][1:])
            assert len(found.worker_urls) == 3 or (found.service_discovery and found.paired and found.decode_selector)
            continue
        told = dict(one.removeprefix("--").split("=", 1) for one in container["args"][1:] if "=" in one)
        if told.pop("config", "") == "/etc/phloem/server.yaml" and told:
            parts.add(told.get("disaggregation-mode", "node"))
            name = "phloem-group" if "nnodes" in told else "phloem-pairs"
            more = {key: re.sub(r"\$\((\w+)\)", lambda at: VARIABLES[at[1]], text) for key, text in told.items()}
            config = Config.from_flat({**settings[name], **{k: int(v) if v.isdigit() else v for k, v in more.items()}})
            assert "nnodes" not in told or (config.nodes.nnodes, config.nodes.node_rank) == (2, 1)
    assert parts == {"prefill", "decode", "node"}


def test_pods_are_found_by_the_labels_that_they_have() -> None:
    items = everything()
    labels = [
        item["spec"]["template"]["metadata"]["labels"]
        for item in items
        if item["kind"] in ("Deployment", "StatefulSet")
    ]
    for container in (one for item in items for one in containers(item) if one["args"][0] == "router"):
        found = parse(container["args"][1:])
        for selector in (found.prefill_selector, found.decode_selector):
            wanted = dict(one.split("=", 1) for one in selector)
            assert not wanted or any(wanted.items() <= one.items() for one in labels)
    named = {(item["kind"], item["metadata"]["name"]): item for item in items if "metadata" in item}
    prefill, config = named["Deployment", "phloem-prefill"], named["ConfigMap", "phloem-pairs"]
    pod = prefill["spec"]["template"]
    port = yaml.safe_load(config["data"]["server.yaml"])["disaggregation-bootstrap-port"]
    assert pod["metadata"]["annotations"]["sglang.ai/bootstrap-port"] == str(port)
    assert port in [one["containerPort"] for one in pod["spec"]["containers"][0]["ports"]]


# What LeaderWorkerSet demands of its objects, of the fields that stand here (its v1 API).
GROUP = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["leaderWorkerTemplate"],
            "additionalProperties": False,
            "properties": {
                "replicas": {"type": "integer", "minimum": 0},
                "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
                "leaderWorkerTemplate": {
                    "type": "object",
                    "required": ["workerTemplate", "size"],
                    "additionalProperties": False,
                    "properties": {
                        "size": {"type": "integer", "minimum": 1},
                        "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
                        "leaderTemplate": {"type": "object", "required": ["spec"]},
                        "workerTemplate": {"type": "object", "required": ["spec"]},
                    },
                },
            },
        },
    },
}


def groups() -> list[dict[str, Any]]:
    return [item for item in everything() if item["kind"] == "LeaderWorkerSet"]


def test_a_group_of_nodes_is_what_its_controller_reads() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    (group,) = groups()
    jsonschema.validate(group, GROUP)
    wrong = json.loads(json.dumps(group))
    wrong["spec"]["leaderWorkerTemplate"]["size"] = "two"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, GROUP)


@pytest.mark.slow
def test_pods_of_a_group_are_what_kubernetes_reads(tmp_path: Path) -> None:
    (group,) = groups()
    for part in ("leaderTemplate", "workerTemplate"):
        pod = group["spec"]["leaderWorkerTemplate"][part]
        path = tmp_path / f"{part}.yaml"
        facts = {"name": part.lower(), **pod["metadata"]}
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": facts, "spec": pod["spec"]}))
        done = subprocess.run([tool("kubernetes-validate"), "--strict", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_probes_ask_for_routes_that_exist() -> None:
    paths = {
        (container["args"][0], container[probe]["httpGet"]["path"])
        for item in everything()
        for container in item.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        if probe in container
    }
    async with open_door() as door, gateway(Worker()) as gate:
        for kind, path in paths:
            answer = await (door if kind == "serve" else gate).http.get(path)
            assert answer.status_code == 200, (kind, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_manifests_are_what_kubernetes_reads(path: Path) -> None:
    if path.name == "kustomization.yaml":
        pytest.skip("kustomize's own file has no schema there")
    if any(item["kind"] == "LeaderWorkerSet" for item in documents(path)):
        pytest.skip("Kubernetes itself does not know groups: they have tests of their own")
    done = subprocess.run([tool("kubernetes-validate"), "--strict", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((DEPLOY / "docker").iterdir()), ids=lambda path: path.name)
def test_images_are_well_written_and_copy_what_exists(path: Path) -> None:
    text = path.read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for name in shlex.split(line)[:-1]:
            assert (ROOT / name).exists(), name
    assert "\nUSER 10001" in text and '"tini"' in text and "HEALTHCHECK" in text
    extras = re.findall(r'"\.\[([a-z,]+)\]"', text)
    known = (ROOT / "pyproject.toml").read_text()
    assert extras and all(f"\n{name} = [" in known for name in extras[0].split(","))
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_its_files() -> None:
    folder = DEPLOY / "prometheus"
    config = documents(folder / "prometheus.yaml")[0]
    assert all((folder / name).exists() for name in config["rule_files"])
    for kind, name in (("config", "prometheus.yaml"), ("rules", "alerts.yaml")):
        done = subprocess.run([tool("promtool"), "check", kind, str(folder / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_metrics_are_as_prometheus_wants_them() -> None:
    for text in await scraped():
        done = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True)
        # Colons stay: vLLM and SGLang have them, and dashboards and pickers look for such names.
        faults = [line for line in done.stderr.splitlines() if not line.endswith("should not contain ':'")]
        assert done.returncode in (0, 3) and not faults, faults  # 3: it has advice


@pytest.mark.parametrize(
    ("alert", "series", "values", "at"),
    [
        ("PhloemEngineDown", "phloem:engine_up", "0+0x10", "3m"),
        ("PhloemNoWorkers", "phloem_router:workers_ready", "2 0+0x10", "3m"),
        ("PhloemQueueGrows", "phloem:num_queue_reqs", "33+0x10", "6m"),
        ("PhloemPreempts", "phloem:num_preemptions_total", "0+60x20", "16m"),
        ("PhloemStreamsBreak", "phloem_router:broken_streams_total", "0+1x10", "8m"),
    ],
)
def test_alerts_ring(alert: str, series: str, values: str, at: str, tmp_path: Path) -> None:
    labels = {"instance": "a"}
    (rule,) = [
        rule
        for group in documents(DEPLOY / "prometheus" / "alerts.yaml")[0]["groups"]
        for rule in group["rules"]
        if rule["alert"] == alert
    ]
    text = rule["annotations"]["summary"].replace("{{ $labels.instance }}", "a")
    rung = {"exp_labels": labels | rule["labels"], "exp_annotations": {"summary": text}}
    test = {
        "interval": "1m",
        "input_series": [{"series": f'{series}{{instance="a"}}', "values": values}],
        "alert_rule_test": [
            {"eval_time": "0m", "alertname": alert, "exp_alerts": []},
            {"eval_time": at, "alertname": alert, "exp_alerts": [rung]},
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "prometheus" / "alerts.yaml")], "tests": [test]}))
    done = subprocess.run([tool("promtool"), "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((DEPLOY / "systemd").iterdir()), ids=lambda path: path.name)
def test_units_start_commands_that_exist(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text())
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[0].endswith("/phloem") and command[1] in ("serve", "router")
    assert int(unit["Service"]["TimeoutStopSec"]) >= Config().server.drain_timeout + 10
    assert unit["Install"]["WantedBy"] == "multi-user.target"
