"""What makes a run the run that it is: every argument but those that may change when it is continued."""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from minilm.cli.arguments import Arguments, own_arguments
from minilm.cli.inputs import Inputs
from minilm.models.layers import num_layers, resolve_layer
from minilm.objectives.embedding import embedding_of
from minilm.objectives.term import Objective

SAMPLES = 1 << 16  # numbers of a tensor

# Where it runs and how fast, how long it goes on, what is evaluated, logged and saved when, and where that goes.
_MAY_CHANGE = """
    output_dir do_train do_eval do_predict resume_from_checkpoint ignore_data_skip num_train_epochs max_steps
    restore_callback_states_from_checkpoint use_cpu local_rank full_determinism bf16_full_eval fp16_full_eval
    use_cache torch_empty_cache_steps activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config auto_find_batch_size accelerator_config parallelism_config fsdp fsdp_config
    deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout average_tokens_across_devices dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names per_device_train_batch_size gradient_accumulation_steps eval_strategy
    eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics load_best_model_at_end
    metric_for_best_model greater_is_better logging_strategy logging_steps logging_first_step logging_nan_inf_filter
    log_level log_level_replica log_on_each_node include_num_input_tokens_seen disable_tqdm report_to run_name
    project skip_memory_metrics debug trackio_space_id trackio_bucket_id trackio_static_space_id save_strategy
    save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision on_bad_record
"""
# Told by what they come to: weights, sizes, the numbers of layers, the loss, the content of the data.
_TOLD_OTHERWISE = """
    teacher teacher_layer data student student_num_layers student_hidden_size student_num_heads
    assistant_num_layers assistant_hidden_size relations relation_heads implementation
"""

MAY_CHANGE, TOLD_OTHERWISE = frozenset(_MAY_CHANGE.split()), frozenset(_TOLD_OTHERWISE.split())


def run_identity(
    arguments: Arguments, objective: Objective, teacher: PreTrainedModel, student: PreTrainedModel, inputs: Inputs
) -> dict[str, Any]:
    """JSON-able; in the order in which `minilm.training.runs.check_same_run` compares."""
    training = arguments.training
    own = own_arguments(arguments)
    theirs: dict[str, Any] = training.to_dict()  # type: ignore[no-untyped-call]
    embedding = embedding_of(objective)
    at_once = training.train_batch_size * training.world_size
    return {
        "student": sizes(student),
        "teacher_sizes": sizes(teacher),
        "teacher_layer": resolve_layer(teacher, arguments.model.teacher_layer),
        **objective.identity,
        **{name: value for name, value in own.items() if name not in TOLD_OTHERWISE | MAY_CHANGE},
        **{name: value for name, value in theirs.items() if name not in MAY_CHANGE},
        "sequences_per_step": at_once * training.gradient_accumulation_steps,
        **({"sequences_at_once": at_once} if _order_depends_on_batch(training, arguments.data.streaming) else {}),
        "fingerprint of the data": inputs.fingerprint,
        **({"hash of the student's tokens": inputs.vocabulary.fingerprint} if inputs.vocabulary else {}),
        "hash of the teacher's weights": hash_weights(teacher),
        **({"hash of the teacher's sentence modules": hash_weights(embedding.teacher_head)} if embedding else {}),
        **({"hash of the student's first weights": hash_weights(student)} if arguments.model.student else {}),
    }


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of names, shapes and numbers: of a tensor all up to 65,536, of a larger one so many, evenly spread.

    Training changes each of them; a single row of a large matrix that was set by hand may pass unnoticed.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)].to("cpu", copy=True).contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Layers, hidden size and heads."""
    config = model.config
    return {"layers": num_layers(model), "hidden_size": config.hidden_size, "heads": config.num_attention_heads}


def _order_depends_on_batch(training: TrainingArguments, streaming: bool) -> bool:
    """Whether the number of sequences that all processes take at once decides which come when."""
    return streaming or training.train_sampling_strategy == "group_by_length"
