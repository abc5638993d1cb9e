"""The table of mutants is of the statistics module as it is, and every survivor is explained."""

from tests.mutation.run import TABLE, digest


def test_the_table_is_of_this_module():
    """`make mutants` was run since it was changed."""
    told = TABLE.read_text()
    assert f"(`{digest()}`)" in told
    assert "unexplained" not in told
