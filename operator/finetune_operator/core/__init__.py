"""Pure decisions: facts and a time in, a plan out. No clock, no network, no asyncio."""
