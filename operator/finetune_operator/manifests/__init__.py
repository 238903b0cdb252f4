"""Pure builders: a model in, the dict of a Kubernetes object or a run file out."""
