"""A small blocking client of the API server, for starting the cluster: quick to import, dicts in and out."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
from pathlib import Path
from typing import Any

from finetune_local import certificates

FIELD_MANAGER = "finetune-local"
Object = dict[str, Any]


class ApiError(Exception):
    """The API server refused; `status` is the HTTP status, 0 when it did not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status


def client_context(pki: Path, user: str) -> ssl.SSLContext:
    """TLS with our authority only, as one of certificates.USERS."""
    files = certificates.pair(pki, user)
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(files.certificate, files.key)
    return context


class ApiClient:
    """Calls to one server; a connection per call, so it may be used from several threads."""

    def __init__(self, server: str, *, pki: Path, user: str = "admin") -> None:
        self._address = urllib.parse.urlparse(server).netloc
        self._context = client_context(pki, user)

    def call(
        self,
        method: str,
        path: str,
        body: Object | bytes | None = None,
        *,
        content_type: str = "application/json",
        timeout: float = 10.0,
    ) -> Any:
        """Parsed JSON, or text where the server sends none. Raises ApiError."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPSConnection(self._address, timeout=timeout, context=self._context)
        try:
            headers = {"Content-Type": content_type, "Accept": "application/json"}
            connection.request(method, path, body=data, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"the API server does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise ApiError(answer.status, error_message(text))
        return json.loads(text) if "json" in (answer.headers.get("Content-Type") or "") else text

    def get(self, path: str, *, timeout: float = 10.0) -> Any | None:
        """The object, or None when there is none."""
        try:
            return self.call("GET", path, timeout=timeout)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def apply(self, path: str, manifest: Object | bytes, *, timeout: float = 30.0) -> Any:
        """Server-side apply; a manifest as bytes is sent as it is (YAML)."""
        return self.call(
            "PATCH",
            f"{path}?fieldManager={FIELD_MANAGER}&force=true",
            manifest,
            content_type="application/apply-patch+yaml",
            timeout=timeout,
        )


def path_of(manifest: Object) -> str:
    """The object's path; for the kinds that this package applies."""
    group_version = manifest["apiVersion"]
    prefix = f"/api/{group_version}" if "/" not in group_version else f"/apis/{group_version}"
    kind = manifest["kind"].lower()
    namespace = manifest["metadata"].get("namespace")
    middle = f"/namespaces/{namespace}" if namespace else ""
    return f"{prefix}{middle}/{kind}s/{manifest['metadata']['name']}"


def error_message(text: str) -> str:
    """What a Status object of the API server says; other text as it is."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:500]
