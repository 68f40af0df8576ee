"""The Trainer, its checkpoints, and what a run may touch."""
