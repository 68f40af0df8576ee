"""The private methods of `transformers.Trainer` that are overridden: what to look at when a new version comes out.

Tried with transformers 5.0.0 and 5.24.0. A test compares the list with the classes and the Trainer that is installed.
"""

OVERRIDDEN = {
    "CheckpointingTrainer": [
        "_get_output_dir",  # `_incomplete/` while a checkpoint is written
        "_maybe_log_save_evaluate",  # called at the end of each step: signals
        "_push_from_checkpoint",  # called while a checkpoint is written, before it has its name
        "_save_checkpoint",
        "_save_rng_state",  # called by every rank while a checkpoint is written
    ],
    "SavingTrainer": ["_load_best_model", "_load_from_checkpoint", "_save"],
    "FeedingTrainer": ["_get_train_sampler", "_set_signature_columns_if_needed"],
    "DistillationTrainer": ["_maybe_log_save_evaluate", "_save_checkpoint"],  # NaN and infinity
}
