"""The programs of the laptop cluster: their versions, Go modules and official downloads."""

from __future__ import annotations

import dataclasses
import platform

KUBERNETES_VERSION = "v1.36.3"
ETCD_VERSION = "v3.6.7"
KWOK_VERSION = "v0.8.0"
KUBERAY_VERSION = "v1.6.2"
HELM_VERSION = "v3.22.0"
KUEUE_VERSION = "v0.15.2"
_MINOR = KUBERNETES_VERSION.split(".")[1]
# Without these the API server calls itself v0.0.0-master and clients misjudge what it can do.
_KUBERNETES_FLAGS = " ".join(
    f"-X k8s.io/component-base/version.{name}={value}"
    for name, value in (("gitVersion", KUBERNETES_VERSION), ("gitMajor", "1"), ("gitMinor", _MINOR))
)
_HELM = "helm.sh/helm/v3"
# The second and third: the Kubernetes version that `helm template` and `helm lint` assume, 1.20 otherwise.
_HELM_FLAGS = " ".join(
    [f"-X {_HELM}/internal/version.version={HELM_VERSION}"]
    + [
        f"-X {_HELM}/{package}.k8sVersionMajor=1 -X {_HELM}/{package}.k8sVersionMinor={_MINOR}"
        for package in ("pkg/chartutil", "pkg/lint/rules")
    ]
)


@dataclasses.dataclass(frozen=True)
class Download:
    """An official release file. `checksum` is the address of the checksum that its project publishes."""

    url: str
    checksum: str
    member: str | None = None  # path inside a .tar.gz; None: the file itself is the program


@dataclasses.dataclass(frozen=True)
class Tool:
    """One Go module in the folder `tools` beside this file. `packages` maps a program's name to its Go package."""

    name: str
    version: str
    module: str
    packages: dict[str, str]
    ldflags: str = ""
    crds: str | None = None  # folder inside the module, copied beside the programs


KUBERNETES = Tool(
    name="kubernetes",
    version=KUBERNETES_VERSION,
    module="k8s.io/kubernetes",
    packages={
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
    },
    ldflags=_KUBERNETES_FLAGS,
)
ETCD = Tool(
    name="etcd",
    version=ETCD_VERSION,
    module="go.etcd.io/etcd/server/v3",
    packages={"etcd": "go.etcd.io/etcd/server/v3"},
)
KWOK = Tool(
    name="kwok",
    version=KWOK_VERSION,
    module="sigs.k8s.io/kwok",
    packages={"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
)
KUBERAY = Tool(
    name="kuberay",
    version=KUBERAY_VERSION,
    module="github.com/ray-project/kuberay/ray-operator",
    packages={"kuberay-operator": "github.com/ray-project/kuberay/ray-operator"},
    crds="config/crd/bases",
)
HELM = Tool(  # no part of the laptop cluster: the tests of the chart need it
    name="helm",
    version=HELM_VERSION,
    module="helm.sh/helm/v3",
    packages={"helm": "helm.sh/helm/v3/cmd/helm"},
    ldflags=_HELM_FLAGS,
)
KUEUE = Tool(  # neither: the tests of queues need it
    name="kueue",
    version=KUEUE_VERSION,
    module="sigs.k8s.io/kueue",
    packages={"kueue": "sigs.k8s.io/kueue/cmd/kueue"},
    crds="config/components/crd/bases",
)
TOOLS = (ETCD, KUBERNETES, KWOK, KUBERAY, HELM, KUEUE)


def tool_of(program: str) -> Tool:
    return next(tool for tool in TOOLS if program in tool.packages)


def architecture() -> str:
    """This machine in Go's words, for example amd64."""
    machine = platform.machine().lower()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def download_of(program: str) -> Download | None:
    """The official release of a program for this machine; None where its project publishes none."""
    system, machine = platform.system().lower(), architecture()
    if system != "linux" or machine not in ("amd64", "arm64"):
        return None
    match tool_of(program).name:
        case "kubernetes":
            url = f"https://dl.k8s.io/release/{KUBERNETES_VERSION}/bin/{system}/{machine}/{program}"
            return Download(url=url, checksum=f"{url}.sha256")
        case "etcd":
            base = f"https://github.com/etcd-io/etcd/releases/download/{ETCD_VERSION}"
            folder = f"etcd-{ETCD_VERSION}-{system}-{machine}"
            return Download(
                url=f"{base}/{folder}.tar.gz", checksum=f"{base}/SHA256SUMS", member=f"{folder}/{program}"
            )
        case "kwok":
            url = f"https://github.com/kubernetes-sigs/kwok/releases/download/{KWOK_VERSION}/{program}-{system}-{machine}"
            return Download(url=url, checksum=f"{url}.sha256")
        case "helm":
            url = f"https://get.helm.sh/helm-{HELM_VERSION}-{system}-{machine}.tar.gz"
            return Download(url=url, checksum=f"{url}.sha256sum", member=f"{system}-{machine}/{program}")
        case _:
            return None
