"""The operator's environment variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_operator import config
from finetune_operator.adapters.environment import ConfigurationError


def test_the_defaults_are_those_of_a_cluster() -> None:
    settings = config.load({})
    assert (settings.submission_mode, settings.status_url) == ("K8sJobMode", "http://finetune-operator:8090")
    assert (settings.namespaces, settings.output_uri, settings.leader_election) == ((), None, False)


def test_lists_and_folders_are_tidied() -> None:
    settings = config.load({"FINETUNE_NAMESPACES": "a, b,,a", "FINETUNE_OUTPUT_URI": "s3://bucket/x/"})
    assert (settings.namespaces, settings.output_uri) == (("a", "b"), "s3://bucket/x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FINETUNE_STATUS_PORT", "http"),
        ("FINETUNE_METRICS_PORT", "0"),
        ("FINETUNE_METRICS_PORT", "8080.5"),
        ("FINETUNE_PROGRESS_SECONDS", "nan"),
        ("FINETUNE_TERMINATION_GRACE_SECONDS", "-1"),
        ("FINETUNE_TERMINATION_GRACE_SECONDS", "0.9"),
        ("FINETUNE_SUBMISSION_MODE", "InteractiveMode"),
        ("FINETUNE_LOG_FORMAT", "xml"),
        ("FINETUNE_LEADER_ELECTION", "yes"),
        ("FINETUNE_LEASE_SECONDS", "0"),
        ("FINETUNE_TLS_CA_FILE", "/nowhere/ca.crt"),
        ("FINETUNE_STATUS_URL", "finetune-operator:8090"),
        ("FINETUNE_STATUS_URL", "http://finetune operator:8090"),
        ("FINETUNE_STATUS_URL", "http://finetune-operator:8090/?a=b"),
        ("FINETUNE_TRAINER_IMAGE", "my trainer:1.0"),
        ("FINETUNE_ACCELERATOR_LABEL", "nvidia.com/gpu product"),
        ("FINETUNE_POD_IP", "operator-0"),
        ("FINETUNE_OUTPUT_URI", "/artifacts"),
        ("FINETUNE_OUTPUT_URI", "s3://"),
        ("FINETUNE_NAMESPACES", "team-a,Team_B"),
        ("FINETUNE_NAMESPACE", "team a"),
    ],
)
def test_a_bad_value_is_named_with_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}='{re.escape(value)}': "):
        config.load({name: value})


def test_an_authority_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ca.crt"
    file.write_text("-----BEGIN CERTIFICATE-----")
    with pytest.raises(ConfigurationError, match=r"FINETUNE_TLS_CA_FILE='.*': must hold"):
        config.load({"FINETUNE_TLS_CA_FILE": str(file)})


def test_two_servers_need_two_ports() -> None:
    with pytest.raises(ConfigurationError, match="both are 8080"):
        config.load({"FINETUNE_STATUS_PORT": "8080"})


def test_pod_defaults_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "defaults").write_bytes(b"\xd0\x00")
    with pytest.raises(ConfigurationError, match="codec can't decode"):
        config.load({"FINETUNE_POD_DEFAULTS_FILE": str(tmp_path / "defaults")})


def test_a_leader_must_give_up_before_another_may_begin() -> None:
    with pytest.raises(ConfigurationError, match="less than the one before"):
        config.load({"FINETUNE_LEASE_SECONDS": "10"})
    assert config.load({"FINETUNE_LEASE_SECONDS": "11"}).terms.lease_seconds == 11


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    certificate = tmp_path / "tls.crt"
    certificate.touch()
    with pytest.raises(ConfigurationError, match="set both or none"):
        config.load({"FINETUNE_TLS_CERT_FILE": str(certificate)})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"hostNetwork": true}', "hostNetwork: Extra inputs are not permitted"),
        ('{"env": [{"name": "FINETUNE_RUN_FILE"}]}', "remove it"),
        ("nodeSelector: {}", "the file: Invalid JSON"),
        ('{"labels": {"team": "a b"}}', r"labels\.team: String should match"),
        ('{"annotations": {"our team": "a b"}}', r"annotations\.our team\..*: String should match"),
    ],
)
def test_bad_pod_defaults_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "defaults.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=f"FINETUNE_POD_DEFAULTS_FILE=.*{complaint}"):
        config.load({"FINETUNE_POD_DEFAULTS_FILE": str(file)})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("room: https://chat/secret", "Expecting value"),
        ('["https://chat/secret"]', "must be a JSON object"),
        ('{"room": "chat/secret"}', "room: must be a URL"),
        ('{"room": {"url": "https://chat/secret"}}', "room: must be a URL"),
    ],
)
def test_bad_alert_providers_are_named_before_the_first_alert(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = tmp_path / "providers.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=complaint) as told:
        config.load({"FINETUNE_ALERT_PROVIDERS_FILE": str(file)})
    assert "secret" not in str(told.value)
