"""The trainer: a run file in, a committed artifact out.

It runs as the driver of a Ray job and knows nothing of Kubernetes.
"""
