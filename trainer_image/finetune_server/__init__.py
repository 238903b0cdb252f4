"""An inference engine for laptops and CPUs that speaks vLLM's API, and the agent that brings adapters to an engine.

vLLM is the engine in clusters; whoever talks to one can talk to the other.
"""
