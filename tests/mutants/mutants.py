"""Planted bugs, each a mistake that somebody has made, and the test that must see it.

`old` occurs exactly once in `file`; `new` takes its place. `test` is one pytest node that passes on the true code.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted bug."""

    name: str
    file: str
    old: str
    new: str
    test: str


ATTENTION = "k2jax/kernels/attention/reference.py"
MOBA = "k2jax/kernels/moba/reference.py"
MOBA_XLA = "k2jax/kernels/moba/xla.py"
STREAMS = "k2jax/kernels/moba/streams.py"
MUONCLIP = "k2jax/muonclip.py"
QK_CLIP = "k2jax/qk_clip.py"
NEWTON_SCHULZ = "k2jax/newton_schulz.py"
SYMMETRIC = "tests/test_symmetric_matmul.py::"
MATRIX_SPECS = "k2jax/matrix_specs.py"
MUON_GROUPS = "k2jax/muon_groups.py"
MUON_PLAN = "k2jax/muon_plan.py"
ROUTER = "k2jax/layers/router.py"
ROPE = "k2jax/layers/rope.py"
DISPATCH = "k2jax/layers/dispatch.py"
MODEL = "k2jax/model.py"
STEP = "k2jax/training/step.py"
METRICS = "k2jax/training/metrics.py"

ATTENDS = "tests/test_attention.py::test_values_and_max_logits_match_the_oracle"
SELECTS = "tests/test_paper_moba.py::test_values_selection_and_gradients"
FORWARD = "tests/test_paper_model.py::test_logits_max_logits_and_routing"
GOLDEN = "tests/test_golden_deepseek_v3.py::"
LAYERS = "tests/test_layers.py::"
CLIPS = "tests/test_qk_clip.py::"
MUON = "tests/test_muonclip.py::"
LAYOUTS = "tests/test_qk_clip_layouts.py::"
GRAM = "tests/test_gram.py::"
BLOCKS = "tests/test_matrix_blocks.py::"
PARITY = "tests/test_update_parity.py::"
GROUPS = "tests/test_muon_groups.py::"
ON_A_MESH = f"{GROUPS}test_many_devices_tell_what_one_tells_and_leave_the_result_where_it_was"
HOPPER = "tests/test_moba_sm90.py::"
REACH = "tests/test_reach.py::test_a_unit_is_read_by_the_rows_that_see_it_and_masked_where_some_do_not"
HOPPER_GATE = f"{HOPPER}test_interpreted_gate_chooses_as_the_definition_does_where_scores_are_equal"
HOPPER_IS_EXACT = f"{HOPPER}test_interpreted_kernels_are_as_exact_as_plain_attention_in_their_type"
HOPPER_FUSED = f"{HOPPER}test_the_fused_gradient_is_as_exact_as_plain_attention_in_its_type"
HOPPER_SHORT = f"{HOPPER}test_all_pairs_of_a_short_text_are_as_exact_as_plain_attention_in_their_type"
BALANCED = "tests/test_partition.py::test_halves_exchanged_give_the_same_and_every_device_the_same_work"
TPU_IS_EXACT = "tests/test_moba_tpu.py::test_interpreted_kernels_are_as_exact_as_plain_attention_in_their_type"
DATA = "tests/test_pipeline.py::"
MIXTURE = "tests/test_mixture.py::"
ONE_STEP = "tests/test_step.py::"
TRAINING = "tests/test_training.py::"

ATTENTION_MUTANTS = (
    Mutant(
        "the softmax scale is applied twice",
        ATTENTION,
        "logits_BGRTS = scale * jnp.einsum(",
        "logits_BGRTS = scale * scale * jnp.einsum(",
        f"{ATTENDS}[causal-reference]",
    ),
    Mutant(
        "a query does not see its own position",
        ATTENTION,
        "jnp.arange(S) <= position_BT[:, :, None]",
        "jnp.arange(S) <= jnp.maximum(position_BT[:, :, None] - 1, 0)",
        f"{ATTENDS}[causal-xla]",
    ),
    Mutant(
        "packed documents see each other",
        ATTENTION,
        "(query_segment_BT[:, :, None] == segment_ids[:, None, :])",
        "(segment_ids[:, None, :] == segment_ids[:, None, :])",
        f"{ATTENDS}[packed segments-reference]",
    ),
    Mutant(
        "max logits are of the magnitude, not signed",
        ATTENTION,
        "jnp.max(max_BGRT, axis=-1).reshape(B, H)",
        "jnp.max(jnp.abs(max_BGRT), axis=-1).reshape(B, H)",
        "tests/test_attention.py::test_max_logit_is_signed_and_ignores_masked_pairs[reference]",
    ),
    Mutant(
        "the own block takes part in the choice of earlier blocks",
        MOBA,
        "(jnp.arange(N) < own_block_BT[..., None])",
        "(jnp.arange(N) <= own_block_BT[..., None])",
        f"{SELECTS}[many_ragged_blocks_and_shared_keys-reference]",
    ),
    Mutant(
        "top_k does not count the own block",
        MOBA,
        "candidate_BTN[:, :, None], top_k - 1)",
        "candidate_BTN[:, :, None], top_k)",
        f"{SELECTS}[many_ragged_blocks_and_shared_keys-reference]",
    ),
    Mutant(
        "equal scores go to the highest block",
        "k2jax/kernels/moba/blocks.py",
        "best = jnp.argmax(score_N, axis=-1).astype(jnp.int32)",
        "best = (score_N.shape[-1] - 1 - jnp.argmax(score_N[..., ::-1], axis=-1)).astype(jnp.int32)",
        "tests/test_paper_moba.py::test_equal_scores_go_to_the_lowest_block[xla]",
    ),
    Mutant(
        "a block is scored by its last key instead of the mean",
        MOBA_XLA,
        "jnp.mean(_far(k_BSGK, sizes, history.start_BN, segment_ids).astype(jnp.float32), axis=2)",
        "_far(k_BSGK, sizes, history.start_BN, segment_ids).astype(jnp.float32)[:, :, -1]",
        f"{SELECTS}[many_ragged_blocks_and_shared_keys-xla]",
    ),
    Mutant(
        "partial results are joined without their share of the softmax",
        STREAMS,
        "out_MV = out_MV * jnp.exp(lse_M - joined_M)[:, None]",
        "out_MV = out_MV * 1.0",
        f"{SELECTS}[many_ragged_blocks_and_shared_keys-xla]",
    ),
)

OPTIMIZER_MUTANTS = (
    Mutant(
        "the momentum has the wrong sign",
        MUONCLIP,
        "mu = beta * mus[i].astype(jnp.float32) + grad",
        "mu = beta * mus[i].astype(jnp.float32) - grad",
        f"{MUON}test_one_step_equals_optax_muon",
    ),
    Mutant(
        "a Newton-Schulz coefficient is wrong",
        NEWTON_SCHULZ,
        "KELLER = (3.4445, -4.7750, 2.0315)",
        "KELLER = (3.4445, -4.7750, 2.0135)",
        f"{MUON}test_one_step_equals_optax_muon",
    ),
    Mutant(
        "the update is scaled by the short side",
        MATRIX_SPECS,
        "math.sqrt(max(parts[0].fan_in, parts[0].fan_out))",
        "math.sqrt(min(parts[0].fan_in, parts[0].fan_out))",
        f"{MUON}test_update_has_the_rms_of_adamw[32-96]",
    ),
    Mutant(
        "gains and embeddings are not decayed",
        MUONCLIP,
        "(direction + weight_decay * param.astype(jnp.float32))",
        "(direction + (role is not None) * weight_decay * param.astype(jnp.float32))",
        f"{MUON}test_decay_is_decoupled_and_uses_the_plain_rate_on_every_leaf_but_external",
    ),
    Mutant(
        "the heads of an output projection are matrices of their own",
        "k2jax/training/optimizer.py",
        "_HEADS_IN = MatrixSpec(reduction_axis=(-3, -2), output_axis=-1)",
        "_HEADS_IN = MatrixSpec(reduction_axis=-2, output_axis=-1)",
        "tests/test_optimizer_roles.py::test_the_axes_cut_each_weight_into_fan_in_and_fan_out[latent]",
    ),
    Mutant(
        "a model without q-LoRA is clipped at the leaf of one that has it",
        "k2jax/training/optimizer.py",
        'query = "wq" if cfg.attn.q_lora_rank is None else "wq_b"',
        'query = "wq_b"',
        "tests/test_optimizer_roles.py::test_qk_clip_names_leaves_that_exist_keyed_as_the_max_logits[latent_without_q]",
    ),
    Mutant(
        "the clip scales by gamma where it should by its root",
        QK_CLIP,
        "root, gamma = jnp.sqrt(gamma)[..., None], gamma[..., None]",
        "root, gamma = gamma[..., None], gamma[..., None]",
        f"{CLIPS}test_recomputed_mla_logits_equal_min_of_S_and_tau[rope-q-lora]",
    ),
    Mutant(
        "the rotary query is scaled as if the shared rotary key were clipped too",
        QK_CLIP,
        "jnp.where(in_nope_q, root, gamma)",
        "jnp.where(in_nope_q, root, root)",
        f"{CLIPS}test_recomputed_mla_logits_equal_min_of_S_and_tau[rope-no q-lora]",
    ),
    Mutant(
        "the shared rotary key is clipped, once for every head",
        QK_CLIP,
        "_clip(u, weights[path], factors[path]) if path in factors else u",
        '_clip(u, weights[path], factors.get(path, 0.1)) if path in factors or path == "wkv_a" else u',
        f"{CLIPS}test_values_output_and_shared_rotary_key_are_bitwise_untouched",
    ),
    Mutant(
        "values are clipped with the keys",
        QK_CLIP,
        "jnp.where(in_nope_kv, root, 1.0)",
        "jnp.where(in_nope_kv, root, root)",
        f"{CLIPS}test_values_output_and_shared_rotary_key_are_bitwise_untouched",
    ),
    Mutant(
        "a group's key is scaled by its largest gamma",
        QK_CLIP,
        "jnp.sqrt(lowest)",
        "jnp.sqrt(highest)",
        f"{CLIPS}test_gqa_scales_a_shared_key_once_and_gives_siblings_back_what_they_lose",
    ),
    Mutant(
        "the clip scales the weights before the update",
        QK_CLIP,
        "((param + update) * factor - param)",
        "(param * factor - param + update)",
        f"{CLIPS}test_clip_scales_the_updated_weights_and_leaves_momentum_alone",
    ),
    Mutant(
        "an infinite max logit clips a head to nothing",
        QK_CLIP,
        "above = jnp.isfinite(logits) & (logits > config.tau)",
        "above = logits > config.tau",
        f"{CLIPS}test_heads_not_above_tau_change_nothing_bitwise[gqa-inf]",
    ),
    Mutant(
        "max logits of micro-batches are added",
        "k2jax/max_logits.py",
        "jax.tree.map(jnp.maximum, tree_a, tree_b)",
        "jax.tree.map(jnp.add, tree_a, tree_b)",
        f"{CLIPS}test_accumulation_over_micro_batches_takes_the_maximum",
    ),
)

NUMERICS_MUTANTS = (
    Mutant(
        "Nesterov's gradient is forgotten",
        MUONCLIP,
        "inputs.append(beta * mu + grad if nesterov else mu)",
        "inputs.append(mu)",
        f"{PARITY}test_steps_equal_those_of_torch[wide]",
    ),
    Mutant(
        "a fit of a part of the interval is not centred on one again",
        "k2jax/polar_express.py",
        "2 / (_at(triple, lower) + _at(triple, upper))",
        "1.0",
        "tests/test_polar_express.py::test_generator_gives_the_numbers_of_modded_nanogpt",
    ),
    Mutant(
        "the small entries of a Gram matrix fall below float16",
        NEWTON_SCHULZ,
        '_LIFT = {"float16": 64.0}',
        "_LIFT = {}",
        f"{GRAM}test_fast_is_the_polar_factor_where_k2_is_not",
    ),
    Mutant(
        "the Gram matrix is multiplied from one side",
        NEWTON_SCHULZ,
        "gram = symmetric_matmul(symmetric_matmul(poly, y=gram), y=poly)",
        "gram = symmetric_matmul(poly, y=gram)",
        f"{GRAM}test_fast_is_the_polar_factor_where_k2_is_not",
    ),
    Mutant(
        "a tile's mirror image is not transposed",
        "k2jax/kernels/symmetric_matmul/sm90.py",
        "square_EE.transpose((1, 0))[...] = value_EE",
        "square_EE[...] = value_EE",
        f"{SYMMETRIC}test_interpreted_kernel_is_right_in_every_bit[two blocks share rows, an odd number of tiles]",
    ),
    Mutant(
        "the identity lands on every tile of the symmetric product",
        "k2jax/kernels/symmetric_matmul/sm90.py",
        "gamma = jnp.where(is_diagonal, gamma, 0.0)",
        "gamma = jnp.where(is_diagonal, gamma, gamma)",
        f"{SYMMETRIC}test_interpreted_kernel_is_right_in_every_bit[two blocks share rows, an odd number of tiles]",
    ),
    Mutant(
        "the polynomial's coefficients change places",
        NEWTON_SCHULZ,
        "return _product(symmetric_matmul(gram, gram, alpha=c, beta=b, gamma=a), x), None",
        "return _product(symmetric_matmul(gram, gram, alpha=b, beta=c, gamma=a), x), None",
        "tests/test_newton_schulz.py::"
        "test_the_symmetric_kernel_takes_every_symmetric_product_where_it_is_chosen[standard]",
    ),
    Mutant(
        "the second matrix of a symmetric product is the first",
        "k2jax/kernels/symmetric_matmul/sm90.py",
        "load(slot, k, 2, right, y_BNM)",
        "load(slot, k, 2, right)",
        f"{SYMMETRIC}test_interpreted_kernel_is_right_in_every_bit[two matrices, two blocks]",
    ),
    Mutant(
        "a pair of diagonal tiles is left out of the schedule",
        "k2jax/kernels/symmetric_matmul/schedule.py",
        "odd = [2 * q + 1 for q in range(half)]",
        "odd = [2 * q + 1 for q in range(half - 1)]",
        f"{SYMMETRIC}test_every_tile_of_the_lower_triangle_is_computed_once[8-True-2-16]",
    ),
    Mutant(
        "the Gram matrix is never computed anew",
        NEWTON_SCHULZ,
        "itertools.pairwise([0, *starts, len(self.coeffs)])",
        "itertools.pairwise([0, len(self.coeffs)])",
        f"{GRAM}test_restarts_are_every_second_step_unless_given",
    ),
    Mutant(
        "a square matrix takes the Gram form, at more work and less accuracy",
        NEWTON_SCHULZ,
        'ns.method == "gram" and method_flops(n, m, ns, "gram") < method_flops(n, m, ns, "standard")',
        'ns.method == "gram"',
        f"{GRAM}test_a_nearly_square_matrix_takes_the_standard_iteration_with_the_same_settings",
    ),
    Mutant(
        "a leaf's own Newton-Schulz is ignored",
        MUON_GROUPS,
        "[ns if spec.ns is None else spec.ns for spec in specs]",
        "[ns for spec in specs]",
        f"{BLOCKS}test_a_leaf_may_have_its_own_newton_schulz",
    ),
    Mutant(
        "the way back undoes the first move first",
        MUON_GROUPS,
        "for side, axes in reversed(moved):",
        "for side, axes in moved:",
        f"{ON_A_MESH}[Explicit both]",
    ),
    Mutant(
        "pieces are divided by the norm of the piece",
        MUON_GROUPS,
        "over=members.rows + members.columns)",
        "over=members.rows)",
        f"{ON_A_MESH}[Explicit columns]",
    ),
    Mutant(
        "the largest entry is that of the piece",
        NEWTON_SCHULZ,
        "lax.pmax(largest, over) if over else largest",
        "largest",
        f"{ON_A_MESH}[Explicit rows]",
    ),
    Mutant(
        "padding stays in the result's place",
        MUON_GROUPS,
        "((0, members.stack - count), (0, 0), (0, 0))",
        "((members.stack - count, 0), (0, 0), (0, 0))",
        f"{ON_A_MESH}[Explicit uneven]",
    ),
    Mutant(
        "the last chunk is read where it would be without its earlier start",
        MUON_GROUPS,
        "jnp.minimum(i * members.stack, count - members.stack)",
        "jnp.minimum(i, members.chunks - 2) * members.stack",
        f"{ON_A_MESH}[chunks]",
    ),
    Mutant(
        "devices that share a stack take the next one's slice",
        MUON_GROUPS,
        "lax.axis_index(axes) * size, size, axis)",
        "(lax.axis_index(axes) + 1) * size, size, axis)",
        f"{ON_A_MESH}[equal]",
    ),
    Mutant(
        "a mesh axis that cuts blocks is taken to cut matrices",
        MUON_PLAN,
        "            of_blocks = cut[axis]",
        "            of_blocks = ()",
        f"{GROUPS}test_the_plan_of_blocks_that_a_mesh_axis_cuts",
    ),
    Mutant(
        "the work is shared over an axis that is too slow for it",
        MUON_PLAN,
        "if axis not in repeat_over or axis not in repeated]",
        "]",
        f"{GROUPS}test_axes_to_repeat_over_carry_nothing",
    ),
    Mutant(
        "the work is shared among as few devices as possible",
        MUON_PLAN,
        "return per_device, _moved(",
        "return 0, _moved(",
        f"{GROUPS}test_every_matrix_is_orthogonalised_once_in_the_whole_mesh[equal-1]",
    ),
    Mutant(
        "what comes back is not counted among the bytes",
        MUON_PLAN,
        "moved += 2 * mine",
        "moved += mine",
        f"{GROUPS}test_the_plan_of_a_stack_that_divides",
    ),
    Mutant(
        "fused blocks are one matrix",
        MATRIX_SPECS,
        "itertools.groupby(spec.blocks)",
        "itertools.groupby([sum(spec.blocks)])",
        f"{BLOCKS}test_blocks_equal_a_loop_over_matrices[latent and rotary key]",
    ),
    Mutant(
        "a block is scaled like the whole matrix",
        MATRIX_SPECS,
        "math.sqrt(max(s.fan_in, s.fan_out))",
        "math.sqrt(max(shape))",
        f"{BLOCKS}test_every_block_is_scaled_by_its_own_longer_side[keys and values of every head]",
    ),
    Mutant(
        "optax's dimension numbers are read the wrong way round",
        "k2jax/leaf_roles.py",
        "MatrixSpec(as_axes(x.reduction_axis), as_axes(x.output_axis))",
        "MatrixSpec(as_axes(x.output_axis), as_axes(x.reduction_axis))",
        f"{BLOCKS}test_dimension_numbers_of_optax_are_specs",
    ),
    Mutant(
        "values are cut where keys end in the other order",
        "k2jax/training/optimizer.py",
        "blocks=(attn.nope_dim, attn.v_dim)",
        "blocks=(attn.v_dim, attn.nope_dim)",
        "tests/test_optimizer_roles.py::test_per_head_cuts_queries_keys_and_values_and_nothing_else[latent]",
    ),
    Mutant(
        "optax's average is taken for a heavy ball",
        MUONCLIP,
        "mu=_filled(ours.mu, muon.mu, 1 / (1 - beta))",
        "mu=_filled(ours.mu, muon.mu, 1.0)",
        f"{PARITY}test_training_goes_on_from_a_state_of_optax_and_back",
    ),
    Mutant(
        "updates of float32 masters are rounded like bfloat16 gradients",
        MUONCLIP,
        "dtype = jnp.promote_types(grad.dtype, param.dtype)",
        "dtype = grad.dtype",
        "tests/test_optax_life.py::test_float32_masters_train_with_bfloat16_gradients",
    ),
    Mutant(
        "the heads of a fused weight are clipped in the wrong order",
        QK_CLIP,
        "head[list(place.heads.places)] = np.arange(place.count)",
        "head[list(place.heads.places)] = np.arange(place.count)[::-1]",
        f"{LAYOUTS}test_a_fused_weight_is_clipped_as_its_parts_are[flat]",
    ),
    Mutant(
        "a sibling's query grows without bound",
        QK_CLIP,
        "jnp.maximum(jnp.sqrt(lowest), highest / spec.max_growth)",
        "jnp.sqrt(lowest)",
        f"{LAYOUTS}test_growth_of_siblings_is_bounded_and_every_head_still_gets_its_own_factor[2.0-q1-0.5]",
    ),
    Mutant(
        "the projection before a norm is clipped with the gain behind it",
        QK_CLIP,
        '("q_norm",) if spec.q_norm else ("q", "q_bias")',
        '("q", "q_bias", "q_norm")',
        f"{LAYOUTS}test_gains_per_head_are_clipped_in_place_of_the_projections",
    ),
    Mutant(
        "the head that was clipped least is reported as the worst",
        QK_CLIP,
        "worst = jnp.argmin(everything)",
        "worst = jnp.argmax(everything)",
        f"{LAYOUTS}test_state_says_which_head_was_clipped_most",
    ),
    Mutant(
        "the log-sum-exp is averaged over rows",
        "k2jax/max_logits.py",
        "heads_last.max(axis=tuple(range(lse.ndim - 1)))",
        "heads_last.mean(axis=tuple(range(lse.ndim - 1)))",
        f"{LAYOUTS}test_lse_is_above_the_max_logit_by_at_most_the_log_of_the_number_of_keys[-1]",
    ),
)

MODEL_MUTANTS = (
    Mutant(
        "rotary pairs are halves apart",
        ROPE,
        "first_BTHF = x_BTHR[..., 0::2].astype(jnp.float32)\n        second_BTHF = x_BTHR[..., 1::2]",
        "first_BTHF = x_BTHR[..., : x_BTHR.shape[-1] // 2].astype(jnp.float32)\n"
        "        second_BTHF = x_BTHR[..., x_BTHR.shape[-1] // 2 :]",
        f"{LAYERS}test_rotary_positions_turn_neighbouring_pairs",
    ),
    Mutant(
        "YaRN slows the fast pairs and keeps the slow ones",
        ROPE,
        "(extra_F / cfg.factor * slowed_F + extra_F * (1.0 - slowed_F))",
        "(extra_F / cfg.factor * (1.0 - slowed_F) + extra_F * slowed_F)",
        f"{LAYERS}test_yarn_of_kimi_k2_is_a_step_between_pairs_19_and_20",
    ),
    Mutant(
        "YaRN's magnitude enters the softmax scale once",
        ROPE,
        "yarn_mscale(cfg.factor, cfg.mscale_all_dim) ** 2",
        "yarn_mscale(cfg.factor, cfg.mscale_all_dim)",
        f"{LAYERS}test_softmax_scale_before_and_after_the_extension",
    ),
    Mutant(
        "the router's bias is part of the weights",
        ROUTER,
        "jnp.where(chosen_BTJE, scores_BTE[:, :, None], 0.0)",
        'jnp.where(chosen_BTJE, (scores_BTE + p["bias"])[:, :, None], 0.0)',
        f"{LAYERS}test_the_bias_chooses_and_does_not_weigh",
    ),
    Mutant(
        "other groups are masked with zero",
        ROUTER,
        "jnp.where(kept_BTG[..., None], choice_BTGP, -jnp.inf)",
        "jnp.where(kept_BTG[..., None], choice_BTGP, 0.0)",
        f"{LAYERS}test_experts_of_other_groups_stay_out_when_every_bias_is_negative",
    ),
    Mutant(
        "the route scale is forgotten",
        ROUTER,
        " + 1e-20) * cfg.route_scale",
        " + 1e-20)",
        f"{FORWARD}[mla_without_q_lora]",
    ),
    Mutant(
        "dispatch drops the rows of a tile that is not full",
        DISPATCH,
        "sizes_E = -(-load_E // TILE) * TILE",
        "sizes_E = load_E // TILE * TILE",
        f"{FORWARD}[experts_only_two_shared]",
    ),
    Mutant(
        "a tile at the border of two groups takes the earlier group's matrix",
        "k2jax/kernels/grouped_matmul/xla.py",
        'side="right"',
        'side="left"',
        "tests/test_grouped_matmul.py::test_every_row_meets_the_matrix_of_its_group[xla-all groups]",
    ),
    Mutant(
        "positions run on across packed documents",
        MODEL,
        "return index_BT - sharding.like(jax.lax.cummax(starts_BT, axis=1), tokens_BT)",
        "return index_BT",
        "tests/test_model.py::test_positions_count_from_the_start_of_each_document",
    ),
    Mutant(
        "log probabilities are of the token itself",
        MODEL,
        "sharding.like(jnp.pad(sharding.whole(tokens_BT, 1)[:, 1:], ((0, 0), (0, 1))), tokens_BT)",
        "tokens_BT",
        "tests/test_paper_model.py::test_token_logprobs_are_the_log_softmax_of_the_logits",
    ),
    Mutant(
        "the shared experts' parameters count as routed",
        MODEL,
        "active -= experts - experts * cfg.moe.experts_per_token",
        "active -= experts - experts * (cfg.moe.experts_per_token + 1)",
        "tests/test_paper_model.py::test_released_k2_has_the_parameters_of_its_formula",
    ),
    Mutant(
        "a token's gradient misses all but its first expert",
        DISPATCH,
        "return _rows(grad_RD, plan).sum(axis=1), None",
        "return _rows(grad_RD, plan)[:, 0], None",
        f"{LAYERS}test_there_and_back_equals_plain_indexing_with_autodiff[random]",
    ),
    Mutant(
        "padding tokens count in the load",
        "k2jax/layers/moe.py",
        " & valid_BT[..., None, None]",
        "",
        f"{LAYERS}test_padding_tokens_are_computed_and_counted_nowhere",
    ),
    Mutant(
        "the norm's epsilon is added outside the root",
        "k2jax/layers/norm.py",
        "jax.lax.rsqrt(jnp.mean(jnp.square(y_D), axis=-1, keepdims=True) + eps)",
        "(jax.lax.rsqrt(jnp.mean(jnp.square(y_D), axis=-1, keepdims=True)) + eps)",
        f"{LAYERS}test_the_norm_adds_epsilon_under_the_root",
    ),
    Mutant(
        "each device keeps its own queries' max logits",
        "k2jax/kernels/partition.py",
        "lax.pmax(lax.stop_gradient(x), axes)",
        "x",
        "tests/test_partition.py::test_attention_is_the_same_however_it_is_cut",
    ),
    Mutant(
        "every part of a sequence believes to be its beginning",
        "k2jax/kernels/partition.py",
        "lax.axis_index(queries) * T",
        "0 * T",
        "tests/test_partition.py::test_attention_is_the_same_however_it_is_cut",
    ),
    Mutant(
        "halves that were exchanged come back to where they were computed",
        "k2jax/kernels/partition.py",
        "[pair[::-1] for pair in pairs] if back else pairs",
        "pairs",
        BALANCED,
    ),
    Mutant(
        "the second half of a device takes the position of the first",
        "k2jax/kernels/partition.py",
        "jnp.where(here % 2 == odd, here, 2 * n - 1 - here)",
        "jnp.where(here % 2 == 0, here, 2 * n - 1 - here)",
        BALANCED,
    ),
    Mutant(
        "parts of an expert's hidden units are not added up",
        "k2jax/layers/moe.py",
        "y_BTD = jax.lax.psum(y_BTD, summed)",
        "pass",
        "tests/test_expert_parallel.py::test_experts_are_the_same_on_every_mesh",
    ),
    Mutant(
        "every device believes to hold the first experts",
        "k2jax/layers/moe.py",
        "first = jax.lax.axis_index(experts) * here if experts else 0",
        "first = 0",
        "tests/test_expert_parallel.py::test_experts_are_the_same_on_every_mesh",
    ),
    Mutant(
        "the balance rule punishes experts with too few tokens",
        ROUTER,
        "jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)",
        "jnp.sign(load_E - load_E.mean(axis=-1, keepdims=True))",
        f"{LAYERS}test_the_bias_rises_where_the_load_is_low_and_its_mean_stays",
    ),
    Mutant(
        "the norms inside of MLA take the blocks' epsilon",
        "k2jax/layers/mla.py",
        'rms_norm(p["kv_norm"], c_BTC, LATENT_EPS)',
        'rms_norm(p["kv_norm"], c_BTC, cfg.norm_eps)',
        f"{GOLDEN}test_logits_and_chosen_experts[coarse_epsilon]",
    ),
    Mutant(
        "cos and sin miss the ratio of YaRN's two magnitudes",
        ROPE,
        "magnitude = yarn_mscale(cfg.factor, cfg.mscale) / yarn_mscale(cfg.factor, cfg.mscale_all_dim)",
        "magnitude = 1.0",
        f"{GOLDEN}test_logits_and_chosen_experts[coarse_epsilon]",
    ),
    Mutant(
        "a group is scored by its best expert alone",
        ROUTER,
        "jax.lax.top_k(choice_BTGP, 2)[0].sum(axis=-1)",
        "jax.lax.top_k(choice_BTGP, 1)[0].sum(axis=-1)",
        f"{GOLDEN}test_logits_and_chosen_experts[expert_groups]",
    ),
    Mutant(
        "pinned experts are ignored",
        MODEL,
        'pinned = routing if group == "moe" else None',
        "pinned = None",
        f"{GOLDEN}test_pinned_experts_are_used_whatever_the_bias_says[kimi_k2]",
    ),
    Mutant(
        "no gradient reaches the router through its weights",
        ROUTER,
        "jnp.where(chosen_BTJE, scores_BTE[:, :, None], 0.0)",
        "jnp.where(chosen_BTJE, jax.lax.stop_gradient(scores_BTE)[:, :, None], 0.0)",
        f"{GOLDEN}test_gradients_of_the_mean_cross_entropy",
    ),
)

TRAINING_MUTANTS = (
    Mutant(
        "the loss mask is ignored",
        STEP,
        'nats = -jnp.sum(logp_BT * batch["loss_mask"]) / num_targets',
        "nats = -jnp.sum(logp_BT) / num_targets",
        f"{ONE_STEP}test_what_the_mask_hides_leaves_no_trace",
    ),
    Mutant(
        "the mean is over all positions, hidden ones too",
        STEP,
        'num_targets = jnp.maximum(batch["loss_mask"].sum(), 1.0)',
        'num_targets = float(batch["loss_mask"].size)',
        f"{ONE_STEP}test_the_loss_is_the_mean_over_the_predicted_tokens",
    ),
    Mutant(
        "max logits of micro-batches are added in the step",
        STEP,
        "jax.tree.map(jnp.maximum, carry[1], highest)",
        "jax.tree.map(jnp.add, carry[1], highest)",
        f"{ONE_STEP}test_micro_batches_add_losses_and_take_the_largest_max_logit",
    ),
    Mutant(
        "the guard keeps what is broken and drops what is sound",
        STEP,
        "jnp.where(finite, a, b), new, old)",
        "jnp.where(finite, b, a), new, old)",
        f"{ONE_STEP}test_a_sound_step_is_taken_and_a_broken_one_is_not",
    ),
    Mutant(
        "the schedule of a later stage counts the tokens of the whole run",
        "k2jax/training/schedules.py",
        "(step - part.start + 1.0) * per_step",
        "(step + 1.0) * per_step",
        "tests/test_stages.py::test_every_stage_has_a_schedule_of_its_own",
    ),
    Mutant(
        "a stage forgets what the stage before it changed",
        "k2jax/config/load.py",
        "        current = _merge(current, stage)\n        complete.append(current)",
        "        complete.append(_merge(current, stage))",
        "tests/test_stages.py::test_a_stage_is_the_stage_before_it_with_its_changes",
    ),
    Mutant(
        "the cosine ends at zero",
        "k2jax/training/schedules.py",
        "final + (peak - final) * left",
        "peak * left",
        f"{TRAINING}test_the_schedule_at_its_boundaries",
    ),
    Mutant(
        "the schedule counts from zero tokens, so the first step has no rate",
        "k2jax/training/schedules.py",
        "(step - part.start + 1.0) * per_step",
        "(step - part.start) * per_step",
        f"{TRAINING}test_the_schedule_counts_tokens_not_steps",
    ),
    Mutant(
        "a spike is a loss that falls",
        METRICS,
        "loss > median + self.WIDTH",
        "loss < median - self.WIDTH",
        f"{TRAINING}test_a_spike_stands_out_and_ordinary_noise_does_not",
    ),
    Mutant(
        "a resumed log keeps a line past the checkpoint",
        METRICS,
        'if line["step"] <= first_step]',
        'if line["step"] <= first_step + 1]',
        f"{TRAINING}test_history_is_what_was_written_up_to_the_checkpoint",
    ),
    Mutant(
        "a checkpoint's fingerprint is not compared",
        "k2jax/training/checkpoints.py",
        "        if wrong:\n",
        "        if wrong and not found:\n",
        "tests/test_checkpoints.py::test_a_flipped_bit_that_still_decodes_is_told",
    ),
    Mutant(
        "the fingerprint sees a number's lower half only",
        "k2jax/training/checkpoints.py",
        "unsigned[x.dtype.itemsize]).astype(jnp.uint32)",
        "unsigned[x.dtype.itemsize]).astype(jnp.uint8)",
        "tests/test_checkpoints.py::test_the_fingerprint_sees_every_bit",
    ),
)

DATA_MUTANTS = (
    Mutant(
        "windows overlap by one token too many",
        "k2jax/data/packing.py",
        "start = int(index) * self._seq_len",
        "start = int(index) * (self._seq_len - 1)",
        f"{DATA}test_segments_and_mask_of_a_window_written_by_hand",
    ),
    Mutant(
        "the loss sees the border between two documents",
        "k2jax/data/packing.py",
        "loss_mask[:real] = document[1:] == document[:-1]",
        "loss_mask[:real] = 1",
        f"{DATA}test_windows_predict_every_token_of_the_stream_exactly_once[7]",
    ),
    Mutant(
        "every epoch has the same order",
        "k2jax/data/pipeline.py",
        ".shuffle(seed=_spread(seed, k)).repeat()",
        ".shuffle(seed=_spread(seed, k)).repeat(reseed_each_epoch=False)",
        f"{DATA}test_each_epoch_holds_every_window_once_in_a_new_order",
    ),
    Mutant(
        "a resumed stream skips a batch",
        "k2jax/data/pipeline.py",
        '{"next_index": batches}',
        '{"next_index": batches + (batches > 0)}',
        f"{DATA}test_state_after_n_batches_gives_batch_n_plus_1_next[0]",
    ),
    Mutant(
        "a new stage reads its sources from the beginning",
        "k2jax/data/pipeline.py",
        'start, left = state["position"], {}',
        'start, left = state["stage_start"], {}',
        f"{MIXTURE}test_new_weights_and_batch_sizes_lose_and_repeat_no_window[0]",
    ),
    Mutant(
        "windows of another length go on inside a pass",
        "k2jax/data/pipeline.py",
        "passes = [-(-n // size) for",
        "passes = [n // size for",
        f"{MIXTURE}test_another_window_length_starts_a_new_pass_and_tells_what_was_left",
    ),
    Mutant(
        "every row of the mixture counts as a row of each source",
        "k2jax/data/pipeline.py",
        "n = self.stage_start[k] + self._shares.counts(row)[k]",
        "n = self.stage_start[k] + row",
        f"{MIXTURE}test_every_window_comes_once_in_each_pass_over_its_source",
    ),
    Mutant(
        "each process feeds the first rows",
        "k2jax/data/pipeline.py",
        "return [batch * self._batch_size + row for row in self._rows]",
        "return [batch * self._batch_size + i for i in range(len(self._rows))]",
        f"{MIXTURE}test_rows_do_not_depend_on_processes_or_threads[0]",
    ),
    Mutant(
        "changed weights pass for the saved ones",
        "k2jax/data/pipeline.py",
        "        self._refuse_changes(state, self._identity)\n",
        '        self._refuse_changes(state, self._identity | {"weights": state["weights"]})\n',
        f"{MIXTURE}test_a_changed_mixture_is_refused_with_the_difference_and_the_fix[weights]",
    ),
    Mutant(
        "whoever is furthest behind comes first",
        "k2jax/data/mixture.py",
        "key=lambda k: Fraction((scale - 1) * period - scale * behind[k], parts[k])",
        "key=lambda k: -behind[k]",
        f"{MIXTURE}test_counts_never_leave_the_proven_bound_and_are_exact_after_a_period[0]",
    ),
    Mutant(
        "a process gives its devices its first rows",
        "k2jax/training/feed.py",
        "at = int(np.searchsorted(self._sequences, first))",
        "at = 0",
        "tests/test_feed.py::test_every_device_gets_the_rows_and_tokens_that_the_mesh_gives_it[mesh0]",
    ),
    Mutant(
        "nats pass for bits",
        "k2jax/data/pipeline.py",
        "total_nats / math.log(2) / self.num_bytes",
        "total_nats / self.num_bytes",
        f"{DATA}test_bits_per_byte_of_a_uniform_guess_charges_eos_to_the_bytes",
    ),
    Mutant(
        "the first layers of an attention list are full, not the last",
        "configs/common.py",
        '(kind,) * (num_layers - full_last) + ("full",) * full_last',
        '("full",) * full_last + (kind,) * (num_layers - full_last)',
        "tests/test_config.py::test_the_last_layers_of_an_attention_list_are_full",
    ),
)

REPORT_MUTANTS = (
    Mutant(
        "the own block counts as a pick of the gate",
        "k2jax/report/moba.py",
        "np.add.at(share_HQC, (h, row_T[t], selected_HTJ[h, t, j + 1]), 1)",
        "np.add.at(share_HQC, (h, row_T[t], selected_HTJ[h, t, j]), 1)",
        "tests/test_report.py::test_block_shares_count_gate_picks_and_leave_the_own_block_out",
    ),
    Mutant(
        "a thinned curve loses its peaks",
        "k2jax/report/svg.py",
        "stats = (finite.mean(), finite.min(), finite.max())",
        "stats = (finite.mean(),) * 3",
        "tests/test_report.py::test_thin_keeps_extremes_and_shows_gaps",
    ),
)

SHARDS = "k2jax/data/shards.py"
PREPARE = "k2jax/data/prepare.py"
K2 = "k2jax/data/tokenizers/k2.py"
HUGGING_FACE = "k2jax/data/tokenizers/hugging_face.py"
IN_SHARDS = "tests/test_shards.py::"
IN_TOKENIZERS = "tests/test_tokenizers.py::"
SAME_STREAM = f"{IN_SHARDS}test_shards_are_the_stream_that_memory_holds[3-uint16]"

SOURCE_MUTANTS = (
    Mutant(
        "documents of a later shard start where those of the first do",
        SHARDS,
        "np.concatenate([s + offset for s, offset in",
        "np.concatenate([s + 0 * offset for s, offset in",
        SAME_STREAM,
    ),
    Mutant(
        "a read within a later part begins at the part's first token",
        "k2jax/data/stream.py",
        "yield part, start - begin, end - begin",
        "yield part, 0, end - start",
        f"{IN_SHARDS}test_joined_streams_are_one_after_the_other",
    ),
    Mutant(
        "a shard's last piece repeats tokens of an earlier one",
        SHARDS,
        "self._rest = waiting[full:]",
        "self._rest = waiting[: len(waiting) - full]",
        SAME_STREAM,
    ),
    Mutant(
        "shards of another tokenizer are read",
        SHARDS,
        "tokenizer.fingerprint != self.index.tokenizer_fingerprint",
        "tokenizer.vocab_size < self.index.vocab_size",
        f"{IN_SHARDS}test_the_wrong_tokenizer_or_no_index_is_refused",
    ),
    Mutant(
        "two tokenizers with equal ids give one fingerprint",
        "k2jax/data/stream.py",
        'hashlib.sha256(tokenizer.fingerprint.encode() + b"\\0")',
        'hashlib.sha256(b"\\0")',
        f"{IN_SHARDS}test_equal_ids_of_another_tokenizer_are_another_stream",
    ),
    Mutant(
        "shards that do not add up to the plan are complete",
        PREPARE,
        "if found != planned:",
        "if found < 0:",
        f"{IN_SHARDS}test_shards_that_do_not_add_up_to_the_plan_are_refused",
    ),
    Mutant(
        "a finished shard is taken as it is",
        PREPARE,
        "            verify(folder, shard, token_dtype(tokenizer.vocab_size))\n",
        "",
        f"{IN_SHARDS}test_a_damaged_shard_is_named_by_the_next_run",
    ),
    Mutant(
        "a document's name depends on how its folder is written",
        "k2jax/data/sources/files.py",
        "name = file.relative_to(root).as_posix()",
        'name = str(file)[len(str(root)) :].lstrip("/")',
        "tests/test_sources.py::test_names_do_not_depend_on_how_the_place_is_written[.]",
    ),
    Mutant(
        "ids that the tokenizer does not have are drawn",
        "k2jax/inference/sampling.py",
        "[0, 0])[:vocab_size]",
        "[0, 0])",
        "tests/test_sampling.py::test_ids_that_the_tokenizer_does_not_have_are_never_drawn",
    ),
    Mutant(
        "a source that changed between counting and tokenising is not seen",
        PREPARE,
        "if digest.hexdigest() != plan.sha256:",
        "if not digest.hexdigest():",
        f"{IN_SHARDS}test_a_source_that_changes_meanwhile_is_refused",
    ),
    Mutant(
        "a tokenizer is trained on held-out text",
        PREPARE,
        '_split(document, request) == "train" and is_chosen',
        "is_chosen",
        f"{IN_SHARDS}test_a_tokenizer_is_trained_on_the_training_text_alone",
    ),
    Mutant(
        "vendored copies are trained on again",
        "k2jax/data/sources/installed.py",
        "        seen.add(digest)\n",
        "",
        "tests/test_sources.py::test_packages_source_keeps_text_that_people_wrote",
    ),
    Mutant(
        "special tokens in a document become control tokens of K2",
        K2,
        "allow_special: bool = False",
        "allow_special: bool = True",
        f"{IN_TOKENIZERS}test_k2_in_a_document_special_tokens_are_text",
    ),
    Mutant(
        "K2's long runs are cut one character late",
        K2,
        "range(run.start() + _LONGEST_RUN,",
        "range(run.start() + _LONGEST_RUN + 1,",
        f"{IN_TOKENIZERS}test_k2_cuts_long_texts_and_long_runs_where_the_release_does",
    ),
    Mutant(
        "special tokens in a document become control tokens of a Hugging Face tokenizer",
        HUGGING_FACE,
        "encode_special_tokens = True",
        "encode_special_tokens = False",
        f"{IN_TOKENIZERS}test_hf_in_a_document_special_tokens_are_text",
    ),
    Mutant(
        "a Hugging Face tokenizer cuts documents as its file asks",
        HUGGING_FACE,
        "        self._tokenizer.no_truncation()\n",
        "",
        f"{IN_TOKENIZERS}test_hf_what_the_file_would_do_to_a_text_is_switched_off",
    ),
)

RUNNING_MUTANTS = (
    Mutant(
        "copies of a run train side by side where srun is missing",
        "k2jax/training/distributed.py",
        'if "SLURM_STEP_NODELIST" not in env:',
        'if "SLURM_JOB_NODELIST" in env:',
        "tests/test_distributed.py::test_copies_that_would_train_side_by_side_are_refused[a batch script without srun]",
    ),
    Mutant(
        "several slices of one host count as one process",
        "k2jax/training/distributed.py",
        "if hosts > 1 or slices > 1:",
        "if hosts > 1:",
        "tests/test_distributed.py::test_the_environment_decides_whether_jax_is_asked[two slices]",
    ),
    Mutant(
        "two processes with one id count as two",
        "k2jax/training/distributed.py",
        "if process in here and not _has_left(here[process]):",
        "if process in here and _has_left(here[process]):",
        "tests/test_distributed.py::test_two_processes_with_one_id",
    ),
    Mutant(
        "a damaged cache entry stays where it is",
        "k2jax/training/compile_cache.py",
        "entry.unlink(missing_ok=True)",
        "entry.touch()",
        "tests/test_compile_cache.py::test_damaged_entries_are_told_replaced_and_change_no_number",
    ),
    Mutant(
        "others may write what this user runs",
        "k2jax/training/compile_cache.py",
        "mode=0o700",
        "mode=0o755",
        "tests/test_compile_cache.py::test_the_second_start_hits_gives_the_same_bits_and_the_folder_is_the_users_own",
    ),
    Mutant(
        "a resumed run repeats steps in its tracker",
        METRICS,
        'line["step"] > self._tracked',
        'line["step"] > 0',
        "tests/test_trackers.py::test_a_resumed_run_continues_the_trackers_run_and_repeats_no_step[trackio]",
    ),
    Mutant(
        "every start is a new run of the tracker",
        "k2jax/training/trackers.py",
        "    if spec in known:\n",
        "    if spec not in known and known:\n",
        "tests/test_trackers.py::test_a_resumed_run_continues_the_trackers_run_and_repeats_no_step[wandb]",
    ),
    Mutant(
        "the training waits for its tracker for ever",
        "k2jax/training/trackers.py",
        "self._thread.join(PATIENCE)",
        "self._thread.join(PATIENCE * 100)",
        "tests/test_trackers.py::test_a_tracker_that_hangs_holds_nothing_up[log]",
    ),
    Mutant(
        "slow steps count as hangs",
        "k2jax/training/watchdog.py",
        "max(LEAST, TIMES * statistics.median(self._steps))",
        "min(LEAST, TIMES * statistics.median(self._steps))",
        "tests/test_watchdog.py::test_the_limit_is_ten_median_steps_and_five_minutes_at_least",
    ),
    Mutant(
        "a sign of life does not reset the watchdog",
        "k2jax/training/watchdog.py",
        "self._since, self._next = now - self._since, now, now + self.limit",
        "self._since, self._next = now - self._since, now, self._next or now + self.limit",
        "tests/test_watchdog.py::test_signs_of_life_and_rest_keep_it_quiet",
    ),
    Mutant(
        "a point of another length counts as finished",
        "experiments/sweep_results.py",
        'lines[-1]["step"] == steps',
        'lines[-1]["step"] > 0',
        "tests/test_sweep.py::test_a_point_cut_short_is_not_finished",
    ),
    Mutant(
        "a point of another config counts as finished",
        "experiments/sweep_results.py",
        "config == json.loads(json.dumps(dataclasses.asdict(point.cfg)))",
        "isinstance(config, dict)",
        "tests/test_sweep.py::test_a_finished_point_has_its_config_evaluation_checkpoint_and_page",
    ),
    Mutant(
        "the worst point comes first",
        "experiments/sweep_results.py",
        'else r["bits_per_byte"])',
        'else -r["bits_per_byte"])',
        "tests/test_sweep.py::test_the_best_comes_first_and_what_has_no_number_last",
    ),
    Mutant(
        "all jobs share the first GPU",
        "experiments/sweep_jobs.py",
        "tuple(gpus[i::jobs]) or (gpus[i % len(gpus)],)",
        "tuple(gpus[0:1])",
        "tests/test_sweep.py::test_gpus_are_dealt_out_in_turn[4-gpus1-expected1]",
    ),
    Mutant(
        "long names of different points become one folder",
        "experiments/sweep_points.py",
        'return f"{safe[: LONGEST - 9]}-{hashlib.sha256(raw.encode()).hexdigest()[:8]}"',
        "return safe[:LONGEST]",
        "tests/test_sweep.py::test_names_are_short_safe_and_follow_from_the_settings_alone",
    ),
)

MEMORY = "k2jax/training/memory.py"
MACHINE_MUTANTS = (
    Mutant(
        "memory is that of all devices together",
        MEMORY,
        "return whole // math.prod(mesh.shape[axis] for axis in axes)",
        "return whole",
        "tests/test_memory.py::test_a_mesh_larger_than_this_machine_divides_what_it_cuts",
    ),
    Mutant(
        "a step that does not fit is only warned of",
        MEMORY,
        "if memory.total > has.limit:",
        "if memory.total > 2 * has.limit:",
        "tests/test_memory.py::test_between_90_and_100_percent_it_warns",
    ),
    Mutant(
        "simulated devices each have the whole host",
        MEMORY,
        "return Capacity(limit // devices,",
        "return Capacity(limit,",
        "tests/test_memory.py::test_simulated_devices_share_the_host",
    ),
    Mutant(
        "the doctor compares values alone",
        "k2jax/diagnostics/ops.py",
        'return {"value": result, "gradient": pull([_cotangent(leaf) for leaf in leaves])}',
        'return {"value": result}',
        "tests/test_doctor.py::test_a_wrong_op_fails_and_says_how[gradient]",
    ),
    Mutant(
        "the doctor takes what is no number for right",
        "k2jax/diagnostics/ops.py",
        "float(difference / (size or 1.0)) if np.isfinite(difference) else np.inf",
        "float(np.nan_to_num(difference / (size or 1.0)))",
        "tests/test_doctor.py::test_a_wrong_op_fails_and_says_how[not a number]",
    ),
    Mutant(
        "a wrong op leaves the doctor's status 0",
        "experiments/doctor.py",
        'sys.exit(1 if found["wrong"] else 0)',
        "sys.exit(0)",
        "tests/test_doctor.py::test_a_wrong_op_ends_with_1_and_stops_nothing",
    ),
    Mutant(
        "a wrong collective passes",
        "k2jax/diagnostics/rates.py",
        "bool(np.array_equal(got, right(host, devices)))",
        "bool(got.size)",
        "tests/test_doctor.py::test_collectives_over_eight_devices_are_measured_and_checked",
    ),
)

KERNELS_MUTANTS = (
    Mutant(
        "a network's halves meet as they lie",
        "k2jax/kernels/moba/many_best_sm90.py",
        "_exchange(ops, x, size - 1, falling)",
        "_exchange(ops, x, size // 2, falling)",
        "tests/test_gate_lists.py::test_the_network_sorts[many equal-True]",
    ),
    Mutant(
        "new numbers fall as the list does",
        "k2jax/kernels/moba/many_best_sm90.py",
        "rising = sort(ops, new, falling=False)",
        "rising = sort(ops, new, falling=True)",
        "tests/test_gate_lists.py::test_a_list_and_new_numbers_become_the_list_of_the_largest[different]",
    ),
    Mutant(
        "of equal scores the later block wins",
        "k2jax/kernels/moba/many_best_sm90.py",
        "return arith.xori(block, utils.c(-1, _i32()))",
        "return arith.xori(block, utils.c(0, _i32()))",
        "tests/test_gate_lists.py::test_numbers_rise_with_scores_and_fall_with_blocks_of_equal_ones",
    ),
    Mutant(
        "minus zero is less than zero",
        "k2jax/kernels/moba/many_best_sm90.py",
        "arith.subi(utils.c(INT_MIN, _i32()), bits)",
        "arith.xori(utils.c(2**31 - 1, _i32()), bits)",
        "tests/test_gate_lists.py::test_both_zeros_are_one_score",
    ),
    Mutant(
        "every turn's tickets are those of the first heads",
        "k2jax/kernels/attention/tiles_sm90.py",
        "return (turn * heads + head) * num_tiles + (num_tiles - 1 - tiles_behind)",
        "return (0 * turn + head) * num_tiles + (num_tiles - 1 - tiles_behind)",
        "tests/test_tickets.py::test_every_tile_has_one_ticket_and_a_turn_begins_with_the_last_rows[2-700-4-2-2]",
    ),
    Mutant(
        "a ticket is told before it is written down",
        "k2jax/kernels/attention/tickets_sm90.py",
        'ticket = lax.axis_size("sm") + tickets.ticket_R[slot]',
        'ticket = lax.axis_size("sm") + tickets.ticket_R[1 - slot]',
        f"{HOPPER_IS_EXACT}[packed documents]",
    ),
    Mutant(
        "a search is a loop of small kernels again",
        "k2jax/kernels/moba/grouping.py",
        'method="scan_unrolled"',
        'method="scan"',
        "tests/test_reach.py::test_no_search_is_a_loop_of_small_kernels",
    ),
    Mutant(
        "a step is clear when its first row has not yet begun behind the unit",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "for row in (0, ROWS - 1))",
        "for row in (0, 0))",
        f"{REACH}[packed documents]",
    ),
    Mutant(
        "a unit is read until a document begins behind its first key",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "key_U + UNIT - 1) for row in",
        "key_U) for row in",
        f"{REACH}[packed documents]",
    ),
    Mutant(
        "keys before a chunk are of the document in which its last query is",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "jnp.maximum(key_U + UNIT - 1 - starts.position_B[:, None], 0)",
        "key_U + UNIT - 1 - starts.position_B[:, None]",
        f"{REACH}[a chunk]",
    ),
    Mutant(
        "rows of a document that begins in a unit send gradients to the one before it",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "jnp.where(first_key > 0, self.clear_from, clear_to)",
        "clear_to",
        f"{HOPPER_IS_EXACT}[full, packed documents]",
    ),
    Mutant(
        "a tile sees its first row's document from its last row on",
        "k2jax/kernels/attention/tiles_sm90.py",
        "last_start = start_BT[batch, first_row + (TILE - 1)]",
        "last_start = start_BT[batch, first_row]",
        f"{HOPPER_IS_EXACT}[full, packed documents]",
    ),
    Mutant(
        "the second batch row of a cache begins where the first one does",
        "k2jax/kernels/attention/tiles_sm90.py",
        "position_B[batch if position_B.shape[0] > 1 else 0]",
        "position_B[0]",
        f"{HOPPER_IS_EXACT}[full, a chunk of the queries]",
    ),
    Mutant(
        "a chunk's keys count their own rows as if they lay at the keys' positions",
        "k2jax/kernels/moba/sm90.py",
        '({"starts": starts} if is_together else {})',
        "({} if is_together else {})",
        f"{HOPPER_IS_EXACT}[a chunk of the queries]",
    ),
    Mutant(
        "a moved block is lost where the next one is equal",
        "k2jax/kernels/moba/few_best_sm90.py",
        "better_Q = moved_Q = moved_Q | (score_Q > have_Q)",
        "better_Q = moved_Q = score_Q > have_Q",
        f"{HOPPER_GATE}[more than a step of blocks]",
    ),
    Mutant(
        "multiprocessors without a tile take the one before the first",
        "k2jax/kernels/attention/tiles_sm90.py",
        "share = rounds + has_one_more.astype(jnp.int32)",
        "share = rounds + 1",
        f"{HOPPER_GATE}[fewer tiles than multiprocessors]",
    ),
    Mutant(
        "one of those who share the tiles gets a second helping",
        "k2jax/kernels/attention/shares_sm90.py",
        "table[0, sm], table[1 : 1 + len(share), sm] = len(share), share",
        "table[0, sm], table[1 : 1 + len(share), sm] = len(table) - 1, share",
        "tests/test_tile_shares.py::test_every_tile_is_in_one_share[equal tiles]",
    ),
    Mutant(
        "all heads are attended to at a time",
        "k2jax/kernels/attention/shares_sm90.py",
        "heads = heads_at_a_time(num_key_heads, bytes_of_a_head) * group",
        "heads = num_key_heads * group",
        "tests/test_tile_shares.py::test_key_heads_take_turns_and_a_turn_begins_with_the_longest_tiles",
    ),
    Mutant(
        "scores that are all but zero are not enlarged",
        "k2jax/kernels/moba/gate_sm90.py",
        "ENLARGED = 2.0**60",
        "ENLARGED = 1.0",
        f"{HOPPER_GATE}[scores that are all but zero]",
    ),
    Mutant(
        "a row's lines lie behind each other",
        "k2jax/kernels/attention/gather_sm90.py",
        "in_columns = arith.addi(arith.muli(group, number(columns)), number(c))",
        "in_columns = arith.addi(arith.muli(group, number(1)), number(c))",
        "tests/test_moba_sm90.py::test_a_row_is_copied_to_where_tiles_have_it[192]",
    ),
    Mutant(
        "nobody keeps pace",
        "k2jax/kernels/attention/tiles_sm90.py",
        "is_near = self.block_size < self.length or",
        "is_near = True or",
        "tests/test_moba_sm90.py::test_multiprocessors_keep_pace_over_one_long_document_alone",
    ),
    Mutant(
        "all keys are copied for every chunk of a prefill",
        "k2jax/kernels/moba/sm90.py",
        "return block_size % TILE > 0 or segment_ids is not None",
        "return True",
        "tests/test_moba_sm90.py::test_keys_of_a_chunk_are_read_as_they_lie",
    ),
    Mutant(
        "who has finished is waited for",
        "k2jax/kernels/attention/pace_sm90.py",
        "jnp.int32(STEPS)), parts)",
        "jnp.int32(STEPS)) + 1, parts)",
        "tests/test_pace.py::test_every_share_begins_every_part_once[65]",
    ),
    Mutant(
        "all wait for a part that they have yet to begin",
        "k2jax/kernels/attention/pace_sm90.py",
        "passed_P.at[part - AHEAD]",
        "passed_P.at[part + 1]",
        "tests/test_pace.py::test_every_share_begins_every_part_once[200]",
    ),
    Mutant(
        "the largest share is the one of most tiles",
        "k2jax/kernels/attention/shares_sm90.py",
        "return int((steps_LM * is_one_LM).sum(axis=0).max())",
        "return int((steps_LM * is_one_LM).sum(axis=0)[share_LM[0].argmax()])",
        "tests/test_pace.py::test_the_largest_share_is_found_by_its_steps",
    ),
    Mutant(
        "the next tile is the one after the next",
        "k2jax/kernels/attention/tiles_sm90.py",
        "jnp.minimum(here + 2,",
        "jnp.minimum(here + 3,",
        f"{HOPPER_IS_EXACT}[full]",
    ),
    Mutant(
        "the gate offers a query its own block",
        "k2jax/kernels/moba/gate_sm90.py",
        "(block_QN < end_QN)",
        "(block_QN <= end_QN)",
        f"{HOPPER_GATE}[ties]",
    ),
    Mutant(
        "the Hopper kernel hides a query's own key",
        "k2jax/kernels/attention/tiles_sm90.py",
        "seen_QN = row_QN + (row + first) >= key_QN",
        "seen_QN = row_QN + (row + first) > key_QN",
        f"{HOPPER_IS_EXACT}[full]",
    ),
    Mutant(
        "the softmax's sum is not rescaled with the maximum",
        "k2jax/kernels/attention/tiles_sm90.py",
        "sum_Q = sum_Q * faded_Q + p_QN.sum(axis=1)",
        "sum_Q = sum_Q + p_QN.sum(axis=1)",
        f"{HOPPER_IS_EXACT}[full]",
    ),
    Mutant(
        "delta is left out of the keys' gradient",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "ds_NQ = p_NQ * (dp_NQ - lax.broadcast_in_dim(delta_Q, dp_NQ.shape, [1]))",
        "ds_NQ = p_NQ * dp_NQ",
        f"{HOPPER_IS_EXACT}[full]",
    ),
    Mutant(
        "with few registers left, the values get no gradient",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "            plgpu.wgmma(dv_NV, p_NQ.astype(dtype), dout_QV)\n            plgpu.wgmma(dp_NQ",
        "            plgpu.wgmma(dp_NQ",
        f"{HOPPER_IS_EXACT}[full MLA]",
    ),
    Mutant(
        "own queries of the first head count for every head",
        "k2jax/kernels/attention/keys_gradient_sm90.py",
        "self.key_head * self.num_own_heads + r",
        "self.key_head * self.num_own_heads + 0 * r",
        f"{HOPPER_IS_EXACT}[full]",
    ),
    Mutant(
        "probabilities behind the last query are one",
        "k2jax/kernels/attention/sm90.py",
        "lse_BHT = jnp.pad(lse_BHT, to_tile, constant_values=jnp.inf)",
        "lse_BHT = jnp.pad(lse_BHT, to_tile, constant_values=jnp.nan)",
        f"{HOPPER_IS_EXACT}[full]",
    ),
    Mutant(
        "a chosen block's part is weighed as if it were alone",
        "k2jax/kernels/moba/pairs.py",
        "weight_of(lse_BHJT[:, :, j])",
        "weight_of(joined_BHT)",
        f"{HOPPER_IS_EXACT}[a tile and a half, grouped heads]",
    ),
    Mutant(
        "gathered queries are those of the first key head",
        "k2jax/kernels/moba/sm90.py",
        "index_P = (head_P // H * T + t_P) * H + head_P % H",
        "index_P = (head_P // H * T + t_P) * H",
        f"{HOPPER_IS_EXACT}[a tile and a half, grouped heads]",
    ),
    Mutant(
        "the fused gradient of queries is not scaled",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "(dq_BHTK * scale)",
        "dq_BHTK",
        f"{HOPPER_FUSED}[full, two units, grouped heads]",
    ),
    Mutant(
        "every unit of keys stores its part of dq over the others'",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        'copy("add")',
        "copy(None)",
        f"{HOPPER_FUSED}[full, two units, grouped heads]",
    ),
    Mutant(
        "what keys are told of a step is multiplied with another step's queries",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "step.wg], mem.q_RQK.at[slot])",
        "step.wg], mem.q_RQK.at[1 - slot])",
        f"{HOPPER_FUSED}[full, two units, grouped heads]",
    ),
    Mutant(
        "delta is read where lse lies",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "lse_delta_2RQ.at[1, slot], layout",
        "lse_delta_2RQ.at[0, slot], layout",
        f"{HOPPER_FUSED}[full, two units, grouped heads]",
    ),
    Mutant(
        "the first unit of a later document adds to what nobody stored",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "return self.number - lax.div(self.start_BT",
        "return self.number + 0 * lax.div(self.start_BT",
        f"{HOPPER_FUSED}[full, documents of grouped heads]",
    ),
    Mutant(
        "keys are told of queries that begin behind them",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "seen_NQ &= key_NQ >= lax.broadcast_in_dim(start_Q, key_NQ.shape, [1])",
        "seen_NQ &= key_NQ >= lax.broadcast_in_dim(start_Q, key_NQ.shape, [1]) - 1000",
        f"{HOPPER_FUSED}[full, documents of grouped heads]",
    ),
    Mutant(
        "clear rows of a unit see the document that ends in it",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "key_NQ >= step.unit.first_key",
        "key_NQ >= 0",
        f"{HOPPER_FUSED}[full, documents of grouped heads]",
    ),
    Mutant(
        "rows behind a unit's last document are of it",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "jnp.where(start_Q < step.unit.start + UNIT, lse_Q, jnp.inf)",
        "jnp.where(start_Q < step.unit.start + 2 * UNIT, lse_Q, jnp.inf)",
        f"{HOPPER_FUSED}[full, documents of grouped heads]",
    ),
    Mutant(
        "a step behind the last query adds in another head's turn",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "starts.start_BT[:, : -(-T // ROWS) * ROWS]",
        "starts.start_BT",
        f"{HOPPER_FUSED}[full, queries in a cache with room]",
    ),
    Mutant(
        "a warp stops asking when its first row needs no more",
        "k2jax/kernels/moba/few_best_sm90.py",
        "any_of_warp(score_Q - best[-1][0])",
        "any_of_warp(score_Q - best[0][0])",
        f"{HOPPER_GATE}[more than a step of blocks]",
    ),
    Mutant(
        "a block that was taken may be taken again",
        "k2jax/kernels/moba/few_best_sm90.py",
        "* FAR + LOWEST)",
        "* FAR + FAR)",
        f"{HOPPER_GATE}[ties]",
    ),
    Mutant(
        "the backward of a text computes all pairs as long as its forward does",
        "k2jax/kernels/moba/sm90.py",
        "packed, BACKWARD_KEYS_OF_A_CHOICE)",
        "packed, FORWARD_KEYS_OF_A_CHOICE)",
        f"{HOPPER}test_the_gradient_computes_every_pair_once_where_that_is_faster[MoBA, 6K]",
    ),
    Mutant(
        "both warpgroups put their results where there is room for one's",
        "k2jax/kernels/attention/tiles_sm90.py",
        "plgpu.barrier_wait(out_free.at[wg])",
        "plgpu.wait_smem_to_gmem(0, wait_read_only=True)",
        f"{HOPPER_IS_EXACT}[full MLA]",
    ),
    Mutant(
        "whoever did not choose a block sends its keys a gradient all the same",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        "step.unit.bit) != 0, lse_Q, jnp.inf)",
        "step.unit.bit) != 0, lse_Q, lse_Q)",
        f"{HOPPER}test_the_fused_gradient_of_a_short_text_is_as_exact_as_plain_attention_in_its_type"
        "[a tile and a half, grouped heads]",
    ),
    Mutant(
        "every turn of heads computes the first ones",
        "k2jax/kernels/attention/fused_gradient_sm90.py",
        'lax.axis_index("heads") * lax.axis_size("head")',
        '0 * lax.axis_index("heads") * lax.axis_size("head")',
        f"{HOPPER_FUSED}[full, heads and batch rows]",
    ),
    Mutant(
        "a row that did not choose a block takes its maximum",
        "k2jax/kernels/attention/tiles_sm90.py",
        "new_Q = jnp.where(chosen_Q, new_Q, max_Q)",
        "new_Q = jnp.maximum(new_Q, max_Q)",
        f"{HOPPER_SHORT}[more than 32 blocks]",
    ),
    Mutant(
        "a query of a short text does not see its own block",
        "k2jax/kernels/moba/sm90.py",
        "| bits(own_T)",
        "| bits(jnp.maximum(own_T - 1, 0))",
        f"{HOPPER_SHORT}[a tile and a half, grouped heads]",
    ),
    Mutant(
        "the clip is told the smallest of a head's largest logits",
        "k2jax/kernels/attention/tpu.py",
        "jnp.max(max_XT[:, :T], axis=1)",
        "jnp.min(max_XT[:, :T], axis=1)",
        "tests/test_clip_paths.py::test_a_clip_is_driven_by_the_kernels_for_tpus[full]",
    ),
    Mutant(
        "the TPU kernel hides a query's own key",
        "k2jax/kernels/attention/tiles_tpu.py",
        "(key_LN <= _iota(shape, 0, position))",
        "(key_LN < _iota(shape, 0, position))",
        f"{TPU_IS_EXACT}[full, several tiles]",
    ),
    Mutant(
        "a tile on a TPU reads one step of keys too few",
        "k2jax/kernels/attention/tiles_tpu.py",
        "last_BY // N + 1 - first_BY, 0)",
        "jnp.maximum(last_BY // N - first_BY, 1), 0)",
        f"{TPU_IS_EXACT}[full, several tiles]",
    ),
    Mutant(
        "on a TPU a block's gradient forgets all tiles but its last",
        "k2jax/kernels/attention/keys_gradient_tpu.py",
        "is_first = (y == 0) | (block_Y[jnp.maximum(y - 1, 0)] != block)",
        "is_first = y >= 0",
        f"{TPU_IS_EXACT}[a tile and a half, grouped heads]",
    ),
    Mutant(
        "empty places of a TPU's tiles send gradients back",
        "k2jax/kernels/moba/tpu.py",
        "lse_P = jnp.where(row_P < 0, jnp.inf, lse_XT.reshape(-1)[place_P])",
        "lse_P = jnp.where(row_P < 0, jnp.nan, lse_XT.reshape(-1)[place_P])",
        f"{TPU_IS_EXACT}[a tile and a half, grouped heads]",
    ),
    Mutant(
        "a block that nobody chose keeps what its memory held",
        "k2jax/kernels/moba/tpu.py",
        "was_chosen_W11 = groups.span_Z2[:, 1, None, None] > 0",
        "was_chosen_W11 = groups.span_Z2[:, 1, None, None] >= 0",
        f"{TPU_IS_EXACT}[a tile and a half, grouped heads]",
    ),
    Mutant(
        "None takes the kernels that never ran on a TPU without a word",
        "k2jax/kernels/tpu.py",
        "return None if not_tpu() else",
        "return None if not not_tpu() else",
        "tests/test_moba_tpu.py::test_none_does_not_take_on_a_tpu_what_never_ran_on_one_and_says_its_name",
    ),
    Mutant(
        "a page keeps the keys' sum of its last owner",
        "k2jax/kernels/moba/decode.py",
        "jnp.where((place_B == 0)[:, None, None], 0.0, pages.sum_PGK[page_B])",
        "pages.sum_PGK[page_B]",
        "tests/test_moba_decode.py::test_a_page_forgets_its_last_owner",
    ),
    Mutant(
        "decoding scores the query's own page, too",
        "k2jax/kernels/moba/decode.py",
        "candidate_BN = jnp.arange(N) < own_B[:, None]",
        "candidate_BN = jnp.arange(N) <= own_B[:, None]",
        "tests/test_moba_decode.py::test_every_last_token_reads_what_it_reads_in_one_pass[zeros-2]",
    ),
    Mutant(
        "tiles of equal blocks overlap",
        "k2jax/kernels/moba/grouping.py",
        "tiles_Z = -(-size_Z // L)",
        "tiles_Z = size_Z // L",
        f"{HOPPER}test_every_pair_has_a_place_in_a_tile_of_its_block[random]",
    ),
)

MUTANTS = (
    *KERNELS_MUTANTS,
    *MACHINE_MUTANTS,
    *ATTENTION_MUTANTS,
    *OPTIMIZER_MUTANTS,
    *NUMERICS_MUTANTS,
    *MODEL_MUTANTS,
    *TRAINING_MUTANTS,
    *DATA_MUTANTS,
    *REPORT_MUTANTS,
    *SOURCE_MUTANTS,
    *RUNNING_MUTANTS,
)
