from dataclasses import replace

import numpy as np
import pytest
from score_tables import cohort

from ctclip.evaluation import subgroups


def test_a_model_that_fails_on_one_kernel_is_found_out():
    table = cohort(600)
    kernel = np.array(["sharp", "soft"])[np.arange(600) // 2 % 2]
    scores = np.where((kernel == "soft")[:, None], table.scores, table.scores - table.labels * 2)
    found = subgroups.gaps(replace(table, scores=scores, meta={"kernel": kernel}), replicates=500)
    worse = next(g for g in found if g.group == "sharp" and g.finding == "Emphysema")
    assert worse.is_clear
    assert worse.gap < -0.1
    assert any(g.finding == "macro (2)" for g in found)


def test_equal_groups_show_no_clear_gap_more_often_than_chance():
    clear = []
    for seed in range(20):
        table = cohort(300, seed=seed)
        sex = np.array(["F", "M"])[np.arange(300) // 2 % 2]
        found = subgroups.gaps(replace(table, meta={"sex": sex}), replicates=250)
        clear += [g.is_clear for g in found if g.group == "F" and g.finding == "Emphysema"]
    assert sum(clear) <= 5


def test_unknown_values_are_in_no_group_and_small_groups_are_left_out():
    table = cohort(200)
    sex = np.array(["F"] * 100 + ["M"] * 90 + [""] * 6 + ["D"] * 4)
    found = subgroups.gaps(replace(table, meta={"sex": sex}), replicates=250)
    assert {gap.group for gap in found} == {"F", "M"}


@pytest.mark.parametrize(
    ("age", "group"), [("49.9", "< 50"), ("50", "50 to 65"), ("90", ">= 80"), ("?", "")]
)
def test_ages_are_put_into_ranges(age, group):
    assert subgroups.binned("age", np.array([age]))[0] == group
