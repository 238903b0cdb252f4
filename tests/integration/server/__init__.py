"""Tests of the engine and the agent as processes, and of the API that ours shares with vLLM."""
