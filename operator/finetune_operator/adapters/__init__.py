"""All input and output: the Kubernetes API and the metrics."""
