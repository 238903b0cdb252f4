"""The certificates of the laptop cluster on a machine whose clock is not right."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from finetune_local import certificates


def test_certificates_hold_when_a_clock_that_was_hours_ahead_is_set(tmp_path: Path) -> None:
    """Such as that of a machine whose hardware clock keeps local time, before it has asked a server."""
    certificates.ensure(tmp_path)
    files = [*tmp_path.glob("*.crt")]
    assert files
    for file in files:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        assert certificate.not_valid_before_utc <= datetime.now(UTC) - timedelta(hours=14), file.name
