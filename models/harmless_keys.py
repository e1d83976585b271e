"""Keys of published configurations that say nothing about logits in evaluation, by name.

Who wrote the file and how; how text is generated; how weights were initialized, dropped out and
trained; how memory is used. Keys that may change the function are not here: they are read, or
refused (checkpoint_configs.py, gguf_configs.py).
"""

_COMMON = """
    _name_or_path architectures transformers_version torch_dtype dtype _commit_hash
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    attn_implementation _flash_attn_2_enabled transformers.js_config unsloth_fixed unsloth_version
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id use_cache return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores torchscript use_bfloat16
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_new_tokens
    chunk_size_feed_forward gradient_checkpointing finetuning_task task_specific_params
    id2label label2id num_labels problem_type tokenizer_class prefix tf_legacy_loss
    initializer_range is_decoder tie_encoder_decoder _num_labels output_past
"""
_GPT2 = """
    resid_pdrop embd_pdrop attn_pdrop n_ctx reorder_and_upcast_attn predict_special_tokens n_special
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""
# max_sequence_length: of the first Llamas, beside max_position_embeddings.
_LLAMA = "attention_dropout is_llama_config max_sequence_length"
# `transformers` has the gate before the norm whatever norm_before_gate says.
_MAMBA = """
    residual_in_fp32 rescale_prenorm_residual fused_add_norm pad_vocab_size_multiple chunk_size
    time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme
    use_mambapy use_associative_scan
"""
_MAMBA2 = _MAMBA + "time_step_rank norm_before_gate"

HARMLESS = {
    kind: frozenset((_COMMON + names).split())
    for kind, names in (("gpt2", _GPT2), ("llama", _LLAMA), ("mamba", _MAMBA), ("mamba2", _MAMBA2))
}

# GGUF: everything about the tokenizer, which is not the model's, and about the file's origin.
_GGUF = frozenset(
    """
    llama.tensor_data_layout llama.rope.scaling.finetuned llama.rope.scaling.original_context_length
    quantize.imatrix.file quantize.imatrix.dataset quantize.imatrix.entries_count
    quantize.imatrix.chunks_count split.no split.tensors.count
    """.split()
)


def harmless_gguf(key: str) -> bool:
    """Returns whether a key of GGUF metadata leaves the model's function as it is."""
    return key in _GGUF or key.startswith(("general.", "tokenizer."))
