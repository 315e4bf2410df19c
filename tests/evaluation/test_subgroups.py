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


def test_a_subgroup_that_is_left_out_is_named_with_the_reason():
    """Every slice is thick: no comparison; four patients of another sex are too few for one."""
    table = replace(
        cohort(200),
        meta={
            "slice_thickness_mm": np.full(200, "5.0"),
            "sex": np.array(["F"] * 100 + ["M"] * 92 + ["D"] * 8),
            "hospital": np.full(200, ""),
            "kernel": np.array(["sharp", "soft"])[np.arange(200) // 2 % 2],
        },
    )
    thickness, sex, hospital = subgroups.left_out(table, subgroups.gaps(table, replicates=0))
    assert thickness == "slice_thickness_mm left out: all known cases are in one group, >= 3.01."
    assert sex.startswith("sex left out for D: no finding has 5 positive and 5 negative patients")
    assert hospital == "hospital left out: not known of any case."


@pytest.mark.parametrize(
    ("age", "group"), [("49.9", "< 50"), ("50", "50 to 65"), ("90", ">= 80"), ("?", "")]
)
def test_ages_are_put_into_ranges(age, group):
    assert subgroups.binned("age", np.array([age]))[0] == group
