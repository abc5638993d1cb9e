"""The contracts that installed plugins bring are held here, beside our own."""

from nope import plugins

BROUGHT = {
    f"{contract.__name__}_of_{contract.__module__.replace('.', '_')}": contract
    for contract in plugins.contracts()
}
globals().update(BROUGHT)


def test_every_contract_that_is_brought_is_held():
    """None takes the place of another: two packages may have a name in common."""
    assert list(BROUGHT.values()) == plugins.contracts()


def test_every_installed_plugin_works():
    """One that cannot be read is held to nothing: that is no pass, and stops no other."""
    found = (*plugins.load(plugins.CLAIMS), *plugins.registered(), *plugins.holding())
    assert [plugin.trouble for plugin in found if plugin.trouble] == []
