"""The files of deploy/: what they name exists, what they say is valid, and Prometheus and its alerts work."""
from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse

import kubernetes_validate
import pytest
import rustinfer
import yaml
from harness import ROOT, free_port, need_tool, wait_for

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
KUBERNETES = DEPLOY / "kubernetes"
SETTINGS = {setting.flag: setting for setting in rustinfer.SETTINGS}
BUILT_IN = sorted(path for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/rustinfer.json").read_text())


def load(path: str) -> dict:
    return yaml.safe_load((DEPLOY / path).read_text())


def check_flags(args: list[str]) -> dict[str, str]:
    """The flags of a command line, whose names and values the server must accept."""
    flags = dict(argument.split("=") for argument in args)
    for flag, value in flags.items():
        if not value.startswith("/"):  # files of the container
            rustinfer.check_setting(SETTINGS[flag], value, flag)
        assert flag in SETTINGS
    return flags


# -- images


def copied() -> list[str]:
    """What the Dockerfile takes from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()[:-1]]


def test_dockerfile_has_no_finding():
    done = subprocess.run([need_tool("hadolint", f"{sys.prefix}/bin/hadolint"), "--failure-threshold", "style",
                           str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_builder_is_sent_what_the_dockerfile_copies_and_nothing_else():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == set(copied())


def test_what_the_dockerfile_copies_is_enough_to_build_the_package(tmp_path):
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path)], check=True,
                   capture_output=True, timeout=120)
    assert len(list((tmp_path / "dist").glob("*.whl"))) == 1


def test_dockerfile_installs_extras_and_sets_variables_that_exist():
    setup = (ROOT / "setup.cfg").read_text()
    for extra in {name for names in re.findall(r"'\.\[(.+?)\]'", DOCKERFILE) for name in names.split(",")}:
        assert re.search(rf"^{extra} =$", setup, re.MULTILINE), extra
    values = dict(re.findall(r"\b([A-Z_]+)=(\S+)", DOCKERFILE))
    variables = {setting.variable: setting for setting in rustinfer.SETTINGS}
    ours = {name: value for name, value in values.items() if name in variables or name.startswith("RUSTINFER")}
    assert set(ours) == {"HOST", "PORT", "DEVICE"}
    for name, value in ours.items():
        rustinfer.check_setting(variables[name], value, name)


def test_both_targets_run_as_a_user_without_rights_and_end_by_sigterm():
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))
    assert re.search(r"useradd --uid 10001 ", stages["base"]) and "STOPSIGNAL SIGTERM" in stages["base"]
    for target in ("cpu", "cuda"):
        assert re.findall(r"^(?:USER|FROM) .+$", stages[target], re.MULTILINE) == ["USER 10001:10001"]
        assert re.search(rf"^FROM base AS {target}$", DOCKERFILE, re.MULTILINE)


def test_health_check_tells_a_server_from_none(demo_server):
    command = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1])
    codes = [subprocess.run([sys.executable, *command[1:]], env={**os.environ, "PORT": str(port)}, timeout=30,
                            capture_output=True).returncode for port in (demo_server.port, free_port())]
    assert codes == [0, 1]


def test_compose_mounts_files_that_exist_and_publishes_ports_on_this_machine_alone():
    services = load("compose.yaml")["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), mount
    built = services["rustinfer"]["build"]
    assert (DEPLOY / built["context"] / built["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    for target in (built["target"], load("compose.gpu.yaml")["services"]["rustinfer"]["build"]["target"]):
        assert f" AS {target}\n" in DOCKERFILE


def test_compose_gives_the_server_flags_that_exist_and_time_to_drain():
    service = load("compose.yaml")["services"]["rustinfer"]
    command = service["command"]
    flags = check_flags([f"{flag}={value}" for flag, value in zip(command[::2], command[1::2])])
    assert float(service["stop_grace_period"].removesuffix("s")) >= float(flags["--drain-timeout"]) + 5
    assert "MODEL_PATH" in {setting.variable for setting in rustinfer.SETTINGS} & set(service["environment"])


def test_grafana_finds_its_data_source_and_dashboard():
    [source] = load("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert {item["datasource"]["uid"] for item in DASHBOARD["panels"] if "targets" in item} == {source["uid"]}
    [provider] = load("grafana/provisioning/dashboards/rustinfer.yml")["providers"]
    grafana = load("compose.yaml")["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


# -- Kubernetes


def manifest(name: str) -> dict:
    return load(f"kubernetes/{name}.yaml")


def check_manifest(value: dict) -> None:
    """As the newest Kubernetes would, and with unknown fields refused."""
    kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_manifest_is_valid(path):
    check_manifest(yaml.safe_load(path.read_text()))


def test_a_manifest_with_an_unknown_field_would_be_refused():
    changed = manifest("base/deployment")
    changed["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_manifest(changed)


def test_kustomization_lists_every_manifest():
    assert sorted(manifest("base/kustomization")["resources"]) == [path.name for path in BUILT_IN]
    assert (KUBERNETES / "gpu" / manifest("gpu/kustomization")["resources"][0]).samefile(KUBERNETES / "base")


def server_container(deployment: dict) -> dict:
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return container


def test_pods_get_flags_that_exist_and_time_to_drain():
    deployment = manifest("base/deployment")
    container = server_container(deployment)
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(check_flags(container["args"])["--drain-timeout"])
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= pause + drain + 5
    probe = container["readinessProbe"]  # traffic has gone elsewhere before the server refuses it
    assert pause >= probe["periodSeconds"] * probe["failureThreshold"]


def test_probes_ask_routes_that_exist(demo_server):
    container = server_container(manifest("base/deployment"))
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert {demo_server.get(path)[0] for path in paths.values()} == {200}


def test_pods_write_to_volumes_alone_and_have_no_rights():
    pod = manifest("base/deployment")["spec"]["template"]["spec"]
    container = server_container(manifest("base/deployment"))
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    for path in ("/cache", "/tmp"):
        assert "emptyDir" in volumes[mounts[path]["name"]]
    assert all(mounts[path]["readOnly"] for path in ("/models", "/etc/rustinfer"))
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
    flags = check_flags(container["args"])
    [item] = volumes["keys"]["secret"]["items"]
    assert flags["--api-key-file"] == f"/etc/rustinfer/{item['path']}" and flags["--model"].startswith("/models/")


def test_manifests_name_each_other():
    deployment = manifest("base/deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    service, monitor = manifest("base/service"), manifest("monitoring/service-monitor")
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    for kind in ("disruption-budget", "network-policy"):
        spec = manifest(f"base/{kind}")["spec"]
        assert (spec.get("selector") or spec["podSelector"])["matchLabels"] == labels
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ports = {port["name"] for port in server_container(deployment)["ports"]}
    assert {service["spec"]["ports"][0]["targetPort"], monitor["spec"]["endpoints"][0]["port"]} == ports
    assert manifest("base/network-policy")["spec"]["ingress"][0]["ports"][0]["port"] in ports
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    claimed = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claimed == manifest("base/model-volume")["metadata"]["name"]
    target = manifest("base/autoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])


def test_autoscaler_reads_the_metric_that_the_adapter_makes_of_ours():
    [rule] = manifest("monitoring/adapter-values")["rules"]["custom"]
    [metric] = manifest("base/autoscaler")["spec"]["metrics"]
    series = rule["seriesQuery"].partition("{")[0]
    assert re.fullmatch(rule["name"]["matches"], series) and rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert series in metric_names([rule["seriesQuery"]])


def apply_patch(value: dict, operations: list[dict]) -> dict:
    """RFC 6902's add, replace, remove and test, on a copy."""
    value = copy.deepcopy(value)
    for operation in operations:
        *path, last = (part.replace("~1", "/") for part in operation["path"].split("/")[1:])
        place = value
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        last = int(last) if isinstance(place, list) else last
        if operation["op"] != "add":
            found = place[last]
        if operation["op"] == "test":
            assert found == operation["value"]
        elif operation["op"] == "remove":
            del place[last]
        else:
            assert operation["op"] in ("add", "replace") and isinstance(place, dict)
            place[last] = operation["value"]
    return value


def test_gpu_overlay_is_a_valid_deployment_with_one_card():
    overlay = manifest("gpu/kustomization")
    [patch] = overlay["patches"]
    patched = apply_patch(manifest("base/deployment"), yaml.safe_load(patch["patch"]))
    check_manifest(patched)
    container = server_container(patched)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "--kv-cache-memory" not in check_flags(container["args"])
    assert overlay["images"][0]["name"] == container["image"].split(":")[0]


# -- Prometheus


def metric_names(expressions: list[str]) -> set[str]:
    return set(re.findall(r"\b(?:rustinfer:|process_)[a-z0-9_]+", " ".join(expressions)))


def dashboard_expressions() -> list[str]:
    """With a value for each of Grafana's variables."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [text.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$instance", ".*") for text in found]


def served_metrics(server) -> str:
    status, _, body = server.get("/metrics")
    assert status == 200
    return body.decode()


def promtool(*arguments: str, **options) -> None:
    done = subprocess.run([need_tool("promtool"), *arguments], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_its_settings_and_the_alerts():
    promtool("check", "config", str(DEPLOY / "prometheus.yml"))


def test_the_readme_makes_a_rule_for_the_prometheus_operator_of_the_alerts():
    text = (DEPLOY / "README.md").read_text()
    [command] = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "PrometheusRule" in block]
    command = command.replace("| kubectl apply -f -", "")
    shown = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(shown) == {
        "apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "rustinfer"},
        "spec": load("alerts.yml")}


def test_prometheus_understands_the_dashboards_expressions(tmp_path):
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(dashboard_expressions())]
    assert len(rules) > 30
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_dashboard_and_alerts_name_metrics_that_the_server_has(demo_server):
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", served_metrics(demo_server), re.MULTILINE))
    names = {f"{name}{end}" for name, kind in kinds.items()
             for end in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))}
    used = metric_names(dashboard_expressions() + [rule["expr"] for rule in ALERTS])
    assert {name for name in used - names if not name.startswith("rustinfer:gpu_")} == set()


def steady(change: str, start: str = "0") -> str:
    """Twenty minutes of a series, in promtool's notation: a value each minute."""
    return f"{start}+{change}x20"


TROUBLE = {  # what the server shows when an alert should fire after twenty minutes
    "RustinferDown": {'up{job="rustinfer"}': steady("0")},
    "RustinferRestarts": {'process_start_time_seconds{job="rustinfer"}': "1x9 2x4 3x2 4x4"},
    "RustinferStalled": {"rustinfer:num_requests_running": steady("0", "3"), "rustinfer:steps_total": steady("0", "9")},
    "RustinferInternalErrors": {'rustinfer:errors_total{code="internal_error"}': "_x18 1 1 1"},
    "RustinferQueueFull": {'rustinfer:errors_total{code="queue_full"}': steady("2")},
    "RustinferQueueLong": {'rustinfer:request_queue_time_seconds_bucket{le="5"}': steady("1"),
                           'rustinfer:request_queue_time_seconds_bucket{le="20"}': steady("10"),
                           'rustinfer:request_queue_time_seconds_bucket{le="+Inf"}': steady("10")},
    "RustinferFirstTokenSlow": {'rustinfer:time_to_first_token_seconds_bucket{le="10"}': steady("90"),
                                'rustinfer:time_to_first_token_seconds_bucket{le="40"}': steady("100"),
                                'rustinfer:time_to_first_token_seconds_bucket{le="+Inf"}': steady("100")},
    "RustinferTokensSlow": {'rustinfer:time_per_output_token_seconds_bucket{le="0.5"}': steady("90"),
                            'rustinfer:time_per_output_token_seconds_bucket{le="1"}': steady("100"),
                            'rustinfer:time_per_output_token_seconds_bucket{le="+Inf"}': steady("100")},
    "RustinferPreempts": {"rustinfer:num_preemptions_total": steady("60")},
    "RustinferCardHot": {"rustinfer:gpu_temperature_celsius": steady("0", "90")},
}
CALM = {
    'up{job="rustinfer"}': steady("0", "1"), 'process_start_time_seconds{job="rustinfer"}': "1x9 2x9",
    "rustinfer:num_requests_running": steady("0", "3"), "rustinfer:steps_total": steady("100"),
    "rustinfer:generation_tokens_total": steady("0", "9"), "rustinfer:prompt_tokens_total": steady("0"),  # none ends
    'rustinfer:errors_total{code="internal_error"}': steady("0", "1"),
    'rustinfer:errors_total{code="queue_full"}': steady("0", "7"),
    'rustinfer:errors_total{code="invalid_value"}': steady("5"),
    'rustinfer:request_queue_time_seconds_bucket{le="5"}': steady("10"),
    'rustinfer:request_queue_time_seconds_bucket{le="+Inf"}': steady("10"),
    'rustinfer:time_to_first_token_seconds_bucket{le="10"}': steady("10"),
    'rustinfer:time_to_first_token_seconds_bucket{le="+Inf"}': steady("10"),
    'rustinfer:time_per_output_token_seconds_bucket{le="0.5"}': steady("10"),
    'rustinfer:time_per_output_token_seconds_bucket{le="+Inf"}': steady("10"),
    "rustinfer:num_preemptions_total": steady("1"), "rustinfer:gpu_temperature_celsius": steady("0", "80"),
}


def firing(series: dict[str, str], alerts: set[str], folder) -> None:
    """Ask promtool whether exactly these alerts fire at the end of the series."""
    watched = [{"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "20m", "exp_samples": [
        {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)]}]
    case = {"interval": "1m", "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": watched}
    shutil.copy(DEPLOY / "alerts.yml", folder)
    (folder / "test.yml").write_text(yaml.safe_dump({
        "rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [case]}))
    promtool("test", "rules", str(folder / "test.yml"), cwd=folder)


def test_no_alert_fires_while_all_is_well(tmp_path):
    firing(CALM, set(), tmp_path)


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_alert_fires_in_its_trouble_and_no_other_does(alert, tmp_path):
    firing({**CALM, **TROUBLE[alert]}, {alert}, tmp_path)


@contextlib.contextmanager
def prometheus(target: str, folder):
    """A Prometheus with deploy/prometheus.yml, which asks this server often; a function that evaluates expressions."""
    text, port = (DEPLOY / "prometheus.yml").read_text(), free_port()
    assert text.count("15s") == 2 and text.count("rustinfer:8000") == 1
    (folder / "prometheus.yml").write_text(text.replace("15s", "1s").replace("rustinfer:8000", target))
    shutil.copy(DEPLOY / "alerts.yml", folder)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([
            need_tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def query(expression: str) -> list:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.request("GET", f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
            response = connection.getresponse()
            assert response.status in (200, 503), response.read()  # 503 while it starts
            return json.loads(response.read())["data"]["result"] if response.status == 200 else []
        return []

    try:
        yield query
    finally:
        process.terminate()
        process.wait(20)


def test_every_panel_shows_something_once_prometheus_has_asked_a_server(demo_server, tmp_path):
    served_metrics(demo_server)
    assert demo_server.chat(max_tokens=4)[0] == 200 and demo_server.chat(n=1000)[0] == 400
    with prometheus(f"127.0.0.1:{demo_server.port}", tmp_path) as query:
        wait_for(lambda: query('up{job="rustinfer"} == 1'), 30)
        for expression in dashboard_expressions():
            if "rustinfer:gpu_" not in expression:  # there may be no card
                wait_for(lambda: query(expression), 30)
