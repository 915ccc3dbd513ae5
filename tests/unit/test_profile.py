"""Traces that can't be: steps and ranks that a run does not have are told."""

import pytest
from support.training import recipe

from megacode.errors import UserError
from megacode.train.profile import check_profile


@pytest.mark.parametrize(
    ("logging", "message"),
    [
        ({"profile_steps": [1, 4], "profile_ranks": [0, 3]}, None),
        ({"profile_ranks": [99]}, None),  # of no step
        ({"profile_steps": [1, 5]}, r"logging\.profile_steps: no step 5; schedule\.steps is 4, name 1 to 4"),
        ({"profile_steps": [0]}, r"logging\.profile_steps: no step 0"),
        ({"profile_steps": [1], "profile_ranks": [0, 4]}, r"logging\.profile_ranks: no rank 4; name 0 to 3"),
        ({"profile_steps": [1], "profile_ranks": [-1]}, r"logging\.profile_ranks: no rank -1"),
        ({"profile_steps": [1], "profile_ranks": []}, r"logging\.profile_ranks is empty"),
    ],
)
def test_traces_that_no_step_or_rank_can_write_are_refused(logging, message):
    config = recipe(logging=logging, schedule={"steps": 4, "warmup_steps": 1})
    if message is None:
        check_profile(config, world_size=4)
        return
    with pytest.raises(UserError, match=message):
        check_profile(config, world_size=4)
