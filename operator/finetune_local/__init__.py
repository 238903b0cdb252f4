"""The laptop cluster: a real Kubernetes control plane, KubeRay and Ray as plain processes, without containers."""
