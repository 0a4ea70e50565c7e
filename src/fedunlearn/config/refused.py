"""The names of transformers' TrainingArguments that no run honours, each with the reason and the way out."""

from collections.abc import Mapping
from types import MappingProxyType

_ADAPTERS_ONLY = "a client keeps one frozen base and trains LoRA tensors in a loop of its own: leave it out"
_ROUND_IS_THE_EPOCH = "rows come in a seeded order that the round plan fixes, from memory: leave it out"
_OWN_EVALUATION = "the result is evaluated once, at the end of the run: see eval.* (eval.at_end, eval.max_rows)"
_OWN_CHECKPOINTS = "the server saves every round: see trainer.federated.keep_rounds"
_OWN_HISTORY = "every round is a line of history.jsonl: see trainer.args.logging_steps and trainer.args.report_to"
_ONE_DEVICE = (
    "a client trains on one device and the federation is the parallelism: see launcher.* and model.model_args.device"
)
_PARALLEL = "a model too large for one device is a client's own affair, and it composes this by itself: set trainer.parallel=fsdp or trainer.parallel=deepspeed"
_NO_HUB = "nothing is uploaded: publish the run's adapter folder yourself"
_NOT_A_FLAG = "the door says what runs: fed_train.py, train.py or eval.py"

_BY_REASON: Mapping[str, str] = {
    _ADAPTERS_ONLY: (
        "average_tokens_across_devices neftune_noise_alpha use_liger_kernel liger_kernel_config use_cache torch_empty_cache_steps optim_args optim_target_modules lr_scheduler_kwargs jit_mode_eval"
    ),
    _ROUND_IS_THE_EPOCH: (
        "dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy group_by_length length_column_name "
        "label_names ignore_data_skip auto_find_batch_size"
    ),
    _OWN_EVALUATION: (
        "eval_strategy evaluation_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps prediction_loss_only include_for_metrics batch_eval_metrics load_best_model_at_end "
        "metric_for_best_model greater_is_better"
    ),
    _OWN_CHECKPOINTS: (
        "save_strategy save_steps save_total_limit save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint"
    ),
    _OWN_HISTORY: (
        "logging_strategy logging_first_step logging_nan_inf_filter logging_dir log_on_each_node include_num_input_tokens_seen "
        "log_level log_level_replica disable_tqdm project trackio_space_id trackio_bucket_id trackio_static_space_id "
        "skip_memory_metrics debug"
    ),
    _ONE_DEVICE: (
        "accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank"
    ),
    _PARALLEL: "parallelism_config deepspeed fsdp fsdp_config",
    _NO_HUB: "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    _NOT_A_FLAG: "do_train do_eval do_predict",
}

_BY_NAME: Mapping[str, str] = {
    "output_dir": "a run writes to paths.saves_dir/<finetune|unlearn|eval>/task_name: set those",
    "overwrite_output_dir": "set overwrite=true beside task_name",
    "resume_from_checkpoint": "set resume=true: the run goes on at the next round",
    "run_name": "set task_name",
    "fp16": "adapters train in float32 and float16 needs loss scaling: set trainer.args.bf16=true",
    "fp16_full_eval": "an evaluation computes in the base's dtype: set model.model_args.torch_dtype",
    "bf16_full_eval": "an evaluation computes in the base's dtype: set model.model_args.torch_dtype",
    "tf32": "it would make results differ between GPUs: set trainer.args.bf16=true for speed",
    "activation_checkpointing": "set trainer.args.gradient_checkpointing=true",
    "activation_checkpointing_kwargs": "set trainer.args.gradient_checkpointing=true: it is the non-reentrant one, which alone reaches adapters over a frozen base",
    "gradient_checkpointing_kwargs": "set trainer.args.gradient_checkpointing=true: it is the non-reentrant one, which alone reaches adapters over a frozen base",
    "torch_compile_backend": "set trainer.args.torch_compile=true: blocks are compiled by inductor",
    "torch_compile_mode": "set trainer.args.torch_compile=true: blocks are compiled in the default mode, for rows of any length",
    "per_device_eval_batch_size": "set eval.batch_tokens and eval.generation_batch_size",
    "warmup_ratio": "set trainer.args.warmup_steps to a number below 1: it is a fraction of the steps",
    "label_smoothing_factor": "losses are plain negative log-likelihoods, as the methods and TOFU define them: leave it out",
    "data_seed": "order and pairing of rows follow trainer.args.seed, client and round: set that one",
    "full_determinism": "runs are deterministic on CPU as they are, by trainer.args.seed: leave it out",
    "use_cpu": "set model.model_args.device=cpu",
    "no_cuda": "set model.model_args.device=cpu",
}


def _refusals() -> dict[str, str]:
    grouped = {name: reason for reason, names in _BY_REASON.items() for name in names.split()}
    return {**grouped, **_BY_NAME}


REFUSED: Mapping[str, str] = MappingProxyType(_refusals())
