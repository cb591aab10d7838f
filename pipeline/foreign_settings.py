"""What other tools call a setting, and what it is here: the table behind the hints for unknown keys.

    settings here | what is different, or what to do
        words of TRL, transformers' TrainingArguments, axolotl, LLaMA-Factory, OpenRLHF, verl and vLLM

Owns: the words. Does not own: where a hint is looked up and how it is worded (suggestions). Settings are
named from the root, `<stage>` is every section that has one; where there is none, the note says what to do.
Words are lower case with underscores. One with dots holds only at the end of such a path (`critic.optim.lr`),
and the longest match wins. A test resolves every setting that is named, in notes too (between backticks).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NAMES_A_MODEL = ("model", "pretrain")
"""Sections here that other tools write a model's name after."""

TABLE = """
# optimiser
<stage>.lr
    learning_rate base_learning_rate base_lr init_lr lr_rate max_lr peak_learning_rate peak_lr learningrate
    optimizer.lr optim.lr
ppo.lr
    actor_learning_rate actor_lr policy_learning_rate policy_lr actor.lr actor.optim.lr
ppo.value_lr
    critic_learning_rate critic_lr value_learning_rate value_model_lr vf_lr critic.lr critic.optim.lr
<stage>.lr_schedule
    lr_scheduler lr_scheduler_type lr_decay_style scheduler scheduler_type warmup_style
<stage>.warmup_frac
    warmup_ratio warmup_fraction warmup_proportion lr_warmup_fraction lr_warmup_ratio lr_warmup_steps_ratio
    warmup_steps_proportion
<stage>.warmup_frac | a share of the steps, not their number
    warmup_steps warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps warmup
<stage>.min_lr_frac | where the decay ends, as a share of lr
    min_lr min_learning_rate min_lr_rate min_lr_ratio cosine_min_lr_ratio eta_min lr_min lr_scheduler_kwargs
    lr_scheduler_args scheduler_kwargs
<stage>.adam_beta1 <stage>.adam_beta2
    adam_betas betas optim_betas
<stage>.adam_beta1
    beta1 beta_1 adam_b1
<stage>.adam_beta2
    beta2 beta_2 adam_b2
<stage>.adam_eps
    adam_epsilon optimizer_eps optim_eps optim.eps
<stage>.weight_decay
    l2 wd weight_decay_rate
<stage>.max_grad_norm
    clip_grad clip_grad_norm grad_clip grad_norm_clip gradient_clip_val gradient_clipping max_gradient_norm
    max_norm
| AdamW is the only optimizer; its settings are `adam_beta1`, `adam_beta2`, `adam_eps` and `weight_decay`
    optim optimizer optimizer_name optimizer_type optim_args optim_target_modules adafactor
| the loss has no such regularisation; remove it
    attention_dropout dropout hidden_dropout label_smoothing label_smoothing_factor neftune_noise_alpha
# amounts
<stage>.micro_batch_size | `batch_size` counts a whole optimizer step, over all workers
    per_device_train_batch_size per_gpu_train_batch_size batch_size_per_device device_batch_size
    device_train_batch_size micro_batch_size_per_gpu micro_train_batch_size microbatch_size
    per_device_batch_size train_micro_batch_size train_micro_batch_size_per_gpu
ppo.micro_batch_size
    forward_batch_size local_rollout_forward_batch_size log_prob_micro_batch_size
    log_prob_micro_batch_size_per_gpu micro_rollout_batch_size ppo_max_token_len_per_gpu ppo_micro_batch_size
    ppo_micro_batch_size_per_gpu
| a step takes `batch_size` sequences in forwards of `micro_batch_size`: accumulation follows from the two
    gradient_accumulation_steps accumulate_grad_batches accumulation_steps grad_accum grad_accum_steps
    gradient_accumulation eval_accumulation_steps
<stage>.batch_size
    train_batch_size effective_batch_size global_batch_size total_batch_size global_train_batch_size
ppo.batch_size | responses per optimizer step
    mini_batch_size minibatch_size ppo_mini_batch_size num_mini_batches num_minibatches ppo_minibatch_size
ppo.num_prompts
    rollout_batch_size data.train_batch_size num_prompts_per_step prompts_per_rollout prompts_per_step
    gen_batch_size
sft.batch_tokens
    max_tokens_per_gpu max_tokens_per_mb tokens_per_batch tokens_per_step use_dynamic_bsz
| what is held out is scored in forwards of `micro_batch_size`; remove it
    per_device_eval_batch_size eval_batch_size micro_eval_batch_size per_gpu_eval_batch_size val_batch_size
| where a config states no `micro_batch_size`, it is fitted to the model that is given; remove it
    auto_find_batch_size
<stage>.num_epochs
    num_train_epochs epochs max_epochs n_epochs num_train_epoch nb_epochs total_epochs total_train_epochs
    train_epochs
ppo.num_epochs | passes over each batch of rollouts
    num_iterations num_ppo_epochs ppo_epochs noptepochs update_epochs update_iters ppo_update_epochs
<stage>.max_steps
    max_iters max_train_steps num_steps num_train_steps num_training_steps steps total_steps
    total_training_steps train_iters train_steps training_steps iterations
ppo.max_steps | each takes `num_prompts` times `samples_per_prompt` responses
    total_episodes num_episodes num_rollouts num_rollout
# lengths
model.context_length | prompt and response together
    max_length max_seq_length max_seq_len max_len max_model_len max_position_embeddings max_context_length
    max_total_length model_max_length block_size context_size context_window ctx_len cutoff_len n_ctx seq_len
    seq_length sequence_len sequence_length vllm_max_model_len vllm_max_model_length
model.context_length | prompt and response share it, so a prompt has what `ppo.max_response_tokens` leaves
    max_prompt_length max_prompt_len max_input_length max_query_length max_source_length prompt_length
    prompt_max_len query_length input_max_length max_prompt_tokens max_input_tokens max_query_tokens
<stage>.max_response_tokens
    max_new_tokens max_completion_length max_completion_len max_gen_len max_generated_tokens max_output_tokens
    max_response_len max_response_length max_target_length max_tokens completion_length generate_max_len
    generation_max_length num_tokens_to_sample response_length
| responses have no least length; remove it
    min_new_tokens min_length min_tokens min_completion_length
| responses end at the end tokens of tokenizer, template and model; remove it
    stop stop_strings stop_token stop_token_id stop_token_ids ignore_eos
| prompts that leave no room for a response are left out and counted; for pairs see `reward.too_long`
    filter_overlong_prompts truncation_side truncation_mode truncate_prompt data.truncation
| what is longer than `model.context_length` is cut or left out, and counted; for pairs see `reward.too_long`
    reward.truncation sft.truncation pretrain.truncation truncation_strategy
| sequences are always packed, without padding, so remove it; how documents fill rows is `prepare.packing`
    packing eval_packing eval_sample_packing group_by_length multipack neat_packing pad_to_max_length
    pad_to_multiple_of pad_to_sequence_len padding padding_free packing_samples packing_strategy
    remove_padding sample_packing use_remove_padding length_column_name sample_packing_eff_est
# ppo
ppo.kl_coef
    beta kl_coeff kl_beta kl_ctl kl_loss_coef kl_loss_weight kl_penalty_coef kl_weight beta_kl init_kl_coef
    init_kl_coeff reference_kl_coef kl_ctrl.kl_coef
ppo.kl_estimator
    kl_loss_type kl_penalty kl_type use_kl_estimator_k3 kl_loss_estimator
ppo.kl_placement
    kl_in_loss kl_in_reward use_kl_in_reward use_kl_loss
ppo.kl_controller
    adap_kl_ctrl adaptive_kl kl_controller_type kl_control use_adaptive_kl kl_ctrl.type
ppo.kl_target ppo.max_kl | what an adaptive kl_coef aims at, and where the run stops
    target_kl init_kl_target kl_ctrl.target_kl target ppo_target kl_ctrl.target
| the KL is not clipped; a run ends where its mean exceeds `ppo.max_kl`
    kl_clip kl_clip_range kl_clamp clip_kl
ppo.kl_horizon
    horizon kl_ctrl.horizon
ppo.clip_low ppo.clip_high
    cliprange clip_range clip clip_coef clip_eps clip_epsilon clip_param clip_ratio eps_clip eps_clip_low_high
    epsilon ppo_clip ppo_clip_ratio
ppo.clip_low
    clip_range_low clip_ratio_low cliprange_low eps_clip_low epsilon_low ratio_clip_min
ppo.clip_high
    clip_higher clip_range_high clip_ratio_high cliprange_high eps_clip_high epsilon_high ratio_clip_max
ppo.dual_clip
    clip_ratio_c delta dual_clip_c dual_clip_ratio
ppo.value_clip
    cliprange_value clip_range_value clip_range_vf value_clip_eps value_clip_range value_cliprange
    value_eps_clip vf_clip vf_clip_param
| the value model is trained by itself, so its loss has no weight; its learning rate is `ppo.value_lr`
    vf_coef critic_coef value_coef value_loss_coef vf_loss_coef vf_loss_coeff
ppo.gae_lambda
    lam lambda lambd lmbda gae_lam
ppo.gamma
    discount discount_factor turn_discount
ppo.entropy_coef
    ent_coef entropy_bonus entropy_coeff entropy_loss_coef entropy_weight
ppo.loss_aggregation
    loss_agg_mode loss_type loss_reduction
| the reward model's loss is that of Bradley and Terry; there is no other, so remove it
    reward.loss_type reward.loss_fn reward.loss reward_config.loss_type
| the loss is the cross-entropy of the trained tokens; there is no other, so remove it
    sft.loss_type sft.loss_fn sft.loss sft_config.loss_type pretrain.loss_type pretrain.loss_fn pretrain.loss
ppo.whiten_advantages
    adv_norm advantage_normalization norm_adv normalize_advantage normalize_advantages whiten_advantage
    whiten_adv no_advantage_std_norm norm_adv_by_std_in_grpo advantage_norm
| scores are normalised by what the reward stage measured, and clipped by `ppo.score_clip`; remove it
    normalize_reward reward_normalization reward_scaling scale_rewards use_score_norm use_score_scaling
    whiten_rewards reward_bias reward_output_scaling ppo_score_norm ppo_whiten_rewards reward_norm
ppo.score_clip
    clip_reward clip_reward_value cliprange_reward reward_clip reward_clip_range
| the algorithm is PPO with a value model; there is no other, so remove it
    adv_estimator advantage_estimator algo rl rl_algorithm algorithm num_groups dpo grpo dpo_beta pref_beta
    pref_loss rpo_alpha
| there is no such filter of groups or rewards; remove it
    dynamic_filtering dynamic_filtering_reward_range filter_groups max_num_gen_batches overlong_buffer
    overlong_reward_penalty oversample dynamic_sampling
ppo.samples_per_prompt
    n num_generations num_generations_per_prompt num_return_sequences num_samples num_samples_per_prompt
    n_responses n_samples n_samples_per_prompt group_size responses_per_prompt rollouts_per_prompt
    samples_per_instruction rollout.n rollout_n best_of
ppo.num_prompts ppo.samples_per_prompt | their product is how many responses are generated per step
    generation_batch_size
ppo.missing_eos_penalty
    eos_penalty no_eos_penalty non_eos_penalty penalise_no_eos penalize_no_eos penalty_reward_value
ppo.truncation
    mask_truncated mask_truncated_completions overlong_filter overlong_filtering
ppo.value_warmup_steps
    critic_warmup critic_warmup_steps freezing_actor_steps num_critic_warmup_steps value_pretrain_steps
ppo.rollout_correction
    tis_imp_ratio_cap truncated_importance_sampling use_tis rollout_is rollout_is_threshold
    vllm_importance_sampling_cap vllm_importance_sampling_correction
<stage>.temperature
    temp sampling_temperature rollout_temperature
| responses are sampled from the whole distribution, at `ppo.temperature`; remove it
    top_p top_k min_p typical_p do_sample num_beams no_repeat_ngram_size repetition_penalty presence_penalty
    frequency_penalty generation_config generation_kwargs gen_kwargs sampling_params allowed_token_ids
    bad_words detokenize logit_bias logprobs prompt_logprobs skip_special_tokens structured_outputs
| the reference is the sft model that ppo starts from; remove it
    ref ref_model ref_model_path ref_path reference_model sync_ref_model
| ppo is scored by the model of the reward stage; give one of yours by `rlhf ppo CONFIG --input reward=DIR`
    custom_reward_function remote_rm_url reward_funcs reward_function reward_model reward_model_name
    reward_model_path reward_pretrain reward_path rm_model rm_path reward_manager reward_model_type
    reward_model_config
| the value model starts from the reward model; remove it
    critic_pretrain critic_model critic_model_path value_model value_model_path critic.model.path
    critic.path critic.model
| no pretraining loss is mixed into ppo; remove it
    ptx_coef ptx_coeff ptx_loss_coef pretrain_coef pretrain_loss_coef
# models
model.path
    model_name_or_path base_model base_model_name base_model_name_or_path hf_model model.checkpoint model.id
    model.model model.name model_id model_name model_path actor_model_name_or_path policy_model pretrained
    pretrained_model pretrained_model_name pretrained_model_name_or_path sft_model_path actor.path
    actor.model policy.path policy.model trainer.model
model.revision
    model_revision base_model_revision
| a given model brings its own tokenizer; one for a model from scratch is `prepare.tokenizer`
    tokenizer tokenizer_id tokenizer_name tokenizer_name_or_path tokenizer_path
| code that a model brings is never run; remove it
    trust_remote_code
| positions are the model's own; lengths are bounded by `model.context_length`; remove it
    rope_scaling rope_parameters yarn
<stage>.precision | fp32 or bf16
    bf16 fp16 amp bf16_full_eval compute_dtype dtype fp16_full_eval half_precision mixed_precision model_dtype
    param_dtype pure_bf16 torch_dtype use_bf16 rollout_dtype tf32
| weights are fp32 or bf16 (`precision`), never quantised; remove it
    bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_config kv_cache_dtype load_in_4bit load_in_8bit
    quantization quantization_bit quantization_config use_4bit use_8bit
| attention is the one that keeps packed sequences apart; remove it
    attn_impl attn_implementation attention_implementation flash_attention flash_attn flash_attn_2
    sdp_attention use_flash_attention_2 use_flash_attn xformers_attention attention_backend attention_config
| all weights are trained, without adapters; merge yours into its model, and give that as `model.path`
    adapter adapter_name_or_path enable_lora finetuning_type lora lora_alpha lora_bias lora_config
    lora_dropout lora_model_dir lora_modules_to_save lora_r lora_rank lora_target lora_target_linear
    lora_target_modules lora_task_type max_lora_rank modules_to_save peft peft_config qlora target_modules
    use_dora use_lora use_peft use_rslora max_loras lora_dtype freeze_trainable_layers
    freeze_trainable_modules
<stage>.gradient_checkpointing
    activation_checkpoint activation_checkpointing enable_gradient_checkpointing gradient_checkpointing_enable
    recompute recompute_activations use_gradient_checkpointing
| `gradient_checkpointing` has no settings of its own; remove it
    gradient_checkpointing_kwargs gradient_checkpointing_use_reentrant use_reentrant
| the trainer is not compiled and has no kernels to choose; remove it
    compile liger torch_compile torch_compile_backend use_liger_kernel use_torch_compile unsloth
    torch_compile_mode liger_kernel_config compilation_config compute_fp32_loss
| the trainer sees to this itself; remove it
    use_cache torch_empty_cache_steps prediction_loss_only average_tokens_across_devices
    logging_nan_inf_filter include_num_input_tokens_seen include_for_metrics include_inputs_for_metrics
    eval_do_concat_batches eval_use_gather_object batch_eval_metrics save_on_each_node skip_memory_metrics
    debug label_names ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph full_determinism
    grad_accum_dtype overlap_comm balance_batch past_index jit_mode_eval ray_scope entropy_checkpointing
    calculate_log_probs
model.layers
    n_layer n_layers num_hidden_layers num_layers
model.hidden_size
    d_model dim embed_dim n_embd hidden_dim
model.intermediate_size
    d_ff ffn_dim n_inner
model.num_heads
    n_head n_heads num_attention_heads
model.num_kv_heads
    n_kv_heads num_key_value_heads
model.tie_embeddings
    tie_word_embeddings tied_embeddings
model.rope_theta
    rope_base rotary_base
model.num_experts
    n_routed_experts num_local_experts
<stage>.router_aux_loss_coef
    aux_loss_coef aux_loss_coeff moe_aux_loss_coeff
prepare.vocab_size
    n_vocab vocab_len padded_vocab_size
model.chat_template | a Jinja file
    chat_template_file chat_template_path conversation_template custom_chat_template prompt_template template
| conversations are always rendered by the chat template (`model.chat_template` gives another)
    apply_chat_template use_chat_template input_template
| a system turn belongs into the rows of the data
    default_system system_message system_prompt
| tokens are those of the model's own tokenizer; change them in its directory
    add_special_tokens additional_special_tokens bos_token eos_token eos_token_id new_special_tokens pad_token
    pad_token_id resize_vocab special_tokens unk_token
# data
<stage>.data.0.path | data is a list of sources, each with a path
    data.dataset data.file data.id data.path data.repo data.repo_id dataset datasets dataset_dir
    dataset_mixture dataset_name dataset_name_or_path dataset_path data_dir data_file data_files data_path
    data_source
    hf_dataset prompt_data train_data train_data_path train_dataset train_datasets train_dir train_file
    train_files train_path training_data training_file
<stage>.data.0.subset
    data.config data.name dataset_config dataset_config_name dataset_subset subset_name config_name
<stage>.data.0.split
    dataset_split dataset_train_split split_name splits train_split
<stage>.data.0.columns
    chosen_column chosen_key column_mapping columns_mapping completion_column completion_field content_key
    dataset_kwargs dataset_text_field field_instruction field_messages field_output input_key label_key
    messages_column messages_key output_key prompt_column prompt_field prompt_key rejected_column rejected_key
    response_key text_column text_field reward_fn_key
<stage>.data.0.format
    data.type data.ds_type dataset_format data_format
<stage>.data.0.weight
    dataset_probs dataset_weight dataset_weights interleave_probs mixing_weights prompt_data_probs probs
    proportion sampling_weights data.ratio data.repeat
<stage>.data.0.weight | 0.5 takes half of the rows
    max_samples max_train_samples max_examples num_train_samples subset_size data.num_samples data.limit
    prompts.num_samples prompts.limit
evaluate.prompts
    eval_data eval_dataset eval_dataset_name eval_dataset_path eval_file eval_files eval_prompts dev_file
    test_datasets test_file test_files val_dataset val_file val_files validation_data validation_file
    validation_files
<stage>.heldout_frac
    dataset_test_split eval_ratio eval_split test_size test_split_size val_set_size val_size validation_split
    validation_split_percentage
sft.data.0.part sft.data.0.heldout_frac | train here, heldout in `evaluate.prompts`
    sft.dataset_test_split sft.eval_ratio sft.eval_split sft.test_size sft.test_split sft.test_split_size
    sft.val_set_size sft.val_size sft.validation_split sft.validation_split_percentage
evaluate.max_prompts
    max_eval_samples max_samples_eval num_eval_prompts num_eval_samples evaluate.limit evaluate.max_examples
    evaluate.max_samples evaluate.num_examples evaluate.num_prompts evaluate.subset_size
evaluate.max_prompts | each of them gets one response
    evaluate.best_of evaluate.n evaluate.n_samples evaluate.num_generations evaluate.num_return_sequences
    evaluate.num_samples evaluate.samples_per_prompt
| sft trains the turns of the assistant, prompts never; marks in the rows leave turns out (docs/data.md)
    completion_only_loss assistant_only_loss mask_history mask_inputs mask_prompt response_template
    roles_to_train train_on_eos train_on_inputs train_on_prompt train_on_source
| reading has no workers to set; remove it
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_num_proc dataset_processes num_proc preprocessing_num_workers pin_memory dataloader_in_order
    dataloader_multiprocessing_context renderer_num_workers
| data is read once, shuffled by the seed and kept in the artifacts; remove it
    cache_dir dataset_prepared_path overwrite_cache streaming dataset_streaming remove_unused_columns
    drop_last dataloader_drop_last shuffle shuffle_dataset ignore_data_skip train_sampling_strategy
    dataset_shard_num
# records
outputs
    output_dir output_path out_dir overwrite_output_dir save_path save_dir ckpt_path checkpoint_dir
    default_local_dir local_dir log_dir logging_dir
name
    experiment_name exp_name job_name run_name trial_name wandb_run_name
seed
    data_seed manual_seed random_seed random_state rng_seed shuffle_seed
<stage>.log_every_steps
    log_every log_every_n_steps log_freq log_interval logging_first_step logging_freq logging_steps
    logging_strategy print_freq steps_per_print
<stage>.checkpoint_every_steps
    checkpoint_freq checkpoint_interval checkpointing_steps ckpt_freq save_every save_every_n_steps
    save_every_steps save_freq save_interval save_steps save_strategy saves_per_epoch
<stage>.keep_checkpoints
    checkpoint_limit keep_last_n keep_last_n_checkpoints max_checkpoints max_ckpt_num max_ckpt_to_keep
    max_actor_ckpt_to_keep save_limit save_total_limit
ppo.num_logged_rollouts
    num_completions_to_print num_generate_samples num_sample_generations log_completions
| models are measured after training, by the section `evaluate`; remove it
    eval_delay eval_every eval_freq eval_interval eval_on_start eval_steps eval_strategy eval_table_size
    evals_per_epoch evaluation_strategy do_eval do_predict do_train predict_with_generate test_freq
    val_before_train val_check_interval val_freq eval_n_samples_per_prompt eval_temperature val_kwargs
| training runs to its last step; remove it
    early_stopping early_stopping_patience greater_is_better load_best_model_at_end metric_for_best_model
<stage>.health
    loss_watchdog_threshold loss_watchdog_patience skip_nan_steps
| the same command goes on from the last checkpoint; remove it
    auto_resume load_checkpoint resume resume_from_checkpoint resume_mode resume_path
    auto_resume_from_checkpoints save_only_model save_safetensors disable_ds_ckpt enable_jit_checkpoint
    restore_callback_states_from_checkpoint save_hf_ckpt save_first_step
| nothing is uploaded: an artifact is a model directory; remove it
    hub_model_id hub_private_repo hub_strategy hub_token push_to_hub default_hdfs_dir hub_always_push
    hub_revision
| metrics are in metrics.jsonl and report.html of the run; remove it
    disable_tqdm log_level log_to log_with logger loggers plot_loss project_name report_to tensorboard_dir
    tracker_project_name use_mlflow use_swanlab use_tensorboard use_wandb wandb wandb_entity wandb_log_model
    wandb_mode wandb_name wandb_project wandb_watch project trackio_bucket_id trackio_space_id
    trackio_static_space_id log_level_replica log_on_each_node wandb_group wandb_org wandb_run_id
    mlflow_tracking_uri comet_api swanlab_project
| each stage has a section of its own (`sft`, `reward`, `ppo`)
    stage task
# machines
resources.<stage>.num_gpus | per worker; 0 is the CPU
    num_gpus gpus n_gpus ngpus n_gpus_per_node num_gpus_per_node gpus_per_node gpus_per_worker
    actor_num_gpus_per_node device device_map devices no_cuda use_cpu critic_num_gpus_per_node
    ref_num_gpus_per_node reward_num_gpus_per_node trainer_num_gpus
resources.<stage>.num_gpus resources.<stage>.num_gpus_per_engine | a GPU is shared out by these
    colocate_actor_ref colocate_all_models colocate_critic_reward colocate
resources.<stage>.num_workers
    num_workers num_processes nproc_per_node world_size local_rank dp_size
resources.<stage>.num_cpus
    num_cpus cpus_per_worker
resources.<stage>.num_gpus_per_engine
    num_gpus_per_engine gpus_per_engine
resources.<stage>.num_cpus_per_engine
    num_cpus_per_engine
resources.address
    address cluster_address ray_address ray_init nnodes n_nodes num_nodes actor_num_nodes critic_num_nodes
    ref_num_nodes reward_num_nodes
| several workers share the model by FSDP2; set `resources.<stage>.num_workers`
    accelerate_config accelerator_config ddp ddp_backend ddp_find_unused_parameters deepspeed deepspeed_config
    deepspeed_plugin distributed_strategy ds_config ds3_gather_for_generation fsdp fsdp2 fsdp_config fsdp_size
    sharding_strategy strategy zero_optimization zero_stage parallelism_config zpg deepspeed_enable_sleep
    ds_tensor_parallel_size
| nothing is offloaded; more workers hold less each (`resources.<stage>.num_workers`)
    activation_offloading adam_offload cpu_offload offload offload_optimizer offload_param optimizer_offload
    param_offload ref_reward_offload cpu_offload_gb kv_offloading_size
| trainers are split by `resources.<stage>.num_workers`, engines by `rollout.tensor_parallel_size` only
    context_parallel_size data_parallel_size expert_parallel_size pipeline_model_parallel_size
    pipeline_parallel_size ring_attn_size sequence_parallel_degree sequence_parallel_size
    ulysses_sequence_parallel_size cp_size ep_size pp_size enable_expert_parallel decode_context_parallel_size
    prefill_context_parallel_size data_parallel_size_local
rollout.tensor_parallel_size
    tensor_model_parallel_size tensor_parallel tensor_parallel_degree tp tp_size vllm_tensor_parallel_size
rollout.gpu_memory_frac
    gpu_memory_fraction gpu_memory_util gpu_memory_utilization mem_fraction_static vllm_gpu_memory_utilization
rollout.num_engines
    n_engines num_rollout_engines num_vllm_engines vllm_num_engines
rollout.engine
    backend infer_backend inference_backend inference_engine rollout.mode rollout.name rollout_backend
    rollout_engine use_vllm vllm_mode
rollout.sync
    sync_backend vllm_sync_backend weight_sync_backend
rollout.max_num_seqs
    max_concurrent_requests max_concurrent_rollouts max_num_sequences
rollout.kv_cache_mib
    cpu_kvcache_space kv_cache_memory kv_cache_memory_bytes kvcache_space swap_space vllm_cpu_kvcache_space
rollout.enforce_eager
    cuda_graph eager use_cuda_graph vllm_enforce_eager
rollout.max_staleness
    async_level max_head_offpolicyness max_off_policy off_policy_steps staleness
| the engines are set up for training, and this is not for a config to say; remove it
    enable_chunked_prefill enable_prefix_caching enable_sleep free_cache_engine vllm_enable_sleep
    served_model_name load_format download_dir distributed_executor_backend enable_sleep_mode
    scheduling_policy speculative_config num_gpu_blocks_override weight_transfer_config model_impl
    async_scheduling disable_log_stats max_num_batched_tokens rollout.block_size vllm.block_size
    engine_args.block_size vllm_config.block_size
resources.collective_timeout_s
    ddp_timeout nccl_timeout
"""

GROUPS = """
    actor actor_rollout_ref algorithm args config critic data dataset_args engine_args fsdp_config gconfig
    gen_kwargs generation_config generation_kwargs grpo grpo_config hyperparameters kl_ctrl model_args optim
    optimizer optimizer_config policy ppo_config ref reward_config reward_model sampling_params script_args
    sft_config train trainer trainer_args training training_args training_arguments vllm vllm_config
"""
"""Sections of other tools: what stands in them is looked up one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What one word of another tool is here.

    Example: Meaning(settings=("<stage>.adam_beta1", "<stage>.adam_beta2"), note="")
    """

    settings: tuple[str, ...]  # from the root; none: there is no such setting
    note: str


def _read(table: str) -> Iterator[tuple[str, Meaning]]:
    meaning: Meaning | None = None
    for line in table.splitlines():
        if line.startswith(" "):
            assert meaning is not None
            yield from ((word, meaning) for word in line.split())
        elif line and not line.startswith("#"):
            settings, _, note = line.partition("|")
            meaning = Meaning(settings=tuple(settings.split()), note=note.strip())


MEANINGS: Mapping[str, Meaning] = dict(_read(TABLE))
"""Word -> what it is here."""
