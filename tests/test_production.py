"""Containers cannot be run by a test; what their settings promise can be read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_queue_and_retries_are_those_of_the_project() -> None:
    ours = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    theirs = yaml.safe_load((DOCKER / "dagster.yaml").read_text())
    assert {k: v for k, v in theirs.items() if k != "storage"} == {k: v for k, v in ours.items() if k != "storage"}


def test_instance_takes_its_database_from_the_environment_that_compose_sets() -> None:
    database = yaml.safe_load((DOCKER / "dagster.yaml").read_text())["storage"]["postgres"]["postgres_db"]
    assert database.pop("scheme") == "postgresql+psycopg2"
    location = yaml.safe_load((DOCKER / "workspace.yaml").read_text())["load_from"][0]["grpc_server"]
    named = {value["env"] for value in (*database.values(), location["host"], location["port"])}
    for service in ("code", "daemon", "webserver"):
        assert named <= SERVICES[service]["environment"].keys()


def test_only_this_machine_can_reach_the_ports() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"bucket"}))
def test_services_that_stay_are_watched_and_started_again(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_what_compose_reads_is_explained_and_secrets_are_blank() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    lines = (DOCKER / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]", line))
    read = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", text)) - {"OBJECT_STORE_IMAGE"}  # which has a default
    assert read == example.keys()
    assert [example[name] for name in example if re.search(r"PASSWORD|SECRET|API_KEY", name)] == [""] * 7


def test_secrets_go_only_where_they_are_needed() -> None:
    for name in ("daemon", "webserver", "mlflow"):
        given = SERVICES[name]["environment"].keys()
        assert not [key for key in given if re.search(r"AWS|API_KEY|MIRROR", key)]


def test_volumes_and_what_waits_for_what_exist() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= SERVICES.keys()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_image_runs_as_a_user_and_copies_only_what_is_let_in() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert lines[[line.startswith("USER") for line in lines].index(True) :][0] == "USER evolve"
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_image_asks_for_extras_that_exist() -> None:
    [asked] = re.findall(r"'\.\[(.+?)\]'", (DOCKER / "Dockerfile").read_text())
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(asked.split(",")) <= known.keys()


def test_links_of_the_page_lead_somewhere() -> None:
    page = (ROOT / "docs/production.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
    for command in re.findall(r"evolve (mirror \w+)", page):
        assert command in {"mirror status", "mirror push", "mirror pull"}
