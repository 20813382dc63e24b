from benchmarks import ranking


def test_runs_must_be_there(script, tmp_path):
    code, _, err = script(ranking)
    assert (code, "runs=DIR must be given" in err) == (2, True)
    code, _, err = script(ranking, f"runs={tmp_path}")
    assert (code, "there is no checkpoint below it" in err) == (2, True)
