"""Moves tokens to their experts and back, without capacity and without drops.

Every group of rows is padded to whole tiles, which bounds their number statically. Both directions and both
gradients are gathers, because the permutation and its inverse are known: moving tokens needs no scatter-add, whose
order of sums differs between runs on a GPU.

Legend: N tokens, J experts per token, E experts, D features, R rows in expert order with padding, A = N * J
assignments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.kernels.grouped_matmul import TILE


class Plan(NamedTuple):
    """Where each assignment's row lies.

    row_NJ: row of an assignment, or R for one to an expert that is not here. assignment_R: assignment of a row, or A
    for padding. sizes_E: rows of each expert with its padding.
    """

    row_NJ: jax.Array
    assignment_R: jax.Array
    sizes_E: jax.Array


def plan_dispatch(ids_NJ, num_experts: int, *, always_here: bool = True) -> Plan:
    """Sorts the assignments by expert and lays every expert's rows out from a tile's start.

    always_here: every id lies in 0 .. num_experts - 1; otherwise ids outside are left out. The experts of one token
    must differ: the number of rows counts on it.
    """
    num_assignments = ids_NJ.size
    most = num_assignments if always_here else ids_NJ.shape[0] * min(ids_NJ.shape[1], num_experts)
    # An expert pads by at most TILE - 1 rows, and only experts that got a token pad at all.
    num_rows = -(-(most + min(num_experts, most) * (TILE - 1)) // TILE) * TILE
    ids_A = ids_NJ.reshape(-1)
    if not always_here:
        ids_A = jnp.where((ids_A >= 0) & (ids_A < num_experts), ids_A, num_experts)
    load_E = jnp.zeros(num_experts, jnp.int32).at[ids_A].add(1, mode="drop")
    sizes_E = -(-load_E // TILE) * TILE
    # Padding before expert e shifts its rows; the sorted order itself comes from one stable sort.
    shift_E = (jnp.cumsum(sizes_E) - sizes_E) - (jnp.cumsum(load_E) - load_E)
    order_A = jnp.argsort(ids_A, stable=True)
    sorted_A = ids_A[order_A]
    row_of_sorted_A = jnp.arange(num_assignments) + shift_E[jnp.minimum(sorted_A, num_experts - 1)]
    row_of_sorted_A = jnp.where(sorted_A < num_experts, row_of_sorted_A, num_rows)
    assignment_R = jnp.full(num_rows, num_assignments).at[row_of_sorted_A].set(order_A, mode="drop")
    row_A = jnp.zeros(num_assignments, jnp.int32).at[order_A].set(row_of_sorted_A, unique_indices=True)
    return Plan(row_A.reshape(ids_NJ.shape), assignment_R, sizes_E)


@jax.custom_vjp
def to_experts(x_ND, plan: Plan):
    """Each token's features in the rows of its experts; padding rows are zero. Returns [R, D]."""
    per_token = plan.row_NJ.shape[1]
    return x_ND.at[plan.assignment_R // per_token].get(mode="fill", fill_value=0)


def _to_experts_fwd(x_ND, plan):
    return to_experts(x_ND, plan), plan


def _to_experts_bwd(plan, grad_RD):
    return _rows(grad_RD, plan).sum(axis=1), None


to_experts.defvjp(_to_experts_fwd, _to_experts_bwd)


@jax.custom_vjp
def from_experts(y_RD, weights_NJ, plan: Plan):
    """The weighted sum of each token's rows, in float32 as in the released model. Returns [N, D] float32."""
    return jnp.einsum("NJD,NJ->ND", _rows(y_RD, plan).astype(jnp.float32), weights_NJ)


def _rows(y_RD, plan):
    """The row of every assignment [N, J, D], zero for those that are not here."""
    return y_RD.at[plan.row_NJ].get(mode="fill", fill_value=0)


def _from_experts_fwd(y_RD, weights_NJ, plan):
    return from_experts(y_RD, weights_NJ, plan), (y_RD, weights_NJ, plan)


def _from_experts_bwd(saved, grad_ND):
    y_RD, weights_NJ, plan = saved
    per_token = plan.row_NJ.shape[1]
    grad_rows_RD = grad_ND.at[plan.assignment_R // per_token].get(mode="fill", fill_value=0)
    weight_R = weights_NJ.reshape(-1).at[plan.assignment_R].get(mode="fill", fill_value=0)
    grad_weights_NJ = jnp.einsum("NJD,ND->NJ", _rows(y_RD, plan).astype(jnp.float32), grad_ND)
    grad_y_RD = (grad_rows_RD * weight_R[:, None]).astype(y_RD.dtype)
    return grad_y_RD, grad_weights_NJ, None


from_experts.defvjp(_from_experts_fwd, _from_experts_bwd)
