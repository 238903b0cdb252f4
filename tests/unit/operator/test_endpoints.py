"""Who gets the operator's token, and who does not."""

from __future__ import annotations

import pytest

from finetune_operator import config
from finetune_operator.adapters.environment import ConfigurationError
from finetune_operator.core import endpoints


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://engine.team.svc:8000", True),
        ("http://ENGINE.team.svc.cluster.local.:8000", True),
        ("https://engine.team.svc", True),
        ("http://engine:8000", False),
        ("http://engine.team:8000", False),
        ("http://10.0.0.7:8000", False),
        ("http://169.254.169.254", False),
        ("http://svc.evil.example", False),
        ("http://engine.svc.evil.example", False),
        ("http://127.0.0.1:8000", False),
        ("http://[::1]:8000", False),
    ],
)
def test_by_default_services_of_the_cluster_are_engines(url: str, allowed: bool) -> None:
    assert endpoints.parse("").allows(url) is allowed


@pytest.mark.parametrize(
    "url", ["http://evil.example\\.svc:1", "http://evil.example%2f.svc", "http://a b.svc", "http:///x", "x"]
)
def test_hosts_that_libraries_read_differently_are_no_hosts(url: str) -> None:
    with pytest.raises(ValueError, match="has no host, or one with impossible characters"):
        endpoints.parse("*").allows(url)


def test_a_list_names_hosts_ports_and_namespaces() -> None:
    allowed = endpoints.parse("gpu-?.lab.example:8000, gpu-?.lab.example:8001,[fd00:*]:8000, pods/team-*")
    assert allowed.allows("http://gpu-1.lab.example:8000")
    assert allowed.allows("http://gpu-1.lab.example:8001")
    assert not allowed.allows("http://gpu-1.lab.example:9000")
    assert not allowed.allows("http://gpu-11.lab.example:8000")
    assert allowed.allows("http://[fd00::7]:8000")
    assert not allowed.allows("http://engine.team.svc:8000"), "a list of one's own replaces the default"
    assert allowed.allows_pods_of("team-a")
    assert not allowed.allows_pods_of("other")


def test_what_the_operator_itself_is_configured_with_is_allowed() -> None:
    settings = config.load(
        {"FINETUNE_ENGINE_URL": "http://127.0.0.1:8000", "FINETUNE_AGENT_URL": "http://127.0.0.1:8001/"}
    )
    assert settings.engine_endpoints.allows("http://127.0.0.1:8000")
    assert settings.engine_endpoints.allows("http://127.0.0.1:8001")
    assert not settings.engine_endpoints.allows("http://127.0.0.1:8002")
    assert settings.engine_endpoints.allows("http://engine.team.svc:8000")


@pytest.mark.parametrize("text", ["http://engine", "engine:port", "pods/", "10.0.0.0/8", "a b"])
def test_an_entry_that_means_nothing_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"FINETUNE_ENGINE_ENDPOINTS=.*is neither host"):
        config.load({"FINETUNE_ENGINE_ENDPOINTS": text})


@pytest.mark.parametrize("text", ["engine:0", "engine:99999", "engine:8000,[::1]:65536"])
def test_a_port_that_cannot_be_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"FINETUNE_ENGINE_ENDPOINTS=.*from 1 to 65535"):
        config.load({"FINETUNE_ENGINE_ENDPOINTS": text})


def test_a_refusal_names_field_value_and_remedy() -> None:
    text = endpoints.parse("*.svc").refuse("spec.serving.endpoint", "http://evil:1")
    for part in ("spec.serving.endpoint", "http://evil:1", "*.svc", "FINETUNE_ENGINE_ENDPOINTS"):
        assert part in text
