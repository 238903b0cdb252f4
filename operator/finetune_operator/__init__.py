"""The operator: FineTuneJob objects become Ray jobs, and what happens to them is told in their status."""
