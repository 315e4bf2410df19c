"""The cohort that most runs train on."""

import pytest
import toy_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return toy_cohort.build(tmp_path_factory.mktemp("cohort"))
