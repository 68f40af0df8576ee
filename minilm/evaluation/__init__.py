"""Judging models downstream: tasks, frozen probes, fine-tuning."""
