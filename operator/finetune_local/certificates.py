"""The cluster's certificate authority, its server and client certificates, and the keys of service-account tokens."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import ipaddress
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_local import layouts

VALIDITY = datetime.timedelta(days=3650)
# Users of the API server: name -> (common name, groups). Only `admin` may do everything.
USERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "admin": ("admin", ("system:masters",)),
    "kube-controller-manager": ("system:kube-controller-manager", ()),
    "kube-scheduler": ("system:kube-scheduler", ()),
    "kwok": ("finetune-local:kwok", ()),
    "kuberay": ("finetune-local:kuberay", ()),
    "ray-gateway": ("finetune-local:ray-gateway", ()),
    # The identity of the chart's ServiceAccount, so that what works here works with the chart's rights.
    "operator": (
        "system:serviceaccount:finetune-system:finetune-operator",
        ("system:serviceaccounts", "system:serviceaccounts:finetune-system"),
    ),
}
SERVERS = ("kube-apiserver", "etcd")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key."""

    certificate: Path
    key: Path


def pair(folder: Path, name: str) -> Pair:
    return Pair(certificate=folder / f"{name}.crt", key=folder / f"{name}.key")


def ensure(folder: Path) -> None:
    """Create what is missing in the folder. Keys are replaced only where a client has another name by now."""
    authority = pair(folder, "ca")
    if not authority.certificate.exists():
        _write_authority(authority)
    ca_certificate = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    ca_key = serialization.load_pem_private_key(authority.key.read_bytes(), password=None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{authority.key} is not an elliptic-curve key")
    for name in SERVERS:
        if not pair(folder, name).certificate.exists():
            _write_leaf(pair(folder, name), name, (), ca_certificate, ca_key, server=True)
    # The API server is a client of etcd; etcd accepts nobody else's certificates but this authority's.
    for name, (common_name, groups) in {**USERS, "etcd-client": ("etcd-client", ())}.items():
        if _common_name(pair(folder, name).certificate) != common_name:
            _write_leaf(pair(folder, name), common_name, groups, ca_certificate, ca_key, server=False)
    if not (folder / "service-accounts.pub").exists():
        _write_service_account_keys(folder)


def _common_name(certificate: Path) -> str | None:
    """Whose certificate it is; None where there is none."""
    if not certificate.exists():
        return None
    subject = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def write_kubeconfig(path: Path, *, pki: Path, user: str, server: str) -> None:
    """A self-contained kubeconfig (mode 0600) for one of USERS."""
    files = pair(pki, user)
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "finetune-local",
        "clusters": [
            {
                "name": "finetune-local",
                "cluster": {"server": server, "certificate-authority-data": _encoded(pki / "ca.crt")},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate-data": _encoded(files.certificate),
                    "client-key-data": _encoded(files.key),
                },
            }
        ],
        "contexts": [
            {
                "name": "finetune-local",
                "context": {"cluster": "finetune-local", "user": user, "namespace": "default"},
            }
        ],
    }
    content = yaml.safe_dump(document, sort_keys=False)
    if not path.exists() or path.read_text() != content:
        layouts.write_private(path, content)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _name(common_name: str, groups: tuple[str, ...]) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a clock may have been set back by hours since
        .not_valid_after(now + VALIDITY)
    )


def _write_authority(files: Pair) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("finetune-local", ())
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(files, certificate, key)


def _write_leaf(
    files: Pair,
    common_name: str,
    groups: tuple[str, ...],
    ca_certificate: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    *,
    server: bool,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(_name(common_name, groups), ca_certificate.subject, key)
    if server:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
        builder = builder.add_extension(
            x509.SubjectAlternativeName(
                [
                    *(x509.DNSName(name) for name in names),
                    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    x509.IPAddress(ipaddress.ip_address("10.0.0.1")),
                ]
            ),
            critical=False,
        )
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(authority_key, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(files, certificate, key)


def _write(files: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    # The certificate goes last: its presence says that the pair is whole.
    layouts.write_private(files.key, _pem(key))
    layouts.write_private(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _write_service_account_keys(folder: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    layouts.write_private(folder / "service-accounts.key", _pem(key))
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    layouts.write_private(folder / "service-accounts.pub", public)


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
