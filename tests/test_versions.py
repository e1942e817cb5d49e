from nemo_longctx.versions import versions_of


def test_what_is_not_installed_is_said_and_ends_nothing():
    found = versions_of("numpy", "no-such-package")
    assert found["numpy"][0].isdigit()
    assert found["no-such-package"] == "not installed"
