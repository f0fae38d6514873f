"""Learning: pure losses and schedules, a thin Lightning module, and what runs it."""
