"""What is said of the positions at which prompts are read."""

from shipsfast.prompts.reads import as_places, at_places


def test_which_token_it_is_and_prompts_that_are_alike_up_to_there():
    ids = [[5, 6, 7, 8], [5, 6, 9]]
    (one,) = at_places(ids, as_places(-1, 2), None).notes
    assert one == "prompt 0 is read behind its token 8 (3 of 4), counted from 0"
    assert at_places(ids, as_places(1, 2), None).notes == (
        "prompt 0 is read behind its token 6 (1 of 4), counted from 0",
        "all 2 prompts begin with the same tokens up to where they are read: their scores are one and the same",
    )
