"""lora-plan: what to run, whether it fits, what it costs, and how sure each number is."""

__version__ = "0.1.0"
