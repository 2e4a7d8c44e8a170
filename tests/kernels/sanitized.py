"""A few small calls of all CUDA kernels of one operator, to be run under compute-sanitizer: ``python -m
tests.kernels.sanitized OP``. Every tensor comes to the device by a copy, so that it counts as initialised."""

from __future__ import annotations

import sys

import torch

from kernels import registry, selfcheck
from kernels.cases import CASES, Case
from kernels.tolerance import bound, error
from tests.kernels.delta_rules import BF16, RULES
from tests.kernels.device_checks import Runner, judge

LENGTHS = (65, 0, 1, 30)


def delta_rule(op: str, device: torch.device) -> None:
    (rule,) = (rule for rule in RULES if rule.op == op)
    for heads, dims in (((1, 2), (64, 64)), ((1, 1), (128, 128))):
        inputs = rule.inputs(LENGTHS, heads, dims, BF16)
        for name in {"cuda", "hopper", "wgmma"} & {known.name for known in registry.able(op, device, BF16, dims)}:
            judge(Runner(rule, name, device)(inputs, LENGTHS), rule.exact(inputs, LENGTHS))


def rows(op: str, device: torch.device) -> None:
    every = [case for cases in CASES for case in cases(BF16, True) if case.op == op]
    for case in every:
        there = {name: x.to(device) for name, x in case.inputs.items()}
        assert registry.choose(op, device, BF16, case.shape).name == "cuda"
        actual = selfcheck.outputs_and_gradients(case, there)
        assert all(error(x, exact[name]) <= bound(BF16, name) for exact in [_exact(case)] for name, x in actual.items())


def _exact(case: Case) -> dict[str, torch.Tensor]:
    with registry.force(case.op, "reference"):
        return selfcheck.outputs_and_gradients(case, {name: x.double() for name, x in case.inputs.items()})


if __name__ == "__main__":
    operator = sys.argv[1]
    (delta_rule if operator in {rule.op for rule in RULES} else rows)(operator, torch.device("cuda"))
