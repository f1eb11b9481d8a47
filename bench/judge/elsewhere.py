"""What of a run can stand beside an import: another tool times a prefill or a generation, not one after the other."""

import msgspec

from bench.case import Case
from kvcache.arithmetic.costs import Phase

SHORT = 0.25
"""A generation of at most so many times the tokens before it has the length of any other such one: the tokens that its
steps attend to on average differ by at most half as much, an eighth."""


def work(case: Case, phase: Phase) -> Case:
    """Reduce a case to what a phase of it does, equal for cases whose times of that phase can be ranked.

    A prefill takes its time whatever is generated after it. Decoding is known by the tokens before it and by their
    number, which a short generation leaves open (`SHORT`). Whether those tokens came as a prompt or as a depth does not
    matter; a prompt of one token is itself a step like the others.
    """
    if phase == "prefill":
        return msgspec.structs.replace(case, n_gen=0)
    is_step = case.n_prompt == 1
    before, n_steps = case.n_depth + (0 if is_step else case.n_prompt), case.n_gen - (0 if is_step else 1)
    return msgspec.structs.replace(case, n_prompt=0, n_depth=before, n_gen=n_steps if n_steps > SHORT * before else 0)
