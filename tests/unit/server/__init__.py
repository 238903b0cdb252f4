"""Tests of the engine's and the agent's parts; tests of whole processes are in tests/integration/server."""
